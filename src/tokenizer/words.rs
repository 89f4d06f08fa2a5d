//! Text into words, and the words' tokens remembered.
//!
//! Most of the time of encoding goes into finding words and into the merges of words that were seen
//! before. The `tokenizers` crate finds them with a backtracking matcher, for the sake of one
//! look-ahead, and keeps some 200 bytes for each byte of text; here the same patterns run as finite
//! automata, and the look-ahead is two lines of code. The tests beside this file and the tests on real
//! text hold both to equal words.

use std::collections::HashMap;

use regex::Regex;

use super::Style;

/// The pattern of style `exact` as `tokenizer.json` holds it: Llama 3's. Words are letters with one leading other
/// character, numbers of up to three digits, punctuation with the line breaks behind it, line breaks
/// with the blanks before them, and blanks, the last of which goes to the word that follows.
pub const LLAMA_3_PATTERN: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// Qwen 2's pattern: Llama 3's, but for numbers of one digit.
pub const QWEN_2_PATTERN: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// [`LLAMA_3_PATTERN`] without its look-ahead.
const EXACT: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
);

/// GPT-2's pattern, which is the crate's `ByteLevel`, without its look-ahead.
const ORIGINAL: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+";

/// The words of a text, in order; together they are the text.
#[derive(Debug)]
pub struct Words {
    pattern: Regex,
    /// True if the look-ahead concerns line breaks as it does blanks.
    breaks_lines: bool,
}

impl Words {
    pub fn new(style: Style) -> Self {
        let pattern = match style {
            Style::Exact => EXACT,
            Style::Original => ORIGINAL,
        };
        let pattern = Regex::new(pattern).expect("a constant pattern");
        Self { pattern, breaks_lines: style == Style::Original }
    }

    pub fn of<'a, 't: 'a>(&'a self, text: &'t str) -> impl Iterator<Item = &'t str> + use<'a, 't> {
        let mut at = 0;
        std::iter::from_fn(move || {
            let found = self.pattern.find_at(text, at)?;
            debug_assert_eq!(found.start(), at, "the pattern covers every character");
            let mut word = found.as_str();
            // `\s+(?!\S)`: blanks before a word leave their last one to it. In style `exact` a run
            // that ends with a line break was taken by an earlier alternative.
            if found.end() < text.len()
                && let Some(last) = word.chars().next_back()
                && last.is_whitespace()
                && (self.breaks_lines || !matches!(last, '\r' | '\n'))
                && word.len() > last.len_utf8()
            {
                word = &word[..word.len() - last.len_utf8()];
            }
            at += word.len();
            Some(word)
        })
    }
}

/// Words' tokens, remembered: a bounded map from a word to its ids.
#[derive(Debug, Default)]
pub struct Cache {
    ids: Vec<u32>,
    /// Range of a word's ids in `ids`.
    words: HashMap<Box<str>, (u32, u32)>,
}

impl Cache {
    /// Some 10 MB per thread. Kernel source has a few times as many words, but the most frequent
    /// come early.
    const MAX_WORDS: usize = 1 << 17;
    /// A longer word is hardly met twice.
    const MAX_WORD_BYTES: usize = 64;

    pub fn get(&self, word: &str) -> Option<&[u32]> {
        self.words.get(word).map(|&(from, to)| &self.ids[from as usize..to as usize])
    }

    pub fn insert(&mut self, word: &str, ids: &[u32]) {
        if self.words.len() < Self::MAX_WORDS && word.len() <= Self::MAX_WORD_BYTES {
            let from = self.ids.len() as u32;
            self.ids.extend(ids);
            self.words.insert(word.into(), (from, self.ids.len() as u32));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::LazyLock;

    use crate::tokenizer::byte_level;

    use proptest::prelude::*;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;
    use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
    use tokenizers::{
        OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, SplitDelimiterBehavior,
    };

    static WORDS: LazyLock<[Words; 2]> =
        LazyLock::new(|| [Style::Exact, Style::Original].map(Words::new));
    static SPLIT: LazyLock<Split> = LazyLock::new(|| {
        let pattern = SplitPattern::Regex(LLAMA_3_PATTERN.to_string());
        Split::new(pattern, SplitDelimiterBehavior::Isolated, false).unwrap()
    });

    fn words_by_the_crate(text: &str, pre_tokenizer: &impl PreTokenizer) -> Vec<String> {
        let mut words = PreTokenizedString::from(text);
        pre_tokenizer.pre_tokenize(&mut words).unwrap();
        words
            .get_splits(OffsetReferential::Original, OffsetType::Byte)
            .into_iter()
            .map(|(word, ..)| word.to_string())
            .collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn pre_tokenizer_matches_tokenizers_crate(
            text in r"([ \t]{0,3}[\r\n]{0,2}|[a-zA-Z]{0,3}|'[sStTlLrRvVeEmMdD]{1,2}|[0-9]{1,5}|[;+<>|_]{1,3}|\PC|\s|[\u{a0}\u{2003}\u{85}\u{0}é中ſ]){0,24}"
        ) {
            let [exact, original] = &*WORDS;
            prop_assert_eq!(exact.of(&text).collect::<Vec<_>>(), words_by_the_crate(&text, &*SPLIT));
            let spelled = |word: &str| byte_level::text(word.as_bytes());
            let byte_level = ByteLevel::default().add_prefix_space(false);
            prop_assert_eq!(
                original.of(&text).map(spelled).collect::<Vec<_>>(),
                words_by_the_crate(&text, &byte_level)
            );
        }
    }
}
