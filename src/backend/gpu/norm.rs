//! RMSNorm there and back: `kernels/rms_norm.cu`.

use super::launcher::{Launcher, Shape, int, scratch};
use crate::device::Address;
use crate::dtype::Dtype;
use crate::llama::ops::{RmsNorm, RmsNormBackward};

/// Blocks of the backward at most: each leaves a share of dweight, and the second stage adds them.
const SHARES: usize = 264;
/// Blocks of the forward at most: enough to fill any card.
const BLOCKS: usize = 2048;

/// (threads a row, rows at once): a thread takes 16 bytes at a time where rows allow it.
fn block(hidden: usize, dtype: Dtype) -> (usize, usize) {
    let full = 16 / dtype.size();
    let pieces = if hidden.is_multiple_of(full) { hidden / full } else { hidden };
    let width = pieces.next_power_of_two().min(256);
    (width, 256 / width)
}

pub(super) fn forward(l: &mut Launcher, o: &RmsNorm) -> anyhow::Result<()> {
    let (rows, hidden) = (l.len(o.rstd), o.weight.cols);
    let (width, at_once) = block(hidden, l.dtype);
    let grid = rows.div_ceil(at_once).min(BLOCKS);
    let shape = Shape { grid: [grid, 1, 1], block: [width, at_once, 1], shared: 0 };
    let (residual, sum) = match o.add {
        Some(add) => (l.at(add.residual), l.at(add.sum)),
        None => (Address::NULL, Address::NULL),
    };
    let args = [
        l.at(o.x).into(),
        residual.into(),
        l.weight(o.weight).into(),
        sum.into(),
        l.at(o.y).into(),
        l.at(o.rstd).into(),
        int(rows),
        int(hidden),
        (o.eps as f32).into(),
    ];
    l.typed("rms_norm", shape, &args)
}

fn shares(rows: usize, at_once: usize) -> usize {
    rows.div_ceil(at_once).min(SHARES)
}

pub(super) fn workspace(o: &RmsNormBackward, rows: usize, dtype: Dtype) -> usize {
    let (_, at_once) = block(o.weight.cols, dtype);
    scratch([4 * shares(rows, at_once) * o.weight.cols])
}

pub(super) fn backward(l: &mut Launcher, o: &RmsNormBackward) -> anyhow::Result<()> {
    let (rows, hidden) = (l.len(o.rstd), o.weight.cols);
    let (width, at_once) = block(hidden, l.dtype);
    let grid = shares(rows, at_once);
    let partials = l.take(4 * grid * hidden);
    let shape =
        Shape { grid: [grid, 1, 1], block: [width, at_once, 1], shared: 4 * at_once * hidden };
    let args = [
        l.at(o.x).into(),
        l.at(o.rstd).into(),
        l.weight(o.weight).into(),
        l.at(o.dy).into(),
        o.dsum.map_or(Address::NULL, |dsum| l.at(dsum)).into(),
        l.at(o.dx).into(),
        partials.into(),
        int(rows),
        int(hidden),
    ];
    l.typed("rms_norm_backward", shape, &args)?;
    let shape = Shape { grid: [hidden.div_ceil(32), 1, 1], block: [32, 8, 1], shared: 0 };
    let args = [partials.into(), l.gradient(o.weight).into(), int(grid), int(hidden)];
    l.launch("rms_norm_backward_weight", shape, &args)
}
