//! Model folders: written whole, read from anyone, refused with a reason.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use laam::dtype::Dtype;
use laam::error::{ErrorKind, hint_of, kind_of};
use laam::llama::step;
use laam::model::{
    self, Checkpoint, Config, Layout, ParamKind, Provenance, RopeScaling, Span, TrainingState,
    initialize,
};
use laam::tokenizer::Tokenizer;
use proptest::prelude::*;
use safetensors::tensor::{Dtype as StoredDtype, TensorView};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::cli::error_of;
use crate::support::laam;
use crate::trainer;

/// A Llama of some thousand parameters.
fn tiny() -> Config {
    let case = json!({
        "vocab_size": 41, "hidden_size": 12, "intermediate_size": 10, "num_hidden_layers": 2,
        "num_attention_heads": 3, "num_key_value_heads": 1, "context": 16, "rms_norm_eps": 1e-6,
        "rope_theta": 1e4, "tie_word_embeddings": false, "initializer_range": 0.02,
        "pad_token_id": 4,
    });
    trainer::config(&case)
}

/// Saves the model that `seed` starts, with a training state beside it.
fn save(folder: &Path, config: &Config, seed: u64) -> anyhow::Result<()> {
    let layout = Layout::new(config);
    let weights = initialize(config, &layout, seed);
    let state = json!({"step": seed});
    model::save(
        folder,
        &Checkpoint {
            config,
            layout: &layout,
            weights: &weights,
            precision: Dtype::F32,
            tokenizer: None,
            provenance: &Provenance { seed, ..Provenance::default() },
            training_state: Some(TrainingState { arenas: &[("master", &weights)], state: &state }),
        },
    )
}

fn saved() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    save(folder.path(), &tiny(), 1).unwrap();
    folder
}

#[test]
fn folders_that_transformers_wrote_load_with_equal_weights() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/transformers");
    let cases: Value =
        serde_json::from_str(&fs::read_to_string(folder.join("cases.json")).unwrap()).unwrap();
    let cases = cases.as_array().unwrap();
    assert!(cases.len() >= 3);
    for case in cases {
        let name = case["name"].as_str().unwrap();
        let found = model::load(&folder.join(name)).unwrap();
        let expected = trainer::config(case);
        assert_eq!(found.layout, Layout::new(&expected), "{name}");
        assert_eq!(found.config.rope_theta, expected.rope_theta, "{name}");
        let scaling = format!("{:?}", found.config.rope_scaling).to_lowercase();
        assert!(scaling.starts_with(case["rope_scaling"].as_str().unwrap()), "{name}: {scaling}");
        assert_eq!(found.precision.name(), case["dtype"], "{name}");
        assert_eq!(found.warnings, Vec::<String>::new(), "{name}");
        let exact = trainer::weights(case, &expected, &found.layout);
        let rounded: Vec<f32> = exact.iter().map(|&x| found.precision.round(x)).collect();
        assert_eq!(found.weights, rounded, "{name}");
    }
}

#[test]
fn a_folder_without_training_state_still_loads() {
    let folder = saved();
    let file = folder.path().join("training_state.safetensors");
    let layout = Layout::new(&tiny());
    let state = model::load_training_state(folder.path(), &layout).unwrap().unwrap();
    assert_eq!(state.state, json!({"step": 1}));
    fs::remove_file(file).unwrap();
    assert!(model::load_training_state(folder.path(), &layout).unwrap().is_none());
    model::load(folder.path()).unwrap();
}

#[test]
fn save_keeps_other_files_and_removes_old_shards() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    fs::create_dir(path("checkpoint-10")).unwrap();
    fs::write(path("metrics.jsonl"), "{}").unwrap();
    fs::write(path("model-00001-of-00001.safetensors"), "old").unwrap();
    let index = json!({"weight_map": {"a": "model-00001-of-00001.safetensors"}});
    fs::write(path("model.safetensors.index.json"), index.to_string()).unwrap();
    save(folder.path(), &tiny(), 1).unwrap();
    assert!(path("checkpoint-10").is_dir() && path("metrics.jsonl").is_file());
    assert!(!path("model.safetensors.index.json").exists());
    assert!(!path("model-00001-of-00001.safetensors").exists());
}

