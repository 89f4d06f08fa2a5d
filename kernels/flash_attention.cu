// Causal attention on tensor cores, for heads of 16, 32, 64, 96 and 128 components in two-byte
// types; formulas and shapes as in attention_generic.cu, tiling as in Dao 2023 (FlashAttention-2).
//
// A block of four warps owns a run of rows and streams tiles of opposite rows through two stages of
// shared memory, filled by asynchronous copies. Each warp owns 16 or 32 of the rows, and no sum
// leaves it: products are m16n8k16 with f32 sums; what one product yields (p, ds) goes into the next
// as an operand straight from registers, rounded to T. Forward and the pass of dq own query rows; the
// pass of dk and dv owns keys and works with the scores on their side. Tiles that no row of the
// block sees are not loaded; a warp leaves out those that none of its own rows sees, and masks those
// that are seen in part.
//
// Rows of a tile lie 2 D + 16 bytes apart, so that the eight rows of a matrix load meet no bank
// conflict. Rows past the context are zero.
//
// FLOPs of tensor cores a pair: 4 D forward, 6 D back to q, 8 D back to k and v (s and dp are
// computed twice, that no sum needs atomics); one exp a pair in each. Bytes as in attention_generic.cu, the
// opposite rows once for every block.
#include "lib/attention.cuh"
#include "lib/ptx.cuh"
#include "lib/reduce.cuh"
#include "lib/vector.cuh"

constexpr unsigned ALL = 0xffffffffu;
constexpr int WARPS = 4, THREADS = WARPS * WARP, STAGES = 2;
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

// Blocks of 16 rows a warp owns, opposite rows of a tile, and blocks that are to find registers on
// one multiprocessor. A block of rows more a warp halves what a product reads from shared memory; what
// it costs is registers. The launch code knows this table too.
struct Tiling {
    int own, tile, blocks;
};
enum Pass { FORWARD, BACKWARD_Q, BACKWARD_KV };
__host__ __device__ constexpr Tiling tiling(Pass pass, int head_dim) {
    switch (pass) {
        case FORWARD:
            return head_dim <= 32 ? Tiling{2, 32, 3} : Tiling{2, head_dim <= 64 ? 64 : 32, 2};
        case BACKWARD_Q: return head_dim <= 64 ? Tiling{2, 32, 2} : Tiling{1, 32, 2};
        default: return head_dim <= 32 ? Tiling{2, 32, 2} : Tiling{1, 32, 2};
    }
}

// ROWS rows of D components in shared memory.
template <int D, int ROWS>
struct Rows {
    static constexpr int STRIDE = 2 * D + 16, BYTES = ROWS * STRIDE;
    uint32_t at;

    // Starts to copy rows that lie `pitch` apart; those from `there` on become zero.
    template <typename T>
    __device__ void copy(const T *from, size_t pitch, int there) const {
        constexpr int PIECES = D / 8, STEP = THREADS / PIECES;
        const int first = threadIdx.x / PIECES, piece = threadIdx.x % PIECES;
        // At 12 pieces a row some threads are left over.
        if (first >= STEP) return;
#pragma unroll 4
        for (int i = 0; i < (ROWS + STEP - 1) / STEP; i++) {
            const int row = first + i * STEP;
            if (ROWS % STEP != 0 && row >= ROWS) break;
            const bool some = row < there;
            copy_async(at + row * STRIDE + piece * 16, from + (some ? row : 0) * pitch + piece * 8,
                       some ? 16 : 0);
        }
    }
    // Rows row.. + 16 and components 16 k.. + 16, as the left operand.
    __device__ void left(uint32_t (&a)[4], int row, int k) const {
        const int lane = threadIdx.x % WARP;
        load_matrices(a, at + (row + lane % 16) * STRIDE + (2 * k + lane / 16) * 16);
    }
    // The same as the right operand of two products whose columns are these rows.
    __device__ void right(uint32_t (&b)[4], int row, int k) const {
        const int lane = threadIdx.x % WARP;
        load_matrices(b, at + (row + lane % 8 + lane / 16 * 8) * STRIDE +
                             (2 * k + lane / 8 % 2) * 16);
    }
    // The same as the right operand of two products whose columns are these components.
    __device__ void right_turned(uint32_t (&b)[4], int row, int k) const {
        const int lane = threadIdx.x % WARP;
        load_matrices_transposed(b, at + (row + lane % 16) * STRIDE + (2 * k + lane / 16) * 16);
    }
};

