//! The arithmetic that the functions of the special function unit of Hopper share.
//!
//! A table has a quadratic polynomial per segment of the argument; the place in the segment is a number
//! of 17 bits. This is the method of S. F. Oberman and M. Y. Siu, "A High-Performance Area-Efficient
//! Multifunction Interpolator" (ARITH 2005). Which columns the squarer leaves out was computed from the
//! results of an H200; it is the same in all functions.

/// Bits of the place in a segment.
pub(crate) const PLACE: u32 = 17;

/// Coefficients of a segment: the constant, the slope and the square's, in the units of its table.
pub(crate) type Segment = (u32, i32, i32);

/// The polynomial of a segment. A unit of the constant is 2^`shift` units of the sum, one of the slope
/// is 2^17, over a segment, and one of the square's is 2^16.
#[inline(always)]
pub(crate) fn interpolate(segment: Segment, place: u32, shift: u32) -> i64 {
    let (constant, slope, curve) = segment;
    (i64::from(constant) << shift)
        + i64::from(slope) * i64::from(place)
        + 2 * i64::from(curve) * i64::from(square(place))
}

/// The square of a place in units of 2^-15, without the partial products below that.
#[inline(always)]
pub(crate) fn square(place: u32) -> u32 {
    let mut sum = 0;
    for bit in 0..PLACE {
        let is_set = place >> bit & 1;
        // Its products with the bits above it, each of which stands for two.
        let others =
            if bit < 9 { place >> (18 - bit) } else { (place >> (bit + 1)) << (2 * bit - 17) };
        let own = if bit < 10 { 0 } else { 1 << (2 * bit - 19) };
        sum += is_set * (others + own);
    }
    sum
}
