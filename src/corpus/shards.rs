//! Files that are a source by themselves or several at once: text files, each a document with a name,
//! and shards of documents without names. Globs, formats, and the errors that all formats share.

use std::collections::HashSet;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::manifest::ShardRecord;
use super::names::{self, shown};
use super::pass::{Flow, Intake};
use super::{
    CorpusOptions, SOURCE_HINT, folder, jsonl, missing, parquet, sha256_of, text, token_file,
};
use crate::error;
use crate::files;

/// A file of a source.
#[derive(Clone, Debug)]
pub struct InputFile {
    pub path: PathBuf,
    /// Its name, relative to the folder that all files of the source are in.
    name: Vec<u8>,
    /// None: it is one document, with this name.
    pub format: Option<ShardFormat>,
}

/// Format of a file of documents without names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShardFormat {
    /// A JSON object per line, plain or packed with gzip or zstd.
    Jsonl,
    Parquet,
    /// Ids, as llm.c or nanoGPT write them.
    TokenFile,
    /// A text file longer than one document may be.
    LongText,
}

impl ShardFormat {
    /// True if its records have named fields or columns.
    pub fn has_fields(self) -> bool {
        matches!(self, Self::Jsonl | Self::Parquet)
    }
}

impl InputFile {
    /// The record of a shard before it is read.
    pub fn record(&self) -> anyhow::Result<ShardRecord> {
        let bytes = files::open(&self.path).and_then(|file| Ok(file.metadata()?.len()));
        let bytes = bytes.map_err(|why| missing(&self.path, &why))?;
        let (name, sha256) = (shown(&self.name), sha256_of(&self.path)?);
        Ok(ShardRecord { name, sha256, bytes, ..ShardRecord::default() })
    }
}

/// The files that paths and globs name, each once: those of a glob sorted, without folders.
pub fn expand(paths: &[PathBuf], options: &CorpusOptions) -> anyhow::Result<Vec<PathBuf>> {
    let (mut found, mut seen) = (Vec::new(), HashSet::new());
    for path in paths {
        let is_glob = |text: &&str| text.contains(['*', '?', '[']) && !text.contains("://");
        let pattern = path.to_str().filter(is_glob);
        let (Some(pattern), false) = (pattern, path.exists()) else {
            found.extend(seen.insert(path.clone()).then(|| path.clone()));
            continue;
        };
        let hint = "a glob is like 'data/*.jsonl'; quote it, or let the shell name each `source`";
        let invalid = |why: &dyn std::fmt::Display| {
            error::config(format!("invalid `source` {}: {why}", shown(pattern.as_bytes())), hint)
        };
        let before = found.len();
        for file in glob::glob(pattern).map_err(|why| invalid(&why))? {
            let file = file.map_err(|why| invalid(&why))?;
            if file.is_file() && seen.insert(file.clone()) {
                found.push(file);
            }
            if found.len() as u64 > options.limits.entries {
                return Err(invalid(&format!("more than {} files", options.limits.entries)));
            }
        }
        if found.len() == before {
            return Err(invalid(&"no file matches it"));
        }
    }
    Ok(found)
}

/// Format of a shard, by its name; none for what is not one.
pub fn format_of(path: &Path, options: &CorpusOptions) -> anyhow::Result<Option<ShardFormat>> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    let suffix = |name: &str| name.rsplit('.').next().unwrap_or_default().to_string();
    let plain = name.trim_end_matches(".gz").trim_end_matches(".zst");
    let is_file = || std::fs::metadata(path).is_ok_and(|found| found.is_file());
    let is_asked_for = !options.filter.include().is_empty() && is_text(path, options);
    if is_asked_for || !is_file() {
        return Ok(None);
    }
    if ["jsonl", "ndjson", "json"].contains(&suffix(plain).as_str()) {
        return Ok(Some(ShardFormat::Jsonl));
    }
    match suffix(&name).as_str() {
        "parquet" => return Ok(Some(ShardFormat::Parquet)),
        "bin" => {
            super::refuse_unreadable_format(path)?;
            return Ok(Some(ShardFormat::TokenFile));
        }
        _ => {}
    }
    let length = std::fs::metadata(path).map_err(|why| missing(path, &why))?.len();
    Ok((is_text(path, options) && length > options.limits.file).then_some(ShardFormat::LongText))
}

