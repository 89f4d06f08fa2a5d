//! The measures of one forward pass, compared with what they predict: generation.

use std::fs;
use std::ops::Range;
use std::sync::Arc;

use laam::backend::cpu::Cpu;
use laam::corpus::Document;
use laam::generate::{Generator, Request};
use laam::memorization::measure::{Question, measure};
use laam::memorization::occurrences::{count, unknown};
use laam::model::{Model, load};
use laam::random::{Philox, Stream};
use laam::tokenizer::Tokenizer;
use laam::tokens::{IGNORE, TokenFile, TokenWriter, WindowKind, Windows};
use serde_json::{Value, json};

use crate::rebuild::{CONTEXT, json_of, run, text, trained};

const CPU: Cpu = Cpu::f32(2);

/// In the order of their folder.
fn documents() -> Vec<Document> {
    let mut documents = crate::rebuild::documents();
    documents.sort_by(|a, b| a.path.cmp(&b.path));
    documents
}

/// The trained model with noise on its weights: it knows some windows, and not others.
fn noisy(model: &Model, deviation: f64) -> Vec<f32> {
    let mut noise = vec![0.0; model.weights.len()];
    Philox::new(9, Stream::Test).fill_normal(0, deviation, &mut noise);
    model.weights.iter().zip(noise).map(|(weight, noise)| weight + noise).collect()
}

#[test]
fn teacher_forced_rates_match_generation() {
    let model = load(&trained().model()).unwrap();
    let tokenizer = Arc::new(Tokenizer::load(&trained().model()).unwrap());
    let folder = tempfile::tempdir().unwrap();
    let tokens = folder.path().join("tokens");
    let mut writer = TokenWriter::create(&tokens, &tokenizer).unwrap();
    writer.write(crate::rebuild::documents().into_iter().map(Ok), |_| ()).unwrap();
    writer.finish([0; 32]).unwrap();
    let file = Arc::new(TokenFile::open(&tokens).unwrap());
    for kind in [WindowKind::Addressed, WindowKind::Original, WindowKind::Stream] {
        let windows = Windows::new(file.clone(), tokenizer.clone(), kind, CONTEXT, None).unwrap();
        let all: Vec<usize> = (0..windows.len()).collect();
        let (mut exact, mut asked) = (0, 0);
        for deviation in [0.0, 0.02, 0.05, 0.1] {
            let weights = noisy(&model, deviation);
            for (prefix, suffix) in [(8, 8), (4, 2), (1, 1), (8, 3)] {
                let question = Question { prefix, suffix };
                let memorized = measure(
                    &CPU,
                    &model.config,
                    &weights,
                    &windows,
                    &tokenizer,
                    &all,
                    question,
                    2,
                    |_| Ok(()),
                )
                .unwrap();
                let mut said: Vec<(usize, bool)> =
                    memorized.answers.iter().map(|answer| (answer.window, answer.exact)).collect();
                said.sort_unstable();

                // The same by generating: each window's true tokens, some given, some expected.
                let mut generator =
                    Generator::new(&CPU, &model.config, &weights, 4, CONTEXT).unwrap();
                let mut requests = Vec::new();
                let mut expected = Vec::new();
                for window in 0..windows.len() {
                    let (given, mut rest) = true_tokens(&windows, window);
                    // The model sees one document at a time.
                    let left = windows.document_rest(window).unwrap().min(rest.len());
                    if left < suffix + prefix {
                        continue;
                    }
                    let suffix: Vec<u32> = rest.drain(prefix..).take(suffix).collect();
                    requests.push(Request {
                        prompt: [given, rest].concat(),
                        max_new_tokens: suffix.len(),
                        ..Request::default()
                    });
                    expected.push((window, suffix));
                }
                let continuations = generator.all(requests).unwrap();
                let generated: Vec<(usize, bool)> = expected
                    .iter()
                    .zip(continuations)
                    .map(|((window, suffix), continuation)| (*window, continuation.ids == *suffix))
                    .collect();
                assert_eq!(said, generated, "{kind:?} {question:?}, noise {deviation}");
                exact += generated.iter().filter(|(_, exact)| *exact).count();
                asked += generated.len();
                let rate = memorized.verbatim_rate;
                let counted = said.iter().filter(|(_, exact)| *exact).count();
                let meant = (!said.is_empty()).then(|| counted as f64 / said.len() as f64);
                assert_eq!(rate, meant);
            }
        }
        // Neither all nor nothing, or the comparison would say little.
        assert!(exact > 0 && exact < asked, "{kind:?}: {exact} of {asked}");
    }
}

