//! The loop: windows in their order, the step, metrics, checkpoints.

mod measures;
mod ranks;
mod resume;
mod saving;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;

use self::ranks::{agree_on_matmuls, devices};
use self::resume::{check_resumable, check_same_step, resumed_total};
use self::saving::write;
use super::checkpoints::{self, TrainState};
use super::footprint::{Share, Workload, measuring_bytes, memory_bytes};
use super::metrics::{KeptLines, MetricsFile};
use super::snapshot::CheckpointWriter;
use super::{
    Engine, EventFile, LrSchedule, Metrics, OptimizerKind, Parallelism, Settings, ShardKind,
    StepStats, TrainStep,
};
use crate::VERSION;
use crate::backend::{Arena, Backend};
use crate::collective::Group;
use crate::corpus::{hex, now};
use crate::dtype::Dtype;
use crate::error::{self, ErrorKind, Hint};
use crate::llama::StepHyperparams;
use crate::model::{Config, Layout, Provenance, SessionRecord, initialize, load_provenance};
use crate::output::OutputFolder;
use crate::schema::SchemaVersion;
use crate::tokenizer::Tokenizer;
use crate::tokens::{Sampler, Windows};

pub use self::ranks::check_slices;

/// Beginning of a run: a checkpoint, weights, or neither.
#[derive(Default)]
pub struct Start {
    /// Go on from the newest whole checkpoint in the output folder, with its shape, if there is one.
    pub resume: bool,
    /// Else begin with these weights (an arena) and a fresh optimizer, or else with fresh ones.
    pub weights: Option<Vec<f32>>,
    /// Leave the lines of an earlier run in the metrics file.
    pub keep_metrics: bool,
}

/// Everything a run is made of.
pub struct Job<'a> {
    /// Settings of the run.
    pub settings: &'a Settings,
    /// Shape of the model.
    pub config: &'a Config,
    /// Windows that are trained on.
    pub windows: &'a Windows,
    /// Windows that are not trained on, and which of them the validation loss is measured on.
    pub validation: Option<(&'a Windows, &'a [usize])>,
    /// Initial weights, or the checkpoint to resume.
    pub start: Start,
    /// Written into every model folder.
    pub tokenizer: Arc<Tokenizer>,
    /// Folder of the checkpoints and the finished model.
    pub output: Arc<OutputFolder>,
    /// The metrics file; `-` is stdout.
    pub metrics: PathBuf,
    /// Folder of TensorBoard events.
    pub tensorboard: Option<PathBuf>,
    /// With corpus and tokenizer filled in.
    pub provenance: Provenance,
    /// The processes that train together. Rank 0 writes; every rank has the same settings and windows.
    pub group: Group,
    /// State that each process keeps a part of.
    pub shard: ShardKind,
}

/// Who watches a run, and may end it.
pub trait Observer {
    /// After every step; `metrics` where it was a logged one.
    fn step(&mut self, step: u64, total: u64, outcome: &StepStats, metrics: Option<&Metrics>);
    /// A text that the model of these weights writes, for the metrics; none if nobody cares.
    fn sample(
        &mut self,
        _step: u64,
        _config: &Config,
        _weights: &[f32],
    ) -> anyhow::Result<Option<String>> {
        Ok(None)
    }
    /// Something a person should know.
    fn note(&mut self, line: &str);
    /// True to finish this step, save, and stop.
    fn stop(&self) -> bool;
}

/// Result of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TrainSummary {
    /// Steps done.
    pub steps: u64,
    /// Steps of the whole run.
    pub total: u64,
    /// Loss of the last step.
    pub loss: f64,
    /// The last measured part of windows that come back verbatim.
    pub verbatim_rate: Option<f64>,
    /// The last measured validation loss.
    pub validation_loss: Option<f64>,
    /// Why it ended.
    pub end: RunEnd,
}

/// Why a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunEnd {
    /// All steps are done.
    Complete,
    /// The observer ended it before its time; it can be resumed.
    Interrupted,
    /// No update in `MAX_SKIPPED_STEPS` steps in a row, or weights that are not finite. What was saved
    /// before stays as it was.
    Diverged,
}

/// Steps in a row without an update after which a run has diverged.
pub const MAX_SKIPPED_STEPS: u32 = 32;
/// Loss scale of f16 from which on steps without an update count: above it they find the scale.
const MIN_LOSS_SCALE: f64 = 1.0;
/// Seconds of steps that are asked for in one go.
const MAX_BATCHED_SECONDS: f64 = 0.5;

