//! One micro-kernel an instruction form, against a plain statement of what it means.
//!
//! `op2("add.s32", |a: i32, b: i32| a.wrapping_add(b))` runs the instruction on edge values and
//! random ones and compares every result.

// Meanings are spelled out: a shorter form might be the very method under test.
#![allow(
    clippy::double_comparisons,
    clippy::format_push_string,
    clippy::manual_checked_ops,
    clippy::manual_ilog2,
    clippy::precedence
)]

use half::{bf16, f16};
use ptx_race::{Arg, Config, Memory, Options};

use crate::coverage;
use crate::nvcc::load;
use crate::reference::Random;

/// A type a register can hold.
pub trait Value: Copy + std::fmt::Debug {
    /// Width as loaded and stored; predicates travel as words.
    const BITS: u32;
    const PREDICATE: bool = false;
    fn edges() -> Vec<Self>;
    fn of(bits: u64) -> Self;
    fn bits(self) -> u64;
    fn agrees(self, other: Self) -> bool {
        self.bits() == other.bits()
    }
}

macro_rules! int_value {
    ($($ty:ty),*) => {$(
        impl Value for $ty {
            const BITS: u32 = <$ty>::BITS;
            fn edges() -> Vec<$ty> {
                let (low, high) = (<$ty>::MIN, <$ty>::MAX);
                vec![0, 1, 2, 7, 16, 31, 33, low, low + 1, high, high - 1, high / 2, 0x55]
            }
            fn of(bits: u64) -> $ty { bits as $ty }
            fn bits(self) -> u64 { u64::from(self as u64) & (u64::MAX >> (64 - <$ty>::BITS)) }
        }
    )*};
}
int_value!(u16, i16, u32, i32, u64, i64);

macro_rules! float_value {
    ($($ty:ty, $bits:ty, $width:literal, [$($edge:expr),*]);*) => {$(
        impl Value for $ty {
            const BITS: u32 = $width;
            fn edges() -> Vec<$ty> {
                let positive = [$(<$ty>::from_bits($edge)),*];
                positive.iter().flat_map(|&x| [x, <$ty>::from_bits(x.to_bits() ^ 1 << ($width - 1))]).collect()
            }
            fn of(bits: u64) -> $ty { <$ty>::from_bits(bits as $bits) }
            fn bits(self) -> u64 { self.to_bits().into() }
            fn agrees(self, other: $ty) -> bool {
                self.to_bits() == other.to_bits() || self.is_nan() && other.is_nan()
            }
        }
    )*};
}
// Zero, one, one and a bit, a half, a denormal, the largest denormal, the least normal, the
// largest number, infinity, NaN, 3, 1/3.
float_value!(
    f32, u32, 32, [0, 0x3F80_0000, 0x3F80_0001, 0x3F00_0000, 1, 0x7F_FFFF, 0x80_0000, 0x7F7F_FFFF,
        0x7F80_0000, 0x7FC0_0000, 0x4040_0000, 0x3EAA_AAAB, 0x4B00_0001, 0x4F00_0000];
    f64, u64, 64, [0, 0x3FF0_0000_0000_0000, 0x3FF0_0000_0000_0001, 1, 0x7FEF_FFFF_FFFF_FFFF,
        0x7FF0_0000_0000_0000, 0x7FF8_0000_0000_0000, 0x4008_0000_0000_0000, 0x41E0_0000_0010_0000,
        0x3FD5_5555_5555_5555];
    f16, u16, 16, [0, 0x3C00, 0x3C01, 0x3800, 1, 0x3FF, 0x400, 0x7BFF, 0x7C00, 0x7E00, 0x4200, 0x3555];
    bf16, u16, 16, [0, 0x3F80, 0x3F81, 0x3F00, 1, 0x7F, 0x80, 0x7F7F, 0x7F80, 0x7FC0, 0x4040, 0x3EAB]
);

impl Value for bool {
    const BITS: u32 = 32;
    const PREDICATE: bool = true;
    fn edges() -> Vec<bool> {
        vec![false, true]
    }
    fn of(bits: u64) -> bool {
        bits & 1 != 0
    }
    fn bits(self) -> u64 {
        self.into()
    }
}

/// A packed pair, low half first.
#[derive(Clone, Copy, Debug)]
pub struct Pair<T>(pub T, pub T);

impl<T> Pair<T> {
    pub fn map<U>(self, f: impl Fn(T) -> U) -> Pair<U> {
        Pair(f(self.0), f(self.1))
    }
}

impl<T: Value> Value for Pair<T> {
    const BITS: u32 = 32;
    fn edges() -> Vec<Self> {
        let edges = T::edges();
        let shifted = edges.iter().cycle().skip(5);
        edges.iter().zip(shifted).map(|(&a, &b)| Pair(a, b)).collect()
    }
    fn of(bits: u64) -> Self {
        Pair(T::of(bits & 0xFFFF), T::of(bits >> 16 & 0xFFFF))
    }
    fn bits(self) -> u64 {
        self.0.bits() | self.1.bits() << 16
    }
    fn agrees(self, other: Self) -> bool {
        self.0.agrees(other.0) && self.1.agrees(other.1)
    }
}

/// Edge values of a type and random ones.
fn samples<T: Value>(random: &mut Random) -> Vec<T> {
    let mut list = T::edges();
    list.extend((0..8).map(|_| T::of(random.bits())));
    list
}

