//! `laam train`: a model from a corpus and a tokenizer.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use clap::Args;
use clap::parser::ValueSource;
use serde_json::{Value, json};

use super::backend::BackendArgs;
use super::group::{self, GroupArgs};
use super::output::{print_json, say, stdout};
use super::source::{self, SourceArgs};
use super::training::{TextSampler, Watcher};
use super::{ObsoleteArgs, Outcome, windows};
use crate::backend::Backend;
use crate::collective::Group;
use crate::corpus::{Corpus, Manifest, hex};
use crate::dtype::Dtype;
use crate::error::{self, ErrorKind, Hint};
use crate::files;
use crate::model::{
    Config, License, Provenance, check_hashes, has_training_state, load, load_config,
    load_provenance, read_consistently, weights_sha256,
};
use crate::output::OutputFolder;
use crate::schema::versioned;
use crate::threads;
use crate::tokenizer::Tokenizer;
use crate::tokens::{TokenFile, Windows};
use crate::train::{
    AUTO_BATCH_SIZE, Consent, Job, RunEnd, Settings, ShardKind, Start, TrainSummary, Trainer,
    candidates, check_slices, claim, is_own_metrics, is_resumable, prepare,
};

/// A file of settings has some 50 lines.
const MAX_CONFIG_BYTES: u64 = 1 << 20;
const CONFIG_HINT: &str = "a file has keys like batch_size = 8; --print-config prints one";

/// Settings as the keys of a file. TOML has no integers beyond 63 bits: a larger seed is a string.
fn table_of(settings: &Settings) -> anyhow::Result<toml::Table> {
    let mut table = toml::Table::try_from(Settings { seed: 0, ..settings.clone() })?;
    let seed = settings.seed;
    table.insert(
        "seed".to_string(),
        i64::try_from(seed).map_or_else(|_| seed.to_string().into(), Into::into),
    );
    Ok(table)
}

/// The settings of a file's keys.
fn settings_of(mut table: toml::Table) -> anyhow::Result<Settings> {
    let seed = table.get("seed").and_then(toml::Value::as_str).and_then(|seed| seed.parse().ok());
    if seed.is_some() {
        table.remove("seed");
    }
    let settings: Settings = table.try_into()?;
    Ok(Settings { seed: seed.unwrap_or(settings.seed), ..settings })
}

/// True if a key is one of a recipe's stage.
fn is_setting(key: &str) -> bool {
    let flags = Settings::augment_args(clap::Command::new("settings"));
    let key = Settings::key(key);
    key == "validation" || flags.get_arguments().any(|flag| flag.get_id() == key)
}

/// Train a model until its steps are done, and save it as a Hugging Face folder.
///
/// Ctrl-C finishes the step, saves a checkpoint, and exits with 130; --resume continues from there, to
/// the same bytes as an uninterrupted run. OUTPUT holds the model and metrics.jsonl, one object per logged
/// step; OUTPUT/checkpoint-N holds what --resume needs. A folder that holds a run already needs --resume,
/// --reload or --overwrite; files that laam did not write are never replaced. A run that diverges keeps
/// its last good checkpoint and exits with 1.
///
/// A run made longer by --resume takes its next steps by the schedule of the new length. constant: the same
/// rate, as if it had begun with that length. wsd: the same, if its decay had not begun; else the rate jumps
/// back to the peak, to decay at the new end. linear and cosine: the rate jumps to where the longer schedule
/// is at that step, so the run differs from one that began with that length.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  laam train --source linux/kernel --tokenizer_path tokenizer --output_path model \\
      --windows addressed --hidden_size 80 --num_attention_heads 5 --max_position_embeddings 256 \\
      --optimizer muon --learning_rate 1e-2 --weight_decay 0 --lr_scheduler_type wsd --epochs 60
  laam train --source linux/kernel --tokenizer_path tokenizer --output_path model --resume ...
  laam train --hidden_size 80 --num_attention_heads 5 --print-config > kernel.toml
  laam train --source linux/kernel --config kernel.toml --max_steps 100")]
