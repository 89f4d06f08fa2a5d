//! The exported functions, named as the driver exports them.
//!
//! The reference marks pointers that must not be null; null is `CUDA_ERROR_INVALID_VALUE` here.

use std::ffi::{CStr, c_char, c_int, c_uint, c_ulonglong, c_void};
use std::sync::Once;

use ptx_race::{Arg, Config, Module};

use crate::codes::Code;
use crate::exchange::Exchange;
use crate::gemm::{Gemm, Operand};
use crate::state::{
    CURRENT, Event, Exec, Function, LoadedModule, Outcome, Primary, State, state, try_state,
};
use crate::work::{Op, QueuedExchange, element_size};

/// What must be true before a call.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Needs {
    Nothing,
    /// `cuInit` ("must be called before any other function").
    Init,
    /// A context that is current on the calling thread and usable.
    Context,
}

/// Makes a call: counts it, lets it fail on request, and checks what it needs.
fn call(symbol: &'static str, needs: Needs, body: impl FnOnce(&mut State) -> Outcome) -> u32 {
    let mut state = state();
    let made = state.count(symbol).and_then(|()| {
        if needs != Needs::Nothing && !state.initialized {
            return Err(Code::NOT_INITIALIZED);
        }
        if needs == Needs::Context {
            state.current()?;
        }
        body(&mut state)
    });
    made.err().map_or(0, |code| code.0)
}

/// Writes a result through a pointer of the caller.
fn put<T>(to: *mut T, value: T) -> Outcome {
    if to.is_null() {
        return Err(Code::INVALID_VALUE);
    }
    // SAFETY: the pointer is not null, and by the C prototype it points to a `T`.
    unsafe { to.write(value) };
    Ok(())
}

