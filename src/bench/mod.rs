//! Timings and checks of a backend and its device.

pub mod check;
pub mod collectives;
pub mod kernels;
pub mod page;
pub mod probes;
pub mod pytorch;
pub mod roofline;
pub mod smoke;
pub mod step;
