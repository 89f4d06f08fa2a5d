// Causal attention by its plain path: any head_dim to 256, f32 arithmetic, no tensor cores. The fast
// paths (attention_smallhead.cu, attention_smallhead_tf32.cu, flash_attention.cu) are held against it.
//
//     s[i][j] = q[i] . k[j] / sqrt(head_dim)          for first_key[i] <= j <= i
//     lse[i]  = log sum over j of exp(s[i][j])
//     out[i]  = sum over j of exp(s[i][j] - lse[i]) v[j]
//
// A row that sees no column yields out = 0 and lse = 0. And back (Dao et al. 2022; Dao 2023), with
// p = exp(s - lse) recomputed:
//
//     delta[i] = dout[i] . out[i]
//     dv[j]    = sum over i of p[i][j] dout[i]
//     ds[i][j] = p[i][j] (dout[i] . v[j] - delta[i])
//     dk[j]    = sum over i of ds[i][j] q[i] / sqrt(head_dim)
//     dq[i]    = sum over j of ds[i][j] k[j] / sqrt(head_dim)
//
// A key/value head sums over the query heads that share it, in their order: no atomics.
//
// q, dq: [windows, heads, context, head_dim]; k, v, dk, dv: [windows, kv_heads, context, head_dim];
// out, dout: [windows * context, heads * head_dim]; first_key: [windows * context];
// lse, delta: [windows, heads, context] in f32. No two of them overlap.
//
// With P = windows heads context (context + 1) / 2 pairs: forward 4 head_dim P FLOPs and P exps; the
// pass of dq 6 head_dim P and P, the pass of dk and dv 8 head_dim P and P. At bf16, with X query and
// Y key/value values: 4 X + 4 Y bytes forward, 10 X + 10 Y backward, 4 a row and statistic more.
//
// Launch of forward and the two passes back: blocks of 128 threads, a grid along x of any size (one
// block for every ROWS_A_BLOCK rows of a head is best), dynamic shared memory as `Memory` counts it.
// A warp owns four rows and the block streams tiles of 32 opposite rows: in scores a lane is an
// opposite row, in sums it is a component.
#include "lib/attention.cuh"
#include "lib/reduce.cuh"
#include "lib/vector.cuh"

constexpr int WARPS = 4;
constexpr int ROWS = 4;
constexpr int ROWS_A_BLOCK = WARPS * ROWS;
// Strips of 32 components: head_dim is at most 256.
constexpr int STRIPS = 8;
constexpr unsigned ALL = 0xffffffffu;

// What a block keeps in f32: two planes of its own rows, two tiles of opposite rows. Rows of a tile
// are an odd number of floats apart, so that lanes on neighbouring rows meet no bank conflict.
// 4 * (2 * 16 * head_dim + 2 * 32 * (head_dim | 1)) bytes.
struct Memory {
    float *rows[2];
    float *tiles[2];
    int stride;

    __device__ explicit Memory(int head_dim) : stride(head_dim | 1) {
        extern __shared__ float memory[];
        rows[0] = memory;
        rows[1] = rows[0] + ROWS_A_BLOCK * head_dim;
        tiles[0] = rows[1] + ROWS_A_BLOCK * head_dim;
        tiles[1] = tiles[0] + WARP * stride;
    }
};

// Copies `count` rows, `pitch` apart in `from` and `stride` apart in `to`; those from `there` on
// are zero.
template <typename T>
__device__ void copy_rows(float *to, int stride, const T *from, size_t pitch, int count, int there,
                          int head_dim) {
    for (int i = threadIdx.x; i < count * head_dim; i += WARP * WARPS) {
        const int row = i / head_dim, c = i % head_dim;
        to[row * stride + c] = row < there ? widen(from[row * pitch + c]) : 0.0f;
    }
}

// The products of this warp's rows with the opposite row of this lane.
__device__ inline void dots(float (&products)[ROWS], const float *rows, const float *tile,
                            int stride, int head_dim) {
    const float *own = rows + threadIdx.x / WARP * ROWS * head_dim;
    const float *opposite = tile + threadIdx.x % WARP * stride;
#pragma unroll
    for (int r = 0; r < ROWS; r++) products[r] = 0.0f;
    for (int c = 0; c < head_dim; c++) {
        const float x = opposite[c];
#pragma unroll
        for (int r = 0; r < ROWS; r++) products[r] += own[r * head_dim + c] * x;
    }
}

