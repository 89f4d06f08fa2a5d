//! Flash-style attention for heads of any width, vectorised across keys.
//!
//! A task is one key/value head of one sequence with the query heads that share it. It turns keys and
//! values on their side once (`[head_dim, position]`), so that a vector holds one component of
//! many keys and a head of 2 components costs no more padding than one of 128. Four query rows go
//! together: each load of keys serves all four. A row's scores, at most `position` of them, stay
//! in cache; the scores of a whole head never exist, and the backward recomputes them.
//!
//! Everything is made of three steps over four rows: scores `q kT`, weighted sums `p v`, and
//! updates `d k += pT q`.

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::super::memory::Memory;
use super::simd::{exp, padded};
use crate::llama::ops::{Attention, AttentionBackward, AttentionDecode, AttentionShape};

/// Query rows that go together.
const ROWS: usize = 4;

/// One query row: where its components lie in its buffer, and which position it sees.
#[derive(Clone, Default)]
struct Row {
    at: Range<usize>,
    seen: Range<usize>,
}

/// A group of rows; those past the end of the work see nothing and are written nowhere.
fn group(rows: &[Row]) -> [Row; ROWS] {
    std::array::from_fn(|r| {
        rows.get(r).cloned().unwrap_or_else(|| Row { at: rows[0].at.clone(), seen: 0..0 })
    })
}

/// Queries of every head that shares a key/value head: `[group, seq_len, head_dim]`.
fn rows(shape: &AttentionShape, seen: impl Fn(usize) -> Range<usize>) -> Vec<Row> {
    let d = shape.head_dim;
    (0..shape.group() * shape.seq_len)
        .map(|row| Row { at: row * d..(row + 1) * d, seen: seen(row % shape.seq_len) })
        .collect()
}

/// What a causal row sees from its first visible key on.
fn causal(first_key: &[u32], position: usize) -> Range<usize> {
    (first_key[position] as usize).min(position + 1)..position + 1
}

/// `[position, d]` on its side: `[d, stride]`, zero beyond the position.
fn transpose(rows: &[f32], d: usize, stride: usize) -> Vec<f32> {
    let mut out = vec![0.0; d * stride];
    for (position, row) in rows.chunks(d).enumerate() {
        for (c, &value) in row.iter().enumerate() {
            out[c * stride + position] = value;
        }
    }
    out
}

fn untranspose(transposed: &[f32], stride: usize, rows: &mut [f32], d: usize) {
    for (position, row) in rows.chunks_mut(d).enumerate() {
        for (c, value) in row.iter_mut().enumerate() {
            *value = transposed[c * stride + position];
        }
    }
}

pub(super) fn forward(arch: Arch, o: &Attention, memory: &mut Memory<f32>) {
    let shape = o.shape;
    let [q, k, v, out, lse] = memory.floats.get([o.q, o.k, o.v, o.out, o.lse]);
    let first_key = memory.indices.one(o.first_key);
    let (d, seq_len) = (shape.head_dim, shape.seq_len);
    let queries = shape.group() * seq_len;
    let stride = padded(seq_len);
    let heads: Vec<Vec<f32>> = q
        .par_chunks(queries * d)
        .zip(k.par_chunks(seq_len * d).zip(v.par_chunks(seq_len * d)))
        .zip(lse.par_chunks_mut(queries))
        .enumerate()
        .map(|(task, ((q, (k, v)), lse))| {
            let first_key = &first_key[task / shape.kv_heads * seq_len..][..seq_len];
            let mut out = vec![0.0; queries * d];
            arch.dispatch(Forward {
                q,
                rows: &rows(&shape, |position| causal(first_key, position)),
                keys: &transpose(k, d, stride),
                values: &transpose(v, d, stride),
                d,
                stride,
                out: &mut out,
                lse,
            });
            out
        })
        .collect();
    join_heads(&shape, &heads, out);
}

/// From `[group, seq_len, head_dim]` a task to rows of all heads side by side.
fn join_heads(shape: &AttentionShape, heads: &[Vec<f32>], out: &mut [f32]) {
    let d = shape.head_dim;
    out.par_chunks_mut(shape.q_width()).with_min_len(64).enumerate().for_each(|(row, out)| {
        let (sequence, position) = (row / shape.seq_len, row % shape.seq_len);
        for (head, out) in out.chunks_mut(d).enumerate() {
            let task = &heads[sequence * shape.kv_heads + head / shape.group()];
            let at = (head % shape.group() * shape.seq_len + position) * d;
            out.copy_from_slice(&task[at..at + d]);
        }
    });
}

