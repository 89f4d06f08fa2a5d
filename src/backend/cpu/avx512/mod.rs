//! Kernels for processors with AVX-512 and its bfloat16 dot products (Cooper Lake, Sapphire Rapids, Zen 4 and
//! later). The portable kernels of the parent module serve all other processors and operations.
//!
//! All AVX-512 intrinsics are here. [`vec`] holds the building blocks.

/// Functions compiled for AVX-512 F, BW, DQ, VL and BF16, which only such functions may call safely.
///
/// Without this attribute intrinsics are calls, and the code is some 20 times slower.
macro_rules! avx512 {
    ($(
        $(#[$attribute:meta])*
        $vis:vis fn $name:ident $(<$(const $n:ident: $n_type:ty),+>)? ($($args:tt)*) $(-> $out:ty)?
        $body:block
    )*) => {$(
        $(#[$attribute])*
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
        $vis fn $name $(<$(const $n: $n_type),+>)? ($($args)*) $(-> $out)? $body
    )*};
}

/// Functions compiled like those of `avx512!` that any code may call: their first argument, an [`Avx512`],
/// proves that the processor runs them.
macro_rules! avx512_entry {
    ($(
        $(#[$attribute:meta])*
        $vis:vis fn $name:ident $(<const $n:ident: $n_type:ty>)? (
            $proof:ident: Avx512 $(, $arg:ident: $arg_type:ty)* $(,)?
        ) $(-> $out:ty)?
        $body:block
    )*) => {$(
        $(#[$attribute])*
        #[inline]
        $vis fn $name $(<const $n: $n_type>)? (
            $proof: Avx512 $(, $arg: $arg_type)*
        ) $(-> $out)? {
            avx512!(
                fn compiled $(<const $n: $n_type>)? (
                    $proof: Avx512 $(, $arg: $arg_type)*
                ) $(-> $out)? {
                    let _ = $proof;
                    $body
                }
            );
            // SAFETY: only `Avx512::detect` makes an `Avx512`, after it found these features.
            unsafe { compiled $(::<$n>)? ($proof $(, $arg)*) }
        }
    )*};
}

mod attention;
mod attention_bf16;
mod fused_linear_cross_entropy;
mod matmul;
mod small_m_gemm;
mod vec;

use std::arch::x86_64::__cpuid;

use super::super::memory::Memory;
use super::small_m_gemm::MAX_SMALL_M;
use crate::llama::Op;

/// Proof that the processor has AVX-512 F, BW, DQ, VL and BF16.
#[derive(Clone, Copy)]
pub(super) struct Avx512(());

impl Avx512 {
    pub fn detect() -> Option<Self> {
        let detected = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512bf16");
        detected.then_some(Self(()))
    }

    /// True if `vdpbf16ps` is faster than f32 multiply-adds: on AMD processors (Zen 4 and later), where it issues once
    /// per cycle. On Intel's it has the speed of f32, and packing comes on top.
    pub fn has_fast_bf16(self) -> bool {
        let vendor = __cpuid(0);
        let name = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes);
        name.as_flattened() == b"AuthenticAMD"
    }

    /// The proof, or `None` after a line that says so.
    #[cfg(test)]
    fn detect_or_skip() -> Option<Self> {
        let proof = Self::detect();
        if proof.is_none() {
            eprintln!("SKIPPED: this processor has no AVX-512 with bfloat16");
        }
        proof
    }
}

/// The AVX-512 kernels, with the buffers that they keep between steps.
pub(super) struct Avx512Kernels {
    avx512: Avx512,
    /// Matmuls round their operands to bfloat16, also those of attention from head_dim 16 on.
    bf16: bool,
    cross_entropy: fused_linear_cross_entropy::CrossEntropyBuffers,
    matmul: matmul::MatmulBuffers,
}

impl Avx512Kernels {
    pub fn new(avx512: Avx512, bf16: bool) -> Self {
        Self {
            avx512,
            bf16,
            cross_entropy: fused_linear_cross_entropy::CrossEntropyBuffers::default(),
            matmul: matmul::MatmulBuffers::default(),
        }
    }

    /// Runs an operation, or returns false if there is no kernel for it here.
    pub fn execute(&mut self, op: &Op, memory: &mut Memory<f32>, loss_scale: f32) -> bool {
        let avx512 = self.avx512;
        match op {
            Op::FusedLinearCrossEntropy(o) if self.bf16 => {
                self.cross_entropy.run(avx512, o, memory, loss_scale);
            }
            Op::Linear(o) if o.rows <= MAX_SMALL_M => {
                let [x, y] = memory.floats.get([o.x, o.y]);
                let w = &memory.parameters[o.w.range()];
                small_m_gemm::small_m_gemm(avx512, y, x, w, o.rows, o.w.cols);
            }
            Op::Linear(o) if self.bf16 => self.matmul.linear(avx512, o, memory),
            Op::LinearBackwardInput(o) if self.bf16 => {
                self.matmul.backward_input(avx512, o, memory);
            }
            Op::LinearBackwardWeight(o) if self.bf16 => {
                self.matmul.backward_weight(avx512, o, memory);
            }
            Op::Attention(o) if self.bf16 && attention_bf16::supports(&o.shape) => {
                attention_bf16::forward(avx512, o, memory);
            }
            Op::AttentionBackward(o) if self.bf16 && attention_bf16::supports(&o.shape) => {
                attention_bf16::backward(avx512, o, memory);
            }
            Op::Attention(o) if attention::supports(&o.shape) => {
                attention::forward(avx512, o, memory);
            }
            Op::AttentionBackward(o) if attention::supports(&o.shape) => {
                attention::backward(avx512, o, memory);
            }
            _ => return false,
        }
        true
    }
}

/// Bytes of the buffers in bfloat16 that an operation fills and that stay for the next one: of the fused linear
/// cross-entropy, of packed weights, and of packed gradients and activations.
pub(super) fn kept_bytes(op: &Op) -> [usize; 4] {
    let cross_entropy = match op {
        Op::FusedLinearCrossEntropy(o) => fused_linear_cross_entropy::workspace(o),
        _ => 0,
    };
    let [weights, dy, x] = matmul::workspace(op);
    [cross_entropy, weights, dy, x]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::SessionSpec;
    use crate::llama::ops::{Linear, LinearBackwardInput, LinearBackwardWeight};
    use crate::llama::{BufferKind, BufferRole, Program};
    use crate::model::{Layout, Span};

    /// What [`kept_bytes`] promises, to the byte, after operations of several shapes.
    #[test]
    fn matmuls_keep_what_was_planned() {
        let Some(avx512) = Avx512::detect_or_skip() else { return };
        let none = Span { offset: 0, rows: 0, cols: 0 };
        let len = 100 * 130;
        let (parameters, blocks) = (Vec::new(), Vec::new());
        let layout =
            Layout { parameters, embedding: none, blocks, final_norm: none, head: none, len };
        let spec = SessionSpec { training: true, ..SessionSpec::default() };
        let mut memory = Memory::<f32>::new(&layout, spec);
        let mut kernels = Avx512Kernels::new(avx512, true);
        let mut planned = [0; 4];
        for (rows, outer, inner) in [(1030, 100, 33), (70, 33, 130), (513, 100, 130), (65, 1, 1)] {
            let w = Span { offset: 0, rows: outer, cols: inner };
            let mut program = Program::default();
            let mut buffer =
                |cols| program.buffer("", BufferKind::Activation, rows * cols, BufferRole::Input);
            let [x, dx, y, dy] = [inner, inner, outer, outer].map(&mut buffer);
            program.ops.push(Op::Linear(Linear { x, w, y, rows }));
            program.ops.push(Op::LinearBackwardInput(LinearBackwardInput { dy, w, dx, rows }));
            program.ops.push(Op::LinearBackwardWeight(LinearBackwardWeight { dy, x, w, rows }));
            let plan = program.plan();
            memory.reserve(&plan);
            memory.assign(&program, &plan);
            for op in &program.ops {
                assert!(kernels.execute(op, &mut memory, 1.0));
                let of_op = kept_bytes(op);
                planned = std::array::from_fn(|kind| planned[kind].max(of_op[kind]));
            }
            assert_eq!(kernels.matmul.bytes(), planned[1..], "{rows} x {outer} x {inner}");
        }
    }
}
