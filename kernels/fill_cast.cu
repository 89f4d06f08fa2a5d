// out = value, and out = x in another type: [count] each, not overlapping.
//
// Bytes: 4 a value for a fill of f32, 6 for a cast. No FLOPs: bound by memory.
//
// Launch: blocks of 256 threads along x, any number of them.
#include "lib/vector.cuh"

// `run(at, N)` handles the N values from `at`: vectors as far as they reach, then one by one.
template <int N, typename Run>
__device__ void each(size_t from, size_t to, Run run) {
    const size_t step = static_cast<size_t>(gridDim.x) * blockDim.x * N;
    const size_t thread = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    for (size_t at = from + thread * N; at < to; at += step) run(at);
}

template <int N, typename To>
__device__ void fill_part(To *out, float value, size_t from, size_t to) {
    float values[N];
#pragma unroll
    for (int i = 0; i < N; i++) values[i] = value;
    each<N>(from, to, [&](size_t at) { store(out + at, values); });
}

template <typename T>
__device__ void fill(T *out, float value, size_t count) {
    const size_t whole = aligned(out) ? count / FULL<T> * FULL<T> : 0;
    fill_part<FULL<T>>(out, value, 0, whole);
    fill_part<1>(out, value, whole, count);
}

template <int N, typename From, typename To>
__device__ void cast_part(const From *x, To *out, size_t from, size_t to) {
    each<N>(from, to, [&](size_t at) {
        float values[N];
        load(values, x + at);
        store(out + at, values);
    });
}

// Four values at once: 16 bytes of the f32 side, 8 of the other.
template <typename From, typename To>
__device__ void cast(const From *x, To *out, size_t count) {
    const size_t whole = aligned(x, out) ? count / 4 * 4 : 0;
    cast_part<4>(x, out, 0, whole);
    cast_part<1>(x, out, whole, count);
}

extern "C" __global__ void __launch_bounds__(256)
fill_f32(float *__restrict__ out, float value, unsigned long long count) {
    fill(out, value, count);
}

extern "C" __global__ void __launch_bounds__(256)
fill_bf16(bf16 *__restrict__ out, float value, unsigned long long count) {
    fill(out, value, count);
}

extern "C" __global__ void __launch_bounds__(256)
fill_f16(half *__restrict__ out, float value, unsigned long long count) {
    fill(out, value, count);
}

extern "C" __global__ void __launch_bounds__(256)
cast_f32_bf16(const float *__restrict__ x, bf16 *__restrict__ out, unsigned long long count) {
    cast(x, out, count);
}

extern "C" __global__ void __launch_bounds__(256)
cast_f32_f16(const float *__restrict__ x, half *__restrict__ out, unsigned long long count) {
    cast(x, out, count);
}

extern "C" __global__ void __launch_bounds__(256)
cast_bf16_f32(const bf16 *__restrict__ x, float *__restrict__ out, unsigned long long count) {
    cast(x, out, count);
}

extern "C" __global__ void __launch_bounds__(256)
cast_f16_f32(const half *__restrict__ x, float *__restrict__ out, unsigned long long count) {
    cast(x, out, count);
}
