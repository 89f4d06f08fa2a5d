//! Downloads of kernels, against a server in the test that misbehaves as told.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use laam::corpus::{
    Corpus, CorpusOptions, FetchEvent, Fetched, LinuxRelease, Source, SourceOrigin,
};
use laam::error::hint_of;
use laam::model::License;
use laam::train::prepare::record;
use sha2::{Digest, Sha256};

use crate::support::{free_port, laam};

/// A request as the server saw it.
#[derive(Clone, Debug)]
struct Request {
    path: String,
    range: Option<u64>,
    if_range: Option<String>,
}

/// Answers a request.
type Answer = dyn Fn(&Request, &mut TcpStream) + Send + Sync;

struct Server {
    address: String,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    fn start(answer: impl Fn(&Request, &mut TcpStream) + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}/kernel", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (log, answer): (_, Arc<Answer>) = (requests.clone(), Arc::new(answer));
        // The thread listens until the test's process ends.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (log, answer) = (log.clone(), answer.clone());
                std::thread::spawn(move || serve(stream, &log, &*answer));
            }
        });
        Self { address, requests }
    }

    fn asked(&self) -> Vec<String> {
        self.requests.lock().unwrap().iter().map(|request| request.path.clone()).collect()
    }

    fn ranges(&self, path: &str) -> Vec<Option<u64>> {
        let requests = self.requests.lock().unwrap();
        requests
            .iter()
            .filter(|request| request.path == path)
            .map(|request| request.range)
            .collect()
    }
}

fn serve(mut stream: TcpStream, log: &Mutex<Vec<Request>>, answer: &Answer) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let Some(Ok(first)) = lines.next() else { return };
    let path = first.split(' ').nth(1).unwrap().strip_prefix("/kernel").unwrap().to_string();
    let mut request = Request { path, range: None, if_range: None };
    for line in lines.map_while(Result::ok).take_while(|line| !line.is_empty()) {
        let (name, value) = line.split_once(':').unwrap();
        match name.to_ascii_lowercase().as_str() {
            "range" => {
                let from = value.trim().strip_prefix("bytes=").unwrap().strip_suffix('-').unwrap();
                request.range = Some(from.parse().unwrap());
            }
            "if-range" => request.if_range = Some(value.trim().to_string()),
            _ => {}
        }
    }
    log.lock().unwrap().push(request.clone());
    answer(&request, &mut stream);
}

/// A response with a length, of whose body only the first `sent` bytes are sent.
fn respond(stream: &mut TcpStream, status: &str, headers: &str, body: &[u8], sent: usize) {
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n{headers}\r\n"
    );
    // The client may have hung up already: its matter.
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body[..sent]));
    // A socket closed with unread input is reset, which could overtake the body.
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let _ = stream.read(&mut [0; 64]);
}

fn missing(stream: &mut TcpStream) {
    respond(stream, "404 Not Found", "", b"no such file", 12);
}

/// The whole file, or the rest of it where the request has a range.
fn file(request: &Request, stream: &mut TcpStream, body: &[u8], tag: &str) {
    let etag = if tag.is_empty() { String::new() } else { format!("ETag: {tag}\r\n") };
    match request.range.map(|from| from as usize) {
        Some(from) if request.if_range.as_deref().is_none_or(|wanted| wanted == tag) => {
            let (last, length) = (body.len() - 1, body.len());
            let headers = format!("Content-Range: bytes {from}-{last}/{length}\r\n{etag}");
            respond(stream, "206 Partial Content", &headers, &body[from..], length - from);
        }
        _ => respond(stream, "200 OK", &etag, body, body.len()),
    }
}

const XZ: &str = "/v1.0/linux-1.0.tar.xz";
const GZ: &str = "/v1.0/linux-1.0.tar.gz";
const SUMS: &str = "/v1.0/sha256sums.asc";

/// An archive of one source file and some bytes that do not pack.
fn archive() -> Vec<u8> {
    archive_of("int a;\n")
}

fn archive_of(text: &str) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut state = 1u32;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    })
    .take(300_000)
    .collect();
    for (name, bytes) in [("linux/kernel/sched.c", text.as_bytes()), ("linux/noise.bin", &noise)] {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, bytes).unwrap();
    }
    tar.into_inner().unwrap()
}

