//! Operations timed one by one, at the shapes of recipes and of larger models.

use serde::Serialize;

use super::check::{Case, Size, cases, operations};
use crate::backend::Backend;
use crate::error;
use crate::llama::ops::name_matches;
use crate::llama::{Cost, Op};

/// One operation at one shape.
#[derive(Clone, Debug, Serialize)]
pub struct KernelTiming {
    /// Name of the op.
    pub operation: &'static str,
    /// Shape, in words.
    pub shape: String,
    /// Compute dtype.
    pub dtype: &'static str,
    /// The median, and the 10th and 90th percentile.
    pub seconds: f64,
    /// 10th percentile, in seconds.
    pub p10: f64,
    /// 90th percentile, in seconds.
    pub p90: f64,
    /// Bytes read and written per second, in units of 1e9.
    pub gigabytes_per_second: f64,
    /// FLOP per second, in units of 1e12.
    pub teraflops: f64,
    /// Exponentials per second.
    pub exponentials_per_second: f64,
    /// For attention: query-key pairs.
    pub pairs_per_second: Option<f64>,
    /// The operands fit into the largest L2 cache, which holds them from the run before.
    pub warm: bool,
}

/// Timed runs of each case.
const RUNS: usize = 11;
/// A run repeats the operation until it takes this long, so that the launch does not count.
const MIN_RUN_SECONDS: f64 = 2e-3;
/// Three times the largest L2 cache of a GPU.
const CACHE_BYTES: usize = 150 << 20;

/// Times every operation whose name contains `only`, at the shapes whose cost passes `keep`; `on_row` is
/// called for each row at once.
pub fn time(
    backend: &dyn Backend,
    only: Option<&str>,
    size: Size,
    keep: impl Fn(&Cost) -> bool,
    mut on_row: impl FnMut(&KernelTiming),
) -> anyhow::Result<Vec<KernelTiming>> {
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
        // One operation at a time: the inputs of all do not fit into memory.
        for case in cases(size, backend.compute_dtype(), 1, |other| other == name) {
            if !keep(&case_cost(&case)) {
                continue;
            }
            let row = one(backend, case)?;
            on_row(&row);
            rows.push(row);
        }
    }
    Ok(rows)
}

/// The op that a case times: the last of its operation. Others fill a KV cache before it, or sum what it
/// leaves.
fn timed(case: &Case) -> &Op {
    let mut ops = case.program.ops.iter().rev();
    ops.find(|op| op.name() == case.operation).expect("a case has an op of its operation")
}

fn case_cost(case: &Case) -> Cost {
    timed(case).cost(|buffer| case.program.info(buffer).len, case.layout.len)
}

fn one(backend: &dyn Backend, mut case: Case) -> anyhow::Result<KernelTiming> {
    let timed = timed(&case).clone();
    let cost = case_cost(&case);
    let first = seconds(&case, backend, 1, 3)?;
    let once = first.last().copied().unwrap_or(MIN_RUN_SECONDS).max(1e-7);
    let copies = ((MIN_RUN_SECONDS / once).ceil() as usize).clamp(1, 200);
    case.program.ops = vec![timed.clone(); copies];
    let mut seconds = seconds(&case, backend, 2, RUNS)?;
    for value in &mut seconds {
        *value /= copies as f64;
    }
    seconds.sort_by(f64::total_cmp);
    let median = seconds[RUNS / 2];
    let rate = |count: usize| count as f64 / median;
    let pairs = matches!(timed, Op::Attention(_) | Op::AttentionBackward(_));
    Ok(KernelTiming {
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
        warm: cost.bytes < CACHE_BYTES,
    })
}

/// Seconds of each of `runs` runs after `warmup` ones.
fn seconds(
    case: &Case,
    backend: &dyn Backend,
    warmup: usize,
    runs: usize,
) -> anyhow::Result<Vec<f64>> {
    let mut prepared = case.prepare(backend)?;
    (0..warmup).try_for_each(|_| prepared.time().map(drop))?;
    (0..runs).map(|_| prepared.time()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::Dtype;

    #[test]
    fn every_case_times_an_op_of_its_operation() {
        for case in cases(Size::Small, Dtype::F32, 0, |_| true) {
            assert_eq!(timed(&case).name(), case.operation, "{}", case.shape);
        }
    }
}
