//! Limits on what a tokenizer.json asks of the `tokenizers` crate, and guarded calls into the crate.
//!
//! A tokenizer.json may come from anyone. The crate panics on some parts (a template with a special
//! token that is not listed) and lets text grow without bound in others (replacements of replacements).
//! The parts are checked before the crate sees them; a panic that no check foresees is caught.

use std::panic::{self, AssertUnwindSafe};

use anyhow::{Context, anyhow, bail};
use serde_json::Value;

/// Most values in a tokenizer.json: lists, objects and what is in them, at some 80 bytes each. The
/// largest vocabularies in use have two million.
const MAX_VALUES: usize = 4 << 20;
/// Most parts of a normalizer, pre-tokenizer, post-processor or decoder.
const MAX_PARTS: usize = 32;
/// Longest text that a part inserts, in bytes.
const MAX_INSERTED: usize = 1024;
/// Largest factor by which normalizers or decoders may lengthen a text: Llama 2's is 12.
const MAX_GROWTH: f64 = 256.0;
/// Longest text inside the crate, in bytes after normalization: it needs some 200 bytes for each.
const MAX_TEXT: f64 = (16 << 20) as f64;
/// Most added tokens, and bytes of all of them: the crate builds an automaton of their bytes.
const MAX_ADDED_TOKENS: usize = 1 << 18;
const MAX_ADDED_BYTES: usize = 8 << 20;
/// Most pieces of a template, and most ids of one of its special tokens.
const MAX_PIECES: usize = 64;

/// Longest token of a Unigram model, in bytes: the time for a text grows with it.
pub const MAX_TOKEN_BYTES: usize = 2048;
/// Longest word of a WordPiece model that is not unknown, in characters.
pub const MAX_WORD_CHARS: u64 = 4096;

const NORMALIZERS: [&str; 12] = [
    "NFC",
    "NFD",
    "NFKC",
    "NFKD",
    "Prepend",
    "Replace",
    "Strip",
    "Lowercase",
    "StripAccents",
    "BertNormalizer",
    "Nmt",
    "Precompiled",
];
const PRE_TOKENIZERS: [&str; 10] = [
    "ByteLevel",
    "Split",
    "Digits",
    "Metaspace",
    "Whitespace",
    "WhitespaceSplit",
    "BertPreTokenizer",
    "Punctuation",
    "CharDelimiterSplit",
    "UnicodeScripts",
];
const POST_PROCESSORS: [&str; 4] =
    ["ByteLevel", "TemplateProcessing", "BertProcessing", "RobertaProcessing"];
const DECODERS: [&str; 8] = [
    "ByteLevel",
    "Replace",
    "ByteFallback",
    "Fuse",
    "Strip",
    "Metaspace",
    "WordPiece",
    "BPEDecoder",
];

/// Calls into the crate. A panic there becomes an error; the program's panic hook keeps its message
/// off stderr.
pub fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> anyhow::Result<T> {
    match panic::catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|why| anyhow!("{why}")),
        Err(_) => bail!("the tokenizers crate cannot work with it"),
    }
}

/// Refuses JSON of more values than memory is meant for, before it is parsed.
pub fn check_values(json: &[u8]) -> anyhow::Result<()> {
    let (mut values, mut in_string, mut escaped) = (1, false, false);
    for &byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b',' | b'[' | b'{' if !in_string => values += 1,
            _ => {}
        }
    }
    if values > MAX_VALUES {
        bail!("{values} values: at most {MAX_VALUES} are read");
    }
    Ok(())
}

/// Largest factors by which the parts lengthen a text.
#[derive(Clone, Copy, Debug)]
pub struct Growth {
    encoding: f64,
    decoding: f64,
}

impl Growth {
    /// Refuses a text of so many bytes if it may become too long inside the crate.
    pub fn check_encoding(self, bytes: usize) -> anyhow::Result<()> {
        check_length(bytes, self.encoding)
    }

    /// Bytes of the pieces of a long text: at most `most`, and half of what may become too long.
    pub fn piece_bytes(self, most: usize) -> usize {
        most.min((MAX_TEXT / self.encoding / 2.0) as usize)
    }

    /// Refuses tokens of so many bytes in all if their text may become too long inside the crate.
    pub fn check_decoding(self, bytes: usize) -> anyhow::Result<()> {
        check_length(bytes, self.decoding)
    }
}

