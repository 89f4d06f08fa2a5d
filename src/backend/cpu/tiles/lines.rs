//! Vectors of sixteen, products of them held in registers, and 2^x: what the other files are made of.
//!
//! Every function here asks for AVX-512 with its bfloat16 products. Calling one from code compiled for
//! less is `unsafe`, and right only once [`super::Tiles::detect`] has found them.

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _mm512_castpd_ps, _mm512_castps_pd, _mm512_castps_si512,
    _mm512_castsi512_ps, _mm512_cvtne2ps_pbh, _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_loadu_ps,
    _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps, _mm512_permutex2var_epi16,
    _mm512_permutexvar_epi16, _mm512_reduce_ps, _mm512_scalef_ps, _mm512_set1_epi32,
    _mm512_set1_ps, _mm512_setzero_ps, _mm512_shuffle_f32x4, _mm512_storeu_ps, _mm512_sub_ps,
    _mm512_unpackhi_pd, _mm512_unpackhi_ps, _mm512_unpacklo_pd, _mm512_unpacklo_ps,
};

use bytemuck::{Pod, Zeroable};

/// A vector in memory: sixteen f32s, or sixteen pairs of bf16. A unit is one of the sixteen.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C, align(64))]
pub(super) struct Line(pub [u32; 16]);

impl Line {
    pub const ZERO: Self = Self([0; 16]);

    pub fn floats(&self) -> &[f32; 16] {
        bytemuck::cast_ref(&self.0)
    }

    pub fn floats_mut(&mut self) -> &mut [f32; 16] {
        bytemuck::cast_mut(&mut self.0)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub fn load(&self) -> __m512 {
        // SAFETY: a line is sixteen units.
        unsafe { _mm512_loadu_ps(self.0.as_ptr().cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub fn store(&mut self, values: __m512) {
        // SAFETY: a line is sixteen units.
        unsafe { _mm512_storeu_ps(self.0.as_mut_ptr().cast(), values) }
    }
}

/// The lanes that a slice of `len` fills.
fn lanes(len: usize) -> u16 {
    if len < 16 { (1 << len) - 1 } else { u16::MAX }
}

/// As many values as there are, at most sixteen, then zeros.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) fn load(values: &[f32]) -> __m512 {
    // SAFETY: lanes beyond the slice are masked out, and memory there is not read.
    unsafe { _mm512_maskz_loadu_ps(lanes(values.len()), values.as_ptr()) }
}

/// `values[i] = vector[i]` for as many as there are, at most sixteen.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) fn store(values: &mut [f32], vector: __m512) {
    // SAFETY: lanes beyond the slice are masked out, and memory there is not written.
    unsafe { _mm512_mask_storeu_ps(values.as_mut_ptr(), lanes(values.len()), vector) }
}

/// The vector `at` of a row in vectors of sixteen, zero beyond its end.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn piece(row: &[f32], at: usize) -> __m512 {
    load(&row[(16 * at).min(row.len())..])
}

/// 32 values as a row of bf16: `a`, then `b`. Rounded to nearest, ties to even; denormals become 0.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) fn row(a: __m512, b: __m512) -> __m512 {
    as_floats(_mm512_cvtne2ps_pbh(b, a))
}

/// Sixteen pairs `(a[i], b[i])` of bf16.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) fn pairs(a: __m512, b: __m512) -> __m512 {
    const ORDER: [u16; 32] = interleaved(16);
    _mm512_castsi512_ps(_mm512_permutexvar_epi16(order(&ORDER), _mm512_castps_si512(row(a, b))))
}

/// From two rows of 32 bf16 the pairs `(a[i], b[i])`, the first sixteen and the last.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) fn zipped(a: __m512, b: __m512) -> [__m512; 2] {
    const LOW: [u16; 32] = interleaved(32);
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
    let [low, high] = [order(&LOW), order(&HIGH)];
    [
        _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, low, b)),
        _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, high, b)),
    ]
}