/// Runs an instruction on rows of inputs (register bits) and gives the result of each.
/// `instruction` names its operands `$d`, `$a`, `$b`, `$c`, `$e`; without them they are appended.
pub fn run(
    instruction: &str,
    widths: &[(u32, bool)],
    out: (u32, bool),
    rows: &[Vec<u64>],
) -> Vec<u64> {
    if coverage::note(instruction) {
        return Vec::new();
    }
    let names = ["$a", "$b", "$c", "$e"];
    let mut text = instruction.to_owned();
    if !text.contains('$') {
        let list: Vec<_> = names[..widths.len()].iter().map(|name| format!(", {name}")).collect();
        text = format!("{text} $d{}", list.concat());
    }
    let (bits, predicate) = out;
    let mut body = String::new();
    let mut params = ".param .u64 out, .param .u32 count".to_owned();
    for (i, &(bits, predicate)) in widths.iter().enumerate() {
        params += &format!(", .param .u64 in{i}");
        let kind = if predicate { "pred".to_owned() } else { format!("b{bits}") };
        body += &format!(
            ".reg .{kind} %s{i}; .reg .b{bits} %l{i}; ld.param.u64 %rd1, [in{i}];
            mad.wide.u32 %rd2, %r1, {}, %rd1; ld.global.b{bits} %l{i}, [%rd2];\n",
            bits / 8
        );
        body += &if predicate {
            format!("setp.ne.u32 %s{i}, %l{i}, 0;\n")
        } else {
            format!("mov.b{bits} %s{i}, %l{i};\n")
        };
        text = text.replace(names[i], &format!("%s{i}"));
    }
    let text = text.replace("$d", "%d0");
    let kind = if predicate { "pred".to_owned() } else { format!("b{bits}") };
    let result = if predicate {
        "selp.b32 %w0, 1, 0, %d0;".to_owned()
    } else {
        format!("mov.b{bits} %w0, %d0;")
    };
    let ptx = format!(
        ".version 9.0\n.target sm_80\n.address_size 64\n.entry k({params}) {{
        .reg .b32 %r<4>; .reg .b64 %rd<4>; .reg .pred %p<2>;
        .reg .{kind} %d0; .reg .b{bits} %w0;
        mov.u32 %r2, %ctaid.x; mov.u32 %r3, %tid.x; mad.lo.u32 %r1, %r2, 64, %r3;
        ld.param.u32 %r2, [count]; setp.ge.u32 %p1, %r1, %r2; @%p1 ret;
        {body}{text};\n{result}
        ld.param.u64 %rd1, [out]; mad.wide.u32 %rd2, %r1, {}, %rd1;
        st.global.b{bits} [%rd2], %w0;
        ret; }}",
        bits / 8
    );
    let module = load(&ptx);
    let memory = Memory::new();
    let size = bits as usize / 8;
    let address = memory.alloc_uninit(rows.len() * size);
    let mut args = vec![Arg::from(address), Arg::from(rows.len() as u32)];
    for (i, &(bits, _)) in widths.iter().enumerate() {
        let column: Vec<u8> = rows
            .iter()
            .flat_map(|row| row[i].to_le_bytes()[..bits as usize / 8].to_vec())
            .collect();
        args.push(Arg::from(memory.alloc(&column)));
    }
    let config = Config::linear(rows.len().div_ceil(64) as u32, 64);
    let launched = module.kernel("k").unwrap().launch(&memory, &config, &args, &Options::default());
    launched.unwrap_or_else(|fault| panic!("{instruction}: {fault}"));
    let bytes = memory.read_vec(address, rows.len() * size).unwrap();
    let word = |b: &[u8]| b.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte));
    bytes.chunks_exact(size).map(word).collect()
}

fn kind<T: Value>() -> (u32, bool) {
    (T::BITS, T::PREDICATE)
}

fn compare<D: Value>(
    instruction: &str,
    widths: &[(u32, bool)],
    rows: &[Vec<u64>],
    wanted: impl Fn(&[u64]) -> D,
) {
    for (row, got) in rows.iter().zip(run(instruction, widths, kind::<D>(), rows)) {
        let (got, wanted) = (D::of(got), wanted(row));
        assert!(wanted.agrees(got), "{instruction} of {row:x?}: {got:?}, wanted {wanted:?}");
    }
}

/// Every combination of the samples, or a random choice of 1,500 where there are more.
fn product(lists: &[Vec<u64>], random: &mut Random) -> Vec<Vec<u64>> {
    let total: usize = lists.iter().map(Vec::len).product();
    let pick = |mut at: usize| {
        lists
            .iter()
            .map(|list| {
                let value = list[at % list.len()];
                at /= list.len();
                value
            })
            .collect()
    };
    if total <= 1500 {
        return (0..total).map(pick).collect();
    }
    (0..1500).map(|_| pick(random.bits() as usize % total)).collect()
}

pub fn bits_of<T: Value>(random: &mut Random) -> Vec<u64> {
    samples::<T>(random).into_iter().map(T::bits).collect()
}

pub fn op1<A: Value, D: Value>(instruction: &str, f: impl Fn(A) -> D) {
    let mut random = Random::new(11);
    let rows = product(&[bits_of::<A>(&mut random)], &mut random);
    compare(instruction, &[kind::<A>()], &rows, |row| f(A::of(row[0])));
}

pub fn op2<A: Value, B: Value, D: Value>(instruction: &str, f: impl Fn(A, B) -> D) {
    let mut random = Random::new(12);
    let lists = [bits_of::<A>(&mut random), bits_of::<B>(&mut random)];
    let rows = product(&lists, &mut random);
    let widths = [kind::<A>(), kind::<B>()];
    compare(instruction, &widths, &rows, |row| f(A::of(row[0]), B::of(row[1])));
}

pub fn op3<A: Value, B: Value, C: Value, D: Value>(instruction: &str, f: impl Fn(A, B, C) -> D) {
    let mut random = Random::new(13);
    let lists = [bits_of::<A>(&mut random), bits_of::<B>(&mut random), bits_of::<C>(&mut random)];
    let rows = product(&lists, &mut random);
    let widths = [kind::<A>(), kind::<B>(), kind::<C>()];
    compare(instruction, &widths, &rows, |row| f(A::of(row[0]), B::of(row[1]), C::of(row[2])));
}

fn op4<A: Value, B: Value, C: Value, E: Value, D: Value>(
    instruction: &str,
    f: impl Fn(A, B, C, E) -> D,
) {
    let mut random = Random::new(14);
    let lists = [
        bits_of::<A>(&mut random),
        bits_of::<B>(&mut random),
        bits_of::<C>(&mut random),
        bits_of::<E>(&mut random),
    ];
    let rows = product(&lists, &mut random);
    let widths = [kind::<A>(), kind::<B>(), kind::<C>(), kind::<E>()];
    compare(instruction, &widths, &rows, |r| f(A::of(r[0]), B::of(r[1]), C::of(r[2]), E::of(r[3])));
}

/// Units in the last place, as the error that `close1` and `close2` allow.
pub fn units(count: f64) -> impl Fn(f64, f64) -> f64 {
    move |_, unit| count * unit
}

/// An error near 1, where the ISA bounds it as a number and not in units.
pub fn absolute(error: f64) -> impl Fn(f64, f64) -> f64 {
    move |_, unit| error + 2.0 * unit
}

/// The error of an angle: that of its conversion to turns, in which large ones are lost.
pub fn angle(x: f64, _: f64) -> f64 {
    if x.abs() < 64.0 { 0.5f64.powi(20) + x.abs() * 0.5f64.powi(23) } else { 2.0 }
}

/// An approximation: as far from f64's answer as `error` allows by the argument and by a unit in the
/// last place.
pub fn close1(instruction: &str, error: impl Fn(f64, f64) -> f64, f: impl Fn(f64) -> f64) {
    let mut random = Random::new(15);
    let mut rows = product(&[bits_of::<f32>(&mut random)], &mut random);
    rows.extend((0..200).map(|_| vec![((random.unit() * 50.0) as f32).bits()]));
    close(instruction, &rows, |x, unit| error(x[0], unit), |x| f(x[0]));
}

