//! Faults beyond the mutation tests, each with the place it names.

use ptx_race::{Arg, Config, Fault, FaultKind, Memory, Options};

use crate::nvcc::load;

/// Line of the first line of the body in the text below.
const FIRST_LINE: u32 = 9;

/// Launches a body with one buffer of 64 words and another, unwritten, of 64 words.
fn launch(body: &str, config: &Config, options: &Options) -> Result<(), Box<Fault>> {
    let text = format!(
        ".version 9.0
.target sm_80
.address_size 64
.entry k(.param .u64 a, .param .u64 b) {{
.shared .align 16 .b8 s[128];
.reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .pred %p<9>; .reg .f32 %f<9>;
ld.param.u64 %rd1, [a]; ld.param.u64 %rd2, [b];
mov.u32 %r1, %tid.x; mov.u32 %r2, s; mad.lo.u32 %r2, %r1, 4, %r2;
{body}
ret; }}"
    );
    let memory = Memory::new();
    let a = memory.alloc(&[0; 256]);
    let b = memory.alloc_uninit(256);
    let kernel = load(&text).kernel("k").unwrap();
    kernel.launch(&memory, config, &[Arg::from(a), Arg::from(b)], options).map(|_| ())
}

fn fault(body: &str, threads: u32) -> Fault {
    let options = Options { max_instructions: 100_000, ..Options::default() };
    *launch(body, &Config::linear(1, threads), &options).expect_err(body)
}

/// The kind, and the thread and line of the body it names.
fn check(body: &str, threads: u32, kind: FaultKind, thread: u32, line: u32) -> Fault {
    let fault = fault(body, threads);
    assert_eq!(fault.kind, kind, "{body}: {fault}");
    let site = fault.site.as_ref().expect("a site");
    assert_eq!(
        (site.thread, site.ptx_line),
        ([thread, 0, 0], FIRST_LINE + line),
        "{body}: {fault}"
    );
    fault
}

#[test]
fn memory_faults_name_thread_and_line() {
    use FaultKind::{Misaligned, OutOfBounds, Uninitialized};
    let wide = "mad.wide.u32 %rd3, %r1, 4, %rd1;\n";
    check(&format!("{wide}ld.global.u32 %r3, [%rd3+4];"), 64, OutOfBounds, 63, 1);
    check(&format!("{wide}st.global.u32 [%rd3+-4], %r1;"), 64, OutOfBounds, 0, 1);
    check(&format!("{wide}ld.global.v2.u32 {{%r3, %r4}}, [%rd3];"), 64, Misaligned, 1, 1);
    check("ld.global.u32 %r3, [%rd2];", 1, Uninitialized, 0, 0);
    check("ld.global.u32 %r3, [%rd2+252];\n", 1, Uninitialized, 0, 0);
    check("\nld.global.u32 %r3, [0];", 1, OutOfBounds, 0, 1);
    check("st.shared.u32 [%r2], %r1;", 33, OutOfBounds, 32, 0);
    check("st.shared.u32 [%r2+-4], %r1;", 1, OutOfBounds, 0, 0);
    check("ld.shared.u32 %r3, [%r2];", 32, Uninitialized, 0, 0);
    check("st.shared.u16 [%r2+1], %r1;", 1, Misaligned, 0, 0);
    check(
        ".local .b8 l[8]; .reg .b64 %l; mov.u64 %l, l;\nst.local.u32 [%l+8], %r1;",
        1,
        OutOfBounds,
        0,
        1,
    );
    check(".local .b8 l[8]; ld.local.u32 %r3, [l];", 1, Uninitialized, 0, 0);
    check("atom.global.add.u32 %r3, [%rd2], 1;", 1, Uninitialized, 0, 0);
    check("mov.b64 %rd4, 0;\nst.u32 [%rd4], %r1;", 1, OutOfBounds, 0, 1);
}

