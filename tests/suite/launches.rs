//! Mutation tests of the launch code: a simulated device that changes or drops one call, as a mistake in
//! the launch code would. The check of the op, or the tests of whole steps, must detect each.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use laam::backend::Arena;
use laam::backend::gpu::{Gpu, Mode, Options};
use laam::backend::reference::Reference;
use laam::bench::check::{Selection, Size, check};
use laam::collective::Group;
use laam::device::sim::Sim;
use laam::device::{Address, Arg, Branch, Device, Event, Graph, Launch, Matmul};
use laam::dtype::Dtype;
use laam::kernels::{BUILD, Kernel, families};
use laam::model::Config;
use laam::tokens::WindowKind;

use crate::gpu;

/// Change of the calls that reach the device.
#[derive(Clone, Copy)]
pub enum Mutation {
    /// Changes launches of entries with this prefix.
    Launch(&'static str, fn(&mut Launch)),
    /// Drops them.
    Dropped(&'static str),
    /// Drops them during stream capture only.
    DroppedInGraph(&'static str),
    Matmul(fn(&mut Matmul)),
    NoMemset,
    /// Drops the first wait for a side branch in each stream capture.
    NoFirstWait,
}

/// Device with a mutation, and how often it was applied.
struct MutatingDevice {
    device: Sim,
    mutation: Mutation,
    applied: Arc<AtomicUsize>,
    /// Whether the first launch or upload is past: earlier memsets initialize memory.
    launched: bool,
    capturing: bool,
    /// Whether the capture has waited for a side branch.
    waited: bool,
}

impl MutatingDevice {
    fn applies(&self, applies: bool) -> bool {
        if applies {
            self.applied.fetch_add(1, Ordering::Relaxed);
        }
        applies
    }
}

impl Device for MutatingDevice {
    fn join(&mut self, group: Group) -> anyhow::Result<()> {
        self.device.join(group)
    }
    fn group(&self) -> &Group {
        self.device.group()
    }
    fn all_to_all(&mut self, from: Address, into: Address, piece: usize) -> anyhow::Result<()> {
        self.device.all_to_all(from, into, piece)
    }
    fn all_gather(&mut self, from: Address, into: Address, piece: usize) -> anyhow::Result<()> {
        self.device.all_gather(from, into, piece)
    }
    fn captures_exchanges(&self) -> bool {
        self.device.captures_exchanges()
    }
    unsafe fn launch(&mut self, launch: &Launch) -> anyhow::Result<()> {
        self.launched = true;
        let named = |name: &str| launch.kernel.name().starts_with(name);
        match self.mutation {
            Mutation::Dropped(name) if self.applies(named(name)) => Ok(()),
            Mutation::DroppedInGraph(name) if self.applies(self.capturing && named(name)) => Ok(()),
            Mutation::Launch(name, change) if self.applies(named(name)) => {
                let mut launch = launch.clone();
                change(&mut launch);
                // SAFETY: the simulator checks every access.
                unsafe { self.device.launch(&launch) }
            }
            // SAFETY: as above.
            _ => unsafe { self.device.launch(launch) },
        }
    }
    fn matmul(&mut self, product: &Matmul) -> anyhow::Result<()> {
        let mut product = *product;
        if let Mutation::Matmul(change) = self.mutation {
            let before = product;
            change(&mut product);
            self.applies(product != before);
        }
        self.device.matmul(&product)
    }
    fn memset(&mut self, at: Address, byte: u8, bytes: usize) -> anyhow::Result<()> {
        if matches!(self.mutation, Mutation::NoMemset)
            && self.launched
            && self.applies(byte == 0 && bytes > 4)
        {
            return Ok(());
        }
        self.device.memset(at, byte, bytes)
    }
    fn begin_capture(&mut self) -> anyhow::Result<()> {
        (self.capturing, self.waited) = (true, false);
        self.device.begin_capture()
    }
    fn end_capture(&mut self) -> anyhow::Result<Graph> {
        self.capturing = false;
        self.device.end_capture()
    }
    fn begin_branch(&mut self) -> anyhow::Result<()> {
        self.device.begin_branch()
    }
    fn end_branch(&mut self) -> anyhow::Result<Branch> {
        self.device.end_branch()
    }
    fn wait_for(&mut self, branch: Branch) -> anyhow::Result<()> {
        let is_first = !std::mem::replace(&mut self.waited, true);
        if matches!(self.mutation, Mutation::NoFirstWait) && self.applies(is_first) {
            return Ok(());
        }
        self.device.wait_for(branch)
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
        self.launched = true;
        self.device.upload(to, bytes)
    }
    fn download(&self, from: Address, into: &mut [u8]) -> anyhow::Result<()> {
        self.device.download(from, into)
    }
    fn copy(&mut self, from: Address, to: Address, bytes: usize) -> anyhow::Result<()> {
        self.device.copy(from, to, bytes)
    }
    fn load(&mut self, kernel: Kernel) -> anyhow::Result<()> {
        self.device.load(kernel)
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

/// Backend over such a device, and how often the mutation was applied.
fn mutating(mutation: Mutation, options: Options) -> (Gpu, Arc<AtomicUsize>) {
    let simulator = ptx_race::Options { threads: 2, ..ptx_race::Options::default() };
    mutating_on(move || Sim::new(simulator), mutation, options)
}

/// Backend over a device that applies `mutation` to what `open` opens.
pub fn mutating_on(
    open: impl Fn() -> anyhow::Result<Sim> + Send + Sync + 'static,
    mutation: Mutation,
    options: Options,
) -> (Gpu, Arc<AtomicUsize>) {
    let applied = Arc::new(AtomicUsize::new(0));
    let count = applied.clone();
    let open = Arc::new(move || {
        let (device, applied) = (open()?, count.clone());
        let device = MutatingDevice {
            device,
            mutation,
            applied,
            launched: false,
            capturing: false,
            waited: false,
        };
        Ok(Box::new(device) as Box<dyn Device>)
    });
    (Gpu::new(open, options).unwrap(), applied)
}

fn is_built() -> bool {
    if let Err(why) = BUILD.cuda {
        eprintln!("SKIPPED: mutation tests of launch code, because {why}");
    }
    BUILD.cuda.is_ok()
}

fn less_one(arg: &mut Arg) {
    match arg {
        Arg::I32(n) => *n -= 1,
        other => panic!("not a count: {other:?}"),
    }
}

#[test]
fn launch_mutants_are_killed_by_the_check_of_their_op() {
    if !is_built() {
        return;
    }
    let mutants: &[(&str, &str, Dtype, Mutation)] = &[
        (
            "k and v swapped",
            "rope",
            Dtype::F32,
            Mutation::Launch("rope_f32", |launch| launch.args.swap(4, 5)),
        ),
        (
            "another cos/sin table",
            "rope",
            Dtype::Bf16,
            Mutation::Launch("rope_backward", |launch| launch.args.swap(0, 1)),
        ),
        (
            "residual dropped",
            "rms_norm",
            Dtype::F32,
            Mutation::Launch("rms_norm_f32", |launch| launch.args[1] = Address::NULL.into()),
        ),
        (
            "residual gradient dropped",
            "rms_norm_backward",
            Dtype::Bf16,
            Mutation::Launch("rms_norm_backward_bf16", |launch| {
                launch.args[4] = Address::NULL.into();
            }),
        ),
        (
            "one partial sum of dweight dropped",
            "rms_norm_backward",
            Dtype::F32,
            Mutation::Launch("rms_norm_backward_weight", |launch| less_one(&mut launch.args[3])),
        ),
        (
            "sort pass dropped",
            "embedding_backward",
            Dtype::F32,
            Mutation::Dropped("embedding_sort_scatter"),
        ),
        (
            "runs across chunks not combined",
            "embedding_backward",
            Dtype::F32,
            Mutation::Dropped("embedding_backward_combine"),
        ),
        (
            "sequence length one short",
            "gather_rows",
            Dtype::Bf16,
            Mutation::Launch("gather_rows", |launch| less_one(&mut launch.args[4])),
        ),
        (
            "intermediate size one short",
            "swiglu",
            Dtype::F32,
            Mutation::Launch("swiglu_f32", |launch| {
                let last = launch.args.len() - 1;
                less_one(&mut launch.args[last]);
            }),
        ),
        (
            "k read as v",
            "attention",
            Dtype::Bf16,
            Mutation::Launch("flash_attention", |launch| launch.args.swap(1, 2)),
        ),
        (
            "k read as v, small heads",
            "attention",
            Dtype::F16,
            Mutation::Launch("attention_smallhead_tf32", |launch| launch.args.swap(1, 2)),
        ),
        ("delta dropped", "attention_backward", Dtype::F32, Mutation::Dropped("attention_delta")),
        (
            "new keys read as values",
            "attention_decode",
            Dtype::F32,
            Mutation::Launch("attention_decode", |launch| launch.args.swap(1, 2)),
        ),
        (
            "last id of the vocabulary dropped",
            "fused_linear_cross_entropy",
            Dtype::F32,
            Mutation::Launch("cross_entropy", |launch| less_one(&mut launch.args[7])),
        ),
        (
            "one split of the vocabulary dropped",
            "fused_linear_cross_entropy",
            Dtype::Bf16,
            Mutation::Launch("lce_combine", |launch| {
                let last = launch.args.len() - 1;
                let parts = &mut launch.args[last];
                *parts = Arg::I32(if let Arg::I32(n) = parts { (*n - 1).max(0) } else { 0 });
            }),
        ),
        (
            "weight gradients assigned, not accumulated",
            "linear_backward_weight",
            Dtype::Bf16,
            Mutation::Matmul(|product| product.accumulate = false),
        ),
        ("gradients not cleared", "zero_grad", Dtype::F32, Mutation::NoMemset),
        (
            "one partial sum of the norm dropped",
            "grad_norm",
            Dtype::F32,
            Mutation::Launch("grad_norm", |launch| {
                if launch.kernel == families::GRAD_NORM {
                    less_one(&mut launch.args[3]);
                }
            }),
        ),
        (
            "moments swapped",
            "adamw",
            Dtype::F32,
            Mutation::Launch("adamw_f32", |launch| launch.args.swap(2, 3)),
        ),
        (
            "one chunk short",
            "adamw",
            Dtype::Bf16,
            Mutation::Launch("adamw_bf16", |launch| launch.grid[0] = (launch.grid[0] - 1).max(1)),
        ),
        ("X not normalized", "muon", Dtype::F32, Mutation::Dropped("muon_normalize")),
        (
            "A from the wrong side of X",
            "muon",
            Dtype::F32,
            Mutation::Matmul(|product| {
                let square = product.c.rows == product.c.cols && product.a.at == product.b.at;
                if square && product.a.rows == product.a.cols {
                    product.a = product.a.t();
                    product.b = product.b.t();
                }
            }),
        ),
    ];
    for (what, only, dtype, mutation) in mutants {
        let (backend, applied) = mutating(*mutation, Options::new(*dtype));
        let selection = Selection { only: Some(only), size: Size::Small, seed: 1 };
        let rows = check(&backend, &selection, |_| {});
        let killed = match &rows {
            Ok(rows) => rows.iter().any(|row| !row.passed),
            // The simulator may detect it first, as an invalid access.
            Err(why) => format!("{why:#}").contains("in the simulator: "),
        };
        assert!(applied.load(Ordering::Relaxed) > 0, "{what}: never applied");
        assert!(killed, "{what}: survived the check of {only}");
    }
}

/// The properties of whole steps that tests/suite/gpu.rs holds, on a device with a mutation.
#[test]
fn step_mutants_are_killed_by_the_tests_of_whole_steps() {
    if !is_built() {
        return;
    }
    let config = gpu::config(8);
    let options = |mode| Options { mode, ..Options::new(Dtype::F32) };

    // Agreement with the reference, within the accuracy of the dtype.
    let exact = gpu::train(&Reference::F64, &config, false, 5);
    let plain = gpu::train(&Reference::mixed(Dtype::Bf16), &config, false, 5);
    let two = |plain: &[f64], exact: &[f64]| 2.0 * gpu::apart(plain, exact) + 1e-5;
    let bounds =
        [(Dtype::F32, 1e-5, 1e-4), (Dtype::Bf16, two(&plain.0, &exact.0), two(&plain.1, &exact.1))];
    for (what, mutation) in [
        (
            "learning rate of the other optimizer",
            Mutation::Launch("adamw_step_params", |launch| {
                if let Arg::Address(at) = &mut launch.args[0] {
                    *at = at.plus(8);
                }
            }),
        ),
        ("gradients of the previous step", Mutation::NoMemset),
        ("loss not scaled by the counted targets", Mutation::Dropped("step_queue_pop")),
    ] {
        for (dtype, loss, norm) in bounds {
            let (backend, applied) = mutating(mutation, Options::new(dtype));
            let got = gpu::train(&backend, &config, false, 5);
            let finite = got.0.iter().chain(&got.1).all(|x| x.is_finite());
            let far = || gpu::apart(&got.0, &exact.0) > loss || gpu::apart(&got.1, &exact.1) > norm;
            assert!(applied.load(Ordering::Relaxed) > 0, "{what}: never applied");
            assert!(!finite || far(), "{what}, {dtype:?}");
        }
    }

    // Graph and eager mode are equal. With three layers, the path waits for weight gradients before its end.
    let deep = Config { num_hidden_layers: 3, ..config.clone() };
    for mutation in [Mutation::DroppedInGraph("swiglu_backward"), Mutation::NoFirstWait] {
        let [eager, graphs] = [Mode::Eager, Mode::Graphs].map(|mode| {
            let (backend, applied) = mutating(mutation, options(mode));
            (gpu::train(&backend, &deep, false, 3), applied.load(Ordering::Relaxed))
        });
        assert!(
            (eager.1, graphs.1 > 0) == (0, true) && eager.0 != graphs.0,
            "a kernel or a wait dropped from the graph"
        );
    }

    // Bits depend on shapes alone: here the grid of a sum is another.
    let whole = mutating(Mutation::Dropped("nothing"), options(Mode::Eager)).0;
    let cut = Mutation::Launch("rms_norm_backward", |launch| {
        if launch.kernel == families::RMS_NORM_BACKWARD_WEIGHT {
            launch.args[3] = Arg::I32(3);
        } else {
            launch.grid[0] = 3;
        }
    });
    let (cut, applied) = mutating(cut, options(Mode::Eager));
    let [whole, cut] = [&whole, &cut].map(|backend| gpu::train(backend, &config, false, 3));
    assert!(applied.load(Ordering::Relaxed) > 0 && whole != cut, "another order of summation");
    assert!(gpu::apart(&whole.0, &cut.0) < 1e-5, "and as accurate");

    // A resumed run needs all of its state.
    let (backend, _) = mutating(Mutation::Dropped("nothing"), options(Mode::Eager));
    let mut unbroken = gpu::engine(&backend, &config, false);
    gpu::steps(&mut unbroken, &config, 1..=3);
    let mut resumed = gpu::engine(&backend, &config, false);
    for arena in [Arena::Parameters, Arena::FirstMoment] {
        resumed.write(arena, &unbroken.read(arena).unwrap()).unwrap();
    }
    let [one, other] =
        [&mut unbroken, &mut resumed].map(|engine| gpu::steps(engine, &config, 4..=5));
    assert_ne!(one, other, "a moment not restored");

    // Windows gathered on the device are those of the host.
    let (windows, config, steps) = gpu::windows(WindowKind::Stream);
    let train = |mutation| {
        let backend = mutating(mutation, options(Mode::Eager)).0;
        let mut engine = gpu::engine(&backend, &config, false);
        engine.upload_dataset(&windows, 3).unwrap();
        engine.steps(&windows, &steps[..3]).unwrap()
    };
    // Arguments: tokens, count, documents, document count, stride.
    let closer = Mutation::Launch("gather_windows_stream", |launch| less_one(&mut launch.args[4]));
    assert_ne!(train(Mutation::Dropped("nothing")), train(closer), "another stride");
}
