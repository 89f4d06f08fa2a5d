// Matmul: C = A B or C += A B, summed in f32 and rounded once; a batch of them if gridDim.y is above 1.
// For machines without cuBLASLt, and for shapes that it has no algorithm for.
//
// A: m x k, B: k x n in one dtype; C: m x n, row-major, in that dtype or f32. Rows may have gaps; what
// lies between them is neither read nor written. No overlaps.
// Bytes: those of A, B and C once, if the cache holds what blocks share. 2 m n k FLOPs.
//
// matmul_LAYOUT_T: tensor cores. The layout says how A and B lie in memory, row-major (n) or
// transposed (t). Rows of A and B begin at multiples of 16 bytes.
//
// - Tiling: a block of four warps computes 128 x 64 of C; a warp computes 64 x 32.
// - Pipeline: three stages of 32 of k, filled by cp.async with zeros past the edges.
// - Shared memory: rows as they lie in memory, 16 bytes apart, so that the eight rows that ldmatrix
//   reads at once lie in different banks.
//
// matmul_simt_T: f32 multiply-add on the CUDA cores; any element and row strides.
//
// - Tiling: a block of 256 threads computes 64 x 64 of C, 4 x 4 per thread, 16 of k at a time.
//
// Both: blocks along x are the tiles of C, m fastest. The order of a sum depends on k alone.
#include "lib/ptx.cuh"
#include "lib/vector.cuh"

// C and the way it is written.
struct Output {
    void *c;
    int rows, cols;
    size_t stride;
    bool accumulate, is_f32;

    // Whether two values at an even column are aligned to their total size.
    __device__ bool has_pairs() const {
        return stride % 2 == 0 && reinterpret_cast<uintptr_t>(c) % 8 == 0;
    }

    template <int N, typename T>
    __device__ void write(T *to, float (&values)[N]) const {
        if (accumulate) {
            float before[N];
            load(before, to);
#pragma unroll
            for (int i = 0; i < N; i++) values[i] += before[i];  // mutant: matmul_sum_lost
        }
        store(to, values);
    }

    template <int N, typename T>
    __device__ void write(int row, int col, float (&values)[N]) const {
        const size_t at = row * stride + col;
        if (is_f32) {
            write(static_cast<float *>(c) + at, values);
        } else {
            write(static_cast<T *>(c) + at, values);
        }
    }

    // Values at columns `col` and `col` + 1.
    template <typename T>
    __device__ void write_pair(int row, int col, float x, float y) const {
        if (row >= rows) return;  // mutant: matmul_rows_past_the_end_written
        if (col + 1 < cols && has_pairs()) {
            float pair[2] = {x, y};
            write<2, T>(row, col, pair);
            return;
        }
        float first[1] = {x}, second[1] = {y};
        if (col < cols) write<1, T>(row, col, first);
        if (col + 1 < cols) write<1, T>(row, col + 1, second);
    }
};

// The matrix of this block in a batch.
template <typename T>
__device__ T *in_batch(T *matrices, size_t elements) {
    return matrices + blockIdx.y * elements;  // mutant: matmul_first_of_the_batch
}
__device__ inline Output output(void *c, int rows, int cols, size_t stride, size_t batch_stride,
                                int accumulate, int is_f32, int size) {
    char *at = static_cast<char *>(c) + blockIdx.y * batch_stride * (is_f32 ? 4 : size);
    return {at, rows, cols, stride, accumulate != 0, is_f32 != 0};
}

constexpr int TILE_M = MATMUL_TILE[0], TILE_N = MATMUL_TILE[1], TILE_K = 32, STAGES = 3;
constexpr int WARP_M = 64, WARP_N = 32, THREADS = MATMUL_THREADS;
constexpr int PAD = 8;  // elements of 2 bytes

// A tile of a matrix in shared memory, [ROWS, COLS] as it is stored.
template <typename T, int ROWS, int COLS>
struct Tile {
    static constexpr int PITCH = COLS + PAD;
    static constexpr int BYTES = ROWS * PITCH * sizeof(T);

    // Begins to copy the tile at (row, col) of a matrix; zeros past its edges.
    __device__ static void copy(uint32_t tile, const T *matrix, size_t stride, int rows, int cols,
                                int row, int col) {
        constexpr int CHUNKS = COLS / VEC<T>;
#pragma unroll
        for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
            const int r = i / CHUNKS, c = i % CHUNKS * VEC<T>;
            // mutant: matmul_zeros_missing
            const int count = row + r < rows ? min(max(cols - col - c, 0), VEC<T>) : 0;
            const T *from = count > 0 ? matrix + (row + r) * stride + col + c : matrix;
            cp_async16(tile + (r * PITCH + c) * sizeof(T), from, count * sizeof(T));
        }
    }

    // 16 rows and 16 columns from (row, col) on. The four 8 x 8 matrices are in the order (0, 0),
    // (8, 0), (0, 8), (8, 8) by rows and columns; transposed in place, and in that order of the
    // transpose, if `TRANSPOSED`.
    template <bool TRANSPOSED>
    __device__ static void load(uint32_t (&d)[4], uint32_t tile, int row, int col) {
        const int lane = threadIdx.x % 32;
        const int low = lane / 8 % 2 * 8, high = lane / 16 * 8;
        const int r = row + lane % 8 + (TRANSPOSED ? high : low);
        const int c = col + (TRANSPOSED ? low : high);
        const uint32_t address = tile + (r * PITCH + c) * sizeof(T);
        if constexpr (TRANSPOSED) {
            ldmatrix_x4_trans(d, address);
        } else {
            ldmatrix_x4(d, address);
        }
    }
};

