//! Text sources: kernel.org, archives, folders, files of text, shards of documents without names, and
//! the built-in sample; and the manifest of a pass.
//!
//! A [`Source`] says where to look; [`Corpus::open`] looks there, and [`Corpus::documents`] is one
//! pass over the files that count, in order, a file at a time: a kernel tree of 1.3 GB passes
//! through in a few megabytes. The passes of one corpus are alike, so a tokenizer can be trained in
//! one and the tokens written in the next. Each pass keeps a [`Manifest`] of what it gave.
//!
//! Nothing is ever unpacked to disk, and archives are taken for hostile until read: see
//! [`Limits`] and `archive.rs`.

mod archive;
#[cfg(feature = "fetch")]
mod download;
mod event;
mod folder;
mod jsonl;
mod known;
mod linux;
mod manifest;
mod names;
mod parquet;
mod pass;
mod sample;
mod shards;
mod text;
mod time;
mod token_file;

use std::borrow::Cow;
use std::io::Read;
use std::path::{Path, PathBuf};

pub use event::{FetchEvent, Tell};
pub use known::{is_linux_1_0, linux_1_0_files};
pub use linux::{Fetched, LinuxRelease, MIRROR, Version, cache_folder, checksum_in};
pub use manifest::{FileRecord, LeftOut, Manifest, OtherFiles, Reason, ShardRecord, SourceOrigin};
pub use names::{NameFilter, SUFFIXES};
pub(crate) use names::{corpus_path, shown};
pub use pass::Documents;
pub use sample::{NAMES as SAMPLE_NAMES, is_part_of_sample, is_sample};
pub use time::now;

use crate::error::{self, ErrorKind, Hint};
use crate::files;
use shards::InputFile;

/// One file of a corpus, or one record of a shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// The file's path inside the corpus: relative, `/`-separated (`linux/kernel/sched.c`). Empty for a
    /// document without a name.
    pub path: String,
    /// The text. Files that are not UTF-8 were left out (or read as latin-1 for style `original`).
    pub text: String,
    /// Encoding by which the file's bytes became `text`.
    pub encoding: Encoding,
    /// The tokens, instead of a text, if they come from a token file.
    pub ids: Vec<u32>,
}

impl Document {
    /// A UTF-8 file.
    pub fn new(path: impl Into<String>, text: impl Into<String>) -> Self {
        let (path, text) = (path.into(), text.into());
        Self { path, text, encoding: Encoding::Utf8, ids: Vec::new() }
    }

    /// The file's own bytes.
    pub fn bytes(&self) -> Cow<'_, [u8]> {
        match self.encoding {
            Encoding::Utf8 => Cow::Borrowed(self.text.as_bytes()),
            // Every character came from one byte, so none is above U+00FF.
            Encoding::Latin1 => Cow::Owned(self.text.chars().map(|c| c as u32 as u8).collect()),
        }
    }
}

/// Location of a corpus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A kernel of kernel.org, downloaded if it is not in the cache.
    Linux(LinuxRelease),
    /// A folder, a .tar, .tar.gz or .tar.xz archive, a file of text or of documents, or a glob of files.
    Path(PathBuf),
    /// Several files of text or of documents, or globs of them.
    Paths(Vec<PathBuf>),
    /// The small C program that is built into this one.
    Sample,
}

/// Options of reading a corpus.
#[derive(Clone, Debug, Default)]
pub struct CorpusOptions {
    /// Files that count, by their names.
    pub filter: NameFilter,
    /// Only the first so many kept files.
    pub limit: Option<usize>,
    /// A file that would have to be left out because it is not UTF-8 is an error.
    pub strict: bool,
    /// Encoding of the files.
    pub encoding: Encoding,
    /// Limits on files and archives.
    pub limits: Limits,
    /// The manifest hash that a whole pass must have.
    pub expected: Option<String>,
    /// Name of the field or column that holds a record's text: `text` by default.
    pub text_field: Option<String>,
    /// The vocabulary of the tokenizer, by which token files are read.
    pub vocabulary: Option<TokenVocabulary>,
}

/// Facts of a tokenizer that reading a token file takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenVocabulary {
    /// One more than the largest id.
    pub size: usize,
    /// The tokens that may separate documents: the first of a text, and the last.
    pub bos: Option<u32>,
    /// Id that ends a text.
    pub eos: Option<u32>,
}

/// Treatment of files that are not UTF-8.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Encoding {
    /// It is left out, and named in the manifest.
    #[default]
    Utf8,
    /// It is read as latin-1, as the first LaaM read it.
    Latin1,
}

/// Resource limits of a source, enforced while it is read: an archive is never trusted to say how
/// large it is.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of the whole archive, unpacked.
    pub total: u64,
    /// Bytes of one kept file.
    pub file: u64,
    /// Members of an archive, or entries of a folder and the folders in it.
    pub entries: u64,
    /// Bytes of all paths kept in memory together.
    pub names: u64,
}

