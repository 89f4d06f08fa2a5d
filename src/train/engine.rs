//! Training steps on a backend: gradient accumulation over micro-batches, then the update.

use std::borrow::Cow;

use serde_json::Value;

use crate::backend::{
    Arena, Backend, BatchSource, Inputs, ProgramId, RunResult, Session, SessionSpec, StepRun,
};
use crate::llama::step::{self, BatchInputs, Losses};
use crate::llama::{Buffer, Optimizer, Recompute, StepHyperparams, append_update};
use crate::model::{Config, Layout};
use crate::tokens::{Batch, IGNORE, Windows};

/// A model in a backend's memory, with the programs of its training steps.
pub struct Engine {
    config: Config,
    layout: Layout,
    session: Box<dyn Session>,
    seq_len: usize,
    /// Micro-batch size, in windows.
    micro_batch: usize,
    optimizer: Optimizer,
    recompute: Recompute,
    /// Training programs by batch size, built on first use.
    micros: Vec<LoadedBatch>,
    evaluations: Vec<LoadedBatch>,
    /// The device gathers windows itself.
    resident: bool,
    /// Results of runs that were drained to make room for others.
    drained: Vec<RunResult>,
}

/// A step to be executed.
#[derive(Clone, Debug)]
pub struct TrainStep {
    /// Window indices of each of its batches.
    pub batches: Vec<Vec<usize>>,
    pub hyperparams: StepHyperparams,
}

/// A loaded program for one batch size.
struct LoadedBatch {
    /// Batch size, in windows.
    batch: usize,
    program: ProgramId,
    inputs: BatchInputs,
    losses: Losses,
    /// Gradient norm, if the program ends with the update.
    norm: Option<Buffer>,
}

/// Results of a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepStats {
    /// Mean negative log-likelihood of the counted targets, in nats; NaN without any.
    pub loss: f64,
    /// Gradient norm before clipping.
    pub grad_norm: f64,
    /// Number of targets that count in the loss.
    pub counted: usize,
}

impl StepStats {
    /// Of a step without a target: it was not executed.
    const WITHOUT_TARGETS: Self = Self { loss: f64::NAN, grad_norm: f64::NAN, counted: 0 };

    /// True if the parameters were updated: a step with non-finite gradients, or without a target, is
    /// skipped.
    pub fn updated(&self) -> bool {
        self.grad_norm.is_finite()
    }
}

impl Engine {
    /// Allocates a model and steps of at most `batch` windows of `seq_len` tokens. The parameters are
    /// zero until [`Engine::write`].
    pub fn new(
        backend: &dyn Backend,
        config: &Config,
        optimizer: &Optimizer,
        batch: usize,
        seq_len: usize,
    ) -> anyhow::Result<Self> {
        let layout = Layout::new(config);
        let session = backend.open(&layout, SessionSpec { training: true, cache_len: 0 })?;
        let micro_batch = backend.micro_batch(batch, seq_len);
        let config = config.clone();
        let (micros, evaluations) = (Vec::new(), Vec::new());
        Ok(Self {
            config,
            layout,
            session,
            seq_len,
            micro_batch,
            optimizer: *optimizer,
            recompute: Recompute::None,
            micros,
            evaluations,
            resident: false,
            drained: Vec::new(),
        })
    }

    /// Sets what backward computes again, before the first step.
    #[must_use]
    pub fn with_recompute(mut self, recompute: Recompute) -> Self {
        self.recompute = recompute;
        self
    }

    /// Uploads the windows that [`Engine::steps`] trains on, if the device can gather them itself and
    /// they fit.
    pub fn upload_dataset(&mut self, windows: &Windows, batch_size: usize) -> anyhow::Result<()> {
        if self.session.queue().is_some() {
            // Loaded first, so that the free memory is known.
            self.micro(batch_size.min(self.micro_batch).min(windows.len()), true)?;
        }
        if let Some(queue) = self.session.queue() {
            self.resident = queue.upload_dataset(windows)?;
        }
        Ok(())
    }

    /// True if steps run on a device without host synchronization.
    pub fn is_async(&mut self) -> bool {
        self.session.queue().is_some()
    }

