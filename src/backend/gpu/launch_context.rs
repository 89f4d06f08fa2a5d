//! The context in which an op launches its kernels and matmuls: device addresses, scratch memory.

use std::collections::HashMap;

use super::Options;
use crate::device::{Address, Arg, Device, Launch, Matmul, Matrix};
use crate::dtype::Dtype;
use crate::kernels::geometry::STEP_RECORD_BYTES;
use crate::kernels::{Family, Kernel};
use crate::llama::ops::AttentionShape;
use crate::llama::{Buffer, BufferKind, Program, StepHyperparams};
use crate::model::Span;

/// Device addresses of a model's flat arrays.
#[derive(Clone, Copy, Debug)]
pub(super) struct Arenas {
    /// Length of each but the cache, in elements.
    pub len: usize,
    /// f32.
    pub parameters: Address,
    /// Weights as matmuls read them: the f32 parameters, or their copy in the compute dtype.
    pub weights: Address,
    /// f32, as are the moments; all null in a session without training.
    pub gradients: Address,
    /// Address that the first element of the whole arena would have, if moments are kept for a range of it.
    pub first_moment: Address,
    pub second_moment: Address,
    /// In the compute dtype.
    pub cache: Address,
}

/// Device memory with everything that changes from run to run, so that one graph serves every run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Control {
    at: Address,
}

impl Control {
    pub const BYTES: usize = STEP_RECORD_BYTES;

    pub fn new(at: Address) -> Self {
        Self { at }
    }
    /// The layout of `StepRecord` in `kernels/step_queue.cu`; `begin` is the offset of the run's window
    /// indices.
    pub fn bytes(hyperparams: &StepHyperparams, loss_scale: f64, begin: u32) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[0..8].copy_from_slice(&hyperparams.learning_rate.to_le_bytes());
        bytes[8..16].copy_from_slice(&hyperparams.muon_learning_rate.to_le_bytes());
        bytes[16..24].copy_from_slice(&hyperparams.step.to_le_bytes());
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

/// Blocks per grid, threads per block, bytes of dynamic shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LaunchShape {
    pub grid: [usize; 3],
    pub block: [usize; 3],
    pub shared: usize,
}

impl LaunchShape {
    /// A one-dimensional grid of one-dimensional blocks.
    pub fn linear(grid: usize, block: usize) -> LaunchShape {
        LaunchShape { grid: [grid, 1, 1], block: [block, 1, 1], shared: 0 }
    }
}

/// The context of one op of a program.
pub(super) struct LaunchContext<'a> {
    pub device: &'a mut dyn Device,
    pub dtype: Dtype,
    pub options: Options,
    pub arenas: Arenas,
    /// Gradients of slices, of the arena's length each.
    pub slots: &'a [Address],
    pub control: Control,
    /// The f16 loss scale, which gradients are divided by; null if losses are not scaled.
    pub scaling: Address,
    pub program: &'a Program,
    /// Address of each buffer.
    pub buffers: &'a [Address],
    pub tables: &'a HashMap<usize, Address>,
    /// Index of the op in its program.
    pub op: usize,
    pub scratch: Address,
    pub scratch_bytes: usize,
    pub scratch_used: usize,
    /// True if small ops run on side branches of a graph that is captured.
    pub is_branched: bool,
}

/// Alignment of scratch allocations, in bytes.
const SCRATCH_ALIGN_BYTES: usize = 256;

/// Bytes of scratch memory for allocations of these sizes.
pub(super) fn scratch<const N: usize>(pieces: [usize; N]) -> usize {
    pieces.iter().map(|bytes| bytes.next_multiple_of(SCRATCH_ALIGN_BYTES)).sum()
}

