//! Gradient norm, AdamW and Muon.

use num_traits::Float;

use super::super::host::Real;
use super::super::memory::Memory;
use super::{ReferenceExecutor, dot, real};
use crate::dtype::Dtype;
use crate::llama::StepHyperparams;
use crate::llama::ops::{AdamWStep, GradNorm, MuonStep};

/// The gradients' scale, or `None` if the norm is not finite and the update must be skipped.
fn clip<R: Float>(norm: R, max_grad_norm: f64) -> Option<R> {
    let factor = real::<R>(max_grad_norm) / (norm + real(1e-6));
    norm.is_finite().then(|| factor.min(R::one()))
}

impl ReferenceExecutor {
    pub(super) fn grad_norm<R: Real + Float>(&self, o: &GradNorm, memory: &mut Memory<R>) {
        let squares: f64 =
            memory.gradients.iter().map(|g| g.to_f64().expect("a float").powi(2)).sum();
        memory.floats.get([o.norm])[0][0] = real(squares.sqrt());
    }

    pub(super) fn adamw<R: Real + Float>(
        &self,
        o: &AdamWStep,
        memory: &mut Memory<R>,
        hyperparams: &StepHyperparams,
    ) {
        let Some(clip) = clip(memory.floats.one(o.norm)[0], o.max_grad_norm) else { return };
        let t = hyperparams.step as f64;
        let step_size = real::<R>(hyperparams.learning_rate / (1.0 - o.beta1.powf(t)));
        let correction = real::<R>((1.0 - o.beta2.powf(t)).sqrt());
        for (range, decay) in &o.ranges {
            for i in range.clone() {
                let g = memory.gradients[i] * clip;
                let p = memory.parameters[i] * real(1.0 - hyperparams.learning_rate * decay);
                let at = i - memory.moments_from;
                let (m, v) = (memory.first_moment[at], memory.second_moment[at]);
                let m = m + (g - m) * real(1.0 - o.beta1);
                let v = v * real(o.beta2) + g * g * real(1.0 - o.beta2);
                memory.first_moment[at] = m;
                memory.second_moment[at] = v;
                memory.parameters[i] =
                    p - step_size * m / (v.sqrt() / correction + real(o.epsilon));
            }
        }
    }

    pub(super) fn muon<R: Real + Float>(
        &self,
        o: &MuonStep,
        memory: &mut Memory<R>,
        hyperparams: &StepHyperparams,
    ) {
        let Some(clip) = clip(memory.floats.one(o.norm)[0], o.max_grad_norm) else { return };
        let momentum = real::<R>(o.momentum);
        for w in &o.matrices {
            let mut update = Vec::with_capacity(w.len());
            for i in w.range() {
                let g = memory.gradients[i] * clip;
                let m = &mut memory.first_moment[i - memory.moments_from];
                *m = momentum * *m + g;
                update.push(g + momentum * *m);
            }
            // A GPU rounds the matrices of large ones to f16.
            let round = |x: R| match self.rounding {
                Some(_) if o.half => R::from_f32(Dtype::F16.round(x.to_f32())),
                _ => x,
            };
            let update = orthogonalize(&update, w.rows, w.cols, round);
            let scale = (w.rows as f64 / w.cols as f64).max(1.0).sqrt();
            for (i, u) in w.range().zip(update) {
                let p = memory.parameters[i]
                    * real(1.0 - hyperparams.muon_learning_rate * o.weight_decay);
                memory.parameters[i] = p - real::<R>(hyperparams.muon_learning_rate * scale) * u;
            }
        }
    }
}

/// Five Newton-Schulz iterations `X = a X + (b A + c A A) X`, `A = X XT`, with Muon's coefficients,
/// from X scaled to norm 1; a tall matrix is transposed first. Each matrix is rounded as it is stored.
fn orthogonalize<R: Float>(g: &[R], rows: usize, cols: usize, round: impl Fn(R) -> R) -> Vec<R> {
    let tall = rows > cols;
    let (m, n) = if tall { (cols, rows) } else { (rows, cols) };
    let at = |i: usize, j: usize| if tall { j * cols + i } else { i * cols + j };
    let norm = dot(g, g).sqrt() + real(1e-7);
    let mut x: Vec<R> = (0..m * n).map(|k| round(g[at(k / n, k % n)] / norm)).collect();
    for _ in 0..5 {
        let gram = |x: &[R], y: &[R], width: usize| -> Vec<R> {
            (0..m * m)
                .map(|k| round(dot(&x[k / m * width..][..width], &y[k % m * width..][..width])))
                .collect()
        };
        let a = gram(&x, &x, n);
        let aa = gram(&a, &a, m);
        let b: Vec<R> = a
            .iter()
            .zip(&aa)
            .map(|(&a, &aa)| round(real::<R>(-4.775) * a + real::<R>(2.0315) * aa))
            .collect();
        let mut next: Vec<R> = x.iter().map(|&x| real::<R>(3.4445) * x).collect();
        for i in 0..m {
            for k in 0..m {
                super::add_scaled(&mut next[i * n..][..n], b[i * m + k], &x[k * n..][..n]);
            }
        }
        x = next.into_iter().map(&round).collect();
    }
    let mut out = vec![R::zero(); m * n];
    for k in 0..m * n {
        out[at(k / n, k % n)] = x[k];
    }
    out
}
