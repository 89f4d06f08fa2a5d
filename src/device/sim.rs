//! The kernels in the simulator, one instruction at a time; matmuls on the host.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use gemm_common::Parallelism;
use gemm_f32::gemm::f32::get_gemm_fn;
use ptx_race::{Config, Memory, Module, Options, Stats};

use super::address::{Allocations, Used};
use super::{Address, Branch, Device, Event, Graph, Launch, Matmul, Matrix};
use crate::collective::Group;
use crate::error;
use crate::kernels::{BUILD, CudaModule, Kernel};

/// Warp instructions per launch after which a kernel counts as hung: minutes of simulation.
const MAX_INSTRUCTIONS_PER_LAUNCH: u64 = 1 << 32;

/// A simulated device in this machine's memory.
pub struct Sim {
    memory: Memory,
    allocations: Allocations,
    options: Options,
    group: Group,
    capture: Option<Capture>,
    graphs: Vec<(Vec<SimOp>, Used)>,
    events: Vec<Instant>,
    /// Kernels loaded or launched so far: a GPU's driver cannot load one during capture.
    loaded: HashSet<Kernel>,
    /// Modules whose entries take the place of those of a kernel file.
    replaced: HashMap<&'static str, Module>,
    observer: Option<LaunchObserver>,
}

/// A stream capture in progress.
#[derive(Default)]
struct Capture {
    /// Operations in the order in which the graph executes them.
    ops: Vec<SimOp>,
    /// Those of side branches that nothing waits for yet, with the number of their branch. The graph executes
    /// them as late as it may, so that a wait that is missing shows in the results.
    beside: Vec<(usize, SimOp)>,
    /// Branches so far.
    branches: usize,
    in_branch: bool,
}

/// What is told each launch and its counts.
pub type LaunchObserver = Arc<dyn Fn(&Launch, &Stats) + Send + Sync>;

/// An operation that stream capture can record, with places in the simulator's memory.
enum SimOp {
    Memset(u64, u8, usize),
    Copy(u64, u64, usize),
    /// With the values of the arguments.
    Launch(&'static CudaModule, Launch, Vec<u64>),
    /// With the places of the matrices.
    Matmul(Matmul, [u64; 3]),
    /// From, into, bytes per piece.
    AllToAll(u64, u64, usize),
    AllGather(u64, u64, usize),
}

impl Sim {
    /// A device whose kernels run as `options` say; their limit on instructions is the device's own.
    pub fn new(options: Options) -> anyhow::Result<Sim> {
        if let Err(why) = BUILD.cuda {
            return Err(error::device(
                format!("this build has no CUDA kernels: {why}"),
                "run scripts/setup-cuda, then build again",
            ));
        }
        Ok(Sim {
            memory: Memory::new(),
            allocations: Allocations::default(),
            options: Options { max_instructions: MAX_INSTRUCTIONS_PER_LAUNCH, ..options },
            group: Group::alone(),
            capture: None,
            graphs: Vec::new(),
            events: Vec::new(),
            loaded: HashSet::new(),
            replaced: HashMap::new(),
            observer: None,
        })
    }

    /// Launches the entries of `module` in the place of those of the file `kernels/FILE.cu`.
    pub fn replace(&mut self, file: &'static str, module: Module) {
        self.replaced.insert(file, module);
    }

    /// Tells `observer` each launch after it was executed.
    pub fn observe(&mut self, observer: LaunchObserver) {
        self.observer = Some(observer);
    }

    /// Refuses what a GPU's driver refuses during stream capture.
    fn not_captured(&self, what: &str) -> anyhow::Result<()> {
        match self.capture {
            Some(_) => Err(error::internal(format!("{what} during stream capture"))),
            None => Ok(()),
        }
    }

    /// The capture, if it is in a side branch or not, as expected.
    fn captured_branch(&mut self, in_branch: bool) -> anyhow::Result<&mut Capture> {
        let capture = self.capture.as_mut().filter(|capture| capture.in_branch == in_branch);
        capture.ok_or_else(|| error::internal("a call of side branches out of order"))
    }

    fn submit(&mut self, op: SimOp) -> anyhow::Result<()> {
        if let Some(capture) = &mut self.capture {
            if capture.in_branch {
                capture.beside.push((capture.branches, op));
            } else {
                capture.ops.push(op);
            }
            return Ok(());
        }
        self.execute(&op)
    }

