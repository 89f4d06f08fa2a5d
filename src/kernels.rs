//! CUDA modules compiled from `kernels/*.cu` by `build.rs`, and the record of that build.

use std::collections::HashMap;
use std::sync::OnceLock;

/// One compiled kernel file.
#[derive(Clone, Copy, Debug)]
pub struct CudaModule {
    /// File stem: `rms_norm` for `kernels/rms_norm.cu`.
    pub name: &'static str,
    /// SASS for the architectures of the build and PTX for all others: what the driver loads.
    pub fatbin: &'static [u8],
    /// PTX for compute capability 8.0 with line info: what the simulator runs.
    pub ptx: &'static str,
}

impl CudaModule {
    /// Entry names, in PTX order.
    pub fn entries(&self) -> impl Iterator<Item = &'static str> {
        self.ptx.lines().filter_map(|line| {
            let rest = line.trim_start().strip_prefix(".visible .entry ")?;
            Some(rest.split('(').next().unwrap_or(rest).trim())
        })
    }
}

/// A `__global__` function.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Module that defines it.
    pub module: &'static CudaModule,
    /// Size of each parameter in bytes, in order.
    pub parameters: Vec<usize>,
}

impl Entry {
    /// Parameter sizes of the entry `name` in bytes, parsed from its PTX declaration:
    /// `.param .u64 .ptr .align 1 name_param_0,`
    fn parameters(ptx: &str, name: &str) -> Vec<usize> {
        let declaration = ptx.split_once(&format!(".entry {name}(")).map_or("", |(_, rest)| rest);
        let declaration = declaration.split_once(')').map_or("", |(list, _)| list);
        let size = |line: &str| {
            let mut words = line.split_whitespace().skip(1);
            let bits = |word: &str| word.trim_start_matches(|c: char| !c.is_ascii_digit()).parse();
            let bytes: usize = words.find_map(|word| match word {
                ".align" => None,
                word if word.starts_with('.') => bits(word).ok(),
                _ => None,
            })?;
            // A struct is a byte array: `.param .align 8 .b8 name_param_0[24]`.
            let count = line.split_once('[').and_then(|(_, n)| n.split(']').next()?.parse().ok());
            Some(bytes / 8 * count.unwrap_or(1usize))
        };
        declaration.split(',').filter_map(size).collect()
    }
}

/// Entry by name, from any module.
pub fn entry(name: &str) -> Option<&'static Entry> {
    static ENTRIES: OnceLock<HashMap<&'static str, Entry>> = OnceLock::new();
    let all = ENTRIES.get_or_init(|| {
        let entries = CUDA_MODULES.iter().flat_map(|module| {
            module.entries().map(move |name| {
                (name, Entry { module, parameters: Entry::parameters(module.ptx, name) })
            })
        });
        entries.collect()
    });
    all.get(name)
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
    /// CUDA compiler, or the reason there was none.
    pub cuda: Result<Nvcc, &'static str>,
}

/// CUDA compiler of a build.
#[derive(Clone, Copy, Debug)]
pub struct Nvcc {
    /// Path on the build machine.
    pub path: &'static str,
    /// `13.0.88`
    pub version: &'static str,
    /// Architectures with SASS: `80`, `90a`.
    pub archs: &'static [&'static str],
}

impl Nvcc {
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

    /// Whether an entry matches a declared name. In a macro's `flash_attention_##D##_##T` a word in
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
    fn parameter_sizes_match_the_simulator() {
        for module in CUDA_MODULES {
            let simulated = ptxsim::Module::from_ptx(module.ptx).unwrap();
            for simulated in simulated.kernels() {
                let sizes: Vec<usize> =
                    simulated.params().iter().map(|parameter| parameter.size).collect();
                assert_eq!(
                    entry(simulated.name()).unwrap().parameters,
                    sizes,
                    "{}",
                    simulated.name()
                );
            }
        }
        let ptx =
            ".visible .entry k(\n\t.param .align 8 .b8 k_param_0[24],\n\t.param .f32 k_param_1\n)";
        assert_eq!(Entry::parameters(ptx, "k"), [24, 4]);
    }

    #[test]
    fn every_kernel_file_is_compiled_with_all_its_entries() {
        let Ok(nvcc) = BUILD.cuda else {
            assert!(CUDA_MODULES.is_empty());
            eprintln!("SKIPPED: kernel entries, because {}", BUILD.cuda.unwrap_err());
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
            let module = module(name).unwrap_or_else(|| panic!("{name} was not compiled"));
            let source = fs::read_to_string(&path).unwrap();
            let entries: BTreeSet<_> = module.entries().collect();
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
            assert!(module.ptx.contains(".target sm_80"), "{name}");
            assert!(module.ptx.contains("\t.loc\t"), "{name} has no line info");
            // The first word of what `cuModuleLoadData` takes for a fatbin.
            assert_eq!(module.fatbin[..4], 0xBA55_ED50_u32.to_le_bytes(), "{name}");
        }
        assert_eq!(files, CUDA_MODULES.len());
    }
}
