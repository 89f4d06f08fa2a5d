//! The head and the cross-entropy with products held in registers; a lane is a row.
//!
//! Rows go in strips of 32, the vocabulary in segments, each a task. The first pass computes a
//! segment's logits for one strip, which stay in cache, turns them into exponentials over the segment's
//! maximum, and multiplies these by the weights at once: dx, up to a factor a row. The exponentials go to
//! a plane that lasts for a block of rows. The segments' maxima and sums give each row's log-sum-exp and
//! with it the factors, `p = factor * exponential`. The second pass multiplies the plane by the rows of x
//! times their factors: dw.
//!
//! A row's target is left out of the plane, and its `p - 1` reckoned in f64: once p is all but 1 the
//! difference is the whole gradient, and rounding p would lose it.
//!
//! In bfloat16 x and w are rounded as they are packed, the exponentials as they enter the plane (relative
//! to their maximum), and x times its factor; every sum, maximum and factor is f32 or better.

use std::arch::x86_64::{
    __m512, __m512i, _CMP_EQ_OQ, _mm512_add_ps, _mm512_cmp_ps_mask, _mm512_fmadd_ps,
    _mm512_fmsub_ps, _mm512_mask_mov_epi32, _mm512_max_ps, _mm512_mul_ps, _mm512_set1_epi32,
    _mm512_set1_ps, _mm512_setzero_ps, _mm512_sub_ps,
};
use std::f32::consts::LOG2_E;

use half::bf16;
use rayon::prelude::*;

use super::super::super::memory::Memory;
use super::lines::{Line, add_to, dot, exp2, pairs, per_unit, row, zipped};
use crate::llama::ops::HeadLoss;
use crate::tokens::IGNORE;

/// Rows that go together: two vectors.
const STRIP: usize = 32;
/// Words of the vocabulary a task takes.
const SEGMENT: usize = 512;
/// A block's exponentials fill at most this many lines (16 MiB).
const PLANE: usize = 1 << 18;

/// Its packed operands and what lasts between its passes, kept from step to step.
#[derive(Default)]
pub(super) struct Head {
    /// `[vocab, units]`: the components of a word one after another.
    words: Vec<Line>,
    /// `[vocab / 2, width]`: of two words the pairs of a component; in bfloat16 only.
    pairs: Vec<Line>,
    /// `[strips, units, 2]`: the same components of 32 rows.
    x: Vec<Line>,
    /// `[rows, width]` as f32, zero beyond what there is.
    rows: Vec<Line>,
    /// `[segments, strips, words, 32]` exponentials.
    plane: Vec<Line>,
    shares: Vec<Share>,
}

/// What a segment knows of a block's rows.
#[derive(Default)]
struct Share {
    /// `[strips, 2]`: the largest logit, the sum of exponentials over it, and the first word that has it.
    max: Vec<Line>,
    sum: Vec<Line>,
    best: Vec<Line>,
    /// `[rows]`: the target's logit, where it is one of these words.
    hit: Vec<f32>,
    /// `[strips, width, 2]`: exponentials times words.
    dx: Vec<Line>,
}

/// The sizes of one head.
#[derive(Clone, Copy)]
struct Sizes {
    hidden: usize,
    /// Of a row, in whole lines of either kind of number.
    width: usize,
    /// Of a row in its packed form.
    units: usize,
    vocab: usize,
    segments: usize,
    /// Of a block.
    strips: usize,
    /// Lines of the plane that one strip and one segment take.
    patch: usize,
}

impl Sizes {
    fn new(o: &HeadLoss, bf16: bool) -> Self {
        let (vocab, hidden) = (o.w.rows, o.w.cols);
        let width = hidden.next_multiple_of(32);
        let segments = vocab.div_ceil(SEGMENT);
        let patch = SEGMENT * STRIP / 16 / per_unit(bf16);
        let most = (PLANE / (segments * patch)).clamp(1, 16);
        let strips = o.rows.div_ceil(STRIP).clamp(1, most);
        Self { hidden, width, units: width / per_unit(bf16), vocab, segments, strips, patch }
    }

