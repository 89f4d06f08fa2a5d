//! Mutates inputs of every parser and runs them: `laam-fuzz SECONDS [--seed N] [TARGET...]`.
//!
//! In place of coverage, an input that ends in a way not seen before (by the text of its error, without
//! numbers) is mutated further. A panic, an input slower than ten seconds, and more than 4 GiB of memory
//! are failures; their inputs are in `fuzz-failures/`.

mod mutate;
mod targets;

use std::collections::HashSet;
use std::fs;
use std::io::{Seek, Write};
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::mutate::{Random, mutate};
use crate::targets::Target;

/// Address space of a target's process, in bytes.
const MAX_MEMORY: u64 = 4 << 30;
/// Longest time for one input.
const MAX_INPUT_TIME: Duration = Duration::from_secs(10);
/// Most inputs that are kept to be mutated.
const MAX_POOL: usize = 4096;

struct Arguments {
    seconds: f64,
    seed: u64,
    targets: Vec<String>,
    /// This process is the one that runs a target.
    is_child: bool,
}

fn arguments() -> anyhow::Result<Arguments> {
    let mut parsed = Arguments { seconds: 0.0, seed: 1, targets: Vec::new(), is_child: false };
    let mut given = std::env::args().skip(1);
    let seconds = given.next().context("usage: laam-fuzz SECONDS [--seed N] [TARGET...]")?;
    parsed.seconds = seconds.parse().context("invalid SECONDS")?;
    while let Some(argument) = given.next() {
        match argument.as_str() {
            "--seed" => parsed.seed = given.next().context("--seed N")?.parse()?,
            "--child" => parsed.is_child = true,
            name => parsed.targets.push(name.to_string()),
        }
    }
    Ok(parsed)
}

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("laam-fuzz: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run() -> anyhow::Result<bool> {
    let arguments = arguments()?;
    let folder = targets::scratch();
    let result =
        if arguments.is_child { child(&arguments, &folder) } else { parent(&arguments, &folder) };
    fs::remove_dir_all(&folder).ok();
    result
}

/// Runs each target in a process of its own, which may die.
fn parent(arguments: &Arguments, folder: &Path) -> anyhow::Result<bool> {
    let all = targets::all(folder)?;
    let chosen: Vec<&Target> = all
        .iter()
        .filter(|target| {
            arguments.targets.is_empty() || arguments.targets.iter().any(|name| name == target.name)
        })
        .collect();
    if chosen.is_empty() {
        let names: Vec<_> = all.iter().map(|target| target.name).collect();
        bail!("the targets are {}", names.join(", "));
    }
    let each = arguments.seconds / chosen.len() as f64;
    let mut passed = true;
    for target in chosen {
        let current = folder.join("current");
        let status = Command::new(std::env::current_exe()?)
            .args([
                &each.to_string(),
                "--child",
                "--seed",
                &arguments.seed.to_string(),
                target.name,
            ])
            .env("LAAM_FUZZ_CURRENT", &current)
            .status()?;
        if !status.success() {
            println!("{}: FAILED, {status}", target.name);
            if status.code() != Some(1) {
                fs::copy(&current, failures()?.join(format!("died-{}", target.name))).ok();
            }
            passed = false;
        }
    }
    Ok(passed)
}

fn failures() -> anyhow::Result<PathBuf> {
    let folder = PathBuf::from("fuzz-failures");
    fs::create_dir_all(&folder)?;
    Ok(folder)
}

fn child(arguments: &Arguments, folder: &Path) -> anyhow::Result<bool> {
    let limit = libc::rlimit { rlim_cur: MAX_MEMORY, rlim_max: MAX_MEMORY };
    // SAFETY: the struct outlives the call.
    unsafe { libc::setrlimit(libc::RLIMIT_AS, &raw const limit) };
    let all = targets::all(folder)?;
    let [name] = arguments.targets.as_slice() else { bail!("one target") };
    let target = all.iter().find(|target| target.name == name).context("no such target")?;
    // Caught panics are reported below; one that a library catches itself is not a failure.
    panic::set_hook(Box::new(|_| ()));
    let mut pool = target.seeds.clone();
    for (number, seed) in pool.iter().enumerate() {
        if let Err(error) = (target.run)(seed) {
            bail!("{name}: its own input {number} is refused: {error:#}");
        }
    }
    for entry in
        fs::read_dir(Path::new("crates/fuzz/corpus").join(name)).into_iter().flatten().flatten()
    {
        pool.push(fs::read(entry.path())?);
    }
    let seeds = pool.len();
    let mut random = Random::new(arguments.seed);
    let mut outcomes = HashSet::new();
    let (mut inputs, mut failed) = (0u64, 0);
    let mut slowest = Duration::ZERO;
    let begin = Instant::now();
    // The input under way, for the parent, if this process dies.
    let mut current =
        fs::File::create(std::env::var_os("LAAM_FUZZ_CURRENT").context("no parent")?)?;
    while begin.elapsed().as_secs_f64() < arguments.seconds || inputs < seeds as u64 {
        // The seeds first, as they are.
        let input = match pool.get(inputs as usize) {
            Some(seed) if inputs < seeds as u64 => seed.clone(),
            _ => {
                let mut input = random.pick(&pool).clone();
                mutate(&mut input, &pool, &mut random);
                input
            }
        };
        current.rewind()?;
        current.write_all(&input)?;
        current.set_len(input.len() as u64)?;
        let start = Instant::now();
        let outcome = panic::catch_unwind(AssertUnwindSafe(|| (target.run)(&input)));
        let took = start.elapsed();
        inputs += 1;
        slowest = slowest.max(took);
        let text = match &outcome {
            Ok(Ok(())) => "ok".to_string(),
            Ok(Err(error)) => {
                format!("{error:#}").chars().filter(|c| !c.is_ascii_digit()).take(60).collect()
            }
            Err(_) => "panic".to_string(),
        };
        if outcome.is_err() || took > MAX_INPUT_TIME {
            failed += 1;
            let path = failures()?.join(format!("{name}-{}-{inputs}", arguments.seed));
            fs::write(&path, &input)?;
            println!("{name}: {text} after {took:?}, {}", path.display());
            if failed >= 20 {
                break;
            }
        }
        if outcomes.len() < MAX_POOL && outcomes.insert(text) && pool.len() < MAX_POOL {
            pool.push(input);
        }
    }
    let seconds = begin.elapsed().as_secs_f64();
    println!(
        "{name}: {inputs} inputs in {seconds:.0} s, {:.0} inputs per second, {} outcomes, slowest {:.0} ms, {failed} failures",
        inputs as f64 / seconds,
        outcomes.len(),
        slowest.as_secs_f64() * 1e3
    );
    Ok(failed == 0)
}
