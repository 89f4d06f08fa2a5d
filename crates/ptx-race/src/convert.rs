//! `cvt`: between every pair of scalar types, and into packed halves.

use half::{bf16, f16};

use crate::math::{flush, saturate};
use crate::registers::{File, Form, Lanes, Reg, Regs, Slots, packed};
use crate::registers::{WARP, lanes};
use crate::round::{Round, bf16_nearest, bf16_to_f32, to_bf16, to_f16, to_f32, to_tf32};

/// A scalar type of the PTX ISA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scalar {
    Unsigned(u32),
    Signed(u32),
    F16,
    Bf16,
    F32,
    F64,
}

impl Scalar {
    pub fn of(ty: &str) -> Option<Scalar> {
        Some(match ty {
            "u8" | "b8" => Scalar::Unsigned(8),
            "u16" | "b16" => Scalar::Unsigned(16),
            "u32" | "b32" => Scalar::Unsigned(32),
            "u64" | "b64" => Scalar::Unsigned(64),
            "s8" => Scalar::Signed(8),
            "s16" => Scalar::Signed(16),
            "s32" => Scalar::Signed(32),
            "s64" => Scalar::Signed(64),
            "f16" => Scalar::F16,
            "bf16" => Scalar::Bf16,
            "f32" => Scalar::F32,
            "f64" => Scalar::F64,
            _ => return None,
        })
    }

    pub fn bits(self) -> u32 {
        match self {
            Scalar::Unsigned(bits) | Scalar::Signed(bits) => bits,
            Scalar::F16 | Scalar::Bf16 => 16,
            Scalar::F32 => 32,
            Scalar::F64 => 64,
        }
    }

    pub fn file(self) -> File {
        if self.bits() == 64 { File::R64 } else { File::R32 }
    }

    fn float(self) -> bool {
        matches!(self, Scalar::F16 | Scalar::Bf16 | Scalar::F32 | Scalar::F64)
    }
}

/// A `cvt` between two scalar types.
// Each is a modifier that an opcode has or lacks.
#[allow(clippy::struct_excessive_bools)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Convert {
    pub from: Scalar,
    pub to: Scalar,
    round: Option<Round>,
    /// `.rni` and its kin: to a whole number, also from float to float.
    integral: bool,
    ftz: bool,
    sat: bool,
    relu: bool,
}

/// What a `cvt` decodes to.
#[derive(Clone, Copy)]
pub(crate) enum Conversion {
    /// A form of its own, for those that inner loops use and those into packed halves.
    Form(Form),
    General(Convert),
}

/// The meaning of the modifiers after `cvt`.
pub(crate) fn conversion(mods: &[&str]) -> Option<Conversion> {
    if let Some(form) = frequent(mods) {
        return Some(Conversion::Form(form));
    }
    let (flags, &[to, from]) = mods.split_last_chunk::<2>()?;
    let mut convert = Convert {
        from: Scalar::of(from)?,
        to: Scalar::of(to)?,
        round: None,
        integral: false,
        ftz: false,
        sat: false,
        relu: false,
    };
    for flag in flags {
        match *flag {
            "ftz" => convert.ftz = true,
            "sat" => convert.sat = true,
            "relu" => convert.relu = true,
            flag => {
                convert.round = Some(Round::of(flag)?);
                convert.integral = flag.ends_with('i');
            }
        }
    }
    Some(Conversion::General(convert))
}

fn frequent(mods: &[&str]) -> Option<Form> {
    match mods {
        ["rn", "f32", "s32"] => lanes!(|a: i32| -> f32 { a as f32 }),
        ["rn", "f32", "u32"] => lanes!(|a: u32| -> f32 { a as f32 }),
        ["u64", "u32"] => lanes!(|a: u32| -> u64 { u64::from(a) }),
        ["s64", "s32"] => lanes!(|a: i32| -> i64 { i64::from(a) }),
        ["u32", "u64"] => lanes!(|a: u64| -> u32 { a as u32 }),
        ["u16", "u32"] => lanes!(|a: u32| -> u16 { a as u16 }),
        ["u32", "u16"] => lanes!(|a: u16| -> u32 { u32::from(a) }),
        ["s32", "s16"] => lanes!(|a: i16| -> i32 { i32::from(a) }),
        ["f32", "bf16"] => lanes!(|a: u16| -> f32 { bf16_to_f32(a) }),
        ["f32", "f16"] => lanes!(|a: f16| -> f32 { a.to_f32() }),
        ["rn", "bf16", "f32"] => lanes!(|a: f32| -> u16 { bf16_nearest(a) }),
        // The first source is the high half.
        ["rn", "bf16x2", "f32"] => {
            lanes!(|a: f32, b: f32| -> u32 { packed([bf16_nearest(b), bf16_nearest(a)]) })
        }
        ["rn", "relu", "bf16x2", "f32"] => lanes!(|a: f32, b: f32| -> u32 {
            packed([bf16_nearest(relu(b)), bf16_nearest(relu(a))])
        }),
        ["rz", "bf16x2", "f32"] => {
            lanes!(|a: f32, b: f32| -> [bf16; 2] { [b, a].map(|x| to_bf16(x.into(), Round::Zero)) })
        }
        ["rn", "f16x2", "f32"] => lanes!(|a: f32, b: f32| -> [f16; 2] {
            [b, a].map(|x| to_f16(x.into(), Round::Nearest))
        }),
        ["rn", "relu", "f16x2", "f32"] => lanes!(|a: f32, b: f32| -> [f16; 2] {
            [b, a].map(|x| to_f16(relu(x).into(), Round::Nearest))
        }),
        ["rz", "f16x2", "f32"] => {
            lanes!(|a: f32, b: f32| -> [f16; 2] { [b, a].map(|x| to_f16(x.into(), Round::Zero)) })
        }
        ["rna", "tf32", "f32"] => lanes!(|a: f32| -> f32 { to_tf32(a, Round::NearestAway) }),
        ["rn", "tf32", "f32"] => lanes!(|a: f32| -> f32 { to_tf32(a, Round::Nearest) }),
        ["rz", "tf32", "f32"] => lanes!(|a: f32| -> f32 { to_tf32(a, Round::Zero) }),
        ["pack", "sat", "s16", "s32"] => lanes!(|a: i32, b: i32| -> u32 {
            packed([b, a].map(|x| x.clamp(-32768, 32767) as u16))
        }),
        _ => None,
    }
}

