// out = value, and out = x in another type: [count] each, not overlapping.
//
// Bytes: 4 a value for a fill of f32, 6 for a cast. No FLOPs: bound by memory.
//
// Launch: blocks of 256 threads along x, any number of them.
#include "lib/vector.cuh"

template <typename T>
__device__ void fill(T *out, float value, size_t count) {
    each<FULL<T>>(count, aligned(out), [&](size_t at, auto width) {
        float values[decltype(width)::value];
#pragma unroll
        for (float &each : values) each = value;
        store(out + at, values);
    });
}

// Four values at once: 16 bytes of the f32 side, 8 of the other.
template <typename From, typename To>
__device__ void cast(const From *x, To *out, size_t count) {
    each<4>(count, aligned(x, out), [&](size_t at, auto width) {
        float values[decltype(width)::value];
        load(values, x + at);
        store(out + at, values);
    });
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
