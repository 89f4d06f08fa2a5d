//! `laam check`: every operation of a backend against f64.

use std::io::{self, Write};
use std::time::{SystemTime, UNIX_EPOCH};

use clap::Args;
use serde_json::json;

use super::Outcome;
use super::backend::BackendArgs;
use super::bench::warn_of_another;
use super::output::{print_json, say, stdout};
use crate::bench::check::{CheckRow, Selection, Size, check};
use crate::dtype::Dtype;
use crate::schema::versioned;

/// Compare every operation of a backend with f64, on fresh random inputs.
#[derive(Args, Debug)]
pub struct CheckArgs {
    /// Only operations whose names contain this
    #[arg(long)]
    only: Option<String>,
    /// The precisions to check [default: all that the backend computes in]
    #[arg(long, value_enum)]
    precision: Vec<Dtype>,
    /// Large shapes too: seconds on a GPU, minutes for the f64 reference
    #[arg(long)]
    full: bool,
    /// The seed of the inputs [default: the time]
    #[arg(long)]
    seed: Option<u64>,
    #[command(flatten)]
    backend: BackendArgs,
    /// Print the result, or the error, as one JSON object on stdout
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: &CheckArgs) -> anyhow::Result<Outcome> {
    let clock = SystemTime::now().duration_since(UNIX_EPOCH);
    let seed = arguments.seed.unwrap_or_else(|| clock.map_or(0, |time| time.as_secs()));
    let size = if arguments.full { Size::Full } else { Size::Small };
    let selection = Selection { only: arguments.only.as_deref(), size, seed };
    let precisions = match arguments.precision.as_slice() {
        [] => &[Dtype::F32, Dtype::Bf16, Dtype::F16],
        some => some,
    };
    let mut out = stdout();
    let mut runs: Vec<(&str, String, Vec<CheckRow>)> = Vec::new();
    let mut failed = 0;
    for &precision in precisions {
        let backend = arguments.backend.open_in(Some(precision))?;
        let name = backend.compute_dtype().suffix();
        if !arguments.precision.is_empty() {
            warn_of_another(&*backend, Some(precision));
        }
        if runs.iter().any(|(dtype, ..)| *dtype == name) {
            continue;
        }
        say!("{}, seed {seed}", backend.device());
        let mut written = Ok(());
        let rows = check(&*backend, &selection, |row| {
            if !arguments.json && written.is_ok() {
                written = print(&mut out, name, row);
            }
        })?;
        written?;
        failed += rows.iter().filter(|row| !row.passed).count();
        runs.push((name, backend.device(), rows));
    }
    let checked: usize = runs.iter().map(|(_, _, rows)| rows.len()).sum();
    if arguments.json {
        let runs: Vec<_> = runs
            .iter()
            .map(|(dtype, device, rows)| json!({ "dtype": dtype, "device": device, "rows": rows }))
            .collect();
        let all = json!({ "seed": seed, "checked": checked, "failed": failed, "runs": runs });
        print_json(&versioned(all));
    } else {
        writeln!(out, "{checked} outputs checked, {failed} failed")?;
    }
    Ok(if failed == 0 { Outcome::Done } else { Outcome::Different })
}

fn print(out: &mut impl Write, dtype: &str, row: &CheckRow) -> io::Result<()> {
    let verdict = match row {
        CheckRow { passed: true, .. } => "ok",
        CheckRow { repeats: false, .. } => "FAILED: a second run gave other bits",
        _ => "FAILED",
    };
    writeln!(
        out,
        "{:22} {dtype:4} {:36} {:14} {:9.2e} of {:9.2e} {verdict}",
        row.operation, row.shape, row.output, row.error, row.bound
    )
}
