//! Data races, by vector clocks.
//!
//! Every warp counts its synchronizing operations; that count is the time of its accesses. What a
//! warp knows of the others' times comes from barriers alone, and, between blocks, from atomics
//! between fences. Inside a warp each lane knows the others' times from `bar.warp.sync` and
//! barriers: shuffles and running in step order nothing. An access races with an earlier one by
//! another thread whose time it does not know.
//!
//! Cells are of two bytes. Each remembers its last write and the reads since that no later read
//! replaces. A write of what is there already does not race with the write before it: several
//! warps, or lanes of one instruction, may write the same value to one place.

use std::collections::{BTreeMap, HashMap};

use crate::fault::{Access, Place};
use crate::registers::{WARP, lanes_of};

/// Bytes of global memory whose cells are kept together.
const PAGE: u64 = 512;

/// Records the detector may hold, of some 24 bytes each.
const MAX_RECORDS: usize = 1 << 26;
/// Warps of other blocks whose times a warp may know.
const MAX_KNOWN_WARPS: usize = 1 << 18;
/// Records that cost as much to look at as an instruction to execute.
const RECORDS_PER_INSTRUCTION: u64 = 64;

/// The thread at work, by warp of its block and lane, and its instruction.
#[derive(Clone, Copy)]
pub(crate) struct Who {
    pub warp: usize,
    pub lane: usize,
    pub place: Place,
}

/// Some of memory: an offset in shared memory or a global address.
#[derive(Clone, Copy)]
pub(crate) struct ByteRange {
    pub shared: bool,
    pub at: u64,
    pub size: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum WriteKind {
    Plain,
    /// Atomic, volatile or relaxed: does not race with its like.
    Strong,
    /// The destination of a copy in flight: nobody may touch it.
    InFlight,
}

#[derive(Clone, Copy)]
struct WriteRecord {
    /// Warp of the whole grid.
    warp: u32,
    lane: u8,
    bytes: u8,
    kind: WriteKind,
    time: u32,
    place: Place,
}

#[derive(Clone, Copy)]
struct ReadRecord {
    warp: u32,
    lanes: u32,
    bytes: u8,
    strong: bool,
    time: u32,
    place: Place,
}

#[derive(Clone, Default)]
struct Cell {
    write: Option<WriteRecord>,
    reads: Vec<ReadRecord>,
}

/// Latest times known, by warp of the block and by warp of other blocks.
#[derive(Clone, Default)]
struct Known {
    own: Vec<u32>,
    others: BTreeMap<u32, u32>,
}

impl Known {
    fn join(&mut self, other: &Known) {
        for (mine, theirs) in self.own.iter_mut().zip(&other.own) {
            *mine = (*mine).max(*theirs);
        }
        for (&warp, &time) in &other.others {
            let mine = self.others.entry(warp).or_default();
            *mine = time.max(*mine);
        }
    }
}

struct WarpClock {
    time: u32,
    known: Known,
    /// What was known at the last fence: what an atomic hands on.
    fenced: Option<Known>,
    /// `lanes[i][j]`: the time of lane j that lane i knows.
    lanes: Box<[[u32; WARP]; WARP]>,
}

/// What a warp knew, and had fenced, as it arrived at a barrier that it did not wait at.
pub(crate) struct Arrived {
    known: Known,
    fenced: Option<Known>,
}

/// The detector of one launch.
pub(crate) struct Race {
    warps_per_block: u32,
    block: u32,
    warps: Vec<WarpClock>,
    shared: Vec<Cell>,
    global: HashMap<u64, Vec<Cell>>,
    /// What atomics left at each location.
    handed_on: HashMap<(bool, u64), BTreeMap<u32, u32>>,
    /// Records looked at since they were last counted as work.
    cost: u64,
    /// Records held, of some 24 bytes each, and how many may be.
    held: usize,
    max_held: usize,
    full: bool,
}

/// The earlier access of a race.
pub(crate) struct Conflict {
    pub earlier: Access,
    pub was_write: bool,
    pub in_flight: bool,
}

impl Race {
    pub fn new(warps_per_block: usize) -> Race {
        Race {
            warps_per_block: warps_per_block as u32,
            block: 0,
            warps: Vec::new(),
            shared: Vec::new(),
            global: HashMap::new(),
            handed_on: HashMap::new(),
            cost: 0,
            held: 0,
            max_held: MAX_RECORDS,
            full: false,
        }
    }

