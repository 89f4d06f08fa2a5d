//! Matmuls, by the `gemm-f32` crate.

use gemm_common::Parallelism;
use gemm_f32::gemm::f32::get_gemm_fn;
use pulp::Arch;

use super::super::memory::Memory;
use super::small_m_gemm::{MAX_SMALL_M, small_m_gemm};
use crate::llama::ops::{Linear, LinearBackwardInput, LinearBackwardWeight};

/// A matrix in a slice, by strides, so that a transpose is a view.
#[derive(Clone, Copy)]
pub(super) struct MatrixView<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> MatrixView<'a> {
    /// `[rows, cols]`, row-major.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols);
        Self { data, rows, cols, row_stride: cols, col_stride: 1 }
    }

    pub fn transposed(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }
}

/// Threads of a matmul: one, as one of many that run in parallel, or all.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum MatmulThreads {
    One,
    All,
}

/// `out = a b`, or `out += a b`; out is `[a.rows, b.cols]`, row-major.
pub(super) fn matmul(
    out: &mut [f32],
    accumulate: bool,
    a: MatrixView,
    b: MatrixView,
    threads: MatmulThreads,
) {
    assert_eq!(a.cols, b.rows);
    assert_eq!(out.len(), a.rows * b.cols);
    // Below this many multiplications waking another thread costs more than it saves.
    let large = a.rows * a.cols * b.cols > 1 << 20;
    let parallelism = if threads == MatmulThreads::All && large {
        Parallelism::Rayon(0)
    } else {
        Parallelism::None
    };
    // `gemm` prefers column-major output: outT = bT aT.
    let (a, b) = (b.transposed(), a.transposed());
    // SAFETY: `out`, `a.data` and `b.data` are slices that the strides stay inside of: `MatrixView::new`
    // checked rows * cols against the length, transposing swaps both sizes and strides, and out's
    // length was checked above. `out` is borrowed mutably, so it overlaps neither.
    unsafe {
        get_gemm_fn()(
            a.rows,
            b.cols,
            a.cols,
            out.as_mut_ptr(),
            a.rows as isize,
            1,
            accumulate,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}

pub(super) fn linear(arch: Arch, o: &Linear, memory: &mut Memory<f32>) {
    let [x, y] = memory.floats.get([o.x, o.y]);
    if o.rows <= MAX_SMALL_M {
        return small_m_gemm(arch, y, x, &memory.parameters[o.w.range()], o.rows, o.w.cols);
    }
    let w = MatrixView::new(&memory.parameters[o.w.range()], o.w.rows, o.w.cols);
    matmul(y, false, MatrixView::new(x, o.rows, o.w.cols), w.transposed(), MatmulThreads::All);
}

pub(super) fn linear_backward_input(o: &LinearBackwardInput, memory: &mut Memory<f32>) {
    let [dy, dx] = memory.floats.get([o.dy, o.dx]);
    let w = MatrixView::new(&memory.parameters[o.w.range()], o.w.rows, o.w.cols);
    matmul(dx, false, MatrixView::new(dy, o.rows, o.w.rows), w, MatmulThreads::All);
}

pub(super) fn linear_backward_weight(o: &LinearBackwardWeight, memory: &mut Memory<f32>) {
    let [dy, x] = memory.floats.get([o.dy, o.x]);
    let dw = &mut memory.gradients[o.w.range()];
    let dy = MatrixView::new(dy, o.rows, o.w.rows);
    matmul(dw, true, dy.transposed(), MatrixView::new(x, o.rows, o.w.cols), MatmulThreads::All);
}
