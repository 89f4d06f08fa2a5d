//! The CUDA kernels, launched with typed arguments on any [`Device`].
//!
//! Activations and the weights that matmuls read have the compute dtype: f32, or bf16 or f16 with f32
//! master weights. Rounding points are those of `Reference::mixed`: weights as they are read,
//! activations as they are written, operands of the second matmul inside attention and the LM head.
//! Parameter gradients, statistics, moments and master weights are f32.
//!
//! `session.rs` holds memory and programs; `queue.rs` is the device-side step queue; `launch_context.rs` is
//! what ops launch kernels with; each other file is one family of ops: launch shapes, scratch memory,
//! order of kernels.

mod attention;
mod embedding;
mod exchange;
mod launch_context;
mod lm_head;
mod matmul;
mod muon;
mod norm;
mod queue;
mod rope;
mod session;
mod swiglu;
mod update;

use std::sync::Arc;

use super::{Backend, DecodeShape, Session, SessionSpec};
use crate::device::Device;
use crate::dtype::Dtype;
use crate::llama::Program;
use crate::model::Layout;

/// Opens a device.
pub type Open = Arc<dyn Fn() -> anyhow::Result<Box<dyn Device>> + Send + Sync>;

/// The way the kernels of a program are launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Kernel by kernel.
    Eager,
    /// Captured as a CUDA graph after the first run.
    Graphs,
    /// Kernel by kernel with events around every op: slower as a whole.
    Profile,
}

/// Choice of the attention kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttentionChoice {
    /// The fastest kernel for the shape.
    Auto,
    /// `Auto`, without tensor cores if head_dim is at most 8.
    NoTensorCores,
    /// The kernel that supports every shape.
    Generic,
}

/// Options of a GPU backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Compute dtype: that of activations and of the weights that matmuls read.
    pub dtype: Dtype,
    /// Graphs, or launches one by one.
    pub mode: Mode,
    /// LM head by matmuls and logits in memory, whatever the shape.
    pub generic_lm_head: bool,
    /// Matmuls by `kernels/matmul.cu`, whatever the device has.
    pub own_matmul: bool,
    /// Attention kernels that may be used.
    pub attention: AttentionChoice,
    /// Limit of the token file in device memory, in bytes; half of the free memory by default. From a
    /// larger file the host gathers batches, a few steps ahead.
    pub max_resident_bytes: Option<u64>,
    /// Every buffer is an allocation of its own, poisoned after the last op that uses it: shows accesses
    /// outside a buffer and outside its live range. Slow, and takes much memory.
    pub guard: bool,
}

impl Options {
    /// Eager mode with the fastest kernels.
    pub fn new(dtype: Dtype) -> Options {
        Options {
            dtype,
            mode: Mode::Eager,
            generic_lm_head: false,
            own_matmul: false,
            attention: AttentionChoice::Auto,
            max_resident_bytes: None,
            guard: false,
        }
    }
}

/// Bytes of a GPU's free memory that no plan may use: for modules, graphs and cuBLASLt's workspace.
pub const RESERVED_BYTES: u64 = 256 << 20;

/// The CUDA kernels on a device.
pub struct Gpu {
    open: Open,
    options: Options,
    name: &'static str,
    device: String,
    memory: u64,
    peak: Option<f64>,
    notes: Vec<String>,
}

impl Gpu {
    /// Opens a device once to query it.
    pub fn new(open: Open, options: Options) -> anyhow::Result<Gpu> {
        let device = open()?;
        let name = device.name();
        let memory = match device.memory()? {
            (_, total) if name == "sim" => total,
            (free, _) => free.saturating_sub(RESERVED_BYTES),
        };
        let precision = options.dtype.suffix();
        let peak = device.peak_flops(options.dtype);
        let notes = device.notes();
        let device = format!("{}, {precision}", device.describe());
        Ok(Gpu { open, options, name, device, memory, peak, notes })
    }

    /// [`Device::notes`]
    pub fn notes(&self) -> &[String] {
        &self.notes
    }
}

impl Backend for Gpu {
    fn name(&self) -> &'static str {
        self.name
    }

    fn device(&self) -> String {
        self.device.clone()
    }

    fn open(&self, layout: &Layout, spec: SessionSpec) -> anyhow::Result<Box<dyn Session>> {
        Ok(Box::new(session::GpuSession::new((self.open)()?, self.options, layout, spec)?))
    }

    /// The whole batch: large batches fill a GPU, and the memory plan is checked before.
    fn micro_batch(&self, batch: usize, _seq_len: usize) -> usize {
        batch
    }

    fn compute_dtype(&self) -> Dtype {
        self.options.dtype
    }

    fn activation_bytes(&self, program: &Program) -> usize {
        program.byte_plan(self.options.dtype.size()).bytes
    }

    fn workspace_bytes(&self, programs: &[&Program]) -> usize {
        // A training program without its update does not depend on the length of the arena.
        let of = |program: &&Program| session::workspace(program, 0, self.options);
        programs.iter().map(of).max().unwrap_or(0)
    }

    /// They are workspace.
    fn exchange_bytes(&self, _: &Program) -> usize {
        0
    }

    fn shadow_weight_bytes(&self, layout: &Layout) -> usize {
        if self.options.dtype == Dtype::F32 { 0 } else { layout.len * self.options.dtype.size() }
    }

    fn peak_flops(&self) -> Option<f64> {
        self.peak
    }

    fn is_host(&self) -> bool {
        false
    }

    fn memory(&self) -> Option<u64> {
        Some(self.memory)
    }

    /// Launches bound a step of a few hundred rows. The simulator computes them one by one.
    fn decode_shape(&self) -> DecodeShape {
        match self.name {
            "sim" => DecodeShape::HOST,
            _ => DecodeShape { slots: 256, spare_slots: 256, prompt_tokens: 16 },
        }
    }
}
