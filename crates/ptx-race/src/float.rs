//! Floating-point arithmetic: f32, f64, f16, bf16 and the packed pairs.

use half::{bf16, f16};

use crate::ex2::ex2;
use crate::math::{canonical, flush, saturate};
use crate::registers::{File, Form, Lanes, Reg, Regs, Slots, WARP, lanes};
use crate::round::{NAN_F16, NAN_F32, Round, odd, to_bf16, to_f16, to_f32, two_sum};
use crate::special;

/// The modifiers of a floating-point opcode, sorted out.
// Each is a modifier that an opcode has or lacks.
#[allow(clippy::struct_excessive_bools)]
struct Modifiers<'a> {
    ftz: bool,
    sat: bool,
    relu: bool,
    approx: bool,
    full: bool,
    nan: bool,
    round: Round,
    ty: &'a str,
}

impl<'a> Modifiers<'a> {
    fn of(mods: &[&'a str]) -> Option<Self> {
        let (&ty, flags) = mods.split_last()?;
        let mut m = Modifiers {
            ftz: false,
            sat: false,
            relu: false,
            approx: false,
            full: false,
            nan: false,
            round: Round::Nearest,
            ty,
        };
        for &flag in flags {
            match flag {
                "ftz" => m.ftz = true,
                "sat" => m.sat = true,
                "relu" => m.relu = true,
                "approx" => m.approx = true,
                "full" => m.full = true,
                "NaN" => m.nan = true,
                "rn" | "rz" | "rm" | "rp" => m.round = Round::of(flag)?,
                _ => return None,
            }
        }
        Some(m)
    }
}

/// An f32 form in its four variants: plain, `.ftz`, `.sat`, both.
macro_rules! f32_form {
    ($m:ident, |$($a:ident),+| $body:expr) => {
        match ($m.ftz, $m.sat) {
            (false, false) => lanes!(|$($a: f32),+| -> f32 { canonical($body) }),
            (true, false) => lanes!(|$($a: f32),+| -> f32 {
                $(let $a = flush($a);)+
                flush(canonical($body))
            }),
            (false, true) => lanes!(|$($a: f32),+| -> f32 { saturate($body) }),
            (true, true) => lanes!(|$($a: f32),+| -> f32 {
                $(let $a = flush($a);)+
                saturate(flush($body))
            }),
        }
    };
}

/// An f32 form computed as an exact f64 that is then rounded as a mode says.
macro_rules! directed {
    ($m:ident, |$round:ident; $($a:ident),+| $exact:expr) => {
        match $m.round {
            Round::Zero => directed!($m, Zero, |$round; $($a),+| $exact),
            Round::Down => directed!($m, Down, |$round; $($a),+| $exact),
            Round::Up => directed!($m, Up, |$round; $($a),+| $exact),
            _ => None,
        }
    };
    ($m:ident, $mode:ident, |$round:ident; $($a:ident),+| $exact:expr) => {
        f32_form!($m, |$($a),+| {
            let $round = Round::$mode;
            to_f32($exact, $round)
        })
    };
}

/// The form of a floating-point opcode.
pub(crate) fn form(name: &str, mods: &[&str]) -> Option<Form> {
    if let ("testp", [test, ty]) = (name, mods) {
        return testp(test, ty);
    }
    let m = Modifiers::of(mods)?;
    match m.ty {
        "f32" if m.round == Round::Nearest => single(name, &m),
        "f32" => single_directed(name, &m),
        "f64" => double(name, &m),
        "f16" | "f16x2" | "bf16" | "bf16x2" => small(name, &m),
        _ => None,
    }
}

fn single(name: &str, m: &Modifiers) -> Option<Form> {
    match name {
        "add" => f32_form!(m, |a, b| a + b),
        "sub" => f32_form!(m, |a, b| a - b),
        "mul" => f32_form!(m, |a, b| a * b),
        "fma" | "mad" if !m.ftz && !m.sat => {
            Some(Form { run: fma_f32, dst: File::R32, src: &[File::R32, File::R32, File::R32] })
        }
        "fma" | "mad" => f32_form!(m, |a, b, c| a.mul_add(b, c)),
        "div" if m.full => f32_form!(m, |a, b| special::div_full(a, b)),
        "div" if m.approx => f32_form!(m, |a, b| special::div(a, b)),
        "div" => f32_form!(m, |a, b| a / b),
        "rcp" if m.approx => f32_form!(m, |a| special::rcp(a)),
        "rcp" => f32_form!(m, |a| 1.0 / a),
        "sqrt" if m.approx => f32_form!(m, |a| special::sqrt(a)),
        "sqrt" => f32_form!(m, |a| a.sqrt()),
        "rsqrt" => f32_form!(m, |a| special::rsqrt(a)),
        "ex2" => f32_form!(m, |a| ex2(a)),
        "lg2" => f32_form!(m, |a| special::lg2(a)),
        "sin" => f32_form!(m, |a| special::sin(a)),
        "cos" => f32_form!(m, |a| special::cos(a)),
        "tanh" => f32_form!(m, |a| special::tanh(a)),
        // Sign operations keep a NaN's payload.
        "abs" if m.ftz => lanes!(|a: f32| -> f32 { flush(a).abs() }),
        "abs" => lanes!(|a: f32| -> f32 { a.abs() }),
        "neg" if m.ftz => lanes!(|a: f32| -> f32 { -flush(a) }),
        "neg" => lanes!(|a: f32| -> f32 { -a }),
        "copysign" => lanes!(|a: f32, b: f32| -> f32 { b.copysign(a) }),
        "min" if m.nan => f32_form!(m, |a, b| nan_or(a, b, min(a, b))),
        "max" if m.nan => f32_form!(m, |a, b| nan_or(a, b, max(a, b))),
        "min" => f32_form!(m, |a, b| min(a, b)),
        "max" => f32_form!(m, |a, b| max(a, b)),
        _ => None,
    }
}

fn f(x: f32) -> f64 {
    x.into()
}

fn single_directed(name: &str, m: &Modifiers) -> Option<Form> {
    match name {
        "add" => directed!(m, |round; a, b| exact_sum(f(a), f(b), round)),
        "sub" => directed!(m, |round; a, b| exact_sum(f(a), -f(b), round)),
        "mul" => directed!(m, |round; a, b| f(a) * f(b)),
        "fma" => directed!(m, |round; a, b, c| exact_sum(f(a) * f(b), f(c), round)),
        "div" => directed!(m, |round; a, b| quotient(f(a), f(b))),
        "rcp" => directed!(m, |round; a| quotient(1.0, f(a))),
        "sqrt" => directed!(m, |round; a| {
            let root = f(a).sqrt();
            odd((root, if root.is_finite() { (-root).mul_add(root, f(a)) } else { 0.0 }))
        }),
        _ => None,
    }
}

/// A sum that a narrower rounding can take as exact.
fn exact_sum(a: f64, b: f64, round: Round) -> f64 {
    let sum = if a.is_finite() && b.is_finite() { odd(two_sum(a, b)) } else { a + b };
    // Toward minus infinity an exact zero is negative, unless both addends are +0 (IEEE 754, 6.3).
    let is_negative = round == Round::Down && (a.is_sign_negative() || b.is_sign_negative());
    if sum == 0.0 && is_negative { -0.0 } else { sum }
}

fn quotient(a: f64, b: f64) -> f64 {
    let q = a / b;
    if q == 0.0 || !q.is_finite() || !b.is_finite() {
        return q;
    }
    let rest = (-q).mul_add(b, a);
    odd((q, if b < 0.0 { -rest } else { rest }))
}

fn double(name: &str, m: &Modifiers) -> Option<Form> {
    if m.round != Round::Nearest || m.ftz && !m.approx {
        return None;
    }
    match name {
        "add" => lanes!(|a: f64, b: f64| -> f64 { a + b }),
        "sub" => lanes!(|a: f64, b: f64| -> f64 { a - b }),
        "mul" => lanes!(|a: f64, b: f64| -> f64 { a * b }),
        "fma" | "mad" => lanes!(|a: f64, b: f64, c: f64| -> f64 { a.mul_add(b, c) }),
        "div" => lanes!(|a: f64, b: f64| -> f64 { a / b }),
        "rcp" => lanes!(|a: f64| -> f64 { 1.0 / a }),
        "sqrt" => lanes!(|a: f64| -> f64 { a.sqrt() }),
        "rsqrt" => lanes!(|a: f64| -> f64 { 1.0 / a.sqrt() }),
        "abs" => lanes!(|a: f64| -> f64 { a.abs() }),
        "neg" => lanes!(|a: f64| -> f64 { -a }),
        "copysign" => lanes!(|a: f64, b: f64| -> f64 { b.copysign(a) }),
        "min" => lanes!(|a: f64, b: f64| -> f64 {
            if a == b { f64::from_bits(a.to_bits() | b.to_bits()) } else { a.min(b) }
        }),
        "max" => lanes!(|a: f64, b: f64| -> f64 {
            if a == b { f64::from_bits(a.to_bits() & b.to_bits()) } else { a.max(b) }
        }),
        _ => None,
    }
}

fn testp(test: &str, ty: &str) -> Option<Form> {
    match (test, ty) {
        ("finite", "f32") => lanes!(|a: f32| -> bool { a.is_finite() }),
        ("infinite", "f32") => lanes!(|a: f32| -> bool { a.is_infinite() }),
        ("number", "f32") => lanes!(|a: f32| -> bool { !a.is_nan() }),
        ("notanumber", "f32") => lanes!(|a: f32| -> bool { a.is_nan() }),
        // Zeros count as normal.
        ("normal", "f32") => lanes!(|a: f32| -> bool { a.is_normal() || a == 0.0 }),
        ("subnormal", "f32") => lanes!(|a: f32| -> bool { a.is_subnormal() }),
        _ => None,
    }
}

/// `min`: of a number and a NaN the number, and -0 below +0.
pub(crate) fn min(a: f32, b: f32) -> f32 {
    match (a.is_nan(), b.is_nan()) {
        (true, true) => NAN_F32,
        (true, _) => b,
        (_, true) => a,
        _ if a == b => f32::from_bits(a.to_bits() | b.to_bits()),
        _ if a < b => a,
        _ => b,
    }
}

pub(crate) fn max(a: f32, b: f32) -> f32 {
    match (a.is_nan(), b.is_nan()) {
        (true, true) => NAN_F32,
        (true, _) => b,
        (_, true) => a,
        _ if a == b => f32::from_bits(a.to_bits() & b.to_bits()),
        _ if a > b => a,
        _ => b,
    }
}

fn nan_or(a: f32, b: f32, value: f32) -> f32 {
    if a.is_nan() || b.is_nan() { NAN_F32 } else { value }
}

#[inline(always)]
fn fma_lanes(regs: &mut Regs, slots: &Slots, mask: u32) {
    let [a, b, c, _] = slots.s;
    let (a, b, c) = (f32::view(regs, a), f32::view(regs, b), f32::view(regs, c));
    let mut values: Lanes<f32> = [0.0; WARP];
    for (lane, value) in values.iter_mut().enumerate() {
        *value = canonical(f32::get(a, lane).mul_add(f32::get(b, lane), f32::get(c, lane)));
    }
    f32::put(regs, slots.d, &values, mask);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn fma_lanes_x86(regs: &mut Regs, slots: &Slots, mask: u32) {
    fma_lanes(regs, slots, mask);
}

/// The commonest instruction of all: without the host's own fused multiply-add every lane would
/// be a library call.
fn fma_f32(regs: &mut Regs, slots: &Slots, mask: u32) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: the processor has what the function is compiled for.
        return unsafe { fma_lanes_x86(regs, slots, mask) };
    }
    fma_lanes(regs, slots, mask);
}

