//! Mistakes put into a kernel's source, each of which its test has to see.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::Command;

use super::Module;

/// Compiles `kernels/NAME.cu` with each `(what, source, replacement)` put in by itself, in the file
/// or in `kernels/lib`, and demands that `check` fails. The source has to be there exactly once.
pub fn planted(name: &str, bugs: &[(&str, &str, &str)], check: impl Fn(&Module)) {
    planted_in(name, &[], bugs, check);
}

/// The same without some lines of the file, entries that `check` does not need: they take time.
pub fn planted_in(
    name: &str,
    without: &[&str],
    bugs: &[(&str, &str, &str)],
    check: impl Fn(&Module),
) {
    let nvcc = match laam::kernels::BUILD.cuda {
        Ok(nvcc) if Path::new(nvcc.path).is_file() => nvcc,
        Ok(nvcc) => return eprintln!("SKIPPED: planted mistakes, as {} is gone", nvcc.path),
        Err(why) => return eprintln!("SKIPPED: planted mistakes, because {why}"),
    };
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let mut unseen = Vec::new();
    for (what, source, replacement) in bugs {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("lib")).unwrap();
        let mut places = 0;
        let mut copy = |file: &str| {
            let text = fs::read_to_string(kernels.join(file)).unwrap();
            places += text.matches(source).count();
            let text = text.replace(source, replacement);
            let kept =
                text.lines().filter(|line| !without.contains(&line.trim_end_matches([' ', '\\'])));
            let text: String = kept.flat_map(|line| [line, "\n"]).collect();
            fs::write(folder.path().join(file), text).unwrap();
        };
        copy(&format!("{name}.cu"));
        for header in fs::read_dir(kernels.join("lib")).unwrap() {
            copy(&format!("lib/{}", header.unwrap().file_name().to_str().unwrap()));
        }
        assert_eq!(places, 1, "{name}, {what}: where {source:?} stands");
        let ptx = folder.path().join("ptx");
        let mut command = Command::new(nvcc.path);
        command.args(["-ptx", "-arch=compute_80", "-O3", "-std=c++17", "-lineinfo", "-o"]);
        let output = command.arg(&ptx).arg(folder.path().join(format!("{name}.cu"))).output();
        let output = output.unwrap();
        assert!(output.status.success(), "{name}, {what}: {output:?}");
        let module = Module::from_ptx(&fs::read_to_string(&ptx).unwrap()).unwrap();
        if catch_unwind(AssertUnwindSafe(|| check(&module))).is_ok() {
            unseen.push(what);
        }
    }
    assert!(unseen.is_empty(), "{name}: nothing saw {unseen:?}");
}
