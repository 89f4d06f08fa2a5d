// RMSNorm (Zhang & Sennrich 2019), fused with the residual addition before it:
//
//     sum  = x + residual, rounded to T           (or x, without a residual)
//     rstd = 1 / sqrt(mean(sum^2) + eps)
//     y    = sum * rstd * weight
//
// Backward, with n = sum * rstd, g = dy * weight, dsum the gradient of the residual stream:
//
//     dx      = dsum + rstd * (g - n * mean(g * n))
//     dweight += sum over rows of dy * n          (in f32, in two passes, the second for many norms)
//
// x, residual, sum, y, dy, dsum, dx: [rows, hidden]; weight: [hidden]; rstd: [rows] in f32;
// partials: [gridDim.x, hidden] and dweight: [hidden] in f32; partial sums of several norms follow one
// another. No overlaps.
// Bytes at bf16: 8 rows hidden + 4 rows in either direction. About 6 FLOPs per value forward, 12
// backward: bound by memory.
//
// Launch of rms_norm and rms_norm_backward: blocks of (threads per row, rows per block), shaped as
// `row_sum` requires, at most 256 threads; any grid along x. The backward also takes 4 blockDim.y bytes
// of dynamic shared memory for each column, with columns rounded up to whole passes of a row of threads.
#include "lib/reduce.cuh"
#include "lib/vector.cuh"

// Rows are distributed round-robin over blocks. All threads of a block stay in the loop for
// `row_sum`; those past the last row do nothing else.
template <int N, typename T>
__device__ void normalize(const T *x, const T *residual, const T *weight, T *sum, T *y, float *rstd,
                          int rows, int hidden, float eps) {
    const int first = N * threadIdx.x, stride = N * blockDim.x;
    for (int base = blockIdx.x * blockDim.y; base < rows; base += gridDim.x * blockDim.y) {
        const int row = base + threadIdx.y;
        const bool valid = row < rows;
        const size_t at = static_cast<size_t>(row) * hidden;
        float squares = 0.0f;
        for (int column = first; valid && column < hidden; column += stride) {
            float values[N];
            load(values, x + at + column);
            if (residual != nullptr) {
                float r[N];
                load(r, residual + at + column);
#pragma unroll
                for (int i = 0; i < N; i++) values[i] = to_float(from_float<T>(values[i] + r[i]));
                store(sum + at + column, values);  // mutant: residual_sum_not_stored
            }
#pragma unroll
            for (int i = 0; i < N; i++) squares += values[i] * values[i];
        }
        // mutant: mean_over_wrong_count
        const float scale = 1.0f / sqrtf(row_sum(squares) / hidden + eps);
        if (valid && threadIdx.x == 0) rstd[row] = scale;
        // A thread reads back its own columns: from cache, and in program order.
        const T *normed = residual != nullptr ? sum : x;
        for (int column = first; valid && column < hidden; column += stride) {
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
__device__ void normalize_backward(const T *x, const float *rstd, const T *weight, const T *dy,
                                   const T *dsum, T *dx, float *partials, int rows,
                                   int hidden) {
    // dweight of each row of threads; a column is private to one thread until the rows are added. The
    // values of consecutive threads are neighbors, without bank conflicts: [passes, N, blockDim.x].
    extern __shared__ float partial_rows[];
    const int first = N * threadIdx.x, stride = N * blockDim.x;
    const int row_size = (hidden + stride - 1) / stride * stride;
    float *partial = partial_rows + threadIdx.y * row_size + threadIdx.x;
    for (int column = first, pass = 0; column < hidden; column += stride, pass += stride) {
#pragma unroll
        for (int i = 0; i < N; i++) partial[pass + i * blockDim.x] = 0.0f;
    }
    for (int base = blockIdx.x * blockDim.y; base < rows; base += gridDim.x * blockDim.y) {
        const int row = base + threadIdx.y;
        const bool valid = row < rows;
        const size_t at = static_cast<size_t>(row) * hidden;
        const float scale = valid ? rstd[row] : 0.0f;
        float dot = 0.0f;
        for (int column = first, pass = 0; valid && column < hidden;
             column += stride, pass += stride) {
            float values[N], d[N], w[N];
            load(values, x + at + column);
            load(d, dy + at + column);
            load(w, weight + column);
#pragma unroll
            for (int i = 0; i < N; i++) {
                const float n = values[i] * scale;
                dot += d[i] * w[i] * n;
                partial[pass + i * blockDim.x] += d[i] * n;
            }
        }
        const float mean = row_sum(dot) / hidden;
        for (int column = first; valid && column < hidden; column += stride) {
            float values[N], d[N], w[N], residual[N] = {};
            load(values, x + at + column);
            load(d, dy + at + column);
            load(w, weight + column);
            if (dsum != nullptr) load(residual, dsum + at + column);  // mutant: dsum_dropped
#pragma unroll
            for (int i = 0; i < N; i++) {
                // mutant: mean_term_dropped
                values[i] = residual[i] + scale * (d[i] * w[i] - values[i] * scale * mean);
            }
            store(dx + at + column, values);
        }
    }
    __syncthreads();  // mutant: rows_added_early
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    for (int column = thread; column < hidden; column += blockDim.x * blockDim.y) {
        const int pass = column / stride * stride, in_pass = column - pass;
        const float *from = partial_rows + pass + in_pass % N * blockDim.x + in_pass / N;
        float total = 0.0f;
        for (int row = 0; row < blockDim.y; row++) total += from[row * row_size];
        partials[static_cast<size_t>(blockIdx.x) * hidden + column] = total;
    }
}

template <typename T>
__device__ void forward(const T *x, const T *residual, const T *weight, T *sum, T *y,
                            float *rstd, int rows, int hidden, float eps) {
    if (hidden % VEC<T> == 0 && aligned(x, residual, weight, sum, y)) {
        normalize<VEC<T>>(x, residual, weight, sum, y, rstd, rows, hidden, eps);
    } else {
        normalize<1>(x, residual, weight, sum, y, rstd, rows, hidden, eps);
    }
}

template <typename T>
__device__ void backward(const T *x, const float *rstd, const T *weight, const T *dy,
                         const T *dsum, T *dx, float *partials, int rows, int hidden) {
    if (hidden % VEC<T> == 0 && aligned(x, weight, dy, dsum, dx)) {
        normalize_backward<VEC<T>>(x, rstd, weight, dy, dsum, dx, partials, rows, hidden);
    } else {
        normalize_backward<1>(x, rstd, weight, dy, dsum, dx, partials, rows, hidden);
    }
}

// rms_norm: `residual` and `sum` are null if there is no residual. rms_norm_backward: dx, and each
// block's partial sum of dweight; `x` is the normalized input (the sum), `dsum` may be null.
#define ENTRIES(T)                                                                                 \
    extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)                                    \
    rms_norm_##T(const T *__restrict__ x, const T *__restrict__ residual,                          \
                 const T *__restrict__ weight, T *sum, T *__restrict__ y,                          \
                 float *__restrict__ rstd, int rows, int hidden, float eps) {                      \
        forward(x, residual, weight, sum, y, rstd, rows, hidden, eps);                         \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)                                    \
    rms_norm_backward_##T(const T *__restrict__ x, const float *__restrict__ rstd,                 \
                          const T *__restrict__ weight, const T *__restrict__ dy,                  \
                          const T *__restrict__ dsum, T *__restrict__ dx,                          \
                          float *__restrict__ partials, int rows, int hidden) {                    \
        backward(x, rstd, weight, dy, dsum, dx, partials, rows, hidden);                       \
    }

