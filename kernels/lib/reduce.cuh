// Sums in a fixed order: the same inputs and the same launch give the same bits.
#pragma once

constexpr int WARP = 32;
constexpr int MAX_WARPS = 32;

// Over the 32 lanes of a warp, given to each of them.
__device__ inline float warp_sum(float value) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) {
        value += __shfl_xor_sync(0xffffffffu, value, offset);
    }
    return value;
}

__device__ inline float warp_max(float value) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) {
        value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, offset));
    }
    return value;
}

// The sum of `value`, in f32 or f64, over the blockDim.x threads of a row, given to each of them. A
// block holds blockDim.y rows. blockDim.x is 1, 2, 4, 8, 16 or a multiple of 32, and the block is
// whole warps; every thread of the block has to come here.
template <typename T>
__device__ T row_sum(T value) {
    const int width = min(static_cast<int>(blockDim.x), WARP);
    for (int offset = width / 2; offset > 0; offset /= 2) {
        value += __shfl_xor_sync(0xffffffffu, value, offset);
    }
    const int warps = blockDim.x / WARP;
    if (warps <= 1) return value;
    __shared__ T parts[MAX_WARPS];
    const int first = threadIdx.y * warps;
    if (threadIdx.x % WARP == 0) parts[first + threadIdx.x / WARP] = value;
    __syncthreads();
    T sum = 0;
    for (int warp = 0; warp < warps; warp++) sum += parts[first + warp];
    // The next sum must not overwrite what a slower warp still reads.
    __syncthreads();
    return sum;
}
