//! The verbatim rate and the validation loss of a run, and the step at which they were best.

use super::Trainer;
use crate::backend::Arena;
use crate::dtype::Dtype;
use crate::memorization::recall::{self, RecallFile, RecallHead};
use crate::memorization::verbatim;

/// A measurement of the verbatim windows.
pub(super) struct VerbatimWindows {
    /// The part of the windows that are long enough.
    pub rate: Option<f64>,
    /// Which windows come back.
    pub verbatim: Vec<bool>,
}

impl Trainer<'_> {
    /// The step with the best measure, if the run is to end with its weights.
    pub(super) fn best_step(&self) -> Option<u64> {
        let by_loss =
            self.state.best_validation.filter(|_| self.job.settings.load_best_model_at_end);
        self.state.best.or(by_loss).map(|(_, step)| step)
    }

    /// The step whose weights are the finished model's.
    pub(super) fn final_step(&self) -> u64 {
        self.best_step().unwrap_or(self.state.step)
    }

    pub(super) fn is_enough(&self, verbatim_rate: Option<f64>) -> bool {
        let wanted = self.job.settings.stop_at_verbatim;
        wanted.is_some_and(|wanted| verbatim_rate.is_some_and(|rate| rate >= wanted))
    }

    /// Notes this step if no step before it had a higher verbatim rate: of equals the last has learned most. A rate
    /// of 0 tells no step from another.
    pub(super) fn note_best(&mut self, verbatim_rate: Option<f64>) -> bool {
        let Some(rate) = verbatim_rate.filter(|&rate| rate > 0.0) else { return false };
        let is_best = self.state.best.is_none_or(|(best, _)| rate >= best);
        if is_best {
            self.state.best = Some((rate, self.state.step));
        }
        is_best
    }

    /// True if this is the lowest validation loss; its checkpoint is then kept.
    pub(super) fn note_best_validation(&mut self, loss: Option<f64>) -> bool {
        let Some(loss) = loss.filter(|loss| loss.is_finite()) else { return false };
        let is_best = self.state.best_validation.is_none_or(|(best, _)| loss < best);
        if is_best {
            self.state.best_validation = Some((loss, self.state.step));
        }
        is_best
    }

    /// Mean loss of the validation windows, in nats per counted token.
    pub(super) fn validation_loss(&mut self) -> anyhow::Result<f64> {
        let Some((windows, numbers)) = self.job.validation else { return Ok(f64::NAN) };
        let (mut nats, mut count) = (0.0, 0);
        for some in numbers.chunks(64) {
            let (sum, counted) = self.engine.loss_of(&windows.draw(some)?)?;
            nats += sum;
            count += counted;
        }
        Ok(nats / count as f64)
    }

    /// Opens the file of the windows recalled, if they are measured; one of another run is removed.
    pub(super) fn open_recall(&self) -> anyhow::Result<Option<RecallFile>> {
        let path = self.job.output.path().join(recall::FILE);
        if self.eval_interval.is_none() {
            recall::remove(&path)?;
            return Ok(None);
        }
        let step = (!self.unsaved).then_some(self.state.step);
        RecallFile::open(&path, &RecallHead::of(self.job.windows)?, step).map(Some)
    }

    /// Measures the verbatim windows, and notes the others if they are to be drawn more often: with those of earlier
    /// measurements, which would else be lost again.
    pub(super) fn measure_verbatim(&mut self) -> anyhow::Result<VerbatimWindows> {
        let found = self.verbatim_windows()?;
        let found = self.of_first(found)?;
        let all = found.iter().flatten().count();
        let verbatim: Vec<bool> = found.iter().map(|&found| found == Some(true)).collect();
        let exact = verbatim.iter().filter(|&&verbatim| verbatim).count();
        let rate = (all > 0).then(|| exact as f64 / all as f64);
        if self.job.settings.hard_example_mining {
            let hard = &mut self.state.hard_examples;
            hard.extend((0..found.len()).filter(|&window| found[window] == Some(false)));
            hard.sort_unstable();
            hard.dedup();
        }
        Ok(VerbatimWindows { rate, verbatim })
    }

    /// Which windows come back verbatim (see [`verbatim::window`]) from the weights as they are saved, which
    /// `precision` rounds; `None` of those that are too short.
    fn verbatim_windows(&mut self) -> anyhow::Result<Vec<Option<bool>>> {
        if self.precision == Dtype::F32 {
            return self.find_verbatim();
        }
        let weights = self.engine.read(Arena::Parameters)?;
        let precision = self.precision;
        self.engine.map(Arena::Parameters, &|weight| precision.round(weight))?;
        let found = self.find_verbatim();
        self.engine.write(Arena::Parameters, &weights)?;
        found
    }

    /// [`Self::verbatim_windows`] of the weights as they are.
    fn find_verbatim(&mut self) -> anyhow::Result<Vec<Option<bool>>> {
        let windows = self.job.windows;
        let context = windows.context();
        let max_nats = verbatim::max_nats(self.compute_dtype);
        let mut found = Vec::with_capacity(windows.len());
        let indices: Vec<usize> = (0..windows.len()).collect();
        for some in indices.chunks(64) {
            let batch = windows.draw(some)?;
            let guesses = self.engine.argmax_tokens(&batch, max_nats)?;
            let results = batch.targets.chunks(context).zip(guesses.chunks(context));
            for (&window, (targets, guesses)) in some.iter().zip(results) {
                let rest = windows.document_rest(window)?;
                found.push(verbatim::window(windows.kind(), targets, guesses, rest));
            }
        }
        Ok(found)
    }
}
