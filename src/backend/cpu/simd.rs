//! f32 vectors as wide as the processor has them, through `pulp`, and the functions that hardware lacks.
//!
//! Keep SIMD code out of closures: a closure is compiled without the target features, and calls there cost
//! twenty times the work.

use std::ops::{Deref, DerefMut};

use pulp::{Arch, Simd};

/// The name of this processor's SIMD extension.
pub(super) fn name() -> &'static str {
    struct IsaName;
    impl pulp::WithSimd for IsaName {
        type Output = &'static str;
        fn with_simd<S: Simd>(self, _: S) -> &'static str {
            match S::F32_LANES {
                16 => "AVX-512",
                8 => "AVX2",
                4 => "NEON",
                _ => "scalar code",
            }
        }
    }
    Arch::new().dispatch(IsaName)
}

/// `n` floats rounded up to whole vectors of any processor.
pub(super) fn padded(n: usize) -> usize {
    n.next_multiple_of(16)
}

/// Floats that begin at a cache line: no vector of them lies in two.
pub(super) struct AlignedFloats {
    lines: Vec<CacheLine>,
}

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct CacheLine([f32; 16]);

impl AlignedFloats {
    /// Zeros, of which there are whole cache lines.
    pub fn zeroed(n: usize) -> Self {
        Self { lines: vec![bytemuck::Zeroable::zeroed(); n.div_ceil(16)] }
    }
}

impl Deref for AlignedFloats {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        bytemuck::cast_slice(&self.lines)
    }
}

impl DerefMut for AlignedFloats {
    fn deref_mut(&mut self) -> &mut [f32] {
        bytemuck::cast_slice_mut(&mut self.lines)
    }
}

/// e^x to within 2 units in the last place for x from -87 to 88; 0 below -87.7, e^88 above 88, and NaN for NaN.
///
/// x = n ln 2 + r with |r| <= ln 2 / 2; e^r by the polynomial of Cephes' `expf` (Moshier 1989),
/// 2^n by writing n into the exponent. Adding 1.5 * 2^23 + 127 rounds to an integer and leaves
/// n + 127 in the low bits at once.
#[inline(always)]
#[allow(clippy::excessive_precision)] // As published.
pub(super) fn exp<S: Simd>(s: S, x: S::f32s) -> S::f32s {
    const SHIFT: f32 = 12_582_912.0 + 127.0;
    let c = |value: f32| s.splat_f32s(value);
    let clamped = s.min_f32s(s.max_f32s(x, c(-88.0)), c(88.0));
    // Processors differ in what minimum and maximum make of NaN.
    let x = s.select_f32s(s.equal_f32s(x, x), clamped, x);
    let shifted = s.mul_add_f32s(x, c(std::f32::consts::LOG2_E), c(SHIFT));
    let n = s.sub_f32s(shifted, c(SHIFT));
    // ln 2 in two parts, the first exact in few bits.
    let r = s.mul_add_f32s(n, c(-0.693_359_375), x);
    let r = s.mul_add_f32s(n, c(2.121_944_40e-4), r);
    let mut p = c(1.987_569_150_0e-4);
    for coefficient in [
        1.398_199_950_7e-3,
        8.333_451_907_3e-3,
        4.166_579_589_4e-2,
        1.666_666_545_9e-1,
        5.000_000_120_1e-1,
    ] {
        p = s.mul_add_f32s(p, r, c(coefficient));
    }
    let p = s.add_f32s(s.mul_add_f32s(p, s.mul_f32s(r, r), r), c(1.0));
    let exponent = s.wrapping_dyn_shl_u32s(s.transmute_u32s_f32s(shifted), s.splat_u32s(23));
    s.mul_f32s(p, s.transmute_f32s_u32s(exponent))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct ExpInPlace<'a>(&'a mut [f32]);
    impl pulp::WithSimd for ExpInPlace<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, s: S) {
            for x in self.0.chunks_mut(S::F32_LANES) {
                let y = exp(s, s.partial_load_f32s(x));
                s.partial_store_f32s(x, y);
            }
        }
    }

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let xs: Vec<f32> =
            (0..=2_000_000).map(|i| (-87.0 + 175.0 * i as f32 / 2e6).min(88.0)).collect();
        let mut ys = xs.clone();
        Arch::new().dispatch(ExpInPlace(&mut ys));
        for (x, y) in xs.iter().zip(&ys) {
            let exact = f64::from(*x).exp();
            let error = (f64::from(*y) - exact).abs() / exact;
            assert!(error < 2.0 * f64::from(f32::EPSILON), "exp({x}) = {y}");
        }
        let mut edges = [f32::NEG_INFINITY, -1e30, -88.0, 0.0, f32::NAN];
        Arch::new().dispatch(ExpInPlace(&mut edges));
        assert_eq!(edges[..4], [0.0, 0.0, 0.0, 1.0]);
        assert!(edges[4].is_nan());
    }
}
