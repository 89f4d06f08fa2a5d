//! CUDA modules of `kernels/*.cu`, compiled by `build.rs` or shipped as PTX, and the record of the build.

pub mod prebuilt;
pub mod signature;

use std::io::Read;
use std::sync::OnceLock;

use crate::dtype::Dtype;
use crate::error;

/// One compiled kernel file.
#[derive(Debug)]
pub struct CudaModule {
    /// File stem: `rms_norm` for `kernels/rms_norm.cu`.
    pub name: &'static str,
    /// SASS for the architectures of the build; empty in a build without nvcc.
    pub fatbin: &'static [u8],
    text: PtxText,
}

/// PTX as the program contains it.
#[derive(Debug)]
enum PtxText {
    Plain(&'static str),
    /// In xz, and the text once it was asked for.
    Packed(&'static [u8], OnceLock<String>),
}

/// ISA version of [`portable`] PTX: the first that knows compute capability 8.0. Every driver for CUDA
/// 11.0 or newer compiles it.
pub const PORTABLE_ISA: &str = "7.0";

/// PTX without comments and line tables, at version [`PORTABLE_ISA`].
pub fn portable(ptx: &str) -> String {
    let code = ptx.split("\n\t.section\t.debug_").next().unwrap_or(ptx);
    let mut text = String::with_capacity(code.len());
    for line in code.lines() {
        let start = line.trim_start();
        if start.is_empty() || ["//", ".loc\t", ".file\t"].iter().any(|cut| start.starts_with(cut))
        {
            continue;
        }
        if start.starts_with(".version ") {
            text.push_str(".version ");
            text.push_str(PORTABLE_ISA);
        } else {
            text.push_str(line);
        }
        text.push('\n');
    }
    text
}

/// Limits on the bytes of a shipped PTX and on the memory that unpacking it takes.
const MAX_PTX_BYTES: u64 = 64 << 20;

/// Unpacks a shipped PTX.
pub fn unpack(packed: &[u8]) -> std::io::Result<String> {
    let mut text = String::new();
    let reader = lzma_rust2::XzReader::new_mem_limit(packed, false, (MAX_PTX_BYTES >> 10) as u32);
    reader.take(MAX_PTX_BYTES).read_to_string(&mut text)?;
    Ok(text)
}

// Each build uses one of the two.
#[allow(dead_code)]
impl CudaModule {
    const fn compiled(name: &'static str, fatbin: &'static [u8], ptx: &'static str) -> CudaModule {
        CudaModule { name, fatbin, text: PtxText::Plain(ptx) }
    }

    const fn shipped(name: &'static str, packed: &'static [u8]) -> CudaModule {
        CudaModule { name, fatbin: &[], text: PtxText::Packed(packed, OnceLock::new()) }
    }
}

impl CudaModule {
    /// PTX for compute capability 8.0: what the simulator runs, and what a driver compiles for a GPU that
    /// the fatbin has no SASS for. nvcc's own has line tables, the shipped one is [`portable`].
    pub fn ptx(&'static self) -> &'static str {
        match &self.text {
            PtxText::Plain(text) => text,
            PtxText::Packed(packed, text) => {
                text.get_or_init(|| unpack(packed).expect("a test unpacks every shipped PTX"))
            }
        }
    }
}

/// A `__global__` function, parsed from the PTX by `build.rs`.
#[derive(Debug)]
struct Entry {
    name: &'static str,
    /// Index of its file.
    module: usize,
    parameters: &'static [usize],
    max_threads: usize,
}

/// A kernel, by its place in the table of all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Kernel(u16);

impl Kernel {
    /// All kernels, in the order of the files.
    pub fn all() -> impl Iterator<Item = Kernel> {
        (0..ENTRIES.len() as u16).map(Kernel)
    }

    fn entry(self) -> &'static Entry {
        &ENTRIES[usize::from(self.0)]
    }

    /// Name of the `__global__` function: `rms_norm_bf16`.
    pub fn name(self) -> &'static str {
        self.entry().name
    }

    /// Size of each parameter in bytes, in order.
    pub fn parameters(self) -> &'static [usize] {
        self.entry().parameters
    }

    /// Most threads per block.
    pub fn max_threads(self) -> usize {
        self.entry().max_threads
    }

    /// The file that defines it; an error in a build without kernels.
    pub fn module(self) -> anyhow::Result<&'static CudaModule> {
        match BUILD.cuda {
            Ok(_) => Ok(&CUDA_MODULES[self.entry().module]),
            Err(why) => Err(error::device(
                format!("this build has no CUDA kernels: {why}"),
                "run scripts/setup-cuda, then build again",
            )),
        }
    }
}

