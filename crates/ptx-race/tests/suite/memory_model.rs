//! Litmus tests of the memory consistency model: accesses that the PTX ISA orders do not race, and those
//! that it does not order do, at the two instructions named.
//!
//! Threads are lists of instructions, with `x` as the register of every result and `d`, `f`, `g`
//! and `l` as zeroed words: data, two flags and a lock. They run one after another, so that each
//! sees what those before it wrote.

use ptx_race::{Arg, Check, Config, Fault, FaultKind, Memory, Options, Schedule};

use crate::nvcc::load;

/// Where the threads of a test run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    /// Each is the first lane of a warp, so many warps to a block.
    Warps(u32),
    /// Each is a block of one thread.
    Blocks,
    /// Each is a block of two warps, whose threads all run it.
    WholeBlocks,
}

/// What a thread does that does not see the flag it read.
#[derive(Clone, Copy)]
enum Unseen {
    Trap,
    Return,
}

/// PTX of an instruction; `value` is what it stores.
fn instruction(text: &str, value: usize, unseen: Unseen) -> String {
    let text = text.trim();
    let (guard, rest) = match text.split_once(' ') {
        Some((guard, rest)) if guard.starts_with('@') => (guard, rest),
        _ => ("", text),
    };
    let (opcode, word) = rest.split_once(' ').unwrap_or((rest, ""));
    let name = opcode.split('.').next().unwrap_or_default();
    let ptx = match name {
        _ if rest.contains('[') => format!("{rest};"),
        "seen" => {
            let leave = match unseen {
                Unseen::Trap => "trap",
                Unseen::Return => "ret",
            };
            format!("setp.eq.u32 p, x, 0; @p {leave};")
        }
        "free" => "setp.ne.u32 p, x, 0; @p trap;".to_owned(),
        "st" => format!("{opcode}.global.b32 [{word}], {value};"),
        "ld" => format!("{opcode}.global.b32 x, [{word}];"),
        "atom" => format!("{opcode}.global.add.u32 x, [{word}], 1;"),
        "red" => format!("{opcode}.global.add.u32 [{word}], 1;"),
        "cas" => format!("atom.global.cas.b32 x, [{word}], 0, 1;"),
        // Nothing holds 99.
        "failing_cas" => format!("atom.global.cas.b32 x, [{word}], 99, 1;"),
        "exch" => format!("atom.global.exch.b32 x, [{word}], 0;"),
        _ => format!("{rest};"),
    };
    format!("{guard} {ptx}")
}

