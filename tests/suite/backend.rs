//! Host backends against the f64 reference: whole programs on odd shapes.

use laam::backend::cpu::{Cpu, CpuKernels};
use laam::backend::reference::Reference;
use laam::backend::{Arena, Backend, Inputs, ProgramId, Session, SessionSpec};
use laam::bench::check::{Selection, Size, check};
use laam::dtype::Dtype;
use laam::llama::ops::{Attention, AttentionBackward, AttentionShape, FusedLinearCrossEntropy};
use laam::llama::step::{self, BatchInputs};
use laam::llama::{
    AdamW, Buffer, BufferKind, BufferRole, Muon, Op, Optimizer, Program, Recompute,
    StepHyperparams, update,
};
use laam::model::{Config, Layout, RopeScaling, Span};
use laam::random::{Philox, Stream};
use laam::tokens::{Batch, IGNORE};
use laam::train::{Engine, Footprint};

use crate::gpu;

/// An odd-sized model.
pub fn config(heads: usize, kv_heads: usize, head_dim: usize, tied: bool) -> Config {
    Config {
        vocab_size: 1311,
        hidden_size: 36,
        intermediate_size: 77,
        num_hidden_layers: 2,
        num_attention_heads: heads,
        num_key_value_heads: kv_heads,
        head_dim,
        max_position_embeddings: 64,
        rms_norm_eps: 1e-6,
        rope_theta: 10000.0,
        rope_scaling: RopeScaling::None,
        tie_word_embeddings: tied,
        initializer_range: 0.02,
        bos_token_id: None,
        eos_token_ids: Vec::new(),
        pad_token_id: None,
        window_kind: None,
    }
}

fn cpu(threads: usize) -> Cpu {
    Cpu::f32(threads)
}

/// f32 with this processor's own kernels, and with the portable ones.
fn in_f32(threads: usize) -> [Cpu; 2] {
    let auto = Cpu::f32(threads);
    [auto, Cpu { kernels: CpuKernels::Portable, ..auto }]
}

/// bf16 with the software model of AMX tiles, and with what this processor has.
fn in_bf16(threads: usize) -> Vec<Cpu> {
    let auto = Cpu::bf16(threads);
    let mut cpus = vec![Cpu { kernels: CpuKernels::AmxModel, ..auto }];
    for (kernels, what) in [(CpuKernels::Avx512, "bfloat16 dot products"), (CpuKernels::Amx, "AMX")]
    {
        let cpu = Cpu { kernels, ..auto };
        match cpu.compute_dtype() {
            Dtype::F32 => eprintln!("SKIPPED: {what}, which this processor does not have"),
            _ => cpus.push(cpu),
        }
    }
    cpus
}

/// All of the above.
fn cpus(threads: usize) -> Vec<Cpu> {
    in_f32(threads).into_iter().chain(in_bf16(threads)).collect()
}

/// Random weights of a size at which every part of the model matters.
fn weights(layout: &Layout) -> Vec<f32> {
    let mut arena = vec![0.0; layout.len];
    for (sequence, parameter) in layout.parameters.iter().enumerate() {
        let deviation = if parameter.span.rows == 1 { 1.0 } else { 0.3 };
        let place = &mut arena[parameter.span.range()];
        Philox::new(5, Stream::Test).fill_normal(sequence as u32, deviation, place);
    }
    arena
}

/// Random tokens; some sequences are left-padded, some hold two documents.
fn batch(windows: usize, context: usize, vocab: usize) -> Batch {
    let random = Philox::new(6, Stream::Test);
    let draw = |at: usize, n: usize| (random.at(0, at as u64)[0] as usize % n) as u32;
    let mut batch = Batch { windows, context, ..Batch::default() };
    for at in 0..windows * context {
        let (window, column) = (at / context, at % context);
        let edge = draw(1_000_000 + window, context) as usize;
        batch.ids.push(draw(2 * at, vocab));
        let ignored = draw(2 * at + 1, 5) == 0;
        batch.targets.push(if ignored { IGNORE } else { draw(3_000_000 + at, vocab) });
        batch.first_key.push(match window % 3 {
            // Left-padded: pads see nothing, the rest sees what is not padding.
            1 => {
                if column < edge {
                    context
                } else {
                    edge
                }
            }
            // A second document starts in the middle.
            2 if column >= edge => edge,
            _ => 0,
        } as u32);
    }
    batch
}

pub fn feed<'a>(inputs: &BatchInputs, batch: &'a Batch) -> Inputs<'a> {
    Inputs {
        indices: inputs.bind(batch.arrays()),
        loss_scale: 1.0 / batch.counted().max(1) as f64,
        ..Inputs::default()
    }
}

