//! Kernel archives from kernel.org by version, checked and kept in a cache.
//!
//! An archive is compared with the `sha256sums.asc` of its folder. That guards against damage and
//! against a mirror that serves something else than it lists. No hash is pinned in the program, and the
//! list's PGP signature is not verified: trust in the list is trust in the server and its TLS certificate.

use std::fmt;
use std::fs;
#[cfg(feature = "fetch")]
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

#[cfg(feature = "fetch")]
use super::download::{self, Download, DownloadOutcome, write_whole};
use super::event::{FetchEvent, MAX_RECORD_BYTES, Tell, cannot_write};
use super::sha256_of;
#[cfg(feature = "fetch")]
use super::time;
use crate::error::{self, ErrorKind, Hint};
use crate::files;

/// Default server.
pub const MIRROR: &str = "https://cdn.kernel.org/pub/linux/kernel";

const VERSION_HINT: &str = "a version is a folder and a number, like v1.0/1.0 or v6.x/6.9.4";

/// A kernel's folder and number, as in `v1.0/1.0`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    /// The folder under the mirror, `/`-separated.
    folder: String,
    number: String,
}

impl FromStr for Version {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        // Parts become part of a URL and of a file's name.
        let plain = |part: &str| {
            !part.is_empty()
                && part.len() <= 64
                && !part.starts_with('.')
                && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte))
        };
        match text.rsplit_once('/') {
            Some((folder, number))
                if folder.len() <= 256 && text.split('/').all(plain) && plain(number) =>
            {
                Ok(Self { folder: folder.to_string(), number: number.to_string() })
            }
            _ => {
                let shown = super::names::shown(text.as_bytes());
                Err(error::config(format!("invalid kernel version {shown}"), VERSION_HINT))
            }
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.folder, self.number)
    }
}

/// A kernel archive, and where to get and keep it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinuxRelease {
    /// Version on kernel.org.
    pub version: Version,
    /// `http(s)://HOST/PATH`, the folder that holds `v1.0`.
    pub mirror: String,
    /// The cache's folder: see [`cache_folder`].
    pub cache: PathBuf,
    /// The longest wait for a server.
    pub timeout: Duration,
    /// Accept an archive that no checksum list names.
    pub unverified: bool,
}

/// An archive in the cache. The record beside it (`ARCHIVE.json`) holds the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fetched {
    /// Archive in the cache.
    #[serde(skip)]
    pub path: PathBuf,
    /// Address it came from.
    pub url: String,
    /// Time of the download: UTC, RFC 3339.
    pub retrieved: String,
    /// SHA-256 of the archive.
    pub sha256: String,
    /// True if the server's list names the archive, with this sha256. False if it has no list or
    /// does not name it; an archive that the list contradicts is refused.
    pub checksum_confirmed: bool,
    /// The addresses that redirects led to, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub redirects: Vec<String>,
}

impl LinuxRelease {
    /// A kernel from the usual server, in the usual cache.
    pub fn new(version: Version) -> anyhow::Result<Self> {
        let timeout = Duration::from_secs(30);
        let (mirror, cache) = (MIRROR.to_string(), cache_folder()?);
        Ok(Self { version, mirror, cache, timeout, unverified: false })
    }

    /// The archive: from the cache if it is there and unharmed, else downloaded. The whole file is
    /// hashed either way.
    pub fn fetch(&self, tell: Tell) -> anyhow::Result<Fetched> {
        let mirror = self.mirror.trim_end_matches('/');
        let folder = self.folder()?;
        if let Some(fetched) = self.cached(&folder, tell)? {
            return Ok(fetched);
        }
        fs::create_dir_all(&folder).map_err(|why| cannot_write(&folder, &why))?;
        // Whoever else is fetching the same archive is waited for; the lock ends with the process.
        let lock_file = folder.join(format!("linux-{}.lock", self.version.number));
        let lock = files::open_own(&lock_file).map_err(|why| cannot_write(&lock_file, &why))?;
        if lock.try_lock().is_err() {
            tell(FetchEvent::Note(
                "another laam is fetching the same archive; waiting".to_string(),
            ));
            lock.lock().map_err(|why| cannot_write(&lock_file, &why))?;
            if let Some(fetched) = self.cached(&folder, tell)? {
                return Ok(fetched);
            }
        }
        self.download(&format!("{mirror}/{}", self.version.folder), &folder, tell)
    }

