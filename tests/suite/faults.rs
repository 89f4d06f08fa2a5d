//! What a disk and a power cut can do to a run: system calls of its save path that fail, write less than
//! they were given, or are the last ones. Afterwards the last whole checkpoint opens, and the resumed run has
//! the bits of one that nothing happened to.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use laam::model::{check_hashes, has_training_state, has_weights, load, load_training_state};
use laam::random::{Philox, Stream};
use tempfile::TempDir;

use crate::support::error_in;
use crate::training::{
    assert_same, checkpoints, copy_folder, metrics, newest_checkpoint, said, train, trained,
};

/// What happens to a call.
#[derive(Clone, Copy, Debug)]
enum Fault {
    Errno(i32),
    ShortWrite,
    Kill,
}

const FAULTS: [Fault; 5] = [
    Fault::Errno(libc::EIO),
    Fault::Errno(libc::ENOSPC),
    Fault::Errno(libc::EACCES),
    Fault::ShortWrite,
    Fault::Kill,
];

/// `faults.c` as a library, or nothing after a line that says so.
pub fn shim() -> Option<&'static Path> {
    static SHIM: OnceLock<Option<(TempDir, PathBuf)>> = OnceLock::new();
    let shim = SHIM.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let library = folder.path().join("faults.so");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/suite/faults.c");
        let compiled = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", source, "-ldl", "-o"])
            .arg(&library)
            .output();
        match compiled {
            Err(_) => {
                eprintln!("SKIPPED: there is no C compiler, so no system call was made to fail.");
                None
            }
            Ok(done) => {
                assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
                Some((folder, library))
            }
        }
    });
    shim.as_ref().map(|(_, library)| library.as_path())
}

/// A run of two steps that is made longer: it reads a checkpoint, writes three, removes those that are out of
/// date, and replaces the finished model.
const BEGUN: &str = "--max_steps 2 --save_steps 2 --logging_steps 1 --threads 1";
const LONGER: &str =
    "--max_steps 5 --save_steps 1 --save_total_limit 2 --logging_steps 1 --threads 1 --resume";

/// The run before it was made longer, and after.
fn runs() -> (PathBuf, PathBuf) {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let [begun, done] = ["begun", "done"].map(|name| folder.path().join(name));
        trained(&begun, BEGUN);
        copy_folder(&begun, &done);
        trained(&done, LONGER);
        folder
    });
    (folder.path().join("begun"), folder.path().join("done"))
}

/// Runs `LONGER` with a fault at a call, 0 for none. Returns its output and the calls that it made.
fn run_with(output: &Path, at: usize, fault: Fault, sticky: bool) -> (Output, Vec<String>) {
    let log = output.with_extension("log");
    let errno = match fault {
        Fault::Errno(errno) => errno,
        Fault::ShortWrite => 0,
        Fault::Kill => -1,
    };
    let mut command = train(output, LONGER);
    command.env("LD_PRELOAD", shim().expect("it was compiled")).env("FAULT_LOG", &log);
    command.env("FAULT_UNDER", output).env("FAULT_AT", at.to_string());
    command.env("FAULT_ERRNO", errno.to_string());
    if sticky {
        command.env("FAULT_STICKY", "1");
    }
    let done = command.output().unwrap();
    let calls = fs::read_to_string(&log).unwrap().lines().map(String::from).collect();
    (done, calls)
}

/// What must hold after a run was cut off: whole models, of which one can be resumed.
pub fn assert_whole(output: &Path, what: &str) {
    let mut resumable = 0;
    for step in checkpoints(output) {
        let folder = output.join(format!("checkpoint-{step}"));
        if !has_training_state(&folder) {
            continue;
        }
        let whole = load(&folder).and_then(|model| load_training_state(&folder, &model.layout));
        assert!(whole.unwrap_or_else(|why| panic!("{what}: {why:#}")).is_some());
        resumable += 1;
    }
    assert!(resumable > 0, "{what}: no checkpoint is left");
    if has_weights(output) {
        load(output).unwrap_or_else(|why| panic!("{what}: {why:#}"));
        assert!(check_hashes(output).unwrap().is_empty(), "{what}");
    }
}

/// One fault, then the run again. Returns whether the process ended with an error or was killed.
fn survives(at: usize, fault: Fault, sticky: bool) -> bool {
    let (begun, unbroken) = runs();
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("model");
    copy_folder(&begun, &output);
    let (done, calls) = run_with(&output, at, fault, sticky);
    let hit = calls.iter().find(|call| call.starts_with("* "));
    let what = format!("call {at}, {fault:?}, sticky {sticky}, {hit:?}: {}", said(&done));
    match done.status.code() {
        None => {
            let is_killed = done.status.signal() == Some(libc::SIGKILL);
            assert!(is_killed && matches!(fault, Fault::Kill), "{what}");
        }
        Some(0) => {
            assert_same(&output, &unbroken, &what);
            assert_eq!(missing(&output, &unbroken), Vec::<String>::new(), "{what}");
        }
        Some(_) => drop(error_in(&done)),
    }
    assert_whole(&output, &what);
    trained(&output, LONGER);
    assert_same(&output, &unbroken, &what);
    // Nothing is missing, and nothing left over but a checkpoint that could not be read to be removed.
    assert_eq!(missing(&output, &unbroken), Vec::<String>::new(), "{what}");
    assert!(!files(&output).iter().any(|name| name.starts_with('.')), "{what}");
    !done.status.success()
}

