//! A tokenizer's files: `tokenizer.json` and `tokenizer_config.json`, as transformers reads them.
//!
//! A tokenizer.json is hostile until checked: the `tokenizers` crate panics on some that are broken
//! (merges whose result is no token, among others) and renumbers others without a warning.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Mutex;

use anyhow::{Context, bail};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokenizers::models::bpe::BPE;
use tokenizers::{AddedToken, ModelWrapper};

use super::foreign::Frame;
use super::limits::{self, Growth, guarded};
use super::original::AddedTokens;
use super::words::{LLAMA_3_PATTERN, Words};
use super::{BLANKS, MARKERS, Markers, Special, Spelling, Style, Tokenizer, byte_level};
use crate::error::{ErrorKind, Hint};
use crate::files::{self, write_atomically};

/// Larger files are refused unread: the largest in use have 33 MB.
const MAX_TOKENIZER_BYTES: u64 = 64 << 20;
/// Some list all their added tokens: 200 kB.
const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// Optional files of a tokenizer's folder, which older programs read.
const EXTRAS: [&str; 2] = ["special_tokens_map.json", "added_tokens.json"];

/// Files of tokenizers that have no tokenizer.json.
const SLOW_FILES: [&str; 5] =
    ["tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt"];

/// Pre-tokenizer of style `exact`.
fn exact_pre_tokenizer() -> Value {
    json!({
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {"Regex": LLAMA_3_PATTERN},
                "behavior": "Isolated",
                "invert": false
            },
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false}
        ]
    })
}

fn original_pre_tokenizer() -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true})
}

fn byte_level_decoder() -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true})
}

/// All blanks of the text are tokens of their own, so each `Ġ` in a token is one that encoding
/// put before a piece: it goes.
fn original_decoder() -> Value {
    json!({
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "Ġ"}, "content": ""},
            byte_level_decoder()
        ]
    })
}

/// A trained model in its style's clothes. `pads` are further special tokens, after all others.
pub fn assemble(style: Style, model: BPE, pads: Vec<AddedToken>) -> anyhow::Result<Tokenizer> {
    let mut inner = tokenizers::Tokenizer::new(ModelWrapper::from(model));
    let specials = style.special_tokens().chain(pads);
    guarded(|| inner.add_special_tokens(specials))?;
    let mut json = serde_json::to_value(&inner)?;
    // tokenizers 0.19 and older read merges as strings alone.
    for merge in json["model"]["merges"].as_array_mut().into_iter().flatten() {
        if let [Value::String(a), Value::String(b)] =
            merge.as_array().map(Vec::as_slice).unwrap_or_default()
        {
            *merge = Value::String(format!("{a} {b}"));
        }
    }
    (json["pre_tokenizer"], json["decoder"]) = match style {
        Style::Exact => (exact_pre_tokenizer(), byte_level_decoder()),
        Style::Original => (original_pre_tokenizer(), original_decoder()),
    };
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": MARKERS[0],
        "eos_token": MARKERS[1],
        "pad_token": MARKERS[4],
        "add_prefix_space": style == Style::Original,
        "clean_up_tokenization_spaces": false,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left"
    });
    parse(serde_json::to_vec_pretty(&json)?, serde_json::to_vec_pretty(&config)?, None)
}

pub fn save(tokenizer: &Tokenizer, folder: &Path) -> anyhow::Result<()> {
    write_atomically(&folder.join("tokenizer_config.json"), &tokenizer.config)?;
    write_atomically(&folder.join("tokenizer.json"), &tokenizer.json)
}

pub fn save_vocabulary(tokenizer: &Tokenizer, folder: &Path) -> anyhow::Result<()> {
    let json: Value = serde_json::from_slice(&tokenizer.json)?;
    let merges = merges(&json["model"]["merges"])?;
    let mut text = String::from("#version: 0.2\n");
    for (a, b) in merges {
        text.extend([a, " ", b, "\n"]);
    }
    write_atomically(&folder.join("vocab.json"), &serde_json::to_vec(&json["model"]["vocab"])?)?;
    write_atomically(&folder.join("merges.txt"), text.as_bytes())
}