/// ‖a − b‖ / ‖b‖. Panics if a value is not finite.
pub fn error(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    assert!(a.iter().chain(b).all(|x| x.is_finite()), "a value is not finite");
    let square = |x: f64| x * x;
    let difference: f64 = a.iter().zip(b).map(|(&a, &b)| square(f64::from(a) - f64::from(b))).sum();
    let norm: f64 = b.iter().map(|&b| square(f64::from(b))).sum();
    (difference / norm).sqrt()
}

struct TrainingResult {
    nll: Vec<f32>,
    argmax: Vec<u32>,
    gradients: Vec<f32>,
}

fn train_once(backend: &dyn Backend, config: &Config, batch: &Batch) -> TrainingResult {
    train_recomputing(backend, config, batch, Recompute::None)
}

fn train_recomputing(
    backend: &dyn Backend,
    config: &Config,
    batch: &Batch,
    recompute: Recompute,
) -> TrainingResult {
    let layout = Layout::new(config);
    let spec = SessionSpec { training: true, ..SessionSpec::default() };
    let mut session = backend.open(&layout, spec).unwrap();
    session.write(Arena::Parameters, &weights(&layout)).unwrap();
    let micro = step::training(config, &layout, batch.windows, batch.context, recompute);
    let program = session.load(micro.program).unwrap();
    // Twice: stale outputs and gradients of the first run must not leak into the second.
    for _ in 0..2 {
        session.write(Arena::Gradients, &vec![0.0; layout.len]).unwrap();
        session.run(program, &feed(&micro.inputs, batch)).unwrap();
    }
    TrainingResult {
        nll: session.floats(program, micro.losses.nll).unwrap(),
        argmax: session.indices(program, micro.losses.argmax).unwrap(),
        gradients: session.read(Arena::Gradients).unwrap(),
    }
}

/// Every parameter's gradient: an error of at most twice that of the plain loops, and `rounding`.
fn assert_gradients(
    what: &str,
    config: &Config,
    [fast, plain, exact]: [&TrainingResult; 3],
    rounding: f64,
) {
    for parameter in &Layout::new(config).parameters {
        let part = |outcome: &TrainingResult| outcome.gradients[parameter.span.range()].to_vec();
        let [fast, plain, exact] = [fast, plain, exact].map(part);
        if exact.iter().all(|&g| g == 0.0) {
            // A single key always has weight 1: queries and keys get no gradient. Rounding may leave a
            // trace of one, no more than in the plain loops.
            let size = |g: &[f32]| g.iter().fold(0.0f32, |max, g| max.max(g.abs()));
            assert!(size(&fast) <= 1e-6, "{what}: d {}", parameter.name);
            continue;
        }
        let (off, bound) = (error(&fast, &exact), 2.0 * error(&plain, &exact) + rounding);
        assert!(off <= bound, "{what}: d {} off by {off} > {bound}", parameter.name);
    }
}

const SHAPES: [(usize, usize, usize, bool); 6] = [
    (18, 3, 2, false),
    (6, 2, 6, true),
    (9, 1, 4, false),
    (4, 4, 16, true),
    (2, 1, 34, false),
    (1, 1, 128, true),
];

#[test]
fn cpu_f32_training_matches_f64() {
    for (heads, kv_heads, head_dim, tied) in SHAPES {
        for (windows, context) in [(3, 37), (4, 1), (1, 64)] {
            let config = config(heads, kv_heads, head_dim, tied);
            let batch = batch(windows, context, config.vocab_size);
            let exact = train_once(&Reference::F64, &config, &batch);
            let plain = train_once(&Reference::F32, &config, &batch);
            for backend in in_f32(2) {
                let fast = train_once(&backend, &config, &batch);
                let what = format!(
                    "{heads}/{kv_heads} heads of {head_dim}, {windows} x {context}, kernels: {:?}",
                    backend.kernels
                );
                // Contract 2: at most twice the plain version's error, and rounding of the result.
                let bound = |plain: f64| 2.0 * plain + f64::from(f32::EPSILON);
                let nll = error(&fast.nll, &exact.nll);
                assert!(nll <= bound(error(&plain.nll, &exact.nll)), "{what}: nll off by {nll}");
                assert_gradients(&what, &config, [&fast, &plain, &exact], f64::from(f32::EPSILON));
                let same = fast.argmax.iter().zip(&exact.argmax).filter(|(a, b)| a == b).count();
                assert_eq!(same, fast.argmax.len(), "{what}: argmax");
            }
        }
    }
}

#[test]
fn cpu_is_bitwise_same_for_any_number_of_threads() {
    for (heads, kv_heads, head_dim) in [(18, 3, 2), (4, 2, 16)] {
        let config = config(heads, kv_heads, head_dim, false);
        let batch = batch(5, 64, config.vocab_size);
        for one in cpus(1) {
            let expected = train_once(&one, &config, &batch);
            for threads in [2, 3, 7] {
                let many = Cpu { threads, ..one };
                let got = train_once(&many, &config, &batch);
                let same = got.nll == expected.nll && got.gradients == expected.gradients;
                assert!(same, "heads of {head_dim}, {many:?}");
            }
        }
    }
}

