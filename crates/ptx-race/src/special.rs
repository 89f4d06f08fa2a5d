//! `rcp`, `rsqrt`, `sqrt`, `lg2`, `sin`, `cos` and `tanh` with `.approx.f32`, and the divisions made of
//! `rcp`, to the bit.
//!
//! `unit` has the instructions of Hopper, which take denormal numbers, arguments and results, as 0. The
//! tables were computed from results of an H200: all of two octaves for `rsqrt` and `sqrt`, all of one
//! for `rcp`, and 159,136 arguments over all exponents for each function. They give all of those bits.
//! One half of the arguments determines the tables for `sin`, `cos` and `tanh`, and that for `lg2` but
//! for two constants, and these tables give the other half too.
//!
//! Around them stands what ptxas 13.0 makes of each PTX instruction for sm_90: arguments are scaled
//! where they or the result would be denormal. The forms with `.ftz` have the same bits once their
//! arguments and results are flushed.

/// Factor of denormal arguments.
const UP: f32 = 16_777_216.0;

/// `rcp.approx.f32`.
#[inline(always)]
pub(crate) fn rcp(x: f32) -> f32 {
    let scale = scale_of_divisor(x);
    scale * unit::rcp(x * scale)
}

/// `div.approx.f32`: divisors beyond 2^126 give 0.
#[inline(always)]
pub(crate) fn div(a: f32, b: f32) -> f32 {
    let scale = if b.abs() < f32::MIN_POSITIVE { UP } else { 1.0 };
    a * scale * unit::rcp(b * scale)
}

/// `div.full.f32`.
#[inline(always)]
pub(crate) fn div_full(a: f32, b: f32) -> f32 {
    let scale = scale_of_divisor(b);
    a * scale * unit::rcp(b * scale)
}

fn scale_of_divisor(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE {
        UP
    } else if x.abs() > 2f32.powi(126) {
        0.25
    } else {
        1.0
    }
}

/// `rsqrt.approx.f32`.
#[inline(always)]
pub(crate) fn rsqrt(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { unit::rsqrt(x * UP) * 4096.0 } else { unit::rsqrt(x) }
}

/// `sqrt.approx.f32`.
#[inline(always)]
pub(crate) fn sqrt(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { unit::sqrt(x * UP) / 4096.0 } else { unit::sqrt(x) }
}

/// `lg2.approx.f32`: the base-2 logarithm.
#[inline(always)]
pub(crate) fn lg2(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { unit::lg2(x * UP) - 24.0 } else { unit::lg2(x) }
}

/// `sin.approx.f32`.
#[inline(always)]
pub(crate) fn sin(x: f32) -> f32 {
    unit::sine(x, 0, x.is_sign_negative())
}

/// `cos.approx.f32`.
#[inline(always)]
pub(crate) fn cos(x: f32) -> f32 {
    unit::sine(x, 1, false)
}

/// `tanh.approx.f32`.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    unit::tanh(x)
}

/// The instructions of the hardware.
mod unit {
    use crate::interpolator::{PLACE, interpolate};
    use crate::round::{NAN_F32, Round, to_f32};
    use crate::special_tables::{LOGARITHM, RECIPROCAL, RECIPROCAL_ROOT, ROOT, SINE, TANGENT};

    const SIGN: u32 = 1 << 31;
    const INFINITY: u32 = 0x7F80_0000;
    /// Bits of the smallest normal number, and a unit of the exponent.
    const NORMAL: u32 = 1 << 23;
    const FRACTION: u32 = NORMAL - 1;

    /// A place in a segment, with as many bits of the fraction as choose the segment.
    fn place(fraction: u32, segment_bits: u32) -> u32 {
        (fraction << segment_bits & FRACTION) >> (23 - PLACE)
    }

    /// The number of a mantissa of 24 bits, or of the power of two above, times 2^(exponent - 150).
    fn assemble(exponent: i32, mantissa: i64) -> u32 {
        let bits = (exponent << 23) + (mantissa as i32 - NORMAL as i32);
        if bits < NORMAL as i32 { 0 } else { bits as u32 }
    }

    /// `MUFU.RCP`.
    #[inline(always)]
    pub fn rcp(x: f32) -> f32 {
        let (sign, magnitude) = (x.to_bits() & SIGN, x.to_bits() & !SIGN);
        let fraction = magnitude & FRACTION;
        if x.is_nan() {
            return NAN_F32;
        }
        if magnitude < NORMAL {
            return f32::from_bits(sign | INFINITY);
        }
        let sum = interpolate(RECIPROCAL[(fraction >> 16) as usize], place(fraction, 7), 15) + 8092;
        f32::from_bits(sign | assemble(253 - (magnitude >> 23) as i32, sum >> 17))
    }

