// Causal attention, generic path: any head_dim up to 256, f32 arithmetic, no tensor cores.
// Correctness baseline for attention_smallhead.cu, attention_smallhead_tf32.cu and
// flash_attention.cu; not tuned.
//
//     s[i][j] = q[i] . k[j] / sqrt(head_dim)          for first_key[i] <= j <= i
//     lse[i]  = log sum over j of exp(s[i][j])
//     out[i]  = sum over j of exp(s[i][j] - lse[i]) v[j]
//
// A row that sees no key yields out = 0 and lse = 0. Backward (Dao et al. 2022; Dao 2023), with
// p = exp(s - lse) recomputed and delta[i] = dout[i] . out[i] from attention_delta.cu:
//
//     dv[j]    = sum over i of p[i][j] dout[i]
//     ds[i][j] = p[i][j] (dout[i] . v[j] - delta[i])
//     dk[j]    = sum over i of ds[i][j] q[i] / sqrt(head_dim)
//     dq[i]    = sum over j of ds[i][j] k[j] / sqrt(head_dim)
//
// With grouped-query attention (GQA), dk and dv sum over the query heads of a group in their order,
// without atomics.
//
// q, dq: [batch, heads, seq_len, head_dim]; k, v, dk, dv: [batch, kv_heads, seq_len, head_dim];
// out, dout: [batch * seq_len, heads * head_dim]; first_key: [batch * seq_len];
// lse, delta: [batch, heads, seq_len] in f32. No overlaps.
//
// With P = batch heads seq_len (seq_len + 1) / 2 query-key pairs: forward 4 head_dim P FLOPs and P
// exps; backward of dq 6 head_dim P and P, of dk and dv 8 head_dim P and P. At bf16, with X query
// and Y key/value elements: 4 X + 4 Y bytes forward, 10 X + 10 Y backward, and 4 per row and
// statistic.
//
// Launch: blocks of 128 threads, any grid along x (one block per BLOCK_ROWS rows of a head is
// best), dynamic shared memory as SmemLayout counts it. A warp owns four stationary rows, and the
// block streams tiles of 32 rows (K/V for forward and dq, Q/dO for dk and dv): in scores a lane is
// a streamed row, in accumulators it is a component.
#include "lib/attention.cuh"
#include "lib/reduce.cuh"
#include "lib/vector.cuh"

constexpr int WARPS = GENERIC_WARPS;
constexpr int ROWS = GENERIC_ROWS;
constexpr int BLOCK_ROWS = WARPS * ROWS;
// Strips of 32 components: head_dim is at most MAX_HEAD_DIM.
constexpr int STRIPS = MAX_HEAD_DIM / WARP_SIZE;

// Shared memory of a block in f32: two planes of stationary rows, two tiles of streamed rows. Rows
// of a tile are an odd number of floats apart, so that lanes on consecutive rows have no bank
// conflicts. 4 * (2 * 16 * head_dim + 2 * 32 * (head_dim | 1)) bytes.
struct SmemLayout {
    float *rows[2];
    float *tiles[2];
    int stride;

    __device__ explicit SmemLayout(int head_dim) : stride(head_dim | 1) {
        extern __shared__ float smem[];
        rows[0] = smem;
        rows[1] = rows[0] + BLOCK_ROWS * head_dim;
        tiles[0] = rows[1] + BLOCK_ROWS * head_dim;
        tiles[1] = tiles[0] + WARP_SIZE * stride;
    }
};

// Loads `count` rows, `pitch` apart in `from` and `stride` apart in `to`; rows from `valid_rows` on
// are zero.
template <typename T>
__device__ void load_tile(float *to, int stride, const T *from, size_t pitch, int count,
                          int valid_rows, int head_dim) {
    for (int i = threadIdx.x; i < count * head_dim; i += WARP_SIZE * WARPS) {
        const int row = i / head_dim, c = i % head_dim;
        to[row * stride + c] = row < valid_rows ? to_float(from[row * pitch + c]) : 0.0f;
    }
}

// Dot products of this warp's rows with the streamed row of this lane.
__device__ inline void dot_tile(float (&products)[ROWS], const float *rows, const float *tile,
                            int stride, int head_dim) {
    const float *stationary = rows + threadIdx.x / WARP_SIZE * ROWS * head_dim;
    const float *streamed = tile + threadIdx.x % WARP_SIZE * stride;
#pragma unroll
    for (int r = 0; r < ROWS; r++) products[r] = 0.0f;
    for (int c = 0; c < head_dim; c++) {
        const float x = streamed[c];
#pragma unroll
        for (int r = 0; r < ROWS; r++) products[r] += stationary[r * head_dim + c] * x;
    }
}

