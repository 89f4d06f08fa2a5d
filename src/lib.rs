//! laam (Linux as a Model) trains a Llama until it has memorized a body of source code,
//! and shows, byte for byte, what the weights give back.
//!
//! Modules, lowest first. A module may depend only on modules above it in this list:
//!
//! - [`error`][]: errors with a kind and a hint
//! - [`escape`][]: foreign text made fit to be shown
//! - [`files`][]: atomic and bounded file access
//! - [`output`][]: output folders with one writer
//! - [`threads`][]: thread counts and pools
//! - [`random`][]: counter-based random numbers
//! - [`dtype`][]: element types of tensors
//! - [`schema`][]: versions of the JSON files
//! - [`corpus`][]: text sources (kernel.org, archives, folders, files of documents, the built-in sample)
//!   and their manifest
//! - [`tokenizer`][]: byte-level BPE
//! - [`tokens`][]: the memory-mapped token file, its windows, the sampler
//! - [`kernels`][]: the compiled CUDA kernels and their signatures
//! - [`collective`][]: processes that train together, and moving bytes between them
//! - [`device`][]: memory, kernel launches, matmuls, graphs; a GPU or the simulator
//! - [`model`][]: configuration, parameter layout, initialization, checkpoints, presets
//! - [`export`][]: models in the formats of other programs: GGUF
//! - [`llama`][]: training step, evaluation and decoding as programs: lists of typed ops
//! - [`backend`][]: execution of programs: `reference`, `cpu`, `gpu`
//! - [`generate`][]: sampling with a KV cache
//! - [`memorization`][]: extraction, files regenerated from their names, bits per byte
//! - [`train`][]: the loop: schedule, metrics, checkpoints, resume; recipes and sweeps
//! - [`report`][]: a run directory as one HTML page
//! - [`bench`][]: `check` of every op against f64, timings, roofline
//! - `cli`: the command line
//!
//! `tests/suite/architecture.rs` checks this order.

/// Version of the program; of a release build, with the commit it was built from.
pub const VERSION: &str = env!("LAAM_VERSION");

pub mod backend;
pub mod bench;
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod cli;
pub mod collective;
pub mod corpus;
pub mod device;
pub mod dtype;
pub mod error;
pub mod escape;
pub mod export;
pub mod files;
pub mod generate;
pub mod kernels;
pub mod llama;
pub mod memorization;
pub mod model;
pub mod output;
pub mod random;
pub mod report;
pub mod schema;
pub mod threads;
pub mod tokenizer;
pub mod tokens;
pub mod train;
