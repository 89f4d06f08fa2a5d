//! Forms that are more than arithmetic: across lanes, in memory, in control flow.
//!
//! Each runs for one warp whose lanes hold known words, and is compared lane by lane.

use half::{bf16, f16};
use ptx_race::{Arg, Config, Memory, Options, Schedule};

use crate::coverage;
use crate::nvcc::load;
use crate::tensor::warp;

/// Input word i of a lane.
fn input(lane: usize, i: usize) -> u32 {
    (lane as u32).wrapping_mul(2654435761).rotate_left(i as u32 * 5) ^ i as u32
}

fn inputs() -> [[u32; 8]; 32] {
    std::array::from_fn(|lane| std::array::from_fn(|i| input(lane, i)))
}

/// Runs a body and compares its first `N` results in every lane.
fn check<const N: usize>(body: &str, wanted: impl Fn(usize) -> [u32; N]) {
    for (lane, out) in warp(&format!("{body}\n"), &inputs()).iter().enumerate() {
        assert_eq!(out[..N], wanted(lane), "{body} lane {lane}");
    }
}

#[test]
pub fn shuffles() {
    for (mode, b, c) in [
        ("up", 1, 0),
        ("up", 3, 0x1800),
        ("up", 40, 0),
        ("down", 1, 31),
        ("down", 5, 0x181F),
        ("down", 2, 0x100F),
        ("bfly", 1, 31),
        ("bfly", 16, 31),
        ("bfly", 9, 0x181F),
        ("bfly", 31, 15),
        ("idx", 0, 31),
        ("idx", 6, 0x181F),
        ("idx", 13, 0x1C03),
    ] {
        let body = format!(
            "shfl.sync.{mode}.b32 %out0|%p1, %in0, {b}, {c}, -1; selp.b32 %out1, 1, 0, %p1;
            shfl.sync.{mode}.b32 %out2, %in1, {b}, {c}, 0xFFFFFFFF;"
        );
        check(&body, |lane| {
            // The pseudo-code of the ISA, word for word.
            let (lane, b, segment) = (lane as i64, b % 32, c >> 8 & 31);
            let max = lane & segment | c & 31 & !segment;
            let (j, valid) = match mode {
                "up" => (lane - b, lane - b >= max),
                "down" => (lane + b, lane + b <= max),
                "bfly" => (lane ^ b, lane ^ b <= max),
                _ => {
                    let j = lane & segment | b & !segment;
                    (j, j <= max)
                }
            };
            let from = if valid { j } else { lane } as usize;
            [input(from, 0), valid.into(), input(from, 1)]
        });
    }
}

