//! Whole families of forms in loops: every comparison, conversion, load, store and atomic.

// Meanings are spelled out: a shorter form might be the very method under test.
#![allow(clippy::manual_abs_diff, clippy::precedence)]

use std::cmp::Ordering;

use half::{bf16, f16};

use ptx_race::{Config, FaultKind, Memory, Options};

use crate::coverage;
use crate::forms::{Pair, Value, b, bits_of, ftz, fused, h, op1, op2, op3, run, sat};
use crate::forms::{absolute, angle, approximate_quotient, close1, close2, inverse_root, units};
use crate::nvcc::load as module;
use crate::reference::Random;

#[test]
pub fn integers() {
    macro_rules! each {
        ($($ty:ident $name:literal $unsigned:ident $wide:ident),*) => {$({
            let form = |name: &str| format!("{name}.{}", $name);
            op2(&form("add"), |a: $ty, b: $ty| (a as $wide + b as $wide) as $ty);
            op2(&form("sub"), |a: $ty, b: $ty| (a as $wide - b as $wide) as $ty);
            op2(&form("mul.lo"), |a: $ty, b: $ty| a.wrapping_mul(b));
            op2(&form("mul.hi"), |a: $ty, b: $ty| (a as $wide * b as $wide >> <$ty>::BITS) as $ty);
            op3(&form("mad.lo"), |a: $ty, b: $ty, c: $ty| a.wrapping_mul(b).wrapping_add(c));
            op2(&form("rem"), |a: $ty, b: $ty| {
                if b == 0 { a } else { (a as $wide % b as $wide) as $ty }
            });
            op3(&form("sad"), |a: $ty, b: $ty, c: $unsigned| {
                let (a, b) = (a as $wide, b as $wide);
                c.wrapping_add((if a > b { a - b } else { b - a }) as $unsigned)
            });
            if <$ty>::BITS > 16 {
                op3(&form("mad.hi"), |a: $ty, b: $ty, c: $ty| {
                    ((a as $wide * b as $wide >> <$ty>::BITS) as $ty).wrapping_add(c)
                });
                op2(
                    &format!("{{ .reg .b{0} %x; add.cc.{1} %x, $a, $b; addc.{1} $d, 0, 7; }}", <$ty>::BITS, $name),
                    |a: $ty, b: $ty| 7 + u64::from((a as $unsigned).checked_add(b as $unsigned).is_none()) as $ty,
                );
                op2(
                    &format!("{{ .reg .b{0} %x; add.cc.{1} %x, $a, $b; addc.cc.{1} %x, $a, $b; addc.{1} $d, 0, 7; }}", <$ty>::BITS, $name),
                    |a: $ty, b: $ty| {
                        let (_, first) = (a as $unsigned).overflowing_add(b as $unsigned);
                        let sum = u128::from(a as $unsigned) + u128::from(b as $unsigned) + u128::from(first);
                        7 + (sum >> <$ty>::BITS) as $ty
                    },
                );
                op2(
                    &format!("{{ .reg .b{0} %x; sub.cc.{1} %x, $a, $b; subc.{1} $d, 9, 7; }}", <$ty>::BITS, $name),
                    |a: $ty, b: $ty| 2 - ((a as $unsigned) < b as $unsigned) as $ty,
                );
                op2(
                    &format!("{{ .reg .b{0} %x; sub.cc.{1} %x, $a, $b; subc.cc.{1} %x, $a, $b; subc.{1} $d, 9, 7; }}", <$ty>::BITS, $name),
                    |a: $ty, b: $ty| {
                        let (a, b) = (a as $unsigned as i128, b as $unsigned as i128);
                        2 - (a - b - i128::from(a < b) < 0) as $ty
                    },
                );
            }
        })*};
    }
    each!(u16 "u16" u16 i128, i16 "s16" u16 i128, u32 "u32" u32 i128, i32 "s32" u32 i128);
    each!(i64 "s64" u64 i128);
    // Products of two u64 fill an u128.
    op2("add.u64", |a: u64, b: u64| (u128::from(a) + u128::from(b)) as u64);
    op3("mad.lo.u64", |a: u64, b: u64, c: u64| a.wrapping_mul(b).wrapping_add(c));
    op2("mul.lo.s64", |a: i64, b: i64| (i128::from(a) * i128::from(b)) as i64);
    op3("mad.hi.u64", |a: u64, b: u64, c: u64| {
        ((u128::from(a) * u128::from(b) >> 64) as u64).wrapping_add(c)
    });
    op3("sad.u64", |a: u64, b: u64, c: u64| c.wrapping_add(if a > b { a - b } else { b - a }));
    op2(
        "{ .reg .b64 %x; sub.cc.u64 %x, $a, $b; subc.cc.u64 %x, $a, $b; subc.u64 $d, 9, 7; }",
        |a: u64, b: u64| 2 - u64::from(i128::from(a) - i128::from(b) - i128::from(a < b) < 0),
    );
    op2("{ .reg .b64 %x; add.cc.u64 %x, $a, $b; addc.u64 $d, 0, 7; }", |a: u64, b: u64| {
        7 + u64::from(a.checked_add(b).is_none())
    });
    op3("mad.wide.s16", |a: i16, b: i16, c: i32| (i32::from(a) * i32::from(b)).wrapping_add(c));
    let low = |x: i32| i64::from(x) << 40 >> 40;
    op2("mul24.lo.s32", |a: i32, b: i32| (low(a) * low(b)) as i32);
    let bytes = |x: u32| x.to_le_bytes();
    op3("dp4a.u32.s32", |a: u32, b: u32, c: i32| {
        (0..4).fold(c, |s, i| s.wrapping_add(i32::from(bytes(a)[i]) * i32::from(bytes(b)[i] as i8)))
    });
    op3("dp4a.s32.u32", |a: u32, b: u32, c: i32| {
        (0..4).fold(c, |s, i| s.wrapping_add(i32::from(bytes(a)[i] as i8) * i32::from(bytes(b)[i])))
    });
    op1("cnot.b16", |a: u16| u16::from(a == 0));
    op1("cnot.b64", |a: u64| u64::from(a == 0));
    op2("shr.b16", |a: u16, n: u32| if n > 15 { 0 } else { a >> n });
    op2("shr.b32", |a: u32, n: u32| if n > 31 { 0 } else { a >> n });
    op2("shr.u64", |a: u64, n: u32| if n > 63 { 0 } else { a >> n });
    op1("bfind.u64", |a: u64| (0..64).rev().find(|i| a >> i & 1 == 1).unwrap_or(u32::MAX));
    op1("bfind.s64", |a: i64| {
        (0..63).rev().find(|i| a >> i & 1 != a >> 63 & 1).unwrap_or(u32::MAX)
    });
}

