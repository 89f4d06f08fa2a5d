//! Ops, at the granularity at which kernels fuse.
//!
//! Shapes: `rows` is batch x seq_len; `hidden`, `inter` (the MLP's width) and `vocab` are the model's.
//! Activations are assigned (=); parameter gradients accumulate (+=) at the parameter's offset in the
//! gradient arena. Sums accumulate in f32 or better.
//!
//! [`Op::cost`] counts useful work: the two-byte activations of mixed precision, each read or written
//! once.

use std::ops::Range;
use std::sync::Arc;

use super::buffer::Buffer;
use super::newton_schulz;
use super::slices::{Shards, SumOrder};
use crate::model::Span;

/// The shape of an attention: `batch` sequences of `seq_len` positions, grouped-query (GQA) if
/// `kv_heads` is below `heads`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    /// Sequences.
    pub batch: usize,
    /// Positions per sequence.
    pub seq_len: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads, each of which `heads / kv_heads` query heads share.
    pub kv_heads: usize,
    /// Components per head.
    pub head_dim: usize,
}

impl AttentionShape {
    /// Rows of all sequences: `batch * seq_len`.
    pub fn rows(&self) -> usize {
        self.batch * self.seq_len
    }
    /// Width of one row of the joined q, k and v.
    pub fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }
    /// Columns of all query heads: `heads * head_dim`.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }
    /// Columns of all key/value heads: `kv_heads * head_dim`.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }
    /// Query heads per key/value head.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }
    /// Query-key pairs under the causal mask.
    fn pairs(&self) -> usize {
        self.batch * self.heads * self.seq_len * (self.seq_len + 1) / 2
    }
}

/// `out[r] = table[ids[r]]`.
#[derive(Clone, Debug)]
pub struct Embedding {
    /// Token ids, `[rows]`.
    pub ids: Buffer,
    /// Embedding matrix, `[vocab, hidden]`.
    pub table: Span,
    /// `[rows, hidden]`
    pub out: Buffer,
}

/// `dtable[ids[r]] += dout[r]`, in the order of the rows.
#[derive(Clone, Debug)]
pub struct EmbeddingBackward {
    /// Token ids, `[rows]`.
    pub ids: Buffer,
    /// Gradient of the output, `[rows, hidden]`.
    pub dout: Buffer,
    /// Embedding matrix, whose gradient is accumulated.
    pub table: Span,
}

/// `sum = x + residual` (or `sum` is `x` itself), `y = sum * rstd * weight`,
/// `rstd = 1 / sqrt(mean(sum^2) + eps)`. Zhang & Sennrich 2019.
#[derive(Clone, Debug)]
pub struct RmsNorm {
    /// `[rows, hidden]`
    pub x: Buffer,
    /// The residual that is added first.
    pub add: Option<ResidualAdd>,
    /// Weight, `[hidden]`.
    pub weight: Span,
    /// Addend of the mean of squares.
    pub eps: f64,
    /// `[rows, hidden]`
    pub y: Buffer,
    /// `[rows]`
    pub rstd: Buffer,
}

/// The addition fused into [`RmsNorm`]: `sum = x + residual`.
#[derive(Clone, Copy, Debug)]
pub struct ResidualAdd {
    /// Residual stream, `[rows, hidden]`.
    pub residual: Buffer,
    /// `x + residual`, `[rows, hidden]`.
    pub sum: Buffer,
}

/// `g = dy * weight`, `dx = dsum + rstd * (g - n * mean(g * n))` with `n = x * rstd`;
/// `dweight += sum over rows of dy * n`, of which a backend may keep partial sums in `partials` until
/// [`RmsNormBackwardWeight`] adds them. `x` is the sum that was normalized, `dsum` its gradient from the
/// residual stream.
#[derive(Clone, Debug)]
pub struct RmsNormBackward {
    /// Input of the forward, `[rows, hidden]`.
    pub x: Buffer,
    /// `1 / sqrt(mean square + eps)` of the forward, `[rows]`.
    pub rstd: Buffer,
    /// Weight, whose gradient is accumulated.
    pub weight: Span,
    /// Gradient of the output, `[rows, hidden]`.
    pub dy: Buffer,
    /// Gradient of the residual sum, which is added to dx.
    pub dsum: Option<Buffer>,
    /// Gradient of the input, `[rows, hidden]`.
    pub dx: Buffer,
    /// Partial sums of the weight gradients of several norms, `[norms, norm_partials, hidden]`.
    pub partials: Buffer,
    /// Index of this norm among them.
    pub index: usize,
}

