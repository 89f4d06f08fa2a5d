// Causal attention for heads of 2, 4 and 8 components; formulas and shapes as in
// attention_generic.cu. A tensor core would multiply mostly padding here: the arithmetic is f32, on
// the CUDA cores.
//
// Warps are independent. A lane owns ROWS stationary rows, 32 apart; the streamed rows (K/V in
// forward and dq, Q/dO in dk and dv) come in tiles of 32, one loaded by each lane while the
// previous tile is processed, and are broadcast from shared memory to all lanes. Exponentials are
// base 2, with log2(e) / sqrt(head_dim) folded into q (or k); the initial value of the dot product
// is minus the shift (running maximum) or minus the log-sum-exp. Instructions per query-key pair
// at head_dim D:
//
//     forward      D fma, ex2, add, D fma                           2 D + 2
//     dq           D fma, ex2, D fma, mul, D fma                    3 D + 2
//     dk and dv    D fma, ex2, D fma, D fma, mul, D fma             4 D + 2
//
// and its share of the loads, D / 2 / ROWS or slightly more. Bytes as in attention_generic.cu.
//
// The shift need not be the maximum score, only close to it, since f32 is as accurate at 2^60 as at
// 1. So a whole tile takes the fast path (no running maximum) if |q| max |k| proves that no
// exponent exceeds MAX_EXPONENT; otherwise, and where a row sees its first or last key, it
// takes the online-softmax path: two passes over the tile.
//
// Launch: see each entry. Pointers are aligned to 32 bytes.
#include "lib/attention.cuh"
#include "lib/ptx.cuh"
#include "lib/reduce.cuh"
#include "lib/vector.cuh"

constexpr int WARPS = SMALLHEAD_WARPS;
constexpr float MAX_EXPONENT = 64.0f;

// Minimum resident blocks per SM (`__launch_bounds__`): 128, 96 or 168 registers per thread.
constexpr int min_blocks(int head_dim, int rows) {
    return rows == 1 ? 4 : head_dim == 2 ? 5 : 3;
}

template <int D>
__device__ constexpr float rsqrt_head_dim() {
    return D == 2 ? 0.7071067811865476f : D == 4 ? 0.5f : 0.3535533905932738f;
}

template <int D>
__device__ inline float dot(float start, const float *a, const float *b) {
#pragma unroll
    for (int c = 0; c < D; c++) start = fmaf(a[c], b[c], start);
    return start;
}

template <int D>
__device__ inline void axpy(float (&sum)[D], float scale, const float *x) {
#pragma unroll
    for (int c = 0; c < D; c++) sum[c] = fmaf(scale, x[c], sum[c]);
}

// Row of both streamed matrices: k and v, or q and dout.
template <int D>
struct alignas(16) RowPair {
    float at[2 * D];
};

// Unrolled loop: calls step(Index<i>) for FROM..TO, with the index a constant expression.
template <int I>
struct Index {
    static constexpr int value = I;
    __device__ constexpr operator int() const { return I; }
};

template <int FROM, int TO, typename Step>
__device__ __forceinline__ void static_for(Step step) {
    if constexpr (FROM < TO) {
        step(Index<FROM>());
        static_for<FROM + 1, TO>(step);
    }
}

// Query rows of a lane, first + lane + 32 r, and the keys they see.
template <int D, int ROWS>
struct Queries {
    float q[ROWS][D];
    int from[ROWS];
    int first;

    // Rows past seq_len are zero and see every key, so that they force no mask.
    template <typename T>
    __device__ void load_queries(const T *rows, const uint32_t *first_key, int first_row,
                                 int seq_len) {
        first = first_row;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int position = row(r);
            const bool valid = position < seq_len;
            from[r] = valid ? first_visible(first_key, position) : 0;
            float values[D] = {};
            if (valid) load(values, rows + static_cast<size_t>(position) * D);
#pragma unroll
            for (int c = 0; c < D; c++) q[r][c] = values[c] * (rsqrt_head_dim<D>() * LOG2E);
        }
    }
    __device__ int row(int r) const { return first + 32 * r + threadIdx.x % WARP_SIZE; }
    __device__ bool is_visible(int r, int key) const {
        return from[r] <= key && key <= row(r);  // mutant: next_key_visible
    }
    // First key that any row of the warp sees.
    __device__ int first_key_of_warp() const {
        int least = from[0];
#pragma unroll
        for (int r = 1; r < ROWS; r++) least = min(least, from[r]);
        return __reduce_min_sync(FULL_MASK, least);
    }
    // First key that every row of the warp sees.
    __device__ int last_first_key() const {
        int most = from[0];
#pragma unroll
        for (int r = 1; r < ROWS; r++) most = max(most, from[r]);
        return __reduce_max_sync(FULL_MASK, most);
    }
};

