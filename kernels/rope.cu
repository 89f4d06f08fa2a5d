// Rotary position embedding (RoPE, Su et al. 2021) in Hugging Face's half-split form, fused with
// the split of the QKV rows into heads; forward and backward. With h = head_dim / 2 and i in 0..h:
//
//     out[i]     = x[i] cos - x[i + h] sin       cos, sin of the angle position * frequencies[i],
//     out[i + h] = x[i + h] cos + x[i] sin       position = start[b] + t
//
// for every head of q and k at position t of sequence b; v is copied. The backward rotates dq and
// dk by the negated angle (positions from 0) and packs them with dv.
//
// qkv, dqkv: [batch seq_len, (heads + 2 kv_heads) head_dim]; q, dq: [batch, heads, seq_len,
// head_dim]; k, v, dk, dv: [batch, kv_heads, seq_len, head_dim]; start: [batch], null means 0;
// cos_sin: [positions, h, 2]. No overlaps; head_dim is even.
//
// The table is computed once on the host, in f64: an angle of 8191 radians in f32 is off by up to
// 2^-12, which no arithmetic here could fix. It stays in L2, and a thread keeps its part of it for
// all heads. Bytes at bf16: 4 per value of qkv. 3 FLOPs per value: bound by memory.
//
// Launch: blocks of (x, y) threads, at most 256; any grid along x. Threads along x take consecutive
// vectors of a head over all positions, threads along y iterate over heads, so that a block reads
// whole sectors of a QKV row however small the heads. Writing them takes another order:
// `rope_backward_whole`.
#include "lib/vector.cuh"

// q, k and v (or their gradients), split by head.
template <typename T>
struct SplitQkv {
    T *q, *k, *v;

    // Start of a head, [seq_len, head_dim] of `size` elements; `slot` counts over q, k, then v.
    __device__ T *head(int sequence, int slot, int heads, int kv_heads, size_t size) const {
        if (slot < heads) return q + (static_cast<size_t>(sequence) * heads + slot) * size;
        slot -= heads;
        T *part = slot < kv_heads ? k : v;
        if (slot >= kv_heads) slot -= kv_heads;
        // mutant: kv_heads_taken_for_heads
        return part + (static_cast<size_t>(sequence) * kv_heads + slot) * size;
    }
};

