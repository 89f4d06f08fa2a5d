//! Rotary position embedding, with the split into heads.

use rayon::prelude::*;

use super::super::memory::Memory;
use crate::llama::ops::{AttentionShape, Rope, RopeBackward};

/// Cosines and sines by position, computed once in f64.
#[derive(Default)]
pub(super) struct RopeTable {
    frequencies: Vec<f64>,
    /// `[positions, pairs]` of (cosine, sine).
    rotations: Vec<(f32, f32)>,
}

impl RopeTable {
    fn extend_to(&mut self, frequencies: &[f64], positions: usize) {
        if self.frequencies != frequencies {
            *self = Self { frequencies: frequencies.to_vec(), rotations: Vec::new() };
        }
        for position in self.rotations.len() / frequencies.len()..positions {
            self.rotations.extend(frequencies.iter().map(|frequency| {
                let (sin, cos) = (position as f64 * frequency).sin_cos();
                (cos as f32, sin as f32)
            }));
        }
    }

    fn at(&self, position: usize) -> &[(f32, f32)] {
        &self.rotations[position * self.frequencies.len()..][..self.frequencies.len()]
    }

    pub fn forward(&mut self, o: &Rope, memory: &mut Memory<f32>) {
        let AttentionShape { batch, seq_len, heads, kv_heads, head_dim } = o.shape;
        let zeros = vec![0; batch];
        let start = o.start.map_or(zeros.as_slice(), |start| memory.indices.one(start));
        let positions = start.iter().max().map_or(0, |&start| start as usize) + seq_len;
        self.extend_to(&o.frequencies, positions);
        let table = &*self;
        let [qkv, q, k, v] = memory.floats.get([o.qkv, o.q, o.k, o.v]);
        let (qkv, width) = (&*qkv, o.shape.qkv_width());
        // A task is one head of one sequence, rotated or copied from its place in the joined rows.
        let split = |out: &mut [f32], count: usize, first: usize, rotated: bool| {
            out.par_chunks_mut(seq_len * head_dim).enumerate().for_each(|(task, out)| {
                let (sequence, head) = (task / count, task % count);
                for (position, out) in out.chunks_mut(head_dim).enumerate() {
                    let row = (sequence * seq_len + position) * width + (first + head) * head_dim;
                    let given = &qkv[row..row + head_dim];
                    if rotated {
                        rotate(given, table.at(start[sequence] as usize + position), 1.0, out);
                    } else {
                        out.copy_from_slice(given);
                    }
                }
            });
        };
        split(q, heads, 0, true);
        split(k, kv_heads, heads, true);
        split(v, kv_heads, heads + kv_heads, false);
    }

    pub fn backward(&mut self, o: &RopeBackward, memory: &mut Memory<f32>) {
        let AttentionShape { seq_len, heads, kv_heads, head_dim, .. } = o.shape;
        self.extend_to(&o.frequencies, seq_len);
        let table = &*self;
        let [dq, dk, dv, dqkv] = memory.floats.get([o.dq, o.dk, o.dv, o.dqkv]);
        let (dq, dk, dv) = (&*dq, &*dk, &*dv);
        dqkv.par_chunks_mut(o.shape.qkv_width()).enumerate().for_each(|(row, joined)| {
            let (sequence, position) = (row / seq_len, row % seq_len);
            for (at, out) in joined.chunks_mut(head_dim).enumerate() {
                let (given, count, head) = if at < heads {
                    (dq, heads, at)
                } else if at < heads + kv_heads {
                    (dk, kv_heads, at - heads)
                } else {
                    (dv, kv_heads, at - heads - kv_heads)
                };
                let given = &given[((sequence * count + head) * seq_len + position) * head_dim..];
                if at < heads + kv_heads {
                    rotate(&given[..head_dim], table.at(position), -1.0, out);
                } else {
                    out.copy_from_slice(&given[..head_dim]);
                }
            }
        });
    }
}

/// Rotates the pairs `(i, i + half)`; `direction` is 1 in the forward and -1 in the backward.
fn rotate(given: &[f32], rotations: &[(f32, f32)], direction: f32, out: &mut [f32]) {
    let half = rotations.len();
    for (i, &(cos, sin)) in rotations.iter().enumerate() {
        let (a, b, sin) = (given[i], given[half + i], direction * sin);
        out[i] = a * cos - b * sin;
        out[half + i] = b * cos + a * sin;
    }
}