#[test]
pub fn moves_and_selects() {
    macro_rules! each {
        ($($ty:ty: $($name:literal),*);*) => {$($(
            op1(&format!("mov.{}", $name), |a: $ty| a);
            op3(&format!("selp.{}", $name), |a: $ty, b: $ty, p: bool| if p { a } else { b });
        )*)*};
    }
    each!(u16: "b16", "u16", "s16"; u32: "b32", "u32", "s32", "f32"; u64: "b64", "u64", "s64", "f64");
    for ty in ["b32", "u32", "s32", "f32"] {
        op3(&format!("slct.{ty}.s32"), |a: u32, b: u32, c: i32| if c < 0 { b } else { a });
        op3(&format!("slct.{ty}.f32"), |a: u32, b: u32, c: f32| if c >= 0.0 { a } else { b });
    }
    for ty in ["b64", "u64", "s64", "f64"] {
        op3(&format!("slct.{ty}.s32"), |a: u64, b: u64, c: i32| if c < 0 { b } else { a });
    }
}

/// What a comparison says of an ordering, which NaN has none of.
fn holds(comparison: &str, order: Option<Ordering>) -> bool {
    use Ordering::{Equal, Greater, Less};
    match comparison {
        "eq" => order == Some(Equal),
        "ne" => matches!(order, Some(Less | Greater)),
        "lt" | "lo" => order == Some(Less),
        "le" | "ls" => matches!(order, Some(Less | Equal)),
        "gt" | "hi" => order == Some(Greater),
        "ge" | "hs" => matches!(order, Some(Greater | Equal)),
        "equ" => matches!(order, None | Some(Equal)),
        "neu" => order != Some(Equal),
        "ltu" => matches!(order, None | Some(Less)),
        "leu" => order != Some(Greater),
        "gtu" => matches!(order, None | Some(Greater)),
        "geu" => order != Some(Less),
        "num" => order.is_some(),
        "nan" => order.is_none(),
        _ => panic!("{comparison}"),
    }
}

const SIGNED: [&str; 6] = ["eq", "ne", "lt", "le", "gt", "ge"];
const UNSIGNED: [&str; 4] = ["lo", "ls", "hi", "hs"];
const UNORDERED: [&str; 8] = ["equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"];

fn compare<T: Value>(names: &[&str], ty: &str, order: fn(T, T) -> Option<Ordering>) {
    for name in names {
        op2(&format!("setp.{name}.{ty}"), |a: T, b: T| holds(name, order(a, b)));
        op3(&format!("setp.{name}.and.{ty}"), |a: T, b: T, p: bool| holds(name, order(a, b)) && p);
        op3(&format!("setp.{name}.or.{ty}"), |a: T, b: T, p: bool| holds(name, order(a, b)) || p);
        op3(&format!("setp.{name}.xor.{ty}"), |a: T, b: T, p: bool| holds(name, order(a, b)) != p);
    }
}

fn set<T: Value>(names: &[&str], ty: &str, flag: &str, order: fn(T, T) -> Option<Ordering>) {
    for name in names {
        for out in ["u32", "s32"] {
            op2(&format!("set.{name}{flag}.{out}.{ty}"), |a: T, b: T| {
                if holds(name, order(a, b)) { u32::MAX } else { 0 }
            });
        }
        op2(&format!("set.{name}{flag}.f32.{ty}"), |a: T, b: T| {
            if holds(name, order(a, b)) { 1f32 } else { 0.0 }
        });
    }
}

