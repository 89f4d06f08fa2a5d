//! The memory-mapped token file, the windows of it that a model sees, and the order of them.

mod batch;

pub use batch::{Batch, IGNORE};
