//! `laam train` as a person runs it: cut off and resumed, begun in every way, told wrong things; and
//! what it writes while it runs.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use laam::backend::Arena;
use laam::backend::cpu::Cpu;
use laam::corpus::{Corpus, CorpusOptions, Source};
use laam::dtype::Dtype;
use laam::kernels::BUILD;
use laam::llama::{Recompute, StepHyperparams};
use laam::model::{
    Checkpoint, Layout, Provenance, initialize, load, load_config, load_training_state, save,
};
use laam::tokenizer::{Style, Tokenizer};
use laam::tokens::{Order, Sampler, TokenFile, WindowKind, Windows};
use laam::train::{Engine, Metrics, Settings};
use tempfile::TempDir;

use crate::support::laam;

/// A tokenizer of the built-in sample.
pub fn tokenizer() -> &'static Path {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let corpus = Corpus::open(&Source::Sample, CorpusOptions::default()).unwrap();
        let documents: Vec<_> = corpus.documents().unwrap().map(Result::unwrap).collect();
        super::tokenizer::train(&documents, Style::Exact, 400).save(folder.path()).unwrap();
        folder
    });
    folder.path()
}

/// The flags of a small model's shape.
const SHAPE: [(&str, &str); 6] = [
    ("--max_position_embeddings", "48"),
    ("--hidden_size", "16"),
    ("--intermediate_size", "24"),
    ("--num_hidden_layers", "2"),
    ("--num_attention_heads", "4"),
    ("--num_key_value_heads", "2"),
];

/// `laam train` of a small model on two files of the sample, which are some 100 windows. A flag of
/// these that is given takes its place, and `--init_from` that of the shape.
pub fn train(output: &Path, flags: &str) -> Command {
    let tokenizer = tokenizer().to_str().expect("a plain path");
    let small = [
        ("--limit", "2"),
        ("--tokenizer_path", tokenizer),
        ("--warmup_steps", "5"),
        ("--learning_rate", "1e-2"),
    ];
    // Of a model that is gone on with, the shape is the model's.
    let shape = if flags.contains("--init_from") { &[][..] } else { &SHAPE };
    let mut command = laam();
    command.arg("train").arg("--output_path").arg(output).args(flags.split_whitespace());
    for &(flag, value) in small.iter().chain(shape) {
        if !flags.split_whitespace().any(|given| given.split('=').next() == Some(flag)) {
            command.args([flag, value]);
        }
    }
    command
}

pub fn said(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("talk is UTF-8")
}

/// Trains to the end; returns what was said.
pub fn trained(output: &Path, flags: &str) -> String {
    let done = train(output, flags).output().expect("the program starts");
    assert!(done.status.success(), "{flags}: {}", said(&done));
    assert!(done.stdout.is_empty(), "training has no data for stdout");
    said(&done)
}

/// Fails as an error does; returns what was said.
fn refused(output: &Path, flags: &str) -> String {
    let failed = train(output, flags).output().expect("the program starts");
    let said = said(&failed);
    assert_eq!(failed.status.code(), Some(2), "{flags}: {said}");
    let lines: Vec<_> = said.lines().filter(|line| !line.starts_with("warning: ")).collect();
    let error = lines.iter().position(|line| line.starts_with("laam: ")).expect(&said);
    assert_eq!(lines.len(), error + 2, "{flags}: {said}");
    assert!(lines[error + 1].starts_with("hint: "), "{flags}: {said}");
    said
}

/// Where a run says that its tokens are.
pub fn token_file(said: &str) -> PathBuf {
    said.lines().find_map(|line| line.strip_prefix("the tokens are in ")).expect(said).into()
}

pub fn metrics(output: &Path) -> Vec<Metrics> {
    let text = fs::read_to_string(output.join("metrics.jsonl")).unwrap_or_default();
    text.lines().map_while(|line| serde_json::from_str(line).ok()).collect()
}

/// Starts a run and lets it go until so many lines of metrics are there.
pub fn under_way(output: &Path, flags: &str, lines: usize) -> Child {
    let mut child = train(output, flags).stderr(Stdio::piped()).spawn().expect("it starts");
    let began = Instant::now();
    while metrics(output).len() < lines && child.try_wait().unwrap().is_none() {
        assert!(began.elapsed() < Duration::from_mins(1), "no {lines} lines in a minute");
        std::thread::sleep(Duration::from_millis(2));
    }
    child
}