// What products of a warp's OWN blocks of 16 rows yield: sums[m][n] is 16 by 8. A lane holds the rows
// lane / 4 and lane / 4 + 8 of each, and of them the columns 2 (lane % 4) and the next.
template <int OWN, int COLUMNS>
struct Sums {
    float at[OWN][COLUMNS / 8][4];

    __device__ void clear() {
#pragma unroll
        for (int m = 0; m < OWN; m++) {
#pragma unroll
            for (int n = 0; n < COLUMNS / 8; n++) {
#pragma unroll
                for (int e = 0; e < 4; e++) at[m][n][e] = 0.0f;
            }
        }
    }
    // Columns 16 k.. + 16 of a block of rows, rounded, as the left operand of the next product.
    template <typename T>
    __device__ void left(uint32_t (&a)[4], int m, int k) const {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float(&part)[4] = at[m][2 * k + i / 2];
            a[i] = pack<T>(part[i % 2 * 2], part[i % 2 * 2 + 1]);
        }
    }
};

// sums = own rows times opposite rows; the own ones from shared memory.
template <typename T, int D, int OWN, int TILE, int ROWS>
__device__ inline void dots(Sums<OWN, TILE> &sums, Rows<D, ROWS> own, int row, Rows<D, TILE> tile) {
    sums.clear();
    // More at once would need more registers than there are.
#pragma unroll 4
    for (int k = 0; k < D / 16; k++) {
        uint32_t a[OWN][4];
#pragma unroll
        for (int m = 0; m < OWN; m++) own.left(a[m], row + 16 * m, k);
#pragma unroll
        for (int n = 0; n < TILE / 16; n++) {
            uint32_t b[4];
            tile.right(b, 16 * n, k);
#pragma unroll
            for (int m = 0; m < OWN; m++) {
                multiply_add<T>(sums.at[m][2 * n], a[m], b[0], b[1]);
                multiply_add<T>(sums.at[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// sums += weights times opposite rows.
template <typename T, int D, int OWN, int TILE>
__device__ inline void add_weighted(Sums<OWN, D> &sums, const Sums<OWN, TILE> &weights,
                                    Rows<D, TILE> tile) {
#pragma unroll
    for (int k = 0; k < TILE / 16; k++) {
        uint32_t a[OWN][4];
#pragma unroll
        for (int m = 0; m < OWN; m++) weights.template left<T>(a[m], m, k);
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            uint32_t b[4];
            tile.right_turned(b, 16 * k, n);
#pragma unroll
            for (int m = 0; m < OWN; m++) {
                multiply_add<T>(sums.at[m][2 * n], a[m], b[0], b[1]);
                multiply_add<T>(sums.at[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// Stores a warp's rows, scaled; `to` is the first of them, `there` how many exist.
template <typename T, int D, int OWN>
__device__ inline void store_sums(T *to, size_t pitch, const Sums<OWN, D> &sums,
                                  const float (&scale)[OWN][2], int there) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int m = 0; m < OWN; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = 16 * m + 8 * half + lane / 4;
            if (row >= there) continue;
            T *line = to + row * pitch + lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                const float *pair = sums.at[m][n] + 2 * half;
                *reinterpret_cast<uint32_t *>(line + 8 * n) =
                    pack<T>(pair[0] * scale[m][half], pair[1] * scale[m][half]);
            }
        }
    }
}

// The least and the greatest first column seen of a run of query rows that are there.
__device__ inline void range_of_firsts(const uint32_t *first_key, int first, int count, int &least,
                                       int &most) {
    least = first + count, most = 0;
    for (int i = threadIdx.x % WARP; i < count; i += WARP) {
        const int seen = first_seen(first_key, first + i);
        least = min(least, seen), most = max(most, seen);
    }
    least = __reduce_min_sync(ALL, least);
    most = __reduce_max_sync(ALL, most);
}

// Scores of what the rows of a lane do not see become -inf. `first_row` is the first of them, `tile`
// the first column.
template <int OWN, int TILE>
__device__ inline void mask(Sums<OWN, TILE> &scores, const uint32_t *first_key, int first_row,
                            int tile, int context) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int i = 0; i < 2 * OWN; i++) {
        const int row = first_row + 8 * i;
        const int from = row < context ? first_seen(first_key, row) : 0;
#pragma unroll
        for (int j = 0; j < TILE / 4; j++) {
            const int key = tile + j / 2 * 8 + lane % 4 * 2 + j % 2;
            if (key < from || row < key) scores.at[i / 2][j / 2][i % 2 * 2 + j % 2] = -INFINITY;
        }
    }
}

template <int D, typename T>
__device__ void forward(const T *q, const T *k, const T *v, const uint32_t *first_key, T *out,
                        float *lse, const Heads shape) {
    constexpr Tiling TILING = tiling(FORWARD, D);
    constexpr int OWN = TILING.own, TILE = TILING.tile, CHUNK = WARPS * OWN * 16;
    extern __shared__ __align__(16) uint8_t memory[];
    const uint32_t base = shared_address(memory);
    const Rows<D, CHUNK> queries{base};
    const auto keys = [&](int stage) {
        return Rows<D, TILE>{base + queries.BYTES + 2 * stage * Rows<D, TILE>::BYTES};
    };
    const auto values = [&](int stage) { return Rows<D, TILE>{keys(stage).at + keys(stage).BYTES}; };
    const float scale = LOG2E / sqrtf(D);
    const int lane = threadIdx.x % WARP, own_row = threadIdx.x / WARP * OWN * 16;
    const int chunks = (shape.context + CHUNK - 1) / CHUNK, heads = shape.windows * shape.heads;
    for (int task = blockIdx.x; task < chunks * heads; task += gridDim.x) {
        // The longest rows first; neighbours share keys.
        const int first = (chunks - 1 - task / heads) * CHUNK, head = task % heads;
        const int there = min(CHUNK, shape.context - first);
        const size_t row = shape.row(head, first), key_row = shape.key_row(head);
        const uint32_t *firsts = first_key + shape.window(head) * shape.context;
        int begin, masked;
        range_of_firsts(firsts, first, there, begin, masked);
        begin = begin / TILE * TILE;
        const int end = first + there;

        // The task before may still be reading.
        __syncthreads();
        const auto fetch = [&](int column) {
            const int stage = column / TILE % STAGES;
            const size_t at = (key_row + column) * D;
            keys(stage).copy(k + at, D, shape.context - column);
            values(stage).copy(v + at, D, shape.context - column);
            commit_copies();
        };
        queries.copy(q + row * D, D, there);
        if (begin < end) fetch(begin);

        // The first row of this lane; the others lie 8, 16 and 24 behind it.
        const int first_column = first + own_row + lane / 4;
        float top[OWN][2], sum[OWN][2];
        Sums<OWN, D> sums;
        sums.clear();
#pragma unroll
        for (int m = 0; m < OWN; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                top[m][half] = -INFINITY;
                sum[m][half] = 0.0f;
            }
        }
        for (int tile = begin; tile < end; tile += TILE) {
            const int stage = tile / TILE % STAGES;
            if (tile + TILE < end) {
                fetch(tile + TILE);
                wait_for_copies<1>();
            } else {
                wait_for_copies<0>();
            }
            __syncthreads();
            // Beyond this warp's rows the others may still have work.
            if (tile < first + own_row + 16 * OWN) {
                Sums<OWN, TILE> p;
                dots<T>(p, queries, own_row, keys(stage));
                if (masked > tile || tile + TILE - 1 > first + own_row) {
                    mask(p, firsts, first_column, tile, shape.context);
                }
                bool moved = false;
                float higher[OWN][2];
#pragma unroll
                for (int m = 0; m < OWN; m++) {
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        float highest = top[m][half];
#pragma unroll
                        for (int i = 0; i < TILE / 4; i++) {
                            highest = fmaxf(highest, p.at[m][i / 2][2 * half + i % 2]);
                        }
                        // Four lanes share a row.
                        highest = fmaxf(highest, __shfl_xor_sync(ALL, highest, 1));
                        highest = fmaxf(highest, __shfl_xor_sync(ALL, highest, 2));
                        higher[m][half] = highest;
                        moved |= highest > top[m][half];
                    }
                }
                // Seldom so after the first tiles.
                if (__any_sync(ALL, moved)) {
#pragma unroll
                    for (int m = 0; m < OWN; m++) {
#pragma unroll
                        for (int half = 0; half < 2; half++) {
                            // While nothing was seen, -inf less -inf must not be taken.
                            const float shrink =
                                top[m][half] == -INFINITY
                                    ? 0.0f
                                    : exp2_approx((top[m][half] - higher[m][half]) * scale);
                            top[m][half] = higher[m][half];
                            sum[m][half] *= shrink;
#pragma unroll
                            for (int n = 0; n < D / 8; n++) {
                                sums.at[m][n][2 * half] *= shrink;
                                sums.at[m][n][2 * half + 1] *= shrink;
                            }
                        }
                    }
                }
#pragma unroll
                for (int m = 0; m < OWN; m++) {
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const float shift = top[m][half] == -INFINITY ? 0.0f : top[m][half] * scale;
#pragma unroll
                        for (int i = 0; i < TILE / 4; i++) {
                            float &score = p.at[m][i / 2][2 * half + i % 2];
                            score = exp2_approx(fmaf(score, scale, -shift));
                            sum[m][half] += score;
                        }
                    }
                }
                add_weighted<T>(sums, p, values(stage));
            }
            // The stage is free only when all have read it.
            __syncthreads();
        }
        // Of the queries, where there was no tile to wait for.
        wait_for_copies<0>();
#pragma unroll
        for (int m = 0; m < OWN; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float all = sum[m][half];
                all += __shfl_xor_sync(ALL, all, 1);
                all += __shfl_xor_sync(ALL, all, 2);
                const bool any = all > 0.0f;
                sum[m][half] = any ? 1.0f / all : 0.0f;
                const int column = first_column + 16 * m + 8 * half;
                if (lane % 4 == 0 && column < shape.context) {
                    lse[row - first + column] =
                        any ? fmaf(top[m][half], scale, log2f(all)) * LN2 : 0.0f;
                }
            }
        }
        store_sums<T>(out + shape.token_row(head, first + own_row) * D,
                      static_cast<size_t>(shape.heads) * D, sums, sum, there - own_row);
    }
}

template <int D, typename T>
__device__ void backward_q(const T *q, const T *k, const T *v, const uint32_t *first_key,
                           const float *lse, const float *delta, const T *dout, T *dq,
                           const Heads shape) {
    constexpr Tiling TILING = tiling(BACKWARD_Q, D);
    constexpr int OWN = TILING.own, TILE = TILING.tile, CHUNK = WARPS * OWN * 16;
    extern __shared__ __align__(16) uint8_t memory[];
    const uint32_t base = shared_address(memory);
    const Rows<D, CHUNK> queries{base}, douts{base + queries.BYTES};
    const auto keys = [&](int stage) {
        return Rows<D, TILE>{base + 2 * queries.BYTES + 2 * stage * Rows<D, TILE>::BYTES};
    };
    const auto values = [&](int stage) { return Rows<D, TILE>{keys(stage).at + keys(stage).BYTES}; };
    const float scale = LOG2E / sqrtf(D);
    const size_t pitch = static_cast<size_t>(shape.heads) * D;
    const int lane = threadIdx.x % WARP, own_row = threadIdx.x / WARP * OWN * 16;
    const int chunks = (shape.context + CHUNK - 1) / CHUNK, heads = shape.windows * shape.heads;
    for (int task = blockIdx.x; task < chunks * heads; task += gridDim.x) {
        const int first = (chunks - 1 - task / heads) * CHUNK, head = task % heads;
        const int there = min(CHUNK, shape.context - first);
        const size_t row = shape.row(head, first), key_row = shape.key_row(head);
        const uint32_t *firsts = first_key + shape.window(head) * shape.context;
        int begin, masked;
        range_of_firsts(firsts, first, there, begin, masked);
        begin = begin / TILE * TILE;
        const int end = first + there;

        // The task before may still be reading.
        __syncthreads();
        const auto fetch = [&](int column) {
            const int stage = column / TILE % STAGES;
            const size_t at = (key_row + column) * D;
            keys(stage).copy(k + at, D, shape.context - column);
            values(stage).copy(v + at, D, shape.context - column);
            commit_copies();
        };
        queries.copy(q + row * D, D, there);
        douts.copy(dout + shape.token_row(head, first) * D, pitch, there);
        if (begin < end) fetch(begin);

        // The first row of this lane; the others lie 8, 16 and 24 behind it.
        const int first_column = first + own_row + lane / 4;
        float row_lse[OWN][2], row_delta[OWN][2];
        Sums<OWN, D> sums;
        sums.clear();
#pragma unroll
        for (int m = 0; m < OWN; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int at = own_row + lane / 4 + 16 * m + 8 * half;
                row_lse[m][half] = at < there ? lse[row + at] * LOG2E : 0.0f;
                row_delta[m][half] = at < there ? delta[row + at] : 0.0f;
            }
        }
        for (int tile = begin; tile < end; tile += TILE) {
            const int stage = tile / TILE % STAGES;
            if (tile + TILE < end) {
                fetch(tile + TILE);
                wait_for_copies<1>();
            } else {
                wait_for_copies<0>();
            }
            __syncthreads();
            if (tile < first + own_row + 16 * OWN) {
                Sums<OWN, TILE> p, ds;
                dots<T>(p, queries, own_row, keys(stage));
                dots<T>(ds, douts, own_row, values(stage));
                if (masked > tile || tile + TILE - 1 > first + own_row) {
                    mask(p, firsts, first_column, tile, shape.context);
                }
#pragma unroll
                for (int m = 0; m < OWN; m++) {
#pragma unroll
                    for (int half = 0; half < 2; half++) {
#pragma unroll
                        for (int i = 0; i < TILE / 4; i++) {
                            const float score = p.at[m][i / 2][2 * half + i % 2];
                            float &d = ds.at[m][i / 2][2 * half + i % 2];
                            d = exp2_approx(fmaf(score, scale, -row_lse[m][half])) *
                                (d - row_delta[m][half]);
                        }
                    }
                }
                add_weighted<T>(sums, ds, keys(stage));
            }
            // The stage is free only when all have read it.
            __syncthreads();
        }
        // Of the rows, where there was no tile to wait for.
        wait_for_copies<0>();
        float scales[OWN][2];
#pragma unroll
        for (int m = 0; m < OWN; m++) scales[m][0] = scales[m][1] = scale * LN2;
        store_sums<T>(dq + (row + own_row) * D, D, sums, scales, there - own_row);
    }
}

