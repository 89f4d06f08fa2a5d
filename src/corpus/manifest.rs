//! The record of a corpus: where it came from and which files it gave, so that anyone can check
//! that they hold the same text.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{Encoding, SUFFIXES, hex};

/// Files of one pass over a corpus, and their source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The URL, the path as it was given, or `built-in sample`.
    pub source: String,
    /// Time of the download, or of reading from disk: UTC, RFC 3339.
    pub retrieved: Option<String>,
    /// The sha256 of the archive, if the source is one.
    pub archive_sha256: Option<String>,
    /// True if the archive's sha256 is the one that the server's list gives for it. None if
    /// there is no such list.
    pub checksum_confirmed: Option<bool>,
    /// The suffixes of the files that count, in any case.
    pub filter: Vec<String>,
    /// Treatment of files that are not UTF-8.
    pub encoding: Encoding,
    /// Only the first so many kept files were asked for.
    pub limit: Option<usize>,
    /// The files given, in order.
    pub files: Vec<FileRecord>,
    /// The files that would count by their names, but were left out.
    pub left_out: Vec<LeftOut>,
}

/// One file that was given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    pub path: String,
    /// Sha256 of the file's bytes as found, in hexadecimal.
    pub sha256: String,
    pub bytes: u64,
}

/// One file that was not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftOut {
    /// The name, shortened and escaped if it is not a plain one.
    pub name: String,
    pub reason: Reason,
}

/// Why a file that counts by its name was left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// The bytes are not UTF-8.
    NotUtf8,
    /// The name is not UTF-8, is too long, or has control characters.
    Name,
    /// A symbolic or hard link. Links are never followed: what they point at counts where it is.
    Link,
    /// A device, a pipe, a socket, or a sparse file.
    Special,
}

impl Reason {
    /// True if text is lost by leaving the file out: an error under `--strict`. A link's text is
    /// elsewhere, and a device has none.
    pub fn is_loss(self) -> bool {
        matches!(self, Self::NotUtf8 | Self::Name)
    }

    /// The reason in words: "3 files are ...".
    pub fn words(self) -> &'static str {
        match self {
            Self::NotUtf8 => "not UTF-8",
            Self::Name => "badly named",
            Self::Link => "links",
            Self::Special => "not regular files",
        }
    }
}

impl Default for Manifest {
    fn default() -> Self {
        Self {
            source: String::new(),
            retrieved: None,
            archive_sha256: None,
            checksum_confirmed: None,
            filter: SUFFIXES.map(String::from).to_vec(),
            encoding: Encoding::default(),
            limit: None,
            files: Vec::new(),
            left_out: Vec::new(),
        }
    }
}

impl Manifest {
    /// The bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }

    /// One sha256 for all the files, whatever their order: that of the lines `SHA256  PATH\n` sorted
    /// bytewise by path, which is what `sha256sum $(find -type f | LC_ALL=C sort) | sha256sum` says.
    pub fn hash(&self) -> String {
        let mut files: Vec<_> = self.files.iter().collect();
        files.sort_by(|a, b| a.path.cmp(&b.path));
        let mut hasher = Sha256::new();
        for file in files {
            hasher.update(format!("{}  {}\n", file.sha256, file.path));
        }
        hex(&hasher.finalize())
    }

    /// Warnings for a person: one line for each reason files were left out, naming the first few.
    pub fn warnings(&self) -> Vec<String> {
        const MAX_NAMED_FILES: usize = 5;
        [Reason::NotUtf8, Reason::Name, Reason::Link, Reason::Special]
            .into_iter()
            .filter_map(|reason| {
                let of_it = |left: &&LeftOut| left.reason == reason;
                let names = self.left_out.iter().filter(of_it).map(|left| left.name.as_str());
                let count = names.clone().count();
                let mut named = names.take(MAX_NAMED_FILES).collect::<Vec<_>>().join(", ");
                if count > MAX_NAMED_FILES {
                    named.push_str(", ...");
                }
                let files = if count == 1 { "file" } else { "files" };
                let line = format!("{count} {files} left out ({}): {named}", reason.words());
                (count > 0).then_some(line)
            })
            .collect()
    }
}
