//! Tokenizers and models that laam did not make.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use laam::corpus::Document;
use laam::error::hint_of;
use laam::tokenizer::{Style, Tokenizer};
use rayon::prelude::*;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::cli::error_of;
use crate::support::laam;
use crate::tokenizer::{hex, llama2, small_corpus, train};
use crate::training::trained;

/// The folder of a tokenizer in a package of npm, unpacked once; none after a loud line.
fn package(name: &str) -> Option<PathBuf> {
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("tokenizers");
    let folder = cache.join(name.rsplit(['/', '@']).nth(1).unwrap());
    let models = folder.join("package/models");
    if !models.join("tokenizer.json").is_file() {
        fs::create_dir_all(&folder).unwrap();
        let pack = "npm pack --silent \"$0\" && tar -xzf ./*.tgz && rm ./*.tgz";
        let mut pack_it = Command::new("timeout");
        pack_it.args(["60", "sh", "-c", pack, name]).current_dir(&folder);
        if !pack_it.output().is_ok_and(|done| done.status.success()) {
            eprintln!("SKIPPED: npm has no {name} here: its ids were not compared.");
            return None;
        }
    }
    Some(models)
}

#[test]
fn published_tokenizers_give_the_ids_of_the_python_package() {
    let fixture = include_str!("../fixtures/published_tokenizers.json");
    let fixture: Value = serde_json::from_str(fixture).unwrap();
    let functions: Vec<_> = (0..8000u64)
        .map(|n| format!("static int f{n}(void)\n{{\n\treturn {};\n}}\n\n", n * n))
        .collect();
    let long = functions.concat();
    fixture["tokenizers"].as_array().unwrap().par_iter().for_each(|expected| {
        let name = expected["package"].as_str().unwrap();
        let Some(folder) = package(name) else { return };
        let tokenizer = Tokenizer::load(&folder).unwrap();
        let eos = tokenizer.special().eos.unwrap();
        let texts = fixture["texts"].as_array().unwrap().iter().map(|text| text.as_str().unwrap());
        for (text, ids) in texts.zip(expected["ids"].as_array().unwrap()) {
            let mut ids: Vec<u32> = serde_json::from_value(ids.clone()).unwrap();
            assert_eq!(tokenizer.encode_prompt(text).unwrap(), ids, "{name}: {text}");
            ids.push(eos);
            let document = Document::new("", text);
            assert_eq!(tokenizer.encode_document(&document).unwrap(), ids, "{name}: {text}");
        }
        let ids = tokenizer.encode_text(&long).unwrap();
        assert_eq!(ids.len(), expected["long_tokens"].as_u64().unwrap() as usize, "{name}");
        let spelled: Vec<_> = ids.iter().map(u32::to_string).collect();
        assert_eq!(hex(&Sha256::digest(spelled.join(" "))), expected["long_sha256"], "{name}");
    });
}

/// Llama 2's kind: a blank before every text, no words, bytes for what has no token.
/// Models of every kind, made by their own libraries: WordPiece, Unigram, words, BPE with a suffix. The ids are
/// those of the Python package, of a long text too, which is cut into pieces here.
#[test]
fn every_kind_of_token_model_gives_the_ids_of_the_python_package() {
    let fixture = include_str!("../fixtures/token_models.json");
    let fixture: Value = serde_json::from_str(fixture).unwrap();
    let lines: Vec<_> = (0..200)
        .map(|n| {
            format!(
                "The quick Brown fox No. {n} jumps over {} lazy dogs; it's {} o'clock.",
                n * n,
                n % 7
            )
        })
        .collect();
    let lines = lines.iter().cycle().take(30 * lines.len()).enumerate();
    let long = lines
        .map(|(n, line)| if n % 3 > 0 { format!("{line}\n") } else { format!("  {line}  \n\n") });
    let long: String = long.collect();
    assert_eq!(hex(&Sha256::digest(&long)), fixture["long"]["sha256"]);
    let texts = || fixture["texts"].as_array().unwrap().iter().map(|text| text.as_str().unwrap());
    let made = fixture["tokenizers"].as_object().unwrap();
    assert_eq!(made.len(), 5);
    made.iter().collect::<Vec<_>>().par_iter().for_each(|(name, expected)| {
        let json = serde_json::to_vec(&expected["json"]).unwrap();
        let tokenizer = Tokenizer::from_bytes(json, b"{}".to_vec()).unwrap();
        let eos = tokenizer.special().eos.unwrap();
        for (text, ids) in texts().zip(expected["ids"].as_array().unwrap()) {
            let mut ids: Vec<u32> = serde_json::from_value(ids.clone()).unwrap();
            assert_eq!(tokenizer.encode_prompt(text).unwrap(), ids, "{name}: {text}");
            if ids.last() != Some(&eos) {
                ids.push(eos);
            }
            let document = Document::new("", text);
            assert_eq!(tokenizer.encode_document(&document).unwrap(), ids, "{name}: {text}");
        }
        let ids = tokenizer.encode_text(&long).unwrap();
        assert_eq!(ids.len(), expected["long_tokens"].as_u64().unwrap() as usize, "{name}");
        let spelled: Vec<_> = ids.iter().map(u32::to_string).collect();
        assert_eq!(hex(&Sha256::digest(spelled.join(" "))), expected["long_sha256"], "{name}");
        let decoded = String::from_utf8(tokenizer.decode_bytes(&ids[..40]).unwrap()).unwrap();
        assert_eq!(decoded, expected["decoded"].as_str().unwrap(), "{name}");
    });
    // What needs to be converted first is said.
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("spiece.model"), "").unwrap();
    let error = Tokenizer::load(folder.path()).unwrap_err();
    assert!(hint_of(&error).unwrap().contains("writes a tokenizer.json"), "{error:#}");
}