// N rotation pairs: values i.. of a head, then values i + half.. of it; a single access if they are
// the whole head.
template <int N, bool WHOLE, typename T>
__device__ void load_pairs(float (&a)[2 * N], const T *from, int half) {
    if constexpr (WHOLE) {
        load(a, from);
    } else {
        load(reinterpret_cast<float(&)[N]>(a[0]), from);
        load(reinterpret_cast<float(&)[N]>(a[N]), from + half);  // mutant: neighbors_paired
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

// Cosines and sines of N pairs, `from` on; the sines negated for the backward.
template <int N, bool BACKWARD>
__device__ void load_rotation(float (&rotation)[2 * N], const float *from) {
#pragma unroll
    for (int n = 0; n < N; n++) {
        float pair[2];
        load(pair, from + 2 * n);
        rotation[2 * n] = pair[0];
        rotation[2 * n + 1] = BACKWARD ? -pair[1] : pair[1];  // mutant: angle_not_negated
    }
}

template <int N>
__device__ void rotate(float (&x)[2 * N], const float (&rotation)[2 * N]) {
#pragma unroll
    for (int n = 0; n < N; n++) {
        const float low = x[n], high = x[n + N];
        x[n] = low * rotation[2 * n] - high * rotation[2 * n + 1];
        x[n + N] = high * rotation[2 * n] + low * rotation[2 * n + 1];
    }
}

struct Shape {
    int batch, seq_len, heads, kv_heads, head_dim;
};

// The backward of heads of 2 N values, a single access each. Threads along x iterate over heads instead,
// and those along y over the positions of a strip: a warp stores consecutive values of a QKV row, and
// what it loads of the other positions of a sector stays in L1 for the other warps.
template <int N, typename T>
__device__ void rope_backward_whole(T *dqkv, const SplitQkv<T> &split, const float *cos_sin,
                                    const Shape &shape) {
    const int slots = shape.heads + 2 * shape.kv_heads, rotated = shape.heads + shape.kv_heads;
    const size_t head_size = static_cast<size_t>(shape.seq_len) * 2 * N;
    const int strips = (shape.seq_len + blockDim.x - 1) / blockDim.x;
    for (int tile = blockIdx.x; tile < shape.batch * strips; tile += gridDim.x) {
        const int sequence = tile / strips, first = (tile - sequence * strips) * blockDim.x;
        const int end = min(first + static_cast<int>(blockDim.x), shape.seq_len);
        for (int t = first + threadIdx.y; t < end; t += blockDim.y) {
            float rotation[2 * N];
            load_rotation<N, true>(rotation, cos_sin + t * 2 * N);
            const size_t row = static_cast<size_t>(sequence) * shape.seq_len + t;
            for (int slot = threadIdx.x; slot < slots; slot += blockDim.x) {
                const T *head = split.head(sequence, slot, shape.heads, shape.kv_heads, head_size);
                float x[2 * N];
                load(x, head + t * 2 * N);
                if (slot < rotated) rotate<N>(x, rotation);  // mutant: dv_rotated
                store(dqkv + (row * slots + slot) * 2 * N, x);
            }
        }
    }
}

template <int N, bool WHOLE, bool BACKWARD, typename T>
__device__ void rope(T *qkv, const SplitQkv<T> &split, const unsigned *start, const float *cos_sin,
                     const Shape &shape) {
    const int half = shape.head_dim / 2, vectors = half / N;
    const int slots = shape.heads + 2 * shape.kv_heads, rotated = shape.heads + shape.kv_heads;
    const size_t head_size = static_cast<size_t>(shape.seq_len) * shape.head_dim;
    // Vectors of one sequence, then of the next; a block never spans two sequences.
    const int strips = (shape.seq_len * vectors + blockDim.x - 1) / blockDim.x;
    for (int tile = blockIdx.x; tile < shape.batch * strips; tile += gridDim.x) {
        const int sequence = tile / strips;
        const int vector = (tile - sequence * strips) * blockDim.x + threadIdx.x;
        const int t = vector / vectors, i = (vector - t * vectors) * N;
        if (t >= shape.seq_len) continue;  // mutant: one_position_too_many
        // mutant: start_ignored
        const size_t position = t + (start != nullptr ? start[sequence] : 0u);
        float rotation[2 * N];
        load_rotation<N, BACKWARD>(rotation, cos_sin + (position * half + i) * 2);
        const size_t row = static_cast<size_t>(sequence) * shape.seq_len + t;
        for (int slot = threadIdx.y; slot < slots; slot += blockDim.y) {
            T *packed = qkv + (row * slots + slot) * shape.head_dim + i;
            T *head = split.head(sequence, slot, shape.heads, shape.kv_heads, head_size);
            head += static_cast<size_t>(t) * shape.head_dim + i;
            float x[2 * N];
            load_pairs<N, WHOLE>(x, BACKWARD ? head : packed, half);
            if (slot < rotated) rotate<N>(x, rotation);  // mutant: v_rotated
            store_pairs<N, WHOLE>(BACKWARD ? packed : head, x, half);
        }
    }
}

// Heads of 2 N values.
template <int N, bool BACKWARD, typename T>
__device__ void rope_whole(T *qkv, const SplitQkv<T> &split, const unsigned *start,
                           const float *cos_sin, const Shape &shape) {
    if constexpr (BACKWARD) {
        rope_backward_whole<N>(qkv, split, cos_sin, shape);
    } else {
        rope<N, true, false>(qkv, split, start, cos_sin, shape);
    }
}

template <bool BACKWARD, typename T>
__device__ void rope(T *qkv, const SplitQkv<T> &split, const unsigned *start, const float *cos_sin,
                     const Shape &shape) {
    const int half = shape.head_dim / 2;
    const bool vectors = aligned(qkv, split.q, split.k, split.v, cos_sin);
    if (vectors && half % VEC<T> == 0) {
        rope<VEC<T>, false, BACKWARD>(qkv, split, start, cos_sin, shape);
    } else if (vectors && half == 1) {
        rope_whole<1, BACKWARD>(qkv, split, start, cos_sin, shape);
    } else if (vectors && half == 2) {
        rope_whole<2, BACKWARD>(qkv, split, start, cos_sin, shape);
    } else if (vectors && half * 2 == VEC<T>) {
        rope_whole<VEC<T> / 2, BACKWARD>(qkv, split, start, cos_sin, shape);
    } else {
        rope<1, false, BACKWARD>(qkv, split, start, cos_sin, shape);
    }
}

#define ENTRIES(T)                                                                                 \
    extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 4)                                 \
    rope_##T(T *__restrict__ qkv, const unsigned *__restrict__ start,                              \
             const float *__restrict__ cos_sin, T *__restrict__ q, T *__restrict__ k,              \
             T *__restrict__ v, int batch, int seq_len, int heads, int kv_heads, int head_dim) {   \
        rope<false>(qkv, SplitQkv<T>{q, k, v}, start, cos_sin,                                     \
                    {batch, seq_len, heads, kv_heads, head_dim});                                  \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 4)                                 \
    rope_backward_##T(T *__restrict__ dq, T *__restrict__ dk, T *__restrict__ dv,                  \
                      const float *__restrict__ cos_sin, T *__restrict__ dqkv, int batch,          \
                      int seq_len, int heads, int kv_heads, int head_dim) {                        \
        rope<true>(dqkv, SplitQkv<T>{dq, dk, dv}, nullptr, cos_sin,                                \
                   {batch, seq_len, heads, kv_heads, head_dim});                                   \
    }

ENTRIES(f32)
ENTRIES(bf16)
ENTRIES(f16)
