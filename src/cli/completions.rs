//! `laam completions`: what a shell needs to complete laam's commands and flags.

use std::io::Write;

use clap::Args;
use clap_complete::{Shell, generate};
use serde_json::json;

use super::Outcome;
use super::output::{print_json, stdout};
use crate::schema::versioned;

/// Print the completions of a shell.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  laam completions bash > ~/.local/share/bash-completion/completions/laam
  laam completions zsh > ~/.zfunc/_laam
  laam completions fish > ~/.config/fish/completions/laam.fish")]
pub struct CompletionsArgs {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
    /// Print the result, or the error, as one JSON object on stdout
    #[arg(long)]
    json: bool,
}

/// `spec` describes the whole program.
pub fn run(arguments: &CompletionsArgs, mut spec: clap::Command) -> anyhow::Result<Outcome> {
    let mut script = Vec::new();
    generate(arguments.shell, &mut spec, "laam", &mut script);
    if arguments.json {
        let script = String::from_utf8_lossy(&script);
        print_json(&versioned(json!({"shell": arguments.shell.to_string(), "script": script})));
    } else {
        stdout().write_all(&script)?;
    }
    Ok(Outcome::Done)
}
