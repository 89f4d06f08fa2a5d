//! The token file and its windows, against plain restatements of what they mean.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use laam::corpus::Document;
use laam::tokenizer::{Style, Tokenizer};
use laam::tokens::{AddressEncoder, Batch, IGNORE, TokenFile, TokenWriter, WindowKind, Windows};
use proptest::prelude::*;
use sha2::{Digest, Sha256};

use crate::cli::error_of;
use crate::support::{documents, laam, linux};
use crate::tokenizer::{hex, small_corpus, train};

pub fn tokenizer(style: Style) -> Arc<Tokenizer> {
    static BOTH: OnceLock<[Arc<Tokenizer>; 2]> = OnceLock::new();
    let both = BOTH.get_or_init(|| {
        [Style::Exact, Style::Original].map(|style| Arc::new(train(&small_corpus(), style, 320)))
    });
    Arc::clone(&both[usize::from(style == Style::Original)])
}

pub fn write(path: &Path, tokenizer: &Tokenizer, documents: &[Document]) -> Arc<TokenFile> {
    let mut writer = TokenWriter::create(path, tokenizer).unwrap();
    writer.write(documents.iter().cloned().map(Ok), |_| ()).unwrap();
    writer.finish([7; 32]).unwrap();
    Arc::new(TokenFile::open(path).unwrap())
}

fn some_documents() -> impl Strategy<Value = Vec<Document>> {
    let text = prop_oneof![Just(String::new()), r"([a-z]{1,5}[ \t\n;]{1,3}|\PC){0,40}"];
    let document = (r"d/[a-z]{1,4}\.[ch]", text).prop_map(|(path, text)| Document::new(path, text));
    proptest::collection::vec(document, 1..6)
}

/// One window, column by column: (id, target, first key).
type Columns = Vec<(u32, u32, u32)>;

fn columns(batch: &Batch, window: usize) -> Columns {
    let at = |column| window * batch.context + column;
    (0..batch.context)
        .map(|c| (batch.ids[at(c)], batch.targets[at(c)], batch.first_key[at(c)]))
        .collect()
}

fn original(documents: &[Vec<u32>], context: usize, pad: u32) -> Vec<Columns> {
    let mut windows = Vec::new();
    for document in documents {
        for chunk in document.chunks(context) {
            let pads = context - chunk.len();
            let real =
                |column: usize| column.checked_sub(pads).and_then(|at| chunk.get(at)).copied();
            windows.push(
                (0..context)
                    .map(|column| match (real(column), real(column + 1)) {
                        (None, _) => (pad, IGNORE, context as u32),
                        (Some(id), None) => (id, IGNORE, pads as u32),
                        (Some(id), Some(next)) => (id, next, pads as u32),
                    })
                    .collect(),
            );
        }
    }
    windows
}

