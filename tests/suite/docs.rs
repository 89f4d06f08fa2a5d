//! The documentation: commands that the program accepts, and README's that run; files, flags and names that
//! exist; formats that `read_formats.py` reads by their specification alone.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use laam::tokens::TokenFile;
use regex::Regex;
use serde_json::Value;

use crate::fetch::mirror;
use crate::foreign::{chapters, foreign_model};
use crate::support::laam;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// The pages of the documentation.
fn pages() -> Vec<PathBuf> {
    let root = Path::new(ROOT);
    let mut pages: Vec<_> = [
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "crates/ptx-race/README.md",
        "crates/cuda-standin/README.md",
    ]
    .map(|name| root.join(name))
    .to_vec();
    for folder in ["docs", "docs/kernels"] {
        let entries = fs::read_dir(root.join(folder)).unwrap().map(|entry| entry.unwrap().path());
        pages.extend(entries.filter(|path| path.extension().is_some_and(|suffix| suffix == "md")));
    }
    pages
}

/// Commands of a page that begin with `laam`: indented lines, and code within the text.
fn commands(page: &str) -> Vec<String> {
    let joined = page.replace("\\\n", " ");
    let lines = joined.lines().filter_map(|line| line.strip_prefix("    "));
    let text =
        joined.lines().filter(|line| !line.starts_with("    ")).collect::<Vec<_>>().join(" ");
    let inline = text.split('`').skip(1).step_by(2).map(str::to_string);
    let is_command = |line: &String| line.starts_with("laam ") && !line.contains("COMMAND");
    lines.map(str::to_string).chain(inline).filter(is_command).collect()
}

/// Arguments of a shell command with single quotes and a comment at its end.
fn arguments(command: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut quoted = false;
    for c in command.chars() {
        match c {
            '\'' => quoted = !quoted,
            '#' if !quoted && words.last().is_some_and(String::is_empty) => break,
            ' ' if !quoted => words.push(String::new()),
            _ => words.last_mut().unwrap().push(c),
        }
    }
    words.into_iter().skip(1).filter(|word| !word.is_empty()).collect()
}

#[test]
fn documented_commands_are_accepted() {
    let mut count = 0;
    for page in pages() {
        for command in commands(&fs::read_to_string(&page).unwrap()) {
            // Arguments before --help are checked; the command is not run.
            let output = laam().args(arguments(&command)).arg("--help").output().unwrap();
            let error = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{}: {command}\n{error}", page.display());
            count += 1;
        }
    }
    assert!(count > 50, "{count} commands found");
    let output = laam().args(arguments("laam train --no-such 'a b' # c")).arg("--help").output();
    assert_eq!(output.unwrap().status.code(), Some(2));
}

