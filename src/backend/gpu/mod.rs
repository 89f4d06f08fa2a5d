//! The kernels, launched with typed arguments over any [`Device`]. Names no vendor.
//!
//! Activations and the weights that products read are kept in one type: f32, or bf16 under f32
//! masters. Rounding points with bf16 are those of `Reference::mixed(Dtype::Bf16)`: weights as they
//! are read, activations as they are written, what enters a second product inside attention and the
//! head. Gradients of parameters, statistics, moments and masters are f32.
//!
//! [`session`] holds memory and programs; [`launcher`] is what every operation launches with; each
//! other file is one family of operations: shapes of launches, scratch, order of kernels.

mod attention;
mod embedding;
mod launcher;
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

use super::{Backend, Need, Session};
use crate::device::Device;
use crate::dtype::Dtype;
use crate::llama::Program;
use crate::model::Layout;

/// Opens a device.
pub type Open = Arc<dyn Fn() -> anyhow::Result<Box<dyn Device>> + Send + Sync>;

/// How the kernels of a program are started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// One by one.
    Eager,
    /// Recorded once, and replayed from then on.
    Graphs,
    /// One by one, every operation timed: slower as a whole.
    Profile,
}

/// Which kernels do attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attention {
    /// The fastest for the shape.
    Auto,
    /// Those, but for heads of at most 8 components the ones without tensor cores.
    Scalar,
    /// The ones for every shape.
    Plain,
}

/// How programs are carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Of activations and of the weights that products read.
    pub dtype: Dtype,
    pub mode: Mode,
    /// The head by products and logits in memory, whatever its shape.
    pub plain_head: bool,
    pub attention: Attention,
    /// Bytes of a token file that training keeps in the device's memory at most: half of what is free
    /// by default. Larger ones are drawn by the host, a few steps ahead.
    pub most_tokens: Option<u64>,
}

impl Options {
    /// Kernels one by one, each by its fastest path.
    pub fn new(dtype: Dtype) -> Options {
        Options {
            dtype,
            mode: Mode::Eager,
            plain_head: false,
            attention: Attention::Auto,
            most_tokens: None,
        }
    }
}

/// The kernels on a device.
pub struct Gpu {
    open: Open,
    options: Options,
    name: &'static str,
    device: String,
    memory: u64,
    peak: Option<f64>,
}

impl Gpu {
    /// Opens a device once, to know what it is.
    pub fn new(open: Open, options: Options) -> anyhow::Result<Gpu> {
        let device = open()?;
        let (_, memory) = device.memory()?;
        let name = device.name();
        let precision = options.dtype.suffix();
        let peak = device.peak_flops(options.dtype);
        let device = format!("{}, {precision}", device.describe());
        Ok(Gpu { open, options, name, device, memory, peak })
    }
}

impl Backend for Gpu {
    fn name(&self) -> &'static str {
        self.name
    }

    fn device(&self) -> String {
        self.device.clone()
    }

    fn open(&self, layout: &Layout, need: Need) -> anyhow::Result<Box<dyn Session>> {
        Ok(Box::new(session::Model::new((self.open)()?, self.options, layout, need)?))
    }

    /// All of them: a card wants the work at once, and what it has no memory for is refused before.
    fn micro_windows(&self, windows: usize, _context: usize) -> usize {
        windows
    }

    fn compute_dtype(&self) -> Dtype {
        self.options.dtype
    }

    fn block(&self, program: &Program) -> usize {
        program.byte_plan(self.options.dtype.size()).bytes
    }

    fn workspace(&self, program: &Program) -> usize {
        // A training program has no update in it, which alone depends on the length of the arena.
        session::workspace(program, 0, self.options)
    }

    fn copies(&self, layout: &Layout) -> usize {
        if self.options.dtype == Dtype::F32 { 0 } else { layout.len * self.options.dtype.size() }
    }

    fn peak(&self) -> Option<f64> {
        self.peak
    }

    fn memory(&self) -> Option<u64> {
        Some(self.memory)
    }
}
