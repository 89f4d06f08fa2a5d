//! Own kernels for processors with AVX-512 and its bfloat16 products (Zen 4, Cooper Lake, Sapphire Rapids
//! and later), found when the program starts; elsewhere the other files of this folder's parent do the work.
//!
//! All `std::arch` code is here. [`lines`] holds what the others are made of.

mod attention;
mod few;
mod head;
mod lines;
mod product;

use super::super::memory::Memory;
use super::few::MOST as FEW;
use crate::llama::Op;
use crate::llama::ops::FusedLinearCrossEntropy;

/// Proof that the processor has what the kernels need, and what they keep from step to step.
pub(super) struct Tiles {
    /// Whether products are of bfloat16.
    bf16: bool,
    head: head::Head,
    products: product::Products,
}

/// Whether this processor runs these kernels.
pub(super) fn found() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512bf16")
}

impl Tiles {
    /// `None` where the processor lacks what they need.
    pub fn detect(bf16: bool) -> Option<Self> {
        found().then(|| Self {
            bf16,
            head: head::Head::default(),
            products: product::Products::default(),
        })
    }

    /// Carries out an operation, or returns false where there is no kernel for it.
    pub fn execute(&mut self, op: &Op, memory: &mut Memory<f32>, loss_scale: f32) -> bool {
        // SAFETY: `detect` is the only way to a value of this type.
        unsafe {
            match op {
                Op::FusedLinearCrossEntropy(o) if self.bf16 => {
                    self.head.loss(o, memory, loss_scale)
                }
                Op::Linear(o) if self.bf16 => {
                    self.products.linear(o, memory);
                }
                Op::Linear(o) if o.rows <= FEW => {
                    let [x, y] = memory.floats.get([o.x, o.y]);
                    few::product(y, x, &memory.parameters[o.w.range()], o.rows, o.w.cols);
                }
                Op::LinearBackwardInput(o) if self.bf16 => {
                    self.products.backward_input(o, memory);
                }
                Op::LinearBackwardWeight(o) if self.bf16 => {
                    self.products.backward_weight(o, memory);
                }
                Op::Attention(o) if attention::takes(&o.shape) => attention::forward(o, memory),
                Op::AttentionBackward(o) if attention::takes(&o.shape) => {
                    attention::backward(o, memory);
                }
                _ => return false,
            }
        }
        true
    }
}

/// Bytes that a head takes beside its buffers.
pub(super) fn head_workspace(o: &FusedLinearCrossEntropy) -> usize {
    head::workspace(o)
}
