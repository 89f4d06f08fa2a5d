//! Wrong and unusual calls to the CUDA driver and cuBLASLt, to be recorded on a GPU: the codes of the real
//! libraries tell whether the stand-in reads their documentation right.
//!
//! `cuda-probe` lists its scenarios, `cuda-probe NAME` makes the calls of one. Some leave the context
//! unusable, and some may crash the driver: each runs in a process of its own.

use std::ffi::{CStr, c_void};
use std::thread;

/// Kernels: `fill` stores a value per thread, `spin` computes long, `stop` traps.
const PTX: &CStr = c".version 8.0
.target sm_80
.address_size 64
.visible .entry fill(.param .u64 out, .param .u32 value) .maxntid 64, 1, 1 {
    .reg .b32 %r<3>;
    .reg .b64 %rd<4>;
    .shared .align 4 .b8 tile[1024];
    mov.u64 %rd3, tile;
    ld.param.u64 %rd1, [out];
    ld.param.u32 %r1, [value];
    mov.u32 %r2, %tid.x;
    st.volatile.shared.u32 [tile], %r1;
    mad.wide.u32 %rd2, %r2, 4, %rd1;
    st.global.u32 [%rd2], %r1;
    ret;
}
.visible .entry spin(.param .u64 out, .param .u32 count) .maxntid 32, 1, 1 {
    .reg .pred %p<2>;
    .reg .b32 %r<4>;
    .reg .b64 %rd<2>;
    ld.param.u64 %rd1, [out];
    ld.param.u32 %r1, [count];
    mov.u32 %r2, 1;
again:
    mad.lo.u32 %r2, %r2, 1664525, %r1;
    sub.u32 %r1, %r1, 1;
    setp.ne.u32 %p1, %r1, 0;
    @%p1 bra again;
    st.global.u32 [%rd1], %r2;
    ret;
}
.visible .entry stop() .maxntid 32, 1, 1 {
    trap;
}
";

const ILLEGAL: usize = 0x1000;
/// Iterations of `spin`: milliseconds on a GPU, a second in the simulator.
const SPIN: u32 = 1 << 21;
const MAX_DYNAMIC: usize = 8;
const F32: usize = 0;
const F16: usize = 2;
const BF16: usize = 14;

type Function = extern "C" fn(
    usize,
    usize,
    usize,
    usize,
    usize,
    usize,
    usize,
    usize,
    usize,
    usize,
    usize,
    usize,
    usize,
    usize,
    usize,
    usize,
) -> usize;

/// Calls a function by its name, and returns its code.
fn call(name: &str, args: &[usize]) -> usize {
    let library = if name.starts_with("cublas") { c"libcublasLt.so" } else { c"libcuda.so" };
    let symbol = std::ffi::CString::new(name).expect("a name without zeros");
    // SAFETY: both strings end in zero; the libraries' initializers are safe to run.
    let address = unsafe {
        let library = libc::dlopen(library.as_ptr(), libc::RTLD_NOW);
        assert!(!library.is_null(), "no library for {name}");
        libc::dlsym(library, symbol.as_ptr())
    };
    assert!(!address.is_null(), "no {name}");
    // SAFETY: all functions take integers and pointers only, at most 16.
    let function = unsafe { std::mem::transmute::<*mut c_void, Function>(address) };
    let mut all = [0; 16];
    all[..args.len()].copy_from_slice(args);
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = all;
    function(a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p) & 0xFFFF_FFFF
}

/// Address of a value that a call reads or writes.
fn at<T>(value: &T) -> usize {
    std::ptr::from_ref(value) as usize
}

/// A call whose first argument receives a handle or an address; 0 after an error.
fn make(name: &str, args: &[usize]) -> usize {
    let mut made = 0usize;
    let args = [&[&raw mut made as usize], args].concat();
    let code = call(name, &args);
    if code == 0 { std::hint::black_box(made) } else { 0 }
}

/// A call whose first argument receives an integer.
fn ask(name: &str, args: &[usize]) {
    make(name, args);
}

/// A current context with a stream.
#[derive(Clone, Copy)]
struct Gpu {
    context: usize,
    stream: usize,
}

impl Gpu {
    fn new() -> Gpu {
        call("cuInit", &[0]);
        let context = make("cuDevicePrimaryCtxRetain", &[0]);
        call("cuCtxSetCurrent", &[context]);
        Gpu { context, stream: make("cuStreamCreate", &[1]) }
    }

    fn alloc(self, bytes: usize) -> usize {
        make("cuMemAlloc_v2", &[bytes])
    }

    fn upload(self, to: usize, bytes: &[u8]) -> usize {
        call("cuMemcpyHtoDAsync_v2", &[to, bytes.as_ptr() as usize, bytes.len(), self.stream])
    }

    fn download(self, from: usize, len: usize) {
        let into = vec![0u8; len.max(1)];
        call("cuMemcpyDtoHAsync_v2", &[into.as_ptr() as usize, from, len, self.stream]);
        self.sync();
    }

    fn sync(self) {
        call("cuStreamSynchronize", &[self.stream]);
    }

    fn kernel(self, name: &CStr) -> usize {
        let module = make("cuModuleLoadData", &[PTX.as_ptr() as usize]);
        make("cuModuleGetFunction", &[module, name.as_ptr() as usize])
    }

    /// Launches one block.
    fn launch(self, function: usize, out: usize, value: u32, threads: usize, shared: usize) {
        self.launch_shape(function, out, value, [1, 1, 1, threads, 1, 1], shared, self.stream);
    }

    fn launch_shape(
        self,
        function: usize,
        out: usize,
        value: u32,
        shape: [usize; 6],
        shared: usize,
        stream: usize,
    ) {
        let parameters = [at(&out), at(&value)];
        let tail = [shared, stream, at(&parameters), 0];
        call("cuLaunchKernel", &[&[function], &shape[..], &tail[..]].concat());
    }

    fn begin(self, mode: usize) {
        call("cuStreamBeginCapture_v2", &[self.stream, mode]);
    }

    fn end(self) -> usize {
        let mut graph = 0usize;
        call("cuStreamEndCapture", &[self.stream, &raw mut graph as usize]);
        std::hint::black_box(graph)
    }
}

