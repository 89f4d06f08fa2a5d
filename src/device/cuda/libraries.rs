//! Search for CUDA's libraries in the loader's paths, toolkits and Python environments.
//!
//! Only places that the system or the environment names are searched, never the current folder: it may be
//! somebody else's, and loading a library runs its code.

use std::env;
use std::path::{Path, PathBuf};

use cudarc::driver::sys::{CUevent, CUresult};
use cudarc::{cublaslt, driver};

use crate::device::driver::Library;
use crate::files;

/// File names of cuBLASLt, newest first.
const CUBLASLT: [&str; 2] = ["libcublasLt.so.13", "libcublasLt.so.12"];

/// File name of NCCL.
const NCCL: &str = "libnccl.so.2";

/// True if the driver's library can be loaded.
pub(super) fn driver() -> bool {
    // SAFETY: this loads only libcuda, by its names, whose initializers are safe to run.
    unsafe { driver::sys::is_culib_present() }
}

/// Functions of the driver that this program calls. A missing one is an error of [`super::Cuda::new`]:
/// cudarc panics when it is called.
const DRIVER_SYMBOLS: [&str; 41] = [
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
    "cuDeviceCanAccessPeer",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDeviceGetUuid_v2",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDriverGetVersion",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventElapsedTime",
    "cuEventQuery",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuFuncGetAttribute",
    "cuFuncSetAttribute",
    "cuGetErrorString",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuGraphUpload",
    "cuInit",
    "cuLaunchKernel",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemGetInfo_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemsetD8Async",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuStreamBeginCapture_v2",
    "cuStreamCreate",
    "cuStreamEndCapture",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
];

/// Functions of cuBLASLt that this program calls.
const CUBLASLT_SYMBOLS: [&str; 15] = [
    "cublasLtCreate",
    "cublasLtGetVersion",
    "cublasLtMatmul",
    "cublasLtMatmulAlgoCheck",
    "cublasLtMatmulAlgoGetHeuristic",
    "cublasLtMatmulDescCreate",
    "cublasLtMatmulDescDestroy",
    "cublasLtMatmulDescSetAttribute",
    "cublasLtMatmulPreferenceCreate",
    "cublasLtMatmulPreferenceDestroy",
    "cublasLtMatmulPreferenceSetAttribute",
    "cublasLtMatrixLayoutCreate",
    "cublasLtMatrixLayoutDestroy",
    "cublasLtMatrixLayoutSetAttribute",
    "cublasLtDestroy",
];

/// A function that the driver's library lacks; the library must be there.
pub(super) fn missing_driver_symbol() -> Option<&'static str> {
    // SAFETY: this loads only libcuda, which is there.
    missing(unsafe { driver::sys::culib() }, &DRIVER_SYMBOLS)
}

/// A function that cuBLASLt's library lacks; the library must be there.
pub(super) fn missing_cublaslt_symbol() -> Option<&'static str> {
    // SAFETY: this loads only cuBLASLt, which is there.
    missing(unsafe { cublaslt::sys::culib() }, &CUBLASLT_SYMBOLS)
}

