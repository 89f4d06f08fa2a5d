//! The update: gradient norm, clipping, AdamW or Muon.

use super::ops::{AdamWStep, GradNorm, MuonStep, Op, ZeroGradients};
use super::program::{Buffer, Element, Program, Use};
use crate::model::{Kind, Layout, Span};

/// AdamW's constants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
}

/// Muon's constants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Muon {
    pub momentum: f64,
}

/// What turns gradients into steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Optimizer {
    pub adamw: AdamW,
    /// For the matrices inside the blocks; AdamW takes the rest.
    pub muon: Option<Muon>,
    /// Decoupled decay of matrices and embeddings; norms have none.
    pub decay: f64,
    pub max_grad_norm: f64,
}

/// What changes from step to step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rates {
    pub learning_rate: f64,
    pub muon_learning_rate: f64,
    /// The number of this update, from 1, for Adam's bias correction.
    pub step: u64,
}

/// The update of all parameters, and where the norm of the gradients (before clipping) is left.
/// The gradients are zero afterwards.
pub fn update(layout: &Layout, optimizer: &Optimizer) -> (Program, Buffer) {
    let mut p = Program::default();
    let norm = append_update(&mut p, layout, optimizer);
    (p, norm)
}

/// The same at the end of a program: a whole step in one.
pub fn append_update(p: &mut Program, layout: &Layout, optimizer: &Optimizer) -> Buffer {
    let norm = p.buffer("gradient norm", Element::Float, 1, Use::Output);
    p.ops.push(Op::GradNorm(GradNorm { norm }));

    let by_muon = |kind| optimizer.muon.is_some() && kind == Kind::Matrix;
    let ranges = layout
        .parameters
        .iter()
        .filter(|parameter| !by_muon(parameter.kind))
        .map(|parameter| {
            let decay = if parameter.kind == Kind::Norm { 0.0 } else { optimizer.decay };
            (parameter.span.range(), decay)
        })
        .collect();
    let AdamW { beta1, beta2, epsilon } = optimizer.adamw;
    let max_grad_norm = optimizer.max_grad_norm;
    p.ops.push(Op::AdamWStep(AdamWStep { norm, max_grad_norm, beta1, beta2, epsilon, ranges }));

    if let Some(Muon { momentum }) = optimizer.muon {
        // Those of one shape together: on a device, one launch does the same to all of them.
        let mut shapes: Vec<Vec<Span>> = Vec::new();
        for parameter in layout.parameters.iter().filter(|parameter| by_muon(parameter.kind)) {
            let w = parameter.span;
            match shapes.iter_mut().find(|same| (same[0].rows, same[0].cols) == (w.rows, w.cols)) {
                Some(same) => same.push(w),
                None => shapes.push(vec![w]),
            }
        }
        for matrices in shapes {
            let decay = optimizer.decay;
            p.ops.push(Op::MuonStep(MuonStep { norm, max_grad_norm, momentum, decay, matrices }));
        }
    }
    p.ops.push(Op::ZeroGradients(ZeroGradients));
    norm
}