/// A quotient within two units in the last place.
pub fn close2(instruction: &str, f: impl Fn(f64, f64) -> f64) {
    let mut random = Random::new(16);
    let rows = product(&[bits_of::<f32>(&mut random), bits_of::<f32>(&mut random)], &mut random);
    close(instruction, &rows, |_, unit| 2.0 * unit, |x| f(x[0], x[1]));
}

fn close(
    instruction: &str,
    rows: &[Vec<u64>],
    error: impl Fn(&[f64], f64) -> f64,
    f: impl Fn(&[f64]) -> f64,
) {
    let sources = vec![(32, false); rows[0].len()];
    for (row, got) in rows.iter().zip(run(instruction, &sources, (32, false), rows)) {
        let flush = |x: f32| if instruction.contains(".ftz") { ftz(x) } else { x };
        let x: Vec<_> = row.iter().map(|&bits| f64::from(flush(f32::of(bits)))).collect();
        let (wanted, got) = (f(&x), f64::from(f32::of(got)));
        let wanted =
            if (wanted as f32).is_subnormal() { flush(wanted as f32).into() } else { wanted };
        let unit = (wanted.abs() * 0.5f64.powi(23)).max(f64::from(f32::from_bits(1)));
        let good = (got - wanted).abs() <= error(&x, unit)
            || f64::from(wanted as f32) == got
            || got.is_nan() && wanted.is_nan();
        assert!(good, "{instruction} of {x:?}: {got:e}, wanted {wanted:e}");
    }
}

#[test]
pub fn integer_arithmetic() {
    op2("add.s16", |a: i16, b: i16| a.wrapping_add(b));
    op2("add.u32", |a: u32, b: u32| a.wrapping_add(b));
    op2("add.s32", |a: i32, b: i32| a.wrapping_add(b));
    op2("add.s64", |a: i64, b: i64| a.wrapping_add(b));
    op2("add.sat.s32", |a: i32, b: i32| a.saturating_add(b));
    op2("sub.u16", |a: u16, b: u16| a.wrapping_sub(b));
    op2("sub.s32", |a: i32, b: i32| a.wrapping_sub(b));
    op2("sub.u64", |a: u64, b: u64| a.wrapping_sub(b));
    op2("sub.sat.s32", |a: i32, b: i32| a.saturating_sub(b));
    op2("mul.lo.s16", |a: i16, b: i16| a.wrapping_mul(b));
    op2("mul.lo.s32", |a: i32, b: i32| a.wrapping_mul(b));
    op2("mul.lo.u64", |a: u64, b: u64| a.wrapping_mul(b));
    op2("mul.hi.u16", |a: u16, b: u16| ((a as u32 * b as u32) >> 16) as u16);
    op2("mul.hi.s16", |a: i16, b: i16| ((a as i32 * b as i32) >> 16) as i16);
    op2("mul.hi.u32", |a: u32, b: u32| ((a as u64 * b as u64) >> 32) as u32);
    op2("mul.hi.s32", |a: i32, b: i32| ((a as i64 * b as i64) >> 32) as i32);
    op2("mul.hi.u64", |a: u64, b: u64| ((a as u128 * b as u128) >> 64) as u64);
    op2("mul.hi.s64", |a: i64, b: i64| ((a as i128 * b as i128) >> 64) as i64);
    op2("mul.wide.u16", |a: u16, b: u16| a as u32 * b as u32);
    op2("mul.wide.s16", |a: i16, b: i16| a as i32 * b as i32);
    op2("mul.wide.u32", |a: u32, b: u32| a as u64 * b as u64);
    op2("mul.wide.s32", |a: i32, b: i32| a as i64 * b as i64);
    op2("mul24.lo.u32", |a: u32, b: u32| (a % (1 << 24)).wrapping_mul(b % (1 << 24)));
    op3("mad.lo.u16", |a: u16, b: u16, c: u16| a.wrapping_mul(b).wrapping_add(c));
    op3("mad.lo.s32", |a: i32, b: i32, c: i32| a.wrapping_mul(b).wrapping_add(c));
    op3("mad.lo.s64", |a: i64, b: i64, c: i64| a.wrapping_mul(b).wrapping_add(c));
    op3("mad.hi.u32", |a: u32, b: u32, c: u32| {
        ((a as u64 * b as u64 >> 32) as u32).wrapping_add(c)
    });
    op3("mad.hi.s32", |a: i32, b: i32, c: i32| {
        ((a as i64 * b as i64 >> 32) as i32).wrapping_add(c)
    });
    op3("mad.wide.u16", |a: u16, b: u16, c: u32| (a as u32 * b as u32).wrapping_add(c));
    op3("mad.wide.u32", |a: u32, b: u32, c: u64| (a as u64 * b as u64).wrapping_add(c));
    op3("mad.wide.s32", |a: i32, b: i32, c: i64| (a as i64 * b as i64).wrapping_add(c));
    op2("div.u16", |a: u16, b: u16| if b == 0 { !0 } else { a / b });
    op2("div.s16", |a: i16, b: i16| if b == 0 { -1 } else { a.wrapping_div(b) });
    op2("div.u32", |a: u32, b: u32| if b == 0 { !0 } else { a / b });
    op2("div.s32", |a: i32, b: i32| if b == 0 { -1 } else { a.wrapping_div(b) });
    op2("div.u64", |a: u64, b: u64| if b == 0 { !0 } else { a / b });
    op2("div.s64", |a: i64, b: i64| if b == 0 { -1 } else { a.wrapping_div(b) });
    op2("rem.u32", |a: u32, b: u32| if b == 0 { a } else { a % b });
    op2("rem.s32", |a: i32, b: i32| if b == 0 { a } else { a.wrapping_rem(b) });
    op2("rem.u64", |a: u64, b: u64| if b == 0 { a } else { a % b });
    op2("rem.s64", |a: i64, b: i64| if b == 0 { a } else { a.wrapping_rem(b) });
    op1("abs.s16", |a: i16| a.wrapping_abs());
    op1("abs.s32", |a: i32| a.wrapping_abs());
    op1("abs.s64", |a: i64| a.wrapping_abs());
    op1("neg.s16", |a: i16| a.wrapping_neg());
    op1("neg.s32", |a: i32| a.wrapping_neg());
    op1("neg.s64", |a: i64| a.wrapping_neg());
    op2("min.u16", |a: u16, b: u16| if a < b { a } else { b });
    op2("min.s16", |a: i16, b: i16| if a < b { a } else { b });
    op2("min.u32", |a: u32, b: u32| if a < b { a } else { b });
    op2("min.s32", |a: i32, b: i32| if a < b { a } else { b });
    op2("min.u64", |a: u64, b: u64| if a < b { a } else { b });
    op2("min.s64", |a: i64, b: i64| if a < b { a } else { b });
    op2("max.u16", |a: u16, b: u16| if a > b { a } else { b });
    op2("max.s16", |a: i16, b: i16| if a > b { a } else { b });
    op2("max.u32", |a: u32, b: u32| if a > b { a } else { b });
    op2("max.s32", |a: i32, b: i32| if a > b { a } else { b });
    op2("max.u64", |a: u64, b: u64| if a > b { a } else { b });
    op2("max.s64", |a: i64, b: i64| if a > b { a } else { b });
    op3("sad.u32", |a: u32, b: u32, c: u32| c.wrapping_add(a.abs_diff(b)));
    op3("sad.s32", |a: i32, b: i32, c: u32| c.wrapping_add(a.abs_diff(b)));
    let bytes = |x: u32| x.to_le_bytes();
    op3("dp4a.u32.u32", |a: u32, b: u32, c: u32| {
        (0..4).fold(c, |s, i| s.wrapping_add(bytes(a)[i] as u32 * bytes(b)[i] as u32))
    });
    op3("dp4a.s32.s32", |a: u32, b: u32, c: i32| {
        (0..4).fold(c, |s, i| s.wrapping_add(bytes(a)[i] as i8 as i32 * bytes(b)[i] as i8 as i32))
    });
}

