//! What the weights give back.

pub mod verbatim;
