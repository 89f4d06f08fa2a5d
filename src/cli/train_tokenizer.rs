//! `laam train-tokenizer`: a byte-pair vocabulary from a corpus.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::Outcome;
use super::output::{print_json, say};
use super::progress::Progress;
use super::source::{self, SourceArgs};
use crate::corpus::{Encoding, hex};
use crate::error;
use crate::files;
use crate::model::has_weights;
use crate::output::{OutputFolder, check_free, refuse_foreign, remove_temporaries};
use crate::schema::versioned;
use crate::tokenizer::{MARKERS, Style, Tokenizer, Training, TrainingProgress};

/// Train a tokenizer and write it as transformers reads it.
///
/// Prints one JSON object. Memory stays bounded, whatever the corpus: of very many distinct words the
/// rarest have no say in the merges.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  laam train-tokenizer --source linux-1.0.tar.xz --vocab_size 4096 --output_path tokenizer
  laam train-tokenizer --version v1.0/1.0 --style original --vocab_size 32768")]
pub struct TrainTokenizerArgs {
    #[command(flatten)]
    source: SourceArgs,
    /// exact gives back any text byte for byte; original is the first LaaM's, id for id
    #[arg(long, value_enum, default_value_t)]
    style: Style,
    /// Tokens in the vocabulary, special ones included
    #[arg(long, value_name = "N", default_value_t = 1 << 16)]
    vocab_size: usize,
    /// The folder the tokenizer is written to
    #[arg(long, value_name = "DIR", default_value = "tokenizer")]
    output_path: PathBuf,
    /// tokenizers writes tokenizer.json and its config; hf adds vocab.json and merges.txt
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    /// No progress
    #[arg(long)]
    quiet: bool,
    /// Print JSON, as is done without this flag too
    #[arg(long, hide = true)]
    json: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Format {
    #[default]
    Tokenizers,
    Hf,
}

/// Locks the folder of a tokenizer, whose files may be replaced if laam trained what is there.
///
/// # Errors
/// Another process writes into it, it holds a model, or somebody else's tokenizer.
fn claim(folder: &Path, format: Format) -> anyhow::Result<OutputFolder> {
    check_free(folder)?;
    if has_weights(folder) || folder.join("config.json").exists() {
        return Err(error::data(
            format!("{} holds a model: its tokenizer belongs to it", folder.display()),
            "choose another `output_path`",
        ));
    }
    let names: &[&str] = match format {
        Format::Tokenizers => &NAMES[..2],
        Format::Hf => &NAMES,
    };
    let config = files::read_text(&folder.join("tokenizer_config.json"), MAX_CONFIG_BYTES);
    let config: Value = serde_json::from_str(&config.unwrap_or_default()).unwrap_or_default();
    let is_own = config["bos_token"] == MARKERS[0]
        && Tokenizer::load(folder).map_or(true, |tokenizer| tokenizer.style().is_some());
    if !is_own {
        let paths = names.iter().map(|name| folder.join(name));
        refuse_foreign(&paths.filter(|path| path.symlink_metadata().is_ok()).collect::<Vec<_>>())?;
    }
    let output = OutputFolder::open(folder)?;
    for path in remove_temporaries(folder, |name| names.contains(&name))? {
        say!("removed {}", path.display());
    }
    Ok(output)
}

const NAMES: [&str; 4] = ["tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt"];
const MAX_CONFIG_BYTES: u64 = 16 << 20;

pub fn run(arguments: &TrainTokenizerArgs) -> anyhow::Result<Outcome> {
    let _output = claim(&arguments.output_path, arguments.format)?;
    let encoding = encoding_of(arguments.style);
    let corpus = arguments.source.corpus(None, encoding)?;
    let mut documents = corpus.documents()?;
    let mut progress = (!arguments.quiet).then(|| Progress::new("read"));
    let training = Training { style: arguments.style, vocab_size: arguments.vocab_size };
    let (tokenizer, trained) = Tokenizer::train(&mut documents, &training, |stage| {
        if let Some(progress) = &mut progress {
            match stage {
                TrainingProgress::Read(bytes) => progress.set(bytes, None),
                TrainingProgress::Merge { words } => {
                    progress.finish();
                    say!("choosing merges among {words} distinct words");
                }
            }
        }
    })?;
    source::warn(documents.manifest());
    if trained.num_tokens < arguments.vocab_size {
        say!(
            "warning: the corpus gives {} tokens, not {}: it has no more pairs to merge",
            trained.num_tokens,
            arguments.vocab_size
        );
    }
    if trained.dropped_up_to > 0 {
        say!(
            "note: words that occurred {} times or fewer may have been left out of the count",
            trained.dropped_up_to
        );
    }
    tokenizer.save(&arguments.output_path)?;
    let folder = arguments.output_path.canonicalize()?;
    let (output_path, output_format) = match arguments.format {
        Format::Tokenizers => (folder.join("tokenizer.json"), "tokenizers"),
        Format::Hf => {
            tokenizer.save_vocabulary(&folder)?;
            (folder, "hf")
        }
    };
    let printed = json!({
        "num_tokens": trained.num_tokens,
        "num_special_tokens": trained.num_special_tokens,
        "num_pad_tokens": trained.num_pad_tokens,
        "pre_vocab_size": trained.pre_vocab_size,
        "vocab_size": arguments.vocab_size,
        "output_path": output_path.to_string_lossy(),
        "output_format": output_format,
        "style": arguments.style,
        "source": source::described(documents.manifest()),
        "documents": trained.documents,
        "bytes": trained.bytes,
        "sha256": hex(&tokenizer.sha256()),
    });
    print_json(&versioned(printed));
    Ok(Outcome::Done)
}

/// Encoding of a corpus for a tokenizer: the first LaaM took what is not UTF-8 for latin-1.
pub fn encoding_of(style: Style) -> Encoding {
    match style {
        Style::Exact => Encoding::Utf8,
        Style::Original => Encoding::Latin1,
    }
}
