//! Files of schema version 1: `tests/fixtures/schema_1` was written by a laam whose JSON had other
//! keys (see its make.sh). They are resumed, reported, loaded and skipped as what they are.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use laam::train::recipe::Recipe;
use laam::train::sweep::Sweep;
use serde_json::Value;

use crate::support::laam;

const FIXTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/schema_1");

/// A copy of a folder of the fixture, to be changed.
fn copy(name: &str, to: &Path) -> PathBuf {
    fn copy_all(from: &Path, to: &Path) {
        fs::create_dir_all(to).unwrap();
        for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
            let target = to.join(entry.file_name());
            if entry.path().is_dir() {
                copy_all(&entry.path(), &target);
            } else {
                fs::copy(entry.path(), target).unwrap();
            }
        }
    }
    let target = to.join(name);
    copy_all(&Path::new(FIXTURE).join(name), &target);
    target
}

fn json(path: impl AsRef<Path>) -> Value {
    serde_json::from_str(&fs::read_to_string(Path::new(FIXTURE).join(path)).unwrap()).unwrap()
}

/// The reference backend: plain loops, the same on every processor but for its exp and sin.
fn run(arguments: &[&str], code: i32) -> Output {
    let output = laam().args(arguments).args(["--backend", "reference"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
    output
}

fn is_close(ours: &Value, theirs: &Value) -> bool {
    match (ours.as_f64(), theirs.as_f64()) {
        (Some(ours), Some(theirs)) => (ours - theirs).abs() <= 1e-5 * theirs.abs().max(1.0),
        _ => ours == theirs,
    }
}

#[test]
fn schema_1_checkpoint_resumes_to_the_same_weights() {
    let folder = tempfile::tempdir().unwrap();
    let output = copy("train", folder.path());
    let tokenizer = format!("{FIXTURE}/run/tokenizer");
    let flags = "--limit 1 --windows addressed --batch_size 4 --max_steps 12 --hidden_size 8 \
        --intermediate_size 16 --num_hidden_layers 1 --num_attention_heads 2 --num_key_value_heads 1 \
        --max_position_embeddings 64 --tie_word_embeddings --optimizer muon --learning_rate 1e-2 \
        --decay_rate 0.05 --lr_scheduler_type wsd --warmup_steps 2 --logging_steps 3 --save_steps 6 \
        --eval_steps 6 --resume";
    let mut arguments: Vec<&str> = ["train"].into_iter().chain(flags.split_whitespace()).collect();
    let path = output.to_str().unwrap();
    arguments.extend(["--tokenizer_path", &tokenizer, "--output_path", path]);
    let said = run(&arguments, 0).stderr;
    assert!(String::from_utf8_lossy(&said).contains("resuming after step 6 of 12"));

    let lines = |path: &Path| -> Vec<Value> {
        let text = fs::read_to_string(path).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let ours = lines(&output.join("metrics.jsonl"));
    let theirs = lines(&Path::new(FIXTURE).join("expected/resumed.jsonl"));
    // Lines from before the checkpoint stay as they are.
    assert_eq!(ours[..2], lines(&Path::new(FIXTURE).join("train/metrics.jsonl"))[..2]);
    assert_eq!(ours.len(), theirs.len());
    for line in &ours[2..] {
        assert!(line["schema_version"] == 2 && line["tokens_per_second"].as_f64() > Some(0.0));
    }
    for (ours, theirs) in ours.iter().zip(&theirs) {
        for key in ["step", "epoch", "loss", "learning_rate", "grad_norm", "tokens"] {
            assert!(is_close(&ours[key], &theirs[key]), "{key}: {ours} and {theirs}");
        }
        assert_eq!(ours.get("verbatim_rate"), theirs.get("verbatim_rate"));
    }
    // The fixture's exp and sin were glibc's for processors with fused multiply-add.
    #[cfg(all(target_arch = "x86_64", target_env = "gnu"))]
    if std::arch::is_x86_feature_detected!("fma") {
        let expected = fs::read_to_string(format!("{FIXTURE}/expected/resumed.sha256")).unwrap();
        let provenance = fs::read_to_string(output.join("provenance.json")).unwrap();
        let provenance: Value = serde_json::from_str(&provenance).unwrap();
        assert_eq!(provenance["weights_sha256"], expected.trim());
    }
}

#[test]
fn schema_1_run_is_reported() {
    let folder = tempfile::tempdir().unwrap();
    let output = copy("run", folder.path());
    let reported = laam().arg("report").arg(&output).output().unwrap();
    assert_eq!(reported.status.code(), Some(0), "{}", String::from_utf8_lossy(&reported.stderr));
    let page = output.join("report.html");
    crate::report::check(&page, 1);
    let html = fs::read_to_string(page).unwrap();
    // Bits per byte of the model and of both controls, bits per parameter, and every file.
    for value in ["0.306", "5.62", "15.4", "1.91", "59 of 1,579 bytes"] {
        assert!(html.contains(value), "{value}");
    }
    let throughput = html.split("<b>Throughput</b>").nth(1).unwrap();
    let points = throughput.split("points=\"").nth(1).unwrap().split('"').next().unwrap();
    assert_eq!(points.split_whitespace().count(), 8);
}

#[test]
fn schema_1_model_is_loaded() {
    let model = format!("{FIXTURE}/run/train");
    let evaluated = run(&["evaluate", &model, "--limit", "1", "--quiet", "--json"], 0).stdout;
    let evaluated: Value = serde_json::from_slice(&evaluated).unwrap();
    let expected = json("expected/evaluate.json");
    for key in ["loss", "perplexity", "tokens", "windows", "window_kind", "files", "bytes"] {
        assert!(is_close(&evaluated[key], &expected[key]), "{key}: {evaluated:#}");
    }
    assert!(is_close(&evaluated["bits_per_byte"], &expected["bits_a_byte"]));
    assert_eq!(evaluated["schema_version"], 2);

    let prompt = "<|start_file|><|start_header|>sample/console.c 1<|end_header|>";
    let arguments = ["generate", &model, "--json", "--max_new_tokens", "60", "--prompt", prompt];
    let generated: Value = serde_json::from_slice(&run(&arguments, 0).stdout).unwrap();
    let expected = json("expected/generate.json");
    for key in ["prompt_ids", "ids", "text", "finish"] {
        assert_eq!(generated[key], expected[key]);
    }
}

#[test]
fn schema_1_run_is_skipped() {
    let folder = tempfile::tempdir().unwrap();
    let output = copy("run", folder.path());
    let weights = fs::read(output.join("train/model.safetensors")).unwrap();
    let recipe = format!("{FIXTURE}/tiny.toml");
    let path = output.to_str().unwrap();
    // One of its files is not exact.
    let again = run(&["run", "--recipe", &recipe, "--limit", "1", "--output", path], 1);
    let said = String::from_utf8_lossy(&again.stderr).into_owned();
    assert!(said.contains("nothing to do"), "{said}");
    assert!(fs::read(output.join("train/model.safetensors")).unwrap() == weights);
    assert!(String::from_utf8_lossy(&again.stdout).contains("differs from byte 59 of 1579"));
    // What is measured again is of today's version; the page is made of both.
    let rebuilt = fs::read_to_string(output.join("rebuild.json")).unwrap();
    assert!(rebuilt.contains("\"schema_version\": 2") && rebuilt.contains("tokens_per_second"));
    crate::report::check(&output.join("report.html"), 1);
}

#[test]
fn schema_1_sweep_is_skipped() {
    let folder = tempfile::tempdir().unwrap();
    let output = copy("sweep", folder.path());
    let sweep = format!("{FIXTURE}/sweep.toml");
    let path = output.to_str().unwrap();
    let again = run(&["sweep", &sweep, "--limit", "1", "--output", path, "--json"], 0);
    let said = String::from_utf8_lossy(&again.stderr).into_owned();
    assert!(!said.contains("training"), "{said}");
    let report: Value = serde_json::from_slice(&again.stdout).unwrap();
    let rows = report["runs"].as_array().unwrap();
    assert_eq!(rows.len(), 2);
    for row in rows {
        let name = row["name"].as_str().unwrap();
        let theirs = json(Path::new("sweep").join(name).join("result.json"));
        assert_eq!(row["bits_per_byte"], theirs["bits_a_byte"], "{row:#}");
    }
    let plot = fs::read_to_string(output.join("plot.svg")).unwrap();
    assert_eq!(plot.matches("<circle").count(), 2);
}

/// Keys whose names are others now; `deterministic` is read and has no effect.
fn renamed(key: &str) -> Option<&str> {
    match key {
        "deterministic" => None,
        "decay_rate" => Some("weight_decay"),
        key => Some(key),
    }
}

#[test]
fn schema_1_recipes_and_sweeps_mean_what_they_meant() {
    let text = fs::read_to_string(format!("{FIXTURE}/every_key.toml")).unwrap();
    let theirs: toml::Table = toml::from_str(&text).unwrap();
    let recipe = Recipe::parse(&text).unwrap();
    let ours: toml::Table = toml::from_str(&recipe.resolved().unwrap()).unwrap();
    for key in ["description", "version", "rebuild", "tokenizer"] {
        assert_eq!(ours[key], theirs[key]);
    }
    let stages = |table: &toml::Table| table["stage"].as_array().unwrap().clone();
    assert_eq!(stages(&ours).len(), stages(&theirs).len());
    for (ours, theirs) in stages(&ours).iter().zip(stages(&theirs)) {
        for (key, value) in theirs.as_table().unwrap() {
            if let Some(now) = renamed(key) {
                assert_eq!(ours.get(now), Some(value), "{key}");
            }
        }
    }

    let sweep = Sweep::read(&Path::new(FIXTURE).join("sweep.toml")).unwrap();
    let decay = |run: &laam::train::sweep::SweepRun| run.recipe.stages[0].settings.weight_decay;
    assert_eq!(sweep.runs.iter().map(decay).collect::<Vec<_>>(), [0.1, 0.2]);
    assert!(sweep.runs.iter().all(|run| run.recipe.tokenizer.vocab_size == 290));
}
