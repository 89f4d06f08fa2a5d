//! The GPU backend over the simulator: whole training steps against the reference.

use std::ops::RangeInclusive;
use std::sync::Arc;

use laam::backend::gpu::{Gpu, Mode, Options};
use laam::backend::reference::Reference;
use laam::backend::{Arena, Backend};
use laam::corpus::Document;
use laam::device::sim::Sim;
use laam::dtype::Dtype;
use laam::kernels::BUILD;
use laam::llama::{AdamW, Muon, Optimizer, Recompute, StepHyperparams};
use laam::model::{Config, RopeScaling, initialize};
use laam::random::{Philox, Stream};
use laam::tokenizer::Style;
use laam::tokens::{Batch, IGNORE, WindowKind, Windows};
use laam::train::{Engine, TrainStep};

/// The backend in the simulator, or `None` after a loud line.
fn sim(dtype: Dtype, mode: Mode, threads: usize) -> Option<Gpu> {
    open(Options { mode, ..Options::new(dtype) }, threads)
}

fn open(options: Options, threads: usize) -> Option<Gpu> {
    if let Err(why) = BUILD.cuda {
        eprintln!("SKIPPED: the GPU backend in the simulator, because {why}");
        return None;
    }
    let simulator = ptx_race::Options { threads, ..ptx_race::Options::default() };
    let open = Arc::new(move || Ok(Box::new(Sim::new(simulator)?) as _));
    Some(Gpu::new(open, options).unwrap())
}

/// Issue-sized: hidden 64, two layers, 8 heads on 2 key/value heads, a vocabulary of 512.
pub fn config(head_dim: usize) -> Config {
    Config {
        vocab_size: 512,
        hidden_size: 64,
        intermediate_size: 96,
        num_hidden_layers: 2,
        num_attention_heads: 8,
        num_key_value_heads: 2,
        head_dim,
        max_position_embeddings: 64,
        rms_norm_eps: 1e-6,
        rope_theta: 10000.0,
        rope_scaling: RopeScaling::None,
        tie_word_embeddings: false,
        initializer_range: 0.02,
        bos_token_id: None,
        eos_token_ids: Vec::new(),
        pad_token_id: None,
        window_kind: None,
    }
}

fn batch(step: u64, config: &Config) -> Batch {
    let (windows, context) = (2, config.max_position_embeddings);
    let random = Philox::new(11, Stream::Test);
    let draw = |at: usize, n: usize| (random.at(step as u32, at as u64)[0] as usize % n) as u32;
    let mut batch = Batch { windows, context, ..Batch::default() };
    for at in 0..windows * context {
        // Few words, most often the next one after: something to learn.
        let id = draw(at, 40) * 7 % 500;
        batch.ids.push(id);
        batch.targets.push(if draw(9_000 + at, 9) == 0 { IGNORE } else { (id + 3) % 512 });
        batch.first_key.push(if at >= context {
            draw(77, context / 2).min((at - context) as u32)
        } else {
            0
        });
    }
    batch
}

/// An engine with the first weights in it.
pub fn engine(backend: &dyn Backend, config: &Config, muon: bool) -> Engine {
    let optimizer = Optimizer {
        adamw: AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 },
        muon: muon.then_some(Muon { momentum: 0.95 }),
        weight_decay: 0.1,
        max_grad_norm: 1.0,
    };
    let context = config.max_position_embeddings;
    let mut engine = Engine::new(backend, config, &optimizer, 2, context).unwrap();
    let weights = initialize(config, engine.layout(), 3);
    engine.write(Arena::Parameters, &weights).unwrap();
    engine
}

/// Losses and gradient norms of some steps.
pub fn steps(
    engine: &mut Engine,
    config: &Config,
    numbers: RangeInclusive<u64>,
) -> (Vec<f64>, Vec<f64>) {
    let one = |step| {
        let hyperparams = StepHyperparams { learning_rate: 1e-3, muon_learning_rate: 2e-2, step };
        let outcome = engine.step(&[batch(step, config)], hyperparams).unwrap();
        (outcome.loss, outcome.grad_norm)
    };
    numbers.map(one).unzip()
}

/// The losses and norms of some steps, and the weights and first moments after them.
pub fn train(
    backend: &dyn Backend,
    config: &Config,
    muon: bool,
    count: u64,
) -> (Vec<f64>, Vec<f64>, Vec<f32>) {
    let mut engine = engine(backend, config, muon);
    let (losses, norms) = steps(&mut engine, config, 1..=count);
    let arenas = [Arena::Parameters, Arena::FirstMoment].map(|arena| engine.read(arena).unwrap());
    (losses, norms, arenas.concat())
}

