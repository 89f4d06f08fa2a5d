//! `laam cat`: one file out of a model's weights.

use std::io::StdoutLock;
use std::path::PathBuf;

use clap::Args;
use serde_json::json;
use sha2::{Digest, Sha256};

use super::backend::BackendArgs;
use super::output::{model_text, print_json, say, unwritten};
use super::{Outcome, model, windows};
use crate::corpus::{hex, shown};
use crate::error;
use crate::escape::{ModelText, shell_word};
use crate::generate::Generator;
use crate::memorization::regenerate::{End, Regenerator, Sink};
use crate::model::Provenance;
use crate::schema::versioned;
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
    /// Print the result, or the error, as one JSON object on stdout
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: &CatArgs) -> anyhow::Result<Outcome> {
    let backend = arguments.backend.open()?;
    let opened = model::open(&arguments.model)?;
    if let Some(provenance) = &opened.provenance {
        model::refuse_unnamed(provenance, &arguments.model)?;
    }
    let known = opened.provenance.as_ref().map(Provenance::paths).unwrap_or_default();
    if !known.is_empty() && !known.contains(&arguments.path) {
        let model = shell_word(&arguments.model.to_string_lossy());
        let hint = match near(&arguments.path, &known).as_slice() {
            [] => format!("laam ls {model} lists its files"),
            names => format!("did you mean {}? laam ls {model} lists all", names.join(" or ")),
        };
        let asked = &arguments.path;
        return Err(error::config(format!("the model was not trained on a file {asked:?}"), hint));
    }
    let windows = windows::kind(arguments.windows, &opened);
    let config = &opened.model.config;
    let context = config.max_position_embeddings;
    let regenerator =
        Regenerator::new(opened.tokenizer.clone(), windows, context, arguments.max_tokens)?;
    let slots = regenerator.slots(&*backend, 1);
    let mut generator = Generator::new(&*backend, config, &opened.model.weights, slots, context)?
        .with_tokens(opened.tokenizer.vocab_size());
    let out = (!arguments.json).then(model_text);
    let mut print = Print { out, bytes: Vec::new(), end: None };
    regenerator.run(&mut generator, &[&arguments.path], &mut print)?;
    let end = print.end.unwrap_or(End::NoRoom);
    if arguments.json {
        print_json(&versioned(json!({
            "path": arguments.path,
            "end": end,
            "bytes": print.bytes.len(),
            "sha256": hex(&Sha256::digest(&print.bytes)),
            "text": String::from_utf8_lossy(&print.bytes),
        })));
    }
    if end == End::Whole {
        return Ok(Outcome::Done);
    }
    say!("{:?} is {}", arguments.path, end.words());
    Ok(Outcome::Different)
}

/// The most names that an error suggests.
const MAX_SUGGESTIONS: usize = 3;

/// Names that someone may have meant, the nearest first: the same file in another folder, or one that
/// differs in a few characters. As they can be shown.
fn near(asked: &str, known: &[String]) -> Vec<String> {
    let file = |path: &str| path.rsplit('/').next().unwrap_or_default().to_lowercase();
    let asked_file = file(asked);
    let distance = |path: &String| {
        let whole = strsim::damerau_levenshtein(&asked.to_lowercase(), &path.to_lowercase());
        let name = strsim::damerau_levenshtein(&asked_file, &file(path));
        let is_near = |distance: usize, text: &str| distance <= text.chars().count() / 4;
        (is_near(whole, asked) || (is_near(name, &asked_file) && !asked_file.is_empty()))
            .then_some((name, whole))
    };
    let mut found: Vec<_> = known.iter().filter_map(|path| Some((distance(path)?, path))).collect();
    found.sort();
    found.truncate(MAX_SUGGESTIONS);
    found.into_iter().map(|(_, path)| shown(path.as_bytes())).collect()
}

/// Streams to stdout.
struct Print {
    /// None for JSON, which holds the bytes instead.
    out: Option<ModelText<StdoutLock<'static>>>,
    bytes: Vec<u8>,
    end: Option<End>,
}

impl Sink for Print {
    fn text(&mut self, _: usize, bytes: &[u8]) -> anyhow::Result<()> {
        let Some(out) = &mut self.out else {
            self.bytes.extend(bytes);
            return Ok(());
        };
        out.push(bytes).map_err(unwritten)
    }

    fn end(&mut self, _: usize, end: End, _: usize) -> anyhow::Result<()> {
        self.end = Some(end);
        self.out.as_mut().map_or(Ok(()), ModelText::finish).map_err(unwritten)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_names_are_suggested_nearest_first() {
        let known =
            ["linux/kernel/sched.c", "linux/kernel/sys.c", "linux/mm/memory.c", "linux/net/a.h"];
        let known = known.map(String::from);
        assert_eq!(near("kernel/sched.c", &known)[0], "linux/kernel/sched.c");
        assert_eq!(near("linux/kernel/shced.c", &known)[0], "linux/kernel/sched.c");
        assert_eq!(near("SCHED.C", &known), ["linux/kernel/sched.c"]);
        assert_eq!(near("memory.c", &known), ["linux/mm/memory.c"]);
        assert!(near("README", &known).is_empty());
        assert!(near("", &known).is_empty());
    }
}
