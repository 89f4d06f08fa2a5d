//! `provenance.json`: the origin of a model, from the first weights to these. It lists the paths the
//! weights were trained on, and nothing else about those files: no lengths, no counts, no content.
//! It is made to be published: no path of the machine that trained, no user or token of a URL.

use std::collections::{BTreeSet, HashSet};
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::corpus::{ShardRecord, SourceOrigin};
use crate::schema::SchemaVersion;

/// Provenance of a model: its last training run, and all runs before it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Provenance {
    /// Version of the keys.
    pub schema_version: SchemaVersion,
    /// License of the weights; none in files of earlier versions (see [`Provenance::license`]).
    pub license: Option<License>,
    /// True if whoever trained the model set the license.
    #[serde(skip_serializing_if = "is_false")]
    pub license_is_given: bool,
    /// Training corpus.
    pub corpus: CorpusRecord,
    /// Sha256 of `tokenizer.json`.
    pub tokenizer_sha256: Option<String>,
    /// The settings that the training run really used, with the model's shape.
    pub recipe: serde_json::Value,
    /// Seed of initialization and sampling.
    pub seed: u64,
    /// The version of laam, with the commit if it is a release build.
    pub program_version: String,
    /// Backend by name.
    pub backend: String,
    /// The device in words.
    pub device: String,
    /// Start of the training run: UTC, RFC 3339.
    pub date: Option<String>,
    /// Wall time of the training run, all its sessions together.
    pub seconds: Option<f64>,
    /// Parts of the training run: one, and one for each time it was resumed.
    pub sessions: Vec<SessionRecord>,
    /// Sha256 of `model.safetensors`; saving fills it in.
    pub weights_sha256: Option<String>,
    /// Model whose weights were the first ones; none if they were random.
    pub parent: Option<ParentRecord>,
    /// Provenance of the parent and of its parents, oldest first. Theirs is empty.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub earlier_stages: Vec<Provenance>,
}

/// [`CorpusRecord::recognized`] of a kernel release.
pub const KERNEL_RELEASE: &str = "a kernel release";
/// [`CorpusRecord::recognized`] of text with files of Linux 1.0, after their number.
pub const KERNEL_FILES: &str = "files of Linux 1.0";

/// A parent model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ParentRecord {
    /// Sha256 of its `model.safetensors`; of several files, that of one line `SHA256  NAME` per file.
    pub weights_sha256: String,
    /// True if it had a provenance: the last of the earlier stages.
    pub has_provenance: bool,
}

/// A part of a training run without interruption.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SessionRecord {
    /// Start, as RFC 3339.
    pub date: String,
    /// Wall time.
    pub seconds: f64,
    /// Steps done before it, and after it.
    pub steps: (u64, u64),
    /// Version of laam.
    pub program_version: String,
    /// Name of the backend.
    pub backend: String,
    /// Device, in words.
    pub device: String,
    /// Most main memory that the process had, in bytes.
    pub peak_memory_bytes: u64,
    /// Processes that trained together; none if it was one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ranks: Option<usize>,
    /// What moved bytes between them, and their devices if those differ: `NCCL 2.32.3`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exchanges: Option<String>,
}

/// Training corpus, and its filter.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CorpusRecord {
    /// In words a reader knows: `Linux v1.0/1.0`, `local folder`.
    pub name: String,
    /// Kind of the source; none in files of earlier versions.
    pub origin: Option<SourceOrigin>,
    /// URL of the archive, without credentials.
    pub url: Option<String>,
    /// Time of retrieval: UTC, RFC 3339.
    pub retrieved: Option<String>,
    /// SHA-256 of the archive.
    pub archive_sha256: Option<String>,
    /// Sha256 of one line `SHA256  PATH` per file, sorted by path.
    pub manifest_sha256: Option<String>,
    /// Filter of the files, in words.
    pub filter: String,
    /// Globs of the filter, and the number of files asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub include: Vec<String>,
    /// Globs of files left out.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<String>,
    /// Number of files or documents asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<usize>,
    /// License of the text.
    #[serde(alias = "licence")]
    pub license: License,
    /// Recognized text, which decides the license if none is given: `a kernel release`,
    /// `506 files of Linux 1.0`, `the built-in sample`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recognized: Option<String>,
    /// Files of documents without names, in corpus order, and the field or column of their text.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub shards: Vec<ShardRecord>,
    /// Field or column of the text in shards.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text_field: Option<String>,
    /// Path of each file, in corpus order.
    pub paths: Vec<String>,
    /// Paths of the files that were held out: the last ones.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub held_out: Vec<String>,
    /// Number of held-out documents without names: the last ones.
    #[serde(skip_serializing_if = "is_zero")]
    pub held_out_documents: u64,
}

