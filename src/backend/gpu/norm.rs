//! RMSNorm there and back: `kernels/rms_norm.cu`.

use super::launch_context::{LaunchContext, LaunchShape, int, scratch};
use crate::device::Address;
use crate::dtype::Dtype;
use crate::llama::ops::{RmsNorm, RmsNormBackward};

/// Blocks of the backward at most: each leaves a share of dweight, and the second stage adds them.
const SHARES: usize = 264;
/// Blocks of the forward at most: enough to fill any card.
const BLOCKS: usize = 2048;

/// (threads a row, rows at once): a thread takes 16 bytes at a time where rows allow it.
fn block(hidden: usize, dtype: Dtype) -> (usize, usize) {
    let full = 16 / dtype.size();
    let pieces = if hidden.is_multiple_of(full) { hidden / full } else { hidden };
    let width = pieces.next_power_of_two().min(256);
    (width, 256 / width)
}

pub(super) fn forward(ctx: &mut LaunchContext, o: &RmsNorm) -> anyhow::Result<()> {
    let (rows, hidden) = (ctx.len(o.rstd), o.weight.cols);
    let (width, at_once) = block(hidden, ctx.dtype);
    let grid = rows.div_ceil(at_once).min(BLOCKS);
    let shape = LaunchShape { grid: [grid, 1, 1], block: [width, at_once, 1], shared: 0 };
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

fn shares(rows: usize, at_once: usize) -> usize {
    rows.div_ceil(at_once).min(SHARES)
}

pub(super) fn workspace(o: &RmsNormBackward, rows: usize, dtype: Dtype) -> usize {
    let (_, at_once) = block(o.weight.cols, dtype);
    scratch([4 * shares(rows, at_once) * o.weight.cols])
}

pub(super) fn backward(ctx: &mut LaunchContext, o: &RmsNormBackward) -> anyhow::Result<()> {
    let (rows, hidden) = (ctx.len(o.rstd), o.weight.cols);
    let (width, at_once) = block(hidden, ctx.dtype);
    let grid = shares(rows, at_once);
    let partials = ctx.scratch_alloc(4 * grid * hidden);
    let shape = LaunchShape {
        grid: [grid, 1, 1],
        block: [width, at_once, 1],
        shared: 4 * at_once * hidden,
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
    let shape = LaunchShape { grid: [hidden.div_ceil(32), 1, 1], block: [32, 8, 1], shared: 0 };
    let args = [partials.into(), ctx.gradient_ptr(o.weight).into(), int(grid), int(hidden)];
    ctx.launch("rms_norm_backward_weight", shape, &args)
}
