//! `laam doctor`: what this build can do on this machine.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Value, json};

use super::output::{print_json, stdout};
use super::{Outcome, backend};
use crate::corpus::cache_folder;
use crate::device::driver::{Driver, Library, oldest_driver};
use crate::error::hint_of;
use crate::files;
use crate::kernels::{BUILD, CUDA_MODULES};
use crate::schema::versioned;
use crate::threads;

/// Say what was built, what this machine offers, and how to fix what is missing.
#[derive(Args, Debug)]
pub struct DoctorArgs {
    /// Print one JSON object on stdout, of an error too
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: &DoctorArgs) -> anyhow::Result<Outcome> {
    let findings = Findings::gather();
    if arguments.json {
        print_json(&versioned(findings.as_json()));
    } else {
        findings.print(&mut stdout())?;
    }
    Ok(Outcome::Done)
}

struct Findings {
    threads: usize,
    features: Vec<&'static str>,
    driver: Driver,
    /// Names of the backends that this build and this machine offer.
    backends: Vec<&'static str>,
    /// Each GPU the driver shows, or why it cannot be used.
    gpus: Vec<Result<String, String>>,
    cublaslt: Library,
    cache: Option<PathBuf>,
    advice: Vec<MissingPart>,
}

/// Something missing, and what to do about it.
struct MissingPart {
    missing: String,
    hint: String,
}

impl Findings {
    fn gather() -> Findings {
        let mut findings = Findings {
            threads: threads::available(),
            features: cpu_features(),
            driver: Driver::find(),
            backends: vec!["cpu", "reference"],
            gpus: (0..backend::gpu_count()).map(gpu).collect(),
            cublaslt: backend::cublaslt(),
            cache: cache_folder().ok(),
            advice: Vec::new(),
        };
        if BUILD.cuda.is_ok() && cfg!(feature = "sim") {
            findings.backends.push("sim");
        }
        if findings.gpus.iter().any(Result::is_ok) {
            findings.backends.push("cuda");
        }
        findings.advise();
        findings
    }

    fn advise(&mut self) {
        let mut add = |missing: String, hint: &str| {
            self.advice.push(MissingPart { missing, hint: hint.into() });
        };
        for (feature, built) in [
            ("cuda", cfg!(feature = "cuda")),
            ("fetch", cfg!(feature = "fetch")),
            ("sim", cfg!(feature = "sim")),
        ] {
            if !built {
                let hint = format!("cargo build --release --features {feature}");
                add(format!("built without the feature {feature}"), &hint);
            }
        }
        if let Err(why) = BUILD.cuda {
            add(format!("no CUDA kernels: {why}"), "run scripts/setup-cuda, then build again");
        }
        if cfg!(debug_assertions) {
            add("a debug build: several times slower".into(), "cargo build --release");
        }
        let driver = &self.driver;
        let wanted = BUILD.cuda.map_or(0, |nvcc| oldest_driver(nvcc.major()));
        match driver.major() {
            None if driver.library.is_some() => {} // As under WSL: the driver is the host's.
            None => add(
                "no NVIDIA driver".into(),
                "with an NVIDIA GPU, install its driver (580 or newer); without one, train on the CPU",
            ),
            Some(major) if major < wanted => add(
                format!("driver {major} is too old for these kernels, which need {wanted}"),
                "update the driver, or build with an older CUDA by setting NVCC",
            ),
            Some(_) if driver.library.is_none() => add(
                "a driver, but no libcuda.so.1".into(),
                "install the driver's libraries; in a container, start it with the GPU passed in",
            ),
            Some(_) if driver.gpus == 0 => add(
                "a driver, but no GPU under /dev".into(),
                "in a container, start it with the GPU passed in",
            ),
            Some(_) => {}
        }
        if self.cublaslt == Library::Missing
            && (driver.library.is_some() || driver.version.is_some())
        {
            add(
                "no cuBLASLt (libcublasLt.so.13 or .12), which the GPU's products need".into(),
                "name the place in VIRTUAL_ENV (pip install nvidia-cublas), CUDA_HOME or LAAM_CUBLASLT",
            );
        }
        for gpu in self.gpus.iter().filter_map(|gpu| gpu.as_ref().err()) {
            add(format!("a GPU that cannot be used: {gpu}"), "use --backend cpu until then");
        }
        let writable = self.cache.as_deref().is_some_and(is_writable);
        if !writable {
            add("no place to keep downloads".into(), "set LAAM_CACHE to a folder you may write to");
        }
    }