template <int D, int ROWS>
struct Forward : Queries<D, ROWS> {
    float norm[ROWS], shift[ROWS], sum[ROWS], out[ROWS][D];

    __device__ void start() {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            norm[r] = sqrtf(dot<D>(0.0f, this->q[r], this->q[r]));
            shift[r] = -INFINITY;  // mutant: unseen_row_taken_as_bounded
            sum[r] = 0.0f;
#pragma unroll
            for (int c = 0; c < D; c++) out[r][c] = 0.0f;
        }
    }

    // Whether the current shifts of rows FROM.. bound the exponents of keys no longer than
    // `max_norm`. False for a row that has seen no key yet: the tile of its first key takes the
    // online path.
    template <int FROM>
    __device__ bool exponents_bounded(float max_norm) const {
        bool bounded = true;
#pragma unroll
        // mutant: exponents_not_bounded
        for (int r = FROM; r < ROWS; r++) bounded &= norm[r] * max_norm - shift[r] <= MAX_EXPONENT;
        return __all_sync(FULL_MASK, bounded);
    }

    // Fast path: a tile visible to all rows FROM.. .
    template <int FROM>
    __device__ void add_unmasked(const RowPair<D> *tile) {
#pragma unroll 4
        for (int j = 0; j < WARP_SIZE; j++) {
            const RowPair<D> pair = tile[j];
#pragma unroll
            for (int r = FROM; r < ROWS; r++) {
                const float p = ex2_approx(dot<D>(-shift[r], this->q[r], pair.at));
                sum[r] += p;
                axpy<D>(out[r], p, pair.at + D);
            }
        }
    }

    // Online-softmax path: a tile visible to rows FROM..TO in part, or with scores above the shift.
    template <int FROM, int TO>
    __device__ void add_online(const RowPair<D> *tile, int first_key) {
        float new_max[ROWS];
#pragma unroll
        for (int r = FROM; r < TO; r++) new_max[r] = shift[r];
#pragma unroll 2
        for (int j = 0; j < WARP_SIZE; j++) {
            const RowPair<D> pair = tile[j];
#pragma unroll
            for (int r = FROM; r < TO; r++) {
                const float score = dot<D>(0.0f, this->q[r], pair.at);
                if (this->is_visible(r, first_key + j)) new_max[r] = fmaxf(new_max[r], score);
            }
        }
#pragma unroll
        for (int r = FROM; r < TO; r++) {
            // Avoid (-inf) - (-inf) = NaN for rows that have seen no key yet.
            const float rescale =
                new_max[r] == -INFINITY ? 0.0f : ex2_approx(shift[r] - new_max[r]);
            shift[r] = new_max[r];
            sum[r] *= rescale;
#pragma unroll
            for (int c = 0; c < D; c++) out[r][c] *= rescale;
        }
#pragma unroll 2
        for (int j = 0; j < WARP_SIZE; j++) {
            const RowPair<D> pair = tile[j];
#pragma unroll
            for (int r = FROM; r < TO; r++) {
                const float p = ex2_approx(dot<D>(-shift[r], this->q[r], pair.at));
                if (this->is_visible(r, first_key + j)) {
                    sum[r] += p;
                    axpy<D>(out[r], p, pair.at + D);
                }
            }
        }
    }
};

// Register prefetch of the next tile.
template <typename T, int D>
struct Prefetch {
    float at[2 * D];

    __device__ void load_next(const T *a, const T *b, bool valid) {
        float first[D] = {}, second[D] = {};
        if (valid) {
            load(first, a);
            load(second, b);
        }
#pragma unroll
        for (int c = 0; c < D; c++) {
            at[c] = first[c];
            at[D + c] = second[c];
        }
    }
    // On return all lanes have left the previous tile, and see this one.
    __device__ void store_tile(RowPair<D> *tile) const {
        __syncwarp();
        RowPair<D> pair;
#pragma unroll
        for (int c = 0; c < 2 * D; c++) pair.at[c] = at[c];
        tile[threadIdx.x % WARP_SIZE] = pair;
        __syncwarp();  // mutant: tile_read_early
    }
};