/// The largest difference of two series, relative to the second.
pub fn apart(a: &[f64], b: &[f64]) -> f64 {
    assert!(a.iter().chain(b).all(|x| x.is_finite()), "{a:?} beside {b:?}");
    a.iter().zip(b).map(|(a, b)| (a - b).abs() / b.abs()).fold(0.0, f64::max)
}

pub const STEPS: u64 = 20;

#[test]
fn recomputation_leaves_the_same_weights_on_a_device() {
    let config = config(8);
    let Some(backend) = sim(Dtype::Bf16, Mode::Graphs, 2) else { return };
    let weights = |recompute| {
        let mut engine = engine(&backend, &config, false).with_recompute(recompute);
        let (losses, _) = steps(&mut engine, &config, 1..=2);
        (losses, engine.read(Arena::Parameters).unwrap())
    };
    let kept = weights(Recompute::None);
    for recompute in [Recompute::Mlp, Recompute::Block] {
        assert!(kept == weights(recompute), "{recompute:?}");
    }
}

#[test]
fn twenty_steps_in_f32_follow_the_reference() {
    for (head_dim, muon) in [(8, false), (2, false), (64, true)] {
        let config = config(head_dim);
        let exact = train(&Reference::F64, &config, muon, STEPS);
        let Some(backend) = sim(Dtype::F32, Mode::Graphs, 2) else { return };
        let got = train(&backend, &config, muon, STEPS);
        let (loss, norm) = (apart(&got.0, &exact.0), apart(&got.1, &exact.1));
        eprintln!("f32 heads of {head_dim}: loss {loss:.2e}, norm {norm:.2e}");
        assert!(loss <= 1e-5 && norm <= 1e-4, "heads of {head_dim}: loss {loss}, norm {norm}");
        assert!(exact.0[19] < exact.0[0], "it learns: {:?}", exact.0);
    }
}

/// Mixed precision moves the losses; the kernels may move them at most twice as far as plain loops
/// that round at the same points.
#[test]
fn twenty_steps_in_bf16_follow_the_reference_that_rounds() {
    for head_dim in [8, 2, 64] {
        let config = config(head_dim);
        let exact = train(&Reference::F64, &config, false, STEPS);
        let plain = train(&Reference::mixed(Dtype::Bf16), &config, false, STEPS);
        let Some(backend) = sim(Dtype::Bf16, Mode::Graphs, 2) else { return };
        let got = train(&backend, &config, false, STEPS);
        for (what, got, plain, exact) in
            [("loss", &got.0, &plain.0, &exact.0), ("norm", &got.1, &plain.1, &exact.1)]
        {
            let (error, bound) = (apart(got, exact), 2.0 * apart(plain, exact) + 1e-5);
            eprintln!(
                "bf16 heads of {head_dim}, {what}: {error:.2e} of {bound:.2e}, {:.2e} from plain",
                apart(got, plain)
            );
            assert!(error <= bound, "heads of {head_dim}, {what}: {error} > {bound}");
        }
    }
}

/// Whole steps without a library for matmuls: within the same bounds.
#[test]
fn steps_with_laams_own_matmul_follow_the_reference() {
    let config = config(8);
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let exact = train(&Reference::F64, &config, true, 3);
        let plain = train(&Reference::mixed(dtype), &config, true, 3);
        let options = Options { own_matmul: true, mode: Mode::Graphs, ..Options::new(dtype) };
        let Some(backend) = open(options, 2) else { return };
        let got = train(&backend, &config, true, 3);
        for (got, plain, exact) in [(&got.0, &plain.0, &exact.0), (&got.1, &plain.1, &exact.1)] {
            let (error, bound) = (apart(got, exact), 2.0 * apart(plain, exact) + 1e-5);
            assert!(error <= bound, "{dtype:?}: {error} > {bound}");
        }
    }
}

#[test]
fn graphs_and_threads_change_no_bit() {
    let config = config(8);
    let Some(eager) = sim(Dtype::Bf16, Mode::Eager, 1) else { return };
    let whole = train(&eager, &config, true, 6);
    for (mode, threads) in [(Mode::Graphs, 1), (Mode::Eager, 2), (Mode::Graphs, 3)] {
        let other = sim(Dtype::Bf16, mode, threads).unwrap();
        assert!(train(&other, &config, true, 6) == whole, "{mode:?}, {threads} threads");
    }
}