template <typename T, bool A_TRANSPOSED, bool B_TRANSPOSED>
__device__ void matmul(const T *a, const T *b, Output c, int m, int n, int k, size_t a_stride,
                       size_t b_stride) {
    using TileA = Tile<T, A_TRANSPOSED ? TILE_K : TILE_M, A_TRANSPOSED ? TILE_M : TILE_K>;
    using TileB = Tile<T, B_TRANSPOSED ? TILE_N : TILE_K, B_TRANSPOSED ? TILE_K : TILE_N>;
    constexpr int STAGE_BYTES = TileA::BYTES + TileB::BYTES;
    __shared__ alignas(16) unsigned char stages[STAGES * STAGE_BYTES];
    const uint32_t shared = cvta_to_shared(stages);

    const int m_tiles = (m + TILE_M - 1) / TILE_M;
    const int row = blockIdx.x % m_tiles * TILE_M, col = blockIdx.x / m_tiles * TILE_N;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_row = warp % 2 * WARP_M, warp_col = warp / 2 * WARP_N;
    const int k_tiles = (k + TILE_K - 1) / TILE_K;

    auto fill = [&](int tile) {
        if (tile < k_tiles) {
            const uint32_t stage = shared + tile % STAGES * STAGE_BYTES;
            const int from = tile * TILE_K;
            if constexpr (A_TRANSPOSED) {
                TileA::copy(stage, a, a_stride, k, m, from, row);
            } else {
                TileA::copy(stage, a, a_stride, m, k, row, from);
            }
            if constexpr (B_TRANSPOSED) {
                TileB::copy(stage + TileA::BYTES, b, b_stride, n, k, col, from);
            } else {
                TileB::copy(stage + TileA::BYTES, b, b_stride, k, n, from, col);
            }
        }
        cp_async_commit();
    };

    float sums[WARP_M / 16][WARP_N / 8][4] = {};
    for (int tile = 0; tile < STAGES - 1; tile++) fill(tile);
    for (int tile = 0; tile < k_tiles; tile++) {
        cp_async_wait<STAGES - 2>();
        // All copies of this tile are done, and all warps have read the stage that is filled next.
        __syncthreads();  // mutant: matmul_stage_read_early
        fill(tile + STAGES - 1);
        const uint32_t tile_a = shared + tile % STAGES * STAGE_BYTES;
        const uint32_t tile_b = tile_a + TileA::BYTES;
#pragma unroll
        for (int step = 0; step < TILE_K; step += 16) {
            uint32_t fragment_a[WARP_M / 16][4], fragment_b[WARP_N / 16][4];
#pragma unroll
            for (int i = 0; i < WARP_M / 16; i++) {
                const int at = warp_row + 16 * i;
                TileA::template load<A_TRANSPOSED>(fragment_a[i], tile_a,
                                                   A_TRANSPOSED ? step : at,
                                                   A_TRANSPOSED ? at : step);
            }
#pragma unroll
            for (int j = 0; j < WARP_N / 16; j++) {
                const int at = warp_col + 16 * j;
                // A fragment of B is column-major.
                TileB::template load<!B_TRANSPOSED>(fragment_b[j], tile_b,
                                                    B_TRANSPOSED ? at : step,
                                                    B_TRANSPOSED ? step : at);
            }
#pragma unroll
            for (int i = 0; i < WARP_M / 16; i++) {
#pragma unroll
                for (int j = 0; j < WARP_N / 8; j++) {
                    const uint32_t(&columns)[4] = fragment_b[j / 2];
                    // mutant: matmul_columns_swapped
                    mma_m16n8k16<T>(sums[i][j], fragment_a[i], columns[j % 2], columns[j % 2 + 2]);
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < WARP_M / 16; i++) {
#pragma unroll
        for (int j = 0; j < WARP_N / 8; j++) {
            const int r = row + warp_row + 16 * i + lane / 4;
            const int c_col = col + warp_col + 8 * j + lane % 4 * 2;
            c.write_pair<T>(r, c_col, sums[i][j][0], sums[i][j][1]);
            c.write_pair<T>(r + 8, c_col, sums[i][j][2], sums[i][j][3]);
        }
    }
}

constexpr int SIMT_TILE = MATMUL_SIMT_TILE, SIMT_K = 16, SIMT_THREADS = MATMUL_SIMT_THREADS;

// 64 elements along the rows of A or the columns of B, and 16 of k, as [SIMT_K][SIMT_TILE]; zeros past
// the edges. Consecutive threads read consecutive memory if either stride is 1.
template <typename T>
__device__ void simt_tile(float (&tile)[SIMT_K][SIMT_TILE + 4], const T *matrix, int count, int k,
                          size_t stride, size_t k_stride, int first, int first_k) {
    for (int i = threadIdx.x; i < SIMT_K * SIMT_TILE; i += SIMT_THREADS) {
        const bool k_fastest = k_stride == 1;
        const int of_k = k_fastest ? i % SIMT_K : i / SIMT_TILE;
        const int of_tile = k_fastest ? i / SIMT_K : i % SIMT_TILE;
        // mutant: matmul_simt_edge_of_k
        const bool inside = first + of_tile < count && first_k + of_k < k;
        tile[of_k][of_tile] =
            inside ? to_float(matrix[(first + of_tile) * stride + (first_k + of_k) * k_stride])
                   : 0.0f;
    }
}

template <typename T>
__device__ void matmul_simt(const T *a, const T *b, Output c, int m, int n, int k, size_t a_stride,
                            size_t a_k_stride, size_t b_stride, size_t b_k_stride) {
    __shared__ alignas(16) float tile_a[SIMT_K][SIMT_TILE + 4], tile_b[SIMT_K][SIMT_TILE + 4];
    const int m_tiles = (m + SIMT_TILE - 1) / SIMT_TILE;
    const int row = blockIdx.x % m_tiles * SIMT_TILE, col = blockIdx.x / m_tiles * SIMT_TILE;
    const int thread_row = threadIdx.x / 16 * 4, thread_col = threadIdx.x % 16 * 4;
    float sums[4][4] = {};
    for (int from = 0; from < k; from += SIMT_K) {
        simt_tile(tile_a, a, m, k, a_stride, a_k_stride, row, from);
        simt_tile(tile_b, b, n, k, b_stride, b_k_stride, col, from);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < SIMT_K; i++) {
            float x[4], y[4];
            load(x, &tile_a[i][thread_row]);
            load(y, &tile_b[i][thread_col]);
#pragma unroll
            for (int r = 0; r < 4; r++) {
#pragma unroll
                for (int s = 0; s < 4; s++) sums[r][s] += x[r] * y[s];
            }
        }
        __syncthreads();  // mutant: matmul_simt_tile_overwritten
    }
#pragma unroll
    for (int r = 0; r < 4; r++) {
        c.write_pair<T>(row + thread_row + r, col + thread_col, sums[r][0], sums[r][1]);
        c.write_pair<T>(row + thread_row + r, col + thread_col + 2, sums[r][2], sums[r][3]);
    }
}

#define MMA(LAYOUT, A_TRANSPOSED, B_TRANSPOSED, T)                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS)                                          \
    matmul_##LAYOUT##_##T(const T *__restrict__ a, const T *__restrict__ b, void *__restrict__ c,  \
                          int m, int n, int k, uint64_t a_stride, uint64_t b_stride,               \
                          uint64_t c_stride, uint64_t a_batch, uint64_t b_batch,                   \
                          uint64_t c_batch, int accumulate, int c_is_f32) {                        \
        matmul<T, A_TRANSPOSED, B_TRANSPOSED>(                                                     \
            in_batch(a, a_batch), in_batch(b, b_batch),                                            \
            output(c, m, n, c_stride, c_batch, accumulate, c_is_f32, sizeof(T)), m, n, k,          \
            a_stride, b_stride);                                                                   \
    }
#define SIMT(T)                                                                                    \
    extern "C" __global__ void __launch_bounds__(SIMT_THREADS)                                     \
    matmul_simt_##T(const T *__restrict__ a, const T *__restrict__ b, void *__restrict__ c, int m, \
                    int n, int k, uint64_t a_stride, uint64_t a_k_stride, uint64_t b_stride,       \
                    uint64_t b_k_stride, uint64_t c_stride, uint64_t a_batch, uint64_t b_batch,    \
                    uint64_t c_batch, int accumulate, int c_is_f32) {                              \
        matmul_simt(in_batch(a, a_batch), in_batch(b, b_batch),                                    \
                    output(c, m, n, c_stride, c_batch, accumulate, c_is_f32, sizeof(T)), m, n, k,  \
                    a_stride, a_k_stride, b_stride, b_k_stride);                                   \
    }

MMA(nn, false, false, bf16)
MMA(nt, false, true, bf16)
MMA(tn, true, false, bf16)
MMA(tt, true, true, bf16)
MMA(nn, false, false, f16)
MMA(nt, false, true, f16)
MMA(tn, true, false, f16)
MMA(tt, true, true, f16)
SIMT(f32)
SIMT(bf16)
SIMT(f16)