/// Waits until a run has written so many lines of metrics.
pub fn wait_for_metrics(output: &Path, lines: usize) {
    let began = Instant::now();
    while metrics(output).len() < lines {
        assert!(began.elapsed() < Duration::from_mins(1), "no {lines} lines in a minute");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Kills a run, as a power cut would, once it has written some lines. On a machine so busy that the
/// run was done before, it is done over, and killed sooner.
pub fn killed(output: &Path, flags: &str, lines: usize) {
    for lines in (1..=lines).rev().step_by(2) {
        let mut child = under_way(output, flags, lines);
        child.kill().unwrap();
        child.wait().unwrap();
        if !output.join("model.safetensors").exists() {
            return;
        }
        fs::remove_dir_all(output).unwrap();
    }
    panic!("no run could be killed in time");
}

/// The checkpoint a run would be resumed from.
pub fn newest_checkpoint(output: &Path) -> PathBuf {
    output.join(format!("checkpoint-{}", checkpoints(output).pop().expect("a checkpoint")))
}

/// What has to be the same, however a run came to its end: weights, state, and all of the metrics
/// but the clock's.
pub fn result(output: &Path) -> (Vec<u8>, Vec<u8>, String) {
    let state = newest_checkpoint(output).join("training_state.safetensors");
    let mut told = String::new();
    for line in metrics(output) {
        let Metrics { step, epoch, loss, learning_rate, grad_norm, tokens, skipped, .. } = line;
        writeln!(told, "{step} {epoch} {loss} {learning_rate} {grad_norm} {tokens} {skipped}")
            .unwrap();
    }
    assert!(!told.is_empty());
    (fs::read(output.join("model.safetensors")).unwrap(), fs::read(state).unwrap(), told)
}

/// Not `assert_eq`: megabytes of bytes are no message.
pub fn assert_same(a: &Path, b: &Path, what: &str) {
    let (a, b) = (result(a), result(b));
    assert_eq!(a.2, b.2, "{what}: metrics");
    assert!(a.0 == b.0, "{what}: weights");
    assert!(a.1 == b.1, "{what}: training state");
}

pub fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_folder(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// The numbers of the checkpoints in a folder.
pub fn checkpoints(output: &Path) -> Vec<u64> {
    let names = fs::read_dir(output).unwrap().map(|entry| entry.unwrap().file_name());
    let number =
        |name: std::ffi::OsString| name.to_str()?.strip_prefix("checkpoint-")?.parse::<u64>().ok();
    let mut steps: Vec<u64> = names.filter_map(number).collect();
    steps.sort_unstable();
    steps
}

/// Epoch borders inside, lines of metrics that span a checkpoint; and everything else that a run
/// has to remember.
const KINDS: [&str; 4] = [
    "--batch_size 7 --max_steps 60 --save_steps 10 --logging_steps 3",
    "--batch_size 5 --gradient_accumulation_steps 3 --max_steps 50 --save_steps 7 \
     --logging_steps 2 --optimizer muon --windows addressed --max_position_embeddings 64 \
     --tie_word_embeddings --lr_scheduler_type wsd --precision bfloat16 --eval_epochs 1 \
     --load_best_model_at_end",
    "--batch_size 9 --epochs 3.5 --save_steps 8 --logging_steps 3 --windows stream --stride 20 \
     --eval_steps 11 --order sequential",
    "--batch_size 6 --max_steps 40 --save_steps 9 --logging_steps 3 --windows addressed --max_position_embeddings 64 \
     --eval_steps 12 --hard_example_mining",
];

#[test]
fn a_killed_run_resumes_to_the_bytes_of_an_unbroken_one_at_any_number_of_threads() {
    for flags in KINDS {
        let folder = tempfile::tempdir().unwrap();
        let (unbroken, broken) = (folder.path().join("unbroken"), folder.path().join("broken"));
        trained(&unbroken, &format!("{flags} --threads 1"));
        let last = metrics(&unbroken).pop().unwrap();
        assert!(last.epoch > 1.5, "{flags}: an epoch's border is part of the test, {last:?}");

        killed(&broken, &format!("{flags} --threads 2"), 8);
        // And once more: what was resumed can be killed.
        let mut child = under_way(&broken, &format!("{flags} --threads 2 --resume"), 11);
        child.kill().unwrap();
        child.wait().unwrap();
        let said = trained(&broken, &format!("{flags} --threads 2 --resume"));
        assert!(said.contains("resuming after step "), "{flags}: {said}");
        assert_same(&broken, &unbroken, flags);
        // A finished run stays as it is.
        let said = trained(&broken, &format!("{flags} --resume"));
        assert!(said.contains("nothing to do"), "{said}");
        assert_same(&broken, &unbroken, flags);
    }
}

/// A device draws windows by itself, several steps per launch; its checkpoints are written while it
/// trains on. With f16, the scale of the losses is part of the state.
#[test]
fn a_run_on_a_device_resumes_to_the_bytes_of_an_unbroken_one() {
    if let Err(why) = BUILD.cuda {
        eprintln!("SKIPPED: training in the simulator, because {why}");
        return;
    }
    for flags in [
        "--batch_size 40 --precision float16",
        "--batch_size 3 --gradient_accumulation_steps 2 --precision bfloat16 --optimizer muon",
    ] {
        let flags = format!(
            "{flags} --backend sim --threads 2 --max_steps 12 --save_steps 6 --logging_steps 4 \
             --num_hidden_layers 1"
        );
        let folder = tempfile::tempdir().unwrap();
        let (unbroken, broken) = (folder.path().join("unbroken"), folder.path().join("broken"));
        trained(&unbroken, &flags);
        assert_eq!(checkpoints(&unbroken), [6, 12], "{flags}");
        copy_folder(&unbroken.join("checkpoint-6"), &broken.join("checkpoint-6"));
        let said = trained(&broken, &format!("{flags} --resume"));
        assert!(said.contains("resuming after step 6 of 12"), "{said}");
        let (whole, resumed) = (result(&unbroken), result(&broken));
        assert!(whole.2.ends_with(&resumed.2), "{flags}:\n{}\n{}", whole.2, resumed.2);
        assert!(whole.0 == resumed.0, "{flags}: weights");
        assert!(whole.1 == resumed.1, "{flags}: training state");
    }
}

#[test]
fn ctrl_c_finishes_the_step_saves_and_exits_with_130() {
    let flags = "--batch_size 3 --gradient_accumulation_steps 2 --max_steps 90 --save_steps 1000 \
                 --logging_steps 2 --save_total_limit 1 --optimizer muon";
    let folder = tempfile::tempdir().unwrap();
    let (unbroken, broken) = (folder.path().join("unbroken"), folder.path().join("broken"));
    trained(&unbroken, flags);
    for lines in [9, 5, 2] {
        let child = under_way(&broken, flags, lines);
        let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
        let ended = child.wait_with_output().unwrap();
        if ended.status.success() || !sent.success() {
            // Done before the signal came: once more, sooner.
            fs::remove_dir_all(&broken).unwrap();
            continue;
        }
        let said = said(&ended);
        assert_eq!(ended.status.code(), Some(130), "{said}");
        assert!(said.contains("--resume goes on"), "{said}");
        let [step] = checkpoints(&broken)[..] else { panic!("one checkpoint: {said}") };
        assert!(step >= 2 * lines as u64 && said.contains(&format!("after step {step} of 90")));
        assert!(!broken.join("model.safetensors").exists(), "an unfinished model is no result");
        let checkpoint = load(&broken.join(format!("checkpoint-{step}"))).unwrap();
        assert!(checkpoint.warnings.is_empty());
        trained(&broken, &format!("{flags} --resume"));
        assert_same(&broken, &unbroken, "after Ctrl-C");
        return;
    }
    panic!("no run could be interrupted in time");
}

#[test]
fn a_run_that_diverges_for_a_while_is_resumed_too() {
    // Float32 overflows within a few steps at this rate; JSON has no infinity to say so.
    let flags = "--max_steps 12 --batch_size 2 --learning_rate 1e38 --warmup_steps 6 \
                 --save_steps 1 --save_total_limit 50 --logging_steps 5 --weight_decay 0";
    let folder = tempfile::tempdir().unwrap();
    let (unbroken, broken) = (folder.path().join("unbroken"), folder.path().join("broken"));
    let said = trained(&unbroken, flags);
    assert!(said.contains("gradients not finite, no update"), "{said}");
    let last = metrics(&unbroken).pop().unwrap();
    assert!(last.grad_norm.is_nan());
    let lines = said.matches("no update").count();
    assert!(lines > 1 && (lines as u64) < last.skipped, "lines get fewer: {said}");
    copy_folder(&unbroken, &broken);
    fs::remove_file(broken.join("model.safetensors")).unwrap();
    fs::remove_dir_all(broken.join("checkpoint-12")).unwrap();
    let said = trained(&broken, &format!("{flags} --resume"));
    assert!(said.contains("resuming after step 11 of 12"), "{said}");
    assert_same(&broken, &unbroken, "after a divergence");
}

#[test]
fn the_newest_checkpoints_stay_and_are_whole_models() {
    let folder = tempfile::tempdir().unwrap();
    let flags = "--max_steps 11 --save_steps 2 --save_total_limit 2 --batch_size 2";
    trained(folder.path(), flags);
    assert_eq!(checkpoints(folder.path()), [10, 11]);
    for step in [10, 11] {
        let folder = folder.path().join(format!("checkpoint-{step}"));
        assert!(load(&folder).unwrap().warnings.is_empty());
        Tokenizer::load(&folder).unwrap();
    }
}

/// A run of 20 steps as a crash after step 15 leaves it, with checkpoints at 5, 10 and 15.
fn crashed() -> &'static (TempDir, PathBuf, PathBuf) {
    static RUNS: OnceLock<(TempDir, PathBuf, PathBuf)> = OnceLock::new();
    RUNS.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let (unbroken, crashed) = (folder.path().join("unbroken"), folder.path().join("crashed"));
        trained(&unbroken, CRASHED);
        copy_folder(&unbroken, &crashed);
        fs::remove_dir_all(crashed.join("checkpoint-20")).unwrap();
        for entry in fs::read_dir(&crashed).unwrap().map(Result::unwrap) {
            if entry.file_type().unwrap().is_file() && entry.file_name() != "metrics.jsonl" {
                fs::remove_file(entry.path()).unwrap();
            }
        }
        (folder, unbroken, crashed)
    })
}

