//! Every number a training run depends on: the flags of `laam train`, and the keys of a recipe's
//! stage, which are the same words.

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use super::footprint::{Share, Workload};
use super::{LrDecay, LrSchedule};
use crate::backend::Backend;
use crate::device::available_host_memory;
use crate::dtype::Dtype;
use crate::error;
use crate::llama::{AdamW, Muon, Optimizer, Recompute};
use crate::model::{Config, RopeScaling};
use crate::tokenizer::Special;
use crate::tokens::{Order, WindowKind};

/// Optimizer of the matrices inside the blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// AdamW for all parameters.
    #[default]
    Adamw,
    /// Muon for them, AdamW for embeddings, head and norms.
    Muon,
}

/// Settings of a training run. The defaults are the first LaaM's, if it had the flag.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::Args))]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Windows per micro-batch, or auto: as many as fit into memory, of the --gradient-accumulation-steps
    /// windows of a step if that is given
    #[cfg_attr(feature = "cli", arg(long, value_name = "N|auto", default_value_t = DEFAULT.batch_size, value_parser = parse_batch_size, help_heading = "Training"))]
    #[serde(with = "batch_size")]
    pub batch_size: usize,
    /// Micro-batches whose gradients are accumulated per step
    #[cfg_attr(feature = "cli", arg(long, value_name = "N", default_value_t = DEFAULT.gradient_accumulation_steps, help_heading = "Training"))]
    pub gradient_accumulation_steps: usize,
    /// Slices that the windows of a batch are cut into, whose gradients are added in one order: the bits of
    /// a run depend on it, not on the number of processes, which must divide it [default: the number
    /// of processes, or that of the run that is resumed]
    #[serde(skip_serializing_if = "is_one_slice")]
    #[cfg_attr(feature = "cli", arg(long, value_name = "N", help_heading = "Training"))]
    pub dp_slices: Option<usize>,
    /// Passes over all windows; a fraction ends within one
    #[cfg_attr(feature = "cli", arg(long, value_name = "N", default_value_t = DEFAULT.epochs, help_heading = "Training"))]
    pub epochs: f64,
    /// Steps in all, whatever --epochs says
    #[cfg_attr(feature = "cli", arg(long, value_name = "N", help_heading = "Training"))]
    pub max_steps: Option<u64>,
    /// End the run after so many seconds of training, those before it was resumed included
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "cli", arg(long, value_name = "X", help_heading = "Training"))]
    pub max_seconds: Option<f64>,
    /// Seed of the initial weights and of the order of the windows
    #[cfg_attr(feature = "cli", arg(long, value_name = "N", default_value_t = DEFAULT.seed, help_heading = "Training"))]
    pub seed: u64,
    /// Order of the windows
    #[cfg_attr(feature = "cli", arg(long, value_enum, default_value_t = DEFAULT.order, help_heading = "Training"))]
    pub order: Order,
    /// How the text is cut into windows
    #[cfg_attr(feature = "cli", arg(long, value_enum, default_value_t = DEFAULT.windows, help_heading = "Training"))]
    pub windows: WindowKind,
    /// Tokens from one stream window to the next [default: the length of a window]
    #[cfg_attr(feature = "cli", arg(long, value_name = "N", help_heading = "Training"))]
    pub stride: Option<usize>,
    /// The precision of training, and of the weights that are saved [default: bfloat16 on an NVIDIA
    /// GPU, else float32]
    #[cfg_attr(feature = "cli", arg(long, value_enum, help_heading = "Training"))]
    pub precision: Option<Dtype>,
    /// Activation checkpointing: activations that the backward pass computes again, to save memory; the results have
    /// the same bits
    #[serde(skip_serializing_if = "is_default")]
    #[cfg_attr(feature = "cli", arg(long, value_enum, default_value_t = DEFAULT.recompute, help_heading = "Training"))]
    pub recompute: Recompute,

    /// Width of the residual stream
    #[cfg_attr(feature = "cli", arg(long, value_name = "N", default_value_t = DEFAULT.hidden_size, help_heading = "Model"))]
    pub hidden_size: usize,
    /// Width of the MLP
    #[cfg_attr(feature = "cli", arg(long, value_name = "N", default_value_t = DEFAULT.intermediate_size, help_heading = "Model"))]
    pub intermediate_size: usize,
    /// Transformer blocks
    #[cfg_attr(feature = "cli", arg(long, value_name = "N", default_value_t = DEFAULT.num_hidden_layers, help_heading = "Model"))]
    pub num_hidden_layers: usize,
    /// Query heads per layer
    #[cfg_attr(feature = "cli", arg(long, value_name = "N", default_value_t = DEFAULT.num_attention_heads, help_heading = "Model"))]
    pub num_attention_heads: usize,
    /// Key/value heads per layer; query heads share them evenly [default: 4 if that divides
    /// num-attention-heads, else as many as those]
    #[cfg_attr(feature = "cli", arg(long, value_name = "N", default_value_t = DEFAULT.num_key_value_heads, hide_default_value = true, help_heading = "Model"))]
    pub num_key_value_heads: usize,
    /// Components per head [default: hidden-size / num-attention-heads]
    #[cfg_attr(feature = "cli", arg(long, value_name = "N", help_heading = "Model"))]
    pub head_dim: Option<usize>,
    /// Sequence length: tokens per window
    #[cfg_attr(feature = "cli", arg(long, value_name = "N", default_value_t = DEFAULT.max_position_embeddings, help_heading = "Model"))]
    pub max_position_embeddings: usize,
    /// One matrix for embedding and LM head
    #[cfg_attr(feature = "cli", arg(long, help_heading = "Model"))]
    pub tie_word_embeddings: bool,
    /// Base of the rotary embeddings
    #[cfg_attr(feature = "cli", arg(long, value_name = "X", default_value_t = DEFAULT.rope_theta, help_heading = "Model"))]
    pub rope_theta: f64,
    /// Standard deviation of the initial weights
    #[cfg_attr(feature = "cli", arg(long, value_name = "X", default_value_t = DEFAULT.initializer_range, help_heading = "Model"))]
    pub initializer_range: f64,

    /// Optimizer of the matrices inside the blocks
    #[cfg_attr(feature = "cli", arg(long, value_enum, default_value_t = DEFAULT.optimizer, help_heading = "Optimizer"))]
    pub optimizer: OptimizerKind,
    /// Peak learning rate of AdamW
    #[cfg_attr(feature = "cli", arg(long, value_name = "X", default_value_t = DEFAULT.learning_rate, help_heading = "Optimizer"))]
    pub learning_rate: f64,
    /// Peak learning rate of Muon
    #[cfg_attr(feature = "cli", arg(long, value_name = "X", default_value_t = DEFAULT.muon_learning_rate, help_heading = "Optimizer"))]
    pub muon_learning_rate: f64,
    /// Momentum of Muon
    #[cfg_attr(feature = "cli", arg(long, value_name = "X", default_value_t = DEFAULT.muon_momentum, help_heading = "Optimizer"))]
    pub muon_momentum: f64,
    /// Decoupled weight decay of matrices and embeddings
    #[serde(alias = "decay_rate")]
    #[cfg_attr(feature = "cli", arg(long, alias = "decay-rate", value_name = "X", default_value_t = DEFAULT.weight_decay, help_heading = "Optimizer"))]
    pub weight_decay: f64,
    /// Decay of the first moment
    #[cfg_attr(feature = "cli", arg(long, value_name = "X", default_value_t = DEFAULT.adam_beta1, help_heading = "Optimizer"))]
    pub adam_beta1: f64,
    /// Decay of the second moment
    #[cfg_attr(feature = "cli", arg(long, value_name = "X", default_value_t = DEFAULT.adam_beta2, help_heading = "Optimizer"))]
    pub adam_beta2: f64,
    /// Added to the root of the second moment
    #[cfg_attr(feature = "cli", arg(long, value_name = "X", default_value_t = DEFAULT.adam_epsilon, help_heading = "Optimizer"))]
    pub adam_epsilon: f64,
    /// Gradients are scaled down to this norm; 0 is no clipping
    #[cfg_attr(feature = "cli", arg(long, value_name = "X", default_value_t = DEFAULT.max_grad_norm, help_heading = "Optimizer"))]
    pub max_grad_norm: f64,
    /// How the learning rates fall after the warm-up
    #[cfg_attr(feature = "cli", arg(long, value_enum, default_value_t = DEFAULT.lr_scheduler_type, help_heading = "Optimizer"))]
    pub lr_scheduler_type: LrDecay,
    /// Steps over which the learning rates rise from 0
    #[cfg_attr(feature = "cli", arg(long, value_name = "N", default_value_t = DEFAULT.warmup_steps, help_heading = "Optimizer"))]
    pub warmup_steps: u64,
    /// Fraction of the run over which wsd lowers the learning rates to 0
    #[cfg_attr(feature = "cli", arg(long, value_name = "X", default_value_t = DEFAULT.wsd_decay, help_heading = "Optimizer"))]
    pub wsd_decay: f64,

    /// Steps from one line of metrics to the next
    #[cfg_attr(feature = "cli", arg(long, value_name = "N", default_value_t = DEFAULT.logging_steps, help_heading = "Progress"))]
    pub logging_steps: u64,
    /// Steps from one checkpoint to the next
    #[cfg_attr(feature = "cli", arg(long, value_name = "N", default_value_t = DEFAULT.save_steps, help_heading = "Progress"))]
    pub save_steps: u64,
    /// Checkpoints to keep besides the final model
    #[cfg_attr(feature = "cli", arg(long, value_name = "N", default_value_t = DEFAULT.save_total_limit, help_heading = "Progress"))]
    pub save_total_limit: usize,
    /// Steps from one measurement of the verbatim rate to the next
    #[cfg_attr(feature = "cli", arg(long, value_name = "N", help_heading = "Progress"))]
    pub eval_steps: Option<u64>,
    /// Epochs from one measurement of the verbatim rate to the next
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(
        feature = "cli",
        arg(long, value_name = "N", conflicts_with = "eval_steps", help_heading = "Progress")
    )]
    pub eval_epochs: Option<u64>,
    /// Stop once this fraction of the windows is reproduced verbatim by the weights as they are saved
    #[cfg_attr(feature = "cli", arg(long, value_name = "RATE", help_heading = "Progress"))]
    pub stop_at_verbatim: Option<f64>,
    /// Fill half of each batch with the windows that a measurement did not find verbatim, if there are any
    #[serde(skip_serializing_if = "is_default")]
    #[cfg_attr(feature = "cli", arg(long, help_heading = "Progress"))]
    pub hard_example_mining: bool,
    /// Fraction of the windows that is held out, the last ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "cli", arg(skip))]
    pub validation: Option<f64>,
    /// Steps from one measurement of the validation loss to the next [default: save-steps]
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "cli", arg(long, value_name = "N", help_heading = "Progress"))]
    pub validation_steps: Option<u64>,
    /// Steps from one sample of the model's text to the next
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "cli", arg(long, value_name = "N", help_heading = "Progress"))]
    pub sample_steps: Option<u64>,
    /// End with the weights whose verbatim rate was the highest measured, or else whose validation loss was
    /// the lowest, not with the last
    #[serde(skip_serializing_if = "is_default")]
    #[cfg_attr(feature = "cli", arg(long, help_heading = "Progress"))]
    pub load_best_model_at_end: bool,

    /// Accepted in files of earlier versions, and without effect.
    #[doc(hidden)]
    #[serde(skip_serializing)]
    #[cfg_attr(feature = "cli", arg(skip))]
    pub deterministic: IgnoredAny,
}

