//! The tokenizer on real text: the first LaaM's ids, and exact round trips.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::OnceLock;

use laam::corpus::Document;
use laam::error::{ErrorKind, kind_of};
use laam::generate::TextStream;
use laam::tokenizer::{MARKERS, Style, Tokenizer, Training};
use proptest::prelude::*;
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::support::{documents, linux};

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut hex, byte| {
        write!(hex, "{byte:02x}").expect("a string takes it");
        hex
    })
}

pub fn train(documents: &[Document], style: Style, vocab_size: usize) -> Tokenizer {
    let documents = documents.iter().cloned().map(Ok);
    Tokenizer::train(documents, &Training { style, vocab_size }, |_| ()).expect("it trains").0
}

/// A few files in a few styles of writing.
pub fn small_corpus() -> Vec<Document> {
    let file = |path: &str, text: &str| Document::new(path, text.repeat(3));
    vec![
        file("toy/main.c", "int main(void)\n{\n\treturn 0;\t/* done */\n}\n"),
        file(
            "toy/list.h",
            "struct list {\n        struct list *next, *prev;\n};\n\n#define X 1234567\n",
        ),
        file("toy/empty.h", ""),
        file("toy/read me.txt", "naïve café, 中文\r\nIt's what they'll say:  two  blanks\n"),
    ]
}

fn small(style: Style) -> &'static Tokenizer {
    static EXACT: OnceLock<Tokenizer> = OnceLock::new();
    static ORIGINAL: OnceLock<Tokenizer> = OnceLock::new();
    let cell = if style == Style::Exact { &EXACT } else { &ORIGINAL };
    cell.get_or_init(|| train(&small_corpus(), style, 320))
}

/// Text that is hard on a tokenizer: markers, control characters, blanks and line breaks of every
/// kind, and anything else.
fn hard_text() -> impl Strategy<Value = String> {
    r"(<\|(start|end)_(file|header)\|>|<\|pad\|>|<\|extra_id_3\|>|Ġ|Ċ|[ \t]{1,9}|\r\n|\n|[\u{0}-\u{1f}\u{7f}]|[a-z_]{1,6}|[0-9]{1,4}|'[a-z]|\PC|.){0,30}"
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]
    #[test]
    fn exact_tokenizer_round_trips_any_text(text in hard_text(), path in hard_text()) {
        let tokenizer = small(Style::Exact);
        let ids = tokenizer.encode_text(&text).unwrap();
        prop_assert_eq!(String::from_utf8(tokenizer.decode_bytes(&ids).unwrap()).unwrap(), text.as_str());
        // No marker comes from text: a document has just its own four, or two without a name.
        let document = Document::new(path, text);
        let (ids, header) = tokenizer.encode_framed(&document).unwrap();
        let markers = if document.path.is_empty() { 2 } else { 4 };
        prop_assert_eq!(ids.iter().filter(|&&id| id < MARKERS.len() as u32).count(), markers);
        if markers == 4 {
            let named = tokenizer.encode_header(&document.path, None).unwrap();
            prop_assert_eq!(&ids[..header], named.as_slice());
        }
        let text = tokenizer.decode_bytes(&ids[header..ids.len() - 1]).unwrap();
        prop_assert_eq!(String::from_utf8(text).unwrap(), document.text);
    }

    #[test]
    fn original_tokenizer_round_trips_any_text(text in hard_text()) {
        let tokenizer = small(Style::Original);
        let ids = tokenizer.encode_text(&text).unwrap();
        prop_assert_eq!(String::from_utf8(tokenizer.decode_bytes(&ids).unwrap()).unwrap(), text);
    }

    /// Our fast path against the crate reading our own tokenizer.json.
    #[test]
    fn exact_ids_match_tokenizers_crate(text in hard_text()) {
        static CRATES: OnceLock<tokenizers::Tokenizer> = OnceLock::new();
        let ours = small(Style::Exact);
        let crates = CRATES.get_or_init(|| {
            let folder = tempfile::tempdir().unwrap();
            ours.save(folder.path()).unwrap();
            let file = folder.path().join("tokenizer.json");
            let mut crates = tokenizers::Tokenizer::from_file(file).unwrap();
            crates.set_encode_special_tokens(true);
            crates
        });
        let ids = crates.encode_fast(text.as_str(), false).unwrap().get_ids().to_vec();
        prop_assert_eq!(ours.encode_text(&text).unwrap(), ids);
        prop_assert_eq!(crates.decode(&ours.encode_text(&text).unwrap(), false).unwrap(), text);
    }
}

