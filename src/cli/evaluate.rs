//! `laam evaluate`: the loss of a model on a text.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::backend::BackendArgs;
use super::interrupt::{self, Work};
use super::progress::Progress;
use super::rebuild::AGAIN;
use super::source::{self, SourceArgs};
use super::windows::{self, WindowShape};
use super::{Outcome, model, print_fields};
use crate::error;
use crate::memorization::loss::measure;
use crate::tokens::WindowKind;

/// Measure the loss of a model on a text.
///
/// Prints loss (mean nats per token), perplexity, bits_per_byte and tokens. What counts depends on the
/// windows: of original ones all tokens but the first of each, of stream ones all but the first of
/// the text, of addressed ones the text without its paths. Without a source: the text the model was
/// trained on, if that is the built-in sample or a kernel release; any other has to be named.
#[derive(Args, Debug)]
#[command(after_help = "\
Example:
  laam evaluate model --source linux/kernel --json
  laam evaluate Llama-3.2-1B --source book.txt --windows stream --max_position_embeddings 2048")]
pub struct EvaluateArgs {
    /// The folder of the model
    model: PathBuf,
    #[command(flatten)]
    source: SourceArgs,
    /// How the text is cut into windows [default: as in training, else stream]
    #[arg(long, value_enum)]
    windows: Option<WindowKind>,
    /// Sequence length: tokens per window [default: the model's; of a model that laam did not train at most 1024]
    #[arg(long, value_name = "N")]
    max_position_embeddings: Option<usize>,
    /// Tokens from one stream window to the next [default: the length of a window]
    #[arg(long, value_name = "N")]
    stride: Option<usize>,
    /// Windows at a time [default: chosen by the backend]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    batch_size: Option<u32>,
    #[command(flatten)]
    backend: BackendArgs,
    /// No progress
    #[arg(long)]
    quiet: bool,
    /// Print the result, or the error, as one JSON object on stdout
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: &EvaluateArgs) -> anyhow::Result<Outcome> {
    let backend = arguments.backend.open()?;
    let opened = model::open(&arguments.model)?;
    let kind = windows::kind(arguments.windows, &opened);
    if arguments.stride.is_some() && kind != WindowKind::Stream {
        return Err(error::config("`stride` without stream windows", "set `windows` to stream"));
    }
    let shape = WindowShape::of(&opened, arguments.max_position_embeddings)?;
    let shape = WindowShape { stride: arguments.stride, ..shape };
    let corpus = arguments.source.corpus_of_model(&opened)?;
    interrupt::watch(Work::Measuring)?;
    let (cut, manifest) = windows::cut(&corpus, &opened, kind, shape)?;
    let windows = &cut.windows;
    let config = &opened.model.config;
    let batch = arguments.batch_size.map_or_else(
        || backend.micro_batch(windows.len(), windows.context()),
        |batch| (batch as usize).min(windows.len()),
    );
    let mut progress = (!arguments.quiet).then(|| Progress::new("evaluated"));
    let bytes = manifest.bytes();
    let weights = &opened.model.weights;
    let measured = measure(&*backend, config, weights, windows, bytes, batch, |done| {
        if let Some(progress) = &mut progress {
            // As much of the text as of the windows.
            let part = done as f64 / windows.len() as f64;
            progress.set((bytes as f64 * part) as u64, Some(bytes));
        }
        interrupt::check(AGAIN)
    })?;
    if let Some(progress) = &mut progress {
        progress.finish();
    }
    let mut printed = json!({
        "source": source::described(&manifest),
        "loss": measured.loss,
        "perplexity": measured.perplexity,
        "bits_per_byte": measured.bits_per_byte,
        "tokens": measured.tokens,
        "windows": windows.len(),
        "window_kind": kind,
        "context": windows.context(),
        "files": manifest.files.len(),
        "documents": manifest.documents(),
        "bytes": bytes,
    });
    // JSON has no word for what is not finite; the loss says how large it is.
    for (name, value) in [("loss", measured.loss), ("perplexity", measured.perplexity)] {
        if !arguments.json && !value.is_finite() {
            printed[name] = json!(value.to_string());
        }
    }
    print_fields(printed, arguments.json)?;
    Ok(Outcome::Done)
}