    /// Lines of all that [`Head`] keeps: words, pairs, x and rows, the plane, the shares.
    fn lines(&self, bf16: bool) -> [usize; 6] {
        let rows = self.strips * STRIP;
        let share = self.strips * (2 * self.width + 6 + 2);
        [
            self.segments * SEGMENT * self.units / 16,
            if bf16 { self.segments * SEGMENT / 2 * self.width / 16 } else { 0 },
            rows * self.units / 16,
            rows * self.width / 16,
            self.segments * self.strips * self.patch,
            self.segments * share,
        ]
    }
}

/// Bytes that a head takes beside its buffers.
pub(super) fn workspace(o: &HeadLoss, bf16: bool) -> usize {
    64 * Sizes::new(o, bf16).lines(bf16).iter().sum::<usize>()
}

impl Head {
    /// # Safety
    /// The processor has AVX-512 with bfloat16.
    pub unsafe fn loss<const BF16: bool>(
        &mut self,
        o: &HeadLoss,
        memory: &mut Memory<f32>,
        scale: f32,
    ) {
        let sizes = Sizes::new(o, BF16);
        let Sizes { hidden, width, units, vocab, segments, strips, patch } = sizes;
        let w = &memory.parameters[o.w.range()];
        let targets = memory.indices.one(o.targets).to_vec();
        let (x, nll, mut dx) = if let Some(dx) = o.dx {
            let [x, nll, dx] = memory.floats.get([o.x, o.nll, dx]);
            (x, nll, Some(dx))
        } else {
            let [x, nll] = memory.floats.get([o.x, o.nll]);
            (x, nll, None)
        };
        let [words_len, pairs_len, x_len, rows_len, plane_len, _] = sizes.lines(BF16);
        let Self { words, pairs, x: packed_x, rows: wide_rows, plane, shares } = self;
        for (lines, len) in [
            (&mut *words, words_len),
            (&mut *pairs, if dx.is_some() { pairs_len } else { 0 }),
            (&mut *packed_x, x_len),
            (&mut *wide_rows, rows_len),
            (&mut *plane, if dx.is_some() { plane_len } else { 0 }),
        ] {
            lines.resize(lines.len().max(len), Line::ZERO);
        }
        shares.resize_with(shares.len().max(segments), Share::default);
        let shares = &mut shares[..segments];
        let (words, plane) = (&mut words[..words_len], &mut plane[..]);

        // Lines of a segment, of its words and of their pairs.
        let (word_lines, pair_lines) = (SEGMENT * units / 16, SEGMENT / 2 * width / 16);
        words.par_chunks_mut(word_lines).zip(w.par_chunks(SEGMENT * hidden)).for_each(
            // SAFETY: the caller's.
            |(words, w)| unsafe { pack_words::<BF16>(w, hidden, words) },
        );
        if BF16 && dx.is_some() {
            let pairs = &mut pairs[..pairs_len];
            pairs.par_chunks_mut(pair_lines).zip(w.par_chunks(SEGMENT * hidden)).for_each(
                // SAFETY: the caller's.
                |(pairs, w)| unsafe { pack_pairs(w, hidden, pairs) },
            );
        }
        let words = &*words;
        // What dx is multiplied by: pairs of words, or words, in `[inner, width]`.
        let inner: &[Line] = if BF16 { pairs } else { words };
        let inner_lines = if BF16 { pair_lines } else { word_lines };

        let mut argmax = vec![0; o.rows];
        for from in (0..o.rows).step_by(strips * STRIP) {
            let to = (from + strips * STRIP).min(o.rows);
            let strips = (to - from).div_ceil(STRIP);
            let (x, targets) = (&x[from * hidden..to * hidden], &targets[from..to]);
            let wide_rows = &mut wide_rows[..strips * STRIP * width / 16];
            let packed_x = &mut packed_x[..strips * STRIP * units / 16];
            // SAFETY: the caller's.
            unsafe { pack_rows::<BF16>(x, hidden, wide_rows, packed_x) };
            let (wide_rows, packed_x) = (&*wide_rows, &*packed_x);

            let segment_of = |at: usize| Segment {
                words: &words[at * word_lines..][..word_lines],
                inner: if dx.is_some() { &inner[at * inner_lines..][..inner_lines] } else { &[] },
                first: at * SEGMENT,
                count: (vocab - at * SEGMENT).min(SEGMENT),
                width,
                units,
            };
            let block = strips * patch;
            if dx.is_some() {
                shares.par_iter_mut().zip(plane.par_chunks_mut(block)).enumerate().for_each_init(
                    Scratch::default,
                    |scratch, (at, (share, plane))| {
                        let segment = segment_of(at);
                        // SAFETY: the caller's.
                        unsafe {
                            first::<BF16, true>(&segment, packed_x, targets, plane, share, scratch);
                        }
                    },
                );
            } else {
                shares.par_iter_mut().enumerate().for_each_init(
                    Scratch::default,
                    |scratch, (at, share)| {
                        let segment = segment_of(at);
                        // SAFETY: the caller's.
                        unsafe {
                            first::<BF16, false>(
                                &segment,
                                packed_x,
                                targets,
                                &mut [],
                                share,
                                scratch,
                            );
                        }
                    },
                );
            }

            let shares = &*shares;
            let outcomes: Vec<Outcome> = (0..strips)
                .into_par_iter()
                // SAFETY: the caller's.
                .map(|strip| unsafe { outcome(shares, strip, strip_of(targets, strip), scale) })
                .collect();
            for (row, outcome) in outcomes.iter().flat_map(|o| &o.rows).enumerate() {
                nll[from + row] = outcome.nll;
                argmax[from + row] = outcome.argmax;
            }

            let Some(dx) = &mut dx else { continue };
            let word = |word: u32, component: usize| {
                let value = w[word as usize * hidden + component];
                if BF16 { rounded(value) } else { value }
            };
            dx[from * hidden..to * hidden]
                .par_chunks_mut(STRIP * hidden)
                .zip(&outcomes)
                .enumerate()
                .for_each(|(strip, (dx, outcome))| {
                    let mut sums = vec![Line::ZERO; 2 * width];
                    // SAFETY: the caller's.
                    unsafe { join(shares, strip, outcome, &mut sums) };
                    for (lane, (dx, row)) in dx.chunks_mut(hidden).zip(&outcome.rows).enumerate() {
                        for (component, dx) in dx.iter_mut().enumerate() {
                            *dx = sums[2 * component + lane / 16].floats()[lane % 16];
                            if row.target != IGNORE {
                                *dx += row.slope * word(row.target, component);
                            }
                        }
                    }
                });
            let dw = &mut memory.gradients[o.w.range()];
            dw.par_chunks_mut(SEGMENT * hidden)
                .zip(plane.par_chunks(block))
                .zip(shares)
                .for_each_init(
                    || vec![Line::ZERO; strips * STRIP * width / 16 / per_unit(BF16)],
                    |scaled, ((dw, plane), share)| {
                        // SAFETY: the caller's.
                        unsafe {
                            second::<BF16>(wide_rows, share, &outcomes, plane, hidden, scaled, dw)
                        };
                    },
                );
            for (row, x) in outcomes.iter().flat_map(|o| &o.rows).zip(x.chunks(hidden)) {
                if row.target != IGNORE {
                    let dw = &mut dw[row.target as usize * hidden..][..hidden];
                    for (dw, &x) in dw.iter_mut().zip(x) {
                        *dw += row.slope * if BF16 { rounded(x) } else { x };
                    }
                }
            }
        }
        memory.indices.get([o.argmax])[0].copy_from_slice(&argmax);
    }
}