/// Files of another folder that are not in this one.
fn missing(folder: &Path, other: &Path) -> Vec<String> {
    let there = files(folder);
    files(other).into_iter().filter(|name| !there.contains(name)).collect()
}

/// Names of the files below a folder, in order.
fn files(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let name = entry.file_name().into_string().unwrap();
        found.push(name.clone());
        if entry.path().is_dir() {
            found.extend(files(&entry.path()).into_iter().map(|below| format!("{name}/{below}")));
        }
    }
    found.sort();
    found
}

/// Numbers below `limit` that differ from run to run; the seed is printed, `LAAM_TEST_SEED` sets it.
fn numbers(limit: u64) -> impl FnMut() -> u64 {
    let given = std::env::var("LAAM_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed: u64 = given.unwrap_or_else(|| u64::from(std::process::id()));
    eprintln!("LAAM_TEST_SEED={seed}");
    let (random, mut drawn) = (Philox::new(seed, Stream::Test), 0);
    move || {
        drawn += 1;
        u64::from(random.at(0, drawn)[0]) % limit
    }
}

/// The calls of a run that nothing happens to.
fn calls() -> Vec<String> {
    let (begun, unbroken) = runs();
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("model");
    copy_folder(&begun, &output);
    let (done, calls) = run_with(&output, 0, Fault::Kill, false);
    assert!(done.status.success(), "{}", said(&done));
    assert_same(&output, &unbroken, "with the shim");
    for call in ["openat64", "write", "fsync", "rename", "mkdir", "unlink", "ftruncate64"] {
        let stem = call.trim_end_matches("64").trim_end_matches("at");
        assert!(calls.iter().any(|line| line.starts_with(stem)), "no {call} in {calls:#?}");
    }
    calls
}

#[test]
fn faults_of_the_save_path_lose_nothing() {
    if shim().is_none() {
        return;
    }
    let calls = calls();
    let mut number = numbers(1 << 20);
    let mut ended = 0;
    // Each system call in turn, at random places; most often what writes.
    let kinds =
        ["write", "write", "write", "open", "fsync", "rename", "mkdir", "unlink", "ftruncate"];
    for (turn, kind) in kinds.into_iter().enumerate() {
        let places: Vec<usize> =
            (0..calls.len()).filter(|&at| calls[at].starts_with(kind)).collect();
        let mut place = || 1 + places[number() as usize % places.len()];
        ended += usize::from(survives(place(), FAULTS[turn % 3], false));
        ended += usize::from(survives(place(), FAULTS[(turn + 1) % 3], true));
    }
    for _ in 0..3 {
        ended += usize::from(survives(1 + number() as usize % calls.len(), Fault::Kill, false));
    }
    let writes = calls.iter().rposition(|call| call.starts_with("write")).unwrap();
    assert!(!survives(1 + writes, Fault::ShortWrite, false), "the rest is written as well");
    assert!(ended > 6, "{ended}: the faults were not noticed");
}

#[test]
#[ignore = "takes minutes"]
fn every_fault_of_the_save_path_loses_nothing() {
    if shim().is_none() {
        return;
    }
    let calls = calls();
    let (mut injected, mut ended) = (0, 0);
    for (at, call) in calls.iter().enumerate() {
        for fault in FAULTS {
            if matches!(fault, Fault::ShortWrite) && !call.starts_with("write") {
                continue;
            }
            for sticky in [false, true] {
                injected += 1;
                ended += usize::from(survives(at + 1, fault, sticky));
            }
        }
    }
    eprintln!("{injected} faults at {} calls, {ended} ended the run", calls.len());
}

/// Kills a run again and again at random times until it is done; returns how often.
fn kill_at_random(millis: &mut dyn FnMut() -> u64) -> u32 {
    let (begun, unbroken) = runs();
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("model");
    copy_folder(&begun, &output);
    let mut kills = 0;
    for _ in 0..6 {
        let mut run = train(&output, LONGER).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(millis()));
        run.kill().unwrap();
        let killed = run.wait().unwrap().signal().is_some();
        kills += u32::from(killed);
        assert_whole(&output, &format!("after {kills} kills"));
        if !killed {
            break;
        }
    }
    trained(&output, LONGER);
    assert_same(&output, &unbroken, &format!("after {kills} kills"));
    assert!(newest_checkpoint(&output).ends_with("checkpoint-5") && metrics(&output).len() == 5);
    kills
}

fn kill_runs(runs_killed: u32) -> u32 {
    let (begun, _) = runs();
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("model");
    copy_folder(&begun, &output);
    let began = Instant::now();
    trained(&output, LONGER);
    let mut millis = numbers(1 + began.elapsed().as_millis() as u64);
    (0..runs_killed).map(|_| kill_at_random(&mut millis)).sum()
}

#[test]
fn random_kills_lose_nothing() {
    assert!(kill_runs(3) > 0);
}

#[test]
#[ignore = "takes minutes"]
fn many_random_kills_lose_nothing() {
    eprintln!("{} kills", kill_runs(100));
}
