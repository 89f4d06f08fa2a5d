//! The shape of a Llama, in the words of a Hugging Face `config.json`.

use crate::error;

/// Every number that shapes the model.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    /// The longest window the model was meant for.
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    /// Whether the head is the transpose of the embedding, one parameter for both.
    pub tie_word_embeddings: bool,
    /// The standard deviation of the initial weights.
    pub initializer_range: f64,
    pub bos_token_id: Option<u32>,
    pub eos_token_id: Option<u32>,
    pub pad_token_id: Option<u32>,
}

impl Config {
    /// Refuses shapes that no Llama has.
    pub fn validate(&self) -> anyhow::Result<()> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("max_position_embeddings", self.max_position_embeddings),
        ];
        for (name, size) in sizes {
            if size == 0 || size > 1 << 31 {
                return Err(error::error(
                    format!("{name} is {size}, in the model's configuration"),
                    format!("give {name} a value from 1 to 2147483648"),
                ));
            }
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            return Err(error::error(
                format!(
                    "{} attention heads cannot share {} key/value heads, in the model's configuration",
                    self.num_attention_heads, self.num_key_value_heads
                ),
                "make num_attention_heads a multiple of num_key_value_heads",
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(error::error(
                format!("head_dim is {}, in the model's configuration", self.head_dim),
                "rotary embeddings turn pairs: make hidden_size / num_attention_heads even",
            ));
        }
        Ok(())
    }

    /// How many query heads share a key/value head.
    pub fn group(&self) -> usize {
        self.num_attention_heads / self.num_key_value_heads
    }

    /// Radians a position for each pair of a head's components, `[head_dim / 2]`.
    pub fn rope_frequencies(&self) -> Vec<f64> {
        (0..self.head_dim / 2)
            .map(|pair| self.rope_theta.powf(-2.0 * pair as f64 / self.head_dim as f64))
            .collect()
    }
}
