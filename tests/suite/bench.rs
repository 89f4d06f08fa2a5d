//! `laam bench` and what is chosen by a machine's memory, on the simulator and the CPU.

use std::process::Output;
use std::time::Duration;

use serde_json::Value;

use crate::support::{bounded, error_in, laam};

fn run(line: &str) -> Output {
    let mut command = laam();
    bounded(command.args(line.split_whitespace()), Duration::from_mins(1), 16 << 30)
}

fn json(line: &str) -> Value {
    let output = run(&format!("{line} --json"));
    assert!(output.status.success(), "{line}: {output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn smoke_passes_in_the_simulator_with_expected_and_seen() {
    if let Err(why) = laam::kernels::BUILD.cuda {
        return eprintln!("SKIPPED: smoke test in the simulator, because {why}");
    }
    let smoke = json("bench smoke --backend sim");
    let steps = smoke["steps"].as_array().unwrap();
    for step in steps {
        assert_eq!(step["passed"], true, "{step}");
    }
    let probes: Vec<_> = steps.iter().filter(|step| step["expected"].is_string()).collect();
    assert_eq!((steps.len(), probes.len()), (16, 8));
}

#[test]
fn batch_size_auto_is_the_largest_that_fits() {
    let plan = |batch: &str, more: &str| {
        let plan = json(&format!("plan --preset 124m --backend sim --batch_size {batch} {more}"));
        let number = |name: &str| plan[name].as_u64().unwrap();
        (number("batch_size"), number("bytes_peak"))
    };
    for giga in [4, 16, 24] {
        let memory = giga * 1_000_000_000;
        let (batch, peak) = plan("auto", &format!("--memory {giga}"));
        let (_, twice) = plan(&(2 * batch).to_string(), "");
        assert!(peak <= memory && memory < twice, "{giga} GB: {batch}");
        let (part, peak) =
            plan("auto", &format!("--memory {giga} --gradient_accumulation_steps 60"));
        let larger = (part + 1..=60).find(|n| 60 % n == 0);
        assert!(peak <= memory && 60 % part == 0, "{giga} GB: {part}");
        assert!(larger.is_none_or(|larger| plan(&larger.to_string(), "").1 > memory));
    }
    let said = error_in(&run("plan --preset 1.5b --backend sim --batch_size auto --memory 16"));
    assert!(said.contains("with one window at a time, there are 16.0"), "{said}");
    assert!(error_in(&run("plan --batch_size 0")).contains("must be at least 1, or auto"));
    let said = error_in(&run("train --batch_size auto --print-config"));
    assert!(said.contains("depends on the machine"), "{said}");
}

/// The presets that docs/recipes.md names for GPUs of these sizes.
#[test]
fn preset_auto_follows_the_memory() {
    let text = include_str!("../../docs/recipes.md");
    for giga in [16, 24, 48, 80] {
        let plan = json(&format!(
            "plan --preset auto --memory {giga} --batch_size auto --backend sim --precision bf16"
        ));
        let parameters = plan["parameters"].as_u64().unwrap();
        let name = laam::model::preset_names()
            .find(|name| {
                let config = laam::model::preset(name).unwrap();
                config.parameter_count() == u128::from(parameters)
            })
            .unwrap();
        let row = format!("| {giga} GB | `{name}` | {} |", plan["batch_size"]);
        assert!(text.contains(&row), "docs/recipes.md has no row {row}");
    }
    let said = error_in(&run("plan --preset auto --memory 0.01 --backend sim"));
    assert!(said.contains("no preset trains within"), "{said}");
}

#[test]
fn steps_are_timed_on_the_windows_of_a_token_file() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    std::fs::write(at("text.c"), "int main(void) { return 0; }\n".repeat(100)).unwrap();
    let (text, tokenizer, tokens) = (at("text.c"), at("tokenizer"), at("tokens"));
    for line in [
        format!("train-tokenizer --source {text} --vocab_size 300 --output_path {tokenizer}"),
        format!("tokenize --source {text} --tokenizer_path {tokenizer} --output {tokens}"),
    ] {
        assert!(run(&line).status.success(), "{line}");
    }
    let step = "bench step --batch 2 --context 16 --warmup 0 --steps 16 --backend cpu";
    let drawn = format!("{step} --tokens {tokens} --tokenizer_path {tokenizer}");
    let (random, text) = (json(step), json(&drawn));
    // Both begin at the loss of random weights, but a text of few tokens is learned soon.
    let loss = |timing: &Value, at: usize| timing["losses"][at].as_f64().unwrap();
    assert!(text["tokens_per_second"].as_f64().unwrap() > 0.0);
    assert!(loss(&text, 0) - loss(&text, 1) > 10.0 * (loss(&random, 0) - loss(&random, 1)).abs());
    assert!(error_in(&run(&format!("{step} --tokens {tokens}"))).contains("--tokenizer-path"));
}
