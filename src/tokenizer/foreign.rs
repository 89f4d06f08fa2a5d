//! Tokenizers that are not one of ours: what stands around a text, and where a long one can be cut.

use serde_json::{Value, json};

use super::limits::guarded;
use super::words::PATTERN;

/// Documents of a tokenizer.
#[derive(Clone, Debug, Default)]
pub struct Frame {
    /// Tokens before every text, by the template of its post-processor.
    pub before: Vec<u32>,
    /// Tokens after every text.
    pub after: Vec<u32>,
    /// True if a text's tokens are those of its [`pieces`], one after another.
    pub can_be_cut: bool,
}

/// Qwen 2's pattern.
const QWEN_2: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

impl Frame {
    /// The frame of a `tokenizer.json`, which `inner` was made of.
    pub fn new(json: &Value, inner: &tokenizers::Tokenizer) -> Self {
        let encode = |special| {
            let ids = guarded(|| Ok(inner.encode_fast("a", special)?.get_ids().to_vec()));
            ids.unwrap_or_default()
        };
        let (bare, framed) = (encode(false), encode(true));
        let begin = framed.windows(bare.len().max(1)).position(|ids| ids == bare);
        let (before, after) = match begin {
            Some(begin) => (framed[..begin].to_vec(), framed[begin + bare.len()..].to_vec()),
            None => (Vec::new(), Vec::new()),
        };
        Self { before, after, can_be_cut: can_be_cut(json) }
    }
}

/// True for the patterns of GPT-2, Llama 3 and Qwen 2, without a normalizer that looks across a line end,
/// and without added tokens that do.
fn can_be_cut(json: &Value) -> bool {
    let normalizer = &json["normalizer"];
    let byte_level = |part: &Value, use_regex: bool| {
        part["type"] == "ByteLevel"
            && part["add_prefix_space"] == false
            && part["use_regex"].as_bool().unwrap_or(true) == use_regex
    };
    let is_known_split = |part: &Value| {
        [PATTERN, QWEN_2].iter().any(|pattern| {
            part["type"] == "Split"
                && part["pattern"] == json!({"Regex": pattern})
                && part["behavior"] == "Isolated"
                && part["invert"] == false
        })
    };
    let pre_tokenizer = &json["pre_tokenizer"];
    let is_known = match pre_tokenizer["pretokenizers"].as_array().map(Vec::as_slice) {
        Some([split, bytes]) => is_known_split(split) && byte_level(bytes, false),
        Some(_) => false,
        None => byte_level(pre_tokenizer, true),
    };
    let mut added = json["added_tokens"].as_array().into_iter().flatten();
    let is_plain = |token: &Value| {
        let flags = ["lstrip", "rstrip"].iter().all(|flag| token[*flag] != true);
        flags && !token["content"].as_str().unwrap_or_default().contains('\n')
    };
    (normalizer.is_null() || normalizer["type"] == "NFC") && is_known && added.all(is_plain)
}

/// Shortest piece of a text that is cut.
pub const PIECE_BYTES: usize = 128 << 10;

/// A text in pieces: cut after line ends between a visible ASCII character and a letter. There the known
/// patterns end a word, whatever follows.
pub fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let cut = rest.as_bytes().windows(3).skip(PIECE_BYTES).position(|bytes| {
            bytes[0].is_ascii_graphic() && bytes[1] == b'\n' && bytes[2].is_ascii_alphabetic()
        });
        let end = cut.map_or(rest.len(), |at| PIECE_BYTES + at + 2);
        let (piece, later) = rest.split_at(end);
        rest = later;
        (!piece.is_empty()).then_some(piece)
    })
}
