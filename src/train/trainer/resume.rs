//! Whether a checkpoint is of the same run, and how many steps the run then has.

use super::super::Settings;
use super::super::checkpoints::{self, TrainState};
use crate::collective::Group;
use crate::error;
use crate::llama::Recompute;

/// Fails on all ranks if one of them begins after another step.
pub(super) fn check_same_step(group: &Group, step: u64) -> anyhow::Result<()> {
    group.check_same(&step.to_le_bytes(), |rank, first, other| {
        let [first, other] =
            [first, other].map(|bytes| bytes.try_into().map_or(0, u64::from_le_bytes));
        error::group(
            format!("rank {rank} begins after step {other}, rank 0 after step {first}"),
            "let all hosts see the same `output_path`",
        )
    })
}

/// A resumed run equals an unbroken one only if it is the same run.
pub(super) fn check_resumable(
    saved: &checkpoints::SavedRun,
    now: &TrainState,
) -> anyhow::Result<()> {
    // How often a run logs and saves, and what it computes twice, changes no bit of the result. A run that
    // began with another model's weights has that model's shape, which earlier versions did not write into
    // its settings.
    let essence = |settings: &Settings| Settings {
        logging_steps: 1,
        save_steps: 1,
        save_total_limit: 1,
        recompute: Recompute::None,
        validation_steps: None,
        sample_steps: None,
        // Compared before.
        dp_slices: None,
        // A run may be made longer.
        max_seconds: None,
        max_steps: None,
        epochs: 1.0,
        ..settings.with_shape(&saved.config)
    };
    let (then, now_settings) = (essence(&saved.state.settings), essence(&now.settings));
    let what = if then != now_settings {
        let (then, now) = (serde_json::to_value(&then)?, serde_json::to_value(&now_settings)?);
        // A setting that is not given may have no key.
        let mut keys = [&then, &now].into_iter().filter_map(|it| it.as_object()).flatten();
        let differing = keys.find(|(key, _)| now[*key] != then[*key]);
        differing.map_or_else(String::new, |(key, _)| {
            format!("`{key}` was {}, not {}", then[key], now[key])
        })
    } else if saved.state.tokens_sha256 != now.tokens_sha256 {
        "it was trained on a different corpus or tokenizer".to_string()
    } else {
        return Ok(());
    };
    Err(error::config(
        format!("the run in {} cannot be resumed: {what}", saved.folder.display()),
        "resume with the settings it began with, or start a new run from its weights with `init_from`",
    ))
}

/// Steps of a resumed run in all: as many as it was saved with, or `now` if its settings ask for another
/// number.
pub(super) fn resumed_total(saved: &TrainState, now: u64, windows: usize) -> anyhow::Result<u64> {
    let planned = saved.settings.total_steps(windows);
    let stopped = saved.settings.stop_at_verbatim.is_some() && saved.total == saved.step;
    let counts = [saved.tokens, saved.skipped, saved.unlogged.1];
    let is_valid = saved.step <= saved.total
        && (saved.total == planned || stopped)
        && saved.hard_examples.iter().all(|&window| window < windows)
        && counts.into_iter().all(|count| count < 1 << 62)
        && [saved.best, saved.best_validation]
            .into_iter()
            .flatten()
            .all(|(_, step)| step <= saved.step);
    if !is_valid {
        return Err(error::checkpoint(
            format!(
                "invalid training state: step {} of {}, but its settings make {planned} steps",
                saved.step, saved.total
            ),
            "remove the checkpoint: `resume` then takes an older one",
        ));
    }
    if now == planned {
        return Ok(saved.total);
    }
    if now < saved.step {
        return Err(error::config(
            format!("{} steps are done, more than the {now} that are asked for", saved.step),
            "set `max_steps` or `epochs` to more",
        ));
    }
    Ok(now)
}
