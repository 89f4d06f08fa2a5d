// AdamW (Loshchilov & Hutter 2019) in PyTorch's arithmetic, on chunks of the flat arenas:
//
//     g  = gradient * clip,   clip = min(1, max_grad_norm / (norm + 1e-6)) / loss_scale
//     m += (1 - beta1) (g - m)
//     v  = beta2 v + (1 - beta2) g^2
//     p  = (1 - lr weight_decay) p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + epsilon)
//
// If the norm is not finite, the step is skipped. What changes between steps (learning rate, t,
// norm) is read from device memory, so that one captured graph serves every step.
//
// gradient, p, m, v: arenas in f32; shadow: p in T, the weights that matmuls read. No overlaps.
// Bytes: 28 per parameter, 30 with shadow weights. About 15 FLOPs: bound by memory.
#include "lib/vector.cuh"

// Per-step values, computed by `adamw_step_params`.
struct StepParams {
    double learning_rate;
    float clip;
    float step_size;   // lr / (1 - beta1^t)
    float correction;  // sqrt(1 - beta2^t)
    int apply;         // 0: skip the step
};
static_assert(sizeof(StepParams) == ADAMW_PARAMS_BYTES);

// x^n by squaring: as accurate as pow for the n of a training run, and short.
__device__ double power(double x, unsigned long long n) {
    double result = 1.0;
    for (; n > 0; n >>= 1) {
        if (n & 1) result *= x;
        x *= x;
    }
    return result;
}

// Launch: one thread. `step` counts from 1; loss_scale: factor in the gradients, null means 1. The
// norm is that of the unscaled gradients.
extern "C" __global__ void adamw_step_params(const double *__restrict__ learning_rate,
                                       const unsigned long long *__restrict__ step,
                                       const float *__restrict__ norm,
                                       const float *__restrict__ loss_scale,
                                       StepParams *__restrict__ params, float max_grad_norm,
                                       double beta1, double beta2) {
    const float scale = loss_scale != nullptr ? *loss_scale : 1.0f;
    params->learning_rate = *learning_rate;
    // mutant: loss_scale_kept
    params->clip = fminf(1.0f, max_grad_norm / (*norm + 1e-6f)) / scale;
    params->step_size = static_cast<float>(*learning_rate / (1.0 - power(beta1, *step)));
    params->correction = static_cast<float>(sqrt(1.0 - power(beta2, *step)));
    params->apply = isfinite(*norm);
}

// A range of the arenas with one weight decay: one launch covers all of them.
struct Chunk {
    unsigned long long start, count;
    double weight_decay;
};

template <int N, typename T>
__device__ void update(const StepParams &params, const float *gradient, float *p, float *m,
                       float *v, T *shadow, size_t from, size_t to, float shrink, float beta1_rest,
                       float beta2, float beta2_rest, float epsilon) {
    for (size_t at = from + threadIdx.x * N; at < to; at += blockDim.x * N) {
        float gs[N], ps[N], ms[N], vs[N];
        load(gs, gradient + at);
        load(ps, p + at);
        load(ms, m + at);
        load(vs, v + at);
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float g = gs[i] * params.clip;  // mutant: not_clipped
            ms[i] += (g - ms[i]) * beta1_rest;
            vs[i] = vs[i] * beta2 + g * g * beta2_rest;
            ps[i] = ps[i] * shrink -  // mutant: no_weight_decay
                    // mutant: epsilon_inside_the_root
                    params.step_size * ms[i] / (sqrtf(vs[i]) / params.correction + epsilon);
        }
        store(p + at, ps);
        store(m + at, ms);
        store(v + at, vs);
        if (shadow != nullptr) store(shadow + at, ps);  // mutant: shadow_not_stored
    }
}

template <typename T>
__device__ void adamw(const float *gradient, float *p, float *m, float *v, T *shadow,
                      const Chunk *chunks, const StepParams *step_params, double beta1,
                      double beta2, double epsilon) {
    const StepParams params = *step_params;
    if (!params.apply) return;  // mutant: step_with_infinite_norm
    const Chunk chunk = chunks[blockIdx.x];
    gradient += chunk.start, p += chunk.start, m += chunk.start, v += chunk.start;
    if (shadow != nullptr) shadow += chunk.start;
    // Rounded once from f64, as in the other backends.
    const float shrink = static_cast<float>(1.0 - params.learning_rate * chunk.weight_decay);
    const float rest1 = static_cast<float>(1.0 - beta1), rest2 = static_cast<float>(1.0 - beta2);
    const float decay2 = static_cast<float>(beta2), eps = static_cast<float>(epsilon);
    // A chunk starts anywhere: vectors only if all of its pointers are aligned.
    // mutant: unaligned_chunk_vectorized
    const size_t vector_end = aligned(gradient, p, m, v, shadow) ? chunk.count / 4 * 4 : 0;
    update<4>(params, gradient, p, m, v, shadow, 0, vector_end, shrink, rest1, decay2, rest2, eps);
    update<1>(params, gradient, p, m, v, shadow, vector_end, chunk.count, shrink, rest1, decay2,
              rest2, eps);
}

// Launch: a block of 256 threads per chunk. Chunks of about 4,096 elements fill a GPU.
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)
adamw_f32(const float *__restrict__ gradient, float *__restrict__ p, float *__restrict__ m,
          float *__restrict__ v, const Chunk *__restrict__ chunks,
          const StepParams *__restrict__ params, double beta1, double beta2, double epsilon) {
    adamw<float>(gradient, p, m, v, nullptr, chunks, params, beta1, beta2, epsilon);
}

#define ENTRIES(T)                                                                                 \
    extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)                                    \
    adamw_##T(const float *__restrict__ gradient, float *__restrict__ p, float *__restrict__ m,    \
              float *__restrict__ v, T *__restrict__ shadow, const Chunk *__restrict__ chunks,     \
              const StepParams *__restrict__ params, double beta1, double beta2,                   \
              double epsilon) {                                                                    \
        adamw(gradient, p, m, v, shadow, chunks, params, beta1, beta2, epsilon);                   \
    }

ENTRIES(bf16)
ENTRIES(f16)
