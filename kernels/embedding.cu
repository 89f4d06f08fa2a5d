// The embedding and its gradient:
//
//     out[r] = table[ids[r]]                     dtable[ids[r]] += dout[r]
//
// ids: [rows] below 2^18; out, dout: [rows, hidden]; table: [vocab, hidden]; dtable: the same in
// f32. No two overlap.
// Bytes at bf16: 4 rows hidden forward, 2 rows hidden + 8 hidden a distinct id backward. No FLOPs
// to speak of: bound by memory.
//
// The gradient has a fixed order and no float atomics: the rows are sorted by id, equal ids in the
// order of the rows; each chunk of 64 sorted rows is added up run by run, a run being the rows of
// one id; what a run left in several chunks is joined in their order. Launches, with
// tiles = ceil(rows / 1024), chunks = ceil(rows / 64):
//
//     for shift in 0, 9 (one of them where vocab <= 512):
//         embedding_sort_histogram  tiles blocks of 512   counts of the tile's digits (left out for one tile)
//         embedding_sort_scatter   tiles blocks of 512   one stable pass of a radix sort
//     embedding_backward_T                       chunks
//     embedding_backward_combine                    the runs that several chunks share
//
// Scratch: two orders, [rows] each (the first pass reads none, null: the rows as they come); counts
// [tiles, 512]; partials [chunks, 2, hidden] in f32.
#include "lib/reduce.cuh"
#include "lib/vector.cuh"

// Launch: blocks of (columns, rows at once) threads, at most 256; a grid along x of any size.
template <int N, typename T>
__device__ void embed(const unsigned *ids, const T *table, T *out, int rows, int hidden) {
    for (int base = blockIdx.x * blockDim.y; base < rows; base += gridDim.x * blockDim.y) {
        const int row = base + threadIdx.y;
        if (row >= rows) return;
        const T *from = table + static_cast<size_t>(ids[row]) * hidden;
        T *to = out + static_cast<size_t>(row) * hidden;
        for (int column = N * threadIdx.x; column < hidden; column += N * blockDim.x) {
            *reinterpret_cast<Pack<T, N> *>(to + column) =
                *reinterpret_cast<const Pack<T, N> *>(from + column);
        }
    }
}

template <typename T>
__device__ void embed_any(const unsigned *ids, const T *table, T *out, int rows, int hidden) {
    if (hidden % FULL<T> == 0 && aligned(table, out)) {
        embed<FULL<T>>(ids, table, out, rows, hidden);
    } else {
        embed<1>(ids, table, out, rows, hidden);
    }
}

constexpr int DIGITS = 512;           // 9 bits a pass
constexpr int SORTERS = 512;          // threads of a block: one a digit
constexpr int SORT_WARPS = SORTERS / WARP;
constexpr int TILE = 1024;            // rows a block sorts
constexpr int ROUNDS = TILE / SORTERS;

// A tile in the order of its rows: warp by warp, round by round, lane by lane.
__device__ inline int tile_position(int round) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    return blockIdx.x * TILE + (warp * ROUNDS + round) * WARP + lane;
}

// How many rows of its warp with the same digit go before each of a thread's rows; `counts` becomes
// the number of each digit by warp. Rows past the end have the digit DIGITS, which none counts.
__device__ void rank_tile(const int (&digits)[ROUNDS], unsigned (&ranks)[ROUNDS],
                          unsigned (&counts)[SORT_WARPS][DIGITS]) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    for (int digit = lane; digit < DIGITS; digit += WARP) counts[warp][digit] = 0;
    __syncwarp();
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
        const int digit = digits[round];
        const unsigned same = __match_any_sync(0xffffffffu, digit);
        const unsigned before = __popc(same & ((1u << lane) - 1));
        const unsigned seen = digit < DIGITS ? counts[warp][digit] : 0;
        ranks[round] = seen + before;
        __syncwarp();
        if (before == 0 && digit < DIGITS) counts[warp][digit] = seen + __popc(same);
        __syncwarp();
    }
    __syncthreads();
}

// The row at each of a thread's positions, and its digit.
__device__ void read_tile(const unsigned *ids, const unsigned *order, int rows, int shift,
                          unsigned (&at)[ROUNDS], int (&digits)[ROUNDS]) {
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
        const int position = tile_position(round);
        digits[round] = DIGITS;
        if (position >= rows) continue;
        at[round] = order != nullptr ? order[position] : position;
        digits[round] = ids[at[round]] >> shift & (DIGITS - 1);
    }
}

