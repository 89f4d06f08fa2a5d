//! Attention for heads of 2, 4, 6 or 8 components, in f32: at such widths the exponentials are the work.
//!
//! A task is one key/value head of one sequence with the query heads that share it; keys and values lie on
//! their side, so that a vector holds one component of sixteen keys. Four query rows go together. Where no
//! score can be large, which the longest query and the longest key tell, softmax needs no maximum, and
//! scores, exponentials and both sums are one pass in registers; else a pass for the maxima comes first.

// Several arrays go by one index.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::{
    __m512, _mm512_add_ps, _mm512_castpd_ps, _mm512_castps_pd, _mm512_fmadd_ps, _mm512_fmsub_ps,
    _mm512_mask_mov_ps, _mm512_maskz_mov_ps, _mm512_max_ps, _mm512_mul_ps, _mm512_reduce_max_ps,
    _mm512_set1_ps, _mm512_setzero_ps, _mm512_shuffle_f32x4, _mm512_unpackhi_pd,
    _mm512_unpackhi_ps, _mm512_unpacklo_pd, _mm512_unpacklo_ps,
};
use std::f32::consts::{LN_2, LOG2_E};

use rayon::prelude::*;

use super::super::super::memory::Memory;
use super::lines::{Line, exp2};
use crate::llama::ops::{Attention, AttentionBackward, AttentionShape};

/// Query rows that go together.
const ROWS: usize = 4;
/// Scores to base 2 up to which softmax needs no maximum: neither their powers nor the sum of a sequence's
/// leave f32, and the largest is far above where it ends.
const SMALL: f32 = 60.0;

/// Whether these kernels are for heads of this width.
pub(super) fn takes(shape: &AttentionShape) -> bool {
    matches!(shape.head_dim, 2 | 4 | 6 | 8)
}

/// # Safety
/// The processor has AVX-512 with bfloat16.
pub(super) unsafe fn forward(o: &Attention, memory: &mut Memory<f32>) {
    let shape = o.shape;
    let [q, k, v, out, lse] = memory.floats.get([o.q, o.k, o.v, o.out, o.lse]);
    let first_key = memory.indices.one(o.first_key);
    let (d, seq_len) = (shape.head_dim, shape.seq_len);
    let queries = shape.group() * seq_len;
    let heads: Vec<Vec<f32>> = q
        .par_chunks(queries * d)
        .zip(k.par_chunks(seq_len * d).zip(v.par_chunks(seq_len * d)))
        .zip(lse.par_chunks_mut(queries))
        .enumerate()
        .map(|(task, ((q, (k, v)), lse))| {
            let first_key = &first_key[task / shape.kv_heads * seq_len..][..seq_len];
            let mut out = vec![0.0; queries * d];
            let head = Head { q, k, v, first_key, group: shape.group() };
            // SAFETY: the caller's.
            unsafe {
                match d {
                    2 => attend::<2>(&head, &mut out, lse),
                    4 => attend::<4>(&head, &mut out, lse),
                    6 => attend::<6>(&head, &mut out, lse),
                    _ => attend::<8>(&head, &mut out, lse),
                }
            }
            out
        })
        .collect();
    // From `[seq_len, group, head_dim]` a task to rows of all heads side by side.
    let width = shape.group() * d;
    out.par_chunks_mut(shape.q_width()).with_min_len(64).enumerate().for_each(|(row, out)| {
        let (sequence, position) = (row / seq_len, row % seq_len);
        for (kv_head, out) in out.chunks_mut(width).enumerate() {
            let head = &heads[sequence * shape.kv_heads + kv_head];
            out.copy_from_slice(&head[position * width..][..width]);
        }
    });
}

