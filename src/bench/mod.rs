//! Timings, on the device at hand.

pub mod step;
