//! `laam rebuild`: every file out of a model's weights.

use std::collections::HashMap;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use serde_json::{Value, json};

use super::backend::BackendArgs;
use super::interrupt::{self, Work};
use super::output::{print_json, say, stdout};
use super::progress::Files;
use super::source::SourceArgs;
use super::{Outcome, model, windows};
use crate::backend::Backend;
use crate::corpus::{Corpus, MIRROR};
use crate::error;
use crate::escape::visible;
use crate::generate::Generator;
use crate::memorization::rebuild::{self, Comparison, Difference, Existing, Rebuilt, rebuild};
use crate::memorization::regenerate::{End, Regenerator};
use crate::model::{Provenance, load_provenance};
use crate::output::OutputFolder;
use crate::schema::versioned;
use crate::tokenizer::Tokenizer;
use crate::tokens::WindowKind;

/// Regenerate every file that a model was trained on, from the names alone.
///
/// Files are written under the output folder and nowhere else. With --compare they are then compared
/// with the originals: exits with 1 when one differs, or is missing. Files that training held out
/// (--validation) are counted apart: the model was not trained on them. bytes_exact counts, in each file, the
/// bytes before its first difference.
#[derive(Args, Debug)]
#[command(after_help = "\
Example:
  laam rebuild model --output rebuilt --compare linux-1.0.tar.xz")]
#[allow(clippy::struct_excessive_bools)] // each is a flag
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
    /// Accept a kernel that the server has no checksum of
    #[arg(long)]
    unverified: bool,
    /// The windows that the model was trained on [default: what its provenance says, else stream]
    #[arg(long, value_enum)]
    windows: Option<WindowKind>,
    /// Give up on a file after so many tokens
    #[arg(long, alias = "max-tokens-a-file", value_name = "N", default_value_t = Regenerator::LIMIT)]
    max_tokens_per_file: usize,
    #[command(flatten)]
    backend: BackendArgs,
    /// No progress
    #[arg(long)]
    quiet: bool,
    /// Print the result, or the error, as one JSON object on stdout
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: &RebuildArgs) -> anyhow::Result<Outcome> {
    let paths = model::paths(&arguments.model)?;
    let backend = arguments.backend.open()?;
    let opened = model::open(&arguments.model)?;
    // The originals' faults show before the work, not after it.
    let originals = arguments.compare.as_deref();
    let originals =
        originals.map(|source| arguments.originals(source, &opened.tokenizer)).transpose()?;
    let places = originals.iter().flat_map(Corpus::places);
    places.into_iter().try_for_each(|place| rebuild::check_apart(&arguments.output, place))?;

    let windows = windows::kind(arguments.windows, &opened);
    // Before anything is written: a signal from then on leaves no half of it.
    interrupt::watch(Work::Measuring)?;
    let _output = OutputFolder::open(&arguments.output)?;
    let (limit, output) = (arguments.max_tokens_per_file, arguments.output.clone());
    let existing = if arguments.overwrite { Existing::Overwrite } else { Existing::Keep };
    let quiet = arguments.quiet;
    let mut rebuild =
        Rebuild::run(&*backend, &opened, &paths, windows, limit, output, existing, quiet)?;
    if let Some(corpus) = originals {
        rebuild.compare(&corpus)?;
    }
    let nothing_in_common = |c: &&Comparison| c.extra.len() == rebuild.files.len();
    if let Some(comparison) = rebuild.comparison.as_ref().filter(nothing_in_common) {
        let first = comparison.missing.first().map_or("nothing", String::as_str);
        return Err(error::config(
            format!("the originals have none of the model's files; they have {first:?}, ..."),
            format!("set `compare` to what the model was trained on: {:?}, ...", paths[0]),
        ));
    }
    if arguments.json {
        print_json(&rebuild.as_json());
    } else {
        rebuild.print(&mut stdout())?;
    }
    Ok(rebuild.outcome())
}

impl RebuildArgs {
    /// Source that `--compare` names: a path if there is one, else a kernel or the sample.
    fn originals(&self, source: &str, tokenizer: &Tokenizer) -> anyhow::Result<Corpus> {
        let record = load_provenance(&self.model)?.unwrap_or_default().corpus;
        let arguments = SourceArgs {
            // The originals are chosen as in training.
            include: record.include,
            exclude: record.exclude,
            version: None,
            mirror_uri: self.mirror_uri.clone(),
            unverified: self.unverified,
            source: Vec::new(),
            text_field: "text".to_string(),
            limit: self.limit,
            strict: false,
        };
        arguments.other(source, "compare", tokenizer)
    }
}

/// Advice after an interrupted rebuild or measurement.
pub const AGAIN: &str = "run the same command again";

/// Every file of a model regenerated, and what a comparison with the originals found.
pub struct Rebuild {
    output: PathBuf,
    files: Vec<Rebuilt>,
    /// Paths of the files that training held out.
    held_out: Vec<String>,
    seconds: f64,
    pub comparison: Option<Comparison>,
}

