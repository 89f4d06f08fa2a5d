//! Every number a training run depends on: the flags of `laam train`, and the keys of a recipe's
//! stage, which are the same words.

use clap::{Args, Parser, ValueEnum};
use serde::{Deserialize, Serialize};

use super::{Decline, Schedule};
use crate::dtype::Dtype;
use crate::error;
use crate::llama::{AdamW, Muon, Optimizer};
use crate::model::{Config, RopeScaling};
use crate::tokenizer::Special;
use crate::tokens::{Kind, Order};

/// What steps the matrices inside the blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    #[default]
    Adamw,
    /// Muon for them, AdamW for embeddings, head and norms.
    Muon,
}

/// The defaults are the first LaaM's, where it had the flag.
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Windows a step (times gradient-accumulation-steps)
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Training")]
    pub batch_size: usize,
    /// Batches whose gradients make one step
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Training")]
    pub gradient_accumulation_steps: usize,
    /// Times through all windows; a fraction ends within one
    #[arg(long, value_name = "N", default_value_t = 3.0, help_heading = "Training")]
    pub epochs: f64,
    /// Steps in all, whatever --epochs says
    #[arg(long, value_name = "N", help_heading = "Training")]
    pub max_steps: Option<u64>,
    /// For the initial weights, and the order of the windows
    #[arg(long, value_name = "N", default_value_t = 42, help_heading = "Training")]
    pub seed: u64,
    /// The order of the windows
    #[arg(long, value_enum, default_value_t, help_heading = "Training")]
    pub order: Order,
    /// How the text is cut into windows
    #[arg(long, value_enum, default_value_t = Kind::Original, help_heading = "Training")]
    pub windows: Kind,
    /// Tokens from one stream window to the next [default: a window's length]
    #[arg(long, value_name = "N", help_heading = "Training")]
    pub stride: Option<usize>,
    /// The precision of training, and of the weights that are saved [default: bfloat16 on an NVIDIA
    /// GPU, else float32]
    #[arg(long, value_enum, help_heading = "Training")]
    pub precision: Option<Dtype>,
    /// Results are the same bits on any run; the cpu backend always is
    #[arg(long, help_heading = "Training")]
    pub deterministic: bool,

    #[arg(long, value_name = "N", default_value_t = 128, help_heading = "Model")]
    pub hidden_size: usize,
    #[arg(long, value_name = "N", default_value_t = 256, help_heading = "Model")]
    pub intermediate_size: usize,
    #[arg(long, value_name = "N", default_value_t = 4, help_heading = "Model")]
    pub num_hidden_layers: usize,
    #[arg(long, value_name = "N", default_value_t = 4, help_heading = "Model")]
    pub num_attention_heads: usize,
    #[arg(long, value_name = "N", default_value_t = 4, help_heading = "Model")]
    pub num_key_value_heads: usize,
    /// [default: hidden-size / num-attention-heads]
    #[arg(long, value_name = "N", help_heading = "Model")]
    pub head_dim: Option<usize>,
    /// Tokens a window
    #[arg(long, value_name = "N", default_value_t = 1024, help_heading = "Model")]
    pub max_position_embeddings: usize,
    /// One matrix for embedding and head
    #[arg(long, help_heading = "Model")]
    pub tie_word_embeddings: bool,
    #[arg(long, value_name = "X", default_value_t = 10000.0, help_heading = "Model")]
    pub rope_theta: f64,
    /// Standard deviation of the initial weights
    #[arg(long, value_name = "X", default_value_t = 0.02, help_heading = "Model")]
    pub initializer_range: f64,

    #[arg(long, value_enum, default_value_t, help_heading = "Optimizer")]
    pub optimizer: Method,
    #[arg(long, value_name = "X", default_value_t = 1e-3, help_heading = "Optimizer")]
    pub learning_rate: f64,
    /// Muon's own rate
    #[arg(long, value_name = "X", default_value_t = 0.02, help_heading = "Optimizer")]
    pub muon_learning_rate: f64,
    #[arg(long, value_name = "X", default_value_t = 0.95, help_heading = "Optimizer")]
    pub muon_momentum: f64,
    /// Decoupled weight decay of matrices and embeddings
    #[arg(long, value_name = "X", default_value_t = 0.1, help_heading = "Optimizer")]
    pub decay_rate: f64,
    #[arg(long, value_name = "X", default_value_t = 0.9, help_heading = "Optimizer")]
    pub adam_beta1: f64,
    #[arg(long, value_name = "X", default_value_t = 0.999, help_heading = "Optimizer")]
    pub adam_beta2: f64,
    #[arg(long, value_name = "X", default_value_t = 1e-8, help_heading = "Optimizer")]
    pub adam_epsilon: f64,
    /// Gradients are scaled down to this norm; 0: they are left as they are
    #[arg(long, value_name = "X", default_value_t = 1.0, help_heading = "Optimizer")]
    pub max_grad_norm: f64,
    /// How the rates fall after the warm-up
    #[arg(long, value_enum, default_value_t, help_heading = "Optimizer")]
    pub lr_scheduler_type: Decline,
    /// Steps over which the rates rise from 0
    #[arg(long, value_name = "N", default_value_t = 100, help_heading = "Optimizer")]
    pub warmup_steps: u64,
    /// Of wsd: the last part of the run, over which the rates fall to 0
    #[arg(long, value_name = "X", default_value_t = 0.4, help_heading = "Optimizer")]
    pub wsd_decay: f64,

    /// Steps from one line of metrics to the next
    #[arg(long, value_name = "N", default_value_t = 10, help_heading = "Progress")]
    pub logging_steps: u64,
    /// Steps from one checkpoint to the next
    #[arg(long, value_name = "N", default_value_t = 1000, help_heading = "Progress")]
    pub save_steps: u64,
    /// Checkpoints to keep beside the final model
    #[arg(long, value_name = "N", default_value_t = 3, help_heading = "Progress")]
    pub save_total_limit: usize,
    /// Steps from one measure of the verbatim rate to the next
    #[arg(long, value_name = "N", help_heading = "Progress")]
    pub eval_steps: Option<u64>,
    /// Stop once this part of the windows comes back verbatim (measured every eval-steps)
    #[arg(long, value_name = "RATE", requires = "eval_steps", help_heading = "Progress")]
    pub stop_at_verbatim: Option<f64>,
}