fn stream(documents: &[Vec<u32>], context: usize, stride: usize, pad: u32) -> Vec<Columns> {
    let tokens: Vec<(u32, usize)> = documents
        .iter()
        .scan(0, |start, document| {
            let first = *start;
            *start += document.len();
            Some(document.iter().map(move |&id| (id, first)))
        })
        .flatten()
        .collect();
    let mut windows = Vec::new();
    for start in (0..).step_by(stride) {
        let column = |column: usize| match tokens.get(start + column) {
            None => (pad, IGNORE, context as u32),
            Some(&(id, first)) => {
                let next = tokens.get(start + column + 1).map_or(IGNORE, |next| next.0);
                (id, next, first.saturating_sub(start) as u32)
            }
        };
        windows.push((0..context).map(column).collect());
        if start + context + 1 >= tokens.len() {
            return windows;
        }
    }
    unreachable!("tokens end")
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn token_file_round_trips(documents in some_documents(), original: bool) {
        let tokenizer = tokenizer(if original { Style::Original } else { Style::Exact });
        let folder = tempfile::tempdir().unwrap();
        let file = write(&folder.path().join("tokens"), &tokenizer, &documents);
        file.verify().unwrap();
        prop_assert_eq!(file.documents(), documents.len());
        prop_assert_eq!(file.header().corpus_sha256, [7; 32]);
        for (index, document) in documents.iter().enumerate() {
            let entry = file.document(index).unwrap();
            prop_assert_eq!(entry.path, document.path.as_str());
            let mut ids = vec![0; entry.tokens.len()];
            file.read(entry.tokens.start, &mut ids).unwrap();
            prop_assert_eq!(&ids, &tokenizer.encode_document(document).unwrap());
            let text = &ids[entry.text - entry.tokens.start..ids.len() - 1];
            prop_assert_eq!(tokenizer.decode_bytes(text).unwrap(), document.text.as_bytes());
            for token in entry.tokens {
                prop_assert_eq!(file.document_of(token), index);
            }
        }
    }

    #[test]
    fn original_and_stream_windows_match_their_definition(
        documents in some_documents(), context in 2usize..40, stride in 1usize..40
    ) {
        let stride = stride.min(context);
        let tokenizer = tokenizer(Style::Original);
        let pad = tokenizer.markers().unwrap().pad;
        let folder = tempfile::tempdir().unwrap();
        let file = write(&folder.path().join("tokens"), &tokenizer, &documents);
        let ids: Vec<_> =
            documents.iter().map(|document| tokenizer.encode_document(document).unwrap()).collect();
        for (kind, expected) in [
            (WindowKind::Original, original(&ids, context, pad)),
            (WindowKind::Stream, stream(&ids, context, stride, pad)),
        ] {
            let windows =
                Windows::new(file.clone(), tokenizer.clone(), kind, context, Some(stride)).unwrap();
            prop_assert_eq!(windows.len(), expected.len());
            // Backwards, in one batch: the order asked for is the order given.
            let asked: Vec<_> = (0..windows.len()).rev().collect();
            let batch = windows.draw(&asked).unwrap();
            for (row, &window) in asked.iter().enumerate() {
                prop_assert_eq!(columns(&batch, row), expected[window].clone(), "{:?} {}", kind, window);
                let counted = windows.draw(&[window]).unwrap().counted();
                prop_assert_eq!(windows.counted(window).unwrap(), counted, "{:?} {}", kind, window);
            }
        }
    }

    /// A model that has memorized the addressed windows gives every document back, from the
    /// names alone.
    #[test]
    fn addressed_windows_cover_every_document(
        documents in some_documents(), room in 1usize..40, original: bool
    ) {
        let tokenizer = tokenizer(if original { Style::Original } else { Style::Exact });
        let markers = tokenizer.markers().unwrap();
        let longest = documents.iter().map(|document| {
            tokenizer.encode_header(&document.path, Some(999)).unwrap().len()
        });
        let context = longest.max().unwrap() + room - 1;
        let folder = tempfile::tempdir().unwrap();
        let file = write(&folder.path().join("tokens"), &tokenizer, &documents);
        let windows =
            Windows::new(file.clone(), tokenizer.clone(), WindowKind::Addressed, context, None).unwrap();
        let encoder = AddressEncoder::new(tokenizer.clone(), context);

        let mut by_heart = HashMap::new();
        for window in 0..windows.len() {
            let batch = windows.draw(&[window]).unwrap();
            let place = windows.span(window).unwrap();
            let path = file.document(place.document).unwrap().path;
            let prefix = encoder.address(path, place.chunk).unwrap();
            let address = prefix.ids.len();
            // One token more than inputs: the last is a target alone.
            prop_assert_eq!(address + prefix.max_tokens, context + 1);
            let counted: Vec<_> =
                batch.targets.iter().copied().filter(|&target| target != IGNORE).collect();
            prop_assert_eq!(windows.counted(window).unwrap(), counted.len());
            prop_assert_eq!(&batch.ids[..address], prefix.ids.as_slice());
            // The chunk is all that counts, from the address's last token on, without a gap.
            prop_assert!(batch.targets[..address - 1].iter().all(|&target| target == IGNORE));
            prop_assert_eq!(&batch.targets[address - 1..address - 1 + counted.len()], &counted);
            for (column, &id) in batch.ids.iter().enumerate() {
                let real = column < address + counted.len();
                let expected = if !real {
                    markers.pad
                } else if column < address {
                    prefix.ids[column]
                } else {
                    counted[column - address]
                };
                prop_assert_eq!(id, expected);
                prop_assert_eq!(batch.first_key[column], if real { 0 } else { context as u32 });
            }
            prop_assert!(counted.len() == prefix.max_tokens || counted.last() == Some(&markers.end_file));
            prop_assert!(counted.len() <= prefix.max_tokens);
            // Two documents of one name cannot be told apart: the first is meant.
            by_heart.entry(prefix.ids).or_insert(counted);
        }
        let mut names = std::collections::HashSet::new();
        for document in documents.iter().filter(|document| names.insert(&document.path)) {
            let mut ids = Vec::new();
            for chunk in 0.. {
                ids.extend(&by_heart[&encoder.address(&document.path, chunk).unwrap().ids]);
                if ids.last() == Some(&markers.end_file) {
                    break;
                }
            }
            ids.pop();
            prop_assert_eq!(tokenizer.decode_bytes(&ids).unwrap(), document.text.as_bytes());
        }
    }

    /// Any byte changed is found, at the latest by `verify`; and nothing that a changed file says
    /// makes a reader panic or allocate more than the file has.
    #[test]
    fn token_file_detects_any_changed_byte(
        at: prop::sample::Index, change in 1u8.., cut: Option<prop::sample::Index>,
        fields in proptest::collection::vec((prop::sample::select(vec![12, 16, 24, 32, 40, 144]), any::<u8>()), 0..3)
    ) {
        let tokenizer = tokenizer(Style::Exact);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens");
        write(&path, &tokenizer, &small_corpus());
        let good = std::fs::read(&path).unwrap();

        let mut changed = good.clone();
        changed[at.index(good.len())] ^= change;
        std::fs::write(&path, &changed).unwrap();
        let found = TokenFile::open(&path).and_then(|file| {
            use_all(&Arc::new(file), &tokenizer);
            TokenFile::open(&path)?.verify()
        });
        prop_assert!(found.is_err());

        // Cut off.
        let length = cut.map_or(good.len() - 1, |cut| cut.index(good.len()));
        std::fs::write(&path, &good[..length]).unwrap();
        prop_assert!(TokenFile::open(&path).is_err());

        // A forger who knows how the header is checked.
        for &(field, byte) in &fields {
            changed[field] = byte;
        }
        let check = Sha256::digest(&changed[..152]);
        changed[152..160].copy_from_slice(&check[..8]);
        std::fs::write(&path, &changed).unwrap();
        if let Ok(file) = TokenFile::open(&path) {
            let _ = file.verify();
            use_all(&Arc::new(file), &tokenizer);
        }
    }
}

