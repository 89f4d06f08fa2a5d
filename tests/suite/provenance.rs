//! Where a model came from, as its folder tells it: over every path that leads to a model, by what the
//! text is, and with nothing of the machine that trained it. And the commands that rely on it.

use std::fs;
use std::path::Path;
use std::process::Output;

use laam::corpus::{Corpus, CorpusOptions, Manifest, Source};
use laam::model::{Checkpoint, License, Provenance, load, load_provenance, save};
use laam::train::prepare::record;
use serde_json::Value;

use crate::cli::error_of;
use crate::support::{laam, linux};
use crate::training::train;

/// Trains, and returns what was said.
fn trained(output: &Path, flags: &str) -> String {
    let done = train(output, flags).output().unwrap();
    let said = String::from_utf8(done.stderr).unwrap();
    assert!(done.status.success(), "{flags}: {said}");
    said
}

fn read(folder: &Path, name: &str) -> String {
    fs::read_to_string(folder.join(name)).unwrap()
}

fn run(arguments: &[&str]) -> Output {
    laam().args(arguments).output().unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn json(output: &Output) -> Value {
    let said = String::from_utf8_lossy(&output.stderr);
    serde_json::from_slice(&output.stdout).unwrap_or_else(|fault| panic!("{fault}: {said}"))
}

/// From fresh weights, on from those on another text, and once more in the same folder.
#[test]
fn provenance_follows_a_model_through_its_parents() {
    let folder = tempfile::tempdir().unwrap();
    // A name that says kernel.org, and a text that is not the kernel's.
    let own = folder.path().join("kernel.org-linux-1.0-secret");
    fs::create_dir(&own).unwrap();
    fs::write(own.join("own.c"), "int own(void)\n{\n\treturn 1;\n}\n".repeat(9)).unwrap();
    let [first, second] = ["first", "second"].map(|name| folder.path().join(name));
    trained(&first, &format!("--source {} --max_steps 1 --learning_rate 3e-3", own.display()));
    assert!(read(&first, "README.md").starts_with("---\nlicense: unknown\n"));
    let parent = load_provenance(&first).unwrap().unwrap();
    assert_eq!((parent.parent.is_none(), parent.sessions.len()), (true, 1));
    assert_eq!(parent.sessions[0].steps, (0, 1));
    assert!(parent.seconds.is_some_and(|seconds| seconds > 0.0) && parent.date.is_some());
    assert!(!parent.backend.is_empty() && parent.program_version == laam::VERSION);
    assert!(parent.sessions[0].peak_memory_bytes > 1 << 20);

    // On the sample, which is MIT: what was trained on before still counts.
    let from = format!("--limit 1 --max_steps 1 --init_from {}", first.display());
    trained(&second, &from);
    let weights = laam::model::weights_sha256(&first).unwrap();
    let model = load_provenance(&second).unwrap().unwrap();
    assert_eq!(model.parent.as_ref().unwrap().weights_sha256, weights);
    assert_eq!(model.stages().count(), 2);
    assert_eq!(model.earlier_stages[0], parent);
    assert_eq!(model.paths(), ["own.c", "sample/console.c"]);
    assert_eq!((model.corpus.license.id(), model.license().id()), ("mit", "unknown"));
    // Settings that were really used: the shape is the parent's, the flags' defaults are not.
    assert_eq!(model.recipe["hidden_size"], 16);
    assert_eq!(model.earlier_stages[0].recipe["learning_rate"], 3e-3);

    let before = model.weights_sha256.clone().unwrap();
    let said = trained(&second, "--limit 1 --max_steps 2 --reload --license Apache-2.0");
    assert!(!said.contains("warning: the weights are marked"), "{said}");
    let model = load_provenance(&second).unwrap().unwrap();
    assert_eq!(model.parent.as_ref().unwrap().weights_sha256, before);
    assert_eq!(model.stages().count(), 3);
    let card = read(&second, "README.md");
    assert!(card.starts_with("---\nlicense: apache-2.0\n"), "{card}");
    assert!(card.contains("stage 3 of 3") && card.contains(&weights) && card.contains(&before));
    let listed = json(&run(&["ls", text(&second), "--json"]));
    assert_eq!(listed["paths"], serde_json::json!(["own.c", "sample/console.c"]));
    assert_eq!(listed["license"], "apache-2.0");

    // Nothing of this machine.
    let here = [folder.path().to_str().unwrap(), "secret", env!("CARGO_MANIFEST_DIR")];
    for model in [&first, &second] {
        for file in ["provenance.json", "README.md", "config.json"] {
            let published = read(model, file);
            assert!(here.iter().all(|here| !published.contains(here)), "{file}: {published}");
        }
    }
    let suggested = error_of(&["cat", text(&second), "consol.c"]);
    assert!(suggested.contains("did you mean sample/console.c?"), "{suggested}");
}

/// A run that is resumed keeps its record: one more session, the same text and parents.
#[test]
fn a_resumed_run_keeps_its_provenance() {
    let folder = tempfile::tempdir().unwrap();
    let [first, second] = ["first", "second"].map(|name| folder.path().join(name));
    trained(&first, "--max_steps 1 --license gpl-3.0");
    let from = format!("--init_from {} --max_steps 4 --save_steps 2", first.display());
    trained(&second, &from);
    let whole = load_provenance(&second).unwrap().unwrap();
    fs::remove_dir_all(second.join("checkpoint-4")).unwrap();
    trained(&second, "--max_steps 4 --save_steps 2 --resume");
    let resumed = load_provenance(&second).unwrap().unwrap();
    let steps: Vec<_> = resumed.sessions.iter().map(|session| session.steps).collect();
    assert_eq!(steps, [(0, 2), (2, 4)]);
    assert_eq!(resumed.license().id(), "gpl-3.0", "inherited from the parent");
    assert_eq!((&resumed.date, &resumed.parent), (&whole.date, &whole.parent));
    assert_eq!((&resumed.corpus, &resumed.recipe), (&whole.corpus, &whole.recipe));
    assert_eq!(resumed.earlier_stages, whole.earlier_stages);
}

/// Linux 1.0 by its files: packed by anybody, a part of it, one file of it among others.
#[test]
fn linux_1_0_is_recognized_by_its_files() {
    let Some(archive) = linux() else { return };
    let manifest = |path: &Path, limit| {
        let options = CorpusOptions { limit, ..CorpusOptions::default() };
        let corpus = Corpus::open(&Source::Path(path.to_path_buf()), options).unwrap();
        corpus.manifest().unwrap()
    };
    let whole = manifest(&archive, None);
    let of = |manifest: &Manifest| {
        let record = record(manifest);
        (record.license, record.name, record.url)
    };
    assert_eq!(of(&whole), (License::Gpl2, "Linux 1.0".to_string(), None));
    assert_eq!(record(&whole).recognized.unwrap(), "506 files of Linux 1.0");
    let some = manifest(&archive, Some(3));
    assert_eq!(of(&some), (License::Gpl2, "3 files of Linux 1.0".to_string(), None));

    let folder = tempfile::tempdir().unwrap();
    let documents = crate::support::documents(&archive);
    let document = documents.iter().find(|one| one.path.ends_with("kernel/sched.c")).unwrap();
    fs::write(folder.path().join("mine.c"), &document.text).unwrap();
    fs::write(folder.path().join("own.c"), "int own;\n").unwrap();
    assert_eq!(of(&manifest(folder.path(), None)).0, License::Gpl2);
    fs::write(folder.path().join("mine.c"), format!("{} ", document.text)).unwrap();
    assert_eq!(of(&manifest(folder.path(), None)).0, License::Unknown);
}

#[test]
fn a_model_is_measured_on_its_own_text_or_on_one_that_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (sample, own, source) = (at("sample"), at("own"), at("source"));
    fs::create_dir(&source).unwrap();
    fs::write(source.join("a.c"), "int a(void);\nint b(void);\n".repeat(20)).unwrap();
    trained(&sample, "--max_steps 1");
    trained(&own, &format!("--max_steps 1 --source {}", source.display()));

    // The sample as it was trained on: two files of it.
    let evaluated = json(&run(&["evaluate", text(&sample), "--json"]));
    assert_eq!((&evaluated["source"], &evaluated["files"]), (&"built-in sample".into(), &2.into()));
    let measured = run(&["memorization", text(&sample), "--prefix", "8", "--suffix", "8"]);
    let said = String::from_utf8(measured.stdout).unwrap();
    assert!(said.starts_with("source: built-in sample\n"), "{said}");
    for command in ["evaluate", "memorization"] {
        let refused = error_of(&[command, text(&own)]);
        assert!(refused.contains("a text that laam does not have: local folder"), "{refused}");
        assert!(refused.contains("--source"), "{refused}");
    }
    let right = run(&["evaluate", text(&own), "--source", text(&source)]);
    let said = String::from_utf8(right.stderr).unwrap();
    assert!(!said.contains("warning") && said.contains("source: "), "{said}");
    assert!(String::from_utf8_lossy(&right.stdout).contains(&format!("source: {}", text(&source))));
    fs::write(source.join("a.c"), "int other(void);\n".repeat(40)).unwrap();
    let other = run(&["evaluate", text(&own), "--source", text(&source)]);
    let said = String::from_utf8(other.stderr).unwrap();
    assert!(said.contains("warning: this is not the text that the model was trained on"), "{said}");

    // A record that is not true: nothing is measured.
    let mut provenance: Value = serde_json::from_str(&read(&sample, "provenance.json")).unwrap();
    provenance["corpus"]["manifest_sha256"] = "00".repeat(32).into();
    fs::write(sample.join("provenance.json"), provenance.to_string()).unwrap();
    assert!(error_of(&["evaluate", text(&sample)]).contains("is not the text that is recorded"));
    fs::remove_file(sample.join("provenance.json")).unwrap();
    assert!(error_of(&["evaluate", text(&sample)]).contains("does not say on which text"));
}

