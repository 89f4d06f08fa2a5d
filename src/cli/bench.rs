//! `laam bench`: timings on this machine.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::Outcome;
use super::backend::{BackendArgs, BackendKind};
use super::bench_page::{self, PageArgs};
use super::group::GroupArgs;
use super::output::{print_json, say, stdout};
use crate::backend::Backend;
use crate::backend::gpu::Mode;
use crate::bench::check::Size;
use crate::bench::roofline::{self, Ceiling, Effort};
use crate::bench::step::{self, TimedSteps};
use crate::bench::{collectives, kernels, probes, smoke};
use crate::device::Device;
use crate::dtype::Dtype;
use crate::error;
use crate::llama::Muon;
use crate::model::{Config, preset};
use crate::schema::versioned;
use crate::tokenizer::Tokenizer;
use crate::tokens::{TokenFile, WindowKind, Windows};
use crate::train::{OptimizerKind, Parallelism};

/// Time what the program does, on this machine.
///
/// Without a subcommand: whole steps, PyTorch beside them if it is found, kernels and the device's roofline, on
/// one page in some five minutes.
#[derive(Args, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub struct BenchArgs {
    #[command(subcommand)]
    what: Option<BenchCommand>,
    #[command(flatten)]
    page: PageArgs,
}

#[derive(Subcommand, Debug)]
enum BenchCommand {
    Collectives(CollectivesArgs),
    /// Peak rates that the device reaches: copies, matmuls, launches
    #[command(alias = "ceilings")]
    Roofline(DeviceBenchArgs),
    Kernels(KernelBenchArgs),
    Smoke(SmokeArgs),
    Step(StepBenchArgs),
}

/// Exchanges between processes, each checked: mpiexec -n 4 laam bench collectives.
///
/// algbw and busbw are defined as in nccl-tests. reduce is an all_to_all followed by this program's fixed-order sum,
/// all_reduce that and an all_gather, as in a training step.
#[derive(Args, Debug)]
struct CollectivesArgs {
    /// Smallest buffer in bytes
    #[arg(long, value_name = "N", default_value_t = 1 << 12)]
    min_bytes: usize,
    /// Largest buffer in bytes
    #[arg(long, value_name = "N", default_value_t = 1 << 26)]
    max_bytes: usize,
    /// Times that each is measured; the fastest counts
    #[arg(long, value_name = "N", default_value_t = 5)]
    rounds: usize,
    /// Also the MPI library's own all-reduce, whose order of sums is its own
    #[arg(long)]
    native: bool,
    /// Between the memory of GPUs (cuda) or of simulated ones (sim), not of the hosts
    #[arg(long, value_enum)]
    backend: Option<BackendKind>,
    #[command(flatten)]
    group: GroupArgs,
    /// Print the result, or the error, as one JSON object on stdout
    #[arg(long)]
    json: bool,
}

#[derive(Args, Debug)]
struct DeviceBenchArgs {
    #[command(flatten)]
    backend: BackendArgs,
    /// Print the result, or the error, as one JSON object on stdout
    #[arg(long)]
    json: bool,
}

/// Whether the device does what training needs, and probes of what the kernels assume of it.
#[derive(Args, Debug)]
struct SmokeArgs {
    #[command(flatten)]
    device: DeviceBenchArgs,
    /// Little work in the probes: to see that they run
    #[arg(long)]
    small: bool,
    /// Only print the hash of a short training run, as a second process does for the probe of equal bits
    #[arg(long, hide = true)]
    digest: bool,
}

/// Every operation by itself, at the shapes of recipes and of larger models.
#[derive(Args, Debug)]
struct KernelBenchArgs {
    /// Only operations whose names contain this
    #[arg(long)]
    only: Option<String>,
    /// The precision of activations [default: bfloat16 on an NVIDIA GPU, else float32]
    #[arg(long, value_enum)]
    precision: Option<Dtype>,
    /// Small shapes: to see that it runs
    #[arg(long)]
    small: bool,
    #[command(flatten)]
    backend: BackendArgs,
    /// Print the result, or the error, as one JSON object on stdout
    #[arg(long)]
    json: bool,
}

