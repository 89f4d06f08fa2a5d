//! What executes a program.
//!
//! - [`reference`]: plain loops in f64 or f32, obviously right, never tuned
//! - [`cpu`]: f32 at the speed of this machine's vector units
//! - [`gpu`]: the kernels, on a card or in the simulator

pub mod cpu;
pub mod gpu;
mod host;
mod memory;
pub mod reference;

use std::borrow::Cow;
use std::time::Instant;

use crate::device::{Type, host_memory};
use crate::llama::{Buffer, Program, Rates};
use crate::model::Layout;

/// Something that can hold a model and execute programs on it.
pub trait Backend: Send + Sync {
    /// Its name on the command line.
    fn name(&self) -> &'static str;
    /// Where it runs, for a person and for the provenance: the device and what is used of it.
    fn device(&self) -> String;
    /// Memory for a model: parameters all zero, and what `need` says.
    fn open(&self, layout: &Layout, need: Need) -> anyhow::Result<Box<dyn Session>>;
    /// The type of its activations, and of weights as its products read them.
    fn numbers(&self) -> Type {
        Type::F32
    }
    /// How many windows of `context` tokens it likes to take at a time, out of `windows`.
    fn micro_windows(&self, windows: usize, context: usize) -> usize;
    /// Bytes of the block that a program's buffers share. By default in f32.
    fn block(&self, program: &Program) -> usize {
        let plan = program.plan();
        4 * (plan.floats + plan.indices)
    }
    /// Bytes of what is kept beside the f32 parameters: a copy in another type, say.
    fn copies(&self, _layout: &Layout) -> usize {
        0
    }
    /// Bytes its operations need beside the program's buffers.
    fn workspace(&self, program: &Program) -> usize;
    /// Bytes of memory there are in all, where that is known. By default, this machine's.
    fn memory(&self) -> Option<u64> {
        host_memory()
    }
}

/// What a session has to hold beside the parameters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Need {
    /// Gradients and both moments.
    pub training: bool,
    /// Elements of the key/value cache.
    pub cache: usize,
}

/// The flat arrays a model lives in. All but the cache have the layout's length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arena {
    Parameters,
    Gradients,
    /// Adam's mean of gradients; Muon's momentum.
    FirstMoment,
    /// Adam's mean of squared gradients.
    SecondMoment,
    Cache,
}

/// A program that a session has planned and made room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loaded(usize);

/// Input of one run.
#[derive(Clone, Debug, Default)]
pub struct Feed<'a> {
    /// Every index input of the program, at its full length.
    pub indices: Vec<(Buffer, &'a [u32])>,
    /// Every floating-point input of the program.
    pub floats: Vec<(Buffer, Cow<'a, [f32]>)>,
    /// What each token's loss counts in the gradient: 1 / counted tokens of the whole step.
    pub loss_scale: f64,
    pub rates: Rates,
}

/// A model in a backend's memory, and the programs made ready for it.
pub trait Session: Send {
    /// Plans a program's memory and makes room. Programs of a session share one block: a program's
    /// outputs hold until the next one runs.
    fn load(&mut self, program: Program) -> anyhow::Result<Loaded>;
    /// Executes a program.
    fn run(&mut self, program: Loaded, feed: &Feed) -> anyhow::Result<()>;
    /// Runs a program as [`Session::run`] does, waits for its end, and tells the seconds that it took by
    /// the device's clock, inputs not counted.
    fn time(&mut self, program: Loaded, feed: &Feed) -> anyhow::Result<f64> {
        let start = Instant::now();
        self.run(program, feed)?;
        Ok(start.elapsed().as_secs_f64())
    }
    /// A floating-point buffer as the last run of `program` left it.
    fn floats(&self, program: Loaded, buffer: Buffer) -> anyhow::Result<Vec<f32>>;
    /// An index buffer as the last run of `program` left it.
    fn indices(&self, program: Loaded, buffer: Buffer) -> anyhow::Result<Vec<u32>>;
    /// A copy of an arena.
    fn read(&self, arena: Arena) -> anyhow::Result<Vec<f32>>;
    /// Fills every buffer with NaN (every index with the largest), so that what a program does not
    /// write is seen.
    fn poison(&mut self) -> anyhow::Result<()>;
    /// Replaces an arena, whose length `values` must have.
    fn write(&mut self, arena: Arena, values: &[f32]) -> anyhow::Result<()>;
    /// Seconds spent in each kind of operation since the session began, where the backend counts.
    fn profile(&self) -> Vec<(&'static str, f64)>;
    /// Bytes held: arenas and the block of buffers.
    fn bytes(&self) -> usize;
}