/// What a checkpoint keeps (masters and moments, in f32) is all that the next step depends on.
#[test]
fn a_run_cut_and_resumed_is_the_unbroken_one() {
    let config = config(8);
    let Some(backend) = sim(Dtype::Bf16, Mode::Graphs, 2) else { return };
    let mut unbroken = engine(&backend, &config, true);
    steps(&mut unbroken, &config, 1..=3);
    let mut resumed = engine(&backend, &config, true);
    let arenas = [Arena::Parameters, Arena::FirstMoment, Arena::SecondMoment];
    for arena in arenas {
        resumed.write(arena, &unbroken.read(arena).unwrap()).unwrap();
    }
    let [one, other] = [&mut unbroken, &mut resumed].map(|engine| steps(engine, &config, 4..=6));
    assert_eq!(one, other);
    for arena in arenas {
        assert!(unbroken.read(arena).unwrap() == resumed.read(arena).unwrap(), "{arena:?}");
    }
}

/// An update that would spread what is not finite does not happen; the next one does.
#[test]
fn a_gradient_that_is_not_finite_changes_nothing() {
    let config = config(8);
    let Some(backend) = sim(Dtype::Bf16, Mode::Graphs, 2) else { return };
    let mut engine = engine(&backend, &config, true);
    steps(&mut engine, &config, 1..=2);
    let before = engine.read(Arena::Parameters).unwrap();
    let moments = engine.read(Arena::FirstMoment).unwrap();
    let mut poisoned = vec![0.0; before.len()];
    poisoned[engine.layout().blocks[1].down.offset] = f32::INFINITY;
    engine.write(Arena::Gradients, &poisoned).unwrap();
    let (_, norms) = steps(&mut engine, &config, 3..=3);
    assert!(!norms[0].is_finite());
    assert!(engine.read(Arena::Parameters).unwrap() == before);
    assert!(engine.read(Arena::FirstMoment).unwrap() == moments);
    let (_, norms) = steps(&mut engine, &config, 4..=4);
    assert!(norms[0].is_finite());
    assert!(engine.read(Arena::Parameters).unwrap() != before);
}

/// Windows of a small corpus, an engine for batches of three of them, and a plan of 13 steps: more
/// than a graph has in a row, with a short batch in between.
pub fn windows(kind: WindowKind) -> (Windows, Config, Vec<TrainStep>) {
    let tokenizer = crate::tokens::tokenizer(Style::Exact);
    let folder = tempfile::tempdir().unwrap();
    let text = "int main(void)\n{\n\treturn 0;\n}\n";
    let documents = [(0, 9), (1, 4)].map(|(i, n)| Document::new(format!("{i}.c"), text.repeat(n)));
    let file = crate::tokens::write(&folder.path().join("tokens"), &tokenizer, &documents);
    let windows = Windows::new(file, tokenizer, kind, 16, None).unwrap();
    let config = Config { max_position_embeddings: 16, num_hidden_layers: 1, ..config(8) };
    let steps = (0..13)
        .map(|step: usize| {
            let length = if step == 10 { 2 } else { 3 };
            let numbers = (0..length).map(|at| (7 * step + 5 * at) % windows.len()).collect();
            let hyperparams = StepHyperparams {
                learning_rate: 1e-3,
                muon_learning_rate: 2e-2,
                step: step as u64 + 1,
            };
            TrainStep { batches: vec![numbers], hyperparams }
        })
        .collect();
    (windows, config, steps)
}

#[test]
fn windows_drawn_on_the_device_train_as_those_of_the_host_do() {
    for kind in [WindowKind::Original, WindowKind::Stream, WindowKind::Addressed] {
        let (windows, config, steps) = windows(kind);
        let train = |max_resident_bytes, mode, at_once: usize| {
            let options = Options { max_resident_bytes, mode, ..Options::new(Dtype::F32) };
            let backend = open(options, 2)?;
            let mut engine = engine(&backend, &config, false);
            engine.upload_dataset(&windows, 3).unwrap();
            let mut outcomes = Vec::new();
            for steps in steps.chunks(at_once) {
                if at_once > 1 {
                    outcomes.extend(engine.steps(&windows, steps).unwrap());
                } else {
                    let batch = windows.draw(&steps[0].batches[0]).unwrap();
                    outcomes.push(engine.step(&[batch], steps[0].hyperparams).unwrap());
                }
            }
            Some((outcomes, engine.read(Arena::Parameters).unwrap()))
        };
        let Some(fed) = train(None, Mode::Eager, 1) else { return };
        assert!(fed.0.iter().all(|outcome| outcome.updated() && outcome.loss > 0.0));
        // Held on the device; held and recorded; brought by the host while the device works.
        for (max_resident_bytes, mode) in
            [(None, Mode::Eager), (None, Mode::Graphs), (Some(0), Mode::Graphs)]
        {
            let other = train(max_resident_bytes, mode, 13).unwrap();
            assert!(other == fed, "{kind:?}, at most {max_resident_bytes:?} bytes held, {mode:?}");
        }
    }
}

