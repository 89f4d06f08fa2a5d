// AdamW (Loshchilov & Hutter 2019) in PyTorch's arithmetic, on pieces of the flat arenas:
//
//     g  = gradient * clip,   clip = min(1, max_grad_norm / (norm + 1e-6)) / loss_scale
//     m += (1 - beta1) (g - m)
//     v  = beta2 v + (1 - beta2) g^2
//     p  = (1 - lr decay) p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + epsilon)
//
// Where the norm is not finite nothing happens at all. What changes from step to step (learning
// rate, t, norm) is read from device memory, so that a captured graph serves every step.
//
// gradient, p, m, v: arenas in f32; copy: one in T, p for the products. No overlaps.
// Bytes: 28 a parameter, 30 with the copy. About 15 FLOPs: bound by memory.
#include "lib/vector.cuh"

// What one step needs to know, made once a step by `adamw_step_params`.
struct Rates {
    double learning_rate;
    float clip;
    float step_size;   // lr / (1 - beta1^t)
    float correction;  // sqrt(1 - beta2^t)
    int go;            // 0: leave everything as it is
};

// x^n by squaring: as exact as a library's pow for the n of a training run, and short.
__device__ double power(double x, unsigned long long n) {
    double result = 1.0;
    for (; n > 0; n >>= 1) {
        if (n & 1) result *= x;
        x *= x;
    }
    return result;
}

// Launch: one thread. `step` counts from 1; loss_scale: what the gradients are too large by, or
// null: 1. The norm is that of the gradients as they should be.
extern "C" __global__ void adamw_step_params(const double *__restrict__ learning_rate,
                                       const unsigned long long *__restrict__ step,
                                       const float *__restrict__ norm,
                                       const float *__restrict__ loss_scale,
                                       Rates *__restrict__ rates, float max_grad_norm,
                                       double beta1, double beta2) {
    const float scale = loss_scale != nullptr ? *loss_scale : 1.0f;
    rates->learning_rate = *learning_rate;
    rates->clip = fminf(1.0f, max_grad_norm / (*norm + 1e-6f)) / scale;
    rates->step_size = static_cast<float>(*learning_rate / (1.0 - power(beta1, *step)));
    rates->correction = static_cast<float>(sqrt(1.0 - power(beta2, *step)));
    rates->go = isfinite(*norm);
}

// A piece of the arenas: ranges of different decay are cut into such, so that one launch does all.
struct Chunk {
    unsigned long long start, count;
    double decay;
};

template <int N, typename T>
__device__ void update(const Rates &rates, const float *gradient, float *p, float *m, float *v,
                       T *copy, size_t from, size_t to, float shrink, float keep, float beta2,
                       float fresh, float epsilon) {
    for (size_t at = from + threadIdx.x * N; at < to; at += blockDim.x * N) {
        float gs[N], ps[N], ms[N], vs[N];
        load(gs, gradient + at);
        load(ps, p + at);
        load(ms, m + at);
        load(vs, v + at);
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float g = gs[i] * rates.clip;
            ms[i] += (g - ms[i]) * keep;
            vs[i] = vs[i] * beta2 + g * g * fresh;
            ps[i] = ps[i] * shrink -
                    rates.step_size * ms[i] / (sqrtf(vs[i]) / rates.correction + epsilon);
        }
        store(p + at, ps);
        store(m + at, ms);
        store(v + at, vs);
        if (copy != nullptr) store(copy + at, ps);
    }
}

template <typename T>
__device__ void adamw(const float *gradient, float *p, float *m, float *v, T *copy,
                      const Chunk *chunks, const Rates *from, double beta1, double beta2,
                      double epsilon) {
    const Rates rates = *from;
    if (!rates.go) return;
    const Chunk chunk = chunks[blockIdx.x];
    gradient += chunk.start, p += chunk.start, m += chunk.start, v += chunk.start;
    if (copy != nullptr) copy += chunk.start;
    // Rounded once from f64, like the constants of the other backends.
    const float shrink = static_cast<float>(1.0 - rates.learning_rate * chunk.decay);
    const float keep = static_cast<float>(1.0 - beta1), fresh = static_cast<float>(1.0 - beta2);
    const float old = static_cast<float>(beta2), small = static_cast<float>(epsilon);
    // A chunk begins anywhere: vectors for its middle part only where all begin alike.
    const size_t whole = aligned(gradient, p, m, v, copy) ? chunk.count / 4 * 4 : 0;
    update<4>(rates, gradient, p, m, v, copy, 0, whole, shrink, keep, old, fresh, small);
    update<1>(rates, gradient, p, m, v, copy, whole, chunk.count, shrink, keep, old, fresh, small);
}

// Launch: a block of 256 threads for each chunk. Some 4,096 elements a chunk keep a card busy.
extern "C" __global__ void __launch_bounds__(256)
adamw_f32(const float *__restrict__ gradient, float *__restrict__ p, float *__restrict__ m,
          float *__restrict__ v, const Chunk *__restrict__ chunks, const Rates *__restrict__ rates,
          double beta1, double beta2, double epsilon) {
    adamw<float>(gradient, p, m, v, nullptr, chunks, rates, beta1, beta2, epsilon);
}

extern "C" __global__ void __launch_bounds__(256)
adamw_bf16(const float *__restrict__ gradient, float *__restrict__ p, float *__restrict__ m,
           float *__restrict__ v, bf16 *__restrict__ copy, const Chunk *__restrict__ chunks,
           const Rates *__restrict__ rates, double beta1, double beta2, double epsilon) {
    adamw(gradient, p, m, v, copy, chunks, rates, beta1, beta2, epsilon);
}

extern "C" __global__ void __launch_bounds__(256)
adamw_f16(const float *__restrict__ gradient, float *__restrict__ p, float *__restrict__ m,
          float *__restrict__ v, half *__restrict__ copy, const Chunk *__restrict__ chunks,
          const Rates *__restrict__ rates, double beta1, double beta2, double epsilon) {
    adamw(gradient, p, m, v, copy, chunks, rates, beta1, beta2, epsilon);
}