/// Kernels that differ in a dtype and in numbers: `flash_attention` for a head_dim of 64 and bf16.
#[derive(Debug)]
pub struct Family {
    name: &'static str,
    instances: &'static [Instance],
}

#[derive(Debug)]
struct Instance {
    numbers: &'static [usize],
    dtype: Option<Dtype>,
    kernel: Kernel,
}

impl Family {
    /// The instance for a dtype, without numbers.
    pub fn of(&self, dtype: Dtype) -> anyhow::Result<Kernel> {
        self.sized(&[], dtype)
    }

    /// The instance for numbers and a dtype.
    pub fn sized(&self, numbers: &[usize], dtype: Dtype) -> anyhow::Result<Kernel> {
        let mut instances = self.instances.iter();
        let found = instances.find(|at| at.numbers == numbers && at.dtype == Some(dtype));
        found.map(|instance| instance.kernel).ok_or_else(|| {
            error::internal(format!("{} has no kernel for {numbers:?} and {dtype:?}", self.name))
        })
    }
}

/// Toolchain and target of this build.
#[derive(Clone, Copy, Debug)]
pub struct Build {
    /// Rust target triple.
    pub target: &'static str,
    /// `debug` or `release`.
    pub profile: &'static str,
    /// `rustc 1.95.0 (...)`
    pub rustc: &'static str,
    /// The compiler of the kernels, or the reason there are none.
    pub cuda: Result<Nvcc, &'static str>,
}

/// CUDA compiler of the kernels.
#[derive(Clone, Copy, Debug)]
pub struct Nvcc {
    /// Path on the build machine; `None` if the build took the shipped PTX.
    pub path: Option<&'static str>,
    /// `13.0.88`
    pub version: &'static str,
    /// Architectures with SASS: `80`, `90a`; none in the shipped PTX.
    pub archs: &'static [&'static str],
}

impl Nvcc {
    /// True if there is SASS for this compute capability: of the same major version and a minor version
    /// that is not newer (PTX ISA, `.target`); `90a` is for 9.0 alone.
    pub fn has_sass(&self, (major, minor): (i32, i32)) -> bool {
        self.archs.iter().any(|arch| {
            let number = arch.trim_end_matches(['a', 'f']);
            let Ok(number) = number.parse::<i32>() else { return false };
            let (of, up_to) = (number / 10, number % 10);
            of == major && if arch.ends_with('a') { up_to == minor } else { up_to <= minor }
        })
    }

