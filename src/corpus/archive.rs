//! Archives: tar, plain or packed with gzip or xz, told apart by their first bytes.
//!
//! An archive may come from anyone. Nothing of it is written to disk; what it unpacks to is counted
//! against the [`Limits`](super::Limits) as it unpacks; what the tar reader keeps in memory between
//! two members (long names, PAX records, sparse maps) is bounded; and it is read to its very end, so
//! that the checksums of its packing have a say.
//!
//! A member whose name leads out (absolute, or with `..`) makes the whole archive refused. Links,
//! devices and sparse files are left out.

use std::cell::Cell;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::rc::Rc;

use flate2::bufread::GzDecoder;
use tar::{Archive, Entry, EntryType};

use super::manifest::Reason;
use super::names::{self, Fault, shown};
use super::pass::{Flow, Intake};
use crate::error;
use crate::files;

/// Memory an xz archive may ask for, in KiB: twice what `xz -9` makes need.
const MAX_XZ_MEMORY_KIB: u32 = 129 << 10;

/// Limit on the ratio of unpacked to packed bytes, and the unpacked bytes to which it does not apply.
/// Source code packs to a tenth; xz makes a seven-thousandth of zeros.
pub(super) const MAX_RATIO: u64 = 200;
pub(super) const ANY_RATIO_BYTES: u64 = 64 << 20;

/// Limit on header bytes between two members.
const MAX_HEADER_BYTES: u64 = 1 << 20;

pub fn read(path: &Path, intake: &mut Intake) -> anyhow::Result<()> {
    let mut reading = Reading { member: None, unpacked: Rc::default(), packed: Rc::default() };
    reading.members(path, intake).map_err(|stop| match stop {
        Stop::Refused(error) => error,
        Stop::Damaged(why) => reading.damaged(&why, path),
    })
}

/// The member being read and the bytes taken so far.
struct Reading {
    member: Option<String>,
    unpacked: Rc<Meter>,
    packed: Rc<Meter>,
}

/// Why reading cannot go on.
enum Stop {
    Refused(anyhow::Error),
    Damaged(io::Error),
}

impl From<anyhow::Error> for Stop {
    fn from(error: anyhow::Error) -> Self {
        Self::Refused(error)
    }
}

impl From<io::Error> for Stop {
    fn from(why: io::Error) -> Self {
        Self::Damaged(why)
    }
}

impl Reading {
    fn members(&mut self, path: &Path, intake: &mut Intake) -> Result<(), Stop> {
        let limits = *intake.limits();
        self.packed.allowed.set(u64::MAX);
        self.unpacked.allowed.set(MAX_HEADER_BYTES);
        let packed =
            Metered { inner: files::open(path)?, meter: self.packed.clone(), packed: None };
        let unpacked = unpack(BufReader::with_capacity(1 << 16, packed))?;
        let (meter, packed) = (self.unpacked.clone(), Some(self.packed.clone()));
        let mut archive = Archive::new(Metered { inner: unpacked, meter, packed });

        let mut entries = archive.entries()?;
        let mut count = 0;
        while let Some(entry) = entries.next().transpose()? {
            let name = entry.path_bytes().into_owned();
            self.member = Some(shown(&name));
            count += 1;
            if count > limits.entries {
                return Err(refuse(&format!("more than {} members", limits.entries), path));
            }
            // What the reader will have to skip, or we read, before the next member's headers.
            let behind = if entry.header().entry_type().is_gnu_sparse() {
                entry.header().entry_size()?
            } else {
                entry.size()
            };
            let end = self.unpacked.done.get().saturating_add(behind);
            if end > limits.total {
                return Err(refuse(&format!("unpacks to more than {} bytes", limits.total), path));
            }
            self.unpacked.allowed.set(end + MAX_HEADER_BYTES);
            if take(entry, &name, path, intake)? == Flow::Break(()) {
                return Ok(());
            }
        }
        self.member = None;
        if self.unpacked.ended.get() {
            return Err(io::Error::other("no end-of-archive mark").into());
        }
        self.unpacked.allowed.set(limits.total);
        only_zeros(archive.into_inner())?;
        Ok(())
    }

