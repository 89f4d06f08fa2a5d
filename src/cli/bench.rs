//! `laam bench`: timings on this machine.

use clap::{Args, Subcommand};

use super::{Outcome, backend};
use crate::bench::step;
use crate::error::error;

/// Time what the program does, on this machine.
#[derive(Args)]
pub struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    Step(Step),
}

/// Whole training steps: forward, backward, clip, AdamW, on random tokens.
#[derive(Args)]
struct Step {
    /// The model's shape: original, 32m, 124m, 350m, 1.3b, 7b
    #[arg(long, default_value = "original")]
    preset: String,
    /// Windows a step
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    batch: u32,
    /// Tokens a window [default: the preset's]
    #[arg(long)]
    context: Option<usize>,
    /// Timed steps
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// Untimed steps before them
    #[arg(long, default_value_t = 1)]
    warmup: u32,
    #[command(flatten)]
    backend: backend::Arguments,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<Outcome> {
    match &arguments.what {
        What::Step(arguments) => time_step(arguments),
    }
}

fn time_step(arguments: &Step) -> anyhow::Result<Outcome> {
    let mut config = step::preset(&arguments.preset).ok_or_else(|| {
        error(
            format!("there is no preset {}, in --preset", arguments.preset),
            format!("use one of {}", step::PRESETS.join(", ")),
        )
    })?;
    if let Some(context) = arguments.context {
        config.max_position_embeddings = context;
    }
    config.validate()?;
    let backend = arguments.backend.open()?;
    let timing = step::time(
        &*backend,
        &arguments.preset,
        &config,
        arguments.batch as usize,
        arguments.warmup as usize,
        arguments.steps as usize,
    )?;
    if arguments.json {
        println!("{}", serde_json::to_string(&timing)?);
    } else {
        println!("{}: {} parameters, {}", timing.preset, timing.parameters, timing.device);
        println!(
            "batch {} x {}: {:.1} ms a step ({:.1} to {:.1}), {:.0} tokens/s, {} MB at most",
            timing.batch,
            timing.context,
            1e3 * timing.seconds_a_step,
            1e3 * timing.fastest,
            1e3 * timing.slowest,
            timing.tokens_a_second,
            timing.peak_bytes / 1_000_000,
        );
        for (name, seconds) in &timing.operations {
            println!(
                "  {name:24} {:9.2} ms  {:4.1}%",
                1e3 * seconds,
                100.0 * seconds / timing.seconds_a_step
            );
        }
    }
    Ok(Outcome::Done)
}
