//! Products of a few rows with a weight matrix in f32: decoding. A lane is an output.
//!
//! Weights are turned on their side in registers, sixteen by sixteen, and so are read in place, once, by
//! whole lines. Each output is its own sum in the order of the components, from fused multiply-adds: the
//! same bits as [`super::super::few`], which serves every processor.

use std::arch::x86_64::{
    _MM_HINT_T0, _mm_prefetch, _mm512_fmadd_ps, _mm512_set1_ps, _mm512_setzero_ps,
};

use rayon::prelude::*;

use super::lines::{load, store, turned};

/// Rows of weights that one task takes.
const TASK: usize = 256;

/// Sixteens of rows that are fetched ahead.
const AHEAD: usize = 2;

/// `y = x wT`: x is `[rows, k]`, w `[n, k]`, y `[rows, n]`, all row-major.
///
/// # Safety
/// The processor has AVX-512 with bfloat16.
pub(super) unsafe fn product(y: &mut [f32], x: &[f32], w: &[f32], rows: usize, k: usize) {
    let n = w.len() / k;
    assert!(x.len() == rows * k && w.len() == n * k && y.len() == rows * n);
    // A task's outputs: a piece of every row of y.
    let mut tasks: Vec<Vec<&mut [f32]>> = Vec::new();
    tasks.resize_with(n.div_ceil(TASK), || Vec::with_capacity(rows));
    for row in y.chunks_mut(n) {
        for (task, piece) in tasks.iter_mut().zip(row.chunks_mut(TASK)) {
            task.push(piece);
        }
    }
    // Waking another thread costs microseconds: some 2^16 weights.
    let tasks_at_least = (1 << 16) / (TASK * k * rows.div_ceil(4)) + 1;
    tasks.into_par_iter().zip(w.par_chunks(TASK * k)).with_min_len(tasks_at_least).for_each(
        // SAFETY: the caller's.
        |(mut out, w)| unsafe { task(&mut out, x, w, k) },
    );
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn task(out: &mut [&mut [f32]], x: &[f32], w: &[f32], k: usize) {
    for (at, w) in w.chunks(16 * k).enumerate() {
        for (out, x) in out.chunks_mut(8).zip(x.chunks(8 * k)) {
            let mut sums = [_mm512_setzero_ps(); 8];
            for from in (0..k).step_by(16) {
                let to = (from + 16).min(k);
                let mut tile = [_mm512_setzero_ps(); 16];
                for (tile, w) in tile.iter_mut().zip(w.chunks_exact(k)) {
                    let w = &w[from..to];
                    // A hint, which no address makes wrong: sixteen short streams are too many for
                    // the processor to see by itself.
                    _mm_prefetch::<_MM_HINT_T0>(w.as_ptr().wrapping_add(AHEAD * 16 * k).cast());
                    *tile = load(w);
                }
                let tile = turned(&tile);
                for (sum, x) in sums.iter_mut().zip(x.chunks_exact(k)) {
                    for (&x, &w) in x[from..to].iter().zip(&tile) {
                        *sum = _mm512_fmadd_ps(_mm512_set1_ps(x), w, *sum);
                    }
                }
            }
            let outputs = w.len() / k;
            for (out, &sum) in out.iter_mut().zip(&sums) {
                store(&mut out[16 * at..][..outputs], sum);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use pulp::Arch;

    use super::super::found;
    use super::*;
    use crate::random::{Philox, Stream};

    #[test]
    fn it_gives_the_bits_of_every_processors_kernel() {
        if !found() {
            return eprintln!("SKIPPED: this processor has no AVX-512 with bfloat16");
        }
        for (rows, n, k) in [(1, 1, 1), (1, 300, 64), (5, 1311, 36), (17, 520, 77), (64, 40, 256)] {
            let (mut x, mut w) = (vec![0.0; rows * k], vec![0.0; n * k]);
            Philox::new(3, Stream::Test).fill_normal(0, 1.0, &mut x);
            Philox::new(3, Stream::Test).fill_normal(1, 1.0, &mut w);
            let (mut here, mut there) = (vec![f32::NAN; rows * n], vec![f32::NAN; rows * n]);
            // SAFETY: found above.
            unsafe { product(&mut here, &x, &w, rows, k) };
            super::super::super::few::product(Arch::new(), &mut there, &x, &w, rows, k);
            assert!(here == there, "{rows} rows of {k} by {n}");
        }
    }
}
