//! Backends: execution of programs.
//!
//! - [`mod@reference`]: plain loops in f64 or f32, obviously correct, never tuned
//! - [`cpu`]: SIMD kernels on this machine's processor
//! - [`gpu`]: CUDA kernels, on a GPU or in the simulator

pub mod cpu;
mod exchange;
pub mod gpu;
mod host;
mod memory;
pub mod reference;

use std::borrow::Cow;
use std::ops::Range;
use std::time::Instant;

use crate::collective::Group;
use crate::device::host_memory;
use crate::dtype::Dtype;
use crate::llama::step::MicroBatch;
use crate::llama::{Buffer, Program, StepHyperparams};
use crate::model::Layout;
use crate::tokens::{Batch, Windows};

/// Holds models and executes programs on them.
pub trait Backend: Send + Sync {
    /// Name on the command line.
    fn name(&self) -> &'static str;
    /// Description of the device for people and for the provenance.
    fn device(&self) -> String;
    /// Allocates a session for a model, with all arenas zero.
    fn open(&self, layout: &Layout, spec: SessionSpec) -> anyhow::Result<Box<dyn Session>>;
    /// Dtype of activations, and of weights as matmuls read them.
    fn compute_dtype(&self) -> Dtype {
        Dtype::F32
    }
    /// Preferred micro-batch size for a batch of `batch` sequences of `seq_len` tokens.
    fn micro_batch(&self, batch: usize, seq_len: usize) -> usize;
    /// Bytes of the block that a program's buffers share. By default in f32.
    fn activation_bytes(&self, program: &Program) -> usize {
        let plan = program.plan();
        4 * (plan.floats + plan.indices)
    }
    /// Bytes of weight copies besides the f32 parameters.
    fn shadow_weight_bytes(&self, _layout: &Layout) -> usize {
        0
    }
    /// Bytes of scratch memory of a session that runs these programs, besides their buffers.
    fn workspace_bytes(&self, programs: &[&Program]) -> usize;
    /// Bytes of the buffers that ranks exchange through, besides the workspace.
    fn exchange_bytes(&self, program: &Program) -> usize {
        4 * program.ops.iter().map(exchange::wire_elements).max().unwrap_or(0)
    }
    /// Peak matmul rate in FLOP/s as the manufacturer states it, the denominator of MFU, if known.
    fn peak_flops(&self) -> Option<f64> {
        None
    }
    /// Memory that a run may use in bytes, if known. By default, this machine's.
    fn memory(&self) -> Option<u64> {
        host_memory()
    }
    /// True if models lie in main memory.
    fn is_host(&self) -> bool {
        true
    }
    /// Sequences and tokens that a decode step should have.
    fn decode_shape(&self) -> DecodeShape {
        DecodeShape::HOST
    }
}

/// Sequences and tokens of a decode step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecodeShape {
    /// Sequences at once, if there are many.
    pub slots: usize,
    /// Sequences that take as long as one: speculative ones cost nothing.
    pub spare_slots: usize,
    /// Tokens per sequence in a step that takes prompts, if all slots are in use. A step with fewer prompt
    /// tokens than one in `prompt_tokens` of its rows is not worth its cost.
    pub prompt_tokens: usize,
}

impl DecodeShape {
    /// 64 rows, up to which a matmul of the `cpu` backend has the same bits whatever their number. Every row
    /// costs time.
    pub const HOST: DecodeShape = DecodeShape { slots: 16, spare_slots: 1, prompt_tokens: 4 };
}

/// Memory of a session besides the parameters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SessionSpec {
    /// Gradients and both moments.
    pub training: bool,
    /// Elements of the KV cache.
    pub cache_len: usize,
    /// First element and length of the range that moments are kept for; all if `None`.
    pub moments: Option<(usize, usize)>,
}

impl SessionSpec {
    /// The range of the arena that moments are kept for.
    fn moment_range(&self, arena: usize) -> Range<usize> {
        let (start, len) = self.moments.unwrap_or((0, arena));
        if self.training { start..start + len } else { 0..0 }
    }
}

/// The flat arrays of a model. All but the cache have the layout's length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arena {
    /// Parameters, in f32.
    Parameters,
    /// Gradients of the parameters, in f32.
    Gradients,
    /// Adam's mean of gradients; Muon's momentum.
    FirstMoment,
    /// Adam's mean of squared gradients.
    SecondMoment,
    /// KV cache of a decoding session.
    Cache,
}

impl Arena {
    fn is_moment(self) -> bool {
        matches!(self, Arena::FirstMoment | Arena::SecondMoment)
    }
}

/// A program loaded by a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProgramId(usize);

