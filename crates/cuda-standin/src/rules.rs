//! The rules of the driver, each broken once.

use std::ffi::c_void;
use std::ptr::null;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::codes::Code;
use crate::driver::*;
use crate::gemm::{Gemm, Operand};
use crate::state::state;

const PTX: &str = ".version 9.0
.target sm_80
.address_size 64
.entry fill(.param .u64 out, .param .u32 value) .maxntid 64, 1, 1 {
    .reg .b32 %r<3>;
    .reg .b64 %rd<4>;
    .shared .align 4 .b8 tile[1024];
    mov.u64 %rd3, tile;
    ld.param.u64 %rd1, [out];
    ld.param.u32 %r1, [value];
    mov.u32 %r2, %tid.x;
    mad.wide.u32 %rd2, %r2, 4, %rd1;
    st.global.u32 [%rd2], %r1;
    ret;
}\0";

const OK: u32 = 0;
/// `CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`
const MAX_DYNAMIC: u32 = 8;

/// A context that is current, with a stream, for one test at a time.
struct Gpu {
    context: usize,
    stream: usize,
    _alone: MutexGuard<'static, ()>,
}

impl Gpu {
    fn new() -> Gpu {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut context, mut stream) = (0, 0);
        assert_eq!(cuInit(0), OK);
        assert_eq!(cuDevicePrimaryCtxRetain(&raw mut context, 0), OK);
        assert_eq!(cuCtxSetCurrent(context), OK);
        assert_eq!(cuStreamCreate(&raw mut stream, 1), OK);
        Gpu { context, stream, _alone: alone }
    }

    fn alloc(&self, bytes: usize) -> u64 {
        let mut at = 0;
        assert_eq!(cuMemAlloc_v2(&raw mut at, bytes), OK);
        at
    }

    fn upload(&self, to: u64, bytes: &[u8]) -> u32 {
        cuMemcpyHtoDAsync_v2(to, bytes.as_ptr().cast(), bytes.len(), self.stream)
    }

    fn download(&self, from: u64, len: usize) -> Result<Vec<u8>, u32> {
        let mut into = vec![0; len];
        match cuMemcpyDtoHAsync_v2(into.as_mut_ptr().cast(), from, len, self.stream) {
            OK => Ok(into),
            code => Err(code),
        }
    }

    fn fill(&self) -> usize {
        let (mut module, mut function) = (0, 0);
        assert_eq!(cuModuleLoadData(&raw mut module, PTX.as_ptr().cast()), OK);
        assert_eq!(cuModuleGetFunction(&raw mut function, module, c"fill".as_ptr()), OK);
        function
    }

    /// Launches one block of `fill`.
    fn launch(&self, function: usize, at: u64, threads: u32, shared: u32) -> u32 {
        let value = 7u32;
        let parameters: [*const c_void; 2] = [(&raw const at).cast(), (&raw const value).cast()];
        let parameters = parameters.as_ptr();
        cuLaunchKernel(function, 1, 1, 1, threads, 1, 1, shared, self.stream, parameters, null())
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        cuDevicePrimaryCtxRelease_v2(0);
        cuCtxSetCurrent(0);
        state().lost = None;
    }
}

#[test]
fn contexts_are_current_per_thread() {
    let gpu = Gpu::new();
    let context = gpu.context;
    let elsewhere = std::thread::spawn(move || {
        let mut at = 0;
        let before = cuMemAlloc_v2(&raw mut at, 4);
        (before, cuCtxSetCurrent(context), cuMemAlloc_v2(&raw mut at, 4))
    });
    assert_eq!(elsewhere.join().unwrap(), (Code::INVALID_CONTEXT.0, OK, OK));
    assert_eq!(cuCtxSetCurrent(context + 1), Code::INVALID_CONTEXT.0);
    // The last release destroys what the context holds.
    let mut again = 0;
    assert_eq!(cuDevicePrimaryCtxRetain(&raw mut again, 0), OK);
    assert_eq!((again, cuDevicePrimaryCtxRelease_v2(0)), (context, OK));
    assert_eq!(cuDevicePrimaryCtxRelease_v2(0), OK);
    let mut at = 0;
    assert_eq!(cuMemAlloc_v2(&raw mut at, 4), Code::CONTEXT_IS_DESTROYED.0);
    assert!(state().allocations.is_empty());
}