#[test]
pub fn votes_matches_and_reductions() {
    let parity = "and.b32 %r0, %in0, 1; setp.eq.u32 %p1, %r0, 1;\n";
    let odd = |lane: usize| input(lane, 0) & 1 == 1;
    let ballot = (0..32).fold(0u32, |m, l| m | u32::from(odd(l)) << l);
    check(
        &format!(
            "{parity}vote.sync.ballot.b32 %out0, %p1, -1; vote.sync.ballot.b32 %out1, !%p1, -1;"
        ),
        |_| [ballot, !ballot],
    );
    let flags = "selp.b32 %out0, 1, 0, %p2; selp.b32 %out1, 1, 0, %p3;";
    check(
        &format!(
            "{parity}vote.sync.all.pred %p2, %p1, -1; vote.sync.any.pred %p3, %p1, -1; {flags}"
        ),
        |_| [0, 1],
    );
    check(
        &format!(
            "setp.ge.u32 %p1, %lane, 0; vote.sync.all.pred %p2, %p1, -1; vote.sync.uni.pred %p3, %p1, -1; {flags}"
        ),
        |_| [1, 1],
    );
    check(&format!("{parity}activemask.b32 %out0; @%p1 activemask.b32 %out1;"), |lane| {
        [!0, if odd(lane) { ballot } else { 0 }]
    });
    check(
        "and.b32 %r0, %lane, 3; match.any.sync.b32 %out0, %r0, -1; match.all.sync.b32 %out1|%p1, %r0, -1; selp.b32 %out2, 1, 0, %p1;",
        |lane| [0x1111_1111 << (lane % 4), 0, 0],
    );
    check(
        "mov.b32 %r0, 5; match.all.sync.b32 %out0|%p1, %r0, -1; selp.b32 %out1, 1, 0, %p1; cvt.u64.u32 %rd3, %lane; match.any.sync.b64 %out2, %rd3, -1;",
        |lane| [!0, 1, 1 << lane],
    );
    let all = || (0..32).map(|lane| input(lane, 0));
    check(
        "redux.sync.add.u32 %out0, %in0, -1; redux.sync.min.u32 %out1, %in0, -1; redux.sync.max.s32 %out2, %in0, -1; redux.sync.xor.b32 %out3, %in0, -1;",
        |_| {
            [
                all().fold(0, u32::wrapping_add),
                all().min().unwrap(),
                all().map(|x| x as i32).max().unwrap() as u32,
                all().fold(0, |a, b| a ^ b),
            ]
        },
    );
    check(
        "redux.sync.and.b32 %out0, %in0, -1; redux.sync.or.b32 %out1, %in0, -1; redux.sync.min.s32 %out2, %in0, -1; redux.sync.max.u32 %out3, %in0, -1;",
        |_| {
            [
                all().fold(!0, |a, b| a & b),
                all().fold(0, |a, b| a | b),
                all().map(|x| x as i32).min().unwrap() as u32,
                all().max().unwrap(),
            ]
        },
    );
    check(
        "redux.sync.add.s32 %out0, %in0, -1; mov.b64 %rd3, {%lane, 1}; match.all.sync.b64 %out1|%p1, %rd3, -1; mov.b64 %rd3, {1, 2}; match.all.sync.b64 %out2|%p2, %rd3, -1;",
        |_| [all().fold(0, u32::wrapping_add), 0, !0],
    );
    // Two halves, each with a mask of its own.
    let half = "setp.lt.u32 %p1, %lane, 16; selp.b32 %r0, 0xFFFF, 0xFFFF0000, %p1;";
    check(&format!("{half} redux.sync.add.u32 %out0, %in0, %r0;"), |lane| {
        let start = lane / 16 * 16;
        [(start..start + 16).map(|l| input(l, 0)).fold(0, u32::wrapping_add)]
    });
}

#[test]
pub fn loads_and_stores() {
    let at = "mov.u32 %r0, tile; mad.lo.u32 %r0, %lane, 16, %r0;\n";
    check(
        &format!(
            "{at}st.shared.v4.b32 [%r0], {{%in0, %in1, %in2, %in3}}; ld.shared.v2.u32 {{%out0, %out1}}, [%r0+8]; ld.shared.u16 %out2, [%r0+2]; ld.shared.s8 %out3, [%r0+3];"
        ),
        |lane| {
            let word = input(lane, 0);
            [input(lane, 2), input(lane, 3), word >> 16, (word as i32 >> 24) as u32]
        },
    );
    check(
        &format!(
            "{at}st.shared.u8 [%r0], %in0; st.shared.u16 [%r0+2], %in1; st.shared.b8 [%r0+1], %in2; ld.shared.b32 %out0, [%r0];"
        ),
        |lane| [input(lane, 0) & 0xFF | (input(lane, 2) & 0xFF) << 8 | input(lane, 1) << 16],
    );
    check(
        &format!(
            "{at}mov.b64 %rd3, {{%in0, %in1}}; st.shared.u64 [%r0], %rd3; ld.shared.u64 %rd3, [%r0]; mov.b64 {{%out1, %out0}}, %rd3; ld.shared.v4.u8 {{%r1, %r2, %r3, %out2}}, [%r0];"
        ),
        |lane| [input(lane, 1), input(lane, 0), input(lane, 0) >> 24],
    );
    // A narrow load fills a wide register by its own sign.
    check(
        &format!(
            "{at}st.shared.b32 [%r0], %in0; ld.shared.s16 %rd3, [%r0]; shr.u64 %rd3, %rd3, 32; cvt.u32.u64 %out0, %rd3; ld.shared.u32 %rd3, [%r0]; shr.u64 %rd3, %rd3, 32; cvt.u32.u64 %out1, %rd3;"
        ),
        |lane| [if input(lane, 0) & 0x8000 == 0 { 0 } else { !0 }, 0],
    );
    check(
        ".local .align 8 .b8 l[32]; .reg .b64 %l; mov.u64 %l, l; st.local.v2.b32 [%l+8], {%in0, %in1}; st.local.u16 [%l+10], %in2; ld.local.b32 %out0, [l+8]; ld.local.u8 %out1, [%l+13];",
        |lane| [input(lane, 0) & 0xFFFF | input(lane, 2) << 16, input(lane, 1) >> 8 & 0xFF],
    );
    check(
        "ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%out0, %out1, %out2, %out3}, [%rd1+16];",
        |lane| [4, 5, 6, 7].map(|i| input(lane, i)),
    );
}