/// The kernel of threads, whose every line ends with a comment that numbers its thread.
fn kernel(layout: Layout, threads: &[&str], unseen: Unseen) -> String {
    let start = ".version 9.0
        .target sm_80
        .address_size 64
        .entry k(.param .u64 words) {
        .reg .b32 x, y, tid, thread, warp, lane; .reg .pred p, first;
        .reg .b64 d, f, g, l, own, other, wide;
        ld.param.u64 d, [words]; add.u64 f, d, 256; add.u64 g, d, 260; add.u64 l, d, 264;
        mov.u32 tid, %tid.x; setp.eq.u32 first, tid, 0; mov.u32 x, 1;
        mad.wide.u32 own, tid, 4, d; sub.u32 y, 63, tid; mad.wide.u32 other, y, 4, d;
        mov.u32 thread, %ctaid.x;";
    let mut lines = vec![start.to_owned()];
    if layout != Layout::WholeBlocks {
        lines.push("mov.u32 lane, %laneid; setp.ne.u32 p, lane, 0; @p ret;".to_owned());
    }
    if let Layout::Warps(warps) = layout {
        lines.push(format!("mov.u32 warp, %warpid; mad.lo.u32 thread, thread, {warps}, warp;"));
    }
    for number in 0..threads.len() {
        lines.push(format!("setp.eq.u32 p, thread, {number}; @p bra T{number};"));
    }
    for (number, thread) in threads.iter().enumerate() {
        lines.push(format!("T{number}:"));
        for one in thread.split(';').filter(|one| !one.trim().is_empty()) {
            lines.push(format!("{} // {number}", instruction(one, number + 1, unseen)));
        }
        lines.push("ret;".to_owned());
    }
    lines.join("\n") + "}\n"
}

/// Runs a kernel on zeroed words; gives the race.
fn race(text: &str, [blocks, threads]: [u32; 2], schedule: Schedule) -> Option<Box<Fault>> {
    let memory = Memory::new();
    let words = memory.alloc(&[0; 512]);
    let options = Options { schedule, check: Check::Races, ..Options::default() };
    let config = Config::linear(blocks, threads);
    let result =
        load(text).kernel("k").unwrap().launch(&memory, &config, &[words.into()], &options);
    let fault = result.err()?;
    assert_eq!(fault.kind, FaultKind::Race, "{fault}\n{text}");
    Some(fault)
}

/// Runs threads. `words` is empty if they have no race, or else has the words that the race of the
/// first thread with the last is on.
fn check(layout: Layout, threads: &[&str], words: &str) {
    let text = kernel(layout, threads, Unseen::Trap);
    let count = threads.len() as u32;
    let shape = match layout {
        Layout::Warps(warps) => [count / warps, 32 * warps],
        Layout::Blocks => [count, 1],
        Layout::WholeBlocks => [count, 64],
    };
    let fault = race(&text, shape, Schedule::InOrder);
    let case = format!("{layout:?} {threads:?}");
    if words.is_empty() {
        assert!(fault.is_none(), "{case}: {}", fault.unwrap());
        return;
    }
    let (first, last) = words.split_once(' ').unwrap_or((words, words));
    let Some(fault) = fault else { panic!("{case}: no race") };
    for (site, word, number) in [(&fault.other, first, 0), (&fault.site, last, count - 1)] {
        let line = text.lines().nth(site.as_ref().unwrap().ptx_line as usize - 1).unwrap();
        let named = line.contains(&format!("[{word}]")) && line.ends_with(&format!("// {number}"));
        assert!(named, "{case}: `{line}` instead of [{word}] of thread {number}: {fault}");
    }
}

/// Runs threads as warps of one block and as blocks, with what each has a race on.
fn both(threads: &[&str], in_block: &str, in_grid: &str) {
    check(Layout::Warps(threads.len() as u32), threads, in_block);
    check(Layout::Blocks, threads, in_grid);
}

/// A reader that runs first sees no flag, and then touches nothing.
fn no_race_in_reverse(threads: [&str; 2]) {
    for (layout, shape) in [(Layout::Warps(2), [1, 64]), (Layout::Blocks, [2, 1])] {
        let text = kernel(layout, &threads, Unseen::Return);
        assert!(race(&text, shape, Schedule::ReverseOrder).is_none(), "{layout:?} {threads:?}");
    }
}

#[test]
fn fences_order_around_a_volatile_flag() {
    let pair = |release: &str, acquire: &str| {
        [format!("st d; {release}; st.volatile f"), format!("ld.volatile f; seen; {acquire}; ld d")]
    };
    let run = |release: &str, acquire: &str, in_block: &str, in_grid: &str| {
        let pair = pair(release, acquire);
        both(&[&pair[0], &pair[1]], in_block, in_grid);
    };
    run("membar.gl", "membar.gl", "", "");
    run("membar.sys", "fence.sc.sys", "", "");
    run("fence.acq_rel.gpu", "fence.acq_rel.gpu", "", "");
    let [release, acquire] = pair("membar.gl", "membar.gl");
    no_race_in_reverse([&release, &acquire]);
    // A fence of the block orders only its threads.
    run("membar.cta", "membar.cta", "", "d");
    run("membar.gl", "membar.cta", "", "d");
    run("membar.cta", "membar.gl", "", "d");
    run("fence.acq_rel.cluster", "fence.acq_rel.cluster", "", "d");
    // Both sides need one.
    run("", "", "d", "d");
    run("membar.gl", "", "d", "d");
    run("", "membar.gl", "d", "d");
    run("fence.release.gpu", "fence.acquire.gpu", "", "");
    run("fence.acquire.gpu", "membar.gl", "d", "d");
    run("membar.gl", "fence.release.gpu", "d", "d");
    // What comes after the fence is not handed on, and a plain flag hands on nothing.
    both(&["membar.gl; st d; st.volatile f", &acquire], "d", "d");
    both(&["st d; membar.gl; st f", &acquire], "f", "f");
    both(&["st d; membar.gl", "membar.gl; ld d"], "d", "d");
}

#[test]
fn releases_and_acquires_order_within_their_scopes() {
    let run = |release: &str, acquire: &str, in_block: &str, in_grid: &str| {
        let threads = [format!("st d; {release} f"), format!("{acquire} f; seen; ld d")];
        both(&[&threads[0], &threads[1]], in_block, in_grid);
    };
    run("st.release.gpu", "ld.acquire.gpu", "", "");
    run("st.release.sys", "ld.acquire.sys", "", "");
    no_race_in_reverse(["st d; st.release.gpu f", "ld.acquire.gpu f; seen; ld d"]);
    run("st.release.cta", "ld.acquire.cta", "", "f");
    run("st.release.gpu", "ld.acquire.cta", "", "f");
    run("st.release.cluster", "ld.acquire.gpu", "", "f");
    run("st.release.gpu", "ld.relaxed.gpu", "d", "d");
    run("st.relaxed.gpu", "ld.acquire.gpu", "d", "d");
    run("atom.acq_rel.gpu", "atom.acq_rel.gpu", "", "");
    run("atom.release.gpu", "atom.acquire.gpu", "", "");
    run("atom.acquire.gpu", "atom.acquire.gpu", "d", "d");
    run("atom.release.gpu", "atom.release.gpu", "d", "d");
    // The second release is not of what came before the first.
    both(&["st.release.gpu f; st d", "ld.acquire.gpu f; seen; ld d"], "d", "d");
    both(&["atom.release.gpu f; st d", "ld.acquire.gpu f; seen; ld d"], "d", "d");
}

#[test]
fn atomics_race_if_a_scope_leaves_the_other_out() {
    both(&["atom.cta f", "atom.cta f"], "", "f");
    both(&["atom.cta f", "atom.gpu f"], "", "f");
    both(&["atom f", "red f"], "", "");
    both(&["atom f", "st f"], "f", "f");
    both(&["ld.relaxed.cta f", "atom f"], "", "f");
}

#[test]
fn red_releases_and_never_acquires() {
    let release = "st d; fence.acq_rel.gpu; red f";
    both(&[release, "red f; fence.acq_rel.gpu; ld d"], "d", "d");
    both(&[release, "atom f; seen; fence.acq_rel.gpu; ld d"], "", "");
    both(&["st d; red.release.gpu f", "ld.acquire.gpu f; seen; ld d"], "", "");
}

#[test]
fn a_lock_needs_both_fences() {
    let lock = |acquire: &str, release: &str, words: &str| {
        let thread = format!("cas l; free; {acquire}; ld d; st d; {release}; exch l");
        both(&[&thread, &thread], words, words);
    };
    lock("membar.gl", "membar.gl", "");
    lock("", "membar.gl", "d");
    lock("membar.gl", "", "d");
}

#[test]
fn a_later_write_of_the_flag_belongs_to_its_release() {
    let acquire = "ld.acquire.gpu f; seen; ld d";
    both(&["st d; st.release.gpu f; st.relaxed.gpu f", acquire], "", "");
    both(&["st d; st.release.gpu g; st.relaxed.gpu f", acquire], "d", "d");
    both(&["st d; st.release.gpu f; st f; st.relaxed.gpu f", acquire], "d", "d");
    // A release of the block stays one, whatever the scope of the write.
    both(&["st d; st.release.cta f; st.relaxed.gpu f", acquire], "", "d");
}

/// After a thread's read of a strong write comes what the thread does, without a fence.
#[test]
fn a_flag_that_was_seen_may_be_reset() {
    both(&["st.relaxed.gpu f", "ld.relaxed.gpu f; seen; st f"], "", "");
    both(&["st.relaxed.gpu f", "st f"], "f", "f");
    both(
        &[
            "st.relaxed.gpu f",
            "ld.relaxed.gpu f; seen; st.release.gpu g",
            "ld.acquire.gpu g; seen; ld f",
        ],
        "",
        "",
    );
}

#[test]
fn a_failing_compare_and_swap_hands_nothing_on() {
    let threads = ["st d; membar.gl; failing_cas f", "ld.acquire.gpu f; ld d"];
    both(&threads, "d", "d");
    // It reads, as other atomics do.
    both(&["st d; st.release.gpu f", "failing_cas f; seen; membar.gl; ld d"], "", "");
}

#[test]
fn atomics_of_others_go_on_from_a_release() {
    let (release, acquire) = ("st d; st.release.gpu f", "ld.acquire.gpu f; seen; ld d");
    both(&[release, "atom.relaxed.gpu f", acquire], "", "");
    both(&[release, "red.relaxed.gpu f", acquire], "", "");
    both(&[release, "st.relaxed.gpu f", acquire], "d", "d");
}

/// What a warp has acquired it hands on to its block, by a release of the block.
#[test]
fn order_is_cumulative_over_scopes() {
    let release = "st d; st.release.gpu f";
    let middle = |scope: &str| format!("ld.acquire.gpu f; seen; st.release.{scope} g");
    let acquire = "ld.acquire.cta g; seen; ld d";
    check(Layout::Warps(2), &[release, "", &middle("cta"), acquire], "");
    let read_only = "ld.relaxed.gpu f; seen; st.release.cta g";
    check(Layout::Warps(2), &[release, "", read_only, acquire], "d");
    // An acquire of the block acquires nothing of another, though it reads what its block wrote.
    check(
        Layout::Warps(2),
        &[release, "", "atom.relaxed.gpu f", "ld.acquire.gpu f; seen; ld d"],
        "",
    );
    check(
        Layout::Warps(2),
        &[release, "", "atom.relaxed.gpu f", "ld.acquire.cta f; seen; ld d"],
        "d",
    );
    // What a block left at a location for itself is nothing to the next.
    let threads = [
        "st d; st.release.cta f; st.relaxed.gpu f",
        "",
        "atom.release.gpu f",
        "ld.acquire.gpu f; seen; ld d",
    ];
    check(Layout::Warps(2), &threads, "d");
}

#[test]
fn barriers_carry_releases_and_acquires_of_one_thread() {
    let run = |release: &str, acquire: &str, words: &str| {
        check(Layout::WholeBlocks, &[release, acquire], words);
    };
    let acquire = "@first ld.acquire.gpu f; seen; bar.sync 0; ld other";
    run("st own; bar.sync 0; @first membar.gl; @first red f", acquire, "");
    run("st own; @first membar.gl; @first red f", acquire, "own other");
    // Each thread fences for itself, and one of them meets the other block.
    run(
        "st own; membar.gl; bar.sync 0; @first atom f",
        "@first atom f; seen; bar.sync 0; membar.gl; ld other",
        "",
    );
}

/// The last block of a grid adds up what the others left.
#[test]
fn the_last_block_needs_both_fences_and_a_counter_of_the_gpu() {
    let last_block = |release: &str, acquire: &str, counter: &str| {
        let text = format!(
            ".version 9.0
            .target sm_80
            .address_size 64
            .entry k(.param .u64 words) {{
            .reg .b32 x; .reg .b64 d, part, count; .reg .pred p, first; .shared .b32 ticket;
            ld.param.u64 d, [words]; add.u64 count, d, 256;
            mov.u32 x, %tid.x; setp.eq.u32 first, x, 0;
            mov.u32 x, %ctaid.x; mad.wide.u32 part, x, 4, d;
            @first st.global.u32 [part], 7;
            {release}
            @first {counter}.global.inc.u32 x, [count], 1000;
            @first st.shared.u32 [ticket], x;
            bar.sync 0;
            ld.shared.u32 x, [ticket]; setp.ne.u32 p, x, 2; @p ret;
            {acquire}
            ld.global.u32 x, [d];
            ld.global.u32 x, [d+4];
            ld.global.u32 x, [d+8]; ret; }}"
        );
        [Schedule::InOrder, Schedule::ReverseOrder].map(|schedule| {
            let fault = race(&text, [3, 64], schedule)?;
            let line = |site: &Option<ptx_race::Site>| site.as_ref().unwrap().ptx_line;
            Some([line(&fault.other), line(&fault.site)])
        })
    };
    let fence = "membar.gl;";
    assert_eq!(last_block(fence, fence, "atom"), [None, None]);
    // The line of the store, and of the load of the first block's part or the last one's.
    let part = [Some([9, 16]), Some([9, 17])];
    assert_eq!(last_block("", fence, "atom"), part);
    assert_eq!(last_block(fence, "", "atom"), part);
    assert_eq!(last_block("membar.cta;", fence, "atom"), part);
    assert_eq!(last_block(fence, fence, "atom.cta"), [Some([11, 11]), Some([11, 11])]);
}

#[test]
fn strong_accesses_of_other_sizes_race() {
    let write = "st.volatile f";
    both(&[write, "ld.volatile.global.v2.b32 {x, y}, [f]"], "", "");
    both(&[write, "ld.volatile.global.b64 wide, [f]"], "f", "f");
    both(&["st.volatile.global.v2.b32 [f], {x, x}", "ld.volatile f"], "", "");
    // Each element of a vector is a flag.
    let flags = "st d; membar.gl; st.volatile.global.v2.b32 [f], {x, x}";
    both(&[flags, "ld.volatile g; seen; membar.gl; ld d"], "", "");
    // A byte beside the flag is another location.
    let byte = "st d; st.release.gpu.global.b8 [f], 1";
    let beside = "st.relaxed.gpu.global.b8 [f+1], 1";
    both(&[byte, beside, "ld.acquire.gpu.global.b8 x, [f]; seen; ld d"], "", "");
}

#[test]
fn a_race_of_strong_accesses_says_why() {
    let message = |threads: &[&str]| {
        let text = kernel(Layout::Blocks, threads, Unseen::Trap);
        race(&text, [2, 1], Schedule::InOrder).expect("a race").message
    };
    let why = ": both strong, but a scope leaves the other thread out or the sizes differ";
    assert_eq!(
        message(&["st.relaxed.cta f", "ld.relaxed.gpu f"]),
        format!("reads what another thread wrote{why}")
    );
    assert_eq!(
        message(&["ld.relaxed.cta f", "st.relaxed.gpu f"]),
        format!("writes where another thread reads{why}")
    );
    assert_eq!(
        message(&["st.relaxed.cta f", "st f"]),
        "writes where another thread wrote, and nothing orders the two"
    );
}

/// Blocks that volatile accesses connect run one after another, whatever the number of threads.
#[test]
fn kernels_with_strong_accesses_run_on_one_thread() {
    let text = ".version 9.0
        .target sm_80
        .address_size 64
        .entry k(.param .u64 words) {
        .reg .b32 x; .reg .b64 f; .reg .pred p;
        ld.param.u64 f, [words]; mov.u32 x, %ctaid.x; setp.eq.u32 p, x, 1; @p bra WRITE;
        SPIN: ld.volatile.global.u32 x, [f]; setp.eq.u32 p, x, 0; @p bra SPIN; ret;
        WRITE: st.volatile.global.u32 [f], 1; ret; }";
    let memory = Memory::new();
    let words = memory.alloc(&[0; 4]);
    let options = Options { threads: 2, max_instructions: 3_000_000, ..Options::default() };
    let kernel = load(text).kernel("k").unwrap();
    let result = kernel.launch(&memory, &Config::linear(2, 1), &[Arg::from(words)], &options);
    assert_eq!(result.unwrap_err().kind, FaultKind::Budget);
}