fn relu(x: f32) -> f32 {
    if x.is_nan() || x > 0.0 { x } else { 0.0 }
}

impl Convert {
    /// Converts one value, both sides as register bits.
    pub fn apply(&self, bits: u64) -> u64 {
        match (self.from.float(), self.to.float()) {
            (false, false) => self.int_to_int(bits),
            (false, true) => self.int_to_float(bits),
            (true, false) => self.float_to_int(self.read_float(bits)),
            (true, true) => self.float_to_float(bits),
        }
    }

    fn read_int(&self, bits: u64) -> i128 {
        let shift = 64 - self.from.bits();
        match self.from {
            Scalar::Signed(_) => i128::from((bits << shift) as i64 >> shift),
            _ => i128::from(bits << shift >> shift),
        }
    }

    fn range(&self) -> (i128, i128) {
        match self.to {
            Scalar::Signed(bits) => (-(1 << (bits - 1)), (1 << (bits - 1)) - 1),
            _ => (0, (1 << self.to.bits()) - 1),
        }
    }

    fn int_to_int(&self, bits: u64) -> u64 {
        let value = self.read_int(bits);
        if self.sat {
            let (low, high) = self.range();
            return value.clamp(low, high) as u64;
        }
        // Truncate, then extend into the register as the destination's type does.
        let shift = 64 - self.to.bits();
        let bits = (value as u64) << shift;
        match self.to {
            Scalar::Signed(_) => (bits as i64 >> shift) as u64,
            _ => bits >> shift,
        }
    }

    fn int_to_float(&self, bits: u64) -> u64 {
        let value = self.read_int(bits);
        let mode = self.round.unwrap_or(Round::Nearest);
        // A 64-bit integer may not fit f64: keep what was lost in the last bit.
        let head = value as f64;
        let tail = (value - head as i128) as f64;
        if self.to == Scalar::F64 {
            let other_side = match mode {
                Round::Zero => tail != 0.0 && (tail < 0.0) == (head > 0.0),
                Round::Down => tail < 0.0,
                Round::Up => tail > 0.0,
                _ => false,
            };
            return match (other_side, tail > 0.0) {
                (false, _) => head,
                (true, true) => head.next_up(),
                (true, false) => head.next_down(),
            }
            .to_bits();
        }
        self.write_float(crate::round::odd((head, tail)), mode)
    }

    fn read_float(&self, bits: u64) -> f64 {
        match self.from {
            Scalar::F16 => f16::from_bits(bits as u16).to_f64(),
            Scalar::Bf16 => bf16::from_bits(bits as u16).to_f64(),
            Scalar::F32 => {
                let x = f32::from_bits(bits as u32);
                f64::from(if self.ftz { flush(x) } else { x })
            }
            _ => f64::from_bits(bits),
        }
    }

    fn float_to_int(&self, x: f64) -> u64 {
        let (low, high) = self.range();
        // NaN becomes zero, or the integer indefinite of 64 bits; out of range clamps.
        if x.is_nan() {
            let wide = self.from == Scalar::F64 || self.to.bits() == 64;
            let top = 1i64 << (self.to.bits() - 1);
            let indefinite = if low < 0 { top.wrapping_neg() } else { top };
            return if wide { indefinite as u64 } else { 0 };
        }
        let whole = self.round.unwrap_or(Round::Zero).integral(x);
        (whole as i128).clamp(low, high) as u64
    }

    fn float_to_float(&self, bits: u64) -> u64 {
        let mut x = self.read_float(bits);
        let mode = self.round.unwrap_or(Round::Nearest);
        if self.integral {
            x = mode.integral(x).copysign(x);
        }
        if self.relu && x <= 0.0 {
            x = 0.0;
        }
        if self.sat {
            x = if x > 0.0 { x.min(1.0) } else { 0.0 };
        }
        self.write_float(x, mode)
    }

    fn write_float(&self, x: f64, mode: Round) -> u64 {
        match self.to {
            Scalar::F16 => u64::from(to_f16(x, mode).to_bits()),
            Scalar::Bf16 => u64::from(to_bf16(x, mode).to_bits()),
            Scalar::F32 => {
                let x = to_f32(x, mode);
                let x = if self.ftz { flush(x) } else { x };
                u64::from(if self.sat { saturate(x) } else { x }.to_bits())
            }
            _ => x.to_bits(),
        }
    }

    /// Converts the lanes of a mask. Registers may be wider than the types, hence their files.
    pub fn run(&self, regs: &mut Regs, slots: &Slots, [from, to]: [File; 2], mask: u32) {
        let source: Lanes<u64> = match from {
            File::R64 => regs.r64[slots.s[0] as usize],
            _ => regs.r32[slots.s[0] as usize].map(u64::from),
        };
        let mut out = [0; WARP];
        for lane in crate::registers::lanes_of(mask) {
            out[lane] = self.apply(source[lane]);
        }
        match to {
            File::R64 => u64::put(regs, slots.d, &out, mask),
            _ => u32::put(regs, slots.d, &out.map(|bits| bits as u32), mask),
        }
    }
}
