//! Timing of whole training steps.

use std::time::Instant;

use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::backend::{Arena, Backend};
use crate::collective::Group;
use crate::corpus::hex;
use crate::llama::{
    AdamW, Cost, Muon, Optimizer, Program, Recompute, StepHyperparams, append_update, step,
};
use crate::model::{Config, Layout};
use crate::random::{Philox, Stream};
use crate::tokens::{Batch, IGNORE, Windows};
use crate::train::{Engine, Parallelism, ShardKind, TrainStep, peak_memory_bytes};

use super::roofline::Ceiling;

/// Least duration of one measurement on a device, which times several steps together.
const MIN_TIMED_SECONDS: f64 = 0.2;

/// Timing of training steps.
#[derive(Clone, Debug, Serialize)]
pub struct Timing {
    /// Name of the backend.
    pub backend: String,
    /// Device, in words.
    pub device: String,
    /// Preset of the model's shape.
    pub preset: String,
    /// Compute dtype.
    pub precision: String,
    /// Windows per step.
    pub batch: usize,
    /// Tokens per window.
    pub context: usize,
    /// Parameters of the model.
    pub parameters: usize,
    /// Median of the timed steps.
    pub step_seconds: f64,
    /// Tokens per second of the median step.
    pub tokens_per_second: f64,
    /// Model FLOP/s (recomputation not counted) in units of 1e12.
    pub teraflops: f64,
    /// Model FLOPs utilization: the share of the device's peak, if known.
    pub mfu: Option<f64>,
    /// Roofline floor of a step in seconds, if the device's ceilings were measured.
    pub floor: Option<f64>,
    /// Seconds of the fastest timed step.
    pub fastest: f64,
    /// Seconds of the slowest timed step.
    pub slowest: f64,
    /// Peak resident memory of the process.
    pub peak_bytes: u64,
    /// Memory of the model, its optimizer and its activations, on the device if there is one.
    pub model_bytes: usize,
    /// Losses of the first and the last step.
    pub losses: [f64; 2],
    /// Seconds per step in each kind of op, longest first.
    pub operations: Vec<(&'static str, f64)>,
}

/// Measured roofline ceilings of a device.
#[derive(Clone, Copy, Debug)]
pub struct Ceilings {
    /// Bytes per second, read or written.
    pub bytes: f64,
    /// FLOP per second of matmuls.
    pub flops: f64,
    /// Exponentials per second.
    pub exponentials: f64,
}

impl Ceilings {
    /// The ceilings that [`measure`](super::roofline::measure) returned, if none is missing.
    pub fn of(found: &[Ceiling]) -> Option<Ceilings> {
        let value = |name| Some(found.iter().find(|ceiling| ceiling.name == name)?.value);
        Some(Ceilings {
            bytes: value("copy")? * 1e9,
            flops: value("matmul, bf16")? * 1e12,
            exponentials: value("ex2.approx")? * 1e12,
        })
    }

    /// Roofline floor of a program: the sum over ops of the time at the binding ceiling.
    fn floor(&self, program: &Program, arena: usize) -> f64 {
        let seconds = |cost: Cost| {
            let bytes = cost.bytes as f64 / self.bytes;
            let flops = cost.flops as f64 / self.flops;
            bytes.max(flops).max(cost.exponentials as f64 / self.exponentials)
        };
        program.costs(arena).map(|(_, cost)| seconds(cost)).sum()
    }
}

/// Tokens per second of several ranks beside those of one.
#[derive(Clone, Debug, Serialize)]
pub struct Scaling {
    /// Number of processes.
    pub ranks: usize,
    /// Tokens per second of rank 0 alone, on `batch` windows.
    pub alone: f64,
    /// Tokens per second of all ranks, on `batch` windows together.
    pub strong: f64,
    /// `strong` over `ranks` times `alone`.
    pub strong_efficiency: f64,
    /// Tokens per second of all ranks, on `batch` windows each.
    pub weak: f64,
    /// `weak` over `ranks` times `alone`.
    pub weak_efficiency: f64,
}

/// The steps that are timed.
#[derive(Clone, Copy)]
pub struct TimedSteps<'a> {
    /// Preset of the model's shape, for the report.
    pub preset: &'a str,
    /// The model.
    pub config: &'a Config,
    /// Muon, or AdamW alone.
    pub muon: Option<Muon>,
    /// Windows per step.
    pub batch: usize,
    /// Untimed steps.
    pub warmup: usize,
    /// Timed steps.
    pub steps: usize,
    /// Windows that are drawn as in training, on the device if it can; random tokens from the host if
    /// `None`.
    pub windows: Option<&'a Windows>,
}

