//! Integer, logic, shift and bit-field instructions: one line per form.

use crate::registers::{Form, Lanes, Reg, Regs, Slots, lanes};

/// The form of an integer opcode, `add.s32` given as `("add", ["s32"])`.
pub(crate) fn form(name: &str, mods: &[&str]) -> Option<Form> {
    arithmetic(name, mods).or_else(|| bits(name, mods)).or_else(|| carry(name, mods))
}

fn arithmetic(name: &str, mods: &[&str]) -> Option<Form> {
    match (name, mods) {
        ("add", ["u16" | "s16"]) => lanes!(|a: u16, b: u16| -> u16 { a.wrapping_add(b) }),
        ("add", ["u32" | "s32"]) => lanes!(|a: u32, b: u32| -> u32 { a.wrapping_add(b) }),
        ("add", ["u64" | "s64"]) => lanes!(|a: u64, b: u64| -> u64 { a.wrapping_add(b) }),
        ("add", ["sat", "s32"]) => lanes!(|a: i32, b: i32| -> i32 { a.saturating_add(b) }),
        ("sub", ["u16" | "s16"]) => lanes!(|a: u16, b: u16| -> u16 { a.wrapping_sub(b) }),
        ("sub", ["u32" | "s32"]) => lanes!(|a: u32, b: u32| -> u32 { a.wrapping_sub(b) }),
        ("sub", ["u64" | "s64"]) => lanes!(|a: u64, b: u64| -> u64 { a.wrapping_sub(b) }),
        ("sub", ["sat", "s32"]) => lanes!(|a: i32, b: i32| -> i32 { a.saturating_sub(b) }),

        ("mul", ["lo", "u16" | "s16"]) => lanes!(|a: u16, b: u16| -> u16 { a.wrapping_mul(b) }),
        ("mul", ["lo", "u32" | "s32"]) => lanes!(|a: u32, b: u32| -> u32 { a.wrapping_mul(b) }),
        ("mul", ["lo", "u64" | "s64"]) => lanes!(|a: u64, b: u64| -> u64 { a.wrapping_mul(b) }),
        ("mul", ["hi", "u16"]) => {
            lanes!(|a: u16, b: u16| -> u16 { (u32::from(a) * u32::from(b) >> 16) as u16 })
        }
        ("mul", ["hi", "s16"]) => {
            lanes!(|a: i16, b: i16| -> i16 { (i32::from(a) * i32::from(b) >> 16) as i16 })
        }
        ("mul", ["hi", "u32"]) => lanes!(|a: u32, b: u32| -> u32 { high_u32(a, b) }),
        ("mul", ["hi", "s32"]) => lanes!(|a: i32, b: i32| -> i32 { high_s32(a, b) }),
        ("mul", ["hi", "u64"]) => lanes!(|a: u64, b: u64| -> u64 { high_u64(a, b) }),
        ("mul", ["hi", "s64"]) => lanes!(|a: i64, b: i64| -> i64 { high_s64(a, b) }),
        ("mul", ["wide", "u16"]) => {
            lanes!(|a: u16, b: u16| -> u32 { u32::from(a) * u32::from(b) })
        }
        ("mul", ["wide", "s16"]) => {
            lanes!(|a: i16, b: i16| -> i32 { i32::from(a) * i32::from(b) })
        }
        ("mul", ["wide", "u32"]) => {
            lanes!(|a: u32, b: u32| -> u64 { u64::from(a) * u64::from(b) })
        }
        ("mul", ["wide", "s32"]) => {
            lanes!(|a: i32, b: i32| -> i64 { i64::from(a) * i64::from(b) })
        }
        ("mul24", ["lo", "u32"]) => {
            lanes!(|a: u32, b: u32| -> u32 { (a & 0xFF_FFFF).wrapping_mul(b & 0xFF_FFFF) })
        }
        ("mul24", ["lo", "s32"]) => {
            lanes!(|a: i32, b: i32| -> i32 { (a << 8 >> 8).wrapping_mul(b << 8 >> 8) })
        }

        ("mad", ["lo", "u16" | "s16"]) => {
            lanes!(|a: u16, b: u16, c: u16| -> u16 { a.wrapping_mul(b).wrapping_add(c) })
        }
        ("mad", ["lo", "u32" | "s32"]) => {
            lanes!(|a: u32, b: u32, c: u32| -> u32 { a.wrapping_mul(b).wrapping_add(c) })
        }
        ("mad", ["lo", "u64" | "s64"]) => {
            lanes!(|a: u64, b: u64, c: u64| -> u64 { a.wrapping_mul(b).wrapping_add(c) })
        }
        ("mad", ["hi", "u32"]) => {
            lanes!(|a: u32, b: u32, c: u32| -> u32 { high_u32(a, b).wrapping_add(c) })
        }
        ("mad", ["hi", "s32"]) => {
            lanes!(|a: i32, b: i32, c: i32| -> i32 { high_s32(a, b).wrapping_add(c) })
        }
        ("mad", ["hi", "u64"]) => {
            lanes!(|a: u64, b: u64, c: u64| -> u64 { high_u64(a, b).wrapping_add(c) })
        }
        ("mad", ["hi", "s64"]) => {
            lanes!(|a: i64, b: i64, c: i64| -> i64 { high_s64(a, b).wrapping_add(c) })
        }
        ("mad", ["wide", "u16"]) => lanes!(|a: u16, b: u16, c: u32| -> u32 {
            (u32::from(a) * u32::from(b)).wrapping_add(c)
        }),
        ("mad", ["wide", "s16"]) => lanes!(|a: i16, b: i16, c: i32| -> i32 {
            (i32::from(a) * i32::from(b)).wrapping_add(c)
        }),
        ("mad", ["wide", "u32"]) => lanes!(|a: u32, b: u32, c: u64| -> u64 {
            (u64::from(a) * u64::from(b)).wrapping_add(c)
        }),
        ("mad", ["wide", "s32"]) => lanes!(|a: i32, b: i32, c: i64| -> i64 {
            (i64::from(a) * i64::from(b)).wrapping_add(c)
        }),

        // Division by zero is unspecified; GPUs give all ones, and the dividend as remainder.
        ("div", ["u16"]) => lanes!(|a: u16, b: u16| -> u16 { a.checked_div(b).unwrap_or(!0) }),
        ("div", ["u32"]) => lanes!(|a: u32, b: u32| -> u32 { a.checked_div(b).unwrap_or(!0) }),
        ("div", ["u64"]) => lanes!(|a: u64, b: u64| -> u64 { a.checked_div(b).unwrap_or(!0) }),
        ("div", ["s16"]) => {
            lanes!(|a: i16, b: i16| -> i16 { if b == 0 { -1 } else { a.wrapping_div(b) } })
        }
        ("div", ["s32"]) => {
            lanes!(|a: i32, b: i32| -> i32 { if b == 0 { -1 } else { a.wrapping_div(b) } })
        }
        ("div", ["s64"]) => {
            lanes!(|a: i64, b: i64| -> i64 { if b == 0 { -1 } else { a.wrapping_div(b) } })
        }
        ("rem", ["u16"]) => lanes!(|a: u16, b: u16| -> u16 { a.checked_rem(b).unwrap_or(a) }),
        ("rem", ["u32"]) => lanes!(|a: u32, b: u32| -> u32 { a.checked_rem(b).unwrap_or(a) }),
        ("rem", ["u64"]) => lanes!(|a: u64, b: u64| -> u64 { a.checked_rem(b).unwrap_or(a) }),
        ("rem", ["s16"]) => {
            lanes!(|a: i16, b: i16| -> i16 { if b == 0 { a } else { a.wrapping_rem(b) } })
        }
        ("rem", ["s32"]) => {
            lanes!(|a: i32, b: i32| -> i32 { if b == 0 { a } else { a.wrapping_rem(b) } })
        }
        ("rem", ["s64"]) => {
            lanes!(|a: i64, b: i64| -> i64 { if b == 0 { a } else { a.wrapping_rem(b) } })
        }

        ("abs", ["s16"]) => lanes!(|a: i16| -> i16 { a.wrapping_abs() }),
        ("abs", ["s32"]) => lanes!(|a: i32| -> i32 { a.wrapping_abs() }),
        ("abs", ["s64"]) => lanes!(|a: i64| -> i64 { a.wrapping_abs() }),
        ("neg", ["s16"]) => lanes!(|a: i16| -> i16 { a.wrapping_neg() }),
        ("neg", ["s32"]) => lanes!(|a: i32| -> i32 { a.wrapping_neg() }),
        ("neg", ["s64"]) => lanes!(|a: i64| -> i64 { a.wrapping_neg() }),
        ("min", ["u16"]) => lanes!(|a: u16, b: u16| -> u16 { a.min(b) }),
        ("min", ["s16"]) => lanes!(|a: i16, b: i16| -> i16 { a.min(b) }),
        ("min", ["u32"]) => lanes!(|a: u32, b: u32| -> u32 { a.min(b) }),
        ("min", ["s32"]) => lanes!(|a: i32, b: i32| -> i32 { a.min(b) }),
        ("min", ["u64"]) => lanes!(|a: u64, b: u64| -> u64 { a.min(b) }),
        ("min", ["s64"]) => lanes!(|a: i64, b: i64| -> i64 { a.min(b) }),
        ("max", ["u16"]) => lanes!(|a: u16, b: u16| -> u16 { a.max(b) }),
        ("max", ["s16"]) => lanes!(|a: i16, b: i16| -> i16 { a.max(b) }),
        ("max", ["u32"]) => lanes!(|a: u32, b: u32| -> u32 { a.max(b) }),
        ("max", ["s32"]) => lanes!(|a: i32, b: i32| -> i32 { a.max(b) }),
        ("max", ["u64"]) => lanes!(|a: u64, b: u64| -> u64 { a.max(b) }),
        ("max", ["s64"]) => lanes!(|a: i64, b: i64| -> i64 { a.max(b) }),
        ("sad", ["u16"]) => {
            lanes!(|a: u16, b: u16, c: u16| -> u16 { c.wrapping_add(a.abs_diff(b)) })
        }
        ("sad", ["s16"]) => {
            lanes!(|a: i16, b: i16, c: u16| -> u16 { c.wrapping_add(a.abs_diff(b)) })
        }
        ("sad", ["u32"]) => {
            lanes!(|a: u32, b: u32, c: u32| -> u32 { c.wrapping_add(a.abs_diff(b)) })
        }
        ("sad", ["s32"]) => {
            lanes!(|a: i32, b: i32, c: u32| -> u32 { c.wrapping_add(a.abs_diff(b)) })
        }
        ("sad", ["u64"]) => {
            lanes!(|a: u64, b: u64, c: u64| -> u64 { c.wrapping_add(a.abs_diff(b)) })
        }
        ("sad", ["s64"]) => {
            lanes!(|a: i64, b: i64, c: u64| -> u64 { c.wrapping_add(a.abs_diff(b)) })
        }
        ("dp4a", ["u32", "u32"]) => lanes!(|a: u32, b: u32, c: u32| -> u32 {
            (0..4).fold(c, |sum, i| sum.wrapping_add(byte(a, i) * byte(b, i)))
        }),
        ("dp4a", ["s32", "s32"]) => lanes!(|a: u32, b: u32, c: i32| -> i32 {
            (0..4).fold(c, |sum, i| sum.wrapping_add(signed_byte(a, i) * signed_byte(b, i)))
        }),
        ("dp4a", ["s32", "u32"]) => lanes!(|a: u32, b: u32, c: i32| -> i32 {
            (0..4).fold(c, |sum, i| sum.wrapping_add(signed_byte(a, i) * byte(b, i) as i32))
        }),
        ("dp4a", ["u32", "s32"]) => lanes!(|a: u32, b: u32, c: i32| -> i32 {
            (0..4).fold(c, |sum, i| sum.wrapping_add(byte(a, i) as i32 * signed_byte(b, i)))
        }),
        _ => None,
    }
}

