//! What a tensor core computes, to the bit.
//!
//! The products of a k-group and the accumulator are aligned to the largest exponent among them
//! and truncated to a fixed number of bits, summed exactly, and rounded once: toward zero to f32,
//! to nearest even to f16. A product's exponent is the sum of its factors' exponents, before any
//! normalisation. Groups follow one another, the accumulator going through. Subnormals count as
//! they are; zeros take no part in the alignment. NaN and infinity follow IEEE 754, with the
//! canonical NaN; what overflows is infinite.
//!
//! Sources: M. Fasi, N. Higham, M. Mikaitis, S. Pranesh, "Numerical behavior of NVIDIA tensor
//! cores" (2021); F. A. Khattak, M. Mikaitis, "Accurate models of NVIDIA tensor cores" (2025);
//! P. Xie et al., "MMA-Sim: bit-accurate reference model of tensor cores and matrix cores" (2025).
//! That a tf32 operand is truncated, not rounded, to its upper 19 bits is an assumption: one mma
//! of a = 1 + 2^-11 + 2^-12 and b = 1 on a GPU decides it (1 if truncated, 1 + 2^-10 if rounded).

use crate::config::Arch;
use crate::math::canonical;
use crate::op::MmaType;
use crate::round::{Round, to_f16};

pub(crate) const M: usize = 16;
pub(crate) const N: usize = 8;
pub(crate) const MAX_K: usize = 16;

/// Fraction bits of a factor's significand in any of the types.
const FACTOR_BITS: u32 = 10;
/// Exponent of a zero: below every product of numbers.
const ZERO: i32 = -1024;
/// Exponent of an infinity (significand 1 or -1) and of NaN (significand 0).
const SPECIAL: i32 = 1024;

/// The arithmetic of one architecture.
#[derive(Clone, Copy)]
struct TensorCore {
    /// Products summed at once, of 16-bit types; of tf32 half as many.
    group: usize,
    /// Fraction bits kept below the largest exponent.
    fraction_bits: u32,
    /// How far below the smallest normal exponent of the output the alignment may go.
    headroom: i32,
}

impl TensorCore {
    fn of(arch: Arch) -> TensorCore {
        match arch {
            Arch::A100 => TensorCore { group: 8, fraction_bits: 24, headroom: 6 },
            Arch::H100 => TensorCore { group: 16, fraction_bits: 25, headroom: 7 },
        }
    }
}

/// A factor of an mma: signed significands and exponents, by row and column.
pub(crate) struct Factor<const R: usize, const C: usize> {
    significands: [[i32; C]; R],
    exponents: [[i32; C]; R],
    finite: bool,
}

impl<const R: usize, const C: usize> Factor<R, C> {
    /// A matrix of zeros.
    pub fn new() -> Factor<R, C> {
        Factor { significands: [[0; C]; R], exponents: [[ZERO; C]; R], finite: true }
    }

    /// Sets an element from its bits in a type; of tf32 the upper 19 count.
    #[inline(always)]
    pub fn set(&mut self, row: usize, column: usize, ty: MmaType, bits: u32) {
        let (exponent_bits, fraction_bits, bits) = match ty {
            MmaType::F16 => (5, 10, bits),
            MmaType::Bf16 => (8, 7, bits),
            MmaType::Tf32 => (8, 10, bits >> 13),
        };
        let most = (1u32 << exponent_bits) - 1;
        let field = bits >> fraction_bits & most;
        let fraction = (bits & ((1 << fraction_bits) - 1)) << (FACTOR_BITS - fraction_bits);
        let hidden = u32::from(field != 0) << FACTOR_BITS;
        let negative = bits >> (fraction_bits + exponent_bits) & 1 == 1;
        let mut significand = (hidden | fraction) as i32;
        let mut exponent = field.max(1) as i32 - (most / 2) as i32;
        if significand == 0 {
            exponent = ZERO;
        }
        if field == most {
            (significand, exponent) = (i32::from(fraction == 0), SPECIAL);
            self.finite = false;
        }
        self.significands[row][column] = if negative { -significand } else { significand };
        self.exponents[row][column] = exponent;
    }

    /// An element as far as infinities and NaN go: a finite one only keeps its sign.
    fn class(&self, row: usize, column: usize) -> f64 {
        let significand = self.significands[row][column];
        match (self.exponents[row][column], significand) {
            (SPECIAL, 0) => f64::NAN,
            (SPECIAL, sign) => f64::INFINITY * f64::from(sign),
            _ => f64::from(significand.signum()),
        }
    }
}

/// Rounds toward zero to f32; what is too large becomes infinite.
#[inline(always)]
fn truncate(x: f64) -> f32 {
    if x.abs() < f64::from(f32::MIN_POSITIVE) {
        let units = (x.abs() * 2f64.powi(149)) as u32;
        return f32::from_bits(units).copysign(x as f32);
    }
    // What is left after clearing the bits below f32's last one converts exactly.
    f64::from_bits(x.to_bits() & !0x1FFF_FFFF) as f32
}