fn rounded(value: f32) -> f32 {
    bf16::from_f32(value).to_f32()
}

/// The targets of a strip.
fn strip_of(targets: &[u32], strip: usize) -> &[u32] {
    &targets[strip * STRIP..((strip + 1) * STRIP).min(targets.len())]
}

/// A row's components in whole lines, zero beyond what there is.
fn wide<'a>(row: &[f32], line: &'a mut [Line]) -> &'a [Line] {
    line.fill(Line::ZERO);
    bytemuck::cast_slice_mut::<Line, f32>(line)[..row.len()].copy_from_slice(row);
    line
}

/// `[words, hidden]` to `[words, units]`; what is beyond the words stays.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn pack_words<const BF16: bool>(w: &[f32], hidden: usize, out: &mut [Line]) {
    let width = hidden.next_multiple_of(32);
    let mut one = vec![Line::ZERO; width / 16];
    for (word, out) in w.chunks(hidden).zip(out.chunks_mut(width / 16 / per_unit(BF16))) {
        pack_row::<BF16>(wide(word, &mut one), out);
    }
}

/// A row of f32 in its packed form.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn pack_row<const BF16: bool>(wide: &[Line], out: &mut [Line]) {
    if BF16 {
        for (two, out) in wide.chunks_exact(2).zip(out) {
            out.store(row(two[0].load(), two[1].load()));
        }
    } else {
        out.copy_from_slice(wide);
    }
}

