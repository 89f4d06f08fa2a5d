// Reductions in a fixed order: the same inputs and the same launch give the same bits.
#pragma once
#include "constants.cuh"

// Sum over the 32 lanes of a warp, returned to every lane.
__device__ inline float warp_sum(float value) {
    for (int offset = WARP_SIZE / 2; offset > 0; offset /= 2) {
        value += __shfl_xor_sync(FULL_MASK, value, offset);
    }
    return value;
}

// Maximum over the 32 lanes of a warp, returned to every lane.
__device__ inline float warp_max(float value) {
    for (int offset = WARP_SIZE / 2; offset > 0; offset /= 2) {
        value = fmaxf(value, __shfl_xor_sync(FULL_MASK, value, offset));
    }
    return value;
}

// Sum of `value`, in f32 or f64, over the blockDim.x threads of a row, returned to every one of
// them. A block holds blockDim.y rows. blockDim.x is 1, 2, 4, 8, 16 or a multiple of 32, and the
// block is whole warps; every thread of the block must call it.
template <typename T>
__device__ T row_sum(T value) {
    const int width = min(static_cast<int>(blockDim.x), WARP_SIZE);
    for (int offset = width / 2; offset > 0; offset /= 2) {
        value += __shfl_xor_sync(FULL_MASK, value, offset);
    }
    const int warps = blockDim.x / WARP_SIZE;
    if (warps <= 1) return value;
    __shared__ T partials[MAX_WARPS];
    const int first = threadIdx.y * warps;
    if (threadIdx.x % WARP_SIZE == 0) partials[first + threadIdx.x / WARP_SIZE] = value;
    __syncthreads();  // mutant: row_sum_read_early
    T sum = 0;
    for (int warp = 0; warp < warps; warp++) sum += partials[first + warp];
    // The next call must not overwrite partial sums that a slower warp still reads.
    __syncthreads();  // mutant: row_sum_overwritten
    return sum;
}