// sums[r] += the opposite rows, each times the weight that its lane holds for row r. A lane has
// every 32nd component.
__device__ inline void add_weighted(float (&sums)[ROWS][STRIPS], const float (&weights)[ROWS],
                                    const float *tile, int stride, int head_dim) {
    for (int j = 0; j < WARP; j++) {
        float weight[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) weight[r] = __shfl_sync(ALL, weights[r], j);
#pragma unroll
        for (int strip = 0; strip < STRIPS; strip++) {
            if (strip * WARP >= head_dim) break;
            // Lanes past the last component add the last one again: nobody stores theirs.
            const int c = min(static_cast<int>(strip * WARP + threadIdx.x % WARP), head_dim - 1);
            const float x = tile[j * stride + c];
#pragma unroll
            for (int r = 0; r < ROWS; r++) sums[r][strip] += weight[r] * x;
        }
    }
}

// to[r] = scale[r] * sums[r], for this warp's rows that are there; rows lie `pitch` apart.
template <typename T>
__device__ void store_rows(T *to, size_t pitch, const float (&sums)[ROWS][STRIPS],
                           const float (&scale)[ROWS], int there, int head_dim) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const int row = warp * ROWS + r;
#pragma unroll
        for (int strip = 0; strip < STRIPS; strip++) {
            const int c = strip * WARP + lane;
            if (row < there && c < head_dim) {
                to[row * pitch + c] = narrow<T>(scale[r] * sums[r][strip]);
            }
        }
    }
}

// The columns a run of query rows sees, all told: [begin, end), begin a multiple of the tile.
__device__ inline void columns_seen(const uint32_t *first_key, int first, int there, int &begin,
                                    int &end) {
    begin = end = first + there;
    for (int r = 0; r < there; r++) begin = min(begin, first_seen(first_key, first + r));
    begin = begin / WARP * WARP;
}

template <typename T>
__device__ void forward(const T *q, const T *k, const T *v, const uint32_t *first_key, T *out,
                        float *lse, const Heads shape) {
    const int d = shape.head_dim, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const Memory memory(d);
    const float scale = 1.0f / sqrtf(d);
    const int chunks = (shape.context + ROWS_A_BLOCK - 1) / ROWS_A_BLOCK;
    const int tasks = shape.windows * shape.heads * chunks;
    for (int task = blockIdx.x; task < tasks; task += gridDim.x) {
        const int first = task % chunks * ROWS_A_BLOCK, head = task / chunks;
        const int there = min(ROWS_A_BLOCK, shape.context - first);
        const size_t row = shape.row(head, first), key_row = shape.key_row(head);
        const uint32_t *firsts = first_key + shape.window(head) * shape.context;
        int begin, end;
        columns_seen(firsts, first, there, begin, end);
        // The task before may still be reading.
        __syncthreads();
        copy_rows(memory.rows[0], d, q + row * d, d, ROWS_A_BLOCK, there, d);

        int from[ROWS];
        float top[ROWS], sum[ROWS] = {}, sums[ROWS][STRIPS] = {};
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int at = warp * ROWS + r;
            from[r] = at < there ? first_seen(firsts, first + at) : first + at + 1;
            top[r] = -INFINITY;
        }
        for (int tile = begin; tile < end; tile += WARP) {
            const size_t at = (key_row + tile) * d;
            __syncthreads();
            copy_rows(memory.tiles[0], memory.stride, k + at, d, WARP, shape.context - tile, d);
            copy_rows(memory.tiles[1], memory.stride, v + at, d, WARP, shape.context - tile, d);
            __syncthreads();
            float weights[ROWS];
            dots(weights, memory.rows[0], memory.tiles[0], memory.stride, d);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const int column = tile + lane;
                const bool seen = from[r] <= column && column <= first + warp * ROWS + r;
                const float score = seen ? weights[r] * scale : -INFINITY;
                const float higher = fmaxf(top[r], warp_max(score));
                // While nothing was seen, -inf less -inf must not be taken.
                const float base = higher == -INFINITY ? 0.0f : higher;
                const float shrink = expf(top[r] - base);
                weights[r] = expf(score - base);
                sum[r] = sum[r] * shrink + warp_sum(weights[r]);
                top[r] = higher;
#pragma unroll
                for (int strip = 0; strip < STRIPS; strip++) sums[r][strip] *= shrink;
            }
            add_weighted(sums, weights, memory.tiles[1], memory.stride, d);
        }
        float inverse[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const bool any = sum[r] > 0.0f;
            inverse[r] = any ? 1.0f / sum[r] : 0.0f;
            const int at = warp * ROWS + r;
            if (lane == 0 && at < there) lse[row + at] = any ? top[r] + logf(sum[r]) : 0.0f;
        }
        const size_t pitch = static_cast<size_t>(shape.heads) * d;
        store_rows(out + shape.token_row(head, first) * d, pitch, sums, inverse, there, d);
    }
}

