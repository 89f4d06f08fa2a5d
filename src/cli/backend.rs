//! Which backend executes: the arguments every command that runs a model shares.

use std::sync::Arc;

use clap::{Args, ValueEnum};

use crate::backend::Backend;
use crate::backend::cpu::{Cpu, CpuKernels};
use crate::backend::gpu::{self, Gpu, Mode, Options};
use crate::backend::reference::Reference;
use crate::device::Device;
use crate::device::cuda::{self, Cuda};
use crate::device::sim::Sim;
use crate::dtype::Dtype;
use crate::error;
use crate::kernels::BUILD;

/// Where a model runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// The fastest this machine and this build offer.
    #[default]
    Auto,
    /// This machine's processor.
    Cpu,
    /// Plain loops: slow, and obviously right.
    Reference,
    /// An NVIDIA GPU.
    Cuda,
    /// The GPU's kernels in the simulator.
    Sim,
}

#[derive(Args, Clone, Debug)]
// Clap's groups are named for their structs, and the command's own is called Arguments too.
#[group(id = "backend arguments")]
pub struct Arguments {
    /// Where the model runs
    #[arg(long, value_enum, default_value_t)]
    pub backend: Kind,
    /// Threads of the cpu backend [default: all]
    #[arg(long)]
    pub threads: Option<usize>,
    /// How a GPU does the head and its loss; on the cpu, plain turns off what only some processors run
    #[arg(long, value_enum, default_value_t)]
    pub head: Path,
    /// How a GPU does attention; on the cpu the same
    #[arg(long, value_enum, default_value_t)]
    pub attention: Attention,
}

/// The way a GPU takes where it has several.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Path {
    /// The fastest for the shape.
    #[default]
    Auto,
    /// The one for every shape, which the fast ones are held against.
    Plain,
}

/// The same for attention.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Attention {
    /// The fastest for the shape.
    #[default]
    Auto,
    /// The fastest without tensor cores where heads have 8 components or fewer.
    Scalar,
    /// The one for every shape, which the fast ones are held against.
    Plain,
}

impl Arguments {
    /// The backend that was asked for, in f32.
    pub fn open(&self) -> anyhow::Result<Box<dyn Backend>> {
        self.open_in(Some(Dtype::F32))
    }

    /// The backend that was asked for, in a precision where it offers several: by default bf16 on a
    /// card, else f32.
    pub fn open_in(&self, precision: Option<Dtype>) -> anyhow::Result<Box<dyn Backend>> {
        self.open_for(precision, false)
    }

    /// As [`Arguments::open_in`]; with `profile`, a device times every operation.
    pub fn open_for(
        &self,
        precision: Option<Dtype>,
        profile: bool,
    ) -> anyhow::Result<Box<dyn Backend>> {
        if self.threads == Some(0) {
            return Err(error::invalid("threads", 0, "at least 1"));
        }
        let kind = match self.backend {
            Kind::Auto if BUILD.cuda.is_ok() && cuda::count() > 0 => Kind::Cuda,
            Kind::Auto => Kind::Cpu,
            kind => kind,
        };
        let usual = if kind == Kind::Cuda { Dtype::Bf16 } else { Dtype::F32 };
        let dtype = precision.unwrap_or(usual);
        let options = Options {
            dtype,
            mode: if profile { Mode::Profile } else { Mode::Graphs },
            generic_lm_head: self.head == Path::Plain,
            attention: match self.attention {
                Attention::Auto => gpu::AttentionChoice::Auto,
                Attention::Scalar => gpu::AttentionChoice::NoTensorCores,
                Attention::Plain => gpu::AttentionChoice::Generic,
            },
            max_resident_bytes: None,
        };
        Ok(match kind {
            Kind::Reference => Box::new(Reference::F32),
            Kind::Cuda => Box::new(Gpu::new(Arc::new(|| Ok(Box::new(Cuda::new(0)?))), options)?),
            Kind::Sim => {
                let simulator =
                    ptxsim::Options { threads: self.threads(), ..ptxsim::Options::default() };
                let open = Arc::new(move || Ok(Box::new(Sim::new(simulator)?) as _));
                Box::new(Gpu::new(open, options)?)
            }
            Kind::Auto | Kind::Cpu => Box::new(Cpu {
                threads: self.threads(),
                bf16: dtype == Dtype::Bf16,
                kernels: if self.head == Path::Auto && self.attention == Attention::Auto {
                    CpuKernels::Auto
                } else {
                    CpuKernels::Portable
                },
            }),
        })
    }

    /// As many as were asked for, or as the machine has.
    fn threads(&self) -> usize {
        let all = || std::thread::available_parallelism().map_or(1, usize::from);
        self.threads.unwrap_or_else(all)
    }

    /// The device that was asked for, by itself.
    pub fn device(&self) -> anyhow::Result<Box<dyn Device>> {
        match self.backend {
            Kind::Auto | Kind::Cuda => Ok(Box::new(Cuda::new(0)?)),
            Kind::Sim => Ok(Box::new(Sim::new(ptxsim::Options::default())?)),
            Kind::Cpu | Kind::Reference => Err(error::config(
                "the cpu and reference backends have no device",
                "set `backend` to cuda or sim",
            )),
        }
    }
}
