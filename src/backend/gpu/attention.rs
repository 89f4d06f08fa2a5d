//! Attention forward, backward and decode: `kernels/attention_*.cu`, `kernels/flash_attention.cu`.

use super::AttentionChoice;
use super::launch_context::{LaunchContext, LaunchShape, int, scratch, sizes};
use crate::device::Arg;
use crate::dtype::Dtype;
use crate::llama::ops::{Attention, AttentionBackward, AttentionDecode, AttentionShape};

/// Largest head_dim of the kernels.
pub(super) const MAX_HEAD_DIM: usize = 256;

/// One of the three kernels of attention and its backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AttentionPass {
    Forward,
    /// dq.
    BackwardDq,
    /// dk and dv.
    BackwardDkdv,
}

/// Family of attention kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AttentionKernel {
    /// Any head_dim and dtype.
    Generic,
    /// head_dim 2, 4 or 8: f32 arithmetic, rows in registers.
    SmallHead,
    /// head_dim 2 or 4 on tensor cores, operands split in two TF32 parts.
    SmallHeadTf32,
    /// FlashAttention-2 on tensor cores.
    Flash,
}

impl AttentionKernel {
    /// Fastest kernels for a shape and dtype that the choice allows.
    fn of(shape: &AttentionShape, dtype: Dtype, choice: AttentionChoice) -> AttentionKernel {
        match shape.head_dim {
            _ if choice == AttentionChoice::Generic => AttentionKernel::Generic,
            // At head_dim 2 tensor cores are faster only while rows are too few to fill a GPU: timed on an
            // H200.
            d @ (2 | 4)
                if dtype != Dtype::F32
                    && choice == AttentionChoice::Auto
                    && (d == 4 || !fills_gpu(shape, 128)) =>
            {
                AttentionKernel::SmallHeadTf32
            }
            2 | 4 | 8 => AttentionKernel::SmallHead,
            16 | 32 | 64 | 96 | 128 if dtype != Dtype::F32 => AttentionKernel::Flash,
            _ => AttentionKernel::Generic,
        }
    }

    /// Entry name without the dtype.
    fn entry(self, pass: AttentionPass, shape: &AttentionShape) -> String {
        let d = shape.head_dim;
        let name = match pass {
            AttentionPass::Forward => "",
            AttentionPass::BackwardDq => "_backward_dq",
            AttentionPass::BackwardDkdv => "_backward_dkdv",
        };
        match self {
            AttentionKernel::Generic => format!("attention_generic{name}"),
            AttentionKernel::SmallHead => {
                format!("attention_smallhead{name}_{d}_{}", rows_per_lane(pass, shape))
            }
            AttentionKernel::SmallHeadTf32 => {
                format!("attention_smallhead_tf32{name}_{d}_{}", row_blocks_per_warp(pass, shape))
            }
            AttentionKernel::Flash => format!("flash_attention{name}_{d}"),
        }
    }