    /// Takes the archive from the mirror that a URL of it names, if that is in the cache. A URL that a
    /// model's folder gives is never asked for anything.
    pub fn use_cached_mirror(&mut self, url: &str) {
        let [xz, gz] = self.names().map(|name| format!("/{}/{name}", self.version.folder));
        let Some(mirror) = url.strip_suffix(&xz).or_else(|| url.strip_suffix(&gz)) else { return };
        let there = Self { mirror: mirror.to_string(), ..self.clone() };
        let folder = there.folder();
        if folder.is_ok_and(|folder| self.names().iter().any(|name| folder.join(name).is_file())) {
            *self = there;
        }
    }

    /// The folder of the cache for the version and the mirror.
    fn folder(&self) -> anyhow::Result<PathBuf> {
        let mirror = self.mirror.trim_end_matches('/');
        let host = mirror.strip_prefix("https://").or_else(|| mirror.strip_prefix("http://"));
        let Some(host) = host.filter(|host| !host.is_empty()) else {
            return Err(error::config(
                format!("invalid `mirror_uri` {}", super::names::shown(mirror.as_bytes())),
                format!("give the http or https address of a folder, like {MIRROR}"),
            ));
        };
        // Each server has its own folder: what one says is never taken for what another said.
        let plain = |c: char| if c.is_ascii_alphanumeric() || ".-".contains(c) { c } else { '_' };
        let host: String = host.chars().map(plain).collect();
        Ok(self.cache.join(format!("at-{host}")).join(&self.version.folder))
    }

    fn names(&self) -> [String; 2] {
        ["xz", "gz"].map(|packing| format!("linux-{}.tar.{packing}", self.version.number))
    }

    /// The archive as an earlier fetch left it, if its bytes still are what they were.
    fn cached(&self, folder: &Path, tell: Tell) -> anyhow::Result<Option<Fetched>> {
        for name in self.names() {
            let path = folder.join(name);
            let record = files::read(&record_of(&path), MAX_RECORD_BYTES).ok();
            let Some(fetched) =
                record.and_then(|record| serde_json::from_slice::<Fetched>(&record).ok())
            else {
                continue;
            };
            // One that was accepted unverified counts only where that is accepted again.
            if !path.is_file() || !(fetched.checksum_confirmed || self.unverified) {
                continue;
            }
            if sha256_of(&path)? == fetched.sha256 {
                return Ok(Some(Fetched { path, ..fetched }));
            }
            let damaged = format!("the cached {} is damaged; fetching it again", path.display());
            tell(FetchEvent::Note(damaged));
        }
        Ok(None)
    }

    #[cfg(not(feature = "fetch"))]
    fn download(&self, _: &str, _: &Path, _: Tell) -> anyhow::Result<Fetched> {
        Err(error::missing_feature("fetch"))
    }

    #[cfg(feature = "fetch")]
    fn download(&self, base: &str, folder: &Path, tell: Tell) -> anyhow::Result<Fetched> {
        let agent = download::agent(self.timeout);
        let list = download::text(&agent, &format!("{base}/sha256sums.asc"), self.timeout)?;
        let list = list.filter(|list| is_checksum_list(list));
        let listed = |name: &str| checksum_in(list.as_deref()?, name);
        if !self.unverified && !self.names().iter().any(|name| listed(name).is_some()) {
            let what = match &list {
                None => "the server has no list of checksums",
                Some(_) => "the server's list of checksums does not name it",
            };
            return Err(error::data(
                format!(
                    "linux-{} cannot be checked: {what}, {base}/sha256sums.asc",
                    self.version.number
                ),
                format!(
                    "{VERSION_HINT}; to accept an archive that cannot be checked, set `unverified`"
                ),
            ));
        }
        for name in self.names() {
            let url = format!("{base}/{name}");
            let path = folder.join(&name);
            let part = path.with_added_extension("part");
            let download = Download { agent: &agent, url: &url, part, timeout: self.timeout };
            let listed = listed(&name);
            if listed.is_none() && !self.unverified {
                continue;
            }
            let Some((sha256, redirects)) = checked(&download, listed.as_deref(), tell)? else {
                continue;
            };
            if listed.is_none() {
                let what =
                    if list.is_none() { "has no sha256sums.asc" } else { "does not list it" };
                tell(FetchEvent::Note(format!(
                    "WARNING: {name} could not be checked: {base} {what}; its sha256 is {sha256}"
                )));
            }
            let fetched = Fetched {
                path: path.clone(),
                url: url.clone(),
                retrieved: time::now(),
                sha256,
                checksum_confirmed: listed.is_some(),
                redirects,
            };
            keep(&download, &path, &fetched).map_err(|why| cannot_write(&path, &why))?;
            return Ok(fetched);
        }
        let [xz, gz] = self.names();
        Err(error::data(format!("the server has neither {xz} nor {gz}, {base}/"), VERSION_HINT))
    }
}

