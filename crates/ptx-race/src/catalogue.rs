//! The instruction forms this crate models, all of them: what is not listed here is refused when
//! a module is loaded, and the test suite fails for each line that no micro-kernel runs.

use std::collections::BTreeSet;
use std::sync::OnceLock;

/// Forms, with alternatives in braces: `{.a|.b|}` is `.a`, `.b` or nothing.
const PATTERNS: &[&str] = &[
    // Integers.
    "{add|sub|mul.lo|mul.hi|mad.lo|div|rem|min|max|sad}.{u16|s16|u32|s32|u64|s64}",
    "{add|sub}.sat.s32",
    "{mul|mad}.wide.{u16|s16|u32|s32}",
    "mul24.lo.{u32|s32}",
    "mad.hi.{u32|s32|u64|s64}",
    "{abs|neg}.{s16|s32|s64}",
    "dp4a.{u32|s32}.{u32|s32}",
    "{add.cc|addc|addc.cc|sub.cc|subc|subc.cc}.{u32|s32|u64|s64}",
    "{and|or|xor|not}.{pred|b16|b32|b64}",
    "{cnot|shl}.{b16|b32|b64}",
    "shr.{b16|u16|s16|b32|u32|s32|b64|u64|s64}",
    "shf.{l|r}.{wrap|clamp}.b32",
    "{lop3|prmt}.b32",
    "{popc|clz|brev|bfi}.{b32|b64}",
    "{bfind|bfe}.{u32|s32|u64|s64}",
    "bfind.shiftamt.u32",
    "mov.{pred|b16|u16|s16|b32|u32|s32|f32|b64|u64|s64|f64}",
    "selp.{b16|u16|s16|b32|u32|s32|f32|b64|u64|s64|f64}",
    "slct.{b32|u32|s32|f32|b64|u64|s64|f64}.s32",
    "slct.{b32|u32|s32|f32}.f32",
    // Comparisons.
    "setp.{eq|ne|lt|le|gt|ge}{|.and|.or|.xor}.{s16|s32|s64|u16|u32|u64}",
    "setp.{lo|ls|hi|hs}{|.and|.or|.xor}.{u16|u32|u64}",
    "setp.{eq|ne}{|.and|.or|.xor}.{b16|b32|b64}",
    "setp.{eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan}{|.and|.or|.xor}\
     .{f32|ftz.f32|f64|f16|bf16}",
    "set.{eq|ne|lt|le|gt|ge}.{u32|s32|f32}.{s32|u32}",
    "set.{eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan}{|.ftz}.{u32|s32|f32}.f32",
    "set.{eq|ne|lt|le|gt|ge|neu|ltu|leu|gtu|geu}.{f16x2.f16x2|bf16x2.bf16x2}",
    "testp.{finite|infinite|number|notanumber|normal|subnormal}.f32",
    // Floating point.
    "{add|sub|mul}{|.rn|.rz|.rm|.rp}{|.ftz}{|.sat}.f32",
    "fma.{rn|rz|rm|rp}{|.ftz}{|.sat}.f32",
    "div.{rn|rz|rm|rp|approx|full}{|.ftz}.f32",
    "{rcp|sqrt}.{rn|rz|rm|rp|approx}{|.ftz}.f32",
    "{rsqrt|ex2|lg2|sin|cos}.approx{|.ftz}.f32",
    "tanh.approx.f32",
    "{abs|neg}{|.ftz}.f32",
    "{min|max}{|.ftz}{|.NaN}.f32",
    "{add|sub|mul}{|.rn}.f64",
    "{fma|div|rcp|sqrt}.rn.f64",
    "rsqrt.approx.f64",
    "{abs|neg|min|max}.f64",
    "copysign.{f32|f64}",
    "{add|sub|mul}{|.rn}{|.sat}.{f16|f16x2}",
    "{add|sub|mul}{|.rn}.{bf16|bf16x2}",
    "fma.rn{|.sat|.relu}.{f16|f16x2}",
    "fma.rn{|.relu}.{bf16|bf16x2}",
    "{neg|abs|min|max|min.NaN|max.NaN|tanh.approx}.{f16|f16x2|bf16|bf16x2}",
    "ex2.approx.{f16|f16x2|ftz.bf16|ftz.bf16x2}",
    // Conversions.
    "cvt{|.sat}.{u8|s8|u16|s16|u32|s32|u64|s64}.{u8|s8|u16|s16|u32|s32|u64|s64}",
    "cvt.{rn|rz|rm|rp}.{f16|bf16|f32|f64}.{u8|s8|u16|s16|u32|s32|u64|s64}",
    "cvt.{rni|rzi|rmi|rpi}{|.sat}.{u8|s8|u16|s16|u32|s32|u64|s64}.{f16|bf16|f32|f64}",
    "cvt.{rni|rzi|rmi|rpi}.ftz{|.sat}.{u8|s8|u16|s16|u32|s32|u64|s64}.f32",
    "cvt.{rni|rzi|rmi|rpi}.{f16.f16|f64.f64}",
    "cvt{|.rni|.rzi|.rmi|.rpi}{|.ftz}{|.sat}.f32.f32",
    "cvt{|.ftz}{|.sat}.f32.f16",
    "cvt{.f32.bf16|.f64.f16|.f64.bf16|.f64.f32|.ftz.f64.f32}",
    "cvt.{rn|rz|rm|rp}{|.ftz}{|.sat}.f32.f64",
    "cvt.{rn|rz|rm|rp}.f16.{f32|f64}",
    "cvt.{rn|rz}.{relu.f16|bf16|relu.bf16}.f32",
    "cvt.{rn|rn.relu|rz}.{f16x2|bf16x2}.f32",
    "cvt.{rna|rn|rz}.tf32.f32",
    "cvt.pack.sat.s16.s32",
    "cvta{|.to}.{global|const|shared|local}.u64",
    "isspacep.{global|shared|local}",
    // Memory.
    "ld{|.volatile}{|.global|.shared|.local}{|.v2|.v4}.{b8|u8|s8|b16|u16|s16|b32|u32|s32|f32}",
    "ld{|.volatile}{|.global|.shared|.local}{|.v2}.{b64|u64|s64|f64}",
    "ld.{relaxed|acquire}{|.global|.shared}.{b8|u8|s8|b16|u16|s16|b32|u32|s32|f32}",
    "ld.{relaxed|acquire}{|.global|.shared}.{b64|u64|s64|f64}",
    "ld.{const|param}{|.v2|.v4}.{b8|u8|s8|b16|u16|s16|b32|u32|s32|f32}",
    "ld.{const|param}{|.v2}.{b64|u64|s64|f64}",
    "st{|.volatile}{|.global|.shared|.local}{|.v2|.v4}.{b8|u8|s8|b16|u16|s16|b32|u32|s32|f32}",
    "st{|.volatile}{|.global|.shared|.local}{|.v2}.{b64|u64|s64|f64}",
    "st.{relaxed|release}{|.global|.shared}.{b8|u8|s8|b16|u16|s16|b32|u32|s32|f32}",
    "st.{relaxed|release}{|.global|.shared}.{b64|u64|s64|f64}",
    "st.param{|.v2|.v4}.{b8|u8|s8|b16|u16|s16|b32|u32|s32|f32}",
    "st.param{|.v2}.{b64|u64|s64|f64}",
    "atom{|.acquire|.release|.acq_rel}{|.global|.shared}\
     .{add.u32|add.s32|add.u64|add.f32|add.f64|add.f16|add.bf16|add.f16x2|add.bf16x2}",
    "atom{|.acquire|.release|.acq_rel}{|.global|.shared}\
     .{exch.b32|exch.b64|cas.b16|cas.b32|cas.b64|inc.u32|dec.u32}",
    "atom{|.acquire|.release|.acq_rel}{|.global|.shared}.{min|max}.{u32|s32|u64|s64}",
    "atom{|.acquire|.release|.acq_rel}{|.global|.shared}.{and|or|xor}.{b32|b64}",
    "red{|.release}{|.global|.shared}\
     .{add.u32|add.s32|add.u64|add.f32|add.f64|add.f16|add.bf16|add.f16x2|add.bf16x2}",
    "red{|.release}{|.global|.shared}.{inc|dec}.u32",
    "red{|.release}{|.global|.shared}.{min|max}.{u32|s32|u64|s64}",
    "red{|.release}{|.global|.shared}.{and|or|xor}.{b32|b64}",
    "membar.{cta|gl|sys}",
    "fence.{sc|acq_rel|acquire|release}.{cta|cluster|gpu|sys}",
    "prefetch{|.global}.{L1|L2}",
    "cp.async.{ca|cg}.shared.global",
    "cp.async.{commit_group|wait_group|wait_all}",
    // Across lanes and warps.
    "shfl.sync.{up|down|bfly|idx}.b32",
    "vote.sync.{all.pred|any.pred|uni.pred|ballot.b32}",
    "match.{any|all}.sync.{b32|b64}",
    "redux.sync.{add|min|max}.{u32|s32}",
    "redux.sync.{and|or|xor}.b32",
    "activemask.b32",
    "bar.{sync|arrive|red.popc.u32|red.and.pred|red.or.pred|warp.sync}",
    "ldmatrix.sync.aligned.m8n8.{x1|x2|x4}{|.trans}{|.shared}.b16",
    "movmatrix.sync.aligned.m8n8.trans.b16",
    "mma.sync.aligned.{m16n8k8|m16n8k16}.row.col.f32.bf16.bf16.f32",
    "mma.sync.aligned.{m16n8k8|m16n8k16}.row.col.{f16.f16.f16.f16|f32.f16.f16.f32}",
    "mma.sync.aligned.{m16n8k4|m16n8k8}.row.col.f32.tf32.tf32.f32",
    // Control flow.
    "{bra|call|ret}{|.uni}",
    "brx.idx",
    "{exit|trap}",
    "nanosleep.u32",
];