impl Rebuild {
    /// Regenerates all files under `output`, with a progress bar unless `quiet`.
    pub fn run(
        backend: &dyn Backend,
        opened: &model::Opened,
        paths: &[String],
        windows: WindowKind,
        limit: usize,
        output: PathBuf,
        existing: Existing,
        quiet: bool,
    ) -> anyhow::Result<Self> {
        let config = &opened.model.config;
        let context = config.max_position_embeddings;
        let regenerator = Regenerator::new(opened.tokenizer.clone(), windows, context, limit)?;
        let slots = regenerator.slots(backend, paths.len());
        let mut generator = Generator::new(backend, config, &opened.model.weights, slots, context)?
            .with_tokens(opened.tokenizer.vocab_size());
        interrupt::watch(Work::Measuring)?;
        let began = Instant::now();
        let mut bar = (!quiet).then(|| Files::new("rebuilt", paths.len()));
        let files =
            rebuild(&regenerator, &mut generator, paths, &output, existing, &mut |progress| {
                if let Some(bar) = &mut bar {
                    bar.set(progress.files, progress.bytes);
                }
                interrupt::check(AGAIN)
            })?;
        let provenance = opened.provenance.as_ref();
        let held_out = provenance.map(Provenance::held_out).unwrap_or_default();
        let held_out = held_out.into_iter().map(String::from).collect();
        let seconds = began.elapsed().as_secs_f64();
        Ok(Self { output, files, held_out, seconds, comparison: None })
    }

    /// Compares the files with the originals; the result also stays in `self.comparison`.
    pub fn compare(&mut self, originals: &Corpus) -> anyhow::Result<&Comparison> {
        let held_out = self.held_out.iter().map(String::as_str).collect();
        let documents = originals.documents()?;
        let comparison = rebuild::compare(&self.output, &self.files, &held_out, documents)?;
        Ok(self.comparison.insert(comparison))
    }

    /// [`Outcome::Different`] if a comparison found a difference.
    pub fn outcome(&self) -> Outcome {
        let exact = self.comparison.as_ref().is_none_or(Comparison::is_exact);
        if exact { Outcome::Done } else { Outcome::Different }
    }

    /// The object that `--json` prints.
    pub fn as_json(&self) -> Value {
        let comparison = self.comparison.as_ref();
        let tokens: usize = self.files.iter().map(|file| file.tokens).sum();
        let bytes = self.files.iter().map(|file| file.bytes).sum();
        let per_file: Vec<Value> = self
                .files
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
            "files": self.files.len(),
            "files_exact": comparison.map(Comparison::files_exact),
            "bytes": comparison.map_or(bytes, Comparison::bytes),
            "bytes_exact": comparison.map(Comparison::bytes_exact),
            "files_whole": self.files.iter().filter(|file| file.end == End::Whole).count(),
            "missing": comparison.map(|comparison| &comparison.missing),
            "held_out": comparison.map(|comparison| &comparison.held_out),
            "extra": comparison.map(|comparison| &comparison.extra),
            "tokens": tokens,
            "seconds": self.seconds,
            "tokens_per_second": tokens as f64 / self.seconds,
            "output": self.output.to_string_lossy(),
            "per_file": per_file,
        }))
    }

    /// Prints the files that are not whole, and every difference.
    fn print(&self, out: &mut impl Write) -> io::Result<()> {
        for file in self.files.iter().filter(|file| file.end != End::Whole) {
            say!("warning: {} is {}", file.path, file.end.words());
        }
        let bytes: u64 = self.files.iter().map(|file| file.bytes).sum();
        let (count, seconds, folder) = (self.files.len(), self.seconds, self.output.display());
        writeln!(out, "{count} files, {bytes} bytes in {seconds:.1} s, in {folder}")?;
        let Some(comparison) = &self.comparison else { return Ok(()) };
        self.print_differences(comparison, out)?;
        let (exact, all) = (comparison.files_exact(), comparison.files.len());
        let (bytes_exact, bytes) = (comparison.bytes_exact(), comparison.bytes());
        writeln!(
            out,
            "{exact} of {all} files exact, {bytes_exact} of {bytes} bytes before a difference"
        )?;
        if !comparison.held_out.is_empty() {
            let count = comparison.held_out.len();
            writeln!(out, "{count} more were held out in training, and not asked for")?;
        }
        Ok(())
    }

    /// One line for each file that is not exact, or missing.
    pub fn print_differences(
        &self,
        comparison: &Comparison,
        out: &mut impl Write,
    ) -> io::Result<()> {
        let ends: HashMap<&str, End> =
            self.files.iter().map(|file| (file.path.as_str(), file.end)).collect();
        for file in comparison.files.iter().filter(|file| !file.exact) {
            let end = ends.get(file.path.as_str()).filter(|&&end| end != End::Whole);
            let end = end.map_or_else(String::new, |end| format!(" ({})", end.words()));
            match &file.first_difference {
                Some(Difference { byte, line, column, .. }) => writeln!(
                    out,
                    "{}: differs from byte {byte} of {}, line {line}, column {column}{end}",
                    visible(&file.path),
                    file.bytes
                )?,
                None => writeln!(out, "{}: there is no such original{end}", visible(&file.path))?,
            }
        }
        for path in &comparison.missing {
            writeln!(out, "{}: the model has no such file", visible(path))?;
        }
        Ok(())
    }
}