#[test]
pub fn comparisons() {
    macro_rules! integers {
        ($($ty:ty, $name:literal, $unsigned:literal);*) => {$(
            compare::<$ty>(&SIGNED, $name, |a, b| Some(a.cmp(&b)));
            if $unsigned {
                compare::<$ty>(&UNSIGNED, $name, |a, b| Some(a.cmp(&b)));
                let bits = $name.replace('u', "b");
                compare::<$ty>(&["eq", "ne"], &bits, |a, b| Some(a.cmp(&b)));
            }
        )*};
    }
    integers!(i16, "s16", false; i32, "s32", false; i64, "s64", false);
    integers!(u16, "u16", true; u32, "u32", true; u64, "u64", true);
    let all = [&SIGNED[..], &UNORDERED].concat();
    let flushed = |a: f32, b: f32| ftz(a).partial_cmp(&ftz(b));
    compare::<f32>(&all, "f32", |a, b| a.partial_cmp(&b));
    compare::<f32>(&all, "ftz.f32", flushed);
    compare::<f64>(&all, "f64", |a, b| a.partial_cmp(&b));
    compare::<f16>(&all, "f16", |a, b| a.partial_cmp(&b));
    compare::<bf16>(&all, "bf16", |a, b| a.partial_cmp(&b));
    set::<i32>(&SIGNED, "s32", "", |a, b| Some(a.cmp(&b)));
    set::<u32>(&SIGNED, "u32", "", |a, b| Some(a.cmp(&b)));
    set::<f32>(&all, "f32", "", |a, b| a.partial_cmp(&b));
    set::<f32>(&all, "f32", ".ftz", flushed);
    for name in &all[..12] {
        if *name == "equ" {
            continue;
        }
        op2(&format!("set.{name}.f16x2.f16x2"), |a: Pair<f16>, b: Pair<f16>| {
            let one = |a: f16, b: f16| f16::from_f32(holds(name, a.partial_cmp(&b)).into_f32());
            Pair(one(a.0, b.0), one(a.1, b.1))
        });
        op2(&format!("set.{name}.bf16x2.bf16x2"), |a: Pair<bf16>, b: Pair<bf16>| {
            let one = |a: bf16, b: bf16| bf16::from_f32(holds(name, a.partial_cmp(&b)).into_f32());
            Pair(one(a.0, b.0), one(a.1, b.1))
        });
    }
    op1("testp.number.f32", |a: f32| !a.is_nan());
    op1("testp.normal.f32", |a: f32| a.is_normal() || a == 0.0);
}

trait IntoF32 {
    fn into_f32(self) -> f32;
}
impl IntoF32 for bool {
    fn into_f32(self) -> f32 {
        f32::from(u8::from(self))
    }
}

/// A float format by its name: bits, and the pattern of infinity.
fn format_of(ty: &str) -> (u32, u64) {
    match ty {
        "f16" => (16, 0x7C00),
        "bf16" => (16, 0x7F80),
        "f32" => (32, 0x7F80_0000),
        _ => (64, 0x7FF0_0000_0000_0000),
    }
}

fn wide(ty: &str, bits: u64) -> f64 {
    match ty {
        "f16" => f16::from_bits(bits as u16).to_f64(),
        "bf16" => bf16::from_bits(bits as u16).to_f64(),
        "f32" => f32::from_bits(bits as u32).into(),
        _ => f64::from_bits(bits),
    }
}

/// Exactly `high + low`, rounded to a format: the largest magnitude not above it, or the next.
fn rounded(ty: &str, high: f64, low: f64, mode: &str) -> u64 {
    let (width, infinity) = format_of(ty);
    let negative = high.is_sign_negative();
    let sign = u64::from(negative) << (width - 1);
    if high.is_nan() {
        return infinity + 1;
    }
    if high == 0.0 || high.is_infinite() {
        return sign | if high == 0.0 { 0 } else { infinity };
    }
    let low = if negative { -low } else { low };
    // Beyond the largest number lies what would follow it.
    let value = |bits: u64| {
        if bits < infinity {
            return wide(ty, bits);
        }
        wide(ty, infinity - 1) + (wide(ty, infinity - 1) - wide(ty, infinity - 2))
    };
    let against = |x: f64| (x - high.abs()).partial_cmp(&low).expect("numbers");
    let (mut below, mut above) = (0, infinity);
    while above - below > 1 {
        let middle = below.midpoint(above);
        if against(value(middle)).is_le() { below = middle } else { above = middle }
    }
    let up = match mode {
        _ if against(value(below)).is_eq() => false,
        "rz" => false,
        "rp" => !negative,
        "rm" => negative,
        _ => {
            let half = (value(above) - value(below)) / 2.0;
            match (half - (high.abs() - value(below))).partial_cmp(&low).expect("numbers") {
                Ordering::Less => true,
                Ordering::Equal => below % 2 == 1,
                Ordering::Greater => false,
            }
        }
    };
    sign | if up { above } else { below }
}

fn sum(a: f64, b: f64) -> (f64, f64) {
    let s = a + b;
    if !s.is_finite() {
        return (s, 0.0);
    }
    let (large, small) = if a.abs() > b.abs() { (a, b) } else { (b, a) };
    (s, small - (s - large))
}

fn quotient(a: f64, b: f64) -> (f64, f64) {
    let q = a / b;
    if q == 0.0 || !q.is_finite() || b.is_infinite() {
        (q, 0.0)
    } else {
        (q, (-q).mul_add(b, a) / b)
    }
}

fn root(a: f64) -> (f64, f64) {
    let r = a.sqrt();
    if r > 0.0 && r.is_finite() { (r, (-r).mul_add(r, a) / (2.0 * r)) } else { (r, 0.0) }
}

