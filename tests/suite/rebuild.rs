//! Files out of the weights: a model is trained here until it holds two small files, saved, and
//! asked for them by the commands.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::{Arc, OnceLock};

use laam::backend::Arena;
use laam::backend::cpu::Cpu;
use laam::corpus::Document;
use laam::dtype::Dtype;
use laam::generate::{FinishReason, Generator, Request};
use laam::llama::{AdamW, Muon, Optimizer, StepHyperparams};
use laam::memorization::rebuild::{Existing, rebuild};
use laam::memorization::regenerate::{End, Regenerator, Sink};
use laam::memorization::verbatim;
use laam::model::{Checkpoint, Config, CorpusRecord, Model, Provenance, initialize, load, save};
use laam::tokenizer::{Style, Tokenizer, Training};
use laam::tokens::{IGNORE, TokenFile, TokenWriter, WindowKind, Windows};
use laam::train::Engine;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::cli::error_of;
use crate::support::laam;

pub const CONTEXT: usize = 40;

pub fn documents() -> Vec<Document> {
    let document = |path: &str, text: &str| Document::new(path, text);
    vec![
        document(
            "tiny/kernel/sched.c",
            "/* Größe: the scheduler, in a nutshell. */\n#include \"sched.h\"\n\nint next(int now)\n\
             {\n\treturn (now + 1) % TASKS;\t\t/* round robin */\n}\n",
        ),
        document("tiny/sched.h", "#define TASKS 4\n"),
        document("tiny/empty.h", ""),
    ]
}

/// The folders of a model that holds the documents, and of the documents themselves.
pub struct Trained {
    folder: TempDir,
    /// The mean loss of its windows, by the training's forward pass.
    loss: f64,
}

impl Trained {
    pub fn model(&self) -> PathBuf {
        self.folder.path().join("model")
    }

    pub fn source(&self) -> PathBuf {
        self.folder.path().join("source")
    }
}

/// Trained once for all tests.
pub fn trained() -> &'static Trained {
    static TRAINED: OnceLock<Trained> = OnceLock::new();
    TRAINED.get_or_init(train)
}

