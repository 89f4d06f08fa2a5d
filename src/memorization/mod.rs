//! What the weights give back.
//!
//! - [`regenerate`][]: files from their names alone
//! - [`rebuild`][]: all of them into a folder, held against the originals
//! - [`loss`][]: nats a token, bits a byte
//! - [`verbatim`][]: windows that come back verbatim, from one forward pass

pub mod loss;
pub mod rebuild;
pub mod regenerate;
pub mod verbatim;
