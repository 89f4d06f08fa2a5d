//! Files that are either wholly written or not there: a temporary name beside the target, flushed
//! to the disk, then renamed. A crash at any byte leaves what was there before.

use std::fs::{self, File};
use std::io::{self, BufWriter, Seek, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;

use crate::error::{ErrorKind, Hint};

/// A file in the making. Dropped without [`AtomicFile::commit`], it disappears.
#[derive(Debug)]
pub struct AtomicFile {
    target: PathBuf,
    temporary: PathBuf,
    file: BufWriter<File>,
    committed: bool,
}

impl AtomicFile {
    /// Starts a file that will be called `target`; makes its folder if need be.
    pub fn create(target: &Path) -> anyhow::Result<Self> {
        let advice = || "choose an output path that can be written";
        let name = target
            .file_name()
            .with_context(|| {
                format!("invalid output path {}: it has no file name", target.display())
            })
            .hint(ErrorKind::Data, advice)?;
        let folder = folder_of(target);
        fs::create_dir_all(folder)
            .with_context(|| format!("cannot create the folder {}", folder.display()))
            .hint(ErrorKind::Data, advice)?;
        // The process id keeps two writers of one target apart.
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}.tmp", std::process::id()));
        let temporary = folder.join(hidden);
        let file = File::create(&temporary)
            .with_context(|| format!("cannot write {}", target.display()))
            .hint(ErrorKind::Data, advice)?;
        let file = BufWriter::with_capacity(1 << 20, file);
        Ok(Self { target: target.to_path_buf(), temporary, file, committed: false })
    }

    /// Flushes the file to the disk and gives it its name.
    pub fn commit(mut self) -> anyhow::Result<()> {
        self.finish().with_context(|| format!("cannot write {}", self.target.display())).hint(
            ErrorKind::Data,
            || "check that the disk has room; what was there before is untouched",
        )
    }

    fn finish(&mut self) -> io::Result<()> {
        self.file.flush()?;
        self.file.get_ref().sync_all()?;
        fs::rename(&self.temporary, &self.target)?;
        self.committed = true;
        // The rename itself is on the disk once its folder is.
        File::open(folder_of(&self.target))?.sync_all()
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Seek for AtomicFile {
    fn seek(&mut self, position: io::SeekFrom) -> io::Result<u64> {
        self.file.seek(position)
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if !self.committed {
            // Nothing to be done if it fails: the name says that it is temporary.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// Writes a whole file at once.
pub fn write_atomically(target: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let mut file = AtomicFile::create(target)?;
    file.write_all(bytes).with_context(|| format!("cannot write {}", target.display())).hint(
        ErrorKind::Data,
        || "check that the disk has room; what was there before is untouched",
    )?;
    file.commit()
}

fn folder_of(target: &Path) -> &Path {
    target.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_uncommitted_file_leaves_what_was_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/file");
        write_atomically(&path, b"before").unwrap();
        let mut file = AtomicFile::create(&path).unwrap();
        file.write_all(b"after").unwrap();
        file.flush().unwrap();
        drop(file);
        assert_eq!(fs::read(&path).unwrap(), b"before");
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "no temporary stays");
        write_atomically(&path, b"after").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"after");
    }
}
