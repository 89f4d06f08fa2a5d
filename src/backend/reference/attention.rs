//! Rotary embedding and attention.

use std::ops::Range;

use num_traits::Float;

use super::super::host::Real;
use super::super::memory::Memory;
use super::{ReferenceExecutor, add_scaled, dot, real};
use crate::llama::ops::{
    Attention, AttentionBackward, AttentionDecode, AttentionShape, Rope, RopeBackward,
};

/// The place of one row of one head in `[batch, heads, seq_len, head_dim]`.
fn place(
    shape: &AttentionShape,
    heads: usize,
    sequence: usize,
    head: usize,
    position: usize,
) -> Range<usize> {
    let row = (sequence * heads + head) * shape.seq_len + position;
    row * shape.head_dim..(row + 1) * shape.head_dim
}

/// Every (sequence, query head, position) with the columns it sees.
fn queries(
    shape: AttentionShape,
    first_key: &[u32],
) -> impl Iterator<Item = (usize, usize, usize, Range<usize>)> {
    (0..shape.batch * shape.heads * shape.seq_len).map(move |at| {
        let position = at % shape.seq_len;
        let head = at / shape.seq_len % shape.heads;
        let sequence = at / shape.seq_len / shape.heads;
        let first = first_key[sequence * shape.seq_len + position] as usize;
        (sequence, head, position, first.min(position + 1)..position + 1)
    })
}

/// Rotates the pairs `(i, i + half)` of a head by `angle(i)`.
fn rotate<R: Float>(head: &mut [R], angle: impl Fn(usize) -> f64) {
    let half = head.len() / 2;
    for i in 0..half {
        let (sin, cos) = angle(i).sin_cos();
        let (a, b) = (head[i], head[half + i]);
        head[i] = a * real(cos) - b * real(sin);
        head[half + i] = b * real(cos) + a * real(sin);
    }
}

impl ReferenceExecutor {
    pub(super) fn rope<R: Real + Float>(&self, o: &Rope, memory: &mut Memory<R>) {
        let AttentionShape { batch, seq_len, heads, kv_heads, head_dim } = o.shape;
        let start: Vec<usize> = match o.start {
            Some(start) => memory.indices.one(start).iter().map(|&s| s as usize).collect(),
            None => vec![0; batch],
        };
        let [qkv, q, k, v] = memory.floats.get([o.qkv, o.q, o.k, o.v]);
        for (row, joined) in qkv.chunks(o.shape.qkv_width()).enumerate() {
            let (sequence, position) = (row / seq_len, row % seq_len);
            let angle = |i: usize| (start[sequence] + position) as f64 * o.frequencies[i];
            for (at, given) in joined.chunks(head_dim).enumerate() {
                let mut rotated = given.to_vec();
                if at < heads + kv_heads {
                    rotate(&mut rotated, angle);
                }
                let (out, count, head) = if at < heads {
                    (&mut *q, heads, at)
                } else if at < heads + kv_heads {
                    (&mut *k, kv_heads, at - heads)
                } else {
                    (&mut *v, kv_heads, at - heads - kv_heads)
                };
                out[place(&o.shape, count, sequence, head, position)].copy_from_slice(&rotated);
            }
        }
    }

    pub(super) fn rope_backward<R: Real + Float>(&self, o: &RopeBackward, memory: &mut Memory<R>) {
        let AttentionShape { seq_len, heads, kv_heads, head_dim, .. } = o.shape;
        let [dq, dk, dv, dqkv] = memory.floats.get([o.dq, o.dk, o.dv, o.dqkv]);
        for (row, joined) in dqkv.chunks_mut(o.shape.qkv_width()).enumerate() {
            let (sequence, position) = (row / seq_len, row % seq_len);
            for (at, out) in joined.chunks_mut(head_dim).enumerate() {
                let (given, count, head) = if at < heads {
                    (&*dq, heads, at)
                } else if at < heads + kv_heads {
                    (&*dk, kv_heads, at - heads)
                } else {
                    (&*dv, kv_heads, at - heads - kv_heads)
                };
                out.copy_from_slice(&given[place(&o.shape, count, sequence, head, position)]);
                if at < heads + kv_heads {
                    rotate(out, |i| -(position as f64) * o.frequencies[i]);
                }
            }
        }
    }

    pub(super) fn attention<R: Real + Float>(&self, o: &Attention, memory: &mut Memory<R>) {
        let shape = o.shape;
        let scale = real::<R>((shape.head_dim as f64).sqrt().recip());
        let [q, k, v, out, lse] = memory.floats.get([o.q, o.k, o.v, o.out, o.lse]);
        let first_key = memory.indices.one(o.first_key);
        for (sequence, head, position, keys) in queries(shape, first_key) {
            let q = &q[place(&shape, shape.heads, sequence, head, position)];
            let key = |j| place(&shape, shape.kv_heads, sequence, head / shape.group(), j);
            let scores: Vec<R> = keys.clone().map(|j| dot(q, &k[key(j)]) * scale).collect();
            let at =
                (sequence * shape.seq_len + position) * shape.q_width() + head * shape.head_dim;
            let out = &mut out[at..][..shape.head_dim];
            let lse = &mut lse[(sequence * shape.heads + head) * shape.seq_len + position];
            *lse = self.softmax(&scores, keys.map(|j| &v[key(j)]), out);
        }
    }