#[test]
fn every_cpu_op_matches_f64() {
    for backend in cpus(2) {
        let selection = Selection { only: None, size: Size::Small, seed: 1 };
        let rows = check(&backend, &selection, |_| {}).unwrap();
        let failed: Vec<_> = rows.iter().filter(|row| !row.passed).collect();
        assert!(failed.is_empty(), "{backend:?}: {failed:#?}");
    }
}

/// Seeds whose outputs of one number cancel to a hundredth or less of their terms, or are logarithms
/// near 0.
#[test]
fn check_raises_no_alarm_if_terms_cancel() {
    for seed in [10, 15, 23, 39, 42, 49, 63, 80, 103, 112, 123, 124] {
        for only in ["rms_norm_backward", "attention"] {
            let selection = Selection { only: Some(only), size: Size::Small, seed };
            let rows = check(&cpu(1), &selection, |_| {}).unwrap();
            let failed: Vec<_> = rows.iter().filter(|row| !row.passed).collect();
            assert!(failed.is_empty(), "seed {seed}: {failed:#?}");
        }
    }
}

/// Enough rows for several partial sums of every reduction over them.
#[test]
fn cpu_bf16_gradients_match_f64() {
    for (heads, kv_heads, head_dim, tied) in [SHAPES[0], SHAPES[1], SHAPES[3], SHAPES[4]] {
        let config = config(heads, kv_heads, head_dim, tied);
        let batch = batch(5, 64, config.vocab_size);
        let mixed = Reference::mixed(Dtype::Bf16);
        let [plain, exact] = [&mixed as &dyn Backend, &Reference::F64]
            .map(|backend| train_once(backend, &config, &batch));
        for backend in in_bf16(2) {
            let fast = train_once(&backend, &config, &batch);
            let what = format!("head_dim {head_dim}, {backend:?}");
            assert_gradients(&what, &config, [&fast, &plain, &exact], 0.0);
        }
    }
}

/// Buffers after a program that needs no weights.
fn run_alone<const N: usize>(
    backend: &dyn Backend,
    program: &Program,
    inputs: &Inputs,
    buffers: [Buffer; N],
) -> [Vec<f32>; N] {
    let layout = Layout::new(&config(6, 2, 6, false));
    let mut session = backend.open(&layout, SessionSpec::default()).unwrap();
    let program = session.load(program.clone()).unwrap();
    session.run(program, inputs).unwrap();
    buffers.map(|buffer| session.floats(program, buffer).unwrap())
}

/// Scores in the hundreds, whose exponentials overflow f32 unless a maximum is subtracted.
#[test]
fn attention_with_large_scores_matches_f64() {
    for head_dim in [2, 4, 8, 16] {
        let shape = AttentionShape { batch: 2, seq_len: 45, heads: 6, kv_heads: 2, head_dim };
        let (wide, narrow) = (shape.rows() * shape.q_width(), shape.rows() * shape.kv_width());
        let mut program = Program::default();
        let mut floats = Vec::new();
        for (sequence, (len, size)) in
            [(wide, 15.0), (narrow, 15.0), (narrow, 1.0)].into_iter().enumerate()
        {
            let buffer = program.buffer("", BufferKind::Activation, len, BufferRole::Input);
            let mut values = vec![0.0; len];
            Philox::new(4, Stream::Test).fill_normal(sequence as u32, size, &mut values);
            floats.push((buffer, values));
        }
        let first_key = program.buffer("", BufferKind::Index, shape.rows(), BufferRole::Input);
        let out = program.buffer("", BufferKind::Activation, wide, BufferRole::Output);
        let lse =
            program.buffer("", BufferKind::Float, shape.rows() * shape.heads, BufferRole::Output);
        let [q, k, v] = [0, 1, 2].map(|at| floats[at].0);
        program.ops.push(Op::Attention(Attention { q, k, v, first_key, shape, out, lse }));
        let zeros = vec![0; shape.rows()];
        let inputs = Inputs {
            indices: vec![(first_key, &zeros)],
            floats: floats.iter().map(|(b, values)| (*b, values.as_slice().into())).collect(),
            ..Inputs::default()
        };
        let run = |backend: &dyn Backend| run_alone(backend, &program, &inputs, [out, lse]);
        let [exact, plain] = [Reference::F64, Reference::F32].map(|backend| run(&backend));
        assert!(exact[1].iter().any(|&lse| lse > 200.0));
        for backend in in_f32(2) {
            for ((got, plain), exact) in run(&backend).iter().zip(&plain).zip(&exact) {
                let (off, bound) = (error(got, exact), 2.0 * error(plain, exact) + 1e-6);
                assert!(off <= bound, "{backend:?}, heads of {head_dim}: {off} > {bound}");
            }
        }
    }
}