/// Before `cuInit`, and devices that are not there.
fn init() {
    ask("cuDeviceGetCount", &[]);
    make("cuCtxGetCurrent", &[]);
    call("cuCtxSetCurrent", &[0]);
    make("cuMemAlloc_v2", &[16]);
    ask("cuDriverGetVersion", &[]);
    for code in [0, 1, 2, 700, 999, 12345] {
        make_after("cuGetErrorName", code);
        make_after("cuGetErrorString", code);
    }
    call("cuInit", &[1]);
    call("cuInit", &[0]);
    call("cuInit", &[0]);
    ask("cuDeviceGetCount", &[]);
    for ordinal in [0, 99, 0xFFFF_FFFF] {
        ask("cuDeviceGet", &[ordinal]);
        ask("cuDeviceTotalMem_v2", &[ordinal]);
        make("cuDevicePrimaryCtxRetain", &[ordinal]);
        call("cuDevicePrimaryCtxRelease_v2", &[ordinal]);
    }
    call("cuDevicePrimaryCtxRelease_v2", &[0]);
    let name = [0u8; 64];
    for len in [64, 5, 1] {
        call("cuDeviceGetName", &[at(&name), len, 0]);
    }
    for attribute in 0..=150 {
        ask("cuDeviceGetAttribute", &[attribute, 0]);
    }
    ask("cuDeviceGetAttribute", &[16, 99]);
    call("cuDeviceGetAttribute", &[0, 16, 0]);
    make("cuMemAlloc_v2", &[16]);
    make("cuStreamCreate", &[0]);
    call("cuCtxSynchronize", &[]);
    make("cuCtxGetCurrent", &[]);
}

/// A call whose last argument receives a pointer.
fn make_after(name: &str, code: usize) {
    let made = 0usize;
    call(name, &[code, at(&made)]);
}

/// Contexts are current per thread; the last release.
fn context() {
    let gpu = Gpu::new();
    let elsewhere = move || {
        make("cuCtxGetCurrent", &[]);
        gpu.alloc(16);
        call("cuStreamSynchronize", &[gpu.stream]);
        make("cuStreamCreate", &[1]);
        call("cuCtxSetCurrent", &[gpu.context]);
        gpu.alloc(16);
    };
    thread::spawn(elsewhere).join().expect("no panic");
    make("cuDevicePrimaryCtxRetain", &[0]);
    call("cuDevicePrimaryCtxRelease_v2", &[0]);
    gpu.alloc(16);
    call("cuDevicePrimaryCtxRelease_v2", &[0]);
    gpu.alloc(16);
    make("cuCtxGetCurrent", &[]);
    call("cuDevicePrimaryCtxRelease_v2", &[0]);
    let again = make("cuDevicePrimaryCtxRetain", &[0]);
    gpu.alloc(16);
    call("cuCtxSetCurrent", &[again]);
    gpu.alloc(16);
}

/// Sizes, ranges, and life of device memory.
fn memory() {
    let gpu = Gpu::new();
    gpu.alloc(0);
    gpu.alloc(1 << 50);
    call("cuMemAlloc_v2", &[0, 16]);
    for bytes in [1, 16, 255, 257, 513, 1 << 20, (2 << 20) + 1, 33 << 20] {
        gpu.alloc(bytes);
    }
    let (a, b) = (gpu.alloc(16), gpu.alloc(16));
    gpu.upload(a, &[1; 16]);
    call("cuMemcpyDtoDAsync_v2", &[b, a, 16, gpu.stream]);
    gpu.download(b, 16);
    call("cuMemsetD8Async", &[a, 2, 4, gpu.stream]);
    call("cuMemsetD8Async", &[a, 2, 0, gpu.stream]);
    gpu.download(a, 5);
    gpu.upload(a, &[]);
    gpu.download(a, 0);
    call("cuMemcpyDtoDAsync_v2", &[b, a, 0, gpu.stream]);
    call("cuMemcpyHtoDAsync_v2", &[a, 0, 16, gpu.stream]);
    // Past the end by little, by more than the granularity of suballocations, and by far.
    gpu.upload(a, &[1; 17]);
    gpu.upload(a + 8, &[1; 9]);
    gpu.sync();
    let big = gpu.alloc(64 << 20);
    for extra in [1, 512, 2 << 20, 64 << 20] {
        call("cuMemsetD8Async", &[big, 0, (64 << 20) + extra, gpu.stream]);
        call("cuMemcpyDtoDAsync_v2", &[big, big + (32 << 20) + extra, 32 << 20, gpu.stream]);
        gpu.sync();
    }
    // Overlapping ranges.
    call("cuMemcpyDtoDAsync_v2", &[a + 4, a, 8, gpu.stream]);
    call("cuMemcpyDtoDAsync_v2", &[a, a, 8, gpu.stream]);
    gpu.sync();
    // Addresses that are none.
    gpu.upload(0, &[1; 4]);
    gpu.upload(ILLEGAL, &[1; 4]);
    call("cuMemsetD8Async", &[0, 1, 4, gpu.stream]);
    call("cuMemFree_v2", &[0]);
    call("cuMemFree_v2", &[ILLEGAL]);
    call("cuMemFree_v2", &[a + 4]);
    call("cuMemFree_v2", &[big + (1 << 20)]);
    call("cuMemFree_v2", &[big]);
    call("cuMemFree_v2", &[big]);
    call("cuMemsetD8Async", &[big, 0, 16, gpu.stream]);
    call("cuMemFree_v2", &[a]);
    call("cuMemFree_v2", &[a]);
    gpu.upload(a, &[1; 4]);
    ask2("cuMemGetInfo_v2");
    gpu.sync();
}

/// A call with two results.
fn ask2(name: &str) {
    let (first, second) = (0usize, 0usize);
    call(name, &[at(&first), at(&second)]);
}

/// Limits of launches, and attributes of functions.
fn launches() {
    let gpu = Gpu::new();
    let (fill, out) = (gpu.kernel(c"fill"), gpu.alloc(4096));
    for attribute in 0..=20 {
        ask("cuFuncGetAttribute", &[attribute, fill]);
    }
    for (attribute, value) in [(0, 32), (1, 0), (4, 8), (9, 50), (9, 101), (99, 0)] {
        call("cuFuncSetAttribute", &[fill, attribute, value]);
    }
    gpu.launch(fill, out, 7, 32, 47 << 10);
    gpu.launch(fill, out, 7, 32, (47 << 10) + 1);
    gpu.launch(fill, out, 7, 32, 48 << 10);
    gpu.launch(fill, out, 7, 32, 512 << 10);
    for bytes in [0xFFFF_FFFF, 227 << 10, (226 << 10) + 1, 226 << 10] {
        call("cuFuncSetAttribute", &[fill, MAX_DYNAMIC, bytes]);
        ask("cuFuncGetAttribute", &[MAX_DYNAMIC, fill]);
    }
    gpu.launch(fill, out, 7, 32, 226 << 10);
    call("cuFuncSetAttribute", &[fill, MAX_DYNAMIC, 1024]);
    gpu.launch(fill, out, 7, 32, 2048);
    gpu.launch(fill, out, 7, 32, 47 << 10);
    for threads in [0, 33, 64, 65, 128, 1024, 1025] {
        gpu.launch(fill, out, 7, threads, 0);
    }
    for shape in [
        [0, 1, 1, 32, 1, 1],
        [1, 0, 1, 32, 1, 1],
        [1, 1, 0, 32, 1, 1],
        [1 << 31, 1, 1, 32, 1, 1],
        [1, 65535, 1, 32, 1, 1],
        [1, 65536, 1, 32, 1, 1],
        [1, 1, 65535, 32, 1, 1],
        [1, 1, 65536, 32, 1, 1],
        [1, 1, 1, 1, 0, 1],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 64, 1],
        [1, 1, 1, 8, 8, 1],
        [1, 1, 1, 1, 1, 64],
        [1, 1, 1, 1, 1, 65],
        [1, 1, 1, 1, 1025, 1],
    ] {
        gpu.launch_shape(fill, out, 7, shape, 0, gpu.stream);
    }
    // The legacy stream, and the one per thread.
    for stream in [0, 1, 2] {
        gpu.launch_shape(fill, out, 8, [1, 1, 1, 32, 1, 1], 0, stream);
        call("cuStreamSynchronize", &[stream]);
    }
    gpu.sync();
    gpu.download(out, 8);
    gpu.sync();
}

