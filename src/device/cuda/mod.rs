//! A card, by its driver. This folder alone knows of CUDA's libraries.

mod cards;
mod libraries;
mod products;

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::{
    CudaContext, CudaEvent, CudaFunction, CudaGraph, CudaModule, CudaStream, sys,
};
use cudarc::nvrtc::Ptx;
use sys::CUdevice_attribute as Attribute;

use serde_json::{Value, json};

use self::products::{Choices, Products};
use super::driver::oldest_driver;
use super::{Address, Arg, Device, Graph, Launch, Mark, Product, launch};
use crate::dtype::Dtype;
use crate::error::error;
use crate::kernels::{BUILD, Kernel};

pub use libraries::{Library, cublaslt};

/// What a block may take of shared memory before it has to ask.
const SHARED_UNASKED: u32 = 48 << 10;

/// A card, its kernels, and one stream of work on it.
pub struct Cuda {
    // Fields are dropped in this order: what lives in a context before the context.
    graphs: Vec<CudaGraph>,
    marks: Vec<CudaEvent>,
    products: Option<Products>,
    /// Of an earlier run, until products are first asked for.
    chosen: Option<Choices>,
    functions: HashMap<String, Function>,
    modules: HashMap<&'static str, Arc<CudaModule>>,
    allocations: HashMap<Address, usize>,
    stream: Arc<CudaStream>,
    context: Arc<CudaContext>,
    /// Its name and multiprocessors: `NVIDIA H100 80GB HBM3, 132 SMs`.
    card: String,
    /// `NVIDIA H100 80GB HBM3, 132 SMs, driver of CUDA 13.0`
    description: String,
    /// Bytes of shared memory a block can have at most.
    most_shared: u32,
}

// SAFETY: the driver's handles may be used by any one thread at a time for which their context is
// current; every method makes it current first, and none can run twice at once without `&mut` or,
// for `download` and `memory`, does nothing but copy and ask.
unsafe impl Send for Cuda {}

struct Function {
    function: CudaFunction,
    /// Dynamic shared memory it was allowed so far.
    shared: u32,
}

/// How many cards the driver shows; 0 without a driver, or with one that does not start.
pub fn count() -> usize {
    if !libraries::driver() {
        return 0;
    }
    let count = result::init().and_then(|()| result::device::get_count());
    count.map_or(0, |count| count.max(0) as usize)
}

impl Cuda {
    /// The card of a number, from 0.
    pub fn new(ordinal: usize) -> anyhow::Result<Cuda> {
        let nvcc = BUILD.cuda.map_err(|why| {
            error(
                format!("this build has no kernels for a card: {why}"),
                "run scripts/setup-cuda, then build again; or use --backend cpu",
            )
        })?;
        if !libraries::driver() {
            return Err(error(
                "there is no NVIDIA driver: libcuda.so.1 was not found",
                "install the driver; in a container, pass the GPU in; or use --backend cpu",
            ));
        }
        result::init().map_err(|e| failed("starting the driver", e))?;
        let driver = driver_version().map_err(|e| failed("asking the driver", e))?;
        if driver / 1000 < nvcc.major() {
            return Err(error(
                format!(
                    "the driver is for CUDA {}.{}, the kernels were built with {}",
                    driver / 1000,
                    driver % 1000 / 10,
                    nvcc.version
                ),
                format!(
                    "update the driver to {} or newer, or build with an older nvcc (NVCC=...)",
                    oldest_driver(nvcc.major())
                ),
            ));
        }
        let cards = count();
        if ordinal >= cards {
            return Err(error(
                format!("there is no card {ordinal}; the driver shows {cards}"),
                "look at nvidia-smi and CUDA_VISIBLE_DEVICES, or use --backend cpu",
            ));
        }
        let context = CudaContext::new(ordinal).map_err(|e| failed("opening the card", e))?;
        // SAFETY: nothing here uses cudarc's own slices, which are what the events would guard.
        unsafe { context.disable_event_tracking() };
        let about = || -> Result<_, DriverError> {
            let (major, minor) = context.compute_capability()?;
            let sms = context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
            let shared = context
                .attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
            Ok((context.name()?, (major, minor), sms, shared as u32))
        };
        let (name, capability, sms, most_shared) =
            about().map_err(|e| failed("asking the card", e))?;
        if capability < (8, 0) {
            return Err(error(
                format!("{name} has compute capability {}.{}", capability.0, capability.1),
                "the kernels need 8.0 (Ampere) or newer; use --backend cpu",
            ));
        }
        let stream = context.new_stream().map_err(|e| failed("making a stream", e))?;
        let version = format!("{}.{}", driver / 1000, driver % 1000 / 10);
        let card = format!("{name}, {sms} SMs");
        let description = format!("{card}, driver for CUDA {version}");
        Ok(Cuda {
            graphs: Vec::new(),
            marks: Vec::new(),
            products: None,
            chosen: None,
            functions: HashMap::new(),
            modules: HashMap::new(),
            allocations: HashMap::new(),
            stream,
            context,
            card,
            description,
            most_shared,
        })
    }