fn sums(body: &[u8], name: &str) -> Vec<u8> {
    let mut list = b"-----BEGIN PGP SIGNED MESSAGE-----\n\n".to_vec();
    for byte in Sha256::digest(body) {
        write!(list, "{byte:02x}").unwrap();
    }
    writeln!(list, "  {name}").unwrap();
    list
}

fn all(stream: &mut TcpStream, body: &[u8]) {
    respond(stream, "200 OK", "", body, body.len());
}

/// Address of a server that has Linux 1.0, with one source file of this text.
pub fn mirror(text: &str) -> String {
    let served = archive_of(text);
    let server = Server::start(move |request, stream| match request.path.as_str() {
        SUMS => all(stream, &sums(&served, "linux-1.0.tar.xz")),
        XZ => all(stream, &served),
        _ => missing(stream),
    });
    server.address
}

struct Trial {
    kernel: LinuxRelease,
    notes: Vec<String>,
    _cache: tempfile::TempDir,
}

impl Trial {
    fn new(mirror: &str) -> Self {
        let cache = tempfile::tempdir().unwrap();
        let kernel = LinuxRelease {
            version: "v1.0/1.0".parse().unwrap(),
            mirror: mirror.to_string(),
            cache: cache.path().to_path_buf(),
            timeout: Duration::from_secs(6),
            unverified: false,
        };
        Self { kernel, notes: Vec::new(), _cache: cache }
    }

    fn unverified(mirror: &str) -> Self {
        let mut trial = Self::new(mirror);
        trial.kernel.unverified = true;
        trial
    }

    fn fetch(&mut self) -> anyhow::Result<Fetched> {
        let notes = &mut self.notes;
        self.kernel.fetch(&mut |event| {
            if let FetchEvent::Note(line) = event {
                notes.push(line);
            }
        })
    }

    #[track_caller]
    fn fails(&mut self, about: &str) {
        let why = self.fetch().expect_err("it must fail");
        let text = format!("{why:#}");
        assert!(text.contains(about), "{about:?} is not in: {text}");
        assert!(hint_of(&why).is_some() && !text.contains('\n'), "{text}");
    }

    /// The files in the cache, locks aside.
    fn cached(&self) -> Vec<PathBuf> {
        let mut files = Vec::new();
        let mut folders = vec![self.kernel.cache.clone()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.extension().is_none_or(|extension| extension != "lock") {
                    files.push(path.file_name().unwrap().into());
                }
            }
        }
        files.sort();
        files
    }
}

#[test]
fn an_archive_is_fetched_once_checked_and_kept() {
    let body = archive();
    let served = body.clone();
    let server = Server::start(move |request, stream| match request.path.as_str() {
        SUMS => all(stream, &sums(&served, "linux-1.0.tar.xz")),
        XZ => file(request, stream, &served, "\"1\""),
        _ => missing(stream),
    });
    let mut trial = Trial::new(&server.address);
    let fetched = trial.fetch().unwrap();
    assert_eq!(fs::read(&fetched.path).unwrap(), body);
    assert!(fetched.checksum_confirmed && trial.notes.is_empty());
    assert_eq!(fetched.url, format!("{}{XZ}", server.address));
    let names = ["linux-1.0.tar.xz", "linux-1.0.tar.xz.json"];
    assert_eq!(trial.cached(), names.map(PathBuf::from));
    assert_eq!(trial.fetch().unwrap(), fetched);
    assert_eq!(server.asked(), [SUMS, XZ]);

    // The corpus it makes says where it is from.
    let corpus =
        Corpus::open(&Source::Linux(trial.kernel.clone()), CorpusOptions::default()).unwrap();
    let manifest = corpus.manifest().unwrap();
    assert_eq!((manifest.source, manifest.files.len()), (fetched.url, 1));
    assert_eq!(manifest.archive_sha256, Some(fetched.sha256));
    assert_eq!(manifest.retrieved, Some(fetched.retrieved));
    assert_eq!(manifest.checksum_confirmed, Some(true));

    // A damaged file in the cache is noticed and fetched again.
    fs::write(&fetched.path, b"damaged").unwrap();
    assert_eq!(fs::read(trial.fetch().unwrap().path).unwrap(), body);
    assert!(trial.notes.iter().any(|note| note.contains("damaged")));
}

