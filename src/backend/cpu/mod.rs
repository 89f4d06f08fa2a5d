//! f32 kernels at the SIMD width that the processor has: AVX-512, AVX2, NEON, or scalar code; and
//! bfloat16 matmuls on processors with bfloat16 dot products.
//!
//! Work is split into tasks whose number and order depend on shapes alone, so that results are bitwise the
//! same for any number of threads. Each file is one family of operations; `matmul.rs` and `simd.rs` are what
//! they share. `avx512/` has faster kernels of the costliest operations for processors with AVX-512 and its
//! bfloat16 dot products.

mod attention;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod elementwise;
mod fused_linear_cross_entropy;
mod matmul;
mod norm;
mod rope;
mod simd;
mod small_m_gemm;
mod update;

/// No kernels on other architectures.
#[cfg(not(target_arch = "x86_64"))]
mod avx512 {
    use super::super::memory::Memory;
    use crate::llama::Op;
    use crate::llama::ops::FusedLinearCrossEntropy;

    pub(super) enum Avx512 {}

    impl Avx512 {
        pub fn detect() -> Option<Self> {
            None
        }
    }

    pub(super) struct Avx512Kernels(Avx512);

    impl Avx512Kernels {
        pub fn new(avx512: Avx512, _: bool) -> Self {
            Self(avx512)
        }

        pub fn execute(&mut self, _: &Op, _: &mut Memory<f32>, _: f32) -> bool {
            match self.0 {}
        }
    }

    pub(super) fn cross_entropy_workspace(_: &FusedLinearCrossEntropy) -> usize {
        0
    }
}

use std::collections::BTreeMap;
use std::time::Instant;

use rayon::ThreadPool;

use self::avx512::{Avx512, Avx512Kernels};
use super::host::{Execute, HostSession};
use super::memory::Memory;
use super::{Backend, Inputs, Session, SessionSpec};
use crate::dtype::Dtype;
use crate::llama::{Op, Program};
use crate::model::Layout;
use crate::threads;

/// SIMD kernels for any processor.
#[derive(Clone, Copy, Debug)]
pub struct Cpu {
    /// Threads that work on an op; the bits do not depend on it.
    pub threads: usize,
    /// Round matmul operands to bfloat16, if the processor has bfloat16 dot products and `kernels`
    /// allows them.
    pub bf16: bool,
    /// Kernels that may be used.
    pub kernels: CpuKernels,
}

/// Which of the CPU's kernels run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum CpuKernels {
    /// The AVX-512 kernels if the processor has what they need, else the portable ones.
    #[default]
    Auto,
    /// The kernels that run on every processor, at its SIMD width.
    Portable,
}

impl Cpu {
    /// Matmuls in f32.
    pub const fn f32(threads: usize) -> Self {
        Self { threads, bf16: false, kernels: CpuKernels::Auto }
    }

    /// Matmuls in bfloat16 if the processor has them, else in f32: see [`Backend::compute_dtype`].
    pub const fn bf16(threads: usize) -> Self {
        Self { threads, bf16: true, kernels: CpuKernels::Auto }
    }

    /// The AVX-512 kernels' proof of support, if they are allowed.
    fn avx512(&self) -> Option<Avx512> {
        match self.kernels {
            CpuKernels::Auto => Avx512::detect(),
            CpuKernels::Portable => None,
        }
    }

    fn has_bf16_matmuls(&self) -> bool {
        self.bf16 && self.avx512().is_some()
    }
}

impl Backend for Cpu {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn device(&self) -> String {
        let threads = self.threads;
        format!(
            "cpu, {} in {}, {threads} thread{}",
            simd::name(),
            if self.has_bf16_matmuls() { "bf16 and f32" } else { "f32" },
            if threads == 1 { "" } else { "s" }
        )
    }

    fn compute_dtype(&self) -> Dtype {
        if self.has_bf16_matmuls() { Dtype::Bf16 } else { Dtype::F32 }
    }

    fn open(&self, layout: &Layout, spec: SessionSpec) -> anyhow::Result<Box<dyn Session>> {
        let pool = threads::pool(self.threads)?;
        let executor = CpuExecutor {
            arch: pulp::Arch::new(),
            pool,
            avx512: self.avx512().map(|avx512| Avx512Kernels::new(avx512, self.bf16)),
            rope: rope::RopeTable::default(),
            logits: Vec::new(),
            seconds: BTreeMap::new(),
        };
        Ok(Box::new(HostSession::new(layout, spec, executor)?))
    }