    /// Number of batches of at most `batch_size` windows that can be enqueued at once.
    pub fn queue_capacity(&mut self, batch_size: usize) -> usize {
        let runs = batch_size.div_ceil(self.micro_batch);
        self.session.queue().map_or(1, |queue| queue.capacity() / runs)
    }

    /// Executes steps on windows by their indices. A device executes all of them without host
    /// synchronization.
    pub fn steps(
        &mut self,
        windows: &Windows,
        steps: &[TrainStep],
    ) -> anyhow::Result<Vec<StepStats>> {
        if !self.resident {
            return self.steps_host_sampled(windows, steps);
        }
        let mut counts = Vec::new();
        let mut runs = Vec::new();
        for TrainStep { batches, hyperparams } in steps {
            let indices = batches.iter().flatten();
            let counted =
                indices.map(|&window| windows.counted(window)).sum::<anyhow::Result<usize>>()?;
            counts.push(counted);
            if counted == 0 {
                continue;
            }
            let parts: Vec<&[usize]> =
                batches.iter().flat_map(|batch| batch.chunks(self.micro_batch)).collect();
            for (at, part) in parts.iter().enumerate() {
                let program = self.micro(part.len(), at + 1 == parts.len())?;
                let program = self.micros[program].program;
                let loss_scale = loss_scale(counted);
                runs.push(StepRun {
                    program,
                    data: BatchSource::Windows(part),
                    loss_scale,
                    hyperparams: *hyperparams,
                });
            }
        }
        self.enqueue(&runs)?;
        Ok(step_stats(self.drain()?, &counts))
    }

    /// Executes steps whose windows the host samples while the device works on earlier ones.
    fn steps_host_sampled(
        &mut self,
        windows: &Windows,
        steps: &[TrainStep],
    ) -> anyhow::Result<Vec<StepStats>> {
        self.run_steps(steps.iter().map(|TrainStep { batches, hyperparams }| {
            let drawn = batches.iter().map(|numbers| windows.draw(numbers));
            Ok((drawn.collect::<anyhow::Result<_>>()?, *hyperparams))
        }))
    }

    /// Executes steps on batches from an iterator, which runs ahead of a device.
    pub fn run_steps(
        &mut self,
        steps: impl Iterator<Item = anyhow::Result<(Vec<Batch>, StepHyperparams)>>,
    ) -> anyhow::Result<Vec<StepStats>> {
        let mut counts = Vec::new();
        let mut stats = Vec::new();
        for step in steps {
            let (batches, hyperparams) = step?;
            if self.is_async() {
                counts.push(self.enqueue_step(&batches, hyperparams)?);
            } else {
                stats.push(self.step(&batches, hyperparams)?);
            }
        }
        if self.is_async() { Ok(step_stats(self.drain()?, &counts)) } else { Ok(stats) }
    }

    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Forward and backward of every batch, then one update for their joint mean loss. A step without a
    /// target changes nothing.
    pub fn step(
        &mut self,
        batches: &[Batch],
        hyperparams: StepHyperparams,
    ) -> anyhow::Result<StepStats> {
        if self.is_async() {
            let counted = self.enqueue_step(batches, hyperparams)?;
            return Ok(step_stats(self.drain()?, &[counted])[0]);
        }
        let counted: usize = batches.iter().map(Batch::counted).sum();
        if counted == 0 {
            return Ok(StepStats::WITHOUT_TARGETS);
        }
        let loss_scale = loss_scale(counted);
        let parts = self.micro_batches(batches);
        let mut ran = Vec::new();
        for (at, part) in parts.iter().enumerate() {
            let micro = self.micro(part.windows, at + 1 == parts.len())?;
            let micro = &self.micros[micro];
            let indices = micro.inputs.bind(part.arrays());
            let inputs = Inputs { indices, loss_scale, hyperparams, ..Inputs::default() };
            self.session.run(micro.program, &inputs)?;
            let nll = self.session.floats(micro.program, micro.losses.nll)?;
            let counted = nll.iter().zip(&part.targets).filter(|&(_, &target)| target != IGNORE);
            let loss = counted.map(|(&nll, _)| f64::from(nll)).sum();
            let norm = match micro.norm {
                Some(norm) => Some(f64::from(self.session.floats(micro.program, norm)?[0])),
                None => None,
            };
            ran.push(RunResult { loss, norm });
        }
        Ok(step_stats(ran, &[counted])[0])
    }

