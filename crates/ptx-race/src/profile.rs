//! Memory accesses by instruction: shared-memory bank conflicts and global-memory sectors.

use std::collections::BTreeMap;

use crate::fault::{Place, SourceLine};
use crate::registers::{Lanes, WARP, lanes_of};

/// Bytes of a sector, the unit of global-memory traffic.
const SECTOR: u64 = 32;
/// Banks of shared memory, each of one word.
const BANKS: u64 = 32;
const WORD: u64 = 4;

/// The memory an access went to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum AccessSpace {
    /// Global memory, constants included.
    Global,
    /// Shared memory.
    Shared,
}

/// What an instruction asked of memory over a launch.
///
/// `transactions` are 32-byte sectors of global memory, or passes through the banks of shared
/// memory: a pass serves one word per bank, for 32 lanes of up to 4 bytes, 16 lanes of 8, 8 lanes
/// of 16 or one matrix of `ldmatrix`. `ideal` is what they would be if lanes were coalesced, or
/// free of bank conflicts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccessProfile {
    /// 1-based line of the PTX text.
    pub ptx_line: u32,
    /// Opcode there.
    pub opcode: String,
    /// CUDA source line, if the PTX names it.
    pub source: Option<SourceLine>,
    /// Memory the accesses went to; a generic one may have gone to both.
    pub space: AccessSpace,
    /// Executions by a warp with at least one lane in this space.
    pub requests: u64,
    /// Bytes of all lanes.
    pub bytes: u64,
    /// Sectors or passes.
    pub transactions: u64,
    /// Sectors or passes that would do.
    pub ideal: u64,
}

/// Counts of one instruction in one space.
#[derive(Clone, Copy, Default)]
pub(crate) struct Counts {
    pub requests: u64,
    pub bytes: u64,
    pub transactions: u64,
    pub ideal: u64,
}

/// Counts of a launch, by instruction.
#[derive(Default)]
pub(crate) struct Profile {
    pub by_place: BTreeMap<(Place, AccessSpace), Counts>,
}

impl Profile {
    /// Counts a request: `size` bytes for each lane of the mask.
    pub fn count(
        &mut self,
        place: Place,
        space: AccessSpace,
        at: &Lanes<u64>,
        mask: u32,
        size: u64,
    ) {
        let (transactions, ideal) = match space {
            AccessSpace::Global => sectors(at, mask, size),
            AccessSpace::Shared => passes(at, mask, size),
        };
        let counts = self.by_place.entry((place, space)).or_default();
        counts.requests += 1;
        counts.bytes += size * u64::from(mask.count_ones());
        counts.transactions += transactions;
        counts.ideal += ideal;
    }

    pub fn add(&mut self, other: &Profile) {
        for (&key, theirs) in &other.by_place {
            let mine = self.by_place.entry(key).or_default();
            mine.requests += theirs.requests;
            mine.bytes += theirs.bytes;
            mine.transactions += theirs.transactions;
            mine.ideal += theirs.ideal;
        }
    }
}

/// Distinct units of `unit` bytes that some lanes touch, in order.
fn units(at: &Lanes<u64>, lanes: impl Iterator<Item = usize>, size: u64, unit: u64) -> Vec<u64> {
    let touched = lanes.flat_map(|lane| at[lane] / unit..=at[lane].saturating_add(size - 1) / unit);
    let mut touched: Vec<u64> = touched.collect();
    touched.sort_unstable();
    touched.dedup();
    touched
}

fn sectors(at: &Lanes<u64>, mask: u32, size: u64) -> (u64, u64) {
    // Distinct accesses are what a coalesced request would bring.
    let distinct = units(at, lanes_of(mask), size, size).len() as u64 * size;
    let touched = units(at, lanes_of(mask), size, SECTOR).len() as u64;
    (touched, distinct.div_ceil(SECTOR))
}

fn passes(at: &Lanes<u64>, mask: u32, size: u64) -> (u64, u64) {
    // Wide accesses go in groups of lanes that fill the banks once.
    let group = WARP.min(((BANKS * WORD) / size.max(WORD)) as usize);
    let (mut taken, mut ideal) = (0, 0);
    for first in (0..WARP).step_by(group) {
        let lanes = lanes_of(mask).filter(|lane| (first..first + group).contains(lane));
        let mut words = [0; BANKS as usize];
        for word in units(at, lanes, size, WORD) {
            words[(word % BANKS) as usize] += 1;
        }
        let most = words.into_iter().max().unwrap_or(0);
        taken += most;
        ideal += u64::from(most > 0);
    }
    (taken, ideal)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lanes(address: impl Fn(u64) -> u64) -> Lanes<u64> {
        std::array::from_fn(|lane| address(lane as u64))
    }

    #[test]
    fn passes_count_the_words_of_the_busiest_bank() {
        for (stride, size, wanted) in [
            (4, 4, (1, 1)),
            (8, 4, (2, 1)),
            (128, 4, (32, 1)),
            (132, 4, (1, 1)),
            (0, 4, (1, 1)),
            (2, 2, (1, 1)),
            (8, 8, (2, 2)),
            (16, 16, (4, 4)),
            (128, 16, (32, 4)),
            (144, 16, (4, 4)),
        ] {
            assert_eq!(passes(&lanes(|lane| lane * stride), !0, size), wanted, "{stride} {size}");
        }
        // Half a warp, and a warp whose lanes pair up on words.
        assert_eq!(passes(&lanes(|lane| lane * 128), 0xFFFF, 4), (16, 1));
        assert_eq!(passes(&lanes(|lane| lane / 2 * 4), !0, 4), (1, 1));
    }

    #[test]
    fn sectors_count_what_is_touched() {
        for (start, stride, size, wanted) in [
            (0, 4, 4, (4, 4)),
            (4, 4, 4, (5, 4)),
            (0, 128, 4, (32, 4)),
            (0, 0, 4, (1, 1)),
            (0, 16, 16, (16, 16)),
            (0, 2, 2, (2, 2)),
        ] {
            let at = lanes(|lane| start + lane * stride);
            assert_eq!(sectors(&at, !0, size), wanted, "{start} {stride} {size}");
        }
    }
}
