//! Text to tokens and back: byte-level BPE in two styles, on the `tokenizers` crate.
//!
//! - [`Style::Exact`] (the default) gives back any UTF-8 text byte for byte. Documents are framed by
//!   markers, which are ids of their own: a marker spelled out in a file is plain text.
//! - [`Style::Original`] is the first LaaM's, id for id: a blank before every piece of text, runs of
//!   blanks as special tokens, markers read from the text. Its decoder is repaired (it drops the
//!   blanks that encoding added), so that it too gives back what it was given.
//!
//! Any other fast tokenizer of a Hugging Face folder can be loaded: its documents have no names, and each
//! ends with its end-of-text token.

mod byte_level;
mod folder;
mod foreign;
mod limits;
mod original;
mod train;
mod words;

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::Context;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use tokenizers::{AddedToken, Model};

pub use train::{Trained, Training, TrainingProgress};
pub(crate) use words::{LLAMA_3_PATTERN, QWEN_2_PATTERN};

use crate::corpus::Document;
use crate::error::{self, ErrorKind, Hint};
use foreign::CutPlace;
use limits::guarded;
use words::{Cache, Words};

/// Tokenizer style.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum Style {
    /// Decodes any text back byte for byte.
    #[default]
    Exact,
    /// The first LaaM's tokens, id for id.
    Original,
}

/// The markers, in the order of their ids: `start_file`, `end_file`, `start_header`, `end_header`,
/// `pad`. They frame a document:
/// `<|start_file|><|start_header|>PATH<|end_header|>TEXT<|end_file|>`.
pub const MARKERS: [&str; 5] =
    ["<|start_file|>", "<|end_file|>", "<|start_header|>", "<|end_header|>", "<|pad|>"];

/// The blanks that are tokens of their own in style `original`.
const BLANKS: [&str; 4] = ["\t", " ", "  ", "    "];

impl Style {
    /// The special tokens of the style, in the order of their ids, from 0.
    fn special_tokens(self) -> impl Iterator<Item = AddedToken> {
        let blanks = match self {
            Style::Exact => [].as_slice(),
            Style::Original => BLANKS.as_slice(),
        };
        let marker = |marker: &&str| AddedToken::from(*marker, true);
        // Blanks are text, not specials: a decoder that skips specials must not lose them. The
        // first LaaM called them special; their ids are the same.
        let blank = |blank: &&str| AddedToken::from(*blank, false).normalized(false);
        MARKERS.iter().map(marker).chain(blanks.iter().map(blank))
    }
}

/// The ids of the markers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Markers {
    /// Begins a document.
    pub start_file: u32,
    /// Ends a document.
    pub end_file: u32,
    /// Begins the address of a document.
    pub start_header: u32,
    /// Ends the address of a document.
    pub end_header: u32,
    /// Fills a window.
    pub pad: u32,
}

/// The tokens that open, close and fill a text, if the tokenizer names them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Special {
    /// Begins every text: where generation without a prompt starts.
    pub bos: Option<u32>,
    /// Ends every text.
    pub eos: Option<u32>,
    /// Id of padding.
    pub pad: Option<u32>,
}

/// A tokenizer, trained or loaded.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// `None`: somebody else's.
    style: Option<Style>,
    markers: Option<Markers>,
    special: Special,
    /// The bytes of `tokenizer.json` and `tokenizer_config.json`.
    json: Vec<u8>,
    config: Vec<u8>,
    /// Optional files beside them, by their names.
    extras: Vec<(&'static str, Vec<u8>)>,
    /// One of the first two that is a link to somewhere outside the folder.
    foreign: Option<PathBuf>,
    sha256: [u8; 32],
    /// Source path, for messages.
    place: Option<PathBuf>,
    vocab_size: usize,
    /// Each id's bytes, if a text is the concatenation of its tokens' bytes.
    spelling: Option<Spelling>,
    growth: limits::Growth,
    /// The words of its style.
    words: Words,
    /// The documents of a tokenizer that is not one of ours.
    frame: foreign::Frame,
    /// Added tokens of style `original`, if they are found in text as the first LaaM found them.
    added: Option<original::AddedTokens>,
    /// Tokens of words seen before: a cache for each thread that is encoding.
    caches: Mutex<Vec<Cache>>,
}

/// The bytes of every id, end to end.
#[derive(Debug)]
struct Spelling {
    bytes: Vec<u8>,
    ends: Vec<u32>,
}

