//! The targets: each takes bytes and must end with a value or an error, in bounded time and memory.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::{env, fs};

use laam::corpus::{Corpus, CorpusOptions, Document, Limits, Source, TokenVocabulary};
use laam::memorization::recall::{self, Recall, RecallHead};
use laam::model::{self, Config, Layout, Provenance};
use laam::report::RunFiles;
use laam::schema::SchemaVersion;
use laam::tokenizer::{Style, Tokenizer, Training};
use laam::tokens::{TokenFile, TokenWriter, WindowKind};
use laam::train::recipe::Recipe;
use laam::train::sweep::Sweep;
use laam::train::{Settings, TrainState};

/// Parses an input: an error is as good as success, a panic is not.
pub type Run = Box<dyn Fn(&[u8]) -> anyhow::Result<()>>;

/// A parser and inputs to begin with.
pub struct Target {
    pub name: &'static str,
    pub seeds: Vec<Vec<u8>>,
    pub run: Run,
}

fn target(
    name: &'static str,
    seeds: Vec<Vec<u8>>,
    run: impl Fn(&[u8]) -> anyhow::Result<()> + 'static,
) -> Target {
    Target { name, seeds, run: Box::new(run) }
}

/// A reader of documents, by a file of the integration tests.
fn documents_in(name: &'static str, file: &'static str, limits: Limits) -> Target {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/documents");
    let seed = fs::read(folder.join(file)).expect("a file of the integration tests");
    let path = scratch().join(file);
    target(name, vec![seed], move |input| {
        fs::write(&path, input)?;
        let vocabulary = Some(TokenVocabulary { size: 512, bos: Some(0), eos: Some(0) });
        let options = CorpusOptions { limits, vocabulary, ..CorpusOptions::default() };
        let corpus = Corpus::open(&Source::Path(path.clone()), options)?;
        corpus.documents()?.try_for_each(|document| document.map(drop))
    })
}

/// A folder in memory, if the system has one, for parsers that read files.
pub fn scratch() -> PathBuf {
    let memory = Path::new("/dev/shm");
    let base = if memory.is_dir() { memory.to_path_buf() } else { env::temp_dir() };
    let folder = base.join(format!("laam-fuzz-{}", std::process::id()));
    fs::create_dir_all(&folder).expect("a folder for the fuzzer");
    folder
}

const CONFIG: &str = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama",
    "hidden_act": "silu", "vocab_size": 270, "hidden_size": 4, "intermediate_size": 4,
    "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 4,
    "max_position_embeddings": 16, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    "tie_word_embeddings": true, "initializer_range": 0.02, "bos_token_id": 0, "eos_token_id": [1]}"#;

const PROVENANCE: &str = r#"{"schema_version": 2, "corpus": {"source": "sample", "paths": ["a.c", "b/c.h"],
    "bytes": 10, "sha256": "00"}, "seed": 42, "device": "cpu", "program_version": "0.1.0",
    "recipe": {"windows": "stream"}, "weights_sha256": "00"}"#;

const METRICS: &str = "{\"schema_version\":2,\"step\":1,\"epoch\":0.5,\"loss\":5.5,\"learning_rate\":0.001,\
    \"grad_norm\":1.5,\"tokens\":32,\"tokens_per_second\":1000.0,\"seconds\":0.1,\"skipped\":0}\n";

/// Tokenizers of each kind of model that laam does not train.
const OTHER_TOKENIZERS: [&str; 3] = [
    r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[{"id":0,"content":"<unk>","single_word":false,
    "lstrip":false,"rstrip":false,"normalized":false,"special":true}],"normalizer":{"type":"NFKC"},"pre_tokenizer":
    {"type":"Metaspace","replacement":"\u2581","prepend_scheme":"always","split":true},"post_processor":null,"decoder":
    {"type":"Metaspace","replacement":"\u2581","prepend_scheme":"always","split":true},"model":{"type":"Unigram","unk_id":0,
    "vocab":[["<unk>",0.0],["\u2581",-1.0],["a",-2.0],["int",-2.5],["\u2581a",-3.0]],"byte_fallback":false}}"#,
    r###"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[{"id":0,"content":"[UNK]","single_word":false,
    "lstrip":false,"rstrip":false,"normalized":false,"special":true}],"normalizer":{"type":"BertNormalizer","clean_text":true,
    "handle_chinese_chars":true,"strip_accents":null,"lowercase":true},"pre_tokenizer":{"type":"BertPreTokenizer"},
    "post_processor":{"type":"TemplateProcessing","single":[{"Sequence":{"id":"A","type_id":0}},{"SpecialToken":{"id":"[UNK]",
    "type_id":0}}],"pair":[{"Sequence":{"id":"A","type_id":0}},{"Sequence":{"id":"B","type_id":1}}],"special_tokens":{"[UNK]":
    {"id":"[UNK]","ids":[0],"tokens":["[UNK]"]}}},"decoder":{"type":"WordPiece","prefix":"##","cleanup":true},"model":
    {"type":"WordPiece","unk_token":"[UNK]","continuing_subword_prefix":"##","max_input_chars_per_word":100,"vocab":
    {"[UNK]":0,"a":1,"##b":2,"int":3,"=":4,"12":5,";":6}}}"###,
    r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[{"id":0,"content":"<unk>","single_word":false,
    "lstrip":false,"rstrip":false,"normalized":false,"special":true}],"normalizer":{"type":"Sequence","normalizers":
    [{"type":"Replace","pattern":{"Regex":"c"},"content":"d"},{"type":"Lowercase"}]},"pre_tokenizer":{"type":"Sequence",
    "pretokenizers":[{"type":"WhitespaceSplit"},{"type":"Punctuation","behavior":"Isolated"},{"type":"Digits",
    "individual_digits":true}]},"post_processor":null,"decoder":null,"model":{"type":"WordLevel","vocab":{"<unk>":0,"int":1,
    "a":2,"=":3,"1":4,"2":5,";":6},"unk_token":"<unk>"}}"#,
];