template <typename T>
__device__ void backward_q(const T *q, const T *k, const T *v, const uint32_t *first_key,
                           const float *lse, const float *delta, const T *dout, T *dq,
                           const Heads shape) {
    const int d = shape.head_dim, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const Memory memory(d);
    const float scale = 1.0f / sqrtf(d);
    const size_t pitch = static_cast<size_t>(shape.heads) * d;
    const int chunks = (shape.context + ROWS_A_BLOCK - 1) / ROWS_A_BLOCK;
    const int tasks = shape.windows * shape.heads * chunks;
    for (int task = blockIdx.x; task < tasks; task += gridDim.x) {
        const int first = task % chunks * ROWS_A_BLOCK, head = task / chunks;
        const int there = min(ROWS_A_BLOCK, shape.context - first);
        const size_t row = shape.row(head, first), key_row = shape.key_row(head);
        const uint32_t *firsts = first_key + shape.window(head) * shape.context;
        const T *douts = dout + shape.token_row(head, first) * d;
        int begin, end;
        columns_seen(firsts, first, there, begin, end);
        __syncthreads();
        copy_rows(memory.rows[0], d, q + row * d, d, ROWS_A_BLOCK, there, d);
        copy_rows(memory.rows[1], d, douts, pitch, ROWS_A_BLOCK, there, d);

        int from[ROWS];
        float own_lse[ROWS], own_delta[ROWS], scales[ROWS], sums[ROWS][STRIPS] = {};
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int at = warp * ROWS + r;
            from[r] = at < there ? first_seen(firsts, first + at) : first + at + 1;
            own_lse[r] = at < there ? lse[row + at] : 0.0f;
            own_delta[r] = at < there ? delta[row + at] : 0.0f;
            scales[r] = scale;
        }
        for (int tile = begin; tile < end; tile += WARP) {
            const size_t at = (key_row + tile) * d;
            __syncthreads();
            copy_rows(memory.tiles[0], memory.stride, k + at, d, WARP, shape.context - tile, d);
            copy_rows(memory.tiles[1], memory.stride, v + at, d, WARP, shape.context - tile, d);
            __syncthreads();
            float scores[ROWS], dp[ROWS], ds[ROWS];
            dots(scores, memory.rows[0], memory.tiles[0], memory.stride, d);
            dots(dp, memory.rows[1], memory.tiles[1], memory.stride, d);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const int column = tile + lane;
                const bool seen = from[r] <= column && column <= first + warp * ROWS + r;
                const float p = seen ? expf(scores[r] * scale - own_lse[r]) : 0.0f;
                ds[r] = p * (dp[r] - own_delta[r]);
            }
            add_weighted(sums, ds, memory.tiles[0], memory.stride, d);
        }
        store_rows(dq + row * d, d, sums, scales, there, d);
    }
}