/// A release by its version through any mirror is the kernel, and its record can be published.
#[test]
fn a_release_is_recorded_by_its_version_and_without_credentials() {
    let body = archive();
    let served = body.clone();
    let server = Server::start(move |request, stream| match request.path.as_str() {
        XZ => all(stream, &served),
        SUMS => all(stream, &sums(&served, "linux-1.0.tar.xz")),
        _ => missing(stream),
    });
    let trial = Trial::new(&server.address.replace("http://", "http://me:secret@"));
    let source = Source::Linux(trial.kernel.clone());
    let corpus = Corpus::open(&source, CorpusOptions::default()).unwrap();
    let record = record(&corpus.manifest().unwrap());
    assert_eq!((record.license, record.name.as_str()), (License::Gpl2, "Linux v1.0/1.0"));
    assert_eq!(record.url, Some(format!("{}{XZ}", server.address)));
    assert_eq!(record.origin, Some(SourceOrigin::Release("v1.0/1.0".to_string())));
    assert!(!server.address.contains("kernel.org"));
}

#[test]
fn fetch_falls_back_to_gz() {
    let body = archive();
    let served = body.clone();
    let server = Server::start(move |request, stream| match request.path.as_str() {
        SUMS => all(stream, &sums(&served, "linux-1.0.tar.gz")),
        // Some servers call any .gz gzip-encoded: it must still arrive as it is.
        GZ => respond(stream, "200 OK", "Content-Encoding: gzip\r\n", &served, served.len()),
        _ => missing(stream),
    });
    let mut trial = Trial::new(&server.address);
    let fetched = trial.fetch().unwrap();
    assert_eq!(fs::read(&fetched.path).unwrap(), body);
    assert!(fetched.path.ends_with("linux-1.0.tar.gz"));
    // What the list does not name is not asked for.
    assert_eq!(server.asked(), [SUMS, GZ]);

    let nothing = Server::start(|_, stream| missing(stream));
    Trial::unverified(&nothing.address).fails("neither linux-1.0.tar.xz nor linux-1.0.tar.gz");
    assert_eq!(nothing.asked(), [SUMS, XZ, GZ]);
}

#[test]
fn fetch_resumes_within_a_run() {
    let body = archive();
    let served = body.clone();
    let server =
        Server::start(move |request, stream| match (request.path.as_str(), request.range) {
            (SUMS, _) => all(stream, &sums(&served, "linux-1.0.tar.xz")),
            (XZ, None) => respond(stream, "200 OK", "ETag: \"1\"\r\n", &served, 100_000),
            (XZ, _) => file(request, stream, &served, "\"1\""),
            _ => missing(stream),
        });
    let mut trial = Trial::new(&server.address);
    let fetched = trial.fetch().unwrap();
    assert_eq!(fs::read(fetched.path).unwrap(), body);
    assert_eq!(server.ranges(XZ), [None, Some(100_000)]);
    assert_eq!(server.requests.lock().unwrap()[2].if_range.as_deref(), Some("\"1\""));
    assert_eq!(trial.cached().len(), 2);
}

#[test]
fn fetch_resumes_in_the_next_run() {
    let body = archive();
    let (served, broken) = (body.clone(), Arc::new(Mutex::new(true)));
    let is_broken = broken.clone();
    let server =
        Server::start(move |request, stream| match (request.path.as_str(), request.range) {
            (SUMS, _) => all(stream, &sums(&served, "linux-1.0.tar.xz")),
            (XZ, None) => respond(stream, "200 OK", "", &served, 100_000),
            (XZ, _) if *is_broken.lock().unwrap() => {
                respond(stream, "503 Service Unavailable", "", b"", 0);
            }
            (XZ, _) => file(request, stream, &served, ""),
            _ => missing(stream),
        });
    let mut trial = Trial::new(&server.address);
    trial.fails("broke off at byte 100000");
    assert_eq!(trial.cached().len(), 2); // the part, and what it is a part of
    *broken.lock().unwrap() = false;
    assert_eq!(fs::read(trial.fetch().unwrap().path).unwrap(), body);
    assert_eq!(server.ranges(XZ).last(), Some(&Some(100_000)));
}

