//! Hostile text: an error with its line, never a panic, a hang or an enormous allocation.

use std::time::{Duration, Instant};

use ptx_race::{Arg, Check, Config, Memory, Module, Options};

use crate::nvcc;
use crate::reference::Random;

const HEAD: &str = ".version 9.0\n.target sm_80\n.address_size 64\n";

#[test]
fn errors_say_the_line_and_the_reason() {
    for (text, line, word) in [
        (".entry k() {\n frobnicate.b32 %r1;\n}", 5, "`frobnicate.b32` is not modeled"),
        (".entry k() {\n .reg .b32 %r<2>;\n add.s33 %r1, %r1, %r1;\n}", 6, "`add.s33`"),
        (".entry k() {\n .reg .b32 %r<2>;\n add.s32 %r1, %r1, %r2;\n}", 6, "unknown name `%r2`"),
        (
            ".entry k() {\n .reg .b64 %r<2>;\n add.s32 %r1, %r1, %r1;\n}",
            6,
            "not of at most 32 bits",
        ),
        (
            ".entry k() {\n .reg .b32 %r<2>;\n add.s32 %r1, %r1;\n}",
            6,
            "expected 3 operands, found 2",
        ),
        (".entry k() {\n bra NOWHERE;\n}", 5, "label `NOWHERE`"),
        (".entry k() {\n L:\n L:\n}", 6, "defined twice"),
        (".entry k() {\n call f;\n}", 5, "`f` is not defined"),
        (".entry k() {\n .reg .b32 %r<2>;\n", 6, "the text"),
        (".global .b8 x[4] = {1, 2, 3, 4, 5};", 4, "too many values"),
        (".global .u64 x = y;", 4, "addresses"),
        (".shared .b8 x[99999999999];", 4, "larger than"),
        (".entry k() {\n .local .b8 x[9999999];\n}", 5, "larger than"),
        (".entry k(.param .b8 p[99999]) { ret; }", 4, "larger than"),
    ] {
        let error = Module::from_ptx(&format!("{HEAD}{text}")).expect_err(text);
        let told = error.to_string();
        assert!(error.line == line && told.contains(word), "{text}: {told}");
    }
}

#[test]
fn huge_numbers_cost_nothing() {
    let start = Instant::now();
    for text in [
        ".entry k() { .reg .b32 %r<18446744073709551615>; mov.b32 %r1, %r18446744073709551614; }",
        ".entry k() { .reg .b32 %r<99999999999999999999999>; }",
        ".global .b8 x[4294967295];",
        ".global .align 1099511627776 .b8 x[4];",
        ".entry k() { .reg .b64 %rd<3>; .reg .b32 %r<2>; ld.global.b32 %r1, [%rd1+-9223372036854775808]; }",
        ".entry k() { .reg .b32 %r<2>; mov.b32 %r1, 0xFFFFFFFFFFFFFFFFF; }",
    ] {
        let _ = Module::from_ptx(&format!("{HEAD}{text}"));
    }
    let nested = format!("{HEAD}.entry k() {{{}", "{".repeat(200_000));
    assert!(Module::from_ptx(&nested).is_err());
    let operand = format!("{HEAD}.entry k() {{ mov.b32 {}", "{".repeat(200_000));
    assert!(Module::from_ptx(&operand).is_err());
    assert!(start.elapsed() < Duration::from_secs(10));
}

/// A text of our own that touches most of the grammar, for machines without nvcc.
const SEED: &str = r#".version 9.0
.target sm_80
.address_size 64
.extern .func (.param .b32 r) vprintf(.param .b64 a, .param .b64 b);
.const .align 4 .f32 table[3] = {0f3F800000, 1.5, -2.0};
.extern .shared .align 16 .b8 dynamic[];
.visible .entry k(.param .u64 .ptr .global .align 16 out, .param .align 8 .b8 s[24]) .maxntid 128, 1, 1
{
    .shared .align 16 .b8 tile[256]; // a comment
    .reg .pred %p<4>; .reg .b16 %rs<5>; .reg .b32 %r<20>; .reg .f32 %f<9>; .reg .b64 %rd<9>;
    .loc 1 7 3, function_name $L__info_string0, inlined_at 1 9 4
    ld.param.u64 %rd1, [out]; cvta.to.global.u64 %rd1, %rd1;
    mov.u32 %r1, %tid.x; setp.lt.and.s32 %p1|%p2, %r1, 5, !%p3; /* another */
    @!%p1 bra $L__BB0_2;
    mad.wide.u32 %rd2, %r1, 4, %rd1; ld.global.nc.v2.f32 {%f1, %f2}, [%rd2+8];
    fma.rn.f32 %f3, %f1, 0f40000000, %f2; st.global.f32 [%rd2+-4], %f3;
$L__BB0_2:
    shfl.sync.bfly.b32 %r2|%p1, %r1, 1, 31, -1; bar.sync 0;
    { .reg .b32 t; mov.b32 t, {%rs1, %rs2}; mov.b64 {%r3, %r4}, %rd1; }
    and.b32 %r5, %r1, 1; brx.idx %r5, $T;
$T: .branchtargets $L__BB0_2, $E;
$E: mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1, %f2, %f3, %f4}, {%r1, %r2, %r3, %r4}, {%r5, %r6}, {%f1, %f2, %f3, %f4};
    ret;
}
.file 1 "a.cu"
.section .debug_str { $L__info_string0: .b8 1,2,3 }
"#;