/// Replaces the weights of a folder by tensors of other names or types, in files of one or several.
fn store(folder: &Path, file: &str, tensors: &[(String, Vec<usize>, Vec<f32>)], f64s: bool) {
    let bytes = |values: &[f32]| -> Vec<u8> {
        if f64s {
            values.iter().flat_map(|&x| f64::from(x).to_le_bytes()).collect()
        } else {
            values.iter().flat_map(|x| x.to_le_bytes()).collect()
        }
    };
    let stored = if f64s { StoredDtype::F64 } else { StoredDtype::F32 };
    let data: Vec<_> = tensors.iter().map(|(.., values)| bytes(values)).collect();
    let views = tensors.iter().zip(&data).map(|((name, shape, _), data)| {
        (name.as_str(), TensorView::new(stored, shape.clone(), data).unwrap())
    });
    safetensors::serialize_to_file(views, None, &folder.join(file)).unwrap();
}

#[test]
fn folders_that_transformers_loads_are_loaded() {
    for (tied, edit) in [
        (true, "lm_head only"),
        (true, "no prefix"),
        (false, "float64"),
        (false, "swish"),
        (false, "bos beyond the vocabulary"),
        (false, "a stale copy in another shard"),
    ] {
        let config = Config { tie_word_embeddings: tied, ..tiny() };
        let folder = tempfile::tempdir().unwrap();
        save(folder.path(), &config, 1).unwrap();
        let expected = model::load(folder.path()).unwrap();
        let mut tensors: Vec<(String, Vec<usize>, Vec<f32>)> = expected
            .layout
            .parameters
            .iter()
            .map(|parameter| {
                let values = expected.weights[parameter.span.range()].to_vec();
                (parameter.name.clone(), parameter.shape(), values)
            })
            .collect();
        let set = |key: &str, value: Value| {
            let path = folder.path().join("config.json");
            let mut json: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
            json[key] = value;
            fs::write(path, json.to_string()).unwrap();
        };
        let mut file = "model.safetensors";
        match edit {
            "lm_head only" => {
                for tensor in &mut tensors {
                    tensor.0 = tensor.0.replace("model.embed_tokens.weight", "lm_head.weight");
                }
            }
            "no prefix" => {
                for tensor in &mut tensors {
                    tensor.0 = tensor.0.trim_start_matches("model.").to_string();
                }
            }
            "swish" => set("hidden_act", json!("swish")),
            "bos beyond the vocabulary" => set("bos_token_id", json!(1000)),
            "a stale copy in another shard" => {
                fs::remove_file(folder.path().join(file)).unwrap();
                file = "a.safetensors";
                let (name, shape, values) = tensors[1].clone();
                let stale = (name.clone(), shape, vec![9.0; values.len()]);
                store(folder.path(), "b.safetensors", &[stale, tensors.pop().unwrap()], false);
                let last = &expected.layout.parameters.last().unwrap().name;
                let mut map: BTreeMap<&str, &str> =
                    tensors.iter().map(|(name, ..)| (name.as_str(), file)).collect();
                map.insert(last, "b.safetensors");
                let index = json!({"weight_map": map}).to_string();
                fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
            }
            _ => {}
        }
        store(folder.path(), file, &tensors, edit == "float64");
        let found = model::load(folder.path()).unwrap_or_else(|why| panic!("{edit}: {why:#}"));
        assert_eq!(found.weights, expected.weights, "{edit}");
    }
}

