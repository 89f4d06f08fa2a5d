//! The update: gradient norm, clipping, AdamW or Muon.

use super::buffer::{Buffer, BufferKind, BufferRole};
use super::ops::{AdamWStep, GradNorm, MuonStep, Op, ZeroGrad};
use super::program::Program;
use crate::model::{Layout, ParamKind, Span};

/// Hyperparameters of AdamW.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
}

/// Hyperparameters of Muon.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Muon {
    pub momentum: f64,
}

/// The optimizer and its constant hyperparameters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Optimizer {
    pub adamw: AdamW,
    /// Muon for the matrices inside the blocks; AdamW for the rest, or for all if `None`.
    pub muon: Option<Muon>,
    /// Decoupled weight decay of matrices and embeddings; norms have none.
    pub weight_decay: f64,
    pub max_grad_norm: f64,
}

/// Hyperparameters that change from step to step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepHyperparams {
    pub learning_rate: f64,
    pub muon_learning_rate: f64,
    /// Number of this update, from 1, for Adam's bias correction.
    pub step: u64,
}

/// The update of all parameters, which leaves zero gradients. Also returns the buffer of the gradient
/// norm before clipping.
pub fn update(layout: &Layout, optimizer: &Optimizer) -> (Program, Buffer) {
    let mut p = Program::default();
    let norm = append_update(&mut p, layout, optimizer);
    (p, norm)
}

/// Appends the update to a program. Returns the buffer of the gradient norm.
pub fn append_update(p: &mut Program, layout: &Layout, optimizer: &Optimizer) -> Buffer {
    let norm = p.buffer("gradient norm", BufferKind::Float, 1, BufferRole::Output);
    p.ops.push(Op::GradNorm(GradNorm { norm }));

    let by_muon = |kind| optimizer.muon.is_some() && kind == ParamKind::Matrix;
    let ranges = layout
        .parameters
        .iter()
        .filter(|parameter| !by_muon(parameter.kind))
        .map(|parameter| {
            let decay =
                if parameter.kind == ParamKind::Norm { 0.0 } else { optimizer.weight_decay };
            (parameter.span.range(), decay)
        })
        .collect();
    let AdamW { beta1, beta2, epsilon } = optimizer.adamw;
    let max_grad_norm = optimizer.max_grad_norm;
    p.ops.push(Op::AdamWStep(AdamWStep { norm, max_grad_norm, beta1, beta2, epsilon, ranges }));

    if let Some(Muon { momentum }) = optimizer.muon {
        // Matrices of one shape form one op, which is one batched launch on a device.
        let mut shapes: Vec<Vec<Span>> = Vec::new();
        for parameter in layout.parameters.iter().filter(|parameter| by_muon(parameter.kind)) {
            let w = parameter.span;
            match shapes.iter_mut().find(|same| (same[0].rows, same[0].cols) == (w.rows, w.cols)) {
                Some(same) => same.push(w),
                None => shapes.push(vec![w]),
            }
        }
        for matrices in shapes {
            let weight_decay = optimizer.weight_decay;
            let op = MuonStep { norm, max_grad_norm, momentum, weight_decay, matrices };
            p.ops.push(Op::MuonStep(op));
        }
    }
    p.ops.push(Op::ZeroGrad(ZeroGrad));
    norm
}
