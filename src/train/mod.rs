//! Training: the step, and the loop around it.

mod engine;

pub use engine::{Engine, Outcome};