#[test]
pub fn special_registers() {
    check(
        "mov.u32 %out0, %laneid; mov.u32 %out1, %ntid.x; mov.u32 %out2, %nctaid.y; mov.u32 %out3, %warpid;",
        |lane| [lane as u32, 32, 1, 0],
    );
    check(
        "mov.u32 %out0, %lanemask_lt; mov.u32 %out1, %lanemask_le; mov.u32 %out2, %lanemask_gt; mov.u32 %out3, %lanemask_ge;",
        |lane| {
            let below = (1u32 << lane) - 1;
            [below, below | 1 << lane, !(below | 1 << lane), !below]
        },
    );
    check(
        "mov.u32 %r0, tile; mov.u32 %out0, %lanemask_eq; mov.u32 %out1, WARP_SZ; mov.u32 %out2, %dynamic_smem_size; mov.u32 %out3, %total_smem_size;",
        |lane| [1 << lane, 32, 0, 1024],
    );
    check(
        ".reg .b64 %c<3>; mov.u64 %c0, %clock64; mov.u64 %c1, %globaltimer; setp.gt.u64 %p1, %c1, %c0; selp.b32 %out0, 1, 0, %p1; mov.u32 %r1, %clock; mov.u32 %r2, %clock; setp.gt.u32 %p1, %r2, %r1; selp.b32 %out1, 1, 0, %p1;",
        |_| [1, 1],
    );
}

/// Atomics of 32 lanes on one word: what is left, given what was there.
#[test]
pub fn atomics() {
    let lanes = || (0..32).map(|lane| input(lane, 0));
    let run = |form: &str, init: u32, wanted: u32| {
        for (space, prefix) in [
            ("shared", "mov.u32 %r0, tile;"),
            ("", "mov.u32 %r0, tile; cvt.u64.u32 %rd3, %r0; cvta.shared.u64 %rd3, %rd3;"),
        ] {
            let (dot, base) = if space.is_empty() { ("", "%rd3") } else { (".shared", "%r0") };
            let body = format!(
                "{prefix} st.shared.b32 [%r0], {init}; bar.warp.sync -1;
                {}; bar.warp.sync -1; ld.shared.b32 %out0, [%r0];",
                form.replace("SPACE", dot).replace("ADDRESS", base)
            );
            check(&body, |_| [wanted]);
        }
    };
    run("atomSPACE.add.u32 %r1, [ADDRESS], %in0", 7, lanes().fold(7, u32::wrapping_add));
    run("redSPACE.add.s32 [ADDRESS], %in0", 7, lanes().fold(7, u32::wrapping_add));
    run("redSPACE.relaxed.gpu.or.b32 [ADDRESS], %in0", 0, lanes().fold(0, |a, b| a | b));
    run("redSPACE.and.b32 [ADDRESS], %in0", !0, lanes().fold(!0, |a, b| a & b));
    run("atomSPACE.xor.b32 %r1, [ADDRESS], %in0", 5, lanes().fold(5, |a, b| a ^ b));
    run("redSPACE.min.u32 [ADDRESS], %in0", 1 << 30, lanes().fold(1 << 30, u32::min));
    run("redSPACE.max.u32 [ADDRESS], %in0", 3, lanes().fold(3, u32::max));
    run("redSPACE.min.s32 [ADDRESS], %in0", 0, lanes().map(|x| x as i32).fold(0, i32::min) as u32);
    run("redSPACE.max.s32 [ADDRESS], %in0", 0, lanes().map(|x| x as i32).fold(0, i32::max) as u32);
    run("atomSPACE.inc.u32 %r1, [ADDRESS], 9", 0, 2);
    run("atomSPACE.dec.u32 %r1, [ADDRESS], 9", 0, 8);
    run("atomSPACE.exch.b32 %r1, [ADDRESS], %lane", 0, 31);
    run("atomSPACE.cas.b32 %r1, [ADDRESS], %lane, 100", 3, 100);
    run("cvt.rn.f32.u32 %r1, %lane; redSPACE.add.f32 [ADDRESS], %r1", 0, 496f32.to_bits());
    run(
        "redSPACE.add.noftz.f16x2 [ADDRESS], 0x3C003C00",
        0,
        f16::from_f32(32.0).to_bits() as u32 * 0x1_0001,
    );
    run(
        "redSPACE.add.noftz.bf16x2 [ADDRESS], 0x3F803F80",
        0,
        bf16::from_f32(32.0).to_bits() as u32 * 0x1_0001,
    );
    // What an atomic returns: each lane its own count, in order.
    check(
        "mov.u32 %r0, tile; st.shared.b32 [%r0], 10; bar.warp.sync -1; atom.shared.add.u32 %out0, [%r0], 2;",
        |lane| [10 + 2 * lane as u32],
    );
    check(
        "mov.u32 %r0, tile; st.shared.b64 [%r0], 0; bar.warp.sync -1; mov.b64 %rd3, 0x100000000; atom.shared.add.u64 %rd3, [%r0], %rd3; shr.u64 %rd3, %rd3, 32; cvt.u32.u64 %out0, %rd3;",
        |lane| [lane as u32],
    );
}