/// Draws every window there is, errors and all.
fn use_all(file: &Arc<TokenFile>, tokenizer: &Arc<Tokenizer>) {
    for kind in [WindowKind::Original, WindowKind::Stream, WindowKind::Addressed] {
        if let Ok(windows) = Windows::new(file.clone(), tokenizer.clone(), kind, 24, None) {
            for window in 0..windows.len() {
                let _ = windows.draw(&[window]);
            }
        }
    }
}

#[test]
fn token_file_names_ids_beyond_the_vocabulary() {
    let tokenizer = tokenizer(Style::Exact);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokens");
    write(&path, &tokenizer, &small_corpus());
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[160 + 2 * 5..][..2].copy_from_slice(&320u16.to_le_bytes());
    std::fs::write(&path, &bytes).unwrap();
    let file = Arc::new(TokenFile::open(&path).unwrap());
    let windows = Windows::new(file, tokenizer, WindowKind::Stream, 16, None).unwrap();
    let error = format!("{:#}", windows.draw(&[0]).unwrap_err());
    assert!(error.contains("token 5 is 320") && error.contains("tokens is damaged"), "{error}");
    windows.draw(&[1]).unwrap();
}

#[test]
fn large_vocabulary_uses_4_byte_ids() {
    let tokenizer = train(&small_corpus(), Style::Original, 65_537);
    let folder = tempfile::tempdir().unwrap();
    let file = write(&folder.path().join("tokens"), &tokenizer, &small_corpus());
    assert_eq!(file.header().id_bytes, 4);
    file.verify().unwrap();
    let document = small_corpus().remove(0);
    let mut ids = vec![0; file.document(0).unwrap().tokens.len()];
    file.read(0, &mut ids).unwrap();
    assert_eq!(ids, tokenizer.encode_document(&document).unwrap());
}

