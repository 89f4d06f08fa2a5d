//! `laam train`: a model from a corpus and a tokenizer.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;

use super::backend::BackendArgs;
use super::output::say;
use super::source::{self, SourceArgs};
use super::training::Watcher;
use super::{ObsoleteArgs, Outcome};
use crate::backend::Backend;
use crate::corpus::{Corpus, hex};
use crate::dtype::Dtype;
use crate::error;
use crate::model::{Config, Provenance, load};
use crate::tokenizer::Tokenizer;
use crate::tokens::Windows;
use crate::train::{Job, Settings, Start, TrainSummary, Trainer, is_resumable, prepare};

/// Train a model until its steps are done, and save it as a Hugging Face folder.
///
/// Ctrl-C finishes the step, saves a checkpoint, and exits with 130; --resume goes on from there, to
/// the same bytes as an unbroken run. OUTPUT/metrics.jsonl holds one object a logged step.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  laam train --source linux/kernel --tokenizer_path tokenizer --output_path model \\
      --windows addressed --hidden_size 80 --num_attention_heads 5 --max_position_embeddings 256 \\
      --optimizer muon --learning_rate 1e-2 --weight_decay 0 --lr_scheduler_type wsd --epochs 60
  laam train --source linux/kernel --tokenizer_path tokenizer --output_path model --resume ...")]
pub struct TrainArgs {
    #[command(flatten)]
    source: SourceArgs,
    /// The folder of the tokenizer
    #[arg(long, value_name = "DIR", default_value = "tokenizer")]
    tokenizer_path: PathBuf,
    /// The folder the model is saved in
    #[arg(long, value_name = "DIR", default_value = "models/llama2")]
    output_path: PathBuf,
    /// Begin with the weights and the tokenizer of the output folder, and a fresh optimizer
    #[arg(long, conflicts_with_all = ["resume", "init_from"])]
    reload: bool,
    /// Go on from the newest checkpoint in the output folder
    #[arg(long, conflicts_with = "init_from")]
    resume: bool,
    /// Begin with the weights of this model, and a fresh optimizer
    #[arg(long, value_name = "DIR")]
    init_from: Option<PathBuf>,
    /// Where the metrics go [default: OUTPUT/metrics.jsonl]
    #[arg(long, value_name = "FILE")]
    metrics: Option<PathBuf>,
    /// Also write TensorBoard events into this folder
    #[arg(long, value_name = "DIR")]
    tensorboard: Option<PathBuf>,
    #[command(flatten)]
    backend: BackendArgs,
    #[command(flatten)]
    settings: Settings,
    #[command(flatten)]
    obsolete: ObsoleteArgs,
}

pub fn run(arguments: &TrainArgs) -> anyhow::Result<Outcome> {
    arguments.obsolete.warn();
    arguments.settings.validate()?;
    let backend = arguments.backend.open_in(arguments.settings.precision)?;
    let tokenizer =
        if arguments.reload { &arguments.output_path } else { &arguments.tokenizer_path };
    let corpus = arguments.source.corpus_for(&Tokenizer::load(tokenizer)?)?;
    let reload = arguments.reload.then_some(&arguments.output_path);
    if arguments.resume && !is_resumable(&arguments.output_path) {
        let output = arguments.output_path.display();
        say!("warning: no checkpoint to resume in {output}: from step 0, with fresh weights");
    }
    let metrics = arguments.metrics.clone();
    let stage = Stage {
        settings: &arguments.settings,
        tokenizer,
        resume: arguments.resume,
        weights: reload.or(arguments.init_from.as_ref()).map(PathBuf::as_path),
        tokens: &arguments.output_path.with_added_extension("tokens"),
        output: &arguments.output_path,
        metrics: metrics.unwrap_or_else(|| arguments.output_path.join("metrics.jsonl")),
        tensorboard: arguments.tensorboard.clone(),
        goes_on: "--resume goes on",
    };
    let finish = stage.train(&*backend, &corpus)?;
    Ok(if finish.interrupted { Outcome::Interrupted } else { Outcome::Done })
}

/// One training run with its places, as `train` and each stage of `run` have it.
pub struct Stage<'a> {
    pub settings: &'a Settings,
    pub tokenizer: &'a Path,
    /// Go on from the newest checkpoint in `output`, if there is one.
    pub resume: bool,
    /// The model whose weights are the first ones.
    pub weights: Option<&'a Path>,
    /// Where the corpus is written as tokens: outside the model's folder, which holds no text.
    pub tokens: &'a Path,
    pub output: &'a Path,
    pub metrics: PathBuf,
    pub tensorboard: Option<PathBuf>,
    /// How an interrupted run goes on, for a person.
    pub goes_on: &'static str,
}

impl Stage<'_> {
    /// Tokenizes and trains, telling a person how it goes.
    pub fn train(&self, backend: &dyn Backend, corpus: &Corpus) -> anyhow::Result<TrainSummary> {
        let settings = self.settings;
        let tokenizer = Arc::new(Tokenizer::load(self.tokenizer)?);
        let (file, manifest) = source::tokenize(corpus, &tokenizer, self.tokens, false)?;
        let (kind, context) = (settings.windows, settings.max_position_embeddings);
        let windows = Windows::new(file, tokenizer.clone(), kind, context, settings.stride)?;

        let (config, weights) = if let Some(folder) = self.weights {
            let model = load(folder)?;
            for warning in &model.warnings {
                say!("warning: {warning}");
            }
            check_vocabulary(&model.config, &tokenizer, folder)?;
            windows.file().check_fits(model.config.vocab_size)?;
            let trained = settings.config(model.config.vocab_size, tokenizer.special())?;
            let config = Config {
                max_position_embeddings: context,
                window_kind: trained.window_kind,
                ..model.config
            };
            (config, Some(model.weights))
        } else {
            (settings.config(tokenizer.vocab_size(), tokenizer.special())?, None)
        };
        for warning in config.compatibility_warnings() {
            say!("warning: {warning}");
        }
        let provenance = Provenance {
            corpus: prepare::record(&manifest),
            tokenizer_sha256: Some(hex(&tokenizer.sha256())),
            ..Provenance::default()
        };
        let job = Job {
            settings,
            config: &config,
            windows: &windows,
            start: Start { resume: self.resume, weights },
            tokenizer: self.tokenizer,
            output: self.output,
            metrics: self.metrics.clone(),
            tensorboard: self.tensorboard.clone(),
            provenance,
        };
        let trainer = Trainer::new(backend, job)?;
        say!(
            "training {} parameters on {} windows of {context} tokens, {}",
            trainer.config().parameter_count(),
            windows.len(),
            backend.device(),
        );
        let wanted = settings.precision.unwrap_or_default();
        if wanted != Dtype::F32 && backend.compute_dtype() == Dtype::F32 {
            say!(
                "warning: this backend computes in float32; only the saved weights are {}",
                wanted.name()
            );
        }
        if trainer.done() > 0 {
            say!("resuming after step {} of {}", trainer.done(), trainer.total());
        }
        let mut watcher = Watcher::new(trainer.done(), trainer.total())?;
        let finish = trainer.run(&mut watcher)?;
        watcher.finish(&finish, self.output, self.goes_on);
        Ok(finish)
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