#[test]
pub fn asynchronous_copies() {
    let at = "mov.u32 %r0, tile; mad.lo.u32 %r0, %lane, 16, %r0;\n";
    let read = "cp.async.commit_group; cp.async.wait_group 0; ld.shared.v4.b32 {%out0, %out1, %out2, %out3}, [%r0];";
    check(&format!("{at}cp.async.cg.shared.global [%r0], [%rd1], 16; {read}"), |lane| {
        [0, 1, 2, 3].map(|i| input(lane, i))
    });
    check(
        &format!("{at}cp.async.cg.shared.global.L2::128B [%r0], [%rd1], 16, 8; {read}"),
        |lane| [input(lane, 0), input(lane, 1), 0, 0],
    );
    check(
        &format!(
            "{at}setp.lt.u32 %p1, %lane, 4; cp.async.ca.shared.global [%r0], [%rd1], 16, %p1; {read}"
        ),
        |lane| [0, 1, 2, 3].map(|i| if lane < 4 { 0 } else { input(lane, i) }),
    );
    check(
        &format!(
            "{at}cp.async.ca.shared.global [%r0], [%rd1+8], 8; cp.async.ca.shared.global [%r0+8], [%rd1+4], 4; cp.async.ca.shared.global [%r0+12], [%rd1], 4, 3; cp.async.wait_all; ld.shared.v4.b32 {{%out0, %out1, %out2, %out3}}, [%r0];"
        ),
        |lane| [input(lane, 2), input(lane, 3), input(lane, 1), input(lane, 0) & 0xFF_FFFF],
    );
    // The older of two groups may be read while the younger is in flight.
    check(
        &format!(
            "{at}cp.async.ca.shared.global [%r0], [%rd1], 4; cp.async.commit_group; cp.async.ca.shared.global [%r0+4], [%rd1+4], 4; cp.async.commit_group; cp.async.wait_group 1; ld.shared.b32 %out0, [%r0]; cp.async.wait_group 0; ld.shared.b32 %out1, [%r0+4];"
        ),
        |lane| [input(lane, 0), input(lane, 1)],
    );
}