fn bits(name: &str, mods: &[&str]) -> Option<Form> {
    match (name, mods) {
        ("and", ["pred"]) => lanes!(|a: bool, b: bool| -> bool { a & b }),
        ("or", ["pred"]) => lanes!(|a: bool, b: bool| -> bool { a | b }),
        ("xor", ["pred"]) => lanes!(|a: bool, b: bool| -> bool { a ^ b }),
        ("not", ["pred"]) => lanes!(|a: bool| -> bool { !a }),
        ("mov", ["pred"]) => lanes!(|a: bool| -> bool { a }),
        ("and", ["b16"]) => lanes!(|a: u16, b: u16| -> u16 { a & b }),
        ("and", ["b32"]) => lanes!(|a: u32, b: u32| -> u32 { a & b }),
        ("and", ["b64"]) => lanes!(|a: u64, b: u64| -> u64 { a & b }),
        ("or", ["b16"]) => lanes!(|a: u16, b: u16| -> u16 { a | b }),
        ("or", ["b32"]) => lanes!(|a: u32, b: u32| -> u32 { a | b }),
        ("or", ["b64"]) => lanes!(|a: u64, b: u64| -> u64 { a | b }),
        ("xor", ["b16"]) => lanes!(|a: u16, b: u16| -> u16 { a ^ b }),
        ("xor", ["b32"]) => lanes!(|a: u32, b: u32| -> u32 { a ^ b }),
        ("xor", ["b64"]) => lanes!(|a: u64, b: u64| -> u64 { a ^ b }),
        ("not", ["b16"]) => lanes!(|a: u16| -> u16 { !a }),
        ("not", ["b32"]) => lanes!(|a: u32| -> u32 { !a }),
        ("not", ["b64"]) => lanes!(|a: u64| -> u64 { !a }),
        ("cnot", ["b16"]) => lanes!(|a: u16| -> u16 { u16::from(a == 0) }),
        ("cnot", ["b32"]) => lanes!(|a: u32| -> u32 { u32::from(a == 0) }),
        ("cnot", ["b64"]) => lanes!(|a: u64| -> u64 { u64::from(a == 0) }),

        // Shifts clamp: by the width or more they leave zeros, or the sign.
        ("shl", ["b16"]) => lanes!(|a: u16, n: u32| -> u16 { a.checked_shl(n).unwrap_or(0) }),
        ("shl", ["b32"]) => lanes!(|a: u32, n: u32| -> u32 { a.checked_shl(n).unwrap_or(0) }),
        ("shl", ["b64"]) => lanes!(|a: u64, n: u32| -> u64 { a.checked_shl(n).unwrap_or(0) }),
        ("shr", ["b16" | "u16"]) => {
            lanes!(|a: u16, n: u32| -> u16 { a.checked_shr(n).unwrap_or(0) })
        }
        ("shr", ["b32" | "u32"]) => {
            lanes!(|a: u32, n: u32| -> u32 { a.checked_shr(n).unwrap_or(0) })
        }
        ("shr", ["b64" | "u64"]) => {
            lanes!(|a: u64, n: u32| -> u64 { a.checked_shr(n).unwrap_or(0) })
        }
        ("shr", ["s16"]) => lanes!(|a: i16, n: u32| -> i16 { a >> n.min(15) }),
        ("shr", ["s32"]) => lanes!(|a: i32, n: u32| -> i32 { a >> n.min(31) }),
        ("shr", ["s64"]) => lanes!(|a: i64, n: u32| -> i64 { a >> n.min(63) }),
        ("shf", ["l", "wrap", "b32"]) => {
            lanes!(|lo: u32, hi: u32, n: u32| -> u32 { (wide(lo, hi) << (n & 31) >> 32) as u32 })
        }
        ("shf", ["l", "clamp", "b32"]) => {
            lanes!(|lo: u32, hi: u32, n: u32| -> u32 { (wide(lo, hi) << n.min(32) >> 32) as u32 })
        }
        ("shf", ["r", "wrap", "b32"]) => {
            lanes!(|lo: u32, hi: u32, n: u32| -> u32 { (wide(lo, hi) >> (n & 31)) as u32 })
        }
        ("shf", ["r", "clamp", "b32"]) => {
            lanes!(|lo: u32, hi: u32, n: u32| -> u32 { (wide(lo, hi) >> n.min(32)) as u32 })
        }
        ("lop3", ["b32"]) => lanes!(|a: u32, b: u32, c: u32, table: u32| -> u32 {
            let mut out = 0;
            for row in 0..8 {
                let pick = |x: u32, bit: u32| if row >> bit & 1 == 1 { x } else { !x };
                let wanted = (table >> row & 1).wrapping_neg();
                out |= wanted & pick(a, 2) & pick(b, 1) & pick(c, 0);
            }
            out
        }),

        ("popc", ["b32"]) => lanes!(|a: u32| -> u32 { a.count_ones() }),
        ("popc", ["b64"]) => lanes!(|a: u64| -> u32 { a.count_ones() }),
        ("clz", ["b32"]) => lanes!(|a: u32| -> u32 { a.leading_zeros() }),
        ("clz", ["b64"]) => lanes!(|a: u64| -> u32 { a.leading_zeros() }),
        ("brev", ["b32"]) => lanes!(|a: u32| -> u32 { a.reverse_bits() }),
        ("brev", ["b64"]) => lanes!(|a: u64| -> u64 { a.reverse_bits() }),
        ("bfind", ["u32"]) => lanes!(|a: u32| -> u32 { a.checked_ilog2().unwrap_or(!0) }),
        ("bfind", ["u64"]) => lanes!(|a: u64| -> u32 { a.checked_ilog2().unwrap_or(!0) }),
        ("bfind", ["s32"]) => lanes!(|a: i32| -> u32 { significant(a.into()) }),
        ("bfind", ["s64"]) => lanes!(|a: i64| -> u32 { significant(a) }),
        ("bfind", ["shiftamt", "u32"]) => {
            lanes!(|a: u32| -> u32 { a.checked_ilog2().map_or(!0, |bit| 31 - bit) })
        }
        ("bfe", ["u32"]) => {
            lanes!(|a: u32, at: u32, n: u32| -> u32 { extract(a.into(), at, n, 32, false) as u32 })
        }
        ("bfe", ["s32"]) => {
            lanes!(|a: u32, at: u32, n: u32| -> u32 { extract(a.into(), at, n, 32, true) as u32 })
        }
        ("bfe", ["u64"]) => {
            lanes!(|a: u64, at: u32, n: u32| -> u64 { extract(a, at, n, 64, false) })
        }
        ("bfe", ["s64"]) => {
            lanes!(|a: u64, at: u32, n: u32| -> u64 { extract(a, at, n, 64, true) })
        }
        ("bfi", ["b32"]) => lanes!(|a: u32, b: u32, at: u32, n: u32| -> u32 {
            insert(a.into(), b.into(), at, n, 32) as u32
        }),
        ("bfi", ["b64"]) => {
            lanes!(|a: u64, b: u64, at: u32, n: u32| -> u64 { insert(a, b, at, n, 64) })
        }
        ("prmt", ["b32"]) => lanes!(|a: u32, b: u32, selector: u32| -> u32 {
            let bytes = wide(a, b);
            let mut out = 0;
            for i in 0..4 {
                let nibble = selector >> (4 * i) & 0xF;
                let byte = (bytes >> (8 * (nibble & 7))) as u8;
                // The top bit of a selector replicates the sign.
                let byte = if nibble & 8 == 0 { byte } else { (byte as i8 >> 7) as u8 };
                out |= u32::from(byte) << (8 * i);
            }
            out
        }),

        ("mov", ["b16" | "u16" | "s16"]) => lanes!(|a: u16| -> u16 { a }),
        ("mov", ["b32" | "u32" | "s32" | "f32"]) => lanes!(|a: u32| -> u32 { a }),
        ("mov", ["b64" | "u64" | "s64" | "f64"]) => lanes!(|a: u64| -> u64 { a }),
        ("selp", ["b16" | "u16" | "s16"]) => {
            lanes!(|a: u16, b: u16, p: bool| -> u16 { if p { a } else { b } })
        }
        ("selp", ["b32" | "u32" | "s32" | "f32"]) => {
            lanes!(|a: u32, b: u32, p: bool| -> u32 { if p { a } else { b } })
        }
        ("selp", ["b64" | "u64" | "s64" | "f64"]) => {
            lanes!(|a: u64, b: u64, p: bool| -> u64 { if p { a } else { b } })
        }
        ("slct", ["b32" | "u32" | "s32" | "f32", "s32"]) => {
            lanes!(|a: u32, b: u32, c: i32| -> u32 { if c >= 0 { a } else { b } })
        }
        ("slct", ["b64" | "u64" | "s64" | "f64", "s32"]) => {
            lanes!(|a: u64, b: u64, c: i32| -> u64 { if c >= 0 { a } else { b } })
        }
        ("slct", ["b32" | "u32" | "s32" | "f32", "f32"]) => {
            lanes!(|a: u32, b: u32, c: f32| -> u32 { if c >= 0.0 { a } else { b } })
        }
        _ => None,
    }
}

