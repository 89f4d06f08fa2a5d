//! Training steps on a backend: each some windows at a time, then the update.

use std::borrow::Cow;

use serde_json::Value;

use crate::backend::{
    Arena, Backend, BatchSource, Inputs, ProgramId, RunResult, Session, SessionSpec, StepRun,
};
use crate::llama::step::{self, BatchInputs, Losses};
use crate::llama::{Buffer, Optimizer, StepHyperparams, append_update};
use crate::model::{Config, Layout};
use crate::tokens::{Batch, IGNORE, Windows};

/// A model in a backend's memory, ready to step.
pub struct Engine {
    config: Config,
    layout: Layout,
    session: Box<dyn Session>,
    context: usize,
    /// How many windows go through at once.
    micro_batch: usize,
    optimizer: Optimizer,
    /// The programs for as many windows as were needed so far.
    micros: Vec<Micro>,
    evaluations: Vec<Micro>,
    /// The session draws windows by their numbers.
    drawn: bool,
    /// What runs left that were asked about to make room for others.
    ran: Vec<RunResult>,
}

/// A step to come.
#[derive(Clone, Debug)]
pub struct Step {
    /// The numbers of the windows of each of its batches.
    pub batches: Vec<Vec<usize>>,
    pub hyperparams: StepHyperparams,
}

struct Micro {
    windows: usize,
    program: ProgramId,
    inputs: BatchInputs,
    losses: Losses,
    /// Where the last of a step, which ends with the update, leaves the norm of all gradients.
    norm: Option<Buffer>,
}

/// What a step tells.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    /// Mean negative log-likelihood of the counted targets, in nats.
    pub loss: f64,
    /// Norm of all gradients before clipping.
    pub grad_norm: f64,
    /// Targets that counted.
    pub counted: usize,
}

impl Outcome {
    /// Whether the update happened: one with a gradient that is not finite does not.
    pub fn updated(&self) -> bool {
        self.grad_norm.is_finite()
    }
}

impl Engine {
    /// Memory for a model and for steps of at most `windows` windows of `context` tokens. The
    /// parameters are zero until [`Engine::write`] says otherwise.
    pub fn new(
        backend: &dyn Backend,
        config: &Config,
        optimizer: &Optimizer,
        windows: usize,
        context: usize,
    ) -> anyhow::Result<Self> {
        let layout = Layout::new(config);
        let session = backend.open(&layout, SessionSpec { training: true, cache_len: 0 })?;
        let micro_batch = backend.micro_batch(windows, context);
        let config = config.clone();
        let (micros, evaluations) = (Vec::new(), Vec::new());
        Ok(Self {
            config,
            layout,
            session,
            context,
            micro_batch,
            optimizer: *optimizer,
            micros,
            evaluations,
            drawn: false,
            ran: Vec::new(),
        })
    }

    /// Tells of the windows that [`Engine::steps`] will train on: what draws by itself takes them into
    /// its memory, if they fit.
    pub fn hold(&mut self, windows: &Windows, batch_size: usize) -> anyhow::Result<()> {
        if self.session.queue().is_some() {
            // First, so that what is still free is known.
            self.micro(batch_size.min(self.micro_batch).min(windows.len()), true)?;
        }
        if let Some(queue) = self.session.queue() {
            self.drawn = queue.upload_dataset(windows)?;
        }
        Ok(())
    }

    /// Whether steps go on without this side: on a device.
    pub fn is_apart(&mut self) -> bool {
        self.session.queue().is_some()
    }

    /// How many batches of at most `batch_size` windows can be asked for in one go.
    pub fn room(&mut self, batch_size: usize) -> usize {
        let runs = batch_size.div_ceil(self.micro_batch);
        self.session.queue().map_or(1, |queue| queue.capacity() / runs)
    }