/// Defines exported functions.
macro_rules! driver {
    ($($(#[$doc:meta])* $needs:ident fn $name:ident($($arg:ident: $ty:ty),* $(,)?) |$state:ident| $body:expr;)*) => {$(
        $(#[$doc])*
        #[unsafe(no_mangle)]
        pub extern "C" fn $name($($arg: $ty),*) -> u32 {
            call(stringify!($name), Needs::$needs, |$state| $body)
        }
    )*};
}

// cuInit, versions, errors.
driver! {
    /// Flags must be 0.
    Nothing fn cuInit(flags: c_uint) |state| {
        static AT_EXIT: Once = Once::new();
        if flags != 0 {
            return Err(Code::INVALID_VALUE);
        }
        if state.settings.gpus == 0 {
            return Err(Code::NO_DEVICE);
        }
        state.initialized = true;
        AT_EXIT.call_once(|| {
            // SAFETY: the handler takes nothing, and lives as long as this library is loaded.
            unsafe { libc::atexit(at_exit) };
        });
        Ok(())
    };
    Nothing fn cuDriverGetVersion(version: *mut c_int) |state| put(version, state.settings.driver);
}

/// Reports leaks, and writes the report that was asked for.
extern "C" fn at_exit() {
    let state = state();
    // After an error some memory may not have been freed: that is not reported as a leak.
    let leaks = state.leaks();
    if !leaks.is_empty() && !state.has_failed() {
        eprintln!("cuda-standin: not given back at exit: {}", leaks.join(", "));
    }
    if let Some(path) = &state.settings.report
        && let Err(e) = std::fs::write(path, state.report())
    {
        eprintln!("cuda-standin: {path}: {e}");
    }
}

/// Name or description of a code.
fn text(
    code: u32,
    to: *mut *const c_char,
    pick: fn((&'static CStr, &'static CStr)) -> &'static CStr,
) -> u32 {
    let texts = Code(code).texts();
    let written = put(to, texts.map_or(std::ptr::null(), |texts| pick(texts).as_ptr()));
    if written.is_ok() && texts.is_some() { 0 } else { Code::INVALID_VALUE.0 }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGetErrorName(code: u32, to: *mut *const c_char) -> u32 {
    text(code, to, |texts| texts.0)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGetErrorString(code: u32, to: *mut *const c_char) -> u32 {
    text(code, to, |texts| texts.1)
}

/// Refuses a device that is not there.
fn check_device(state: &State, device: c_int) -> Outcome {
    if (0..state.settings.gpus).contains(&device) { Ok(()) } else { Err(Code::INVALID_DEVICE) }
}

/// Limits of every compute capability since 5.0 (programming guide, technical specifications).
const MAX_THREADS_PER_BLOCK: u32 = 1024;
const SHARED_PER_BLOCK: u64 = 48 << 10;
const REGISTERS_PER_BLOCK: u32 = 65536;
const MAX_REGISTERS_PER_THREAD: u32 = 255;

// Devices and contexts.
driver! {
    Init fn cuDeviceGetCount(count: *mut c_int) |state| put(count, state.settings.gpus);
    Init fn cuDeviceGet(device: *mut c_int, ordinal: c_int) |state| {
        check_device(state, ordinal)?;
        put(device, ordinal)
    };
    /// The name is cut to `len` bytes with its zero.
    Init fn cuDeviceGetName(name: *mut c_char, len: c_int, device: c_int) |state| {
        check_device(state, device)?;
        let text = state.settings.name().as_bytes();
        if name.is_null() || len < 1 {
            return Err(Code::INVALID_VALUE);
        }
        let count = text.len().min(len as usize - 1);
        // SAFETY: the caller's buffer has `len` bytes, and `count` and the zero are at most that.
        unsafe {
            name.cast::<u8>().copy_from_nonoverlapping(text.as_ptr(), count);
            name.add(count).write(0);
        }
        Ok(())
    };
    /// All processes of a host have the same GPUs.
    Init fn cuDeviceGetUuid_v2(uuid: *mut [u8; 16], device: c_int) |state| {
        check_device(state, device)?;
        let mut bytes = *b"simulated GPU   ";
        bytes[15] = device as u8;
        put(uuid, bytes)
    };
    /// A device cannot be its own peer.
    Init fn cuDeviceCanAccessPeer(reaches: *mut c_int, device: c_int, peer: c_int) |state| {
        check_device(state, device)?;
        check_device(state, peer)?;
        put(reaches, c_int::from(device != peer))
    };
    Init fn cuDeviceTotalMem_v2(bytes: *mut usize, device: c_int) |state| {
        check_device(state, device)?;
        put(bytes, state.settings.memory as usize)
    };
    Init fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_uint, device: c_int) |state| {
        check_device(state, device)?;
        let (major, minor) = state.settings.capability();
        let found = match attribute {
            1 => MAX_THREADS_PER_BLOCK as i32,
            8 => SHARED_PER_BLOCK as i32,
            10 => 32,
            12 => REGISTERS_PER_BLOCK as i32,
            16 => state.settings.multiprocessors(),
            75 => major,
            76 => minor,
            97 => state.settings.shared_optin() as i32,
            // Memory pools: none, so that a caller who does not ask would meet an error.
            115 => 0,
            other => {
                eprintln!("cuda-standin: device attribute {other} is not modeled");
                return Err(Code::INVALID_VALUE);
            }
        };
        put(value, found)
    };
    Init fn cuDevicePrimaryCtxRetain(context: *mut usize, device: c_int) |state| {
        check_device(state, device)?;
        // Measured: the device stays unusable for the process.
        if let Some(code) = state.lost {
            return Err(code);
        }
        let fresh = state.handle();
        let primary = state.primary.entry(device).or_insert(Primary { handle: fresh, retained: 0, sticky: None });
        primary.retained += 1;
        put(context, primary.handle)
    };
    /// "The context is automatically reset once the last reference to it is released."
    Init fn cuDevicePrimaryCtxRelease_v2(device: c_int) |state| {
        check_device(state, device)?;
        let primary = state.primary.get_mut(&device).ok_or(Code::INVALID_CONTEXT)?;
        primary.retained -= 1;
        if primary.retained == 0 {
            state.lost = primary.sticky;
            state.primary.remove(&device);
            let leaks = state.leaks();
            if !leaks.is_empty() {
                eprintln!("cuda-standin: the context is released with {}", leaks.join(", "));
            }
            state.reset();
        }
        Ok(())
    };
    Init fn cuCtxGetCurrent(context: *mut usize) |_state| put(context, CURRENT.get());
    Init fn cuCtxSetCurrent(context: usize) |state| {
        let known = state.primary.values().any(|primary| primary.handle == context);
        if context != 0 && !known {
            return Err(Code::INVALID_CONTEXT);
        }
        CURRENT.set(context);
        Ok(())
    };
    /// `CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED` while a stream of the context captures.
    Context fn cuCtxSynchronize() |state| {
        if !state.captures.is_empty() {
            // Measured: of any thread and in any mode.
            state.captures.values_mut().for_each(|capture| capture.invalid = true);
            return Err(Code::STREAM_CAPTURE_UNSUPPORTED);
        }
        state.drain_all()
    };
}

// Memory.
driver! {
    /// "If bytesize is 0, cuMemAlloc() returns CUDA_ERROR_INVALID_VALUE." The address "is suitably
    /// aligned for any kind of variable"; 256 bytes, as the programming guide says of device memory.
    Context fn cuMemAlloc_v2(address: *mut u64, bytes: usize) |state| {
        state.forbid_in_capture()?;
        if bytes == 0 {
            return Err(Code::INVALID_VALUE);
        }
        if state.used().saturating_add(bytes as u64) > state.settings.memory {
            return Err(Code::OUT_OF_MEMORY);
        }
        let at = state.memory.alloc_uninit(bytes);
        state.allocations.insert(at, bytes as u64);
        put(address, at)
    };
    /// The pointer "must have been returned by a previous call to cuMemAlloc()". The call waits for the
    /// work that may use it.
    Context fn cuMemFree_v2(address: u64) |state| {
        state.forbid_in_capture()?;
        state.drain_all()?;
        if address == 0 {
            return Ok(());
        }
        state.allocations.remove(&address).ok_or(Code::INVALID_VALUE)?;
        state.memory.free(address).map_err(|_| Code::INVALID_VALUE)
    };
    Context fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) |state| {
        put(free, state.settings.memory.saturating_sub(state.used()) as usize)?;
        put(total, state.settings.memory as usize)
    };
    /// "API synchronization behavior": from pageable memory, the call may return once the bytes are
    /// staged, before they arrive. In a capture, the node would read the host's memory at each launch,
    /// when it may be gone: refused.
    Context fn cuMemcpyHtoDAsync_v2(to: u64, from: *const c_void, bytes: usize, stream: usize) |state| {
        state.forbid_in_capture()?;
        if bytes == 0 {
            return Ok(());
        }
        state.check_range(to, bytes)?;
        if from.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        // SAFETY: by the C prototype the source has `bytes` bytes.
        let bytes = unsafe { std::slice::from_raw_parts(from.cast::<u8>(), bytes) };
        state.submit(stream, Op::Write { to, bytes: bytes.into() })
    };
    /// "API synchronization behavior": to pageable memory, the call returns only once the copy has
    /// completed.
    Context fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: u64, bytes: usize, stream: usize) |state| {
        state.forbid_in_capture()?;
        if bytes == 0 {
            return Ok(());
        }
        state.check_range(from, bytes)?;
        state.drain(stream)?;
        if to.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        // SAFETY: by the C prototype the destination has `bytes` bytes.
        let into = unsafe { std::slice::from_raw_parts_mut(to.cast::<u8>(), bytes) };
        state.memory.read(from, into).map_err(|e| {
            eprintln!("cuda-standin: copy from device: {e}");
            Code::ILLEGAL_ADDRESS
        })
    };
    /// Ranges that overlap have no defined result.
    Context fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: usize) |state| {
        state.check_range(to, bytes)?;
        state.check_range(from, bytes)?;
        if to < from + bytes as u64 && from < to + bytes as u64 {
            eprintln!("cuda-standin: a copy between ranges that overlap");
            return Err(Code::INVALID_VALUE);
        }
        state.submit(stream, Op::Copy { from, to, len: bytes })
    };
    Context fn cuMemsetD8Async(at: u64, byte: u8, bytes: usize, stream: usize) |state| {
        state.check_range(at, bytes)?;
        state.submit(stream, Op::Set { at, byte, len: bytes })
    };
}