/// All scores are alike and far below 0, so that a weight computed from nothing but a row's log-sum-exp overflows.
#[test]
fn attention_gradients_with_very_negative_scores_match_f64() {
    for head_dim in [2, 8, 16, 34] {
        let shape = AttentionShape { batch: 2, seq_len: 45, heads: 6, kv_heads: 2, head_dim };
        let (wide, narrow) = (shape.rows() * shape.q_width(), shape.rows() * shape.kv_width());
        let mut program = Program::default();
        let mut input = |len| program.buffer("", BufferKind::Activation, len, BufferRole::Input);
        let [q, k, v, dout] = [wide, narrow, narrow, wide].map(&mut input);
        let first_key = program.buffer("", BufferKind::Index, shape.rows(), BufferRole::Input);
        let mut output = |kind, len| program.buffer("", kind, len, BufferRole::Output);
        let lse = output(BufferKind::Float, shape.rows() * shape.heads);
        let [out, dq, dk, dv] =
            [wide, wide, narrow, narrow].map(|len| output(BufferKind::Activation, len));
        program.ops.push(Op::Attention(Attention { q, k, v, first_key, shape, out, lse }));
        program.ops.push(Op::AttentionBackward(AttentionBackward {
            q,
            k,
            v,
            first_key,
            out,
            lse,
            dout,
            shape,
            dq,
            dk,
            dv,
        }));
        let zeros = vec![0; shape.rows()];
        let random = |len, sequence| {
            let mut values = vec![0.0; len];
            Philox::new(6, Stream::Test).fill_normal(sequence, 1.0, &mut values);
            values
        };
        // A score is -size sqrt(head_dim).
        let size = 1024.0;
        let floats = [
            (q, vec![-32.0; wide]),
            (k, vec![size / 32.0; narrow]),
            (v, random(narrow, 0)),
            (dout, random(wide, 1)),
        ];
        let inputs = Inputs {
            indices: vec![(first_key, &zeros)],
            floats: floats.iter().map(|(b, values)| (*b, values.as_slice().into())).collect(),
            ..Inputs::default()
        };
        let run = |backend: &dyn Backend| run_alone(backend, &program, &inputs, [out, lse, dv]);
        let exact = run(&Reference::F64);
        assert!(exact[1].iter().all(|&lse| lse < -1000.0));
        // Of an exponent: its own rounding, that of the log-sum-exp, and those of two products.
        let exponent = 4.0 * f64::from(size * (head_dim as f32).sqrt() * f32::EPSILON);
        for backend in cpus(2) {
            let plain = match backend.compute_dtype() {
                Dtype::F32 => run(&Reference::F32),
                dtype => run(&Reference::mixed(dtype)),
            };
            for ((got, plain), exact) in run(&backend).iter().zip(&plain).zip(&exact) {
                let (off, bound) = (error(got, exact), 2.0 * error(plain, exact) + exponent);
                assert!(off <= bound, "{backend:?}, heads of {head_dim}: {off} > {bound}");
            }
        }
    }
}

/// The losses' error from mixed precision is at most twice that of plain loops that round at the same points.
#[test]
fn twenty_bf16_steps_match_f64() {
    for head_dim in [8, 2, 64] {
        // Tiles compute heads of 2 as they do those of 8: in f32.
        let tiles = |cpu: &Cpu| matches!(cpu.kernels, CpuKernels::Amx | CpuKernels::AmxModel);
        let backends: Vec<Cpu> =
            in_bf16(2).into_iter().filter(|cpu| head_dim != 2 || !tiles(cpu)).collect();
        if backends.is_empty() {
            continue;
        }
        let config = gpu::config(head_dim);
        let run = |backend: &dyn Backend| gpu::train(backend, &config, false, gpu::STEPS);
        let exact = run(&Reference::F64);
        let plain = run(&Reference::mixed(Dtype::Bf16));
        for backend in backends {
            let got = run(&backend);
            for (what, got, plain, exact) in
                [("loss", &got.0, &plain.0, &exact.0), ("norm", &got.1, &plain.1, &exact.1)]
            {
                let (error, bound) =
                    (gpu::apart(got, exact), 2.0 * gpu::apart(plain, exact) + 1e-5);
                let what = format!("heads of {head_dim}, {:?}, {what}", backend.kernels);
                eprintln!("{what}: {error:.2e} of {bound:.2e}");
                assert!(error <= bound, "{what}: {error} > {bound}");
                // It does round: f32 stays a hundred times closer.
                assert!(error >= 1e-6, "{what}: {error} is too small for bfloat16");
            }
        }
    }
}

