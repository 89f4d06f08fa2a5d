//! RoPE with the split into heads, forward and backward: `kernels/rope.cu`.

use super::launch_context::{LaunchContext, LaunchShape, sizes};
use crate::device::{Address, Arg};
use crate::kernels::families;
use crate::kernels::geometry::{BLOCK_THREADS, WARP_SIZE};
use crate::llama::ops::{AttentionShape, Rope, RopeBackward};

/// Grid limit: enough blocks to fill any GPU.
const MAX_BLOCKS: usize = 4096;

/// `[positions, head_dim / 2, 2]` in f32: cosine and sine of `position * frequency`, from f64.
pub(super) fn table(positions: usize, frequencies: &[f64]) -> Vec<u8> {
    let angles =
        (0..positions).flat_map(|position| frequencies.iter().map(move |f| position as f64 * f));
    let cos_sin = angles.flat_map(|angle| [angle.cos() as f32, angle.sin() as f32]);
    cos_sin.flat_map(f32::to_le_bytes).collect()
}

/// 32 vectors of a head by 8 heads per block.
fn shape(heads: &AttentionShape) -> LaunchShape {
    let strips = (heads.seq_len * heads.head_dim / 2).div_ceil(WARP_SIZE);
    let grid = (heads.batch * strips).min(MAX_BLOCKS);
    LaunchShape { grid: [grid, 1, 1], block: [WARP_SIZE, BLOCK_THREADS / WARP_SIZE, 1], shared: 0 }
}

pub(super) fn forward(ctx: &mut LaunchContext, o: &Rope) -> anyhow::Result<()> {
    let start = o.start.map_or(Address::NULL, |start| ctx.ptr(start));
    let mut args: Vec<Arg> = vec![ctx.ptr(o.qkv).into(), start.into(), ctx.constant_table().into()];
    args.extend([o.q, o.k, o.v].map(|buffer| Arg::from(ctx.ptr(buffer))));
    args.extend(sizes(&o.shape));
    ctx.launch_for_dtype(&families::ROPE, shape(&o.shape), &args)
}

pub(super) fn backward(ctx: &mut LaunchContext, o: &RopeBackward) -> anyhow::Result<()> {
    let mut args: Vec<Arg> = [o.dq, o.dk, o.dv].map(|buffer| Arg::from(ctx.ptr(buffer))).to_vec();
    args.extend([Arg::from(ctx.constant_table()), ctx.ptr(o.dqkv).into()]);
    args.extend(sizes(&o.shape));
    ctx.launch_for_dtype(&families::ROPE_BACKWARD, shape(&o.shape), &args)
}