impl CorpusRecord {
    /// Notes that the last documents, with these paths, were held out.
    pub fn hold_out<'a>(&mut self, paths: impl Iterator<Item = &'a str>) {
        for path in paths {
            if path.is_empty() {
                self.held_out_documents += 1;
            } else {
                self.held_out.push(path.to_string());
            }
        }
        let held: HashSet<&str> = self.held_out.iter().map(String::as_str).collect();
        self.paths.retain(|path| !held.contains(path.as_str()));
    }
}

// As serde asks.
#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_zero(count: &u64) -> bool {
    *count == 0
}

// As serde asks.
#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_false(value: &bool) -> bool {
    !*value
}

/// Terms of a text or of weights.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum License {
    /// The Linux kernel's, version 2 alone.
    Gpl2,
    /// MIT.
    Mit,
    /// Text of the user's own, of which laam knows nothing.
    #[default]
    Unknown,
    /// Another identifier, as given: lower case letters, digits, `.`, `+` and `-`.
    Other(String),
}

impl License {
    /// Identifier in a Hugging Face model card.
    pub fn id(&self) -> &str {
        match self {
            Self::Gpl2 => "gpl-2.0",
            Self::Mit => "mit",
            Self::Unknown => "unknown",
            Self::Other(id) => id,
        }
    }

    /// License of weights trained on texts under two licenses. The kernel's prevails; otherwise two
    /// that differ give one that is not known.
    #[must_use]
    pub fn and(self, other: License) -> License {
        match (self, other) {
            (ours, theirs) if ours == theirs => ours,
            (Self::Gpl2, _) | (_, Self::Gpl2) => Self::Gpl2,
            (Self::Mit, Self::Other(id)) | (Self::Other(id), Self::Mit) => Self::Other(id),
            _ => Self::Unknown,
        }
    }
}

impl FromStr for License {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let id = text.to_ascii_lowercase();
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b".+-".contains(&byte);
        match id.as_str() {
            "gpl-2.0" | "gpl-2.0-only" => Ok(Self::Gpl2),
            "mit" => Ok(Self::Mit),
            "unknown" => Ok(Self::Unknown),
            _ if (1..=64).contains(&id.len())
                && id.bytes().all(plain)
                && id.as_bytes()[0].is_ascii_alphanumeric() =>
            {
                Ok(Self::Other(id))
            }
            _ => Err("a license is an identifier like apache-2.0"),
        }
    }
}

impl fmt::Display for License {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.id())
    }
}

impl Serialize for License {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.id())
    }
}

/// An identifier that is none is read as an unknown license: it goes on into a model card.
impl<'de> Deserialize<'de> for License {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let id = String::deserialize(deserializer)?;
        Ok(id.parse().unwrap_or_default())
    }
}

impl Provenance {
    /// License of the weights.
    pub fn license(&self) -> &License {
        self.license.as_ref().unwrap_or(&self.corpus.license)
    }

    /// True if the text of this stage has files of the kernel that are under the GPL, whatever license
    /// was set.
    pub fn is_kernel(&self) -> bool {
        let recognized = self.corpus.recognized.as_deref().unwrap_or_default();
        recognized == KERNEL_RELEASE
            || recognized.ends_with(KERNEL_FILES)
            || (self.corpus.license == License::Gpl2 && !self.license_is_given)
    }

    /// Every stage of training, oldest first; the last is this one.
    pub fn stages(&self) -> impl Iterator<Item = &Provenance> {
        self.earlier_stages.iter().chain([self])
    }

    /// Every path the weights were ever trained on, once each, in order.
    pub fn paths(&self) -> Vec<String> {
        let mut seen = HashSet::new();
        let all = self.stages().flat_map(|stage| &stage.corpus.paths);
        all.filter(|path| seen.insert(path.as_str())).cloned().collect()
    }

    /// Paths that a stage held out and none was trained on.
    pub fn held_out(&self) -> BTreeSet<&str> {
        let trained: HashSet<&str> =
            self.stages().flat_map(|stage| &stage.corpus.paths).map(String::as_str).collect();
        let held = self.stages().flat_map(|stage| &stage.corpus.held_out).map(String::as_str);
        held.filter(|path| !trained.contains(path)).collect()
    }

    /// Names of the files of documents without names that the weights were ever trained on.
    pub fn shards(&self) -> Vec<&str> {
        let shards = self.stages().flat_map(|stage| &stage.corpus.shards);
        shards.map(|shard| shard.name.as_str()).collect()
    }

    /// Sets the license of the weights: as given, else what follows from the text and the parents.
    pub fn set_license(&mut self, given: Option<License>) {
        self.license_is_given = given.is_some();
        if let Some(given) = &given {
            self.corpus.license = given.clone();
        }
        let license = given.unwrap_or_else(|| {
            let inherited = match (&self.parent, self.earlier_stages.last()) {
                (Some(parent), Some(last)) if parent.has_provenance => Some(last.license().clone()),
                (Some(_), _) => Some(License::Unknown),
                (None, _) => None,
            };
            let own = self.corpus.license.clone();
            inherited.map_or(own.clone(), |inherited| inherited.and(own))
        });
        self.license = Some(license);
    }

