//! A run's state on its way to a checkpoint: taken between two steps, written while others go on.

use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};

use serde_json::Value;

use super::checkpoints;
use crate::dtype::Dtype;
use crate::error;
use crate::model::{Checkpoint, Config, Layout, Provenance, TrainingState, save};
use crate::threads;

/// All that a checkpoint holds.
pub struct Snapshot {
    pub config: Config,
    /// By the order of [`checkpoints::ARENAS`]: the weights first.
    pub arenas: Vec<(&'static str, Vec<f32>)>,
    pub precision: Dtype,
    pub tokenizer: PathBuf,
    pub provenance: Provenance,
    /// A [`checkpoints::TrainState`].
    pub state: Value,
}

impl Snapshot {
    /// Writes it: a whole Hugging Face folder, there at once or not at all.
    pub fn write(&self, folder: &Path) -> anyhow::Result<()> {
        let named: Vec<(&str, &[f32])> =
            self.arenas.iter().map(|(name, values)| (*name, values.as_slice())).collect();
        save(
            folder,
            &Checkpoint {
                config: &self.config,
                layout: &Layout::new(&self.config),
                weights: &self.arenas[0].1,
                precision: self.precision,
                tokenizer: Some(&self.tokenizer),
                provenance: &self.provenance,
                training_state: Some(TrainingState { arenas: &named, state: &self.state }),
            },
        )
    }
}

/// Where a checkpoint goes, and what becomes of others there.
pub struct CheckpointTarget {
    /// The folder of the run.
    pub output: PathBuf,
    /// The folder of the checkpoint: below it, or the same at the end of the run.
    pub folder: PathBuf,
    /// It is the first of its run, which replaces another.
    pub first: bool,
    /// Of a periodic one: its step, and how many stay.
    pub keep: Option<(u64, usize)>,
    /// The step whose checkpoint stays beside them: the best one's.
    pub best: Option<u64>,
}

impl CheckpointTarget {
    /// Writes a checkpoint here, then removes those that it makes out of date.
    pub fn put(&self, snapshot: &Snapshot) -> anyhow::Result<()> {
        snapshot.write(&self.folder)?;
        if self.first {
            checkpoints::replace_other_run(&self.output, &self.folder)?;
        }
        match self.keep {
            Some((step, keep)) => checkpoints::prune(&self.output, step, keep, self.best),
            None => Ok(()),
        }
    }
}

/// Writes one checkpoint at a time, in a thread of its own.
#[derive(Default)]
pub struct CheckpointWriter {
    thread: Option<JoinHandle<anyhow::Result<()>>>,
}

impl CheckpointWriter {
    /// Whether one is being written.
    pub fn is_busy(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Begins to write one. Errors come with [`CheckpointWriter::finish`].
    pub fn begin(&mut self, place: CheckpointTarget, snapshot: Snapshot) -> anyhow::Result<()> {
        self.finish()?;
        let write = move || place.put(&snapshot);
        let started = thread::Builder::new().name("checkpoint".to_string()).spawn(write);
        self.thread = Some(started.map_err(|why| threads::none_to_be_had(&why))?);
        Ok(())
    }

    /// Waits until the last one is written, and tells how that went.
    pub fn finish(&mut self) -> anyhow::Result<()> {
        match self.thread.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(written)) => written,
            Some(Err(_)) => Err(error::internal("the checkpoint writer thread panicked")),
        }
    }
}

impl Drop for CheckpointWriter {
    /// A run that ends with an error leaves its last checkpoint whole.
    fn drop(&mut self) {
        let _ = self.finish();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(output: &Path) -> Snapshot {
        let config = crate::model::preset("original").expect("a preset");
        let config = Config { vocab_size: 32, num_hidden_layers: 1, ..config };
        let len = Layout::new(&config).len;
        let arenas = checkpoints::ARENAS.iter().map(|(name, _)| (*name, vec![0.5; len])).collect();
        std::fs::create_dir_all(output).unwrap();
        Snapshot {
            config,
            arenas,
            precision: Dtype::F32,
            tokenizer: output.join("no tokenizer"),
            provenance: Provenance::default(),
            state: Value::Null,
        }
    }

    #[test]
    fn an_error_in_the_background_is_told_by_the_next_who_asks() {
        let folder = tempfile::tempdir().unwrap();
        let place = || CheckpointTarget {
            output: folder.path().to_path_buf(),
            folder: folder.path().join("checkpoint-1"),
            first: false,
            keep: None,
            best: None,
        };
        let mut writer = CheckpointWriter::default();
        // There is no tokenizer to copy.
        writer.begin(place(), snapshot(folder.path())).unwrap();
        assert!(writer.finish().is_err());
        assert!(writer.finish().is_ok(), "told once");
        writer.begin(place(), snapshot(folder.path())).unwrap();
        assert!(writer.begin(place(), snapshot(folder.path())).is_err());
        assert!(!writer.is_busy());
    }
}