#[test]
fn prompts_hold_markers_and_text_does_not() {
    let tokenizer = small(Style::Exact);
    let markers = tokenizer.markers().unwrap();
    let header = tokenizer.encode_header("toy/main.c", None).unwrap();
    let prompt = format!("{}{}toy/main.c{}", MARKERS[0], MARKERS[2], MARKERS[3]);
    assert_eq!(tokenizer.encode_prompt(&prompt).unwrap(), header);
    assert!(!tokenizer.encode_text(&prompt).unwrap().contains(&markers.start_file));
    let chunk = tokenizer.encode_header("toy/main.c", Some(12)).unwrap();
    let spelled = tokenizer.decode_bytes(&chunk).unwrap();
    assert_eq!(
        spelled,
        format!("{}{}toy/main.c 12{}", MARKERS[0], MARKERS[2], MARKERS[3]).as_bytes()
    );
}

/// `save_pretrained` of transformers writes a post-processor that adds nothing in place of none.
#[test]
fn a_tokenizer_that_transformers_saved_keeps_its_style() {
    let text = serde_json::json!({"Sequence": {"id": "A", "type_id": 0}});
    let mark = serde_json::json!({"SpecialToken": {"id": MARKERS[0], "type_id": 0}});
    for style in [Style::Exact, Style::Original] {
        let folder = tempfile::tempdir().unwrap();
        small(style).save(folder.path()).unwrap();
        let file = folder.path().join("tokenizer.json");
        let saved = std::fs::read(&file).unwrap();
        for (single, kept) in
            [(vec![text.clone()], true), (vec![mark.clone(), text.clone()], false)]
        {
            let mut json: serde_json::Value = serde_json::from_slice(&saved).unwrap();
            json["post_processor"] = serde_json::json!({
                "type": "TemplateProcessing", "single": single, "pair": [],
                "special_tokens": if kept { serde_json::json!({}) } else { serde_json::json!({
                    MARKERS[0]: {"id": MARKERS[0], "ids": [0], "tokens": [MARKERS[0]]}
                }) }
            });
            std::fs::write(&file, json.to_string()).unwrap();
            let again = Tokenizer::load(folder.path()).unwrap();
            assert_eq!(again.style(), kept.then_some(style));
        }
    }
}

#[test]
fn tokenizer_is_independent_of_threads_and_round_trips() {
    for style in [Style::Exact, Style::Original] {
        let hashes: Vec<_> = [1, 2, 3]
            .map(|threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| train(&small_corpus(), style, 400).sha256())
            })
            .into();
        assert!(hashes.iter().all(|hash| hash == &hashes[0]), "{style:?}");
        let tokenizer = small(style);
        let folder = tempfile::tempdir().unwrap();
        tokenizer.save(folder.path()).unwrap();
        let again = Tokenizer::load(folder.path()).unwrap();
        assert_eq!(again.style(), Some(style));
        assert_eq!(again.sha256(), tokenizer.sha256());
        assert_eq!(again.special(), tokenizer.special());
        assert_eq!(again.vocab_size(), tokenizer.vocab_size());
        for document in small_corpus() {
            assert_eq!(
                again.encode_document(&document).unwrap(),
                tokenizer.encode_document(&document).unwrap()
            );
        }
    }
}

#[test]
fn a_small_corpus_says_what_it_gave_and_original_fills_the_rest() {
    let documents = || small_corpus().into_iter().map(Ok);
    let training = Training { style: Style::Exact, vocab_size: 5000 };
    let (tokenizer, trained) = Tokenizer::train(documents(), &training, |_| ()).unwrap();
    assert!(trained.num_tokens < 5000, "{trained:?}");
    assert_eq!((trained.num_tokens, trained.num_pad_tokens), (trained.pre_vocab_size, 0));
    assert_eq!(tokenizer.vocab_size(), trained.num_tokens);

    let training = Training { style: Style::Original, vocab_size: 5000 };
    let (tokenizer, trained) = Tokenizer::train(documents(), &training, |_| ()).unwrap();
    assert_eq!((tokenizer.vocab_size(), trained.num_tokens), (5000, 5000));
    assert_eq!(trained.num_pad_tokens, 5000 - trained.pre_vocab_size);
    assert_eq!(trained.num_special_tokens, 9);
    assert_eq!(tokenizer.decode_bytes(&[4999]).unwrap(), b"<|extra_id_4999>");
}

