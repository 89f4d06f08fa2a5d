// Muon (Jordan et al. 2024) on matrices of one shape, but for their products:
//
//     g = gradient * clip,   clip = min(1, max_grad_norm / (norm + 1e-6)) / loss_scale
//     m = momentum m + g,    u = g + momentum m
//     X = u / (|u| + 1e-7)
//     five times:  X = a X + (b A + c A A) X   with A = X XT, a = 3.4445, b = -4.775, c = 2.0315
//     p = (1 - lr decay) p - lr sqrt(max(1, rows / cols)) X
//
// Where the norm is not finite nothing happens at all: u is then 0, and p and m stay as they are.
//
// m, p, gradient: arenas in f32; offsets: where in them each matrix of [rows, cols] begins, `count`
// elements each; u, X: the matrices behind one another, in f32. A tall matrix (rows > cols) stands
// for its transpose, so that A has the side min(rows, cols), n here; nothing is moved for it, only
// the products differ. The launches of a step, for all matrices of a shape together:
//
//     muon_step_params
//     muon_momentum         u, and each block's share of |u|^2
//     muon_normalize            X from u
//     five times:
//       products            A = X XT  [n, n]    tall: XT X
//       products            S = A A   [n, n]    A is symmetric
//       muon_axpby        B = b A + c S
//       products            P = B X   [rows, cols]   tall: X B, for B is symmetric
//       muon_axpby        X = a X + P         a as `x`'s factor, 1 as `y`'s; in place
//     muon_update_T         p, and its copy in T
//
// Bytes of the elementwise parts, a parameter: 16 + 8 + 5 * 12 + 14. Bound by memory.
#include "lib/reduce.cuh"
#include "lib/vector.cuh"

// What one step needs to know, made by `muon_step_params`.
struct Rates {
    double learning_rate;
    float clip;
    int go;  // 0: leave everything as it is
};

// Launch: one thread. loss_scale: what the gradients are too large by, or null: 1.
extern "C" __global__ void muon_step_params(const double *__restrict__ learning_rate,
                                      const float *__restrict__ norm,
                                      const float *__restrict__ loss_scale,
                                      Rates *__restrict__ rates, float max_grad_norm) {
    const float scale = loss_scale != nullptr ? *loss_scale : 1.0f;
    rates->learning_rate = *learning_rate;
    rates->clip = fminf(1.0f, max_grad_norm / (*norm + 1e-6f)) / scale;
    rates->go = isfinite(*norm);
}

// Launch of the kernels that take `offsets`: blocks of 256 threads, any number of them along x, a
// matrix each along y. partials: [gridDim.y, gridDim.x] in f64; the order of a sum is that of the
// launch.
extern "C" __global__ void __launch_bounds__(256)
muon_momentum(const float *__restrict__ gradients, float *__restrict__ moments,
              float *__restrict__ us, double *__restrict__ partials,
              const unsigned long long *__restrict__ offsets, unsigned long long count,
              const Rates *__restrict__ rates, double momentum) {
    const size_t offset = offsets[blockIdx.y];
    const float *gradient = gradients + offset;
    float *m = moments + offset, *u = us + blockIdx.y * count;
    const float clip = rates->clip, keep = static_cast<float>(momentum);
    const bool go = rates->go;
    double squares = 0.0;
    each<4>(count, aligned(gradient, m, u), [&](size_t at, auto width) {
        constexpr int N = decltype(width)::value;
        float gs[N], ms[N], values[N] = {};
        if (go) {
            load(gs, gradient + at);
            load(ms, m + at);
#pragma unroll
            for (int i = 0; i < N; i++) {
                const float g = gs[i] * clip;
                ms[i] = keep * ms[i] + g;
                values[i] = g + keep * ms[i];
                squares += static_cast<double>(values[i]) * values[i];
            }
            store(m + at, ms);
        }
        store(u + at, values);
    });
    squares = row_sum(squares);
    if (threadIdx.x == 0) partials[blockIdx.y * gridDim.x + blockIdx.x] = squares;
}

// Every block adds its matrix's shares for itself, in the same order. blocks: gridDim.x of
// `muon_momentum`. x may be u. Launch: as above.
extern "C" __global__ void __launch_bounds__(256)
muon_normalize(const float *us, const double *__restrict__ partials, float *xs,
           unsigned long long count, int blocks) {
    const float *u = us + blockIdx.y * count;
    float *x = xs + blockIdx.y * count;
    const double *shares = partials + blockIdx.y * blocks;
    double squares = 0.0;
    for (int block = threadIdx.x; block < blocks; block += blockDim.x) squares += shares[block];
    const float norm = static_cast<float>(sqrt(row_sum(squares))) + 1e-7f;
    each<4>(count, aligned(u, x), [&](size_t at, auto width) {
        float values[decltype(width)::value];
        load(values, u + at);
#pragma unroll
        for (float &value : values) value /= norm;
        store(x + at, values);
    });
}

// out = of_x * x + of_y * y, over all matrices: `count` elements in all; out may be x.
// Launch: blocks of 256 threads along x, any number of them.
extern "C" __global__ void __launch_bounds__(256)
muon_axpby(const float *x, const float *__restrict__ y, float *out, float of_x, float of_y,
             unsigned long long count) {
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

// copies: the arena that products read, or null where that is p's. factor: sqrt(max(1, rows / cols)).
template <typename T>
__device__ void update(const float *xs, float *parameters, T *copies,
                       const unsigned long long *offsets, size_t count, const Rates *from,
                       double decay, double factor) {
    const Rates rates = *from;
    if (!rates.go) return;
    const size_t offset = offsets[blockIdx.y];
    const float *x = xs + blockIdx.y * count;
    float *p = parameters + offset;
    T *copy = copies != nullptr ? copies + offset : nullptr;
    const float shrink = static_cast<float>(1.0 - rates.learning_rate * decay);
    const float step = static_cast<float>(rates.learning_rate * factor);
    each<4>(count, aligned(x, p, copy), [&](size_t at, auto width) {
        constexpr int N = decltype(width)::value;
        float values[N], ps[N];
        load(values, x + at);
        load(ps, p + at);
#pragma unroll
        for (int i = 0; i < N; i++) ps[i] = ps[i] * shrink - step * values[i];
        store(p + at, ps);
        if (copy != nullptr) store(copy + at, ps);
    });
}

#define UPDATE(T)                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                              \
    muon_update_##T(const float *__restrict__ x, float *__restrict__ parameters,                   \
                    T *__restrict__ copies, const unsigned long long *__restrict__ offsets,        \
                    unsigned long long count, const Rates *__restrict__ rates, double decay,       \
                    double factor) {                                                               \
        update(x, parameters, copies, offsets, count, rates, decay, factor);                       \
    }

UPDATE(f32)
UPDATE(bf16)
UPDATE(f16)
