//! Checkpoints of a run, and its finished model.

use std::borrow::Cow;
use std::path::Path;

use super::super::Engine;
use super::super::checkpoints::{self, TrainState};
use super::super::footprint::peak_memory_bytes;
use super::super::snapshot::{CheckpointTarget, Snapshot};
use super::{Observer, TrainSummary, Trainer};
use crate::backend::Arena;
use crate::model::{has_weights, load_provenance};

impl Trainer<'_> {
    /// True if the model in the output folder is that of the final step.
    pub(super) fn is_published(&self) -> anyhow::Result<bool> {
        let output = self.job.output.path();
        let hash = |folder: &Path| -> anyhow::Result<Option<String>> {
            Ok(load_provenance(folder)?.and_then(|provenance| provenance.weights_sha256))
        };
        if self.is_from_output {
            return Ok(true);
        }
        let published = hash(output)?;
        Ok(published.is_some()
            && has_weights(output)
            && published == hash(&checkpoints::folder(output, self.final_step()))?)
    }

    /// Saves the finished model.
    pub(super) fn publish(
        &mut self,
        finish: &mut TrainSummary,
        observer: &mut dyn Observer,
    ) -> anyhow::Result<()> {
        let output = self.job.output.path().to_path_buf();
        if let Some(step) = self.best_step().filter(|step| *step < self.state.step) {
            let best = checkpoints::at_step(&output, step)?;
            write(&mut self.engine, best.arenas)?;
            let measure = if let Some((rate, _)) = self.state.best {
                finish.verbatim_rate = Some(rate);
                format!("verbatim {:.1}%", 100.0 * rate)
            } else {
                finish.validation_loss = self.state.best_validation.map(|(loss, _)| loss);
                format!("validation loss {:.4}", finish.validation_loss.unwrap_or(f64::NAN))
            };
            observer.note(&format!("saving the weights of step {step}, {measure}"));
        }
        let target = CheckpointTarget { folder: output, keep: None, ..self.target() };
        self.put(&target, observer)
    }

    /// Saves a checkpoint of this step. False if its weights are not finite: then it is not saved.
    pub(super) fn save(&mut self, observer: &mut dyn Observer) -> anyhow::Result<bool> {
        self.finish_writing(observer)?;
        if !self.is_worth_saving(observer)? {
            return Ok(false);
        }
        self.put(&self.target(), observer)?;
        (self.unsaved, self.is_from_output) = (false, false);
        self.saved_step = self.state.step;
        Ok(true)
    }

    /// Saves a checkpoint on the way: while a device trains on, where there is one.
    pub(super) fn save_meanwhile(&mut self, observer: &mut dyn Observer) -> anyhow::Result<()> {
        if !self.engine.is_async() {
            return self.save(observer).map(drop);
        }
        let step = self.state.step;
        // By the time that writing takes: rank 0 decides.
        if self.job.group.decide(u64::from(self.writer.is_busy()))? == 1 {
            observer.note(&format!("step {step}: no checkpoint, the last one is still written"));
            return Ok(());
        }
        if !self.is_worth_saving(observer)? {
            return Ok(());
        }
        self.check_parameters()?;
        let is_first = self.job.group.is_first();
        let snapshot = self.snapshot()?;
        if !is_first {
            (self.unsaved, self.is_from_output, self.saved_step) = (false, false, step);
            return Ok(());
        }
        let arenas = snapshot.arenas.into_iter();
        let arenas = arenas.map(|(name, values)| (name, Cow::Owned(values.into_owned()))).collect();
        let snapshot = Snapshot { arenas, ..snapshot };
        for line in self.writer.begin(self.target(), snapshot)? {
            observer.note(&line);
        }
        (self.unsaved, self.is_from_output, self.saved_step) = (false, false, step);
        Ok(())
    }

    /// Waits for the checkpoint that is being written.
    pub(super) fn finish_writing(&mut self, observer: &mut dyn Observer) -> anyhow::Result<()> {
        let group = self.job.group.clone();
        let written = self.writer.finish();
        for line in group.agree_after_first(written)? {
            observer.note(&line);
        }
        Ok(())
    }

    /// Writes a checkpoint of this step, in rank 0; the others wait as long as it takes.
    pub(super) fn put(
        &mut self,
        target: &CheckpointTarget,
        observer: &mut dyn Observer,
    ) -> anyhow::Result<()> {
        self.check_parameters()?;
        let group = self.job.group.clone();
        let snapshot = self.snapshot()?;
        let written = if group.is_first() { target.put(&snapshot) } else { Ok(Vec::new()) };
        for line in group.agree_after_first(written)? {
            observer.note(&line);
        }
        Ok(())
    }

    /// Weights that are not finite must not take the place of good ones.
    pub(super) fn is_worth_saving(&self, observer: &mut dyn Observer) -> anyhow::Result<bool> {
        let finite = self.engine.arena(Arena::Parameters)?.iter().all(|weight| weight.is_finite());
        if !finite {
            let step = self.state.step;
            observer.note(&format!("step {step}: not saved, because weights are not finite"));
        }
        Ok(finite)
    }

    /// Target of this step's checkpoint.
    pub(super) fn target(&self) -> CheckpointTarget {
        let (output, step) = (self.job.output.clone(), self.state.step);
        let folder = checkpoints::folder(output.path(), step);
        let keep = Some((step, self.job.settings.save_total_limit));
        let best = [self.state.best, self.state.best_validation];
        let best = best.into_iter().flatten().map(|(_, step)| step).collect();
        CheckpointTarget { output, folder, first: self.unsaved, keep, best }
    }

    pub(super) fn snapshot(&mut self) -> anyhow::Result<Snapshot<'_>> {
        let seconds = self.began.elapsed().as_secs_f64();
        self.job.provenance.end_session(seconds, self.state.step, peak_memory_bytes());
        let state = TrainState { backend: self.engine.state()?, ..self.state.clone() };
        let arenas = checkpoints::ARENAS
            .iter()
            .map(|&(name, arena)| Ok((name, self.engine.arena(arena)?)))
            .collect::<anyhow::Result<_>>()?;
        Ok(Snapshot {
            config: self.config.clone(),
            arenas,
            precision: self.precision,
            tokenizer: self.job.tokenizer.clone(),
            provenance: self.job.provenance.clone(),
            state: serde_json::to_value(state)?,
        })
    }
}

/// Sets weights and moments to those of a checkpoint.
pub(super) fn write(engine: &mut Engine, arenas: Vec<Vec<f32>>) -> anyhow::Result<()> {
    // Each is dropped once it is written: together they are as large as the engine.
    for ((_, arena), values) in checkpoints::ARENAS.iter().zip(arenas) {
        engine.write(*arena, &values)?;
    }
    Ok(())
}
