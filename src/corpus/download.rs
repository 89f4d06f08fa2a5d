//! One file over HTTP, into `NAME.part`: resumed where it broke off, with timeouts on everything.
//!
//! Beside `NAME.part` lies `NAME.part.json`, which says what it is a part of, so that a file that
//! has changed on the server is downloaded again from the start.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use ureq::http::{Response, StatusCode, header};
use ureq::tls::TlsConfig;
use ureq::{Agent, Body};

use super::event::{FetchEvent, MAX_RECORD_BYTES, Tell, cannot_write};
use crate::error;
use crate::files;

/// Size limit of a download. The largest kernel archive has 230 MB.
const MAX_DOWNLOAD_BYTES: u64 = 2 << 30;

/// Failed attempts in a row after which a download is given up.
const MAX_FAILED_ATTEMPTS: u32 = 4;

/// An attempt that got this far does not count as failed.
const MIN_PROGRESS_BYTES: u64 = 1 << 20;

/// Slower than this over a whole timeout, a download counts as stuck.
const MIN_BYTES_PER_SECOND: u64 = 1 << 10;

/// An HTTP client that never waits longer than `timeout` for the next byte.
pub fn agent(timeout: Duration) -> Agent {
    agent_with(timeout, TlsConfig::default())
}

fn agent_with(timeout: Duration, tls: TlsConfig) -> Agent {
    Agent::config_builder()
        .tls_config(tls)
        .http_status_as_error(false)
        .timeout_resolve(Some(timeout))
        .timeout_connect(Some(timeout))
        .timeout_send_request(Some(timeout))
        .timeout_recv_response(Some(timeout))
        .timeout_per_read(Some(timeout))
        // Followed by `get`, which looks at where they lead.
        .max_redirects(0)
        .user_agent(concat!("laam/", env!("CARGO_PKG_VERSION")))
        .build()
        .into()
}

/// Redirects that are followed for one request.
const MAX_REDIRECTS: usize = 5;

/// Requests for one file, failed or not.
const MAX_ATTEMPTS: u32 = 64;

/// Bytes of a small text.
const MAX_TEXT_BYTES: u64 = 16 << 20;

/// Why a request has no response.
enum RequestError {
    Failed(ureq::Error),
    Refused(anyhow::Error),
}

/// Requests `url` and follows redirects, but never from https to http. Returns the response and the
/// addresses that redirects led to, in order.
fn get(
    agent: &Agent,
    url: &str,
    headers: &[(header::HeaderName, String)],
) -> Result<(Response<Body>, Vec<String>), RequestError> {
    let mut followed: Vec<String> = Vec::new();
    loop {
        let at = followed.last().map_or(url, String::as_str);
        let mut request = agent.get(at);
        for (name, value) in headers {
            request = request.header(name, value);
        }
        let response = request.call().map_err(RequestError::Failed)?;
        if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
            return Ok((response, followed));
        }
        let refuse = |why: String| {
            let hint = "name another server in `mirror_uri`";
            Err(RequestError::Refused(error::data(format!("{why}, {url}"), hint)))
        };
        let Some(next) = text_of(&response, &header::LOCATION).and_then(|to| resolve(at, &to))
        else {
            return refuse("the server redirects to nowhere".to_string());
        };
        if at.starts_with("https://") && !next.starts_with("https://") {
            return refuse(format!("the server redirects from https to {next}"));
        }
        if followed.len() == MAX_REDIRECTS {
            return refuse(format!("more than {MAX_REDIRECTS} redirects"));
        }
        followed.push(next);
    }
}

/// The http or https address that `location` means at `base`.
fn resolve(base: &str, location: &str) -> Option<String> {
    let (scheme, rest) = base.split_once("://")?;
    let host = rest.split(['/', '?', '#']).next()?;
    let location = location.split('#').next()?;
    let lower = location.to_ascii_lowercase();
    Some(if lower.starts_with("http://") || lower.starts_with("https://") {
        let (scheme, rest) = location.split_once("://")?;
        format!("{}://{rest}", scheme.to_ascii_lowercase())
    } else if let Some(rest) = location.strip_prefix("//") {
        format!("{scheme}://{rest}")
    } else if location.starts_with('/') {
        format!("{scheme}://{host}{location}")
    } else if location.is_empty() || location.contains(':') {
        return None;
    } else {
        let folder = base.split(['?', '#']).next()?.rsplit_once('/')?.0;
        format!("{folder}/{location}")
    })
}

