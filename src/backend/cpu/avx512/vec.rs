//! 512-bit vectors: masked loads and stores, conversion to bfloat16, packing, the GEMM micro-kernel, a
//! 16 x 16 transpose, and 2^x.

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _mm512_castpd_ps, _mm512_castps_pd, _mm512_castps_si512,
    _mm512_castsi512_ps, _mm512_cvtne2ps_pbh, _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_loadu_ps,
    _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps, _mm512_permutex2var_epi16,
    _mm512_permutexvar_epi16, _mm512_reduce_ps, _mm512_scalef_ps, _mm512_set1_epi32,
    _mm512_set1_ps, _mm512_setzero_ps, _mm512_shuffle_f32x4, _mm512_storeu_ps, _mm512_sub_ps,
    _mm512_unpackhi_pd, _mm512_unpackhi_ps, _mm512_unpacklo_pd, _mm512_unpacklo_ps,
};

use bytemuck::{Pod, Zeroable};

use super::Avx512;

/// One 512-bit vector in memory: 16 lanes, each an f32 or a pair of bf16.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C, align(64))]
pub(super) struct V512(pub [u32; 16]);

impl V512 {
    pub const ZERO: Self = Self([0; 16]);

    pub fn floats(&self) -> &[f32; 16] {
        bytemuck::cast_ref(&self.0)
    }

    pub fn floats_mut(&mut self) -> &mut [f32; 16] {
        bytemuck::cast_mut(&mut self.0)
    }

    avx512!(
        #[inline]
        pub fn load(&self) -> __m512 {
            // SAFETY: `self` is 64 readable bytes.
            unsafe { _mm512_loadu_ps(self.0.as_ptr().cast()) }
        }

        #[inline]
        pub fn store(&mut self, values: __m512) {
            // SAFETY: `self` is 64 writable bytes.
            unsafe { _mm512_storeu_ps(self.0.as_mut_ptr().cast(), values) }
        }
    );
}

/// The mask of the lanes that a slice of `len` fills.
fn mask(len: usize) -> u16 {
    if len < 16 { (1 << len) - 1 } else { u16::MAX }
}

/// A lane order that interleaves 16 lanes with the 16 from `offset` on: 0, offset, 1, 1 + offset, ...
const fn interleave_order(offset: u16) -> [u16; 32] {
    let mut order = [0; 32];
    let mut i = 0;
    while i < 16 {
        order[2 * i] = i as u16;
        order[2 * i + 1] = i as u16 + offset;
        i += 1;
    }
    order
}

