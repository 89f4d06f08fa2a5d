// RMSNorm (Zhang & Sennrich 2019) with the residual addition before it:
//
//     sum  = x + residual, rounded to T           (or x itself)
//     rstd = 1 / sqrt(mean(sum^2) + eps)
//     y    = sum * rstd * weight
//
// and back, with n = sum * rstd, g = dy * weight, dsum the gradient that goes past the norm:
//
//     dx      = dsum + rstd * (g - n * mean(g * n))
//     dweight += sum over rows of dy * n          (in f32, in two stages)
//
// x, residual, sum, y, dy, dsum, dx: [rows, hidden]; weight: [hidden]; rstd: [rows] in f32;
// partials: [gridDim.x, hidden] and dweight: [hidden] in f32. No two of them overlap.
// Bytes at bf16: 8 rows hidden + 4 rows either way. Some 6 and 12 FLOPs a value: bound by memory.
//
// Launch of the first two: blocks of (threads a row, rows at once), shaped as `row_sum` asks, at
// most 256 threads; a grid along x of any size. The backward one also wants
// 4 * blockDim.y * hidden bytes of dynamic shared memory.
#include "lib/reduce.cuh"
#include "lib/vector.cuh"

// Rows go to blocks in turn. All threads of a block stay in the loop to its end, for `row_sum`;
// those beyond the last row do nothing else.
template <int N, typename T>
__device__ void normalise(const T *x, const T *residual, const T *weight, T *sum, T *y, float *rstd,
                          int rows, int hidden, float eps) {
    const int first = N * threadIdx.x, stride = N * blockDim.x;
    for (int base = blockIdx.x * blockDim.y; base < rows; base += gridDim.x * blockDim.y) {
        const int row = base + threadIdx.y;
        const bool there = row < rows;
        const size_t at = static_cast<size_t>(row) * hidden;
        float squares = 0.0f;
        for (int column = first; there && column < hidden; column += stride) {
            float values[N];
            load(values, x + at + column);
            if (residual != nullptr) {
                float more[N];
                load(more, residual + at + column);
#pragma unroll
                for (int i = 0; i < N; i++) values[i] = widen(narrow<T>(values[i] + more[i]));
                store(sum + at + column, values);
            }
#pragma unroll
            for (int i = 0; i < N; i++) squares += values[i] * values[i];
        }
        const float scale = 1.0f / sqrtf(row_sum(squares) / hidden + eps);
        if (there && threadIdx.x == 0) rstd[row] = scale;
        // A thread reads back what it wrote or read itself: from the cache, and in order.
        const T *normed = residual != nullptr ? sum : x;
        for (int column = first; there && column < hidden; column += stride) {
            float values[N], w[N];
            load(values, normed + at + column);
            load(w, weight + column);
#pragma unroll
            for (int i = 0; i < N; i++) values[i] = values[i] * scale * w[i];
            store(y + at + column, values);
        }
    }
}

template <int N, typename T>
__device__ void backward(const T *x, const float *rstd, const T *weight, const T *dy, const T *dsum,
                         T *dx, float *partials, int rows, int hidden) {
    // [blockDim.y, hidden]; a thread alone touches its columns until the rows are added.
    extern __shared__ float shares[];
    float *share = shares + static_cast<size_t>(threadIdx.y) * hidden;
    const int first = N * threadIdx.x, stride = N * blockDim.x;
    for (int column = first; column < hidden; column += stride) {
#pragma unroll
        for (int i = 0; i < N; i++) share[column + i] = 0.0f;
    }
    for (int base = blockIdx.x * blockDim.y; base < rows; base += gridDim.x * blockDim.y) {
        const int row = base + threadIdx.y;
        const bool there = row < rows;
        const size_t at = static_cast<size_t>(row) * hidden;
        const float scale = there ? rstd[row] : 0.0f;
        float product = 0.0f;
        for (int column = first; there && column < hidden; column += stride) {
            float values[N], d[N], w[N];
            load(values, x + at + column);
            load(d, dy + at + column);
            load(w, weight + column);
#pragma unroll
            for (int i = 0; i < N; i++) {
                const float n = values[i] * scale;
                product += d[i] * w[i] * n;
                share[column + i] += d[i] * n;
            }
        }
        const float mean = row_sum(product) / hidden;
        for (int column = first; there && column < hidden; column += stride) {
            float values[N], d[N], w[N], past[N] = {};
            load(values, x + at + column);
            load(d, dy + at + column);
            load(w, weight + column);
            if (dsum != nullptr) load(past, dsum + at + column);
#pragma unroll
            for (int i = 0; i < N; i++) {
                values[i] = past[i] + scale * (d[i] * w[i] - values[i] * scale * mean);
            }
            store(dx + at + column, values);
        }
    }
    __syncthreads();
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    for (int column = thread; column < hidden; column += blockDim.x * blockDim.y) {
        float all = 0.0f;
        for (int row = 0; row < blockDim.y; row++) {
            all += shares[static_cast<size_t>(row) * hidden + column];
        }
        partials[static_cast<size_t>(blockIdx.x) * hidden + column] = all;
    }
}

