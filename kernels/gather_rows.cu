// One row of each window: out[w] = x[w * context + column[w]].
//
// x: [windows context, hidden]; column: [windows]; out: [windows, hidden]. They do not overlap.
// Bytes at bf16: 4 windows hidden. No FLOPs: bound by memory, and by its launch.
//
// Launch: blocks of 256 threads along x, a window each, any number of them.
#include "lib/vector.cuh"

template <int N, typename T>
__device__ void pick(const T *x, const unsigned *column, T *out, int windows, int context,
                     int hidden) {
    for (int window = blockIdx.x; window < windows; window += gridDim.x) {
        const size_t row = static_cast<size_t>(window) * context + column[window];
        const T *from = x + row * hidden;
        T *to = out + static_cast<size_t>(window) * hidden;
        for (int at = N * threadIdx.x; at < hidden; at += N * blockDim.x) {
            *reinterpret_cast<Pack<T, N> *>(to + at) =
                *reinterpret_cast<const Pack<T, N> *>(from + at);
        }
    }
}

template <typename T>
__device__ void pick_any(const T *x, const unsigned *column, T *out, int windows, int context,
                         int hidden) {
    if (hidden % FULL<T> == 0 && aligned(x, out)) {
        pick<FULL<T>>(x, column, out, windows, context, hidden);
    } else {
        pick<1>(x, column, out, windows, context, hidden);
    }
}

#define ENTRIES(T)                                                                               \
    extern "C" __global__ void __launch_bounds__(256)                                              \
    gather_rows_##T(const T *__restrict__ x, const unsigned *__restrict__ column,                    \
                  T *__restrict__ out, int windows, int context, int hidden) {                     \
        pick_any(x, column, out, windows, context, hidden);                                        \
    }

ENTRIES(f32)
ENTRIES(bf16)
ENTRIES(f16)
