//! Muon: `kernels/muon.cu` and matmuls of the device, batched over all matrices of a shape.
//!
//! In f32 whatever the compute dtype, as in the other backends: the matrices are small compared with the
//! activations of a batch.

use super::launch_context::{LaunchContext, LaunchShape, int, scratch};
use crate::device::{Address, Matrix};
use crate::dtype::Dtype;
use crate::kernels::families;
use crate::kernels::geometry::{BLOCK_THREADS, MUON_PARAMS_BYTES};
use crate::llama::ops::MuonStep;

/// Grid limit per matrix. The order of the sum of squares is fixed by the launch, which must not depend
/// on the GPU.
const MAX_BLOCKS: usize = 512;
/// Most elements per batch: beyond it, scratch memory costs more than the saved launches.
const MAX_BATCH_ELEMENTS: usize = 1 << 24;
/// Newton-Schulz coefficients and iterations.
const NEWTON_SCHULZ: [f32; 3] = [3.4445, -4.775, 2.0315];
const ITERATIONS: usize = 5;

fn blocks(len: usize) -> usize {
    len.div_ceil(4 * BLOCK_THREADS).min(MAX_BLOCKS)
}

/// Matrices per batch.
fn matrices_per_batch(o: &MuonStep) -> usize {
    let (rows, cols) = o.shape();
    if !o.batched {
        return 1;
    }
    (MAX_BATCH_ELEMENTS / (rows * cols)).clamp(1, o.matrices.len())
}

/// Step parameters, partial sums of squares, X, B X, A, A A.
fn scratch_bytes(o: &MuonStep) -> [usize; 6] {
    let ((rows, cols), count) = (o.shape(), matrices_per_batch(o));
    let (len, side) = (rows * cols, rows.min(cols));
    let (all, squares) = (4 * count * len, 4 * count * side * side);
    [MUON_PARAMS_BYTES, 8 * count * blocks(len), all, all, squares, squares]
}

pub(super) fn workspace(o: &MuonStep) -> usize {
    scratch(scratch_bytes(o))
}

/// Start of each matrix in the arenas, as the kernels read it.
pub(super) fn table(o: &MuonStep) -> Vec<u8> {
    o.matrices.iter().flat_map(|w| (w.offset as u64).to_le_bytes()).collect()
}

pub(super) fn step(ctx: &mut LaunchContext, o: &MuonStep) -> anyhow::Result<()> {
    let buffers = scratch_bytes(o).map(|bytes| ctx.scratch_alloc(bytes));
    let params = buffers[0];
    let args = [
        ctx.control.muon_learning_rate().into(),
        ctx.ptr(o.norm).into(),
        ctx.scaling.into(),
        params.into(),
        (o.max_grad_norm as f32).into(),
    ];
    ctx.launch(families::MUON_STEP_PARAMS, LaunchShape::linear(1, 1), &args)?;
    let per_batch = matrices_per_batch(o);
    for first in (0..o.matrices.len()).step_by(per_batch) {
        let batch = per_batch.min(o.matrices.len() - first);
        step_batch(ctx, o, buffers, ctx.constant_table().plus(8 * first), batch)?;
    }
    Ok(())
}

/// Step of `batch` matrices that start at `offsets`.
fn step_batch(
    ctx: &mut LaunchContext,
    o: &MuonStep,
    buffers: [Address; 6],
    offsets: Address,
    batch: usize,
) -> anyhow::Result<()> {
    let [params, partials, x, bx, a, aa] = buffers;
    let (rows, cols) = o.shape();
    let (len, side) = (rows * cols, rows.min(cols));
    let shape =
        LaunchShape { grid: [blocks(len), batch, 1], block: [BLOCK_THREADS, 1, 1], shared: 0 };
    let args = [
        ctx.arenas.gradients.into(),
        ctx.arenas.first_moment.into(),
        x.into(),
        partials.into(),
        offsets.into(),
        (len as u64).into(),
        params.into(),
        o.momentum.into(),
    ];
    ctx.launch(families::MUON_MOMENTUM, shape, &args)?;
    let args = [x.into(), partials.into(), x.into(), (len as u64).into(), int(shape.grid[0])];
    ctx.launch(families::MUON_NORMALIZE, shape, &args)?;

    let matrix = |at, rows, cols| Matrix::new(at, Dtype::F32, rows, cols);
    let (x_matrix, bx_matrix) = (matrix(x, rows, cols), matrix(bx, rows, cols));
    let (a_matrix, aa_matrix) = (matrix(a, side, side), matrix(aa, side, side));
    let axpby = |ctx: &mut LaunchContext, x: Address, y: Address, [a, b]: [f32; 2], len: usize| {
        let count = batch * len;
        let args = [x.into(), y.into(), x.into(), a.into(), b.into(), (count as u64).into()];
        ctx.launch(families::MUON_AXPBY, LaunchShape::linear(blocks(count), BLOCK_THREADS), &args)
    };
    for _ in 0..ITERATIONS {
        // A tall matrix is treated as its transpose; A is symmetric either way.
        let tall = rows > cols;
        if tall {
            ctx.batched_matmul(batch, x_matrix.t(), x_matrix, a_matrix)?;
        } else {
            ctx.batched_matmul(batch, x_matrix, x_matrix.t(), a_matrix)?;
        }
        ctx.batched_matmul(batch, a_matrix, a_matrix, aa_matrix)?;
        let [a_coeff, b_coeff, c_coeff] = NEWTON_SCHULZ;
        axpby(ctx, a, aa, [b_coeff, c_coeff], side * side)?;
        if tall {
            ctx.batched_matmul(batch, x_matrix, a_matrix, bx_matrix)?;
        } else {
            ctx.batched_matmul(batch, a_matrix, x_matrix, bx_matrix)?;
        }
        axpby(ctx, x, bx, [a_coeff, 1.0], len)?;
    }

    let copies = if ctx.dtype == Dtype::F32 { Address::NULL } else { ctx.arenas.weights };
    let args = [
        x.into(),
        ctx.arenas.parameters.into(),
        copies.into(),
        offsets.into(),
        (len as u64).into(),
        params.into(),
        o.weight_decay.into(),
        (rows as f64 / cols as f64).max(1.0).sqrt().into(),
    ];
    ctx.launch_for_dtype(&families::MUON_UPDATE, shape, &args)
}