template <typename T>
__device__ void forward_any(const T *x, const T *residual, const T *weight, T *sum, T *y,
                            float *rstd, int rows, int hidden, float eps) {
    if (hidden % FULL<T> == 0 && aligned(x, residual, weight, sum, y)) {
        normalise<FULL<T>>(x, residual, weight, sum, y, rstd, rows, hidden, eps);
    } else {
        normalise<1>(x, residual, weight, sum, y, rstd, rows, hidden, eps);
    }
}

template <typename T>
__device__ void backward_any(const T *x, const float *rstd, const T *weight, const T *dy,
                             const T *dsum, T *dx, float *partials, int rows, int hidden) {
    if (hidden % FULL<T> == 0 && aligned(x, weight, dy, dsum, dx)) {
        backward<FULL<T>>(x, rstd, weight, dy, dsum, dx, partials, rows, hidden);
    } else {
        backward<1>(x, rstd, weight, dy, dsum, dx, partials, rows, hidden);
    }
}

// Forward: without a residual to add, `residual` and `sum` are null. Back, the first stage: dx, and each
// block's share of dweight; `x` is the sum that was normalised, `dsum` is null where nothing goes past
// the norm.
#define ENTRIES(T)                                                                                 \
    extern "C" __global__ void __launch_bounds__(256)                                              \
    rms_norm_##T(const T *__restrict__ x, const T *__restrict__ residual,                          \
                 const T *__restrict__ weight, T *sum, T *__restrict__ y,                          \
                 float *__restrict__ rstd, int rows, int hidden, float eps) {                      \
        forward_any(x, residual, weight, sum, y, rstd, rows, hidden, eps);                         \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(256)                                              \
    rms_norm_backward_##T(const T *__restrict__ x, const float *__restrict__ rstd,                 \
                          const T *__restrict__ weight, const T *__restrict__ dy,                  \
                          const T *__restrict__ dsum, T *__restrict__ dx,                          \
                          float *__restrict__ partials, int rows, int hidden) {                    \
        backward_any(x, rstd, weight, dy, dsum, dx, partials, rows, hidden);                       \
    }

ENTRIES(f32)
ENTRIES(bf16)
ENTRIES(f16)

// The second stage: dweight += the sum of the shares, [blocks, hidden]. Launch: blocks of (32, 8)
// threads, ceil(hidden / 32) of them. Each row of threads adds every eighth share.
extern "C" __global__ void __launch_bounds__(256)
rms_norm_backward_weight(const float *__restrict__ partials, float *__restrict__ dweight, int blocks,
                         int hidden) {
    constexpr int STRIPS = 8;
    __shared__ float strips[STRIPS][WARP];
    const int column = blockIdx.x * WARP + threadIdx.x;
    float strip = 0.0f;
    if (column < hidden) {
        for (int block = threadIdx.y; block < blocks; block += STRIPS) {
            strip += partials[static_cast<size_t>(block) * hidden + column];
        }
    }
    strips[threadIdx.y][threadIdx.x] = strip;
    __syncthreads();
    if (threadIdx.y == 0 && column < hidden) {
        float all = 0.0f;
        for (int i = 0; i < STRIPS; i++) all += strips[i][threadIdx.x];
        dweight[column] += all;
    }
}
