//! The backend that executes: flags that every command which runs a model shares.

use std::path::PathBuf;
use std::sync::{Arc, Once, OnceLock};

use clap::{Args, ValueEnum};

use super::group;
use super::output::say;
use crate::backend::Backend;
use crate::backend::cpu::{Cpu, CpuKernels};
use crate::backend::gpu::{self, Gpu, Mode, Open, Options};
use crate::backend::reference::Reference;
use crate::bench::check::self_check;
#[cfg(feature = "cuda")]
use crate::corpus::cache_folder;
use crate::device::Device;
#[cfg(feature = "cuda")]
use crate::device::cuda::{self, Cuda};
use crate::device::driver::Library;
#[cfg(feature = "sim")]
use crate::device::sim::Sim;
use crate::dtype::Dtype;
use crate::error;
use crate::kernels::BUILD;
use crate::threads;

/// Where a model runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum BackendKind {
    /// An NVIDIA GPU if there is one and it computes what it should, else the processor
    #[default]
    Auto,
    /// The processor of this machine
    Cpu,
    /// Plain loops: slow, and simple enough to trust
    Reference,
    /// An NVIDIA GPU
    Cuda,
    /// The kernels of the GPU, in a simulator
    Sim,
}

#[derive(Args, Clone, Debug, Default)]
pub struct BackendArgs {
    /// Where the model runs
    #[arg(long, value_enum, default_value_t)]
    pub backend: BackendKind,
    /// Threads of the cpu and sim backends [default: all]
    #[arg(long)]
    pub threads: Option<usize>,
    /// Attention kernels of a GPU
    #[arg(long, alias = "attention", value_enum, default_value_t)]
    pub attention_kernel: AttentionKernelArg,
    /// LM head and loss kernels of a GPU
    #[arg(long, alias = "head", value_enum, default_value_t)]
    pub lm_head_kernel: LmHeadKernel,
    /// Matmuls of a GPU
    #[arg(long, value_enum, default_value_t)]
    pub matmul_kernel: MatmulKernel,
    /// Algorithms of cuBLASLt's matmuls
    #[arg(long, value_enum, default_value_t)]
    pub matmul_algorithms: MatmulAlgorithms,
    /// Kernels of the cpu backend
    #[arg(long, value_enum, default_value_t)]
    pub cpu_kernels: CpuKernels,
}

/// Kernels for the LM head and its loss on a GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LmHeadKernel {
    /// The fastest for the shape
    #[default]
    Auto,
    /// The one for every shape, which the others are compared with
    #[value(alias = "plain")]
    Generic,
}

/// Matmuls on a GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum MatmulKernel {
    /// cuBLASLt if there is one, else laam's own; loops on the host in the simulator
    #[default]
    Auto,
    /// laam's own
    Own,
}

/// Choice among cuBLASLt's algorithms for a matmul.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum MatmulAlgorithms {
    /// The first that cuBLASLt offers: the bits of a run depend on no timing
    #[default]
    First,
    /// The fastest of eight, timed once per GPU and kept in the cache folder and in checkpoints
    Tuned,
}

/// Kernels for attention on a GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum AttentionKernelArg {
    /// The fastest for the shape
    #[default]
    Auto,
    /// CUDA cores for head dimensions 2, 4 and 8; others as `auto`
    #[value(alias = "scalar")]
    NoTensorCores,
    /// The one for every shape, which the others are compared with
    #[value(alias = "plain")]
    Generic,
}

impl BackendArgs {
    /// The backend in f32.
    pub fn open(&self) -> anyhow::Result<Box<dyn Backend>> {
        self.open_in(Some(Dtype::F32))
    }

    /// The backend in a dtype, if it has several: by default bf16 on a GPU, else f32.
    pub fn open_in(&self, dtype: Option<Dtype>) -> anyhow::Result<Box<dyn Backend>> {
        self.open_for(dtype, false)
    }

    /// [`Self::open_in`]; with `profile`, a device times every operation.
    pub fn open_for(
        &self,
        dtype: Option<Dtype>,
        profile: bool,
    ) -> anyhow::Result<Box<dyn Backend>> {
        self.threads.map_or(Ok(()), threads::check_count)?;
        let kind = match self.backend {
            BackendKind::Auto if BUILD.cuda.is_ok() && gpu_count() > 0 && gpu_works() => {
                BackendKind::Cuda
            }
            BackendKind::Auto => BackendKind::Cpu,
            kind => kind,
        };
        let usual = if kind == BackendKind::Cuda { Dtype::Bf16 } else { Dtype::F32 };
        let dtype = dtype.unwrap_or(usual);
        let options = Options {
            dtype,
            mode: if profile { Mode::Profile } else { Mode::Graphs },
            generic_lm_head: self.lm_head_kernel == LmHeadKernel::Generic,
            own_matmul: self.matmul_kernel == MatmulKernel::Own,
            attention: match self.attention_kernel {
                AttentionKernelArg::Auto => gpu::AttentionChoice::Auto,
                AttentionKernelArg::NoTensorCores => gpu::AttentionChoice::NoTensorCores,
                AttentionKernelArg::Generic => gpu::AttentionChoice::Generic,
            },
            max_resident_bytes: None,
            guard: std::env::var_os("LAAM_GUARD").is_some_and(|value| value == "1"),
        };
        let threads = self.threads();
        Ok(match kind {
            BackendKind::Reference => Box::new(Reference::F32),
            BackendKind::Cuda => {
                static NOTES: Once = Once::new();
                let gpu = Gpu::new(self.open_gpu(), options)?;
                NOTES.call_once(|| gpu.notes().iter().for_each(|note| say!("{note}")));
                Box::new(gpu)
            }
            BackendKind::Sim => Box::new(Gpu::new(Arc::new(move || open_sim(threads)), options)?),
            BackendKind::Auto | BackendKind::Cpu => {
                let (bf16, kernels) = (dtype == Dtype::Bf16, self.cpu_kernels);
                Box::new(Cpu { threads, bf16, kernels })
            }
        })
    }