#[test]
fn endless_words_are_encoded_up_to_a_limit() {
    let tokenizer = small(Style::Exact);
    let long = "return".repeat(50_000);
    let ids = tokenizer.encode_text(&long).unwrap();
    assert_eq!(tokenizer.decode_bytes(&ids).unwrap(), long.as_bytes());
    let text = "return".repeat(800_000);
    let error = tokenizer.encode_document(&Document::new("long.c", text)).unwrap_err();
    assert!(error.to_string().contains("4800000 bytes is too long"), "{error:#}");
    assert!(laam::error::hint_of(&error).unwrap().contains("long.c"));
}

/// What the Python package made of the same corpus with the first LaaM's settings: see
/// `tests/fixtures/original_tokenizer.py`.
const ORIGINAL: &str = include_str!("../fixtures/original_tokenizer.json");

#[test]
fn original_equals_the_python_packages_tokenizer_on_linux() {
    let Some(archive) = linux() else { return };
    let fixture: serde_json::Value = serde_json::from_str(ORIGINAL).unwrap();
    let documents = documents(&archive);
    let tokenizer = train(&documents, Style::Original, 32_768);
    let folder = tempfile::tempdir().unwrap();
    tokenizer.save(folder.path()).unwrap();
    let json = std::fs::read(folder.path().join("tokenizer.json")).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();

    let merges: Vec<_> = json["model"]["merges"]
        .as_array()
        .unwrap()
        .iter()
        .map(|merge| merge.as_str().unwrap())
        .collect();
    assert_eq!(merges.len(), fixture["merges"].as_u64().unwrap() as usize);
    // Hashed in stretches, so that a difference shows where it begins.
    for (stretch, (merges, hash)) in
        merges.chunks(1000).zip(fixture["merges_sha256"].as_array().unwrap()).enumerate()
    {
        let ours = hex(&Sha256::digest(merges.join("\n")));
        assert_eq!(ours, hash.as_str().unwrap(), "merges from {} on differ", stretch * 1000);
    }
    let mut vocabulary: Vec<_> = json["model"]["vocab"].as_object().unwrap().iter().collect();
    vocabulary.sort_by_key(|(_, id)| id.as_u64());
    let spelled: Vec<_> = vocabulary.iter().map(|(token, id)| format!("{id} {token}\n")).collect();
    assert_eq!(
        hex(&Sha256::digest(spelled.concat())),
        fixture["vocabulary_sha256"].as_str().unwrap()
    );

    let files: HashMap<_, _> = fixture["files"]
        .as_array()
        .unwrap()
        .iter()
        .map(|file| (file["path"].as_str().unwrap(), file))
        .collect();
    assert_eq!(documents.len(), files.len());
    let wrong: Vec<_> = documents
        .par_iter()
        .filter_map(|document| {
            let ids = tokenizer.encode_document(document).unwrap();
            let spelled: Vec<_> = ids.iter().map(u32::to_string).collect();
            let file = files[document.path.as_str()];
            let same = file["tokens"] == ids.len()
                && file["sha256"] == hex(&Sha256::digest(spelled.join(" ")))[..16];
            let back = tokenizer.decode_bytes(&ids).unwrap();
            let whole =
                back.windows(document.text.len().max(1)).any(|b| b == document.text.as_bytes());
            (!same || !whole).then(|| (document.path.clone(), ids.len(), same, whole))
        })
        .collect();
    assert!(wrong.is_empty(), "{} of {} files differ: {wrong:?}", wrong.len(), files.len());
}

