//! Linear layers: matmuls, by the device or by `kernels/matmul.cu`.

use super::launch_context::LaunchContext;
use crate::llama::ops::{Linear, LinearBackwardInput, LinearBackwardWeight};

pub(super) fn linear(ctx: &mut LaunchContext, o: &Linear) -> anyhow::Result<()> {
    let (x, y) = (ctx.matrix(o.x, o.rows, o.w.cols), ctx.matrix(o.y, o.rows, o.w.rows));
    ctx.matmul(x, ctx.weight_matrix(o.w).t(), y, false)
}

pub(super) fn backward_input(
    ctx: &mut LaunchContext,
    o: &LinearBackwardInput,
) -> anyhow::Result<()> {
    let (dy, dx) = (ctx.matrix(o.dy, o.rows, o.w.rows), ctx.matrix(o.dx, o.rows, o.w.cols));
    ctx.matmul(dy, ctx.weight_matrix(o.w), dx, false)
}

/// Accumulates in f32, the dtype of gradients.
pub(super) fn backward_weight(
    ctx: &mut LaunchContext,
    o: &LinearBackwardWeight,
) -> anyhow::Result<()> {
    let (dy, x) = (ctx.matrix(o.dy, o.rows, o.w.rows), ctx.matrix(o.x, o.rows, o.w.cols));
    ctx.matmul(dy.t(), x, ctx.gradient_matrix(o.w), true)
}
