// PTX instructions that C++ has no expression for, one wrapper each, named as the ISA names them.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>
#include <type_traits>

// 2^x: error at most 2 ulp, results below 2^-126 flushed to 0.
__device__ inline float ex2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Address of a generic pointer in the shared state space.
__device__ inline uint32_t cvta_to_shared(const void *pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Asynchronous copy of 16 bytes from global to shared memory: the first `src_size` bytes are read,
// the rest are filled with zeros.
__device__ inline void cp_async16(uint32_t dst, const void *src, int src_size) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(src_size)
                 : "memory");
}

// Groups this thread's copies since the last commit.
__device__ inline void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");  // mutant: copies_not_committed
}

// Waits until at most PENDING of this thread's groups are incomplete.
template <int PENDING>
__device__ inline void cp_async_wait() {
    // mutant: wait_for_one_group_less, copies_not_awaited
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8 x 8 matrices of 16-bit values: lane i gives the address of row i % 8 of matrix i / 8 and
// receives values 2 (i % 4) and 2 (i % 4) + 1 of row i / 4 of each.
__device__ inline void ldmatrix_x4(uint32_t (&d)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(address)
                 : "memory");
}

// As ldmatrix_x4, with each matrix transposed.
__device__ inline void ldmatrix_x4_trans(uint32_t (&d)[4], uint32_t address) {
    // mutant: ldmatrix_not_transposed
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(address)
                 : "memory");
}

// d += a b: a [16, 16] row-major, b [16, 8] column-major in bf16, d [16, 8] in f32.
__device__ inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d += a b, with a and b in f16.
__device__ inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                        uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two values rounded to T and packed, `low` in the low half.
template <typename T>
__device__ inline uint32_t cvt_rn_x2(float low, float high) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        // mutant: packed_halves_swapped
        const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        return *reinterpret_cast<const uint32_t *>(&pair);
    } else {
        const __half2 pair = __floats2half2_rn(low, high);
        return *reinterpret_cast<const uint32_t *>(&pair);
    }
}

// d += a b, with a and b in T.
template <typename T>
__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        mma_m16n8k16_bf16(d, a, b0, b1);
    } else {
        mma_m16n8k16_f16(d, a, b0, b1);
    }
}

// x rounded to TF32: the upper 19 bits of an f32.
__device__ inline float cvt_rna_tf32(float x) {
    uint32_t y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return __uint_as_float(y);
}

// d = a b + c: a [16, 4] row-major, b [4, 8] column-major in TF32, c and d [16, 8] in f32. Of a and
// b the upper 19 bits are read.
__device__ inline void mma_m16n8k4_tf32(float (&d)[4], const float (&a)[2], float b,
                                        const float (&c)[4]) {
    asm("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, "
        "{%4, %5}, {%6}, {%7, %8, %9, %10};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(b)),
          "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// d += a b: a [16, 8], b [8, 8].
__device__ inline void mma_m16n8k8_tf32(float (&d)[4], const float (&a)[4], float b0, float b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
          "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

// Two or four consecutive floats of shared memory, aligned to their total size.
__device__ inline void ld_shared(float (&d)[2], uint32_t address) {
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                 : "=f"(d[0]), "=f"(d[1])
                 : "r"(address)
                 : "memory");
}
__device__ inline void ld_shared(float (&d)[4], uint32_t address) {
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                 : "r"(address)
                 : "memory");
}