#[test]
fn exact_tokenizer_round_trips_linux() {
    let Some(archive) = linux() else { return };
    let documents = documents(&archive);
    assert_eq!(documents.len(), 506);
    let tokenizer = train(&documents, Style::Exact, 4096);
    let tokens: usize = documents
        .par_iter()
        .map(|document| {
            let ids = tokenizer.encode_text(&document.text).unwrap();
            let back = tokenizer.decode_bytes(&ids).unwrap();
            assert!(back == document.text.as_bytes(), "{} came back changed", document.path);
            ids.len()
        })
        .sum();
    // Measured elsewhere with this pattern and vocabulary: 1.56 million.
    assert!((1_540_000..1_580_000).contains(&tokens), "{tokens} tokens");
}

/// Loads a tokenizer.json and, if it is accepted, uses it.
fn load_and_use(json: &[u8], config: &[u8]) -> anyhow::Result<Tokenizer> {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), json).unwrap();
    std::fs::write(folder.path().join("tokenizer_config.json"), config).unwrap();
    let tokenizer = Tokenizer::load(folder.path())?;
    for document in small_corpus() {
        let _ = tokenizer.encode_document(&document);
        let _ = tokenizer.encode_prompt(&document.text);
        if let Ok(ids) = tokenizer.encode_text(&document.text) {
            let _ = tokenizer.decode_bytes(&ids);
        }
    }
    let _ = tokenizer.decode_bytes(&[0, 1, 300, 319, u32::MAX]);
    Ok(tokenizer)
}

fn saved(style: Style) -> (Vec<u8>, Vec<u8>) {
    let folder = tempfile::tempdir().unwrap();
    small(style).save(folder.path()).unwrap();
    let read = |name| std::fs::read(folder.path().join(name)).unwrap();
    (read("tokenizer.json"), read("tokenizer_config.json"))
}

/// Every value in a JSON document, by its path.
fn places(value: &serde_json::Value, at: &str, found: &mut Vec<String>) {
    found.push(at.to_string());
    match value {
        serde_json::Value::Array(list) => {
            // Some of a long list stand for the rest.
            for index in (0..list.len()).step_by(1 + list.len() / 5) {
                places(&list[index], &format!("{at}/{index}"), found);
            }
        }
        serde_json::Value::Object(map) => {
            for key in map.keys().step_by(1 + map.len() / 9) {
                let escaped = key.replace('~', "~0").replace('/', "~1");
                places(&map[key], &format!("{at}/{escaped}"), found);
            }
        }
        _ => {}
    }
}

