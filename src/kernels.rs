//! The kernels of `kernels/`, as `build.rs` compiled them, and the record of that build.

use std::collections::HashMap;
use std::sync::OnceLock;

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

/// A function that can be launched.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The file it stands in.
    pub kernel: &'static Kernel,
    /// Bytes of each parameter, in order.
    pub parameters: Vec<usize>,
}

impl Entry {
    /// Bytes of each parameter of the entry `name`, read from its declaration in PTX:
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
            // A struct is so many bytes: `.param .align 8 .b8 name_param_0[24]`.
            let count = line.split_once('[').and_then(|(_, n)| n.split(']').next()?.parse().ok());
            Some(bytes / 8 * count.unwrap_or(1usize))
        };
        declaration.split(',').filter_map(size).collect()
    }
}

/// The entry of a name, in whichever file it stands.
pub fn entry(name: &str) -> Option<&'static Entry> {
    static ENTRIES: OnceLock<HashMap<&'static str, Entry>> = OnceLock::new();
    let all = ENTRIES.get_or_init(|| {
        let entries = KERNELS.iter().flat_map(|kernel| {
            kernel.entries().map(move |name| {
                (name, Entry { kernel, parameters: Entry::parameters(kernel.ptx, name) })
            })
        });
        entries.collect()
    });
    all.get(name)
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

    /// Whether an entry has a declared name. In one that a macro declares, `attention_##D##_##T`, a
    /// word in capitals stands for any.
    fn fits(entry: &str, name: &str) -> bool {
        let name = name.replace("##", "");
        let (entry, name): (Vec<_>, Vec<_>) =
            (entry.split('_').collect(), name.split('_').collect());
        let any = |word: &str| word.bytes().all(|byte| byte.is_ascii_uppercase());
        entry.len() == name.len() && entry.iter().zip(name).all(|(&e, n)| e == n || any(n))
    }

    /// The names behind each `__global__` of a CUDA source.
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
        assert_eq!(names.len(), starts, "an entry this test cannot read");
        names
    }

    #[test]
    fn parameters_are_read_as_the_simulator_reads_them() {
        for kernel in KERNELS {
            let module = ptxsim::Module::from_ptx(kernel.ptx).unwrap();
            for simulated in module.kernels() {
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
            let declared = declared(&source);
            for of in &declared {
                assert!(entries.iter().any(|entry| fits(entry, of)), "{name}: {of} is missing");
            }
            for entry in entries {
                assert!(declared.iter().any(|of| fits(entry, of)), "{name}: {entry} is new");
            }
            assert!(kernel.ptx.contains(".target sm_80"), "{name}");
            assert!(kernel.ptx.contains("\t.loc\t"), "{name} has no source lines");
            // The first word of what `cuModuleLoadData` takes for a fatbin.
            assert_eq!(kernel.fatbin[..4], 0xBA55_ED50_u32.to_le_bytes(), "{name}");
        }
        assert_eq!(files, KERNELS.len());
    }
}
