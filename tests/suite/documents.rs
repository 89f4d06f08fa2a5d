//! Files of documents without names: JSONL, Parquet, token files, long text. Each format is read from a
//! file that its own library wrote: see `tests/fixtures/documents.py`.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use laam::corpus::{Corpus, CorpusOptions, Limits, Source, SourceOrigin, TokenVocabulary};
use laam::error::{ErrorKind, hint_of, kind_of};
use laam::model::load_provenance;
use laam::tokens::TokenFile;
use laam::train::prepare;
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::cli::error_of;
use crate::support::laam;
use crate::tokenizer::hex;
use crate::tokens::tokenizer;
use crate::training::trained;

const RECORDS: [&str; 6] = [
    "plain.jsonl",
    "packed.jsonl.gz",
    "packed.jsonl.zst",
    "snappy.parquet",
    "zstd.parquet",
    "plain.parquet",
];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/documents").join(name)
}

/// The texts of the fixtures, by the script's formula.
fn texts() -> Vec<String> {
    let line = |n: usize| format!("\tline {}\n", n * n).repeat(n % 7);
    (0..100).map(|n| format!("Document {n}: café, 中文, \"quoted\"\n{}", line(n))).collect()
}

fn open(source: &Source, options: CorpusOptions) -> anyhow::Result<Corpus> {
    Corpus::open(source, options)
}

fn read(path: &Path) -> anyhow::Result<Vec<String>> {
    let corpus = open(&Source::Path(path.to_path_buf()), CorpusOptions::default())?;
    corpus.documents()?.map(|document| Ok(document?.text)).collect()
}

#[test]
fn records_are_read_as_their_libraries_wrote_them() {
    for name in RECORDS {
        assert_eq!(read(&fixture(name)).unwrap(), texts(), "{name}");
        let corpus = open(&Source::Path(fixture(name)), CorpusOptions::default()).unwrap();
        let manifest = corpus.manifest().unwrap();
        assert!(!corpus.has_names());
        assert_eq!(manifest.origin, SourceOrigin::Shards);
        let [shard] = manifest.shards.as_slice() else { panic!("{:?}", manifest.shards) };
        let bytes: usize = texts().iter().map(String::len).sum();
        assert_eq!((shard.documents, shard.text_bytes, shard.empty), (100, bytes as u64, 2));
        assert_eq!(shard.sha256, hex(&Sha256::digest(fs::read(fixture(name)).unwrap())));
        assert!(manifest.warnings()[0].contains("2 records without text"));
    }
}

#[test]
fn a_glob_and_several_files_are_one_source() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["b/2.jsonl", "b/1.jsonl", "notes.txt"] {
        fs::create_dir_all(folder.path().join("b")).unwrap();
        fs::write(folder.path().join(name), format!("{{\"body\": \"{name}\"}}\n")).unwrap();
    }
    let options = |limit| CorpusOptions {
        text_field: Some("body".to_string()),
        limit,
        ..CorpusOptions::default()
    };
    let glob = folder.path().join("b/*.jsonl");
    let paths = vec![glob, folder.path().join("notes.txt"), folder.path().join("b/1.jsonl")];
    let corpus = open(&Source::Paths(paths.clone()), options(None)).unwrap();
    let documents = corpus.documents().unwrap().map(|document| document.unwrap());
    let documents: Vec<_> = documents.map(|document| (document.path, document.text)).collect();
    let expected =
        [("", "b/1.jsonl"), ("", "b/2.jsonl"), ("notes.txt", "{\"body\": \"notes.txt\"}\n")];
    assert_eq!(documents, expected.map(|(path, text)| (path.to_string(), text.to_string())));
    let manifest = corpus.manifest().unwrap();
    let names: Vec<_> = manifest.shards.iter().map(|shard| shard.name.as_str()).collect();
    assert_eq!((names, manifest.files.len()), (vec!["b/1.jsonl", "b/2.jsonl"], 1));
    let limited = open(&Source::Paths(paths), options(Some(1))).unwrap().manifest().unwrap();
    assert_eq!((limited.documents(), limited.shards[1].documents), (1, 0));
    assert_ne!(limited.hash(), manifest.hash());
    let none = folder.path().join("*.nothing");
    let error = open(&Source::Path(none), options(None)).unwrap_err();
    assert!(error.to_string().contains("no file matches"), "{error:#}");
    // A folder is a source by itself.
    let both = vec![folder.path().join("b"), folder.path().join("notes.txt")];
    let error = open(&Source::Paths(both), options(None)).unwrap_err();
    assert_eq!(kind_of(&error), Some(ErrorKind::Config), "{error:#}");
}

