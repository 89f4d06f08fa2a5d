//! A GPU's primary context, kernels and cuBLASLt handle, one for the process.
//!
//! They live until the process ends: releasing the primary context destroys all that libraries hold in
//! it, and opening it again costs tenths of a second.

use std::collections::HashMap;
use std::env;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::cublaslt::{self, sys::cublasLtHandle_t};
use cudarc::driver::{CudaContext, CudaFunction, CudaModule, sys};
use cudarc::nvrtc::Ptx;
use sys::CUfunction_attribute as FunctionAttribute;

use super::failed;
use super::libraries;
use crate::device::driver::Library;
use crate::{error, kernels};

/// Shared memory per block that needs no opt-in, static and dynamic, in bytes.
const DEFAULT_SHARED_BYTES: u32 = 48 << 10;

/// A GPU as this process holds it.
pub(super) struct SharedGpu {
    pub context: Arc<CudaContext>,
    /// Limit of shared memory per block with opt-in, static and dynamic, in bytes.
    max_shared: u32,
    image: Image,
    kernels: Mutex<Kernels>,
    cublaslt: Mutex<Option<CublasLtHandle>>,
}

/// The form in which the driver is given the kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Image {
    /// SASS of this build.
    Fatbin,
    /// PTX with line tables, which the driver compiles: on request.
    Ptx,
    /// PTX that every supported driver compiles: the build has no SASS for this GPU, or the driver is
    /// older than nvcc.
    PortablePtx,
}

impl Image {
    /// The form for a GPU and its driver, whose CUDA version is 13000 for 13.0.
    fn choose(nvcc: &kernels::Nvcc, capability: (i32, i32), driver: u32) -> Image {
        let asked =
            env::var_os("LAAM_CUDA_PTX").is_some_and(|value| !value.is_empty() && value != "0");
        match driver / 1000 >= nvcc.major() {
            true if asked => Image::Ptx,
            true if nvcc.has_sass(capability) => Image::Fatbin,
            _ => Image::PortablePtx,
        }
    }

    fn of(self, module: &'static kernels::CudaModule) -> Ptx {
        match self {
            Image::Fatbin => Ptx::from_binary(module.fatbin.to_vec()),
            Image::Ptx => Ptx::from_src(module.ptx()),
            Image::PortablePtx => Ptx::from_src(kernels::portable(module.ptx())),
        }
    }
}

#[derive(Default)]
struct Kernels {
    modules: HashMap<&'static str, Arc<CudaModule>>,
    functions: HashMap<String, Function>,
}

struct Function {
    entry: CudaFunction,
    /// Its static shared memory, in bytes.
    static_shared: u32,
    /// Dynamic shared memory it may use, in bytes.
    dynamic_shared: u32,
}

#[derive(Clone, Copy)]
struct CublasLtHandle(cublasLtHandle_t);

// SAFETY: cuBLASLt is thread-safe, and its handle belongs to no thread.
unsafe impl Send for CublasLtHandle {}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl SharedGpu {
    /// The GPU with this ordinal, opened on first use, for kernels of this build and a driver of this CUDA
    /// version.
    pub fn open(
        ordinal: usize,
        nvcc: &kernels::Nvcc,
        driver: u32,
    ) -> anyhow::Result<Arc<SharedGpu>> {
        static OPEN: Mutex<Option<HashMap<usize, Arc<SharedGpu>>>> = Mutex::new(None);
        let mut open = lock(&OPEN);
        let open = open.get_or_insert_with(HashMap::new);
        if let Some(shared) = open.get(&ordinal) {
            return Ok(shared.clone());
        }
        let context = CudaContext::new(ordinal).map_err(|e| failed("opening the GPU", e))?;
        // SAFETY: event tracking synchronizes cudarc's own slices, and no such slice is created.
        unsafe { context.disable_event_tracking() };
        let limit = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        let max_shared = context.attribute(limit).map_err(|e| failed("querying the GPU", e))?;
        let capability = context.compute_capability().map_err(|e| failed("querying the GPU", e))?;
        let shared = Arc::new(SharedGpu {
            context,
            max_shared: max_shared as u32,
            image: Image::choose(nvcc, capability, driver),
            kernels: Mutex::default(),
            cublaslt: Mutex::default(),
        });
        open.insert(ordinal, shared.clone());
        Ok(shared)
    }

    /// True if the driver compiles the kernels, which takes long the first time.
    pub fn compiles_ptx(&self) -> bool {
        self.image != Image::Fatbin
    }

    /// The function of a kernel, loaded on first use and opted in to its dynamic shared memory. The
    /// context is current.
    pub fn function(
        &self,
        module: &'static kernels::CudaModule,
        entry: &str,
        shared: u32,
    ) -> anyhow::Result<sys::CUfunction> {
        let mut kernels = lock(&self.kernels);
        if !kernels.functions.contains_key(entry) {
            if !kernels.modules.contains_key(module.name) {
                let loaded = self
                    .context
                    .load_module(self.image.of(module))
                    .map_err(|e| failed(&format!("loading kernels/{}.cu", module.name), e))?;
                kernels.modules.insert(module.name, loaded);
            }
            let function = kernels.modules[module.name]
                .load_function(entry)
                .map_err(|e| failed(&format!("finding kernel {entry}"), e))?;
            let static_shared = function
                .get_attribute(FunctionAttribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)
                .map_err(|e| failed(&format!("querying kernel {entry}"), e))?
                as u32;
            let dynamic_shared = DEFAULT_SHARED_BYTES.saturating_sub(static_shared);
            let function = Function { entry: function, static_shared, dynamic_shared };
            kernels.functions.insert(entry.to_string(), function);
        }
        let function = kernels.functions.get_mut(entry).expect("it was put there");
        if shared > function.dynamic_shared {
            let needed = shared.saturating_add(function.static_shared);
            if needed > self.max_shared {
                return Err(error::device(
                    format!(
                        "kernel {entry} needs {needed} bytes of shared memory, but the GPU has {}",
                        self.max_shared
                    ),
                    "this shape is too large for this GPU; set `backend` to cpu",
                ));
            }
            let attribute = FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function
                .entry
                .set_attribute(attribute, shared as i32)
                .map_err(|e| failed(&format!("setting the shared memory of {entry}"), e))?;
            function.dynamic_shared = shared;
        }
        Ok(function.entry.cu_function())
    }

    /// The cuBLASLt handle, created on first use; `None` if there is no cuBLASLt. The context is current.
    pub fn cublaslt(&self) -> anyhow::Result<Option<cublasLtHandle_t>> {
        let mut handle = lock(&self.cublaslt);
        if let Some(CublasLtHandle(handle)) = *handle {
            return Ok(Some(handle));
        }
        if libraries::cublaslt() == Library::Missing {
            let Some(given) = libraries::given_cublaslt() else { return Ok(None) };
            return Err(error::device(
                format!("LAAM_CUBLASLT={}: not a cuBLASLt that can be loaded", given.display()),
                "set it to the path of a libcublasLt.so.13 or .12, or unset it",
            ));
        }
        if let Some(symbol) = libraries::missing_cublaslt_symbol() {
            return Err(error::device(
                format!("the cuBLASLt that was found has no {symbol}"),
                "install nvidia-cublas for CUDA 12 or 13, or set LAAM_CUBLASLT to its library",
            ));
        }
        let created = cublaslt::result::create_handle()
            .map_err(|e| super::cublaslt::failed("initializing cuBLASLt", e))?;
        *handle = Some(CublasLtHandle(created));
        Ok(Some(created))
    }
}
