//! Flash-style attention for any head_dim, vectorized across keys; and the task split that
//! [`super::avx512`] shares.
//!
//! A task is one KV head of one sequence with the query heads that share it (GQA). It transposes keys and
//! values once (`[head_dim, seq_len]`), so that a vector holds one component of many keys and a head_dim of 2
//! costs no more padding than one of 128. Four query rows go together: each load of keys serves all four. A
//! row's scores, at most `seq_len` of them, stay in cache; the scores of a whole head never exist, and the
//! backward recomputes them.
//!
//! Everything is made of three steps over four rows: scores `q kT`, weighted sums `p v`, and updates
//! `d k += pT q`.

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::super::memory::Memory;
use super::simd::{AlignedFloats, exp, padded};
use crate::llama::ops::{Attention, AttentionBackward, AttentionDecode, AttentionShape};

/// The operands of one task.
///
/// Its query rows are ordered by position, then head: all heads of a position see the same keys.
pub(super) struct KvHead<'a> {
    /// `[group, seq_len, head_dim]`
    pub q: &'a [f32],
    /// `[seq_len, head_dim]`
    pub k: &'a [f32],
    pub v: &'a [f32],
    /// `[seq_len]`
    pub first_key: &'a [u32],
    /// Query heads per KV head.
    pub group: usize,
}

impl KvHead<'_> {
    /// The number of query rows.
    #[inline]
    pub fn rows(&self) -> usize {
        self.first_key.len() * self.group
    }

    /// A row's place in `[group, seq_len]`.
    #[inline]
    pub fn place(&self, row: usize) -> usize {
        row % self.group * self.first_key.len() + row / self.group
    }

    /// The first key that a row sees, and the end.
    #[inline]
    pub fn keys(&self, row: usize) -> (usize, usize) {
        let Range { start, end } = visible_keys(self.first_key, row / self.group);
        (start, end)
    }
}

/// The factor of the scores before softmax: 1 / sqrt(head_dim).
pub(super) fn score_scale(head_dim: usize) -> f32 {
    (head_dim as f64).sqrt().recip() as f32
}

/// Inputs of a task's backward besides its operands.
pub(super) struct BackwardInputs<'a> {
    /// The forward's log-sum-exp, `[group, seq_len]`.
    pub lse: &'a [f32],
    /// The gradient of the output, `[seq_len, group, head_dim]`.
    pub dout: &'a [f32],
    /// Its dot product with the output, `[seq_len, group]`.
    pub delta: &'a [f32],
}

impl BackwardInputs<'_> {
    /// Writes the rows of dout of one of `group` query heads, `[seq_len, d]`.
    pub fn copy_dout_of(&self, query_head: usize, group: usize, d: usize, dout: &mut [f32]) {
        for (position, out) in dout.chunks_mut(d).enumerate() {
            out.copy_from_slice(&self.dout[(position * group + query_head) * d..][..d]);
        }
    }
}

/// Bytes of the tasks' outputs before they are joined.
pub(super) fn scratch_bytes(o: &Attention) -> usize {
    size_of::<f32>() * o.shape.rows() * o.shape.q_width()
}

/// Runs `kernel(head, out, lse)` for every task. It writes out as `[seq_len, group, head_dim]` and the
/// log-sum-exp as `[group, seq_len]`.
pub(super) fn for_each_kv_head(
    o: &Attention,
    memory: &mut Memory<f32>,
    kernel: impl Fn(&KvHead, &mut [f32], &mut [f32]) + Sync,
) {
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
            kernel(&KvHead { q, k, v, first_key, group: shape.group() }, &mut out, lse);
            out
        })
        .collect();
    join_heads(&shape, &heads, out);
}

