// Fused linear cross-entropy: the LM head and its softmax cross-entropy without logits in memory,
// for a hidden size of at most 256. Both gradients have the structure of attention: softmax(x wT) w
// and its transpose, minus the rows of the targets.
//
//     z = x wT                   S = sum of exp(z)
//     nll    = log(S) - z[target]            0 if the target is ignored
//     argmax = the first of equal largest z
//     dx     = loss_scale * (exp(z) / S - onehot(target)) w
//     dw    += loss_scale * (exp(z) / S - onehot(target))T x
//
// lse pass, `lce_fwd_dx`: a block owns 128 rows of x and streams w with online softmax; it
// accumulates each row's maximum logit, sum of exponentials and sum of exp(z - max) w. The
// vocabulary may be split among blocks: `lce_combine` adds the partial results in order and
// computes nll, argmax and dx. grad pass, `lce_dw`: a block owns 128 rows of w and streams x; with
// S known, a gradient is one exponential. The rows may be split among blocks: `lce_dw_combine` adds
// the partial sums.
//
// Operands of the second matmul are rounded to T: exp(z - max) without the target's in the lse
// pass, exp(z) / S - onehot in the grad pass, both times 2^OPERAND_SCALE_LOG2. The target's term of
// dx, (exp(z[target]) / S - 1) w[target], is added in f32 by `lce_combine`: for a token predicted
// with near certainty it is a small difference, which rounding would swamp. loss_scale is applied
// last, in f32.
//
// x, dx: [rows, hidden], w: [vocab, hidden] in T; dw: [vocab, hidden] in f32; targets, argmax:
// [rows] u32; nll: [rows] f32. A target beyond the vocabulary is ignored. No overlaps. If hidden is
// not a multiple of 8 or a pointer is not aligned to 16 bytes, rows are loaded by scalars: correct
// but slow. lse pass: 4 rows vocab hidden FLOPs, rows vocab exponentials, 4 rows hidden + 2 vocab
// hidden + 8 rows bytes; grad pass: the same FLOPs and exponentials, 2 rows hidden + 10 vocab
// hidden bytes. 6 of the 8 FLOPs are useful, the rest is recomputation. Bound by tensor cores, then
// by exponentials and issue slots: docs/kernels/.
#include "lib/ptx.cuh"
#include "lib/reduce.cuh"
#include "lib/vector.cuh"

#include <climits>

// Below every logit but finite, so that differences to it are never NaN.
constexpr float LOWEST = -1e30f;

// Operands in [-1, 1] are scaled by 2^OPERAND_SCALE_LOG2: an f16 is normal only from 2^-14 on and
// ends at 2^16, so probabilities down to 2^-29 keep 11 bits, and those down to 2^-39 are not
// flushed to zero. bf16 has the range of f32.
template <typename T>
constexpr int OPERAND_SCALE_LOG2 = std::is_same_v<T, f16> ? 15 : 0;  // mutant: operands_not_scaled
template <typename T>
constexpr float INVERSE_OPERAND_SCALE = 1.0f / (1 << OPERAND_SCALE_LOG2<T>);

constexpr int BLOCK_ROWS = LCE_BLOCK_ROWS;
constexpr int TILE_ROWS = LCE_TILE_ROWS;  // tiles are double-buffered
constexpr int STAGES = 2;
static_assert(STAGES * TILE_ROWS == BLOCK_ROWS, "stationary rows are loaded through the stages");

// An entry of LCE_TILES: a warp owns ROW_BLOCKS blocks of 16 rows and processes GROUP streamed rows at a
// time; MIN_BLOCKS blocks are resident per SM.
template <int WIDTH>
struct TileConfig {
    static constexpr int ENTRY = WIDTH <= 32 ? 0 : WIDTH <= 64 ? 1 : WIDTH <= 128 ? 2 : 3;
    static constexpr int ROW_BLOCKS = LCE_TILES[ENTRY][0], GROUP = LCE_TILES[ENTRY][1];
    static constexpr int MIN_BLOCKS = LCE_TILES[ENTRY][2];
};
template <int WIDTH>
constexpr int THREADS = BLOCK_ROWS / (MMA_ROWS * TileConfig<WIDTH>::ROW_BLOCKS) * WARP_SIZE;

