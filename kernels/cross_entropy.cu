// Softmax cross-entropy over logits in memory and its gradient: the LM head for any hidden size,
// and the generic path for those that fused_linear_cross_entropy.cu covers.
//
//     lse     = log(sum of exp(z))
//     nll     = lse - z[target]                                 0 if the target is ignored
//     argmax  = the first of equal largest z
//     dlogits = loss_scale * (exp(z - lse) - onehot(target))    0 if the target is ignored
//
// The logits z = x wT of a chunk of rows are one matmul, dx = dlogits w and dw += dlogitsT x are
// two more, so the logits of a whole batch never exist. z is f32: in bf16, values near 16 are 0.06
// apart, which costs nll two digits and creates ties for argmax. dlogits is T, an operand of the
// matmuls.
//
// logits: [rows, vocab] f32, rows `stride` apart; targets, argmax: [rows] u32; nll: [rows] f32;
// dlogits: [rows, vocab] T, rows `dlogits_stride` apart, or null for the loss alone. dlogits may
// be the memory of the logits if its rows are as many bytes apart. No other overlaps.
// Bytes at bf16: 10 rows vocab, of which the second 4 come from cache, or 4 without dlogits. Two
// exponentials and about 10 FLOPs per logit: bound by memory.
//
// Launch: blocks of whole warps, at most 1024 threads; any grid along x. Accesses are 16 bytes wide
// if strides are multiples of four and pointers aligned, whatever `vocab` is.
#include "lib/ptx.cuh"
#include "lib/reduce.cuh"
#include "lib/vector.cuh"

// Below every logit but finite, so that differences to it are never NaN.
constexpr float LOWEST = -1e30f;

// Online softmax over part of a row.
struct OnlineSoftmax {
    float max;
    float sum;   // of exp(z - max)
    int argmax;  // first column of the maximum
};

__device__ OnlineSoftmax combine(OnlineSoftmax a, OnlineSoftmax b) {
    const float max = fmaxf(a.max, b.max);
    // mutant: last_of_equal_partials
    const bool second = b.max > a.max || (b.max == a.max && b.argmax < a.argmax);
    return {max,
            a.sum * ex2_approx((a.max - max) * LOG2E) + b.sum * ex2_approx((b.max - max) * LOG2E),
            second ? b.argmax : a.argmax};
}

// Combines the partial results of all threads of a block, for each of them.
__device__ OnlineSoftmax combine_block(OnlineSoftmax softmax) {
    for (int offset = WARP_SIZE / 2; offset > 0; offset /= 2) {
        softmax = combine(softmax, {__shfl_xor_sync(FULL_MASK, softmax.max, offset),
                                    __shfl_xor_sync(FULL_MASK, softmax.sum, offset),
                                    __shfl_xor_sync(FULL_MASK, softmax.argmax, offset)});
    }
    __shared__ OnlineSoftmax partials[MAX_WARPS];
    if (threadIdx.x % WARP_SIZE == 0) partials[threadIdx.x / WARP_SIZE] = softmax;
    __syncthreads();
    softmax = partials[0];
    for (int warp = 1; warp < blockDim.x / WARP_SIZE; warp++) {
        softmax = combine(softmax, partials[warp]);
    }
    // The next row must not overwrite partial results that a slower warp still reads.
    __syncthreads();  // mutant: partials_overwritten
    return softmax;
}

// Adds N logits from `column` on.
template <int N>
__device__ void add(OnlineSoftmax &softmax, const float *row, int column) {
    float z[N];
    load(z, row + column);
    float new_max = z[0];
#pragma unroll
    for (int i = 1; i < N; i++) new_max = fmaxf(new_max, z[i]);
    if (new_max > softmax.max) {
        softmax.sum *= ex2_approx((softmax.max - new_max) * LOG2E);  // mutant: sum_not_rescaled
        softmax.max = new_max;
#pragma unroll
        // mutant: last_of_equals_in_a_vector
        for (int i = N - 1; i >= 0; i--) {
            if (z[i] == new_max) softmax.argmax = column + i;
        }
    }
#pragma unroll
    for (int i = 0; i < N; i++) softmax.sum += ex2_approx((z[i] - softmax.max) * LOG2E);
}