    /// `out = softmax(scores) values`; returns the log-sum-exp of the scores, 0 if there are none.
    fn softmax<'a, R: Real + Float>(
        &self,
        scores: &[R],
        values: impl Iterator<Item = &'a [R]>,
        out: &mut [R],
    ) -> R {
        out.fill(R::zero());
        if scores.is_empty() {
            return R::zero();
        }
        let max = scores.iter().fold(R::neg_infinity(), |max, &s| max.max(s));
        let sum = scores.iter().fold(R::zero(), |sum, &s| sum + (s - max).exp());
        for (&score, value) in scores.iter().zip(values) {
            // Mixed precision rounds the unnormalized p before its product and divides after.
            add_scaled(out, self.round((score - max).exp()), value);
        }
        for out in out {
            *out = *out / sum;
        }
        max + sum.ln()
    }

    pub(super) fn attention_backward<R: Real + Float>(
        &self,
        o: &AttentionBackward,
        memory: &mut Memory<R>,
    ) {
        let shape = o.shape;
        let scale = real::<R>((shape.head_dim as f64).sqrt().recip());
        let [q, k, v, out, lse, dout, dq, dk, dv] =
            memory.floats.get([o.q, o.k, o.v, o.out, o.lse, o.dout, o.dq, o.dk, o.dv]);
        dq.fill(R::zero());
        dk.fill(R::zero());
        dv.fill(R::zero());
        let first_key = memory.indices.one(o.first_key);
        for (sequence, head, position, keys) in queries(shape, first_key) {
            let query = place(&shape, shape.heads, sequence, head, position);
            let at =
                (sequence * shape.seq_len + position) * shape.q_width() + head * shape.head_dim;
            let row = at..at + shape.head_dim;
            let lse = lse[(sequence * shape.heads + head) * shape.seq_len + position];
            let delta = dot(&dout[row.clone()], &out[row.clone()]);
            for j in keys {
                let key = place(&shape, shape.kv_heads, sequence, head / shape.group(), j);
                let p = (dot(&q[query.clone()], &k[key.clone()]) * scale - lse).exp();
                let dp = dot(&dout[row.clone()], &v[key.clone()]);
                let ds = self.round(p * (dp - delta)) * scale;
                add_scaled(&mut dv[key.clone()], self.round(p), &dout[row.clone()]);
                add_scaled(&mut dk[key.clone()], ds, &q[query.clone()]);
                add_scaled(&mut dq[query.clone()], ds, &k[key]);
            }
        }
    }

    pub(super) fn attention_decode<R: Real + Float>(
        &self,
        o: &AttentionDecode,
        memory: &mut Memory<R>,
    ) {
        let AttentionShape { batch, seq_len, heads, kv_heads, head_dim } = o.shape;
        let scale = real::<R>((head_dim as f64).sqrt().recip());
        let cached = |sequence: usize, head: usize, position: usize| {
            let row = (sequence * kv_heads + head) * o.capacity + position;
            row * head_dim..(row + 1) * head_dim
        };
        let plane = batch * o.shape.kv_width() * o.capacity;
        let [keys, values] = memory
            .cache
            .get_disjoint_mut([o.keys..o.keys + plane, o.values..o.values + plane])
            .expect("a layer's keys and values lie apart");
        let [q, k, v, out] = memory.floats.get([o.q, o.k, o.v, o.out]);
        for (sequence, &start) in memory.indices.one(o.start).iter().enumerate() {
            for (head, position) in (0..kv_heads).flat_map(|h| (0..seq_len).map(move |c| (h, c))) {
                let fresh = place(&o.shape, kv_heads, sequence, head, position);
                let kept = cached(sequence, head, start as usize + position);
                keys[kept.clone()].copy_from_slice(&k[fresh.clone()]);
                values[kept].copy_from_slice(&v[fresh]);
            }
            for (head, position) in (0..heads).flat_map(|h| (0..seq_len).map(move |c| (h, c))) {
                let q = &q[place(&o.shape, heads, sequence, head, position)];
                let key = |j| cached(sequence, head / o.shape.group(), j);
                let seen = 0..start as usize + position + 1;
                let scores: Vec<R> = seen.clone().map(|j| dot(q, &keys[key(j)]) * scale).collect();
                let at = (sequence * seq_len + position) * o.shape.q_width() + head * head_dim;
                let out = &mut out[at..][..head_dim];
                self.softmax(&scores, seen.map(|j| &values[key(j)]), out);
            }
        }
    }
}
