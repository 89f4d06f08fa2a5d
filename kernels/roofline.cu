// Peak throughput of a GPU, one resource at a time, for the roofline.
//
// Each thread runs CHAINS independent dependency chains, enough instruction-level parallelism to
// fill the pipes, and stores a value that depends on all of them, so that nothing is optimized
// away. The caller counts rounds * CHAINS operations per thread (per warp for mma).
#include <cuda_bf16.h>
#include <cstdint>

constexpr int CHAINS = 8;

// Empty kernel: launch overhead.
extern "C" __global__ void roofline_empty() {}

// ex2.approx, CHAINS * rounds per thread. Launch: any.
extern "C" __global__ void __launch_bounds__(256)
roofline_ex2(float *__restrict__ out, int rounds) {
    float x[CHAINS];
#pragma unroll
    for (int i = 0; i < CHAINS; i++) x[i] = threadIdx.x * -0.001f - i;
    for (int round = 0; round < rounds; round++) {
#pragma unroll
        for (int i = 0; i < CHAINS; i++) asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(x[i]));
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < CHAINS; i++) sum += x[i];
    out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

// fma.rn.f32, CHAINS * rounds per thread. Launch: any.
extern "C" __global__ void __launch_bounds__(256)
roofline_fma(float *__restrict__ out, int rounds) {
    float x[CHAINS];
#pragma unroll
    for (int i = 0; i < CHAINS; i++) x[i] = threadIdx.x * 0.001f + i;
    const float a = 0.999f + 1e-7f * threadIdx.x, b = 1e-3f;
    for (int round = 0; round < rounds; round++) {
#pragma unroll
        for (int i = 0; i < CHAINS; i++) x[i] = fmaf(x[i], a, b);
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < CHAINS; i++) sum += x[i];
    out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

// mma.sync of one shape, CHAINS * rounds per warp. A has `A` registers per thread, B has `B`.
template <int A, int B, typename Mma>
__device__ void mma_chains(float *__restrict__ out, int rounds, Mma mma) {
    float c[CHAINS][4] = {};
    uint32_t a[A], b[B];
#pragma unroll
    for (int i = 0; i < A; i++) a[i] = 0x3C003C00u + threadIdx.x * 0x10001u + i;
#pragma unroll
    for (int i = 0; i < B; i++) b[i] = 0x3C003C00u + threadIdx.x * 0x10001u - i;
    for (int round = 0; round < rounds; round++) {
#pragma unroll
        for (int i = 0; i < CHAINS; i++) mma(c[i], a, b);
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < CHAINS; i++) sum += c[i][0] + c[i][1] + c[i][2] + c[i][3];
    out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

// m16n8k16 bf16: 4,096 FLOPs each. Launch: any.
extern "C" __global__ void __launch_bounds__(256)
roofline_mma(float *__restrict__ out, int rounds) {
    mma_chains<4, 2>(out, rounds, [](float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    });
}

// m16n8k8 TF32: 2,048 FLOPs each. Launch: any.
extern "C" __global__ void __launch_bounds__(256)
roofline_mma_tf32_k8(float *__restrict__ out, int rounds) {
    mma_chains<4, 2>(out, rounds, [](float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    });
}

// m16n8k4 TF32: 1,024 FLOPs each. Launch: any.
extern "C" __global__ void __launch_bounds__(256)
roofline_mma_tf32_k4(float *__restrict__ out, int rounds) {
    mma_chains<2, 1>(out, rounds, [](float (&c)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) {
        asm volatile(
            "mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 "
            "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(b[0]));
    });
}

// `rounds` times __syncthreads. Launch: any.
extern "C" __global__ void __launch_bounds__(1024)
roofline_barrier(float *__restrict__ out, int rounds) {
    __shared__ float value;
    if (threadIdx.x == 0) value = 0.0f;
    for (int round = 0; round < rounds; round++) {
        __syncthreads();
        // A different thread updates the value each time: the barriers cannot be merged.
        if (threadIdx.x == round % blockDim.x) value += 1.0f;
    }
    __syncthreads();
    out[blockIdx.x * blockDim.x + threadIdx.x] = value;
}
