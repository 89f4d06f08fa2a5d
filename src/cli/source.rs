//! The arguments that name a corpus, the same wherever a command reads one.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use clap::Args;
use sha2::{Digest, Sha256};

use super::model::Opened;
use super::output::say;
use super::progress::{Downloads, Progress};
use super::train_tokenizer::encoding_of;
use crate::corpus::{
    Corpus, CorpusOptions, Encoding, LinuxRelease, MIRROR, Manifest, NameFilter, SAMPLE, Source,
    SourceOrigin, TokenVocabulary, Version, cache_folder, hex, shown,
};
use crate::error::{self, ErrorKind, Hint, with_flags};
use crate::files;
use crate::memorization::rebuild::check_apart;
use crate::model::Provenance;
use crate::output::remove_temporaries;
use crate::tokenizer::{Special, Style, Tokenizer};
use crate::tokens::{TokenFile, WindowKind};
use crate::train::prepare;
use crate::train::recipe::Recipe;

/// Where the text comes from. With none of these, the built-in sample.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Source")]
pub struct SourceArgs {
    /// A kernel of kernel.org, like v1.0/1.0 or v6.x/6.9.4: downloaded once, checked, cached
    #[arg(id = "kernel_version", long = "version", value_name = "V", conflicts_with = "source")]
    pub version: Option<String>,
    /// The server that has the kernels: the address of the folder that holds v1.0
    #[arg(long, value_name = "URL", default_value = MIRROR)]
    pub mirror_uri: String,
    /// Accept a kernel that the server has no checksum of
    #[arg(long)]
    pub unverified: bool,
    /// A folder, a .tar, .tar.gz or .tar.xz archive, or files: text, .jsonl (also .gz, .zst), .parquet, and
    /// .bin of llm.c or nanoGPT. A quoted glob, or the flag again, names several files. A text file is one
    /// document, longer than 64 MiB one for each MiB; the records of the others are documents without names
    #[arg(long, value_name = "PATH")]
    pub source: Vec<PathBuf>,
    /// The field of .jsonl, or the column of .parquet, that holds the text
    #[arg(long, value_name = "NAME", default_value = "text")]
    pub text_field: String,
    /// Only files that match a glob, whatever their suffix: '*.py' by name, 'doc/**' by path
    #[arg(long, value_name = "GLOB")]
    pub include: Vec<String>,
    /// No files that match a glob
    #[arg(long, value_name = "GLOB")]
    pub exclude: Vec<String>,
    /// Only the first N of the files, or documents, that count
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub limit: Option<u64>,
    /// Fail on a file that is not UTF-8 text instead of leaving it out
    #[arg(long)]
    pub strict: bool,
}

impl SourceArgs {
    /// The corpus, read as a tokenizer reads: see [`Self::corpus`].
    pub fn corpus_for(&self, tokenizer: &Tokenizer) -> anyhow::Result<Corpus> {
        open(&self.named(None)?, self.options_for(tokenizer)?)
    }

    /// Another corpus, read by the same arguments: what one word names, a path or a glob if there is one,
    /// else a kernel or the sample. `field` is what it is called in errors.
    pub fn other(&self, word: &str, field: &str, tokenizer: &Tokenizer) -> anyhow::Result<Corpus> {
        let is_path = Path::new(word).exists() || word.contains(['*', '?', '[']);
        let is_kernel = !is_path && word.parse::<Version>().is_ok();
        if !is_path && !is_kernel && word != "sample" {
            return Err(error::config(
                format!("invalid `{field}` {word:?}: no such file or folder"),
                "give a folder, an archive, files, a kernel version like v1.0/1.0, or sample",
            ));
        }
        let version = is_kernel.then(|| word.to_string());
        let source = is_path.then(|| word.into()).into_iter().collect();
        Self { version, source, ..self.clone() }.corpus_for(tokenizer)
    }

    /// True if the arguments name a source.
    fn is_named(&self) -> bool {
        !self.source.is_empty() || self.version.is_some()
    }

