//! The head and the cross-entropy with products of bfloat16 held in registers; a lane is a row.
//!
//! Rows go in strips of 32, the vocabulary in segments, each a task. A first pass computes the logits a
//! few words at a time and keeps of them each row's maximum, where it is, and the sum of exponentials:
//! with all segments' that is the log-sum-exp. A second pass computes the logits again, so that softmax is
//! known at once, and its product with the words, dx, and with the rows, dw, follow while a segment's
//! softmax lies in the core's own cache. Four products instead of three, and no plane of exponentials on
//! its way to memory and back.
//!
//! Rounded as `reference` does it: x, the words, and the logits' gradient. But a row's target is left out
//! of that gradient and its `p - 1` reckoned in f64, unrounded. Sums, maxima and exponentials are f32.

use std::arch::x86_64::{
    __m512, _CMP_EQ_OQ, _CMP_GT_OQ, _mm512_add_ps, _mm512_castsi512_ps, _mm512_cmp_ps_mask,
    _mm512_fmadd_ps, _mm512_fmsub_ps, _mm512_mask_mov_ps, _mm512_max_ps, _mm512_mul_ps,
    _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps,
};
use std::f32::consts::LOG2_E;

use half::bf16;
use rayon::prelude::*;

use super::super::super::memory::Memory;
use super::lines::{
    Line, STRIP, dot, exp2, load, pack_lanes, pack_pairs, pack_rows, row, store, width, zipped,
};
use crate::llama::ops::FusedLinearCrossEntropy;
use crate::tokens::IGNORE;

/// Words of the vocabulary a task takes.
const SEGMENT: usize = 512;
/// Strips whose softmax of one segment (256 KiB) stays in a core's cache between dx and dw.
const STRIPS: usize = 8;

/// Packed operands and what lasts between the passes, kept from step to step.
#[derive(Default)]
pub(super) struct Head {
    /// `[vocab, width]`: the components of a word one after another.
    words: Vec<Line>,
    /// `[vocab / 2, width]`: pairs of one component of two words.
    pairs: Vec<Line>,
    /// `[strips, width / 2, 32]`: pairs of components of 32 rows.
    lanes: Vec<Line>,
    /// `[rows / 2, width]`: pairs of one component of two rows.
    rows: Vec<Line>,
    shares: Vec<Share>,
}

/// What a segment knows of a block's rows.
#[derive(Default)]
struct Share {
    /// `[strips, 2]`: the largest logit, the first word that has it, and the sum of exponentials over it.
    max: Vec<Line>,
    best: Vec<Line>,
    sum: Vec<Line>,
    /// `[rows]`: the target's logit, where it is one of these words.
    hit: Vec<f32>,
    /// `[strips, width, 2]`
    dx: Vec<Line>,
}

/// Bytes that a head takes beside its buffers, the same for any number of threads but for what each
/// keeps in its cache.
pub(super) fn workspace(o: &FusedLinearCrossEntropy) -> usize {
    let (segments, width) = (o.w.rows.div_ceil(SEGMENT), width(o.w.cols));
    let rows = o.rows.next_multiple_of(STRIP).min(STRIPS * STRIP);
    let words = 2 * 2 * segments * SEGMENT * width;
    let shares = segments * rows * (4 * 4 + if o.dx.is_some() { 4 * width } else { 0 });
    words + 2 * 2 * rows * width + shares
}