/// # Safety
/// The processor has AVX-512 with bfloat16.
pub(super) unsafe fn backward(o: &AttentionBackward, memory: &mut Memory<f32>) {
    let shape = o.shape;
    let [q, k, v, out, lse, dout, dq, dk, dv] =
        memory.floats.get([o.q, o.k, o.v, o.out, o.lse, o.dout, o.dq, o.dk, o.dv]);
    let (out, dout) = (&*out, &*dout);
    let first_key = memory.indices.one(o.first_key);
    let (d, seq_len) = (shape.head_dim, shape.seq_len);
    let queries = shape.group() * seq_len;
    let width = shape.group() * d;
    dq.par_chunks_mut(queries * d)
        .zip(dk.par_chunks_mut(seq_len * d).zip(dv.par_chunks_mut(seq_len * d)))
        .zip(q.par_chunks(queries * d).zip(lse.par_chunks(queries)))
        .zip(k.par_chunks(seq_len * d).zip(v.par_chunks(seq_len * d)))
        .enumerate()
        .for_each(|(task, (((dq, (dk, dv)), (q, lse)), (k, v)))| {
            let (sequence, kv_head) = (task / shape.kv_heads, task % shape.kv_heads);
            let first_key = &first_key[sequence * seq_len..][..seq_len];
            // `[seq_len, group]`, as this task's rows go.
            let (mut douts, mut deltas) = (Vec::new(), Vec::new());
            for position in 0..seq_len {
                let at = (sequence * seq_len + position) * shape.q_width() + kv_head * width;
                let (dout, out) = (&dout[at..at + width], &out[at..at + width]);
                douts.extend_from_slice(dout);
                deltas.extend(dout.chunks(d).zip(out.chunks(d)).map(|(dout, out)| {
                    dout.iter().zip(out).map(|(dout, out)| dout * out).sum::<f32>()
                }));
            }
            let head = Head { q, k, v, first_key, group: shape.group() };
            let given = Given { lse, dout: &douts, delta: &deltas };
            // SAFETY: the caller's.
            unsafe {
                match d {
                    2 => attend_backward::<2>(&head, &given, dq, dk, dv),
                    4 => attend_backward::<4>(&head, &given, dq, dk, dv),
                    6 => attend_backward::<6>(&head, &given, dq, dk, dv),
                    _ => attend_backward::<8>(&head, &given, dq, dk, dv),
                }
            }
        });
}

/// What a task reads.
struct Head<'a> {
    /// `[group, seq_len, head_dim]`
    q: &'a [f32],
    /// `[seq_len, head_dim]`
    k: &'a [f32],
    v: &'a [f32],
    /// `[seq_len]`
    first_key: &'a [u32],
    group: usize,
}

/// What the backward reads besides: the forward's `[group, seq_len]` log-sum-exp, and
/// `[seq_len, group]` of the output's gradient and its product with the output.
struct Given<'a> {
    lse: &'a [f32],
    dout: &'a [f32],
    delta: &'a [f32],
}

impl Head<'_> {
    /// How many query rows there are. They go by columns: all heads of a position see the same keys.
    fn rows(&self) -> usize {
        self.first_key.len() * self.group
    }

    /// Where a row lies in `[group, seq_len]`.
    fn place(&self, row: usize) -> usize {
        row % self.group * self.first_key.len() + row / self.group
    }

    fn query<const D: usize>(&self, row: usize) -> [f32; D] {
        let q = &self.q[self.place(row) * D..][..D];
        std::array::from_fn(|c| q[c])
    }

    /// The keys that a row sees.
    fn seen(&self, row: usize) -> (usize, usize) {
        let position = row / self.group;
        ((self.first_key[position] as usize).min(position + 1), position + 1)
    }

    /// Four rows from `row` on. Those past the last are the last once more.
    fn group_of(&self, row: usize) -> Group {
        let rows = std::array::from_fn(|r| (row + r).min(self.rows() - 1));
        let seen = rows.map(|row| self.seen(row));
        let start = seen.iter().map(|s| s.0).min().unwrap_or(0) / 16;
        let end = seen.iter().map(|s| s.1).max().unwrap_or(0).div_ceil(16);
        let whole_start = seen.iter().map(|s| s.0).max().unwrap_or(0).div_ceil(16);
        let whole_end = (seen.iter().map(|s| s.1).min().unwrap_or(0) / 16).max(start);
        Group { rows, seen, start, end, whole: (whole_start.min(whole_end), whole_end) }
    }
}

/// Rows that go together, and what they see in chunks of sixteen keys.
struct Group {
    rows: [usize; ROWS],
    seen: [(usize, usize); ROWS],
    /// The chunks that any row sees something of, and those that all see whole.
    start: usize,
    end: usize,
    whole: (usize, usize),
}

impl Group {
    /// Which of a chunk's keys each row sees.
    fn masks(&self, chunk: usize) -> [u16; ROWS] {
        let below = |n: usize| ((1u32 << n.saturating_sub(16 * chunk).min(16)) - 1) as u16;
        self.seen.map(|(start, end)| below(end) & !below(start))
    }
}

