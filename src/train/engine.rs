//! Training steps on a backend: gradient accumulation over micro-batches, then the update.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use serde_json::Value;

use crate::backend::{
    Arena, Backend, BatchSource, Inputs, ProgramId, RunResult, Session, SessionSpec, StepRun,
};
use crate::collective::Group;
use crate::llama::slices::{Shards, SlicePlan, SumOrder};
use crate::llama::step::{self, BatchInputs, Losses};
use crate::llama::{
    Buffer, Optimizer, Program, Recompute, StepHyperparams, append_update, sliced_update,
};
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
    /// Slices of a step, if it is cut.
    slicing: Option<Slicing>,
}

/// Division of steps among processes.
#[derive(Clone, Debug)]
pub struct Parallelism {
    /// Processes that train together.
    pub group: Group,
    /// Slices of a step, a multiple of the number of processes: the bits of a step depend on it.
    pub slices: usize,
    /// State that each process keeps a part of.
    pub shard: ShardKind,
}

impl Default for Parallelism {
    /// One process, one slice.
    fn default() -> Self {
        Self { group: Group::alone(), slices: 1, shard: ShardKind::Optimizer }
    }
}

/// State that each of several processes keeps a part of. It changes no bit of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum ShardKind {
    /// Nothing: every process has the whole model and optimizer.
    None,
    /// The optimizer's state and its work (ZeRO-1).
    #[default]
    Optimizer,
}

impl ShardKind {
    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Optimizer => "optimizer",
        }
    }
}

/// Steps that are cut into slices.
struct Slicing {
    group: Group,
    slices: usize,
    plan: SlicePlan,
    /// Programs after each slice of this rank but the last.
    ends: Vec<ProgramId>,
    /// The program after the last slice: sum over all ranks, and update.
    update: ProgramId,
    norm: Buffer,
}

/// The runs of a step that is cut into slices.
struct SlicedRuns {
    counted: usize,
    /// Runs of each slice of this rank; all but the last are followed by a run that ends the slice.
    runs: Vec<usize>,
}