/// Completes the weight gradients of the norms that share `partials`: one launch on a device.
#[derive(Clone, Debug)]
pub struct RmsNormBackwardWeight {
    /// The weights, in the order of their partial sums.
    pub weights: Vec<Span>,
    /// Partial sums, `[norms, norm_partials, hidden]`.
    pub partials: Buffer,
    /// Rows of each norm.
    pub rows: usize,
}

/// Largest number of partial sums of a norm's weight gradient: eight blocks for each of 132 SMs.
pub const MAX_NORM_PARTIALS: usize = 1056;

/// Most partial sums of a norm's weight gradient, in any compute dtype: a block of 256 threads adds the
/// rows that fit into it side by side, at four columns per thread, or one if 16 bytes do not divide a row.
pub fn norm_partials(rows: usize, hidden: usize) -> usize {
    let columns = if hidden.is_multiple_of(8) { 4 } else { 1 };
    let threads = (hidden / columns).next_power_of_two().min(256);
    rows.div_ceil(256 / threads).min(MAX_NORM_PARTIALS)
}

/// `y = x wT`: `[rows, in]` times `[out, in]` transposed.
#[derive(Clone, Debug)]
pub struct Linear {
    /// Input, `[rows, in]`.
    pub x: Buffer,
    /// Weight, `[out, in]`.
    pub w: Span,
    /// Output, `[rows, out]`.
    pub y: Buffer,
    /// Rows of x and y.
    pub rows: usize,
}

/// `dx = dy w`.
#[derive(Clone, Debug)]
pub struct LinearBackwardInput {
    /// Gradient of the output, `[rows, out]`.
    pub dy: Buffer,
    /// Weight, `[out, in]`.
    pub w: Span,
    /// Gradient of the input, `[rows, in]`.
    pub dx: Buffer,
    /// Rows of dy and dx.
    pub rows: usize,
}

/// `dw += dyT x`.
#[derive(Clone, Debug)]
pub struct LinearBackwardWeight {
    /// Gradient of the output, `[rows, out]`.
    pub dy: Buffer,
    /// Input of the forward, `[rows, in]`.
    pub x: Buffer,
    /// Weight, whose gradient is accumulated.
    pub w: Span,
    /// Rows of dy and x.
    pub rows: usize,
}

/// Splits the joined rows `[rows, qkv_width]` into `q [batch, heads, seq_len, head_dim]` and
/// `k`, `v [batch, kv_heads, seq_len, head_dim]`, and rotates each pair `(i, i + head_dim/2)` of q and
/// k by `position * frequencies[i]` radians. Su et al. 2021, in Hugging Face's half-split form.
#[derive(Clone, Debug)]
pub struct Rope {
    /// Packed rows of all heads, `[rows, q_width + 2 kv_width]`.
    pub qkv: Buffer,
    /// Position of the first row of each sequence, `[batch]`; 0 if `None`.
    pub start: Option<Buffer>,
    /// Upper bound of the positions, exclusive.
    pub positions: usize,
    /// Radians per position, `[head_dim / 2]`.
    pub frequencies: Arc<[f64]>,
    /// Shape of q, k and v.
    pub shape: AttentionShape,
    /// Rotated queries, `[batch, heads, seq_len, head_dim]`.
    pub q: Buffer,
    /// Rotated keys, `[batch, kv_heads, seq_len, head_dim]`.
    pub k: Buffer,
    /// Values, `[batch, kv_heads, seq_len, head_dim]`.
    pub v: Buffer,
}

/// Backward of [`Rope`]: rotates dq and dk by the opposite angle and joins them with dv.
#[derive(Clone, Debug)]
pub struct RopeBackward {
    /// Gradient of the rotated queries, `[batch, heads, seq_len, head_dim]`.
    pub dq: Buffer,
    /// Gradient of the rotated keys, `[batch, kv_heads, seq_len, head_dim]`.
    pub dk: Buffer,
    /// Gradient of the values, `[batch, kv_heads, seq_len, head_dim]`.
    pub dv: Buffer,
    /// Angle per position of each pair of components, as in the forward.
    pub frequencies: Arc<[f64]>,
    /// Shape of dq, dk and dv.
    pub shape: AttentionShape,
    /// Gradient of the packed rows, `[rows, q_width + 2 kv_width]`.
    pub dqkv: Buffer,
}

