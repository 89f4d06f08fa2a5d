//! GGUF files against the `gguf` package of llama.cpp.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use laam::dtype::Dtype;
use laam::model::{self, Checkpoint, Config, Layout, Provenance, RopeScaling};
use laam::random::{Philox, Stream};
use laam::tokenizer::{Style, Tokenizer};
use serde_json::Value;

use crate::cli::error_of;
use crate::rebuild::trained;
use crate::support::laam;
use crate::tokenizer::train;

/// Rows of 64 values, and of 77, which no block of 32 divides; five rows beyond the tokenizer's ids.
fn config(tokenizer: &Tokenizer, tied: bool, rope_scaling: RopeScaling) -> Config {
    Config {
        vocab_size: tokenizer.vocab_size() + 5,
        hidden_size: 64,
        intermediate_size: 77,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 8,
        rope_scaling,
        tie_word_embeddings: tied,
        ..model::preset("original").unwrap()
    }
}

/// Saves a model with random weights, some of them large or zero.
fn save(folder: &Path, config: &Config, tokenizer: &Tokenizer, precision: Dtype) {
    let layout = Layout::new(config);
    let mut weights = vec![0.0; layout.len];
    for (at, parameter) in layout.parameters.iter().enumerate() {
        let values = &mut weights[parameter.span.range()];
        Philox::new(7, Stream::Test).fill_normal(at as u32, 10f64.powi(at as i32 % 5 - 2), values);
        values[0] = 0.0;
    }
    // A block of zeros has scale 0.
    weights[..64].fill(0.0);
    let checkpoint = Checkpoint {
        config,
        layout: &layout,
        weights: &weights,
        precision,
        tokenizer: Some(tokenizer),
        provenance: &Provenance::default(),
        training_state: None,
    };
    model::save(folder, &checkpoint).unwrap();
}

fn export(folder: &Path, dtype: &str) -> (PathBuf, String) {
    let output = folder.join(format!("{dtype}.gguf"));
    let mut command = laam();
    command.args(["export", "gguf"]).arg(folder).arg("--output").arg(&output);
    let done = command.args(["--dtype", dtype, "--json"]).output().unwrap();
    let said = String::from_utf8(done.stderr).unwrap();
    assert!(done.status.success(), "{said}");
    let printed: Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!(printed["bytes"], fs::metadata(&output).unwrap().len());
    (output, said)
}

fn documents() -> Vec<laam::corpus::Document> {
    let text = "static int count = 0;\nint main(void)\n{\n\treturn count + 12345;\n}\n".repeat(3);
    vec![laam::corpus::Document::new("a.c", text)]
}

/// A Python that has a package, or `None` after a line that says so.
fn python(package: &str) -> Option<PathBuf> {
    let environment = std::env::var_os("VIRTUAL_ENV").unwrap_or_default();
    let python = PathBuf::from(environment).join("bin/python");
    let found = Command::new(&python).arg("-c").arg(format!("import {package}")).output();
    if found.is_ok_and(|done| done.status.success()) {
        return Some(python);
    }
    eprintln!("SKIPPED: GGUF files against {package}: VIRTUAL_ENV has no such package");
    None
}