#[allow(clippy::struct_excessive_bools)] // each is a flag
pub struct TrainArgs {
    #[command(flatten)]
    source: SourceArgs,
    /// The folder of the tokenizer
    #[arg(long, value_name = "DIR", default_value = "tokenizer")]
    tokenizer_path: PathBuf,
    /// The folder the model is saved in
    #[arg(long, value_name = "DIR", default_value = "models/llama2")]
    output_path: PathBuf,
    /// Begin with the weights and the tokenizer of the output folder, and a fresh optimizer; replaces that
    /// model and its checkpoints, and adds to its metrics
    #[arg(long, conflicts_with_all = ["resume", "init_from"])]
    reload: bool,
    /// Continue from the newest checkpoint in the output folder. With more --max-steps, --epochs or
    /// --max-seconds the run is made longer
    #[arg(long, conflicts_with = "init_from")]
    resume: bool,
    /// Replace the run that is in the output folder
    #[arg(long, conflicts_with_all = ["resume", "reload"])]
    overwrite: bool,
    /// Begin with the weights of this model, and a fresh optimizer
    #[arg(long, value_name = "DIR")]
    init_from: Option<PathBuf>,
    /// A text to measure the loss on, which is not trained on: a FRACTION of the windows, the last ones
    /// (without overlap; whole documents, except of stream windows), or a SOURCE: files as --source takes
    /// them, a kernel's version like v1.0/1.0, or sample. The checkpoint of the lowest loss is kept
    #[arg(long, value_name = "SOURCE|FRACTION", help_heading = "Progress")]
    validation: Option<String>,
    /// Where the metrics go, - for stdout [default: OUTPUT/metrics.jsonl]
    #[arg(long, value_name = "FILE|-")]
    metrics: Option<PathBuf>,
    /// Also write TensorBoard events into this folder
    #[arg(long, value_name = "DIR")]
    tensorboard: Option<PathBuf>,
    #[command(flatten)]
    backend: BackendArgs,
    /// A TOML file of settings, with the keys of a recipe's stage, and of other flags by their names, as
    /// tokenizer_path = "tokenizer"; flags win
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print the settings, and the other flags that are given, as --config reads them, and train nothing
    #[arg(long)]
    print_config: bool,
    #[command(flatten)]
    settings: Settings,
    /// What each of several processes keeps a part of; changes no bit of a run
    #[arg(long, value_enum, default_value_t, help_heading = "Several processes")]
    shard: ShardKind,
    #[command(flatten)]
    group: GroupArgs,
    /// The license of the weights [default: by what the text is, and by the model they begin from]
    #[arg(long, value_name = "ID")]
    license: Option<License>,
    #[command(flatten)]
    obsolete: ObsoleteArgs,
    /// Print the result, or the error, as one JSON object on stdout
    #[arg(long)]
    json: bool,
    /// The arguments that were given, by their names.
    #[arg(skip)]
    given: BTreeSet<String>,
    /// Those of them that are no settings, as --config reads them.
    #[arg(skip)]
    other_flags: toml::Table,
}

/// Flags that make no sense in a file of settings.
const NOT_IN_CONFIG: [&str; 5] = ["config", "print_config", "json", "help", "deterministic"];

/// Flags of which only one may be given: one on the command line wins over others in a file.
const ALTERNATIVES: [&[&str]; 2] =
    [&["source", "version"], &["resume", "reload", "init_from", "overwrite"]];

/// A flag's key in a file of settings.
fn key_of(flag: &clap::Arg) -> Option<String> {
    let key = flag.get_long()?.replace('-', "_");
    (!NOT_IN_CONFIG.contains(&key.as_str())).then_some(key)
}

/// Inputs of a run, all but its output folder.
struct PreparedRun {
    settings: Settings,
    tokenizer: Arc<Tokenizer>,
    /// The model whose weights are the first ones.
    weights: Option<PathBuf>,
    /// Corpus, in a process that tokenizes: the first one of each host.
    corpus: Option<Corpus>,
    /// As it is.
    validation: Option<Corpus>,
    backend: Box<dyn Backend>,
}