/// Times steps of one rank, then of all ranks on as many windows, then on as many each.
pub fn time_scaling(
    backend: &dyn Backend,
    timed: TimedSteps,
    group: &Group,
) -> anyhow::Result<Scaling> {
    let ranks = group.size();
    let (batch, shard) = (timed.batch, ShardKind::Optimizer);
    let time = |batch, parallelism: &Parallelism| {
        let timing = time(backend, TimedSteps { batch, ..timed }, None, parallelism)?;
        anyhow::Ok(timing.tokens_per_second)
    };
    let alone = if group.is_first() { time(batch, &Parallelism::default()) } else { Ok(0.0) };
    let alone = group.agree_after_first(alone)?;
    let all = Parallelism { group: group.clone(), slices: ranks, shard };
    let (strong, weak) = (time(batch, &all)?, time(ranks * batch, &all)?);
    let efficiency = |rate: f64| rate / (ranks as f64 * alone);
    Ok(Scaling {
        ranks,
        alone,
        strong,
        strong_efficiency: efficiency(strong),
        weak,
        weak_efficiency: efficiency(weak),
    })
}

/// Times steps from random weights.
pub fn time(
    backend: &dyn Backend,
    timed: TimedSteps,
    ceilings: Option<Ceilings>,
    parallelism: &Parallelism,
) -> anyhow::Result<Timing> {
    let TimedSteps { preset, config, muon, batch, warmup, steps, windows } = timed;
    let context = config.max_position_embeddings;
    let optimizer = optimizer(muon);
    let group = &parallelism.group;
    let mut engine = random_model(backend, config, &optimizer, batch, parallelism)?;
    let layout = Layout::new(config);
    if let Some(windows) = windows {
        engine.upload_dataset(windows, batch)?;
    }

    // A device runs several steps without synchronization, as in training.
    let mut together = 1;
    let mut seconds = Vec::with_capacity(steps);
    let mut losses = [f64::NAN; 2];
    let mut before = Vec::new();
    let mut done = 0;
    for round in 0..warmup + steps {
        let numbers = done..done + together;
        let (mut random, mut drawn) = (Vec::new(), Vec::new());
        match windows {
            Some(windows) => drawn.extend(numbers.map(|step| drawn_step(windows, batch, step))),
            None => random.extend(numbers.map(|step| Ok(random_step(config, batch, step)))),
        }
        if round == warmup {
            before = engine.profile();
        }
        let start = Instant::now();
        let outcomes = match windows {
            Some(windows) => engine.steps(windows, &drawn)?,
            None => engine.run_steps(random.into_iter())?,
        };
        let pace = start.elapsed().as_secs_f64() / together as f64;
        if round >= warmup {
            seconds.push(pace);
        }
        let last = outcomes.last().expect("as many as steps").loss;
        losses = [if done == 0 { outcomes[0].loss } else { losses[0] }, last];
        done += together;
        if engine.is_async() && round + 1 == warmup {
            // By the time that steps took, which differs from rank to rank.
            let most = engine.queue_capacity(batch).min(100);
            let fits = ((MIN_TIMED_SECONDS / pace) as usize).clamp(1, most);
            together = group.decide(fits as u64)? as usize;
        }
    }
    let timed = seconds.len() * together;
    let warm = |name| before.iter().find(|(other, _)| *other == name).map_or(0.0, |(_, s)| *s);
    let mut operations: Vec<_> = engine
        .profile()
        .into_iter()
        .map(|(name, seconds)| (name, (seconds - warm(name)) / timed as f64))
        .collect();
    operations.sort_by(|a, b| b.1.total_cmp(&a.1));
    seconds.sort_by(f64::total_cmp);
    let median = seconds[seconds.len() / 2];
    let flops = config.training_flops(context) as f64 * (batch * context) as f64 / median;
    let floor = ceilings.map(|ceilings| {
        let mut program = step::training(config, &layout, batch, context, Recompute::None).program;
        append_update(&mut program, &layout, &optimizer);
        ceilings.floor(&program, layout.len)
    });
    Ok(Timing {
        backend: backend.name().to_string(),
        device: backend.device(),
        preset: preset.to_string(),
        precision: backend.compute_dtype().name().to_string(),
        batch,
        context,
        parameters: layout.parameter_count(),
        step_seconds: median,
        tokens_per_second: (batch * context) as f64 / median,
        teraflops: flops / 1e12,
        mfu: backend.peak_flops().map(|peak| flops / peak),
        floor,
        fastest: seconds[0],
        slowest: seconds[seconds.len() - 1],
        peak_bytes: peak_memory_bytes(),
        model_bytes: engine.bytes(),
        losses,
        operations,
    })
}

