// Memory in 16-byte pieces, arithmetic in f32: values of type T are widened when they are loaded
// and rounded to nearest, ties to even, when they are stored.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>
#include <type_traits>

// As entries are named.
using f32 = float;
using bf16 = __nv_bfloat16;
using f16 = half;

// How many values of a type one full load or store moves.
template <typename T>
constexpr int FULL = 16 / sizeof(T);

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(bf16 x) { return __bfloat162float(x); }
__device__ inline float widen(half x) { return __half2float(x); }

template <typename T>
__device__ T narrow(float x);
template <>
__device__ inline float narrow<float>(float x) { return x; }
template <>
__device__ inline bf16 narrow<bf16>(float x) { return __float2bfloat16_rn(x); }
// Beyond 65,504 there is only infinity: what scales a loss looks for it.
template <>
__device__ inline half narrow<half>(float x) { return __float2half_rn(x); }

// N neighbouring values: one access of N * sizeof(T) bytes.
template <typename T, int N>
struct alignas(N * sizeof(T)) Pack {
    T at[N];
};

template <int N, typename T>
__device__ inline void load(float (&values)[N], const T *from) {
    const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N> *>(from);
#pragma unroll
    for (int i = 0; i < N; i++) values[i] = widen(pack.at[i]);
}

template <int N, typename T>
__device__ inline void store(T *to, const float (&values)[N]) {
    Pack<T, N> pack;
#pragma unroll
    for (int i = 0; i < N; i++) pack.at[i] = narrow<T>(values[i]);
    *reinterpret_cast<Pack<T, N> *>(to) = pack;
}

// Whether all of these pointers may be accessed in 16-byte pieces; a null pointer may.
template <typename... P>
__device__ inline bool aligned(const P *...pointers) {
    return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// Calls `run(at, width)` until all of [0, count) is done, `decltype(width)::value` values from `at`
// on a call: N of them as far as that goes, if `vectors`, then one by one. Blocks along x share the
// work, any number of them.
template <int N, typename Run>
__device__ void each(size_t count, bool vectors, Run run) {
    const size_t threads = static_cast<size_t>(gridDim.x) * blockDim.x;
    const size_t thread = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const size_t whole = vectors ? count / N * N : 0;
    for (size_t at = N * thread; at < whole; at += N * threads) {
        run(at, std::integral_constant<int, N>());
    }
    for (size_t at = whole + thread; at < count; at += threads) {
        run(at, std::integral_constant<int, 1>());
    }
}