/// Images and names.
fn modules() {
    Gpu::new();
    let text = PTX.to_str().expect("ASCII");
    let load = |text: String| {
        let text = format!("{text}\0");
        make("cuModuleLoadData", &[text.as_ptr() as usize])
    };
    for target in ["sm_80", "sm_90", "sm_90a", "sm_80a", "sm_100", "sm_70", "sm_1"] {
        load(text.replace("sm_80", target));
    }
    for version in ["9.0", "9.9", "6.0", "1.0", "x"] {
        load(text.replace(".version 8.0", &format!(".version {version}")));
    }
    load(text.replace("st.global", "st.globe"));
    load(text.replace("%rd3, tile", "%rd3, elsewhere"));
    load(text.replace(".target sm_80", ""));
    load(text.replace(".version 8.0", ""));
    load("\n".into());
    call("cuModuleLoadData", &[0, PTX.as_ptr() as usize]);
    let module = load(format!("// A comment first.\n{text}"));
    for name in [c"fill", c"Fill", c"", c"fil", c"tile"] {
        make("cuModuleGetFunction", &[module, name.as_ptr() as usize]);
    }
    make("cuModuleGetFunction", &[module, 0]);
    let [first, second] =
        [0; 2].map(|_: i32| make("cuModuleGetFunction", &[module, c"fill".as_ptr() as usize]));
    call("cuFuncSetAttribute", &[first, MAX_DYNAMIC, 2048]);
    ask("cuFuncGetAttribute", &[MAX_DYNAMIC, second]);
    let other = load(text.into());
    let third = make("cuModuleGetFunction", &[other, c"fill".as_ptr() as usize]);
    ask("cuFuncGetAttribute", &[MAX_DYNAMIC, third]);
    call("cuModuleUnload", &[module]);
}

/// What may be done while a stream captures, by the mode of the capture.
fn captures(mode: usize) {
    let gpu = Gpu::new();
    let (fill, out) = (gpu.kernel(c"fill"), gpu.alloc(128));
    let (other, event, before) =
        (make("cuStreamCreate", &[1]), make("cuEventCreate", &[0]), make("cuEventCreate", &[0]));
    let blocking = make("cuStreamCreate", &[0]);
    let graph = 0usize;
    call("cuStreamEndCapture", &[gpu.stream, at(&graph)]);
    call("cuStreamBeginCapture_v2", &[0, mode]);
    call("cuStreamBeginCapture_v2", &[1, mode]);
    call("cuStreamBeginCapture_v2", &[gpu.stream, 3]);
    call("cuEventRecord", &[before, gpu.stream]);
    gpu.begin(mode);
    gpu.begin(mode);
    gpu.launch(fill, out, 1, 32, 0);
    let empty = gpu.end();
    let exec = make("cuGraphInstantiateWithFlags", &[empty, 0]);

    let freed = gpu.alloc(16);
    let bytes = [3u8; 16];
    let status = 0usize;
    let forbidden: [(&str, Vec<usize>); 30] = [
        ("cuMemAlloc_v2", vec![at(&status), 16]),
        ("cuMemFree_v2", vec![freed]),
        ("cuMemFree_v2", vec![0]),
        ("cuMemGetInfo_v2", vec![at(&status), at(&graph)]),
        ("cuMemcpyHtoDAsync_v2", vec![out, at(&bytes), 16, gpu.stream]),
        ("cuMemcpyHtoDAsync_v2", vec![out, at(&bytes), 16, other]),
        ("cuMemcpyDtoHAsync_v2", vec![at(&bytes), out, 16, gpu.stream]),
        ("cuMemcpyDtoDAsync_v2", vec![out, out + 64, 16, gpu.stream]),
        ("cuMemcpyDtoDAsync_v2", vec![out, out + 64, 1 << 30, gpu.stream]),
        ("cuMemsetD8Async", vec![out, 1, 16, gpu.stream]),
        ("cuMemsetD8Async", vec![ILLEGAL, 1, 16, gpu.stream]),
        ("cuStreamSynchronize", vec![gpu.stream]),
        ("cuStreamSynchronize", vec![other]),
        ("cuStreamSynchronize", vec![0]),
        ("cuStreamQuery", vec![gpu.stream]),
        ("cuStreamQuery", vec![other]),
        ("cuStreamIsCapturing", vec![gpu.stream, at(&status)]),
        ("cuCtxSynchronize", vec![]),
        ("cuModuleLoadData", vec![at(&status), PTX.as_ptr() as usize]),
        ("cuFuncSetAttribute", vec![fill, MAX_DYNAMIC, 2048]),
        ("cuFuncGetAttribute", vec![at(&status), 0, fill]),
        ("cuStreamCreate", vec![at(&status), 1]),
        ("cuEventCreate", vec![at(&status), 0]),
        ("cuEventSynchronize", vec![before]),
        ("cuEventQuery", vec![before]),
        ("cuStreamWaitEvent", vec![gpu.stream, before, 0]),
        ("cuGraphInstantiateWithFlags", vec![at(&status), empty, 0]),
        ("cuGraphUpload", vec![exec, gpu.stream]),
        ("cuGraphLaunch", vec![exec, gpu.stream]),
        ("cuGraphLaunch", vec![exec, other]),
    ];
    for (name, args) in forbidden {
        gpu.begin(mode);
        gpu.launch(fill, out, 1, 32, 0);
        call(name, &args);
        gpu.launch(fill, out, 2, 32, 0);
        call("cuStreamIsCapturing", &[gpu.stream, at(&status)]);
        gpu.end();
    }
    // A launch that is refused.
    gpu.begin(mode);
    gpu.launch(fill, out, 1, 65, 0);
    gpu.launch(fill, out, 1, 0, 0);
    gpu.launch(fill, out, 1, 32, 512 << 10);
    gpu.launch(fill, out, 1, 32, 0);
    gpu.end();
    // The legacy stream beside a stream that waits for it.
    call("cuStreamBeginCapture_v2", &[blocking, mode]);
    gpu.launch_shape(fill, out, 1, [1, 1, 1, 32, 1, 1], 0, 0);
    call("cuStreamEndCapture", &[blocking, at(&graph)]);

    // Events in a capture.
    gpu.begin(mode);
    gpu.launch(fill, out, 1, 32, 0);
    call("cuEventRecord", &[event, gpu.stream]);
    call("cuEventQuery", &[event]);
    gpu.end();
    gpu.begin(mode);
    call("cuEventRecord", &[event, gpu.stream]);
    call("cuEventSynchronize", &[event]);
    gpu.end();
    call("cuEventQuery", &[event]);
    call("cuEventSynchronize", &[event]);
    let ms = 0f32;
    call("cuEventElapsedTime_v2", &[at(&ms), before, event]);
    call("cuStreamWaitEvent", &[other, event, 0]);
    call("cuEventRecord", &[event, gpu.stream]);
    call("cuEventSynchronize", &[event]);

    // Other threads.
    let elsewhere = move || {
        call("cuCtxSetCurrent", &[gpu.context]);
        let freed = gpu.alloc(16);
        call("cuMemFree_v2", &[freed]);
        call("cuStreamSynchronize", &[other]);
        call("cuCtxSynchronize", &[]);
        gpu.launch(fill, out, 1, 32, 0);
        gpu.end();
    };
    gpu.begin(mode);
    thread::spawn(elsewhere).join().expect("no panic");
    gpu.launch(fill, out, 1, 32, 0);
    gpu.end();
    call("cuStreamSynchronize", &[gpu.stream]);
    gpu.alloc(16);
}