// Rows of a tile are an odd number of 16-byte chunks apart, so that eight of them have no bank
// conflicts.
template <int WIDTH>
constexpr int ROW_BYTES = 2 * WIDTH + 16;
template <int WIDTH>
constexpr int TILE_BYTES = TILE_ROWS * ROW_BYTES<WIDTH>;

// Intermediate results between the kernels: 4 padded + splits * padded * (3 + width) words, without
// the width term if only the loss is computed. `padded` is rows rounded up to a multiple of
// BLOCK_ROWS.
struct Scratch {
    size_t padded;
    float *target_logit;  // [padded]
    float *lse;           // [padded]: base 2, minus OPERAND_SCALE_LOG2; infinite if ignored
    uint32_t *target;     // [padded]: IGNORE_INDEX for ignored targets and rows past the end
    float *target_gap;    // [padded]: 1 - exp(z[target]) / S, times 2^OPERAND_SCALE_LOG2
    float *max, *sum;     // [splits, padded]: the sum without the target's exponential
    int *argmax;          // [splits, padded]
    float *dx;            // [splits, padded, width]: exp(z - max) w without the target's term

    __device__ Scratch(float *at, int rows, int splits)
        : padded(static_cast<size_t>(rows + BLOCK_ROWS - 1) / BLOCK_ROWS * BLOCK_ROWS) {
        target_logit = at;
        lse = target_logit + padded;
        target = reinterpret_cast<uint32_t *>(lse + padded);
        target_gap = lse + 2 * padded;
        max = target_gap + padded;
        sum = max + splits * padded;
        argmax = reinterpret_cast<int *>(sum + splits * padded);
        dx = sum + 2 * splits * padded;
    }
};

// Asynchronous copy by the block of COUNT rows of a matrix, from row `first` on, into a tile; rows
// from `limit` and columns from `hidden` on are zero. Without `vectors`, plain scalar loads.
template <int WIDTH, int COUNT, typename T>
__device__ void load_rows(unsigned char *tile, const T *matrix, int first, int limit, int hidden,
                          bool vectors) {
    constexpr int N = VEC<T>, CHUNKS = WIDTH / N, STEP_ROWS = THREADS<WIDTH> / CHUNKS;
    const int row = threadIdx.x / CHUNKS, column = threadIdx.x % CHUNKS * N;
    unsigned char *to = tile + row * ROW_BYTES<WIDTH> + column * sizeof(T);
    if (vectors) {
        const T *from = matrix + static_cast<size_t>(first + row) * hidden + column;
        const int rows = column < hidden ? limit - first - row : 0;  // mutant: vectors_past_hidden
#pragma unroll
        for (int i = 0; i < COUNT; i += STEP_ROWS) {
            cp_async16(cvta_to_shared(to + i * ROW_BYTES<WIDTH>), i < rows ? from : matrix,
                       i < rows ? 16 : 0);
            from += static_cast<size_t>(STEP_ROWS) * hidden;
        }
        return;
    }
#pragma unroll 1
    for (int i = 0; i < COUNT; i += STEP_ROWS) {
        const bool valid = first + row + i < limit;
        const size_t at = static_cast<size_t>(first + row + i) * hidden + column;
        float values[N];
        for (int k = 0; k < N; k++) {
            // mutant: scalars_past_hidden
            values[k] = valid && column + k < hidden ? to_float(matrix[at + k]) : 0.0f;
        }
        store(reinterpret_cast<T *>(to + i * ROW_BYTES<WIDTH>), values);
    }
}