    /// The corpus of a recipe: the one that the arguments name, else the recipe's.
    pub fn corpus_of_recipe(&self, recipe: &Recipe) -> anyhow::Result<Corpus> {
        if recipe.requires_source && !self.is_named() {
            return Err(error::config(
                format!("no source for the recipe: {}", recipe.description),
                "name its text with `source` or `version`",
            ));
        }
        let corpus = self.corpus(recipe.version.as_deref(), encoding_of(recipe.tokenizer.style))?;
        let mut kinds = recipe.stages.iter().map(|stage| stage.settings.windows);
        let asks_for_names = recipe.rebuild || kinds.any(|kind| kind == WindowKind::Addressed);
        if asks_for_names && !corpus.has_names() {
            return Err(error::config(
                "documents without names, and a recipe that asks for files by their names",
                "use laam train, or a recipe with windows = \"stream\" and rebuild = false",
            ));
        }
        Ok(corpus)
    }

    /// The corpus that a model is measured on: the one that the arguments name, else the one that its
    /// provenance records, if that is the sample or a kernel release.
    pub fn corpus_of_model(&self, opened: &Opened) -> anyhow::Result<Corpus> {
        if self.is_named() {
            return self.corpus_for(&opened.tokenizer);
        }
        let record = opened.provenance.as_ref().map(|provenance| &provenance.corpus);
        let origin = record.and_then(|record| record.origin.clone());
        // Earlier versions recorded the sample by its name; the hash shows whether it is true.
        let is_sample = record.is_some_and(|record| record.name == SAMPLE);
        let source = match origin {
            Some(SourceOrigin::Release(version)) => {
                let mut release = release(&version, &self.mirror_uri, self.unverified)?;
                let url = record.and_then(|record| record.url.as_deref()).unwrap_or_default();
                if self.mirror_uri == MIRROR {
                    release.use_cached_mirror(url);
                }
                Source::Linux(release)
            }
            Some(SourceOrigin::Sample) => Source::Sample,
            None if is_sample => Source::Sample,
            _ => {
                let what = match record {
                    Some(record) if !record.name.is_empty() => {
                        let name = shown(record.name.as_bytes());
                        format!("the model was trained on a text that laam does not have: {name}")
                    }
                    _ => "the model does not say on which text it was trained".to_string(),
                };
                return Err(error::config(what, "name the text with `source` or `version`"));
            }
        };
        let mut options = self.options_for(&opened.tokenizer)?;
        if let Some(record) = record
            && self.limit.is_none()
            && self.include.is_empty()
            && self.exclude.is_empty()
        {
            options.filter = NameFilter::new(&record.include, &record.exclude)?;
            options.limit = record.limit;
            options.expected.clone_from(&record.manifest_sha256);
        }
        open(&source, options)
    }

    fn options(&self, encoding: Encoding) -> anyhow::Result<CorpusOptions> {
        Ok(CorpusOptions {
            filter: NameFilter::new(&self.include, &self.exclude)?,
            limit: self.limit.map(|limit| limit as usize),
            strict: self.strict,
            encoding,
            text_field: Some(self.text_field.clone()),
            ..CorpusOptions::default()
        })
    }

    /// The options of reading as a tokenizer reads.
    fn options_for(&self, tokenizer: &Tokenizer) -> anyhow::Result<CorpusOptions> {
        let Special { bos, eos, .. } = tokenizer.special();
        let vocabulary = Some(TokenVocabulary { size: tokenizer.vocab_size(), bos, eos });
        let encoding = encoding_of(tokenizer.style().unwrap_or(Style::Exact));
        Ok(CorpusOptions { vocabulary, ..self.options(encoding)? })
    }

    /// Opens the corpus that the arguments name, or `default` (a kernel's version, or None for the
    /// built-in sample) if they name none. Shows a download as it goes.
    pub fn corpus(&self, default: Option<&str>, encoding: Encoding) -> anyhow::Result<Corpus> {
        open(&self.named(default)?, self.options(encoding)?)
    }

    /// Source that the arguments name, or `default`.
    fn named(&self, default: Option<&str>) -> anyhow::Result<Source> {
        Ok(match (self.source.as_slice(), self.version.as_deref().or(default)) {
            ([path], _) => Source::Path(path.clone()),
            ([], Some(version)) => {
                Source::Linux(release(version, &self.mirror_uri, self.unverified)?)
            }
            ([], None) => Source::Sample,
            (paths, _) => Source::Paths(paths.to_vec()),
        })
    }
}

