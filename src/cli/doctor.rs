//! `laam doctor`: what this build can do on this machine.

use clap::Args;

use super::Outcome;

/// Say what was built, what this machine offers, and how to mend what is missing.
#[derive(Args)]
pub struct Arguments {}

pub fn run(_: &Arguments) -> anyhow::Result<Outcome> {
    println!("laam {}", env!("CARGO_PKG_VERSION"));
    println!("threads: {}", std::thread::available_parallelism().map_or(1, usize::from));
    Ok(Outcome::Done)
}
