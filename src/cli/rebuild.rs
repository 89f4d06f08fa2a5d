//! `laam rebuild`: every file out of a model's weights.

use std::collections::HashMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use serde_json::{Value, json};

use super::backend::BackendArgs;
use super::progress::Files;
use super::source::SourceArgs;
use super::train_tokenizer::encoding_of;
use super::{Outcome, model, windows};
use crate::backend::Backend;
use crate::corpus::{Corpus, Encoding, MIRROR, Version};
use crate::error;
use crate::generate::Generator;
use crate::memorization::rebuild::{self, Comparison, Difference, Existing, Rebuilt, rebuild};
use crate::memorization::regenerate::{End, Regenerator};
use crate::schema::versioned;
use crate::tokenizer::Style;
use crate::tokens::Kind;

/// Regenerate every file that a model was trained on, from the names alone.
///
/// Files are written under the output folder and nowhere else. With --compare they are then held
/// against the originals: exits with 1 when one differs, or is missing. bytes_exact counts, in each
/// file, the bytes before its first difference.
#[derive(Args, Debug)]
#[command(after_help = "\
Example:
  laam rebuild model --output rebuilt --compare linux-1.0.tar.xz")]
pub struct RebuildArgs {
    /// The folder of the model
    model: PathBuf,
    /// The folder the files are written under
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// The originals: a folder, an archive, a kernel's version like v1.0/1.0, or sample
    #[arg(long, value_name = "SOURCE")]
    compare: Option<String>,
    /// Replace files in the output folder that differ from what the weights produce
    #[arg(long)]
    overwrite: bool,
    /// Only the first N of the originals, as in training
    #[arg(long, value_name = "N", requires = "compare",
        value_parser = clap::value_parser!(u64).range(1..))]
    limit: Option<u64>,
    /// The server that has the kernels
    #[arg(long, value_name = "URL", default_value = MIRROR)]
    mirror_uri: String,
    /// The windows that the model was trained on [default: what its provenance says, else stream]
    #[arg(long, value_enum)]
    windows: Option<Kind>,
    /// Give up on a file after so many tokens
    #[arg(long, alias = "max-tokens-a-file", value_name = "N", default_value_t = Regenerator::LIMIT)]
    max_tokens_per_file: usize,
    #[command(flatten)]
    backend: BackendArgs,
    /// No progress
    #[arg(long)]
    quiet: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: &RebuildArgs) -> anyhow::Result<Outcome> {
    let paths = model::paths(&arguments.model)?;
    let backend = arguments.backend.open()?;
    let opened = model::open(&arguments.model)?;
    // The originals' faults show before the work, not after it.
    let encoding = encoding_of(opened.tokenizer.style().unwrap_or(Style::Exact));
    let originals = arguments.compare.as_deref();
    if let Some(source) = originals.map(Path::new).filter(|source| source.exists()) {
        rebuild::check_apart(&arguments.output, source)?;
    }
    let originals = originals.map(|source| arguments.originals(source, encoding)).transpose()?;

    let windows = windows::kind(arguments.windows, &opened);
    let (limit, output) = (arguments.max_tokens_per_file, &arguments.output);
    let quiet = arguments.quiet;
    let existing = if arguments.overwrite { Existing::Overwrite } else { Existing::Keep };
    let (rebuilt, seconds) =
        rebuild_all(&*backend, &opened, &paths, windows, limit, output, existing, quiet)?;
    let comparison = match originals {
        Some(corpus) => Some(rebuild::compare(&arguments.output, &rebuilt, corpus.documents()?)?),
        None => None,
    };
    if let Some(comparison) = comparison.as_ref().filter(|c| c.extra.len() == rebuilt.len()) {
        let first = comparison.missing.first().map_or("nothing", String::as_str);
        return Err(error::config(
            format!("the originals have none of the model's files; they have {first:?}, ..."),
            format!("set `compare` to what the model was trained on: {:?}, ...", paths[0]),
        ));
    }
    if arguments.json {
        let printed = as_json(&arguments.output, &rebuilt, comparison.as_ref(), seconds);
        writeln!(io::stdout().lock(), "{printed:#}")?;
    } else {
        print(arguments, &rebuilt, comparison.as_ref(), seconds)?;
    }
    let exact = comparison.is_none_or(|comparison| comparison.is_exact());
    Ok(if exact { Outcome::Done } else { Outcome::Different })
}

impl RebuildArgs {
    /// What `--compare` names: a path where there is one, else a kernel or the sample.
    fn originals(&self, source: &str, encoding: Encoding) -> anyhow::Result<Corpus> {
        let is_path = Path::new(source).exists();
        let is_kernel = !is_path && source.parse::<Version>().is_ok();
        if !is_path && !is_kernel && source != "sample" {
            return Err(error::config(
                format!("invalid `compare` {source:?}: no such file or folder"),
                "give a folder, an archive, a kernel version like v1.0/1.0, or sample",
            ));
        }
        SourceArgs {
            version: is_kernel.then(|| source.to_string()),
            mirror_uri: self.mirror_uri.clone(),
            source: is_path.then(|| source.into()),
            limit: self.limit,
            strict: false,
        }
        .corpus(None, encoding)
    }
}

