//! What a tensor core computes, to the bit.
//!
//! The products of a k-group and the accumulator are aligned to the largest exponent among them
//! and truncated to a fixed number of bits, summed exactly, and rounded once: toward zero to f32,
//! to nearest even to f16. A product's exponent is the sum of its factors' exponents, before any
//! normalization. Groups follow one another, the accumulator going through. Subnormals count as
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

/// Bits of a factor of an mma, by row and column, each in the low bits of a word.
pub(crate) type Bits<const R: usize, const C: usize> = [[u32; C]; R];

/// A factor taken apart: signed significands and exponents.
struct Factor<const R: usize, const C: usize> {
    significands: [[i32; C]; R],
    exponents: [[i32; C]; R],
    finite: bool,
}

// Integer arithmetic wraps here though it never overflows: checks would keep the loops from being
// vectorized. Closures would be compiled without the caller's instruction set.
impl<const R: usize, const C: usize> Factor<R, C> {
    #[inline(always)]
    fn of(bits: &Bits<R, C>, ty: MmaType) -> Factor<R, C> {
        // Of tf32 the upper 19 bits count.
        let (unused, exponent_bits, fraction_bits) = match ty {
            MmaType::F16 => (0, 5, 10),
            MmaType::Bf16 => (0, 8, 7),
            MmaType::Tf32 => (13, 8, 10),
        };
        let most = (1u32 << exponent_bits) - 1;
        let bias = (most / 2) as i32;
        let mut factor = Factor { significands: [[0; C]; R], exponents: [[0; C]; R], finite: true };
        let mut special = 0;
        for row in 0..R {
            for column in 0..C {
                let bits = bits[row][column].wrapping_shr(unused);
                let field = bits.wrapping_shr(fraction_bits) & most;
                let fraction =
                    (bits & ((1 << fraction_bits) - 1)).wrapping_shl(FACTOR_BITS - fraction_bits);
                let hidden = u32::from(field != 0) << FACTOR_BITS;
                let sign = 0i32
                    .wrapping_sub((bits.wrapping_shr(fraction_bits + exponent_bits) & 1) as i32);
                let infinite = u32::from(fraction == 0);
                let is_special = field == most;
                special |= u32::from(is_special);
                let significand = if is_special { infinite } else { hidden | fraction } as i32;
                let exponent = (field.max(1) as i32).wrapping_sub(bias);
                let exponent = if significand == 0 { ZERO } else { exponent };
                factor.significands[row][column] = (significand ^ sign).wrapping_sub(sign);
                factor.exponents[row][column] = if is_special { SPECIAL } else { exponent };
            }
        }
        factor.finite = special == 0;
        factor
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

/// Rounds a number below f32's normal range toward zero.
fn truncate_subnormal(x: f64) -> f32 {
    let units = (x.abs() * 2f64.powi(149)) as u32;
    f32::from_bits(units).copysign(x as f32)
}

/// One k-group of a row of C: the products of columns `from` to `to` of A.
#[inline(always)]
fn add_products(
    core: TensorCore,
    (a, a_exponents): (&[i32; MAX_K], &[i32; MAX_K]),
    (b, b_exponents): (&[[i32; N]; MAX_K], &[[i32; N]; MAX_K]),
    (from, to): (usize, usize),
    c: [f32; N],
    half: bool,
) -> [f32; N] {
    let least = if half { -14 } else { -126 };
    let floor = least - core.headroom;
    let (mut c_significand, mut c_exponent, mut top) = ([0u32; N], [0i32; N], [0i32; N]);
    for j in 0..N {
        let bits = c[j].to_bits();
        let field = (bits >> 23 & 0xFF) as i32;
        let significand = bits & 0x7F_FFFF | u32::from(field != 0) << 23;
        let own = field.max(1).wrapping_sub(127);
        // An f16 below its normal range is not normalized.
        let exponent = own.max(least);
        c_significand[j] = significand.wrapping_shr(exponent.wrapping_sub(own).min(31) as u32);
        c_exponent[j] = if significand == 0 { ZERO } else { exponent };
        top[j] = c_exponent[j].max(floor);
    }
    for k in from..to {
        for j in 0..N {
            top[j] = top[j].max(a_exponents[k].wrapping_add(b_exponents[k][j]));
        }
    }
    // Eight products of 27 bits fit an i32.
    let mut sums = [[0i32; N]; 2];
    for k in from..to {
        let sum = &mut sums[k / 8];
        for j in 0..N {
            let product = a[k].wrapping_mul(b[k][j]);
            let below = top[j].wrapping_sub(a_exponents[k]).wrapping_sub(b_exponents[k][j]);
            let aligned = product
                .unsigned_abs()
                .wrapping_shl(core.fraction_bits - 2 * FACTOR_BITS)
                .wrapping_shr(below.min(31) as u32) as i32;
            let sign = product >> 31;
            sum[j] = sum[j].wrapping_add((aligned ^ sign).wrapping_sub(sign));
        }
    }
    let (mut exact, mut out, mut least_seen) = ([0f64; N], [0f32; N], f64::INFINITY);
    for j in 0..N {
        let below = top[j].wrapping_sub(c_exponent[j]).min(31) as u32;
        let aligned = c_significand[j].wrapping_shl(core.fraction_bits - 23).wrapping_shr(below);
        let sign = c[j].to_bits() as i32 >> 31;
        let aligned = (aligned as i32 ^ sign).wrapping_sub(sign);
        let sum = f64::from(aligned) + f64::from(sums[0][j]) + f64::from(sums[1][j]);
        let exponent = top[j].wrapping_sub(core.fraction_bits as i32).wrapping_add(1023);
        exact[j] = sum * f64::from_bits((exponent as u64) << 52);
        // What is left after clearing the bits below f32's last one converts exactly.
        out[j] = f64::from_bits(exact[j].to_bits() & !0x1FFF_FFFF) as f32;
        least_seen = least_seen.min(exact[j].abs());
    }
    if half {
        for j in 0..N {
            out[j] = to_f16(exact[j], Round::Nearest).to_f32();
        }
    } else if least_seen < f64::from(f32::MIN_POSITIVE) {
        for j in 0..N {
            if exact[j].abs() < f64::from(f32::MIN_POSITIVE) {
                out[j] = truncate_subnormal(exact[j]);
            }
        }
    }
    out
}

#[inline(always)]
fn multiply_any(
    core: TensorCore,
    ty: MmaType,
    (a, b): (&Bits<M, MAX_K>, &Bits<MAX_K, N>),
    c: &mut [[f32; N]; M],
    k: usize,
    half: bool,
) {
    let group = if ty == MmaType::Tf32 { core.group / 2 } else { core.group };
    let (a, b) = (Factor::of(a, ty), Factor::of(b, ty));
    for from in (0..k).step_by(group) {
        let to = k.min(from + group);
        for (row, c) in c.iter_mut().enumerate() {
            let mut finite = a.finite && b.finite;
            for c in &*c {
                finite &= c.is_finite();
            }
            let (a_row, b_rows) =
                ((&a.significands[row], &a.exponents[row]), (&b.significands, &b.exponents));
            let mut out = add_products(core, a_row, b_rows, (from, to), *c, half);
            if !finite {
                for (j, out) in out.iter_mut().enumerate() {
                    let products = (from..to).map(|k| a.class(row, k) * b.class(k, j));
                    let class = products.sum::<f64>() + f64::from(c[j]);
                    if !class.is_finite() {
                        *out = canonical(class as f32);
                    }
                }
            }
            *c = out;
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn multiply_avx2(
    core: TensorCore,
    ty: MmaType,
    factors: (&Bits<M, MAX_K>, &Bits<MAX_K, N>),
    c: &mut [[f32; N]; M],
    k: usize,
    half: bool,
) {
    multiply_any(core, ty, factors, c, k, half);
}

/// c = a b + c as the tensor cores of an architecture compute it. With `half`, c holds f16
/// numbers and is rounded to f16; NaN comes out canonical.
pub(crate) fn multiply(
    arch: Arch,
    ty: MmaType,
    factors: (&Bits<M, MAX_K>, &Bits<MAX_K, N>),
    c: &mut [[f32; N]; M],
    k: usize,
    half: bool,
) {
    let core = TensorCore::of(arch);
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2, the one feature the function is compiled with.
        return unsafe { multiply_avx2(core, ty, factors, c, k, half) };
    }
    multiply_any(core, ty, factors, c, k, half);
}