impl Head {
    /// # Safety
    /// The processor has AVX-512 with bfloat16.
    pub unsafe fn loss(
        &mut self,
        o: &FusedLinearCrossEntropy,
        memory: &mut Memory<f32>,
        scale: f32,
    ) {
        let (vocab, hidden) = (o.w.rows, o.w.cols);
        let (width, segments) = (width(hidden), vocab.div_ceil(SEGMENT));
        let w = &memory.parameters[o.w.range()];
        let targets = memory.indices.one(o.targets).to_vec();
        let (x, nll, mut dx) = if let Some(dx) = o.dx {
            let [x, nll, dx] = memory.floats.get([o.x, o.nll, dx]);
            (x, nll, Some(dx))
        } else {
            let [x, nll] = memory.floats.get([o.x, o.nll]);
            (x, nll, None)
        };
        // Lines of a segment: of its words, and of their pairs.
        let lines = SEGMENT * width / 32;
        let Self { words, pairs, lanes, rows, shares } = self;
        for packed in [&mut *words, &mut *pairs] {
            packed.resize(packed.len().max(segments * lines), Line::ZERO);
        }
        shares.resize_with(shares.len().max(segments), Share::default);
        let shares = &mut shares[..segments];
        let packed = words.par_chunks_mut(lines).zip(pairs.par_chunks_mut(lines));
        packed.zip(w.par_chunks(SEGMENT * hidden)).for_each(|((words, pairs), w)| {
            // SAFETY: the caller's.
            unsafe {
                pack_rows(w, hidden, words);
                pack_pairs(w, hidden, pairs);
            }
        });
        let segment = |at: usize| Segment {
            words: &words[at * lines..][..lines],
            pairs: &pairs[at * lines..][..lines],
            first: at * SEGMENT,
            count: (vocab - at * SEGMENT).min(SEGMENT),
            width,
        };

        let mut argmax = vec![0; o.rows];
        for from in (0..o.rows).step_by(STRIPS * STRIP) {
            let to = (from + STRIPS * STRIP).min(o.rows);
            let strips = (to - from).div_ceil(STRIP);
            let (x, targets) = (&x[from * hidden..to * hidden], &targets[from..to]);
            for packed in [&mut *lanes, &mut *rows] {
                packed.clear();
                packed.resize(strips * width, Line::ZERO);
            }
            // SAFETY: the caller's.
            unsafe {
                pack_lanes(x, hidden, lanes);
                pack_pairs(x, hidden, rows);
            }
            let (lanes, rows) = (&*lanes, &*rows);
            shares.par_iter_mut().enumerate().for_each(|(at, share)| {
                // SAFETY: the caller's.
                unsafe { first(&segment(at), lanes, targets, share) };
            });
            let known = &*shares;
            let outcomes: Vec<Outcome> = targets
                .par_chunks(STRIP)
                .enumerate()
                // SAFETY: the caller's.
                .map(|(strip, targets)| unsafe { outcome(known, strip, targets, scale) })
                .collect();
            let known = || outcomes.iter().flat_map(|outcome| &outcome.rows);
            for (row, known) in known().enumerate() {
                nll[from + row] = known.nll;
                argmax[from + row] = known.argmax;
            }

            let Some(dx) = &mut dx else { continue };
            let dw = &mut memory.gradients[o.w.range()];
            let tasks = shares.par_iter_mut().zip(dw.par_chunks_mut(SEGMENT * hidden));
            tasks.enumerate().for_each_init(Scratch::new, |scratch, (at, (share, dw))| {
                let segment = segment(at);
                // SAFETY: the caller's.
                unsafe { second(&segment, lanes, rows, &outcomes, share, scratch, hidden, dw) };
            });
            let shares = &*shares;
            let dx = &mut dx[from * hidden..to * hidden];
            dx.par_chunks_mut(STRIP * hidden).zip(&outcomes).enumerate().for_each(
                |(strip, (dx, outcome))| {
                    let mut sums = vec![Line::ZERO; 2 * width];
                    // SAFETY: the caller's.
                    unsafe { join(shares, strip, &mut sums) };
                    for (lane, (dx, row)) in dx.chunks_mut(hidden).zip(&outcome.rows).enumerate() {
                        for (dx, sums) in dx.iter_mut().zip(sums.chunks_exact(2)) {
                            *dx = sums[lane / 16].floats()[lane % 16];
                        }
                        row.add_target(w, dx);
                    }
                },
            );
            for (row, x) in known().zip(x.chunks(hidden)) {
                row.add_row(x, dw);
            }
        }
        memory.indices.get([o.argmax])[0].copy_from_slice(&argmax);
    }
}

/// A task's words.
struct Segment<'a> {
    words: &'a [Line],
    pairs: &'a [Line],
    /// The first word, and how many.
    first: usize,
    count: usize,
    width: usize,
}

impl Segment<'_> {
    /// The place of a strip's targets among these words, with their lanes.
    fn hits(&self, targets: &[u32]) -> impl Iterator<Item = (usize, usize)> {
        let place = |&target: &u32| (target as usize).wrapping_sub(self.first);
        targets.iter().map(place).enumerate().filter(|&(_, word)| word < self.count)
    }

    /// The logits of `R` words from `word` on for a strip of rows.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn logits<const R: usize>(&self, word: usize, lanes: &[Line]) -> [[__m512; 2]; R] {
        let mut sums = [[_mm512_setzero_ps(); 2]; R];
        let units = self.width / 2;
        let words = &self.words[word * units / 16..][..R * units / 16];
        dot(&mut sums, (bytemuck::cast_slice(words), units, 1), (lanes, 2), units);
        sums
    }
}