#[test]
pub fn single_precision() {
    for mode in ["", ".rn", ".rz", ".rm", ".rp"] {
        for flags in ["", ".ftz", ".sat", ".ftz.sat"] {
            let form = |name: &str| format!("{name}{mode}{flags}.f32");
            let flush = |x: f32| if flags.contains("ftz") { ftz(x) } else { x };
            let f = |x: f32| f64::from(flush(x));
            let end = |(high, low): (f64, f64)| {
                let x = flush(f32::of(rounded("f32", high, low, mode.trim_start_matches('.'))));
                if flags.contains("sat") { sat(x) } else { x }
            };
            // Toward minus infinity an exact zero is negative, unless both addends are +0.
            let sum = |a: f64, b: f64| match sum(a, b) {
                (0.0, low) if mode == ".rm" && (a.is_sign_negative() || b.is_sign_negative()) => {
                    (-0.0, low)
                }
                exact => exact,
            };
            op2(&form("add"), |a: f32, b: f32| end(sum(f(a), f(b))));
            op2(&form("sub"), |a: f32, b: f32| end(sum(f(a), -f(b))));
            op2(&form("mul"), |a: f32, b: f32| end((f(a) * f(b), 0.0)));
            if mode.is_empty() {
                continue;
            }
            op3(&form("fma"), |a: f32, b: f32, c: f32| end(sum(f(a) * f(b), f(c))));
            if flags.contains("sat") {
                continue;
            }
            op2(&form("div"), |a: f32, b: f32| end(quotient(f(a), f(b))));
            op1(&form("rcp"), |a: f32| end(quotient(1.0, f(a))));
            op1(&form("sqrt"), |a: f32| end(root(f(a))));
        }
    }
    close2("div.approx.ftz.f32", approximate_quotient);
    close2("div.full.ftz.f32", |a, b| a / b);
    close1("rcp.approx.ftz.f32", units(1.0), f64::recip);
    close1("sqrt.approx.ftz.f32", units(1.0), f64::sqrt);
    close1("rsqrt.approx.ftz.f32", units(2.0), inverse_root);
    close1("lg2.approx.ftz.f32", absolute(0.5f64.powi(22)), f64::log2);
    close1("sin.approx.ftz.f32", angle, f64::sin);
    close1("cos.approx.ftz.f32", angle, f64::cos);
    let pick = |a: f32, b: f32, larger: bool| match a.partial_cmp(&b) {
        None => {
            if a.is_nan() {
                b
            } else {
                a
            }
        }
        // Equal: -0 is below +0.
        Some(Ordering::Equal) => {
            if a.is_sign_negative() == larger {
                b
            } else {
                a
            }
        }
        Some(order) => {
            if (order == Ordering::Greater) == larger {
                a
            } else {
                b
            }
        }
    };
    for (name, larger) in [("min", false), ("max", true)] {
        op2(&format!("{name}.ftz.f32"), |a, b| pick(ftz(a), ftz(b), larger));
        op2(&format!("{name}.ftz.NaN.f32"), |a: f32, b: f32| {
            if a.is_nan() || b.is_nan() { f32::NAN } else { pick(ftz(a), ftz(b), larger) }
        });
    }
    for rn in ["", ".rn"] {
        op2(&format!("add{rn}.f64"), |a: f64, b: f64| a + b);
        op2(&format!("sub{rn}.f64"), |a: f64, b: f64| a - b);
        op2(&format!("mul{rn}.f64"), |a: f64, b: f64| a * b);
    }
    op2("copysign.f64", |a: f64, b: f64| if a.is_sign_negative() { -b.abs() } else { b.abs() });
    op1("rsqrt.approx.f64", |a: f64| 1.0 / a.sqrt());
}

fn pairs<T: Value>(x: Pair<T>, y: Pair<T>, f: impl Fn(T, T) -> T) -> Pair<T> {
    Pair(f(x.0, y.0), f(x.1, y.1))
}