/// A small text, or `None` if the server has no such file.
pub fn text(agent: &Agent, url: &str, timeout: Duration) -> anyhow::Result<Option<String>> {
    let (response, _) = get(agent, url, &[]).map_err(|why| match why {
        RequestError::Failed(why) => unreachable(url, &why),
        RequestError::Refused(error) => error,
    })?;
    match response.status() {
        StatusCode::OK => {
            let mut body = response.into_body().into_with_config().limit(MAX_TEXT_BYTES).reader();
            let (mut text, mut buffer) = (Vec::new(), vec![0; 1 << 14]);
            let mut pace = Pace::new(timeout, 0);
            let mut read = || -> io::Result<bool> {
                let n = body.read(&mut buffer)?;
                text.extend(&buffer[..n]);
                pace.keep_up(text.len() as u64).map(|()| n > 0)
            };
            loop {
                match read() {
                    Ok(true) => {}
                    Ok(false) => break,
                    Err(why) => return Err(broken_off(url, &why)),
                }
            }
            Ok(Some(String::from_utf8_lossy(&text).into_owned()))
        }
        StatusCode::NOT_FOUND | StatusCode::GONE => Ok(None),
        status => Err(refused(url, status)),
    }
}

/// One download.
pub struct Download<'a> {
    pub agent: &'a Agent,
    pub url: &'a str,
    /// Target of the bytes.
    pub part: PathBuf,
    pub timeout: Duration,
}

/// Result of a download that did not fail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DownloadOutcome {
    /// The part is the whole file. `resumed`: some of it is from an earlier attempt.
    Complete {
        resumed: bool,
        /// The addresses that redirects led to, in order.
        redirects: Vec<String>,
    },
    /// The server has no such file.
    Missing,
}

/// Identity of the remote file that a part belongs to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Origin {
    url: String,
    etag: Option<String>,
    last_modified: Option<String>,
}

/// Why an attempt failed, and whether another may do better.
enum Failure {
    Final(anyhow::Error),
    Passing(String),
}

impl From<io::Error> for Failure {
    fn from(why: io::Error) -> Self {
        Self::Passing(why.to_string())
    }
}

