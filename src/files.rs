//! Reading and writing files.
//!
//! Reading: only regular files, without waiting for anybody, and no more bytes than the caller
//! allows. A FIFO, a socket, a device or a directory in place of a file is an error, not a hang.
//!
//! Writing: a file is wholly written or not there. It gets a temporary name beside the target, is
//! flushed to the disk, then renamed. A crash at any byte leaves what was there before. Links are
//! followed, and what is not a regular file (a device, a FIFO) is written in place.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use memmap2::{Mmap, UncheckedAdvice};
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

/// Longest wait for a reader of a FIFO that is written to.
const MAX_READER_WAIT: Duration = Duration::from_secs(10);

/// Opens what is not a regular file, such as a FIFO or a device, for writing. Waits some seconds for the
/// reader of a FIFO, not for ever.
///
/// # Errors
/// Nobody reads, or it cannot be written to.
pub fn open_irregular(path: &Path) -> io::Result<File> {
    open_irregular_within(path, MAX_READER_WAIT)
}

fn open_irregular_within(path: &Path, wait: Duration) -> io::Result<File> {
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let began = Instant::now();
    let file = loop {
        match OpenOptions::new().write(true).custom_flags(flags).open(path) {
            Err(why) if why.raw_os_error() == Some(libc::ENXIO) && began.elapsed() < wait => {
                std::thread::sleep(Duration::from_millis(50));
            }
            Err(why) if why.raw_os_error() == Some(libc::ENXIO) => {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "nobody reads from it"));
            }
            opened => break opened?,
        }
    };
    // Writing waits for room, as everywhere.
    // SAFETY: the descriptor is open, and the flags are integers.
    let set = unsafe {
        let given = libc::fcntl(file.as_raw_fd(), libc::F_GETFL);
        libc::fcntl(file.as_raw_fd(), libc::F_SETFL, given & !libc::O_NONBLOCK)
    };
    if set < 0 { Err(io::Error::last_os_error()) } else { Ok(file) }
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
    match options.open(path) {
        Ok(file) => only_regular(&file.metadata()?).map(|()| file),
        Err(why) => Err(check_regular(path).err().unwrap_or(why)),
    }
}

/// # Errors
/// Something else than a regular file has the path, such as a link.
pub fn check_regular(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_symlink() => Err(io::Error::other("it is a link")),
        Ok(found) => only_regular(&found),
        Err(none) if none.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(why) => Err(why),
    }
}

/// The bytes of a regular file of at most `limit` bytes.
///
/// # Errors
/// As for [`open`], and of the kind [`io::ErrorKind::FileTooLarge`] for a longer file. One that
/// grows while it is read is not read further.
pub fn read(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    read_bounded(open(path)?, limit)
}

