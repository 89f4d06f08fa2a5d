//! `laam evaluate`: the loss of a model on a text.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use serde_json::json;

use super::progress::Progress;
use super::source::{self, SourceArguments};
use super::train_tokenizer::encoding_of;
use super::{Outcome, backend, model};
use crate::error::{Hint, error};
use crate::memorization::loss::measure;
use crate::tokenizer::Style;
use crate::tokens::{Kind, Windows};
use crate::train::prepare;

/// The most tokens of a window: activations of all of them are in memory at once.
const LONGEST: usize = 1 << 20;

/// Measure the loss of a model on a text.
///
/// Prints loss (mean nats a token), perplexity, bits_a_byte and tokens. What counts depends on the
/// windows: of original ones all tokens but the first of each, of stream ones all but the first of
/// the text, of addressed ones the text without its paths.
#[derive(Args)]
#[command(after_help = "\
Example:
  laam evaluate model --source linux/kernel --json")]
pub struct Arguments {
    /// The folder of the model
    model: PathBuf,
    #[command(flatten)]
    source: SourceArguments,
    /// How the text is cut into windows [default: as in training, else stream]
    #[arg(long, value_enum)]
    windows: Option<Kind>,
    /// Windows at a time [default: what the backend likes]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    batch_size: Option<u32>,
    #[command(flatten)]
    backend: backend::Arguments,
    /// No progress
    #[arg(long)]
    quiet: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<Outcome> {
    let backend = arguments.backend.open()?;
    let opened = model::open(&arguments.model)?;
    let config = &opened.model.config;
    let context = config.max_position_embeddings;
    if context > LONGEST {
        return Err(error(
            format!("windows of {context} tokens are too long, in {}", arguments.model.display()),
            format!("set max_position_embeddings in its config.json to {LONGEST} or less"),
        ));
    }
    let kind = arguments.windows.or(model::windows(opened.provenance.as_ref()));
    let kind = kind.unwrap_or(Kind::Stream);

    let encoding = encoding_of(opened.tokenizer.style().unwrap_or(Style::Exact));
    let corpus = arguments.source.corpus(None, encoding)?;
    let scratch = Scratch::new()?;
    let tokens = scratch.0.join("tokens");
    let (file, manifest) = prepare::tokenize(&corpus, &opened.tokenizer, &tokens, |_| ())?;
    source::warn(&manifest);
    let windows = Windows::new(file, opened.tokenizer.clone(), kind, context, None)?;
    let batch = arguments.batch_size.map_or_else(
        || backend.micro_windows(windows.len(), context),
        |batch| (batch as usize).min(windows.len()),
    );
    let mut progress = (!arguments.quiet).then(|| Progress::new("evaluated"));
    let bytes = manifest.bytes();
    let weights = &opened.model.weights;
    let measured = measure(&*backend, config, weights, &windows, bytes, batch, |done| {
        if let Some(progress) = &mut progress {
            // As much of the text as of the windows.
            let part = done as f64 / windows.len() as f64;
            progress.set((bytes as f64 * part) as u64, Some(bytes));
        }
    })?;
    if let Some(progress) = &mut progress {
        progress.finish();
    }
    let printed = json!({
        "loss": measured.loss,
        "perplexity": measured.perplexity,
        "bits_a_byte": measured.bits_a_byte,
        "tokens": measured.tokens,
        "windows": windows.len(),
        "window_kind": kind,
        "files": manifest.files.len(),
        "bytes": bytes,
    });
    let mut out = io::stdout().lock();
    if arguments.json {
        writeln!(out, "{printed:#}")?;
        return Ok(Outcome::Done);
    }
    for (name, value) in printed.as_object().into_iter().flatten() {
        let value = value.as_str().map_or_else(|| value.to_string(), String::from);
        writeln!(out, "{name}: {value}")?;
    }
    Ok(Outcome::Done)
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
            .with_context(|| format!("cannot make a folder in {}", place.display()))
            .hint(|| "set TMPDIR to a folder that can be written")
    }
}

fn is_taken(error: Option<&io::Error>) -> bool {
    error.is_some_and(|error| error.kind() == io::ErrorKind::AlreadyExists)
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let folder: &Path = &self.0;
        // Nothing to be done if it fails: it lies where temporary files do.
        let _ = fs::remove_dir_all(folder);
    }
}
