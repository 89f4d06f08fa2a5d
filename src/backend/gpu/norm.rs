//! RMSNorm forward and backward: `kernels/rms_norm.cu`.

use super::launch_context::{LaunchContext, LaunchShape, int};
use crate::device::Address;
use crate::dtype::Dtype;
use crate::kernels::families;
use crate::kernels::geometry::{BLOCK_THREADS, RMS_NORM_STRIPS, WARP_SIZE};
use crate::llama::ops::{
    MAX_NORM_PARTIALS, RmsNorm, RmsNormBackward, RmsNormBackwardWeight, norm_partials,
};
use crate::model::Span;

/// Grid limit of the forward: enough blocks to fill any GPU.
const MAX_BLOCKS: usize = 2048;

/// (threads per row, rows per block): a thread takes 16 bytes at a time if the hidden size allows it.
fn block(hidden: usize, dtype: Dtype) -> (usize, usize) {
    let width = (hidden / access(hidden, dtype)).next_power_of_two().min(BLOCK_THREADS);
    (width, BLOCK_THREADS / width)
}

/// Values per access.
fn access(hidden: usize, dtype: Dtype) -> usize {
    let vec_len = 16 / dtype.size();
    if hidden.is_multiple_of(vec_len) { vec_len } else { 1 }
}

pub(super) fn forward(ctx: &mut LaunchContext, o: &RmsNorm) -> anyhow::Result<()> {
    let (rows, hidden) = (ctx.len(o.rstd), o.weight.cols);
    let (width, rows_per_block) = block(hidden, ctx.dtype);
    let grid = rows.div_ceil(rows_per_block).min(MAX_BLOCKS);
    let shape = LaunchShape { grid: [grid, 1, 1], block: [width, rows_per_block, 1], shared: 0 };
    let (residual, sum) = match o.add {
        Some(add) => (ctx.ptr(add.residual), ctx.ptr(add.sum)),
        None => (Address::NULL, Address::NULL),
    };
    let args = [
        ctx.ptr(o.x).into(),
        residual.into(),
        ctx.weight_ptr(o.weight).into(),
        sum.into(),
        ctx.ptr(o.y).into(),
        ctx.ptr(o.rstd).into(),
        int(rows),
        int(hidden),
        (o.eps as f32).into(),
    ];
    ctx.launch_for_dtype(&families::RMS_NORM, shape, &args)
}

/// Grid of the backward: each block stores a partial sum of dweight for the second pass to add.
fn partial_blocks(rows: usize, hidden: usize, dtype: Dtype) -> usize {
    let (_, rows_per_block) = block(hidden, dtype);
    rows.div_ceil(rows_per_block).min(MAX_NORM_PARTIALS)
}

/// Start of each weight in the arenas, as the kernel reads it.
pub(super) fn table(weights: &[Span]) -> Vec<u8> {
    weights.iter().flat_map(|w| (w.offset as u64).to_le_bytes()).collect()
}

pub(super) fn backward(ctx: &mut LaunchContext, o: &RmsNormBackward) -> anyhow::Result<()> {
    let (rows, hidden) = (ctx.len(o.rstd), o.weight.cols);
    let (width, rows_per_block) = block(hidden, ctx.dtype);
    let grid = partial_blocks(rows, hidden, ctx.dtype);
    let most = norm_partials(rows, hidden);
    assert!(grid <= most, "`norm_partials` bounds the grid");
    let shape = LaunchShape {
        grid: [grid, 1, 1],
        block: [width, rows_per_block, 1],
        shared: 4 * rows_per_block * hidden.next_multiple_of(width * access(hidden, ctx.dtype)),
    };
    let args = [
        ctx.ptr(o.x).into(),
        ctx.ptr(o.rstd).into(),
        ctx.weight_ptr(o.weight).into(),
        ctx.ptr(o.dy).into(),
        o.dsum.map_or(Address::NULL, |dsum| ctx.ptr(dsum)).into(),
        ctx.ptr(o.dx).into(),
        ctx.ptr(o.partials).plus(4 * o.index * most * hidden).into(),
        int(rows),
        int(hidden),
    ];
    ctx.launch_for_dtype(&families::RMS_NORM_BACKWARD, shape, &args)
}

pub(super) fn backward_weight(
    ctx: &mut LaunchContext,
    o: &RmsNormBackwardWeight,
) -> anyhow::Result<()> {
    let hidden = o.weights[0].cols;
    let shape = LaunchShape {
        grid: [hidden.div_ceil(WARP_SIZE), o.weights.len(), 1],
        block: [WARP_SIZE, RMS_NORM_STRIPS, 1],
        shared: 0,
    };
    let args = [
        ctx.ptr(o.partials).into(),
        ctx.constant_table().into(),
        ctx.arenas.gradients.into(),
        int(partial_blocks(o.rows, hidden, ctx.dtype)),
        int(hidden),
        int(norm_partials(o.rows, hidden)),
    ];
    ctx.launch(families::RMS_NORM_BACKWARD_WEIGHT, shape, &args)
}
