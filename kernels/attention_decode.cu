// Decode attention over a KV cache: k and v are appended at positions start[b]..start[b] + seq_len
// of sequence b, and the query at position start[b] + t attends to 0..=start[b] + t.
//
// q: [batch, heads, seq_len, head_dim]; k, v: [batch, kv_heads, seq_len, head_dim]; start: [batch];
// keys, values (the cache): [batch, kv_heads, capacity, head_dim]; out: [batch * seq_len, heads *
// head_dim]. No overlaps. head_dim is at most 256, and start + seq_len at most capacity: keys and
// values beyond it are not appended.
//
// For S keys visible to a row: 4 head_dim S FLOPs, S exps, 4 head_dim S bytes at bf16; query heads
// that share a key/value head (GQA) hit the L1 or L2 cache. Bound by latency and memory.
//
// Launch: blocks of 128 threads, any grid along x (one block per row of q is best). A block takes
// one row. A slot of consecutive lanes, eight components per lane, takes every n-th key with an
// online softmax of its own; slots are combined in a fixed order. New keys and values are read from
// k and v, not from the cache, so that no block waits for another's append.
#include "lib/attention.cuh"
#include "lib/reduce.cuh"
#include "lib/vector.cuh"

constexpr int THREADS = DECODE_THREADS;
constexpr int WARPS = THREADS / WARP_SIZE;
// Components per lane.
constexpr int N = MAX_HEAD_DIM / WARP_SIZE;

// Online softmax over part of a row: maximum score, sum of exp(score - max), and weighted sum of
// values.
struct OnlineSoftmax {
    float max = -INFINITY, sum = 0.0f, acc[N] = {};

    __device__ void combine(float max2, float sum2, const float (&acc2)[N]) {
        const float new_max = fmaxf(max, max2);
        // Avoid (-inf) - (-inf) = NaN.
        const float base = new_max == -INFINITY ? 0.0f : new_max;
        const float rescale = expf(max - base), rescale2 = expf(max2 - base);
        sum = sum * rescale + sum2 * rescale2;
#pragma unroll
        for (int i = 0; i < N; i++) acc[i] = acc[i] * rescale + acc2[i] * rescale2;
        max = new_max;
    }
};

// Components c..c + N of a row, zero past its end; `vectors`: by 16-byte accesses.
template <typename T>
__device__ void load_components(float (&x)[N], const T *row, int c, int head_dim, bool vectors) {
    if (vectors && c < head_dim) {
#pragma unroll
        for (int i = 0; i < N; i += VEC<T>) {
            float vec[VEC<T>];
            load(vec, row + c + i);
#pragma unroll
            for (int j = 0; j < VEC<T>; j++) x[i + j] = vec[j];
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = c + i < head_dim ? to_float(row[c + i]) : 0.0f;
}

template <typename T>
__device__ void decode(const T *q, const T *k, const T *v, const uint32_t *start, T *keys,
                       T *values, T *out, const AttentionShape shape, int capacity) {
    __shared__ float maxes[WARPS], sums[WARPS], accs[WARPS][MAX_HEAD_DIM];
    const int d = shape.head_dim, lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
    const float scale = 1.0f / sqrtf(d);
    const bool vectors = d % N == 0 && aligned(q, k, v, keys, values);
    int width = 1;
    while (width * N < d) width *= 2;
    const int slots = THREADS / width, slot = threadIdx.x / width;
    const int c = threadIdx.x % width * N;

    const int tasks = shape.batch * shape.heads * shape.seq_len;
    for (int task = blockIdx.x; task < tasks; task += gridDim.x) {
        const int head = task / shape.seq_len, t = task % shape.seq_len;
        const int begin = start[shape.sequence(head)], end = begin + t + 1;
        const size_t kv_head = head / shape.group();
        const T *new_keys = k + kv_head * shape.seq_len * d;
        const T *new_values = v + kv_head * shape.seq_len * d;
        T *cached_keys = keys + kv_head * capacity * d;
        T *cached_values = values + kv_head * capacity * d;
        // mutant: one_kv_head_appended
        if (head % shape.group() == 0 && begin + t < capacity) {
            const size_t from = static_cast<size_t>(t) * d;
            const size_t to = static_cast<size_t>(begin + t) * d;
            for (int i = threadIdx.x; i < d; i += THREADS) {
                cached_keys[to + i] = new_keys[from + i];
                cached_values[to + i] = new_values[from + i];
            }
        }

        float query[N];
        load_components(query, q + static_cast<size_t>(task) * d, c, d, vectors);
        OnlineSoftmax softmax;
        // All lanes of a warp run the same number of iterations, for the shuffles.
        for (int base = 0; base < end; base += slots) {
            const int at = base + slot;
            float key[N] = {}, value[N] = {}, score = 0.0f;
            if (at < end) {
                const bool cached = at < begin;  // mutant: cached_position_taken_for_new
                const size_t row = static_cast<size_t>(cached ? at : at - begin) * d;
                load_components(key, (cached ? cached_keys : new_keys) + row, c, d, vectors);
                load_components(value, (cached ? cached_values : new_values) + row, c, d, vectors);
            }
#pragma unroll
            for (int i = 0; i < N; i++) score += query[i] * key[i];
            for (int offset = width / 2; offset > 0; offset /= 2) {
                score += __shfl_xor_sync(FULL_MASK, score, offset);
            }
            // mutant: future_keys_visible
            if (at < end) softmax.combine(score * scale, 1.0f, value);
        }

        // Combine the slots of a warp, then the warps.
        for (int offset = width; offset < WARP_SIZE; offset *= 2) {
            float acc[N];
            const float max = __shfl_xor_sync(FULL_MASK, softmax.max, offset);
            const float sum = __shfl_xor_sync(FULL_MASK, softmax.sum, offset);
#pragma unroll
            for (int i = 0; i < N; i++) acc[i] = __shfl_xor_sync(FULL_MASK, softmax.acc[i], offset);
            softmax.combine(max, sum, acc);
        }
        if (lane == 0) {
            maxes[warp] = softmax.max;
            sums[warp] = softmax.sum;
        }
        if (lane < width) {
#pragma unroll
            for (int i = 0; i < N; i++) accs[warp][c + i] = softmax.acc[i];
        }
        __syncthreads();
        float max = -INFINITY, sum = 0.0f;
        for (int w = 0; w < WARPS; w++) max = fmaxf(max, maxes[w]);
        for (int w = 0; w < WARPS; w++) sum += sums[w] * expf(maxes[w] - max);
        T *to = out + shape.out_row(head, t) * d;
        for (int i = threadIdx.x; i < d; i += THREADS) {
            float acc = 0.0f;
            // mutant: last_warp_dropped
            for (int w = 0; w < WARPS; w++) acc += accs[w][i] * expf(maxes[w] - max);
            to[i] = from_float<T>(acc / sum);
        }
        __syncthreads();
    }
}

#define ENTRIES(T)                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS) attention_decode_##T(                    \
        const T *__restrict__ q, const T *__restrict__ k, const T *__restrict__ v,                 \
        const uint32_t *__restrict__ start, T *keys, T *values, T *__restrict__ out, int batch,    \
        int seq_len, int heads, int kv_heads, int head_dim, int capacity) {                        \
        decode(q, k, v, start, keys, values, out, {batch, seq_len, heads, kv_heads, head_dim},     \
               capacity);                                                                          \
    }

ENTRIES(f32)
ENTRIES(bf16)
ENTRIES(f16)
