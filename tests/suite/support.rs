//! What the tests share.

use std::path::PathBuf;
use std::process::Command;

use assert_cmd::cargo::CommandCargoExt;

/// The program itself, ready to be given arguments.
pub fn laam() -> Command {
    Command::cargo_bin("laam").expect("the binary is built beside its tests")
}

/// The Linux 1.0 archive, or `None` after a loud line.
pub fn linux() -> Option<PathBuf> {
    let given = std::env::var_os("LAAM_TEST_CORPUS").map(PathBuf::from);
    let beside = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/corpus"));
    for place in given.into_iter().chain([beside]) {
        let file = if place.is_dir() { place.join("linux-1.0.tar.xz") } else { place };
        if file.is_file() {
            return Some(file);
        }
    }
    eprintln!(
        "SKIPPED: no Linux 1.0 corpus. Set LAAM_TEST_CORPUS to linux-1.0.tar.xz to run this test."
    );
    None
}
