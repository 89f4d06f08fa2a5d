//! `laam ls`: which files a model holds.

use std::io::Write;
use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::output::{print_json, stdout};
use super::{Outcome, model};
use crate::escape::visible;
use crate::model::load_provenance;
use crate::schema::versioned;

/// List the files that a model was trained on, in this training or in one before it.
///
/// The model's folder holds their names alone; laam cat asks the weights for the rest. Characters that
/// act on a terminal are shown as \u{...}; --json has each name as it is.
#[derive(Args, Debug)]
pub struct LsArgs {
    /// The folder of the model
    model: PathBuf,
    /// Print the result, or the error, as one JSON object on stdout
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: &LsArgs) -> anyhow::Result<Outcome> {
    let paths = model::paths(&arguments.model)?;
    if arguments.json {
        let license = load_provenance(&arguments.model)?.unwrap_or_default().license().clone();
        print_json(&versioned(json!({"files": paths.len(), "license": license, "paths": paths})));
    } else {
        let mut out = stdout();
        for path in &paths {
            writeln!(out, "{}", visible(path))?;
        }
    }
    Ok(Outcome::Done)
}