#[test]
fn kernels_that_the_processor_lacks_are_an_error() {
    let layout = Layout::new(&config(6, 2, 6, false));
    for kernels in [CpuKernels::Avx512, CpuKernels::Amx] {
        let cpu = Cpu { kernels, ..Cpu::bf16(1) };
        let opened = cpu.open(&layout, SessionSpec::default());
        assert_eq!(opened.is_ok(), cpu.compute_dtype() == Dtype::Bf16, "{kernels:?}");
        let Err(why) = opened else { continue };
        assert!(why.to_string().starts_with("this processor has no A"), "{why}");
        assert!(laam::error::hint_of(&why).is_some_and(|hint| hint.contains("`cpu_kernels`")));
    }
}

/// If a row is nearly certain of its target, the gradient is the remaining probability, which must survive the
/// rounding of probabilities.
#[test]
fn cross_entropy_gradient_of_confident_rows_matches_f64() {
    let (rows, hidden, vocab) = (70, 32, 600);
    let w = Span { offset: 0, rows: vocab, cols: hidden };
    let none = Span { offset: 0, rows: 0, cols: 0 };
    let layout = Layout {
        parameters: Vec::new(),
        embedding: w,
        blocks: Vec::new(),
        final_norm: none,
        head: w,
        len: w.len().next_multiple_of(Layout::ALIGN),
    };
    let mut tokens = vec![0.0; layout.len];
    Philox::new(5, Stream::Test).fill_normal(0, 1.0, &mut tokens);
    let tokens: Vec<f32> = tokens.iter().map(|&w| half::bf16::from_f32(w).to_f32()).collect();
    // Each row points at its target: a logit of some 14 above the others.
    let targets: Vec<u32> = (0..rows as u32).map(|row| row * 37 % vocab as u32).collect();
    let embedding = |&target: &u32| &tokens[target as usize * hidden..][..hidden];
    let x: Vec<f32> = targets.iter().flat_map(embedding).map(|w| 0.5 * w).collect();

    let mut program = Program::default();
    let mut input = |element, len| program.buffer("", element, len, BufferRole::Input);
    let (x_in, targets_in) =
        (input(BufferKind::Activation, x.len()), input(BufferKind::Index, rows));
    let mut output = |element, len| program.buffer("", element, len, BufferRole::Output);
    let (nll, argmax) = (output(BufferKind::Float, rows), output(BufferKind::Index, rows));
    let dx = output(BufferKind::Activation, x.len());
    let head = FusedLinearCrossEntropy {
        x: x_in,
        w,
        targets: targets_in,
        rows,
        nll,
        argmax,
        dx: Some(dx),
    };
    program.ops.push(Op::FusedLinearCrossEntropy(head));
    let inputs = Inputs {
        indices: vec![(targets_in, &targets)],
        floats: vec![(x_in, x.as_slice().into())],
        loss_scale: 1.0,
        ..Inputs::default()
    };
    let gradients = |backend: &dyn Backend| {
        let mut session = backend
            .open(&layout, SessionSpec { training: true, ..SessionSpec::default() })
            .unwrap();
        session.write(Arena::Parameters, &tokens).unwrap();
        let program = session.load(program.clone()).unwrap();
        session.run(program, &inputs).unwrap();
        [session.floats(program, dx).unwrap(), session.read(Arena::Gradients).unwrap()]
    };
    let exact = gradients(&Reference::F64);
    for backend in cpus(2) {
        for (got, exact) in gradients(&backend).iter().zip(&exact) {
            let off = error(got, exact);
            assert!(off < 4e-3, "{backend:?}: {off}");
        }
    }
}

