//! `laam plan`: what a model asks of a machine, before it runs.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;

use clap::Args;
use clap::parser::ValueSource;
use serde_json::{Value, json};

use super::backend::BackendArgs;
use super::output::{print_json, say, stdout};
use super::{ObsoleteArgs, Outcome};
use crate::backend::Backend;
use crate::error;
use crate::model::{self, Config};
use crate::schema::versioned;
use crate::train::{Footprint, Settings, ShardKind, Share, largest_preset, measuring_bytes};

/// Say how many parameters a model has, how much arithmetic a token is, and what memory training takes.
///
/// The memory is the one a training step is given, to the byte, before it runs: nothing is
/// allocated in a step.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  laam plan models/llama2 --batch_size 8
  laam plan --preset 124m --batch_size 16 --recompute block
  laam plan --preset 1.5b --ranks 8 --shard optimizer
  laam plan --preset auto --memory 24 --batch_size auto --precision bf16
  laam plan --vocab_size 4096 --hidden_size 192 --intermediate_size 512 \\
    --num_hidden_layers 8 --num_attention_heads 6 --num_key_value_heads 6 --tie_word_embeddings")]
pub struct PlanArgs {
    /// A model folder, in place of the flags of a model's shape
    #[arg(conflicts_with_all = SHAPE)]
    model: Option<PathBuf>,
    /// A named shape: original, linux-5m, 32m, 124m, 350m, 0.5b, 1.3b, 1.5b, 7b; auto: the largest of them
    /// that trains on eight windows at a time within the memory
    #[arg(long, value_name = "NAME", conflicts_with = "model", conflicts_with_all = SHAPE)]
    preset: Option<String>,
    /// Tokens in the vocabulary
    #[arg(long, value_name = "N", default_value_t = 1 << 15)]
    vocab_size: usize,
    #[command(flatten)]
    settings: Settings,
    /// Memory in GB that auto is about [default: this machine's, or the GPU's]
    #[arg(long, value_name = "X")]
    memory: Option<f64>,
    /// Processes that train together: the plan is that of each
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Several processes")]
    ranks: usize,
    /// What each of several processes keeps a part of
    #[arg(long, value_enum, default_value_t, help_heading = "Several processes")]
    shard: ShardKind,
    /// Bus bandwidth of the exchanges in GB/s, as laam bench collectives measures it
    #[arg(long, value_name = "X", help_heading = "Several processes")]
    busbw: Option<f64>,
    #[command(flatten)]
    obsolete: ObsoleteArgs,
    #[command(flatten)]
    backend: BackendArgs,
    /// Print the result, or the error, as one JSON object on stdout
    #[arg(long)]
    json: bool,
}

/// Windows at a time that `--preset auto` makes room for.
const AUTO_PRESET_BATCH: usize = 8;

/// The flags of a model's shape.
const SHAPE: [&str; 11] = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "tie_word_embeddings",
    "rope_theta",
    "initializer_range",
];

impl PlanArgs {
    /// Sets what depends on whether the command line gave it.
    pub fn note_given(&mut self, matches: &clap::ArgMatches) {
        let heads = matches.value_source("num_key_value_heads");
        if heads != Some(ValueSource::CommandLine) {
            self.settings.set_default_key_value_heads();
        }
        // A window per slice at least.
        if matches.value_source("batch_size") != Some(ValueSource::CommandLine) {
            let slices = self.settings.dp_slices.unwrap_or(self.ranks);
            self.settings.batch_size = self.settings.batch_size.max(slices);
        }
    }
}

pub fn run(arguments: &PlanArgs) -> anyhow::Result<Outcome> {
    let mut settings = arguments.settings.clone();
    arguments.obsolete.warn();
    settings.validate_before_fit()?;
    let memory = match arguments.memory {
        Some(memory) if !(memory > 0.0 && memory < 1e9) => {
            return Err(error::invalid("memory", memory, "more than 0 and less than 1e9"));
        }
        memory => memory.map(|giga| (giga * 1e9) as u64),
    };
    let backend = arguments.backend.open_in(settings.precision)?;
    let config = match (&arguments.model, &arguments.preset) {
        (_, Some(name)) if name == "auto" => {
            let memory = memory.or_else(|| backend.memory()).unwrap_or(u64::MAX);
            let name = largest_preset(&*backend, &settings.optimizer(), AUTO_PRESET_BATCH, memory)
                .ok_or_else(|| {
                    error::config(
                        format!("no preset trains within {:.1} GB", memory as f64 / 1e9),
                        "give the flags of a smaller model",
                    )
                })?;
            say!("preset auto: {name}");
            model::preset(name)?
        }
        (_, Some(name)) => model::preset(name)?,
        (Some(folder), None) => {
            let (config, warnings) = model::load_config(folder)?;
            for warning in warnings {
                say!("warning: {warning}");
            }
            config
        }
        (None, None) => {
            settings.config(arguments.vocab_size, crate::tokenizer::Special::default())?
        }
    };
    settings.fit_batch(&*backend, &config, memory)?;
    let settings = &settings;
    let slices = settings.dp_slices.unwrap_or(arguments.ranks);
    if arguments.ranks == 0 || !slices.is_multiple_of(arguments.ranks) {
        let range = format!("a divisor of the {slices} slices of a step");
        return Err(error::invalid("ranks", arguments.ranks, range));
    }
    settings.check_slices(slices)?;
    let share = Share { slices, ranks: arguments.ranks, shard: arguments.shard };
    if arguments.json {
        let mut plan = as_json(&config, settings, &*backend, share)?;
        if let Some(busbw) = arguments.busbw {
            let sent = plan["bytes_sent_per_step"].as_f64().unwrap_or(0.0);
            plan["seconds_of_exchange"] = json!(sent / (busbw * 1e9));
        }
        print_json(&versioned(plan));
    } else {
        write!(stdout(), "{}", text(&config, settings, &*backend, share)?)?;
        if let Some(busbw) = arguments.busbw.filter(|_| share.ranks > 1) {
            let sent = footprint(&config, settings, &*backend, share)?.sent as f64;
            writeln!(stdout(), "  {:12} {:>20.6} s at {busbw} GB/s", "time", sent / (busbw * 1e9))?;
        }
    }
    Ok(Outcome::Done)
}

