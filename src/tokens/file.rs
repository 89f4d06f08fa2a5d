//! The token file: a corpus as ids, read through a memory map.
//!
//! All numbers are little-endian; offsets are in bytes.
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 8 | magic: `LAAMTOKS` |
//! | 8 | 4 | version: 1 |
//! | 12 | 4 | bytes per id: 2 or 4 |
//! | 16 | 8 | T, the number of tokens |
//! | 24 | 8 | D, the number of documents |
//! | 32 | 8 | P, the bytes of all paths together |
//! | 40 | 4 | the vocabulary's size: every id is below it |
//! | 44 | 4 | 0 |
//! | 48 | 32 | sha256 of the tokenizer (its tokenizer.json) |
//! | 80 | 32 | sha256 of the corpus (its manifest) |
//! | 112 | 32 | sha256 of everything after the header |
//! | 144 | 8 | the length of the whole file |
//! | 152 | 8 | the first 8 bytes of the sha256 of bytes 0 to 152 |
//! | 160 | T * 2 or T * 4 | the ids, document after document |
//! | .. | 0 to 7 | zeros, up to a multiple of 8 |
//! | .. | D * 24 | the document table: a document's first token (8), the first token of its text, after its header (8), and where its path ends among the paths (8) |
//! | .. | P | the paths, UTF-8, end to end |
//!
//! A document ends where the next begins, the last one at T; a path begins where the one before
//! it ends. Opening checks the header and the length, whatever the size. The table is checked where
//! it is read, and ids where they are drawn; [`TokenFile::verify`] reads and checks everything.

use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use sha2::{Digest, Sha256};

use crate::error::{self, ErrorKind, Hint};
use crate::files::{self, MappedFile};

pub(super) const MAGIC: [u8; 8] = *b"LAAMTOKS";
pub(super) const VERSION: u32 = 1;
pub(super) const HEADER: usize = 160;
/// The part of the header that its check covers.
const CHECKED: usize = 152;
/// Bytes of a document's entry in the table.
pub(super) const ENTRY: u64 = 24;

/// The header, in the order of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 4.
    pub id_bytes: u32,
    /// Number of tokens.
    pub tokens: u64,
    /// Number of documents.
    pub documents: u64,
    /// Bytes of all paths together.
    pub path_bytes: u64,
    /// Vocabulary size: every id is below it.
    pub vocab_size: u32,
    /// SHA-256 of the tokenizer's `tokenizer.json`.
    pub tokenizer_sha256: [u8; 32],
    /// SHA-256 of the corpus manifest.
    pub corpus_sha256: [u8; 32],
    /// SHA-256 of everything after the header.
    pub body_sha256: [u8; 32],
}

impl Header {
    /// The offset of the document table, or `None` beyond 2^64.
    fn table(&self) -> Option<u64> {
        let ids = self.tokens.checked_mul(u64::from(self.id_bytes))?;
        ids.checked_add(HEADER as u64)?.checked_next_multiple_of(8)
    }

    /// The length of the whole file, or `None` beyond 2^64.
    pub(super) fn length(&self) -> Option<u64> {
        let table = self.documents.checked_mul(ENTRY)?;
        self.table()?.checked_add(table)?.checked_add(self.path_bytes)
    }