#[test]
fn fetch_restarts_if_ranges_are_ignored() {
    let body = archive();
    let (served, count) = (body.clone(), Mutex::new(0));
    let server = Server::start(move |request, stream| match request.path.as_str() {
        SUMS => all(stream, &sums(&served, "linux-1.0.tar.xz")),
        XZ => {
            let mut count = count.lock().unwrap();
            *count += 1;
            let sent = if *count == 1 { 100_000 } else { served.len() };
            respond(stream, "200 OK", "", &served, sent);
        }
        _ => missing(stream),
    });
    let mut trial = Trial::new(&server.address);
    assert_eq!(fs::read(trial.fetch().unwrap().path).unwrap(), body);
    assert_eq!(server.ranges(XZ), [None, Some(100_000)]);
}

#[test]
fn fetch_restarts_if_the_file_changed() {
    let (old, new) = (vec![b'o'; 200_000], archive());
    // A server that minds If-Range sends the whole new file; one that does not sends a range of it,
    // with a new tag, or with none at all: then only the checksum tells.
    for (tag, minds) in [("\"2\"", true), ("\"2\"", false), ("", false)] {
        let (first, served) = (old.clone(), new.clone());
        let begun = AtomicBool::new(false);
        let server =
            Server::start(move |request, stream| match (request.path.as_str(), request.range) {
                (SUMS, _) => all(stream, &sums(&served, "linux-1.0.tar.xz")),
                (XZ, None) if !begun.swap(true, Relaxed) => {
                    let header =
                        if tag.is_empty() { String::new() } else { "ETag: \"1\"\r\n".into() };
                    respond(stream, "200 OK", &header, &first, 100_000);
                }
                (XZ, Some(_)) if !minds => {
                    let blind = Request { if_range: None, ..request.clone() };
                    file(&blind, stream, &served, tag);
                }
                (XZ, _) => file(request, stream, &served, tag),
                _ => missing(stream),
            });
        let mut trial = Trial::new(&server.address);
        assert_eq!(fs::read(trial.fetch().unwrap().path).unwrap(), new, "{tag} {minds}");
        let noticed = trial.notes.iter().any(|note| note.contains("changed on the server"));
        assert_eq!(noticed, !tag.is_empty() && !minds, "{:?}", trial.notes);
    }
}

#[test]
fn fetch_rejects_a_wrong_range() {
    let body = archive();
    let (served, count) = (body.clone(), Mutex::new(0));
    let server = Server::start(move |request, stream| match request.path.as_str() {
        SUMS => all(stream, &sums(&served, "linux-1.0.tar.xz")),
        XZ => {
            let mut count = count.lock().unwrap();
            *count += 1;
            match *count {
                1 => respond(stream, "200 OK", "", &served, 100_000),
                2 => {
                    let range = format!("Content-Range: bytes 0-9/{}\r\n", served.len());
                    respond(stream, "206 Partial Content", &range, &served[..10], 10);
                }
                _ => all(stream, &served),
            }
        }
        _ => missing(stream),
    });
    let mut trial = Trial::new(&server.address);
    assert_eq!(fs::read(trial.fetch().unwrap().path).unwrap(), body);
    assert!(trial.notes.iter().any(|note| note.contains("changed on the server")));
}

#[test]
fn fetch_rejects_a_wrong_checksum() {
    let body = archive();
    let server = Server::start(move |request, stream| match request.path.as_str() {
        SUMS => all(stream, &sums(b"something else", "linux-1.0.tar.xz")),
        XZ => file(request, stream, &body, "\"1\""),
        _ => missing(stream),
    });
    let mut trial = Trial::new(&server.address);
    trial.fails("but the server lists");
    assert!(trial.cached().is_empty(), "{:?}", trial.cached());
}