#[test]
fn generic_addresses_find_their_space() {
    let ok = "cvt.u64.u32 %rd3, %r2; cvta.shared.u64 %rd3, %rd3; st.u32 [%rd3], %r1;
        ld.shared.u32 %r3, [%r2]; isspacep.shared %p1, %rd3; @!%p1 trap;
        isspacep.global %p1, %rd1; @!%p1 trap; mad.wide.u32 %rd4, %r1, 4, %rd1; st.u32 [%rd4], %r3;
        .local .b8 l[8]; .reg .b64 %l; mov.u64 %l, l; cvta.local.u64 %l, %l; st.u32 [%l], %r3;
        ld.local.u32 %r5, [l]; setp.ne.u32 %p2, %r5, %r1; @%p2 trap;";
    launch(ok, &Config::linear(1, 32), &Options::default()).unwrap_or_else(|f| panic!("{f}"));
}

#[test]
fn freed_buffers_are_known() {
    let text = ".version 9.0\n.target sm_80\n.address_size 64\n.entry k(.param .u64 a) {
        .reg .b64 %rd<3>; .reg .b32 %r<3>;
        ld.param.u64 %rd1, [a]; ld.global.u32 %r1, [%rd1+8]; ret; }";
    let memory = Memory::new();
    let a = memory.alloc(&[0; 16]);
    let kernel = load(text).kernel("k").unwrap();
    let run =
        || kernel.launch(&memory, &Config::linear(1, 1), &[Arg::from(a)], &Options::default());
    assert!(run().is_ok());
    memory.free(a).unwrap();
    let fault = run().unwrap_err();
    assert_eq!(fault.kind, FaultKind::UseAfterFree);
    assert!(fault.message.contains("byte 8"), "{fault}");
}

#[test]
fn warp_wide_instructions_need_their_lanes() {
    use FaultKind::MissingLanes;
    let half = "setp.lt.u32 %p1, %r1, 16;\n@%p1 ";
    for instruction in [
        "shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;",
        "vote.sync.ballot.b32 %r3, %p1, -1;",
        "redux.sync.add.u32 %r3, %r1, -1;",
        "match.any.sync.b32 %r3, %r1, -1;",
        "bar.sync 0;",
        "bar.warp.sync -1;",
        "movmatrix.sync.aligned.m8n8.trans.b16 %r3, %r1;",
    ] {
        check(&format!("{half}{instruction}"), 32, MissingLanes, 0, 1);
    }
    // A mask of those that are there is right, and so is one that names lanes that never were.
    let ok = format!("{half}shfl.sync.bfly.b32 %r3, %r1, 1, 31, 0xFFFF;");
    launch(&ok, &Config::linear(1, 32), &Options::default()).unwrap_or_else(|f| panic!("{f}"));
    let ok = "shfl.sync.down.b32 %r3, %r1, 1, 0, -1;";
    launch(ok, &Config::linear(1, 16), &Options::default()).unwrap_or_else(|f| panic!("{f}"));
    // To read one is not.
    check("shfl.sync.idx.b32 %r3, %r1, 20, 31, -1;", 16, MissingLanes, 0, 0);
}

#[test]
fn hangs_end() {
    let endless = "L: bra L;";
    check(endless, 1, FaultKind::Budget, 0, 0);
    let spin = "L: ld.volatile.global.u32 %r3, [%rd1]; setp.eq.u32 %p1, %r3, 0;\n@%p1 bra L;";
    assert_eq!(fault(spin, 32).kind, FaultKind::Budget);
    // Another warp ends this one: turns are taken without a barrier.
    let waits = "setp.lt.u32 %p2, %r1, 32; @!%p2 bra W;
        L: ld.volatile.global.u32 %r3, [%rd1]; setp.eq.u32 %p1, %r3, 0; @%p1 bra L; ret;
        W: st.volatile.global.u32 [%rd1], 1;";
    launch(waits, &Config::linear(1, 64), &Options::default()).unwrap_or_else(|f| panic!("{f}"));
}

