//! Matrix instructions of a warp: `ldmatrix`, `movmatrix` and `mma.sync`.
//!
//! The fragment layouts are here; the arithmetic is in `tensor_core`. Hopper's `wgmma` belongs
//! here too.

use half::f16;

use crate::fault::{Exec, FaultKind, stop};
use crate::mem::SHARED_WINDOW;
use crate::op::{Address, Mma, MmaType};
use crate::profile::AccessSpace;
use crate::race::ByteRange;
use crate::registers::{FULL, Lanes, Reg, Regs, WARP, halves, packed};
use crate::round::{Round, to_f16};
use crate::state::{Block, Warp};
use crate::tensor_core::{self, Bits, M, MAX_K, N};

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
        let rows = u32::MAX >> (32 - 8 * u32::from(count));
        self.count_access(block, AccessSpace::Shared, &at, rows, 16);
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
                self.race_read(block, lane, ByteRange { shared: true, at, size: 16 }, None)?;
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

    pub fn mma(&mut self, block: &Block, mma: &Mma, mask: u32) -> Exec<()> {
        self.require_converged(mask, FULL, "mma")?;
        let regs = self.regs();
        let register = |slot: u32| &regs.r32[slot as usize];
        let (a, b) = match mma.ty {
            MmaType::Tf32 => tf32_factors(regs, mma),
            MmaType::Bf16 | MmaType::F16 => half_factors(regs, mma),
        };
        let widen = |bits: u16| f16::from_bits(bits).to_f32();
        let mut c = [[0f32; N]; M];
        for i in 0..2 {
            for lane in 0..WARP {
                let row = &mut c[lane / 4 + 8 * i];
                let column = lane % 4 * 2;
                [row[column], row[column + 1]] = if mma.half_c {
                    halves(register(mma.c[i])[lane]).map(widen)
                } else {
                    let (low, high) = (register(mma.c[2 * i]), register(mma.c[2 * i + 1]));
                    [f32::from_bits(low[lane]), f32::from_bits(high[lane])]
                };
            }
        }
        let arch = block.launch.options.arch;
        tensor_core::multiply(arch, mma.ty, (&a, &b), &mut c, mma.k, mma.half_d);
        for i in 0..2 {
            let pair = |lane: usize| {
                let (row, column) = (lane / 4 + 8 * i, lane % 4 * 2);
                [c[row][column], c[row][column + 1]]
            };
            if mma.half_d {
                let narrow = |x: f32| to_f16(x.into(), Round::Nearest).to_bits();
                let values = std::array::from_fn(|lane| packed(pair(lane).map(narrow)));
                u32::put(self.regs_mut(), mma.d[i], &values, FULL);
            } else {
                for j in 0..2 {
                    let values: Lanes<f32> = std::array::from_fn(|lane| pair(lane)[j]);
                    f32::put(self.regs_mut(), mma.d[2 * i + j], &values, FULL);
                }
            }
        }
        Ok(())
    }
}

/// The factors of an mma as matrices of bits. Columns and rows beyond k stay zero.
type Factors = (Bits<M, MAX_K>, Bits<MAX_K, N>);

/// Register i of A holds rows 8 (i % 2) on and columns 8 (i / 2) on, two per lane; register i of
/// B holds rows 8 i on.
fn half_factors(regs: &Regs, mma: &Mma) -> Factors {
    let (mut a, mut b) = ([[0; MAX_K]; M], [[0; N]; MAX_K]);
    for (i, &slot) in mma.a[..mma.k / 4].iter().enumerate() {
        for (lane, &bits) in regs.r32[slot as usize].iter().enumerate() {
            let row = &mut a[lane / 4 + 8 * (i % 2)];
            let column = lane % 4 * 2 + 8 * (i / 2);
            [row[column], row[column + 1]] = halves(bits).map(u32::from);
        }
    }
    for (i, &slot) in mma.b[..mma.k / 8].iter().enumerate() {
        for (lane, &bits) in regs.r32[slot as usize].iter().enumerate() {
            let row = lane % 4 * 2 + 8 * i;
            [b[row][lane / 4], b[row + 1][lane / 4]] = halves(bits).map(u32::from);
        }
    }
    (a, b)
}

/// As for 16 bits, but with blocks of four columns, one per lane.
fn tf32_factors(regs: &Regs, mma: &Mma) -> Factors {
    let (mut a, mut b) = ([[0; MAX_K]; M], [[0; N]; MAX_K]);
    for (i, &slot) in mma.a[..mma.k / 2].iter().enumerate() {
        for (lane, &bits) in regs.r32[slot as usize].iter().enumerate() {
            a[lane / 4 + 8 * (i % 2)][lane % 4 + 4 * (i / 2)] = bits;
        }
    }
    for (i, &slot) in mma.b[..mma.k / 4].iter().enumerate() {
        for (lane, &bits) in regs.r32[slot as usize].iter().enumerate() {
            b[lane % 4 + 4 * i][lane / 4] = bits;
        }
    }
    (a, b)
}
