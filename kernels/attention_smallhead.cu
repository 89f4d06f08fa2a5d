// Causal attention for heads of 2, 4 and 8 components; formulas and shapes as in attention_generic.cu. A
// tensor core would multiply mostly padding here: the arithmetic is f32, on the ordinary cores.
//
// A warp works alone. A lane owns ROWS rows, 32 apart; the opposite rows come in tiles of 32, one
// loaded by each lane while the tile before is worked on, and are read back from shared memory by
// all lanes at once. Exponentials are of base 2, with log2(e) / sqrt(head_dim) folded into q (or k),
// and the shift by the highest score or the log-sum-exp is the first summand of the dot product. A
// pair takes, at head_dim D:
//
//     forward          D fma, ex2, add, D fma                           2 D + 2 instructions
//     back to q        D fma, ex2, D fma, mul, D fma                    3 D + 2
//     back to k and v  D fma, ex2, D fma, D fma, mul, D fma             4 D + 2
//
// and its share of the loads, D / 2 / ROWS or a little more. Bytes as in attention_generic.cu.
//
// The shift need not be the highest score of all, only near it, f32 being as exact at 2^60 as at 1. So
// a whole tile is added without a look for its highest score, if |q| max |k| tells that no exponent
// can pass LIMIT; else, and where a row sees its first key or its last, the tile is gone through
// twice, with care.
//
// Launch: see each entry. Pointers are aligned to 32 bytes.
#include "lib/attention.cuh"
#include "lib/ptx.cuh"
#include "lib/reduce.cuh"
#include "lib/vector.cuh"

constexpr unsigned ALL = 0xffffffffu;
constexpr int WARPS = 4;
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
constexpr float LIMIT = 64.0f;

// Blocks that are to find registers on one multiprocessor: 128, 96 or 168 of them a thread.
constexpr int blocks(int head_dim, int rows) {
    return rows == 1 ? 4 : head_dim == 2 ? 5 : 3;
}

template <int D>
__device__ constexpr float root() {
    return D == 2 ? 0.7071067811865476f : D == 4 ? 0.5f : 0.3535533905932738f;
}

template <int D>
__device__ inline float dot(float start, const float *a, const float *b) {
#pragma unroll
    for (int c = 0; c < D; c++) start = fmaf(a[c], b[c], start);
    return start;
}

template <int D>
__device__ inline void add_scaled(float (&sum)[D], float scale, const float *x) {
#pragma unroll
    for (int c = 0; c < D; c++) sum[c] = fmaf(scale, x[c], sum[c]);
}

// Two rows of an opposite tile: k and v, or q and dout.
template <int D>
struct alignas(16) Pair {
    float at[2 * D];
};

// Calls step(std::integral_constant-like index) for FROM..TO, each its own code.
template <int I>
struct Index {
    static constexpr int value = I;
    __device__ constexpr operator int() const { return I; }
};

template <int FROM, int TO, typename Step>
__device__ __forceinline__ void each_index(Step step) {
    if constexpr (FROM < TO) {
        step(Index<FROM>());
        each_index<FROM + 1, TO>(step);
    }
}

// The query rows of a lane, first + lane + 32 r, and what they see.
template <int D, int ROWS>
struct Queries {
    float q[ROWS][D];
    int from[ROWS];
    int first;

    // Rows past the context are zero, and see all: they force no mask.
    template <typename T>
    __device__ void load_rows(const T *rows, const uint32_t *first_key, int first_row, int context) {
        first = first_row;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int row = column(r);
            const bool there = row < context;
            from[r] = there ? first_seen(first_key, row) : 0;
            float values[D] = {};
            if (there) load(values, rows + static_cast<size_t>(row) * D);
#pragma unroll
            for (int c = 0; c < D; c++) q[r][c] = values[c] * (root<D>() * LOG2E);
        }
    }
    __device__ int column(int r) const { return first + 32 * r + threadIdx.x % WARP; }
    __device__ bool sees(int r, int key) const { return from[r] <= key && key <= column(r); }
    // The first column that any row of the warp sees.
    __device__ int first_column() const {
        int least = from[0];
#pragma unroll
        for (int r = 1; r < ROWS; r++) least = min(least, from[r]);
        return __reduce_min_sync(ALL, least);
    }
    // The column from which on all of them see.
    __device__ int last_first() const {
        int most = from[0];
#pragma unroll
        for (int r = 1; r < ROWS; r++) most = max(most, from[r]);
        return __reduce_max_sync(ALL, most);
    }
};

