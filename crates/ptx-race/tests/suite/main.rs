//! The tests of `ptx-race`: instruction forms, real kernels, the memory model, mutation tests,
//! faults, hostile text.
//!
//! Kernels in CUDA are compiled by nvcc as the tests run. Without nvcc those tests say so and
//! pass, unless `LAAM_CUDA=require` is set.

mod command;
mod coverage;
mod families;
mod faults;
mod forms;
mod hostile;
mod imports;
mod kernels;
mod limits;
mod machine;
mod memory_model;
mod mutants;
mod nvcc;
mod reference;
mod tensor;
mod tensor_core;
mod triton;
