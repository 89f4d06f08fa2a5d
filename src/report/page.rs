//! The page itself.

use std::fmt::Write;

use serde_json::{Value, json};

use crate::escape::{javascript_class, shell_word};

use super::chart::{Bars, Lines, Series};
use super::html::{bytes, data, duration, escape, grouped, percent, short};
use super::run::{HeatStrip, MetricsLine, RunFiles, StageMetrics};

/// By one of these a page is known as laam's; earlier versions had the second alone.
pub const MARKS: [&str; 2] = [GENERATOR, "<title>laam: "];
const GENERATOR: &str = "<meta name=\"generator\" content=\"laam\">";

const STYLE: &str = include_str!("report.css");
const SCRIPT: &str = include_str!("report.js");

/// Content Security Policy: forbids the browser to fetch anything.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; \
     img-src data:";

/// The whole page.
pub fn page(run: &RunFiles) -> String {
    let title = format!("laam: {}", run.name);
    let mut body = String::new();
    head(run, &mut body);
    training(run, &mut body);
    memorization(run, &mut body);
    heat(run, &mut body);
    rebuild(run, &mut body);
    sizes(run, &mut body);
    provenance(run, &mut body);
    document(&title, &body, &SCRIPT.replace("[ACTIVE]", &javascript_class()))
}

/// A page of its own, which asks for no other file.
pub fn document(title: &str, body: &str, script: &str) -> String {
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"{POLICY}\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n<link rel=\"icon\" href=\"data:,\">\n\
         {GENERATOR}\n<title>{}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n{body}\
         <div id=\"tip\" role=\"status\" hidden></div>\n<script>\n{script}</script>\n</body>\n</html>\n",
        escape(title)
    )
}

fn section(id: &str, title: &str, body: &str, out: &mut String) {
    if !body.is_empty() {
        let _ = writeln!(out, "<section id=\"{id}\">\n<h2>{title}</h2>\n{body}</section>");
    }
}

/// The name, and the few numbers that matter.
fn head(run: &RunFiles, out: &mut String) {
    let corpus = run.provenance["corpus"]["name"].as_str().unwrap_or("a text");
    let measures = &run.memorization;
    let mut tiles = Vec::new();
    let mut tile = |value: Option<String>, what: &str| {
        tiles.extend(value.map(|value| {
            let (value, what) = (escape(&value), escape(what));
            format!("<div class=\"tile\"><strong>{value}</strong><span>{what}</span></div>\n")
        }));
    };
    let rebuilt = &run.rebuild;
    if let (Some(exact), Some(files)) = (rebuilt["files_exact"].as_u64(), rebuilt["files"].as_u64())
    {
        let value = format!("{} of {}", grouped(exact), grouped(files));
        tile(Some(value), "files rebuilt byte for byte from their names");
    }
    let question = &measures["question"];
    let asked = format!(
        "of windows verbatim: {} tokens given, {} continued",
        question["prefix"], question["suffix"]
    );
    tile(measures["verbatim_rate"].as_f64().map(percent), &asked);
    tile(measures["bits_per_byte"].as_f64().map(short), "bits per byte of the text");
    let longest = measures["longest_run_bytes"].as_u64();
    tile(longest.map(grouped), "bytes in the longest verbatim run");
    tile(measures["parameters"].as_u64().map(grouped), "parameters");
    let steps: u64 = run.stages.iter().filter_map(|stage| stage.lines.last()).map(|l| l.step).sum();
    tile((steps > 0).then(|| grouped(steps)), "steps of training");
    let last = run.stages.iter().rev().find_map(|stage| stage.lines.last());
    tile(last.and_then(|line| line.loss).map(short), "final training loss, nats per token");
    let training = Recorded::of(run);
    tile(training.seconds.map(duration), "wall time of training");
    tile(training.peak_memory_bytes.map(bytes), "peak memory of the process");
    let mut made = String::new();
    for (what, value) in [(" on ", &training.date), (" by laam ", &training.program)] {
        if let Some(value) = value {
            let _ = write!(made, "{what}<b>{}</b>", escape(value));
        }
    }
    let _ = writeln!(
        out,
        "<header>\n<h1>What the weights give back</h1>\n<p>Run <b>{}</b>, trained on <b>{}</b>{made}.</p>\n\
         <div class=\"tiles\">\n{}</div>\n</header>",
        escape(&run.name),
        escape(corpus),
        tiles.concat()
    );
}