    fn print(&self, out: &mut impl Write) -> io::Result<()> {
        let or_none = |text: Option<String>| text.unwrap_or_else(|| "none".into());
        writeln!(out, "laam {}", crate::VERSION)?;
        writeln!(out, "  built   {} for {}, {}", BUILD.profile, BUILD.target, BUILD.rustc)?;
        match BUILD.cuda {
            Ok(nvcc) => {
                let archs: Vec<_> = nvcc.archs.iter().map(|arch| format!("sm_{arch}")).collect();
                let (version, archs) = (nvcc.version, archs.join(", "));
                writeln!(out, "  kernels {}", names().join(", "))?;
                writeln!(out, "          by nvcc {version} for {archs} and PTX for compute_80")?;
                writeln!(out, "          {}", nvcc.path)?;
            }
            Err(why) => writeln!(out, "  kernels none: {why}")?,
        }
        writeln!(out, "  runs on {}", self.backends.join(", "))?;
        writeln!(out, "this machine")?;
        writeln!(out, "  cpu     {} threads, {}", self.threads, self.features.join(", "))?;
        writeln!(out, "  driver  {}", or_none(self.driver.version.clone()))?;
        let library = self.driver.library.as_ref().map(|path| path.display().to_string());
        writeln!(out, "  libcuda {}", or_none(library))?;
        writeln!(out, "  GPUs    {}", self.driver.gpus)?;
        for gpu in self.gpus.iter().flatten() {
            writeln!(out, "          {gpu}")?;
        }
        let cublaslt = match &self.cublaslt {
            Library::Missing => "none".to_string(),
            Library::Loaded(path) => path.display().to_string(),
        };
        writeln!(out, "  cublas  {cublaslt}")?;
        let cache = self.cache.as_ref().map(|path| path.display().to_string());
        writeln!(out, "  cache   {}", or_none(cache))?;
        for MissingPart { missing, hint } in &self.advice {
            writeln!(out, "missing: {missing}")?;
            writeln!(out, "   hint: {hint}")?;
        }
        Ok(())
    }

    fn as_json(&self) -> Value {
        let nvcc = BUILD.cuda.ok();
        json!({
            "version": crate::VERSION,
            "target": BUILD.target,
            "profile": BUILD.profile,
            "rustc": BUILD.rustc,
            "backends": self.backends,
            "kernels": names(),
            "nvcc": nvcc.map(|nvcc| nvcc.path),
            "nvcc_version": nvcc.map(|nvcc| nvcc.version),
            "archs": nvcc.map(|nvcc| nvcc.archs),
            "no_kernels_because": BUILD.cuda.err(),
            "threads": self.threads,
            "cpu_features": self.features,
            "driver": self.driver.version,
            "libcuda": self.driver.library,
            "gpus": self.driver.gpus,
            "usable_gpus": self.gpus.iter().flatten().collect::<Vec<_>>(),
            "cublaslt": self.cublaslt != Library::Missing,
            "cublaslt_path": match &self.cublaslt {
                Library::Missing => None,
                Library::Loaded(path) => Some(path),
            },
            "cache": self.cache,
            "missing": self.advice.iter()
                .map(|advice| json!({ "what": advice.missing, "hint": advice.hint }))
                .collect::<Vec<_>>(),
        })
    }
}

/// What a GPU is, or why it cannot be used.
fn gpu(ordinal: usize) -> Result<String, String> {
    let describe = || {
        let device = backend::open_cuda(ordinal)?;
        let (free, total) = device.memory()?;
        let giga = |bytes: u64| bytes as f64 / 1e9;
        anyhow::Ok(format!(
            "{}, {:.1} of {:.1} GB free",
            device.describe(),
            giga(free),
            giga(total)
        ))
    };
    describe().map_err(|why| match hint_of(&why) {
        Some(hint) => format!("{why:#} ({hint})"),
        None => format!("{why:#}"),
    })
}

fn names() -> Vec<&'static str> {
    CUDA_MODULES.iter().map(|kernel| kernel.name).collect()
}

/// Whether the folder, or the nearest one above it that exists, may be written to.
fn is_writable(folder: &Path) -> bool {
    let there = folder.ancestors().find_map(|folder| fs::metadata(folder).ok());
    there.is_some_and(|there| there.is_dir() && !there.permissions().readonly())
}

/// The instruction sets that matter to the products, as far as this processor has them.
fn cpu_features() -> Vec<&'static str> {
    let mut found = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        let has = [
            ("AVX2", is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")),
            ("AVX-512", is_x86_feature_detected!("avx512f")),
            ("AVX-512 BF16", is_x86_feature_detected!("avx512bf16")),
        ];
        found.extend(has.into_iter().filter_map(|(name, has)| has.then_some(name)));
        // The compiler has no stable way to ask for AMX; the system says it too.
        let flags = files::read_text(Path::new("/proc/cpuinfo"), 64 << 20).unwrap_or_default();
        if flags.split_whitespace().any(|flag| flag == "amx_bf16") {
            found.push("AMX BF16");
        }
    }
    #[cfg(target_arch = "aarch64")]
    found.push("NEON");
    if found.is_empty() {
        found.push("no vector instructions known to this program");
    }
    found
}