/// `out = softmax(q kT / sqrt(head_dim)) v` over the positions `first_key..=position`; a row that sees
/// none yields 0 with a log-sum-exp of 0. `out` is `[rows, heads * head_dim]`.
#[derive(Clone, Debug)]
pub struct Attention {
    /// Queries, `[batch, heads, seq_len, head_dim]`.
    pub q: Buffer,
    /// Keys, `[batch, kv_heads, seq_len, head_dim]`.
    pub k: Buffer,
    /// Values, `[batch, kv_heads, seq_len, head_dim]`.
    pub v: Buffer,
    /// First visible key position of each row, `[batch, seq_len]`.
    pub first_key: Buffer,
    /// Shape of q, k and v.
    pub shape: AttentionShape,
    /// Output, `[batch, seq_len, q_width]`.
    pub out: Buffer,
    /// Log-sum-exp of the scaled scores, natural logarithm: `[batch, heads, seq_len]`.
    pub lse: Buffer,
}

/// Backward of [`Attention`]. With `p = exp(s - lse)`: `dv = pT dout`, `ds = p * (dout vT - rowsum(dout * out))`,
/// `dq = ds k / sqrt(head_dim)`, `dk = dsT q / sqrt(head_dim)`; a key/value head sums over its
/// query heads. Dao et al. 2022.
#[derive(Clone, Debug)]
pub struct AttentionBackward {
    /// Queries of the forward.
    pub q: Buffer,
    /// Keys of the forward.
    pub k: Buffer,
    /// Values of the forward.
    pub v: Buffer,
    /// First visible key position of each row, `[batch, seq_len]`.
    pub first_key: Buffer,
    /// Output of the forward.
    pub out: Buffer,
    /// Log-sum-exp of the forward.
    pub lse: Buffer,
    /// Gradient of the output, `[batch, seq_len, q_width]`.
    pub dout: Buffer,
    /// Shape of q, k and v.
    pub shape: AttentionShape,
    /// Gradient of the queries, shaped as q.
    pub dq: Buffer,
    /// Gradient of the keys, shaped as k.
    pub dk: Buffer,
    /// Gradient of the values, shaped as v.
    pub dv: Buffer,
}

/// Attention over a KV cache: appends k and v at positions `start..start + seq_len` of each sequence's
/// cache, then lets position `start + t` see the positions `0..=start + t`.
#[derive(Clone, Debug)]
pub struct AttentionDecode {
    /// Queries of the new positions, `[batch, heads, seq_len, head_dim]`.
    pub q: Buffer,
    /// Keys of the new positions, `[batch, kv_heads, seq_len, head_dim]`.
    pub k: Buffer,
    /// Values of the new positions, `[batch, kv_heads, seq_len, head_dim]`.
    pub v: Buffer,
    /// Positions in the cache before the new ones, `[batch]`.
    pub start: Buffer,
    /// Shape of the new positions.
    pub shape: AttentionShape,
    /// Offset of this layer's keys in the cache arena, of `batch * kv_heads * capacity * head_dim`
    /// elements in the backend's own order.
    pub keys: usize,
    /// Offset of this layer's values, as many.
    pub values: usize,
    /// Positions per sequence that the cache holds.
    pub capacity: usize,
    /// Output, `[batch, seq_len, q_width]`.
    pub out: Buffer,
}

/// `out = silu(gate) * up` for the joined rows `[rows, 2 inter]` of gate, then up. Shazeer 2020.
#[derive(Clone, Debug)]
pub struct SwiGlu {
    /// Gate and up projections side by side, `[rows, 2 inter]`.
    pub gate_up: Buffer,
    /// Columns of the gate and of the up projection.
    pub inter: usize,
    /// Output, `[rows, inter]`.
    pub out: Buffer,
}

/// `dgate_up` from `dout`; recomputes the activation.
#[derive(Clone, Debug)]
pub struct SwiGluBackward {
    /// Input of the forward, `[rows, 2 inter]`.
    pub gate_up: Buffer,
    /// Gradient of the output, `[rows, inter]`.
    pub dout: Buffer,
    /// Columns of the gate and of the up projection.
    pub inter: usize,
    /// Gradient of the input, `[rows, 2 inter]`.
    pub dgate_up: Buffer,
}

