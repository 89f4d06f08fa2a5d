//! Replacing several files of a folder as one: after a crash at any moment the folder holds all of
//! the old ones or all of the new ones, and whatever else lies in it (metrics, other checkpoints)
//! is left alone.
//!
//! A write-ahead log made of files:
//!
//! 1. The new files are written into `FOLDER/.laam-staged` and flushed to the disk.
//! 2. The staged folder is renamed to `FOLDER/.laam-commit`. This rename is the commit: before it the
//!    old files count, after it the new ones.
//! 3. Each file is renamed from `.laam-commit` over its old namesake. An empty file is a tombstone:
//!    it removes its namesake. The empty folder is removed.
//!
//! A crash within 3 leaves `.laam-commit` behind, and [`settle`], which every writer calls first, takes 3
//! up where it broke off. Readers change nothing: they look into `.laam-commit` first
//! ([`files::open_current`]). (Swapping whole folders would be one rename less, but has no portable
//! atomic form, and would carry the neighbors away.)

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use anyhow::Context;

use crate::error::{ErrorKind, Hint};
use crate::files::{self, COMMIT_LOG as COMMIT};

pub(super) const STAGED: &str = ".laam-staged";

/// Every lasting change passes here, so that a test can pull the plug before any of them.
fn change<T>(what: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    #[cfg(test)]
    tests::fuse()?;
    what()
}

/// New files of a folder, not yet in force.
pub(super) struct Staged<'a> {
    folder: &'a Path,
    staged: PathBuf,
}

impl<'a> Staged<'a> {
    /// Makes the folder if need be, completes what an earlier writer committed, discards what it
    /// did not.
    pub fn begin(folder: &'a Path) -> anyhow::Result<Self> {
        settle(folder)?;
        let staged = folder.join(STAGED);
        let begin = || {
            if !folder.exists() {
                change(|| fs::create_dir_all(folder))?;
                sync_folder(files::folder_of(folder))?;
            }
            if fs::symlink_metadata(&staged).is_ok() {
                change(|| fs::remove_dir_all(&staged))?;
            }
            change(|| fs::create_dir(&staged))
        };
        begin()
            .with_context(|| format!("cannot write into {}", folder.display()))
            .hint(ErrorKind::Checkpoint, || "choose an output folder that can be written")?;
        Ok(Self { folder, staged })
    }

    /// Staging path of the new file `name`.
    pub fn path(&self, name: &str) -> PathBuf {
        self.staged.join(name)
    }

    pub fn write(&self, name: &str, bytes: &[u8]) -> anyhow::Result<()> {
        change(|| fs::write(self.path(name), bytes))
            .with_context(|| self.failed(name))
            .hint(ErrorKind::Checkpoint, disk)
    }

    /// Lets go of `name`, if there is one.
    pub fn remove(&self, name: &str) -> anyhow::Result<()> {
        if fs::symlink_metadata(self.folder.join(name)).is_ok() {
            self.write(name, b"")
        } else {
            Ok(())
        }
    }

    /// Puts the new files in force.
    pub fn commit(&self) -> anyhow::Result<()> {
        let commit = || {
            // serialize_to_file makes files for their owner's eyes only: give all the usual mode.
            let usual = self.path(".mode");
            let mode = change(|| File::create(&usual))?.metadata()?.permissions();
            change(|| fs::remove_file(&usual))?;
            for name in names(&self.staged)? {
                let path = self.staged.join(name);
                change(|| fs::set_permissions(&path, mode.clone()))?;
                change(|| File::open(&path)?.sync_all())?;
            }
            sync_folder(&self.staged)?;
            change(|| fs::rename(&self.staged, self.folder.join(COMMIT)))?;
            sync_folder(self.folder)
        };
        commit().with_context(|| self.failed("the new files")).hint(ErrorKind::Checkpoint, disk)?;
        settle(self.folder)
    }

    /// Frees the room that unfinished files take.
    pub fn discard(&self) {
        // Nothing is lost if it fails: the next writer begins with it.
        let _ = change(|| fs::remove_dir_all(&self.staged));
    }

    fn failed(&self, name: &str) -> String {
        format!("cannot write {name}, in {}", self.folder.display())
    }
}

fn disk() -> &'static str {
    "check that the disk has room; what was there before is untouched"
}

/// Completes a replacement that was committed but cut off. Costs one stat if there is none. What another
/// process completes meanwhile counts as complete.
pub fn settle(folder: &Path) -> anyhow::Result<()> {
    let commit = folder.join(COMMIT);
    // Not through a link: it might lead to someone's files.
    if !fs::symlink_metadata(&commit).is_ok_and(|found| found.is_dir()) {
        return Ok(());
    }
    let done = |result: io::Result<()>| match result {
        Err(gone) if gone.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    };
    let settle = || {
        let names = match names(&commit) {
            Err(gone) if gone.kind() == io::ErrorKind::NotFound => return Ok(()),
            names => names?,
        };
        for name in names {
            let (new, old) = (commit.join(&name), folder.join(&name));
            match fs::symlink_metadata(&new) {
                Err(gone) if gone.kind() == io::ErrorKind::NotFound => {}
                Err(why) => return Err(why),
                Ok(found) if found.len() > 0 => done(change(|| fs::rename(&new, &old)))?,
                // The tombstone goes last: a crash between the two repeats both.
                Ok(_) => {
                    done(change(|| fs::remove_file(&old)))?;
                    done(change(|| fs::remove_file(&new)))?;
                }
            }
        }
        // The files are in force on the disk before the log of them goes.
        sync_folder(folder)?;
        done(change(|| fs::remove_dir(&commit)))?;
        sync_folder(folder)
    };
    settle()
        .with_context(|| {
            format!("an interrupted save into {} cannot be completed", folder.display())
        })
        .hint(
            ErrorKind::Checkpoint,
            || "make the folder writable; the next training run there completes the save",
        )
}

