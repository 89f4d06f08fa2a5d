//! The forward pass: embedding, blocks, final norm. What the backward needs is handed on.

use super::ops::{
    Add, Attention, CachedAttention, Embed, Heads, Linear, Op, RmsNorm, Rope, SwiGlu,
};
use super::program::{Buffer, Element, Program, Use};
use crate::model::{Config, Layout, Span};

/// A program under construction for one model and one shape of windows.
pub(super) struct Builder<'a> {
    pub p: Program,
    pub config: &'a Config,
    pub layout: &'a Layout,
    pub shape: Heads,
    /// The prefix of the names of buffers: `layer 3 `.
    pub scope: String,
}

/// Where attention finds its keys.
#[derive(Clone, Copy)]
pub(super) enum Keys {
    /// In the windows themselves, from this first column on.
    Window { first_key: Buffer },
    /// In the cache, of so many columns, after what `start` says is there.
    Cache { start: Buffer, capacity: usize },
}

/// What one block hands to its backward.
pub(super) struct SavedBlock {
    pub attention_norm: SavedNorm,
    pub q: Buffer,
    pub k: Buffer,
    pub v: Buffer,
    pub attended: Buffer,
    pub lse: Option<Buffer>,
    pub mlp_norm: SavedNorm,
    pub gate_up: Buffer,
    pub activated: Buffer,
}

#[derive(Clone, Copy)]
pub(super) struct SavedNorm {
    /// The sum that was normalised.
    pub x: Buffer,
    pub rstd: Buffer,
    pub y: Buffer,
}

pub(super) struct Saved {
    pub blocks: Vec<SavedBlock>,
    pub final_norm: SavedNorm,
}

impl<'a> Builder<'a> {
    pub fn new(config: &'a Config, layout: &'a Layout, windows: usize, context: usize) -> Self {
        let shape = Heads {
            windows,
            context,
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
        };
        Self { p: Program::default(), config, layout, shape, scope: String::new() }
    }

    pub fn rows(&self) -> usize {
        self.shape.rows()
    }

    /// A buffer of the network, `[rows, width]`.
    pub fn activation(&mut self, name: &str, width: usize) -> Buffer {
        let name = format!("{}{name}", self.scope);
        self.p.buffer(name, Element::Activation, self.rows() * width, Use::Temporary)
    }

    /// A statistic in f32.
    pub fn statistic(&mut self, name: &str, len: usize) -> Buffer {
        self.p.buffer(format!("{}{name}", self.scope), Element::Float, len, Use::Temporary)
    }

    /// An index for each of `len` rows, given by the caller.
    pub fn index(&mut self, name: &str, len: usize) -> Buffer {
        self.p.buffer(name, Element::Index, len, Use::Input)
    }

    fn embed(&mut self, ids: Buffer) -> Buffer {
        let out = self.activation("embedded", self.config.hidden_size);
        self.p.ops.push(Op::Embed(Embed { ids, table: self.layout.embedding, out }));
        out
    }

    /// The norm of `x`, or of `x + residual`.
    fn norm(&mut self, x: Buffer, residual: Option<Buffer>, weight: Span, name: &str) -> SavedNorm {
        let hidden = self.config.hidden_size;
        let add = residual
            .map(|residual| Add { residual, sum: self.activation(&format!("{name} sum"), hidden) });
        let y = self.activation(name, hidden);
        let rstd = self.statistic(&format!("{name} rstd"), self.rows());
        let eps = self.config.rms_norm_eps;
        self.p.ops.push(Op::RmsNorm(RmsNorm { x, add, weight, eps, y, rstd }));
        SavedNorm { x: add.map_or(x, |add| add.sum), rstd, y }
    }

    fn linear(&mut self, x: Buffer, w: Span, name: &str) -> Buffer {
        let y = self.activation(name, w.rows);
        self.p.ops.push(Op::Linear(Linear { x, w, y, rows: self.rows() }));
        y
    }

    fn rope(&mut self, qkv: Buffer, start: Option<Buffer>, positions: usize) -> [Buffer; 3] {
        let shape = self.shape;
        let q = self.activation("q", shape.q_width());
        let k = self.activation("k", shape.kv_width());
        let v = self.activation("v", shape.kv_width());
        let frequencies = self.config.rope_frequencies();
        self.p.ops.push(Op::Rope(Rope { qkv, start, positions, frequencies, shape, q, k, v }));
        [q, k, v]
    }

    fn swiglu(&mut self, gate_up: Buffer) -> Buffer {
        let inter = self.config.intermediate_size;
        let out = self.activation("activated", inter);
        self.p.ops.push(Op::SwiGlu(SwiGlu { gate_up, inter, out }));
        out
    }

    /// Everything up to the head.
    pub fn forward(&mut self, ids: Buffer, keys: Keys) -> Saved {
        let mut blocks = Vec::with_capacity(self.layout.blocks.len());
        let mut residual = None;
        let mut x = self.embed(ids);
        for (layer, block) in self.layout.blocks.iter().enumerate() {
            self.scope = format!("layer {layer} ");
            let attention_norm = self.norm(x, residual, block.input_norm, "attention norm");
            let qkv = self.linear(attention_norm.y, block.qkv, "qkv");
            let (q, k, v, attended, lse) = self.attend(qkv, keys, layer);
            let projected = self.linear(attended, block.o, "attention out");

            let mlp_norm =
                self.norm(projected, Some(attention_norm.x), block.post_norm, "mlp norm");
            let gate_up = self.linear(mlp_norm.y, block.gate_up, "gate and up");
            let activated = self.swiglu(gate_up);
            x = self.linear(activated, block.down, "mlp out");
            residual = Some(mlp_norm.x);
            blocks.push(SavedBlock {
                attention_norm,
                q,
                k,
                v,
                attended,
                lse,
                mlp_norm,
                gate_up,
                activated,
            });
        }
        self.scope.clear();
        let final_norm = self.norm(x, residual, self.layout.final_norm, "final norm");
        Saved { blocks, final_norm }
    }

    fn attend(
        &mut self,
        qkv: Buffer,
        keys: Keys,
        layer: usize,
    ) -> (Buffer, Buffer, Buffer, Buffer, Option<Buffer>) {
        let shape = self.shape;
        match keys {
            Keys::Window { first_key } => {
                let [q, k, v] = self.rope(qkv, None, shape.context);
                let out = self.activation("attended", shape.q_width());
                let lse = self.statistic("log-sum-exp", shape.rows() * shape.heads);
                self.p.ops.push(Op::Attention(Attention { q, k, v, first_key, shape, out, lse }));
                (q, k, v, out, Some(lse))
            }
            Keys::Cache { start, capacity } => {
                let [q, k, v] = self.rope(qkv, Some(start), capacity);
                let out = self.activation("attended", shape.q_width());
                let plane = shape.windows * shape.kv_width() * capacity;
                self.p.ops.push(Op::CachedAttention(CachedAttention {
                    q,
                    k,
                    v,
                    start,
                    shape,
                    keys: 2 * layer * plane,
                    values: (2 * layer + 1) * plane,
                    capacity,
                    out,
                }));
                (q, k, v, out, None)
            }
        }
    }
}