/// `batch_size` until it is known what fits; no valid size.
pub const AUTO_BATCH_SIZE: usize = 0;

#[cfg(feature = "cli")]
fn parse_batch_size(text: &str) -> Result<usize, String> {
    match text {
        "auto" => Ok(AUTO_BATCH_SIZE),
        _ => match text.parse() {
            Ok(0) => Err("must be at least 1, or auto".to_string()),
            Ok(size) => Ok(size),
            Err(error) => Err(format!("must be a number or auto ({error})")),
        },
    }
}

/// `batch_size` in files: a number, or `"auto"`.
mod batch_size {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::AUTO_BATCH_SIZE;

    #[derive(Serialize, Deserialize)]
    #[serde(untagged)]
    enum Written {
        Windows(usize),
        Word(String),
    }

    #[allow(clippy::trivially_copy_pass_by_ref)] // as serde asks
    pub fn serialize<S: Serializer>(size: &usize, to: S) -> Result<S::Ok, S::Error> {
        match *size {
            AUTO_BATCH_SIZE => "auto".serialize(to),
            size => size.serialize(to),
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<usize, D::Error> {
        match Written::deserialize(from) {
            Ok(Written::Windows(size)) if size > 0 => Ok(size),
            Ok(Written::Word(word)) if word == "auto" => Ok(AUTO_BATCH_SIZE),
            _ => Err(D::Error::custom("invalid `batch_size`: must be at least 1, or \"auto\"")),
        }
    }
}

#[allow(clippy::ref_option)] // as serde asks
fn is_one_slice(slices: &Option<usize>) -> bool {
    slices.is_none_or(|slices| slices == 1)
}

const DEFAULT: Settings = Settings {
    batch_size: 1,
    gradient_accumulation_steps: 1,
    dp_slices: None,
    epochs: 3.0,
    max_steps: None,
    max_seconds: None,
    seed: 42,
    order: Order::Shuffled,
    windows: WindowKind::Original,
    stride: None,
    precision: None,
    recompute: Recompute::None,
    hidden_size: 128,
    intermediate_size: 256,
    num_hidden_layers: 4,
    num_attention_heads: 4,
    num_key_value_heads: 4,
    head_dim: None,
    max_position_embeddings: 1024,
    tie_word_embeddings: false,
    rope_theta: 10000.0,
    initializer_range: 0.02,
    optimizer: OptimizerKind::Adamw,
    learning_rate: 1e-3,
    muon_learning_rate: 0.02,
    muon_momentum: 0.95,
    weight_decay: 0.1,
    adam_beta1: 0.9,
    adam_beta2: 0.999,
    adam_epsilon: 1e-8,
    max_grad_norm: 1.0,
    lr_scheduler_type: LrDecay::Linear,
    warmup_steps: 100,
    wsd_decay: 0.4,
    logging_steps: 10,
    save_steps: 1000,
    save_total_limit: 3,
    eval_steps: None,
    eval_epochs: None,
    stop_at_verbatim: None,
    hard_example_mining: false,
    validation: None,
    validation_steps: None,
    sample_steps: None,
    load_best_model_at_end: false,
    deterministic: IgnoredAny,
};

/// Newer settings are written if they are set only: files of runs without them stay as they were.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl Default for Settings {
    fn default() -> Self {
        DEFAULT
    }
}

impl Settings {
    /// Replaces a `batch_size` of [`AUTO_BATCH_SIZE`] by the largest that fits into `memory` bytes. The
    /// windows of a step stay [`Settings::gradient_accumulation_steps`] if that is above 1. Returns
    /// whether it did.
    ///
    /// # Errors
    /// If not even one window fits.
    pub fn fit_batch(
        &mut self,
        backend: &dyn Backend,
        config: &Config,
        memory: Option<u64>,
    ) -> anyhow::Result<bool> {
        if self.batch_size != AUTO_BATCH_SIZE {
            return Ok(false);
        }
        let windows = Some(self.gradient_accumulation_steps).filter(|&windows| windows > 1);
        let there = if backend.is_host() { available_host_memory() } else { backend.memory() };
        let memory = memory.or(there).unwrap_or(u64::MAX);
        let (optimizer, recompute) = (&self.optimizer(), self.recompute);
        let workload = Workload { backend, config, optimizer, recompute, share: Share::WHOLE };
        self.batch_size =
            workload.largest_batch(config.max_position_embeddings, windows, memory)?;
        self.gradient_accumulation_steps = windows.map_or(1, |windows| windows / self.batch_size);
        Ok(true)
    }

