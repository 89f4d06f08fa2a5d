//! The output folder of a training run: whose files lie in it, and what a run may do to them.

use std::fs;
use std::path::{Path, PathBuf};

use super::checkpoints::{self, is_resumable};
use super::metrics;
use crate::error;
use crate::files;
use crate::memorization::recall;
use crate::model::{foreign_files, has_weights, is_own, remove_staged, settle};
use crate::output::{OutputFolder, check_free, refuse_foreign, remove_temporaries};

/// Consent to what happens to a run that is in the output folder already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Consent {
    /// Nothing: a folder with a finished or resumable run is refused.
    None,
    /// Continue the run that is there.
    Resume,
    /// A new run begins with its weights and replaces it; its metrics stay.
    Reload,
    /// A new run replaces it.
    Overwrite,
}

/// Locks the output folder of a run and removes what killed runs left half written; `note` hears of each
/// file.
///
/// # Errors
/// Another process writes into the folder, a file that the run would write is not laam's, or a run lies
/// there and `consent` does not cover it. Then nothing was changed.
pub fn claim(
    folder: &Path,
    consent: Consent,
    note: &mut dyn FnMut(String),
) -> anyhow::Result<OutputFolder> {
    check_free(folder)?;
    check(folder, consent)?;
    let output = OutputFolder::open(folder)?;
    // Again: another run may have ended in between.
    check(folder, consent)?;
    let checkpoints = checkpoint_entries(folder);
    for folder in checkpoints.iter().map(PathBuf::as_path).chain([folder]) {
        settle(folder)?;
        if remove_staged(folder)? {
            note(format!("removed an unfinished save in {}", folder.display()));
        }
    }
    for path in remove_temporaries(folder, |name| [metrics::FILE, recall::FILE].contains(&name))? {
        note(format!("removed {}", path.display()));
    }
    Ok(output)
}

fn check(folder: &Path, consent: Consent) -> anyhow::Result<()> {
    let mut foreign = foreign_files(folder, consent == Consent::Reload);
    let metrics = folder.join(metrics::FILE);
    let is_ours = is_own(folder) || metrics::is_own(&metrics);
    // No run makes a FIFO or a link to a device.
    if !is_ours || files::is_irregular(&metrics) {
        foreign.push(metrics);
    }
    let recall = folder.join(recall::FILE);
    if !recall::is_own(&recall) {
        foreign.push(recall);
    }
    for checkpoint in checkpoint_entries(folder) {
        if fs::symlink_metadata(&checkpoint).is_ok_and(|found| found.is_dir()) {
            foreign.extend(foreign_files(&checkpoint, false));
        } else {
            foreign.push(checkpoint);
        }
    }
    refuse_foreign(&foreign)?;
    let is_finished = is_own(folder) && has_weights(folder);
    match consent {
        Consent::None if is_finished || is_resumable(folder) => {
            let what = if is_finished { "a finished run" } else { "a run that was cut off" };
            Err(error::config(
                format!("{} holds {what}", folder.display()),
                "`resume` continues it, `reload` begins a new run with its weights, `overwrite` \
                 replaces it; or choose another `output_path`",
            ))
        }
        Consent::Resume if is_finished && !is_resumable(folder) => Err(error::config(
            format!("{} holds a finished model and no checkpoint to resume", folder.display()),
            "`reload` begins a new run with its weights, `overwrite` replaces it",
        )),
        _ => Ok(()),
    }
}

/// Whatever lies where a checkpoint would be saved.
fn checkpoint_entries(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter(|entry| checkpoints::step_of(&entry.file_name()).is_some())
        .map(|entry| entry.path())
        .collect()
}