impl Spelling {
    fn of(&self, id: u32) -> Option<&[u8]> {
        let id = id as usize;
        let to = *self.ends.get(id)? as usize;
        let from = if id == 0 { 0 } else { self.ends[id - 1] as usize };
        Some(&self.bytes[from..to])
    }
}

/// A word of more bytes is refused: merging it would take gigabytes.
const MAX_WORD_BYTES: usize = 4 << 20;

impl Tokenizer {
    /// The style, or `None` for a tokenizer that is not one of ours.
    pub fn style(&self) -> Option<Style> {
        self.style
    }

    /// One more than the largest id: the rows an embedding needs.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// SHA-256 of `tokenizer.json` as [`Tokenizer::save`] writes it.
    pub fn sha256(&self) -> [u8; 32] {
        self.sha256
    }

    /// The markers' ids. An error for a tokenizer that lacks them: its documents have no names.
    pub fn markers(&self) -> anyhow::Result<Markers> {
        self.markers.ok_or_else(|| {
            error::data(
                format!("the tokenizer{} has no document markers ({})", self.at(), MARKERS[0]),
                "files are asked for by their names only with a tokenizer of laam train-tokenizer",
            )
        })
    }

    /// The token that ends a document.
    ///
    /// # Errors
    /// The tokenizer has no such token.
    pub fn end_of_document(&self) -> anyhow::Result<u32> {
        let end_file = self.markers.map(|markers| markers.end_file);
        end_file.or(self.special.eos).ok_or_else(|| {
            error::data(
                format!("the tokenizer{} names no token that ends a text", self.at()),
                "set eos_token in tokenizer_config.json beside its tokenizer.json",
            )
        })
    }

    /// A token to fill windows with, where nothing attends to it.
    pub fn pad(&self) -> u32 {
        let pad = self.markers.map(|markers| markers.pad).or(self.special.pad);
        pad.or(self.special.eos).unwrap_or_default()
    }

    /// Beginning, end and padding of a text.
    pub fn special(&self) -> Special {
        self.special
    }

    /// A document in its frame: [`Tokenizer::encode_framed`] without the length of the header.
    pub fn encode_document(&self, document: &Document) -> anyhow::Result<Vec<u32>> {
        Ok(self.encode_framed(document)?.0)
    }

    /// A document in its frame, and the number of tokens before its text. The frame is
    /// `<|start_file|><|start_header|>PATH<|end_header|>TEXT<|end_file|>`, or `<|start_file|>TEXT<|end_file|>`
    /// for a document without a name; of a tokenizer that is not one of ours what it puts around every
    /// text, and its end-of-text token.
    pub fn encode_framed(&self, document: &Document) -> anyhow::Result<(Vec<u32>, usize)> {
        if !document.ids.is_empty() {
            let Special { bos, eos, .. } = self.special;
            let first = document.ids.first().copied();
            let begins = document.ids.len() > 1 && (first == bos || first == eos);
            return Ok((document.ids.clone(), usize::from(begins)));
        }
        let name = if document.path.is_empty() { "this document" } else { &document.path };
        let hint = || format!("leave out {name}");
        let Some(markers) = self.markers else {
            let eos = self.end_of_document()?;
            let mut ids = self.frame.before.clone();
            ids.extend(self.encode_text(&document.text).hint(ErrorKind::Data, hint)?);
            ids.extend(&self.frame.after);
            if self.frame.after.last() != Some(&eos) {
                ids.push(eos);
            }
            return Ok((ids, self.frame.before.len()));
        };
        let header = if document.path.is_empty() {
            vec![markers.start_file]
        } else {
            self.encode_header(&document.path, None)?
        };
        let before = header.len();
        if self.style == Some(Style::Exact) {
            let mut ids = header;
            ids.extend(self.encode_text(&document.text).hint(ErrorKind::Data, hint)?);
            ids.push(markers.end_file);
            return Ok((ids, before));
        }
        // Here markers are read from the text, as the first LaaM did.
        let ids = self.encode_text(&train::format_document(document));
        Ok((ids.hint(ErrorKind::Data, hint)?, before))
    }

    /// A document of a token file with the text that its ids stand for, without the tokens that begin and
    /// end a text; any other document as it is.
    pub fn decoded(&self, document: Document) -> anyhow::Result<Document> {
        if document.ids.is_empty() {
            return Ok(document);
        }
        let Special { bos, eos, .. } = self.special;
        let is_text = |id: &u32| Some(*id) != bos && Some(*id) != eos;
        let ids: Vec<u32> = document.ids.into_iter().filter(is_text).collect();
        let text = String::from_utf8_lossy(&self.decode_bytes(&ids)?).into_owned();
        Ok(Document::new(document.path, text))
    }