// acc[r] += streamed rows, each times the weight that its lane holds for row r. A lane accumulates
// every 32nd component.
__device__ inline void add_weighted(float (&acc)[ROWS][STRIPS], const float (&p)[ROWS],
                                    const float *tile, int stride, int head_dim) {
    for (int j = 0; j < WARP_SIZE; j++) {
        float p_r[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) p_r[r] = __shfl_sync(FULL_MASK, p[r], j);
#pragma unroll
        for (int strip = 0; strip < STRIPS; strip++) {
            if (strip * WARP_SIZE >= head_dim) break;
            // Lanes past the last component repeat it; their results are not stored.
            const int lane = threadIdx.x % WARP_SIZE;
            const int c = min(strip * WARP_SIZE + lane, head_dim - 1);
            const float x = tile[j * stride + c];
#pragma unroll
            for (int r = 0; r < ROWS; r++) acc[r][strip] += p_r[r] * x;
        }
    }
}

// to[r] = scale[r] * acc[r] for the valid rows of this warp, `pitch` apart.
template <typename T>
__device__ void store_rows(T *to, size_t pitch, const float (&acc)[ROWS][STRIPS],
                           const float (&scale)[ROWS], int valid_rows, int head_dim) {
    const int warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const int row = warp * ROWS + r;
#pragma unroll
        for (int strip = 0; strip < STRIPS; strip++) {
            const int c = strip * WARP_SIZE + lane;
            if (row < valid_rows && c < head_dim) {
                to[row * pitch + c] = from_float<T>(scale[r] * acc[r][strip]);
            }
        }
    }
}

// Key positions visible to any of a range of query rows: [begin, end), begin a multiple of the
// tile.
__device__ inline void visible_range(const uint32_t *first_key, int first, int valid_rows,
                                     int &begin, int &end) {
    begin = end = first + valid_rows;
    for (int r = 0; r < valid_rows; r++) begin = min(begin, first_visible(first_key, first + r));
    begin = begin / WARP_SIZE * WARP_SIZE;
}

template <typename T>
__device__ void forward(const T *q, const T *k, const T *v, const uint32_t *first_key, T *out,
                        float *lse, const AttentionShape shape) {
    const int d = shape.head_dim, lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
    const SmemLayout smem(d);
    const float scale = 1.0f / sqrtf(d);
    const int chunks = (shape.seq_len + BLOCK_ROWS - 1) / BLOCK_ROWS;
    const int tasks = shape.batch * shape.heads * chunks;
    for (int task = blockIdx.x; task < tasks; task += gridDim.x) {
        const int first = task % chunks * BLOCK_ROWS, head = task / chunks;
        const int valid_rows = min(BLOCK_ROWS, shape.seq_len - first);
        const size_t row = shape.row(head, first), kv_row = shape.kv_row(head);
        const uint32_t *first_keys = first_key + shape.sequence(head) * shape.seq_len;
        int begin, end;
        visible_range(first_keys, first, valid_rows, begin, end);
        // Other warps may still be reading the previous task's rows.
        __syncthreads();  // mutant: rows_overwritten
        load_tile(smem.rows[0], d, q + row * d, d, BLOCK_ROWS, valid_rows, d);

        int from[ROWS];
        float row_max[ROWS], row_sum[ROWS] = {}, acc[ROWS][STRIPS] = {};
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int at = warp * ROWS + r;
            from[r] = at < valid_rows ? first_visible(first_keys, first + at) : first + at + 1;
            row_max[r] = -INFINITY;
        }
        for (int tile = begin; tile < end; tile += WARP_SIZE) {
            const size_t at = (kv_row + tile) * d;
            __syncthreads();
            load_tile(smem.tiles[0], smem.stride, k + at, d, WARP_SIZE, shape.seq_len - tile, d);
            load_tile(smem.tiles[1], smem.stride, v + at, d, WARP_SIZE, shape.seq_len - tile, d);
            __syncthreads();
            float p[ROWS];
            dot_tile(p, smem.rows[0], smem.tiles[0], smem.stride, d);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const int key = tile + lane;
                const bool visible = from[r] <= key && key <= first + warp * ROWS + r;
                const float score = visible ? p[r] * scale : -INFINITY;  // mutant: no_mask
                const float new_max = fmaxf(row_max[r], warp_max(score));
                // Avoid (-inf) - (-inf) = NaN for rows that have seen no key yet.
                const float base = new_max == -INFINITY ? 0.0f : new_max;
                const float rescale = expf(row_max[r] - base);
                p[r] = expf(score - base);
                row_sum[r] = row_sum[r] * rescale + warp_sum(p[r]);  // mutant: sum_not_rescaled
                row_max[r] = new_max;
#pragma unroll
                for (int strip = 0; strip < STRIPS; strip++) acc[r][strip] *= rescale;
            }
            add_weighted(acc, p, smem.tiles[1], smem.stride, d);
        }
        float inverse_sum[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const bool any = row_sum[r] > 0.0f;
            inverse_sum[r] = any ? 1.0f / row_sum[r] : 0.0f;
            const int at = warp * ROWS + r;
            if (lane == 0 && at < valid_rows) {
                lse[row + at] = any ? row_max[r] + logf(row_sum[r]) : 0.0f;
            }
        }
        const size_t pitch = static_cast<size_t>(shape.heads) * d;
        store_rows(out + shape.out_row(head, first) * d, pitch, acc, inverse_sum, valid_rows, d);
    }
}

