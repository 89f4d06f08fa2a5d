// Attention over a cache of keys and values, for decoding: k and v are appended at the columns
// start[w]..start[w] + context of window w, and its column start[w] + t sees 0..=start[w] + t.
//
// q: [windows, heads, context, head_dim]; k, v: [windows, kv_heads, context, head_dim];
// start: [windows]; keys, values: [windows, kv_heads, capacity, head_dim];
// out: [windows * context, heads * head_dim]. No two of them overlap. head_dim is at most 256, and
// start + context at most capacity: what lies beyond would not be kept.
//
// For S columns seen by a row: 4 head_dim S FLOPs, S exps, 4 head_dim S bytes at bf16, of which
// those query heads that share a key/value head find all but the first time in a cache. Bound by
// latency and memory.
//
// Launch: blocks of 128 threads, a grid along x of any size (one block a row of q is best).
// A block takes one row. A slot of neighbouring lanes, eight components a lane, takes every n-th
// column with a softmax of its own, and the slots are joined in a fixed order. The fresh columns are
// read from k and v, so that nobody waits for their way into the cache.
#include "lib/attention.cuh"
#include "lib/reduce.cuh"
#include "lib/vector.cuh"

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / WARP;
// Components a lane.
constexpr int N = 8;
constexpr int MAX_HEAD_DIM = N * WARP;
constexpr unsigned ALL = 0xffffffffu;

// A part of a row's softmax: the highest score, the sum of exp(score - top), and that of the values.
struct Part {
    float top = -INFINITY, sum = 0.0f, values[N] = {};

    __device__ void join(float top2, float sum2, const float (&values2)[N]) {
        const float higher = fmaxf(top, top2);
        // -inf less -inf must not be taken.
        const float base = higher == -INFINITY ? 0.0f : higher;
        const float own = expf(top - base), other = expf(top2 - base);
        sum = sum * own + sum2 * other;
#pragma unroll
        for (int i = 0; i < N; i++) values[i] = values[i] * own + values2[i] * other;
        top = higher;
    }
};

// Components c..c + N of a row, zero beyond its end; `whole`: in 16-byte pieces.
template <typename T>
__device__ void load_part(float (&part)[N], const T *row, int c, int head_dim, bool whole) {
    if (whole && c < head_dim) {
#pragma unroll
        for (int i = 0; i < N; i += FULL<T>) {
            float piece[FULL<T>];
            load(piece, row + c + i);
#pragma unroll
            for (int j = 0; j < FULL<T>; j++) part[i + j] = piece[j];
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < N; i++) part[i] = c + i < head_dim ? widen(row[c + i]) : 0.0f;
}

template <typename T>
__device__ void cached(const T *q, const T *k, const T *v, const uint32_t *start, T *keys, T *values,
                       T *out, const Heads shape, int capacity) {
    __shared__ float tops[WARPS], sums[WARPS], parts[WARPS][MAX_HEAD_DIM];
    const int d = shape.head_dim, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const float scale = 1.0f / sqrtf(d);
    const bool whole = d % N == 0 && aligned(q, k, v, keys, values);
    int width = 1;
    while (width * N < d) width *= 2;
    const int slots = THREADS / width, slot = threadIdx.x / width;
    const int c = threadIdx.x % width * N;

    const int tasks = shape.windows * shape.heads * shape.context;
    for (int task = blockIdx.x; task < tasks; task += gridDim.x) {
        const int head = task / shape.context, column = task % shape.context;
        const int begin = start[shape.window(head)], end = begin + column + 1;
        const size_t kv_head = head / shape.group();
        const T *fresh_keys = k + kv_head * shape.context * d;
        const T *fresh_values = v + kv_head * shape.context * d;
        T *kept_keys = keys + kv_head * capacity * d, *kept_values = values + kv_head * capacity * d;
        if (head % shape.group() == 0 && begin + column < capacity) {
            const size_t from = static_cast<size_t>(column) * d;
            const size_t to = static_cast<size_t>(begin + column) * d;
            for (int i = threadIdx.x; i < d; i += THREADS) {
                kept_keys[to + i] = fresh_keys[from + i];
                kept_values[to + i] = fresh_values[from + i];
            }
        }

        float query[N];
        load_part(query, q + static_cast<size_t>(task) * d, c, d, whole);
        Part part;
        // Every lane of a warp goes as often around, for the shuffles.
        for (int base = 0; base < end; base += slots) {
            const int at = base + slot;
            float key[N] = {}, value[N] = {}, score = 0.0f;
            if (at < end) {
                const bool kept = at < begin;
                const size_t row = static_cast<size_t>(kept ? at : at - begin) * d;
                load_part(key, (kept ? kept_keys : fresh_keys) + row, c, d, whole);
                load_part(value, (kept ? kept_values : fresh_values) + row, c, d, whole);
            }
#pragma unroll
            for (int i = 0; i < N; i++) score += query[i] * key[i];
            for (int offset = width / 2; offset > 0; offset /= 2) {
                score += __shfl_xor_sync(ALL, score, offset);
            }
            if (at < end) part.join(score * scale, 1.0f, value);
        }

        // Slots of a warp, then warps.
        for (int offset = width; offset < WARP; offset *= 2) {
            float others[N];
            const float top = __shfl_xor_sync(ALL, part.top, offset);
            const float sum = __shfl_xor_sync(ALL, part.sum, offset);
#pragma unroll
            for (int i = 0; i < N; i++) others[i] = __shfl_xor_sync(ALL, part.values[i], offset);
            part.join(top, sum, others);
        }
        if (lane == 0) {
            tops[warp] = part.top;
            sums[warp] = part.sum;
        }
        if (lane < width) {
#pragma unroll
            for (int i = 0; i < N; i++) parts[warp][c + i] = part.values[i];
        }
        __syncthreads();
        float top = -INFINITY, sum = 0.0f;
        for (int w = 0; w < WARPS; w++) top = fmaxf(top, tops[w]);
        for (int w = 0; w < WARPS; w++) sum += sums[w] * expf(tops[w] - top);
        T *to = out + shape.token_row(head, column) * d;
        for (int i = threadIdx.x; i < d; i += THREADS) {
            float all = 0.0f;
            for (int w = 0; w < WARPS; w++) all += parts[w][i] * expf(tops[w] - top);
            to[i] = narrow<T>(all / sum);
        }
        __syncthreads();
    }
}

#define ENTRIES(T)                                                                                 \
    extern "C" __global__ void __launch_bounds__(128) attention_decode_##T(                        \
        const T *__restrict__ q, const T *__restrict__ k, const T *__restrict__ v,                 \
        const uint32_t *__restrict__ start, T *keys, T *values, T *__restrict__ out, int windows,  \
        int context, int heads, int kv_heads, int head_dim, int capacity) {                        \
        cached(q, k, v, start, keys, values, out, {windows, context, heads, kv_heads, head_dim},   \
               capacity);                                                                          \
    }

ENTRIES(f32)
ENTRIES(bf16)
ENTRIES(f16)
