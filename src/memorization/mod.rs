//! Memorization: files regenerated from their names, extraction rates, loss.
//!
//! - [`regenerate`][]: files from their names alone
//! - [`rebuild`][]: all of them into a folder, compared with the originals
//! - [`loss`][]: nats per token, bits per byte
//! - [`verbatim`][]: windows that come back verbatim, from one forward pass
//! - [`measure`][]: that and more: by length of the prefix, by probability, by file
//! - [`size`][]: the same text as a general compressor has it

pub mod loss;
pub mod measure;
mod pass;
pub mod rebuild;
pub mod regenerate;
pub mod size;
pub mod verbatim;