/// README's commands, in the order of the page and in one folder, on small texts and models: those that train are
/// cut to two steps, downloads come from a server of this test, GPUs are the simulator's.
#[test]
fn readme_commands_run() {
    let readme = fs::read_to_string(Path::new(ROOT).join("README.md")).unwrap();
    let joined = readme.replace("\\\n", " ");
    let commands: Vec<_> = joined.lines().filter_map(|line| line.strip_prefix("    ")).collect();
    let folder = tempfile::tempdir().unwrap();
    let place = |name: &str| folder.path().join(name);
    fs::write(place("book.txt"), &chapters()[..4000]).unwrap();
    fs::create_dir(place("shards")).unwrap();
    let text = chapters();
    for shard in ["0", "1"] {
        let lines = text.lines().take(30).map(|line| format!("{{\"content\": \"{line}\"}}\n"));
        let packed = zstd::encode_all(lines.collect::<String>().as_bytes(), 1).unwrap();
        fs::write(place("shards").join(format!("{shard}.jsonl.zst")), packed).unwrap();
    }
    fs::create_dir(place("Llama-3.2-1B")).unwrap();
    for file in fs::read_dir(foreign_model()).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), place("Llama-3.2-1B").join(file.file_name())).unwrap();
    }
    fs::create_dir_all(place("linux/kernel")).unwrap();
    fs::write(place("linux/kernel/fork.c"), "int main(void)\n{\n\treturn 0;\n}\n").unwrap();
    let shape = "--hidden_size 16 --intermediate_size 24 --num_hidden_layers 1 --num_attention_heads 2 \
                 --num_key_value_heads 2";
    let keys = shape.split(" --").map(|pair| pair.trim_start_matches("--").replace(' ', " = "));
    let keys = keys.collect::<Vec<_>>().join("\n");
    let recipe = format!(
        "description = 'short'\nrebuild = true\n[tokenizer]\nvocab_size = 300\n[[stage]]\nname = 'model'\n\
         windows = 'addressed'\nmax_position_embeddings = 128\nbatch_size = 4\nmax_steps = 2\n\
         warmup_steps = 0\n{keys}\n"
    );
    fs::write(place("short.toml"), recipe).unwrap();
    let server = mirror(&text[..4000]);

    let mut left_out = Vec::new();
    for command in commands {
        let mut words = arguments(&format!("x {command}"));
        let program = words.remove(0);
        match program.as_str() {
            "laam" => {}
            "cargo" if words == ["run", "--release", "--", "run"] => {
                words.drain(..3);
            }
            // The output of a command, shown.
            "training" | "..." | "step" | "trained" | "9" | "compiled" => continue,
            _ => {
                left_out.push(command);
                continue;
            }
        }
        let (verb, more) = (words[0].clone(), words[1..].join(" "));
        // A flag that is given twice is an error: those of the page are replaced.
        let mut set = |flag: &str, value: &str| match words.iter().position(|word| word == flag) {
            Some(at) => words[at + 1] = value.to_string(),
            None => words.extend([flag.to_string(), value.to_string()]),
        };
        let mut may_fail = false;
        match verb.as_str() {
            "run" => {
                let recipe = more.split("--recipe ").nth(1).unwrap_or("sample");
                let recipe = recipe.split(' ').next().unwrap();
                set("--recipe", "short.toml");
                // What the recipe itself says.
                if recipe != "sample" && !more.contains("--source") {
                    set("--version", "v1.0/1.0");
                }
                if !more.contains("--output") {
                    set("--output", &format!("runs/{recipe}"));
                }
                // 1: not everything was memorized.
                may_fail = true;
            }
            "train-tokenizer" => set("--vocab_size", "300"),
            "train" => {
                set("--max_steps", "2");
                if !more.contains("--init_from") && !more.contains("--reload") {
                    for pair in shape.split("--").skip(1) {
                        let (flag, value) = pair.trim().split_once(' ').unwrap();
                        set(&format!("--{flag}"), value);
                    }
                }
                set("--max_position_embeddings", "128");
                if more.contains("--batch_size 64") {
                    set("--batch_size", "2");
                }
            }
            "cat" | "rebuild" => may_fail = true,
            "bench" if more.is_empty() => {
                // The page of figures takes minutes.
                left_out.push(command);
                continue;
            }
            "bench" => {
                set("--backend", "sim");
                for (flag, value) in [
                    ("--preset", "linux-5m"),
                    ("--batch", "1"),
                    ("--context", "8"),
                    ("--steps", "1"),
                    ("--warmup", "0"),
                ] {
                    if more.contains("step") {
                        set(flag, value);
                    }
                }
            }
            _ => {}
        }
        if words.iter().any(|word| word == "--version") {
            words.extend(["--mirror_uri".to_string(), server.clone()]);
        }
        let mut run = laam();
        run.current_dir(&folder).env("LAAM_CACHE", place("cache")).args(&words);
        let output = run.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        let fine = output.status.success() || (may_fail && output.status.code() == Some(1));
        assert!(fine, "{command}\n{words:?}\n{said}");
    }
    let left_out: Vec<_> =
        left_out.iter().map(|command| command.split("  ").next().unwrap()).collect();
    // Each of these is checked otherwise, or takes hours.
    assert_eq!(
        left_out,
        ["scripts/test", "diff -r linux/kernel runs/kernel/rebuilt", "laam bench"]
    );
}