const CRASHED: &str = "--max_steps 20 --save_steps 5 --save_total_limit 9 --batch_size 3 \
                       --logging_steps 1";

fn truncate(file: &Path) {
    let bytes = fs::read(file).unwrap();
    fs::write(file, &bytes[..bytes.len() / 2]).unwrap();
}

/// What a crash can do to the newest checkpoint, the step the run then goes on from, and whether
/// that is worth a warning.
#[test]
fn a_damaged_checkpoint_is_passed_over_for_an_older_one() {
    type Damage = fn(&Path);
    let cases: [(&str, u64, bool, Damage); 8] = [
        ("nothing", 15, false, |_| ()),
        ("a cut state", 10, true, |newest| truncate(&newest.join("training_state.safetensors"))),
        ("an empty state", 10, true, |newest| {
            fs::write(newest.join("training_state.safetensors"), "").unwrap();
        }),
        ("no config", 10, true, |newest| fs::remove_file(newest.join("config.json")).unwrap()),
        // Weights are the state's, at full precision: the model's own are not read.
        ("a cut model", 15, false, |newest| truncate(&newest.join("model.safetensors"))),
        // A save that was cut off before it counted.
        ("a save under way", 10, false, |newest| {
            let staged = newest.join(".laam-staged");
            fs::create_dir(&staged).unwrap();
            for entry in fs::read_dir(newest).unwrap().map(Result::unwrap) {
                if entry.file_type().unwrap().is_file() {
                    fs::rename(entry.path(), staged.join(entry.file_name())).unwrap();
                }
            }
            truncate(&staged.join("training_state.safetensors"));
        }),
        // And one cut off after it counted, before its files had their places.
        ("a save to be completed", 15, false, |newest| {
            let commit = newest.join(".laam-commit");
            fs::create_dir(&commit).unwrap();
            for entry in fs::read_dir(newest).unwrap().map(Result::unwrap) {
                if entry.file_type().unwrap().is_file() {
                    fs::rename(entry.path(), commit.join(entry.file_name())).unwrap();
                }
            }
        }),
        ("a file of that name", 10, false, |newest| {
            fs::remove_dir_all(newest).unwrap();
            fs::write(newest, "").unwrap();
        }),
    ];
    let (_, unbroken, crashed) = crashed();
    for (what, step, warned, damage) in cases {
        let folder = tempfile::tempdir().unwrap();
        copy_folder(crashed, folder.path());
        damage(&folder.path().join("checkpoint-15"));
        let resumed = train(folder.path(), &format!("{CRASHED} --resume")).output().unwrap();
        let said = said(&resumed);
        if what == "a file of that name" {
            // It stands in the way of the save: an error that names it.
            assert_eq!(resumed.status.code(), Some(2), "{what}: {said}");
            assert!(said.contains("checkpoint-15"), "{what}: {said}");
            continue;
        }
        assert!(resumed.status.success(), "{what}: {said}");
        assert!(said.contains(&format!("resuming after step {step} of 20")), "{what}: {said}");
        assert_eq!(said.contains("checkpoint-15 is passed over"), warned, "{what}: {said}");
        assert_same(folder.path(), unbroken, what);
    }
}

#[test]
fn where_every_checkpoint_is_damaged_the_run_says_so_and_touches_nothing() {
    let (_, _, crashed) = crashed();
    let folder = tempfile::tempdir().unwrap();
    copy_folder(crashed, folder.path());
    for step in [5, 10, 15] {
        let checkpoint = folder.path().join(format!("checkpoint-{step}"));
        truncate(&checkpoint.join("training_state.safetensors"));
    }
    let before = metrics(folder.path()).len();
    let said = refused(folder.path(), &format!("{CRASHED} --resume"));
    assert!(said.contains("checkpoint-15"), "{said}");
    assert_eq!(metrics(folder.path()).len(), before);
    assert_eq!(checkpoints(folder.path()), [5, 10, 15]);
}

/// A checkpoint that could not be resumed from must not push out those that can.
#[test]
fn a_damaged_checkpoint_takes_no_good_ones_place() {
    let (_, _, crashed) = crashed();
    let folder = tempfile::tempdir().unwrap();
    copy_folder(crashed, folder.path());
    truncate(&folder.path().join("checkpoint-15/training_state.safetensors"));
    // Resumed after 10, saved at 11, and no room for two.
    let flags = CRASHED.replace("--save_steps 5", "--save_steps 11").replace("limit 9", "limit 1");
    trained(folder.path(), &format!("{flags} --resume"));
    assert_eq!(checkpoints(folder.path()), [20]);
    load(&folder.path().join("checkpoint-20")).unwrap();
}

/// `--reload` into a folder with a finished run: once it has saved, it is what `--resume` goes on
/// with, and the finished run's state is not.
#[test]
fn a_run_that_replaces_another_is_resumed_instead_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let [first, unbroken, broken] = ["first", "unbroken", "broken"].map(|n| folder.path().join(n));
    // It went further than the other will.
    trained(&first, "--max_steps 60 --save_steps 25 --batch_size 2");
    let flags = "--max_steps 40 --save_steps 5 --logging_steps 1 --batch_size 3 --seed 7";
    copy_folder(&first, &unbroken);
    trained(&unbroken, &format!("{flags} --reload"));
    assert_eq!(checkpoints(&unbroken), [30, 35, 40], "the first run's are gone");

    copy_folder(&first, &broken);
    let mut child = under_way(&broken, &format!("{flags} --reload"), 13);
    child.kill().unwrap();
    child.wait().unwrap();
    let said = trained(&broken, &format!("{flags} --resume"));
    assert!(!said.contains("no checkpoint"), "{said}");
    assert_same(&broken, &unbroken, "--reload, killed, resumed");
}

/// A run from another model's weights has that model's shape, also when it is resumed.
#[test]
fn init_from_takes_weights_and_shape_and_is_resumed_with_them() {
    let folder = tempfile::tempdir().unwrap();
    let [first, unbroken, broken] = ["first", "unbroken", "broken"].map(|n| folder.path().join(n));
    trained(&first, "--max_steps 3 --batch_size 2 --num_hidden_layers 1 --intermediate_size 40");
    let flags = "--max_steps 40 --save_steps 5 --logging_steps 1 --batch_size 3";
    let from = format!("{flags} --init_from {}", first.display());
    trained(&unbroken, &from);
    let config = load_config(&unbroken).unwrap().0;
    assert_eq!((config.num_hidden_layers, config.intermediate_size), (1, 40));
    // Weights only: the optimizer is a new one, at the first update's rate of 0.
    assert_eq!(metrics(&unbroken)[0].learning_rate, 0.0);
    killed(&broken, &from, 13);
    let shape = "--num_hidden_layers 1 --intermediate_size 40";
    trained(&broken, &format!("{flags} {shape} --resume"));
    assert_same(&broken, &unbroken, "--init_from, killed, resumed");
}