    /// Enqueues a step, and returns the number of its counted targets.
    fn enqueue_step(
        &mut self,
        batches: &[Batch],
        hyperparams: StepHyperparams,
    ) -> anyhow::Result<usize> {
        let counted: usize = batches.iter().map(Batch::counted).sum();
        if counted == 0 {
            return Ok(0);
        }
        let loss_scale = loss_scale(counted);
        let parts = self.micro_batches(batches);
        let last = parts.len() - 1;
        let mut runs = Vec::new();
        for (at, part) in parts.into_iter().enumerate() {
            let program = self.micro(part.windows, at == last)?;
            let program = self.micros[program].program;
            let data = BatchSource::Batch(part);
            runs.push(StepRun { program, data, loss_scale, hyperparams });
        }
        self.enqueue(&runs)?;
        Ok(counted)
    }

    /// Enqueues runs, draining the queue when it is full.
    fn enqueue(&mut self, mut runs: &[StepRun]) -> anyhow::Result<()> {
        let queue = self.session.queue().expect("only called with a queue");
        while !runs.is_empty() {
            if queue.capacity() == 0 {
                self.drained.extend(queue.drain()?);
            }
            let (some, later) = runs.split_at(runs.len().min(queue.capacity()));
            queue.enqueue(some)?;
            runs = later;
        }
        Ok(())
    }

    /// Waits for all runs, and returns their results.
    fn drain(&mut self) -> anyhow::Result<Vec<RunResult>> {
        let queue = self.session.queue().expect("only called with a queue");
        let mut ran = std::mem::take(&mut self.drained);
        ran.extend(queue.drain()?);
        Ok(ran)
    }

