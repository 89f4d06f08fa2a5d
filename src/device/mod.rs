//! Devices that run the kernels. So far: whether this machine has an NVIDIA card and its driver.

pub mod driver;
