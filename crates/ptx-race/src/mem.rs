//! Global memory: a registry of buffers with gaps between them.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

/// Where the shared and local windows lie in the generic address space.
pub(crate) const SHARED_WINDOW: u64 = 0x7F00_0000_0000;
pub(crate) const LOCAL_WINDOW: u64 = 0x7E00_0000_0000;
pub(crate) const WINDOW_SIZE: u64 = 1 << 32;

/// First address handed out, and the unmapped bytes kept around every buffer.
const FIRST: u64 = 0x10_0000_0000;
const GAP: u64 = 4096;
const ALIGNMENT: u64 = 256;
/// Freed ranges remembered, so that a long run does not grow without end.
const REMEMBERED: usize = 4096;

/// Bytes that several threads of the simulator may touch at once.
struct Bytes {
    words: Box<[AtomicU64]>,
    len: usize,
}

macro_rules! access {
    ($load:ident, $store:ident, $ty:ty, $atomic:ty) => {
        fn $load(&self, at: usize) -> $ty {
            let size = size_of::<$ty>();
            assert!(at % size == 0 && at + size <= self.len, "access checked before");
            // SAFETY: in bounds and aligned by the assertion; the words outlive the reference,
            // and all accesses to them are atomic.
            unsafe { <$atomic>::from_ptr(self.base().add(at).cast()) }.load(Relaxed)
        }
        fn $store(&self, at: usize, value: $ty) {
            let size = size_of::<$ty>();
            assert!(at % size == 0 && at + size <= self.len, "access checked before");
            // SAFETY: as for the load.
            unsafe { <$atomic>::from_ptr(self.base().add(at).cast()) }.store(value, Relaxed);
        }
    };
}

impl Bytes {
    fn filled(len: usize, byte: u8) -> Bytes {
        // Zeros come from the system without being touched.
        let words = vec![u64::from_ne_bytes([byte; 8]); len.div_ceil(8)].into_boxed_slice();
        // SAFETY: AtomicU64 has the size, alignment and bit validity of u64, so the allocation
        // keeps its layout.
        let words = unsafe { Box::from_raw(Box::into_raw(words) as *mut [AtomicU64]) };
        Bytes { words, len }
    }

    fn base(&self) -> *mut u8 {
        self.words.as_ptr().cast_mut().cast()
    }

    access!(load8, store8, u8, AtomicU8);
    access!(load16, store16, u16, AtomicU16);
    access!(load32, store32, u32, AtomicU32);
    access!(load64, store64, u64, AtomicU64);

    fn load(&self, at: usize, size: usize) -> u64 {
        match size {
            1 => self.load8(at).into(),
            2 => self.load16(at).into(),
            4 => self.load32(at).into(),
            _ => self.load64(at),
        }
    }

    fn store(&self, at: usize, size: usize, value: u64) {
        match size {
            1 => self.store8(at, value as u8),
            2 => self.store16(at, value as u16),
            4 => self.store32(at, value as u32),
            _ => self.store64(at, value),
        }
    }

    fn write(&self, at: usize, from: &[u8]) {
        for (i, &byte) in from.iter().enumerate() {
            self.store8(at + i, byte);
        }
    }
}

/// One allocation.
pub(crate) struct Buffer {
    data: Bytes,
    /// A byte of ones for every byte written; absent if all of it was from the start.
    written: Option<Bytes>,
    /// The host wrote the whole buffer since.
    complete: AtomicBool,
}

impl Buffer {
    fn tracked(&self) -> Option<&Bytes> {
        self.written.as_ref().filter(|_| !self.complete.load(Relaxed))
    }

    /// Whether `size` bytes (a power of two, aligned) were all written.
    pub fn is_written(&self, at: usize, size: usize) -> bool {
        self.tracked().is_none_or(|written| {
            let ones = u64::MAX >> (64 - 8 * size);
            written.load(at, size) == ones
        })
    }

    /// Loads 1, 2, 4 or 8 aligned bytes.
    pub fn load(&self, at: usize, size: usize) -> u64 {
        self.data.load(at, size)
    }

    /// Stores 1, 2, 4 or 8 aligned bytes.
    pub fn store(&self, at: usize, size: usize, value: u64) {
        self.data.store(at, size, value);
        if let Some(written) = self.tracked() {
            written.store(at, size, u64::MAX);
        }
    }
}