/// Runs `kernel(head, inputs, dq, dk, dv)` for every task, the gradients laid out as q, k and v are.
pub(super) fn for_each_kv_head_backward(
    o: &AttentionBackward,
    memory: &mut Memory<f32>,
    kernel: impl Fn(&KvHead, &BackwardInputs, &mut [f32], &mut [f32], &mut [f32]) + Sync,
) {
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
            let (mut task_dout, mut delta) = (Vec::new(), Vec::new());
            for position in 0..seq_len {
                let at = (sequence * seq_len + position) * shape.q_width() + kv_head * width;
                let (dout, out) = (&dout[at..at + width], &out[at..at + width]);
                task_dout.extend_from_slice(dout);
                delta.extend(dout.chunks(d).zip(out.chunks(d)).map(|(dout, out)| {
                    dout.iter().zip(out).map(|(dout, out)| dout * out).sum::<f32>()
                }));
            }
            let head = KvHead { q, k, v, first_key, group: shape.group() };
            let inputs = BackwardInputs { lse, dout: &task_dout, delta: &delta };
            kernel(&head, &inputs, dq, dk, dv);
        });
}

/// Joins the tasks' `[seq_len, group, head_dim]` to rows of all heads side by side.
fn join_heads(shape: &AttentionShape, tasks: &[Vec<f32>], out: &mut [f32]) {
    let width = shape.group() * shape.head_dim;
    out.par_chunks_mut(shape.q_width()).with_min_len(64).enumerate().for_each(|(row, out)| {
        let (sequence, position) = (row / shape.seq_len, row % shape.seq_len);
        for (kv_head, out) in out.chunks_mut(width).enumerate() {
            let task = &tasks[sequence * shape.kv_heads + kv_head];
            out.copy_from_slice(&task[position * width..][..width]);
        }
    });
}

/// `[keys, d]` to `[d, stride]`, of which only the keys are written.
pub(super) fn transpose(rows: &[f32], d: usize, stride: usize, out: &mut [f32]) {
    for (key, row) in rows.chunks(d).enumerate() {
        for (c, &value) in row.iter().enumerate() {
            out[c * stride + key] = value;
        }
    }
}

fn transposed(rows: &[f32], d: usize, stride: usize) -> AlignedFloats {
    let mut out = AlignedFloats::zeroed(d * stride);
    transpose(rows, d, stride, &mut out);
    out
}

fn untranspose(transposed: &[f32], stride: usize, rows: &mut [f32], d: usize) {
    for (key, row) in rows.chunks_mut(d).enumerate() {
        for (c, value) in row.iter_mut().enumerate() {
            *value = transposed[c * stride + key];
        }
    }
}

/// Query rows of a register tile.
const TILE_ROWS: usize = 4;

/// One query row of a task: its places in q and in out, and the keys it sees.
#[derive(Clone, Default)]
struct QueryRow {
    /// Components in `[group, seq_len, head_dim]`.
    q: Range<usize>,
    /// Components in `[seq_len, group, head_dim]`.
    out: Range<usize>,
    keys: Range<usize>,
}

/// Queries of every head that shares a KV head, ordered by head, then position: neighbors see nearly the same
/// keys.
fn query_rows(shape: &AttentionShape, keys: impl Fn(usize) -> Range<usize>) -> Vec<QueryRow> {
    let d = shape.head_dim;
    (0..shape.group() * shape.seq_len)
        .map(|row| {
            let (head, position) = (row / shape.seq_len, row % shape.seq_len);
            let out = position * shape.group() + head;
            QueryRow {
                q: row * d..(row + 1) * d,
                out: out * d..(out + 1) * d,
                keys: keys(position),
            }
        })
        .collect()
}

/// The rows of a register tile. Rows past the end see nothing and are written nowhere.
fn tile_rows(rows: &[QueryRow]) -> [QueryRow; TILE_ROWS] {
    std::array::from_fn(|r| {
        rows.get(r).cloned().unwrap_or_else(|| QueryRow { keys: 0..0, ..rows[0].clone() })
    })
}

