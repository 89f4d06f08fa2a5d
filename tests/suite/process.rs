//! What surrounds the process: output that nobody reads, signals, and text that acts on a terminal.

use std::ffi::c_int;
use std::fs::{self, File};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::hostile_files::{copy, tiny_run};
use crate::support::{error_in, laam};

/// A command on a copy of the tiny run. `DIR` in an argument stands for the copy.
fn command(folder: &Path, line: &str) -> Command {
    let folder = folder.to_str().unwrap();
    let mut command = laam();
    command.args(line.split_whitespace().map(|word| word.replace("DIR", folder)));
    command.stdin(Stdio::null());
    command
}

/// The write end of a pipe that nobody reads.
fn unread() -> Stdio {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    writer.into()
}

/// A full disk.
fn full() -> Stdio {
    File::options().write(true).open("/dev/full").unwrap().into()
}

const TRAIN: &str = "train --limit 1 --tokenizer_path DIR/run/tokenizer --hidden_size 8 \
    --intermediate_size 8 --num_hidden_layers 1 --num_attention_heads 1 --num_key_value_heads 1 \
    --max_position_embeddings 32 --logging_steps 1";

#[test]
fn output_that_nobody_reads_ends_no_command() {
    let folder = tempfile::tempdir().unwrap();
    copy(tiny_run(), folder.path());
    let at = |name: &str| folder.path().join(name);
    fs::write(at("sweep.toml"), "recipe = 'tiny.toml'\n[grid]\nseed = [1, 2]\n").unwrap();
    let train = format!("{TRAIN} --max_steps 40 --output_path DIR/trained");
    let listed = command(folder.path(), "ls DIR/run/model").output().unwrap().stdout;
    let cat = format!("cat DIR/run/model {} --max_tokens 4", String::from_utf8(listed).unwrap());
    // What each leaves behind, or nothing.
    let commands = [
        (train.as_str(), "trained/model.safetensors"),
        ("run --recipe DIR/tiny.toml --limit 1 --output DIR/again", "again/report.html"),
        ("sweep DIR/sweep.toml --limit 1 --output DIR/swept", "swept/seed=2/result.json"),
        (
            "train-tokenizer --vocab_size 300 --output_path DIR/vocabulary",
            "vocabulary/tokenizer.json",
        ),
        ("tokenize --tokenizer_path DIR/run/tokenizer --output DIR/tokens", "tokens"),
        (
            "rebuild DIR/run/model --output DIR/rebuilt --max_tokens_per_file 4 --windows stream",
            "rebuilt/sample",
        ),
        (
            "memorization DIR/run/model --limit 1 --report DIR/measures",
            "measures/memorization.json",
        ),
        ("report DIR/run", "run/report.html"),
        ("evaluate DIR/run/model --limit 1", ""),
        ("generate DIR/run/model --max_new_tokens 4", ""),
        (cat.as_str(), ""),
        ("ls DIR/run/model", ""),
        ("plan --json", ""),
        ("doctor", ""),
        ("check --only swiglu", ""),
        ("train --help", ""),
        ("ls DIR/nowhere", ""),
        ("", ""),
    ];
    for (line, left) in commands {
        for (kind, sink) in [("a closed pipe", unread as fn() -> Stdio), ("a full disk", full)] {
            if !left.is_empty() && at(left).exists() {
                let top = at(left.split('/').next().unwrap());
                if top.is_dir() && !top.ends_with("run") {
                    fs::remove_dir_all(top).unwrap();
                } else {
                    fs::remove_file(at(left)).unwrap();
                }
            }
            let ended =
                command(folder.path(), line).stdout(sink()).stderr(sink()).status().unwrap();
            // cat: the file is cut off. ls of nowhere, and no command at all: an error.
            let expected = match line.split_whitespace().next() {
                Some("cat") if kind == "a closed pipe" => &[0, 1][..],
                _ if line.is_empty() || line.contains("nowhere") => &[2],
                // What stdout lost is an error once the work is done.
                _ if kind == "a full disk" => &[0, 1, 2],
                _ => &[0],
            };
            let code = ended.code();
            assert!(code.is_some_and(|code| expected.contains(&code)), "{line} to {kind}: {ended}");
            assert!(at(left).exists(), "{line} to {kind}: {left} is not there");
        }
    }
}

