//! `laam bench` without a subcommand: everything that matters about this machine, on one page.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use serde_json::Value;

use super::Outcome;
use super::backend::BackendArgs;
use super::output::{print_json, say};
use crate::backend::Backend;
use crate::bench::check::Size;
use crate::bench::kernels;
use crate::bench::page::{Page, Prediction, StepRow, file_name};
use crate::bench::pytorch::PyTorch;
use crate::bench::roofline::{self, Effort};
use crate::bench::step::{self, TimedSteps};
use crate::corpus::now;
use crate::files::{self, write_atomically};
use crate::llama::{Cost, Muon, Recompute};
use crate::model::preset;
use crate::output::refuse_foreign;
use crate::report;
use crate::schema::versioned;
use crate::train::{Parallelism, Share, Workload};

/// Measures of this machine, in some five minutes.
#[derive(Args, Debug)]
pub struct PageArgs {
    /// The folder the page is written into, as Markdown, HTML and JSON, named after the device
    #[arg(long, value_name = "DIR", default_value = "benchmarks")]
    output: PathBuf,
    /// The Python whose PyTorch is measured beside laam [default: VIRTUAL_ENV's, else python3]
    #[arg(long, value_name = "PROGRAM")]
    python: Option<PathBuf>,
    /// The ways that PyTorch runs a step: each compiled model takes a minute [default: all on a GPU, eager on
    /// a CPU]
    #[arg(long, value_name = "WAYS", value_delimiter = ',')]
    pytorch: Option<Vec<How>>,
    /// Small shapes: to see that it runs
    #[arg(long)]
    small: bool,
    #[command(flatten)]
    backend: BackendArgs,
    /// Print the result, or the error, as one JSON object on stdout
    #[arg(long)]
    json: bool,
}

/// The way that PyTorch runs a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum How {
    /// Operation by operation
    Eager,
    /// torch.compile
    Compile,
    /// The whole step as one CUDA graph
    Graph,
}

impl How {
    /// What `benches/pytorch/step.py --how` takes.
    fn name(self) -> &'static str {
        match self {
            How::Eager => "eager",
            How::Compile => "compile",
            How::Graph => "graph",
        }
    }
}

/// A step to be timed.
struct Shape {
    preset: &'static str,
    batch: usize,
    muon: bool,
}

const fn shape(preset: &'static str, batch: usize, muon: bool) -> Shape {
    Shape { preset, batch, muon }
}

/// The recipes' steps, and those that others publish figures of.
const ON_GPU: [Shape; 6] = [
    shape("original", 64, false),
    shape("original", 1, false),
    shape("linux-5m", 16, true),
    shape("124m", 16, false),
    shape("0.5b", 16, false),
    shape("1.5b", 16, false),
];
const ON_CPU: [Shape; 4] = [
    shape("original", 8, false),
    shape("original", 1, false),
    shape("linux-5m", 16, true),
    shape("32m", 1, false),
];

pub fn run(arguments: &PageArgs) -> anyhow::Result<Outcome> {
    let began = Instant::now();
    let backend = arguments.backend.open_in(None)?;
    let is_cpu = backend.name() == "cpu";
    let device = match cpu_model().filter(|_| is_cpu) {
        Some(model) => format!("{model}: {}", backend.device()),
        None => backend.device(),
    };
    say!("{device}");
    let mut page =
        Page { device, program: crate::VERSION.to_string(), date: now(), ..Page::default() };
    let base = arguments.output.join(file_name(&page.device));
    check_own(&base)?;

    if !is_cpu {
        let effort = if arguments.small { Effort::Small } else { Effort::Full };
        page.ceilings = roofline::measure(&mut *arguments.backend.device()?, effort, |_| ())?;
    }
    let mut skipped = Vec::new();
    let shapes: &[Shape] = match (arguments.small, is_cpu) {
        (true, _) => &[shape("original", 1, false)],
        (false, true) => &ON_CPU,
        (false, false) => &ON_GPU,
    };
    for shape in shapes {
        match measure_step(arguments, &*backend, &page, shape) {
            Ok(row) => {
                say!(
                    "{} x {}: {:.0} tokens/s",
                    shape.preset,
                    row.laam.batch,
                    row.laam.tokens_per_second
                );
                page.steps.push(row);
            }
            // What does not fit is said, and the rest measured.
            Err(error) => skipped.push(format!("{} x {}: {error:#}", shape.preset, shape.batch)),
        }
        write(&base, &page)?;
    }
    page.notes.append(&mut skipped);

    // Minutes of a CPU each.
    let cheap = |cost: &Cost| !is_cpu || (cost.flops < 1 << 31 && cost.bytes < 100 << 20);
    let size = if arguments.small { Size::Small } else { Size::Timed };
    page.kernels = kernels::time(&*backend, None, size, cheap, |_| ())?;
    write(&base, &page)?;
    if is_cpu {
        page.notes
            .push("Kernels of more than 2 GFLOP or 100 MB are left out on a CPU.".to_string());
    }
    measure_pytorch(arguments, is_cpu, began, &base, &mut page)?;
    let json = write(&base, &page)?;
    say!("written to {}.md, .html and .json", base.display());
    if arguments.json {
        print_json(&json);
    }
    Ok(Outcome::Done)
}