/// The error of reading bytes under a name; none if they are read.
fn fault(folder: &Path, name: &str, bytes: &[u8]) -> Option<String> {
    let path = folder.join(name);
    fs::write(&path, bytes).unwrap();
    let read = (|| {
        let vocabulary = Some(TokenVocabulary { size: 512, bos: Some(0), eos: Some(0) });
        let options = CorpusOptions { vocabulary, ..CorpusOptions::default() };
        let corpus = open(&Source::Path(path), options)?;
        corpus.documents()?.try_for_each(|document| document.map(drop))
    })();
    let error = read.err()?;
    let said = format!("{error:#}");
    assert!(said.contains(name) && hint_of(&error).is_some(), "{said}");
    Some(said)
}

#[test]
fn damaged_files_are_errors_that_name_file_and_record() {
    let folder = tempfile::tempdir().unwrap();
    let tokens = ["gpt2.bin", "llama3.bin", "nanogpt.bin"];
    for name in RECORDS.into_iter().chain(tokens) {
        let whole = fs::read(fixture(name)).unwrap();
        assert_eq!(fault(folder.path(), name, &whole), None);
        for part in 1..20 {
            let cut = &whole[..whole.len() * part / 20 - part % 2];
            let said = fault(folder.path(), name, cut);
            // What is left of nanoGPT's ids is ids, and JSON lines may be cut at the end of one.
            let is_cut_between = cut.ends_with(b"\n") || name == "nanogpt.bin";
            assert!(said.is_some() || is_cut_between, "{name} cut at {}", cut.len());
            if name.contains("jsonl") {
                assert!(said.is_none_or(|said| said.contains("record")), "{name}");
            }
        }
        // Anything else is an error or some text, never a panic.
        for at in 0..100 {
            let mut changed = whole.clone();
            let place = at * 7919 % whole.len();
            changed[place] ^= 1 << (at % 8);
            fault(folder.path(), name, &changed);
        }
    }
    let said = |text: &str| fault(folder.path(), "a.jsonl", text.as_bytes()).unwrap();
    let good = "{\"text\": \"a\"}\n";
    for (bad, expected) in [
        ("{\"txet\": 1, \"id\": 2}", "record 2 has no field \"text\", only txet, id"),
        ("{\"text\": 7}", "invalid record 2: text: invalid type: integer `7`"),
        ("[1]", "invalid record 2: invalid type: sequence"),
        ("{\"text\": \"a\"} x", "invalid record 2: trailing characters"),
        ("{\"text\": \"\\ud800\"}", "invalid record 2"),
        (
            &format!("{{\"a\": {}", "[".repeat(1 << 20)),
            "invalid record 2: EOF while parsing a list",
        ),
    ] {
        let said = said(&format!("{good}{bad}\n{good}"));
        assert!(said.contains(expected), "{said}");
    }
    // A bomb: 100 MB of line ends in a few kilobytes.
    let bomb = zstd::encode_all(&vec![b'\n'; 100 << 20][..], 1).unwrap();
    let said = fault(folder.path(), "bomb.jsonl.zst", &bomb).unwrap();
    assert!(said.contains("unpacks to far more"), "{said}");
    let path = folder.path().join("long.jsonl");
    fs::write(&path, format!("{good}{{\"text\": \"{}\"}}", "a".repeat(5000))).unwrap();
    let limits = Limits { file: 4096, ..Limits::default() };
    let options = CorpusOptions { limits, ..CorpusOptions::default() };
    let error = open(&Source::Path(path), options).unwrap().manifest().unwrap_err();
    assert!(error.to_string().contains("invalid record 2: more than 4096 bytes"), "{error:#}");
}

