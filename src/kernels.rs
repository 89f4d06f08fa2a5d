//! The kernels of `kernels/`, as `build.rs` compiled them, and the record of that build.

/// One file of kernels.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    /// Of the file: `rms_norm` for `kernels/rms_norm.cu`.
    pub name: &'static str,
    /// Machine code for several cards, and PTX for the others: what the driver loads.
    pub fatbin: &'static [u8],
    /// PTX for compute capability 8.0 with source lines: what the simulator runs.
    pub ptx: &'static str,
}

impl Kernel {
    /// The names of its entries, in the order of the PTX.
    pub fn entries(&self) -> impl Iterator<Item = &'static str> {
        self.ptx.lines().filter_map(|line| {
            let rest = line.trim_start().strip_prefix(".visible .entry ")?;
            Some(rest.split('(').next().unwrap_or(rest).trim())
        })
    }
}

/// What the program was built from, and for what.
#[derive(Clone, Copy, Debug)]
pub struct Build {
    /// Rust's name of the machine, `x86_64-unknown-linux-gnu` say.
    pub target: &'static str,
    /// `debug` or `release`.
    pub profile: &'static str,
    /// `rustc 1.95.0 (...)`
    pub rustc: &'static str,
    /// The compiler of the kernels, or why there was none.
    pub cuda: Result<Nvcc, &'static str>,
}

/// The compiler of the kernels.
#[derive(Clone, Copy, Debug)]
pub struct Nvcc {
    /// Where it was on the machine of the build.
    pub path: &'static str,
    /// `13.0.88`
    pub version: &'static str,
    /// What there is machine code for: `80`, `90a`.
    pub archs: &'static [&'static str],
}

impl Nvcc {
    /// The first number of the version.
    pub fn major(&self) -> u32 {
        self.version.split('.').next().and_then(|major| major.parse().ok()).unwrap_or(0)
    }
}

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// The kernel file of a name.
pub fn kernel(name: &str) -> Option<&'static Kernel> {
    KERNELS.iter().find(|kernel| kernel.name == name)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::Path;

    use super::*;

    /// The names behind each `__global__` of a CUDA source.
    fn declared(source: &str) -> BTreeSet<&str> {
        let code = source.lines().map(|line| line.split("//").next().unwrap_or_default());
        let starts: usize = code.map(|line| line.matches("__global__").count()).sum();
        let names: BTreeSet<_> = source
            .split("__global__")
            .skip(1)
            .filter_map(|rest| {
                let rest = rest.trim_start().strip_prefix("void")?.trim_start();
                let rest = match rest.strip_prefix("__launch_bounds__(") {
                    Some(bounds) => bounds.split_once(')')?.1,
                    None => rest,
                };
                Some(rest.split_once('(')?.0.trim())
            })
            .collect();
        assert_eq!(names.len(), starts, "an entry this test cannot read");
        names
    }

    #[test]
    fn every_kernel_file_is_there_with_all_its_entries() {
        let Ok(nvcc) = BUILD.cuda else {
            assert!(KERNELS.is_empty());
            eprintln!("SKIPPED: the kernels' entries, because {}", BUILD.cuda.unwrap_err());
            return;
        };
        assert!(nvcc.major() >= 12 && !nvcc.archs.is_empty());
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
        let mut files = 0;
        for path in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            if path.extension().is_none_or(|extension| extension != "cu") {
                continue;
            }
            files += 1;
            let name = path.file_stem().unwrap().to_str().unwrap();
            let kernel = kernel(name).unwrap_or_else(|| panic!("{name} was not compiled"));
            let source = fs::read_to_string(&path).unwrap();
            let entries: BTreeSet<_> = kernel.entries().collect();
            assert_eq!(entries, declared(&source), "{name}");
            assert!(kernel.ptx.contains(".target sm_80"), "{name}");
            assert!(kernel.ptx.contains("\t.loc\t"), "{name} has no source lines");
            // The first word of what `cuModuleLoadData` takes for a fatbin.
            assert_eq!(kernel.fatbin[..4], 0xBA55_ED50_u32.to_le_bytes(), "{name}");
        }
        assert_eq!(files, KERNELS.len());
    }
}