#[test]
pub fn carries_chain() {
    let wide = |low: u32, high: u32| low as u64 | (high as u64) << 32;
    op4(
        "{ .reg .b32 %lo; add.cc.u32 %lo, $a, $c; addc.u32 $d, $b, $e; }",
        |a: u32, b: u32, c: u32, e: u32| (wide(a, b).wrapping_add(wide(c, e)) >> 32) as u32,
    );
    op4(
        "{ .reg .b32 %lo; sub.cc.u32 %lo, $a, $c; subc.u32 $d, $b, $e; }",
        |a: u32, b: u32, c: u32, e: u32| (wide(a, b).wrapping_sub(wide(c, e)) >> 32) as u32,
    );
    op2("{ .reg .b64 %x; add.cc.u64 %x, $a, $b; addc.cc.u64 $d, 0, 0; }", |a: u64, b: u64| {
        u64::from(a.checked_add(b).is_none())
    });
    op2("{ .reg .b64 %x; sub.cc.u64 %x, $a, $b; subc.u64 $d, 0, 0; }", |a: u64, b: u64| {
        if a < b { u64::MAX } else { 0 }
    });
}

#[test]
pub fn bits_and_shifts() {
    op2("and.b16", |a: u16, b: u16| a & b);
    op2("and.b32", |a: u32, b: u32| a & b);
    op2("and.b64", |a: u64, b: u64| a & b);
    op2("and.pred", |a: bool, b: bool| a && b);
    op2("or.b16", |a: u16, b: u16| a | b);
    op2("or.b32", |a: u32, b: u32| a | b);
    op2("or.b64", |a: u64, b: u64| a | b);
    op2("or.pred", |a: bool, b: bool| a || b);
    op2("xor.b16", |a: u16, b: u16| a ^ b);
    op2("xor.b32", |a: u32, b: u32| a ^ b);
    op2("xor.b64", |a: u64, b: u64| a ^ b);
    op2("xor.pred", |a: bool, b: bool| a != b);
    op1("not.b16", |a: u16| !a);
    op1("not.b32", |a: u32| !a);
    op1("not.b64", |a: u64| !a);
    op1("not.pred", |a: bool| !a);
    op1("cnot.b32", |a: u32| (a == 0) as u32);
    op2("shl.b16", |a: u16, n: u32| if n > 15 { 0 } else { a << n });
    op2("shl.b32", |a: u32, n: u32| if n > 31 { 0 } else { a << n });
    op2("shl.b64", |a: u64, n: u32| if n > 63 { 0 } else { a << n });
    op2("shr.u16", |a: u16, n: u32| if n > 15 { 0 } else { a >> n });
    op2("shr.u32", |a: u32, n: u32| if n > 31 { 0 } else { a >> n });
    op2("shr.b64", |a: u64, n: u32| if n > 63 { 0 } else { a >> n });
    op2("shr.s16", |a: i16, n: u32| a >> n.min(15));
    op2("shr.s32", |a: i32, n: u32| a >> n.min(31));
    op2("shr.s64", |a: i64, n: u32| a >> n.min(63));
    let wide = |low: u32, high: u32| low as u128 | (high as u128) << 32;
    op3("shf.l.wrap.b32", |a: u32, b: u32, n: u32| (wide(a, b) << (n % 32) >> 32) as u32);
    op3("shf.l.clamp.b32", |a: u32, b: u32, n: u32| (wide(a, b) << n.min(32) >> 32) as u32);
    op3("shf.r.wrap.b32", |a: u32, b: u32, n: u32| (wide(a, b) >> (n % 32)) as u32);
    op3("shf.r.clamp.b32", |a: u32, b: u32, n: u32| (wide(a, b) >> n.min(32)) as u32);
    op3("lop3.b32 $d, $a, $b, $c, 0x80", |a: u32, b: u32, c: u32| a & b & c);
    op3("lop3.b32 $d, $a, $b, $c, 0x96", |a: u32, b: u32, c: u32| a ^ b ^ c);
    op3("lop3.b32 $d, $a, $b, $c, 0x1A", |a: u32, b: u32, c: u32| (a & b | c) ^ a);
    op3("lop3.b32 $d, $a, $b, $c, 0x2A", |a: u32, b: u32, c: u32| !(a & b) & c);
    op1("popc.b32", |a: u32| a.count_ones());
    op1("popc.b64", |a: u64| a.count_ones());
    op1("clz.b32", |a: u32| a.leading_zeros());
    op1("clz.b64", |a: u64| a.leading_zeros());
    op1("brev.b32", |a: u32| a.reverse_bits());
    op1("brev.b64", |a: u64| a.reverse_bits());
    op1("bfind.u32", |a: u32| if a == 0 { !0 } else { 31 - a.leading_zeros() });
    op1("bfind.s32", |a: i32| {
        (0..31).rev().find(|i| (a >> i & 1) != (a >> 31 & 1)).map_or(!0, |i| i as u32)
    });
    op1("bfind.shiftamt.u32", |a: u32| if a == 0 { !0 } else { a.leading_zeros() });
    // Bit by bit, as the ISA's own pseudo-code has it.
    let field = |a: u64, at: u32, n: u32, top: u32, signed: bool| {
        let (at, n) = (at % 256, n % 256);
        let sign = if n == 0 || !signed { 0 } else { a >> (at + n - 1).min(top) & 1 };
        (0..=top).fold(0u64, |d, i| {
            d | (if i < n && at + i <= top { a >> (at + i) & 1 } else { sign }) << i
        })
    };
    op3("bfe.u32", move |a: u32, b: u32, c: u32| field(a.into(), b, c, 31, false) as u32);
    op3("bfe.s32", move |a: u32, b: u32, c: u32| field(a.into(), b, c, 31, true) as u32);
    op3("bfe.u64", move |a: u64, b: u32, c: u32| field(a, b, c, 63, false));
    op3("bfe.s64", move |a: u64, b: u32, c: u32| field(a, b, c, 63, true));
    op4("bfi.b32", |a: u32, b: u32, at: u32, n: u32| {
        let (at, n) = (at % 256, n % 256);
        (0..n)
            .take_while(|i| at + i <= 31)
            .fold(b, |f, i| f & !(1 << (at + i)) | (a >> i & 1) << (at + i))
    });
    op4("bfi.b64", |a: u64, b: u64, at: u32, n: u32| {
        let (at, n) = (at % 256, n % 256);
        (0..n)
            .take_while(|i| at + i <= 63)
            .fold(b, |f, i| f & !(1 << (at + i)) | (a >> i & 1) << (at + i))
    });
    op3("prmt.b32", |a: u32, b: u32, s: u32| {
        let bytes = [a.to_le_bytes(), b.to_le_bytes()].concat();
        u32::from_le_bytes(std::array::from_fn(|i| {
            let nibble = (s >> (4 * i) & 15) as usize;
            let byte = bytes[nibble % 8];
            if nibble < 8 {
                byte
            } else if byte >= 128 {
                255
            } else {
                0
            }
        }))
    });
    op1("mov.b16", |a: u16| a);
    op1("mov.u32", |a: u32| a);
    op1("mov.f64", |a: f64| a);
    op1("mov.pred", |a: bool| a);
    op3("selp.b16", |a: u16, b: u16, p: bool| if p { a } else { b });
    op3("selp.f32", |a: f32, b: f32, p: bool| if p { a } else { b });
    op3("selp.b64", |a: u64, b: u64, p: bool| if p { a } else { b });
    op3("slct.u32.s32", |a: u32, b: u32, c: i32| if c >= 0 { a } else { b });
    op3("slct.f32.f32", |a: f32, b: f32, c: f32| if c >= 0.0 { a } else { b });
    op2("mov.b32 $d, {$a, $b}", |a: u16, b: u16| a as u32 | (b as u32) << 16);
    op2("mov.b64 $d, {$a, $b}", |a: u32, b: u32| a as u64 | (b as u64) << 32);
    op1("{ .reg .b32 %x; mov.b64 {%x, $d}, $a; }", |a: u64| (a >> 32) as u32);
    op1("{ .reg .b16 %x; mov.b32 {$d, %x}, $a; }", |a: u32| a as u16);
    op1("{ .reg .b16 %x<4>; mov.b64 {%x0, %x1, $d, %x3}, $a; }", |a: u64| (a >> 32) as u16);
}

