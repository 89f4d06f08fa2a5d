//! Mistakes in launch code, planted: a device in the simulator that hands on what it is asked for with
//! one thing changed, as the code that asks would have it with a slip of the pen. Each is to be seen by
//! the check that is there for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use laam::backend::Arena;
use laam::backend::gpu::{Gpu, Mode, Options};
use laam::backend::reference::Reference;
use laam::bench::check::{Selection, Size, check};
use laam::device::sim::Sim;
use laam::device::{Address, Arg, Device, Event, Graph, Launch, Matmul};
use laam::dtype::Dtype;
use laam::kernels::BUILD;
use laam::tokens::Kind;

use crate::gpu;

/// What becomes of what is asked for.
#[derive(Clone, Copy)]
enum Slip {
    /// A launch of a kernel whose name begins so is another.
    Launch(&'static str, fn(&mut Launch)),
    /// It is forgotten.
    Forgotten(&'static str),
    /// The same, but only in a graph.
    Unrecorded(&'static str),
    Matmul(fn(&mut Matmul)),
    NotFilled,
}

/// A device with a slip, and how often it was made.
struct Slipping {
    device: Sim,
    slip: Slip,
    made: Arc<AtomicUsize>,
    /// Memory is no longer made ready.
    began: bool,
    recording: bool,
}

impl Slipping {
    fn slips(&self, slips: bool) -> bool {
        if slips {
            self.made.fetch_add(1, Ordering::Relaxed);
        }
        slips
    }
}

impl Device for Slipping {
    fn launch(&mut self, launch: &Launch) -> anyhow::Result<()> {
        self.began = true;
        let named = |name: &str| launch.entry.starts_with(name);
        match self.slip {
            Slip::Forgotten(name) if self.slips(named(name)) => Ok(()),
            Slip::Unrecorded(name) if self.slips(self.recording && named(name)) => Ok(()),
            Slip::Launch(name, change) if self.slips(named(name)) => {
                let mut launch = launch.clone();
                change(&mut launch);
                self.device.launch(&launch)
            }
            _ => self.device.launch(launch),
        }
    }
    fn matmul(&mut self, product: &Matmul) -> anyhow::Result<()> {
        let mut product = *product;
        if let Slip::Matmul(change) = self.slip {
            let before = product;
            change(&mut product);
            self.slips(product != before);
        }
        self.device.matmul(&product)
    }
    fn memset(&mut self, at: Address, byte: u8, bytes: usize) -> anyhow::Result<()> {
        if matches!(self.slip, Slip::NotFilled) && self.began && self.slips(byte == 0 && bytes > 4)
        {
            return Ok(());
        }
        self.device.memset(at, byte, bytes)
    }
    fn begin_capture(&mut self) -> anyhow::Result<()> {
        self.recording = true;
        self.device.begin_capture()
    }
    fn end_capture(&mut self) -> anyhow::Result<Graph> {
        self.recording = false;
        self.device.end_capture()
    }

    fn name(&self) -> &'static str {
        self.device.name()
    }
    fn describe(&self) -> String {
        self.device.describe()
    }
    fn memory(&self) -> anyhow::Result<(u64, u64)> {
        self.device.memory()
    }
    fn alloc(&mut self, bytes: usize) -> anyhow::Result<Address> {
        self.device.alloc(bytes)
    }
    fn free(&mut self, address: Address) -> anyhow::Result<()> {
        self.device.free(address)
    }
    fn upload(&mut self, to: Address, bytes: &[u8]) -> anyhow::Result<()> {
        self.began = true;
        self.device.upload(to, bytes)
    }
    fn download(&self, from: Address, into: &mut [u8]) -> anyhow::Result<()> {
        self.device.download(from, into)
    }
    fn copy(&mut self, from: Address, to: Address, bytes: usize) -> anyhow::Result<()> {
        self.device.copy(from, to, bytes)
    }
    fn load(&mut self, entry: &str) -> anyhow::Result<()> {
        self.device.load(entry)
    }
    fn launch_graph(&mut self, graph: Graph) -> anyhow::Result<()> {
        self.device.launch_graph(graph)
    }
    fn record_event(&mut self) -> anyhow::Result<Event> {
        self.device.record_event()
    }
    fn elapsed(&mut self, from: Event, to: Event) -> anyhow::Result<f64> {
        self.device.elapsed(from, to)
    }
    fn clear_events(&mut self) {
        self.device.clear_events();
    }
    fn synchronize(&mut self) -> anyhow::Result<()> {
        self.device.synchronize()
    }
}

/// The backend over such a device, and how often the slip was made.
fn slipping(slip: Slip, options: Options) -> (Gpu, Arc<AtomicUsize>) {
    let made = Arc::new(AtomicUsize::new(0));
    let count = made.clone();
    let open = Arc::new(move || {
        let simulator = ptxsim::Options { threads: 2, ..ptxsim::Options::default() };
        let (device, made) = (Sim::new(simulator)?, count.clone());
        Ok(Box::new(Slipping { device, slip, made, began: false, recording: false })
            as Box<dyn Device>)
    });
    (Gpu::new(open, options).unwrap(), made)
}

fn is_built() -> bool {
    if let Err(why) = BUILD.cuda {
        eprintln!("SKIPPED: mistakes in launch code, because {why}");
    }
    BUILD.cuda.is_ok()
}

fn less_one(arg: &mut Arg) {
    match arg {
        Arg::I32(n) => *n -= 1,
        other => panic!("{other:?} is no count"),
    }
}

#[test]
fn mistakes_in_launch_code_are_seen_by_the_check_of_their_operation() {
    if !is_built() {
        return;
    }
    let null = Arg::from(Address::NULL);
    assert_eq!(null, Arg::Address(Address(0)));
    let mistakes: &[(&str, &str, Dtype, Slip)] = &[
        (
            "k and v changed places",
            "rope",
            Dtype::F32,
            Slip::Launch("rope_f32", |launch| launch.args.swap(4, 5)),
        ),
        (
            "the turns of another table",
            "rope",
            Dtype::Bf16,
            Slip::Launch("rope_backward", |launch| launch.args.swap(0, 1)),
        ),
        (
            "the residual forgotten",
            "rms_norm",
            Dtype::F32,
            Slip::Launch("rms_norm_f32", |launch| launch.args[1] = Address::NULL.into()),
        ),
        (
            "the residual's gradient forgotten",
            "rms_norm_backward",
            Dtype::Bf16,
            Slip::Launch("rms_norm_backward_bf16", |launch| launch.args[4] = Address::NULL.into()),
        ),
        (
            "a share of the weight's gradient left out",
            "rms_norm_backward",
            Dtype::F32,
            Slip::Launch("rms_norm_backward_weight", |launch| less_one(&mut launch.args[2])),
        ),
        (
            "half of a sort",
            "embedding_backward",
            Dtype::F32,
            Slip::Forgotten("embedding_sort_scatter"),
        ),
        (
            "segments not joined",
            "embedding_backward",
            Dtype::F32,
            Slip::Forgotten("embedding_backward_combine"),
        ),
        (
            "a position too far",
            "gather_rows",
            Dtype::Bf16,
            Slip::Launch("gather_rows", |launch| less_one(&mut launch.args[4])),
        ),
        (
            "gate and up of a narrower layer",
            "swiglu",
            Dtype::F32,
            Slip::Launch("swiglu_f32", |launch| {
                let last = launch.args.len() - 1;
                less_one(&mut launch.args[last]);
            }),
        ),
        (
            "k in the place of v",
            "attention",
            Dtype::Bf16,
            Slip::Launch("flash_attention", |launch| launch.args.swap(1, 2)),
        ),
        (
            "k in the place of v, of narrow heads",
            "attention",
            Dtype::F16,
            Slip::Launch("attention_smallhead_tf32", |launch| launch.args.swap(1, 2)),
        ),
        ("delta forgotten", "attention_backward", Dtype::F32, Slip::Forgotten("attention_delta")),
        (
            "fresh keys in the place of values",
            "attention_decode",
            Dtype::F32,
            Slip::Launch("attention_decode", |launch| launch.args.swap(1, 2)),
        ),
        (
            "the last word not looked at",
            "fused_linear_cross_entropy",
            Dtype::F32,
            Slip::Launch("cross_entropy", |launch| less_one(&mut launch.args[7])),
        ),
        (
            "a part of the vocabulary not joined",
            "fused_linear_cross_entropy",
            Dtype::Bf16,
            Slip::Launch("lce_combine", |launch| {
                let last = launch.args.len() - 1;
                let parts = &mut launch.args[last];
                *parts = Arg::I32(if let Arg::I32(n) = parts { (*n - 1).max(0) } else { 0 });
            }),
        ),
        (
            "weight gradients assigned, not added",
            "linear_backward_weight",
            Dtype::Bf16,
            Slip::Matmul(|product| product.accumulate = false),
        ),
        ("gradients not cleared", "zero_grad", Dtype::F32, Slip::NotFilled),
        (
            "a share of the norm left out",
            "grad_norm",
            Dtype::F32,
            Slip::Launch("grad_norm", |launch| {
                if launch.entry == "grad_norm" {
                    less_one(&mut launch.args[3]);
                }
            }),
        ),
        (
            "the moments changed places",
            "adamw",
            Dtype::F32,
            Slip::Launch("adamw_f32", |launch| launch.args.swap(2, 3)),
        ),
        (
            "a chunk short",
            "adamw",
            Dtype::Bf16,
            Slip::Launch("adamw_bf16", |launch| launch.grid[0] = (launch.grid[0] - 1).max(1)),
        ),
        ("X not brought to norm 1", "muon", Dtype::F32, Slip::Forgotten("muon_normalize")),
        (
            "the wide side for the small one",
            "muon",
            Dtype::F32,
            Slip::Matmul(|product| {
                let square = product.c.rows == product.c.cols && product.a.at == product.b.at;
                if square && product.a.rows == product.a.cols {
                    product.a = product.a.t();
                    product.b = product.b.t();
                }
            }),
        ),
    ];
    for (what, only, dtype, slip) in mistakes {
        let (backend, made) = slipping(*slip, Options::new(*dtype));
        let selection = Selection { only: Some(only), size: Size::Small, seed: 1 };
        let rows = check(&backend, &selection, |_| {});
        let seen = match &rows {
            Ok(rows) => rows.iter().any(|row| !row.passed),
            // The simulator may see it first: as an access that nobody may make.
            Err(why) => format!("{why:#}").contains("in the simulator"),
        };
        assert!(made.load(Ordering::Relaxed) > 0, "{what}: never made");
        assert!(seen, "{what}: not seen in {only}");
    }
}

/// What twenty steps are held to, on a device that slips.
#[test]
fn mistakes_in_a_step_are_seen_by_the_tests_of_whole_steps() {
    if !is_built() {
        return;
    }
    let config = gpu::config(8);
    let options = |mode| Options { mode, ..Options::new(Dtype::F32) };

    // The reference is followed, as far as the numbers allow.
    let exact = gpu::train(&Reference::F64, &config, false, 5);
    let plain = gpu::train(&Reference::mixed(Dtype::Bf16), &config, false, 5);
    let two = |plain: &[f64], exact: &[f64]| 2.0 * gpu::apart(plain, exact) + 1e-5;
    let bounds =
        [(Dtype::F32, 1e-5, 1e-4), (Dtype::Bf16, two(&plain.0, &exact.0), two(&plain.1, &exact.1))];
    for (what, slip) in [
        (
            "the rate of the other optimizer",
            Slip::Launch("adamw_step_params", |launch| {
                if let Arg::Address(Address(at)) = &mut launch.args[0] {
                    *at += 8;
                }
            }),
        ),
        ("gradients of the step before", Slip::NotFilled),
        ("losses not scaled by what counts", Slip::Forgotten("step_queue_pop")),
    ] {
        for (dtype, loss, norm) in bounds {
            let (backend, made) = slipping(slip, Options::new(dtype));
            let got = gpu::train(&backend, &config, false, 5);
            let finite = got.0.iter().chain(&got.1).all(|x| x.is_finite());
            let far = || gpu::apart(&got.0, &exact.0) > loss || gpu::apart(&got.1, &exact.1) > norm;
            assert!(made.load(Ordering::Relaxed) > 0, "{what}: never made");
            assert!(!finite || far(), "{what}, {dtype:?}");
        }
    }

    // A graph does what its kernels do one by one.
    let slip = Slip::Unrecorded("swiglu_backward");
    let [eager, graphs] = [Mode::Eager, Mode::Graphs].map(|mode| {
        let (backend, made) = slipping(slip, options(mode));
        (gpu::train(&backend, &config, false, 4), made.load(Ordering::Relaxed))
    });
    assert!((eager.1, graphs.1 > 0) == (0, true) && eager.0 != graphs.0, "a kernel not recorded");

    // The bits depend on shapes alone: here a sum is cut by something else.
    let whole = slipping(Slip::Forgotten("nothing"), options(Mode::Eager)).0;
    let cut = Slip::Launch("rms_norm_backward", |launch| {
        if launch.entry == "rms_norm_backward_weight" {
            launch.args[2] = Arg::I32(3);
        } else {
            launch.grid[0] = 3;
        }
    });
    let (cut, made) = slipping(cut, options(Mode::Eager));
    let [whole, cut] = [&whole, &cut].map(|backend| gpu::train(backend, &config, false, 3));
    assert!(made.load(Ordering::Relaxed) > 0 && whole != cut, "another order of a sum");
    assert!(gpu::apart(&whole.0, &cut.0) < 1e-5, "which is as good");

    // A run goes on from all of its state, not from a part.
    let (backend, _) = slipping(Slip::Forgotten("nothing"), options(Mode::Eager));
    let mut unbroken = gpu::engine(&backend, &config, false);
    gpu::steps(&mut unbroken, &config, 1..=3);
    let mut resumed = gpu::engine(&backend, &config, false);
    for arena in [Arena::Parameters, Arena::FirstMoment] {
        resumed.write(arena, &unbroken.read(arena).unwrap()).unwrap();
    }
    let [one, other] =
        [&mut unbroken, &mut resumed].map(|engine| gpu::steps(engine, &config, 4..=5));
    assert_ne!(one, other, "a moment forgotten");

    // Windows drawn on the device are those that were asked for.
    let (windows, config, steps) = gpu::windows(Kind::Stream);
    let train = |slip| {
        let backend = slipping(slip, options(Mode::Eager)).0;
        let mut engine = gpu::engine(&backend, &config, false);
        engine.hold(&windows, 3).unwrap();
        engine.steps(&windows, &steps[..3]).unwrap()
    };
    // Tokens, their count, documents, the number of these, the stride.
    let closer = Slip::Launch("gather_windows_stream", |launch| less_one(&mut launch.args[4]));
    assert_ne!(train(Slip::Forgotten("nothing")), train(closer), "another stride");
}
