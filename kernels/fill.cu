// out = value: [count] in f32.
//
// Bytes: 4 per value. No FLOPs: bound by memory.
//
// Launch: blocks of 256 threads along x, any number.
#include "lib/vector.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)
fill_f32(float *__restrict__ out, float value, unsigned long long count) {
    grid_stride<VEC<float>>(count, aligned(out), [&](size_t at, auto width) {
        float values[decltype(width)::value];
#pragma unroll
        for (float &x : values) x = value;
        store(out + at, values);
    });
}