impl TrainArgs {
    /// Settings that must be the same in all processes of a run.
    fn essence(&self) -> anyhow::Result<Value> {
        let mut essence = serde_json::to_value(&self.settings)?;
        // How many threads a process has changes nothing.
        let backend = BackendArgs { threads: None, ..self.backend.clone() };
        essence["validation_source"] = json!(format!("{:?}", self.validation));
        essence["source"] = json!(format!("{:?}", self.source));
        essence["backend"] = json!(format!("{backend:?}"));
        essence["shard"] = json!(format!("{:?}", self.shard));
        essence["tokenizer_path"] = json!(self.tokenizer_path.to_string_lossy());
        essence["output_path"] = json!(self.output_path.to_string_lossy());
        essence["init_from"] = json!(format!("{:?}", self.init_from));
        essence["resume"] = json!(self.resume);
        essence["reload"] = json!(self.reload);
        essence["overwrite"] = json!(self.overwrite);
        Ok(essence)
    }

    fn prepare(&self, group: &Group) -> anyhow::Result<PreparedRun> {
        let model = self.model();
        let mut settings = self.effective_settings(model.as_deref())?;
        settings.validate_before_fit()?;
        Windows::check_shape(settings.max_position_embeddings, settings.stride)?;
        if settings.batch_size == AUTO_BATCH_SIZE && settings.dp_slices.unwrap_or(group.size()) > 1
        {
            return Err(error::config(
                "`batch_size` auto is for one process and one slice",
                "set `batch_size` to a number",
            ));
        }
        if !self.resume {
            check_slices(settings.dp_slices.unwrap_or(group.size()), group, &settings)?;
        }
        let backend = self.backend.open_in(settings.precision)?;
        let is_given = self.given.contains("tokenizer_path");
        let own = model.filter(|folder| !is_given && folder.join("tokenizer.json").exists());
        let tokenizer = own.as_ref().unwrap_or(&self.tokenizer_path);
        let tokenizer = Arc::new(Tokenizer::load(tokenizer)?);
        let weights = if self.reload { Some(&self.output_path) } else { self.init_from.as_ref() };
        let config = match weights.map(|folder| load_config(folder)).transpose()? {
            Some((config, _)) => {
                Config { max_position_embeddings: settings.max_position_embeddings, ..config }
            }
            None => settings.config(tokenizer.vocab_size(), tokenizer.special())?,
        };
        if settings.fit_batch(&*backend, &config, None)? {
            say!(
                "batch_size auto: {} windows at a time, {} times per step",
                settings.batch_size,
                settings.gradient_accumulation_steps
            );
        }
        let tokenizes = group.world().local_rank == 0;
        let corpus = tokenizes.then(|| self.source.corpus_for(&tokenizer)).transpose()?;
        let validation = match (&self.validation, settings.validation) {
            (Some(source), None) if tokenizes => {
                let others = SourceArgs { limit: None, ..self.source.clone() };
                Some(others.other(source, "validation", &tokenizer)?)
            }
            _ => None,
        };
        let weights = weights.cloned();
        Ok(PreparedRun { settings, tokenizer, weights, corpus, validation, backend })
    }

    /// Notes which arguments the command line gave; all others have their defaults. `flags` describes them.
    pub fn note_given(&mut self, matches: &clap::ArgMatches, flags: &clap::Command) {
        let is_given =
            |id: &&clap::Id| matches.value_source(id.as_str()) == Some(ValueSource::CommandLine);
        self.given = matches.ids().filter(is_given).map(|id| id.as_str().to_string()).collect();
        for flag in flags.get_arguments() {
            let id = flag.get_id().as_str();
            let Some(key) = key_of(flag)
                .filter(|key| self.given.contains(id) && (!is_setting(key) || key == "validation"))
            else {
                continue;
            };
            let values = matches.get_raw(id).into_iter().flatten();
            let mut values: Vec<toml::Value> =
                values.map(|value| value.to_string_lossy().into_owned().into()).collect();
            let value = match flag.get_action() {
                clap::ArgAction::SetTrue => true.into(),
                clap::ArgAction::Append => values.into(),
                _ => values.pop().unwrap_or_else(|| true.into()),
            };
            self.other_flags.insert(key, value);
        }
    }

