// Muon (Jordan et al. 2024) on one matrix of the arena, but for its products:
//
//     g = gradient * clip,   clip = min(1, max_grad_norm / (norm + 1e-6)) / loss_scale
//     m = momentum m + g,    u = g + momentum m
//     X = u / (|u| + 1e-7)
//     five times:  X = a X + (b A + c A A) X   with A = X XT, a = 3.4445, b = -4.775, c = 2.0315
//     p = (1 - lr decay) p - lr sqrt(max(1, rows / cols)) X
//
// Where the norm is not finite nothing happens at all: u is then 0, and p and m stay as they are.
//
// m, p, gradient: [rows, cols] in f32, the matrix's place in the arenas; X: the same in T. A tall
// matrix (rows > cols) stands for its transpose, so that A has the side min(rows, cols), n here;
// nothing is moved for it, only the products differ. The launches of a step:
//
//     muon_rates                                once for all matrices
//     muon_momentum         u in f32, and each block's share of |u|^2
//     muon_scale_T          X from u
//     five times:
//       product, f32 out    A = X XT  [n, n]    tall: XT X
//       cast_f32_T          A in T (f32: itself)
//       product, f32 out    S = A A   [n, n]    A is symmetric: AT or A, as is convenient
//       muon_combine_T      B = b A + c S
//       product, f32 out    P = B X   [rows, cols]   tall: X B, for B is symmetric
//       muon_combine_T      X = a X + P         a as `x`'s factor, 1 as `y`'s; in place
//     muon_update_T         p, and its copy in T
//
// Bytes of the elementwise parts at bf16, a parameter: 16 + 6 + 5 * 8 + 12. Bound by memory.
#include "lib/reduce.cuh"
#include "lib/vector.cuh"

// What one step needs to know, made once a step by `muon_rates`.
struct Rates {
    double learning_rate;
    float clip;
    int go;  // 0: leave everything as it is
};

// Launch: one thread. loss_scale: what the gradients are too large by, or null: 1.
extern "C" __global__ void muon_rates(const double *__restrict__ learning_rate,
                                      const float *__restrict__ norm,
                                      const float *__restrict__ loss_scale,
                                      Rates *__restrict__ rates, float max_grad_norm) {
    const float scale = loss_scale != nullptr ? *loss_scale : 1.0f;
    rates->learning_rate = *learning_rate;
    rates->clip = fminf(1.0f, max_grad_norm / (*norm + 1e-6f)) / scale;
    rates->go = isfinite(*norm);
}

// partials: [gridDim.x] in f64. Launch of this and of all below: blocks of 256 threads along x, any
// number of them; the order of the sum is that of the launch.
extern "C" __global__ void __launch_bounds__(256)
muon_momentum(const float *__restrict__ gradient, float *__restrict__ m, float *__restrict__ u,
              double *__restrict__ partials, unsigned long long count,
              const Rates *__restrict__ rates, double momentum) {
    const float clip = rates->clip, keep = static_cast<float>(momentum);
    const bool go = rates->go;
    double squares = 0.0;
    each<4>(count, aligned(gradient, m, u), [&](size_t at, auto width) {
        constexpr int N = decltype(width)::value;
        float gs[N], ms[N], us[N] = {};
        if (go) {
            load(gs, gradient + at);
            load(ms, m + at);
#pragma unroll
            for (int i = 0; i < N; i++) {
                const float g = gs[i] * clip;
                ms[i] = keep * ms[i] + g;
                us[i] = g + keep * ms[i];
                squares += static_cast<double>(us[i]) * us[i];
            }
            store(m + at, ms);
        }
        store(u + at, us);
    });
    squares = row_sum(squares);
    if (threadIdx.x == 0) partials[blockIdx.x] = squares;
}

// Every block adds the shares for itself, in the same order. blocks: the grid of `muon_momentum`.
template <typename T>
__device__ void scale(const float *u, const double *partials, T *x, size_t count, int blocks) {
    double squares = 0.0;
    for (int block = threadIdx.x; block < blocks; block += blockDim.x) squares += partials[block];
    const float norm = static_cast<float>(sqrt(row_sum(squares))) + 1e-7f;
    each<4>(count, aligned(u, x), [&](size_t at, auto width) {
        float values[decltype(width)::value];
        load(values, u + at);
#pragma unroll
        for (float &value : values) value /= norm;
        store(x + at, values);
    });
}

