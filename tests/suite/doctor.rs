//! What `laam doctor` says of this build and this machine.

use crate::support::laam;

fn report() -> serde_json::Value {
    let output = laam().args(["doctor", "--json"]).output().expect("the program starts");
    assert!(output.status.success());
    serde_json::from_slice(&output.stdout).expect("one JSON object on stdout")
}

#[test]
fn the_build_is_told_as_it_was() {
    let report = report();
    assert_eq!(report["version"], env!("CARGO_PKG_VERSION"));
    let names: Vec<_> = laam::kernels::CUDA_MODULES.iter().map(|kernel| kernel.name).collect();
    assert_eq!(report["kernels"], serde_json::json!(names));
    // Kernels and the reason for having none exclude each other.
    assert_eq!(names.is_empty(), report["nvcc_version"].is_null());
    assert_eq!(names.is_empty(), report["no_kernels_because"].is_string());
    assert!(report["threads"].as_u64().is_some_and(|threads| threads > 0));
}

#[test]
fn each_missing_thing_has_its_advice() {
    let report = report();
    let missing = report["missing"].as_array().expect("a list");
    assert!(missing.iter().all(|one| one["what"].is_string() && one["hint"].is_string()));
    let says = |word: &str| missing.iter().any(|one| one["what"].as_str().unwrap().contains(word));
    assert_eq!(says("CUDA kernels"), report["nvcc_version"].is_null());
    if report["driver"].is_null() && report["libcuda"].is_null() {
        assert!(says("driver"));
    }
}

#[test]
fn a_folder_that_cannot_hold_downloads_is_reported() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let output = laam().arg("doctor").env("LAAM_CACHE", file.path().join("inside")).output();
    let said = String::from_utf8(output.unwrap().stdout).unwrap();
    assert!(said.contains("missing: no place to keep downloads"), "{said}");
    assert!(said.contains("LAAM_CACHE"), "{said}");
}
