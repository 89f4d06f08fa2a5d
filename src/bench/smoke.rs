//! Smoke test of a device: what the backend relies on, one feature after another, each reported at
//! once.

use serde::Serialize;

use super::probes::{PROBES, Subject};
use super::roofline::{self, Effort};
use crate::backend::gpu::Open;
use crate::device::{Address, Device, Launch, Matmul, Matrix};
use crate::dtype::Dtype;
use crate::kernels::{CUDA_MODULES, Kernel, families};

/// The result for one feature.
#[derive(Clone, Debug, Serialize)]
pub struct Step {
    /// Name of the check.
    pub name: &'static str,
    /// True if the device did what was asked.
    pub passed: bool,
    /// What a probe of the hardware expects.
    pub expected: Option<&'static str>,
    /// Measurement, or the error.
    pub detail: String,
}

type Try = fn(&mut dyn Device) -> anyhow::Result<String>;

const STEPS: [(&str, Try); 8] = [
    ("memory", memory),
    ("copies", copies),
    ("kernels load", kernels),
    ("a launch", launch),
    ("wrong arguments are refused", refusal),
    ("matmuls", matmuls),
    ("a graph", graph),
    ("time", time),
];

/// Runs every step and every probe, also after a failure; `on_step` is called for each at once. `open`
/// opens the device again.
pub fn smoke(
    device: &mut dyn Device,
    open: &Open,
    effort: Effort,
    mut on_step: impl FnMut(&Step),
) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut add = |step: Step| {
        on_step(&step);
        steps.push(step);
    };
    for (name, attempt) in STEPS {
        let (passed, detail) = match attempt(device) {
            Ok(detail) => (true, detail),
            Err(error) => (false, format!("{error:#}")),
        };
        add(Step { name, passed, expected: None, detail });
    }
    for probe in PROBES {
        let (passed, detail) = match (probe.run)(&mut Subject { device, effort, open }) {
            Ok(seen) => (seen.passed, seen.text),
            Err(error) => (false, format!("{error:#}")),
        };
        add(Step { name: probe.name, passed, expected: Some(probe.expected), detail });
    }
    steps
}

fn memory(device: &mut dyn Device) -> anyhow::Result<String> {
    let (free, total) = device.memory()?;
    let at = device.alloc(64 << 20)?;
    device.free(at)?;
    Ok(format!("{:.1} of {:.1} GB free", free as f64 / 1e9, total as f64 / 1e9))
}

fn read(device: &dyn Device, at: Address, len: usize) -> anyhow::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    device.download(at, &mut bytes)?;
    Ok(bytes)
}

fn copies(device: &mut dyn Device) -> anyhow::Result<String> {
    let bytes: Vec<u8> = (0..1_000_003u32).map(|i| ((i * 31) >> 3) as u8).collect();
    let (a, b) = (device.alloc(bytes.len())?, device.alloc(bytes.len())?);
    device.upload(a, &bytes)?;
    device.memset(b, 7, bytes.len())?;
    device.copy(a, b, bytes.len())?;
    anyhow::ensure!(read(device, b, bytes.len())? == bytes, "other bytes came back");
    device.memset(b, 0xFF, 100)?;
    anyhow::ensure!(read(device, b, 101)?[99..] == [0xFF, bytes[100]], "a fill went wrong");
    device.free(a)?;
    device.free(b)?;
    Ok(format!("{} bytes to the device and back", bytes.len()))
}

fn kernels(device: &mut dyn Device) -> anyhow::Result<String> {
    Kernel::all().try_for_each(|kernel| device.load(kernel))?;
    Ok(format!("{} kernels of {} files", Kernel::all().count(), CUDA_MODULES.len()))
}

fn fill(at: Address, count: u64, value: f32) -> anyhow::Result<Launch> {
    Ok(Launch {
        kernel: families::FILL.of(Dtype::F32)?,
        grid: [4, 1, 1],
        block: [256, 1, 1],
        shared: 0,
        args: vec![at.into(), value.into(), count.into()],
    })
}

fn launch(device: &mut dyn Device) -> anyhow::Result<String> {
    let len = 10_007;
    let at = device.alloc(4 * len)?;
    device.memset(at, 0, 4 * len)?;
    roofline::launch(device, &fill(at, len as u64 - 1, 2.5)?)?;
    let values = Dtype::F32.decode(&read(device, at, 4 * len)?);
    device.free(at)?;
    let right = values[..len - 1].iter().all(|&x| x == 2.5) && values[len - 1] == 0.0;
    anyhow::ensure!(right, "fill_f32 wrote other values, or too far");
    Ok(format!("fill_f32 of {len} values"))
}

fn refusal(device: &mut dyn Device) -> anyhow::Result<String> {
    let at = device.alloc(4096)?;
    let mut wrong = fill(at, 1024, 1.0)?;
    wrong.args.pop();
    let refused = roofline::launch(device, &wrong);
    device.free(at)?;
    match refused {
        Ok(()) => anyhow::bail!("a kernel was started with an argument missing"),
        Err(error) => Ok(format!("{error:#}")),
    }
}

