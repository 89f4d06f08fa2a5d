//! One forward pass over windows: what the model makes of every token, given the true ones before it.

use crate::backend::{Arena, Backend, Inputs, ProgramId, SessionSpec};
use crate::llama::step::{self, Evaluation};
use crate::model::{Config, Layout};
use crate::tokens::{IGNORE, Windows};

/// Losses and predictions of one window.
#[derive(Clone, Copy, Debug)]
pub struct WindowResult<'a> {
    /// The window's number.
    pub window: usize,
    /// The target at each position, or [`IGNORE`].
    pub targets: &'a [u32],
    /// The negative log-likelihood of each target, in nats.
    pub nll: &'a [f32],
    /// The argmax at each position.
    pub argmax: &'a [u32],
}

impl WindowResult<'_> {
    /// Loss of each counted position in order, and whether the argmax is the target.
    pub fn counted(&self) -> impl Iterator<Item = (f32, bool)> {
        let positions = self.targets.iter().zip(self.argmax).zip(self.nll);
        positions
            .filter(|((target, _), _)| **target != IGNORE)
            .map(|((target, guess), &nll)| (nll, target == guess))
    }
}

/// Runs the windows of these numbers through the model, `batch` at a time, in their order.
pub fn pass(
    backend: &dyn Backend,
    config: &Config,
    weights: &[f32],
    windows: &Windows,
    numbers: &[usize],
    batch: usize,
    mut see: impl FnMut(WindowResult) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let layout = Layout::new(config);
    let context = windows.context();
    let mut session = backend.open(&layout, SessionSpec::default())?;
    session.write(Arena::Parameters, weights)?;
    // One program for whole batches, one for the last.
    let mut programs: Vec<(usize, ProgramId, Evaluation)> = Vec::new();
    for some in numbers.chunks(batch.max(1)) {
        let drawn = windows.draw(some)?;
        if programs.last().is_none_or(|(count, ..)| *count != some.len()) {
            let made = step::evaluation(config, &layout, some.len(), context);
            programs.push((some.len(), session.load(made.program.clone())?, made));
        }
        let (_, program, Evaluation { inputs, losses, .. }) =
            programs.last().expect("it was made above");
        let indices = inputs.bind(drawn.arrays());
        session.run(*program, &Inputs { indices, ..Inputs::default() })?;
        let nll = session.floats(*program, losses.nll)?;
        let argmax = session.indices(*program, losses.argmax)?;
        for (at, &window) in some.iter().enumerate() {
            let positions = at * context..(at + 1) * context;
            see(WindowResult {
                window,
                targets: &drawn.targets[positions.clone()],
                nll: &nll[positions.clone()],
                argmax: &argmax[positions],
            })?;
        }
    }
    Ok(())
}