/// What the flags leave open is the model's: context, windows, tokenizer. Another shape is an error.
#[test]
fn init_from_takes_what_is_not_given_from_the_model() {
    let folder = tempfile::tempdir().unwrap();
    let [first, second, broken] = ["first", "second", "broken"].map(|n| folder.path().join(n));
    trained(&first, "--max_steps 1 --windows addressed --max_position_embeddings 64");
    let go_on = |output: &Path, flags: &str| {
        let flags = format!("--output_path {} --limit 2 {flags}", output.display());
        laam().arg("train").args(flags.split_whitespace()).output().unwrap()
    };
    let from = format!("--init_from {}", first.display());
    for (flag, named) in [
        ("--hidden_size 999", "--hidden-size is 999, but 16 in the model in"),
        ("--num_key_value_heads 4", "--num-key-value-heads is 4, but 2"),
        ("--tie_word_embeddings", "--tie-word-embeddings is true, but false"),
    ] {
        let failed = go_on(&second, &format!("{from} --max_steps 2 {flag}"));
        assert_eq!(failed.status.code(), Some(2));
        assert!(said(&failed).contains(named), "{}", said(&failed));
        assert!(!said(&failed).contains("tokenized") && !second.exists(), "nothing was begun");
    }
    let done = go_on(&second, &format!("{from} --max_steps 2 --hidden_size 16"));
    assert!(done.status.success(), "{}", said(&done));
    let config = load_config(&second).unwrap().0;
    let kind = config.window_kind.as_deref();
    assert_eq!(
        (config.max_position_embeddings, config.hidden_size, kind),
        (64, 16, Some("addressed"))
    );
    let tokenizer = |folder: &Path| fs::read(folder.join("tokenizer.json")).unwrap();
    assert_eq!(tokenizer(&second), tokenizer(&first));
    let steps = "--max_steps 60 --save_steps 5 --logging_steps 1 --save_total_limit 20";
    killed(&broken, &format!("{from} {steps}"), 8);
    let done = go_on(&broken, &format!("{steps} --warmup_steps 5 --learning_rate 1e-2 --resume"));
    assert!(done.status.success(), "{}", said(&done));
    let shorter = go_on(&second, &format!("{from} --reload"));
    assert_eq!(shorter.status.code(), Some(2), "two beginnings");
    let reload = format!(
        "--reload --max_steps 1 --max_position_embeddings 32 --tokenizer_path {}",
        first.display()
    );
    let done = go_on(&second, &reload);
    assert!(done.status.success(), "{}", said(&done));
    let config = load_config(&second).unwrap().0;
    assert_eq!(
        (config.max_position_embeddings, config.window_kind.as_deref()),
        (32, Some("addressed"))
    );
}

/// Behind a projection of zeros nothing gets a gradient, as behind one that a backward forgets.
#[test]
fn a_parameter_without_a_gradient_is_told_of() {
    let folder = tempfile::tempdir().unwrap();
    let [first, cut, second] = ["first", "cut", "second"].map(|n| folder.path().join(n));
    assert!(!trained(&first, "--max_steps 2").contains("no gradient"));
    let model = load(&first).unwrap();
    let mut weights = model.weights;
    weights[model.layout.blocks[1].down.range()].fill(0.0);
    let checkpoint = Checkpoint {
        config: &model.config,
        layout: &model.layout,
        weights: &weights,
        precision: Dtype::F32,
        tokenizer: Some(&Tokenizer::load(&first).unwrap()),
        provenance: &Provenance::default(),
        training_state: None,
    };
    save(&cut, &checkpoint).unwrap();
    let said = trained(&second, &format!("--max_steps 1 --init_from {}", cut.display()));
    for name in ["gate_proj", "up_proj"] {
        let line = format!("warning: model.layers.1.mlp.{name}.weight gets no gradient");
        assert!(said.contains(&line), "{said}");
    }
    assert_eq!(said.matches("no gradient").count(), 3, "and the norm before them: {said}");
}

#[test]
fn what_cannot_be_resumed_is_named() {
    let (_, _, crashed) = crashed();
    let folder = tempfile::tempdir().unwrap();
    copy_folder(crashed, folder.path());
    for (changed, named) in [
        ("--learning_rate 2e-2", "--learning-rate was 0.01, not 0.02"),
        ("--hidden_size 24", "--hidden-size was 16, not 24"),
        ("--num_hidden_layers 3", "--num-hidden-layers was 2, not 3"),
        ("--seed 1", "--seed was 42, not 1"),
        ("--optimizer muon", "--optimizer was \"adamw\", not \"muon\""),
        ("--windows stream", "--windows was \"original\", not \"stream\""),
        ("--tie_word_embeddings", "--tie-word-embeddings was false, not true"),
        ("--max_steps 14", "15 steps are done, more than the 14 that are asked for"),
        ("--limit 3", "different corpus or tokenizer"),
    ] {
        let flags = if changed.starts_with("--max_steps") {
            CRASHED.replace("--max_steps 20", changed)
        } else {
            format!("{CRASHED} {changed}")
        };
        let said = refused(folder.path(), &format!("{flags} --resume"));
        assert!(said.contains(named), "{changed}: {said}");
        assert_eq!(checkpoints(folder.path()), [5, 10, 15]);
        assert_eq!(metrics(folder.path()).len(), 20, "{changed}: the metrics are untouched");
    }
}

#[test]
fn settings_come_from_a_file_and_flags_win() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("settings.toml");
    let settings = |flags: &str| -> Settings {
        let mut command = laam();
        command.args(["train", "--print-config", "--config"]).arg(&file);
        let done = command.args(flags.split_whitespace()).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        let text = String::from_utf8(done.stdout).unwrap();
        fs::write(&file, &text).unwrap();
        let printed: Settings = toml::from_str(&text).unwrap();
        printed
    };
    fs::write(&file, "hidden_size = 80\ndecay_rate = 0.25\nrecompute = \"block\"\n").unwrap();
    let expected = Settings {
        hidden_size: 80,
        weight_decay: 0.25,
        recompute: Recompute::Block,
        max_steps: Some(7),
        ..Settings::default()
    };
    assert_eq!(settings("--max_steps 7"), expected);
    assert_eq!(settings(""), expected, "it reads what it prints");
    let changed = settings("--recompute none --decay_rate 0.5 --tie_word_embeddings");
    let wanted = Settings { recompute: Recompute::None, weight_decay: 0.5, ..expected };
    assert_eq!(changed, Settings { tie_word_embeddings: true, ..wanted });

    // Key/value heads fit the heads, whoever gave them.
    for (text, flags, heads) in [
        ("hidden_size = 80\n", "--num_attention_heads 5", 5),
        ("hidden_size = 80\nnum_attention_heads = 5\n", "", 5),
        ("num_attention_heads = 32\n", "", 4),
    ] {
        fs::write(&file, text).unwrap();
        assert_eq!(settings(flags).num_key_value_heads, heads, "{text}{flags}");
    }

    let output = folder.path().join("model");
    for (text, named) in [
        ("hidden = 80", "hidden"),
        ("hidden_size = \"wide\"", "--hidden-size"),
        ("batch_size = 0", "--batch-size"),
        ("hidden_size", "settings.toml"),
    ] {
        fs::write(&file, text).unwrap();
        let said = refused(&output, &format!("--config {}", file.display()));
        assert!(said.contains(named), "{text}: {said}");
    }
}

