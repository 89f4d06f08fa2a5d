//! The added tokens of style `original`, found in text as the first LaaM found them.

use std::collections::HashMap;

use regex::Regex;
use serde_json::Value;

use super::{BLANKS, MARKERS};

/// Part of a text: an added token, or what is between two of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece<'a> {
    Added(u32),
    Text(&'a str),
}

/// Added tokens by their text.
#[derive(Debug)]
pub struct AddedTokens {
    ids: HashMap<String, u32>,
    pattern: Regex,
}

impl AddedTokens {
    /// The added tokens of a `tokenizer.json`; none if some of them are not the first LaaM's: their text
    /// may overlap, or they may take the blanks beside them.
    pub fn new(added: &Value) -> Option<Self> {
        // Longer tokens first: among those that begin at one place, the longest is found.
        let mut known: Vec<_> = MARKERS.iter().chain(&BLANKS).map(|t| regex::escape(t)).collect();
        known.sort_by_key(|token| std::cmp::Reverse(token.len()));
        known.push(r"<\|extra_id_[0-9]+\|>".to_string());
        let pattern = Regex::new(&known.join("|")).ok()?;
        let mut ids = HashMap::new();
        for token in added.as_array()? {
            let content = token["content"].as_str()?;
            let whole = pattern.find(content).is_some_and(|found| found.as_str() == content);
            let plain = ["single_word", "lstrip", "rstrip", "normalized"]
                .iter()
                .all(|flag| token[*flag] == false);
            if !whole || !plain {
                return None;
            }
            ids.insert(content.to_string(), u32::try_from(token["id"].as_u64()?).ok()?);
        }
        Some(Self { ids, pattern })
    }

    /// The pieces of a text, in order; none is empty.
    pub fn pieces<'a>(&'a self, text: &'a str) -> impl Iterator<Item = Piece<'a>> {
        let mut found = self
            .pattern
            .find_iter(text)
            .filter_map(|found| Some((found.range(), *self.ids.get(found.as_str())?)));
        let (mut at, mut next) = (0, found.next());
        std::iter::from_fn(move || {
            let end = next.as_ref().map_or(text.len(), |(range, _)| range.start);
            if at < end {
                let piece = Piece::Text(&text[at..end]);
                at = end;
                return Some(piece);
            }
            let (range, id) = next.take()?;
            (at, next) = (range.end, found.next());
            Some(Piece::Added(id))
        })
    }
}