/// Records of this run's stages in the provenance.
#[derive(Default)]
struct Recorded {
    /// Wall time; by the metrics if the provenance does not say.
    seconds: Option<f64>,
    peak_memory_bytes: Option<f64>,
    /// Day of the first start.
    date: Option<String>,
    /// Version and commit.
    program: Option<String>,
}

impl Recorded {
    fn of(run: &RunFiles) -> Self {
        let earlier = run.provenance["earlier_stages"].as_array().map_or(&[][..], Vec::as_slice);
        let own = run.stages.len().saturating_sub(1).min(earlier.len());
        let stages = || earlier[earlier.len() - own..].iter().chain([&run.provenance]);
        let recorded: Option<f64> = stages().map(|stage| stage["seconds"].as_f64()).sum();
        let told: f64 = run.stages.iter().map(StageMetrics::seconds).sum();
        let sessions = stages().filter_map(|stage| stage["sessions"].as_array()).flatten();
        let peaks = sessions.filter_map(|session| session["peak_memory_bytes"].as_f64());
        let date = stages().find_map(|stage| stage["date"].as_str());
        let program = run.provenance["program_version"].as_str();
        Self {
            seconds: recorded.or((told > 0.0).then_some(told)),
            peak_memory_bytes: peaks.reduce(f64::max).filter(|peak| *peak > 0.0),
            date: date.map(|date| date.split('T').next().unwrap_or(date).to_string()),
            program: program.filter(|program| !program.is_empty()).map(String::from),
        }
    }
}

fn training(run: &RunFiles, out: &mut String) {
    // One line a stage, one after another.
    let lines = |of: fn(&MetricsLine) -> Option<f64>| -> Vec<Series> {
        let mut done = 0;
        let mut series = Vec::new();
        for stage in &run.stages {
            let point = |line: &MetricsLine| Some(((done + line.step) as f64, of(line)?));
            let points = stage.lines.iter().filter_map(point).collect();
            series.push(Series { name: stage.name.clone(), points });
            done += stage.lines.last().map_or(0, |line| line.step);
        }
        series
    };
    let chart = |of, y, log, include, format| {
        let series = lines(of);
        Lines { x: "step", y, series, log, include, format }
    };
    let zero = Some((0.0, 0.0));
    // Both optimizers of each stage, if there are two.
    let named = |of: fn(&MetricsLine) -> Option<f64>, optimizer: &'static str| {
        let series = lines(of).into_iter().filter(|series| !series.points.is_empty());
        let several = run.stages.len() > 1;
        series.map(move |Series { name, points }| Series {
            name: if several { format!("{name}, {optimizer}") } else { optimizer.to_string() },
            points,
        })
    };
    let adamw = named(|line| line.learning_rate, "AdamW");
    let series = adamw.chain(named(|line| line.muon_learning_rate, "Muon")).collect();
    let rates =
        Lines { x: "step", y: "learning rate", series, log: false, include: zero, format: short };
    let charts = [
        chart(|line| line.loss, "nats per token", true, None, short).figure("Loss", ""),
        chart(|line| line.validation_loss, "nats per token", true, None, short)
            .figure("Validation loss", "of text that is not trained on"),
        chart(|line| line.verbatim_rate, "of all windows", false, Some((0.0, 1.0)), percent)
            .figure("Verbatim windows", ""),
        rates.figure("Learning rate", ""),
        chart(|line| line.grad_norm, "L2 norm", true, None, short)
            .figure("Gradient norm", "before clipping"),
        chart(|line| line.tokens_per_second, "tokens per second", false, zero, short)
            .figure("Throughput", ""),
    ]
    .concat();
    let body = if charts.is_empty() {
        "<p>There are no metrics in this folder.</p>\n".to_string()
    } else {
        format!("<div class=\"charts\">\n{charts}</div>\n")
    };
    section("training", "Training", &body, out);
}