#[test]
fn memory_is_checked_by_range_and_by_life() {
    let gpu = Gpu::new();
    let (a, b) = (gpu.alloc(16), gpu.alloc(16));
    assert_eq!(a % 256, 0);
    assert_eq!(cuMemAlloc_v2(&mut 0, 0), Code::INVALID_VALUE.0);
    assert_eq!(cuMemAlloc_v2(&mut 0, 1 << 50), Code::OUT_OF_MEMORY.0);
    assert_eq!(gpu.upload(a, &[1; 17]), Code::INVALID_VALUE.0);
    assert_eq!(gpu.upload(a + 8, &[1; 9]), Code::INVALID_VALUE.0);
    assert_eq!(gpu.upload(a, &[1; 16]), OK);
    assert_eq!(cuMemcpyDtoDAsync_v2(a + 4, a, 8, gpu.stream), Code::INVALID_VALUE.0);
    assert_eq!(cuMemcpyDtoDAsync_v2(b, a, 16, gpu.stream), OK);
    assert_eq!(cuMemsetD8Async(a, 2, 17, gpu.stream), Code::INVALID_VALUE.0);
    assert_eq!(cuMemsetD8Async(a, 2, 4, gpu.stream), OK);
    assert_eq!(gpu.download(b, 16), Ok(vec![1; 16]));
    assert_eq!(gpu.download(a, 5), Ok(vec![2, 2, 2, 2, 1]));
    assert_eq!(cuMemFree_v2(a + 4), Code::INVALID_VALUE.0);
    assert_eq!(cuMemFree_v2(a), OK);
    assert_eq!(cuMemFree_v2(a), Code::INVALID_VALUE.0);
    assert_eq!(gpu.upload(a, &[1; 4]), Code::INVALID_VALUE.0);
    assert_eq!(state().leaks(), ["1 allocations", "1 streams"]);
}

#[test]
fn launches_are_checked_at_the_call_and_fail_late() {
    let gpu = Gpu::new();
    let (fill, at) = (gpu.fill(), gpu.alloc(4 * 32));
    let mut found = 0;
    assert_eq!(cuFuncGetAttribute(&raw mut found, 1, fill), OK);
    assert_eq!(found, 1024, "static shared memory");
    // 48 KiB in all without opt-in, 227 KiB with it.
    assert_eq!(gpu.launch(fill, at, 32, 47 << 10), OK);
    assert_eq!(gpu.launch(fill, at, 32, (47 << 10) + 4), Code::INVALID_VALUE.0);
    assert_eq!(cuFuncSetAttribute(fill, MAX_DYNAMIC, 227 << 10), Code::INVALID_VALUE.0);
    assert_eq!(cuFuncSetAttribute(fill, MAX_DYNAMIC, 226 << 10), OK);
    assert_eq!(gpu.launch(fill, at, 32, 226 << 10), OK);
    for threads in [0, 1025] {
        assert_eq!(gpu.launch(fill, at, threads, 0), Code::INVALID_VALUE.0);
    }
    assert_eq!(gpu.launch(fill, at, 65, 0), Code::INVALID_VALUE.0);
    assert_eq!(gpu.launch(fill + 1, at, 32, 0), Code::INVALID_HANDLE.0);
    assert_eq!(gpu.download(at, 4), Ok(vec![7, 0, 0, 0]));
    // One thread too many: the launch succeeds, the context is lost at the next synchronization.
    assert_eq!(gpu.launch(fill, at, 33, 0), OK);
    assert_eq!(cuStreamSynchronize(gpu.stream), Code::ILLEGAL_ADDRESS.0);
    assert_eq!(cuMemAlloc_v2(&mut 0, 4), Code::ILLEGAL_ADDRESS.0);
    assert_eq!(cuDevicePrimaryCtxRelease_v2(0), OK);
    assert_eq!(cuDevicePrimaryCtxRetain(&mut 0, 0), Code::ILLEGAL_ADDRESS.0);
}

