// Cross-entropy over logits in memory: the head for any hidden size, and the plain path of the others.
//
//     lse     = log(sum of exp(z))
//     nll     = lse - z[target]                                 0 where the target is ignored
//     argmax  = the first of equal largest z
//     dlogits = loss_scale * (exp(z - lse) - onehot(target))    0 where the target is ignored
//
// The logits z = x wT of a chunk of rows come from a product, and dx = dlogits w and
// dw += dlogitsT x are two more, so those of a whole batch never exist. z is f32: in bf16 the
// nearest neighbours of 16 lie 0.06 apart, which costs nll two digits and makes ties of what had
// a largest. dlogits is T, as a product reads it.
//
// logits: [rows, vocab] f32, rows `stride` apart; targets, argmax: [rows] u32; nll: [rows] f32;
// dlogits: [rows, vocab] T, rows `dlogits_stride` apart, or null for the loss alone. dlogits may
// be the logits' own memory if its rows are as many bytes apart. No other overlaps.
// Bytes at bf16: 10 rows vocab, of which the second 4 come from cache, or 4 without dlogits. Two
// exponentials a logit and some 10 FLOPs: bound by memory.
//
// Launch: blocks of whole warps, at most 1024 threads; a grid along x of any size. Strides in
// multiples of four and 16-byte pointers make for 16-byte accesses, whatever `vocab` is.
#include "lib/ptx.cuh"
#include "lib/reduce.cuh"
#include "lib/vector.cuh"

constexpr float LOG2_E = 1.4426950408889634f;
// Below every logit, and no infinity: a difference to it is a number.
constexpr float LOWEST = -1e30f;

// What is known of a part of a row.
struct Peak {
    float max;
    float sum;  // of exp(z - max)
    int at;     // the first column of the maximum
};

__device__ Peak join(Peak a, Peak b) {
    const float max = fmaxf(a.max, b.max);
    const bool second = b.max > a.max || (b.max == a.max && b.at < a.at);
    return {max,
            a.sum * exp2_approx((a.max - max) * LOG2_E) + b.sum * exp2_approx((b.max - max) * LOG2_E),
            second ? b.at : a.at};
}

// The peak of all threads' parts, given to each of them.
__device__ Peak join_block(Peak peak) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) {
        peak = join(peak, {__shfl_xor_sync(0xffffffffu, peak.max, offset),
                           __shfl_xor_sync(0xffffffffu, peak.sum, offset),
                           __shfl_xor_sync(0xffffffffu, peak.at, offset)});
    }
    __shared__ Peak parts[MAX_WARPS];
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = peak;
    __syncthreads();
    peak = parts[0];
    for (int warp = 1; warp < blockDim.x / WARP; warp++) peak = join(peak, parts[warp]);
    // The next row must not overwrite what a slower warp still reads.
    __syncthreads();
    return peak;
}

template <int N>
__device__ void look(Peak &peak, const float *row, int column) {
    float z[N];
    load(z, row + column);
    float top = z[0];
#pragma unroll
    for (int i = 1; i < N; i++) top = fmaxf(top, z[i]);
    if (top > peak.max) {
        peak.sum *= exp2_approx((peak.max - top) * LOG2_E);
        peak.max = top;
#pragma unroll
        for (int i = N - 1; i >= 0; i--) {
            if (z[i] == top) peak.at = column + i;
        }
    }
#pragma unroll
    for (int i = 0; i < N; i++) peak.sum += exp2_approx((z[i] - peak.max) * LOG2_E);
}

// Turns the logits of the columns [from, to) into their gradient, N a thread and blockDim.x * N at
// a time. In place, a gradient never lies beyond its logit, so what is written has been read.
template <int N, typename T>
__device__ void turn(const float *row, T *gradient, int from, int to, Peak peak, int target,
                     float scale) {
    const float factor = scale / peak.sum;
    for (int base = from; base < to; base += N * blockDim.x) {
        const int column = base + N * threadIdx.x;
        float z[N];
        if (column < to) load(z, row + column);
        __syncthreads();
        if (column >= to) continue;
#pragma unroll
        for (int i = 0; i < N; i++) {
            z[i] = exp2_approx((z[i] - peak.max) * LOG2_E) * factor;
            if (column + i == target) z[i] -= scale;
        }
        store(gradient + column, z);
    }
}

template <typename T>
__device__ void rows_of_logits(const float *logits, const uint32_t *targets, const float *loss_scale,
                               float *nll, uint32_t *argmax, T *dlogits, int rows, int vocab,
                               int stride, int dlogits_stride) {
    constexpr int N = 4;
    const bool vectors = aligned(logits, dlogits) && stride % N == 0 && dlogits_stride % N == 0;
    const int whole = vectors ? vocab / N * N : 0;
    for (int row = blockIdx.x; row < rows; row += gridDim.x) {
        const float *z = logits + static_cast<size_t>(row) * stride;
        const bool counts = targets[row] < vocab;
        const int target = counts ? static_cast<int>(targets[row]) : -1;
        const float hit = counts ? z[target] : 0.0f;

        Peak peak = {LOWEST, 0.0f, vocab};
        for (int column = N * threadIdx.x; column < whole; column += N * blockDim.x) {
            look<N>(peak, z, column);
        }
        for (int column = whole + threadIdx.x; column < vocab; column += blockDim.x) {
            look<1>(peak, z, column);
        }
        peak = join_block(peak);
        if (threadIdx.x == 0) {
            nll[row] = counts ? logf(peak.sum) + (peak.max - hit) : 0.0f;
            argmax[row] = peak.at < vocab ? peak.at : 0;
        }
        if (dlogits != nullptr) {
            T *gradient = dlogits + static_cast<size_t>(row) * dlogits_stride;
            const float scale = counts ? *loss_scale : 0.0f;
            turn<N>(z, gradient, 0, whole, peak, target, scale);
            turn<1>(z, gradient, whole, vocab, peak, target, scale);
        }
    }
}

extern "C" __global__ void __launch_bounds__(1024)
cross_entropy_f32(const float *logits, const uint32_t *__restrict__ targets,
                const float *__restrict__ loss_scale, float *__restrict__ nll,
                uint32_t *__restrict__ argmax, float *dlogits, int rows, int vocab, int stride,
                int dlogits_stride) {
    rows_of_logits(logits, targets, loss_scale, nll, argmax, dlogits, rows, vocab, stride,
                   dlogits_stride);
}

extern "C" __global__ void __launch_bounds__(1024)
cross_entropy_bf16(const float *logits, const uint32_t *__restrict__ targets,
                 const float *__restrict__ loss_scale, float *__restrict__ nll,
                 uint32_t *__restrict__ argmax, bf16 *dlogits, int rows, int vocab, int stride,
                 int dlogits_stride) {
    rows_of_logits(logits, targets, loss_scale, nll, argmax, dlogits, rows, vocab, stride,
                   dlogits_stride);
}

extern "C" __global__ void __launch_bounds__(1024)
cross_entropy_f16(const float *logits, const uint32_t *__restrict__ targets,
                const float *__restrict__ loss_scale, float *__restrict__ nll,
                uint32_t *__restrict__ argmax, half *dlogits, int rows, int vocab, int stride,
                int dlogits_stride) {
    rows_of_logits(logits, targets, loss_scale, nll, argmax, dlogits, rows, vocab, stride,
                   dlogits_stride);
}
