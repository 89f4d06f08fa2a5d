//! Layout of the flat arena that parameters, gradients and moments share.

use super::Config;

/// Kind of a parameter: decides its initial value, weight decay and optimizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParamKind {
    /// `[vocab, hidden]`; also the LM head if tied.
    Embedding,
    /// LM head `[vocab, hidden]`, if not tied.
    Head,
    /// A matrix inside a block: `[out, in]`.
    Matrix,
    /// An RMSNorm's scale: `[hidden]`.
    Norm,
}

/// A run of the arena read as a row-major matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// First element in the arena.
    pub offset: usize,
    /// Rows.
    pub rows: usize,
    /// Columns; 1 for a vector.
    pub cols: usize,
}

impl Span {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.rows * self.cols
    }

    /// True without elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Elements of the arena.
    pub fn range(&self) -> std::ops::Range<usize> {
        self.offset..self.offset + self.len()
    }
}

/// A parameter under its Hugging Face name. A vector has one row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// Hugging Face name.
    pub name: String,
    /// Kind, which the optimizer goes by.
    pub kind: ParamKind,
    /// Place in the arena.
    pub span: Span,
}

impl Parameter {
    /// The shape as Hugging Face stores it.
    pub fn shape(&self) -> Vec<usize> {
        match self.kind {
            ParamKind::Norm => vec![self.span.cols],
            _ => vec![self.span.rows, self.span.cols],
        }
    }
}

/// Parameters of one transformer block; matrices that read the same input are fused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockParams {
    /// `[1, hidden]`
    pub input_norm: Span,
    /// `[(heads + 2 * kv_heads) * head_dim, hidden]`: the rows of q, then k, then v.
    pub qkv: Span,
    /// `[hidden, heads * head_dim]`
    pub o: Span,
    /// `[1, hidden]`
    pub post_norm: Span,
    /// `[2 * intermediate, hidden]`: the rows of gate, then up.
    pub gate_up: Span,
    /// `[hidden, intermediate]`
    pub down: Span,
}

/// Offsets of all parameters. Fused groups start at multiples of [`Layout::ALIGN`] elements; the
/// elements between them are zero and stay zero (their gradient is).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Every parameter, in the order of the arena.
    pub parameters: Vec<Parameter>,
    /// `[vocab, hidden]`
    pub embedding: Span,
    /// Parameters of each block.
    pub blocks: Vec<BlockParams>,
    /// `[1, hidden]`
    pub final_norm: Span,
    /// `[vocab, hidden]`: the embedding itself if tied.
    pub head: Span,
    /// The length of an arena, in elements.
    pub len: usize,
}

impl Layout {
    /// 64 elements: 16-byte accesses stay aligned in every type an arena may hold.
    pub const ALIGN: usize = 64;

    /// Layout of a model's parameters.
    pub fn new(config: &Config) -> Self {
        let mut build = LayoutBuilder { parameters: Vec::new(), next: 0 };
        let (hidden, inter) = (config.hidden_size, config.intermediate_size);
        let q = config.num_attention_heads * config.head_dim;
        let kv = config.num_key_value_heads * config.head_dim;
        let table = (config.vocab_size, hidden);

        let embedding = build.group(&[("model.embed_tokens.weight", ParamKind::Embedding, table)]);
        let blocks = (0..config.num_hidden_layers)
            .map(|layer| {
                let at = |name: &str| format!("model.layers.{layer}.{name}.weight");
                let norm = (1, hidden);
                let one = |build: &mut LayoutBuilder, name, kind, shape| {
                    build.group(&[(at(name).as_str(), kind, shape)])
                };
                BlockParams {
                    input_norm: one(&mut build, "input_layernorm", ParamKind::Norm, norm),
                    qkv: build.group(&[
                        (at("self_attn.q_proj").as_str(), ParamKind::Matrix, (q, hidden)),
                        (at("self_attn.k_proj").as_str(), ParamKind::Matrix, (kv, hidden)),
                        (at("self_attn.v_proj").as_str(), ParamKind::Matrix, (kv, hidden)),
                    ]),
                    o: one(&mut build, "self_attn.o_proj", ParamKind::Matrix, (hidden, q)),
                    post_norm: one(&mut build, "post_attention_layernorm", ParamKind::Norm, norm),
                    gate_up: build.group(&[
                        (at("mlp.gate_proj").as_str(), ParamKind::Matrix, (inter, hidden)),
                        (at("mlp.up_proj").as_str(), ParamKind::Matrix, (inter, hidden)),
                    ]),
                    down: one(&mut build, "mlp.down_proj", ParamKind::Matrix, (hidden, inter)),
                }
            })
            .collect();
        let final_norm = build.group(&[("model.norm.weight", ParamKind::Norm, (1, hidden))]);
        let head = if config.tie_word_embeddings {
            embedding
        } else {
            build.group(&[("lm_head.weight", ParamKind::Head, table)])
        };
        let len = build.next.next_multiple_of(Self::ALIGN);
        Self { parameters: build.parameters, embedding, blocks, final_norm, head, len }
    }

    /// Parameters of the model: the arena without its padding.
    pub fn parameter_count(&self) -> usize {
        self.parameters.iter().map(|p| p.span.len()).sum()
    }
}

struct LayoutBuilder {
    parameters: Vec<Parameter>,
    next: usize,
}

impl LayoutBuilder {
    /// Places parameters of equal width one after another and returns the span over them all.
    fn group(&mut self, members: &[(&str, ParamKind, (usize, usize))]) -> Span {
        let offset = self.next.next_multiple_of(Layout::ALIGN);
        let mut span = Span { offset, rows: 0, cols: members[0].2.1 };
        for &(name, kind, (rows, cols)) in members {
            let at = offset + span.len();
            let member = Span { offset: at, rows, cols };
            self.parameters.push(Parameter { name: name.to_string(), kind, span: member });
            span.rows += rows;
        }
        self.next = offset + span.len();
        span
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::config::tests::original;

    #[test]
    fn layout_matches_original_parameter_count() {
        let layout = Layout::new(&original());
        assert_eq!(layout.parameter_count(), 4_662_336);
        assert_eq!(layout.blocks[0].qkv.rows, 80);
    }
}
