//! When windows were recalled during training: `recall.jsonl` of a run, and the steps of first and lasting
//! recall.

use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use anyhow::Context;
use serde::{Deserialize, Serialize};

use crate::corpus::hex;
use crate::error::{ErrorKind, Hint};
use crate::files::{self, write_atomically};
use crate::schema::SchemaVersion;
use crate::tokens::{WindowKind, Windows};

/// Name of the file in the output folder of a run.
pub const FILE: &str = "recall.jsonl";
/// Larger files are refused.
const MAX_RECALL_BYTES: u64 = 1 << 30;

/// The first line: which windows the others are of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RecallHead {
    /// Version of the keys.
    #[serde(default)]
    pub schema_version: SchemaVersion,
    /// SHA-256 of the token file.
    pub tokens_sha256: String,
    /// Kind of the windows.
    pub window_kind: WindowKind,
    /// Tokens per window.
    pub context: usize,
    /// Tokens from one stream window to the next.
    pub stride: usize,
    /// Number of windows.
    pub windows: usize,
}

impl RecallHead {
    /// The windows of a run.
    ///
    /// # Errors
    /// The token file cannot be read.
    pub fn of(windows: &Windows) -> anyhow::Result<Self> {
        Ok(Self {
            schema_version: SchemaVersion,
            tokens_sha256: hex(&windows.file().sha256()?),
            window_kind: windows.kind(),
            context: windows.context(),
            stride: windows.stride(),
            windows: windows.len(),
        })
    }

    /// True if window N of both is the same one.
    fn is_of_same_windows(&self, other: &Self) -> bool {
        Self { windows: 0, ..self.clone() } == Self { windows: 0, ..other.clone() }
    }
}

/// A line for each measurement of the verbatim rate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct RecallLine {
    step: u64,
    /// Bit `n % 8` of byte `n / 8`, in hexadecimal: window `n` was reproduced verbatim.
    verbatim: String,
}

fn pack(verbatim: &[bool]) -> String {
    let byte = |bits: &[bool]| bits.iter().rev().fold(0, |byte, &bit| byte << 1 | u8::from(bit));
    verbatim.chunks(8).fold(String::new(), |mut text, bits| {
        let _ = write!(text, "{:02x}", byte(bits)); // writing to a String cannot fail
        text
    })
}

fn unpack(text: &str, windows: usize) -> Option<Vec<bool>> {
    let byte = |at: usize| u8::from_str_radix(text.get(2 * at..2 * at + 2)?, 16).ok();
    if text.len() != 2 * windows.div_ceil(8) {
        return None;
    }
    (0..windows).map(|window| Some(byte(window / 8)? >> (window % 8) & 1 == 1)).collect()
}

/// `recall.jsonl`, open for more lines.
pub struct RecallFile {
    file: fs::File,
    path: String,
}

impl RecallFile {
    /// Begins the file of a run, or continues that of a run that is resumed after `step`: what it measures
    /// again is not there twice.
    pub fn open(path: &Path, head: &RecallHead, step: Option<u64>) -> anyhow::Result<Self> {
        let name = path.display().to_string();
        let mut kept = serde_json::to_string(head)? + "\n";
        if let (Some(step), Some((then, lines))) = (step, read_lines(path)?)
            && then == *head
        {
            for line in lines.iter().filter(|line| line.step <= step) {
                kept += &(serde_json::to_string(line)? + "\n");
            }
        }
        write_atomically(path, kept.as_bytes())?;
        let file = OpenOptions::new()
            .append(true)
            .open(path)
            .with_context(|| format!("cannot write {name}"))
            .hint(ErrorKind::Data, || "choose a writable `output_path`")?;
        Ok(Self { file, path: name })
    }

    /// Adds the windows that were reproduced verbatim after a step.
    pub fn write(&mut self, step: u64, verbatim: &[bool]) -> anyhow::Result<()> {
        let line = RecallLine { step, verbatim: pack(verbatim) };
        let line = serde_json::to_string(&line)? + "\n";
        let written = self.file.write_all(line.as_bytes());
        written.with_context(|| format!("cannot write {}", self.path)).hint(
            ErrorKind::Data,
            || "check that the disk has room; `resume` continues from the last checkpoint",
        )
    }
}

/// Removes the file of another run.
pub fn remove(path: &Path) -> anyhow::Result<()> {
    match fs::remove_file(path) {
        Err(why) if why.kind() != io::ErrorKind::NotFound => Err(why)
            .with_context(|| format!("cannot remove {}", path.display()))
            .hint(ErrorKind::Data, || "choose a writable `output_path`"),
        _ => Ok(()),
    }
}

/// True if laam wrote the file, or there is none.
pub fn is_own(path: &Path) -> bool {
    match files::read_text(path, MAX_RECALL_BYTES) {
        Err(why) => why.kind() == io::ErrorKind::NotFound,
        Ok(text) => {
            let first = text.lines().next().unwrap_or_default();
            serde_json::from_str::<RecallHead>(first).is_ok()
        }
    }
}