/// JSON has no infinity: null there, `inf` for a person, and the loss in both.
#[test]
fn perplexity_may_be_infinite() {
    let folder = tempfile::tempdir().unwrap();
    let [first, loud] = ["first", "loud"].map(|name| folder.path().join(name));
    trained(&first, "--max_steps 1");
    let model = load(&first).unwrap();
    let mut weights = model.weights;
    for norm in &mut weights[model.layout.final_norm.range()] {
        *norm = 1e6;
    }
    let checkpoint = Checkpoint {
        config: &model.config,
        layout: &model.layout,
        weights: &weights,
        precision: model.precision,
        tokenizer: Some(&laam::tokenizer::Tokenizer::load(&first).unwrap()),
        provenance: &Provenance::default(),
        training_state: None,
    };
    save(&loud, &checkpoint).unwrap();
    let evaluate = ["evaluate", text(&loud), "--version", "none", "--windows", "original"];
    let refused = laam().args(evaluate).arg("--json").output().unwrap();
    let error = json(&refused);
    assert_eq!((refused.status.code(), &error["error"]["kind"]), (Some(2), &"config".into()));
    assert!(String::from_utf8(refused.stderr).unwrap().contains("laam: invalid kernel version"));
    let source = folder.path().join("one.c");
    fs::write(&source, "int one;\n").unwrap();
    let evaluate = ["evaluate", text(&loud), "--source", text(&source), "--windows", "original"];
    let printed = json(&laam().args(evaluate).arg("--json").output().unwrap());
    assert_eq!(printed["perplexity"], Value::Null);
    assert!(printed["loss"].as_f64().unwrap() > 709.0, "{printed}");
    let printed = String::from_utf8(run(&evaluate).stdout).unwrap();
    assert!(printed.contains("\nperplexity: inf\n") && printed.contains("\nloss: "), "{printed}");
}

#[test]
fn recipes_that_need_a_source_do_not_run_on_the_sample() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("run");
    let refused = error_of(&["run", "--recipe", "linux-kernel-dir", "--output", text(&output)]);
    assert!(
        refused.contains("no source for the recipe") && refused.contains("--source"),
        "{refused}"
    );
    let sweep = folder.path().join("sweep.toml");
    fs::write(&sweep, "recipe = 'linux-kernel-dir'\n[grid]\nseed = [1]\n").unwrap();
    let refused = error_of(&["sweep", text(&sweep), "--output", text(&output)]);
    assert!(refused.contains("no source for the recipe"), "{refused}");
    assert!(!output.exists());
}