    /// Half of the exponent of a positive normal number, its fraction, and its segment in a table of two
    /// octaves.
    fn root_parts(x: f32) -> (i32, u32, usize) {
        let (exponent, fraction) = ((x.to_bits() >> 23) as i32 - 127, x.to_bits() & FRACTION);
        let segment = ((exponent & 1) as u32) << 6 | fraction >> 17;
        (exponent >> 1, fraction, segment as usize)
    }

    /// `MUFU.RSQ`.
    #[inline(always)]
    pub fn rsqrt(x: f32) -> f32 {
        if x.abs() < f32::MIN_POSITIVE {
            return f32::INFINITY.copysign(x);
        }
        if x.is_nan() || x < 0.0 {
            return NAN_F32;
        }
        if x == f32::INFINITY {
            return 0.0;
        }
        let (half, fraction, segment) = root_parts(x);
        // A power of four is exact.
        let mantissa = match (segment, fraction) {
            (0, 0) => 1 << 24,
            _ => (interpolate(RECIPROCAL_ROOT[segment], place(fraction, 6), 15) - 1) >> 17,
        };
        f32::from_bits(assemble(126 - half, mantissa))
    }

    /// `MUFU.SQRT`.
    #[inline(always)]
    pub fn sqrt(x: f32) -> f32 {
        if x.abs() < f32::MIN_POSITIVE {
            return 0f32.copysign(x);
        }
        if x.is_nan() || x < 0.0 {
            return NAN_F32;
        }
        if x == f32::INFINITY {
            return x;
        }
        let (half, fraction, segment) = root_parts(x);
        let sum = interpolate(ROOT[segment], place(fraction, 6), 15) - 1;
        f32::from_bits(assemble(127 + half, sum >> 17))
    }

    /// A positive fixed-point number as f32, without the bits that do not fit.
    fn normalized(magnitude: u64, fraction_bits: i32) -> f32 {
        let drop = 40 - magnitude.leading_zeros() as i32;
        let mantissa = if drop >= 0 { magnitude >> drop } else { magnitude << -drop };
        f32::from_bits(assemble(150 + drop - fraction_bits, mantissa as i64))
    }

    /// `MUFU.LG2`.
    #[inline(always)]
    pub fn lg2(x: f32) -> f32 {
        if x.abs() < f32::MIN_POSITIVE {
            return f32::NEG_INFINITY;
        }
        if x.is_nan() || x < 0.0 {
            return NAN_F32;
        }
        if x == f32::INFINITY || x == 1.0 {
            return if x == 1.0 { 0.0 } else { x };
        }
        let (exponent, fraction) = (i64::from(x.to_bits() >> 23) - 127, x.to_bits() & FRACTION);
        let segment = LOGARITHM[(fraction >> PLACE) as usize];
        let sum = interpolate(segment, place(fraction, 6), 12) + 836;
        // Of 36 fractional bits; the magnitude of a negative sum is its complement.
        let value = (exponent << 36) + (sum >> 2);
        if value < 0 { -normalized(!value as u64, 36) } else { normalized(value as u64, 36) }
    }

    /// `MUFU.SIN` of x / 2 pi turns and of some quarters more.
    #[inline(always)]
    pub fn sine(x: f32, quarters: u64, is_negative: bool) -> f32 {
        if !x.is_finite() {
            return NAN_F32;
        }
        // The product is exact in f64.
        let turns = f64::from(x.abs()) * f64::from(0.159_154_94_f32);
        let turns = f64::from(to_f32(turns, Round::Zero));
        // Of 25 fractional bits; numbers from 2^24 on have none.
        let fixed = if turns < 16_777_216.0 { (turns * 33_554_432.0) as u64 } else { 0 };
        let quarter = (fixed >> 23) + quarters;
        let sign = (u32::from(is_negative) << 31) ^ ((quarter as u32 & 2) << 30);
        let is_falling = quarter & 1 != 0;
        let fraction = fixed as u32 & FRACTION;
        let magnitude = if fraction == 0 {
            if is_falling { 1.0 } else { 0.0 }
        } else {
            let fraction = if is_falling { !fraction & FRACTION } else { fraction };
            let segment = SINE[(fraction >> PLACE) as usize];
            normalized(interpolate(segment, place(fraction, 6), 12) as u64, 38)
        };
        f32::from_bits(sign | magnitude.to_bits())
    }