    /// Steps on windows by their numbers, one after another. What is asked of a device goes on there
    /// without the host; as soon as all is done, each step's outcome is told.
    pub fn steps(&mut self, windows: &Windows, steps: &[Step]) -> anyhow::Result<Vec<Outcome>> {
        if !self.drawn {
            return self.drawing_here(windows, steps);
        }
        let mut counts = Vec::new();
        let mut runs = Vec::new();
        for Step { batches, hyperparams } in steps {
            let numbers = batches.iter().flatten();
            let counted =
                numbers.map(|&window| windows.counted(window)).sum::<anyhow::Result<usize>>()?;
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
            counts.push(counted);
        }
        self.ask(&runs)?;
        Ok(outcomes(self.ran()?, &counts))
    }

    /// The same with windows drawn on this side, while the device is at work on those before.
    fn drawing_here(&mut self, windows: &Windows, steps: &[Step]) -> anyhow::Result<Vec<Outcome>> {
        self.feed(steps.iter().map(|Step { batches, hyperparams }| {
            let drawn = batches.iter().map(|numbers| windows.draw(numbers));
            Ok((drawn.collect::<anyhow::Result<_>>()?, *hyperparams))
        }))
    }

    /// Steps on batches as they come: the next ones are asked for while a device is at work.
    pub fn feed(
        &mut self,
        steps: impl Iterator<Item = anyhow::Result<(Vec<Batch>, StepHyperparams)>>,
    ) -> anyhow::Result<Vec<Outcome>> {
        let mut counts = Vec::new();
        let mut told = Vec::new();
        for step in steps {
            let (batches, hyperparams) = step?;
            if self.is_apart() {
                counts.push(self.push(&batches, hyperparams)?);
            } else {
                told.push(self.step(&batches, hyperparams)?);
            }
        }
        if self.is_apart() { Ok(outcomes(self.ran()?, &counts)) } else { Ok(told) }
    }

    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Forward and backward of every batch, then one update by their joint mean loss.
    pub fn step(
        &mut self,
        batches: &[Batch],
        hyperparams: StepHyperparams,
    ) -> anyhow::Result<Outcome> {
        if self.is_apart() {
            let counted = self.push(batches, hyperparams)?;
            return Ok(outcomes(self.ran()?, &[counted])[0]);
        }
        let counted: usize = batches.iter().map(Batch::counted).sum();
        let loss_scale = loss_scale(counted);
        let parts = self.parts(batches);
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
        Ok(outcomes(ran, &[counted])[0])
    }

    /// Asks a queue for a step, and tells how many targets count in it.
    fn push(&mut self, batches: &[Batch], hyperparams: StepHyperparams) -> anyhow::Result<usize> {
        let counted: usize = batches.iter().map(Batch::counted).sum();
        let loss_scale = loss_scale(counted);
        let parts = self.parts(batches);
        let last = parts.len() - 1;
        let mut runs = Vec::new();
        for (at, part) in parts.into_iter().enumerate() {
            let program = self.micro(part.windows, at == last)?;
            let program = self.micros[program].program;
            let data = BatchSource::Batch(part);
            runs.push(StepRun { program, data, loss_scale, hyperparams });
        }
        self.ask(&runs)?;
        Ok(counted)
    }

    /// Asks the queue for runs, of which one step may have more than it has room for.
    fn ask(&mut self, mut runs: &[StepRun]) -> anyhow::Result<()> {
        let queue = self.session.queue().expect("the caller knows of one");
        while !runs.is_empty() {
            if queue.capacity() == 0 {
                self.ran.extend(queue.drain()?);
            }
            let (some, later) = runs.split_at(runs.len().min(queue.capacity()));
            queue.enqueue(some)?;
            runs = later;
        }
        Ok(())
    }

    /// What all runs have left that were asked for since the last time.
    fn ran(&mut self) -> anyhow::Result<Vec<RunResult>> {
        let queue = self.session.queue().expect("the caller knows of one");
        let mut ran = std::mem::take(&mut self.ran);
        ran.extend(queue.drain()?);
        Ok(ran)
    }

