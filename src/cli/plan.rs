//! `laam plan`: what a model asks of a machine, before it runs.

use std::io::{self, Write};
use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::Outcome;
use super::shape::ShapeArguments;
use crate::model::{self, Config};

/// Say how many parameters a model has and how much arithmetic a token is.
#[derive(Args)]
#[command(after_help = "\
Examples:
  laam plan models/llama2
  laam plan --vocab_size 4096 --hidden_size 192 --intermediate_size 512 \\
    --num_hidden_layers 8 --num_attention_heads 6 --num_key_value_heads 6 --tie_word_embeddings")]
pub struct Arguments {
    /// A model folder, in place of the flags below
    #[arg(conflicts_with_all = ["ShapeArguments", "vocab_size"])]
    model: Option<PathBuf>,
    /// Tokens in the vocabulary
    #[arg(long, value_name = "N", default_value_t = 1 << 15)]
    vocab_size: usize,
    #[command(flatten)]
    shape: ShapeArguments,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<Outcome> {
    let config = match &arguments.model {
        Some(folder) => {
            let (config, warnings) = model::load_config(folder)?;
            for warning in warnings {
                eprintln!("warning: {warning}");
            }
            config
        }
        None => arguments.shape.config(arguments.vocab_size)?,
    };
    let mut out = io::stdout();
    if arguments.json {
        writeln!(out, "{:#}", as_json(&config))?;
    } else {
        write!(out, "{}", as_text(&config))?;
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

fn as_json(config: &Config) -> serde_json::Value {
    let context = config.max_position_embeddings;
    let Parts { embedding, head, blocks, norms } = parts(config);
    // A validated model has fewer than 2^40 parameters: all of these fit.
    json!({
        "parameters": config.parameter_count() as u64,
        "parameters_embedding": embedding as u64,
        "parameters_head": head as u64,
        "parameters_blocks": blocks as u64,
        "parameters_norms": norms as u64,
        "context": context,
        "flops_a_token_forward": config.forward_flops(context) as u64,
        "flops_a_token_training": config.training_flops(context) as u64,
    })
}

fn as_text(config: &Config) -> String {
    let context = config.max_position_embeddings;
    let Parts { embedding, head, blocks, norms } = parts(config);
    let all = config.parameter_count();
    let line = |what: &str, count: u128| {
        format!("  {what:10} {:>20}  {:5.1}%\n", grouped(count), 100.0 * count as f64 / all as f64)
    };
    let head = if config.tie_word_embeddings {
        format!("  {:10} {:>20}\n", "head", "tied")
    } else {
        line("head", head)
    };
    format!(
        "{:12} {:>20}\n{}{}{}{}\nFLOPs a token, windows of {context}\n  {:10} {:>20}\n  {:10} {:>20}\n",
        "parameters",
        grouped(all),
        line("embedding", embedding),
        head,
        line("blocks", blocks),
        line("norms", norms),
        "forward",
        grouped(config.forward_flops(context)),
        "training",
        grouped(config.training_flops(context)),
    )
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