    /// Some 4,096 tokens: enough rows for the matmuls, and small activations.
    fn micro_batch(&self, batch: usize, seq_len: usize) -> usize {
        (4096 / seq_len).clamp(1, batch)
    }

    fn workspace_bytes(&self, program: &Program) -> usize {
        let of = |op: &Op| match op {
            Op::FusedLinearCrossEntropy(o) if self.has_bf16_matmuls() => {
                avx512::cross_entropy_workspace(o)
            }
            Op::FusedLinearCrossEntropy(o) => 4 * fused_linear_cross_entropy::workspace(o),
            Op::MuonStep(o) => update::muon_workspace(o),
            _ => 0,
        };
        program.ops.iter().map(of).max().unwrap_or(0)
    }
}

/// Runs operations one after another, each on a pool of threads.
struct CpuExecutor {
    arch: pulp::Arch,
    pool: ThreadPool,
    avx512: Option<Avx512Kernels>,
    rope: rope::RopeTable,
    /// The fused linear cross-entropy's block of logits, kept between steps.
    logits: Vec<f32>,
    /// By the name of the operation.
    seconds: BTreeMap<&'static str, f64>,
}

impl Execute<f32> for CpuExecutor {
    fn execute(&mut self, _: &Program, ops: &[Op], memory: &mut Memory<f32>, inputs: &Inputs) {
        let Self { arch, pool, avx512, rope, logits, seconds } = self;
        // Once per program: entering the pool costs microseconds, as much as a small operation.
        pool.install(|| {
            for op in ops {
                let start = Instant::now();
                execute_op(*arch, avx512.as_mut(), rope, logits, op, memory, inputs);
                *seconds.entry(op.name()).or_default() += start.elapsed().as_secs_f64();
            }
        });
    }

    fn profile(&self) -> Vec<(&'static str, f64)> {
        self.seconds.iter().map(|(&name, &seconds)| (name, seconds)).collect()
    }
}

fn execute_op(
    arch: pulp::Arch,
    avx512: Option<&mut Avx512Kernels>,
    rope: &mut rope::RopeTable,
    logits: &mut Vec<f32>,
    op: &Op,
    memory: &mut Memory<f32>,
    inputs: &Inputs,
) {
    if avx512.is_some_and(|avx512| avx512.execute(op, memory, inputs.loss_scale as f32)) {
        return;
    }
    match op {
        Op::Embedding(o) => elementwise::embedding(o, memory),
        Op::EmbeddingBackward(o) => elementwise::embedding_backward(o, memory),
        Op::RmsNorm(o) => norm::forward(arch, o, memory),
        Op::RmsNormBackward(o) => norm::backward(arch, o, memory),
        // Its backward adds to the gradient at once.
        Op::RmsNormBackwardWeight(_) => {}
        Op::Linear(o) => matmul::linear(arch, o, memory),
        Op::LinearBackwardInput(o) => matmul::linear_backward_input(o, memory),
        Op::LinearBackwardWeight(o) => matmul::linear_backward_weight(o, memory),
        Op::Rope(o) => rope.forward(o, memory),
        Op::RopeBackward(o) => rope.backward(o, memory),
        Op::Attention(o) => attention::forward(arch, o, memory),
        Op::AttentionBackward(o) => attention::backward(arch, o, memory),
        Op::AttentionDecode(o) => attention::decode(arch, o, memory),
        Op::SwiGlu(o) => elementwise::swiglu(arch, o, memory),
        Op::SwiGluBackward(o) => elementwise::swiglu_backward(arch, o, memory),
        Op::FusedLinearCrossEntropy(o) => {
            fused_linear_cross_entropy::run(arch, o, memory, inputs.loss_scale as f32, logits);
        }
        Op::GatherRows(o) => elementwise::gather_rows(o, memory),
        Op::ZeroGrad(_) => memory.gradients.fill(0.0),
        Op::GradNorm(o) => update::grad_norm(o, memory),
        Op::AdamWStep(o) => update::adamw(arch, o, memory, &inputs.hyperparams),
        Op::MuonStep(o) => update::muon(o, memory, &inputs.hyperparams),
        Op::SaveGradients(_)
        | Op::AddGradients(_)
        | Op::ReduceGradients(_)
        | Op::GatherShards(_) => unreachable!("the session executes it"),
    }
}
