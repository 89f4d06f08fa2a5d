// Muon (Jordan et al. 2024) for a batch of matrices of one shape; the matmuls between are the
// device's:
//
//     g = gradient * clip,   clip = min(1, max_grad_norm / (norm + 1e-6)) / loss_scale
//     m = momentum m + g,    u = g + momentum m
//     X = u / (|u| + 1e-7)
//     five times:  X = a X + (b A + c A A) X   with A = X XT, a = 3.4445, b = -4.775, c = 2.0315
//     p = (1 - lr weight_decay) p - lr sqrt(max(1, rows / cols)) X
//
// If the norm is not finite, the step is skipped: u is then 0, and p and m are unchanged.
//
// m, p, gradient: arenas in f32; offsets: start of each [rows, cols] matrix in them, `count`
// elements each; u, X: the matrices contiguous, in f32. A tall matrix (rows > cols) is treated as
// its transpose, so that A is [n, n] with n = min(rows, cols); nothing is copied for it, only the
// matmuls differ. The launches of a step, for all matrices of a shape together:
//
//     muon_step_params
//     muon_momentum         u, and each block's partial sum of |u|^2
//     muon_normalize        X from u
//     five times (Newton-Schulz):
//       matmul              A = X XT  [n, n]    tall: XT X
//       matmul              S = A A   [n, n]    A is symmetric
//       muon_axpby          B = b A + c S
//       matmul              P = B X   [rows, cols]   tall: X B, as B is symmetric
//       muon_axpby          X = a X + P, in place
//     muon_update_T         p, and its shadow weights in T
//
// Bytes of the elementwise kernels per parameter: 16 + 8 + 5 * 12 + 14. Bound by memory.
#include "lib/reduce.cuh"
#include "lib/vector.cuh"

// Per-step values, computed by `muon_step_params`.
struct StepParams {
    double learning_rate;
    float clip;
    int apply;  // 0: skip the step
};
static_assert(sizeof(StepParams) == MUON_PARAMS_BYTES);

// Launch: one thread. loss_scale: factor in the gradients, null means 1.
extern "C" __global__ void muon_step_params(const double *__restrict__ learning_rate,
                                            const float *__restrict__ norm,
                                            const float *__restrict__ loss_scale,
                                            StepParams *__restrict__ params,
                                            float max_grad_norm) {
    const float scale = loss_scale != nullptr ? *loss_scale : 1.0f;
    params->learning_rate = *learning_rate;
    // mutant: loss_scale_kept
    params->clip = fminf(1.0f, max_grad_norm / (*norm + 1e-6f)) / scale;
    params->apply = isfinite(*norm);
}

// Launch of the kernels that take `offsets`: blocks of 256 threads, any number along x, one matrix
// each along y. partials: [gridDim.y, gridDim.x] in f64; the order of a sum is fixed by the launch.
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)
muon_momentum(const float *__restrict__ gradients, float *__restrict__ moments,
              float *__restrict__ us, double *__restrict__ partials,
              const unsigned long long *__restrict__ offsets, unsigned long long count,
              const StepParams *__restrict__ params, double momentum) {
    const size_t offset = offsets[blockIdx.y];
    const float *gradient = gradients + offset;  // mutant: first_gradient_always
    float *m = moments + offset, *u = us + blockIdx.y * count;
    const float clip = params->clip, beta = static_cast<float>(momentum);
    const bool apply = params->apply;
    double squares = 0.0;
    grid_stride<4>(count, aligned(gradient, m, u), [&](size_t at, auto width) {
        constexpr int N = decltype(width)::value;
        float gs[N], ms[N], values[N] = {};
        if (apply) {
            load(gs, gradient + at);
            load(ms, m + at);
#pragma unroll
            for (int i = 0; i < N; i++) {
                const float g = gs[i] * clip;  // mutant: not_clipped
                ms[i] = beta * ms[i] + g;
                values[i] = g + beta * ms[i];  // mutant: no_nesterov
                squares += static_cast<double>(values[i]) * values[i];
            }
            store(m + at, ms);
        }
        store(u + at, values);
    });
    squares = row_sum(squares);
    if (threadIdx.x == 0) partials[blockIdx.y * gridDim.x + blockIdx.x] = squares;
}

// Every block adds its matrix's partial sums itself, in the same order. blocks: gridDim.x of
// `muon_momentum`. x may be u. Launch: as above.
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)
muon_normalize(const float *us, const double *__restrict__ partials, float *xs,
               unsigned long long count, int blocks) {
    const float *u = us + blockIdx.y * count;
    float *x = xs + blockIdx.y * count;
    const double *own = partials + blockIdx.y * blocks;  // mutant: first_norm_always
    double squares = 0.0;
    // mutant: other_partials_dropped
    for (int block = threadIdx.x; block < blocks; block += blockDim.x) squares += own[block];
    const float norm = static_cast<float>(sqrt(row_sum(squares))) + 1e-7f;
    grid_stride<4>(count, aligned(u, x), [&](size_t at, auto width) {
        float values[decltype(width)::value];
        load(values, u + at);
#pragma unroll
        for (float &value : values) value /= norm;
        store(x + at, values);
    });
}

// out = a x + b y, elementwise over all matrices: `count` elements in all; out may be x.
// Launch: blocks of 256 threads along x, any number.
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)
muon_axpby(const float *x, const float *__restrict__ y, float *out, float a, float b,
           unsigned long long count) {
    grid_stride<4>(count, aligned(x, y, out), [&](size_t at, auto width) {
        constexpr int N = decltype(width)::value;
        float xs[N], ys[N];
        load(xs, x + at);
        load(ys, y + at);
#pragma unroll
        for (int i = 0; i < N; i++) xs[i] = a * xs[i] + b * ys[i];
        store(out + at, xs);
    });
}

// shadow: arena of the weights that matmuls read, null if that is p itself. factor:
// sqrt(max(1, rows / cols)).
template <typename T>
__device__ void update(const float *xs, float *parameters, T *shadows,
                       const unsigned long long *offsets, size_t count,
                       const StepParams *step_params, double weight_decay, double factor) {
    const StepParams params = *step_params;
    if (!params.apply) return;  // mutant: step_with_infinite_norm
    const size_t offset = offsets[blockIdx.y];
    const float *x = xs + blockIdx.y * count;
    float *p = parameters + offset;
    T *shadow = shadows != nullptr ? shadows + offset : nullptr;
    const float shrink = static_cast<float>(1.0 - params.learning_rate * weight_decay);
    const float step = static_cast<float>(params.learning_rate * factor);
    grid_stride<4>(count, aligned(x, p, shadow), [&](size_t at, auto width) {
        constexpr int N = decltype(width)::value;
        float values[N], ps[N];
        load(values, x + at);
        load(ps, p + at);
#pragma unroll
        // mutant: no_weight_decay
        for (int i = 0; i < N; i++) ps[i] = ps[i] * shrink - step * values[i];
        store(p + at, ps);
        if (shadow != nullptr) store(shadow + at, ps);  // mutant: shadow_not_stored
    });
}

#define ENTRIES(T)                                                                                 \
    extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)                                    \
    muon_update_##T(const float *__restrict__ x, float *__restrict__ parameters,                   \
                    T *__restrict__ shadow, const unsigned long long *__restrict__ offsets,        \
                    unsigned long long count, const StepParams *__restrict__ params,               \
                    double weight_decay, double factor) {                                          \
        update(x, parameters, shadow, offsets, count, params, weight_decay, factor);               \
    }

ENTRIES(f32)
ENTRIES(bf16)
ENTRIES(f16)
