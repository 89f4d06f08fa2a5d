//! Rotary embedding with the split into heads, and back: `kernels/rope.cu`.

use super::launcher::{Launcher, Shape, sizes};
use crate::device::{Address, Arg};
use crate::llama::ops::{AttentionShape, Rope, RopeBackward};

/// Blocks at most: enough to fill any card.
const BLOCKS: usize = 4096;

/// `[positions, head_dim / 2, 2]` in f32: cosine and sine of `position * frequency`, from f64.
pub(super) fn table(positions: usize, frequencies: &[f64]) -> Vec<u8> {
    let angles =
        (0..positions).flat_map(|position| frequencies.iter().map(move |f| position as f64 * f));
    let turns = angles.flat_map(|angle| [angle.cos() as f32, angle.sin() as f32]);
    turns.flat_map(f32::to_le_bytes).collect()
}

/// 32 pieces of a head's columns by 8 heads.
fn shape(heads: &AttentionShape) -> Shape {
    let strips = (heads.seq_len * heads.head_dim / 2).div_ceil(32);
    let grid = (heads.batch * strips).min(BLOCKS);
    Shape { grid: [grid, 1, 1], block: [32, 8, 1], shared: 0 }
}

pub(super) fn forward(l: &mut Launcher, o: &Rope) -> anyhow::Result<()> {
    let start = o.start.map_or(Address::NULL, |start| l.at(start));
    let mut args: Vec<Arg> = vec![l.at(o.qkv).into(), start.into(), l.table().into()];
    args.extend([o.q, o.k, o.v].map(|buffer| Arg::from(l.at(buffer))));
    args.extend(sizes(&o.shape));
    l.typed("rope", shape(&o.shape), &args)
}

pub(super) fn backward(l: &mut Launcher, o: &RopeBackward) -> anyhow::Result<()> {
    let mut args: Vec<Arg> = [o.dq, o.dk, o.dv].map(|buffer| Arg::from(l.at(buffer))).to_vec();
    args.extend([Arg::from(l.table()), l.at(o.dqkv).into()]);
    args.extend(sizes(&o.shape));
    l.typed("rope_backward", shape(&o.shape), &args)
}