impl Download<'_> {
    /// Runs to the end, taking up again what broke off.
    pub fn run(&self, tell: Tell) -> anyhow::Result<DownloadOutcome> {
        let (mut failures, mut attempts) = (0, 0);
        let mut resumed = self.length() > 0;
        loop {
            let before = self.length();
            attempts += 1;
            match self.attempt(tell) {
                Ok(None) => return Ok(DownloadOutcome::Missing),
                Ok(Some((from, redirects))) => {
                    let resumed = resumed && from > 0;
                    return Ok(DownloadOutcome::Complete { resumed, redirects });
                }
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Passing(why)) => {
                    let gained = self.length().saturating_sub(before);
                    failures = if gained >= MIN_PROGRESS_BYTES { 0 } else { failures + 1 };
                    if failures >= MAX_FAILED_ATTEMPTS || attempts >= MAX_ATTEMPTS {
                        return Err(error::data(
                            format!(
                                "the download broke off at byte {} ({why}), {}",
                                self.length(),
                                self.url
                            ),
                            "run the command again: it resumes where it stopped",
                        ));
                    }
                    tell(FetchEvent::Note(format!("{why}; trying again")));
                    std::thread::sleep(self.timeout / 60 * failures);
                    resumed = true;
                }
            }
        }
    }

    /// Forgets what is there.
    pub fn discard(&self) -> io::Result<()> {
        for file in [&self.part, &self.origin_file()] {
            match fs::remove_file(file) {
                Err(why) if why.kind() != io::ErrorKind::NotFound => return Err(why),
                _ => {}
            }
        }
        Ok(())
    }

    /// Path of the part's [`Origin`].
    pub fn origin_file(&self) -> PathBuf {
        self.part.with_added_extension("json")
    }

    fn length(&self) -> u64 {
        fs::metadata(&self.part).map_or(0, |metadata| metadata.len())
    }

    /// One request. The offset it started at and the redirects on the way, or `None` if there is no such
    /// file.
    fn attempt(&self, tell: Tell) -> Result<Option<(u64, Vec<String>)>, Failure> {
        let origin: Option<Origin> = files::read(&self.origin_file(), MAX_RECORD_BYTES)
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .filter(|origin: &Origin| origin.url == self.url);
        if origin.is_none() {
            self.discard().map_err(|why| unwritable(&self.part, &why))?;
        }
        let have = self.length();

        let mut headers = Vec::new();
        if have > 0 {
            headers.push((header::RANGE, format!("bytes={have}-")));
            // Only a strong validator says that the bytes are the same (RFC 9110, 13.1.5).
            let validator = origin.as_ref().and_then(|origin| {
                let strong = origin.etag.as_ref().filter(|etag| !etag.starts_with("W/"));
                strong.or(origin.last_modified.as_ref())
            });
            headers.extend(validator.map(|validator| (header::IF_RANGE, validator.clone())));
        }
        let (response, redirects) = match get(self.agent, self.url, &headers) {
            Ok(answered) => answered,
            // What was reached before may only be away for a moment.
            Err(RequestError::Failed(why)) if have > 0 => {
                return Err(Failure::Passing(why.to_string()));
            }
            Err(RequestError::Failed(why)) => {
                return Err(Failure::Final(unreachable(self.url, &why)));
            }
            Err(RequestError::Refused(error)) => return Err(Failure::Final(error)),
        };
        for address in &redirects {
            tell(FetchEvent::Note(format!("redirected to {address}")));
        }
        let now = Origin {
            url: self.url.to_string(),
            etag: text_of(&response, &header::ETAG),
            last_modified: text_of(&response, &header::LAST_MODIFIED),
        };
        let from = match response.status() {
            StatusCode::OK => 0,
            StatusCode::PARTIAL_CONTENT
                if have > 0
                    && range_start(&response) == Some(have)
                    && origin.as_ref() == Some(&now) =>
            {
                have
            }
            // Not the range we asked for, or of another file than the one we have the start of.
            StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE => {
                self.discard().map_err(|why| unwritable(&self.part, &why))?;
                return Err(Failure::Passing("the file has changed on the server".to_string()));
            }
            StatusCode::NOT_FOUND | StatusCode::GONE => return Ok(None),
            status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => {
                return Err(Failure::Passing(format!("the server answered {status}")));
            }
            status => return Err(Failure::Final(refused(self.url, status))),
        };
        self.receive(response, from, &now, tell)?;
        Ok(Some((from, redirects)))
    }

    /// Appends a response's body to the part.
    fn receive(
        &self,
        response: Response<Body>,
        from: u64,
        origin: &Origin,
        tell: Tell,
    ) -> Result<(), Failure> {
        let unwritable = |why: io::Error| unwritable(&self.part, &why);
        let mut part = files::open_own(&self.part).map_err(unwritable)?;
        part.set_len(from).map_err(unwritable)?;
        part.seek(SeekFrom::Start(from)).map_err(unwritable)?;
        let note = serde_json::to_vec(origin).map_err(io::Error::from)?;
        write_whole(&self.origin_file(), &note).map_err(unwritable)?;

        let total = response.body().content_length().map(|length| from + length);
        tell(FetchEvent::Start { url: self.url.to_string() });
        tell(FetchEvent::Progress { done: from, total });
        let mut body = response.into_body().into_with_config().limit(u64::MAX).reader();
        let mut buffer = vec![0; 1 << 16];
        let mut done = from;
        let mut pace = Pace::new(self.timeout, done);
        loop {
            let n = body.read(&mut buffer)?;
            if n == 0 {
                break;
            }
            part.write_all(&buffer[..n]).map_err(unwritable)?;
            done += n as u64;
            if done > MAX_DOWNLOAD_BYTES {
                let _ = self.discard(); // the error matters more
                let what = format!("download larger than {MAX_DOWNLOAD_BYTES} bytes, {}", self.url);
                return Err(Failure::Final(error::data(
                    what,
                    "this is not a kernel archive: use another `mirror_uri`",
                )));
            }
            tell(FetchEvent::Progress { done, total });
            pace.keep_up(done)?;
        }
        if total.is_some_and(|total| done < total) {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        part.sync_all().map_err(unwritable)?;
        tell(FetchEvent::End);
        Ok(())
    }
}

/// Notices a server that sends a byte now and then, which no timeout does.
struct Pace {
    timeout: Duration,
    since: Instant,
    from: u64,
}

impl Pace {
    fn new(timeout: Duration, from: u64) -> Self {
        Self { timeout, since: Instant::now(), from }
    }

    fn keep_up(&mut self, done: u64) -> io::Result<()> {
        let elapsed = self.since.elapsed();
        if elapsed < self.timeout {
            return Ok(());
        }
        if ((done - self.from) as f64) < MIN_BYTES_PER_SECOND as f64 * elapsed.as_secs_f64() {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "less than 1 KiB per second"));
        }
        (self.since, self.from) = (Instant::now(), done);
        Ok(())
    }
}

fn text_of(response: &Response<Body>, name: &header::HeaderName) -> Option<String> {
    Some(response.headers().get(name)?.to_str().ok()?.to_string())
}

/// The first byte of `Content-Range: bytes FIRST-LAST/TOTAL`.
fn range_start(response: &Response<Body>) -> Option<u64> {
    let range = text_of(response, &header::CONTENT_RANGE)?;
    range.strip_prefix("bytes ")?.split_once('-')?.0.trim().parse().ok()
}

fn unreachable(url: &str, why: &ureq::Error) -> anyhow::Error {
    error::data(
        format!("{why}, {url}"),
        "check the network, name another server in `mirror_uri`, or use an archive you have",
    )
}

fn broken_off(url: &str, why: &io::Error) -> anyhow::Error {
    error::data(
        format!("the download broke off ({why}), {url}"),
        "check the network, or name another server in `mirror_uri`",
    )
}

