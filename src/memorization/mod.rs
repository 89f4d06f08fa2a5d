//! Memorization: files regenerated from their names, extraction rates, loss.
//!
//! - [`regenerate`][]: files from their names alone
//! - [`rebuild`][]: all of them into a folder, compared with the originals
//! - [`loss`][]: nats per token, bits per byte
//! - [`verbatim`][]: windows that come back verbatim, from one forward pass
//! - [`measure`][]: that and more: by length of the prefix, by probability, by file
//! - [`rate`][]: rates of windows with confidence intervals
//! - [`occurrences`][]: how often a passage occurs in the text
//! - [`held_out`][]: windows that the model was not trained on
//! - [`recall`][]: steps at which windows were recalled
//! - [`size`][]: the same text as a general compressor has it

pub mod held_out;
pub mod loss;
pub mod measure;
pub mod occurrences;
mod pass;
pub mod rate;
pub mod rebuild;
pub mod recall;
pub mod regenerate;
pub mod size;
pub mod verbatim;