    fn damaged(&self, why: &io::Error, path: &Path) -> anyhow::Error {
        let (packed, unpacked) = (self.packed.done.get(), self.unpacked.done.get());
        if packed == 0 {
            return error::data(format!("{why}, {}", path.display()), super::SOURCE_HINT);
        }
        if why.kind() == io::ErrorKind::OutOfMemory {
            let what = format!("needs more than {MAX_XZ_MEMORY_KIB} KiB of memory to unpack");
            return error::data(
                format!("{what}, {}", path.display()),
                "if you trust it, unpack it and give the folder",
            );
        }
        if why.kind() == io::ErrorKind::QuotaExceeded {
            let what = format!("unpacks to more than {MAX_RATIO} times its size");
            return error::data(
                format!("{what}, {}", path.display()),
                "if you trust it, unpack it and give the folder",
            );
        }
        if self.member.is_none() && unpacked <= 512 && is_text(path) {
            return error::data(
                format!("{} does not begin as an archive does: is it an archive?", path.display()),
                "laam reads .tar, .tar.gz and .tar.xz, and a single file if its suffix counts or `include` \
                 matches it",
            );
        }
        let near = match &self.member {
            Some(member) => format!("in or after member {member}"),
            None if unpacked <= 512 => "at its start: is it an archive?".to_string(),
            None => "at its end".to_string(),
        };
        error::data(
            format!(
                "archive damaged or cut short ({why}) {near}, by byte {packed} of {} ({unpacked} unpacked)",
                path.display()
            ),
            "download it again; laam reads .tar, .tar.gz and .tar.xz",
        )
    }
}

/// True if a file begins as text does: a tar header has zero bytes.
fn is_text(path: &Path) -> bool {
    let mut start = Vec::new();
    let read = files::open(path).and_then(|file| file.take(512).read_to_end(&mut start));
    read.is_ok() && !start.contains(&0) && str::from_utf8(&start).is_ok()
}

/// Keeps a member, or leaves it out.
fn take(
    mut entry: Entry<'_, impl Read>,
    name: &[u8],
    path: &Path,
    intake: &mut Intake,
) -> Result<Flow, Stop> {
    let corpus_path = names::corpus_path(name);
    if corpus_path == Err(Fault::LeadsOut) {
        return Err(refuse(&format!("member {} leads out of it", shown(name)), path));
    }
    if !intake.filter().keeps(name) {
        let is_file = matches!(entry.header().entry_type(), EntryType::Regular);
        if is_file && !name.ends_with(b"/") && intake.filter().lacks_suffix(name) {
            intake.pass_by(name);
        }
        return Ok(Flow::Continue(()));
    }
    match entry.header().entry_type() {
        EntryType::Directory | EntryType::XGlobalHeader => return Ok(Flow::Continue(())),
        EntryType::Link | EntryType::Symlink => return Ok(intake.leave_out(name, Reason::Link)?),
        EntryType::Regular | EntryType::Continuous if !is_pax_sparse(&mut entry)? => {}
        _ => return Ok(intake.leave_out(name, Reason::Special)?),
    }
    let corpus_path = match corpus_path {
        Ok(path) => path,
        Err(Fault::LongPart) => return Ok(intake.leave_out(name, Reason::LongName)?),
        Err(_) => return Ok(intake.leave_out(name, Reason::Name)?),
    };
    let (size, most) = (entry.size(), intake.limits().file);
    if size > most {
        return Err(refuse(&format!("member {} has more than {most} bytes", shown(name)), path));
    }
    let mut bytes = Vec::new();
    entry.read_to_end(&mut bytes)?;
    if bytes.len() as u64 != size {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    Ok(intake.keep(corpus_path, bytes)?)
}

/// True if PAX records mark the member as sparse: its bytes are a map of holes, then the data.
fn is_pax_sparse(entry: &mut Entry<'_, impl Read>) -> io::Result<bool> {
    let Some(records) = entry.pax_extensions()? else { return Ok(false) };
    for record in records {
        if record?.key_bytes().starts_with(b"GNU.sparse.") {
            return Ok(true);
        }
    }
    Ok(false)
}

fn refuse(what: &str, path: &Path) -> Stop {
    error::data(
        format!("{what}, {}", path.display()),
        "if you trust it, unpack it and give the folder",
    )
    .into()
}

/// A file, decompressed by the format that its first bytes name: gzip, zstd or none. Beyond
/// [`MAX_RATIO`] it is an error of the kind [`io::ErrorKind::QuotaExceeded`].
pub fn open_packed(path: &Path) -> io::Result<impl BufRead> {
    let no_limit = || Rc::new(Meter { allowed: Cell::new(u64::MAX), ..Meter::default() });
    let meter = no_limit();
    let packed = Metered { inner: files::open(path)?, meter: meter.clone(), packed: None };
    let mut packed = BufReader::with_capacity(1 << 16, packed);
    let start = packed.fill_buf()?;
    // A skippable frame may come first, as pzstd writes one.
    let is_zstd =
        matches!(start, [0x28, 0xB5, 0x2F, 0xFD, ..] | [0x50..=0x5F, 0x2A, 0x4D, 0x18, ..]);
    let inner: Box<dyn Read> = if is_zstd {
        Box::new(zstd::Decoder::with_buffer(packed)?)
    } else if start.starts_with(&[0x1F, 0x8B]) {
        Box::new(Gzip::Member(GzDecoder::new(packed)))
    } else {
        Box::new(packed)
    };
    let unpacked = Metered { inner, meter: no_limit(), packed: Some(meter) };
    Ok(BufReader::with_capacity(1 << 18, unpacked))
}

/// Decompresses by the format that the first bytes name.
fn unpack<R: BufRead + 'static>(mut packed: R) -> io::Result<Box<dyn Read>> {
    let start = packed.fill_buf()?;
    Ok(if start.starts_with(b"\xFD7zXZ\0") {
        Box::new(lzma_rust2::XzReader::new_mem_limit(packed, true, MAX_XZ_MEMORY_KIB))
    } else if start.starts_with(&[0x1F, 0x8B]) {
        Box::new(Gzip::Member(GzDecoder::new(packed)))
    } else {
        Box::new(packed)
    })
}