fn check_length(bytes: usize, growth: f64) -> anyhow::Result<()> {
    if bytes as f64 * growth > MAX_TEXT {
        bail!("{bytes} bytes of text: at most {} for this tokenizer", (MAX_TEXT / growth) as usize);
    }
    Ok(())
}

/// Refuses more added tokens than the crate's automaton has memory for.
pub fn check_added(added: &[(&str, u32)]) -> anyhow::Result<()> {
    let bytes: usize = added.iter().map(|(content, _)| content.len()).sum();
    if added.len() > MAX_ADDED_TOKENS || bytes > MAX_ADDED_BYTES {
        bail!(
            "{} added tokens of {bytes} bytes: at most {MAX_ADDED_TOKENS} of {MAX_ADDED_BYTES} bytes",
            added.len()
        );
    }
    Ok(())
}

/// Refuses parts that are not supported: of other kinds, that panic, or that lengthen text without
/// bound. `vocab_size` is one more than the largest id.
pub fn check_parts(json: &Value, vocab_size: usize) -> anyhow::Result<Growth> {
    let [mut encoding, mut decoding] = [1.0; 2];
    for part in parts(&json["normalizer"], "normalizers", &NORMALIZERS)? {
        encoding *= growth(part).context("in the normalizer")?;
    }
    for part in parts(&json["pre_tokenizer"], "pretokenizers", &PRE_TOKENIZERS)? {
        encoding *= growth(part).context("in the pre_tokenizer")?;
    }
    for part in parts(&json["decoder"], "decoders", &DECODERS)? {
        decoding *= growth(part).context("in the decoder")?;
        // It panics on tokens that are shorter than what it takes from their ends.
        if part["type"] == "Strip"
            && (part["stop"] != 0 || part["start"].as_u64().is_none_or(|start| start > 1024))
        {
            bail!("a Strip of start {} and stop {}, in the decoder", part["start"], part["stop"]);
        }
    }
    let processors = parts(&json["post_processor"], "processors", &POST_PROCESSORS)?;
    let templates = || processors.iter().filter(|part| part["type"] == "TemplateProcessing");
    if templates().count() > 1 {
        bail!("{} templates in the post_processor: at most 1", templates().count());
    }
    for part in processors {
        let ids = ["sep", "cls"].map(|key| &part[key][1]);
        let is_known = |id: &&Value| id.as_u64().is_some_and(|id| id < vocab_size as u64);
        if ["BertProcessing", "RobertaProcessing"].iter().any(|kind| part["type"] == *kind)
            && !ids.iter().all(is_known)
        {
            bail!("the post_processor {} puts tokens that the vocab lacks", part["type"]);
        }
    }
    for template in templates() {
        check_template(template, vocab_size).context("in the post_processor")?;
    }
    if encoding > MAX_GROWTH || decoding > MAX_GROWTH {
        bail!("its parts may lengthen a text by more than {MAX_GROWTH} times");
    }
    Ok(Growth { encoding, decoding })
}

/// The parts of a sequence (one level deep), or the one part, all of known kinds.
fn parts<'a>(part: &'a Value, list: &str, known: &[&str]) -> anyhow::Result<&'a [Value]> {
    let parts = match part {
        Value::Null => return Ok(&[]),
        sequence if sequence["type"] == "Sequence" => {
            sequence[list].as_array().map(Vec::as_slice).unwrap_or_default()
        }
        one => std::slice::from_ref(one),
    };
    if parts.len() > MAX_PARTS {
        bail!("{} {list}: at most {MAX_PARTS} are supported", parts.len());
    }
    for kind in parts.iter().map(|part| &part["type"]) {
        if !kind.as_str().is_some_and(|kind| known.contains(&kind)) {
            bail!("unsupported {kind}, in {list}");
        }
    }
    Ok(parts)
}