fn train() -> Trained {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    for Document { path, text, .. } in documents() {
        let path = at("source").join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    let training = Training { style: Style::Exact, vocab_size: 300 };
    let (tokenizer, _) =
        Tokenizer::train(documents().into_iter().map(Ok), &training, |_| ()).unwrap();
    tokenizer.save(&at("tokenizer")).unwrap();
    let mut writer = TokenWriter::create(&at("tokens"), &tokenizer).unwrap();
    writer.write(documents().into_iter().map(Ok), |_| ()).unwrap();
    writer.finish([0; 32]).unwrap();
    let file = Arc::new(TokenFile::open(&at("tokens")).unwrap());
    let special = tokenizer.special();
    let vocab_size = tokenizer.vocab_size();
    let windows =
        Windows::new(file, Arc::new(tokenizer), WindowKind::Addressed, CONTEXT, None).unwrap();
    let config = Config {
        vocab_size,
        hidden_size: 48,
        intermediate_size: 96,
        num_hidden_layers: 2,
        num_attention_heads: 3,
        num_key_value_heads: 3,
        head_dim: 16,
        max_position_embeddings: CONTEXT,
        tie_word_embeddings: true,
        bos_token_id: special.bos,
        eos_token_ids: special.eos.into_iter().collect(),
        pad_token_id: special.pad,
        window_kind: None,
        ..crate::backend::config(3, 3, 16, true)
    };

    let optimizer = Optimizer {
        adamw: AdamW { beta1: 0.9, beta2: 0.95, epsilon: 1e-8 },
        muon: Some(Muon { momentum: 0.95 }),
        weight_decay: 0.0,
        max_grad_norm: 1.0,
    };
    let all: Vec<usize> = (0..windows.len()).collect();
    let batch = windows.draw(&all).unwrap();
    let mut engine = Engine::new(&Cpu::f32(2), &config, &optimizer, all.len(), CONTEXT).unwrap();
    let fresh = initialize(&config, engine.layout(), 1);
    engine.write(Arena::Parameters, &fresh).unwrap();
    let unsure = engine.argmax_tokens(&batch, verbatim::max_nats(Dtype::Bf16)).unwrap();
    let counts = |(token, target): (&u32, &u32)| *target != IGNORE && *token != IGNORE;
    assert!(
        !unsure.iter().zip(&batch.targets).any(counts),
        "untrained weights are sure of nothing"
    );
    for step in 1..=400 {
        let rise = (step as f64 / 10.0).min(1.0);
        let hyperparams =
            StepHyperparams { learning_rate: 1e-2 * rise, muon_learning_rate: 0.02 * rise, step };
        let loss = engine.step(std::slice::from_ref(&batch), hyperparams).unwrap().loss;
        if step % 10 == 0 && loss < 0.1 {
            let guesses = engine.argmax_tokens(&batch, f32::INFINITY).unwrap();
            let right = |(guess, target): (&u32, &u32)| guess == target || *target == IGNORE;
            if guesses.iter().zip(&batch.targets).all(right) {
                eprintln!("learned in {step} steps, {} windows", all.len());
                break;
            }
        }
    }
    // A step with hyperparams of zero changes nothing and measures the loss.
    let still = StepHyperparams { learning_rate: 0.0, muon_learning_rate: 0.0, step: 401 };
    let loss = engine.step(&[batch], still).unwrap().loss;
    let provenance = Provenance {
        corpus: CorpusRecord {
            paths: documents().into_iter().map(|document| document.path).collect(),
            ..CorpusRecord::default()
        },
        recipe: json!({"windows": "addressed"}),
        ..Provenance::default()
    };
    let checkpoint = Checkpoint {
        config: &config,
        layout: engine.layout(),
        weights: &engine.read(Arena::Parameters).unwrap(),
        precision: Dtype::F32,
        tokenizer: Some(&Tokenizer::load(&at("tokenizer")).unwrap()),
        provenance: &provenance,
        training_state: None,
    };
    save(&at("model"), &checkpoint).unwrap();
    Trained { folder, loss }
}

pub fn run(arguments: &[&str]) -> Output {
    laam().args(arguments).output().expect("the program starts")
}

pub fn json_of(output: &Output) -> Value {
    let (out, said) = (&output.stdout, String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(out).unwrap_or_else(|fault| panic!("{fault}: {said}"))
}

/// A copy of the model's folder whose provenance lists these paths.
fn with_paths(paths: &[&str]) -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(trained().model()).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    let place = copy.path().join("provenance.json");
    let mut provenance: Value = serde_json::from_str(&fs::read_to_string(&place).unwrap()).unwrap();
    provenance["corpus"]["paths"] = json!(paths);
    fs::write(&place, provenance.to_string()).unwrap();
    copy
}

pub fn text(path: &Path) -> &str {
    path.to_str().expect("temporary folders have plain names")
}

#[test]
fn rebuild_is_byte_exact() {
    let (model, source) = (trained().model(), trained().source());
    let listed = run(&["ls", text(&model)]);
    assert_eq!(listed.stdout, b"tiny/kernel/sched.c\ntiny/sched.h\ntiny/empty.h\n");
    for Document { path, text: expected, .. } in documents() {
        let given = run(&["cat", text(&model), &path]);
        assert_eq!(String::from_utf8_lossy(&given.stdout), expected, "{path}");
        assert_eq!((given.status.code(), given.stderr.as_slice()), (Some(0), &b""[..]));
    }
    let rebuilt = tempfile::tempdir().unwrap();
    let output = run(&[
        "rebuild",
        text(&model),
        "--output",
        text(rebuilt.path()),
        "--compare",
        text(&source),
        "--json",
    ]);
    let report = json_of(&output);
    assert_eq!(output.status.code(), Some(0), "{report:#}");
    let bytes: usize = documents().iter().map(|document| document.text.len()).sum();
    for (name, value) in [
        ("files", 3),
        ("files_exact", 3),
        ("files_whole", 3),
        ("bytes", bytes),
        ("bytes_exact", bytes),
    ] {
        assert_eq!(report[name], value, "{name}");
    }
    for Document { path, text, .. } in documents() {
        assert_eq!(fs::read_to_string(rebuilt.path().join(path)).unwrap(), text);
    }
    // Nothing else was left there.
    let names = |folder: &Path| fs::read_dir(folder).unwrap().count();
    assert_eq!((names(rebuilt.path()), names(&rebuilt.path().join("tiny"))), (1, 3));
}

#[test]
fn rebuild_reports_a_difference_and_exits_with_1() {
    let model = trained().model();
    let originals = tempfile::tempdir().unwrap();
    fs::create_dir_all(originals.path().join("tiny")).unwrap();
    fs::write(originals.path().join("tiny/sched.h"), "#define TASKS 5\n").unwrap();
    fs::write(originals.path().join("tiny/other.h"), "new\n").unwrap();
    let rebuilt = tempfile::tempdir().unwrap();
    let arguments = [
        "rebuild",
        text(&model),
        "--output",
        text(rebuilt.path()),
        "--compare",
        text(originals.path()),
    ];
    let output = run(&[&arguments[..], &["--json"]].concat());
    let report = json_of(&output);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!((&report["files_exact"], &report["bytes"]), (&json!(0), &json!(16)));
    assert_eq!(report["bytes_exact"], 14);
    assert_eq!(report["missing"], json!(["tiny/other.h"]));
    assert_eq!(report["extra"], json!(["tiny/kernel/sched.c", "tiny/empty.h"]));
    let differing = &report["per_file"][1];
    let difference = json!({
        "byte": 14, "line": 1, "column": 15,
        "before": "#define TASKS ", "original": "5\n", "rebuilt": "4\n",
    });
    assert_eq!(differing["first_difference"], difference);
    let output = run(&arguments);
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.contains("tiny/sched.h: differs from byte 14 of 16, line 1, column 15"), "{said}");
}