impl LaunchContext<'_> {
    /// Device address of a buffer.
    pub fn ptr(&self, buffer: Buffer) -> Address {
        self.buffers[buffer.0]
    }

    /// Dtype of a buffer's elements.
    pub fn dtype_of(&self, buffer: Buffer) -> Dtype {
        match self.program.info(buffer).kind {
            BufferKind::Activation => self.dtype,
            BufferKind::Float | BufferKind::Index => Dtype::F32,
        }
    }

    pub fn len(&self, buffer: Buffer) -> usize {
        self.program.info(buffer).len
    }

    /// Device address of a parameter as matmuls read it.
    pub fn weight_ptr(&self, span: Span) -> Address {
        self.arenas.weights.plus(span.offset * self.dtype.size())
    }

    /// Device address of a parameter's gradient, f32.
    pub fn gradient_ptr(&self, span: Span) -> Address {
        self.arenas.gradients.plus(span.offset * 4)
    }

    /// Device address of the op's constant table.
    pub fn constant_table(&self) -> Address {
        self.tables[&self.op]
    }

    /// Allocates uninitialized scratch memory, valid during the op.
    pub fn scratch_alloc(&mut self, bytes: usize) -> Address {
        let at = self.scratch.plus(self.scratch_used).first(bytes);
        self.scratch_used += bytes.next_multiple_of(SCRATCH_ALIGN_BYTES);
        assert!(
            self.scratch_used <= self.scratch_bytes,
            "an op allocates the scratch memory it declared"
        );
        at
    }

    /// Launches one on a side branch of the graph, if it has any, and the other beside it; what follows waits
    /// for both.
    pub fn side_by_side(
        &mut self,
        one: impl FnOnce(&mut Self) -> anyhow::Result<()>,
        other: impl FnOnce(&mut Self) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        if !self.is_branched {
            one(self)?;
            return other(self);
        }
        self.device.begin_branch()?;
        one(self)?;
        let branch = self.device.end_branch()?;
        other(self)?;
        self.device.wait_for(branch)
    }

    /// Launches a kernel.
    pub fn launch(
        &mut self,
        kernel: Kernel,
        shape: LaunchShape,
        args: &[Arg],
    ) -> anyhow::Result<()> {
        let narrow = |n: [usize; 3]| n.map(|n| u32::try_from(n).unwrap_or(u32::MAX));
        let launch = Launch {
            kernel,
            grid: narrow(shape.grid),
            block: narrow(shape.block),
            shared: shape.shared as u32,
            args: args.to_vec(),
        };
        // SAFETY: an op passes its buffers, spans of the arenas and scratch memory with the sizes of its
        // shape, which its kernels stay within; `laam check` runs each of them in the simulator, which
        // refuses every other access.
        unsafe { self.device.launch(&launch) }
    }

    /// Launches the instance of a kernel for the compute dtype.
    pub fn launch_for_dtype(
        &mut self,
        family: &Family,
        shape: LaunchShape,
        args: &[Arg],
    ) -> anyhow::Result<()> {
        self.launch(family.of(self.dtype)?, shape, args)
    }

    /// `c = a b` or `c += a b`.
    pub fn matmul(
        &mut self,
        a: Matrix,
        b: Matrix,
        c: Matrix,
        accumulate: bool,
    ) -> anyhow::Result<()> {
        self.run_matmul(&Matmul { a, b, c, accumulate, batch: 1 })
    }

    /// `c = a b` for `batch` contiguous matrices in each operand.
    pub fn batched_matmul(
        &mut self,
        batch: usize,
        a: Matrix,
        b: Matrix,
        c: Matrix,
    ) -> anyhow::Result<()> {
        self.run_matmul(&Matmul { a, b, c, accumulate: false, batch })
    }

    fn run_matmul(&mut self, matmul: &Matmul) -> anyhow::Result<()> {
        if !self.options.own_matmul {
            return self.device.matmul(matmul);
        }
        // SAFETY: the same holds for the matrices of a matmul.
        matmul.launches()?.iter().try_for_each(|launch| unsafe { self.device.launch(launch) })
    }

    /// A buffer as a matrix.
    pub fn matrix(&self, buffer: Buffer, rows: usize, cols: usize) -> Matrix {
        assert_eq!(self.len(buffer), rows * cols, "{}", self.program.info(buffer).name);
        Matrix::new(self.ptr(buffer), self.dtype_of(buffer), rows, cols)
    }

    /// A weight as a matrix, `[out, in]`.
    pub fn weight_matrix(&self, span: Span) -> Matrix {
        Matrix::new(self.weight_ptr(span), self.dtype, span.rows, span.cols)
    }

    /// The gradient of a weight as a matrix, `[out, in]`, f32.
    pub fn gradient_matrix(&self, span: Span) -> Matrix {
        Matrix::new(self.gradient_ptr(span), Dtype::F32, span.rows, span.cols)
    }
}

/// An attention shape as kernel arguments.
pub(super) fn sizes(shape: &AttentionShape) -> [Arg; 5] {
    let AttentionShape { batch, seq_len, heads, kv_heads, head_dim } = *shape;
    [batch, seq_len, heads, kv_heads, head_dim].map(int)
}

/// A size as a kernel argument.
pub(super) fn int(n: usize) -> Arg {
    Arg::I32(i32::try_from(n).expect("loading a program checks that sizes fit into i32"))
}