/// Captures over two streams.
fn forks() {
    let gpu = Gpu::new();
    let (fill, out) = (gpu.kernel(c"fill"), gpu.alloc(512));
    let other = Gpu { stream: make("cuStreamCreate", &[1]), ..gpu };
    let [fork, join, late] = [0; 3].map(|_: i32| make("cuEventCreate", &[2]));
    let wait = |stream: usize, event| call("cuStreamWaitEvent", &[stream, event, 0]);
    let record = |event, stream: usize| call("cuEventRecord", &[event, stream]);
    let status = 0usize;

    // Joined.
    gpu.begin(1);
    gpu.launch(fill, out, 1, 32, 0);
    record(fork, gpu.stream);
    wait(other.stream, fork);
    call("cuStreamIsCapturing", &[other.stream, at(&status)]);
    other.launch(fill, out + 128, 2, 32, 0);
    gpu.launch(fill, out + 256, 3, 32, 0);
    record(join, other.stream);
    wait(gpu.stream, join);
    gpu.launch(fill, out + 384, 4, 32, 0);
    let graph = gpu.end();
    call("cuStreamIsCapturing", &[other.stream, at(&status)]);
    let exec = make("cuGraphInstantiateWithFlags", &[graph, 0]);
    call("cuGraphUpload", &[exec, gpu.stream]);
    call("cuMemsetD8Async", &[out, 0, 512, gpu.stream]);
    call("cuGraphLaunch", &[exec, gpu.stream]);
    call("cuGraphLaunch", &[exec, gpu.stream]);
    for part in 0..4 {
        gpu.download(out + 128 * part, 4);
    }
    // Afterwards the side stream is as before.
    other.launch(fill, out, 5, 32, 0);
    other.sync();

    // Unjoined: work, and a wait alone.
    for work in [true, false] {
        gpu.begin(1);
        record(fork, gpu.stream);
        wait(other.stream, fork);
        if work {
            other.launch(fill, out, 1, 32, 0);
        }
        gpu.end();
        call("cuStreamIsCapturing", &[other.stream, at(&status)]);
        call("cuStreamIsCapturing", &[gpu.stream, at(&status)]);
        other.launch(fill, out, 1, 32, 0);
        other.sync();
    }
    // Work on the side stream after the join.
    gpu.begin(1);
    record(fork, gpu.stream);
    wait(other.stream, fork);
    record(join, other.stream);
    wait(gpu.stream, join);
    other.launch(fill, out, 1, 32, 0);
    gpu.end();

    // The side stream ends, begins, synchronizes.
    for (name, extra) in [
        ("cuStreamEndCapture", Some(at(&status))),
        ("cuStreamBeginCapture_v2", Some(1)),
        ("cuStreamSynchronize", None),
        ("cuStreamQuery", None),
    ] {
        gpu.begin(1);
        record(fork, gpu.stream);
        wait(other.stream, fork);
        other.launch(fill, out, 1, 32, 0);
        call(name, &[&[other.stream], extra.as_slice()].concat());
        record(join, other.stream);
        wait(gpu.stream, join);
        gpu.end();
    }
    // An event of before the capture; one of another capture; one never recorded.
    record(late, other.stream);
    gpu.begin(1);
    wait(gpu.stream, late);
    gpu.launch(fill, out, 1, 32, 0);
    gpu.end();
    gpu.begin(1);
    record(fork, gpu.stream);
    call("cuStreamBeginCapture_v2", &[other.stream, 1]);
    wait(other.stream, fork);
    other.end();
    gpu.end();
    let never = make("cuEventCreate", &[2]);
    gpu.begin(1);
    wait(gpu.stream, never);
    gpu.launch(fill, out, 1, 32, 0);
    gpu.end();
    // A fork event of a capture that has ended.
    gpu.begin(1);
    record(fork, gpu.stream);
    gpu.end();
    wait(other.stream, fork);
    gpu.begin(1);
    wait(gpu.stream, fork);
    gpu.end();
    // Work of the side stream that was queued before the fork.
    other.launch(fill, out, 1, 32, 0);
    gpu.begin(1);
    record(fork, gpu.stream);
    wait(other.stream, fork);
    other.launch(fill, out, 1, 32, 0);
    record(join, other.stream);
    wait(gpu.stream, join);
    gpu.end();
    // Outside captures: ordering of two streams.
    let spin = gpu.kernel(c"spin");
    gpu.launch(spin, out, SPIN, 32, 0);
    record(fork, gpu.stream);
    wait(other.stream, fork);
    other.launch(fill, out, 9, 32, 0);
    other.download(out, 4);
    wait(other.stream, 0);
    call("cuStreamWaitEvent", &[other.stream, fork, 7]);
}