pub(super) fn cached(arch: Arch, o: &AttentionDecode, memory: &mut Memory<f32>) {
    let shape = o.shape;
    let (d, seq_len, capacity) = (shape.head_dim, shape.seq_len, o.capacity);
    assert_eq!(capacity, padded(capacity), "a cache's capacity is whole vectors");
    let plane = shape.batch * shape.kv_width() * capacity;
    let [keys, values] = memory
        .cache
        .get_disjoint_mut([o.keys..o.keys + plane, o.values..o.values + plane])
        .expect("a layer's keys and values lie apart");
    let [q, k, v, out] = memory.floats.get([o.q, o.k, o.v, o.out]);
    let start = memory.indices.one(o.start);
    let queries = shape.group() * seq_len;
    // One token of one sequence is too little to wake another thread for.
    let tasks_at_least = 1 + (1 << 15) / (queries * capacity * d);
    let heads: Vec<Vec<f32>> = keys
        .par_chunks_mut(d * capacity)
        .zip(values.par_chunks_mut(d * capacity))
        .zip(q.par_chunks(queries * d))
        .zip(k.par_chunks(seq_len * d).zip(v.par_chunks(seq_len * d)))
        .enumerate()
        .with_min_len(tasks_at_least)
        .map(|(task, (((keys, values), q), (k, v)))| {
            let start = start[task / shape.kv_heads] as usize;
            for (cache, fresh) in [(&mut *keys, k), (&mut *values, v)] {
                for (position, row) in fresh.chunks(d).enumerate() {
                    for (c, &value) in row.iter().enumerate() {
                        cache[c * capacity + start + position] = value;
                    }
                }
            }
            let mut out = vec![0.0; queries * d];
            let mut lse = vec![0.0; queries];
            arch.dispatch(Forward {
                q,
                rows: &rows(&shape, |position| 0..start + position + 1),
                keys,
                values,
                d,
                stride: capacity,
                out: &mut out,
                lse: &mut lse,
            });
            out
        })
        .collect();
    join_heads(&shape, &heads, out);
}

pub(super) fn backward(arch: Arch, o: &AttentionBackward, memory: &mut Memory<f32>) {
    let shape = o.shape;
    let (d, seq_len) = (shape.head_dim, shape.seq_len);
    let queries = shape.group() * seq_len;
    let [q, k, v, out, lse, dout, dq, dk, dv] =
        memory.floats.get([o.q, o.k, o.v, o.out, o.lse, o.dout, o.dq, o.dk, o.dv]);
    let (out, dout) = (&*out, &*dout);
    let first_key = memory.indices.one(o.first_key);
    let stride = padded(seq_len);
    dq.par_chunks_mut(queries * d)
        .zip(dk.par_chunks_mut(seq_len * d).zip(dv.par_chunks_mut(seq_len * d)))
        .zip(q.par_chunks(queries * d).zip(lse.par_chunks(queries)))
        .zip(k.par_chunks(seq_len * d).zip(v.par_chunks(seq_len * d)))
        .enumerate()
        .for_each(|(task, (((dq, (dk, dv)), (q, lse)), (k, v)))| {
            let (sequence, kv_head) = (task / shape.kv_heads, task % shape.kv_heads);
            let first_key = &first_key[sequence * seq_len..][..seq_len];
            let (mut dout_heads, mut delta) = (vec![0.0; queries * d], vec![0.0; queries]);
            for row in 0..queries {
                let (head, position) = (kv_head * shape.group() + row / seq_len, row % seq_len);
                let at = (sequence * seq_len + position) * shape.q_width() + head * d;
                let dout = &dout[at..at + d];
                dout_heads[row * d..(row + 1) * d].copy_from_slice(dout);
                delta[row] = dout.iter().zip(&out[at..at + d]).map(|(a, b)| a * b).sum();
            }
            let (mut dkeys, mut dvalues) = (vec![0.0; d * stride], vec![0.0; d * stride]);
            arch.dispatch(Backward {
                q,
                dout: &dout_heads,
                lse,
                delta: &delta,
                rows: &rows(&shape, |position| causal(first_key, position)),
                keys: &transpose(k, d, stride),
                values: &transpose(v, d, stride),
                d,
                stride,
                dq,
                dkeys: &mut dkeys,
                dvalues: &mut dvalues,
            });
            untranspose(&dkeys, stride, dk, d);
            untranspose(&dvalues, stride, dv, d);
        });
}

