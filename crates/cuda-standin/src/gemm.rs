//! A matmul as `libcublasLt.so.13` hands it to `libcuda.so.1`; both packages compile this file.

/// A column-major matrix in device memory, read transposed if `transposed`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Operand {
    pub at: u64,
    /// `cudaDataType`: 0 f32, 2 f16, 14 bf16.
    pub dtype: u32,
    pub transposed: u32,
    /// Elements from one column to the next.
    pub ld: u64,
    /// Elements from one matrix of a batch to the next.
    pub stride: u64,
}

/// `d = alpha a b + beta c` for each matrix of a batch, summed in f32.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Gemm {
    pub m: u64,
    pub n: u64,
    pub k: u64,
    pub batch: u64,
    pub a: Operand,
    pub b: Operand,
    pub c: Operand,
    pub d: Operand,
    pub alpha: f32,
    pub beta: f32,
    /// Two halves of k are rounded to the output type before they are added: split-K with
    /// `CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE`.
    pub split_in_output_type: u32,
    /// Later events are a second later for it.
    pub is_slow: u32,
}
