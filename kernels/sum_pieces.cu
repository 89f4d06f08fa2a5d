// Sum of pieces in one fixed order, whichever process computed each of them:
//
//     out[i] = (...(block 0 + block 1) + ...), a block: a balanced binary tree over `width` pieces
//
// pieces: f32, `blocks * width` of them in a row: the first at `first`, piece n > 0 at
// `rest + (n - 1) * stride`; out: [count] in f32, may be the first piece. Bytes: 4 (pieces + 1) per
// element. (pieces - 1) FLOPs per element: bound by memory.
#include "lib/vector.cuh"

// Most levels of a tree: `width` is a power of two up to 2^LEVELS.
constexpr int LEVELS = SUM_PIECES_LEVELS;

// Launch: blocks of 256 threads along x, any number: the order of a sum does not depend on the grid.
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)
sum_pieces(const float *first, const float *rest, float *out, unsigned long long stride,
           unsigned long long count, int blocks, int width) {
    grid_stride<4>(count, aligned(first, rest, out) && stride % 4 == 0, [&](size_t at, auto n) {
        constexpr int N = decltype(n)::value;
        float total[N] = {}, pending[LEVELS][N] = {};
        for (int block = 0; block < blocks; block++) {
            float sum[N];
            // As a binary counter: piece i completes one subtree for each of its trailing ones.
            for (int i = 0; i < width; i++) {
                const int piece = block * width + i;  // mutant: first_block_always
                load(sum, (piece == 0 ? first : rest + (piece - 1) * stride) + at);
                bool carries = true;
#pragma unroll
                for (int level = 0; level < LEVELS; level++) {
                    const bool completes = carries && (i >> level & 1);  // mutant: too_early
                    const bool waits = carries && !completes;
#pragma unroll
                    for (int e = 0; e < N; e++) {
                        if (completes) sum[e] = pending[level][e] + sum[e];  // mutant: left_lost
                        if (waits) pending[level][e] = sum[e];
                    }
                    carries = completes;
                }
            }
#pragma unroll
            // mutant: last_block_only
            for (int e = 0; e < N; e++) total[e] = block == 0 ? sum[e] : total[e] + sum[e];
        }
        store(out + at, total);
    });
}