    /// Of each octave from 2^-8 on: bits of the fraction that choose a segment, and the first segment.
    const OCTAVES: [(u32, u32); 11] = [
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 3),
        (1, 5),
        (2, 7),
        (2, 11),
        (2, 15),
        (3, 19),
        (4, 27),
        (3, 43),
    ];

    /// `MUFU.TANH`: x itself below 2^-8, and 1 from 8 on.
    #[inline(always)]
    pub fn tanh(x: f32) -> f32 {
        if x.is_nan() {
            return NAN_F32;
        }
        if x.abs() < 2f32.powi(-8) {
            return x;
        }
        if x.abs() >= 8.0 {
            return 1f32.copysign(x);
        }
        let (magnitude, fraction) = (x.to_bits() & !SIGN, x.to_bits() & FRACTION);
        let octave = (magnitude >> 23) as i32 - 119;
        let (bits, first) = OCTAVES[octave as usize];
        let segment = TANGENT[(first + (fraction >> (23 - bits))) as usize];
        let sum = interpolate(segment, place(fraction, bits), 15);
        normalized(sum as u64, 41 + (8 - octave).max(0)).copysign(x)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// FNV-1a over the bits of a function for all numbers from 1 to below `end`.
    fn hash(f: fn(f32) -> f32, end: f32) -> u64 {
        (1f32.to_bits()..end.to_bits()).fold(0xCBF2_9CE4_8422_2325, |hash: u64, bits| {
            (hash ^ u64::from(f(f32::from_bits(bits)).to_bits())).wrapping_mul(0x100_0000_01B3)
        })
    }

    #[test]
    fn reciprocals_and_roots_have_the_bits_of_an_h200_in_all_of_their_octaves() {
        assert_eq!(hash(rcp, 2.0), 0xFA72_A6C6_9827_4964);
        assert_eq!(hash(rsqrt, 4.0), 0xBDF1_CB38_6EE7_8BC2);
        assert_eq!(hash(sqrt, 4.0), 0x5071_2C00_1BD4_EB00);
    }

    #[test]
    fn special_functions_have_the_bits_of_an_h200_at_every_exponent() {
        // Argument and result, as the GPU wrote them; ftz.
        type Case = (&'static str, fn(f32) -> f32, &'static [u8]);
        let cases: [Case; 7] = [
            ("rcp", rcp, include_bytes!("../tests/fixtures/h200_rcp.bin")),
            ("rsqrt", rsqrt, include_bytes!("../tests/fixtures/h200_rsqrt.bin")),
            ("sqrt", sqrt, include_bytes!("../tests/fixtures/h200_sqrt.bin")),
            ("lg2", lg2, include_bytes!("../tests/fixtures/h200_lg2.bin")),
            ("sin", sin, include_bytes!("../tests/fixtures/h200_sin.bin")),
            ("cos", cos, include_bytes!("../tests/fixtures/h200_cos.bin")),
            ("tanh", tanh, include_bytes!("../tests/fixtures/h200_tanh.bin")),
        ];
        for (name, f, rows) in cases {
            let words: Vec<_> =
                rows.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect();
            assert!(words.len() > 2000, "{name}");
            for pair in words.chunks_exact(2) {
                let (x, on_gpu) = (f32::from_bits(pair[0]), f32::from_bits(pair[1]));
                // tanh has no form with .ftz.
                let got = match name {
                    "tanh" => tanh(x),
                    _ => crate::math::flush(f(crate::math::flush(x))),
                };
                let same = crate::math::canonical(got).to_bits() == pair[1];
                assert!(same, "{name} {x:e}: {got:e}, and {on_gpu:e} on the GPU");
            }
        }
    }

    #[test]
    fn denormal_arguments_and_results_are_scaled() {
        let tiny = f32::from_bits(3 << 20);
        assert_eq!(rcp(2f32.powi(127)), 2f32.powi(-127));
        assert_eq!(rcp(2f32.powi(-127)), 2f32.powi(127));
        assert_eq!(rsqrt(2f32.powi(-128)), 2f32.powi(64));
        assert_eq!(sqrt(2f32.powi(-128)), 2f32.powi(-64));
        assert!((lg2(tiny) - tiny.log2()).abs() < 1e-4);
        assert_eq!(div(tiny, tiny), 1.0);
        assert_eq!(
            (div(1.0, 2f32.powi(127)), div_full(1.0, 2f32.powi(127))),
            (0.0, 2f32.powi(-127))
        );
    }
}
