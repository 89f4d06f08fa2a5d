//! Attention forward, backward and decode: `kernels/attention_*.cu`, `kernels/flash_attention.cu`.

use super::AttentionChoice;
use super::launch_context::{LaunchContext, LaunchShape, int, scratch, sizes};
use crate::device::Arg;
use crate::dtype::Dtype;
use crate::kernels::geometry::{
    BLOCK_THREADS, DECODE_THREADS, FLASH_TILES, GENERIC_ROWS, GENERIC_WARPS, MMA_ROWS,
    SMALLHEAD_DKDV_WARPS, SMALLHEAD_WARPS, WARP_SIZE,
};
use crate::kernels::{Family, Kernel, families};
use crate::llama::ops::{Attention, AttentionBackward, AttentionDecode, AttentionShape};

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

    /// The kernel of a pass.
    fn kernel(
        self,
        pass: AttentionPass,
        shape: &AttentionShape,
        dtype: Dtype,
    ) -> anyhow::Result<Kernel> {
        let d = shape.head_dim;
        let pick = |[forward, dq, dkdv]: [&'static Family; 3]| match pass {
            AttentionPass::Forward => forward,
            AttentionPass::BackwardDq => dq,
            AttentionPass::BackwardDkdv => dkdv,
        };
        match self {
            AttentionKernel::Generic => pick([
                &families::ATTENTION_GENERIC,
                &families::ATTENTION_GENERIC_BACKWARD_DQ,
                &families::ATTENTION_GENERIC_BACKWARD_DKDV,
            ])
            .of(dtype),
            AttentionKernel::SmallHead => pick([
                &families::ATTENTION_SMALLHEAD,
                &families::ATTENTION_SMALLHEAD_BACKWARD_DQ,
                &families::ATTENTION_SMALLHEAD_BACKWARD_DKDV,
            ])
            .sized(&[d, rows_per_lane(pass, shape)], dtype),
            AttentionKernel::SmallHeadTf32 => pick([
                &families::ATTENTION_SMALLHEAD_TF32,
                &families::ATTENTION_SMALLHEAD_TF32_BACKWARD_DQ,
                &families::ATTENTION_SMALLHEAD_TF32_BACKWARD_DKDV,
            ])
            .sized(&[d, row_blocks_per_warp(pass, shape)], dtype),
            AttentionKernel::Flash => pick([
                &families::FLASH_ATTENTION,
                &families::FLASH_ATTENTION_BACKWARD_DQ,
                &families::FLASH_ATTENTION_BACKWARD_DKDV,
            ])
            .sized(&[d], dtype),
        }
    }

    /// Launch geometry.
    fn launch(self, pass: AttentionPass, shape: &AttentionShape) -> LaunchShape {
        let d = shape.head_dim;
        let heads = if pass == AttentionPass::BackwardDkdv { shape.kv_heads } else { shape.heads };
        // Blocks of so many rows of a head, over all heads of the batch.
        let blocks_of = |rows: usize| shape.batch * heads * shape.seq_len.div_ceil(rows);
        // In the forward and dq passes a warp has rows of its own; in the dk and dv pass the warps of a
        // block share theirs.
        let small_head = |rows_per_warp: usize, several: bool| match pass {
            AttentionPass::Forward | AttentionPass::BackwardDq => LaunchShape::linear(
                blocks_of(rows_per_warp).div_ceil(SMALLHEAD_WARPS),
                WARP_SIZE * SMALLHEAD_WARPS,
            ),
            AttentionPass::BackwardDkdv => {
                let warps = shape.group().min(SMALLHEAD_DKDV_WARPS[usize::from(several)]);
                LaunchShape::linear(blocks_of(rows_per_warp), WARP_SIZE * warps)
            }
        };
        match self {
            AttentionKernel::Generic => {
                let (stationary, tile) = (GENERIC_WARPS * GENERIC_ROWS, WARP_SIZE);
                let shared = 4 * (2 * stationary * d + 2 * tile * (d | 1));
                let threads = GENERIC_WARPS * WARP_SIZE;
                LaunchShape { shared, ..LaunchShape::linear(blocks_of(stationary), threads) }
            }
            AttentionKernel::SmallHead => {
                let rows = rows_per_lane(pass, shape);
                small_head(WARP_SIZE * rows, rows > 1)
            }
            AttentionKernel::SmallHeadTf32 => {
                let blocks = row_blocks_per_warp(pass, shape);
                small_head(MMA_ROWS * blocks, blocks > 1)
            }
            AttentionKernel::Flash => {
                let [warps, row_blocks, tile, ..] = flash_tile(pass, d);
                let stationary = warps * row_blocks * MMA_ROWS;
                // The dk and dv pass streams q and dout with two statistics of each row.
                let (planes, stats_bytes) = match pass {
                    AttentionPass::Forward => (1, 0),
                    AttentionPass::BackwardDq => (2, 0),
                    AttentionPass::BackwardDkdv => (2, 24 * tile),
                };
                let shared = (planes * stationary + 4 * tile) * (2 * d + 16) + stats_bytes;
                let threads = warps * WARP_SIZE;
                LaunchShape { shared, ..LaunchShape::linear(blocks_of(stationary), threads) }
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
        ctx.launch(self.kernel(pass, shape, ctx.dtype)?, self.launch(pass, shape), &args)
    }
}

/// Entry of [`FLASH_TILES`].
fn flash_tile(pass: AttentionPass, head_dim: usize) -> [usize; 5] {
    FLASH_TILES[pass as usize][match head_dim {
        ..=32 => 0,
        33..=64 => 1,
        _ => 2,
    }]
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
    if fills_gpu(shape, WARP_SIZE * several) { several } else { 1 }
}

/// 16-row blocks per warp of the SmallHeadTf32 kernels, by the same rule as [`rows_per_lane`].
fn row_blocks_per_warp(pass: AttentionPass, shape: &AttentionShape) -> usize {
    let several = if pass == AttentionPass::BackwardDkdv && shape.head_dim == 2 { 8 } else { 4 };
    if fills_gpu(shape, MMA_ROWS * several) { several } else { 1 }
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
    let width = head_dim.next_power_of_two().min(WARP_SIZE);
    let rows_per_block = BLOCK_THREADS / width;
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
        &families::ATTENTION_DELTA,
        LaunchShape { grid, block: [width, rows_per_block, 1], shared: 0 },
        &args,
    )?;

    let kernel = AttentionKernel::of(shape, ctx.dtype, ctx.options.attention);
    let mut inputs: Vec<Arg> =
        [o.q, o.k, o.v, o.first_key, o.lse].map(|buffer| ctx.ptr(buffer).into()).to_vec();
    inputs.extend([Arg::from(delta), ctx.ptr(o.dout).into()]);
    let dq_args = [&inputs[..], &[ctx.ptr(o.dq).into()]].concat();
    let dkdv_args = [&inputs[..], &[ctx.ptr(o.dk).into(), ctx.ptr(o.dv).into()]].concat();
    ctx.side_by_side(
        |ctx| kernel.run(ctx, AttentionPass::BackwardDq, shape, dq_args),
        |ctx| kernel.run(ctx, AttentionPass::BackwardDkdv, shape, dkdv_args),
    )
}

