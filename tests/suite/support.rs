//! What the tests share.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

use assert_cmd::cargo::CommandCargoExt;
use laam::corpus::Document;

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

/// The source files of an archive by the first LaaM's filter, in the archive's order: read here by
/// hand, so that tokens are tested without the corpus room.
pub fn documents(archive: &Path) -> Vec<Document> {
    const SUFFIXES: [&str; 13] = [
        ".c", ".cc", ".cpp", ".cxx", ".c++", ".h", ".hh", ".hpp", ".hxx", ".h++", ".s", ".rs",
        ".txt",
    ];
    let file = std::fs::File::open(archive).expect("the archive opens");
    let mut archive = tar::Archive::new(lzma_rust2::XzReader::new(file, false));
    let mut documents = Vec::new();
    for member in archive.entries().expect("a tar archive") {
        let mut member = member.expect("a member");
        let path = member.path().expect("a path").to_str().expect("UTF-8").to_string();
        let lower = path.to_lowercase();
        if member.header().entry_type().is_file() && SUFFIXES.iter().any(|s| lower.ends_with(s)) {
            let mut text = String::new();
            member.read_to_string(&mut text).expect("Linux 1.0 is ASCII");
            documents.push(Document::new(path, text));
        }
    }
    documents
}
