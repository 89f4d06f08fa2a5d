// The head and its cross-entropy without logits in memory, for a hidden size of at most 256: both
// gradients are attention, softmax(x wT) w and its transpose, less the rows of the targets.
//
//     z = x wT                   S = sum of exp(z)
//     nll    = log(S) - z[target]            0 where the target is ignored
//     argmax = the first of equal largest z
//     dx     = loss_scale * (exp(z) / S - onehot(target)) w
//     dw    += loss_scale * (exp(z) / S - onehot(target))T x
//
// Pass 1, `lce_fwd_dx`: a block owns 128 rows of x and streams w; it keeps each row's largest logit,
// sum of exponentials and sum of exp(z - max) w. The vocabulary may be split among blocks:
// `lce_combine` adds the parts up in their order and yields nll, argmax and dx.
// Pass 2, `lce_dw`: a block owns 128 rows of w and streams x; with S known, a gradient is one
// exponential. The rows may be split among blocks: `lce_dw_combine` adds the parts up.
//
// What enters a second product is rounded to T: exp(z - max) without the target's in pass 1,
// exp(z) / S - onehot in pass 2, both times 2^LIFT. The target's own share of dx,
// (exp(z[target]) / S - 1) w[target], is added in f32 by `lce_combine`: of a token that is all but known
// it is a small difference, which a rounding before it would drown. loss_scale comes last, in f32.
//
// x, dx: [rows, hidden], w: [vocab, hidden] in T; dw: [vocab, hidden] in f32; targets, argmax:
// [rows] u32; nll: [rows] f32. A target beyond the vocabulary is ignored. No overlaps. Where hidden is
// no multiple of 8 or a pointer none of 16 bytes, rows come in by single values: right, and slow.
// Pass 1: 4 rows vocab hidden FLOPs, rows vocab exponentials, 4 rows hidden + 2 vocab hidden + 8 rows
// bytes; pass 2: as many and as many, 2 rows hidden + 10 vocab hidden bytes. 6 of the 8 FLOPs are
// useful. Bound by matrix instructions, then by exponentials and issue slots: docs/kernels.md.
#include "lib/ptx.cuh"
#include "lib/reduce.cuh"
#include "lib/vector.cuh"

#include <climits>

constexpr float LOG2_E = 1.4426950408889634f;
// Below every logit, and no infinity: a difference to it is a number.
constexpr float LOWEST = -1e30f;
constexpr unsigned ALL = 0xffffffffu;

constexpr uint32_t IGNORE = 0xffffffffu;

// What lies in [-1, 1] enters a product times 2^LIFT: an f16 has 11 bits only from 2^-14 on and ends
// at 2^16, so this puts the words whose share is as small as 2^-29 where they keep theirs, and those
// to 2^-39 above zero. In bf16 there is no need.
template <typename T>
constexpr int LIFT = std::is_same_v<T, f16> ? 15 : 0;
template <typename T>
constexpr float UNLIFT = 1.0f / (1 << LIFT<T>);

constexpr int OWNED = 128;  // rows a block owns
constexpr int TILE = 64;    // rows it streams at a time, one tile while the next one comes in
constexpr int STAGES = 2;
static_assert(STAGES * TILE == OWNED, "the owned rows come in through the stages");

// How a block is cut, by the width to which hidden is padded: a warp owns STRIPS strips of 16 rows
// and looks at GROUP streamed rows at a time; BLOCKS fit a multiprocessor. Two strips halve the
// traffic of shared memory. What bounds all three is the registers: of a thread's, at most 255,
// STRIPS * 3/4 (WIDTH + GROUP) hold matrices.
template <int WIDTH>
struct Cut;
template <>
struct Cut<32> {
    static constexpr int STRIPS = 2, GROUP = 32, BLOCKS = 4;
};
template <>
struct Cut<64> {
    static constexpr int STRIPS = 2, GROUP = 32, BLOCKS = 3;
};
template <>
struct Cut<128> {
    static constexpr int STRIPS = 2, GROUP = 16, BLOCKS = 2;
};
template <>
struct Cut<256> {
    static constexpr int STRIPS = 1, GROUP = 16, BLOCKS = 1;
};
template <int WIDTH>
constexpr int THREADS = OWNED / (16 * Cut<WIDTH>::STRIPS) * WARP;

