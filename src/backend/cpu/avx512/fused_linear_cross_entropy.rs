//! Fused linear cross-entropy (the LM head and its loss) with bfloat16 matmuls in registers. A lane is a row.
//!
//! Rows go in strips of 32; the vocabulary is split into segments, one per task. `lse_pass` computes the
//! logits in register tiles and keeps each row's online softmax: maximum, its token, and sum of exponentials.
//! All segments' together give the log-sum-exp. `grad_pass` computes the logits again, so that softmax is
//! known at once, and multiplies it by the weights, for dx, and by the rows, for dw, while a segment's softmax
//! is in the core's own cache. That is four matmuls instead of three, but no logits go to memory and back.
//!
//! Rounded as `reference` does it: x, the weights, and the logits' gradient. But a row's target is left out of
//! that gradient and its `p - 1` computed in f64, unrounded. Sums, maxima and exponentials are f32.

use std::arch::x86_64::{
    __m512, _CMP_EQ_OQ, _CMP_GT_OQ, _mm512_add_ps, _mm512_castsi512_ps, _mm512_cmp_ps_mask,
    _mm512_fmadd_ps, _mm512_fmsub_ps, _mm512_mask_mov_ps, _mm512_max_ps, _mm512_mul_ps,
    _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_sub_ps,
};
use std::f32::consts::LOG2_E;

use half::bf16;
use rayon::prelude::*;

use super::super::super::memory::Memory;
use super::super::fused_linear_cross_entropy::operands;
use super::Avx512;
use super::vec::{
    STRIP, V512, exp2, interleave_bf16, load, microkernel, pack_lanes, pack_pairs, pack_rows,
    padded_cols, store, to_bf16,
};
use crate::llama::ops::FusedLinearCrossEntropy;
use crate::tokens::IGNORE;

/// Tokens of the vocabulary per task.
const SEGMENT_TOKENS: usize = 512;
/// Strips per block of rows: their softmax over one segment (256 KiB) stays in a core's cache between dx and
/// dw.
const BLOCK_STRIPS: usize = 8;

/// Packed operands and partial results, kept between steps.
#[derive(Default)]
pub(super) struct CrossEntropyBuffers {
    /// `[vocab, width]`: the weights, row-major.
    weights: Vec<V512>,
    /// `[vocab / 2, width]`: pairs of one component of two tokens.
    weight_pairs: Vec<V512>,
    /// `[strips, width / 2, 32]`: pairs of components of 32 rows.
    lanes: Vec<V512>,
    /// `[rows / 2, width]`: pairs of one component of two rows.
    row_pairs: Vec<V512>,
    partials: Vec<SegmentPartial>,
}

/// One segment's part of a block's results.
#[derive(Default)]
struct SegmentPartial {
    /// `[strips, 2]`: the largest logit, the first token that has it, and the sum of exponentials over it.
    max: Vec<V512>,
    argmax: Vec<V512>,
    sum: Vec<V512>,
    /// `[rows]`: the target's logit, if the target is in this segment.
    target_logit: Vec<f32>,
    /// `[strips, width, 2]`
    dx: Vec<V512>,
}

/// Bytes needed besides the program's buffers, for any number of threads, apart from each thread's cache-sized
/// scratch.
pub(super) fn workspace(o: &FusedLinearCrossEntropy) -> usize {
    let (segments, width) = (o.w.rows.div_ceil(SEGMENT_TOKENS), padded_cols(o.w.cols));
    let rows = o.rows.next_multiple_of(STRIP).min(BLOCK_STRIPS * STRIP);
    let weights = 2 * 2 * segments * SEGMENT_TOKENS * width;
    let partials = segments * rows * (4 * 4 + if o.dx.is_some() { 4 * width } else { 0 });
    weights + 2 * 2 * rows * width + partials
}

