//! The flags that give a new model its shape, with the first LaaM's names and defaults.

use clap::Args;

use crate::model::{Config, RopeScaling};

#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Shape of the model")]
pub struct ShapeArguments {
    /// Numbers a token is carried in
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub hidden_size: usize,
    /// Width of the feed-forward part
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub intermediate_size: usize,
    /// Blocks
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub num_hidden_layers: usize,
    /// Attention heads; the hidden size is shared out among them
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub num_attention_heads: usize,
    /// Heads of keys and values, each shared by several attention heads
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub num_key_value_heads: usize,
    /// Tokens a window
    #[arg(long, value_name = "N", default_value_t = 1024)]
    pub max_position_embeddings: usize,
    /// One table for the embedding and the head
    #[arg(long)]
    pub tie_word_embeddings: bool,
    /// Base of the rotary embedding's wavelengths
    #[arg(long, value_name = "X", default_value_t = 10000.0)]
    pub rope_theta: f64,
}

impl ShapeArguments {
    /// The configuration for a vocabulary, checked. The ids of special tokens are the caller's.
    pub fn config(&self, vocab_size: usize) -> anyhow::Result<Config> {
        if !self.hidden_size.is_multiple_of(self.num_attention_heads.max(1)) {
            return Err(crate::error::error(
                format!(
                    "{} attention heads cannot share a hidden size of {} evenly, in \
                     --num_attention_heads",
                    self.num_attention_heads, self.hidden_size
                ),
                "make --hidden_size a multiple of --num_attention_heads",
            ));
        }
        let config = Config {
            vocab_size,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_hidden_layers: self.num_hidden_layers,
            num_attention_heads: self.num_attention_heads,
            num_key_value_heads: self.num_key_value_heads,
            head_dim: self.hidden_size / self.num_attention_heads.max(1),
            max_position_embeddings: self.max_position_embeddings,
            rms_norm_eps: 1e-6,
            rope_theta: self.rope_theta,
            rope_scaling: RopeScaling::None,
            tie_word_embeddings: self.tie_word_embeddings,
            initializer_range: 0.02,
            bos_token_id: None,
            eos_token_id: None,
            pad_token_id: None,
        };
        config.validate()?;
        Ok(config)
    }
}