fn refused(url: &str, status: StatusCode) -> anyhow::Error {
    error::data(
        format!("the server answered {status}, {url}"),
        "name another server in `mirror_uri`",
    )
}

fn unwritable(file: &Path, why: &io::Error) -> Failure {
    Failure::Final(cannot_write(file, why))
}

/// Writes a small file so that it is there whole or not at all.
pub fn write_whole(file: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = file.with_added_extension("tmp");
    // Someone's link or FIFO, or a leftover: whoever writes here holds the lock.
    match fs::remove_file(&temporary) {
        Err(why) if why.kind() != io::ErrorKind::NotFound => return Err(why),
        _ => {}
    }
    let mut out = File::create_new(&temporary)?;
    out.write_all(bytes)?;
    out.sync_all()?;
    fs::rename(temporary, file)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::sync::Arc;

    use rustls::pki_types::{CertificateDer, PrivateKeyDer};

    use super::*;

    /// Starts an https server on this machine that redirects `/a` to `/b`, answers `/b` with its name, and
    /// redirects all else to `elsewhere`.
    fn https_server(elsewhere: String) -> String {
        let certificate = include_bytes!("../../tests/fixtures/tls/certificate.der");
        let key = include_bytes!("../../tests/fixtures/tls/key.der");
        let key = PrivateKeyDer::try_from(key.to_vec()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![CertificateDer::from(certificate.to_vec())], key)
            .unwrap();
        let (config, listener) = (Arc::new(config), TcpListener::bind("127.0.0.1:0").unwrap());
        let address = format!("https://{}", listener.local_addr().unwrap());
        // The thread listens until the test's process ends.
        std::thread::spawn(move || {
            for socket in listener.incoming().flatten() {
                let connection = rustls::ServerConnection::new(config.clone()).unwrap();
                let mut stream = rustls::StreamOwned::new(connection, socket);
                let mut request = Vec::new();
                let mut byte = [0];
                while !request.ends_with(b"\r\n\r\n") && stream.read(&mut byte).is_ok_and(|n| n > 0)
                {
                    request.extend(byte);
                }
                let request = String::from_utf8_lossy(&request);
                let path = request.split(' ').nth(1).unwrap_or_default();
                let (status, header) = match path {
                    "/a" => ("302 Found", "Location: /b\r\n".to_string()),
                    "/b" => ("200 OK", String::new()),
                    _ => ("302 Found", format!("Location: {elsewhere}\r\n")),
                };
                let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n", path.len());
                let _ = write!(stream, "{head}Connection: close\r\n{header}\r\n{path}");
                stream.conn.send_close_notify();
                let _ = stream.flush();
            }
        });
        address
    }

    #[test]
    fn https_is_never_redirected_to_http() {
        let plain = TcpListener::bind("127.0.0.1:0").unwrap();
        plain.set_nonblocking(true).unwrap();
        let timeout = Duration::from_secs(20);
        // The certificate is nobody's.
        let agent = agent_with(timeout, TlsConfig::builder().disable_verification(true).build());
        let at = |location: String| https_server(location);
        let http = format!("http://{}/b", plain.local_addr().unwrap());
        let insecure = at(http.clone());
        assert_eq!(text(&agent, &format!("{insecure}/a"), timeout).unwrap().unwrap(), "/b");
        // At once, by the address of another scheme in capitals, and after another redirect.
        for first in
            [insecure.clone(), at(http.replace("http", "HTTP")), at(format!("{insecure}/c"))]
        {
            let url = format!("{first}/x");
            let folder = tempfile::tempdir().unwrap();
            let part = folder.path().join("part");
            let download = Download { agent: &agent, url: &url, part, timeout };
            for why in
                [text(&agent, &url, timeout).unwrap_err(), download.run(&mut |_| {}).unwrap_err()]
            {
                let why = format!("{why:#}");
                assert!(why.contains("redirects from https to http://"), "{why}");
            }
        }
        let asked = plain.accept().map(drop).unwrap_err();
        assert_eq!(asked.kind(), io::ErrorKind::WouldBlock, "nothing is asked for without TLS");
    }

    #[test]
    fn locations_are_resolved_against_the_address_they_came_from() {
        let base = "https://a.org/x/y.tar.xz?q";
        for (location, expected) in [
            ("http://b.org/z", Some("http://b.org/z")),
            ("HTTPS://b.org/z", Some("https://b.org/z")),
            ("//b.org/z", Some("https://b.org/z")),
            ("/z", Some("https://a.org/z")),
            ("z#part", Some("https://a.org/x/z")),
            ("ftp://b.org/z", None),
            ("file:/etc/passwd", None),
            ("", None),
        ] {
            assert_eq!(resolve(base, location).as_deref(), expected, "{location}");
        }
    }
}