/// Downloads and compares the sha256 with the listed one; retries once if a resumed part may be at
/// fault. Returns the sha256 and the redirects; none if there is no such file.
#[cfg(feature = "fetch")]
fn checked(
    download: &Download,
    listed: Option<&str>,
    tell: Tell,
) -> anyhow::Result<Option<(String, Vec<String>)>> {
    for is_last in [false, true] {
        let DownloadOutcome::Complete { resumed, redirects } = download.run(tell)? else {
            return Ok(None);
        };
        let sha256 = sha256_of(&download.part)?;
        if listed.is_none_or(|listed| listed == sha256) {
            return Ok(Some((sha256, redirects)));
        }
        download.discard().map_err(|why| cannot_write(&download.part, &why))?;
        if !resumed || is_last {
            let listed = listed.unwrap_or_default();
            return Err(error::data(
                format!("sha256 is {sha256}, but the server lists {listed}, {}", download.url),
                "the file was damaged or replaced: try again later, or use another `mirror_uri`",
            ));
        }
        tell(FetchEvent::Note(
            "the resumed download has a wrong checksum; starting over".to_string(),
        ));
    }
    Err(error::internal("a download has two attempts"))
}

/// True of a text with a line `HASH  NAME`: a page in place of the list has none.
#[cfg(feature = "fetch")]
fn is_checksum_list(text: &str) -> bool {
    let is_html = text.trim_start().starts_with('<');
    !is_html && text.lines().any(|line| hash_and_name(line).is_some())
}

/// Moves the part into place. The record comes first: alone, it counts for nothing.
#[cfg(feature = "fetch")]
fn keep(download: &Download, path: &Path, fetched: &Fetched) -> io::Result<()> {
    write_whole(&record_of(path), &serde_json::to_vec_pretty(fetched)?)?;
    fs::rename(&download.part, path)?;
    fs::remove_file(download.origin_file())
}

fn record_of(path: &Path) -> PathBuf {
    path.with_added_extension("json")
}

/// The hash of a file in a list of lines `HASH  NAME` (or `HASH *NAME`), which may be signed text.
pub fn checksum_in(list: &str, name: &str) -> Option<String> {
    let mut lines = list.lines().filter_map(hash_and_name);
    lines.find(|(_, listed)| *listed == name).map(|(hash, _)| hash.to_ascii_lowercase())
}

fn hash_and_name(line: &str) -> Option<(&str, &str)> {
    let (hash, name) = line.trim_end().split_once(' ')?;
    let name = name.strip_prefix([' ', '*'])?;
    let is_hash = hash.len() == 64 && hash.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_hash.then_some((hash, name))
}

/// Cache folder of downloads: `LAAM_CACHE`, else `XDG_CACHE_HOME/laam`, else `~/.cache/laam`.
pub fn cache_folder() -> anyhow::Result<PathBuf> {
    let folder = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let given = std::env::var_os("LAAM_CACHE").filter(|given| !given.is_empty());
    given
        .map(PathBuf::from)
        .or_else(|| Some(folder("XDG_CACHE_HOME")?.join("laam")))
        .or_else(|| Some(folder("HOME")?.join(".cache/laam")))
        .ok_or_else(|| anyhow::anyhow!("no folder for downloads"))
        .hint(ErrorKind::Config, || "set LAAM_CACHE to a folder")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_a_folder_and_a_number() {
        for good in ["v1.0/1.0", "v6.x/6.9.4", "v2.6/longterm/v2.6.32/2.6.32.61", "v5.x/5.1-rc1"] {
            assert_eq!(good.parse::<Version>().unwrap().to_string(), good);
        }
        let long = format!("v1.0/{}", "1".repeat(99));
        for bad in
            ["", "1.0", "/1.0", "v1.0/", "v1.0/../1.0", "v1.0/1.0?x", "v1 0/1", "a//b", &long]
        {
            assert!(bad.parse::<Version>().is_err(), "{bad}");
        }
    }

    #[cfg(feature = "fetch")]
    #[test]
    fn checksum_list_matches_exact_names() {
        let (a, b) = ("a".repeat(64), "B".repeat(64));
        let list = format!(
            "-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n\n{a}  linux-1.0.tar.xz.sign\n\
             {b}  linux-1.0.tar.xz\r\nshort  linux-1.0.tar.gz\n{a} *patch.gz\n"
        );
        assert_eq!(checksum_in(&list, "linux-1.0.tar.xz"), Some("b".repeat(64)));
        assert_eq!(checksum_in(&list, "patch.gz"), Some(a));
        assert_eq!(checksum_in(&list, "linux-1.0.tar.gz"), None);
        assert_eq!(checksum_in(&list, "1.0.tar.xz"), None);
    }
}