/// Whole training steps: forward, backward, clipping and the optimizer, on random tokens.
#[derive(Args, Debug)]
struct StepBenchArgs {
    /// The model's shape: original, linux-5m, 32m, 124m, 350m, 0.5b, 1.3b, 1.5b, 7b
    #[arg(long, default_value = "original")]
    preset: String,
    /// Windows per step
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    batch: u32,
    /// Tokens per window [default: the preset's]
    #[arg(long)]
    context: Option<usize>,
    /// Timed steps
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// Untimed steps before them
    #[arg(long, default_value_t = 1)]
    warmup: u32,
    /// The precision of activations, where the backend offers several [default: bfloat16 on an
    /// NVIDIA GPU, else float32]
    #[arg(long, value_enum)]
    precision: Option<Dtype>,
    /// Optimizer of the matrices inside the blocks
    #[arg(long, value_enum, default_value_t)]
    optimizer: OptimizerKind,
    /// Draw the windows from this token file, as training does [default: random tokens from the host]
    #[arg(long, value_name = "FILE", requires = "tokenizer_path", conflicts_with = "ranks")]
    tokens: Option<PathBuf>,
    /// The tokenizer of the token file
    #[arg(long, value_name = "DIR", requires = "tokens")]
    tokenizer_path: Option<PathBuf>,
    /// Scaling efficiency: time the processes of a launcher or of --gpus beside one process: mpiexec -n 4 laam bench
    /// step --ranks
    #[arg(long)]
    ranks: bool,
    #[command(flatten)]
    group: GroupArgs,
    /// Time every operation on a GPU, which takes the step apart: slower as a whole
    #[arg(long)]
    profile: bool,
    #[command(flatten)]
    backend: BackendArgs,
    /// Print the result, or the error, as one JSON object on stdout
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: &BenchArgs) -> anyhow::Result<Outcome> {
    match &arguments.what {
        Some(BenchCommand::Collectives(arguments)) => time_collectives(arguments),
        None => bench_page::run(&arguments.page),
        Some(BenchCommand::Roofline(arguments)) => roofline(arguments),
        Some(BenchCommand::Kernels(arguments)) => time_kernels(arguments),
        Some(BenchCommand::Smoke(arguments)) => run_smoke(arguments),
        Some(BenchCommand::Step(arguments)) => time_step(arguments),
    }
}

fn time_scaling(arguments: &StepBenchArgs, config: &Config) -> anyhow::Result<Outcome> {
    let group = arguments.group.join()?;
    let ranks = group.size();
    let batch = arguments.batch as usize;
    if !batch.is_multiple_of(ranks) {
        let range = format!("a multiple of the {ranks} processes");
        return Err(error::invalid("batch", batch, range));
    }
    let backend = arguments.backend.open_for(arguments.precision, false)?;
    let scaling = step::time_scaling(&*backend, arguments.timed(config), &group)?;
    let table = Table::new(arguments.json);
    let library = &group.world().library;
    table.line(format_args!("{}: {ranks} processes, {library}", arguments.preset));
    for (name, windows, rate, efficiency) in [
        ("one process", batch, scaling.alone, 1.0),
        ("all, as many windows", batch, scaling.strong, scaling.strong_efficiency),
        ("all, as many each", ranks * batch, scaling.weak, scaling.weak_efficiency),
    ] {
        table.line(format_args!(
            "{name:22} {windows:>6} windows {rate:>12.0} tokens/s, efficiency {efficiency:.2}"
        ));
    }
    table.finish(json!({ "preset": arguments.preset, "batch": batch, "scaling": scaling }));
    Ok(Outcome::Done)
}