/// The parameters by what they are for.
struct Parts {
    embedding: u128,
    head: u128,
    blocks: u128,
    norms: u128,
}

fn parts(config: &Config) -> Parts {
    let table = config.vocab_size as u128 * config.hidden_size as u128;
    let head = if config.tie_word_embeddings { 0 } else { table };
    let blocks = config.block_matrix_parameters();
    let norms = config.parameter_count() - table - head - blocks;
    Parts { embedding: table, head, blocks, norms }
}

/// The plan as `--json` prints it.
pub fn as_json(
    config: &Config,
    settings: &Settings,
    backend: &dyn Backend,
    share: Share,
) -> anyhow::Result<Value> {
    let context = config.max_position_embeddings;
    let Parts { embedding, head, blocks, norms } = parts(config);
    let memory = footprint(config, settings, backend, share)?;
    // A validated model has fewer than 2^40 parameters: all of these fit.
    Ok(json!({
        "parameters": config.parameter_count() as u64,
        "parameters_embedding": embedding as u64,
        "parameters_head": head as u64,
        "parameters_blocks": blocks as u64,
        "parameters_norms": norms as u64,
        "context": context,
        "flops_per_token_forward": config.forward_flops(context) as u64,
        "flops_per_token_training": config.training_flops(context) as u64,
        "backend": backend.name(),
        "batch_size": settings.batch_size,
        "micro_batch_size": memory.micro_batch,
        "bytes_parameters": memory.parameters,
        "bytes_gradients": memory.gradients,
        "bytes_optimizer": memory.optimizer,
        "bytes_activations": memory.activations,
        "bytes_workspace": memory.workspace,
        "ranks": share.ranks,
        "dp_slices": share.slices,
        "shard": share.shard.name(),
        "bytes_slices": memory.slices,
        "bytes_exchange": memory.exchange,
        "bytes_measuring": memory.measuring,
        "bytes_sent_per_step": memory.sent,
        "bytes_peak": memory.peak(),
    }))
}

/// The plan as a person reads it.
pub fn text(
    config: &Config,
    settings: &Settings,
    backend: &dyn Backend,
    share: Share,
) -> anyhow::Result<String> {
    let context = config.max_position_embeddings;
    let Parts { embedding, head, blocks, norms } = parts(config);
    let all = config.parameter_count();
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(out, "{:14} {:>20}", "parameters", grouped(all));
    for (what, count) in
        [("embedding", embedding), ("head", head), ("blocks", blocks), ("norms", norms)]
    {
        let _ = if what == "head" && config.tie_word_embeddings {
            writeln!(out, "  {what:12} {:>20}", "tied")
        } else {
            let share = 100.0 * count as f64 / all as f64;
            writeln!(out, "  {what:12} {:>20}  {share:5.1}%", grouped(count))
        };
    }
    let _ = writeln!(out, "\nFLOPs per token, windows of {context}");
    let _ = writeln!(out, "  {:12} {:>20}", "forward", grouped(config.forward_flops(context)));
    let _ = writeln!(out, "  {:12} {:>20}", "training", grouped(config.training_flops(context)));
    let memory = footprint(config, settings, backend, share)?;
    let (batch, once) = (settings.batch_size, memory.micro_batch);
    let name = backend.name();
    let _ = writeln!(out, "\nbytes of training on {name}, batch {batch}, {once} windows at a time");
    for (what, bytes) in [
        ("parameters", memory.parameters),
        ("gradients", memory.gradients),
        ("optimizer", memory.optimizer),
        ("activations", memory.activations),
        ("workspace", memory.workspace),
        ("slices", memory.slices),
        ("exchange", memory.exchange),
        ("measuring", memory.measuring),
        ("peak", memory.peak()),
    ] {
        // Only of a step that is cut into slices, and of a run that measures itself.
        if share.slices > 1 && what != "measuring"
            || bytes > 0
            || !["slices", "exchange", "measuring"].contains(&what)
        {
            let _ = writeln!(out, "  {what:12} {:>20}", grouped(bytes as u128));
        }
    }
    if share.ranks > 1 {
        let _ = writeln!(
            out,
            "\nbytes that each of {} processes sends per step\n  {:12} {:>20}",
            share.ranks,
            "sent",
            grouped(memory.sent as u128)
        );
    }
    Ok(out)
}

/// The memory of a process.
fn footprint(
    config: &Config,
    settings: &Settings,
    backend: &dyn Backend,
    share: Share,
) -> anyhow::Result<Footprint> {
    let (batch, context) = (settings.batch_size, config.max_position_embeddings);
    let optimizer = settings.optimizer();
    let recompute = settings.recompute;
    let steps = Footprint::of_rank(backend, config, &optimizer, batch, context, recompute, share)?;
    Ok(Footprint { measuring: measuring_bytes(backend, config, settings), ..steps })
}

/// 4662336 as 4,662,336.
fn grouped(number: u128) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped_by_thousands() {
        let written = [0, 7, 999, 1000, 123_456, 4_662_336].map(grouped);
        assert_eq!(written, ["0", "7", "999", "1,000", "123,456", "4,662,336"]);
    }
}