/// What is always given of a window, and the tokens that a prefix and a suffix are taken from.
fn true_tokens(windows: &Windows, window: usize) -> (Vec<u32>, Vec<u32>) {
    let batch = windows.draw(&[window]).unwrap();
    let counts = |column: &usize| batch.targets[*column] != IGNORE;
    let columns: Vec<usize> = (0..batch.context).filter(counts).collect();
    let mut rest: Vec<u32> = columns.iter().map(|&column| batch.targets[column]).collect();
    // The columns before the first target's: an address, or one token that is part of the prefix.
    let shown = (0..=columns[0]).filter(|&column| batch.first_key[column] as usize <= column);
    let mut given: Vec<u32> = shown.map(|column| batch.ids[column]).collect();
    if windows.kind() != WindowKind::Addressed {
        rest.splice(0..0, given.drain(..));
    }
    (given, rest)
}

fn measured(flags: &[&str]) -> Value {
    let (model, source) = (trained().model(), trained().source());
    let arguments = ["memorization", text(&model), "--source", text(&source), "--json"];
    let output = run(&[&arguments[..], flags].concat());
    assert_eq!(output.status.code(), Some(0));
    json_of(&output)
}

#[test]
fn memorization_separates_trained_from_control() {
    let report = measured(&["--prefix=8", "--suffix=8"]);
    assert_eq!(report["verbatim_rate"], 1.0, "{report:#}");
    assert_eq!(report["by_prefix"]["8"], 1.0);
    assert_eq!(report["by_prefix"]["400"], Value::Null);
    assert_eq!(report["from_address"]["rate"], 1.0);
    assert_eq!(report["tokens"], report["tokens_correct"]);
    let control = &report["control"];
    assert_eq!(control["untrained"]["verbatim_rate"], 0.0, "{control:#}");
    // Of three windows of eight tokens one may come by its lines; the bits say that it is no memory.
    assert!(control["unseen"]["verbatim_rate"].as_f64().unwrap() < 0.5, "{control:#}");
    assert!(control["unseen"]["bits_per_byte"].as_f64().unwrap() > 1.0, "{control:#}");
    assert!(report["bits_per_byte"].as_f64().unwrap() < 0.1);
    // A fresh model knows nothing: log2 of the vocabulary for each token.
    let tokens = report["tokens"].as_f64().unwrap();
    let bytes = report["bytes"].as_f64().unwrap();
    let nothing = 300f64.log2() * tokens / bytes;
    let untrained = control["untrained"]["bits_per_byte"].as_f64().unwrap();
    assert!((untrained / nothing - 1.0).abs() < 0.05, "{untrained} for {nothing}");

    // Every file is one run from its first byte to its last.
    let lengths: Vec<u64> = documents().iter().map(|document| document.text.len() as u64).collect();
    let files = report["files"].as_array().unwrap();
    let of = |name: &str| -> Vec<u64> {
        files.iter().map(|file| file[name].as_u64().unwrap()).collect()
    };
    assert_eq!(of("bytes"), lengths);
    assert_eq!(of("longest_run_bytes"), lengths);
    assert_eq!(report["longest_run_bytes"].as_u64(), lengths.iter().max().copied());

    // The bits are those of evaluate, and those beyond what xz needs are in the parameters.
    let (model, source) = (trained().model(), trained().source());
    let evaluated = json_of(&run(&["evaluate", text(&model), "--source", text(&source), "--json"]));
    let number = |value: &Value| value.as_f64().expect("a number");
    let (ours, theirs) = (number(&report["bits_per_byte"]), number(&evaluated["bits_per_byte"]));
    assert!((ours / theirs - 1.0).abs() < 1e-5, "{ours} for {theirs}");
    let held = 8.0 * number(&report["xz_bytes"]) - number(&report["residual_bits"]);
    let per_parameter = number(&report["bits_per_parameter"]);
    assert!((held / number(&report["parameters"]) / per_parameter - 1.0).abs() < 1e-12);
}

