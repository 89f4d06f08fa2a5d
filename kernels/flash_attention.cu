// FlashAttention-2 (Dao 2023): causal attention on tensor cores for heads of 16, 32, 64, 96 and 128
// components in 16-bit dtypes; formulas and shapes as in attention_generic.cu.
//
// A block of four warps owns a range of stationary rows and streams tiles of the other rows (K/V in
// forward and dq, Q/dO in dk and dv) through two stages of shared memory, filled by asynchronous
// copies. Each warp owns 16 or 32 rows and accumulates on its own: matmuls are m16n8k16 with f32
// accumulators; the result of one (p, ds) is the A operand of the next straight from registers,
// rounded to T. Forward and dq own query rows; dk and dv own key rows and compute the scores
// transposed. Tiles hidden from all rows of the block are not loaded; a warp skips those hidden
// from its rows, and masks those visible in part.
//
// Rows of a tile are 2 D + 16 bytes apart, so that the eight rows of an 8 x 8 matrix load have no
// bank conflicts. Rows past seq_len are zero.
//
// Tensor-core FLOPs per query-key pair: 4 D forward, 6 D for dq, 8 D for dk and dv (s and dp are
// recomputed, so that no sum needs atomics); one exp per pair in each. Bytes as in
// attention_generic.cu, the streamed rows once per block.
#include "lib/attention.cuh"
#include "lib/ptx.cuh"
#include "lib/reduce.cuh"
#include "lib/vector.cuh"

constexpr int STAGES = 2;

// An entry of FLASH_TILES.
struct TileConfig {
    int warps, row_blocks, tile, blocks;
    bool keep;

    __host__ __device__ constexpr int threads() const { return warps * WARP_SIZE; }
    __host__ __device__ constexpr int rows() const { return warps * row_blocks * MMA_ROWS; }
};
enum Pass { FORWARD, BACKWARD_DQ, BACKWARD_DKDV };
__host__ __device__ constexpr TileConfig tile_config(Pass pass, int head_dim) {
    const int(&tile)[5] = FLASH_TILES[pass][head_dim <= 32 ? 0 : head_dim <= 64 ? 1 : 2];
    return {tile[0], tile[1], tile[2], tile[3], tile[4] != 0};
}

// Tile of ROWS rows of D components in shared memory.
template <int D, int ROWS>
struct SmemTile {
    static constexpr int STRIDE = 2 * D + 16, BYTES = ROWS * STRIDE;
    uint32_t at;

    // Asynchronous copy of rows `pitch` apart; rows from `valid_rows` on are filled with zeros.
    template <int THREADS, typename T>
    __device__ void copy(const T *from, size_t pitch, int valid_rows) const {
        constexpr int PIECES = D / 8, STEP = THREADS / PIECES;
        const int first = threadIdx.x / PIECES, piece = threadIdx.x % PIECES;
        // With 12 chunks per row some threads are idle.
        if (first >= STEP) return;
#pragma unroll 4
        for (int i = 0; i < (ROWS + STEP - 1) / STEP; i++) {
            const int row = first + i * STEP;
            if (ROWS % STEP != 0 && row >= ROWS) break;
            const bool valid = row < valid_rows;
            cp_async16(at + row * STRIDE + piece * 16, from + (valid ? row : 0) * pitch + piece * 8,
                       valid ? 16 : 0);  // mutant: rows_past_the_end_not_zero
        }
    }
    // Rows row.. + 16 and components 16 k.. + 16 as an A fragment.
    __device__ void a_frag(uint32_t (&a)[4], int row, int k) const {
        const int lane = threadIdx.x % WARP_SIZE;
        ldmatrix_x4(a, at + (row + lane % 16) * STRIDE + (2 * k + lane / 16) * 16);
    }
    // The same values as B fragments of two mma whose columns are these rows.
    __device__ void b_frag(uint32_t (&b)[4], int row, int k) const {
        const int lane = threadIdx.x % WARP_SIZE;
        ldmatrix_x4(b, at + (row + lane % 8 + lane / 16 * 8) * STRIDE +
                             (2 * k + lane / 8 % 2) * 16);
    }
    // The same values as B fragments of two mma whose columns are these components.
    __device__ void b_frag_trans(uint32_t (&b)[4], int row, int k) const {
        const int lane = threadIdx.x % WARP_SIZE;
        ldmatrix_x4_trans(b, at + (row + lane % 16) * STRIDE + (2 * k + lane / 16) * 16);
    }
};