    /// Makes a model the parent: its provenance, if it has one, becomes the last earlier stage.
    pub fn set_parent(&mut self, weights_sha256: String, provenance: Option<Provenance>) {
        let has_provenance = provenance.is_some();
        self.parent = Some(ParentRecord { weights_sha256, has_provenance });
        self.earlier_stages.clear();
        if let Some(mut last) = provenance {
            self.earlier_stages = std::mem::take(&mut last.earlier_stages);
            self.earlier_stages.push(last);
        }
    }

    /// Takes over what a run that is resumed had recorded: its text as first retrieved, its parents,
    /// its sessions. The license stays as set now if it is given.
    pub fn resume(&mut self, saved: Provenance) {
        if saved.corpus.manifest_sha256 == self.corpus.manifest_sha256 {
            self.corpus.retrieved = saved.corpus.retrieved;
        }
        if saved.parent.is_some() {
            (self.parent, self.earlier_stages) = (saved.parent, saved.earlier_stages);
        }
        if !self.license_is_given {
            let given = saved.license.filter(|_| saved.license_is_given);
            self.set_license(given);
        }
        (self.date, self.sessions) = (saved.date, saved.sessions);
    }

    /// Adds a session that begins now, after `steps`.
    pub fn begin_session(&mut self, session: SessionRecord) {
        self.program_version.clone_from(&session.program_version);
        self.backend.clone_from(&session.backend);
        self.device.clone_from(&session.device);
        self.date.get_or_insert_with(|| session.date.clone());
        self.sessions.push(session);
    }

    /// Notes the processes of the last session, and what moves bytes between them.
    pub fn note_ranks(&mut self, ranks: usize, exchanges: String) {
        if let Some(last) = self.sessions.last_mut() {
            (last.ranks, last.exchanges) = (Some(ranks), Some(exchanges));
        }
    }

    /// Updates the last session.
    pub fn end_session(&mut self, seconds: f64, steps: u64, peak_memory_bytes: u64) {
        if let Some(last) = self.sessions.last_mut() {
            last.seconds = seconds;
            last.steps.1 = steps;
            last.peak_memory_bytes = peak_memory_bytes;
        }
        self.seconds = Some(self.sessions.iter().map(|session| session.seconds).sum());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stage(path: &str, license: License) -> Provenance {
        let corpus =
            CorpusRecord { paths: vec![path.to_string()], license, ..CorpusRecord::default() };
        let mut provenance = Provenance { corpus, ..Provenance::default() };
        provenance.set_license(None);
        provenance
    }

    #[test]
    fn licenses_and_paths_are_inherited_over_any_number_of_stages() {
        let mut model = stage("linux/a.c", License::Gpl2);
        // As deep as serde_json reads nested objects, and more.
        for number in 0..150 {
            let mut next = stage("own.c", License::Unknown);
            next.set_parent(number.to_string(), Some(model));
            next.set_license(None);
            let json = serde_json::to_string(&next).unwrap();
            model = serde_json::from_str(&json).unwrap();
            assert_eq!(model, next);
        }
        assert_eq!(model.license(), &License::Gpl2);
        assert_eq!(model.stages().count(), 151);
        assert_eq!(model.paths(), ["linux/a.c", "own.c"]);
        assert!(model.earlier_stages.iter().all(|stage| stage.earlier_stages.is_empty()));
        model.set_license(Some(License::Mit));
        assert_eq!(model.license(), &License::Mit);

        // Of a parent that says nothing, nothing is known.
        let mut next = stage("own.c", License::Mit);
        next.set_parent("hash".to_string(), None);
        next.set_license(None);
        assert_eq!(next.license(), &License::Unknown);
    }

    #[test]
    fn license_identifiers_are_plain() {
        let parse = |text: &str| text.parse::<License>().map(|license| license.id().to_string());
        assert_eq!(parse("Apache-2.0").unwrap(), "apache-2.0");
        assert_eq!(parse("GPL-2.0-only").unwrap(), "gpl-2.0");
        for bad in ["", "a b", "mit\n---", "-x", "`", &"a".repeat(65)] {
            assert!(parse(bad).is_err(), "{bad}");
            let read: License = serde_json::from_value(serde_json::json!(bad)).unwrap();
            assert_eq!(read, License::Unknown);
        }
        let apache = License::Other("apache-2.0".to_string());
        assert_eq!(apache.clone().and(License::Mit), apache);
        assert_eq!(apache.and(License::Unknown), License::Unknown);
    }
}