    fn bind(&self) -> anyhow::Result<()> {
        self.context.bind_to_thread().map_err(|e| failed("using the card", e))
    }

    /// Loads a kernel when it is first asked for, and sees that it may have its shared memory.
    fn function(
        &mut self,
        kernel: &Kernel,
        entry: &str,
        shared: u32,
    ) -> anyhow::Result<sys::CUfunction> {
        if !self.functions.contains_key(entry) {
            if !self.modules.contains_key(kernel.name) {
                let module = self.context.load_module(Ptx::from_binary(kernel.fatbin.to_vec()));
                let module = module
                    .map_err(|e| failed(&format!("loading kernels/{}.cu", kernel.name), e))?;
                self.modules.insert(kernel.name, module);
            }
            let function = self.modules[kernel.name]
                .load_function(entry)
                .map_err(|e| failed(&format!("finding kernel {entry}"), e))?;
            self.functions.insert(entry.to_string(), Function { function, shared: SHARED_UNASKED });
        }
        let function = self.functions.get_mut(entry).expect("it was put there");
        if shared > function.shared {
            if shared > self.most_shared {
                return Err(error(
                    format!(
                        "kernel {entry} wants {shared} bytes of shared memory, the card has {}",
                        self.most_shared
                    ),
                    "this shape is too large for this card: report it",
                ));
            }
            let attribute =
                sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function
                .function
                .set_attribute(attribute, shared as i32)
                .map_err(|e| failed(&format!("giving shared memory to {entry}"), e))?;
            function.shared = shared;
        }
        Ok(function.function.cu_function())
    }
}

/// 13000 for CUDA 13.0.
fn driver_version() -> Result<u32, DriverError> {
    let mut version = 0;
    // SAFETY: the call writes one integer, and needs no context.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }.result()?;
    Ok(version as u32)
}

