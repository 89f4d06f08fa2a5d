//! Timings and checks, on the device at hand.

pub mod ceilings;
pub mod check;
pub mod kernels;
pub mod smoke;
pub mod step;
