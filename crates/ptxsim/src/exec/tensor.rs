//! Matrix instructions of a warp: `ldmatrix`, `movmatrix` and `mma.sync`.
//!
//! Products are exact; they are added to the accumulator one by one in order of k, each sum
//! rounded to f32. A card adds several at once with its own rounding, which is not documented:
//! results agree to f32 rounding, not to the bit. Hopper's `wgmma` belongs here too.

use half::f16;

use crate::fault::{Exec, FaultKind, stop};
use crate::float::Small;
use crate::mem::SHARED_WINDOW;
use crate::op::{Address, Mma, MmaType};
use crate::race::ByteRange;
use crate::registers::{FULL, Lanes, Reg, Regs, WARP, halves, packed};
use crate::round::bf16_to_f32;
use crate::state::{Block, Warp};

const M: usize = 16;
const N: usize = 8;
const MAX_K: usize = 16;

/// An 8 x 8 matrix of 16-bit elements, by row.
type Matrix = [[u16; 8]; 8];

/// The fragment of a matrix: lane l holds row l / 4, columns 2 (l % 4) and the next.
fn fragment(matrix: &Matrix) -> Lanes<u32> {
    std::array::from_fn(|lane| {
        let (row, column) = (lane / 4, lane % 4 * 2);
        packed([matrix[row][column], matrix[row][column + 1]])
    })
}

fn transposed(matrix: &Matrix) -> Matrix {
    std::array::from_fn(|row| std::array::from_fn(|column| matrix[column][row]))
}

impl Warp {
    pub fn load_matrix(
        &mut self,
        block: &mut Block,
        address: Address,
        generic: bool,
        transpose: bool,
        count: u8,
        d: &[u32; 4],
        mask: u32,
    ) -> Exec<()> {
        self.require_converged(mask, FULL, "ldmatrix")?;
        let at = self.addresses(address);
        for (matrix, &register) in d[..usize::from(count)].iter().enumerate() {
            let mut rows: Matrix = [[0; 8]; 8];
            for (row, out) in rows.iter_mut().enumerate() {
                let lane = matrix * 8 + row;
                let at = if generic { at[lane].wrapping_sub(SHARED_WINDOW) } else { at[lane] };
                if at % 16 != 0 {
                    let message = format!("row address {at:#x} is not a multiple of 16 bytes");
                    return stop(FaultKind::Misaligned, lane, message);
                }
                match block.shared.load::<16>(at) {
                    Ok(bytes) => {
                        for (value, pair) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                            *value = u16::from_le_bytes([pair[0], pair[1]]);
                        }
                    }
                    Err(trouble) => return block.shared_trouble(lane, at, &trouble),
                }
                self.race_read(block, lane, ByteRange { shared: true, at, size: 16 }, false)?;
            }
            let values = fragment(&if transpose { transposed(&rows) } else { rows });
            u32::put(self.regs_mut(), register, &values, FULL);
        }
        Ok(())
    }

    pub fn move_matrix(&mut self, d: u32, a: u32, mask: u32) -> Exec<()> {
        self.require_converged(mask, FULL, "movmatrix")?;
        let source = &self.regs().r32[a as usize];
        let mut rows: Matrix = [[0; 8]; 8];
        for (lane, &pair) in source.iter().enumerate() {
            let (row, column) = (lane / 4, lane % 4 * 2);
            [rows[row][column], rows[row][column + 1]] = halves(pair);
        }
        u32::put(self.regs_mut(), d, &fragment(&transposed(&rows)), FULL);
        Ok(())
    }

    pub fn mma(&mut self, mma: &Mma, mask: u32) -> Exec<()> {
        self.require_converged(mask, FULL, "mma")?;
        let regs = self.regs();
        let register = |slot: u32| &regs.r32[slot as usize];
        let factors = match mma.ty {
            MmaType::Tf32 => tf32_factors(regs, mma),
            MmaType::Bf16 => small_factors(regs, mma, bf16_to_f32),
            MmaType::F16 => small_factors(regs, mma, f16_to_f32),
        };
        let mut c = [[0f32; N]; M];
        for i in 0..2 {
            for lane in 0..WARP {
                let row = &mut c[lane / 4 + 8 * i];
                let column = lane % 4 * 2;
                [row[column], row[column + 1]] = if mma.half_c {
                    let [low, high] = halves(register(mma.c[i])[lane]);
                    [f16_to_f32(low), f16_to_f32(high)]
                } else {
                    let (low, high) = (register(mma.c[2 * i]), register(mma.c[2 * i + 1]));
                    [f32::from_bits(low[lane]), f32::from_bits(high[lane])]
                };
            }
        }
        multiply(&factors, &mut c, mma.k);
        for i in 0..2 {
            let pair = |lane: usize| {
                let (row, column) = (lane / 4 + 8 * i, lane % 4 * 2);
                [c[row][column], c[row][column + 1]]
            };
            if mma.half_d {
                let values = std::array::from_fn(|lane| {
                    packed(pair(lane).map(|x| f16::narrow(x.into()).to_bits()))
                });
                u32::put(self.regs_mut(), mma.d[i], &values, FULL);
            } else {
                for j in 0..2 {
                    let values: Lanes<f32> =
                        std::array::from_fn(|lane| crate::math::canonical(pair(lane)[j]));
                    f32::put(self.regs_mut(), mma.d[2 * i + j], &values, FULL);
                }
            }
        }
        Ok(())
    }
}

