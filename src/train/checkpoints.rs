//! The checkpoints of a run, as Hugging Face's Trainer lays them out: `OUTPUT/checkpoint-N` after step N
//! with its training state, the newest few kept, and the finished model in `OUTPUT` itself. Each is a
//! whole Hugging Face folder. (Earlier versions kept the last training state in `OUTPUT`.)

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::{Deserialize, Serialize};

use super::Settings;
use crate::backend::Arena;
use crate::error::{self, ErrorKind, Hint};
use crate::model::{
    Config, Layout, forget_training_state, has_training_state, is_own, load_config,
    load_training_state, remove_own,
};
use crate::schema::SchemaVersion;
use crate::tokens::Position;

/// State of a run when it was saved: with the arenas, all that it needs to go on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainState {
    /// Version of the keys.
    #[serde(default)]
    pub schema_version: SchemaVersion,
    /// Steps done.
    pub step: u64,
    /// Steps the run has in all.
    pub total: u64,
    /// Position of the sampler.
    pub position: Position,
    /// Windows that a measurement did not find verbatim, in ascending order, if they are drawn more often.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hard_examples: Vec<usize>,
    /// Tokens trained on.
    pub tokens: u64,
    /// Updates left out, because gradients were not finite.
    #[serde(default)]
    pub skipped: u64,
    /// Sum and number of the finite losses since the last line of metrics.
    pub unlogged: (f64, u64),
    /// Lines of the metrics file that were written by runs before this one.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub earlier_metrics: usize,
    /// Settings of the run.
    pub settings: Settings,
    /// The highest verbatim rate measured, and the step it was first measured at; kept if the run is to
    /// end with these weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub best: Option<(f64, u64)>,
    /// The lowest validation loss, and the step it was first measured at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub best_validation: Option<(f64, u64)>,
    /// SHA-256 of the token file.
    pub tokens_sha256: String,
    /// State besides the arenas that the backend's next step depends on.
    #[serde(default)]
    pub backend: serde_json::Value,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // as serde asks
fn is_zero(count: &usize) -> bool {
    *count == 0
}

/// The arenas a training state holds, and what it calls them.
pub const ARENAS: [(&str, Arena); 3] = [
    ("master", Arena::Parameters),
    ("first_moment", Arena::FirstMoment),
    ("second_moment", Arena::SecondMoment),
];

/// A checkpoint read back.
pub struct SavedRun {
    pub folder: PathBuf,
    pub config: Config,
    pub state: TrainState,
    /// By the order of [`ARENAS`].
    pub arenas: Vec<Vec<f32>>,
}

/// The folder of the checkpoint after `step`.
pub fn folder(output: &Path, step: u64) -> PathBuf {
    output.join(format!("checkpoint-{step}"))
}

/// The step of a checkpoint by the name of its folder; none for other spellings of the number (+5, 05).
pub fn step_of(name: &OsStr) -> Option<u64> {
    let number = name.to_str()?.strip_prefix("checkpoint-")?;
    let step: u64 = number.parse().ok()?;
    (step.to_string() == number).then_some(step)
}

/// The steps of the checkpoints that laam wrote into a folder, in order.
fn steps(output: &Path) -> Vec<u64> {
    let entries = fs::read_dir(output).into_iter().flatten().flatten();
    let mut steps: Vec<u64> = entries
        .filter_map(|entry| step_of(&entry.file_name()))
        .filter(|&step| is_own(&folder(output, step)))
        .collect();
    steps.sort_unstable();
    steps
}

/// Folders that a run may be resumed from, the newest first: checkpoints, then the finished model.
pub fn candidates(output: &Path) -> Vec<PathBuf> {
    let newest = steps(output).into_iter().rev().map(|step| folder(output, step));
    newest.chain([output.to_path_buf()]).collect()
}

/// True if a run left a checkpoint in a folder to continue from.
pub fn is_resumable(output: &Path) -> bool {
    let mut folders = steps(output).into_iter().map(|step| folder(output, step));
    folders.any(|folder| has_training_state(&folder)) || has_training_state(output)
}

