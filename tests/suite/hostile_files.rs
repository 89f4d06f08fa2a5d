//! Something else than a regular file where a file should be: FIFOs, sockets, devices and directories
//! in model and run folders, caches, recipes and tokenizers. All are errors; none is waited for.

use std::ffi::CString;
use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use tempfile::TempDir;

use crate::support::{bounded, error_in, laam};

const DEADLINE: Duration = Duration::from_mins(1);
const MEMORY: u64 = 8 << 30;

/// What may stand in place of a file. A link to a device stands for the device.
const KINDS: [&str; 5] = ["fifo", "socket", "/dev/zero", "/dev/tty", "directory"];

fn put(kind: &str, path: &Path) {
    if path.symlink_metadata().is_ok() {
        fs::remove_file(path).unwrap();
    }
    match kind {
        "fifo" => {
            let path = CString::new(path.to_str().unwrap()).unwrap();
            // SAFETY: the path is a string that ends in a zero byte.
            assert_eq!(unsafe { libc::mkfifo(path.as_ptr(), 0o600) }, 0);
        }
        "socket" => drop(UnixListener::bind(path).unwrap()),
        "directory" => fs::create_dir(path).unwrap(),
        device => symlink(device, path).unwrap(),
    }
}

/// A copy of a folder and the folders in it.
pub fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

const RECIPE: &str = "description = 'tiny'\n[tokenizer]\nvocab_size = 270\n[[stage]]\nname = 'model'\n\
    max_position_embeddings = 32\nhidden_size = 8\nintermediate_size = 8\nnum_hidden_layers = 1\n\
    num_attention_heads = 1\nnum_key_value_heads = 1\nbatch_size = 1\nmax_steps = 2\n";

/// The folder of a tiny run, made once: `run/` with `run.json`, `tokenizer/` and `model/`, and the
/// recipe beside it.
pub fn tiny_run() -> &'static Path {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("tiny.toml"), RECIPE).unwrap();
        let mut command = laam();
        command.arg("run").arg("--recipe").arg(folder.path().join("tiny.toml"));
        command.args(["--limit", "1", "--output"]).arg(folder.path().join("run"));
        let done = command.output().expect("the program starts");
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        folder
    });
    folder.path()
}

/// Runs commands on copies of the tiny run in which one file is something else.
#[track_caller]
fn refused(file: &str, command: impl Fn(&Path) -> Command) {
    for kind in KINDS {
        let folder = tempfile::tempdir().unwrap();
        copy(tiny_run(), folder.path());
        put(kind, &folder.path().join(file));
        let output = bounded(&mut command(folder.path()), DEADLINE, MEMORY);
        assert_eq!(output.status.code(), Some(2), "{file} is a {kind}: {output:?}");
        let said = error_in(&output);
        let name = Path::new(file).file_name().unwrap().to_str().unwrap();
        assert!(said.contains(name), "{file} is a {kind}: {said}");
    }
}

fn on(arguments: &'static [&'static str], place: &'static str) -> impl Fn(&Path) -> Command {
    move |folder| {
        let mut command = laam();
        command.args(arguments).arg(folder.join(place));
        command
    }
}

#[test]
fn model_folders_hold_regular_files_only() {
    for file in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        refused(
            &format!("run/model/{file}"),
            on(&["generate", "--max_new_tokens", "1"], "run/model"),
        );
    }
    refused("run/model/provenance.json", on(&["ls"], "run/model"));
    refused("run/model/model.safetensors.index.json", |folder| {
        fs::remove_file(folder.join("run/model/model.safetensors")).unwrap();
        on(&["generate", "--max_new_tokens", "1"], "run/model")(folder)
    });
}

