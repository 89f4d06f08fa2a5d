//! Limits: whatever a text or a launch asks for, it ends soon, in bounded memory, without a panic.

// PTX is put together line by line.
#![allow(clippy::format_collect)]

use std::time::{Duration, Instant};

use ptx_race::{Arg, Check, Config, Fault, FaultKind, Memory, Module, Options, Stats};

use crate::nvcc::load;

const HEAD: &str = ".version 9.0\n.target sm_80\n.address_size 64\n";

fn launch(text: &str, config: &Config, options: &Options) -> Result<Stats, Box<Fault>> {
    let kernel = load(&format!("{HEAD}{text}")).kernel("k").unwrap();
    kernel.launch(&Memory::new(), config, &[], options)
}

fn kind(text: &str, config: &Config, options: &Options) -> FaultKind {
    launch(text, config, options).expect_err(text).kind
}

fn limited(max_instructions: u64) -> Options {
    Options { max_instructions, ..Options::default() }
}

#[test]
fn empty_kernels_run() {
    for text in [".entry k() { }", ".entry k() { {} }", ".func f() { } .entry k() { call f; }"] {
        let stats = launch(text, &Config::linear(2, 33), &Options::default()).unwrap();
        assert!(stats.by_opcode["ret"] >= 4, "{text}: {stats:?}");
        let module = load(&format!("{HEAD}{text}"));
        assert!(module.kernel("k").unwrap().instruction_mix().len() <= 1);
    }
}

#[test]
fn the_largest_instruction_limit_is_no_limit() {
    let stats = launch(".entry k() { ret; }", &Config::linear(1, 32), &limited(u64::MAX)).unwrap();
    assert_eq!(stats.warp_instructions, 1);
    assert_eq!(kind(".entry k() { ret; }", &Config::linear(1, 1), &limited(0)), FaultKind::Budget);
}

/// The limit is on the launch: blocks that are each within it exceed it together, at the same
/// block for any number of threads.
#[test]
fn the_instruction_limit_counts_all_blocks() {
    let loops = ".entry k() { .reg .b32 %r; .reg .pred %p; mov.u32 %r, 0;
        L: add.u32 %r, %r, 1; setp.lt.u32 %p, %r, 1000; @%p bra L; ret; }";
    let one = launch(loops, &Config::linear(1, 32), &Options::default()).unwrap();
    let limit = one.warp_instructions * 10 + 5;
    for threads in [1, 2, 5] {
        let options = Options { threads, ..limited(limit) };
        assert!(launch(loops, &Config::linear(10, 32), &options).is_ok());
        let fault = launch(loops, &Config::linear(1000, 32), &options).unwrap_err();
        assert_eq!(fault.kind, FaultKind::Budget);
        assert!(fault.message.contains("(10, 0, 0)"), "{threads} threads: {fault}");
    }
    let start = Instant::now();
    let empty = ".entry k() { ret; }";
    for check in [Check::Faults, Check::Races] {
        let options = Options { check, threads: usize::MAX, ..limited(20_000) };
        assert_eq!(kind(empty, &Config::linear(i32::MAX as u32, 1), &options), FaultKind::Budget);
        let endless = ".entry k() { L: bra L; }";
        assert_eq!(kind(endless, &Config::linear(60_000, 1024), &options), FaultKind::Budget);
    }
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
}

#[test]
fn global_variables_are_bounded() {
    for text in [
        ".global .b8 x[4294967295];",
        ".global .b8 x[4294967296];",
        ".global .b8 x[600000000];\n.const .b8 y[600000000];",
        ".entry k() {\n.global .b8 x[4000000000]; ret; }",
    ] {
        let error = Module::from_ptx(&format!("{HEAD}{text}")).expect_err(text);
        assert!(error.message.contains("bytes"), "{text}: {error}");
    }
    // What is declared and not touched costs nothing.
    let text = ".global .b8 x[1000000000]; .entry k() { ret; }";
    let start = Instant::now();
    for _ in 0..20 {
        launch(text, &Config::linear(1, 1), &Options::default()).unwrap();
    }
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}

#[test]
fn impossible_shapes_are_refused() {
    const MAX: u32 = u32::MAX;
    let plain = ".entry k() { ret; }";
    let wide = ".entry k() .maxntid 4294967295, 4294967295, 4294967295 { ret; }";
    assert!(launch(wide, &Config::linear(1, 1024), &Options::default()).is_ok());
    for config in [
        Config { grid: [1; 3], block: [MAX; 3], shared: 0 },
        Config { grid: [MAX; 3], block: [1; 3], shared: 0 },
        Config { grid: [i32::MAX as u32, 65535, 65535], block: [1; 3], shared: 0 },
        Config { grid: [1; 3], block: [1024, 1024, 64], shared: 0 },
        Config { grid: [1; 3], block: [1; 3], shared: MAX },
        Config { grid: [0; 3], block: [0; 3], shared: 0 },
    ] {
        for text in [plain, wide] {
            assert_eq!(kind(text, &config, &Options::default()), FaultKind::Launch, "{config:?}");
        }
    }
    let races = Options { check: Check::Races, ..Options::default() };
    let config = Config { grid: [1 << 30, 2, 1], block: [1024, 1, 1], shared: 0 };
    assert_eq!(kind(plain, &config, &races), FaultKind::Launch);
    let text = ".entry k() .reqntid 4294967295, 4294967295, 4294967295 { ret; }";
    assert_eq!(kind(text, &Config::linear(1, 1), &Options::default()), FaultKind::Launch);
}