/// What the 16-bit formats share: exact conversion to f64 and correct rounding back.
pub(crate) trait Small: Copy {
    fn wide(self) -> f64;
    fn narrow(x: f64) -> Self;
    fn bits(self) -> u16;
    fn from_bits(bits: u16) -> Self;
    const SIGN: u16 = 0x8000;

    fn fma(self, b: Self, c: Self) -> Self {
        let product = self.wide() * b.wide();
        if product.is_finite() && c.wide().is_finite() {
            return Self::narrow(exact_sum(product, c.wide(), Round::Nearest));
        }
        Self::narrow(product + c.wide())
    }
    fn sum(self, b: Self) -> Self {
        Self::narrow(exact_sum(self.wide(), b.wide(), Round::Nearest))
    }
    fn difference(self, b: Self) -> Self {
        Self::narrow(exact_sum(self.wide(), -b.wide(), Round::Nearest))
    }
    fn product(self, b: Self) -> Self {
        Self::narrow(self.wide() * b.wide())
    }
    fn negated(self) -> Self {
        Self::from_bits(self.bits() ^ Self::SIGN)
    }
    fn magnitude(self) -> Self {
        Self::from_bits(self.bits() & !Self::SIGN)
    }
    fn smaller(self, b: Self) -> Self {
        Self::narrow(f64::from(min(self.wide() as f32, b.wide() as f32)))
    }
    fn larger(self, b: Self) -> Self {
        Self::narrow(f64::from(max(self.wide() as f32, b.wide() as f32)))
    }
    fn or_nan(self, a: Self, b: Self) -> Self {
        if a.wide().is_nan() || b.wide().is_nan() { Self::from_bits(NAN_F16) } else { self }
    }
    fn relu(self) -> Self {
        let x = self.wide();
        if x.is_nan() || x > 0.0 { self } else { Self::from_bits(0) }
    }
    fn saturated(self) -> Self {
        Self::narrow(f64::from(saturate(self.wide() as f32)))
    }
    fn two_to(self) -> Self {
        Self::narrow(self.wide().exp2())
    }
    fn tanh(self) -> Self {
        Self::narrow(self.wide().tanh())
    }
}

