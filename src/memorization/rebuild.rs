//! All files of a model, regenerated from their names into a folder, and compared with the originals.
//!
//! The names come from the model's folder, which may be anybody's: a name that is not a plain path
//! within the folder is refused before anything is written, and no link is followed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::Serialize;

use super::regenerate::{End, Regenerator, Sink};
use crate::corpus::{Document, Limits, corpus_path, shown};
use crate::error::{self, ErrorKind, Hint};
use crate::files::{self, write_atomically};
use crate::generate::Generator;

/// A file that was regenerated and written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Rebuilt {
    /// Path within the corpus.
    pub path: String,
    /// Size.
    pub bytes: u64,
    /// Generated tokens.
    pub tokens: usize,
    /// End of its text.
    pub end: End,
}

/// Progress of a rebuild.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RebuildProgress {
    /// Files written, of how many.
    pub files: usize,
    /// Files of the model.
    pub of: usize,
    /// Bytes regenerated, those of unfinished files included.
    pub bytes: u64,
}

/// Comparison of a file with its original.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Compared {
    /// Path within the corpus.
    pub path: String,
    /// True if the two are the same bytes.
    pub exact: bool,
    /// Size of the original; 0 if there is none.
    pub bytes: u64,
    /// Bytes before the first difference: all of an exact file. What follows a difference counts
    /// for nothing, even if it is right.
    pub bytes_exact: u64,
    /// First difference, if the two are not equal.
    pub first_difference: Option<Difference>,
}

/// The first place where two files differ.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// Bytes before it.
    pub byte: u64,
    /// From 1, as is the column, which counts bytes.
    pub line: u64,
    /// Column, from 1, in bytes.
    pub column: u64,
    /// The line up to there, the same in both, and what follows it in either, for a person: a few
    /// lines, and invalid UTF-8 replaced.
    pub before: String,
    /// Text that follows in the original.
    pub original: String,
    /// Text that follows in the regenerated file.
    pub rebuilt: String,
}

/// Comparison of all files with their originals.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Comparison {
    /// In the order of the rebuilt files.
    pub files: Vec<Compared>,
    /// Originals that were not rebuilt, though nobody held them out.
    pub missing: Vec<String>,
    /// Originals that were not rebuilt, as training held them out.
    pub held_out: Vec<String>,
    /// Rebuilt files that have no original.
    pub extra: Vec<String>,
}

impl Comparison {
    /// Files that are equal to their originals.
    pub fn files_exact(&self) -> usize {
        self.files.iter().filter(|file| file.exact).count()
    }

    /// Bytes of all originals that were rebuilt.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }

    /// See [`Compared::bytes_exact`].
    pub fn bytes_exact(&self) -> u64 {
        self.files.iter().map(|file| file.bytes_exact).sum()
    }

    /// True if every file is exact and none is missing; held-out ones are not asked for.
    pub fn is_exact(&self) -> bool {
        self.missing.is_empty() && self.files.iter().all(|file| file.exact)
    }
}

/// Refuses names that no corpus can have: absolute ones, those with `..` or control characters, two
/// alike, and a file where another needs a folder.
pub fn check_paths(paths: &[String]) -> anyhow::Result<()> {
    let refuse = |path: &str, why: &str| {
        Err(error::checkpoint(
            format!("the model's provenance names a file {}, which {why}", shown(path.as_bytes())),
            "provenance.json is damaged or malicious: do not trust this model folder",
        ))
    };
    let mut sorted: Vec<&str> = paths.iter().map(String::as_str).collect();
    for path in &sorted {
        if corpus_path(path.as_bytes()).ok().as_deref() != Some(path) {
            return refuse(path, "is no plain relative path");
        }
    }
    // By parts, so that a folder stands right before what is in it.
    sorted.sort_by(|a, b| a.split('/').cmp(b.split('/')));
    for pair in sorted.windows(2) {
        let rest = pair[1].strip_prefix(pair[0]);
        if rest == Some("") {
            return refuse(pair[1], "it names twice");
        }
        if rest.is_some_and(|rest| rest.starts_with('/')) {
            return refuse(pair[0], "another name uses as a folder");
        }
    }
    Ok(())
}

/// Refuses a source that lies in the output folder, holds it, or is it: what the weights produce would
/// be written over the originals, or become part of them. Links are followed on both sides.
///
/// # Errors
/// The two overlap, or one of them cannot be looked at.
pub fn check_apart(output: &Path, source: &Path) -> anyhow::Result<()> {
    let (ours, theirs) = (resolve(output)?, resolve(source)?);
    if ours.starts_with(&theirs) || theirs.starts_with(&ours) {
        return Err(error::data(
            format!("the output {} and the source {} overlap", output.display(), source.display()),
            "give an output folder that neither holds the originals nor lies among them",
        ));
    }
    Ok(())
}

