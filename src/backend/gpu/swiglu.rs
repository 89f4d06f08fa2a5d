//! SwiGLU there and back: `kernels/swiglu.cu`.

use super::launch_context::{LaunchContext, LaunchShape, int};
use crate::dtype::Dtype;
use crate::llama::ops::{SwiGlu, SwiGluBackward};

/// Blocks along the rows at most: enough to fill any card.
const BLOCKS: usize = 2048;

fn shape(rows: usize, inter: usize, dtype: Dtype) -> LaunchShape {
    let full = 16 / dtype.size();
    let pieces = if inter.is_multiple_of(full) { inter / full } else { inter };
    let width = pieces.next_power_of_two().min(256);
    let at_once = 256 / width;
    let grid = [pieces.div_ceil(width), rows.div_ceil(at_once).min(BLOCKS), 1];
    LaunchShape { grid, block: [width, at_once, 1], shared: 0 }
}

pub(super) fn forward(ctx: &mut LaunchContext, o: &SwiGlu) -> anyhow::Result<()> {
    let rows = ctx.len(o.out) / o.inter;
    let args = [ctx.ptr(o.gate_up).into(), ctx.ptr(o.out).into(), int(rows), int(o.inter)];
    ctx.launch_for_dtype("swiglu", shape(rows, o.inter, ctx.dtype), &args)
}

pub(super) fn backward(ctx: &mut LaunchContext, o: &SwiGluBackward) -> anyhow::Result<()> {
    let rows = ctx.len(o.dout) / o.inter;
    let args = [
        ctx.ptr(o.gate_up).into(),
        ctx.ptr(o.dout).into(),
        ctx.ptr(o.dgate_up).into(),
        int(rows),
        int(o.inter),
    ];
    ctx.launch_for_dtype("swiglu_backward", shape(rows, o.inter, ctx.dtype), &args)
}
