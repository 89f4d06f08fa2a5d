//! One training step on a backend: some windows at a time, then the update.

use crate::backend::{Arena, Backend, Feed, Loaded, Need, Session};
use crate::llama::step::{self, BatchInputs, Losses};
use crate::llama::{Buffer, Optimizer, Rates, append_update};
use crate::model::{Config, Layout};
use crate::tokens::{Batch, IGNORE};

/// A model in a backend's memory, ready to step.
pub struct Engine {
    config: Config,
    layout: Layout,
    session: Box<dyn Session>,
    context: usize,
    /// How many windows go through at once.
    micro_windows: usize,
    optimizer: Optimizer,
    /// The programs for as many windows as were needed so far.
    micros: Vec<Micro>,
    evaluations: Vec<Micro>,
}

struct Micro {
    windows: usize,
    program: Loaded,
    batch: BatchInputs,
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
        let session = backend.open(&layout, Need { training: true, cache: 0 })?;
        let micro_windows = backend.micro_windows(windows, context);
        let config = config.clone();
        let (micros, evaluations) = (Vec::new(), Vec::new());
        Ok(Self {
            config,
            layout,
            session,
            context,
            micro_windows,
            optimizer: *optimizer,
            micros,
            evaluations,
        })
    }

    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Forward and backward of every batch, then one update by their joint mean loss.
    pub fn step(&mut self, batches: &[Batch], rates: Rates) -> anyhow::Result<Outcome> {
        let counted: usize = batches.iter().map(Batch::counted).sum();
        // A step in which nothing counts has no gradient, and a loss of 0.
        let loss_scale = 1.0 / counted.max(1) as f64;
        let mut parts = Vec::new();
        for batch in batches {
            for from in (0..batch.windows).step_by(self.micro_windows) {
                parts.push(batch.slice(from, (from + self.micro_windows).min(batch.windows)));
            }
        }
        let mut sum = 0.0;
        let mut grad_norm = f64::NAN;
        for (at, part) in parts.iter().enumerate() {
            let last = at + 1 == parts.len();
            let (loss, norm) =
                self.micro(part, last, Feed { loss_scale, rates, ..Feed::default() })?;
            sum += loss;
            grad_norm = norm.unwrap_or(grad_norm);
        }
        Ok(Outcome { loss: sum * loss_scale, grad_norm, counted })
    }

    /// Adds the gradients of a few windows and, with the last of a step, updates. Returns the sum
    /// of the losses and the norm of all gradients.
    fn micro<'a>(
        &mut self,
        batch: &'a Batch,
        last: bool,
        mut feed: Feed<'a>,
    ) -> anyhow::Result<(f64, Option<f64>)> {
        let is_it = |micro: &Micro| micro.windows == batch.windows && micro.norm.is_some() == last;
        if !self.micros.iter().any(is_it) {
            let windows = batch.windows;
            let mut micro = step::training(&self.config, &self.layout, windows, self.context);
            // One program rather than two: on a device, one launch and one wait.
            let norm =
                last.then(|| append_update(&mut micro.program, &self.layout, &self.optimizer));
            let program = self.session.load(micro.program)?;
            let (batch, losses) = (micro.batch, micro.losses);
            self.micros.push(Micro { windows, program, batch, losses, norm });
        }
        let micro = self.micros.iter().find(|micro| is_it(micro)).expect("it was made above");
        feed.indices = micro.batch.feed(batch);
        self.session.run(micro.program, &feed)?;
        let nll = self.session.floats(micro.program, micro.losses.nll)?;
        let counted = nll.iter().zip(&batch.targets).filter(|&(_, &target)| target != IGNORE);
        let loss = counted.map(|(&nll, _)| f64::from(nll)).sum();
        let norm = match micro.norm {
            Some(norm) => Some(f64::from(self.session.floats(micro.program, norm)?[0])),
            None => None,
        };
        Ok((loss, norm))
    }

    /// The best guess at every position of a batch, `[windows, context]`, without training.
    pub fn guesses(&mut self, batch: &Batch) -> anyhow::Result<Vec<u32>> {
        let mut guesses = Vec::with_capacity(batch.ids.len());
        for from in (0..batch.windows).step_by(self.micro_windows) {
            let part = batch.slice(from, (from + self.micro_windows).min(batch.windows));
            if !self.evaluations.iter().any(|micro| micro.windows == part.windows) {
                let eval = step::evaluation(&self.config, &self.layout, part.windows, self.context);
                let program = self.session.load(eval.program)?;
                let (windows, batch, losses) = (part.windows, eval.batch, eval.losses);
                self.evaluations.push(Micro { windows, program, batch, losses, norm: None });
            }
            let eval = self.evaluations.iter().find(|micro| micro.windows == part.windows);
            let eval = eval.expect("it was made above");
            let indices = eval.batch.feed(&part);
            self.session.run(eval.program, &Feed { indices, ..Feed::default() })?;
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

    /// Bytes of memory the session holds.
    pub fn bytes(&self) -> usize {
        self.session.bytes()
    }
}