    /// Today's key for a key that a recipe or a sweep may have.
    pub fn key(key: &str) -> &str {
        if key == "decay_rate" { "weight_decay" } else { key }
    }

    /// Key/value heads if nobody gave their number: the usual one if the query heads can share them
    /// evenly, else one for each query head.
    pub fn set_default_key_value_heads(&mut self) {
        let usual = DEFAULT.num_key_value_heads;
        let divides = self.num_attention_heads.is_multiple_of(usual);
        self.num_key_value_heads = if divides { usual } else { self.num_attention_heads };
    }

    /// [`Settings::validate`] before a `batch_size` of [`AUTO_BATCH_SIZE`] is replaced.
    pub fn validate_before_fit(&self) -> anyhow::Result<()> {
        Settings { batch_size: self.batch_size.max(1), ..self.clone() }.validate()
    }

    /// Refuses what no run can do.
    pub fn validate(&self) -> anyhow::Result<()> {
        if self.batch_size == AUTO_BATCH_SIZE {
            return Err(error::config(
                "`batch_size` auto depends on the machine",
                "set `batch_size` to a number; laam plan --batch-size auto says which fits",
            ));
        }
        for (name, value) in [
            ("gradient_accumulation_steps", self.gradient_accumulation_steps as u64),
            ("dp_slices", self.dp_slices.unwrap_or(1) as u64),
            ("logging_steps", self.logging_steps),
            ("save_steps", self.save_steps),
            ("save_total_limit", self.save_total_limit as u64),
            ("max_steps", self.max_steps.unwrap_or(1)),
            ("eval_steps", self.eval_steps.unwrap_or(1)),
            ("eval_epochs", self.eval_epochs.unwrap_or(1)),
            ("validation_steps", self.validation_steps.unwrap_or(1)),
            ("sample_steps", self.sample_steps.unwrap_or(1)),
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
            ("weight_decay", self.weight_decay, f64::INFINITY),
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
        if let Some(seconds) = self.max_seconds
            && !(seconds > 0.0 && seconds.is_finite())
        {
            return Err(error::invalid("max_seconds", seconds, "more than 0 and finite"));
        }
        if let Some(fraction) = self.validation
            && !(fraction > 0.0 && fraction < 1.0)
        {
            return Err(error::invalid("validation", fraction, "more than 0 and less than 1"));
        }
        // A weight without a gradient would be 0 / 0.
        if self.adam_epsilon as f32 == 0.0 {
            return Err(error::invalid(
                "adam_epsilon",
                self.adam_epsilon,
                "more than 0 in float32",
            ));
        }
        for (name, value) in [
            ("wsd_decay", self.wsd_decay),
            ("stop_at_verbatim", self.stop_at_verbatim.unwrap_or(1.0)),
        ] {
            if !(0.0..=1.0).contains(&value) {
                return Err(error::invalid(name, value, "at least 0 and at most 1"));
            }
        }
        if self.eval_steps.is_some() && self.eval_epochs.is_some() {
            return Err(error::config(
                "both `eval_steps` and `eval_epochs`",
                "remove one of the two",
            ));
        }
        let is_measured = self.eval_steps.is_some() || self.eval_epochs.is_some();
        let is_validated = self.validation.is_some() || self.validation_steps.is_some();
        for (name, needs_measure) in [
            ("stop_at_verbatim", self.stop_at_verbatim.is_some()),
            ("hard_example_mining", self.hard_example_mining),
            ("load_best_model_at_end", self.load_best_model_at_end && !is_validated),
        ] {
            if needs_measure && !is_measured {
                return Err(error::config(
                    format!("`{name}` without `eval_steps`: the verbatim rate is never measured"),
                    "set `eval_steps` or `eval_epochs`: steps or epochs between two measurements",
                ));
            }
        }
        if self.hard_example_mining && self.batch_size == 1 {
            let needed = "at least 2 with `hard_example_mining`";
            return Err(error::invalid("batch_size", self.batch_size, needed));
        }
        if self.stride.is_some() && self.windows != WindowKind::Stream {
            return Err(error::config(
                "`stride` without stream windows",
                "set `windows` to stream, or remove `stride`",
            ));
        }
        self.check_slices(self.dp_slices.unwrap_or(1))
    }

    /// Refuses a number of slices that does not divide the batch size.
    pub fn check_slices(&self, slices: usize) -> anyhow::Result<()> {
        if self.batch_size.is_multiple_of(slices) {
            return Ok(());
        }
        Err(error::config(
            format!(
                "invalid `batch_size` {}: must be a multiple of the {slices} slices of a step",
                self.batch_size
            ),
            format!(
                "set `batch_size`, the windows of all processes together, to a multiple of {slices}"
            ),
        ))
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
            eos_token_ids: special.eos.into_iter().collect(),
            pad_token_id: special.pad,
            window_kind: serde_json::json!(self.windows).as_str().map(String::from),
        };
        config.validate()?;
        Ok(config)
    }

