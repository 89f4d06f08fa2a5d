//! `laam memorization`: what the weights hold of a text, and what they would hold by chance.

use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use serde_json::{Value, json};

use super::backend::BackendArgs;
use super::interrupt::{self, Work};
use super::output::{print_json, say, stdout};
use super::progress::Progress;
use super::rebuild::AGAIN;
use super::source::{self, SourceArgs};
use super::windows::{self, Cut, WindowShape};
use super::{Outcome, model};
use crate::backend::Backend;
use crate::corpus::{Corpus, Document};
use crate::error::{ErrorKind, Hint};
use crate::escape::visible;
use crate::files::{self, write_atomically};
use crate::memorization::measure::{Memorized, Question, measure, spread};
use crate::memorization::size;
use crate::memorization::verbatim::{PREFIX, SUFFIX};
use crate::model::{Layout, initialize, weight_paths};
use crate::output::{OutputFolder, check_free, refuse_foreign, remove_temporaries};
use crate::schema::versioned;
use crate::tokens::{WindowKind, Windows};

/// Measure what a model holds of a text, by one forward pass.
///
/// verbatim_rate is the part of the windows whose next --suffix tokens greedy decoding gives back, given
/// their first --prefix ones (of addressed windows, given the address and so much of the stretch).
/// control says the same of an untrained model, and of the files with their lines in reverse order,
/// which no model was trained on. Without a source: the text the model was trained on, if that is the
/// built-in sample or a kernel release; any other has to be named.
#[derive(Args, Debug)]
#[command(after_help = "\
Example:
  laam memorization model --source linux/kernel --report measures
  laam memorization Llama-3.2-1B --source 'books/*.txt' --prefix 50 --suffix 50 --stride 100")]
pub struct MemorizationArgs {
    /// The folder of the model
    model: PathBuf,
    #[command(flatten)]
    source: SourceArgs,
    /// True tokens the model is given of a window
    #[arg(long, value_name = "N", default_value_t = PREFIX,
        value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=1 << 20))]
    prefix: usize,
    /// Tokens it has to go on with
    #[arg(long, value_name = "N", default_value_t = SUFFIX,
        value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=1 << 20))]
    suffix: usize,
    /// How the text is cut into windows [default: as in training, else stream]
    #[arg(long, value_enum)]
    windows: Option<WindowKind>,
    /// The inputs of a window [default: the model's; of a model that laam did not train at most 1024]
    #[arg(long, value_name = "N", conflicts_with = "stride")]
    max_position_embeddings: Option<usize>,
    /// Windows of exactly prefix + suffix tokens instead, one every N tokens of the text, each within one
    /// document; whole-text measures such as bits_per_parameter are then left out
    #[arg(long, value_name = "N", conflicts_with = "windows",
        value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..))]
    stride: Option<usize>,
    /// Also write memorization.json, files.csv, windows.csv and heat.json into this folder
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
    #[command(flatten)]
    backend: BackendArgs,
    /// No progress
    #[arg(long)]
    quiet: bool,
    /// Print one JSON object on stdout, of an error too
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: &MemorizationArgs) -> anyhow::Result<Outcome> {
    interrupt::watch(Work::Measuring)?;
    let _report = arguments.report.as_deref().map(claim).transpose()?;
    let backend = arguments.backend.open()?;
    let opened = model::open(&arguments.model)?;
    let corpus = arguments.source.corpus_of_model(&opened)?;
    let question = Question { prefix: arguments.prefix, suffix: arguments.suffix };
    let fixed = arguments.stride.map(|_| question.prefix + question.suffix);
    let (kind, shape) = match arguments.stride {
        // Of no windows that training had.
        Some(_) => (WindowKind::Stream, WindowShape::of(&opened, fixed)?),
        None => (
            windows::kind(arguments.windows, &opened),
            WindowShape::of(&opened, arguments.max_position_embeddings)?,
        ),
    };
    let shape = WindowShape { stride: arguments.stride, fixed, ..shape };
    let measures = Measures::take(
        &*backend,
        &arguments.model,
        &opened,
        &corpus,
        (kind, shape),
        question,
        arguments.quiet,
    )?;
    if let Some(folder) = &arguments.report {
        measures.write(folder)?;
    }
    if arguments.json {
        print_json(&measures.json);
    } else {
        write!(stdout(), "{}", measures.text())?;
    }
    Ok(Outcome::Done)
}

/// Files of a report. The first says whose they are.
const NAMES: [&str; 4] = ["memorization.json", "heat.json", "files.csv", "windows.csv"];

/// Locks the folder of a report, which may hold an earlier one.
///
/// # Errors
/// Another process writes into it, or a file of these names is not laam's.
fn claim(folder: &Path) -> anyhow::Result<OutputFolder> {
    const MAX_REPORT_BYTES: u64 = 1 << 30;
    check_free(folder)?;
    let report = files::read_text(&folder.join(NAMES[0]), MAX_REPORT_BYTES).unwrap_or_default();
    let report: Value = serde_json::from_str(&report).unwrap_or_default();
    if !(report["by_prefix"].is_object() && report["control"].is_object()) {
        let paths = NAMES.map(|name| folder.join(name)).into_iter();
        refuse_foreign(&paths.filter(|path| path.symlink_metadata().is_ok()).collect::<Vec<_>>())?;
    }
    let output = OutputFolder::open(folder)?;
    for path in remove_temporaries(folder, |name| NAMES.contains(&name))? {
        say!("removed {}", path.display());
    }
    Ok(output)
}

