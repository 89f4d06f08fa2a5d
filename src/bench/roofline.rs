//! Roofline of a device: memory bandwidth, matmul and instruction throughput, launch latency, measured
//! on the same GPU in the same run as the timings that are given as shares of them.

use serde::Serialize;

use crate::device::{Arg, Device, Launch, Matmul, Matrix};
use crate::dtype::Dtype;
use crate::kernels::{Kernel, families};

/// One measured limit of the device.
#[derive(Clone, Debug, Serialize)]
pub struct Ceiling {
    /// Name of the rate.
    pub name: &'static str,
    /// Measured rate, in `unit`.
    pub value: f64,
    /// Unit of the rate.
    pub unit: &'static str,
    /// Seconds of one repetition: minimum, median, maximum.
    pub seconds: [f64; 3],
}

/// Amount of work: for a GPU or for the simulator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effort {
    /// Fills any GPU for milliseconds.
    Full,
    /// Runs every measurement; its values mean nothing.
    Small,
}

const REPETITIONS: usize = 15;

/// Launches a kernel of `roofline.cu`, `probe.cu` or `fill.cu`.
pub(super) fn launch(device: &mut dyn Device, launch: &Launch) -> anyhow::Result<()> {
    // SAFETY: these kernels access device memory at their first argument alone: four bytes per thread, or
    // as many as their last argument counts. The callers, all in `bench`, allocate that much.
    unsafe { device.launch(launch) }
}

/// Measures every limit; `on_ceiling` is called for each at once.
pub fn measure(
    device: &mut dyn Device,
    effort: Effort,
    mut on_ceiling: impl FnMut(&Ceiling),
) -> anyhow::Result<Vec<Ceiling>> {
    let full = effort == Effort::Full;
    let mut found = Vec::new();
    let mut add = |ceiling: Ceiling| {
        on_ceiling(&ceiling);
        found.push(ceiling);
    };

    let bytes = if full { 1 << 30 } else { 1 << 16 };
    let (from, to) = (device.alloc(bytes)?, device.alloc(bytes)?);
    device.memset(from, 1, bytes)?;
    device.memset(to, 2, bytes)?;
    let seconds = repeat(device, |device| device.copy(from, to, bytes))?;
    add(rate("copy", 2.0 * bytes as f64 / 1e9, "GB/s", seconds));
    let seconds = repeat(device, |device| device.memset(to, 0, bytes))?;
    add(rate("fill", bytes as f64 / 1e9, "GB/s", seconds));

    // Random data: a GPU runs faster on constant data.
    let side = if full { 8192 } else { 64 };
    let noise: Vec<u8> = noise(2 * side * side);
    device.upload(from, &noise)?;
    device.upload(to, &noise)?;
    let out = device.alloc(4 * side * side)?;
    let matrix = |at, dtype| Matrix::new(at, dtype, side, side);
    let flops = 2.0 * (side as f64).powi(3);
    for (name, c) in [("matmul, bf16", Dtype::Bf16), ("matmul, bf16 to f32", Dtype::F32)] {
        let (a, b) = (matrix(from, Dtype::Bf16), matrix(to, Dtype::Bf16).t());
        let product = Matmul { a, b, c: matrix(out, c), accumulate: false, batch: 1 };
        let seconds = repeat(device, |device| device.matmul(&product))?;
        add(rate(name, flops / 1e12, "TFLOP/s", seconds));
    }

    let (blocks, rounds) = if full { (132 * 8, 4096) } else { (2, 4) };
    let threads = 256;
    let with = |kernel: Kernel, rounds: i32| Launch {
        kernel,
        grid: [blocks, 1, 1],
        block: [threads, 1, 1],
        shared: 0,
        args: vec![out.into(), Arg::I32(rounds)],
    };
    let links = 8.0 * f64::from(rounds) * f64::from(blocks) * f64::from(threads);
    for (name, kernel, work, unit) in [
        ("ex2.approx", families::ROOFLINE_EX2, links / 1e12, "T/s"),
        ("fma, f32", families::ROOFLINE_FMA, 2.0 * links / 1e12, "TFLOP/s"),
        ("mma.sync m16n8k16 bf16", families::ROOFLINE_MMA, links / 32.0 * 4096.0 / 1e12, "TFLOP/s"),
        (
            "mma.sync m16n8k8 TF32",
            families::ROOFLINE_MMA_TF32_K8,
            links / 32.0 * 2048.0 / 1e12,
            "TFLOP/s",
        ),
        (
            "mma.sync m16n8k4 TF32",
            families::ROOFLINE_MMA_TF32_K4,
            links / 32.0 * 1024.0 / 1e12,
            "TFLOP/s",
        ),
    ] {
        let kernel = with(kernel, rounds);
        let seconds = repeat(device, |device| launch(device, &kernel))?;
        add(rate(name, work, unit, seconds));
    }

    let barriers = with(families::ROOFLINE_BARRIER, rounds);
    let seconds = repeat(device, |device| launch(device, &barriers))?;
    add(time("barrier of 256 threads", seconds, f64::from(rounds) / 1e9, "ns"));
    let empty = Launch { args: vec![], ..with(families::ROOFLINE_EMPTY, 0) };
    let one = Launch { grid: [1, 1, 1], ..empty };
    let launches = if full { 1000 } else { 3 };
    let many = |device: &mut dyn Device| (0..launches).try_for_each(|_| launch(device, &one));
    let seconds = repeat(device, many)?;
    add(time("launch", seconds, f64::from(launches) / 1e6, "us"));
    device.begin_capture()?;
    let asked = many(device);
    let graph = device.end_capture()?;
    asked?;
    let seconds = repeat(device, |device| device.launch_graph(graph))?;
    add(time("launch in a graph", seconds, f64::from(launches) / 1e6, "us"));
    for at in [from, to, out] {
        device.free(at)?;
    }
    Ok(found)
}

/// Bytes that are small bf16 numbers of either sign.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as u16
    };
    (0..len / 2).flat_map(|_| (0x3C00 | next() & 0x83FF).to_le_bytes()).collect()
}

/// Fastest, median and slowest, after two untimed.
pub(super) fn repeat(
    device: &mut dyn Device,
    mut work: impl FnMut(&mut dyn Device) -> anyhow::Result<()>,
) -> anyhow::Result<[f64; 3]> {
    for _ in 0..2 {
        work(device)?;
    }
    let mut events = vec![device.record_event()?];
    for _ in 0..REPETITIONS {
        work(device)?;
        events.push(device.record_event()?);
    }
    let mut seconds = Vec::new();
    for pair in events.windows(2) {
        seconds.push(device.elapsed(pair[0], pair[1])?);
    }
    device.clear_events();
    seconds.sort_by(f64::total_cmp);
    Ok([seconds[0], seconds[REPETITIONS / 2], seconds[REPETITIONS - 1]])
}

fn rate(name: &'static str, work: f64, unit: &'static str, seconds: [f64; 3]) -> Ceiling {
    Ceiling { name, value: work / seconds[1], unit, seconds }
}

fn time(name: &'static str, seconds: [f64; 3], count: f64, unit: &'static str) -> Ceiling {
    Ceiling { name, value: seconds[1] / count, unit, seconds }
}