#[test]
fn every_end_of_text_of_both_files_is_kept_and_saved_again() {
    let folder = saved();
    let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
    let mut config = tiny().to_json(Dtype::F32);
    config["eos_token_id"] = json!([7, 9]);
    write("config.json", &config.to_string());
    write("generation_config.json", r#"{"eos_token_id": [9, 11], "temperature": 0.5}"#);
    let loaded = model::load(folder.path()).unwrap();
    assert_eq!(loaded.config.eos_token_ids, [7, 9, 11]);
    assert_eq!(model::load_generation_defaults(folder.path()).unwrap().sampling, None);
    save(folder.path(), &loaded.config, 2).unwrap();
    for name in ["config.json", "generation_config.json"] {
        let json: Value =
            serde_json::from_slice(&fs::read(folder.path().join(name)).unwrap()).unwrap();
        assert_eq!(json["eos_token_id"], json!([7, 9, 11]), "{name}");
    }
    let drawn = r#"{"do_sample": true, "temperature": 0.5, "top_p": 1.0}"#;
    write("generation_config.json", drawn);
    let sampling = model::load_generation_defaults(folder.path()).unwrap().sampling;
    assert_eq!(sampling, Some((0.5, 50, None)), "top_k is transformers' default");
}

#[test]
fn the_window_kind_survives_a_folder_without_provenance() {
    let config = Config { window_kind: Some("addressed".into()), ..tiny() };
    let json = config.to_json(Dtype::F32);
    assert_eq!(json["laam"], json!({"windows": "addressed"}));
    assert_eq!(Config::from_json(&json.to_string()).unwrap().0.window_kind, config.window_kind);
    assert_eq!(tiny().to_json(Dtype::F32).get("laam"), None);
}

/// Spoils a saved folder.
type Spoiler = fn(&Path);

/// Rewrites the weights' header by `edit`, keeping the data.
fn edit_header(folder: &Path, edit: impl FnOnce(&mut Value)) {
    let file = folder.join("model.safetensors");
    let bytes = fs::read(&file).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    edit(&mut header);
    let text = header.to_string();
    let data = &bytes[8 + length..];
    let spoiled = [&(text.len() as u64).to_le_bytes()[..], text.as_bytes(), data].concat();
    fs::write(file, spoiled).unwrap();
}

fn set_length(folder: &Path, name: &str, change: i64) {
    let file = fs::OpenOptions::new().write(true).open(folder.join(name)).unwrap();
    let length = file.metadata().unwrap().len();
    file.set_len(length.checked_add_signed(change).unwrap()).unwrap();
}

/// Turns the one file into one shard under `name`.
fn shard_as(folder: &Path, name: &str) {
    fs::rename(folder.join("model.safetensors"), folder.join("model-1.safetensors")).unwrap();
    let index = json!({"metadata": {}, "weight_map": {"lm_head.weight": name}});
    fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

fn edit_config(folder: &Path, key: &str, value: Value) {
    let file = folder.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    config[key] = value;
    fs::write(file, config.to_string()).unwrap();
}

#[test]
fn every_bad_folder_is_refused_with_a_reason_and_a_hint() {
    let spoilers: [(&str, Spoiler); 25] = [
        ("config.json", |f| fs::remove_file(f.join("config.json")).unwrap()),
        ("config.json", |f| fs::write(f.join("config.json"), b"\xff\xfe{}").unwrap()),
        ("config.json", |f| fs::write(f.join("config.json"), "{\"vocab_size\": ").unwrap()),
        ("config.json", |f| {
            fs::remove_file(f.join("config.json")).unwrap();
            fs::create_dir(f.join("config.json")).unwrap();
        }),
        ("no model.safetensors", |f| fs::remove_file(f.join("model.safetensors")).unwrap()),
        ("not a regular file", |f| {
            fs::remove_file(f.join("model.safetensors")).unwrap();
            fs::create_dir(f.join("model.safetensors")).unwrap();
        }),
        ("cut short", |f| fs::write(f.join("model.safetensors"), "").unwrap()),
        ("cut short", |f| fs::write(f.join("model.safetensors"), [255; 64]).unwrap()),
        ("cut short", |f| set_length(f, "model.safetensors", -1)),
        ("cut short", |f| set_length(f, "model.safetensors", 1)),
        ("cut short", |f| {
            edit_header(f, |h| h["model.norm.weight"]["data_offsets"] = json!([0, 1_u64 << 60]));
        }),
        ("cut short", |f| {
            edit_header(f, |h| {
                h["model.norm.weight"]["shape"] = json!([1_u64 << 62, 1_u64 << 62]);
            });
        }),
        ("missing tensor model.norm.weight", |f| {
            edit_header(f, |h| {
                let tensor = h.as_object_mut().unwrap().remove("model.norm.weight").unwrap();
                h["model.norms.weight"] = tensor;
            });
        }),
        ("stored as I32", |f| edit_header(f, |h| h["model.norm.weight"]["dtype"] = json!("I32"))),
        ("[6, 2]", |f| edit_header(f, |h| h["model.norm.weight"]["shape"] = json!([6, 2]))),
        ("missing tensor model.layers.2", |f| edit_config(f, "num_hidden_layers", json!(3))),
        ("has the shape [41, 12]", |f| edit_config(f, "vocab_size", json!(2_000_000_000))),
        ("lm_head.weight differs", |f| edit_config(f, "tie_word_embeddings", json!(true))),
        ("names the file", |f| shard_as(f, "../model-1.safetensors")),
        ("names the file", |f| shard_as(f, "/model-1.safetensors")),
        ("names the file", |f| shard_as(f, "..\\model-1.safetensors")),
        ("names the file", |f| shard_as(f, "passwd")),
        ("missing.safetensors", |f| shard_as(f, "missing.safetensors")),
        ("invalid model.safetensors.index.json", |f| {
            shard_as(f, "model-1.safetensors");
            fs::write(f.join("model.safetensors.index.json"), "{\"weight_map\": 3}").unwrap();
        }),
        ("pytorch", |f| {
            // Named in the hint, not in the error.
            fs::remove_file(f.join("model.safetensors")).unwrap();
            fs::write(f.join("pytorch_model.bin"), "pickle").unwrap();
        }),
    ];
    for (said, spoil) in spoilers {
        let folder = saved();
        spoil(folder.path());
        let error = model::load(folder.path()).expect_err(said);
        let hint = hint_of(&error).unwrap_or_else(|| panic!("{said}: no hint: {error:#}"));
        assert_eq!(kind_of(&error), Some(ErrorKind::Checkpoint), "{said}: {error:#}");
        let text = format!("{error:#} {}", hint.replace("pickle", "pytorch"));
        assert!(text.contains(said), "{said}: {text}");
    }
    let nowhere = model::load(Path::new("no/such/folder")).unwrap_err();
    assert_eq!(kind_of(&nowhere), Some(ErrorKind::Checkpoint));
}

#[test]
fn every_bad_training_state_is_refused_with_a_hint() {
    let layout = Layout::new(&tiny());
    let spoilers: [Spoiler; 3] = [
        |f| set_length(f, "training_state.safetensors", -4),
        |f| {
            fs::copy(f.join("model.safetensors"), f.join("training_state.safetensors")).unwrap();
        },
        |f| {
            // A state of a wider model.
            let other = tempfile::tempdir().unwrap();
            save(other.path(), &Config { hidden_size: 14, ..tiny() }, 1).unwrap();
            let name = "training_state.safetensors";
            fs::copy(other.path().join(name), f.join(name)).unwrap();
        },
    ];
    for (number, spoil) in spoilers.iter().enumerate() {
        let folder = saved();
        spoil(folder.path());
        let error = model::load_training_state(folder.path(), &layout).unwrap_err();
        assert_eq!(kind_of(&error), Some(ErrorKind::Checkpoint), "spoiler {number}: {error:#}");
        model::load(folder.path()).expect("the weights are none the worse");
    }
}

#[test]
fn load_warns_about_unknown_tensors() {
    let folder = saved();
    edit_header(folder.path(), |header| {
        header["model.extra"] = json!({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]});
        let old = "model.layers.0.self_attn.rotary_emb.inv_freq";
        header[old] = json!({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]});
    });
    let model = model::load(folder.path()).unwrap();
    assert_eq!(model.warnings.len(), 1);
    assert!(model.warnings[0].contains("model.extra"), "{:?}", model.warnings);
}

