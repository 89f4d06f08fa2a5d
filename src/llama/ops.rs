//! The operations, at the grain at which kernels fuse.
//!
//! Shapes: `rows` is windows x context; `hidden`, `inter` (the MLP's width) and `vocab` are the
//! model's. Activations are assigned (=); parameter gradients accumulate (+=) at the parameter's
//! own place in the gradient arena. Sums are taken in f32 or better.
//!
//! `flops`, `bytes` and `exponentials` count useful work: the two-byte activations of mixed
//! precision, each read or written once.

use super::program::Buffer;
use crate::model::Span;

/// The shape of an attention: `windows` windows of `context` columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    pub windows: usize,
    pub context: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
}

impl Heads {
    pub fn rows(&self) -> usize {
        self.windows * self.context
    }
    /// The width of one row of the joined q, k and v.
    pub fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }
    /// How many query heads read one key/value head.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }
    /// Query-key pairs under the causal mask.
    fn pairs(&self) -> usize {
        self.windows * self.heads * self.context * (self.context + 1) / 2
    }
}

/// `out[r] = table[ids[r]]`.
#[derive(Clone, Debug)]
pub struct Embed {
    pub ids: Buffer,
    pub table: Span,
    /// `[rows, hidden]`
    pub out: Buffer,
}

/// `d table[ids[r]] += dout[r]`, in the order of the rows.
#[derive(Clone, Debug)]
pub struct EmbedBackward {
    pub ids: Buffer,
    pub dout: Buffer,
    pub table: Span,
}

/// `sum = x + residual` (or `sum` is `x` itself), `y = sum * rstd * weight`,
/// `rstd = 1 / sqrt(mean(sum^2) + eps)`. Zhang & Sennrich 2019.
#[derive(Clone, Debug)]
pub struct RmsNorm {
    /// `[rows, hidden]`
    pub x: Buffer,
    /// What is added first, and where the sum goes.
    pub add: Option<Add>,
    pub weight: Span,
    pub eps: f64,
    /// `[rows, hidden]`
    pub y: Buffer,
    /// `[rows]`
    pub rstd: Buffer,
}

#[derive(Clone, Copy, Debug)]
pub struct Add {
    pub residual: Buffer,
    pub sum: Buffer,
}

/// `g = dy * weight`, `dx = dsum + rstd * (g - n * mean(g * n))` with `n = x * rstd`;
/// `dweight += sum over rows of dy * n`. `x` is the normalised sum, `dsum` the gradient that reaches
/// it past the norm.
#[derive(Clone, Debug)]
pub struct RmsNormBackward {
    pub x: Buffer,
    pub rstd: Buffer,
    pub weight: Span,
    pub dy: Buffer,
    pub dsum: Option<Buffer>,
    pub dx: Buffer,
}

/// `y = x wT`: `[rows, in]` by `[out, in]`.
#[derive(Clone, Debug)]
pub struct Linear {
    pub x: Buffer,
    pub w: Span,
    pub y: Buffer,
    pub rows: usize,
}

/// `dx = dy w`.
#[derive(Clone, Debug)]
pub struct LinearBackwardInput {
    pub dy: Buffer,
    pub w: Span,
    pub dx: Buffer,
    pub rows: usize,
}

/// `dw += dyT x`.
#[derive(Clone, Debug)]
pub struct LinearBackwardWeight {
    pub dy: Buffer,
    pub x: Buffer,
    pub w: Span,
    pub rows: usize,
}

/// Splits the joined rows `[rows, qkv_width]` into `q [windows, heads, context, head_dim]` and
/// `k`, `v [windows, kv_heads, context, head_dim]`, turning each pair `(i, i + head_dim/2)` of q and
/// k by `position * frequencies[i]` radians. Su et al. 2021, in Hugging Face's half-split form.
#[derive(Clone, Debug)]
pub struct Rope {
    pub qkv: Buffer,
    /// Where each window's first column stands; `None`: at 0.
    pub start: Option<Buffer>,
    /// One past the last position that can come up.
    pub positions: usize,
    /// Radians a position, `[head_dim / 2]`.
    pub frequencies: Vec<f64>,
    pub shape: Heads,
    pub q: Buffer,
    pub k: Buffer,
    pub v: Buffer,
}

/// The way back: turns dq and dk by the opposite angle and joins them with dv.
#[derive(Clone, Debug)]
pub struct RopeBackward {
    pub dq: Buffer,
    pub dk: Buffer,
    pub dv: Buffer,
    pub frequencies: Vec<f64>,
    pub shape: Heads,
    pub dqkv: Buffer,
}