/// LM head and cross-entropy in one op: with logits `z = x wT`, `nll = log-sum-exp(z) - z[target]` (0
/// if the target is ignored) and `argmax` of z. With `dx`, also the gradient of
/// `loss_scale * sum(nll)`: `dx = loss_scale * (softmax(z) - onehot) w` and
/// `dw += loss_scale * (softmax(z) - onehot)T x`. The logits of a whole batch are never materialized.
#[derive(Clone, Debug)]
pub struct FusedLinearCrossEntropy {
    /// `[rows, hidden]`
    pub x: Buffer,
    /// Weight of the LM head, `[vocab, hidden]`.
    pub w: Span,
    /// Target ids, `[rows]`.
    pub targets: Buffer,
    /// Rows of x.
    pub rows: usize,
    /// `[rows]`
    pub nll: Buffer,
    /// `[rows]`; the lowest id among equal largest logits.
    pub argmax: Buffer,
    /// Gradient of x, `[rows, hidden]`; none in evaluation.
    pub dx: Option<Buffer>,
}

/// One row of each sequence: `out[b] = x[b * seq_len + position[b]]`.
#[derive(Clone, Debug)]
pub struct GatherRows {
    /// Rows of all sequences, `[batch, seq_len, hidden]`.
    pub x: Buffer,
    /// Position of the row of each sequence, `[batch]`.
    pub position: Buffer,
    /// Sequences.
    pub batch: usize,
    /// Positions per sequence.
    pub seq_len: usize,
    /// Gathered rows, `[batch, hidden]`.
    pub out: Buffer,
}

/// Sets the gradient arena to zero.
#[derive(Clone, Debug)]
pub struct ZeroGrad;

/// `norm = sqrt(sum of squares of the gradient arena)`, summed in f64 in a fixed order.
#[derive(Clone, Debug)]
pub struct GradNorm {
    /// `[1]`
    pub norm: Buffer,
    /// In a step that is cut into slices: the sum is that of fixed runs of the arena, in order.
    pub runs: Option<NormRuns>,
}

/// The runs by which a gradient norm is summed.
#[derive(Clone, Debug)]
pub struct NormRuns {
    /// Shards, with the runs of each.
    pub shards: Arc<Shards>,
    /// This process has the gradients of its own shard only, and gets the sums of other runs from other
    /// ranks.
    pub own: bool,
}

/// `slot = gradients; gradients = 0`: keeps the gradients of a slice, or a sum of several.
#[derive(Clone, Debug)]
pub struct SaveGradients {
    /// Number of the slot.
    pub slot: usize,
}

/// `gradients = slot + gradients`.
#[derive(Clone, Debug)]
pub struct AddGradients {
    /// Number of the slot.
    pub slot: usize,
}

/// The gradients of this process's shard, summed over the subtrees of all ranks in `order`. Those of other
/// shards are left undefined.
#[derive(Clone, Debug)]
pub struct ReduceGradients {
    /// Shards of all ranks.
    pub shards: Arc<Shards>,
    /// Slots of this rank's subtrees, before the one that the gradients hold.
    pub slots: Vec<usize>,
    /// Order of the sum over the slices.
    pub order: SumOrder,
}

/// An arena whose shards come from the ranks that own them.
#[derive(Clone, Debug)]
pub struct GatherShards {
    /// Shards of all ranks.
    pub shards: Arc<Shards>,
    /// Arena that is gathered.
    pub arena: ShardedArena,
}

/// The arena of [`GatherShards`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShardedArena {
    /// Gradients, summed.
    Gradients,
    /// With their copies in the compute dtype.
    Parameters,
}

/// One AdamW step on ranges of the arena, gradients scaled by
/// `clip = min(1, max_grad_norm / (norm + 1e-6))`. Without effect if the norm is not finite.
///
/// `p -= lr * weight_decay * p`, `m += (1 - beta1) (g - m)`, `v = beta2 v + (1 - beta2) g^2`,
/// `p -= lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)`. Loshchilov & Hutter 2019,
/// in PyTorch's arithmetic.
#[derive(Clone, Debug)]
pub struct AdamWStep {
    /// Norm of the gradients, `[1]`.
    pub norm: Buffer,
    /// Norm above which gradients are scaled down.
    pub max_grad_norm: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Addend of the denominator.
    pub epsilon: f64,
    /// Ranges of the arena and the weight decay of each.
    pub ranges: Vec<(Range<usize>, f64)>,
}