template <int D, int ROWS, typename T>
__device__ void forward(const T *q, const T *k, const T *v, const uint32_t *first_key, T *out,
                        float *lse, const AttentionShape shape) {
    constexpr int CHUNK = WARP_SIZE * ROWS;
    __shared__ RowPair<D> tiles[WARPS][WARP_SIZE];
    const int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
    RowPair<D> *tile = tiles[warp];
    const int chunks = (shape.seq_len + CHUNK - 1) / CHUNK, heads = shape.batch * shape.heads;
    for (int task = blockIdx.x * WARPS + warp; task < chunks * heads; task += gridDim.x * WARPS) {
        // Longest rows first; consecutive tasks share keys.
        const int first = (chunks - 1 - task / heads) * CHUNK, head = task % heads;
        const size_t row = shape.row(head, 0), kv_row = shape.kv_row(head);
        Forward<D, ROWS> rows;
        rows.load_queries(q + row * D, first_key + shape.sequence(head) * shape.seq_len, first,
                       shape.seq_len);
        rows.start();
        const int begin = rows.first_key_of_warp() / WARP_SIZE * WARP_SIZE;
        const int end = min(first + CHUNK, shape.seq_len);

        Prefetch<T, D> prefetch;
        const auto load_next = [&](int position) {
            const size_t at = (kv_row + position + lane) * D;
            prefetch.load_next(k + at, v + at, position + lane < shape.seq_len);
        };
        load_next(begin);
        for (int at = begin; at < end; at += WARP_SIZE) {
            const float max_norm = warp_max(sqrtf(dot<D>(0.0f, prefetch.at, prefetch.at)));
            prefetch.store_tile(tile);
            if (at + WARP_SIZE < end) load_next(at + WARP_SIZE);
            if (at < first) {
                if (rows.template exponents_bounded<0>(max_norm)) {
                    rows.template add_unmasked<0>(tile);
                } else {
                    rows.template add_online<0, ROWS>(tile, at);
                }
                continue;
            }
            // Diagonal tile of one set of rows: hidden from the sets before, visible to those
            // after.
            static_for<0, ROWS>([&](auto i) {
                if (at != first + WARP_SIZE * i) return;
                rows.template add_online<i, i + 1>(tile, at);
                if constexpr (i + 1 < ROWS) {  // mutant: rows_after_diagonal_skipped
                    if (rows.template exponents_bounded<i + 1>(max_norm)) {
                        rows.template add_unmasked<i + 1>(tile);
                    } else {
                        rows.template add_online<i + 1, ROWS>(tile, at);
                    }
                }
            });
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int position = rows.row(r);
            if (position >= shape.seq_len) continue;
            const bool any_visible = rows.sum[r] > 0.0f;
            const float inverse_sum = any_visible ? 1.0f / rows.sum[r] : 0.0f;
            float values[D];
#pragma unroll
            for (int c = 0; c < D; c++) values[c] = rows.out[r][c] * inverse_sum;
            store(out + shape.out_row(head, position) * D, values);
            lse[row + position] = any_visible ? (rows.shift[r] + log2f(rows.sum[r])) * LN2 : 0.0f;
        }
    }
}

template <int D, int ROWS>
struct BackwardDq : Queries<D, ROWS> {
    float dout[ROWS][D], lse[ROWS], delta[ROWS], dq[ROWS][D];

    template <int FROM, int TO, bool MASKED>
    __device__ void add(const RowPair<D> *tile, int first_key) {
#pragma unroll 4
        for (int j = 0; j < WARP_SIZE; j++) {
            const RowPair<D> pair = tile[j];
#pragma unroll
            for (int r = FROM; r < TO; r++) {
                float p = ex2_approx(dot<D>(-lse[r], this->q[r], pair.at));
                if (MASKED && !this->is_visible(r, first_key + j)) p = 0.0f;
                axpy<D>(dq[r], p * dot<D>(-delta[r], dout[r], pair.at + D), pair.at);
            }
        }
    }
};