/// A run under way.
#[allow(clippy::struct_excessive_bools)] // each is a fact about how it began
pub struct Trainer<'a> {
    job: Job<'a>,
    config: Config,
    engine: Engine,
    slices: usize,
    /// What moves bytes between processes.
    exchanges: String,
    sampler: Sampler,
    state: TrainState,
    /// Steps in a row whose gradients were not finite.
    lost: u64,
    /// Nothing of this run lies in the output folder yet.
    unsaved: bool,
    keep_metrics: bool,
    /// It was finished by an earlier version, whose last training state is in the output folder itself.
    is_from_output: bool,
    /// The step that the newest checkpoint was saved after.
    saved_step: u64,
    /// It begins with the weights of another run, which may hold all that is asked for.
    is_continuation: bool,
    /// Steps from one measurement of the verbatim rate to the next.
    eval_interval: Option<u64>,
    writer: CheckpointWriter,
    /// True once a step of this run was looked at for parameters without a gradient.
    looked_for_lost: bool,
    /// Dtype of the weights that are saved.
    precision: Dtype,
    /// Compute dtype of the passes that measure.
    compute_dtype: Dtype,
    /// FLOP/s of the device, where it is known.
    peak: Option<f64>,
    /// Seconds a step, of those that were last asked for.
    pace: Option<f64>,
    /// Start of this session.
    began: Instant,
    /// Time, seconds waited and seconds timed on the device at the last line of metrics.
    last_line: (Instant, f64, f64),
    /// The last rank that was told of as slow.
    slow_rank: Option<usize>,
    /// Notes for a person before it begins.
    notes: Vec<String>,
}

