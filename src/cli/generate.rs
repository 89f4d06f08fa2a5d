//! `laam generate`: text from a model.

use std::io::{self, BufRead, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use serde_json::json;

use super::backend::BackendArgs;
use super::model::Opened;
use super::output::{model_text, print_json, say, unwritten, write_to_stderr};
use super::{Outcome, model, windows};
use crate::error::{self, ErrorKind, Hint};
use crate::escape::{shell_word, visible};
use crate::generate::{Continuation, FinishReason, Generator, Request, Sampling, TextStream};
use crate::model::{GenerationDefaults, Provenance, load_generation_defaults};
use crate::schema::versioned;
use crate::tokenizer::{MARKERS, Markers};
use crate::tokens::WindowKind;

/// Context of an interactive session, whose prompts are not known beforehand.
const INTERACTIVE_CONTEXT: usize = 1 << 13;
/// Longest line that is read as a prompt.
const MAX_PROMPT_BYTES: u64 = 1 << 20;

/// Let a model go on with a text.
///
/// The new text streams to stdout. It ends with the model's end-of-text token, which is not printed,
/// with --max_new_tokens, or where the model's context is full. Without a prompt the model begins a
/// text. Markers in the prompt, like <|start_file|>, are read as markers.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  laam generate model --prompt 'int main(void)'
  laam generate model --temperature 0.8 --top_p 0.95 --seed 7
  laam generate model -i")]
pub struct GenerateArgs {
    /// The folder of the model
    model: PathBuf,
    /// The text to go on with
    #[arg(long, value_name = "TEXT", conflicts_with = "interactive")]
    prompt: Option<String>,
    /// The most tokens to add
    #[arg(long, value_name = "N", default_value_t = 256,
        value_parser = clap::value_parser!(u32).range(1..))]
    max_new_tokens: u32,
    /// Sampling temperature; 0 is greedy decoding [default: what the model's generation_config.json says, else 0]
    #[arg(long, value_name = "T")]
    temperature: Option<f64>,
    /// Sample among the K most likely tokens; 0 is all [default: the same, else 0]
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Nucleus sampling: among the most likely tokens that together have this probability [default: the same,
    /// else all]
    #[arg(long, value_name = "P")]
    top_p: Option<f64>,
    /// For the draws: the same seed draws the same text
    #[arg(long, value_name = "N", default_value_t = 42)]
    seed: u64,
    /// Read prompts from stdin, a line each
    #[arg(long, short, conflicts_with = "json")]
    interactive: bool,
    #[command(flatten)]
    backend: BackendArgs,
    /// Print the result, or the error, as one JSON object on stdout
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: &GenerateArgs) -> anyhow::Result<Outcome> {
    let sampling = arguments.sampling(&load_generation_defaults(&arguments.model)?);
    sampling.validate()?;
    let backend = arguments.backend.open()?;
    let opened = model::open(&arguments.model)?;
    let first = if arguments.interactive {
        None
    } else {
        Some(prompt(&arguments.model, &opened, arguments.prompt.as_deref().unwrap_or_default())?)
    };
    let context =
        first.as_ref().map_or(INTERACTIVE_CONTEXT, Vec::len) + arguments.max_new_tokens as usize;
    let config = &opened.model.config;
    let generator = Generator::new(&*backend, config, &opened.model.weights, 1, context)?
        .with_tokens(opened.tokenizer.vocab_size());
    let mut play = Play { arguments, opened: &opened, sampling, generator, turns: 0 };
    let Some(first) = first else { return play.interact() };

    let began = Instant::now();
    let mut text = (!arguments.json).then(model_text);
    let (answer, bytes) =
        play.answer(first.clone(), |piece| text.as_mut().map_or(Ok(()), |out| out.push(piece)))?;
    if let Some(out) = &mut text {
        out.finish().map_err(unwritten)?;
    }
    if arguments.json {
        let seconds = began.elapsed().as_secs_f64();
        let printed = json!({
            "prompt_ids": first,
            "ids": answer.ids,
            "text": String::from_utf8_lossy(&bytes),
            "finish": format!("{:?}", answer.finish).to_lowercase(),
            "seconds": seconds,
            "tokens_per_second": answer.ids.len() as f64 / seconds,
        });
        print_json(&versioned(printed));
    } else if io::stdout().is_terminal() {
        writeln!(io::stdout()).map_err(unwritten)?;
    }
    Ok(Outcome::Done)
}

