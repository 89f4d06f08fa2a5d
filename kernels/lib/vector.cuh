// 16-byte memory accesses, f32 arithmetic: values of type T are converted to f32 when they are
// loaded and rounded to nearest even when they are stored.
#pragma once
#include "geometry.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>
#include <type_traits>

// Dtypes as entry names spell them.
using f32 = float;
using bf16 = __nv_bfloat16;
using f16 = half;

// Elements of a 16-byte access.
template <typename T>
constexpr int VEC = 16 / sizeof(T);

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
__device__ inline float to_float(half x) { return __half2float(x); }

template <typename T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) { return x; }
template <>
__device__ inline bf16 from_float<bf16>(float x) {
    return __float2bfloat16_rn(x);  // mutant: bf16_truncated
}
// Beyond 65,504 the result is infinite: loss scaling checks for it.
template <>
__device__ inline half from_float<half>(float x) { return __float2half_rn(x); }

// N consecutive values, loaded or stored by one access of N * sizeof(T) bytes.
template <typename T, int N>
struct alignas(N * sizeof(T)) Vec {
    T at[N];
};

template <int N, typename T>
__device__ inline void load(float (&values)[N], const T *from) {
    const Vec<T, N> vec = *reinterpret_cast<const Vec<T, N> *>(from);
#pragma unroll
    for (int i = 0; i < N; i++) values[i] = to_float(vec.at[i]);
}

template <int N, typename T>
__device__ inline void store(T *to, const float (&values)[N]) {
    Vec<T, N> vec;
#pragma unroll
    for (int i = 0; i < N; i++) vec.at[i] = from_float<T>(values[i]);
    *reinterpret_cast<Vec<T, N> *>(to) = vec;
}

// Copies N consecutive values.
template <int N, typename T>
__device__ inline void copy(T *to, const T *from) {
    *reinterpret_cast<Vec<T, N> *>(to) = *reinterpret_cast<const Vec<T, N> *>(from);
}

// Whether all pointers are 16-byte aligned; null counts as aligned.
template <typename... P>
__device__ inline bool aligned(const P *...pointers) {
    return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// Grid-stride loop over [0, count): calls `body(at, width)` for `decltype(width)::value` elements
// from `at` on, N of them while vectors fit if `vectors`, then single ones. Any grid along x.
template <int N, typename Body>
__device__ void grid_stride(size_t count, bool vectors, Body body) {
    const size_t threads = static_cast<size_t>(gridDim.x) * blockDim.x;
    const size_t thread = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const size_t vector_end = vectors ? count / N * N : 0;
    for (size_t at = N * thread; at < vector_end; at += N * threads) {
        body(at, std::integral_constant<int, N>());
    }
    // mutant: vector_tail_skipped
    for (size_t at = vector_end + thread; at < count; at += threads) {
        body(at, std::integral_constant<int, 1>());
    }
}
