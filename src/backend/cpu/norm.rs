//! RMSNorm forward and backward, with the residual addition in the same pass.

use pulp::Arch;
use rayon::prelude::*;

use super::super::memory::Memory;
use crate::llama::ops::{RmsNorm, RmsNormBackward};

/// Rows per task.
const TASK_ROWS: usize = 64;

pub(super) fn forward(arch: Arch, o: &RmsNorm, memory: &mut Memory<f32>) {
    let hidden = o.weight.cols;
    let weight = &memory.parameters[o.weight.range()];
    if let Some(add) = o.add {
        let [x, residual, sum, y, rstd] =
            memory.floats.get([o.x, add.residual, add.sum, o.y, o.rstd]);
        sum.par_chunks_mut(TASK_ROWS * hidden)
            .zip(x.par_chunks(TASK_ROWS * hidden))
            .zip(residual.par_chunks(TASK_ROWS * hidden))
            .zip(y.par_chunks_mut(TASK_ROWS * hidden).zip(rstd.par_chunks_mut(TASK_ROWS)))
            .for_each(|(((sum, x), residual), (y, rstd))| {
                arch.dispatch(|| {
                    for ((sum, &x), &residual) in sum.iter_mut().zip(x).zip(residual) {
                        *sum = x + residual;
                    }
                    normalize(sum, weight, o.eps as f32, y, rstd);
                });
            });
    } else {
        let [x, y, rstd] = memory.floats.get([o.x, o.y, o.rstd]);
        x.par_chunks(TASK_ROWS * hidden)
            .zip(y.par_chunks_mut(TASK_ROWS * hidden).zip(rstd.par_chunks_mut(TASK_ROWS)))
            .for_each(|(x, (y, rstd))| {
                arch.dispatch(|| normalize(x, weight, o.eps as f32, y, rstd));
            });
    }
}

#[inline(always)]
fn normalize(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32], rstd: &mut [f32]) {
    let hidden = weight.len();
    for ((x, y), rstd) in x.chunks(hidden).zip(y.chunks_mut(hidden)).zip(rstd) {
        *rstd = 1.0 / (dot(x, x) / hidden as f32 + eps).sqrt();
        for ((y, &x), &w) in y.iter_mut().zip(x).zip(weight) {
            *y = x * *rstd * w;
        }
    }
}

/// A dot product in 16 interleaved partial sums, added pairwise at the end: SIMD on any processor, in the same
/// order.
#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut parts = [0.0f32; 16];
    let (whole, rest) = a.as_chunks::<16>();
    let (other, other_rest) = b.as_chunks::<16>();
    for (a, b) in whole.iter().zip(other) {
        for i in 0..16 {
            parts[i] += a[i] * b[i];
        }
    }
    for ((part, a), b) in parts.iter_mut().zip(rest).zip(other_rest) {
        *part += a * b;
    }
    for width in [8, 4, 2, 1] {
        for i in 0..width {
            parts[i] += parts[i + width];
        }
    }
    parts[0]
}

pub(super) fn backward(arch: Arch, o: &RmsNormBackward, memory: &mut Memory<f32>) {
    let hidden = o.weight.cols;
    let weight = &memory.parameters[o.weight.range()];
    let (dsum, x, rstd, dy, dx) = if let Some(dsum) = o.dsum {
        let [dsum, x, rstd, dy, dx] = memory.floats.get([dsum, o.x, o.rstd, o.dy, o.dx]);
        (Some(&*dsum), x, rstd, dy, dx)
    } else {
        let [x, rstd, dy, dx] = memory.floats.get([o.x, o.rstd, o.dy, o.dx]);
        (None, x, rstd, dy, dx)
    };
    // Each task has a partial sum of the weight's gradient over its rows; they are added in order.
    let partials: Vec<Vec<f32>> = dx
        .par_chunks_mut(TASK_ROWS * hidden)
        .zip(x.par_chunks(TASK_ROWS * hidden))
        .zip(dy.par_chunks(TASK_ROWS * hidden).zip(rstd.par_chunks(TASK_ROWS)))
        .enumerate()
        .map(|(task, ((dx, x), (dy, rstd)))| {
            let from = task * TASK_ROWS * hidden;
            let dsum = dsum.map(|dsum| &dsum[from..from + dx.len()]);
            let mut dweight = vec![0.0; hidden];
            arch.dispatch(|| backward_rows(x, rstd, weight, dy, dsum, dx, &mut dweight));
            dweight
        })
        .collect();
    let dweight = &mut memory.gradients[o.weight.range()];
    for partial in partials {
        for (sum, part) in dweight.iter_mut().zip(partial) {
            *sum += part;
        }
    }
}

#[inline(always)]
fn backward_rows(
    x: &[f32],
    rstd: &[f32],
    weight: &[f32],
    dy: &[f32],
    dsum: Option<&[f32]>,
    dx: &mut [f32],
    dweight: &mut [f32],
) {
    let hidden = weight.len();
    match dsum {
        Some(dsum) => dx.copy_from_slice(dsum),
        None => dx.fill(0.0),
    }
    let mut g = vec![0.0; hidden];
    for (row, &rstd) in rstd.iter().enumerate() {
        let at = row * hidden..(row + 1) * hidden;
        let (x, dy, dx) = (&x[at.clone()], &dy[at.clone()], &mut dx[at]);
        for ((g, &dy), &w) in g.iter_mut().zip(dy).zip(weight) {
            *g = dy * w;
        }
        let mean = rstd * dot(&g, x) / hidden as f32;
        for i in 0..hidden {
            let n = x[i] * rstd;
            dx[i] += rstd * (g[i] - n * mean);
            dweight[i] += dy[i] * n;
        }
    }
}