fn any_json() -> impl Strategy<Value = serde_json::Value> {
    use serde_json::json;
    prop_oneof![
        Just(json!(null)),
        Just(json!(true)),
        Just(json!("")),
        Just(json!("a b")),
        Just(json!("(((")),
        Just(json!("Ġ")),
        Just(json!(["a", "b"])),
        Just(json!([])),
        Just(json!({})),
        Just(json!(-1)),
        Just(json!(0.5)),
        any::<u32>().prop_map(|n| json!(n)),
        (0u32..400).prop_map(|n| json!(n)),
        any::<u64>().prop_map(|n| json!(n)),
        Just(json!({"type": "Sequence", "decoders": [], "pretokenizers": [], "normalizers": []})),
        Just(json!({"type": "Replace", "pattern": {"String": "e"}, "content": "ee"})),
        Just(json!({"type": "Replace", "pattern": {"Regex": "(a*)*b"}, "content": ""})),
        Just(json!({"type": "Digits", "individual_digits": true})),
        Just(json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"})),
        Just(json!({"type": "Strip", "content": " ", "start": 9, "stop": 9})),
        Just(json!({"type": "FixedLength", "length": 0})),
        Just(
            json!({"type": "Split", "pattern": {"Regex": ""}, "behavior": "Removed", "invert": true})
        ),
        Just(
            json!({"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 9})
        ),
        Just(json!({"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}})),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn broken_tokenizer_is_an_error_never_a_panic(
        original: bool,
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any_json()), 1..4),
        bytes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3),
    ) {
        let (json, config) = saved(if original { Style::Original } else { Style::Exact });
        let mut value: serde_json::Value = serde_json::from_slice(&json).unwrap();
        for (place, new) in changes {
            let mut found = Vec::new();
            places(&value, "", &mut found);
            *value.pointer_mut(&found[place.index(found.len())]).unwrap() = new;
        }
        let _ = load_and_use(&serde_json::to_vec(&value).unwrap(), &config);
        let mut json = json;
        for (at, byte) in bytes {
            let at = at.index(json.len());
            json[at] = byte;
        }
        let _ = load_and_use(&json, &config);
    }
}

#[test]
fn what_a_tokenizer_lacks_is_said() {
    let (json, config) = saved(Style::Exact);
    let good: serde_json::Value = serde_json::from_slice(&json).unwrap();
    let error = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut broken = good.clone();
        change(&mut broken);
        let json = serde_json::to_vec(&broken).unwrap();
        let error = load_and_use(&json, &config).expect_err("it is broken");
        assert_eq!(kind_of(&error), Some(ErrorKind::Data));
        format!("{error:#}")
    };
    let merge = good["model"]["merges"][0].as_str().unwrap().replace(' ', "");
    let said = error(&|json| {
        json["model"]["vocab"].as_object_mut().unwrap().remove(&merge);
    });
    assert!(said.contains("which the vocab lacks"), "{said}");
    let said = error(&|json| {
        json["model"]["vocab"].as_object_mut().unwrap().remove("@");
    });
    assert!(said.contains("lacks the byte 0x40"), "{said}");
    let said = error(&|json| json["model"]["vocab"]["A"] = 5.into());
    assert!(said.contains("two tokens have id 5"), "{said}");
    let said = error(&|json| json["model"]["vocab"]["A"] = 4_000_000_000u32.into());
    assert!(said.contains("ids up to 4000000000"), "{said}");
    let said = error(&|json| json["added_tokens"][0]["id"] = 77.into());
    assert!(said.contains("has id 77"), "{said}");
    let said = error(&|json| json["model"]["type"] = "Unigram".into());
    assert!(said.contains("its model has no vocab"), "{said}");
    let said = error(&|json| json["model"]["type"] = "Neural".into());
    assert!(said.contains("laam reads BPE, Unigram, WordPiece and WordLevel"), "{said}");
    let said = error(&|json| json["model"]["continuing_subword_prefix"] = "###".into());
    assert!(said.contains("lacks the prefix"), "{said}");
    assert!(load_and_use(b"{", b"{}").is_err());
    assert!(load_and_use(&json, b"[").is_err());
    assert!(Tokenizer::load(std::path::Path::new("/nowhere")).is_err());
}

/// GPT-2's files and Llama 2's, in small: no markers, other decoders.
#[test]
fn foreign_tokenizers_load_for_generation() {
    let (json, _) = saved(Style::Exact);
    let mut gpt2: serde_json::Value = serde_json::from_slice(&json).unwrap();
    gpt2["pre_tokenizer"] = serde_json::json!(
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}
    );
    for marker in 0..5 {
        let name = format!("<{marker}>");
        gpt2["added_tokens"][marker]["content"] = name.as_str().into();
        let vocab = gpt2["model"]["vocab"].as_object_mut().unwrap();
        vocab.remove(MARKERS[marker]);
        vocab.insert(name, marker.into());
    }
    let config = br#"{"bos_token": {"content": "<0>"}, "eos_token": "<1>"}"#;
    let tokenizer = load_and_use(&serde_json::to_vec(&gpt2).unwrap(), config).unwrap();
    assert_eq!(tokenizer.style(), None);
    assert_eq!((tokenizer.special().bos, tokenizer.special().eos), (Some(0), Some(1)));
    assert_eq!(tokenizer.special().pad, None);
    let text = "int main(void)\n{\r\n\tcafé\u{0} <0>";
    let ids = tokenizer.encode_text(text).unwrap();
    assert_eq!(ids.last(), Some(&0));
    assert_eq!(tokenizer.decode_bytes(&ids).unwrap(), text.as_bytes());
    let document = &small_corpus()[0];
    let (ids, header) = tokenizer.encode_framed(document).unwrap();
    assert_eq!((header, ids.last()), (0, Some(&1)), "a text and the token that ends it");
    assert_eq!(ids[..ids.len() - 1], tokenizer.encode_text(&document.text).unwrap());
    let error = tokenizer.encode_header("a.c", None).unwrap_err();
    assert!(error.to_string().contains("no document markers"), "{error:#}");
    let endless = load_and_use(&serde_json::to_vec(&gpt2).unwrap(), b"{}").unwrap();
    let error = endless.encode_document(document).unwrap_err();
    assert!(error.to_string().contains("names no token that ends a text"), "{error:#}");

    let tokenizer = load_and_use(&serde_json::to_vec(&llama2()).unwrap(), b"{}").unwrap();
    assert_eq!(tokenizer.encode_prompt("a bé").unwrap(), [0, 4, 1, 3, 5, 6]);
    assert_eq!(tokenizer.decode_bytes(&[4, 1, 3, 5, 6]).unwrap(), "a bé".as_bytes());
}

/// The tokenizer.json of a small Llama 2: blanks before words, characters it lacks as bytes.
pub fn llama2() -> serde_json::Value {
    serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [{"id": 0, "content": "<s>", "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true}],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "fuse_unk": true,
            "byte_fallback": true, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "vocab": {"<s>": 0, "▁": 1, "a": 2, "b": 3, "▁a": 4, "<0xC3>": 5, "<0xA9>": 6,
                "<0xF0>": 7, "<0x9F>": 8, "<0x99>": 9, "<0x82>": 10, "▁b": 11},
            "merges": ["▁ a"]}
    })
}

