//! cuBLASLt without a GPU: `libcublasLt.so.13` with the part that laam calls, over the stand-in CUDA
//! driver, which must be the `libcuda.so.1` that this process has loaded.
//!
//! Rules are those of the cuBLAS reference, section "Using the cuBLASLt API"
//! (<https://docs.nvidia.com/cuda/cublas/#using-the-cublaslt-api>), named in comments by function or
//! type. Where the library is strict, or leaves behavior undefined, the stand-in returns an error.
//!
//! An algorithm is opaque to callers. Here it holds a mark, the alignments it relies on, its workspace
//! and its reduction scheme. If the preference allows a reduction in a 16-bit output type, the first
//! algorithm uses it, and really rounds the partial sums.
//!
//! | variable | value |
//! | --- | --- |
//! | `CUDA_STANDIN_FAULT` | `cublasLtMatmul@3=13`: the third call of a symbol returns status 13 |
//! | `CUDA_STANDIN_ALGORITHMS` | `all` (the default), `none`, `vectorized`: none for matrices whose columns are not 16-byte aligned, `second`: another one, or `two`: both, and by the events the first takes a second longer |
//! | `CUDA_STANDIN_CUBLASLT` | version, `130000` by default |
#![warn(missing_docs)]

use std::collections::{BTreeMap, HashMap};
use std::env;
use std::ffi::{CString, c_int, c_void};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

#[path = "../../src/gemm.rs"]
mod gemm;

use gemm::{Gemm, Operand};

/// `cublasStatus_t` other than success.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Status(u32);

impl Status {
    const NOT_INITIALIZED: Status = Status(1);
    const INVALID_VALUE: Status = Status(7);
    const EXECUTION_FAILED: Status = Status(13);
    const NOT_SUPPORTED: Status = Status(15);
}

type Outcome<T = ()> = Result<T, Status>;

/// The handles that exist; each number is given out once.
#[derive(Default)]
struct State {
    next: usize,
    calls: BTreeMap<&'static str, u64>,
    handles: Vec<usize>,
    descriptions: HashMap<usize, Description>,
    layouts: HashMap<usize, Layout>,
    preferences: HashMap<usize, Preference>,
}

/// `cublasLtMatmulDesc_t`
#[derive(Clone, Copy, Default)]
struct Description {
    transpose_a: bool,
    transpose_b: bool,
}

/// `cublasLtMatrixLayout_t`, column-major.
#[derive(Clone, Copy, PartialEq)]
struct Layout {
    dtype: u32,
    rows: u64,
    cols: u64,
    ld: u64,
    batch: u64,
    stride: u64,
}

/// `cublasLtMatmulPreference_t`
#[derive(Clone, Copy)]
struct Preference {
    workspace: u64,
    reduction_schemes: u32,
    /// Of A, B, C and D, in bytes.
    alignments: [u32; 4],
}

/// `cublasLtMatmulAlgo_t`
type Algorithm = [u64; 8];

/// First word of an algorithm of this library.
const MARK: u64 = 0x6174_732d_616c_676f;
/// `CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE`
const OUTPUT_TYPE: u32 = 4;
/// Workspace that a split-K algorithm asks for.
const SPLIT_WORKSPACE: u64 = 1 << 20;

/// `cublasLtMatmulHeuristicResult_t`
#[repr(C)]
struct HeuristicResult {
    algorithm: Algorithm,
    workspace: usize,
    state: u32,
    waves: f32,
    reserved: [c_int; 4],
}

fn state() -> MutexGuard<'static, State> {
    static STATE: OnceLock<Mutex<State>> = OnceLock::new();
    STATE.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes a call: counts it, and lets it fail on request.
fn call(symbol: &'static str, body: impl FnOnce(&mut State) -> Outcome) -> u32 {
    let mut state = state();
    let calls = state.calls.entry(symbol).or_default();
    *calls += 1;
    let wanted = format!("{symbol}@{calls}=");
    let faults = env::var("CUDA_STANDIN_FAULT").unwrap_or_default();
    let fault = faults.split(',').find_map(|fault| fault.trim().strip_prefix(&wanted));
    if let Some(status) = fault {
        return status.parse().unwrap_or(14);
    }
    body(&mut state).err().map_or(0, |status| status.0)
}

impl State {
    fn handle(&mut self) -> usize {
        self.next += 16;
        0x5AD1_0000_0000 + self.next
    }
}

