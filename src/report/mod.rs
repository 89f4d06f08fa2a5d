//! One HTML page per run: training, memorization, rebuild, provenance.
//!
//! The page is made from the files a run leaves in its folder, and from nothing else. It is one HTML
//! file that asks for no other: its charts are inline SVG, its style and its script are in it, and a
//! policy in its head forbids a browser to fetch anything. All text from outside is escaped.

mod chart;
mod html;
mod page;
mod run;
pub mod sweep;

use std::path::{Path, PathBuf};

pub use run::RunFiles;

use crate::files::write_atomically;

/// Makes `report.html` in the folder of a run, and returns its path.
pub fn write(folder: &Path) -> anyhow::Result<PathBuf> {
    let run = RunFiles::read(folder)?;
    let path = folder.join("report.html");
    write_atomically(&path, page::page(&run).as_bytes())?;
    Ok(path)
}