#[test]
fn failed_write_keeps_the_old_file() {
    let tokenizer = tokenizer(Style::Exact);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokens");
    let before = write(&path, &tokenizer, &small_corpus());
    let failing =
        small_corpus().into_iter().map(Ok).chain([Err(anyhow::anyhow!("the archive is cut off"))]);
    let mut writer = TokenWriter::create(&path, &tokenizer).unwrap();
    let error = writer.write(failing, |_| ()).unwrap_err();
    assert_eq!(error.to_string(), "the archive is cut off");
    drop(writer);
    assert_eq!(TokenFile::open(&path).unwrap().header(), before.header());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn windows_reject_a_context_too_small_for_an_address() {
    let tokenizer = tokenizer(Style::Exact);
    let folder = tempfile::tempdir().unwrap();
    let file = write(&folder.path().join("tokens"), &tokenizer, &small_corpus());
    let new = |kind, context, stride| {
        Windows::new(file.clone(), tokenizer.clone(), kind, context, stride).map(|_| ())
    };
    let error = format!("{:#}", new(WindowKind::Addressed, 4, None).unwrap_err());
    assert!(error.contains("toy/main.c"), "{error}");
    assert!(new(WindowKind::Stream, 16, Some(17)).is_err());
    assert!(new(WindowKind::Stream, 16, Some(0)).is_err());
    assert!(new(WindowKind::Original, 1, None).is_err());
    let other = Arc::new(train(&small_corpus(), Style::Exact, 300));
    let error = Windows::new(file.clone(), other, WindowKind::Stream, 16, None).unwrap_err();
    assert!(error.to_string().contains("another tokenizer"), "{error}");
}

#[test]
fn original_windows_of_linux_are_the_first_laams() {
    let Some(archive) = linux() else { return };
    let documents = documents(&archive);
    let tokenizer = Arc::new(train(&documents, Style::Original, 32_768));
    let folder = tempfile::tempdir().unwrap();
    let file = write(&folder.path().join("tokens"), &tokenizer, &documents);
    assert_eq!((file.tokens(), file.documents()), (2_123_476, 506));
    let windows = Windows::new(file, tokenizer, WindowKind::Original, 512, None).unwrap();
    assert_eq!(windows.len(), 4_408);
    let all: Vec<_> = (0..windows.len()).collect();
    let batch = windows.draw(&all).unwrap();
    // Every token but each window's first is predicted once.
    assert_eq!(batch.counted(), 2_123_476 - 4_408);
}

/// Runs the program and returns its stdout as JSON.
fn json_of(arguments: &[&str]) -> serde_json::Value {
    let output = laam().args(arguments).output().expect("the program starts");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {said}");
    serde_json::from_slice(&output.stdout).expect("one JSON object on stdout")
}

#[test]
fn the_commands_train_and_tokenize_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    for Document { path, text, .. } in small_corpus() {
        let file = folder.path().join("source").join(path);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(file, text).unwrap();
    }
    // Not UTF-8: style original reads it as latin-1, exact leaves it out.
    std::fs::write(at("source/toy/latin.c"), b"/* caf\xe9 */\n").unwrap();
    for (style, documents, pads) in [("exact", 4, false), ("original", 5, true)] {
        let (tokenizer, tokens) = (at(style), at(&format!("{style}.tokens")));
        let printed = json_of(&[
            "train-tokenizer",
            "--source",
            &at("source"),
            "--style",
            style,
            "--vocab_size",
            "4000",
            "--output_path",
            &tokenizer,
            "--quiet",
            "--format",
            "hf",
        ]);
        let keys: Vec<_> = printed.as_object().unwrap().keys().skip(1).take(7).collect();
        assert_eq!(
            keys,
            [
                "num_tokens",
                "num_special_tokens",
                "num_pad_tokens",
                "pre_vocab_size",
                "vocab_size",
                "output_path",
                "output_format"
            ]
        );
        assert_eq!(printed["vocab_size"], 4000);
        assert_eq!(printed["num_tokens"] == 4000, pads);
        assert_eq!(printed["num_pad_tokens"] != 0, pads);
        assert_eq!(printed["output_format"], "hf");
        for name in ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"] {
            assert!(Path::new(&tokenizer).join(name).is_file(), "{name}");
        }
        let source = at("source");
        let arguments = [
            "tokenize",
            "--source",
            &source,
            "--tokenizer_path",
            &tokenizer,
            "--output",
            &tokens,
            "--max_position_embeddings",
            "64",
            "--json",
        ];
        let printed = json_of(&arguments);
        let file = TokenFile::open(Path::new(&tokens)).unwrap();
        file.verify().unwrap();
        assert_eq!(printed["documents"], documents);
        assert_eq!(printed["tokens"], file.tokens());
        let whole = std::fs::read(&tokens).unwrap();
        let sha256 = hex(&Sha256::digest(whole));
        assert_eq!(printed["sha256"], sha256);
        assert_eq!(json_of(&arguments), printed, "a second run writes the same");
    }
}

#[test]
fn the_commands_refuse_with_a_hint_and_leave_what_was_there() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    tokenizer(Style::Exact).save(Path::new(&at("tokenizer"))).unwrap();
    std::fs::write(at("kept"), "as it was").unwrap();
    std::fs::write(at("broken.tar"), [1; 3000]).unwrap();
    std::fs::create_dir(at("empty")).unwrap();
    let tokenize = |source: &str, tokenizer: &str| {
        error_of(&[
            "tokenize",
            "--source",
            &at(source),
            "--tokenizer_path",
            &at(tokenizer),
            "--output",
            &at("kept"),
        ])
    };
    tokenize("broken.tar", "tokenizer");
    tokenize("empty", "tokenizer");
    tokenize("nowhere", "tokenizer");
    tokenize("empty", "nowhere");
    tokenize("empty", "kept");
    let said = error_of(&["train-tokenizer", "--vocab_size", "100", "--output_path", &at("new")]);
    assert!(said.contains("invalid --vocab-size 100: must be at least 261"), "{said}");
    error_of(&["train-tokenizer", "--style", "best"]);
    error_of(&["train-tokenizer", "--source", &at("empty"), "--output_path", &at("new")]);
    assert!(!Path::new(&at("new")).exists());
    // A file stands where the folder should.
    error_of(&["train-tokenizer", "--vocab_size", "300", "--output_path", &at("kept")]);
    assert_eq!(std::fs::read_to_string(at("kept")).unwrap(), "as it was");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 4, "nothing temporary stays");
}
