//! `laam ls`: which files a model holds.

use std::io::{self, Write};
use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::{Outcome, model};
use crate::schema::versioned;

/// List the files that a model was trained on.
///
/// The model's folder holds their names alone; laam cat asks the weights for the rest.
#[derive(Args, Debug)]
pub struct LsArgs {
    /// The folder of the model
    model: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: &LsArgs) -> anyhow::Result<Outcome> {
    let paths = model::paths(&arguments.model)?;
    let mut out = io::stdout().lock();
    if arguments.json {
        writeln!(out, "{:#}", versioned(json!({"files": paths.len(), "paths": paths})))?;
    } else {
        for path in &paths {
            writeln!(out, "{path}")?;
        }
    }
    Ok(Outcome::Done)
}
