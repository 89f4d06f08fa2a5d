//! The forward pass: embedding, blocks, final norm. It returns the activations that backward reads.

use std::sync::Arc;

use super::buffer::{Buffer, BufferKind, BufferRole};
use super::ops::{
    Attention, AttentionDecode, AttentionShape, Embedding, Linear, Op, ResidualAdd, RmsNorm, Rope,
    SwiGlu,
};
use super::program::Program;
use crate::model::{BlockParams, Config, Layout, Span};

/// Builder of a program for one model and one batch shape.
pub(super) struct Builder<'a> {
    pub p: Program,
    pub config: &'a Config,
    pub layout: &'a Layout,
    pub shape: AttentionShape,
    /// One table for all ops.
    pub rope_frequencies: Arc<[f64]>,
    /// Prefix of buffer names: `layer 3 `.
    pub scope: String,
}

/// The source of attention's keys and values.
#[derive(Clone, Copy)]
pub(super) enum KeySource {
    /// The sequences themselves, from position `first_key` on.
    Sequence { first_key: Buffer },
    /// The KV cache of `capacity` positions, of which `start` are filled.
    Cache { start: Buffer, capacity: usize },
}

/// Activations of one block that its backward reads.
#[derive(Clone, Copy)]
pub(super) struct SavedBlock {
    pub attention_norm: SavedNorm,
    pub attention: SavedAttention,
    pub mlp_norm: SavedNorm,
    pub mlp: SavedMlp,
}

#[derive(Clone, Copy)]
pub(super) struct SavedAttention {
    pub q: Buffer,
    pub k: Buffer,
    pub v: Buffer,
    pub out: Buffer,
    pub lse: Option<Buffer>,
}

#[derive(Clone, Copy)]
pub(super) struct SavedMlp {
    pub gate_up: Buffer,
    pub activated: Buffer,
}

#[derive(Clone, Copy)]
pub(super) struct SavedNorm {
    /// The sum that was normalized.
    pub x: Buffer,
    pub rstd: Buffer,
    pub y: Buffer,
}

/// Activations that backward reads.
pub(super) struct SavedActivations {
    pub blocks: Vec<SavedBlock>,
    pub final_norm: SavedNorm,
}

impl<'a> Builder<'a> {
    pub fn new(config: &'a Config, layout: &'a Layout, batch: usize, seq_len: usize) -> Self {
        let shape = AttentionShape {
            batch,
            seq_len,
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
        };
        let rope_frequencies = config.rope_frequencies().into();
        Self {
            p: Program::default(),
            config,
            layout,
            shape,
            rope_frequencies,
            scope: String::new(),
        }
    }

    pub fn rows(&self) -> usize {
        self.shape.rows()
    }

    /// An activation, `[rows, width]`.
    pub fn activation(&mut self, name: &str, width: usize) -> Buffer {
        let name = format!("{}{name}", self.scope);
        self.p.buffer(name, BufferKind::Activation, self.rows() * width, BufferRole::Temporary)
    }

    /// A statistic in f32.
    pub fn statistic(&mut self, name: &str, len: usize) -> Buffer {
        self.p.buffer(
            format!("{}{name}", self.scope),
            BufferKind::Float,
            len,
            BufferRole::Temporary,
        )
    }

    /// `len` indices, given by the caller.
    pub fn index(&mut self, name: &str, len: usize) -> Buffer {
        self.p.buffer(name, BufferKind::Index, len, BufferRole::Input)
    }

    fn embedding(&mut self, ids: Buffer) -> Buffer {
        let out = self.activation("embedded", self.config.hidden_size);
        self.p.ops.push(Op::Embedding(Embedding { ids, table: self.layout.embedding, out }));
        out
    }

    /// RMSNorm of `x`, or of `x + residual`.
    fn norm(&mut self, x: Buffer, residual: Option<Buffer>, weight: Span, name: &str) -> SavedNorm {
        let hidden = self.config.hidden_size;
        let add = residual.map(|residual| ResidualAdd {
            residual,
            sum: self.activation(&format!("{name} sum"), hidden),
        });
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
        let frequencies = self.rope_frequencies.clone();
        self.p.ops.push(Op::Rope(Rope { qkv, start, positions, frequencies, shape, q, k, v }));
        [q, k, v]
    }

    fn swiglu(&mut self, gate_up: Buffer) -> Buffer {
        let inter = self.config.intermediate_size;
        let out = self.activation("activated", inter);
        self.p.ops.push(Op::SwiGlu(SwiGlu { gate_up, inter, out }));
        out
    }

    /// Everything up to the LM head.
    pub fn forward(&mut self, ids: Buffer, keys: KeySource) -> SavedActivations {
        let mut blocks = Vec::with_capacity(self.layout.blocks.len());
        let mut residual = None;
        let mut x = self.embedding(ids);
        for (layer, block) in self.layout.blocks.iter().enumerate() {
            self.scope = format!("layer {layer} ");
            let saved = self.block(x, residual, block, keys, layer);
            x = self.linear(saved.mlp.activated, block.down, "mlp out");
            residual = Some(saved.mlp_norm.x);
            blocks.push(saved);
        }
        self.scope.clear();
        let final_norm = self.norm(x, residual, self.layout.final_norm, "final norm");
        SavedActivations { blocks, final_norm }
    }

    /// A block up to the input of its last matmul.
    pub fn block(
        &mut self,
        x: Buffer,
        residual: Option<Buffer>,
        block: &BlockParams,
        keys: KeySource,
        layer: usize,
    ) -> SavedBlock {
        let attention_norm = self.norm(x, residual, block.input_norm, "attention norm");
        let qkv = self.linear(attention_norm.y, block.qkv, "qkv");
        let attention = self.attention(qkv, keys, layer);
        let projected = self.linear(attention.out, block.o, "attention out");
        let mlp_norm = self.norm(projected, Some(attention_norm.x), block.post_norm, "mlp norm");
        let mlp = self.mlp(mlp_norm.y, block);
        SavedBlock { attention_norm, attention, mlp_norm, mlp }
    }

    /// The MLP up to the input of its last matmul.
    pub fn mlp(&mut self, x: Buffer, block: &BlockParams) -> SavedMlp {
        let gate_up = self.linear(x, block.gate_up, "gate and up");
        let activated = self.swiglu(gate_up);
        SavedMlp { gate_up, activated }
    }

    fn attention(&mut self, qkv: Buffer, keys: KeySource, layer: usize) -> SavedAttention {
        let shape = self.shape;
        match keys {
            KeySource::Sequence { first_key } => {
                let [q, k, v] = self.rope(qkv, None, shape.seq_len);
                let out = self.activation("attended", shape.q_width());
                let lse = self.statistic("log-sum-exp", shape.rows() * shape.heads);
                self.p.ops.push(Op::Attention(Attention { q, k, v, first_key, shape, out, lse }));
                SavedAttention { q, k, v, out, lse: Some(lse) }
            }
            KeySource::Cache { start, capacity } => {
                let [q, k, v] = self.rope(qkv, Some(start), capacity);
                let out = self.activation("attended", shape.q_width());
                let plane = shape.batch * shape.kv_width() * capacity;
                self.p.ops.push(Op::AttentionDecode(AttentionDecode {
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
                SavedAttention { q, k, v, out, lse: None }
            }
        }
    }
}