#[test]
fn a_long_text_has_the_tokens_that_the_crate_gives_it_whole() {
    let mut vocab = serde_json::Map::new();
    let bytes = (0..256).map(|byte| format!("<0x{byte:02X}>"));
    let plain = ["<unk>", "<s>", "</s>"].map(String::from).into_iter().chain(bytes);
    let text = ('a'..='z').chain('0'..='9').chain("▁.:C".chars()).map(String::from);
    let merged = ["▁t", "▁th", "▁the", "▁C", "in", "ing", "ea", "▁s", "▁sea", "▁▁"];
    for token in plain.chain(text).chain(merged.map(String::from)) {
        let id = vocab.len();
        vocab.insert(token, id.into());
    }
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    };
    let mut tokenizer = llama2();
    tokenizer["added_tokens"] = json!([special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")]);
    tokenizer["post_processor"]["special_tokens"]["<s>"]["ids"] = json!([1]);
    tokenizer["model"]["unk_token"] = "<unk>".into();
    tokenizer["model"]["vocab"] = vocab.into();
    tokenizer["model"]["merges"] =
        json!(["▁ t", "▁t h", "▁th e", "▁ C", "i n", "in g", "e a", "▁ s", "▁s ea", "▁ ▁"]);
    let bytes = serde_json::to_vec(&tokenizer).unwrap();
    let crates = tokenizers::Tokenizer::from_bytes(&bytes).unwrap();
    let config = br#"{"bos_token": "<s>", "eos_token": "</s>"}"#;
    let ours = Tokenizer::from_bytes(bytes, config.to_vec()).unwrap();
    let text = (chapters() + "\n\n  naïve </s>\n sailing\n").repeat(12);
    let ids = crates.encode_fast(text.as_str(), false).unwrap().get_ids().to_vec();
    assert!(text.len() > 300_000 && ours.encode_text(&text).unwrap() == ids);
    let (framed, before) = ours.encode_framed(&Document::new("", text.as_str())).unwrap();
    assert_eq!((before, framed[0], framed.last()), (1, 1, Some(&2)));
    // Each token's own bytes: together they are the text as it decodes, with the blank that encoding puts
    // after a special token.
    let bytes = |(at, &id): (usize, &u32)| ours.token_bytes(id, at == 0).unwrap();
    let spelled: Vec<u8> = ids.iter().enumerate().flat_map(bytes).collect();
    assert!(spelled == text.replace("</s>\n", "</s> \n").as_bytes());
    assert!(spelled == ours.decode_bytes(&ids).unwrap());
}

/// The text of `tests/fixtures/continued.py`.
pub fn chapters() -> String {
    let line = |n: u64| {
        format!(
            "Chapter {n}. It was the {}th day, and nobody had seen {} sails on the sea.\n",
            n % 7,
            n * n
        )
    };
    (0..400).map(line).collect()
}

/// A random model and its tokenizer, as transformers saved them.
pub fn foreign_model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/continued")
}