// Gradient of the logits in columns [from, to), N per thread and blockDim.x * N at a time. In
// place, a gradient is never stored beyond its logit, so that only logits already read are
// overwritten.
template <int N, typename T>
__device__ void store_gradient(const float *row, T *gradient, int from, int to,
                               OnlineSoftmax softmax, int target, float scale) {
    const float factor = scale / softmax.sum;  // mutant: sum_not_inverted
    for (int base = from; base < to; base += N * blockDim.x) {
        const int column = base + N * threadIdx.x;
        float z[N];
        if (column < to) load(z, row + column);
        __syncthreads();  // mutant: logits_overwritten_early
        if (column >= to) continue;
#pragma unroll
        for (int i = 0; i < N; i++) {
            z[i] = ex2_approx((z[i] - softmax.max) * LOG2E) * factor;
            if (column + i == target) z[i] -= scale;  // mutant: no_one_hot
        }
        store(gradient + column, z);
    }
}

template <typename T>
__device__ void cross_entropy(const float *logits, const uint32_t *targets, const float *loss_scale,
                              float *nll, uint32_t *argmax, T *dlogits, int rows, int vocab,
                              int stride, int dlogits_stride) {
    constexpr int N = 4;
    // mutant: unaligned_rows_vectorized
    const bool vectors = aligned(logits, dlogits) && stride % N == 0 && dlogits_stride % N == 0;
    const int vector_end = vectors ? vocab / N * N : 0;
    for (int row = blockIdx.x; row < rows; row += gridDim.x) {
        const float *z = logits + static_cast<size_t>(row) * stride;
        const bool counts = targets[row] < vocab;
        const int target = counts ? static_cast<int>(targets[row]) : -1;
        const float target_logit = counts ? z[target] : 0.0f;

        OnlineSoftmax softmax = {LOWEST, 0.0f, vocab};
        for (int column = N * threadIdx.x; column < vector_end; column += N * blockDim.x) {
            add<N>(softmax, z, column);
        }
        for (int column = vector_end + threadIdx.x; column < vocab; column += blockDim.x) {
            add<1>(softmax, z, column);
        }
        softmax = combine_block(softmax);
        if (threadIdx.x == 0) {
            // mutant: loss_of_ignored_target
            nll[row] = counts ? logf(softmax.sum) + (softmax.max - target_logit) : 0.0f;
            argmax[row] = softmax.argmax < vocab ? softmax.argmax : 0;
        }
        if (dlogits != nullptr) {
            T *gradient = dlogits + static_cast<size_t>(row) * dlogits_stride;
            const float scale = counts ? *loss_scale : 0.0f;  // mutant: gradient_of_ignored_target
            store_gradient<N>(z, gradient, 0, vector_end, softmax, target, scale);
            // mutant: tail_skipped
            store_gradient<1>(z, gradient, vector_end, vocab, softmax, target, scale);
        }
    }
}

#define ENTRIES(T)                                                                                 \
    extern "C" __global__ void __launch_bounds__(1024)                                             \
    cross_entropy_##T(const float *logits, const uint32_t *__restrict__ targets,                   \
                      const float *__restrict__ loss_scale, float *__restrict__ nll,               \
                      uint32_t *__restrict__ argmax, T *dlogits, int rows, int vocab, int stride,  \
                      int dlogits_stride) {                                                        \
        cross_entropy(logits, targets, loss_scale, nll, argmax, dlogits, rows, vocab, stride,      \
                      dlogits_stride);                                                             \
    }

ENTRIES(f32)
ENTRIES(bf16)
ENTRIES(f16)
