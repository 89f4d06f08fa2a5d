//! `laam report`: a run as one page.

use std::io::Write;
use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::Outcome;
use super::output::{print_json, stdout};
use crate::report;
use crate::schema::versioned;

/// Make one self-contained HTML page of a run: its training, what its weights give back, and where it
/// came from.
///
/// The page is written as report.html into the folder, and its path printed. It asks for no other
/// file, and opens from a disk.
#[derive(Args, Debug)]
#[command(after_help = "\
Example:
  laam report runs/sample")]
pub struct ReportArgs {
    /// The output folder of laam run, or of laam train
    #[arg(value_name = "RUN_DIR")]
    folder: PathBuf,
    /// Print the result, or the error, as one JSON object on stdout
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: &ReportArgs) -> anyhow::Result<Outcome> {
    let page = report::write(&arguments.folder)?;
    if arguments.json {
        print_json(&versioned(json!({"report": page.to_string_lossy()})));
    } else {
        writeln!(stdout(), "{}", page.display())?;
    }
    Ok(Outcome::Done)
}
