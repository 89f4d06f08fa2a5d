//! What a person sees of a training run, and Ctrl-C.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::interrupt::{self, Work};
use super::is_interactive;
use super::output::say;
use crate::backend::Backend;
use crate::escape::visible;
use crate::generate::{Generator, Request, Sampling, TextStream};
use crate::model::Config;
use crate::tokenizer::Tokenizer;
use crate::tokens::{AddressEncoder, WindowKind, Windows};
use crate::train::{Metrics, Observer, RunEnd, StepStats, TrainSummary};

/// Interval of the lines in a log.
const INTERVAL: Duration = Duration::from_secs(10);

/// Writes texts with the weights of a run under way.
pub struct TextSampler<'a> {
    backend: &'a dyn Backend,
    tokenizer: &'a Tokenizer,
    prompt: Vec<u32>,
    seed: u64,
}

/// Tokens of a sample, and how they are drawn.
const SAMPLE_TOKENS: usize = 100;
const SAMPLE_TEMPERATURE: f64 = 0.8;

impl<'a> TextSampler<'a> {
    /// A sample begins as texts do: of addressed windows with the first document's address.
    pub fn new(
        backend: &'a dyn Backend,
        tokenizer: &'a Arc<Tokenizer>,
        windows: &Windows,
        seed: u64,
    ) -> anyhow::Result<Self> {
        let prompt = if windows.kind() == WindowKind::Addressed {
            let path = windows.file().document(0)?.path;
            AddressEncoder::new(tokenizer.clone(), windows.context()).address(path, 0)?.ids
        } else {
            vec![tokenizer.special().bos.map_or_else(|| tokenizer.end_of_document(), Ok)?]
        };
        Ok(Self { backend, tokenizer, prompt, seed })
    }

    fn text(&self, step: u64, config: &Config, weights: &[f32]) -> anyhow::Result<String> {
        let context = self.prompt.len() + SAMPLE_TOKENS;
        let mut generator = Generator::new(self.backend, config, weights, 1, context)?
            .with_tokens(self.tokenizer.vocab_size());
        let temperature = SAMPLE_TEMPERATURE;
        let sampling = Sampling { temperature, seed: self.seed, ..Sampling::default() };
        generator.admit(Request {
            prompt: self.prompt.clone(),
            max_new_tokens: SAMPLE_TOKENS,
            stop: config.eos_token_ids.clone(),
            sampling,
            sequence: step as u32,
        })?;
        let mut stream = TextStream::new(self.tokenizer, &self.prompt)?;
        let mut bytes = Vec::new();
        while generator.is_busy() {
            for event in generator.step()? {
                if !config.eos_token_ids.contains(&event.id) {
                    bytes.extend(stream.push(event.id)?);
                }
            }
        }
        bytes.extend(stream.finish()?);
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

/// A bar at a terminal, a line now and then in a log.
pub struct Watcher<'a> {
    sampler: TextSampler<'a>,
    bar: Option<ProgressBar>,
    began: Instant,
    said: Option<Instant>,
    /// Steps that an earlier run had done.
    from: u64,
    loss: Loss,
}

/// A loss that jumps less than each step's own.
#[derive(Default)]
struct Loss(Option<f64>);

impl Loss {
    fn follow(&mut self, loss: f64) -> f64 {
        if !loss.is_finite() {
            return self.0.unwrap_or(loss);
        }
        let smooth = self.0.map_or(loss, |before| 0.9 * before + 0.1 * loss);
        *self.0.insert(smooth)
    }
}

impl<'a> Watcher<'a> {
    /// Begins to watch a run, and Ctrl-C.
    pub fn new(done: u64, total: u64, sampler: TextSampler<'a>) -> anyhow::Result<Self> {
        interrupt::watch(Work::Training)?;
        let bar = is_interactive().then(|| {
            let bar = ProgressBar::new(total);
            bar.set_draw_target(ProgressDrawTarget::stderr());
            let form = "step {pos}/{len} {wide_bar} {msg}, {eta} left";
            bar.set_style(ProgressStyle::with_template(form).expect("the template is right"));
            bar.set_position(done);
            bar.reset_eta();
            bar
        });
        let (began, loss) = (Instant::now(), Loss::default());
        Ok(Self { sampler, bar, began, said: None, from: done, loss })
    }

    /// Ends the display with a line that says how it went, and how an interrupted run goes on.
    pub fn finish(&self, finish: &TrainSummary, output: &Path, goes_on: &str) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        let seconds = self.began.elapsed().as_secs_f64();
        let (steps, total) = (finish.steps, finish.total);
        let folder = output.display();
        if finish.end == RunEnd::Diverged {
            say!("laam: the run diverged at step {steps} of {total}, in {folder}");
            say!(
                "hint: lower --learning-rate, or raise --warmup-steps; what was saved before is untouched"
            );
        } else if finish.end == RunEnd::Interrupted {
            say!("stopped after step {steps} of {total}; {goes_on}, {folder}");
        } else if total == 0 {
            say!("no step needed, saved in {}", output.display());
        } else if steps == self.from && steps < total {
            say!("no time left: after step {steps} of {total}, {folder}");
        } else if steps == self.from {
            say!("nothing to do: all {total} steps were done, {}", output.display());
        } else {
            let did = steps - self.from;
            let loss = self.loss.0.unwrap_or(finish.loss);
            let folder = output.display();
            say!("trained {did} steps in {seconds:.0} s, loss {loss:.4}, saved in {folder}");
        }
    }
}

impl Observer for Watcher<'_> {
    fn step(&mut self, step: u64, total: u64, outcome: &StepStats, metrics: Option<&Metrics>) {
        let loss = self.loss.follow(outcome.loss);
        if let Some(bar) = &self.bar {
            bar.set_position(step);
        }
        let Some(metrics) = metrics else { return };
        let mut text = format!("loss {loss:.4}, {:.0} tokens/s", metrics.tokens_per_second);
        if let Some(rate) = metrics.verbatim_rate {
            text = format!("{text}, verbatim {:.1}%", 100.0 * rate);
        }
        if let Some(loss) = metrics.validation_loss {
            text = format!("{text}, validation {loss:.4}");
        }
        if let Some(bar) = &self.bar {
            bar.set_message(text);
        } else if step == total
            || metrics.validation_loss.is_some()
            || self.said.is_none_or(|said| said.elapsed() >= INTERVAL)
        {
            self.said = Some(Instant::now());
            let pace = self.began.elapsed().as_secs_f64() / (step - self.from) as f64;
            let left = pace * (total - step) as f64;
            say!("step {step}/{total}: {text}, {left:.0} s left");
        }
    }

    fn sample(
        &mut self,
        step: u64,
        config: &Config,
        weights: &[f32],
    ) -> anyhow::Result<Option<String>> {
        let text = self.sampler.text(step, config, weights)?;
        let lines: Vec<_> = text.lines().map(visible).collect();
        self.note(&format!("sample after step {step}: {}", lines.join("\n    ")));
        Ok(Some(text))
    }

    fn note(&mut self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| say!("{line}")),
            None => say!("{line}"),
        }
    }

    fn stop(&self) -> bool {
        interrupt::is_interrupted()
    }
}

impl Drop for Watcher<'_> {
    /// Leaves no half bar behind when an error ends the run.
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
