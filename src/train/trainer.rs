//! The loop: windows in their order, the step, metrics, checkpoints.

use std::path::{Path, PathBuf};
use std::time::Instant;

use super::checkpoints::{self, State};
use super::footprint::check_memory;
use super::{Engine, EventFile, Metrics, MetricsFile, Outcome, Settings};
use crate::backend::{Arena, Backend};
use crate::error::error;
use crate::llama::Rates;
use crate::memorization::verbatim;
use crate::model::{Checkpoint, Config, Provenance, TrainingState, initialize, save};
use crate::tokens::{Sampler, Windows};

/// What a run begins with.
#[derive(Default)]
pub struct Start {
    /// Go on from the newest whole checkpoint in the output folder, with its shape, if there is one.
    pub resume: bool,
    /// Else begin with these weights (an arena) and a fresh optimizer, or else with fresh ones.
    pub weights: Option<Vec<f32>>,
}

/// Everything a run is made of.
pub struct Job<'a> {
    pub settings: &'a Settings,
    pub config: &'a Config,
    pub windows: &'a Windows,
    pub start: Start,
    /// The folder of the tokenizer, copied into every model folder.
    pub tokenizer: &'a Path,
    pub output: &'a Path,
    pub metrics: PathBuf,
    pub tensorboard: Option<PathBuf>,
    /// With corpus and tokenizer filled in.
    pub provenance: Provenance,
}

/// Who watches a run, and may end it.
pub trait Observer {
    /// After every step; `metrics` where it was a logged one.
    fn step(&mut self, step: u64, total: u64, outcome: &Outcome, metrics: Option<&Metrics>);
    /// Something a person should know.
    fn note(&mut self, line: &str);
    /// Whether to finish this step, save, and stop.
    fn stop(&self) -> bool;
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Finish {
    pub steps: u64,
    pub total: u64,
    /// Of the last step.
    pub loss: f64,
    /// The last measured part of windows that come back verbatim.
    pub verbatim_rate: Option<f64>,
    /// The observer ended it before its time; it can be resumed.
    pub interrupted: bool,
}

/// After so many steps in a row without an update a run has diverged.
const HOPELESS: u64 = 20;

/// A run under way.
pub struct Trainer<'a> {
    job: Job<'a>,
    config: Config,
    engine: Engine,
    sampler: Sampler,
    state: State,
    /// Steps in a row whose gradients were not finite.
    skipped: u64,
    /// Nothing of this run lies in the output folder yet.
    unsaved: bool,
    /// Whether a step of this run was looked at for parameters without a gradient.
    looked_for_lost: bool,
    /// What a person should know before it begins.
    notes: Vec<String>,
}

impl<'a> Trainer<'a> {
    /// Makes ready: memory, weights, or the state of the run that is resumed.
    pub fn new(backend: &dyn Backend, mut job: Job<'a>) -> anyhow::Result<Self> {
        let Job { settings, windows, .. } = job;
        settings.validate()?;
        job.provenance.recipe = serde_json::to_value(settings)?;
        job.provenance.seed = settings.seed;
        job.provenance.program_version = env!("CARGO_PKG_VERSION").to_string();
        job.provenance.device = backend.device();

        let mut sampler = Sampler::new(windows.len(), settings.order, settings.seed)?;
        let mut state = State {
            step: 0,
            total: settings.total_steps(windows.len()),
            position: sampler.position(),
            tokens: 0,
            unlogged: (0.0, 0),
            settings: settings.clone(),
            tokens_sha256: crate::corpus::hex(&windows.file().sha256()?),
        };
        let mut notes = Vec::new();
        let Start { resume, weights } = std::mem::take(&mut job.start);
        let saved = if resume {
            checkpoints::latest(job.output, &mut |note| notes.push(note))?
        } else {
            None
        };
        if let Some(saved) = &saved {
            check_resumable(saved, &state)?;
        }
        // A run that began with another model's weights has its shape, whatever the flags say.
        let config = saved.as_ref().map_or(job.config, |saved| &saved.config).clone();
        check_memory(backend, &config, settings.batch_size, windows.context())?;
        let mut engine = Engine::new(
            backend,
            &config,
            &settings.optimizer(),
            settings.batch_size,
            windows.context(),
        )?;
        let unsaved = saved.is_none();
        if let Some(saved) = saved {
            for ((_, arena), values) in checkpoints::ARENAS.iter().zip(&saved.arenas) {
                engine.write(*arena, values)?;
            }
            state = State { settings: state.settings, ..saved.state };
            sampler = Sampler::resume(windows.len(), settings.order, state.position)?;
        } else {
            let fresh = || initialize(&config, engine.layout(), settings.seed);
            engine.write(Arena::Parameters, &weights.unwrap_or_else(fresh))?;
        }
        let looked_for_lost = false;
        Ok(Self {
            job,
            config,
            engine,
            sampler,
            state,
            skipped: 0,
            unsaved,
            looked_for_lost,
            notes,
        })
    }

