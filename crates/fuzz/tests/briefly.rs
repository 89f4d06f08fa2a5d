//! Ten seconds over all targets; `scripts/fuzz MINUTES` is the long form.

use std::process::Command;

#[test]
fn no_parser_panics_hangs_or_takes_too_much_memory() {
    let output = Command::new(env!("CARGO_BIN_EXE_laam-fuzz"))
        .arg("10")
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
        // A backtrace of every error would take a hundred times as long as the parsers do.
        .env("RUST_BACKTRACE", "0")
        .output()
        .unwrap();
    println!("{}", String::from_utf8_lossy(&output.stdout));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