avx512!(
    /// The first 16 values, zero beyond the end of the slice.
    #[inline]
    pub(super) fn load(values: &[f32]) -> __m512 {
        // SAFETY: lanes beyond the slice are masked out, and memory there is not read.
        unsafe { _mm512_maskz_loadu_ps(mask(values.len()), values.as_ptr()) }
    }

    /// `values[i] = vector[i]` for the first 16 values, or as many as the slice has.
    #[inline]
    pub(super) fn store(values: &mut [f32], vector: __m512) {
        // SAFETY: lanes beyond the slice are masked out, and memory there is not written.
        unsafe { _mm512_mask_storeu_ps(values.as_mut_ptr(), mask(values.len()), vector) }
    }

    /// Values `16 * chunk..` of a row, zero beyond its end.
    #[inline]
    fn load_chunk(row: &[f32], chunk: usize) -> __m512 {
        load(&row[(16 * chunk).min(row.len())..])
    }

    /// 32 values as bf16: `a`, then `b`. Rounded to nearest, ties to even; denormals become 0.
    #[inline]
    pub(super) fn to_bf16(a: __m512, b: __m512) -> __m512 {
        as_ps(_mm512_cvtne2ps_pbh(b, a))
    }

    /// The 16 pairs `(a[i], b[i])` of bf16.
    #[inline]
    pub(super) fn to_bf16_pairs(a: __m512, b: __m512) -> __m512 {
        const ORDER: [u16; 32] = interleave_order(16);
        let bf16 = _mm512_castps_si512(to_bf16(a, b));
        _mm512_castsi512_ps(_mm512_permutexvar_epi16(load_order(&ORDER), bf16))
    }

    /// The 32 pairs `(a[i], b[i])` of two vectors of 32 bf16, as two vectors of 16 pairs.
    #[inline]
    pub(super) fn interleave_bf16(a: __m512, b: __m512) -> [__m512; 2] {
        const LOW: [u16; 32] = interleave_order(32);
        const HIGH: [u16; 32] = {
            let mut order = LOW;
            let mut i = 0;
            while i < 32 {
                order[i] += 16;
                i += 1;
            }
            order
        };
        let (a, b) = (_mm512_castps_si512(a), _mm512_castps_si512(b));
        let [low, high] = [load_order(&LOW), load_order(&HIGH)];
        [
            _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, low, b)),
            _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, high, b)),
        ]
    }

    #[inline]
    fn load_order(order: &[u16; 32]) -> __m512i {
        // SAFETY: both are 64 bytes without padding, and any bits are a value of each.
        unsafe { std::mem::transmute(*order) }
    }

    #[inline]
    fn as_ps(x: __m512bh) -> __m512 {
        // SAFETY: both are 64 bytes without padding, and any bits are a value of each.
        unsafe { std::mem::transmute(x) }
    }

    #[inline]
    fn as_bf16(x: __m512) -> __m512bh {
        // SAFETY: both are 64 bytes without padding, and any bits are a value of each.
        unsafe { std::mem::transmute(x) }
    }

    /// GEMM micro-kernel over a register tile of `R` rows and `N` vectors of 16 columns:
    /// `acc[r][n] += sum over k < pairs of a[r * row_stride + k * pair_stride] b[k * pitch + n]`, where an
    /// element of `a` is a pair of bf16 that is broadcast against a vector of pairs of `b`.
    ///
    /// A pair's two products are added in f32 one after the other; denormals count as 0.
    #[inline]
    pub(super) fn microkernel<const R: usize, const N: usize>(
        acc: &mut [[__m512; N]; R],
        (a, row_stride, pair_stride): (&[u32], usize, usize),
        (b, pitch): (&[V512], usize),
        pairs: usize,
    ) {
        if pairs == 0 {
            return;
        }
        assert!((R - 1) * row_stride + (pairs - 1) * pair_stride < a.len());
        assert!((pairs - 1) * pitch + N <= b.len());
        let mut tile = *acc;
        let (mut a, mut b) = (a.as_ptr(), b.as_ptr());
        for _ in 0..pairs {
            let mut columns = [_mm512_setzero_ps(); N];
            for (n, columns) in columns.iter_mut().enumerate() {
                // SAFETY: n < N and this is at most the last pair: inside of b, by the assertion.
                *columns = unsafe { (*b.add(n)).load() };
            }
            for (r, tile) in tile.iter_mut().enumerate() {
                // SAFETY: r < R and this is at most the last pair: inside of a, by the assertion.
                let pair = unsafe { *a.add(r * row_stride) };
                let pair = as_bf16(_mm512_castsi512_ps(_mm512_set1_epi32(pair as i32)));
                for (sum, &columns) in tile.iter_mut().zip(&columns) {
                    *sum = _mm512_dpbf16_ps(*sum, pair, as_bf16(columns));
                }
            }
            a = a.wrapping_add(pair_stride);
            b = b.wrapping_add(pitch);
        }
        *acc = tile;
    }

    /// The transpose of 16 vectors: lane `i` of output `j` is lane `j` of input `i`.
    #[inline]
    pub(super) fn transpose_16x16(v: &[__m512; 16]) -> [__m512; 16] {
        let (mut twos, mut fours) = (*v, *v);
        for i in 0..8 {
            let (a, b) = (v[2 * i], v[2 * i + 1]);
            twos[2 * i] = _mm512_unpacklo_ps(a, b);
            twos[2 * i + 1] = _mm512_unpackhi_ps(a, b);
        }
        // Each quarter of `fours[4 i + j]` holds lane `j` of its quarter of four vectors.
        for i in 0..4 {
            for half in 0..2 {
                let a = _mm512_castps_pd(twos[4 * i + half]);
                let b = _mm512_castps_pd(twos[4 * i + 2 + half]);
                fours[4 * i + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
                fours[4 * i + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
            }
        }
        let mut out = *v;
        for j in 0..4 {
            let [a, b, c, d] = [fours[j], fours[4 + j], fours[8 + j], fours[12 + j]];
            let even = [_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0x88>(c, d)];
            let odd = [_mm512_shuffle_f32x4::<0xdd>(a, b), _mm512_shuffle_f32x4::<0xdd>(c, d)];
            out[j] = _mm512_shuffle_f32x4::<0x88>(even[0], even[1]);
            out[4 + j] = _mm512_shuffle_f32x4::<0x88>(odd[0], odd[1]);
            out[8 + j] = _mm512_shuffle_f32x4::<0xdd>(even[0], even[1]);
            out[12 + j] = _mm512_shuffle_f32x4::<0xdd>(odd[0], odd[1]);
        }
        out
    }

    /// 2^x, within 2 units in the last place and 0 below -150, for x of at most 127.
    ///
    /// x = n + r with |r| <= 1/2; 2^r by the minimax polynomial of degree 5.
    #[inline]
    pub(super) fn exp2(x: __m512) -> __m512 {
        // For minus infinity r is 0 and n minus infinity again.
        let r = _mm512_reduce_ps::<0>(x);
        let n = _mm512_sub_ps(x, r);
        let mut p = _mm512_set1_ps(1.327_647_2e-3);
        for coefficient in [9.675_541e-3, 5.550_713e-2, 2.402_212e-1, 6.931_469_4e-1, 1.0] {
            p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(coefficient));
        }
        _mm512_scalef_ps(p, n)
    }
);

