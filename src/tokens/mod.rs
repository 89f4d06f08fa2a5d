//! The memory-mapped token file, the windows of it that a model sees, and the order of them.

mod addressed;
mod batch;
mod file;
mod sampler;
mod windows;
mod writer;

pub use addressed::{AddressEncoder, ChunkAddress};
pub use batch::{Batch, IGNORE};
pub use file::{DocumentTokens, Header, TokenFile};
pub use sampler::{Order, Position, Sampler, permuted};
pub use windows::{WindowKind, WindowTable, Windows};
pub use writer::TokenWriter;