/// Waits until something is there, while the child runs.
#[track_caller]
fn wait_for(child: &mut Child, what: impl Fn() -> bool) {
    let began = Instant::now();
    while !what() {
        assert!(child.try_wait().unwrap().is_none(), "it ended too early");
        assert!(began.elapsed() < Duration::from_mins(1), "nothing came within a minute");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn send(child: &Child, signal: c_int) {
    // SAFETY: the child is ours and not waited for yet.
    assert_eq!(unsafe { libc::kill(child.id().cast_signed(), signal) }, 0);
}

fn said(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn start(mut command: Command) -> Child {
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Everything below a folder.
fn below(folder: &Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().map(Result::unwrap) {
        found.push(entry.path());
        found.extend(below(&entry.path()));
    }
    found
}

#[test]
fn an_interrupted_rebuild_or_measurement_says_how_to_go_on() {
    let folder = tempfile::tempdir().unwrap();
    copy(tiny_run(), folder.path());
    let recipe = folder.path().join("tiny.toml");
    let text = fs::read_to_string(&recipe).unwrap();
    fs::write(&recipe, format!("rebuild = true\n{text}")).unwrap();
    let temporary = folder.path().join("temporary");
    fs::create_dir(&temporary).unwrap();
    // An untrained model never ends a file: a rebuild takes long.
    for (line, sign, signal) in [
        ("run --recipe DIR/tiny.toml --output DIR/again", "again/rebuilt", libc::SIGINT),
        ("rebuild DIR/run/model --windows stream --output DIR/rebuilt", "rebuilt", libc::SIGTERM),
        ("memorization DIR/run/model --report DIR/measures", "temporary/laam-PID-0", libc::SIGINT),
        ("evaluate DIR/run/model --json", "temporary/laam-PID-0", libc::SIGTERM),
    ] {
        let mut command = command(folder.path(), line);
        command.env("TMPDIR", &temporary);
        let mut child = start(command);
        let sign = folder.path().join(sign.replace("PID", &child.id().to_string()));
        wait_for(&mut child, || sign.exists());
        send(&child, signal);
        let ended = child.wait_with_output().unwrap();
        let text = said(&ended);
        assert_eq!(ended.status.code(), Some(130), "{line}: {text}");
        assert!(text.contains("run the same command again"), "{line}: {text}");
        assert!(!text.contains("--resume") && !text.contains("then saving"), "{line}: {text}");
        let left = below(folder.path());
        assert!(!left.iter().any(|path| path.to_string_lossy().ends_with(".tmp")), "{left:?}");
        assert!(below(&temporary).is_empty(), "{line}");
        if line.ends_with("--json") {
            let printed: serde_json::Value = serde_json::from_slice(&ended.stdout).unwrap();
            assert_eq!(printed["interrupted"], true);
        }
    }
}

#[test]
fn a_lost_terminal_saves_the_run_and_nohup_keeps_it() {
    for ignored in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        copy(tiny_run(), folder.path());
        let output = folder.path().join("trained");
        let steps = if ignored { 300 } else { 100_000 };
        let line = format!("{TRAIN} --max_steps {steps} --output_path DIR/trained");
        let mut command = command(folder.path(), &line);
        // The tests themselves may run under nohup.
        let disposition = if ignored { libc::SIG_IGN } else { libc::SIG_DFL };
        let dispose = move || {
            // SAFETY: the call may be made between fork and exec.
            unsafe { libc::signal(libc::SIGHUP, disposition) };
            Ok(())
        };
        // SAFETY: the closure makes one system call and allocates nothing.
        unsafe { command.pre_exec(dispose) };
        let mut child = start(command);
        wait_for(&mut child, || output.join("metrics.jsonl").exists());
        // As a shell and the kernel do, both.
        send(&child, libc::SIGHUP);
        send(&child, libc::SIGHUP);
        let ended = child.wait_with_output().unwrap();
        let text = said(&ended);
        if ignored {
            assert_eq!(ended.status.code(), Some(0), "{:?} {text}", ended.status.signal());
            assert!(output.join("model.safetensors").exists());
        } else {
            assert_eq!(ended.status.code(), Some(130), "{:?} {text}", ended.status.signal());
            assert!(text.contains("--resume goes on"), "{text}");
        }
    }
}

/// Text that clears the screen, and text that turns around what follows.
const ACTIVE: &str = "\u{1b}[2J\u{9b}31m\u{202e}\u{2066}\u{200f}";

#[track_caller]
fn assert_plain(what: &str, output: &Output) {
    for bytes in [&output.stdout, &output.stderr] {
        let text = String::from_utf8(bytes.clone()).unwrap();
        let active = |&c: &char| (c.is_control() && !"\n\t".contains(c)) || ACTIVE[4..].contains(c);
        let found: Vec<char> =
            text.chars().filter(active).filter(|&c| !c.is_ascii_alphanumeric()).collect();
        assert!(found.is_empty(), "{what}: {found:?} in {text:?}");
    }
}

#[test]
fn text_that_acts_on_a_terminal_is_escaped_wherever_it_is_printed() {
    let folder = tempfile::tempdir().unwrap();
    copy(tiny_run(), folder.path());
    let at = |name: &str| folder.path().join(name);
    let run = |line: &str| command(folder.path(), line).output().unwrap();
    let json = |name: &str| -> serde_json::Value {
        serde_json::from_slice(&fs::read(at(name)).unwrap()).unwrap()
    };

    // Provenance: a name that is allowed, one that is not, and a window kind.
    let good = json("run/model/provenance.json");
    let mut bad = good.clone();
    bad["corpus"]["paths"] = serde_json::json!(["a\u{202e}c.h", "b\u{2066}.c"]);
    fs::write(at("run/model/provenance.json"), bad.to_string()).unwrap();
    let listed = run("ls DIR/run/model");
    assert_plain("ls", &listed);
    assert_eq!(String::from_utf8(listed.stdout).unwrap(), "a\\u{202e}c.h\nb\\u{2066}.c\n");
    let listed = run("ls DIR/run/model --json");
    assert_plain("ls --json", &listed);
    let names: serde_json::Value = serde_json::from_slice(&listed.stdout).unwrap();
    assert_eq!(names["paths"], bad["corpus"]["paths"], "as JSON the names are what they are");
    let rebuilt =
        run("rebuild DIR/run/model --windows stream --output DIR/rebuilt --max_tokens_per_file 2");
    assert!(rebuilt.status.success(), "{rebuilt:?}");
    assert!(said(&rebuilt).contains("\\u{202e}"), "{}", said(&rebuilt));
    assert_plain("rebuild", &rebuilt);
    bad["corpus"]["paths"] = serde_json::json!([format!("x{ACTIVE}.c")]);
    fs::write(at("run/model/provenance.json"), bad.to_string()).unwrap();
    for line in ["ls DIR/run/model", "rebuild DIR/run/model --output DIR/no"] {
        let output = run(line);
        error_in(&output);
        assert_plain(line, &output);
    }
    fs::write(at("run/model/provenance.json"), good.to_string()).unwrap();

    // A recipe and a sweep: an unknown key, a value, and the name of a stage.
    let escaped: Vec<_> = ACTIVE.chars().map(|c| format!("\\U{:08x}", u32::from(c))).collect();
    let escaped = escaped.concat();
    for (name, text) in [
        ("key.toml", format!("description = 'x'\n\"{escaped}\" = 1\n")),
        (
            "value.toml",
            format!("description = 'x'\nversion = \"{escaped}\"\n[[stage]]\nname = 'a'\n"),
        ),
        ("raw.toml", format!("description = {ACTIVE}\n")),
    ] {
        fs::write(at(name), text).unwrap();
        for line in [format!("run --recipe DIR/{name} --output DIR/o"), format!("sweep DIR/{name}")]
        {
            let output = run(&line);
            error_in(&output);
            assert_plain(&line, &output);
        }
    }

    // Tensors' names and metadata.
    let safetensors = |header: &str| {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend([0; 4]);
        bytes
    };
    let name = serde_json::json!(ACTIVE).to_string();
    let header = format!("{{{name}:{{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}}}");
    let weights = fs::read(at("run/model/model.safetensors")).unwrap();
    for header in [&header, &header.replace("F32", ACTIVE), &header.replace("dtype", ACTIVE)] {
        fs::write(at("run/model/model.safetensors"), safetensors(header)).unwrap();
        let output = run("generate DIR/run/model --max_new_tokens 1 --json");
        error_in(&output);
        assert_plain(header, &output);
    }
    // One tensor too many is a warning that names it.
    let length = u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize;
    let mut known: serde_json::Value = serde_json::from_slice(&weights[8..8 + length]).unwrap();
    let end = weights.len() - 8 - length;
    known[ACTIVE] =
        serde_json::json!({"dtype": "F32", "shape": [1], "data_offsets": [end, end + 4]});
    let mut more = safetensors(&known.to_string());
    more.truncate(more.len() - 4);
    more.extend(&weights[8 + length..]);
    more.extend([0; 4]);
    fs::write(at("run/model/model.safetensors"), more).unwrap();
    let output = run("generate DIR/run/model --max_new_tokens 1 --json");
    assert!(said(&output).contains("\\u{1b}"), "{output:?}");
    assert_plain("a tensor too many", &output);
    fs::write(at("run/model/model.safetensors"), &weights).unwrap();

    // config.json and the tokenizer.
    for file in ["run/model/config.json", "run/model/tokenizer.json", "run/run.json"] {
        let kept = fs::read(at(file)).unwrap();
        let mut bad = json(file);
        for key in ["model_type", "hidden_act", "recipe"] {
            if bad.get(key).is_some() {
                bad[key] = ACTIVE.into();
            }
        }
        bad["model"]["type"] = ACTIVE.into();
        fs::write(at(file), bad.to_string()).unwrap();
        for line in ["generate DIR/run/model --max_new_tokens 1 --json", "report DIR/run"] {
            assert_plain(file, &run(line));
        }
        fs::write(at(file), kept).unwrap();
    }

    // Members of an archive: kept ones and those left out.
    let mut tar = tar::Builder::new(Vec::new());
    for (name, text) in
        [("ok.c", &b"int x;\n"[..]), ("b\u{202e}.c", b"int y;\n"), ("c\u{2066}.c", b"\xff\xfe\n")]
    {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, text).unwrap();
    }
    fs::write(at("a.tar"), tar.into_inner().unwrap()).unwrap();
    for flags in ["", " --strict"] {
        let output = run(&format!(
            "tokenize --tokenizer_path DIR/run/tokenizer --output DIR/t --source DIR/a.tar{flags}"
        ));
        assert!(said(&output).contains("\\u{2066}"), "{}", said(&output));
        assert_plain("tokenize", &output);
    }
    // Arguments.
    let output = laam().args(["generate", ACTIVE]).output().unwrap();
    assert_plain("an argument", &output);
    let output = laam().args([ACTIVE]).output().unwrap();
    assert_plain("a command", &output);
}