/// Passages are counted as a naive search finds them, overlapping ones too.
#[test]
fn occurrences_match_a_naive_search() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = Arc::new(Tokenizer::load(&trained().model()).unwrap());
    let path = folder.path().join("tokens");
    let mut writer = TokenWriter::create(&path, &tokenizer).unwrap();
    let text = |n: usize| format!("{}{}", "ab".repeat(n), "xyz ".repeat(n % 3));
    let documents = (0..9).map(|n| Ok(Document::new(format!("{n}.c"), text(n))));
    writer.write(documents, |_| ()).unwrap();
    writer.finish([0; 32]).unwrap();
    let file = TokenFile::open(&path).unwrap();
    let mut ids = vec![0; file.tokens()];
    file.read(0, &mut ids).unwrap();
    for length in [1, 2, 3, 7] {
        let starts: Vec<usize> = (0..=ids.len() - length).collect();
        let naive = starts.iter().map(|&start| {
            let passage = &ids[start..start + length];
            ids.windows(length).filter(|other| *other == passage).count() as u64
        });
        let naive: Vec<u64> = naive.collect();
        assert!(naive.iter().any(|&count| count > 3));
        assert_eq!(
            count(&file, &starts, length, &file, |_| true).unwrap(),
            naive,
            "{length} tokens"
        );
    }
}

/// A control has no window that the trained text has: long lines in reverse order are full of it.
#[test]
fn windows_of_known_passages_are_left_out_of_controls() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = Arc::new(Tokenizer::load(&trained().model()).unwrap());
    let cut = |name: &str, lines: &[String]| {
        let path = folder.path().join(name);
        let mut writer = TokenWriter::create(&path, &tokenizer).unwrap();
        let document = Document::new("a.c".to_string(), lines.concat());
        writer.write([Ok(document)], |_| ()).unwrap();
        writer.finish([0; 32]).unwrap();
        let file = Arc::new(TokenFile::open(&path).unwrap());
        Windows::spaced(file, tokenizer.clone(), 16, 5).unwrap()
    };
    let line = |n: usize| {
        let words: Vec<String> = (0..40).map(|at| format!("w{}", n * 40 + at)).collect();
        words.join(" ") + "\n"
    };
    let lines: Vec<String> = (0..5).map(line).collect();
    let reversed: Vec<String> = lines.iter().rev().cloned().collect();
    let (text, control) = (cut("text", &lines), cut("control", &reversed));
    let all = |windows: &Windows| windows.within_documents().unwrap();
    let left = |windows: &Windows, is_counted: fn(&Range<usize>) -> bool| {
        unknown(windows, all(windows), 16, text.file(), is_counted).unwrap()
    };
    assert!(left(&text, |_| true).is_empty());
    assert_eq!(left(&text, |_| false), all(&text));
    // Those that go from one line to another, and begin with the path.
    let kept = left(&control, |_| true);
    assert!(!kept.is_empty() && kept.len() < all(&control).len() / 3, "{kept:?}");
    // Too short for a passage.
    assert_eq!(unknown(&text, all(&text), 10_000, text.file(), |_| true).unwrap(), all(&text));
}