    /// Splits batches into micro-batches.
    fn micro_batches<'a>(&self, batches: &'a [Batch]) -> Vec<Cow<'a, Batch>> {
        let size = self.micro_batch;
        let part = |batch: &'a Batch, from: usize| {
            if batch.windows <= size {
                return Cow::Borrowed(batch);
            }
            Cow::Owned(batch.slice(from, (from + size).min(batch.windows)))
        };
        batches
            .iter()
            .flat_map(|batch| (0..batch.windows).step_by(size).map(move |from| part(batch, from)))
            .collect()
    }

    /// Index of the training program for `batch` windows, which ends with the update if `last`. Built on
    /// first use.
    fn micro(&mut self, batch: usize, last: bool) -> anyhow::Result<usize> {
        let is_it = |micro: &LoadedBatch| micro.batch == batch && micro.norm.is_some() == last;
        if let Some(at) = self.micros.iter().position(is_it) {
            return Ok(at);
        }
        let mut micro =
            step::training(&self.config, &self.layout, batch, self.seq_len, self.recompute);
        // One program with the update in it: one graph launch on a device.
        let norm = last.then(|| append_update(&mut micro.program, &self.layout, &self.optimizer));
        let (inputs, losses) = (micro.inputs, micro.losses);
        let program = match self.session.queue() {
            Some(queue) => queue.load(micro, norm)?,
            None => self.session.load(micro.program)?,
        };
        self.micros.push(LoadedBatch { batch, program, inputs, losses, norm });
        Ok(self.micros.len() - 1)
    }

    /// The most probable token at every position of a batch, `[batch, seq_len]`.
    pub fn argmax_tokens(&mut self, batch: &Batch) -> anyhow::Result<Vec<u32>> {
        let mut tokens = Vec::with_capacity(batch.ids.len());
        self.evaluate(batch, |session, eval, _| {
            tokens.extend(session.indices(eval.program, eval.losses.argmax)?);
            Ok(())
        })?;
        Ok(tokens)
    }

    /// Sum of the negative log-likelihoods of the counted targets of a batch, in nats, and their number.
    pub fn loss_of(&mut self, batch: &Batch) -> anyhow::Result<(f64, usize)> {
        let (mut nats, mut count) = (0.0, 0);
        self.evaluate(batch, |session, eval, part| {
            let nll = session.floats(eval.program, eval.losses.nll)?;
            for (&nll, _) in nll.iter().zip(&part.targets).filter(|&(_, &target)| target != IGNORE)
            {
                nats += f64::from(nll);
                count += 1;
            }
            Ok(())
        })?;
        Ok((nats, count))
    }

    /// Runs the forward pass of a batch, a micro-batch at a time; `read` gets each one's results.
    fn evaluate(
        &mut self,
        batch: &Batch,
        mut read: impl FnMut(&mut dyn Session, &LoadedBatch, &Batch) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        for from in (0..batch.windows).step_by(self.micro_batch) {
            let part = batch.slice(from, (from + self.micro_batch).min(batch.windows));
            if !self.evaluations.iter().any(|eval| eval.batch == part.windows) {
                let eval = step::evaluation(&self.config, &self.layout, part.windows, self.seq_len);
                let program = self.session.load(eval.program)?;
                let (batch, inputs, losses) = (part.windows, eval.inputs, eval.losses);
                self.evaluations.push(LoadedBatch { batch, program, inputs, losses, norm: None });
            }
            let eval = self.evaluations.iter().find(|eval| eval.batch == part.windows);
            let eval = eval.expect("loaded above");
            let indices = eval.inputs.bind(part.arrays());
            self.session.run(eval.program, &Inputs { indices, ..Inputs::default() })?;
            read(&mut *self.session, eval, &part)?;
        }
        Ok(())
    }

    /// An arena: itself if it is in host memory, else a copy.
    pub fn arena(&self, arena: Arena) -> anyhow::Result<Cow<'_, [f32]>> {
        Ok(match self.session.arena(arena) {
            Some(values) => Cow::Borrowed(values),
            None => Cow::Owned(self.session.read(arena)?),
        })
    }

    /// Dynamic loss scale, if losses are scaled.
    pub fn loss_scale(&self) -> anyhow::Result<Option<f64>> {
        Ok(self.state()?["loss_scale"][0].as_f64())
    }

    /// A copy of an arena.
    pub fn read(&self, arena: Arena) -> anyhow::Result<Vec<f32>> {
        self.session.read(arena)
    }

    /// Replaces an arena.
    pub fn write(&mut self, arena: Arena, values: &[f32]) -> anyhow::Result<()> {
        self.session.write(arena, values)
    }

    /// Seconds spent in each kind of op so far; empty if the backend does not profile.
    pub fn profile(&self) -> Vec<(&'static str, f64)> {
        self.session.profile()
    }

    /// State beside the arenas that the next step depends on (see [`Session::state`]).
    pub fn state(&self) -> anyhow::Result<Value> {
        self.session.state()
    }

    /// Restores such a state; returns a warning if it cannot be restored in full.
    pub fn restore(&mut self, state: &Value) -> anyhow::Result<Option<String>> {
        self.session.restore(state)
    }

    /// Bytes allocated by the session.
    pub fn bytes(&self) -> usize {
        self.session.bytes()
    }
}

/// Weight of each counted target's loss in the gradient.
fn loss_scale(counted: usize) -> f64 {
    1.0 / counted as f64
}

/// Stats of steps from the results of their runs; `counts` are the counted targets of each step. A step
/// without any had no run.
fn step_stats(ran: Vec<RunResult>, counts: &[usize]) -> Vec<StepStats> {
    let mut ran = ran.into_iter();
    let stats_of = |&counted: &usize| {
        if counted == 0 {
            return StepStats::WITHOUT_TARGETS;
        }
        let mut sum = 0.0;
        let norm = ran.by_ref().find_map(|RunResult { loss, norm }| {
            sum += loss;
            norm
        });
        let grad_norm = norm.expect("the last run of a step ends with the update");
        StepStats { loss: sum * loss_scale(counted), grad_norm, counted }
    };
    counts.iter().map(stats_of).collect()
}
