//! Gradient norm, AdamW in one pass, and Muon.

use pulp::Arch;
use rayon::prelude::*;

use super::super::memory::Memory;
use super::matmul::{MatmulThreads, MatrixView, matmul};
use crate::llama::StepHyperparams;
use crate::llama::newton_schulz::{COEFFICIENTS, NewtonSchulzStep, steps};
use crate::llama::ops::{AdamWStep, GradNorm, MuonStep};

/// Elements per task.
const TASK_ELEMENTS: usize = 1 << 14;

/// Gradient norm in f64: eight interleaved sums per task, the tasks in order.
pub(super) fn grad_norm(o: &GradNorm, memory: &mut Memory<f32>) {
    let squares: Vec<f64> = memory
        .gradients
        .par_chunks(TASK_ELEMENTS)
        .map(|chunk| {
            let mut sums = [0.0f64; 8];
            for values in chunk.chunks(8) {
                for (sum, &g) in sums.iter_mut().zip(values) {
                    *sum += f64::from(g) * f64::from(g);
                }
            }
            sums.iter().sum()
        })
        .collect();
    memory.floats.get([o.norm])[0][0] = squares.iter().sum::<f64>().sqrt() as f32;
}

/// The gradients' scale, or `None` if the norm is not finite and the update must be skipped.
fn clip(norm: f32, max_grad_norm: f64) -> Option<f32> {
    norm.is_finite().then(|| (max_grad_norm as f32 / (norm + 1e-6)).min(1.0))
}

pub(super) fn adamw(
    arch: Arch,
    o: &AdamWStep,
    memory: &mut Memory<f32>,
    hyperparams: &StepHyperparams,
) {
    let Some(clip) = clip(memory.floats.one(o.norm)[0], o.max_grad_norm) else { return };
    let t = hyperparams.step as f64;
    let step_size = (hyperparams.learning_rate / (1.0 - o.beta1.powf(t))) as f32;
    let correction = (1.0 - o.beta2.powf(t)).sqrt() as f32;
    let (keep, beta2, fresh) = ((1.0 - o.beta1) as f32, o.beta2 as f32, (1.0 - o.beta2) as f32);
    let epsilon = o.epsilon as f32;
    for (range, decay) in &o.ranges {
        let shrink = (1.0 - hyperparams.learning_rate * decay) as f32;
        let range = range.clone();
        let moments = memory.moments(&range);
        memory.parameters[range.clone()]
            .par_chunks_mut(TASK_ELEMENTS)
            .zip(memory.gradients[range].par_chunks(TASK_ELEMENTS))
            .zip(memory.first_moment[moments.clone()].par_chunks_mut(TASK_ELEMENTS))
            .zip(memory.second_moment[moments].par_chunks_mut(TASK_ELEMENTS))
            .for_each(|(((p, g), m), v)| {
                arch.dispatch(|| {
                    for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
                        let g = g * clip;
                        *m += (g - *m) * keep;
                        *v = *v * beta2 + g * g * fresh;
                        *p = *p * shrink - step_size * *m / (v.sqrt() / correction + epsilon);
                    }
                });
            });
    }
}

/// Bytes of the updates of as many matrices as there are threads, and of [`orthogonalize`] for each.
pub(super) fn muon_workspace(o: &MuonStep, threads: usize) -> usize {
    let (rows, cols) = o.shape();
    let gram = rows.min(cols).pow(2);
    4 * (2 * rows * cols + 4 * gram) * o.matrices.len().min(threads)
}

pub(super) fn muon(o: &MuonStep, memory: &mut Memory<f32>, hyperparams: &StepHyperparams) {
    let Some(clip) = clip(memory.floats.one(o.norm)[0], o.max_grad_norm) else { return };
    let momentum = o.momentum as f32;
    let (rows, cols) = o.shape();
    let scale = (rows as f64 / cols as f64).max(1.0).sqrt();
    let step = (hyperparams.muon_learning_rate * scale) as f32;
    let shrink = (1.0 - hyperparams.muon_learning_rate * o.weight_decay) as f32;
    for matrices in o.matrices.chunks(rayon::current_num_threads()) {
        let mut updates: Vec<Vec<f32>> = Vec::new();
        for w in matrices {
            let moments = memory.moments(&w.range());
            let gradient = memory.gradients[w.range()].par_iter();
            let moments = memory.first_moment[moments].par_iter_mut().with_min_len(TASK_ELEMENTS);
            let update = moments.zip(gradient).map(|(m, &g)| {
                *m = momentum * *m + g * clip;
                g * clip + momentum * *m
            });
            updates.push(update.collect());
        }
        // Whole matrices in parallel: their matmuls are small.
        let threads = if matrices.len() > 1 { MatmulThreads::One } else { MatmulThreads::All };
        updates.par_iter_mut().for_each(|update| {
            *update = orthogonalize(std::mem::take(update), rows, cols, threads);
        });
        for (w, update) in matrices.iter().zip(updates) {
            let parameters = memory.parameters[w.range()].par_iter_mut();
            parameters.with_min_len(TASK_ELEMENTS).zip(update).for_each(|(p, u)| {
                *p = *p * shrink - step * u;
            });
        }
    }
}

/// [`newton_schulz`] of X, scaled to norm 1. A tall matrix is treated as its transpose: `R` is `XT X`, and Q is
/// multiplied from the right.
fn orthogonalize(mut x: Vec<f32>, rows: usize, cols: usize, threads: MatmulThreads) -> Vec<f32> {
    let norm = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt() as f32 + 1e-7;
    for x in &mut x {
        *x /= norm;
    }
    let tall = rows > cols;
    let m = rows.min(cols);
    let [mut r, mut z, mut q, mut product] = std::array::from_fn(|_| vec![0.0; m * m]);
    let mut next = vec![0.0; x.len()];
    let [a, b, c] = COEFFICIENTS.map(|c| c as f32);
    for step in steps(rows, cols) {
        let rectangle = MatrixView::new(&x, rows, cols);
        match step {
            NewtonSchulzStep::Gram => {
                let (left, right) = if tall {
                    (rectangle.transposed(), rectangle)
                } else {
                    (rectangle, rectangle.transposed())
                };
                matmul(&mut r, false, left, right, threads);
            }
            NewtonSchulzStep::Polynomial => {
                matmul(&mut z, false, square(&r, m), square(&r, m), threads);
                for (z, r) in z.iter_mut().zip(&r) {
                    *z = b * r + c * *z;
                }
                z.iter_mut().step_by(m + 1).for_each(|z| *z += a);
            }
            NewtonSchulzStep::Conjugate => {
                matmul(&mut product, false, square(&z, m), square(&r, m), threads);
                matmul(&mut r, false, square(&product, m), square(&z, m), threads);
            }
            NewtonSchulzStep::Begin => std::mem::swap(&mut z, &mut q),
            NewtonSchulzStep::Compose => {
                matmul(&mut product, false, square(&z, m), square(&q, m), threads);
                std::mem::swap(&mut q, &mut product);
            }
            NewtonSchulzStep::Apply => {
                let (left, right) = if tall {
                    (rectangle, square(&q, m).transposed())
                } else {
                    (square(&q, m), rectangle)
                };
                matmul(&mut next, false, left, right, threads);
                std::mem::swap(&mut x, &mut next);
            }
        }
    }
    x
}

fn square(data: &[f32], side: usize) -> MatrixView<'_> {
    MatrixView::new(data, side, side)
}