    fn execute(&self, op: &SimOp) -> anyhow::Result<()> {
        match op {
            SimOp::Memset(at, byte, bytes) => {
                self.memory.write(*at, &vec![*byte; *bytes])?;
            }
            SimOp::Copy(from, to, bytes) => {
                self.memory.write(*to, &self.memory.read_vec(*from, *bytes)?)?;
            }
            SimOp::Launch(module, launch, values) => self.run_kernel(module, launch, values)?,
            SimOp::Matmul(matmul, places) => self.multiply(matmul, *places)?,
            SimOp::AllToAll(from, into, piece) => {
                let send = self.memory.read_vec(*from, piece * self.group.size())?;
                let mut received = vec![0; send.len()];
                self.group.all_to_all(&send, &mut received)?;
                self.memory.write(*into, &received)?;
            }
            SimOp::AllGather(from, into, piece) => {
                let mut all = vec![0; piece * self.group.size()];
                self.group.all_gather(&self.memory.read_vec(*from, *piece)?, &mut all)?;
                self.memory.write(*into, &all)?;
            }
        }
        Ok(())
    }

    fn run_kernel(
        &self,
        cuda: &'static CudaModule,
        launch: &Launch,
        values: &[u64],
    ) -> anyhow::Result<()> {
        let replaced =
            self.replaced.get(cuda.name).and_then(|module| module.kernel(launch.kernel.name()));
        let entry = match replaced {
            Some(entry) => entry,
            None => {
                module(cuda)?.kernel(launch.kernel.name()).expect("the table is of these files")
            }
        };
        let args: Vec<_> = launch
            .args
            .iter()
            .zip(values)
            .map(|(arg, value)| ptx_race::Arg::bytes(&value.to_le_bytes()[..arg.size()]))
            .collect();
        let config = Config { grid: launch.grid, block: launch.block, shared: launch.shared };
        let stats = entry
            .launch(&self.memory, &config, &args, &self.options)
            .map_err(|fault| error::internal(format!("in the simulator: {fault}")))?;
        if let Some(observer) = &self.observer {
            observer(launch, &stats);
        }
        Ok(())
    }

    fn read(&self, matrix: &Matrix, place: u64) -> anyhow::Result<Vec<f32>> {
        let mut bytes = Vec::new();
        for (at, len) in rows(matrix, place) {
            bytes.extend(self.memory.read_vec(at, len)?);
        }
        Ok(matrix.dtype.decode(&bytes))
    }

    fn multiply(&self, matmul: &Matmul, places: [u64; 3]) -> anyhow::Result<()> {
        let Matmul { a, b, c, .. } = matmul;
        let strides = [a, b, c].map(|x| (x.rows * x.stride * x.dtype.size()) as u64);
        (0..matmul.batch as u64).try_for_each(|nth| {
            self.multiply_one(matmul, std::array::from_fn(|i| places[i] + nth * strides[i]))
        })
    }