// Rows of a tile are an odd number of 16-byte chunks apart, so that eight of them lie in eight
// different banks of that size.
template <int WIDTH>
constexpr int PITCH = 2 * WIDTH + 16;
template <int WIDTH>
constexpr int TILE_BYTES = TILE * PITCH<WIDTH>;

// What the kernels hand each other: 4 padded + splits * padded * (3 + width) words, the last term
// without its width for the loss alone. `padded` is rows up to a multiple of OWNED.
struct Scratch {
    size_t padded;
    float *hit;        // [padded]: the target's logit
    float *lse;        // [padded]: in base 2, less LIFT; infinite where nothing counts
    uint32_t *label;   // [padded]: the target, IGNORE where nothing counts
    float *miss;       // [padded]: 1 - exp(z[target]) / S, times 2^LIFT
    float *max, *sum;  // [splits, padded]: the sum without the target's share
    int *best;         // [splits, padded]
    float *dx;         // [splits, padded, width]: sum of exp(z - max) w without the target's share

    __device__ Scratch(float *at, int rows, int splits)
        : padded(static_cast<size_t>(rows + OWNED - 1) / OWNED * OWNED) {
        hit = at;
        lse = hit + padded;
        label = reinterpret_cast<uint32_t *>(lse + padded);
        miss = lse + 2 * padded;
        max = miss + padded;
        sum = max + splits * padded;
        best = reinterpret_cast<int *>(sum + splits * padded);
        dx = sum + 2 * splits * padded;
    }
};

// The block starts to copy COUNT rows of a matrix, from row `first`, into a tile; rows from `limit`
// and columns from `hidden` on are zero. Without `vectors` it copies by plain loads.
template <int WIDTH, int COUNT, typename T>
__device__ void copy_rows(unsigned char *tile, const T *matrix, int first, int limit, int hidden,
                          bool vectors) {
    constexpr int N = FULL<T>, CHUNKS = WIDTH / N, AT_ONCE = THREADS<WIDTH> / CHUNKS;
    const int row = threadIdx.x / CHUNKS, column = threadIdx.x % CHUNKS * N;
    unsigned char *to = tile + row * PITCH<WIDTH> + column * sizeof(T);
    if (vectors) {
        const T *from = matrix + static_cast<size_t>(first + row) * hidden + column;
        const int rows = column < hidden ? limit - first - row : 0;
#pragma unroll
        for (int i = 0; i < COUNT; i += AT_ONCE) {
            copy_async(shared_address(to + i * PITCH<WIDTH>), i < rows ? from : matrix,
                       i < rows ? 16 : 0);
            from += static_cast<size_t>(AT_ONCE) * hidden;
        }
        return;
    }
#pragma unroll 1
    for (int i = 0; i < COUNT; i += AT_ONCE) {
        const bool there = first + row + i < limit;
        const size_t at = static_cast<size_t>(first + row + i) * hidden + column;
        float values[N];
        for (int k = 0; k < N; k++) {
            values[k] = there && column + k < hidden ? widen(matrix[at + k]) : 0.0f;
        }
        store(reinterpret_cast<T *>(to + i * PITCH<WIDTH>), values);
    }
}

// The rows a warp owns, and their products with the rows that are streamed past.
template <typename T, int WIDTH>
struct Owned {
    static constexpr int STRIPS = Cut<WIDTH>::STRIPS, GROUP = Cut<WIDTH>::GROUP;
    // A product of strips by N columns: thread t of a warp holds, of strip s and eight columns j, the
    // values of row t / 4 + 8 (e / 2) and column 2 (t % 4) + e % 2 at [s][j][e].
    template <int N>
    using Product = float[STRIPS][N / 8][4];