/// One Muon step on matrices of one shape: `m = momentum m + g`, `u = g + momentum m`, u orthogonalized
/// by five Newton-Schulz iterations ([`newton_schulz`]), `w -= lr * weight_decay * w`,
/// `w -= lr * sqrt(max(1, rows / cols)) * u`. Jordan et al. 2024.
#[derive(Clone, Debug)]
pub struct MuonStep {
    /// Norm of the gradients, `[1]`.
    pub norm: Buffer,
    /// Norm above which gradients are scaled down.
    pub max_grad_norm: f64,
    /// Decay of the momentum.
    pub momentum: f64,
    /// Weight decay per unit of the learning rate.
    pub weight_decay: f64,
    /// At least one.
    pub matrices: Vec<Span>,
    /// Matmuls of several matrices at once. A library may choose another algorithm for another number of
    /// them, so ranks that share the matrices of a model step them one by one.
    pub batched: bool,
    /// The matrices of Newton-Schulz are in f16 if the compute dtype of a GPU has 16 bits.
    pub half: bool,
}

impl MuonStep {
    /// Rows and columns of each matrix.
    pub fn shape(&self) -> (usize, usize) {
        self.matrices.first().map_or((0, 0), |w| (w.rows, w.cols))
    }
}

/// One op of a program: its variants are the structs of their names.
#[derive(Clone, Debug)]
#[expect(missing_docs)]
pub enum Op {
    Embedding(Embedding),
    EmbeddingBackward(EmbeddingBackward),
    RmsNorm(RmsNorm),
    RmsNormBackward(RmsNormBackward),
    RmsNormBackwardWeight(RmsNormBackwardWeight),
    Linear(Linear),
    LinearBackwardInput(LinearBackwardInput),
    LinearBackwardWeight(LinearBackwardWeight),
    Rope(Rope),
    RopeBackward(RopeBackward),
    Attention(Attention),
    AttentionBackward(AttentionBackward),
    AttentionDecode(AttentionDecode),
    SwiGlu(SwiGlu),
    SwiGluBackward(SwiGluBackward),
    FusedLinearCrossEntropy(FusedLinearCrossEntropy),
    GatherRows(GatherRows),
    ZeroGrad(ZeroGrad),
    GradNorm(GradNorm),
    AdamWStep(AdamWStep),
    MuonStep(MuonStep),
    SaveGradients(SaveGradients),
    AddGradients(AddGradients),
    ReduceGradients(ReduceGradients),
    GatherShards(GatherShards),
}

/// Least work of an op, for roofline floors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Floating-point operations of matmuls; a multiply-add counts two.
    pub flops: usize,
    /// Bytes read and written, at two per activation or weight and four per gradient.
    pub bytes: usize,
    /// Exponentials.
    pub exponentials: usize,
}

/// The former name of an op that was renamed, which `--only` still accepts.
pub fn former_name(name: &str) -> Option<&'static str> {
    Some(match name {
        "embedding_backward" => "embed_backward",
        "attention_decode" => "cached_attention",
        "fused_linear_cross_entropy" => "head_loss",
        "gather_rows" => "pick_rows",
        "zero_grad" => "zero_gradients",
        _ => return None,
    })
}

/// True if an op's name, or the one it had before, contains `only`.
pub fn name_matches(name: &str, only: &str) -> bool {
    name.contains(only) || former_name(name).is_some_and(|former| former.contains(only))
}

impl std::ops::AddAssign for Cost {
    fn add_assign(&mut self, other: Cost) {
        self.flops += other.flops;
        self.bytes += other.bytes;
        self.exponentials += other.exponentials;
    }
}

