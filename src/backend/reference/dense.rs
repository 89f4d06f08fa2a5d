//! Embedding, RMSNorm, matmuls, SwiGLU, and fused linear cross-entropy.

use num_traits::Float;

use super::super::host::Real;
use super::super::memory::Memory;
use super::{ReferenceExecutor, add_scaled, dot, real};
use crate::llama::ops::{
    Embedding, EmbeddingBackward, FusedLinearCrossEntropy, GatherRows, Linear, LinearBackwardInput,
    LinearBackwardWeight, RmsNorm, RmsNormBackward, SwiGlu, SwiGluBackward,
};
use crate::tokens::IGNORE;

impl ReferenceExecutor {
    pub(super) fn embedding<R: Real + Float>(&self, o: &Embedding, memory: &mut Memory<R>) {
        let table = self.weight(&memory.parameters, o.table);
        let [out] = memory.floats.get([o.out]);
        for (row, &id) in out.chunks_mut(o.table.cols).zip(memory.indices.one(o.ids)) {
            row.copy_from_slice(&table[id as usize * o.table.cols..][..o.table.cols]);
        }
    }

    pub(super) fn embedding_backward<R: Real + Float>(
        &self,
        o: &EmbeddingBackward,
        memory: &mut Memory<R>,
    ) {
        let dtable = &mut memory.gradients[o.table.range()];
        let rows = memory.floats.one(o.dout).chunks(o.table.cols);
        for (row, &id) in rows.zip(memory.indices.one(o.ids)) {
            add_scaled(&mut dtable[id as usize * o.table.cols..][..o.table.cols], R::one(), row);
        }
    }

    pub(super) fn rms_norm<R: Real + Float>(&self, o: &RmsNorm, memory: &mut Memory<R>) {
        let hidden = o.weight.cols;
        let weight = self.weight(&memory.parameters, o.weight);
        let sum = if let Some(add) = o.add {
            let [x, residual, sum] = memory.floats.get([o.x, add.residual, add.sum]);
            for ((sum, &x), &residual) in sum.iter_mut().zip(&*x).zip(&*residual) {
                *sum = self.round(x + residual);
            }
            add.sum
        } else {
            o.x
        };
        let [sum, y, rstd] = memory.floats.get([sum, o.y, o.rstd]);
        let rows = sum.chunks(hidden).zip(y.chunks_mut(hidden)).zip(rstd);
        for ((x, y), rstd) in rows {
            *rstd = R::one() / (dot(x, x) / real(hidden as f64) + real(o.eps)).sqrt();
            for ((y, &x), &w) in y.iter_mut().zip(x).zip(&weight) {
                *y = x * *rstd * w;
            }
        }
    }

    pub(super) fn rms_norm_backward<R: Real + Float>(
        &self,
        o: &RmsNormBackward,
        memory: &mut Memory<R>,
    ) {
        let hidden = o.weight.cols;
        let weight = self.weight(&memory.parameters, o.weight);
        let dweight = &mut memory.gradients[o.weight.range()];
        let dsum = o.dsum.map(|dsum| memory.floats.one(dsum).to_vec());
        let [x, rstd, dy, dx] = memory.floats.get([o.x, o.rstd, o.dy, o.dx]);
        for (row, &rstd) in rstd.iter().enumerate() {
            let at = row * hidden..(row + 1) * hidden;
            let n: Vec<R> = x[at.clone()].iter().map(|&x| x * rstd).collect();
            let g: Vec<R> = dy[at.clone()].iter().zip(&weight).map(|(&dy, &w)| dy * w).collect();
            let mean = dot(&g, &n) / real(hidden as f64);
            for column in 0..hidden {
                let past = dsum.as_ref().map_or(R::zero(), |dsum| dsum[row * hidden + column]);
                dx[row * hidden + column] = past + rstd * (g[column] - n[column] * mean);
                dweight[column] += dy[row * hidden + column] * n[column];
            }
        }
    }

    pub(super) fn linear<R: Real + Float>(&self, o: &Linear, memory: &mut Memory<R>) {
        let w = self.weight(&memory.parameters, o.w);
        let [x, y] = memory.floats.get([o.x, o.y]);
        for (x, y) in x.chunks(o.w.cols).zip(y.chunks_mut(o.w.rows)) {
            for (y, w) in y.iter_mut().zip(w.chunks(o.w.cols)) {
                *y = dot(x, w);
            }
        }
    }

    pub(super) fn linear_backward_input<R: Real + Float>(
        &self,
        o: &LinearBackwardInput,
        memory: &mut Memory<R>,
    ) {
        let w = self.weight(&memory.parameters, o.w);
        let [dy, dx] = memory.floats.get([o.dy, o.dx]);
        for (dy, dx) in dy.chunks(o.w.rows).zip(dx.chunks_mut(o.w.cols)) {
            dx.fill(R::zero());
            for (&dy, w) in dy.iter().zip(w.chunks(o.w.cols)) {
                add_scaled(dx, dy, w);
            }
        }
    }