pub fn load(path: &Path) -> anyhow::Result<Tokenizer> {
    let file = if path.is_dir() { path.join("tokenizer.json") } else { path.to_path_buf() };
    let (json, is_own) = files::read_member(&file, MAX_TOKENIZER_BYTES)
        .with_context(|| format!("cannot read the tokenizer {}", file.display()))
        .hint(ErrorKind::Data, || {
            if SLOW_FILES.iter().any(|name| file.with_file_name(name).exists()) {
                "transformers' AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes a \
                 tokenizer.json"
            } else {
                "give a folder that laam train-tokenizer or transformers wrote"
            }
        })?;
    // A tokenizer.json by itself is a tokenizer too.
    let config_file = file.with_file_name("tokenizer_config.json");
    let (config, is_own_config) = match files::read_member(&config_file, MAX_CONFIG_BYTES) {
        Ok(config) => config,
        Err(absent) if absent.kind() == std::io::ErrorKind::NotFound => (b"{}".to_vec(), true),
        Err(error) => {
            return Err(error)
                .with_context(|| format!("cannot read {}", config_file.display()))
                .hint(ErrorKind::Data, || "make the file readable, or remove it");
        }
    };
    let mut tokenizer = parse(json, config, Some(&file))
        .with_context(|| format!("{} is not a tokenizer that laam can use", file.display()))
        .hint(ErrorKind::Data, || "create one with laam train-tokenizer; laam reads the tokenizer.json of transformers' fast tokenizers")?;
    tokenizer.foreign = match (is_own, is_own_config) {
        (true, true) => None,
        (true, false) => Some(config_file),
        (false, _) => Some(file.clone()),
    };
    for name in EXTRAS {
        let path = file.with_file_name(name);
        match files::read_member(&path, MAX_CONFIG_BYTES) {
            // A link may lead to a file that is not part of a tokenizer.
            Ok((_, false)) => {}
            Ok((bytes, true)) => {
                if name == EXTRAS[0] && tokenizer.markers.is_none() {
                    name_special_tokens(&mut tokenizer, &bytes);
                }
                tokenizer.extras.push((name, bytes));
            }
            Err(absent) if absent.kind() == std::io::ErrorKind::NotFound => {}
            // A link to what is not a file is not part of a tokenizer either.
            Err(_) if path.is_symlink() => {}
            Err(error) => {
                return Err(error)
                    .with_context(|| format!("cannot read {}", path.display()))
                    .hint(ErrorKind::Data, || "make the file readable, or remove it");
            }
        }
    }
    Ok(tokenizer)
}

/// Takes the special tokens that `tokenizer_config.json` does not name from `special_tokens_map.json`.
fn name_special_tokens(tokenizer: &mut Tokenizer, map: &[u8]) {
    let [config, map] = [&tokenizer.config, map].map(|json| -> Value {
        let is_small = limits::check_values(json).is_ok();
        if is_small { serde_json::from_slice(json).unwrap_or_default() } else { Value::Null }
    });
    let id_of = |key: &str| {
        let is_open = named_token(&config, key).is_none();
        named_token(&map, key)
            .filter(|_| is_open)
            .and_then(|token| tokenizer.inner.token_to_id(token))
    };
    let [bos, eos, pad] = ["bos_token", "eos_token", "pad_token"].map(id_of);
    let Special { bos: known_bos, eos: known_eos, pad: known_pad } = tokenizer.special;
    tokenizer.special =
        Special { bos: bos.or(known_bos), eos: eos.or(known_eos), pad: pad.or(known_pad) };
}