impl<'a> Trainer<'a> {
    /// Makes ready: memory, weights, or the state of the run that is resumed.
    pub fn new(backend: &dyn Backend, mut job: Job<'a>) -> anyhow::Result<Self> {
        let Job { settings, windows, .. } = job;
        settings.validate()?;
        let group = job.group.clone();
        let precision = settings.precision.unwrap_or_else(|| backend.compute_dtype());
        // Resumed on another backend, it is to be the same.
        let known = Settings { precision: Some(precision), ..settings.clone() };

        let mut sampler = Sampler::new(windows.len(), settings.order, settings.seed)?;
        let mut state = TrainState {
            schema_version: SchemaVersion,
            step: 0,
            total: settings.total_steps(windows.len()),
            position: sampler.position(),
            hard_examples: Vec::new(),
            tokens: 0,
            skipped: 0,
            unlogged: (0.0, 0),
            earlier_metrics: 0,
            best: None,
            best_validation: None,
            settings: known,
            tokens_sha256: hex(&windows.file().sha256()?),
            backend: serde_json::Value::Null,
        };
        let mut notes = Vec::new();
        let Start { resume, weights, keep_metrics } = std::mem::take(&mut job.start);
        let saved = if resume {
            group.agree(checkpoints::latest(job.output.path(), &mut |note| notes.push(note)))?
        } else {
            None
        };
        check_same_step(&group, saved.as_ref().map_or(0, |saved| saved.state.step))?;
        if let Some(saved) = &saved {
            let then = saved.state.settings.dp_slices.unwrap_or(1);
            let now = settings.dp_slices.unwrap_or(then);
            if now != then {
                let folder = saved.folder.display();
                return Err(error::config(
                    format!(
                        "the run in {folder} cannot be resumed: `dp_slices` was {then}, not {now}"
                    ),
                    format!(
                        "resume with `dp_slices` {then}, on any number of processes that divides it"
                    ),
                ));
            }
            state.settings.dp_slices = Some(then);
            check_resumable(saved, &state)?;
            if let Some(provenance) = load_provenance(&saved.folder)? {
                job.provenance.resume(provenance);
            }
        }
        let slices = state.settings.dp_slices.unwrap_or(group.size());
        check_slices(slices, &group, settings)?;
        state.settings.dp_slices = Some(slices);
        // A run that began with another model's weights has its shape, whatever the flags say.
        let config = saved.as_ref().map_or(job.config, |saved| &saved.config).clone();
        state.settings = state.settings.with_shape(&config);
        job.provenance.recipe = serde_json::to_value(&state.settings)?;
        job.provenance.seed = settings.seed;
        let done = saved.as_ref().map_or(0, |saved| saved.state.step);
        job.provenance.begin_session(SessionRecord {
            date: now(),
            steps: (done, done),
            program_version: VERSION.to_string(),
            backend: backend.name().to_string(),
            device: backend.device(),
            ..SessionRecord::default()
        });
        let (batch_size, context) = (settings.batch_size, windows.context());
        let optimizer = settings.optimizer();
        let share = Share { slices, ranks: group.size(), shard: job.shard };
        let (recompute, optimizer) = (settings.recompute, &optimizer);
        let workload = Workload { backend, config: &config, optimizer, recompute, share };
        let measuring = measuring_bytes(backend, &config, settings);
        group.agree(workload.check_memory(batch_size, context, measuring))?;
        let parallelism = Parallelism { group: group.clone(), slices, shard: job.shard };
        let mut engine =
            Engine::parallel(backend, &config, optimizer, batch_size, context, &parallelism)?
                .with_recompute(settings.recompute);
        let of_device = engine.exchanges().filter(|_| group.size() > 1);
        let exchanges = of_device.unwrap_or_else(|| group.world().library.clone());
        if group.size() > 1 {
            let devices = devices(&group, &backend.device())?;
            job.provenance.note_ranks(group.size(), format!("{exchanges}{devices}"));
        }
        let unsaved = saved.is_none();
        let is_from_output = saved.as_ref().is_some_and(|saved| saved.folder == job.output.path());
        let is_continuation = unsaved && weights.is_some();
        if let Some(saved) = saved {
            write(&mut engine, saved.arenas)?;
            let restored = engine.restore(&saved.state.backend);
            notes.extend(restored.hint(
                ErrorKind::Checkpoint,
                || "remove the checkpoint: `resume` then takes an older one",
            )?);
            let total = resumed_total(&saved.state, state.total, windows.len());
            let total = total.with_context(|| format!("in {}", saved.folder.display()))?;
            if total != saved.state.total {
                notes.push(format!("the run has {total} steps now, not {}", saved.state.total));
            }
            state = TrainState { settings: state.settings, total, ..saved.state };
            sampler = Sampler::resume(windows.len(), settings.order, state.position)?;
        } else {
            let fresh = || initialize(&config, engine.layout(), settings.seed);
            let weights = weights.unwrap_or_else(fresh);
            if precision == Dtype::F16 {
                check_float16(&weights, engine.layout())?;
            }
            engine.write(Arena::Parameters, &weights)?;
        }
        if group.size() > 1 {
            agree_on_matmuls(&mut engine, &group, settings, windows.len())?;
        }
        engine.upload_dataset(windows, settings.batch_size)?;
        let looked_for_lost = false;
        Ok(Self {
            job,
            config,
            engine,
            slices,
            exchanges,
            sampler,
            lost: 0,
            saved_step: if unsaved { 0 } else { state.step },
            state,
            unsaved,
            keep_metrics,
            is_from_output,
            is_continuation,
            eval_interval: settings.eval_interval(windows.len()),
            writer: CheckpointWriter::default(),
            looked_for_lost,
            precision,
            compute_dtype: backend.compute_dtype(),
            peak: backend.peak_flops(),
            pace: None,
            began: Instant::now(),
            last_line: (Instant::now(), group.waited(), 0.0),
            slow_rank: None,
            notes,
        })
    }

    /// Steps that were done before this run went on.
    pub fn done(&self) -> u64 {
        self.state.step
    }

    /// Steps of the whole run.
    pub fn total(&self) -> u64 {
        self.state.total
    }

    /// Slices of a step.
    pub fn slices(&self) -> usize {
        self.slices
    }

