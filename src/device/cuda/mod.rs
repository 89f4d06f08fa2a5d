//! A GPU, through its driver. Only this folder names CUDA's libraries.

mod cublaslt;
mod gpus;
mod libraries;
mod nccl;
mod shared;
mod tuning;

use std::env;
use std::ffi::c_void;
use std::path::PathBuf;
use std::sync::Arc;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::{CudaContext, CudaEvent, CudaGraph, CudaStream, sys};
use sys::CUdevice_attribute as Attribute;

use serde_json::{Value, json};

use self::cublaslt::{CublasLt, PinnedPlans};
use self::nccl::{Communicator, Exchanges};
use self::shared::SharedGpu;
use super::address::{Allocations, Used};
use super::driver::{Library, OLDEST_CUDA, OLDEST_DRIVER};
use super::{Address, Branch, Device, Event, Graph, Launch, Matmul, staged};
use crate::collective::Group;
use crate::dtype::Dtype;
use crate::error;
use crate::kernels::{BUILD, Kernel};

pub use libraries::cublaslt;
pub use nccl::{NcclLibrary, nccl};

struct CapturedGraph {
    graph: CudaGraph,
    used: Used,
    /// Number of its last exchange.
    exchange: Option<u64>,
}

/// A GPU, its kernels, and one stream, beside which a second one captures side branches.
pub struct Cuda {
    // Fields are dropped in this order: the context last, after everything in it.
    graphs: Vec<CapturedGraph>,
    events: Vec<CudaEvent>,
    /// `None` before its first use, and if there is none.
    cublaslt: Option<CublasLt>,
    allocations: Allocations,
    /// Folder of the choices of matmul algorithms by their times; `None` if the heuristic decides.
    tuned: Option<PathBuf>,
    /// Between `begin_capture` and `end_capture`.
    captures: bool,
    /// Nothing is executed: see [`Device::set_planning`].
    planning: bool,
    /// Number of the last exchange in the capture.
    captured_exchange: Option<u64>,
    /// Ends of the side branches of the capture.
    branches: Vec<CudaEvent>,
    /// Between `begin_branch` and `end_branch`.
    in_branch: bool,
    group: Group,
    exchanges: Exchanges,
    stream: Arc<CudaStream>,
    /// The stream whose capture is the side branches.
    side_stream: Arc<CudaStream>,
    context: Arc<CudaContext>,
    shared: Arc<SharedGpu>,
    /// Name and multiprocessors: `NVIDIA H100 80GB HBM3, 132 SMs`.
    gpu: String,
    /// `NVIDIA H100 80GB HBM3, 132 SMs, driver of CUDA 13.0`
    description: String,
}

// SAFETY: the driver's handles may be used by any thread on which their context is current, one at a
// time. Every method makes the context current first; `&mut self` excludes concurrent calls, and the
// type is not `Sync`.
unsafe impl Send for Cuda {}

/// Number of GPUs the driver shows; 0 without a driver or if it fails to initialize.
pub fn count() -> usize {
    if !libraries::driver() || libraries::missing_driver_symbol().is_some() {
        return 0;
    }
    let count = result::init().and_then(|()| result::device::get_count());
    count.map_or(0, |count| count.max(0) as usize)
}

/// For every two GPUs: true if the first reaches the memory of the second.
pub fn peers() -> Vec<Vec<bool>> {
    let count = count() as i32;
    let reaches = |from: i32, to: i32| {
        let mut reaches = 0;
        // SAFETY: the driver is initialized (`count`), has the symbol, and writes one integer.
        let asked = unsafe { sys::cuDeviceCanAccessPeer(&raw mut reaches, from, to) };
        asked.result().is_ok() && reaches != 0
    };
    (0..count).map(|from| (0..count).map(|to| from != to && reaches(from, to)).collect()).collect()
}