    /// Major version.
    pub fn major(&self) -> u32 {
        self.version.split('.').next().and_then(|major| major.parse().ok()).unwrap_or(0)
    }
}

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// Module by file stem.
pub fn module(name: &str) -> Option<&'static CudaModule> {
    CUDA_MODULES.iter().find(|module| module.name == name)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::Path;

    use super::*;

    /// True if an entry matches a declared name. In a macro's `flash_attention_##D##_##T` a word in
    /// capitals matches any word.
    fn fits(entry: &str, name: &str) -> bool {
        let name = name.replace("##", "");
        let (entry, name): (Vec<_>, Vec<_>) =
            (entry.split('_').collect(), name.split('_').collect());
        let any = |word: &str| word.bytes().all(|byte| byte.is_ascii_uppercase());
        entry.len() == name.len() && entry.iter().zip(name).all(|(&e, n)| e == n || any(n))
    }

    /// Names after each `__global__` of a CUDA source.
    fn declared(source: &str) -> BTreeSet<&str> {
        let code = source.lines().map(|line| line.split("//").next().unwrap_or_default());
        let starts: usize = code.map(|line| line.matches("__global__").count()).sum();
        let names: BTreeSet<_> = source
            .split("__global__")
            .skip(1)
            .filter_map(|rest| {
                let rest = rest.trim_start().strip_prefix("void")?;
                // In a macro, lines end with a backslash.
                let rest = rest.trim_start_matches(['\\', '\n', ' ']);
                let name = match rest.strip_prefix("__launch_bounds__(") {
                    Some(bounds) => {
                        let mut depth = 1;
                        let end = bounds.find(|c| {
                            depth += i32::from(c == '(') - i32::from(c == ')');
                            depth == 0
                        });
                        &bounds[end? + 1..]
                    }
                    None => rest,
                };
                Some(name.split_once('(')?.0.trim_matches(['\\', '\n', ' ']))
            })
            .collect();
        assert_eq!(names.len(), starts, "an entry this test cannot parse");
        names
    }

    #[cfg(feature = "sim")]
    #[test]
    fn the_table_has_the_kernels_that_the_simulator_reads() {
        let mut table = Kernel::all();
        for module in CUDA_MODULES {
            let simulated = ptx_race::Module::from_ptx(module.ptx()).unwrap();
            for simulated in simulated.kernels() {
                let sizes: Vec<usize> =
                    simulated.params().iter().map(|parameter| parameter.size).collect();
                let kernel = table.next().unwrap();
                assert_eq!(kernel.name(), simulated.name());
                assert_eq!(kernel.parameters(), sizes, "{}", kernel.name());
                assert_eq!(kernel.module().unwrap().name, module.name);
            }
        }
        assert!(CUDA_MODULES.is_empty() || table.next().is_none());
    }

    #[test]
    fn instances_are_found_by_numbers_and_dtype() {
        let name = |kernel: anyhow::Result<Kernel>| kernel.unwrap().name();
        assert_eq!(name(families::RMS_NORM.of(Dtype::Bf16)), "rms_norm_bf16");
        assert_eq!(
            name(families::FLASH_ATTENTION.sized(&[64], Dtype::F16)),
            "flash_attention_64_f16"
        );
        assert_eq!(families::GRAD_NORM.name(), "grad_norm");
        assert_eq!(
            families::RMS_NORM.of(Dtype::F32).unwrap().max_threads(),
            geometry::BLOCK_THREADS
        );
        for (numbers, dtype) in [(&[65][..], Dtype::F16), (&[64], Dtype::F32), (&[], Dtype::F16)] {
            let said = families::FLASH_ATTENTION.sized(numbers, dtype).unwrap_err().to_string();
            assert!(said.contains("flash_attention has no kernel for"), "{said}");
        }
    }

    #[test]
    fn sass_runs_on_its_own_generation_only() {
        let nvcc = Nvcc { path: None, version: "13.0.88", archs: &["80", "90a", "120"] };
        for capability in [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0), (12, 1)] {
            assert!(nvcc.has_sass(capability), "{capability:?}");
        }
        for capability in [(7, 5), (10, 0), (10, 3), (11, 0)] {
            assert!(!nvcc.has_sass(capability), "{capability:?}");
        }
        assert!(!Nvcc { archs: &["90a"], ..nvcc }.has_sass((9, 1)));
        assert!(!Nvcc { archs: &["89"], ..nvcc }.has_sass((8, 6)));
        assert!(!Nvcc { archs: &[], ..nvcc }.has_sass((8, 0)));
    }

    #[test]
    fn every_kernel_file_is_compiled_with_all_its_entries() {
        let Ok(nvcc) = BUILD.cuda else {
            assert!(CUDA_MODULES.is_empty());
            eprintln!("SKIPPED: kernel entries, because {}", BUILD.cuda.unwrap_err());
            return;
        };
        assert!(nvcc.major() >= 12 && nvcc.archs.is_empty() == nvcc.path.is_none());
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
        let mut files = 0;
        for path in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            if path.extension().is_none_or(|extension| extension != "cu") {
                continue;
            }
            files += 1;
            let name = path.file_stem().unwrap().to_str().unwrap();
            let module = module(name).unwrap_or_else(|| panic!("{name} was not compiled"));
            let source = fs::read_to_string(&path).unwrap();
            let of_file = |kernel: &Kernel| kernel.module().is_ok_and(|at| at.name == module.name);
            let entries: BTreeSet<_> = Kernel::all().filter(of_file).map(Kernel::name).collect();
            let declared = declared(&source);
            for of in &declared {
                assert!(entries.iter().any(|entry| fits(entry, of)), "{name}: {of} is missing");
            }
            for entry in entries {
                assert!(
                    declared.iter().any(|of| fits(entry, of)),
                    "{name}: {entry} is not declared"
                );
            }
            assert!(module.ptx().contains(".target sm_80"), "{name}");
            // What ptxas may fuse would have other bits than in the simulator.
            for operation in ["add", "sub", "mul"] {
                for dtype in ["f32", "ftz.f32", "f64"] {
                    let unrounded = format!("\t{operation}.{dtype}");
                    assert!(!module.ptx().contains(&unrounded), "{name}: {unrounded}");
                }
            }
            if nvcc.path.is_none() {
                continue;
            }
            assert!(module.ptx().contains("\t.loc\t"), "{name} has no line info");
            // The first word of what `cuModuleLoadData` takes for a fatbin.
            assert_eq!(module.fatbin[..4], 0xBA55_ED50_u32.to_le_bytes(), "{name}");
        }
        assert_eq!(files, CUDA_MODULES.len());
    }
}
