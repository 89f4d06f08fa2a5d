//! What the ranks of a run agree on, and what they find of each other.

use std::time::Instant;

use sha2::{Digest, Sha256};

use super::super::{Engine, Settings};
use super::{Observer, Trainer};
use crate::backend::Arena;
use crate::collective::Group;
use crate::error;

/// A rank that takes so many times the median is told of.
const SLOW_RANK: f64 = 1.2;
/// And by so many seconds, from one line of metrics to the next.
const SLOW_SECONDS: f64 = 0.5;

impl Trainer<'_> {
    /// Tells of ranks whose matmuls have other algorithms than those of rank 0: the bits of the run then depend on
    /// which rank takes which slice.
    pub(super) fn compare_matmuls(&self, observer: &mut dyn Observer) -> anyhow::Result<()> {
        let group = &self.job.group;
        if group.size() == 1 {
            return Ok(());
        }
        let all = matmul_plans(&self.engine, group)?;
        for (rank, other) in all.iter().enumerate() {
            if let Some(what) = other_matmuls(&all[0], other) {
                observer.note(&format!(
                    "warning: rank {rank} has {what} than rank 0: the bits of this run depend on its number of \
                     processes; `resume` continues with the algorithms of rank 0 where it can"
                ));
            }
        }
        Ok(())
    }

    /// The measurement that rank 0 made, by which all ranks draw, save and stop: on another processor or GPU it may
    /// differ.
    pub(super) fn of_first(&self, found: Vec<Option<bool>>) -> anyhow::Result<Vec<Option<bool>>> {
        const WORDS: [Option<bool>; 3] = [None, Some(false), Some(true)];
        let group = &self.job.group;
        if group.size() == 1 {
            return Ok(found);
        }
        let word =
            |found| WORDS.iter().position(|word| *word == found).expect("one of three") as u8;
        let mine = group.is_first().then(|| found.into_iter().map(word).collect());
        let first = group.broadcast(mine)?;
        Ok(first.into_iter().map(|word| WORDS[usize::from(word) % WORDS.len()]).collect())
    }

    /// Compares the parameters of all ranks: one that computes wrongly is named.
    pub(super) fn check_parameters(&self) -> anyhow::Result<()> {
        let group = &self.job.group;
        if group.size() == 1 {
            return Ok(());
        }
        let weights = self.engine.arena(Arena::Parameters)?;
        let hash = Sha256::digest(bytemuck::cast_slice::<f32, u8>(&weights));
        group.check_same(&hash, |rank, _, _| {
            error::group(
                format!("rank {rank} has other parameters than rank 0 after step {}", self.state.step),
                "its processor, memory or GPU computes wrongly, or differs from that of rank 0: leave \
                 it out, and continue with `resume`",
            )
        })
    }

    /// The number of ranks, and the least and most seconds that one of them waited since the last line;
    /// nothing with one rank. Tells of a rank that is slower than the others.
    pub(super) fn waits(
        &mut self,
        observer: &mut dyn Observer,
    ) -> anyhow::Result<(Option<usize>, Option<[f64; 2]>)> {
        let group = self.job.group.clone();
        if group.size() == 1 {
            return Ok((None, None));
        }
        let (began, waited, timed) = self.last_line;
        let waited = group.waited() - waited;
        let seconds = began.elapsed().as_secs_f64();
        let timed_now = self.engine.timed_seconds().unwrap_or(0.0);
        let own = [waited, seconds - waited, timed_now - timed];
        let all = group.gather_each(bytemuck::bytes_of(&own))?;
        self.last_line = (Instant::now(), group.waited(), timed_now);
        let number = |bytes: &[u8], at: usize| {
            bytes[8 * at..8 * at + 8].try_into().map_or(f64::NAN, f64::from_le_bytes)
        };
        let waits = all.iter().map(|bytes| number(bytes, 0));
        let least = waits.clone().fold(f64::INFINITY, f64::min);
        let most = waits.fold(0.0, f64::max);
        // On GPUs all ranks wait for the slowest in exchanges, and seem as busy. Of each the same runs were timed.
        let timed: Vec<f64> = all.iter().map(|bytes| number(bytes, 2)).collect();
        let most_timed = timed.iter().copied().fold(0.0, f64::max);
        let busy: Vec<f64> = if timed.iter().all(|&timed| timed > 0.0) {
            timed.iter().map(|timed| timed / most_timed * seconds).collect()
        } else {
            all.iter().map(|bytes| number(bytes, 1)).collect()
        };
        let mut sorted = busy.clone();
        sorted.sort_by(f64::total_cmp);
        let (median, slowest) = (sorted[(sorted.len() - 1) / 2], sorted[sorted.len() - 1]);
        let rank = busy.iter().position(|&seconds| seconds == slowest);
        if slowest > (SLOW_RANK * median).max(median + SLOW_SECONDS) && self.slow_rank != rank {
            self.slow_rank = rank;
            observer.note(&format!(
                "warning: rank {} is slowest, {:.2} x the median",
                rank.unwrap_or(0),
                slowest / median
            ));
        }
        Ok((Some(group.size()), Some([least, most])))
    }
}