/// The keys that a position sees: causal, from its first visible key on.
#[inline]
fn visible_keys(first_key: &[u32], position: usize) -> Range<usize> {
    (first_key[position] as usize).min(position + 1)..position + 1
}

/// Floats from one component of transposed keys to the next: an odd number of cache lines, so that the
/// components of a key lie in different sets of the cache.
fn stride(seq_len: usize) -> usize {
    padded(seq_len) | 16
}

pub(super) fn forward(arch: Arch, o: &Attention, memory: &mut Memory<f32>) {
    let (d, stride) = (o.shape.head_dim, stride(o.shape.seq_len));
    for_each_kv_head(o, memory, |head, out, lse| {
        arch.dispatch(AttentionForwardKernel {
            q: head.q,
            rows: &query_rows(&o.shape, |position| visible_keys(head.first_key, position)),
            keys: &transposed(head.k, d, stride),
            values: &transposed(head.v, d, stride),
            d,
            stride,
            out,
            lse,
        });
    });
}

/// Attention of new tokens over the KV cache, which holds keys and values transposed.
pub(super) fn decode(arch: Arch, o: &AttentionDecode, memory: &mut Memory<f32>) {
    let shape = o.shape;
    let (d, seq_len, capacity) = (shape.head_dim, shape.seq_len, o.capacity);
    assert_eq!(capacity, padded(capacity), "a KV cache's capacity is whole vectors");
    let plane = shape.batch * shape.kv_width() * capacity;
    let [keys, values] = memory
        .cache
        .get_disjoint_mut([o.keys..o.keys + plane, o.values..o.values + plane])
        .expect("a layer's keys and values lie apart");
    let [q, k, v, out] = memory.floats.get([o.q, o.k, o.v, o.out]);
    let start = memory.indices.one(o.start);
    let queries = shape.group() * seq_len;
    // One token of one sequence is too little to wake another thread for.
    let min_tasks = 1 + (1 << 15) / (queries * capacity * d);
    let heads: Vec<Vec<f32>> = keys
        .par_chunks_mut(d * capacity)
        .zip(values.par_chunks_mut(d * capacity))
        .zip(q.par_chunks(queries * d))
        .zip(k.par_chunks(seq_len * d).zip(v.par_chunks(seq_len * d)))
        .enumerate()
        .with_min_len(min_tasks)
        .map(|(task, (((keys, values), q), (k, v)))| {
            let start = start[task / shape.kv_heads] as usize;
            transpose(k, d, capacity, &mut keys[start..]);
            transpose(v, d, capacity, &mut values[start..]);
            let mut out = vec![0.0; queries * d];
            let mut lse = vec![0.0; queries];
            arch.dispatch(AttentionForwardKernel {
                q,
                rows: &query_rows(&shape, |position| 0..start + position + 1),
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
    let (d, stride) = (o.shape.head_dim, stride(o.shape.seq_len));
    for_each_kv_head_backward(o, memory, |head, inputs, dq, dk, dv| {
        let [mut dkeys, mut dvalues] = [(); 2].map(|()| AlignedFloats::zeroed(d * stride));
        arch.dispatch(AttentionBackwardKernel {
            q: head.q,
            inputs,
            rows: &query_rows(&o.shape, |position| visible_keys(head.first_key, position)),
            keys: &transposed(head.k, d, stride),
            values: &transposed(head.v, d, stride),
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

/// Query rows against transposed keys and values.
struct AttentionForwardKernel<'a> {
    q: &'a [f32],
    rows: &'a [QueryRow],
    keys: &'a [f32],
    values: &'a [f32],
    d: usize,
    stride: usize,
    out: &'a mut [f32],
    lse: &'a mut [f32],
}

impl WithSimd for AttentionForwardKernel<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let Self { q, rows, keys, values, d, stride, out, lse } = self;
        let tile = QueryTile::<S>::new(d, stride);
        let (keys, _) = S::as_simd_f32s(keys);
        let (values, _) = S::as_simd_f32s(values);
        let mut p = AlignedFloats::zeroed(TILE_ROWS * stride);
        let mut scaled = vec![0.0; TILE_ROWS * d];
        let mut sums = vec![0.0; TILE_ROWS * d];
        for (first, rows) in rows.chunks(TILE_ROWS).enumerate() {
            let four = tile_rows(rows);
            tile.scaled_queries(q, &four, &mut scaled);
            let chunks = tile.chunks(&four);
            tile.scores(s, &scaled, keys, chunks.clone(), &mut p);
            tile.mask(&four, chunks.clone(), &mut p);
            let statistics = tile.softmax(s, chunks.clone(), &mut p);
            tile.weighted_sums(s, &p, values, chunks, &mut sums);
            for (r, row) in rows.iter().enumerate() {
                let (max, sum) = statistics[r];
                let sees = !row.keys.is_empty();
                let scale = if sees { 1.0 / sum } else { 0.0 };
                lse[first * TILE_ROWS + r] = if sees { max + sum.ln() } else { 0.0 };
                for (out, sum) in out[row.out.clone()].iter_mut().zip(&sums[r * d..]) {
                    *out = sum * scale;
                }
            }
        }
    }
}

struct AttentionBackwardKernel<'a> {
    q: &'a [f32],
    inputs: &'a BackwardInputs<'a>,
    rows: &'a [QueryRow],
    keys: &'a [f32],
    values: &'a [f32],
    d: usize,
    stride: usize,
    dq: &'a mut [f32],
    dkeys: &'a mut [f32],
    dvalues: &'a mut [f32],
}

impl WithSimd for AttentionBackwardKernel<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let Self { q, inputs, rows, keys, values, d, stride, dq, dkeys, dvalues } = self;
        let tile = QueryTile::<S>::new(d, stride);
        let (keys, _) = S::as_simd_f32s(keys);
        let (values, _) = S::as_simd_f32s(values);
        let (dkeys, _) = S::as_mut_simd_f32s(dkeys);
        let (dvalues, _) = S::as_mut_simd_f32s(dvalues);
        let [mut p, mut ds] = [(); 2].map(|()| AlignedFloats::zeroed(TILE_ROWS * stride));
        let (mut scaled, mut plain) = (vec![0.0; TILE_ROWS * d], vec![0.0; TILE_ROWS * d]);
        let mut sums = vec![0.0; TILE_ROWS * d];
        for rows in rows.chunks(TILE_ROWS) {
            let four = tile_rows(rows);
            let chunks = tile.chunks(&four);
            tile.scaled_queries(q, &four, &mut scaled);
            tile.scores(s, &scaled, keys, chunks.clone(), &mut p);
            tile.mask(&four, chunks.clone(), &mut p);
            for (out, row) in plain.chunks_mut(d).zip(&four) {
                out.copy_from_slice(&inputs.dout[row.out.clone()]);
            }
            tile.scores(s, &plain, values, chunks.clone(), &mut ds);

            let (p_lanes, _) = S::as_mut_simd_f32s(&mut p);
            let (ds_lanes, _) = S::as_mut_simd_f32s(&mut ds);
            for (r, row) in four.iter().enumerate() {
                let lse = s.splat_f32s(inputs.lse[row.q.start / d]);
                let delta = s.splat_f32s(inputs.delta[row.out.start / d]);
                let scale = s.splat_f32s(tile.scale);
                let at = r * tile.vectors + chunks.start..r * tile.vectors + chunks.end;
                for (p, ds) in p_lanes[at.clone()].iter_mut().zip(&mut ds_lanes[at]) {
                    *p = exp(s, s.sub_f32s(*p, lse));
                    *ds = s.mul_f32s(s.mul_f32s(*p, scale), s.sub_f32s(*ds, delta));
                }
            }
            tile.update(s, &p, &plain, chunks.clone(), dvalues);
            for (out, row) in plain.chunks_mut(d).zip(&four) {
                out.copy_from_slice(&q[row.q.clone()]);
            }
            tile.update(s, &ds, &plain, chunks.clone(), dkeys);
            tile.weighted_sums(s, &ds, keys, chunks, &mut sums);
            for (r, row) in rows.iter().enumerate() {
                dq[row.q.clone()].copy_from_slice(&sums[r * d..(r + 1) * d]);
            }
        }
    }
}

/// The three steps over a tile's rows of `stride` keys, in chunks of one vector.
struct QueryTile<S: Simd> {
    d: usize,
    stride: usize,
    /// Vectors in a stride.
    vectors: usize,
    scale: f32,
    simd: std::marker::PhantomData<S>,
}

impl<S: Simd> QueryTile<S> {
    fn new(d: usize, stride: usize) -> Self {
        let vectors = stride / S::F32_LANES;
        let scale = score_scale(d);
        Self { d, stride, vectors, scale, simd: std::marker::PhantomData }
    }

    /// The queries times 1 / sqrt(d), `[TILE_ROWS, d]`.
    fn scaled_queries(&self, q: &[f32], rows: &[QueryRow; TILE_ROWS], out: &mut [f32]) {
        for (out, row) in out.chunks_mut(self.d).zip(rows) {
            for (out, &q) in out.iter_mut().zip(&q[row.q.clone()]) {
                *out = q * self.scale;
            }
        }
    }

    /// The chunks with a key that some row sees.
    fn chunks(&self, rows: &[QueryRow; TILE_ROWS]) -> Range<usize> {
        let seeing = || rows.iter().filter(|row| !row.keys.is_empty());
        let start = seeing().map(|row| row.keys.start).min().unwrap_or(0);
        let end = seeing().map(|row| row.keys.end).max().unwrap_or(0);
        start / S::F32_LANES..end.div_ceil(S::F32_LANES)
    }

    /// `out[r][j] = sum over c of q[r][c] * keys[c][j]`
    #[inline(always)]
    fn scores(&self, s: S, q: &[f32], keys: &[S::f32s], chunks: Range<usize>, out: &mut [f32]) {
        let mut chunk = chunks.start;
        while chunk + 2 <= chunks.end {
            self.some_scores::<2>(s, q, keys, chunk, out);
            chunk += 2;
        }
        if chunk < chunks.end {
            self.some_scores::<1>(s, q, keys, chunk, out);
        }
    }

    /// The chunks `chunk..chunk + N` of [`Self::scores`].
    #[inline(always)]
    fn some_scores<const N: usize>(
        &self,
        s: S,
        q: &[f32],
        keys: &[S::f32s],
        chunk: usize,
        out: &mut [f32],
    ) {
        let (out, _) = S::as_mut_simd_f32s(out);
        let [q0, q1, q2, q3] = std::array::from_fn(|r| &q[r * self.d..(r + 1) * self.d]);
        let mut sums = [[s.splat_f32s(0.0); N]; TILE_ROWS];
        let components = keys[chunk..].chunks(self.vectors);
        for ((((keys, &q0), &q1), &q2), &q3) in components.zip(q0).zip(q1).zip(q2).zip(q3) {
            let keys = &keys[..N];
            for (sums, q) in sums.iter_mut().zip([q0, q1, q2, q3]) {
                let q = s.splat_f32s(q);
                for n in 0..N {
                    sums[n] = s.mul_add_f32s(q, keys[n], sums[n]);
                }
            }
        }
        for (r, sums) in sums.into_iter().enumerate() {
            for (n, sum) in sums.into_iter().enumerate() {
                out[r * self.vectors + chunk + n] = sum;
            }
        }
    }

    /// Sets the scores of keys that a row does not see to minus infinity.
    fn mask(&self, rows: &[QueryRow; TILE_ROWS], chunks: Range<usize>, scores: &mut [f32]) {
        let (start, end) = (chunks.start * S::F32_LANES, chunks.end * S::F32_LANES);
        for (row, scores) in rows.iter().zip(scores.chunks_mut(self.stride)) {
            if row.keys.is_empty() {
                scores[start..end].fill(f32::NEG_INFINITY);
            } else {
                scores[start..row.keys.start].fill(f32::NEG_INFINITY);
                scores[row.keys.end..end].fill(f32::NEG_INFINITY);
            }
        }
    }

    /// Replaces scores by `exp(score - max)`; returns each row's max and sum.
    #[inline(always)]
    fn softmax(&self, s: S, chunks: Range<usize>, scores: &mut [f32]) -> [(f32, f32); TILE_ROWS] {
        let (scores, _) = S::as_mut_simd_f32s(scores);
        let mut statistics = [(0.0, 0.0); TILE_ROWS];
        for (r, statistic) in statistics.iter_mut().enumerate() {
            let row = &mut scores[r * self.vectors..][chunks.clone()];
            let mut max = s.splat_f32s(f32::NEG_INFINITY);
            for &score in &*row {
                max = s.max_f32s(max, score);
            }
            let max = s.reduce_max_f32s(max);
            // Avoid (-inf) - (-inf) = NaN for a fully masked row.
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
    fn weighted_sums(
        &self,
        s: S,
        p: &[f32],
        values: &[S::f32s],
        chunks: Range<usize>,
        out: &mut [f32],
    ) {
        let mut c = 0;
        // Sums and a vector of each operand in registers.
        while S::REGISTER_COUNT > 16 && c + 4 <= self.d {
            self.some_weighted_sums::<4>(s, p, values, chunks.clone(), c, out);
            c += 4;
        }
        while c < self.d {
            self.some_weighted_sums::<2>(s, p, values, chunks.clone(), c, out);
            c += 2;
        }
    }

    /// The components `c..c + N` of [`Self::weighted_sums`].
    #[inline(always)]
    fn some_weighted_sums<const N: usize>(
        &self,
        s: S,
        p: &[f32],
        values: &[S::f32s],
        chunks: Range<usize>,
        c: usize,
        out: &mut [f32],
    ) {
        let (p, _) = S::as_simd_f32s(p);
        let p: [&[S::f32s]; TILE_ROWS] =
            std::array::from_fn(|r| &p[r * self.vectors..][chunks.clone()]);
        let values: [&[S::f32s]; N] =
            std::array::from_fn(|n| &values[(c + n) * self.vectors..][chunks.clone()]);
        let mut sums = [[s.splat_f32s(0.0); N]; TILE_ROWS];
        for chunk in 0..chunks.len() {
            for r in 0..TILE_ROWS {
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

    /// `out[c][j] += sum over r of p[r][j] * q[r][c]`; d is even.
    #[inline(always)]
    fn update(&self, s: S, p: &[f32], q: &[f32], chunks: Range<usize>, out: &mut [S::f32s]) {
        let (p, _) = S::as_simd_f32s(p);
        let [p0, p1, p2, p3] = std::array::from_fn(|r| &p[r * self.vectors..][chunks.clone()]);
        for (pair, out) in out.chunks_mut(2 * self.vectors).enumerate() {
            let q: [_; TILE_ROWS] =
                std::array::from_fn(|r| [0, 1].map(|c| s.splat_f32s(q[r * self.d + 2 * pair + c])));
            let (first, second) = out.split_at_mut(self.vectors);
            let outs = first[chunks.clone()].iter_mut().zip(&mut second[chunks.clone()]);
            for (((((first, second), &p0), &p1), &p2), &p3) in outs.zip(p0).zip(p1).zip(p2).zip(p3)
            {
                let mut sums = [*first, *second];
                for (r, p) in [p0, p1, p2, p3].into_iter().enumerate() {
                    sums = [0, 1].map(|c| s.mul_add_f32s(p, q[r][c], sums[c]));
                }
                [*first, *second] = sums;
            }
        }
    }
}
