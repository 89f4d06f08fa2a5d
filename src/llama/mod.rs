//! Llama as programs: the training step, the evaluation and the decoding, each a flat list of typed
//! operations over named buffers, written once and executed by any backend.
//!
//! [`step::training`] and its siblings build them; [`Program::plan`] lays out their memory;
//! [`ops::Op`] says what each operation computes and what it costs.

mod backward;
mod forward;
pub mod ops;
mod plan;
mod program;
pub mod step;
mod update;

pub use ops::{Cost, Op};
pub use plan::{BytePlan, Plan};
pub use program::{Buffer, BufferInfo, Element, Program, Use};
pub use step::{Decoding, Evaluation, Micro};
pub use update::{AdamW, Muon, Optimizer, Rates, append_update, update};
