//! `laam completions`: what a shell needs to complete laam's commands and flags.

use std::io::Write;

use clap::Args;
use clap_complete::{Shell, generate};

use super::Outcome;
use super::output::stdout;

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
}

/// `spec` describes the whole program.
pub fn run(arguments: &CompletionsArgs, mut spec: clap::Command) -> anyhow::Result<Outcome> {
    let mut script = Vec::new();
    generate(arguments.shell, &mut spec, "laam", &mut script);
    stdout().write_all(&script)?;
    Ok(Outcome::Done)
}