/// A path without links, `.` and `..`, whether or not its last parts exist yet.
fn resolve(path: &Path) -> anyhow::Result<PathBuf> {
    let path =
        std::path::absolute(path).with_context(|| format!("invalid path {}", path.display()))?;
    let mut missing = Vec::new();
    let mut existing = path.as_path();
    loop {
        match existing.canonicalize() {
            Ok(found) => {
                return Ok(missing.into_iter().rev().fold(found, |at, part| at.join(part)));
            }
            Err(none) if none.kind() == io::ErrorKind::NotFound => {
                let (Some(parent), Some(name)) = (existing.parent(), existing.file_name()) else {
                    return Ok(path.clone());
                };
                missing.push(name);
                existing = parent;
            }
            Err(cause) => {
                return Err(cause)
                    .with_context(|| format!("cannot look at {}", existing.display()))
                    .hint(ErrorKind::Data, || "give paths that can be read");
            }
        }
    }
}

/// Treatment of a file that is there already and holds other bytes than the one to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// It stays, and the rebuild ends with an error.
    Keep,
    /// Files that are there are replaced.
    Overwrite,
}

/// Regenerates the files and writes each as soon as it is whole, under `folder` and nowhere else.
/// Those that never ended are written as far as they came. An error of `progress` ends the rebuild.
pub fn rebuild(
    regenerator: &Regenerator,
    generator: &mut Generator,
    paths: &[String],
    folder: &Path,
    existing: Existing,
    progress: &mut dyn FnMut(RebuildProgress) -> anyhow::Result<()>,
) -> anyhow::Result<Vec<Rebuilt>> {
    check_paths(paths)?;
    fs::create_dir_all(folder)
        .with_context(|| format!("cannot make the folder {}", folder.display()))
        .hint(ErrorKind::Data, || "choose a writable output path")?;
    let of = paths.len();
    let mut writer = RebuildWriter {
        paths,
        folder,
        existing,
        begun: BTreeMap::new(),
        rebuilt: BTreeMap::new(),
        state: RebuildProgress { of, ..RebuildProgress::default() },
        progress,
    };
    regenerator.run(generator, paths, &mut writer)?;
    Ok(writer.rebuilt.into_values().collect())
}

struct RebuildWriter<'a> {
    paths: &'a [String],
    folder: &'a Path,
    existing: Existing,
    /// The text of files under way, by their place in `paths`.
    begun: BTreeMap<usize, Vec<u8>>,
    rebuilt: BTreeMap<usize, Rebuilt>,
    state: RebuildProgress,
    progress: &'a mut dyn FnMut(RebuildProgress) -> anyhow::Result<()>,
}

impl Sink for RebuildWriter<'_> {
    fn text(&mut self, file: usize, bytes: &[u8]) -> anyhow::Result<()> {
        self.begun.entry(file).or_default().extend(bytes);
        self.state.bytes += bytes.len() as u64;
        (self.progress)(self.state)
    }

    fn end(&mut self, file: usize, end: End, tokens: usize) -> anyhow::Result<()> {
        let text = self.begun.remove(&file).unwrap_or_default();
        let path = self.paths[file].clone();
        let place = place(self.folder, &path)?;
        if self.existing == Existing::Keep && place.exists() && !holds(&place, &text)? {
            return Err(error::data(
                format!("{} exists already and differs", place.display()),
                "give a new output folder, or allow what is there to be replaced (--overwrite)",
            ));
        }
        write_atomically(&place, &text)?;
        let bytes = text.len() as u64;
        self.rebuilt.insert(file, Rebuilt { path, bytes, tokens, end });
        self.state.files += 1;
        (self.progress)(self.state)
    }
}

/// True if a file holds exactly `bytes`.
fn holds(file: &Path, bytes: &[u8]) -> anyhow::Result<bool> {
    let same = || -> io::Result<bool> {
        Ok(fs::metadata(file)?.len() == bytes.len() as u64 && fs::read(file)? == bytes)
    };
    same()
        .with_context(|| format!("cannot read {}", file.display()))
        .hint(ErrorKind::Data, || "give a new output folder")
}

