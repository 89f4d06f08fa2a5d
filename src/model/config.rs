//! The shape of a Llama, in the words of a Hugging Face `config.json`.

use crate::error;

/// Every number that shapes the model.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Token ids.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key/value heads, a divisor of the query heads.
    pub num_key_value_heads: usize,
    /// Components per head.
    pub head_dim: usize,
    /// The longest window the model was meant for.
    pub max_position_embeddings: usize,
    /// Addend of the mean of squares in RMSNorm.
    pub rms_norm_eps: f64,
    /// Base of RoPE's frequencies.
    pub rope_theta: f64,
    /// RoPE scaling.
    pub rope_scaling: RopeScaling,
    /// One matrix for embedding and LM head.
    pub tie_word_embeddings: bool,
    /// The standard deviation of the initial weights.
    pub initializer_range: f64,
    /// Id that begins a text.
    pub bos_token_id: Option<u32>,
    /// Each ends a text.
    pub eos_token_ids: Vec<u32>,
    /// Id of padding.
    pub pad_token_id: Option<u32>,
    /// Kind of the windows that the model was trained on, by laam's name, if known.
    pub window_kind: Option<String>,
}

/// RoPE scaling of a model for contexts longer than those it was trained on.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum RopeScaling {
    /// Frequencies as they are.
    #[default]
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// Divisor of the frequencies.
        factor: f64,
    },
    /// Llama 3.1's: wavelengths above `original_max_position_embeddings / low_freq_factor` are
    /// stretched by `factor`, those below `original_max_position_embeddings / high_freq_factor`
    /// stay, those between are blended.
    Llama3 {
        /// Stretch of the longest wavelengths.
        factor: f64,
        /// Divisor of the context that gives the shortest stretched wavelength.
        low_freq_factor: f64,
        /// Divisor of the context that gives the longest wavelength that stays.
        high_freq_factor: f64,
        /// Context that the model was first trained on.
        original_max_position_embeddings: usize,
    },
}

