//! Files of a run directory.

use std::io;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::Deserialize;
use serde_json::Value;

use crate::error::{self, ErrorKind, Hint};
use crate::files;
use crate::schema::upgrade;

/// Size limit of a file: a long run's metrics have some 100 MB, as have the heat strips of a kernel.
const MAX_FILE_BYTES: u64 = 1 << 30;

/// Content of a run directory. Missing files are missing on the page.
#[derive(Debug, Default)]
pub struct RunFiles {
    /// The name of its folder.
    pub name: String,
    /// Its path, as it was given.
    pub folder: PathBuf,
    /// The path of its model.
    pub model: PathBuf,
    /// The resolved recipe, as TOML.
    pub recipe: Option<String>,
    /// Training runs, one per stage.
    pub stages: Vec<StageMetrics>,
    /// `provenance.json` and `config.json` of the model; null if there is none.
    pub provenance: Value,
    /// `config.json` of the model.
    pub config: Value,
    /// Written by `laam memorization --report`.
    pub memorization: Value,
    /// Heat strips of the files.
    pub heat: Vec<HeatStrip>,
    /// Output of `laam rebuild --json`.
    pub rebuild: Value,
}

/// One training run.
#[derive(Debug)]
pub struct StageMetrics {
    pub name: String,
    pub lines: Vec<MetricsLine>,
}

/// A line of `metrics.jsonl`. Numbers that were not finite are none.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct MetricsLine {
    pub step: u64,
    pub loss: Option<f64>,
    pub learning_rate: Option<f64>,
    pub muon_learning_rate: Option<f64>,
    pub grad_norm: Option<f64>,
    pub tokens: u64,
    #[serde(alias = "tokens_a_second")]
    pub tokens_per_second: Option<f64>,
    pub verbatim_rate: Option<f64>,
    pub validation_loss: Option<f64>,
    pub seconds: Option<f64>,
}

impl StageMetrics {
    /// Wall time. `seconds` starts again from 0 if a run was resumed.
    pub fn seconds(&self) -> f64 {
        let (mut total, mut before) = (0.0, 0.0);
        for seconds in self.lines.iter().filter_map(|line| line.seconds) {
            total += if seconds < before { seconds } else { seconds - before };
            before = seconds;
        }
        total
    }
}

/// Heat strip of a file: see [`crate::memorization::measure::FileHeat`].
#[derive(Debug, Deserialize)]
pub struct HeatStrip {
    pub path: String,
    pub text: String,
    pub cells: Vec<(u32, Option<f32>)>,
    pub wrong: Vec<(u32, u32)>,
}

/// `heat.json`: in schema version 1 the bare list.
#[derive(Deserialize)]
#[serde(untagged)]
enum HeatFile {
    Versioned { files: Vec<HeatStrip> },
    List(Vec<HeatStrip>),
}

impl HeatFile {
    fn files(self) -> Vec<HeatStrip> {
        match self {
            Self::Versioned { files } | Self::List(files) => files,
        }
    }
}

impl RunFiles {
    /// Reads the folder of a `laam run`, or the output of a `laam train`.
    pub fn read(folder: &Path) -> anyhow::Result<Self> {
        let name = folder.canonicalize().ok();
        let name = name.as_deref().and_then(Path::file_name).unwrap_or(folder.as_os_str());
        let mut run = Self { name: name.to_string_lossy().into_owned(), ..Self::default() };
        let identity = document(&folder.join("run.json"))?;
        let model = if let Some(identity) = identity {
            run.recipe = identity["recipe"].as_str().map(String::from);
            let names = stage_names(run.recipe.as_deref().unwrap_or_default());
            for name in &names {
                let lines = metrics(&folder.join(name).join("metrics.jsonl"))?.unwrap_or_default();
                run.stages.push(StageMetrics { name: name.clone(), lines });
            }
            folder.join(names.last().map_or("model", String::as_str))
        } else {
            // The metrics of a run may have gone elsewhere.
            let lines = metrics(&folder.join("metrics.jsonl"))?;
            let lines = match lines {
                None if folder.join("provenance.json").exists() => Some(Vec::new()),
                lines => lines,
            };
            let Some(lines) = lines else {
                return Err(error::data(
                    format!("{} is not a run directory (no run.json)", folder.display()),
                    "give the output folder of laam run or laam train",
                ));
            };
            run.stages.push(StageMetrics { name: "train".to_string(), lines });
            folder.to_path_buf()
        };
        run.folder = folder.to_path_buf();
        run.model.clone_from(&model);
        run.provenance = document(&model.join("provenance.json"))?.unwrap_or_default();
        run.config = json(&model.join("config.json"))?.unwrap_or_default();
        let measures = folder.join("memorization");
        run.memorization = document(&measures.join("memorization.json"))?.unwrap_or_default();
        run.heat =
            json::<HeatFile>(&measures.join("heat.json"))?.map_or(Vec::new(), HeatFile::files);
        run.rebuild = document(&folder.join("rebuild.json"))?.unwrap_or_default();
        Ok(run)
    }
}

/// The table of a sweep, if the folder is a sweep's.
pub fn read_sweep(folder: &Path) -> anyhow::Result<Option<Value>> {
    if folder.join("run.json").exists() {
        return Ok(None);
    }
    document(&folder.join("table.json"))
}

/// The text of a file, if there is one.
fn text(path: &Path) -> anyhow::Result<Option<String>> {
    match files::read_text(path, MAX_FILE_BYTES) {
        Ok(text) => Ok(Some(text)),
        Err(none) if none.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(cause) => Err(cause)
            .with_context(|| format!("cannot read {}", path.display()))
            .hint(ErrorKind::Data, || "make it readable, or run the same laam run again"),
    }
}

fn json<T: for<'de> Deserialize<'de>>(path: &Path) -> anyhow::Result<Option<T>> {
    let Some(text) = text(path)? else { return Ok(None) };
    let value = serde_json::from_str(&text)
        .with_context(|| format!("invalid {}", path.display()))
        .hint(ErrorKind::Data, || "remove it and run the same laam run again")?;
    Ok(Some(value))
}

/// A document with today's keys.
fn document(path: &Path) -> anyhow::Result<Option<Value>> {
    let Some(document) = json(path)? else { return Ok(None) };
    upgrade(document).with_context(|| format!("cannot read {}", path.display())).map(Some)
}

/// The lines of a metrics file; a last one that was cut short is left out.
fn metrics(path: &Path) -> anyhow::Result<Option<Vec<MetricsLine>>> {
    let text = text(path)?;
    Ok(text.map(|text| text.lines().map_while(|line| serde_json::from_str(line).ok()).collect()))
}

/// The stages of a recipe, in order: those whose names can be folders'.
fn stage_names(recipe: &str) -> Vec<String> {
    let plain = |name: &&str| {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        !name.is_empty() && name.chars().all(plain)
    };
    let recipe: toml::Table = toml::from_str(recipe).unwrap_or_default();
    let stages = recipe.get("stage").and_then(|stages| stages.as_array());
    let names = stages.into_iter().flatten().filter_map(|stage| stage.get("name")?.as_str());
    names.filter(plain).map(String::from).collect()
}
