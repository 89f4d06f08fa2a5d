//! The filter of file names, and valid paths of a corpus.

use globset::{GlobBuilder, GlobSet, GlobSetBuilder};

use crate::error;

/// Suffixes of kept files, in any case: the first LaaM's.
pub const SUFFIXES: [&str; 13] =
    [".c", ".cc", ".cpp", ".cxx", ".c++", ".h", ".hh", ".hpp", ".hxx", ".h++", ".s", ".rs", ".txt"];

/// The longest path a corpus carries, in bytes.
const MAX_PATH_BYTES: usize = 1024;

/// The longest name of a file or folder in a path, in bytes: file systems take 255, and a file that is
/// rebuilt is written under a longer, temporary name first.
pub const MAX_PART_BYTES: usize = 240;

/// True if a file of this name is kept.
pub fn is_kept(name: &[u8]) -> bool {
    SUFFIXES.iter().any(|suffix| {
        name.len()
            .checked_sub(suffix.len())
            .is_some_and(|stem| name[stem..].eq_ignore_ascii_case(suffix.as_bytes()))
    })
}

/// Patterns that a filter takes, and bytes of one.
const MAX_GLOBS: usize = 1000;
const MAX_GLOB_BYTES: usize = 1000;

/// Which files count, by their names: those with one of [`SUFFIXES`], or those that match one of the
/// globs to include, whatever their suffix; without those that match one to exclude.
///
/// A glob without `/` matches the name of a file in any folder, another the whole path in the corpus;
/// `*` stays within a folder and `**` does not.
#[derive(Clone, Debug, Default)]
pub struct NameFilter {
    include: Vec<String>,
    exclude: Vec<String>,
    includes: GlobSet,
    excludes: GlobSet,
}

impl NameFilter {
    /// Compiles the globs.
    ///
    /// # Errors
    /// A glob that is invalid, by its text.
    pub fn new(include: &[String], exclude: &[String]) -> anyhow::Result<Self> {
        Ok(Self {
            include: include.to_vec(),
            exclude: exclude.to_vec(),
            includes: compile("include", include)?,
            excludes: compile("exclude", exclude)?,
        })
    }

    /// Globs of which a file must match one.
    pub fn include(&self) -> &[String] {
        &self.include
    }

    /// Globs of which a file must match none.
    pub fn exclude(&self) -> &[String] {
        &self.exclude
    }

    /// True if a file of this name is kept.
    pub fn keeps(&self, name: &[u8]) -> bool {
        if is_of_git(name) {
            return false;
        }
        let is_included = if self.include.is_empty() {
            is_kept(name)
        } else {
            self.includes.is_match(as_path(name))
        };
        is_included && !self.excludes.is_match(as_path(name))
    }

    /// True if a file whose name says nothing of its text is kept: a shard.
    pub fn keeps_shard(&self, name: &[u8]) -> bool {
        let name = as_path(name);
        (self.include.is_empty() || self.includes.is_match(&name)) && !self.excludes.is_match(&name)
    }

    /// True if only the suffix of its name keeps a file out.
    pub fn lacks_suffix(&self, name: &[u8]) -> bool {
        self.include.is_empty()
            && !is_kept(name)
            && !is_of_git(name)
            && !self.excludes.is_match(as_path(name))
    }
}

/// True of what git keeps for itself, credentials among it: no text of the project.
fn is_of_git(name: &[u8]) -> bool {
    name.split(|&byte| byte == b'/').any(|part| part == b".git")
}

/// A name as globs see it: as in the corpus, if it can be there.
fn as_path(name: &[u8]) -> String {
    corpus_path(name).unwrap_or_else(|_| String::from_utf8_lossy(name).into_owned())
}

fn compile(field: &str, globs: &[String]) -> anyhow::Result<GlobSet> {
    let invalid = |glob: &str, why: String| {
        let hint = "a glob is like '*.py', 'drivers/**' or 'fs/[a-m]*.c'";
        error::config(format!("invalid `{field}` {}: {why}", shown(glob.as_bytes())), hint)
    };
    if let Some(extra) = globs.get(MAX_GLOBS) {
        return Err(invalid(extra, format!("more than {MAX_GLOBS} globs")));
    }
    let mut set = GlobSetBuilder::new();
    for glob in globs {
        if glob.is_empty() || glob.len() > MAX_GLOB_BYTES {
            return Err(invalid(glob, format!("must have 1 to {MAX_GLOB_BYTES} bytes")));
        }
        let anywhere = if glob.contains('/') { "" } else { "**/" };
        let pattern =
            format!("{anywhere}{}", glob.trim_start_matches("./").trim_start_matches('/'));
        let compiled = GlobBuilder::new(&pattern).literal_separator(true).build();
        set.add(compiled.map_err(|why| invalid(glob, why.kind().to_string()))?);
    }
    set.build().map_err(|why| invalid(&globs.join(" "), why.kind().to_string()))
}

/// Why a name cannot be a path of a corpus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is absolute, or has a `..`: whoever wrote it means harm, or made a mistake worth knowing.
    LeadsOut,
    /// It is empty, not UTF-8, too long, or has control characters.
    Unusable,
    /// A part of it is longer than [`MAX_PART_BYTES`].
    LongPart,
}