    /// Header of a document: `<|start_file|><|start_header|>PATH<|end_header|>`, or with a
    /// chunk's number `PATH N`.
    pub fn encode_header(&self, path: &str, chunk: Option<usize>) -> anyhow::Result<Vec<u32>> {
        let markers = self.markers()?;
        let name = match chunk {
            None => path.to_string(),
            Some(chunk) => format!("{path} {chunk}"),
        };
        let mut ids = vec![markers.start_file, markers.start_header];
        ids.extend(self.encode_text(&name)?);
        ids.push(markers.end_header);
        Ok(ids)
    }

    /// Text alone. Style `exact` takes it all as plain text; the others find markers in it. Long texts
    /// are cut where no token spans the cut, and encoded by all threads.
    pub fn encode_text(&self, text: &str) -> anyhow::Result<Vec<u32>> {
        let is_exact = self.style == Some(Style::Exact);
        let encode = |text: &str| {
            if !is_exact {
                return self.encode_with_added_tokens(text, false);
            }
            let mut ids = Vec::with_capacity(text.len() / 3);
            self.encode_words(text, &mut ids)?;
            Ok(ids)
        };
        let least = self.growth.piece_bytes(foreign::PIECE_BYTES);
        let pieces: Vec<_> = match self.frame.cut {
            _ if text.len() <= least => return encode(text),
            _ if is_exact => foreign::pieces(text, least).collect(),
            CutPlace::Nowhere => return encode(text),
            CutPlace::AfterLines => foreign::pieces(text, least).collect(),
            CutPlace::AtBlanks => foreign::pieces_between_blanks(text, least).collect(),
            CutPlace::BeforeLines(_) => foreign::pieces_before_lines(text).collect(),
        };
        let mut ids = pieces.into_par_iter().map(encode).collect::<anyhow::Result<Vec<_>>>()?;
        if let (CutPlace::BeforeLines(blank), false) = (self.frame.cut, is_exact) {
            for ids in ids.iter_mut().skip(1) {
                if ids.first() != Some(&blank) {
                    return encode(text);
                }
                ids.remove(0);
            }
        }
        Ok(ids.concat())
    }

    /// A prompt as transformers encodes it: markers are markers, and what the tokenizer puts before
    /// every text is put there.
    pub fn encode_prompt(&self, text: &str) -> anyhow::Result<Vec<u32>> {
        self.encode_with_added_tokens(text, true)
    }

    /// `specials`: with what the tokenizer puts before and behind every text.
    fn encode_with_added_tokens(&self, text: &str, specials: bool) -> anyhow::Result<Vec<u32>> {
        let Some(added) = &self.added else {
            let encoded = self.growth.check_encoding(text.len()).and_then(|()| {
                guarded(|| Ok(self.inner.encode_fast(text, specials)?.get_ids().to_vec()))
            });
            return encoded
                .context("cannot encode text")
                .hint(ErrorKind::Data, || format!("check the tokenizer{}", self.at()));
        };
        let mut ids = Vec::with_capacity(text.len() / 2);
        for piece in added.pieces(text) {
            match piece {
                original::Piece::Added(id) => ids.push(id),
                // A blank comes before every piece of text.
                original::Piece::Text(text) => self.encode_words(&format!(" {text}"), &mut ids)?,
            }
        }
        Ok(ids)
    }

    fn encode_words(&self, text: &str, ids: &mut Vec<u32>) -> anyhow::Result<()> {
        let mut cache = self.take_cache();
        for word in self.words.of(text) {
            if let Some(known) = cache.get(word) {
                ids.extend(known);
                continue;
            }
            if word.len() > MAX_WORD_BYTES {
                return Err(error::data(
                    format!("a word of {} bytes is too long to be tokenized", word.len()),
                    "leave the file out: this is not source code",
                ));
            }
            let from = ids.len();
            let tokens =
                guarded(|| self.inner.get_model().tokenize(&byte_level::text(word.as_bytes())))
                    .with_context(|| format!("cannot encode {word:?}"))
                    .hint(ErrorKind::Data, || format!("check the tokenizer{}", self.at()))?;
            ids.extend(tokens.iter().map(|token| token.id));
            cache.insert(word, &ids[from..]);
        }
        // Lost on an error, which ends the encoding anyway.
        self.caches.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(cache);
        Ok(())
    }