#[test]
pub fn comparisons() {
    macro_rules! compare {
        ($ty:ty, $name:literal: $($mod:literal $op:tt),*) => {
            $(op2(concat!("setp.", $mod, ".", $name), |a: $ty, b: $ty| a $op b);)*
        };
    }
    compare!(i16, "s16": "eq" ==, "lt" <, "ge" >=);
    compare!(u16, "u16": "ne" !=, "le" <=, "gt" >);
    compare!(i32, "s32": "eq" ==, "ne" !=, "lt" <, "le" <=, "gt" >, "ge" >=);
    compare!(u32, "u32": "lo" <, "ls" <=, "hi" >, "hs" >=, "lt" <, "eq" ==);
    compare!(i64, "s64": "lt" <, "ge" >=, "ne" !=);
    compare!(u64, "u64": "lt" <, "gt" >, "eq" ==);
    compare!(f32, "f32": "eq" ==, "lt" <, "le" <=, "gt" >, "ge" >=, "neu" !=);
    compare!(f64, "f64": "eq" ==, "lt" <, "ge" >=, "neu" !=);
    compare!(f16, "f16": "eq" ==, "lt" <, "ge" >=, "neu" !=);
    compare!(bf16, "bf16": "gt" >, "le" <=);
    op2("setp.ne.f32", |a: f32, b: f32| a < b || a > b);
    op2("setp.equ.f32", |a: f32, b: f32| a.is_nan() || b.is_nan() || a == b);
    op2("setp.ltu.f32", |a: f32, b: f32| a.is_nan() || b.is_nan() || a < b);
    op2("setp.leu.f32", |a: f32, b: f32| a.is_nan() || b.is_nan() || a <= b);
    op2("setp.gtu.f32", |a: f32, b: f32| a.is_nan() || b.is_nan() || a > b);
    op2("setp.geu.f32", |a: f32, b: f32| a.is_nan() || b.is_nan() || a >= b);
    op2("setp.num.f32", |a: f32, b: f32| !a.is_nan() && !b.is_nan());
    op2("setp.nan.f32", |a: f32, b: f32| a.is_nan() || b.is_nan());
    op2("setp.gt.ftz.f32", |a: f32, b: f32| ftz(a) > ftz(b));
    op3("setp.lt.and.s32", |a: i32, b: i32, p: bool| a < b && p);
    op3("setp.lt.or.s32 $d, $a, $b, !$c", |a: i32, b: i32, p: bool| a < b || !p);
    op3("setp.eq.xor.f32", |a: f32, b: f32, p: bool| (a == b) != p);
    op3("{ .reg .pred %q; setp.lt.and.u32 %q|$d, $a, $b, $c; }", |a: u32, b: u32, p: bool| {
        a >= b && p
    });
    op2("set.lt.u32.f32", |a: f32, b: f32| if a < b { u32::MAX } else { 0 });
    op2("set.ge.f32.s32", |a: i32, b: i32| if a >= b { 1f32 } else { 0.0 });
    op2("set.gt.f16x2.f16x2", |a: Pair<f16>, b: Pair<f16>| {
        let one = |yes: bool| if yes { f16::ONE } else { f16::ZERO };
        Pair(one(a.0 > b.0), one(a.1 > b.1))
    });
    op1("testp.finite.f32", |a: f32| a.is_finite());
    op1("testp.infinite.f32", |a: f32| a.is_infinite());
    op1("testp.notanumber.f32", |a: f32| a.is_nan());
    op1("testp.subnormal.f32", |a: f32| a.is_subnormal());
}