impl CrossEntropyBuffers {
    pub fn run(
        &mut self,
        avx512: Avx512,
        o: &FusedLinearCrossEntropy,
        memory: &mut Memory<f32>,
        scale: f32,
    ) {
        let (vocab, hidden) = (o.w.rows, o.w.cols);
        let (width, segments) = (padded_cols(hidden), vocab.div_ceil(SEGMENT_TOKENS));
        let w = &memory.parameters[o.w.range()];
        let targets = memory.indices.one(o.targets).to_vec();
        let (x, nll, mut dx) = operands(o, &mut memory.floats);
        // Vectors of a segment, of either packing.
        let vectors = SEGMENT_TOKENS * width / 32;
        let Self { weights, weight_pairs, lanes, row_pairs, partials } = self;
        for packed in [&mut *weights, &mut *weight_pairs] {
            packed.resize(packed.len().max(segments * vectors), V512::ZERO);
        }
        partials.resize_with(partials.len().max(segments), SegmentPartial::default);
        let partials = &mut partials[..segments];
        let packed = weights.par_chunks_mut(vectors).zip(weight_pairs.par_chunks_mut(vectors));
        packed.zip(w.par_chunks(SEGMENT_TOKENS * hidden)).for_each(
            |((weights, weight_pairs), w)| {
                pack_rows(avx512, w, hidden, weights);
                pack_pairs(avx512, w, hidden, weight_pairs);
            },
        );
        let segment = |at: usize| Segment {
            weights: &weights[at * vectors..][..vectors],
            weight_pairs: &weight_pairs[at * vectors..][..vectors],
            first: at * SEGMENT_TOKENS,
            count: (vocab - at * SEGMENT_TOKENS).min(SEGMENT_TOKENS),
            width,
        };

        let mut argmax = vec![0; o.rows];
        for from in (0..o.rows).step_by(BLOCK_STRIPS * STRIP) {
            let to = (from + BLOCK_STRIPS * STRIP).min(o.rows);
            let strips = (to - from).div_ceil(STRIP);
            let (x, targets) = (&x[from * hidden..to * hidden], &targets[from..to]);
            for packed in [&mut *lanes, &mut *row_pairs] {
                packed.clear();
                packed.resize(strips * width, V512::ZERO);
            }
            pack_lanes(avx512, x, hidden, lanes);
            pack_pairs(avx512, x, hidden, row_pairs);
            let (lanes, row_pairs) = (&*lanes, &*row_pairs);
            partials.par_iter_mut().enumerate().for_each(|(at, partial)| {
                lse_pass(avx512, &segment(at), lanes, targets, partial);
            });
            let known = &*partials;
            let losses: Vec<StripLoss> = targets
                .par_chunks(STRIP)
                .enumerate()
                .map(|(strip, targets)| strip_loss(avx512, known, strip, targets, scale))
                .collect();
            let row_losses = || losses.iter().flat_map(|strip| &strip.rows);
            for (row, loss) in row_losses().enumerate() {
                nll[from + row] = loss.nll;
                argmax[from + row] = loss.argmax;
            }

            let Some(dx) = &mut dx else { continue };
            let dw = &mut memory.gradients[o.w.range()];
            let tasks = partials.par_iter_mut().zip(dw.par_chunks_mut(SEGMENT_TOKENS * hidden));
            tasks.enumerate().for_each_init(GradScratch::new, |scratch, (at, (partial, dw))| {
                let segment = segment(at);
                grad_pass(
                    avx512, &segment, lanes, row_pairs, &losses, partial, scratch, hidden, dw,
                );
            });
            let partials = &*partials;
            let dx = &mut dx[from * hidden..to * hidden];
            dx.par_chunks_mut(STRIP * hidden).zip(&losses).enumerate().for_each(
                |(strip, (dx, loss))| {
                    let mut sums = vec![V512::ZERO; 2 * width];
                    sum_partial_dx(avx512, partials, strip, &mut sums);
                    for (lane, (dx, row)) in dx.chunks_mut(hidden).zip(&loss.rows).enumerate() {
                        for (dx, sums) in dx.iter_mut().zip(sums.chunks_exact(2)) {
                            *dx = sums[lane / 16].floats()[lane % 16];
                        }
                        row.add_target_dx(w, dx);
                    }
                },
            );
            for (row, x) in row_losses().zip(x.chunks(hidden)) {
                row.add_target_dw(x, dw);
            }
        }
        memory.indices.get([o.argmax])[0].copy_from_slice(&argmax);
    }
}

