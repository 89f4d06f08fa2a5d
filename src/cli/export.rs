//! `laam export`: a model in another program's format.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde_json::json;

use super::output::say;
use super::{Outcome, model, print_fields};
use crate::export::{GgufDtype, export_gguf};
use crate::files;
use crate::model::{License, Provenance};

/// Write a model in the format of another program.
#[derive(Args, Debug)]
pub struct ExportArgs {
    #[command(subcommand)]
    format: ExportFormat,
}

#[derive(Subcommand, Debug)]
enum ExportFormat {
    Gguf(GgufArgs),
}

/// A GGUF file, which llama.cpp, Ollama and LM Studio run.
///
/// It holds the weights and the tokenizer. A model trained on addresses answers addresses there too.
#[derive(Args, Debug)]
#[command(after_help = "\
Example:
  laam export gguf runs/sample/model --output sample.gguf --dtype q8_0
  llama-completion -m sample.gguf --temp 0 -n 200 \\
    --special -p '<|start_file|><|start_header|>sample/sched.c 0<|end_header|>'")]
struct GgufArgs {
    /// The folder of the model
    model: PathBuf,
    /// The file to write
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Element type of the matrices; norms are f32 [default: that of the model]
    #[arg(long, value_enum)]
    dtype: Option<GgufDtype>,
    /// Print the result, or the error, as one JSON object on stdout
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: &ExportArgs) -> anyhow::Result<Outcome> {
    let ExportFormat::Gguf(arguments) = &arguments.format;
    let opened = model::open(&arguments.model)?;
    let folder = arguments.model.canonicalize().unwrap_or_else(|_| arguments.model.clone());
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    let license = opened.provenance.as_ref().map(Provenance::license);
    let license = license.filter(|license| **license != License::Unknown).map(License::id);
    let dtype = arguments.dtype.unwrap_or(opened.model.precision.into());
    let exported =
        export_gguf(&arguments.output, &name, license, &opened.model, &opened.tokenizer, dtype)?;
    for warning in &exported.warnings {
        say!("warning: {warning}");
    }
    if exported.not_quantized > 0 {
        say!("note: {} tensors are f16: rows are not a multiple of 32", exported.not_quantized);
    }
    let bytes = files::open(&arguments.output).and_then(|file| Ok(file.metadata()?.len())).ok();
    print_fields(
        json!({
            "file": arguments.output.display().to_string(),
            "bytes": bytes,
            "tensors": exported.tensors,
            "parameters": opened.model.layout.parameter_count(),
        }),
        arguments.json,
    )?;
    Ok(Outcome::Done)
}