/// SHA-256 of the losses of `steps` steps and of the parameters after them.
pub fn digest(
    backend: &dyn Backend,
    config: &Config,
    batch: usize,
    steps: usize,
) -> anyhow::Result<String> {
    let parallelism = Parallelism::default();
    let mut engine = random_model(backend, config, &optimizer(None), batch, &parallelism)?;
    let mut hash = Sha256::new();
    for step in 0..steps {
        for outcome in engine.run_steps(std::iter::once(Ok(random_step(config, batch, step))))? {
            hash.update(outcome.loss.to_le_bytes());
        }
    }
    hash.update(bytemuck::cast_slice::<f32, u8>(&engine.arena(Arena::Parameters)?));
    Ok(hex(&hash.finalize()))
}

/// The optimizer of timed steps.
pub fn optimizer(muon: Option<Muon>) -> Optimizer {
    Optimizer {
        adamw: AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 },
        muon,
        weight_decay: 0.1,
        max_grad_norm: 1.0,
    }
}

/// A model with random weights.
fn random_model(
    backend: &dyn Backend,
    config: &Config,
    optimizer: &Optimizer,
    batch: usize,
    parallelism: &Parallelism,
) -> anyhow::Result<Engine> {
    let context = config.max_position_embeddings;
    let mut engine = Engine::parallel(backend, config, optimizer, batch, context, parallelism)?;
    let mut arena = vec![0.0; Layout::new(config).len];
    Philox::new(0, Stream::Init).fill_normal(0, config.initializer_range, &mut arena);
    engine.write(Arena::Parameters, &arena)?;
    Ok(engine)
}

/// Batches and hyperparameters of the step after `step` others.
fn random_step(config: &Config, batch: usize, step: usize) -> (Vec<Batch>, StepHyperparams) {
    let context = config.max_position_embeddings;
    let windows = random_windows(batch, context, config.vocab_size, step as u32);
    (vec![windows], hyperparams(step))
}

/// The step after `step` others on windows in their order, again and again.
fn drawn_step(windows: &Windows, batch: usize, step: usize) -> TrainStep {
    let numbers = (step * batch..(step + 1) * batch).map(|at| at % windows.len()).collect();
    TrainStep { batches: vec![numbers], hyperparams: hyperparams(step) }
}

fn hyperparams(step: usize) -> StepHyperparams {
    StepHyperparams { learning_rate: 1e-3, muon_learning_rate: 0.02, step: step as u64 + 1 }
}

fn random_windows(windows: usize, context: usize, vocab: usize, step: u32) -> Batch {
    let random = Philox::new(0, Stream::Test);
    let ids: Vec<u32> =
        (0..windows * context).map(|at| random.at(step, at as u64)[0] % vocab as u32).collect();
    let next = |at: usize| if (at + 1).is_multiple_of(context) { IGNORE } else { ids[at + 1] };
    let targets = (0..ids.len()).map(next).collect();
    Batch { windows, context, targets, first_key: vec![0; ids.len()], ids }
}
