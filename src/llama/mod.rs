//! Llama as programs: training step, evaluation and decoding, each a flat list of typed ops over named
//! buffers, built once and executed by any backend.
//!
//! [`step::training`], [`step::evaluation`] and [`step::decoding`] build them; [`Program::plan`] plans
//! their memory; [`ops::Op`] defines each op and its cost; [`slices`] is how a step is divided among processes.

mod backward;
mod branches;
mod buffer;
mod forward;
pub mod newton_schulz;
pub mod ops;
mod plan;
mod program;
pub mod slices;
pub mod step;
mod update;

pub use backward::Recompute;
pub use branches::Branches;
pub use buffer::{Buffer, BufferInfo, BufferKind, BufferRole};
pub use ops::{Cost, Op};
pub use plan::{BytePlan, Plan};
pub use program::Program;
pub use step::{Decoding, Evaluation, MicroBatch};
pub use update::{AdamW, Muon, Optimizer, StepHyperparams, append_update, sliced_update, update};