#[test]
pub fn half_precision() {
    let one = |x: f16| h(f64::from(sat(x.to_f32())));
    for rn in ["", ".rn"] {
        for (name, f) in [
            ("add", (|x, y| x + y) as fn(f64, f64) -> f64),
            ("sub", |x, y| x - y),
            ("mul", |x, y| x * y),
        ] {
            let half = |x: f16, y: f16| h(f(x.to_f64(), y.to_f64()));
            let brain = |x: bf16, y: bf16| b(f(x.to_f64(), y.to_f64()));
            op2(&format!("{name}{rn}.f16"), half);
            op2(&format!("{name}{rn}.sat.f16"), |x, y| one(half(x, y)));
            op2(&format!("{name}{rn}.f16x2"), |x, y| pairs(x, y, half));
            op2(&format!("{name}{rn}.sat.f16x2"), |x, y| pairs(x, y, |x, y| one(half(x, y))));
            op2(&format!("{name}{rn}.bf16"), brain);
            op2(&format!("{name}{rn}.bf16x2"), |x, y| pairs(x, y, brain));
        }
    }
    let half = |x: f16, y: f16, z: f16| h(fused(x.to_f64(), y.to_f64(), z.to_f64()));
    let brain = |x: bf16, y: bf16, z: bf16| {
        let r = b(fused(x.to_f64(), y.to_f64(), z.to_f64()));
        if r <= bf16::ZERO { bf16::ZERO } else { r }
    };
    let relu = |x: f16| if x <= f16::ZERO { f16::ZERO } else { x };
    op3("fma.rn.sat.f16", |x, y, z| one(half(x, y, z)));
    op3("fma.rn.relu.f16", |x, y, z| relu(half(x, y, z)));
    op3("fma.rn.sat.f16x2", |x: Pair<f16>, y: Pair<f16>, z: Pair<f16>| {
        Pair(one(half(x.0, y.0, z.0)), one(half(x.1, y.1, z.1)))
    });
    op3("fma.rn.relu.f16x2", |x: Pair<f16>, y: Pair<f16>, z: Pair<f16>| {
        Pair(relu(half(x.0, y.0, z.0)), relu(half(x.1, y.1, z.1)))
    });
    op3("fma.rn.relu.bf16x2", |x: Pair<bf16>, y: Pair<bf16>, z: Pair<bf16>| {
        Pair(brain(x.0, y.0, z.0), brain(x.1, y.1, z.1))
    });
    op1("neg.f16", |x: u16| x ^ 0x8000);
    op1("abs.bf16", |x: u16| x & 0x7FFF);
    op1("neg.bf16x2", |x: u32| x ^ 0x8000_8000);
    op1("abs.f16x2", |x: u32| x & 0x7FFF_7FFF);
    macro_rules! extremes {
        ($ty:ty, $name:literal) => {
            for (form, larger, nan) in [
                ("min", false, false),
                ("max", true, false),
                ("min.NaN", false, true),
                ("max.NaN", true, true),
            ] {
                let pick = move |x: $ty, y: $ty| match x.partial_cmp(&y) {
                    None if nan => <$ty>::NAN,
                    None => {
                        if x.is_nan() {
                            y
                        } else {
                            x
                        }
                    }
                    Some(Ordering::Equal) => {
                        if x.is_sign_negative() == larger {
                            y
                        } else {
                            x
                        }
                    }
                    Some(order) => {
                        if (order == Ordering::Greater) == larger {
                            x
                        } else {
                            y
                        }
                    }
                };
                op2(&format!("{form}.{}", $name), pick);
                op2(&format!("{form}.{}x2", $name), |x, y| pairs(x, y, pick));
            }
        };
    }
    extremes!(f16, "f16");
    extremes!(bf16, "bf16");
    let each = |f: fn(f64) -> f64| {
        (
            move |x: Pair<f16>| Pair(h(f(x.0.to_f64())), h(f(x.1.to_f64()))),
            move |x: Pair<bf16>| Pair(b(f(x.0.to_f64())), b(f(x.1.to_f64()))),
        )
    };
    op1("tanh.approx.bf16", |x: bf16| b(x.to_f64().tanh()));
    op1("tanh.approx.f16x2", each(f64::tanh).0);
    op1("tanh.approx.bf16x2", each(f64::tanh).1);
    op1("ex2.approx.f16x2", each(f64::exp2).0);
    op1("ex2.approx.ftz.bf16x2", each(f64::exp2).1);
}

/// Signedness and bits of an integer type.
fn integer(ty: &str) -> (bool, u32) {
    (ty.starts_with('s'), ty[1..].parse().expect("a width"))
}

fn value_of(ty: &str, bits: u64) -> i128 {
    let (signed, width) = integer(ty);
    let value = i128::from(bits & (u64::MAX >> (64 - width)));
    if signed && value >> (width - 1) & 1 == 1 { value - (1 << width) } else { value }
}

/// Bits of the register a type is held in: bytes travel in 32.
fn register(ty: &str) -> u32 {
    match ty {
        "u8" | "s8" => 32,
        ty if ty.starts_with(['u', 's']) => integer(ty).1,
        ty => format_of(ty).0,
    }
}

fn clamped(ty: &str, value: i128) -> i128 {
    let (signed, width) = integer(ty);
    if signed {
        value.clamp(-(1 << (width - 1)), (1 << (width - 1)) - 1)
    } else {
        value.clamp(0, (1 << width) - 1)
    }
}

/// A value cut to a type and extended into its register.
fn held(ty: &str, value: i128) -> u64 {
    value_of(ty, value as u64) as u64 & (u64::MAX >> (64 - register(ty)))
}

fn convert(form: &str, to: &str, from: &str, meaning: impl Fn(u64) -> u64) {
    let mut random = Random::new(21);
    let mut inputs = match from {
        "f16" => bits_of::<f16>(&mut random),
        "bf16" => bits_of::<bf16>(&mut random),
        "f32" => bits_of::<f32>(&mut random),
        "f64" => bits_of::<f64>(&mut random),
        _ => bits_of::<u64>(&mut random),
    };
    let mask = u64::MAX >> (64 - register(from));
    inputs.extend((0..64).flat_map(|shift| [1 << shift, (1u64 << shift) - 1, !0 << shift]));
    inputs.extend((0..64).map(|_| random.bits() >> (random.bits() % 60)));
    // Floats of every size an integer can have, and halves.
    if let "f32" | "f64" = from {
        let wide = from == "f64";
        inputs.extend((0..140).map(|i| {
            let x = (f64::from(i) - 70.0) / 2.0 * 3f64.powi(i / 4);
            if wide { x.to_bits() } else { (x as f32).to_bits().into() }
        }));
    }
    let rows: Vec<Vec<u64>> = inputs.iter().map(|bits| vec![bits & mask]).collect();
    let got = run(form, &[(register(from), false)], (register(to), false), &rows);
    for (row, got) in rows.iter().zip(got) {
        let wanted = meaning(row[0]);
        let nan = |bits| to.contains('f') && wide(to, bits).is_nan();
        let same = got == wanted || nan(got) && nan(wanted);
        assert!(same, "{form} of {:#x}: {got:#x}, wanted {wanted:#x}", row[0]);
    }
}