/// A step to be executed.
#[derive(Clone, Debug)]
pub struct TrainStep {
    /// Window indices of each of its batches.
    pub batches: Vec<Vec<usize>>,
    /// Learning rates and step number.
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
    /// Result of a step without a target: it was not executed.
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
        Self::parallel(backend, config, optimizer, batch, seq_len, &Parallelism::default())
    }

    /// [`Engine::new`] for steps that several processes take together, or that are cut into slices as if
    /// they did.
    pub fn parallel(
        backend: &dyn Backend,
        config: &Config,
        optimizer: &Optimizer,
        batch: usize,
        seq_len: usize,
        parallelism: &Parallelism,
    ) -> anyhow::Result<Self> {
        let Parallelism { group, slices, shard } = parallelism;
        let layout = Layout::new(config);
        let shards = Shards::new(&layout, optimizer, group.size(), group.rank());
        let own = *shard == ShardKind::Optimizer && group.size() > 1;
        let moments = own.then(|| (shards.own().start, shards.own().len()));
        let spec = SessionSpec { training: true, moments, ..SessionSpec::default() };
        let mut session = group.agree(backend.open(&layout, spec))?;
        let slicing = if *slices > 1 {
            session.join(group.clone())?;
            let plan = SlicePlan::new(*slices, group.size());
            let new = Slicing::new(&mut *session, &layout, optimizer, group, plan, &shards, own);
            Some(group.agree(new)?)
        } else {
            None
        };
        let micro_batch = backend.micro_batch(batch.div_ceil(*slices), seq_len);
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
            slicing,
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
        // The host draws the windows of its slices.
        if self.slicing.is_some() {
            return Ok(());
        }
        if self.session.queue().is_some() {
            // Loaded first, so that the free memory is known. A batch may hold a window several times.
            self.micro(batch_size.min(self.micro_batch), true)?;
        }
        if let Some(queue) = self.session.queue() {
            self.resident = queue.upload_dataset(windows)?;
        }
        Ok(())
    }

    /// Gives the matmuls of steps on batches of so many windows their algorithms, if the device has a choice: those
    /// of all ranks, whose slices may have one window more.
    pub fn plan_matmuls(&mut self, batches: &[usize]) -> anyhow::Result<()> {
        let Some(slicing) = &self.slicing else { return Ok(()) };
        if self.state()?["matmul_plans"].is_null() {
            return Ok(());
        }
        let (slices, most) = (slicing.slices, self.micro_batch);
        let slices_of = |&batch| (0..slices).map(move |slice| slice_of(slices, slice, batch).len());
        let parts = |len: usize| (0..len).step_by(most).map(move |from| most.min(len - from));
        let mut sizes: Vec<usize> = batches.iter().flat_map(slices_of).flat_map(parts).collect();
        sizes.sort_unstable();
        sizes.dedup();
        for &size in sizes.iter().rev() {
            self.micro(size, false)?;
        }
        self.session.plan_matmuls()
    }

    /// Seconds by the device's clock of some work that waits for no other rank: see [`Session::timed_seconds`].
    pub fn timed_seconds(&self) -> Option<f64> {
        self.session.timed_seconds()
    }

    /// What moves the bytes of exchanges, if it is not the group's library.
    pub fn exchanges(&self) -> Option<String> {
        self.session.exchanges()
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
        if self.slicing.is_some() {
            return self.steps_of_slices(windows, steps);
        }
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
            if self.slicing.is_some() {
                stats.push(self.step(&batches, hyperparams)?);
            } else if self.is_async() {
                counts.push(self.enqueue_step(&batches, hyperparams)?);
            } else {
                stats.push(self.step(&batches, hyperparams)?);
            }
        }
        if self.slicing.is_none() && self.is_async() {
            Ok(step_stats(self.drain()?, &counts))
        } else {
            Ok(stats)
        }
    }

    /// Layout of the arenas.
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
        let counted: usize = batches.iter().map(Batch::counted).sum();
        if let Some(slicing) = &self.slicing {
            let mut step = Vec::new();
            for slice in slicing.plan.of_rank(slicing.group.rank()) {
                let part = |batch: &Batch| {
                    let Range { start, end } = slice_of(slicing.slices, slice, batch.windows);
                    batch.slice(start, end)
                };
                step.push(batches.iter().map(part).filter(|batch| batch.windows > 0).collect());
            }
            return Ok(self.run_slices([Ok((counted, step, hyperparams))].into_iter())?[0]);
        }
        if self.is_async() {
            let counted = self.enqueue_step(batches, hyperparams)?;
            return Ok(step_stats(self.drain()?, &[counted])[0]);
        }
        if counted == 0 {
            return Ok(StepStats::WITHOUT_TARGETS);
        }
        let loss_scale = loss_scale(counted);
        let parts = self.micro_batches(batches);
        let mut ran = Vec::new();
        for (at, part) in parts.iter().enumerate() {
            let is_last = at + 1 == parts.len();
            ran.push(self.run_micro(part, is_last, loss_scale, hyperparams)?);
        }
        Ok(step_stats(ran, &[counted])[0])
    }

    /// Forward and backward of a micro-batch, and the update if it is the last one.
    fn run_micro(
        &mut self,
        part: &Batch,
        last: bool,
        loss_scale: f64,
        hyperparams: StepHyperparams,
    ) -> anyhow::Result<RunResult> {
        let micro = self.micro(part.windows, last)?;
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
        Ok(RunResult { loss, norm })
    }

    /// Executes steps of which this rank draws its slices.
    fn steps_of_slices(
        &mut self,
        windows: &Windows,
        steps: &[TrainStep],
    ) -> anyhow::Result<Vec<StepStats>> {
        let Some(Slicing { group, plan, slices, .. }) = &self.slicing else {
            return Ok(Vec::new());
        };
        let (own, slices) = (plan.of_rank(group.rank()), *slices);
        self.run_slices(steps.iter().map(|TrainStep { batches, hyperparams }| {
            let indices = batches.iter().flatten();
            let counted =
                indices.map(|&window| windows.counted(window)).sum::<anyhow::Result<usize>>()?;
            let drawn = own.clone().map(|slice| {
                let parts =
                    batches.iter().map(|batch| &batch[slice_of(slices, slice, batch.len())]);
                let parts = parts.filter(|part| !part.is_empty());
                parts.map(|part| windows.draw(part)).collect::<anyhow::Result<Vec<Batch>>>()
            });
            Ok((counted, drawn.collect::<anyhow::Result<_>>()?, *hyperparams))
        }))
    }

    /// Executes steps: the counted targets of each in all, and the batches of this rank's slices.
    fn run_slices(
        &mut self,
        steps: impl Iterator<Item = anyhow::Result<(usize, Vec<Vec<Batch>>, StepHyperparams)>>,
    ) -> anyhow::Result<Vec<StepStats>> {
        let (mut done, mut ran) = (Vec::new(), Vec::new());
        for step in steps {
            let (counted, slices, hyperparams) = step?;
            let mut runs = Vec::new();
            if counted > 0 {
                for (at, batches) in slices.iter().enumerate() {
                    let parts = self.micro_batches(batches);
                    runs.push(parts.len());
                    for part in parts {
                        ran.extend(self.run_part(part, loss_scale(counted), hyperparams)?);
                    }
                    ran.extend(self.run_end(at, hyperparams)?);
                }
            }
            done.push(SlicedRuns { counted, runs });
        }
        if self.is_async() {
            ran = self.drain()?;
        }
        self.slicing.as_ref().expect("checked by the caller").stats(&done, ran)
    }

    /// Executes a micro-batch of a slice; a device reports its result later.
    fn run_part(
        &mut self,
        part: Cow<Batch>,
        loss_scale: f64,
        hyperparams: StepHyperparams,
    ) -> anyhow::Result<Option<RunResult>> {
        if !self.is_async() {
            return self.run_micro(&part, false, loss_scale, hyperparams).map(Some);
        }
        let program = self.micro(part.windows, false)?;
        let program = self.micros[program].program;
        let data = BatchSource::Batch(part);
        self.enqueue(&[StepRun { program, data, loss_scale, hyperparams }])?;
        Ok(None)
    }

    /// Executes what comes after slice `at` of this rank: the update after the last one.
    fn run_end(
        &mut self,
        at: usize,
        hyperparams: StepHyperparams,
    ) -> anyhow::Result<Option<RunResult>> {
        let slicing = self.slicing.as_ref().expect("only called with slices");
        let (program, norm) = match slicing.ends.get(at) {
            Some(&end) => (end, None),
            None => (slicing.update, Some(slicing.norm)),
        };
        if self.is_async() {
            let (data, loss_scale) = (BatchSource::None, 1.0);
            self.enqueue(&[StepRun { program, data, loss_scale, hyperparams }])?;
            return Ok(None);
        }
        self.session.run(program, &Inputs { hyperparams, ..Inputs::default() })?;
        let norm = match norm {
            Some(norm) => Some(f64::from(self.session.floats(program, norm)?[0])),
            None => None,
        };
        Ok(Some(RunResult { loss: 0.0, norm }))
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

    /// The most probable token at every position of a batch, `[batch, seq_len]`; IGNORE where the target's
    /// negative log-likelihood is over `max_nats`.
    pub fn argmax_tokens(&mut self, batch: &Batch, max_nats: f32) -> anyhow::Result<Vec<u32>> {
        let mut tokens = Vec::with_capacity(batch.ids.len());
        self.evaluate(batch, |session, eval, _| {
            let argmax = session.indices(eval.program, eval.losses.argmax)?;
            let nll = session.floats(eval.program, eval.losses.nll)?;
            let is_certain = |nll: f32| nll <= max_nats;
            let certain = argmax.into_iter().zip(nll);
            tokens.extend(certain.map(|(id, nll)| if is_certain(nll) { id } else { IGNORE }));
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

    /// An arena: itself if it is in host memory, else a copy. Of the moments, a call of all ranks.
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

    /// Replaces each value of an arena.
    pub fn map(&mut self, arena: Arena, value: &dyn Fn(f32) -> f32) -> anyhow::Result<()> {
        self.session.map(arena, value)
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

impl Slicing {
    fn new(
        session: &mut dyn Session,
        layout: &Layout,
        optimizer: &Optimizer,
        group: &Group,
        plan: SlicePlan,
        shards: &Arc<Shards>,
        own: bool,
    ) -> anyhow::Result<Self> {
        let mut load = |program, norm| match session.queue() {
            Some(queue) => queue.load_end(program, norm),
            None => session.load(program),
        };
        // Slices after which the same is added and kept share a program.
        let mut loaded: Vec<(String, ProgramId)> = Vec::new();
        let mut ends = Vec::new();
        for at in 0..plan.per_rank() - 1 {
            let ops = plan.after(at);
            let text = format!("{ops:?}");
            let known =
                loaded.iter().find(|(other, _)| *other == text).map(|(_, program)| *program);
            let program = match known {
                Some(program) => program,
                None => load(Program { ops, ..Program::default() }, None)?,
            };
            loaded.push((text, program));
            ends.push(program);
        }
        let (program, norm) = sliced_update(layout, optimizer, plan, shards, own);
        let update = load(program, Some(norm))?;
        let slices = plan.of_rank(group.size() - 1).end;
        Ok(Self { group: group.clone(), slices, plan, ends, update, norm })
    }

    /// Stats of steps from the results of this rank's runs: losses are added over the slices of all ranks.
    fn stats(&self, steps: &[SlicedRuns], ran: Vec<RunResult>) -> anyhow::Result<Vec<StepStats>> {
        let mut ran = ran.into_iter();
        let (mut losses, mut norms) = (Vec::new(), Vec::new());
        for SlicedRuns { runs, .. } in steps {
            let mut norm = None;
            for &runs in runs {
                losses.push(ran.by_ref().take(runs).map(|run| run.loss).sum::<f64>());
                norm = ran.next().and_then(|end| end.norm);
            }
            norms.push(norm);
        }
        let per_rank = self.plan.per_rank();
        let all = self.group.gather_each(bytemuck::cast_slice(&losses))?;
        let all: Vec<&[[u8; 8]]> = all.iter().map(|bytes| bytes.as_chunks().0).collect();
        let mut at = 0;
        let stats_of = |(step, norm): (&SlicedRuns, Option<f64>)| {
            let Some(grad_norm) = norm else { return StepStats::WITHOUT_TARGETS };
            let of_step = all.iter().flat_map(|losses| &losses[at..at + per_rank]);
            let mut losses: Vec<f64> = of_step.map(|&bytes| f64::from_le_bytes(bytes)).collect();
            at += per_rank;
            SumOrder::new(self.slices).add(&mut losses, 1);
            let loss = losses[0] * loss_scale(step.counted);
            StepStats { loss, grad_norm, counted: step.counted }
        };
        Ok(steps.iter().zip(norms).map(stats_of).collect())
    }
}

/// The windows of a batch that belong to a slice: contiguous, as many as any other slice has, or one
/// more or less.
fn slice_of(slices: usize, slice: usize, windows: usize) -> Range<usize> {
    slice * windows / slices..(slice + 1) * windows / slices
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