fn time_collectives(arguments: &CollectivesArgs) -> anyhow::Result<Outcome> {
    if arguments.min_bytes < 4
        || arguments.min_bytes > arguments.max_bytes
        || arguments.max_bytes > 1 << 30
    {
        return Err(error::config(
            format!("invalid sizes: {} to {} bytes", arguments.min_bytes, arguments.max_bytes),
            "set `min_bytes` to at least 4, and `max_bytes` to at least that and at most 1073741824",
        ));
    }
    let group = arguments.group.join()?;
    let world = group.world();
    let table = Table::new(arguments.json);
    let open = |backend| {
        let mut device = BackendArgs { backend, ..BackendArgs::default() }.device()?;
        device.join(group.clone())?;
        anyhow::Ok(device)
    };
    let mut device = group.agree(arguments.backend.map(open).transpose())?;
    let library = device.as_ref().map_or(world.library.clone(), |device| device.exchanges());
    table.line(format_args!("{} processes, {library}", world.size));
    table.line(format_args!(
        "{:>12} {:>12}  {:18} {:>12} {:>12} {:>12}",
        "bytes", "count", "exchange", "time us", "algbw GB/s", "busbw GB/s"
    ));
    let mut rows = Vec::new();
    let mut bytes = arguments.min_bytes;
    while bytes <= arguments.max_bytes {
        let timings = match &mut device {
            Some(device) => collectives::time_on_devices(&mut **device, bytes, arguments.rounds)?,
            None => collectives::time(&group, bytes, arguments.rounds, arguments.native)?,
        };
        for timing in timings {
            let [algbw, busbw] = [timing.algbw, timing.busbw].map(|rate| rate / 1e9);
            table.line(format_args!(
                "{:>12} {:>12}  {:18} {:>12.1} {algbw:>12.3} {busbw:>12.3}",
                timing.bytes,
                timing.count,
                timing.name,
                timing.seconds * 1e6
            ));
            rows.push(json!({
                "exchange": timing.name,
                "bytes": timing.bytes,
                "count": timing.count,
                "time_us": timing.seconds * 1e6,
                "algbw": algbw,
                "busbw": busbw,
                "correct": true,
            }));
        }
        bytes *= 4;
    }
    table.finish(json!({ "ranks": world.size, "library": library, "collectives": rows }));
    Ok(Outcome::Done)
}

/// Lines of a table as they come.
struct Table {
    /// True if JSON is wanted instead.
    silent: bool,
}

impl Table {
    fn new(json: bool) -> Table {
        Table { silent: json }
    }

    fn line(&self, line: std::fmt::Arguments) {
        if !self.silent {
            // It always succeeds.
            let _ = writeln!(stdout(), "{line}");
        }
    }

    /// All of it as JSON, where that is wanted.
    fn finish(self, json: Value) {
        if self.silent {
            print_json(&versioned(json));
        }
    }
}

/// The simulator's times mean nothing.
fn effort_of(device: &dyn Device, small: bool) -> Effort {
    if small || device.name() == "sim" { Effort::Small } else { Effort::Full }
}

fn roofline(arguments: &DeviceBenchArgs) -> anyhow::Result<Outcome> {
    let mut device = arguments.backend.device()?;
    let effort = effort_of(&*device, false);
    say!("{}", device.describe());
    let table = Table::new(arguments.json);
    let found = roofline::measure(&mut *device, effort, |ceiling| {
        let Ceiling { name, value, unit, .. } = ceiling;
        table.line(format_args!("{name:24} {value:10.2} {unit}"));
    })?;
    table.finish(json!({ "device": device.describe(), "roofline": found }));
    Ok(Outcome::Done)
}

fn run_smoke(arguments: &SmokeArgs) -> anyhow::Result<Outcome> {
    let DeviceBenchArgs { backend, json: as_json } = &arguments.device;
    let open = backend.open_device();
    if arguments.digest {
        // It always succeeds.
        let _ = writeln!(stdout(), "{}", probes::digest(&open, Mode::Eager)?);
        return Ok(Outcome::Done);
    }
    let mut device: Box<dyn Device> = backend.device()?;
    say!("{}", device.describe());
    let table = Table::new(*as_json);
    let effort = effort_of(&*device, arguments.small);
    let steps = smoke::smoke(&mut *device, &open, effort, |step| {
        let verdict = if step.passed { "ok" } else { "FAILED" };
        let expected =
            step.expected.map_or(String::new(), |expected| format!(" (expected: {expected})"));
        table.line(format_args!("{:28} {verdict:6} {}{expected}", step.name, step.detail));
    });
    table.finish(json!({ "device": device.describe(), "steps": steps }));
    let passed = steps.iter().all(|step| step.passed);
    Ok(if passed { Outcome::Done } else { Outcome::Different })
}

/// Warns if a backend computes in another precision than it was asked for.
pub fn warn_of_another(backend: &dyn Backend, precision: Option<Dtype>) {
    let dtype = backend.compute_dtype().name();
    if let Some(precision) = precision.filter(|precision| precision.name() != dtype) {
        say!("warning: this backend computes in {dtype}, not in {}", precision.name());
    }
}