/// One task's part of the vocabulary.
struct Segment<'a> {
    weights: &'a [V512],
    weight_pairs: &'a [V512],
    /// The first token, and how many.
    first: usize,
    count: usize,
    width: usize,
}

impl Segment<'_> {
    /// The lanes of a strip whose targets are in this segment, and where.
    fn targets(&self, targets: &[u32]) -> impl Iterator<Item = (usize, usize)> {
        let place = |&target: &u32| (target as usize).wrapping_sub(self.first);
        targets.iter().map(place).enumerate().filter(|&(_, token)| token < self.count)
    }

    avx512!(
        /// The logits of `R` tokens from `token` on for a strip of rows.
        #[inline]
        fn logits<const R: usize>(&self, token: usize, lanes: &[V512]) -> [[__m512; 2]; R] {
            let mut acc = [[_mm512_setzero_ps(); 2]; R];
            let pairs = self.width / 2;
            let weights = &self.weights[token * pairs / 16..][..R * pairs / 16];
            microkernel(&mut acc, (bytemuck::cast_slice(weights), pairs, 1), (lanes, 2), pairs);
            acc
        }
    );
}

/// Strip `at` of `[strips, ..]`.
fn strip(lanes: &[V512], at: usize, width: usize) -> &[V512] {
    &lanes[at * width..][..width]
}

avx512_entry!(
    /// A segment's maximum, argmax and sum of exponentials for each row, and its targets' logits.
    fn lse_pass(
        avx512: Avx512,
        segment: &Segment,
        lanes: &[V512],
        targets: &[u32],
        partial: &mut SegmentPartial,
    ) {
        let Segment { count, width, .. } = *segment;
        for vectors in [&mut partial.max, &mut partial.sum, &mut partial.argmax] {
            vectors.resize(2 * targets.len().div_ceil(STRIP), V512::ZERO);
        }
        partial.target_logit.resize(targets.len(), 0.0);
        for (at, targets) in targets.chunks(STRIP).enumerate() {
            let lanes = strip(lanes, at, width);
            let mut softmax = OnlineSoftmax::new();
            let whole = count / 8 * 8;
            for token in (0..whole).step_by(8) {
                softmax.update(token, &segment.logits::<8>(token, lanes));
            }
            for token in whole..count {
                softmax.update(token, &segment.logits::<1>(token, lanes));
            }
            for half in 0..2 {
                partial.max[2 * at + half].store(softmax.max[half]);
                partial.argmax[2 * at + half].store(softmax.argmax[half]);
                partial.sum[2 * at + half].store(softmax.sum[half]);
            }
            for (lane, token) in segment.targets(targets) {
                let logit = segment.logits::<1>(token, lanes)[0][lane / 16];
                let mut vector = V512::ZERO;
                vector.store(logit);
                partial.target_logit[at * STRIP + lane] = vector.floats()[lane % 16];
            }
        }
    }
);

/// The running softmax of a strip's rows over the logits so far.
struct OnlineSoftmax {
    max: [__m512; 2],
    /// Tokens, as the bits of u32.
    argmax: [__m512; 2],
    /// Sum of exp(logit - max).
    sum: [__m512; 2],
}

