//! The page of a run: that it has marks, asks nobody for anything, and takes hostile names as text.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::json;

use crate::cli::error_of;
use crate::support::laam;

/// What every page of a whole run has to have. `files` is how many the run has.
pub fn check(page: &Path, files: usize) {
    let html = fs::read_to_string(page).unwrap();
    for title in [
        "Loss",
        "Learning rate",
        "Gradient norm",
        "Throughput",
        "Verbatim windows",
        "Windows by p_z",
        "(n, p)-discoverable",
    ] {
        let figures = html.split("<figure>").skip(1);
        let mut figures = figures.filter(|figure| figure.contains(&format!("<b>{title}</b>")));
        let figure = figures.next().unwrap_or_else(|| panic!("no chart of {title}"));
        let figure = figure.split("</figure>").next().unwrap();
        let points = figure.split("points=\"").skip(1).map(|rest| {
            rest.split('"').next().unwrap().split_whitespace().collect::<Vec<_>>().len()
        });
        let marks: usize = points.sum::<usize>() + figure.matches("<rect").count();
        assert!(marks > 1, "{title} has {marks} marks");
        assert!(!figure.contains("NaN"), "{title}");
    }
    let strips: Vec<&str> = html.split("<div class=\"strip\">").skip(1).collect();
    assert_eq!(strips.len(), files);
    assert!(strips.iter().all(|strip| strip.contains("<rect")));
    let table = html.split("id=\"rebuild\"").nth(1).unwrap().split("</section>").next().unwrap();
    assert_eq!(table.matches("<td class=\"path\">").count(), files);
    assert!(html.contains("id=\"size\"") && html.contains("id=\"provenance\""));
    asks_nobody(&html);
    silent_in_chromium(page);
}

/// Nothing is loaded from elsewhere: no such element, no such style, and the browser is told.
fn asks_nobody(html: &str) {
    assert!(html.contains("Content-Security-Policy\" content=\"default-src 'none';"));
    let page = html.split("<script type=\"application/json\"");
    // Data are no part of the page's structure: what stands in them is looked at elsewhere.
    let without_data: String = page
        .enumerate()
        .map(|(at, part)| if at == 0 { part } else { part.split_once("</script>").unwrap().1 })
        .collect();
    for loading in ["src=", "@import", "url(", "<iframe", "<object", "<embed", "<base", "fetch("] {
        assert!(!without_data.contains(loading), "{loading}");
    }
    let links: Vec<&str> = without_data.split("href=").skip(1).collect();
    assert!(links.iter().all(|link| link.starts_with("\"data:,\"")), "{links:?}");
    assert!(!without_data.contains("http://www") && !without_data.contains("https://"));
}

/// Opens the page where there is a Chromium: its script has to run to the end without a complaint.
fn silent_in_chromium(page: &Path) {
    let names = ["chromium", "chromium-browser", "google-chrome"];
    let found = names.iter().find(|name| Command::new(name).arg("--version").output().is_ok());
    let Some(chromium) = found else {
        eprintln!("SKIPPED: no Chromium here: the page was not opened.");
        return;
    };
    let profile = tempfile::tempdir().unwrap();
    // The last thing the script does is to listen; then this page reads a point of a chart.
    let probe = "<script>document.querySelector('svg.chart').dispatchEvent(new PointerEvent('pointermove',\
        {clientX: 200, clientY: 100}));document.title = document.getElementById('tip').textContent;</script>";
    let probed = profile.path().join("probed.html");
    fs::write(&probed, fs::read_to_string(page).unwrap() + probe).unwrap();
    let output = Command::new(chromium)
        .args(["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"])
        .arg(format!("--user-data-dir={}", profile.path().join("profile").display()))
        .args(["--virtual-time-budget=2000", "--dump-dom"])
        .arg(format!("file://{}", probed.display()))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let complaints: Vec<&str> = said.lines().filter(|line| line.contains("CONSOLE")).collect();
    assert!(complaints.is_empty(), "{complaints:#?}");
    let dom = String::from_utf8_lossy(&output.stdout);
    let title = dom.split("<title>").nth(1).and_then(|rest| rest.split("</title>").next());
    assert!(title.is_some_and(|title| title.contains("step ")), "{title:?}: {said}");
}

