//! `laam run`: everything, from the corpus to the proof.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::Context;
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::backend::BackendArgs;
use super::memorization::Measures;
use super::output::{Stderr, print_json, say, stdout, write_to_stderr};
use super::progress::Progress;
use super::rebuild::Rebuild;
use super::source::{self, SourceArgs, check_run_apart};
use super::train::{Stage, claimed};
use super::windows::WindowShape;
use super::{Outcome, model, plan, windows};
use crate::backend::Backend;
use crate::collective::Group;
use crate::corpus::{Corpus, Manifest, SAMPLE_NAMES, is_sample};
use crate::error::{self, ErrorKind, Hint};
use crate::files::{self, write_atomically};
use crate::memorization::measure::Question;
use crate::memorization::rebuild::Existing;
use crate::memorization::regenerate::Regenerator;
use crate::memorization::verbatim::{PREFIX, SUFFIX};
use crate::model::License;
use crate::output::{OutputFolder, check_free, refuse_foreign, remove_temporaries};
use crate::report;
use crate::schema::{SchemaVersion, versioned};
use crate::tokenizer::{Special, Tokenizer, Training};
use crate::train::recipe::Recipe;
use crate::train::{Consent, RunEnd, ShardKind, Share, TrainSummary};

/// Do everything: read the corpus, train the tokenizer and the model, and prove what it holds.
///
/// Without arguments: the built-in sample, memorized in a minute or so, without network. What is
/// done already is skipped, and what was cut off is resumed: run the same command again.
#[derive(Args, Debug)]
#[command(after_help = "\
Recipes, besides a file:
  sample            the built-in sample, in a minute
  linux-kernel-dir  a folder of some 150 kB, in minutes
  linux-5m          Linux 1.0, whole
  original          the first LaaM's two stages
Examples:
  laam run
  laam run --recipe linux-kernel-dir --source linux/kernel
  laam run --recipe original
  laam run --recipe sample --dry-run > mine.toml")]
pub struct RunArgs {
    #[command(flatten)]
    source: SourceArgs,
    /// A built-in recipe by name, or a TOML file
    #[arg(long, value_name = "NAME|FILE", default_value = "sample")]
    recipe: String,
    /// The folder for all that is made [default: runs/RECIPE]
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Print the recipe with every key it has, and what it asks of this machine; do nothing
    #[arg(long)]
    dry_run: bool,
    /// Also write TensorBoard events into this folder, in one folder per stage
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

/// A recipe with all its keys, and a hash.
const MAX_IDENTITY: u64 = 16 << 20;

/// Identity of a run: another one must not continue in its folder.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct Identity {
    #[serde(default)]
    pub schema_version: SchemaVersion,
    /// With every key it has, as TOML.
    pub recipe: String,
    pub corpus_sha256: String,
}

impl Identity {
    pub fn new(recipe: &Recipe, manifest: &Manifest) -> anyhow::Result<Self> {
        let (recipe, corpus_sha256) = (recipe.resolved()?, manifest.hash());
        Ok(Self { schema_version: SchemaVersion, recipe, corpus_sha256 })
    }

    /// True if the recipes have the same values, whatever their keys were called when written.
    fn is_same_recipe(&self, other: &Self) -> bool {
        let [ours, theirs] = [self, other].map(|identity| Recipe::parse(&identity.recipe).ok());
        ours.is_some() && ours == theirs
    }
}