#[test]
fn images_must_be_ptx_that_the_driver_knows() {
    let _gpu = Gpu::new();
    let load = |text: String| cuModuleLoadData(&mut 0, format!("{text}\0").as_ptr().cast());
    let text = PTX.trim_end_matches('\0');
    assert_eq!(load(text.replace("sm_80", "sm_90")), OK);
    assert_eq!(load(text.replace("sm_80", "sm_90a")), OK);
    assert_eq!(load(text.replace("sm_80", "sm_100")), Code::INVALID_PTX.0);
    assert_eq!(load(text.replace("sm_80", "sm_80a")), Code::INVALID_PTX.0);
    let newer = load(text.replace(".version 9.0", ".version 9.1"));
    assert_eq!(newer, Code::UNSUPPORTED_PTX_VERSION.0);
    assert_eq!(load(text.replace("st.global", "st.globe")), Code::INVALID_PTX.0);
    let fatbin = 0xBA55_ED50_u32;
    assert_eq!(cuModuleLoadData(&mut 0, (&raw const fatbin).cast()), Code::NO_BINARY_FOR_GPU.0);
}

#[test]
fn captures_refuse_what_cannot_be_captured() {
    let gpu = Gpu::new();
    let (fill, at) = (gpu.fill(), gpu.alloc(4 * 32));
    let (mut graph, mut exec, mut event) = (0, 0, 0);
    assert_eq!(cuEventCreate(&raw mut event, 0), OK);
    assert_eq!(cuStreamEndCapture(gpu.stream, &raw mut graph), Code::ILLEGAL_STATE.0);
    assert_eq!(cuStreamBeginCapture_v2(0, 1), Code::STREAM_CAPTURE_UNSUPPORTED.0);

    // Work is recorded, and executed by each launch of the graph.
    assert_eq!(gpu.upload(at, &[1; 128]), OK);
    assert_eq!(cuStreamBeginCapture_v2(gpu.stream, 1), OK);
    assert_eq!(cuStreamBeginCapture_v2(gpu.stream, 1), Code::ILLEGAL_STATE.0);
    assert_eq!(gpu.launch(fill, at, 32, 0), OK);
    assert_eq!(cuEventRecord(event, gpu.stream), OK);
    assert_eq!(cuStreamEndCapture(gpu.stream, &raw mut graph), OK);
    assert_eq!(gpu.download(at, 4), Ok(vec![1; 4]));
    assert_eq!(cuGraphInstantiateWithFlags(&raw mut exec, graph, 0), OK);
    assert_eq!(cuGraphDestroy(graph), OK);
    assert_eq!(cuGraphLaunch(graph, gpu.stream), Code::INVALID_VALUE.0);
    assert_eq!(cuGraphLaunch(exec, gpu.stream), OK);
    assert_eq!(gpu.download(at, 4), Ok(vec![7, 0, 0, 0]));

    let mut bytes = [0u8; 4];
    let into: *mut c_void = bytes.as_mut_ptr().cast();
    let forbidden: [(&str, &dyn Fn() -> u32); 8] = [
        ("cuMemAlloc", &|| cuMemAlloc_v2(&mut 0, 4)),
        ("cuMemFree", &|| cuMemFree_v2(at)),
        ("cuMemcpyHtoDAsync", &|| gpu.upload(at, &[1; 4])),
        ("cuMemcpyDtoHAsync", &|| cuMemcpyDtoHAsync_v2(into, at, 4, gpu.stream)),
        ("cuStreamSynchronize", &|| cuStreamSynchronize(gpu.stream)),
        ("cuCtxSynchronize", &|| cuCtxSynchronize()),
        ("cuModuleLoadData", &|| cuModuleLoadData(&mut 0, PTX.as_ptr().cast())),
        ("cuMemFree of nothing", &|| cuMemFree_v2(0)),
    ];
    for (name, call) in forbidden {
        assert_eq!(cuStreamBeginCapture_v2(gpu.stream, 1), OK);
        assert_eq!(call(), Code::STREAM_CAPTURE_UNSUPPORTED.0, "{name}");
        let launched = gpu.launch(fill, at, 32, 0);
        assert_eq!(launched, Code::STREAM_CAPTURE_INVALIDATED.0, "after {name}");
        let ended = cuStreamEndCapture(gpu.stream, &raw mut graph);
        assert_eq!((ended, graph), (Code::STREAM_CAPTURE_INVALIDATED.0, 0), "after {name}");
    }
    for call in [cuEventSynchronize, cuEventQuery] {
        assert_eq!(cuStreamBeginCapture_v2(gpu.stream, 1), OK);
        assert_eq!(cuEventRecord(event, gpu.stream), OK);
        assert_eq!(call(event), Code::CAPTURED_EVENT.0);
        let ended = cuStreamEndCapture(gpu.stream, &raw mut graph);
        assert_eq!(ended, Code::STREAM_CAPTURE_INVALIDATED.0);
    }
    assert_eq!(cuStreamBeginCapture_v2(gpu.stream, 1), OK);
    let (stream, context) = (gpu.stream, gpu.context);
    let elsewhere = std::thread::spawn(move || {
        cuCtxSetCurrent(context);
        let (mut graph, mut other) = (0, 0);
        (cuMemAlloc_v2(&raw mut other, 4), cuStreamEndCapture(stream, &raw mut graph))
    });
    // Thread-local: other threads may allocate, but not end it.
    assert_eq!(elsewhere.join().unwrap(), (OK, Code::STREAM_CAPTURE_WRONG_THREAD.0));
    assert_eq!(cuStreamEndCapture(gpu.stream, &raw mut graph), OK);
}