    /// Settings of a model's shape that differ from a model's: field, value here, value there.
    pub fn shape_conflicts(&self, config: &Config) -> Vec<(&'static str, String, String)> {
        let usual = self.hidden_size / self.num_attention_heads.max(1);
        let sizes = [
            ("hidden_size", self.hidden_size, config.hidden_size),
            ("intermediate_size", self.intermediate_size, config.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers, config.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads, config.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads, config.num_key_value_heads),
            ("head_dim", self.head_dim.unwrap_or(usual), config.head_dim),
        ];
        let sizes = sizes.map(|(name, ours, theirs)| (name, ours.to_string(), theirs.to_string()));
        let (tied, theta) = (self.tie_word_embeddings, self.rope_theta);
        let others = [
            ("tie_word_embeddings", tied.to_string(), config.tie_word_embeddings.to_string()),
            ("rope_theta", theta.to_string(), config.rope_theta.to_string()),
        ];
        sizes.into_iter().chain(others).filter(|(_, ours, theirs)| ours != theirs).collect()
    }

    /// The settings with the shape of a model, whose weights they train.
    #[must_use]
    pub fn with_shape(&self, config: &Config) -> Self {
        let usual_head_dim = config.hidden_size / config.num_attention_heads.max(1);
        let head_dim = (self.head_dim.is_some() || config.head_dim != usual_head_dim)
            .then_some(config.head_dim);
        Self {
            hidden_size: config.hidden_size,
            intermediate_size: config.intermediate_size,
            num_hidden_layers: config.num_hidden_layers,
            num_attention_heads: config.num_attention_heads,
            num_key_value_heads: config.num_key_value_heads,
            head_dim,
            tie_word_embeddings: config.tie_word_embeddings,
            rope_theta: config.rope_theta,
            ..self.clone()
        }
    }