fn read_bounded(file: File, limit: u64) -> io::Result<Vec<u8>> {
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

/// The folder with the files of a replacement that is committed but not completed.
pub const COMMIT_LOG: &str = ".laam-commit";

/// Opens a file of a folder whose files are replaced as one: the new file from the moment of the commit
/// on. Changes nothing, and may race with the writer.
///
/// # Errors
/// As for [`open`].
pub fn open_current(path: &Path) -> io::Result<File> {
    let log = folder_of(path).join(COMMIT_LOG);
    // Not through a link: it might lead to someone's files.
    if let Some(name) = path.file_name()
        && fs::symlink_metadata(&log).is_ok_and(|found| found.is_dir())
    {
        match open(&log.join(name)) {
            // An empty file says that its namesake is removed.
            Ok(file) if file.metadata()?.len() == 0 => return Err(io::ErrorKind::NotFound.into()),
            Err(none) if none.kind() == io::ErrorKind::NotFound => {}
            found => return found,
        }
    }
    open(path)
}

/// [`read`] of [`open_current`].
pub fn read_current(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    read_bounded(open_current(path)?, limit)
}

/// True if a file that was opened at `path` lies in the folder of `path` or below it, or where a cache of
/// Hugging Face keeps it: in the same folder `models--*`, whose snapshots are links to its blobs. A link may
/// lead anywhere else, and what is not the folder's own must not be copied out of it.
///
/// # Errors
/// The folder, or the place of the file, cannot be found.
pub fn is_own_of_folder(file: &File, path: &Path) -> io::Result<bool> {
    let folder = folder_of(path).canonicalize()?;
    // Of the open file, which stays what it is if somebody replaces the link.
    let place = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let place = place.or_else(|_| path.canonicalize())?;
    let is_model = |folder: &&Path| {
        folder.file_name().is_some_and(|name| name.to_string_lossy().starts_with("models--"))
    };
    let cached = folder.ancestors().find(is_model);
    Ok(place.starts_with(cached.unwrap_or(&folder)))
}

/// [`read_current`], and whether the file [is the folder's own](is_own_of_folder).
pub fn read_member(path: &Path, limit: u64) -> io::Result<(Vec<u8>, bool)> {
    let file = open_current(path)?;
    let is_own = is_own_of_folder(&file, path)?;
    Ok((read_bounded(file, limit)?, is_own))
}

/// Bytes of the file system that holds a path, if the system tells.
pub fn capacity(path: &Path) -> Option<u64> {
    use std::os::unix::ffi::OsStrExt;
    let name = std::ffi::CString::new(path.as_os_str().as_bytes()).ok()?;
    // SAFETY: a zeroed statvfs is a valid value.
    let mut found: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: the name ends in a zero byte, and the struct outlives the call.
    let told = unsafe { libc::statvfs(name.as_ptr(), &raw mut found) };
    (told == 0).then(|| found.f_blocks.saturating_mul(found.f_frsize))
}

/// True if there is such a file, by [`open_current`]; also if it cannot be opened.
pub fn exists_current(path: &Path) -> bool {
    !open_current(path).is_err_and(|why| why.kind() == io::ErrorKind::NotFound)
}

/// The SHA-256 of a regular file of any length.
pub fn sha256(path: &Path) -> io::Result<[u8; 32]> {
    sha256_of(open(path)?)
}

/// The SHA-256 of what is left of an open file.
pub fn sha256_of(mut file: File) -> io::Result<[u8; 32]> {
    let mut hasher = Sha256::new();
    let mut piece = vec![0; 1 << 20];
    loop {
        match file.read(&mut piece)? {
            0 => return Ok(hasher.finalize().into()),
            length => hasher.update(&piece[..length]),
        }
    }
}

/// A regular file in memory, as it is when it is read. One that another process cuts short meanwhile ends
/// this process with a message and exit code 2: the system has no other way to say that its bytes are gone.
#[derive(Debug)]
pub struct MappedFile {
    map: Mmap,
    /// Its place in [`MAPS`].
    slot: Option<usize>,
}

impl MappedFile {
    /// Maps a file that was opened at `path`.
    pub fn new(file: &File, path: &Path) -> io::Result<Self> {
        static INSTALLED: std::sync::Once = std::sync::Once::new();
        // SAFETY: the map is read-only plain bytes. laam itself replaces files by renaming, which leaves a
        // mapped one as it is; of a file that others cut short, no byte beyond the end is ever seen.
        let map = unsafe { Mmap::map(file) }?;
        let name: String = path.to_string_lossy().chars().flat_map(char::escape_debug).collect();
        let message = format!(
            "laam: {name} was cut short while it was read\n\
             hint: restore the file and start again; --resume continues a training run\n"
        );
        INSTALLED.call_once(catch_bus_errors);
        let slot = MAPS.iter().position(|slot| slot.take(&map, message.clone()));
        Ok(Self { map, slot })
    }

    /// Takes the pages that were read out of memory; they are read from the file again if need be.
    pub fn release_pages(&self) {
        // SAFETY: of a read-only map of a file, pages that are dropped come back with the file's bytes.
        let _ = unsafe { self.map.unchecked_advise(UncheckedAdvice::DontNeed) };
    }
}

impl std::ops::Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}

impl Drop for MappedFile {
    fn drop(&mut self) {
        if let Some(slot) = self.slot {
            MAPS[slot].release();
        }
    }
}

/// Addresses of a mapped file, and what to say if it is cut short: read by a signal handler, so atomics alone.
struct MapSlot {
    taken: AtomicBool,
    start: AtomicUsize,
    end: AtomicUsize,
    message: AtomicPtr<u8>,
    message_bytes: AtomicUsize,
}

/// Model folders have up to some 200 shards. Of further maps the handler does not know the file.
static MAPS: [MapSlot; 256] = [const {
    MapSlot {
        taken: AtomicBool::new(false),
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        message: AtomicPtr::new(std::ptr::null_mut()),
        message_bytes: AtomicUsize::new(0),
    }
}; 256];

