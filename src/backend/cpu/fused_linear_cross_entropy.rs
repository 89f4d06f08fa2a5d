//! The head and the cross-entropy, a block of rows at a time.
//!
//! The vocabulary is cut into segments, each a task. A first pass computes a block's logits
//! segment by segment and turns each into `exp(logit - its segment's maximum)` where it lies; the
//! segments' maxima and sums give each row's log-sum-exp. A second pass uses the same
//! exponentials for both gradients: with a row's factor `f = exp(max of segment - lse) * scale`,
//! softmax is `f * exponential`, so the factors go onto dx's rows afterwards and onto a copy of x
//! beforehand, and no exponential is touched again. The target's share of the gradient
//! (minus one) is added at the end. Three products and one plane of exponentials; only a block's
//! logits ever exist.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::super::memory::Memory;
use super::matmul::{MatmulThreads, MatrixView, matmul};
use super::simd::exp;
use crate::llama::ops::FusedLinearCrossEntropy;
use crate::tokens::IGNORE;

/// Words of the vocabulary a task takes.
const SEGMENT: usize = 1024;
/// A block's logits fill at most this many floats (16 MiB).
const BLOCK: usize = 1 << 22;

/// What a segment knows of one row.
#[derive(Clone, Copy)]
struct Peak {
    max: f32,
    /// Of the exponentials, shifted by the maximum.
    sum: f32,
    argmax: u32,
}

/// Rows that go together.
fn block_rows(o: &FusedLinearCrossEntropy) -> usize {
    (BLOCK / o.w.rows).clamp(16, 512).min(o.rows)
}

/// Floats that a block's logits take.
pub(super) fn workspace(o: &FusedLinearCrossEntropy) -> usize {
    block_rows(o) * o.w.rows
}

pub(super) fn loss(
    arch: Arch,
    o: &FusedLinearCrossEntropy,
    memory: &mut Memory<f32>,
    scale: f32,
    logits: &mut Vec<f32>,
) {
    let (vocab, hidden) = (o.w.rows, o.w.cols);
    let w = &memory.parameters[o.w.range()];
    let targets = memory.indices.one(o.targets).to_vec();
    let (x, nll, mut dx) = if let Some(dx) = o.dx {
        let [x, nll, dx] = memory.floats.get([o.x, o.nll, dx]);
        (x, nll, Some(dx))
    } else {
        let [x, nll] = memory.floats.get([o.x, o.nll]);
        (x, nll, None)
    };
    let mut argmax = vec![0; o.rows];
    let rows = block_rows(o);
    logits.resize(logits.len().max(workspace(o)), 0.0);
    for from in (0..o.rows).step_by(rows) {
        let to = (from + rows).min(o.rows);
        let block = to - from;
        let x = &x[from * hidden..to * hidden];
        let targets = &targets[from..to];
        let logits = &mut logits[..block * vocab];

        let segments: Vec<(Vec<Peak>, Vec<f32>)> = logits
            .par_chunks_mut(block * SEGMENT)
            .zip(w.par_chunks(SEGMENT * hidden))
            .enumerate()
            .map(|(segment, (logits, w))| {
                let width = w.len() / hidden;
                let w = MatrixView::new(w, width, hidden).transposed();
                matmul(logits, false, MatrixView::new(x, block, hidden), w, MatmulThreads::One);
                let first = segment * SEGMENT;
                let hit = |(row, &target): (usize, &u32)| {
                    let at = (target as usize).wrapping_sub(first);
                    if at < width { logits[row * width + at] } else { 0.0 }
                };
                let hits = targets.iter().enumerate().map(hit).collect();
                (arch.dispatch(Exponentials { logits, width, first }), hits)
            })
            .collect();

        let lse: Vec<f32> = (0..block)
            .map(|row| {
                let peaks = || segments.iter().map(|(peaks, _)| peaks[row]);
                // The first of equal largest ones.
                let best = peaks().reduce(|a, b| if b.max > a.max { b } else { a });
                let best = best.expect("a vocabulary has words");
                argmax[from + row] = best.argmax;
                let sum: f32 = peaks().map(|peak| (peak.max - best.max).exp() * peak.sum).sum();
                best.max + sum.ln()
            })
            .collect();
        for (row, nll) in nll[from..to].iter_mut().enumerate() {
            let segment = targets[row] as usize / SEGMENT;
            *nll = if targets[row] == IGNORE { 0.0 } else { lse[row] - segments[segment].1[row] };
        }

        if let Some(dx) = &mut dx {
            let dw = &mut memory.gradients[o.w.range()];
            let dx = &mut dx[from * hidden..to * hidden];
            gradient(logits, x, w, targets, &segments, &lse, scale, hidden, dx, dw);
        }
    }
    memory.indices.get([o.argmax])[0].copy_from_slice(&argmax);
}

