//! Products of a few rows with a weight matrix: decoding, where each step has one row a sequence.
//!
//! A vector holds one component of up to a vector's worth of rows, and every weight is met once, as
//! a broadcast. Each output is then its own sum in the order of the components, whatever the
//! number of rows: a sequence's logits are the same bits alone, in a batch, and with its prompt
//! taken in stretches. (`gemm` sums in an order that depends on the sizes.) The weights are read
//! once a step, in place, which is what such a product costs.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// The most rows that go this way.
pub(super) const MAX_SMALL_M: usize = 64;

/// Rows of weights that one task takes.
const TASK: usize = 256;

/// `y = x wT`: x is `[rows, k]`, w `[n, k]`, y `[rows, n]`, all row-major.
pub(super) fn small_m_gemm(arch: Arch, y: &mut [f32], x: &[f32], w: &[f32], rows: usize, k: usize) {
    let n = w.len() / k;
    assert!(rows <= MAX_SMALL_M && x.len() == rows * k && w.len() == n * k && y.len() == rows * n);
    let width = arch.dispatch(Lanes);
    let stride = rows.next_multiple_of(width);
    let mut transposed = vec![0.0; k * stride];
    for (row, x) in x.chunks(k).enumerate() {
        for (column, &value) in transposed.chunks_mut(stride).zip(x) {
            column[row] = value;
        }
    }
    // A task's outputs: a piece of every row of y.
    let mut tasks: Vec<Vec<&mut [f32]>> = Vec::new();
    tasks.resize_with(n.div_ceil(TASK), || Vec::with_capacity(rows));
    for row in y.chunks_mut(n) {
        for (task, piece) in tasks.iter_mut().zip(row.chunks_mut(TASK)) {
            task.push(piece);
        }
    }
    // Waking another thread costs microseconds: some 2^16 multiplications of whole vectors.
    let tasks_at_least = (1 << 16) / (TASK * k * stride / width) + 1;
    tasks.into_par_iter().zip(w.par_chunks(TASK * k)).with_min_len(tasks_at_least).for_each(
        |(out, w)| {
            // Results meet in a tile first: the rows of y may lie a power of two apart, where
            // writing to all of them in turn would throw one another out of the cache.
            let pitch = TASK + width;
            let mut tile = vec![0.0; rows * pitch];
            arch.dispatch(Task { x: &transposed, stride, w, k, tile: &mut tile, pitch });
            for (out, row) in out.into_iter().zip(tile.chunks(pitch)) {
                out.copy_from_slice(&row[..out.len()]);
            }
        },
    );
}

/// How many floats a vector holds.
struct Lanes;

impl WithSimd for Lanes {
    type Output = usize;
    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> usize {
        S::F32_LANES
    }
}

struct Task<'a> {
    /// `[k, stride]`: a row of x in each lane.
    x: &'a [f32],
    stride: usize,
    /// `[outputs, k]`
    w: &'a [f32],
    k: usize,
    /// `[rows, pitch]`, of which the first columns are the outputs.
    tile: &'a mut [f32],
    pitch: usize,
}

impl WithSimd for Task<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let Self { x, stride, w, k, tile, pitch } = self;
        let (x, _) = S::as_simd_f32s(x);
        let vectors = stride / S::F32_LANES;
        let mut v = 0;
        while v < vectors {
            let tile = &mut tile[v * S::F32_LANES * pitch..];
            // As many sums at once as the registers hold.
            if v + 4 <= vectors {
                outputs::<S, 4, 4>(s, &x[v..], vectors, w, k, tile, pitch);
                v += 4;
            } else if v + 2 <= vectors {
                outputs::<S, 2, 8>(s, &x[v..], vectors, w, k, tile, pitch);
                v += 2;
            } else {
                outputs::<S, 1, 8>(s, &x[v..], vectors, w, k, tile, pitch);
                v += 1;
            }
        }
    }
}

/// All outputs of the rows in `V` vectors, `W` rows of weights at a time.
#[inline(always)]
fn outputs<S: Simd, const V: usize, const W: usize>(
    s: S,
    x: &[S::f32s],
    vectors: usize,
    w: &[f32],
    k: usize,
    tile: &mut [f32],
    pitch: usize,
) {
    let whole = w.len() / (W * k) * W;
    for (group, w) in w.chunks_exact(W * k).enumerate() {
        sums::<S, V, W>(s, x, vectors, w, k, &mut tile[group * W..], pitch);
    }
    for (rest, w) in w[whole * k..].chunks_exact(k).enumerate() {
        sums::<S, V, 1>(s, x, vectors, w, k, &mut tile[whole + rest..], pitch);
    }
}

/// `W` outputs of the rows in `V` vectors, into the first columns of the tile.
#[inline(always)]
fn sums<S: Simd, const V: usize, const W: usize>(
    s: S,
    x: &[S::f32s],
    vectors: usize,
    w: &[f32],
    k: usize,
    tile: &mut [f32],
    pitch: usize,
) {
    let w: [&[f32]; W] = std::array::from_fn(|o| &w[o * k..][..k]);
    let mut sums = [[s.splat_f32s(0.0); V]; W];
    for (c, x) in x.chunks(vectors).take(k).enumerate() {
        for v in 0..V {
            for o in 0..W {
                sums[o][v] = s.mul_add_f32s(s.splat_f32s(w[o][c]), x[v], sums[o][v]);
            }
        }
    }
    for (o, sums) in sums.iter().enumerate() {
        let lanes: &[f32] = bytemuck::cast_slice(sums);
        for (row, &sum) in tile.chunks_mut(pitch).zip(lanes) {
            row[o] = sum;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{Philox, Stream};

    fn random(len: usize, sequence: u32) -> Vec<f32> {
        let mut values = vec![0.0; len];
        Philox::new(3, Stream::Test).fill_normal(sequence, 1.0, &mut values);
        values
    }

    #[test]
    fn a_rows_product_is_right_and_the_same_bits_in_any_company() {
        for (n, k) in [(1, 1), (7, 3), (300, 64), (1311, 36), (520, 77)] {
            let (x, w) = (random(MAX_SMALL_M * k, 0), random(n * k, 1));
            let mut alone = vec![0.0; MAX_SMALL_M * n];
            for (y, x) in alone.chunks_mut(n).zip(x.chunks(k)) {
                small_m_gemm(Arch::new(), y, x, &w, 1, k);
            }
            for (at, &y) in alone.iter().enumerate() {
                let terms = x[at / n * k..][..k].iter().zip(&w[at % n * k..][..k]);
                let exact: f64 = terms.map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
                assert!((f64::from(y) - exact).abs() < 1e-5 * k as f64, "{n} x {k}: {y}, {exact}");
            }
            for rows in [2, 5, 16, 17, 33, 48, 63, MAX_SMALL_M] {
                let mut together = vec![f32::NAN; rows * n];
                small_m_gemm(Arch::new(), &mut together, &x[..rows * k], &w, rows, k);
                assert!(together == alone[..rows * n], "{rows} rows of {k} by {n}");
            }
        }
    }
}