#[test]
fn streams_join_a_capture_and_must_be_joined_to_its_origin() {
    let gpu = Gpu::new();
    let (main, at) = (gpu.stream, gpu.alloc(4));
    let ([mut side, mut other], context, mut milliseconds) = ([0; 2], gpu.context, 0f32);
    let [mut fork, mut join, mut outside, mut graph, mut exec] = [0; 5];
    for stream in [&mut side, &mut other] {
        assert_eq!(cuStreamCreate(stream, 1), OK);
    }
    for event in [&mut fork, &mut join, &mut outside] {
        assert_eq!(cuEventCreate(event, 2), OK);
    }
    let set = |at, byte, stream| cuMemsetD8Async(at, byte, 1, stream);
    let copy = |from, to, stream| cuMemcpyDtoDAsync_v2(to, from, 1, stream);
    let begin = || assert_eq!(cuStreamBeginCapture_v2(main, 1), OK);
    // A side branch, which writes 2 after the 1 of its origin and reads what the origin writes beside it.
    let branch = || {
        begin();
        assert_eq!(set(at, 1, main), OK);
        assert_eq!((cuEventRecord(fork, main), cuStreamWaitEvent(side, fork, 0)), (OK, OK));
        assert_eq!((copy(at, at + 1, side), copy(at + 2, at + 3, side)), (OK, OK));
        assert_eq!(set(at + 2, 3, main), OK);
    };

    // An event that was not recorded is complete; one outside a capture orders two streams.
    assert_eq!(cuStreamWaitEvent(side, outside, 0), OK);
    assert_eq!(gpu.upload(at, &[0; 4]), OK);
    assert_eq!((cuEventRecord(outside, main), cuStreamWaitEvent(side, outside, 0)), (OK, OK));
    assert_eq!((set(at + 3, 5, side), cuStreamSynchronize(side)), (OK, OK));
    assert_eq!(gpu.download(at, 4), Ok(vec![0, 0, 0, 5]));
    assert_eq!(cuStreamWaitEvent(side, side, 0), Code::INVALID_HANDLE.0);

    branch();
    let ended = |stream, graph: &mut usize| cuStreamEndCapture(stream, graph);
    assert_eq!(ended(side, &mut graph), Code::STREAM_CAPTURE_UNMATCHED.0);
    assert_eq!(ended(main, &mut graph), Code::STREAM_CAPTURE_INVALIDATED.0);
    branch();
    assert_eq!((cuEventRecord(join, side), cuStreamWaitEvent(main, join, 0)), (OK, OK));
    assert_eq!(copy(at + 3, at, main), OK);
    assert_eq!(ended(main, &mut graph), OK);
    assert_eq!(cuGraphInstantiateWithFlags(&raw mut exec, graph, 0), OK);
    // Early, late and early: the edges are kept, and what they leave open differs.
    for read in [0, 3, 0] {
        assert_eq!(gpu.upload(at, &[0; 4]), OK);
        assert_eq!(cuGraphLaunch(exec, main), OK);
        assert_eq!(gpu.download(at, 4), Ok(vec![read, 1, 3, read]));
    }
    assert_eq!(cuStreamWaitEvent(side, join, 0), Code::INVALID_VALUE.0, "its capture has ended");
    assert_eq!(cuEventQuery(join), Code::INVALID_VALUE.0);
    assert_eq!(cuEventElapsedTime(&raw mut milliseconds, join, join), Code::INVALID_VALUE.0);
    begin();
    assert_eq!(cuStreamWaitEvent(main, join, 0), Code::INVALID_VALUE.0);
    let refused = (cuEventRecord(fork, main), cuStreamWaitEvent(main, outside, 0));
    assert_eq!(refused, (Code::STREAM_CAPTURE_INVALIDATED.0, Code::STREAM_CAPTURE_INVALIDATED.0));
    let ended_elsewhere =
        std::thread::spawn(move || (cuCtxSetCurrent(context), cuStreamEndCapture(main, &mut 0)));
    assert_eq!(ended_elsewhere.join().unwrap(), (OK, Code::STREAM_CAPTURE_INVALIDATED.0));
    assert_eq!(ended(main, &mut graph), Code::ILLEGAL_STATE.0);
    // Relaxed: the thread may make any call, but the stream cannot capture this one.
    assert_eq!(cuStreamBeginCapture_v2(main, 2), OK);
    assert_eq!(cuGraphUpload(exec, main), Code::STREAM_CAPTURE_UNSUPPORTED.0);
    assert_eq!(ended(main, &mut graph), Code::STREAM_CAPTURE_INVALIDATED.0);

    branch();
    assert_eq!(ended(main, &mut graph), Code::STREAM_CAPTURE_UNJOINED.0);
    // Both streams have left the capture.
    assert_eq!((set(at, 0, side), cuStreamSynchronize(side)), (OK, OK));

    // Captured work cannot wait for work outside, or in another capture.
    begin();
    assert_eq!(cuEventRecord(outside, other), OK);
    assert_eq!(cuStreamWaitEvent(main, outside, 0), Code::STREAM_CAPTURE_ISOLATION.0);
    assert_eq!(ended(main, &mut graph), Code::STREAM_CAPTURE_INVALIDATED.0);
    begin();
    assert_eq!(cuStreamBeginCapture_v2(other, 1), OK);
    assert_eq!(cuEventRecord(outside, other), OK);
    assert_eq!(cuStreamWaitEvent(main, outside, 0), Code::STREAM_CAPTURE_MERGE.0);
    for stream in [main, other] {
        assert_eq!(ended(stream, &mut graph), Code::STREAM_CAPTURE_INVALIDATED.0);
    }
}