    /// The text of the file of `config`, as keys; none without a file.
    fn config_keys(&self) -> anyhow::Result<Option<toml::Table>> {
        let Some(path) = &self.config else { return Ok(None) };
        let text = files::read_text(path, MAX_CONFIG_BYTES)
            .with_context(|| format!("cannot read {}", path.display()))
            .hint(ErrorKind::Config, || CONFIG_HINT)?;
        let keys = toml::from_str(&text)
            .with_context(|| format!("in {}", path.display()))
            .hint(ErrorKind::Config, || CONFIG_HINT)?;
        Ok(Some(keys))
    }

    /// Flags that the file of `config` has, but for settings and for those that the command line has.
    pub fn flags_of_config(&self, flags: &clap::Command) -> anyhow::Result<Vec<OsString>> {
        let Some(keys) = self.config_keys()? else { return Ok(Vec::new()) };
        let given: Vec<String> = flags
            .get_arguments()
            .filter(|flag| self.given.contains(flag.get_id().as_str()))
            .filter_map(key_of)
            .collect();
        let mut words = Vec::new();
        for (key, value) in &keys {
            let is_flag = flags.get_arguments().any(|flag| key_of(flag).as_ref() == Some(key));
            let is_number = value.is_float() || value.is_integer();
            let is_ours = if key == "validation" { is_number } else { is_setting(key) };
            let alternatives = ALTERNATIVES.iter().find(|keys| keys.contains(&key.as_str()));
            let is_overruled = given.contains(key)
                || alternatives
                    .is_some_and(|keys| keys.iter().any(|key| given.iter().any(|it| it == key)));
            if !is_flag || is_ours || is_overruled {
                continue;
            }
            let values = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
            for value in values {
                words.push(match value {
                    toml::Value::Boolean(false) => continue,
                    toml::Value::Boolean(true) => format!("--{key}").into(),
                    toml::Value::String(text) => format!("--{key}={text}").into(),
                    other => format!("--{key}={other}").into(),
                });
            }
        }
        Ok(words)
    }

    /// Takes the settings that no flag gave from the file of `config`.
    fn read_config(&mut self) -> anyhow::Result<()> {
        let Some(mut keys) = self.config_keys()? else { return Ok(()) };
        let place = self.config.as_deref().unwrap_or(Path::new("")).display().to_string();
        // The command line has them by now.
        keys.retain(|key, value| match key {
            "validation" => !value.is_str(),
            key => is_setting(key) || !Self::knows_flag(key),
        });
        let read = || -> anyhow::Result<(toml::Table, Settings)> {
            let settings = settings_of(keys.clone())?;
            let keys = keys.into_iter();
            let keys = keys.map(|(key, value)| (Settings::key(&key).into(), value)).collect();
            Ok((keys, settings))
        };
        let (keys, from_file) = read()
            .with_context(|| format!("in {place}"))
            .hint(ErrorKind::Config, || CONFIG_HINT)?;
        let mut merged = table_of(&from_file)?;
        let mut flags = table_of(&self.settings)?;
        for key in &self.given {
            // Some settings are left out where they have their defaults.
            match flags.remove(key) {
                Some(value) => merged.insert(key.clone(), value),
                None => merged.remove(key),
            };
            let other = match key.as_str() {
                "eval_steps" => "eval_epochs",
                "eval_epochs" => "eval_steps",
                _ => continue,
            };
            merged.remove(other);
        }
        self.settings = settings_of(merged)?;
        self.given.extend(keys.into_iter().map(|(key, _)| key));
        Ok(())
    }

    /// True if a key of a file of settings is a flag.
    fn knows_flag(key: &str) -> bool {
        let flags = <Self as clap::Args>::augment_args(clap::Command::new("train"));
        flags.get_arguments().any(|flag| key_of(flag).as_deref() == Some(key))
    }

    /// The settings, and the other flags that were given, as `config` reads them.
    fn as_config(&self) -> anyhow::Result<String> {
        let settings = self.effective_settings(self.model().as_deref())?;
        settings.validate()?;
        let mut table = self.other_flags.clone();
        for (key, value) in table_of(&settings)? {
            table.insert(key, value);
        }
        Ok(toml::to_string(&table)?)
    }

