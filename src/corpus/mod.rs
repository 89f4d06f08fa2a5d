//! Where text comes from, which files of it count, and the record of where it was found.

/// One file of a corpus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// The file's path inside the corpus: relative, `/`-separated (`linux/kernel/sched.c`).
    pub path: String,
    /// Its text. Files that are not UTF-8 were left out (or read as latin-1 for style `original`).
    pub text: String,
}
