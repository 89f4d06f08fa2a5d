// Embedding lookup and its gradient:
//
//     out[r] = table[ids[r]]                     dtable[ids[r]] += dout[r]
//
// ids: [rows] below 2^18; out, dout: [rows, hidden]; table: [vocab, hidden]; dtable: [vocab,
// hidden] in f32. No overlaps. Bytes at bf16: 4 rows hidden forward, 2 rows hidden + 8 hidden per
// distinct id backward. Negligible FLOPs: bound by memory.
//
// The gradient is deterministic, without float atomics: rows are sorted by id, stably; each chunk
// of 64 sorted rows is summed run by run (a run is the rows of one id); partial sums of a run that
// spans several chunks are combined in their order. Launches, with tiles = ceil(rows / 1024) and
// chunks = ceil(rows / 64):
//
//     for shift in 0, 9 (only 0 if vocab <= 512):
//         embedding_sort_histogram   tiles blocks of 512   digit counts (skipped for one tile)
//         embedding_sort_scatter     tiles blocks of 512   one stable pass of an LSD radix sort
//     embedding_backward_T           chunks                segmented sums
//     embedding_backward_combine     chunks                runs that span several chunks
//
// Scratch: two orders, [rows] each (null in the first pass: the identity); counts [tiles, 512];
// partials [chunks, 2, hidden] in f32.
#include "lib/reduce.cuh"
#include "lib/vector.cuh"

// Launch: blocks of (columns, rows) threads, at most 256; any grid along x.
template <int N, typename T>
__device__ void embedding(const unsigned *ids, const T *table, T *out, int rows, int hidden) {
    for (int base = blockIdx.x * blockDim.y; base < rows; base += gridDim.x * blockDim.y) {
        const int row = base + threadIdx.y;
        if (row >= rows) return;
        const T *from = table + static_cast<size_t>(ids[row]) * hidden;
        T *to = out + static_cast<size_t>(row) * hidden;
        for (int column = N * threadIdx.x; column < hidden; column += N * blockDim.x) {
            copy<N>(to + column, from + column);
        }
    }
}

template <typename T>
__device__ void embedding(const unsigned *ids, const T *table, T *out, int rows, int hidden) {
    if (hidden % VEC<T> == 0 && aligned(table, out)) {
        embedding<VEC<T>>(ids, table, out, rows, hidden);
    } else {
        embedding<1>(ids, table, out, rows, hidden);
    }
}

constexpr int RADIX = EMBEDDING_RADIX;
static_assert(RADIX == 1 << EMBEDDING_DIGIT_BITS);
constexpr int SORT_THREADS = RADIX;  // per block: one per digit
constexpr int SORT_WARPS = SORT_THREADS / WARP_SIZE;
constexpr int TILE = EMBEDDING_TILE;
constexpr int ROUNDS = TILE / SORT_THREADS;

// Position in the tile of a thread's row: warp by warp, round by round, lane by lane.
__device__ inline int tile_position(int round) {
    const int warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE;
    return blockIdx.x * TILE + (warp * ROUNDS + round) * WARP_SIZE + lane;
}

// Rank of each of a thread's rows among the rows of its warp with the same digit; `counts` becomes
// the per-warp histogram. Rows past the end have digit RADIX, which is not counted.
__device__ void rank_tile(const int (&digits)[ROUNDS], unsigned (&ranks)[ROUNDS],
                          unsigned (&counts)[SORT_WARPS][RADIX]) {
    const int warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE;
    for (int digit = lane; digit < RADIX; digit += WARP_SIZE) counts[warp][digit] = 0;
    __syncwarp();
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
        const int digit = digits[round];
        const unsigned same = __match_any_sync(FULL_MASK, digit);
        const unsigned before = __popc(same & ((1u << lane) - 1));
        const unsigned seen = digit < RADIX ? counts[warp][digit] : 0;
        ranks[round] = seen + before;  // mutant: unstable_ranks
        __syncwarp();  // mutant: counts_overwritten
        if (before == 0 && digit < RADIX) counts[warp][digit] = seen + __popc(same);
        __syncwarp();
    }
    __syncthreads();  // mutant: counts_read_early
}

// Rows at a thread's positions, and their digits.
__device__ void read_tile(const unsigned *ids, const unsigned *order, int rows, int shift,
                          unsigned (&at)[ROUNDS], int (&digits)[ROUNDS]) {
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
        const int position = tile_position(round);
        digits[round] = RADIX;
        if (position >= rows) continue;
        at[round] = order != nullptr ? order[position] : position;
        digits[round] = ids[at[round]] >> shift & (RADIX - 1);  // mutant: low_digit_twice
    }
}

