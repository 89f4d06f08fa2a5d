//! Operations timed one by one, at the shapes of recipes and of larger models.

use serde::Serialize;

use super::check::{Case, Size, cases, operations};
use crate::backend::Backend;
use crate::error;
use crate::llama::ops::name_matches;
use crate::llama::{Cost, Op};

/// One operation at one shape.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub operation: &'static str,
    pub shape: String,
    pub dtype: &'static str,
    /// The median, and the tenth and ninetieth of a hundred.
    pub seconds: f64,
    pub p10: f64,
    pub p90: f64,
    pub gigabytes_per_second: f64,
    pub teraflops: f64,
    pub exponentials_per_second: f64,
    /// For attention: query-key pairs.
    pub pairs_per_second: Option<f64>,
    /// Whether what it touches fits into a large cache, where it finds it again.
    pub warm: bool,
}

/// Runs of each.
const RUNS: usize = 11;
/// What one run should take at least, so that starting it does not count: seconds.
const LEAST: f64 = 2e-3;
/// Three times the largest cache of a card.
const CACHE: usize = 150 << 20;

/// Times every operation whose name contains `only`, telling each row as it is known.
pub fn time(
    backend: &dyn Backend,
    only: Option<&str>,
    size: Size,
    mut tell: impl FnMut(&Row),
) -> anyhow::Result<Vec<Row>> {
    let chosen: Vec<&str> =
        operations().filter(|name| only.is_none_or(|only| name_matches(name, only))).collect();
    if chosen.is_empty() {
        return Err(error::config(
            format!("unknown operation {}", only.unwrap_or_default()),
            format!("use one of {}", operations().collect::<Vec<_>>().join(", ")),
        ));
    }
    let mut rows = Vec::new();
    for name in chosen {
        // An operation at a time: the inputs of all would not fit.
        for case in cases::grid(size, backend.compute_dtype(), 1, |other| other == name) {
            let row = one(backend, case)?;
            tell(&row);
            rows.push(row);
        }
    }
    Ok(rows)
}

fn one(backend: &dyn Backend, mut case: Case) -> anyhow::Result<Row> {
    // Of two operations (one that fills a cache) the last counts.
    let timed: Op = case.program.ops.last().expect("a case has an operation").clone();
    let cost: Cost = timed.cost(|buffer| case.program.info(buffer).len, case.layout.len);
    let first = case.seconds(backend, 1, 3)?;
    let once = first.last().copied().unwrap_or(LEAST).max(1e-7);
    let copies = ((LEAST / once).ceil() as usize).clamp(1, 200);
    case.program.ops = vec![timed.clone(); copies];
    let mut seconds: Vec<f64> = case.seconds(backend, 2, RUNS)?;
    for value in &mut seconds {
        *value /= copies as f64;
    }
    seconds.sort_by(f64::total_cmp);
    let median = seconds[RUNS / 2];
    let rate = |count: usize| count as f64 / median;
    let pairs = matches!(timed, Op::Attention(_) | Op::AttentionBackward(_));
    Ok(Row {
        operation: case.operation,
        shape: case.shape.clone(),
        dtype: backend.compute_dtype().suffix(),
        seconds: median,
        p10: seconds[RUNS / 10],
        p90: seconds[RUNS * 9 / 10],
        gigabytes_per_second: rate(cost.bytes) / 1e9,
        teraflops: rate(cost.flops) / 1e12,
        exponentials_per_second: rate(cost.exponentials),
        pairs_per_second: pairs.then(|| rate(cost.exponentials)),
        warm: cost.bytes < CACHE,
    })
}
