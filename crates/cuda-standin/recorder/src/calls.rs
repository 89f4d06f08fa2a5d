//! The recorded functions with the kinds of their arguments.

use crate::trace::{self, Kind};

/// Defines exported functions. On Linux, an integer or pointer of any width has a register or an
/// eight-byte slot of its own, so that all are `usize` here; [`Kind`] tells how many bits count.
macro_rules! record {
    ($($name:ident($($arg:ident: $kind:ident $(($of:literal))?),* $(,)?);)*) => {$(
        #[unsafe(no_mangle)]
        extern "C" fn $name($($arg: usize),*) -> usize {
            const KINDS: &[Kind] = &[$(Kind::$kind $(($of))?),*];
            trace::call(stringify!($name), KINDS, &[$($arg),*])
        }
    )*};
}

// The CUDA driver.
record! {
    cuInit(flags: Int);
    cuDriverGetVersion(version: OutInt);
    cuGetErrorName(code: Int, text: OutText);
    cuGetErrorString(code: Int, text: OutText);
    cuDeviceGetCount(count: OutInt);
    cuDeviceGet(device: OutInt, ordinal: Int);
    cuDeviceGetName(name: OutName(1), len: Int, device: Int);
    cuDeviceTotalMem_v2(bytes: OutSize, device: Int);
    cuDeviceGetAttribute(value: OutInt, attribute: Int, device: Int);
    cuDeviceCanAccessPeer(reaches: OutInt, device: Int, peer: Int);
    cuDeviceGetUuid_v2(uuid: OutUuid, device: Int);
    cuDevicePrimaryCtxRetain(context: OutHandle, device: Int);
    cuDevicePrimaryCtxRelease_v2(device: Int);
    cuCtxGetCurrent(context: OutHandle);
    cuCtxSetCurrent(context: Handle);
    cuCtxSynchronize();
    cuMemAlloc_v2(address: OutAddress(1), bytes: Size);
    cuMemFree_v2(address: Address);
    cuMemGetInfo_v2(free: OutSize, total: OutSize);
    cuMemcpyHtoDAsync_v2(to: Address, from: Bytes(2), bytes: Size, stream: Handle);
    cuMemcpyDtoHAsync_v2(to: OutBytes(2), from: Address, bytes: Size, stream: Handle);
    cuMemcpyDtoDAsync_v2(to: Address, from: Address, bytes: Size, stream: Handle);
    cuMemsetD8Async(at: Address, byte: Byte, bytes: Size, stream: Handle);
    cuModuleLoadData(module: OutHandle, image: Image);
    cuModuleUnload(module: Handle);
    cuModuleGetFunction(function: OutHandle, module: Handle, name: Text);
    cuFuncGetAttribute(value: OutInt, attribute: Int, function: Handle);
    cuFuncSetAttribute(function: Handle, attribute: Int, value: Int);
    cuLaunchKernel(
        function: Handle,
        grid_x: Int,
        grid_y: Int,
        grid_z: Int,
        block_x: Int,
        block_y: Int,
        block_z: Int,
        shared: Int,
        stream: Handle,
        parameters: Parameters(0),
        extra: Opaque,
    );
    cuStreamCreate(stream: OutHandle, flags: Int);
    cuStreamDestroy_v2(stream: Handle);
    cuStreamSynchronize(stream: Handle);
    cuStreamQuery(stream: Handle);
    cuStreamWaitEvent(stream: Handle, event: Handle, flags: Int);
    cuStreamIsCapturing(stream: Handle, status: OutInt);
    cuStreamBeginCapture_v2(stream: Handle, mode: Int);
    cuStreamEndCapture(stream: Handle, graph: OutHandle);
    cuGraphInstantiateWithFlags(exec: OutHandle, graph: Handle, flags: Size);
    cuGraphUpload(exec: Handle, stream: Handle);
    cuGraphLaunch(exec: Handle, stream: Handle);
    cuGraphExecDestroy(exec: Handle);
    cuGraphDestroy(graph: Handle);
    cuEventCreate(event: OutHandle, flags: Int);
    cuEventDestroy_v2(event: Handle);
    cuEventRecord(event: Handle, stream: Handle);
    cuEventQuery(event: Handle);
    cuEventSynchronize(event: Handle);
    cuEventElapsedTime(milliseconds: OutTime, start: Handle, end: Handle);
    cuEventElapsedTime_v2(milliseconds: OutTime, start: Handle, end: Handle);
}

// cuBLASLt.
record! {
    cublasLtGetVersion();
    cublasLtCreate(handle: OutHandle);
    cublasLtDestroy(handle: Handle);
    cublasLtMatmulDescCreate(description: OutHandle, compute: Int, scale: Int);
    cublasLtMatmulDescDestroy(description: Handle);
    cublasLtMatmulDescSetAttribute(description: Handle, which: Int, from: Bytes(3), bytes: Size);
    cublasLtMatrixLayoutCreate(layout: OutHandle, dtype: Int, rows: Size, cols: Size, ld: Size);
    cublasLtMatrixLayoutDestroy(layout: Handle);
    cublasLtMatrixLayoutSetAttribute(layout: Handle, which: Int, from: Bytes(3), bytes: Size);
    cublasLtMatmulPreferenceCreate(preference: OutHandle);
    cublasLtMatmulPreferenceDestroy(preference: Handle);
    cublasLtMatmulPreferenceSetAttribute(preference: Handle, which: Int, from: Bytes(3), bytes: Size);
    cublasLtMatmulAlgoGetHeuristic(
        handle: Handle,
        description: Handle,
        a: Handle,
        b: Handle,
        c: Handle,
        d: Handle,
        preference: Handle,
        requested: Int,
        results: OutResults(9),
        returned: OutInt,
    );
    cublasLtMatmulAlgoCheck(
        handle: Handle,
        description: Handle,
        a: Handle,
        b: Handle,
        c: Handle,
        d: Handle,
        algorithm: Algorithm,
        result: OutResult,
    );
    cublasLtMatmul(
        handle: Handle,
        description: Handle,
        alpha: Scalar,
        a: Address,
        a_layout: Handle,
        b: Address,
        b_layout: Handle,
        beta: Scalar,
        c: Address,
        c_layout: Handle,
        d: Address,
        d_layout: Handle,
        algorithm: Algorithm,
        workspace: Address,
        workspace_bytes: Size,
        stream: Handle,
    );
}