// out = of_x * x + of_y * y; out may be x.
template <typename T>
__device__ void combine(const T *x, const float *y, T *out, float of_x, float of_y, size_t count) {
    each<4>(count, aligned(x, y, out), [&](size_t at, auto width) {
        constexpr int N = decltype(width)::value;
        float xs[N], ys[N];
        load(xs, x + at);
        load(ys, y + at);
#pragma unroll
        for (int i = 0; i < N; i++) xs[i] = of_x * xs[i] + of_y * ys[i];
        store(out + at, xs);
    });
}

// copy: null where p itself is what the products read. factor: sqrt(max(1, rows / cols)).
template <typename T>
__device__ void update(const T *x, float *p, T *copy, size_t count, const Rates *from, double decay,
                       double factor) {
    const Rates rates = *from;
    if (!rates.go) return;
    const float shrink = static_cast<float>(1.0 - rates.learning_rate * decay);
    const float step = static_cast<float>(rates.learning_rate * factor);
    each<4>(count, aligned(x, p, copy), [&](size_t at, auto width) {
        constexpr int N = decltype(width)::value;
        float xs[N], ps[N];
        load(xs, x + at);
        load(ps, p + at);
#pragma unroll
        for (int i = 0; i < N; i++) ps[i] = ps[i] * shrink - step * xs[i];
        store(p + at, ps);
        if (copy != nullptr) store(copy + at, ps);
    });
}

extern "C" __global__ void __launch_bounds__(256)
muon_scale_f32(const float *__restrict__ u, const double *__restrict__ partials,
               float *__restrict__ x, unsigned long long count, int blocks) {
    scale(u, partials, x, count, blocks);
}

extern "C" __global__ void __launch_bounds__(256)
muon_scale_bf16(const float *__restrict__ u, const double *__restrict__ partials,
                bf16 *__restrict__ x, unsigned long long count, int blocks) {
    scale(u, partials, x, count, blocks);
}

extern "C" __global__ void __launch_bounds__(256)
muon_scale_f16(const float *__restrict__ u, const double *__restrict__ partials,
               half *__restrict__ x, unsigned long long count, int blocks) {
    scale(u, partials, x, count, blocks);
}

extern "C" __global__ void __launch_bounds__(256)
muon_combine_f32(const float *x, const float *__restrict__ y, float *out, float of_x, float of_y,
                 unsigned long long count) {
    combine(x, y, out, of_x, of_y, count);
}

extern "C" __global__ void __launch_bounds__(256)
muon_combine_bf16(const bf16 *x, const float *__restrict__ y, bf16 *out, float of_x, float of_y,
                  unsigned long long count) {
    combine(x, y, out, of_x, of_y, count);
}

extern "C" __global__ void __launch_bounds__(256)
muon_combine_f16(const half *x, const float *__restrict__ y, half *out, float of_x, float of_y,
                 unsigned long long count) {
    combine(x, y, out, of_x, of_y, count);
}

extern "C" __global__ void __launch_bounds__(256)
muon_update_f32(const float *__restrict__ x, float *__restrict__ p, float *__restrict__ copy,
                unsigned long long count, const Rates *__restrict__ rates, double decay,
                double factor) {
    update(x, p, copy, count, rates, decay, factor);
}

extern "C" __global__ void __launch_bounds__(256)
muon_update_bf16(const bf16 *__restrict__ x, float *__restrict__ p, bf16 *__restrict__ copy,
                 unsigned long long count, const Rates *__restrict__ rates, double decay,
                 double factor) {
    update(x, p, copy, count, rates, decay, factor);
}

extern "C" __global__ void __launch_bounds__(256)
muon_update_f16(const half *__restrict__ x, float *__restrict__ p, half *__restrict__ copy,
                unsigned long long count, const Rates *__restrict__ rates, double decay,
                double factor) {
    update(x, p, copy, count, rates, decay, factor);
}
