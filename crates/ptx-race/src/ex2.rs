//! `ex2.approx.f32`, to the bit: the table and the arithmetic of Hopper (see interpolator.rs).
//!
//! The argument becomes a fixed-point number of 23 fractional bits. The upper six of them choose a
//! segment and the rest is the place in it. The coefficients and the constant were computed from the
//! results of an H200 for all 2^23 fractions; they give all of those, and 159,136 others over all exponents.

use crate::interpolator::{PLACE, square};

/// The coefficients of 2^f in each segment: the constant in units of 2^-26, the slope of 2^-21 and the
/// square's of 2^-23, over a segment.
#[rustfmt::skip]
const SEGMENTS: [(u32, u16, u16); 64] = [
    (7, 22713, 494), (730773, 22960, 501), (1469501, 23210, 506), (2216267, 23463, 511),
    (2971173, 23718, 518), (3734291, 23977, 521), (4505721, 24238, 527), (5285555, 24502, 532),
    (6073881, 24768, 541), (6870787, 25038, 546), (7676369, 25311, 551), (8490731, 25586, 559),
    (9313955, 25865, 564), (10146145, 26147, 568), (10987399, 26431, 577), (11837811, 26719, 583),
    (12697483, 27010, 589), (13566517, 27304, 596), (14445011, 27602, 600), (15333077, 27902, 609),
    (16230809, 28206, 615), (17138321, 28513, 622), (18055709, 28824, 627), (18983091, 29138, 633),
    (19920571, 29455, 641), (20868259, 29776, 647), (21826267, 30100, 655), (22794709, 30428, 661),
    (23773693, 30759, 670), (24763339, 31094, 677), (25763765, 31432, 686), (26775079, 31775, 691),
    (27797407, 32121, 699), (28830871, 32471, 705), (29875587, 32824, 715), (30931675, 33182, 721),
    (31999267, 33543, 730), (33078485, 33908, 739), (34169455, 34277, 748), (35272301, 34651, 753),
    (36387159, 35028, 763), (37514157, 35409, 773), (38653429, 35795, 779), (39805103, 36185, 787),
    (40969319, 36579, 796), (42146213, 36977, 806), (43335923, 37380, 813), (44538587, 37787, 822),
    (45754351, 38198, 833), (46983349, 38614, 842), (48225731, 39035, 849), (49481645, 39460, 858),
    (50751233, 39889, 870), (52034645, 40324, 877), (53332031, 40763, 887), (54643547, 41207, 896),
    (55969345, 41655, 909), (57309577, 42109, 917), (58664405, 42568, 925), (60033985, 43031, 938),
    (61418481, 43500, 946), (62818053, 43973, 959), (64232863, 44452, 969), (65663081, 44936, 980),
];

/// Added before the last bits are dropped, in units of 2^-38: rounds, and makes up for the columns that
/// the squarer leaves out.
const ROUNDING: u64 = 2018;

/// 2 to the x.
#[inline(always)]
pub(crate) fn ex2(x: f32) -> f32 {
    // What the assembler adds for results that are denormal. With .ftz they are flushed either way.
    let is_small = x < -126.0;
    let y = unit(if is_small { 0.5 * x } else { x });
    if is_small { y * y } else { y }
}

/// `MUFU.EX2`: results below the normal numbers are 0.
#[inline(always)]
fn unit(x: f32) -> f32 {
    // Beyond 128 all results are 0 or infinite. The conversion drops bits below 2^-23.
    let magnitude = (x.abs().min(200.0) * 8_388_608.0) as i32;
    let is_whole = magnitude.trailing_zeros() >= 23;
    // The complement of a magnitude that has a fraction: one unit less than its negative.
    let fixed = match x.is_sign_negative() {
        true if is_whole => -magnitude,
        true => !magnitude,
        false => magnitude,
    };
    let (exponent, fraction) = ((fixed >> 23) + 127, fixed as u32 & 0x7F_FFFF);
    let place = fraction & ((1 << PLACE) - 1);
    let (constant, slope, curve) = SEGMENTS[(fraction >> PLACE) as usize];
    let sum = (u64::from(constant) << 12)
        + u64::from(slope) * u64::from(place)
        + u64::from(curve) * u64::from(square(place))
        + ROUNDING;
    let mantissa = (sum >> 15) as u32;
    if x.is_nan() {
        crate::round::NAN_F32
    } else if exponent <= 0 {
        0.0
    } else if exponent >= 255 {
        f32::INFINITY
    } else {
        f32::from_bits((exponent as u32) << 23 | mantissa)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ex2_is_within_two_units_in_the_last_place() {
        for i in -126_000..128_000 {
            let x = i as f32 * 1e-3;
            let (got, exact) = (ex2(x), f64::from(x).exp2());
            let unit = (exact * 0.5f64.powi(23)).max(f64::from(f32::from_bits(1)));
            assert!((f64::from(got) - exact).abs() <= 2.0 * unit, "2^{x}: {got:e} {exact:e}");
        }
        assert_eq!(ex2(f32::INFINITY), f32::INFINITY);
        assert_eq!(ex2(f32::NEG_INFINITY), 0.0);
        assert_eq!(ex2(0.0), 1.0);
        assert_eq!(ex2(10.0), 1024.0);
        assert!(ex2(f32::NAN).is_nan());
    }

    #[test]
    fn ex2_has_the_bits_of_an_h200_in_all_of_an_octave() {
        // FNV-1a over the mantissas of 2^x for all x in [1, 2).
        let mut hash = 0xCBF2_9CE4_8422_2325u64;
        for bits in 0x3F80_0000..0x4000_0000 {
            let mantissa = ex2(f32::from_bits(bits)).to_bits() & 0x7F_FFFF;
            hash = (hash ^ u64::from(mantissa)).wrapping_mul(0x100_0000_01B3);
        }
        assert_eq!(hash, 0xA139_8DBD_F2FA_7EDB);
    }

    #[test]
    fn ex2_has_the_bits_of_an_h200_at_every_exponent() {
        // Argument and result, as the GPU wrote them; ftz.
        let words = include_bytes!("../tests/fixtures/h200_ex2.bin");
        let mut pairs = words.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap()));
        let mut count = 0;
        while let (Some(x), Some(y)) = (pairs.next(), pairs.next()) {
            let (x, got) = (f32::from_bits(x), crate::math::flush(ex2(f32::from_bits(x))));
            assert_eq!(
                got.to_bits(),
                y,
                "2^{x:e}: {got:e}, and {:e} on the GPU",
                f32::from_bits(y)
            );
            count += 1;
        }
        assert!(count > 5000);
    }

    #[test]
    fn results_below_the_normal_numbers_are_squares() {
        assert_eq!(ex2(-149.0), f32::from_bits(1));
        assert_eq!(ex2(-151.0), 0.0);
        let y = ex2(-64.1);
        assert_eq!(ex2(-128.2), y * y);
    }
}