template <int D, int ROWS>
struct Forward : Queries<D, ROWS> {
    float norm[ROWS], shift[ROWS], sum[ROWS], out[ROWS][D];

    __device__ void start() {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            norm[r] = sqrtf(dot<D>(0.0f, this->q[r], this->q[r]));
            shift[r] = -INFINITY;
            sum[r] = 0.0f;
#pragma unroll
            for (int c = 0; c < D; c++) out[r][c] = 0.0f;
        }
    }

    // Whether rows FROM.. may add keys no longer than `longest` with the shift they have. A row that
    // saw nothing yet has none: the tile in which it sees its first key is gone through with care.
    template <int FROM>
    __device__ bool is_safe(float longest) const {
        bool safe = true;
#pragma unroll
        for (int r = FROM; r < ROWS; r++) safe &= norm[r] * longest - shift[r] <= LIMIT;
        return __all_sync(ALL, safe);
    }

    // A tile that all of the rows FROM.. see whole.
    template <int FROM>
    __device__ void add(const Pair<D> *tile) {
#pragma unroll 4
        for (int j = 0; j < WARP; j++) {
            const Pair<D> pair = tile[j];
#pragma unroll
            for (int r = FROM; r < ROWS; r++) {
                const float p = exp2_approx(dot<D>(-shift[r], this->q[r], pair.at));
                sum[r] += p;
                add_scaled<D>(out[r], p, pair.at + D);
            }
        }
    }

    // A tile that the rows FROM..TO may see in part, or whose scores may be higher than any before.
    template <int FROM, int TO>
    __device__ void add_with_care(const Pair<D> *tile, int first_key) {
        float top[ROWS];
#pragma unroll
        for (int r = FROM; r < TO; r++) top[r] = shift[r];
#pragma unroll 2
        for (int j = 0; j < WARP; j++) {
            const Pair<D> pair = tile[j];
#pragma unroll
            for (int r = FROM; r < TO; r++) {
                const float score = dot<D>(0.0f, this->q[r], pair.at);
                if (this->sees(r, first_key + j)) top[r] = fmaxf(top[r], score);
            }
        }
#pragma unroll
        for (int r = FROM; r < TO; r++) {
            // While nothing was seen, -inf less -inf must not be taken.
            const float shrink = top[r] == -INFINITY ? 0.0f : exp2_approx(shift[r] - top[r]);
            shift[r] = top[r];
            sum[r] *= shrink;
#pragma unroll
            for (int c = 0; c < D; c++) out[r][c] *= shrink;
        }
#pragma unroll 2
        for (int j = 0; j < WARP; j++) {
            const Pair<D> pair = tile[j];
#pragma unroll
            for (int r = FROM; r < TO; r++) {
                const float p = exp2_approx(dot<D>(-shift[r], this->q[r], pair.at));
                if (this->sees(r, first_key + j)) {
                    sum[r] += p;
                    add_scaled<D>(out[r], p, pair.at + D);
                }
            }
        }
    }
};

// Rows of a tile on their way to shared memory.
template <typename T, int D>
struct Ahead {
    float at[2 * D];

    __device__ void fetch(const T *a, const T *b, bool there) {
        float first[D] = {}, second[D] = {};
        if (there) {
            load(first, a);
            load(second, b);
        }
#pragma unroll
        for (int c = 0; c < D; c++) {
            at[c] = first[c];
            at[D + c] = second[c];
        }
    }
    // All lanes have left the tile before, and see this one, when it returns.
    __device__ void put(Pair<D> *tile) const {
        __syncwarp();
        Pair<D> pair;
#pragma unroll
        for (int c = 0; c < 2 * D; c++) pair.at[c] = at[c];
        tile[threadIdx.x % WARP] = pair;
        __syncwarp();
    }
};