impl Cuda {
    /// The GPU with this ordinal, from 0.
    pub fn new(ordinal: usize) -> anyhow::Result<Cuda> {
        let nvcc = BUILD.cuda.map_err(|why| {
            error::device(
                format!("this build has no CUDA kernels: {why}"),
                "run scripts/setup-cuda, then build again; or set `backend` to cpu",
            )
        })?;
        if !libraries::driver() {
            return Err(error::device(
                "no NVIDIA driver: libcuda.so.1 was not found",
                "install the driver; in a container, pass the GPU in; or set `backend` to cpu",
            ));
        }
        if let Some(symbol) = libraries::missing_driver_symbol() {
            return Err(error::device(
                format!("the driver's libcuda.so.1 has no {symbol}"),
                format!("update the driver to {OLDEST_DRIVER} or newer"),
            ));
        }
        result::init().map_err(|e| failed("initializing the driver", e))?;
        let driver = driver_version().map_err(|e| failed("querying the driver", e))?;
        if driver / 1000 < OLDEST_CUDA {
            return Err(error::device(
                format!(
                    "the driver supports CUDA {}.{}, but the kernels need {OLDEST_CUDA}.0",
                    driver / 1000,
                    driver % 1000 / 10
                ),
                format!("update the driver to {OLDEST_DRIVER} or newer; or set `backend` to cpu"),
            ));
        }
        let gpus = count();
        if ordinal >= gpus {
            return Err(error::device(
                format!("no GPU {ordinal}: the driver shows {gpus}"),
                "check nvidia-smi and CUDA_VISIBLE_DEVICES, or set `backend` to cpu",
            ));
        }
        let shared = SharedGpu::open(ordinal, &nvcc, driver)?;
        let context = shared.context.clone();
        let about = || -> Result<_, DriverError> {
            let sms = context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
            Ok((context.name()?, context.compute_capability()?, sms))
        };
        let (name, capability, sms) = about().map_err(|e| failed("querying the GPU", e))?;
        if capability < (8, 0) {
            return Err(error::device(
                format!("{name} has compute capability {}.{}", capability.0, capability.1),
                "the kernels need 8.0 (Ampere) or newer; set `backend` to cpu",
            ));
        }
        let stream = || context.new_stream().map_err(|e| failed("creating a stream", e));
        let (stream, side_stream) = (stream()?, stream()?);
        let version = format!("{}.{}", driver / 1000, driver % 1000 / 10);
        let gpu = format!("{name}, {sms} SMs");
        let description = format!("{gpu}, driver for CUDA {version}");
        Ok(Cuda {
            graphs: Vec::new(),
            events: Vec::new(),
            cublaslt: None,
            allocations: Allocations::default(),
            tuned: None,
            captures: false,
            planning: false,
            captured_exchange: None,
            branches: Vec::new(),
            in_branch: false,
            group: Group::alone(),
            exchanges: Exchanges::Staged("one process".to_string()),
            stream,
            side_stream,
            context,
            shared,
            gpu,
            description,
        })
    }

    /// Chooses matmul algorithms by their times, and keeps the choices in `folder`.
    #[must_use]
    pub fn with_tuned_matmuls(mut self, folder: PathBuf) -> Cuda {
        self.tuned = Some(folder);
        self
    }

    fn bind(&self) -> anyhow::Result<()> {
        self.context.bind_to_thread().map_err(|e| failed("making the context current", e))
    }

    /// The stream that work is queued on.
    fn current(&self) -> sys::CUstream {
        if self.in_branch { self.side_stream.cu_stream() } else { self.stream.cu_stream() }
    }

    /// An event after the work queued so far.
    fn mark(&self) -> anyhow::Result<CudaEvent> {
        let flags = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
        self.stream.record_event(flags).map_err(|e| failed("recording an event", e))
    }

    /// Waits for the stream. An exchange that cannot end is an error.
    fn wait(&self) -> anyhow::Result<()> {
        let done = self.stream.synchronize().map_err(|e| failed("waiting for the GPU", e));
        if let Exchanges::Nccl(communicator) = &self.exchanges {
            communicator.check()?;
        }
        done
    }

    /// An exchange by NCCL between two ranges of memory, which a capture records.
    fn exchange(
        &mut self,
        (from, sent): (Address, usize),
        (into, received): (Address, usize),
        call: impl FnOnce(&mut Communicator, u64, u64, sys::CUstream) -> anyhow::Result<u64>,
    ) -> anyhow::Result<()> {
        self.bind()?;
        let from = self.allocations.range(from, sent)?;
        let into = self.allocations.range(into, received)?;
        let Exchanges::Nccl(communicator) = &mut self.exchanges else {
            return Err(error::internal("an exchange without NCCL"));
        };
        let call = call(communicator, from, into, self.stream.cu_stream())?;
        if self.captures {
            self.captured_exchange = Some(call);
            return Ok(());
        }
        communicator.mark(&self.stream, call)
    }

    /// An error outside stream capture, or if a side branch is begun or not, other than expected.
    fn check_branch(&self, in_branch: bool) -> anyhow::Result<()> {
        if self.captures && self.in_branch == in_branch {
            return Ok(());
        }
        Err(error::internal("a call of side branches out of order"))
    }