/// `[rows, d]` queries against transposed keys and values.
struct Forward<'a> {
    q: &'a [f32],
    rows: &'a [Row],
    keys: &'a [f32],
    values: &'a [f32],
    d: usize,
    stride: usize,
    out: &'a mut [f32],
    lse: &'a mut [f32],
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let Self { q, rows, keys, values, d, stride, out, lse } = self;
        let tiles = Tiles::<S>::new(d, stride);
        let (keys, _) = S::as_simd_f32s(keys);
        let (values, _) = S::as_simd_f32s(values);
        let mut p = vec![0.0; ROWS * stride];
        let mut scaled = vec![0.0; ROWS * d];
        let mut sums = vec![0.0; ROWS * d];
        for (first, rows) in rows.chunks(ROWS).enumerate() {
            let four = group(rows);
            tiles.scaled_queries(q, &four, &mut scaled);
            let chunks = tiles.chunks(&four);
            tiles.scores(s, &scaled, keys, chunks.clone(), &mut p);
            tiles.hide(&four, chunks.clone(), &mut p);
            let statistics = tiles.softmax(s, chunks.clone(), &mut p);
            tiles.weigh(s, &p, values, chunks, &mut sums);
            for (r, row) in rows.iter().enumerate() {
                let (max, sum) = statistics[r];
                let sees = !row.seen.is_empty();
                let scale = if sees { 1.0 / sum } else { 0.0 };
                lse[first * ROWS + r] = if sees { max + sum.ln() } else { 0.0 };
                for (out, sum) in out[row.at.clone()].iter_mut().zip(&sums[r * d..]) {
                    *out = sum * scale;
                }
            }
        }
    }
}

struct Backward<'a> {
    q: &'a [f32],
    dout: &'a [f32],
    lse: &'a [f32],
    delta: &'a [f32],
    rows: &'a [Row],
    keys: &'a [f32],
    values: &'a [f32],
    d: usize,
    stride: usize,
    dq: &'a mut [f32],
    dkeys: &'a mut [f32],
    dvalues: &'a mut [f32],
}

impl WithSimd for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let Self { q, dout, lse, delta, rows, keys, values, d, stride, dq, dkeys, dvalues } = self;
        let tiles = Tiles::<S>::new(d, stride);
        let (keys, _) = S::as_simd_f32s(keys);
        let (values, _) = S::as_simd_f32s(values);
        let (dkeys, _) = S::as_mut_simd_f32s(dkeys);
        let (dvalues, _) = S::as_mut_simd_f32s(dvalues);
        let (mut p, mut ds) = (vec![0.0; ROWS * stride], vec![0.0; ROWS * stride]);
        let (mut scaled, mut plain) = (vec![0.0; ROWS * d], vec![0.0; ROWS * d]);
        let mut sums = vec![0.0; ROWS * d];
        for (first, rows) in rows.chunks(ROWS).enumerate() {
            let four = group(rows);
            let chunks = tiles.chunks(&four);
            let statistic =
                |from: &[f32], r: usize| from.get(first * ROWS + r).copied().unwrap_or(0.0);

            tiles.scaled_queries(q, &four, &mut scaled);
            tiles.scores(s, &scaled, keys, chunks.clone(), &mut p);
            tiles.hide(&four, chunks.clone(), &mut p);
            for (out, row) in plain.chunks_mut(d).zip(&four) {
                out.copy_from_slice(&dout[row.at.clone()]);
            }
            tiles.scores(s, &plain, values, chunks.clone(), &mut ds);

            let (p_lanes, _) = S::as_mut_simd_f32s(&mut p);
            let (ds_lanes, _) = S::as_mut_simd_f32s(&mut ds);
            for r in 0..ROWS {
                let lse = s.splat_f32s(statistic(lse, r));
                let delta = s.splat_f32s(statistic(delta, r));
                let scale = s.splat_f32s(tiles.scale);
                let at = r * tiles.vectors + chunks.start..r * tiles.vectors + chunks.end;
                for (p, ds) in p_lanes[at.clone()].iter_mut().zip(&mut ds_lanes[at]) {
                    *p = exp(s, s.sub_f32s(*p, lse));
                    *ds = s.mul_f32s(s.mul_f32s(*p, scale), s.sub_f32s(*ds, delta));
                }
            }
            tiles.update(s, &p, &plain, chunks.clone(), dvalues);
            for (out, row) in plain.chunks_mut(d).zip(&four) {
                out.copy_from_slice(&q[row.at.clone()]);
            }
            tiles.update(s, &ds, &plain, chunks.clone(), dkeys);
            tiles.weigh(s, &ds, keys, chunks, &mut sums);
            for (r, row) in rows.iter().enumerate() {
                dq[row.at.clone()].copy_from_slice(&sums[r * d..(r + 1) * d]);
            }
        }
    }
}

