//! Stand-ins for the approximate functions of the hardware but `ex2`, which is in ex2.rs to the bit.
//!
//! The bits a GPU returns are not documented, only error bounds; these stay inside those bounds
//! and treat special values as the PTX ISA says.

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