    /// Puts a fraction that is held out into the settings; of a text of its own only how often the loss is
    /// measured, by which they know that there is one.
    fn set_validation(&mut self) {
        if let Some(validation) = &self.validation {
            self.settings.validation = validation.parse().ok();
            self.settings.validation_steps.get_or_insert(self.settings.save_steps);
        }
    }

    /// The model folder that decides what the flags leave open: the one whose weights are the first
    /// ones, or the newest checkpoint of the run that is resumed.
    fn model(&self) -> Option<PathBuf> {
        if self.resume {
            let readable =
                |folder: &PathBuf| has_training_state(folder) && load_config(folder).is_ok();
            return candidates(&self.output_path).into_iter().find(readable);
        }
        self.init_from.clone().or_else(|| self.reload.then(|| self.output_path.clone()))
    }

    /// The settings, with the shape of the model in `folder`, and its context and kind of windows unless
    /// they are given.
    fn effective_settings(&self, folder: Option<&Path>) -> anyhow::Result<Settings> {
        let Some(folder) = folder else { return Ok(self.settings.clone()) };
        let (config, _) = load_config(folder)?;
        let record = load_provenance(folder)?;
        let is_given = |name: &str| self.given.contains(name);
        let conflicts = self.settings.shape_conflicts(&config);
        if let Some((field, ours, theirs)) =
            conflicts.into_iter().find(|(field, ..)| is_given(field))
        {
            let folder = folder.display();
            return Err(if self.resume {
                error::config(
                    format!(
                        "the run in {folder} cannot be resumed: `{field}` was {theirs}, not {ours}"
                    ),
                    format!("leave out `{field}`"),
                )
            } else {
                error::config(
                    format!("`{field}` is {ours}, but {theirs} in the model in {folder}"),
                    format!("leave out `{field}`: the weights have the model's shape"),
                )
            });
        }
        let mut settings = self.settings.with_shape(&config);
        if !is_given("max_position_embeddings") {
            settings.max_position_embeddings = config.max_position_embeddings;
        }
        if !is_given("windows") {
            let known = windows::told_by(&config, record.as_ref());
            settings.windows = known.unwrap_or(settings.windows);
        }
        if self.resume && settings.batch_size == AUTO_BATCH_SIZE {
            let saved = |name: &str| record.as_ref()?.recipe[name].as_u64();
            if let (Some(windows), Some(times)) =
                (saved("batch_size"), saved("gradient_accumulation_steps"))
            {
                settings.batch_size = windows as usize;
                settings.gradient_accumulation_steps = times as usize;
            }
        }
        Ok(settings)
    }

    /// Refuses a metrics file outside of the output folder with the lines of another run, which a new run would
    /// replace.
    fn check_metrics(&self, consent: Consent) -> anyhow::Result<()> {
        let Some(path) = self.metrics.as_deref() else { return Ok(()) };
        let replaces = match consent {
            Consent::None => true,
            Consent::Resume => !is_resumable(&self.output_path),
            Consent::Reload | Consent::Overwrite => false,
        };
        let has_lines = path.metadata().is_ok_and(|file| file.is_file() && file.len() > 0);
        if replaces && has_lines && is_own_metrics(path) && path.parent() != Some(&self.output_path)
        {
            return Err(error::config(
                format!("{} has the metrics of another run", path.display()),
                "remove it, choose another `metrics`, or set `overwrite`",
            ));
        }
        Ok(())
    }
}