#[test]
pub fn control_flow() {
    // A table, a loop whose lanes leave at different times, and both sides of a branch.
    check(
        "and.b32 %r0, %lane, 3; brx.idx %r0, T; A: mov.b32 %out0, 10; bra.uni E; B: mov.b32 %out0, 20; bra.uni E; C: mov.b32 %out0, 30; E: bar.warp.sync -1; T: .branchtargets A, B, C, B;",
        |lane| [[10, 20, 30, 20][lane % 4]],
    );
    check(
        "mov.b32 %r0, 0; L: add.u32 %out0, %out0, %r0; add.u32 %r0, %r0, 1; setp.le.u32 %p1, %r0, %lane; @%p1 bra L; shfl.sync.idx.b32 %out1, %out0, 31, 31, -1;",
        |lane| [(lane * (lane + 1) / 2) as u32, 496],
    );
    check(
        "setp.lt.u32 %p1, %lane, 7; @%p1 bra S; mov.b32 %out0, 2; bra.uni E; S: mov.b32 %out0, 1; E: redux.sync.add.u32 %out1, %out0, -1;",
        |lane| [if lane < 7 { 1 } else { 2 }, 57],
    );
    // Lanes that leave have stored before; the others go on.
    for leave in ["exit", "ret", "ret.uni"] {
        let body = format!(
            "st.global.v4.b32 [%rd2], {{%lane, 0, 0, 0}}; setp.lt.u32 %p1, %lane, 16; mov.b32 %out0, 99; @!%p1 bra GO; {leave}; GO: bar.warp.sync 0xFFFF0000;"
        );
        check(&body, |lane| [if lane < 16 { lane as u32 } else { 99 }]);
    }
    // Inline assembly may use the same names again and again in scopes of its own.
    check(
        "{ .reg .b32 x; mov.b32 x, 1; L: add.u32 %out0, %out0, x; setp.lt.u32 %p1, %out0, 3; @%p1 bra L; } { .reg .b32 x; mov.b32 x, 5; L: add.u32 %out0, %out0, x; setp.lt.u32 %p1, %out0, 13; @%p1 bra L; }",
        |_| [13],
    );
    // An integer literal has the type of its operand.
    check("cvt.rn.f32.u32 %out0, 1; slct.u32.f32 %out1, 5, 6, 0f3F800000;", |_| [0x3F80_0000, 5]);
    check(
        "prefetch.global.L2 [%rd1]; prefetch.global.L1 [%rd1]; prefetch.L1 [%rd1]; prefetch.L2 [%rd1]; membar.gl; membar.sys; fence.acq_rel.gpu; fence.acq_rel.cta; fence.acq_rel.sys; fence.sc.gpu; fence.sc.sys; fence.sc.cta; membar.cta;
        fence.sc.cluster; fence.acq_rel.cluster; fence.acquire.cta; fence.acquire.cluster; fence.acquire.gpu; fence.acquire.sys;
        fence.release.cta; fence.release.cluster; fence.release.gpu; fence.release.sys; nanosleep.u32 20; mov.b32 %out0, 1;",
        |_| [1],
    );
}