    pub(super) fn to_bytes(&self) -> [u8; HEADER] {
        let mut bytes = Vec::with_capacity(HEADER);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(self.id_bytes.to_le_bytes());
        bytes.extend(self.tokens.to_le_bytes());
        bytes.extend(self.documents.to_le_bytes());
        bytes.extend(self.path_bytes.to_le_bytes());
        bytes.extend(self.vocab_size.to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(self.tokenizer_sha256);
        bytes.extend(self.corpus_sha256);
        bytes.extend(self.body_sha256);
        bytes.extend(self.length().unwrap_or_default().to_le_bytes());
        bytes.extend(&Sha256::digest(&bytes)[..HEADER - CHECKED]);
        bytes.try_into().expect("the fields fill the header")
    }

    fn parse(bytes: &[u8; HEADER]) -> anyhow::Result<Self> {
        let u32_at = |at: usize| u32::from_le_bytes(fixed(&bytes[at..at + 4]));
        let u64_at = |at: usize| u64::from_le_bytes(fixed(&bytes[at..at + 8]));
        if bytes[..8] != MAGIC {
            bail!("it does not begin with LAAMTOKS");
        }
        if u32_at(8) != VERSION {
            bail!("its version is {}, but this program reads version {VERSION}", u32_at(8));
        }
        if Sha256::digest(&bytes[..CHECKED])[..HEADER - CHECKED] != bytes[CHECKED..] {
            bail!("its header is damaged (wrong checksum)");
        }
        let header = Self {
            id_bytes: u32_at(12),
            tokens: u64_at(16),
            documents: u64_at(24),
            path_bytes: u64_at(32),
            vocab_size: u32_at(40),
            tokenizer_sha256: fixed(&bytes[48..80]),
            corpus_sha256: fixed(&bytes[80..112]),
            body_sha256: fixed(&bytes[112..144]),
        };
        if !matches!(header.id_bytes, 2 | 4) {
            bail!("invalid id size {}: must be 2 or 4 bytes", header.id_bytes);
        }
        let empty = (header.tokens == 0, header.documents == 0);
        if u32_at(44) != 0 || empty.0 != empty.1 || header.length() != Some(u64_at(144)) {
            bail!("its header is inconsistent");
        }
        Ok(header)
    }
}

/// Copies a slice whose length is right by construction.
fn fixed<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.try_into().expect("as many bytes as asked for")
}

/// One document of a token file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DocumentTokens<'a> {
    /// Empty for a document without a name.
    pub path: &'a str,
    /// All of its tokens, markers included, as positions in the file.
    pub tokens: Range<usize>,
    /// The position of the first token after its header: where its text begins.
    pub text: usize,
}

/// An open token file.
#[derive(Debug)]
pub struct TokenFile {
    map: MappedFile,
    header: Header,
    path: PathBuf,
}

impl TokenFile {
    /// Refuses to replace a file that is not a token file.
    pub fn check_output(output: &Path) -> anyhow::Result<()> {
        if files::holds_nothing_but(output, &MAGIC) {
            return Ok(());
        }
        Err(error::data(
            format!("{} exists and is not a token file", output.display()),
            "choose another `output`, or remove it",
        ))
    }