impl Small for f16 {
    fn wide(self) -> f64 {
        self.to_f64()
    }
    fn narrow(x: f64) -> f16 {
        to_f16(x, Round::Nearest)
    }
    fn bits(self) -> u16 {
        self.to_bits()
    }
    fn from_bits(bits: u16) -> f16 {
        f16::from_bits(bits)
    }
}

impl Small for bf16 {
    fn wide(self) -> f64 {
        self.to_f64()
    }
    fn narrow(x: f64) -> bf16 {
        to_bf16(x, Round::Nearest)
    }
    fn bits(self) -> u16 {
        self.to_bits()
    }
    fn from_bits(bits: u16) -> bf16 {
        bf16::from_bits(bits)
    }
}

/// A 16-bit form for both formats, single and packed.
macro_rules! small_form {
    ($m:ident, |$($a:ident),+| $body:expr) => {
        match $m.ty {
            "f16" => lanes!(|$($a: f16),+| -> f16 { $body }),
            "bf16" => lanes!(|$($a: bf16),+| -> bf16 { $body }),
            "f16x2" => lanes!(|$($a: [f16; 2]),+| -> [f16; 2] {
                std::array::from_fn(|half| { $(let $a = $a[half];)+ $body })
            }),
            _ => lanes!(|$($a: [bf16; 2]),+| -> [bf16; 2] {
                std::array::from_fn(|half| { $(let $a = $a[half];)+ $body })
            }),
        }
    };
}

