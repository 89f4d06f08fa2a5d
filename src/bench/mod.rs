//! Timings and checks, on the device at hand.

pub mod check;
pub mod step;