/// Leaves the newest `keep` checkpoints up to `step`, the one just saved, and those of the steps `best`.
/// Those beyond it are none of this run: it could not be resumed from them, or it replaces the run they
/// belong to. Returns a line on each that was removed.
pub fn prune(output: &Path, step: u64, keep: usize, best: &[u64]) -> anyhow::Result<Vec<String>> {
    let (ours, beyond): (Vec<u64>, Vec<u64>) =
        steps(output).into_iter().partition(|&other| other <= step);
    let outdated = &ours[..ours.len().saturating_sub(keep)];
    let outdated = outdated.iter().filter(|step| !best.contains(step));
    outdated.chain(&beyond).map(|&step| remove(&folder(output, step))).collect()
}

/// Removes what a run that this one replaces left to be resumed from: once this one has saved
/// `saved`, going on with the other would be a mistake. The model that lies in `output` stays. Returns a
/// line on each folder or file that was removed.
pub fn replace_other_run(output: &Path, saved: &Path) -> anyhow::Result<Vec<String>> {
    let others = steps(output).into_iter().map(|step| folder(output, step));
    let mut removed: Vec<String> = others
        .filter(|other| other != saved)
        .map(|other| remove(&other))
        .collect::<Result<_, _>>()?;
    if output != saved {
        let state = forget_training_state(output)?;
        removed.extend(state.map(|path| format!("removed {}", path.display())));
    }
    Ok(removed)
}

fn remove(folder: &Path) -> anyhow::Result<String> {
    let files = remove_own(folder)?.len();
    Ok(format!("removed {} ({files} files)", folder.display()))
}

/// The furthest state that lies in a folder: of a checkpoint, or of the finished model. Checkpoints
/// that are damaged, or were never finished, are passed over for older ones; `note` hears of it.
pub fn latest(output: &Path, note: &mut dyn FnMut(String)) -> anyhow::Result<Option<SavedRun>> {
    let mut first_error = None;
    let mut try_to_read = |folder: &Path| {
        read(folder).unwrap_or_else(|error| {
            note(format!("warning: {} is passed over: {error:#}", folder.display()));
            first_error.get_or_insert(error);
            None
        })
    };
    let finished = try_to_read(output);
    let newest = steps(output).into_iter().rev().find_map(|step| {
        let folder = folder(output, step);
        try_to_read(&folder)
    });
    let furthest = match (finished, newest) {
        (Some(finished), Some(newest)) if finished.state.step < newest.state.step => Some(newest),
        (finished, newest) => finished.or(newest),
    };
    match (furthest, first_error) {
        (None, Some(error)) => Err(error),
        (furthest, _) => Ok(furthest),
    }
}

/// The state after `step`, of which the caller knows that it was saved.
pub fn at_step(output: &Path, step: u64) -> anyhow::Result<SavedRun> {
    let folder = folder(output, step);
    read(&folder)?.ok_or_else(|| {
        error::checkpoint(
            format!("{} has no training state", folder.display()),
            "resume the run from an older checkpoint: remove this folder",
        )
    })
}

/// The state in one folder; `None` where there is none: a save that was cut off leaves nothing else.
fn read(folder: &Path) -> anyhow::Result<Option<SavedRun>> {
    const ADVICE: &str = "remove the folder: `resume` then takes an older checkpoint";
    if !has_training_state(folder) {
        return Ok(None);
    }
    let (config, _) = load_config(folder)?;
    let Some(saved) = load_training_state(folder, &Layout::new(&config))? else { return Ok(None) };
    let state: TrainState = serde_json::from_value(saved.state)
        .with_context(|| format!("invalid training state in {}", folder.display()))
        .hint(ErrorKind::Checkpoint, || ADVICE)?;
    let mut by_name = saved.arenas;
    let arenas: Option<Vec<_>> = ARENAS.iter().map(|(name, _)| by_name.remove(*name)).collect();
    let arenas = arenas.ok_or_else(|| {
        error::checkpoint(
            format!("the training state in {} has an arena missing", folder.display()),
            ADVICE,
        )
    })?;
    Ok(Some(SavedRun { folder: folder.to_path_buf(), config, state, arenas }))
}
