//! A CUDA driver without a GPU: `libcuda.so.1` with the part of the driver API that laam calls.
//!
//! Kernels really run, in the simulator; matmuls of `libcublasLt.so.13` (the package in `cublaslt/`)
//! run as host loops. Work is queued on its stream and executed as late as the API allows, so that
//! errors of kernels are seen where a GPU would show them: at the next synchronization. Where the real
//! driver is strict, or leaves behavior undefined, the stand-in returns an error. Rules are those of
//! the CUDA Driver API reference (<https://docs.nvidia.com/cuda/cuda-driver-api/>), named in comments by
//! function or section, or measured: `recorder/tests/` replays calls that were recorded on a GPU.
//!
//! `src/settings.rs` lists the environment variables. The crate exports C symbols only.
#![warn(missing_docs)]

mod codes;
mod driver;
mod exchange;
mod gemm;
#[cfg(test)]
mod rules;
mod settings;
mod state;
mod work;