/// No test of its own: the child that `killed_save_leaves_one_whole_model` kills. Saves the models
/// of seeds 2, 3, ... and says when each is saved.
#[test]
fn saves_for_ever_when_asked() {
    let Some(folder) = std::env::var_os("LAAM_TEST_SAVE_FOR_EVER") else { return };
    for seed in 2.. {
        let hidden_size = if seed % 2 == 0 { 48 } else { 60 };
        save(Path::new(&folder), &Config { hidden_size, ..tiny() }, seed).unwrap();
        println!("saved {seed}");
    }
}

#[test]
fn killed_save_leaves_one_whole_model() {
    let folder = saved();
    for round in 0..12 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "model::saves_for_ever_when_asked", "--nocapture"])
            .env("LAAM_TEST_SAVE_FOR_EVER", folder.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        // The harness writes before the first line without ending its own.
        let seed_of = |line: String| line.rsplit_once("saved ").and_then(|(_, n)| n.parse().ok());
        let first: u64 = said.by_ref().find_map(seed_of).expect("the child saves");
        // Then at a moment of the following saves that differs from round to round.
        std::thread::sleep(Duration::from_micros(1_700 * round));
        child.kill().unwrap();
        child.wait().unwrap();
        let last = said.filter_map(seed_of).last().unwrap_or(first);

        let model = model::load(folder.path()).unwrap();
        let seed = model::load_provenance(folder.path()).unwrap().unwrap().seed;
        assert!(seed == last || seed == last + 1, "{seed}, but {last} was said to be saved");
        assert_eq!(model.weights, initialize(&model.config, &model.layout, seed));
        let state = model::load_training_state(folder.path(), &model.layout).unwrap().unwrap();
        assert_eq!(state.state, json!({"step": seed}));
        assert_eq!(state.arenas["master"], model.weights);
    }
}

