//! f32 kernels at the SIMD width that the processor has: AVX-512, AVX2, NEON, or scalar code; and
//! bfloat16 matmuls on processors with AMX tiles, or with fast bfloat16 dot products.
//!
//! Work is split into tasks whose number and order depend on shapes alone, so that results are bitwise the
//! same for any number of threads. Each file is one family of operations; `matmul.rs` and `simd.rs` are what
//! they share. `avx512/` has faster kernels of the costliest operations for processors with AVX-512 and its
//! bfloat16 dot products, `amx/` matmuls and attention for processors with tiles.

mod amx;
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

    #[derive(Clone, Copy)]
    pub(super) enum Avx512 {}

    impl Avx512 {
        pub fn detect() -> Option<Self> {
            None
        }

        pub fn has_fast_bf16(self) -> bool {
            match self {}
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

    pub(super) fn kept_bytes(_: &Op) -> [usize; 4] {
        [0; 4]
    }
}

use std::collections::BTreeMap;
use std::time::Instant;

use rayon::ThreadPool;

use self::amx::{Amx, TileUnit};
use self::avx512::{Avx512, Avx512Kernels};
use self::matmul::Gemm;
use super::host::{Execute, HostSession};
use super::memory::Memory;
use super::{Backend, Inputs, Session, SessionSpec};
use crate::dtype::Dtype;
use crate::error;
use crate::llama::{Op, Program};
use crate::model::Layout;
use crate::threads;

/// SIMD kernels for any processor.
#[derive(Clone, Copy, Debug)]
pub struct Cpu {
    /// Threads that work on an op; the bits do not depend on it.
    pub threads: usize,
    /// Round matmul operands to bfloat16, if `kernels` are in bfloat16 on this processor.
    pub bf16: bool,
    /// Kernels that may be used.
    pub kernels: CpuKernels,
}

/// Which of the CPU's kernels run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum CpuKernels {
    /// In f32 the AVX-512 kernels if the processor has what they need, else the portable ones. In bfloat16 AMX tiles if
    /// it has them, else the AVX-512 kernels if they are faster than f32 on it.
    #[default]
    Auto,
    /// The kernels that run on every processor, at its SIMD width, in f32.
    Portable,
    /// The AVX-512 kernels, in bfloat16 even where f32 is as fast.
    Avx512,
    /// AMX tiles in bfloat16; in f32 the kernels of `auto`.
    Amx,
    /// As `Amx`, but a software model executes the tile instructions, on any processor: slow, for tests.
    #[cfg_attr(feature = "cli", value(hide = true))]
    AmxModel,
}

/// The matmuls of `--precision bfloat16`.
#[derive(Clone, Copy)]
enum Bf16Kernels {
    Avx512,
    Tiles(TileUnit),
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
            CpuKernels::Portable => None,
            CpuKernels::Auto | CpuKernels::Avx512 | CpuKernels::Amx | CpuKernels::AmxModel => {
                Avx512::detect()
            }
        }
    }

    /// The kernels in bfloat16; `None` if matmuls are in f32.
    fn bf16_kernels(&self) -> Option<Bf16Kernels> {
        let tiles = || Amx::detect().map(|amx| Bf16Kernels::Tiles(TileUnit::Hardware(amx)));
        let avx512 = |_| Bf16Kernels::Avx512;
        match self.kernels {
            _ if !self.bf16 => None,
            CpuKernels::Auto => tiles()
                .or_else(|| self.avx512().filter(|avx512| avx512.has_fast_bf16()).map(avx512)),
            CpuKernels::Portable => None,
            CpuKernels::Avx512 => self.avx512().map(avx512),
            CpuKernels::Amx => tiles(),
            CpuKernels::AmxModel => Some(Bf16Kernels::Tiles(TileUnit::Model)),
        }
    }

    /// The matmuls of the operations that have no AVX-512 kernel.
    fn gemm(&self) -> Gemm {
        match self.bf16_kernels() {
            Some(Bf16Kernels::Tiles(unit)) => Gemm::Bf16(unit),
            Some(Bf16Kernels::Avx512) | None => Gemm::F32,
        }
    }

    /// The instruction sets and dtypes of the kernels that run.
    pub fn path(&self) -> String {
        let (tiles, dtypes) = match self.bf16_kernels() {
            None => ("", "f32"),
            Some(Bf16Kernels::Avx512) => ("", "bf16 and f32"),
            Some(Bf16Kernels::Tiles(TileUnit::Hardware(_))) => (" and AMX", "bf16 and f32"),
            Some(Bf16Kernels::Tiles(TileUnit::Model)) => (" and a model of AMX", "bf16 and f32"),
        };
        format!("{}{tiles} in {dtypes}", simd::name())
    }

    /// Bytes of the buffers that an operation fills and that stay for the next one: of the fused linear cross-entropy, of
    /// packed weights, and of packed gradients and activations.
    fn kept_bytes(&self, op: &Op) -> [usize; 4] {
        match (op, self.bf16_kernels()) {
            (op, Some(Bf16Kernels::Avx512)) => avx512::kept_bytes(op),
            (Op::FusedLinearCrossEntropy(o), _) => {
                [fused_linear_cross_entropy::kept_bytes(o), 0, 0, 0]
            }
            (op, Some(Bf16Kernels::Tiles(_))) => [0, amx::workspace(op), 0, 0],
            _ => [0; 4],
        }
    }

    /// Bytes that an operation allocates and frees, apart from each thread's cache-sized scratch.
    fn scratch_bytes(&self, op: &Op) -> usize {
        match op {
            Op::Attention(o) => attention::scratch_bytes(o),
            Op::MuonStep(o) => update::muon_workspace(o, self.threads),
            Op::FusedLinearCrossEntropy(o)
                if !matches!(self.bf16_kernels(), Some(Bf16Kernels::Avx512)) =>
            {
                fused_linear_cross_entropy::scratch_bytes(o)
            }
            _ => 0,
        }
    }

    /// An error if the processor cannot run the kernels that were asked for by name.
    fn check_kernels(&self) -> anyhow::Result<()> {
        let (missing, what) = match self.kernels {
            CpuKernels::Avx512 => (Avx512::detect().is_none(), "AVX-512 with bfloat16"),
            CpuKernels::Amx => (Amx::detect().is_none(), "AMX tiles with bfloat16"),
            CpuKernels::Auto | CpuKernels::Portable | CpuKernels::AmxModel => return Ok(()),
        };
        if missing {
            return Err(error::config(
                format!("this processor has no {what}, or the system does not permit them"),
                "set `cpu_kernels` to auto",
            ));
        }
        Ok(())
    }
}

