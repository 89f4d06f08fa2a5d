//! Stand-ins for the approximate functions of the hardware.
//!
//! The bits a GPU returns are not documented, only error bounds; these stay inside those bounds
//! and treat special values as the PTX ISA says. They are written in plain f32 arithmetic so that
//! a loop over the lanes vectorises and every host gives the same bits.

/// `ex2.approx.f32`: 2 to the x.
#[inline(always)]
pub(crate) fn exp2(x: f32) -> f32 {
    // Below -150 the result is 0 and above 128 infinite: clamping keeps the exponent trick in range.
    let clamped = x.clamp(-151.0, 129.0);
    // Adding 1.5 * 2^23 leaves the nearest whole number in the low bits.
    let shifted = clamped + 12_582_912.0;
    let whole = shifted - 12_582_912.0;
    let f = clamped - whole;
    // Taylor's series of 2^f on [-1/2, 1/2]; the first term left out is below 2^-26.
    let mut p = 1.525_273_4e-5;
    p = p * f + 1.540_353e-4;
    p = p * f + 1.333_355_8e-3;
    p = p * f + 9.618_129e-3;
    p = p * f + 5.550_411e-2;
    p = p * f + 2.402_265e-1;
    p = p * f + 6.931_472e-1;
    p = p * f + 1.0;
    // In two factors, so that neither overflows and denormal results round once.
    let n = shifted.to_bits() as i32 - 0x4B40_0000;
    let half = n >> 1;
    let scale = |n: i32| f32::from_bits(((n + 127) << 23) as u32);
    let result = p * scale(half) * scale(n - half);
    if x.is_nan() { crate::round::NAN_F32 } else { result }
}

/// `lg2.approx.f32`: the base-2 logarithm.
pub(crate) fn log2(x: f32) -> f32 {
    canonical(f64::from(x).log2() as f32)
}

pub(crate) fn tanh(x: f32) -> f32 {
    canonical(f64::from(x).tanh() as f32)
}

pub(crate) fn sin(x: f32) -> f32 {
    canonical(f64::from(x).sin() as f32)
}

pub(crate) fn cos(x: f32) -> f32 {
    canonical(f64::from(x).cos() as f32)
}

/// `rsqrt.approx.f32`.
#[inline(always)]
pub(crate) fn rsqrt(x: f32) -> f32 {
    canonical(1.0 / x.sqrt())
}

/// Every f32 operation returns the same NaN.
#[inline(always)]
pub(crate) fn canonical(x: f32) -> f32 {
    if x.is_nan() { crate::round::NAN_F32 } else { x }
}

/// `.ftz`: denormals count as zero of the same sign.
#[inline(always)]
pub(crate) fn flush(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { 0f32.copysign(x) } else { x }
}

/// `.sat`: into [0, 1], NaN to 0.
#[inline(always)]
pub(crate) fn saturate(x: f32) -> f32 {
    if x > 0.0 { if x > 1.0 { 1.0 } else { x } } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp2_is_within_two_units_in_the_last_place() {
        for i in -150_000..128_000 {
            let x = i as f32 * 1e-3;
            let (got, exact) = (exp2(x), f64::from(x).exp2());
            let unit = (exact * 0.5f64.powi(23)).max(f64::from(f32::from_bits(1)));
            assert!((f64::from(got) - exact).abs() <= 2.0 * unit, "2^{x}: {got:e} {exact:e}");
        }
        assert_eq!(exp2(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp2(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp2(0.0), 1.0);
        assert_eq!(exp2(10.0), 1024.0);
        assert!(exp2(f32::NAN).is_nan());
    }
}