    uint32_t rows[STRIPS][WIDTH / 16][4];
    int lane;

    // Takes the warp's rows out of OWNED rows in shared memory.
    __device__ explicit Owned(const unsigned char *tile) : lane(threadIdx.x % WARP) {
        const int row = threadIdx.x / WARP * 16 * STRIPS + lane % 16;
        const uint32_t at = shared_address(tile) + row * PITCH<WIDTH> + lane / 16 * 16;
#pragma unroll
        for (int s = 0; s < STRIPS; s++) {
#pragma unroll
            for (int k = 0; k < WIDTH / 16; k++) {
                load_matrices(rows[s][k], at + s * 16 * PITCH<WIDTH> + k * 32);
            }
        }
    }

    // Where a value of a product lies: the row within the block, the column within the group.
    __device__ int row(int s, int e) const {
        return (threadIdx.x / WARP * STRIPS + s) * 16 + e / 2 * 8 + lane / 4;
    }
    __device__ int column(int j, int e) const { return j * 8 + lane % 4 * 2 + e % 2; }

    // z = owned rows by GROUP streamed rows.
    __device__ void scores(Product<GROUP> &z, const unsigned char *streamed) const {
        const int row = lane / 16 * 8 + lane % 8;
        const uint32_t at = shared_address(streamed) + row * PITCH<WIDTH> + lane / 8 % 2 * 16;
#pragma unroll
        for (int s = 0; s < STRIPS; s++) {
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
                load_matrices(b, at + j * 8 * PITCH<WIDTH> + k * 32);
#pragma unroll
                for (int s = 0; s < STRIPS; s++) {
                    multiply_add<T>(z[s][j], rows[s][k], b[0], b[1]);
                    multiply_add<T>(z[s][j + 1], rows[s][k], b[2], b[3]);
                }
            }
        }
    }

    // sums += p, rounded to T, by GROUP streamed rows.
    __device__ void add(Product<WIDTH> &sums, const Product<GROUP> &p,
                        const unsigned char *streamed) const {
        const uint32_t at = shared_address(streamed) + lane % 16 * PITCH<WIDTH> + lane / 16 * 16;
#pragma unroll
        for (int k = 0; k < GROUP / 16; k++) {
            uint32_t a[STRIPS][4];
#pragma unroll
            for (int s = 0; s < STRIPS; s++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float *pair = &p[s][2 * k + i / 2][i % 2 * 2];
                    a[s][i] = pack<T>(pair[0], pair[1]);
                }
            }
#pragma unroll
            for (int j = 0; j < WIDTH / 8; j += 2) {
                uint32_t b[4];
                load_matrices_transposed(b, at + k * 16 * PITCH<WIDTH> + j * 16);
#pragma unroll
                for (int s = 0; s < STRIPS; s++) {
                    multiply_add<T>(sums[s][j], a[s], b[0], b[1]);
                    multiply_add<T>(sums[s][j + 1], a[s], b[2], b[3]);
                }
            }
        }
    }
};

// Over the four threads that share a row.
__device__ inline float max_of_row(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL, x, 2));
}
__device__ inline float sum_of_row(float x) {
    x += __shfl_xor_sync(ALL, x, 1);
    return x + __shfl_xor_sync(ALL, x, 2);
}

