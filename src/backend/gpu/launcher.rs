//! What an operation launches with: places of buffers and parameters, scratch, kernels, products.

use std::collections::HashMap;

use super::Options;
use crate::device::{Address, Arg, Device, Launch, Matmul, Matrix};
use crate::dtype::Dtype;
use crate::llama::ops::AttentionShape;
use crate::llama::{Buffer, BufferKind, BytePlan, Program, StepHyperparams};
use crate::model::Span;

/// The flat arrays of a model in a device's memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Arenas {
    /// Elements of each but the cache.
    pub len: usize,
    /// f32.
    pub parameters: Address,
    /// What products read: the parameters themselves in f32, or their copy.
    pub weights: Address,
    /// f32, as are the moments; all null in a session that does not train.
    pub gradients: Address,
    pub first_moment: Address,
    pub second_moment: Address,
    /// Of the activations' type.
    pub cache: Address,
}

/// What changes from run to run, in a device's memory, so that one graph serves every run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Control {
    at: Address,
}

impl Control {
    pub const BYTES: usize = 32;

    pub fn new(at: Address) -> Self {
        Self { at }
    }
    /// As `Record` in `kernels/step_queue.cu` has it; `begin` is where a run's windows stand in the queue.
    pub fn bytes(rates: &StepHyperparams, loss_scale: f64, begin: u32) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[0..8].copy_from_slice(&rates.learning_rate.to_le_bytes());
        bytes[8..16].copy_from_slice(&rates.muon_learning_rate.to_le_bytes());
        bytes[16..24].copy_from_slice(&rates.step.to_le_bytes());
        bytes[24..28].copy_from_slice(&(loss_scale as f32).to_le_bytes());
        bytes[28..32].copy_from_slice(&begin.to_le_bytes());
        bytes
    }
    pub fn address(self) -> Address {
        self.at
    }
    /// f64
    pub fn learning_rate(self) -> Address {
        self.at
    }
    /// f64
    pub fn muon_learning_rate(self) -> Address {
        self.at.plus(8)
    }
    /// u64
    pub fn step(self) -> Address {
        self.at.plus(16)
    }
    /// f32
    pub fn loss_scale(self) -> Address {
        self.at.plus(24)
    }
    /// u32
    pub fn begin(self) -> Address {
        self.at.plus(28)
    }
}

/// Blocks, threads of a block, bytes of dynamic shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub grid: [usize; 3],
    pub block: [usize; 3],
    pub shared: usize,
}

impl Shape {
    /// Along x alone.
    pub fn linear(grid: usize, block: usize) -> Shape {
        Shape { grid: [grid, 1, 1], block: [block, 1, 1], shared: 0 }
    }
}

/// What one operation of a program launches with.
pub(super) struct Launcher<'a> {
    pub device: &'a mut dyn Device,
    pub dtype: Dtype,
    pub options: Options,
    pub arenas: Arenas,
    pub control: Control,
    /// f32: what the gradients are too large by; null: nothing.
    pub scaling: Address,
    pub program: &'a Program,
    pub plan: &'a BytePlan,
    pub block: Address,
    pub tables: &'a HashMap<usize, Address>,
    /// The place of the operation in its program.
    pub op: usize,
    pub scratch: Address,
    pub scratch_bytes: usize,
    pub scratch_used: usize,
}

/// Scratch starts at multiples of this many bytes.
const ALIGN: usize = 256;

/// The bytes that pieces of scratch take together.
pub(super) fn scratch<const N: usize>(pieces: [usize; N]) -> usize {
    pieces.iter().map(|bytes| bytes.next_multiple_of(ALIGN)).sum()
}

impl Launcher<'_> {
    /// Where a buffer of the program lies.
    pub fn at(&self, buffer: Buffer) -> Address {
        self.block.plus(self.plan.offsets[buffer.0])
    }

    /// The type of a buffer's numbers.
    pub fn dtype_of(&self, buffer: Buffer) -> Dtype {
        match self.program.info(buffer).kind {
            BufferKind::Activation => self.dtype,
            BufferKind::Float | BufferKind::Index => Dtype::F32,
        }
    }

    pub fn len(&self, buffer: Buffer) -> usize {
        self.program.info(buffer).len
    }

    /// A parameter as products read it.
    pub fn weight(&self, span: Span) -> Address {
        self.arenas.weights.plus(span.offset * self.dtype.size())
    }

    /// A parameter's gradient, f32.
    pub fn gradient(&self, span: Span) -> Address {
        self.arenas.gradients.plus(span.offset * 4)
    }

    /// What was made for this operation when its program was loaded.
    pub fn table(&self) -> Address {
        self.tables[&self.op]
    }

    /// The next piece of scratch memory, with anything in it.
    pub fn take(&mut self, bytes: usize) -> Address {
        let at = self.scratch.plus(self.scratch_used);
        self.scratch_used += bytes.next_multiple_of(ALIGN);
        assert!(self.scratch_used <= self.scratch_bytes, "an operation takes what it asked for");
        at
    }

    /// Starts a kernel.
    pub fn launch(&mut self, entry: &str, shape: Shape, args: &[Arg]) -> anyhow::Result<()> {
        let narrow = |n: [usize; 3]| n.map(|n| u32::try_from(n).unwrap_or(u32::MAX));
        self.device.launch(&Launch {
            entry: entry.to_string(),
            grid: narrow(shape.grid),
            block: narrow(shape.block),
            shared: shape.shared as u32,
            args: args.to_vec(),
        })
    }

    /// Starts the kernel of a family that is made for the session's numbers.
    pub fn typed(&mut self, family: &str, shape: Shape, args: &[Arg]) -> anyhow::Result<()> {
        self.launch(&format!("{family}_{}", self.dtype.suffix()), shape, args)
    }

    /// `c = a b`, or `c += a b`.
    pub fn matmul(
        &mut self,
        a: Matrix,
        b: Matrix,
        c: Matrix,
        accumulate: bool,
    ) -> anyhow::Result<()> {
        self.device.matmul(&Matmul { a, b, c, accumulate, batch: 1 })
    }

    /// `c = a b` for so many of each that lie behind one another.
    pub fn products(
        &mut self,
        batch: usize,
        a: Matrix,
        b: Matrix,
        c: Matrix,
    ) -> anyhow::Result<()> {
        self.device.matmul(&Matmul { a, b, c, accumulate: false, batch })
    }

    /// A matrix of activations.
    pub fn matrix(&self, buffer: Buffer, rows: usize, cols: usize) -> Matrix {
        assert_eq!(self.len(buffer), rows * cols, "{}", self.program.info(buffer).name);
        Matrix::new(self.at(buffer), self.dtype_of(buffer), rows, cols)
    }

    /// A parameter as a matrix that products read, `[out, in]`.
    pub fn weight_matrix(&self, span: Span) -> Matrix {
        Matrix::new(self.weight(span), self.dtype, span.rows, span.cols)
    }

    /// Its gradient, in f32.
    pub fn gradient_matrix(&self, span: Span) -> Matrix {
        Matrix::new(self.gradient(span), Dtype::F32, span.rows, span.cols)
    }
}

/// The shape of an attention as the last arguments of a launch.
pub(super) fn sizes(shape: &AttentionShape) -> [Arg; 5] {
    let AttentionShape { batch, seq_len, heads, kv_heads, head_dim } = *shape;
    [batch, seq_len, heads, kv_heads, head_dim].map(int)
}

/// As an argument; shapes beyond it are refused when a program is loaded.
pub(super) fn int(n: usize) -> Arg {
    Arg::I32(i32::try_from(n).expect("loading refused larger shapes"))
}
