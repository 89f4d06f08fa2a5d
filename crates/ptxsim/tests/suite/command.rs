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

fn ptxsim(arguments: &[&str]) -> Output {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("k.ptx"), TEXT).unwrap();
    Command::new(env!("CARGO_BIN_EXE_ptxsim"))
        .args(arguments)
        .current_dir(folder.path())
        .output()
        .unwrap()
}

fn succeeds(arguments: &[&str]) -> String {
    let output = ptxsim(arguments);
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn fails(arguments: &[&str], words: &[&str]) {
    let output = ptxsim(arguments);
    let told = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {told}");
    assert!(told.starts_with("ptxsim: "), "{told}");
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
}

#[test]
fn runs_a_kernel() {
    let arguments = ["k.ptx", "doubling", "--arg", "u32[32]=iota", "--arg", "u32=32"];
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
    run(&["--arg", "u33=1"], &["makes no sense", "hint:"]);
    run(&["--arg", "u8=256"], &["is no u8"]);
    run(&["--arg", "u64[99999999999999]=zero"], &["asks for more"]);
    run(&["--block", "0", "--arg", "u64=0", "--arg", "u32=1"], &["impossible launch"]);
    run(&["--grid", "1,2,3,4"], &["4 dimensions"]);
    run(&["--frobnicate"], &["unknown option", "hint:"]);
    run(&["--grid"], &["needs a value"]);
    fails(&["k.ptx", "nothing"], &["no kernel `nothing`", "hint: it has: doubling"]);
    fails(&["missing.ptx"], &["cannot read missing.ptx", "hint:"]);
}
