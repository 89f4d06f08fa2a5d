//! The validation loss, samples, runs that end by the clock, runs made longer, and who follows the metrics.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use laam::corpus::Document;
use laam::model::load_provenance;
use laam::tokenizer::Style;
use laam::tokens::{WindowKind, Windows};
use proptest::prelude::*;
use serde_json::Value;

use crate::support::laam;
use crate::tokens::{tokenizer, write};
use crate::training::{metrics, train, trained};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn held_out_windows_share_no_document_and_no_token(
        lengths in proptest::collection::vec(0usize..60, 1..6),
        fraction in 0.01f64..0.7, stride in 1usize..12, kind in 0..3
    ) {
        let kind = [WindowKind::Original, WindowKind::Stream, WindowKind::Addressed][kind as usize];
        let text = |n: &usize| Document::new(format!("{n}.c"), "x = 1; ".repeat(*n));
        let documents: Vec<_> = lengths.iter().map(text).collect();
        let folder = tempfile::tempdir().unwrap();
        let tokenizer = tokenizer(Style::Exact);
        let file = write(&folder.path().join("tokens"), &tokenizer, &documents);
        let stride = (kind == WindowKind::Stream).then_some(stride);
        let mut windows = Windows::new(file, tokenizer, kind, 12, stride).unwrap();
        let all = windows.len();
        let Ok((held, numbers)) = windows.hold_out(fraction) else { return Ok(()) };
        prop_assert_eq!(held.len(), all);
        prop_assert!(!numbers.is_empty() && numbers.iter().all(|&number| number >= windows.len()));
        prop_assert_eq!(*numbers.last().unwrap(), all - 1);
        let first = held.span(numbers[0]).unwrap();
        let last = windows.span(windows.len() - 1).unwrap();
        prop_assert!(last.tokens.end <= first.tokens.start);
        if kind != WindowKind::Stream && lengths.len() > 1 {
            prop_assert!(last.document < first.document);
            prop_assert_eq!(windows.documents().unwrap(), first.document);
        }
    }
}

/// Documents are held out whole, so the fraction can only be met about.
#[test]
fn the_boundary_nearest_to_a_fraction_is_held_out() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer(Style::Exact);
    let text = |n: usize| Document::new(format!("{n}.c"), "x = 1; ".repeat(n));
    let file = write(&folder.path().join("tokens"), &tokenizer, &[20, 300, 40].map(text));
    let mut windows = Windows::new(file, tokenizer, WindowKind::Original, 12, None).unwrap();
    let all = windows.len();
    // The last document is a ninth, and the two last are nearly all.
    let (_, numbers) = windows.hold_out(0.2).unwrap();
    assert!(numbers.len() < all / 5 && windows.len() > all / 2, "{} of {all}", numbers.len());
}