/// `read_formats.py` knows `docs/formats.md` and nothing else of laam.
#[test]
fn files_are_as_their_specification_says() {
    let folder = tempfile::tempdir().unwrap();
    let place = |name: &str| folder.path().join(name).display().to_string();
    fs::create_dir(place("source")).unwrap();
    for (name, text) in [("a.c", &chapters()[..3000]), ("b.txt", &chapters()[3000..7001])] {
        fs::write(folder.path().join("source").join(name), text).unwrap();
    }
    let (source, tokenizer) = (place("source"), place("tokenizer"));
    let run = |arguments: &str, more: &[&str]| {
        let mut command = laam();
        command.args(arguments.split_whitespace()).args(["--source", &source]).args(more);
        let output = command.env("LAAM_CACHE", place("cache")).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    run("train-tokenizer --vocab_size 300", &["--output_path", &tokenizer]);
    let (tokens, output) = (place("all.tokens"), place("run"));
    run("tokenize", &["--tokenizer_path", &tokenizer, "--output", &tokens]);
    run(
        "train --hidden_size 16 --intermediate_size 24 --num_hidden_layers 1 --num_attention_heads 2 \
         --num_key_value_heads 2 --max_position_embeddings 128 --max_steps 4 --save_steps 2 --logging_steps 1 \
         --validation 0.2 --validation_steps 2 --eval_steps 2 --sample_steps 2 --include *.c --include *.txt",
        &["--tokenizer_path", &tokenizer, "--output_path", &output],
    );
    // The run took the same files.
    let script = Path::new(ROOT).join("tests/suite/read_formats.py");
    let read = Command::new("python3").arg(script).args([&tokens, &output, "2"]).output();
    let Ok(read) = read else {
        eprintln!("SKIPPED: files by their specification: there is no python3");
        return;
    };
    assert!(read.status.success(), "{}", String::from_utf8_lossy(&read.stderr));
    let read: Value = serde_json::from_slice(&read.stdout).unwrap();
    let file = TokenFile::open(Path::new(&tokens)).unwrap();
    let documents = read["tokens"]["documents"].as_array().unwrap();
    assert_eq!(documents.len(), file.documents());
    for (index, document) in documents.iter().enumerate() {
        let expected = file.document(index).unwrap();
        assert_eq!(document["path"], expected.path);
        let ids: Vec<u32> = serde_json::from_value(document["ids"].clone()).unwrap();
        let mut tokens = vec![0; expected.tokens.len()];
        file.read(expected.tokens.start, &mut tokens).unwrap();
        assert_eq!(
            (ids, document["header"].as_u64()),
            (tokens, Some((expected.text - expected.tokens.start) as u64))
        );
    }
    assert_eq!((&read["state"]["step"], read["metrics"].as_array().unwrap().len()), (&2.into(), 4));
}

/// Text of the repository's sources without fixtures and generated files.
fn sources() -> Vec<(PathBuf, String)> {
    let root = Path::new(ROOT);
    let mut folders = vec![root.to_path_buf()];
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap()) {
            let (path, name) = (entry.path(), entry.file_name());
            let is_skipped = ["target", "fixtures", "prebuilt", "benchmarks", "runs"];
            let is_link = entry.file_type().unwrap().is_symlink();
            if is_link
                || is_skipped.iter().any(|skipped| name == *skipped)
                || name == ".git"
                || name == ".venv"
            {
                continue;
            }
            if path.is_dir() {
                folders.push(path);
            } else if let Ok(text) = fs::read_to_string(&path) {
                files.push((path.strip_prefix(root).unwrap().to_path_buf(), text));
            }
        }
    }
    files
}

/// Code within the text of a page, and its indented lines.
fn code(page: &str) -> (Vec<String>, Vec<String>) {
    let joined = page.replace("\\\n", " ");
    let (lines, text): (Vec<_>, Vec<_>) = joined.lines().partition(|line| line.starts_with("    "));
    let spans = text.join(" ").split('`').skip(1).step_by(2).map(str::to_string).collect();
    (spans, lines.into_iter().map(str::to_string).collect())
}

/// Flags of other programs that the documentation names.
const FOREIGN_FLAGS: [&str; 14] = [
    "--allow-run-as-root",
    "--bench",
    "--bind-to",
    "--doc",
    "--example",
    "--fmad",
    "--interleave",
    "--mpi",
    "--no-python",
    "--nproc-per-node",
    "--oversubscribe",
    "--path",
    "--shm-size",
    "--signal",
];

