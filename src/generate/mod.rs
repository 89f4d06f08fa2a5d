//! Text from a model: sampling with a key/value cache, many sequences at once.
//!
//! - [`Generator`]: takes requests in and steps them all, a token at a time
//! - [`Sampling`]: which token comes next
//! - [`TextStream`]: tokens to text, as they come

mod batch;
mod sampling;
mod text;

pub use batch::{Continuation, FinishReason, Generator, Request, TokenEvent};
pub use sampling::Sampling;
pub use text::TextStream;