    /// Plans a matmul: by times in rank 0 alone, whose choice the others take.
    fn plan(&mut self, matmul: &Matmul) -> anyhow::Result<()> {
        if let Some(folder) = self.tuned.clone().filter(|_| self.group.is_first())
            && self.cublaslt()?.is_some_and(|cublaslt| cublaslt.is_new(matmul))
        {
            let path = tuning::file(&folder, &self.gpu);
            self.planning = false;
            let tuned = self.tune(matmul, &path);
            self.planning = true;
            tuned?;
        }
        self.cublaslt()?.map_or(Ok(()), |cublaslt| cublaslt.plan(matmul))
    }

    /// cuBLASLt, opened on first use, if there is one.
    fn cublaslt(&mut self) -> anyhow::Result<Option<&mut CublasLt>> {
        if self.cublaslt.is_none()
            && let Some(handle) = self.shared.cublaslt()?
        {
            let bytes = CublasLt::WORKSPACE_BYTES;
            let workspaces = self.alloc(2 * bytes)?;
            let workspaces = self.allocations.range(workspaces, 2 * bytes)?;
            let mut cublaslt = CublasLt::new(handle, workspaces);
            let path = self.tuned.as_ref().map(|folder| tuning::file(folder, &self.gpu));
            if let Some(plans) = path.and_then(|path| tuning::earlier(&path)) {
                // What is refused is timed again.
                cublaslt.pin(plans);
            }
            self.cublaslt = Some(cublaslt);
        }
        Ok(self.cublaslt.as_mut())
    }
}

/// Seconds between two events of a stream, which are waited for.
fn seconds_between(from: &CudaEvent, to: &CudaEvent) -> Result<f64, DriverError> {
    from.synchronize()?;
    to.synchronize()?;
    let mut ms = 0.0;
    let elapsed = libraries::event_elapsed_time();
    // SAFETY: the call writes one f32; both events are alive.
    unsafe { elapsed(&raw mut ms, from.cu_event(), to.cu_event()) }.result()?;
    Ok(f64::from(ms) / 1e3)
}

/// CUDA version of the driver: 13000 for 13.0.
fn driver_version() -> Result<u32, DriverError> {
    let mut version = 0;
    // SAFETY: the call writes one integer to a valid pointer, and needs no context.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }.result()?;
    Ok(version as u32)
}

/// A driver error with a hint.
fn failed(what: &str, driver: DriverError) -> anyhow::Error {
    use sys::CUresult as R;
    let hint = match driver.0 {
        R::CUDA_ERROR_OUT_OF_MEMORY => {
            "GPU memory is full: check nvidia-smi, decrease `batch_size`, or train a smaller model"
        }
        R::CUDA_ERROR_NO_DEVICE | R::CUDA_ERROR_INVALID_DEVICE => {
            "check nvidia-smi and CUDA_VISIBLE_DEVICES, or set `backend` to cpu"
        }
        R::CUDA_ERROR_NO_BINARY_FOR_GPU
        | R::CUDA_ERROR_UNSUPPORTED_PTX_VERSION
        | R::CUDA_ERROR_INVALID_PTX => {
            "update the driver, or build for this GPU: LAAM_CUDA_ARCHS=90a cargo build --release"
        }
        R::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH | R::CUDA_ERROR_SYSTEM_NOT_READY => {
            "the driver and its libraries have different versions: reinstall them, then reboot"
        }
        R::CUDA_ERROR_ILLEGAL_ADDRESS
        | R::CUDA_ERROR_MISALIGNED_ADDRESS
        | R::CUDA_ERROR_ILLEGAL_INSTRUCTION
        | R::CUDA_ERROR_LAUNCH_FAILED => {
            "a kernel failed: compute-sanitizer or CUDA_LAUNCH_BLOCKING=1 shows which; report it"
        }
        _ => "laam doctor shows what was found of the driver and the GPU",
    };
    let text = driver.error_string().ok().and_then(|text| text.to_str().ok());
    let text = text.unwrap_or("an error the driver does not describe");
    error::device(format!("{what}: {text} ({:?})", driver.0), hint)
}