    /// One of the batch.
    fn multiply_one(&self, matmul: &Matmul, [at_a, at_b, at_c]: [u64; 3]) -> anyhow::Result<()> {
        let (m, n, k) = matmul.check()?;
        let (a, b) = (self.read(&matmul.a, at_a)?, self.read(&matmul.b, at_b)?);
        let mut c = if matmul.accumulate { self.read(&matmul.c, at_c)? } else { vec![0.0; m * n] };
        // (column stride, row stride)
        let strides = |matrix: &Matrix| {
            let cols = matrix.cols as isize;
            if matrix.transposed { (cols, 1) } else { (1, cols) }
        };
        let ((a_col, a_row), (b_col, b_row)) = (strides(&matmul.a), strides(&matmul.b));
        // SAFETY: a, b and c are vectors of rows * cols elements, and strides of (1, cols) or (cols, 1)
        // stay within them for the shapes that `check` accepted.
        unsafe {
            // `gemm` prefers column-major output: cT = bT aT.
            get_gemm_fn()(
                n,
                m,
                k,
                c.as_mut_ptr(),
                n as isize,
                1,
                matmul.accumulate,
                b.as_ptr(),
                b_row,
                b_col,
                a.as_ptr(),
                a_row,
                a_col,
                1.0,
                1.0,
                false,
                false,
                false,
                Parallelism::None,
            );
        }
        let mut bytes = matmul.c.dtype.encode(&c).into_iter();
        for (at, len) in rows(&matmul.c, at_c) {
            self.memory.write(at, &bytes.by_ref().take(len).collect::<Vec<u8>>())?;
        }
        Ok(())
    }
}

/// Places and bytes of the rows of a matrix that begins at `place`; of all of them at once if there are no
/// gaps.
fn rows(matrix: &Matrix, place: u64) -> impl Iterator<Item = (u64, usize)> + use<> {
    let Matrix { dtype, rows, cols, stride, .. } = *matrix;
    let (rows, cols) = if stride == cols { (1, rows * cols) } else { (rows, cols) };
    (0..rows).map(move |row| (place + (row * stride * dtype.size()) as u64, cols * dtype.size()))
}

/// The decoded PTX of a kernel file, shared by all simulated devices.
fn module(cuda: &'static CudaModule) -> anyhow::Result<Module> {
    static MODULES: Mutex<Option<HashMap<&'static str, Module>>> = Mutex::new(None);
    let mut modules = MODULES.lock().unwrap_or_else(PoisonError::into_inner);
    let modules = modules.get_or_insert_with(HashMap::new);
    if let Some(module) = modules.get(cuda.name) {
        return Ok(module.clone());
    }
    let module = Module::from_ptx(cuda.ptx()).map_err(|e| {
        error::device(
            format!("the simulator cannot read kernels/{}.cu: {e}", cuda.name),
            "use the instructions that crates/ptx-race/README.md lists, or add this one to ptx-race",
        )
    })?;
    modules.insert(cuda.name, module.clone());
    Ok(module)
}

impl Device for Sim {
    fn name(&self) -> &'static str {
        "sim"
    }

    fn describe(&self) -> String {
        let Options { schedule, check, .. } = self.options;
        format!("sim, kernels in the simulator ({schedule:?}, {check:?})")
    }

    fn memory(&self) -> anyhow::Result<(u64, u64)> {
        let total = super::host_memory().unwrap_or(u64::MAX);
        Ok((total.saturating_sub(self.allocations.bytes()), total))
    }

    fn alloc(&mut self, bytes: usize) -> anyhow::Result<Address> {
        self.not_captured("an allocation")?;
        super::check_host_memory(bytes as u128, "an allocation of the simulator")?;
        Ok(self.allocations.insert(self.memory.alloc_uninit(bytes.max(1)), bytes))
    }

    fn free(&mut self, address: Address) -> anyhow::Result<()> {
        self.not_captured("freeing memory")?;
        Ok(self.memory.free(self.allocations.remove(address)?)?)
    }

    fn upload(&mut self, to: Address, bytes: &[u8]) -> anyhow::Result<()> {
        self.not_captured("a copy from the host")?;
        Ok(self.memory.write(self.allocations.peek(to, bytes.len())?, bytes)?)
    }

    fn download(&self, from: Address, into: &mut [u8]) -> anyhow::Result<()> {
        self.not_captured("a copy to the host")?;
        Ok(self.memory.read(self.allocations.peek(from, into.len())?, into)?)
    }

    fn memset(&mut self, at: Address, byte: u8, bytes: usize) -> anyhow::Result<()> {
        let at = self.allocations.range(at, bytes)?;
        self.submit(SimOp::Memset(at, byte, bytes))
    }

    fn copy(&mut self, from: Address, to: Address, bytes: usize) -> anyhow::Result<()> {
        let from = self.allocations.range(from, bytes)?;
        let to = self.allocations.range(to, bytes)?;
        self.submit(SimOp::Copy(from, to, bytes))
    }

    fn load(&mut self, kernel: Kernel) -> anyhow::Result<()> {
        module(kernel.module()?)?;
        if !self.loaded.contains(&kernel) {
            self.not_captured(&format!("loading kernel {}", kernel.name()))?;
            self.loaded.insert(kernel);
        }
        Ok(())
    }

    /// Safe here: the simulator checks every access.
    unsafe fn launch(&mut self, launch: &Launch) -> anyhow::Result<()> {
        let cuda = launch.check()?;
        let values = launch.values(&mut self.allocations)?;
        if !self.loaded.contains(&launch.kernel) {
            self.not_captured(&format!("the first launch of kernel {}", launch.kernel.name()))?;
            self.loaded.insert(launch.kernel);
        }
        self.submit(SimOp::Launch(cuda, launch.clone(), values))
    }