impl GenerateArgs {
    /// Sampling by the flags, else by the model's folder.
    fn sampling(&self, defaults: &GenerationDefaults) -> Sampling {
        let (temperature, top_k, top_p) = defaults.sampling.unwrap_or_default();
        Sampling {
            temperature: self.temperature.unwrap_or(temperature),
            top_k: self.top_k.unwrap_or(top_k),
            top_p: self.top_p.or(top_p),
            seed: self.seed,
        }
    }
}

/// The tokens of a prompt; of an empty one, what texts begin with. A model of addressed windows has
/// learned to answer addresses alone, which a note says to whoever asks for something else.
fn prompt(folder: &Path, opened: &Opened, text: &str) -> anyhow::Result<Vec<u32>> {
    let ids = opened.tokenizer.encode_prompt(text)?;
    let is_address = |markers: Markers| ids.first() == Some(&markers.start_file);
    if windows::told(opened) == Some(WindowKind::Addressed)
        && !opened.tokenizer.markers().is_ok_and(is_address)
    {
        let [start_file, _, start_header, end_header, _] = MARKERS;
        let paths = opened.provenance.as_ref().map(Provenance::paths).unwrap_or_default();
        let path = paths.first().map_or("PATH", String::as_str);
        say!(
            "note: this model answers addresses, such as {start_file}{start_header}{} 0{end_header}; \
             laam cat {} {} gives a whole file",
            visible(path),
            shell_word(&folder.to_string_lossy()),
            shell_word(path)
        );
    }
    if !ids.is_empty() {
        return Ok(ids);
    }
    let bos = opened.model.config.bos_token_id.or(opened.tokenizer.special().bos);
    bos.map(|bos| vec![bos])
        .ok_or_else(|| error::config("the model has no token that begins a text", "set `prompt`"))
}

/// A model, answering.
struct Play<'a> {
    arguments: &'a GenerateArgs,
    opened: &'a Opened,
    sampling: Sampling,
    generator: Generator,
    /// Answers so far: each has its own random numbers.
    turns: u32,
}

impl Play<'_> {
    /// Goes on with a prompt; `show` gets the text as it comes. Returns the tokens and the text.
    fn answer(
        &mut self,
        prompt: Vec<u32>,
        mut show: impl FnMut(&[u8]) -> io::Result<()>,
    ) -> anyhow::Result<(Continuation, Vec<u8>)> {
        let mut stream = TextStream::new(&self.opened.tokenizer, &prompt)?;
        self.generator.admit(Request {
            prompt,
            max_new_tokens: self.arguments.max_new_tokens as usize,
            stop: self.opened.model.config.eos_token_ids.clone(),
            sampling: self.sampling,
            sequence: self.turns,
        })?;
        self.turns += 1;
        let mut answer = Continuation { ids: Vec::new(), finish: FinishReason::Length };
        let mut bytes = Vec::new();
        while self.generator.is_busy() {
            for event in self.generator.step()? {
                answer.ids.push(event.id);
                answer.finish = event.finish.unwrap_or(answer.finish);
                if event.finish != Some(FinishReason::Stop) {
                    let piece = stream.push(event.id)?;
                    show(&piece).map_err(unwritten)?;
                    bytes.extend(piece);
                }
            }
        }
        let rest = stream.finish()?;
        show(&rest).map_err(unwritten)?;
        bytes.extend(rest);
        if answer.finish == FinishReason::Context {
            let context = self.generator.context();
            say!("stopped: the model reads no more than {context} tokens");
        }
        Ok((answer, bytes))
    }

    /// Answers line by line, until there are no more.
    fn interact(&mut self) -> anyhow::Result<Outcome> {
        let is_person = io::stdin().is_terminal();
        let mut lines = io::stdin().lock();
        loop {
            if is_person {
                write_to_stderr("> ");
            }
            let mut line = Vec::new();
            let read = io::Read::take(&mut lines, MAX_PROMPT_BYTES).read_until(b'\n', &mut line)?;
            if read == 0 {
                return Ok(Outcome::Done);
            }
            let line = String::from_utf8(line)
                .hint(ErrorKind::Config, || "a prompt is a line of UTF-8 text of at most 1 MiB")?;
            let line = line.trim_end_matches(['\r', '\n']);
            let ids = prompt(&self.arguments.model, self.opened, line)?;
            let mut out = model_text();
            let answered = self.answer(ids, |piece| out.push(piece));
            match answered {
                Ok(_) => out.finish().and_then(|()| out.push(b"\n")).map_err(unwritten)?,
                // A person tries again with another prompt; a pipe has gone wrong.
                Err(error) if is_person && !super::is_broken_pipe(&error) => {
                    say!("{error:#}");
                }
                Err(error) => return Err(error),
            }
        }
    }
}