impl Backend for Cpu {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn device(&self) -> String {
        let threads = self.threads;
        let plural = if threads == 1 { "" } else { "s" };
        format!("cpu, {}, {threads} thread{plural}", self.path())
    }

    fn compute_dtype(&self) -> Dtype {
        if self.bf16_kernels().is_some() { Dtype::Bf16 } else { Dtype::F32 }
    }

    fn open(&self, layout: &Layout, spec: SessionSpec) -> anyhow::Result<Box<dyn Session>> {
        self.check_kernels()?;
        let pool = threads::pool(self.threads)?;
        let bf16 = matches!(self.bf16_kernels(), Some(Bf16Kernels::Avx512));
        let executor = CpuExecutor {
            arch: pulp::Arch::new(),
            pool,
            avx512: self.avx512().map(|avx512| Avx512Kernels::new(avx512, bf16)),
            gemm: self.gemm(),
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

    fn workspace_bytes(&self, programs: &[&Program]) -> usize {
        let ops = || programs.iter().flat_map(|program| &program.ops);
        let kept = ops()
            .map(|op| self.kept_bytes(op))
            .fold([0; 4], |sizes, of_op| std::array::from_fn(|kind| sizes[kind].max(of_op[kind])));
        kept.iter().sum::<usize>() + ops().map(|op| self.scratch_bytes(op)).max().unwrap_or(0)
    }
}

/// Runs operations one after another, each on a pool of threads.
struct CpuExecutor {
    arch: pulp::Arch,
    pool: ThreadPool,
    avx512: Option<Avx512Kernels>,
    gemm: Gemm,
    rope: rope::RopeTable,
    /// The fused linear cross-entropy's block of logits, kept between steps.
    logits: Vec<f32>,
    /// By the name of the operation.
    seconds: BTreeMap<&'static str, f64>,
}

impl Execute<f32> for CpuExecutor {
    fn execute(&mut self, _: &Program, ops: &[Op], memory: &mut Memory<f32>, inputs: &Inputs) {
        let Self { arch, pool, avx512, gemm, rope, logits, seconds } = self;
        // Once per program: entering the pool costs microseconds, as much as a small operation.
        pool.install(|| {
            for op in ops {
                let start = Instant::now();
                execute_op(*arch, avx512.as_mut(), *gemm, rope, logits, op, memory, inputs);
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
    gemm: Gemm,
    rope: &mut rope::RopeTable,
    logits: &mut Vec<f32>,
    op: &Op,
    memory: &mut Memory<f32>,
    inputs: &Inputs,
) {
    if avx512.is_some_and(|avx512| avx512.execute(op, memory, inputs.loss_scale as f32)) {
        return;
    }
    match (op, gemm) {
        (Op::Attention(o), Gemm::Bf16(unit)) if amx::supports(&o.shape) => {
            return amx::forward(unit, arch, o, memory);
        }
        (Op::AttentionBackward(o), Gemm::Bf16(unit)) if amx::supports(&o.shape) => {
            return amx::backward(unit, arch, o, memory);
        }
        _ => {}
    }
    match op {
        Op::Embedding(o) => elementwise::embedding(o, memory),
        Op::EmbeddingBackward(o) => elementwise::embedding_backward(o, memory),
        Op::RmsNorm(o) => norm::forward(arch, o, memory),
        Op::RmsNormBackward(o) => norm::backward(arch, o, memory),
        // Its backward adds to the gradient at once.
        Op::RmsNormBackwardWeight(_) => {}
        Op::Linear(o) => matmul::linear(arch, gemm, o, memory),
        Op::LinearBackwardInput(o) => matmul::linear_backward_input(gemm, o, memory),
        Op::LinearBackwardWeight(o) => matmul::linear_backward_weight(gemm, o, memory),
        Op::Rope(o) => rope.forward(o, memory),
        Op::RopeBackward(o) => rope.backward(o, memory),
        Op::Attention(o) => attention::forward(arch, o, memory),
        Op::AttentionBackward(o) => attention::backward(arch, o, memory),
        Op::AttentionDecode(o) => attention::decode(arch, o, memory),
        Op::SwiGlu(o) => elementwise::swiglu(arch, o, memory),
        Op::SwiGluBackward(o) => elementwise::swiglu_backward(arch, o, memory),
        Op::FusedLinearCrossEntropy(o) => {
            fused_linear_cross_entropy::run(
                arch,
                gemm,
                o,
                memory,
                inputs.loss_scale as f32,
                logits,
            );
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
