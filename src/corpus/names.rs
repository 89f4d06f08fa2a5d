//! The filter of file names, and valid paths of a corpus.

/// Suffixes of kept files, in any case: the first LaaM's.
pub const SUFFIXES: [&str; 13] =
    [".c", ".cc", ".cpp", ".cxx", ".c++", ".h", ".hh", ".hpp", ".hxx", ".h++", ".s", ".rs", ".txt"];

/// The longest path a corpus carries, in bytes.
const MAX_PATH_BYTES: usize = 1024;

/// True if a file of this name is kept.
pub fn is_kept(name: &[u8]) -> bool {
    SUFFIXES.iter().any(|suffix| {
        name.len()
            .checked_sub(suffix.len())
            .is_some_and(|stem| name[stem..].eq_ignore_ascii_case(suffix.as_bytes()))
    })
}

/// Why a name cannot be a path of a corpus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is absolute, or has a `..`: whoever wrote it means harm, or made a mistake worth knowing.
    LeadsOut,
    /// It is empty, not UTF-8, too long, or has control characters.
    Unusable,
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
            Ok(path)
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
    fn names_are_normalised_or_refused() {
        assert_eq!(corpus_path(b"./linux//kernel/./sched.c").unwrap(), "linux/kernel/sched.c");
        assert_eq!(corpus_path("schön.c".as_bytes()).unwrap(), "schön.c");
        for out in [&b"/etc/x.c"[..], b"../x.c", b"a/../../x.c", b"a/..", b"//x.c"] {
            assert_eq!(corpus_path(out), Err(Fault::LeadsOut));
        }
        let long = vec![b'a'; MAX_PATH_BYTES + 1];
        for bad in [&b""[..], b"./", b"a\nb.c", b"a\0.c", b"\x1b[2J.c", b"\xff.c", &long] {
            assert_eq!(corpus_path(bad), Err(Fault::Unusable));
        }
        assert!(corpus_path(&long[1..]).is_ok());
    }

    #[test]
    fn shown_names_are_one_short_line() {
        assert_eq!(shown(b"a\n\x1b.c"), "a\\n\\u{1b}.c");
        assert!(shown(&vec![0xff; 100_000]).len() < 500);
    }
}
