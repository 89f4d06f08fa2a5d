//! From a corpus to what a run reads: the token file, and the record of where its text came from.

use std::path::Path;
use std::sync::Arc;

use crate::corpus::{Corpus, Manifest, is_sample, unhex};
use crate::model::{CorpusRecord, License};
use crate::tokenizer::Tokenizer;
use crate::tokens::{TokenFile, TokenWriter};

/// Linux 1.0, by the hash of its manifest: known wherever the archive came from.
const LINUX_1_0: &str = "49083d3a3250618ea5ec287e87478e649bbaf3752246ac9d8aad3c40597804fc";

/// Writes the corpus as a token file and opens it. `progress` is told the bytes of text taken so far.
pub fn tokenize(
    corpus: &Corpus,
    tokenizer: &Tokenizer,
    target: &Path,
    progress: impl FnMut(u64),
) -> anyhow::Result<(Arc<TokenFile>, Manifest)> {
    let mut writer = TokenWriter::create(target, tokenizer)?;
    let mut documents = corpus.documents()?;
    writer.write(&mut documents, progress)?;
    let manifest = documents.into_manifest();
    writer.finish(unhex(&manifest.hash())?)?;
    Ok((Arc::new(TokenFile::open(target)?), manifest))
}

/// What a model's provenance says of its corpus: the paths, and nothing else about the files.
pub fn record(manifest: &Manifest) -> CorpusRecord {
    let hash = manifest.hash();
    let kernel = manifest.source.contains("kernel.org") || hash == LINUX_1_0;
    let license = if is_sample(&manifest.files) {
        License::Mit
    } else if kernel {
        License::Gpl2
    } else {
        License::Unknown
    };
    let remote = manifest.source.contains("://");
    CorpusRecord {
        name: manifest.source.clone(),
        url: remote.then(|| manifest.source.clone()),
        retrieved: manifest.retrieved.clone(),
        archive_sha256: manifest.archive_sha256.clone(),
        manifest_sha256: Some(hash),
        filter: manifest.filter.join(" "),
        license,
        paths: manifest.files.iter().map(|file| file.path.clone()).collect(),
    }
}