pub fn run(mut arguments: TrainArgs) -> anyhow::Result<Outcome> {
    arguments.obsolete.warn();
    arguments.read_config()?;
    if !arguments.given.contains("num_key_value_heads") {
        arguments.settings.set_default_key_value_heads();
    }
    arguments.set_validation();
    if arguments.json && arguments.metrics.as_deref() == Some(Path::new("-")) {
        return Err(error::config(
            "both `metrics` - and `json` on stdout",
            "write the metrics into a file, or leave out `json`",
        ));
    }
    if arguments.print_config {
        write!(stdout(), "{}", arguments.as_config()?)?;
        return Ok(Outcome::Done);
    }
    let arguments = &arguments;
    let group = arguments.group.join()?;
    group::check_same_settings(&group, &arguments.essence()?)?;
    let consent = match arguments {
        TrainArgs { resume: true, .. } => Consent::Resume,
        TrainArgs { reload: true, .. } => Consent::Reload,
        TrainArgs { overwrite: true, .. } => Consent::Overwrite,
        _ => Consent::None,
    };
    // The first process writes; the others look at the folder after it did.
    let claim = || {
        arguments.check_metrics(consent)?;
        claimed(&arguments.output_path, consent)
    };
    let own = group.is_first().then(claim).transpose();
    let output = group.agree(own)?;
    let output =
        output.unwrap_or_else(|| Arc::new(OutputFolder::of_other_process(&arguments.output_path)));
    let prepared = arguments.prepare(&group);
    let PreparedRun { settings, tokenizer, weights, corpus, validation, backend } =
        group.agree(prepared)?;
    let kind = [backend.name(), backend.compute_dtype().name()].join(" in ");
    group.check_same(kind.as_bytes(), |rank, first, other| {
        let [first, other] = [first, other].map(String::from_utf8_lossy);
        error::group(
            format!("rank {rank} trains on {other}, rank 0 on {first}"),
            "set `backend` and `precision`, so that they are the same on every host",
        )
    })?;
    if arguments.resume && !is_resumable(&arguments.output_path) {
        let output = arguments.output_path.display();
        say!("warning: no checkpoint to resume in {output}: from step 0, with fresh weights");
    }
    let metrics = arguments.metrics.clone();
    let stage = Stage {
        settings: &settings,
        group: group.clone(),
        shard: arguments.shard,
        tokenizer,
        validates: arguments.validation.is_some() && settings.validation.is_none(),
        validation: validation.as_ref(),
        consent,
        weights,
        output,
        metrics: metrics.unwrap_or_else(|| arguments.output_path.join("metrics.jsonl")),
        tensorboard: arguments.tensorboard.clone(),
        goes_on: "--resume goes on",
        license: arguments.license.clone(),
    };
    let finish = stage.train(&*backend, corpus.as_ref())?;
    if let (true, Some(corpus)) = (arguments.json, corpus) {
        let record = load_provenance(&arguments.output_path)?.unwrap_or_default();
        print_json(&versioned(json!({
            "output": arguments.output_path.to_string_lossy(),
            "source": source::described(corpus.origin()),
            "steps": finish.steps,
            "total": finish.total,
            "loss": finish.loss,
            "verbatim_rate": finish.verbatim_rate,
            "validation_loss": finish.validation_loss,
            "interrupted": finish.end == RunEnd::Interrupted,
            "diverged": finish.end == RunEnd::Diverged,
            "seconds": record.seconds,
            "license": record.license(),
            "weights_sha256": record.weights_sha256,
        })));
    }
    Ok(finish.end.into())
}

/// Claims an output folder, and says what was removed from it.
pub fn claimed(output: &Path, consent: Consent) -> anyhow::Result<Arc<OutputFolder>> {
    Ok(Arc::new(claim(output, consent, &mut |line| say!("{line}"))?))
}

/// One training run with its places, as `train` and each stage of `run` have it.
pub struct Stage<'a> {
    pub settings: &'a Settings,
    pub group: Group,
    pub shard: ShardKind,
    pub tokenizer: Arc<Tokenizer>,
    /// The loss is measured on a text of its own.
    pub validates: bool,
    /// That text, of a process that tokenizes.
    pub validation: Option<&'a Corpus>,
    /// Consent to what happens to a run in `output`, if there is one.
    pub consent: Consent,
    /// The model whose weights are the first ones.
    pub weights: Option<PathBuf>,
    pub output: Arc<OutputFolder>,
    pub metrics: PathBuf,
    pub tensorboard: Option<PathBuf>,
    /// Advice on how to continue an interrupted run.
    pub goes_on: &'static str,
    /// License of the weights, if it is given.
    pub license: Option<License>,
}