    /// Work done since the last call, in warp instructions.
    pub fn take_cost(&mut self) -> u64 {
        std::mem::take(&mut self.cost) / RECORDS_PER_INSTRUCTION
    }

    /// Whether more is to be remembered than may be held.
    pub fn is_full(&self) -> bool {
        self.full || self.held > self.max_held
    }

    /// A new block begins, knowing nothing of the others.
    pub fn start_block(&mut self, block: u32, shared_bytes: usize) {
        self.block = block;
        let count = self.warps_per_block as usize;
        self.warps = (0..count)
            .map(|_| WarpClock {
                time: 1,
                known: Known { own: vec![0; count], others: BTreeMap::new() },
                fenced: None,
                lanes: Box::new([[0; WARP]; WARP]),
            })
            .collect();
        // What was kept of shared memory is gone with the block that it was of.
        let mut gone: usize = self.shared.iter().map(|cell| cell.reads.len()).sum();
        self.handed_on.retain(|&(shared, _), times| {
            gone += if shared { times.len() } else { 0 };
            !shared
        });
        self.held = self.held.saturating_sub(gone);
        self.shared.clear();
        self.shared.resize(shared_bytes.div_ceil(2), Cell::default());
    }

    /// Whether `who` knows of what another warp's or lane's access at a time did.
    fn ordered(&self, who: Who, warp: u32, lane: usize, time: u32) -> bool {
        let clock = &self.warps[who.warp];
        let in_block = warp.wrapping_sub(self.block * self.warps_per_block);
        if in_block >= self.warps_per_block {
            return clock.known.others.get(&warp).is_some_and(|&known| known >= time);
        }
        let warp = in_block as usize;
        if warp == who.warp {
            return lane == who.lane || clock.lanes[who.lane][lane] >= time;
        }
        clock.known.own[warp] >= time
    }

    fn cells(range: ByteRange) -> impl Iterator<Item = (u64, u8)> {
        let (first, end) = (range.at, range.at + range.size);
        (first / 2..end.div_ceil(2)).map(move |cell| {
            let low = u8::from(cell * 2 >= first);
            let high = u8::from(cell * 2 + 1 < end) << 1;
            (cell, low | high)
        })
    }

    fn cell(&mut self, shared: bool, cell: u64) -> &mut Cell {
        if shared {
            return &mut self.shared[cell as usize];
        }
        let held = &mut self.held;
        let page = self.global.entry(cell * 2 / PAGE).or_insert_with(|| {
            *held += PAGE as usize;
            vec![Cell::default(); PAGE as usize / 2]
        });
        &mut page[(cell % (PAGE / 2)) as usize]
    }

    fn access(&self, warp: u32, lane: usize, place: Place) -> Access {
        let block = warp / self.warps_per_block;
        let thread = warp % self.warps_per_block * WARP as u32 + lane as u32;
        Access { place, block, thread }
    }

    fn conflict_with_write(&self, who: Who, write: &WriteRecord, strong: bool) -> Option<Conflict> {
        let in_flight = write.kind == WriteKind::InFlight;
        let quiet = write.kind == WriteKind::Strong && strong
            || !in_flight && self.ordered(who, write.warp, write.lane.into(), write.time);
        (!quiet).then(|| Conflict {
            earlier: self.access(write.warp, write.lane.into(), write.place),
            was_write: true,
            in_flight,
        })
    }

    fn grid_warp(&self, who: Who) -> u32 {
        self.block * self.warps_per_block + who.warp as u32
    }

    /// A read; gives the write it races with.
    pub fn read(&mut self, who: Who, range: ByteRange, strong: bool) -> Result<(), Box<Conflict>> {
        let (warp, time) = (self.grid_warp(who), self.warps[who.warp].time);
        for (index, bytes) in Self::cells(range) {
            let write = self.cell(range.shared, index).write;
            let conflict = write
                .filter(|write| write.bytes & bytes != 0)
                .and_then(|write| self.conflict_with_write(who, &write, strong));
            let same = |read: &&mut ReadRecord| {
                (read.warp, read.time, read.bytes, read.strong) == (warp, time, bytes, strong)
            };
            let cell = self.cell(range.shared, index);
            let before = cell.reads.len();
            if let Some(read) = cell.reads.iter_mut().find(same) {
                read.lanes |= 1 << who.lane;
            } else {
                let mut reads = std::mem::take(&mut cell.reads);
                // Who is ordered after this read is ordered after those it is ordered after.
                reads.retain(|read| {
                    read.bytes & !bytes != 0
                        || strong && !read.strong
                        || !lanes_of(read.lanes)
                            .all(|lane| self.ordered(who, read.warp, lane, read.time))
                });
                let lanes = 1 << who.lane;
                reads.push(ReadRecord { warp, lanes, bytes, strong, time, place: who.place });
                self.held = (self.held + reads.len()).saturating_sub(before);
                self.cell(range.shared, index).reads = reads;
            }
            self.cost += before as u64;
            if let Some(conflict) = conflict {
                return Err(Box::new(conflict));
            }
        }
        Ok(())
    }

