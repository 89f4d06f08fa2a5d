//! Addresses in a device's memory, and the table of allocations that they are checked against.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error;

/// A range of bytes of an allocation. A device gives it a place in memory when it is used, and refuses
/// it if the allocation was freed or is of another device, or if an access leaves the range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Address {
    /// Number of the allocation, unique in the process; 0 for null.
    allocation: u64,
    /// Bytes from the beginning of the allocation; may lie outside the range until it is used.
    offset: i64,
    /// End of the range, in bytes from the beginning of the allocation.
    end: i64,
}

/// Alignment of every allocation in bytes.
pub(super) const ALIGN_BYTES: usize = 256;

impl Address {
    /// The null pointer, which kernels take for an absent argument.
    pub const NULL: Address = Address { allocation: 0, offset: 0, end: 0 };

    /// The address `bytes` further on, with the same end.
    #[must_use]
    pub fn plus(self, bytes: usize) -> Address {
        Address { offset: self.offset + bytes as i64, ..self }
    }

    /// The address `bytes` before, with the same end: of element 0 of an array of which only a later
    /// part is in memory.
    #[must_use]
    pub fn minus(self, bytes: usize) -> Address {
        Address { offset: self.offset - bytes as i64, ..self }
    }

    /// The first `bytes` of the range.
    #[must_use]
    pub fn first(self, bytes: usize) -> Address {
        Address { end: self.end.min(self.offset + bytes as i64), ..self }
    }

    /// The largest power of two, up to 256, that divides the address.
    pub fn alignment(self) -> usize {
        1 << self.offset.trailing_zeros().min(ALIGN_BYTES.trailing_zeros())
    }
}

/// The live allocations of a device.
#[derive(Debug, Default)]
pub(super) struct Allocations {
    live: HashMap<u64, Allocation>,
    /// Allocations used since the beginning of a stream capture.
    used: Option<BTreeSet<u64>>,
}

#[derive(Clone, Copy, Debug)]
struct Allocation {
    base: u64,
    bytes: usize,
}

/// The allocations that a captured graph uses.
#[derive(Clone, Debug)]
pub(super) struct Used(BTreeSet<u64>);

impl Allocations {
    /// Registers memory at `base`, a multiple of 256.
    pub fn insert(&mut self, base: u64, bytes: usize) -> Address {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        assert!(base.is_multiple_of(ALIGN_BYTES as u64), "allocations are aligned");
        let allocation = NEXT.fetch_add(1, Ordering::Relaxed);
        self.live.insert(allocation, Allocation { base, bytes });
        Address { allocation, offset: 0, end: bytes as i64 }
    }

    /// Removes an allocation, and returns where it was.
    pub fn remove(&mut self, address: Address) -> anyhow::Result<u64> {
        if address.offset != 0 {
            return Err(error::internal(format!(
                "free of {address:?}, which begins no allocation"
            )));
        }
        let freed = self.live.remove(&address.allocation);
        freed.map(|allocation| allocation.base).ok_or_else(|| gone(address))
    }

    /// Removes all allocations, and returns where they were.
    pub fn drain(&mut self) -> impl Iterator<Item = u64> {
        self.live.drain().map(|(_, allocation)| allocation.base)
    }

    /// Bytes of all allocations.
    pub fn bytes(&self) -> u64 {
        self.live.values().map(|allocation| allocation.bytes as u64).sum()
    }

    /// Where `bytes` from `address` on are, if all of them are in its range.
    pub fn range(&mut self, address: Address, bytes: usize) -> anyhow::Result<u64> {
        self.note(address);
        self.peek(address, bytes)
    }

    /// [`Allocations::range`], for an access outside stream capture.
    pub fn peek(&self, address: Address, bytes: usize) -> anyhow::Result<u64> {
        let allocation = self.live.get(&address.allocation).ok_or_else(|| gone(address))?;
        let end = i64::try_from(bytes).ok().and_then(|bytes| address.offset.checked_add(bytes));
        if address.offset < 0 || end.is_none_or(|end| end > address.end) {
            return Err(error::internal(format!(
                "{bytes} bytes at {address:?} are outside its range"
            )));
        }
        Ok(allocation.base + address.offset as u64)
    }

    /// What a kernel is passed for an address. The kernel's accesses are not known here: the address may
    /// be that of an element outside the range.
    pub fn pointer(&mut self, address: Address) -> anyhow::Result<u64> {
        if address == Address::NULL {
            return Ok(0);
        }
        self.note(address);
        let allocation = self.live.get(&address.allocation).ok_or_else(|| gone(address))?;
        Ok(allocation.base.wrapping_add_signed(address.offset))
    }

    fn note(&mut self, address: Address) {
        if let Some(used) = &mut self.used {
            used.insert(address.allocation);
        }
    }

    /// Begins to collect the allocations that are used.
    pub fn begin_capture(&mut self) {
        self.used = Some(BTreeSet::new());
    }

    /// The allocations used since [`Allocations::begin_capture`].
    pub fn end_capture(&mut self) -> Used {
        Used(self.used.take().unwrap_or_default())
    }

    /// An error if an allocation that a graph uses was freed.
    pub fn check(&self, Used(used): &Used) -> anyhow::Result<()> {
        match used.iter().find(|allocation| !self.live.contains_key(allocation)) {
            Some(_) => Err(error::internal("launch of a graph whose memory was freed")),
            None => Ok(()),
        }
    }
}

fn gone(address: Address) -> anyhow::Error {
    error::internal(format!("{address:?} is null, was freed or is of another device"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accesses_stay_in_the_range_of_a_live_allocation() {
        let mut table = Allocations::default();
        let a = table.insert(512, 100);
        assert_eq!(table.range(a, 100).unwrap(), 512);
        assert_eq!(table.range(a.plus(60), 40).unwrap(), 572);
        assert_eq!(table.range(a.plus(100), 0).unwrap(), 612);
        // Of the moments of elements 10 to 35, the address of element 0.
        let shifted = a.minus(40);
        assert_eq!(table.range(shifted.plus(40), 100).unwrap(), 512);
        assert_eq!(table.pointer(shifted).unwrap(), 472);
        for (at, bytes) in [
            (a, 101),
            (a.plus(60), 41),
            (a.plus(101), 0),
            (shifted, 1),
            (a.first(60), 61),
            (a.plus(8).first(8), 9),
            (a.first(60).first(80), 61),
            (a, usize::MAX),
            (Address::NULL, 0),
        ] {
            assert!(table.range(at, bytes).is_err(), "{bytes} bytes at {at:?}");
        }
        assert!(table.remove(a.plus(4)).is_err());
        let mut other = Allocations::default();
        other.insert(512, 100);
        assert!(other.range(a, 1).is_err() && other.pointer(a).is_err());
        assert_eq!(table.remove(a).unwrap(), 512);
        assert!(table.range(a, 1).is_err() && table.pointer(a).is_err());
        assert!(table.remove(a).is_err(), "freed twice");
        assert_eq!(table.pointer(Address::NULL).unwrap(), 0);
    }

    #[test]
    fn graphs_are_refused_once_their_memory_is_freed() {
        let mut table = Allocations::default();
        let [a, b] = [table.insert(0, 8), table.insert(256, 8)];
        table.begin_capture();
        table.pointer(a).unwrap();
        let used = table.end_capture();
        table.pointer(b).unwrap();
        table.remove(b).unwrap();
        table.check(&used).unwrap();
        table.remove(a).unwrap();
        assert!(table.check(&used).is_err());
    }
}