// Stationary rows of a warp in registers, and their matmuls with streamed rows.
template <typename T, int WIDTH>
struct StationaryRows {
    static constexpr int ROW_BLOCKS = TileConfig<WIDTH>::ROW_BLOCKS;
    static constexpr int GROUP = TileConfig<WIDTH>::GROUP;
    // Accumulators of 16 * ROW_BLOCKS rows by N columns: lane t holds, of row block s and 8-column
    // block j, row t / 4 + 8 (e / 2) and column 2 (t % 4) + e % 2 at [s][j][e].
    template <int N>
    using AccFragment = float[ROW_BLOCKS][N / 8][4];

    uint32_t rows[ROW_BLOCKS][WIDTH / 16][4];
    int lane;

    // Loads the warp's rows from a tile of BLOCK_ROWS rows.
    __device__ explicit StationaryRows(const unsigned char *tile) : lane(threadIdx.x % WARP_SIZE) {
        const int row = threadIdx.x / WARP_SIZE * 16 * ROW_BLOCKS + lane % 16;
        const uint32_t at = cvta_to_shared(tile) + row * ROW_BYTES<WIDTH> + lane / 16 * 16;
#pragma unroll
        for (int s = 0; s < ROW_BLOCKS; s++) {
#pragma unroll
            for (int k = 0; k < WIDTH / 16; k++) {
                ldmatrix_x4(rows[s][k], at + s * 16 * ROW_BYTES<WIDTH> + k * 32);
            }
        }
    }

    // Row in the block and column in the group of an accumulator element.
    __device__ int row(int s, int e) const {
        return (threadIdx.x / WARP_SIZE * ROW_BLOCKS + s) * 16 + e / 2 * 8 + lane / 4;
    }
    __device__ int column(int j, int e) const { return j * 8 + lane % 4 * 2 + e % 2; }

    // z = stationary rows times GROUP streamed rows, transposed.
    __device__ void logits(AccFragment<GROUP> &z, const unsigned char *streamed) const {
        const int row = lane / 16 * 8 + lane % 8;
        const uint32_t at = cvta_to_shared(streamed) + row * ROW_BYTES<WIDTH> + lane / 8 % 2 * 16;
#pragma unroll
        for (int s = 0; s < ROW_BLOCKS; s++) {
#pragma unroll
            for (int j = 0; j < GROUP / 8; j++) {
#pragma unroll
                for (int e = 0; e < 4; e++) z[s][j][e] = 0.0f;
            }
        }
#pragma unroll
        for (int k = 0; k < WIDTH / 16; k++) {
#pragma unroll
            for (int j = 0; j < GROUP / 8; j += 2) {
                uint32_t b[4];
                ldmatrix_x4(b, at + j * 8 * ROW_BYTES<WIDTH> + k * 32);
#pragma unroll
                for (int s = 0; s < ROW_BLOCKS; s++) {
                    mma_m16n8k16<T>(z[s][j], rows[s][k], b[0], b[1]);
                    mma_m16n8k16<T>(z[s][j + 1], rows[s][k], b[2], b[3]);
                }
            }
        }
    }

    // acc += p, rounded to T, times GROUP streamed rows.
    __device__ void accumulate(AccFragment<WIDTH> &acc, const AccFragment<GROUP> &p,
                               const unsigned char *streamed) const {
        const uint32_t at =
            cvta_to_shared(streamed) + lane % 16 * ROW_BYTES<WIDTH> + lane / 16 * 16;
#pragma unroll
        for (int k = 0; k < GROUP / 16; k++) {
            uint32_t a[ROW_BLOCKS][4];
#pragma unroll
            for (int s = 0; s < ROW_BLOCKS; s++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float *pair = &p[s][2 * k + i / 2][i % 2 * 2];
                    a[s][i] = cvt_rn_x2<T>(pair[0], pair[1]);
                }
            }
#pragma unroll
            for (int j = 0; j < WIDTH / 8; j += 2) {
                uint32_t b[4];
                ldmatrix_x4_trans(b, at + k * 16 * ROW_BYTES<WIDTH> + j * 16);
#pragma unroll
                for (int s = 0; s < ROW_BLOCKS; s++) {
                    // mutant: operand_halves_swapped
                    mma_m16n8k16<T>(acc[s][j], a[s], b[0], b[1]);
                    mma_m16n8k16<T>(acc[s][j + 1], a[s], b[2], b[3]);
                }
            }
        }
    }
};

