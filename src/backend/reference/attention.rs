//! Rotary embedding and attention.

use std::ops::Range;

use num_traits::Float;

use super::super::host::Real;
use super::super::memory::Memory;
use super::{Plain, add_scaled, dot, real};
use crate::llama::ops::{Attention, AttentionBackward, CachedAttention, Heads, Rope, RopeBackward};

/// Where one row of one head lies in `[windows, heads, context, head_dim]`.
fn place(shape: &Heads, heads: usize, window: usize, head: usize, column: usize) -> Range<usize> {
    let row = (window * heads + head) * shape.context + column;
    row * shape.head_dim..(row + 1) * shape.head_dim
}

/// Every (window, query head, column) with the columns it sees.
fn queries(
    shape: Heads,
    first_key: &[u32],
) -> impl Iterator<Item = (usize, usize, usize, Range<usize>)> {
    (0..shape.windows * shape.heads * shape.context).map(move |at| {
        let column = at % shape.context;
        let head = at / shape.context % shape.heads;
        let window = at / shape.context / shape.heads;
        let first = first_key[window * shape.context + column] as usize;
        (window, head, column, first.min(column + 1)..column + 1)
    })
}

/// Turns the pairs `(i, i + half)` of a head by `angle(i)`.
fn rotate<R: Float>(head: &mut [R], angle: impl Fn(usize) -> f64) {
    let half = head.len() / 2;
    for i in 0..half {
        let (sin, cos) = angle(i).sin_cos();
        let (a, b) = (head[i], head[half + i]);
        head[i] = a * real(cos) - b * real(sin);
        head[half + i] = b * real(cos) + a * real(sin);
    }
}

impl Plain {
    pub(super) fn rope<R: Real + Float>(&self, o: &Rope, memory: &mut Memory<R>) {
        let Heads { windows, context, heads, kv_heads, head_dim } = o.shape;
        let start: Vec<usize> = match o.start {
            Some(start) => memory.indices.one(start).iter().map(|&s| s as usize).collect(),
            None => vec![0; windows],
        };
        let [qkv, q, k, v] = memory.floats.get([o.qkv, o.q, o.k, o.v]);
        for (row, joined) in qkv.chunks(o.shape.qkv_width()).enumerate() {
            let (window, column) = (row / context, row % context);
            let angle = |i: usize| (start[window] + column) as f64 * o.frequencies[i];
            for (at, given) in joined.chunks(head_dim).enumerate() {
                let mut turned = given.to_vec();
                if at < heads + kv_heads {
                    rotate(&mut turned, angle);
                }
                let (out, count, head) = if at < heads {
                    (&mut *q, heads, at)
                } else if at < heads + kv_heads {
                    (&mut *k, kv_heads, at - heads)
                } else {
                    (&mut *v, kv_heads, at - heads - kv_heads)
                };
                out[place(&o.shape, count, window, head, column)].copy_from_slice(&turned);
            }
        }
    }

    pub(super) fn rope_backward<R: Real + Float>(&self, o: &RopeBackward, memory: &mut Memory<R>) {
        let Heads { context, heads, kv_heads, head_dim, .. } = o.shape;
        let [dq, dk, dv, dqkv] = memory.floats.get([o.dq, o.dk, o.dv, o.dqkv]);
        for (row, joined) in dqkv.chunks_mut(o.shape.qkv_width()).enumerate() {
            let (window, column) = (row / context, row % context);
            for (at, out) in joined.chunks_mut(head_dim).enumerate() {
                let (given, count, head) = if at < heads {
                    (&*dq, heads, at)
                } else if at < heads + kv_heads {
                    (&*dk, kv_heads, at - heads)
                } else {
                    (&*dv, kv_heads, at - heads - kv_heads)
                };
                out.copy_from_slice(&given[place(&o.shape, count, window, head, column)]);
                if at < heads + kv_heads {
                    rotate(out, |i| -(column as f64) * o.frequencies[i]);
                }
            }
        }
    }

