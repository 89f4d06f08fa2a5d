//! `laam cat`: one file out of a model's weights.

use std::io::{self, StdoutLock, Write};
use std::path::PathBuf;

use clap::Args;

use super::backend::BackendArgs;
use super::output::{say, unwritten};
use super::{Outcome, model, windows};
use crate::error;
use crate::generate::Generator;
use crate::memorization::regenerate::{End, Regenerator, Sink};
use crate::tokens::WindowKind;

/// Regenerate one file from its name alone.
///
/// Its bytes stream to stdout. Exits with 1 when the model did not end the file.
#[derive(Args, Debug)]
#[command(after_help = "\
Example:
  laam cat model linux/kernel/sched.c | diff - linux/kernel/sched.c")]
pub struct CatArgs {
    /// The folder of the model
    model: PathBuf,
    /// The file, by a name that laam ls lists
    path: String,
    /// The windows that the model was trained on [default: what its provenance says, else stream]
    #[arg(long, value_enum)]
    windows: Option<WindowKind>,
    /// Give up on a file after so many tokens
    #[arg(long, value_name = "N", default_value_t = Regenerator::LIMIT)]
    max_tokens: usize,
    #[command(flatten)]
    backend: BackendArgs,
}

pub fn run(arguments: &CatArgs) -> anyhow::Result<Outcome> {
    let backend = arguments.backend.open()?;
    let opened = model::open(&arguments.model)?;
    let known = &opened.provenance.as_ref().map(|provenance| &provenance.corpus.paths);
    if known.is_some_and(|known| !known.is_empty() && !known.contains(&arguments.path)) {
        return Err(error::config(
            format!("the model was not trained on a file {:?}", arguments.path),
            format!("laam ls {} lists its files", arguments.model.display()),
        ));
    }
    let windows = windows::kind(arguments.windows, &opened);
    let config = &opened.model.config;
    let context = config.max_position_embeddings;
    let regenerator =
        Regenerator::new(opened.tokenizer.clone(), windows, context, arguments.max_tokens)?;
    let mut generator = Generator::new(&*backend, config, &opened.model.weights, 1, context)?
        .with_tokens(opened.tokenizer.vocab_size());
    let mut print = Print { out: io::stdout().lock(), end: None };
    regenerator.run(&mut generator, &[&arguments.path], &mut print)?;
    match print.end {
        Some(End::Whole) => Ok(Outcome::Done),
        end => {
            say!("{:?} is {}", arguments.path, end.unwrap_or(End::NoRoom).words());
            Ok(Outcome::Different)
        }
    }
}

/// Streams to stdout.
struct Print {
    out: StdoutLock<'static>,
    end: Option<End>,
}

impl Sink for Print {
    fn text(&mut self, _: usize, bytes: &[u8]) -> anyhow::Result<()> {
        self.out.write_all(bytes).and_then(|()| self.out.flush()).map_err(unwritten)
    }

    fn end(&mut self, _: usize, end: End, _: usize) -> anyhow::Result<()> {
        self.end = Some(end);
        Ok(())
    }
}