template <int D, int ROWS, typename T>
__device__ void forward(const T *q, const T *k, const T *v, const uint32_t *first_key, T *out,
                        float *lse, const Heads shape) {
    constexpr int CHUNK = WARP * ROWS;
    __shared__ Pair<D> tiles[WARPS][WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    Pair<D> *tile = tiles[warp];
    const int chunks = (shape.context + CHUNK - 1) / CHUNK, heads = shape.windows * shape.heads;
    for (int task = blockIdx.x * WARPS + warp; task < chunks * heads; task += gridDim.x * WARPS) {
        // The longest rows first; neighbours share keys.
        const int first = (chunks - 1 - task / heads) * CHUNK, head = task % heads;
        const size_t row = shape.row(head, 0), key_row = shape.key_row(head);
        Forward<D, ROWS> rows;
        rows.load_rows(q + row * D, first_key + shape.window(head) * shape.context, first,
                       shape.context);
        rows.start();
        const int begin = rows.first_column() / WARP * WARP;
        const int end = min(first + CHUNK, shape.context);

        Ahead<T, D> ahead;
        const auto fetch = [&](int column) {
            const size_t at = (key_row + column + lane) * D;
            ahead.fetch(k + at, v + at, column + lane < shape.context);
        };
        fetch(begin);
        for (int at = begin; at < end; at += WARP) {
            const float longest = warp_max(sqrtf(dot<D>(0.0f, ahead.at, ahead.at)));
            ahead.put(tile);
            if (at + WARP < end) fetch(at + WARP);
            if (at < first) {
                if (rows.template is_safe<0>(longest)) {
                    rows.template add<0>(tile);
                } else {
                    rows.template add_with_care<0, ROWS>(tile, at);
                }
                continue;
            }
            // On the diagonal of one set of rows; those before see none of it, those behind all.
            each_index<0, ROWS>([&](auto i) {
                if (at != first + WARP * i) return;
                rows.template add_with_care<i, i + 1>(tile, at);
                if constexpr (i + 1 < ROWS) {
                    if (rows.template is_safe<i + 1>(longest)) {
                        rows.template add<i + 1>(tile);
                    } else {
                        rows.template add_with_care<i + 1, ROWS>(tile, at);
                    }
                }
            });
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int column = rows.column(r);
            if (column >= shape.context) continue;
            const bool any = rows.sum[r] > 0.0f;
            const float inverse = any ? 1.0f / rows.sum[r] : 0.0f;
            float values[D];
#pragma unroll
            for (int c = 0; c < D; c++) values[c] = rows.out[r][c] * inverse;
            store(out + shape.token_row(head, column) * D, values);
            lse[row + column] = any ? (rows.shift[r] + log2f(rows.sum[r])) * LN2 : 0.0f;
        }
    }
}

template <int D, int ROWS>
struct BackwardQ : Queries<D, ROWS> {
    float dout[ROWS][D], lse[ROWS], delta[ROWS], dq[ROWS][D];

    template <int FROM, int TO, bool MASKED>
    __device__ void add(const Pair<D> *tile, int first_key) {
#pragma unroll 4
        for (int j = 0; j < WARP; j++) {
            const Pair<D> pair = tile[j];
#pragma unroll
            for (int r = FROM; r < TO; r++) {
                float p = exp2_approx(dot<D>(-lse[r], this->q[r], pair.at));
                if (MASKED && !this->sees(r, first_key + j)) p = 0.0f;
                add_scaled<D>(dq[r], p * dot<D>(-delta[r], dout[r], pair.at + D), pair.at);
            }
        }
    }
};

template <int D, int ROWS, typename T>
__device__ void backward_q(const T *q, const T *k, const T *v, const uint32_t *first_key,
                           const float *lse, const float *delta, const T *dout, T *dq,
                           const Heads shape) {
    constexpr int CHUNK = WARP * ROWS;
    __shared__ Pair<D> tiles[WARPS][WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    Pair<D> *tile = tiles[warp];
    const int chunks = (shape.context + CHUNK - 1) / CHUNK, heads = shape.windows * shape.heads;
    for (int task = blockIdx.x * WARPS + warp; task < chunks * heads; task += gridDim.x * WARPS) {
        const int first = (chunks - 1 - task / heads) * CHUNK, head = task % heads;
        const size_t row = shape.row(head, 0), key_row = shape.key_row(head);
        BackwardQ<D, ROWS> rows;
        rows.load_rows(q + row * D, first_key + shape.window(head) * shape.context, first,
                       shape.context);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int column = rows.column(r);
            const bool there = column < shape.context;
            float values[D] = {};
            if (there) load(values, dout + shape.token_row(head, column) * D);
            rows.lse[r] = there ? lse[row + column] * LOG2E : 0.0f;
            rows.delta[r] = there ? delta[row + column] : 0.0f;
#pragma unroll
            for (int c = 0; c < D; c++) {
                rows.dout[r][c] = values[c];
                rows.dq[r][c] = 0.0f;
            }
        }
        const int begin = rows.first_column() / WARP * WARP, masked = rows.last_first();
        const int end = min(first + CHUNK, shape.context);

        Ahead<T, D> ahead;
        const auto fetch = [&](int column) {
            const size_t at = (key_row + column + lane) * D;
            ahead.fetch(k + at, v + at, column + lane < shape.context);
        };
        fetch(begin);
        for (int at = begin; at < end; at += WARP) {
            ahead.put(tile);
            if (at + WARP < end) fetch(at + WARP);
            if (masked > at) {
                rows.template add<0, ROWS, true>(tile, at);
                continue;
            }
            if (at < first) {
                rows.template add<0, ROWS, false>(tile, at);
                continue;
            }
            each_index<0, ROWS>([&](auto i) {
                if (at != first + WARP * i) return;
                rows.template add<i, i + 1, true>(tile, at);
                rows.template add<i + 1, ROWS, false>(tile, at);
            });
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int column = rows.column(r);
            if (column >= shape.context) continue;
            float values[D];
#pragma unroll
            for (int c = 0; c < D; c++) values[c] = rows.dq[r][c] * root<D>();
            store(dq + (row + column) * D, values);
        }
    }
}

// What the way back needs of a query, beside q and dout.
struct alignas(16) Statistics {
    float lse, delta;
    int from;
};

// The keys of a lane, first + lane + 32 r.
template <int D, int ROWS>
struct BackwardKV {
    float k[ROWS][D], v[ROWS][D], dk[ROWS][D], dv[ROWS][D];
    int first;

    __device__ int column(int r) const { return first + 32 * r + threadIdx.x % WARP; }

    template <int FROM, int TO, bool MASKED>
    __device__ void add(const Pair<D> *tile, const Statistics *statistics, int first_query) {
#pragma unroll 4
        for (int j = 0; j < WARP; j++) {
            const Pair<D> pair = tile[j];
            const float lse = statistics[j].lse, delta = statistics[j].delta;
#pragma unroll
            for (int r = FROM; r < TO; r++) {
                float p = exp2_approx(dot<D>(-lse, k[r], pair.at));
                if (MASKED && !(statistics[j].from <= column(r) && column(r) <= first_query + j)) {
                    p = 0.0f;
                }
                add_scaled<D>(dv[r], p, pair.at + D);
                add_scaled<D>(dk[r], p * dot<D>(-delta, v[r], pair.at + D), pair.at);
            }
        }
    }
};

// Warps of a block.
__host__ __device__ constexpr int most_warps(int rows) { return rows == 1 ? 8 : 4; }

// A block takes one run of keys; its warps share out the query heads, and are added in their order.
template <int D, int ROWS, typename T>
__device__ void backward_kv(const T *q, const T *k, const T *v, const uint32_t *first_key,
                            const float *lse, const float *delta, const T *dout, T *dk, T *dv,
                            const Heads shape) {
    constexpr int CHUNK = WARP * ROWS, MOST = most_warps(ROWS);
    __shared__ Pair<D> tiles[MOST][WARP];
    __shared__ Statistics all_statistics[MOST][WARP];
    // dk and dv, components outermost: neighbouring lanes on neighbouring words.
    __shared__ float sums[2 * ROWS * D][WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    Pair<D> *tile = tiles[warp];
    Statistics *statistics = all_statistics[warp];
    const int chunks = (shape.context + CHUNK - 1) / CHUNK;
    const int kv_heads = shape.windows * shape.kv_heads;
    for (int task = blockIdx.x; task < chunks * kv_heads; task += gridDim.x) {
        const int kv_head = task % kv_heads, first = task / kv_heads * CHUNK;
        const size_t key_row = static_cast<size_t>(kv_head) * shape.context;
        BackwardKV<D, ROWS> rows;
        rows.first = first;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int column = rows.column(r);
            float key[D] = {}, value[D] = {};
            if (column < shape.context) {
                load(key, k + (key_row + column) * D);
                load(value, v + (key_row + column) * D);
            }
#pragma unroll
            for (int c = 0; c < D; c++) {
                rows.k[r][c] = key[c] * (root<D>() * LOG2E);
                rows.v[r][c] = value[c];
                rows.dk[r][c] = rows.dv[r][c] = 0.0f;
            }
        }
        for (int shared = warp; shared < shape.group(); shared += warps) {
            const int head = kv_head * shape.group() + shared;
            const size_t row = shape.row(head, 0);
            const uint32_t *firsts = first_key + shape.window(head) * shape.context;
            Ahead<T, D> ahead;
            Statistics next;
            // Queries past the context are zero: whatever their p, they add nothing.
            const auto fetch = [&](int tile_column) {
                const int column = tile_column + lane;
                const bool there = column < shape.context;
                ahead.fetch(q + (row + column) * D, dout + shape.token_row(head, column) * D, there);
                next.lse = there ? lse[row + column] * LOG2E : 0.0f;
                next.delta = there ? delta[row + column] : 0.0f;
                next.from = there ? first_seen(firsts, column) : 0;
            };
            fetch(first);
            for (int at = first; at < shape.context; at += WARP) {
                const bool masked = __any_sync(ALL, next.from > first);
                const bool none = __all_sync(ALL, next.from >= first + CHUNK);
                ahead.put(tile);
                statistics[lane] = next;
                __syncwarp();
                if (at + WARP < shape.context) fetch(at + WARP);
                if (none) continue;
                if (masked) {
                    rows.template add<0, ROWS, true>(tile, statistics, at);
                    continue;
                }
                if (at >= first + CHUNK) {
                    rows.template add<0, ROWS, false>(tile, statistics, at);
                    continue;
                }
                each_index<0, ROWS>([&](auto i) {
                    if (at != first + WARP * i) return;
                    rows.template add<0, i, false>(tile, statistics, at);
                    rows.template add<i, i + 1, true>(tile, statistics, at);
                });
            }
        }
        for (int turn = 0; turn < warps; turn++) {
            if (turn == warp) {
#pragma unroll
                for (int i = 0; i < ROWS * D; i++) {
                    const float key = rows.dk[i / D][i % D], value = rows.dv[i / D][i % D];
                    sums[i][lane] = turn == 0 ? key : sums[i][lane] + key;
                    sums[ROWS * D + i][lane] = turn == 0 ? value : sums[ROWS * D + i][lane] + value;
                }
            }
            __syncthreads();
        }
        for (int r = warp; r < ROWS; r += warps) {
            const int column = rows.column(r);
            if (column >= shape.context) continue;
            float key[D], value[D];
#pragma unroll
            for (int c = 0; c < D; c++) {
                key[c] = sums[r * D + c][lane] * root<D>();
                value[c] = sums[(ROWS + r) * D + c][lane];
            }
            store(dk + (key_row + column) * D, key);
            store(dv + (key_row + column) * D, value);
        }
        // The next task's sums must not overwrite what a slower warp still reads.
        __syncthreads();
    }
}

// Entries are named for head_dim and rows a lane: 4 rows, or 2, make the most of a load, 1 makes the
// most warps where there are few rows in all. Launch of forward and back to q: blocks of 128
// threads, a grid along x of any size; a warp for every 32 ROWS rows of a head is best. Of back to k
// and v: blocks of one to four warps, of one row a lane to eight, best as many as query heads share
// a key/value head; a block for every 32 ROWS rows of a key/value head.

#define FORWARD(D, ROWS, T)                                                                        \
    extern "C" __global__ void __launch_bounds__(128, blocks(D, ROWS))                             \
    attention_smallhead_##D##_##ROWS##_##T(                                                           \
        const T *__restrict__ q, const T *__restrict__ k, const T *__restrict__ v,                 \
        const uint32_t *__restrict__ first_key, T *__restrict__ out, float *__restrict__ lse,      \
        int windows, int context, int heads, int kv_heads) {                                       \
        forward<D, ROWS>(q, k, v, first_key, out, lse, {windows, context, heads, kv_heads, D});    \
    }