fn small(name: &str, m: &Modifiers) -> Option<Form> {
    // No f16 operation is computed here with denormals flushed.
    if m.round != Round::Nearest || m.ftz && name != "ex2" {
        return None;
    }
    match (name, m.sat, m.relu) {
        ("add", false, _) => small_form!(m, |a, b| a.sum(b)),
        ("add", true, _) => small_form!(m, |a, b| a.sum(b).saturated()),
        ("sub", false, _) => small_form!(m, |a, b| a.difference(b)),
        ("sub", true, _) => small_form!(m, |a, b| a.difference(b).saturated()),
        ("mul", false, _) => small_form!(m, |a, b| a.product(b)),
        ("mul", true, _) => small_form!(m, |a, b| a.product(b).saturated()),
        ("fma", false, false) => small_form!(m, |a, b, c| a.fma(b, c)),
        ("fma", true, false) => small_form!(m, |a, b, c| a.fma(b, c).saturated()),
        ("fma", false, true) => small_form!(m, |a, b, c| a.fma(b, c).relu()),
        ("neg", ..) => small_form!(m, |a| a.negated()),
        ("abs", ..) => small_form!(m, |a| a.magnitude()),
        ("min", ..) if m.nan => small_form!(m, |a, b| a.smaller(b).or_nan(a, b)),
        ("max", ..) if m.nan => small_form!(m, |a, b| a.larger(b).or_nan(a, b)),
        ("min", ..) => small_form!(m, |a, b| a.smaller(b)),
        ("max", ..) => small_form!(m, |a, b| a.larger(b)),
        ("ex2", ..) => small_form!(m, |a| a.two_to()),
        ("tanh", ..) => small_form!(m, |a| a.tanh()),
        _ => None,
    }
}
