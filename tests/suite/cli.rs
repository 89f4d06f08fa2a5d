//! The command line's manners: exit codes, one line of error, a hint.

use crate::support::laam;

/// Runs with bad arguments and returns what stderr said, after checking the form of an error.
pub fn error_of(arguments: &[&str]) -> String {
    let output = laam().args(arguments).output().expect("the program starts");
    let said = String::from_utf8(output.stderr).expect("errors are UTF-8");
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {said}");
    let lines: Vec<_> = said.lines().collect();
    let what = lines.iter().position(|line| line.starts_with("laam: "));
    let hint = lines.iter().position(|line| line.starts_with("hint: "));
    assert!(what.is_some() && hint == what.map(|at| at + 1), "{arguments:?}: {said}");
    said
}

/// With --json there is one object on stdout, also of an error; the text stays on stderr.
#[test]
fn errors_are_json_where_json_is_asked_for() {
    let nowhere = "/no/such/place";
    for arguments in [
        &["ls", nowhere][..],
        &["cat", nowhere, "a.c"],
        &["evaluate", nowhere],
        &["memorization", nowhere],
        &["generate", nowhere],
        &["rebuild", nowhere, "--output", nowhere],
        &["report", nowhere],
        &["plan", nowhere],
        &["fetch", "--version", "none"],
        &["train", "--tokenizer_path", nowhere],
        &["tokenize", "--tokenizer_path", nowhere, "--output", nowhere],
        &["train-tokenizer", "--source", nowhere],
        &["run", "--recipe", nowhere],
        &["sweep", nowhere],
        &["bench", "step", "--preset", "none"],
        &["bench", "kernels", "--no-such-flag"],
        &["check", "--threads", "0"],
        &["doctor", "--no-such-flag"],
    ] {
        let output = laam().args(arguments).arg("--json").output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {said}");
        let printed: serde_json::Value = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|fault| panic!("{arguments:?}: {fault}: {said}"));
        let error = &printed["error"];
        let (message, hint) = (error["message"].as_str().unwrap(), error["hint"].as_str().unwrap());
        assert!(said.contains(&format!("laam: {message}\nhint: {hint}\n")), "{said} {printed}");
        assert!(printed["schema_version"].is_u64() && error["kind"].is_string(), "{printed}");
    }
}

#[test]
fn bad_arguments_are_one_line_and_a_hint() {
    error_of(&[]);
    error_of(&["docto"]);
    error_of(&["doctor", "--no-such-flag"]);
}

#[test]
fn completions_know_commands_and_flags() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let done = laam().args(["completions", shell]).output().unwrap();
        assert!(done.status.success());
        let script = String::from_utf8(done.stdout).unwrap();
        for word in ["train-tokenizer", "recompute", "gguf"] {
            assert!(script.contains(word), "{shell}: {word}");
        }
    }
    let done = laam().args(["completions", "bash", "--json"]).output().unwrap();
    let printed: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap();
    assert!(printed["script"].as_str().unwrap().contains("train-tokenizer"));
    error_of(&["completions", "csh"]);
}

#[test]
fn bench_writes_a_page_named_after_the_device() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path().to_str().unwrap();
    let mut command = laam();
    command.args([
        "bench",
        "--backend",
        "cpu",
        "--threads",
        "2",
        "--small",
        "--json",
        "--output",
        at,
    ]);
    let done = command.output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let json: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap();
    assert!(json["steps"][0]["laam"]["tokens_per_second"].as_f64().unwrap() > 0.0);
    let mut pages: Vec<_> = std::fs::read_dir(at).unwrap().map(|it| it.unwrap().path()).collect();
    pages.sort();
    let extensions: Vec<_> = pages.iter().map(|page| page.extension().unwrap()).collect();
    assert_eq!(extensions, ["html", "json", "md"]);
    assert!(pages[0].file_name().unwrap().to_str().unwrap().contains("2-threads"), "{pages:?}");
    let markdown = std::fs::read_to_string(&pages[2]).unwrap();
    let html = std::fs::read_to_string(&pages[0]).unwrap();
    for row in ["| original | 1 x 32 | AdamW |", "| rms_norm_backward |"] {
        assert!(markdown.contains(row), "{markdown}");
        assert!(html.contains(&row.trim_matches(['|', ' ']).replace(" | ", "</td><td>")), "{row}");
    }
}

#[test]
fn a_check_in_another_precision_than_asked_for_says_so() {
    let check = "check --backend cpu --only reduce_gradients --precision float16 --seed 1";
    let done = laam().args(check.split(' ')).output().unwrap();
    let said = String::from_utf8(done.stderr).unwrap();
    assert!(done.status.success() && said.contains("warning: this backend computes in"), "{said}");
}
