//! The cpu backend's operations, a training step, and generation, at the original's shape (hidden 64, 8
//! layers, 32 query and 4 key/value heads of 2, a vocabulary of 32,768, windows of 512).
//!
//!     cargo bench --bench cpu                    # all of it, some minutes
//!     cargo bench --bench cpu -- fused_linear_cross_entropy       # what has this in its name
//!     cargo bench --bench cpu -- --test          # each once: that it runs
//!
//! Every name says the kind of products: `f32`, `bf16` where the processor has such, and `plain`, which is
//! f32 without the kernels for this processor alone.

use std::borrow::Cow;
use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use laam::backend::cpu::{Cpu, CpuKernels};
use laam::backend::{Arena, Backend, Inputs, SessionSpec};
use laam::bench::step::preset;
use laam::dtype::Dtype;
use laam::generate::{Generator, Request};
use laam::llama::ops::{
    AdamWStep, Attention, AttentionBackward, AttentionShape, FusedLinearCrossEntropy, Linear,
    LinearBackwardInput, LinearBackwardWeight, RmsNorm, RmsNormBackward, SwiGlu, SwiGluBackward,
};
use laam::llama::{AdamW, Buffer, BufferKind, BufferRole, Op, Optimizer, Program, StepHyperparams};
use laam::model::{Config, Layout, Span};
use laam::random::{Philox, Stream};
use laam::tokens::{Batch, IGNORE};
use laam::train::Engine;

/// Rows of the operations: one window.
const ROWS: usize = 512;

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn backends() -> Vec<(&'static str, Cpu)> {
    let (f32, bf16) = (Cpu::f32(threads()), Cpu::bf16(threads()));
    let plain = Cpu { kernels: CpuKernels::Portable, ..f32 };
    let all = [("f32", f32), ("plain", plain), ("bf16", bf16)];
    // Where a processor has no bfloat16 it would be f32 by another name.
    all.into_iter()
        .filter(|(name, cpu)| *name != "bf16" || cpu.compute_dtype() == Dtype::Bf16)
        .collect()
}

fn original() -> Config {
    preset("original").expect("there is such a preset")
}

fn random(len: usize, sequence: u32) -> Vec<f32> {
    let mut values = vec![0.0; len];
    Philox::new(1, Stream::Test).fill_normal(sequence, 0.5, &mut values);
    values
}

/// A program of one operation, and what it reads.
#[derive(Default)]
struct One {
    program: Program,
    floats: Vec<(Buffer, Vec<f32>)>,
    indices: Vec<(Buffer, Vec<u32>)>,
}

impl One {
    fn input(&mut self, len: usize) -> Buffer {
        let buffer = self.program.buffer("", BufferKind::Activation, len, BufferRole::Input);
        let values = random(len, self.floats.len() as u32);
        self.floats.push((buffer, values));
        buffer
    }

    fn index(&mut self, values: Vec<u32>) -> Buffer {
        let buffer = self.program.buffer("", BufferKind::Index, values.len(), BufferRole::Input);
        self.indices.push((buffer, values));
        buffer
    }

    fn output(&mut self, element: BufferKind, len: usize) -> Buffer {
        self.program.buffer("", element, len, BufferRole::Output)
    }

    /// The operation's time on each backend; its parameter is all of the arena.
    fn time(mut self, group: &mut BenchmarkGroup<WallTime>, span: Span, op: Op) {
        let name = op.name();
        self.program.ops.push(op);
        let none = Span { offset: 0, rows: 0, cols: 0 };
        let layout = Layout {
            parameters: Vec::new(),
            embedding: span,
            blocks: Vec::new(),
            final_norm: none,
            head: span,
            len: span.len().next_multiple_of(Layout::ALIGN),
        };
        let inputs = Inputs {
            indices: self.indices.iter().map(|(b, values)| (*b, values.as_slice())).collect(),
            floats: self.floats.iter().map(|(b, v)| (*b, Cow::from(v.as_slice()))).collect(),
            loss_scale: 1.0 / ROWS as f64,
            hyperparams: StepHyperparams { learning_rate: 1e-3, muon_learning_rate: 0.0, step: 1 },
        };
        for (dtype, cpu) in backends() {
            let mut session = cpu
                .open(&layout, SessionSpec { training: true, cache_len: 0 })
                .expect("memory for it");
            session.write(Arena::Parameters, &random(layout.len, 99)).expect("its length");
            let program = session.load(self.program.clone()).expect("a valid program");
            group.bench_function(format!("{name}/{dtype}"), |b| {
                b.iter(|| session.run(program, &inputs).expect("complete inputs"));
            });
        }
    }
}