    /// Steps that were done before this run went on.
    pub fn done(&self) -> u64 {
        self.state.step
    }

    pub fn total(&self) -> u64 {
        self.state.total
    }

    /// The shape of the model that is trained.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Bytes of memory the model, its optimizer and its activations hold.
    pub fn bytes(&self) -> usize {
        self.engine.bytes()
    }

    /// Trains to the end, and saves the model.
    pub fn run(mut self, observer: &mut dyn Observer) -> anyhow::Result<Finish> {
        for note in &self.notes {
            observer.note(note);
        }
        let settings = self.job.settings;
        let mut metrics = MetricsFile::open(&self.job.metrics, self.state.step)?;
        let mut events = self.job.tensorboard.as_deref().map(EventFile::create).transpose()?;
        let schedule = settings.schedule(self.state.total);
        let mut finish = Finish {
            steps: self.state.step,
            total: self.state.total,
            loss: f64::NAN,
            verbatim_rate: None,
            interrupted: false,
        };
        let already = self.state.step;
        let begin = Instant::now();
        let (mut last_line, mut last_tokens) = (begin, self.state.tokens);
        while self.state.step < self.state.total {
            let factor = schedule.factor(self.state.step);
            let rates = Rates {
                learning_rate: settings.learning_rate * factor,
                muon_learning_rate: settings.muon_learning_rate * factor,
                step: self.state.step + 1,
            };
            let outcome = self.step(rates, observer)?;
            let step = self.state.step;
            let last = step == self.state.total;
            finish = Finish { steps: step, loss: outcome.loss, ..finish };

            let measured = settings.eval_steps.is_some_and(|every| step.is_multiple_of(every));
            if measured {
                finish.verbatim_rate = self.verbatim_rate()?;
            }
            let enough = measured
                && settings
                    .stop_at_verbatim
                    .is_some_and(|wanted| finish.verbatim_rate.is_some_and(|rate| rate >= wanted));
            let mut line = None;
            if step.is_multiple_of(settings.logging_steps) || last || measured {
                let seconds = last_line.elapsed().as_secs_f64();
                let (sum, count) = std::mem::take(&mut self.state.unlogged);
                line = Some(Metrics {
                    step,
                    epoch: self.epoch(),
                    loss: sum / count as f64,
                    learning_rate: rates.learning_rate,
                    grad_norm: outcome.grad_norm,
                    tokens: self.state.tokens,
                    tokens_a_second: (self.state.tokens - last_tokens) as f64 / seconds,
                    seconds: begin.elapsed().as_secs_f64(),
                    verbatim_rate: finish.verbatim_rate.filter(|_| measured),
                });
                (last_line, last_tokens) = (Instant::now(), self.state.tokens);
            }
            if let Some(line) = &line {
                metrics.write(line)?;
                if let Some(events) = &mut events {
                    events.write(step, &scalars(line))?;
                }
            }
            observer.step(step, self.state.total, &outcome, line.as_ref());
            if enough {
                observer.note("the verbatim rate that was asked for is reached");
                self.state.total = step;
                break;
            }
            finish.interrupted = !last && observer.stop();
            if finish.interrupted || (!last && step.is_multiple_of(settings.save_steps)) {
                self.save(&checkpoints::folder(self.job.output, step))?;
                checkpoints::prune(self.job.output, step, settings.save_total_limit)?;
            }
            if finish.interrupted {
                return Ok(finish);
            }
        }
        // A run that was finished before has nothing new to save.
        if self.state.step > already {
            let output = self.job.output;
            self.save(output)?;
        }
        Ok(finish)
    }

    /// One update: the next batches of this epoch.
    fn step(&mut self, rates: Rates, observer: &mut dyn Observer) -> anyhow::Result<Outcome> {
        let Job { settings, windows, .. } = self.job;
        let epoch = self.sampler.position().epoch;
        let mut batches = Vec::new();
        while batches.len() < settings.gradient_accumulation_steps
            && self.sampler.position().epoch == epoch
        {
            batches.push(windows.draw(&self.sampler.next(settings.batch_size))?);
        }
        let outcome = self.engine.step(&batches, rates)?;
        if !self.looked_for_lost {
            self.looked_for_lost = true;
            self.note_lost_gradients(observer)?;
        }
        let state = &mut self.state;
        state.step += 1;
        state.position = self.sampler.position();
        state.tokens += batches.iter().map(|batch| batch.ids.len() as u64).sum::<u64>();
        // JSON has no word for what is not finite: such a loss is told of by the note below.
        if outcome.loss.is_finite() {
            state.unlogged.0 += outcome.loss;
            state.unlogged.1 += 1;
        }
        if outcome.updated() {
            self.skipped = 0;
        } else {
            self.skipped += 1;
            observer.note(&format!("step {}: gradients not finite, no update", state.step));
        }
        if self.skipped == HOPELESS {
            return Err(error(
                format!("no finite gradient in {HOPELESS} steps, at step {}", state.step),
                "lower --learning-rate, or raise --warmup-steps",
            ));
        }
        Ok(outcome)
    }