pub fn parse(json: Vec<u8>, config: Vec<u8>, place: Option<&Path>) -> anyhow::Result<Tokenizer> {
    limits::check_values(&json)?;
    limits::check_values(&config).context("in tokenizer_config.json")?;
    let value: Value = serde_json::from_slice(&json).context("not JSON")?;
    let config_value: Value =
        serde_json::from_slice(&config).context("tokenizer_config.json is not JSON")?;
    let vocabulary = check(&value)?;
    let mut inner = guarded(|| tokenizers::Tokenizer::from_bytes(&json))?;
    // They concern batches of a training in Python.
    inner.with_padding(None);
    guarded(|| inner.with_truncation(None).map(drop))?;
    for (content, id) in &vocabulary.added {
        let given = inner.token_to_id(content);
        if given != Some(*id) {
            bail!("added token {content:?} has id {id}, but its position gives it {given:?}");
        }
    }
    // Parts that the crate cannot work with show here, not at the first prompt.
    guarded(|| {
        let _ = inner.encode_fast(" a1\n\u{e9}", true);
        let first: Vec<u32> = (0..vocabulary.size.min(16) as u32).collect();
        let _ = inner.decode(&first, false);
        Ok(())
    })?;
    let id_of = |token: &str| inner.token_to_id(token);
    let markers = (|| {
        let [start_file, end_file, start_header, end_header, pad] = MARKERS.map(id_of);
        Some(Markers {
            start_file: start_file?,
            end_file: end_file?,
            start_header: start_header?,
            end_header: end_header?,
            pad: pad?,
        })
    })();
    let named = |key: &str| named_token(&config_value, key).and_then(id_of);
    let frame = Frame::new(&value, &inner);
    let special = Special {
        bos: named("bos_token")
            .or(markers.map(|markers| markers.start_file))
            .or(frame.before.first().copied()),
        eos: named("eos_token")
            .or(markers.map(|markers| markers.end_file))
            .or(frame.after.last().copied())
            .or_else(|| USUAL_EOS.into_iter().find_map(id_of)),
        pad: named("pad_token").or(markers.map(|markers| markers.pad)),
    };
    let style = markers.and_then(|_| style_of(&value));
    if style.is_some()
        && let Some(byte) = (0..=255).find(|&byte| {
            let mut spelled = [0; 4];
            !vocabulary.model.contains_key(&*byte_level::char_of(byte).encode_utf8(&mut spelled))
        })
    {
        // Text with this byte would lose it without a word.
        bail!("the vocab lacks the byte {byte:#04x}");
    }
    Ok(Tokenizer {
        style,
        markers,
        special,
        sha256: Sha256::digest(&json).into(),
        json,
        config,
        extras: Vec::new(),
        foreign: None,
        place: place.map(Path::to_path_buf),
        vocab_size: vocabulary.size,
        growth: vocabulary.growth,
        spelling: vocabulary.spelling(&value["decoder"]),
        frame,
        words: Words::new(style.unwrap_or_default()),
        added: style
            .filter(|&style| style == Style::Original)
            .and_then(|_| AddedTokens::new(&value["added_tokens"])),
        caches: Mutex::default(),
        inner,
    })
}

/// Tokens that end a text in tokenizers that do not say which one does, the likeliest first.
const USUAL_EOS: [&str; 5] = ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]"];

/// A token that a `tokenizer_config.json` or `special_tokens_map.json` names.
fn named_token<'a>(config: &'a Value, key: &str) -> Option<&'a str> {
    let token = &config[key];
    token.as_str().or_else(|| token["content"].as_str())
}

/// True of no post-processor, and of the one that transformers writes in place of none.
fn adds_nothing(post_processor: &Value) -> bool {
    let single = &post_processor["single"];
    post_processor.is_null()
        || post_processor["type"] == "TemplateProcessing"
            && single.as_array().is_some_and(|parts| parts.len() == 1)
            && single[0]["Sequence"]["id"] == "A"
}

