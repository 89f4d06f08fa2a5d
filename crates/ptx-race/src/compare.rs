//! Comparisons: `setp` into predicates, packed `set` into registers.

// "Not at least" is meant where NaN must compare true.
#![allow(clippy::neg_cmp_op_on_partial_ord, clippy::nonminimal_bool, clippy::double_comparisons)]

use half::{bf16, f16};

use crate::math::flush;
use crate::registers::{Form, Lanes, Reg, Regs, Slots, lanes};

/// A comparison of two registers into a predicate, `lt` and `s32` given.
pub(crate) fn predicate(comparison: &str, ftz: bool, ty: &str) -> Option<Form> {
    macro_rules! ordered {
        ($ty:ty) => {
            match comparison {
                "eq" => lanes!(|a: $ty, b: $ty| -> bool { a == b }),
                "ne" => lanes!(|a: $ty, b: $ty| -> bool { a != b }),
                "lt" | "lo" => lanes!(|a: $ty, b: $ty| -> bool { a < b }),
                "le" | "ls" => lanes!(|a: $ty, b: $ty| -> bool { a <= b }),
                "gt" | "hi" => lanes!(|a: $ty, b: $ty| -> bool { a > b }),
                "ge" | "hs" => lanes!(|a: $ty, b: $ty| -> bool { a >= b }),
                _ => None,
            }
        };
    }
    // Without a `u`, a comparison with NaN is false; that goes for `ne` too.
    macro_rules! float {
        ($ty:ty, |$x:ident| $prepare:expr) => {{
            macro_rules! compare {
                (|$a:ident, $b:ident| $body:expr) => {
                    lanes!(|$a: $ty, $b: $ty| -> bool {
                        let [$a, $b] = [$a, $b].map(|$x| $prepare);
                        $body
                    })
                };
            }
            match comparison {
                "eq" => compare!(|a, b| a == b),
                "ne" => compare!(|a, b| a < b || a > b),
                "lt" => compare!(|a, b| a < b),
                "le" => compare!(|a, b| a <= b),
                "gt" => compare!(|a, b| a > b),
                "ge" => compare!(|a, b| a >= b),
                "equ" => compare!(|a, b| !(a < b || a > b)),
                "neu" => compare!(|a, b| a != b),
                "ltu" => compare!(|a, b| !(a >= b)),
                "leu" => compare!(|a, b| !(a > b)),
                "gtu" => compare!(|a, b| !(a <= b)),
                "geu" => compare!(|a, b| !(a < b)),
                "num" => compare!(|a, b| a.partial_cmp(&b).is_some()),
                "nan" => compare!(|a, b| a.partial_cmp(&b).is_none()),
                _ => None,
            }
        }};
    }
    match ty {
        "s16" => ordered!(i16),
        "u16" | "b16" => ordered!(u16),
        "s32" => ordered!(i32),
        "u32" | "b32" => ordered!(u32),
        "s64" => ordered!(i64),
        "u64" | "b64" => ordered!(u64),
        "f32" if ftz => float!(f32, |x| flush(x)),
        "f32" => float!(f32, |x| x),
        "f64" => float!(f64, |x| x),
        "f16" => float!(f16, |x| x.to_f32()),
        "bf16" => float!(bf16, |x| x.to_f32()),
        _ => None,
    }
}

/// The packed `set.lt.f16x2.f16x2`; decoding writes other `set`s as `setp` and `selp`.
pub(crate) fn packed_set(comparison: &str, ty: &str) -> Option<Form> {
    macro_rules! packed {
        ($half:ty) => {{
            macro_rules! compare {
                (|$a:ident, $b:ident| $body:expr) => {
                    lanes!(|x: [$half; 2], y: [$half; 2]| -> [$half; 2] {
                        std::array::from_fn(|half| {
                            let ($a, $b) = (x[half].to_f32(), y[half].to_f32());
                            if $body { <$half>::ONE } else { <$half>::ZERO }
                        })
                    })
                };
            }
            match comparison {
                "eq" => compare!(|a, b| a == b),
                "ne" => compare!(|a, b| a < b || a > b),
                "lt" => compare!(|a, b| a < b),
                "le" => compare!(|a, b| a <= b),
                "gt" => compare!(|a, b| a > b),
                "ge" => compare!(|a, b| a >= b),
                "neu" => compare!(|a, b| a != b),
                "ltu" => compare!(|a, b| !(a >= b)),
                "leu" => compare!(|a, b| !(a > b)),
                "gtu" => compare!(|a, b| !(a <= b)),
                "geu" => compare!(|a, b| !(a < b)),
                _ => None,
            }
        }};
    }
    match ty {
        "f16x2" => packed!(f16),
        "bf16x2" => packed!(bf16),
        _ => None,
    }
}