// Modules and launches.
driver! {
    /// A zero-terminated PTX text; a fatbin or cubin holds machine code, which nothing here can run. The
    /// ISA version must be one that the driver knows: `CUDA_ERROR_UNSUPPORTED_PTX_VERSION`.
    Context fn cuModuleLoadData(module: *mut usize, image: *const c_void) |state| {
        state.forbid_in_capture()?;
        if image.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        // SAFETY: an image is a fatbin, a cubin, or a text that ends in zero; all have four bytes, and
        // neither binary begins with a slash, a dot or a newline.
        let text = unsafe {
            if !matches!(image.cast::<u8>().read(), b'/' | b'.' | b'\n') {
                eprintln!("cuda-standin: it runs PTX only: set LAAM_CUDA_PTX=1");
                return Err(Code::NO_BINARY_FOR_GPU);
            }
            CStr::from_ptr(image.cast())
        };
        let text = text.to_str().map_err(|_| Code::INVALID_PTX)?;
        let directive = |name: &str| {
            let line = text.lines().find_map(|line| line.trim().strip_prefix(name))?;
            Some(line.trim().to_string())
        };
        let version = directive(".version").ok_or(Code::INVALID_IMAGE)?;
        if ptx_isa(&version) > newest_isa(state.settings.driver) {
            return Err(Code::UNSUPPORTED_PTX_VERSION);
        }
        let target = directive(".target").ok_or(Code::INVALID_PTX)?;
        let (major, minor) = state.settings.capability();
        let number = target.trim_start_matches("sm_").split(',').next().unwrap_or_default();
        // PTX for an architecture with a suffix runs on that one alone (PTX ISA, `.target`).
        let runs = match number.strip_suffix('a') {
            Some(exact) => exact.parse() == Ok(10 * major + minor),
            None => number.parse().is_ok_and(|target: i32| target <= 10 * major + minor),
        };
        if !runs {
            return Err(Code::INVALID_PTX);
        }
        let decoded = Module::from_ptx(text).map_err(|e| {
            eprintln!("cuda-standin: {e}");
            Code::INVALID_PTX
        })?;
        let handle = state.handle();
        state.modules.insert(handle, LoadedModule { module: decoded, functions: std::collections::HashMap::default() });
        put(module, handle)
    };
    /// Functions of the module can no longer be launched.
    Context fn cuModuleUnload(module: usize) |state| {
        let unloaded = state.modules.remove(&module).ok_or(Code::INVALID_HANDLE)?;
        state.drain_all()?;
        for function in unloaded.functions.values() {
            state.functions.remove(function);
        }
        Ok(())
    };
    Context fn cuModuleGetFunction(function: *mut usize, module: usize, name: *const c_char) |state| {
        if name.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        // SAFETY: the name is a string that ends in zero.
        let name = unsafe { CStr::from_ptr(name) }.to_str().map_err(|_| Code::NOT_FOUND)?;
        if name.is_empty() {
            return Err(Code::INVALID_VALUE);
        }
        let fresh = state.handle();
        let loaded = state.modules.get_mut(&module).ok_or(Code::INVALID_HANDLE)?;
        let kernel = loaded.module.kernel(name).ok_or(Code::NOT_FOUND)?;
        let handle = *loaded.functions.entry(name.into()).or_insert(fresh);
        // The default of the attribute: 48 KiB less what is static.
        let max_dynamic = SHARED_PER_BLOCK.saturating_sub(kernel.static_shared() as u64);
        state.functions.entry(handle).or_insert(Function { kernel, max_dynamic });
        put(function, handle)
    };
    Context fn cuFuncGetAttribute(value: *mut c_int, attribute: c_uint, function: usize) |state| {
        let found = state.functions.get(&function).ok_or(Code::INVALID_HANDLE)?;
        put(value, match attribute {
            0 => max_threads(found) as i32,
            1 => found.kernel.static_shared() as i32,
            3 => found.kernel.local_bytes() as i32,
            8 => found.max_dynamic as i32,
            _ => return Err(Code::INVALID_VALUE),
        })
    };
    /// Offset and size of a parameter; "CUDA_ERROR_INVALID_VALUE if paramIndex is out of range".
    Context fn cuFuncGetParamInfo(function: usize, index: usize, offset: *mut usize, size: *mut usize) |state| {
        let found = state.functions.get(&function).ok_or(Code::INVALID_HANDLE)?;
        let param = found.kernel.params().get(index).ok_or(Code::INVALID_VALUE)?;
        put(offset, param.offset)?;
        put(size, param.size)
    };
    /// At most the opt-in limit less what is static; other attributes "cannot be set" or are not modeled.
    Context fn cuFuncSetAttribute(function: usize, attribute: c_uint, value: c_int) |state| {
        let most = state.settings.shared_optin();
        let found = state.functions.get_mut(&function).ok_or(Code::INVALID_HANDLE)?;
        let fits = value >= 0 && value as u64 + found.kernel.static_shared() as u64 <= most;
        if attribute != 8 || !fits {
            return Err(Code::INVALID_VALUE);
        }
        found.max_dynamic = value as u64;
        Ok(())
    };
    Context fn cuLaunchKernel(
        function: usize,
        grid_x: c_uint,
        grid_y: c_uint,
        grid_z: c_uint,
        block_x: c_uint,
        block_y: c_uint,
        block_z: c_uint,
        shared: c_uint,
        stream: usize,
        parameters: *const *const c_void,
        extra: *const *const c_void,
    ) |state| {
        let found = state.functions.get(&function).ok_or(Code::INVALID_HANDLE)?;
        let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
        if let Err(code) = check_shape(found, grid, block, shared) {
            state.invalidate_capture(stream)?;
            return Err(code);
        }
        // "extra" is for packed arguments; both at once are CUDA_ERROR_INVALID_VALUE.
        let params = found.kernel.params();
        if !extra.is_null() || (parameters.is_null() && !params.is_empty()) {
            return Err(Code::INVALID_VALUE);
        }
        let mut args = Vec::with_capacity(params.len());
        for (index, param) in params.iter().enumerate() {
            // SAFETY: kernelParams has an element for each parameter.
            let from = unsafe { parameters.add(index).read() };
            if from.is_null() {
                return Err(Code::INVALID_VALUE);
            }
            // SAFETY: each "must point to a region of memory from which the actual kernel parameter
            // will be copied"; its size is the kernel's.
            let bytes = unsafe { std::slice::from_raw_parts(from.cast::<u8>(), param.size) };
            args.push(Arg::bytes(bytes));
        }
        let (kernel, config) = (found.kernel.clone(), Config { grid, block, shared });
        state.submit(stream, Op::Kernel { kernel, config, args })
    };
}