// What the way back needs of a tile's queries, beside q and dout: arrays, for the lanes read pairs.
template <int TILE>
struct Statistics {
    float lse[TILE], delta[TILE];
    int from[TILE];
};

template <int D, typename T>
__device__ void backward_kv(const T *q, const T *k, const T *v, const uint32_t *first_key,
                            const float *lse, const float *delta, const T *dout, T *dk, T *dv,
                            const Heads shape) {
    constexpr Tiling TILING = tiling(BACKWARD_KV, D);
    constexpr int OWN = TILING.own, TILE = TILING.tile, CHUNK = WARPS * OWN * 16;
    static_assert(TILE <= THREADS);
    extern __shared__ __align__(16) uint8_t memory[];
    const uint32_t base = shared_address(memory);
    const Rows<D, CHUNK> keys{base}, values{base + keys.BYTES};
    const auto queries = [&](int stage) {
        return Rows<D, TILE>{base + 2 * keys.BYTES + 2 * stage * Rows<D, TILE>::BYTES};
    };
    const auto douts = [&](int stage) {
        return Rows<D, TILE>{queries(stage).at + Rows<D, TILE>::BYTES};
    };
    auto *statistics = reinterpret_cast<Statistics<TILE> *>(
        memory + 2 * keys.BYTES + 2 * STAGES * Rows<D, TILE>::BYTES);
    const float scale = LOG2E / sqrtf(D);
    const size_t pitch = static_cast<size_t>(shape.heads) * D;
    const int lane = threadIdx.x % WARP, own_row = threadIdx.x / WARP * OWN * 16;
    const int chunks = (shape.context + CHUNK - 1) / CHUNK;
    const int kv_heads = shape.windows * shape.kv_heads;
    for (int task = blockIdx.x; task < chunks * kv_heads; task += gridDim.x) {
        // The first keys are seen by most queries.
        const int first = task / kv_heads * CHUNK, kv_head = task % kv_heads;
        const int there = min(CHUNK, shape.context - first);
        const size_t key_row = static_cast<size_t>(kv_head) * shape.context + first;
        const size_t window = kv_head / shape.kv_heads;
        const uint32_t *firsts = first_key + window * shape.context;

        // The tiles of all query heads, in their order.
        const int begin = first / TILE, tiles = (shape.context + TILE - 1) / TILE - begin;
        const int steps = tiles * shape.group();
        float next_lse = 0.0f, next_delta = 0.0f;
        int next_from = 0;
        // Queries past the context are zero: whatever their p, they add nothing.
        const auto fetch = [&](int step) {
            const int head = kv_head * shape.group() + step / tiles;
            const int column = (begin + step % tiles) * TILE, left = shape.context - column;
            const size_t row = shape.row(head, column);
            queries(step % STAGES).copy(q + row * D, D, left);
            douts(step % STAGES).copy(dout + shape.token_row(head, column) * D, pitch, left);
            commit_copies();
            const int at = threadIdx.x;
            if (at < TILE) {
                next_lse = at < left ? lse[row + at] * LOG2E : 0.0f;
                next_delta = at < left ? delta[row + at] : 0.0f;
                next_from = at < left ? first_seen(firsts, column + at) : 0;
            }
        };
        const auto put_statistics = [&](int step) {
            if (threadIdx.x >= TILE) return;
            statistics[step % STAGES].lse[threadIdx.x] = next_lse;
            statistics[step % STAGES].delta[threadIdx.x] = next_delta;
            statistics[step % STAGES].from[threadIdx.x] = next_from;
        };
        // The task before may still be reading.
        __syncthreads();
        keys.copy(k + key_row * D, D, there);
        values.copy(v + key_row * D, D, there);
        fetch(0);
        put_statistics(0);

        Sums<OWN, D> dk_sums, dv_sums;
        dk_sums.clear();
        dv_sums.clear();
        for (int step = 0; step < steps; step++) {
            const int stage = step % STAGES, tile = (begin + step % tiles) * TILE;
            if (step + 1 < steps) {
                fetch(step + 1);
                wait_for_copies<1>();
            } else {
                wait_for_copies<0>();
            }
            __syncthreads();
            const Statistics<TILE> &seen = statistics[stage];
            int least = seen.from[lane % TILE], most = least;
            for (int i = lane; i < TILE; i += WARP) {
                least = min(least, seen.from[i]), most = max(most, seen.from[i]);
            }
            const int low = first + own_row, high = low + 16 * OWN - 1;
            const bool none =
                tile + TILE - 1 < low || __reduce_min_sync(ALL, least) > high;
            if (!none) {
                Sums<OWN, TILE> p, ds;
                dots<T>(p, keys, own_row, queries(stage));
                dots<T>(ds, values, own_row, douts(stage));
                if (__reduce_max_sync(ALL, most) > low || tile < high) {
#pragma unroll
                    for (int j = 0; j < TILE / 4; j++) {
                        const int at = j / 2 * 8 + lane % 4 * 2 + j % 2;
#pragma unroll
                        for (int i = 0; i < 2 * OWN; i++) {
                            const int key = low + lane / 4 + 8 * i;
                            if (key < seen.from[at] || tile + at < key) {
                                p.at[i / 2][j / 2][i % 2 * 2 + j % 2] = -INFINITY;
                            }
                        }
                    }
                }
#pragma unroll
                for (int j = 0; j < TILE / 4; j++) {
                    const int at = j / 2 * 8 + lane % 4 * 2 + j % 2;
                    const float row_lse = seen.lse[at], row_delta = seen.delta[at];
#pragma unroll
                    for (int i = 0; i < 2 * OWN; i++) {
                        float &weight = p.at[i / 2][j / 2][i % 2 * 2 + j % 2];
                        float &d = ds.at[i / 2][j / 2][i % 2 * 2 + j % 2];
                        weight = exp2_approx(fmaf(weight, scale, -row_lse));
                        d = weight * (d - row_delta);
                    }
                }
                add_weighted<T>(dv_sums, p, douts(stage));
                add_weighted<T>(dk_sums, ds, queries(stage));
            }
            if (step + 1 < steps) put_statistics(step + 1);
            // The stage is free only when all have read it.
            __syncthreads();
        }
        float ones[OWN][2], scales[OWN][2];
#pragma unroll
        for (int m = 0; m < OWN; m++) {
            ones[m][0] = ones[m][1] = 1.0f;
            scales[m][0] = scales[m][1] = scale * LN2;
        }
        store_sums<T>(dv + (key_row + own_row) * D, D, dv_sums, ones, there - own_row);
        store_sums<T>(dk + (key_row + own_row) * D, D, dk_sums, scales, there - own_row);
    }
}