const RECALL: &str = "{\"schema_version\":2,\"tokens_sha256\":\"00\",\"window_kind\":\"stream\",\"context\":16,\
    \"stride\":16,\"windows\":10}\n{\"step\":1,\"verbatim\":\"0100\"}\n{\"step\":2,\"verbatim\":\"ff03\"}\n";

const HEAT: &str = r#"{"schema_version":2,"files":[{"path":"a.c","text":"int x;\n","cells":[[4,-0.5],[7,null]],
    "wrong":[[0,2]]}]}"#;

const REBUILD: &str = r#"{"schema_version":2,"files":1,"files_exact":0,"bytes":7,"bytes_exact":3,"files_whole":1,
    "missing":["b.c"],"extra":[],"tokens":4,"seconds":0.5,"tokens_per_second":8.0,"output":"x","per_file":[
    {"path":"a.c","bytes":7,"tokens":4,"end":"whole","exact":false,"original_bytes":7,"bytes_exact":3,
    "first_difference":{"byte":3,"line":1,"column":4,"before":"int","original":" x","rebuilt":" y"}}]}"#;

const SWEEP: &str = "description = 'x'\nrecipe = 'sample'\n[set]\nepochs = 2\n[grid]\nseed = [1, 2]\n\
    lr_scheduler_type = ['linear', 'wsd']\n[[run]]\nname = 'a'\nbatch_size = 4\n";

const PTX: &str = ".version 9.0\n.target sm_80\n.address_size 64\n.global .align 4 .b8 table[16];\n\
    .entry fill(.param .u64 out, .param .u32 value) {\n.reg .b32 %r<4>;\n.reg .b64 %rd<3>;\n\
    .reg .pred %p<2>;\n.shared .align 16 .b8 tile[64];\nld.param.u64 %rd1, [out];\n\
    ld.param.u32 %r1, [value];\nmov.u32 %r2, %tid.x;\nmad.wide.u32 %rd2, %r2, 4, %rd1;\n\
    setp.lt.u32 %p1, %r2, 8;\n@%p1 bra L1;\nst.shared.u32 [tile], %r1;\nL1:\nbar.sync 0;\n\
    st.global.u32 [%rd2], %r1;\nret;\n}\n";

fn documents() -> Vec<Document> {
    vec![
        Document::new("a.c", "int main(void)\n{\n\treturn 0;\n}\n"),
        Document::new("b/c.h", "#define X 1234567\n/* café */\n"),
    ]
}

fn tokenizer(style: Style) -> Tokenizer {
    let training = Training { style, vocab_size: 270 };
    let documents = documents().into_iter().map(Ok);
    Tokenizer::train(documents, &training, |_| ()).expect("it trains").0
}

fn tar() -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, text) in [("a.c", "int x;\n"), ("b/c.h", "#define Y\n"), ("d.o", "skipped")] {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, text.as_bytes()).expect("it is in memory");
    }
    tar.into_inner().expect("it is in memory")
}

fn gz(bytes: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    out.write_all(bytes).expect("it is in memory");
    out.finish().expect("it is in memory")
}

fn xz(bytes: &[u8]) -> Vec<u8> {
    let options = lzma_rust2::XzOptions::with_preset(1);
    let mut out = lzma_rust2::XzWriter::new(Vec::new(), options).expect("it is in memory");
    out.write_all(bytes).expect("it is in memory");
    out.finish().expect("it is in memory")
}