template <typename T>
__device__ void backward_kv(const T *q, const T *k, const T *v, const uint32_t *first_key,
                            const float *lse, const float *delta, const T *dout, T *dk, T *dv,
                            const Heads shape) {
    const int d = shape.head_dim, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const Memory memory(d);
    const float scale = 1.0f / sqrtf(d);
    const size_t pitch = static_cast<size_t>(shape.heads) * d;
    const int chunks = (shape.context + ROWS_A_BLOCK - 1) / ROWS_A_BLOCK;
    const int tasks = shape.windows * shape.kv_heads * chunks;
    for (int task = blockIdx.x; task < tasks; task += gridDim.x) {
        const int first = task % chunks * ROWS_A_BLOCK, kv_head = task / chunks;
        const int there = min(ROWS_A_BLOCK, shape.context - first);
        const size_t key_row = static_cast<size_t>(kv_head) * shape.context + first;
        const uint32_t *firsts =
            first_key + static_cast<size_t>(kv_head / shape.kv_heads) * shape.context;
        __syncthreads();
        copy_rows(memory.rows[0], d, k + key_row * d, d, ROWS_A_BLOCK, there, d);
        copy_rows(memory.rows[1], d, v + key_row * d, d, ROWS_A_BLOCK, there, d);

        float dk_sums[ROWS][STRIPS] = {}, dv_sums[ROWS][STRIPS] = {};
        for (int shared = 0; shared < shape.group(); shared++) {
            const int head = kv_head * shape.group() + shared;
            for (int tile = first / WARP * WARP; tile < shape.context; tile += WARP) {
                const int column = tile + lane, left = shape.context - tile;
                const int from = column < shape.context ? first_seen(firsts, column) : column + 1;
                // The same answer in every warp: they skip the tile together.
                if (!__any_sync(ALL, from < first + there)) continue;
                const size_t row = shape.row(head, tile);
                const float row_lse = column < shape.context ? lse[row + lane] : 0.0f;
                const float row_delta = column < shape.context ? delta[row + lane] : 0.0f;
                const T *douts = dout + shape.token_row(head, tile) * d;
                __syncthreads();
                copy_rows(memory.tiles[0], memory.stride, q + row * d, d, WARP, left, d);
                copy_rows(memory.tiles[1], memory.stride, douts, pitch, WARP, left, d);
                __syncthreads();
                float p[ROWS], ds[ROWS];
                dots(p, memory.rows[0], memory.tiles[0], memory.stride, d);
                dots(ds, memory.rows[1], memory.tiles[1], memory.stride, d);
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    const int key = first + warp * ROWS + r;
                    const bool seen = from <= key && key <= column;
                    p[r] = seen ? expf(p[r] * scale - row_lse) : 0.0f;
                    ds[r] = p[r] * (ds[r] - row_delta);
                }
                add_weighted(dv_sums, p, memory.tiles[1], memory.stride, d);
                add_weighted(dk_sums, ds, memory.tiles[0], memory.stride, d);
            }
        }
        const float ones[ROWS] = {1.0f, 1.0f, 1.0f, 1.0f}, scales[ROWS] = {scale, scale, scale, scale};
        store_rows(dv + key_row * d, d, dv_sums, ones, there, d);
        store_rows(dk + key_row * d, d, dk_sums, scales, there, d);
    }
}

#define ENTRIES(T)                                                                                 \
    extern "C" __global__ void __launch_bounds__(128) attention_generic_##T(                               \
        const T *__restrict__ q, const T *__restrict__ k, const T *__restrict__ v,                 \
        const uint32_t *__restrict__ first_key, T *__restrict__ out, float *__restrict__ lse,      \
        int windows, int context, int heads, int kv_heads, int head_dim) {                         \
        forward(q, k, v, first_key, out, lse, {windows, context, heads, kv_heads, head_dim});      \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(128) attention_generic_backward_dq_##T(                    \
        const T *__restrict__ q, const T *__restrict__ k, const T *__restrict__ v,                 \
        const uint32_t *__restrict__ first_key, const float *__restrict__ lse,                     \
        const float *__restrict__ delta, const T *__restrict__ dout, T *__restrict__ dq,           \
        int windows, int context, int heads, int kv_heads, int head_dim) {                         \
        backward_q(q, k, v, first_key, lse, delta, dout, dq,                                       \
                   {windows, context, heads, kv_heads, head_dim});                                 \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(128) attention_generic_backward_dkdv_##T(                   \
        const T *__restrict__ q, const T *__restrict__ k, const T *__restrict__ v,                 \
        const uint32_t *__restrict__ first_key, const float *__restrict__ lse,                     \
        const float *__restrict__ delta, const T *__restrict__ dout, T *__restrict__ dk,           \
        T *__restrict__ dv, int windows, int context, int heads, int kv_heads, int head_dim) {     \
        backward_kv(q, k, v, first_key, lse, delta, dout, dk, dv,                                  \
                    {windows, context, heads, kv_heads, head_dim});                                \
    }

ENTRIES(f32)
ENTRIES(bf16)
ENTRIES(f16)