fn expand(pattern: &str, into: &mut BTreeSet<String>) {
    let Some((head, rest)) = pattern.split_once('{') else {
        into.insert(pattern.to_owned());
        return;
    };
    let (choices, tail) = rest.split_once('}').unwrap_or((rest, ""));
    for choice in choices.split('|') {
        expand(&format!("{head}{choice}{tail}"), into);
    }
}

/// The instruction forms this crate models, in alphabetical order: opcodes as [`form_of`] gives
/// them. What is not among them is an error when a module is loaded.
pub fn forms() -> &'static BTreeSet<String> {
    static FORMS: OnceLock<BTreeSet<String>> = OnceLock::new();
    FORMS.get_or_init(|| {
        let mut forms = BTreeSet::new();
        for pattern in PATTERNS {
            expand(pattern, &mut forms);
        }
        forms
    })
}

/// The form of an opcode: what is left of it without hints to caches and without scopes, the
/// modifiers of a memory instruction in the order of the ISA. `ld.global.nc.L1::no_allocate.f32`
/// is of the form `ld.global.f32`. Operands play no part: `mov.b32` is one form, of a register or
/// of a vector.
pub fn form_of(opcode: &str) -> String {
    let mut parts: Vec<&str> = opcode.split('.').collect();
    match parts[0] {
        "ld" | "st" | "atom" | "red" => {
            let access = matches!(parts[0], "ld" | "st");
            parts.retain(|part| match *part {
                "cta" | "cluster" | "gpu" | "sys" | "noftz" => false,
                "weak" | "nc" | "ca" | "cg" | "cs" | "lu" | "cv" | "wb" | "wt" => !access,
                // What every atomic is.
                "relaxed" => access,
                part => !hint(part),
            });
            for part in &mut parts {
                *part = match *part {
                    "shared::cta" => "shared",
                    "param::entry" | "param::func" => "param",
                    part => part,
                };
            }
            parts[1..].sort_by_key(|part| match *part {
                "volatile" | "relaxed" | "acquire" | "release" | "acq_rel" => 0,
                "global" | "shared" | "local" | "const" | "param" => 1,
                "v2" | "v4" => 2,
                _ => 3,
            });
        }
        "cp" => parts.retain(|part| !hint(part)),
        "bar" | "barrier" => {
            parts.retain(|part| !matches!(*part, "cta" | "aligned"));
            parts[0] = "bar";
        }
        _ => {}
    }
    parts.join(".").replace("shared::cta", "shared")
}

fn hint(part: &str) -> bool {
    part.starts_with("L1::") || part.starts_with("L2::")
}