/// The devices of ranks that have others than rank 0, in words.
pub(super) fn devices(group: &Group, own: &str) -> anyhow::Result<String> {
    let all = group.gather_each(own.as_bytes())?;
    let others = all.iter().enumerate().filter(|(_, other)| **other != all[0]);
    let others: Vec<String> = others
        .map(|(rank, other)| format!("; rank {rank} on {}", String::from_utf8_lossy(other)))
        .collect();
    Ok(others.concat())
}

/// Lets all ranks with the GPU and the cuBLASLt of rank 0 compute their matmuls with the algorithms that it chose; what
/// it has no matmul for is as the first rank that has one chose.
pub(super) fn agree_on_matmuls(
    engine: &mut Engine,
    group: &Group,
    settings: &Settings,
    windows: usize,
) -> anyhow::Result<()> {
    let batch_size = settings.batch_size;
    let mut batches = vec![batch_size.min(windows), windows % batch_size];
    if settings.hard_example_mining {
        let ordered = batch_size.div_ceil(2);
        let with_hard = |drawn: usize| drawn + drawn.min(batch_size / 2);
        batches.extend([ordered.min(windows), windows % ordered].map(with_hard));
    }
    group.agree(engine.plan_matmuls(&batches))?;
    let all = matmul_plans(engine, group)?;
    let version = |plans: &serde_json::Value| plans["cublaslt"]["version"].clone();
    let is_as_first = |plans: &serde_json::Value| {
        plans["gpu"] == all[0]["gpu"] && version(plans) == version(&all[0])
    };
    let mut agreed = Vec::new();
    for plan in all
        .iter()
        .filter(|plans| is_as_first(plans))
        .filter_map(|plans| plans["cublaslt"]["matmuls"].as_array())
        .flatten()
    {
        if !agreed.iter().any(|known: &serde_json::Value| known[0] == plan[0]) {
            agreed.push(plan.clone());
        }
    }
    let own = &all[group.rank()];
    if !agreed.is_empty() && is_as_first(own) {
        let mut plans = own.clone();
        plans["cublaslt"]["matmuls"] = agreed.into();
        // What an algorithm is refused for is told of after the first step.
        engine.restore(&serde_json::json!({ "loss_scale": null, "matmul_plans": plans }))?;
    }
    Ok(())
}

/// The matmul plans of all ranks ([`crate::device::Device::matmul_plans`]).
pub(super) fn matmul_plans(
    engine: &Engine,
    group: &Group,
) -> anyhow::Result<Vec<serde_json::Value>> {
    let own = serde_json::to_vec(&engine.state()?["matmul_plans"])?;
    let all = group.gather_each(&own)?;
    Ok(all.iter().map(|plans| serde_json::from_slice(plans)).collect::<Result<_, _>>()?)
}

/// What differs between the matmul plans of two ranks ([`crate::device::Device::matmul_plans`]).
pub(super) fn other_matmuls(
    first: &serde_json::Value,
    other: &serde_json::Value,
) -> Option<&'static str> {
    if first["gpu"] != other["gpu"] {
        return Some("another GPU");
    }
    let (first, other) = (&first["cublaslt"], &other["cublaslt"]);
    if first["version"] != other["version"] {
        return Some("another version of cuBLASLt");
    }
    let plans =
        |plans: &serde_json::Value| plans["matmuls"].as_array().cloned().unwrap_or_default();
    let first = plans(first);
    let differs = |plan: &serde_json::Value| {
        first.iter().any(|known| known[0] == plan[0] && known[1] != plan[1])
    };
    plans(other).iter().any(differs).then_some("other matmul algorithms")
}

/// Refuses slices that cannot be divided among the processes, or a batch among the slices.
pub fn check_slices(slices: usize, group: &Group, settings: &Settings) -> anyhow::Result<()> {
    let size = group.size();
    if !slices.is_multiple_of(size) {
        return Err(error::config(
            format!("the {slices} slices of a step cannot be divided among {size} processes"),
            format!(
                "start a number of processes that divides {slices}, or a new run with `dp_slices` a \
                 multiple of {size}"
            ),
        ));
    }
    settings.check_slices(slices)
}