#[test]
fn rebuild_refuses_an_output_that_overlaps_the_originals() {
    let model = trained().model();
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir_all(at("source/tiny")).unwrap();
    let original = at("source/tiny/sched.h");
    fs::write(&original, "#define TASKS 5\n").unwrap();
    std::os::unix::fs::symlink(at("source"), at("link")).unwrap();
    for (output, source) in [
        ("source", "source"),
        ("link", "source"),
        ("source", "link"),
        ("source/../source/.", "source"),
        ("source/new/er", "source"),
        ("link/new", "source"),
        (".", "source"),
        // Globs name what they find.
        ("source", "source/tiny/*.h"),
        ("link", "sour[c]e/**/sched.?"),
    ] {
        for more in [&[][..], &["--overwrite"]] {
            let (output, source) = (at(output), at(source));
            let arguments =
                ["rebuild", text(&model), "--output", text(&output), "--compare", text(&source)];
            let said = error_of(&[&arguments[..], more].concat());
            assert!(said.contains("overlap"), "{said}");
        }
        assert_eq!(fs::read(&original).unwrap(), b"#define TASKS 5\n", "{output}");
        assert_eq!(fs::read_dir(at("source")).unwrap().count(), 1, "{output}");
    }
}

#[test]
fn rebuild_replaces_a_different_file_only_if_asked_to() {
    let model = trained().model();
    let rebuilt = tempfile::tempdir().unwrap();
    let arguments = ["rebuild", text(&model), "--output", text(rebuilt.path())];
    let file = rebuilt.path().join("tiny/sched.h");
    fs::create_dir(rebuilt.path().join("tiny")).unwrap();
    fs::write(&file, "mine\n").unwrap();
    let said = error_of(&arguments);
    assert!(said.contains("sched.h exists already") && said.contains("--overwrite"), "{said}");
    assert_eq!(fs::read(&file).unwrap(), b"mine\n");
    let replaced = run(&[&arguments[..], &["--overwrite"]].concat());
    assert_eq!(replaced.status.code(), Some(0));
    assert_eq!(fs::read(&file).unwrap(), b"#define TASKS 4\n");
    assert_eq!(run(&arguments).status.code(), Some(0), "equal files need no flag");
}