/// Style of a tokenizer, by the parts that decide the ids of a text.
fn style_of(json: &Value) -> Option<Style> {
    let added: Vec<_> =
        json["added_tokens"].as_array()?.iter().map(|token| &token["content"]).collect();
    let plain = json["normalizer"].is_null()
        && adds_nothing(&json["post_processor"])
        && MODEL_SWITCHES.iter().all(|(switch, usual)| {
            json["model"].get(*switch).is_none_or(|given| given == usual || given.is_null())
        });
    if !plain {
        return None;
    }
    if json["pre_tokenizer"] == exact_pre_tokenizer() && added == MARKERS {
        return Some(Style::Exact);
    }
    let same = |(index, name): (usize, &&str)| added.get(index).is_some_and(|token| token == name);
    let original = json["pre_tokenizer"] == original_pre_tokenizer()
        && MARKERS.iter().chain(&BLANKS).enumerate().all(same);
    original.then_some(Style::Original)
}

/// Settings of a plain byte-level model.
const MODEL_SWITCHES: [(&str, Value); 7] = [
    ("dropout", Value::Null),
    ("unk_token", Value::Null),
    ("continuing_subword_prefix", Value::Null),
    ("end_of_word_suffix", Value::Null),
    ("fuse_unk", Value::Bool(false)),
    ("byte_fallback", Value::Bool(false)),
    ("ignore_merges", Value::Bool(false)),
];

/// A checked vocabulary.
struct Vocabulary<'a> {
    /// Token and id: the model's.
    model: HashMap<&'a str, u32>,
    /// Added tokens, in the order of the file.
    added: Vec<(&'a str, u32)>,
    /// One more than the largest id.
    size: usize,
    growth: Growth,
}

/// Refuses what the crate would panic on or misread.
fn check(json: &Value) -> anyhow::Result<Vocabulary<'_>> {
    let model = &json["model"];
    let vocab = match model["type"].as_str() {
        Some("BPE") => bpe_vocabulary(model)?,
        Some("Unigram") => unigram_vocabulary(model)?,
        Some("WordPiece" | "WordLevel") => word_vocabulary(model)?,
        _ => bail!(
            "the model is {}: laam reads BPE, Unigram, WordPiece and WordLevel",
            model["type"]
        ),
    };
    let mut ids = std::collections::HashSet::with_capacity(vocab.len());
    for &id in vocab.values() {
        if !ids.insert(id) {
            bail!("two tokens have id {id}");
        }
    }
    let mut added = Vec::new();
    for token in json["added_tokens"].as_array().into_iter().flatten() {
        let content = token["content"].as_str().unwrap_or_default();
        let id = token["id"].as_u64().and_then(|id| u32::try_from(id).ok());
        match id {
            Some(id) if !content.is_empty() => added.push((content, id)),
            _ => bail!("an added token has no content or no id: {token}"),
        }
        ids.extend(id);
    }
    limits::check_added(&added)?;
    let size = ids.iter().max().map_or(0, |&id| id as usize + 1);
    // Ids may have gaps, but not such that a table of them is out of all proportion.
    if size == 0 || size > 2 * ids.len() + 65_536 {
        bail!("{} tokens, but ids up to {}", ids.len(), size.saturating_sub(1));
    }
    let growth = limits::check_parts(json, size)?;
    Ok(Vocabulary { model: vocab, added, size, growth })
}

/// Tokens and ids of a model that lists them as an object.
fn vocabulary_object(model: &Value) -> anyhow::Result<HashMap<&str, u32>> {
    let entries = model["vocab"].as_object().context("its model has no vocab")?;
    let entry = |(token, id): (_, &Value)| {
        let token: &String = token;
        let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
        Ok((token.as_str(), id.with_context(|| format!("token {token:?} has no id"))?))
    };
    entries.iter().map(entry).collect()
}

fn bpe_vocabulary(model: &Value) -> anyhow::Result<HashMap<&str, u32>> {
    if !model["dropout"].is_null() && model["dropout"] != 0.0 {
        bail!("the model drops merges at random (dropout {})", model["dropout"]);
    }
    let vocab = vocabulary_object(model)?;
    // The second half of a merge has it, the merged token has it once.
    let prefix = model["continuing_subword_prefix"].as_str().unwrap_or_default();
    let mut joined = String::new();
    for (a, b) in merges(&model["merges"])? {
        joined.clear();
        let rest = b
            .get(prefix.len()..)
            .with_context(|| format!("the merge of {a:?} and {b:?} lacks the prefix {prefix:?}"))?;
        joined.extend([a, rest]);
        for token in [a, b, &joined] {
            if !vocab.contains_key(token) {
                bail!("the merge of {a:?} and {b:?} needs token {token:?}, which the vocab lacks");
            }
        }
    }
    Ok(vocab)
}