    /// Opens a token file. Takes microseconds, whatever its size.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let cannot = |why: anyhow::Error| {
            error::data(
                format!("{} is not a token file that laam can use: {why}", path.display()),
                "create one with laam tokenize",
            )
        };
        let file = files::open(path).map_err(|why| cannot(why.into()))?;
        let metadata = file.metadata().map_err(|why| cannot(why.into()))?;
        if metadata.len() < HEADER as u64 {
            return Err(cannot(anyhow::anyhow!("too short for a header")));
        }
        let map = MappedFile::new(&file, path).map_err(|why| cannot(why.into()))?;
        let Some(bytes) = map.first_chunk() else {
            return Err(cannot(anyhow::anyhow!("too short for a header")));
        };
        let header = Header::parse(bytes).map_err(cannot)?;
        if header.length() != Some(map.len() as u64) {
            let meant = header.length().unwrap_or_default();
            return Err(cannot(anyhow::anyhow!(
                "it has {} bytes, but its header says {meant}",
                map.len()
            )));
        }
        Ok(Self { map, header, path: path.to_path_buf() })
    }

    /// The header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The number of tokens.
    pub fn tokens(&self) -> usize {
        self.header.tokens as usize
    }

    /// The number of documents.
    pub fn documents(&self) -> usize {
        self.header.documents as usize
    }

    fn damaged(&self, why: impl std::fmt::Display) -> anyhow::Error {
        error::data(
            format!("{} is damaged: {why}", self.path.display()),
            "create it again with laam tokenize",
        )
    }

    fn table(&self) -> usize {
        // Within the file: `open` compared the length.
        self.header.table().unwrap_or_default() as usize
    }

    /// A field of a document's entry.
    fn entry(&self, document: usize, field: usize) -> u64 {
        let at = self.table() + document * ENTRY as usize + field * 8;
        u64::from_le_bytes(fixed(&self.map[at..at + 8]))
    }

    /// A document: its path and where its tokens are.
    ///
    /// # Panics
    /// If there is no such document, like an index into a slice.
    pub fn document(&self, document: usize) -> anyhow::Result<DocumentTokens<'_>> {
        assert!(document < self.documents(), "document {document} of {}", self.documents());
        let last = document + 1 == self.documents();
        let from = self.entry(document, 0);
        let to = if last { self.header.tokens } else { self.entry(document + 1, 0) };
        let text = self.entry(document, 1);
        let path_from = if document == 0 { 0 } else { self.entry(document - 1, 2) };
        let path_to = self.entry(document, 2);
        let in_order = from <= text && text <= to && to <= self.header.tokens;
        let whole = (document > 0 || from == 0) && (!last || path_to == self.header.path_bytes);
        if !in_order || !whole || path_from > path_to || path_to > self.header.path_bytes {
            return Err(self.damaged(format_args!("the entry of document {document} is wrong")));
        }
        let paths = self.map.len() - self.header.path_bytes as usize;
        let path = &self.map[paths + path_from as usize..paths + path_to as usize];
        let path = std::str::from_utf8(path)
            .map_err(|_| self.damaged(format_args!("the path of document {document} is wrong")))?;
        Ok(DocumentTokens { path, tokens: from as usize..to as usize, text: text as usize })
    }

    /// The document that holds a token: the last one that begins at or before it.
    pub fn document_of(&self, token: usize) -> usize {
        let (mut from, mut to) = (0, self.documents());
        while to - from > 1 {
            let middle = usize::midpoint(from, to);
            if self.entry(middle, 0) <= token as u64 { from = middle } else { to = middle }
        }
        from
    }

    /// Copies the tokens from `from` on into `out`, each checked against the vocabulary.
    ///
    /// # Panics
    /// If the file has not so many tokens.
    pub fn read(&self, from: usize, out: &mut [u32]) -> anyhow::Result<()> {
        assert!(from + out.len() <= self.tokens(), "tokens {from} + {} beyond the end", out.len());
        let bytes = self.header.id_bytes as usize;
        let ids = &self.map[HEADER + from * bytes..][..out.len() * bytes];
        if bytes == 2 {
            for (out, id) in out.iter_mut().zip(ids.as_chunks::<2>().0) {
                *out = u32::from(u16::from_le_bytes(*id));
            }
        } else {
            for (out, id) in out.iter_mut().zip(ids.as_chunks::<4>().0) {
                *out = u32::from_le_bytes(*id);
            }
        }
        let size = self.header.vocab_size;
        match out.iter().position(|&id| id >= size) {
            None => Ok(()),
            Some(at) => Err(self.damaged(format_args!(
                "token {} is {}, in a vocabulary of {size}",
                from + at,
                out[at]
            ))),
        }
    }

    /// Refuses a token that a model with a vocabulary of `rows` has no row for.
    ///
    /// # Errors
    /// A token is `rows` or more, or the file is damaged.
    pub fn check_fits(&self, rows: usize) -> anyhow::Result<()> {
        if self.header.vocab_size as usize <= rows {
            return Ok(());
        }
        let mut ids = vec![0; 1 << 16];
        for from in (0..self.tokens()).step_by(ids.len()) {
            let ids = &mut ids[..(self.tokens() - from).min(1 << 16)];
            self.read(from, ids)?;
            if let Some(id) = ids.iter().find(|&&id| id as usize >= rows) {
                return Err(error::data(
                    format!("the text has token {id}, but the model's vocabulary ends at {rows}"),
                    "use the tokenizer that the model was trained with",
                ));
            }
        }
        Ok(())
    }

    /// The sha256 of the whole file. Reads it afresh: through the map, all of it would come to lie
    /// in memory.
    pub fn sha256(&self) -> anyhow::Result<[u8; 32]> {
        files::sha256(&self.path)
            .with_context(|| format!("cannot read {}", self.path.display()))
            .hint(ErrorKind::Data, || "create it again with laam tokenize")
    }

    /// Reads and checks everything.
    pub fn verify(&self) -> anyhow::Result<()> {
        if Sha256::digest(&self.map[HEADER..])[..] != self.header.body_sha256 {
            return Err(self.damaged("its sha256 differs from the one in its header"));
        }
        for document in 0..self.documents() {
            self.document(document)
                .hint(ErrorKind::Data, || "create it again with laam tokenize")?;
        }
        let mut ids = vec![0; 1 << 16];
        for from in (0..self.tokens()).step_by(ids.len()) {
            let count = ids.len().min(self.tokens() - from);
            self.read(from, &mut ids[..count])?;
        }
        Ok(())
    }
}