    /// Constants of the optimizer.
    pub fn optimizer(&self) -> Optimizer {
        Optimizer {
            adamw: AdamW {
                beta1: self.adam_beta1,
                beta2: self.adam_beta2,
                epsilon: self.adam_epsilon,
            },
            muon: (self.optimizer == OptimizerKind::Muon)
                .then_some(Muon { momentum: self.muon_momentum }),
            weight_decay: self.weight_decay,
            // As with the Trainer, 0 is no clipping.
            max_grad_norm: if self.max_grad_norm == 0.0 {
                f64::INFINITY
            } else {
                self.max_grad_norm
            },
        }
    }

    /// Steps per epoch over so many windows. A step never reaches into the next epoch.
    pub fn steps_per_epoch(&self, windows: usize) -> u64 {
        let batches = windows.div_ceil(self.batch_size);
        batches.div_ceil(self.gradient_accumulation_steps) as u64
    }

    /// Steps in all.
    pub fn total_steps(&self, windows: usize) -> u64 {
        let by_epochs = (self.epochs * self.steps_per_epoch(windows) as f64).ceil() as u64;
        self.max_steps.unwrap_or(by_epochs)
    }

    /// Steps from one measurement of the verbatim rate to the next, if there are any.
    pub fn eval_interval(&self, windows: usize) -> Option<u64> {
        let of_epochs =
            self.eval_epochs.map(|epochs| epochs.saturating_mul(self.steps_per_epoch(windows)));
        self.eval_steps.or(of_epochs)
    }

