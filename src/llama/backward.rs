//! The backward pass: the forward's ops in reverse.

use serde::{Deserialize, Serialize};

use super::buffer::Buffer;
use super::forward::{Builder, KeySource, SavedActivations, SavedBlock, SavedNorm};
use super::ops::{
    AttentionBackward, EmbeddingBackward, LinearBackwardInput, LinearBackwardWeight, Op,
    RmsNormBackward, RmsNormBackwardWeight, RopeBackward, SwiGluBackward, norm_partials,
};
use crate::model::{BlockParams, Span};

/// Activations that backward computes again, so that they take no memory between forward and backward.
/// The gradients have the same bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    /// Nothing: all activations are kept
    #[default]
    None,
    /// Those inside the MLP: gate, up and their product
    Mlp,
    /// All but the input of each block
    Block,
}

/// Most bytes of partial sums of norm weight gradients that wait for one launch. Norms of large batches of
/// wide models exceed it, but there launches cost little.
const MAX_WAITING_PARTIAL_BYTES: usize = 16 << 20;

/// Norms whose weight gradients are completed together.
struct NormGroup {
    partials: Buffer,
    weights: Vec<Span>,
}

/// Groups of norms, as even as possible.
struct NormGroups {
    per_group: usize,
    open: Option<NormGroup>,
}

impl Builder<'_> {
    /// Gradients of all parameters from `dy`, the gradient of the final norm's output.
    pub fn backward(
        &mut self,
        saved: &SavedActivations,
        ids: Buffer,
        first_key: Buffer,
        dy: Buffer,
        recompute: Recompute,
    ) {
        let shape = self.shape;
        // `dx` is the gradient of the residual stream at a norm's input, and so of both terms of the
        // sum there.
        let mut norms = self.norm_groups();
        let mut dx =
            self.norm_backward(saved.final_norm, self.layout.final_norm, dy, None, &mut norms);
        for (layer, (block, &saved)) in
            self.layout.blocks.iter().zip(&saved.blocks).enumerate().rev()
        {
            let kept = self.recomputed(recompute, saved, block, first_key, layer);
            self.scope = format!("layer {layer} d ");
            let dactivated = self.linear_backward(dx, kept.mlp.activated, block.down, "activated");
            let dgate_up = self.activation("gate and up", block.gate_up.rows);
            self.p.ops.push(Op::SwiGluBackward(SwiGluBackward {
                gate_up: kept.mlp.gate_up,
                dout: dactivated,
                inter: self.config.intermediate_size,
                dgate_up,
            }));
            let dy = self.linear_backward(dgate_up, kept.mlp_norm.y, block.gate_up, "mlp norm");
            dx = self.norm_backward(kept.mlp_norm, block.post_norm, dy, Some(dx), &mut norms);

            let attention = kept.attention;
            let dattended = self.linear_backward(dx, attention.out, block.o, "attended");
            let dq = self.activation("q", shape.q_width());
            let dk = self.activation("k", shape.kv_width());
            let dv = self.activation("v", shape.kv_width());
            self.p.ops.push(Op::AttentionBackward(AttentionBackward {
                q: attention.q,
                k: attention.k,
                v: attention.v,
                first_key,
                out: attention.out,
                lse: attention.lse.expect("the forward over sequences saves its log-sum-exp"),
                dout: dattended,
                shape,
                dq,
                dk,
                dv,
            }));
            let dqkv = self.activation("qkv", shape.qkv_width());
            let frequencies = self.rope_frequencies.clone();
            self.p.ops.push(Op::RopeBackward(RopeBackward {
                dq,
                dk,
                dv,
                frequencies,
                shape,
                dqkv,
            }));
            let dy = self.linear_backward(dqkv, kept.attention_norm.y, block.qkv, "attention norm");
            let norm = kept.attention_norm;
            dx = self.norm_backward(norm, block.input_norm, dy, Some(dx), &mut norms);
        }
        self.scope.clear();
        self.complete_norms(&mut norms);
        let table = self.layout.embedding;
        self.p.ops.push(Op::EmbeddingBackward(EmbeddingBackward { ids, dout: dx, table }));
    }

    /// The activations of a block, some of them computed again from those that the forward kept.
    fn recomputed(
        &mut self,
        recompute: Recompute,
        saved: SavedBlock,
        block: &BlockParams,
        first_key: Buffer,
        layer: usize,
    ) -> SavedBlock {
        self.scope = format!("layer {layer} recomputed ");
        match recompute {
            Recompute::None => saved,
            Recompute::Mlp => SavedBlock { mlp: self.mlp(saved.mlp_norm.y, block), ..saved },
            // From the sum that the forward normalized, so that nothing is rounded otherwise.
            Recompute::Block => {
                let keys = KeySource::Sequence { first_key };
                self.block(saved.attention_norm.x, None, block, keys, layer)
            }
        }
    }

    /// Both gradients of `y = x wT`; returns dx.
    fn linear_backward(&mut self, dy: Buffer, x: Buffer, w: Span, name: &str) -> Buffer {
        let rows = self.rows();
        self.p.ops.push(Op::LinearBackwardWeight(LinearBackwardWeight { dy, x, w, rows }));
        let dx = self.activation(name, w.cols);
        self.p.ops.push(Op::LinearBackwardInput(LinearBackwardInput { dy, w, dx, rows }));
        dx
    }

    fn norm_backward(
        &mut self,
        saved: SavedNorm,
        weight: Span,
        dy: Buffer,
        dsum: Option<Buffer>,
        norms: &mut NormGroups,
    ) -> Buffer {
        let dx = self.activation("sum", self.config.hidden_size);
        let len = norms.per_group * self.norm_partials_len();
        let group = norms.open.get_or_insert_with(|| NormGroup {
            partials: self.statistic("norm weight partial sums", len),
            weights: Vec::with_capacity(norms.per_group),
        });
        let (partials, index) = (group.partials, group.weights.len());
        group.weights.push(weight);
        let is_full = group.weights.len() == norms.per_group;
        let SavedNorm { x, rstd, .. } = saved;
        let op = RmsNormBackward { x, rstd, weight, dy, dsum, dx, partials, index };
        self.p.ops.push(Op::RmsNormBackward(op));
        if is_full {
            self.complete_norms(norms);
        }
        dx
    }

    /// Partial sums of the weight gradient of one norm, in elements.
    fn norm_partials_len(&self) -> usize {
        norm_partials(self.rows(), self.config.hidden_size) * self.config.hidden_size
    }

    fn norm_groups(&self) -> NormGroups {
        let norms = 2 * self.layout.blocks.len() + 1;
        let most = (MAX_WAITING_PARTIAL_BYTES / (4 * self.norm_partials_len())).max(1);
        NormGroups { per_group: norms.div_ceil(norms.div_ceil(most)), open: None }
    }

    fn complete_norms(&mut self, norms: &mut NormGroups) {
        if let Some(NormGroup { partials, weights }) = norms.open.take() {
            let op = RmsNormBackwardWeight { weights, partials, rows: self.rows() };
            self.p.ops.push(Op::RmsNormBackwardWeight(op));
        }
    }
}
