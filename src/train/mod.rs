//! Training: the step, and the loop around it.
//!
//! [`Settings`] are the numbers a run depends on, [`Engine`] does one step of it, [`Trainer`] all of
//! them: in the order of the windows, by the schedule, with metrics and checkpoints on the way.

mod checkpoints;
mod claim;
mod engine;
mod footprint;
mod metrics;
pub mod prepare;
pub mod recipe;
mod schedule;
mod settings;
mod snapshot;
pub mod sweep;
mod tensorboard;
mod trainer;

pub use checkpoints::{TrainState, candidates, is_resumable};
pub use claim::{Consent, claim};
pub use engine::{Engine, Parallelism, ShardKind, StepStats, TrainStep};
pub use footprint::{
    Footprint, Share, Workload, largest_preset, measuring_bytes, peak_memory_bytes,
};
pub use metrics::{MAX_METRICS, Metrics, is_own as is_own_metrics};
pub use schedule::{LrDecay, LrSchedule};
pub use settings::{AUTO_BATCH_SIZE, OptimizerKind, Settings};
pub use tensorboard::EventFile;
pub use trainer::{Job, Observer, RunEnd, Start, TrainSummary, Trainer, check_slices};