/// Writes model folders for `tests/fixtures/check_transformers.py check`, with what it is to find in
/// them, into the folder that LAAM_WRITE_FOLDER names. No test of its own.
#[test]
fn writes_folders_for_transformers_when_asked() {
    let Some(folder) = std::env::var_os("LAAM_WRITE_FOLDER") else { return };
    let folder = Path::new(&folder);
    let llama3 = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 128,
    };
    let cases = [
        ("exact_tied_bfloat16", "exact", Dtype::Bf16, true, 12, 4, RopeScaling::None),
        ("exact_untied_llama3_float32", "exact", Dtype::F32, false, 8, 2, llama3),
        ("original_head_dim_2_float16", "original", Dtype::F16, false, 24, 8, RopeScaling::None),
    ];
    for (name, style, precision, tie_word_embeddings, heads, group, rope_scaling) in cases {
        let place = folder.join(name);
        let tokenizer_folder = folder.join(format!("tokenizer_{style}"));
        let path = tokenizer_folder.to_str().unwrap();
        let trained = laam()
            .args(["train-tokenizer", "--source", concat!(env!("CARGO_MANIFEST_DIR"), "/src")])
            .args(["--vocab_size=700", "--style", style, "--output_path", path])
            .output()
            .unwrap();
        assert!(trained.status.success(), "{}", String::from_utf8_lossy(&trained.stderr));
        let tokenizer = Tokenizer::load(&tokenizer_folder).unwrap();
        let special = tokenizer.special();
        let config = Config {
            vocab_size: tokenizer.vocab_size(),
            hidden_size: 48,
            intermediate_size: 77,
            num_attention_heads: heads,
            num_key_value_heads: heads / group,
            head_dim: 48 / heads,
            max_position_embeddings: 256,
            rope_theta: 50_000.0,
            rope_scaling,
            tie_word_embeddings,
            bos_token_id: special.bos,
            eos_token_ids: special.eos.into_iter().collect(),
            pad_token_id: special.pad,
            window_kind: None,
            ..tiny()
        };
        let layout = Layout::new(&config);
        let weights = initialize(&config, &layout, 1);
        let provenance = Provenance::default();
        let checkpoint = Checkpoint {
            config: &config,
            layout: &layout,
            weights: &weights,
            precision,
            tokenizer: Some(&tokenizer),
            provenance: &provenance,
            training_state: None,
        };
        model::save(&place, &checkpoint).unwrap();

        let hash = |span: Span| -> String {
            let bytes =
                weights[span.range()].iter().flat_map(|&x| precision.round(x).to_le_bytes());
            let hash = Sha256::digest(bytes.collect::<Vec<_>>());
            hash.iter().fold(String::new(), |text, byte| format!("{text}{byte:02x}"))
        };
        let tensors: BTreeMap<_, _> =
            layout.parameters.iter().map(|p| (p.name.clone(), hash(p.span))).collect();
        let texts = [
            "int main(void)\n{\n\treturn 0;\n}\n",
            "<|start_file|><|start_header|>linux/kernel/sched.c<|end_header|>/*\n *  a b  c   d\n */",
            "  leading, trailing  \n\n\n\t\tx ",
            "na\u{ef}ve \u{65e5}\u{672c} \u{1f427} e\u{301}",
            "static const char *p = \"%d, %s\\n\"; do_it(&p->next[0x1F], don't);",
        ];
        let texts = texts.map(|text| {
            let ids = tokenizer.encode_prompt(text).unwrap();
            let decoded = tokenizer.decode_bytes(&ids).unwrap();
            json!({"text": text, "ids": ids, "decoded": String::from_utf8(decoded).unwrap()})
        });
        let expected = json!({"tensors": tensors, "texts": texts});
        fs::write(place.join("expected.json"), expected.to_string()).unwrap();
    }
}

