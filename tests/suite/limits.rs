//! Sizes that are too large, and what cannot be had: an error in bounded time and memory.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use laam::device::host_memory;
use laam::tokenizer::Style;
use serde_json::Value;

use crate::hostile_files::{copy, tiny_run};
use crate::support::{bounded, error_in, laam};
use crate::tokenizer::{small_corpus, train};

fn run(line: &str) -> Output {
    let mut command = laam();
    bounded(command.args(line.split_whitespace()), Duration::from_mins(1), 4 << 30)
}

#[test]
fn plans_are_checked_and_linear() {
    // Bytes beyond 63 bits are refused, and what fits is a number that adds up.
    let refused = error_in(&run("plan --max_position_embeddings 2147483648"));
    assert!(refused.contains("too large to plan"), "{refused}");
    let refused = error_in(&run(
        "plan --num_attention_heads 1 --num_key_value_heads 1 --hidden_size 8 --head_dim 2147483648",
    ));
    assert!(refused.contains("--head-dim"), "{refused}");
    for flags in [
        "--max_position_embeddings 1073741824 --batch_size 1",
        "--num_hidden_layers 2048 --max_position_embeddings 64",
    ] {
        let began = Instant::now();
        let output = run(&format!("plan --json --backend cpu {flags}"));
        assert!(began.elapsed() < Duration::from_secs(20), "{flags}: {:?}", began.elapsed());
        if flags.contains("1073741824") && output.status.code() == Some(2) {
            assert!(error_in(&output).contains("too large to plan"));
            continue;
        }
        assert!(output.status.success(), "{output:?}");
        let plan: Value = serde_json::from_slice(&output.stdout).unwrap();
        let parts = ["parameters", "gradients", "optimizer", "activations", "workspace"];
        let bytes = |name: &str| u128::from(plan[format!("bytes_{name}")].as_u64().unwrap());
        assert_eq!(bytes("peak"), parts.map(bytes).into_iter().sum::<u128>(), "{flags}");
        assert!(bytes("peak") < 1 << 62, "{flags}");
    }
}

#[test]
fn threads_that_cannot_be_had_are_an_error() {
    for threads in ["0", "4096", "1000000", "18446744073709551615"] {
        for command in ["plan", "run --output /tmp/none", "bench smoke --backend sim"] {
            let said = error_in(&run(&format!("{command} --threads {threads}")));
            assert!(said.contains("--threads"), "{said}");
        }
    }
    // A stack that no machine has room for: no thread can be started.
    let folder = tempfile::tempdir().unwrap();
    copy(tiny_run(), folder.path());
    for line in [
        "run --output DIR/fresh",
        "train-tokenizer --vocab_size 300 --output_path DIR/fresh",
        "tokenize --tokenizer_path DIR/run/tokenizer --output DIR/tokens",
        "evaluate DIR/run/model",
        "generate DIR/run/model --max_new_tokens 1",
        "rebuild DIR/run/model --output DIR/rebuilt",
    ] {
        let mut command = laam();
        let line = line.replace("DIR", folder.path().to_str().unwrap());
        command.args(line.split_whitespace()).env("RUST_MIN_STACK", (1u64 << 46).to_string());
        let said = error_in(&bounded(&mut command, Duration::from_mins(1), 1 << 40));
        assert!(said.contains("cannot start a thread"), "{line}: {said}");
    }
}