    /// Launch geometry.
    fn launch(self, pass: AttentionPass, shape: &AttentionShape) -> LaunchShape {
        let d = shape.head_dim;
        let heads = if pass == AttentionPass::BackwardDkdv { shape.kv_heads } else { shape.heads };
        // Blocks of so many rows of a head, over all heads of the batch.
        let blocks_of = |rows: usize| shape.batch * heads * shape.seq_len.div_ceil(rows);
        match self {
            AttentionKernel::Generic => {
                let (stationary, tile) = (16, 32);
                let shared = 4 * (2 * stationary * d + 2 * tile * (d | 1));
                LaunchShape { shared, ..LaunchShape::linear(blocks_of(stationary), 128) }
            }
            AttentionKernel::SmallHead => {
                let rows = rows_per_lane(pass, shape);
                match pass {
                    // One block of rows per warp, four warps per block.
                    AttentionPass::Forward | AttentionPass::BackwardDq => {
                        LaunchShape::linear(blocks_of(32 * rows).div_ceil(4), 128)
                    }
                    AttentionPass::BackwardDkdv => {
                        let max_warps = if rows == 1 { 8 } else { 4 };
                        LaunchShape::linear(blocks_of(32 * rows), 32 * shape.group().min(max_warps))
                    }
                }
            }
            AttentionKernel::SmallHeadTf32 => {
                let rows = 16 * row_blocks_per_warp(pass, shape);
                match pass {
                    AttentionPass::Forward | AttentionPass::BackwardDq => {
                        LaunchShape::linear(blocks_of(rows).div_ceil(4), 128)
                    }
                    AttentionPass::BackwardDkdv => {
                        let max_warps = if rows == 16 { 8 } else { 4 };
                        LaunchShape::linear(blocks_of(rows), 32 * shape.group().min(max_warps))
                    }
                }
            }
            AttentionKernel::Flash => {
                // Rows per block and per tile: the same table as `tile_config` in the kernel file.
                let (stationary, tile, planes) = match pass {
                    AttentionPass::Forward if d <= 32 => (64, 64, 1),
                    AttentionPass::Forward => (128, if d <= 64 { 64 } else { 32 }, 1),
                    AttentionPass::BackwardDq if d <= 32 => (64, 64, 2),
                    AttentionPass::BackwardDq => (if d <= 64 { 128 } else { 64 }, 32, 2),
                    AttentionPass::BackwardDkdv => (64, if d <= 64 { 64 } else { 48 }, 2),
                };
                let stats_bytes = if pass == AttentionPass::BackwardDkdv { 24 * tile } else { 0 };
                let shared = (planes * stationary + 4 * tile) * (2 * d + 16) + stats_bytes;
                LaunchShape { shared, ..LaunchShape::linear(blocks_of(stationary), 128) }
            }
        }
    }

    fn run(
        self,
        ctx: &mut LaunchContext,
        pass: AttentionPass,
        shape: &AttentionShape,
        mut args: Vec<Arg>,
    ) -> anyhow::Result<()> {
        args.extend(sizes(shape));
        if self != AttentionKernel::Generic {
            // head_dim is part of the entry name.
            args.pop();
        }
        ctx.launch_for_dtype(&self.entry(pass, shape), self.launch(pass, shape), &args)
    }
}

/// Warps that fill a GPU of 132 SMs: two per scheduler, four schedulers per SM.
const MIN_WARPS: usize = 2 * 4 * 132;

/// True if warps of so many rows are enough to fill a GPU. Depends on the shape alone, so that every GPU
/// adds in the same order. The dk and dv pass also has a warp per query head.
fn fills_gpu(shape: &AttentionShape, rows_per_warp: usize) -> bool {
    shape.batch * shape.heads * shape.seq_len.div_ceil(rows_per_warp) >= MIN_WARPS
}

/// Rows per lane of the SmallHead kernels: several amortize the loads, one gives the most warps.
fn rows_per_lane(pass: AttentionPass, shape: &AttentionShape) -> usize {
    let several = if pass != AttentionPass::Forward && shape.head_dim == 8 { 2 } else { 4 };
    if fills_gpu(shape, 32 * several) { several } else { 1 }
}

/// 16-row blocks per warp of the SmallHeadTf32 kernels, by the same rule as [`rows_per_lane`].
fn row_blocks_per_warp(pass: AttentionPass, shape: &AttentionShape) -> usize {
    let several = if pass == AttentionPass::BackwardDkdv && shape.head_dim == 2 { 8 } else { 4 };
    if fills_gpu(shape, 16 * several) { several } else { 1 }
}

pub(super) fn forward(ctx: &mut LaunchContext, o: &Attention) -> anyhow::Result<()> {
    let args = [o.q, o.k, o.v, o.first_key, o.out, o.lse].map(|buffer| ctx.ptr(buffer).into());
    let kernel = AttentionKernel::of(&o.shape, ctx.dtype, ctx.options.attention);
    kernel.run(ctx, AttentionPass::Forward, &o.shape, args.to_vec())
}

pub(super) fn workspace(o: &AttentionBackward) -> usize {
    scratch([4 * o.shape.rows() * o.shape.heads])
}