/// The three steps over four rows of `stride` position, in chunks of one vector.
struct Tiles<S: Simd> {
    d: usize,
    stride: usize,
    /// Vectors in a stride.
    vectors: usize,
    scale: f32,
    simd: std::marker::PhantomData<S>,
}

impl<S: Simd> Tiles<S> {
    fn new(d: usize, stride: usize) -> Self {
        let vectors = stride / S::F32_LANES;
        let scale = ((d as f64).sqrt().recip()) as f32;
        Self { d, stride, vectors, scale, simd: std::marker::PhantomData }
    }

    /// The queries times 1 / sqrt(d), `[ROWS, d]`.
    fn scaled_queries(&self, q: &[f32], rows: &[Row; ROWS], out: &mut [f32]) {
        for (out, row) in out.chunks_mut(self.d).zip(rows) {
            for (out, &q) in out.iter_mut().zip(&q[row.at.clone()]) {
                *out = q * self.scale;
            }
        }
    }

    /// The chunks that hold a position that any of the rows sees.
    fn chunks(&self, rows: &[Row; ROWS]) -> Range<usize> {
        let seeing = || rows.iter().filter(|row| !row.seen.is_empty());
        let start = seeing().map(|row| row.seen.start).min().unwrap_or(0);
        let end = seeing().map(|row| row.seen.end).max().unwrap_or(0);
        start / S::F32_LANES..end.div_ceil(S::F32_LANES)
    }

    /// `out[r][j] = sum over c of q[r][c] * keys[c][j]`
    #[inline(always)]
    fn scores(&self, s: S, q: &[f32], keys: &[S::f32s], chunks: Range<usize>, out: &mut [f32]) {
        let (out, _) = S::as_mut_simd_f32s(out);
        let [q0, q1, q2, q3] = std::array::from_fn(|r| &q[r * self.d..(r + 1) * self.d]);
        for chunk in chunks {
            let mut sums = [s.splat_f32s(0.0); ROWS];
            let components = keys[chunk..].iter().step_by(self.vectors);
            for ((((&key, &q0), &q1), &q2), &q3) in components.zip(q0).zip(q1).zip(q2).zip(q3) {
                sums[0] = s.mul_add_f32s(s.splat_f32s(q0), key, sums[0]);
                sums[1] = s.mul_add_f32s(s.splat_f32s(q1), key, sums[1]);
                sums[2] = s.mul_add_f32s(s.splat_f32s(q2), key, sums[2]);
                sums[3] = s.mul_add_f32s(s.splat_f32s(q3), key, sums[3]);
            }
            for (r, sum) in sums.into_iter().enumerate() {
                out[r * self.vectors + chunk] = sum;
            }
        }
    }

    /// Sets the position a row does not see to minus infinity.
    fn hide(&self, rows: &[Row; ROWS], chunks: Range<usize>, scores: &mut [f32]) {
        let (start, end) = (chunks.start * S::F32_LANES, chunks.end * S::F32_LANES);
        for (row, scores) in rows.iter().zip(scores.chunks_mut(self.stride)) {
            if row.seen.is_empty() {
                scores[start..end].fill(f32::NEG_INFINITY);
            } else {
                scores[start..row.seen.start].fill(f32::NEG_INFINITY);
                scores[row.seen.end..end].fill(f32::NEG_INFINITY);
            }
        }
    }