#define BACKWARD(D, ROWS, T)                                                                       \
    extern "C" __global__ void __launch_bounds__(128, blocks(D, ROWS))                             \
    attention_smallhead_backward_dq_##D##_##ROWS##_##T(                                                \
        const T *__restrict__ q, const T *__restrict__ k, const T *__restrict__ v,                 \
        const uint32_t *__restrict__ first_key, const float *__restrict__ lse,                     \
        const float *__restrict__ delta, const T *__restrict__ dout, T *__restrict__ dq,           \
        int windows, int context, int heads, int kv_heads) {                                       \
        backward_q<D, ROWS>(q, k, v, first_key, lse, delta, dout, dq,                              \
                            {windows, context, heads, kv_heads, D});                               \
    }                                                                                              \
    extern "C" __global__ void                                                                     \
    __launch_bounds__(32 * most_warps(ROWS), blocks(D, ROWS) * 4 / most_warps(ROWS))               \
    attention_smallhead_backward_dkdv_##D##_##ROWS##_##T(                                               \
        const T *__restrict__ q, const T *__restrict__ k, const T *__restrict__ v,                 \
        const uint32_t *__restrict__ first_key, const float *__restrict__ lse,                     \
        const float *__restrict__ delta, const T *__restrict__ dout, T *__restrict__ dk,           \
        T *__restrict__ dv, int windows, int context, int heads, int kv_heads) {                   \
        backward_kv<D, ROWS>(q, k, v, first_key, lse, delta, dout, dk, dv,                         \
                             {windows, context, heads, kv_heads, D});                              \
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
