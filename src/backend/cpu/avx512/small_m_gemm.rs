//! Small-M GEMM in f32, for decoding. A lane is an output.
//!
//! Weights are read in place, once, by whole vectors, and transposed 16 x 16 in registers. Each output is its
//! own sum in the order of the components, by fused multiply-adds: bit for bit the result of the portable
//! [`super::super::small_m_gemm`].

use std::arch::x86_64::{
    _MM_HINT_T0, _mm_prefetch, _mm512_fmadd_ps, _mm512_set1_ps, _mm512_setzero_ps,
};

use super::super::small_m_gemm::{TASK_OUTPUTS, for_each_task};
use super::Avx512;
use super::vec::{load, store, transpose_16x16};

/// Prefetch distance, in blocks of 16 weight rows.
const PREFETCH_BLOCKS: usize = 2;

/// `y = x wT`: x is `[rows, k]`, w `[n, k]`, y `[rows, n]`, all row-major.
pub(super) fn small_m_gemm(
    avx512: Avx512,
    y: &mut [f32],
    x: &[f32],
    w: &[f32],
    rows: usize,
    k: usize,
) {
    assert!(x.len() == rows * k);
    // Waking another thread costs microseconds: some 2^16 weights.
    let min_tasks = (1 << 16) / (TASK_OUTPUTS * k * rows.div_ceil(4)) + 1;
    for_each_task(y, w, rows, k, min_tasks, |out, w| gemm_task(avx512, out, x, w, k));
}

avx512_entry!(
    fn gemm_task(avx512: Avx512, out: &mut [&mut [f32]], x: &[f32], w: &[f32], k: usize) {
        for (at, w) in w.chunks(16 * k).enumerate() {
            for (out, x) in out.chunks_mut(8).zip(x.chunks(8 * k)) {
                let mut sums = [_mm512_setzero_ps(); 8];
                for from in (0..k).step_by(16) {
                    let to = (from + 16).min(k);
                    let mut tile = [_mm512_setzero_ps(); 16];
                    for (tile, w) in tile.iter_mut().zip(w.chunks_exact(k)) {
                        let w = &w[from..to];
                        // A hint, valid for any address: sixteen short streams are too many for the
                        // hardware prefetcher.
                        _mm_prefetch::<_MM_HINT_T0>(
                            w.as_ptr().wrapping_add(PREFETCH_BLOCKS * 16 * k).cast(),
                        );
                        *tile = load(w);
                    }
                    let tile = transpose_16x16(&tile);
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
);

#[cfg(test)]
mod tests {
    use pulp::Arch;

    use super::*;
    use crate::backend::cpu::small_m_gemm as portable;
    use crate::random::{Philox, Stream};

    #[test]
    fn small_m_gemm_is_bitwise_equal_to_the_portable_kernel() {
        let Some(avx512) = Avx512::detect_or_skip() else { return };
        for (rows, n, k) in [(1, 1, 1), (1, 300, 64), (5, 1311, 36), (17, 520, 77), (64, 40, 256)] {
            let (mut x, mut w) = (vec![0.0; rows * k], vec![0.0; n * k]);
            Philox::new(3, Stream::Test).fill_normal(0, 1.0, &mut x);
            Philox::new(3, Stream::Test).fill_normal(1, 1.0, &mut w);
            let (mut got, mut expected) = (vec![f32::NAN; rows * n], vec![f32::NAN; rows * n]);
            small_m_gemm(avx512, &mut got, &x, &w, rows, k);
            portable::small_m_gemm(Arch::new(), &mut expected, &x, &w, rows, k);
            assert!(got == expected, "{rows} rows of {k} by {n}");
        }
    }
}
