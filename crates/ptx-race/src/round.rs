//! Correct rounding to the narrower formats in every mode PTX names.

use half::{bf16, f16};

/// A rounding mode, by its PTX modifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Round {
    /// `.rn`: to nearest, ties to even.
    Nearest,
    /// `.rna`: to nearest, ties away from zero.
    NearestAway,
    /// `.rz`
    Zero,
    /// `.rm`
    Down,
    /// `.rp`
    Up,
}

impl Round {
    /// Reads `rn`, `rz`, ... and the integer roundings `rni`, `rzi`, ...
    pub fn of(modifier: &str) -> Option<Round> {
        Some(match modifier {
            "rn" | "rni" => Round::Nearest,
            "rna" => Round::NearestAway,
            "rz" | "rzi" => Round::Zero,
            "rm" | "rmi" => Round::Down,
            "rp" | "rpi" => Round::Up,
            _ => return None,
        })
    }

    /// Rounds to a whole number.
    pub fn integral(self, x: f64) -> f64 {
        match self {
            Round::Nearest => x.round_ties_even(),
            Round::NearestAway => x.round(),
            Round::Zero => x.trunc(),
            Round::Down => x.floor(),
            Round::Up => x.ceil(),
        }
    }
}

/// A binary format: digits of its significand (the hidden one counted) and its exponents.
#[derive(Clone, Copy)]
pub(crate) struct Format {
    pub digits: i32,
    pub min_exponent: i32,
    pub max_exponent: i32,
}

pub(crate) const F16: Format = Format { digits: 11, min_exponent: -14, max_exponent: 15 };
pub(crate) const BF16: Format = Format { digits: 8, min_exponent: -126, max_exponent: 127 };
pub(crate) const TF32: Format = Format { digits: 11, min_exponent: -126, max_exponent: 127 };
pub(crate) const F32: Format = Format { digits: 24, min_exponent: -126, max_exponent: 127 };

/// 2 to a power within f64's normal range.
fn power_of_two(exponent: i32) -> f64 {
    f64::from_bits(((exponent + 1023) as u64) << 52)
}

/// Rounds to a format; the result is an f64 that the format represents.
pub(crate) fn round(x: f64, format: Format, mode: Round) -> f64 {
    if x == 0.0 || !x.is_finite() {
        return x;
    }
    let exponent = ((x.to_bits() >> 52 & 0x7FF) as i32 - 1023).max(format.min_exponent);
    let quantum = power_of_two(exponent - (format.digits - 1));
    let rounded = mode.integral(x / quantum) * quantum;
    let limit = power_of_two(format.max_exponent) * 2.0;
    if rounded.abs() < limit {
        return rounded.copysign(x);
    }
    let away = match mode {
        Round::Nearest | Round::NearestAway => true,
        Round::Zero => false,
        Round::Down => x < 0.0,
        Round::Up => x > 0.0,
    };
    let largest = limit - power_of_two(format.max_exponent - (format.digits - 1));
    if away { f64::INFINITY.copysign(x) } else { largest.copysign(x) }
}

/// The sum of two f64 and what rounding it lost.
pub(crate) fn two_sum(a: f64, b: f64) -> (f64, f64) {
    let sum = a + b;
    let b_part = sum - a;
    (sum, (a - (sum - b_part)) + (b - b_part))
}

/// Folds a lost tail into the last bit (rounding to odd), so that rounding the result once more
/// to a narrower format is exact.
pub(crate) fn odd((head, tail): (f64, f64)) -> f64 {
    if tail == 0.0 || !head.is_finite() || !tail.is_finite() || head.to_bits() & 1 == 1 {
        return head;
    }
    if head == 0.0 {
        return tail;
    }
    let toward = if (tail > 0.0) == (head > 0.0) { 1 } else { u64::MAX };
    f64::from_bits(head.to_bits().wrapping_add(toward))
}

pub(crate) const NAN_F32: f32 = f32::from_bits(0x7FFF_FFFF);
pub(crate) const NAN_F16: u16 = 0x7FFF;

pub(crate) fn to_f32(x: f64, mode: Round) -> f32 {
    if x.is_nan() { NAN_F32 } else { round(x, F32, mode) as f32 }
}

pub(crate) fn to_f16(x: f64, mode: Round) -> f16 {
    if x.is_nan() { f16::from_bits(NAN_F16) } else { f16::from_f64(round(x, F16, mode)) }
}

pub(crate) fn to_bf16(x: f64, mode: Round) -> bf16 {
    if x.is_nan() { bf16::from_bits(NAN_F16) } else { bf16::from_f64(round(x, BF16, mode)) }
}

pub(crate) fn to_tf32(x: f32, mode: Round) -> f32 {
    if x.is_nan() { NAN_F32 } else { round(f64::from(x), TF32, mode) as f32 }
}

/// f32 to bf16, to nearest even, in a form that vectorizes.
#[inline(always)]
pub(crate) fn bf16_nearest(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16;
    if x.is_nan() { NAN_F16 } else { rounded as u16 }
}

#[inline(always)]
pub(crate) fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f32_rounding_agrees_with_the_hardware_cast() {
        let mut state = 1u64;
        for _ in 0..100_000 {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            // Exponents around and beyond f32's range, denormals included.
            let exponent = 1023 - 160 + (state >> 33) % 300;
            let x = f64::from_bits(state & 0x800F_FFFF_FFFF_FFFF | exponent << 52);
            assert_eq!(to_f32(x, Round::Nearest).to_bits(), (x as f32).to_bits(), "{x:e}");
            let (down, up) = (to_f32(x, Round::Down), to_f32(x, Round::Up));
            assert!(f64::from(down) <= x && x <= f64::from(up), "{x:e}: {down:e} {up:e}");
        }
    }

    #[test]
    fn bf16_nearest_agrees_with_exact_rounding() {
        for bits in (0..=u32::MAX).step_by(65_521) {
            let x = f32::from_bits(bits);
            let exact = to_bf16(f64::from(x), Round::Nearest).to_bits();
            assert_eq!(bf16_nearest(x), exact, "{x:e}");
        }
    }

    #[test]
    fn ties_follow_the_mode() {
        let tie = 1.0 + 0.5f64.powi(11);
        assert_eq!(to_f16(tie, Round::Nearest).to_f64(), 1.0);
        assert_eq!(to_f16(tie, Round::NearestAway).to_f64(), 1.0 + 0.5f64.powi(10));
        assert_eq!(to_f16(-tie, Round::Up).to_f64(), -1.0);
        assert_eq!(to_f16(1e6, Round::Zero).to_f64(), 65504.0);
        assert!(to_f16(1e6, Round::Nearest).is_infinite());
    }
}
