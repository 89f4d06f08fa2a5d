//! The tests of `ptxsim`: instruction forms, real kernels, known bugs, faults, hostile text.
//!
//! Kernels in CUDA are compiled by nvcc as the tests run. Without nvcc those tests say so and
//! pass, unless `LAAM_CUDA=require` is set.

mod bugs;
mod command;
mod coverage;
mod families;
mod faults;
mod forms;
mod hostile;
mod kernels;
mod machine;
mod nvcc;
mod reference;
mod tensor;
