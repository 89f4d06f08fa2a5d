//! One HTML page per run: training, memorization, rebuild, provenance. And one per sweep.
//!
//! The page is made from the files a run leaves in its folder, and from nothing else. It is one HTML
//! file that asks for no other: its charts are inline SVG, its style and its script are in it, and a
//! policy in its head forbids a browser to fetch anything. All text from outside is escaped.

pub mod bench;
mod chart;
mod html;
mod page;
mod run;
pub mod sweep;

use std::path::{Path, PathBuf};

pub use run::RunFiles;

use crate::error;
use crate::files::{self, write_atomically};

/// Larger files are no page of a run.
const MAX_PAGE_BYTES: u64 = 1 << 30;

/// Makes `report.html` in the folder of a run or of a sweep, and returns its path.
pub fn write(folder: &Path) -> anyhow::Result<PathBuf> {
    let path = folder.join("report.html");
    let there = files::read(&path, MAX_PAGE_BYTES).unwrap_or_default();
    if path.symlink_metadata().is_ok()
        && !files::is_irregular(&path)
        && !page::MARKS.iter().any(|mark| has(&there, mark.as_bytes()))
    {
        return Err(error::data(
            format!("{} would be overwritten, which laam did not write", path.display()),
            "move what is there",
        ));
    }
    let html = match run::read_sweep(folder)? {
        Some(sweep) => sweep::page(&sweep),
        None => page::page(&RunFiles::read(folder)?),
    };
    write_atomically(&path, html.as_bytes())?;
    Ok(path)
}

fn has(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}