extern "C" __global__ void __launch_bounds__(SORTERS)
embedding_sort_histogram(const unsigned *__restrict__ ids, const unsigned *__restrict__ order,
            unsigned *__restrict__ counts, int rows, int shift) {
    __shared__ unsigned warps[SORT_WARPS][DIGITS];
    unsigned at[ROUNDS], ranks[ROUNDS];
    int digits[ROUNDS];
    read_tile(ids, order, rows, shift, at, digits);
    rank_tile(digits, ranks, warps);
    unsigned count = 0;
    for (int warp = 0; warp < SORT_WARPS; warp++) count += warps[warp][threadIdx.x];
    counts[blockIdx.x * DIGITS + threadIdx.x] = count;
}

// `counts` is null where there is one tile.
extern "C" __global__ void __launch_bounds__(SORTERS)
embedding_sort_scatter(const unsigned *__restrict__ ids, const unsigned *__restrict__ order,
           const unsigned *__restrict__ counts, unsigned *__restrict__ sorted, int rows, int shift) {
    __shared__ unsigned warps[SORT_WARPS][DIGITS];
    __shared__ unsigned totals[SORT_WARPS];
    const int digit = threadIdx.x, lane = digit % WARP;
    unsigned at[ROUNDS], ranks[ROUNDS];
    int digits[ROUNDS];
    read_tile(ids, order, rows, shift, at, digits);
    rank_tile(digits, ranks, warps);
    // A thread a digit: how many there are in all, and how many in the tiles before this one.
    unsigned total = 0, before = 0;
    if (counts != nullptr) {
        for (int tile = 0; tile < gridDim.x; tile++) {
            if (tile == blockIdx.x) before = total;
            total += counts[tile * DIGITS + digit];
        }
    } else {
        for (int warp = 0; warp < SORT_WARPS; warp++) total += warps[warp][digit];
    }
    // The sum of the totals of the digits up to this one, first within the warp.
    unsigned upto = total;
    for (int offset = 1; offset < WARP; offset *= 2) {
        const unsigned lower = __shfl_up_sync(0xffffffffu, upto, offset);
        if (lane >= offset) upto += lower;
    }
    if (lane == WARP - 1) totals[digit / WARP] = upto;
    __syncthreads();
    unsigned place = upto - total + before;
    for (int warp = 0; warp < digit / WARP; warp++) place += totals[warp];
    for (int warp = 0; warp < SORT_WARPS; warp++) {
        const unsigned count = warps[warp][digit];
        warps[warp][digit] = place;
        place += count;
    }
    __syncthreads();
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
        if (digits[round] < DIGITS) {
            sorted[warps[digit / WARP][digits[round]] + ranks[round]] = at[round];
        }
    }
}

constexpr int CHUNK = 64;