impl MapSlot {
    fn take(&self, map: &[u8], message: String) -> bool {
        if self.taken.swap(true, Ordering::AcqRel) {
            return false;
        }
        let message = Box::leak(message.into_boxed_str());
        self.message_bytes.store(message.len(), Ordering::Relaxed);
        self.message.store(message.as_mut_ptr(), Ordering::Relaxed);
        self.start.store(map.as_ptr().addr(), Ordering::Relaxed);
        // The last one: from here on the handler finds it. The last page is mapped to its end.
        self.end.store(map.as_ptr().addr() + map.len(), Ordering::Release);
        true
    }

    fn release(&self) {
        self.end.store(0, Ordering::Release);
        let bytes = self.message_bytes.load(Ordering::Relaxed);
        let message =
            std::ptr::slice_from_raw_parts_mut(self.message.load(Ordering::Relaxed), bytes);
        // SAFETY: `take` leaked a box of these bytes, and only the owner of the slot releases it.
        drop(unsafe { Box::from_raw(message) });
        self.taken.store(false, Ordering::Release);
    }
}

fn catch_bus_errors() {
    extern "C" fn on_bus_error(
        _signal: libc::c_int,
        info: *mut libc::siginfo_t,
        _context: *mut libc::c_void,
    ) {
        // SAFETY: with SA_SIGINFO the system passes a valid siginfo_t.
        let at = unsafe { (*info).si_addr() }.addr();
        for slot in &MAPS {
            if at < slot.end.load(Ordering::Acquire) && at >= slot.start.load(Ordering::Relaxed) {
                let message = slot.message.load(Ordering::Relaxed);
                let bytes = slot.message_bytes.load(Ordering::Relaxed);
                // SAFETY: both calls are async-signal-safe, and the message lives while its slot is taken.
                unsafe {
                    libc::write(2, message.cast_const().cast(), bytes);
                    libc::_exit(2);
                }
            }
        }
        // Another kind of bus error: it happens again, and ends the process as usual.
        // SAFETY: signal is async-signal-safe.
        unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
    }
    // SAFETY: a zeroed sigaction is valid, the handler makes async-signal-safe calls alone, and the pointers
    // outlive the calls.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
            on_bus_error;
        action.sa_sigaction = handler as libc::sighandler_t;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigemptyset(&raw mut action.sa_mask);
        libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut());
    }
}

/// A file in the making. Dropped without [`AtomicFile::commit`], it disappears.
#[derive(Debug)]
pub struct AtomicFile {
    target: PathBuf,
    temporary: PathBuf,
    file: BufWriter<File>,
    /// The target is a device, a FIFO or the like: it gets the bytes at the end.
    in_place: bool,
    committed: bool,
}

impl AtomicFile {
    /// Starts a file that will be called `target`; makes its folder if need be.
    pub fn create(target: &Path) -> anyhow::Result<Self> {
        let advice = || "choose an output path that can be written";
        let cannot = || format!("cannot write {}", target.display());
        let resolved = follow(target).with_context(cannot).hint(ErrorKind::Data, advice)?;
        let name = resolved
            .file_name()
            .with_context(|| {
                format!("invalid output path {}: it has no file name", target.display())
            })
            .hint(ErrorKind::Data, advice)?;
        let in_place = is_irregular(&resolved);
        let folder =
            if in_place { std::env::temp_dir() } else { folder_of(&resolved).to_path_buf() };
        fs::create_dir_all(&folder)
            .with_context(|| format!("cannot create the folder {}", folder.display()))
            .hint(ErrorKind::Data, advice)?;
        // The process id keeps two writers of one target apart.
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}{TEMPORARY}", std::process::id()));
        let temporary = folder.join(hidden);
        // Of a process with this id that was killed, or someone's link or FIFO.
        let _ = fs::remove_file(&temporary);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true);
        let file = options.open(&temporary).with_context(cannot).hint(ErrorKind::Data, advice)?;
        // Tells others that its writer lives.
        let _ = file.try_lock();
        let file = BufWriter::with_capacity(1 << 20, file);
        Ok(Self { target: resolved, temporary, file, in_place, committed: false })
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
        if self.in_place {
            let mut bytes = self.file.get_ref();
            bytes.rewind()?;
            let mut target = open_irregular(&self.target)?;
            return io::copy(&mut bytes, &mut target).map(drop);
        }
        self.file.get_ref().sync_all()?;
        fs::rename(&self.temporary, &self.target)?;
        self.committed = true;
        // The rename itself is on the disk once its folder is.
        sync_folder(folder_of(&self.target))
    }
}

/// The end of a temporary file's name, `.TARGET.PROCESS.tmp`.
const TEMPORARY: &str = ".tmp";