/// The pieces of a stream of `ids` behind `prompt`, the rest last.
fn pieces(tokenizer: &Tokenizer, prompt: &[u32], ids: &[u32]) -> Vec<String> {
    let mut stream = TextStream::new(tokenizer, prompt).unwrap();
    let mut pieces: Vec<_> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    pieces.push(stream.finish().unwrap());
    pieces.into_iter().map(|piece| String::from_utf8(piece).unwrap()).collect()
}

#[test]
fn a_stream_is_the_text_of_the_prompt_and_all_tokens_together() {
    let tokenizer = load_and_use(&serde_json::to_vec(&llama2()).unwrap(), b"{}").unwrap();
    // A character of four tokens comes with the last of them, and takes nothing with it.
    assert_eq!(pieces(&tokenizer, &[0, 4], &[7, 8, 9, 10, 3]), ["", "", "", "\u{1f642}", "b", ""]);
    // The prompt ends within the character.
    assert_eq!(pieces(&tokenizer, &[0, 4, 7, 8], &[9, 10, 3]), ["", "\u{1f642}", "b", ""]);
    // The first word keeps its blank; at the beginning of a text it has none.
    assert_eq!(pieces(&tokenizer, &[0, 4], &[11, 4]), [" b", " a", ""]);
    assert_eq!(pieces(&tokenizer, &[], &[11, 4]), ["b", " a", ""]);
    // What never becomes a character is text too.
    assert_eq!(pieces(&tokenizer, &[4], &[7, 3, 5]), ["", "\u{fffd}b", "", "\u{fffd}"]);
}

