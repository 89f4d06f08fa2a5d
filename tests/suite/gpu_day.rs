//! `scripts/gpu-day` with a `laam` that hangs, fails, or is right, as it is told.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use serde_json::Value;

fn script(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// The program's part on a GPU: smoke hangs with a child, check fails, a step says no JSON.
const LAAM: &str = r#"#!/bin/sh
echo "$*" >> "$(dirname "$0")/calls"
case "$*" in
    --version) echo "laam 0" ;;
    "bench smoke"*) sleep 77 & echo $! > "$(dirname "$0")/child"; wait ;;
    check*--only*) echo '{"rows": []}' ;;
    check*) echo "laam: rope is wrong" >&2; echo "hint: fix it" >&2; exit 2 ;;
    "bench --backend cuda"*) echo '{"copy": 3.0}' ;;
    *"--preset 350m"*) echo "no such thing" ;;
    *) kill -SEGV $$ ;;
esac
"#;

fn gpu_day(folder: &Path, more: &[&str]) -> Output {
    let mut command = Command::new("python3");
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/gpu-day")).arg(folder.join("laam"));
    command.arg("--out").arg(folder.join("out")).args(["--python", "/bin/false", "--limit", "2"]);
    let path = format!("{}:{}", folder.display(), std::env::var("PATH").unwrap());
    command.env("PATH", path).args(more).output().unwrap()
}

#[test]
fn gpu_day_loses_nothing_to_a_hang_or_a_failure_and_goes_on_where_it_was() {
    if Command::new("python3").arg("--version").output().is_err() {
        eprintln!("SKIPPED: scripts/gpu-day, because there is no python3");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    script(&folder.join("laam"), LAAM);
    // Finds something in one of the operations.
    script(
        &folder.join("compute-sanitizer"),
        "#!/bin/sh\nshift 4\ncase \"$*\" in *swiglu) echo '= Invalid read' >&2; exit 99 ;; esac\n\
         exec \"$@\"\n",
    );
    // May not count.
    script(
        &folder.join("ncu"),
        "#!/bin/sh\necho '==ERROR== ERR_NVGPUCTRPERM - The user does not have permission'; exit 1\n",
    );
    let begun = Instant::now();
    let output = gpu_day(folder, &[]);
    assert!(begun.elapsed() < Duration::from_mins(1), "{:?}", begun.elapsed());
    assert_eq!(output.status.code(), Some(1), "{output:?}");

    let read = || -> Value {
        serde_json::from_slice(&fs::read(folder.join("out/day.json")).unwrap()).unwrap()
    };
    let day = read();
    let part = |name: &str, field: &str| day["parts"][name][field].clone();
    assert_eq!(part("smoke", "result"), "timed out");
    assert_eq!(part("check", "result"), "failed");
    assert_eq!(part("check", "note"), "exit 2: laam: rope is wrong");
    assert_eq!(part("page", "result"), "ok");
    assert_eq!(part("page", "data")["copy"], 3.0);
    assert_eq!(part("step 350m x 16", "note"), "no JSON");
    assert_eq!(part("profile original x 1", "status"), -11);
    assert_eq!(part("ncu attention_", "result"), "not here");
    let note = part("ncu attention_", "note");
    assert!(note.as_str().unwrap().contains("no permission"), "{note}");
    assert_eq!(part("torch kernels", "result"), "not here");
    assert_eq!(part("memcheck rope", "result"), "ok");
    assert_eq!(part("memcheck swiglu", "note"), "exit 99: = Invalid read");
    assert_eq!(part("racecheck muon", "result"), "ok");
    let files: Vec<_> = fs::read_dir(folder.join("out")).unwrap().collect();
    assert_eq!(files.len(), 3, "{files:?}");
    let table = fs::read_to_string(folder.join("out/table.md")).unwrap();
    assert!(table.contains("| smoke | timed out |"), "{table}");
    assert_eq!(String::from_utf8(output.stdout).unwrap(), table);
    let child = fs::read_to_string(folder.join("child")).unwrap();
    let state = fs::read_to_string(format!("/proc/{}/stat", child.trim()));
    assert!(state.is_err() || state.unwrap().contains(") Z "), "what hung is still there");

    // Again: what was ok is not run again, all else is.
    fs::remove_file(folder.join("calls")).unwrap();
    gpu_day(folder, &["--only", "check,page,step 350m"]);
    let calls = fs::read_to_string(folder.join("calls")).unwrap();
    assert_eq!(calls, "--version\ncheck --backend cuda --json\n");
    assert_eq!(read()["parts"], day_without_seconds(&day, &read()));

    // Another program: nothing of the old one counts.
    script(&folder.join("laam"), &LAAM.replace("3.0", "4.0"));
    let output = gpu_day(folder, &["--only", "page"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(read()["parts"]["page"]["data"]["copy"], 4.0);
    assert_eq!(read()["parts"].as_object().unwrap().len(), 1);
}

/// The parts of `day` with the times of `other`, which no two runs share.
fn day_without_seconds(day: &Value, other: &Value) -> Value {
    let mut parts = day["parts"].clone();
    for (name, part) in parts.as_object_mut().unwrap() {
        part["seconds"] = other["parts"][name]["seconds"].clone();
    }
    parts
}