#[test]
fn run_folders_hold_regular_files_only() {
    for file in ["run.json", "model/metrics.jsonl", "model/provenance.json", "model/config.json"] {
        refused(&format!("run/{file}"), on(&["report"], "run"));
    }
    for file in ["memorization/memorization.json", "memorization/heat.json", "rebuild.json"] {
        refused(&format!("run/{file}"), on(&["report"], "run"));
    }
    let again = |folder: &Path| {
        let mut command = laam();
        command.arg("run").arg("--recipe").arg(folder.join("tiny.toml")).args(["--limit", "1"]);
        command.arg("--output").arg(folder.join("run"));
        command
    };
    refused("run/run.json", again);
    refused("run/tokenizer/tokenizer.json", again);
    refused("tiny.toml", again);
    refused("run/model/checkpoint-2/training_state.safetensors", again);
    refused("sweep.toml", on(&["sweep"], "sweep.toml"));
}

#[test]
fn tokenizers_and_sources_are_regular_files() {
    let train = |folder: &Path| {
        let mut command = laam();
        command.args(["train", "--limit", "1", "--hidden_size", "8", "--intermediate_size", "8"]);
        command.args(["--max_steps", "1", "--max_position_embeddings", "32", "--tokenizer_path"]);
        command.arg(folder.join("run/tokenizer")).arg("--output_path").arg(folder.join("out"));
        command
    };
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        refused(&format!("run/tokenizer/{file}"), train);
    }
    refused("run/tokenizer/special", |folder| {
        let mut command = laam();
        command.args(["train-tokenizer", "--vocab_size", "300", "--output_path"]);
        command.arg(folder.join("new")).arg("--source").arg(folder.join("run/tokenizer/special"));
        command
    });
}

#[test]
fn token_files_in_the_cache_are_regular_files() {
    let folder = tempfile::tempdir().unwrap();
    copy(tiny_run(), folder.path());
    let cache = folder.path().join("cache");
    let run = || {
        let mut command = laam();
        command.arg("run").arg("--recipe").arg(folder.path().join("tiny.toml"));
        command.args(["--limit", "1", "--output"]).arg(folder.path().join("fresh"));
        bounded(command.env("LAAM_CACHE", &cache), DEADLINE, MEMORY)
    };
    assert!(run().status.success());
    let mut files = fs::read_dir(cache.join("tokens")).unwrap().map(|entry| entry.unwrap().path());
    let tokens = files.next().unwrap();
    let victim = folder.path().join("victim");
    fs::write(&victim, "precious").unwrap();
    for kind in KINDS.into_iter().chain([victim.to_str().unwrap()]) {
        let _ = fs::remove_dir_all(folder.path().join("fresh"));
        put(kind, &tokens);
        assert!(error_in(&run()).contains("tokens"), "{kind}");
        assert_eq!(fs::read(&victim).unwrap(), b"precious");
        if kind == "directory" {
            fs::remove_dir(&tokens).unwrap();
        }
    }
}

#[test]
fn links_and_fifos_in_the_cache_are_neither_followed_nor_waited_for() {
    // Nothing listens there: what is tried is what comes before the download.
    for name in ["lock", "tar.xz", "tar.xz.json", "tar.xz.part", "tar.xz.part.json"] {
        for kind in KINDS.into_iter().chain(["link"]) {
            let cache = tempfile::tempdir().unwrap();
            let folder = cache.path().join("at-127.0.0.1_1/v1.0");
            fs::create_dir_all(&folder).unwrap();
            let victim = cache.path().join("victim");
            fs::write(&victim, "precious").unwrap();
            let path = folder.join(format!("linux-1.0.{name}"));
            if kind == "link" {
                symlink(&victim, &path).unwrap();
            } else {
                put(kind, &path);
            }
            let mut command = laam();
            command.args(["fetch", "--version", "v1.0/1.0", "--mirror_uri", "http://127.0.0.1:1"]);
            error_in(&bounded(command.env("LAAM_CACHE", cache.path()), DEADLINE, MEMORY));
            assert_eq!(fs::read(&victim).unwrap(), b"precious", "{name}");
        }
    }
}