#[test]
fn fetch_without_a_checksum_is_refused_unless_it_is_asked_for() {
    let page = b"<!DOCTYPE html>\n<title>Moved</title>".to_vec();
    let of_another = sums(&archive(), "other.tar.xz");
    let not_a_list = b"checksums moved elsewhere\n".to_vec();
    // An HTML page that quotes the list is none.
    let quoting = [b"<pre>\n".to_vec(), sums(&archive(), "linux-1.0.tar.xz")].concat();
    for list in [None, Some(page), Some(of_another), Some(not_a_list), Some(quoting)] {
        let body = archive();
        let server = Server::start(move |request, stream| match (request.path.as_str(), &list) {
            (SUMS, Some(list)) => all(stream, list),
            (XZ, _) => file(request, stream, &body, "\"1\""),
            _ => missing(stream),
        });
        let mut trial = Trial::new(&server.address);
        trial.fails("cannot be checked");
        assert_eq!(server.asked(), [SUMS], "nothing is downloaded");
        trial.kernel.unverified = true;
        assert!(!trial.fetch().unwrap().checksum_confirmed);
        // In the cache it is as unverified as it was.
        trial.kernel.unverified = false;
        trial.fails("cannot be checked");
        trial.kernel.unverified = true;
        trial.fetch().unwrap();
        assert!(
            trial.notes.iter().any(|note| note.starts_with("WARNING") && note.contains("sha256"))
        );
    }
}

#[test]
fn fetch_fails_if_the_checksum_list_is_unreadable() {
    let body = archive();
    let server = Server::start(move |request, stream| match request.path.as_str() {
        XZ => file(request, stream, &body, "\"1\""),
        _ => respond(stream, "403 Forbidden", "", b"", 0),
    });
    Trial::new(&server.address).fails("403");
}

#[test]
fn fetch_times_out_on_a_stalled_server() {
    let mut trials = Vec::new();
    for dribbles in [false, true] {
        let server = Server::start(move |request, stream| match request.path.as_str() {
            XZ => respond_slowly(stream, dribbles),
            _ => missing(stream),
        });
        trials.push((Trial::unverified(&server.address), "broke off"));
    }
    // One that takes the connection and never answers.
    let silent = Server::start(|_, _| std::thread::sleep(Duration::from_mins(1)));
    // One whose list of checksums comes a byte at a time.
    let slow_list = Server::start(|_, stream| respond_slowly(stream, true));
    trials.push((Trial::new(&slow_list.address), "broke off"));
    // One whose head never ends, and one whose list never does.
    let endless_head = Server::start(|_, stream| {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n");
        respond_slowly_with(stream, b"X: y\r\n");
    });
    trials.push((Trial::new(&endless_head.address), "timeout"));
    let endless_list = Server::start(|_, stream| {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000000\r\n\r\n");
        while stream.write_all(&[b'\n'; 1 << 14]).is_ok() {}
    });
    trials.push((Trial::new(&endless_list.address), "broke off"));
    trials.push((Trial::new(&silent.address), "timeout"));
    std::thread::scope(|scope| {
        for (mut trial, about) in trials {
            trial.kernel.timeout = Duration::from_millis(300);
            scope.spawn(move || {
                let began = Instant::now();
                trial.fails(about);
                assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
            });
        }
    });
}

/// A head that promises much, and then next to nothing for a long time.
fn respond_slowly(stream: &mut TcpStream, dribbles: bool) {
    let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n");
    respond_slowly_with(stream, if dribbles { b"x" } else { b"" });
}