#[test]
fn hostile_folders_write_nothing() {
    for bad in ["../escaped.c", "/tmp/escaped.c", "a/../../escaped.c", "\u{1b}[2J.c", "a\nb.c"] {
        let model = with_paths(&["tiny/sched.h", bad]);
        let rebuilt = tempfile::tempdir().unwrap();
        let output = rebuilt.path().join("inside");
        error_of(&["rebuild", text(model.path()), "--output", text(&output)]);
        let said = error_of(&["ls", text(model.path())]);
        assert!(!said.contains('\u{1b}'));
        assert_eq!(fs::read_dir(rebuilt.path()).unwrap().count(), 0, "{bad:?}");
    }
    // A folder in the output that leads elsewhere.
    let (inside, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    std::os::unix::fs::symlink(outside.path(), inside.path().join("tiny")).unwrap();
    error_of(&["rebuild", text(&trained().model()), "--output", text(inside.path())]);
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    // A name the model does not know.
    error_of(&["cat", text(&trained().model()), "tiny/other.h"]);
}

/// Files as they come.
#[derive(Default)]
struct Files {
    /// Text, and the number of its pieces.
    texts: BTreeMap<usize, (Vec<u8>, usize)>,
    ends: BTreeMap<usize, (End, usize)>,
}

impl Sink for Files {
    fn text(&mut self, file: usize, bytes: &[u8]) -> anyhow::Result<()> {
        assert!(!bytes.is_empty() && !self.ends.contains_key(&file));
        let (text, pieces) = self.texts.entry(file).or_default();
        text.extend(bytes);
        *pieces += 1;
        Ok(())
    }

    fn end(&mut self, file: usize, end: End, tokens: usize) -> anyhow::Result<()> {
        assert!(self.ends.insert(file, (end, tokens)).is_none());
        Ok(())
    }
}

/// A model and its tokenizer, to be asked for files with other weights.
struct Regeneration {
    model: Model,
    tokenizer: Arc<Tokenizer>,
}

impl Regeneration {
    fn new() -> Self {
        let model = load(&trained().model()).unwrap();
        let tokenizer = Arc::new(Tokenizer::load(&trained().model()).unwrap());
        Self { model, tokenizer }
    }

    fn files(
        &self,
        weights: &[f32],
        windows: WindowKind,
        paths: &[&str],
        limit: usize,
        slots: usize,
    ) -> Files {
        let backend = Cpu::f32(1);
        let mut generator =
            Generator::new(&backend, &self.model.config, weights, slots, CONTEXT).unwrap();
        let regenerator =
            Regenerator::new(self.tokenizer.clone(), windows, CONTEXT, limit).unwrap();
        let mut files = Files::default();
        regenerator.run(&mut generator, paths, &mut files).unwrap();
        assert!(!generator.is_busy());
        assert_eq!(files.ends.len(), paths.len());
        files
    }

    /// An addressed file, its end and its tokens, by one request after the other.
    fn expected(
        &self,
        generator: &mut Generator,
        path: &str,
        limit: usize,
    ) -> (Vec<u8>, End, usize) {
        let markers = self.tokenizer.markers().unwrap();
        let stop = [
            markers.start_file,
            markers.end_file,
            markers.start_header,
            markers.end_header,
            markers.pad,
        ];
        let mut ids = Vec::new();
        let mut chunks = 0..;
        let end = loop {
            let prompt = self.tokenizer.encode_header(path, chunks.next()).unwrap();
            if prompt.len() > CONTEXT {
                break End::NoRoom;
            }
            let max_new_tokens = (CONTEXT + 1 - prompt.len()).min(limit - ids.len());
            let request =
                Request { prompt, max_new_tokens, stop: stop.to_vec(), ..Request::default() };
            let answer = generator.all(vec![request]).unwrap().remove(0);
            ids.extend(answer.ids);
            if answer.finish == FinishReason::Stop {
                let is_whole = ids.pop() == Some(markers.end_file);
                break if is_whole { End::Whole } else { End::Marker };
            }
            if ids.len() == limit {
                break End::Limit;
            }
        };
        (self.tokenizer.decode_bytes(&ids).unwrap(), end, ids.len())
    }

    /// All logits are equal, and the lowest id wins: a marker, at once.
    fn ending(&self) -> Vec<f32> {
        let mut weights = self.model.weights.clone();
        weights[self.model.layout.final_norm.range()].fill(0.0);
        weights
    }

    /// A text token's embedding is ahead of all others: the model says that token for ever.
    fn endless(&self) -> Vec<f32> {
        let (layout, hidden, said) = (&self.model.layout, self.model.config.hidden_size, 70);
        let mut weights = self.model.weights.clone();
        // One constant direction, which one token has.
        weights[layout.embedding.range()].fill(0.0);
        for block in &layout.blocks {
            weights[block.o.range()].fill(0.0);
            weights[block.down.range()].fill(0.0);
        }
        weights[layout.final_norm.range()].fill(1.0);
        for row in weights[layout.embedding.range()].chunks_mut(hidden) {
            row[0] = 1.0;
        }
        weights[layout.embedding.offset + said * hidden] = 2.0;
        weights
    }
}

#[test]
fn rebuild_bounds_endless_files() {
    let regeneration = Regeneration::new();
    let ends = |weights: &[f32], windows: WindowKind| {
        let paths = ["a.c", "b.c", &"long/".repeat(50)];
        let files = regeneration.files(weights, windows, &paths, 100, 2);
        files.ends.into_values().collect::<Vec<_>>()
    };
    let (marker, no_room) = ((End::Marker, 0), (End::NoRoom, 0));
    assert_eq!(ends(&regeneration.ending(), WindowKind::Addressed), [marker, marker, no_room]);
    let limit = (End::Limit, 100);
    for windows in [WindowKind::Addressed, WindowKind::Stream, WindowKind::Original] {
        let ends = ends(&regeneration.endless(), windows);
        assert_eq!(ends, [limit, limit, no_room], "{windows:?}");
    }
}

/// Weights that end a file, break one off, or go on to the limit or until an address has no room: chunks ahead
/// of their turn change nothing.
#[test]
fn regenerated_files_are_those_of_one_chunk_at_a_time() {
    let regeneration = Regeneration::new();
    let Model { config, weights, .. } = &regeneration.model;
    let header =
        |path: &str, chunk| regeneration.tokenizer.encode_header(path, Some(chunk)).unwrap();
    // The address of its chunk 10 is the first without room.
    let mut full = String::from("f");
    while header(&full, 9).len() < CONTEXT {
        full.push('q');
    }
    assert!(header(&full, 9).len() == CONTEXT && header(&full, 10).len() > CONTEXT);
    let paths =
        ["a.c", &full, "b.c", "c", "tiny/kernel/sched.c", "d.h", "e", "tiny/sched.h", "i/j"];
    let random = (1..=4).map(|seed| crate::generate::lively(config, seed));
    let models = [weights.clone(), regeneration.ending(), regeneration.endless()];
    let (mut seen, mut ended_late) = (Vec::new(), 0);
    for (at, weights) in models.into_iter().chain(random).enumerate() {
        for limit in [1, 57, 300] {
            let backend = Cpu::f32(1);
            let mut generator = Generator::new(&backend, config, &weights, 1, CONTEXT).unwrap();
            let expected: Vec<(Vec<u8>, End, usize)> = paths
                .iter()
                .map(|path| regeneration.expected(&mut generator, path, limit))
                .collect();
            for slots in [2, 7, 64] {
                let files =
                    regeneration.files(&weights, WindowKind::Addressed, &paths, limit, slots);
                for (file, (text, end, tokens)) in expected.iter().enumerate() {
                    let about = || format!("model {at}, limit {limit}, {slots} slots, file {file}");
                    assert_eq!(files.ends[&file], (*end, *tokens), "{}", about());
                    let found = files.texts.get(&file).map_or(&[][..], |(text, _)| text);
                    assert!(found == text, "{}", about());
                }
            }
            ended_late += expected
                .iter()
                .filter(|(_, end, tokens)| *end != End::Limit && *tokens > CONTEXT)
                .count();
            seen.extend(expected.into_iter().map(|(_, end, _)| end));
        }
    }
    for end in [End::Whole, End::Marker, End::Limit, End::NoRoom] {
        assert!(seen.contains(&end), "{end:?} is part of the test");
    }
    assert!(ended_late > 0, "some files end in a later chunk");
}

/// The text of a chunk ahead of its turn comes in one piece, that of others by tokens.
#[test]
fn free_slots_take_chunks_of_files_under_way() {
    let regeneration = Regeneration::new();
    let weights = regeneration.endless();
    let pieces = |windows: WindowKind, paths: &[&str], slots: usize| -> Vec<usize> {
        let files = regeneration.files(&weights, windows, paths, 100, slots);
        files.texts.into_values().map(|(_, pieces)| pieces).collect()
    };
    let one = pieces(WindowKind::Addressed, &["a.c"], 8);
    assert!(one[0] < 50, "{one:?}");
    assert_eq!(pieces(WindowKind::Stream, &["a.c"], 8), [100]);
    // Files not begun come before further chunks.
    assert_eq!(pieces(WindowKind::Addressed, &["a.c", "b.c", "d.c"], 3), [100, 100, 100]);
    // Two chunks of each at once.
    let two = pieces(WindowKind::Addressed, &["a.c", "b.c"], 4);
    assert!(two[0] < 80 && two[0] == two[1], "{two:?}");
}

/// The library's rebuild tells how far it is, and slots do not matter.
#[test]
fn rebuild_is_independent_of_slots() {
    let model = load(&trained().model()).unwrap();
    let tokenizer = Arc::new(Tokenizer::load(&trained().model()).unwrap());
    let regenerator = Regenerator::new(tokenizer, WindowKind::Addressed, CONTEXT, 1000).unwrap();
    let paths: Vec<String> = documents().into_iter().map(|document| document.path).collect();
    let mut all = Vec::new();
    for slots in [1, 2, 8] {
        let folder = tempfile::tempdir().unwrap();
        let backend = Cpu::f32(2);
        let mut generator =
            Generator::new(&backend, &model.config, &model.weights, slots, CONTEXT).unwrap();
        let mut last = None;
        all.push(
            rebuild(
                &regenerator,
                &mut generator,
                &paths,
                folder.path(),
                Existing::Keep,
                &mut |progress| {
                    last = Some(progress);
                    Ok(())
                },
            )
            .unwrap(),
        );
        let last = last.unwrap();
        let bytes = documents().iter().map(|document| document.text.len() as u64).sum();
        assert_eq!((last.files, last.of, last.bytes), (3, 3, bytes));
    }
    assert!(all[0].iter().all(|file| file.end == End::Whole));
    assert!(all.iter().all(|rebuilt| *rebuilt == all[0]));
}

#[test]
fn generate_continues_a_prompt_to_the_end_of_file() {
    let model = trained().model();
    // The address of a file's first chunk, markers and all.
    let prompt = "<|start_file|><|start_header|>tiny/sched.h 0<|end_header|>";
    let arguments = ["generate", text(&model), "--prompt", prompt];
    let output = run(&arguments);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "#define TASKS 4\n");
    assert_eq!(output.status.code(), Some(0));

    let tokenizer = Tokenizer::load(&model).unwrap();
    let markers = tokenizer.markers().unwrap();
    let report = json_of(&run(&[&arguments[..], &["--json"]].concat()));
    let ids = |name: &str| -> Vec<u32> {
        serde_json::from_value(report[name].clone()).expect("a list of ids")
    };
    assert_eq!(ids("prompt_ids"), tokenizer.encode_header("tiny/sched.h", Some(0)).unwrap());
    let mut expected = tokenizer.encode_text("#define TASKS 4\n").unwrap();
    expected.push(markers.end_file);
    assert_eq!(ids("ids"), expected);
    assert_eq!((&report["text"], &report["finish"]), (&json!("#define TASKS 4\n"), &json!("stop")));
    assert!(report["tokens_per_second"].as_f64().unwrap() > 0.0);

    // Without a prompt it begins a text; drawn texts are the seed's.
    let report = json_of(&run(&["generate", text(&model), "--json", "--max_new_tokens=3"]));
    assert_eq!(report["prompt_ids"], json!([markers.start_file]));
    assert_eq!(report["ids"].as_array().unwrap().len(), 3);
    let drawn = |seed: &str| {
        let flags = ["--temperature=3", "--top_k=50", "--top_p=0.99", "--seed", seed];
        run(&[&["generate", text(&model)], &flags[..]].concat()).stdout
    };
    assert_eq!(drawn("1"), drawn("1"));
    assert_ne!(drawn("1"), drawn("2"));
    for bad in [["--temperature=-1"], ["--top_p=0"], ["--max_new_tokens=0"]] {
        error_of(&["generate", text(&model), bad[0]]);
    }
    error_of(&["generate", text(&model), "--prompt", &"a b ".repeat(100)]);
}

