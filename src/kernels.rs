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
