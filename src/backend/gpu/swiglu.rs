//! SwiGLU there and back: `kernels/swiglu.cu`.

use super::launcher::{Launcher, Shape, int};
use crate::dtype::Dtype;
use crate::llama::ops::{SwiGlu, SwiGluBackward};

/// Blocks along the rows at most: enough to fill any card.
const BLOCKS: usize = 2048;

fn shape(rows: usize, inter: usize, dtype: Dtype) -> Shape {
    let full = 16 / dtype.size();
    let pieces = if inter.is_multiple_of(full) { inter / full } else { inter };
    let width = pieces.next_power_of_two().min(256);
    let at_once = 256 / width;
    let grid = [pieces.div_ceil(width), rows.div_ceil(at_once).min(BLOCKS), 1];
    Shape { grid, block: [width, at_once, 1], shared: 0 }
}

pub(super) fn forward(l: &mut Launcher, o: &SwiGlu) -> anyhow::Result<()> {
    let rows = l.len(o.out) / o.inter;
    let args = [l.at(o.gate_up).into(), l.at(o.out).into(), int(rows), int(o.inter)];
    l.typed("swiglu", shape(rows, o.inter, l.dtype), &args)
}

pub(super) fn backward(l: &mut Launcher, o: &SwiGluBackward) -> anyhow::Result<()> {
    let rows = l.len(o.dout) / o.inter;
    let args = [
        l.at(o.gate_up).into(),
        l.at(o.dout).into(),
        l.at(o.dgate_up).into(),
        int(rows),
        int(o.inter),
    ];
    l.typed("swiglu_backward", shape(rows, o.inter, l.dtype), &args)
}
