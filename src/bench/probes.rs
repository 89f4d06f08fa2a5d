//! Probes of a device: what the kernels, the simulator and the predictions of step times assume of a GPU,
//! each with what was expected and what was seen. Arithmetic must be as expected; rates are only reported.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::Context;

use super::roofline::{Effort, launch, repeat};
use super::step;
use crate::backend::gpu::{Gpu, Mode, Open, Options};
use crate::device::{Address, Arg, Device, Launch, Matmul, Matrix};
use crate::dtype::Dtype;
use crate::kernels::{Kernel, families};
use crate::model::preset;

/// What a probe saw.
pub(super) struct Seen {
    pub text: String,
    pub passed: bool,
}

/// A device under test, and how to open it again.
pub(super) struct Subject<'a> {
    pub device: &'a mut dyn Device,
    pub effort: Effort,
    pub open: &'a Open,
}

/// Name, expectation, and the probe.
pub(super) struct Probe {
    pub name: &'static str,
    pub expected: &'static str,
    pub run: fn(&mut Subject) -> anyhow::Result<Seen>,
}

pub(super) const PROBES: [Probe; 8] = [
    Probe {
        name: "TF32 operands",
        expected: "truncated: (1 + 2^-11 + 2^-12) * 1 = 1",
        run: tf32_truncation,
    },
    Probe { name: "mma.sync TF32 rates", expected: "m16n8k4 at 2/3 of m16n8k8", run: tf32_rates },
    Probe {
        name: "thin weight gradients",
        expected: "about 10 us on an H100; 150 us without split-K",
        run: thin_gradients,
    },
    Probe {
        name: "graph of 1,840 nodes",
        expected: "instantiated in milliseconds, about 1 us per node",
        run: long_graph,
    },
    Probe { name: "large memset in a graph", expected: "every byte set", run: large_memset },
    Probe { name: "ex2.approx", expected: "the simulator's bits", run: ex2_bits },
    Probe { name: "same bits", expected: "eager = graphs = a second process", run: same_bits },
    Probe {
        name: "shared memory of a block",
        expected: "48 KiB less a word, 48 KiB and 99 KiB less a word of dynamic memory",
        run: shared_memory,
    },
];

fn probe(kernel: Kernel, grid: u32, block: u32, shared: usize, args: Vec<Arg>) -> Launch {
    Launch { kernel, grid: [grid, 1, 1], block: [block, 1, 1], shared: shared as u32, args }
}

/// Median seconds of a call of `work`.
fn seconds(
    device: &mut dyn Device,
    work: impl FnMut(&mut dyn Device) -> anyhow::Result<()>,
) -> anyhow::Result<f64> {
    let [_, median, _] = repeat(device, work)?;
    Ok(median)
}

/// Runs `work` with a block of uninitialized memory.
fn with_memory<T>(
    device: &mut dyn Device,
    bytes: usize,
    work: impl FnOnce(&mut dyn Device, Address) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let at = device.alloc(bytes)?;
    let result = work(device, at);
    device.free(at)?;
    result
}

fn read_u32(device: &dyn Device, at: Address, count: usize) -> anyhow::Result<Vec<u32>> {
    let mut values = vec![0; count];
    device.download(at, bytemuck::cast_slice_mut(&mut values))?;
    Ok(values)
}

fn tf32_truncation(subject: &mut Subject) -> anyhow::Result<Seen> {
    let a = 1.0 + 1.0 / 2048.0 + 1.0 / 4096.0_f32;
    let product = with_memory(subject.device, 4, |device, at| {
        launch(
            device,
            &probe(families::PROBE_TF32, 1, 32, 0, vec![at.into(), a.into(), 1.0f32.into()]),
        )?;
        Ok(f32::from_bits(read_u32(device, at, 1)?[0]))
    })?;
    Ok(Seen { text: format!("{product}"), passed: product == 1.0 })
}

