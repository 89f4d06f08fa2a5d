//! Named model configurations.

use super::{Config, RopeScaling};

/// Names of the presets.
pub const PRESETS: [&str; 6] = ["original", "32m", "124m", "350m", "1.3b", "7b"];

/// The configuration of a preset; `None` for an unknown name.
pub fn preset(name: &str) -> Option<Config> {
    //                          hidden inter layers heads kv vocab context
    let [hidden, inter, layers, heads, kv, vocab, context] = match name {
        "original" => [64, 256, 8, 32, 4, 32768, 512],
        "32m" => [256, 1024, 8, 16, 16, 32768, 512],
        "124m" => [768, 2048, 12, 12, 12, 32768, 1024],
        "350m" => [1024, 2816, 24, 16, 16, 32768, 1024],
        "1.3b" => [2048, 5632, 24, 16, 16, 32768, 2048],
        "7b" => [4096, 11008, 32, 32, 32, 32000, 4096],
        _ => return None,
    };
    Some(Config {
        vocab_size: vocab,
        hidden_size: hidden,
        intermediate_size: inter,
        num_hidden_layers: layers,
        num_attention_heads: heads,
        num_key_value_heads: kv,
        head_dim: hidden / heads,
        max_position_embeddings: context,
        rms_norm_eps: 1e-6,
        rope_theta: 10000.0,
        rope_scaling: RopeScaling::None,
        tie_word_embeddings: false,
        initializer_range: 0.02,
        bos_token_id: Some(0),
        eos_token_ids: vec![1],
        pad_token_id: Some(4),
        window_kind: None,
    })
}