// Over the four lanes that share a row.
__device__ inline float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(FULL_MASK, x, 1));
    return fmaxf(x, __shfl_xor_sync(FULL_MASK, x, 2));
}
__device__ inline float quad_sum(float x) {
    x += __shfl_xor_sync(FULL_MASK, x, 1);
    return x + __shfl_xor_sync(FULL_MASK, x, 2);
}

template <int WIDTH, typename T>
__device__ void lce_fwd_dx(const T *x, const T *w, const uint32_t *targets, float *scratch_at,
                           int rows, int vocab, int hidden, int split_vocab, bool training) {
    constexpr int ROW_BLOCKS = TileConfig<WIDTH>::ROW_BLOCKS;
    constexpr int GROUP = TileConfig<WIDTH>::GROUP;
    extern __shared__ __align__(16) unsigned char smem[];
    const Scratch scratch(scratch_at, rows, gridDim.y);
    const int first = blockIdx.x * BLOCK_ROWS;
    const int begin = blockIdx.y * split_vocab, end = min(vocab, begin + split_vocab);
    // mutant: unaligned_rows_vectorized
    const bool vectors = hidden % VEC<T> == 0 && aligned(x, w);

    load_rows<WIDTH, BLOCK_ROWS>(smem, x, first, rows, hidden, vectors);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    const StationaryRows<T, WIDTH> stationary(smem);
    __syncthreads();  // mutant: stationary_rows_overwritten
    load_rows<WIDTH, TILE_ROWS>(smem, w, begin, end, hidden, vectors);
    cp_async_commit();

    // State of the two rows per row block that this lane shares.
    float max[ROW_BLOCKS][2], sum[ROW_BLOCKS][2];
    uint32_t target[ROW_BLOCKS][2];
    const int partial = blockIdx.y * static_cast<int>(scratch.padded) + first;
#pragma unroll
    for (int s = 0; s < ROW_BLOCKS; s++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int row = first + stationary.row(s, 2 * h);
            max[s][h] = LOWEST;
            sum[s][h] = 0.0f;
            if (stationary.lane % 4 == 0) {
                scratch.argmax[partial + stationary.row(s, 2 * h)] = begin;
            }
            target[s][h] = row < rows ? targets[row] : IGNORE_INDEX;
            if (target[s][h] >= vocab) target[s][h] = IGNORE_INDEX;
        }
    }
    typename StationaryRows<T, WIDTH>::template AccFragment<WIDTH> dx = {};

    int stage = 0;
    for (int tile = begin; tile < end; tile += TILE_ROWS) {
        // This tile has arrived, and all warps are done with the previous one.
        cp_async_wait<0>();
        __syncthreads();
        const unsigned char *streamed = smem + stage * TILE_BYTES<WIDTH>;
        stage ^= 1;
        if (tile + TILE_ROWS < end) {
            // mutant: current_stage_overwritten
            load_rows<WIDTH, TILE_ROWS>(smem + stage * TILE_BYTES<WIDTH>, w, tile + TILE_ROWS, end,
                                        hidden, vectors);
            cp_async_commit();
        }
#pragma unroll 1
        for (int id = tile; id < min(end, tile + TILE_ROWS); id += GROUP) {
            typename StationaryRows<T, WIDTH>::template AccFragment<GROUP> z;
            stationary.logits(z, streamed);
            if (id + GROUP > end) {  // mutant: ids_past_the_end
#pragma unroll
                for (int j = 0; j < GROUP / 8; j++) {
#pragma unroll
                    for (int e = 0; e < 4; e++) {
#pragma unroll
                        for (int s = 0; s < ROW_BLOCKS; s++) {
                            if (id + stationary.column(j, e) >= end) z[s][j][e] = -INFINITY;
                        }
                    }
                }
            }

            float group_max[ROW_BLOCKS][2];
            bool max_changed = false, has_target = false;
#pragma unroll
            for (int s = 0; s < ROW_BLOCKS; s++) {
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    group_max[s][h] = -INFINITY;
#pragma unroll
                    for (int j = 0; j < GROUP / 8; j++) {
                        group_max[s][h] =
                            fmaxf(group_max[s][h], fmaxf(z[s][j][2 * h], z[s][j][2 * h + 1]));
                    }
                    max_changed |= group_max[s][h] > max[s][h];  // mutant: new_max_not_detected
                    has_target |= target[s][h] - id < GROUP;  // mutant: target_not_detected
                }
            }
            // Rare after the first groups: some row of the warp has a new maximum.
            if (__any_sync(FULL_MASK, max_changed)) {
#pragma unroll
                for (int s = 0; s < ROW_BLOCKS; s++) {
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        const float row_max = quad_max(group_max[s][h]);
                        int at = INT_MAX;
#pragma unroll
                        // mutant: last_of_equals_in_a_group
                        for (int j = GROUP / 8 - 1; j >= 0; j--) {
#pragma unroll
                            for (int e = 2 * h + 1; e >= 2 * h; e--) {
                                if (z[s][j][e] == row_max) at = id + stationary.column(j, e);
                            }
                        }
                        at = min(at, __shfl_xor_sync(FULL_MASK, at, 1));
                        // mutant: last_of_equals_in_four_lanes
                        at = min(at, __shfl_xor_sync(FULL_MASK, at, 2));
                        if (row_max > max[s][h]) {  // mutant: last_of_equal_groups
                            const float rescale = ex2_approx((max[s][h] - row_max) * LOG2E);
                            max[s][h] = row_max;
                            if (stationary.lane % 4 == 0) {
                                // mutant: argmax_not_stored
                                scratch.argmax[partial + stationary.row(s, 2 * h)] = at;
                            }
                            sum[s][h] *= rescale;  // mutant: sum_not_rescaled
#pragma unroll
                            for (int j = 0; j < WIDTH / 8; j++) {
                                dx[s][j][2 * h] *= rescale;
                                dx[s][j][2 * h + 1] *= rescale;  // mutant: dx_not_rescaled
                            }
                        }
                    }
                }
            }
            // Rare: some row of the warp has its target in this group. `lce_combine` adds its term.
            if (__any_sync(FULL_MASK, has_target)) {
#pragma unroll
                for (int s = 0; s < ROW_BLOCKS; s++) {
#pragma unroll
                    for (int j = 0; j < GROUP / 8; j++) {
#pragma unroll
                        for (int e = 0; e < 4; e++) {
                            if (id + stationary.column(j, e) == target[s][e / 2]) {
                                scratch.target_logit[first + stationary.row(s, e)] = z[s][j][e];
                                z[s][j][e] = -INFINITY;  // mutant: target_counted_twice
                            }
                        }
                    }
                }
            }