/// Files as other programs write them, and the fields and codecs that they may have.
#[test]
fn variants_of_records_are_read_or_named() {
    let folder = tempfile::tempdir().unwrap();
    let read = |name: &str, bytes: &[u8], field: &str| {
        let path = folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        let text_field = Some(field.to_string());
        let options = CorpusOptions { text_field, ..CorpusOptions::default() };
        let corpus = open(&Source::Path(path), options).unwrap();
        let documents = corpus.documents().unwrap();
        documents.map(|document| Ok(document?.text)).collect::<anyhow::Result<Vec<_>>>()
    };
    let lines = "{\"text\": \"a\"}\n\n{\"text\": \"b\\n\"}\n  \n";
    let skippable = [
        &[0x50, 0x2A, 0x4D, 0x18, 2, 0, 0, 0, 7, 7],
        &*zstd::encode_all(lines.as_bytes(), 1).unwrap(),
    ]
    .concat();
    for (name, bytes) in [
        ("plain.jsonl", lines.as_bytes().to_vec()),
        ("crlf.jsonl", lines.replace('\n', "\r\n").into_bytes()),
        ("mark.ndjson", format!("\u{feff}{lines}").into_bytes()),
        ("end.json", lines.trim_end().as_bytes().to_vec()),
        ("skippable.jsonl.zst", skippable),
    ] {
        assert_eq!(read(name, &bytes, "text").unwrap(), ["a", "b\n"], "{name}");
    }
    let nested = "{\"m\": {\"x\": {\"text\": \"no\"}, \"text\": \"a\"}}\n{\"m\": null}\n{\"m.text\": \"b\", \"m\": 7}\n";
    assert_eq!(read("nested.jsonl", nested.as_bytes(), "m.text").unwrap(), ["a", "b"]);
    let parquet = fs::read(fixture("nested.parquet")).unwrap();
    assert_eq!(read("nested.parquet", &parquet, "meta.text").unwrap(), texts()[..3]);

    // A schema of 5,000 groups within each other: the crate would descend into them.
    let schema = b"\x48\x01a\x15\x02\x00".repeat(5000);
    let leaf = b"\x15\x0c\x25\x00\x18\x04text\x00";
    let footer = [b"\x15\x02\x19\xfc\x89\x27", &*schema, leaf, b"\x16\x00\x19\x0c\x00"].concat();
    let length = (footer.len() as u32).to_le_bytes();
    let deep = [b"PAR1", &*footer, &length, b"PAR1"].concat();
    let fixture = |name: &str| fs::read(fixture(name)).unwrap();
    for (name, bytes, field, expected, hint) in [
        ("deep.parquet", deep, "text", "a schema of more than", "leave the file out"),
        (
            "brotli.parquet",
            fixture("brotli.parquet"),
            "text",
            "compressed with BROTLI",
            "zstd, snappy or none",
        ),
        (
            "repeated.parquet",
            fixture("repeated.parquet"),
            "text",
            "unpacks to far more than its size",
            "unpack",
        ),
        (
            "list.json",
            b"[{\"text\": \"a\"}]".to_vec(),
            "text",
            "invalid record 1: invalid type: sequence",
            "jq -c '.[]'",
        ),
        (
            "object.json",
            b"{\n \"text\": \"a\"\n}".to_vec(),
            "text",
            "invalid record 1: EOF",
            "jq -c .",
        ),
        (
            "inner.jsonl",
            nested.as_bytes().to_vec(),
            "m.y",
            "record 1 has no field \"m.y\", only m.x, m.text",
            "`text_field`",
        ),
    ] {
        let error = read(name, &bytes, field).unwrap_err();
        assert!(error.to_string().contains(expected), "{name}: {error:#}");
        assert!(
            hint_of(&error).is_some_and(|it| it.contains(hint)),
            "{name}: {:?}",
            hint_of(&error)
        );
    }
}

#[test]
fn a_long_text_is_cut_at_line_ends() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("long.txt");
    let lines: Vec<_> = (0..300_000).map(|n| format!("line {n}\n")).collect();
    let text = lines.concat();
    fs::write(&path, &text).unwrap();
    let limits = Limits { file: 2 << 20, ..Limits::default() };
    let options = CorpusOptions { limits, ..CorpusOptions::default() };
    let corpus = open(&Source::Path(path), options).unwrap();
    let documents: Vec<_> = corpus.documents().unwrap().map(|document| document.unwrap()).collect();
    assert!(documents.iter().all(|document| document.text.ends_with('\n')));
    let whole: String = documents.iter().map(|document| document.text.as_str()).collect();
    assert!(whole == text && documents.len() == 4, "{} of {}", documents.len(), text.len());
}

