//! The record of a corpus: where it came from and which files it gave, so that anyone can check
//! that they hold the same text.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::names::MAX_PART_BYTES;
use super::{Encoding, SUFFIXES, hex, shown};

/// Kind of a source.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SourceOrigin {
    /// The sample that is built into the program.
    Sample,
    /// A kernel of kernel.org or of a mirror, by its version: `v1.0/1.0`.
    Release(String),
    /// A folder.
    #[default]
    Folder,
    /// An archive.
    Archive,
    /// A text file by itself.
    File,
    /// Several files of text.
    Files,
    /// Files of documents without names: JSONL, Parquet, token files, long text.
    Shards,
}

/// Files of one pass over a corpus, and their source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Kind of the source.
    pub origin: SourceOrigin,
    /// The URL without credentials, the path as it was given, or `built-in sample`.
    pub source: String,
    /// Time of the download, or of reading from disk: UTC, RFC 3339.
    pub retrieved: Option<String>,
    /// The sha256 of the archive, if the source is one.
    pub archive_sha256: Option<String>,
    /// True if the archive's sha256 is the one that the server's list gives for it. None if
    /// there is no such list.
    pub checksum_confirmed: Option<bool>,
    /// The suffixes of the files that count, in any case; none if there are globs to include.
    pub filter: Vec<String>,
    /// Globs of the files that count instead, and of those that do not (see
    /// [`NameFilter`](super::NameFilter)).
    pub include: Vec<String>,
    /// Globs of files left out.
    pub exclude: Vec<String>,
    /// Treatment of files that are not UTF-8.
    pub encoding: Encoding,
    /// Only the first so many kept files were asked for.
    pub limit: Option<usize>,
    /// The field or column of the text, if there are shards of records.
    pub text_field: Option<String>,
    /// The files given, in order.
    pub files: Vec<FileRecord>,
    /// The files of documents without names, in order.
    pub shards: Vec<ShardRecord>,
    /// Bytes of the text that the ids of token files stand for; counted when they are written.
    pub decoded_bytes: u64,
    /// The files that would count by their names, but were left out.
    pub left_out: Vec<LeftOut>,
    /// The files that do not count, because of the suffix of their names.
    pub other: OtherFiles,
}

/// Files with other suffixes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OtherFiles {
    /// Number of files.
    pub files: u64,
    /// The first few names, escaped.
    pub names: Vec<String>,
}

impl OtherFiles {
    /// Counts a file. Its name is kept if it is among the first.
    pub(super) fn add(&mut self, name: &[u8]) {
        self.files += 1;
        if self.names.len() < MAX_NAMED_FILES {
            self.names.push(shown(name));
        }
    }
}

/// Files that a warning names.
pub(super) const MAX_NAMED_FILES: usize = 5;

/// One file that was given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Path within the source.
    pub path: String,
    /// Sha256 of the file's bytes as found, in hexadecimal.
    pub sha256: String,
    /// Size.
    pub bytes: u64,
}

/// A file of documents without names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ShardRecord {
    /// The name of the file, relative to the folder that all of the files are in.
    pub name: String,
    /// Sha256 of the file, in hexadecimal.
    pub sha256: String,
    /// Bytes of the file.
    pub bytes: u64,
    /// Documents given.
    pub documents: u64,
    /// Bytes of their text.
    pub text_bytes: u64,
    /// Records without text, which are passed over.
    #[serde(skip_serializing_if = "is_zero")]
    pub empty: u64,
    /// Documents that are byte for byte a file of Linux 1.0.
    #[serde(skip_serializing_if = "is_zero")]
    pub linux_files: u64,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // as serde asks
fn is_zero(count: &u64) -> bool {
    *count == 0
}

/// One file that was not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftOut {
    /// The name, shortened and escaped if it is not a plain one.
    pub name: String,
    /// Why it was left out.
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
    /// A part of the name is too long for the file to be written back.
    LongName,
    /// A symbolic or hard link. Links are never followed: what they point at counts where it is.
    Link,
    /// A device, a pipe, a socket, or a sparse file.
    Special,
}

