//! Matmuls of the linear layers in bfloat16: `y = x wT`, `dx = dy w`, `dw += dyT x`.
//!
//! Each task packs the rows it owns, which stay in its cache; the weights are packed once for all tasks.

use std::arch::x86_64::{__m512, _mm512_setzero_ps};

use rayon::prelude::*;

use super::super::super::memory::Memory;
use super::Avx512;
use super::vec::{
    STRIP, V512, microkernel, pack_lanes, pack_pairs, pack_panels, pack_rows, padded_cols, store,
};
use crate::llama::ops::{Linear, LinearBackwardInput, LinearBackwardWeight};

/// Rows of the output per task.
const TASK_ROWS: usize = 64;
/// Rows of dy and x per partial sum of a weight's gradient.
const PARTIAL_ROWS: usize = 256;
/// Rows of a register tile.
const TILE_ROWS: usize = 8;

/// Packed weights and partial sums of a gradient, kept between operations.
#[derive(Default)]
pub(super) struct MatmulBuffers {
    weights: Vec<V512>,
    partials: Vec<f32>,
}

impl MatmulBuffers {
    pub fn linear(&mut self, avx512: Avx512, o: &Linear, memory: &mut Memory<f32>) {
        let [x, y] = memory.floats.get([o.x, o.y]);
        let (outer, inner) = (o.w.rows, o.w.cols);
        let weights = self.weights(outer.div_ceil(STRIP) * padded_cols(inner));
        pack_lanes(avx512, &memory.parameters[o.w.range()], inner, weights);
        matmul(avx512, x, inner, weights, padded_cols(inner) / 2, y, outer);
    }

    pub fn backward_input(
        &mut self,
        avx512: Avx512,
        o: &LinearBackwardInput,
        memory: &mut Memory<f32>,
    ) {
        let [dy, dx] = memory.floats.get([o.dy, o.dx]);
        let (outer, inner) = (o.w.rows, o.w.cols);
        let pairs = outer.div_ceil(2);
        let weights = self.weights(padded_cols(inner) / 16 * pairs);
        pack_panels(avx512, &memory.parameters[o.w.range()], inner, pairs, weights);
        matmul(avx512, dy, outer, weights, pairs, dx, inner);
    }

    pub fn backward_weight(
        &mut self,
        avx512: Avx512,
        o: &LinearBackwardWeight,
        memory: &mut Memory<f32>,
    ) {
        let [dy, x] = memory.floats.get([o.dy, o.x]);
        let (outer, inner) = (o.w.rows, o.w.cols);
        let dw = &mut memory.gradients[o.w.range()];
        let partials = o.rows.div_ceil(PARTIAL_ROWS);
        self.partials.resize(self.partials.len().max(partials * dw.len()), 0.0);
        let partials = &mut self.partials[..partials * dw.len()];
        partials
            .par_chunks_mut(dw.len())
            .zip(dy.par_chunks(PARTIAL_ROWS * outer).zip(x.par_chunks(PARTIAL_ROWS * inner)))
            .for_each_init(Default::default, |packed, (partial, (dy, x))| {
                partial_weight_gradient(avx512, dy, outer, x, inner, partial, packed);
            });
        let (partials, len) = (&*partials, dw.len());
        dw.par_chunks_mut(1 << 12).enumerate().for_each(|(at, dw)| {
            for partial in partials.chunks(len) {
                for (sum, part) in dw.iter_mut().zip(&partial[at << 12..]) {
                    *sum += part;
                }
            }
        });
    }

    fn weights(&mut self, vectors: usize) -> &mut [V512] {
        self.weights.resize(self.weights.len().max(vectors), V512::ZERO);
        &mut self.weights[..vectors]
    }
}

/// `out[rows, outer] = x[rows, inner] b`, b packed in panels of 32 columns, each `[pairs, 32]`.
fn matmul(
    avx512: Avx512,
    x: &[f32],
    inner: usize,
    b: &[V512],
    pairs: usize,
    out: &mut [f32],
    outer: usize,
) {
    let tasks = out.par_chunks_mut(TASK_ROWS * outer).zip(x.par_chunks(TASK_ROWS * inner));
    tasks.for_each_init(Vec::new, |packed, (out, x)| {
        matmul_rows(avx512, x, inner, b, pairs, out, outer, packed);
    });
}

avx512!(
    /// Writes a register tile to its rows, from `column` on.
    #[inline]
    fn store_tile<const R: usize>(
        tile: &[[__m512; 2]; R],
        out: &mut [f32],
        outer: usize,
        column: usize,
    ) {
        for (tile, out) in tile.iter().zip(out.chunks_mut(outer)) {
            for (n, &sum) in tile.iter().enumerate() {
                store(&mut out[(column + 16 * n).min(outer)..], sum);
            }
        }
    }
);

avx512_entry!(
    /// The rows of [`matmul`] that one task computes.
    fn matmul_rows(
        avx512: Avx512,
        x: &[f32],
        inner: usize,
        b: &[V512],
        pairs: usize,
        out: &mut [f32],
        outer: usize,
        packed: &mut Vec<V512>,
    ) {
        let rows = x.len() / inner;
        packed.resize(rows * padded_cols(inner) / 32, V512::ZERO);
        pack_rows(avx512, x, inner, packed);
        let a: &[u32] = bytemuck::cast_slice(packed);
        let pitch = padded_cols(inner) / 2;
        for (panel, b) in b.chunks_exact(2 * pairs).enumerate() {
            let column = panel * STRIP;
            let whole = rows / TILE_ROWS * TILE_ROWS;
            for row in (0..whole).step_by(TILE_ROWS) {
                let mut tile = [[_mm512_setzero_ps(); 2]; TILE_ROWS];
                microkernel(&mut tile, (&a[row * pitch..], pitch, 1), (b, 2), pairs);
                store_tile(&tile, &mut out[row * outer..], outer, column);
            }
            for row in whole..rows {
                let mut tile = [[_mm512_setzero_ps(); 2]; 1];
                microkernel(&mut tile, (&a[row * pitch..], pitch, 1), (b, 2), pairs);
                store_tile(&tile, &mut out[row * outer..], outer, column);
            }
        }
    }

    /// `partial[outer, inner] = dyT x`
    fn partial_weight_gradient(
        avx512: Avx512,
        dy: &[f32],
        outer: usize,
        x: &[f32],
        inner: usize,
        partial: &mut [f32],
        packed: &mut (Vec<V512>, Vec<V512>),
    ) {
        let (packed_dy, packed_x) = packed;
        let pairs = (dy.len() / outer).div_ceil(2);
        packed_dy.resize(pairs * padded_cols(outer) / 16, V512::ZERO);
        packed_x.resize(pairs * padded_cols(inner) / 16, V512::ZERO);
        pack_pairs(avx512, dy, outer, packed_dy);
        pack_panels(avx512, x, inner, pairs, packed_x);
        let a: &[u32] = bytemuck::cast_slice(packed_dy);
        for (panel, b) in packed_x.chunks_exact(2 * pairs).enumerate() {
            // Rows of the gradient beyond the last are sums of zeros, and stored nowhere.
            for row in (0..outer).step_by(TILE_ROWS) {
                let mut tile = [[_mm512_setzero_ps(); 2]; TILE_ROWS];
                microkernel(&mut tile, (&a[row..], 1, padded_cols(outer)), (b, 2), pairs);
                store_tile(&tile, &mut partial[row * inner..], inner, panel * STRIP);
            }
        }
    }
);