template <int WIDTH, typename T>
__device__ void pass_rows(const T *x, const T *w, const uint32_t *targets, float *scratch_at,
                          int rows, int vocab, int hidden, int split_words, bool gradient) {
    constexpr int STRIPS = Cut<WIDTH>::STRIPS, GROUP = Cut<WIDTH>::GROUP;
    extern __shared__ __align__(16) unsigned char memory[];
    const Scratch scratch(scratch_at, rows, gridDim.y);
    const int first = blockIdx.x * OWNED;
    const int begin = blockIdx.y * split_words, end = min(vocab, begin + split_words);
    const bool vectors = hidden % FULL<T> == 0 && aligned(x, w);

    copy_rows<WIDTH, OWNED>(memory, x, first, rows, hidden, vectors);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    const Owned<T, WIDTH> own(memory);
    __syncthreads();
    copy_rows<WIDTH, TILE>(memory, w, begin, end, hidden, vectors);
    commit_copies();

    // The two rows of each strip that this thread has a share of.
    float max[STRIPS][2], sum[STRIPS][2];
    uint32_t target[STRIPS][2];
    const int part = blockIdx.y * static_cast<int>(scratch.padded) + first;
#pragma unroll
    for (int s = 0; s < STRIPS; s++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int row = first + own.row(s, 2 * h);
            max[s][h] = LOWEST;
            sum[s][h] = 0.0f;
            if (own.lane % 4 == 0) scratch.best[part + own.row(s, 2 * h)] = begin;
            target[s][h] = row < rows ? targets[row] : IGNORE;
            if (target[s][h] >= vocab) target[s][h] = IGNORE;
        }
    }
    typename Owned<T, WIDTH>::template Product<WIDTH> dx = {};

    int stage = 0;
    for (int tile = begin; tile < end; tile += TILE) {
        // This tile has come, and everybody is done with the one before it.
        wait_for_copies<0>();
        __syncthreads();
        const unsigned char *streamed = memory + stage * TILE_BYTES<WIDTH>;
        stage ^= 1;
        if (tile + TILE < end) {
            copy_rows<WIDTH, TILE>(memory + stage * TILE_BYTES<WIDTH>, w, tile + TILE, end, hidden,
                                   vectors);
            commit_copies();
        }
#pragma unroll 1
        for (int word = tile; word < min(end, tile + TILE); word += GROUP) {
            typename Owned<T, WIDTH>::template Product<GROUP> z;
            own.scores(z, streamed);
            if (word + GROUP > end) {
#pragma unroll
                for (int j = 0; j < GROUP / 8; j++) {
#pragma unroll
                    for (int e = 0; e < 4; e++) {
#pragma unroll
                        for (int s = 0; s < STRIPS; s++) {
                            if (word + own.column(j, e) >= end) z[s][j][e] = -INFINITY;
                        }
                    }
                }
            }

            float top[STRIPS][2];
            bool higher = false, hit = false;
#pragma unroll
            for (int s = 0; s < STRIPS; s++) {
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    top[s][h] = -INFINITY;
#pragma unroll
                    for (int j = 0; j < GROUP / 8; j++) {
                        top[s][h] = fmaxf(top[s][h], fmaxf(z[s][j][2 * h], z[s][j][2 * h + 1]));
                    }
                    higher |= top[s][h] > max[s][h];
                    hit |= target[s][h] - word < GROUP;
                }
            }
            // Seldom, after the first words: some row of the warp has a new maximum.
            if (__any_sync(ALL, higher)) {
#pragma unroll
                for (int s = 0; s < STRIPS; s++) {
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        const float most = max_of_row(top[s][h]);
                        int at = INT_MAX;
#pragma unroll
                        for (int j = GROUP / 8 - 1; j >= 0; j--) {
#pragma unroll
                            for (int e = 2 * h + 1; e >= 2 * h; e--) {
                                if (z[s][j][e] == most) at = word + own.column(j, e);
                            }
                        }
                        at = min(at, __shfl_xor_sync(ALL, at, 1));
                        at = min(at, __shfl_xor_sync(ALL, at, 2));
                        if (most > max[s][h]) {
                            const float shrink = exp2_approx((max[s][h] - most) * LOG2_E);
                            max[s][h] = most;
                            if (own.lane % 4 == 0) scratch.best[part + own.row(s, 2 * h)] = at;
                            sum[s][h] *= shrink;
#pragma unroll
                            for (int j = 0; j < WIDTH / 8; j++) {
                                dx[s][j][2 * h] *= shrink;
                                dx[s][j][2 * h + 1] *= shrink;
                            }
                        }
                    }
                }
            }
            // As seldom: some row of the warp has its target here, whose share `lce_combine` adds.
            if (__any_sync(ALL, hit)) {
#pragma unroll
                for (int s = 0; s < STRIPS; s++) {
#pragma unroll
                    for (int j = 0; j < GROUP / 8; j++) {
#pragma unroll
                        for (int e = 0; e < 4; e++) {
                            if (word + own.column(j, e) == target[s][e / 2]) {
                                scratch.hit[first + own.row(s, e)] = z[s][j][e];
                                z[s][j][e] = -INFINITY;
                            }
                        }
                    }
                }
            }

