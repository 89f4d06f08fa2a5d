//! The command: what it prints, and how it fails.

use std::process::{Command, Output};

const TEXT: &str = ".version 9.0
.target sm_80
.address_size 64
.file 1 \"doubling.cu\"
.visible .entry doubling(.param .u64 out, .param .u32 count) {
    .reg .b32 %r<4>; .reg .b64 %rd<3>; .reg .pred %p<2>;
    .shared .align 4 .b8 tile[128];
    ld.param.u64 %rd1, [out]; ld.param.u32 %r1, [count];
    mov.u32 %r2, %tid.x; setp.ge.u32 %p1, %r2, %r1; @%p1 ret;
    mad.wide.u32 %rd1, %r2, 4, %rd1;
    .loc 1 12 5
    ld.global.u32 %r3, [%rd1];
    mov.u32 %r1, tile; shl.b32 %r3, %r3, 1;
    st.global.u32 [%rd1], %r3;
    ret;
}
";

fn ptx_race(arguments: &[&str]) -> Output {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("k.ptx"), TEXT).unwrap();
    Command::new(env!("CARGO_BIN_EXE_ptx-race"))
        .args(arguments)
        .current_dir(folder.path())
        .output()
        .unwrap()
}

fn succeeds(arguments: &[&str]) -> String {
    let output = ptx_race(arguments);
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn fails(arguments: &[&str], words: &[&str]) {
    let output = ptx_race(arguments);
    let told = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {told}");
    assert!(told.starts_with("ptx-race: ") && told.contains("\nhint: "), "{told}");
    for word in words {
        assert!(told.contains(word), "{arguments:?} does not say {word:?}: {told}");
    }
}

#[test]
fn lists_what_is_in_a_file() {
    let out = succeeds(&["k.ptx"]);
    for word in ["doubling", "parameter  .u64", "128 bytes static", "1  st.global.u32"] {
        assert!(out.contains(word), "{word:?} missing: {out}");
    }
    assert!(succeeds(&["--help"]).starts_with("Usage"));
    assert!(succeeds(&[]).starts_with("Usage"));
    assert!(succeeds(&["--version"]).starts_with("ptx-race "));
}

#[test]
fn runs_a_kernel() {
    let arguments = ["k.ptx", "doubling", "--arg=u32[32]=iota", "--arg", "u32=32"];
    let out = succeeds(&arguments);
    assert!(out.contains("u32[32]=iota  digest") && out.contains("0 2 4 6 ..."), "{out}");
    for more in
        [&["--race"][..], &["--schedule", "7"], &["--schedule", "reverse", "--threads", "2"]]
    {
        assert!(succeeds(&[&arguments[..], more].concat()).contains("0 2 4 6"));
    }
}

#[test]
fn tells_what_went_wrong() {
    let run = |rest: &[&'static str], words: &[&str]| {
        fails(&[&["k.ptx", "doubling"], rest].concat(), words);
    };
    run(
        &["--arg", "u32[31]=zero", "--arg", "u32=32"],
        &[
            "out of bounds in kernel `doubling`",
            "block (0, 0, 0) thread (31, 0, 0)",
            "`ld.global.u32`, PTX line 12",
            "doubling.cu:12",
            "the buffer of 124 bytes that argument 0 points to",
        ],
    );
    run(&["--arg", "u32[32]=uninit", "--arg", "u32=32"], &["never-written", "hint:"]);
    run(&["--arg", "u32[1]=zero", "--arg", "u32=2", "--grid", "2", "--race"], &["doubling.cu"]);
    run(
        &["--arg", "u32[1]=zero", "--arg", "u32=1", "--grid", "2", "--race"],
        &["data race", "with block (0, 0, 0) thread (0, 0, 0)"],
    );
    run(&["--arg", "u32=1"], &["wrong arguments", "1 given, 2 wanted", "hint:"]);
    run(&["--arg", "u33=1"], &["invalid `--arg u33=1`", "hint:"]);
    run(&["--arg", "u8=256"], &["not a valid u8", "hint:"]);
    run(&["--arg", "u64[99999999999999]=zero"], &["more than 1073741824 bytes", "hint:"]);
    run(&["--arg", "u8[600000000]=zero", "--arg", "u8[600000000]=zero"], &["more than"]);
    run(&["--arg", "u64[18446744073709551615]=zero"], &["more than"]);
    run(&["--threads", "-1"], &["invalid `--threads -1`", "hint:"]);
    run(&["--arch", "v100"], &["invalid `--arch v100`", "h100 and a100"]);
    run(&["--schedule", "fifo"], &["invalid `--schedule fifo`", "in-order, reverse, or a seed"]);
    run(&["--threads=0"], &["invalid `--threads 0`"]);
    run(&["--race=1"], &["`--race` takes no value"]);
    let endless = ["--arg", "u32[32]=zero", "--arg", "u32=32", "--max_instructions", "3"];
    run(&endless, &["instruction budget exceeded", "--max-instructions"]);
    run(&["--block", "0", "--arg", "u64=0", "--arg", "u32=1"], &["impossible launch"]);
    run(&["--grid", "1,2,3,4"], &["4 dimensions"]);
    run(&["--frobnicate"], &["unknown option", "hint:"]);
    run(&["--grid"], &["needs a value"]);
    fails(&["k.ptx", "nothing"], &["no kernel `nothing`", "hint: it has: doubling"]);
    fails(&["missing.ptx"], &["cannot read missing.ptx", "hint:"]);
    fails(&["race"], &["no file given"]);
}

/// Runs the command in a folder that has the kernel.
fn ptx_race_in(folder: &std::path::Path, arguments: &[&str]) -> Output {
    std::fs::write(folder.join("k.ptx"), TEXT).unwrap();
    Command::new(env!("CARGO_BIN_EXE_ptx-race"))
        .args(arguments)
        .current_dir(folder)
        .output()
        .unwrap()
}

#[test]
fn buffers_are_read_from_files_and_dumped() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let input: Vec<u8> = (0..32u32).flat_map(|i| (i * i + 7).to_le_bytes()).collect();
    std::fs::write(path("in.bin"), &input).unwrap();
    std::fs::write(path("count.bin"), 32u32.to_le_bytes()).unwrap();
    let run = |rest: &[&str]| ptx_race_in(folder.path(), &[&["k.ptx", "doubling"], rest].concat());
    let output =
        run(&["--arg", "u32[32]=@in.bin", "--arg", "u32=@count.bin", "--dump", "0=out.bin"]);
    assert!(output.status.success(), "{output:?}");
    let doubled: Vec<u8> = (0..32u32).flat_map(|i| (2 * (i * i + 7)).to_le_bytes()).collect();
    assert_eq!(std::fs::read(path("out.bin")).unwrap(), doubled);
    // The bytes are the kernel's business: every type reads the same 128.
    for arg in [
        "u8[128]", "s8[128]", "f16[64]", "bf16[64]", "u16[64]", "s16[64]", "f32[32]", "s32[32]",
        "u64[16]", "s64[16]", "f64[16]",
    ] {
        let arg = format!("{arg}=@in.bin");
        let output = run(&["--arg", &arg, "--arg", "u32=32", "--dump", "0=out2.bin"]);
        assert!(output.status.success(), "{arg}: {output:?}");
        // Denormal numbers are shown with an exponent.
        let out = String::from_utf8(output.stdout).unwrap();
        assert!(out.lines().all(|line| line.len() < 200), "{arg}: {out}");
        assert_eq!(std::fs::read(path("out2.bin")).unwrap(), doubled, "{arg}");
    }
    let fails = |rest: &[&str], words: &[&str]| {
        let output = run(rest);
        let told = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{rest:?}: {told}");
        for word in words.iter().chain(&["hint:"]) {
            assert!(told.contains(word), "{rest:?} does not say {word:?}: {told}");
        }
    };
    let with = |arg: &'static str| ["--arg", arg, "--arg", "u32=32"];
    fails(&with("u32[31]=@in.bin"), &["in.bin holds more than 124 bytes", "takes 124 bytes"]);
    fails(&with("u64[17]=@in.bin"), &["in.bin holds 128 bytes", "takes 136 bytes"]);
    fails(&with("u32[32]=@none.bin"), &["cannot read none.bin"]);
    fails(&with("u32[32]=@."), &["cannot read .", "regular file"]);
    #[cfg(unix)]
    fails(&with("u32[32]=@/dev/zero"), &["cannot read /dev/zero", "regular file"]);
    let dump = |dump: &'static str| [&with("u32[32]=zero")[..], &["--dump", dump]].concat();
    fails(&dump("2=out.bin"), &["invalid `--dump 2=out.bin`", "2 arguments, numbered from 0"]);
    fails(&dump("1=out.bin"), &["argument 1 is a value"]);
    fails(&dump("out.bin"), &["invalid `--dump out.bin`"]);
    fails(&dump("0=nowhere/out.bin"), &["cannot write nowhere/out.bin"]);
    std::fs::write(path("empty.ptx"), "").unwrap();
    let empty = ptx_race_in(folder.path(), &["empty.ptx"]);
    assert_eq!(empty.status.code(), Some(2), "{empty:?}");
    // What the kernel did not write cannot be dumped.
    let partly = ["--arg", "u32[32]=uninit", "--arg", "u32=0", "--dump", "0=out.bin"];
    fails(&partly, &["cannot dump argument 0", "never written"]);
}