    /// Tells of parameters that got no gradient at all so far, which their first moments show: a
    /// backward that forgets one trains on without a sign of it.
    fn note_lost_gradients(&self, observer: &mut dyn Observer) -> anyhow::Result<()> {
        let moments = self.engine.read(Arena::FirstMoment)?;
        for parameter in &self.engine.layout().parameters {
            if moments[parameter.span.range()].iter().all(|&moment| moment == 0.0) {
                observer.note(&format!(
                    "warning: {} gets no gradient: it is not trained",
                    parameter.name
                ));
            }
        }
        Ok(())
    }

    fn epoch(&self) -> f64 {
        let position = self.sampler.position();
        position.epoch as f64 + position.cursor as f64 / self.job.windows.len() as f64
    }

    /// The part of the windows that come back verbatim (see [`verbatim::window`]).
    fn verbatim_rate(&mut self) -> anyhow::Result<Option<f64>> {
        let windows = self.job.windows;
        let context = windows.context();
        let (mut exact, mut all) = (0, 0);
        let indices: Vec<usize> = (0..windows.len()).collect();
        for some in indices.chunks(64) {
            let batch = windows.draw(some)?;
            let guesses = self.engine.guesses(&batch)?;
            for (targets, guesses) in batch.targets.chunks(context).zip(guesses.chunks(context)) {
                if let Some(verbatim) = verbatim::window(windows.kind(), targets, guesses) {
                    all += 1;
                    exact += usize::from(verbatim);
                }
            }
        }
        Ok((all > 0).then(|| exact as f64 / all as f64))
    }

    fn save(&mut self, folder: &Path) -> anyhow::Result<()> {
        let arenas: Vec<(&str, Vec<f32>)> = checkpoints::ARENAS
            .iter()
            .map(|&(name, arena)| Ok((name, self.engine.read(arena)?)))
            .collect::<anyhow::Result<_>>()?;
        let named: Vec<(&str, &[f32])> =
            arenas.iter().map(|(name, values)| (*name, values.as_slice())).collect();
        save(
            folder,
            &Checkpoint {
                config: &self.config,
                layout: self.engine.layout(),
                weights: &arenas[0].1,
                precision: self.job.settings.precision,
                tokenizer: Some(self.job.tokenizer),
                provenance: &self.job.provenance,
                training_state: Some(TrainingState {
                    arenas: &named,
                    state: &serde_json::to_value(&self.state)?,
                }),
            },
        )?;
        if std::mem::take(&mut self.unsaved) {
            checkpoints::replace_other_run(self.job.output, folder)?;
        }
        Ok(())
    }
}

/// A resumed run equals an unbroken one only if it is the same run.
fn check_resumable(saved: &checkpoints::Saved, now: &State) -> anyhow::Result<()> {
    // How often a run tells and saves changes nothing it computes.
    let essence = |settings: &Settings| Settings {
        logging_steps: 1,
        save_steps: 1,
        save_total_limit: 1,
        ..settings.clone()
    };
    let (then, now_settings) = (essence(&saved.state.settings), essence(&now.settings));
    let what = if then != now_settings {
        let (then, now) = (serde_json::to_value(&then)?, serde_json::to_value(&now_settings)?);
        let differing =
            then.as_object().into_iter().flatten().find(|(key, value)| now[*key] != **value);
        differing.map_or_else(String::new, |(key, value)| {
            format!("--{} was {value}, not {}", key.replace('_', "-"), now[key])
        })
    } else if saved.state.tokens_sha256 != now.tokens_sha256 {
        "its corpus or tokenizer was another".to_string()
    } else {
        return Ok(());
    };
    Err(error(
        format!("the run in {} cannot be resumed: {what}", saved.folder.display()),
        "resume with the flags it began with, or start anew from its weights with --init-from",
    ))
}

fn scalars(metrics: &Metrics) -> Vec<(&'static str, f64)> {
    let mut scalars = vec![
        ("train/loss", metrics.loss),
        ("train/learning_rate", metrics.learning_rate),
        ("train/grad_norm", metrics.grad_norm),
        ("train/epoch", metrics.epoch),
        ("train/tokens_a_second", metrics.tokens_a_second),
    ];
    scalars.extend(metrics.verbatim_rate.map(|rate| ("eval/verbatim_rate", rate)));
    scalars
}