prop_compose! {
    fn any_shape()(
        vocab_size in 1_usize..200, hidden_size in 1_usize..40, intermediate_size in 1_usize..90,
        num_hidden_layers in 1_usize..5, num_key_value_heads in 1_usize..4, group in 1_usize..5,
        half_head_dim in 1_usize..9, tie_word_embeddings: bool,
    ) -> Config {
        Config {
            vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_key_value_heads,
            num_attention_heads: num_key_value_heads * group,
            head_dim: 2 * half_head_dim, tie_word_embeddings, pad_token_id: None, ..tiny()
        }
    }
}

proptest! {
    #[test]
    fn layout_is_aligned_and_disjoint(config in any_shape()) {
        prop_assume!(config.validate().is_ok());
        let layout = Layout::new(&config);

        // The names, as transformers lists them.
        let mut names: Vec<String> = layout.parameters.iter().map(|p| p.name.clone()).collect();
        let mut expected = vec!["model.embed_tokens.weight".into(), "model.norm.weight".into()];
        if !config.tie_word_embeddings {
            expected.push("lm_head.weight".into());
        }
        for layer in 0..config.num_hidden_layers {
            for part in [
                "input_layernorm", "post_attention_layernorm", "self_attn.q_proj",
                "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
                "mlp.up_proj", "mlp.down_proj",
            ] {
                expected.push(format!("model.layers.{layer}.{part}.weight"));
            }
        }
        names.sort();
        expected.sort();
        prop_assert_eq!(names, expected);

        // Each element of the arena belongs to one parameter at most.
        let mut owners = vec![0; layout.len];
        for parameter in &layout.parameters {
            for owner in &mut owners[parameter.span.range()] {
                *owner += 1;
            }
            let count: usize = parameter.shape().iter().product();
            prop_assert_eq!(count, parameter.span.len());
            prop_assert_eq!(parameter.shape().len(), if parameter.kind == ParamKind::Norm { 1 } else { 2 });
        }
        prop_assert!(owners.iter().all(|&owners| owners <= 1));
        prop_assert_eq!(owners.iter().sum::<usize>(), layout.parameter_count());
        prop_assert_eq!(layout.parameter_count() as u128, config.parameter_count());

        // What is read as one matrix starts aligned and is whole.
        let mut spans = vec![layout.embedding, layout.final_norm, layout.head];
        for block in &layout.blocks {
            spans.extend([block.input_norm, block.qkv, block.o, block.post_norm, block.gate_up, block.down]);
        }
        for span in spans {
            prop_assert_eq!(span.offset % Layout::ALIGN, 0);
            prop_assert!(owners[span.range()].iter().all(|&owners| owners == 1));
        }
        prop_assert_eq!(layout.len % Layout::ALIGN, 0);
    }

    #[test]
    fn checkpoint_round_trips_any_shape(config in any_shape(), seed: u64) {
        prop_assume!(config.validate().is_ok());
        let folder = tempfile::tempdir().unwrap();
        save(folder.path(), &config, seed).unwrap();
        let found = model::load(folder.path()).unwrap();
        prop_assert_eq!(&found.config, &config);
        prop_assert_eq!(found.weights, initialize(&config, &found.layout, seed));
    }

    #[test]
    fn loading_never_panics_on_arbitrary_bytes(
        which in 0_usize..3, bytes in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let folder = saved();
        let names = ["config.json", "model.safetensors", "training_state.safetensors"];
        fs::write(folder.path().join(names[which]), bytes).unwrap();
        prop_assert_eq!(model::load(folder.path()).is_ok(), which == 2);
        let state = model::load_training_state(folder.path(), &Layout::new(&tiny()));
        prop_assert_eq!(state.is_ok(), which != 2);
    }
}