fn span(rows: usize, cols: usize) -> Span {
    Span { offset: 0, rows, cols }
}

fn operations(c: &mut Criterion) {
    let config = original();
    let (hidden, inter, vocab) = (config.hidden_size, config.intermediate_size, config.vocab_size);
    let mut group = c.benchmark_group("operation");
    group.throughput(Throughput::Elements(ROWS as u64));

    // Gate and up: the widest of a block's products.
    let w = span(2 * inter, hidden);
    let mut one = One::default();
    let (x, y) = (one.input(ROWS * hidden), one.output(BufferKind::Activation, ROWS * w.rows));
    one.time(&mut group, w, Op::Linear(Linear { x, w, y, rows: ROWS }));
    let mut one = One::default();
    let (dy, dx) = (one.input(ROWS * w.rows), one.output(BufferKind::Activation, ROWS * hidden));
    one.time(&mut group, w, Op::LinearBackwardInput(LinearBackwardInput { dy, w, dx, rows: ROWS }));
    let mut one = One::default();
    let (dy, x) = (one.input(ROWS * w.rows), one.input(ROWS * hidden));
    let op = LinearBackwardWeight { dy, x, w, rows: ROWS };
    one.time(&mut group, w, Op::LinearBackwardWeight(op));

    let shape = AttentionShape {
        batch: 1,
        seq_len: ROWS,
        heads: config.num_attention_heads,
        kv_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
    };
    let (wide, narrow) = (ROWS * shape.q_width(), ROWS * shape.kv_width());
    let mut one = One::default();
    let (q, k, v) = (one.input(wide), one.input(narrow), one.input(narrow));
    let first_key = one.index(vec![0; ROWS]);
    let out = one.output(BufferKind::Activation, wide);
    let lse = one.output(BufferKind::Float, ROWS * shape.heads);
    let op = Attention { q, k, v, first_key, shape, out, lse };
    one.time(&mut group, span(1, 1), Op::Attention(op));
    let mut one = One::default();
    let (q, k, v) = (one.input(wide), one.input(narrow), one.input(narrow));
    let first_key = one.index(vec![0; ROWS]);
    let (out, lse, dout) = (one.input(wide), one.input(ROWS * shape.heads), one.input(wide));
    let dq = one.output(BufferKind::Activation, wide);
    let (dk, dv) =
        (one.output(BufferKind::Activation, narrow), one.output(BufferKind::Activation, narrow));
    let op = AttentionBackward { q, k, v, first_key, out, lse, dout, shape, dq, dk, dv };
    one.time(&mut group, span(1, 1), Op::AttentionBackward(op));

    let mut one = One::default();
    let (gate_up, out) =
        (one.input(2 * ROWS * inter), one.output(BufferKind::Activation, ROWS * inter));
    one.time(&mut group, span(1, 1), Op::SwiGlu(SwiGlu { gate_up, inter, out }));
    let mut one = One::default();
    let (gate_up, dout) = (one.input(2 * ROWS * inter), one.input(ROWS * inter));
    let dgate_up = one.output(BufferKind::Activation, 2 * ROWS * inter);
    let op = SwiGluBackward { gate_up, dout, inter, dgate_up };
    one.time(&mut group, span(1, 1), Op::SwiGluBackward(op));

    let weight = span(1, hidden);
    let mut one = One::default();
    let x = one.input(ROWS * hidden);
    let y = one.output(BufferKind::Activation, ROWS * hidden);
    let rstd = one.output(BufferKind::Float, ROWS);
    let op = RmsNorm { x, add: None, weight, eps: 1e-6, y, rstd };
    one.time(&mut group, weight, Op::RmsNorm(op));
    let mut one = One::default();
    let (x, rstd, dy) = (one.input(ROWS * hidden), one.input(ROWS), one.input(ROWS * hidden));
    let dx = one.output(BufferKind::Activation, ROWS * hidden);
    let op = RmsNormBackward { x, rstd, weight, dy, dsum: None, dx };
    one.time(&mut group, weight, Op::RmsNormBackward(op));

    let w = span(vocab, hidden);
    let mut one = One::default();
    let x = one.input(ROWS * hidden);
    let targets = one.index((0..ROWS as u32).map(|row| row * 61 % vocab as u32).collect());
    let (nll, argmax) = (one.output(BufferKind::Float, ROWS), one.output(BufferKind::Index, ROWS));
    let dx = Some(one.output(BufferKind::Activation, ROWS * hidden));
    let op = FusedLinearCrossEntropy { x, w, targets, rows: ROWS, nll, argmax, dx };
    one.time(&mut group, w, Op::FusedLinearCrossEntropy(op));

    let len = Layout::new(&config).len;
    let mut one = One::default();
    let norm = one.input(1);
    let (beta1, beta2, epsilon, max_grad_norm) = (0.9, 0.999, 1e-8, 1.0);
    let op = AdamWStep { norm, max_grad_norm, beta1, beta2, epsilon, ranges: vec![(0..len, 0.1)] };
    one.time(&mut group, span(1, len), Op::AdamWStep(op));
    group.finish();
}