impl OnlineSoftmax {
    avx512!(
        #[inline]
        fn new() -> Self {
            let (least, zero) = (_mm512_set1_ps(f32::NEG_INFINITY), _mm512_setzero_ps());
            Self { max: [least; 2], argmax: [zero; 2], sum: [zero; 2] }
        }

        #[inline]
        fn update<const R: usize>(&mut self, token: usize, logits: &[[__m512; 2]; R]) {
            let log2_e = _mm512_set1_ps(LOG2_E);
            for half in 0..2 {
                let mut max = self.max[half];
                for logit in logits {
                    max = _mm512_max_ps(max, logit[half]);
                }
                // Rare after the first few tokens.
                if _mm512_cmp_ps_mask::<_CMP_GT_OQ>(max, self.max[half]) != 0 {
                    self.rescale(token, logits, half, max);
                }
                let shift = _mm512_mul_ps(self.max[half], log2_e);
                for logit in logits {
                    let e = exp2(_mm512_fmsub_ps(logit[half], log2_e, shift));
                    self.sum[half] = _mm512_add_ps(self.sum[half], e);
                }
            }
        }

        /// Moves to a new maximum.
        #[inline]
        fn rescale<const R: usize>(
            &mut self,
            token: usize,
            logits: &[[__m512; 2]; R],
            half: usize,
            max: __m512,
        ) {
            let log2_e = _mm512_set1_ps(LOG2_E);
            let higher = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(max, self.max[half]);
            // From the end, so that the first of equal logits is kept.
            for (r, logit) in logits.iter().enumerate().rev() {
                let here = higher & _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(logit[half], max);
                let place = _mm512_castsi512_ps(_mm512_set1_epi32((token + r) as i32));
                self.argmax[half] = _mm512_mask_mov_ps(self.argmax[half], here, place);
            }
            let shift = _mm512_mul_ps(max, log2_e);
            let shrink = exp2(_mm512_sub_ps(_mm512_mul_ps(self.max[half], log2_e), shift));
            self.sum[half] = _mm512_mul_ps(self.sum[half], shrink);
            self.max[half] = max;
        }
    );
}

/// The losses of a strip's rows.
struct StripLoss {
    rows: Vec<RowLoss>,
    /// `log2(sum of exponentials / scale)`: a logit to base 2 minus this is the log2 of its gradient. Plus
    /// infinity if the row's target is ignored.
    log2_divisor: [V512; 2],
}

struct RowLoss {
    target: u32,
    nll: f32,
    argmax: u32,
    /// The gradient of the target's logit.
    target_grad: f32,
}

avx512_entry!(
    /// Combines the segments' partial results for one strip.
    fn strip_loss(
        avx512: Avx512,
        partials: &[SegmentPartial],
        strip: usize,
        targets: &[u32],
        scale: f32,
    ) -> StripLoss {
        let log2_e = _mm512_set1_ps(LOG2_E);
        let infinite = V512([f32::INFINITY.to_bits(); 16]);
        let mut out =
            StripLoss { rows: Vec::with_capacity(targets.len()), log2_divisor: [infinite; 2] };
        for (half, targets) in targets.chunks(16).enumerate() {
            let at = 2 * strip + half;
            let mut max = _mm512_set1_ps(f32::NEG_INFINITY);
            for partial in partials {
                max = _mm512_max_ps(max, partial.max[at].load());
            }
            let shift = _mm512_mul_ps(max, log2_e);
            let mut sum = _mm512_setzero_ps();
            for partial in partials {
                // Rounded as `shift`, so that it is 1 for the largest.
                let of_segment = _mm512_mul_ps(partial.max[at].load(), log2_e);
                let e = exp2(_mm512_sub_ps(of_segment, shift));
                sum = _mm512_fmadd_ps(e, partial.sum[at].load(), sum);
            }
            let (mut sums, mut shifts) = (V512::ZERO, V512::ZERO);
            sums.store(sum);
            shifts.store(shift);
            for (lane, &target) in targets.iter().enumerate() {
                let lse = f64::from(shifts.floats()[lane]) + f64::from(sums.floats()[lane]).log2();
                let (mut segment, mut max) = (0, f32::NEG_INFINITY);
                for (other, partial) in partials.iter().enumerate() {
                    let value = partial.max[at].floats()[lane];
                    if value > max {
                        (segment, max) = (other, value);
                    }
                }
                let argmax =
                    segment as u32 * SEGMENT_TOKENS as u32 + partials[segment].argmax[at].0[lane];
                let mut row = RowLoss { target, nll: 0.0, argmax, target_grad: 0.0 };
                if target != IGNORE {
                    let target_logit = &partials[target as usize / SEGMENT_TOKENS].target_logit;
                    let logit = f64::from(target_logit[strip * STRIP + 16 * half + lane]);
                    // By the factor that the exponents were computed with: its rounding cancels.
                    let nll = (lse - logit * f64::from(LOG2_E)) * std::f64::consts::LN_2;
                    row.nll = nll as f32;
                    row.target_grad = ((-nll).exp_m1() * f64::from(scale)) as f32;
                    out.log2_divisor[half].floats_mut()[lane] =
                        (lse - f64::from(scale).log2()) as f32;
                }
                out.rows.push(row);
            }
        }
        out
    }
);