    pub(super) fn linear_backward_weight<R: Real + Float>(
        &self,
        o: &LinearBackwardWeight,
        memory: &mut Memory<R>,
    ) {
        let dw = &mut memory.gradients[o.w.range()];
        let [dy, x] = memory.floats.get([o.dy, o.x]);
        for (dy, x) in dy.chunks(o.w.rows).zip(x.chunks(o.w.cols)) {
            for (&dy, dw) in dy.iter().zip(dw.chunks_mut(o.w.cols)) {
                add_scaled(dw, dy, x);
            }
        }
    }

    pub(super) fn swiglu<R: Real + Float>(&self, o: &SwiGlu, memory: &mut Memory<R>) {
        let [gate_up, out] = memory.floats.get([o.gate_up, o.out]);
        for (gate_up, out) in gate_up.chunks(2 * o.inter).zip(out.chunks_mut(o.inter)) {
            let (gate, up) = gate_up.split_at(o.inter);
            for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
                *out = gate * sigmoid(gate) * up;
            }
        }
    }

    pub(super) fn swiglu_backward<R: Real + Float>(
        &self,
        o: &SwiGluBackward,
        memory: &mut Memory<R>,
    ) {
        let [gate_up, dout, dgate_up] = memory.floats.get([o.gate_up, o.dout, o.dgate_up]);
        let rows = gate_up.chunks(2 * o.inter).zip(dout.chunks(o.inter));
        for ((gate_up, dout), dgate_up) in rows.zip(dgate_up.chunks_mut(2 * o.inter)) {
            for i in 0..o.inter {
                let (gate, up, s) = (gate_up[i], gate_up[o.inter + i], sigmoid(gate_up[i]));
                dgate_up[i] = dout[i] * up * s * (R::one() + gate * (R::one() - s));
                dgate_up[o.inter + i] = dout[i] * gate * s;
            }
        }
    }

    pub(super) fn fused_linear_cross_entropy<R: Real + Float>(
        &self,
        o: &FusedLinearCrossEntropy,
        memory: &mut Memory<R>,
        loss_scale: f64,
    ) {
        let hidden = o.w.cols;
        let w = self.weight(&memory.parameters, o.w);
        let [nll] = memory.floats.get([o.nll]);
        let mut losses = nll.to_vec();
        let x = memory.floats.one(o.x).to_vec();
        let mut dx = vec![R::zero(); x.len()];
        for row in 0..o.rows {
            let x = &x[row * hidden..(row + 1) * hidden];
            let logits: Vec<R> = w.chunks(hidden).map(|w| dot(x, w)).collect();
            // The first of equal maxima, as torch.argmax.
            let best = (0..logits.len())
                .fold(0, |best, id| if logits[id] > logits[best] { id } else { best });
            memory.indices.get([o.argmax])[0][row] = best as u32;

            let target = memory.indices.one(o.targets)[row];
            if target == IGNORE {
                losses[row] = R::zero();
                continue;
            }
            let sum =
                logits.iter().fold(R::zero(), |sum, &logit| sum + (logit - logits[best]).exp());
            let lse = logits[best] + sum.ln();
            losses[row] = lse - logits[target as usize];
            if o.dx.is_some() {
                let dw = &mut memory.gradients[o.w.range()];
                for (id, &logit) in logits.iter().enumerate() {
                    let hit = if id == target as usize { R::one() } else { R::zero() };
                    let dlogit = self.round(((logit - lse).exp() - hit) * real(loss_scale));
                    let at = id * hidden..(id + 1) * hidden;
                    add_scaled(&mut dx[row * hidden..(row + 1) * hidden], dlogit, &w[at.clone()]);
                    add_scaled(&mut dw[at], dlogit, x);
                }
            }
        }
        memory.floats.get([o.nll])[0].copy_from_slice(&losses);
        if let Some(buffer) = o.dx {
            memory.floats.get([buffer])[0].copy_from_slice(&dx);
        }
    }

    pub(super) fn gather_rows<R: Real + Float>(&self, o: &GatherRows, memory: &mut Memory<R>) {
        let positions = memory.indices.one(o.position);
        let [x, out] = memory.floats.get([o.x, o.out]);
        let width = out.len() / o.batch;
        for (sequence, &position) in positions.iter().enumerate() {
            let row = sequence * o.seq_len + position as usize;
            out[sequence * width..][..width].copy_from_slice(&x[row * width..][..width]);
        }
    }
}

fn sigmoid<R: Float>(x: R) -> R {
    R::one() / (R::one() + (-x).exp())
}
