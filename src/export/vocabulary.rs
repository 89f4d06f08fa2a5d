//! A tokenizer as GGUF's `tokenizer.ggml` keys describe it.

use anyhow::Context;
use serde_json::Value;

use crate::error::{self, ErrorKind, Hint};
use crate::tokenizer::{LLAMA_3_PATTERN, QWEN_2_PATTERN, Style, Tokenizer};

/// Values of `tokenizer.ggml.token_type`.
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;

/// A byte-level BPE vocabulary.
pub struct GgufVocabulary {
    /// llama.cpp's name of the pattern that cuts text into words.
    pub pre: &'static str,
    /// The token of each row of the embedding.
    pub tokens: Vec<String>,
    pub types: Vec<i32>,
    /// `LEFT RIGHT`, by rank.
    pub merges: Vec<String>,
    pub add_bos: bool,
    pub warnings: Vec<String>,
}

impl GgufVocabulary {
    /// The vocabulary of a model with `rows` rows in its embedding.
    ///
    /// # Errors
    /// If llama.cpp has no name for what the tokenizer does.
    pub fn new(tokenizer: &Tokenizer, rows: usize) -> anyhow::Result<Self> {
        let (_, json) = tokenizer.files().next().context("a tokenizer has a tokenizer.json")?;
        let json: Value = serde_json::from_slice(json)
            .context("cannot read tokenizer.json")
            .hint(ErrorKind::Data, || "restore the file")?;
        let model = &json["model"];
        let affixes = ["continuing_subword_prefix", "end_of_word_suffix"];
        let is_plain = model["type"] == "BPE"
            && model["byte_fallback"] != true
            && affixes.iter().all(|affix| model[*affix].is_null() || model[*affix] == "");
        let Some(pre) = pre(&json["pre_tokenizer"]).filter(|_| is_plain) else {
            return Err(error::data(
                "the tokenizer cuts text in a way that laam has no GGUF name for",
                "convert the folder with llama.cpp's convert_hf_to_gguf.py",
            ));
        };

        let mut entries = vec![None; rows];
        let mut beyond = 0;
        let mut put = |id: Option<u64>, token: &str, kind: i32| match id
            .and_then(|id| entries.get_mut(id as usize))
        {
            Some(entry) => *entry = Some((token.to_string(), kind)),
            None => beyond += 1,
        };
        for (token, id) in model["vocab"].as_object().into_iter().flatten() {
            put(id.as_u64(), token, NORMAL);
        }
        for token in json["added_tokens"].as_array().into_iter().flatten() {
            let kind = if token["special"] == true { CONTROL } else { USER_DEFINED };
            put(token["id"].as_u64(), token["content"].as_str().unwrap_or_default(), kind);
        }
        let filled = entries
            .into_iter()
            .enumerate()
            .map(|(id, entry)| entry.unwrap_or_else(|| (format!("[PAD{id}]"), UNUSED)));
        let (tokens, types) = filled.unzip();

        let merges = model["merges"].as_array().into_iter().flatten();
        let merges = merges.filter_map(|merge| match merge {
            Value::String(both) => Some(both.clone()),
            Value::Array(pair) => {
                Some(format!("{} {}", pair.first()?.as_str()?, pair.get(1)?.as_str()?))
            }
            _ => None,
        });
        let bos = tokenizer.special().bos;
        let mut warnings = Vec::new();
        if beyond > 0 {
            warnings.push(format!("{beyond} tokens have no row in the embedding and are left out"));
        }
        if tokenizer.style() == Some(Style::Original) {
            warnings.push(
                "in style original llama.cpp neither puts a blank before text nor takes it away: the \
                 ids mean the same, the text has other blanks"
                    .to_string(),
            );
        }
        Ok(Self {
            pre,
            tokens,
            types,
            merges: merges.collect(),
            add_bos: bos.is_some() && tokenizer.encode_prompt("a")?.first() == bos.as_ref(),
            warnings,
        })
    }
}

/// llama.cpp's name of a pre-tokenizer.
fn pre(json: &Value) -> Option<&'static str> {
    if json["type"] == "ByteLevel" && json["use_regex"] != false {
        return Some("gpt-2");
    }
    let [split, byte_level] = json["pretokenizers"].as_array()?.as_slice() else { return None };
    if byte_level["type"] != "ByteLevel" || byte_level["use_regex"] != false {
        return None;
    }
    match split["pattern"]["Regex"].as_str()? {
        LLAMA_3_PATTERN => Some("llama-bpe"),
        QWEN_2_PATTERN => Some("qwen2"),
        _ => None,
    }
}