fn windows(count: usize, config: &Config) -> Batch {
    let context = config.max_position_embeddings;
    let draw = Philox::new(2, Stream::Test);
    let ids: Vec<u32> = (0..count * context)
        .map(|at| draw.at(0, at as u64)[0] % config.vocab_size as u32)
        .collect();
    let next = |at: usize| if (at + 1).is_multiple_of(context) { IGNORE } else { ids[at + 1] };
    let targets = (0..ids.len()).map(next).collect();
    Batch { windows: count, context, targets, first_key: vec![0; ids.len()], ids }
}

fn step(c: &mut Criterion) {
    let config = original();
    let context = config.max_position_embeddings;
    let optimizer = Optimizer {
        adamw: AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 },
        muon: None,
        weight_decay: 0.1,
        max_grad_norm: 1.0,
    };
    let mut group = c.benchmark_group("step");
    for batch in [1, 8] {
        let micro = [windows(batch, &config)];
        group.throughput(Throughput::Elements((batch * context) as u64));
        for (dtype, cpu) in backends() {
            let mut engine =
                Engine::new(&cpu, &config, &optimizer, batch, context).expect("memory for it");
            let weights = random(Layout::new(&config).len, 7).iter().map(|w| 0.04 * w).collect();
            let weights: Vec<f32> = weights;
            engine.write(Arena::Parameters, &weights).expect("its length");
            let mut count = 0;
            group.bench_function(format!("batch {batch}/{dtype}"), |b| {
                b.iter(|| {
                    count += 1;
                    let hyperparams = StepHyperparams {
                        learning_rate: 1e-4,
                        muon_learning_rate: 0.0,
                        step: count,
                    };
                    engine.step(&micro, hyperparams).expect("complete inputs")
                });
            });
        }
    }
    group.finish();
}

/// 256 new tokens of each sequence, from a prompt of one.
fn generation(c: &mut Criterion) {
    const NEW: usize = 256;
    let config = original();
    let weights: Vec<f32> = random(Layout::new(&config).len, 7).iter().map(|w| 0.04 * w).collect();
    let mut group = c.benchmark_group("generate");
    for sequences in [1, 16] {
        group.throughput(Throughput::Elements((sequences * NEW) as u64));
        let cpu = Cpu::f32(threads());
        let mut generator = Generator::new(&cpu, &config, &weights, sequences, 512)
            .expect("memory for a model of this size");
        group.bench_function(format!("{sequences} at once"), |b| {
            b.iter(|| {
                for sequence in 0..sequences as u32 {
                    let prompt = vec![5 + sequence];
                    let request =
                        Request { prompt, max_new_tokens: NEW, sequence, ..Request::default() };
                    generator.admit(request).expect("a free slot");
                }
                while generator.is_busy() {
                    generator.step().expect("a step");
                }
            });
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    targets = operations, step, generation
}
criterion_main!(benches);