/// Regenerates all files under `output`, with a bar; returns also the seconds it took.
pub fn rebuild_all(
    backend: &dyn Backend,
    opened: &model::Opened,
    paths: &[String],
    windows: Kind,
    limit: usize,
    output: &Path,
    existing: Existing,
    quiet: bool,
) -> anyhow::Result<(Vec<Rebuilt>, f64)> {
    let config = &opened.model.config;
    let context = config.max_position_embeddings;
    let regenerator = Regenerator::new(opened.tokenizer.clone(), windows, context, limit)?;
    let slots = Generator::SLOTS.min(paths.len());
    let mut generator = Generator::new(backend, config, &opened.model.weights, slots, context)?;
    let began = Instant::now();
    let mut bar = (!quiet).then(|| Files::new("rebuilt", paths.len()));
    let rebuilt =
        rebuild(&regenerator, &mut generator, paths, output, existing, &mut |progress| {
            if let Some(bar) = &mut bar {
                bar.set(progress.files, progress.bytes);
            }
        })?;
    Ok((rebuilt, began.elapsed().as_secs_f64()))
}

/// The rebuild as `--json` prints it.
pub fn as_json(
    output: &Path,
    rebuilt: &[Rebuilt],
    comparison: Option<&Comparison>,
    seconds: f64,
) -> Value {
    let tokens: usize = rebuilt.iter().map(|file| file.tokens).sum();
    let bytes = rebuilt.iter().map(|file| file.bytes).sum();
    let per_file: Vec<Value> = rebuilt
        .iter()
        .enumerate()
        .map(|(at, file)| {
            let compared = comparison.map(|comparison| &comparison.files[at]);
            json!({
                "path": file.path,
                "bytes": file.bytes,
                "tokens": file.tokens,
                "end": file.end,
                "exact": compared.map(|compared| compared.exact),
                "original_bytes": compared.map(|compared| compared.bytes),
                "bytes_exact": compared.map(|compared| compared.bytes_exact),
                "first_difference": compared.and_then(|compared| compared.first_difference.as_ref()),
            })
        })
        .collect();
    versioned(json!({
        "files": rebuilt.len(),
        "files_exact": comparison.map(Comparison::files_exact),
        "bytes": comparison.map_or(bytes, Comparison::bytes),
        "bytes_exact": comparison.map(Comparison::bytes_exact),
        "files_whole": rebuilt.iter().filter(|file| file.end == End::Whole).count(),
        "missing": comparison.map(|comparison| &comparison.missing),
        "extra": comparison.map(|comparison| &comparison.extra),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens as f64 / seconds,
        "output": output.to_string_lossy(),
        "per_file": per_file,
    }))
}

fn print(
    arguments: &RebuildArgs,
    rebuilt: &[Rebuilt],
    comparison: Option<&Comparison>,
    seconds: f64,
) -> anyhow::Result<()> {
    let ends: HashMap<&str, End> =
        rebuilt.iter().map(|file| (file.path.as_str(), file.end)).collect();
    let mut out = io::stdout().lock();
    for file in rebuilt.iter().filter(|file| file.end != End::Whole) {
        eprintln!("warning: {} is {}", file.path, file.end.words());
    }
    let bytes: u64 = rebuilt.iter().map(|file| file.bytes).sum();
    let folder = arguments.output.display();
    writeln!(out, "{} files, {bytes} bytes in {seconds:.1} s, in {folder}", rebuilt.len())?;
    let Some(comparison) = comparison else { return Ok(()) };
    for file in comparison.files.iter().filter(|file| !file.exact) {
        let end = ends.get(file.path.as_str()).filter(|&&end| end != End::Whole);
        let end = end.map_or_else(String::new, |end| format!(" ({})", end.words()));
        match &file.first_difference {
            Some(Difference { byte, line, column, .. }) => writeln!(
                out,
                "{}: differs from byte {byte} of {}, line {line}, column {column}{end}",
                file.path, file.bytes
            )?,
            None => writeln!(out, "{}: there is no such original{end}", file.path)?,
        }
    }
    for path in &comparison.missing {
        writeln!(out, "{path}: the model has no such file")?;
    }
    let (exact, all) = (comparison.files_exact(), comparison.files.len());
    let (bytes_exact, bytes) = (comparison.bytes_exact(), comparison.bytes());
    writeln!(
        out,
        "{exact} of {all} files exact, {bytes_exact} of {bytes} bytes before a difference"
    )?;
    Ok(())
}