#[derive(Clone)]
struct Entry {
    base: u64,
    len: u64,
    /// None once freed.
    buffer: Option<Arc<Buffer>>,
}

/// The buffers that exist at one moment, by address.
#[derive(Clone, Default)]
pub(crate) struct Table {
    entries: Vec<Entry>,
    next: u64,
    freed: usize,
}

/// Why an address must not be accessed.
pub(crate) enum Miss {
    Freed { base: u64, len: u64 },
    Outside { nearest: Option<(u64, u64)> },
}

impl Table {
    /// Index of the live buffer that holds the address; `hint` is tried first.
    pub fn find(&self, address: u64, hint: usize) -> Result<usize, Miss> {
        let holds = |entry: &Entry| address.wrapping_sub(entry.base) < entry.len;
        if self.entries.get(hint).is_some_and(|entry| holds(entry) && entry.buffer.is_some()) {
            return Ok(hint);
        }
        let after = self.entries.partition_point(|entry| entry.base <= address);
        if let Some(entry) = after.checked_sub(1).map(|before| &self.entries[before])
            && holds(entry)
        {
            return match entry.buffer {
                Some(_) => Ok(after - 1),
                None => Err(Miss::Freed { base: entry.base, len: entry.len }),
            };
        }
        let nearest = [after.checked_sub(1), Some(after)]
            .into_iter()
            .flatten()
            .filter_map(|index| self.entries.get(index))
            .filter(|entry| entry.buffer.is_some())
            .map(|entry| (entry.base, entry.len))
            .min_by_key(
                |&(base, len)| {
                    if address < base { base - address } else { address - (base + len) }
                },
            );
        Err(Miss::Outside { nearest })
    }

    /// The buffer of an index that [`Table::find`] gave, with its address and length.
    pub fn get(&self, index: usize) -> (u64, u64, &Buffer) {
        let entry = &self.entries[index];
        (entry.base, entry.len, entry.buffer.as_ref().expect("find gives live buffers only"))
    }
}

/// A host-side access that names no memory it may touch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryError {
    message: String,
}

impl fmt::Display for MemoryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for MemoryError {}

/// The device memory of the simulator.
///
/// Addresses are never handed out twice and buffers lie apart, so that an access outside a buffer
/// or to a freed one is always found. All methods take `&self`; launches may run meanwhile and
/// see the buffers that existed when they started.
#[derive(Default)]
pub struct Memory {
    table: RwLock<Arc<Table>>,
    /// Addresses of the `.global` and `.const` variables of the modules launched so far.
    modules: Mutex<HashMap<u64, Arc<[u64]>>>,
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Memory({} buffers)", self.snapshot().entries.len())
    }
}

impl Memory {
    /// Memory with nothing in it.
    pub fn new() -> Memory {
        Memory::default()
    }

    pub(crate) fn snapshot(&self) -> Arc<Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn insert(&self, data: Bytes, written: Option<Bytes>) -> u64 {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let table = Arc::make_mut(&mut table);
        let base = table.next.max(FIRST);
        let len = data.len as u64;
        table.next = (base + len + GAP).next_multiple_of(ALIGNMENT);
        let buffer = Arc::new(Buffer { data, written, complete: AtomicBool::new(false) });
        table.entries.push(Entry { base, len, buffer: Some(buffer) });
        base
    }

    /// A buffer that holds these bytes; gives its address.
    pub fn alloc(&self, bytes: &[u8]) -> u64 {
        let data = Bytes::filled(bytes.len(), 0);
        data.write(0, bytes);
        self.insert(data, None)
    }

    /// A buffer of zeros.
    pub fn alloc_zeroed(&self, len: usize) -> u64 {
        self.insert(Bytes::filled(len, 0), None)
    }

    /// A buffer whose bytes must be written before they are read.
    pub fn alloc_uninit(&self, len: usize) -> u64 {
        self.insert(Bytes::filled(len, 0xCB), Some(Bytes::filled(len, 0)))
    }

    /// Gives a buffer back. Its address stays known as freed.
    pub fn free(&self, address: u64) -> Result<(), MemoryError> {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let table = Arc::make_mut(&mut table);
        let found = table.entries.binary_search_by_key(&address, |entry| entry.base);
        let Some(entry) = found.ok().map(|index| &mut table.entries[index]) else {
            return Err(MemoryError { message: format!("free of {address:#x}: no buffer there") });
        };
        if entry.buffer.take().is_none() {
            return Err(MemoryError { message: format!("{address:#x} is freed already") });
        }
        table.freed += 1;
        if table.freed > 2 * REMEMBERED {
            let mut forget = table.freed - REMEMBERED;
            table.freed = REMEMBERED;
            table.entries.retain(|entry| {
                let old = entry.buffer.is_none() && forget > 0;
                forget -= usize::from(old);
                !old
            });
        }
        Ok(())
    }

