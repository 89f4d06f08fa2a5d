//! Twenty training steps against PyTorch's, from one initialization, in f32.
//!
//! `fixtures/trainer_steps.py` made the fixture, says how weights and tokens are hashed, and lists
//! how far each mutant of the arithmetic moves the losses: ten times the bound or more.

use laam::backend::cpu::Cpu;
use laam::backend::reference::Reference;
use laam::backend::{Arena, Backend};
use laam::llama::{AdamW, Optimizer, StepHyperparams};
use laam::model::{Config, Layout, RopeScaling};
use laam::tokens::{Batch, IGNORE};
use laam::train::{Engine, LrDecay, LrSchedule, Parallelism, ShardKind};
use serde_json::Value;

use crate::collective::on_ranks;

fn fixture() -> Value {
    let text = include_str!("../fixtures/trainer_steps.json");
    serde_json::from_str(text).expect("the fixture is JSON")
}

/// Output `n` of splitmix64 as a double in [0, 1).
pub fn unit(n: u64) -> f64 {
    let mut z = (n.wrapping_add(1)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}

fn size(case: &Value, name: &str) -> usize {
    case[name].as_u64().unwrap_or_else(|| panic!("{name} is a number")) as usize
}

fn number(case: &Value, name: &str) -> f64 {
    case[name].as_f64().unwrap_or_else(|| panic!("{name} is a number"))
}

pub fn config(case: &Value) -> Config {
    Config {
        vocab_size: size(case, "vocab_size"),
        hidden_size: size(case, "hidden_size"),
        intermediate_size: size(case, "intermediate_size"),
        num_hidden_layers: size(case, "num_hidden_layers"),
        num_attention_heads: size(case, "num_attention_heads"),
        num_key_value_heads: size(case, "num_key_value_heads"),
        head_dim: size(case, "hidden_size") / size(case, "num_attention_heads"),
        max_position_embeddings: size(case, "context"),
        rms_norm_eps: number(case, "rms_norm_eps"),
        rope_theta: number(case, "rope_theta"),
        rope_scaling: RopeScaling::None,
        tie_word_embeddings: case["tie_word_embeddings"] == true,
        initializer_range: number(case, "initializer_range"),
        bos_token_id: None,
        eos_token_ids: Vec::new(),
        pad_token_id: Some(size(case, "pad_token_id") as u32),
        window_kind: None,
    }
}

/// The hashed weights. The fixture names the parameters in the order it numbers them.
pub fn weights(case: &Value, config: &Config, layout: &Layout) -> Vec<f32> {
    let mut arena = vec![0.0; layout.len];
    for (p, name) in case["parameters"].as_array().expect("names").iter().enumerate() {
        let parameter = layout.parameters.iter().find(|parameter| parameter.name == *name);
        let span = parameter.unwrap_or_else(|| panic!("no parameter {name}")).span;
        for (e, value) in arena[span.range()].iter_mut().enumerate() {
            let v = 2.0 * unit(((p as u64) << 40) + e as u64) - 1.0;
            let norm = name.as_str().is_some_and(|name| name.contains("norm"));
            let scaled = v * 3.0f64.sqrt() * config.initializer_range;
            *value = if norm { 1.0 + 0.1 * v } else { scaled } as f32;
        }
    }
    arena
}

/// The named windows: left-padded, as the first LaaM cut them.
pub fn windows(case: &Value, which: &Value) -> Batch {
    let context = size(case, "context");
    let mut batch = Batch { windows: 0, context, ..Batch::default() };
    for window in which.as_array().expect("windows").iter().map(|w| w.as_u64().expect("a number")) {
        let pads = case["left_pads"][window as usize].as_u64().expect("a number") as usize;
        let ids: Vec<u32> = (0..context)
            .map(|column| {
                let u = unit((1 << 60) + (window << 20) + column as u64);
                let free = size(case, "vocab_size") - 5;
                if column < pads { 4 } else { 5 + (free as f64 * u * u) as u32 }
            })
            .collect();
        for column in 0..context {
            let counts = column >= pads && column + 1 < context;
            batch.targets.push(if counts { ids[column + 1] } else { IGNORE });
            batch.first_key.push(if column < pads { context } else { pads } as u32);
        }
        batch.ids.extend(ids);
        batch.windows += 1;
    }
    batch
}

/// Trains as the case says and compares every step; rank 0 tells.
fn follow(backend: &dyn Backend, case: &Value, parallelism: &Parallelism) {
    let (config, layout) = (config(case), Layout::new(&config(case)));
    let optimizer = Optimizer {
        adamw: AdamW {
            beta1: number(case, "adam_beta1"),
            beta2: number(case, "adam_beta2"),
            epsilon: number(case, "adam_epsilon"),
        },
        muon: None,
        weight_decay: number(case, "weight_decay"),
        max_grad_norm: number(case, "max_grad_norm"),
    };
    let schedule = LrSchedule {
        decay: LrDecay::Linear,
        warmup: size(case, "warmup_steps") as u64,
        total: size(case, "max_steps") as u64,
        wsd_decay: 0.0,
    };
    let windows_per_step = size(case, "batch_size");
    let context = size(case, "context");
    let mut engine =
        Engine::parallel(backend, &config, &optimizer, windows_per_step, context, parallelism)
            .unwrap();
    engine.write(Arena::Parameters, &weights(case, &config, &layout)).unwrap();
    let steps = case["steps"].as_array().expect("steps");
    for (k, (step, which)) in
        steps.iter().zip(case["step_windows"].as_array().expect("windows")).enumerate()
    {
        let micros = which.as_array().expect("micro-batches");
        let batches: Vec<Batch> = micros.iter().map(|which| windows(case, which)).collect();
        let learning_rate = number(case, "learning_rate") * schedule.factor(k as u64);
        let hyperparams =
            StepHyperparams { learning_rate, muon_learning_rate: 0.0, step: k as u64 + 1 };
        let outcome = engine.step(&batches, hyperparams).unwrap();

        let off = |ours: f64, name: &str| (ours / number(step, name) - 1.0).abs();
        let what = format!("{} on {}, step {k}", case["name"], backend.name());
        assert_eq!(outcome.counted, size(step, "counted"), "{what}");
        assert!((learning_rate - number(step, "learning_rate")).abs() < 1e-15, "{what}: rate");
        for (name, ours, bound) in [
            ("loss", outcome.loss, 1e-5),
            ("grad_norm", outcome.grad_norm, 1e-4),
            ("loss64", outcome.loss, 1e-5),
            ("grad_norm64", outcome.grad_norm, 1e-4),
        ] {
            let off = off(ours, name);
            assert!(off < bound, "{what}: {name} {ours} is off by {off}");
        }
    }
}

fn follow_all(backend: &dyn Backend, wanted: impl Fn(&Value) -> bool) {
    let fixture = fixture();
    let cases: Vec<_> =
        fixture["cases"].as_array().expect("cases").iter().filter(|case| wanted(case)).collect();
    assert!(!cases.is_empty());
    for case in cases {
        follow(backend, case, &Parallelism::default());
    }
}

#[test]
fn the_cpu_follows_pytorch() {
    follow_all(&Cpu::f32(2), |_| true);
}

#[test]
fn the_reference_follows_pytorch() {
    // The original's shape takes plain loops minutes.
    let plain = Reference::F32;
    follow_all(&plain, |case| case["name"] != "original");
}

#[test]
fn two_ranks_follow_pytorch() {
    let fixture = fixture();
    for case in fixture["cases"].as_array().expect("cases") {
        on_ranks(2, |group| {
            let parallelism = Parallelism { group, slices: 2, shard: ShardKind::Optimizer };
            follow(&Cpu::f32(1), case, &parallelism);
        });
    }
}
