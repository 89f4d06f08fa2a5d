//! What `laam doctor` says of this build and this machine.

use std::fs;
use std::path::Path;
use std::process::Command;

use laam::backend::cpu::Cpu;

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
    for (precision, cpu) in [("float32", Cpu::f32(1)), ("bfloat16", Cpu::bf16(1))] {
        assert_eq!(report["cpu_kernels"][precision], cpu.path());
    }
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

/// A library with cuBLASLt's name that leaves a mark when it is loaded; false without a C compiler.
fn library(at: &Path, mark: &Path) -> bool {
    fs::create_dir_all(at.parent().unwrap()).unwrap();
    let source = at.with_extension("c");
    let text = format!(
        "#include <stdio.h>\n__attribute__((constructor)) static void load(void) {{ fclose(fopen({:?}, \"w\")); }}\n",
        mark.to_str().unwrap()
    );
    fs::write(&source, text).unwrap();
    let mut cc = Command::new("cc");
    cc.args(["-shared", "-fPIC", "-Wl,-soname,libcublasLt.so.13", "-o"]).arg(at).arg(&source);
    cc.status().is_ok_and(|status| status.success())
}

#[test]
fn libraries_are_loaded_from_named_places_never_from_the_current_folder() {
    let folder = tempfile::tempdir().unwrap();
    let mark = folder.path().join("loaded");
    let packages = "lib/python3.12/site-packages/nvidia/cublas/lib/libcublasLt.so.13";
    let in_venv = folder.path().join(".venv").join(packages);
    if !library(&in_venv, &mark) {
        eprintln!("SKIPPED: loading a library by its place, because there is no C compiler");
        return;
    }
    for name in ["libcublasLt.so.13", "libcublasLt.so", "lib64/libcublasLt.so.13", "libcuda.so.1"] {
        let copy = folder.path().join(name);
        fs::create_dir_all(copy.parent().unwrap()).unwrap();
        fs::copy(&in_venv, copy).unwrap();
    }
    let run = |line: &str, variable: Option<(&str, &Path)>| {
        let mut command = laam();
        command.args(line.split_whitespace()).current_dir(folder.path());
        for name in
            ["VIRTUAL_ENV", "CONDA_PREFIX", "CUDA_HOME", "CUDA_PATH", "CUDA_ROOT", "LAAM_CUBLASLT"]
        {
            command.env_remove(name);
        }
        command.envs(variable);
        String::from_utf8(command.output().unwrap().stdout).unwrap()
    };
    let dot = Path::new(".");
    for variable in [None, Some(("VIRTUAL_ENV", Path::new(".venv"))), Some(("CUDA_HOME", dot))] {
        for line in ["doctor", "plan", "check --backend cuda", "bench smoke"] {
            run(line, variable);
            assert!(!mark.exists(), "{line} {variable:?}");
        }
    }
    for list in [":", "/none:", ".", "lib64:/none"] {
        run("doctor", Some(("LD_LIBRARY_PATH", Path::new(list))));
        assert!(!mark.exists(), "{list}");
    }
    // Where the system's loader has one, that comes first.
    let absolute = folder.path().join(".venv");
    let said = run("doctor", Some(("VIRTUAL_ENV", &absolute)));
    let shown = in_venv.canonicalize().unwrap();
    if said.contains(shown.to_str().unwrap()) {
        assert!(mark.exists());
        fs::remove_file(&mark).unwrap();
    } else {
        assert!(said.contains("libcublasLt.so"), "{said}");
    }
    let said = run("doctor", Some(("LAAM_CUBLASLT", &in_venv)));
    assert!(mark.exists() && said.contains(shown.to_str().unwrap()), "{said}");
}
