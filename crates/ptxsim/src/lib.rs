//! Another name of [`ptx_race`], for those who call it by this one.

pub use ptx_race::*;