/// Graphs and what is destroyed before it is used.
fn graphs() {
    let gpu = Gpu::new();
    let (fill, out) = (gpu.kernel(c"fill"), gpu.alloc(128));
    gpu.begin(1);
    gpu.end();
    gpu.begin(1);
    gpu.launch(fill, out, 1, 32, 0);
    let graph = gpu.end();
    for flags in [1, 2, 4, 8, 16, 99, 1 << 40] {
        make("cuGraphInstantiateWithFlags", &[graph, flags]);
    }
    make("cuGraphInstantiateWithFlags", &[0, 0]);
    let exec = make("cuGraphInstantiateWithFlags", &[graph, 0]);
    call("cuGraphDestroy", &[graph]);
    call("cuGraphUpload", &[exec, gpu.stream]);
    call("cuGraphUpload", &[exec, 0]);
    call("cuGraphLaunch", &[exec, gpu.stream]);
    gpu.download(out, 4);
    call("cuGraphLaunch", &[exec, 0]);
    call("cuGraphLaunch", &[0, gpu.stream]);
    call("cuGraphUpload", &[0, gpu.stream]);
    call("cuGraphDestroy", &[0]);
    call("cuGraphExecDestroy", &[0]);
    // The graph's memory is freed: it is found when the graph runs.
    call("cuGraphLaunch", &[exec, gpu.stream]);
    call("cuGraphExecDestroy", &[exec]);
    gpu.sync();
}

/// Events and their times; streams that are not done.
fn events() {
    let gpu = Gpu::new();
    for flags in [0, 1, 2, 3, 4, 5, 6, 7, 8, 16] {
        make("cuEventCreate", &[flags]);
    }
    for flags in [0, 1, 2, 3] {
        make("cuStreamCreate", &[flags]);
    }
    let [start, end] = [0; 2].map(|_: i32| make("cuEventCreate", &[0]));
    let untimed = make("cuEventCreate", &[2]);
    let ms = 0f32;
    for name in ["cuEventElapsedTime", "cuEventElapsedTime_v2"] {
        call(name, &[at(&ms), start, end]);
    }
    call("cuEventQuery", &[start]);
    call("cuEventSynchronize", &[start]);
    call("cuStreamWaitEvent", &[gpu.stream, start, 0]);
    for event in [start, end, untimed] {
        call("cuEventRecord", &[event, gpu.stream]);
    }
    call("cuEventSynchronize", &[untimed]);
    for name in ["cuEventElapsedTime", "cuEventElapsedTime_v2"] {
        call(name, &[at(&ms), start, end]);
        call(name, &[at(&ms), end, start]);
        call(name, &[at(&ms), start, untimed]);
        call(name, &[0, start, end]);
    }
    let (spin, out) = (gpu.kernel(c"spin"), gpu.alloc(128));
    gpu.launch(spin, out, 2, 32, 0);
    call("cuStreamQuery", &[gpu.stream]);
    gpu.sync();
    call("cuStreamQuery", &[gpu.stream]);
    gpu.launch(spin, out, SPIN, 32, 0);
    call("cuEventRecord", &[end, gpu.stream]);
    call("cuStreamQuery", &[gpu.stream]);
    call("cuEventQuery", &[end]);
    call("cuEventElapsedTime_v2", &[at(&ms), start, end]);
    call("cuEventSynchronize", &[end]);
    call("cuEventElapsedTime_v2", &[at(&ms), start, end]);
    call("cuEventRecord", &[end, 0]);
    call("cuEventRecord", &[0, gpu.stream]);
    call("cuEventDestroy_v2", &[0]);
    call("cuEventQuery", &[0]);
    call("cuEventSynchronize", &[0]);
    call("cuEventElapsedTime_v2", &[at(&ms), start, 0]);
    call("cuStreamDestroy_v2", &[0]);
    gpu.launch(spin, out, SPIN, 32, 0);
    call("cuEventDestroy_v2", &[end]);
    call("cuStreamDestroy_v2", &[gpu.stream]);
    call("cuCtxSynchronize", &[]);
    gpu.download_later(out);
}

impl Gpu {
    /// Reads a word over a new stream.
    fn download_later(self, from: usize) {
        Gpu { stream: make("cuStreamCreate", &[1]), ..self }.download(from, 4);
    }

    /// What a lost context still does.
    fn after(self, out: usize) {
        self.sync();
        self.sync();
        self.alloc(16);
        call("cuMemFree_v2", &[out]);
        make("cuEventCreate", &[0]);
        make("cuStreamCreate", &[1]);
        self.upload(out, &[1; 4]);
        call("cuCtxSynchronize", &[]);
        make("cuModuleLoadData", &[PTX.as_ptr() as usize]);
        make("cuCtxGetCurrent", &[]);
        call("cuCtxSetCurrent", &[self.context]);
        ask("cuDeviceGetAttribute", &[16, 0]);
        ask2("cuMemGetInfo_v2");
        call("cuStreamDestroy_v2", &[self.stream]);
        call("cuDevicePrimaryCtxRelease_v2", &[0]);
        let again = make("cuDevicePrimaryCtxRetain", &[0]);
        call("cuCtxSetCurrent", &[again]);
        self.alloc(16);
    }
}

/// Kernels that fail.
fn fails(kernel: &CStr, offset: Option<usize>) {
    let gpu = Gpu::new();
    let (function, out) = (gpu.kernel(kernel), gpu.alloc(128));
    gpu.launch(function, offset.map_or(0, |offset| out + offset), 1, 32, 0);
    gpu.after(out);
}

/// A graph whose memory was freed.
fn freed_in_graph() {
    let gpu = Gpu::new();
    let (fill, out) = (gpu.kernel(c"fill"), gpu.alloc(64 << 20));
    gpu.begin(1);
    gpu.launch(fill, out, 1, 32, 0);
    let exec = make("cuGraphInstantiateWithFlags", &[gpu.end(), 0]);
    call("cuMemFree_v2", &[out]);
    call("cuGraphLaunch", &[exec, gpu.stream]);
    gpu.after(out);
}

/// A handle that is used after it was destroyed, which the reference leaves undefined.
fn destroyed(what: &str) {
    let gpu = Gpu::new();
    let (fill, out) = (gpu.kernel(c"fill"), gpu.alloc(128));
    let event = make("cuEventCreate", &[0]);
    match what {
        "stream" => {
            call("cuStreamDestroy_v2", &[gpu.stream]);
            gpu.sync();
            gpu.launch(fill, out, 1, 32, 0);
            call("cuEventRecord", &[event, gpu.stream]);
            call("cuStreamDestroy_v2", &[gpu.stream]);
        }
        "event" => {
            call("cuEventDestroy_v2", &[event]);
            call("cuEventRecord", &[event, gpu.stream]);
            call("cuEventSynchronize", &[event]);
            call("cuEventDestroy_v2", &[event]);
        }
        "graph" => {
            gpu.begin(1);
            gpu.launch(fill, out, 1, 32, 0);
            let graph = gpu.end();
            let exec = make("cuGraphInstantiateWithFlags", &[graph, 0]);
            call("cuGraphDestroy", &[graph]);
            make("cuGraphInstantiateWithFlags", &[graph, 0]);
            call("cuGraphDestroy", &[graph]);
            call("cuGraphExecDestroy", &[exec]);
            call("cuGraphLaunch", &[exec, gpu.stream]);
            call("cuGraphExecDestroy", &[exec]);
        }
        "module" => {
            let module = make("cuModuleLoadData", &[PTX.as_ptr() as usize]);
            let function = make("cuModuleGetFunction", &[module, c"fill".as_ptr() as usize]);
            call("cuModuleUnload", &[module]);
            make("cuModuleGetFunction", &[module, c"fill".as_ptr() as usize]);
            call("cuModuleUnload", &[module]);
            gpu.launch(function, out, 1, 32, 0);
        }
        // While it captures.
        _ => {
            gpu.begin(1);
            gpu.launch(fill, out, 1, 32, 0);
            call("cuStreamDestroy_v2", &[gpu.stream]);
            gpu.alloc(16);
        }
    }
    call("cuCtxSynchronize", &[]);
}

