//! The checkpoints of a run: `OUTPUT/checkpoint-N` after step N, the newest few kept, and the
//! finished model in `OUTPUT` itself. Each is a whole Hugging Face folder.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::{Deserialize, Serialize};

use super::Settings;
use crate::backend::Arena;
use crate::error::{Hint, error};
use crate::model::{Layout, load_training_state};
use crate::tokens::Position;

/// Where a run stood when it was saved: with the arenas, all that it needs to go on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Steps done.
    pub step: u64,
    /// Steps the run has in all.
    pub total: u64,
    pub position: Position,
    /// Tokens trained on.
    pub tokens: u64,
    /// Sum and number of the losses since the last line of metrics.
    pub unlogged: (f64, u64),
    pub settings: Settings,
    /// Of the token file.
    pub tokens_sha256: String,
}

/// The arenas a training state holds, and what it calls them.
pub const ARENAS: [(&str, Arena); 3] = [
    ("master", Arena::Parameters),
    ("first_moment", Arena::FirstMoment),
    ("second_moment", Arena::SecondMoment),
];

/// A checkpoint read back.
pub struct Saved {
    pub folder: PathBuf,
    pub state: State,
    /// By the order of [`ARENAS`].
    pub arenas: Vec<Vec<f32>>,
}

/// The folder of the checkpoint after `step`.
pub fn folder(output: &Path, step: u64) -> PathBuf {
    output.join(format!("checkpoint-{step}"))
}

/// The numbers of the checkpoints that lie in a folder, in order.
fn steps(output: &Path) -> Vec<u64> {
    let entries = fs::read_dir(output).into_iter().flatten().flatten();
    let mut steps: Vec<u64> = entries
        .filter_map(|entry| entry.file_name().to_str()?.strip_prefix("checkpoint-")?.parse().ok())
        .collect();
    steps.sort_unstable();
    steps
}

/// Removes all but the newest `keep` checkpoints.
pub fn prune(output: &Path, keep: usize) -> anyhow::Result<()> {
    let steps = steps(output);
    for &step in &steps[..steps.len().saturating_sub(keep)] {
        let folder = folder(output, step);
        fs::remove_dir_all(&folder)
            .with_context(|| format!("cannot remove {}", folder.display()))
            .hint(|| "remove it by hand, or raise --save-total-limit")?;
    }
    Ok(())
}

/// The furthest state that lies in a folder: of a checkpoint, or of the finished model.
pub fn latest(output: &Path, layout: &Layout) -> anyhow::Result<Option<Saved>> {
    let newest = steps(output).pop().map(|step| folder(output, step));
    let mut best: Option<Saved> = None;
    for folder in newest.into_iter().chain([output.to_path_buf()]) {
        if !folder.join("config.json").exists() {
            continue;
        }
        let Some(saved) = load_training_state(&folder, layout)? else { continue };
        let state: State = serde_json::from_value(saved.state)
            .with_context(|| format!("the training state in {} is not laam's", folder.display()))
            .hint(|| "train without --resume, or give its weights to --init-from")?;
        let mut by_name = saved.arenas;
        let arenas: Option<Vec<_>> = ARENAS.iter().map(|(name, _)| by_name.remove(*name)).collect();
        let arenas = arenas.ok_or_else(|| {
            error(
                format!("the training state in {} lacks an arena", folder.display()),
                "train without --resume, or give its weights to --init-from",
            )
        })?;
        if best.as_ref().is_none_or(|best| best.state.step < state.step) {
            best = Some(Saved { folder, state, arenas });
        }
    }
    Ok(best)
}
