//! Matrix products: `C = A B` or `C += A B`, row-major.

use super::Address;
use crate::dtype::Dtype;
use crate::error;

/// A row-major matrix in a device's memory, `[rows, cols]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Matrix {
    pub at: Address,
    pub dtype: Dtype,
    pub rows: usize,
    pub cols: usize,
    /// Elements from one row to the next, at least `cols`.
    pub stride: usize,
    /// The matmul reads it transposed.
    pub transposed: bool,
}

impl Matrix {
    /// A matrix without gaps between its rows.
    pub fn new(at: Address, dtype: Dtype, rows: usize, cols: usize) -> Matrix {
        Matrix { at, dtype, rows, cols, stride: cols, transposed: false }
    }

    /// The matrix with its rows `stride` elements apart.
    #[must_use]
    pub fn with_stride(self, stride: usize) -> Matrix {
        Matrix { stride, ..self }
    }

    /// The transpose, in the same memory.
    #[must_use]
    pub fn t(self) -> Matrix {
        Matrix { transposed: !self.transposed, ..self }
    }

    /// Rows and columns after transposition.
    pub fn shape(&self) -> (usize, usize) {
        if self.transposed { (self.cols, self.rows) } else { (self.rows, self.cols) }
    }
}

/// `c = a b` or `c += a b`, accumulated in f32 and rounded once; strided-batched if `batch` is above
/// 1, with each operand's matrices `rows * stride` elements apart. `a` and `b` have one dtype, `c` has
/// that dtype or f32; `c` is not transposed and overlaps neither operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Matmul {
    pub a: Matrix,
    pub b: Matrix,
    pub c: Matrix,
    /// `c += a b` instead of `c = a b`.
    pub accumulate: bool,
    /// Number of matrices in each operand.
    pub batch: usize,
}

impl Matmul {
    /// `(m, n, k)`, if shapes and dtypes are consistent.
    pub(super) fn check(&self) -> anyhow::Result<(usize, usize, usize)> {
        let ((m, k), (b_rows, n)) = (self.a.shape(), self.b.shape());
        let consistent = k == b_rows
            && self.c.shape() == (m, n)
            && !self.c.transposed
            && self.a.dtype == self.b.dtype
            && (self.c.dtype == self.a.dtype || self.c.dtype == Dtype::F32)
            && [self.a, self.b, self.c].iter().all(|matrix| matrix.stride >= matrix.cols)
            && m * n * k * self.batch > 0;
        if consistent {
            return Ok((m, n, k));
        }
        Err(error::internal(format!("invalid matmul: shapes or dtypes do not match in {self:?}")))
    }
}
