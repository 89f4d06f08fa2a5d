//! Gradient norm and AdamW: `kernels/grad_norm.cu`, `kernels/adamw.cu`.

use super::launch_context::{LaunchContext, LaunchShape, int, scratch};
use crate::device::Arg;
use crate::dtype::Dtype;
use crate::kernels::families;
use crate::kernels::geometry::{ADAMW_PARAMS_BYTES, BLOCK_THREADS};
use crate::llama::ops::{AdamWStep, GradNorm};

/// Grid limit of the partial sums of the norm. The order of the sum is fixed by the launch, which must not
/// depend on the GPU.
const MAX_BLOCKS: usize = 1024;
/// Elements per chunk of AdamW.
const CHUNK_ELEMENTS: usize = 4096;

pub(super) fn zero_grad(ctx: &mut LaunchContext) -> anyhow::Result<()> {
    ctx.device.memset(ctx.arenas.gradients, 0, 4 * ctx.arenas.len)
}

fn blocks(len: usize) -> usize {
    len.div_ceil(4 * BLOCK_THREADS).min(MAX_BLOCKS)
}

pub(super) fn norm_workspace(len: usize) -> usize {
    scratch([8 * blocks(len)])
}

pub(super) fn grad_norm(ctx: &mut LaunchContext, o: &GradNorm) -> anyhow::Result<()> {
    let len = ctx.arenas.len;
    let blocks = blocks(len);
    let partials = ctx.scratch_alloc(8 * blocks);
    let args = [ctx.arenas.gradients.into(), partials.into(), (len as u64).into()];
    ctx.launch(families::GRAD_NORM_PARTIALS, LaunchShape::linear(blocks, BLOCK_THREADS), &args)?;
    let args = [partials.into(), ctx.scaling.into(), ctx.ptr(o.norm).into(), int(blocks)];
    ctx.launch(families::GRAD_NORM, LaunchShape::linear(1, BLOCK_THREADS), &args)
}

/// Chunks of the ranges: start, count, weight decay.
fn chunks(o: &AdamWStep) -> impl Iterator<Item = (usize, usize, f64)> {
    o.ranges.iter().flat_map(|(range, decay)| {
        let end = range.end;
        range
            .clone()
            .step_by(CHUNK_ELEMENTS)
            .map(move |start| (start, CHUNK_ELEMENTS.min(end - start), *decay))
    })
}

/// Chunks in the layout of `Chunk` in `kernels/adamw.cu`.
pub(super) fn table(o: &AdamWStep) -> Vec<u8> {
    let bytes = |(start, count, decay): (usize, usize, f64)| {
        [(start as u64).to_le_bytes(), (count as u64).to_le_bytes(), decay.to_le_bytes()].concat()
    };
    chunks(o).flat_map(bytes).collect()
}

pub(super) fn adamw_workspace() -> usize {
    scratch([ADAMW_PARAMS_BYTES])
}

pub(super) fn adamw(ctx: &mut LaunchContext, o: &AdamWStep) -> anyhow::Result<()> {
    let params = ctx.scratch_alloc(ADAMW_PARAMS_BYTES);
    let args = [
        ctx.control.learning_rate().into(),
        ctx.control.step().into(),
        ctx.ptr(o.norm).into(),
        ctx.scaling.into(),
        params.into(),
        (o.max_grad_norm as f32).into(),
        o.beta1.into(),
        o.beta2.into(),
    ];
    ctx.launch(families::ADAMW_STEP_PARAMS, LaunchShape::linear(1, 1), &args)?;
    let count = chunks(o).count();
    if count == 0 {
        return Ok(());
    }
    let arenas = ctx.arenas;
    let mut args: Vec<Arg> = vec![
        arenas.gradients.into(),
        arenas.parameters.into(),
        arenas.first_moment.into(),
        arenas.second_moment.into(),
    ];
    if ctx.dtype != Dtype::F32 {
        args.push(arenas.weights.into());
    }
    args.extend([Arg::from(ctx.constant_table()), params.into()]);
    args.extend([o.beta1, o.beta2, o.epsilon].map(Arg::from));
    ctx.launch_for_dtype(&families::ADAMW, LaunchShape::linear(count, BLOCK_THREADS), &args)
}