/// Makes the MLPs of a model so wide that its weights, read as f32, take more than `bytes`; the file is
/// sparse.
fn widen_mlp(model: &Path, bytes: u64) {
    let path = model.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let [hidden, layers] =
        ["hidden_size", "num_hidden_layers"].map(|name| config[name].as_u64().unwrap());
    let width = bytes / (4 * 3 * hidden * layers) + 1;
    config["intermediate_size"] = width.into();
    fs::write(&path, config.to_string()).unwrap();

    let path = model.join("model.safetensors");
    let stored = fs::read(&path).unwrap();
    let length = u64::from_le_bytes(stored[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&stored[8..8 + length]).unwrap();
    let mut end = 0;
    for (name, tensor) in header.as_object_mut().unwrap() {
        if name == "__metadata__" {
            continue;
        }
        let size = if tensor["dtype"] == "F32" { 4 } else { 2 };
        let shape = tensor["shape"].as_array_mut().unwrap();
        if name.contains(".mlp.") {
            shape[usize::from(name.contains("down_proj"))] = width.into();
        }
        let begin = end;
        end += size * shape.iter().map(|size| size.as_u64().unwrap()).product::<u64>();
        tensor["data_offsets"] = serde_json::json!([begin, end]);
    }
    let header = header.to_string();
    let head = [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat();
    fs::write(&path, &head).unwrap();
    fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(head.len() as u64 + end)
        .unwrap();
}

#[test]
fn models_beyond_the_memory_limit_are_refused_before_they_are_read() {
    let folder = tempfile::tempdir().unwrap();
    copy(tiny_run(), folder.path());
    widen_mlp(&folder.path().join("run/model"), 2 * host_memory().expect("of Linux"));
    let provenance = fs::read(folder.path().join("run/model/provenance.json")).unwrap();
    let provenance: Value = serde_json::from_slice(&provenance).unwrap();
    let file = provenance["corpus"]["paths"][0].as_str().unwrap();
    for line in [
        &format!("cat DIR/run/model {file}"),
        "evaluate DIR/run/model",
        "generate DIR/run/model",
        "rebuild DIR/run/model --output DIR/rebuilt",
        "memorization DIR/run/model",
        "export gguf DIR/run/model --output DIR/model.gguf",
        "train --limit 1 --init_from DIR/run/model --output_path DIR/next",
    ] {
        let line = line.replace("DIR", folder.path().to_str().unwrap());
        let said = error_in(&laam().args(line.split_whitespace()).output().unwrap());
        assert!(said.contains("GB of memory"), "{line}: {said}");
    }
    // With less than the machine has: `ulimit -v`.
    let recipe = fs::read_to_string(folder.path().join("tiny.toml")).unwrap();
    let recipe = recipe.replace("hidden_size = 8", "hidden_size = 65536");
    fs::write(folder.path().join("large.toml"), recipe).unwrap();
    for line in [
        "train --limit 1 --tokenizer_path DIR/run/tokenizer --hidden_size 65536 --output_path DIR/next",
        "run --recipe DIR/large.toml --limit 1 --output DIR/other",
        "bench step --preset 1.5b --batch 1",
        "bench step --preset 1.5b --batch 1 --backend reference",
    ] {
        let said = error_in(&run(&line.replace("DIR", folder.path().to_str().unwrap())));
        assert!(said.contains("GB of memory"), "{line}: {said}");
    }
}

/// A control group with a limit, of version 1 or 2, removed at the end.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(bytes: u64) -> Option<Self> {
        let name = format!("laam-test-{}", std::process::id());
        for (root, limit) in [("memory", "memory.limit_in_bytes"), ("", "memory.max")] {
            let group = Self(Path::new("/sys/fs/cgroup").join(root).join(&name));
            let made = fs::create_dir(&group.0)
                .and_then(|()| fs::OpenOptions::new().write(true).open(group.0.join(limit)))
                .and_then(|mut file| write!(file, "{bytes}"));
            if made.is_ok() {
                return Some(group);
            }
        }
        None
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
fn the_limit_of_a_control_group_is_known_before_memory_is_taken() {
    let Some(group) = Cgroup::new(300 << 20) else {
        eprintln!("SKIPPED: no control group can be made here to limit memory by.");
        return;
    };
    let procs = group.0.join("cgroup.procs");
    let mut command = Command::new("sh");
    command.args(["-c", "echo $$ > \"$0\" && exec \"$@\""]).arg(&procs);
    command.arg(laam().get_program()).args(["bench", "step", "--preset", "124m", "--batch", "1"]);
    let said = error_in(&command.stdin(Stdio::null()).output().unwrap());
    assert!(said.contains("this process may use 0."), "{said}");
}

/// The most memory a process had in use, by looking again and again until it ends.
fn peak_memory(command: &mut Command) -> f64 {
    let mut child = command.stderr(Stdio::null()).spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0.0;
    while child.try_wait().unwrap().is_none() {
        let text = fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        if let Some(kib) = line.and_then(|line| line.trim().strip_suffix("kB")) {
            peak = kib.trim().parse::<f64>().unwrap() * 1024.0;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(child.wait().unwrap().success());
    peak
}

/// Steps, a checkpoint, the final model, a resume and measurements, beside what a run of a tiny model takes.
#[test]
fn training_takes_the_memory_that_was_planned() {
    let folder = tempfile::tempdir().unwrap();
    copy(tiny_run(), folder.path());
    let measure = |name: &str, hidden: usize, more: &str| {
        let shape = format!(
            "--hidden_size {hidden} --intermediate_size {} --num_hidden_layers 8 \
             --num_attention_heads 4 --num_key_value_heads 4 --max_position_embeddings 32",
            4 * hidden
        );
        let at = folder.path().to_str().unwrap();
        let flags = format!(
            "train --limit 1 --tokenizer_path {at}/run/tokenizer --output_path {at}/{name} \
             --save_steps 1 --threads 2 --backend cpu --resume {shape} {more} --max_steps"
        );
        let train = |steps: &str| peak_memory(laam().args(flags.split_whitespace()).arg(steps));
        let peak = if more.is_empty() { train("1").max(train("2")) } else { train("1") };
        let vocabulary = fs::read_to_string(format!("{at}/{name}/config.json")).unwrap();
        let vocabulary: Value = serde_json::from_str(&vocabulary).unwrap();
        let line = format!(
            "plan --json --backend cpu {shape} {more} --vocab_size {}",
            vocabulary["vocab_size"]
        );
        let plan: Value = serde_json::from_slice(&run(&line).stdout).unwrap();
        (peak, plan["bytes_peak"].as_f64().unwrap())
    };
    let tiny = measure("tiny", 8, "");
    for (at, more) in
        ["", "--precision bfloat16 --eval_steps 1", "--sample_steps 1", "--optimizer muon"]
            .into_iter()
            .enumerate()
    {
        let large = measure(&format!("large{at}"), 384, more);
        let (measured, planned) = (large.0 - tiny.0, large.1 - tiny.1);
        let ratio = measured / planned;
        assert!(
            (0.95..1.05).contains(&ratio),
            "{more}: {measured} bytes, {planned} were planned: {ratio}"
        );
    }
}

#[test]
fn original_tokenizers_read_large_files_in_little_memory() {
    let folder = tempfile::tempdir().unwrap();
    train(&small_corpus(), Style::Original, 320).save(&folder.path().join("tokenizer")).unwrap();
    // Without a blank, so that all of it is one piece of text; and with many.
    for line in ["int\nx1;\nmain();\n", "int  x1;\n\tmain ();\n"] {
        let source = folder.path().join("source");
        fs::create_dir_all(&source).unwrap();
        fs::write(source.join("large.c"), line.repeat((30 << 20) / line.len())).unwrap();
        let at = folder.path().to_str().unwrap();
        for command in [
            format!(
                "tokenize --tokenizer_path {at}/tokenizer --output {at}/tokens --source {at}/source --quiet"
            ),
            format!(
                "train-tokenizer --style original --vocab_size 320 --output_path {at}/new --source {at}/source --quiet"
            ),
        ] {
            let mut laam = laam();
            let output =
                bounded(laam.args(command.split_whitespace()), Duration::from_mins(2), 3 << 29);
            assert!(output.status.success(), "{command}: {output:?}");
        }
    }
}

const TRAIN: &str = "train --limit 1 --tokenizer_path DIR/run/tokenizer --hidden_size 8 \
    --intermediate_size 8 --num_hidden_layers 1 --num_attention_heads 1 --num_key_value_heads 1 \
    --max_position_embeddings 32 --output_path DIR/trained";

fn train_in(folder: &Path, flags: &str) -> Output {
    run(&format!("{TRAIN} {flags}").replace("DIR", folder.to_str().unwrap()))
}

/// Changes the JSON of a training state: its text is in the header of a safetensors file.
fn change_state(file: &Path, change: impl Fn(&mut Value)) {
    let bytes = fs::read(file).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let mut state: Value =
        serde_json::from_str(header["__metadata__"]["state"].as_str().unwrap()).unwrap();
    change(&mut state);
    header["__metadata__"]["state"] = state.to_string().into();
    let header = header.to_string();
    let mut changed = (header.len() as u64).to_le_bytes().to_vec();
    changed.extend(header.as_bytes());
    changed.extend(&bytes[8 + length..]);
    fs::write(file, changed).unwrap();
}

#[test]
fn a_training_state_is_checked_and_a_run_can_be_made_longer() {
    let folder = tempfile::tempdir().unwrap();
    copy(tiny_run(), folder.path());
    assert!(train_in(folder.path(), "--max_steps 4").status.success());
    let output = train_in(folder.path(), "--max_steps 7 --resume");
    let said = String::from_utf8(output.stderr.clone()).unwrap();
    assert!(output.status.success() && said.contains("7 steps now, not 4"), "{said}");
    let said = error_in(&train_in(folder.path(), "--max_steps 5 --resume"));
    assert!(said.contains("7 steps are done"), "{said}");

    // The state lies beside the model, or in its newest checkpoint.
    let find = |folder: &Path| {
        let file = folder.join("training_state.safetensors");
        file.exists().then_some(file)
    };
    let trained = folder.path().join("trained");
    let checkpoints = fs::read_dir(&trained).unwrap().map(|entry| entry.unwrap().path());
    let state =
        find(&trained).or_else(|| checkpoints.filter_map(|path| find(&path)).max()).unwrap();
    let good = fs::read(&state).unwrap();
    let changes: [fn(&mut Value); 5] = [
        |state| state["total"] = u64::MAX.into(),
        |state| state["total"] = 6.into(),
        |state| state["step"] = 8.into(),
        |state| state["tokens"] = u64::MAX.into(),
        |state| state["hard_examples"] = vec![0, 1 << 20].into(),
    ];
    for change in changes {
        change_state(&state, change);
        let said = error_in(&train_in(folder.path(), "--max_steps 7 --resume"));
        assert!(said.contains("invalid training state"), "{said}");
        fs::write(&state, &good).unwrap();
    }
}

#[test]
fn a_weight_beyond_float16_is_reported_before_training() {
    let folder = tempfile::tempdir().unwrap();
    copy(tiny_run(), folder.path());
    let weights = folder.path().join("run/model/model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let end = bytes.len();
    let header: Value = {
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        serde_json::from_slice(&bytes[8..8 + length]).unwrap()
    };
    assert!(header.to_string().contains("\"F32\""), "the tiny model is saved in float32");
    bytes[end - 4..].copy_from_slice(&1e5f32.to_le_bytes());
    fs::write(&weights, bytes).unwrap();
    let model = folder.path().join("run/model");
    let flags = format!("--max_steps 1000000 --precision float16 --init_from {}", model.display());
    let said = error_in(&train_in(folder.path(), &flags));
    assert!(said.contains("too large for float16") && said.contains("bfloat16"), "{said}");
}
