//! Whether CUDA's libraries can be loaded, and where they are when the loader does not know.

use std::env;
use std::path::{Path, PathBuf};

use cudarc::{cublaslt, driver};

/// Names of cuBLASLt, the newest first.
const CUBLASLT: [&str; 2] = ["libcublasLt.so.13", "libcublasLt.so.12"];

/// Whether the driver's library can be loaded.
pub(super) fn driver() -> bool {
    // SAFETY: it opens libraries by the names of libcuda, whose initialisers are NVIDIA's.
    unsafe { driver::sys::is_culib_present() }
}

/// Whether a library can be loaded, and by whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Library {
    Missing,
    /// The loader knows where it is.
    Known,
    /// The loader does not; it lies here.
    Found(PathBuf),
}

/// Looks for cuBLASLt, and loads it where it is.
pub fn cublaslt() -> Library {
    // SAFETY: as in `driver`, for cuBLASLt.
    let present = || unsafe { cublaslt::sys::is_culib_present() };
    if present() {
        return Library::Known;
    }
    for path in folders().iter().flat_map(|folder| CUBLASLT.map(|name| folder.join(name))) {
        if !path.is_file() {
            continue;
        }
        // SAFETY: a file of cuBLASLt's name in a folder where CUDA's libraries are kept.
        if let Ok(library) = unsafe { libloading::Library::new(&path) } {
            // Once loaded it stays, and is found by its name.
            std::mem::forget(library);
            if present() {
                return Library::Found(path);
            }
        }
    }
    Library::Missing
}

/// Where CUDA's libraries may lie: an installed toolkit, then the wheels of Python environments.
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