/// A safetensors file of a header and bytes of zeros.
fn safetensors(header: &str, bytes: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.resize(file.len() + bytes, 0);
    file
}

fn text(input: &[u8]) -> anyhow::Result<&str> {
    Ok(std::str::from_utf8(input)?)
}

/// All targets, with folders for their files below `folder`.
pub fn all(folder: &Path) -> anyhow::Result<Vec<Target>> {
    let at = |name: &str| -> anyhow::Result<PathBuf> {
        let folder = folder.join(name);
        fs::create_dir_all(&folder)?;
        Ok(folder)
    };
    let saved: Vec<Vec<Vec<u8>>> = [Style::Exact, Style::Original]
        .into_iter()
        .map(|style| {
            let folder = at("tokenizer")?;
            tokenizer(style).save(&folder)?;
            let files = ["tokenizer.json", "tokenizer_config.json"];
            files.map(|name| Ok(fs::read(folder.join(name))?)).into_iter().collect()
        })
        .collect::<anyhow::Result<_>>()?;
    let own = saved.iter().map(|files| files[0].clone());
    let jsons: Vec<Vec<u8>> = own.chain(OTHER_TOKENIZERS.map(Vec::from)).collect();
    let configs: Vec<Vec<u8>> = saved.iter().map(|files| files[1].clone()).collect();
    let exact = jsons[0].clone();

    let (config, _) = Config::from_json(CONFIG)?;
    let layout = Layout::new(&config);
    let mut tensors = Vec::new();
    let mut end = 0;
    for parameter in &layout.parameters {
        let from = end;
        end += 4 * parameter.span.range().len();
        tensors.push(format!(
            "\"{}\":{{\"dtype\":\"F32\",\"shape\":{:?},\"data_offsets\":[{from},{end}]}}",
            parameter.name,
            parameter.shape()
        ));
    }
    let weights = safetensors(&format!("{{{}}}", tensors.join(",")), end);
    let state = r#"{"schema_version":2,"step":1,"total":2,"position":{"seed":42,"epoch":0,"cursor":1},"tokens":32,
        "skipped":0,"unlogged":[5.5,1],"settings":SETTINGS,"tokens_sha256":"00","backend":null}"#;
    let mut arenas: Vec<String> = Vec::new();
    let mut from = 0;
    for arena in ["master", "first_moment", "second_moment"] {
        for parameter in &layout.parameters {
            let to = from + 4 * parameter.span.range().len();
            arenas.push(format!(
                "\"{arena}/{}\":{{\"dtype\":\"F32\",\"shape\":{:?},\"data_offsets\":[{from},{to}]}}",
                parameter.name,
                parameter.shape()
            ));
            from = to;
        }
    }
    let settings = serde_json::to_string(&Settings::default())?;
    let state = state.replace("SETTINGS", &settings);
    let metadata = serde_json::json!({"state": state}).to_string();
    let training =
        safetensors(&format!("{{\"__metadata__\":{metadata},{}}}", arenas.join(",")), 3 * end);

    let tokens_folder = at("tokens")?;
    let tokens_file = tokens_folder.join("tokens");
    let exact_tokenizer = tokenizer(Style::Exact);
    let mut writer = TokenWriter::create(&tokens_file, &exact_tokenizer)?;
    writer.write(documents().into_iter().map(Ok), |_| ())?;
    writer.finish([0; 32])?;
    let tokens = fs::read(&tokens_file)?;

    let [model, state_folder, run, archive] = ["model", "state", "run", "archive"].map(at);
    let (model, state_folder, run) = (model?, state_folder?, run?);
    let archive = archive?.join("archive");
    fs::write(model.join("config.json"), CONFIG)?;
    fs::write(state_folder.join("config.json"), CONFIG)?;
    let recalled = at("recall")?;
    let pages = at("pages")?;
    fs::create_dir_all(pages.join("memorization"))?;
    fs::write(pages.join("metrics.jsonl"), METRICS)?;
    let limits = Limits { total: 1 << 24, file: 1 << 20, entries: 1000, names: 1 << 16 };
    let recipes = ["sample", "original", "linux-kernel-dir"]
        .map(|name| Ok(Recipe::find(name)?.resolved()?.into_bytes()))
        .into_iter()
        .collect::<anyhow::Result<Vec<_>>>()?;
    let state_layout = Layout::new(&config);

    Ok(vec![
        target("tokenizer", jsons, |input| {
            let tokenizer = Tokenizer::from_bytes(input.to_vec(), b"{}".to_vec())?;
            let ids = tokenizer.encode_prompt("int a = 12; <|pad|>\n\tcafé")?;
            tokenizer.decode_bytes(&ids).map(drop)
        }),
        target("tokenizer_config", configs, move |input| {
            Tokenizer::from_bytes(exact.clone(), input.to_vec()).map(drop)
        }),
        target("safetensors", vec![weights], move |input| {
            fs::write(model.join("model.safetensors"), input)?;
            model::load(&model).map(drop)
        }),
        target("config", vec![CONFIG.into()], |input| {
            let (config, _) = Config::from_json(text(input)?)?;
            config.validate()?;
            let _ =
                (config.parameter_count(), config.forward_flops(config.max_position_embeddings));
            Ok(())
        }),
        target("training_state", vec![training], move |input| {
            fs::write(state_folder.join("training_state.safetensors"), input)?;
            let saved = model::load_training_state(&state_folder, &state_layout)?;
            saved.map_or(Ok(()), |saved| {
                serde_json::from_value::<TrainState>(saved.state)?;
                Ok(())
            })
        }),
        target("train_state", vec![state.into()], |input| {
            serde_json::from_slice::<TrainState>(input)?;
            Ok(())
        }),
        target("tokens", vec![tokens], move |input| {
            fs::write(&tokens_file, input)?;
            let file = TokenFile::open(&tokens_file)?;
            for document in 0..file.documents().min(16) {
                let entry = file.document(document)?;
                let mut ids = vec![0; entry.tokens.len().min(256)];
                file.read(entry.tokens.start, &mut ids)?;
            }
            file.check_fits(270)?;
            file.verify()
        }),
        target("archive", vec![tar(), gz(&tar()), xz(&tar())], move |input| {
            fs::write(&archive, input)?;
            let options = CorpusOptions { limits, ..CorpusOptions::default() };
            let corpus = Corpus::open(&Source::Path(archive.clone()), options)?;
            corpus.documents()?.try_for_each(|document| document.map(drop))
        }),
        documents_in("jsonl", "packed.jsonl.zst", limits),
        documents_in("jsonl_gz", "packed.jsonl.gz", limits),
        documents_in("parquet", "snappy.parquet", limits),
        documents_in("parquet_zstd", "zstd.parquet", limits),
        documents_in("token_file", "gpt2.bin", limits),
        target("recipe", recipes, |input| Recipe::parse(text(input)?).map(drop)),
        target("sweep", vec![SWEEP.into()], |input| {
            Sweep::parse(text(input)?, Path::new("/nowhere")).map(drop)
        }),
        target("provenance", vec![PROVENANCE.into()], |input| {
            serde_json::from_slice::<Provenance>(input)?;
            Ok(())
        }),
        target("metrics", vec![METRICS.into(), METRICS.repeat(3).into()], move |input| {
            fs::write(run.join("metrics.jsonl"), input)?;
            RunFiles::read(&run).map(drop)
        }),
        target("recall", vec![RECALL.into()], move |input| {
            fs::write(recalled.join(recall::FILE), input)?;
            let head = RecallHead {
                schema_version: SchemaVersion,
                tokens_sha256: "00".to_string(),
                window_kind: WindowKind::Stream,
                context: 16,
                stride: 16,
                windows: 1 << 20,
            };
            Recall::read(&recalled, &head).map(drop)
        }),
        target("report", vec![HEAT.into(), REBUILD.into()], move |input| {
            let names =
                ["memorization/heat.json", "memorization/memorization.json", "rebuild.json"];
            let mut written = names.map(|name| {
                fs::write(pages.join(name), input)?;
                let written = laam::report::write(&pages);
                fs::remove_file(pages.join(name))?;
                written.map(drop)
            });
            // One of them suffices.
            written.sort_by_key(Result::is_err);
            let [first, ..] = written;
            first
        }),
        target("ptx", vec![PTX.into()], |input| {
            let module = ptx_race::Module::from_ptx(text(input)?)?;
            let Some(kernel) = module.kernel("fill") else { return Ok(()) };
            let memory = ptx_race::Memory::new();
            let out = memory.alloc_uninit(4 * 32);
            let args = [ptx_race::Arg::from(out), ptx_race::Arg::from(7u32)];
            let options = ptx_race::Options { threads: 1, ..ptx_race::Options::default() };
            kernel.launch(&memory, &ptx_race::Config::linear(1, 32), &args, &options)?;
            Ok(())
        }),
        target(
            "checksums",
            vec![
                format!("{}  linux-1.0.tar.xz\n{} *b.gz\n", "a".repeat(64), "B".repeat(64)).into(),
            ],
            |input| {
                let _ =
                    laam::corpus::checksum_in(&String::from_utf8_lossy(input), "linux-1.0.tar.xz");
                Ok(())
            },
        ),
    ])
}