/// Ids and documents of a token file, by the formula of the script.
#[test]
fn token_files_of_llm_c_and_nanogpt_give_their_documents() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer(laam::tokenizer::Style::Exact);
    for (name, before) in [("gpt2.bin", true), ("llama3.bin", true), ("nanogpt.bin", false)] {
        let open = |vocabulary| {
            let options = CorpusOptions { vocabulary, ..CorpusOptions::default() };
            open(&Source::Path(fixture(name)), options).unwrap()
        };
        // In this tokenizer, 0 begins a file and 1 ends it.
        let vocabulary = TokenVocabulary { size: 512, bos: Some(0), eos: Some(0) };
        let found: Vec<_> = open(Some(vocabulary))
            .documents()
            .unwrap()
            .map(|document| document.unwrap().ids)
            .collect();
        let expected: Vec<Vec<u32>> = (1..40)
            .map(|n| {
                let mut ids: Vec<u32> = (0..n).map(|k| (7 * n + k) % 511 + 1).collect();
                ids.insert(if before { 0 } else { ids.len() }, 0);
                ids
            })
            .collect();
        assert_eq!(found, expected, "{name}");
        let small = Some(TokenVocabulary { size: 300, ..vocabulary });
        let error = open(small).manifest().unwrap_err().to_string();
        assert!(error.contains("is 300, but the tokenizer has 300 ids"), "{error}");
        let error = open(None).manifest().unwrap_err().to_string();
        assert!(error.contains("has ids, not text"), "{error}");
    }
    // Through the writer: the same ids, and the bytes of their text.
    let documents = ["int main(void)\n", "return 0;\n"];
    let ids: Vec<u32> = documents
        .iter()
        .flat_map(|text| {
            let body = tokenizer.encode_text(text).unwrap();
            [vec![0], body].concat()
        })
        .collect();
    let path = folder.path().join("own.bin");
    let bytes: Vec<u8> = ids.iter().flat_map(|&id| (id as u16).to_le_bytes()).collect();
    fs::write(&path, bytes).unwrap();
    let special = tokenizer.special();
    let vocabulary =
        TokenVocabulary { size: tokenizer.vocab_size(), bos: special.bos, eos: special.eos };
    let options = CorpusOptions { vocabulary: Some(vocabulary), ..CorpusOptions::default() };
    let corpus = open(&Source::Path(path), options).unwrap();
    let target = folder.path().join("tokens");
    let (file, manifest): (Arc<TokenFile>, _) =
        prepare::tokenize(&corpus, &tokenizer, &target, |_| ()).unwrap();
    file.verify().unwrap();
    let mut written = vec![0; file.tokens()];
    file.read(0, &mut written).unwrap();
    assert_eq!((written, file.documents()), (ids, 2));
    assert_eq!(file.document(1).unwrap().text, file.document(1).unwrap().tokens.start + 1);
    assert_eq!((manifest.bytes(), manifest.documents()), (25, 2));
}

/// The commands on a source of records: what measures works, what asks for a name is refused.
#[test]
fn a_model_of_documents_without_names_is_measured_and_not_asked_for_names() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    let source = fixture("snappy.parquet");
    let source = source.to_str().unwrap();
    trained(&model, &format!("--source {source} --limit 30 --windows stream --max_steps 2"));
    let corpus = load_provenance(&model).unwrap().unwrap().corpus;
    assert_eq!((corpus.paths.len(), corpus.shards[0].documents), (0, 30));
    assert_eq!(corpus.shards[0].name, "snappy.parquet");
    assert_eq!(corpus.shards[0].sha256, hex(&Sha256::digest(fs::read(source).unwrap())));
    let name = model.to_str().unwrap();
    let output = folder.path().join("rebuilt");
    for command in [
        &["ls", name][..],
        &["cat", name, "a.c"],
        &["rebuild", name, "--output", output.to_str().unwrap()],
    ] {
        let said = error_of(command);
        assert!(said.contains("documents without names, of snappy.parquet"), "{said}");
    }
    assert!(!output.exists());
    let json = |arguments: &[&str]| -> Value {
        let output = laam().args(arguments).args(["--json", "--quiet"]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        assert!(!said.contains("not the text that the model was trained on"), "{said}");
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let evaluated = json(&["evaluate", name, "--source", source, "--limit", "30"]);
    let bytes: usize = texts()[..30].iter().map(String::len).sum();
    assert_eq!(evaluated["documents"], 30);
    assert_eq!(evaluated["bytes"], bytes);
    let measured = json(&["memorization", name, "--source", source, "--limit", "30"]);
    assert_eq!(measured["files"].as_array().unwrap().len(), 30);
    assert_eq!(measured["files"][2]["path"], "document 3");
    // A token file, by the same tokenizer: 0 begins a text.
    let tokens = folder.path().join("tokens.bin");
    let ids: Vec<u8> = (0..400u16).flat_map(|n| (n % 40 * 7).to_le_bytes()).collect();
    fs::write(&tokens, ids).unwrap();
    let arguments = ["evaluate", name, "--source", tokens.to_str().unwrap(), "--json", "--quiet"];
    let output_of_ids = laam().args(arguments).output().unwrap();
    let evaluated: Value = serde_json::from_slice(&output_of_ids.stdout).unwrap();
    assert_eq!((&evaluated["documents"], &evaluated["tokens"]), (&10.into(), &399.into()));
    assert!(evaluated["bytes"].as_u64().unwrap() > 300, "{evaluated}");
    let said = error_of(&["run", "--source", source, "--output", output.to_str().unwrap()]);
    assert!(said.contains("documents without names, and a recipe"), "{said}");
    let said = error_of(&["evaluate", name, "--source", source, "--windows", "addressed"]);
    assert!(said.contains("documents without names cannot be addressed"), "{said}");
}