/// Changes a text here and there: the pieces of real PTX in wrong places.
fn mutate(text: &str, random: &mut Random) -> String {
    let mut bytes = text.as_bytes().to_vec();
    let at = |random: &mut Random, len: usize| random.bits() as usize % len.max(1);
    for _ in 0..=random.bits() % 4 {
        let place = at(random, bytes.len());
        match random.bits() % 7 {
            0 => bytes.truncate(place),
            1 => {
                let marks = b" ,;{}[]()<>.%$@!|:+-_09afx\"/*\n\xC3";
                bytes[place] = marks[at(random, marks.len())];
            }
            2 => {
                let end = (place + 1 + at(random, 40)).min(bytes.len());
                bytes.drain(place..end);
            }
            3 => {
                let from = at(random, bytes.len());
                let end = (from + 1 + at(random, 60)).min(bytes.len());
                let piece = bytes[from..end].to_vec();
                bytes.splice(place..place, piece);
            }
            4 => {
                let number = [0, 1, 31, 1 << 31, u64::MAX, 1 << 62][at(random, 6)].to_string();
                bytes.splice(place..place, number.into_bytes());
            }
            5 => {
                // Swap two words.
                let words: Vec<_> =
                    String::from_utf8_lossy(&bytes).split(' ').map(str::to_owned).collect();
                let mut words = words;
                let (a, b) = (at(random, words.len()), at(random, words.len()));
                words.swap(a, b);
                bytes = words.join(" ").into_bytes();
            }
            _ => bytes.insert(place, random.bits() as u8),
        }
        if bytes.is_empty() {
            break;
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Launches the kernels of a module on whatever arguments fit, and takes what comes.
fn run_somehow(module: &Module, random: &mut Random) {
    let memory = Memory::new();
    let buffer = memory.alloc(&[1; 4096]);
    for kernel in module.kernels().take(2) {
        let arg = |param: &ptx_race::Param| match param.size {
            8 if !random.bits().is_multiple_of(4) => Arg::from(buffer),
            size if random.bits().is_multiple_of(2) => Arg::bytes(&vec![0; size]),
            size => Arg::bytes(&vec![0xFF; size]),
        };
        let args: Vec<Arg> = kernel.params().iter().map(arg).collect();
        let config = Config { grid: [2, 1, 1], block: [48, 1, 1], shared: 64 };
        let check = if random.bits().is_multiple_of(2) { Check::Races } else { Check::Faults };
        let options = Options { check, max_instructions: 300, ..Options::default() };
        let _ = kernel.launch(&memory, &config, &args, &options);
    }
}

/// Texts to try of each seed; `PTX_RACE_MUTATED_TEXTS` asks for more.
fn texts(usual: usize) -> usize {
    let given = std::env::var("PTX_RACE_MUTATED_TEXTS").ok().and_then(|count| count.parse().ok());
    given.unwrap_or(usual)
}

#[test]
fn mutated_text_never_panics() {
    assert!(Module::from_ptx(SEED).is_ok(), "{:?}", Module::from_ptx(SEED));
    let mut random = Random::new(17);
    let mut accepted = 0;
    let mut try_one = |text: &str, random: &mut Random| {
        let module = Module::from_ptx(&mutate(text, random)).ok();
        accepted += u32::from(module.is_some());
        if let Some(module) = module {
            run_somehow(&module, random);
        }
    };
    let count = texts(20_000);
    for _ in 0..count {
        try_one(SEED, &mut random);
    }
    for file in ["cross_entropy.cu", "pipeline.cu", "flash.cu"] {
        let Some(text) = nvcc::ptx(file, &[]) else { return };
        for _ in 0..count / 50 {
            try_one(&text, &mut random);
        }
    }
    // Enough of both that the mutations are neither harmless nor hopeless.
    assert!((count / 200..count).contains(&(accepted as usize)), "{accepted} of {count} accepted");
}
