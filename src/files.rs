//! Reading and writing files.
//!
//! Reading: only regular files, without waiting for anybody, and no more bytes than the caller
//! allows. A FIFO, a socket, a device or a directory in place of a file is an error, not a hang.
//!
//! Writing: a file is wholly written or not there. It gets a temporary name beside the target, is
//! flushed to the disk, then renamed. A crash at any byte leaves what was there before.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Read, Seek, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::Context;
use sha2::{Digest, Sha256};

use crate::error::{ErrorKind, Hint};

/// Opens a regular file for reading, without waiting.
///
/// # Errors
/// Of the kind [`io::ErrorKind::InvalidInput`] for a FIFO, a socket, a device or a directory.
pub fn open(path: &Path) -> io::Result<File> {
    // Without O_NONBLOCK, opening a FIFO waits for a writer. Regular files ignore the flag.
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    match OpenOptions::new().read(true).custom_flags(flags).open(path) {
        Ok(file) => only_regular(&file.metadata()?).map(|()| file),
        // A socket cannot be opened at all.
        Err(why) => {
            Err(fs::metadata(path).and_then(|found| only_regular(&found)).err().unwrap_or(why))
        }
    }
}

fn only_regular(found: &fs::Metadata) -> io::Result<()> {
    let kind = found.file_type();
    let what = match () {
        () if kind.is_file() => return Ok(()),
        () if kind.is_dir() => "a directory",
        () if kind.is_fifo() => "a FIFO",
        () if kind.is_socket() => "a socket",
        () => "a device",
    };
    Err(io::Error::new(io::ErrorKind::InvalidInput, format!("it is {what}, not a regular file")))
}

/// Opens a file in a folder of laam's own for reading and writing, or creates it. Without waiting,
/// and never through a link, which could lead to someone else's file.
///
/// # Errors
/// If something else than a regular file has that name.
pub fn open_own(path: &Path) -> io::Result<File> {
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_NOFOLLOW;
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).custom_flags(flags);
    let irregular = |found: fs::Metadata| {
        if found.is_symlink() {
            Err(io::Error::other("it is a link"))
        } else {
            only_regular(&found)
        }
    };
    match options.open(path) {
        Ok(file) => only_regular(&file.metadata()?).map(|()| file),
        Err(why) => Err(fs::symlink_metadata(path).and_then(irregular).err().unwrap_or(why)),
    }
}

/// The bytes of a regular file of at most `limit` bytes.
///
/// # Errors
/// As for [`open`], and of the kind [`io::ErrorKind::FileTooLarge`] for a longer file. One that
/// grows while it is read is not read further.
pub fn read(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let file = open(path)?;
    let too_large = |bytes: u64| {
        let what = format!("it has {bytes} bytes or more, and at most {limit} are read");
        io::Error::new(io::ErrorKind::FileTooLarge, what)
    };
    // Files of /proc say that they have no bytes.
    let claimed = file.metadata()?.len();
    if claimed > limit {
        return Err(too_large(claimed));
    }
    let mut bytes = Vec::with_capacity(claimed as usize);
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit { Err(too_large(limit + 1)) } else { Ok(bytes) }
}

/// The text of a regular file of at most `limit` bytes.
///
/// # Errors
/// As for [`read`], and of the kind [`io::ErrorKind::InvalidData`] if it is not UTF-8.
pub fn read_text(path: &Path, limit: u64) -> io::Result<String> {
    String::from_utf8(read(path, limit)?)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "it is not UTF-8 text"))
}

/// The SHA-256 of a regular file of any length.
pub fn sha256(path: &Path) -> io::Result<[u8; 32]> {
    let mut file = open(path)?;
    let mut hasher = Sha256::new();
    let mut piece = vec![0; 1 << 20];
    loop {
        match file.read(&mut piece)? {
            0 => return Ok(hasher.finalize().into()),
            length => hasher.update(&piece[..length]),
        }
    }
}

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
        // Of a process with this id that was killed, or someone's link or FIFO.
        let _ = fs::remove_file(&temporary);
        let file = File::create_new(&temporary)
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
    fn only_regular_files_are_read_and_no_more_bytes_than_allowed() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("file"), "five\n").unwrap();
        let fifo = std::ffi::CString::new(path("fifo").to_str().unwrap()).unwrap();
        // SAFETY: the path is a string that ends in a zero byte.
        assert_eq!(unsafe { libc::mkfifo(fifo.as_ptr(), 0o600) }, 0);
        let _socket = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();
        std::os::unix::fs::symlink(path("file"), path("link")).unwrap();
        std::os::unix::fs::symlink("/dev/zero", path("device")).unwrap();

        assert_eq!(read_text(&path("link"), 5).unwrap(), "five\n");
        assert_eq!(read(&path("file"), 4).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
        assert_eq!(
            read(Path::new("/proc/self/stat"), 4).unwrap_err().kind(),
            io::ErrorKind::FileTooLarge
        );
        assert_eq!(read(&path("none"), 4).unwrap_err().kind(), io::ErrorKind::NotFound);
        for (name, what) in [
            ("fifo", "a FIFO"),
            ("socket", "a socket"),
            ("device", "a device"),
            (".", "a directory"),
        ] {
            let why = read(&path(name), 1 << 20).unwrap_err().to_string();
            assert!(why.contains(what), "{name}: {why}");
            assert!(sha256(&path(name)).is_err() && open_own(&path(name)).is_err(), "{name}");
        }
        assert!(open_own(&path("link")).unwrap_err().to_string().contains("link"));
        open_own(&path("file")).unwrap();
        assert_eq!(fs::read(path("file")).unwrap(), b"five\n", "nothing is cut off");
    }

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