/// `[words, hidden]` to `[words / 2, width]` pairs; the last of an odd number has 0 beside it.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn pack_pairs(w: &[f32], hidden: usize, out: &mut [Line]) {
    let width = hidden.next_multiple_of(32);
    let (mut a, mut b) = (vec![Line::ZERO; width / 16], vec![Line::ZERO; width / 16]);
    for (two, out) in w.chunks(2 * hidden).zip(out.chunks_mut(width / 16)) {
        let (first, second) = two.split_at(hidden);
        let (a, b) = (wide(first, &mut a), wide(second, &mut b));
        for ((a, b), out) in a.iter().zip(b).zip(out) {
            out.store(pairs(a.load(), b.load()));
        }
    }
}

/// `[rows, hidden]` to `[rows, width]`, and to `[strips, units, 32]`; rows that are not there are zero.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn pack_rows<const BF16: bool>(x: &[f32], hidden: usize, rows: &mut [Line], packed: &mut [Line]) {
    let width = hidden.next_multiple_of(32);
    let units = width / per_unit(BF16);
    rows.fill(Line::ZERO);
    packed.fill(Line::ZERO);
    let packed: &mut [u32] = bytemuck::cast_slice_mut(packed);
    let mut one = vec![Line::ZERO; units / 16];
    for (at, (x, row)) in x.chunks(hidden).zip(rows.chunks_mut(width / 16)).enumerate() {
        pack_row::<BF16>(wide(x, row), &mut one);
        let strip = &mut packed[at / STRIP * STRIP * units..][..STRIP * units];
        let units: &[u32] = bytemuck::cast_slice(&one);
        for (lanes, &unit) in strip.chunks_exact_mut(STRIP).zip(units) {
            lanes[at % STRIP] = unit;
        }
    }
}

/// A task of the first pass.
struct Segment<'a> {
    words: &'a [Line],
    /// `[inner, width]` units.
    inner: &'a [Line],
    /// The first word, and how many.
    first: usize,
    count: usize,
    width: usize,
    units: usize,
}

