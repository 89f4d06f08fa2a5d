//! Fused linear cross-entropy: the LM head and its loss, a block of rows at a time.
//!
//! The vocabulary is split into segments, one per task. A first pass computes a block's logits segment by
//! segment and turns each into `exp(logit - its segment's maximum)` in place; the segments' maxima and sums
//! give each row's log-sum-exp (online softmax). A second pass uses the same exponentials for both gradients:
//! with a row's factor `f = exp(max of segment - lse) * scale`, softmax is `f * exponential`, so the factors
//! go onto dx's rows afterwards and onto a copy of x beforehand, and no exponential is touched again. The
//! target's term of the gradient (minus one; in bfloat16 p minus one) is added at the end. Three matmuls and one buffer of
//! exponentials; only a block's logits ever exist.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::super::memory::{BufferBlock, Memory};
use super::matmul::{Gemm, MatmulThreads, MatrixView};
use super::simd::exp;
use crate::llama::ops::FusedLinearCrossEntropy;
use crate::tokens::IGNORE;

/// Tokens of the vocabulary per task.
const SEGMENT_TOKENS: usize = 1024;
/// A block's logits fill at most this many floats (16 MiB).
const MAX_BLOCK_LOGITS: usize = 1 << 22;

/// One row's softmax over one segment.
#[derive(Clone, Copy)]
struct SegmentSoftmax {
    max: f32,
    /// Sum of exp(logit - max).
    sum: f32,
    argmax: u32,
}

/// One row's softmax over the vocabulary.
struct RowSoftmax {
    max: f32,
    /// Sum of exp(logit - max).
    sum: f32,
}

/// Rows of a block.
fn block_rows(o: &FusedLinearCrossEntropy) -> usize {
    (MAX_BLOCK_LOGITS / o.w.rows).clamp(16, 512).min(o.rows)
}

/// Floats of a block's logits.
fn block_logits(o: &FusedLinearCrossEntropy) -> usize {
    block_rows(o) * o.w.rows
}

/// Bytes of a block's logits.
pub(super) fn kept_bytes(o: &FusedLinearCrossEntropy) -> usize {
    size_of::<f32>() * block_logits(o)
}

/// Bytes of the segments' partial sums of dx.
pub(super) fn scratch_bytes(o: &FusedLinearCrossEntropy) -> usize {
    let segments = if o.dx.is_some() { o.w.rows.div_ceil(SEGMENT_TOKENS) } else { 0 };
    size_of::<f32>() * segments * block_rows(o) * o.w.cols
}

/// x, nll, and dx if gradients are computed.
pub(super) fn operands<'a>(
    o: &FusedLinearCrossEntropy,
    floats: &'a mut BufferBlock<f32>,
) -> (&'a [f32], &'a mut [f32], Option<&'a mut [f32]>) {
    if let Some(dx) = o.dx {
        let [x, nll, dx] = floats.get([o.x, o.nll, dx]);
        (x, nll, Some(dx))
    } else {
        let [x, nll] = floats.get([o.x, o.nll]);
        (x, nll, None)
    }
}

