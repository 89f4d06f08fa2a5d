//! SwiGLU forward and backward: `kernels/swiglu.cu`.

use super::launch_context::{LaunchContext, LaunchShape, int};
use crate::dtype::Dtype;
use crate::kernels::families;
use crate::kernels::geometry::BLOCK_THREADS;
use crate::llama::ops::{SwiGlu, SwiGluBackward};

/// Grid limit along the rows: enough blocks to fill any GPU.
const MAX_ROW_BLOCKS: usize = 2048;

fn shape(rows: usize, inter: usize, dtype: Dtype) -> LaunchShape {
    let vec_len = 16 / dtype.size();
    let vectors = if inter.is_multiple_of(vec_len) { inter / vec_len } else { inter };
    let width = vectors.next_power_of_two().min(BLOCK_THREADS);
    let rows_per_block = BLOCK_THREADS / width;
    let grid = [vectors.div_ceil(width), rows.div_ceil(rows_per_block).min(MAX_ROW_BLOCKS), 1];
    LaunchShape { grid, block: [width, rows_per_block, 1], shared: 0 }
}

pub(super) fn forward(ctx: &mut LaunchContext, o: &SwiGlu) -> anyhow::Result<()> {
    let rows = ctx.len(o.out) / o.inter;
    let args = [ctx.ptr(o.gate_up).into(), ctx.ptr(o.out).into(), int(rows), int(o.inter)];
    ctx.launch_for_dtype(&families::SWIGLU, shape(rows, o.inter, ctx.dtype), &args)
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
    ctx.launch_for_dtype(&families::SWIGLU_BACKWARD, shape(rows, o.inter, ctx.dtype), &args)
}