/// The members of a gzip file, one after another. As gzip itself does, zero bytes after the last one
/// are passed over: tapes and some servers pad with them.
enum Gzip<R: BufRead> {
    Member(GzDecoder<R>),
    End,
}

impl<R: BufRead> Read for Gzip<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let Self::Member(member) = self else { return Ok(0) };
            let n = member.read(buffer)?;
            if n > 0 || buffer.is_empty() {
                return Ok(n);
            }
            let Self::Member(member) = std::mem::replace(self, Self::End) else { return Ok(0) };
            let mut rest = member.into_inner();
            let mut padded = false;
            loop {
                let packed = rest.fill_buf()?;
                let zeros = packed.iter().take_while(|&&byte| byte == 0).count();
                match packed.len() {
                    0 => return Ok(0),
                    length if zeros == length => padded = true,
                    _ if zeros > 0 || padded => {
                        return Err(io::Error::other("more data after the padding of a gzip file"));
                    }
                    _ => break,
                }
                rest.consume(zeros);
            }
            *self = Self::Member(GzDecoder::new(rest));
        }
    }
}

/// Reads on to the end, where only the padding of the last record may come.
fn only_zeros(mut rest: impl Read) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 16];
    loop {
        match rest.read(&mut buffer)? {
            0 => return Ok(()),
            n if buffer[..n].iter().any(|&byte| byte != 0) => {
                return Err(io::Error::other("more data after the end-of-archive mark"));
            }
            _ => {}
        }
    }
}

/// Bytes read and the limit on them.
#[derive(Default)]
struct Meter {
    done: Cell<u64>,
    allowed: Cell<u64>,
    /// Set by a read at the end of the data.
    ended: Cell<bool>,
}

struct Metered<R> {
    inner: R,
    meter: Rc<Meter>,
    /// Meter of the packed bytes, if these are the unpacked ones.
    packed: Option<Rc<Meter>>,
}

impl<R: Read> Read for Metered<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        let done = self.meter.done.get() + n as u64;
        self.meter.done.set(done);
        self.meter.ended.set(n == 0 && !buffer.is_empty());
        let most =
            |packed: &Rc<Meter>| MAX_RATIO.saturating_mul(packed.done.get()).max(ANY_RATIO_BYTES);
        if self.packed.as_ref().is_some_and(|packed| done > most(packed)) {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        if done > self.meter.allowed.get() {
            return Err(io::Error::other("more headers or padding than an archive needs"));
        }
        Ok(n)
    }
}
