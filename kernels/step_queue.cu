// Device-side step queue: the host enqueues a record per run (a micro-batch of a step), kernels pop
// records and append results, and the host drains the results later. No host synchronization
// between steps.
//
//     step_queue_pop      control = records[*cursor], its loss scale times the dynamic loss scale
//     step_queue_report   results[*cursor] = (sum of nll, norm); ++*cursor
//     loss_scale_update   dynamic loss scale of the next step
//
// records, results: one per queued run; nll: [rows] f32, 0 where the target is ignored; norm: one
// f32, null if the run does not end a step; scaling: null without dynamic loss scaling. Bytes: 4 per
// row. 1 FLOP in f64 per row: bound by latency.
#include "lib/reduce.cuh"

// Inputs of a run that change from run to run: `Control` in src/backend/gpu/launch_context.rs.
struct StepRecord {
    double learning_rate, muon_learning_rate;
    unsigned long long step;
    float loss_scale;
    unsigned begin;  // index of its first window in the order of all queued runs
};
static_assert(sizeof(StepRecord) == STEP_RECORD_BYTES);

struct StepResult {
    double loss;
    float norm;
    unsigned unused;
};
static_assert(sizeof(StepResult) == STEP_RESULT_BYTES);

// Dynamic loss scaling against underflow of f16 gradients, as PyTorch's GradScaler: the scale is
// halved by a step with non-finite gradients and doubled after 2,000 finite ones in a row.
struct LossScale {
    float scale;
    unsigned finite_steps;
};
constexpr unsigned GROWTH_INTERVAL = 2000;

// Launch: one thread.
extern "C" __global__ void step_queue_pop(const StepRecord *__restrict__ records,
                                          const unsigned *__restrict__ cursor,
                                          const LossScale *__restrict__ scaling,
                                          StepRecord *__restrict__ control) {
    StepRecord record = records[*cursor];  // mutant: first_record_always
    if (scaling != nullptr) record.loss_scale *= scaling->scale;  // mutant: loss_not_scaled
    *control = record;
}

// Launch: one block of 1024 threads. The sum is in f64, in an order fixed by the launch.
extern "C" __global__ void __launch_bounds__(1024)
step_queue_report(const float *__restrict__ nll, const float *__restrict__ norm,
                  StepResult *__restrict__ results, unsigned *__restrict__ cursor, int rows) {
    double sum = 0.0;  // mutant: loss_summed_in_f32
    for (int row = threadIdx.x; row < rows; row += blockDim.x) sum += nll[row];
    sum = row_sum(sum);
    if (threadIdx.x == 0) {
        results[*cursor] = {sum, norm != nullptr ? *norm : 0.0f, 0};
        ++*cursor;  // mutant: cursor_not_advanced
    }
}

// Launch: one thread, after the last reader of the scale in a step.
extern "C" __global__ void loss_scale_update(const float *__restrict__ norm,
                                             LossScale *__restrict__ scaling) {
    LossScale next = *scaling;
    if (!isfinite(*norm)) {
        next = {next.scale * 0.5f, 0};  // mutant: count_kept_after_overflow
    } else if (++next.finite_steps == GROWTH_INTERVAL) {
        next = {next.scale * 2.0f, 0};  // mutant: scale_never_doubled
    }
    *scaling = next;
}
