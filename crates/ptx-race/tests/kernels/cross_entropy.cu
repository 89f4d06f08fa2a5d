// loss[row] = log(sum(exp(logits[row]))) - logits[row, target[row]], a block a row.
//
// One pass with a running maximum, then a reduction over the block in a fixed order.
// logits: [rows, vocabulary] bf16; target: [rows]; loss: [rows] f32.
#include <cuda_bf16.h>

constexpr int MAX_WARPS = 32;

struct Running {
    float maximum, sum;
};

__device__ __forceinline__ Running merge(Running a, Running b) {
    const float maximum = fmaxf(a.maximum, b.maximum);
    if (maximum == -INFINITY) return {maximum, 0};
    return {maximum, a.sum * __expf(a.maximum - maximum) + b.sum * __expf(b.maximum - maximum)};
}

__device__ __forceinline__ Running warp_merge(Running value) {
    for (int step = 16; step > 0; step /= 2) {
        const Running other = {__shfl_xor_sync(0xffffffff, value.maximum, step),
                               __shfl_xor_sync(0xffffffff, value.sum, step)};
        value = merge(value, other);
    }
    return value;
}

extern "C" __global__ void cross_entropy(const __nv_bfloat16* __restrict__ logits,
                                         const int* __restrict__ target,
                                         float* __restrict__ loss, int vocabulary) {
    __shared__ Running partial[MAX_WARPS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const __nv_bfloat16* row = logits + size_t(blockIdx.x) * vocabulary;

    Running value = {-INFINITY, 0};
    for (int i = threadIdx.x; i < vocabulary; i += blockDim.x)
        value = merge(value, {__bfloat162float(row[i]), 1});
    value = warp_merge(value);
    if (lane == 0) partial[warp] = value;
    __syncthreads();
    if (warp == 0) {
        value = lane < warps ? partial[lane] : Running{-INFINITY, 0};
        value = warp_merge(value);
        if (lane == 0) {
            const float picked = __bfloat162float(row[target[blockIdx.x]]);
            loss[blockIdx.x] = value.maximum + logf(value.sum) - picked;
        }
    }
}
