//! The built-in sample is frozen, and is a program that compiles and works.

use std::process::Command;

use laam::corpus::{Corpus, CorpusOptions, Source};

#[test]
fn the_sample_is_frozen() {
    let manifest =
        Corpus::open(&Source::Sample, CorpusOptions::default()).unwrap().manifest().unwrap();
    // Models are trained on these bytes. A change of the sample is a new sample: say so.
    assert_eq!(manifest.hash(), "f788fbaf6c7e0ff48f6678463aff3ca36ccd081c9ba0ce76f17cd1132027ffa7");
    assert_eq!((manifest.files.len(), manifest.bytes()), (9, 40_161));
    assert_eq!((manifest.left_out.len(), manifest.retrieved), (0, None));
}

#[test]
fn the_sample_compiles_without_warnings_and_passes_its_test() {
    let corpus = Corpus::open(&Source::Sample, CorpusOptions::default()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut sources = Vec::new();
    for document in corpus.documents().unwrap() {
        let document = document.unwrap();
        assert!(document.text.is_ascii() && !document.text.contains('\r'));
        let name = document.path.strip_prefix("sample/").unwrap().to_string();
        std::fs::write(folder.path().join(&name), document.text).unwrap();
        if name != "kernel.h" {
            sources.push(name);
        }
    }
    let mut compilers = 0;
    for compiler in ["cc", "gcc", "clang"] {
        let program = format!("./pebble-{compiler}");
        let output = Command::new(compiler)
            .args(["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-O1", "-o", &program])
            .args(&sources)
            .current_dir(folder.path())
            .output();
        let Ok(output) = output else { continue };
        compilers += 1;
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.is_empty(), "{compiler}: {said}");
        let program = folder.path().join(program);
        let output = Command::new(&program).arg("--test").output().unwrap();
        assert!(output.status.success());
        assert_eq!(String::from_utf8_lossy(&output.stdout), "self-test: 61 checks passed\n");
    }
    if compilers == 0 {
        eprintln!("SKIPPED: no C compiler (cc, gcc or clang) to compile the sample with.");
    }
}
