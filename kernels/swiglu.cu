// SwiGLU (Shazeer 2020) over rows that hold gate, then up:
//
//     out   = gate * s * up                       with s = 1 / (1 + exp(-gate))
//     dgate = dout * up * s * (1 + gate * (1 - s))
//     dup   = dout * gate * s
//
// gate_up, dgate_up: [rows, 2 inter]; out, dout: [rows, inter]. No overlaps.
// Bytes at bf16: 6 rows inter forward, 10 rows inter backward. One exp and one division per value,
// about 7 FLOPs forward and 12 backward: bound by memory.
//
// Launch: blocks of (columns, rows) threads, at most 256; a grid of (all columns, any number of
// rows). A thread takes 16 bytes of a row, or one value if inter or a pointer is not aligned for
// it, so gridDim.x * blockDim.x must reach inter / VEC, or inter.
#include "lib/vector.cuh"

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

template <int N, typename T>
__device__ void swiglu(const T *gate_up, T *out, int rows, int inter) {
    const int column = N * (blockIdx.x * blockDim.x + threadIdx.x);
    if (column >= inter) return;
    const int step = gridDim.y * blockDim.y;
    for (int row = blockIdx.y * blockDim.y + threadIdx.y; row < rows; row += step) {
        // mutant: row_stride_halved
        const T *gates = gate_up + static_cast<size_t>(row) * 2 * inter + column;
        float gate[N], up[N], result[N];
        load(gate, gates);
        load(up, gates + inter);
#pragma unroll
        for (int i = 0; i < N; i++) result[i] = gate[i] * sigmoid(gate[i]) * up[i];
        store(out + static_cast<size_t>(row) * inter + column, result);
    }
}

template <int N, typename T>
__device__ void swiglu_backward(const T *gate_up, const T *dout, T *dgate_up, int rows, int inter) {
    const int column = N * (blockIdx.x * blockDim.x + threadIdx.x);
    if (column >= inter) return;
    const int step = gridDim.y * blockDim.y;
    for (int row = blockIdx.y * blockDim.y + threadIdx.y; row < rows; row += step) {
        const size_t at = static_cast<size_t>(row) * 2 * inter + column;
        float gate[N], up[N], d[N], dgate[N], dup[N];
        load(gate, gate_up + at);
        load(up, gate_up + at + inter);
        load(d, dout + static_cast<size_t>(row) * inter + column);
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float s = sigmoid(gate[i]);
            // mutant: slope_without_second_term
            dgate[i] = d[i] * up[i] * s * (1.0f + gate[i] * (1.0f - s));
            dup[i] = d[i] * gate[i] * s;
        }
        store(dgate_up + at, dgate);
        store(dgate_up + at + inter, dup);
    }
}

template <typename T>
__device__ void forward(const T *gate_up, T *out, int rows, int inter) {
    if (inter % VEC<T> == 0 && aligned(gate_up, out)) {  // mutant: unaligned_rows_vectorized
        swiglu<VEC<T>>(gate_up, out, rows, inter);
    } else {
        swiglu<1>(gate_up, out, rows, inter);
    }
}

template <typename T>
__device__ void backward(const T *gate_up, const T *dout, T *dgate_up, int rows, int inter) {
    if (inter % VEC<T> == 0 && aligned(gate_up, dout, dgate_up)) {
        swiglu_backward<VEC<T>>(gate_up, dout, dgate_up, rows, inter);
    } else {
        swiglu_backward<1>(gate_up, dout, dgate_up, rows, inter);
    }
}

#define ENTRIES(T)                                                                                 \
    extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)                                    \
    swiglu_##T(const T *__restrict__ gate_up, T *__restrict__ out, int rows, int inter) {          \
        forward(gate_up, out, rows, inter);                                                        \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)                                    \
    swiglu_backward_##T(const T *__restrict__ gate_up, const T *__restrict__ dout,                 \
                        T *__restrict__ dgate_up, int rows, int inter) {                           \
        backward(gate_up, dout, dgate_up, rows, inter);                                            \
    }

ENTRIES(f32)
ENTRIES(bf16)
ENTRIES(f16)