/// The output of a Python script of this folder, a JSON value per line.
fn run(python: &Path, script: &str, arguments: &[&OsStr]) -> Vec<Value> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/suite").join(script);
    let done = Command::new(python).arg(script).args(arguments).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let text = String::from_utf8(done.stdout).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn gguf_files_are_read_back_by_the_gguf_package() {
    let Some(python) = python("gguf") else { return };
    let llama3 = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 64,
    };
    for (style, tied, scaling, precision, pre) in [
        (Style::Exact, true, llama3, Dtype::F32, "llama-bpe"),
        (Style::Original, false, RopeScaling::Linear { factor: 4.0 }, Dtype::Bf16, "gpt-2"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let tokenizer = train(&documents(), style, 300);
        let config = config(&tokenizer, tied, scaling);
        save(folder.path(), &config, &tokenizer, precision);
        let exported = ["f32", "f16", "bf16", "q8_0"].map(|dtype| export(folder.path(), dtype));
        assert_eq!(exported[0].1.contains("style original"), style == Style::Original);
        assert!(exported[3].1.contains("2 tensors are f16"), "{}", exported[3].1);

        let files = exported.iter().map(|(file, _)| file.as_os_str());
        let arguments: Vec<_> = [folder.path().as_os_str()].into_iter().chain(files).collect();
        let lines = run(&python, "compare_gguf.py", &arguments);
        let [fields, files @ .., compared] = lines.as_slice() else { panic!("{lines:?}") };
        assert_eq!(compared["compared"], 4 * Layout::new(&config).parameters.len());
        let types: Vec<_> = files.iter().map(|file| file["types"].to_string()).collect();
        let expected =
            [r#"["F32"]"#, r#"["F16","F32"]"#, r#"["BF16","F32"]"#, r#"["F16","F32","Q8_0"]"#];
        assert_eq!(types, expected);

        assert_eq!(fields["general.architecture"], "llama");
        assert_eq!(fields["tokenizer.ggml.pre"], pre);
        assert_eq!(fields["llama.attention.key_length"], 8);
        assert_eq!(fields["tokenizer.ggml.add_bos_token"], false);
        let tokens = fields["tokenizer.ggml.tokens"].as_array().unwrap();
        let types = fields["tokenizer.ggml.token_type"].as_array().unwrap();
        assert_eq!([tokens.len(), types.len()], [config.vocab_size; 2]);
        assert_eq!(types.iter().filter(|&kind| kind == 5).count(), 5, "rows without a token");
        assert_eq!((&tokens[0], &types[0]), (&"<|start_file|>".into(), &3.into()));
        let json = fs::read(folder.path().join("tokenizer.json")).unwrap();
        let json: Value = serde_json::from_slice(&json).unwrap();
        assert_eq!(fields["tokenizer.ggml.merges"], json["model"]["merges"]);
        for (token, id) in json["model"]["vocab"].as_object().unwrap() {
            assert_eq!(&tokens[id.as_u64().unwrap() as usize], token);
        }
        match scaling {
            RopeScaling::Linear { factor } => {
                assert_eq!(fields["llama.rope.scaling.factor"], factor);
            }
            _ => assert!(fields.get("llama.rope.scaling.type").is_none()),
        }
    }
}

/// llama.cpp itself: `pip install llama-cpp-python` builds it.
#[test]
#[ignore = "needs llama-cpp-python"]
fn llama_cpp_generates_the_same_tokens() {
    let Some(python) = python("llama_cpp") else { return };
    let folder = tempfile::tempdir().unwrap();
    let model = trained().model();
    let prompt = "<|start_file|><|start_header|>tiny/kernel/sched.c 0<|end_header|>";
    let generate = ["--temperature", "0", "--max_new_tokens", "100", "--json"];
    let mut command = laam();
    command.arg("generate").arg(&model).args(["--prompt", prompt]).args(generate);
    let ours: Value = serde_json::from_slice(&command.output().unwrap().stdout).unwrap();
    for dtype in ["f32", "q8_0"] {
        let file = folder.path().join(dtype);
        let mut command = laam();
        command
            .args(["export", "gguf"])
            .arg(&model)
            .args(["--dtype", dtype, "--output"])
            .arg(&file);
        assert!(command.output().unwrap().status.success());
        let ids = ours["ids"].as_array().unwrap();
        let count = ids.len().to_string();
        let arguments = [file.as_os_str(), OsStr::new(prompt), OsStr::new(&count)];
        let theirs = &run(&python, "generate_llama_cpp.py", &arguments)[0];
        assert!(ids.len() > 20, "{ids:?}");
        assert_eq!(theirs["prompt_ids"], ours["prompt_ids"], "{dtype}");
        assert_eq!(theirs["ids"], ours["ids"], "{dtype}");
    }
}

#[test]
fn what_gguf_cannot_hold_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = train(&documents(), Style::Exact, 300);
    let config = config(&tokenizer, true, RopeScaling::None);
    save(folder.path(), &config, &tokenizer, Dtype::F32);
    let path = folder.path().to_str().unwrap();
    let weights = format!("{path}/model.safetensors");
    let before = fs::read(&weights).unwrap();
    let said = error_of(&["export", "gguf", path, "--output", &weights]);
    assert!(said.contains("not a GGUF file"), "{said}");
    assert!(before == fs::read(&weights).unwrap());

    let tokenizer_json = format!("{path}/tokenizer.json");
    let text = fs::read_to_string(&tokenizer_json).unwrap().replace("{1,3}", "{1,2}");
    fs::write(&tokenizer_json, text).unwrap();
    let output = format!("{path}/model.gguf");
    let said = error_of(&["export", "gguf", path, "--output", &output]);
    assert!(said.contains("convert_hf_to_gguf.py"), "{said}");
    assert!(!Path::new(&output).exists());
}
