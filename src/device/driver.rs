//! The NVIDIA driver as its files show it, without loading it.

use std::path::{Path, PathBuf};
use std::{env, fs};

use crate::files;

/// Folders that may contain `libcuda.so.1` on systems without an entry in the loader's cache.
const FOLDERS: [&str; 6] = [
    "usr/lib/x86_64-linux-gnu",
    "usr/lib/aarch64-linux-gnu",
    "usr/lib64",
    "usr/lib",
    "usr/lib/wsl/lib",
    "run/opengl-driver/lib",
];
const LIBRARY: &str = "libcuda.so.1";

/// The parts of a driver that were found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Driver {
    /// Version of the kernel module: `580.65.06`.
    pub version: Option<String>,
    /// Path of `libcuda.so.1`.
    pub library: Option<PathBuf>,
    /// Number of GPU device files.
    pub gpus: usize,
}

impl Driver {
    /// Searches this machine.
    pub fn find() -> Driver {
        let given = env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
        Driver::find_under(Path::new("/"), &env::split_paths(&given).collect::<Vec<_>>())
    }

    /// Searches the system under `root`; the loader tries the folders `first` before all others.
    fn find_under(root: &Path, first: &[PathBuf]) -> Driver {
        let text =
            files::read_text(&root.join("proc/driver/nvidia/version"), 1 << 20).unwrap_or_default();
        let given = first.iter().map(|folder| folder.join(LIBRARY));
        let cached =
            cached(&files::read(&root.join("etc/ld.so.cache"), 64 << 20).unwrap_or_default());
        let usual = FOLDERS.iter().map(|folder| Path::new(folder).join(LIBRARY));
        let below = |path: PathBuf| root.join(path.strip_prefix("/").unwrap_or(&path));
        let mut places = given.chain(cached.into_iter().chain(usual).map(below));
        let devices = fs::read_dir(root.join("dev")).into_iter().flatten().flatten();
        let is_gpu = |name: &str| {
            name.strip_prefix("nvidia").is_some_and(|number| number.parse::<u32>().is_ok())
        };
        Driver {
            version: version(&text),
            library: places.find(|place| place.is_file()),
            gpus: devices.filter(|entry| entry.file_name().to_str().is_some_and(is_gpu)).count(),
        }
    }

    /// Major version.
    pub fn major(&self) -> Option<u32> {
        self.version.as_ref()?.split('.').next()?.parse().ok()
    }
}

/// Result of the search for a library.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Library {
    /// There is no such library.
    Missing,
    /// Loaded from this file.
    Loaded(PathBuf),
}

/// Oldest CUDA version of a driver that this program supports, and the first driver with it. Kernels that
/// a newer toolkit compiled are given to an older driver as PTX.
pub const OLDEST_CUDA: u32 = 12;
/// Oldest NVIDIA driver that is supported.
pub const OLDEST_DRIVER: u32 = 525;

/// The first word of digits and dots in `NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06
/// Sun ...`.
fn version(text: &str) -> Option<String> {
    let line = text.lines().find(|line| line.starts_with("NVRM version:"))?;
    let is_version =
        |word: &&str| word.contains('.') && word.split('.').all(|part| part.parse::<u32>().is_ok());
    line.split_whitespace().find(is_version).map(String::from)
}

/// Path of the library in the loader's cache, whose strings end in a zero byte.
fn cached(cache: &[u8]) -> Option<PathBuf> {
    let strings =
        cache.split(|&byte| byte == 0).filter_map(|bytes| std::str::from_utf8(bytes).ok());
    let mut paths = strings.filter(|text| text.starts_with('/'));
    paths.find(|path| path.ends_with("/libcuda.so.1")).map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    const VERSION: &str = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  \
                           Release Build  (builder)\nGCC version:  gcc version 12.2.0\n";

    #[test]
    fn no_driver_is_found_in_an_empty_root() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(Driver::find_under(root.path(), &[]), Driver::default());
    }

    #[test]
    fn a_driver_is_found_by_its_files() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, bytes: &[u8]| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, bytes).unwrap();
            path
        };
        write("proc/driver/nvidia/version", VERSION.as_bytes());
        for device in ["nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"] {
            write(&format!("dev/{device}"), b"");
        }
        let usual = write("usr/lib64/libcuda.so.1", b"");
        let found = Driver::find_under(root.path(), &[]);
        assert_eq!(found.version.as_deref(), Some("580.65.06"));
        assert_eq!((found.major(), found.gpus), (Some(580), 2));
        assert_eq!(found.library, Some(usual));

        // The loader's cache goes before the usual folders, and LD_LIBRARY_PATH before both.
        let odd = write("opt/odd/libcuda.so.1", b"");
        write(
            "etc/ld.so.cache",
            b"glibc-ld.so.cache1.1\x02\xff\0libcuda.so.1\0/opt/odd/libcuda.so.1\0",
        );
        assert_eq!(Driver::find_under(root.path(), &[]).library, Some(odd));
        let given = write("home/lib/libcuda.so.1", b"");
        let first = [given.parent().unwrap().to_path_buf()];
        assert_eq!(Driver::find_under(root.path(), &first).library, Some(given));
    }

    #[test]
    fn a_version_is_taken_from_its_own_line_only() {
        assert_eq!(version("GCC version:  gcc version 12.2.0\n"), None);
        assert_eq!(version("NVRM version: unknown\n"), None);
    }
}