/// All flags of a run in a file: its text, its tokenizer and the text it is validated on too.
#[test]
fn a_printed_config_gives_the_same_run() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::write(at("own.c"), "int main(void)\n{\n\treturn 0;\n}\n".repeat(40)).unwrap();
    fs::write(at("other.c"), "while (next) next = next->next;\n".repeat(20)).unwrap();
    let flags = format!(
        "--source {} --validation {} --validation_steps 2 --max_steps 4 --seed 18446744073709551615 \
         --windows stream --tie_word_embeddings --decay_rate 0.5 --epochs 0.25 --metrics {}",
        at("own.c").display(),
        at("other.c").display(),
        at("told.jsonl").display()
    );
    trained(&at("model"), &flags);
    let told = fs::read_to_string(at("told.jsonl")).unwrap();
    let printed = train(&at("again"), &format!("{flags} --print-config")).output().unwrap();
    assert!(printed.status.success(), "{}", String::from_utf8_lossy(&printed.stderr));
    assert!(!at("again").exists());
    fs::write(at("flags.toml"), &printed.stdout).unwrap();
    let config = at("flags.toml");
    let run = |more: &[&str]| {
        laam().args(["train", "--config"]).arg(&config).args(more).output().unwrap()
    };
    fs::remove_file(at("told.jsonl")).unwrap();
    let done = run(&[]);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let weights = |name: &str| fs::read(at(name).join("model.safetensors")).unwrap();
    assert!(weights("model") == weights("again"));
    let again = fs::read_to_string(at("told.jsonl")).unwrap();
    let losses = |text: &str| -> Vec<Option<f64>> {
        let metrics = text.lines().map(|line| serde_json::from_str::<Metrics>(line).unwrap());
        metrics.map(|metrics| metrics.validation_loss).collect()
    };
    assert_eq!((losses(&told).len(), losses(&told)), (2, losses(&again)));
    // Flags win over the file, over its alternatives too.
    let printed =
        run(&["--overwrite", "--version", "v1.0/1.0", "--eval_epochs", "2", "--print-config"]);
    let printed: toml::Table = toml::from_str(&String::from_utf8(printed.stdout).unwrap()).unwrap();
    assert!(printed.get("source").is_none() && printed["version"].as_str() == Some("v1.0/1.0"));
    let refused = run(&["--overwrite", "--metrics", "-", "--json"]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("both --metrics - and --json"));
}

#[test]
fn beginning_with_the_wrong_things_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (out, nowhere) = (folder.path().join("out"), folder.path().join("nowhere"));
    let (nowhere_text, model) = (nowhere.display(), folder.path().join("model"));
    for flags in [
        "--reload --resume".to_string(),
        format!("--reload --init_from {nowhere_text}"),
        format!("--resume --init_from {nowhere_text}"),
        "--reload".to_string(),
        format!("--init_from {nowhere_text}"),
        format!("--tokenizer_path {nowhere_text}"),
        format!("--source {nowhere_text}"),
        "--backend cuda".to_string(),
        "--stop_at_verbatim 0.5".to_string(),
        "--batch_size 4 --hard_example_mining".to_string(),
        "--eval_steps 4 --hard_example_mining".to_string(),
        "--stride 3".to_string(),
        "--windows stream --stride 49".to_string(),
    ] {
        let said = refused(&out, &flags);
        assert!(!said.contains("panicked"), "{said}");
        assert!(!out.exists(), "{flags}: nothing was begun");
    }
    // A model of another vocabulary.
    trained(&model, "--max_steps 1");
    let other = folder.path().join("other");
    let corpus = Corpus::open(&Source::Sample, CorpusOptions::default()).unwrap();
    let documents: Vec<_> = corpus.documents().unwrap().map(Result::unwrap).collect();
    super::tokenizer::train(&documents, Style::Exact, 333).save(&other).unwrap();
    let flags = format!("--init_from {} --tokenizer_path {}", model.display(), other.display());
    let said = refused(&out, &flags);
    assert!(said.contains("the tokenizer has 333 tokens") && said.contains("400"), "{said}");
    // A model folder whose weights are cut.
    truncate(&model.join("model.safetensors"));
    let before = fs::read(model.join("model.safetensors")).unwrap();
    refused(&out, &format!("--init_from {}", model.display()));
    refused(&model, "--reload");
    assert_eq!(fs::read(model.join("model.safetensors")).unwrap(), before);
}

/// A model that holds some of the windows, and fewer of them once its weights are rounded to bfloat16. Computed in f32
/// on every processor: a measure in bfloat16 asks for more certain tokens.
const PARTIAL: &str = "--windows addressed --hidden_size 32 --intermediate_size 48 \
                       --num_key_value_heads 4 --optimizer muon --weight_decay 0 --batch_size 8 \
                       --cpu_kernels portable";

#[test]
fn the_verbatim_rate_is_that_of_the_saved_weights() {
    let folder = tempfile::tempdir().unwrap();
    let [full, rounded, again] = ["full", "rounded", "again"].map(|name| folder.path().join(name));
    let rate = |output: &Path| metrics(output).last().unwrap().verbatim_rate.unwrap();
    let flags = format!("{PARTIAL} --max_steps 400 --eval_steps 400");
    trained(&full, &flags);
    trained(&rounded, &format!("{flags} --precision bfloat16"));
    assert_ne!(rate(&rounded), rate(&full), "rounding has to change a window for this test");
    // A step that changes nothing measures the weights as they were saved.
    let no_step = "--max_steps 1 --eval_steps 1 --learning_rate 0 --muon_learning_rate 0";
    trained(&again, &format!("{PARTIAL} {no_step} --init_from {}", rounded.display()));
    assert_eq!(rate(&rounded), rate(&again));
}