    fn take_cache(&self) -> Cache {
        let mut caches = self.caches.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        caches.pop().unwrap_or_default()
    }

    /// The bytes of the text that the ids stand for, markers spelled out.
    pub fn decode_bytes(&self, ids: &[u32]) -> anyhow::Result<Vec<u8>> {
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= self.vocab_size) {
            return Err(error::data(
                format!("id {id} is not in the vocabulary of {}{}", self.vocab_size, self.at()),
                "use the tokenizer that the model was trained with",
            ));
        }
        let Some(spelling) = &self.spelling else {
            let length = |&id: &u32| self.inner.id_to_token(id).map_or(0, |token| token.len());
            let text = self.growth.check_decoding(ids.iter().map(length).sum());
            return Ok(text
                .and_then(|()| guarded(|| self.inner.decode(ids, false)))
                .context("cannot decode")
                .hint(ErrorKind::Data, || format!("check the tokenizer{}", self.at()))?
                .into_bytes());
        };
        Ok(ids.iter().filter_map(|&id| spelling.of(id)).flatten().copied().collect())
    }

    /// The bytes that a token adds to a text, at its beginning or after others. A part of a character that a
    /// token by itself does not spell counts as the decoder shows it.
    pub fn token_bytes(&self, id: u32, is_first: bool) -> anyhow::Result<Vec<u8>> {
        if self.is_spelled() || is_first {
            return self.decode_bytes(&[id]);
        }
        let name = self.inner.id_to_token(id).unwrap_or_default();
        let byte = name.strip_prefix("<0x").and_then(|hex| hex.strip_suffix('>'));
        if let Some(byte) = byte.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            return Ok(vec![byte]);
        }
        let word = self.decode_bytes(&self.frame.word)?.len();
        let mut bytes = self.decode_bytes(&[self.frame.word.as_slice(), &[id]].concat())?;
        Ok(bytes.split_off(word.min(bytes.len())))
    }

    /// True if a text is the concatenation of its tokens' bytes, so that each can be decoded alone.
    pub fn is_spelled(&self) -> bool {
        self.spelling.is_some()
    }

    /// ` of PLACE`, or nothing for one that was just trained.
    fn at(&self) -> String {
        let of = |place: &PathBuf| format!(" of {}", place.display());
        self.place.as_ref().map(of).unwrap_or_default()
    }

    /// The files of the folder as they were read, by their names.
    pub fn files(&self) -> impl Iterator<Item = (&'static str, &[u8])> {
        let extras = self.extras.iter().map(|(name, bytes)| (*name, bytes.as_slice()));
        [("tokenizer.json", self.json.as_slice()), ("tokenizer_config.json", &self.config)]
            .into_iter()
            .chain(extras)
    }

    /// Refuses a tokenizer whose files must not be copied into a model: one of them is a link that leads out
    /// of its folder, to a file that is perhaps not meant to be passed on. Links within a model's folder in a
    /// cache of Hugging Face are followed.
    ///
    /// # Errors
    /// Names the link.
    pub fn check_copyable(&self) -> anyhow::Result<()> {
        let Some(link) = &self.foreign else { return Ok(()) };
        Err(error::data(
            format!("{} is a link that leads out of its folder", link.display()),
            "a copy of the file would go into the model: put the file itself there instead of the link",
        ))
    }

    /// Writes `tokenizer.json` and `tokenizer_config.json`, each wholly or not at all.
    pub fn save(&self, folder: &Path) -> anyhow::Result<()> {
        folder::save(self, folder)
    }

    /// Writes `vocab.json` and `merges.txt`, GPT-2's two files: the first LaaM's `--format hf`.
    pub fn save_vocabulary(&self, folder: &Path) -> anyhow::Result<()> {
        folder::save_vocabulary(self, folder)
    }

    /// A tokenizer of the bytes of `tokenizer.json` and `tokenizer_config.json`.
    ///
    /// # Errors
    /// If they are not a tokenizer that laam can use.
    pub fn from_bytes(json: Vec<u8>, config: Vec<u8>) -> anyhow::Result<Self> {
        folder::parse(json, config, None)
    }

    /// Reads a tokenizer from its folder, or from a `tokenizer.json`.
    pub fn load(path: &Path) -> anyhow::Result<Self> {
        folder::load(path)
    }
}