#pragma unroll
            for (int s = 0; s < STRIPS; s++) {
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const float shift = max[s][h] * LOG2_E - LIFT<T>;
#pragma unroll
                    for (int j = 0; j < GROUP / 8; j++) {
#pragma unroll
                        for (int e = 2 * h; e < 2 * h + 2; e++) {
                            z[s][j][e] = exp2_approx(fmaf(z[s][j][e], LOG2_E, -shift));
                            sum[s][h] += z[s][j][e];
                        }
                    }
                }
            }
            if (gradient) own.add(dx, z, streamed);
            streamed += GROUP * PITCH<WIDTH>;
        }
    }

#pragma unroll
    for (int s = 0; s < STRIPS; s++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int at = part + own.row(s, 2 * h);
            const float all = sum_of_row(sum[s][h]);
            if (own.lane % 4 == 0) {
                scratch.max[at] = max[s][h];
                scratch.sum[at] = all * UNLIFT<T>;
            }
            if (!gradient) continue;
#pragma unroll
            for (int j = 0; j < WIDTH / 8; j++) {
                const float pair[2] = {dx[s][j][2 * h] * UNLIFT<T>,
                                       dx[s][j][2 * h + 1] * UNLIFT<T>};
                store(scratch.dx + static_cast<size_t>(at) * WIDTH + own.column(j, 0), pair);
            }
        }
    }
}

template <int WIDTH, typename T>
__device__ void pass_words(const T *x, const T *w, const float *loss_scale, float *scratch_at,
                           float *dw, float *partials, int rows, int vocab, int hidden,
                           int split_rows) {
    constexpr int STRIPS = Cut<WIDTH>::STRIPS, GROUP = Cut<WIDTH>::GROUP;
    extern __shared__ __align__(16) unsigned char memory[];
    // Behind the tiles, [STAGES, 3, TILE]: lse, label and miss of the tile's rows.
    float *const facts = reinterpret_cast<float *>(memory + STAGES * TILE_BYTES<WIDTH>);
    const Scratch scratch(scratch_at, rows, 0);
    const int first = blockIdx.x * OWNED;
    const int begin = blockIdx.y * split_rows, end = min(rows, begin + split_rows);
    const bool vectors = hidden % FULL<T> == 0 && aligned(x, w);

    copy_rows<WIDTH, OWNED>(memory, w, first, vocab, hidden, vectors);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    const Owned<T, WIDTH> own(memory);
    __syncthreads();
    const auto copy = [&](int stage, int tile) {
        copy_rows<WIDTH, TILE>(memory + stage * TILE_BYTES<WIDTH>, x, tile, end, hidden, vectors);
        const int fact = threadIdx.x / 16, at = threadIdx.x % 16 * 4;
        if (fact < 3) {
            copy_async(shared_address(facts + (3 * stage + fact) * TILE + at),
                       scratch.lse + fact * scratch.padded + tile + at, 16);
        }
        commit_copies();
    };
    if (begin < end) copy(0, begin);

    typename Owned<T, WIDTH>::template Product<WIDTH> sums = {};
    int stage = 0;
    for (int tile = begin; tile < end; tile += TILE) {
        // This tile has come, and everybody is done with the one before it.
        wait_for_copies<0>();
        __syncthreads();
        const unsigned char *streamed = memory + stage * TILE_BYTES<WIDTH>;
        const float *lse = facts + 3 * stage * TILE, *miss = lse + 2 * TILE;
        const uint32_t *label = reinterpret_cast<const uint32_t *>(lse + TILE);
        stage ^= 1;
        if (tile + TILE < end) copy(stage, tile + TILE);
        for (int group = 0; group < TILE; group += GROUP) {
            typename Owned<T, WIDTH>::template Product<GROUP> p;
            own.scores(p, streamed + group * PITCH<WIDTH>);
#pragma unroll
            for (int j = 0; j < GROUP / 8; j++) {
                float shift[2];
                load(shift, lse + group + own.column(j, 0));
#pragma unroll
                for (int s = 0; s < STRIPS; s++) {
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        p[s][j][e] = exp2_approx(fmaf(p[s][j][e], LOG2_E, -shift[e % 2]));
                    }
                }
            }
            // Seldom: a token's target is among the block's words.
            const uint32_t one = label[group + own.lane % GROUP];
            if (__any_sync(ALL, one - first < OWNED)) {
#pragma unroll
                for (int j = 0; j < GROUP / 8; j++) {
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const int token = group + own.column(j, e);
                        const uint32_t row = label[token] - first;
#pragma unroll
                        for (int s = 0; s < STRIPS; s++) {
                            if (row == own.row(s, e)) p[s][j][e] = -miss[token];
                        }
                    }
                }
            }
            own.add(sums, p, streamed + group * PITCH<WIDTH>);
        }
    }

    const float scale = *loss_scale * UNLIFT<T>;
