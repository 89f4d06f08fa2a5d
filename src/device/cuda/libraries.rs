//! Search for CUDA's libraries in the loader's paths, toolkits and Python environments.

use std::env;
use std::path::{Path, PathBuf};

use cudarc::{cublaslt, driver};

use crate::device::driver::Library;

/// File names of cuBLASLt, newest first.
const CUBLASLT: [&str; 2] = ["libcublasLt.so.13", "libcublasLt.so.12"];

/// True if the driver's library can be loaded.
pub(super) fn driver() -> bool {
    // SAFETY: this loads only libcuda, by its names, whose initializers are safe to run.
    unsafe { driver::sys::is_culib_present() }
}

/// Finds cuBLASLt and loads it.
pub fn cublaslt() -> Library {
    // SAFETY: this loads only cuBLASLt, by its names, whose initializers are safe to run.
    let present = || unsafe { cublaslt::sys::is_culib_present() };
    if present() {
        return Library::Known;
    }
    for path in folders().iter().flat_map(|folder| CUBLASLT.map(|name| folder.join(name))) {
        if !path.is_file() {
            continue;
        }
        // SAFETY: the file has cuBLASLt's name and lies in a folder of CUDA's libraries, so its
        // initializers are safe to run.
        if let Ok(library) = unsafe { libloading::Library::new(&path) } {
            // It stays loaded, so that the loader finds it by its name.
            std::mem::forget(library);
            if present() {
                return Library::Found(path);
            }
        }
    }
    Library::Missing
}

/// Folders that may contain CUDA's libraries: installed toolkits, then the wheels of Python
/// environments.
fn folders() -> Vec<PathBuf> {
    let mut folders = Vec::new();
    for name in ["CUDA_HOME", "CUDA_PATH", "CUDA_ROOT"] {
        if let Some(home) = env::var_os(name).filter(|home| !home.is_empty()) {
            folders.push(Path::new(&home).join("lib64"));
        }
    }
    folders.extend(["/usr/local/cuda/lib64", "/opt/cuda/lib64"].map(PathBuf::from));
    let mut environments: Vec<PathBuf> =
        ["VIRTUAL_ENV", "CONDA_PREFIX"].iter().filter_map(env::var_os).map(PathBuf::from).collect();
    environments.push(".venv".into());
    environments.extend(["/usr/local", "/usr"].map(PathBuf::from));
    for environment in environments {
        let lib = environment.join("lib").read_dir().into_iter().flatten().flatten();
        let mut pythons: Vec<PathBuf> = lib.map(|entry| entry.path()).collect();
        pythons.sort();
        for python in pythons.iter().filter(|path| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("python3"))
        }) {
            for packages in ["site-packages", "dist-packages"] {
                let nvidia = python.join(packages).join("nvidia");
                folders.extend(["cu13/lib", "cublas/lib"].map(|lib| nvidia.join(lib)));
            }
        }
    }
    folders
}