#[test]
fn events_must_be_recorded_and_complete_to_be_timed() {
    let gpu = Gpu::new();
    let (mut start, mut end, mut untimed, mut ms) = (0, 0, 0, -1.0);
    for (event, flags) in [(&mut start, 0), (&mut end, 0), (&mut untimed, 2)] {
        assert_eq!(cuEventCreate(event, flags), OK);
    }
    let mut timed = |start, end| cuEventElapsedTime_v2(&raw mut ms, start, end);
    assert_eq!(timed(start, end), Code::INVALID_HANDLE.0);
    for event in [start, end, untimed] {
        assert_eq!(cuEventRecord(event, gpu.stream), OK);
    }
    assert_eq!(timed(start, end), Code::NOT_READY.0);
    assert_eq!(cuEventSynchronize(untimed), OK);
    assert_eq!(timed(start, untimed), Code::INVALID_HANDLE.0);
    assert_eq!(timed(start, end), OK);
    assert!(ms >= 0.0);
    assert_eq!(cuEventDestroy_v2(end), OK);
    assert_eq!(cuEventDestroy_v2(end), Code::INVALID_HANDLE.0);
}

#[test]
fn matmuls_follow_their_leading_dimensions_and_round_split_sums() {
    let gpu = Gpu::new();
    // Column-major a = [[1, 2], [3, 4]] with a gap after each column, b = [[1, 1], [1, -1]].
    let floats = |values: &[f32]| {
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let at = gpu.alloc(bytes.len());
        assert_eq!(gpu.upload(at, &bytes), OK);
        at
    };
    let operand = |at, dtype, ld| Operand { at, dtype, transposed: 0, ld, stride: 0 };
    let a = operand(floats(&[1.0, 3.0, 9.0, 2.0, 4.0]), 0, 3);
    let b = operand(floats(&[1.0, 1.0, 1.0, -1.0]), 0, 2);
    let d = operand(floats(&[10.0; 5]), 0, 3);
    let mut gemm = Gemm {
        m: 2,
        n: 2,
        k: 2,
        batch: 1,
        a,
        b,
        c: d,
        d,
        alpha: 1.0,
        beta: 1.0,
        split_in_output_type: 0,
        is_slow: 0,
    };
    let read = |at, len: usize| -> Vec<f32> {
        let bytes = gpu.download(at, 4 * len).unwrap();
        bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
    };
    assert_eq!(cudaStandinGemm(&raw const gemm, gpu.stream), OK);
    assert_eq!(read(d.at, 5), [13.0, 17.0, 10.0, 9.0, 9.0]);
    gemm.a.transposed = 1;
    gemm.beta = 0.0;
    assert_eq!(cudaStandinGemm(&raw const gemm, gpu.stream), OK);
    assert_eq!(read(d.at, 5), [4.0, 6.0, 10.0, -2.0, -2.0]);
    // Out of its allocation.
    gemm.d.ld = 4;
    assert_eq!(cudaStandinGemm(&raw const gemm, gpu.stream), Code::INVALID_VALUE.0);

    // 1 + 1/256 is not representable in bf16: halves of k rounded before they are added lose it.
    let halves = |values: &[f32]| {
        let bytes: Vec<u8> =
            values.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect();
        let at = gpu.alloc(bytes.len());
        assert_eq!(gpu.upload(at, &bytes), OK);
        operand(at, 14, 1)
    };
    let (a, b, d) = (
        halves(&[1.0, 1.0 / 256.0, 1.0 / 256.0, 0.0]),
        Operand { ld: 4, ..halves(&[1.0; 4]) },
        halves(&[0.0]),
    );
    for (split, exact) in [(0, 1.0 + 1.0 / 128.0), (1, 1.0)] {
        let gemm = Gemm { m: 1, n: 1, k: 4, a, b, c: d, d, split_in_output_type: split, ..gemm };
        assert_eq!(cudaStandinGemm(&raw const gemm, gpu.stream), OK);
        let bits = gpu.download(d.at, 2).unwrap();
        assert_eq!(half::bf16::from_le_bytes([bits[0], bits[1]]).to_f32(), exact);
    }
}