impl Stage<'_> {
    /// The shape of the model, and the weights it begins with if they are another model's.
    fn first_weights(&self) -> anyhow::Result<(Config, Option<Vec<f32>>)> {
        let (settings, tokenizer) = (self.settings, &self.tokenizer);
        let Some(folder) = &self.weights else {
            return Ok((settings.config(tokenizer.vocab_size(), tokenizer.special())?, None));
        };
        let (model, warnings) =
            read_consistently(folder, || Ok((load(folder)?, check_hashes(folder)?)))?;
        for warning in model.warnings.iter().chain(&warnings) {
            say!("warning: {warning}");
        }
        check_vocabulary(&model.config, tokenizer, folder)?;
        let trained = settings.config(model.config.vocab_size, tokenizer.special())?;
        let config = Config {
            max_position_embeddings: settings.max_position_embeddings,
            window_kind: trained.window_kind,
            ..model.config
        };
        Ok((config, Some(model.weights)))
    }

    /// Tokenizes, in the first process of each host; the others wait as long as it takes, and read.
    fn tokens(
        &self,
        corpus: Option<&Corpus>,
        tokens: &Path,
    ) -> anyhow::Result<(Arc<TokenFile>, Manifest)> {
        let group = &self.group;
        let tokenize = |corpus| source::tokenize(corpus, &self.tokenizer, tokens, false);
        let written = corpus.map(tokenize).transpose();
        let read = match group.agree_patiently(written)? {
            Some(written) => Ok(written),
            None => TokenFile::open(tokens).map(|file| (Arc::new(file), Manifest::default())),
        };
        let (file, manifest) = group.agree(read)?;
        if group.size() > 1 {
            group.check_same(&file.sha256()?, |rank, _, _| {
                error::group(
                    format!("rank {rank} has other tokens than rank 0"),
                    "give every host the same text and the same tokenizer",
                )
            })?;
        }
        Ok((file, manifest))
    }

    /// Tokenizes and trains, telling a person how it goes. `corpus` is that of a process that tokenizes.
    pub fn train(
        &self,
        backend: &dyn Backend,
        corpus: Option<&Corpus>,
    ) -> anyhow::Result<TrainSummary> {
        let settings = self.settings;
        let (group, tokenizer) = (&self.group, &self.tokenizer);
        group.agree(tokenizer.check_copyable())?;
        let (kind, context) = (settings.windows, settings.max_position_embeddings);
        let mut texts = [corpus, self.validation].into_iter().flatten();
        let named =
            texts.try_for_each(|text| Windows::check_names(kind, tokenizer, text.has_names()));
        group.agree(named)?;
        if settings.validation_steps.is_some() && !self.validates && settings.validation.is_none() {
            return group.agree(Err(error::config(
                "`validation_steps` without `validation`",
                "name a text to measure the loss on with `validation`",
            )));
        }
        // What can be refused is, before the text is read.
        let (config, weights) = group.agree(self.first_weights())?;
        for warning in config.compatibility_warnings() {
            say!("warning: {warning}");
        }
        // Outside the model's folder, which holds no text.
        let tokens = group.agree(source::token_cache(self.output.path()))?;
        let (file, manifest) = self.tokens(corpus, &tokens)?;
        say!("the tokens are in {}", tokens.display());
        file.check_fits(config.vocab_size)?;
        let cut = |file| Windows::new(file, tokenizer.clone(), kind, context, settings.stride);
        let mut windows = cut(file)?;
        let mut provenance = self.provenance(&manifest, tokenizer)?;
        let validation = match (self.validates, settings.validation) {
            (true, _) => {
                let tokens = tokens.with_extension("validation.tokens");
                let (file, _) = self.tokens(self.validation, &tokens)?;
                file.check_fits(config.vocab_size)?;
                let windows = cut(file)?;
                let all = (0..windows.len()).collect();
                Some((windows, all))
            }
            (false, Some(fraction)) => {
                let held = windows.hold_out(fraction)?;
                // The weights know nothing of the others.
                let paths = (windows.documents()?..windows.file().documents())
                    .map(|document| Ok(windows.file().document(document)?.path))
                    .collect::<anyhow::Result<Vec<_>>>()?;
                provenance.corpus.hold_out(paths.into_iter());
                Some(held)
            }
            (false, None) => None,
        };
        if let Some((_, numbers)) = &validation {
            say!("the validation loss is measured on {} windows", numbers.len());
        }
        let job = Job {
            settings,
            config: &config,
            windows: &windows,
            validation: validation.as_ref().map(|(windows, numbers)| (windows, numbers.as_slice())),
            start: Start {
                resume: self.consent == Consent::Resume,
                weights,
                keep_metrics: self.consent == Consent::Reload,
            },
            tokenizer: tokenizer.clone(),
            output: self.output.clone(),
            metrics: self.metrics.clone(),
            tensorboard: self.tensorboard.clone(),
            provenance,
            group: group.clone(),
            shard: self.shard,
        };
        let trainer = group.agree(Trainer::new(backend, job))?;
        say!(
            "training {} parameters on {} windows of {context} tokens, {}",
            trainer.config().parameter_count(),
            windows.len(),
            backend.device(),
        );
        self.describe_group(trainer.slices(), trainer.exchanges());
        let wanted = settings.precision.unwrap_or_default();
        if wanted != Dtype::F32 && backend.compute_dtype() == Dtype::F32 {
            say!(
                "warning: this backend computes in float32; only the saved weights are {}",
                wanted.name()
            );
        }
        if settings.warmup_steps > trainer.total() {
            say!(
                "warning: the warm-up of {} steps is longer than the run of {}: the learning rate never \
                 reaches its peak (--warmup-steps)",
                settings.warmup_steps,
                trainer.total(),
            );
        }
        if trainer.done() > 0 {
            say!("resuming after step {} of {}", trainer.done(), trainer.total());
        }
        let sampler = TextSampler::new(backend, tokenizer, &windows, settings.seed)?;
        let mut watcher = Watcher::new(trainer.done(), trainer.total(), sampler)?;
        let finish = trainer.run(&mut watcher)?;
        watcher.finish(&finish, self.output.path(), self.goes_on);
        Ok(finish)
    }
}