fn put<T>(to: *mut T, value: T) -> Outcome {
    if to.is_null() {
        return Err(Status::INVALID_VALUE);
    }
    // SAFETY: the pointer is not null, and by the C prototype it points to a `T`.
    unsafe { to.write(value) };
    Ok(())
}

/// The value of an attribute. "CUBLAS_STATUS_INVALID_VALUE: if buf is NULL or sizeInBytes doesn't match
/// the size of the internal storage for the selected attribute."
fn attribute<T: Copy>(from: *const c_void, bytes: usize) -> Outcome<T> {
    if from.is_null() || bytes != size_of::<T>() {
        return Err(Status::INVALID_VALUE);
    }
    // SAFETY: the caller's buffer has as many bytes as a `T`.
    Ok(unsafe { from.cast::<T>().read_unaligned() })
}

/// A function of the driver that this process has loaded.
fn driver<F: Copy>(symbol: &str) -> Outcome<F> {
    let name = CString::new(symbol).map_err(|_| Status::NOT_INITIALIZED)?;
    // SAFETY: the strings end in zero; RTLD_NOLOAD finds what is loaded and loads nothing.
    let address = unsafe {
        let library = libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW | libc::RTLD_NOLOAD);
        if library.is_null() { library } else { libc::dlsym(library, name.as_ptr()) }
    };
    if address.is_null() {
        eprintln!("cublaslt-standin: no {symbol} in a loaded libcuda.so.1");
        return Err(Status::NOT_INITIALIZED);
    }
    assert!(size_of::<F>() == size_of::<*mut c_void>(), "a function pointer");
    // SAFETY: F is a pointer to a function with the prototype of this symbol.
    Ok(unsafe { std::mem::transmute_copy(&address) })
}

macro_rules! cublaslt {
    ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $ty:ty),* $(,)?) |$state:ident| $body:expr;)*) => {$(
        $(#[$doc])*
        #[unsafe(no_mangle)]
        extern "C" fn $name($($arg: $ty),*) -> u32 {
            call(stringify!($name), |$state| $body)
        }
    )*};
}

#[unsafe(no_mangle)]
extern "C" fn cublasLtGetVersion() -> usize {
    let version = env::var("CUDA_STANDIN_CUBLASLT").ok().and_then(|text| text.parse().ok());
    version.unwrap_or(130_000)
}