/// Descriptors of a matmul of cuBLASLt.
struct Matmul {
    handle: usize,
    description: usize,
    layouts: [usize; 4],
    preference: usize,
}

fn set(name: &str, object: usize, which: usize, value: &[u8]) -> usize {
    call(name, &[object, which, value.as_ptr() as usize, value.len()])
}

const SET_DESCRIPTION: &str = "cublasLtMatmulDescSetAttribute";
const SET_LAYOUT: &str = "cublasLtMatrixLayoutSetAttribute";
const SET_PREFERENCE: &str = "cublasLtMatmulPreferenceSetAttribute";

impl Matmul {
    /// `m x k` by `k x n`; leading dimensions of A, B and D.
    fn new(
        handle: usize,
        [m, n, k]: [usize; 3],
        [input, output]: [usize; 2],
        [ta, tb]: [bool; 2],
        ld: Option<[usize; 3]>,
    ) -> Matmul {
        let description = make("cublasLtMatmulDescCreate", &[68, 0]);
        for (which, transposed) in [(3, ta), (4, tb)] {
            set(SET_DESCRIPTION, description, which, &i32::from(transposed).to_le_bytes());
        }
        let (a, b) = (if ta { (k, m) } else { (m, k) }, if tb { (n, k) } else { (k, n) });
        let [la, lb, ld] = ld.unwrap_or([a.0, b.0, m]);
        let layout = |dtype, (rows, cols): (usize, usize), ld| {
            make("cublasLtMatrixLayoutCreate", &[dtype, rows, cols, ld])
        };
        let (a, b) = (layout(input, a, la), layout(input, b, lb));
        let (c, d) = (layout(output, (m, n), ld), layout(output, (m, n), ld));
        let preference = make("cublasLtMatmulPreferenceCreate", &[]);
        set(SET_PREFERENCE, preference, 1, &(32usize << 20).to_le_bytes());
        Matmul { handle, description, layouts: [a, b, c, d], preference }
    }

    fn align(&self, bytes: u32) {
        for which in 5..=8 {
            set(SET_PREFERENCE, self.preference, which, &bytes.to_le_bytes());
        }
    }

    /// The heuristic's algorithms.
    fn heuristic(&self, requested: usize) -> Vec<[u64; 12]> {
        let mut results = vec![[0u64; 12]; requested.max(1)];
        let mut returned = 0usize;
        let [a, b, c, d] = self.layouts;
        let found = call(
            "cublasLtMatmulAlgoGetHeuristic",
            &[
                self.handle,
                self.description,
                a,
                b,
                c,
                d,
                self.preference,
                requested,
                results.as_mut_ptr() as usize,
                &raw mut returned as usize,
            ],
        );
        results.truncate(if found == 0 { std::hint::black_box(returned) } else { 0 });
        results
    }

    fn check(&self, algorithm: &[u64]) -> usize {
        let result = [0u64; 12];
        let [a, b, c, d] = self.layouts;
        let algorithm = algorithm.as_ptr() as usize;
        call(
            "cublasLtMatmulAlgoCheck",
            &[self.handle, self.description, a, b, c, d, algorithm, at(&result)],
        )
    }

    fn run(
        &self,
        [a, b, d]: [usize; 3],
        algorithm: usize,
        workspace: (usize, usize),
        stream: usize,
    ) {
        let (alpha, beta) = (1f32, 0f32);
        let [la, lb, _, ld] = self.layouts;
        call(
            "cublasLtMatmul",
            &[
                self.handle,
                self.description,
                at(&alpha),
                a,
                la,
                b,
                lb,
                at(&beta),
                d,
                ld,
                d,
                ld,
                algorithm,
                workspace.0,
                workspace.1,
                stream,
            ],
        );
    }

    fn destroy(self) {
        call("cublasLtMatmulPreferenceDestroy", &[self.preference]);
        for layout in self.layouts {
            call("cublasLtMatrixLayoutDestroy", &[layout]);
        }
        call("cublasLtMatmulDescDestroy", &[self.description]);
    }
}

/// Descriptors and attributes.
fn descriptors() {
    make("cublasLtCreate", &[]);
    let _gpu = Gpu::new();
    call("cublasLtGetVersion", &[]);
    let handle = make("cublasLtCreate", &[]);
    for (compute, scale) in [(68, 0), (68, 2), (64, 2), (77, 0), (999, 0), (68, 999)] {
        make("cublasLtMatmulDescCreate", &[compute, scale]);
    }
    for (dtype, rows, cols, ld) in [
        (0, 4, 4, 4),
        (2, 4, 4, 4),
        (14, 4, 4, 4),
        (999, 4, 4, 4),
        (0, 4, 4, 3),
        (0, 0, 4, 4),
        (0, 4, 0, 4),
        (0, 4, 4, 0),
        (0, 4, 4, usize::MAX),
    ] {
        make("cublasLtMatrixLayoutCreate", &[dtype, rows, cols, ld]);
    }
    let matmul = Matmul::new(handle, [4, 4, 4], [F32, F32], [false, false], None);
    let description = matmul.description;
    for operation in [0, 1, 2, 7, -1] {
        set(SET_DESCRIPTION, description, 3, &i32::to_le_bytes(operation));
    }
    set(SET_DESCRIPTION, description, 3, &0i32.to_le_bytes());
    set(SET_DESCRIPTION, description, 3, &[0; 8]);
    set(SET_DESCRIPTION, description, 3, &[0; 2]);
    set(SET_DESCRIPTION, description, 999, &[0; 4]);
    call(SET_DESCRIPTION, &[description, 3, 0, 4]);
    let layout = matmul.layouts[0];
    for order in [0, 1, 2, 99] {
        set(SET_LAYOUT, layout, 1, &i32::to_le_bytes(order));
    }
    set(SET_LAYOUT, layout, 1, &0i32.to_le_bytes());
    for count in [1, 2, 0, -1] {
        set(SET_LAYOUT, layout, 5, &i32::to_le_bytes(count));
    }
    set(SET_LAYOUT, layout, 5, &1i32.to_le_bytes());
    set(SET_LAYOUT, layout, 5, &[1, 0, 0, 0, 0, 0, 0, 0]);
    set(SET_LAYOUT, layout, 6, &[0; 4]);
    set(SET_LAYOUT, layout, 6, &(-16i64).to_le_bytes());
    set(SET_LAYOUT, layout, 6, &16i64.to_le_bytes());
    set(SET_LAYOUT, layout, 999, &[0; 4]);
    let preference = matmul.preference;
    for bytes in [0u64, 1, 32 << 20, u64::MAX] {
        set(SET_PREFERENCE, preference, 1, &bytes.to_le_bytes());
    }
    set(SET_PREFERENCE, preference, 1, &[0; 4]);
    for mask in [0u32, 2, 7, 99] {
        set(SET_PREFERENCE, preference, 3, &mask.to_le_bytes());
    }
    for alignment in [256u32, 512, 16, 3, 1, 0] {
        set(SET_PREFERENCE, preference, 5, &alignment.to_le_bytes());
    }
    set(SET_PREFERENCE, preference, 5, &[0; 8]);
    set(SET_PREFERENCE, preference, 999, &[0; 4]);
    matmul.destroy();
    for name in [
        "cublasLtMatmulPreferenceDestroy",
        "cublasLtMatrixLayoutDestroy",
        "cublasLtMatmulDescDestroy",
    ] {
        call(name, &[0]);
    }
    call("cublasLtDestroy", &[handle]);
    call("cublasLtDestroy", &[0]);
    set(SET_DESCRIPTION, 0, 3, &[0; 4]);
    call("cublasLtMatmulDescCreate", &[0, 68, 0]);
    call("cublasLtCreate", &[0]);
}