fn measure_step(
    arguments: &PageArgs,
    backend: &dyn Backend,
    page: &Page,
    shape: &Shape,
) -> anyhow::Result<StepRow> {
    let mut config = preset(shape.preset)?;
    if arguments.small {
        config.max_position_embeddings = 32;
    }
    let (warmup, steps) = match (arguments.small, backend.name()) {
        (true, _) => (0, 1),
        (false, "cpu") => (1, 3),
        (false, _) => (5, 20),
    };
    let muon = shape.muon.then_some(Muon { momentum: 0.95 });
    let (optimizer, recompute) = (&step::optimizer(muon), Recompute::None);
    let workload = Workload { backend, config: &config, optimizer, recompute, share: Share::WHOLE };
    // As many windows as others publish figures of, or as many of them as this device has memory for.
    let memory = backend.memory().unwrap_or(u64::MAX);
    let context = config.max_position_embeddings;
    let batch = workload.largest_batch(context, Some(shape.batch), memory)?;
    let ceilings = step::Ceilings::of(&page.ceilings);
    let timed = TimedSteps {
        preset: shape.preset,
        config: &config,
        muon,
        batch,
        warmup,
        steps,
        windows: None,
    };
    let laam = step::time(backend, timed, ceilings, &Parallelism::default())?;
    let predicted = Prediction::of(&laam);
    let optimizer = if shape.muon { "Muon" } else { "AdamW" };
    Ok(StepRow { laam, optimizer, pytorch: Vec::new(), predicted })
}

/// After this, PyTorch is not measured in further ways unless they were asked for.
const MAX_DURATION: Duration = Duration::from_mins(4);

/// Measures PyTorch at the steps with AdamW, if it is found, one way after another: compiling takes it a minute
/// per model.
fn measure_pytorch(
    arguments: &PageArgs,
    is_cpu: bool,
    began: Instant,
    base: &Path,
    page: &mut Page,
) -> anyhow::Result<()> {
    if arguments.small {
        return Ok(());
    }
    let environment =
        std::env::var_os("VIRTUAL_ENV").map(|path| PathBuf::from(path).join("bin/python"));
    let python = arguments.python.clone().or(environment.filter(|python| python.is_file()));
    let python = python.unwrap_or_else(|| PathBuf::from("python3"));
    let folder = std::env::temp_dir().join(format!("laam-bench-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let hows: &[How] = match (&arguments.pytorch, is_cpu) {
        (Some(hows), _) => hows,
        (None, true) => &[How::Eager],
        (None, false) => &[How::Graph, How::Eager, How::Compile],
    };
    match PyTorch::find(&python, &folder, !is_cpu) {
        Err(why) => page.notes.push(why),
        Ok(pytorch) => {
            let threads = arguments.backend.threads();
            let mut left_out = Vec::new();
            let rows = page.steps.iter().enumerate().filter(|(_, row)| row.optimizer == "AdamW");
            let rows: Vec<usize> = rows.map(|(at, _)| at).collect();
            for (how, at) in
                hows.iter().flat_map(|how| rows.iter().map(move |&at| (how.name(), at)))
            {
                let laam = &page.steps[at].laam;
                let what = format!("{how}, {} x {}", laam.preset, laam.batch);
                if arguments.pytorch.is_none() && began.elapsed() > MAX_DURATION {
                    left_out.push(what);
                    continue;
                }
                match pytorch.tokens_per_second(laam, how, threads) {
                    Ok(speed) => {
                        say!("PyTorch, {what}: {speed:.0} tokens/s");
                        page.steps[at].pytorch.push((how.to_string(), speed));
                    }
                    Err(why) => page.notes.push(format!("PyTorch, {what}: {why}")),
                }
                write(base, page)?;
            }
            if !left_out.is_empty() {
                page.notes.push(format!(
                    "PyTorch was not measured after {} minutes (--pytorch eager,compile,graph takes the time \
                     it needs): {}",
                    MAX_DURATION.as_secs() / 60,
                    left_out.join("; ")
                ));
            }
        }
    }
    std::fs::remove_dir_all(&folder)?;
    Ok(())
}

/// Larger files are not a page's.
const MAX_PAGE_BYTES: u64 = 64 << 20;

fn path(base: &Path, extension: &str) -> PathBuf {
    PathBuf::from(format!("{}.{extension}", base.display()))
}

/// Refuses to replace files that are not those of an earlier page, whose JSON is known by its fields.
fn check_own(base: &Path) -> anyhow::Result<()> {
    let json = files::read(&path(base, "json"), MAX_PAGE_BYTES).unwrap_or_default();
    let json: Value = serde_json::from_slice(&json).unwrap_or_default();
    if json["schema_version"].is_u64() && json["device"].is_string() {
        return Ok(());
    }
    let paths = ["json", "html", "md"].map(|extension| path(base, extension));
    let there = paths.into_iter().filter(|path| path.symlink_metadata().is_ok());
    refuse_foreign(&there.collect::<Vec<_>>())
}

/// Writes the page as it is so far: an interruption leaves what was measured.
fn write(base: &Path, page: &Page) -> anyhow::Result<Value> {
    let json = versioned(page.json());
    let path = |extension: &str| path(base, extension);
    write_atomically(&path("json"), format!("{json:#}\n").as_bytes())?;
    write_atomically(&path("html"), report::bench::page(&json).as_bytes())?;
    write_atomically(&path("md"), page.markdown().as_bytes())?;
    Ok(json)
}

/// The processor's name, if the system tells it (Linux on x86).
fn cpu_model() -> Option<String> {
    let text = files::read_text(Path::new("/proc/cpuinfo"), 16 << 20).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("model name"))?;
    Some(line.trim_start_matches([' ', '\t', ':']).to_string())
}
