//! laam (Linux as a Model) trains a Llama until it has memorized a body of source code,
//! and shows, byte for byte, what the weights give back.
//!
//! The way of the data, which is also the order of the rooms:
//!
//! - [`corpus`][]: where text comes from (kernel.org, archives, folders, the built-in sample)
//! - [`tokenizer`][]: byte-level BPE
//! - [`tokens`][]: the memory-mapped token file, and the windows and batches drawn from it
//! - [`model`][]: configuration, the layout of the parameters, initialisation, checkpoints
//! - [`llama`][]: the training step, evaluation and decoding as programs (lists of typed operations)
//! - [`backend`][]: what executes a program: the plain reference, or the CPU at speed
//! - [`generate`][]: sampling with a key/value cache
//! - [`memorization`][]: what the weights give back: files from their names, loss and bits per byte
//! - [`kernels`][]: the CUDA kernels this build holds
//! - [`device`][]: what runs the kernels
//! - [`train`][]: the loop, its schedule, metrics, checkpoints; recipes
//! - [`report`][]: a run as one page
//! - [`bench`][]: timings
//!
//! A room uses only the rooms named before it.

pub mod backend;
pub mod bench;
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod cli;
pub mod corpus;
pub mod device;
pub mod dtype;
pub mod error;
pub mod files;
pub mod generate;
pub mod kernels;
pub mod llama;
pub mod memorization;
pub mod model;
pub mod random;
pub mod report;
pub mod schema;
pub mod tokenizer;
pub mod tokens;
pub mod train;
