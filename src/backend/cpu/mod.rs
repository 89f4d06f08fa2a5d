//! f32 at the speed of the processor's vector units, chosen when the program starts: AVX-512, AVX2,
//! NEON, or plain; and bfloat16 products where the processor has them.
//!
//! Work is cut into pieces whose number and order depend on shapes alone, never on how many threads
//! there are, so that results are the same bits at any `--threads`. Each file is one family of
//! operations; [`product`] and [`lanes`] are what they share. [`tiles`] does the costliest ones once more
//! for processors with AVX-512 and its bfloat16 products.

mod attention;
mod elementwise;
mod few;
mod head;
mod lanes;
mod norm;
mod product;
mod rope;
#[cfg(target_arch = "x86_64")]
mod tiles;
mod update;

/// On other processors there is no such thing.
#[cfg(not(target_arch = "x86_64"))]
mod tiles {
    use super::super::memory::Memory;
    use crate::llama::Op;
    use crate::llama::ops::FusedLinearCrossEntropy;

    pub(super) enum Tiles {}

    pub(super) fn found() -> bool {
        false
    }

    impl Tiles {
        pub fn detect(_: bool) -> Option<Self> {
            None
        }

        pub fn execute(&mut self, _: &Op, _: &mut Memory<f32>, _: f32) -> bool {
            match *self {}
        }
    }

    pub(super) fn head_workspace(_: &FusedLinearCrossEntropy) -> usize {
        0
    }
}

use std::collections::BTreeMap;
use std::time::Instant;

use rayon::{ThreadPool, ThreadPoolBuilder};

use self::tiles::Tiles;
use super::host::{Execute, Host};
use super::memory::Memory;
use super::{Backend, Feed, Need, Session};
use crate::dtype::Dtype;
use crate::llama::{Op, Program};
use crate::model::Layout;

/// SIMD kernels for any processor.
#[derive(Clone, Copy, Debug)]
pub struct Cpu {
    pub threads: usize,
    /// Round matmul operands to bfloat16, if the processor has bfloat16 dot products and `kernels`
    /// allows them.
    pub bf16: bool,
    pub kernels: CpuKernels,
}

/// Which of the CPU's kernels run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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

    fn in_tiles(&self) -> bool {
        self.kernels == CpuKernels::Auto && tiles::found()
    }

    fn in_bf16(&self) -> bool {
        self.bf16 && self.in_tiles()
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
            lanes::name(),
            if self.in_bf16() { "bf16 and f32" } else { "f32" },
            if threads == 1 { "" } else { "s" }
        )
    }

    fn compute_dtype(&self) -> Dtype {
        if self.in_bf16() { Dtype::Bf16 } else { Dtype::F32 }
    }

    fn open(&self, layout: &Layout, need: Need) -> anyhow::Result<Box<dyn Session>> {
        let pool = ThreadPoolBuilder::new().num_threads(self.threads).build()?;
        let vector = Vector {
            arch: pulp::Arch::new(),
            pool,
            tiles: if self.in_tiles() { Tiles::detect(self.bf16) } else { None },
            rope: rope::Table::default(),
            head: Vec::new(),
            seconds: BTreeMap::new(),
        };
        Ok(Box::new(Host::new(layout, need, vector)))
    }

    /// Some 4,096 tokens at a time: enough rows for the products, activations that stay small.
    fn micro_windows(&self, windows: usize, context: usize) -> usize {
        (4096 / context).clamp(1, windows)
    }

    fn workspace(&self, program: &Program) -> usize {
        let of = |op: &Op| match op {
            Op::FusedLinearCrossEntropy(o) if self.in_bf16() => tiles::head_workspace(o),
            Op::FusedLinearCrossEntropy(o) => 4 * head::workspace(o),
            _ => 0,
        };
        program.ops.iter().map(of).max().unwrap_or(0)
    }
}

/// Carries out one operation after another on a pool of threads.
struct Vector {
    arch: pulp::Arch,
    pool: ThreadPool,
    /// Where the processor runs them.
    tiles: Option<Tiles>,
    rope: rope::Table,
    /// The head's tiles of logits, kept from step to step.
    head: Vec<f32>,
    /// By the name of the operation.
    seconds: BTreeMap<&'static str, f64>,
}

impl Execute<f32> for Vector {
    fn execute(&mut self, program: &Program, memory: &mut Memory<f32>, feed: &Feed) {
        let Vector { arch, pool, tiles, rope, head, seconds } = self;
        // Once a program: entering the pool costs microseconds, as much as a small operation.
        pool.install(|| {
            for op in &program.ops {
                let start = Instant::now();
                one(*arch, tiles.as_mut(), rope, head, op, memory, feed);
                *seconds.entry(op.name()).or_default() += start.elapsed().as_secs_f64();
            }
        });
    }

    fn profile(&self) -> Vec<(&'static str, f64)> {
        self.seconds.iter().map(|(&name, &seconds)| (name, seconds)).collect()
    }
}

fn one(
    arch: pulp::Arch,
    tiles: Option<&mut Tiles>,
    rope: &mut rope::Table,
    logits: &mut Vec<f32>,
    op: &Op,
    memory: &mut Memory<f32>,
    feed: &Feed,
) {
    if tiles.is_some_and(|tiles| tiles.execute(op, memory, feed.loss_scale as f32)) {
        return;
    }
    match op {
        Op::Embedding(o) => elementwise::embedding(o, memory),
        Op::EmbeddingBackward(o) => elementwise::embedding_backward(o, memory),
        Op::RmsNorm(o) => norm::forward(arch, o, memory),
        Op::RmsNormBackward(o) => norm::backward(arch, o, memory),
        Op::Linear(o) => product::linear(arch, o, memory),
        Op::LinearBackwardInput(o) => product::linear_backward_input(o, memory),
        Op::LinearBackwardWeight(o) => product::linear_backward_weight(o, memory),
        Op::Rope(o) => rope.forward(o, memory),
        Op::RopeBackward(o) => rope.backward(o, memory),
        Op::Attention(o) => attention::forward(arch, o, memory),
        Op::AttentionBackward(o) => attention::backward(arch, o, memory),
        Op::AttentionDecode(o) => attention::cached(arch, o, memory),
        Op::SwiGlu(o) => elementwise::swiglu(arch, o, memory),
        Op::SwiGluBackward(o) => elementwise::swiglu_backward(arch, o, memory),
        Op::FusedLinearCrossEntropy(o) => {
            head::loss(arch, o, memory, feed.loss_scale as f32, logits)
        }
        Op::GatherRows(o) => elementwise::gather_rows(o, memory),
        Op::ZeroGrad(_) => memory.gradients.fill(0.0),
        Op::GradNorm(o) => update::grad_norm(o, memory),
        Op::AdamWStep(o) => update::adamw(arch, o, memory, &feed.rates),
        Op::MuonStep(o) => update::muon(o, memory, &feed.rates),
    }
}