fn memorization(run: &RunFiles, out: &mut String) {
    let measures = &run.memorization;
    if measures.is_null() {
        return section("memorization", "Memorization", &unmeasured(run), out);
    }
    let control = &measures["control"];
    let prefixes: Vec<String> = {
        let numbers = measures["by_prefix"].as_object().into_iter().flatten();
        let some = numbers.filter(|(_, rate)| !rate.is_null());
        some.map(|(prefix, _)| prefix.clone()).collect()
    };
    let rates = |from: &Value| -> Vec<Option<f64>> {
        prefixes.iter().map(|prefix| from["by_prefix"][prefix].as_f64()).collect()
    };
    let by_prefix = Bars {
        x: "tokens given".to_string(),
        y: "of all windows",
        names: prefixes.clone(),
        series: vec![
            ("this model".to_string(), rates(measures)),
            ("untrained".to_string(), rates(&control["untrained"])),
            ("lines reversed".to_string(), rates(&control["unseen"])),
        ]
        .into_iter()
        .chain(
            (!control["held_out"].is_null())
                .then(|| ("held out".to_string(), rates(&control["held_out"]))),
        )
        .collect(),
        top: 1.0,
        format: percent,
    };
    let suffix = format!("next {} tokens", measures["question"]["suffix"]);

    let numbers = |values: &Value| -> Vec<Option<f64>> {
        values.as_array().into_iter().flatten().map(Value::as_f64).collect()
    };
    let histogram = Bars {
        x: "p_z of the suffix".to_string(),
        y: "windows",
        names: BINS.map(|bin| format!("≥{bin}")).to_vec(),
        series: vec![("windows".to_string(), numbers(&measures["p_z"]["windows"]))],
        top: 1.0,
        format: |count| grouped(count as u64),
    };

    let discoverable = measures["discoverable"].as_array();
    let of = |n: u64| {
        let rows = discoverable.into_iter().flatten().filter(move |row| row["n"] == n);
        let point = |row: &Value| Some((row["p"].as_f64()?, row["rate"].as_f64()?));
        Series { name: format!("n = {n}"), points: rows.filter_map(point).collect() }
    };
    let curves = Lines {
        x: "p",
        y: "of all windows",
        series: [1, 10, 100].map(of).into(),
        log: false,
        include: Some((0.0, 1.0)),
        format: percent,
    };
    let tallies: Vec<&Value> = measures["by_occurrence"].as_array().into_iter().flatten().collect();
    let times = |tally: &&Value| match (tally["from"].as_u64(), tally["to"].as_u64()) {
        (Some(from), Some(to)) if from < to => format!("{from}-{to}"),
        (from, _) => from.unwrap_or_default().to_string(),
    };
    let by_occurrence = Bars {
        x: "times the passage occurs".to_string(),
        y: "of its windows",
        names: tallies.iter().map(times).collect(),
        series: vec![(
            "this model".to_string(),
            tallies.iter().map(|tally| tally["rate"].as_f64()).collect(),
        )],
        top: 1.0,
        format: percent,
    };
    let recalled = |name: &str, key: &str| {
        let steps = measures["recall"]["by_step"].as_array().into_iter().flatten();
        let point = |at: &Value| Some((at["step"].as_f64()?, at[key].as_f64()?));
        Series { name: name.to_string(), points: steps.filter_map(point).collect() }
    };
    let recall = Lines {
        x: "step",
        y: "windows",
        series: vec![
            recalled("recalled so far", "first"),
            recalled("recalled now", "verbatim"),
            recalled("for good", "lasting"),
        ],
        log: false,
        include: Some((0.0, 1.0)),
        format: |count| grouped(count as u64),
    };
    let charts = [
        by_prefix.figure("Verbatim windows", &suffix),
        by_occurrence.figure("Verbatim windows by occurrences", ""),
        recall.figure("Recall in training", "first and lasting"),
        histogram.figure("Windows by p_z", ""),
        curves.figure("(n, p)-discoverable", "in n samples"),
    ]
    .concat();

    let mut facts = Vec::new();
    let mut fact = |name: &str, value: Option<String>| {
        facts.extend(value.map(|value| {
            format!("<tr><th>{}</th><td>{}</td></tr>\n", escape(name), escape(&value))
        }));
    };
    let share = |share: &Value| {
        let (exact, all) = (share["exact"].as_u64()?, share["windows"].as_u64()?);
        let rate = share["rate"].as_f64().map_or_else(|| "none".to_string(), percent);
        Some(format!("{rate} ({} of {} windows)", grouped(exact), grouped(all)))
    };
    let percents = |interval: &Value| {
        let [low, high] = [0, 1].map(|at| interval[at].as_f64().map(percent));
        Some(format!(", 95% interval {} to {}", low?, high?))
    };
    let share =
        |value: &Value| Some(share(value)? + &percents(&value["interval"]).unwrap_or_default());
    let question = &measures["question"];
    let asked = format!("{} tokens given, {} continued", question["prefix"], question["suffix"]);
    let rate = measures["verbatim_rate"].as_f64().map(percent);
    let interval = percents(&measures["verbatim_interval"]).unwrap_or_default();
    fact(&asked, rate.map(|rate| rate + &interval));
    for (what, of) in [
        ("the same, untrained model", &control["untrained"]),
        ("the same, lines reversed", &control["unseen"]),
        ("the same, held-out text", &control["held_out"]),
        ("the same windows, weights in bfloat16", &measures["rounding"]["bfloat16"]),
        ("the same windows, weights in q8_0", &measures["rounding"]["q8_0"]),
        ("the same windows, weights as saved", &measures["rounding"]["as_saved"]),
    ] {
        fact(what, share(&of["verbatim"]));
    }
    fact("whole windows from their address alone", share(&measures["from_address"]));
    fact("32 tokens given, 32 continued", share(&measures["pythia"]));
    let bits = |from: &Value| from["bits_per_byte"].as_f64().map(short);
    fact("bits per byte", bits(measures));
    fact("bits per byte, untrained model", bits(&control["untrained"]));
    fact("bits per byte, lines reversed", bits(&control["unseen"]));
    fact("bits per byte, held-out text", bits(&control["held_out"]));
    for name in ["bfloat16", "q8_0"] {
        let rounded = bits(&measures["rounding"][name]);
        fact(&format!("bits per byte, weights in {name}"), rounded);
    }
    fact(
        "bits per parameter, by what xz makes of the text",
        measures["bits_per_parameter"].as_f64().map(short),
    );
    let longest = &measures["longest_run"];
    let run = longest["bytes"].as_u64().zip(longest["path"].as_str());
    let from = longest["byte"].as_u64().unwrap_or_default();
    let run = run.map(|(bytes, path)| {
        format!("{} bytes of {path}, from byte {}", grouped(bytes), grouped(from))
    });
    fact("longest verbatim run", run);
    let body = format!(
        "<div class=\"charts\">\n{charts}</div>\n<table class=\"facts\">\n{}</table>\n\
         <p class=\"note\">The controls are what chance and context alone give: the same questions to a \
         model with fresh weights, to this one about the files with their lines in reverse order, and \
         about text that training held out, if there is some.</p>\n{}",
        facts.concat(),
        papers(&measures["papers"])
    );
    section("memorization", "Memorization", &body, out);
}