/// Odd shapes, either operand transposed, accumulated in f32.
fn matmuls(device: &mut dyn Device) -> anyhow::Result<String> {
    let mut worst = 0.0f64;
    for (m, n, k) in [(64, 64, 64), (33, 17, 65), (1, 512, 64), (512, 64, 512), (300, 2, 7)] {
        for (dtype, accumulate) in [(Dtype::F32, false), (Dtype::Bf16, true)] {
            for transposed in [false, true] {
                worst = worst.max(product(device, (m, n, k), dtype, accumulate, transposed)?);
            }
        }
    }
    anyhow::ensure!(worst < 1e-5, "matmuls are off by {worst:.1e}");
    Ok(format!("off by {worst:.1e} at most"))
}

fn product(
    device: &mut dyn Device,
    (m, n, k): (usize, usize, usize),
    dtype: Dtype,
    accumulate: bool,
    transposed: bool,
) -> anyhow::Result<f64> {
    let value = |i: usize, salt: usize| ((i * 37 + salt) % 23) as f32 / 8.0 - 1.25;
    let a: Vec<f32> = (0..m * k).map(|i| value(i, 1)).collect();
    let b: Vec<f32> = (0..k * n).map(|i| value(i, 5)).collect();
    let c: Vec<f32> = (0..m * n).map(|i| value(i, 9)).collect();
    let mut put = |dtype: Dtype, values: &[f32]| {
        let bytes = dtype.encode(values);
        let at = device.alloc(bytes.len())?;
        device.upload(at, &bytes).map(|()| at)
    };
    // Transposed: a and b are stored as their transposes.
    let transpose = |values: &[f32], rows: usize, cols: usize| -> Vec<f32> {
        (0..rows * cols).map(|i| values[i % rows * cols + i / rows]).collect()
    };
    let (left, right) = if transposed {
        (transpose(&a, m, k), transpose(&b, k, n))
    } else {
        (a.clone(), b.clone())
    };
    let (a_at, b_at, c_at) = (put(dtype, &left)?, put(dtype, &right)?, put(Dtype::F32, &c)?);
    let (left, right) = if transposed {
        (Matrix::new(a_at, dtype, k, m).t(), Matrix::new(b_at, dtype, n, k).t())
    } else {
        (Matrix::new(a_at, dtype, m, k), Matrix::new(b_at, dtype, k, n))
    };
    let out = Matrix::new(c_at, Dtype::F32, m, n);
    device.matmul(&Matmul { a: left, b: right, c: out, accumulate, batch: 1 })?;
    let got = Dtype::F32.decode(&read(device, c_at, 4 * m * n)?);
    for at in [a_at, b_at, c_at] {
        device.free(at)?;
    }
    let (mut apart, mut norm) = (0.0, 0.0);
    for (i, &got) in got.iter().enumerate() {
        let (row, column) = (i / n, i % n);
        let dot: f64 =
            (0..k).map(|j| f64::from(a[row * k + j]) * f64::from(b[j * n + column])).sum();
        let exact = dot + if accumulate { f64::from(c[i]) } else { 0.0 };
        apart += (f64::from(got) - exact).powi(2);
        norm += exact.powi(2);
    }
    Ok((apart / norm).sqrt())
}

fn graph(device: &mut dyn Device) -> anyhow::Result<String> {
    let (a, b) = (device.alloc(4096)?, device.alloc(4096)?);
    device.memset(a, 0, 4096)?;
    device.memset(b, 0, 4096)?;
    // Once outside: a kernel cannot be loaded while it is recorded.
    roofline::launch(device, &fill(a, 10, 1.0)?)?;
    device.begin_capture()?;
    let asked = (|| {
        device.copy(a, b, 4096)?;
        roofline::launch(device, &fill(a, 1024, 3.0)?)
    })();
    let graph = device.end_capture();
    asked?;
    let graph = graph?;
    let first = |device: &dyn Device, at| anyhow::Ok(Dtype::F32.decode(&read(device, at, 80)?));
    let before = first(device, b)?[0];
    device.launch_graph(graph)?;
    let once = (first(device, a)?[15], first(device, b)?[0], first(device, b)?[15]);
    device.launch_graph(graph)?;
    let twice = first(device, b)?[15];
    device.free(a)?;
    device.free(b)?;
    let right = before == 0.0 && once == (3.0, 1.0, 0.0) && twice == 3.0;
    anyhow::ensure!(right, "replays left {before}, {once:?}, {twice}");
    Ok("recorded, replayed twice".into())
}

fn time(device: &mut dyn Device) -> anyhow::Result<String> {
    let bytes = 16 << 20;
    let at = device.alloc(bytes)?;
    let start = device.record_event()?;
    device.memset(at, 1, bytes)?;
    let end = device.record_event()?;
    let seconds = device.elapsed(start, end)?;
    device.clear_events();
    device.synchronize()?;
    device.free(at)?;
    anyhow::ensure!(seconds > 0.0 && seconds < 10.0, "a fill of 16 MiB took {seconds} s");
    Ok(format!("16 MiB filled in {:.1} us", 1e6 * seconds))
}