fn whole(mode: &str, x: f64) -> f64 {
    match mode {
        "rni" => x.round_ties_even(),
        "rzi" => x.trunc(),
        "rmi" => x.floor(),
        _ => x.ceil(),
    }
}

const INTEGERS: [&str; 8] = ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"];
const FLOATS: [&str; 4] = ["f16", "bf16", "f32", "f64"];

#[test]
pub fn conversions() {
    for from in INTEGERS {
        for to in INTEGERS {
            convert(&format!("cvt.{to}.{from}"), to, from, |x| held(to, value_of(from, x)));
            convert(&format!("cvt.sat.{to}.{from}"), to, from, |x| {
                held(to, clamped(to, value_of(from, x)))
            });
        }
        for to in FLOATS {
            for mode in ["rn", "rz", "rm", "rp"] {
                convert(&format!("cvt.{mode}.{to}.{from}"), to, from, |x| {
                    let value = value_of(from, x);
                    let high = value as f64;
                    rounded(to, high, (value - high as i128) as f64, mode)
                });
            }
        }
    }
    let flushed = |x: f64| f64::from(ftz(x as f32));
    for from in FLOATS {
        for mode in ["rni", "rzi", "rmi", "rpi"] {
            for flags in ["", ".sat", ".ftz", ".ftz.sat"] {
                let ftz = flags.contains("ftz");
                if ftz && from != "f32" {
                    continue;
                }
                let read = |x| if ftz { flushed(wide(from, x)) } else { wide(from, x) };
                for to in INTEGERS {
                    convert(&format!("cvt.{mode}{flags}.{to}.{from}"), to, from, |x| {
                        let x = read(x);
                        let (_, width) = integer(to);
                        match (x.is_nan(), from == "f64" || width == 64) {
                            // The ISA's table of what NaN becomes.
                            (true, true) => held(to, 1 << (width - 1)),
                            (true, false) => 0,
                            _ => held(to, clamped(to, whole(mode, x) as i128)),
                        }
                    });
                }
                if from == "f32" {
                    convert(&format!("cvt.{mode}{flags}.f32.f32"), from, from, |x| {
                        let x = whole(mode, read(x)) as f32;
                        if flags.contains("sat") { sat(x) } else { x }.bits()
                    });
                }
            }
            if from == "f16" || from == "f64" {
                convert(&format!("cvt.{mode}.{from}.{from}"), from, from, |x| {
                    rounded(from, whole(mode, wide(from, x)), 0.0, "rn")
                });
            }
        }
    }
    for flags in ["", ".ftz", ".sat", ".ftz.sat"] {
        let flush = |x: f32| if flags.contains("ftz") { ftz(x) } else { x };
        let end = |x: f32| if flags.contains("sat") { sat(flush(x)) } else { flush(x) }.bits();
        for from in ["f32", "f16"] {
            convert(&format!("cvt{flags}.f32.{from}"), "f32", from, |x| end(wide(from, x) as f32));
        }
        for mode in ["rn", "rz", "rm", "rp"] {
            convert(&format!("cvt.{mode}{flags}.f32.f64"), "f32", "f64", |x| {
                end(f32::of(rounded("f32", wide("f64", x), 0.0, mode)))
            });
        }
    }
    for (form, to, from) in [
        ("f32.bf16", "f32", "bf16"),
        ("f64.f16", "f64", "f16"),
        ("f64.bf16", "f64", "bf16"),
        ("f64.f32", "f64", "f32"),
    ] {
        convert(&format!("cvt.{form}"), to, from, |x| rounded(to, wide(from, x), 0.0, "rn"));
    }
    convert("cvt.ftz.f64.f32", "f64", "f32", |x| flushed(wide("f32", x)).to_bits());
    for from in ["f32", "f64"] {
        for mode in ["rn", "rz", "rm", "rp"] {
            convert(&format!("cvt.{mode}.f16.{from}"), "f16", from, |x| {
                rounded("f16", wide(from, x), 0.0, mode)
            });
        }
    }
    let relu = |x: f64| if x <= 0.0 { 0.0 } else { x };
    for mode in ["rn", "rz"] {
        let small = |ty: &'static str| move |x: f64| rounded(ty, x, 0.0, mode);
        convert(&format!("cvt.{mode}.bf16.f32"), "bf16", "f32", |x| small("bf16")(wide("f32", x)));
        for ty in ["f16", "bf16"] {
            convert(&format!("cvt.{mode}.relu.{ty}.f32"), ty, "f32", |x| {
                rounded(ty, relu(wide("f32", x)), 0.0, mode)
            });
        }
    }
    op2("cvt.rn.relu.f16x2.f32", |high: f32, low: f32| {
        Pair(h(relu(low.into())), h(relu(high.into())))
    });
    op2("cvt.rz.f16x2.f32", |high: f32, low: f32| {
        Pair(low, high).map(|x| f16::of(rounded("f16", x.into(), 0.0, "rz")))
    });
    for (mode, half) in [("rn", 0x1000u32), ("rz", 0)] {
        op1(&format!("cvt.{mode}.tf32.f32"), |a: f32| {
            if !a.is_finite() {
                return a;
            }
            let bits = a.to_bits();
            let tie = half != 0 && bits & 0x1FFF == half && bits >> 13 & 1 == 0;
            f32::from_bits(if tie { bits } else { bits.wrapping_add(half) } & !0x1FFF)
        });
    }
}