/// Rows or columns of a packed strip: two vectors.
pub(super) const STRIP: usize = 32;

/// `cols` rounded up to whole vectors of bf16.
pub(super) fn padded_cols(cols: usize) -> usize {
    cols.next_multiple_of(32)
}

/// The first 16 rows of a strip, and the others.
fn strip_halves(values: &[f32], cols: usize) -> [&[f32]; 2] {
    let (first, second) = values.split_at(values.len().min(16 * cols));
    [first, second]
}

avx512_entry!(
    /// Packs `[rows, cols]` to bf16 row-major, each row padded to whole vectors. Vectors past the last row
    /// stay as they are.
    pub(super) fn pack_rows(avx512: Avx512, values: &[f32], cols: usize, out: &mut [V512]) {
        for (values, out) in values.chunks(cols).zip(out.chunks_mut(padded_cols(cols) / 32)) {
            for (at, out) in out.iter_mut().enumerate() {
                out.store(to_bf16(load_chunk(values, 2 * at), load_chunk(values, 2 * at + 1)));
            }
        }
    }

    /// Packs `[rows, cols]` to `[rows / 2, cols]` pairs of rows, padded to an even number of whole vectors.
    /// The last of an odd number of rows is paired with 0; vectors past it stay as they are.
    pub(super) fn pack_pairs(avx512: Avx512, values: &[f32], cols: usize, out: &mut [V512]) {
        for (two, out) in values.chunks(2 * cols).zip(out.chunks_mut(padded_cols(cols) / 16)) {
            let (first, second) = two.split_at(cols);
            for (at, out) in out.iter_mut().enumerate() {
                out.store(to_bf16_pairs(load_chunk(first, at), load_chunk(second, at)));
            }
        }
    }

    /// Packs `[rows, cols]` to `[rows / 32, cols / 2, 32]`: pairs of columns, one row per lane, 0 past the last.
    pub(super) fn pack_lanes(avx512: Avx512, values: &[f32], cols: usize, out: &mut [V512]) {
        let strips = values.chunks(STRIP * cols).zip(out.chunks_exact_mut(padded_cols(cols)));
        for (values, strip) in strips {
            for (half, lanes) in strip_halves(values, cols).into_iter().enumerate() {
                for (at, pairs) in strip.chunks_exact_mut(32).enumerate() {
                    let mut block = [_mm512_setzero_ps(); 16];
                    for (block, row) in block.iter_mut().zip(lanes.chunks(cols)) {
                        *block = to_bf16(load_chunk(row, 2 * at), load_chunk(row, 2 * at + 1));
                    }
                    for (pair, lanes) in transpose_16x16(&block).into_iter().enumerate() {
                        pairs[2 * pair + half].store(lanes);
                    }
                }
            }
        }
    }

    /// Packs columns of `[rows, cols]` to panels `[columns / 32, rows / 2, 32]`, from panel `first` on, as many as `out`
    /// holds: pairs of rows, one column per lane. The last of an odd number of rows is paired with 0. A panel holds
    /// `pairs` of them; those past the last stay as they are.
    pub(super) fn pack_panels(
        avx512: Avx512,
        values: &[f32],
        cols: usize,
        first: usize,
        pairs: usize,
        out: &mut [V512],
    ) {
        for (pair, two) in values.chunks(2 * cols).enumerate() {
            let (upper, lower) = two.split_at(cols);
            for (panel, out) in out.chunks_exact_mut(2 * pairs).enumerate() {
                for (half, out) in out[2 * pair..2 * pair + 2].iter_mut().enumerate() {
                    let at = 2 * (first + panel) + half;
                    out.store(to_bf16_pairs(load_chunk(upper, at), load_chunk(lower, at)));
                }
            }
        }
    }
);

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::random::{Philox, Stream};

    avx512_entry!(
        fn exp2_in_place(avx512: Avx512, values: &mut [f32]) {
            for values in values.chunks_mut(16) {
                let power = exp2(load(values));
                store(values, power);
            }
        }

        fn matmul(avx512: Avx512, a: &[f32], b: &[f32], inner: usize) -> Vec<f32> {
            let rows = a.len() / inner;
            let mut packed_a = vec![V512::ZERO; rows * padded_cols(inner) / 32];
            let mut packed_b = vec![V512::ZERO; padded_cols(inner)];
            pack_rows(avx512, a, inner, &mut packed_a);
            pack_lanes(avx512, b, inner, &mut packed_b);
            let (a, pairs): (&[u32], _) = (bytemuck::cast_slice(&packed_a), padded_cols(inner) / 2);
            let mut out = Vec::new();
            for row in 0..rows {
                let mut acc = [[_mm512_setzero_ps(); 2]; 1];
                microkernel(&mut acc, (&a[row * pairs..], pairs, 1), (&packed_b, 2), pairs);
                let mut vector = V512::ZERO;
                for sum in acc[0] {
                    vector.store(sum);
                    out.extend(vector.floats());
                }
            }
            out
        }
    );

    #[test]
    fn exp2_is_within_two_units_in_the_last_place() {
        let Some(avx512) = Avx512::detect_or_skip() else { return };
        let xs: Vec<f32> = (0..=2_000_000).map(|i| -126.0 + 253.0 * i as f32 / 2e6).collect();
        let mut ys = xs.clone();
        exp2_in_place(avx512, &mut ys);
        for (x, y) in xs.iter().zip(&ys) {
            let exact = f64::from(*x).exp2();
            let error = (f64::from(*y) - exact).abs() / exact;
            assert!(error < 2.0 * f64::from(f32::EPSILON), "2^{x} = {y}");
        }
        let mut edges = [f32::NEG_INFINITY, -1e30, -151.0, 0.0, f32::NAN];
        exp2_in_place(avx512, &mut edges);
        assert_eq!(edges[..4], [0.0, 0.0, 0.0, 1.0]);
        assert!(edges[4].is_nan());
    }

    /// Operands are rounded to nearest, ties to even; sums are f32 in the order of the components.
    #[test]
    fn microkernel_rounds_operands_to_bf16_and_sums_in_f32() {
        let Some(avx512) = Avx512::detect_or_skip() else { return };
        for inner in [1, 2, 31, 64, 77] {
            let (rows, mut a, mut b) = (3, vec![0.0; 3 * inner], vec![0.0; STRIP * inner]);
            Philox::new(9, Stream::Test).fill_normal(0, 1.0, &mut a);
            Philox::new(9, Stream::Test).fill_normal(1, 1.0, &mut b);
            // A tie, which goes to even; and a denormal, which counts as 0.
            (a[0], a[inner]) = (1.0 + 3.0 / 256.0, 1e-40);
            let got = matmul(avx512, &a, &b, inner);
            for (at, &got) in got.iter().enumerate() {
                let (row, column) = (at / STRIP, at % STRIP);
                let terms = a[row * inner..][..inner].iter().zip(&b[column * inner..][..inner]);
                let (mut exact, mut size) = (0.0, 0.0);
                for (&a, &b) in terms {
                    let [a, b] = [a, b].map(|x| f64::from(bf16::from_f32(x).to_f32()));
                    exact += a * b;
                    size += (a * b).abs();
                }
                let bound = size * inner as f64 * f64::from(f32::EPSILON) + 1e-37;
                assert!((f64::from(got) - exact).abs() <= bound, "{inner}: {got} for {exact}");
            }
            assert_eq!(got.len(), rows * STRIP);
        }
    }
}