// Accumulators of a warp: at[m][n] is the 16 x 8 block n of row block m. A lane holds rows lane / 4
// and lane / 4 + 8 of each, columns 2 (lane % 4) and the next.
template <int ROW_BLOCKS, int COLUMNS>
struct AccFragment {
    float at[ROW_BLOCKS][COLUMNS / 8][4];

    __device__ void clear() {
#pragma unroll
        for (int m = 0; m < ROW_BLOCKS; m++) {
#pragma unroll
            for (int n = 0; n < COLUMNS / 8; n++) {
#pragma unroll
                for (int e = 0; e < 4; e++) at[m][n][e] = 0.0f;
            }
        }
    }
    // Columns 16 k.. + 16 of a row block, rounded to T, as an A fragment of the next mma.
    template <typename T>
    __device__ void a_frag(uint32_t (&a)[4], int m, int k) const {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float(&part)[4] = at[m][2 * k + i / 2];
            a[i] = cvt_rn_x2<T>(part[i % 2 * 2], part[i % 2 * 2 + 1]);
        }
    }
};

// A warp's stationary rows as A fragments, kept in registers or read from shared memory each time.
template <int D, int ROW_BLOCKS, bool KEEP, int ROWS>
struct Stationary {
    SmemTile<D, ROWS> rows;
    int row;
    uint32_t kept[ROW_BLOCKS][KEEP ? D / 16 : 1][4];

    // The rows must be in shared memory.
    __device__ void load() {
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
#pragma unroll
            for (int m = 0; m < ROW_BLOCKS; m++) rows.a_frag(kept[m][k], row + 16 * m, k);
        }
    }
    __device__ void a_frag(uint32_t (&a)[4], int m, int k) const {
        if constexpr (KEEP) {
#pragma unroll
            for (int i = 0; i < 4; i++) a[i] = kept[m][k][i];
        } else {
            rows.a_frag(a, row + 16 * m, k);
        }
    }
};

// Loads stationary rows of which this thread has started the copies.
template <typename... Rows>
__device__ inline void load_copied(Rows &...rows) {
    cp_async_wait<0>();
    __syncthreads();
    (rows.load(), ...);
}

