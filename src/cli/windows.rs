//! A text cut into a model's windows, for the commands that measure a model on it.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;

use super::model::{self, Opened};
use super::output::say;
use super::source;
use crate::corpus::{Corpus, Document, Manifest};
use crate::error::{self, ErrorKind, Hint};
use crate::model::{Config, Provenance};
use crate::tokens::{TokenFile, TokenWriter, WindowKind, Windows};

/// The most tokens of a window: activations of all of them are in memory at once.
const LONGEST: usize = 1 << 20;

/// A text, cut. Its tokens lie in a folder that goes with it.
pub struct Cut {
    pub windows: Windows,
    _scratch: Scratch,
}

/// Kind of the windows that a model was trained on, if its folder says so.
pub fn told(opened: &Opened) -> Option<WindowKind> {
    told_by(&opened.model.config, opened.provenance.as_ref())
}

/// Kind of windows by `config.json`, else by the provenance.
pub fn told_by(config: &Config, provenance: Option<&Provenance>) -> Option<WindowKind> {
    let told = config.window_kind.clone();
    let told = told.and_then(|name| serde_json::from_value(name.into()).ok());
    told.or(model::windows(provenance))
}

/// Kind of a model's windows: as asked for, else as in training, else as a stream.
pub fn kind(asked: Option<WindowKind>, opened: &Opened) -> WindowKind {
    asked.or(told(opened)).unwrap_or_else(|| {
        say!(
            "warning: the model's folder does not say how its windows were cut: stream is assumed \
             (--windows)"
        );
        WindowKind::Stream
    })
}

/// Shape of the windows that a model is measured on.
#[derive(Clone, Copy, Debug)]
pub struct WindowShape {
    /// Inputs of a window.
    pub context: usize,
    /// Tokens from one stream window to the next, if not as many as it has.
    pub stride: Option<usize>,
    /// Windows of so many tokens instead, every `stride`.
    pub fixed: Option<usize>,
}

/// Inputs of a window of a model that laam did not train, unless it reads fewer: its context may be far
/// longer than memory is for.
const FOREIGN_CONTEXT: usize = 1024;

impl WindowShape {
    /// Windows of so many inputs, or by default as in training.
    pub fn of(opened: &Opened, context: Option<usize>) -> anyhow::Result<Self> {
        let most = opened.model.config.max_position_embeddings;
        let usual = if told(opened).is_some() { most } else { most.min(FOREIGN_CONTEXT) };
        if context.is_none() && usual < most {
            say!(
                "note: windows of {usual} tokens, though the model reads {most} \
                 (--max-position-embeddings)"
            );
        }
        let context = context.unwrap_or(usual);
        if context > most {
            return Err(error::invalid(
                "max_position_embeddings",
                context,
                format!("at most {most}"),
            ));
        }
        if context > LONGEST {
            return Err(error::checkpoint(
                format!("max_position_embeddings {context} is too large, in config.json"),
                format!("set it to at most {LONGEST}"),
            ));
        }
        Ok(Self { context, stride: None, fixed: None })
    }
}

/// Cuts a corpus into windows.
pub fn cut(
    corpus: &Corpus,
    opened: &Opened,
    kind: WindowKind,
    shape: WindowShape,
) -> anyhow::Result<(Cut, Manifest)> {
    let (cut, manifest) = cut_other(corpus, opened, kind, shape)?;
    source::warn_of_other_text(&manifest, opened.provenance.as_ref());
    Ok((cut, manifest))
}

/// Cuts a corpus that is known not to be the one that the model was trained on.
pub fn cut_other(
    corpus: &Corpus,
    opened: &Opened,
    kind: WindowKind,
    shape: WindowShape,
) -> anyhow::Result<(Cut, Manifest)> {
    Windows::check_names(kind, &opened.tokenizer, corpus.has_names())?;
    let scratch = Scratch::new()?;
    let tokens = scratch.0.join("tokens");
    let (file, manifest) = source::tokenize(corpus, &opened.tokenizer, &tokens, true)?;
    Ok((Cut::new(scratch, file, opened, kind, shape)?, manifest))
}

/// Cuts documents that are no corpus.
pub fn cut_documents(
    documents: impl Iterator<Item = anyhow::Result<Document>>,
    opened: &Opened,
    kind: WindowKind,
    shape: WindowShape,
) -> anyhow::Result<Cut> {
    let scratch = Scratch::new()?;
    let tokens = scratch.0.join("tokens");
    let mut writer = TokenWriter::create(&tokens, &opened.tokenizer)?;
    writer.write(documents, |_| ())?;
    writer.finish([0; 32])?;
    Cut::new(scratch, Arc::new(TokenFile::open(&tokens)?), opened, kind, shape)
}

impl Cut {
    fn new(
        scratch: Scratch,
        file: Arc<TokenFile>,
        opened: &Opened,
        kind: WindowKind,
        shape: WindowShape,
    ) -> anyhow::Result<Self> {
        file.check_fits(opened.model.config.vocab_size)?;
        let tokenizer = opened.tokenizer.clone();
        let windows = match (shape.fixed, shape.stride) {
            (Some(length), stride) => {
                Windows::spaced(file, tokenizer, length, stride.unwrap_or(length))?
            }
            (None, stride) => Windows::new(file, tokenizer, kind, shape.context, stride)?,
        };
        Ok(Self { windows, _scratch: scratch })
    }
}

/// A folder for what is not to be kept.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> anyhow::Result<Self> {
        let place = std::env::temp_dir();
        let make = |number: u32| -> io::Result<PathBuf> {
            let folder = place.join(format!("laam-{}-{number}", std::process::id()));
            // An error where it is there already: nobody else's folder is used.
            fs::create_dir(&folder).map(|()| folder)
        };
        let made = (0..100).map(make).find(|made| !is_taken(made.as_ref().err()));
        made.unwrap_or_else(|| Err(io::ErrorKind::AlreadyExists.into()))
            .map(Self)
            .with_context(|| format!("cannot create a folder in {}", place.display()))
            .hint(ErrorKind::Data, || "set TMPDIR to a writable folder")
    }
}

fn is_taken(error: Option<&io::Error>) -> bool {
    error.is_some_and(|error| error.kind() == io::ErrorKind::AlreadyExists)
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Nothing to be done if it fails: it lies where temporary files do.
        let _ = fs::remove_dir_all(&self.0);
    }
}