/// A training that holds files out and measures recall, and what is then measured of it: the held-out control,
/// occurrences, recall, rounding, in JSON and CSV; and rebuild, which counts held-out files apart.
#[test]
fn research_measures_of_a_run_with_held_out_files() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir(at("source")).unwrap();
    let lines = |n: usize| {
        let words = ["int", "long", "char"];
        let line = |at| format!("{} v{}{at};\n", words[(n + at) % 3], n * 7);
        (0..4).map(line).collect::<Vec<_>>().concat()
    };
    for n in 0..6 {
        // The first file is there twice.
        fs::write(at("source").join(format!("{n}.c")), lines(n.max(1))).unwrap();
    }
    let source = at("source");
    crate::training::trained(
        &at("model"),
        &format!(
            "--source {} --limit 9 --windows addressed --validation 0.15 --validation_steps 100 --eval_steps 20 \
             --max_steps 160 --batch_size 8 --optimizer muon --weight_decay 0 --hidden_size 48 \
             --intermediate_size 96 --num_attention_heads 3 --num_key_value_heads 3 --save_steps 100",
            source.display()
        ),
    );
    let (model, report) = (at("model"), at("report"));
    let output = run(&[
        "memorization",
        text(&model),
        "--source",
        text(&source),
        "--prefix=4",
        "--suffix=12",
        "--json",
        "--report",
        text(&report),
    ]);
    assert_eq!(output.status.code(), Some(0));
    let json = json_of(&output);
    let held_out = &json["control"]["held_out"];
    assert_eq!(json["verbatim_rate"], 1.0, "{json:#}");
    assert_eq!((&json["files"].as_array().unwrap().len(), &held_out["files"]), (&5, &1.into()));
    assert!(held_out["verbatim_rate"].as_f64().unwrap() < 0.5, "{held_out:#}");
    assert!(held_out["bits_per_byte"].as_f64().unwrap() > 0.5, "{held_out:#}");
    let [low, high] = [0, 1].map(|at| json["verbatim_interval"][at].as_f64().unwrap());
    assert!(high == 1.0 && low > 0.2 && low < 1.0);
    // Two of the five files are the same text.
    let tallies = json["by_occurrence"].as_array().unwrap();
    let tally = |at: usize| {
        (tallies[at]["from"].as_u64(), tallies[at]["to"].as_u64(), tallies[at]["windows"].as_u64())
    };
    assert_eq!((tally(0).0, tally(0).1), (Some(1), Some(1)));
    assert_eq!((tally(1).0, tally(1).1), (Some(2), Some(3)));
    assert_eq!(tally(0).2.unwrap(), 3 * tally(1).2.unwrap() / 2);
    let recall = &json["recall"]["by_step"];
    assert_eq!(recall.as_array().unwrap().len(), 8);
    let last = &recall[7];
    assert_eq!((&last["step"], &last["lasting"]), (&160.into(), &last["verbatim"]));
    assert!(
        last["first"].as_u64() >= last["lasting"].as_u64()
            && last["verbatim"] == json["recall"]["windows"]
    );
    for name in ["as_saved", "bfloat16", "q8_0"] {
        assert!(json["rounding"][name]["verbatim"]["windows"].as_u64() > Some(0), "{name}");
    }
    assert_eq!(json["rounding"]["as_saved"]["bits_per_byte"], json["bits_per_byte"]);
    assert_ne!(json["rounding"]["q8_0"]["bits_per_byte"], json["bits_per_byte"]);
    assert!(json["papers"]["discoverable"].as_str().unwrap().contains("Hayes et al. 2024"));
    let read = |name: &str| fs::read_to_string(report.join(name)).unwrap();
    let windows = read("windows.csv");
    assert!(windows.starts_with(
        "path,chunk,verbatim,log10_p_z,occurrences,first_recall_step,lasting_recall_step,held_out\n"
    ));
    let rows: Vec<Vec<&str>> =
        windows.lines().skip(1).map(|row| row.split(',').collect()).collect();
    let of = |path: &str| rows.iter().filter(|row| row[0] == path).collect::<Vec<_>>();
    assert!(
        of("0.c").iter().all(|row| row[4] == "2" && row[7] == "0" && !row[5].is_empty()),
        "{windows}"
    );
    assert!(of("2.c").iter().all(|row| row[4] == "1" && row[6].parse::<u64>().unwrap() % 20 == 0));
    assert!(
        of("5.c").iter().all(|row| row[5].is_empty() && row[7] == "1") && !of("5.c").is_empty()
    );
    let rates = read("rates.csv");
    for row in [
        "verbatim_rate,held_out,Carlini et al. 2022,",
        "verbatim_rate,q8_0,",
        "discoverable,n 10 p 0.5,Hayes et al. 2024,",
        "by_occurrence,2 to 3 occurrences,",
    ] {
        assert!(
            rates.lines().any(|line| line.starts_with(row) && line.split(',').count() == 8),
            "{row}: {rates}"
        );
    }
    // A text of its own as the control.
    let other = at("other.c");
    fs::write(&other, "while (true) { break; }\n".repeat(9)).unwrap();
    let other = json_of(&run(&[
        "memorization",
        text(&model),
        "--source",
        text(&source),
        "--prefix=4",
        "--suffix=12",
        "--json",
        "--held-out",
        text(&other),
    ]));
    assert_eq!(
        (&other["control"]["held_out"]["verbatim_rate"], &other["windows"]),
        (&0.0.into(), &json["windows"])
    );

    let rebuilt = at("rebuilt");
    let output = run(&[
        "rebuild",
        text(&model),
        "--output",
        text(&rebuilt),
        "--compare",
        text(&source),
        "--json",
    ]);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let rebuilt = json_of(&output);
    assert_eq!(
        (&rebuilt["files_exact"], &rebuilt["missing"], &rebuilt["held_out"]),
        (&5.into(), &json!([]), &json!(["5.c"]))
    );
    fs::create_dir(model.join("memorization")).unwrap();
    fs::copy(report.join("memorization.json"), model.join("memorization/memorization.json"))
        .unwrap();
    let output = run(&["report", text(&model)]);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let page = fs::read_to_string(model.join("report.html")).unwrap();
    for title in ["Validation loss", "Recall in training", "Verbatim windows by occurrences"] {
        assert!(page.contains(&format!("<b>{title}</b>")), "{title}");
    }
    assert!(page.contains("held-out text") && page.contains("Cooper et al. 2025"));
}