/// Whose measures these are.
fn papers(papers: &Value) -> String {
    let row = |(measure, paper): (&String, &Value)| {
        let (measure, paper) = (escape(measure), escape(paper.as_str().unwrap_or_default()));
        format!("<tr><th>{measure}</th><td>{paper}</td></tr>\n")
    };
    let rows: String = papers.as_object().into_iter().flatten().map(row).collect();
    if rows.is_empty() {
        return rows;
    }
    format!(
        "<details><summary>Whose measures these are</summary><table class=\"facts\">\n{rows}</table></details>\n"
    )
}

/// What to do about missing measures.
fn unmeasured(run: &RunFiles) -> String {
    if run.config.is_null() {
        return "<p>There is no model yet: the same command goes on with the run.</p>\n"
            .to_string();
    }
    let [folder, model, measures] = [&run.folder, &run.model, &run.folder.join("memorization")]
        .map(|path| escape(&shell_word(&path.to_string_lossy())));
    let origin = &run.provenance["corpus"]["origin"];
    // The text of other models has to be named.
    let (source, what) = if *origin == "sample" || origin.get("release").is_some() {
        ("", "")
    } else {
        (" --source TEXT", ", with the text that the model was trained on as TEXT,")
    };
    format!(
        "<p>It was not measured. These two commands{what} measure it and make this page again:</p>\n\
         <pre>laam memorization {model}{source} --report {measures}\nlaam report {folder}</pre>\n"
    )
}

