//! Training metrics: `metrics.jsonl`, one object per logged step.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;

use anyhow::Context;
use serde::{Deserialize, Serialize};

use crate::error::{ErrorKind, Hint};
use crate::files::{self, write_atomically};
use crate::output::refuse_foreign;
use crate::schema::SchemaVersion;

/// Name of the file in a model folder.
pub const FILE: &str = "metrics.jsonl";
/// Longer files are refused: a million lines have some 200 MB.
pub const MAX_METRICS: u64 = 1 << 30;

/// One line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// Version of the keys.
    #[serde(default)]
    pub schema_version: SchemaVersion,
    /// Updates so far, from 1.
    pub step: u64,
    /// Times through all windows so far.
    pub epoch: f64,
    /// Mean over the steps since the last line, in nats per token; null where none was finite.
    #[serde(deserialize_with = "number")]
    pub loss: f64,
    /// AdamW's rate in this step.
    pub learning_rate: f64,
    /// Muon's rate in this step, if it is used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub muon_learning_rate: Option<f64>,
    /// Gradient norm of this step before clipping; null if not finite, in which case there was no update.
    #[serde(deserialize_with = "number")]
    pub grad_norm: f64,
    /// Tokens trained on so far, padding included.
    pub tokens: u64,
    /// Since the last line: windows x context over wall time.
    #[serde(alias = "tokens_a_second")]
    pub tokens_per_second: f64,
    /// Model FLOPs utilization since the last line: useful FLOPs of matmuls and attention over the
    /// device's peak, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mfu: Option<f64>,
    /// Since the run, or what resumed it, began.
    pub seconds: f64,
    /// Processes that train together, if there are several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ranks: Option<usize>,
    /// Least and most seconds that a process spent in exchanges since the last line: the slowest one waits
    /// least.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wait_seconds: Option<[f64; 2]>,
    /// Updates left out so far, because gradients were not finite.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub skipped: u64,
    /// Part of the windows that come back verbatim, where it was measured at this step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verbatim_rate: Option<f64>,
    /// Mean loss of the validation text in nats per token, where it was measured at this step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation_loss: Option<f64>,
    /// Text that the model wrote after this step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sample: Option<String>,
    /// Resident main memory of the process, where the system reports it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // as serde asks
fn is_zero(count: &u64) -> bool {
    *count == 0
}

/// JSON writes what is not finite as null.
fn number<'de, D: serde::Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or(f64::NAN))
}

impl Metrics {
    /// The numbers of a line that TensorBoard draws, by tag.
    pub fn scalars(&self) -> Vec<(&'static str, f64)> {
        let mut scalars = vec![
            ("train/loss", self.loss),
            ("train/learning_rate", self.learning_rate),
            ("train/grad_norm", self.grad_norm),
            ("train/epoch", self.epoch),
            ("train/tokens_per_second", self.tokens_per_second),
        ];
        scalars.extend(self.muon_learning_rate.map(|rate| ("train/muon_learning_rate", rate)));
        scalars.extend(self.mfu.map(|mfu| ("train/mfu", mfu)));
        scalars.extend(self.verbatim_rate.map(|rate| ("eval/verbatim_rate", rate)));
        scalars.extend(self.validation_loss.map(|loss| ("eval/validation_loss", loss)));
        scalars.extend(self.memory_bytes.map(|bytes| ("system/memory_bytes", bytes as f64)));
        scalars
    }
}

/// The lines that stay when a run opens its metrics file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeptLines {
    None,
    /// Those of runs before this one.
    All,
    /// So many of runs before this one, then those of this run up to a step.
    Resumed {
        earlier: usize,
        step: u64,
    },
}

/// True if laam wrote the file, or there is none, or nothing in it.
pub fn is_own(path: &Path) -> bool {
    match files::read(path, MAX_METRICS) {
        Err(error) => error.kind() == std::io::ErrorKind::NotFound || files::is_irregular(path),
        Ok(text) => {
            let first = text.split(|&byte| byte == b'\n').next().unwrap_or_default();
            let is_cut_short =
                first.len() == text.len() && first.starts_with(b"{\"schema_version\"");
            first.is_empty() || is_cut_short || serde_json::from_slice::<Metrics>(first).is_ok()
        }
    }
}

/// `metrics.jsonl`, open for more lines.
pub struct MetricsFile {
    file: Box<dyn Write + Send>,
    path: String,
}

