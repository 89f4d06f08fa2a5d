//! `laam sweep`: one recipe again and again, with a few keys changed.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use serde_json::{Map, Value, json};

use super::backend::BackendArgs;
use super::interrupt;
use super::output::{self, say};
use super::rebuild::AGAIN;
use super::rebuild::Rebuild;
use super::run::{Identity, claim, train};
use super::source::{SourceArgs, check_run_apart};
use super::windows::WindowShape;
use super::{Outcome, model, windows};
use crate::corpus::Corpus;
use crate::error::{ErrorKind, Hint};
use crate::files::{self, write_atomically};
use crate::memorization::measure::{Question, measure};
use crate::memorization::rebuild::Existing;
use crate::memorization::verbatim::{PREFIX, SUFFIX};
use crate::model::License;
use crate::output::{OutputFolder, check_free, refuse_foreign, remove_temporaries};
use crate::report::{self, sweep::plot_of};
use crate::schema::{SCHEMA_FIELD, upgrade, versioned};
use crate::tokens::TokenFile;
use crate::train::sweep::{Sweep, SweepRun};
use crate::train::{MAX_METRICS, RunEnd};

/// Some thirty numbers.
const MAX_RESULT: u64 = 1 << 20;

/// Run a recipe with a grid or a list of changes, and tell what came of each.
///
/// Every run has a folder of its own. Runs that are done are skipped and one that was cut off is
/// resumed: run the same command again. table.tsv, table.json, plot.svg and report.html are written
/// after each run. Where the recipe says rebuild, files_exact counts the files that came back from their names.
#[derive(Args, Debug)]
#[command(after_help = "\
A sweep is a TOML file:
  recipe = \"linux-kernel-dir\"          a recipe, or a file beside this one
  [set]                                of every run
  epochs = 40
  [grid]                               every combination
  muon_learning_rate = [0.01, 0.02]
  [[run]]                              and, or instead: these, one by one
  name = \"small batches\"               (else it is called by its keys)
  batch_size = 4
Example:
  laam sweep rates.toml --source linux/kernel --limit 7")]
pub struct SweepArgs {
    /// The sweep
    #[arg(value_name = "FILE.toml")]
    sweep: PathBuf,
    #[command(flatten)]
    source: SourceArgs,
    /// The folder for all runs [default: sweeps/NAME]
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Also write TensorBoard events into this folder, in one folder per run and stage
    #[arg(long, value_name = "DIR")]
    tensorboard: Option<PathBuf>,
    /// The license of the weights [default: by what the text is]
    #[arg(long, value_name = "ID")]
    license: Option<License>,
    #[command(flatten)]
    backend: BackendArgs,
    /// Print the result, or the error, as one JSON object on stdout
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: &SweepArgs) -> anyhow::Result<Outcome> {
    let sweep = Sweep::read(&arguments.sweep)?;
    let name = arguments.sweep.file_stem().unwrap_or_default();
    let folder = arguments.output.clone().unwrap_or_else(|| Path::new("sweeps").join(name));
    if let Some(run) = sweep.runs.first() {
        check_run_apart(&folder, &arguments.source.corpus_of_recipe(&run.recipe)?)?;
    }
    let _folder = claim_sweep(&folder)?;
    let (mut rows, mut outcome) = (Vec::new(), Outcome::Done);
    for (at, run) in sweep.runs.iter().enumerate() {
        say!("run {} of {}: {}", at + 1, sweep.runs.len(), run.name);
        let corpus = arguments.source.corpus_of_recipe(&run.recipe)?;
        match result(arguments, run, &corpus, &folder.join(&run.name))? {
            Ok(row) => rows.push((run, row)),
            Err(RunEnd::Diverged) => {
                say!("run {} diverged: it has no row in the table", run.name);
                outcome = Outcome::Different;
                continue;
            }
            Err(_) => return Ok(Outcome::Interrupted),
        }
        write(&folder, &sweep, &rows)?;
    }
    say!("the report is in {}", folder.join("report.html").display());
    if arguments.json {
        output::print_json(&as_json(&sweep, &rows));
    } else {
        write!(output::stdout(), "{}", table(&rows))?;
    }
    Ok(outcome)
}

/// Files that a sweep writes into its folder, besides one folder per run. The first says whose they are.
const NAMES: [&str; 3] = ["table.json", "table.tsv", "plot.svg"];

/// Locks the folder of a sweep.
///
/// # Errors
/// Another process writes into it, or files that a sweep would write are not laam's.
fn claim_sweep(folder: &Path) -> anyhow::Result<OutputFolder> {
    check_free(folder)?;
    let table = files::read_text(&folder.join(NAMES[0]), MAX_METRICS).unwrap_or_default();
    let table: Value = serde_json::from_str(&table).unwrap_or_default();
    if !(table["runs"].is_array() && table["description"].is_string()) {
        let paths = NAMES.map(|name| folder.join(name)).into_iter();
        let foreign: Vec<_> = paths.filter(|path| path.symlink_metadata().is_ok()).collect();
        refuse_foreign(&foreign)?;
    }
    let output = OutputFolder::open(folder)?;
    for path in remove_temporaries(folder, |name| NAMES.contains(&name))? {
        say!("removed {}", path.display());
    }
    Ok(output)
}

