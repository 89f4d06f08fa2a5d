//! The programs: a micro-batch of a training step, an evaluation, and decoding.

use super::backward::Recompute;
use super::buffer::{Buffer, BufferKind, BufferRole};
use super::forward::{Builder, KeySource, SavedActivations};
use super::ops::{FusedLinearCrossEntropy, GatherRows, Linear, Op};
use super::program::Program;
use crate::model::{Config, Layout};

/// Forward and backward of a micro-batch; gradients accumulate.
#[derive(Clone, Debug)]
pub struct MicroBatch {
    /// Forward and backward.
    pub program: Program,
    /// Its inputs.
    pub inputs: BatchInputs,
    /// Its results.
    pub losses: Losses,
}

/// Forward of a batch.
#[derive(Clone, Debug)]
pub struct Evaluation {
    /// Forward and loss.
    pub program: Program,
    /// Its inputs.
    pub inputs: BatchInputs,
    /// Its results.
    pub losses: Losses,
}

/// The input buffers of a batch, each `[batch, seq_len]`.
#[derive(Clone, Copy, Debug)]
pub struct BatchInputs {
    /// Token ids, `[batch, seq_len]`.
    pub ids: Buffer,
    /// Target ids, `[batch, seq_len]`.
    pub targets: Buffer,
    /// First visible key position of each row, `[batch, seq_len]`.
    pub first_key: Buffer,
}

impl BatchInputs {
    /// Binds a batch's ids, targets and first keys to the buffers.
    pub fn bind<'a>(&self, [ids, targets, first_key]: [&'a [u32]; 3]) -> Vec<(Buffer, &'a [u32])> {
        vec![(self.ids, ids), (self.targets, targets), (self.first_key, first_key)]
    }
}

/// The output buffers of a batch, each `[batch, seq_len]`.
#[derive(Clone, Copy, Debug)]
pub struct Losses {
    /// Negative log-likelihood of the target; 0 if it is ignored.
    pub nll: Buffer,
    /// The most probable token.
    pub argmax: Buffer,
}

/// Prefill or decode of a batch with a KV cache.
#[derive(Clone, Debug)]
pub struct Decoding {
    /// Forward of new positions over a KV cache.
    pub program: Program,
    /// `[batch, seq_len]`: the new tokens, right-padded with any id.
    pub ids: Buffer,
    /// `[batch]`: tokens of each sequence in the cache already.
    pub start: Buffer,
    /// `[batch]`: the new position of each sequence whose logits are returned.
    pub position: Buffer,
    /// `[batch, vocab]`
    pub logits: Buffer,
    /// Length of the cache arena in elements.
    pub cache_len: usize,
}

fn head(b: &mut Builder, x: Buffer, targets: Buffer, gradient: bool) -> (Losses, Option<Buffer>) {
    let rows = b.rows();
    let nll = b.p.buffer("nll", BufferKind::Float, rows, BufferRole::Output);
    let argmax = b.p.buffer("argmax", BufferKind::Index, rows, BufferRole::Output);
    let dx = gradient.then(|| b.activation("d final norm", b.config.hidden_size));
    let w = b.layout.head;
    let op = FusedLinearCrossEntropy { x, w, targets, rows, nll, argmax, dx };
    b.p.ops.push(Op::FusedLinearCrossEntropy(op));
    (Losses { nll, argmax }, dx)
}

fn batch_forward<'a>(
    config: &'a Config,
    layout: &'a Layout,
    batch: usize,
    seq_len: usize,
) -> (Builder<'a>, BatchInputs, SavedActivations) {
    let mut b = Builder::new(config, layout, batch, seq_len);
    let rows = b.rows();
    let ids = b.index("ids", rows);
    let targets = b.index("targets", rows);
    let first_key = b.index("first key", rows);
    let saved = b.forward(ids, KeySource::Sequence { first_key });
    (b, BatchInputs { ids, targets, first_key }, saved)
}

/// Forward and backward of `batch` sequences of `seq_len` tokens.
pub fn training(
    config: &Config,
    layout: &Layout,
    batch: usize,
    seq_len: usize,
    recompute: Recompute,
) -> MicroBatch {
    let (mut b, inputs, saved) = batch_forward(config, layout, batch, seq_len);
    let (losses, dx) = head(&mut b, saved.final_norm.y, inputs.targets, true);
    let dx = dx.expect("gradients were requested");
    b.backward(&saved, inputs.ids, inputs.first_key, dx, recompute);
    MicroBatch { program: b.p, inputs, losses }
}

/// Forward of `batch` sequences of `seq_len` tokens.
pub fn evaluation(config: &Config, layout: &Layout, batch: usize, seq_len: usize) -> Evaluation {
    let (mut b, inputs, saved) = batch_forward(config, layout, batch, seq_len);
    let (losses, _) = head(&mut b, saved.final_norm.y, inputs.targets, false);
    Evaluation { program: b.p, inputs, losses }
}

/// `seq_len` new tokens of each of `batch` sequences, with a KV cache of `capacity` positions.
pub fn decoding(
    config: &Config,
    layout: &Layout,
    batch: usize,
    seq_len: usize,
    capacity: usize,
) -> Decoding {
    // A multiple of every SIMD width.
    let capacity = capacity.next_multiple_of(64);
    let mut b = Builder::new(config, layout, batch, seq_len);
    let ids = b.index("ids", batch * seq_len);
    let start = b.index("start", batch);
    let position = b.index("position", batch);
    let saved = b.forward(ids, KeySource::Cache { start, capacity });

    let hidden = config.hidden_size;
    let last = b.p.buffer("last", BufferKind::Activation, batch * hidden, BufferRole::Temporary);
    b.p.ops.push(Op::GatherRows(GatherRows {
        x: saved.final_norm.y,
        position,
        batch,
        seq_len,
        out: last,
    }));
    let w = layout.head;
    let logits = b.p.buffer("logits", BufferKind::Float, batch * w.rows, BufferRole::Output);
    b.p.ops.push(Op::Linear(Linear { x: last, w, y: logits, rows: batch }));
    let cache_len = 2 * layout.blocks.len() * batch * b.shape.kv_width() * capacity;
    Decoding { program: b.p, ids, start, position, logits, cache_len }
}