pub fn run(arguments: &RunArgs) -> anyhow::Result<Outcome> {
    let recipe = Recipe::find(&arguments.recipe)?;
    if arguments.dry_run {
        return dry_run(&recipe, &arguments.backend, arguments.json);
    }
    // Proofs are taken in f32, whatever the weights were trained in.
    let backend = arguments.backend.open()?;
    let name = Path::new(&arguments.recipe).file_stem().unwrap_or_default();
    let folder = arguments.output.clone().unwrap_or_else(|| Path::new("runs").join(name));
    let corpus = arguments.source.corpus_of_recipe(&recipe)?;
    check_run_apart(&folder, &corpus)?;
    let manifest = corpus.manifest()?;
    say!("{}: {} files, {} bytes", manifest.source, manifest.documents(), manifest.bytes());
    let identity = Identity::new(&recipe, &manifest)?;
    let _folder = claim(&folder, &recipe, &identity)?;

    let license = arguments.license.as_ref();
    let (model, finishes) = train(
        &arguments.backend,
        &recipe,
        &corpus,
        &folder,
        license,
        arguments.tensorboard.as_deref(),
    )?;
    let end = finishes.last().map_or(RunEnd::Complete, |finish| finish.end);
    if end != RunEnd::Complete {
        if arguments.json {
            print_json(&versioned(json!({
                "output": folder.to_string_lossy(),
                "interrupted": end == RunEnd::Interrupted,
                "diverged": end == RunEnd::Diverged,
            })));
        }
        return Ok(end.into());
    }
    // What a person reads goes to stderr if JSON is asked for.
    let mut out: Box<dyn Write> =
        if arguments.json { Box::new(Stderr) } else { Box::new(stdout()) };
    let proof = prove(&*backend, &folder, &model, &corpus, recipe.rebuild, &mut out)?;
    let page = report::write(&folder)?;
    writeln!(out, "the model is in {}, the report in {}", model.display(), page.display())?;
    let mut self_test = None;
    if recipe.rebuild && proof.outcome == Outcome::Done && is_sample(&manifest.files) {
        let said = self_test.insert(compile_and_test(&folder)?);
        writeln!(out, "{said}")?;
    }
    if arguments.json {
        print_json(&versioned(json!({
            "source": source::described(&manifest),
            "output": folder.to_string_lossy(),
            "model": model.to_string_lossy(),
            "report": page.to_string_lossy(),
            "interrupted": false,
            "rebuild": proof.rebuild,
            "memorization": proof.memorization,
            "self_test": self_test,
        })));
    }
    Ok(proof.outcome)
}

/// Proof of what the saved weights hold.
struct Proof {
    outcome: Outcome,
    /// The object of `laam rebuild --json`, if the recipe rebuilds.
    rebuild: Option<Value>,
    /// The object of `laam memorization --json`.
    memorization: Value,
}

/// Trains the tokenizer and every stage, or finds them done. Returns the folder of the last model and how
/// each stage ended: the last one trained may have been interrupted, or have diverged.
pub fn train(
    backends: &BackendArgs,
    recipe: &Recipe,
    corpus: &Corpus,
    folder: &Path,
    license: Option<&License>,
    tensorboard: Option<&Path>,
) -> anyhow::Result<(PathBuf, Vec<TrainSummary>)> {
    let place = folder.join("tokenizer");
    if place.join("tokenizer.json").exists() {
        say!("the tokenizer is there: {}", place.display());
    } else {
        train_tokenizer(recipe, corpus, &place)?;
    }
    let tokenizer = Arc::new(Tokenizer::load(&place)?);
    let (mut before, mut finishes) = (None::<PathBuf>, Vec::new());
    for stage in &recipe.stages {
        if recipe.stages.len() > 1 {
            say!("stage {}", stage.name);
        }
        let output = folder.join(&stage.name);
        let stage = Stage {
            settings: &stage.settings,
            group: Group::alone(),
            shard: ShardKind::None,
            tokenizer: tokenizer.clone(),
            validates: false,
            validation: None,
            consent: Consent::Resume,
            weights: before,
            output: claimed(&output, Consent::Resume)?,
            metrics: output.join("metrics.jsonl"),
            tensorboard: tensorboard.map(|folder| folder.join(&stage.name)),
            goes_on: "the same command goes on from there",
            license: license.cloned(),
        };
        let backend = backends.open_in(stage.settings.precision)?;
        let finish = stage.train(&*backend, Some(corpus))?;
        finishes.push(finish);
        before = Some(output);
        if finish.end != RunEnd::Complete {
            break;
        }
    }
    Ok((before.unwrap_or_default(), finishes))
}

/// Names of what a run writes into its folder, besides one folder per stage.
const NAMES: [&str; 10] = [
    IDENTITY,
    "tokenizer",
    "corpus.tokens",
    "rebuilt",
    "rebuild.json",
    "memorization",
    "report.html",
    "compiled",
    "result.json",
    "sweep.html",
];
const IDENTITY: &str = "run.json";