extern "C" __global__ void __launch_bounds__(SORT_THREADS)
embedding_sort_histogram(const unsigned *__restrict__ ids, const unsigned *__restrict__ order,
                         unsigned *__restrict__ counts, int rows, int shift) {
    __shared__ unsigned warps[SORT_WARPS][RADIX];
    unsigned at[ROUNDS], ranks[ROUNDS];
    int digits[ROUNDS];
    read_tile(ids, order, rows, shift, at, digits);
    rank_tile(digits, ranks, warps);
    unsigned count = 0;
    for (int warp = 0; warp < SORT_WARPS; warp++) count += warps[warp][threadIdx.x];
    counts[blockIdx.x * RADIX + threadIdx.x] = count;
}

// `counts` is null if there is only one tile.
extern "C" __global__ void __launch_bounds__(SORT_THREADS)
embedding_sort_scatter(const unsigned *__restrict__ ids, const unsigned *__restrict__ order,
                       const unsigned *__restrict__ counts, unsigned *__restrict__ sorted,
                       int rows, int shift) {
    __shared__ unsigned warps[SORT_WARPS][RADIX];
    __shared__ unsigned totals[SORT_WARPS];
    const int digit = threadIdx.x, lane = digit % WARP_SIZE;
    unsigned at[ROUNDS], ranks[ROUNDS];
    int digits[ROUNDS];
    read_tile(ids, order, rows, shift, at, digits);
    rank_tile(digits, ranks, warps);
    // One thread per digit: its total count, and its count in the tiles before this one.
    unsigned total = 0, before = 0;
    if (counts != nullptr) {
        for (int tile = 0; tile < gridDim.x; tile++) {
            if (tile == blockIdx.x) before = total;  // mutant: earlier_tiles_forgotten
            total += counts[tile * RADIX + digit];
        }
    } else {
        for (int warp = 0; warp < SORT_WARPS; warp++) total += warps[warp][digit];
    }
    // Inclusive prefix sum of the totals over digits, first within the warp.
    unsigned prefix = total;
    for (int offset = 1; offset < WARP_SIZE; offset *= 2) {
        const unsigned lower = __shfl_up_sync(FULL_MASK, prefix, offset);
        if (lane >= offset) prefix += lower;
    }
    if (lane == WARP_SIZE - 1) totals[digit / WARP_SIZE] = prefix;
    __syncthreads();
    unsigned place = prefix - total + before;
    for (int warp = 0; warp < digit / WARP_SIZE; warp++) place += totals[warp];
    for (int warp = 0; warp < SORT_WARPS; warp++) {
        const unsigned count = warps[warp][digit];
        warps[warp][digit] = place;
        place += count;
    }
    __syncthreads();
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
        if (digits[round] < RADIX) {
            sorted[warps[digit / WARP_SIZE][digits[round]] + ranks[round]] = at[round];
        }
    }
}

constexpr int CHUNK = EMBEDDING_CHUNK;

// The partial sum of a run that began in an earlier chunk goes to partials[chunk, 0], that of a run
// which continues in the next chunk to partials[chunk, 1], that of a run which does both to
// partials[chunk, 0].
//
// Launch: blocks of (columns, chunks) threads, at most 256; any grid along x.
template <int N, typename T>
__device__ void sum_chunks(const unsigned *ids, const unsigned *sorted, const T *dout,
                           float *dtable, float *partials, int rows, int hidden) {
    const int chunks = (rows + CHUNK - 1) / CHUNK;
    for (int base = blockIdx.x * blockDim.y; base < chunks; base += gridDim.x * blockDim.y) {
        const int chunk = base + threadIdx.y;
        if (chunk >= chunks) return;
        const int begin = chunk * CHUNK, end = min(begin + CHUNK, rows);
        const unsigned none = 0xffffffffu;  // not an id
        const unsigned previous = begin > 0 ? ids[sorted[begin - 1]] : none;
        const unsigned next = end < rows ? ids[sorted[end]] : none;
        for (int column = N * threadIdx.x; column < hidden; column += N * blockDim.x) {
            float sum[N] = {};
            bool began_before = ids[sorted[begin]] == previous;
            for (int i = begin; i < end; i++) {
                const unsigned row = sorted[i], id = ids[row];
                const unsigned after = i + 1 < end ? ids[sorted[i + 1]] : none;
                float values[N];
                load(values, dout + static_cast<size_t>(row) * hidden + column);
#pragma unroll
                for (int n = 0; n < N; n++) sum[n] += values[n];
                if (id == after) continue;
                const bool continues = i + 1 == end && id == next;
                if (began_before || continues) {  // mutant: partial_run_added
                    // mutant: partial_in_wrong_slot
                    const size_t part = 2 * static_cast<size_t>(chunk) + (began_before ? 0 : 1);
                    store(partials + part * hidden + column, sum);
                } else {
                    float *to = dtable + static_cast<size_t>(id) * hidden + column;
                    load(values, to);
#pragma unroll
                    for (int n = 0; n < N; n++) sum[n] = values[n] + sum[n];
                    store(to, sum);
                }
#pragma unroll
                for (int n = 0; n < N; n++) sum[n] = 0.0f;
                began_before = false;
            }
        }
    }
}