/// A strip of `[strips, ..]`.
fn strip(lanes: &[Line], at: usize, width: usize) -> &[Line] {
    &lanes[at * width..][..width]
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn first(segment: &Segment, lanes: &[Line], targets: &[u32], share: &mut Share) {
    let Segment { count, width, .. } = *segment;
    for lines in [&mut share.max, &mut share.sum, &mut share.best] {
        lines.resize(2 * targets.len().div_ceil(STRIP), Line::ZERO);
    }
    share.hit.resize(targets.len(), 0.0);
    for (at, targets) in targets.chunks(STRIP).enumerate() {
        let lanes = strip(lanes, at, width);
        let mut seen = Seen::new();
        let whole = count / 8 * 8;
        for word in (0..whole).step_by(8) {
            seen.add(word, &segment.logits::<8>(word, lanes));
        }
        for word in whole..count {
            seen.add(word, &segment.logits::<1>(word, lanes));
        }
        for half in 0..2 {
            share.max[2 * at + half].store(seen.max[half]);
            share.best[2 * at + half].store(seen.best[half]);
            share.sum[2 * at + half].store(seen.sum[half]);
        }
        for (lane, word) in segment.hits(targets) {
            let logit = segment.logits::<1>(word, lanes)[0][lane / 16];
            let mut line = Line::ZERO;
            line.store(logit);
            share.hit[at * STRIP + lane] = line.floats()[lane % 16];
        }
    }
}

/// What has been seen of a strip's logits.
struct Seen {
    max: [__m512; 2],
    /// Words, as the bits of u32.
    best: [__m512; 2],
    /// Of exponentials over the maximum.
    sum: [__m512; 2],
}

impl Seen {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn new() -> Self {
        let (least, zero) = (_mm512_set1_ps(f32::NEG_INFINITY), _mm512_setzero_ps());
        Self { max: [least; 2], best: [zero; 2], sum: [zero; 2] }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn add<const R: usize>(&mut self, word: usize, logits: &[[__m512; 2]; R]) {
        let log2_e = _mm512_set1_ps(LOG2_E);
        for half in 0..2 {
            let mut max = self.max[half];
            for logit in logits {
                max = _mm512_max_ps(max, logit[half]);
            }
            // Seldom, after the first few words.
            if _mm512_cmp_ps_mask::<_CMP_GT_OQ>(max, self.max[half]) != 0 {
                self.rise(word, logits, half, max);
            }
            let shift = _mm512_mul_ps(self.max[half], log2_e);
            for logit in logits {
                let e = exp2(_mm512_fmsub_ps(logit[half], log2_e, shift));
                self.sum[half] = _mm512_add_ps(self.sum[half], e);
            }
        }
    }

    /// Takes over new maxima.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn rise<const R: usize>(
        &mut self,
        word: usize,
        logits: &[[__m512; 2]; R],
        half: usize,
        max: __m512,
    ) {
        let log2_e = _mm512_set1_ps(LOG2_E);
        let higher = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(max, self.max[half]);
        // From the end, so that the first of equals is found last.
        for (r, logit) in logits.iter().enumerate().rev() {
            let here = higher & _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(logit[half], max);
            let place = _mm512_castsi512_ps(_mm512_set1_epi32((word + r) as i32));
            self.best[half] = _mm512_mask_mov_ps(self.best[half], here, place);
        }
        let shift = _mm512_mul_ps(max, log2_e);
        let shrink = exp2(_mm512_fmsub_ps(self.max[half], log2_e, shift));
        self.sum[half] = _mm512_mul_ps(self.sum[half], shrink);
        self.max[half] = max;
    }
}

/// What became of a strip's rows.
struct Outcome {
    rows: Vec<Row>,
    /// `log2(sum of exponentials / scale)`: what a logit to base 2 is over its gradient's power of 2. Plus
    /// infinity where no target counts.
    over: [Line; 2],
}

struct Row {
    target: u32,
    nll: f32,
    argmax: u32,
    /// The gradient of the target's logit.
    slope: f32,
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn outcome(shares: &[Share], strip: usize, targets: &[u32], scale: f32) -> Outcome {
    let log2_e = _mm512_set1_ps(LOG2_E);
    let nowhere = Line([f32::INFINITY.to_bits(); 16]);
    let mut out = Outcome { rows: Vec::with_capacity(targets.len()), over: [nowhere; 2] };
    for (half, targets) in targets.chunks(16).enumerate() {
        let at = 2 * strip + half;
        let mut max = _mm512_set1_ps(f32::NEG_INFINITY);
        for share in shares {
            max = _mm512_max_ps(max, share.max[at].load());
        }
        let shift = _mm512_mul_ps(max, log2_e);
        let mut sum = _mm512_setzero_ps();
        for share in shares {
            let e = exp2(_mm512_fmsub_ps(share.max[at].load(), log2_e, shift));
            sum = _mm512_fmadd_ps(e, share.sum[at].load(), sum);
        }
        let (mut sums, mut shifts) = (Line::ZERO, Line::ZERO);
        sums.store(sum);
        shifts.store(shift);
        for (lane, &target) in targets.iter().enumerate() {
            let lse = f64::from(shifts.floats()[lane]) + f64::from(sums.floats()[lane]).log2();
            let (mut segment, mut max) = (0, f32::NEG_INFINITY);
            for (other, share) in shares.iter().enumerate() {
                let value = share.max[at].floats()[lane];
                if value > max {
                    (segment, max) = (other, value);
                }
            }
            let argmax = segment as u32 * SEGMENT as u32 + shares[segment].best[at].0[lane];
            let mut row = Row { target, nll: 0.0, argmax, slope: 0.0 };
            if target != IGNORE {
                let hit = &shares[target as usize / SEGMENT].hit;
                let logit = f64::from(hit[strip * STRIP + 16 * half + lane]);
                let nll = lse * std::f64::consts::LN_2 - logit;
                row.nll = nll as f32;
                row.slope = ((-nll).exp_m1() * f64::from(scale)) as f32;
                out.over[half].floats_mut()[lane] = (lse - f64::from(scale).log2()) as f32;
            }
            out.rows.push(row);
        }
    }
    out
}

impl Row {
    /// The target's part of a row's dx.
    fn add_target(&self, w: &[f32], dx: &mut [f32]) {
        if self.target != IGNORE {
            let w = &w[self.target as usize * dx.len()..][..dx.len()];
            for (dx, &w) in dx.iter_mut().zip(w) {
                *dx += self.slope * bf16::from_f32(w).to_f32();
            }
        }
    }

    /// A row's part of its target's dw.
    fn add_row(&self, x: &[f32], dw: &mut [f32]) {
        if self.target != IGNORE {
            let dw = &mut dw[self.target as usize * x.len()..][..x.len()];
            for (dw, &x) in dw.iter_mut().zip(x) {
                *dw += self.slope * bf16::from_f32(x).to_f32();
            }
        }
    }
}

/// What a task of the second pass keeps in cache.
struct Scratch {
    /// `[strips, SEGMENT, 32]`: the gradient of a segment's logits.
    plane: Vec<Line>,
    /// `[SEGMENT / 2, 32]`: pairs of words of one strip's.
    zipped: Vec<Line>,
}

impl Scratch {
    fn new() -> Self {
        Self { plane: vec![Line::ZERO; STRIPS * SEGMENT], zipped: vec![Line::ZERO; SEGMENT] }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn second(
    segment: &Segment,
    lanes: &[Line],
    rows: &[Line],
    outcomes: &[Outcome],
    share: &mut Share,
    scratch: &mut Scratch,
    hidden: usize,
    dw: &mut [f32],
) {
    let Segment { count, width, .. } = *segment;
    // The last of an odd number has a neighbour without weight.
    let even = count.next_multiple_of(2);
    let whole = count / 8 * 8;
    share.dx.resize(outcomes.len() * 2 * width, Line::ZERO);
    for (at, outcome) in outcomes.iter().enumerate() {
        let lanes = strip(lanes, at, width);
        let plane = &mut scratch.plane[at * SEGMENT..][..even];
        let zipped = &mut scratch.zipped[..even];
        let over = [outcome.over[0].load(), outcome.over[1].load()];
        for word in (0..whole).step_by(8) {
            softmax(
                &segment.logits::<8>(word, lanes),
                &over,
                &mut plane[word..],
                &mut zipped[word..],
            );
        }
        for word in (whole..count).step_by(2) {
            let mut two = [[_mm512_set1_ps(f32::NEG_INFINITY); 2]; 2];
            two[..1].copy_from_slice(&segment.logits::<1>(word, lanes));
            if word + 1 < count {
                two[1..].copy_from_slice(&segment.logits::<1>(word + 1, lanes));
            }
            softmax(&two, &over, &mut plane[word..], &mut zipped[word..]);
        }
        for (lane, row) in outcome.rows.iter().enumerate() {
            for (_, word) in segment.hits(&[row.target]) {
                let (halves, lines): (&mut [u16], _) = (bytemuck::cast_slice_mut(plane), 32 * word);
                halves[lines + lane] = 0;
                let halves: &mut [u16] = bytemuck::cast_slice_mut(zipped);
                halves[word / 2 * 64 + 2 * lane + word % 2] = 0;
            }
        }
        // dx, with components where words were: [width, 32] = pairs [words / 2, width] of [words / 2, 32].
        let pairs: &[u32] = bytemuck::cast_slice(segment.pairs);
        let dx = &mut share.dx[at * 2 * width..][..2 * width];
        for (component, dx) in dx.chunks_exact_mut(16).enumerate() {
            let mut sums = [[_mm512_setzero_ps(); 2]; 8];
            dot(&mut sums, (&pairs[8 * component..], 1, width), (zipped, 2), even / 2);
            for (sum, dx) in sums.as_flattened().iter().zip(dx) {
                dx.store(*sum);
            }
        }
    }
    let plane = &scratch.plane[..outcomes.len() * SEGMENT];
    let whole = count / 4 * 4;
    for line in (0..width / 16).step_by(4) {
        for word in (0..whole).step_by(4) {
            match width / 16 - line {
                4.. => words::<4, 4>(plane, word, rows, line, hidden, dw),
                _ => words::<4, 2>(plane, word, rows, line, hidden, dw),
            }
        }
        for word in whole..count {
            match width / 16 - line {
                4.. => words::<1, 4>(plane, word, rows, line, hidden, dw),
                _ => words::<1, 2>(plane, word, rows, line, hidden, dw),
            }
        }
    }
}

/// From the logits of an even number of words to their gradient in bfloat16, as rows of a strip and as
/// pairs of words.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn softmax<const R: usize>(
    logits: &[[__m512; 2]; R],
    over: &[__m512; 2],
    plane: &mut [Line],
    zip: &mut [Line],
) {
    let log2_e = _mm512_set1_ps(LOG2_E);
    let two = logits.chunks_exact(2).zip(plane.chunks_exact_mut(2)).zip(zip.chunks_exact_mut(2));
    for ((logits, plane), zip) in two {
        let mut lines = [_mm512_setzero_ps(); 2];
        for ((line, logits), plane) in lines.iter_mut().zip(logits).zip(plane) {
            let low = exp2(_mm512_fmsub_ps(logits[0], log2_e, over[0]));
            let high = exp2(_mm512_fmsub_ps(logits[1], log2_e, over[1]));
            *line = row(low, high);
            plane.store(*line);
        }
        let [low, high] = zipped(lines[0], lines[1]);
        zip[0].store(low);
        zip[1].store(high);
    }
}

/// `R` words and `N` lines of dw, over all rows of a block.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn words<const R: usize, const N: usize>(
    plane: &[Line],
    word: usize,
    rows: &[Line],
    line: usize,
    hidden: usize,
    dw: &mut [f32],
) {
    let lines = width(hidden) / 16;
    let mut sums = [[_mm512_setzero_ps(); N]; R];
    for (plane, rows) in plane.chunks_exact(SEGMENT).zip(rows.chunks_exact(STRIP / 2 * lines)) {
        let words: &[u32] = bytemuck::cast_slice(&plane[word..word + R]);
        dot(&mut sums, (words, 16, 1), (&rows[line..], lines), STRIP / 2);
    }
    for (r, sums) in sums.iter().enumerate() {
        let row = &mut dw[(word + r) * hidden..][..hidden];
        for (n, &sum) in sums.iter().enumerate() {
            let place = &mut row[(16 * (line + n)).min(hidden)..];
            store(place, _mm512_add_ps(load(place), sum));
        }
    }
}

/// Adds the segments' shares of dx, `[width, 32]`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn join(shares: &[Share], strip: usize, sums: &mut [Line]) {
    for share in shares {
        let dx = &share.dx[strip * sums.len()..][..sums.len()];
        for (sum, dx) in sums.iter_mut().zip(dx) {
            sum.store(_mm512_add_ps(sum.load(), dx.load()));
        }
    }
}