template <int D, int ROWS, typename T>
__device__ void backward_dq(const T *q, const T *k, const T *v, const uint32_t *first_key,
                           const float *lse, const float *delta, const T *dout, T *dq,
                           const AttentionShape shape) {
    constexpr int CHUNK = WARP_SIZE * ROWS;
    __shared__ RowPair<D> tiles[WARPS][WARP_SIZE];
    const int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
    RowPair<D> *tile = tiles[warp];
    const int chunks = (shape.seq_len + CHUNK - 1) / CHUNK, heads = shape.batch * shape.heads;
    for (int task = blockIdx.x * WARPS + warp; task < chunks * heads; task += gridDim.x * WARPS) {
        const int first = (chunks - 1 - task / heads) * CHUNK, head = task % heads;
        const size_t row = shape.row(head, 0), kv_row = shape.kv_row(head);
        BackwardDq<D, ROWS> rows;
        rows.load_queries(q + row * D, first_key + shape.sequence(head) * shape.seq_len, first,
                       shape.seq_len);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int position = rows.row(r);
            const bool valid = position < shape.seq_len;
            float values[D] = {};
            if (valid) load(values, dout + shape.out_row(head, position) * D);
            rows.lse[r] = valid ? lse[row + position] * LOG2E : 0.0f;
            rows.delta[r] = valid ? delta[row + position] : 0.0f;
#pragma unroll
            for (int c = 0; c < D; c++) {
                rows.dout[r][c] = values[c];
                rows.dq[r][c] = 0.0f;
            }
        }
        const int begin = rows.first_key_of_warp() / WARP_SIZE * WARP_SIZE;
        const int masked_until = rows.last_first_key();
        const int end = min(first + CHUNK, shape.seq_len);

        Prefetch<T, D> prefetch;
        const auto load_next = [&](int position) {
            const size_t at = (kv_row + position + lane) * D;
            prefetch.load_next(k + at, v + at, position + lane < shape.seq_len);
        };
        load_next(begin);
        for (int at = begin; at < end; at += WARP_SIZE) {
            prefetch.store_tile(tile);
            if (at + WARP_SIZE < end) load_next(at + WARP_SIZE);
            if (masked_until > at) {
                rows.template add<0, ROWS, true>(tile, at);
                continue;
            }
            if (at < first) {
                rows.template add<0, ROWS, false>(tile, at);
                continue;
            }
            static_for<0, ROWS>([&](auto i) {
                if (at != first + WARP_SIZE * i) return;
                rows.template add<i, i + 1, true>(tile, at);
                rows.template add<i + 1, ROWS, false>(tile, at);
            });
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int position = rows.row(r);
            if (position >= shape.seq_len) continue;
            float values[D];
#pragma unroll
            for (int c = 0; c < D; c++) values[c] = rows.dq[r][c] * rsqrt_head_dim<D>();
            store(dq + (row + position) * D, values);
        }
    }
}

// Per-query statistics of the backward.
struct alignas(16) RowStats {
    float lse, delta;
    int from;
};

// Key rows of a lane, first + lane + 32 r.
template <int D, int ROWS>
struct BackwardDkdv {
    float k[ROWS][D], v[ROWS][D], dk[ROWS][D], dv[ROWS][D];
    int first;

    __device__ int row(int r) const { return first + 32 * r + threadIdx.x % WARP_SIZE; }

    template <int FROM, int TO, bool MASKED>
    __device__ void add(const RowPair<D> *tile, const RowStats *stats, int first_query) {
#pragma unroll 4
        for (int j = 0; j < WARP_SIZE; j++) {
            const RowPair<D> pair = tile[j];
            const float lse = stats[j].lse, delta = stats[j].delta;
#pragma unroll
            for (int r = FROM; r < TO; r++) {
                float p = ex2_approx(dot<D>(-lse, k[r], pair.at));
                if (MASKED && !(stats[j].from <= row(r) && row(r) <= first_query + j)) {
                    p = 0.0f;
                }
                axpy<D>(dv[r], p, pair.at + D);
                axpy<D>(dk[r], p * dot<D>(-delta, v[r], pair.at + D), pair.at);
            }
        }
    }
};

// Maximum warps per block of the dk and dv pass.
__host__ __device__ constexpr int max_warps(int rows) {
    return rows == 1 ? SMALLHEAD_DKDV_WARPS[0] : SMALLHEAD_DKDV_WARPS[1];
}