    /// Steps from one measurement of the validation loss to the next.
    pub fn validation_interval(&self) -> u64 {
        self.validation_steps.unwrap_or(self.save_steps)
    }

    /// Learning rates of a run of `total` steps.
    pub fn schedule(&self, total: u64) -> LrSchedule {
        LrSchedule {
            decay: self.lr_scheduler_type,
            warmup: self.warmup_steps,
            total,
            wsd_decay: self.wsd_decay,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(feature = "cli")]
    #[test]
    fn flags_recipes_and_the_library_have_the_same_defaults() {
        #[derive(clap::Parser)]
        struct Flags {
            #[command(flatten)]
            settings: Settings,
        }
        let flags = <Flags as clap::Parser>::parse_from(["laam"]).settings;
        let recipe: Settings = toml::from_str("").unwrap();
        assert_eq!((&flags, &recipe), (&Settings::default(), &Settings::default()));
        flags.validate().unwrap();
    }

    #[test]
    fn an_interval_of_more_epochs_than_can_be_counted_never_comes() {
        let settings =
            Settings { eval_epochs: Some(1 << 63), batch_size: 2, ..Settings::default() };
        assert_eq!(settings.eval_interval(4), Some(u64::MAX));
    }

    #[test]
    fn earlier_keys_are_read_and_not_written() {
        let earlier = "decay_rate = 0.25\ndeterministic = true";
        let settings: Settings = toml::from_str(earlier).unwrap();
        assert_eq!(settings, Settings { weight_decay: 0.25, ..Settings::default() });
        let written = toml::to_string(&settings).unwrap();
        assert!(written.contains("weight_decay = 0.25"));
        assert!(!written.contains("decay_rate") && !written.contains("deterministic"));
    }

    #[test]
    fn a_misspelt_key_is_refused() {
        assert!(toml::from_str::<Settings>("batchsize = 3").is_err());
    }

    #[test]
    fn an_epoch_of_the_originals_has_its_number_of_steps() {
        let settings = Settings { batch_size: 64, epochs: 100.0, ..Settings::default() };
        assert_eq!(settings.steps_per_epoch(4408), 69);
        assert_eq!(settings.total_steps(4408), 6900);
        let accumulated = Settings { gradient_accumulation_steps: 2, ..settings };
        assert_eq!(accumulated.steps_per_epoch(4408), 35);
    }
}