/// Path of a checked name under the folder. Its folders are made; what is there already must be
/// folders, and no links: a link leads elsewhere.
fn place(folder: &Path, path: &str) -> anyhow::Result<PathBuf> {
    let mut place = folder.to_path_buf();
    let mut parts = path.split('/').peekable();
    while let Some(part) = parts.next() {
        place.push(part);
        let is_folder = parts.peek().is_some();
        let found = match fs::symlink_metadata(&place) {
            Ok(found) => found,
            Err(none) if none.kind() == io::ErrorKind::NotFound => {
                if is_folder {
                    fs::create_dir(&place)
                        .with_context(|| format!("cannot make the folder {}", place.display()))
                        .hint(ErrorKind::Data, || "choose a writable output path")?;
                }
                continue;
            }
            Err(cause) => {
                return Err(cause)
                    .with_context(|| format!("cannot look at {}", place.display()))
                    .hint(ErrorKind::Data, || "choose a writable output path");
            }
        };
        if if is_folder { !found.is_dir() } else { !found.is_file() } {
            let what = if is_folder { "folder" } else { "file" };
            return Err(error::data(
                format!("{} exists and is not a regular {what}", place.display()),
                "set `output` to a new or an empty folder",
            ));
        }
    }
    Ok(place)
}

/// Holds the written files against the originals. `held_out` are the paths that training held out.
pub fn compare(
    folder: &Path,
    rebuilt: &[Rebuilt],
    held_out: &BTreeSet<&str>,
    originals: impl IntoIterator<Item = anyhow::Result<Document>>,
) -> anyhow::Result<Comparison> {
    let mut compared: BTreeMap<&str, Compared> = BTreeMap::new();
    let known: BTreeSet<&str> = rebuilt.iter().map(|file| file.path.as_str()).collect();
    let mut comparison = Comparison::default();
    for original in originals {
        let original = original?;
        let Some(&key) = known.get(original.path.as_str()) else {
            let is_held_out = held_out.contains(original.path.as_str());
            let Comparison { missing, held_out, .. } = &mut comparison;
            if is_held_out { held_out } else { missing }.push(original.path);
            continue;
        };
        let place = place(folder, &original.path)?;
        let ours = files::read(&place, Limits::default().file)
            .with_context(|| format!("cannot read {} back", place.display()))
            .hint(ErrorKind::Data, || "it may have changed meanwhile: rebuild again")?;
        compared.insert(key, Compared::new(original.path.clone(), &ours, &original.bytes()));
    }
    for file in rebuilt {
        let found = compared.remove(file.path.as_str());
        if found.is_none() {
            comparison.extra.push(file.path.clone());
        }
        comparison.files.push(found.unwrap_or_else(|| Compared {
            path: file.path.clone(),
            exact: false,
            bytes: 0,
            bytes_exact: 0,
            first_difference: None,
        }));
    }
    Ok(comparison)
}

impl Compared {
    fn new(path: String, ours: &[u8], original: &[u8]) -> Self {
        let same = ours.iter().zip(original).take_while(|(a, b)| a == b).count();
        let exact = ours.len() == original.len() && same == original.len();
        let first_difference = (!exact).then(|| {
            let before = &original[..same];
            let lines = before.split(|&byte| byte == b'\n').count() - 1;
            let line_start = before.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
            Difference {
                byte: same as u64,
                line: lines as u64 + 1,
                column: (same - line_start) as u64 + 1,
                before: excerpt(&before[line_start.max(same.saturating_sub(EXCERPT.1))..]),
                original: excerpt(&original[same..]),
                rebuilt: excerpt(&ours[same..]),
            }
        });
        let bytes = original.len() as u64;
        Self { path, exact, bytes, bytes_exact: same as u64, first_difference }
    }
}

/// Lines and bytes of an excerpt.
const EXCERPT: (usize, usize) = (4, 400);

