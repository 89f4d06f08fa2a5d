//! Bits that a GPU computed, which the simulator must compute too: every kernel and whole training runs.
//!
//! Measured on an H200 (driver 580.159.04) with laam's own matmul in place of cuBLASLt, whose sums have
//! an order that only it knows. A kernel that adds in another order has other bits on both: then measure
//! again, or drop its lines. Muon is not among them: its Newton-Schulz changed since.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::support::laam;
use crate::tokenizer::hex;

const OPERATIONS: &str = include_str!("../fixtures/h200_operations.tsv");

fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn operations_have_the_bits_of_an_h200(precision: &str, dtype: &str) {
    let mut command = laam();
    command.args(["check", "--backend", "sim", "--seed", "7", "--matmul-kernel", "own", "--json"]);
    let output = command.args(["--precision", precision]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let result: Value = serde_json::from_slice(&output.stdout).unwrap();
    let mut computed: BTreeMap<(String, String), String> = BTreeMap::new();
    for row in result["runs"][0]["rows"].as_array().unwrap() {
        let text = |key: &str| row[key].as_str().unwrap().to_string();
        *computed.entry((text("operation"), text("shape"))).or_default() += &text("sha256");
    }
    let mut cases = 0;
    for line in OPERATIONS.lines().filter(|line| line.starts_with(&format!("{dtype}\t"))) {
        let [_, operation, shape, expected] = line.split('\t').collect::<Vec<_>>()[..] else {
            panic!("{line}");
        };
        let digests = computed
            .get(&(operation.to_string(), shape.to_string()))
            .unwrap_or_else(|| panic!("{operation} {shape} is not among the cases of the check"));
        assert_eq!(&sha256(digests.as_bytes())[..16], expected, "{operation} {shape} in {dtype}");
        cases += 1;
    }
    assert!(cases > 200, "{cases} cases");
}

#[test]
fn operations_in_bf16_have_the_bits_of_an_h200() {
    operations_have_the_bits_of_an_h200("bfloat16", "bf16");
}

#[test]
#[ignore = "half a minute: scripts/test --all runs it"]
fn operations_in_f32_and_f16_have_the_bits_of_an_h200() {
    operations_have_the_bits_of_an_h200("float32", "f32");
    operations_have_the_bits_of_an_h200("float16", "f16");
}

/// Four steps each: the sha256 of model.safetensors, and the flags. Between them: every attention and LM
/// head kernel, AdamW, all dtypes.
const RUNS: [(&str, &str); 5] = [
    (
        "b3c82e11c0e394e0f55c5be0c42a6746490f419c26a3f6486c0ca90ef7b35bdf",
        "--precision bfloat16 --hidden_size 64 --intermediate_size 160 --num_attention_heads 32 \
         --num_key_value_heads 4",
    ),
    (
        "35edafac8112c8a7d54b2fdf535e67f01fad465e900ed8e3e24d5835ffd862d3",
        "--precision float32 --hidden_size 64 --intermediate_size 160 --num_attention_heads 8 \
         --num_key_value_heads 4",
    ),
    (
        "a0b450bff3f2c39cf2bf0bcdceed0ee3e0ae19751d7ee7e264cfed4b5b0fc4e7",
        "--precision bfloat16 --hidden_size 384 --intermediate_size 512 --num_attention_heads 6 \
         --num_key_value_heads 2",
    ),
    (
        "aa475e657b79fa47a8550ed40e7de0ac0729766fd87eee95634e86d77f2e2492",
        "--precision float16 --hidden_size 96 --intermediate_size 160 --num_attention_heads 3 \
         --num_key_value_heads 3",
    ),
    (
        "1b4ada353a56b039d6e7a219f271f605d47cf09ecafb78b386bd36f87bf98d36",
        "--precision float32 --hidden_size 60 --intermediate_size 100 --num_attention_heads 2 \
         --num_key_value_heads 2 --attention-kernel generic --lm-head-kernel generic",
    ),
];

#[test]
fn training_leaves_the_weights_of_an_h200() {
    let folder = tempfile::tempdir().unwrap();
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/src/corpus/sample");
    let tokenizer = folder.path().join("tokenizer");
    let run = |arguments: &str, output: &Path| {
        let mut command = laam();
        command.args(arguments.split_whitespace()).args(["--source", source]);
        let output = command.arg("--output_path").arg(output).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    run("train-tokenizer --vocab_size 512 --style exact", &tokenizer);
    for (at, (expected, flags)) in RUNS.into_iter().enumerate() {
        let model = folder.path().join(at.to_string());
        let common = "train --backend sim --matmul-kernel own --warmup_steps 1 --max_steps 4 --seed 3 \
                      --batch_size 2 --num_hidden_layers 2 --max_position_embeddings 128 \
                      --learning_rate 1e-3 --tokenizer_path";
        run(&format!("{common} {} {flags}", tokenizer.display()), &model);
        let weights = std::fs::read(model.join("model.safetensors")).unwrap();
        assert_eq!(sha256(&weights), expected, "{flags}");
    }
}