    /// A write; gives the access it races with. One that leaves the bytes as they were (`same`)
    /// does not race with the write before it.
    pub fn write(
        &mut self,
        who: Who,
        range: ByteRange,
        kind: WriteKind,
        same: bool,
    ) -> Result<(), Box<Conflict>> {
        let (warp, time) = (self.grid_warp(who), self.warps[who.warp].time);
        let strong = kind == WriteKind::Strong;
        for (index, bytes) in Self::cells(range) {
            let cell = std::mem::take(self.cell(range.shared, index));
            let overlapping = cell.write.filter(|write| write.bytes & bytes != 0);
            let mut conflict = overlapping
                .and_then(|write| self.conflict_with_write(who, &write, strong))
                .filter(|conflict| !same || conflict.in_flight);
            self.cost += cell.reads.len() as u64;
            self.held = self.held.saturating_sub(cell.reads.len());
            for read in &cell.reads {
                if conflict.is_some() || read.bytes & bytes == 0 || read.strong && strong {
                    continue;
                }
                let racing = lanes_of(read.lanes)
                    .find(|&lane| !self.ordered(who, read.warp, lane, read.time));
                conflict = racing.map(|lane| Conflict {
                    earlier: self.access(read.warp, lane, read.place),
                    was_write: false,
                    in_flight: false,
                });
            }
            if let Some(conflict) = conflict {
                return Err(Box::new(conflict));
            }
            let lane = who.lane as u8;
            let write = Some(WriteRecord { warp, lane, bytes, kind, time, place: who.place });
            *self.cell(range.shared, index) = Cell { write, reads: Vec::new() };
        }
        Ok(())
    }

    /// An asynchronous copy has landed: from now on it is a plain write of the thread that waited.
    pub fn land(&mut self, who: Who, range: ByteRange) {
        let (warp, time) = (self.grid_warp(who), self.warps[who.warp].time);
        for (index, bytes) in Self::cells(range) {
            let lane = who.lane as u8;
            let kind = WriteKind::Plain;
            let write = Some(WriteRecord { warp, lane, bytes, kind, time, place: who.place });
            *self.cell(range.shared, index) = Cell { write, reads: Vec::new() };
        }
    }

    /// An atomic hands on what its warp's last fence covered and learns what others left there.
    pub fn atomic(&mut self, who: Who, range: ByteRange) -> Result<(), Box<Conflict>> {
        self.write(who, range, WriteKind::Strong, false)?;
        let (block, count) = (self.block, self.warps_per_block);
        let location = self.handed_on.entry((range.shared, range.at)).or_default();
        let before = location.len();
        let clock = &mut self.warps[who.warp];
        if let Some(fenced) = &clock.fenced {
            let own = fenced.own.iter().enumerate();
            let own = own.map(|(warp, &time)| (block * count + warp as u32, time));
            for (warp, time) in own.chain(fenced.others.iter().map(|(&w, &t)| (w, t))) {
                let known = location.entry(warp).or_default();
                *known = time.max(*known);
            }
        }
        self.cost += location.len() as u64;
        for (&warp, &time) in &*location {
            let known = if warp / count == block {
                &mut clock.known.own[(warp % count) as usize]
            } else {
                clock.known.others.entry(warp).or_default()
            };
            *known = time.max(*known);
        }
        self.held += location.len().saturating_sub(before);
        self.full |= clock.known.others.len() > MAX_KNOWN_WARPS;
        Ok(())
    }

    pub fn fence(&mut self, warp: usize) {
        let clock = &mut self.warps[warp];
        self.cost += clock.known.others.len() as u64;
        clock.known.own[warp] = clock.time;
        clock.fenced = Some(clock.known.clone());
        clock.time += 1;
    }

