//! What the tests share.

use std::io::Read;
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use assert_cmd::cargo::CommandCargoExt;
use laam::corpus::Document;

/// The program itself, ready to be given arguments.
pub fn laam() -> Command {
    let mut command = Command::cargo_bin("laam").expect("the binary is built beside its tests");
    // Token files are kept in the cache folder.
    command.env("LAAM_CACHE", concat!(env!("CARGO_TARGET_TMPDIR"), "/cache"));
    command
}

/// A port of this host that nothing listens at, and that no other test is given: it and the one before it are below
/// those that the system gives to sockets without a port (RFC 6056 and Linux's `ip_local_port_range`).
pub fn free_port() -> u16 {
    const FIRST: u32 = 20_000;
    const LAST: u32 = 32_000;
    static NEXT: AtomicU32 = AtomicU32::new(0);
    // Another process of these tests begins elsewhere.
    let begin = std::process::id() * 64;
    let ports = std::iter::repeat_with(|| {
        let count = NEXT.fetch_add(2, Ordering::Relaxed);
        (FIRST + (begin + count) % (LAST - FIRST) + 1) as u16
    });
    let is_free = |port: &u16| TcpListener::bind(("127.0.0.1", *port)).is_ok();
    ports.take(1000).find(is_free).expect("a free port")
}

/// The Linux 1.0 archive, or `None` after a loud line.
pub fn linux() -> Option<PathBuf> {
    let given = std::env::var_os("LAAM_TEST_CORPUS").map(PathBuf::from);
    let beside = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/corpus"));
    for place in given.into_iter().chain([beside]) {
        let file = if place.is_dir() { place.join("linux-1.0.tar.xz") } else { place };
        if file.is_file() {
            return Some(file);
        }
    }
    eprintln!(
        "SKIPPED: no Linux 1.0 corpus. Set LAAM_TEST_CORPUS to linux-1.0.tar.xz to run this test."
    );
    None
}

/// The source files of an archive by the first LaaM's filter, in the archive's order: read here by
/// hand, so that tokens are tested without `corpus`.
pub fn documents(archive: &Path) -> Vec<Document> {
    const SUFFIXES: [&str; 13] = [
        ".c", ".cc", ".cpp", ".cxx", ".c++", ".h", ".hh", ".hpp", ".hxx", ".h++", ".s", ".rs",
        ".txt",
    ];
    let file = std::fs::File::open(archive).expect("the archive opens");
    let mut archive = tar::Archive::new(lzma_rust2::XzReader::new(file, false));
    let mut documents = Vec::new();
    for member in archive.entries().expect("a tar archive") {
        let mut member = member.expect("a member");
        let path = member.path().expect("a path").to_str().expect("UTF-8").to_string();
        let lower = path.to_lowercase();
        if member.header().entry_type().is_file() && SUFFIXES.iter().any(|s| lower.ends_with(s)) {
            let mut text = String::new();
            member.read_to_string(&mut text).expect("Linux 1.0 is ASCII");
            documents.push(Document::new(path, text));
        }
    }
    documents
}

/// Runs a command that must end by itself within `limit`, with at most `memory` bytes of address
/// space.
pub fn bounded(command: &mut Command, limit: Duration, memory: u64) -> Output {
    let limit_memory = move || {
        let limit = libc::rlimit { rlim_cur: memory, rlim_max: memory };
        // SAFETY: the struct outlives the call, and setrlimit may be called between fork and exec.
        match unsafe { libc::setrlimit(libc::RLIMIT_AS, &raw const limit) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    };
    // SAFETY: the closure makes one system call and allocates nothing.
    unsafe { command.pre_exec(limit_memory) };
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the program starts");
    // The pipes are read while it runs: a full one would stop it.
    let (mut out, mut err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let reader = |pipe: &mut dyn Read| {
        let mut bytes = Vec::new();
        pipe.read_to_end(&mut bytes).expect("a pipe can be read");
        bytes
    };
    let began = Instant::now();
    std::thread::scope(|scope| {
        let (stdout, stderr) =
            (scope.spawn(move || reader(&mut out)), scope.spawn(move || reader(&mut err)));
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if began.elapsed() > limit {
                child.kill().unwrap();
                child.wait().unwrap();
                panic!("{command:?} did not end within {limit:?}");
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        Output { status, stdout: stdout.join().unwrap(), stderr: stderr.join().unwrap() }
    })
}

/// What stderr says of a command that ends as errors do: exit code 2, `laam: ` and `hint: ` as the
/// last two lines, no panic, no control characters.
#[track_caller]
pub fn error_in(output: &Output) -> String {
    let said = String::from_utf8(output.stderr.clone()).expect("errors are UTF-8");
    assert_eq!(output.status.code(), Some(2), "{said}");
    let lines: Vec<_> = said.lines().collect();
    assert!(
        matches!(lines.as_slice(), [.., what, hint] if what.starts_with("laam: ") && hint.starts_with("hint: ")),
        "{said}"
    );
    assert!(!said.contains("panicked") && !said.contains('\u{1b}'), "{said:?}");
    said
}