impl MetricsFile {
    /// Opens the file with the lines that are kept, and returns how many; what a resumed run says again is
    /// not said twice. A last line that a crash cut short goes. `-` is stdout; it and what is not a regular
    /// file gets the new lines alone.
    ///
    /// # Errors
    /// The file cannot be written, or laam did not write what is in it.
    pub fn open(path: &Path, keep: KeptLines) -> anyhow::Result<(Self, usize)> {
        let advice = || "choose a writable path with `output_path` or `metrics`";
        let name = path.display().to_string();
        if path == Path::new("-") {
            return Ok((Self { file: Box::new(std::io::stdout()), path: name }, 0));
        }
        let mut kept = Vec::new();
        let mut count = 0;
        let is_irregular = files::is_irregular(path);
        if !is_irregular {
            refuse_foreign(
                &(!is_own(path)).then(|| path.to_path_buf()).into_iter().collect::<Vec<_>>(),
            )?;
            if keep != KeptLines::None && path.exists() {
                let text = files::read(path, MAX_METRICS)
                    .with_context(|| format!("cannot read {name}"))
                    .hint(ErrorKind::Data, || "remove it, or choose another `metrics`")?;
                for line in text.split(|&byte| byte == b'\n') {
                    let Ok(metrics) = serde_json::from_slice::<Metrics>(line) else { break };
                    if let KeptLines::Resumed { earlier, step } = keep
                        && count >= earlier
                        && metrics.step > step
                    {
                        break;
                    }
                    kept.extend_from_slice(line);
                    kept.push(b'\n');
                    count += 1;
                }
            }
            write_atomically(path, &kept)?;
        }
        let opened = if is_irregular {
            files::open_irregular(path)
        } else {
            OpenOptions::new().append(true).open(path)
        };
        let file =
            opened.with_context(|| format!("cannot write {name}")).hint(ErrorKind::Data, advice)?;
        Ok((Self { file: Box::new(file), path: name }, count))
    }

    /// Adds a line.
    pub fn write(&mut self, metrics: &Metrics) -> anyhow::Result<()> {
        let line = serde_json::to_string(metrics)? + "\n";
        self.file
            .write_all(line.as_bytes())
            .with_context(|| format!("cannot write {}", self.path))
            .hint(
                ErrorKind::Data,
                || "check that the disk has room; `resume` continues from the last checkpoint",
            )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resumed_metrics_repeat_no_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let at = |step| Metrics {
            schema_version: SchemaVersion,
            step,
            epoch: 0.5,
            loss: 1.0,
            learning_rate: 1e-3,
            muon_learning_rate: None,
            grad_norm: 2.0,
            tokens: 10,
            tokens_per_second: 5.0,
            mfu: None,
            seconds: 2.0,
            ranks: None,
            wait_seconds: None,
            skipped: 0,
            verbatim_rate: None,
            validation_loss: None,
            sample: None,
            memory_bytes: None,
        };
        let open = |keep| MetricsFile::open(&path, keep).unwrap();
        let (mut file, _) = open(KeptLines::None);
        // A step that diverged is a line like any other.
        file.write(&Metrics { loss: f64::NAN, grad_norm: f64::INFINITY, ..at(10) }).unwrap();
        for step in [20, 30] {
            file.write(&at(step)).unwrap();
        }
        file.file.write_all(b"{\"step\": 40, \"epo").unwrap();
        let (mut file, _) = open(KeptLines::Resumed { earlier: 0, step: 20 });
        file.write(&at(30)).unwrap();
        let steps = || -> Vec<u64> {
            let text = std::fs::read_to_string(&path).unwrap();
            text.lines().map(|line| serde_json::from_str::<Metrics>(line).unwrap().step).collect()
        };
        assert_eq!(steps(), [10, 20, 30]);
        // A second run in the same file, and what resumes it.
        let (mut file, earlier) = open(KeptLines::All);
        for step in [10, 20] {
            file.write(&at(step)).unwrap();
        }
        assert_eq!((earlier, steps()), (3, vec![10, 20, 30, 10, 20]));
        assert_eq!(open(KeptLines::Resumed { earlier, step: 10 }).1, 4);
        assert_eq!(steps(), [10, 20, 30, 10]);
        open(KeptLines::None);
        assert!(steps().is_empty());
        std::fs::write(&path, "my notes\n").unwrap();
        for keep in [KeptLines::None, KeptLines::All] {
            assert!(MetricsFile::open(&path, keep).is_err());
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "my notes\n");
    }
}
