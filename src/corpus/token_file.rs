//! Token files of llm.c and nanoGPT: ids instead of text.
//!
//! llm.c: 256 little-endian i32 (magic, version, number of tokens, zeros), then the ids: u16 after the
//! magic of GPT-2 (20240520, version 1), u32 after that of Llama 3 (20240801, version 7). nanoGPT: u16
//! from the first byte on, without a header; so is read what begins with neither magic.
//!
//! Documents are told apart by the tokenizer's special tokens: if the file begins with its first or last
//! token of a text, a document begins at each such token (llm.c writes it before every document); if
//! not, one ends after each last token (as nanoGPT writes it).

use std::io::BufReader;
use std::path::Path;

use super::pass::{Flow, Intake};
use super::shards::{damaged, fill};
use super::{Document, TokenVocabulary};
use crate::error;
use crate::files;

const HEADER_BYTES: u64 = 1024;
/// Magic, version and bytes per id.
const LLM_C: [(u32, u32, usize); 2] = [(20_240_520, 1, 2), (20_240_801, 7, 4)];
/// Tokens of a document at most: a longer stretch without a separator is cut.
const MAX_DOCUMENT_TOKENS: usize = 1 << 20;
const PIECE_BYTES: usize = 1 << 16;

pub fn read(path: &Path, intake: &mut Intake) -> anyhow::Result<Flow> {
    let place = path.display();
    let vocabulary = intake.options().vocabulary.ok_or_else(|| {
        error::data(
            format!("{place} has ids, not text"),
            "give the text that they were made of; laam train, evaluate and memorization take ids",
        )
    })?;
    let file = files::open(path).and_then(|file| Ok((file.metadata()?.len(), file)));
    let (bytes, file) = file.map_err(|why| damaged(&why, 0, path))?;
    let mut file = BufReader::new(file);
    let mut start = Vec::new();
    fill(&mut file, &mut start, 12).map_err(|why| damaged(&why, 0, path))?;
    let field = |at: usize| {
        start
            .get(4 * at..4 * at + 4)
            .map(|bytes| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    };
    let known = LLM_C.iter().find(|(magic, ..)| field(0) == Some(*magic));
    let (id_bytes, header) = match known {
        Some(&(_, version, id_bytes)) => {
            let tokens = u64::from(field(2).unwrap_or_default());
            let expected = HEADER_BYTES + tokens * id_bytes as u64;
            if field(1) != Some(version) || bytes != expected {
                return Err(error::data(
                    format!(
                        "damaged or cut short: version {:?} and {bytes} bytes, not {version} and \
                         {expected} for the {tokens} tokens of its header, {place}",
                        field(1).unwrap_or_default()
                    ),
                    "copy or write the file again",
                ));
            }
            (id_bytes, HEADER_BYTES)
        }
        None if bytes % 2 != 0 || bytes == 0 => {
            return Err(error::data(
                format!("damaged or cut short: {bytes} bytes are not a row of 16-bit ids, {place}"),
                "copy or write the file again; a .bin file is llm.c's, or nanoGPT's ids without a header",
            ));
        }
        None => (2, 0),
    };
    let mut ids = start;
    let mut splitter = Splitter { vocabulary, separator: Separator::Unknown, document: Vec::new() };
    let mut skip = header as usize;
    let mut at = 0;
    loop {
        fill(&mut file, &mut ids, PIECE_BYTES).map_err(|why| damaged(&why, at, path))?;
        let skipped = skip.min(ids.len());
        skip -= skipped;
        let whole = skipped + (ids.len() - skipped) / id_bytes * id_bytes;
        if whole == 0 {
            break;
        }
        for id in ids[skipped..whole].chunks_exact(id_bytes) {
            let id = id.iter().rev().fold(0, |sum, &byte| sum << 8 | u32::from(byte));
            if id as usize >= vocabulary.size {
                return Err(error::data(
                    format!(
                        "token {at} is {id}, but the tokenizer has {} ids, {place}",
                        vocabulary.size
                    ),
                    "use the tokenizer that the file was made with; a .bin file is llm.c's, or \
                     nanoGPT's 16-bit ids without a header",
                ));
            }
            at += 1;
            if let Some(document) = splitter.push(id)
                && intake.keep_unnamed(document) == Flow::Break(())
            {
                return Ok(Flow::Break(()));
            }
        }
        ids.drain(..whole);
    }
    let last = splitter.take();
    Ok(if last.ids.is_empty() { Flow::Continue(()) } else { intake.keep_unnamed(last) })
}

/// Separation of documents.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Separator {
    /// No id was seen yet.
    Unknown,
    /// This token begins each.
    Begins(u32),
    /// The tokenizer's last token of a text ends each.
    Ends,
}

/// Cuts a row of ids into documents.
struct Splitter {
    vocabulary: TokenVocabulary,
    separator: Separator,
    document: Vec<u32>,
}

impl Splitter {
    /// Takes the next id; returns the document that it completes.
    fn push(&mut self, id: u32) -> Option<Document> {
        let TokenVocabulary { bos, eos, .. } = self.vocabulary;
        if self.separator == Separator::Unknown {
            let is_separator = bos == Some(id) || eos == Some(id);
            self.separator = if is_separator { Separator::Begins(id) } else { Separator::Ends };
        }
        let is_long = self.document.len() >= MAX_DOCUMENT_TOKENS;
        if self.separator == Separator::Begins(id) || is_long {
            let document = self.take();
            self.document.push(id);
            return (!document.ids.is_empty()).then_some(document);
        }
        self.document.push(id);
        (self.separator == Separator::Ends && eos == Some(id)).then(|| self.take())
    }

    fn take(&mut self) -> Document {
        Document { ids: std::mem::take(&mut self.document), ..Document::new("", "") }
    }
}