impl Op {
    /// Name in tables, profiles and `laam check --only`.
    pub fn name(&self) -> &'static str {
        match self {
            Op::Embedding(_) => "embedding",
            Op::EmbeddingBackward(_) => "embedding_backward",
            Op::RmsNorm(_) => "rms_norm",
            Op::RmsNormBackward(_) => "rms_norm_backward",
            Op::RmsNormBackwardWeight(_) => "rms_norm_backward_weight",
            Op::Linear(_) => "linear",
            Op::LinearBackwardInput(_) => "linear_backward_input",
            Op::LinearBackwardWeight(_) => "linear_backward_weight",
            Op::Rope(_) => "rope",
            Op::RopeBackward(_) => "rope_backward",
            Op::Attention(_) => "attention",
            Op::AttentionBackward(_) => "attention_backward",
            Op::AttentionDecode(_) => "attention_decode",
            Op::SwiGlu(_) => "swiglu",
            Op::SwiGluBackward(_) => "swiglu_backward",
            Op::FusedLinearCrossEntropy(_) => "fused_linear_cross_entropy",
            Op::GatherRows(_) => "gather_rows",
            Op::ZeroGrad(_) => "zero_grad",
            Op::GradNorm(_) => "grad_norm",
            Op::AdamWStep(_) => "adamw",
            Op::MuonStep(_) => "muon",
            Op::SaveGradients(_) => "save_gradients",
            Op::AddGradients(_) => "add_gradients",
            Op::ReduceGradients(_) => "reduce_gradients",
            Op::GatherShards(_) => "gather_shards",
        }
    }

    /// The buffers that the op reads.
    pub fn reads(&self) -> Vec<Buffer> {
        match self {
            Op::Embedding(o) => vec![o.ids],
            Op::EmbeddingBackward(o) => vec![o.ids, o.dout],
            Op::RmsNorm(o) => [o.x].into_iter().chain(o.add.map(|add| add.residual)).collect(),
            Op::RmsNormBackward(o) => [o.x, o.rstd, o.dy].into_iter().chain(o.dsum).collect(),
            Op::RmsNormBackwardWeight(o) => vec![o.partials],
            Op::Linear(o) => vec![o.x],
            Op::LinearBackwardInput(o) => vec![o.dy],
            Op::LinearBackwardWeight(o) => vec![o.dy, o.x],
            Op::Rope(o) => [o.qkv].into_iter().chain(o.start).collect(),
            Op::RopeBackward(o) => vec![o.dq, o.dk, o.dv],
            Op::Attention(o) => vec![o.q, o.k, o.v, o.first_key],
            Op::AttentionBackward(o) => vec![o.q, o.k, o.v, o.first_key, o.out, o.lse, o.dout],
            Op::AttentionDecode(o) => vec![o.q, o.k, o.v, o.start],
            Op::SwiGlu(o) => vec![o.gate_up],
            Op::SwiGluBackward(o) => vec![o.gate_up, o.dout],
            Op::FusedLinearCrossEntropy(o) => vec![o.x, o.targets],
            Op::GatherRows(o) => vec![o.x, o.position],
            Op::ZeroGrad(_)
            | Op::GradNorm(_)
            | Op::SaveGradients(_)
            | Op::AddGradients(_)
            | Op::ReduceGradients(_)
            | Op::GatherShards(_) => vec![],
            Op::AdamWStep(o) => vec![o.norm],
            Op::MuonStep(o) => vec![o.norm],
        }
    }

    /// The buffers that the op assigns.
    pub fn writes(&self) -> Vec<Buffer> {
        match self {
            Op::Embedding(o) => vec![o.out],
            Op::RmsNorm(o) => [o.y, o.rstd].into_iter().chain(o.add.map(|add| add.sum)).collect(),
            Op::RmsNormBackward(o) => vec![o.dx, o.partials],
            Op::Linear(o) => vec![o.y],
            Op::LinearBackwardInput(o) => vec![o.dx],
            Op::Rope(o) => vec![o.q, o.k, o.v],
            Op::RopeBackward(o) => vec![o.dqkv],
            Op::Attention(o) => vec![o.out, o.lse],
            Op::AttentionBackward(o) => vec![o.dq, o.dk, o.dv],
            Op::AttentionDecode(o) => vec![o.out],
            Op::SwiGlu(o) => vec![o.out],
            Op::SwiGluBackward(o) => vec![o.dgate_up],
            Op::FusedLinearCrossEntropy(o) => [o.nll, o.argmax].into_iter().chain(o.dx).collect(),
            Op::GatherRows(o) => vec![o.out],
            Op::GradNorm(o) => vec![o.norm],
            Op::EmbeddingBackward(_)
            | Op::RmsNormBackwardWeight(_)
            | Op::LinearBackwardWeight(_)
            | Op::ZeroGrad(_)
            | Op::AdamWStep(_)
            | Op::MuonStep(_)
            | Op::SaveGradients(_)
            | Op::AddGradients(_)
            | Op::ReduceGradients(_)
            | Op::GatherShards(_) => vec![],
        }
    }

    /// The gradients of all parameters, in [`Op::gradients`].
    pub const ALL_GRADIENTS: Range<usize> = 0..usize::MAX;

    /// Ranges of the gradient arena that the op accesses.
    pub fn gradients(&self) -> Vec<Range<usize>> {
        match self {
            Op::EmbeddingBackward(o) => vec![o.table.range()],
            Op::RmsNormBackwardWeight(o) => o.weights.iter().map(Span::range).collect(),
            Op::LinearBackwardWeight(o) => vec![o.w.range()],
            Op::FusedLinearCrossEntropy(o) => o.dx.iter().map(|_| o.w.range()).collect(),
            Op::ZeroGrad(_)
            | Op::GradNorm(_)
            | Op::AdamWStep(_)
            | Op::MuonStep(_)
            | Op::SaveGradients(_)
            | Op::AddGradients(_)
            | Op::ReduceGradients(_)
            | Op::GatherShards(_) => vec![Self::ALL_GRADIENTS],
            Op::Embedding(_)
            | Op::RmsNorm(_)
            | Op::RmsNormBackward(_)
            | Op::Linear(_)
            | Op::LinearBackwardInput(_)
            | Op::Rope(_)
            | Op::RopeBackward(_)
            | Op::Attention(_)
            | Op::AttentionBackward(_)
            | Op::AttentionDecode(_)
            | Op::SwiGlu(_)
            | Op::SwiGluBackward(_)
            | Op::GatherRows(_) => vec![],
        }
    }

    /// Number of slots that the op may use.
    pub fn slots(&self) -> usize {
        match self {
            Op::SaveGradients(SaveGradients { slot }) | Op::AddGradients(AddGradients { slot }) => {
                slot + 1
            }
            Op::ReduceGradients(o) => o.slots.iter().map(|slot| slot + 1).max().unwrap_or(0),
            _ => 0,
        }
    }

    /// True if all processes of a run have to come to the op.
    pub fn is_collective(&self) -> bool {
        self.wire_bytes() > 0
    }

    /// Bytes that this process sends to others, in f32.
    pub fn wire_bytes(&self) -> usize {
        let foreign = |shards: &Shards| {
            let ranges = shards.ranges.iter().enumerate().filter(|(rank, _)| *rank != shards.rank);
            4 * ranges.map(|(_, range)| range.len()).sum::<usize>()
        };
        match self {
            Op::ReduceGradients(o) => (o.slots.len() + 1) * foreign(&o.shards),
            Op::GatherShards(o) => 4 * (o.shards.ranks() - 1) * o.shards.longest(),
            Op::GradNorm(GradNorm { runs: Some(runs), .. }) if runs.own => {
                8 * (runs.shards.ranks() - 1) * runs.shards.most_runs()
            }
            _ => 0,
        }
    }

    /// Cost of the op, given the length of each buffer and that of the gradient arena.
    pub fn cost(&self, len: impl Fn(Buffer) -> usize, arena: usize) -> Cost {
        let gemm = |rows: usize, w: &Span| 2 * rows * w.len();
        match self {
            Op::Embedding(o) => Cost { bytes: 4 * len(o.out) + 4 * len(o.ids), ..Cost::default() },
            Op::EmbeddingBackward(o) => Cost { bytes: 10 * len(o.dout), ..Cost::default() },
            Op::RmsNorm(o) => {
                let planes = if o.add.is_some() { 4 } else { 2 };
                Cost { bytes: 2 * planes * len(o.y) + 4 * len(o.rstd), ..Cost::default() }
            }
            Op::RmsNormBackward(o) => Cost { bytes: 8 * len(o.dx), ..Cost::default() },
            // Partial sums are not useful work: the gradients are read and written.
            Op::RmsNormBackwardWeight(o) => Cost {
                bytes: 8 * o.weights.iter().map(Span::len).sum::<usize>(),
                ..Cost::default()
            },
            Op::Linear(o) => Cost {
                flops: gemm(o.rows, &o.w),
                bytes: 2 * (len(o.x) + len(o.y) + o.w.len()),
                exponentials: 0,
            },
            Op::LinearBackwardInput(o) => Cost {
                flops: gemm(o.rows, &o.w),
                bytes: 2 * (len(o.dy) + len(o.dx) + o.w.len()),
                exponentials: 0,
            },
            Op::LinearBackwardWeight(o) => Cost {
                flops: gemm(o.rows, &o.w),
                bytes: 2 * (len(o.dy) + len(o.x)) + 8 * o.w.len(),
                exponentials: 0,
            },
            Op::Rope(o) => Cost { bytes: 4 * len(o.qkv), ..Cost::default() },
            Op::RopeBackward(o) => Cost { bytes: 4 * len(o.dqkv), ..Cost::default() },
            Op::Attention(o) => Cost {
                flops: 4 * o.shape.head_dim * o.shape.pairs(),
                bytes: 2 * (len(o.q) + len(o.k) + len(o.v) + len(o.out)) + 4 * len(o.lse),
                exponentials: o.shape.pairs(),
            },
            Op::AttentionBackward(o) => Cost {
                flops: 10 * o.shape.head_dim * o.shape.pairs(),
                bytes: 4 * (len(o.q) + len(o.k) + len(o.v) + len(o.out)) + 4 * len(o.lse),
                exponentials: o.shape.pairs(),
            },
            Op::AttentionDecode(o) => {
                // Counted with a full cache: how full it is depends on the run.
                let pairs = o.shape.rows() * o.shape.heads * o.capacity;
                let cached = 2 * o.shape.batch * o.shape.kv_width() * o.capacity;
                Cost {
                    flops: 4 * o.shape.head_dim * pairs,
                    bytes: 2 * (len(o.q) + len(o.k) + len(o.v) + len(o.out) + cached),
                    exponentials: pairs,
                }
            }
            Op::SwiGlu(o) => Cost { flops: 0, bytes: 6 * len(o.out), exponentials: len(o.out) },
            Op::SwiGluBackward(o) => {
                Cost { flops: 0, bytes: 10 * len(o.dout), exponentials: len(o.dout) }
            }
            Op::FusedLinearCrossEntropy(o) => {
                // With the gradient, three GEMMs: the logits, dx and dw.
                let gemms = if o.dx.is_some() { 3 } else { 1 };
                let gradient = o.dx.map_or(0, |dx| 2 * len(dx) + 8 * o.w.len());
                Cost {
                    flops: gemms * gemm(o.rows, &o.w),
                    bytes: 2 * (len(o.x) + o.w.len()) + 12 * o.rows + gradient,
                    exponentials: o.rows * o.w.rows,
                }
            }
            Op::GatherRows(o) => Cost { bytes: 4 * len(o.out), ..Cost::default() },
            Op::ZeroGrad(_) | Op::GradNorm(_) | Op::GatherShards(_) => {
                Cost { bytes: 4 * arena, ..Cost::default() }
            }
            Op::SaveGradients(_) | Op::AddGradients(_) => {
                Cost { bytes: 12 * arena, ..Cost::default() }
            }
            // Reads all pieces of the own shard, writes their sum; the bytes between processes are those
            // of `wire_bytes`.
            Op::ReduceGradients(o) => {
                Cost { bytes: 4 * (o.order.terms() + 1) * o.shards.longest(), ..Cost::default() }
            }
            Op::AdamWStep(o) => {
                let stepped: usize = o.ranges.iter().map(|(range, _)| range.len()).sum();
                Cost { bytes: 30 * stepped, ..Cost::default() }
            }
            Op::MuonStep(o) => {
                let ((rows, cols), count) = (o.shape(), o.matrices.len());
                Cost {
                    flops: count * newton_schulz::flops(rows, cols),
                    bytes: count * 22 * rows * cols,
                    exponentials: 0,
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::name_matches;

    #[test]
    fn ops_are_found_by_their_former_names() {
        for (name, former) in [
            ("embedding", "embed"),
            ("embedding_backward", "embed_backward"),
            ("attention_decode", "cached_attention"),
            ("fused_linear_cross_entropy", "head_loss"),
            ("gather_rows", "pick_rows"),
            ("zero_grad", "zero_gradients"),
        ] {
            assert!(name_matches(name, former) && name_matches(name, name), "{name}");
        }
        assert!(!name_matches("attention", "cached_attention"));
    }
}