// A block takes one range of keys; its warps split the query heads of the group, and their partial
// sums are added in warp order.
template <int D, int ROWS, typename T>
__device__ void backward_dkdv(const T *q, const T *k, const T *v, const uint32_t *first_key,
                            const float *lse, const float *delta, const T *dout, T *dk, T *dv,
                            const AttentionShape shape) {
    constexpr int CHUNK = WARP_SIZE * ROWS, MAX_BLOCK_WARPS = max_warps(ROWS);
    __shared__ RowPair<D> tiles[MAX_BLOCK_WARPS][WARP_SIZE];
    __shared__ RowStats all_stats[MAX_BLOCK_WARPS][WARP_SIZE];
    // dk and dv, components outermost: consecutive lanes on consecutive words.
    __shared__ float sums[2 * ROWS * D][WARP_SIZE];
    const int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
    const int warps = blockDim.x / WARP_SIZE;
    RowPair<D> *tile = tiles[warp];
    RowStats *stats = all_stats[warp];
    const int chunks = (shape.seq_len + CHUNK - 1) / CHUNK;
    const int kv_heads = shape.batch * shape.kv_heads;
    for (int task = blockIdx.x; task < chunks * kv_heads; task += gridDim.x) {
        const int kv_head = task % kv_heads, first = task / kv_heads * CHUNK;
        const size_t kv_row = static_cast<size_t>(kv_head) * shape.seq_len;
        BackwardDkdv<D, ROWS> rows;
        rows.first = first;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int position = rows.row(r);
            float key[D] = {}, value[D] = {};
            if (position < shape.seq_len) {
                load(key, k + (kv_row + position) * D);
                load(value, v + (kv_row + position) * D);
            }
#pragma unroll
            for (int c = 0; c < D; c++) {
                rows.k[r][c] = key[c] * (rsqrt_head_dim<D>() * LOG2E);
                rows.v[r][c] = value[c];
                rows.dk[r][c] = rows.dv[r][c] = 0.0f;
            }
        }
        for (int member = warp; member < shape.group(); member += warps) {
            const int head = kv_head * shape.group() + member;
            const size_t row = shape.row(head, 0);
            const uint32_t *first_keys = first_key + shape.sequence(head) * shape.seq_len;
            Prefetch<T, D> prefetch;
            RowStats next;
            // Queries past seq_len are zero: whatever their p, they add nothing.
            const auto load_next = [&](int tile_position) {
                const int position = tile_position + lane;
                const bool valid = position < shape.seq_len;
                prefetch.load_next(q + (row + position) * D,
                                   dout + shape.out_row(head, position) * D, valid);
                next.lse = valid ? lse[row + position] * LOG2E : 0.0f;
                next.delta = valid ? delta[row + position] : 0.0f;
                next.from = valid ? first_visible(first_keys, position) : 0;
            };
            load_next(first);
            for (int at = first; at < shape.seq_len; at += WARP_SIZE) {
                const bool masked_until = __any_sync(FULL_MASK, next.from > first);
                // mutant: visible_tile_skipped
                const bool all_hidden = __all_sync(FULL_MASK, next.from >= first + CHUNK);
                prefetch.store_tile(tile);
                stats[lane] = next;
                __syncwarp();
                if (at + WARP_SIZE < shape.seq_len) load_next(at + WARP_SIZE);
                if (all_hidden) continue;
                if (masked_until) {
                    rows.template add<0, ROWS, true>(tile, stats, at);
                    continue;
                }
                if (at >= first + CHUNK) {
                    rows.template add<0, ROWS, false>(tile, stats, at);
                    continue;
                }
                static_for<0, ROWS>([&](auto i) {
                    if (at != first + WARP_SIZE * i) return;
                    rows.template add<0, i, false>(tile, stats, at);
                    rows.template add<i, i + 1, true>(tile, stats, at);
                });
            }
        }
        for (int owner = 0; owner < warps; owner++) {  // mutant: other_warps_dropped
            if (owner == warp) {
#pragma unroll
                for (int i = 0; i < ROWS * D; i++) {
                    const float key = rows.dk[i / D][i % D], value = rows.dv[i / D][i % D];
                    sums[i][lane] = owner == 0 ? key : sums[i][lane] + key;
                    float &value_sum = sums[ROWS * D + i][lane];
                    value_sum = owner == 0 ? value : value_sum + value;
                }
            }
            __syncthreads();
        }
        for (int r = warp; r < ROWS; r += warps) {
            const int position = rows.row(r);
            if (position >= shape.seq_len) continue;
            float key[D], value[D];
#pragma unroll
            for (int c = 0; c < D; c++) {
                key[c] = sums[r * D + c][lane] * rsqrt_head_dim<D>();
                value[c] = sums[(ROWS + r) * D + c][lane];
            }
            store(dk + (kv_row + position) * D, key);
            store(dv + (kv_row + position) * D, value);
        }
        // The next task must not overwrite sums that a slower warp still reads.
        __syncthreads();
    }
}