    fn matmul(&mut self, matmul: &Matmul) -> anyhow::Result<()> {
        let places = matmul.places(&mut self.allocations)?;
        self.submit(SimOp::Matmul(*matmul, places))
    }

    fn join(&mut self, group: Group) -> anyhow::Result<()> {
        self.group = group;
        Ok(())
    }

    fn group(&self) -> &Group {
        &self.group
    }

    fn all_to_all(&mut self, from: Address, into: Address, piece: usize) -> anyhow::Result<()> {
        let bytes = piece * self.group.size();
        let from = self.allocations.range(from, bytes)?;
        let into = self.allocations.range(into, bytes)?;
        self.submit(SimOp::AllToAll(from, into, piece))
    }

    fn all_gather(&mut self, from: Address, into: Address, piece: usize) -> anyhow::Result<()> {
        let from = self.allocations.range(from, piece)?;
        let into = self.allocations.range(into, piece * self.group.size())?;
        self.submit(SimOp::AllGather(from, into, piece))
    }

    /// Its graphs are replayed by the host.
    fn captures_exchanges(&self) -> bool {
        true
    }

    fn begin_capture(&mut self) -> anyhow::Result<()> {
        self.not_captured("another capture")?;
        self.capture = Some(Capture::default());
        self.allocations.begin_capture();
        Ok(())
    }

    fn end_capture(&mut self) -> anyhow::Result<Graph> {
        let captured = self.capture.take();
        let captured = captured.ok_or_else(|| error::internal("no stream capture to end"))?;
        let used = self.allocations.end_capture();
        if captured.in_branch || !captured.beside.is_empty() {
            return Err(error::internal("stream capture ended with a branch not waited for"));
        }
        self.graphs.push((captured.ops, used));
        Ok(Graph(self.graphs.len() - 1))
    }

    fn begin_branch(&mut self) -> anyhow::Result<()> {
        let capture = self.captured_branch(false)?;
        capture.in_branch = true;
        capture.branches += 1;
        Ok(())
    }

    fn end_branch(&mut self) -> anyhow::Result<Branch> {
        let capture = self.captured_branch(true)?;
        capture.in_branch = false;
        Ok(Branch(capture.branches))
    }

    fn wait_for(&mut self, Branch(last): Branch) -> anyhow::Result<()> {
        let capture = self.captured_branch(false)?;
        let count = capture.beside.partition_point(|(branch, _)| *branch <= last);
        capture.ops.extend(capture.beside.drain(..count).map(|(_, op)| op));
        Ok(())
    }

    fn launch_graph(&mut self, Graph(graph): Graph) -> anyhow::Result<()> {
        let (ops, used) = &self.graphs[graph];
        self.allocations.check(used)?;
        ops.iter().try_for_each(|op| self.execute(op))
    }

    fn record_event(&mut self) -> anyhow::Result<Event> {
        self.events.push(Instant::now());
        Ok(Event(self.events.len() - 1))
    }

    fn elapsed(&mut self, Event(from): Event, Event(to): Event) -> anyhow::Result<f64> {
        self.not_captured("waiting for an event")?;
        Ok(self.events[to].saturating_duration_since(self.events[from]).as_secs_f64())
    }

    fn clear_events(&mut self) {
        self.events.clear();
    }