#[test]
fn flops_equal_the_sum_over_ops() {
    let config = Config { max_position_embeddings: 64, ..tiny() };
    let (windows, context) = (3, 64);
    let layout = Layout::new(&config);
    let program = step::evaluation(&config, &layout, windows, context).program;
    let counted: usize = program.costs(layout.len).map(|(_, cost)| cost.flops).sum();
    // The operations count attention's diagonal in full, the formula half of it: half a token more.
    let heads = config.num_attention_heads * config.head_dim;
    let diagonal = 2 * heads * config.num_hidden_layers * windows * context;
    let formula = config.forward_flops(context) * (windows * context) as u128;
    assert_eq!(counted as u128, formula + diagonal as u128);
}

#[test]
fn plan_is_equal_for_flags_and_folder() {
    let plan = |arguments: &[&str]| -> Value {
        let output = laam().arg("plan").args(arguments).arg("--json").output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    // The first LaaM's second stage: 4,662,336 parameters.
    let original = plan(&[
        "--hidden_size=64",
        "--num_hidden_layers=8",
        "--num_attention_heads=32",
        "--max_position_embeddings=512",
        "--vocab_size=32768",
    ]);
    assert_eq!(original["parameters"], 4_662_336);
    // Two tables apart: 468,992 in the blocks and 2,097,152 in the head, 6 FLOPs each, and
    // 6 x 512 x 64 x 8 of attention.
    assert_eq!(original["flops_per_token_training"], 6 * (466_944 + 2_097_152 + 512 * 64 * 8));

    assert_eq!(plan(&["--preset", "original"])["parameters"], 4_662_336);
    let activations = ["none", "mlp", "block"].map(|recompute| {
        plan(&["--preset", "32m", "--recompute", recompute])["bytes_activations"].as_u64().unwrap()
    });
    assert!(activations.is_sorted_by(|more, less| less < more), "{activations:?}");

    let folder = saved();
    let path = folder.path().to_str().unwrap();
    let count = Layout::new(&tiny()).parameter_count();
    assert_eq!(plan(&[path])["parameters"], count);
    error_of(&["plan", path, "--hidden_size", "64"]);
    error_of(&["plan", path, "--vocab_size", "64"]);
    error_of(&["plan", "no/such/folder"]);
    error_of(&["plan", "--preset", "42b"]);
    error_of(&["plan", "--preset", "32m", "--hidden_size", "64"]);
    error_of(&["plan", "--hidden_size", "65", "--num_attention_heads", "4"]);
    error_of(&["plan", "--num_attention_heads", "0"]);
    error_of(&["plan", "--num_hidden_layers", "99999999999"]);
}
