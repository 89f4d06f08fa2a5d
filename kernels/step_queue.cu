// Steps that follow one another without the host: runs wait in device memory, each with its rates
// and the place of the windows it draws, and leave what they found in a list that is read when
// somebody asks.
//
//     step_queue_pop          control = records[*cursor], the loss scale times that of the scaling
//     step_queue_report        outcomes[*cursor] = sum of nll[r] where targets[r] counts, norm; ++*cursor
//     loss_scale_update   the scale of the losses for the next step
//
// records, outcomes: one for each run that waits; nll (f32), targets (u32): [rows]; norm: one f32, or
// null where this run ends no step; scaling: null where losses are not scaled.
// Bytes: 8 a row. 1 FLOP in f64 a row: bound by latency.
#include "lib/reduce.cuh"

constexpr unsigned IGNORE = 0xffffffffu;

// What a run needs to know beside the model: `Control` in src/backend/gpu/launcher.rs.
struct Record {
    double learning_rate, muon_learning_rate;
    unsigned long long step;
    float loss_scale;
    unsigned begin;  // where its windows stand among those of all runs
};

struct Outcome {
    double loss;
    float norm;
    unsigned unused;
};

// Losses times `scale` keep the gradients of f16 activations from vanishing. PyTorch's GradScaler:
// halved by a step whose gradients are not finite, doubled after 2,000 in a row whose are.
struct Scaling {
    float scale;
    unsigned good;
};
constexpr unsigned GROWTH_INTERVAL = 2000;

// Launch: one thread.
extern "C" __global__ void step_queue_pop(const Record *__restrict__ records,
                                      const unsigned *__restrict__ cursor,
                                      const Scaling *__restrict__ scaling,
                                      Record *__restrict__ control) {
    Record record = records[*cursor];
    if (scaling != nullptr) record.loss_scale *= scaling->scale;
    *control = record;
}

// Launch: one block of 1024 threads. The sum is in f64, and its order that of the launch.
extern "C" __global__ void __launch_bounds__(1024)
step_queue_report(const float *__restrict__ nll, const unsigned *__restrict__ targets,
             const float *__restrict__ norm, Outcome *__restrict__ outcomes,
             unsigned *__restrict__ cursor, int rows) {
    double sum = 0.0;
    for (int row = threadIdx.x; row < rows; row += blockDim.x) {
        if (targets[row] != IGNORE) sum += nll[row];
    }
    sum = row_sum(sum);
    if (threadIdx.x == 0) {
        outcomes[*cursor] = {sum, norm != nullptr ? *norm : 0.0f, 0};
        ++*cursor;
    }
}

// Launch: one thread, when all of the step has read the scale.
extern "C" __global__ void loss_scale_update(const float *__restrict__ norm,
                                             Scaling *__restrict__ scaling) {
    Scaling next = *scaling;
    if (!isfinite(*norm)) {
        next = {next.scale * 0.5f, 0};
    } else if (++next.good == GROWTH_INTERVAL) {
        next = {next.scale * 2.0f, 0};
    }
    *scaling = next;
}
