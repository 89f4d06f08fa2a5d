//! The programs: part of a training step, an evaluation, and decoding.

use super::forward::{Builder, Keys};
use super::ops::{HeadLoss, Linear, Op, PickRows};
use super::program::{Buffer, Element, Program, Use};
use crate::model::{Config, Layout};
use crate::tokens::Batch;

/// Forward and backward of a few windows; gradients accumulate.
#[derive(Clone, Debug)]
pub struct Micro {
    pub program: Program,
    pub batch: BatchInputs,
    pub losses: Losses,
}

/// Forward of a few windows.
#[derive(Clone, Debug)]
pub struct Evaluation {
    pub program: Program,
    pub batch: BatchInputs,
    pub losses: Losses,
}

/// Where a program wants its batch, each `[windows, context]`.
#[derive(Clone, Copy, Debug)]
pub struct BatchInputs {
    pub ids: Buffer,
    pub targets: Buffer,
    pub first_key: Buffer,
}

impl BatchInputs {
    /// A batch as the program's inputs.
    pub fn feed<'a>(&self, batch: &'a Batch) -> Vec<(Buffer, &'a [u32])> {
        vec![
            (self.ids, batch.ids.as_slice()),
            (self.targets, batch.targets.as_slice()),
            (self.first_key, batch.first_key.as_slice()),
        ]
    }
}

/// Where a program leaves each position's loss and best guess, `[windows, context]`.
#[derive(Clone, Copy, Debug)]
pub struct Losses {
    pub nll: Buffer,
    pub argmax: Buffer,
}

/// New tokens of a few windows against their cache.
#[derive(Clone, Debug)]
pub struct Decoding {
    pub program: Program,
    /// `[windows, context]`: the new tokens, padded on the right with anything.
    pub ids: Buffer,
    /// `[windows]`: how many tokens of each window the cache holds already.
    pub start: Buffer,
    /// `[windows]`: which of the new columns the logits are wanted for.
    pub column: Buffer,
    /// `[windows, vocab]`
    pub logits: Buffer,
    /// The length of the cache arena it needs.
    pub cache: usize,
}

fn head(b: &mut Builder, x: Buffer, targets: Buffer, gradient: bool) -> (Losses, Option<Buffer>) {
    let rows = b.rows();
    let nll = b.p.buffer("nll", Element::Float, rows, Use::Output);
    let argmax = b.p.buffer("argmax", Element::Index, rows, Use::Output);
    let dx = gradient.then(|| b.activation("d final norm", b.config.hidden_size));
    let w = b.layout.head;
    b.p.ops.push(Op::HeadLoss(HeadLoss { x, w, targets, rows, nll, argmax, dx }));
    (Losses { nll, argmax }, dx)
}

fn windows_forward<'a>(
    config: &'a Config,
    layout: &'a Layout,
    windows: usize,
    context: usize,
) -> (Builder<'a>, BatchInputs, super::forward::Saved) {
    let mut b = Builder::new(config, layout, windows, context);
    let rows = b.rows();
    let ids = b.index("ids", rows);
    let targets = b.index("targets", rows);
    let first_key = b.index("first key", rows);
    let saved = b.forward(ids, Keys::Window { first_key });
    (b, BatchInputs { ids, targets, first_key }, saved)
}

/// Forward and backward of `windows` windows of `context` tokens.
pub fn training(config: &Config, layout: &Layout, windows: usize, context: usize) -> Micro {
    let (mut b, batch, saved) = windows_forward(config, layout, windows, context);
    let (losses, dx) = head(&mut b, saved.final_norm.y, batch.targets, true);
    let dx = dx.expect("the gradient was asked for");
    b.backward(&saved, batch.ids, batch.first_key, dx);
    Micro { program: b.p, batch, losses }
}

/// Forward of `windows` windows of `context` tokens.
pub fn evaluation(config: &Config, layout: &Layout, windows: usize, context: usize) -> Evaluation {
    let (mut b, batch, saved) = windows_forward(config, layout, windows, context);
    let (losses, _) = head(&mut b, saved.final_norm.y, batch.targets, false);
    Evaluation { program: b.p, batch, losses }
}

/// `fresh` new tokens of each of `windows` windows, against a cache of `capacity` columns.
pub fn decoding(
    config: &Config,
    layout: &Layout,
    windows: usize,
    fresh: usize,
    capacity: usize,
) -> Decoding {
    // Whole vectors on any machine.
    let capacity = capacity.next_multiple_of(64);
    let mut b = Builder::new(config, layout, windows, fresh);
    let ids = b.index("ids", windows * fresh);
    let start = b.index("start", windows);
    let column = b.index("column", windows);
    let saved = b.forward(ids, Keys::Cache { start, capacity });

    let hidden = config.hidden_size;
    let last = b.p.buffer("last", Element::Activation, windows * hidden, Use::Temporary);
    b.p.ops.push(Op::PickRows(PickRows {
        x: saved.final_norm.y,
        column,
        windows,
        context: fresh,
        out: last,
    }));
    let w = layout.head;
    let logits = b.p.buffer("logits", Element::Float, windows * w.rows, Use::Output);
    b.p.ops.push(Op::Linear(Linear { x: last, w, y: logits, rows: windows }));
    let cache = 2 * layout.blocks.len() * windows * b.shape.kv_width() * capacity;
    Decoding { program: b.p, ids, start, column, logits, cache }
}
