// One row of each sequence: out[b] = x[b * seq_len + position[b]].
//
// x: [batch seq_len, hidden]; position: [batch]; out: [batch, hidden]. No overlaps.
// Bytes at bf16: 4 batch hidden. No FLOPs: bound by launch latency.
//
// Launch: blocks of 256 threads along x, one sequence each in a grid-stride loop.
#include "lib/vector.cuh"

template <int N, typename T>
__device__ void gather_rows(const T *x, const unsigned *position, T *out, int batch, int seq_len,
                            int hidden) {
    for (int b = blockIdx.x; b < batch; b += gridDim.x) {
        // mutant: position_ignored
        const size_t row = static_cast<size_t>(b) * seq_len + position[b];
        const T *from = x + row * hidden;
        T *to = out + static_cast<size_t>(b) * hidden;
        for (int at = N * threadIdx.x; at < hidden; at += N * blockDim.x) {
            copy<N>(to + at, from + at);
        }
    }
}

#define ENTRIES(T)                                                                                 \
    extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)                                    \
    gather_rows_##T(const T *__restrict__ x, const unsigned *__restrict__ position,                \
                    T *__restrict__ out, int batch, int seq_len, int hidden) {                     \
        if (hidden % VEC<T> == 0 && aligned(x, out)) {                                             \
            gather_rows<VEC<T>>(x, position, out, batch, seq_len, hidden);                         \
        } else {                                                                                   \
            gather_rows<1>(x, position, out, batch, seq_len, hidden);                              \
        }                                                                                          \
    }

ENTRIES(f32)
ENTRIES(bf16)
ENTRIES(f16)