/// The beginning of a text, shortened to a few lines.
fn excerpt(text: &[u8]) -> String {
    let (lines, bytes) = EXCERPT;
    let text = &text[..text.len().min(bytes)];
    let lines = text.split_inclusive(|&byte| byte == b'\n').take(lines);
    String::from_utf8_lossy(&lines.flatten().copied().collect::<Vec<u8>>()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::corpus::Encoding;

    fn paths(paths: &[&str]) -> Vec<String> {
        paths.iter().copied().map(String::from).collect()
    }

    #[test]
    fn rebuild_rejects_hostile_paths() {
        check_paths(&paths(&["a.c", "a/b.c", "a.c.d/e.c", "a/c.c", "ab/c"])).unwrap();
        for bad in [
            &["/etc/passwd"][..],
            &["../x.c"],
            &["a/../../x.c"],
            &["a/./b.c"],
            &["a//b.c"],
            &["a/"],
            &[""],
            &["."],
            &["a\0.c"],
            &["a\n.c"],
            &["\x1b[2J.c"],
            &["a.c", "a.c"],
            &["a", "a.c", "a-b", "a/b.c"],
        ] {
            let error = check_paths(&paths(bad)).expect_err(&format!("{bad:?}"));
            assert!(crate::error::hint_of(&error).is_some());
            assert!(!format!("{error:#}").contains(char::is_control));
        }
    }

    #[test]
    #[cfg(unix)]
    fn rebuild_follows_no_symlink() {
        let outside = tempfile::tempdir().unwrap();
        let folder = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(outside.path(), folder.path().join("link")).unwrap();
        let target = outside.path().join("target");
        fs::write(&target, "precious").unwrap();
        std::os::unix::fs::symlink(&target, folder.path().join("file.c")).unwrap();
        fs::create_dir(folder.path().join("folder.c")).unwrap();
        for path in ["link/x.c", "file.c", "folder.c", "link", "file.c/x.c"] {
            assert!(place(folder.path(), path).is_err(), "{path}");
        }
        let found = place(folder.path(), "deep/er/x.c").unwrap();
        assert_eq!(found, folder.path().join("deep/er/x.c"));
        assert!(found.parent().unwrap().is_dir());
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
    }

    #[test]
    fn first_difference_has_byte_line_and_column() {
        let at = |ours: &[u8], original: &[u8]| Compared::new("x".into(), ours, original);
        assert!(at(b"", b"").exact);
        assert!(at(b"ab\ncd", b"ab\ncd").exact);
        for (ours, byte, line, column) in
            [(&b"ab\ncX"[..], 4, 2, 2), (b"ab\ncde", 5, 2, 3), (b"ab\n", 3, 2, 1), (b"", 0, 1, 1)]
        {
            let compared = at(ours, b"ab\ncd");
            assert!(!compared.exact);
            let found = compared.first_difference.expect("they differ");
            assert_eq!((found.byte, found.line, found.column), (byte, line, column));
            let line_start = byte as usize + 1 - column as usize;
            let original = &b"ab\ncd"[byte as usize..];
            assert_eq!(found.before.as_bytes(), &b"ab\ncd"[line_start..byte as usize]);
            assert_eq!(found.original.as_bytes(), original);
            assert_eq!(found.rebuilt.as_bytes(), &ours[byte as usize..]);
            assert_eq!((compared.bytes, compared.bytes_exact), (5, byte));
        }
    }

    #[test]
    fn a_latin1_original_is_compared_by_its_own_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let original =
            Document { encoding: Encoding::Latin1, ..Document::new("a.c", "int caf\u{e9};") };
        assert_eq!(&*original.bytes(), b"int caf\xe9;");
        for (ours, exact) in [(&b"int caf\xe9;"[..], true), ("int caf\u{e9};".as_bytes(), false)] {
            fs::write(folder.path().join("a.c"), ours).unwrap();
            let bytes = ours.len() as u64;
            let rebuilt = Rebuilt { path: "a.c".into(), bytes, tokens: 1, end: End::Whole };
            let comparison =
                compare(folder.path(), &[rebuilt], &BTreeSet::new(), [Ok(original.clone())])
                    .unwrap();
            assert_eq!((comparison.is_exact(), comparison.bytes()), (exact, 9));
        }
    }

    #[test]
    fn comparison_lists_missing_and_extra_files() {
        let folder = tempfile::tempdir().unwrap();
        let file = |path: &str, text: &str| {
            write_atomically(&place(folder.path(), path).unwrap(), text.as_bytes()).unwrap();
            let bytes = text.len() as u64;
            Rebuilt { path: path.into(), bytes, tokens: 1, end: End::Whole }
        };
        let rebuilt = [file("a.c", "alpha"), file("b.c", "beta"), file("c.c", "gamma")];
        let original = |path: &str, text: &str| Ok(Document::new(path, text));
        let originals =
            [original("d.c", "delta"), original("b.c", "beat"), original("a.c", "alpha")];
        let comparison = compare(folder.path(), &rebuilt, &BTreeSet::new(), originals).unwrap();
        let exact: Vec<bool> = comparison.files.iter().map(|file| file.exact).collect();
        assert_eq!(exact, [true, false, false]);
        assert_eq!((comparison.bytes(), comparison.bytes_exact()), (9, 7));
        assert_eq!(comparison.missing, ["d.c"]);
        assert_eq!(comparison.extra, ["c.c"]);
        assert!(!comparison.is_exact());
        let originals = || [original("a.c", "alpha"), original("d.c", "delta")];
        let held_out = BTreeSet::from(["a.c", "d.c"]);
        let comparison = compare(folder.path(), &rebuilt[..1], &held_out, originals()).unwrap();
        assert!(comparison.is_exact() && comparison.held_out == ["d.c"]);
        let none = BTreeSet::new();
        assert!(!compare(folder.path(), &rebuilt[..1], &none, originals()).unwrap().is_exact());
    }
}
