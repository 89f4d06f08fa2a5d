// Global gradient norm, summed in f64 in a fixed order:
//
//     norm = sqrt(sum of gradients[i]^2) / loss_scale
//
// gradients: [count] in f32, the whole arena; partials: [gridDim.x of grad_norm_partials or
// grad_norm_runs] in f64;
// loss_scale: one f32, null means 1; norm: one f32.
// Bytes: 4 count. 2 FLOPs in f64 per value: bound by memory on GPUs with full-rate f64 units.
#include "lib/reduce.cuh"
#include "lib/vector.cuh"

// Launch: blocks of 256 threads along x, any number. The order of the sum depends on the grid: the
// same grid gives the same bits.
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)
grad_norm_partials(const float *__restrict__ gradients, double *__restrict__ partials,
                   unsigned long long count) {
    const size_t threads = static_cast<size_t>(gridDim.x) * blockDim.x;
    const size_t thread = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const size_t vector_end = aligned(gradients) ? count / 4 * 4 : 0;
    double sum = 0.0;
    for (size_t at = 4 * thread; at < vector_end; at += 4 * threads) {
        float values[4];
        load(values, gradients + at);
#pragma unroll
        // mutant: squares_in_f32
        for (int i = 0; i < 4; i++) sum += static_cast<double>(values[i]) * values[i];
    }
    for (size_t at = vector_end + thread; at < count; at += threads) {
        sum += static_cast<double>(gradients[at]) * gradients[at];  // mutant: tail_skipped
    }
    sum = row_sum(sum);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// A range of the arena whose sum of squares does not depend on the rest of the launch: ranks that share
// the runs of an arena compute the same partials as one.
struct Run {
    unsigned long long start, count;
};

// Launch: a block of 256 threads per run.
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)
grad_norm_runs(const float *__restrict__ gradients, const Run *__restrict__ runs,
               double *__restrict__ partials) {
    const Run run = runs[blockIdx.x];
    double sum = 0.0;
    // mutant: run_tail_skipped
    for (size_t at = threadIdx.x; at < run.count; at += blockDim.x) {
        const double value = gradients[run.start + at];  // mutant: first_run_always
        sum += value * value;
    }
    sum = row_sum(sum);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// Launch: one block of 256 threads.
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)
grad_norm(const double *__restrict__ partials, const float *__restrict__ loss_scale,
          float *__restrict__ norm, int blocks) {
    double sum = 0.0;
    // mutant: last_partial_dropped
    for (int block = threadIdx.x; block < blocks; block += blockDim.x) sum += partials[block];
    sum = row_sum(sum);
    if (threadIdx.x == 0) {
        const double scale = loss_scale != nullptr ? *loss_scale : 1.0;
        *norm = static_cast<float>(sqrt(sum) / scale);  // mutant: scaled_twice
    }
}