    /// What moves bytes between processes: `NCCL 2.32.3`.
    pub fn exchanges(&self) -> &str {
        &self.exchanges
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
    pub fn run(mut self, observer: &mut dyn Observer) -> anyhow::Result<TrainSummary> {
        for note in &self.notes {
            observer.note(note);
        }
        let settings = self.job.settings;
        let group = self.job.group.clone();
        if group.is_first() {
            self.job.output.check()?;
        }
        let (already, is_new) = (self.state.step, self.unsaved);
        let keep = match (self.unsaved, self.keep_metrics) {
            (false, _) => {
                let TrainState { earlier_metrics, step, .. } = self.state;
                KeptLines::Resumed { earlier: earlier_metrics, step }
            }
            (true, true) => KeptLines::All,
            (true, false) => KeptLines::None,
        };
        let opened =
            group.is_first().then(|| MetricsFile::open(&self.job.metrics, keep)).transpose();
        let (mut metrics, kept) = group.agree(opened)?.unzip();
        if self.unsaved {
            self.state.earlier_metrics = kept.unwrap_or(0);
        }
        let recall = group.is_first().then(|| self.open_recall()).transpose();
        let mut recall = group.agree(recall)?.flatten();
        let next = self.state.step + u64::from(!self.unsaved);
        let create = |folder: &PathBuf| EventFile::create(folder, next);
        let board = self.job.tensorboard.as_ref().filter(|_| group.is_first());
        let mut events = board.map(create).transpose()?;
        let schedule = settings.schedule(self.state.total);
        let mut finish = TrainSummary {
            steps: self.state.step,
            total: self.state.total,
            loss: f64::NAN,
            verbatim_rate: None,
            validation_loss: None,
            end: RunEnd::Complete,
        };
        if self.is_continuation
            && (settings.stop_at_verbatim.is_some() || settings.hard_example_mining)
        {
            finish.verbatim_rate = self.measure_verbatim()?.rate;
            if self.is_enough(finish.verbatim_rate) {
                observer
                    .note("the weights it begins with have the verbatim rate that was asked for");
                (self.state.total, finish.total) = (0, 0);
            }
        }
        let mut is_void_noted = false;
        let begin = Instant::now();
        let (mut last_line, mut last_tokens) = (begin, self.state.tokens);
        while self.state.step < self.state.total {
            if self.is_out_of_time()? {
                let TrainState { step, total, .. } = self.state;
                observer.note(&format!("max_seconds are over, after step {step} of {total}"));
                break;
            }
            // By the time that steps took, which differs from rank to rank.
            let ahead = group.decide(self.ahead())?;
            let steps: Vec<TrainStep> =
                (0..ahead).map(|later| self.plan(&schedule, later)).collect();
            let hyperparams = steps.last().expect("at least one").hyperparams;
            let outcome = self.take(&steps, observer)?;
            let step = self.state.step;
            let last = step == self.state.total || self.is_out_of_time()?;
            let diverged = self.has_diverged()?;
            finish = TrainSummary { steps: step, loss: outcome.loss, ..finish };

            let measured = self.eval_interval.is_some_and(|every| step.is_multiple_of(every))
                || (last && settings.load_best_model_at_end && self.eval_interval.is_some());
            let mut is_best = false;
            if measured {
                let measured = self.measure_verbatim()?;
                finish.verbatim_rate = measured.rate;
                if let Some(recall) = &mut recall {
                    self.job.output.check()?;
                    recall.write(step, &measured.verbatim)?;
                }
                is_best = settings.load_best_model_at_end && self.note_best(finish.verbatim_rate);
                if finish.verbatim_rate.is_none() && !is_void_noted {
                    is_void_noted = true;
                    observer.note(
                        "warning: no window has 100 tokens of one document: the verbatim rate is not measured; \
                         set `max_position_embeddings` to at least 100, or `windows` to addressed",
                    );
                }
            }
            let enough = measured && self.is_enough(finish.verbatim_rate);
            let every = |interval: u64| step.is_multiple_of(interval) || last;
            let validated = self.job.validation.is_some() && every(settings.validation_interval());
            if validated {
                let loss = self.validation_loss()?;
                finish.validation_loss = Some(f64::from_bits(group.decide(loss.to_bits())?));
                is_best |= self.note_best_validation(finish.validation_loss);
            }
            let sampled = settings.sample_steps.is_some_and(every) && !diverged;
            let mut sample = None;
            if sampled {
                let weights = self.engine.arena(Arena::Parameters)?;
                // A run is worth more than its sample, whose memory may be taken.
                sample = observer.sample(step, &self.config, &weights).unwrap_or_else(|error| {
                    observer.note(&format!("warning: no sample after step {step}: {error:#}"));
                    None
                });
            }
            let asked_for = measured || validated || sampled;
            let mut line = None;
            if step.is_multiple_of(settings.logging_steps) || last || asked_for || diverged {
                let seconds = last_line.elapsed().as_secs_f64();
                let (sum, count) = std::mem::take(&mut self.state.unlogged);
                let tokens_per_second = (self.state.tokens - last_tokens) as f64 / seconds;
                let (ranks, wait_seconds) = self.waits(observer)?;
                let flops = self.config.training_flops(self.job.windows.context()) as f64;
                line = Some(Metrics {
                    schema_version: SchemaVersion,
                    step,
                    epoch: self.epoch(),
                    loss: sum / count as f64,
                    learning_rate: hyperparams.learning_rate,
                    muon_learning_rate: (settings.optimizer == OptimizerKind::Muon)
                        .then_some(hyperparams.muon_learning_rate),
                    grad_norm: outcome.grad_norm,
                    tokens: self.state.tokens,
                    tokens_per_second,
                    mfu: self.peak.map(|peak| tokens_per_second * flops / peak),
                    seconds: begin.elapsed().as_secs_f64(),
                    ranks,
                    wait_seconds,
                    skipped: self.state.skipped,
                    verbatim_rate: finish.verbatim_rate.filter(|_| measured),
                    validation_loss: finish
                        .validation_loss
                        .filter(|loss| validated && loss.is_finite()),
                    sample,
                    memory_bytes: memory_bytes(),
                });
                (last_line, last_tokens) = (Instant::now(), self.state.tokens);
            }
            if let (Some(line), Some(metrics)) = (&line, &mut metrics) {
                self.job.output.check()?;
                metrics.write(line)?;
                if let Some(events) = &mut events {
                    events.write(step, &line.scalars())?;
                }
            }
            observer.step(step, self.state.total, &outcome, line.as_ref());
            if diverged {
                self.finish_writing(observer)?;
                return Ok(TrainSummary { end: RunEnd::Diverged, ..finish });
            }
            if enough {
                observer.note("the verbatim rate that was asked for is reached");
                self.state.total = step;
                break;
            }
            if is_best && !last {
                self.save(observer)?;
            }
            if !last && group.any(observer.stop())? {
                let end = if self.save(observer)? { RunEnd::Interrupted } else { RunEnd::Diverged };
                return Ok(TrainSummary { end, ..finish });
            }
            if !last && !is_best && step.is_multiple_of(settings.save_steps) {
                self.save_meanwhile(observer)?;
            }
        }
        self.finish_writing(observer)?;
        // A run that was finished before has nothing new to save.
        if (self.unsaved || self.saved_step != self.state.step) && !self.save(observer)? {
            return Ok(TrainSummary { end: RunEnd::Diverged, ..finish });
        }
        let is_published = if group.is_first() { self.is_published()? } else { false };
        if self.state.step > already || is_new || group.decide(u64::from(is_published))? == 0 {
            self.publish(&mut finish, observer)?;
        }
        Ok(finish)
    }

    /// True if the run, all its sessions together, has trained for as long as it may.
    fn is_out_of_time(&self) -> anyhow::Result<bool> {
        if self.job.settings.max_seconds.is_none() {
            return Ok(false);
        }
        let sessions = &self.job.provenance.sessions;
        let before = &sessions[..sessions.len().saturating_sub(1)];
        let before: f64 = before.iter().map(|session| session.seconds).sum();
        let limit = self.job.settings.max_seconds;
        let is_over =
            limit.is_some_and(|limit| before + self.began.elapsed().as_secs_f64() >= limit);
        // By the clock of rank 0.
        Ok(self.job.group.decide(u64::from(is_over))? == 1)
    }

    /// Steps that can be asked for before somebody has to look: to the next line of metrics,
    /// measure or checkpoint, and not so long that Ctrl-C is not heard.
    fn ahead(&mut self) -> u64 {
        let settings = self.job.settings;
        let TrainState { step, total, .. } = self.state;
        let to_next = |every: u64| every - step % every;
        let room =
            self.engine.queue_capacity(settings.batch_size) / settings.gradient_accumulation_steps;
        let most = match self.pace {
            // The first one is looked at for parameters without a gradient.
            None => 1,
            Some(pace) => ((MAX_BATCHED_SECONDS / pace) as u64).clamp(1, room.max(1) as u64),
        };
        let validation = self.job.validation.map(|_| settings.validation_interval());
        let intervals =
            [Some(settings.logging_steps), Some(settings.save_steps), self.eval_interval];
        intervals
            .into_iter()
            .chain([validation, settings.sample_steps])
            .flatten()
            .map(to_next)
            .fold(most.min(total - step), u64::min)
    }

    /// The step that comes after `later` others: its hyperparams, and the next batches of this epoch.
    fn plan(&mut self, schedule: &LrSchedule, later: u64) -> TrainStep {
        let settings = self.job.settings;
        let step = self.state.step + later;
        let factor = schedule.factor(step);
        let hyperparams = StepHyperparams {
            learning_rate: settings.learning_rate * factor,
            muon_learning_rate: settings.muon_learning_rate * factor,
            step: step + 1,
        };
        let epoch = self.sampler.position().epoch;
        let mut batches = Vec::new();
        while batches.len() < settings.gradient_accumulation_steps
            && self.sampler.position().epoch == epoch
        {
            let hard = &self.state.hard_examples;
            batches.push(self.sampler.next_with_hard(settings.batch_size, hard));
        }
        TrainStep { batches, hyperparams }
    }

    /// Takes some steps, and tells of all but the last, which is returned.
    fn take(
        &mut self,
        steps: &[TrainStep],
        observer: &mut dyn Observer,
    ) -> anyhow::Result<StepStats> {
        let windows = self.job.windows;
        let begin = Instant::now();
        let outcomes = self.engine.steps(windows, steps)?;
        self.pace = Some(begin.elapsed().as_secs_f64() / steps.len() as f64);
        if !self.looked_for_lost && outcomes.iter().any(|outcome| outcome.counted > 0) {
            self.looked_for_lost = true;
            self.note_lost_gradients(observer)?;
            self.compare_matmuls(observer)?;
        }
        self.state.position = self.sampler.position();
        let mut before: Option<StepStats> = None;
        for (step, outcome) in steps.iter().zip(outcomes) {
            if let Some(before) = before {
                observer.step(self.state.step, self.state.total, &before, None);
            }
            let drawn: usize = step.batches.iter().map(Vec::len).sum();
            self.count((drawn * windows.context()) as u64, &outcome, observer);
            before = Some(outcome);
        }
        Ok(before.expect("at least one step was asked for"))
    }

    /// Counts a step that was taken on so many tokens.
    fn count(&mut self, tokens: u64, outcome: &StepStats, observer: &mut dyn Observer) {
        let state = &mut self.state;
        state.step += 1;
        state.tokens += tokens;
        // JSON has no word for what is not finite: such a loss is told of by the note below.
        if outcome.loss.is_finite() {
            state.unlogged.0 += outcome.loss;
            state.unlogged.1 += 1;
        }
        if outcome.counted == 0 {
            // Nothing to learn from, and nothing wrong.
        } else if outcome.updated() {
            self.lost = 0;
        } else {
            self.lost += 1;
            state.skipped += 1;
            // Fewer and fewer lines: a run may go on like this for long.
            if state.skipped.is_power_of_two() {
                let (step, skipped) = (state.step, state.skipped);
                let so_far =
                    if skipped > 1 { format!(", {skipped} so far") } else { String::new() };
                observer.note(&format!("step {step}: gradients not finite, no update{so_far}"));
            }
        }
    }

    /// True after too many steps in a row without an update; of float16 from the smallest useful loss
    /// scale on.
    fn has_diverged(&self) -> anyhow::Result<bool> {
        if self.lost < u64::from(MAX_SKIPPED_STEPS) {
            return Ok(false);
        }
        let smallest = MIN_LOSS_SCALE * 0.5f64.powi(MAX_SKIPPED_STEPS as i32);
        Ok(self.engine.loss_scale()?.is_none_or(|scale| scale <= smallest))
    }

    /// Tells of parameters that got no gradient at all so far, which their first moments show: a
    /// backward that forgets one trains on without a sign of it.
    fn note_lost_gradients(&self, observer: &mut dyn Observer) -> anyhow::Result<()> {
        let moments = self.engine.arena(Arena::FirstMoment)?;
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
}

/// Refuses weights that float16 cannot hold, before any step is trained that could not be saved.
fn check_float16(weights: &[f32], layout: &Layout) -> anyhow::Result<()> {
    let overflows = |x: &f32| x.is_finite() && !Dtype::F16.round(*x).is_finite();
    let too_large = layout
        .parameters
        .iter()
        .find(|parameter| weights[parameter.span.range()].iter().any(overflows));
    match too_large {
        None => Ok(()),
        Some(parameter) => Err(error::config(
            format!("{} has a value too large for float16, whose largest is 65504", parameter.name),
            "set `precision` to bfloat16",
        )),
    }
}