pub fn ftz(x: f32) -> f32 {
    if x.is_subnormal() { 0f32.copysign(x) } else { x }
}

pub fn sat(x: f32) -> f32 {
    if x.is_nan() { 0.0 } else { x.clamp(0.0, 1.0) + 0.0 }
}

/// Moves a nearest-rounded result to the side a mode wants. `rest` is the exact value less it.
fn directed(nearest: f32, rest: f64, up: Option<bool>) -> f32 {
    if !nearest.is_finite() {
        return nearest;
    }
    match up {
        Some(true) if rest > 0.0 => nearest.next_up(),
        Some(false) if rest < 0.0 => nearest.next_down(),
        // Toward zero.
        None if nearest > 0.0 && rest < 0.0 => nearest.next_down(),
        None if nearest < 0.0 && rest > 0.0 => nearest.next_up(),
        _ => nearest,
    }
}

#[test]
pub fn single_precision() {
    op2("add.f32", |a: f32, b: f32| a + b);
    op2("add.rn.f32", |a: f32, b: f32| a + b);
    op2("add.ftz.f32", |a: f32, b: f32| ftz(ftz(a) + ftz(b)));
    op2("add.sat.f32", |a: f32, b: f32| sat(a + b));
    op2("add.ftz.sat.f32", |a: f32, b: f32| sat(ftz(ftz(a) + ftz(b))));
    op2("sub.f32", |a: f32, b: f32| a - b);
    op2("sub.ftz.f32", |a: f32, b: f32| ftz(ftz(a) - ftz(b)));
    op2("mul.f32", |a: f32, b: f32| a * b);
    op2("mul.ftz.f32", |a: f32, b: f32| ftz(ftz(a) * ftz(b)));
    op3("fma.rn.f32", |a: f32, b: f32, c: f32| a.mul_add(b, c));
    op3("fma.rn.ftz.f32", |a: f32, b: f32, c: f32| ftz(ftz(a).mul_add(ftz(b), ftz(c))));
    op3("fma.rn.sat.f32", |a: f32, b: f32, c: f32| sat(a.mul_add(b, c)));
    op2("div.rn.f32", |a: f32, b: f32| a / b);
    op1("rcp.rn.f32", |a: f32| 1.0 / a);
    op1("sqrt.rn.f32", |a: f32| a.sqrt());
    op1("abs.f32", |a: f32| a.abs());
    op1("abs.ftz.f32", |a: f32| ftz(a).abs());
    op1("neg.f32", |a: f32| -a);
    op1("neg.ftz.f32", |a: f32| -ftz(a));
    op2("copysign.f32", |a: f32, b: f32| b.copysign(a));
    let order = |x: f32| {
        if x.is_sign_negative() { !x.to_bits() as i64 } else { x.to_bits() as i64 + (1 << 31) }
    };
    let pick = move |a: f32, b: f32, larger: bool| match (a.is_nan(), b.is_nan()) {
        (true, _) => b,
        (_, true) => a,
        // In this order -0 is below +0.
        _ if (order(a) > order(b)) == larger => a,
        _ => b,
    };
    let nan = |a: f32, b: f32| a.is_nan() || b.is_nan();
    op2("min.f32", move |a, b| pick(a, b, false));
    op2("max.f32", move |a, b| pick(a, b, true));
    op2("max.ftz.f32", move |a, b| ftz(pick(ftz(a), ftz(b), true)));
    op2("min.NaN.f32", move |a, b| if nan(a, b) { f32::NAN } else { pick(a, b, false) });
    op2("max.NaN.f32", move |a, b| if nan(a, b) { f32::NAN } else { pick(a, b, true) });
    for (mode, up) in [("rz", None), ("rm", Some(false)), ("rp", Some(true))] {
        // Sums of moderate numbers are exact in f64; so are all products.
        op2(&format!("mul.{mode}.f32 $d, $a, $b"), |a: Middle, b: Middle| {
            directed(a.0 * b.0, a.0 as f64 * b.0 as f64 - (a.0 * b.0) as f64, up)
        });
        // Toward minus infinity an exact zero is negative, unless both addends are +0.
        let zero = |sum: f32, is_negative: bool| {
            if sum == 0.0 && up == Some(false) && is_negative { -0.0 } else { sum }
        };
        op2(&format!("add.{mode}.f32 $d, $a, $b"), |a: Middle, b: Middle| {
            let sum = zero(a.0 + b.0, a.0.is_sign_negative() || b.0.is_sign_negative());
            directed(sum, a.0 as f64 + b.0 as f64 - sum as f64, up)
        });
        op2(&format!("div.{mode}.f32 $d, $a, $b"), |a: Middle, b: Middle| {
            let q = a.0 / b.0;
            directed(q, (a.0 as f64 - q as f64 * b.0 as f64) * b.0.signum() as f64, up)
        });
        op3(&format!("fma.{mode}.f32 $d, $a, $b, $c"), |a: Middle, b: Middle, c: Middle| {
            let product = a.0 as f64 * b.0 as f64;
            let r = a.0.mul_add(b.0, c.0);
            let r = zero(r, product.is_sign_negative() || c.0.is_sign_negative());
            directed(r, (a.0 as f64).mul_add(b.0 as f64, c.0 as f64 - r as f64), up)
        });
    }
    // The bounds of the ISA; src/special.rs and src/ex2.rs hold the bits of a GPU.
    close1("ex2.approx.f32", units(2.0), f64::exp2);
    close1("rcp.approx.f32", units(1.0), f64::recip);
    close1("sqrt.approx.f32", units(1.0), f64::sqrt);
    close1("rsqrt.approx.f32", units(2.0), inverse_root);
    close1("lg2.approx.f32", absolute(0.5f64.powi(22)), f64::log2);
    close1("tanh.approx.f32", units(4096.0), f64::tanh);
    close1("sin.approx.f32", angle, f64::sin);
    close1("cos.approx.f32", angle, f64::cos);
    op1("ex2.approx.ftz.f32", |a: f32| {
        if a == -127.0 {
            0.0
        } else if a.is_nan() {
            a
        } else {
            ftz_exp2(a)
        }
    });
    close2("div.approx.f32", approximate_quotient);
    close2("div.full.f32", |a, b| a / b);
}

pub fn inverse_root(x: f64) -> f64 {
    if x == 0.0 { f64::INFINITY.copysign(x) } else { 1.0 / x.sqrt() }
}

/// `div.approx`: divisors beyond 2^126 give 0, of an infinite dividend NaN.
pub fn approximate_quotient(a: f64, b: f64) -> f64 {
    if b.abs() > 2f64.powi(126) { a * 0f64.copysign(b) } else { a / b }
}

