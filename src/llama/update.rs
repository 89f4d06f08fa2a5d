//! The update: gradient norm, clipping, AdamW or Muon.

use std::sync::Arc;

use super::buffer::{Buffer, BufferKind, BufferRole};
use super::newton_schulz;
use super::ops::{
    AdamWStep, GatherShards, GradNorm, MuonStep, NormRuns, Op, ReduceGradients, ShardedArena,
    ZeroGrad,
};
use super::program::Program;
use super::slices::{Shards, SlicePlan};
use crate::model::{Layout, ParamKind, Span};

/// Hyperparameters of AdamW.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Addend of the denominator.
    pub epsilon: f64,
}

/// Hyperparameters of Muon.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Muon {
    /// Decay of the momentum.
    pub momentum: f64,
}

/// The optimizer and its constant hyperparameters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Optimizer {
    /// AdamW, for what Muon does not update.
    pub adamw: AdamW,
    /// Muon for the matrices inside the blocks; AdamW for the rest, or for all if `None`.
    pub muon: Option<Muon>,
    /// Decoupled weight decay of matrices and embeddings; norms have none.
    pub weight_decay: f64,
    /// Norm above which gradients are scaled down.
    pub max_grad_norm: f64,
}

/// Hyperparameters that change from step to step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepHyperparams {
    /// AdamW's learning rate.
    pub learning_rate: f64,
    /// Muon's learning rate.
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
    append(p, layout, optimizer, None)
}

/// The end of a step that is cut into slices: adds the last slice of this rank, sums over all ranks,
/// and updates. With `own`, this process steps its shard of the parameters, and gets the others from the
/// ranks that step them; without, it steps them all. Also returns the buffer of the gradient norm.
pub fn sliced_update(
    layout: &Layout,
    optimizer: &Optimizer,
    plan: SlicePlan,
    shards: &Arc<Shards>,
    own: bool,
) -> (Program, Buffer) {
    let mut p = Program::default();
    p.ops.extend(plan.after(plan.per_rank() - 1));
    let own = own && shards.ranks() > 1;
    let gather = |arena| Op::GatherShards(GatherShards { shards: shards.clone(), arena });
    if shards.ranks() > 1 {
        p.ops.push(Op::ReduceGradients(ReduceGradients {
            shards: shards.clone(),
            slots: plan.subtree_slots(),
            order: plan.across_ranks(),
        }));
        if !own {
            p.ops.push(gather(ShardedArena::Gradients));
        }
    }
    let norm = append(&mut p, layout, optimizer, Some(NormRuns { shards: shards.clone(), own }));
    if own {
        p.ops.push(gather(ShardedArena::Parameters));
    }
    (p, norm)
}

fn append(
    p: &mut Program,
    layout: &Layout,
    optimizer: &Optimizer,
    runs: Option<NormRuns>,
) -> Buffer {
    let norm = p.buffer("gradient norm", BufferKind::Float, 1, BufferRole::Output);
    let batched = runs.is_none();
    let shard = match &runs {
        Some(runs) if runs.own => runs.shards.own(),
        _ => 0..layout.len,
    };
    p.ops.push(Op::GradNorm(GradNorm { norm, runs }));

    let by_muon = |kind| optimizer.muon.is_some() && kind == ParamKind::Matrix;
    let ranges = layout
        .parameters
        .iter()
        .filter(|parameter| !by_muon(parameter.kind))
        .map(|parameter| {
            let range = parameter.span.range();
            let range = range.start.max(shard.start)..range.end.min(shard.end);
            let decay =
                if parameter.kind == ParamKind::Norm { 0.0 } else { optimizer.weight_decay };
            (range, decay)
        })
        .filter(|(range, _)| !range.is_empty())
        .collect();
    let AdamW { beta1, beta2, epsilon } = optimizer.adamw;
    let max_grad_norm = optimizer.max_grad_norm;
    p.ops.push(Op::AdamWStep(AdamWStep { norm, max_grad_norm, beta1, beta2, epsilon, ranges }));

    if let Some(Muon { momentum }) = optimizer.muon {
        // Matrices of one shape form one op, which is one batched launch on a device.
        let mut shapes: Vec<Vec<Span>> = Vec::new();
        for parameter in layout.parameters.iter().filter(|parameter| by_muon(parameter.kind)) {
            let w = parameter.span;
            if !shard.contains(&w.offset) {
                continue;
            }
            match shapes.iter_mut().find(|same| (same[0].rows, same[0].cols) == (w.rows, w.cols)) {
                Some(same) => same.push(w),
                None => shapes.push(vec![w]),
            }
        }
        for matrices in shapes {
            let weight_decay = optimizer.weight_decay;
            let half = newton_schulz::is_half(matrices[0].rows, matrices[0].cols);
            let op =
                MuonStep { norm, max_grad_norm, momentum, weight_decay, matrices, batched, half };
            p.ops.push(Op::MuonStep(op));
        }
    }
    p.ops.push(Op::ZeroGrad(ZeroGrad));
    norm
}
