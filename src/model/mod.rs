//! What a model is: its configuration, where each parameter lies, how it starts, how it is kept.

mod config;
mod layout;

pub use config::Config;
pub use layout::{Block, Kind, Layout, Parameter, Span};