#[test]
fn a_run_ends_with_the_weights_of_its_highest_verbatim_rate() {
    let folder = tempfile::tempdir().unwrap();
    let [start, output, none] = ["start", "output", "none"].map(|name| folder.path().join(name));
    trained(&start, &format!("{PARTIAL} --max_steps 400"));
    // Rates that rise lose windows from step to step.
    let harmful = format!(
        "{PARTIAL} --init_from {} --warmup_steps 100 --max_steps 60 \
         --muon_learning_rate 0.02",
        start.display()
    );
    let said = trained(&output, &format!("{harmful} --eval_epochs 1 --load_best_model_at_end"));
    let rates: Vec<_> =
        metrics(&output).iter().filter_map(|line| Some((line.step, line.verbatim_rate?))).collect();
    let best = rates.iter().copied().reduce(|a, b| if b.1 >= a.1 { b } else { a }).unwrap();
    assert!(rates.len() > 2 && best.0 < 60, "{rates:?}");
    assert!(said.contains(&format!("saving the weights of step {}", best.0)), "{said}");
    let weights = |folder: &Path| fs::read(folder.join("model.safetensors")).unwrap();
    let kept = output.join(format!("checkpoint-{}", best.0));
    assert!(weights(&output) == weights(&kept), "the final model is the best one");
    // Weights that hold enough from the start are saved as they are.
    let said = trained(&none, &format!("{harmful} --eval_steps 9 --stop_at_verbatim 0.5"));
    assert!(said.contains("no step needed"), "{said}");
    assert!(weights(&none) == weights(&start), "no step was taken");
}

#[test]
fn hard_examples_are_the_windows_that_a_measurement_missed() {
    let folder = tempfile::tempdir().unwrap();
    let [start, mined, plain] = ["start", "mined", "plain"].map(|name| folder.path().join(name));
    trained(&start, &format!("{PARTIAL} --max_steps 400"));
    let more = format!(
        "{PARTIAL} --init_from {} --warmup_steps 4 --max_steps 40 --eval_steps 20 --save_steps 20 \
         --learning_rate 1e-3 --muon_learning_rate 2e-3",
        start.display()
    );
    trained(&mined, &format!("{more} --hard_example_mining"));
    trained(&plain, &more);
    for (output, is_mined) in [(&mined, true), (&plain, false)] {
        let checkpoint = output.join("checkpoint-40");
        let layout = load(&checkpoint).unwrap().layout;
        let state = load_training_state(&checkpoint, &layout).unwrap().unwrap().state;
        let hard = state["hard_examples"].as_array().cloned().unwrap_or_default();
        let recall = fs::read_to_string(output.join("recall.jsonl")).unwrap();
        let lines: Vec<serde_json::Value> =
            recall.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let windows = lines[0]["windows"].as_u64().unwrap() as usize;
        let is_missed = |line: usize, window: usize| {
            let bytes = lines[line]["verbatim"].as_str().unwrap();
            let byte = u8::from_str_radix(&bytes[window / 8 * 2..][..2], 16).unwrap();
            byte >> (window % 8) & 1 == 0
        };
        let is_ever_missed = |&window: &usize| is_missed(1, window) || is_missed(2, window);
        let missed: Vec<usize> = (0..windows).filter(is_ever_missed).collect();
        let came_back = missed.iter().any(|&window| !is_missed(2, window));
        assert!(came_back, "a window has to come back for this test");
        if is_mined {
            assert!(missed.iter().all(|&window| hard.contains(&window.into())), "{hard:?}");
            assert!(hard.len() < windows, "some were never missing");
        } else {
            assert!(hard.is_empty());
        }
    }
    let weights = |output: &Path| fs::read(output.join("model.safetensors")).unwrap();
    assert!(weights(&mined) != weights(&plain), "other windows were drawn");
}

#[test]
fn a_run_that_recalls_nothing_ends_with_its_last_weights() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("output");
    let said = trained(
        &output,
        "--windows addressed --max_steps 6 --eval_steps 2 --save_steps 2 --load_best_model_at_end",
    );
    assert_eq!(
        metrics(&output).last().unwrap().verbatim_rate,
        Some(0.0),
        "nothing is learned in 6 steps"
    );
    assert!(!said.contains("saving the weights of step"), "{said}");
    let weights = |folder: &Path| fs::read(folder.join("model.safetensors")).unwrap();
    assert!(weights(&output) == weights(&output.join("checkpoint-6")));
    // Windows that are too short for the measure are no silent 0.
    let short = folder.path().join("short");
    let said = trained(
        &short,
        "--windows stream --max_position_embeddings 32 --max_steps 4 --eval_steps 2",
    );
    assert_eq!(said.matches("the verbatim rate is not measured").count(), 1, "{said}");
}

#[test]
fn the_metrics_of_another_run_are_not_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let [first, second, lines] = ["first", "second", "lines"].map(|name| folder.path().join(name));
    let flags = format!("--max_steps 2 --logging_steps 1 --metrics {}", lines.display());
    trained(&first, &flags);
    let before = fs::read(&lines).unwrap();
    let said = refused(&second, &flags);
    assert!(said.contains("has the metrics of another run") && !second.exists(), "{said}");
    assert_eq!(fs::read(&lines).unwrap(), before);
    trained(&second, &format!("{flags} --overwrite"));
}

#[test]
fn resume_without_a_checkpoint_begins_and_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let (fresh, resumed) = (folder.path().join("fresh"), folder.path().join("resumed"));
    trained(&fresh, "--max_steps 4");
    let said = trained(&resumed, "--max_steps 4 --resume");
    assert!(said.contains("warning: no checkpoint to resume in"), "{said}");
    assert_same(&fresh, &resumed, "--resume at the beginning");
}

#[test]
fn numbers_that_no_run_can_have_are_refused_by_their_flag() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let counts = [
        "batch_size",
        "gradient_accumulation_steps",
        "logging_steps",
        "save_steps",
        "save_total_limit",
        "max_steps",
        "eval_steps",
        "eval_epochs",
        "threads",
        "limit",
    ];
    let above_zero = ["epochs", "adam_epsilon"];
    let from_zero =
        ["muon_learning_rate", "weight_decay", "max_grad_norm", "adam_beta1", "muon_momentum"];
    let mut cases: Vec<(String, String)> = Vec::new();
    let mut case = |name: &str, value: &str| {
        cases.push((name.to_string(), format!("--{name}={value}")));
    };
    for name in counts {
        for value in ["0", "-1", "1.5", "x", ""] {
            case(name, value);
        }
    }
    for name in above_zero {
        case(name, "0");
    }
    for name in from_zero.into_iter().chain(above_zero) {
        for value in ["-0.5", "nan", "inf", "x"] {
            case(name, value);
        }
    }
    for (name, value) in [
        // 0 in float32, where the update is computed.
        ("adam_epsilon", "1e-50"),
        ("adam_beta2", "1"),
        ("adam_beta1", "1"),
        ("muon_momentum", "1"),
        ("wsd_decay", "1.5"),
        ("initializer_range", "-0.1"),
        ("rope_theta", "0"),
        ("head_dim", "3"),
        ("head_dim", "0"),
        ("precision", "float8"),
        ("windows", "tiny"),
        ("lr_scheduler_type", "exp"),
        ("optimizer", "sgd"),
        ("seed", "-1"),
    ] {
        case(name, value);
    }
    for (name, flags) in cases {
        let said = refused(&out, &flags);
        let words = [name.replace('_', "-"), name];
        assert!(words.iter().any(|word| said.contains(word.as_str())), "{flags}: {said}");
        assert!(!out.exists(), "{flags}: nothing was begun");
    }
}

