//! `scripts/package`: a tarball whose program starts without the source tree.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::support::laam;

#[test]
fn the_package_starts_in_a_fresh_root_without_network() {
    let tools = ["strip", "readelf", "ldd", "tar"];
    let has = |tool: &&str| Command::new(tool).arg("--version").output().is_ok();
    if let Some(missing) = tools.iter().find(|tool| !has(tool)) {
        eprintln!("SKIPPED: no {missing} here: nothing was packaged.");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/package");
    let program = laam().get_program().to_owned();
    let mut package = Command::new(script);
    package.arg("--binary").arg(program).arg("--output").arg(folder.path());
    let output = package.output().unwrap();
    let [said, errors] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    assert!(output.status.success(), "{said}{errors}");
    if let Some(line) = said.lines().find(|line| line.starts_with("SKIPPED: ")) {
        eprintln!("{line}");
    } else {
        assert!(said.contains("started in a fresh root without network"), "{said}");
    }
    assert!(said.contains("libc.so.6\n") && said.contains("# glibc 2."), "{said}");
    let tarball = fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().path();
    let listed = Command::new("tar").arg("-tzf").arg(&tarball).output().unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    for name in ["/laam", "/LIBRARIES", "/README.md", "/LICENSE", "/completions/laam.bash"] {
        assert!(listed.lines().any(|line| line.ends_with(name)), "{name}: {listed}");
    }
}