#pragma unroll
            for (int s = 0; s < ROW_BLOCKS; s++) {
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const float shift = max[s][h] * LOG2E - OPERAND_SCALE_LOG2<T>;
#pragma unroll
                    for (int j = 0; j < GROUP / 8; j++) {
#pragma unroll
                        for (int e = 2 * h; e < 2 * h + 2; e++) {
                            z[s][j][e] = ex2_approx(fmaf(z[s][j][e], LOG2E, -shift));
                            sum[s][h] += z[s][j][e];
                        }
                    }
                }
            }
            if (training) stationary.accumulate(dx, z, streamed);
            streamed += GROUP * ROW_BYTES<WIDTH>;
        }
    }

#pragma unroll
    for (int s = 0; s < ROW_BLOCKS; s++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int at = partial + stationary.row(s, 2 * h);
            const float total = quad_sum(sum[s][h]);
            if (stationary.lane % 4 == 0) {
                scratch.max[at] = max[s][h];
                scratch.sum[at] = total * INVERSE_OPERAND_SCALE<T>;  // mutant: sum_left_scaled
            }
            if (!training) continue;
#pragma unroll
            for (int j = 0; j < WIDTH / 8; j++) {
                const float pair[2] = {dx[s][j][2 * h] * INVERSE_OPERAND_SCALE<T>,
                                       dx[s][j][2 * h + 1] * INVERSE_OPERAND_SCALE<T>};
                store(scratch.dx + static_cast<size_t>(at) * WIDTH + stationary.column(j, 0), pair);
            }
        }
    }
}

