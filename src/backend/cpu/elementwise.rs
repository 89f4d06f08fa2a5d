//! Embedding, SwiGLU, and the gather of rows.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::super::memory::Memory;
use super::simd;
use crate::llama::ops::{Embedding, EmbeddingBackward, GatherRows, SwiGlu, SwiGluBackward};

/// Rows per task.
const TASK_ROWS: usize = 64;

pub(super) fn embedding(o: &Embedding, memory: &mut Memory<f32>) {
    let table = &memory.parameters[o.table.range()];
    let hidden = o.table.cols;
    let [out] = memory.floats.get([o.out]);
    out.par_chunks_mut(TASK_ROWS * hidden)
        .zip(memory.indices.one(o.ids).par_chunks(TASK_ROWS))
        .for_each(|(out, ids)| {
            for (row, &id) in out.chunks_mut(hidden).zip(ids) {
                row.copy_from_slice(&table[id as usize * hidden..][..hidden]);
            }
        });
}

/// One thread, in the order of the rows: a few additions per token.
pub(super) fn embedding_backward(o: &EmbeddingBackward, memory: &mut Memory<f32>) {
    let hidden = o.table.cols;
    let dtable = &mut memory.gradients[o.table.range()];
    let rows = memory.floats.one(o.dout).chunks(hidden);
    for (row, &id) in rows.zip(memory.indices.one(o.ids)) {
        for (sum, &d) in dtable[id as usize * hidden..][..hidden].iter_mut().zip(row) {
            *sum += d;
        }
    }
}

pub(super) fn gather_rows(o: &GatherRows, memory: &mut Memory<f32>) {
    let [x, out] = memory.floats.get([o.x, o.out]);
    let width = out.len() / o.batch;
    for (sequence, &position) in memory.indices.one(o.position).iter().enumerate() {
        let row = sequence * o.seq_len + position as usize;
        out[sequence * width..][..width].copy_from_slice(&x[row * width..][..width]);
    }
}

pub(super) fn swiglu(arch: Arch, o: &SwiGlu, memory: &mut Memory<f32>) {
    let [gate_up, out] = memory.floats.get([o.gate_up, o.out]);
    out.par_chunks_mut(TASK_ROWS * o.inter)
        .zip(gate_up.par_chunks(TASK_ROWS * 2 * o.inter))
        .for_each(|(out, gate_up)| arch.dispatch(SwiGluKernel { gate_up, inter: o.inter, out }));
}

pub(super) fn swiglu_backward(arch: Arch, o: &SwiGluBackward, memory: &mut Memory<f32>) {
    let [gate_up, dout, dgate_up] = memory.floats.get([o.gate_up, o.dout, o.dgate_up]);
    dgate_up
        .par_chunks_mut(TASK_ROWS * 2 * o.inter)
        .zip(gate_up.par_chunks(TASK_ROWS * 2 * o.inter))
        .zip(dout.par_chunks(TASK_ROWS * o.inter))
        .for_each(|((dgate_up, gate_up), dout)| {
            arch.dispatch(SwiGluBackwardKernel { gate_up, dout, inter: o.inter, dgate_up });
        });
}

struct SwiGluKernel<'a> {
    gate_up: &'a [f32],
    inter: usize,
    out: &'a mut [f32],
}

impl WithSimd for SwiGluKernel<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        for (gate_up, out) in
            self.gate_up.chunks(2 * self.inter).zip(self.out.chunks_mut(self.inter))
        {
            let (gate, up) = gate_up.split_at(self.inter);
            let (gates, gate) = S::as_simd_f32s(gate);
            let (ups, up) = S::as_simd_f32s(up);
            let (outs, out) = S::as_mut_simd_f32s(out);
            for ((out, &gate), &up) in outs.iter_mut().zip(gates).zip(ups) {
                *out = silu_mul(s, gate, up);
            }
            let last = silu_mul(s, s.partial_load_f32s(gate), s.partial_load_f32s(up));
            s.partial_store_f32s(out, last);
        }
    }
}

#[inline(always)]
fn silu_mul<S: Simd>(s: S, gate: S::f32s, up: S::f32s) -> S::f32s {
    s.mul_f32s(s.mul_f32s(gate, sigmoid(s, gate)), up)
}

struct SwiGluBackwardKernel<'a> {
    gate_up: &'a [f32],
    dout: &'a [f32],
    inter: usize,
    dgate_up: &'a mut [f32],
}

impl WithSimd for SwiGluBackwardKernel<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let rows = self.gate_up.chunks(2 * self.inter).zip(self.dout.chunks(self.inter));
        for ((gate_up, dout), dgate_up) in rows.zip(self.dgate_up.chunks_mut(2 * self.inter)) {
            let (gate, up) = gate_up.split_at(self.inter);
            let (dgate, dup) = dgate_up.split_at_mut(self.inter);
            let (gates, gate) = S::as_simd_f32s(gate);
            let (ups, up) = S::as_simd_f32s(up);
            let (douts, dout) = S::as_simd_f32s(dout);
            let (dgates, dgate) = S::as_mut_simd_f32s(dgate);
            let (dups, dup) = S::as_mut_simd_f32s(dup);
            let inputs = gates.iter().zip(ups).zip(douts);
            for (((&gate, &up), &dout), (dgate, dup)) in inputs.zip(dgates.iter_mut().zip(dups)) {
                (*dgate, *dup) = gate_up_gradients(s, gate, up, dout);
            }
            let (gate, up) = (s.partial_load_f32s(gate), s.partial_load_f32s(up));
            let (last_dgate, last_dup) = gate_up_gradients(s, gate, up, s.partial_load_f32s(dout));
            s.partial_store_f32s(dgate, last_dgate);
            s.partial_store_f32s(dup, last_dup);
        }
    }
}

/// The gradients of gate and up.
#[inline(always)]
fn gate_up_gradients<S: Simd>(
    s: S,
    gate: S::f32s,
    up: S::f32s,
    dout: S::f32s,
) -> (S::f32s, S::f32s) {
    let one = s.splat_f32s(1.0);
    let sigma = sigmoid(s, gate);
    let silu = s.mul_f32s(gate, sigma);
    // d silu = sigma (1 + gate (1 - sigma)) = sigma + silu (1 - sigma)
    let slope = s.mul_add_f32s(silu, s.sub_f32s(one, sigma), sigma);
    let dsilu = s.mul_f32s(dout, up);
    (s.mul_f32s(dsilu, slope), s.mul_f32s(dout, silu))
}

#[inline(always)]
fn sigmoid<S: Simd>(s: S, x: S::f32s) -> S::f32s {
    let one = s.splat_f32s(1.0);
    s.div_f32s(one, s.add_f32s(one, simd::exp(s, s.neg_f32s(x))))
}