/// Extended-precision adds and subtracts. Decoding appends the carry flag, a predicate register
/// of its own, as the last source.
fn carry(name: &str, mods: &[&str]) -> Option<Form> {
    macro_rules! chain {
        ($ty:ty, |$a:ident, $b:ident, $c:ident| $sum:expr, $sets:literal) => {{
            fn run(regs: &mut Regs, slots: &Slots, mask: u32) {
                let [a, b, flag, _] = slots.s;
                let (x, y) = (<$ty as Reg>::view(regs, a), <$ty as Reg>::view(regs, b));
                let carried = bool::view(regs, flag);
                let both: Lanes<($ty, bool)> = std::array::from_fn(|lane| {
                    let ($a, $b) = (<$ty as Reg>::get(x, lane), <$ty as Reg>::get(y, lane));
                    let $c = bool::get(carried, lane);
                    $sum
                });
                <$ty as Reg>::put(regs, slots.d, &both.map(|(sum, _)| sum), mask);
                if $sets {
                    bool::put(regs, flag, &both.map(|(_, out)| out), mask);
                }
            }
            let file = <$ty as Reg>::FILE;
            let src: &'static [_] =
                const { &[<$ty as Reg>::FILE, <$ty as Reg>::FILE, crate::registers::File::Pred] };
            Some(Form { run, dst: file, src })
        }};
    }
    match (name, mods) {
        ("add", ["cc", "u32" | "s32"]) => chain!(u32, |a, b, _c| a.overflowing_add(b), true),
        ("add", ["cc", "u64" | "s64"]) => chain!(u64, |a, b, _c| a.overflowing_add(b), true),
        ("addc", ["cc", "u32" | "s32"]) => chain!(u32, |a, b, c| a.carrying_add(b, c), true),
        ("addc", ["cc", "u64" | "s64"]) => chain!(u64, |a, b, c| a.carrying_add(b, c), true),
        ("addc", ["u32" | "s32"]) => chain!(u32, |a, b, c| a.carrying_add(b, c), false),
        ("addc", ["u64" | "s64"]) => chain!(u64, |a, b, c| a.carrying_add(b, c), false),
        ("sub", ["cc", "u32" | "s32"]) => chain!(u32, |a, b, _c| a.overflowing_sub(b), true),
        ("sub", ["cc", "u64" | "s64"]) => chain!(u64, |a, b, _c| a.overflowing_sub(b), true),
        ("subc", ["cc", "u32" | "s32"]) => chain!(u32, |a, b, c| a.borrowing_sub(b, c), true),
        ("subc", ["cc", "u64" | "s64"]) => chain!(u64, |a, b, c| a.borrowing_sub(b, c), true),
        ("subc", ["u32" | "s32"]) => chain!(u32, |a, b, c| a.borrowing_sub(b, c), false),
        ("subc", ["u64" | "s64"]) => chain!(u64, |a, b, c| a.borrowing_sub(b, c), false),
        _ => None,
    }
}

