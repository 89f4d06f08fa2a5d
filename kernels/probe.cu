// Probes for `laam bench smoke`: what the kernels, and the simulator they are tested in, assume of a GPU.
#include <cstdint>

// One product a * b on tensor cores, by mma.sync m16n8k8 in TF32: shows how operands lose their low 13
// bits. Launch: one warp.
extern "C" __global__ void __launch_bounds__(32)
probe_tf32(float *__restrict__ out, float a, float b) {
    // Column 0 of A and row 0 of B belong to every fourth lane.
    const bool is_first = threadIdx.x % 4 == 0;
    const uint32_t a0 = is_first ? __float_as_uint(a) : 0, b0 = is_first ? __float_as_uint(b) : 0;
    float c[4] = {};
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %4, %5, %5}, {%6, %5}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(0), "r"(b0));
    if (threadIdx.x == 0) *out = c[0];
}

// ex2.approx of the floats with the bits first, first + step, ... Launch: a thread per output.
extern "C" __global__ void __launch_bounds__(256)
probe_ex2(float *__restrict__ out, uint32_t first, uint32_t step) {
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    float y;
    asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(__uint_as_float(first + i * step)));
    out[i] = y;
}

// Counts the wrong ones among `words` words of dynamic shared memory that every thread wrote a part of,
// beside one word of static shared memory. Launch: one block.
extern "C" __global__ void __launch_bounds__(256)
probe_shared(uint32_t *__restrict__ out, uint32_t words) {
    extern __shared__ uint32_t memory[];
    __shared__ uint32_t wrong;
    if (threadIdx.x == 0) wrong = 0;
    for (uint32_t i = threadIdx.x; i < words; i += blockDim.x) memory[i] = i * 2654435761u;
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < words; i += blockDim.x) {
        const uint32_t j = words - 1 - i;
        if (memory[j] != j * 2654435761u) atomicAdd(&wrong, 1u);
    }
    __syncthreads();
    if (threadIdx.x == 0) *out = wrong;
}