template <int WIDTH, typename T>
__device__ void lce_dw(const T *x, const T *w, const float *loss_scale, float *scratch_at,
                       float *dw, float *partials, int rows, int vocab, int hidden,
                       int split_rows) {
    constexpr int ROW_BLOCKS = TileConfig<WIDTH>::ROW_BLOCKS;
    constexpr int GROUP = TileConfig<WIDTH>::GROUP;
    extern __shared__ __align__(16) unsigned char smem[];
    // After the tiles, [STAGES, 3, TILE_ROWS]: lse, target and target_gap of the rows of each tile.
    float *const row_stats = reinterpret_cast<float *>(smem + STAGES * TILE_BYTES<WIDTH>);
    const Scratch scratch(scratch_at, rows, 0);
    const int first = blockIdx.x * BLOCK_ROWS;
    const int begin = blockIdx.y * split_rows, end = min(rows, begin + split_rows);
    const bool vectors = hidden % VEC<T> == 0 && aligned(x, w);

    load_rows<WIDTH, BLOCK_ROWS>(smem, w, first, vocab, hidden, vectors);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    const StationaryRows<T, WIDTH> stationary(smem);
    __syncthreads();
    const auto copy = [&](int stage, int tile) {
        load_rows<WIDTH, TILE_ROWS>(smem + stage * TILE_BYTES<WIDTH>, x, tile, end, hidden,
                                    vectors);
        const int stat = threadIdx.x / 16, at = threadIdx.x % 16 * 4;
        if (stat < 3) {
            cp_async16(cvta_to_shared(row_stats + (3 * stage + stat) * TILE_ROWS + at),
                       scratch.lse + stat * scratch.padded + tile + at, 16);
        }
        cp_async_commit();
    };
    if (begin < end) copy(0, begin);

    typename StationaryRows<T, WIDTH>::template AccFragment<WIDTH> acc = {};
    int stage = 0;
    for (int tile = begin; tile < end; tile += TILE_ROWS) {
        // This tile has arrived, and all warps are done with the previous one.
        cp_async_wait<0>();
        __syncthreads();
        const unsigned char *streamed = smem + stage * TILE_BYTES<WIDTH>;
        const float *lse = row_stats + 3 * stage * TILE_ROWS, *target_gap = lse + 2 * TILE_ROWS;
        const uint32_t *target = reinterpret_cast<const uint32_t *>(lse + TILE_ROWS);
        stage ^= 1;
        if (tile + TILE_ROWS < end) copy(stage, tile + TILE_ROWS);
        for (int group = 0; group < TILE_ROWS; group += GROUP) {
            typename StationaryRows<T, WIDTH>::template AccFragment<GROUP> p;
            stationary.logits(p, streamed + group * ROW_BYTES<WIDTH>);
#pragma unroll
            for (int j = 0; j < GROUP / 8; j++) {
                float shift[2];
                load(shift, lse + group + stationary.column(j, 0));
#pragma unroll
                for (int s = 0; s < ROW_BLOCKS; s++) {
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        // mutant: lse_of_the_other_row
                        p[s][j][e] = ex2_approx(fmaf(p[s][j][e], LOG2E, -shift[e % 2]));
                    }
                }
            }
            // Rare: a row's target is among the block's ids.
            const uint32_t one = target[group + stationary.lane % GROUP];
            // mutant: dw_target_not_detected
            if (__any_sync(FULL_MASK, one - first < BLOCK_ROWS)) {
#pragma unroll
                for (int j = 0; j < GROUP / 8; j++) {
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const int token = group + stationary.column(j, e);
                        const uint32_t row = target[token] - first;
#pragma unroll
                        for (int s = 0; s < ROW_BLOCKS; s++) {
                            // mutant: one_hot_in_next_row
                            if (row == stationary.row(s, e)) p[s][j][e] = -target_gap[token];
                        }
                    }
                }
            }
            stationary.accumulate(acc, p, streamed + group * ROW_BYTES<WIDTH>);
        }
    }

    const float scale = *loss_scale * INVERSE_OPERAND_SCALE<T>;