#[test]
fn memorization_report_files_match_json() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("measures");
    let report = measured(&["--prefix=8", "--suffix=8", "--report", text(&place)]);
    let read = |name: &str| fs::read_to_string(place.join(name)).unwrap();
    let written: Value = serde_json::from_str(&read("memorization.json")).unwrap();
    assert_eq!(written, report);
    let rows = |name: &str| read(name).lines().count() - 1;
    assert_eq!(rows("files.csv"), documents().len());
    let asked = report["prefixes"][0]["windows"].as_u64().unwrap();
    assert_eq!(rows("windows.csv") as u64, asked);
    assert!(read("windows.csv").lines().skip(1).all(|row| row.split(',').nth(2) == Some("1")));
    let heat: Value = serde_json::from_str(&read("heat.json")).unwrap();
    for (heat, document) in heat["files"].as_array().unwrap().iter().zip(documents()) {
        assert_eq!(heat["text"], document.text);
        let cells = heat["cells"].as_array().unwrap();
        let bytes: u64 = cells.iter().map(|cell| cell[0].as_u64().unwrap()).sum();
        assert_eq!(bytes, document.text.len() as u64);
        assert_eq!(heat["wrong"].as_array().unwrap().len(), 0);
        assert!(cells.iter().all(|cell| cell[1].is_number()));
    }
}

/// Windows that overlap count a token once, and what no window predicts is not drawn as known.
#[test]
fn overlapping_windows_count_a_token_once_and_gaps_are_not_measured() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("measures");
    let documents = documents();
    for (stride, is_overlapping) in [("--stride=4", true), ("--stride=150", false)] {
        let report = measured(&["--prefix=8", "--suffix=8", stride, "--report", text(&place)]);
        for name in ["longest_run", "longest_run_bytes", "residual_bits", "bits_per_parameter"] {
            assert!(report[name].is_null(), "{name}");
        }
        for file in report["files"].as_array().unwrap() {
            let document = documents.iter().find(|document| file["path"] == document.path);
            let length = document.unwrap().text.len() as u64;
            let bytes = file["bytes"].as_u64().unwrap();
            assert!(bytes <= length && (!is_overlapping || bytes + 40 > length), "{file}");
        }
        let heat = fs::read_to_string(place.join("heat.json")).unwrap();
        let heat: Value = serde_json::from_str(&heat).unwrap();
        let files = heat["files"].as_array().unwrap();
        let cells = files.iter().flat_map(|file| file["cells"].as_array().unwrap());
        let (known, unknown): (Vec<_>, Vec<_>) = cells.partition(|cell| cell[1].is_number());
        assert_eq!(known.len() > unknown.len(), is_overlapping, "{heat}");
    }
}