/// What the heuristic offers by shape, type and alignment.
fn heuristics() {
    let _gpu = Gpu::new();
    let handle = make("cublasLtCreate", &[]);
    for shape in [[1, 1, 1], [8, 8, 8], [7, 5, 3], [64, 64, 64], [1, 64, 64], [300, 128, 33]] {
        for dtypes in [[F32, F32], [BF16, BF16], [F16, F16], [BF16, F32], [F16, BF16], [F32, BF16]]
        {
            for transposed in [[false, false], [true, false], [false, true]] {
                let matmul = Matmul::new(handle, shape, dtypes, transposed, None);
                for alignment in [256, 16, 2] {
                    matmul.align(alignment);
                    matmul.heuristic(1);
                }
                matmul.destroy();
            }
        }
    }
    // Shapes and strides that do not fit.
    for (shape, ld) in [
        ([8, 8, 8], [4, 8, 8]),
        ([8, 8, 8], [8, 8, 4]),
        ([8, 8, 8], [9, 10, 11]),
        ([8, 8, 8], [16, 16, 16]),
        ([0, 8, 8], [8, 8, 8]),
        ([8, 8, 0], [8, 8, 8]),
    ] {
        for dtype in [F32, BF16] {
            let matmul = Matmul::new(handle, shape, [dtype; 2], [false, false], Some(ld));
            matmul.align(2);
            matmul.heuristic(1);
            matmul.destroy();
        }
    }
    let (small, large) = (
        Matmul::new(handle, [8, 8, 8], [BF16; 2], [false, false], None),
        Matmul::new(handle, [256, 256, 8192], [BF16; 2], [false, false], None),
    );
    let mixed = Matmul {
        layouts: [small.layouts[0], large.layouts[1], small.layouts[2], small.layouts[3]],
        ..small
    };
    mixed.heuristic(1);
    large.heuristic(0);
    large.heuristic(8);
    // Split-K, with and without sums in the output's type, with and without a workspace.
    for (mask, workspace) in [(7u32, 32usize << 20), (2, 32 << 20), (0, 32 << 20), (7, 0), (2, 0)] {
        set(SET_PREFERENCE, large.preference, 3, &mask.to_le_bytes());
        set(SET_PREFERENCE, large.preference, 1, &workspace.to_le_bytes());
        large.heuristic(4);
    }
    // Batches.
    for counts in [[2, 2, 2, 2], [2, 1, 2, 2], [2, 2, 2, 3]] {
        let batch = Matmul::new(handle, [8, 8, 8], [F32; 2], [false, false], None);
        for (layout, count) in batch.layouts.into_iter().zip(counts) {
            set(SET_LAYOUT, layout, 5, &i32::to_le_bytes(count));
            set(SET_LAYOUT, layout, 6, &64i64.to_le_bytes());
        }
        batch.heuristic(1);
        batch.destroy();
    }
}

