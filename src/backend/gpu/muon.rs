//! Muon: `kernels/muon.cu`, and products of the device between; all matrices of a shape together.
//!
//! In f32 whatever the session's numbers are, as the other backends have it: the matrices are small
//! beside the batch, and the update is not what mixed precision is for.

use super::launch_context::{LaunchContext, LaunchShape, int, scratch};
use crate::device::{Address, Matrix};
use crate::dtype::Dtype;
use crate::llama::ops::MuonStep;

/// Blocks a matrix at most. The order of the sum of squares is that of the launch, and must not
/// depend on the card.
const BLOCKS: usize = 512;
/// Elements that are stepped together at most: what more would take of scratch costs more than the
/// launches it saves.
const TOGETHER: usize = 1 << 24;
/// Bytes of `Rates` in `kernels/muon.cu`.
const RATES: usize = 16;
/// Newton-Schulz's coefficients, and how often it is done.
const FACTORS: [f32; 3] = [3.4445, -4.775, 2.0315];
const ITERATIONS: usize = 5;

fn blocks(len: usize) -> usize {
    len.div_ceil(4 * 256).min(BLOCKS)
}

/// How many matrices are stepped together.
fn together(o: &MuonStep) -> usize {
    let (rows, cols) = o.shape();
    (TOGETHER / (rows * cols)).clamp(1, o.matrices.len())
}

/// Rates, shares of the sums of squares, X, B X, A, A A.
fn pieces(o: &MuonStep) -> [usize; 6] {
    let ((rows, cols), count) = (o.shape(), together(o));
    let (len, side) = (rows * cols, rows.min(cols));
    let (all, squares) = (4 * count * len, 4 * count * side * side);
    [RATES, 8 * count * blocks(len), all, all, squares, squares]
}

pub(super) fn workspace(o: &MuonStep) -> usize {
    scratch(pieces(o))
}

/// Where each matrix begins in the arenas, as the kernels read it.
pub(super) fn table(o: &MuonStep) -> Vec<u8> {
    o.matrices.iter().flat_map(|w| (w.offset as u64).to_le_bytes()).collect()
}

pub(super) fn step(ctx: &mut LaunchContext, o: &MuonStep) -> anyhow::Result<()> {
    let pieces = pieces(o).map(|bytes| ctx.scratch_alloc(bytes));
    let rates = pieces[0];
    let args = [
        ctx.control.muon_learning_rate().into(),
        ctx.ptr(o.norm).into(),
        ctx.scaling.into(),
        rates.into(),
        (o.max_grad_norm as f32).into(),
    ];
    ctx.launch("muon_step_params", LaunchShape::linear(1, 1), &args)?;
    let at_once = together(o);
    for first in (0..o.matrices.len()).step_by(at_once) {
        let batch = at_once.min(o.matrices.len() - first);
        some(ctx, o, pieces, ctx.constant_table().plus(8 * first), batch)?;
    }
    Ok(())
}

/// The step of `batch` matrices, which begin where `offsets` says.
fn some(
    ctx: &mut LaunchContext,
    o: &MuonStep,
    pieces: [Address; 6],
    offsets: Address,
    batch: usize,
) -> anyhow::Result<()> {
    let [rates, shares, x, bx, a, aa] = pieces;
    let (rows, cols) = o.shape();
    let (len, side) = (rows * cols, rows.min(cols));
    let shape = LaunchShape { grid: [blocks(len), batch, 1], block: [256, 1, 1], shared: 0 };
    let args = [
        ctx.arenas.gradients.into(),
        ctx.arenas.first_moment.into(),
        x.into(),
        shares.into(),
        offsets.into(),
        (len as u64).into(),
        rates.into(),
        o.momentum.into(),
    ];
    ctx.launch("muon_momentum", shape, &args)?;
    let args = [x.into(), shares.into(), x.into(), (len as u64).into(), int(shape.grid[0])];
    ctx.launch("muon_normalize", shape, &args)?;

    let matrix = |at, rows, cols| Matrix::new(at, Dtype::F32, rows, cols);
    let (x_matrix, bx_matrix) = (matrix(x, rows, cols), matrix(bx, rows, cols));
    let (a_matrix, aa_matrix) = (matrix(a, side, side), matrix(aa, side, side));
    let combine = |ctx: &mut LaunchContext, x: Address, y: Address, of: [f32; 2], len: usize| {
        let count = batch * len;
        let args =
            [x.into(), y.into(), x.into(), of[0].into(), of[1].into(), (count as u64).into()];
        ctx.launch("muon_axpby", LaunchShape::linear(blocks(count), 256), &args)
    };
    for _ in 0..ITERATIONS {
        // A tall matrix stands for its transpose; A is symmetric either way.
        let tall = rows > cols;
        if tall {
            ctx.batched_matmul(batch, x_matrix.t(), x_matrix, a_matrix)?;
        } else {
            ctx.batched_matmul(batch, x_matrix, x_matrix.t(), a_matrix)?;
        }
        ctx.batched_matmul(batch, a_matrix, a_matrix, aa_matrix)?;
        let [of_x, of_a, of_aa] = FACTORS;
        combine(ctx, a, aa, [of_a, of_aa], side * side)?;
        if tall {
            ctx.batched_matmul(batch, x_matrix, a_matrix, bx_matrix)?;
        } else {
            ctx.batched_matmul(batch, a_matrix, x_matrix, bx_matrix)?;
        }
        combine(ctx, x, bx, [of_x, 1.0], len)?;
    }

    let copies = if ctx.dtype == Dtype::F32 { Address::NULL } else { ctx.arenas.weights };
    let args = [
        x.into(),
        ctx.arenas.parameters.into(),
        copies.into(),
        offsets.into(),
        (len as u64).into(),
        rates.into(),
        o.weight_decay.into(),
        (rows as f64 / cols as f64).max(1.0).sqrt().into(),
    ];
    ctx.launch_for_dtype("muon_update", shape, &args)
}