/// Threads per block that a function can be launched with. ptxas gives a kernel without launch bounds up
/// to 255 registers, with which a block of more than 256 threads may fail.
fn max_threads(function: &Function) -> u32 {
    let safe = REGISTERS_PER_BLOCK / (MAX_REGISTERS_PER_THREAD + 1);
    function.kernel.max_threads().unwrap_or(safe)
}

/// Refuses a launch that no GPU accepts (`cuLaunchKernel`; programming guide, technical
/// specifications).
fn check_shape(function: &Function, grid: [u32; 3], block: [u32; 3], shared: u32) -> Outcome {
    let [x, y, z] = grid;
    let threads: u64 = block.iter().map(|&n| u64::from(n)).product();
    let fits = (1..=i32::MAX as u32).contains(&x)
        && (1..=65_535).contains(&y)
        && (1..=65_535).contains(&z)
        && (1..=u64::from(MAX_THREADS_PER_BLOCK)).contains(&threads)
        && block[2] <= 64
        // "If the user-specified dynamic shared memory size is larger than this value, the launch
        // will fail" (CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES).
        && u64::from(shared) <= function.max_dynamic;
    if !fits {
        return Err(Code::INVALID_VALUE);
    }
    if threads > u64::from(max_threads(function)) {
        // Measured: launch bounds are checked as arguments.
        let bounds = function.kernel.max_threads().is_some();
        return Err(if bounds { Code::INVALID_VALUE } else { Code::LAUNCH_OUT_OF_RESOURCES });
    }
    Ok(())
}