/// True if the name says that a file is text.
pub fn is_text(path: &Path, options: &CorpusOptions) -> bool {
    let name = path.file_name().unwrap_or_default().as_bytes();
    names::is_kept(name) || options.filter.keeps(name)
}

/// The files of a source, with their names and formats.
pub fn inputs(paths: &[PathBuf], options: &CorpusOptions) -> anyhow::Result<Vec<InputFile>> {
    // The deepest folder that all are in.
    let mut folder = paths.first().and_then(|path| path.parent()).unwrap_or(Path::new(""));
    while !paths.iter().all(|path| path.starts_with(folder)) {
        folder = folder.parent().unwrap_or(Path::new(""));
    }
    let mut inputs = Vec::new();
    for path in paths {
        let format = format_of(path, options)?;
        if format.is_none() && !(path.is_file() && is_text(path, options)) {
            let why = std::fs::metadata(path).map_err(|why| missing(path, &why)).err();
            return Err(why.unwrap_or_else(|| {
                error::config(
                    format!("{} is not text or a file of documents", path.display()),
                    "a folder or an archive is a `source` by itself; of several files each is text, or .jsonl, .parquet or .bin; `include` takes other suffixes for text",
                )
            }));
        }
        let name = path.strip_prefix(folder).unwrap_or(path).as_os_str().as_bytes().to_vec();
        let is_kept = if format.is_some() {
            options.filter.keeps_shard(&name)
        } else {
            paths.len() == 1 || options.filter.keeps(&name)
        };
        if is_kept {
            inputs.push(InputFile { path: path.clone(), name, format });
        }
    }
    Ok(inputs)
}

/// Reads all files, in order.
pub fn read(files: &[InputFile], intake: &mut Intake) -> anyhow::Result<()> {
    let mut shard = 0;
    for InputFile { path, name, format } in files {
        let Some(format) = format else {
            if folder::read_file(path, name, intake)? == Flow::Break(()) {
                return Ok(());
            }
            continue;
        };
        intake.begin_shard(shard);
        shard += 1;
        let flow = match format {
            ShardFormat::Jsonl => jsonl::read(path, intake),
            ShardFormat::Parquet => parquet::read(path, intake),
            ShardFormat::TokenFile => token_file::read(path, intake),
            ShardFormat::LongText => text::read(path, intake),
        };
        if flow? == Flow::Break(()) {
            return Ok(());
        }
    }
    Ok(())
}

/// The error of a record, by its number from 1.
pub fn invalid_record(number: u64, why: impl std::fmt::Display, path: &Path) -> anyhow::Error {
    error::data(
        format!("invalid record {number}: {why}, {}", path.display()),
        "repair the file, or leave it out",
    )
}

/// The error of a file that cannot be read on, after so many whole records.
pub fn damaged(why: &io::Error, records: u64, path: &Path) -> anyhow::Error {
    if why.kind() == io::ErrorKind::QuotaExceeded {
        return error::data(
            format!("{} unpacks to far more than its size", path.display()),
            "if you trust it, unpack it and give that file",
        );
    }
    if records == 0 && why.kind() != io::ErrorKind::UnexpectedEof {
        return error::data(format!("{why}, {}", path.display()), SOURCE_HINT);
    }
    error::data(
        format!(
            "damaged or cut short ({why}) in or after record {}, {}",
            records + 1,
            path.display()
        ),
        "copy or download the file again",
    )
}

/// Reads until `buffer` is full, or to the end.
pub fn fill(from: &mut impl Read, buffer: &mut Vec<u8>, most: usize) -> io::Result<usize> {
    from.take(most as u64).read_to_end(buffer)
}