#[test]
fn odd_amounts_train() {
    let folder = tempfile::tempdir().unwrap();
    let run = |name: &str, flags: &str| {
        let output = folder.path().join(name);
        trained(&output, flags);
        metrics(&output)
    };
    let whole = run("whole", "--epochs 1 --batch_size 4 --logging_steps 1000");
    let [line] = whole.as_slice() else { panic!("one line, at the end") };
    assert_eq!(line.epoch, 1.0);
    let half = run("half", "--epochs 0.5 --batch_size 4").pop().unwrap();
    assert_eq!(half.step, line.step.div_ceil(2));
    let one = run("one", "--max_steps 1");
    assert_eq!((one.len(), one[0].step, one[0].learning_rate), (1, 1, 0.0));
    // One step is an epoch: all windows, and no more.
    let all = run("all", "--epochs 2 --batch_size 100000 --gradient_accumulation_steps 5");
    let (tokens, last) = (line.tokens, all.last().unwrap());
    assert_eq!((last.step, last.epoch, last.tokens), (2, 2.0, 2 * tokens));
    // Warm-up longer than the run, no clipping, no decay.
    run("short", "--max_steps 3 --max_grad_norm 0 --weight_decay 0 --logging_steps 1");
}

#[test]
fn what_no_machine_has_memory_for_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    for flags in [
        "--max_position_embeddings 2000000000",
        "--intermediate_size 2000000000 --num_hidden_layers 1",
        "--num_attention_heads 200000000 --head_dim 2 --num_key_value_heads 200000000",
    ] {
        let said = refused(&folder.path().join("out"), flags);
        assert!(said.contains("GB of memory, this process may use"), "{flags}: {said}");
        assert!(!folder.path().join("out").exists());
    }
}

/// A window longer than any document is one padded window a document, or the whole stream.
#[test]
fn a_context_longer_than_the_text_trains() {
    let folder = tempfile::tempdir().unwrap();
    for kind in ["original", "stream", "addressed"] {
        let output = folder.path().join(kind);
        let flags = format!("--windows {kind} --max_position_embeddings 5000 --epochs 2");
        trained(&output, &format!("{flags} --logging_steps 1"));
        let lines = metrics(&output);
        let windows = if kind == "stream" { 1 } else { 2 };
        assert_eq!(lines.len(), 2 * windows, "{kind}");
        assert!(lines.iter().all(|line| line.loss.is_finite() && line.loss > 1.0), "{kind}");
        assert_eq!(lines[0].tokens, 5000, "{kind}");
    }
}

/// Every line of metrics says what the engine did, step by step.
#[test]
fn metrics_tell_what_the_engine_did() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("model");
    let flags = "--batch_size 4 --gradient_accumulation_steps 2 --epochs 1.5 --logging_steps 3 \
                 --lr_scheduler_type cosine --threads 1 --seed 9";
    let said = trained(&output, flags);
    let lines = metrics(&output);

    let tokenizer = Arc::new(Tokenizer::load(tokenizer()).unwrap());
    let file = Arc::new(TokenFile::open(&token_file(&said)).unwrap());
    let windows = Windows::new(file, tokenizer, WindowKind::Original, 48, None).unwrap();
    let config = load_config(&output).unwrap().0;
    let settings = Settings {
        learning_rate: 1e-2,
        warmup_steps: 5,
        lr_scheduler_type: laam::train::LrDecay::Cosine,
        ..Settings::default()
    };
    let an_epoch = windows.len().div_ceil(4).div_ceil(2) as u64;
    let total = (1.5 * an_epoch as f64).ceil() as u64;
    let schedule = settings.schedule(total);
    let backend = Cpu::f32(1);
    let mut engine = Engine::new(&backend, &config, &settings.optimizer(), 4, 48).unwrap();
    let layout = Layout::new(&config);
    engine.write(Arena::Parameters, &initialize(&config, &layout, 9)).unwrap();
    let mut sampler = Sampler::new(windows.len(), Order::Shuffled, 9).unwrap();
    let (mut expected, mut losses, mut tokens) = (Vec::new(), Vec::new(), 0);
    for step in 1..=total {
        let learning_rate = 1e-2 * schedule.factor(step - 1);
        let epoch = sampler.position().epoch;
        let mut batches = vec![windows.draw(&sampler.next(4)).unwrap()];
        if sampler.position().epoch == epoch {
            batches.push(windows.draw(&sampler.next(4)).unwrap());
        }
        tokens += batches.iter().map(|batch| 48 * batch.windows as u64).sum::<u64>();
        let hyperparams = StepHyperparams { learning_rate, muon_learning_rate: 0.0, step };
        let outcome = engine.step(&batches, hyperparams).unwrap();
        losses.push(outcome.loss);
        if step % 3 == 0 || step == total {
            let loss = losses.iter().sum::<f64>() / losses.len() as f64;
            losses.clear();
            let epochs = (step / an_epoch) as f64;
            let within = sampler.position().cursor as f64 / windows.len() as f64;
            expected.push((step, epochs + within, loss, learning_rate, outcome.grad_norm, tokens));
        }
    }
    let told: Vec<_> = lines
        .iter()
        .map(|m| (m.step, m.epoch, m.loss, m.learning_rate, m.grad_norm, m.tokens))
        .collect();
    assert_eq!(told, expected);
    assert!(engine.read(Arena::Parameters).unwrap() == load(&output).unwrap().weights);
    for pair in lines.windows(2) {
        assert!(pair[0].seconds <= pair[1].seconds && pair[1].tokens_per_second > 0.0);
    }
    // The fields by the names that others read them by.
    let text = fs::read_to_string(output.join("metrics.jsonl")).unwrap();
    let line: serde_json::Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    let names: Vec<_> = line.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(
        names,
        [
            "schema_version",
            "step",
            "epoch",
            "loss",
            "learning_rate",
            "grad_norm",
            "tokens",
            "tokens_per_second",
            "seconds",
            "memory_bytes"
        ]
    );
}

#[test]
fn saved_folder_suits_transformers_or_warns() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("model");
    let said = trained(&output, "--max_steps 1");
    assert!(!said.contains("transformers"), "{said}");
    let read = |name: &str| -> serde_json::Value {
        serde_json::from_str(&fs::read_to_string(output.join(name)).unwrap()).unwrap()
    };
    let config = read("tokenizer_config.json");
    assert_eq!(config["model_input_names"], serde_json::json!(["input_ids", "attention_mask"]));
    assert_eq!(config["model_max_length"], 48);
    assert_eq!(config["pad_token"], "<|pad|>");

    let odd = "--max_steps 1 --hidden_size 18 --head_dim 4";
    let said = trained(&folder.path().join("odd"), odd);
    assert!(said.contains("warning: hidden_size 18 is not a multiple of num_attention_heads 4"));
}

/// CRC-32C bit by bit, as RFC 3720 defines it: the code under test takes it from a crate.
fn crc32c(data: &[u8]) -> u32 {
    !data.iter().fold(!0u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ (0x82F6_3B78 * (crc & 1)))
    })
}