pub(super) fn run(
    arch: Arch,
    gemm: Gemm,
    o: &FusedLinearCrossEntropy,
    memory: &mut Memory<f32>,
    scale: f32,
    logits: &mut Vec<f32>,
) {
    let (vocab, hidden) = (o.w.rows, o.w.cols);
    let w = &memory.parameters[o.w.range()];
    let targets = memory.indices.one(o.targets).to_vec();
    let (x, nll, mut dx) = operands(o, &mut memory.floats);
    let mut argmax = vec![0; o.rows];
    let rows = block_rows(o);
    logits.resize(logits.len().max(block_logits(o)), 0.0);
    for from in (0..o.rows).step_by(rows) {
        let to = (from + rows).min(o.rows);
        let block = to - from;
        let x = &x[from * hidden..to * hidden];
        let targets = &targets[from..to];
        let logits = &mut logits[..block * vocab];

        let segments: Vec<(Vec<SegmentSoftmax>, Vec<f32>)> = logits
            .par_chunks_mut(block * SEGMENT_TOKENS)
            .zip(w.par_chunks(SEGMENT_TOKENS * hidden))
            .enumerate()
            .map(|(segment, (logits, w))| {
                let width = w.len() / hidden;
                let w = MatrixView::new(w, width, hidden).transposed();
                gemm.matmul(
                    logits,
                    false,
                    MatrixView::new(x, block, hidden),
                    w,
                    MatmulThreads::One,
                );
                let first = segment * SEGMENT_TOKENS;
                let target_logit = |(row, &target): (usize, &u32)| {
                    let at = (target as usize).wrapping_sub(first);
                    if at < width { logits[row * width + at] } else { 0.0 }
                };
                let target_logits = targets.iter().enumerate().map(target_logit).collect();
                (arch.dispatch(Exponentials { logits, width, first }), target_logits)
            })
            .collect();

        let normalizers: Vec<RowSoftmax> = (0..block)
            .map(|row| {
                let softmax = || segments.iter().map(|(softmax, _)| softmax[row]);
                // The first of equal maxima.
                let best = softmax().reduce(|a, b| if b.max > a.max { b } else { a });
                let best = best.expect("a vocabulary has tokens");
                argmax[from + row] = best.argmax;
                let sum: f32 =
                    softmax().map(|segment| (segment.max - best.max).exp() * segment.sum).sum();
                RowSoftmax { max: best.max, sum }
            })
            .collect();
        let lse: Vec<f32> = normalizers.iter().map(|row| row.max + row.sum.ln()).collect();
        for (row, nll) in nll[from..to].iter_mut().enumerate() {
            let segment = targets[row] as usize / SEGMENT_TOKENS;
            let RowSoftmax { max, sum } = normalizers[row];
            // Not from the log-sum-exp, whose rounding is that of the largest logit: a loss near 0 would drown in it.
            *nll = match targets[row] {
                IGNORE => 0.0,
                _ => max - segments[segment].1[row] + sum.ln(),
            };
        }

        if let Some(dx) = &mut dx {
            let mut target_gradients = vec![-scale; block];
            if let Gemm::Bf16(_) = gemm {
                // The difference p - 1 must survive the rounding of p: it is computed here, and p left out of
                // the matmuls.
                for (row, &target) in targets.iter().enumerate().filter(|row| *row.1 != IGNORE) {
                    let (segment, at) =
                        (target as usize / SEGMENT_TOKENS, target as usize % SEGMENT_TOKENS);
                    let width = SEGMENT_TOKENS.min(vocab - segment * SEGMENT_TOKENS);
                    logits[segment * SEGMENT_TOKENS * block + row * width + at] = 0.0;
                    let RowSoftmax { max, sum } = normalizers[row];
                    let logit = segments[segment].1[row];
                    let log_p = f64::from(logit) - f64::from(max) - f64::from(sum).ln();
                    target_gradients[row] = (log_p.exp_m1() * f64::from(scale)) as f32;
                }
            }
            let dw = &mut memory.gradients[o.w.range()];
            let dx = &mut dx[from * hidden..to * hidden];
            gradient(
                gemm,
                logits,
                x,
                w,
                targets,
                &target_gradients,
                &segments,
                &lse,
                scale,
                hidden,
                dx,
                dw,
            );
        }
    }
    memory.indices.get([o.argmax])[0].copy_from_slice(&argmax);
}

fn gradient(
    gemm: Gemm,
    exponentials: &[f32],
    x: &[f32],
    w: &[f32],
    targets: &[u32],
    target_gradients: &[f32],
    segments: &[(Vec<SegmentSoftmax>, Vec<f32>)],
    lse: &[f32],
    scale: f32,
    hidden: usize,
    dx: &mut [f32],
    dw: &mut [f32],
) {
    let block = targets.len();
    let partials: Vec<Vec<f32>> = dw
        .par_chunks_mut(SEGMENT_TOKENS * hidden)
        .zip(w.par_chunks(SEGMENT_TOKENS * hidden))
        .zip(exponentials.par_chunks(block * SEGMENT_TOKENS).zip(segments))
        .map(|((dw, w), (exponentials, (softmax, _)))| {
            let width = w.len() / hidden;
            let factor: Vec<f32> = (0..block)
                .map(|row| match targets[row] {
                    IGNORE => 0.0,
                    _ => scale * (softmax[row].max - lse[row]).exp(),
                })
                .collect();
            let mut scaled = x.to_vec();
            scale_rows(&mut scaled, &factor, hidden);
            let e = MatrixView::new(exponentials, block, width);
            gemm.matmul(
                dw,
                true,
                e.transposed(),
                MatrixView::new(&scaled, block, hidden),
                MatmulThreads::One,
            );
            let mut partial = scaled;
            let w = MatrixView::new(w, width, hidden);
            gemm.matmul(&mut partial, false, e, w, MatmulThreads::One);
            scale_rows(&mut partial, &factor, hidden);
            partial
        })
        .collect();
    dx.fill(0.0);
    for partial in partials {
        for (sum, part) in dx.iter_mut().zip(partial) {
            *sum += part;
        }
    }
    let rows = targets.iter().zip(target_gradients);
    for (((&target, &gradient), x), dx) in rows.zip(x.chunks(hidden)).zip(dx.chunks_mut(hidden)) {
        if target != IGNORE {
            let at = target as usize * hidden..(target as usize + 1) * hidden;
            for ((x, dx), (w, dw)) in x.iter().zip(dx).zip(w[at.clone()].iter().zip(&mut dw[at])) {
                *dx += gradient * w;
                *dw += gradient * x;
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
    /// The segment's first token.
    first: usize,
}

impl WithSimd for Exponentials<'_> {
    type Output = Vec<SegmentSoftmax>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) -> Vec<SegmentSoftmax> {
        let mut softmax = Vec::with_capacity(self.logits.len() / self.width);
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
            softmax.push(SegmentSoftmax { max, sum, argmax: (self.first + place) as u32 });
        }
        softmax
    }
}
