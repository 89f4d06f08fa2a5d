//! Attention there, back, and over a cache: `kernels/attention*.cu`.

use super::launcher::{Launcher, Shape, int, scratch};
use crate::device::Arg;
use crate::llama::ops::{Attention, AttentionBackward, CachedAttention, Heads};

/// The longest head the kernels take.
pub(super) const MOST_HEAD_DIM: usize = 256;

/// Rows of a head that a block of the plain path takes.
const PLAIN_ROWS: usize = 16;
/// Opposite rows of a tile there.
const PLAIN_TILE: usize = 32;

/// Of the plain path, for `heads` heads of `context` rows.
fn plain(shape: &Heads, heads: usize) -> Shape {
    let d = shape.head_dim;
    let blocks = shape.windows * heads * shape.context.div_ceil(PLAIN_ROWS);
    let shared = 4 * (2 * PLAIN_ROWS * d + 2 * PLAIN_TILE * (d | 1));
    Shape { grid: [blocks, 1, 1], block: [128, 1, 1], shared }
}

fn sizes(shape: &Heads) -> [Arg; 5] {
    let Heads { windows, context, heads, kv_heads, head_dim } = *shape;
    [int(windows), int(context), int(heads), int(kv_heads), int(head_dim)]
}

pub(super) fn forward(l: &mut Launcher, o: &Attention) -> anyhow::Result<()> {
    let mut args: Vec<Arg> =
        [o.q, o.k, o.v, o.first_key, o.out, o.lse].map(|buffer| l.at(buffer).into()).to_vec();
    args.extend(sizes(&o.shape));
    l.typed("attention", plain(&o.shape, o.shape.heads), &args)
}

pub(super) fn workspace(o: &AttentionBackward) -> usize {
    scratch([4 * o.shape.rows() * o.shape.heads])
}

pub(super) fn backward(l: &mut Launcher, o: &AttentionBackward) -> anyhow::Result<()> {
    let shape = &o.shape;
    let Heads { windows, context, heads, head_dim, .. } = *shape;
    let rows = shape.rows() * heads;
    let delta = l.take(4 * rows);
    let width = head_dim.next_power_of_two().min(32);
    let at_once = 256 / width;
    let grid = [rows.div_ceil(at_once).min(4096), 1, 1];
    let args = [
        l.at(o.out).into(),
        l.at(o.dout).into(),
        delta.into(),
        int(windows),
        int(context),
        int(heads),
        int(head_dim),
    ];
    l.typed("attention_delta", Shape { grid, block: [width, at_once, 1], shared: 0 }, &args)?;

    let mut inputs: Vec<Arg> =
        [o.q, o.k, o.v, o.first_key, o.lse].map(|buffer| l.at(buffer).into()).to_vec();
    inputs.extend([Arg::from(delta), l.at(o.dout).into()]);
    let mut args = inputs.clone();
    args.push(l.at(o.dq).into());
    args.extend(sizes(shape));
    l.typed("attention_backward_q", plain(shape, heads), &args)?;
    let mut args = inputs;
    args.extend([Arg::from(l.at(o.dk)), l.at(o.dv).into()]);
    args.extend(sizes(shape));
    l.typed("attention_backward_kv", plain(shape, shape.kv_heads), &args)
}

pub(super) fn cached(l: &mut Launcher, o: &CachedAttention) -> anyhow::Result<()> {
    let mut args: Vec<Arg> = [o.q, o.k, o.v, o.start].map(|buffer| l.at(buffer).into()).to_vec();
    let cache = |offset: usize| l.arenas.cache.plus(offset * l.numbers.size());
    args.extend([Arg::from(cache(o.keys)), cache(o.values).into(), l.at(o.out).into()]);
    args.extend(sizes(&o.shape));
    args.push(int(o.capacity));
    let rows = o.shape.rows() * o.shape.heads;
    l.typed("attention_cached", Shape::linear(rows, 128), &args)
}