// acc = stationary rows times streamed rows, transposed.
template <typename T, int D, int ROW_BLOCKS, bool KEEP, int TILE, int ROWS>
__device__ inline void qk_mma(AccFragment<ROW_BLOCKS, TILE> &acc,
                              const Stationary<D, ROW_BLOCKS, KEEP, ROWS> &stationary,
                              SmemTile<D, TILE> tile) {
    acc.clear();
    // Without kept rows a full unroll would exceed the registers.
    constexpr int UNROLL = KEEP ? D / 16 : 4;
#pragma unroll UNROLL
    for (int k = 0; k < D / 16; k++) {
        uint32_t a[ROW_BLOCKS][4];
#pragma unroll
        for (int m = 0; m < ROW_BLOCKS; m++) stationary.a_frag(a[m], m, k);
#pragma unroll
        for (int n = 0; n < TILE / 16; n++) {
            uint32_t b[4];
            tile.b_frag(b, 16 * n, k);
#pragma unroll
            for (int m = 0; m < ROW_BLOCKS; m++) {
                mma_m16n8k16<T>(acc.at[m][2 * n], a[m], b[0], b[1]);
                mma_m16n8k16<T>(acc.at[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// acc += p times streamed rows.
template <typename T, int D, int ROW_BLOCKS, int TILE>
__device__ inline void pv_mma(AccFragment<ROW_BLOCKS, D> &acc,
                              const AccFragment<ROW_BLOCKS, TILE> &p, SmemTile<D, TILE> tile) {
#pragma unroll
    for (int k = 0; k < TILE / 16; k++) {
        uint32_t a[ROW_BLOCKS][4];
#pragma unroll
        for (int m = 0; m < ROW_BLOCKS; m++) p.template a_frag<T>(a[m], m, k);
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            uint32_t b[4];
            tile.b_frag_trans(b, 16 * k, n);
#pragma unroll
            for (int m = 0; m < ROW_BLOCKS; m++) {
                mma_m16n8k16<T>(acc.at[m][2 * n], a[m], b[0], b[1]);
                mma_m16n8k16<T>(acc.at[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// Stores a warp's rows, scaled; `to` is the first, `valid_rows` the number that exist.
template <typename T, int D, int ROW_BLOCKS>
__device__ inline void store_acc(T *to, size_t pitch, const AccFragment<ROW_BLOCKS, D> &acc,
                                  const float (&scale)[ROW_BLOCKS][2], int valid_rows) {
    const int lane = threadIdx.x % WARP_SIZE;
#pragma unroll
    for (int m = 0; m < ROW_BLOCKS; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = 16 * m + 8 * half + lane / 4;
            if (row >= valid_rows) continue;
            T *row_out = to + row * pitch + lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                const float *pair = acc.at[m][n] + 2 * half;
                *reinterpret_cast<uint32_t *>(row_out + 8 * n) =
                    cvt_rn_x2<T>(pair[0] * scale[m][half], pair[1] * scale[m][half]);
            }
        }
    }
}

// First key visible to any row, and first key visible to all rows, of `count` query rows.
__device__ inline void visible_range(const uint32_t *first_key, int first, int count, int &begin,
                                     int &masked_until) {
    begin = first + count, masked_until = 0;
    for (int i = threadIdx.x % WARP_SIZE; i < count; i += WARP_SIZE) {
        const int key = first_visible(first_key, first + i);
        begin = min(begin, key), masked_until = max(masked_until, key);
    }
    begin = __reduce_min_sync(FULL_MASK, begin);
    masked_until = __reduce_max_sync(FULL_MASK, masked_until);
}

// Sets the scores of hidden keys to -inf. `first_row` is the first row of the lane, `tile` the
// first key.
template <int ROW_BLOCKS, int TILE>
__device__ inline void mask(AccFragment<ROW_BLOCKS, TILE> &scores, const uint32_t *first_key,
                            int first_row, int tile, int seq_len) {
    const int lane = threadIdx.x % WARP_SIZE;
#pragma unroll
    for (int i = 0; i < 2 * ROW_BLOCKS; i++) {
        const int row = first_row + 8 * i;
        const int from = row < seq_len ? first_visible(first_key, row) : 0;
#pragma unroll
        for (int j = 0; j < TILE / 4; j++) {
            const int key = tile + j / 2 * 8 + lane % 4 * 2 + j % 2;
            // mutant: diagonal_hidden
            if (key < from || row < key) scores.at[i / 2][j / 2][i % 2 * 2 + j % 2] = -INFINITY;
        }
    }
}

template <int D, typename T>
__device__ void forward(const T *q, const T *k, const T *v, const uint32_t *first_key, T *out,
                        float *lse, const AttentionShape shape) {
    constexpr TileConfig CONFIG = tile_config(FORWARD, D);
    constexpr int ROW_BLOCKS = CONFIG.row_blocks, TILE = CONFIG.tile;
    constexpr int THREADS = CONFIG.threads(), CHUNK = CONFIG.rows();
    constexpr bool KEEP = CONFIG.keep;
    extern __shared__ __align__(16) uint8_t smem[];
    const uint32_t base = cvta_to_shared(smem);
    const SmemTile<D, CHUNK> queries{base};
    const auto keys = [&](int stage) {
        return SmemTile<D, TILE>{base + queries.BYTES + 2 * stage * SmemTile<D, TILE>::BYTES};
    };
    const auto values = [&](int stage) {
        return SmemTile<D, TILE>{keys(stage).at + keys(stage).BYTES};
    };
    const float scale = LOG2E / sqrtf(D);
    const int lane = threadIdx.x % WARP_SIZE, warp_row = threadIdx.x / WARP_SIZE * ROW_BLOCKS * 16;
    const int chunks = (shape.seq_len + CHUNK - 1) / CHUNK, heads = shape.batch * shape.heads;
    for (int task = blockIdx.x; task < chunks * heads; task += gridDim.x) {
        // Longest rows first; consecutive tasks share keys.
        const int first = (chunks - 1 - task / heads) * CHUNK, head = task % heads;
        const int valid_rows = min(CHUNK, shape.seq_len - first);
        const size_t row = shape.row(head, first), kv_row = shape.kv_row(head);
        const uint32_t *first_keys = first_key + shape.sequence(head) * shape.seq_len;
        int begin, masked_until;
        visible_range(first_keys, first, valid_rows, begin, masked_until);
        begin = begin / TILE * TILE;
        const int end = first + valid_rows;

        // Other warps may still be reading the previous task's tiles.
        __syncthreads();
        const auto load_stage = [&](int position) {
            const int stage = position / TILE % STAGES;
            const size_t at = (kv_row + position) * D;
            keys(stage).template copy<THREADS>(k + at, D, shape.seq_len - position);
            values(stage).template copy<THREADS>(v + at, D, shape.seq_len - position);
            cp_async_commit();
        };
        queries.template copy<THREADS>(q + row * D, D, valid_rows);
        if (begin < end) load_stage(begin);
        Stationary<D, ROW_BLOCKS, KEEP, CHUNK> own_queries{queries, warp_row};
        if constexpr (KEEP) load_copied(own_queries);

        // First row of this lane; the others are 8, 16 and 24 rows further.
        const int first_position = first + warp_row + lane / 4;
        float row_max[ROW_BLOCKS][2], row_sum[ROW_BLOCKS][2];
        AccFragment<ROW_BLOCKS, D> acc;
        acc.clear();
#pragma unroll
        for (int m = 0; m < ROW_BLOCKS; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                row_max[m][half] = -INFINITY;
                row_sum[m][half] = 0.0f;
            }
        }
        for (int tile = begin; tile < end; tile += TILE) {
            const int stage = tile / TILE % STAGES;
            // Behind the barrier the tile is there, and all warps are done with the one before it.
            cp_async_wait<0>();
            __syncthreads();  // mutant: stage_overwritten
            if (tile + TILE < end) load_stage(tile + TILE);
            // Past this warp's rows, other warps may still have work.
            if (tile < first + warp_row + 16 * ROW_BLOCKS) {
                AccFragment<ROW_BLOCKS, TILE> p;
                qk_mma<T>(p, own_queries, keys(stage));
                if (masked_until > tile || tile + TILE - 1 > first + warp_row) {
                    mask(p, first_keys, first_position, tile, shape.seq_len);
                }
                bool changed = false;
                float new_max[ROW_BLOCKS][2];
#pragma unroll
                for (int m = 0; m < ROW_BLOCKS; m++) {
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        float tile_max = row_max[m][half];
#pragma unroll
                        for (int i = 0; i < TILE / 4; i++) {
                            tile_max = fmaxf(tile_max, p.at[m][i / 2][2 * half + i % 2]);
                        }
                        // Four lanes share a row.
                        tile_max = fmaxf(tile_max, __shfl_xor_sync(FULL_MASK, tile_max, 1));
                        // mutant: max_of_two_lanes
                        tile_max = fmaxf(tile_max, __shfl_xor_sync(FULL_MASK, tile_max, 2));
                        new_max[m][half] = tile_max;
                        changed |= tile_max > row_max[m][half];
                    }
                }
                // Rare after the first tiles.
                if (__any_sync(FULL_MASK, changed)) {
#pragma unroll
                    for (int m = 0; m < ROW_BLOCKS; m++) {
#pragma unroll
                        for (int half = 0; half < 2; half++) {
                            // Avoid (-inf) - (-inf) = NaN for rows that have seen no key yet.
                            const float rescale =
                                row_max[m][half] == -INFINITY
                                    ? 0.0f
                                    : ex2_approx((row_max[m][half] - new_max[m][half]) * scale);
                            row_max[m][half] = new_max[m][half];
                            row_sum[m][half] *= rescale;
#pragma unroll
                            for (int n = 0; n < D / 8; n++) {
                                acc.at[m][n][2 * half] *= rescale;
                                acc.at[m][n][2 * half + 1] *= rescale;
                            }
                        }
                    }
                }
#pragma unroll
                for (int m = 0; m < ROW_BLOCKS; m++) {
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const float max = row_max[m][half];
                        const float shift = max == -INFINITY ? 0.0f : max * scale;
#pragma unroll
                        for (int i = 0; i < TILE / 4; i++) {
                            float &score = p.at[m][i / 2][2 * half + i % 2];
                            score = ex2_approx(fmaf(score, scale, -shift));
                            row_sum[m][half] += score;
                        }
                    }
                }
                pv_mma<T>(acc, p, values(stage));
            }
        }
        // The copy of the queries, if there was no tile to wait for.
        cp_async_wait<0>();
#pragma unroll
        for (int m = 0; m < ROW_BLOCKS; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float total = row_sum[m][half];
                total += __shfl_xor_sync(FULL_MASK, total, 1);
                total += __shfl_xor_sync(FULL_MASK, total, 2);
                const bool any_visible = total > 0.0f;
                row_sum[m][half] = any_visible ? 1.0f / total : 0.0f;
                const int position = first_position + 16 * m + 8 * half;
                if (lane % 4 == 0 && position < shape.seq_len) {
                    lse[row - first + position] =
                        any_visible ? fmaf(row_max[m][half], scale, log2f(total)) * LN2 : 0.0f;
                }
            }
        }
        store_acc<T>(out + shape.out_row(head, first + warp_row) * D,
                      static_cast<size_t>(shape.heads) * D, acc, row_sum, valid_rows - warp_row);
    }
}

template <int D, typename T>
__device__ void backward_dq(const T *q, const T *k, const T *v, const uint32_t *first_key,
                           const float *lse, const float *delta, const T *dout, T *dq,
                           const AttentionShape shape) {
    constexpr TileConfig CONFIG = tile_config(BACKWARD_DQ, D);
    constexpr int ROW_BLOCKS = CONFIG.row_blocks, TILE = CONFIG.tile;
    constexpr int THREADS = CONFIG.threads(), CHUNK = CONFIG.rows();
    constexpr bool KEEP = CONFIG.keep;
    extern __shared__ __align__(16) uint8_t smem[];
    const uint32_t base = cvta_to_shared(smem);
    const SmemTile<D, CHUNK> queries{base}, douts{base + queries.BYTES};
    const auto keys = [&](int stage) {
        return SmemTile<D, TILE>{base + 2 * queries.BYTES + 2 * stage * SmemTile<D, TILE>::BYTES};
    };
    const auto values = [&](int stage) {
        return SmemTile<D, TILE>{keys(stage).at + keys(stage).BYTES};
    };
    const float scale = LOG2E / sqrtf(D);
    const size_t pitch = static_cast<size_t>(shape.heads) * D;
    const int lane = threadIdx.x % WARP_SIZE, warp_row = threadIdx.x / WARP_SIZE * ROW_BLOCKS * 16;
    const int chunks = (shape.seq_len + CHUNK - 1) / CHUNK, heads = shape.batch * shape.heads;
    for (int task = blockIdx.x; task < chunks * heads; task += gridDim.x) {
        const int first = (chunks - 1 - task / heads) * CHUNK, head = task % heads;
        const int valid_rows = min(CHUNK, shape.seq_len - first);
        const size_t row = shape.row(head, first), kv_row = shape.kv_row(head);
        const uint32_t *first_keys = first_key + shape.sequence(head) * shape.seq_len;
        int begin, masked_until;
        visible_range(first_keys, first, valid_rows, begin, masked_until);
        begin = begin / TILE * TILE;
        const int end = first + valid_rows;

        // Other warps may still be reading the previous task's tiles.
        __syncthreads();
        const auto load_stage = [&](int position) {
            const int stage = position / TILE % STAGES;
            const size_t at = (kv_row + position) * D;
            keys(stage).template copy<THREADS>(k + at, D, shape.seq_len - position);
            values(stage).template copy<THREADS>(v + at, D, shape.seq_len - position);
            cp_async_commit();
        };
        queries.template copy<THREADS>(q + row * D, D, valid_rows);
        douts.template copy<THREADS>(dout + shape.out_row(head, first) * D, pitch, valid_rows);
        if (begin < end) load_stage(begin);
        Stationary<D, ROW_BLOCKS, KEEP, CHUNK> own_queries{queries, warp_row};
        Stationary<D, ROW_BLOCKS, KEEP, CHUNK> own_douts{douts, warp_row};
        if constexpr (KEEP) load_copied(own_queries, own_douts);

        // First row of this lane; the others are 8, 16 and 24 rows further.
        const int first_position = first + warp_row + lane / 4;
        float row_lse[ROW_BLOCKS][2], row_delta[ROW_BLOCKS][2];
        AccFragment<ROW_BLOCKS, D> acc;
        acc.clear();
#pragma unroll
        for (int m = 0; m < ROW_BLOCKS; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int at = warp_row + lane / 4 + 16 * m + 8 * half;
                row_lse[m][half] = at < valid_rows ? lse[row + at] * LOG2E : 0.0f;
                row_delta[m][half] = at < valid_rows ? delta[row + at] : 0.0f;
            }
        }
        for (int tile = begin; tile < end; tile += TILE) {
            const int stage = tile / TILE % STAGES;
            // Behind the barrier the tile is there, and all warps are done with the one before it.
            cp_async_wait<0>();
            __syncthreads();
            if (tile + TILE < end) load_stage(tile + TILE);
            if (tile < first + warp_row + 16 * ROW_BLOCKS) {
                AccFragment<ROW_BLOCKS, TILE> p, ds;
                qk_mma<T>(p, own_queries, keys(stage));
                qk_mma<T>(ds, own_douts, values(stage));
                if (masked_until > tile || tile + TILE - 1 > first + warp_row) {
                    mask(p, first_keys, first_position, tile, shape.seq_len);
                }
#pragma unroll
                for (int m = 0; m < ROW_BLOCKS; m++) {
#pragma unroll
                    for (int half = 0; half < 2; half++) {
#pragma unroll
                        for (int i = 0; i < TILE / 4; i++) {
                            const float score = p.at[m][i / 2][2 * half + i % 2];
                            float &d = ds.at[m][i / 2][2 * half + i % 2];
                            d = ex2_approx(fmaf(score, scale, -row_lse[m][half])) *
                                (d - row_delta[m][half]);
                        }
                    }
                }
                pv_mma<T>(acc, ds, keys(stage));
            }
        }
        // The copy of the stationary rows, if there was no tile to wait for.
        cp_async_wait<0>();
        float scales[ROW_BLOCKS][2];
#pragma unroll
        for (int m = 0; m < ROW_BLOCKS; m++) scales[m][0] = scales[m][1] = scale * LN2;
        store_acc<T>(dq + (row + warp_row) * D, D, acc, scales, valid_rows - warp_row);
    }
}

// Per-query statistics of a tile, as arrays: lanes read pairs.
template <int TILE>
struct RowStats {
    float lse[TILE], delta[TILE];
    int from[TILE];
};

template <int D, typename T>
__device__ void backward_dkdv(const T *q, const T *k, const T *v, const uint32_t *first_key,
                            const float *lse, const float *delta, const T *dout, T *dk, T *dv,
                            const AttentionShape shape) {
    constexpr TileConfig CONFIG = tile_config(BACKWARD_DKDV, D);
    constexpr int ROW_BLOCKS = CONFIG.row_blocks, TILE = CONFIG.tile;
    constexpr int THREADS = CONFIG.threads(), CHUNK = CONFIG.rows();
    constexpr bool KEEP = CONFIG.keep;
    static_assert(TILE <= THREADS);
    extern __shared__ __align__(16) uint8_t smem[];
    const uint32_t base = cvta_to_shared(smem);
    const SmemTile<D, CHUNK> keys{base}, values{base + keys.BYTES};
    const auto queries = [&](int stage) {
        return SmemTile<D, TILE>{base + 2 * keys.BYTES + 2 * stage * SmemTile<D, TILE>::BYTES};
    };
    const auto douts = [&](int stage) {
        return SmemTile<D, TILE>{queries(stage).at + SmemTile<D, TILE>::BYTES};
    };
    auto *stats = reinterpret_cast<RowStats<TILE> *>(
        smem + 2 * keys.BYTES + 2 * STAGES * SmemTile<D, TILE>::BYTES);
    const float scale = LOG2E / sqrtf(D);
    const size_t pitch = static_cast<size_t>(shape.heads) * D;
    const int lane = threadIdx.x % WARP_SIZE, warp_row = threadIdx.x / WARP_SIZE * ROW_BLOCKS * 16;
    const int chunks = (shape.seq_len + CHUNK - 1) / CHUNK;
    const int kv_heads = shape.batch * shape.kv_heads;
    for (int task = blockIdx.x; task < chunks * kv_heads; task += gridDim.x) {
        // The first keys are visible to most queries.
        const int first = task / kv_heads * CHUNK, kv_head = task % kv_heads;
        const int valid_rows = min(CHUNK, shape.seq_len - first);
        const size_t kv_row = static_cast<size_t>(kv_head) * shape.seq_len + first;
        const size_t window = kv_head / shape.kv_heads;
        const uint32_t *first_keys = first_key + window * shape.seq_len;

        // Tiles of all query heads of the group, in head order.
        const int begin = first / TILE, tiles = (shape.seq_len + TILE - 1) / TILE - begin;
        const int steps = tiles * shape.group();
        float next_lse = 0.0f, next_delta = 0.0f;
        int next_from = 0;
        // Queries past seq_len are zero: whatever their p, they add nothing.
        const auto load_stage = [&](int step) {
            const int head = kv_head * shape.group() + step / tiles;
            const int position = (begin + step % tiles) * TILE, a_frag = shape.seq_len - position;
            const size_t row = shape.row(head, position);
            queries(step % STAGES).template copy<THREADS>(q + row * D, D, a_frag);
            douts(step % STAGES).template copy<THREADS>(dout + shape.out_row(head, position) * D, pitch, a_frag);
            cp_async_commit();
            const int at = threadIdx.x;
            if (at < TILE) {
                next_lse = at < a_frag ? lse[row + at] * LOG2E : 0.0f;
                next_delta = at < a_frag ? delta[row + at] : 0.0f;
                next_from = at < a_frag ? first_visible(first_keys, position + at) : 0;
            }
        };
        const auto store_stats = [&](int step) {
            if (threadIdx.x >= TILE) return;
            stats[step % STAGES].lse[threadIdx.x] = next_lse;
            stats[step % STAGES].delta[threadIdx.x] = next_delta;
            stats[step % STAGES].from[threadIdx.x] = next_from;
        };
        // Other warps may still be reading the previous task's tiles.
        __syncthreads();
        keys.template copy<THREADS>(k + kv_row * D, D, valid_rows);
        values.template copy<THREADS>(v + kv_row * D, D, valid_rows);
        load_stage(0);
        store_stats(0);
        Stationary<D, ROW_BLOCKS, KEEP, CHUNK> own_keys{keys, warp_row};
        Stationary<D, ROW_BLOCKS, KEEP, CHUNK> own_values{values, warp_row};
        if constexpr (KEEP) load_copied(own_keys, own_values);

        AccFragment<ROW_BLOCKS, D> dk_acc, dv_acc;
        dk_acc.clear();
        dv_acc.clear();
        for (int step = 0; step < steps; step++) {
            const int stage = step % STAGES, tile = (begin + step % tiles) * TILE;
            cp_async_wait<0>();
            __syncthreads();
            if (step + 1 < steps) load_stage(step + 1);
            const RowStats<TILE> &tile_stats = stats[stage];
            int min_first = tile_stats.from[lane % TILE], max_first = min_first;
            for (int i = lane; i < TILE; i += WARP_SIZE) {
                min_first = min(min_first, tile_stats.from[i]);
                max_first = max(max_first, tile_stats.from[i]);
            }
            const int low = first + warp_row, high = low + 16 * ROW_BLOCKS - 1;
            const bool all_hidden =
                // mutant: visible_tile_skipped
                tile + TILE - 1 < low || __reduce_min_sync(FULL_MASK, min_first) > high;
            if (!all_hidden) {
                AccFragment<ROW_BLOCKS, TILE> p, ds;
                qk_mma<T>(p, own_keys, queries(stage));
                qk_mma<T>(ds, own_values, douts(stage));
                if (__reduce_max_sync(FULL_MASK, max_first) > low || tile < high) {
#pragma unroll
                    for (int j = 0; j < TILE / 4; j++) {
                        const int at = j / 2 * 8 + lane % 4 * 2 + j % 2;
#pragma unroll
                        for (int i = 0; i < 2 * ROW_BLOCKS; i++) {
                            const int key = low + lane / 4 + 8 * i;
                            if (key < tile_stats.from[at] || tile + at < key) {
                                p.at[i / 2][j / 2][i % 2 * 2 + j % 2] = -INFINITY;
                            }
                        }
                    }
                }
#pragma unroll
                for (int j = 0; j < TILE / 4; j++) {
                    const int at = j / 2 * 8 + lane % 4 * 2 + j % 2;
                    const float row_lse = tile_stats.lse[at], row_delta = tile_stats.delta[at];
#pragma unroll
                    for (int i = 0; i < 2 * ROW_BLOCKS; i++) {
                        float &weight = p.at[i / 2][j / 2][i % 2 * 2 + j % 2];
                        float &d = ds.at[i / 2][j / 2][i % 2 * 2 + j % 2];
                        weight = ex2_approx(fmaf(weight, scale, -row_lse));
                        d = weight * (d - row_delta);
                    }
                }
                pv_mma<T>(dv_acc, p, douts(stage));
                pv_mma<T>(dk_acc, ds, queries(stage));
            }
            if (step + 1 < steps) store_stats(step + 1);  // mutant: stats_not_stored
        }
        float ones[ROW_BLOCKS][2], scales[ROW_BLOCKS][2];
#pragma unroll
        for (int m = 0; m < ROW_BLOCKS; m++) {
            ones[m][0] = ones[m][1] = 1.0f;
            scales[m][0] = scales[m][1] = scale * LN2;
        }
        store_acc<T>(dv + (kv_row + warp_row) * D, D, dv_acc, ones, valid_rows - warp_row);
        store_acc<T>(dk + (kv_row + warp_row) * D, D, dk_acc, scales, valid_rows - warp_row);
    }
}

// Launch: blocks of the threads of `tile_config`, any grid along x; one block per `rows()` rows of a head
// (of a key/value head for dk and dv) is best. Dynamic shared memory, with C
// stationary rows per block and R rows per tile of 2 D + 16 bytes each: C + 4 R rows forward, 2 C +
// 4 R backward, and 24 R bytes more for dk and dv.
#define ENTRIES(D, T)                                                                              \
    extern "C" __global__ void __launch_bounds__(tile_config(FORWARD, D).threads(),                \
                                                 tile_config(FORWARD, D).blocks)                   \
    flash_attention_##D##_##T(                                                                     \
        const T *__restrict__ q, const T *__restrict__ k, const T *__restrict__ v,                 \
        const uint32_t *__restrict__ first_key, T *__restrict__ out, float *__restrict__ lse,      \
        int batch, int seq_len, int heads, int kv_heads) {                                         \
        forward<D>(q, k, v, first_key, out, lse, {batch, seq_len, heads, kv_heads, D});            \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(tile_config(BACKWARD_DQ, D).threads(),            \
                                                 tile_config(BACKWARD_DQ, D).blocks)               \
    flash_attention_backward_dq_##D##_##T(                                                         \
        const T *__restrict__ q, const T *__restrict__ k, const T *__restrict__ v,                 \
        const uint32_t *__restrict__ first_key, const float *__restrict__ lse,                     \
        const float *__restrict__ delta, const T *__restrict__ dout, T *__restrict__ dq,           \
        int batch, int seq_len, int heads, int kv_heads) {                                         \
        backward_dq<D>(q, k, v, first_key, lse, delta, dout, dq,                                   \
                      {batch, seq_len, heads, kv_heads, D});                                       \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(tile_config(BACKWARD_DKDV, D).threads(),          \
                                                 tile_config(BACKWARD_DKDV, D).blocks)             \
    flash_attention_backward_dkdv_##D##_##T(                                                       \
        const T *__restrict__ q, const T *__restrict__ k, const T *__restrict__ v,                 \
        const uint32_t *__restrict__ first_key, const float *__restrict__ lse,                     \
        const float *__restrict__ delta, const T *__restrict__ dout, T *__restrict__ dk,           \
        T *__restrict__ dv, int batch, int seq_len, int heads, int kv_heads) {                     \
        backward_dkdv<D>(q, k, v, first_key, lse, delta, dout, dk, dv,                             \
                       {batch, seq_len, heads, kv_heads, D});                                      \
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