/// Matmuls with pointers, workspaces and algorithms that do not fit.
fn matmuls(dtype: usize, what: &str) {
    let gpu = Gpu::new();
    let handle = make("cublasLtCreate", &[]);
    let [a, b, d] = [0; 3].map(|_: i32| gpu.alloc(1 << 20));
    let workspace = (gpu.alloc(32 << 20), 32 << 20);
    let one = if dtype == F32 { [0, 0, 0x80, 0x3F].repeat(16) } else { [0x80, 0x3F].repeat(32) };
    call("cuMemsetD8Async", &[b, 0, 1 << 20, gpu.stream]);
    call("cuMemsetD8Async", &[a, 0, 1 << 20, gpu.stream]);
    gpu.upload(a, &one);
    gpu.upload(b, &one);
    let matmul = Matmul::new(handle, [8, 8, 8], [dtype; 2], [false, false], None);
    let Some(found) = matmul.heuristic(1).first().copied() else { return };
    let algorithm = &found[..8];
    let pointer = algorithm.as_ptr() as usize;
    matmul.check(algorithm);
    matmul.run([a, b, d], pointer, workspace, gpu.stream);
    gpu.download(d, 64);
    match what {
        "pointers" => {
            for offset in [32, 16, 8, 4, 2] {
                for which in 0..3 {
                    let mut at = [a, b, d];
                    at[which] += offset;
                    matmul.run(at, pointer, workspace, gpu.stream);
                    gpu.sync();
                }
            }
            return;
        }
        "workspace" => {
            matmul.run([a, b, d], pointer, (0, 0), gpu.stream);
            gpu.sync();
            matmul.run([a, b, d], pointer, (workspace.0 + 16, 1 << 20), gpu.stream);
            gpu.sync();
            // A sum over a long k, for which algorithms want a workspace.
            let long = Matmul::new(handle, [64, 64, 8192], [dtype; 2], [true, false], None);
            let Some(found) = long.heuristic(1).first().copied() else { return };
            long.run([a, b, d], at(&found), workspace, gpu.stream);
            gpu.sync();
            long.run([a, b, d], at(&found), (workspace.0, 16), gpu.stream);
            gpu.sync();
            long.run([a, b, d], at(&found), (0, 0), gpu.stream);
            gpu.sync();
            long.run([a, b, d], at(&found), (workspace.0 + 16, 31 << 20), gpu.stream);
            gpu.sync();
            return;
        }
        "garbage" => {
            let garbage = [u64::MAX; 8];
            matmul.check(&garbage);
            matmul.run([a, b, d], at(&garbage), workspace, gpu.stream);
            gpu.sync();
            return;
        }
        "null" => {
            let (one, zero, [la, lb, _, ld]) = (1f32, 0f32, matmul.layouts);
            for (alpha, beta) in [(at(&one), 0), (0, at(&zero))] {
                call(
                    "cublasLtMatmul",
                    &[
                        handle,
                        matmul.description,
                        alpha,
                        a,
                        la,
                        b,
                        lb,
                        beta,
                        d,
                        ld,
                        d,
                        ld,
                        pointer,
                        workspace.0,
                        workspace.1,
                        gpu.stream,
                    ],
                );
            }
            return;
        }
        "nowhere" => {
            matmul.run([a, b, 0], pointer, workspace, gpu.stream);
            gpu.sync();
            matmul.run([0, b, d], pointer, workspace, gpu.stream);
            gpu.sync();
            return;
        }
        _ => {}
    }
    matmul.run([a, b, d], 0, workspace, gpu.stream);
    matmul.run([a, b, d], pointer, workspace, 0);
    gpu.sync();
    // An algorithm of another matmul, of other alignments, of none.
    let other = Matmul::new(handle, [8, 8, 8], [F16; 2], [true, false], None);
    other.check(algorithm);
    other.run([a, b, d], pointer, workspace, gpu.stream);
    let narrow = Matmul::new(handle, [7, 5, 3], [dtype; 2], [false, false], None);
    narrow.check(algorithm);
    narrow.align(if dtype == F32 { 4 } else { 2 });
    if let Some(found) = narrow.heuristic(1).first().copied() {
        narrow.run([a + 4, b + 4, d + 4], at(&found), workspace, gpu.stream);
        matmul.check(&found[..8]);
    }
    let nothing = [0u64; 8];
    matmul.check(&nothing);
    matmul.run([a, b, d], at(&nothing), workspace, gpu.stream);
    gpu.sync();
    // The output over an input; captures.
    matmul.run([a, b, a], pointer, workspace, gpu.stream);
    gpu.begin(1);
    matmul.run([a, b, d], pointer, workspace, gpu.stream);
    gpu.end();
    gpu.begin(1);
    matmul.run([a, b, d], 0, workspace, gpu.stream);
    gpu.end();
    gpu.begin(1);
    matmul.heuristic(1);
    let captured = make("cublasLtCreate", &[]);
    gpu.end();
    let (one, zero) = (1f32, 0f32);
    let [la, lb, lc, ld] = matmul.layouts;
    // C and D of one address with two layouts; other scalars; null scalars; no handle.
    for (handle, alpha, beta) in [
        (handle, at(&one), at(&zero)),
        (handle, at(&one), at(&one)),
        (captured, at(&one), at(&one)),
        (0, at(&one), at(&one)),
    ] {
        call(
            "cublasLtMatmul",
            &[
                handle,
                matmul.description,
                alpha,
                a,
                la,
                b,
                lb,
                beta,
                d,
                lc,
                d,
                ld,
                pointer,
                workspace.0,
                workspace.1,
                gpu.stream,
            ],
        );
    }
    gpu.sync();
    matmul.destroy();
}

/// Memory that runs out.
fn full() {
    let gpu = Gpu::new();
    let (mut free, mut total) = (0usize, 0usize);
    call("cuMemGetInfo_v2", &[&raw mut free as usize, &raw mut total as usize]);
    let free = std::hint::black_box(free);
    let most = gpu.alloc(free - (1 << 30));
    gpu.alloc(4 << 30);
    gpu.alloc(1 << 20);
    call("cuMemFree_v2", &[most]);
    gpu.alloc(1 << 20);
}

/// A launch with a null pointer.
fn null(what: &str) {
    let gpu = Gpu::new();
    let (fill, out) = (gpu.kernel(c"fill"), gpu.alloc(128));
    let (value, extra) = (1u32, [0usize; 1]);
    let (whole, part) = ([at(&out), at(&value)], [at(&out), 0]);
    let launch = |function: usize, parameters: usize, extra: usize| {
        let shape = [1, 1, 1, 32, 1, 1, 0, gpu.stream];
        call("cuLaunchKernel", &[&[function], &shape[..], &[parameters, extra]].concat());
    };
    match what {
        "extra" => launch(fill, at(&whole), at(&extra)),
        "function" => launch(0, at(&whole), 0),
        "attribute" => ask("cuFuncGetAttribute", &[0, 0]),
        "parameters" => launch(fill, 0, 0),
        _ => launch(fill, at(&part), 0),
    }
    gpu.sync();
}

fn main() {
    let scenarios: &[(&str, &dyn Fn())] = &[
        ("init", &init),
        ("context", &context),
        ("memory", &memory),
        ("launches", &launches),
        ("modules", &modules),
        ("capture-global", &|| captures(0)),
        ("capture-thread", &|| captures(1)),
        ("capture-relaxed", &|| captures(2)),
        ("forks", &forks),
        ("graphs", &graphs),
        ("events", &events),
        ("illegal-address", &|| fails(c"fill", None)),
        ("misaligned-address", &|| fails(c"fill", Some(2))),
        ("trap", &|| fails(c"stop", Some(0))),
        ("freed-in-graph", &freed_in_graph),
        ("descriptors", &descriptors),
        ("heuristics", &heuristics),
        ("matmuls-f32", &|| matmuls(F32, "")),
        ("matmuls-bf16", &|| matmuls(BF16, "")),
        ("pointers-f32", &|| matmuls(F32, "pointers")),
        ("pointers-bf16", &|| matmuls(BF16, "pointers")),
        ("workspaces", &|| matmuls(BF16, "workspace")),
        ("garbage-algorithm", &|| matmuls(BF16, "garbage")),
        ("null-matrix", &|| matmuls(BF16, "nowhere")),
        ("null-scalar", &|| matmuls(BF16, "null")),
        ("destroyed-stream", &|| destroyed("stream")),
        ("destroyed-event", &|| destroyed("event")),
        ("destroyed-graph", &|| destroyed("graph")),
        ("destroyed-module", &|| destroyed("module")),
        ("destroyed-capture", &|| destroyed("capture")),
        ("null-extra", &|| null("extra")),
        ("null-function", &|| null("function")),
        ("null-attribute", &|| null("attribute")),
        ("null-parameters", &|| null("parameters")),
        ("null-parameter", &|| null("parameter")),
        // Alone, since it takes the whole memory.
        ("full", &full),
    ];
    let wanted = std::env::args().nth(1);
    let Some(wanted) = wanted else {
        for (name, _) in scenarios {
            println!("{name}");
        }
        return;
    };
    let Some((_, scenario)) = scenarios.iter().find(|(name, _)| *name == wanted) else {
        eprintln!("cuda-probe: unknown scenario {wanted}");
        std::process::exit(2);
    };
    scenario();
}
