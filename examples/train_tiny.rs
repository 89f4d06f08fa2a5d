//! Trains a tiny Llama on one repeating sequence with the library alone: `cargo run --example
//! train_tiny`. The loss falls to nearly 0.

use laam::backend::Arena;
use laam::backend::cpu::Cpu;
use laam::llama::{AdamW, Optimizer, StepHyperparams};
use laam::model::{Config, RopeScaling, initialize};
use laam::tokens::Batch;
use laam::train::Engine;

const SEQ_LEN: usize = 32;

fn main() -> anyhow::Result<()> {
    let config = Config {
        vocab_size: 64,
        hidden_size: 32,
        intermediate_size: 96,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 8,
        max_position_embeddings: SEQ_LEN,
        rms_norm_eps: 1e-6,
        rope_theta: 10000.0,
        rope_scaling: RopeScaling::None,
        tie_word_embeddings: true,
        initializer_range: 0.02,
        bos_token_id: None,
        eos_token_ids: Vec::new(),
        pad_token_id: None,
        window_kind: None,
    };
    config.validate()?;
    let optimizer = Optimizer {
        adamw: AdamW { beta1: 0.9, beta2: 0.95, epsilon: 1e-8 },
        muon: None,
        weight_decay: 0.0,
        max_grad_norm: 1.0,
    };
    let mut engine = Engine::new(&Cpu::f32(2), &config, &optimizer, 1, SEQ_LEN)?;
    let weights = initialize(&config, engine.layout(), 42);
    engine.write(Arena::Parameters, &weights)?;

    // The targets are the ids one position later. Every position sees all before it: first_key is 0.
    let id = |position: usize| (position * position % 61) as u32;
    let batch = Batch {
        windows: 1,
        context: SEQ_LEN,
        ids: (0..SEQ_LEN).map(id).collect(),
        targets: (1..=SEQ_LEN).map(id).collect(),
        first_key: vec![0; SEQ_LEN],
    };
    let mut loss = f64::INFINITY;
    for step in 1..=100 {
        let hyperparams = StepHyperparams { learning_rate: 1e-2, muon_learning_rate: 0.0, step };
        loss = engine.step(std::slice::from_ref(&batch), hyperparams)?.loss;
        if step % 20 == 0 {
            println!("step {step}: loss {loss:.4}");
        }
    }
    anyhow::ensure!(loss < 0.1, "the model did not memorize the sequence: loss {loss}");
    Ok(())
}
