//! `laam tokenize`: a corpus as a token file.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fs, io};

use anyhow::Context;
use clap::Args;
use serde_json::json;

use super::source::{self, SourceArgs};
use super::{Outcome, print_fields};
use crate::corpus::hex;
use crate::error::{ErrorKind, Hint};
use crate::files::{self, AtomicFile};
use crate::tokenizer::Tokenizer;
use crate::tokens::{TokenFile, WindowKind, Windows};

/// Write a corpus as tokens, to be trained on.
///
/// The file is written under another name and renamed when it is whole. Prints what it holds, and
/// into how many windows it is cut.
#[derive(Args, Debug)]
#[command(after_help = "\
Example:
  laam tokenize --source linux-1.0.tar.xz --tokenizer_path tokenizer --output linux.tokens")]
pub struct TokenizeArgs {
    #[command(flatten)]
    source: SourceArgs,
    /// The folder of the tokenizer, or its tokenizer.json
    #[arg(long, value_name = "DIR", default_value = "tokenizer")]
    tokenizer_path: PathBuf,
    /// The token file to write
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// The kind of windows to count
    #[arg(long, value_enum, default_value = "original")]
    windows: WindowKind,
    /// The inputs of a window
    #[arg(long, value_name = "N", default_value_t = 512)]
    max_position_embeddings: usize,
    /// Tokens from one stream window to the next: as many as a window has, by default
    #[arg(long, value_name = "N")]
    stride: Option<usize>,
    /// No progress
    #[arg(long)]
    quiet: bool,
    /// Print the result, or the error, as one JSON object on stdout
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: &TokenizeArgs) -> anyhow::Result<Outcome> {
    let output = &arguments.output;
    if !files::is_irregular(output) {
        return tokenize(arguments, output);
    }
    // What is written into a device or a FIFO cannot be read again.
    let kept = source::token_cache(output)?;
    let done = tokenize(arguments, &kept);
    let _ = fs::remove_file(&kept);
    done
}

/// Writes the token file, as `target` first if that is not the output.
fn tokenize(arguments: &TokenizeArgs, target: &Path) -> anyhow::Result<Outcome> {
    Windows::check_shape(arguments.max_position_embeddings, arguments.stride)?;
    TokenFile::check_output(&arguments.output)?;
    let tokenizer = Arc::new(Tokenizer::load(&arguments.tokenizer_path)?);
    let corpus = arguments.source.corpus_for(&tokenizer)?;
    let (file, manifest) = source::tokenize(&corpus, &tokenizer, target, arguments.quiet)?;
    if target != arguments.output {
        write_in_place(target, &arguments.output)?;
    }
    let (kind, context) = (arguments.windows, arguments.max_position_embeddings);
    let windows = Windows::new(file.clone(), tokenizer.clone(), kind, context, arguments.stride)
        .with_context(|| format!("{} is written, but", arguments.output.display()))?;
    let header = file.header();
    let printed = json!({
        "tokens": header.tokens,
        "documents": header.documents,
        "windows": windows.len(),
        "sha256": hex(&file.sha256()?),
        "window_kind": kind,
        "context": context,
        "bytes": manifest.bytes(),
        "vocab_size": header.vocab_size,
        "tokenizer_sha256": hex(&header.tokenizer_sha256),
        "corpus_sha256": hex(&header.corpus_sha256),
        "source": source::described(&manifest),
        "output": arguments.output.to_string_lossy(),
    });
    print_fields(printed, arguments.json)?;
    Ok(Outcome::Done)
}

/// Writes what a file holds into a device or a FIFO.
fn write_in_place(from: &Path, to: &Path) -> anyhow::Result<()> {
    let mut file = AtomicFile::create(to)?;
    files::open(from)
        .and_then(|mut from| io::copy(&mut from, &mut file))
        .with_context(|| format!("cannot write {}", to.display()))
        .hint(ErrorKind::Data, || "choose another `output`")?;
    file.commit()
}