/// Everything that is measured of a model and its text.
pub struct Measures {
    memorized: Memorized,
    cut: Cut,
    /// All of it but the pictures.
    pub json: Value,
}

/// Windows of a control: enough to tell nothing from something.
const CONTROLS: usize = 512;

impl Measures {
    /// `folder` is the model's.
    pub fn take(
        backend: &dyn Backend,
        folder: &Path,
        opened: &model::Opened,
        corpus: &Corpus,
        (kind, shape): (WindowKind, WindowShape),
        question: Question,
        quiet: bool,
    ) -> anyhow::Result<Self> {
        interrupt::watch(Work::Measuring)?;
        let (cut, manifest) = windows::cut(corpus, opened, kind, shape)?;
        let windows = &cut.windows;
        let config = &opened.model.config;
        let of = |weights: &[f32], windows: &Windows, numbers: &[usize], what: &str| {
            let batch = backend.micro_batch(numbers.len(), windows.context());
            let mut progress = (!quiet).then(|| Progress::new(what));
            let (bytes, all) = (manifest.bytes(), windows.len());
            let told = |done: usize| {
                if let Some(progress) = &mut progress {
                    // As much of the text as of the windows.
                    progress.set((bytes as f64 * done as f64 / all as f64) as u64, Some(bytes));
                }
                interrupt::check(AGAIN)
            };
            let tokenizer = &opened.tokenizer;
            measure(backend, config, weights, windows, tokenizer, numbers, question, batch, told)
        };
        let numbers = |windows: &Windows| -> anyhow::Result<Vec<usize>> {
            if shape.fixed.is_some() {
                windows.within_documents()
            } else {
                Ok((0..windows.len()).collect())
            }
        };
        let some = |windows: &Windows| -> anyhow::Result<Vec<usize>> {
            let all = numbers(windows)?;
            Ok(spread(all.len(), CONTROLS).into_iter().map(|at| all[at]).collect())
        };
        let all = numbers(windows)?;
        let memorized = of(&opened.model.weights, windows, &all, "measured")?;

        let seed = opened.provenance.as_ref().map_or(0, |provenance| provenance.seed);
        let fresh = initialize(config, &Layout::new(config), seed);
        let untrained = of(&fresh, windows, &some(windows)?, "control")?;
        let documents = || -> anyhow::Result<_> {
            let read = corpus.documents()?.map(|document| interrupt::check(AGAIN).and(document));
            Ok(read.map(|document| opened.tokenizer.decoded(document?)))
        };
        let reversed = documents()?.filter_map(|document| reverse(document).transpose());
        let mut reversed = reversed.peekable();
        let unseen = if reversed.peek().is_some() {
            let reversed = windows::cut_documents(reversed, opened, kind, shape)?;
            let numbers = some(&reversed.windows)?;
            Some(of(&opened.model.weights, &reversed.windows, &numbers, "control")?)
        } else {
            None
        };

        let xz = size::xz(documents()?)?;
        let weights_bytes = weight_paths(folder)?
            .iter()
            .try_fold(0, |sum, file| Ok::<u64, io::Error>(sum + fs::metadata(file)?.len()))
            .with_context(|| format!("cannot look at the weights in {}", folder.display()))
            .hint(ErrorKind::Checkpoint, || "the model may have changed meanwhile: run it again")?;
        let parameters = config.parameter_count() as f64;
        let bits_per_parameter =
            xz.map(|xz| (8.0 * xz as f64 - memorized.residual_bits) / parameters);
        // Windows that overlap, or leave text out, say nothing of the text as a whole.
        let is_whole = shape.fixed.is_none();
        let residual_bytes = is_whole.then(|| (memorized.residual_bits / 8.0).ceil() as u64);
        let mut json = serde_json::to_value(&memorized)?;
        let rates =
            [untrained.verbatim_rate, unseen.as_ref().and_then(|unseen| unseen.verbatim_rate)];
        for (name, value) in [
            ("question", json!(question)),
            ("window_kind", json!(kind)),
            ("windows", json!(all.len())),
            ("context", json!(windows.context())),
            ("stride", json!(shape.stride)),
            ("source", json!(source::described(&manifest))),
            ("parameters", json!(config.parameter_count() as u64)),
            ("bits_per_parameter", json!(bits_per_parameter.filter(|_| is_whole))),
            ("weights_bytes", json!(weights_bytes)),
            ("residual_bytes", json!(residual_bytes)),
            ("xz_bytes", json!(xz)),
            (
                "control",
                json!({
                    // What a claim has to exceed.
                    "verbatim_rate": rates.into_iter().flatten().reduce(f64::max),
                    "untrained": summary(&untrained, "the model with fresh weights"),
                    "unseen": unseen.as_ref().map(|unseen| {
                        summary(unseen, "the files with their lines in reverse order")
                    }),
                }),
            ),
        ] {
            json[name] = value;
        }
        Ok(Self { memorized, cut, json: versioned(json) })
    }

