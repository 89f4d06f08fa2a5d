//! Matmuls of the linear layers in bfloat16: `y = x wT`, `dx = dy w`, `dw += dyT x`.
//!
//! A task of the first two packs the rows it owns, which stay in its cache; the weights are packed once for all tasks. A task
//! of the last owns rows of dw; dy and x are packed once, in blocks of rows whose panels stay in its cache.

use std::arch::x86_64::{__m512, _mm512_setzero_ps};

use rayon::prelude::*;

use super::super::super::memory::Memory;
use super::Avx512;
use super::vec::{
    STRIP, V512, load, microkernel, pack_lanes, pack_panels, pack_rows, padded_cols, store,
};
use crate::llama::Op;
use crate::llama::ops::{Linear, LinearBackwardInput, LinearBackwardWeight};

/// Rows of the output per task.
const TASK_ROWS: usize = 64;
/// Rows of a weight's gradient per task.
const GRADIENT_TASK_ROWS: usize = 16;
/// Rows of dy and x per block: a panel of them is 32 KiB.
const BLOCK_ROWS: usize = 512;
/// Rows of a register tile.
const TILE_ROWS: usize = 8;

/// Packed operands, kept between operations.
#[derive(Default)]
pub(super) struct MatmulBuffers {
    weights: Vec<V512>,
    /// Blocks of rows of dy and of x.
    dy: Vec<V512>,
    x: Vec<V512>,
}

/// Bytes of an operation's packed weights, and of its packed dy and x.
pub(super) fn workspace(op: &Op) -> [usize; 3] {
    let bytes = |vectors: usize| vectors * size_of::<V512>();
    match op {
        Op::Linear(o) => [bytes(o.w.rows.div_ceil(STRIP) * padded_cols(o.w.cols)), 0, 0],
        Op::LinearBackwardInput(o) => [bytes(panels(o.w.rows, o.w.cols)), 0, 0],
        Op::LinearBackwardWeight(o) => {
            [0, bytes(panels(o.rows, o.w.rows)), bytes(panels(o.rows, o.w.cols))]
        }
        _ => [0; 3],
    }
}

/// Vectors of `[rows, cols]` packed to panels.
fn panels(rows: usize, cols: usize) -> usize {
    padded_cols(cols) / 16 * rows.div_ceil(2)
}

impl MatmulBuffers {
    /// Bytes of packed weights, and of packed dy and x, that are held.
    #[cfg(test)]
    pub fn bytes(&self) -> [usize; 3] {
        [&self.weights, &self.dy, &self.x].map(|buffer| size_of_val(&buffer[..]))
    }

    pub fn linear(&mut self, avx512: Avx512, o: &Linear, memory: &mut Memory<f32>) {
        let [x, y] = memory.floats.get([o.x, o.y]);
        let (outer, inner) = (o.w.rows, o.w.cols);
        let weights = at_least(&mut self.weights, outer.div_ceil(STRIP) * padded_cols(inner));
        let strips = memory.parameters[o.w.range()].par_chunks(STRIP * inner);
        weights.par_chunks_mut(padded_cols(inner)).zip(strips).for_each(|(packed, strip)| {
            pack_lanes(avx512, strip, inner, packed);
        });
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
        let weights = at_least(&mut self.weights, panels(outer, inner));
        let w = &memory.parameters[o.w.range()];
        weights.par_chunks_mut(2 * pairs).enumerate().for_each(|(panel, packed)| {
            pack_panels(avx512, w, inner, panel, pairs, packed);
        });
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
        let dy = pack_blocks(avx512, dy, outer, &mut self.dy);
        let x = pack_blocks(avx512, x, inner, &mut self.x);
        let tasks = dw.par_chunks_mut(GRADIENT_TASK_ROWS * inner).enumerate();
        tasks.for_each(|(task, dw)| {
            for rows in (0..o.rows).step_by(BLOCK_ROWS) {
                let pairs = BLOCK_ROWS.min(o.rows - rows).div_ceil(2);
                add_weight_gradient(
                    avx512,
                    block(dy, rows, pairs, outer),
                    block(x, rows, pairs, inner),
                    task * GRADIENT_TASK_ROWS,
                    pairs,
                    dw,
                    inner,
                );
            }
        });
    }
}

/// The block of pairs of rows that begins at a row.
fn block(packed: &[V512], row: usize, pairs: usize, cols: usize) -> &[V512] {
    &packed[panels(row, cols)..][..panels(2 * pairs, cols)]
}

/// The first vectors of a buffer, which grows to hold them.
fn at_least(buffer: &mut Vec<V512>, vectors: usize) -> &mut [V512] {
    buffer.resize(buffer.len().max(vectors), V512::ZERO);
    &mut buffer[..vectors]
}

/// Packs `[rows, cols]` in blocks of rows, each in panels of 32 columns.
fn pack_blocks<'a>(
    avx512: Avx512,
    values: &[f32],
    cols: usize,
    buffer: &'a mut Vec<V512>,
) -> &'a [V512] {
    let packed = at_least(buffer, panels(values.len() / cols, cols));
    let blocks = packed.par_chunks_mut(panels(BLOCK_ROWS, cols));
    blocks.zip(values.par_chunks(BLOCK_ROWS * cols)).for_each(|(packed, values)| {
        let pairs = (values.len() / cols).div_ceil(2);
        pack_panels(avx512, values, cols, 0, pairs, packed);
    });
    packed
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
    /// Reads a register tile from its rows, from `column` on.
    #[inline]
    fn load_tile<const R: usize>(
        tile: &mut [[__m512; 2]; R],
        values: &[f32],
        cols: usize,
        column: usize,
    ) {
        for (tile, values) in tile.iter_mut().zip(values.chunks(cols)) {
            for (n, tile) in tile.iter_mut().enumerate() {
                *tile = load(&values[(column + 16 * n).min(cols)..]);
            }
        }
    }

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

    /// `dw[n] += sum over a block's rows of dy[row][first + n] x[row]` for the rows of dw that one task owns.
    fn add_weight_gradient(
        avx512: Avx512,
        dy: &[V512],
        x: &[V512],
        first: usize,
        pairs: usize,
        dw: &mut [f32],
        inner: usize,
    ) {
        let dy: &[u32] = bytemuck::cast_slice(&dy[first / STRIP * 2 * pairs..][..2 * pairs]);
        for (panel, x) in x.chunks_exact(2 * pairs).enumerate() {
            // Rows beyond the last are sums of zeros, and stored nowhere.
            for (at, dw) in dw.chunks_mut(TILE_ROWS * inner).enumerate() {
                let mut tile = [[_mm512_setzero_ps(); 2]; TILE_ROWS];
                load_tile(&mut tile, dw, inner, panel * STRIP);
                let dy = &dy[first % STRIP + at * TILE_ROWS..];
                microkernel(&mut tile, (dy, 1, STRIP), (x, 2), pairs);
                store_tile(&tile, dw, inner, panel * STRIP);
            }
        }
    }
);