fn missing(library: &libloading::Library, symbols: &[&'static str]) -> Option<&'static str> {
    // SAFETY: the symbol is not used, so its type does not matter.
    let has = |symbol: &str| unsafe { library.get::<*const ()>(symbol.as_bytes()) }.is_ok();
    symbols.iter().copied().find(|symbol| !has(symbol))
}

/// `cuEventElapsedTime`, in the version of CUDA 12.8 if the driver has it.
pub(super) fn event_elapsed_time() -> unsafe extern "C" fn(*mut f32, CUevent, CUevent) -> CUresult {
    // SAFETY: the library is there, and both versions have this prototype.
    unsafe {
        let library = driver::sys::culib();
        let newest = library.get(b"cuEventElapsedTime_v2");
        *newest.or_else(|_| library.get(b"cuEventElapsedTime")).expect("a checked symbol")
    }
}

/// The library that `LAAM_CUBLASLT` names.
pub(super) fn given_cublaslt() -> Option<PathBuf> {
    env::var_os("LAAM_CUBLASLT").filter(|path| !path.is_empty()).map(PathBuf::from)
}

/// Finds cuBLASLt and loads it. `LAAM_CUBLASLT` goes before all other places.
pub fn cublaslt() -> Library {
    // SAFETY: this loads only cuBLASLt, by its names, whose initializers are safe to run.
    let present = || unsafe { cublaslt::sys::is_culib_present() };
    let given = given_cublaslt();
    if given.is_none() && present() {
        return Library::Loaded(loaded("libcublasLt.so"));
    }
    let in_folders =
        folders().into_iter().flat_map(|folder| CUBLASLT.map(|name| folder.join(name)));
    let places: Vec<PathBuf> = given.map_or_else(|| in_folders.collect(), |path| vec![path]);
    for path in places {
        // A whole path: the loader would search for a name alone.
        let Ok(path) = path.canonicalize() else { continue };
        if !path.is_file() {
            continue;
        }
        // SAFETY: the file has cuBLASLt's name and lies in a folder of CUDA's libraries, so its
        // initializers are safe to run.
        if let Ok(library) = unsafe { libloading::Library::new(&path) } {
            // It stays loaded, so that the loader finds it by its name.
            std::mem::forget(library);
            if present() {
                return Library::Loaded(path);
            }
        }
    }
    Library::Missing
}

/// Finds NCCL and loads it: the file and the library, or why there is none. `LAAM_NCCL` goes before all other
/// places; `off` means none.
pub(super) fn open_nccl() -> Result<(libloading::Library, PathBuf), String> {
    // SAFETY: the library has NCCL's name and is where the system or the environment says that it is, so its
    // initializers are safe to run.
    let open = |path: &Path| unsafe { libloading::Library::new(path) };
    let given = env::var_os("LAAM_NCCL").filter(|path| !path.is_empty()).map(PathBuf::from);
    if let Some(given) = given {
        if given == Path::new("off") {
            return Err("LAAM_NCCL is off".to_string());
        }
        let path =
            given.canonicalize().map_err(|why| format!("LAAM_NCCL={}: {why}", given.display()))?;
        let library = open(&path).map_err(|_| {
            format!("LAAM_NCCL={}: not a library that can be loaded", given.display())
        })?;
        return Ok((library, path));
    }
    if let Ok(library) = open(Path::new(NCCL)) {
        return Ok((library, loaded(NCCL)));
    }
    for folder in folders() {
        let Ok(path) = folder.join(NCCL).canonicalize() else { continue };
        if let (true, Ok(library)) = (path.is_file(), open(&path)) {
            return Ok((library, path));
        }
    }
    Err(format!("{NCCL} was not found"))
}

/// The folder that a variable names. A relative one would lead to the current folder.
fn absolute(variable: &str) -> Option<PathBuf> {
    env::var_os(variable).map(PathBuf::from).filter(|folder| folder.is_absolute())
}

/// The file of a library that this process has loaded, by the beginning of its name; the name itself
/// if the system does not tell.
fn loaded(name: &str) -> PathBuf {
    let maps = files::read_text(Path::new("/proc/self/maps"), 64 << 20).unwrap_or_default();
    let path = maps.lines().filter_map(|line| Some(&line[line.find('/')?..])).find(|path| {
        Path::new(path).file_name().is_some_and(|file| file.to_string_lossy().starts_with(name))
    });
    PathBuf::from(path.unwrap_or(name))
}

/// Folders that may contain CUDA's libraries: installed toolkits, then the wheels of Python
/// environments: the active ones, those of the `python3` on PATH, the user's, the system's.
fn folders() -> Vec<PathBuf> {
    let mut folders = Vec::new();
    for name in ["CUDA_HOME", "CUDA_PATH", "CUDA_ROOT"] {
        folders.extend(absolute(name).map(|home| home.join("lib64")));
    }
    folders.extend(["/usr/local/cuda/lib64", "/opt/cuda/lib64"].map(PathBuf::from));
    let mut environments: Vec<PathBuf> =
        ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(absolute).collect();
    // A conda environment keeps them in its own lib.
    folders.extend(absolute("CONDA_PREFIX").map(|environment| environment.join("lib")));
    let path = env::var_os("PATH").unwrap_or_default();
    let python = env::split_paths(&path)
        .map(|folder| folder.join("python3"))
        .find(|python| python.is_absolute() && python.is_file());
    // An environment's python3 is a link to another's: both may have the library.
    let pythons = python.iter().cloned().chain(python.iter().filter_map(|p| p.canonicalize().ok()));
    environments
        .extend(pythons.filter_map(|python| Some(python.parent()?.parent()?.to_path_buf())));
    environments.extend(absolute("HOME").map(|home| home.join(".local")));
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
                folders.extend(["cu13/lib", "cublas/lib", "nccl/lib"].map(|lib| nvidia.join(lib)));
            }
        }
    }
    folders
}
