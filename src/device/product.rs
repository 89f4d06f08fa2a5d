//! Matrix products as every device takes them.

use super::Address;
use crate::dtype::Dtype;

/// A row-major matrix in a device's memory, `[rows, cols]`, without gaps between its rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Matrix {
    pub at: Address,
    pub dtype: Dtype,
    pub rows: usize,
    pub cols: usize,
    /// Read with rows and columns exchanged.
    pub transposed: bool,
}

impl Matrix {
    pub fn new(at: Address, dtype: Dtype, rows: usize, cols: usize) -> Matrix {
        Matrix { at, dtype, rows, cols, transposed: false }
    }

    /// The same memory with rows and columns exchanged.
    #[must_use]
    pub fn t(self) -> Matrix {
        Matrix { transposed: !self.transposed, ..self }
    }

    /// Rows and columns as it is read.
    pub fn shape(&self) -> (usize, usize) {
        if self.transposed { (self.cols, self.rows) } else { (self.rows, self.cols) }
    }
}

/// `c = a b`, or `c += a b`, summed in f32 and rounded once, for one or several of each that lie
/// behind one another. `a` and `b` are of one type, `c` of that type or of f32; `c` is not
/// transposed and overlaps neither.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Product {
    pub a: Matrix,
    pub b: Matrix,
    pub c: Matrix,
    /// Whether it is added to what is there.
    pub add: bool,
    /// How many there are of each matrix.
    pub batch: usize,
}

impl Product {
    /// `(m, n, k)`, once the shapes and types fit each other.
    pub(super) fn check(&self) -> anyhow::Result<(usize, usize, usize)> {
        let ((m, k), (k_too, n)) = (self.a.shape(), self.b.shape());
        let fits = k == k_too
            && self.c.shape() == (m, n)
            && !self.c.transposed
            && self.a.dtype == self.b.dtype
            && (self.c.dtype == self.a.dtype || self.c.dtype == Dtype::F32)
            && m * n * k * self.batch > 0;
        if fits {
            return Ok((m, n, k));
        }
        Err(crate::error::error(
            format!("a product that does not fit: {self:?}"),
            "this is a fault of laam: report it",
        ))
    }
}
