// Flash attention, forward, causal, bf16, one head dimension: O = softmax(Q K^T / sqrt(d)) V.
//
// Q, K, V, O: [heads, tokens, 64]; lse: [heads, tokens] f32. A block of four warps owns 64 query
// rows, 16 a warp, and streams tiles of 64 keys and values through two stages of shared memory
// filled by cp.async. Rows of a tile are 128 bytes; their 16-byte chunks are swizzled by row so
// that ldmatrix reads without bank conflicts.
//
// Each macro named MUTANT_* makes a mutant that the mutation tests must kill.
#include <cuda_bf16.h>
#include <stdint.h>

constexpr int D = 64;
constexpr int TILE = 64;
constexpr int STAGES = 2;
constexpr int TILE_BYTES = TILE * D * 2;

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void copy_async_16(uint32_t to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from));
}

__device__ __forceinline__ void commit() {
#ifndef MUTANT_MISSING_COMMIT
    asm volatile("cp.async.commit_group;");
#endif
}

template <int PENDING>
__device__ __forceinline__ void wait() {
#ifndef MUTANT_MISSING_WAIT
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING));
#endif
}

__device__ __forceinline__ void load_matrix_x4(uint32_t (&d)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&d)[4], uint32_t address) {
#ifdef MUTANT_DROPPED_TRANS
    load_matrix_x4(d, address);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(address)
                 : "memory");
#endif
}

__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
#ifdef MUTANT_SWAPPED_OPERANDS
    const uint32_t swapped = b0;
    b0 = b1;
    b1 = swapped;
#endif
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float exp2_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

// Byte offset of a 16-byte chunk of a row.
__device__ __forceinline__ uint32_t swizzle(int row, int chunk) {
    return row * (D * 2) + ((chunk ^ (row % 8)) * 16);
}

// The block copies 64 rows of 128 bytes.
__device__ __forceinline__ void copy_tile(uint32_t to, const __nv_bfloat16* from) {
    for (int i = threadIdx.x; i < TILE * D / 8; i += blockDim.x)
        copy_async_16(to + swizzle(i / 8, i % 8), from + i * 8);
}

extern "C" __global__ void __launch_bounds__(128)
    flash_forward(const __nv_bfloat16* __restrict__ q, const __nv_bfloat16* __restrict__ k,
                  const __nv_bfloat16* __restrict__ v, __nv_bfloat16* __restrict__ o,
                  float* __restrict__ lse, int tokens, float scale_log2) {
    extern __shared__ __align__(128) uint8_t memory[];
    const uint32_t keys = shared_address(memory);
    const uint32_t values = keys + STAGES * TILE_BYTES;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first_row = blockIdx.x * TILE;
    const size_t head = size_t(blockIdx.y) * tokens * D;
    const int tiles = blockIdx.x + 1;

    // Q goes through the second stage on its way to registers.
    copy_tile(keys + TILE_BYTES, q + head + size_t(first_row) * D);
    commit();
    copy_tile(keys, k + head);
    copy_tile(values, v + head);
    commit();
    wait<1>();
    __syncthreads();
    uint32_t query[4][4];
    #pragma unroll
        for (int i = 0; i < 4; ++i)
        load_matrix_x4(query[i], keys + TILE_BYTES + swizzle(warp * 16 + lane % 16, 2 * i + lane / 16));
    __syncthreads();

    float out[8][4] = {};
    float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    for (int tile = 0; tile < tiles; ++tile) {
        const int stage = tile % STAGES;
        if (tile + 1 < tiles) {
            const int next = (tile + 1) % STAGES;
            const size_t at = head + size_t(tile + 1) * TILE * D;
            copy_tile(keys + next * TILE_BYTES, k + at);
            copy_tile(values + next * TILE_BYTES, v + at);
            commit();
            wait<1>();
        } else {
            wait<0>();
        }
#ifndef MUTANT_MISSING_BARRIER_BEFORE_USE
        __syncthreads();
#endif

        float scores[8][4] = {};
        #pragma unroll
        for (int i = 0; i < 4; ++i) {
            for (int j = 0; j < 4; ++j) {
                uint32_t b[4];
                const int row = j * 16 + lane % 8 + lane / 16 * 8;
                load_matrix_x4(b, keys + stage * TILE_BYTES + swizzle(row, 2 * i + lane / 8 % 2));
                multiply_add(scores[2 * j], query[i], b[0], b[1]);
                multiply_add(scores[2 * j + 1], query[i], b[2], b[3]);
            }
        }
#ifdef MUTANT_EARLY_RELEASE
        __syncthreads();
#endif
        if (tile == tiles - 1) {
            for (int j = 0; j < 8; ++j)
                for (int e = 0; e < 4; ++e) {
                    const int row = warp * 16 + lane / 4 + e / 2 * 8;
                    if (j * 8 + lane % 4 * 2 + e % 2 > row) scores[j][e] = -INFINITY;
                }
        }

        // Each thread holds two rows; four threads share each.
        uint32_t weights[4][4];
        for (int half = 0; half < 2; ++half) {
            float top = maximum[half];
            for (int j = 0; j < 8; ++j)
                top = fmaxf(top, fmaxf(scores[j][2 * half], scores[j][2 * half + 1]));
            top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 1));
            top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 2));
            const float shrink = exp2_approximate((maximum[half] - top) * scale_log2);
            maximum[half] = top;
            sum[half] *= shrink;
            for (int j = 0; j < 8; ++j) {
                const float p0 = exp2_approximate((scores[j][2 * half] - top) * scale_log2);
                const float p1 = exp2_approximate((scores[j][2 * half + 1] - top) * scale_log2);
                sum[half] += p0 + p1;
                weights[j / 2][j % 2 * 2 + half] = pack(p0, p1);
                out[j][2 * half] *= shrink;
                out[j][2 * half + 1] *= shrink;
            }
        }

        #pragma unroll
        for (int i = 0; i < 4; ++i) {
            for (int j = 0; j < 4; ++j) {
                uint32_t b[4];
                const int row = i * 16 + lane % 16;
                load_matrix_x4_transposed(
                    b, values + stage * TILE_BYTES + swizzle(row, 2 * j + lane / 16));
                multiply_add(out[2 * j], weights[i], b[0], b[1]);
                multiply_add(out[2 * j + 1], weights[i], b[2], b[3]);
            }
        }
#if !defined(MUTANT_MISSING_BARRIER_AFTER_USE) && !defined(MUTANT_EARLY_RELEASE)
        __syncthreads();
#endif
    }

    for (int half = 0; half < 2; ++half) {
        float total = sum[half];
        total += __shfl_xor_sync(0xffffffff, total, 1);
        total += __shfl_xor_sync(0xffffffff, total, 2);
        const int row = first_row + warp * 16 + lane / 4 + half * 8;
        __nv_bfloat16* to = o + head + size_t(row) * D + lane % 4 * 2;
        for (int j = 0; j < 8; ++j)
            *reinterpret_cast<uint32_t*>(to + j * 8) =
                pack(out[j][2 * half] / total, out[j][2 * half + 1] / total);
        if (lane % 4 == 0)
            lse[size_t(blockIdx.y) * tokens + row] =
                maximum[half] * scale_log2 * 0.6931471805599453f + logf(total);
    }
}