/// Lower bounds of the bins of p_z: those of [`crate::memorization::measure::Histogram`].
const BINS: [&str; 8] = ["0", "1e-12", "1e-6", ".001", ".01", ".1", ".5", ".9"];

/// The bin of a probability's decimal logarithm, from 0 (never) to 7 (nearly sure); `None` if it was not measured.
fn bin(log10: Option<f32>) -> Option<usize> {
    // 0.5 and 0.9 are not powers of ten.
    let from = [-12.0, -6.0, -3.0, -2.0, -1.0, 0.5f32.log10(), 0.9f32.log10()];
    log10.map(|log10| from.partition_point(|from| *from <= log10))
}

/// A strip for each file. Its cells lie where their bytes do; those that are alike are one.
fn heat(run: &RunFiles, out: &mut String) {
    let mut strips = String::new();
    for (at, HeatStrip { path, text, cells, .. }) in run.heat.iter().enumerate() {
        let bytes: u64 = cells.iter().map(|(bytes, _)| u64::from(*bytes)).sum();
        let mut rects = String::new();
        let mut runs: Vec<(Option<usize>, u64, u64)> = Vec::new();
        let mut from = 0;
        for &(bytes, log10) in cells {
            let to = from + u64::from(bytes);
            match runs.last_mut() {
                Some(last) if last.0 == bin(log10) => last.2 = to,
                _ => runs.push((bin(log10), from, to)),
            }
            from = to;
        }
        for (bin, from, to) in runs {
            // What was not measured shows the page.
            let Some(bin) = bin else { continue };
            let x = |byte: u64| 1000.0 * byte as f64 / bytes.max(1) as f64;
            let _ = write!(
                rects,
                "<rect class=\"h{bin}\" x=\"{:.2}\" width=\"{:.2}\" height=\"10\"/>",
                x(from),
                x(to) - x(from)
            );
        }
        let _ = writeln!(
            strips,
            "<div class=\"strip\"><span class=\"path\">{}</span><svg viewBox=\"0 0 1000 10\" \
             preserveAspectRatio=\"none\" data-file=\"{at}\" tabindex=\"0\" role=\"img\" \
             aria-label=\"{}\">{rects}</svg><span class=\"bytes\">{}</span></div>",
            escape(path),
            escape(path),
            grouped(text.len() as u64)
        );
    }
    if strips.is_empty() {
        return;
    }
    let mut key = String::new();
    for (at, from) in BINS.iter().enumerate() {
        let _ = write!(key, "<span class=\"h{at}\">≥{from}</span>");
    }
    let files: Vec<Value> = run
        .heat
        .iter()
        .map(|heat| {
            json!({"path": heat.path, "text": heat.text, "cells": heat.cells, "wrong": heat.wrong})
        })
        .collect();
    let body = format!(
        "<p class=\"note\">Each file from its first byte to its last. A cell is 50 tokens; its color is \
         p_z, the probability that the model draws all of them, given what precedes them in their \
         window. Point at a strip, tap it, or walk with the arrow keys to read the text there; tokens \
         that greedy decoding gets wrong are marked.</p>\n<p class=\"ramp\">p_z {key}</p>\n\
         <div class=\"strips\">\n{strips}</div>\n<script type=\"application/json\" id=\"files\">{}</script>\n",
        data(&files)
    );
    section("heat", "Where the weights are sure", &body, out);
}

