//! Attention there, back, and over a cache: `kernels/attention*.cu`.

use super::Attention as Way;
use super::launch_context::{LaunchContext, LaunchShape, int, scratch, sizes};
use crate::device::Arg;
use crate::dtype::Dtype;
use crate::llama::ops::{Attention, AttentionBackward, AttentionDecode, AttentionShape};

/// The longest head the kernels take.
pub(super) const MOST_HEAD_DIM: usize = 256;

/// A run of one of the three kernels that an attention needs there and back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pass {
    Forward,
    BackwardQ,
    BackwardKv,
}

/// A way to compute an attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Path {
    /// Any head_dim, any numbers.
    Plain,
    /// f32 arithmetic with rows in registers: heads too narrow for a tensor core.
    Narrow,
    /// Tensor cores all the same: what narrow heads leave empty makes their scores exact.
    NarrowMma,
    /// Tensor cores.
    Mma,
}

impl Path {
    /// The fastest there is of those that are asked for.
    fn of(shape: &AttentionShape, dtype: Dtype, way: Way) -> Path {
        match shape.head_dim {
            _ if way == Way::Plain => Path::Plain,
            2 | 4 if dtype != Dtype::F32 && way == Way::Auto => Path::NarrowMma,
            2 | 4 | 8 => Path::Narrow,
            16 | 32 | 64 | 96 | 128 if dtype != Dtype::F32 => Path::Mma,
            _ => Path::Plain,
        }
    }

    fn family(self, pass: Pass, shape: &AttentionShape) -> String {
        let d = shape.head_dim;
        let name = match pass {
            Pass::Forward => "",
            Pass::BackwardQ => "_backward_dq",
            Pass::BackwardKv => "_backward_dkdv",
        };
        match self {
            Path::Plain => format!("attention_generic{name}"),
            Path::Narrow => format!("attention_smallhead{name}_{d}_{}", rows_a_lane(pass, shape)),
            Path::NarrowMma => {
                format!("attention_smallhead_tf32{name}_{d}_{}", blocks_a_warp(pass, shape))
            }
            Path::Mma => format!("flash_attention{name}_{d}"),
        }
    }

    fn launch(self, pass: Pass, shape: &AttentionShape) -> LaunchShape {
        let d = shape.head_dim;
        let heads = if pass == Pass::BackwardKv { shape.kv_heads } else { shape.heads };
        // Runs of so many rows of a head, one after another.
        let runs = |rows: usize| shape.batch * heads * shape.seq_len.div_ceil(rows);
        match self {
            Path::Plain => {
                let (own, tile) = (16, 32);
                let shared = 4 * (2 * own * d + 2 * tile * (d | 1));
                LaunchShape { shared, ..LaunchShape::linear(runs(own), 128) }
            }
            Path::Narrow => {
                let rows = rows_a_lane(pass, shape);
                match pass {
                    // Each warp takes a run of its own.
                    Pass::Forward | Pass::BackwardQ => {
                        LaunchShape::linear(runs(32 * rows).div_ceil(4), 128)
                    }
                    Pass::BackwardKv => {
                        let most = if rows == 1 { 8 } else { 4 };
                        LaunchShape::linear(runs(32 * rows), 32 * shape.group().min(most))
                    }
                }
            }
            Path::NarrowMma => {
                let rows = 16 * blocks_a_warp(pass, shape);
                match pass {
                    Pass::Forward | Pass::BackwardQ => {
                        LaunchShape::linear(runs(rows).div_ceil(4), 128)
                    }
                    Pass::BackwardKv => {
                        let most = if rows == 16 { 8 } else { 4 };
                        LaunchShape::linear(runs(rows), 32 * shape.group().min(most))
                    }
                }
            }
            Path::Mma => {
                // Rows of a block and of a tile: `tiling` in the kernels' file says the same.
                let (own, tile, planes) = match pass {
                    Pass::Forward => (128, if d == 64 { 64 } else { 32 }, 1),
                    Pass::BackwardQ => (if d <= 64 { 128 } else { 64 }, 32, 2),
                    Pass::BackwardKv => (if d <= 32 { 128 } else { 64 }, 32, 2),
                };
                let statistics = if pass == Pass::BackwardKv { 24 * tile } else { 0 };
                let shared = (planes * own + 4 * tile) * (2 * d + 16) + statistics;
                LaunchShape { shared, ..LaunchShape::linear(runs(own), 128) }
            }
        }
    }