/// Calls cost their frames: memory is bounded, and so is the time of a loop of calls.
#[test]
fn frames_are_bounded() {
    let local = ".func f() { .local .b8 a[400000]; .reg .b64 %d; mov.u64 %d, a;
        st.local.u8 [%d], 1; call f; ret; } .entry k() { call f; ret; }";
    let config = Config::linear(1, 1024);
    assert_eq!(kind(local, &config, &Options::default()), FaultKind::StackOverflow);
    let registers: String = (0..60_000).map(|i| format!("mov.b32 %r{i}, 0;\n")).collect();
    let wide = format!(".func f() {{ .reg .b32 %r<60000>; ret; {registers} }}");
    let recursive = wide.replace("ret;", "call f; ret;") + ".entry k() { call f; ret; }";
    assert_eq!(kind(&recursive, &config, &Options::default()), FaultKind::StackOverflow);
    let start = Instant::now();
    let loops = wide + ".entry k() { L: call f; bra L; }";
    assert_eq!(kind(&loops, &Config::linear(1, 32), &limited(100_000)), FaultKind::Budget);
    let params = ".func f(.param .b8 p[32000]) { ret; } .entry k() { .param .b8 p[32000];
        L: call f, (p); bra L; }";
    assert_eq!(kind(params, &Config::linear(1, 32), &limited(1_000_000)), FaultKind::Budget);
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    let many: String = (0..70_000).map(|i| format!("mov.b32 %r{i}, 0;\n")).collect();
    let text = format!("{HEAD}.entry k() {{ .reg .b32 %r<70000>; {many} }}");
    assert!(Module::from_ptx(&text).unwrap_err().message.contains("registers"));
}

#[test]
fn copies_in_flight_are_bounded() {
    let text = ".global .align 16 .b8 g[16]; .entry k() { .shared .align 16 .b8 s[16];
        .reg .b32 %r; .reg .b64 %d; mov.u32 %r, s; mov.u64 %d, g;
        L: cp.async.cg.shared.global [%r], [%d], 16; bra L; }";
    let fault = launch(text, &Config::linear(1, 32), &Options::default()).unwrap_err();
    assert_eq!(fault.kind, FaultKind::Capacity);
    assert!(fault.message.contains("in flight"), "{fault}");
}

/// Decoding takes time in proportion to the text.
#[test]
fn long_texts_decode_in_linear_time() {
    let start = Instant::now();
    let refused = |body: &str, word: &str| {
        let error = Module::from_ptx(&format!("{HEAD}.entry k() {{ {body} }}")).unwrap_err();
        assert!(error.message.contains(word), "{error}");
    };
    refused(&format!("mov.b32 %r{}, 0;", "1".repeat(400_000)), "not a register");
    refused(&("{".repeat(300) + &"}".repeat(300)), "scopes");
    let labels: String = (0..2000).map(|i| format!("L{i}:\n")).collect();
    let list = (0..2000).map(|i| format!("L{i}")).collect::<Vec<_>>().join(", ");
    let branches = "brx.idx %r, T;\n".repeat(2000);
    refused(
        &format!(".reg .b32 %r; {labels} T: .branchtargets {list};\n{branches}"),
        "branch targets",
    );
    let ranges: String = (0..50_000).map(|i| format!(".reg .b32 %a{i}_<2>;\n")).collect();
    let uses = "mov.b32 %b, %a1_0;\n".repeat(50_000);
    let text = format!("{HEAD}.entry k() {{ .reg .b32 %b; {ranges} {uses} }}");
    assert!(Module::from_ptx(&text).is_ok());
    // A ladder of branches, each over half of those that follow.
    let count = 50_000;
    let ladder: String = (0..count)
        .map(|i| format!("L{i}: @%p bra L{};\n", if i < count / 2 { i + count / 2 } else { i }))
        .collect();
    let text = format!("{HEAD}.entry k() {{ .reg .pred %p; {ladder} }}");
    assert!(Module::from_ptx(&text).is_ok());
    // Entries that share a function with many shared variables.
    let variables: String = (0..2000).map(|i| format!(".shared .b8 s{i}[1];\n")).collect();
    let moves: String = (0..2000).map(|i| format!("mov.u32 %r, s{i};\n")).collect();
    let entries: String = (0..2000).map(|i| format!(".entry k{i}() {{ call f; }}\n")).collect();
    let text = format!("{HEAD}{variables}.func f() {{ .reg .b32 %r; {moves} }}\n{entries}");
    let module = Module::from_ptx(&text).unwrap();
    assert_eq!(module.kernel("k7").unwrap().static_shared(), 2000);
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
}

/// Arguments of any bytes are arguments: what they point to is checked when it is accessed.
#[test]
fn wild_pointers_are_faults() {
    let text = format!(
        "{HEAD}.entry k(.param .u64 p) {{ .reg .b64 %d; .reg .b32 %r; ld.param.u64 %d, [p];
        ld.u32 %r, [%d]; st.u32 [%d+4], %r; ret; }}"
    );
    let kernel = load(&text).kernel("k").unwrap();
    let memory = Memory::new();
    memory.alloc(&[0; 4]);
    for pointer in
        [0, 4, u64::MAX - 3, 1 << 63, 0x7F00_0000_0000, 0x7E00_0000_0000, 0x7E00_FFFF_FFFC]
    {
        let result = kernel.launch(
            &memory,
            &Config::linear(1, 1),
            &[Arg::from(pointer)],
            &Options::default(),
        );
        assert_eq!(result.unwrap_err().kind, FaultKind::OutOfBounds, "{pointer:#x}");
    }
}