template <typename T>
__device__ void backward_dq(const T *q, const T *k, const T *v, const uint32_t *first_key,
                           const float *lse, const float *delta, const T *dout, T *dq,
                           const AttentionShape shape) {
    const int d = shape.head_dim, lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
    const SmemLayout smem(d);
    const float scale = 1.0f / sqrtf(d);
    const size_t pitch = static_cast<size_t>(shape.heads) * d;
    const int chunks = (shape.seq_len + BLOCK_ROWS - 1) / BLOCK_ROWS;
    const int tasks = shape.batch * shape.heads * chunks;
    for (int task = blockIdx.x; task < tasks; task += gridDim.x) {
        const int first = task % chunks * BLOCK_ROWS, head = task / chunks;
        const int valid_rows = min(BLOCK_ROWS, shape.seq_len - first);
        const size_t row = shape.row(head, first), kv_row = shape.kv_row(head);
        const uint32_t *first_keys = first_key + shape.sequence(head) * shape.seq_len;
        const T *douts = dout + shape.out_row(head, first) * d;
        int begin, end;
        visible_range(first_keys, first, valid_rows, begin, end);
        __syncthreads();
        load_tile(smem.rows[0], d, q + row * d, d, BLOCK_ROWS, valid_rows, d);
        load_tile(smem.rows[1], d, douts, pitch, BLOCK_ROWS, valid_rows, d);

        int from[ROWS];
        float row_lse[ROWS], row_delta[ROWS], scales[ROWS], acc[ROWS][STRIPS] = {};
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int at = warp * ROWS + r;
            from[r] = at < valid_rows ? first_visible(first_keys, first + at) : first + at + 1;
            row_lse[r] = at < valid_rows ? lse[row + at] : 0.0f;
            row_delta[r] = at < valid_rows ? delta[row + at] : 0.0f;
            scales[r] = scale;
        }
        for (int tile = begin; tile < end; tile += WARP_SIZE) {
            const size_t at = (kv_row + tile) * d;
            __syncthreads();
            load_tile(smem.tiles[0], smem.stride, k + at, d, WARP_SIZE, shape.seq_len - tile, d);
            load_tile(smem.tiles[1], smem.stride, v + at, d, WARP_SIZE, shape.seq_len - tile, d);
            __syncthreads();
            float scores[ROWS], dp[ROWS], ds[ROWS];
            dot_tile(scores, smem.rows[0], smem.tiles[0], smem.stride, d);
            dot_tile(dp, smem.rows[1], smem.tiles[1], smem.stride, d);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const int key = tile + lane;
                const bool visible = from[r] <= key && key <= first + warp * ROWS + r;
                const float p = visible ? expf(scores[r] * scale - row_lse[r]) : 0.0f;
                ds[r] = p * (dp[r] - row_delta[r]);  // mutant: no_delta
            }
            add_weighted(acc, ds, smem.tiles[0], smem.stride, d);
        }
        store_rows(dq + row * d, d, acc, scales, valid_rows, d);
    }
}