    /// The windows of all batches, as many together as go through at once.
    fn parts<'a>(&self, batches: &'a [Batch]) -> Vec<Cow<'a, Batch>> {
        let most = self.micro_batch;
        let part = |batch: &'a Batch, from: usize| {
            if batch.windows <= most {
                return Cow::Borrowed(batch);
            }
            Cow::Owned(batch.slice(from, (from + most).min(batch.windows)))
        };
        batches
            .iter()
            .flat_map(|batch| (0..batch.windows).step_by(most).map(move |from| part(batch, from)))
            .collect()
    }

    /// The place of the program that adds the gradients of so many windows and, with the last of a
    /// step, updates. It is made when it is first needed.
    fn micro(&mut self, windows: usize, last: bool) -> anyhow::Result<usize> {
        let is_it = |micro: &Micro| micro.windows == windows && micro.norm.is_some() == last;
        if let Some(at) = self.micros.iter().position(is_it) {
            return Ok(at);
        }
        let mut micro = step::training(&self.config, &self.layout, windows, self.context);
        // One program rather than two: on a device, one launch and one wait.
        let norm = last.then(|| append_update(&mut micro.program, &self.layout, &self.optimizer));
        let (inputs, losses) = (micro.inputs, micro.losses);
        let program = match self.session.queue() {
            Some(queue) => queue.load(micro, norm)?,
            None => self.session.load(micro.program)?,
        };
        self.micros.push(Micro { windows, program, inputs, losses, norm });
        Ok(self.micros.len() - 1)
    }

    /// The best guess at every position of a batch, `[windows, context]`, without training.
    pub fn guesses(&mut self, batch: &Batch) -> anyhow::Result<Vec<u32>> {
        let mut guesses = Vec::with_capacity(batch.ids.len());
        for from in (0..batch.windows).step_by(self.micro_batch) {
            let part = batch.slice(from, (from + self.micro_batch).min(batch.windows));
            if !self.evaluations.iter().any(|micro| micro.windows == part.windows) {
                let eval = step::evaluation(&self.config, &self.layout, part.windows, self.context);
                let program = self.session.load(eval.program)?;
                let (windows, inputs, losses) = (part.windows, eval.inputs, eval.losses);
                self.evaluations.push(Micro { windows, program, inputs, losses, norm: None });
            }
            let eval = self.evaluations.iter().find(|micro| micro.windows == part.windows);
            let eval = eval.expect("it was made above");
            let indices = eval.inputs.bind(part.arrays());
            self.session.run(eval.program, &Inputs { indices, ..Inputs::default() })?;
            guesses.extend(self.session.indices(eval.program, eval.losses.argmax)?);
        }
        Ok(guesses)
    }

    /// A copy of an arena.
    pub fn read(&self, arena: Arena) -> anyhow::Result<Vec<f32>> {
        self.session.read(arena)
    }

    /// Replaces an arena.
    pub fn write(&mut self, arena: Arena, values: &[f32]) -> anyhow::Result<()> {
        self.session.write(arena, values)
    }

    /// Seconds spent in each kind of operation so far, where the backend counts them.
    pub fn profile(&self) -> Vec<(&'static str, f64)> {
        self.session.profile()
    }

    /// What beside the arenas the next step depends on (see [`Session::state`]).
    pub fn state(&self) -> anyhow::Result<Value> {
        self.session.state()
    }

    /// Goes on from such a state; returns what a person should know.
    pub fn restore(&mut self, state: &Value) -> anyhow::Result<Option<String>> {
        self.session.restore(state)
    }

    /// Bytes of memory the session holds.
    pub fn bytes(&self) -> usize {
        self.session.bytes()
    }
}

/// What each counted target's loss counts in the gradient. A step in which none does has no
/// gradient, and a loss of 0.
fn loss_scale(counted: usize) -> f64 {
    1.0 / counted.max(1) as f64
}

/// The outcomes of steps, in which so many targets counted, from those of their runs.
fn outcomes(ran: Vec<RunResult>, counts: &[usize]) -> Vec<Outcome> {
    let mut outcomes = Vec::with_capacity(counts.len());
    let mut sum = 0.0;
    for RunResult { loss, norm } in ran {
        sum += loss;
        if let Some(grad_norm) = norm {
            let counted = counts[outcomes.len()];
            outcomes.push(Outcome { loss: sum * loss_scale(counted), grad_norm, counted });
            sum = 0.0;
        }
    }
    outcomes
}