/// A change of a tokenizer.json that the crate panics on, or grows without bound on.
type HostilePart = (&'static str, fn(&mut serde_json::Value));

#[test]
fn hostile_parts_are_refused_before_the_crate_sees_them() {
    use serde_json::{Value, json};
    fn sequence(list: &str, parts: &[Value]) -> Value {
        json!({"type": "Sequence", list: parts})
    }
    fn template(single: &Value) -> Value {
        json!({"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens":
            {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}})
    }
    let cases: [HostilePart; 18] = [
        ("not listed", |json| {
            json["post_processor"] =
                template(&json!([{"SpecialToken": {"id": "<x>", "type_id": 0}}]));
        }),
        ("it has one sequence", |json| {
            json["post_processor"] = template(&json!([{"Sequence": {"id": "B", "type_id": 0}}]));
        }),
        ("at most 1", |json| {
            let text = json!({"Sequence": {"id": "A", "type_id": 0}});
            json["post_processor"] = template(&json!([text, text]));
        }),
        ("at most 64", |json| {
            let token = json!({"SpecialToken": {"id": "<s>", "type_id": 0}});
            json["post_processor"] = template(&vec![token; 100_000].into());
        }),
        ("invalid ids", |json| {
            json["post_processor"]["special_tokens"]["<s>"]["ids"] = json!([4_000_000]);
        }),
        ("a Strip", |json| {
            json["decoder"]["decoders"][3]["stop"] = 9.into();
        }),
        ("a Strip", |json| {
            json["decoder"]["decoders"][3]["start"] = (1u64 << 40).into();
        }),
        ("more than 256 times", |json| {
            let part = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aaaa"});
            json["normalizer"] = sequence("normalizers", &vec![part; 18]);
        }),
        ("more than 256 times", |json| {
            let part = json!({"type": "Replace", "pattern": {"Regex": ""}, "content": "aaaa"});
            json["decoder"] = sequence("decoders", &vec![part; 18]);
        }),
        ("at most 1024", |json| {
            let part = json!({"type": "Prepend", "prepend": "a".repeat(1 << 20)});
            json["normalizer"] = sequence("normalizers", &vec![part; 20]);
        }),
        ("at most 32", |json| {
            json["pre_tokenizer"] =
                sequence("pretokenizers", &vec![json!({"type": "Whitespace"}); 33]);
        }),
        ("puts tokens that the vocab lacks", |json| {
            let token = json!(["<s>", 4_000_000]);
            json["post_processor"] = json!({"type": "BertProcessing", "sep": token, "cls": token});
        }),
        ("cut short", |json| {
            let table = "/wAAAA==";
            json["normalizer"] = json!({"type": "Precompiled", "precompiled_charsmap": table});
        }),
        ("not base64", |json| {
            json["normalizer"] = json!({"type": "Precompiled", "precompiled_charsmap": "?"});
        }),
        ("two tokens are", |json| {
            json["model"] = json!({"type": "Unigram", "vocab": [["a", 0.0], ["a", 0.0]]});
        }),
        ("unk_id 9 is no token", |json| {
            json["model"] = json!({"type": "Unigram", "unk_id": 9, "vocab": [["a", 0.0]]});
        }),
        ("max_input_chars_per_word", |json| {
            json["model"] = json!({"type": "WordPiece", "unk_token": "a", "vocab": {"a": 0},
                "max_input_chars_per_word": 1u64 << 40, "continuing_subword_prefix": "##"});
        }),
        ("values: at most", |json| json["more"] = vec![0; 5 << 20].into()),
    ];
    for (about, change) in cases {
        let mut json = llama2();
        change(&mut json);
        let error = load_and_use(&serde_json::to_vec(&json).unwrap(), b"{}").expect_err(about);
        assert!(format!("{error:#}").contains(about), "{about}: {error:#}");
    }
    // What the crate alone knows to be impossible is an error too: no panic, and no text of one.
    for pattern in ["", "x*", "zzz", "(?=a)", "\\b"] {
        let mut json = llama2();
        let part = json!({"type": "Replace", "pattern": {"Regex": pattern}, "content": "y"});
        json["normalizer"] = part.clone();
        let _ = load_and_use(&serde_json::to_vec(&json).unwrap(), b"{}");
        json["normalizer"] = Value::Null;
        json["decoder"] = part;
        let _ = load_and_use(&serde_json::to_vec(&json).unwrap(), b"{}");
    }
    // A text is bounded by what its parts make of it.
    let tokenizer = load_and_use(&serde_json::to_vec(&llama2()).unwrap(), b"{}").unwrap();
    let error = tokenizer.encode_prompt(&"a".repeat(2 << 20)).unwrap_err();
    assert!(format!("{error:#}").contains("bytes of text: at most"), "{error:#}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]
    /// Word by word as the crate does it at once.
    #[test]
    fn original_ids_match_tokenizers_crate(text in hard_text()) {
        static CRATES: OnceLock<tokenizers::Tokenizer> = OnceLock::new();
        let ours = small(Style::Original);
        let crates = CRATES.get_or_init(|| {
            let folder = tempfile::tempdir().unwrap();
            ours.save(folder.path()).unwrap();
            tokenizers::Tokenizer::from_file(folder.path().join("tokenizer.json")).unwrap()
        });
        let ids = crates.encode_fast(text.as_str(), false).unwrap().get_ids().to_vec();
        prop_assert_eq!(ours.encode_text(&text).unwrap(), ids.clone());
        prop_assert_eq!(ours.encode_prompt(&text).unwrap(), ids);
    }
}