// Entry names end in head_dim, rows per lane and dtype. Several rows per lane amortize the loads;
// one row per lane gives the most warps for small problems. Launch of forward and dq: blocks of 128
// threads, any grid along x; one warp per 32 ROWS rows of a head is best. Launch of dk and dv:
// blocks of one to max_warps(ROWS) warps, best as many as query heads share a key/value head; one
// block per 32 ROWS rows of a key/value head.

#define FORWARD(D, ROWS, T)                                                                        \
    extern "C" __global__ void __launch_bounds__(WARPS * WARP_SIZE, min_blocks(D, ROWS))           \
    attention_smallhead_##D##_##ROWS##_##T(                                                        \
        const T *__restrict__ q, const T *__restrict__ k, const T *__restrict__ v,                 \
        const uint32_t *__restrict__ first_key, T *__restrict__ out, float *__restrict__ lse,      \
        int batch, int seq_len, int heads, int kv_heads) {                                         \
        forward<D, ROWS>(q, k, v, first_key, out, lse, {batch, seq_len, heads, kv_heads, D});      \
    }

#define BACKWARD(D, ROWS, T)                                                                       \
    extern "C" __global__ void __launch_bounds__(WARPS * WARP_SIZE, min_blocks(D, ROWS))           \
    attention_smallhead_backward_dq_##D##_##ROWS##_##T(                                            \
        const T *__restrict__ q, const T *__restrict__ k, const T *__restrict__ v,                 \
        const uint32_t *__restrict__ first_key, const float *__restrict__ lse,                     \
        const float *__restrict__ delta, const T *__restrict__ dout, T *__restrict__ dq,           \
        int batch, int seq_len, int heads, int kv_heads) {                                         \
        backward_dq<D, ROWS>(q, k, v, first_key, lse, delta, dout, dq,                             \
                            {batch, seq_len, heads, kv_heads, D});                                 \
    }                                                                                              \
    extern "C" __global__ void                                                                     \
    __launch_bounds__(32 * max_warps(ROWS), min_blocks(D, ROWS) * 4 / max_warps(ROWS))             \
    attention_smallhead_backward_dkdv_##D##_##ROWS##_##T(                                          \
        const T *__restrict__ q, const T *__restrict__ k, const T *__restrict__ v,                 \
        const uint32_t *__restrict__ first_key, const float *__restrict__ lse,                     \
        const float *__restrict__ delta, const T *__restrict__ dout, T *__restrict__ dk,           \
        T *__restrict__ dv, int batch, int seq_len, int heads, int kv_heads) {                     \
        backward_dkdv<D, ROWS>(q, k, v, first_key, lse, delta, dout, dk, dv,                       \
                             {batch, seq_len, heads, kv_heads, D});                                \
    }

#define ENTRIES(T)                                                                                 \
    FORWARD(2, 4, T)                                                                               \
    FORWARD(4, 4, T)                                                                               \
    FORWARD(8, 4, T)                                                                               \
    FORWARD(2, 1, T)                                                                               \
    FORWARD(4, 1, T)                                                                               \
    FORWARD(8, 1, T)                                                                               \
    BACKWARD(2, 4, T)                                                                              \
    BACKWARD(4, 4, T)                                                                              \
    BACKWARD(8, 2, T)                                                                              \
    BACKWARD(2, 1, T)                                                                              \
    BACKWARD(4, 1, T)                                                                              \
    BACKWARD(8, 1, T)

ENTRIES(f32)
ENTRIES(bf16)
ENTRIES(f16)