    fn synchronize(&mut self) -> anyhow::Result<()> {
        self.not_captured("synchronization")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::Dtype;
    use crate::kernels::families;

    fn sim() -> Option<Sim> {
        Sim::new(Options::default()).map_err(|why| eprintln!("SKIPPED: {why}")).ok()
    }

    fn put(sim: &mut Sim, dtype: Dtype, values: &[f32]) -> Address {
        let bytes = dtype.encode(values);
        let at = sim.alloc(bytes.len()).unwrap();
        sim.upload(at, &bytes).unwrap();
        at
    }

    fn get(sim: &Sim, dtype: Dtype, at: Address, len: usize) -> Vec<f32> {
        let mut bytes = vec![0; len * dtype.size()];
        sim.download(at, &mut bytes).unwrap();
        dtype.decode(&bytes)
    }

    #[test]
    fn matmul_reads_transposed_operands_and_accumulates_in_f32() {
        let Some(mut sim) = sim() else { return };
        // a = [[1, 2, 3], [4, 5, 6]], b = [[1, 0], [0, 1], [1, 1]]; a b = [[4, 5], [10, 11]]
        let a = put(&mut sim, Dtype::Bf16, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let a_transposed = put(&mut sim, Dtype::Bf16, &[1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
        let b = put(&mut sim, Dtype::Bf16, &[1.0, 0.0, 0.0, 1.0, 1.0, 1.0]);
        let b_transposed = put(&mut sim, Dtype::Bf16, &[1.0, 0.0, 1.0, 0.0, 1.0, 1.0]);
        let matrix = |at, rows, cols| Matrix::new(at, Dtype::Bf16, rows, cols);
        for a in [matrix(a, 2, 3), matrix(a_transposed, 3, 2).t()] {
            for b in [matrix(b, 3, 2), matrix(b_transposed, 2, 3).t()] {
                let c = put(&mut sim, Dtype::F32, &[0.5, 0.0, 0.0, 1000.0]);
                let c = Matrix::new(c, Dtype::F32, 2, 2);
                sim.matmul(&Matmul { a, b, c, accumulate: true, batch: 1 }).unwrap();
                assert_eq!(get(&sim, Dtype::F32, c.at, 4), [4.5, 5.0, 10.0, 1011.0]);
                sim.matmul(&Matmul { a, b, c, accumulate: false, batch: 1 }).unwrap();
                assert_eq!(get(&sim, Dtype::F32, c.at, 4), [4.0, 5.0, 10.0, 11.0]);
            }
        }
        // A batch of two: a matrix, then its double.
        let double: Vec<f32> = (1..=6).chain((1..=6).map(|n| 2 * n)).map(|n| n as f32).collect();
        let twice = Matrix::new(put(&mut sim, Dtype::F32, &double), Dtype::F32, 2, 3);
        let c = Matrix::new(put(&mut sim, Dtype::F32, &[f32::NAN; 8]), Dtype::F32, 2, 2);
        sim.matmul(&Matmul { a: twice, b: twice.t(), c, accumulate: false, batch: 2 }).unwrap();
        let exact = [14.0, 32.0, 32.0, 77.0];
        assert_eq!(get(&sim, Dtype::F32, c.at, 8), [exact, exact.map(|x| 4.0 * x)].concat());

        // Rows that are four elements apart; what lies between them is neither read nor written.
        let wide = put(&mut sim, Dtype::F32, &[1.0, 2.0, 3.0, 9.0, 4.0, 5.0, 6.0, 9.0]);
        let wide = Matrix::new(wide, Dtype::F32, 2, 3).with_stride(4);
        let c = Matrix::new(put(&mut sim, Dtype::F32, &[7.0; 8]), Dtype::F32, 2, 2).with_stride(4);
        sim.matmul(&Matmul { a: wide, b: wide.t(), c, accumulate: false, batch: 1 }).unwrap();
        assert_eq!(get(&sim, Dtype::F32, c.at, 8), [14.0, 32.0, 7.0, 7.0, 32.0, 77.0, 7.0, 7.0]);

        let c = Matrix::new(a, Dtype::F32, 2, 2);
        let wrong =
            Matmul { a: matrix(a, 2, 3), b: matrix(b, 2, 3), c, accumulate: false, batch: 1 };
        assert!(sim.matmul(&wrong).is_err());
    }

    fn launch(sim: &mut Sim, launch: &Launch) -> anyhow::Result<()> {
        // SAFETY: the simulator checks every access.
        unsafe { sim.launch(launch) }
    }

    /// Sets `len` f32 to 3.
    fn fill(at: Address, len: u64) -> Launch {
        Launch {
            kernel: families::FILL.of(Dtype::F32).unwrap(),
            grid: [1, 1, 1],
            block: [256, 1, 1],
            shared: 0,
            args: vec![at.into(), 3.0f32.into(), len.into()],
        }
    }

    #[test]
    fn launch_rejects_arguments_that_do_not_match_the_kernel() {
        let Some(mut sim) = sim() else { return };
        let out = sim.alloc(40).unwrap();
        let mut fill = fill(out, 10);
        launch(&mut sim, &fill).unwrap();
        assert_eq!(get(&sim, Dtype::F32, out, 10), [3.0; 10]);
        let good = fill.clone();
        fill.args[2] = 10u32.into();
        let message = launch(&mut sim, &fill).unwrap_err().to_string();
        assert!(message.contains("[8, 4, 8]") && message.contains("[8, 4, 4]"), "{message}");
        fill.args.pop();
        assert!(launch(&mut sim, &fill).is_err());
        let mut fill = good.clone();
        fill.block[0] = 257;
        assert!(launch(&mut sim, &fill).is_err());
        let mut fill = good;
        fill.grid[0] = 0;
        assert!(launch(&mut sim, &fill).is_err());
    }

    #[test]
    fn captured_work_executes_at_graph_launch() {
        let Some(mut sim) = sim() else { return };
        let (a, b) = (sim.alloc(8).unwrap(), sim.alloc(8).unwrap());
        sim.upload(a, &[1; 8]).unwrap();
        sim.upload(b, &[2; 8]).unwrap();
        sim.begin_capture().unwrap();
        sim.copy(a, b, 8).unwrap();
        sim.memset(a, 3, 4).unwrap();
        let graph = sim.end_capture().unwrap();
        let read = |sim: &Sim, at| {
            let mut bytes = [0; 8];
            sim.download(at, &mut bytes).unwrap();
            bytes
        };
        assert_eq!(read(&sim, b), [2; 8]);
        sim.launch_graph(graph).unwrap();
        assert_eq!((read(&sim, a), read(&sim, b)), ([3, 3, 3, 3, 1, 1, 1, 1], [1; 8]));
        sim.launch_graph(graph).unwrap();
        assert_eq!(read(&sim, b), [3, 3, 3, 3, 1, 1, 1, 1]);
    }

    #[test]
    fn branches_execute_when_they_are_waited_for() {
        let Some(mut sim) = sim() else { return };
        let at = sim.alloc(3).unwrap();
        let set =
            |sim: &mut Sim, byte| sim.memset(at.plus(usize::from(byte) - 1), byte, 1).unwrap();
        sim.begin_capture().unwrap();
        assert!(sim.end_branch().is_err());
        sim.begin_branch().unwrap();
        set(&mut sim, 1);
        assert!(sim.begin_branch().is_err());
        let first = sim.end_branch().unwrap();
        sim.begin_branch().unwrap();
        sim.copy(at, at.plus(2), 1).unwrap();
        let second = sim.end_branch().unwrap();
        set(&mut sim, 2);
        sim.wait_for(first).unwrap();
        sim.memset(at, 9, 1).unwrap();
        sim.wait_for(second).unwrap();
        let graph = sim.end_capture().unwrap();
        sim.launch_graph(graph).unwrap();
        let mut bytes = [0; 3];
        sim.download(at, &mut bytes).unwrap();
        // The second branch reads what the path wrote beside it.
        assert_eq!(bytes, [9, 2, 9]);

        sim.begin_capture().unwrap();
        sim.begin_branch().unwrap();
        set(&mut sim, 3);
        sim.end_branch().unwrap();
        assert!(sim.end_capture().unwrap_err().to_string().contains("not waited for"));
        assert!(sim.begin_branch().is_err(), "outside stream capture");
    }

    #[test]
    fn stream_capture_refuses_what_a_gpu_refuses() {
        let Some(mut sim) = sim() else { return };
        let at = sim.alloc(8).unwrap();
        sim.upload(at, &[1; 8]).unwrap();
        let fill = fill(at, 2);
        launch(&mut sim, &fill).unwrap();
        assert!(sim.end_capture().is_err());
        sim.begin_capture().unwrap();
        launch(&mut sim, &fill).unwrap();
        let refused = [
            sim.alloc(8).map(drop),
            sim.free(at),
            sim.upload(at, &[1; 8]),
            sim.download(at, &mut [0; 8]),
            sim.synchronize(),
            sim.begin_capture(),
            sim.load(families::GRAD_NORM),
        ];
        for (call, refused) in refused.iter().enumerate() {
            let said = refused.as_ref().unwrap_err().to_string();
            assert!(said.contains("during stream capture"), "call {call}: {said}");
        }
        sim.end_capture().unwrap();
        sim.synchronize().unwrap();
    }
}
