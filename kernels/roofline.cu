// What a card can do at most, one thing at a time: `laam bench ceilings`.
//
// Each chain below has enough independent links in flight to fill the pipes, and ends in a store
// that depends on all of them, so that nothing is optimised away. FMAs, exponentials and products
// are counted by the caller: rounds * LINKS * what a link does.
#include <cuda_bf16.h>
#include <cstdint>

constexpr int LINKS = 8;

// Does nothing: the cost of a launch.
extern "C" __global__ void roofline_empty() {}

// ex2.approx, LINKS * rounds a thread. Launch: any.
extern "C" __global__ void __launch_bounds__(256)
roofline_ex2(float *__restrict__ out, int rounds) {
    float x[LINKS];
#pragma unroll
    for (int i = 0; i < LINKS; i++) x[i] = threadIdx.x * -0.001f - i;
    for (int round = 0; round < rounds; round++) {
#pragma unroll
        for (int i = 0; i < LINKS; i++) asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(x[i]));
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < LINKS; i++) sum += x[i];
    out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

// fma.rn.f32, LINKS * rounds a thread. Launch: any.
extern "C" __global__ void __launch_bounds__(256)
roofline_fma(float *__restrict__ out, int rounds) {
    float x[LINKS];
#pragma unroll
    for (int i = 0; i < LINKS; i++) x[i] = threadIdx.x * 0.001f + i;
    const float a = 0.999f + 1e-7f * threadIdx.x, b = 1e-3f;
    for (int round = 0; round < rounds; round++) {
#pragma unroll
        for (int i = 0; i < LINKS; i++) x[i] = fmaf(x[i], a, b);
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < LINKS; i++) sum += x[i];
    out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

// mma.sync m16n8k16 bf16, LINKS * rounds a warp: 4,096 FLOPs each. Launch: any.
extern "C" __global__ void __launch_bounds__(256)
roofline_mma(float *__restrict__ out, int rounds) {
    float c[LINKS][4] = {};
    uint32_t a[4], b[2];
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = 0x3C003C00u + threadIdx.x * 0x10001u + i;
#pragma unroll
    for (int i = 0; i < 2; i++) b[i] = 0x3C003C00u + threadIdx.x * 0x10001u - i;
    for (int round = 0; round < rounds; round++) {
#pragma unroll
        for (int i = 0; i < LINKS; i++) {
            asm volatile(
                "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                : "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
        }
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < LINKS; i++) sum += c[i][0] + c[i][1] + c[i][2] + c[i][3];
    out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

// __syncthreads, `rounds` of them. Launch: any.
extern "C" __global__ void __launch_bounds__(1024)
roofline_barrier(float *__restrict__ out, int rounds) {
    __shared__ float value;
    if (threadIdx.x == 0) value = 0.0f;
    for (int round = 0; round < rounds; round++) {
        __syncthreads();
        // One thread writes what another reads: the barriers cannot be merged.
        if (threadIdx.x == round % blockDim.x) value += 1.0f;
    }
    __syncthreads();
    out[blockIdx.x * blockDim.x + threadIdx.x] = value;
}