pub(super) fn decode(ctx: &mut LaunchContext, o: &AttentionDecode) -> anyhow::Result<()> {
    let mut args: Vec<Arg> = [o.q, o.k, o.v, o.start].map(|buffer| ctx.ptr(buffer).into()).to_vec();
    let cache = |offset: usize| ctx.arenas.cache.plus(offset * ctx.dtype.size());
    args.extend([Arg::from(cache(o.keys)), cache(o.values).into(), ctx.ptr(o.out).into()]);
    args.extend(sizes(&o.shape));
    args.push(int(o.capacity));
    let rows = o.shape.rows() * o.shape.heads;
    ctx.launch_for_dtype(
        &families::ATTENTION_DECODE,
        LaunchShape::linear(rows, DECODE_THREADS),
        &args,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_of_flash_attention_has_the_tiles() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/kernels/flash_attention.md");
        let page = std::fs::read_to_string(path).unwrap();
        for (head_dims, d) in [("16, 32", 32), ("64", 64), ("96, 128", 128)] {
            let row =
                [AttentionPass::Forward, AttentionPass::BackwardDq, AttentionPass::BackwardDkdv]
                    .map(|pass| {
                        let [warps, row_blocks, tile, _, keeps] = flash_tile(pass, d);
                        let mark = if keeps == 1 { " k" } else { "" };
                        format!("{}, {tile}{mark}", warps * row_blocks * MMA_ROWS)
                    });
            let row = format!("| {head_dims} | {} |", row.join(" | "));
            assert!(page.contains(&row), "docs/kernels/flash_attention.md lacks {row:?}");
        }
    }

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