/// `[columns, D]` on its side: `[D, columns]` in whole lines, zero beyond the columns.
fn turned<const D: usize>(rows: &[f32]) -> Vec<Line> {
    let lines = (rows.len() / D).div_ceil(16);
    let mut out = vec![Line::ZERO; D * lines];
    for (position, row) in rows.chunks_exact(D).enumerate() {
        for (c, &value) in row.iter().enumerate() {
            out[c * lines + position / 16].floats_mut()[position % 16] = value;
        }
    }
    out
}

fn turn_back<const D: usize>(sideways: &[Line], rows: &mut [f32]) {
    let lines = sideways.len() / D;
    for (position, row) in rows.chunks_exact_mut(D).enumerate() {
        for (c, value) in row.iter_mut().enumerate() {
            *value = sideways[c * lines + position / 16].floats()[position % 16];
        }
    }
}

/// The length of the longest row of `D`.
fn longest<const D: usize>(rows: &[f32]) -> f32 {
    let square = |row: &[f32]| row.iter().map(|x| x * x).sum::<f32>();
    rows.chunks_exact(D).map(square).fold(0.0, f32::max).sqrt()
}

/// What scores are multiplied by to be powers of 2: `log2 e / sqrt(D)`.
fn to_base_2(d: usize) -> f32 {
    (std::f64::consts::LOG2_E / (d as f64).sqrt()) as f32
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn attend<const D: usize>(head: &Head, out: &mut [f32], lse: &mut [f32]) {
    let (keys, values) = (turned::<D>(head.k), turned::<D>(head.v));
    let lines = keys.len() / D;
    let keys: [&[Line]; D] = std::array::from_fn(|c| &keys[c * lines..][..lines]);
    let values: [&[Line]; D] = std::array::from_fn(|c| &values[c * lines..][..lines]);
    let scale = to_base_2(D);
    // Not so where one is no number.
    let small = longest::<D>(head.q) * longest::<D>(head.k) * scale <= SMALL;
    for row in (0..head.rows()).step_by(ROWS) {
        let group = head.group_of(row);
        let mut q = [[_mm512_setzero_ps(); D]; ROWS];
        for (q, &row) in q.iter_mut().zip(&group.rows) {
            for (q, value) in q.iter_mut().zip(head.query::<D>(row)) {
                *q = _mm512_set1_ps(value * scale);
            }
        }
        let shifts = if small { [0.0; ROWS] } else { peaks(&q, &keys, &group) };
        let mut sums = Sums::<D>::new(&shifts);
        for chunk in group.start..group.whole.0 {
            sums.add::<true>(&q, &keys, &values, chunk, &group);
        }
        for chunk in group.whole.0..group.whole.1 {
            sums.add::<false>(&q, &keys, &values, chunk, &group);
        }
        for chunk in group.whole.1..group.end {
            sums.add::<true>(&q, &keys, &values, chunk, &group);
        }
        let mut flat = [_mm512_setzero_ps(); 48];
        for r in 0..ROWS {
            flat[r] = sums.sum[r];
            flat[ROWS + r * D..][..D].copy_from_slice(&sums.out[r]);
        }
        let totals = totals(&flat, ROWS * (1 + D));
        for r in 0..ROWS.min(head.rows() - row) {
            let sum = totals[r];
            let sees = group.seen[r].0 < group.seen[r].1;
            let scale = if sees { 1.0 / sum } else { 0.0 };
            lse[head.place(row + r)] = if sees { shifts[r] * LN_2 + sum.ln() } else { 0.0 };
            let out = &mut out[(row + r) * D..][..D];
            for (out, total) in out.iter_mut().zip(&totals[ROWS + r * D..]) {
                *out = total * scale;
            }
        }
    }
}

/// `dot(q, keys) - shift` for sixteen keys.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn score<const D: usize>(q: &[__m512; D], keys: &[__m512; D], shift: __m512) -> __m512 {
    let mut score = _mm512_fmsub_ps(q[0], keys[0], shift);
    for c in 1..D {
        score = _mm512_fmadd_ps(q[c], keys[c], score);
    }
    score
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn at<const D: usize>(sideways: &[&[Line]; D], chunk: usize) -> [__m512; D] {
    let mut lines = [_mm512_setzero_ps(); D];
    for (line, sideways) in lines.iter_mut().zip(sideways) {
        *line = sideways[chunk].load();
    }
    lines
}

/// The largest score of each row; 0 for one that sees nothing.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn peaks<const D: usize>(
    q: &[[__m512; D]; ROWS],
    keys: &[&[Line]; D],
    group: &Group,
) -> [f32; ROWS] {
    let nothing = _mm512_set1_ps(f32::NEG_INFINITY);
    let mut max = [nothing; ROWS];
    for chunk in group.start..group.end {
        let keys = at(keys, chunk);
        for ((max, q), mask) in max.iter_mut().zip(q).zip(group.masks(chunk)) {
            let score = score(q, &keys, _mm512_setzero_ps());
            *max = _mm512_max_ps(*max, _mm512_mask_mov_ps(nothing, mask, score));
        }
    }
    let mut peaks = [0.0; ROWS];
    for (peak, max) in peaks.iter_mut().zip(max) {
        let max = _mm512_reduce_max_ps(max);
        *peak = if max == f32::NEG_INFINITY { 0.0 } else { max };
    }
    peaks
}