/// The plain files of a folder, in a fixed order.
fn names(folder: &Path) -> io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            names.push(entry.file_name());
        }
    }
    names.sort();
    Ok(names)
}

fn sync_folder(folder: &Path) -> io::Result<()> {
    change(|| files::sync_folder(folder))
}

#[cfg(test)]
pub(super) mod tests {
    use std::cell::Cell;

    use super::*;

    thread_local! {
        static FUSE: Cell<Option<usize>> = const { Cell::new(None) };
    }

    /// Fails once the fuse has burnt down, and from then on.
    pub(super) fn fuse() -> io::Result<()> {
        match FUSE.get() {
            Some(0) => Err(io::Error::other("the plug was pulled")),
            left => {
                FUSE.set(left.map(|left| left - 1));
                Ok(())
            }
        }
    }

    /// Runs `what` on a disk that takes `changes` more changes; whether it got through.
    pub(in crate::model) fn with_fuse<T>(changes: usize, what: impl FnOnce() -> T) -> T {
        FUSE.set(Some(changes));
        let result = what();
        FUSE.set(None);
        result
    }

    fn replace(folder: &Path, files: &[(&str, &str)], gone: &[&str]) -> anyhow::Result<()> {
        let staged = Staged::begin(folder)?;
        for (name, text) in files {
            staged.write(name, text.as_bytes())?;
        }
        for name in gone {
            staged.remove(name)?;
        }
        staged.commit()
    }

    /// The files of a folder and their texts, those of the log left out.
    fn content(folder: &Path) -> Vec<(String, String)> {
        settle(folder).unwrap();
        let names = names(folder).unwrap();
        let read = |name: OsString| {
            (name.to_string_lossy().into_owned(), fs::read_to_string(folder.join(name)).unwrap())
        };
        names.into_iter().map(read).collect()
    }

    #[test]
    fn replace_is_atomic_under_power_loss() {
        let old = [("a", "old"), ("b", "old"), ("stale", "old")];
        let new = [("a", "new"), ("b", "new"), ("c", "new")];
        let pairs = |files: &[(&str, &str)]| -> Vec<(String, String)> {
            let with_neighbor = files.iter().chain(&[("metrics", "kept")]);
            let mut pairs: Vec<_> =
                with_neighbor.map(|(n, t)| (n.to_string(), t.to_string())).collect();
            pairs.sort();
            pairs
        };
        let (mut seen_old, mut seen_new) = (0, 0);
        for changes in 0.. {
            let folder = tempfile::tempdir().unwrap();
            fs::write(folder.path().join("metrics"), "kept").unwrap();
            replace(folder.path(), &old, &[]).unwrap();
            let done =
                with_fuse(changes, || replace(folder.path(), &new, &["stale", "never"])).is_ok();
            let found = content(folder.path());
            if found == pairs(&old) {
                assert_eq!(seen_new, 0, "change {changes}: once committed, always committed");
                seen_old += 1;
            } else {
                assert_eq!(found, pairs(&new), "change {changes}");
                seen_new += 1;
            }
            // And the next writer gets through, whatever was left lying about.
            replace(folder.path(), &new, &["stale"]).unwrap();
            assert_eq!(content(folder.path()), pairs(&new), "change {changes}");
            assert!(!folder.path().join(STAGED).exists() && !folder.path().join(COMMIT).exists());
            if done {
                break;
            }
        }
        assert!(seen_old > 10 && seen_new > 5, "{seen_old} and {seen_new}");
    }

    #[test]
    fn interrupted_recovery_is_resumed() {
        let mut interrupted_twice = 0;
        for (first, second) in (0..12).flat_map(|first| (0..12).map(move |second| (first, second)))
        {
            let folder = tempfile::tempdir().unwrap();
            replace(folder.path(), &[("a", "old"), ("b", "old"), ("c", "old")], &[]).unwrap();
            let commit = folder.path().join(COMMIT);
            fs::create_dir(&commit).unwrap();
            for (name, text) in [("a", "new"), ("b", ""), ("c", "new")] {
                fs::write(commit.join(name), text).unwrap();
            }
            let cut = |changes| with_fuse(changes, || settle(folder.path())).is_err();
            interrupted_twice += usize::from(cut(first) && cut(second));
            let new = |name: &str| (name.to_string(), "new".to_string());
            assert_eq!(content(folder.path()), [new("a"), new("c")], "{first}, {second}");
        }
        assert!(interrupted_twice > 20, "{interrupted_twice}");
    }

    #[cfg(unix)]
    #[test]
    fn commit_log_symlink_is_not_followed() {
        let (folder, home) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(home.path().join("secret"), "mine").unwrap();
        std::os::unix::fs::symlink(home.path(), folder.path().join(COMMIT)).unwrap();
        settle(folder.path()).unwrap();
        assert!(home.path().join("secret").exists());
    }
}
