//! `provenance.json`: the origin of a model. It lists the paths the weights were trained on, and
//! nothing else about those files: no lengths, no counts, no content.

use serde::{Deserialize, Serialize};

use crate::schema::SchemaVersion;

/// Provenance of a model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Provenance {
    pub schema_version: SchemaVersion,
    pub corpus: CorpusRecord,
    /// Sha256 of `tokenizer.json`.
    pub tokenizer_sha256: Option<String>,
    /// The resolved settings of the training run.
    pub recipe: serde_json::Value,
    pub seed: u64,
    /// The version of laam.
    pub program_version: String,
    /// Backend, and the device in words.
    pub device: String,
    /// Sha256 of `model.safetensors`; saving fills it in.
    pub weights_sha256: Option<String>,
}

/// Training corpus, and its filter.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CorpusRecord {
    /// In words a reader knows: `Linux v1.0/1.0`, or the path that was given.
    pub name: String,
    /// URL of the archive.
    pub url: Option<String>,
    /// Time of retrieval: UTC, RFC 3339.
    pub retrieved: Option<String>,
    pub archive_sha256: Option<String>,
    /// Sha256 of one line `SHA256  PATH` per file, sorted by path.
    pub manifest_sha256: Option<String>,
    /// Filter of the files, in words.
    pub filter: String,
    #[serde(alias = "licence")]
    pub license: License,
    /// Path of each file, in corpus order.
    pub paths: Vec<String>,
}

/// The terms of the text, which decide how the weights are marked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum License {
    /// The Linux kernel's, version 2 alone.
    #[serde(rename = "gpl-2.0")]
    Gpl2,
    #[serde(rename = "mit")]
    Mit,
    /// Text of the user's own, of which laam knows nothing.
    #[default]
    #[serde(rename = "unknown")]
    Unknown,
}

impl License {
    /// Identifier in a Hugging Face model card.
    pub fn id(self) -> &'static str {
        match self {
            Self::Gpl2 => "gpl-2.0",
            Self::Mit => "mit",
            Self::Unknown => "unknown",
        }
    }
}