impl Device for Cuda {
    fn name(&self) -> &'static str {
        "cuda"
    }

    fn describe(&self) -> String {
        self.description.clone()
    }

    fn memory(&self) -> anyhow::Result<(u64, u64)> {
        let (free, total) =
            self.context.mem_get_info().map_err(|e| failed("querying free memory", e))?;
        Ok((free as u64, total as u64))
    }

    fn alloc(&mut self, bytes: usize) -> anyhow::Result<Address> {
        self.bind()?;
        // SAFETY: the size is above 0; the memory is freed once, by `free` or by `drop`.
        let place = unsafe { result::malloc_sync(bytes.max(1)) }
            .map_err(|e| failed(&format!("allocating {bytes} bytes of GPU memory"), e))?;
        Ok(self.allocations.insert(place, bytes))
    }

    fn free(&mut self, address: Address) -> anyhow::Result<()> {
        self.synchronize()?;
        let place = self.allocations.remove(address)?;
        // SAFETY: it came from `alloc`, is freed once, and no work is in flight; graphs that use it are
        // refused from now on.
        unsafe { result::free_sync(place) }.map_err(|e| failed("freeing memory", e))
    }

    fn upload(&mut self, to: Address, bytes: &[u8]) -> anyhow::Result<()> {
        self.bind()?;
        let to = self.allocations.peek(to, bytes.len())?;
        // SAFETY: a copy from pageable memory returns after it has read `bytes`; the destination is in a
        // live allocation.
        unsafe { result::memcpy_htod_async(to, bytes, self.stream.cu_stream()) }
            .map_err(|e| failed("copying to the GPU", e))
    }

    fn download(&self, from: Address, into: &mut [u8]) -> anyhow::Result<()> {
        self.bind()?;
        let from = self.allocations.peek(from, into.len())?;
        // SAFETY: `into` is borrowed until the stream is synchronized below; the source is in a live
        // allocation.
        unsafe { result::memcpy_dtoh_async(into, from, self.stream.cu_stream()) }
            .map_err(|e| failed("copying from the GPU", e))?;
        self.wait()
    }

    fn memset(&mut self, at: Address, byte: u8, bytes: usize) -> anyhow::Result<()> {
        if self.planning {
            return Ok(());
        }
        self.bind()?;
        let at = self.allocations.range(at, bytes)?;
        // SAFETY: the range is in a live allocation, which is freed after all work (`free`).
        unsafe { result::memset_d8_async(at, byte, bytes, self.current()) }
            .map_err(|e| failed("setting memory", e))
    }

    fn copy(&mut self, from: Address, to: Address, bytes: usize) -> anyhow::Result<()> {
        if self.planning {
            return Ok(());
        }
        self.bind()?;
        let from = self.allocations.range(from, bytes)?;
        let to = self.allocations.range(to, bytes)?;
        // SAFETY: both ranges are in live allocations, which are freed after all work (`free`).
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.current()) }
            .map_err(|e| failed("copying on the GPU", e))
    }

    fn load(&mut self, kernel: Kernel) -> anyhow::Result<()> {
        let module = kernel.module()?;
        self.bind()?;
        self.shared.function(module, kernel.name(), 0)?;
        Ok(())
    }

    unsafe fn launch(&mut self, launch: &Launch) -> anyhow::Result<()> {
        if self.planning {
            return Ok(());
        }
        let module = launch.check()?;
        self.bind()?;
        let function = self.shared.function(module, launch.kernel.name(), launch.shared)?;
        let values = launch.values(&mut self.allocations)?;
        let mut pointers: Vec<*mut c_void> =
            values.iter().map(|bits| std::ptr::from_ref(bits).cast_mut().cast()).collect();
        let ([gx, gy, gz], [bx, by, bz]) = (launch.grid, launch.block);
        // SAFETY: number and sizes of the arguments match the kernel's parameters (`Launch::check`),
        // the driver copies them before it returns, and the function's module lives as long as the
        // process. The caller promises that the kernel stays within the allocations of its arguments.
        unsafe {
            result::launch_kernel(
                function,
                (gx, gy, gz),
                (bx, by, bz),
                launch.shared,
                self.current(),
                &mut pointers,
            )
        }
        .map_err(|e| failed(&format!("launching kernel {}", launch.kernel.name()), e))
    }

    fn matmul(&mut self, matmul: &Matmul) -> anyhow::Result<()> {
        self.bind()?;
        if self.planning {
            return self.plan(matmul);
        }
        let places = matmul.places(&mut self.allocations)?;
        let (stream, in_branch) = (self.current(), self.in_branch);
        if let Some(folder) = self.tuned.clone().filter(|_| !self.captures)
            && self.cublaslt()?.is_some_and(|cublaslt| cublaslt.is_new(matmul))
        {
            let path = tuning::file(&folder, &self.gpu);
            self.tune(matmul, &path)?;
        }
        if let Some(cublaslt) = self.cublaslt()?
            && cublaslt.run(matmul, places, stream, in_branch)?
        {
            return Ok(());
        }
        // SAFETY: `places` found all elements of the matrices in their ranges, and the kernel accesses no
        // others.
        matmul.launches()?.iter().try_for_each(|launch| unsafe { self.launch(launch) })
    }

    fn join(&mut self, group: Group) -> anyhow::Result<()> {
        self.bind()?;
        self.exchanges = Communicator::open(&group, &self.context)?;
        self.group = group;
        Ok(())
    }

    fn exchanges(&self) -> String {
        match &self.exchanges {
            Exchanges::Nccl(communicator) => communicator.describe(),
            Exchanges::Staged(why) => {
                format!("staged through the hosts over {}: {why}", self.group.world().library)
            }
        }
    }

    fn all_to_all(&mut self, from: Address, into: Address, piece: usize) -> anyhow::Result<()> {
        if self.planning {
            return Ok(());
        }
        if !self.captures_exchanges() {
            return staged::all_to_all(self, from, into, piece);
        }
        let bytes = piece * self.group.size();
        self.exchange((from, bytes), (into, bytes), |communicator, from, into, stream| {
            communicator.all_to_all(from, into, piece, stream)
        })
    }

    fn all_gather(&mut self, from: Address, into: Address, piece: usize) -> anyhow::Result<()> {
        if self.planning {
            return Ok(());
        }
        if !self.captures_exchanges() {
            return staged::all_gather(self, from, into, piece);
        }
        let bytes = piece * self.group.size();
        self.exchange((from, piece), (into, bytes), |communicator, from, into, stream| {
            communicator.all_gather(from, into, piece, stream)
        })
    }

    fn captures_exchanges(&self) -> bool {
        matches!(self.exchanges, Exchanges::Nccl(_))
    }

    fn group(&self) -> &Group {
        &self.group
    }

    fn begin_capture(&mut self) -> anyhow::Result<()> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.stream.begin_capture(mode).map_err(|e| failed("beginning stream capture", e))?;
        self.captures = true;
        self.in_branch = false;
        self.allocations.begin_capture();
        self.captured_exchange = None;
        Ok(())
    }

    fn end_capture(&mut self) -> anyhow::Result<Graph> {
        self.captures = false;
        self.in_branch = false;
        self.branches.clear();
        let used = self.allocations.end_capture();
        let graph = self
            .stream
            .end_capture(sys::CUgraphInstantiate_flags(0))
            .map_err(|e| failed("instantiating a graph", e))?
            .ok_or_else(|| error::internal("stream capture gave no graph"))?;
        graph.upload().map_err(|e| failed("uploading a graph", e))?;
        self.graphs.push(CapturedGraph { graph, used, exchange: self.captured_exchange });
        Ok(Graph(self.graphs.len() - 1))
    }

    fn begin_branch(&mut self) -> anyhow::Result<()> {
        self.check_branch(false)?;
        let begun = self.stream.record_event(None).and_then(|event| self.side_stream.wait(&event));
        begun.map_err(|e| failed("beginning a side branch", e))?;
        self.in_branch = true;
        Ok(())
    }

    fn end_branch(&mut self) -> anyhow::Result<Branch> {
        self.check_branch(true)?;
        let end = self.side_stream.record_event(None);
        self.branches.push(end.map_err(|e| failed("ending a side branch", e))?);
        self.in_branch = false;
        Ok(Branch(self.branches.len() - 1))
    }

    fn wait_for(&mut self, Branch(branch): Branch) -> anyhow::Result<()> {
        self.check_branch(false)?;
        let waited = self.stream.wait(&self.branches[branch]);
        waited.map_err(|e| failed("waiting for a side branch", e))
    }

    fn launch_graph(&mut self, Graph(graph): Graph) -> anyhow::Result<()> {
        let CapturedGraph { graph, used, exchange } = &self.graphs[graph];
        self.allocations.check(used)?;
        graph.launch().map_err(|e| failed("launching a graph", e))?;
        match (exchange, &self.exchanges) {
            (Some(call), Exchanges::Nccl(communicator)) => communicator.mark(&self.stream, *call),
            _ => Ok(()),
        }
    }

    fn record_event(&mut self) -> anyhow::Result<Event> {
        let event = self.mark()?;
        self.events.push(event);
        Ok(Event(self.events.len() - 1))
    }

    fn elapsed(&mut self, Event(from): Event, Event(to): Event) -> anyhow::Result<f64> {
        let (from, to) = (&self.events[from], &self.events[to]);
        seconds_between(from, to).map_err(|e| failed("timing events", e))
    }

    fn clear_events(&mut self) {
        self.events.clear();
    }

    fn synchronize(&mut self) -> anyhow::Result<()> {
        self.bind()?;
        self.wait()
    }

    fn peak_flops(&self, dtype: Dtype) -> Option<f64> {
        gpus::peak_flops(&self.gpu, dtype)
    }

    fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        if self.shared.compiles_ptx() {
            let is_set = |name| env::var_os(name).filter(|value| !value.is_empty());
            notes.push(if is_set("CUDA_CACHE_DISABLE").is_some_and(|value| value != "0") {
                "note: the driver compiles the kernels for this GPU in every run, which takes tens of \
                 seconds: CUDA_CACHE_DISABLE is set"
                    .to_string()
            } else {
                let folder = is_set("CUDA_CACHE_PATH").unwrap_or("~/.nv/ComputeCache".into());
                format!(
                    "note: the driver compiles the kernels for this GPU: tens of seconds the first \
                     time, then they are in {} (CUDA_CACHE_PATH)",
                    folder.display()
                )
            });
        }
        if cublaslt() == Library::Missing && libraries::given_cublaslt().is_none() {
            notes.push(
                "note: no cuBLASLt: matmuls run on laam's own kernel, and would be faster with it: pip \
                 install nvidia-cublas in a virtual environment and activate it, or set LAAM_CUBLASLT \
                 to the path of libcublasLt.so.13 or .12"
                    .to_string(),
            );
        }
        notes.extend(self.tuned.as_deref().and_then(tuning::note));
        notes
    }

    fn matmul_plans(&self) -> Value {
        json!({ "gpu": self.gpu, "cublaslt": self.cublaslt.as_ref().map(CublasLt::plans) })
    }

    fn chooses_matmuls(&self) -> bool {
        cublaslt() != Library::Missing
    }

    fn set_planning(&mut self, on: bool) {
        self.planning = on;
    }

    fn pin_matmul_plans(&mut self, plans: &Value) -> Option<String> {
        let differs = |what: &str| {
            Some(format!(
                "warning: the checkpoint's matmul algorithms were chosen for another {what}: this \
                 run chooses its own, and may differ from an uninterrupted one in the last bits"
            ))
        };
        // Checkpoints of earlier versions call it `card`.
        let gpu = plans.get("gpu").or_else(|| plans.get("card"));
        if gpu.and_then(Value::as_str) != Some(self.gpu.as_str()) {
            return differs("GPU");
        }
        let here = cublaslt() != Library::Missing;
        if plans["cublaslt"].is_null() {
            // The run had no cuBLASLt.
            return if here { differs("matmul kernel") } else { None };
        }
        let pinned: Option<PinnedPlans> = serde_json::from_value(plans["cublaslt"].clone()).ok();
        match pinned {
            Some(pinned) if here => {
                if pinned.version != CublasLt::version() {
                    return differs("version of cuBLASLt");
                }
                let pinning = self
                    .bind()
                    .and_then(|()| Ok(self.cublaslt()?.map_or(0, |cublaslt| cublaslt.pin(pinned))));
                match pinning {
                    Ok(0) => None,
                    Ok(refused) => Some(format!(
                        "warning: cuBLASLt refuses {refused} of the checkpoint's matmul algorithms: \
                         this run chooses others, and may differ from an uninterrupted one in the \
                         last bits"
                    )),
                    Err(why) => Some(format!(
                        "warning: the checkpoint's matmul algorithms cannot be restored ({why:#}): \
                         this run chooses its own, and may differ from an uninterrupted one in the \
                         last bits"
                    )),
                }
            }
            _ => differs("cuBLASLt"),
        }
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        // `drop` cannot report an error; after one, the driver frees everything with the context.
        let _ = self.synchronize();
        // A communicator waits for the graphs that it is part of.
        self.graphs.clear();
        self.exchanges = Exchanges::Staged(String::new());
        for place in self.allocations.drain() {
            // SAFETY: each came from `alloc` and was not freed; no work is in flight.
            let _ = unsafe { result::free_sync(place) };
        }
    }
}
