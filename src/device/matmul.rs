//! Matmuls: `C = A B` or `C += A B`, row-major; and their launches with `kernels/matmul.cu`.

use super::address::Allocations;
use super::{Address, Arg, Launch};
use crate::dtype::Dtype;
use crate::error;
use crate::kernels::families;
use crate::kernels::geometry::{
    MATMUL_SIMT_THREADS, MATMUL_SIMT_TILE, MATMUL_THREADS, MATMUL_TILE,
};

/// A row-major matrix in a device's memory, `[rows, cols]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Matrix {
    /// First element.
    pub at: Address,
    /// Type of the elements.
    pub dtype: Dtype,
    /// Rows as stored.
    pub rows: usize,
    /// Columns as stored.
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

/// Limit of the grid along y.
const MAX_BATCH_PER_LAUNCH: usize = 65_535;

/// `c = a b` or `c += a b`, accumulated in f32 and rounded once; strided-batched if `batch` is above
/// 1, with each operand's matrices `rows * stride` elements apart. `a` and `b` have one dtype, `c` has
/// that dtype or f32; `c` is not transposed and overlaps neither operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Matmul {
    /// Left operand, `[m, k]`.
    pub a: Matrix,
    /// Right operand, `[k, n]`.
    pub b: Matrix,
    /// Result, `[m, n]`.
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

    /// Where the matrices are, if all their elements are in the ranges of their addresses.
    pub(super) fn places(&self, allocations: &mut Allocations) -> anyhow::Result<[u64; 3]> {
        self.check()?;
        let mut place = |x: Matrix| {
            let last = (self.batch - 1) * x.rows * x.stride + (x.rows - 1) * x.stride + x.cols;
            allocations.range(x.at, last * x.dtype.size())
        };
        Ok([place(self.a)?, place(self.b)?, place(self.c)?])
    }

    /// Launches of `kernels/matmul.cu` that compute this: on tensor cores if the dtype has 16 bits and
    /// rows of both operands begin at multiples of 16 bytes, else on the CUDA cores.
    pub fn launches(&self) -> anyhow::Result<Vec<Launch>> {
        let (m, n, k) = self.check()?;
        let Matmul { a, b, c, .. } = *self;
        let size = a.dtype.size();
        let is_aligned =
            |x: &Matrix| x.at.alignment() >= 16 && (x.stride * size).is_multiple_of(16);
        let tensor_cores = size == 2 && [a, b].iter().all(is_aligned);
        let (family, tile, threads) = if tensor_cores {
            let family = match (a.transposed, b.transposed) {
                (false, false) => &families::MATMUL_NN,
                (false, true) => &families::MATMUL_NT,
                (true, false) => &families::MATMUL_TN,
                (true, true) => &families::MATMUL_TT,
            };
            (family, MATMUL_TILE, MATMUL_THREADS)
        } else {
            (&families::MATMUL_SIMT, [MATMUL_SIMT_TILE; 2], MATMUL_SIMT_THREADS)
        };
        let kernel = family.of(a.dtype)?;
        let blocks = m.div_ceil(tile[0]) * n.div_ceil(tile[1]);
        let narrow = |size: usize| {
            i32::try_from(size)
                .map_err(|_| error::internal(format!("invalid matmul: {size} is too large")))
        };
        let rows = |x: &Matrix| x.stride as u64;
        // Elements from one position to the next along m or n, and along k.
        let (along_m, a_along_k) = if a.transposed { (1, rows(&a)) } else { (rows(&a), 1) };
        let (along_n, b_along_k) = if b.transposed { (rows(&b), 1) } else { (1, rows(&b)) };
        let matrix = |x: &Matrix| x.rows * x.stride;
        let mut launches = Vec::new();
        for first in (0..self.batch).step_by(MAX_BATCH_PER_LAUNCH) {
            let at = |x: &Matrix| Arg::from(x.at.plus(first * matrix(x) * x.dtype.size()));
            let mut args = vec![at(&a), at(&b), at(&c)];
            args.extend([narrow(m)?, narrow(n)?, narrow(k)?].map(Arg::from));
            if tensor_cores {
                args.extend([rows(&a), rows(&b)].map(Arg::from));
            } else {
                args.extend([along_m, a_along_k, along_n, b_along_k].map(Arg::from));
            }
            args.push(rows(&c).into());
            args.extend([a, b, c].map(|x| Arg::from(matrix(&x) as u64)));
            args.extend([self.accumulate, c.dtype == Dtype::F32].map(|x| Arg::from(i32::from(x))));
            launches.push(Launch {
                kernel,
                grid: [
                    narrow(blocks)? as u32,
                    MAX_BATCH_PER_LAUNCH.min(self.batch - first) as u32,
                    1,
                ],
                block: [threads as u32, 1, 1],
                shared: 0,
                args,
            });
        }
        Ok(launches)
    }
}