/// One k-group: `group` products for each element of a row of C.
#[inline(always)]
fn add_products(
    core: TensorCore,
    (a, a_exponents): (&[i32], &[i32]),
    (b, b_exponents): (&[[i32; N]], &[[i32; N]]),
    c: [f32; N],
    half: bool,
) -> [f32; N] {
    let least = if half { -14 } else { -126 };
    let (mut c_significand, mut c_exponent) = ([0u32; N], [0i32; N]);
    for j in 0..N {
        let bits = c[j].to_bits();
        let field = (bits >> 23 & 0xFF) as i32;
        let significand = bits & 0x7F_FFFF | u32::from(field != 0) << 23;
        // An f16 below its normal range is not normalised.
        let exponent = (field.max(1) - 127).max(least);
        let shift = exponent - (field.max(1) - 127);
        c_significand[j] = significand >> shift.min(31);
        c_exponent[j] = if significand == 0 { ZERO } else { exponent };
    }
    let mut top = c_exponent.map(|exponent| exponent.max(least - core.headroom));
    for (&a_exponent, b_exponents) in a_exponents.iter().zip(b_exponents) {
        for j in 0..N {
            top[j] = top[j].max(a_exponent + b_exponents[j]);
        }
    }
    // Eight products of 27 bits fit an i32.
    let mut sums = [[0i32; N]; 2];
    for (k, (&a, b)) in a.iter().zip(b).enumerate() {
        let b_exponents = &b_exponents[k];
        let sum = &mut sums[k / 8];
        for j in 0..N {
            let product = a * b[j];
            let shift = (top[j] - a_exponents[k] - b_exponents[j]).min(31) as u32;
            let aligned = product.unsigned_abs() << (core.fraction_bits - 2 * FACTOR_BITS) >> shift;
            let sign = product >> 31;
            sum[j] += (aligned as i32 ^ sign) - sign;
        }
    }
    let mut out = [0f32; N];
    for j in 0..N {
        let shift = (top[j] - c_exponent[j]).min(31) as u32;
        let aligned = (c_significand[j] << (core.fraction_bits - 23) >> shift) as i32;
        let sign = c[j].to_bits() as i32 >> 31;
        let sum =
            f64::from((aligned ^ sign) - sign) + f64::from(sums[0][j]) + f64::from(sums[1][j]);
        let unit = f64::from_bits(((top[j] - core.fraction_bits as i32 + 1023) as u64) << 52);
        out[j] =
            if half { to_f16(sum * unit, Round::Nearest).to_f32() } else { truncate(sum * unit) };
    }
    out
}

#[inline(always)]
fn multiply_rows(
    core: TensorCore,
    group: usize,
    (a, b): (&Factor<M, MAX_K>, &Factor<MAX_K, N>),
    c: &mut [[f32; N]; M],
    k: usize,
    half: bool,
) {
    for start in (0..k).step_by(group) {
        let range = start..k.min(start + group);
        for (row, c) in c.iter_mut().enumerate() {
            let finite = a.finite && b.finite && c.iter().all(|c| c.is_finite());
            let a_row = (&a.significands[row][range.clone()], &a.exponents[row][range.clone()]);
            let b_rows = (&b.significands[range.clone()], &b.exponents[range.clone()]);
            let out = add_products(core, a_row, b_rows, *c, half);
            for (j, (c, out)) in c.iter_mut().zip(out).enumerate() {
                let class = if finite {
                    0.0
                } else {
                    let products = range.clone().map(|k| a.class(row, k) * b.class(k, j));
                    products.sum::<f64>() + f64::from(*c)
                };
                *c = if class.is_finite() { out } else { canonical(class as f32) };
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn multiply_avx2(
    core: TensorCore,
    group: usize,
    factors: (&Factor<M, MAX_K>, &Factor<MAX_K, N>),
    c: &mut [[f32; N]; M],
    k: usize,
    half: bool,
) {
    multiply_rows(core, group, factors, c, k, half);
}

/// c = a b + c as the tensor cores of an architecture compute it. With `half`, c holds f16
/// numbers and is rounded to f16; NaN comes out canonical.
pub(crate) fn multiply(
    arch: Arch,
    ty: MmaType,
    factors: (&Factor<M, MAX_K>, &Factor<MAX_K, N>),
    c: &mut [[f32; N]; M],
    k: usize,
    half: bool,
) {
    let core = TensorCore::of(arch);
    let group = if ty == MmaType::Tf32 { core.group / 2 } else { core.group };
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2, the one feature the function is compiled with.
        return unsafe { multiply_avx2(core, group, factors, c, k, half) };
    }
    multiply_rows(core, group, factors, c, k, half);
}