/// Losses near 0 under large logits, where the log-sum-exp has no digits for them. All operands are exact in bfloat16.
#[test]
fn losses_near_zero_keep_their_digits() {
    let (vocab, hidden, rows) = (1311, 16, 70);
    let config = Config { vocab_size: vocab, hidden_size: hidden, ..self::config(6, 2, 6, true) };
    let layout = Layout::new(&config);
    let mut parameters = vec![0.0; layout.len];
    let w = layout.parameters[0].span;
    for (token, row) in parameters[w.range()].chunks_mut(hidden).enumerate() {
        row.fill(if token == vocab - 1 { 3.75 } else { 2.5 });
    }
    // Logits of the target from 60 to 67, those of others 20 to 22 below it. The target is the last token: what
    // is added to a sum that is 1 already would be lost.
    let x: Vec<f32> = (0..rows).flat_map(|row| [1.0 + (row % 8) as f32 / 64.0; 16]).collect();
    let targets = vec![vocab as u32 - 1; rows];
    let mut program = Program::default();
    let mut input = |kind, len| program.buffer("", kind, len, BufferRole::Input);
    let (x_in, targets_in) =
        (input(BufferKind::Activation, x.len()), input(BufferKind::Index, rows));
    let mut output = |kind| program.buffer("", kind, rows, BufferRole::Output);
    let (nll, argmax) = (output(BufferKind::Float), output(BufferKind::Index));
    let head =
        FusedLinearCrossEntropy { x: x_in, w, targets: targets_in, rows, nll, argmax, dx: None };
    program.ops.push(Op::FusedLinearCrossEntropy(head));
    let inputs = Inputs {
        indices: vec![(targets_in, &targets)],
        floats: vec![(x_in, x.as_slice().into())],
        ..Inputs::default()
    };
    let run = |backend: &dyn Backend| {
        let mut session = backend.open(&layout, SessionSpec::default()).unwrap();
        session.write(Arena::Parameters, &parameters).unwrap();
        let program = session.load(program.clone()).unwrap();
        session.run(program, &inputs).unwrap();
        session.floats(program, nll).unwrap()
    };
    let exact = run(&Reference::F64);
    assert!(exact.iter().all(|&nll| nll > 0.0 && nll < 1e-5));
    for backend in cpus(2) {
        for (row, (got, exact)) in run(&backend).iter().zip(&exact).enumerate() {
            // The sum of the exponentials is 1 and a little: its rounding, and that of its parts.
            let off = (got - exact).abs();
            assert!(off < 4.0 * f32::EPSILON, "{backend:?}, row {row}: {got} for {exact}");
        }
    }
}

fn logits(
    session: &mut dyn Session,
    decoding: &step::Decoding,
    program: ProgramId,
    ids: &[u32],
    start: &[u32],
    column: &[u32],
) -> Vec<f32> {
    let indices = vec![(decoding.ids, ids), (decoding.start, start), (decoding.position, column)];
    session.run(program, &Inputs { indices, ..Inputs::default() }).unwrap();
    session.floats(program, decoding.logits).unwrap()
}

/// A prompt at once and then token by token gives the logits of the whole text at once, also if the
/// sequences' prompts differ in length.
#[test]
fn decode_with_kv_cache_equals_one_pass() {
    for (heads, kv_heads, head_dim, tied) in SHAPES {
        for backend in [&Reference::F64 as &dyn Backend, &cpu(2)] {
            let config = config(heads, kv_heads, head_dim, tied);
            let layout = Layout::new(&config);
            let text = batch(2, 23, config.vocab_size);
            let windows = |n: usize| step::decoding(&config, &layout, 2, n, 40);
            let (whole, prefill, single) = (windows(23), windows(9), windows(1));
            let spec = SessionSpec { cache_len: whole.cache_len, ..SessionSpec::default() };
            let mut session = backend.open(&layout, spec).unwrap();
            session.write(Arena::Parameters, &weights(&layout)).unwrap();
            let [a, b, c] = [&whole, &prefill, &single]
                .map(|decoding| session.load(decoding.program.clone()).unwrap());
            let tokens = |window: usize, from: usize, to: usize| {
                text.ids[window * 23 + from..window * 23 + to].to_vec()
            };
            let expected = logits(&mut *session, &whole, a, &text.ids, &[0, 0], &[22, 20]);

            // Prompts of 9 and 7 tokens; the second is padded with anything.
            let mut ids = [tokens(0, 0, 9), tokens(1, 0, 7), vec![3, 3]].concat();
            let mut got = logits(&mut *session, &prefill, b, &ids, &[0, 0], &[8, 6]);
            for step in 0..14 {
                ids = [tokens(0, 9 + step, 10 + step), tokens(1, 7 + step, 8 + step)].concat();
                let start = [9 + step as u32, 7 + step as u32];
                got = logits(&mut *session, &single, c, &ids, &start, &[0, 0]);
            }
            let off = error(&got, &expected);
            assert!(off < 1e-5, "{}, heads of {head_dim}: {off}", backend.name());
        }
    }
}

