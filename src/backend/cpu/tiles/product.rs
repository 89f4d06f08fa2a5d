//! The blocks' products in bfloat16, held in registers: `y = x wT`, `dx = dy w`, `dw += dyT x`.
//!
//! Each task packs its own rows, which stay in its cache; the weights are packed once for all of them.

use std::arch::x86_64::{__m512, _mm512_setzero_ps};

use rayon::prelude::*;

use super::super::super::memory::Memory;
use super::lines::{
    Line, STRIP, dot, pack_lanes, pack_pairs, pack_panels, pack_rows, store, width,
};
use crate::llama::ops::{Linear, LinearBackwardInput, LinearBackwardWeight};

/// Rows that one task takes.
const ROWS: usize = 64;
/// Rows whose share of a weight's gradient one task sums.
const SHARE: usize = 256;
/// Rows of a tile.
const TILE: usize = 8;

/// Packed weights, and shares of a gradient, kept from operation to operation.
#[derive(Default)]
pub(super) struct Products {
    weights: Vec<Line>,
    shares: Vec<f32>,
}

impl Products {
    /// # Safety
    /// The processor has AVX-512 with bfloat16.
    pub unsafe fn linear(&mut self, o: &Linear, memory: &mut Memory<f32>) {
        let [x, y] = memory.floats.get([o.x, o.y]);
        let (outer, inner) = (o.w.rows, o.w.cols);
        let weights = self.room(outer.div_ceil(STRIP) * width(inner));
        // SAFETY: the caller's.
        unsafe { pack_lanes(&memory.parameters[o.w.range()], inner, weights) };
        // SAFETY: the caller's.
        unsafe { times(x, inner, weights, width(inner) / 2, y, outer) };
    }

    /// # Safety
    /// The processor has AVX-512 with bfloat16.
    pub unsafe fn backward_input(&mut self, o: &LinearBackwardInput, memory: &mut Memory<f32>) {
        let [dy, dx] = memory.floats.get([o.dy, o.dx]);
        let (outer, inner) = (o.w.rows, o.w.cols);
        let pairs = outer.div_ceil(2);
        let weights = self.room(width(inner) / 16 * pairs);
        // SAFETY: the caller's.
        unsafe { pack_panels(&memory.parameters[o.w.range()], inner, weights) };
        // SAFETY: the caller's.
        unsafe { times(dy, outer, weights, pairs, dx, inner) };
    }

    /// # Safety
    /// The processor has AVX-512 with bfloat16.
    pub unsafe fn backward_weight(&mut self, o: &LinearBackwardWeight, memory: &mut Memory<f32>) {
        let [dy, x] = memory.floats.get([o.dy, o.x]);
        let (outer, inner) = (o.w.rows, o.w.cols);
        let dw = &mut memory.gradients[o.w.range()];
        let shares = o.rows.div_ceil(SHARE);
        self.shares.resize(self.shares.len().max(shares * dw.len()), 0.0);
        let shares = &mut self.shares[..shares * dw.len()];
        shares
            .par_chunks_mut(dw.len())
            .zip(dy.par_chunks(SHARE * outer).zip(x.par_chunks(SHARE * inner)))
            .for_each_init(Default::default, |scratch, (share, (dy, x))| {
                // SAFETY: the caller's.
                unsafe { share_of_weight(dy, outer, x, inner, share, scratch) };
            });
        let (shares, len) = (&*shares, dw.len());
        dw.par_chunks_mut(1 << 12).enumerate().for_each(|(at, dw)| {
            for share in shares.chunks(len) {
                for (sum, part) in dw.iter_mut().zip(&share[at << 12..]) {
                    *sum += part;
                }
            }
        });
    }

    /// So many lines, all zero.
    fn room(&mut self, lines: usize) -> &mut [Line] {
        self.weights.clear();
        self.weights.resize(lines, Line::ZERO);
        &mut self.weights
    }
}

/// `out[rows, outer] = x[rows, inner] b`, b in panels of 32 columns, each `[units, 32]` pairs.
///
/// # Safety
/// The processor has AVX-512 with bfloat16.
unsafe fn times(x: &[f32], inner: usize, b: &[Line], units: usize, out: &mut [f32], outer: usize) {
    let tasks = out.par_chunks_mut(ROWS * outer).zip(x.par_chunks(ROWS * inner));
    tasks.for_each_init(Vec::new, |packed, (out, x)| {
        // SAFETY: the caller's.
        unsafe { some_times(x, inner, b, units, out, outer, packed) };
    });
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn some_times(
    x: &[f32],
    inner: usize,
    b: &[Line],
    units: usize,
    out: &mut [f32],
    outer: usize,
    packed: &mut Vec<Line>,
) {
    let rows = x.len() / inner;
    packed.resize(rows * width(inner) / 32, Line::ZERO);
    pack_rows(x, inner, packed);
    let a: &[u32] = bytemuck::cast_slice(packed);
    let pitch = width(inner) / 2;
    for (panel, b) in b.chunks_exact(2 * units).enumerate() {
        let column = panel * STRIP;
        let whole = rows / TILE * TILE;
        for row in (0..whole).step_by(TILE) {
            let mut sums = [[_mm512_setzero_ps(); 2]; TILE];
            dot(&mut sums, (&a[row * pitch..], pitch, 1), (b, 2), units);
            put(&sums, &mut out[row * outer..], outer, column);
        }
        for row in whole..rows {
            let mut sums = [[_mm512_setzero_ps(); 2]; 1];
            dot(&mut sums, (&a[row * pitch..], pitch, 1), (b, 2), units);
            put(&sums, &mut out[row * outer..], outer, column);
        }
    }
}

/// A tile to its rows, from `column` on.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn put<const R: usize>(sums: &[[__m512; 2]; R], out: &mut [f32], outer: usize, column: usize) {
    for (sums, out) in sums.iter().zip(out.chunks_mut(outer)) {
        for (n, &sum) in sums.iter().enumerate() {
            store(&mut out[(column + 16 * n).min(outer)..], sum);
        }
    }
}

/// `share[outer, inner] = dyT x`
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn share_of_weight(
    dy: &[f32],
    outer: usize,
    x: &[f32],
    inner: usize,
    share: &mut [f32],
    (left, right): &mut (Vec<Line>, Vec<Line>),
) {
    let pairs = (dy.len() / outer).div_ceil(2);
    left.resize(pairs * width(outer) / 16, Line::ZERO);
    right.resize(pairs * width(inner) / 16, Line::ZERO);
    pack_pairs(dy, outer, left);
    pack_panels(x, inner, right);
    let a: &[u32] = bytemuck::cast_slice(left);
    for (panel, b) in right.chunks_exact(2 * pairs).enumerate() {
        // Rows of the gradient beyond the last are sums of zeros, and put nowhere.
        for row in (0..outer).step_by(TILE) {
            let mut sums = [[_mm512_setzero_ps(); 2]; TILE];
            dot(&mut sums, (&a[row..], 1, width(outer)), (b, 2), pairs);
            put(&sums, &mut share[row * inner..], inner, panel * STRIP);
        }
    }
}
