//! Training: the step, and the loop around it.

mod engine;
mod schedule;

pub use engine::{Engine, Outcome};
pub use schedule::{Decline, Schedule};