/// A member's name as a path of the corpus: relative, `/`-separated, without `.` and empty parts.
pub fn corpus_path(name: &[u8]) -> Result<String, Fault> {
    let parts = || name.split(|&byte| byte == b'/').filter(|part| !matches!(part, [] | [b'.']));
    if name.starts_with(b"/") || parts().any(|part| part == b"..") {
        return Err(Fault::LeadsOut);
    }
    let path = String::from_utf8(parts().collect::<Vec<_>>().join(&b'/'));
    match path {
        Ok(path)
            if !path.is_empty()
                && path.len() <= MAX_PATH_BYTES
                && !path.chars().any(char::is_control) =>
        {
            let is_long = path.split('/').any(|part| part.len() > MAX_PART_BYTES);
            if is_long { Err(Fault::LongPart) } else { Ok(path) }
        }
        _ => Err(Fault::Unusable),
    }
}

/// A name as it can be shown on one line, whatever is in it.
pub fn shown(name: &[u8]) -> String {
    const MAX_SHOWN_CHARS: usize = 120;
    let text = String::from_utf8_lossy(&name[..name.len().min(4 * MAX_SHOWN_CHARS)]);
    let mut shown: String =
        text.chars().take(MAX_SHOWN_CHARS).flat_map(char::escape_debug).collect();
    if text.chars().nth(MAX_SHOWN_CHARS).is_some() {
        shown.push_str("...");
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suffix_filter_matches_original() {
        for name in ["a.c", "A.C", "d/boot.S", "x.c++", "x.H++", "y.hpp", "lib.rs", "b/CHANGES.TXT"]
        {
            assert!(is_kept(name.as_bytes()), "{name}");
        }
        for name in ["Makefile", "a.o", "a.c.orig", "a.cs", "c", "README", "a.c/", "x.md", "txt"] {
            assert!(!is_kept(name.as_bytes()), "{name}");
        }
    }

    #[test]
    fn names_are_normalized_or_refused() {
        assert_eq!(corpus_path(b"./linux//kernel/./sched.c").unwrap(), "linux/kernel/sched.c");
        assert_eq!(corpus_path("schön.c".as_bytes()).unwrap(), "schön.c");
        for out in [&b"/etc/x.c"[..], b"../x.c", b"a/../../x.c", b"a/..", b"//x.c"] {
            assert_eq!(corpus_path(out), Err(Fault::LeadsOut));
        }
        let part = vec![b'a'; MAX_PART_BYTES + 1];
        assert_eq!(corpus_path(&part), Err(Fault::LongPart));
        assert_eq!(corpus_path(&[b"a/", &part[..], b"/b.c"].concat()), Err(Fault::LongPart));
        assert!(corpus_path(&part[1..]).is_ok());
        let long = b"a/".repeat(MAX_PATH_BYTES / 2 + 1);
        let long = &long[..=MAX_PATH_BYTES];
        for bad in [&b""[..], b"./", b"a\nb.c", b"a\0.c", b"\x1b[2J.c", b"\xff.c", long] {
            assert_eq!(corpus_path(bad), Err(Fault::Unusable));
        }
        assert!(corpus_path(&long[2..]).is_ok());
    }

    #[test]
    fn globs_include_whatever_the_suffix_and_exclude() {
        let filter = |include: &[&str], exclude: &[&str]| {
            let owned =
                |globs: &[&str]| globs.iter().map(|glob| (*glob).to_string()).collect::<Vec<_>>();
            NameFilter::new(&owned(include), &owned(exclude))
        };
        let plain = filter(&[], &[]).unwrap();
        assert!(plain.keeps(b"a/b.c") && plain.lacks_suffix(b"a/b.py"));
        assert!(!plain.keeps(b".git/refs/heads/a.c") && !plain.lacks_suffix(b"a/.git/config"));
        assert!(plain.keeps(b"a/x.git/b.c") && plain.keeps(b".github/b.c"));
        let python = filter(&["*.py", "./doc/*.md"], &["test_*"]).unwrap();
        for (name, kept) in [
            ("a.py", true),
            ("x/y/a.py", true),
            ("./a.py", true),
            ("a.c", false),
            ("doc/a.md", true),
            ("doc/x/a.md", false),
            ("a.md", false),
            ("x/test_a.py", false),
        ] {
            assert_eq!(python.keeps(name.as_bytes()), kept, "{name}");
            assert!(!python.lacks_suffix(name.as_bytes()), "{name}");
        }
        let without = filter(&[], &["drivers/**"]).unwrap();
        assert!(!without.keeps(b"drivers/net/a.c") && without.keeps(b"fs/drivers.c"));
        for bad in ["", "[a", "{a", &"a".repeat(MAX_GLOB_BYTES + 1)] {
            let said = filter(&[], &[bad]).unwrap_err().to_string();
            assert!(said.contains("`exclude`"), "{bad}: {said}");
        }
    }

    #[test]
    fn shown_names_are_one_short_line() {
        assert_eq!(shown(b"a\n\x1b.c"), "a\\n\\u{1b}.c");
        assert!(shown(&vec![0xff; 100_000]).len() < 500);
    }
}