/// Result of a run, which is done first if it was not yet; or how it ended before its time.
fn result(
    arguments: &SweepArgs,
    run: &SweepRun,
    corpus: &Corpus,
    folder: &Path,
) -> anyhow::Result<Result<Value, RunEnd>> {
    let manifest = corpus.manifest()?;
    let _folder = claim(folder, &run.recipe, &Identity::new(&run.recipe, &manifest)?)?;
    let path = folder.join("result.json");
    match files::read_text(&path, MAX_RESULT) {
        Ok(text) => {
            let mut row = serde_json::from_str(&text)
                .map_err(anyhow::Error::from)
                .and_then(upgrade)
                .with_context(|| format!("invalid {}", path.display()))
                .hint(ErrorKind::Data, || "remove it: the run is then measured again")?;
            // The table has it once.
            row.as_object_mut().map(|row| row.shift_remove(SCHEMA_FIELD));
            return Ok(Ok(row));
        }
        Err(none) if none.kind() == io::ErrorKind::NotFound => {}
        Err(cause) => {
            return Err(cause)
                .with_context(|| format!("cannot read {}", path.display()))
                .hint(ErrorKind::Data, || "make it readable, or remove it");
        }
    }
    let license = arguments.license.as_ref();
    let (model, finishes) = train(
        &arguments.backend,
        &run.recipe,
        corpus,
        folder,
        license,
        arguments.tensorboard.as_ref().map(|events| events.join(&run.name)).as_deref(),
    )?;
    if let Some(early) = finishes.last().filter(|finish| finish.end != RunEnd::Complete) {
        return Ok(Err(early.end));
    }
    // Measures are taken in f32, whatever the weights were trained in.
    let backend = &*arguments.backend.open()?;
    let opened = model::open(&model)?;
    let (cut, manifest) = windows::cut(
        corpus,
        &opened,
        windows::kind(None, &opened),
        WindowShape::of(&opened, None)?,
    )?;
    let windows = &cut.windows;
    let config = &opened.model.config;
    let all: Vec<usize> = (0..windows.len()).collect();
    let question = Question { prefix: PREFIX, suffix: SUFFIX };
    let batch = backend.micro_batch(windows.len(), windows.context());
    let (weights, tokenizer) = (&opened.model.weights, &opened.tokenizer);
    let measured =
        measure(backend, config, weights, windows, tokenizer, &all, question, batch, |_| {
            interrupt::check(AGAIN)
        })?;
    let files_exact = if run.recipe.rebuild {
        let paths = model::paths(&model)?;
        let output = folder.join("rebuilt");
        let limit = 2 * longest(windows.file())?;
        let kind = windows.kind();
        let mut rebuild =
            Rebuild::run(backend, &opened, &paths, kind, limit, output, Existing::Overwrite, true)?;
        Some(rebuild.compare(corpus)?.files_exact())
    } else {
        None
    };
    let metrics = last_line(&model)?;
    let row = json!({
        "parameters": config.parameter_count() as u64,
        "steps": finishes.iter().map(|finish| finish.steps).sum::<u64>(),
        "tokens": metrics["tokens"],
        "seconds": metrics["seconds"],
        "loss": measured.loss,
        "bits_per_byte": measured.bits_per_byte,
        "verbatim_rate": measured.verbatim_rate,
        "windows_exact": measured.from_address.map(|share| share.exact),
        "windows": windows.len(),
        "files_exact": files_exact,
        "files": manifest.files.len(),
    });
    write_atomically(&path, format!("{:#}\n", versioned(row.clone())).as_bytes())?;
    Ok(Ok(row))
}

/// The most tokens of a document: a model that has not learned to end one is stopped at twice that.
fn longest(file: &TokenFile) -> anyhow::Result<usize> {
    (0..file.documents())
        .try_fold(1, |most, document| Ok(most.max(file.document(document)?.tokens.len())))
}

/// The last line of a model's metrics.
fn last_line(model: &Path) -> anyhow::Result<Value> {
    let path = model.join("metrics.jsonl");
    let text = files::read_text(&path, MAX_METRICS)
        .with_context(|| format!("cannot read {}", path.display()))
        .hint(ErrorKind::Data, || "remove the folder of the run: it is then done again")?;
    let last = text.lines().rev().find_map(|line| serde_json::from_str(line).ok());
    Ok(last.unwrap_or_default())
}

fn write(folder: &Path, sweep: &Sweep, rows: &[(&SweepRun, Value)]) -> anyhow::Result<()> {
    let json = as_json(sweep, rows);
    write_atomically(&folder.join("table.json"), format!("{json:#}\n").as_bytes())?;
    write_atomically(&folder.join("table.tsv"), table(rows).as_bytes())?;
    write_atomically(&folder.join("plot.svg"), plot_of(&json).as_bytes())?;
    report::write(folder).map(drop)
}

fn as_json(sweep: &Sweep, rows: &[(&SweepRun, Value)]) -> Value {
    // With the recipe's values, so that every run has a value for what any run changes.
    let keys: BTreeSet<&String> = rows.iter().flat_map(|(run, _)| run.changed.keys()).collect();
    let rows = rows.iter().map(|(run, row)| {
        let mut row = row.clone();
        row["name"] = json!(run.name);
        row["given"] = json!(run.given);
        row["changed"] = json!(run.changed);
        row["differs"] = keys.iter().map(|key| ((*key).clone(), run.recipe.value(key))).collect();
        row
    });
    versioned(json!({"description": sweep.description, "runs": rows.collect::<Vec<_>>()}))
}

/// Tab-separated, with a line of names.
fn table(rows: &[(&SweepRun, Value)]) -> String {
    let empty = Map::new();
    let columns = rows.first().and_then(|(_, row)| row.as_object()).unwrap_or(&empty);
    let mut text = String::from("name");
    for name in columns.keys() {
        let _ = write!(text, "\t{name}");
    }
    text.push('\n');
    for (run, row) in rows {
        text.push_str(&run.name);
        for name in columns.keys() {
            let _ = write!(text, "\t{}", row[name]);
        }
        text.push('\n');
    }
    text
}