/// Powers of two alone are exact enough to state bit by bit; the rest is held by `close1`.
fn ftz_exp2(a: f32) -> f32 {
    let exact = (ftz(a) as f64).exp2() as f32;
    let got = f32::of(run("ex2.approx.ftz.f32", &[(32, false)], (32, false), &[vec![a.bits()]])[0]);
    assert!(got == ftz(got), "ex2 of {a:e} is denormal");
    if (got - exact).abs() <= exact * 2.4e-7 || exact.is_subnormal() { got } else { exact }
}

/// f32 between 2^-10 and 2^10, for exact statements of directed rounding.
#[derive(Clone, Copy, Debug)]
struct Middle(f32);

impl Value for Middle {
    const BITS: u32 = 32;
    fn edges() -> Vec<Middle> {
        [1.0, -1.0, 3.0, -7.0, 0.1, 1.0 + f32::EPSILON].map(Middle).to_vec()
    }
    fn of(bits: u64) -> Middle {
        let exponent = 117 + ((bits >> 23 & 0xFF) + 143) % 20;
        Middle(f32::from_bits(bits as u32 & 0x807F_FFFF | (exponent as u32) << 23))
    }
    fn bits(self) -> u64 {
        self.0.to_bits().into()
    }
}

#[test]
pub fn double_precision() {
    op2("add.f64", |a: f64, b: f64| a + b);
    op2("sub.rn.f64", |a: f64, b: f64| a - b);
    op2("mul.f64", |a: f64, b: f64| a * b);
    op3("fma.rn.f64", |a: f64, b: f64, c: f64| a.mul_add(b, c));
    op2("div.rn.f64", |a: f64, b: f64| a / b);
    op1("rcp.rn.f64", |a: f64| 1.0 / a);
    op1("sqrt.rn.f64", |a: f64| a.sqrt());
    op1("abs.f64", |a: f64| a.abs());
    op1("neg.f64", |a: f64| -a);
    // -0 is below +0.
    let is_less = |a: f64, b: f64| a < b || a == b && a.is_sign_negative();
    op2("min.f64", move |a: f64, b: f64| if a.is_nan() || is_less(b, a) { b } else { a });
    op2("max.f64", move |a: f64, b: f64| if a.is_nan() || is_less(a, b) { b } else { a });
}

/// The representable number nearest to x, found among the neighbors of a guess.
fn nearest<T: Value>(x: f64, guess: T, wide: fn(T) -> f64, limit: f64) -> T {
    if x.is_nan() || x == 0.0 || x.abs() >= limit {
        return guess;
    }
    let bits = guess.bits();
    [bits.wrapping_sub(1), bits, bits + 1]
        .into_iter()
        .map(T::of)
        .filter(|c| wide(*c).is_finite())
        .min_by(|a, b| {
            let far = |c: &T| (wide(*c) - x).abs();
            far(a).total_cmp(&far(b)).then((a.bits() & 1).cmp(&(b.bits() & 1)))
        })
        .unwrap_or(guess)
}

/// a b + c, moved off a tie by what f64 lost.
pub fn fused(a: f64, b: f64, c: f64) -> f64 {
    let (product, sum) = (a * b, a.mul_add(b, c));
    let lost = if product.abs() >= c.abs() { product - sum + c } else { c - sum + product };
    match lost.partial_cmp(&0.0) {
        Some(std::cmp::Ordering::Greater) => sum.next_up(),
        Some(std::cmp::Ordering::Less) => sum.next_down(),
        _ => sum,
    }
}

pub fn h(x: f64) -> f16 {
    nearest(x, f16::from_f32(x as f32), f16::to_f64, 65520.0)
}

pub fn b(x: f64) -> bf16 {
    nearest(x, bf16::from_f32(x as f32), bf16::to_f64, 3.394e38)
}

#[test]
pub fn half_precision() {
    op2("add.f16", |x: f16, y: f16| h(x.to_f64() + y.to_f64()));
    op2("sub.f16", |x: f16, y: f16| h(x.to_f64() - y.to_f64()));
    op2("mul.f16", |x: f16, y: f16| h(x.to_f64() * y.to_f64()));
    op3("fma.rn.f16", |x: f16, y: f16, z: f16| h(fused(x.to_f64(), y.to_f64(), z.to_f64())));
    op2("add.rn.bf16", |x: bf16, y: bf16| b(x.to_f64() + y.to_f64()));
    op2("mul.rn.bf16", |x: bf16, y: bf16| b(x.to_f64() * y.to_f64()));
    op3("fma.rn.bf16", |x: bf16, y: bf16, z: bf16| b(fused(x.to_f64(), y.to_f64(), z.to_f64())));
    op2("add.f16x2", |x: Pair<f16>, y: Pair<f16>| {
        Pair(h(x.0.to_f64() + y.0.to_f64()), h(x.1.to_f64() + y.1.to_f64()))
    });
    op2("mul.f16x2", |x: Pair<f16>, y: Pair<f16>| {
        Pair(h(x.0.to_f64() * y.0.to_f64()), h(x.1.to_f64() * y.1.to_f64()))
    });
    op3("fma.rn.f16x2", |x: Pair<f16>, y: Pair<f16>, z: Pair<f16>| {
        let one = |x: f16, y: f16, z: f16| h(fused(x.to_f64(), y.to_f64(), z.to_f64()));
        Pair(one(x.0, y.0, z.0), one(x.1, y.1, z.1))
    });
    op3("fma.rn.bf16x2", |x: Pair<bf16>, y: Pair<bf16>, z: Pair<bf16>| {
        let one = |x: bf16, y: bf16, z: bf16| b(fused(x.to_f64(), y.to_f64(), z.to_f64()));
        Pair(one(x.0, y.0, z.0), one(x.1, y.1, z.1))
    });
    op3("fma.rn.relu.bf16", |x: bf16, y: bf16, z: bf16| {
        let r = b(fused(x.to_f64(), y.to_f64(), z.to_f64()));
        if r <= bf16::ZERO { bf16::ZERO } else { r }
    });
    op1("neg.bf16", |x: bf16| bf16::from_bits(x.to_bits() ^ 0x8000));
    op1("abs.f16", |x: f16| f16::from_bits(x.to_bits() & 0x7FFF));
    op1("neg.f16x2", |x: u32| x ^ 0x8000_8000);
    op1("abs.bf16x2", |x: u32| x & 0x7FFF_7FFF);
    op2(
        "min.f16",
        |x: f16, y: f16| {
            if x.is_nan() || y < x || x == y && y.is_sign_negative() { y } else { x }
        },
    );
    op2(
        "max.bf16",
        |x: bf16, y: bf16| {
            if x.is_nan() || y > x || x == y && y.is_sign_positive() { y } else { x }
        },
    );
    op2("max.NaN.bf16", |x: bf16, y: bf16| {
        if x.is_nan() || y.is_nan() {
            bf16::NAN
        } else if y > x || x == y && y.is_sign_positive() {
            y
        } else {
            x
        }
    });
    op1("ex2.approx.f16", |x: f16| h(x.to_f64().exp2()));
    op1("ex2.approx.ftz.bf16", |x: bf16| b(x.to_f64().exp2()));
    op1("tanh.approx.f16", |x: f16| h(x.to_f64().tanh()));
}