/// `9.0` as 90.
fn ptx_isa(version: &str) -> i32 {
    let (major, minor) = version.split_once('.').unwrap_or((version, "0"));
    10 * major.parse().unwrap_or(99) + minor.parse().unwrap_or(0)
}

/// Newest PTX ISA that a driver knows (PTX ISA, release history).
fn newest_isa(driver: i32) -> i32 {
    match (driver / 1000, driver % 1000 / 10) {
        (13, minor) => 90 + minor,
        (12, 9) => 88,
        (12, 8) => 87,
        (12, minor) => 80 + minor.min(5),
        (11, minor) => 70 + minor.min(8),
        (major, _) if major > 13 => 99,
        _ => 65,
    }
}

// Streams, graphs and events.
driver! {
    /// `CU_STREAM_DEFAULT` or `CU_STREAM_NON_BLOCKING`.
    Context fn cuStreamCreate(stream: *mut usize, flags: c_uint) |state| {
        if flags > 1 {
            return Err(Code::INVALID_VALUE);
        }
        let fresh = state.new_stream();
        put(stream, fresh)
    };
    /// "The function will return immediately and the resources will be released once the device has
    /// completed all work."
    Context fn cuStreamDestroy_v2(stream: usize) |state| {
        let done = state.drain(stream);
        state.streams.remove(&stream).ok_or(Code::INVALID_HANDLE)?;
        done
    };
    Context fn cuStreamSynchronize(stream: usize) |state| {
        // Measured: a stream that captures, in any mode.
        if state.streams.get(&stream).is_some_and(|stream| stream.capture.is_some()) {
            state.invalidate_capture(stream)?;
            return Err(Code::STREAM_CAPTURE_UNSUPPORTED);
        }
        state.forbid_in_capture()?;
        state.drain(stream)
    };
    /// Modes: 0 global, 1 thread-local, 2 relaxed. The legacy stream (0) cannot capture.
    Context fn cuStreamBeginCapture_v2(stream: usize, mode: c_uint) |state| {
        if mode > 2 {
            return Err(Code::INVALID_VALUE);
        }
        if stream == 0 {
            return Err(Code::STREAM_CAPTURE_UNSUPPORTED);
        }
        state.begin_capture(stream, mode == 2)
    };
    /// "If the capture was invalidated, ... a NULL graph will be returned."
    Context fn cuStreamEndCapture(stream: usize, graph: *mut usize) |state| {
        put(graph, 0)?;
        let captured = state.end_capture(stream)?;
        put(graph, captured)
    };
    Context fn cuGraphInstantiateWithFlags(exec: *mut usize, graph: usize, flags: c_ulonglong) |state| {
        state.forbid_in_capture()?;
        if flags != 0 {
            eprintln!("cuda-standin: flags of instantiation are not modeled");
            return Err(Code::INVALID_VALUE);
        }
        let nodes = state.graphs.get(&graph).ok_or(Code::INVALID_VALUE)?.clone();
        let handle = state.handle();
        state.execs.insert(handle, Exec::new(nodes));
        put(exec, handle)
    };
    /// Measured: not to a stream that captures, in any mode.
    Context fn cuGraphUpload(exec: usize, stream: usize) |state| {
        state.forbid_in_capture_of(stream)?;
        state.forbid_in_capture()?;
        let known = state.execs.contains_key(&exec) && state.streams.contains_key(&stream);
        if known { Ok(()) } else { Err(Code::INVALID_VALUE) }
    };
    /// Measured: not into a capture.
    Context fn cuGraphLaunch(exec: usize, stream: usize) |state| {
        state.forbid_in_capture_of(stream)?;
        let ops = state.execs.get_mut(&exec).ok_or(Code::INVALID_VALUE)?.launch();
        ops.into_iter().try_for_each(|op| state.submit(stream, op))
    };
    Context fn cuGraphExecDestroy(exec: usize) |state| {
        state.execs.remove(&exec).map(|_| ()).ok_or(Code::INVALID_VALUE)
    };
    Context fn cuGraphDestroy(graph: usize) |state| {
        state.graphs.remove(&graph).map(|_| ()).ok_or(Code::INVALID_VALUE)
    };
    /// Flags: 1 blocking, 2 without timing, 4 interprocess, which needs 2.
    Context fn cuEventCreate(event: *mut usize, flags: c_uint) |state| {
        if flags > 7 || flags & 6 == 4 {
            return Err(Code::INVALID_VALUE);
        }
        let handle = state.handle();
        let made = Event { timed: flags & 2 == 0, recordings: 0, pending: None, at: None, captured: None };
        state.events.insert(handle, made);
        put(event, handle)
    };
    Context fn cuEventDestroy_v2(event: usize) |state| {
        state.events.remove(&event).map(|_| ()).ok_or(Code::INVALID_HANDLE)
    };
    /// In a capture, the event stands for the nodes that work after it depends on.
    Context fn cuEventRecord(event: usize, stream: usize) |state| {
        state.check_capture(stream)?;
        let captured = state.streams.get(&stream).ok_or(Code::INVALID_HANDLE)?.capture.clone();
        let each = state.events.get_mut(&event).ok_or(Code::INVALID_HANDLE)?;
        each.recordings += 1;
        each.at = None;
        each.pending = Some((stream, each.recordings));
        each.captured = captured;
        let recordings = each.recordings;
        match each.captured {
            Some(_) => Ok(()),
            None => state.submit(stream, Op::Event(event, recordings)),
        }
    };
    /// Flags: 1 (`CU_EVENT_WAIT_EXTERNAL`) is not modeled.
    Context fn cuStreamWaitEvent(stream: usize, event: usize, flags: c_uint) |state| {
        if flags != 0 {
            return Err(Code::INVALID_VALUE);
        }
        state.wait_event(stream, event)
    };
    /// An event that was not recorded is complete. Measured: it invalidates a capture, whatever the event.
    Context fn cuEventSynchronize(event: usize) |state| {
        let forbidden = state.forbid_in_capture();
        state.refuse_captured(event)?;
        forbidden?;
        let each = state.events.get(&event).ok_or(Code::INVALID_HANDLE)?;
        match each.pending {
            Some((stream, _)) if each.at.is_none() => state.drain(stream),
            _ => Ok(()),
        }
    };
    Context fn cuEventElapsedTime(milliseconds: *mut f32, start: usize, end: usize) |state| {
        elapsed(state, milliseconds, start, end)
    };
    /// The version of CUDA 12.8.
    Context fn cuEventElapsedTime_v2(milliseconds: *mut f32, start: usize, end: usize) |state| {
        elapsed(state, milliseconds, start, end)
    };
}