/// 0, apart, 1, 1 + apart, 2, ...
const fn interleaved(apart: u16) -> [u16; 32] {
    let mut order = [0; 32];
    let mut i = 0;
    while i < 16 {
        order[2 * i] = i as u16;
        order[2 * i + 1] = i as u16 + apart;
        i += 1;
    }
    order
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn order(order: &[u16; 32]) -> __m512i {
    // SAFETY: both are 64 bytes without padding, and any bits are a value of each.
    unsafe { std::mem::transmute(*order) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn as_floats(x: __m512bh) -> __m512 {
    // SAFETY: both are 64 bytes without padding, and any bits are a value of each.
    unsafe { std::mem::transmute(x) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn as_pairs(x: __m512) -> __m512bh {
    // SAFETY: both are 64 bytes without padding, and any bits are a value of each.
    unsafe { std::mem::transmute(x) }
}

/// `sums[r][n] += sum over k of a[r * a_row + k * a_unit] b[k * pitch + n]`: pairs of a broadcast against
/// lines of pairs of b, all of it in registers.
///
/// A pair's two products are added in f32 one after the other, denormals taken as 0.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) fn dot<const R: usize, const N: usize>(
    sums: &mut [[__m512; N]; R],
    (a, a_row, a_unit): (&[u32], usize, usize),
    (b, pitch): (&[Line], usize),
    units: usize,
) {
    if units == 0 {
        return;
    }
    assert!((R - 1) * a_row + (units - 1) * a_unit < a.len());
    assert!((units - 1) * pitch + N <= b.len());
    let mut held = *sums;
    let (mut a, mut b) = (a.as_ptr(), b.as_ptr());
    for _ in 0..units {
        let mut lines = [_mm512_setzero_ps(); N];
        for (n, line) in lines.iter_mut().enumerate() {
            // SAFETY: n < N and this is at most the last unit: inside of b, by the assertion.
            *line = unsafe { (*b.add(n)).load() };
        }
        for (r, held) in held.iter_mut().enumerate() {
            // SAFETY: r < R and this is at most the last unit: inside of a, by the assertion.
            let unit = unsafe { *a.add(r * a_row) };
            let unit = as_pairs(_mm512_castsi512_ps(_mm512_set1_epi32(unit as i32)));
            for (held, &line) in held.iter_mut().zip(&lines) {
                *held = _mm512_dpbf16_ps(*held, unit, as_pairs(line));
            }
        }
        a = a.wrapping_add(a_unit);
        b = b.wrapping_add(pitch);
    }
    *sums = held;
}

/// Rows, or columns, that go together: two vectors.
pub(super) const STRIP: usize = 32;

/// So many columns in whole lines of bf16.
pub(super) fn width(cols: usize) -> usize {
    cols.next_multiple_of(32)
}

/// `[rows, cols]` to bf16, each row in whole lines; lines past the last row stay as they are.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) fn pack_rows(values: &[f32], cols: usize, out: &mut [Line]) {
    for (values, out) in values.chunks(cols).zip(out.chunks_mut(width(cols) / 32)) {
        for (at, out) in out.iter_mut().enumerate() {
            out.store(row(piece(values, 2 * at), piece(values, 2 * at + 1)));
        }
    }
}

/// `[rows, cols]` to `[rows / 2, cols]` pairs of rows, each in whole lines and an even number of them. The
/// last of an odd number of rows has 0 beside it; lines past it stay as they are.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) fn pack_pairs(values: &[f32], cols: usize, out: &mut [Line]) {
    for (two, out) in values.chunks(2 * cols).zip(out.chunks_mut(width(cols) / 16)) {
        let (first, second) = two.split_at(cols);
        for (at, out) in out.iter_mut().enumerate() {
            out.store(pairs(piece(first, at), piece(second, at)));
        }
    }
}

/// `[rows, cols]` to `[rows / 32, cols / 2, 32]`: pairs of columns, a row a lane. `out` is zero before.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) fn pack_lanes(values: &[f32], cols: usize, out: &mut [Line]) {
    let strips = values.chunks(STRIP * cols).zip(out.chunks_exact_mut(width(cols)));
    for (values, strip) in strips {
        let strip: &mut [u32] = bytemuck::cast_slice_mut(strip);
        for (lane, values) in values.chunks(cols).enumerate() {
            for (at, units) in strip.chunks_exact_mut(16 * STRIP).enumerate() {
                let mut packed = Line::ZERO;
                packed.store(row(piece(values, 2 * at), piece(values, 2 * at + 1)));
                for (lanes, unit) in units.chunks_exact_mut(STRIP).zip(packed.0) {
                    lanes[lane] = unit;
                }
            }
        }
    }
}

/// `[rows, cols]` to `[cols / 32, rows / 2, 32]`: pairs of rows, a column a lane. The last of an odd
/// number of rows has 0 beside it.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) fn pack_panels(values: &[f32], cols: usize, out: &mut [Line]) {
    let units = (values.len() / cols).div_ceil(2);
    for (unit, two) in values.chunks(2 * cols).enumerate() {
        let (first, second) = two.split_at(cols);
        for (panel, out) in out.chunks_exact_mut(2 * units).enumerate() {
            for (half, out) in out[2 * unit..2 * unit + 2].iter_mut().enumerate() {
                let at = 2 * panel + half;
                out.store(pairs(piece(first, at), piece(second, at)));
            }
        }
    }
}