/// The factors of an mma as matrices. Columns and rows beyond k stay zero.
type Factors = ([[f32; MAX_K]; M], [[f32; N]; MAX_K]);

/// Register i of A holds rows 8 (i % 2) on and columns 8 (i / 2) on, two to a lane; register i of
/// B holds rows 8 i on.
#[inline(always)]
fn small_factors(regs: &Regs, mma: &Mma, widen: impl Fn(u16) -> f32) -> Factors {
    let (mut a, mut b) = ([[0f32; MAX_K]; M], [[0f32; N]; MAX_K]);
    for (i, &slot) in mma.a[..mma.k / 4].iter().enumerate() {
        for (lane, &bits) in regs.r32[slot as usize].iter().enumerate() {
            let row = &mut a[lane / 4 + 8 * (i % 2)];
            let column = lane % 4 * 2 + 8 * (i / 2);
            row[column] = widen(bits as u16);
            row[column + 1] = widen((bits >> 16) as u16);
        }
    }
    for (i, &slot) in mma.b[..mma.k / 8].iter().enumerate() {
        for (lane, &bits) in regs.r32[slot as usize].iter().enumerate() {
            let k = lane % 4 * 2 + 8 * i;
            b[k][lane / 4] = widen(bits as u16);
            b[k + 1][lane / 4] = widen((bits >> 16) as u16);
        }
    }
    (a, b)
}

/// As for 16 bits, but with blocks of four columns, one to a lane.
fn tf32_factors(regs: &Regs, mma: &Mma) -> Factors {
    let (mut a, mut b) = ([[0f32; MAX_K]; M], [[0f32; N]; MAX_K]);
    for (i, &slot) in mma.a[..mma.k / 2].iter().enumerate() {
        for (lane, &bits) in regs.r32[slot as usize].iter().enumerate() {
            a[lane / 4 + 8 * (i % 2)][lane % 4 + 4 * (i / 2)] = tf32(bits);
        }
    }
    for (i, &slot) in mma.b[..mma.k / 4].iter().enumerate() {
        for (lane, &bits) in regs.r32[slot as usize].iter().enumerate() {
            b[lane % 4 + 4 * i][lane / 4] = tf32(bits);
        }
    }
    (a, b)
}

fn f16_to_f32(bits: u16) -> f32 {
    f16::from_bits(bits).to_f32()
}

/// The tensor core reads the upper 19 bits of a tf32 operand.
fn tf32(bits: u32) -> f32 {
    f32::from_bits(bits & !0x1FFF)
}

#[inline(always)]
fn multiply_rows((a, b): &Factors, c: &mut [[f32; N]; M], k: usize) {
    for (a, c) in a.iter().zip(c) {
        let mut sums = *c;
        for (&x, row) in a.iter().zip(b).take(k) {
            for (sum, &y) in sums.iter_mut().zip(row) {
                *sum += x * y;
            }
        }
        *c = sums;
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn multiply_x86(factors: &Factors, c: &mut [[f32; N]; M], k: usize) {
    multiply_rows(factors, c, k);
}

/// c += a b, in order of k.
fn multiply(factors: &Factors, c: &mut [[f32; N]; M], k: usize) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has what the function is compiled for.
        return unsafe { multiply_x86(factors, c, k) };
    }
    multiply_rows(factors, c, k);
}