/// `out = softmax(q kT / sqrt(head_dim)) v` over the columns `first_key..=column`; a row that sees
/// none yields 0 with a log-sum-exp of 0. `out` is `[rows, heads * head_dim]`, token-major.
#[derive(Clone, Debug)]
pub struct Attention {
    pub q: Buffer,
    pub k: Buffer,
    pub v: Buffer,
    pub first_key: Buffer,
    pub shape: Heads,
    pub out: Buffer,
    /// Of the scaled scores, natural logarithm: `[windows, heads, context]`.
    pub lse: Buffer,
}

/// With `p = exp(s - lse)`: `dv = pT dout`, `ds = p * (dout vT - rowsum(dout * out))`,
/// `dq = ds k / sqrt(head_dim)`, `dk = dsT q / sqrt(head_dim)`; a key/value head sums over its
/// query heads. Dao et al. 2022.
#[derive(Clone, Debug)]
pub struct AttentionBackward {
    pub q: Buffer,
    pub k: Buffer,
    pub v: Buffer,
    pub first_key: Buffer,
    pub out: Buffer,
    pub lse: Buffer,
    pub dout: Buffer,
    pub shape: Heads,
    pub dq: Buffer,
    pub dk: Buffer,
    pub dv: Buffer,
}

/// Attention over a cache: appends k and v at columns `start..start + context` of each window's
/// cache, then lets column `start + t` see the columns `0..=start + t`.
#[derive(Clone, Debug)]
pub struct CachedAttention {
    pub q: Buffer,
    pub k: Buffer,
    pub v: Buffer,
    pub start: Buffer,
    pub shape: Heads,
    /// Where this layer's keys, then its values, begin in the cache arena:
    /// `[windows, kv_heads, capacity, head_dim]` each.
    pub keys: usize,
    pub values: usize,
    pub capacity: usize,
    pub out: Buffer,
}

/// `out = silu(gate) * up` for the joined rows `[rows, 2 inter]` of gate, then up. Shazeer 2020.
#[derive(Clone, Debug)]
pub struct SwiGlu {
    pub gate_up: Buffer,
    pub inter: usize,
    pub out: Buffer,
}

#[derive(Clone, Debug)]
pub struct SwiGluBackward {
    pub gate_up: Buffer,
    pub dout: Buffer,
    pub inter: usize,
    pub dgate_up: Buffer,
}

/// The head and the cross-entropy in one: with `z = x wT`, `nll = log-sum-exp(z) - z[target]` (0
/// where the target is ignored) and `argmax` of z. With `dx`, also the gradient of
/// `loss_scale * sum(nll)`: `dx = loss_scale * (softmax(z) - onehot) w` and
/// `dw += loss_scale * (softmax(z) - onehot)T x`. The logits of a whole batch never exist.
#[derive(Clone, Debug)]
pub struct HeadLoss {
    /// `[rows, hidden]`
    pub x: Buffer,
    pub w: Span,
    pub targets: Buffer,
    pub rows: usize,
    /// `[rows]`
    pub nll: Buffer,
    /// `[rows]`; the first of equal largest logits.
    pub argmax: Buffer,
    pub dx: Option<Buffer>,
}

/// Picks one row of each window: `out[w] = x[w * context + column[w]]`.
#[derive(Clone, Debug)]
pub struct PickRows {
    pub x: Buffer,
    pub column: Buffer,
    pub windows: usize,
    pub context: usize,
    pub out: Buffer,
}

/// Sets the gradient arena to zero.
#[derive(Clone, Debug)]
pub struct ZeroGradients;

/// `norm = sqrt(sum of squares of the gradient arena)`, summed in f64 in a fixed order.
#[derive(Clone, Debug)]
pub struct GradNorm {
    /// `[1]`
    pub norm: Buffer,
}

/// One AdamW step on ranges of the arena, gradients scaled by
/// `clip = min(1, max_grad_norm / (norm + 1e-6))`. Nothing happens where the norm is not finite.
///
/// `p -= lr * decay * p`, `m += (1 - beta1) (g - m)`, `v = beta2 v + (1 - beta2) g^2`,
/// `p -= lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)`. Loshchilov & Hutter 2019,
/// in PyTorch's arithmetic.
#[derive(Clone, Debug)]
pub struct AdamWStep {
    pub norm: Buffer,
    pub max_grad_norm: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    /// Where to step, and the decay there.
    pub ranges: Vec<(std::ops::Range<usize>, f64)>,
}