#pragma unroll
    for (int s = 0; s < STRIPS; s++) {
#pragma unroll
        for (int j = 0; j < WIDTH / 8; j++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int word = first + own.row(s, e), column = own.column(j, e);
                if (word >= vocab || column >= hidden) continue;
                const size_t at = static_cast<size_t>(word) * hidden + column;
                if (partials != nullptr) {
                    partials[static_cast<size_t>(blockIdx.y) * vocab * hidden + at] =
                        sums[s][j][e] * UNLIFT<T>;
                } else {
                    dw[at] += scale * sums[s][j][e];
                }
            }
        }
    }
}

// Adds up the parts of pass 1: nll, argmax, dx (null for the loss alone), and what pass 2 asks for.
template <typename T>
__device__ void join(const T *w, const uint32_t *targets, const float *loss_scale,
                     float *scratch_at, float *nll, uint32_t *argmax, T *dx, int rows, int vocab,
                     int hidden, int width, int splits) {
    const Scratch scratch(scratch_at, rows, splits);
    const size_t row = blockIdx.x * blockDim.y + threadIdx.y;
    const uint32_t target = row < rows ? targets[row] : IGNORE;
    const bool counts = target < vocab;

    float max = scratch.max[row];
    int best = scratch.best[row];
    for (int split = 1; split < splits; split++) {
        const size_t at = split * scratch.padded + row;
        if (scratch.max[at] > max) {
            max = scratch.max[at];
            best = scratch.best[at];
        }
    }
    const auto share = [&](size_t at) { return exp2_approx((scratch.max[at] - max) * LOG2_E); };
    float others = 0.0f;
    for (int split = 0; split < splits; split++) {
        const size_t at = split * scratch.padded + row;
        others += share(at) * scratch.sum[at];
    }
    const float hit = counts ? scratch.hit[row] : LOWEST;
    const float all = others + exp2_approx((hit - max) * LOG2_E);
    const float miss = others / all;
    if (threadIdx.x == 0) {
        scratch.lse[row] = counts ? max * LOG2_E + log2f(all) - LIFT<T> : INFINITY;
        scratch.label[row] = counts ? target : IGNORE;
        scratch.miss[row] = miss * (1 << LIFT<T>);
        if (row < rows) {
            nll[row] = counts ? logf(all) + (max - hit) : 0.0f;
            argmax[row] = best;
        }
    }
    if (dx == nullptr || row >= rows) return;
    const float scale = counts ? *loss_scale : 0.0f;
    for (int column = threadIdx.x; column < hidden; column += WARP) {
        float sum = 0.0f;
        for (int split = 0; split < splits; split++) {
            const size_t at = split * scratch.padded + row;
            sum += share(at) * scratch.dx[at * width + column];
        }
        sum /= all;
        if (counts) sum -= miss * widen(w[static_cast<size_t>(target) * hidden + column]);
        dx[row * hidden + column] = narrow<T>(scale * sum);
    }
}