/// `CUDA_ERROR_NOT_READY` until the work before the event is done; the call waits for nothing. While another
/// thread waits for work, the event's may be done or not.
#[unsafe(no_mangle)]
pub extern "C" fn cuEventQuery(event: usize) -> u32 {
    let Some(mut state) = try_state() else { return Code::NOT_READY.0 };
    let asked = |state: &mut State| {
        state.count("cuEventQuery")?;
        state.current()?;
        let forbidden = state.forbid_in_capture();
        state.refuse_captured(event)?;
        forbidden?;
        match state.events.get(&event).ok_or(Code::INVALID_HANDLE)? {
            Event { pending: Some(_), at: None, .. } => Err(Code::NOT_READY),
            _ => Ok(()),
        }
    };
    asked(&mut state).err().map_or(0, |code| code.0)
}

/// "If either event has not been recorded, or was created without timing, CUDA_ERROR_INVALID_HANDLE;
/// if it has not completed, CUDA_ERROR_NOT_READY." Measured: the first of these for a null pointer too.
fn elapsed(state: &mut State, milliseconds: *mut f32, start: usize, end: usize) -> Outcome {
    state.refuse_captured(start)?;
    state.refuse_captured(end)?;
    if milliseconds.is_null() {
        return Err(Code::INVALID_HANDLE);
    }
    let at = |event: usize| {
        let event = state.events.get(&event).ok_or(Code::INVALID_HANDLE)?;
        if !event.timed || event.pending.is_none() {
            return Err(Code::INVALID_HANDLE);
        }
        event.at.ok_or(Code::NOT_READY)
    };
    let (start, end) = (at(start)?, at(end)?);
    put(milliseconds, end.saturating_duration_since(start).as_secs_f32() * 1e3)
}

