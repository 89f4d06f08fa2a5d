//! Tokenizers that are not one of ours: what stands around a text, and where a long one can be cut.

use serde_json::{Value, json};

use super::limits::guarded;
use super::words::{LLAMA_3_PATTERN, QWEN_2_PATTERN};

/// Documents of a tokenizer.
#[derive(Clone, Debug, Default)]
pub struct Frame {
    /// Tokens before every text, by the template of its post-processor.
    pub before: Vec<u32>,
    /// Tokens after every text.
    pub after: Vec<u32>,
    /// Places where a long text can be cut.
    pub cut: CutPlace,
    /// Tokens of a word, after which any token decodes as it does within a text.
    pub word: Vec<u32>,
}

/// Places where a text can be cut so that its tokens are those of its pieces, one after another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CutPlace {
    #[default]
    Nowhere,
    /// After line ends, as [`pieces`] does.
    AfterLines,
    /// Before line ends, as [`pieces_before_lines`] does: each piece but the first then begins with this
    /// token, the blank that is put before every text, which is not in the text.
    BeforeLines(u32),
    /// In place of blanks, as [`pieces_between_blanks`] does: the one that is put before every text stands for it.
    AtBlanks,
}

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
        let cut = if can_be_cut_after_lines(json) || splits_at_blanks(json) {
            CutPlace::AfterLines
        } else if marks_blanks(json) {
            CutPlace::AtBlanks
        } else {
            let blank = inner.token_to_id("▁").filter(|_| can_be_cut_before_lines(json));
            blank.map_or(CutPlace::Nowhere, CutPlace::BeforeLines)
        };
        Self { before, after, cut, word: bare }
    }
}

/// True for Llama 2's byte-pair tokenizer and its like: no token spans a line end, and a blank is put before
/// every text.
fn can_be_cut_before_lines(json: &Value) -> bool {
    let normalizer = json!({"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    ]});
    let metaspace = &json["pre_tokenizer"];
    let is_metaspace = metaspace["type"] == "Metaspace"
        && metaspace["replacement"] == "▁"
        && metaspace["prepend_scheme"] == "first"
        && metaspace["split"] == false;
    let puts_blank = (json["normalizer"] == normalizer && metaspace.is_null())
        || (json["normalizer"].is_null() && is_metaspace);
    let model = &json["model"];
    let spans_lines = |token: &String| token.contains('\n') && token.len() > 1;
    let mut tokens = model["vocab"].as_object().into_iter().flat_map(|vocab| vocab.keys());
    let mut added = json["added_tokens"].as_array().into_iter().flatten();
    let is_plain = |token: &Value| {
        let content = token["content"].as_str().unwrap_or_default();
        let flags = ["lstrip", "rstrip"].iter().all(|flag| token[*flag] != true);
        flags && !content.contains('\n') && !content.ends_with(ends_piece)
    };
    puts_blank
        && model["type"] == "BPE"
        && model["byte_fallback"] == true
        && !tokens.any(spans_lines)
        && added.all(is_plain)
}

/// Characters that a piece before a line end may end with.
fn ends_piece(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '.'
}

/// True for the patterns of GPT-2, Llama 3 and Qwen 2, without a normalizer that looks across a line end,
/// and without added tokens that do.
fn can_be_cut_after_lines(json: &Value) -> bool {
    let normalizer = &json["normalizer"];
    let byte_level = |part: &Value, use_regex: bool| {
        part["type"] == "ByteLevel"
            && part["add_prefix_space"] == false
            && part["use_regex"].as_bool().unwrap_or(true) == use_regex
    };
    let is_known_split = |part: &Value| {
        [LLAMA_3_PATTERN, QWEN_2_PATTERN].iter().any(|pattern| {
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

/// The parts of a sequence, or the one part.
fn parts<'a>(part: &'a Value, list: &str) -> &'a [Value] {
    part[list].as_array().map_or(std::slice::from_ref(part), Vec::as_slice)
}

fn kind(part: &Value) -> &str {
    part["type"].as_str().unwrap_or_default()
}

/// True if the normalizer does not look across a blank or a line end between a visible ASCII character and a
/// letter, and no added token has one of the two.
fn is_local(json: &Value) -> bool {
    const LOCAL: [&str; 10] = [
        "NFC",
        "NFD",
        "NFKC",
        "NFKD",
        "Lowercase",
        "StripAccents",
        "BertNormalizer",
        "Nmt",
        "Precompiled",
        "Strip",
    ];
    let is_local = |part: &Value| {
        let replaced = part["pattern"]["String"].as_str();
        part.is_null()
            || LOCAL.contains(&kind(part))
            || part["pattern"] == json!({"Regex": " {2,}"})
            || (kind(part) == "Replace" && replaced.is_some_and(|it| !it.contains([' ', '\n'])))
    };
    let mut added = json["added_tokens"].as_array().into_iter().flatten();
    parts(&json["normalizer"], "normalizers").iter().all(is_local)
        && added.all(|token| !token["content"].as_str().unwrap_or_default().contains([' ', '\n']))
}

/// True for tokenizers of the words between blanks, as BERT's and T5's.
fn splits_at_blanks(json: &Value) -> bool {
    let parts = parts(&json["pre_tokenizer"], "pretokenizers");
    let [first, rest @ ..] = parts else { return false };
    ["BertPreTokenizer", "Whitespace", "WhitespaceSplit"].contains(&kind(first))
        && rest.iter().all(|part| match kind(part) {
            "Metaspace" => part["prepend_scheme"] == "always",
            kind => ["Punctuation", "Digits", "WhitespaceSplit"].contains(&kind),
        })
        && is_local(json)
}

/// True for tokenizers of words that begin with a mark in place of a blank, as SentencePiece's, the first one
/// too.
fn marks_blanks(json: &Value) -> bool {
    let [metaspace] = parts(&json["pre_tokenizer"], "pretokenizers") else { return false };
    kind(metaspace) == "Metaspace"
        && metaspace["split"].as_bool().unwrap_or(true)
        && ["always", "first"].iter().any(|scheme| metaspace["prepend_scheme"] == *scheme)
        && is_local(json)
}

/// A text in pieces of at least so many bytes, without a blank between each and the next, which stands between
/// a visible ASCII character and a letter.
pub fn pieces_between_blanks(text: &str, least: usize) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let cut = rest.as_bytes().windows(3).skip(least).position(|bytes| {
            bytes[0].is_ascii_graphic() && bytes[1] == b' ' && bytes[2].is_ascii_alphabetic()
        });
        let (piece, later) = match cut {
            Some(at) => (&rest[..=least + at], &rest[least + at + 2..]),
            None => (rest, ""),
        };
        rest = later;
        (!piece.is_empty()).then_some(piece)
    })
}

/// Shortest piece of a text that is cut.
pub const PIECE_BYTES: usize = 128 << 10;

/// A text in pieces of at least so many bytes: cut after line ends between a visible ASCII character and a
/// letter. There the known patterns end a word, whatever follows.
pub fn pieces(text: &str, least: usize) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let cut = rest.as_bytes().windows(3).skip(least).position(|bytes| {
            bytes[0].is_ascii_graphic() && bytes[1] == b'\n' && bytes[2].is_ascii_alphabetic()
        });
        let end = cut.map_or(rest.len(), |at| least + at + 2);
        let (piece, later) = rest.split_at(end);
        rest = later;
        (!piece.is_empty()).then_some(piece)
    })
}

