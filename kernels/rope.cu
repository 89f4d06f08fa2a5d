// Rotary position embedding (Su et al. 2021) in Hugging Face's half-split form, with the split of
// the joined rows into heads; and the way back. With h = head_dim / 2 and i in 0..h:
//
//     out[i]     = x[i] cos - x[i + h] sin       cos, sin of the angle position * frequencies[i],
//     out[i + h] = x[i + h] cos + x[i] sin       position = start[window] + column
//
// for every head of q and k; v is copied. The backward turns dq and dk by the opposite angle
// (positions from 0) and joins them with dv.
//
// qkv, dqkv: [windows context, (heads + 2 kv_heads) head_dim]; q, dq: [windows, heads, context,
// head_dim]; k, v, dk, dv: [windows, kv_heads, context, head_dim]; start: [windows], or null: 0;
// turns: [positions, h, 2], cosine and sine. No two of them overlap; head_dim is even.
//
// The table is made once on the host, in f64: an angle of 8191 radians in f32 is off by up to 2^-12,
// and nothing done with it here could mend that. It stays in L2, and a thread keeps its part of it
// for all heads.
// Bytes at bf16: 4 for each value of qkv. 3 FLOPs a value: bound by memory.
//
// Launch: blocks of (x, y) threads, at most 256 in all; a grid along x of any size. Threads along x
// take neighbouring pieces of a head's columns, those along y take the heads in turn, so that what
// a block reads of a joined row is whole sectors however small the heads.
#include "lib/vector.cuh"

// One matrix cut up by heads: three of its parts are three arrays.
template <typename T>
struct Parts {
    T *q, *k, *v;

    // The columns of a head, counted over q, k, then v: [context, head_dim].
    __device__ T *head(int window, int slot, int heads, int kv_heads, size_t columns) const {
        if (slot < heads) return q + (static_cast<size_t>(window) * heads + slot) * columns;
        slot -= heads;
        T *part = slot < kv_heads ? k : v;
        if (slot >= kv_heads) slot -= kv_heads;
        return part + (static_cast<size_t>(window) * kv_heads + slot) * columns;
    }
};

// N pairs: the values i.. of a head, then the values i + half.. of it. Where they are the whole
// head, one access.
template <int N, bool WHOLE, typename T>
__device__ void load_pairs(float (&a)[2 * N], const T *from, int half) {
    if constexpr (WHOLE) {
        load(a, from);
    } else {
        load(reinterpret_cast<float(&)[N]>(a[0]), from);
        load(reinterpret_cast<float(&)[N]>(a[N]), from + half);
    }
}

template <int N, bool WHOLE, typename T>
__device__ void store_pairs(T *to, const float (&a)[2 * N], int half) {
    if constexpr (WHOLE) {
        store(to, a);
    } else {
        store(to, reinterpret_cast<const float(&)[N]>(a[0]));
        store(to + half, reinterpret_cast<const float(&)[N]>(a[N]));
    }
}

struct Shape {
    int windows, context, heads, kv_heads, head_dim;
};

template <int N, bool WHOLE, bool BACK, typename T>
__device__ void rope(T *joined, const Parts<T> &parts, const unsigned *start, const float *turns,
                     const Shape &shape) {
    const int half = shape.head_dim / 2, pieces = half / N;
    const int slots = shape.heads + 2 * shape.kv_heads, turning = shape.heads + shape.kv_heads;
    const size_t columns = static_cast<size_t>(shape.context) * shape.head_dim;
    // Pieces of one window, then of the next; a block never mixes windows.
    const int strips = (shape.context * pieces + blockDim.x - 1) / blockDim.x;
    for (int tile = blockIdx.x; tile < shape.windows * strips; tile += gridDim.x) {
        const int window = tile / strips;
        const int piece = (tile - window * strips) * blockDim.x + threadIdx.x;
        const int column = piece / pieces, i = (piece - column * pieces) * N;
        if (column >= shape.context) continue;
        const size_t position = column + (start != nullptr ? start[window] : 0u);
        float turn[2 * N];
        const float *from = turns + (position * half + i) * 2;
#pragma unroll
        for (int n = 0; n < N; n++) {
            float pair[2];
            load(pair, from + 2 * n);
            turn[2 * n] = pair[0];
            turn[2 * n + 1] = BACK ? -pair[1] : pair[1];
        }
        const size_t row = static_cast<size_t>(window) * shape.context + column;
        for (int slot = threadIdx.y; slot < slots; slot += blockDim.y) {
            T *there = joined + (row * slots + slot) * shape.head_dim + i;
            T *head = parts.head(window, slot, shape.heads, shape.kv_heads, columns);
            head += static_cast<size_t>(column) * shape.head_dim + i;
            float x[2 * N];
            load_pairs<N, WHOLE>(x, BACK ? head : there, half);
            if (slot < turning) {
#pragma unroll
                for (int n = 0; n < N; n++) {
                    const float low = x[n], high = x[n + N];
                    x[n] = low * turn[2 * n] - high * turn[2 * n + 1];
                    x[n + N] = high * turn[2 * n] + low * turn[2 * n + 1];
                }
            }
            store_pairs<N, WHOLE>(BACK ? there : head, x, half);
        }
    }
}

template <bool BACK, typename T>
__device__ void rope_any(T *joined, const Parts<T> &parts, const unsigned *start,
                         const float *turns, const Shape &shape) {
    const int half = shape.head_dim / 2;
    const bool vectors = aligned(joined, parts.q, parts.k, parts.v, turns);
    if (vectors && half % FULL<T> == 0) {
        rope<FULL<T>, false, BACK>(joined, parts, start, turns, shape);
    } else if (vectors && half == 1) {
        rope<1, true, BACK>(joined, parts, start, turns, shape);
    } else if (vectors && half == 2) {
        rope<2, true, BACK>(joined, parts, start, turns, shape);
    } else if (vectors && half * 2 == FULL<T>) {
        rope<FULL<T> / 2, true, BACK>(joined, parts, start, turns, shape);
    } else {
        rope<1, false, BACK>(joined, parts, start, turns, shape);
    }
}

#define ENTRIES(T)                                                                                 \
    extern "C" __global__ void __launch_bounds__(256, 4)                                           \
    rope_##T(T *__restrict__ qkv, const unsigned *__restrict__ start,                              \
             const float *__restrict__ turns, T *__restrict__ q, T *__restrict__ k,                \
             T *__restrict__ v, int windows, int context, int heads, int kv_heads,                 \
             int head_dim) {                                                                       \
        rope_any<false>(qkv, Parts<T>{q, k, v}, start, turns,                                      \
                        {windows, context, heads, kv_heads, head_dim});                            \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(256, 4)                                           \
    rope_backward_##T(T *__restrict__ dq, T *__restrict__ dk, T *__restrict__ dv,                  \
                      const float *__restrict__ turns, T *__restrict__ dqkv, int windows,          \
                      int context, int heads, int kv_heads, int head_dim) {                        \
        rope_any<true>(dqkv, Parts<T>{dq, dk, dv}, nullptr, turns,                                 \
                       {windows, context, heads, kv_heads, head_dim});                             \
    }

ENTRIES(f32)
ENTRIES(bf16)
ENTRIES(f16)