impl Stage<'_> {
    /// Says what trains together, and what fixes the bits of the run.
    fn describe_group(&self, slices: usize, exchanges: &str) {
        let world = self.group.world();
        if slices == 1 {
            return;
        }
        let sharded = match self.shard {
            ShardKind::Optimizer if world.size > 1 => ", optimizer sharded",
            _ => "",
        };
        let processes = if world.size == 1 { "process" } else { "processes" };
        say!(
            "{} {processes} ({exchanges}), {slices} slices{sharded}: --dp-slices {slices} gives the same bits \
             on any number of processes that divides it",
            world.size
        );
        let (usable, online) = (threads::available(), threads::online());
        if world.size > 1 && usable * world.local_size < online {
            say!(
                "warning: the launcher lets each process use {usable} of {online} processors: with Open MPI, \
                 add --bind-to none"
            );
        }
    }

    /// Provenance of the model before its training begins.
    fn provenance(&self, manifest: &Manifest, tokenizer: &Tokenizer) -> anyhow::Result<Provenance> {
        let mut provenance = Provenance {
            corpus: prepare::record(manifest),
            tokenizer_sha256: Some(hex(&tokenizer.sha256())),
            ..Provenance::default()
        };
        if let Some(folder) = &self.weights {
            provenance.set_parent(weights_sha256(folder)?, load_provenance(folder)?);
        }
        if let Some(given) = &self.license {
            provenance.set_license(None);
            let known = provenance.license();
            if *known != License::Unknown && known != given {
                say!(
                    "warning: the weights are marked {given}, though the text or the model they \
                     begin from is {known}"
                );
            }
        }
        provenance.set_license(self.license.clone());
        Ok(provenance)
    }
}

/// Refuses a tokenizer of another size than the model's, unless it is the one in the model's folder: its
/// embedding may have rows to spare.
fn check_vocabulary(config: &Config, tokenizer: &Tokenizer, folder: &Path) -> anyhow::Result<()> {
    if config.vocab_size == tokenizer.vocab_size()
        || Tokenizer::load(folder).is_ok_and(|own| own.sha256() == tokenizer.sha256())
    {
        return Ok(());
    }
    Err(error::config(
        format!(
            "the tokenizer has {} tokens, the model in {} has {}",
            tokenizer.vocab_size(),
            folder.display(),
            config.vocab_size
        ),
        "use the tokenizer in the model's folder",
    ))
}