#pragma unroll
    for (int s = 0; s < ROW_BLOCKS; s++) {
#pragma unroll
        for (int j = 0; j < WIDTH / 8; j++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int id = first + stationary.row(s, e), column = stationary.column(j, e);
                if (id >= vocab || column >= hidden) continue;
                const size_t at = static_cast<size_t>(id) * hidden + column;
                if (partials != nullptr) {
                    partials[static_cast<size_t>(blockIdx.y) * vocab * hidden + at] =
                        acc[s][j][e] * INVERSE_OPERAND_SCALE<T>;
                } else {
                    dw[at] += scale * acc[s][j][e];  // mutant: dw_assigned
                }
            }
        }
    }
}

// Adds the partial results of the lse pass: nll, argmax, dx (null for the loss alone), and the
// inputs of the grad pass.
template <typename T>
__device__ void combine(const T *w, const uint32_t *targets, const float *loss_scale,
                        float *scratch_at, float *nll, uint32_t *argmax, T *dx, int rows,
                        int vocab, int hidden, int width, int splits) {
    const Scratch scratch(scratch_at, rows, splits);
    const size_t row = blockIdx.x * blockDim.y + threadIdx.y;
    const uint32_t target = row < rows ? targets[row] : IGNORE_INDEX;
    const bool counts = target < vocab;

    float max = scratch.max[row];
    int best = scratch.argmax[row];
    for (int split = 1; split < splits; split++) {
        const size_t at = split * scratch.padded + row;
        if (scratch.max[at] > max) {  // mutant: last_of_equal_splits
            max = scratch.max[at];
            best = scratch.argmax[at];
        }
    }
    const auto rescale = [&](size_t at) {
        return ex2_approx((scratch.max[at] - max) * LOG2E);  // mutant: splits_not_rescaled
    };
    float other_sum = 0.0f;
    for (int split = 0; split < splits; split++) {
        const size_t at = split * scratch.padded + row;
        other_sum += rescale(at) * scratch.sum[at];
    }
    const float target_logit = counts ? scratch.target_logit[row] : LOWEST;
    const float total = other_sum + ex2_approx((target_logit - max) * LOG2E);
    const float target_gap = other_sum / total;
    if (threadIdx.x == 0) {
        // mutant: dw_of_ignored_target
        scratch.lse[row] = counts ? max * LOG2E + log2f(total) - OPERAND_SCALE_LOG2<T> : INFINITY;
        scratch.target[row] = counts ? target : IGNORE_INDEX;
        // mutant: target_gap_not_scaled
        scratch.target_gap[row] = target_gap * (1 << OPERAND_SCALE_LOG2<T>);
        if (row < rows) {
            nll[row] = counts ? logf(total) + (max - target_logit) : 0.0f;
            argmax[row] = best;
        }
    }
    if (dx == nullptr || row >= rows) return;
    const float scale = counts ? *loss_scale : 0.0f;  // mutant: dx_of_ignored_target
    for (int column = threadIdx.x; column < hidden; column += WARP_SIZE) {
        float sum = 0.0f;
        for (int split = 0; split < splits; split++) {
            const size_t at = split * scratch.padded + row;
            sum += rescale(at) * scratch.dx[at * width + column];
        }
        sum /= total;
        // mutant: dx_without_target
        if (counts) sum -= target_gap * to_float(w[static_cast<size_t>(target) * hidden + column]);
        dx[row * hidden + column] = from_float<T>(scale * sum);
    }
}