    /// Scores to `exp(score - max)`; returns each row's max and sum.
    #[inline(always)]
    fn softmax(&self, s: S, chunks: Range<usize>, scores: &mut [f32]) -> [(f32, f32); ROWS] {
        let (scores, _) = S::as_mut_simd_f32s(scores);
        let mut statistics = [(0.0, 0.0); ROWS];
        for (r, statistic) in statistics.iter_mut().enumerate() {
            let row = &mut scores[r * self.vectors..][chunks.clone()];
            let mut max = s.splat_f32s(f32::NEG_INFINITY);
            for &score in &*row {
                max = s.max_f32s(max, score);
            }
            let max = s.reduce_max_f32s(max);
            // A row that sees nothing has only minus infinities: 0 keeps its exponentials 0.
            let max = if max == f32::NEG_INFINITY { 0.0 } else { max };
            let shift = s.splat_f32s(max);
            let mut sum = s.splat_f32s(0.0);
            for score in row {
                *score = exp(s, s.sub_f32s(*score, shift));
                sum = s.add_f32s(sum, *score);
            }
            *statistic = (max, s.reduce_sum_f32s(sum));
        }
        statistics
    }

    /// `out[r][c] = sum over j of p[r][j] * values[c][j]`; d is even.
    #[inline(always)]
    fn weigh(&self, s: S, p: &[f32], values: &[S::f32s], chunks: Range<usize>, out: &mut [f32]) {
        let mut c = 0;
        while c + 4 <= self.d {
            self.weigh_some::<4>(s, p, values, chunks.clone(), c, out);
            c += 4;
        }
        if c < self.d {
            self.weigh_some::<2>(s, p, values, chunks, c, out);
        }
    }

    /// The components `c..c + N` of [`Self::weigh`].
    #[inline(always)]
    fn weigh_some<const N: usize>(
        &self,
        s: S,
        p: &[f32],
        values: &[S::f32s],
        chunks: Range<usize>,
        c: usize,
        out: &mut [f32],
    ) {
        let (p, _) = S::as_simd_f32s(p);
        let p: [&[S::f32s]; ROWS] = std::array::from_fn(|r| &p[r * self.vectors..][chunks.clone()]);
        let values: [&[S::f32s]; N] =
            std::array::from_fn(|n| &values[(c + n) * self.vectors..][chunks.clone()]);
        let mut sums = [[s.splat_f32s(0.0); N]; ROWS];
        for chunk in 0..chunks.len() {
            for r in 0..ROWS {
                for n in 0..N {
                    sums[r][n] = s.mul_add_f32s(p[r][chunk], values[n][chunk], sums[r][n]);
                }
            }
        }
        for (r, sums) in sums.into_iter().enumerate() {
            for (n, sum) in sums.into_iter().enumerate() {
                out[r * self.d + c + n] = s.reduce_sum_f32s(sum);
            }
        }
    }

    /// `out[c][j] += sum over r of p[r][j] * q[r][c]`
    #[inline(always)]
    fn update(&self, s: S, p: &[f32], q: &[f32], chunks: Range<usize>, out: &mut [S::f32s]) {
        let (p, _) = S::as_simd_f32s(p);
        let [p0, p1, p2, p3] = std::array::from_fn(|r| &p[r * self.vectors..][chunks.clone()]);
        for c in 0..self.d {
            let [q0, q1, q2, q3] = std::array::from_fn(|r| s.splat_f32s(q[r * self.d + c]));
            let out = &mut out[c * self.vectors..][chunks.clone()];
            for ((((out, &p0), &p1), &p2), &p3) in out.iter_mut().zip(p0).zip(p1).zip(p2).zip(p3) {
                let sum = s.mul_add_f32s(p0, q0, *out);
                let sum = s.mul_add_f32s(p1, q1, sum);
                let sum = s.mul_add_f32s(p2, q2, sum);
                *out = s.mul_add_f32s(p3, q3, sum);
            }
        }
    }
}
