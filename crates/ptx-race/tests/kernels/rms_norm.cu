// y = x / sqrt(mean(x^2) + epsilon) * weight, a warp a row, bf16 in and out, f32 between.
//
// x, y: [rows, hidden]; weight: [hidden]; hidden is a multiple of 8 (16-byte loads).
#include <cuda_bf16.h>

__device__ __forceinline__ float warp_sum(float value) {
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffff, value, step);
    return value;
}

extern "C" __global__ void rms_norm(const __nv_bfloat16* __restrict__ x,
                                    const __nv_bfloat16* __restrict__ weight,
                                    __nv_bfloat16* __restrict__ y, int rows, int hidden,
                                    float epsilon) {
    const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    if (row >= rows) return;
    const uint4* in = reinterpret_cast<const uint4*>(x + size_t(row) * hidden);
    const uint4* scale = reinterpret_cast<const uint4*>(weight);
    uint4* out = reinterpret_cast<uint4*>(y + size_t(row) * hidden);

    float squares = 0;
    for (int i = lane; i < hidden / 8; i += 32) {
        const uint4 packed = in[i];
        const __nv_bfloat162* pairs = reinterpret_cast<const __nv_bfloat162*>(&packed);
        for (int j = 0; j < 4; ++j) {
            const float2 pair = __bfloat1622float2(pairs[j]);
            squares += pair.x * pair.x + pair.y * pair.y;
        }
    }
    const float inverse = rsqrtf(warp_sum(squares) / hidden + epsilon);

    for (int i = lane; i < hidden / 8; i += 32) {
        const uint4 packed = in[i], weights = scale[i];
        const __nv_bfloat162* pairs = reinterpret_cast<const __nv_bfloat162*>(&packed);
        const __nv_bfloat162* factors = reinterpret_cast<const __nv_bfloat162*>(&weights);
        uint4 result;
        __nv_bfloat162* results = reinterpret_cast<__nv_bfloat162*>(&result);
        for (int j = 0; j < 4; ++j) {
            const float2 pair = __bfloat1622float2(pairs[j]);
            const float2 factor = __bfloat1622float2(factors[j]);
            results[j] = __floats2bfloat162_rn(pair.x * inverse * factor.x,
                                               pair.y * inverse * factor.y);
        }
        out[i] = result;
    }
}