// lse pass. Launch: blocks of THREADS threads; a grid of (rows / BLOCK_ROWS, splits), both rounded
// up, with `split_vocab` ids per split, a multiple of TILE_ROWS, and no empty split; STAGES *
// TILE_BYTES bytes of dynamic shared memory. Without `training`, only the loss.
#define FWD_DX(WIDTH, T)                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS<WIDTH>, TileConfig<WIDTH>::MIN_BLOCKS)    \
    lce_fwd_dx_##WIDTH##_##T(const T *__restrict__ x, const T *__restrict__ w,                     \
                             const uint32_t *__restrict__ targets, float *__restrict__ scratch,    \
                             int rows, int vocab, int hidden, int split_vocab, int training) {     \
        lce_fwd_dx<WIDTH>(x, w, targets, scratch, rows, vocab, hidden, split_vocab,                \
                          training != 0);                                                          \
    }

// grad pass. Launch: as the lse pass, with a grid of (vocab / BLOCK_ROWS, splits of the rows) and
// 12 STAGES * TILE_ROWS bytes of shared memory more. `partials`: [splits, vocab, hidden], null for
// one split.
#define DW(WIDTH, T)                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS<WIDTH>, TileConfig<WIDTH>::MIN_BLOCKS)    \
    lce_dw_##WIDTH##_##T(const T *__restrict__ x, const T *__restrict__ w,                         \
                             const float *__restrict__ loss_scale, float *__restrict__ scratch,    \
                             float *__restrict__ dw, float *__restrict__ partials, int rows,       \
                             int vocab, int hidden, int split_rows) {                              \
        lce_dw<WIDTH>(x, w, loss_scale, scratch, dw, partials, rows, vocab, hidden,                \
                          split_rows);                                                             \
    }

// Launch: padded / 8 blocks of (32, 8) threads; `width` and `splits` as in the lse pass.
#define COMBINE(T)                                                                                 \
    extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)                                    \
    lce_combine_##T(const T *__restrict__ w, const uint32_t *__restrict__ targets,                 \
                  const float *__restrict__ loss_scale, float *scratch, float *__restrict__ nll,   \
                  uint32_t *__restrict__ argmax, T *__restrict__ dx, int rows, int vocab,          \
                  int hidden, int width, int splits) {                                             \
        combine(w, targets, loss_scale, scratch, nll, argmax, dx, rows, vocab, hidden, width,      \
             splits);                                                                              \
    }

#define ENTRIES(T)                                                                                 \
    FWD_DX(32, T)                                                                                  \
    FWD_DX(64, T)                                                                                  \
    FWD_DX(128, T)                                                                                 \
    FWD_DX(256, T)                                                                                 \
    COMBINE(T)                                                                                     \
    DW(32, T)                                                                                      \
    DW(64, T)                                                                                      \
    DW(128, T)                                                                                     \
    DW(256, T)

ENTRIES(bf16)
ENTRIES(f16)

// dw += loss_scale * sum of the partial sums of the grad pass; `count` is vocab * hidden. Launch:
// blocks of 256 threads along x, any number.
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)
lce_dw_combine(const float *__restrict__ partials, const float *__restrict__ loss_scale,
               float *__restrict__ dw, unsigned long long count, int splits) {
    const size_t step = static_cast<size_t>(gridDim.x) * blockDim.x;
    size_t at = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    for (; at < count; at += step) {
        float sum = 0.0f;
        // mutant: first_partial_dropped
        for (int split = 0; split < splits; split++) sum += partials[split * count + at];
        dw[at] += *loss_scale * sum;  // mutant: combined_dw_assigned
    }
}