/// A run's folder as somebody else could have made it.
#[test]
fn report_escapes_foreign_text() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let turned = "\u{202e}\u{2066}\u{200f}\u{9b}\u{feff}\u{e0001}";
    let bad = format!("</script><script>alert(1)</script><img src=x onerror=alert(1)>{turned}.c");
    let bad = bad.as_str();
    fs::create_dir_all(at("memorization")).unwrap();
    fs::create_dir_all(at("model")).unwrap();
    let write = |name: &str, text: String| fs::write(at(name), text).unwrap();
    let recipe =
        format!("description = '{bad}'\n[[stage]]\nname = 'model'\n[[stage]]\nname = '../x'\n");
    write("run.json", json!({"recipe": recipe, "corpus_sha256": bad}).to_string());
    let line = |step: u64, loss: &str| {
        format!(
            "{{\"step\": {step}, \"loss\": {loss}, \"learning_rate\": 1e308, \"grad_norm\": null, \
             \"tokens\": 1, \"tokens_per_second\": -5}}\n"
        )
    };
    write("model/metrics.jsonl", line(1, "1e-320") + &line(2, "2.5") + &line(3, "null") + "{\"st");
    write("model/provenance.json", json!({"corpus": {"name": bad, "paths": [bad]}}).to_string());
    write(
        "memorization/memorization.json",
        json!({
            "by_prefix": {bad: 0.5}, "question": {"suffix": bad}, "verbatim_rate": 2,
            "longest_run": {"path": bad, "bytes": 3}, "p_z": {"windows": "none"}, "bytes": 0,
        })
        .to_string(),
    );
    write("memorization/heat.json", json!([
        {"path": bad, "text": bad, "cells": [[10, null], [0, -1e30]], "wrong": [[5, 2], [90, 100]]},
        {"path": bad, "text": "", "cells": [], "wrong": []},
    ]).to_string());
    write(
        "rebuild.json",
        json!({"per_file": [
        {"path": bad, "exact": false, "first_difference": {"before": bad, "line": -1}}, 7,
    ], "missing": [bad]})
        .to_string(),
    );
    let output = laam().arg("report").arg(folder.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let html = fs::read_to_string(at("report.html")).unwrap();
    assert!(!html.contains("<script>alert") && !html.contains("<img"));
    let active: Vec<char> = html.chars().filter(|&c| turned.contains(c)).collect();
    assert!(active.is_empty() && html.contains("\\u{202e}\\u{2066}"), "{active:?}");
    assert!(!html.contains("[ACTIVE]"), "the script knows the characters");
    let shown = bad.replace(turned, r"\u{202e}\u{2066}\u{200f}\u{9b}\u{feff}\u{e0001}");
    asks_nobody(&html.replace(&shown.replace('<', "&lt;").replace('>', "&gt;"), ""));
}

#[test]
fn report_rejects_other_folders() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    assert!(error_of(&["report", path]).contains("no run.json"));
    fs::write(folder.path().join("run.json"), "{").unwrap();
    assert!(error_of(&["report", path]).contains("run.json"));
    assert!(!folder.path().join("report.html").exists());
}

/// Commands that the page prints.
fn commands_of(page: &Path) -> Vec<String> {
    let html = fs::read_to_string(page).unwrap();
    let printed =
        html.split("<pre>laam ").nth(1).map_or("", |rest| rest.split("</pre>").next().unwrap());
    let printed = printed.replace("&#39;", "'").replace("&quot;", "\"").replace("&amp;", "&");
    let lines = printed.lines().enumerate();
    lines
        .map(|(at, line)| if at == 0 { format!("laam {line}") } else { line.to_string() })
        .collect()
}

/// A page without measures says how to take them, in commands that work as printed: in a folder with a
/// difficult name, of a run whose metrics went elsewhere.
#[test]
fn commands_on_the_page_work_as_printed() {
    let place = tempfile::tempdir().unwrap();
    let run = |line: &str| {
        let laam = laam();
        let program = Path::new(laam.get_program()).parent().unwrap().display().to_string();
        let path = format!("{program}:{}", std::env::var("PATH").unwrap());
        let mut shell = Command::new("sh");
        shell.args(["-ec", line]).env("PATH", path).current_dir(place.path());
        let done = shell.output().unwrap();
        assert!(done.status.success(), "{line}: {}", String::from_utf8_lossy(&done.stderr));
    };
    fs::write(place.path().join("text.c"), "int a;\nint b;\n".repeat(20)).unwrap();
    run("laam train-tokenizer --source text.c --vocab_size 280 --output_path tk");
    for (source, folder) in [("", "it's a run"), ("--source text.c", "run")] {
        run(&format!(
            "laam train {source} --limit 1 --tokenizer_path tk --windows stream --max_steps 1 --warmup_steps 0 \
             --max_position_embeddings 64 --hidden_size 8 --intermediate_size 8 --num_hidden_layers 1 \
             --num_attention_heads 2 --num_key_value_heads 2 --metrics /dev/null --output_path \"{folder}\"; \
             laam report \"{folder}\""
        ));
        let page = place.path().join(folder).join("report.html");
        let commands = commands_of(&page);
        assert_eq!(commands.len(), 2, "{commands:?}");
        assert_eq!(commands[0].contains(" --source TEXT "), !source.is_empty(), "{commands:?}");
        for command in &commands {
            run(&command.replace("TEXT", "text.c"));
        }
        assert!(commands_of(&page).is_empty());
        assert!(fs::read_to_string(&page).unwrap().contains("bits per byte"));
    }
}