/// What a task of the first pass keeps in cache.
#[derive(Default)]
struct Scratch {
    /// `[words, 32]`
    logits: Vec<Line>,
    /// `[words / 2, 32]` pairs.
    zipped: Vec<Line>,
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn first<const BF16: bool, const GRADIENT: bool>(
    segment: &Segment,
    x: &[Line],
    targets: &[u32],
    plane: &mut [Line],
    share: &mut Share,
    scratch: &mut Scratch,
) {
    let &Segment { words, inner, first, count, width, units } = segment;
    let strips = targets.len().div_ceil(STRIP);
    // An odd word out has a neighbour without weight.
    let even = count.next_multiple_of(2);
    scratch.logits.resize(2 * SEGMENT, Line::ZERO);
    scratch.zipped.resize(SEGMENT, Line::ZERO);
    let (logits, pairs) = (&mut scratch.logits[..2 * even], &mut scratch.zipped[..even]);
    for lines in [&mut share.max, &mut share.sum, &mut share.best] {
        lines.resize(2 * strips, Line::ZERO);
    }
    share.hit.resize(targets.len(), 0.0);
    share.dx.resize(if GRADIENT { strips * 2 * width } else { 0 }, Line::ZERO);
    let patch = SEGMENT * STRIP / 16 / per_unit(BF16);
    for strip in 0..strips {
        let x = &x[strip * 2 * units..][..2 * units];
        let max = products::<BF16>(words, count, units, x, logits);
        if even > count {
            logits[2 * count..].fill(Line([f32::NEG_INFINITY.to_bits(); 16]));
        }
        let mut peaks = [Line::ZERO; 2];
        for (peak, max) in peaks.iter_mut().zip(max) {
            peak.store(max);
        }
        // Targets count in the sum and may be the best, but are left out of the plane.
        let targets = strip_of(targets, strip);
        for (lane, &target) in targets.iter().enumerate() {
            let at = (target as usize).wrapping_sub(first);
            if at < count {
                let logit = &mut logits[2 * at + lane / 16].floats_mut()[lane % 16];
                share.hit[strip * STRIP + lane] = *logit;
                *logit = f32::NEG_INFINITY;
            }
        }
        let (sums, found) = if GRADIENT {
            let patch = &mut plane[strip * patch..][..even * STRIP / 16 / per_unit(BF16)];
            exponentials::<BF16, true>(logits, max, patch, pairs)
        } else {
            exponentials::<BF16, false>(logits, max, &mut [], &mut [])
        };
        for half in 0..2 {
            let at = 2 * strip + half;
            share.max[at] = peaks[half];
            share.sum[at].store(sums[half]);
            share.best[at].store(std::arch::x86_64::_mm512_castsi512_ps(found[half]));
        }
        for (lane, &target) in targets.iter().enumerate() {
            let at = (target as usize).wrapping_sub(first);
            if at < count {
                let hit = share.hit[strip * STRIP + lane];
                let (line, lane) = (2 * strip + lane / 16, lane % 16);
                let max = share.max[line].floats()[lane];
                share.sum[line].floats_mut()[lane] += (hit * LOG2_E - max * LOG2_E).exp2();
                if hit == max {
                    let best = &mut share.best[line].0[lane];
                    *best = (*best).min(at as u32);
                }
            }
        }
        if GRADIENT {
            let (exponentials, count) = if BF16 {
                (&*pairs, even / 2)
            } else {
                (&plane[strip * patch..][..2 * count], count)
            };
            let dx = &mut share.dx[strip * 2 * width..][..2 * width];
            weigh::<BF16>(inner, count, width, exponentials, dx);
        }
    }
}

/// The logits of 32 rows, `[words, 32]`; returns each row's largest.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn products<const BF16: bool>(
    words: &[Line],
    count: usize,
    units: usize,
    x: &[Line],
    logits: &mut [Line],
) -> [__m512; 2] {
    let mut max = [_mm512_set1_ps(f32::NEG_INFINITY); 2];
    let whole = count / 8 * 8;
    for word in (0..whole).step_by(8) {
        some_products::<BF16, 8>(words, word, units, x, logits, &mut max);
    }
    for word in whole..count {
        some_products::<BF16, 1>(words, word, units, x, logits, &mut max);
    }
    max
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn some_products<const BF16: bool, const R: usize>(
    words: &[Line],
    word: usize,
    units: usize,
    x: &[Line],
    logits: &mut [Line],
    max: &mut [__m512; 2],
) {
    let mut sums = [[_mm512_setzero_ps(); 2]; R];
    let words: &[u32] = bytemuck::cast_slice(&words[word * units / 16..][..R * units / 16]);
    dot::<BF16, R, 2>(&mut sums, (words, units, 1), (x, 2), units);
    for (sums, logits) in sums.iter().zip(logits[2 * word..].chunks_exact_mut(2)) {
        for half in 0..2 {
            logits[half].store(sums[half]);
            // In this order a sum that is no number becomes the maximum, until the next.
            max[half] = _mm512_max_ps(max[half], sums[half]);
        }
    }
}

/// `2^(logit log2 e - max log2 e)` to the plane and, in bfloat16, as pairs of words; returns the sums and
/// the first word with the largest logit.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn exponentials<const BF16: bool, const GRADIENT: bool>(
    logits: &[Line],
    max: [__m512; 2],
    plane: &mut [Line],
    zip: &mut [Line],
) -> ([__m512; 2], [__m512i; 2]) {
    let log2_e = _mm512_set1_ps(LOG2_E);
    let mut sums = [_mm512_setzero_ps(); 2];
    let mut found = [_mm512_set1_epi32(i32::MAX); 2];
    let shift = [_mm512_mul_ps(max[0], log2_e), _mm512_mul_ps(max[1], log2_e)];
    // From the end, so that the first of equals is found last.
    for pair in (0..logits.len() / 4).rev() {
        let mut rows = [_mm512_setzero_ps(); 2];
        for second in [1, 0] {
            let word = 2 * pair + second;
            let mut e = [_mm512_setzero_ps(); 2];
            for half in 0..2 {
                let logit = logits[2 * word + half].load();
                e[half] = exp2(_mm512_fmsub_ps(logit, log2_e, shift[half]));
                sums[half] = _mm512_add_ps(sums[half], e[half]);
                let best = _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(logit, max[half]);
                let here = _mm512_set1_epi32(word as i32);
                found[half] = _mm512_mask_mov_epi32(found[half], best, here);
            }
            if GRADIENT && BF16 {
                rows[second] = row(e[0], e[1]);
                plane[word].store(rows[second]);
            } else if GRADIENT {
                plane[2 * word].store(e[0]);
                plane[2 * word + 1].store(e[1]);
            }
        }
        if GRADIENT && BF16 {
            let [low, high] = zipped(rows[0], rows[1]);
            zip[2 * pair].store(low);
            zip[2 * pair + 1].store(high);
        }
    }
    (sums, found)
}

