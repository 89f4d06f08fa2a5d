//! Output folders: one writer at a time, and no temporary files of writers that were killed.

use std::fs::{self, File, TryLockError};
use std::io::{self, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::Context;

use crate::error::{self, ErrorKind, Hint};
use crate::files;

/// Locked while a process writes into the folder, which it names by its id.
const LOCK: &str = ".laam.lock";
const MAX_LOCK_BYTES: u64 = 64;

/// A folder that this process alone writes into.
#[derive(Debug)]
pub struct OutputFolder {
    path: PathBuf,
    /// Held, not read: the system releases it with the process. None in a process that another one writes
    /// for.
    lock: Option<File>,
    /// Device and inode of the folder.
    identity: (u64, u64),
    /// The folders that were made for it, outermost first.
    created: Vec<PathBuf>,
}

impl OutputFolder {
    /// Makes the folder if it is missing, and locks it.
    ///
    /// # Errors
    /// Another process writes into it, or it cannot be written into.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        check_free(path)?;
        let created = create(path)?;
        let open = || -> io::Result<(File, (u64, u64))> {
            let mut attempts = 5;
            let lock = loop {
                let mut lock = files::open_own(&path.join(LOCK))?;
                match lock.try_lock() {
                    Ok(()) => {}
                    // Another process may just be looking at it.
                    Err(TryLockError::WouldBlock) if attempts > 0 => {
                        attempts -= 1;
                        std::thread::sleep(std::time::Duration::from_millis(10));
                        continue;
                    }
                    Err(TryLockError::WouldBlock) => return Err(io::ErrorKind::WouldBlock.into()),
                    // A file system without locks.
                    Err(TryLockError::Error(why)) if why.kind() == io::ErrorKind::Unsupported => {}
                    Err(TryLockError::Error(why)) => return Err(why),
                }
                // A process that ended meanwhile may have removed the file that was opened here.
                if is_same_file(&lock, &path.join(LOCK)) {
                    lock.set_len(0)?;
                    lock.rewind()?;
                    write!(lock, "{}", std::process::id())?;
                    break lock;
                }
            };
            Ok((lock, identity(path)?))
        };
        match open() {
            Ok((lock, identity)) => {
                Ok(Self { path: path.to_path_buf(), lock: Some(lock), identity, created })
            }
            Err(why) => {
                remove_empty(&created);
                if why.kind() == io::ErrorKind::WouldBlock {
                    return Err(in_use(path));
                }
                Err(why)
                    .with_context(|| format!("cannot write into {}", path.display()))
                    .hint(ErrorKind::Data, || "choose an output folder that can be written")
            }
        }
    }

    /// The folder as a process sees it that writes nothing: another one of its group does, and has it open.
    pub fn of_other_process(path: &Path) -> Self {
        let identity = identity(path).unwrap_or_default();
        Self { path: path.to_path_buf(), lock: None, identity, created: Vec::new() }
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// # Errors
    /// The folder was removed or replaced since it was opened: what is written would be lost.
    pub fn check(&self) -> anyhow::Result<()> {
        if identity(&self.path).is_ok_and(|now| now == self.identity) {
            return Ok(());
        }
        Err(error::data(
            format!("the output folder {} was removed or replaced", self.path.display()),
            "nothing more can be saved there: start again, and leave the folder in place",
        ))
    }
}

impl Drop for OutputFolder {
    fn drop(&mut self) {
        // Removed while locked: whoever opened it meanwhile sees that it is another file.
        if self.lock.is_some() && self.check().is_ok() {
            let _ = fs::remove_file(self.path.join(LOCK));
            remove_empty(&self.created);
        }
    }
}

/// # Errors
/// Another process writes into the folder. Changes nothing.
pub fn check_free(path: &Path) -> anyhow::Result<()> {
    let Ok(lock) = files::open(&path.join(LOCK)) else { return Ok(()) };
    match lock.try_lock_shared() {
        Err(TryLockError::WouldBlock) => Err(in_use(path)),
        _ => Ok(()),
    }
}

fn in_use(path: &Path) -> anyhow::Error {
    let id = files::read_text(&path.join(LOCK), MAX_LOCK_BYTES).unwrap_or_default();
    let by = id.parse::<u32>().map_or(String::new(), |id| format!(" (process {id})"));
    error::data(
        format!("another laam{by} writes into {}", path.display()),
        "wait until it ends, or choose another output folder",
    )
}

/// Makes a folder and those above it that are missing; returns the new ones, outermost first.
fn create(path: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let parents = path.ancestors().filter(|at| !at.as_os_str().is_empty());
    let mut missing: Vec<PathBuf> =
        parents.take_while(|at| !at.exists()).map(Path::to_path_buf).collect();
    missing.reverse();
    let make = || -> io::Result<()> {
        fs::create_dir_all(path)?;
        missing.iter().try_for_each(|folder| files::sync_folder(files::folder_of(folder)))
    };
    make()
        .with_context(|| format!("cannot create the folder {}", path.display()))
        .hint(ErrorKind::Data, || "choose an output folder that can be written")?;
    Ok(missing)
}

fn remove_empty(created: &[PathBuf]) {
    for folder in created.iter().rev() {
        // Fails if something lies in it: then it stays.
        let _ = fs::remove_dir(folder);
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let found = fs::metadata(path)?;
    Ok((found.dev(), found.ino()))
}

fn is_same_file(file: &File, path: &Path) -> bool {
    let of = |found: fs::Metadata| (found.dev(), found.ino());
    let there = fs::symlink_metadata(path).map(of);
    file.metadata().is_ok_and(|open| there.is_ok_and(|there| there == of(open)))
}

/// Removes the temporary files of [`files::AtomicFile`]s whose process is gone; returns their paths.
/// Only of targets that `is_ours` names.
pub fn remove_temporaries(
    folder: &Path,
    is_ours: impl Fn(&str) -> bool,
) -> anyhow::Result<Vec<PathBuf>> {
    let mut removed = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some((target, process)) = name.to_str().and_then(files::parse_temporary) else {
            continue;
        };
        if is_ours(target) && files::is_abandoned(&entry.path(), process) {
            fs::remove_file(entry.path())
                .with_context(|| format!("cannot remove {}", entry.path().display()))
                .hint(ErrorKind::Data, || "remove it by hand")?;
            removed.push(entry.path());
        }
    }
    Ok(removed)
}

/// Refuses a folder in which a file of these names exists that is not laam's own.
///
/// # Errors
/// Names the files. Nothing was changed.
pub fn refuse_foreign(foreign: &[PathBuf]) -> anyhow::Result<()> {
    let Some(first) = foreign.first() else { return Ok(()) };
    let more =
        if foreign.len() > 1 { format!(" and {} more", foreign.len() - 1) } else { String::new() };
    Err(error::data(
        format!("{}{more} would be overwritten, which laam did not write", first.display()),
        "choose another output folder, or move what is there",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_output_folder_has_one_writer_and_leaves_no_trace() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b");
        let output = OutputFolder::open(&path).unwrap();
        let said = format!("{:#}", OutputFolder::open(&path).unwrap_err());
        assert!(said.contains(&format!("process {}", std::process::id())), "{said}");
        assert!(check_free(&path).is_err());
        output.check().unwrap();
        drop(output);
        assert!(!folder.path().join("a").exists(), "made for it, and empty");
        // A lock file that a killed process left behind does not lock.
        fs::create_dir_all(&path).unwrap();
        fs::write(path.join(LOCK), "1").unwrap();
        fs::write(path.join("notes"), "mine").unwrap();
        let output = OutputFolder::open(&path).unwrap();
        fs::rename(&path, folder.path().join("moved")).unwrap();
        assert!(output.check().is_err());
        fs::create_dir(&path).unwrap();
        assert!(output.check().is_err(), "another folder of that name");
        drop(output);
        assert!(folder.path().join("moved/notes").exists() && path.exists());
    }

    #[test]
    fn temporaries_of_ended_processes_alone_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let living = files::AtomicFile::create(&folder.path().join("living")).unwrap();
        for name in [
            ".ours.99999999.tmp",
            ".theirs.99999999.tmp",
            ".ours.tmp",
            "ours.99999999.tmp",
            ".ours.x.tmp",
        ] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        let removed = remove_temporaries(folder.path(), |name| name != "theirs").unwrap();
        assert_eq!(removed, [folder.path().join(".ours.99999999.tmp")]);
        living.commit().unwrap();
        assert!(folder.path().join("living").exists());
    }
}