/// Target and process in the name of a temporary file.
pub fn parse_temporary(name: &str) -> Option<(&str, libc::pid_t)> {
    let (target, process) = name.strip_prefix('.')?.strip_suffix(TEMPORARY)?.rsplit_once('.')?;
    Some((target, process.parse().ok().filter(|&process| process > 0)?))
}

/// True if the writer of a temporary file is gone: the process does not exist here, and none elsewhere
/// (in another container) holds its lock.
pub fn is_abandoned(temporary: &Path, process: libc::pid_t) -> bool {
    // SAFETY: signal 0 is sent to nobody.
    let exists = unsafe { libc::kill(process, 0) } == 0
        || io::Error::last_os_error().raw_os_error() != Some(libc::ESRCH);
    let regular = || fs::symlink_metadata(temporary).is_ok_and(|found| found.is_file());
    !exists && regular() && open(temporary).is_ok_and(|file| file.try_lock().is_ok())
}

/// Target of a chain of links, which need not exist.
fn follow(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_path_buf();
    // As many as Linux follows.
    for _ in 0..40 {
        match fs::read_link(&path) {
            Ok(target) => path = folder_of(&path).join(target),
            Err(_) => return Ok(path),
        }
    }
    Err(io::Error::other("too many links"))
}

/// True if writing to a path replaces nothing but a file of a kind, by what such files begin with; also if
/// there is nothing, an empty file, or what is not a regular file.
pub fn holds_nothing_but(path: &Path, magic: &[u8]) -> bool {
    if fs::symlink_metadata(path).is_err() || is_irregular(path) {
        return true;
    }
    let begin = || -> io::Result<Vec<u8>> {
        let mut begin = Vec::new();
        open(path)?.take(magic.len() as u64).read_to_end(&mut begin)?;
        Ok(begin)
    };
    match begin() {
        Ok(begin) => begin.is_empty() || begin == magic,
        // A link to nothing yet.
        Err(why) => why.kind() == io::ErrorKind::NotFound,
    }
}

/// True if there is something that is neither a regular file nor a folder.
pub fn is_irregular(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|found| !found.is_file() && !found.is_dir())
}

/// Flushes the names in a folder to the disk.
pub fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
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

/// The folder that a path lies in.
pub fn folder_of(target: &Path) -> &Path {
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
    fn links_are_followed_and_irregular_files_are_written_in_place() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::create_dir(path("elsewhere")).unwrap();
        std::os::unix::fs::symlink("second", path("first")).unwrap();
        std::os::unix::fs::symlink("elsewhere/file", path("second")).unwrap();
        for text in ["to nothing yet", "to a file"] {
            write_atomically(&path("first"), text.as_bytes()).unwrap();
            assert_eq!(fs::read_to_string(path("elsewhere/file")).unwrap(), text);
        }
        assert!(path("first").is_symlink() && path("second").is_symlink());
        std::os::unix::fs::symlink("loop", path("loop")).unwrap();
        assert!(write_atomically(&path("loop"), b"").is_err());

        std::os::unix::fs::symlink("/dev/null", path("null")).unwrap();
        write_atomically(&path("null"), b"gone").unwrap();
        assert!(!fs::metadata("/dev/null").unwrap().is_file() && path("null").is_symlink());
        let fifo = std::ffi::CString::new(path("fifo").to_str().unwrap()).unwrap();
        // SAFETY: the path is a string that ends in a zero byte.
        assert_eq!(unsafe { libc::mkfifo(fifo.as_ptr(), 0o600) }, 0);
        let fifo = path("fifo");
        let unread = open_irregular_within(&fifo, Duration::from_millis(60)).unwrap_err();
        assert_eq!(unread.kind(), io::ErrorKind::TimedOut);
        let reader = std::thread::spawn(move || fs::read(fifo).unwrap());
        write_atomically(&path("fifo"), b"through").unwrap();
        assert_eq!(reader.join().unwrap(), b"through");
    }

    #[test]
    fn files_of_another_kind_are_told_from_own_ones() {
        let folder = tempfile::tempdir().unwrap();
        for (text, expected) in
            [("", true), ("MAGIC", true), ("MAGIC and more", true), ("MAG", false), ("mine", false)]
        {
            let path = folder.path().join("file");
            fs::write(&path, text).unwrap();
            assert_eq!(holds_nothing_but(&path, b"MAGIC"), expected, "{text}");
        }
        assert!(holds_nothing_but(&folder.path().join("none"), b"MAGIC"));
        assert!(holds_nothing_but(Path::new("/dev/null"), b"MAGIC"));
        assert!(!holds_nothing_but(folder.path(), b"MAGIC"));
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