#[test]
fn optimizer_updates_match_f64() {
    for muon in [None, Some(Muon { momentum: 0.95 })] {
        let config = config(6, 2, 6, false);
        let layout = Layout::new(&config);
        let optimizer = Optimizer {
            adamw: AdamW { beta1: 0.9, beta2: 0.99, epsilon: 1e-8 },
            muon,
            weight_decay: 0.1,
            max_grad_norm: 1.0,
        };
        let after = |backend: &dyn Backend| {
            let mut session = backend
                .open(&layout, SessionSpec { training: true, ..SessionSpec::default() })
                .unwrap();
            session.write(Arena::Parameters, &weights(&layout)).unwrap();
            let (program, norm) = update(&layout, &optimizer);
            let program = session.load(program).unwrap();
            for step in 1..=3 {
                // Each in a different direction: momentum would not show otherwise.
                let mut gradients = vec![0.0; layout.len];
                Philox::new(8, Stream::Test).fill_normal(step as u32, 0.3, &mut gradients);
                session.write(Arena::Gradients, &gradients).unwrap();
                let hyperparams =
                    StepHyperparams { learning_rate: 1e-2, muon_learning_rate: 2e-2, step };
                session.run(program, &Inputs { hyperparams, ..Inputs::default() }).unwrap();
                assert!(
                    session.floats(program, norm).unwrap()[0] > 1.0,
                    "clipping is part of the test"
                );
            }
            assert!(session.read(Arena::Gradients).unwrap().iter().all(|&g| g == 0.0));
            [Arena::Parameters, Arena::FirstMoment, Arena::SecondMoment]
                .map(|a| session.read(a).unwrap())
        };
        let exact = after(&Reference::F64);
        let plain = after(&Reference::F32);
        let fast = after(&cpu(2));
        for ((fast, plain), exact) in fast.iter().zip(&plain).zip(&exact) {
            let off = error(fast, exact);
            let bound = 2.0 * error(plain, exact) + f64::from(f32::EPSILON);
            assert!(off <= bound, "muon: {}: off by {off} > {bound}", muon.is_some());
        }
    }
}

#[test]
fn non_finite_gradient_skips_the_update() {
    let config = config(6, 2, 6, false);
    let layout = Layout::new(&config);
    let adamw = AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 };
    let muon = Some(Muon { momentum: 0.95 });
    let optimizer = Optimizer { adamw, muon, weight_decay: 0.1, max_grad_norm: 1.0 };
    for backend in [&Reference::F32 as &dyn Backend, &cpu(2)] {
        let mut session = backend
            .open(&layout, SessionSpec { training: true, ..SessionSpec::default() })
            .unwrap();
        session.write(Arena::Parameters, &weights(&layout)).unwrap();
        let mut gradients = weights(&layout);
        gradients[layout.blocks[1].down.offset] = f32::NAN;
        session.write(Arena::Gradients, &gradients).unwrap();
        let (program, norm) = update(&layout, &optimizer);
        let program = session.load(program).unwrap();
        let hyperparams =
            StepHyperparams { learning_rate: 1e-2, muon_learning_rate: 2e-2, step: 1 };
        session.run(program, &Inputs { hyperparams, ..Inputs::default() }).unwrap();
        assert!(session.floats(program, norm).unwrap()[0].is_nan());
        assert_eq!(
            session.read(Arena::Parameters).unwrap(),
            weights(&layout),
            "{}",
            backend.name()
        );
        assert!(session.read(Arena::FirstMoment).unwrap().iter().all(|&m| m == 0.0));
    }
}

#[test]
fn step_memory_equals_the_plan() {
    let config = config(18, 3, 2, false);
    let adamw = AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 };
    let optimizer = Optimizer { adamw, muon: None, weight_decay: 0.1, max_grad_norm: 1.0 };
    // More sequences than one micro-batch, and a smaller last one.
    let (windows, context) = (130, 64);
    let backend = cpu(2);
    let mut engine = Engine::new(&backend, &config, &optimizer, windows, context).unwrap();
    engine.write(Arena::Parameters, &weights(engine.layout())).unwrap();
    let hyperparams = StepHyperparams { learning_rate: 1e-3, muon_learning_rate: 0.0, step: 1 };
    engine.step(&[batch(windows, context, config.vocab_size)], hyperparams).unwrap();
    let planned = Footprint::new(&backend, &config, windows, context, Recompute::None).unwrap();
    assert_eq!(planned.micro_batch, 64);
    assert_eq!(engine.bytes(), planned.peak() - planned.workspace);
}

/// Each kind of recomputation takes less memory than the one before it.
#[test]
fn recomputation_saves_memory_and_changes_no_bit() {
    let config = config(6, 2, 6, true);
    let batch = batch(3, 37, config.vocab_size);
    let reference = Reference::F64;
    let cpus = cpus(2);
    for backend in cpus.iter().map(|cpu| cpu as &dyn Backend).chain([&reference as &dyn Backend]) {
        let train = |recompute| train_recomputing(backend, &config, &batch, recompute);
        let memory =
            |recompute| Footprint::new(backend, &config, 3, 37, recompute).unwrap().activations;
        let (kept, mut bytes) = (train(Recompute::None), memory(Recompute::None));
        for recompute in [Recompute::Mlp, Recompute::Block] {
            let what = format!("{}, {recompute:?}", backend.name());
            let again = train(recompute);
            assert!(kept.nll == again.nll && kept.argmax == again.argmax, "{what}: losses");
            assert!(kept.gradients == again.gradients, "{what}: gradients");
            let less = memory(recompute);
            assert!(less < bytes, "{what}: {less} bytes, {bytes} before");
            bytes = less;
        }
    }
}