    /// Threads asked for, or those of the machine.
    pub fn threads(&self) -> usize {
        self.threads.unwrap_or_else(group::threads)
    }

    /// The device by itself.
    pub fn device(&self) -> anyhow::Result<Box<dyn Device>> {
        self.threads.map_or(Ok(()), threads::check_count)?;
        (self.open_device())()
    }

    /// Opens the GPU of this process.
    fn open_gpu(&self) -> Open {
        let algorithms = self.matmul_algorithms;
        Arc::new(move || open_cuda(own_gpu(), algorithms))
    }

    /// Opens the device; an error for backends without one.
    pub fn open_device(&self) -> Open {
        let threads = self.threads();
        match self.backend {
            BackendKind::Auto | BackendKind::Cuda => self.open_gpu(),
            BackendKind::Sim => Arc::new(move || open_sim(threads)),
            BackendKind::Cpu | BackendKind::Reference => Arc::new(|| {
                Err(error::config(
                    "the cpu and reference backends have no device",
                    "set `backend` to cuda or sim",
                ))
            }),
        }
    }
}

/// Whether the GPU opens and computes what it should, found out once. If not, says why.
fn gpu_works() -> bool {
    static WORKS: OnceLock<bool> = OnceLock::new();
    *WORKS.get_or_init(|| {
        let tried = Gpu::new(
            Arc::new(|| open_cuda(own_gpu(), MatmulAlgorithms::First)),
            Options::new(Dtype::Bf16),
        )
        .and_then(|gpu| self_check(&gpu));
        tried.inspect_err(|why| say!("warning: running on the CPU: {why:#}")).is_ok()
    })
}

#[cfg(feature = "cuda")]
pub fn open_cuda(ordinal: usize, algorithms: MatmulAlgorithms) -> anyhow::Result<Box<dyn Device>> {
    let cuda = Cuda::new(ordinal)?;
    Ok(Box::new(match algorithms {
        MatmulAlgorithms::First => cuda,
        MatmulAlgorithms::Tuned => cuda.with_tuned_matmuls(cache_folder()?.join("matmul")),
    }))
}

#[cfg(not(feature = "cuda"))]
pub fn open_cuda(_: usize, _: MatmulAlgorithms) -> anyhow::Result<Box<dyn Device>> {
    Err(error::missing_feature("cuda"))
}

#[cfg(feature = "sim")]
fn open_sim(threads: usize) -> anyhow::Result<Box<dyn Device>> {
    Ok(Box::new(Sim::new(ptx_race::Options { threads, ..ptx_race::Options::default() })?))
}

#[cfg(not(feature = "sim"))]
fn open_sim(_: usize) -> anyhow::Result<Box<dyn Device>> {
    Err(error::missing_feature("sim"))
}

/// The GPU of this process: the one of its number on this host, or the only one that it sees.
fn own_gpu() -> usize {
    if gpu_count() == 1 && !group::has_own_gpu() { 0 } else { group::local_rank() }
}

/// GPUs that the driver shows.
pub fn gpu_count() -> usize {
    #[cfg(feature = "cuda")]
    return cuda::count();
    #[cfg(not(feature = "cuda"))]
    0
}

/// Path of cuBLASLt, if it was found.
pub fn cublaslt() -> Library {
    #[cfg(feature = "cuda")]
    return cuda::cublaslt();
    #[cfg(not(feature = "cuda"))]
    Library::Missing
}

/// Version and path of NCCL, or why there is none.
pub fn nccl() -> Result<(String, PathBuf), String> {
    #[cfg(feature = "cuda")]
    return cuda::nccl().map(|library| (library.version(), library.path.clone()));
    #[cfg(not(feature = "cuda"))]
    Err("built without the feature cuda".to_string())
}

/// For every two GPUs: true if the first reaches the memory of the second.
pub fn gpu_peers() -> Vec<Vec<bool>> {
    #[cfg(feature = "cuda")]
    return cuda::peers();
    #[cfg(not(feature = "cuda"))]
    Vec::new()
}
