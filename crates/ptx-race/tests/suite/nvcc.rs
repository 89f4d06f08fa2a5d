//! Finds nvcc and compiles the kernels of `tests/kernels`.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use ptx_race::Module;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// nvcc inside a Python virtual environment, as `scripts/setup-cuda` installs it.
fn in_environment(environment: &Path) -> Vec<PathBuf> {
    let Ok(versions) = environment.join("lib").read_dir() else { return Vec::new() };
    versions
        .flatten()
        .map(|version| version.path().join("site-packages/nvidia/cu13/bin/nvcc"))
        .collect()
}

fn find() -> Option<PathBuf> {
    let var = |name: &str| env::var_os(name).map(PathBuf::from);
    let mut candidates: Vec<PathBuf> = var("NVCC").into_iter().collect();
    for name in ["CUDA_HOME", "CUDA_PATH"] {
        candidates.extend(var(name).map(|home| home.join("bin/nvcc")));
    }
    let path = env::var_os("PATH").unwrap_or_default();
    candidates.extend(env::split_paths(&path).map(|folder| folder.join("nvcc")));
    candidates.extend(var("VIRTUAL_ENV").iter().flat_map(|e| in_environment(e)));
    candidates.extend(in_environment(&root().join(".venv")));
    candidates.push("/usr/local/cuda/bin/nvcc".into());
    candidates.into_iter().find(|path| path.is_file())
}

/// The PTX of a kernel file, or None (and a loud word) where there is no nvcc.
pub fn ptx(file: &str, defines: &[&str]) -> Option<String> {
    let Some(nvcc) = find() else {
        let required = env::var("LAAM_CUDA").is_ok_and(|value| value == "require");
        assert!(!required, "LAAM_CUDA=require, but there is no nvcc: run scripts/setup-cuda");
        eprintln!("SKIPPED: no nvcc, so {file} was not tested (scripts/setup-cuda installs one)");
        return None;
    };
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kernels").join(file);
    let folder = tempfile::tempdir().expect("a folder for nvcc");
    let out = folder.path().join("kernel.ptx");
    let output = Command::new(&nvcc)
        .args(["-ptx", "-lineinfo", "-arch=compute_80", "-O3", "-std=c++17", "-o"])
        .arg(&out)
        .args(defines.iter().map(|name| format!("-D{name}")))
        .arg(&source)
        .output()
        .expect("nvcc starts");
    assert!(
        output.status.success(),
        "nvcc refuses {file} {defines:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Some(std::fs::read_to_string(out).expect("nvcc wrote its output"))
}

/// The module of a kernel file.
pub fn module(file: &str, defines: &[&str]) -> Option<Module> {
    Some(load(&ptx(file, defines)?))
}

pub fn load(text: &str) -> Module {
    Module::from_ptx(text).unwrap_or_else(|error| panic!("{error}"))
}
