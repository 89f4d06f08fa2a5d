//! `laam doctor`: what this build can do on this machine.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Value, json};

use super::output::{print_json, stdout};
use super::{Outcome, backend};
use crate::backend::cpu::Cpu;
use crate::collective::launcher::LaunchPlace;
use crate::collective::mpi::{self, MpiFamily};
use crate::corpus::cache_folder;
use crate::device::driver::{Driver, Library, OLDEST_DRIVER};
use crate::error::hint_of;
use crate::escape::visible;
use crate::files;
use crate::kernels::{BUILD, CUDA_MODULES};
use crate::schema::versioned;
use crate::threads;

/// Say what was built, what this machine offers, and how to fix what is missing.
#[derive(Args, Debug)]
pub struct DoctorArgs {
    /// Print the result, or the error, as one JSON object on stdout
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

/// Bytes of /dev/shm below which exchanges were seen to fail.
const MIN_SHARED_MEMORY: u64 = 1 << 30;

struct Findings {
    threads: usize,
    features: Vec<&'static str>,
    driver: Driver,
    /// Names of the backends that this build and this machine offer.
    backends: Vec<&'static str>,
    /// Each GPU the driver shows, or why it cannot be used.
    gpus: Vec<Result<String, String>>,
    cublaslt: Library,
    /// NCCL: version and file, or why there is none.
    nccl: Result<(String, PathBuf), String>,
    /// For every two GPUs of the driver, in its order: true if the first reaches the memory of the second.
    peers: Vec<Vec<bool>>,
    /// MPI libraries, by their files.
    mpi: Vec<(PathBuf, String)>,
    /// Launcher of this process, or why it is unclear.
    launcher: Option<String>,
    /// Bytes of shared memory that processes of this host exchange through.
    shared_memory: Option<u64>,
    /// Variables that change how NCCL works.
    nccl_variables: Vec<String>,
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
            nccl: backend::nccl(),
            peers: backend::gpu_peers(),
            mpi: [MpiFamily::Mpich, MpiFamily::OpenMpi].into_iter().filter_map(mpi::find).collect(),
            launcher: launcher(),
            shared_memory: files::capacity(Path::new("/dev/shm")),
            nccl_variables: nccl_variables(),
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
        match driver.major() {
            None if driver.library.is_some() => {} // As under WSL: the driver is the host's.
            None => add(
                "no NVIDIA driver".into(),
                "with an NVIDIA GPU, install its driver (525 or newer); without one, train on the CPU",
            ),
            Some(major) if major < OLDEST_DRIVER => add(
                format!("driver {major} is too old: the kernels need {OLDEST_DRIVER}"),
                "update the driver",
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
                "no cuBLASLt (libcublasLt.so.13 or .12): matmuls are slower without it".into(),
                "name the place in VIRTUAL_ENV (pip install nvidia-cublas), CUDA_HOME or LAAM_CUBLASLT",
            );
        }
        if let (Err(why), true) = (&self.nccl, self.gpus.len() > 1) {
            add(
                format!("no NCCL, to train on several GPUs: {why}"),
                "pip install nvidia-nccl-cu13 in a virtual environment and activate it, or name the library in \
                 LAAM_NCCL",
            );
        }
        for gpu in self.gpus.iter().filter_map(|gpu| gpu.as_ref().err()) {
            add(format!("a GPU that cannot be used: {gpu}"), "use --backend cpu until then");
        }
        if self.mpi.is_empty() {
            add(
                "no MPI library, to train on several processes".into(),
                "run scripts/setup-mpi, or pip install mpich; then mpiexec -n 2 laam train ...",
            );
        }
        if self.shared_memory.is_some_and(|bytes| bytes < MIN_SHARED_MEMORY) {
            add(
                "/dev/shm is small: processes of this host may fail to exchange through it".into(),
                "mount it larger; in a container, docker run --shm-size=1g",
            );
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
                if let Some(path) = nvcc.path {
                    writeln!(
                        out,
                        "          by nvcc {version} for {archs} and PTX for compute_80"
                    )?;
                    writeln!(out, "          {path}")?;
                } else {
                    writeln!(out, "          shipped PTX of nvcc {version} for compute_80")?;
                }
            }
            Err(why) => writeln!(out, "  kernels none: {why}")?,
        }
        writeln!(out, "  runs on {}", self.backends.join(", "))?;
        writeln!(out, "this machine")?;
        let (threads, online) = (self.threads, threads::online());
        let of = if threads < online { format!(" of {online}") } else { String::new() };
        writeln!(out, "  cpu     {threads}{of} threads, {}", self.features.join(", "))?;
        for (precision, kernels) in cpu_kernels() {
            writeln!(out, "          --precision {precision}: {kernels}")?;
        }
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
        let nccl = self.nccl.as_ref().ok();
        let nccl = nccl.map(|(version, path)| format!("{version} ({})", path.display()));
        writeln!(out, "  nccl    {}", or_none(nccl))?;
        for (gpu, reaches) in self.peers.iter().enumerate().filter(|_| self.peers.len() > 1) {
            let reached = reaches.iter().enumerate().filter(|(_, reaches)| **reaches);
            let reached: Vec<String> = reached.map(|(other, _)| other.to_string()).collect();
            let reached = (!reached.is_empty()).then(|| reached.join(", "));
            writeln!(out, "  GPU {gpu} reaches the memory of {}", or_none(reached))?;
        }
        let mpi = self.mpi.iter().map(|(path, version)| format!("{version} ({})", path.display()));
        writeln!(out, "  mpi     {}", or_none(mpi.reduce(|all, one| format!("{all}, {one}"))))?;
        writeln!(out, "  started by {}", self.launcher.as_deref().unwrap_or("no launcher"))?;
        let megabytes = self.shared_memory.map(|bytes| format!("{} MB", bytes / 1_000_000));
        writeln!(out, "  /dev/shm {}", or_none(megabytes))?;
        for variable in &self.nccl_variables {
            writeln!(out, "  set     {variable}")?;
        }
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
            "nvcc": nvcc.and_then(|nvcc| nvcc.path),
            "nvcc_version": nvcc.map(|nvcc| nvcc.version),
            "shipped_ptx": nvcc.is_some_and(|nvcc| nvcc.path.is_none()),
            "archs": nvcc.map(|nvcc| nvcc.archs),
            "no_kernels_because": BUILD.cuda.err(),
            "threads": self.threads,
            "cpu_features": self.features,
            "cpu_kernels": cpu_kernels().into_iter().collect::<BTreeMap<_, _>>(),
            "driver": self.driver.version,
            "libcuda": self.driver.library,
            "gpus": self.driver.gpus,
            "usable_gpus": self.gpus.iter().flatten().collect::<Vec<_>>(),
            "cublaslt": self.cublaslt != Library::Missing,
            "cublaslt_path": match &self.cublaslt {
                Library::Missing => None,
                Library::Loaded(path) => Some(path),
            },
            "nccl": self.nccl.as_ref().ok()
                .map(|(version, path)| json!({ "version": version, "path": path })),
            "no_nccl_because": self.nccl.as_ref().err(),
            "gpu_peers": self.peers,
            "processors": threads::online(),
            "mpi": self.mpi.iter()
                .map(|(path, version)| json!({ "version": version, "path": path }))
                .collect::<Vec<_>>(),
            "launcher": self.launcher,
            "shared_memory": self.shared_memory,
            "nccl_variables": self.nccl_variables,
            "cache": self.cache,
            "missing": self.advice.iter()
                .map(|advice| json!({ "what": advice.missing, "hint": advice.hint }))
                .collect::<Vec<_>>(),
        })
    }
}