/// The largest factor by which a part lengthens a text of one byte or more.
fn growth(part: &Value) -> anyhow::Result<f64> {
    let inserted = |key: &str| {
        let text = part[key].as_str().with_context(|| format!("{} without {key}", part["type"]))?;
        if text.len() > MAX_INSERTED {
            bail!("a {} of {} bytes: at most {MAX_INSERTED}", part["type"], text.len());
        }
        Ok(text.len() as f64)
    };
    Ok(match part["type"].as_str().unwrap_or_default() {
        "Replace" => {
            let content = inserted("content")?;
            match part["pattern"]["String"].as_str() {
                // SentencePiece's: two blanks or more become one.
                None if part["pattern"]["Regex"] == " {2,}" => content.max(1.0),
                Some("") => bail!("a Replace with an empty pattern"),
                Some(pattern) => (content / pattern.len() as f64).max(1.0),
                // A regular expression may match nothing, between any two bytes.
                None => 1.0 + content,
            }
        }
        // Before every piece between two added tokens.
        "Prepend" => 1.0 + inserted("prepend")?,
        // The longest decompositions: of U+0390 and of U+FDFA.
        "NFC" | "NFD" => 3.0,
        "NFKC" | "NFKD" => 11.0,
        // A blank before every piece, in up to three bytes each; decomposed, in lower case, with blanks around
        // Chinese characters.
        "Metaspace" | "BertNormalizer" => 6.0,
        // Two bytes for most.
        "ByteLevel" => 4.0,
        "Precompiled" => 1.0 + longest_replacement(part)?,
        // The longest character in lower case; a blank before every token.
        "Lowercase" | "WordPiece" => 2.0,
        _ => 1.0,
    })
}

/// The longest text that a table of SentencePiece puts in place of another, in bytes. The table is the size of
/// a trie (u32), the trie, and the texts, each ended by a zero.
fn longest_replacement(part: &Value) -> anyhow::Result<f64> {
    let table = part["precompiled_charsmap"].as_str().unwrap_or_default();
    let bytes = from_base64(table).context("a Precompiled whose table is not base64")?;
    let size = bytes.first_chunk().map_or(0, |size| u32::from_le_bytes(*size) as usize);
    let texts = bytes.get(4 + size..).context("a Precompiled whose table is cut short")?;
    let longest = texts.split(|&byte| byte == 0).map(<[u8]>::len).max().unwrap_or(0);
    if longest > MAX_INSERTED {
        bail!("a Precompiled that puts in {longest} bytes: at most {MAX_INSERTED}");
    }
    // In place of a character that is not ASCII: two bytes or more.
    Ok(longest as f64 / 2.0)
}

fn from_base64(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut count) = (0u32, 0);
    for byte in text.trim_end_matches('=').bytes() {
        let six = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        (bits, count) = (bits << 6 | u32::from(six), count + 6);
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
        }
    }
    Some(bytes)
}

/// A template that names listed special tokens and, for one text, that text alone.
fn check_template(part: &Value, vocab_size: usize) -> anyhow::Result<()> {
    let tokens = part["special_tokens"].as_object().context("no special_tokens")?;
    for (name, token) in tokens {
        let [ids, texts] = ["ids", "tokens"].map(|key| token[key].as_array());
        let (Some(ids), Some(texts)) = (ids, texts) else { bail!("{name:?} has no ids or tokens") };
        let known = |id: &Value| id.as_u64().is_some_and(|id| id < vocab_size as u64);
        if ids.len() != texts.len() || ids.len() > MAX_PIECES || !ids.iter().all(known) {
            bail!("the special token {name:?} has invalid ids or tokens");
        }
    }
    if tokens.len() > MAX_PIECES {
        bail!("{} special tokens: at most {MAX_PIECES}", tokens.len());
    }
    for template in ["single", "pair"] {
        let pieces = part[template].as_array().with_context(|| format!("no {template}"))?;
        if pieces.len() > MAX_PIECES {
            bail!("{} pieces in {template}: at most {MAX_PIECES}", pieces.len());
        }
        let sequences = pieces.iter().filter(|piece| piece.get("Sequence").is_some()).count();
        if template == "single" && sequences > 1 {
            bail!("single has {sequences} sequences: at most 1");
        }
        for piece in pieces {
            if let Some(token) = piece.get("SpecialToken") {
                let name = token["id"].as_str().unwrap_or_default();
                if !tokens.contains_key(name) {
                    bail!("the special token {name:?} is not listed");
                }
            } else if template == "single" && piece["Sequence"]["id"] != "A" {
                bail!("single has a piece {piece}: it has one sequence, A");
            }
        }
    }
    Ok(())
}