fn tf32_rates(subject: &mut Subject) -> anyhow::Result<Seen> {
    let (blocks, rounds) = if subject.effort == Effort::Full { (132 * 8, 4096) } else { (1, 1) };
    let chains = 8.0 * f64::from(rounds) * f64::from(blocks * 256 / 32);
    let rates = with_memory(subject.device, 4 * 256 * blocks as usize, |device, out| {
        let mut rates = [0.0; 2];
        for (rate, (kernel, flops)) in rates.iter_mut().zip([
            (families::ROOFLINE_MMA_TF32_K8, 2048.0),
            (families::ROOFLINE_MMA_TF32_K4, 1024.0),
        ]) {
            let kernel = probe(kernel, blocks, 256, 0, vec![out.into(), rounds.into()]);
            *rate = flops * chains / seconds(device, |device| launch(device, &kernel))?;
        }
        Ok(rates)
    })?;
    let [k8, k4] = rates.map(|rate| rate / 1e12);
    Ok(Seen {
        text: format!("m16n8k8 {k8:.0}, m16n8k4 {k4:.0} TFLOP/s: {:.2}", k4 / k8),
        passed: true,
    })
}

/// A weight gradient of the original model's k projection: few outputs, a sum over 32,768 rows.
fn thin_gradients(subject: &mut Subject) -> anyhow::Result<Seen> {
    let rows = if subject.effort == Effort::Full { 32_768 } else { 256 };
    let (out, input) = (80, 64);
    let bytes = [2 * rows * out, 2 * rows * input, 4 * out * input];
    let offsets = [0, bytes[0], bytes[0] + bytes[1]];
    let time = with_memory(subject.device, bytes.iter().sum(), |device, at| {
        device.memset(at, 0, bytes.iter().sum())?;
        let matrix =
            |part: usize, dtype, rows, cols| Matrix::new(at.plus(offsets[part]), dtype, rows, cols);
        let gradient = Matmul {
            a: matrix(0, Dtype::Bf16, rows, out).t(),
            b: matrix(1, Dtype::Bf16, rows, input),
            c: matrix(2, Dtype::F32, out, input),
            accumulate: true,
            batch: 1,
        };
        seconds(device, |device| device.matmul(&gradient))
    })?;
    Ok(Seen { text: format!("{out} x {input} x {rows} in {:.1} us", 1e6 * time), passed: true })
}

/// As many nodes as eight steps of the original model have.
fn long_graph(subject: &mut Subject) -> anyhow::Result<Seen> {
    let device = &mut *subject.device;
    let nodes = 1840;
    let empty = probe(families::ROOFLINE_EMPTY, 1, 32, 0, Vec::new());
    launch(device, &empty)?;
    let start = Instant::now();
    device.begin_capture()?;
    let captured = (0..nodes).try_for_each(|_| launch(device, &empty));
    let graph = device.end_capture();
    captured?;
    let graph = graph?;
    let instantiated = start.elapsed().as_secs_f64();
    let time = seconds(device, |device| device.launch_graph(graph))?;
    Ok(Seen {
        text: format!(
            "captured and instantiated in {:.1} ms, {:.2} us per node",
            1e3 * instantiated,
            1e6 * time / f64::from(nodes)
        ),
        passed: true,
    })
}

/// More than 4 GiB, if so much is free: the gradients of a model of 1.3B parameters.
fn large_memset(subject: &mut Subject) -> anyhow::Result<Seen> {
    const BYTES: usize = 5_500_000_000;
    let (device, effort) = (&mut *subject.device, subject.effort);
    let (free, _) = device.memory()?;
    let bytes = if effort == Effort::Full { BYTES.min(free as usize / 2) } else { 1 << 20 };
    with_memory(device, bytes, |device, at| {
        device.memset(at, 1, bytes)?;
        device.begin_capture()?;
        let captured = device.memset(at, 0, bytes);
        let graph = device.end_capture();
        captured?;
        let graph = graph?;
        let time = seconds(device, |device| device.launch_graph(graph))?;
        // One byte in every MiB, and the last.
        let places = (0..bytes).step_by(1 << 20).chain([bytes - 1]);
        let mut wrong = 0;
        for place in places {
            let mut byte = [1];
            device.download(at.plus(place), &mut byte)?;
            wrong += usize::from(byte[0] != 0);
        }
        Ok(Seen {
            text: format!("{bytes} bytes in {:.1} us, {wrong} wrong", 1e6 * time),
            passed: wrong == 0,
        })
    })
}