fn time_kernels(arguments: &KernelBenchArgs) -> anyhow::Result<Outcome> {
    let backend = arguments.backend.open_in(arguments.precision)?;
    warn_of_another(&*backend, arguments.precision);
    let size = if arguments.small { Size::Small } else { Size::Timed };
    say!("{}", backend.device());
    let table = Table::new(arguments.json);
    table.line(format_args!(
        "{:22} {:4} {:36} {:>10} {:>19} {:>8} {:>8} {:>9}",
        "operation", "type", "shape", "us", "p10 to p90", "GB/s", "TFLOP/s", "Gpairs/s"
    ));
    let rows = kernels::time(
        &*backend,
        arguments.only.as_deref(),
        size,
        |_| true,
        |row| {
            let pairs =
                row.pairs_per_second.map_or(String::new(), |pairs| format!("{:.1}", pairs / 1e9));
            table.line(format_args!(
                "{:22} {:4} {:36} {:10.2} {:9.2} {:9.2} {:8.1} {:8.2} {pairs:>9}{}",
                row.operation,
                row.dtype,
                row.shape,
                1e6 * row.seconds,
                1e6 * row.p10,
                1e6 * row.p90,
                row.gigabytes_per_second,
                row.teraflops,
                if row.warm { "  warm" } else { "" },
            ));
        },
    )?;
    table.finish(json!({ "device": backend.device(), "rows": rows }));
    Ok(Outcome::Done)
}

impl StepBenchArgs {
    /// What is timed, on random tokens.
    fn timed<'a>(&'a self, config: &'a Config) -> TimedSteps<'a> {
        TimedSteps {
            preset: &self.preset,
            config,
            muon: (self.optimizer == OptimizerKind::Muon).then_some(Muon { momentum: 0.95 }),
            batch: self.batch as usize,
            warmup: self.warmup as usize,
            steps: self.steps as usize,
            windows: None,
        }
    }
}

fn time_step(arguments: &StepBenchArgs) -> anyhow::Result<Outcome> {
    let mut config = preset(&arguments.preset)?;
    if let Some(context) = arguments.context {
        config.max_position_embeddings = context;
    }
    config.validate()?;
    if arguments.ranks || arguments.group.starts_processes() {
        return time_scaling(arguments, &config);
    }
    let windows = match (&arguments.tokens, &arguments.tokenizer_path) {
        (Some(tokens), Some(tokenizer)) => {
            let file = Arc::new(TokenFile::open(tokens)?);
            file.check_fits(config.vocab_size)?;
            let (tokenizer, context) =
                (Tokenizer::load(tokenizer)?, config.max_position_embeddings);
            Some(Windows::new(file, Arc::new(tokenizer), WindowKind::Stream, context, None)?)
        }
        _ => None,
    };
    let backend = arguments.backend.open_for(arguments.precision, arguments.profile)?;
    warn_of_another(&*backend, arguments.precision);
    // The floor of a step is made of what this GPU reaches.
    let ceilings = if backend.name() == "cuda" {
        let found = roofline::measure(&mut *arguments.backend.device()?, Effort::Full, |_| {})?;
        step::Ceilings::of(&found)
    } else {
        None
    };
    let timed = TimedSteps { windows: windows.as_ref(), ..arguments.timed(&config) };
    let timing = step::time(&*backend, timed, ceilings, &Parallelism::default())?;
    let table = Table::new(arguments.json);
    table.line(format_args!(
        "{}: {} parameters, {}",
        timing.preset, timing.parameters, timing.device
    ));
    table.line(format_args!(
        "batch {} x {}: {:.2} ms per step ({:.2} to {:.2}), {:.0} tokens/s, {:.2} TFLOP/s, {} MB of main \
         memory at most",
        timing.batch,
        timing.context,
        1e3 * timing.step_seconds,
        1e3 * timing.fastest,
        1e3 * timing.slowest,
        timing.tokens_per_second,
        timing.teraflops,
        timing.peak_bytes / 1_000_000,
    ));
    if backend.name() != "cpu" {
        let mfu = timing.mfu.map_or(String::new(), |mfu| format!(", MFU {:.1}%", 100.0 * mfu));
        let floor = timing.floor.map_or(String::new(), |floor| {
            let share = 100.0 * floor / timing.step_seconds;
            format!(", {share:.0}% of the roofline ({:.3} ms)", 1e3 * floor)
        });
        let megabytes = timing.model_bytes / 1_000_000;
        table.line(format_args!("{megabytes} MB of the device's memory{mfu}{floor}"));
    }
    for (name, seconds) in &timing.operations {
        let share = 100.0 * seconds / timing.step_seconds;
        table.line(format_args!("  {name:24} {:9.3} ms  {share:4.1}%", 1e3 * seconds));
    }
    table.finish(serde_json::to_value(&timing)?);
    Ok(Outcome::Done)
}
