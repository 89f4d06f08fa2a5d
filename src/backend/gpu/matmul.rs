//! The linear layers: products of the device, without kernels of our own.

use super::launcher::Launcher;
use crate::llama::ops::{Linear, LinearBackwardInput, LinearBackwardWeight};

pub(super) fn linear(l: &mut Launcher, o: &Linear) -> anyhow::Result<()> {
    let (x, y) = (l.matrix(o.x, o.rows, o.w.cols), l.matrix(o.y, o.rows, o.w.rows));
    l.matmul(x, l.weight_matrix(o.w).t(), y, false)
}

pub(super) fn backward_input(l: &mut Launcher, o: &LinearBackwardInput) -> anyhow::Result<()> {
    let (dy, dx) = (l.matrix(o.dy, o.rows, o.w.rows), l.matrix(o.dx, o.rows, o.w.cols));
    l.matmul(dy, l.weight_matrix(o.w), dx, false)
}

/// Accumulated in f32: the gradient's own type.
pub(super) fn backward_weight(l: &mut Launcher, o: &LinearBackwardWeight) -> anyhow::Result<()> {
    let (dy, x) = (l.matrix(o.dy, o.rows, o.w.rows), l.matrix(o.x, o.rows, o.w.cols));
    l.matmul(dy.t(), x, l.gradient_matrix(o.w), true)
}