/// 65,536 floats of every exponent, of both signs.
#[cfg(feature = "sim")]
fn ex2_bits(subject: &mut Subject) -> anyhow::Result<Seen> {
    let count = 1 << 16;
    let bits = |device: &mut dyn Device| {
        with_memory(device, 4 * count, |device, at| {
            let (first, step) = (12_345_u32, (1_u32 << 16) + 1);
            let args = vec![at.into(), first.into(), step.into()];
            launch(device, &probe(families::PROBE_EX2, count as u32 / 256, 256, 0, args))?;
            read_u32(device, at, count)
        })
    };
    let expected = bits(&mut crate::device::sim::Sim::new(ptx_race::Options::default())?)?;
    let wrong = bits(subject.device)?.iter().zip(&expected).filter(|(a, b)| a != b).count();
    Ok(Seen { text: format!("{wrong} of {count} differ"), passed: wrong == 0 })
}

#[cfg(not(feature = "sim"))]
fn ex2_bits(_: &mut Subject) -> anyhow::Result<Seen> {
    Err(error::missing_feature("sim"))
}

/// SHA-256 of a short training run.
pub fn digest(open: &Open, mode: Mode) -> anyhow::Result<String> {
    let backend = Gpu::new(open.clone(), Options { mode, ..Options::new(Dtype::Bf16) })?;
    let mut config = preset("original")?;
    config.num_hidden_layers = 1;
    config.vocab_size = 512;
    config.max_position_embeddings = 64;
    step::digest(&backend, &config, 2, 4)
}

fn same_bits(subject: &mut Subject) -> anyhow::Result<Seen> {
    let mine = [Mode::Eager, Mode::Graphs].map(|mode| digest(subject.open, mode));
    let [eager, graphs] = mine;
    let (eager, graphs) = (eager?, graphs?);
    let program = std::env::current_exe()?;
    let second = second_process(&program, subject.device.name())?;
    let passed = eager == graphs && eager == second;
    let short = |digest: &str| digest.chars().take(12).collect::<String>();
    Ok(Seen {
        text: if passed {
            format!("sha256 {} three times", short(&eager))
        } else {
            format!("sha256 {}, {}, {}", short(&eager), short(&graphs), short(&second))
        },
        passed,
    })
}

/// [`digest`] in eager mode of a process of its own.
fn second_process(program: &Path, backend: &str) -> anyhow::Result<String> {
    let output = Command::new(program)
        .args(["bench", "smoke", "--digest", "--backend", backend])
        .output()
        .with_context(|| format!("starting {}", program.display()))?;
    anyhow::ensure!(
        output.status.success(),
        "the second process failed: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_string())
}

/// The largest that a launch may take without a change of the function's limit, the first that needs one
/// because of the static word beside it, and the most that every GPU has.
fn shared_memory(subject: &mut Subject) -> anyhow::Result<Seen> {
    const WORD: usize = 4;
    let sizes = [(48 << 10) - WORD, 48 << 10, (99 << 10) - WORD];
    let mut wrong = 0;
    for bytes in sizes {
        wrong += with_memory(subject.device, WORD, |device, at| {
            let args = vec![at.into(), ((bytes / WORD) as u32).into()];
            launch(device, &probe(families::PROBE_SHARED, 1, 256, bytes, args))?;
            Ok(read_u32(device, at, 1)?[0])
        })?;
    }
    Ok(Seen { text: format!("{wrong} wrong words"), passed: wrong == 0 })
}