    /// Writes all of it: JSON, tables, and what a picture of the files takes.
    pub fn write(&self, folder: &Path) -> anyhow::Result<()> {
        let json = format!("{:#}\n", self.json);
        write_atomically(&folder.join("memorization.json"), json.as_bytes())?;
        let heat = versioned(json!({"files": self.memorized.heat}));
        write_atomically(&folder.join("heat.json"), heat.to_string().as_bytes())?;
        let mut files = String::from(
            "path,bytes,tokens,tokens_correct,bits,longest_run_bytes,windows,verbatim\n",
        );
        for file in &self.memorized.files {
            let _ = writeln!(
                files,
                "{},{},{},{},{},{},{},{}",
                cell(&file.path),
                file.bytes,
                file.tokens,
                file.tokens_correct,
                file.bits,
                file.longest_run_bytes,
                file.windows,
                file.verbatim
            );
        }
        write_atomically(&folder.join("files.csv"), files.as_bytes())?;
        let mut windows = String::from("path,chunk,verbatim,log10_p_z\n");
        for answer in &self.memorized.answers {
            let _ = writeln!(
                windows,
                "{},{},{},{}",
                cell(&self.memorized.files[answer.file].path),
                self.cut.windows.span(answer.window)?.chunk,
                u8::from(answer.exact),
                answer.log_p / std::f64::consts::LN_10
            );
        }
        write_atomically(&folder.join("windows.csv"), windows.as_bytes())
    }

    /// For a person.
    pub fn text(&self) -> String {
        let Memorized { prefixes, pythia, from_address, .. } = &self.memorized;
        let mut text = String::new();
        let percent = |rate: Option<f64>| {
            rate.map_or_else(|| "no window".to_string(), |rate| format!("{:.1}%", 100.0 * rate))
        };
        let json = &self.json;
        let question = &json["question"];
        let _ = writeln!(text, "source: {}", json["source"].as_str().unwrap_or_default());
        let _ = writeln!(
            text,
            "verbatim {}/{} tokens: {} (untrained {}, lines reversed {})",
            question["prefix"],
            question["suffix"],
            percent(self.memorized.verbatim_rate),
            percent(json["control"]["untrained"]["verbatim_rate"].as_f64()),
            percent(json["control"]["unseen"]["verbatim_rate"].as_f64()),
        );
        if let Some(share) = from_address {
            let (exact, all) = (share.exact, share.windows);
            let _ = writeln!(text, "whole windows from their address: {exact} of {all}");
        }
        for tally in prefixes.iter().chain([pythia]) {
            let (question, share) = (tally.question, tally.share);
            let _ = writeln!(
                text,
                "  prefix {}, suffix {}: {} ({} of {} windows)",
                question.prefix,
                question.suffix,
                percent(share.rate),
                share.exact,
                share.windows
            );
        }
        let run = &self.memorized.longest_run;
        let _ = writeln!(
            text,
            "longest verbatim run: {} bytes, from byte {} of {}",
            run.bytes,
            run.byte,
            visible(&run.path)
        );
        let _ = writeln!(text, "bits per byte: {:.6}", self.memorized.bits_per_byte);
        if let Some(bits) = json["bits_per_parameter"].as_f64() {
            let _ = writeln!(text, "bits per parameter: {bits:.3} (by what xz makes of the text)");
        }
        if json["residual_bytes"].is_null() {
            return text;
        }
        let _ = writeln!(
            text,
            "size: {} bytes of weights and {} of corrections; xz -9: {} bytes",
            json["weights_bytes"], json["residual_bytes"], json["xz_bytes"]
        );
        text
    }
}

/// The part of a control's measures that is compared.
fn summary(control: &Memorized, what: &str) -> Value {
    json!({
        "what": what,
        "windows": control.answers.len(),
        "verbatim_rate": control.verbatim_rate,
        "by_prefix": control.by_prefix,
        "from_address": control.from_address,
        "bits_per_byte": control.bits_per_byte,
        "longest_run_bytes": control.longest_run_bytes,
    })
}

/// The lines in reverse order: the same words under the same name, in a row nobody was trained on.
/// None where that is the file itself.
fn reverse(document: anyhow::Result<Document>) -> anyhow::Result<Option<Document>> {
    let Document { path, text, .. } = document?;
    let lines: Vec<&str> = text.split_inclusive('\n').collect();
    let reversed: String = lines.into_iter().rev().collect();
    Ok((reversed != text).then(|| Document::new(path, reversed)))
}

/// A cell of a CSV file, quoted where it has to be.
fn cell(text: &str) -> String {
    if text.contains([',', '"', '\n', '\r']) {
        format!("\"{}\"", text.replace('"', "\"\""))
    } else {
        text.to_string()
    }
}