// A run that began in an earlier chunk is left in partials[chunk, 0], one that goes on into the next
// chunk in partials[chunk, 1]; one that does both in the first of them.
//
// Launch: blocks of (columns, chunks at once) threads, at most 256; a grid along x of any size.
template <int N, typename T>
__device__ void add_chunks(const unsigned *ids, const unsigned *sorted, const T *dout,
                           float *dtable, float *partials, int rows, int hidden) {
    const int chunks = (rows + CHUNK - 1) / CHUNK;
    for (int base = blockIdx.x * blockDim.y; base < chunks; base += gridDim.x * blockDim.y) {
        const int chunk = base + threadIdx.y;
        if (chunk >= chunks) return;
        const int begin = chunk * CHUNK, end = min(begin + CHUNK, rows);
        const unsigned none = 0xffffffffu;
        const unsigned past = begin > 0 ? ids[sorted[begin - 1]] : none;
        const unsigned next = end < rows ? ids[sorted[end]] : none;
        for (int column = N * threadIdx.x; column < hidden; column += N * blockDim.x) {
            float sum[N] = {};
            bool joined = ids[sorted[begin]] == past;
            for (int i = begin; i < end; i++) {
                const unsigned row = sorted[i], id = ids[row];
                const unsigned after = i + 1 < end ? ids[sorted[i + 1]] : none;
                float values[N];
                load(values, dout + static_cast<size_t>(row) * hidden + column);
#pragma unroll
                for (int n = 0; n < N; n++) sum[n] += values[n];
                if (id == after) continue;
                const bool goes_on = i + 1 == end && id == next;
                if (joined || goes_on) {
                    const size_t part = 2 * static_cast<size_t>(chunk) + (joined ? 0 : 1);
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
                joined = false;
            }
        }
    }
}

// Four values: 16 bytes of f32, 8 of a two-byte type.
template <typename T>
__device__ void add_chunks_any(const unsigned *ids, const unsigned *sorted, const T *dout,
                               float *dtable, float *partials, int rows, int hidden) {
    if (hidden % 4 == 0 && aligned(dout, dtable, partials)) {
        add_chunks<4>(ids, sorted, dout, dtable, partials, rows, hidden);
    } else {
        add_chunks<1>(ids, sorted, dout, dtable, partials, rows, hidden);
    }
}

// The chunk in which a run begins that does not end there adds it up. Launch: as before.
template <int N>
__device__ void join(const unsigned *ids, const unsigned *sorted, const float *partials,
                     float *dtable, int rows, int hidden) {
    // The last chunk begins no run that goes on.
    const int chunks = (rows + CHUNK - 1) / CHUNK - 1;
    for (int base = blockIdx.x * blockDim.y; base < chunks; base += gridDim.x * blockDim.y) {
        const int chunk = base + threadIdx.y;
        if (chunk >= chunks) return;
        const int begin = chunk * CHUNK, end = begin + CHUNK;
        const unsigned id = ids[sorted[end - 1]];
        const bool goes_on = ids[sorted[end]] == id;
        const bool began_before = begin > 0 && ids[sorted[begin - 1]] == id;
        if (!goes_on || began_before) continue;
        int last = chunk + 1;
        while ((last + 1) * CHUNK < rows && ids[sorted[(last + 1) * CHUNK]] == id) last++;
        for (int column = N * threadIdx.x; column < hidden; column += N * blockDim.x) {
            float sum[N], values[N];
            load(sum, partials + (2 * static_cast<size_t>(chunk) + 1) * hidden + column);
#pragma unroll 4
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

extern "C" __global__ void __launch_bounds__(256)
embedding_backward_combine(const unsigned *__restrict__ ids, const unsigned *__restrict__ sorted,
                    const float *__restrict__ partials, float *__restrict__ dtable, int rows,
                    int hidden) {
    if (hidden % 4 == 0 && aligned(partials, dtable)) {
        join<4>(ids, sorted, partials, dtable, rows, hidden);
    } else {
        join<1>(ids, sorted, partials, dtable, rows, hidden);
    }
}

extern "C" __global__ void __launch_bounds__(256)
embedding_f32(const unsigned *__restrict__ ids, const float *__restrict__ table,
          float *__restrict__ out, int rows, int hidden) {
    embed_any(ids, table, out, rows, hidden);
}

extern "C" __global__ void __launch_bounds__(256)
embedding_bf16(const unsigned *__restrict__ ids, const bf16 *__restrict__ table,
           bf16 *__restrict__ out, int rows, int hidden) {
    embed_any(ids, table, out, rows, hidden);
}

extern "C" __global__ void __launch_bounds__(256)
embedding_f16(const unsigned *__restrict__ ids, const half *__restrict__ table,
          half *__restrict__ out, int rows, int hidden) {
    embed_any(ids, table, out, rows, hidden);
}

extern "C" __global__ void __launch_bounds__(256)
embedding_backward_f32(const unsigned *__restrict__ ids, const unsigned *__restrict__ sorted,
                   const float *__restrict__ dout, float *__restrict__ dtable,
                   float *__restrict__ partials, int rows, int hidden) {
    add_chunks_any(ids, sorted, dout, dtable, partials, rows, hidden);
}

extern "C" __global__ void __launch_bounds__(256)
embedding_backward_bf16(const unsigned *__restrict__ ids, const unsigned *__restrict__ sorted,
                    const bf16 *__restrict__ dout, float *__restrict__ dtable,
                    float *__restrict__ partials, int rows, int hidden) {
    add_chunks_any(ids, sorted, dout, dtable, partials, rows, hidden);
}

extern "C" __global__ void __launch_bounds__(256)
embedding_backward_f16(const unsigned *__restrict__ ids, const unsigned *__restrict__ sorted,
                   const half *__restrict__ dout, float *__restrict__ dtable,
                   float *__restrict__ partials, int rows, int hidden) {
    add_chunks_any(ids, sorted, dout, dtable, partials, rows, hidden);
}