impl Config {
    /// The most layers and the most parameters (4 TiB of them, in float32) that are taken for meant.
    const MAX_LAYERS: usize = 1 << 12;
    /// The largest in use is 256; the table of rotations has half as many entries for each position.
    const MAX_HEAD_DIM: usize = 1 << 16;
    const MAX_PARAMETERS: u128 = 1 << 40;

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
                return Err(error::invalid(name, size, "at least 1 and at most 2147483648"));
            }
        }
        if self.head_dim > Self::MAX_HEAD_DIM {
            let range = format!("at most {}", Self::MAX_HEAD_DIM);
            return Err(error::invalid("head_dim", self.head_dim, range));
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            return Err(error::invalid(
                "num_attention_heads",
                self.num_attention_heads,
                format!("a multiple of `num_key_value_heads`, {}", self.num_key_value_heads),
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(error::config(
                format!("invalid `head_dim` {}: must be even", self.head_dim),
                "rotary embeddings rotate pairs: make `hidden_size` / `num_attention_heads` even",
            ));
        }
        if self.num_hidden_layers > Self::MAX_LAYERS
            || self.parameter_count() > Self::MAX_PARAMETERS
        {
            return Err(error::config(
                format!(
                    "model too large: {} layers, {} parameters",
                    self.num_hidden_layers,
                    self.parameter_count()
                ),
                format!("at most {} layers and 2^40 parameters are supported", Self::MAX_LAYERS),
            ));
        }
        self.validate_numbers()
    }

    fn validate_numbers(&self) -> anyhow::Result<()> {
        let mut positive =
            vec![("rms_norm_eps", self.rms_norm_eps), ("rope_theta", self.rope_theta)];
        match self.rope_scaling {
            RopeScaling::None => {}
            RopeScaling::Linear { factor } => positive.push(("rope_scaling.factor", factor)),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, .. } => {
                positive.push(("rope_scaling.factor", factor));
                positive.push(("rope_scaling.low_freq_factor", low_freq_factor));
                // The blend divides by the difference of the two.
                let apart = high_freq_factor - low_freq_factor;
                positive.push(("rope_scaling.high_freq_factor - low_freq_factor", apart));
            }
        }
        for (name, value) in positive {
            if !(value > 0.0 && value.is_finite()) {
                return Err(error::invalid(name, value, "a number above 0"));
            }
        }
        // transformers 5 refuses a range above 1.
        if !(0.0..=1.0).contains(&self.initializer_range) {
            return Err(error::invalid(
                "initializer_range",
                self.initializer_range,
                "at least 0 and at most 1",
            ));
        }
        let ids = [("bos_token_id", self.bos_token_id), ("pad_token_id", self.pad_token_id)];
        let ids = ids.into_iter().filter_map(|(name, id)| Some((name, id?)));
        let eos = self.eos_token_ids.iter().map(|&id| ("eos_token_id", id));
        for (name, id) in ids.chain(eos) {
            if id as usize >= self.vocab_size {
                return Err(error::invalid(
                    name,
                    id,
                    format!("below `vocab_size`, {}", self.vocab_size),
                ));
            }
        }
        Ok(())
    }

    /// Warnings about what other programs do not support of this shape.
    pub fn compatibility_warnings(&self) -> Vec<String> {
        let (hidden, heads) = (self.hidden_size, self.num_attention_heads);
        let mut warnings = Vec::new();
        if !hidden.is_multiple_of(heads) {
            warnings.push(format!(
                "hidden_size {hidden} is not a multiple of num_attention_heads {heads}: transformers 5 \
                 does not load such a model"
            ));
        }
        warnings
    }

    /// Parameters of the model. Wide enough for any sizes, before they are validated.
    pub fn parameter_count(&self) -> u128 {
        let tables = if self.tie_word_embeddings { 1 } else { 2 };
        let table = self.vocab_size as u128 * self.hidden_size as u128;
        let norms = (2 * self.num_hidden_layers as u128 + 1) * self.hidden_size as u128;
        self.block_matrix_parameters()
            .saturating_add(table.saturating_mul(tables))
            .saturating_add(norms)
    }

    /// Parameters in the matrices of the blocks.
    pub fn block_matrix_parameters(&self) -> u128 {
        let heads = (self.num_attention_heads as u128 + self.num_key_value_heads as u128) * 2;
        let attention = heads.saturating_mul(self.head_dim as u128);
        let one = attention.saturating_add(3 * self.intermediate_size as u128);
        one.saturating_mul(self.hidden_size as u128).saturating_mul(self.num_hidden_layers as u128)
    }

    /// Query heads per key/value head (GQA).
    pub fn group(&self) -> usize {
        self.num_attention_heads / self.num_key_value_heads
    }

    /// Radians a position for each pair of a head's components, `[head_dim / 2]`, scaling
    /// included.
    pub fn rope_frequencies(&self) -> Vec<f64> {
        let plain = (0..self.head_dim / 2)
            .map(|pair| self.rope_theta.powf(-2.0 * pair as f64 / self.head_dim as f64));
        match self.rope_scaling {
            RopeScaling::None => plain.collect(),
            RopeScaling::Linear { factor } => plain.map(|frequency| frequency / factor).collect(),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => plain
                .map(|frequency| {
                    // How often the pair turns within the original window: 0 of the blend at
                    // low_freq_factor turns, 1 at high_freq_factor.
                    let turns =
                        original_max_position_embeddings as f64 * frequency / std::f64::consts::TAU;
                    let blend = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    let blend = blend.clamp(0.0, 1.0);
                    frequency * (blend + (1.0 - blend) / factor)
                })
                .collect(),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::error::hint_of;

    /// The first LaaM's shape.
    pub(crate) fn original() -> Config {
        Config {
            vocab_size: 32768,
            hidden_size: 64,
            intermediate_size: 256,
            num_hidden_layers: 8,
            num_attention_heads: 32,
            num_key_value_heads: 4,
            head_dim: 2,
            max_position_embeddings: 512,
            rms_norm_eps: 1e-6,
            rope_theta: 10000.0,
            rope_scaling: RopeScaling::None,
            tie_word_embeddings: false,
            initializer_range: 0.02,
            bos_token_id: Some(0),
            eos_token_ids: vec![1],
            pad_token_id: Some(4),
            window_kind: None,
        }
    }

    #[test]
    fn config_rejects_invalid_shapes() {
        original().validate().unwrap();
        let spoilers: [fn(&mut Config); 13] = [
            |c| c.vocab_size = 0,
            |c| c.head_dim = 1 << 31,
            |c| c.hidden_size = usize::MAX,
            |c| c.head_dim = 3,
            |c| c.num_key_value_heads = 5,
            |c| c.num_hidden_layers = 1 << 20,
            |c| (c.vocab_size, c.hidden_size) = (1 << 31, 1 << 31),
            |c| c.rms_norm_eps = 0.0,
            |c| c.rope_theta = f64::NAN,
            |c| c.rope_scaling = RopeScaling::Linear { factor: 0.0 },
            |c| c.initializer_range = -0.02,
            |c| c.pad_token_id = Some(32768),
            |c| {
                c.rope_scaling = RopeScaling::Llama3 {
                    factor: 8.0,
                    low_freq_factor: 4.0,
                    high_freq_factor: 4.0,
                    original_max_position_embeddings: 8192,
                }
            },
        ];
        for (number, spoil) in spoilers.iter().enumerate() {
            let mut config = original();
            spoil(&mut config);
            let error = config.validate().expect_err(&format!("spoiler {number}"));
            assert!(hint_of(&error).is_some(), "spoiler {number}");
        }
    }

    #[test]
    fn rope_frequencies_match_transformers() {
        // From transformers 5.23.0 (ROPE_INIT_FUNCTIONS), theta 10,000, head_dim 16, float32.
        let plain = [
            1.0,
            0.316227764,
            0.100000001,
            0.0316227786,
            0.00999999978,
            0.00316227786,
            0.00100000005,
            0.000316227786,
        ];
        let linear = [
            0.25,
            0.079056941,
            0.0250000004,
            0.00790569466,
            0.00249999994,
            0.000790569466,
            0.000250000012,
            7.90569466e-05,
        ];
        let llama3 = [
            1.0,
            0.316227764,
            0.100000001,
            0.0184966773,
            0.00124999997,
            0.000395284733,
            0.000125000006,
            3.95284733e-05,
        ];
        let mut config = Config { head_dim: 16, ..original() };
        let close = |config: &Config, expected: [f64; 8]| {
            for (ours, theirs) in config.rope_frequencies().iter().zip(expected) {
                assert!((ours / theirs - 1.0).abs() < 1e-6, "{ours} for {theirs}");
            }
        };
        close(&config, plain);
        config.rope_scaling = RopeScaling::Linear { factor: 4.0 };
        close(&config, linear);
        config.rope_scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 512,
        };
        close(&config, llama3);
    }
}