/// `dx[width, 32] = inner[inner, width] exponentials[inner, 32]`, summed over inner.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn weigh<const BF16: bool>(
    inner: &[Line],
    count: usize,
    width: usize,
    exponentials: &[Line],
    dx: &mut [Line],
) {
    let inner: &[u32] = bytemuck::cast_slice(inner);
    for (at, dx) in dx.chunks_exact_mut(16).enumerate() {
        let mut sums = [[_mm512_setzero_ps(); 2]; 8];
        dot::<BF16, 8, 2>(&mut sums, (&inner[8 * at..], 1, width), (exponentials, 2), count);
        for (sum, dx) in sums.as_flattened().iter().zip(dx) {
            dx.store(*sum);
        }
    }
}

/// What became of a strip's rows.
struct Outcome {
    rows: Vec<Row>,
    /// The log-sum-exp to base 2, and the scale of the gradient: 0 where no target counts.
    lse: [Line; 2],
    scale: [Line; 2],
}

struct Row {
    target: u32,
    nll: f32,
    argmax: u32,
    /// Of the loss by the target's logit.
    slope: f32,
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn outcome(shares: &[Share], strip: usize, targets: &[u32], scale: f32) -> Outcome {
    let mut out = Outcome { rows: Vec::new(), lse: [Line::ZERO; 2], scale: [Line::ZERO; 2] };
    for half in 0..2 {
        let at = 2 * strip + half;
        let log2_e = _mm512_set1_ps(LOG2_E);
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
        for (lane, &target) in targets.iter().skip(16 * half).take(16).enumerate() {
            let lse = f64::from(shifts.floats()[lane]) + f64::from(sums.floats()[lane]).log2();
            out.lse[half].floats_mut()[lane] = lse as f32;
            let best = shares.iter().enumerate().reduce(|a, b| {
                if b.1.max[at].floats()[lane] > a.1.max[at].floats()[lane] { b } else { a }
            });
            let (segment, best) = best.expect("a vocabulary has words");
            // None is found where no logit is a number.
            let word = best.best[at].0[lane];
            let word = if word as usize >= SEGMENT { 0 } else { word };
            let mut row =
                Row { target, nll: 0.0, argmax: (segment * SEGMENT) as u32 + word, slope: 0.0 };
            if target != IGNORE {
                let share = &shares[target as usize / SEGMENT];
                let logit = f64::from(share.hit[strip * STRIP + 16 * half + lane]);
                let nll = lse * std::f64::consts::LN_2 - logit;
                row.nll = nll as f32;
                row.slope = ((-nll).exp_m1() * f64::from(scale)) as f32;
                out.scale[half].floats_mut()[lane] = scale;
            }
            out.rows.push(row);
        }
    }
    out
}

/// What softmax is of a segment's exponentials, times the scale of the gradient, for 16 rows.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn factor(share: &Share, strip: usize, half: usize, outcome: &Outcome) -> __m512 {
    let log2_e = _mm512_set1_ps(LOG2_E);
    let max = _mm512_mul_ps(share.max[2 * strip + half].load(), log2_e);
    let p = exp2(_mm512_sub_ps(max, outcome.lse[half].load()));
    _mm512_mul_ps(p, outcome.scale[half].load())
}

