//! Named model configurations.

use super::{Config, RopeScaling};
use crate::error;

/// Shape of a model.
struct Preset {
    name: &'static str,
    hidden: usize,
    inter: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    vocab: usize,
    context: usize,
    tied: bool,
}

#[rustfmt::skip]
const PRESETS: [Preset; 9] = [
    // The first LaaM's second stage, and the recipe linux-5m.
    Preset { name: "original", hidden: 64, inter: 256, layers: 8, heads: 32, kv_heads: 4, vocab: 32768, context: 512, tied: false },
    Preset { name: "linux-5m", hidden: 288, inter: 944, layers: 3, heads: 9, kv_heads: 9, vocab: 4096, context: 512, tied: true },
    Preset { name: "32m", hidden: 256, inter: 1024, layers: 8, heads: 16, kv_heads: 16, vocab: 32768, context: 512, tied: false },
    Preset { name: "124m", hidden: 768, inter: 2048, layers: 12, heads: 12, kv_heads: 12, vocab: 32768, context: 1024, tied: false },
    Preset { name: "350m", hidden: 1024, inter: 2816, layers: 24, heads: 16, kv_heads: 16, vocab: 32768, context: 1024, tied: false },
    // The shapes of Qwen 2.5, on which llmq reports its throughput.
    Preset { name: "0.5b", hidden: 896, inter: 4864, layers: 24, heads: 14, kv_heads: 2, vocab: 151_936, context: 1024, tied: true },
    Preset { name: "1.5b", hidden: 1536, inter: 8960, layers: 28, heads: 12, kv_heads: 2, vocab: 151_936, context: 1024, tied: true },
    Preset { name: "1.3b", hidden: 2048, inter: 5632, layers: 24, heads: 16, kv_heads: 16, vocab: 32768, context: 2048, tied: false },
    Preset { name: "7b", hidden: 4096, inter: 11008, layers: 32, heads: 32, kv_heads: 32, vocab: 32000, context: 4096, tied: false },
];

/// Names of the presets.
pub fn preset_names() -> impl Iterator<Item = &'static str> {
    PRESETS.iter().map(|preset| preset.name)
}

/// The configuration of a preset.
///
/// # Errors
/// For an unknown name.
pub fn preset(name: &str) -> anyhow::Result<Config> {
    let Some(shape) = PRESETS.iter().find(|preset| preset.name == name) else {
        let names: Vec<_> = preset_names().collect();
        return Err(error::config(
            format!("unknown `preset` {name}"),
            format!("use one of {}", names.join(", ")),
        ));
    };
    Ok(Config {
        vocab_size: shape.vocab,
        hidden_size: shape.hidden,
        intermediate_size: shape.inter,
        num_hidden_layers: shape.layers,
        num_attention_heads: shape.heads,
        num_key_value_heads: shape.kv_heads,
        head_dim: shape.hidden / shape.heads,
        max_position_embeddings: shape.context,
        rms_norm_eps: 1e-6,
        rope_theta: 10000.0,
        rope_scaling: RopeScaling::None,
        tie_word_embeddings: shape.tied,
        initializer_range: 0.02,
        bos_token_id: Some(0),
        eos_token_ids: vec![1],
        pad_token_id: Some(4),
        window_kind: None,
    })
}