// Launch: blocks of 128 threads, a grid along x of any size; one block for every 64 rows of a head
// (of a key/value head for dk and dv), or 128 where a warp owns two blocks of rows, is best. Dynamic
// shared memory in bytes, with C own rows a block and a tile of R rows, at 2 D + 16 each:
// C + 4 R rows forward, 2 C + 4 R back, and 24 R more for the pass of dk and dv.
#define ENTRIES(D, T)                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS, tiling(FORWARD, D).blocks)               \
    flash_attention_##D##_##T(                                                                       \
        const T *__restrict__ q, const T *__restrict__ k, const T *__restrict__ v,                 \
        const uint32_t *__restrict__ first_key, T *__restrict__ out, float *__restrict__ lse,      \
        int windows, int context, int heads, int kv_heads) {                                       \
        forward<D>(q, k, v, first_key, out, lse, {windows, context, heads, kv_heads, D});          \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS, tiling(BACKWARD_Q, D).blocks)            \
    flash_attention_backward_dq_##D##_##T(                                                            \
        const T *__restrict__ q, const T *__restrict__ k, const T *__restrict__ v,                 \
        const uint32_t *__restrict__ first_key, const float *__restrict__ lse,                     \
        const float *__restrict__ delta, const T *__restrict__ dout, T *__restrict__ dq,           \
        int windows, int context, int heads, int kv_heads) {                                       \
        backward_q<D>(q, k, v, first_key, lse, delta, dout, dq,                                    \
                      {windows, context, heads, kv_heads, D});                                     \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS, tiling(BACKWARD_KV, D).blocks)           \
    flash_attention_backward_dkdv_##D##_##T(                                                           \
        const T *__restrict__ q, const T *__restrict__ k, const T *__restrict__ v,                 \
        const uint32_t *__restrict__ first_key, const float *__restrict__ lse,                     \
        const float *__restrict__ delta, const T *__restrict__ dout, T *__restrict__ dk,           \
        T *__restrict__ dv, int windows, int context, int heads, int kv_heads) {                   \
        backward_kv<D>(q, k, v, first_key, lse, delta, dout, dk, dv,                               \
                       {windows, context, heads, kv_heads, D});                                    \
    }

ENTRIES(16, bf16)
ENTRIES(32, bf16)
ENTRIES(64, bf16)
ENTRIES(96, bf16)
ENTRIES(128, bf16)
ENTRIES(16, f16)
ENTRIES(32, f16)
ENTRIES(64, f16)
ENTRIES(96, f16)
ENTRIES(128, f16)
