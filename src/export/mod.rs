//! Models in the formats of other programs: GGUF, which llama.cpp reads.

mod gguf;
mod llama;
mod vocabulary;

pub use llama::{Exported, GgufDtype, export_gguf, rounded};