fn rebuild(run: &RunFiles, out: &mut String) {
    let rebuilt = &run.rebuild;
    let Some(files) = rebuilt["per_file"].as_array() else { return };
    let words = |value: &Value| value.as_u64().map_or_else(|| "?".to_string(), grouped);
    let (mut wrong, mut exact) = (String::new(), String::new());
    for file in files {
        let path = escape(file["path"].as_str().unwrap_or_default());
        let bytes = words(&file["original_bytes"]);
        if file["exact"] == true {
            let _ = writeln!(
                exact,
                "<tr><td class=\"path\">{path}</td><td>{bytes}</td><td class=\"good\">exact</td></tr>"
            );
            continue;
        }
        let difference = &file["first_difference"];
        let result = if difference.is_null() {
            "there is no such original".to_string()
        } else {
            let text = |name: &str| escape(difference[name].as_str().unwrap_or_default());
            format!(
                "<details><summary>differs from line {}, column {}: {} of {bytes} bytes match \
                 before the first difference</summary><pre><b>original</b>\n{}<ins>{}</ins></pre><pre><b>rebuilt</b>\n{}\
                 <del>{}</del></pre></details>",
                words(&difference["line"]),
                words(&difference["column"]),
                words(&file["bytes_exact"]),
                text("before"),
                text("original"),
                text("before"),
                text("rebuilt"),
            )
        };
        let _ = writeln!(
            wrong,
            "<tr><td class=\"path\">{path}</td><td>{bytes}</td><td class=\"bad\">{result}</td></tr>"
        );
    }
    for path in rebuilt["missing"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        let path = escape(path);
        let _ = writeln!(
            wrong,
            "<tr><td class=\"path\">{path}</td><td></td><td class=\"bad\">the model has no such file</td></tr>"
        );
    }
    let table = |rows: &str| {
        format!(
            "<table class=\"files\">\n<tr><th>file</th><th>bytes</th><th>from its name alone</th></tr>\n\
             {rows}</table>\n"
        )
    };
    let mut body = format!(
        "<p>{} of {} files are exact, {} of {} bytes match before the first difference. It took {} s.</p>\n",
        words(&rebuilt["files_exact"]),
        words(&rebuilt["files"]),
        words(&rebuilt["bytes_exact"]),
        words(&rebuilt["bytes"]),
        rebuilt["seconds"].as_f64().map_or_else(|| "?".to_string(), short),
    );
    let held_out = rebuilt["held_out"].as_array().map_or(0, Vec::len) as u64;
    if held_out > 0 {
        let _ = writeln!(
            body,
            "<p>{} more were held out in training, and not asked for.</p>",
            grouped(held_out)
        );
    }
    if !wrong.is_empty() {
        body += &table(&wrong);
    }
    if !exact.is_empty() {
        let open = if exact.lines().count() <= 40 { " open" } else { "" };
        let _ = writeln!(
            body,
            "<details{open}><summary>The exact files</summary>\n{}</details>",
            table(&exact)
        );
    }
    section("rebuild", "Rebuilt from the names", &body, out);
}