ENTRIES(f32)
ENTRIES(bf16)
ENTRIES(f16)

// dweight += sum of the partial sums, for all norms: partials [norms, most, hidden], of which `blocks` are
// written; offsets: start of each dweight in the arena of gradients. Launch: (ceil(hidden / 32), norms) blocks of (32, 32) threads;
// each row of threads adds every 32nd partial sum.
extern "C" __global__ void __launch_bounds__(1024)
rms_norm_backward_weight(const float *__restrict__ partials,
                         const unsigned long long *__restrict__ offsets,
                         float *__restrict__ gradients, int blocks, int hidden, int most) {
    constexpr int STRIPS = RMS_NORM_STRIPS;
    partials += static_cast<size_t>(blockIdx.y) * most * hidden;  // mutant: first_norm_always
    float *dweight = gradients + offsets[blockIdx.y];
    __shared__ float strips[STRIPS][WARP_SIZE];
    const int column = blockIdx.x * WARP_SIZE + threadIdx.x;
    float strip = 0.0f;
    if (column < hidden) {
        // mutant: last_partial_dropped
        for (int block = threadIdx.y; block < blocks; block += STRIPS) {
            strip += partials[static_cast<size_t>(block) * hidden + column];
        }
    }
    strips[threadIdx.y][threadIdx.x] = strip;
    __syncthreads();
    if (threadIdx.y == 0 && column < hidden) {
        float total = 0.0f;
        for (int i = 0; i < STRIPS; i++) total += strips[i][threadIdx.x];
        dweight[column] += total;  // mutant: dweight_assigned
    }
}
