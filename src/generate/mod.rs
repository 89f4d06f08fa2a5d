//! Text generation: sampling with a KV cache, many sequences at once.
//!
//! - [`Generator`]: continuous batching, a token per sequence and step
//! - [`Sampling`]: temperature, top-k, top-p
//! - [`TextStream`]: incremental detokenization

mod batch;
mod sampling;
mod text;

pub use batch::{Continuation, FinishReason, Generator, Request, TokenEvent};
pub use sampling::Sampling;
pub use text::TextStream;
