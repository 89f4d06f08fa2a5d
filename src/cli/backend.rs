//! Which backend executes: the arguments every command that runs a model shares.

use clap::{Args, ValueEnum};

use crate::backend::Backend;
use crate::backend::cpu::Cpu;
use crate::backend::reference::{Precision, Reference, Rounding};
use crate::error::error;

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
}

impl Arguments {
    /// The backend that was asked for.
    pub fn open(&self) -> anyhow::Result<Box<dyn Backend>> {
        if self.threads == Some(0) {
            return Err(error("0 threads cannot work, in --threads", "give 1 or more"));
        }
        match self.backend {
            Kind::Auto | Kind::Cpu => Ok(Box::new(Cpu::new(self.threads))),
            Kind::Reference => {
                Ok(Box::new(Reference { precision: Precision::F32, rounding: Rounding::None }))
            }
            Kind::Cuda | Kind::Sim => Err(error(
                format!("this build has no {:?} backend, in --backend", self.backend)
                    .to_lowercase(),
                "use --backend cpu; training on a GPU is not there yet",
            )),
        }
    }
}