cublaslt! {
    /// Needs a context that is current: "CUBLAS_STATUS_NOT_INITIALIZED: the CUDA Runtime
    /// initialization failed."
    fn cublasLtCreate(handle: *mut usize) |state| {
        let current: extern "C" fn(*mut usize) -> u32 = driver("cuCtxGetCurrent")?;
        let mut context = 0;
        if current(&raw mut context) != 0 || context == 0 {
            return Err(Status::NOT_INITIALIZED);
        }
        let made = state.handle();
        state.handles.push(made);
        put(handle, made)
    };
    fn cublasLtDestroy(handle: usize) |state| {
        if handle == 0 {
            return Err(Status::INVALID_VALUE);
        }
        let at = state.handles.iter().position(|&known| known == handle);
        state.handles.swap_remove(at.ok_or(Status::NOT_INITIALIZED)?);
        Ok(())
    };
    /// Modeled: `CUBLAS_COMPUTE_32F` (68) with scale type `CUDA_R_32F` (0).
    fn cublasLtMatmulDescCreate(description: *mut usize, compute: c_int, scale: c_int) |state| {
        if (compute, scale) != (68, 0) {
            return Err(Status::NOT_SUPPORTED);
        }
        let made = state.handle();
        state.descriptions.insert(made, Description::default());
        put(description, made)
    };
    fn cublasLtMatmulDescDestroy(description: usize) |state| {
        let known = state.descriptions.remove(&description).is_some();
        if known || description == 0 { Ok(()) } else { Err(Status::INVALID_VALUE) }
    };
    /// Attributes 3 and 4: `cublasOperation_t` of A and B, an int32; N is 0, T is 1.
    fn cublasLtMatmulDescSetAttribute(description: usize, which: c_int, from: *const c_void, bytes: usize) |state| {
        let description = state.descriptions.get_mut(&description).ok_or(Status::INVALID_VALUE)?;
        let transposed = match attribute::<i32>(from, bytes)? {
            0 => false,
            1 => true,
            _ => return Err(Status::INVALID_VALUE),
        };
        match which {
            3 => description.transpose_a = transposed,
            4 => description.transpose_b = transposed,
            _ => return Err(Status::INVALID_VALUE),
        }
        Ok(())
    };
    /// Modeled types: f32, f16 and bf16.
    fn cublasLtMatrixLayoutCreate(layout: *mut usize, dtype: u32, rows: u64, cols: u64, ld: i64) |state| {
        if ![0, 2, 14].contains(&dtype) {
            return Err(Status::NOT_SUPPORTED);
        }
        let made = state.handle();
        let new = Layout { dtype, rows, cols, ld: ld.max(0) as u64, batch: 1, stride: 0 };
        state.layouts.insert(made, new);
        put(layout, made)
    };
    fn cublasLtMatrixLayoutDestroy(layout: usize) |state| {
        let known = state.layouts.remove(&layout).is_some();
        if known || layout == 0 { Ok(()) } else { Err(Status::INVALID_VALUE) }
    };
    /// `cublasLtMatrixLayoutAttribute_t`: 5, the batch count, is an int32; 6, the strided batch offset,
    /// an int64; 1, the order, an int32 that is 0 for column-major.
    fn cublasLtMatrixLayoutSetAttribute(layout: usize, which: c_int, from: *const c_void, bytes: usize) |state| {
        let layout = state.layouts.get_mut(&layout).ok_or(Status::INVALID_VALUE)?;
        match which {
            1 if attribute::<i32>(from, bytes)? == 0 => {}
            5 => layout.batch = u64::try_from(attribute::<i32>(from, bytes)?).map_err(|_| Status::INVALID_VALUE)?,
            6 => layout.stride = u64::try_from(attribute::<i64>(from, bytes)?).map_err(|_| Status::INVALID_VALUE)?,
            1 => return Err(Status::NOT_SUPPORTED),
            _ => return Err(Status::INVALID_VALUE),
        }
        Ok(())
    };
    /// Defaults (`cublasLtMatmulPreferenceAttributes_t`): no workspace, every reduction scheme,
    /// alignments of 256 bytes.
    fn cublasLtMatmulPreferenceCreate(preference: *mut usize) |state| {
        let made = state.handle();
        let new = Preference { workspace: 0, reduction_schemes: 7, alignments: [256; 4] };
        state.preferences.insert(made, new);
        put(preference, made)
    };
    fn cublasLtMatmulPreferenceDestroy(preference: usize) |state| {
        let known = state.preferences.remove(&preference).is_some();
        if known || preference == 0 { Ok(()) } else { Err(Status::INVALID_VALUE) }
    };
    /// Attribute 1, the workspace, is a uint64; 3, the mask of reduction schemes, and 5 to 8, the
    /// alignments of A to D, are uint32.
    fn cublasLtMatmulPreferenceSetAttribute(preference: usize, which: c_int, from: *const c_void, bytes: usize) |state| {
        let preference = state.preferences.get_mut(&preference).ok_or(Status::INVALID_VALUE)?;
        match which {
            1 => preference.workspace = attribute(from, bytes)?,
            3 => preference.reduction_schemes = attribute(from, bytes)?,
            5..=8 => {
                let alignment: u32 = attribute(from, bytes)?;
                if !alignment.is_power_of_two() {
                    return Err(Status::INVALID_VALUE);
                }
                preference.alignments[which as usize - 5] = alignment;
            }
            _ => return Err(Status::INVALID_VALUE),
        }
        Ok(())
    };
    /// "CUBLAS_STATUS_NOT_SUPPORTED: if no heuristic function available for current configuration"; a
    /// count of 0 results is possible as well.
    fn cublasLtMatmulAlgoGetHeuristic(
        handle: usize,
        description: usize,
        a: usize,
        b: usize,
        c: usize,
        d: usize,
        preference: usize,
        requested: c_int,
        results: *mut HeuristicResult,
        returned: *mut c_int,
    ) |state| {
        if !state.handles.contains(&handle) || requested < 1 {
            return Err(Status::INVALID_VALUE);
        }
        let problem = Problem::new(state, description, [a, b, c, d])?;
        let preference = *state.preferences.get(&preference).ok_or(Status::INVALID_VALUE)?;
        put(returned, 0)?;
        // Measured: an alignment of A or B below the size of an element.
        let sizes = problem.layouts[..2].iter().map(|layout| problem.size(layout.dtype));
        if sizes.zip(preference.alignments).any(|(size, bytes)| u64::from(bytes) < size) {
            return Err(Status::NOT_SUPPORTED);
        }
        let offers = match env::var("CUDA_STANDIN_ALGORITHMS").as_deref() {
            Ok("none") => false,
            Ok("vectorized") => problem.is_vectorizable(),
            _ => true,
        };
        if !offers {
            return Ok(());
        }
        let splits = problem.layouts[3].dtype != 0
            && problem.gemm_k() >= 2
            && preference.reduction_schemes & OUTPUT_TYPE != 0
            && preference.workspace >= SPLIT_WORKSPACE;
        let alignments = preference.alignments.map(u64::from);
        let [a, b, c, d] = alignments;
        let count = if offers_two() { requested.min(2) } else { 1 };
        let first = u64::from(env::var("CUDA_STANDIN_ALGORITHMS").is_ok_and(|value| value == "second"));
        for number in 0..count {
            let algorithm = [MARK, u64::from(splits), a, b, c, d, problem.digest(), first + number as u64];
            put(results.wrapping_add(number as usize), HeuristicResult {
                algorithm,
                workspace: workspace(&algorithm) as usize,
                state: 0,
                waves: 1.0,
                reserved: [0; 4],
            })?;
        }
        put(returned, count)
    };
    /// "CUBLAS_STATUS_INVALID_VALUE: if matrix layout descriptors or the operation descriptor do not
    /// match the algo descriptor."
    fn cublasLtMatmulAlgoCheck(
        handle: usize,
        description: usize,
        a: usize,
        b: usize,
        c: usize,
        d: usize,
        algorithm: *const Algorithm,
        result: *mut HeuristicResult,
    ) |state| {
        let problem = Problem::new(state, description, [a, b, c, d])?;
        if algorithm.is_null() || !state.handles.contains(&handle) {
            return Err(Status::INVALID_VALUE);
        }
        // SAFETY: the pointer is not null, and by the C prototype it points to an algorithm.
        let algorithm = unsafe { algorithm.read() };
        problem.check_algorithm(&algorithm)?;
        put(result, HeuristicResult {
            algorithm,
            workspace: workspace(&algorithm) as usize,
            state: 0,
            waves: 1.0,
            reserved: [0; 4],
        })
    };
    fn cublasLtMatmul(
        handle: usize,
        description: usize,
        alpha: *const f32,
        a: u64,
        a_layout: usize,
        b: u64,
        b_layout: usize,
        beta: *const f32,
        c: u64,
        c_layout: usize,
        d: u64,
        d_layout: usize,
        algorithm: *const Algorithm,
        scratch: u64,
        scratch_bytes: usize,
        stream: usize,
    ) |state| {
        if !state.handles.contains(&handle) {
            return Err(Status::NOT_INITIALIZED);
        }
        let problem = Problem::new(state, description, [a_layout, b_layout, c_layout, d_layout])?;
        // A null algorithm asks for one: not modeled, since it may change from call to call.
        if alpha.is_null() || beta.is_null() || algorithm.is_null() {
            return Err(Status::INVALID_VALUE);
        }
        // SAFETY: the pointers are not null; in the default pointer mode the scalars are the host's.
        let (alpha, beta, algorithm) = unsafe { (alpha.read(), beta.read(), algorithm.read()) };
        problem.check_algorithm(&algorithm).map_err(|_| Status::NOT_SUPPORTED)?;
        // "Must be 256B aligned", and not smaller than what the algorithm asks for.
        if !scratch.is_multiple_of(256) || workspace(&algorithm) > scratch_bytes as u64 {
            return Err(Status::INVALID_VALUE);
        }
        // The preference promised these alignments for every matrix of the batch.
        for ((at, layout), alignment) in [a, b, c, d].into_iter().zip(problem.layouts).zip(&algorithm[2..6]) {
            let stride = layout.stride * problem.size(layout.dtype);
            let batched = problem.layouts[0].batch > 1;
            if !at.is_multiple_of(*alignment) || (batched && !stride.is_multiple_of(*alignment)) {
                eprintln!("cublaslt-standin: a matrix at {at:#x} is not aligned to {alignment} bytes");
                return Err(Status::NOT_SUPPORTED);
            }
        }
        // "C and D can be the same matrix"; otherwise the output overlaps nothing.
        if c == d && problem.layouts[2] != problem.layouts[3] {
            return Err(Status::INVALID_VALUE);
        }
        let [la, lb, lc, ld] = problem.layouts;
        let operand = |at, layout: Layout, transposed: bool| Operand {
            at,
            dtype: layout.dtype,
            transposed: u32::from(transposed),
            ld: layout.ld,
            stride: layout.stride,
        };
        let gemm = Gemm {
            m: ld.rows,
            n: ld.cols,
            k: problem.gemm_k(),
            batch: la.batch,
            a: operand(a, la, problem.description.transpose_a),
            b: operand(b, lb, problem.description.transpose_b),
            c: operand(c, lc, false),
            d: operand(d, ld, false),
            alpha,
            beta,
            split_in_output_type: u32::from(algorithm[1] == 1),
            is_slow: u32::from(offers_two() && algorithm[7] == 0),
        };
        let submit: extern "C" fn(*const Gemm, usize) -> u32 = driver("cudaStandinGemm")?;
        match submit(&raw const gemm, stream) {
            0 => Ok(()),
            1 => Err(Status::INVALID_VALUE),
            _ => Err(Status::EXECUTION_FAILED),
        }
    };
}