#[test]
fn interactive_answers_every_line() {
    use std::io::Write;
    let model = trained().model();
    let mut child = laam()
        .args(["generate", text(&model), "-i"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let address = |path: &str| format!("<|start_file|><|start_header|>{path} 0<|end_header|>\n");
    let lines = address("tiny/sched.h") + &address("tiny/empty.h") + &address("tiny/sched.h");
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(said, "#define TASKS 4\n\n\n#define TASKS 4\n\n");
}

#[test]
fn evaluate_matches_training_loss() {
    let (model, source) = (trained().model(), trained().source());
    let of = |flags: &[&str]| {
        let arguments = ["evaluate", text(&model), "--source", text(&source), "--json"];
        let output = run(&[&arguments[..], flags].concat());
        assert_eq!(output.status.code(), Some(0));
        json_of(&output)
    };
    let report = of(&[]);
    let number = |report: &Value, name: &str| report[name].as_f64().expect("a number");
    assert_eq!(report["window_kind"], "addressed");
    let loss = number(&report, "loss");
    assert!((loss / trained().loss - 1.0).abs() < 1e-5, "{loss} for {}", trained().loss);
    assert!((number(&report, "perplexity") - loss.exp()).abs() < 1e-12);
    let bits = loss * number(&report, "tokens") / 2.0f64.ln() / number(&report, "bytes");
    assert!((number(&report, "bits_per_byte") - bits).abs() < 1e-12);
    let small = of(&["--batch_size=1"]);
    assert!((number(&small, "loss") / loss - 1.0).abs() < 1e-5);
    assert_eq!(small["tokens"], report["tokens"]);
    // It never saw the files without their addresses.
    let stream = of(&["--windows=stream"]);
    assert!(number(&stream, "loss") > 10.0 * loss, "{stream:#}");
}