/// Locks the folder of a run and writes down whose it is.
///
/// # Errors
/// Another process writes into it, it is another run's, or files in it that a run would write are not
/// laam's: nothing was changed then.
pub fn claim(folder: &Path, recipe: &Recipe, identity: &Identity) -> anyhow::Result<OutputFolder> {
    check_free(folder)?;
    let is_new = !is_same_run(folder, identity)?;
    if is_new {
        let stages = recipe.stages.iter().map(|stage| stage.name.as_str());
        let paths = NAMES.into_iter().chain(stages).map(|name| folder.join(name));
        let foreign: Vec<_> = paths.filter(|path| fs::symlink_metadata(path).is_ok()).collect();
        refuse_foreign(&foreign)?;
    }
    let output = OutputFolder::open(folder)?;
    for place in [folder.to_path_buf(), folder.join("tokenizer"), folder.join("memorization")] {
        for path in remove_temporaries(&place, |_| true)? {
            say!("removed {}", path.display());
        }
    }
    if is_new {
        let json = format!("{:#}\n", serde_json::to_value(identity)?);
        write_atomically(&folder.join(IDENTITY), json.as_bytes())?;
    }
    Ok(output)
}

/// True if the run was begun in the folder, false if none was; an error for another run.
fn is_same_run(folder: &Path, identity: &Identity) -> anyhow::Result<bool> {
    let path = folder.join(IDENTITY);
    let text = match files::read_text(&path, MAX_IDENTITY) {
        Ok(text) => text,
        Err(none) if none.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(cause) => {
            return Err(cause)
                .with_context(|| format!("cannot read {}", path.display()))
                .hint(ErrorKind::Data, || "choose another `output`, or remove that folder");
        }
    };
    let other = serde_json::from_str::<Identity>(&text).ok();
    let what = match other {
        Some(other) if other.is_same_recipe(identity) => {
            if other.corpus_sha256 == identity.corpus_sha256 {
                return Ok(true);
            }
            "corpus"
        }
        _ => "recipe",
    };
    Err(error::config(
        format!("{} has a run of another {what}", folder.display()),
        "choose another `output`, or remove that folder",
    ))
}

fn train_tokenizer(recipe: &Recipe, corpus: &Corpus, folder: &Path) -> anyhow::Result<()> {
    let training =
        Training { style: recipe.tokenizer.style, vocab_size: recipe.tokenizer.vocab_size };
    let mut progress = Progress::new("read");
    let (tokenizer, trained) = Tokenizer::train(&mut corpus.documents()?, &training, |stage| {
        if let crate::tokenizer::TrainingProgress::Read(bytes) = stage {
            progress.set(bytes, None);
        }
    })?;
    drop(progress);
    say!("tokenizer: {} tokens", trained.num_tokens);
    tokenizer.save(folder)
}

/// Asks the saved weights for what they hold: every file from its name alone, if the recipe says so,
/// and the measures of one pass.
fn prove(
    backend: &dyn Backend,
    folder: &Path,
    model: &Path,
    corpus: &Corpus,
    rebuild: bool,
    mut out: &mut dyn Write,
) -> anyhow::Result<Proof> {
    let opened = model::open(model)?;
    let kind = windows::kind(None, &opened);
    let (mut outcome, mut rebuilt) = (Outcome::Done, None);
    if rebuild {
        let paths = model::paths(model)?;
        // A file has no more tokens than bytes, but for the one that ends it.
        let longest = corpus.documents()?.try_fold(0, |longest: usize, document| {
            anyhow::Ok(longest.max(document?.text.len() + 1))
        })?;
        let (limit, output) = (longest.max(Regenerator::LIMIT), folder.join("rebuilt"));
        let mut rebuild = Rebuild::run(
            backend,
            &opened,
            &paths,
            kind,
            limit,
            output.clone(),
            Existing::Overwrite,
            false,
        )?;
        rebuild.compare(corpus)?;
        let json = rebuild.as_json();
        write_atomically(&folder.join("rebuild.json"), format!("{json:#}\n").as_bytes())?;
        if let Some(comparison) = &rebuild.comparison {
            rebuild.print_differences(comparison, &mut out)?;
            writeln!(
                out,
                "{} of {} files rebuilt byte for byte from their names, in {}",
                comparison.files_exact(),
                comparison.files.len(),
                output.display()
            )?;
        }
        outcome = rebuild.outcome();
        rebuilt = Some(json);
    }
    let question = Question { prefix: PREFIX, suffix: SUFFIX };
    let measures = Measures::take(
        backend,
        model,
        &opened,
        corpus,
        None,
        (kind, WindowShape::of(&opened, None)?),
        question,
        false,
    )?;
    measures.write(&folder.join("memorization"))?;
    write!(out, "{}", measures.text())?;
    Ok(Proof { outcome, rebuild: rebuilt, memorization: measures.json })
}