/// Losses and argmax, also right after a step whose buffers share the memory.
#[test]
fn evaluation_is_bitwise_equal_to_the_training_forward() {
    for (heads, kv_heads, head_dim, tied) in SHAPES {
        let reference = Reference::F64;
        let cpus = cpus(2);
        let all = cpus.iter().map(|cpu| cpu as &dyn Backend).chain([&reference as &dyn Backend]);
        for backend in all {
            let config = config(heads, kv_heads, head_dim, tied);
            let layout = Layout::new(&config);
            let batch = batch(3, 37, config.vocab_size);
            let mut session = backend
                .open(&layout, SessionSpec { training: true, ..SessionSpec::default() })
                .unwrap();
            session.write(Arena::Parameters, &weights(&layout)).unwrap();
            let training = step::training(&config, &layout, 3, 37, Recompute::None);
            let evaluation = step::evaluation(&config, &layout, 3, 37);
            let train = session.load(training.program).unwrap();
            let evaluate = session.load(evaluation.program).unwrap();
            session.run(train, &feed(&training.inputs, &batch)).unwrap();
            let nll = session.floats(train, training.losses.nll).unwrap();
            let argmax = session.indices(train, training.losses.argmax).unwrap();
            let gradients = session.read(Arena::Gradients).unwrap();
            session.run(evaluate, &feed(&evaluation.inputs, &batch)).unwrap();
            let what = format!("{}, heads of {head_dim}", backend.name());
            assert!(nll == session.floats(evaluate, evaluation.losses.nll).unwrap(), "{what}: nll");
            assert_eq!(
                argmax,
                session.indices(evaluate, evaluation.losses.argmax).unwrap(),
                "{what}"
            );
            assert!(
                gradients == session.read(Arena::Gradients).unwrap(),
                "{what}: evaluation writes no gradient"
            );
            assert!(
                nll.iter().zip(&batch.targets).all(|(&nll, &t)| (nll == 0.0) == (t == IGNORE)),
                "{what}: a loss for each counted target only"
            );
        }
    }
}

/// As torch.argmax, also across the segments of a vocabulary.
#[test]
fn argmax_is_the_first_of_equal_logits() {
    let reference = Reference::F32;
    let cpus = cpus(2);
    for backend in cpus.iter().map(|cpu| cpu as &dyn Backend).chain([&reference as &dyn Backend]) {
        let config = config(6, 2, 6, false);
        let layout = Layout::new(&config);
        let batch = batch(2, 9, config.vocab_size);
        let mut arena = weights(&layout);
        // Every token has an equal one beside it, and more in its segment and in the next.
        let head = layout.head;
        for word in 0..head.rows {
            let twin = word % 300 / 2 * 2;
            let from = head.offset + twin * head.cols;
            arena.copy_within(from..from + head.cols, head.offset + word * head.cols);
        }
        let mut session = backend.open(&layout, SessionSpec::default()).unwrap();
        session.write(Arena::Parameters, &arena).unwrap();
        let evaluation = step::evaluation(&config, &layout, 2, 9);
        let program = session.load(evaluation.program).unwrap();
        session.run(program, &feed(&evaluation.inputs, &batch)).unwrap();
        let argmax = session.indices(program, evaluation.losses.argmax).unwrap();
        let first = |&guess: &u32| guess < 300 && guess % 2 == 0;
        assert!(argmax.iter().all(first), "{}: {argmax:?}", backend.name());
    }
}

/// Several micro-batches leave the gradient of their union.
#[test]
fn gradients_accumulate_over_micro_batches() {
    for backend in [&Reference::F64 as &dyn Backend, &cpu(2)] {
        let config = config(6, 2, 6, true);
        let layout = Layout::new(&config);
        let both = batch(4, 21, config.vocab_size);
        let gradients = |parts: &[Batch]| {
            let mut session = backend
                .open(&layout, SessionSpec { training: true, ..SessionSpec::default() })
                .unwrap();
            session.write(Arena::Parameters, &weights(&layout)).unwrap();
            for part in parts {
                let micro =
                    step::training(&config, &layout, part.windows, part.context, Recompute::None);
                let program = session.load(micro.program).unwrap();
                let inputs = Inputs {
                    indices: micro.inputs.bind(part.arrays()),
                    loss_scale: 1.0 / both.counted() as f64,
                    ..Inputs::default()
                };
                session.run(program, &inputs).unwrap();
            }
            session.read(Arena::Gradients).unwrap()
        };
        let whole = gradients(std::slice::from_ref(&both));
        let parts = gradients(&[both.slice(0, 1), both.slice(1, 3), both.slice(3, 4)]);
        for parameter in &layout.parameters {
            let place = parameter.span.range();
            let off = error(&parts[place.clone()], &whole[place]);
            assert!(off < 1e-5, "{}: d {} off by {off}", backend.name(), parameter.name);
        }
    }
}
