// out[i] = sum over tiles of in[tile, i] and its block neighbors, through shared memory: small
// kernels, each with its mutants, selected by macro.
#include <stdint.h>

constexpr int THREADS = 128;

// Sums the block's values with one barrier, the last warp's way: each warp leaves its sum, all
// read all of them in order.
extern "C" __global__ void block_sum(const float* __restrict__ in, float* __restrict__ out) {
    __shared__ float partial[THREADS / 32];
    float value = in[blockIdx.x * THREADS + threadIdx.x];
#ifdef MUTANT_SHUFFLE_DIVERGED
    if (threadIdx.x % 32 < 16)
#endif
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffff, value, step);
#ifdef MUTANT_SHARED_BY_ONE
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32 + 1] = value;
#else
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
#endif
#ifdef MUTANT_DEADLOCK
    // Only some warps come, but the barrier counts on all.
    if (threadIdx.x / 32 < 2) asm volatile("bar.sync 1, 128;" ::: "memory");
    __syncthreads();
#elif !defined(MUTANT_UNORDERED_SHARED)
    __syncthreads();
#endif
    float total = 0;
    for (int i = 0; i < THREADS / 32; ++i) total += partial[i];
#ifdef MUTANT_GLOBAL_BY_ONE
    out[blockIdx.x * THREADS + threadIdx.x + 1] = total;
#else
    out[blockIdx.x * THREADS + threadIdx.x] = total;
#endif
}

// total += in[i] over all blocks: blocks leave their sums, and the last to come adds them up in
// order, as a fence and a counter tell it that they are there.
__device__ unsigned int arrived;

extern "C" __global__ void grid_sum(const float* __restrict__ in, float* partial, float* total) {
    __shared__ bool last;
    float value = in[blockIdx.x * 32 + threadIdx.x];
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffff, value, step);
    if (threadIdx.x == 0) {
#if defined(MUTANT_UNORDERED_REDUCTION)
        *total += value;
#elif defined(MUTANT_ATOMIC_REDUCTION)
        atomicAdd(total, value);
#else
        partial[blockIdx.x] = value;
#if defined(MUTANT_BLOCK_FENCE)
        __threadfence_block();
#elif !defined(MUTANT_MISSING_FENCE)
        __threadfence();
#endif
        last = atomicAdd(&arrived, 1) == gridDim.x - 1;
#endif
    }
#if !defined(MUTANT_UNORDERED_REDUCTION) && !defined(MUTANT_ATOMIC_REDUCTION)
    __syncthreads();
    if (last && threadIdx.x == 0) {
#ifndef MUTANT_MISSING_ACQUIRE
        __threadfence();
#endif
        float sum = 0;
        for (int i = 0; i < gridDim.x; ++i) sum += partial[i];
        *total = sum;
        arrived = 0;
    }
#endif
}

// A warp transposes 32 values through shared memory: lanes need a __syncwarp to see each other.
extern "C" __global__ void warp_reverse(const float* __restrict__ in, float* __restrict__ out) {
    __shared__ float line[32];
#ifdef MUTANT_UNINITIALISED
    if (threadIdx.x != 7)
#endif
    line[threadIdx.x] = in[threadIdx.x];
#ifndef MUTANT_MISSING_SYNCWARP
    __syncwarp();
#endif
    out[threadIdx.x] = line[31 - threadIdx.x];
}