#[test]
pub fn calls_pass_parameters_and_results() {
    let text = ".version 9.0\n.target sm_80\n.address_size 64
        .const .align 4 .u32 table[4] = {10, 20, 30, 40};
        .global .align 4 .u32 counter = 5;
        .func (.param .b32 result) scale(.param .b32 x, .param .align 4 .b8 pair[8]) {
            .reg .b32 %r<5>; .reg .pred %p<2>; .local .align 8 .b8 spill[8]; .reg .b64 %l, %x;
            ld.param.b32 %r1, [x]; ld.param.b32 %r2, [pair+4]; ld.param.b32 %r3, [pair];
            mov.u64 %l, spill; cvt.u64.u32 %x, %r1; st.local.b64 [%l], %x;
            setp.eq.u32 %p1, %r1, 0; @%p1 bra Z;
            { .param .b32 a; .param .align 4 .b8 b[8]; .param .b32 r;
            sub.u32 %r4, %r1, 1; st.param.b32 [a], %r4; st.param.b32 [b], %r3; st.param.b32 [b+4], %r2;
            call.uni (r), scale, (a, b); ld.param.b32 %r4, [r]; }
            ld.local.b32 %r1, [%l]; add.u32 %r4, %r4, %r1; mad.lo.u32 %r4, %r3, 0, %r4;
            st.param.b32 [result], %r4; ret;
            Z: st.param.b32 [result], %r2; ret; }
        .entry k(.param .u64 out) { .reg .b32 %r<6>; .reg .b64 %rd<4>; .local .align 4 .b8 own[4];
            mov.u32 %r1, %tid.x; and.b32 %r2, %r1, 3; mov.u64 %rd1, own; st.local.b32 [%rd1], 1;
            mov.u64 %rd1, table; mad.wide.u32 %rd1, %r2, 4, %rd1; ld.const.u32 %r3, [%rd1];
            { .param .b32 a; .param .align 4 .b8 b[8]; .param .b32 r;
            st.param.b32 [a], %r2; st.param.b32 [b], 7; st.param.b32 [b+4], %r3;
            call (r), scale, (a, b); ld.param.b32 %r4, [r]; }
            ld.param.u64 %rd2, [out]; mad.wide.u32 %rd2, %r1, 4, %rd2; st.global.u32 [%rd2], %r4;
            red.global.add.u32 [counter], 1; ret; }";
    if coverage::note(text) {
        return;
    }
    let module = load(text);
    let memory = Memory::new();
    let out = memory.alloc_uninit(128);
    let kernel = module.kernel("k").unwrap();
    kernel.launch(&memory, &Config::linear(1, 32), &[Arg::from(out)], &Options::default()).unwrap();
    let bytes = memory.read_vec(out, 128).unwrap();
    for (lane, word) in bytes.chunks_exact(4).enumerate() {
        // table[n] + 1 + ... + n
        let wanted = [10, 21, 33, 46][lane % 4];
        assert_eq!(u32::from_le_bytes(word.try_into().unwrap()), wanted, "lane {lane}");
    }
    let counter = module.variable(&memory, "counter").unwrap();
    assert_eq!(memory.read_vec(counter, 4).unwrap(), 37u32.to_le_bytes());
}

#[test]
pub fn barriers_of_a_block() {
    // Named barriers hand a word from warp to warp; `bar.red` counts and combines.
    let text = ".version 9.0\n.target sm_80\n.address_size 64
        .entry k(.param .u64 out) { .reg .b32 %r<9>; .reg .b64 %rd<3>; .reg .pred %p<5>; .shared .b32 word;
            mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 32; @%p1 bra P;
            bar.sync 3, 64; ld.shared.b32 %r2, [word]; bar.sync 2; bra.uni E;
            P: st.shared.b32 [word], 77; bar.arrive 3, 64; bar.arrive 2, 64; mov.b32 %r2, 1;
            E: setp.lt.u32 %p2, %r1, 40;
            barrier.cta.sync.aligned 0;
            bar.red.popc.u32 %r3, 0, %p2; bar.red.and.pred %p3, 1, 64, %p2; bar.red.or.pred %p4, 1, %p2;
            selp.b32 %r4, 100, 0, %p3; selp.b32 %r5, 1000, 0, %p4;
            add.u32 %r2, %r2, %r3; add.u32 %r2, %r2, %r4; add.u32 %r2, %r2, %r5;
            ld.param.u64 %rd1, [out]; mad.wide.u32 %rd1, %r1, 4, %rd1; st.global.u32 [%rd1], %r2; ret; }";
    if coverage::note(text) {
        return;
    }
    let kernel = load(text).kernel("k").unwrap();
    for schedule in [Schedule::InOrder, Schedule::ReverseOrder] {
        let memory = Memory::new();
        let out = memory.alloc_uninit(256);
        let options = Options { schedule, ..Options::default() };
        kernel.launch(&memory, &Config::linear(1, 64), &[Arg::from(out)], &options).unwrap();
        let bytes = memory.read_vec(out, 256).unwrap();
        for (thread, word) in bytes.chunks_exact(4).enumerate() {
            let wanted = 1040 + if thread < 32 { 1 } else { 77 };
            assert_eq!(u32::from_le_bytes(word.try_into().unwrap()), wanted, "thread {thread}");
        }
    }
}