impl RowLoss {
    /// Adds the target's term to the row's dx.
    fn add_target_dx(&self, w: &[f32], dx: &mut [f32]) {
        if self.target != IGNORE {
            let w = &w[self.target as usize * dx.len()..][..dx.len()];
            for (dx, &w) in dx.iter_mut().zip(w) {
                *dx += self.target_grad * bf16::from_f32(w).to_f32();
            }
        }
    }

    /// Adds the row's term to its target's dw.
    fn add_target_dw(&self, x: &[f32], dw: &mut [f32]) {
        if self.target != IGNORE {
            let dw = &mut dw[self.target as usize * x.len()..][..x.len()];
            for (dw, &x) in dw.iter_mut().zip(x) {
                *dw += self.target_grad * bf16::from_f32(x).to_f32();
            }
        }
    }
}

/// A thread's scratch in `grad_pass`, which stays in its cache.
struct GradScratch {
    /// `[strips, SEGMENT_TOKENS, 32]`: the gradient of a segment's logits.
    dlogits: Vec<V512>,
    /// `[SEGMENT_TOKENS / 2, 32]`: that of one strip, as pairs of tokens.
    dlogit_pairs: Vec<V512>,
}

impl GradScratch {
    fn new() -> Self {
        Self {
            dlogits: vec![V512::ZERO; BLOCK_STRIPS * SEGMENT_TOKENS],
            dlogit_pairs: vec![V512::ZERO; SEGMENT_TOKENS],
        }
    }
}

avx512_entry!(
    /// A segment's dw, and its partial sum of dx.
    fn grad_pass(
        avx512: Avx512,
        segment: &Segment,
        lanes: &[V512],
        row_pairs: &[V512],
        losses: &[StripLoss],
        partial: &mut SegmentPartial,
        scratch: &mut GradScratch,
        hidden: usize,
        dw: &mut [f32],
    ) {
        let Segment { count, width, .. } = *segment;
        // The last of an odd number of tokens is paired with one of gradient 0.
        let even = count.next_multiple_of(2);
        let whole = count / 8 * 8;
        partial.dx.resize(losses.len() * 2 * width, V512::ZERO);
        for (at, loss) in losses.iter().enumerate() {
            let lanes = strip(lanes, at, width);
            let dlogits = &mut scratch.dlogits[at * SEGMENT_TOKENS..][..even];
            let dlogit_pairs = &mut scratch.dlogit_pairs[..even];
            let divisor = [loss.log2_divisor[0].load(), loss.log2_divisor[1].load()];
            for token in (0..whole).step_by(8) {
                softmax(
                    &segment.logits::<8>(token, lanes),
                    &divisor,
                    &mut dlogits[token..],
                    &mut dlogit_pairs[token..],
                );
            }
            for token in (whole..count).step_by(2) {
                let mut two = [[_mm512_set1_ps(f32::NEG_INFINITY); 2]; 2];
                two[..1].copy_from_slice(&segment.logits::<1>(token, lanes));
                if token + 1 < count {
                    two[1..].copy_from_slice(&segment.logits::<1>(token + 1, lanes));
                }
                softmax(&two, &divisor, &mut dlogits[token..], &mut dlogit_pairs[token..]);
            }
            for (lane, row) in loss.rows.iter().enumerate() {
                for (_, token) in segment.targets(&[row.target]) {
                    let (values, start): (&mut [u16], _) =
                        (bytemuck::cast_slice_mut(dlogits), 32 * token);
                    values[start + lane] = 0;
                    let values: &mut [u16] = bytemuck::cast_slice_mut(dlogit_pairs);
                    values[token / 2 * 64 + 2 * lane + token % 2] = 0;
                }
            }
            // dx transposed: [width, 32] = pairs [tokens / 2, width] of [tokens / 2, 32].
            let weight_pairs: &[u32] = bytemuck::cast_slice(segment.weight_pairs);
            let dx = &mut partial.dx[at * 2 * width..][..2 * width];
            for (component, dx) in dx.chunks_exact_mut(16).enumerate() {
                let mut acc = [[_mm512_setzero_ps(); 2]; 8];
                let a = (&weight_pairs[8 * component..], 1, width);
                microkernel(&mut acc, a, (dlogit_pairs, 2), even / 2);
                for (sum, dx) in acc.as_flattened().iter().zip(dx) {
                    dx.store(*sum);
                }
            }
        }
        let dlogits = &scratch.dlogits[..losses.len() * SEGMENT_TOKENS];
        let whole = count / 4 * 4;
        for vector in (0..width / 16).step_by(4) {
            for token in (0..whole).step_by(4) {
                match width / 16 - vector {
                    4.. => add_dw::<4, 4>(dlogits, token, row_pairs, vector, hidden, dw),
                    _ => add_dw::<4, 2>(dlogits, token, row_pairs, vector, hidden, dw),
                }
            }
            for token in whole..count {
                match width / 16 - vector {
                    4.. => add_dw::<1, 4>(dlogits, token, row_pairs, vector, hidden, dw),
                    _ => add_dw::<1, 2>(dlogits, token, row_pairs, vector, hidden, dw),
                }
            }
        }
    }
);