impl Default for Limits {
    fn default() -> Self {
        // Linux 6.9: 1.4 GB, its largest source file 23 MB, 89,000 members, 4 MB of paths.
        Self { total: 8 << 30, file: 64 << 20, entries: 1_000_000, names: 64 << 20 }
    }
}

/// A body of text that can be read any number of times.
#[derive(Clone, Debug)]
pub struct Corpus {
    place: ResolvedSource,
    options: CorpusOptions,
    /// Source, time and hash, known before reading: every pass starts its manifest with them.
    origin: Manifest,
}

#[derive(Clone, Debug)]
enum ResolvedSource {
    Archive(PathBuf),
    Folder(PathBuf),
    Files(Vec<InputFile>),
    Sample,
}

impl Corpus {
    /// Finds the source, and hashes it if it is an archive. A download says nothing: see
    /// [`Corpus::open_telling`].
    pub fn open(source: &Source, options: CorpusOptions) -> anyhow::Result<Self> {
        Self::open_telling(source, options, &mut |_| ())
    }

    /// Opens a corpus and reports the progress of a download to `tell`.
    pub fn open_telling(
        source: &Source,
        options: CorpusOptions,
        tell: Tell,
    ) -> anyhow::Result<Self> {
        let mut origin = Manifest { encoding: options.encoding, ..Manifest::default() };
        origin.limit = options.limit;
        (origin.include, origin.exclude) =
            (options.filter.include().to_vec(), options.filter.exclude().to_vec());
        if !origin.include.is_empty() {
            origin.filter.clear();
        }
        let place = match source {
            Source::Linux(release) => {
                let fetched = release.fetch(tell)?;
                origin.origin = SourceOrigin::Release(release.version.to_string());
                origin.source = public_url(&fetched.url);
                origin.retrieved = Some(fetched.retrieved);
                origin.archive_sha256 = Some(fetched.sha256);
                origin.checksum_confirmed = Some(fetched.checksum_confirmed);
                ResolvedSource::Archive(fetched.path)
            }
            Source::Sample => {
                origin.origin = SourceOrigin::Sample;
                origin.source = SAMPLE.to_string();
                ResolvedSource::Sample
            }
            Source::Path(path) => Self::resolve(std::slice::from_ref(path), &options, &mut origin)?,
            Source::Paths(paths) => Self::resolve(paths, &options, &mut origin)?,
        };
        Ok(Self { place, options, origin })
    }

    /// Finds what paths and globs name.
    fn resolve(
        paths: &[PathBuf],
        options: &CorpusOptions,
        origin: &mut Manifest,
    ) -> anyhow::Result<ResolvedSource> {
        origin.source = match paths {
            [path] => path.display().to_string(),
            [first, rest @ ..] => format!("{} and {} more", first.display(), rest.len()),
            [] => return Err(error::config("no `source`", SOURCE_HINT)),
        };
        origin.retrieved = Some(time::now());
        let found = shards::expand(paths, options)?;
        if let [path] = found.as_slice()
            && shards::format_of(path, options)?.is_none()
        {
            let metadata = std::fs::metadata(path).map_err(|why| missing(path, &why))?;
            if metadata.is_dir() {
                return Ok(ResolvedSource::Folder(path.clone()));
            }
            if !metadata.is_file() {
                let what = format!("neither a file nor a folder, {}", path.display());
                return Err(error::data(what, SOURCE_HINT));
            }
            if !shards::is_text(path, options) {
                refuse_unreadable_format(path)?;
                origin.origin = SourceOrigin::Archive;
                origin.archive_sha256 = Some(sha256_of(path)?);
                return Ok(ResolvedSource::Archive(path.clone()));
            }
        }
        let files = shards::inputs(&found, options)?;
        origin.origin = match files.as_slice() {
            files if files.iter().any(|file| file.format.is_some()) => SourceOrigin::Shards,
            [_] => SourceOrigin::File,
            _ => SourceOrigin::Files,
        };
        for file in &files {
            if let Some(format) = file.format {
                origin.shards.push(file.record()?);
                if format.has_fields() {
                    origin.text_field = Some(options.text_field().to_string());
                }
            }
        }
        Ok(ResolvedSource::Files(files))
    }

    /// Paths that the user named and that globs found: files, or a folder. Nothing of a kernel release or of the
    /// built-in sample.
    pub fn places(&self) -> Vec<&Path> {
        match &self.place {
            _ if matches!(self.origin.origin, SourceOrigin::Release(_)) => Vec::new(),
            ResolvedSource::Archive(path) | ResolvedSource::Folder(path) => vec![path],
            ResolvedSource::Files(files) => files.iter().map(|file| file.path.as_path()).collect(),
            ResolvedSource::Sample => Vec::new(),
        }
    }

    /// True if every document has a name.
    pub fn has_names(&self) -> bool {
        self.origin.shards.is_empty()
    }