template <typename T>
__device__ void backward_dkdv(const T *q, const T *k, const T *v, const uint32_t *first_key,
                            const float *lse, const float *delta, const T *dout, T *dk, T *dv,
                            const AttentionShape shape) {
    const int d = shape.head_dim, lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
    const SmemLayout smem(d);
    const float scale = 1.0f / sqrtf(d);
    const size_t pitch = static_cast<size_t>(shape.heads) * d;
    const int chunks = (shape.seq_len + BLOCK_ROWS - 1) / BLOCK_ROWS;
    const int tasks = shape.batch * shape.kv_heads * chunks;
    for (int task = blockIdx.x; task < tasks; task += gridDim.x) {
        const int first = task % chunks * BLOCK_ROWS, kv_head = task / chunks;
        const int valid_rows = min(BLOCK_ROWS, shape.seq_len - first);
        const size_t kv_row = static_cast<size_t>(kv_head) * shape.seq_len + first;
        const uint32_t *first_keys =
            first_key + static_cast<size_t>(kv_head / shape.kv_heads) * shape.seq_len;
        __syncthreads();
        load_tile(smem.rows[0], d, k + kv_row * d, d, BLOCK_ROWS, valid_rows, d);
        load_tile(smem.rows[1], d, v + kv_row * d, d, BLOCK_ROWS, valid_rows, d);

        float dk_acc[ROWS][STRIPS] = {}, dv_acc[ROWS][STRIPS] = {};
        for (int member = 0; member < shape.group(); member++) {  // mutant: one_head_of_a_group
            const int head = kv_head * shape.group() + member;
            const int begin = first / WARP_SIZE * WARP_SIZE;
            for (int tile = begin; tile < shape.seq_len; tile += WARP_SIZE) {
                const int query = tile + lane, remaining = shape.seq_len - tile;
                const int from =
                    query < shape.seq_len ? first_visible(first_keys, query) : query + 1;
                // Uniform over the warps of a block: they skip the tile together.
                // mutant: visible_tile_skipped
                if (!__any_sync(FULL_MASK, from < first + valid_rows)) continue;
                const size_t row = shape.row(head, tile);
                const float row_lse = query < shape.seq_len ? lse[row + lane] : 0.0f;
                const float row_delta = query < shape.seq_len ? delta[row + lane] : 0.0f;
                const T *douts = dout + shape.out_row(head, tile) * d;
                __syncthreads();
                load_tile(smem.tiles[0], smem.stride, q + row * d, d, WARP_SIZE, remaining, d);
                load_tile(smem.tiles[1], smem.stride, douts, pitch, WARP_SIZE, remaining, d);
                __syncthreads();
                float p[ROWS], ds[ROWS];
                dot_tile(p, smem.rows[0], smem.tiles[0], smem.stride, d);
                dot_tile(ds, smem.rows[1], smem.tiles[1], smem.stride, d);
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    const int key = first + warp * ROWS + r;
                    const bool visible = from <= key && key <= query;
                    p[r] = visible ? expf(p[r] * scale - row_lse) : 0.0f;
                    ds[r] = p[r] * (ds[r] - row_delta);
                }
                add_weighted(dv_acc, p, smem.tiles[1], smem.stride, d);
                add_weighted(dk_acc, ds, smem.tiles[0], smem.stride, d);
            }
        }
        const float ones[ROWS] = {1.0f, 1.0f, 1.0f, 1.0f};
        const float scales[ROWS] = {scale, scale, scale, scale};
        store_rows(dv + kv_row * d, d, dv_acc, ones, valid_rows, d);
        store_rows(dk + kv_row * d, d, dk_acc, scales, valid_rows, d);
    }
}

#define ENTRIES(T)                                                                                 \
    extern "C" __global__ void __launch_bounds__(WARPS * WARP_SIZE)                                \
    attention_generic_##T(                                                                         \
        const T *__restrict__ q, const T *__restrict__ k, const T *__restrict__ v,                 \
        const uint32_t *__restrict__ first_key, T *__restrict__ out, float *__restrict__ lse,      \
        int batch, int seq_len, int heads, int kv_heads, int head_dim) {                           \
        forward(q, k, v, first_key, out, lse, {batch, seq_len, heads, kv_heads, head_dim});        \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(WARPS * WARP_SIZE)                                \
    attention_generic_backward_dq_##T(                                                             \
        const T *__restrict__ q, const T *__restrict__ k, const T *__restrict__ v,                 \
        const uint32_t *__restrict__ first_key, const float *__restrict__ lse,                     \
        const float *__restrict__ delta, const T *__restrict__ dout, T *__restrict__ dq,           \
        int batch, int seq_len, int heads, int kv_heads, int head_dim) {                           \
        backward_dq(q, k, v, first_key, lse, delta, dout, dq,                                      \
                    {batch, seq_len, heads, kv_heads, head_dim});                                  \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(WARPS * WARP_SIZE)                                \
    attention_generic_backward_dkdv_##T(                                                           \
        const T *__restrict__ q, const T *__restrict__ k, const T *__restrict__ v,                 \
        const uint32_t *__restrict__ first_key, const float *__restrict__ lse,                     \
        const float *__restrict__ delta, const T *__restrict__ dout, T *__restrict__ dk,           \
        T *__restrict__ dv, int batch, int seq_len, int heads, int kv_heads, int head_dim) {       \
        backward_dkdv(q, k, v, first_key, lse, delta, dout, dk, dv,                                \
                      {batch, seq_len, heads, kv_heads, head_dim});                                \
    }

ENTRIES(f32)
ENTRIES(bf16)
ENTRIES(f16)
