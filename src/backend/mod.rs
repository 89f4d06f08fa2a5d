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

use crate::device::host_memory;
use crate::dtype::Dtype;
use crate::llama::step::MicroBatch;
use crate::llama::{Buffer, Program, StepHyperparams};
use crate::model::Layout;
use crate::tokens::{Batch, Windows};

/// Something that can hold a model and execute programs on it.
pub trait Backend: Send + Sync {
    /// Its name on the command line.
    fn name(&self) -> &'static str;
    /// Where it runs, for a person and for the provenance: the device and what is used of it.
    fn device(&self) -> String;
    /// Memory for a model: parameters all zero, and what `need` says.
    fn open(&self, layout: &Layout, need: Need) -> anyhow::Result<Box<dyn Session>>;
    /// The type of its activations, and of weights as its products read them.
    fn compute_dtype(&self) -> Dtype {
        Dtype::F32
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
    /// The FLOP/s of its products by the maker's word, of which MFU is a share, where that is known.
    fn peak(&self) -> Option<f64> {
        None
    }
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
    pub rates: StepHyperparams,
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
    /// The means to train without the host between steps, where the session has them.
    fn queue(&mut self) -> Option<&mut dyn Queue> {
        None
    }
    /// What beside the arenas the next step depends on, for a checkpoint; null where it is nothing.
    fn state(&self) -> anyhow::Result<serde_json::Value> {
        Ok(serde_json::Value::Null)
    }
    /// Goes on from what [`Session::state`] told. Returns what a person should know where not all
    /// of it can be had here again, so that the bits may differ.
    fn restore(&mut self, _state: &serde_json::Value) -> anyhow::Result<Option<String>> {
        Ok(None)
    }
}

/// Runs of training programs that wait for each other alone: the host asks for many, and hears of
/// them when it wants to.
pub trait Queue {
    /// How many runs can be asked for before their [`Queue::outcomes`] are.
    fn room(&self) -> usize;
    /// Takes the windows of a token file into the device's memory, so that [`Data::Windows`] can be
    /// drawn there. Says whether they fit.
    fn hold(&mut self, windows: &Windows) -> anyhow::Result<bool>;
    /// Makes a program ready; `norm` is where it leaves that of all gradients, if it ends a step.
    fn load(&mut self, micro: MicroBatch, norm: Option<Buffer>) -> anyhow::Result<Loaded>;
    /// Asks for runs, in order. Returns before they are done.
    fn push(&mut self, runs: &[Run]) -> anyhow::Result<()>;
    /// Waits for all runs that were asked for since the last time, and tells of each.
    fn outcomes(&mut self) -> anyhow::Result<Vec<Ran>>;
}

/// One run of a training program.
#[derive(Clone, Debug)]
pub struct Run<'a> {
    pub program: Loaded,
    pub data: Data<'a>,
    /// What each token's loss counts in the gradient: 1 / counted tokens of the whole step.
    pub loss_scale: f64,
    pub rates: StepHyperparams,
}

/// What a run trains on: as many windows as its program has.
#[derive(Clone, Debug)]
pub enum Data<'a> {
    /// Those of these numbers, of the windows that are held.
    Windows(&'a [usize]),
    Batch(Cow<'a, Batch>),
}

/// What a run left.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ran {
    /// The sum of the losses that count, in nats.
    pub loss: f64,
    /// The norm of all gradients before clipping, where the run ended a step.
    pub norm: Option<f64>,
}
