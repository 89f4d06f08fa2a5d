//! Small-M GEMM in f32: a few rows times a weight matrix, for decoding, where each step has one row per
//! sequence.
//!
//! A vector holds one component of up to a vector's worth of rows, and every weight is read once, as a
//! broadcast. Each output is then its own sum in the order of the components, whatever the number of
//! rows: a sequence's logits are bitwise the same alone, in a batch, and with its prompt taken in chunks.
//! (`gemm` sums in an order that depends on the sizes.) The weights are read once per step, in place, which
//! bounds the speed of such a GEMM.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// The most rows that this GEMM takes.
pub(super) const MAX_SMALL_M: usize = 64;

/// Outputs (rows of weights) per task.
pub(super) const TASK_OUTPUTS: usize = 256;

/// `y = x wT`: x is `[rows, k]`, w `[n, k]`, y `[rows, n]`, all row-major.
pub(super) fn small_m_gemm(arch: Arch, y: &mut [f32], x: &[f32], w: &[f32], rows: usize, k: usize) {
    assert!(rows <= MAX_SMALL_M && x.len() == rows * k);
    let lanes = arch.dispatch(F32Lanes);
    let stride = rows.next_multiple_of(lanes);
    let mut transposed = vec![0.0; k * stride];
    for (row, x) in x.chunks(k).enumerate() {
        for (column, &value) in transposed.chunks_mut(stride).zip(x) {
            column[row] = value;
        }
    }
    // Waking another thread costs microseconds: some 2^16 multiplications of whole vectors.
    let min_tasks = (1 << 16) / (TASK_OUTPUTS * k * stride / lanes) + 1;
    for_each_task(y, w, rows, k, min_tasks, |out, w| {
        // Results meet in a tile first: the rows of y may lie a power of two apart, where writing to all
        // of them in turn would evict one another from the cache.
        let pitch = TASK_OUTPUTS + lanes;
        let mut tile = vec![0.0; rows * pitch];
        arch.dispatch(SmallMGemmTask { x: &transposed, stride, w, k, tile: &mut tile, pitch });
        for (out, row) in out.iter_mut().zip(tile.chunks(pitch)) {
            out.copy_from_slice(&row[..out.len()]);
        }
    });
}

/// Runs `task(outputs, weights)` for every `TASK_OUTPUTS` outputs: a piece of every row of y, and the weights'
/// rows that they need. A thread takes at least `min_tasks`.
pub(super) fn for_each_task(
    y: &mut [f32],
    w: &[f32],
    rows: usize,
    k: usize,
    min_tasks: usize,
    task: impl Fn(&mut [&mut [f32]], &[f32]) + Sync,
) {
    let n = w.len() / k;
    assert!(w.len() == n * k && y.len() == rows * n);
    let mut outputs: Vec<Vec<&mut [f32]>> = Vec::new();
    outputs.resize_with(n.div_ceil(TASK_OUTPUTS), || Vec::with_capacity(rows));
    for row in y.chunks_mut(n) {
        for (outputs, piece) in outputs.iter_mut().zip(row.chunks_mut(TASK_OUTPUTS)) {
            outputs.push(piece);
        }
    }
    outputs
        .into_par_iter()
        .zip(w.par_chunks(TASK_OUTPUTS * k))
        .with_min_len(min_tasks)
        .for_each(|(mut outputs, w)| task(&mut outputs, w));
}

/// The number of f32 lanes of a vector.
struct F32Lanes;

impl WithSimd for F32Lanes {
    type Output = usize;
    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> usize {
        S::F32_LANES
    }
}

struct SmallMGemmTask<'a> {
    /// `[k, stride]`: one row of x per lane.
    x: &'a [f32],
    stride: usize,
    /// `[outputs, k]`
    w: &'a [f32],
    k: usize,
    /// `[rows, pitch]`, of which the first columns are the outputs.
    tile: &'a mut [f32],
    pitch: usize,
}

impl WithSimd for SmallMGemmTask<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let Self { x, stride, w, k, tile, pitch } = self;
        let (x, _) = S::as_simd_f32s(x);
        let vectors = stride / S::F32_LANES;
        let mut v = 0;
        while v < vectors {
            let tile = &mut tile[v * S::F32_LANES * pitch..];
            // The largest register tile that does not spill.
            if v + 4 <= vectors {
                all_outputs::<S, 4, 4>(s, &x[v..], vectors, w, k, tile, pitch);
                v += 4;
            } else if v + 2 <= vectors {
                all_outputs::<S, 2, 8>(s, &x[v..], vectors, w, k, tile, pitch);
                v += 2;
            } else {
                all_outputs::<S, 1, 8>(s, &x[v..], vectors, w, k, tile, pitch);
                v += 1;
            }
        }
    }
}

/// All outputs of the rows in `V` vectors, `W` rows of weights at a time.
#[inline(always)]
fn all_outputs<S: Simd, const V: usize, const W: usize>(
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
        register_tile::<S, V, W>(s, x, vectors, w, k, &mut tile[group * W..], pitch);
    }
    for (rest, w) in w[whole * k..].chunks_exact(k).enumerate() {
        register_tile::<S, V, 1>(s, x, vectors, w, k, &mut tile[whole + rest..], pitch);
    }
}

/// A register tile: `W` outputs of the rows in `V` vectors, into the first columns of `tile`.
#[inline(always)]
fn register_tile<S: Simd, const V: usize, const W: usize>(
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
    fn small_m_gemm_matches_f64_and_is_bitwise_independent_of_batch() {
        for (n, k) in [(1, 1), (7, 3), (300, 64), (1311, 36), (520, 77)] {
            let (x, w) = (random(MAX_SMALL_M * k, 0), random(n * k, 1));
            let mut single = vec![0.0; MAX_SMALL_M * n];
            for (y, x) in single.chunks_mut(n).zip(x.chunks(k)) {
                small_m_gemm(Arch::new(), y, x, &w, 1, k);
            }
            for (at, &y) in single.iter().enumerate() {
                let terms = x[at / n * k..][..k].iter().zip(&w[at % n * k..][..k]);
                let exact: f64 = terms.map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
                assert!((f64::from(y) - exact).abs() < 1e-5 * k as f64, "{n} x {k}: {y}, {exact}");
            }
            for rows in [2, 5, 16, 17, 33, 48, 63, MAX_SMALL_M] {
                let mut batched = vec![f32::NAN; rows * n];
                small_m_gemm(Arch::new(), &mut batched, &x[..rows * k], &w, rows, k);
                assert!(batched == single[..rows * n], "{rows} rows of {k} by {n}");
            }
        }
    }
}