/// Adds the segments' shares of dx, `[width, 32]`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn join(shares: &[Share], strip: usize, outcome: &Outcome, sums: &mut [Line]) {
    for share in shares {
        let factors = [factor(share, strip, 0, outcome), factor(share, strip, 1, outcome)];
        let dx = &share.dx[strip * sums.len()..][..sums.len()];
        for (sums, dx) in sums.chunks_exact_mut(2).zip(dx.chunks_exact(2)) {
            for half in 0..2 {
                let sum = _mm512_fmadd_ps(factors[half], dx[half].load(), sums[half].load());
                sums[half].store(sum);
            }
        }
    }
}

/// `dw[words, hidden] += plane[words, rows] (factor * x)[rows, hidden]`
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn second<const BF16: bool>(
    rows: &[Line],
    share: &Share,
    outcomes: &[Outcome],
    plane: &[Line],
    hidden: usize,
    scaled: &mut [Line],
    dw: &mut [f32],
) {
    let width = hidden.next_multiple_of(32) / 16;
    let strip_lines = STRIP / per_unit(BF16) * width;
    for (strip, outcome) in outcomes.iter().enumerate() {
        let mut factors = [Line::ZERO; 2];
        for (half, factors) in factors.iter_mut().enumerate() {
            factors.store(factor(share, strip, half, outcome));
        }
        let factor = |lane: usize| factors[lane / 16].floats()[lane % 16];
        let rows = &rows[strip * STRIP * width..][..STRIP * width];
        let scaled = &mut scaled[strip * strip_lines..][..strip_lines];
        scale_rows::<BF16>(rows, factor, width, scaled);
    }
    let patch = SEGMENT * STRIP / 16 / per_unit(BF16);
    let words = dw.len() / hidden;
    let whole = words / 4 * 4;
    for line in (0..width).step_by(4) {
        let b = (&*scaled, line);
        for word in (0..whole).step_by(4) {
            match width - line {
                4.. => tile::<BF16, 4, 4>(plane, patch, word, b, width, hidden, dw),
                _ => tile::<BF16, 4, 2>(plane, patch, word, b, width, hidden, dw),
            }
        }
        for word in whole..words {
            match width - line {
                4.. => tile::<BF16, 1, 4>(plane, patch, word, b, width, hidden, dw),
                _ => tile::<BF16, 1, 2>(plane, patch, word, b, width, hidden, dw),
            }
        }
    }
}

/// Rows times their factors, `[rows, width]`; in bfloat16 pairs of rows, `[rows / 2, width]`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn scale_rows<const BF16: bool>(
    rows: &[Line],
    factor: impl Fn(usize) -> f32,
    width: usize,
    scaled: &mut [Line],
) {
    let step = per_unit(BF16);
    let rows = rows.chunks_exact(step * width);
    for (at, (rows, scaled)) in rows.zip(scaled.chunks_exact_mut(width)).enumerate() {
        let (a, b) =
            (_mm512_set1_ps(factor(step * at)), _mm512_set1_ps(factor(step * at + step - 1)));
        for (line, out) in scaled.iter_mut().enumerate() {
            let first = _mm512_mul_ps(rows[line].load(), a);
            out.store(if BF16 {
                pairs(first, _mm512_mul_ps(rows[width + line].load(), b))
            } else {
                first
            });
        }
    }
}

/// `R` words and `N` lines of dw, over all strips.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn tile<const BF16: bool, const R: usize, const N: usize>(
    plane: &[Line],
    patch: usize,
    word: usize,
    (scaled, line): (&[Line], usize),
    width: usize,
    hidden: usize,
    dw: &mut [f32],
) {
    // Units of a word's 32 rows.
    let units = STRIP / per_unit(BF16);
    let strip_lines = units * width;
    let mut sums = [[_mm512_setzero_ps(); N]; R];
    for (plane, scaled) in plane.chunks_exact(patch).zip(scaled.chunks_exact(strip_lines)) {
        let words: &[u32] = bytemuck::cast_slice(&plane[word * units / 16..][..R * units / 16]);
        dot::<BF16, R, N>(&mut sums, (words, units, 1), (&scaled[line..], width), units);
    }
    for (r, sums) in sums.iter().enumerate() {
        let row = &mut dw[(word + r) * hidden..][..hidden];
        for (n, &sum) in sums.iter().enumerate() {
            let from = (16 * (line + n)).min(hidden);
            add_to(&mut row[from..(from + 16).min(hidden)], sum);
        }
    }
}