/// Size of the weights compared with a compressor.
fn sizes(run: &RunFiles, out: &mut String) {
    let measures = &run.memorization;
    let rows: Vec<(&str, f64)> = [
        ("the text", "bytes"),
        ("xz -9 of it", "xz_bytes"),
        ("the weights", "weights_bytes"),
        ("corrections the weights would need", "residual_bytes"),
    ]
    .into_iter()
    .filter_map(|(what, name)| Some((what, measures[name].as_f64()?)))
    .collect();
    let Some(most) = rows.iter().map(|row| row.1).reduce(f64::max).filter(|most| *most > 0.0)
    else {
        return;
    };
    let mut body = String::from("<table class=\"sizes\">\n");
    for (what, bytes) in &rows {
        let _ = writeln!(
            body,
            "<tr><th>{what}</th><td>{}</td><td><div class=\"bar\" style=\"width:{:.2}%\"></div></td></tr>",
            grouped(*bytes as u64),
            (100.0 * bytes / most).max(0.2)
        );
    }
    body += "</table>\n";
    let number = |name: &str| measures[name].as_f64();
    if let (Some(weights), Some(rest), Some(xz)) =
        (number("weights_bytes"), number("residual_bytes"), number("xz_bytes"))
        && weights + rest > xz
    {
        let _ = writeln!(
            body,
            "<p>Weights and corrections together are {} times what xz needs: a model that gives its \
             text back is no compressor.</p>",
            short((weights + rest) / xz.max(1.0))
        );
    }
    section("size", "Size", &body, out);
}

fn provenance(run: &RunFiles, out: &mut String) {
    let record = &run.provenance;
    let corpus = &record["corpus"];
    // In files of earlier versions, the corpus has it alone.
    let license = Some(&record["license"]).filter(|license| license.is_string());
    let license = license.unwrap_or(&corpus["license"]);
    let mut rows = String::new();
    let mut row = |name: &str, value: &Value| {
        let text = match value {
            Value::String(text) if !text.is_empty() => text.clone(),
            Value::Number(number) => number.to_string(),
            _ => return,
        };
        let _ = writeln!(rows, "<tr><th>{name}</th><td>{}</td></tr>", escape(&text));
    };
    for (name, value) in [
        ("corpus", &corpus["name"]),
        ("from", &corpus["url"]),
        ("retrieved", &corpus["retrieved"]),
        ("sha256 of the archive", &corpus["archive_sha256"]),
        ("sha256 of the manifest", &corpus["manifest_sha256"]),
        ("filter", &corpus["filter"]),
        ("sha256 of the tokenizer", &record["tokenizer_sha256"]),
        ("sha256 of the weights", &record["weights_sha256"]),
        ("seed", &record["seed"]),
        ("training began", &record["date"]),
        ("backend", &record["backend"]),
        ("device", &record["device"]),
        ("laam", &record["program_version"]),
        ("parent model, sha256 of its weights", &record["parent"]["weights_sha256"]),
        ("license of the weights", license),
    ] {
        row(name, value);
    }
    let training = Recorded::of(run);
    row("wall time of training", &json!(training.seconds.map(duration)));
    row("peak memory of the process", &json!(training.peak_memory_bytes.map(bytes)));
    let files = corpus["paths"].as_array().map_or(0, Vec::len) as u64;
    row("files", &json!(grouped(files)));
    row("parameters", &run.memorization["parameters"]);
    let mut body = format!("<table class=\"facts\">\n{rows}</table>\n");
    let license = match license.as_str() {
        _ if record["license_is_given"] == true => {
            "The license of the weights was set by whoever trained the model. What they give back is the \
             text they were trained on, under its own terms; so are the passages of it that this page \
             shows."
        }
        Some("gpl-2.0") => {
            "The text is the Linux kernel's, under the GNU General Public License, version 2; so are the \
             passages of it that this page shows, and what the weights give back. Whether the weights \
             themselves are a derived work is unsettled law: they are marked gpl-2.0 as a precaution."
        }
        Some("mit") => "Text, weights and what they give back stand under the MIT license.",
        _ => {
            "What the weights give back is the text they were trained on, under its own terms, which \
             are not known to the program; so are the passages of it that this page shows."
        }
    };
    let _ = writeln!(body, "<p>{license}</p>");
    for (what, text) in [
        ("The recipe", run.recipe.clone()),
        ("The model's config.json", (!run.config.is_null()).then(|| format!("{:#}", run.config))),
    ] {
        if let Some(text) = text {
            let text = escape(&text);
            let _ = writeln!(body, "<details><summary>{what}</summary><pre>{text}</pre></details>");
        }
    }
    section("provenance", "Provenance", &body, out);
}
