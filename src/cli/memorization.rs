//! `laam memorization`: what the weights hold of a text, and what they would hold by chance.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write};
use std::ops::Range;
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
use crate::dtype::Dtype;
use crate::error::{ErrorKind, Hint};
use crate::escape::visible;
use crate::export::{self, GgufDtype};
use crate::files::{self, write_atomically};
use crate::memorization::held_out::{self, TrainingSplit};
use crate::memorization::measure::{Memorized, Question, measure, spread};
use crate::memorization::recall::{Recall, RecallHead};
use crate::memorization::verbatim::{PREFIX, SUFFIX};
use crate::memorization::{occurrences, size};
use crate::model::{Layout, initialize, weight_paths};
use crate::output::{OutputFolder, check_free, refuse_foreign, remove_temporaries};
use crate::schema::versioned;
use crate::tokens::{WindowKind, Windows};

/// Measure what a model holds of a text, by one forward pass.
///
/// verbatim_rate is the part of the windows whose next --suffix tokens greedy decoding gives back, given
/// their first --prefix ones (of addressed windows, given the address and so much of the stretch): Carlini
/// et al. 2022. p_z is the probability that sampling gives the suffix, discoverable the part of the windows
/// that n samples find with probability p: Hayes et al. 2024, over a whole text Cooper et al. 2025. Rates
/// have 95% confidence intervals (Wilson), and are given by how often a passage occurs in the text.
///
/// control says the same of an untrained model, of the files with their lines in reverse order, and of text that
/// was held out: a fraction held out by --validation, files of the source that the model was not trained on, or
/// the text of --held-out. Windows whose passage occurs in the text that was trained on are left out of the last
/// two. rounding says it of the weights in
/// bfloat16 and in q8_0. Without a source: the text the model was trained on, if that is the built-in sample
/// or a kernel release; any other has to be named.
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
    /// Prefix length: tokens of a window that the model is given
    #[arg(long, value_name = "N", default_value_t = PREFIX,
        value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=1 << 20))]
    prefix: usize,
    /// Suffix length: tokens that it has to reproduce
    #[arg(long, value_name = "N", default_value_t = SUFFIX,
        value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=1 << 20))]
    suffix: usize,
    /// How the text is cut into windows [default: as in training, else stream]
    #[arg(long, value_enum)]
    windows: Option<WindowKind>,
    /// Sequence length: tokens per window [default: the model's; of a model that laam did not train at most 1024]
    #[arg(long, value_name = "N", conflicts_with = "stride")]
    max_position_embeddings: Option<usize>,
    /// Windows of exactly prefix + suffix tokens instead, one every N tokens of the text, each within one
    /// document; whole-text measures such as bits_per_parameter are then left out
    #[arg(long, value_name = "N", conflicts_with = "windows",
        value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..))]
    stride: Option<usize>,
    /// A text of the same kind that the model was not trained on, for control.held_out: files as --source
    /// takes them, a kernel's version like v1.0/1.0, or sample [default: what training held out or left out
    /// of the source, if that is known]
    #[arg(long, value_name = "SOURCE")]
    held_out: Option<String>,
    /// Also write memorization.json, files.csv, windows.csv, rates.csv and heat.json into this folder
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
    #[command(flatten)]
    backend: BackendArgs,
    /// No progress
    #[arg(long)]
    quiet: bool,
    /// Print the result, or the error, as one JSON object on stdout
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: &MemorizationArgs) -> anyhow::Result<Outcome> {
    interrupt::watch(Work::Measuring)?;
    let _report = arguments.report.as_deref().map(claim).transpose()?;
    let backend = arguments.backend.open()?;
    let opened = model::open(&arguments.model)?;
    let corpus = arguments.source.corpus_of_model(&opened)?;
    let held_out = arguments.held_out.as_deref().map(|source| {
        let others = SourceArgs { limit: None, ..arguments.source.clone() };
        others.other(source, "held_out", &opened.tokenizer)
    });
    let held_out = held_out.transpose()?;
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
        held_out.as_ref(),
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
const NAMES: [&str; 5] =
    ["memorization.json", "heat.json", "files.csv", "windows.csv", "rates.csv"];

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
    /// Windows that were held out, and the text they are of, if it is another one.
    held_out: Option<(Memorized, Option<Cut>)>,
    recall: Option<Recall>,
    /// All of it but the pictures.
    pub json: Value,
}