#[test]
fn a_profile_shows_conflicts_and_sectors() {
    let text = ".version 9.0\n.target sm_80\n.address_size 64
        .file 1 \"stride.cu\"
        .entry strided(.param .u64 p, .param .u32 stride) {
        .shared .align 4 .b8 s[4096]; .reg .b32 %r<5>; .reg .b64 %rd<3>;
        ld.param.u64 %rd1, [p]; ld.param.u32 %r1, [stride]; mov.u32 %r2, %tid.x;
        mul.lo.u32 %r2, %r2, %r1;
        mad.wide.u32 %rd2, %r2, 4, %rd1;
        .loc 1 7 1
        ld.global.u32 %r3, [%rd2];
        mov.u32 %r4, s; mad.lo.u32 %r4, %r2, 4, %r4;
        .loc 1 8 1
        st.shared.u32 [%r4], %r3; ret; }";
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("s.ptx"), text).unwrap();
    for (stride, sectors, passes) in [("1", 4, 1), ("2", 8, 2), ("32", 32, 32), ("0", 1, 1)] {
        let stride = format!("u32={stride}");
        let output = ptx_race_in(
            folder.path(),
            &[
                "s.ptx",
                "strided",
                "--arg",
                "u32[1024]=zero",
                "--arg",
                &stride,
                "--profile",
                "--grid",
                "3",
                "--threads",
                "2",
            ],
        );
        let out = String::from_utf8(output.stdout).unwrap();
        let columns = |space: &str| {
            let line = out.lines().find(|line| line.starts_with(space)).unwrap();
            let words: Vec<&str> = line.split_whitespace().collect();
            (words[1..4].iter().map(|n| n.parse().unwrap()).collect::<Vec<u64>>(), line.to_owned())
        };
        let (global, line) = columns("global");
        assert_eq!(global, [3, 3 * 128, 3 * sectors], "{out}");
        assert!(line.contains("`ld.global.u32`") && line.ends_with("stride.cu:7"), "{line}");
        let (shared, line) = columns("shared");
        assert_eq!(shared, [3, 3 * 128, 3 * passes], "{out}");
        assert!(line.ends_with("stride.cu:8"), "{line}");
    }
}

#[test]
fn race_is_a_command_and_architectures_differ() {
    let racing =
        ["race", "k.ptx", "doubling", "--arg", "u32[1]=zero", "--arg", "u32=1", "--grid", "2"];
    fails(&racing, &["data race", "doubling.cu:12"]);
    for arch in ["h100", "a100"] {
        let out = succeeds(&[
            "k.ptx",
            "doubling",
            "--arg",
            "u32[32]=iota",
            "--arg",
            "u32=32",
            "--arch",
            arch,
            "--budget",
            "100",
            "--schedule",
            "in-order",
        ]);
        assert!(out.contains("0 2 4 6"), "{out}");
    }
}