/// Workspace that an algorithm needs.
/// `CUDA_STANDIN_ALGORITHMS=two`.
fn offers_two() -> bool {
    env::var("CUDA_STANDIN_ALGORITHMS").is_ok_and(|value| value == "two")
}

fn workspace(algorithm: &Algorithm) -> u64 {
    if algorithm[1] == 1 { SPLIT_WORKSPACE } else { 0 }
}

/// A matmul by its descriptors.
struct Problem {
    description: Description,
    /// Of A, B, C and D.
    layouts: [Layout; 4],
}

impl Problem {
    /// Shapes that fit each other; leading dimensions at least the rows (`CUBLASLT_MATRIX_LAYOUT_LD`,
    /// column-major); one type for A and B, and for C and D, that type or f32 (table of supported types
    /// of `cublasLtMatmul`); one batch count.
    fn new(state: &State, description: usize, layouts: [usize; 4]) -> Outcome<Problem> {
        let description = *state.descriptions.get(&description).ok_or(Status::INVALID_VALUE)?;
        let layout = |handle| state.layouts.get(&handle).copied().ok_or(Status::INVALID_VALUE);
        let [a, b, c, d] = layouts;
        let layouts @ [a, b, c, d] = [layout(a)?, layout(b)?, layout(c)?, layout(d)?];
        let shape = |layout: &Layout, transposed: bool| {
            if transposed { (layout.cols, layout.rows) } else { (layout.rows, layout.cols) }
        };
        let ((m, k), (b_rows, n)) =
            (shape(&a, description.transpose_a), shape(&b, description.transpose_b));
        let fits = k == b_rows
            && (m, n) == (d.rows, d.cols)
            && (m, n) == (c.rows, c.cols)
            && m * n * k > 0
            && layouts.iter().all(|layout| layout.ld >= layout.rows && layout.batch == a.batch)
            && a.batch > 0;
        if !fits {
            return Err(Status::INVALID_VALUE);
        }
        if a.dtype != b.dtype || c.dtype != d.dtype || (d.dtype != a.dtype && d.dtype != 0) {
            return Err(Status::NOT_SUPPORTED);
        }
        Ok(Problem { description, layouts })
    }

    fn gemm_k(&self) -> u64 {
        let a = &self.layouts[0];
        if self.description.transpose_a { a.rows } else { a.cols }
    }

    fn size(&self, dtype: u32) -> u64 {
        if dtype == 0 { 4 } else { 2 }
    }

    /// Every column begins at a multiple of 16 bytes.
    fn is_vectorizable(&self) -> bool {
        self.layouts.iter().all(|layout| (layout.ld * self.size(layout.dtype)).is_multiple_of(16))
    }

    /// A number that differs between matmuls of different types or operations.
    fn digest(&self) -> u64 {
        let [a, .., d] = &self.layouts;
        let Description { transpose_a, transpose_b } = self.description;
        let flags = u64::from(transpose_a) << 1 | u64::from(transpose_b);
        u64::from(a.dtype) << 16 | u64::from(d.dtype) << 8 | flags
    }

    fn check_algorithm(&self, algorithm: &Algorithm) -> Outcome {
        let [mark, split, alignments @ .., digest, _] = algorithm;
        let known = *mark == MARK
            && *split <= 1
            && alignments.iter().all(|alignment| alignment.is_power_of_two())
            && *digest == self.digest();
        if known { Ok(()) } else { Err(Status::INVALID_VALUE) }
    }
}