/// Where a thread of the harness keeps 16 bytes of its own: declarations, and the address.
fn place(space: &str) -> String {
    let own = |name: &str, size: u32, index: &str| {
        format!(
            ".reg .b64 %m; .{name} .align 16 .b8 m[{size}]; mov.u64 %m, m; mad.wide.u32 %m, {index}, 16, %m;"
        )
    };
    match space {
        ".shared" => own("shared", 1024, "%r3"),
        ".local" => ".reg .b64 %m; .local .align 16 .b8 m[16]; mov.u64 %m, m;".into(),
        ".param" => ".param .align 16 .b8 m[16];".into(),
        _ => own("global", 32768, "%r1"),
    }
}

const NARROW: [(&str, usize); 10] = [
    ("b8", 1),
    ("u8", 1),
    ("s8", 1),
    ("b16", 2),
    ("u16", 2),
    ("s16", 2),
    ("b32", 4),
    ("u32", 4),
    ("s32", 4),
    ("f32", 4),
];
const WIDE: [(&str, usize); 4] = [("b64", 8), ("u64", 8), ("s64", 8), ("f64", 8)];

fn memory_bytes(a: u64, b: u64) -> u128 {
    u128::from(a) | u128::from(b) << 64
}

#[test]
pub fn loads_and_stores() {
    for space in ["", ".global", ".shared", ".local", ".param", ".const"] {
        let mut semantics = vec![""];
        if !matches!(space, ".param" | ".const") {
            semantics.push(".volatile");
        }
        if matches!(space, "" | ".global" | ".shared") {
            semantics.extend([".relaxed.gpu", ".acquire.gpu", ".release.gpu"]);
        }
        let base = if space == ".param" { "m" } else { "%m" };
        for semantic in semantics {
            for (ty, size) in NARROW.into_iter().chain(WIDE) {
                for count in [1, 2, 4] {
                    if count * size > 16 || count > 1 && semantic.contains("gpu") {
                        continue;
                    }
                    let vector = if count == 1 { String::new() } else { format!(".v{count}") };
                    let form = format!("{semantic}{space}{vector}.{ty}");
                    if semantic != ".release.gpu" {
                        load(&form, space, base, ty, size, count);
                    }
                    if semantic != ".acquire.gpu" && space != ".const" {
                        store(&form, space, base, size, count);
                    }
                }
            }
        }
    }
}

fn load(form: &str, space: &str, base: &str, ty: &str, size: usize, count: usize) {
    let (setup, fixed) = if space == ".const" {
        let bytes: Vec<String> = (0..16u32).map(|i| (131 + 23 * i & 255).to_string()).collect();
        let text = format!(
            ".reg .b64 %m; .const .align 16 .b8 m[16] = {{{}}}; mov.u64 %m, m;",
            bytes.join(", ")
        );
        (text, Some((0..16).fold(0u128, |w, i| w | u128::from(131 + 23 * i & 255u32) << (8 * i))))
    } else {
        let text =
            format!("{} st{space}.b64 [{base}], $a; st{space}.b64 [{base}+8], $b;", place(space));
        (text, None)
    };
    let bits = if size == 8 { 64 } else { 32 };
    for at in 0..count {
        let list: Vec<String> =
            (0..count).map(|i| if i == at { "$d".into() } else { format!("%x{i}") }).collect();
        let to = if count == 1 { "$d".into() } else { format!("{{{}}}", list.join(", ")) };
        let body = format!("{{ .reg .b{bits} %x<4>; {setup} ld{form} {to}, [{base}]; }}");
        let element = |a: u64, b: u64| {
            let bytes = fixed.unwrap_or(memory_bytes(a, b)) >> (8 * size * at);
            let value = bytes as u64 & (u64::MAX >> (64 - 8 * size));
            // Only `s` types extend the sign.
            let negative = ty.starts_with('s') && value >> (8 * size - 1) == 1;
            if negative && size < 8 { value | u64::MAX << (8 * size) } else { value }
        };
        if size == 8 {
            op2(&body, element);
        } else {
            op2(&body, |a: u64, b: u64| element(a, b) as u32);
        }
    }
}

fn store(form: &str, space: &str, base: &str, size: usize, count: usize) {
    let values = if size == 8 { ["$a", "$b", "", ""] } else { ["%x0", "%x1", "%x2", "%x3"] };
    let list = values[..count].join(", ");
    let list = if count == 1 { list } else { format!("{{{list}}}") };
    for half in [0, 8] {
        let body = format!(
            "{{ .reg .b32 %x<4>; mov.b64 {{%x0, %x1}}, $a; mov.b64 {{%x2, %x3}}, $b; {}
            st{space}.b64 [{base}], 0x5555555555555555; st{space}.b64 [{base}+8], 0x5555555555555555;
            st{form} [{base}], {list}; ld{space}.b64 $d, [{base}+{half}]; }}",
            place(space)
        );
        op2(&body, |a: u64, b: u64| {
            let parts = memory_bytes(a, b);
            let mut bytes = [0x55u8; 16];
            for i in 0..count {
                let part = parts >> (i * if size == 8 { 64 } else { 32 });
                bytes[i * size..][..size].copy_from_slice(&part.to_le_bytes()[..size]);
            }
            u64::from_le_bytes(bytes[half..half + 8].try_into().expect("eight bytes"))
        });
    }
}