    pub(super) fn attention<R: Real + Float>(&self, o: &Attention, memory: &mut Memory<R>) {
        let shape = o.shape;
        let scale = real::<R>((shape.head_dim as f64).sqrt().recip());
        let [q, k, v, out, lse] = memory.floats.get([o.q, o.k, o.v, o.out, o.lse]);
        let first_key = memory.indices.one(o.first_key);
        for (window, head, column, keys) in queries(shape, first_key) {
            let q = &q[place(&shape, shape.heads, window, head, column)];
            let key = |j| place(&shape, shape.kv_heads, window, head / shape.group(), j);
            let scores: Vec<R> = keys.clone().map(|j| dot(q, &k[key(j)]) * scale).collect();
            let at = (window * shape.context + column) * shape.q_width() + head * shape.head_dim;
            let out = &mut out[at..][..shape.head_dim];
            let lse = &mut lse[(window * shape.heads + head) * shape.context + column];
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
            // Mixed precision rounds the unnormalised p before its product and divides after.
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
        for (window, head, column, keys) in queries(shape, first_key) {
            let query = place(&shape, shape.heads, window, head, column);
            let at = (window * shape.context + column) * shape.q_width() + head * shape.head_dim;
            let row = at..at + shape.head_dim;
            let lse = lse[(window * shape.heads + head) * shape.context + column];
            let delta = dot(&dout[row.clone()], &out[row.clone()]);
            for j in keys {
                let key = place(&shape, shape.kv_heads, window, head / shape.group(), j);
                let p = (dot(&q[query.clone()], &k[key.clone()]) * scale - lse).exp();
                let dp = dot(&dout[row.clone()], &v[key.clone()]);
                let ds = self.round(p * (dp - delta)) * scale;
                add_scaled(&mut dv[key.clone()], self.round(p), &dout[row.clone()]);
                add_scaled(&mut dk[key.clone()], ds, &q[query.clone()]);
                add_scaled(&mut dq[query.clone()], ds, &k[key]);
            }
        }
    }

    pub(super) fn cached_attention<R: Real + Float>(
        &self,
        o: &CachedAttention,
        memory: &mut Memory<R>,
    ) {
        let Heads { windows, context, heads, kv_heads, head_dim } = o.shape;
        let scale = real::<R>((head_dim as f64).sqrt().recip());
        let cached = |window: usize, head: usize, column: usize| {
            let row = (window * kv_heads + head) * o.capacity + column;
            row * head_dim..(row + 1) * head_dim
        };
        let plane = windows * o.shape.kv_width() * o.capacity;
        let [keys, values] = memory
            .cache
            .get_disjoint_mut([o.keys..o.keys + plane, o.values..o.values + plane])
            .expect("a layer's keys and values lie apart");
        let [q, k, v, out] = memory.floats.get([o.q, o.k, o.v, o.out]);
        for (window, &start) in memory.indices.one(o.start).iter().enumerate() {
            for (head, column) in (0..kv_heads).flat_map(|h| (0..context).map(move |c| (h, c))) {
                let fresh = place(&o.shape, kv_heads, window, head, column);
                let kept = cached(window, head, start as usize + column);
                keys[kept.clone()].copy_from_slice(&k[fresh.clone()]);
                values[kept].copy_from_slice(&v[fresh]);
            }
            for (head, column) in (0..heads).flat_map(|h| (0..context).map(move |c| (h, c))) {
                let q = &q[place(&o.shape, heads, window, head, column)];
                let key = |j| cached(window, head / o.shape.group(), j);
                let seen = 0..start as usize + column + 1;
                let scores: Vec<R> = seen.clone().map(|j| dot(q, &keys[key(j)]) * scale).collect();
                let at = (window * context + column) * o.shape.q_width() + head * head_dim;
                let out = &mut out[at..][..head_dim];
                self.softmax(&scores, seen.map(|j| &values[key(j)]), out);
            }
        }
    }
}