/// Content of a file up to its first damage; none if there is no file, or no head.
fn read_lines(path: &Path) -> anyhow::Result<Option<(RecallHead, Vec<RecallLine>)>> {
    let text = match files::read_text(path, MAX_RECALL_BYTES) {
        Ok(text) => text,
        Err(none) if none.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(why) => {
            return Err(why)
                .with_context(|| format!("cannot read {}", path.display()))
                .hint(ErrorKind::Data, || "make it readable, or remove it");
        }
    };
    let mut lines = text.lines();
    let head = lines.next().and_then(|line| serde_json::from_str::<RecallHead>(line).ok());
    let Some(head) = head else { return Ok(None) };
    let lines = lines.map_while(|line| serde_json::from_str(line).ok()).collect();
    Ok(Some((head, lines)))
}

/// Counts at one measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct RecallStep {
    /// Step of the measurement.
    pub step: u64,
    /// Windows reproduced verbatim at this step.
    pub verbatim: usize,
    /// Windows reproduced at this step or before it.
    pub first: usize,
    /// Windows reproduced at this step and at every later one.
    pub lasting: usize,
}

/// When the windows of a run were recalled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Recall {
    /// Windows that were trained on.
    pub windows: usize,
    /// Counts at each measurement, in order.
    pub by_step: Vec<RecallStep>,
    /// Step at which each window was first reproduced.
    #[serde(skip)]
    pub first: Vec<Option<u64>>,
    /// First step from which on each window was reproduced at every measurement to the end.
    #[serde(skip)]
    pub lasting: Vec<Option<u64>>,
}

impl Recall {
    /// The recall of the windows of `head`, if the folder of a run has that of the same ones.
    pub fn read(folder: &Path, head: &RecallHead) -> anyhow::Result<Option<Self>> {
        let Some((of, lines)) = read_lines(&folder.join(FILE))? else { return Ok(None) };
        if !of.is_of_same_windows(head) || of.windows > head.windows {
            return Ok(None);
        }
        let mut measured = Vec::new();
        for line in &lines {
            let Some(verbatim) = unpack(&line.verbatim, of.windows) else { break };
            measured.push((line.step, verbatim));
        }
        Ok((!measured.is_empty()).then(|| Self::new(of.windows, &measured)))
    }

    fn new(windows: usize, measured: &[(u64, Vec<bool>)]) -> Self {
        let (mut first, mut lasting) = (vec![None; windows], vec![None; windows]);
        for (step, verbatim) in measured {
            for (window, &is_verbatim) in verbatim.iter().enumerate() {
                if is_verbatim {
                    first[window].get_or_insert(*step);
                    lasting[window].get_or_insert(*step);
                } else {
                    lasting[window] = None;
                }
            }
        }
        let until = |steps: &[Option<u64>], step: u64| {
            steps.iter().filter(|since| since.is_some_and(|since| since <= step)).count()
        };
        let by_step = measured.iter().map(|(step, verbatim)| RecallStep {
            step: *step,
            verbatim: verbatim.iter().filter(|&&is_verbatim| is_verbatim).count(),
            first: until(&first, *step),
            lasting: until(&lasting, *step),
        });
        Self { windows, by_step: by_step.collect(), first, lasting }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_and_lasting_recall_survive_a_resumption() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE);
        let head = RecallHead {
            schema_version: SchemaVersion,
            tokens_sha256: "ab".to_string(),
            window_kind: WindowKind::Stream,
            context: 8,
            stride: 8,
            windows: 10,
        };
        let bits = |text: &str| text.bytes().map(|bit| bit == b'1').collect::<Vec<_>>();
        let mut file = RecallFile::open(&path, &head, None).unwrap();
        file.write(10, &bits("1100000001")).unwrap();
        file.write(20, &bits("0110000001")).unwrap();
        file.write(30, &bits("1111111111")).unwrap();
        // Cut off after step 20: what was measured at 30 is measured again.
        let mut file = RecallFile::open(&path, &head, Some(25)).unwrap();
        file.write(30, &bits("1110000000")).unwrap();
        let recall = Recall::read(folder.path(), &head).unwrap().unwrap();
        let at = |window: usize| (recall.first[window], recall.lasting[window]);
        assert_eq!(at(0), (Some(10), Some(30)));
        assert_eq!(at(1), (Some(10), Some(10)));
        assert_eq!(at(2), (Some(20), Some(20)));
        assert_eq!(at(9), (Some(10), None));
        assert_eq!(at(5), (None, None));
        let counts = |at: usize| {
            let RecallStep { step, verbatim, first, lasting } = recall.by_step[at];
            (step, verbatim, first, lasting)
        };
        let by_step = [counts(0), counts(1), counts(2)];
        assert_eq!(by_step, [(10, 3, 3, 1), (20, 3, 4, 2), (30, 3, 4, 3)]);
        // Other windows, and another file.
        let other = RecallHead { context: 9, ..head.clone() };
        assert_eq!(Recall::read(folder.path(), &other).unwrap(), None);
        assert!(is_own(&path));
        fs::write(&path, "my notes\n").unwrap();
        assert!(!is_own(&path));
    }
}