/// Refuses the output folder of a run that its source overlaps.
pub fn check_run_apart(folder: &Path, corpus: &Corpus) -> anyhow::Result<()> {
    corpus.places().into_iter().try_for_each(|source| {
        if source.is_dir() {
            check_apart(folder, source)
        } else {
            check_apart(&folder.join("rebuilt"), source)
        }
    })
}

/// Opens a corpus, and says which one it is.
fn open(source: &Source, options: CorpusOptions) -> anyhow::Result<Corpus> {
    let mut downloads = Downloads::default();
    let corpus = Corpus::open_telling(source, options, &mut |event| downloads.show(event))?;
    say!("source: {}", described(corpus.origin()));
    Ok(corpus)
}

/// A source for a person: `Linux v1.0/1.0 (URL)`, a path, `built-in sample`.
pub fn described(manifest: &Manifest) -> String {
    match &manifest.origin {
        SourceOrigin::Release(version) => format!("Linux {version} ({})", manifest.source),
        _ => manifest.source.clone(),
    }
}

/// Warns if a text is not one that a model was trained on, by its manifest.
pub fn warn_of_other_text(manifest: &Manifest, provenance: Option<&Provenance>) {
    let Some(provenance) = provenance else { return };
    let known = provenance.stages().filter_map(|stage| stage.corpus.manifest_sha256.as_deref());
    let known: Vec<&str> = known.collect();
    let found = manifest.hash();
    if let Some(last) = known.last()
        && !known.contains(&found.as_str())
    {
        say!(
            "warning: this is not the text that the model was trained on: its manifest sha256 is \
             {found}, the model's {}",
            shown(last.as_bytes())
        );
    }
}

/// A kernel's version and server as they were given.
pub fn release(version: &str, mirror_uri: &str, unverified: bool) -> anyhow::Result<LinuxRelease> {
    let release = LinuxRelease::new(version.parse::<Version>()?)?;
    Ok(LinuxRelease { mirror: mirror_uri.to_string(), unverified, ..release })
}

/// Path of a run's tokens: in the cache folder, one file per output folder. What killed runs
/// left there is removed.
pub fn token_cache(output: &Path) -> anyhow::Result<PathBuf> {
    let folder = cache_folder()?.join("tokens");
    for path in remove_temporaries(&folder, |name| name.ends_with(".tokens"))? {
        say!("removed {}", path.display());
    }
    let output = std::path::absolute(output).unwrap_or_else(|_| output.to_path_buf());
    let hash = hex(&Sha256::digest(output.as_os_str().as_encoded_bytes()));
    let name = output.file_name().unwrap_or_default().to_string_lossy();
    let name: String = name.chars().filter(char::is_ascii_alphanumeric).take(40).collect();
    let file = folder.join(format!("{name}-{}.tokens", &hash[..16]));
    files::check_regular(&file)
        .with_context(|| format!("cannot write {}", file.display()))
        .hint(ErrorKind::Data, || "remove it, or set LAAM_CACHE to another folder")?;
    Ok(file)
}

/// Writes a corpus as a token file, with progress unless `quiet`, and says what it left out.
pub fn tokenize(
    corpus: &Corpus,
    tokenizer: &Tokenizer,
    target: &Path,
    quiet: bool,
) -> anyhow::Result<(Arc<TokenFile>, Manifest)> {
    let mut progress = (!quiet).then(|| Progress::new("tokenized"));
    let (file, manifest) = prepare::tokenize(corpus, tokenizer, target, |bytes| {
        if let Some(progress) = &mut progress {
            progress.set(bytes, None);
        }
    })?;
    if let Some(progress) = &mut progress {
        progress.finish();
    }
    warn(&manifest);
    Ok((file, manifest))
}

/// Says on stderr what a pass left out.
pub fn warn(manifest: &Manifest) {
    for line in manifest.warnings() {
        let flag = |field: &str| (field == "include").then(|| "--include".to_string());
        say!("warning: {}", with_flags(&line, flag));
    }
}