/// Description of a GPU, or why it cannot be used.
fn gpu(ordinal: usize) -> Result<String, String> {
    let describe = || {
        let device = backend::open_cuda(ordinal, backend::MatmulAlgorithms::First)?;
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

/// Launcher of this process.
fn launcher() -> Option<String> {
    match LaunchPlace::detect() {
        Ok(placement) => placement.map(|placement| placement.describe()),
        Err(why) => Some(format!("{why:#}")),
    }
}

fn nccl_variables() -> Vec<String> {
    let all = std::env::vars_os().filter_map(|(name, value)| {
        Some((name.into_string().ok()?, value.to_string_lossy().into_owned()))
    });
    let mut found: Vec<String> = all
        .filter(|(name, _)| name.starts_with("NCCL_"))
        .map(|(name, value)| visible(&format!("{name}={value}")).to_string())
        .collect();
    found.sort();
    found
}

fn names() -> Vec<&'static str> {
    CUDA_MODULES.iter().map(|kernel| kernel.name).collect()
}

/// True if the folder, or the nearest one above it that exists, may be written to.
fn is_writable(folder: &Path) -> bool {
    let there = folder.ancestors().find_map(|folder| fs::metadata(folder).ok());
    there.is_some_and(|there| there.is_dir() && !there.permissions().readonly())
}

/// What runs on the processor, by precision.
fn cpu_kernels() -> [(&'static str, String); 2] {
    [("float32", Cpu::f32(1)), ("bfloat16", Cpu::bf16(1))].map(|(name, cpu)| (name, cpu.path()))
}

/// The instruction sets that matter to the matmuls, as far as this processor has them.
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