/// Takes `N` bytes off the front.
fn take<const N: usize>(data: &mut &[u8]) -> [u8; N] {
    let (front, rest) = data.split_first_chunk().expect("no record is cut short");
    *data = rest;
    *front
}

fn varint(data: &mut &[u8]) -> u64 {
    let (mut value, mut shift) = (0, 0);
    loop {
        let [byte] = take(data);
        value |= u64::from(byte & 0x7f) << shift;
        shift += 7;
        if byte < 0x80 {
            return value;
        }
    }
}

/// The fields of a protocol buffer's message: numbers as their bits.
enum Field<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

fn fields(mut message: &[u8]) -> Vec<(u64, Field<'_>)> {
    let mut fields = Vec::new();
    while !message.is_empty() {
        let key = varint(&mut message);
        let field = match key & 7 {
            0 => Field::Number(varint(&mut message)),
            1 => Field::Number(u64::from_le_bytes(take(&mut message))),
            5 => Field::Number(u64::from(u32::from_le_bytes(take(&mut message)))),
            2 => {
                let length = varint(&mut message) as usize;
                let (bytes, rest) = message.split_at(length);
                message = rest;
                Field::Bytes(bytes)
            }
            wire => panic!("no wire type {wire}"),
        };
        fields.push((key >> 3, field));
    }
    fields
}

/// The scalars of event files in a folder as TensorBoard has them: a start forgets its step and later
/// ones.
fn shown_scalars(board: &Path) -> Vec<(u64, String, f32)> {
    let mut files: Vec<_> = fs::read_dir(board).unwrap().map(|file| file.unwrap().path()).collect();
    files.sort();
    let mut shown: Vec<(u64, String, f32)> = Vec::new();
    for file in files {
        let (start, scalars) = scalars(&fs::read(file).unwrap());
        shown.retain(|(step, ..)| *step < start);
        shown.extend(scalars);
    }
    shown
}

/// The start of an event file and its scalars, (step, tag, value) in order, its checksums checked.
fn scalars(mut data: &[u8]) -> (u64, Vec<(u64, String, f32)>) {
    let mask = |crc: u32| crc.rotate_right(15).wrapping_add(0xa282_ead8);
    let mut scalars = Vec::new();
    let mut start = None;
    let mut first = true;
    while !data.is_empty() {
        let length: [u8; 8] = take(&mut data);
        assert_eq!(u32::from_le_bytes(take(&mut data)), mask(crc32c(&length)));
        let (event, rest) = data.split_at(u64::from_le_bytes(length) as usize);
        data = rest;
        assert_eq!(u32::from_le_bytes(take(&mut data)), mask(crc32c(event)));
        let mut step = 0;
        for (number, field) in fields(event) {
            match (number, field) {
                (1, Field::Number(time)) => assert!(f64::from_bits(time) > 1.7e9, "a wall time"),
                (2, Field::Number(number)) => step = number,
                (7, Field::Bytes(session)) => {
                    assert!(session == [8, 1] && start.is_none(), "one start");
                    start = Some(step);
                }
                (3, Field::Bytes(version)) => {
                    assert!(first && version == b"brain.Event:2");
                    first = false;
                }
                (5, Field::Bytes(summary)) => {
                    for (_, value) in fields(summary) {
                        let Field::Bytes(value) = value else { panic!("a value is a message") };
                        let (mut tag, mut number) = (String::new(), f32::NAN);
                        for (at, field) in fields(value) {
                            match (at, field) {
                                (1, Field::Bytes(text)) => {
                                    tag = String::from_utf8(text.to_vec()).unwrap();
                                }
                                (2, Field::Number(bits)) => number = f32::from_bits(bits as u32),
                                _ => panic!("no field {at} in a value"),
                            }
                        }
                        scalars.push((step, tag, number));
                    }
                }
                (number, _) => panic!("no field {number} in an event"),
            }
        }
    }
    assert!(!first, "a file begins with its version");
    (start.expect("and a start"), scalars)
}

#[test]
fn tensorboard_gets_the_same_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let (output, board) = (folder.path().join("model"), folder.path().join("board"));
    let flags = "--max_steps 300 --batch_size 2 --logging_steps 100 --eval_steps 150 \
                 --windows addressed";
    trained(&output, &format!("{flags} --tensorboard {}", board.display()));
    let files: Vec<_> = fs::read_dir(&board).unwrap().map(|file| file.unwrap().path()).collect();
    let [file] = files.as_slice() else { panic!("one file") };
    assert!(file.file_name().unwrap().to_str().unwrap().starts_with("events.out.tfevents."));
    let mut expected = Vec::new();
    for line in metrics(&output) {
        for (tag, value) in [
            ("train/loss", line.loss),
            ("train/learning_rate", line.learning_rate),
            ("train/grad_norm", line.grad_norm),
            ("train/epoch", line.epoch),
            ("train/tokens_per_second", line.tokens_per_second),
        ] {
            expected.push((line.step, tag.to_string(), value as f32));
        }
        if let Some(rate) = line.verbatim_rate {
            expected.push((line.step, "eval/verbatim_rate".to_string(), rate as f32));
        }
        let bytes = line.memory_bytes.unwrap() as f32;
        assert!(bytes > 1e6 && bytes < 1e10, "{bytes}");
        expected.push((line.step, "system/memory_bytes".to_string(), bytes));
    }
    // Steps of one and of two bytes, and one with a verbatim rate.
    let count = |wanted: &str| expected.iter().filter(|(_, tag, _)| tag == wanted).count();
    assert_eq!((count("train/loss"), count("eval/verbatim_rate")), (4, 2));
    assert_eq!(scalars(&fs::read(file).unwrap()), (0, expected));
}

#[test]
fn tensorboard_shows_no_step_twice_after_a_crash() {
    let folder = tempfile::tempdir().unwrap();
    let (output, board) = (folder.path().join("model"), folder.path().join("board"));
    let flags = format!(
        "--max_steps 400 --save_steps 5 --logging_steps 1 --tensorboard {}",
        board.display()
    );
    killed(&output, &flags, 13);
    // Files are read in the order of their names, which begin with the second.
    std::thread::sleep(Duration::from_secs(1));
    trained(&output, &format!("{flags} --resume"));
    let losses = |board: &Path| -> Vec<(u64, f32)> {
        let shown = shown_scalars(board).into_iter();
        shown
            .filter(|(_, tag, _)| tag == "train/loss")
            .map(|(step, _, loss)| (step, loss))
            .collect()
    };
    let told = || -> Vec<(u64, f32)> {
        metrics(&output).iter().map(|line| (line.step, line.loss as f32)).collect()
    };
    assert_eq!(told().len(), 400);
    assert_eq!(losses(&board), told());
    // Another run in the same folder is not mixed with it.
    std::thread::sleep(Duration::from_secs(1));
    trained(
        &output,
        &format!("--max_steps 3 --logging_steps 1 --overwrite --tensorboard {}", board.display()),
    );
    assert_eq!(losses(&board), told());
}