fn respond_slowly_with(stream: &mut TcpStream, piece: &[u8]) {
    for _ in 0..600 {
        if stream.write_all(piece).is_err() {
            return;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn fetch_fails_fast_without_a_server() {
    let port = free_port();
    let mirror = format!("http://127.0.0.1:{port}");
    Trial::new(&mirror).fails(&mirror);
    for mirror in ["", "kernel.org", "ftp://kernel.org", "https://", "file:///etc"] {
        Trial::new(mirror).fails("invalid `mirror_uri`");
    }
}

#[test]
fn an_earlier_archive_outlives_a_failed_fetch() {
    let body = archive();
    let served = body.clone();
    let server = Server::start(move |request, stream| match request.path.as_str() {
        XZ => file(request, stream, &served, "\"1\""),
        _ => missing(stream),
    });
    let mut trial = Trial::unverified(&server.address);
    let kept = trial.fetch().unwrap();
    trial.kernel.version = "v1.0/9.9".parse().unwrap();
    trial.fails("neither");
    assert_eq!(fs::read(kept.path).unwrap(), body);
}

#[test]
fn the_command_prints_the_path_and_nothing_else_on_stdout() {
    let body = archive();
    let served = body.clone();
    let server = Server::start(move |request, stream| match request.path.as_str() {
        SUMS => all(stream, &sums(&served, "linux-1.0.tar.xz")),
        XZ => file(request, stream, &served, "\"1\""),
        _ => missing(stream),
    });
    let cache = tempfile::tempdir().unwrap();
    let fetch = |version: &str| {
        laam()
            .args(["fetch", "--version", version, "--mirror_uri", &server.address])
            .env("LAAM_CACHE", cache.path())
            .output()
            .unwrap()
    };
    let output = fetch("v1.0/1.0");
    let path = String::from_utf8(output.stdout).unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    assert!(path.starts_with(cache.path().to_str().unwrap()), "{path}");
    assert_eq!(fs::read(path.strip_suffix('\n').unwrap()).unwrap(), body);
    assert!(said.contains("fetching http") && !said.contains('\x1b'), "{said}");

    for version in ["1.0", "v1.0/../1.0", "v1.0/7.7"] {
        let output = fetch(version);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), output.stdout.len()), (Some(2), 0), "{said}");
        assert!(said.lines().count() == 2 && said.starts_with("laam: "), "{said}");
        assert!(said.lines().nth(1).unwrap().starts_with("hint: "), "{said}");
    }
}

#[test]
fn redirects_are_followed_recorded_and_bounded() {
    let body = archive();
    let served = body.clone();
    let server = Server::start(move |request, stream| match request.path.as_str() {
        SUMS => respond(stream, "302 Found", "Location: elsewhere/sums\r\n", b"", 0),
        "/v1.0/elsewhere/sums" => all(stream, &sums(&served, "linux-1.0.tar.xz")),
        XZ => respond(stream, "307 Temporary Redirect", "Location: /kernel/moved\r\n", b"", 0),
        "/moved" => file(request, stream, &served, "\"1\""),
        _ => missing(stream),
    });
    let mut trial = Trial::new(&server.address);
    let fetched = trial.fetch().unwrap();
    assert_eq!(fs::read(&fetched.path).unwrap(), body);
    let moved = format!("{}/moved", server.address);
    assert_eq!(fetched.redirects, std::slice::from_ref(&moved));
    assert!(trial.notes.iter().any(|note| note.contains(&moved)), "{:?}", trial.notes);
    assert_eq!(trial.fetch().unwrap(), fetched, "the record keeps them");

    let circle = Server::start(|_, stream| {
        respond(stream, "301 Moved Permanently", "Location: sha256sums.asc\r\n", b"", 0);
    });
    Trial::new(&circle.address).fails("more than 5 redirects");
    assert_eq!(circle.asked().len(), 6);
    for nowhere in ["", "Location: ftp://a.org/b\r\n", "Location: file:///etc/passwd\r\n"] {
        let server = Server::start(move |_, stream| respond(stream, "302 Found", nowhere, b"", 0));
        Trial::new(&server.address).fails("redirects to nowhere");
    }
}

/// A server that breaks off after each piece, or changes the file again and again.
#[test]
fn attempts_are_bounded_even_if_each_makes_progress() {
    let (count, big) = (Mutex::new(0), vec![b'x'; 5 << 20]);
    let server = Server::start(move |request, stream| match request.path.as_str() {
        XZ if request.range.is_none() => {
            respond(stream, "200 OK", "ETag: \"1\"\r\n", &big, 2 << 20);
        }
        XZ => {
            *count.lock().unwrap() += 1;
            respond(stream, "416 Range Not Satisfiable", "", b"", 0);
        }
        _ => missing(stream),
    });
    let mut trial = Trial::unverified(&server.address);
    trial.kernel.timeout = Duration::from_millis(600);
    trial.fails("broke off");
    assert!(server.asked().len() <= 70, "{}", server.asked().len());
}

#[test]
fn the_help_says_what_is_not_verified() {
    let help = laam().args(["fetch", "--help"]).output().unwrap().stdout;
    let help = String::from_utf8(help).unwrap();
    let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
    for said in ["No hash is pinned", "signature is not verified", "--unverified"] {
        assert!(help.contains(said), "{said}: {help}");
    }
}