impl Default for Settings {
    /// What the flags say when none is given.
    fn default() -> Self {
        #[derive(Parser)]
        struct Flags {
            #[command(flatten)]
            settings: Settings,
        }
        Flags::parse_from(["laam"]).settings
    }
}

impl Settings {
    /// Refuses what no run can do.
    pub fn validate(&self) -> anyhow::Result<()> {
        for (name, value) in [
            ("batch_size", self.batch_size as u64),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps as u64),
            ("logging_steps", self.logging_steps),
            ("save_steps", self.save_steps),
            ("save_total_limit", self.save_total_limit as u64),
            ("max_steps", self.max_steps.unwrap_or(1)),
            ("eval_steps", self.eval_steps.unwrap_or(1)),
            ("stride", self.stride.unwrap_or(1) as u64),
        ] {
            if value == 0 {
                return Err(error::invalid(name, value, "at least 1"));
            }
        }
        for (name, value, open_end) in [
            ("epochs", self.epochs, f64::INFINITY),
            ("learning_rate", self.learning_rate, f64::INFINITY),
            ("muon_learning_rate", self.muon_learning_rate, f64::INFINITY),
            ("decay_rate", self.decay_rate, f64::INFINITY),
            ("max_grad_norm", self.max_grad_norm, f64::INFINITY),
            ("initializer_range", self.initializer_range, f64::INFINITY),
            ("adam_epsilon", self.adam_epsilon, f64::INFINITY),
            ("adam_beta1", self.adam_beta1, 1.0),
            ("adam_beta2", self.adam_beta2, 1.0),
            ("muon_momentum", self.muon_momentum, 1.0),
        ] {
            if !(value >= 0.0 && value < open_end) {
                let range = if open_end.is_finite() {
                    "at least 0 and below 1"
                } else {
                    "at least 0 and finite"
                };
                return Err(error::invalid(name, value, range));
            }
        }
        if self.max_steps.is_none() && self.epochs == 0.0 {
            return Err(error::invalid("epochs", self.epochs, "more than 0"));
        }
        // A weight without a gradient would be 0 / 0.
        if self.adam_epsilon == 0.0 {
            return Err(error::invalid("adam_epsilon", self.adam_epsilon, "more than 0"));
        }
        for (name, value) in [
            ("wsd_decay", self.wsd_decay),
            ("stop_at_verbatim", self.stop_at_verbatim.unwrap_or(1.0)),
        ] {
            if !(0.0..=1.0).contains(&value) {
                return Err(error::invalid(name, value, "at least 0 and at most 1"));
            }
        }
        if self.stop_at_verbatim.is_some() && self.eval_steps.is_none() {
            return Err(error::config(
                "`stop_at_verbatim` without `eval_steps`: the verbatim rate is never measured",
                "set `eval_steps` to the steps between two measurements",
            ));
        }
        if self.stride.is_some() && self.windows != Kind::Stream {
            return Err(error::config(
                "`stride` without stream windows",
                "set `windows` to stream, or remove `stride`",
            ));
        }
        Ok(())
    }

    /// The shape of the model, for a vocabulary and its special tokens.
    pub fn config(&self, vocab_size: usize, special: Special) -> anyhow::Result<Config> {
        let heads = self.num_attention_heads.max(1);
        if self.head_dim.is_none() && !self.hidden_size.is_multiple_of(heads) {
            return Err(error::config(
                format!(
                    "invalid `hidden_size` {}: must be a multiple of `num_attention_heads`, {heads}",
                    self.hidden_size
                ),
                "change one of the two, or set `head_dim`",
            ));
        }
        let config = Config {
            vocab_size,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_hidden_layers: self.num_hidden_layers,
            num_attention_heads: self.num_attention_heads,
            num_key_value_heads: self.num_key_value_heads,
            head_dim: self.head_dim.unwrap_or(self.hidden_size / heads),
            max_position_embeddings: self.max_position_embeddings,
            rms_norm_eps: 1e-6,
            rope_theta: self.rope_theta,
            rope_scaling: RopeScaling::None,
            tie_word_embeddings: self.tie_word_embeddings,
            initializer_range: self.initializer_range,
            bos_token_id: special.bos,
            eos_token_id: special.eos,
            pad_token_id: special.pad,
        };
        config.validate()?;
        Ok(config)
    }

    pub fn optimizer(&self) -> Optimizer {
        Optimizer {
            adamw: AdamW {
                beta1: self.adam_beta1,
                beta2: self.adam_beta2,
                epsilon: self.adam_epsilon,
            },
            muon: (self.optimizer == Method::Muon).then_some(Muon { momentum: self.muon_momentum }),
            weight_decay: self.decay_rate,
            // As with the Trainer, 0 is no clipping.
            max_grad_norm: if self.max_grad_norm == 0.0 {
                f64::INFINITY
            } else {
                self.max_grad_norm
            },
        }
    }

    /// Steps an epoch over so many windows. A step never reaches into the next epoch.
    pub fn steps_an_epoch(&self, windows: usize) -> u64 {
        let batches = windows.div_ceil(self.batch_size);
        batches.div_ceil(self.gradient_accumulation_steps) as u64
    }

    /// Steps in all.
    pub fn total_steps(&self, windows: usize) -> u64 {
        let by_epochs = (self.epochs * self.steps_an_epoch(windows) as f64).ceil() as u64;
        self.max_steps.unwrap_or(by_epochs)
    }

    pub fn schedule(&self, total: u64) -> Schedule {
        Schedule {
            decline: self.lr_scheduler_type,
            warmup: self.warmup_steps,
            total,
            decay_part: self.wsd_decay,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_stage_means_what_no_flags_mean() {
        let stage: Settings = toml::from_str("").unwrap();
        assert_eq!(stage, Settings::default());
        assert_eq!(stage.hidden_size, 128);
        assert_eq!(stage.epochs, 3.0);
        stage.validate().unwrap();
    }

    #[test]
    fn a_misspelt_key_is_refused() {
        assert!(toml::from_str::<Settings>("batchsize = 3").is_err());
    }

    #[test]
    fn an_epoch_of_the_originals_has_its_number_of_steps() {
        let settings = Settings { batch_size: 64, epochs: 100.0, ..Settings::default() };
        assert_eq!(settings.steps_an_epoch(4408), 69);
        assert_eq!(settings.total_steps(4408), 6900);
        let accumulated = Settings { gradient_accumulation_steps: 2, ..settings };
        assert_eq!(accumulated.steps_an_epoch(4408), 35);
    }
}