/// Gradients of so many batches are one step's that the list of waiting runs is full before its end.
#[test]
fn a_step_may_have_more_batches_than_may_wait() {
    let (windows, config, steps) = windows(WindowKind::Stream);
    let Some(backend) = sim(Dtype::F32, Mode::Graphs, 2) else { return };
    let batches: Vec<_> = (0..260).map(|at| vec![at % windows.len()]).collect();
    let hyperparams = steps[0].hyperparams;
    let drawn: Vec<_> = batches.iter().map(|numbers| windows.draw(numbers).unwrap()).collect();
    let mut engines = [(); 2].map(|()| engine(&backend, &config, false));
    engines[0].upload_dataset(&windows, 1).unwrap();
    let one = engines[0].steps(&windows, &[TrainStep { batches, hyperparams }]).unwrap();
    let other = engines[1].step(&drawn, hyperparams).unwrap();
    assert_eq!(one, [other]);
    let [one, other] = engines.map(|engine| engine.read(Arena::Parameters).unwrap());
    assert!(one == other);
}

/// f16 has a smallest number that gradients fall below: losses are scaled, gradients are not.
#[test]
fn f16_trains_with_scaled_losses() {
    let config = config(8);
    let exact = train(&Reference::F64, &config, false, STEPS);
    let plain = train(&Reference::mixed(Dtype::F16), &config, false, STEPS);
    let Some(backend) = sim(Dtype::F16, Mode::Graphs, 2) else { return };
    let mut engine = engine(&backend, &config, false);
    let (losses, norms) = steps(&mut engine, &config, 1..=STEPS);
    for (what, got, plain, exact) in
        [("loss", &losses, &plain.0, &exact.0), ("norm", &norms, &plain.1, &exact.1)]
    {
        let (error, bound) = (apart(got, exact), 2.0 * apart(plain, exact) + 1e-5);
        eprintln!("f16, {what}: {error:.2e} of {bound:.2e}");
        assert!(error <= bound, "{what}: {error} > {bound}");
    }
    assert_eq!(engine.state().unwrap()["loss_scale"], serde_json::json!([65536.0, STEPS]));

    // AdamW would not care for a scale left in its gradients; its moments show it.
    let mut other = self::engine(&Reference::F64, &config, false);
    steps(&mut other, &config, 1..=STEPS);
    let [got, exact] = [&engine, &other].map(|engine| engine.read(Arena::SecondMoment).unwrap());
    let norm = |values: &mut dyn Iterator<Item = f32>| {
        values.map(|x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt()
    };
    let error =
        norm(&mut got.iter().zip(&exact).map(|(a, b)| a - b)) / norm(&mut exact.iter().copied());
    assert!(error < 0.01, "second moments are {error} off");

    // A step that overflows is left out, and the next one's scale is smaller.
    let mut poisoned = vec![0.0; got.len()];
    poisoned[engine.layout().blocks[1].down.offset] = f32::INFINITY;
    let before = engine.read(Arena::Parameters).unwrap();
    engine.write(Arena::Gradients, &poisoned).unwrap();
    let (_, norms) = steps(&mut engine, &config, 21..=21);
    assert!(!norms[0].is_finite() && engine.read(Arena::Parameters).unwrap() == before);
    let state = engine.state().unwrap();
    assert_eq!(state["loss_scale"], serde_json::json!([32768.0, 0]));

    // And a run that goes on from there is the unbroken one.
    let mut resumed = self::engine(&backend, &config, false);
    for arena in [Arena::Parameters, Arena::FirstMoment, Arena::SecondMoment] {
        resumed.write(arena, &engine.read(arena).unwrap()).unwrap();
    }
    assert_eq!(resumed.restore(&state).unwrap(), None);
    let [one, other] = [&mut engine, &mut resumed].map(|engine| steps(engine, &config, 22..=24));
    assert_eq!(one, other);
    assert_eq!(engine.state().unwrap(), resumed.state().unwrap());
    assert!(
        resumed.restore(&serde_json::json!({"loss_scale": [0.0, 1], "choices": null})).is_err()
    );
}