    /// `bar.warp.sync`: the lanes of the mask learn all that any of them knew.
    pub fn sync_warp(&mut self, warp: usize, mask: u32) {
        let clock = &mut self.warps[warp];
        let mut joined = [0; WARP];
        for lane in lanes_of(mask) {
            for (known, theirs) in joined.iter_mut().zip(&clock.lanes[lane]) {
                *known = (*known).max(*theirs);
            }
        }
        for lane in lanes_of(mask) {
            joined[lane] = clock.time;
        }
        for lane in lanes_of(mask) {
            clock.lanes[lane] = joined;
        }
        clock.time += 1;
    }

    /// A barrier completes: its warps, whether each waited there, and what those that did not knew as they arrived.
    pub fn barrier(&mut self, arrived: &[(usize, bool)], passing: &[Arrived]) {
        let mut all = Known { own: vec![0; self.warps.len()], ..Known::default() };
        let mut fenced: Option<Known> = None;
        let waiting = arrived.iter().filter(|(_, waited)| *waited).map(|&(warp, _)| {
            let clock = &self.warps[warp];
            (&clock.known, &clock.fenced)
        });
        let passing = passing.iter().map(|arrived| (&arrived.known, &arrived.fenced));
        for (known, own) in waiting.chain(passing) {
            self.cost += known.others.len() as u64;
            // The arrival itself was the end of a time, see `arrive`.
            all.join(known);
            if let Some(own) = own {
                fenced.get_or_insert_with(|| all.clone_empty()).join(own);
            }
        }
        for &(warp, waited) in arrived {
            if waited {
                let clock = &mut self.warps[warp];
                clock.known.join(&all);
                if let Some(fenced) = &fenced {
                    clock.fenced.get_or_insert_with(|| all.clone_empty()).join(fenced);
                }
            }
        }
    }

