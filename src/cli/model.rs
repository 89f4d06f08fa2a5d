//! The model that a command is about: its weights, tokenizer and provenance, from one folder.

use std::path::Path;
use std::sync::Arc;

use clap::ValueEnum;

use super::output::say;
use crate::corpus::shown;
use crate::error;
use crate::escape::shell_word;
use crate::memorization::rebuild::check_paths;
use crate::model::{Model, Provenance, check_hashes, load, load_provenance, read_consistently};
use crate::tokenizer::Tokenizer;
use crate::tokens::WindowKind;

/// A model folder, opened.
pub struct Opened {
    pub model: Model,
    pub tokenizer: Arc<Tokenizer>,
    /// Provenance, if the folder has one.
    pub provenance: Option<Provenance>,
}

/// Opens a model folder, and tells what a user should know about it.
pub fn open(folder: &Path) -> anyhow::Result<Opened> {
    let (opened, differences) = read_consistently(folder, || {
        let (model, tokenizer) = (load(folder)?, Arc::new(Tokenizer::load(folder)?));
        let provenance = load_provenance(folder)?;
        Ok((Opened { model, tokenizer, provenance }, check_hashes(folder)?))
    })?;
    for warning in opened.model.warnings.iter().chain(&differences) {
        say!("warning: {warning}");
    }
    Ok(opened)
}

/// The paths of the files that a model was trained on, all of them fit to be printed and written.
pub fn paths(folder: &Path) -> anyhow::Result<Vec<String>> {
    let provenance = load_provenance(folder)?.unwrap_or_default();
    let paths = provenance.paths();
    if paths.is_empty() {
        refuse_unnamed(&provenance, folder)?;
        return Err(error::checkpoint(
            format!("{} does not say which files the model was trained on", folder.display()),
            "every model that laam trains has them in provenance.json",
        ));
    }
    check_paths(&paths)?;
    Ok(paths)
}

/// Refuses to ask for a name if no document that a model was trained on has one.
pub fn refuse_unnamed(provenance: &Provenance, folder: &Path) -> anyhow::Result<()> {
    let shards = provenance.shards();
    let (Some(first), true) = (shards.first(), provenance.paths().is_empty()) else {
        return Ok(());
    };
    let (model, first) = (shell_word(&folder.to_string_lossy()), shown(first.as_bytes()));
    Err(error::config(
        format!(
            "the model in {} was trained on documents without names, of {first}, so it cannot be asked for a file by name",
            folder.display()
        ),
        format!(
            "laam memorization {model} --source TEXT measures what it holds of a text, laam generate \
             {model} --prompt TEXT goes on with one"
        ),
    ))
}

/// The kind of windows that a model was trained on, where its provenance says so.
pub fn windows(provenance: Option<&Provenance>) -> Option<WindowKind> {
    WindowKind::from_str(provenance?.recipe["windows"].as_str()?, false).ok()
}
