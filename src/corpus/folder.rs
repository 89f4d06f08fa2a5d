//! A folder's files, sorted bytewise by path relative to it. Links in it are never followed, so the
//! walk stays inside and ends.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::manifest::{MAX_NAMED_FILES, OtherFiles, Reason};
use super::names::{self, Fault};
use super::pass::{Flow, Intake};
use crate::error;
use crate::files;

/// Something in the folder that counts by its name.
struct Found {
    /// Its path relative to the folder.
    name: Vec<u8>,
    kind: fs::FileType,
}

pub fn read(folder: &Path, intake: &mut Intake) -> anyhow::Result<()> {
    let (mut found, other) = walk(folder, intake)?;
    intake.passed_by(other);
    found.sort_by(|a, b| a.name.cmp(&b.name));
    for Found { name, kind } in found {
        let flow = if kind.is_symlink() {
            intake.leave_out(&name, Reason::Link)?
        } else if !kind.is_file() {
            intake.leave_out(&name, Reason::Special)?
        } else {
            match names::corpus_path(&name) {
                Ok(path) => {
                    let file = folder.join(std::ffi::OsStr::from_bytes(&name));
                    intake.keep(path, contents(&file, intake.limits().file)?)?
                }
                Err(Fault::LongPart) => intake.leave_out(&name, Reason::LongName)?,
                Err(Fault::Unusable | Fault::LeadsOut) => intake.leave_out(&name, Reason::Name)?,
            }
        };
        if flow == Flow::Break(()) {
            break;
        }
    }
    Ok(())
}

/// One file by itself, under a name of its own.
pub fn read_file(file: &Path, name: &[u8], intake: &mut Intake) -> anyhow::Result<Flow> {
    match names::corpus_path(name) {
        Ok(path) => intake.keep(path, contents(file, intake.limits().file)?),
        Err(Fault::LongPart) => intake.leave_out(name, Reason::LongName),
        Err(Fault::Unusable | Fault::LeadsOut) => intake.leave_out(name, Reason::Name),
    }
}

/// All that counts by its name in the folder and the folders in it, in no order, and the files with
/// other suffixes, but for those of git.
fn walk(folder: &Path, intake: &Intake) -> anyhow::Result<(Vec<Found>, OtherFiles)> {
    let (most_entries, most_names) = (intake.limits().entries, intake.limits().names);
    let filter = intake.filter();
    let mut found = Vec::new();
    // Files by the first of their names, whatever the order of the folder.
    let (mut other, mut first_names) = (0, BTreeSet::new());
    let (mut entries, mut name_bytes) = (0, 0);
    let mut folders = vec![PathBuf::new()];
    while let Some(relative) = folders.pop() {
        let place = folder.join(&relative);
        for entry in fs::read_dir(&place).map_err(|why| unreadable(&why, &place))? {
            let entry = entry.map_err(|why| unreadable(&why, &place))?;
            let kind = entry.file_type().map_err(|why| unreadable(&why, &entry.path()))?;
            let relative = relative.join(entry.file_name());
            let name = relative.as_os_str().as_bytes();
            let counts = !kind.is_dir() && filter.keeps(name);
            entries += 1;
            name_bytes += if counts || kind.is_dir() { name.len() as u64 } else { 0 };
            if entries > most_entries || name_bytes > most_names {
                return Err(error::data(
                    format!("more than {most_entries} files in {}", folder.display()),
                    "give a smaller folder",
                ));
            }
            if kind.is_dir() {
                if entry.file_name() != ".git" {
                    folders.push(relative);
                }
            } else if counts {
                found.push(Found { name: name.to_vec(), kind });
            } else if kind.is_file() && filter.lacks_suffix(name) {
                other += 1;
                first_names.insert(name.to_vec());
                if first_names.len() > MAX_NAMED_FILES {
                    first_names.pop_last();
                }
            }
        }
    }
    let names = first_names.iter().map(|name| names::shown(name)).collect();
    Ok((found, OtherFiles { files: other, names }))
}

fn contents(file: &Path, most: u64) -> anyhow::Result<Vec<u8>> {
    files::read(file, most).map_err(|why| match why.kind() {
        io::ErrorKind::FileTooLarge => error::data(
            format!("file larger than {most} bytes, {}", file.display()),
            "remove it from the folder: no source file is that large",
        ),
        _ => unreadable(&why, file),
    })
}

fn unreadable(why: &io::Error, place: &Path) -> anyhow::Error {
    error::data(
        format!("{why}, {}", place.display()),
        "make it readable, or remove it from the folder",
    )
}