/// What an atomic leaves, and that it returns what was there.
fn atomic<T: Value>(op: &str, reduces: bool, f: impl Fn(T, T) -> T) {
    atomic_in(["", ".global", ".shared"], op, reduces, f);
}

fn atomic_in<T: Value, const N: usize>(
    spaces: [&str; N],
    op: &str,
    reduces: bool,
    f: impl Fn(T, T) -> T,
) {
    for space in spaces {
        for semantic in ["", ".acquire.gpu", ".release.gpu", ".acq_rel.gpu"] {
            let base = format!("{} st{space}.b{} [%m], $a;", place(space), T::BITS);
            let (bits, third) = (T::BITS, if op.starts_with("cas") { ", 7" } else { "" });
            let left = format!("ld{space}.b{bits} $d, [%m];");
            op2(
                &format!(
                    "{{ {base} .reg .b{bits} %x; atom{semantic}{space}.{op} %x, [%m], $b{third}; {left} }}"
                ),
                &f,
            );
            op2(
                &format!("{{ {base} atom{semantic}{space}.{op} $d, [%m], $b{third}; }}"),
                |a: T, _: T| a,
            );
            if reduces && !semantic.contains("ac") {
                op2(&format!("{{ {base} red{semantic}{space}.{op} [%m], $b; {left} }}"), &f);
            }
        }
    }
}

#[test]
pub fn atomics() {
    atomic("add.u32", true, |a: u32, b: u32| a.wrapping_add(b));
    atomic("add.s32", true, |a: i32, b: i32| a.wrapping_add(b));
    atomic("add.u64", true, |a: u64, b: u64| a.wrapping_add(b));
    // In global memory subnormals are flushed.
    let flushed = |a: f32, b: f32| ftz(ftz(a) + ftz(b));
    atomic_in(["", ".global"], "add.f32", true, flushed);
    atomic_in([".shared"], "add.f32", true, |a: f32, b: f32| a + b);
    atomic("add.f64", true, |a: f64, b: f64| a + b);
    let half = |a: f16, b: f16| h(a.to_f64() + b.to_f64());
    let brain = |x: bf16, y: bf16| b(x.to_f64() + y.to_f64());
    atomic("add.noftz.f16", true, half);
    atomic("add.noftz.bf16", true, brain);
    atomic("add.noftz.f16x2", true, |a, b| pairs(a, b, half));
    atomic("add.noftz.bf16x2", true, |a, b| pairs(a, b, brain));
    atomic("exch.b32", false, |_: u32, b: u32| b);
    atomic("exch.b64", false, |_: u64, b: u64| b);
    atomic("cas.b16", false, |a: u16, b: u16| if a == b { 7 } else { a });
    atomic("cas.b32", false, |a: u32, b: u32| if a == b { 7 } else { a });
    atomic("cas.b64", false, |a: u64, b: u64| if a == b { 7 } else { a });
    atomic("inc.u32", true, |a: u32, b: u32| if a >= b { 0 } else { a + 1 });
    atomic("dec.u32", true, |a: u32, b: u32| if a == 0 || a > b { b } else { a - 1 });
    macro_rules! ordered {
        ($($ty:ty, $name:literal);*) => {$(
            atomic(concat!("min.", $name), true, |a: $ty, b: $ty| if a < b { a } else { b });
            atomic(concat!("max.", $name), true, |a: $ty, b: $ty| if a > b { a } else { b });
        )*};
    }
    ordered!(u32, "u32"; i32, "s32"; u64, "u64"; i64, "s64");
    macro_rules! bits {
        ($($ty:ty, $name:literal);*) => {$(
            atomic(concat!("and.", $name), true, |a: $ty, b: $ty| a & b);
            atomic(concat!("or.", $name), true, |a: $ty, b: $ty| a | b);
            atomic(concat!("xor.", $name), true, |a: $ty, b: $ty| a ^ b);
        )*};
    }
    bits!(u32, "b32"; u64, "b64");
}

#[test]
pub fn windows() {
    // To an address of everyone's and back: the same place; and each lies in its own window.
    for space in ["global", "const", "shared", "local"] {
        let declaration = match space {
            "const" => ".const .align 8 .b64 v = 5;".to_owned(),
            _ => format!(".{space} .align 8 .b8 v[8];"),
        };
        op1(
            &format!(
                "{{ .reg .b64 %m<3>; {declaration} mov.u64 %m0, v; cvta.{space}.u64 %m1, %m0; cvta.to.{space}.u64 %m2, %m1; sub.u64 $d, %m2, %m0; add.u64 $d, $d, $a; }}"
            ),
            |a: u64| a,
        );
        if space == "const" {
            continue;
        }
        for asked in ["global", "shared", "local"] {
            op1(
                &format!(
                    "{{ .reg .b64 %m<2>; .reg .pred %q; {declaration} mov.u64 %m0, v; cvta.{space}.u64 %m1, %m0; isspacep.{asked} %q, %m1; and.pred $d, %q, $a; }}"
                ),
                |a: bool| a && space == asked,
            );
        }
    }
}

#[test]
pub fn traps() {
    let text = ".version 9.0\n.target sm_80\n.address_size 64\n.entry k() { trap; }";
    if coverage::note(text) {
        return;
    }
    let kernel = module(text).kernel("k").expect("it is there");
    let launched = kernel.launch(&Memory::new(), &Config::linear(1, 1), &[], &Options::default());
    assert_eq!(launched.expect_err("a trap").kind, FaultKind::Trap);
}