pub(super) fn backward(ctx: &mut LaunchContext, o: &AttentionBackward) -> anyhow::Result<()> {
    let shape = &o.shape;
    let AttentionShape { batch, seq_len, heads, head_dim, .. } = *shape;
    let rows = shape.rows() * heads;
    let delta = ctx.scratch_alloc(4 * rows);
    let width = head_dim.next_power_of_two().min(32);
    let rows_per_block = 256 / width;
    let grid = [rows.div_ceil(rows_per_block).min(4096), 1, 1];
    let args = [
        ctx.ptr(o.out).into(),
        ctx.ptr(o.dout).into(),
        delta.into(),
        int(batch),
        int(seq_len),
        int(heads),
        int(head_dim),
    ];
    ctx.launch_for_dtype(
        "attention_delta",
        LaunchShape { grid, block: [width, rows_per_block, 1], shared: 0 },
        &args,
    )?;

    let kernel = AttentionKernel::of(shape, ctx.dtype, ctx.options.attention);
    let mut inputs: Vec<Arg> =
        [o.q, o.k, o.v, o.first_key, o.lse].map(|buffer| ctx.ptr(buffer).into()).to_vec();
    inputs.extend([Arg::from(delta), ctx.ptr(o.dout).into()]);
    let mut args = inputs.clone();
    args.push(ctx.ptr(o.dq).into());
    kernel.run(ctx, AttentionPass::BackwardDq, shape, args)?;
    let mut args = inputs;
    args.extend([Arg::from(ctx.ptr(o.dk)), ctx.ptr(o.dv).into()]);
    kernel.run(ctx, AttentionPass::BackwardDkdv, shape, args)
}

pub(super) fn decode(ctx: &mut LaunchContext, o: &AttentionDecode) -> anyhow::Result<()> {
    let mut args: Vec<Arg> = [o.q, o.k, o.v, o.start].map(|buffer| ctx.ptr(buffer).into()).to_vec();
    let cache = |offset: usize| ctx.arenas.cache.plus(offset * ctx.dtype.size());
    args.extend([Arg::from(cache(o.keys)), cache(o.values).into(), ctx.ptr(o.out).into()]);
    args.extend(sizes(&o.shape));
    args.push(int(o.capacity));
    let rows = o.shape.rows() * o.shape.heads;
    ctx.launch_for_dtype("attention_decode", LaunchShape::linear(rows, 128), &args)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_chosen_by_head_dim_dtype_and_choice() {
        let kernel = |head_dim, dtype, choice| {
            let shape = AttentionShape { batch: 1, seq_len: 9, heads: 2, kv_heads: 1, head_dim };
            AttentionKernel::of(&shape, dtype, choice)
        };
        let original =
            |batch| AttentionShape { batch, seq_len: 512, heads: 32, kv_heads: 4, head_dim: 2 };
        for (batch, expected) in
            [(1, AttentionKernel::SmallHeadTf32), (64, AttentionKernel::SmallHead)]
        {
            let shape = original(batch);
            assert_eq!(AttentionKernel::of(&shape, Dtype::Bf16, AttentionChoice::Auto), expected);
        }
        for head_dim in [2, 4] {
            assert_eq!(
                kernel(head_dim, Dtype::Bf16, AttentionChoice::Auto),
                AttentionKernel::SmallHeadTf32
            );
            assert_eq!(
                kernel(head_dim, Dtype::F16, AttentionChoice::Auto),
                AttentionKernel::SmallHeadTf32
            );
            assert_eq!(
                kernel(head_dim, Dtype::Bf16, AttentionChoice::NoTensorCores),
                AttentionKernel::SmallHead
            );
            assert_eq!(
                kernel(head_dim, Dtype::F32, AttentionChoice::Auto),
                AttentionKernel::SmallHead
            );
            assert_eq!(
                kernel(head_dim, Dtype::Bf16, AttentionChoice::Generic),
                AttentionKernel::Generic
            );
        }
        assert_eq!(kernel(8, Dtype::Bf16, AttentionChoice::Auto), AttentionKernel::SmallHead);
        assert_eq!(kernel(64, Dtype::Bf16, AttentionChoice::NoTensorCores), AttentionKernel::Flash);
        assert_eq!(kernel(64, Dtype::F32, AttentionChoice::Auto), AttentionKernel::Generic);
    }
}