fn high_u32(a: u32, b: u32) -> u32 {
    (u64::from(a) * u64::from(b) >> 32) as u32
}

fn high_s32(a: i32, b: i32) -> i32 {
    (i64::from(a) * i64::from(b) >> 32) as i32
}

fn high_u64(a: u64, b: u64) -> u64 {
    (u128::from(a) * u128::from(b) >> 64) as u64
}

fn high_s64(a: i64, b: i64) -> i64 {
    (i128::from(a) * i128::from(b) >> 64) as i64
}

fn byte(x: u32, i: u32) -> u32 {
    x >> (8 * i) & 0xFF
}

fn signed_byte(x: u32, i: u32) -> i32 {
    i32::from((x >> (8 * i)) as i8)
}

fn wide(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

/// `bfind` of a signed value: the highest bit that differs from the sign.
fn significant(a: i64) -> u32 {
    ((if a < 0 { !a } else { a }) as u64).checked_ilog2().unwrap_or(!0)
}

/// `bfe`: bits [at, at + n) of a, of which only the low bytes of the numbers count.
fn extract(a: u64, at: u32, n: u32, width: u32, signed: bool) -> u64 {
    let (at, n) = (at & 0xFF, n & 0xFF);
    if n == 0 {
        return 0;
    }
    let top = (at + n - 1).min(width - 1);
    let sign = signed && a >> top & 1 == 1;
    let field = a.checked_shr(at).unwrap_or(0);
    let kept = if n >= 64 { !0 } else { (1 << n) - 1 };
    // Beyond the top of the value the sign goes on.
    let held = width.saturating_sub(at).min(n);
    let held = if held >= 64 { !0 } else { (1u64 << held) - 1 };
    field & kept & held | if sign { !(kept & held) } else { 0 }
}

/// `bfi`: b with its bits [at, at + n) replaced by the low bits of a.
fn insert(a: u64, b: u64, at: u32, n: u32, width: u32) -> u64 {
    let (at, n) = (at & 0xFF, n & 0xFF);
    if at >= width || n == 0 {
        return b;
    }
    let field = (if n >= 64 { !0 } else { (1u64 << n) - 1 }) << at;
    b & !field | a << at & field
}