// Vectors of four: 16 bytes of f32, 8 of a 16-bit dtype.
template <typename T>
__device__ void embedding_backward(const unsigned *ids, const unsigned *sorted, const T *dout,
                                   float *dtable, float *partials, int rows, int hidden) {
    if (hidden % 4 == 0 && aligned(dout, dtable, partials)) {
        sum_chunks<4>(ids, sorted, dout, dtable, partials, rows, hidden);
    } else {
        sum_chunks<1>(ids, sorted, dout, dtable, partials, rows, hidden);
    }
}

// Adds up the runs that span several chunks: the chunk in which a run begins sums its partials.
// Launch: as embedding_backward.
template <int N>
__device__ void combine_runs(const unsigned *ids, const unsigned *sorted, const float *partials,
                             float *dtable, int rows, int hidden) {
    // No run continues after the last chunk.
    const int chunks = (rows + CHUNK - 1) / CHUNK - 1;
    for (int base = blockIdx.x * blockDim.y; base < chunks; base += gridDim.x * blockDim.y) {
        const int chunk = base + threadIdx.y;
        if (chunk >= chunks) return;
        const int begin = chunk * CHUNK, end = begin + CHUNK;
        const unsigned id = ids[sorted[end - 1]];
        const bool continues = ids[sorted[end]] == id;
        const bool began_before = begin > 0 && ids[sorted[begin - 1]] == id;
        if (!continues || began_before) continue;  // mutant: long_run_added_twice
        int last = chunk + 1;
        while ((last + 1) * CHUNK < rows && ids[sorted[(last + 1) * CHUNK]] == id) last++;
        for (int column = N * threadIdx.x; column < hidden; column += N * blockDim.x) {
            float sum[N], values[N];
            load(sum, partials + (2 * static_cast<size_t>(chunk) + 1) * hidden + column);
#pragma unroll 4
            // mutant: last_partial_dropped
            for (int part = chunk + 1; part <= last; part++) {
                load(values, partials + 2 * static_cast<size_t>(part) * hidden + column);
#pragma unroll
                for (int n = 0; n < N; n++) sum[n] += values[n];
            }
            float *to = dtable + static_cast<size_t>(id) * hidden + column;
            load(values, to);
#pragma unroll
            for (int n = 0; n < N; n++) sum[n] = values[n] + sum[n];
            store(to, sum);
        }
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)
embedding_backward_combine(const unsigned *__restrict__ ids, const unsigned *__restrict__ sorted,
                    const float *__restrict__ partials, float *__restrict__ dtable, int rows,
                    int hidden) {
    if (hidden % 4 == 0 && aligned(partials, dtable)) {
        combine_runs<4>(ids, sorted, partials, dtable, rows, hidden);
    } else {
        combine_runs<1>(ids, sorted, partials, dtable, rows, hidden);
    }
}

#define ENTRIES(T)                                                                                 \
    extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)                                    \
    embedding_##T(const unsigned *__restrict__ ids, const T *__restrict__ table,                   \
                  T *__restrict__ out, int rows, int hidden) {                                     \
        embedding(ids, table, out, rows, hidden);                                                  \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)                                    \
    embedding_backward_##T(const unsigned *__restrict__ ids, const unsigned *__restrict__ sorted,  \
                           const T *__restrict__ dout, float *__restrict__ dtable,                 \
                           float *__restrict__ partials, int rows, int hidden) {                   \
        embedding_backward(ids, sorted, dout, dtable, partials, rows, hidden);                     \
    }

ENTRIES(f32)
ENTRIES(bf16)
ENTRIES(f16)
