//! Recorder of the calls to the CUDA driver and cuBLASLt.
//!
//! One library under both names, `libcuda.so` and `libcublasLt.so`, in a folder of `LD_LIBRARY_PATH`: it
//! forwards each call to the real library, and appends a JSON line to a trace. The first names that laam
//! tries are these; the real libraries find each other by `libcuda.so.1`, so that cuBLASLt's own calls of
//! the driver are not recorded.
//!
//! | variable | value |
//! | --- | --- |
//! | `CUDA_RECORD` | file of the trace; without it nothing is recorded |
//! | `CUDA_RECORD_DRIVER` | path of the real `libcuda.so.1` |
//! | `CUDA_RECORD_CUBLASLT` | path of the real `libcublasLt.so.13` |
//! | `CUDA_RECORD_LINES` | limit on the lines; 100,000 by default |
//!
//! A line is `{"thread", "call", "args", "code", "out"}`. It is begun before the call, so that the last
//! line of a process that crashed names the call. Arguments are in the order of the C prototype:
//!
//! | argument | meaning |
//! | --- | --- |
//! | `5` | integer |
//! | `"#3"` | handle, numbered by first appearance |
//! | `"@2+16"` | device address: 16 bytes into the second allocation |
//! | `"=0a00"` | pointer to these bytes |
//! | `"~1"` | pointer to an algorithm of cuBLASLt, numbered as the heuristic returned them |
//! | `"?4096"` | pointer to 4096 bytes that are not recorded |
//! | `">4"` | pointer to a result of 4 bytes |
//! | `["=05000000"]` | pointers to kernel arguments; `"?"` if the driver does not tell their sizes |
//! | `null` | null pointer |
//!
//! `out` holds the results by the number of their argument.
#![warn(missing_docs)]

mod calls;
mod trace;
