//! RMSNorm forward and backward: `kernels/rms_norm.cu`.

use super::launch_context::{LaunchContext, LaunchShape, int, scratch};
use crate::device::Address;
use crate::dtype::Dtype;
use crate::llama::ops::{RmsNorm, RmsNormBackward};

/// Grid limit of the backward, eight blocks for each of 132 SMs: each stores a partial sum of dweight for
/// the second pass to add.
const MAX_PARTIALS: usize = 1056;
/// Grid limit of the forward: enough blocks to fill any GPU.
const MAX_BLOCKS: usize = 2048;

/// (threads per row, rows per block): a thread takes 16 bytes at a time if the hidden size allows it.
fn block(hidden: usize, dtype: Dtype) -> (usize, usize) {
    let width = (hidden / access(hidden, dtype)).next_power_of_two().min(256);
    (width, 256 / width)
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
    ctx.launch_for_dtype("rms_norm", shape, &args)
}

fn partial_blocks(rows: usize, rows_per_block: usize) -> usize {
    rows.div_ceil(rows_per_block).min(MAX_PARTIALS)
}

pub(super) fn workspace(o: &RmsNormBackward, rows: usize, dtype: Dtype) -> usize {
    let (_, rows_per_block) = block(o.weight.cols, dtype);
    scratch([4 * partial_blocks(rows, rows_per_block) * o.weight.cols])
}

pub(super) fn backward(ctx: &mut LaunchContext, o: &RmsNormBackward) -> anyhow::Result<()> {
    let (rows, hidden) = (ctx.len(o.rstd), o.weight.cols);
    let (width, rows_per_block) = block(hidden, ctx.dtype);
    let grid = partial_blocks(rows, rows_per_block);
    let partials = ctx.scratch_alloc(4 * grid * hidden);
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
        partials.into(),
        int(rows),
        int(hidden),
    ];
    ctx.launch_for_dtype("rms_norm_backward", shape, &args)?;
    let shape = LaunchShape { grid: [hidden.div_ceil(32), 1, 1], block: [32, 32, 1], shared: 0 };
    let args = [partials.into(), ctx.gradient_ptr(o.weight).into(), int(grid), int(hidden)];
    ctx.launch("rms_norm_backward_weight", shape, &args)
}