#[test]
pub fn conversions() {
    op1("cvt.u64.u32", |a: u32| a as u64);
    op1("cvt.s64.s32", |a: i32| a as i64);
    op1("cvt.u32.u64", |a: u64| a as u32);
    op1("cvt.u16.u32", |a: u32| a as u16);
    op1("cvt.u32.u16", |a: u16| a as u32);
    op1("cvt.s32.s16", |a: i16| a as i32);
    op1("cvt.s32.s8", |a: i32| a as i8 as i32);
    op1("cvt.u32.u8", |a: u32| a as u8 as u32);
    op1("cvt.u16.u8", |a: u16| a as u8 as u16);
    op1("cvt.s16.s8", |a: i16| a as i8 as i16);
    op1("cvt.u64.u16", |a: u16| a as u64);
    op1("cvt.s64.s8", |a: i32| a as i8 as i64);
    op1("cvt.u16.u64", |a: u64| a as u16);
    op1("cvt.sat.u8.s32", |a: i32| a.clamp(0, 255) as u32);
    op1("cvt.sat.s16.s32", |a: i32| a.clamp(-32768, 32767) as i16);
    op1("cvt.sat.u32.s32", |a: i32| a.max(0) as u32);
    op1("cvt.rn.f32.s32", |a: i32| a as f32);
    op1("cvt.rn.f32.u32", |a: u32| a as f32);
    op1("cvt.rn.f32.s64", |a: i64| a as f32);
    op1("cvt.rn.f32.u64", |a: u64| a as f32);
    op1("cvt.rn.f64.s64", |a: i64| a as f64);
    op1("cvt.rn.f64.s32", |a: i32| a as f64);
    op1("cvt.rz.f32.u32", |a: u32| directed(a as f32, a as f64 - (a as f32) as f64, None));
    op1("cvt.rp.f32.s32", |a: i32| directed(a as f32, a as f64 - (a as f32) as f64, Some(true)));
    op1("cvt.rn.f16.s32", |a: i32| h(a as f64));
    op1("cvt.rn.bf16.s32", |a: i32| b(a as f64));
    op1("cvt.rzi.s32.f32", |a: f32| a as i32);
    op1("cvt.rzi.u32.f32", |a: f32| a as u32);
    op1("cvt.rni.s32.f32", |a: f32| a.round_ties_even() as i32);
    op1("cvt.rmi.s32.f32", |a: f32| a.floor() as i32);
    op1("cvt.rpi.s32.f32", |a: f32| a.ceil() as i32);
    op1("cvt.rni.ftz.s32.f32", |a: f32| ftz(a).round_ties_even() as i32);
    op1("cvt.rzi.s64.f32", |a: f32| if a.is_nan() { i64::MIN } else { a as i64 });
    op1("cvt.rzi.s32.f64", |a: f64| if a.is_nan() { i32::MIN } else { a as i32 });
    op1("cvt.rzi.u16.f32", |a: f32| a as u16);
    op1("cvt.rni.f32.f32", |a: f32| a.round_ties_even());
    op1("cvt.rzi.f32.f32", |a: f32| a.trunc());
    op1("cvt.rmi.f32.f32", |a: f32| a.floor());
    op1("cvt.rpi.f32.f32", |a: f32| a.ceil());
    op1("cvt.rmi.f64.f64", |a: f64| a.floor());
    op1("cvt.sat.f32.f32", sat);
    op1("cvt.ftz.f32.f32", ftz);
    op1("cvt.f64.f32", |a: f32| a as f64);
    op1("cvt.rn.f32.f64", |a: f64| a as f32);
    op1("cvt.rz.f32.f64", |a: f64| {
        if a.is_finite() && (a as f32).is_infinite() {
            f32::MAX.copysign(a as f32)
        } else {
            directed(a as f32, a - (a as f32) as f64, None)
        }
    });
    op1("cvt.f32.f16", |a: f16| a.to_f32());
    op1("cvt.f32.bf16", |a: bf16| a.to_f32());
    op1("cvt.f64.f16", |a: f16| a.to_f64());
    op1("cvt.rn.f16.f32", |a: f32| h(a as f64));
    op1("cvt.rn.bf16.f32", |a: f32| b(a as f64));
    op1("cvt.rz.bf16.f32", |a: f32| {
        if a.is_nan() { bf16::NAN } else { bf16::from_bits((a.to_bits() >> 16) as u16) }
    });
    op1("cvt.rn.f16.f64", |a: f64| h(a));
    op1("cvt.rzi.s32.f16", |a: f16| a.to_f32() as i32);
    op1("cvt.rn.relu.bf16.f32", |a: f32| if a <= 0.0 { bf16::ZERO } else { b(a as f64) });
    op2("cvt.rn.bf16x2.f32", |high: f32, low: f32| Pair(b(low as f64), b(high as f64)));
    op2("cvt.rn.f16x2.f32", |high: f32, low: f32| Pair(h(low as f64), h(high as f64)));
    op2("cvt.rn.relu.bf16x2.f32", |high: f32, low: f32| {
        let relu = |x: f32| if x <= 0.0 { bf16::ZERO } else { b(x as f64) };
        Pair(relu(low), relu(high))
    });
    op2("cvt.rz.bf16x2.f32", |high: f32, low: f32| {
        let cut = |x: f32| {
            if x.is_nan() { bf16::NAN } else { bf16::from_bits((x.to_bits() >> 16) as u16) }
        };
        Pair(cut(low), cut(high))
    });
    op1("cvt.rna.tf32.f32", |a: f32| {
        if a.is_nan() || a.is_infinite() {
            a
        } else {
            f32::from_bits(a.to_bits().wrapping_add(0x1000) & !0x1FFF)
        }
    });
    op2("cvt.pack.sat.s16.s32", |high: i32, low: i32| {
        let clamp = |x: i32| x.clamp(-32768, 32767) as u16 as u32;
        clamp(low) | clamp(high) << 16
    });
}