impl Reason {
    /// True if text is lost by leaving the file out: an error under `--strict`. A link's text is
    /// elsewhere, and a device has none.
    pub fn is_loss(self) -> bool {
        matches!(self, Self::NotUtf8 | Self::Name | Self::LongName)
    }

    /// The reason in words: "3 files are ...".
    pub fn words(self) -> String {
        match self {
            Self::NotUtf8 => "not UTF-8".to_string(),
            Self::Name => "badly named".to_string(),
            Self::LongName => format!("named with more than {MAX_PART_BYTES} bytes"),
            Self::Link => "links".to_string(),
            Self::Special => "not regular files".to_string(),
        }
    }
}

impl Default for Manifest {
    fn default() -> Self {
        Self {
            origin: SourceOrigin::default(),
            source: String::new(),
            retrieved: None,
            archive_sha256: None,
            checksum_confirmed: None,
            filter: SUFFIXES.map(String::from).to_vec(),
            include: Vec::new(),
            exclude: Vec::new(),
            encoding: Encoding::default(),
            limit: None,
            text_field: None,
            files: Vec::new(),
            shards: Vec::new(),
            decoded_bytes: 0,
            left_out: Vec::new(),
            other: OtherFiles::default(),
        }
    }
}

impl Manifest {
    /// The bytes of all text.
    pub fn bytes(&self) -> u64 {
        let files: u64 = self.files.iter().map(|file| file.bytes).sum();
        let shards: u64 = self.shards.iter().map(|shard| shard.text_bytes).sum();
        files + shards + self.decoded_bytes
    }

    /// The number of documents.
    pub fn documents(&self) -> u64 {
        let shards: u64 = self.shards.iter().map(|shard| shard.documents).sum();
        self.files.len() as u64 + shards
    }

    /// One sha256 for all the files, whatever their order: that of the lines `SHA256  PATH\n` sorted
    /// bytewise by path, which is what `sha256sum $(find -type f | LC_ALL=C sort) | sha256sum` says.
    /// Behind them comes a line for each shard, in order: `SHA256  NAME  DOCUMENTS FIELD\n`.
    pub fn hash(&self) -> String {
        let mut files: Vec<_> = self.files.iter().collect();
        files.sort_by(|a, b| a.path.cmp(&b.path));
        let mut hasher = Sha256::new();
        for file in files {
            hasher.update(format!("{}  {}\n", file.sha256, file.path));
        }
        let field = self.text_field.as_deref().unwrap_or_default();
        for ShardRecord { sha256, name, documents, .. } in &self.shards {
            hasher.update(format!("{sha256}  {name}  {documents} {field}\n"));
        }
        hex(&hasher.finalize())
    }

    /// Warnings for a person: one line for each reason files were left out, naming the first few.
    pub fn warnings(&self) -> Vec<String> {
        let line = |count: u64, why: &str, names: &mut dyn Iterator<Item = &str>| {
            let mut named = names.take(MAX_NAMED_FILES).collect::<Vec<_>>().join(", ");
            if count > MAX_NAMED_FILES as u64 {
                named.push_str(", ...");
            }
            let files = if count == 1 { "file" } else { "files" };
            (count > 0).then(|| format!("{count} {files} left out ({why}): {named}"))
        };
        let lines =
            [Reason::NotUtf8, Reason::Name, Reason::LongName, Reason::Link, Reason::Special]
                .into_iter()
                .filter_map(|reason| {
                    let of_it = |left: &&LeftOut| left.reason == reason;
                    let mut names =
                        self.left_out.iter().filter(of_it).map(|left| left.name.as_str());
                    line(names.clone().count() as u64, &reason.words(), &mut names)
                });
        let names = &mut self.other.names.iter().map(String::as_str);
        let other = line(self.other.files, "by their suffix; `include` takes them", names);
        let empty = self.shards.iter().filter(|shard| shard.empty > 0);
        let empty = empty.map(|ShardRecord { name, empty, .. }| {
            format!("{empty} records without text passed over: {}", shown(name.as_bytes()))
        });
        lines.chain(other).chain(empty).collect()
    }
}