/// The rebuilt sample is a program: compiles it in a fresh folder and runs its self-test, if there is a
/// compiler.
fn compile_and_test(run: &Path) -> anyhow::Result<String> {
    let folder = run.join("compiled");
    let fresh = || -> io::Result<()> {
        match fs::remove_dir_all(&folder) {
            Err(cause) if cause.kind() != io::ErrorKind::NotFound => return Err(cause),
            _ => fs::create_dir(&folder)?,
        }
        SAMPLE_NAMES.iter().try_for_each(|name| {
            fs::copy(run.join("rebuilt/sample").join(name), folder.join(name)).map(drop)
        })
    };
    fresh()
        .with_context(|| format!("cannot copy the rebuilt sample to {}", folder.display()))
        .hint(ErrorKind::Data, || "remove that folder, and free some disk space")?;
    let is_c = |name: &&&str| Path::new(name).extension().is_some_and(|suffix| suffix == "c");
    let sources = SAMPLE_NAMES.iter().filter(is_c).map(|name| folder.join(name));
    let program = folder.join("toy-kernel");
    let compiled = match Command::new("cc").arg("-o").arg(&program).args(sources).output() {
        Ok(compiled) => compiled,
        Err(none) if none.kind() == io::ErrorKind::NotFound => {
            return Ok("not compiled: there is no cc on this machine".to_string());
        }
        Err(cause) => return Err(cause).context("cannot run cc"),
    };
    if !compiled.status.success() {
        return Err(error::data(
            format!(
                "cc does not compile the rebuilt sample: {}",
                String::from_utf8_lossy(&compiled.stderr)
            ),
            "the files equal the originals, so check the compiler: it needs C99",
        ));
    }
    // By an absolute path: a relative one without a slash would be looked for elsewhere.
    let program = program.canonicalize().context("finding the compiled sample")?;
    let tested = Command::new(&program).arg("--test").output();
    let tested = tested.context("cannot run the compiled sample").hint(
        ErrorKind::Data,
        || "check whether the file system of the output folder allows programs",
    )?;
    let said = String::from_utf8_lossy(&tested.stdout).trim().to_string();
    if !tested.status.success() {
        return Err(error::data(
            format!("the rebuilt sample fails its self-test: {said}"),
            "the files equal the originals, so check the compiler and this machine",
        ));
    }
    Ok(format!("compiled with cc and run from what the weights gave back: {said}"))
}

/// The recipe with all its keys on stdout, the plan of each stage on stderr.
fn dry_run(recipe: &Recipe, backends: &BackendArgs, json: bool) -> anyhow::Result<Outcome> {
    if !json {
        write!(stdout(), "{}", recipe.resolved()?)?;
    }
    let mut plans = Vec::new();
    for stage in &recipe.stages {
        let config = stage.settings.config(recipe.tokenizer.vocab_size, Special::default())?;
        let backend = backends.open_in(stage.settings.precision)?;
        say!("stage {} on {}", stage.name, backend.device());
        let slices = stage.settings.dp_slices.unwrap_or(1);
        let share = Share { slices, ..Share::WHOLE };
        write_to_stderr(&plan::text(&config, &stage.settings, &*backend, share)?);
        let plan = plan::as_json(&config, &stage.settings, &*backend, share)?;
        plans.push(json!({"stage": stage.name, "device": backend.device(), "plan": plan}));
    }
    if json {
        print_json(&versioned(json!({"recipe": recipe.resolved()?, "stages": plans})));
    }
    Ok(Outcome::Done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::recipe::BUILT_IN;

    #[test]
    fn the_help_names_every_recipe() {
        use clap::CommandFactory;
        #[derive(clap::Parser)]
        struct Whole {
            #[command(flatten)]
            _arguments: RunArgs,
        }
        let help = Whole::command().render_long_help().to_string();
        for (name, _) in BUILT_IN {
            assert!(help.contains(name), "{name}");
        }
    }
}