/// Inputs of one run.
#[derive(Clone, Debug, Default)]
pub struct Inputs<'a> {
    /// Every index input of the program, at its full length.
    pub indices: Vec<(Buffer, &'a [u32])>,
    /// Every floating-point input of the program.
    pub floats: Vec<(Buffer, Cow<'a, [f32]>)>,
    /// Weight of each token's loss in the gradient: 1 / counted tokens of the whole step.
    pub loss_scale: f64,
    /// Learning rates and step number.
    pub hyperparams: StepHyperparams,
}

/// A model in a backend's memory, and the programs loaded for it.
pub trait Session: Send {
    /// Joins a group, which collective ops exchange bytes with. With [`SessionSpec::moments`], reading and
    /// writing the moments become calls of all ranks.
    fn join(&mut self, group: Group) -> anyhow::Result<()>;
    /// What moves the bytes of exchanges, if it is not the group's library.
    fn exchanges(&self) -> Option<String> {
        None
    }
    /// Plans a program's memory and allocates it. Programs of a session share one block: a program's
    /// outputs are valid until the next one runs.
    fn load(&mut self, program: Program) -> anyhow::Result<ProgramId>;
    /// Executes a program.
    fn run(&mut self, program: ProgramId, inputs: &Inputs) -> anyhow::Result<()>;
    /// Executes a program, waits for it, and returns the seconds it took by the device's clock, without
    /// the upload of inputs.
    fn time(&mut self, program: ProgramId, inputs: &Inputs) -> anyhow::Result<f64> {
        let start = Instant::now();
        self.run(program, inputs)?;
        Ok(start.elapsed().as_secs_f64())
    }
    /// A floating-point buffer after the last run of `program`.
    fn floats(&self, program: ProgramId, buffer: Buffer) -> anyhow::Result<Vec<f32>>;
    /// An index buffer after the last run of `program`.
    fn indices(&self, program: ProgramId, buffer: Buffer) -> anyhow::Result<Vec<u32>>;
    /// An arena, if it is in host memory as f32.
    fn arena(&self, _arena: Arena) -> Option<&[f32]> {
        None
    }
    /// A copy of an arena; of moments that are sharded, gathered from all ranks.
    fn read(&self, arena: Arena) -> anyhow::Result<Vec<f32>>;
    /// Fills every buffer with NaN (indices with the largest u32), to expose reads of what a program
    /// has not written.
    fn poison(&mut self) -> anyhow::Result<()>;
    /// Replaces an arena by `values` of its length.
    fn write(&mut self, arena: Arena, values: &[f32]) -> anyhow::Result<()>;
    /// Replaces each value of an arena.
    fn map(&mut self, arena: Arena, value: &dyn Fn(f32) -> f32) -> anyhow::Result<()> {
        let mut values = self.read(arena)?;
        for x in &mut values {
            *x = value(*x);
        }
        self.write(arena, &values)
    }
    /// Gives the matmuls of all loaded programs their algorithms, before anything ran, if the device has a choice.
    fn plan_matmuls(&mut self) -> anyhow::Result<()> {
        Ok(())
    }
    /// Seconds by the device's clock of some training runs without exchanges, one of those before each
    /// [`StepQueue::drain`]; `None` if nothing was timed yet.
    fn timed_seconds(&self) -> Option<f64> {
        None
    }
    /// Seconds spent in each kind of op since the session began; empty if the backend does not
    /// profile.
    fn profile(&self) -> Vec<(&'static str, f64)>;
    /// Bytes allocated: arenas and the block of buffers.
    fn bytes(&self) -> usize;
    /// The device-side step queue, if the session has one.
    fn queue(&mut self) -> Option<&mut dyn StepQueue> {
        None
    }
    /// State besides the arenas that the next step depends on, for a checkpoint; null if none.
    fn state(&self) -> anyhow::Result<serde_json::Value> {
        Ok(serde_json::Value::Null)
    }
    /// Restores the [`Session::state`] of a checkpoint. Returns a warning if it cannot be restored in
    /// full, so that the bits may differ.
    fn restore(&mut self, _state: &serde_json::Value) -> anyhow::Result<Option<String>> {
        Ok(None)
    }
}

/// A device-side queue of training runs: the host enqueues many, without synchronizing between them.
pub trait StepQueue {
    /// Number of runs that can be enqueued before [`StepQueue::drain`].
    fn capacity(&self) -> usize;
    /// Uploads a token file, so that the device itself gathers [`BatchSource::Windows`]. Returns false
    /// if it does not fit into memory.
    fn upload_dataset(&mut self, windows: &Windows) -> anyhow::Result<bool>;
    /// Loads a program; `norm` is its gradient norm, if it ends a step.
    fn load(&mut self, micro: MicroBatch, norm: Option<Buffer>) -> anyhow::Result<ProgramId>;
    /// Loads a program without a batch, which ends a slice, or a step if it has a `norm`.
    fn load_end(&mut self, program: Program, norm: Option<Buffer>) -> anyhow::Result<ProgramId>;
    /// Enqueues runs in order, and returns before they are done.
    fn enqueue(&mut self, runs: &[StepRun]) -> anyhow::Result<()>;
    /// Waits for all runs enqueued since the last call, and returns the result of each.
    fn drain(&mut self) -> anyhow::Result<Vec<RunResult>>;
}

/// One run of a training program.
#[derive(Clone, Debug)]
pub struct StepRun<'a> {
    /// Program to run.
    pub program: ProgramId,
    /// Its batch.
    pub data: BatchSource<'a>,
    /// Weight of each token's loss in the gradient: 1 / counted tokens of the whole step.
    pub loss_scale: f64,
    /// Learning rates and step number.
    pub hyperparams: StepHyperparams,
}

/// The batch of a run, of the size of its program.
#[derive(Clone, Debug)]
pub enum BatchSource<'a> {
    /// Indices of windows in the uploaded token file.
    Windows(&'a [usize]),
    /// A batch that the host has made.
    Batch(Cow<'a, Batch>),
    /// No batch: the program has none.
    None,
}

/// The result of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RunResult {
    /// Sum of the counted losses, in nats.
    pub loss: f64,
    /// Gradient norm before clipping, if the run ended a step.
    pub norm: Option<f64>,
}