/// Paths, flags and names in code of the documentation.
#[test]
fn documented_files_flags_and_names_exist() {
    let sources = sources();
    let read = |pattern: &str, text: &str| -> Vec<String> {
        Regex::new(pattern)
            .unwrap()
            .find_iter(text)
            .map(|found| found.as_str().to_string())
            .collect()
    };
    let is_page = |path: &Path| path.extension().is_some_and(|suffix| suffix == "md");
    let words: HashSet<_> = sources
        .iter()
        .filter(|(path, _)| !is_page(path))
        .flat_map(|(_, text)| read("[A-Za-z0-9_]+", text))
        .collect();
    let flag = "--[a-z][a-z0-9_-]*";
    let completions = laam().args(["completions", "bash"]).output().unwrap().stdout;
    let mut flags: HashSet<_> =
        read(flag, std::str::from_utf8(&completions).unwrap()).into_iter().collect();
    let with_flags =
        ["scripts", "benches/pytorch", "crates/ptx-race/src/command.rs", "crates/fuzz/src/main.rs"];
    for (path, text) in &sources {
        if with_flags.iter().any(|start| path.starts_with(start)) {
            flags.extend(read(flag, text).iter().map(|flag| flag.replace('_', "-")));
        }
    }
    flags.extend(FOREIGN_FLAGS.map(String::from));
    let paths: Vec<_> = sources.iter().map(|(path, _)| format!("/{}", path.display())).collect();
    let file = Regex::new(
        r"\.(rs|cu|cuh|md|py|toml|tsv)$|^(src|docs|kernels|tests|scripts|crates|benches|sweeps|examples)/",
    )
    .unwrap();
    let placeholder = Regex::new(r"[*{<]|NAME|[a-z0-9]_[A-Z]+$").unwrap();
    let name = Regex::new(r"^([A-Za-z_][A-Za-z0-9_]*(::)?)+(\(\))?$").unwrap();

    let mut wrong = Vec::new();
    let mut counts = [0; 3];
    for page in pages() {
        let (spans, lines) = code(&fs::read_to_string(&page).unwrap());
        let mut check = |kind: usize, what: &str, exists: bool| {
            counts[kind] += 1;
            if !exists {
                wrong.push(format!("{}: {what}", page.display()));
            }
        };
        for text in spans.iter().chain(&lines) {
            for flag in read("(^|[ (`])--[a-z][a-z0-9_-]*", text) {
                let flag = flag.trim_start_matches([' ', '(', '`']).replace('_', "-");
                check(0, &flag, flags.contains(&flag));
            }
        }
        for span in spans.iter().filter(|span| !placeholder.is_match(span)) {
            for word in span.split_whitespace().filter(|word| file.is_match(word)) {
                let path = format!("/{}", word.trim_end_matches('/'));
                let inside = format!("{path}/");
                let is_found = paths.iter().any(|p| p.ends_with(&path) || p.contains(&inside));
                check(1, word, is_found || Path::new(ROOT).join(word).exists());
            }
            if name.is_match(span) && (span.contains('_') || span.contains("::")) {
                let parts = span.trim_end_matches("()").split("::").filter(|part| !part.is_empty());
                check(2, span, parts.into_iter().all(|part| words.contains(part)));
            }
        }
    }
    assert!(wrong.is_empty(), "not in the repository:\n{}", wrong.join("\n"));
    assert!(counts.iter().all(|&count| count > 150), "{counts:?} flags, paths and names found");
}

#[test]
fn documentation_links_to_files_that_exist() {
    let mut count = 0;
    for page in pages() {
        let text = fs::read_to_string(&page).unwrap();
        for link in text.split("](").skip(1).map(|rest| rest.split(')').next().unwrap()) {
            if !link.starts_with("http") && !link.starts_with('#') {
                let file = link.split('#').next().unwrap();
                assert!(page.with_file_name(file).exists(), "{}: {link}", page.display());
                count += 1;
            }
        }
    }
    assert!(count > 50, "{count} links found");
}