/// One Muon step on matrices of one shape: `m = momentum m + g`, `u = g + momentum m`, u made orthogonal by five
/// Newton-Schulz iterations, `w -= lr * decay * w`, `w -= lr * sqrt(max(1, rows / cols)) * u`.
/// Jordan et al. 2024.
#[derive(Clone, Debug)]
pub struct MuonStep {
    pub norm: Buffer,
    pub max_grad_norm: f64,
    pub momentum: f64,
    pub decay: f64,
    /// One or more.
    pub matrices: Vec<Span>,
}

impl MuonStep {
    /// Rows and columns of each matrix.
    pub fn shape(&self) -> (usize, usize) {
        self.matrices.first().map_or((0, 0), |w| (w.rows, w.cols))
    }
}

/// Every kind of operation.
#[derive(Clone, Debug)]
pub enum Op {
    Embed(Embed),
    EmbedBackward(EmbedBackward),
    RmsNorm(RmsNorm),
    RmsNormBackward(RmsNormBackward),
    Linear(Linear),
    LinearBackwardInput(LinearBackwardInput),
    LinearBackwardWeight(LinearBackwardWeight),
    Rope(Rope),
    RopeBackward(RopeBackward),
    Attention(Attention),
    AttentionBackward(AttentionBackward),
    CachedAttention(CachedAttention),
    SwiGlu(SwiGlu),
    SwiGluBackward(SwiGluBackward),
    HeadLoss(HeadLoss),
    PickRows(PickRows),
    ZeroGradients(ZeroGradients),
    GradNorm(GradNorm),
    AdamWStep(AdamWStep),
    MuonStep(MuonStep),
}

/// What an operation has to do at least, for floors and shares of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Floating-point operations of products; a multiply-add is two.
    pub flops: usize,
    /// Bytes read and written, at two bytes an activation or weight and four a gradient.
    pub bytes: usize,
    pub exponentials: usize,
}

impl std::ops::AddAssign for Cost {
    fn add_assign(&mut self, other: Cost) {
        self.flops += other.flops;
        self.bytes += other.bytes;
        self.exponentials += other.exponentials;
    }
}