/// Windows of a control, or of rounded weights: enough to tell nothing from something.
const CONTROLS: usize = 512;

/// Papers that a measure is of, by its name in the JSON.
const PAPERS: [(&str, &str); 8] = [
    ("verbatim_rate", CARLINI),
    ("by_prefix", CARLINI),
    ("by_occurrence", CARLINI),
    ("p_z", HAYES),
    ("discoverable", HAYES),
    (
        "heat",
        "p_z along a whole text: Cooper et al. 2025, Extracting memorized pieces of (copyrighted) books from open-weight language models",
    ),
    (
        "pythia",
        "Biderman et al. 2023, Emergent and Predictable Memorization in Large Language Models",
    ),
    (
        "interval",
        "Wilson 1927, Probable Inference, the Law of Succession, and Statistical Inference",
    ),
];
const CARLINI: &str = "Carlini et al. 2022, Quantifying Memorization Across Neural Language Models";
const HAYES: &str =
    "Hayes et al. 2024, Measuring memorization in language models via probabilistic extraction";

impl Measures {
    /// `folder` is the model's. `held_out` is a text that it was not trained on.
    pub fn take(
        backend: &dyn Backend,
        folder: &Path,
        opened: &model::Opened,
        corpus: &Corpus,
        held_out: Option<&Corpus>,
        (kind, shape): (WindowKind, WindowShape),
        question: Question,
        quiet: bool,
    ) -> anyhow::Result<Self> {
        interrupt::watch(Work::Measuring)?;
        let (cut, manifest) = windows::cut(corpus, opened, kind, shape)?;
        let windows = &cut.windows;
        let config = &opened.model.config;
        let provenance = opened.provenance.as_ref();
        let of = |weights: &[f32], windows: &Windows, numbers: &[usize], what: &str| {
            let batch = backend.micro_batch(numbers.len().max(1), windows.context());
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
        let some = |all: &[usize]| -> Vec<usize> {
            spread(all.len(), CONTROLS).into_iter().map(|at| all[at]).collect()
        };
        let all = numbers(windows)?;
        let split = held_out::split(windows, &all, &opened.tokenizer, &manifest, provenance)?;
        let trained = split.as_ref().map_or(&all, |split| &split.trained);
        let weights = &opened.model.weights;
        let text = windows.file();
        let is_trained =
            |tokens: &Range<usize>| split.as_ref().is_none_or(|split| split.has(tokens, text));
        let mut memorized = of(weights, windows, trained, "measured")?;
        memorized.count_occurrences(text, question, is_trained)?;
        // Of a control: windows that say nothing that the model was trained on.
        let unknown = |windows: &Windows, numbers: Vec<usize>| {
            occurrences::unknown(windows, numbers, question.tokens(), text, is_trained)
        };

        let seed = provenance.map_or(0, |provenance| provenance.seed);
        let layout = Layout::new(config);
        let fresh = initialize(config, &layout, seed);
        let sample = some(trained);
        let untrained = of(&fresh, windows, &sample, "control")?;
        drop(fresh);
        let documents = || -> anyhow::Result<_> {
            let read = corpus.documents()?.map(|document| interrupt::check(AGAIN).and(document));
            let read = read.map(|document| opened.tokenizer.decoded(document?));
            let has = |at: usize| split.as_ref().is_none_or(|split| split.has_document(at));
            Ok(read.enumerate().filter(move |(at, _)| has(*at)).map(|(_, document)| document))
        };
        let reversed = documents()?.filter_map(|document| reverse(document).transpose());
        let mut reversed = reversed.peekable();
        let unseen = if reversed.peek().is_some() {
            let reversed = windows::cut_documents(reversed, opened, kind, shape)?;
            let numbers = unknown(&reversed.windows, some(&numbers(&reversed.windows)?))?;
            Some(of(weights, &reversed.windows, &numbers, "control")?)
        } else {
            None
        };
        let other =
            held_out.map(|text| windows::cut_other(text, opened, kind, shape)).transpose()?;
        let other = other.map(|(cut, _)| cut);
        let candidates = match (&other, &split) {
            (Some(cut), _) => Some(some(&numbers(&cut.windows)?)),
            (None, Some(split)) => Some(some(&split.held_out)),
            (None, None) => None,
        };
        let measure_held_out = |candidates: Vec<usize>| {
            let windows = other.as_ref().map_or(windows, |cut| &cut.windows);
            let all = candidates.len();
            let numbers = unknown(windows, candidates)?;
            let mut measured = of(weights, windows, &numbers, "control")?;
            measured.count_occurrences(windows.file(), question, |_| true)?;
            anyhow::Ok((measured, all - numbers.len()))
        };
        let (held_out, known_windows) = candidates.map(measure_held_out).transpose()?.unzip();
        let held_out = held_out.map(|measured| (measured, other));
        let rounded = |weights: Vec<f32>| of(&weights, windows, &sample, "rounded");
        let bfloat16 = rounded(weights.iter().map(|&weight| Dtype::Bf16.round(weight)).collect())?;
        let q8_0 = rounded(export::rounded(weights, &layout, GgufDtype::Q8_0))?;
        let as_saved = of(weights, windows, &sample, "rounded")?;
        let recall = Recall::read(folder, &RecallHead::of(windows)?)?;

        // Of a document that is trained on in part, xz would count the rest.
        let has_parts = split.as_ref().is_some_and(TrainingSplit::is_within_document);
        let xz = if has_parts { None } else { size::xz(documents()?)? };
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
        let controls =
            [Some(&untrained), unseen.as_ref(), held_out.as_ref().map(|(measured, _)| measured)];
        let rates = controls.into_iter().flatten().filter_map(|control| control.verbatim_rate);
        let what_held_out = match &held_out {
            Some((_, Some(_))) => "the text of held_out",
            _ => "text of the source that the model was not trained on",
        };
        for (name, value) in [
            ("question", json!(question)),
            ("verbatim", json!(memorized.asked())),
            ("window_kind", json!(kind)),
            ("windows", json!(trained.len())),
            ("context", json!(windows.context())),
            ("stride", json!(shape.stride)),
            ("source", json!(source::described(&manifest))),
            ("parameters", json!(config.parameter_count() as u64)),
            ("bits_per_parameter", json!(bits_per_parameter.filter(|_| is_whole))),
            ("weights_bytes", json!(weights_bytes)),
            ("residual_bits", json!(is_whole.then_some(memorized.residual_bits))),
            ("residual_bytes", json!(residual_bytes)),
            ("longest_run", json!(is_whole.then_some(&memorized.longest_run))),
            ("longest_run_bytes", json!(is_whole.then_some(memorized.longest_run_bytes))),
            ("xz_bytes", json!(xz)),
            (
                "control",
                json!({
                    // What a claim has to exceed.
                    "verbatim_rate": rates.reduce(f64::max),
                    "untrained": summary(&untrained, "the model with fresh weights"),
                    "unseen": unseen.as_ref().map(|unseen| {
                        summary(unseen, "the files with their lines in reverse order")
                    }),
                    "held_out": held_out.as_ref().map(|(measured, _)| {
                        let mut summary = summary(measured, what_held_out);
                        summary["by_occurrence"] = json!(measured.by_occurrence);
                        summary["files"] = json!(measured.files.len());
                        summary["known_windows"] = json!(known_windows);
                        summary
                    }),
                }),
            ),
            (
                "rounding",
                json!({
                    "as_saved": summary(&as_saved, "the weights as they are saved"),
                    "bfloat16": summary(&bfloat16, "all weights in bfloat16"),
                    "q8_0": summary(&q8_0, "matrices in blocks of 32 8-bit integers, as laam export gguf \
                                            --dtype q8_0 writes them"),
                }),
            ),
            ("recall", json!(recall)),
            ("papers", json!(BTreeMap::from(PAPERS))),
        ] {
            json[name] = value;
        }
        Ok(Self { memorized, cut, held_out, recall, json: versioned(json) })
    }

    /// Rows of `rates.csv`: what was measured, of what, whose measure it is, and its counts and interval.
    fn rates(&self) -> String {
        let mut rows = String::from("measure,of,paper,windows,exact,rate,low,high\n");
        let paper = |measure: &str| {
            let found = PAPERS.iter().find(|(name, _)| *name == measure);
            found.map_or("", |(_, paper)| paper.split(',').next().unwrap_or_default())
        };
        let mut row = |measure: &str, of: &str, paper: &str, value: &Value| {
            let number =
                |value: &Value| if value.is_null() { String::new() } else { value.to_string() };
            let [windows, exact, rate] =
                ["windows", "exact", "rate"].map(|key| number(&value[key]));
            let [low, high] = [0, 1].map(|at| number(&value["interval"][at]));
            let _ = writeln!(
                rows,
                "{measure},{},{paper},{windows},{exact},{rate},{low},{high}",
                cell(of)
            );
        };
        let carlini = paper("verbatim_rate");
        row("verbatim_rate", "trained", carlini, &json!(self.memorized.asked()));
        for (group, name) in [
            ("control", "untrained"),
            ("control", "unseen"),
            ("control", "held_out"),
            ("rounding", "as_saved"),
            ("rounding", "bfloat16"),
            ("rounding", "q8_0"),
        ] {
            let value = &self.json[group][name];
            if !value.is_null() {
                row("verbatim_rate", name, carlini, &value["verbatim"]);
            }
        }
        let list = |name: &str| self.json[name].as_array().into_iter().flatten();
        for value in list("prefixes") {
            row("by_prefix", &format!("prefix {}", value["prefix"]), paper("by_prefix"), value);
        }
        row("pythia", "prefix 32", paper("pythia"), &self.json["pythia"]);
        if !self.json["from_address"].is_null() {
            row("from_address", "trained", "", &self.json["from_address"]);
        }
        for value in list("by_occurrence") {
            let of = format!("{} to {} occurrences", value["from"], value["to"]);
            row("by_occurrence", &of, paper("by_occurrence"), value);
        }
        for value in list("discoverable") {
            let of = format!("n {} p {}", value["n"], value["p"]);
            row("discoverable", &of, paper("discoverable"), value);
        }
        rows
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
        write_atomically(&folder.join("rates.csv"), self.rates().as_bytes())?;
        let mut windows = String::from(
            "path,chunk,verbatim,log10_p_z,occurrences,first_recall_step,lasting_recall_step,held_out\n",
        );
        let held_out = self.held_out.as_ref();
        let held_out =
            held_out.map(|(measured, cut)| (measured, cut.as_ref().unwrap_or(&self.cut)));
        let all = [Some((&self.memorized, &self.cut)), held_out];
        for (is_held_out, (memorized, cut)) in all.into_iter().flatten().enumerate() {
            for answer in &memorized.answers {
                let recall = self.recall.as_ref().filter(|_| is_held_out == 0);
                let step = |of: fn(&Recall) -> &Vec<Option<u64>>| {
                    let step = recall.and_then(|recall| *of(recall).get(answer.window)?);
                    step.map_or_else(String::new, |step| step.to_string())
                };
                let _ = writeln!(
                    windows,
                    "{},{},{},{},{},{},{},{is_held_out}",
                    cell(&memorized.files[answer.file].path),
                    cut.windows.span(answer.window)?.chunk,
                    u8::from(answer.exact),
                    answer.log_p / std::f64::consts::LN_10,
                    answer.occurrences,
                    step(|recall| &recall.first),
                    step(|recall| &recall.lasting),
                );
            }
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
        let interval = |interval: &Value| match [0, 1].map(|at| interval[at].as_f64()) {
            [Some(low), Some(high)] => format!(" [{:.1}%, {:.1}%]", 100.0 * low, 100.0 * high),
            _ => String::new(),
        };
        let rate_of = |summary: &Value| percent(summary["verbatim_rate"].as_f64());
        let _ = writeln!(text, "source: {}", json["source"].as_str().unwrap_or_default());
        let control = &json["control"];
        let _ = writeln!(
            text,
            "verbatim {}/{} tokens (Carlini et al. 2022): {}{} (untrained {}, lines reversed {}{})",
            question["prefix"],
            question["suffix"],
            percent(self.memorized.verbatim_rate),
            interval(&json["verbatim_interval"]),
            rate_of(&control["untrained"]),
            rate_of(&control["unseen"]),
            if control["held_out"].is_null() {
                String::new()
            } else {
                let held_out = &control["held_out"];
                format!(
                    ", held out {}{}",
                    rate_of(held_out),
                    interval(&held_out["verbatim"]["interval"])
                )
            }
        );
        for tally in &self.memorized.by_occurrence {
            let (from, to, share) = (tally.from, tally.to, tally.share);
            let times = if from == to { from.to_string() } else { format!("{from} to {to}") };
            let _ = writeln!(
                text,
                "  passages that occur {times} x: {} ({} of {} windows)",
                percent(share.rate),
                share.exact,
                share.windows
            );
        }
        let sampled = self.json["discoverable"].as_array().into_iter().flatten();
        for row in sampled.filter(|row| row["p"] == 0.5) {
            let _ = writeln!(
                text,
                "({}, 0.5)-discoverable (Hayes et al. 2024): {}{}",
                row["n"],
                percent(row["rate"].as_f64()),
                interval(&row["interval"])
            );
        }
        let rounding = &json["rounding"];
        let _ = writeln!(
            text,
            "weights rounded to bfloat16: verbatim {}; to q8_0: {}; as saved: {} (of {} windows)",
            rate_of(&rounding["bfloat16"]),
            rate_of(&rounding["q8_0"]),
            rate_of(&rounding["as_saved"]),
            rounding["as_saved"]["windows"]
        );
        if let Some(Recall { windows, by_step, .. }) = &self.recall
            && let Some(last) = by_step.last()
        {
            let _ = writeln!(
                text,
                "recalled in training: {} of {windows} windows at some measurement, {} to the end",
                last.first, last.lasting
            );
        }
        if let Some(share) = from_address {
            let counts = |share: &Value| {
                format!(
                    "{} of {}{}",
                    share["exact"],
                    share["windows"],
                    interval(&share["interval"])
                )
            };
            let _ = write!(text, "whole windows from their address: {}", counts(&json!(share)));
            let held_out = &json["control"]["held_out"]["from_address"];
            let held_out = if held_out.is_null() {
                String::new()
            } else {
                format!(", held out {}", counts(held_out))
            };
            let _ = writeln!(text, "{held_out}");
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
        if !json["longest_run"].is_null() {
            let run = &self.memorized.longest_run;
            let _ = writeln!(
                text,
                "longest verbatim run: {} bytes, from byte {} of {}",
                run.bytes,
                run.byte,
                visible(&run.path)
            );
        }
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
        "verbatim": control.asked(),
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
