// Muon (Jordan et al. 2024) for a batch of matrices of one shape; the matmuls between are the
// device's:
//
//     g = gradient * clip,   clip = min(1, max_grad_norm / (norm + 1e-6)) / loss_scale
//     m = momentum m + g,    u = g + momentum m
//     X = u / (|u| + 1e-7)
//     five times:  X = (a I + b R + c R R) X   with R = X XT   (Newton-Schulz)
//     p = (1 - lr weight_decay) p - lr sqrt(max(1, rows / cols)) X
//
// If the norm is not finite, the step is skipped: u is then 0, and p and m are unchanged.
//
// m, p, gradient: arenas in f32; offsets: start of each [rows, cols] matrix in them, `count`
// elements each; u: the matrices contiguous, in f32; X, R, S, Z: in N, f32 or f16. A tall matrix
// (rows > cols) is treated as its transpose, so that R is [n, n] with n = min(rows, cols); nothing is
// copied for it, only the matmuls differ. The launches of a step, for all matrices of a shape together:
//
//     muon_step_params
//     muon_momentum         u, and each block's partial sum of |u|^2
//     muon_normalize_N      X from u
//     matmuls of src/llama/newton_schulz.rs, five times among them:
//       matmul              S = R R   [n, n]    R is symmetric
//       muon_polynomial_N   Z = a I + b R + c S, in place of S
//     muon_update_T         p, and its shadow weights in T; X in f32
//
// Bytes of the elementwise kernels per parameter: 16 + 8 + 14, and 12 per element of S. Bound by memory.
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
template <typename T>
__device__ void normalize(const float *us, const double *partials, T *xs, size_t count, int blocks) {
    const float *u = us + blockIdx.y * count;
    T *x = xs + blockIdx.y * count;
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

// z = a I + b r + c z for matrices [side, side], one each along y. Launch: blocks of 256 threads, any
// number along x.
template <typename T>
__device__ void polynomial(const T *rs, T *zs, float a, float b, float c, int side) {
    const size_t count = static_cast<size_t>(side) * side;
    const T *r = rs + blockIdx.y * count;  // mutant: first_square_always
    T *z = zs + blockIdx.y * count;
    grid_stride<4>(count, aligned(r, z), [&](size_t at, auto width) {
        constexpr int N = decltype(width)::value;
        float values[N], squares[N];
        load(values, r + at);
        load(squares, z + at);
#pragma unroll
        for (int i = 0; i < N; i++) {
            // mutant: no_identity
            const float diagonal = static_cast<unsigned>(at + i) % (side + 1) == 0 ? a : 0.0f;
            squares[i] = b * values[i] + c * squares[i] + diagonal;
        }
        store(z + at, squares);
    });
}

#define MATRIX_ENTRIES(T)                                                                          \
    extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)                                    \
    muon_normalize_##T(const float *u, const double *__restrict__ partials, T *x,                  \
                       unsigned long long count, int blocks) {                                     \
        normalize(u, partials, x, count, blocks);                                                  \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)                                    \
    muon_polynomial_##T(const T *__restrict__ r, T *z, float a, float b, float c, int side) {      \
        polynomial(r, z, a, b, c, side);                                                           \
    }

MATRIX_ENTRIES(f32)
MATRIX_ENTRIES(f16)

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