impl Op {
    /// Its name in tables and profiles.
    pub fn name(&self) -> &'static str {
        match self {
            Op::Embed(_) => "embed",
            Op::EmbedBackward(_) => "embed_backward",
            Op::RmsNorm(_) => "rms_norm",
            Op::RmsNormBackward(_) => "rms_norm_backward",
            Op::Linear(_) => "linear",
            Op::LinearBackwardInput(_) => "linear_backward_input",
            Op::LinearBackwardWeight(_) => "linear_backward_weight",
            Op::Rope(_) => "rope",
            Op::RopeBackward(_) => "rope_backward",
            Op::Attention(_) => "attention",
            Op::AttentionBackward(_) => "attention_backward",
            Op::CachedAttention(_) => "cached_attention",
            Op::SwiGlu(_) => "swiglu",
            Op::SwiGluBackward(_) => "swiglu_backward",
            Op::HeadLoss(_) => "head_loss",
            Op::PickRows(_) => "pick_rows",
            Op::ZeroGradients(_) => "zero_gradients",
            Op::GradNorm(_) => "grad_norm",
            Op::AdamWStep(_) => "adamw",
            Op::MuonStep(_) => "muon",
        }
    }

    /// The buffers it reads.
    pub fn reads(&self) -> Vec<Buffer> {
        match self {
            Op::Embed(o) => vec![o.ids],
            Op::EmbedBackward(o) => vec![o.ids, o.dout],
            Op::RmsNorm(o) => [o.x].into_iter().chain(o.add.map(|add| add.residual)).collect(),
            Op::RmsNormBackward(o) => [o.x, o.rstd, o.dy].into_iter().chain(o.dsum).collect(),
            Op::Linear(o) => vec![o.x],
            Op::LinearBackwardInput(o) => vec![o.dy],
            Op::LinearBackwardWeight(o) => vec![o.dy, o.x],
            Op::Rope(o) => [o.qkv].into_iter().chain(o.start).collect(),
            Op::RopeBackward(o) => vec![o.dq, o.dk, o.dv],
            Op::Attention(o) => vec![o.q, o.k, o.v, o.first_key],
            Op::AttentionBackward(o) => vec![o.q, o.k, o.v, o.first_key, o.out, o.lse, o.dout],
            Op::CachedAttention(o) => vec![o.q, o.k, o.v, o.start],
            Op::SwiGlu(o) => vec![o.gate_up],
            Op::SwiGluBackward(o) => vec![o.gate_up, o.dout],
            Op::HeadLoss(o) => vec![o.x, o.targets],
            Op::PickRows(o) => vec![o.x, o.column],
            Op::ZeroGradients(_) | Op::GradNorm(_) => vec![],
            Op::AdamWStep(o) => vec![o.norm],
            Op::MuonStep(o) => vec![o.norm],
        }
    }

    /// The buffers it assigns.
    pub fn writes(&self) -> Vec<Buffer> {
        match self {
            Op::Embed(o) => vec![o.out],
            Op::RmsNorm(o) => [o.y, o.rstd].into_iter().chain(o.add.map(|add| add.sum)).collect(),
            Op::RmsNormBackward(o) => vec![o.dx],
            Op::Linear(o) => vec![o.y],
            Op::LinearBackwardInput(o) => vec![o.dx],
            Op::Rope(o) => vec![o.q, o.k, o.v],
            Op::RopeBackward(o) => vec![o.dqkv],
            Op::Attention(o) => vec![o.out, o.lse],
            Op::AttentionBackward(o) => vec![o.dq, o.dk, o.dv],
            Op::CachedAttention(o) => vec![o.out],
            Op::SwiGlu(o) => vec![o.out],
            Op::SwiGluBackward(o) => vec![o.dgate_up],
            Op::HeadLoss(o) => [o.nll, o.argmax].into_iter().chain(o.dx).collect(),
            Op::PickRows(o) => vec![o.out],
            Op::GradNorm(o) => vec![o.norm],
            Op::EmbedBackward(_)
            | Op::LinearBackwardWeight(_)
            | Op::ZeroGradients(_)
            | Op::AdamWStep(_)
            | Op::MuonStep(_) => vec![],
        }
    }

    /// What it costs; `len` gives the length of a buffer and `arena` that of the gradients.
    pub fn cost(&self, len: impl Fn(Buffer) -> usize, arena: usize) -> Cost {
        let product = |rows: usize, w: &Span| 2 * rows * w.len();
        match self {
            Op::Embed(o) => Cost { bytes: 4 * len(o.out) + 4 * len(o.ids), ..Cost::default() },
            Op::EmbedBackward(o) => Cost { bytes: 10 * len(o.dout), ..Cost::default() },
            Op::RmsNorm(o) => {
                let planes = if o.add.is_some() { 4 } else { 2 };
                Cost { bytes: 2 * planes * len(o.y) + 4 * len(o.rstd), ..Cost::default() }
            }
            Op::RmsNormBackward(o) => Cost { bytes: 8 * len(o.dx), ..Cost::default() },
            Op::Linear(o) => Cost {
                flops: product(o.rows, &o.w),
                bytes: 2 * (len(o.x) + len(o.y) + o.w.len()),
                exponentials: 0,
            },
            Op::LinearBackwardInput(o) => Cost {
                flops: product(o.rows, &o.w),
                bytes: 2 * (len(o.dy) + len(o.dx) + o.w.len()),
                exponentials: 0,
            },
            Op::LinearBackwardWeight(o) => Cost {
                flops: product(o.rows, &o.w),
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
            Op::CachedAttention(o) => {
                // Counted at a full cache: what is there is known only when it runs.
                let pairs = o.shape.rows() * o.shape.heads * o.capacity;
                let cached = 2 * o.shape.windows * o.shape.kv_width() * o.capacity;
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
            Op::HeadLoss(o) => {
                // With the gradient: the logits, dx and dw, three products.
                let products = if o.dx.is_some() { 3 } else { 1 };
                let gradient = o.dx.map_or(0, |dx| 2 * len(dx) + 8 * o.w.len());
                Cost {
                    flops: products * product(o.rows, &o.w),
                    bytes: 2 * (len(o.x) + o.w.len()) + 12 * o.rows + gradient,
                    exponentials: o.rows * o.w.rows,
                }
            }
            Op::PickRows(o) => Cost { bytes: 4 * len(o.out), ..Cost::default() },
            Op::ZeroGradients(_) | Op::GradNorm(_) => Cost { bytes: 4 * arena, ..Cost::default() },
            Op::AdamWStep(o) => {
                let stepped: usize = o.ranges.iter().map(|(range, _)| range.len()).sum();
                Cost { bytes: 30 * stepped, ..Cost::default() }
            }
            Op::MuonStep(o) => {
                // Five iterations of three products, the wide side shared.
                let ((rows, cols), count) = (o.shape(), o.matrices.len());
                let (small, large) = (rows.min(cols), rows.max(cols));
                Cost {
                    flops: count * 5 * 2 * small * small * (2 * large + small),
                    bytes: count * 22 * rows * cols,
                    exponentials: 0,
                }
            }
        }
    }
}