/// A text in pieces of at least [`PIECE_BYTES`]: cut before line ends that follow a letter, a digit or a
/// full stop.
pub fn pieces_before_lines(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let cut = rest
            .as_bytes()
            .windows(2)
            .skip(PIECE_BYTES)
            .position(|bytes| ends_piece(char::from(bytes[0])) && bytes[1] == b'\n');
        let end = cut.map_or(rest.len(), |at| PIECE_BYTES + at + 1);
        let (piece, later) = rest.split_at(end);
        rest = later;
        (!piece.is_empty()).then_some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokenizers::pre_tokenizers::PreTokenizerWrapper;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;
    use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
    use tokenizers::{
        OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, SplitDelimiterBehavior,
    };

    fn words(text: &str, pre_tokenizer: &PreTokenizerWrapper) -> Vec<String> {
        let mut words = PreTokenizedString::from(text);
        pre_tokenizer.pre_tokenize(&mut words).unwrap();
        let words = words.get_splits(OffsetReferential::Original, OffsetType::Byte);
        words.into_iter().map(|(word, ..)| word.to_string()).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]
        #[test]
        fn words_of_pieces_are_the_words_of_the_text(
            text in r"([ \t]{0,2}|[\r\n]{1,2}|[a-z]{1,3}|'[sS]|[0-9]{1,4}|[;)}]{1,2}|\PC){0,40}"
        ) {
            let split = |pattern: &str| {
                let pattern = SplitPattern::Regex(pattern.to_string());
                Split::new(pattern, SplitDelimiterBehavior::Isolated, false).unwrap().into()
            };
            let gpt2 = ByteLevel::new(false, true, true).into();
            for pre_tokenizer in [split(LLAMA_3_PATTERN), split(QWEN_2_PATTERN), gpt2] {
                let of_pieces = pieces(&text, 3).flat_map(|piece| words(piece, &pre_tokenizer));
                prop_assert_eq!(of_pieces.collect::<Vec<_>>(), words(&text, &pre_tokenizer));
            }
        }
    }

    #[test]
    fn a_text_is_cut_between_lines_of_code() {
        let text = "int a;\nint b;\n\nint c;\n}\nx";
        let pieces: Vec<_> = pieces(text, 1).collect();
        assert_eq!(pieces, ["int a;\n", "int b;\n\nint c;\n}\n", "x"]);
    }
}