/// What a group's exponentials add up to, a lane being every sixteenth key.
struct Sums<const D: usize> {
    shift: [__m512; ROWS],
    sum: [__m512; ROWS],
    out: [[__m512; D]; ROWS],
}

impl<const D: usize> Sums<D> {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn new(shifts: &[f32; ROWS]) -> Self {
        let zero = _mm512_setzero_ps();
        let mut shift = [zero; ROWS];
        for (shift, &value) in shift.iter_mut().zip(shifts) {
            *shift = _mm512_set1_ps(value);
        }
        Self { shift, sum: [zero; ROWS], out: [[zero; D]; ROWS] }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn add<const MASKED: bool>(
        &mut self,
        q: &[[__m512; D]; ROWS],
        keys: &[&[Line]; D],
        values: &[&[Line]; D],
        chunk: usize,
        group: &Group,
    ) {
        let (keys, values) = (at(keys, chunk), at(values, chunk));
        let masks = if MASKED { group.masks(chunk) } else { [0; ROWS] };
        for r in 0..ROWS {
            let mut p = exp2(score(&q[r], &keys, self.shift[r]));
            if MASKED {
                p = _mm512_maskz_mov_ps(masks[r], p);
            }
            self.sum[r] = _mm512_add_ps(self.sum[r], p);
            for c in 0..D {
                self.out[r][c] = _mm512_fmadd_ps(p, values[c], self.out[r][c]);
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn attend_backward<const D: usize>(
    head: &Head,
    given: &Given,
    dq: &mut [f32],
    dk: &mut [f32],
    dv: &mut [f32],
) {
    let (keys, values) = (turned::<D>(head.k), turned::<D>(head.v));
    let lines = keys.len() / D;
    let keys: [&[Line]; D] = std::array::from_fn(|c| &keys[c * lines..][..lines]);
    let values: [&[Line]; D] = std::array::from_fn(|c| &values[c * lines..][..lines]);
    // `[lines, D]` of dk, then of dv.
    let mut sums = vec![[[Line::ZERO; D]; 2]; lines];
    let scale = ((D as f64).sqrt().recip()) as f32;
    for row in (0..head.rows()).step_by(ROWS) {
        let group = head.group_of(row);
        let mut rows = Rows::<D>::new();
        for r in 0..ROWS {
            let from = group.rows[r];
            let there = row + r < head.rows();
            for (c, q) in head.query::<D>(from).into_iter().enumerate() {
                rows.q[r][c] = _mm512_set1_ps(q * to_base_2(D));
                // A row that is there once more adds nothing.
                rows.plain[r][c] = _mm512_set1_ps(if there { q * scale } else { 0.0 });
                let dout = if there { given.dout[from * D + c] } else { 0.0 };
                rows.dout[r][c] = _mm512_set1_ps(dout);
            }
            rows.lse[r] = _mm512_set1_ps(given.lse[head.place(from)] * LOG2_E);
            rows.delta[r] = _mm512_set1_ps(given.delta[from]);
        }
        // Three loops: one with both kinds in it holds less in registers, and takes a third longer.
        for chunk in group.start..group.whole.0 {
            rows.add::<true>(&keys, &values, chunk, &group, &mut sums[chunk]);
        }
        for chunk in group.whole.0..group.whole.1 {
            rows.add::<false>(&keys, &values, chunk, &group, &mut sums[chunk]);
        }
        for chunk in group.whole.1..group.end {
            rows.add::<true>(&keys, &values, chunk, &group, &mut sums[chunk]);
        }
        let mut flat = [_mm512_setzero_ps(); 48];
        flat[..ROWS * D].copy_from_slice(rows.dq.as_flattened());
        let totals = totals(&flat, ROWS * D);
        for r in 0..ROWS.min(head.rows() - row) {
            let dq = &mut dq[head.place(row + r) * D..][..D];
            for (dq, total) in dq.iter_mut().zip(&totals[r * D..]) {
                *dq = total * scale;
            }
        }
    }
    for (which, out) in [dk, dv].into_iter().enumerate() {
        let sideways: Vec<Line> =
            (0..D).flat_map(|c| sums.iter().map(move |sums| sums[which][c])).collect();
        turn_back::<D>(&sideways, out);
    }
}

/// Four rows of the backward.
struct Rows<const D: usize> {
    /// Scaled to base 2.
    q: [[__m512; D]; ROWS],
    /// Times 1 / sqrt(D).
    plain: [[__m512; D]; ROWS],
    dout: [[__m512; D]; ROWS],
    /// To base 2.
    lse: [__m512; ROWS],
    delta: [__m512; ROWS],
    dq: [[__m512; D]; ROWS],
}

impl<const D: usize> Rows<D> {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn new() -> Self {
        let (one, all) = ([_mm512_setzero_ps(); ROWS], [[_mm512_setzero_ps(); D]; ROWS]);
        Self { q: all, plain: all, dout: all, lse: one, delta: one, dq: all }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn add<const MASKED: bool>(
        &mut self,
        keys: &[&[Line]; D],
        values: &[&[Line]; D],
        chunk: usize,
        group: &Group,
        [dk_sums, dv_sums]: &mut [[Line; D]; 2],
    ) {
        let (keys, values) = (at(keys, chunk), at(values, chunk));
        let masks = if MASKED { group.masks(chunk) } else { [0; ROWS] };
        let (mut dk, mut dv) = ([_mm512_setzero_ps(); D], [_mm512_setzero_ps(); D]);
        for c in 0..D {
            dk[c] = dk_sums[c].load();
            dv[c] = dv_sums[c].load();
        }
        for r in 0..ROWS {
            let mut p = exp2(score(&self.q[r], &keys, self.lse[r]));
            if MASKED {
                p = _mm512_maskz_mov_ps(masks[r], p);
            }
            let ds = _mm512_mul_ps(p, score(&self.dout[r], &values, self.delta[r]));
            for c in 0..D {
                dv[c] = _mm512_fmadd_ps(p, self.dout[r][c], dv[c]);
                dk[c] = _mm512_fmadd_ps(ds, self.plain[r][c], dk[c]);
                self.dq[r][c] = _mm512_fmadd_ps(ds, keys[c], self.dq[r][c]);
            }
        }
        for c in 0..D {
            dk_sums[c].store(dk[c]);
            dv_sums[c].store(dv[c]);
        }
    }
}

/// The sums of the lanes of the first `count` vectors.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn totals(vectors: &[__m512; 48], count: usize) -> [f32; 48] {
    let mut totals = [0.0; 48];
    for (vectors, totals) in vectors
        .as_chunks::<16>()
        .0
        .iter()
        .zip(totals.as_chunks_mut::<16>().0)
        .take(count.div_ceil(16))
    {
        let mut line = Line::ZERO;
        line.store(sixteen_totals(vectors));
        *totals = *line.floats();
    }
    totals
}

/// Lane `i` of the result is the sum of all lanes of the vector `i`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn sixteen_totals(v: &[__m512; 16]) -> __m512 {
    let mut fours = [_mm512_setzero_ps(); 4];
    for (i, four) in fours.iter_mut().enumerate() {
        // Each quarter of a vector to one sum: of v[4 i], v[4 i + 1], ... in its four lanes.
        let [a, b, c, d] = [v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]];
        let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
        let low = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
        let high = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
        *four = _mm512_add_ps(low, high);
    }
    let [a, b, c, d] = fours;
    quarters(quarters(a, b), quarters(c, d))
}

/// Even quarters plus odd ones: the two sums of `a`, then those of `b`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn quarters(a: __m512, b: __m512) -> __m512 {
    _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b))
}