/// Symbol of this library alone, with which the stand-in for cuBLASLt queues a matmul.
#[unsafe(no_mangle)]
pub extern "C" fn cudaStandinGemm(gemm: *const Gemm, stream: usize) -> u32 {
    call("cudaStandinGemm", Needs::Context, |state| {
        // SAFETY: the caller is the stand-in for cuBLASLt, which passes a matmul that lives until the
        // call returns.
        let gemm = unsafe { gemm.read() };
        // Checked here, so that an error names the call; a GPU would fail late.
        let check = |operand: &Operand, rows: u64, cols: u64| {
            let (rows, cols) = if operand.transposed == 0 { (rows, cols) } else { (cols, rows) };
            let elements = (gemm.batch - 1) * operand.stride + (cols - 1) * operand.ld + rows;
            state.check_range(operand.at, (elements * element_size(operand.dtype)) as usize)
        };
        check(&gemm.a, gemm.m, gemm.k)?;
        check(&gemm.b, gemm.k, gemm.n)?;
        check(&gemm.c, gemm.m, gemm.n)?;
        check(&gemm.d, gemm.m, gemm.n)?;
        state.submit(stream, Op::Gemm(gemm))
    })
}

/// Symbol of this library alone: the device of the current context, or -1.
#[unsafe(no_mangle)]
pub extern "C" fn cudaStandinDevice() -> c_int {
    let state = state();
    let current = CURRENT.get();
    let mut devices = state.primary.iter().filter(|(_, primary)| primary.handle == current);
    devices.next().map_or(-1, |(device, _)| *device)
}

/// Symbol of this library alone, with which the stand-in for NCCL queues an exchange. Memory is checked here, so
/// that an error names the call; a GPU would fail late.
#[unsafe(no_mangle)]
pub extern "C" fn cudaStandinExchange(exchange: *const Exchange, stream: usize) -> u32 {
    call("cudaStandinExchange", Needs::Context, |state| {
        // SAFETY: the caller is the stand-in for NCCL, which passes an exchange and its spans that live until the
        // call returns.
        let (exchange, sends, receives) = unsafe {
            let exchange = exchange.read();
            let spans = |at, count| std::slice::from_raw_parts(at, count).to_vec();
            let receives = spans(exchange.receives, exchange.receive_count);
            (exchange, spans(exchange.sends, exchange.send_count), receives)
        };
        let all = sends.iter().chain(&receives);
        all.into_iter().try_for_each(|span| state.check_range(span.at, span.bytes))?;
        let Exchange { execute, number, .. } = exchange;
        state.submit(stream, Op::Exchange(QueuedExchange { sends, receives, execute, number }))
    })
}