    /// Runs `f` on the buffer that holds all of a range.
    fn with<T>(
        &self,
        address: u64,
        len: usize,
        f: impl FnOnce(&Buffer, usize) -> T,
    ) -> Result<T, MemoryError> {
        let table = self.snapshot();
        let message = match table.find(address, usize::MAX) {
            Ok(index) => {
                let (base, size, buffer) = table.get(index);
                if len as u64 <= base + size - address {
                    return Ok(f(buffer, (address - base) as usize));
                }
                format!("{len} bytes at {address:#x} run past the end of a buffer of {size} bytes")
            }
            Err(Miss::Freed { base, len }) => {
                format!("{address:#x} lies in a freed buffer of {len} bytes at {base:#x}")
            }
            Err(Miss::Outside { .. }) => format!("{address:#x} lies in no buffer"),
        };
        Err(MemoryError { message })
    }

    /// Copies bytes from the host.
    pub fn write(&self, address: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.with(address, bytes.len(), |buffer, at| {
            buffer.data.write(at, bytes);
            if let Some(written) = buffer.tracked() {
                if bytes.len() == buffer.data.len {
                    buffer.complete.store(true, Relaxed);
                } else {
                    (at..at + bytes.len()).for_each(|at| written.store8(at, 0xFF));
                }
            }
        })
    }

    /// Copies bytes to the host. Bytes that nothing has written are an error.
    pub fn read(&self, address: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        if into.is_empty() {
            return Ok(());
        }
        self.with(address, into.len(), |buffer, at| {
            for (i, byte) in into.iter_mut().enumerate() {
                if !buffer.is_written(at + i, 1) {
                    let message = format!("byte {} of the buffer was never written", at + i);
                    return Err(MemoryError { message });
                }
                *byte = buffer.data.load8(at + i);
            }
            Ok(())
        })?
    }

    /// Bytes as a vector; see [`Memory::read`].
    pub fn read_vec(&self, address: u64, len: usize) -> Result<Vec<u8>, MemoryError> {
        if len > 0 {
            self.with(address, len, |_, _| ())?;
        }
        let mut bytes = vec![0; len];
        self.read(address, &mut bytes)?;
        Ok(bytes)
    }

    /// The addresses of a module's variables, made by `init` at its first launch here.
    pub(crate) fn variables(
        &self,
        module: u64,
        init: impl FnOnce(&Memory) -> Vec<u64>,
    ) -> Arc<[u64]> {
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        modules.entry(module).or_insert_with(|| init(self).into()).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_is_checked_too() {
        let memory = Memory::new();
        let a = memory.alloc(&[1, 2, 3]);
        let b = memory.alloc_uninit(16);
        assert_eq!(memory.read_vec(a + 1, 2).unwrap(), [2, 3]);
        assert!(memory.read_vec(a, 4).is_err());
        assert!(memory.read_vec(a, usize::MAX).is_err());
        assert!(memory.read_vec(b, 1).unwrap_err().to_string().contains("never written"));
        memory.write(b + 4, &[7; 4]).unwrap();
        assert_eq!(memory.read_vec(b + 4, 4).unwrap(), [7; 4]);
        assert!(memory.read_vec(b + 4, 5).is_err());
        memory.write(b, &[1; 16]).unwrap();
        assert!(memory.read_vec(b, 16).is_ok());
        memory.free(a).unwrap();
        assert!(memory.write(a, &[0]).unwrap_err().to_string().contains("freed"));
        assert!(memory.free(a).is_err());
    }

    #[test]
    fn freed_ranges_are_forgotten_in_the_end() {
        let memory = Memory::new();
        let kept = memory.alloc(&[1]);
        for _ in 0..3 * REMEMBERED {
            memory.free(memory.alloc(&[0])).unwrap();
        }
        assert!(memory.snapshot().entries.len() <= 2 * REMEMBERED + 1);
        assert_eq!(memory.read_vec(kept, 1).unwrap(), [1]);
    }
}