/// A list of tokens with their scores: the ids are their places.
fn unigram_vocabulary(model: &Value) -> anyhow::Result<HashMap<&str, u32>> {
    let entries = model["vocab"].as_array().context("its model has no vocab")?;
    let mut vocab = HashMap::with_capacity(entries.len());
    for (id, entry) in entries.iter().enumerate() {
        let (Some(token), Some(_)) = (entry[0].as_str(), entry[1].as_f64()) else {
            bail!("token {id} has no text or no score");
        };
        if token.is_empty() || token.len() > limits::MAX_TOKEN_BYTES {
            bail!("token {id} has {} bytes: 1 to {}", token.len(), limits::MAX_TOKEN_BYTES);
        }
        if vocab.insert(token, id as u32).is_some() {
            bail!("two tokens are {token:?}");
        }
    }
    if model["unk_id"].as_u64().is_some_and(|id| id >= entries.len() as u64) {
        bail!("unk_id {} is no token", model["unk_id"]);
    }
    Ok(vocab)
}

fn word_vocabulary(model: &Value) -> anyhow::Result<HashMap<&str, u32>> {
    let vocab = vocabulary_object(model)?;
    let unknown = model["unk_token"].as_str().unwrap_or_default();
    if !vocab.contains_key(unknown) {
        bail!("the vocab lacks the unk_token {unknown:?}");
    }
    // The time for a word grows with its square.
    let longest = model["max_input_chars_per_word"].as_u64().unwrap_or_default();
    if longest > limits::MAX_WORD_CHARS {
        bail!("max_input_chars_per_word {longest}: at most {}", limits::MAX_WORD_CHARS);
    }
    Ok(vocab)
}

fn pair(merge: &Value) -> Option<(&str, &str)> {
    match merge {
        Value::String(both) => both.split_once(' ').filter(|(_, b)| !b.contains(' ')),
        Value::Array(pair) => match pair.as_slice() {
            [Value::String(a), Value::String(b)] => Some((a, b)),
            _ => None,
        },
        _ => None,
    }
}

/// The merges, in order: each a string with one blank, or a list of two.
fn merges(list: &Value) -> anyhow::Result<Vec<(&str, &str)>> {
    let list = list.as_array().context("its model has no merges")?;
    list.iter()
        .enumerate()
        .map(|(rank, merge)| {
            pair(merge).with_context(|| format!("merge {rank} is no pair of tokens: {merge}"))
        })
        .collect()
}

impl Vocabulary<'_> {
    /// Each id's bytes, if the decoder is byte-level: then a text is its tokens' bytes in a row.
    fn spelling(&self, decoder: &Value) -> Option<Spelling> {
        let drops_blanks = *decoder == original_decoder();
        if !drops_blanks && decoder["type"] != "ByteLevel" {
            return None;
        }
        let mut by_id: Vec<Vec<u8>> = vec![Vec::new(); self.size];
        for (&token, &id) in &self.model {
            let bytes = token.chars().map(byte_level::byte_of).collect::<Option<Vec<u8>>>();
            // A token that is not in the spelling is text as it stands.
            let mut bytes = bytes.unwrap_or_else(|| token.as_bytes().to_vec());
            if drops_blanks {
                bytes.retain(|&byte| byte != b' ');
            }
            by_id[id as usize] = bytes;
        }
        for &(content, id) in &self.added {
            by_id[id as usize] = content.as_bytes().to_vec();
        }
        let mut spelling = Spelling { bytes: Vec::new(), ends: Vec::with_capacity(self.size) };
        for bytes in by_id {
            spelling.bytes.extend(bytes);
            spelling.ends.push(spelling.bytes.len() as u32);
        }
        Some(spelling)
    }
}