fn gradient(
    exponentials: &[f32],
    x: &[f32],
    w: &[f32],
    targets: &[u32],
    segments: &[(Vec<Peak>, Vec<f32>)],
    lse: &[f32],
    scale: f32,
    hidden: usize,
    dx: &mut [f32],
    dw: &mut [f32],
) {
    let block = targets.len();
    let shares: Vec<Vec<f32>> = dw
        .par_chunks_mut(SEGMENT * hidden)
        .zip(w.par_chunks(SEGMENT * hidden))
        .zip(exponentials.par_chunks(block * SEGMENT).zip(segments))
        .map(|((dw, w), (exponentials, (peaks, _)))| {
            let width = w.len() / hidden;
            let factor: Vec<f32> = (0..block)
                .map(|row| match targets[row] {
                    IGNORE => 0.0,
                    _ => scale * (peaks[row].max - lse[row]).exp(),
                })
                .collect();
            let mut scaled = x.to_vec();
            scale_rows(&mut scaled, &factor, hidden);
            let e = MatrixView::new(exponentials, block, width);
            matmul(
                dw,
                true,
                e.transposed(),
                MatrixView::new(&scaled, block, hidden),
                MatmulThreads::One,
            );
            let mut share = scaled;
            matmul(&mut share, false, e, MatrixView::new(w, width, hidden), MatmulThreads::One);
            scale_rows(&mut share, &factor, hidden);
            share
        })
        .collect();
    dx.fill(0.0);
    for share in shares {
        for (sum, part) in dx.iter_mut().zip(share) {
            *sum += part;
        }
    }
    for ((&target, x), dx) in targets.iter().zip(x.chunks(hidden)).zip(dx.chunks_mut(hidden)) {
        if target != IGNORE {
            let at = target as usize * hidden..(target as usize + 1) * hidden;
            for ((x, dx), (w, dw)) in x.iter().zip(dx).zip(w[at.clone()].iter().zip(&mut dw[at])) {
                *dx -= scale * w;
                *dw -= scale * x;
            }
        }
    }
}

fn scale_rows(values: &mut [f32], factors: &[f32], width: usize) {
    for (row, factor) in values.chunks_mut(width).zip(factors) {
        for value in row {
            *value *= factor;
        }
    }
}

/// Turns a segment's logits into exponentials, a row of `width` at a time.
struct Exponentials<'a> {
    logits: &'a mut [f32],
    width: usize,
    /// The segment's first word.
    first: usize,
}

impl WithSimd for Exponentials<'_> {
    type Output = Vec<Peak>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) -> Vec<Peak> {
        let mut peaks = Vec::with_capacity(self.logits.len() / self.width);
        for row in self.logits.chunks_mut(self.width) {
            let (lanes, rest) = S::as_mut_simd_f32s(row);
            let mut max = s.splat_f32s(f32::NEG_INFINITY);
            for &x in &*lanes {
                max = s.max_f32s(max, x);
            }
            let mut max = s.reduce_max_f32s(max);
            for &mut x in &mut *rest {
                max = max.max(x);
            }
            let place = row.iter().position(|&x| x == max).unwrap_or(0);

            let (lanes, rest) = S::as_mut_simd_f32s(row);
            let shift = s.splat_f32s(max);
            let mut sum = s.splat_f32s(0.0);
            for x in lanes {
                *x = exp(s, s.sub_f32s(*x, shift));
                sum = s.add_f32s(sum, *x);
            }
            let mut sum = s.reduce_sum_f32s(sum);
            for x in rest {
                *x = (*x - max).exp();
                sum += *x;
            }
            peaks.push(Peak { max, sum, argmax: (self.first + place) as u32 });
        }
        peaks
    }
}