    fn run(
        self,
        ctx: &mut LaunchContext,
        pass: Pass,
        shape: &AttentionShape,
        mut args: Vec<Arg>,
    ) -> anyhow::Result<()> {
        args.extend(sizes(shape));
        if self != Path::Plain {
            // Their names say head_dim.
            args.pop();
        }
        ctx.launch_for_dtype(&self.family(pass, shape), self.launch(pass, shape), &args)
    }
}

/// Warps that make a card of 132 multiprocessors busy: two for each of their four schedulers.
const BUSY: usize = 2 * 4 * 132;

/// Rows that a lane of the narrow path owns: several make the most of a load, one makes the most
/// warps. By the shape alone, so that every card takes the same sums.
fn rows_a_lane(pass: Pass, shape: &AttentionShape) -> usize {
    let several = if pass != Pass::Forward && shape.head_dim == 8 { 2 } else { 4 };
    // The pass to k and v has a warp for every query head too.
    let warps = shape.batch * shape.heads * shape.seq_len.div_ceil(32 * several);
    if warps < BUSY { 1 } else { several }
}

/// Blocks of 16 rows that a warp of the narrow path on tensor cores owns, by the same rule.
fn blocks_a_warp(pass: Pass, shape: &AttentionShape) -> usize {
    let several = if pass == Pass::BackwardKv && shape.head_dim == 2 { 8 } else { 4 };
    let warps = shape.batch * shape.heads * shape.seq_len.div_ceil(16 * several);
    if warps < BUSY { 1 } else { several }
}

pub(super) fn forward(ctx: &mut LaunchContext, o: &Attention) -> anyhow::Result<()> {
    let args = [o.q, o.k, o.v, o.first_key, o.out, o.lse].map(|buffer| ctx.ptr(buffer).into());
    let path = Path::of(&o.shape, ctx.dtype, ctx.options.attention);
    path.run(ctx, Pass::Forward, &o.shape, args.to_vec())
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
    let at_once = 256 / width;
    let grid = [rows.div_ceil(at_once).min(4096), 1, 1];
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
        LaunchShape { grid, block: [width, at_once, 1], shared: 0 },
        &args,
    )?;

    let path = Path::of(shape, ctx.dtype, ctx.options.attention);
    let mut inputs: Vec<Arg> =
        [o.q, o.k, o.v, o.first_key, o.lse].map(|buffer| ctx.ptr(buffer).into()).to_vec();
    inputs.extend([Arg::from(delta), ctx.ptr(o.dout).into()]);
    let mut args = inputs.clone();
    args.push(ctx.ptr(o.dq).into());
    path.run(ctx, Pass::BackwardQ, shape, args)?;
    let mut args = inputs;
    args.extend([Arg::from(ctx.ptr(o.dk)), ctx.ptr(o.dv).into()]);
    path.run(ctx, Pass::BackwardKv, shape, args)
}

pub(super) fn cached(ctx: &mut LaunchContext, o: &AttentionDecode) -> anyhow::Result<()> {
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
    fn narrow_heads_take_tensor_cores_in_two_byte_numbers_unless_told_otherwise() {
        let path = |head_dim, dtype, way| {
            let shape = AttentionShape { batch: 1, seq_len: 9, heads: 2, kv_heads: 1, head_dim };
            Path::of(&shape, dtype, way)
        };
        for head_dim in [2, 4] {
            assert_eq!(path(head_dim, Dtype::Bf16, Way::Auto), Path::NarrowMma);
            assert_eq!(path(head_dim, Dtype::F16, Way::Auto), Path::NarrowMma);
            assert_eq!(path(head_dim, Dtype::Bf16, Way::Scalar), Path::Narrow);
            assert_eq!(path(head_dim, Dtype::F32, Way::Auto), Path::Narrow);
            assert_eq!(path(head_dim, Dtype::Bf16, Way::Plain), Path::Plain);
        }
        assert_eq!(path(8, Dtype::Bf16, Way::Auto), Path::Narrow);
        assert_eq!(path(64, Dtype::Bf16, Way::Scalar), Path::Mma);
        assert_eq!(path(64, Dtype::F32, Way::Auto), Path::Plain);
    }
}