    /// A warp arrives at a barrier: its accesses so far are what the others will know. Of one that goes on without
    /// waiting, what it knows now.
    pub fn arrive(&mut self, warp: usize, waits: bool) -> Option<Arrived> {
        let clock = &mut self.warps[warp];
        clock.known.own[warp] = clock.time;
        if waits {
            clock.lanes.fill([clock.time; WARP]);
        }
        clock.time += 1;
        (!waits).then(|| Arrived { known: clock.known.clone(), fenced: clock.fenced.clone() })
    }
}

impl Known {
    fn clone_empty(&self) -> Known {
        Known { own: vec![0; self.own.len()], others: BTreeMap::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACE: Place = Place { function: 0, pc: 0 };

    fn who(warp: usize, lane: usize) -> Who {
        Who { warp, lane, place: PLACE }
    }

    fn shared(at: u64, size: u64) -> ByteRange {
        ByteRange { shared: true, at, size }
    }

    fn race() -> Race {
        let mut race = Race::new(2);
        race.start_block(0, 64);
        race
    }

    #[test]
    fn a_barrier_orders_and_nothing_else_does() {
        let mut race = race();
        assert!(race.write(who(0, 0), shared(0, 4), WriteKind::Plain, false).is_ok());
        assert!(race.read(who(1, 0), shared(0, 4), false).is_err());
        for warp in [0, 1] {
            race.arrive(warp, true);
        }
        race.barrier(&[(0, true), (1, true)], &[]);
        assert!(race.read(who(1, 0), shared(0, 4), false).is_ok());
        // The read must be over before the next write.
        assert!(race.write(who(0, 0), shared(0, 4), WriteKind::Plain, false).is_err());
    }

    #[test]
    fn arriving_without_waiting_learns_nothing() {
        let mut race = race();
        assert!(race.write(who(0, 0), shared(0, 4), WriteKind::Plain, false).is_ok());
        assert!(race.write(who(1, 0), shared(8, 4), WriteKind::Plain, false).is_ok());
        let passing = race.arrive(0, false).into_iter().collect::<Vec<_>>();
        // What it does afterwards is handed on by no barrier that it passed before, but by the next.
        assert!(race.write(who(0, 0), shared(16, 4), WriteKind::Plain, false).is_ok());
        let next = race.arrive(0, false).into_iter().collect::<Vec<_>>();
        race.arrive(1, true);
        race.barrier(&[(0, false), (1, true)], &passing);
        assert!(race.read(who(1, 0), shared(0, 4), false).is_ok());
        assert!(race.read(who(1, 0), shared(16, 4), false).is_err());
        race.arrive(1, true);
        race.barrier(&[(0, false), (1, true)], &next);
        assert!(race.read(who(1, 0), shared(16, 4), false).is_ok());
        assert!(race.read(who(0, 0), shared(8, 4), false).is_err());
    }

    #[test]
    fn lanes_need_a_warp_sync_that_names_both() {
        let mut race = race();
        assert!(race.write(who(0, 3), shared(0, 4), WriteKind::Plain, false).is_ok());
        race.sync_warp(0, 0b0011);
        assert!(race.read(who(0, 0), shared(0, 4), false).is_err());
        race.sync_warp(0, 0b1011);
        assert!(race.read(who(0, 0), shared(0, 4), false).is_ok());
        assert!(race.read(who(0, 4), shared(0, 4), false).is_err());
    }

    #[test]
    fn the_same_value_may_be_written_twice_but_not_read_unordered() {
        let mut race = race();
        assert!(race.write(who(0, 0), shared(0, 4), WriteKind::Plain, false).is_ok());
        assert!(race.write(who(1, 0), shared(0, 4), WriteKind::Plain, true).is_ok());
        assert!(race.write(who(0, 0), shared(0, 4), WriteKind::Plain, false).is_err());
        assert!(race.read(who(0, 1), shared(0, 4), false).is_err());
        assert!(race.write(who(0, 0), shared(8, 4), WriteKind::InFlight, false).is_ok());
        assert!(race.write(who(1, 0), shared(8, 4), WriteKind::Plain, true).is_err());
    }

    #[test]
    fn records_are_bounded() {
        let mut race = race();
        race.max_held = 8 * PAGE as usize;
        let global = |at| ByteRange { shared: false, at, size: 4 };
        for page in 0..8 {
            assert!(race.write(who(0, 0), global(page * PAGE), WriteKind::Plain, false).is_ok());
            assert!(!race.is_full());
        }
        // Reads by ever more warps that nothing orders pile up on a cell, and are work to look at.
        for block in 1..100 {
            race.start_block(block, 0);
            assert!(race.read(who(0, 0), global(PAGE / 2), false).is_ok());
        }
        assert!(race.is_full());
        assert_eq!(race.take_cost(), 2 * (0..99).sum::<u64>() / RECORDS_PER_INSTRUCTION);
    }

    /// Shared memory is each block's own: neither its records nor what atomics left there outlive a block.
    #[test]
    fn nothing_of_shared_memory_outlives_its_block() {
        let mut race = race();
        race.max_held = 8 * PAGE as usize;
        let global = ByteRange { shared: false, at: 0, size: 4 };
        assert!(race.write(who(0, 0), global, WriteKind::Plain, false).is_ok());
        race.fence(0);
        assert!(race.atomic(who(0, 0), shared(0, 4)).is_ok());
        let before = race.held;
        for block in 1..100 {
            race.start_block(block, 64);
            for warp in [0, 1] {
                assert!(race.read(who(warp, 0), shared(8, 4), false).is_ok());
            }
        }
        race.start_block(100, 64);
        assert!(race.held < before, "{} after {before}", race.held);
        assert!(race.atomic(who(0, 0), shared(0, 4)).is_ok());
        assert!(race.read(who(0, 0), global, false).is_err());
    }

    #[test]
    fn neighboring_bytes_do_not_race() {
        let mut race = race();
        assert!(race.write(who(0, 0), shared(0, 1), WriteKind::Plain, false).is_ok());
        assert!(race.write(who(0, 1), shared(1, 1), WriteKind::Plain, false).is_ok());
        assert!(race.write(who(0, 2), shared(1, 1), WriteKind::Plain, false).is_err());
    }

    #[test]
    fn fences_and_atomics_order_blocks() {
        let global = |at| ByteRange { shared: false, at, size: 4 };
        for fenced in [true, false] {
            let mut race = race();
            assert!(race.write(who(0, 0), global(64), WriteKind::Plain, false).is_ok());
            if fenced {
                race.fence(0);
            }
            assert!(race.atomic(who(0, 0), global(0)).is_ok());
            race.start_block(1, 0);
            assert!(race.atomic(who(1, 0), global(0)).is_ok());
            assert_eq!(race.read(who(1, 0), global(64), false).is_ok(), fenced);
        }
    }
}