// Pass 1. Launch: blocks of THREADS threads; a grid of (rows / OWNED, parts), both rounded up, with
// `split_words` words a part, a multiple of TILE, and no part empty; STAGES * TILE_BYTES bytes of
// dynamic shared memory. Without `gradient`, the loss alone.
#define ROWS(WIDTH, T)                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS<WIDTH>, Cut<WIDTH>::BLOCKS)               \
    lce_fwd_dx_##WIDTH##_##T(const T *__restrict__ x, const T *__restrict__ w,                      \
                            const uint32_t *__restrict__ targets, float *__restrict__ scratch,     \
                            int rows, int vocab, int hidden, int split_words, int gradient) {      \
        pass_rows<WIDTH>(x, w, targets, scratch, rows, vocab, hidden, split_words, gradient != 0); \
    }

// Pass 2. Launch: as pass 1, with a grid of (vocab / OWNED, parts of the rows) and 12 STAGES * TILE
// bytes of shared memory more. `partials`: [parts, vocab, hidden], or null where there is one part.
#define WORDS(WIDTH, T)                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS<WIDTH>, Cut<WIDTH>::BLOCKS)               \
    lce_dw_##WIDTH##_##T(const T *__restrict__ x, const T *__restrict__ w,                     \
                             const float *__restrict__ loss_scale, float *__restrict__ scratch,    \
                             float *__restrict__ dw, float *__restrict__ partials, int rows,       \
                             int vocab, int hidden, int split_rows) {                              \
        pass_words<WIDTH>(x, w, loss_scale, scratch, dw, partials, rows, vocab, hidden,            \
                          split_rows);                                                             \
    }

// Launch of the join: blocks of (32, 8) threads, `padded` / 8 of them; `width` and `splits` are those of
// pass 1.
#define JOIN(T)                                                                                    \
    extern "C" __global__ void __launch_bounds__(256)                                              \
    lce_combine_##T(const T *__restrict__ w, const uint32_t *__restrict__ targets,                   \
                  const float *__restrict__ loss_scale, float *scratch, float *__restrict__ nll,   \
                  uint32_t *__restrict__ argmax, T *__restrict__ dx, int rows, int vocab,          \
                  int hidden, int width, int splits) {                                             \
        join(w, targets, loss_scale, scratch, nll, argmax, dx, rows, vocab, hidden, width,         \
             splits);                                                                              \
    }

#define ENTRIES(T)                                                                                 \
    ROWS(32, T)                                                                                    \
    ROWS(64, T)                                                                                    \
    ROWS(128, T)                                                                                   \
    ROWS(256, T)                                                                                   \
    JOIN(T)                                                                                        \
    WORDS(32, T)                                                                                   \
    WORDS(64, T)                                                                                   \
    WORDS(128, T)                                                                                  \
    WORDS(256, T)

ENTRIES(bf16)
ENTRIES(f16)

// Adds up the parts of pass 2: dw += loss_scale * their sum; `count` is vocab * hidden. Launch: blocks
// of 256 threads along x, any number of them.
extern "C" __global__ void __launch_bounds__(256)
lce_dw_combine(const float *__restrict__ partials, const float *__restrict__ loss_scale,
                float *__restrict__ dw, unsigned long long count, int splits) {
    const size_t step = static_cast<size_t>(gridDim.x) * blockDim.x;
    size_t at = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    for (; at < count; at += step) {
        float sum = 0.0f;
        for (int split = 0; split < splits; split++) sum += partials[split * count + at];
        dw[at] += *loss_scale * sum;
    }
}
