//! Attention there, back, and over a cache: `kernels/attention*.cu`.

use super::launcher::{Launcher, Shape, int, scratch};
use crate::device::{Arg, Type};
use crate::llama::ops::{Attention, AttentionBackward, CachedAttention, Heads};

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
    /// Tensor cores.
    Mma,
}

impl Path {
    /// The fastest there is.
    fn of(shape: &Heads, numbers: Type, plain: bool) -> Path {
        match shape.head_dim {
            _ if plain => Path::Plain,
            2 | 4 | 8 => Path::Narrow,
            16 | 32 | 64 | 96 | 128 if numbers != Type::F32 => Path::Mma,
            _ => Path::Plain,
        }
    }

    fn family(self, pass: Pass, head_dim: usize) -> String {
        let pass = match pass {
            Pass::Forward => "",
            Pass::BackwardQ => "_backward_q",
            Pass::BackwardKv => "_backward_kv",
        };
        match self {
            Path::Plain => format!("attention{pass}"),
            Path::Narrow => format!("attention_narrow{pass}_{head_dim}"),
            Path::Mma => format!("attention_mma{pass}_{head_dim}"),
        }
    }

    /// Rows that a block of four warps takes at once (of the narrow path to k and v: a block of any
    /// size), and the opposite rows of a tile. The kernels hold the same tables.
    fn rows(self, pass: Pass, head_dim: usize) -> (usize, usize) {
        match (self, pass) {
            (Path::Plain, _) => (16, 32),
            (Path::Narrow, Pass::Forward) => (4 * 128, 32),
            (Path::Narrow, Pass::BackwardQ) => (if head_dim == 8 { 2 } else { 4 } * 128, 32),
            (Path::Narrow, Pass::BackwardKv) => (if head_dim == 8 { 2 } else { 4 } * 32, 32),
            (Path::Mma, Pass::Forward) => (128, if head_dim == 64 { 64 } else { 32 }),
            (Path::Mma, Pass::BackwardQ) => (if head_dim <= 64 { 128 } else { 64 }, 32),
            (Path::Mma, Pass::BackwardKv) => (if head_dim <= 32 { 128 } else { 64 }, 32),
        }
    }

    fn launch(self, pass: Pass, shape: &Heads) -> Shape {
        let d = shape.head_dim;
        let (own, tile) = self.rows(pass, d);
        let heads = if pass == Pass::BackwardKv { shape.kv_heads } else { shape.heads };
        // Four warps of the narrow path take any four runs of rows.
        let blocks = match (self, pass) {
            (Path::Narrow, Pass::Forward | Pass::BackwardQ) => {
                (shape.windows * heads * shape.context.div_ceil(own / 4)).div_ceil(4)
            }
            _ => shape.windows * heads * shape.context.div_ceil(own),
        };
        let threads = match (self, pass) {
            (Path::Narrow, Pass::BackwardKv) => 32 * shape.group().min(4),
            _ => 128,
        };
        let shared = match (self, pass) {
            (Path::Plain, _) => 4 * (2 * own * d + 2 * tile * (d | 1)),
            (Path::Narrow, _) => 0,
            (Path::Mma, Pass::Forward) => (own + 4 * tile) * (2 * d + 16),
            (Path::Mma, Pass::BackwardQ) => (2 * own + 4 * tile) * (2 * d + 16),
            (Path::Mma, Pass::BackwardKv) => (2 * own + 4 * tile) * (2 * d + 16) + 24 * tile,
        };
        Shape { grid: [blocks, 1, 1], block: [threads, 1, 1], shared }
    }

    fn run(
        self,
        l: &mut Launcher,
        pass: Pass,
        shape: &Heads,
        mut args: Vec<Arg>,
    ) -> anyhow::Result<()> {
        let Heads { windows, context, heads, kv_heads, head_dim } = *shape;
        args.extend([windows, context, heads, kv_heads].map(int));
        if self == Path::Plain {
            args.push(int(head_dim));
        }
        l.typed(&self.family(pass, head_dim), self.launch(pass, shape), &args)
    }
}

pub(super) fn forward(l: &mut Launcher, o: &Attention) -> anyhow::Result<()> {
    let args = [o.q, o.k, o.v, o.first_key, o.out, o.lse].map(|buffer| l.at(buffer).into());
    let path = Path::of(&o.shape, l.numbers, l.options.plain_attention);
    path.run(l, Pass::Forward, &o.shape, args.to_vec())
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

    let path = Path::of(shape, l.numbers, l.options.plain_attention);
    let mut inputs: Vec<Arg> =
        [o.q, o.k, o.v, o.first_key, o.lse].map(|buffer| l.at(buffer).into()).to_vec();
    inputs.extend([Arg::from(delta), l.at(o.dout).into()]);
    let mut args = inputs.clone();
    args.push(l.at(o.dq).into());
    path.run(l, Pass::BackwardQ, shape, args)?;
    let mut args = inputs;
    args.extend([Arg::from(l.at(o.dk)), l.at(o.dv).into()]);
    path.run(l, Pass::BackwardKv, shape, args)
}

pub(super) fn cached(l: &mut Launcher, o: &CachedAttention) -> anyhow::Result<()> {
    let Heads { windows, context, heads, kv_heads, head_dim } = o.shape;
    let mut args: Vec<Arg> = [o.q, o.k, o.v, o.start].map(|buffer| l.at(buffer).into()).to_vec();
    let cache = |offset: usize| l.arenas.cache.plus(offset * l.numbers.size());
    args.extend([Arg::from(cache(o.keys)), cache(o.values).into(), l.at(o.out).into()]);
    args.extend([windows, context, heads, kv_heads, head_dim, o.capacity].map(int));
    let rows = o.shape.rows() * o.shape.heads;
    l.typed("attention_cached", Shape::linear(rows, 128), &args)
}