fn json(arguments: &[&str]) -> Value {
    let output = laam().args(arguments).arg("--json").output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {said}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn weights(folder: &Path) -> Vec<u8> {
    fs::read(folder.join("model.safetensors")).unwrap()
}

/// Of a text of its own: the loss that `evaluate` finds, and the checkpoint of the lowest one.
#[test]
fn the_validation_loss_is_that_of_evaluate_and_its_best_checkpoint_stays() {
    let folder = tempfile::tempdir().unwrap();
    let (model, other) = (folder.path().join("model"), folder.path().join("other.c"));
    // What overfits: a few lines, and a text that has nothing of them.
    let own = folder.path().join("own.c");
    fs::write(&own, "int main(void)\n{\n\treturn 0;\n}\n".repeat(3)).unwrap();
    fs::write(&other, "struct list *next; while (next) next = next->next;\n".repeat(9)).unwrap();
    let flags = format!(
        "--source {} --validation {} --validation_steps 10 --max_steps 60 --save_total_limit 1 \
         --logging_steps 15 --load_best_model_at_end --sample_steps 40",
        own.display(),
        other.display()
    );
    let said = trained(&model, &flags);
    let lines = metrics(&model);
    let losses: Vec<_> =
        lines.iter().filter_map(|line| Some((line.step, line.validation_loss?))).collect();
    assert_eq!(losses.iter().map(|loss| loss.0).collect::<Vec<_>>(), [10, 20, 30, 40, 50, 60]);
    let best = losses.iter().copied().reduce(|a, b| if b.1 < a.1 { b } else { a }).unwrap();
    assert!(best.0 < 60, "{losses:?}");
    assert!(said.contains(&format!("saving the weights of step {}", best.0)), "{said}");
    let kept = model.join(format!("checkpoint-{}", best.0));
    assert!(weights(&model) == weights(&kept), "the final model is the best one");
    for folder in [&model, &kept] {
        let other = other.to_str().unwrap();
        let loss = &json(&["evaluate", folder.to_str().unwrap(), "--source", other])["loss"];
        assert!((loss.as_f64().unwrap() - best.1).abs() < 1e-6, "{loss}, not {best:?}");
    }
    let samples: Vec<_> =
        lines.iter().filter_map(|line| Some((line.step, line.sample.as_ref()?))).collect();
    assert_eq!(samples.iter().map(|sample| sample.0).collect::<Vec<_>>(), [40, 60]);
    assert!(said.contains("sample after step 40: ") && !samples[0].1.is_empty(), "{said}");
    // Provenance does not name the text, nor where it was.
    let recipe = load_provenance(&model).unwrap().unwrap().recipe;
    assert!(!recipe.to_string().contains("other.c"), "{recipe}");
}

#[test]
fn a_fraction_is_held_out_by_documents_and_belongs_to_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    let flags = "--limit 4 --validation 0.2 --save_steps 2";
    let said = trained(&model, &format!("{flags} --max_steps 2"));
    assert!(said.contains("the validation loss is measured on"), "{said}");
    let paths = load_provenance(&model).unwrap().unwrap().paths();
    assert!(paths.len() < 4 && !paths.is_empty(), "{paths:?}");
    assert!(metrics(&model)[0].validation_loss.is_some());
    let refused = |flags: &str| {
        let output = train(&model, flags).output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        String::from_utf8(output.stderr).unwrap()
    };
    let said = refused("--limit 4 --max_steps 4 --resume");
    assert!(said.contains("--validation was 0.2, not null"), "{said}");
    for (flags, expected) in [
        ("--validation 1.5", "invalid --validation 1.5: must be more than 0 and less than 1"),
        ("--validation nowhere.txt", "invalid --validation \"nowhere.txt\": no such file"),
        ("--validation_steps 5", "--validation-steps without --validation"),
        ("--limit 1 --validation 0.99999", "leaves none to train on"),
        ("--max_seconds 0", "invalid --max-seconds 0: must be more than 0"),
    ] {
        let said = refused(&format!("{flags} --overwrite"));
        assert!(said.contains(expected), "{flags}: {said}");
    }
}

#[test]
fn a_run_ends_by_the_clock_and_is_made_longer() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    let flags = "--max_steps 1000000 --lr_scheduler_type constant";
    let said = trained(&model, &format!("{flags} --max_seconds 0.2"));
    assert!(said.contains("max_seconds are over, after step"), "{said}");
    let steps = metrics(&model).last().unwrap().step;
    assert!(steps > 0 && steps < 1_000_000 && model.join("model.safetensors").exists());
    // The seconds of both sessions count.
    let said = trained(&model, &format!("{flags} --max_seconds 0.2 --resume"));
    assert!(said.contains(&format!("max_seconds are over, after step {steps} of")), "{said}");
    assert!(said.contains(&format!("no time left: after step {steps} of 1000000")), "{said}");
    trained(&model, &format!("{flags} --max_seconds 0.5 --resume"));
    assert!(metrics(&model).last().unwrap().step > steps);
}

