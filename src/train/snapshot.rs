//! A run's state on its way to a checkpoint: taken between two steps, written while others go on.

use std::borrow::Cow;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use serde_json::Value;

use super::checkpoints;
use crate::dtype::Dtype;
use crate::error;
use crate::model::{Checkpoint, Config, Layout, Provenance, TrainingState, save};
use crate::output::OutputFolder;
use crate::threads;
use crate::tokenizer::Tokenizer;

/// All that a checkpoint holds.
pub struct Snapshot<'a> {
    pub config: Config,
    /// By the order of [`checkpoints::ARENAS`]: the weights first.
    pub arenas: Vec<(&'static str, Cow<'a, [f32]>)>,
    pub precision: Dtype,
    pub tokenizer: Arc<Tokenizer>,
    pub provenance: Provenance,
    /// A [`checkpoints::TrainState`].
    pub state: Value,
}

impl Snapshot<'_> {
    /// Writes a whole Hugging Face folder, there at once or not at all, with or without the training
    /// state.
    fn write(&self, target: &CheckpointTarget) -> anyhow::Result<()> {
        let named: Vec<(&str, &[f32])> =
            self.arenas.iter().map(|(name, values)| (*name, &**values)).collect();
        save(
            &target.folder,
            &Checkpoint {
                config: &self.config,
                layout: &Layout::new(&self.config),
                weights: &self.arenas[0].1,
                precision: self.precision,
                tokenizer: Some(&self.tokenizer),
                provenance: &self.provenance,
                training_state: target
                    .keep
                    .is_some()
                    .then_some(TrainingState { arenas: &named, state: &self.state }),
            },
        )
    }
}

/// Folder of a checkpoint, and what becomes of others there.
pub struct CheckpointTarget {
    /// The folder of the run.
    pub output: Arc<OutputFolder>,
    /// The folder of the checkpoint: below it, or the same for the model at the end of the run.
    pub folder: PathBuf,
    /// It is the first of its run, which replaces another.
    pub first: bool,
    /// Step of a checkpoint, and how many stay. None for the model, which has no training state.
    pub keep: Option<(u64, usize)>,
    /// The steps whose checkpoints stay beside them: the best ones'.
    pub best: Vec<u64>,
}

impl CheckpointTarget {
    /// Writes a checkpoint here, then removes those that it makes out of date: a line on each.
    pub fn put(&self, snapshot: &Snapshot) -> anyhow::Result<Vec<String>> {
        self.output.check()?;
        snapshot.write(self)?;
        let output = self.output.path();
        let mut removed = Vec::new();
        if self.first {
            removed.extend(checkpoints::replace_other_run(output, &self.folder)?);
        }
        if let Some((step, keep)) = self.keep {
            removed.extend(checkpoints::prune(output, step, keep, &self.best)?);
        }
        Ok(removed)
    }
}

/// Writes one checkpoint at a time, in a thread of its own.
#[derive(Default)]
pub struct CheckpointWriter {
    thread: Option<JoinHandle<anyhow::Result<Vec<String>>>>,
}

impl CheckpointWriter {
    /// True while one is being written.
    pub fn is_busy(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Begins to write one. Errors come with [`CheckpointWriter::finish`].
    pub fn begin(
        &mut self,
        place: CheckpointTarget,
        snapshot: Snapshot<'static>,
    ) -> anyhow::Result<Vec<String>> {
        let removed = self.finish()?;
        let write = move || place.put(&snapshot);
        let started = thread::Builder::new().name("checkpoint".to_string()).spawn(write);
        self.thread = Some(started.map_err(|why| threads::none_to_be_had(&why))?);
        Ok(removed)
    }

    /// Waits until the last one is written. Returns a line on each checkpoint that it removed.
    pub fn finish(&mut self) -> anyhow::Result<Vec<String>> {
        match self.thread.take().map(JoinHandle::join) {
            None => Ok(Vec::new()),
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

    fn snapshot() -> Snapshot<'static> {
        let config = crate::model::preset("original").expect("a preset");
        let config = Config { vocab_size: 32, num_hidden_layers: 1, ..config };
        let len = Layout::new(&config).len;
        // Too large for float16.
        let arena = || Cow::Owned(vec![1e6; len]);
        let arenas = checkpoints::ARENAS.iter().map(|(name, _)| (*name, arena())).collect();
        let documents = [Ok(crate::corpus::Document::new("a.c", "int a;\n"))];
        let training =
            crate::tokenizer::Training { style: crate::tokenizer::Style::Exact, vocab_size: 270 };
        let (tokenizer, _) = Tokenizer::train(documents, &training, |_| ()).unwrap();
        Snapshot {
            config,
            arenas,
            precision: Dtype::F16,
            tokenizer: Arc::new(tokenizer),
            provenance: Provenance::default(),
            state: Value::Null,
        }
    }

    #[test]
    fn an_error_in_the_background_is_told_by_the_next_who_asks() {
        let folder = tempfile::tempdir().unwrap();
        let output = Arc::new(OutputFolder::open(folder.path()).unwrap());
        let place = || CheckpointTarget {
            output: output.clone(),
            folder: folder.path().join("checkpoint-1"),
            first: false,
            keep: None,
            best: Vec::new(),
        };
        let mut writer = CheckpointWriter::default();
        writer.begin(place(), snapshot()).unwrap();
        assert!(writer.finish().is_err());
        assert!(writer.finish().is_ok(), "told once");
        writer.begin(place(), snapshot()).unwrap();
        assert!(writer.begin(place(), snapshot()).is_err());
        assert!(!writer.is_busy());
    }
}
