//! The arguments that name a corpus, the same wherever a command reads one.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;

use super::output::say;
use super::progress::{Downloads, Progress};
use super::train_tokenizer::encoding_of;
use crate::corpus::{
    Corpus, CorpusOptions, Encoding, LinuxRelease, MIRROR, Manifest, Source, Version,
};
use crate::memorization::rebuild::check_apart;
use crate::tokenizer::{Style, Tokenizer};
use crate::tokens::TokenFile;
use crate::train::prepare;

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
    /// A folder, or a .tar, .tar.gz or .tar.xz archive
    #[arg(long, value_name = "PATH")]
    pub source: Option<PathBuf>,
    /// Only the first N of the files that count
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub limit: Option<u64>,
    /// Fail on a file that is not UTF-8 text instead of leaving it out
    #[arg(long)]
    pub strict: bool,
}

impl SourceArgs {
    /// Refuses an output folder that a named source overlaps.
    pub fn check_apart(&self, output: &Path) -> anyhow::Result<()> {
        match &self.source {
            Some(source) if source.is_dir() => check_apart(output, source),
            Some(source) => check_apart(&output.join("rebuilt"), source),
            None => Ok(()),
        }
    }

    /// The corpus, read as a tokenizer reads: see [`Self::corpus`].
    pub fn corpus_for(&self, tokenizer: &Tokenizer) -> anyhow::Result<Corpus> {
        self.corpus(None, encoding_of(tokenizer.style().unwrap_or(Style::Exact)))
    }

    /// Opens the corpus that the arguments name, or `default` (a kernel's version, or None for the
    /// built-in sample) where they name none. Shows a download as it goes.
    pub fn corpus(&self, default: Option<&str>, encoding: Encoding) -> anyhow::Result<Corpus> {
        let options = CorpusOptions {
            limit: self.limit.map(|limit| limit as usize),
            strict: self.strict,
            encoding,
            ..CorpusOptions::default()
        };
        let source = match (&self.source, self.version.as_deref().or(default)) {
            (Some(path), _) => Source::Path(path.clone()),
            (None, Some(version)) => {
                Source::Linux(release(version, &self.mirror_uri, self.unverified)?)
            }
            (None, None) => Source::Sample,
        };
        let mut downloads = Downloads::default();
        Corpus::open_telling(&source, options, &mut |event| downloads.show(event))
    }
}

/// A kernel's version and server as they were given.
pub fn release(version: &str, mirror_uri: &str, unverified: bool) -> anyhow::Result<LinuxRelease> {
    let release = LinuxRelease::new(version.parse::<Version>()?)?;
    Ok(LinuxRelease { mirror: mirror_uri.to_string(), unverified, ..release })
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
        say!("warning: {line}");
    }
}
