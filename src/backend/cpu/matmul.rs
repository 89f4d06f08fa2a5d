//! Matmuls in f32, by the `gemm-f32` crate, and the choice between them and those in bfloat16.

use gemm_common::Parallelism;
use gemm_f32::gemm::f32::get_gemm_fn;
use pulp::Arch;

use super::super::memory::Memory;
use super::amx::{self, TileUnit};
use super::small_m_gemm::{MAX_SMALL_M, small_m_gemm};
use crate::llama::ops::{Linear, LinearBackwardInput, LinearBackwardWeight};

/// A matrix in a slice, by strides, so that a transpose is a view.
#[derive(Clone, Copy)]
pub(super) struct MatrixView<'a> {
    pub data: &'a [f32],
    pub rows: usize,
    pub cols: usize,
    pub row_stride: usize,
    pub col_stride: usize,
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

    /// True if the strides stay inside of the data.
    fn is_inside(&self) -> bool {
        let last = |size: usize, stride| size.saturating_sub(1) * stride;
        self.rows * self.cols == 0
            || last(self.rows, self.row_stride) + last(self.cols, self.col_stride) < self.data.len()
    }
}

/// Threads of a matmul: one, as one of many that run in parallel, or all.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum MatmulThreads {
    One,
    All,
}

/// What computes the matmuls of the model.
#[derive(Clone, Copy, Debug)]
pub(super) enum Gemm {
    F32,
    /// Operands rounded to bfloat16.
    Bf16(TileUnit),
}

impl Gemm {
    /// `out = a b`, or `out += a b`; out is `[a.rows, b.cols]`, row-major.
    pub fn matmul(
        self,
        out: &mut [f32],
        accumulate: bool,
        a: MatrixView,
        b: MatrixView,
        threads: MatmulThreads,
    ) {
        match self {
            Self::F32 => matmul(out, accumulate, a, b, threads),
            Self::Bf16(unit) => amx::matmul(unit, out, accumulate, a, b, threads),
        }
    }
}

/// Below this many multiplications waking another thread costs more than it saves.
pub(super) fn is_large(a: MatrixView, columns: usize) -> bool {
    a.rows * a.cols * columns > 1 << 20
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
    assert!(a.is_inside() && b.is_inside());
    let parallelism = if threads == MatmulThreads::All && is_large(a, b.cols) {
        Parallelism::Rayon(0)
    } else {
        Parallelism::None
    };
    // `gemm` prefers column-major output: outT = bT aT.
    let (a, b) = (b.transposed(), a.transposed());
    // SAFETY: `out`, `a.data` and `b.data` are slices that the strides stay inside of, as asserted above; transposing
    // swaps both sizes and strides. `out` is borrowed mutably, so it overlaps neither.
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

pub(super) fn linear(arch: Arch, gemm: Gemm, o: &Linear, memory: &mut Memory<f32>) {
    let [x, y] = memory.floats.get([o.x, o.y]);
    if o.rows <= MAX_SMALL_M {
        return small_m_gemm(arch, y, x, &memory.parameters[o.w.range()], o.rows, o.w.cols);
    }
    let w = MatrixView::new(&memory.parameters[o.w.range()], o.w.rows, o.w.cols);
    gemm.matmul(y, false, MatrixView::new(x, o.rows, o.w.cols), w.transposed(), MatmulThreads::All);
}

pub(super) fn linear_backward_input(gemm: Gemm, o: &LinearBackwardInput, memory: &mut Memory<f32>) {
    let [dy, dx] = memory.floats.get([o.dy, o.dx]);
    let w = MatrixView::new(&memory.parameters[o.w.range()], o.w.rows, o.w.cols);
    gemm.matmul(dx, false, MatrixView::new(dy, o.rows, o.w.rows), w, MatmulThreads::All);
}

pub(super) fn linear_backward_weight(
    gemm: Gemm,
    o: &LinearBackwardWeight,
    memory: &mut Memory<f32>,
) {
    let [dy, x] = memory.floats.get([o.dy, o.x]);
    let dw = &mut memory.gradients[o.w.range()];
    let dy = MatrixView::new(dy, o.rows, o.w.rows);
    gemm.matmul(
        dw,
        true,
        dy.transposed(),
        MatrixView::new(x, o.rows, o.w.cols),
        MatmulThreads::All,
    );
}
