// delta[i] = dout[i] . out[i] for every row of every head: the preprocessing step of each attention
// backward (Dao 2023), whichever kernel computes dq, dk and dv.
//
// out, dout: [batch * seq_len, heads * head_dim]; delta: [batch, heads, seq_len] in f32. No
// overlaps. Bytes at bf16: 4 head_dim + 4 per row. 2 head_dim FLOPs per row: bound by memory.
//
// Launch: blocks of (threads per row, rows per block), shaped as `row_sum` requires, at most 256
// threads; any grid along x.
#include "lib/attention.cuh"
#include "lib/reduce.cuh"
#include "lib/vector.cuh"

template <typename T>
__device__ void delta(const T *out, const T *dout, float *delta, const AttentionShape shape) {
    const size_t rows = static_cast<size_t>(shape.batch) * shape.seq_len * shape.heads;
    const int d = shape.head_dim;
    for (size_t base = static_cast<size_t>(blockIdx.x) * blockDim.y; base < rows;
         base += static_cast<size_t>(gridDim.x) * blockDim.y) {
        const size_t row = base + threadIdx.y;
        float dot = 0.0f;
        for (int c = threadIdx.x; row < rows && c < d; c += blockDim.x) {
            dot += to_float(out[row * d + c]) * to_float(dout[row * d + c]);
        }
        dot = row_sum(dot);
        if (row < rows && threadIdx.x == 0) {
            const size_t token = row / shape.heads, head = row % shape.heads;
            const size_t sequence = token / shape.seq_len, position = token % shape.seq_len;
            delta[(sequence * shape.heads + head) * shape.seq_len + position] = dot;
        }
    }
}

#define ENTRIES(T)                                                                                 \
    extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)                                    \
    attention_delta_##T(const T *__restrict__ out, const T *__restrict__ dout,                     \
                        float *__restrict__ to, int batch, int seq_len, int heads,                 \
                        int head_dim) {                                                            \
        delta(out, dout, to, {batch, seq_len, heads, heads, head_dim});                            \
    }

ENTRIES(f32)
ENTRIES(bf16)
ENTRIES(f16)