/// An error of the driver, in words.
fn failed(what: &str, driver: DriverError) -> anyhow::Error {
    use sys::CUresult as R;
    let hint = match driver.0 {
        R::CUDA_ERROR_OUT_OF_MEMORY => {
            "the card's memory is full: look at nvidia-smi; a smaller --batch_size or model takes less"
        }
        R::CUDA_ERROR_NO_DEVICE | R::CUDA_ERROR_INVALID_DEVICE => {
            "look at nvidia-smi and CUDA_VISIBLE_DEVICES, or use --backend cpu"
        }
        R::CUDA_ERROR_NO_BINARY_FOR_GPU
        | R::CUDA_ERROR_UNSUPPORTED_PTX_VERSION
        | R::CUDA_ERROR_INVALID_PTX => {
            "update the driver, or build for this card: LAAM_CUDA_ARCHS=90a cargo build --release"
        }
        R::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH | R::CUDA_ERROR_SYSTEM_NOT_READY => {
            "the driver and its libraries are of two versions: install them again, then reboot"
        }
        R::CUDA_ERROR_ILLEGAL_ADDRESS
        | R::CUDA_ERROR_MISALIGNED_ADDRESS
        | R::CUDA_ERROR_ILLEGAL_INSTRUCTION
        | R::CUDA_ERROR_LAUNCH_FAILED => {
            "a kernel went wrong: compute-sanitizer, or CUDA_LAUNCH_BLOCKING=1, tells which; report it"
        }
        _ => "laam doctor tells what was found of the driver and the card",
    };
    error(format!("{what}: {driver}"), hint)
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
            self.context.mem_get_info().map_err(|e| failed("asking for free memory", e))?;
        Ok((free as u64, total as u64))
    }

    fn alloc(&mut self, bytes: usize) -> anyhow::Result<Address> {
        self.bind()?;
        // SAFETY: a size above 0; the memory is freed by `free` or when the device is dropped.
        let address = unsafe { result::malloc_sync(bytes.max(1)) }
            .map_err(|e| failed(&format!("taking {bytes} bytes of the card's memory"), e))?;
        self.allocations.insert(Address(address), bytes);
        Ok(Address(address))
    }

    fn free(&mut self, address: Address) -> anyhow::Result<()> {
        self.synchronize()?;
        if self.allocations.remove(&address).is_some() {
            // SAFETY: it came from `alloc`, is freed once, and no work is under way.
            unsafe { result::free_sync(address.0) }.map_err(|e| failed("giving memory back", e))?;
        }
        Ok(())
    }

    fn upload(&mut self, to: Address, bytes: &[u8]) -> anyhow::Result<()> {
        self.bind()?;
        // SAFETY: copies from pageable memory return once they have read it. That the place is
        // large enough is the caller's word, and the driver refuses what no allocation covers.
        unsafe { result::memcpy_htod_async(to.0, bytes, self.stream.cu_stream()) }
            .map_err(|e| failed("copying to the card", e))
    }

    fn download(&self, from: Address, into: &mut [u8]) -> anyhow::Result<()> {
        self.bind()?;
        // SAFETY: as for `upload`; the borrow of `into` outlasts the wait.
        unsafe { result::memcpy_dtoh_async(into, from.0, self.stream.cu_stream()) }
            .map_err(|e| failed("copying from the card", e))?;
        self.stream.synchronize().map_err(|e| failed("waiting for the card", e))
    }

    fn fill(&mut self, at: Address, byte: u8, bytes: usize) -> anyhow::Result<()> {
        self.bind()?;
        // SAFETY: the place is the caller's, as for a kernel's arguments.
        unsafe { result::memset_d8_async(at.0, byte, bytes, self.stream.cu_stream()) }
            .map_err(|e| failed("filling memory", e))
    }

    fn copy(&mut self, from: Address, to: Address, bytes: usize) -> anyhow::Result<()> {
        self.bind()?;
        // SAFETY: the places are the caller's, as for a kernel's arguments.
        unsafe { result::memcpy_dtod_async(to.0, from.0, bytes, self.stream.cu_stream()) }
            .map_err(|e| failed("copying on the card", e))
    }

    fn load(&mut self, entry: &str) -> anyhow::Result<()> {
        let kernel = launch::find(entry)?.kernel;
        self.bind()?;
        self.function(kernel, entry, 0)?;
        Ok(())
    }

    fn launch(&mut self, launch: &Launch) -> anyhow::Result<()> {
        let kernel = launch.check()?;
        self.bind()?;
        let function = self.function(kernel, &launch.entry, launch.shared)?;
        let bits: Vec<u64> = launch.args.iter().map(Arg::bits).collect();
        let mut pointers: Vec<*mut c_void> =
            bits.iter().map(|bits| std::ptr::from_ref(bits).cast_mut().cast()).collect();
        let ([gx, gy, gz], [bx, by, bz]) = (launch.grid, launch.block);
        // SAFETY: number and sizes of the arguments are the kernel's (`Launch::check`), and the
        // driver copies them before it returns. The function's module lives in `self.modules`.
        // What the kernel does to the addresses is its contract with the launch code.
        unsafe {
            result::launch_kernel(
                function,
                (gx, gy, gz),
                (bx, by, bz),
                launch.shared,
                self.stream.cu_stream(),
                &mut pointers,
            )
        }
        .map_err(|e| failed(&format!("starting kernel {}", launch.entry), e))
    }

    fn product(&mut self, product: &Product) -> anyhow::Result<()> {
        self.bind()?;
        if self.products.is_none() {
            let workspace = self.alloc(Products::WORKSPACE)?;
            let mut products = Products::new(workspace)?;
            if let Some(choices) = self.chosen.take() {
                products.choose(choices);
            }
            self.products = Some(products);
        }
        let products = self.products.as_mut().expect("it was made above");
        products.run(product, self.stream.cu_stream())
    }

    fn record(&mut self) -> anyhow::Result<()> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.stream.begin_capture(mode).map_err(|e| failed("recording a graph", e))
    }

    fn finish(&mut self) -> anyhow::Result<Graph> {
        let graph = self
            .stream
            .end_capture(sys::CUgraphInstantiate_flags(0))
            .map_err(|e| failed("making a graph", e))?
            .ok_or_else(|| error("the driver recorded no graph", "report it"))?;
        graph.upload().map_err(|e| failed("sending a graph to the card", e))?;
        self.graphs.push(graph);
        Ok(Graph(self.graphs.len() - 1))
    }

    fn replay(&mut self, Graph(graph): Graph) -> anyhow::Result<()> {
        self.graphs[graph].launch().map_err(|e| failed("starting a graph", e))
    }

    fn mark(&mut self) -> anyhow::Result<Mark> {
        let flags = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
        let event = self.stream.record_event(flags).map_err(|e| failed("making an event", e))?;
        self.marks.push(event);
        Ok(Mark(self.marks.len() - 1))
    }

    fn seconds(&mut self, Mark(from): Mark, Mark(to): Mark) -> anyhow::Result<f64> {
        // The one call this program makes that drivers before CUDA 12.8 do not have.
        let driver = driver_version().map_err(|e| failed("asking the driver", e))?;
        if driver < 12_080 {
            return Err(error(
                "this driver cannot time events",
                "update it to one for CUDA 12.8 or newer",
            ));
        }
        let ms = self.marks[from].elapsed_ms(&self.marks[to]);
        Ok(f64::from(ms.map_err(|e| failed("timing", e))?) / 1e3)
    }

    fn forget_marks(&mut self) {
        self.marks.clear();
    }

    fn synchronize(&mut self) -> anyhow::Result<()> {
        self.bind()?;
        self.stream.synchronize().map_err(|e| failed("waiting for the card", e))
    }

    fn peak(&self, dtype: Dtype) -> Option<f64> {
        cards::peak(&self.card, dtype)
    }

    fn choices(&self) -> Value {
        let Some(products) = &self.products else { return Value::Null };
        json!({ "card": self.card, "cublaslt": products.choices() })
    }

    fn choose(&mut self, choices: &Value) -> Option<String> {
        let here = |what: &str| {
            Some(format!(
                "warning: the checkpoint's matrix products were chosen for another {what}: this run \
                 chooses anew, and need not repeat an unbroken one bit for bit"
            ))
        };
        if choices["card"] != self.card.as_str() {
            return here("card");
        }
        let chosen: Option<Choices> = serde_json::from_value(choices["cublaslt"].clone()).ok();
        match chosen {
            Some(chosen) if cublaslt() != Library::Missing => {
                if chosen.version != Products::version() {
                    return here("version of cuBLASLt");
                }
                match &mut self.products {
                    Some(products) => products.choose(chosen),
                    None => self.chosen = Some(chosen),
                }
                None
            }
            _ => here("cuBLASLt"),
        }
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        // Nothing is left to report an error to; after one, the driver frees all with the context.
        let _ = self.synchronize();
        self.graphs.clear();
        for (address, _) in self.allocations.drain() {
            // SAFETY: each came from `alloc` and was not freed; no work is under way.
            let _ = unsafe { result::free_sync(address.0) };
        }
    }
}