#[test]
fn continued_pretraining_follows_pytorch_for_twenty_steps() {
    let folder = tempfile::tempdir().unwrap();
    let (model, text) = (folder.path().join("model"), folder.path().join("text.txt"));
    let expected = fs::read_to_string(foreign_model().join("losses.json")).unwrap();
    let expected: Value = serde_json::from_str(&expected).unwrap();
    assert_eq!(expected["bytes"], chapters().len());
    fs::write(&text, chapters()).unwrap();
    let done = laam()
        .args(["train", "--windows", "stream", "--order", "sequential", "--batch_size", "2"])
        .args(["--max_steps", "20", "--warmup_steps", "2", "--logging_steps", "1"])
        .args(["--precision", "float32", "--init_from"])
        .arg(foreign_model())
        .args(["--source", text.to_str().unwrap(), "--output_path", model.to_str().unwrap()])
        .output()
        .unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let losses: Vec<f64> = crate::training::metrics(&model).iter().map(|line| line.loss).collect();
    let steps = expected["steps"].as_array().unwrap();
    assert_eq!(losses.len(), steps.len());
    let close = |ours: f64, theirs: &Value| {
        let theirs = theirs.as_f64().unwrap();
        assert!((ours - theirs).abs() < 1e-5 * theirs, "{ours}, not {theirs}");
    };
    losses.iter().zip(steps).for_each(|(&ours, theirs)| close(ours, theirs));
    let arguments = ["evaluate", model.to_str().unwrap(), "--source", text.to_str().unwrap()];
    let evaluated = laam().args(arguments).args(["--json", "--quiet"]).output().unwrap();
    let evaluated: Value = serde_json::from_slice(&evaluated.stdout).unwrap();
    assert_eq!(evaluated["tokens"], expected["tokens"].as_u64().unwrap() - 1);
    close(evaluated["loss"].as_f64().unwrap(), &expected["after"]);
}

/// A tokenizer.json by itself, as GPT-2's: no markers, and a token that ends texts.
fn gpt2_like(folder: &Path) -> PathBuf {
    train(&small_corpus(), Style::Exact, 320).save(folder).unwrap();
    let path = folder.join("tokenizer.json");
    let text = fs::read_to_string(&path).unwrap();
    let text = text.replace("<|end_file|>", "<|endoftext|>").replace("<|start_", "<|other_");
    let mut json: Value = serde_json::from_str(&text).unwrap();
    json["pre_tokenizer"] = json!(
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}
    );
    fs::write(&path, json.to_string()).unwrap();
    fs::remove_file(folder.join("tokenizer_config.json")).unwrap();
    path
}

#[test]
fn a_foreign_model_is_trained_evaluated_and_measured_in_fixed_windows() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = gpt2_like(folder.path());
    let model = folder.path().join("model");
    let flags = format!("--tokenizer_path {} --max_steps 1", tokenizer.display());
    let said = error_of(&[
        "train",
        "--tokenizer_path",
        tokenizer.to_str().unwrap(),
        "--output_path",
        model.to_str().unwrap(),
        "--windows",
        "addressed",
    ]);
    assert!(said.contains("no markers for names"), "{said}");
    trained(&model, &format!("{flags} --windows stream --max_position_embeddings 120"));
    let name = model.to_str().unwrap();
    let said = error_of(&["cat", name, "sample/fs.c"]);
    assert!(said.contains("no document markers"), "{said}");

    // As a model of somebody else.
    fs::remove_file(model.join("provenance.json")).unwrap();
    let config = fs::read_to_string(model.join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    config.as_object_mut().unwrap().retain(|key, _| !key.starts_with("laam"));
    fs::write(model.join("config.json"), config.to_string()).unwrap();
    let text = folder.path().join("text.txt");
    fs::write(&text, "int main(void) { return 0; }\n".repeat(20)).unwrap();
    let text = text.to_str().unwrap();
    let json = |arguments: &[&str]| -> Value {
        let output = laam().args(arguments).args(["--json", "--quiet"]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {said}");
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let evaluated = json(&["evaluate", name, "--source", text]);
    assert_eq!((&evaluated["context"], &evaluated["window_kind"]), (&json!(120), &json!("stream")));
    let tokens = Tokenizer::load(&tokenizer).unwrap();
    let document = Document::new("", fs::read_to_string(text).unwrap());
    let tokens = tokens.encode_document(&document).unwrap().len() as u64;
    assert_eq!(evaluated["tokens"], tokens - 1, "all but the first");
    let shorter = ["--max_position_embeddings", "40", "--stride", "20"];
    let evaluated = json(&[&["evaluate", name, "--source", text][..], &shorter].concat());
    assert_eq!(evaluated["context"], 40);
    assert_eq!(evaluated["tokens"], tokens - 1, "a token of two windows counts once");

    let measured = json(&["memorization", name, "--source", text, "--stride", "30"]);
    assert_eq!((&measured["context"], &measured["stride"]), (&json!(99), &json!(30)));
    // All whole windows of 100 tokens, one every 30.
    assert_eq!(measured["windows"], (tokens - 100) / 30 + 1);
    assert_eq!(measured["prefixes"][3]["windows"], measured["windows"]);
    assert!(measured["bits_per_parameter"].is_null() && measured["residual_bytes"].is_null());
    let said =
        error_of(&["memorization", name, "--source", text, "--stride", "9", "--suffix", "80"]);
    assert!(said.contains("must be at most 120"), "{said}");
}