/// What lengthening means for each schedule.
#[test]
fn a_longer_run_equals_one_that_began_so_if_its_rates_were_the_same() {
    let folder = tempfile::tempdir().unwrap();
    for (schedule, same) in
        [("constant", true), ("wsd --wsd_decay 0.25", true), ("linear", false), ("cosine", false)]
    {
        let name = |what: &str| folder.path().join(format!("{}-{what}", &schedule[..3]));
        let flags = format!("--warmup_steps 1 --lr_scheduler_type {schedule}");
        trained(&name("whole"), &format!("{flags} --max_steps 8"));
        let longer = name("longer");
        // Interrupted in the plateau of 4 steps, whose last one is the decay.
        trained(&longer, &format!("{flags} --max_steps 4 --save_steps 3"));
        if schedule.starts_with("wsd") {
            fs::remove_dir_all(longer.join("checkpoint-4")).unwrap();
        }
        trained(&longer, &format!("{flags} --max_steps 8 --save_steps 3 --resume"));
        assert_eq!(weights(&name("whole")) == weights(&longer), same, "{schedule}");
        let rates = |folder: &Path| metrics(folder).last().unwrap().learning_rate;
        assert_eq!(rates(&name("whole")), rates(&longer), "{schedule}");
    }
}

/// A stand-in for the wandb package, which writes down what it is given.
const WANDB: &str = r#"
import json, os
class Run:
    def __enter__(self): return self
    def __exit__(self, *_): pass
    def log(self, values, step):
        with open(os.environ["LOGGED"], "a") as file:
            print(json.dumps([step, values]), file=file)
def init(**arguments):
    with open(os.environ["LOGGED"], "a") as file:
        print(json.dumps(arguments), file=file)
    return Run()
"#;

#[test]
fn metrics_on_stdout_are_followed_into_wandb() {
    let track = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/track");
    if !Command::new("python3").arg("--version").output().is_ok_and(|out| out.status.success()) {
        eprintln!("SKIPPED: no python3: scripts/track was not run.");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (model, logged) = (folder.path().join("model"), folder.path().join("logged"));
    fs::write(folder.path().join("wandb.py"), WANDB).unwrap();
    let follow = |output: &str| {
        let mut command = Command::new("python3");
        command.arg(&track).args([output, "--project", "p", "--offline"]);
        command.env("PYTHONPATH", folder.path()).env("LOGGED", &logged).current_dir(&folder);
        command
    };
    let logs = || -> Vec<Value> {
        let text = fs::read_to_string(&logged).unwrap();
        fs::remove_file(&logged).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let mut run = train(&model, "--max_steps 6 --logging_steps 2 --metrics -");
    let mut run = run.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let followed = follow("-").stdin(run.stdout.take().unwrap()).status().unwrap();
    assert!(followed.success() && run.wait().unwrap().success());
    let piped = logs();
    assert_eq!((&piped[0]["project"], &piped[0]["mode"]), (&"p".into(), &"offline".into()));
    let steps: Vec<_> = piped[1..].iter().map(|line| line[0].as_u64().unwrap()).collect();
    assert_eq!(steps, [2, 4, 6]);
    assert!(piped[1][1]["loss"].as_f64().unwrap() > 1.0 && piped[1][1]["step"].is_null());
    assert!(!model.join("metrics.jsonl").exists());

    // A folder, from before the run begins until it ends.
    fs::remove_dir_all(&model).unwrap();
    let run = train(&model, "--max_steps 40 --logging_steps 2").stderr(Stdio::null()).spawn();
    crate::training::wait_for_metrics(&model, 1);
    assert!(follow(model.to_str().unwrap()).status().unwrap().success());
    assert!(run.unwrap().wait().unwrap().success());
    let steps: Vec<_> = logs()[1..].iter().map(|line| line[0].as_u64().unwrap()).collect();
    assert_eq!(steps, (1..=20).map(|n| 2 * n).collect::<Vec<_>>());
    assert_eq!(metrics(&model).len(), 20);

    let peers = std::env::var_os("VIRTUAL_ENV").map(|venv| Path::new(&venv).join("bin/python"));
    let peers = peers.filter(|python| {
        let found = Command::new(python).args(["-c", "import wandb"]).output();
        found.is_ok_and(|out| out.status.success())
    });
    let Some(python) = peers else {
        eprintln!(
            "SKIPPED: scripts/track against the wandb package: scripts/setup-peers installs it"
        );
        return;
    };
    let mut command = Command::new(python);
    command.arg(&track).arg(&model).arg("--offline").current_dir(&folder);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(folder.path().join("wandb").is_dir(), "an offline run");
}
