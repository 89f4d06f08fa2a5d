//! Every operation of the CPU backend at 512 tokens of the original model (`Size::Sequence` of the
//! cases that `laam check` runs), a training step, and generation. The original model: hidden 64, 8
//! layers, 32 query and 4 key/value heads of 2, a vocabulary of 32,768, sequences of 512.
//!
//!     cargo bench --bench cpu                                  # everything, some minutes
//!     cargo bench --bench cpu -- fused_linear_cross_entropy    # names that contain this
//!     cargo bench --bench cpu -- --test                        # each once, untimed
//!
//! Every name ends in the matmuls' dtype: `f32`, `bf16` if the processor has it, and `portable`, which
//! is f32 without kernels for this processor's instruction set.

use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use laam::backend::cpu::{Cpu, CpuKernels};
use laam::backend::{Arena, Backend};
use laam::bench::check::{Size, cases};
use laam::dtype::Dtype;
use laam::generate::{Generator, Request};
use laam::llama::{AdamW, Optimizer, StepHyperparams};
use laam::model::{Config, Layout, preset};
use laam::random::{Philox, Stream};
use laam::tokens::{Batch, IGNORE};
use laam::train::Engine;

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn backends() -> Vec<(&'static str, Cpu)> {
    let (f32, bf16) = (Cpu::f32(threads()), Cpu::bf16(threads()));
    let portable = Cpu { kernels: CpuKernels::Portable, ..f32 };
    let all = [("f32", f32), ("portable", portable), ("bf16", bf16)];
    // Without bfloat16 in the processor it is f32.
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

fn operations(c: &mut Criterion) {
    let mut group = c.benchmark_group("operation");
    for (name, cpu) in backends() {
        for case in cases(Size::Sequence, cpu.compute_dtype(), 1, |_| true) {
            let mut prepared = case.prepare(&cpu).expect("memory for it");
            group.bench_function(format!("{}/{}/{name}", case.operation, case.shape), |b| {
                b.iter(|| prepared.time().expect("complete inputs"));
            });
        }
    }
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
