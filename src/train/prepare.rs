//! From a corpus to what a run reads: the token file, and the record of where its text came from.

use std::path::Path;
use std::sync::Arc;

use crate::corpus::{
    Corpus, Manifest, SourceOrigin, is_linux_1_0, is_part_of_sample, linux_1_0_files, unhex,
};
use crate::model::{CorpusRecord, KERNEL_FILES, KERNEL_RELEASE, License};
use crate::tokenizer::Tokenizer;
use crate::tokens::{TokenFile, TokenWriter};

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
    let mut manifest = documents.into_manifest();
    manifest.decoded_bytes = writer.decoded_bytes();
    writer.finish(unhex(&manifest.hash())?)?;
    Ok((Arc::new(TokenFile::open(target)?), manifest))
}

/// Record of a corpus in a model's provenance: the paths in it, and nothing else about the files.
/// No path of this machine: the record is published.
pub fn record(manifest: &Manifest) -> CorpusRecord {
    let hash = manifest.hash();
    let (license, recognized) = recognize(manifest);
    let is_release = matches!(manifest.origin, SourceOrigin::Release(_));
    CorpusRecord {
        name: name(manifest, &hash),
        origin: Some(manifest.origin.clone()),
        url: is_release.then(|| manifest.source.clone()),
        retrieved: manifest.retrieved.clone(),
        archive_sha256: manifest.archive_sha256.clone(),
        manifest_sha256: Some(hash),
        filter: filter(manifest),
        include: manifest.include.clone(),
        exclude: manifest.exclude.clone(),
        limit: manifest.limit,
        license,
        recognized,
        text_field: manifest.text_field.clone(),
        shards: manifest.shards.clone(),
        paths: manifest.files.iter().map(|file| file.path.clone()).collect(),
        ..CorpusRecord::default()
    }
}

/// License of a text by what the text is, never by what it is called.
fn recognize(manifest: &Manifest) -> (License, Option<String>) {
    let files = &manifest.files;
    let in_shards: u64 = manifest.shards.iter().map(|shard| shard.linux_files).sum();
    if manifest.shards.is_empty() && is_part_of_sample(files) {
        return (License::Mit, Some("the built-in sample".to_string()));
    }
    if let SourceOrigin::Release(version) = &manifest.origin {
        return if is_before_gpl(version) {
            (License::Unknown, Some(format!("{KERNEL_RELEASE} from before the GPL")))
        } else {
            (License::Gpl2, Some(KERNEL_RELEASE.to_string()))
        };
    }
    match linux_1_0_files(files) as u64 + in_shards {
        0 => (License::Unknown, None),
        // One file of the kernel among others is enough for its terms to matter.
        some => (License::Gpl2, Some(format!("{some} {KERNEL_FILES}"))),
    }
}

/// True for Linux 0.01 to 0.11: the kernel came under the GPL with 0.12, in February 1992.
fn is_before_gpl(version: &str) -> bool {
    let number = version.rsplit('/').next().unwrap_or_default();
    let minor = number.strip_prefix("0.").unwrap_or_default();
    let digits: String = minor.chars().take_while(char::is_ascii_digit).collect();
    digits.len() == 2 && digits.as_str() < "12"
}

fn name(manifest: &Manifest, hash: &str) -> String {
    let local = match &manifest.origin {
        SourceOrigin::Sample => return manifest.source.clone(),
        SourceOrigin::Release(version) => return format!("Linux {version}"),
        _ if is_linux_1_0(hash) => return "Linux 1.0".to_string(),
        SourceOrigin::Folder => "local folder",
        SourceOrigin::Archive => "local archive",
        SourceOrigin::File => "local file",
        SourceOrigin::Files => "local files",
        SourceOrigin::Shards => "local files of documents",
    };
    match linux_1_0_files(&manifest.files) {
        0 => local.to_string(),
        some if some == manifest.files.len() => format!("{some} {KERNEL_FILES}"),
        some => format!("{local} with {some} {KERNEL_FILES}"),
    }
}

/// The filter in words.
fn filter(manifest: &Manifest) -> String {
    let mut words = if manifest.include.is_empty() {
        manifest.filter.join(" ")
    } else {
        manifest.include.join(" ")
    };
    if !manifest.exclude.is_empty() {
        words = format!("{words}, without {}", manifest.exclude.join(" "));
    }
    if let Some(limit) = manifest.limit {
        words = format!("{words}, the first {limit}");
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn release(version: &str) -> CorpusRecord {
        let file = crate::corpus::FileRecord {
            path: "linux/a.c".to_string(),
            sha256: "ab".repeat(32),
            bytes: 3,
        };
        let origin = SourceOrigin::Release(version.to_string());
        record(&Manifest { origin, files: vec![file], ..Manifest::default() })
    }

    #[test]
    fn releases_since_0_12_are_gpl() {
        for version in ["v1.0/1.0", "v6.x/6.9.4", "Historic/0.12", "Historic/0.99", "v1.1/1.1.0"] {
            assert_eq!(release(version).license, License::Gpl2, "{version}");
        }
        for version in ["Historic/0.01", "Historic/0.11"] {
            assert_eq!(release(version).license, License::Unknown, "{version}");
        }
        assert_eq!(release("v1.0/1.0").name, "Linux v1.0/1.0");
    }
}