avx512!(
    /// The logits' gradient in bfloat16 of an even number of tokens, as rows of a strip and as pairs of tokens.
    #[inline]
    fn softmax<const R: usize>(
        logits: &[[__m512; 2]; R],
        log2_divisor: &[__m512; 2],
        dlogits: &mut [V512],
        dlogit_pairs: &mut [V512],
    ) {
        let log2_e = _mm512_set1_ps(LOG2_E);
        let two = logits
            .chunks_exact(2)
            .zip(dlogits.chunks_exact_mut(2))
            .zip(dlogit_pairs.chunks_exact_mut(2));
        for ((logits, dlogits), dlogit_pairs) in two {
            let mut both = [_mm512_setzero_ps(); 2];
            for ((one, logits), dlogits) in both.iter_mut().zip(logits).zip(dlogits) {
                let low = exp2(_mm512_fmsub_ps(logits[0], log2_e, log2_divisor[0]));
                let high = exp2(_mm512_fmsub_ps(logits[1], log2_e, log2_divisor[1]));
                *one = to_bf16(low, high);
                dlogits.store(*one);
            }
            let [low, high] = interleave_bf16(both[0], both[1]);
            dlogit_pairs[0].store(low);
            dlogit_pairs[1].store(high);
        }
    }

    /// Adds a register tile of `R` tokens and `N` vectors to dw, summed over a block's rows.
    #[inline]
    fn add_dw<const R: usize, const N: usize>(
        dlogits: &[V512],
        token: usize,
        row_pairs: &[V512],
        vector: usize,
        hidden: usize,
        dw: &mut [f32],
    ) {
        let pitch = padded_cols(hidden) / 16;
        let mut acc = [[_mm512_setzero_ps(); N]; R];
        let strips =
            dlogits.chunks_exact(SEGMENT_TOKENS).zip(row_pairs.chunks_exact(STRIP / 2 * pitch));
        for (dlogits, row_pairs) in strips {
            let a: &[u32] = bytemuck::cast_slice(&dlogits[token..token + R]);
            microkernel(&mut acc, (a, 16, 1), (&row_pairs[vector..], pitch), STRIP / 2);
        }
        for (r, sums) in acc.iter().enumerate() {
            let row = &mut dw[(token + r) * hidden..][..hidden];
            for (n, &sum) in sums.iter().enumerate() {
                let place = &mut row[(16 * (vector + n)).min(hidden)..];
                store(place, _mm512_add_ps(load(place), sum));
            }
        }
    }
);

avx512_entry!(
    /// Adds the segments' partial dx of one strip, `[width, 32]`.
    fn sum_partial_dx(
        avx512: Avx512,
        partials: &[SegmentPartial],
        strip: usize,
        sums: &mut [V512],
    ) {
        for partial in partials {
            let dx = &partial.dx[strip * sums.len()..][..sums.len()];
            for (sum, dx) in sums.iter_mut().zip(dx) {
                sum.store(_mm512_add_ps(sum.load(), dx.load()));
            }
        }
    }
);