#[test]
fn deadlocks_say_who_waits_where() {
    // Warp 0 waits at barrier 1 for a warp that waits at barrier 0.
    let body = "setp.lt.u32 %p1, %r1, 32;\n@%p1 bar.sync 1, 64;\nbar.sync 0;";
    let fault = check(body, 64, FaultKind::Deadlock, 0, 1);
    assert_eq!(fault.waiting.len(), 2, "{fault}");
    assert!(fault.waiting[0].contains("warp 0 waits at barrier 1 (32 of 64"), "{fault}");
    assert!(fault.waiting[1].contains("warp 1 waits at barrier 0"), "{fault}");
    // A barrier that others wait at for another number of threads.
    let body = "setp.lt.u32 %p1, %r1, 32;\n@%p1 bra L;\nbar.sync 1, 96;\nret;\nL: bar.sync 1, 64;";
    let fault = check(body, 64, FaultKind::InvalidOperand, 32, 2);
    assert!(fault.to_string().contains("for 96 threads here, but for 64 threads"), "{fault}");
}

#[test]
fn traps_and_stack_overflow() {
    check("setp.eq.u32 %p1, %r1, 5;\n@%p1 trap;", 32, FaultKind::Trap, 5, 1);
    let text = ".version 9.0\n.target sm_80\n.address_size 64\n.func f() { call f; ret; }
        .entry k() { call f; ret; }";
    let kernel = load(text).kernel("k").unwrap();
    let fault = kernel.launch(&Memory::new(), &Config::linear(1, 1), &[], &Options::default());
    assert_eq!(fault.unwrap_err().kind, FaultKind::StackOverflow);
}

#[test]
fn launches_are_checked() {
    let text = ".version 9.0\n.target sm_80\n.address_size 64
        .entry k(.param .u64 a, .param .u32 n) .maxntid 64, 1, 1 { ret; }";
    let kernel = load(text).kernel("k").unwrap();
    let memory = Memory::new();
    let good = [Arg::from(1u64), Arg::from(1u32)];
    let run = |config: Config, args: &[Arg]| {
        kernel.launch(&memory, &config, args, &Options::default()).map_err(|fault| fault.kind)
    };
    assert!(run(Config::linear(1, 64), &good).is_ok());
    assert_eq!(run(Config::linear(1, 32), &good[..1]), Err(FaultKind::Arguments));
    assert_eq!(
        run(Config::linear(1, 32), &[good[1].clone(), good[0].clone()]),
        Err(FaultKind::Arguments)
    );
    assert_eq!(run(Config::linear(0, 32), &good), Err(FaultKind::Launch));
    assert_eq!(run(Config::linear(1, 65), &good), Err(FaultKind::Launch));
    assert_eq!(
        run(Config { shared: 300_000, ..Config::linear(1, 32) }, &good),
        Err(FaultKind::Launch)
    );
    assert_eq!(
        kernel.params().iter().map(|p| (p.size, p.align)).collect::<Vec<_>>(),
        [(8, 8), (4, 4)]
    );
}

/// Of several faults the one of the first block is told, whatever the number of threads.
#[test]
fn the_first_block_to_fault_wins() {
    // Block 7 takes its time, so that later blocks fault before it does.
    let body = "mov.u32 %r3, %ctaid.x; setp.lt.u32 %p1, %r3, 7; @%p1 ret;
        mov.u32 %r4, 0; setp.gt.u32 %p2, %r3, 7; @%p2 trap;
        L: add.u32 %r4, %r4, 1; setp.lt.u32 %p2, %r4, 30000; @%p2 bra L; trap;";
    for threads in [1, 2, 5] {
        for _ in 0..20 {
            let options = Options { threads, ..Options::default() };
            let fault = launch(body, &Config::linear(40, 32), &options).unwrap_err();
            assert_eq!(fault.site.unwrap().block, [7, 0, 0], "{threads} threads");
        }
    }
}