/// Sixteen vectors on their side: lane `i` of the vector `j` is what was lane `j` of the vector `i`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) fn turned(v: &[__m512; 16]) -> [__m512; 16] {
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
/// x = n + r with |r| <= 1/2; 2^r by the polynomial of degree 5 whose largest relative error is least.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) fn exp2(x: __m512) -> __m512 {
    // Of minus infinity the rest is 0, and n minus infinity again.
    let r = _mm512_reduce_ps::<0>(x);
    let n = _mm512_sub_ps(x, r);
    let mut p = _mm512_set1_ps(1.327_647_2e-3);
    for coefficient in [9.675_541e-3, 5.550_713e-2, 2.402_212e-1, 6.931_469_4e-1, 1.0] {
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(coefficient));
    }
    _mm512_scalef_ps(p, n)
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::super::found;
    use super::*;
    use crate::random::{Philox, Stream};

    /// In place.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn powers(values: &mut [f32]) {
        for values in values.chunks_mut(16) {
            let power = exp2(load(values));
            store(values, power);
        }
    }

    #[test]
    fn exp2_is_within_two_units_in_the_last_place() {
        if !found() {
            return eprintln!("SKIPPED: this processor has no AVX-512 with bfloat16");
        }
        let xs: Vec<f32> = (0..=2_000_000).map(|i| -126.0 + 253.0 * i as f32 / 2e6).collect();
        let mut ys = xs.clone();
        // SAFETY: found above.
        unsafe { powers(&mut ys) };
        for (x, y) in xs.iter().zip(&ys) {
            let exact = f64::from(*x).exp2();
            let error = (f64::from(*y) - exact).abs() / exact;
            assert!(error < 2.0 * f64::from(f32::EPSILON), "2^{x} = {y}");
        }
        let mut edges = [f32::NEG_INFINITY, -1e30, -151.0, 0.0, f32::NAN];
        // SAFETY: found above.
        unsafe { powers(&mut edges) };
        assert_eq!(edges[..4], [0.0, 0.0, 0.0, 1.0]);
        assert!(edges[4].is_nan());
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn product(a: &[f32], b: &[f32], inner: usize) -> Vec<f32> {
        let rows = a.len() / inner;
        let mut left = vec![Line::ZERO; rows * width(inner) / 32];
        let mut right = vec![Line::ZERO; width(inner)];
        pack_rows(a, inner, &mut left);
        pack_lanes(b, inner, &mut right);
        let (left, units): (&[u32], _) = (bytemuck::cast_slice(&left), width(inner) / 2);
        let mut out = Vec::new();
        for row in 0..rows {
            let mut sums = [[_mm512_setzero_ps(); 2]; 1];
            dot(&mut sums, (&left[row * units..], units, 1), (&right, 2), units);
            let mut line = Line::ZERO;
            for sum in sums[0] {
                line.store(sum);
                out.extend(line.floats());
            }
        }
        out
    }

    /// Operands are rounded to nearest, ties to even; sums are f32 in the order of the components.
    #[test]
    fn products_round_what_they_multiply() {
        if !found() {
            return eprintln!("SKIPPED: this processor has no AVX-512 with bfloat16");
        }
        for inner in [1, 2, 31, 64, 77] {
            let (rows, mut a, mut b) = (3, vec![0.0; 3 * inner], vec![0.0; STRIP * inner]);
            Philox::new(9, Stream::Test).fill_normal(0, 1.0, &mut a);
            Philox::new(9, Stream::Test).fill_normal(1, 1.0, &mut b);
            // A tie, to even; and what bf16 and its products take for 0.
            (a[0], a[inner]) = (1.0 + 3.0 / 256.0, 1e-40);
            // SAFETY: found above.
            let got = unsafe { product(&a, &b, inner) };
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