    /// One pass over the kept files, in order: an archive's members as they come, a folder's files
    /// sorted bytewise by path.
    ///
    /// The reading happens on a thread of its own, at most a few files ahead.
    pub fn documents(&self) -> anyhow::Result<Documents> {
        let options = self.options.clone();
        match self.place.clone() {
            ResolvedSource::Sample => Documents::start(self.origin.clone(), options, sample::read),
            ResolvedSource::Folder(folder) => {
                Documents::start(self.origin.clone(), options, move |intake| {
                    folder::read(&folder, intake)
                })
            }
            ResolvedSource::Files(files) => {
                Documents::start(self.origin.clone(), options, move |intake| {
                    shards::read(&files, intake)
                })
            }
            ResolvedSource::Archive(file) => {
                Documents::start(self.origin.clone(), options, move |intake| {
                    archive::read(&file, intake)
                })
            }
        }
    }

    /// The source and its options; no files.
    pub fn origin(&self) -> &Manifest {
        &self.origin
    }

    /// The manifest of a whole pass, made by reading everything once.
    pub fn manifest(&self) -> anyhow::Result<Manifest> {
        let mut documents = self.documents()?;
        for document in &mut documents {
            document?;
        }
        Ok(documents.into_manifest())
    }
}

/// Source name of the built-in sample in its manifest.
pub const SAMPLE: &str = "built-in sample";

impl CorpusOptions {
    /// The field or column of a record's text.
    pub fn text_field(&self) -> &str {
        self.text_field.as_deref().unwrap_or("text")
    }
}

const SOURCE_HINT: &str = "give a folder, a .tar, .tar.gz or .tar.xz archive, a text file, or .jsonl, .parquet or .bin files, that can be read";

/// The error of a path that leads nowhere.
fn missing(path: &Path, why: &std::io::Error) -> anyhow::Error {
    match path.to_str() {
        Some(url) if url.contains("://") => error::data(
            format!("{} is a URL, and a source is a file or a folder", public_url(url)),
            "download it and give the file; `version` fetches a kernel, from `mirror_uri`",
        ),
        _ => error::data(format!("{why}, {}", path.display()), SOURCE_HINT),
    }
}

/// A URL without what may be secret: user, password, query and fragment.
pub fn public_url(url: &str) -> String {
    let url = url.split(['?', '#']).next().unwrap_or_default();
    let Some((scheme, rest)) = url.split_once("://") else { return url.to_string() };
    let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let host = host.rsplit_once('@').map_or(host, |(_, host)| host);
    format!("{scheme}://{host}{path}")
}

/// Refuses a file that begins as some format does which is not read, by the format's name.
fn refuse_unreadable_format(path: &Path) -> anyhow::Result<()> {
    const FORMATS: [(&[u8], &str); 7] = [
        (b"PK\x03\x04", "zip"),
        (b"PK\x05\x06", "zip"),
        (b"BZh", "bzip2"),
        (b"\x28\xB5\x2F\xFD", "zstd"),
        (b"7z\xBC\xAF\x27\x1C", "7-Zip"),
        (b"Rar!", "RAR"),
        (b"LZIP", "lzip"),
    ];
    let mut start = Vec::new();
    let read = files::open(path).and_then(|file| file.take(8).read_to_end(&mut start));
    read.map_err(|why| error::data(format!("{why}, {}", path.display()), SOURCE_HINT))?;
    if start == b"LAAMTOKS" {
        return Err(error::data(
            format!("{} is a token file of laam, not text", path.display()),
            "name the text that it was made of",
        ));
    }
    match FORMATS.iter().find(|(magic, _)| start.starts_with(magic)) {
        None => Ok(()),
        Some((_, format)) => Err(error::data(
            format!("{} is a {format} file, which laam does not read", path.display()),
            "unpack it and give the folder, or pack it as .tar, .tar.gz or .tar.xz",
        )),
    }
}

/// The sha256 of a file, in hexadecimal.
fn sha256_of(path: &Path) -> anyhow::Result<String> {
    files::sha256(path)
        .map(|sha256| hex(&sha256))
        .map_err(|why| anyhow::anyhow!("{why}, {}", path.display()))
        .hint(ErrorKind::Data, || SOURCE_HINT)
}

/// Bytes in hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        let _ = write!(text, "{byte:02x}"); // writing to a String cannot fail
        text
    })
}

/// A sha256 from its hexadecimal form.
pub(crate) fn unhex(text: &str) -> anyhow::Result<[u8; 32]> {
    let mut bytes = [0; 32];
    for (byte, at) in bytes.iter_mut().zip((0..).step_by(2)) {
        let digits = text.get(at..at + 2).unwrap_or_default();
        *byte = u8::from_str_radix(digits, 16)
            .map_err(|_| error::internal(format!("invalid sha256 {text}")))?;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn public_urls_have_no_credentials() {
        for (url, public) in [
            ("https://a:b@host.org:8/p/x.tar?token=1#f", "https://host.org:8/p/x.tar"),
            ("http://user@host", "http://host"),
            ("http://a@b@host/@c", "http://host/@c"),
            ("https://cdn.kernel.org/pub/a.xz", "https://cdn.kernel.org/pub/a.xz"),
        ] {
            assert_eq!(public_url(url), public);
        }
    }
}
