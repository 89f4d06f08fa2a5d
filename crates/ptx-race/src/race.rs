//! Data races, by vector clocks and the memory consistency model of the PTX ISA.
//!
//! Every warp counts its barriers and releases; that count is the time of its accesses. What a
//! warp knows of the others' times comes from barriers, and from acquiring what strong writes
//! left at a location. Inside a warp each lane knows the others' times from `bar.warp.sync` and
//! barriers: shuffles and running in step order nothing. An access races with an earlier one by
//! another thread whose time it does not know, unless the two are morally strong.
//!
//! A strong write leaves what its warp knew at its last release fence, or knows now if it is a
//! release itself. Who reads it has seen that, and knows it if the read is an acquire, or else
//! after an acquire fence. All of this is kept by scope.
//!
//! Cells are of two bytes. Each remembers its last write and the reads since that no later read
//! replaces. A write of what is there already does not race with the write before it: several
//! warps, or lanes of one instruction, may write the same value to one place.

use std::collections::{BTreeMap, HashMap};

use crate::fault::{Access, Place};
use crate::op::{Scope, Strong};
use crate::registers::{WARP, lanes_of};

/// Bytes of global memory whose cells are kept together.
const PAGE: u64 = 512;

/// Records the detector may hold, of some 24 bytes each.
const MAX_RECORDS: usize = 1 << 26;
/// Warps of other blocks whose times a warp may know.
const MAX_KNOWN_WARPS: usize = 1 << 16;
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

#[derive(Clone, Copy)]
pub(crate) enum WriteKind {
    Plain,
    Strong(Strong),
    /// The destination of a copy in flight: nobody may touch it.
    InFlight,
}

/// Scope of an access, None if it is weak, and its bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Strength {
    scope: Option<Scope>,
    size: u8,
}

impl Strength {
    fn of(range: ByteRange, strong: Option<Strong>) -> Strength {
        Strength { scope: strong.map(|strong| strong.scope), size: range.size as u8 }
    }
}

#[derive(Clone, Copy)]
struct WriteRecord {
    /// Warp of the whole grid.
    warp: u32,
    lane: u8,
    bytes: u8,
    strength: Strength,
    in_flight: bool,
    time: u32,
    place: Place,
}

#[derive(Clone, Copy)]
struct ReadRecord {
    warp: u32,
    lanes: u32,
    bytes: u8,
    strength: Strength,
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
        self.own.resize(self.own.len().max(other.own.len()), 0);
        for (mine, theirs) in self.own.iter_mut().zip(&other.own) {
            *mine = (*mine).max(*theirs);
        }
        for (&warp, &time) in &other.others {
            let mine = self.others.entry(warp).or_default();
            *mine = time.max(*mine);
        }
    }
}

/// What a warp knows, and what it may hand on or come to know, by scope.
#[derive(Clone, Default)]
pub(crate) struct Clock {
    known: Known,
    /// Known at the last release fence of this scope or a wider one.
    fenced: [Known; 2],
    /// Left at locations that strong reads read, and not acquired yet.
    seen: [Known; 2],
}

impl Clock {
    fn join(&mut self, other: &Clock) {
        self.known.join(&other.known);
        for scope in 0..2 {
            self.fenced[scope].join(&other.fenced[scope]);
            self.seen[scope].join(&other.seen[scope]);
        }
    }

    /// Times of warps of other blocks.
    fn records(&self) -> u64 {
        let all = self.fenced.iter().chain(&self.seen).chain([&self.known]);
        all.map(|known| known.others.len() as u64).sum()
    }
}

struct WarpClock {
    time: u32,
    now: Clock,
    /// `lanes[i][j]`: the time of lane j that lane i knows.
    lanes: Box<[[u32; WARP]; WARP]>,
}

/// Times that the last strong write of a location hands on, by warp of the grid.
#[derive(Default)]
struct Left {
    /// Block of the last write.
    block: u32,
    /// Of releases of any scope in that block, and of releases of the GPU in all blocks.
    times: [BTreeMap<u32, u32>; 2],
}

impl Left {
    fn records(&self) -> usize {
        self.times.iter().map(BTreeMap::len).sum()
    }
}

/// The detector of one launch.
pub(crate) struct Race {
    warps_per_block: u32,
    block: u32,
    warps: Vec<WarpClock>,
    shared: Vec<Cell>,
    global: HashMap<u64, Vec<Cell>>,
    /// What strong writes left at each location.
    handed_on: HashMap<(bool, u64), Left>,
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
    pub both_strong: bool,
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
                now: Clock {
                    known: Known { own: vec![0; count], ..Known::default() },
                    ..Clock::default()
                },
                lanes: Box::new([[0; WARP]; WARP]),
            })
            .collect();
        // What was kept of shared memory is gone with the block that it was of.
        let mut gone: usize = self.shared.iter().map(|cell| cell.reads.len()).sum();
        self.handed_on.retain(|&(shared, _), left| {
            gone += if shared { left.records() } else { 0 };
            !shared
        });
        self.held = self.held.saturating_sub(gone);
        self.shared.clear();
        self.shared.resize(shared_bytes.div_ceil(2), Cell::default());
    }

    /// Index in the block of a warp of the grid.
    fn in_block(&self, warp: u32) -> Option<usize> {
        let index = warp.wrapping_sub(self.block * self.warps_per_block);
        (index < self.warps_per_block).then_some(index as usize)
    }

    /// Whether `who` knows of what another warp's or lane's access at a time did.
    fn ordered(&self, who: Who, warp: u32, lane: usize, time: u32) -> bool {
        let clock = &self.warps[who.warp];
        let known = &clock.now.known;
        match self.in_block(warp) {
            Some(warp) if warp == who.warp => {
                lane == who.lane || clock.lanes[who.lane][lane] >= time
            }
            Some(warp) => known.own[warp] >= time,
            None => known.others.get(&warp).is_some_and(|&known| known >= time),
        }
    }

    /// Whether an access and one of a warp to the same bytes, ordered or not, do not race.
    fn morally_strong(&self, mine: Strength, theirs: Strength, warp: u32) -> bool {
        let needed = if self.in_block(warp).is_some() { Scope::Cta } else { Scope::Gpu };
        mine.size == theirs.size && mine.scope.min(theirs.scope) >= Some(needed)
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

    /// The race of an access with the last write of a cell, read by `reads` since.
    fn conflict_with_write(
        &self,
        who: Who,
        bytes: u8,
        mine: Strength,
        write: &WriteRecord,
        reads: &[ReadRecord],
    ) -> Option<Conflict> {
        let common = write.bytes & bytes;
        // Who is ordered after a read of the write is ordered after the write.
        let observed = |read: &ReadRecord| {
            read.bytes & common != 0
                && lanes_of(read.lanes).any(|lane| self.ordered(who, read.warp, lane, read.time))
        };
        let quiet = || {
            self.morally_strong(mine, write.strength, write.warp)
                || self.ordered(who, write.warp, write.lane.into(), write.time)
                || reads.iter().any(observed)
        };
        let races = common != 0 && (write.in_flight || !quiet());
        races.then(|| Conflict {
            earlier: self.access(write.warp, write.lane.into(), write.place),
            was_write: true,
            in_flight: write.in_flight,
            both_strong: mine.scope.min(write.strength.scope).is_some(),
        })
    }

    fn grid_warp(&self, who: Who) -> u32 {
        self.block * self.warps_per_block + who.warp as u32
    }

    /// A read; gives the write it races with.
    pub fn read(
        &mut self,
        who: Who,
        range: ByteRange,
        strong: Option<Strong>,
    ) -> Result<(), Box<Conflict>> {
        let (warp, time) = (self.grid_warp(who), self.warps[who.warp].time);
        let strength = Strength::of(range, strong);
        for (index, bytes) in Self::cells(range) {
            let cell = self.cell(range.shared, index);
            let (write, mut reads) = (cell.write, std::mem::take(&mut cell.reads));
            let before = reads.len();
            let conflict = write
                .and_then(|write| self.conflict_with_write(who, bytes, strength, &write, &reads));
            let same = |read: &&mut ReadRecord| {
                (read.warp, read.time, read.bytes, read.strength) == (warp, time, bytes, strength)
            };
            if let Some(read) = reads.iter_mut().find(same) {
                read.lanes |= 1 << who.lane;
            } else {
                // Who is ordered after this read is ordered after those it is ordered after. What
                // strong reads observed is theirs alone.
                reads.retain(|read| {
                    let alike = match strength.scope {
                        None => read.strength.scope.is_none(),
                        Some(_) => (read.warp, read.strength) == (warp, strength),
                    };
                    read.bytes & !bytes != 0
                        || !alike
                        || !lanes_of(read.lanes)
                            .all(|lane| self.ordered(who, read.warp, lane, read.time))
                });
                let lanes = 1 << who.lane;
                reads.push(ReadRecord { warp, lanes, bytes, strength, time, place: who.place });
            }
            self.held = (self.held + reads.len()).saturating_sub(before);
            self.cell(range.shared, index).reads = reads;
            self.cost += before as u64;
            if let Some(conflict) = conflict {
                return Err(Box::new(conflict));
            }
        }
        if let Some(read) = strong
            && self.follows(who, range, read, true)
        {
            self.observe(who, range, read);
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
        let WriteKind::Strong(write) = kind else {
            return self.write_cells(who, range, kind, same);
        };
        let follows = self.follows(who, range, write, false);
        self.write_cells(who, range, kind, same)?;
        self.hand_on(who, range, write, follows);
        Ok(())
    }

    /// An atomic that writes; `red` does not read what others left there.
    pub fn atomic(
        &mut self,
        who: Who,
        range: ByteRange,
        order: Strong,
        reads: bool,
    ) -> Result<(), Box<Conflict>> {
        let follows = self.follows(who, range, order, true);
        self.write_cells(who, range, WriteKind::Strong(order), false)?;
        if follows && reads {
            self.observe(who, range, order);
        }
        self.hand_on(who, range, order, follows);
        Ok(())
    }

    fn write_cells(
        &mut self,
        who: Who,
        range: ByteRange,
        kind: WriteKind,
        same: bool,
    ) -> Result<(), Box<Conflict>> {
        let strong = match kind {
            WriteKind::Strong(strong) => Some(strong),
            WriteKind::Plain | WriteKind::InFlight => None,
        };
        let strength = Strength::of(range, strong);
        for (index, bytes) in Self::cells(range) {
            let cell = std::mem::take(self.cell(range.shared, index));
            let mut conflict = cell
                .write
                .and_then(|write| {
                    self.conflict_with_write(who, bytes, strength, &write, &cell.reads)
                })
                .filter(|conflict| !same || conflict.in_flight);
            self.cost += cell.reads.len() as u64;
            self.held = self.held.saturating_sub(cell.reads.len());
            for read in &cell.reads {
                if conflict.is_some()
                    || read.bytes & bytes == 0
                    || self.morally_strong(strength, read.strength, read.warp)
                {
                    continue;
                }
                let racing = lanes_of(read.lanes)
                    .find(|&lane| !self.ordered(who, read.warp, lane, read.time));
                conflict = racing.map(|lane| Conflict {
                    earlier: self.access(read.warp, lane, read.place),
                    was_write: false,
                    in_flight: false,
                    both_strong: strength.scope.min(read.strength.scope).is_some(),
                });
            }
            if let Some(conflict) = conflict {
                return Err(Box::new(conflict));
            }
            let in_flight = matches!(kind, WriteKind::InFlight);
            self.replace(who, range.shared, (index, bytes), strength, in_flight);
        }
        Ok(())
    }

    /// Makes a write the last of a cell.
    fn replace(
        &mut self,
        who: Who,
        shared: bool,
        (index, bytes): (u64, u8),
        strength: Strength,
        in_flight: bool,
    ) {
        let (warp, time) = (self.grid_warp(who), self.warps[who.warp].time);
        let (lane, place) = (who.lane as u8, who.place);
        let write = Some(WriteRecord { warp, lane, bytes, strength, in_flight, time, place });
        *self.cell(shared, index) = Cell { write, reads: Vec::new() };
    }

    /// An asynchronous copy has landed: from now on it is a plain write of the thread that waited.
    pub fn land(&mut self, who: Who, range: ByteRange) {
        for cell in Self::cells(range) {
            self.replace(who, range.shared, cell, Strength::of(range, None), false);
        }
    }

    /// Whether what is left at a location holds on for a strong access: a read or an atomic (`rmw`)
    /// continues a write that it is morally strong with, a store only one of its own thread.
    fn follows(&mut self, who: Who, range: ByteRange, strong: Strong, rmw: bool) -> bool {
        let Some((index, bytes)) = Self::cells(range).next() else { return false };
        let Some(write) = self.cell(range.shared, index).write else { return false };
        let same_thread = (write.warp, usize::from(write.lane)) == (self.grid_warp(who), who.lane);
        let mine = Strength::of(range, Some(strong));
        // A neighboring byte's write says nothing of the last one here.
        write.bytes & bytes == 0
            || (rmw || same_thread) && self.morally_strong(mine, write.strength, write.warp)
    }

    /// A strong read sees, and acquires as far as it is an acquire, what is left at a location.
    fn observe(&mut self, who: Who, range: ByteRange, read: Strong) {
        let (first, count) = (self.block * self.warps_per_block, self.warps_per_block);
        let Some(left) = self.handed_on.get(&(range.shared, range.at)) else { return };
        let Clock { known, seen, .. } = &mut self.warps[who.warp].now;
        for scope in [Scope::Cta, Scope::Gpu] {
            if scope == Scope::Cta && left.block != self.block {
                continue;
            }
            let acquired = read.acquire && scope <= read.scope;
            let into = if acquired { &mut *known } else { &mut seen[scope as usize] };
            into.own.resize(count as usize, 0);
            for (&warp, &time) in &left.times[scope as usize] {
                let in_block = warp.wrapping_sub(first);
                let mine = if in_block < count {
                    &mut into.own[in_block as usize]
                } else {
                    into.others.entry(warp).or_default()
                };
                *mine = time.max(*mine);
            }
            self.cost += left.times[scope as usize].len() as u64;
            self.full |= into.others.len() > MAX_KNOWN_WARPS;
        }
    }

    /// A strong write leaves what its warp fenced, and if it is a release what its warp knows.
    fn hand_on(&mut self, who: Who, range: ByteRange, write: Strong, follows: bool) {
        let first = self.block * self.warps_per_block;
        let clock = &mut self.warps[who.warp];
        if write.release {
            clock.now.known.own[who.warp] = clock.time;
        }
        let location = (range.shared, range.at);
        let mut left = self.handed_on.remove(&location).unwrap_or_default();
        let before = left.records();
        if !follows {
            left = Left::default();
        }
        if left.block != self.block {
            left.block = self.block;
            left.times[Scope::Cta as usize].clear();
        }
        for scope in [Scope::Cta, Scope::Gpu] {
            let released = write.release && scope <= write.scope;
            let Clock { known, fenced, .. } = &clock.now;
            let from = if released { known } else { &fenced[scope as usize] };
            let own = (first..).zip(from.own.iter().copied()).filter(|&(_, time)| time > 0);
            for (warp, time) in own.chain(from.others.iter().map(|(&warp, &time)| (warp, time))) {
                let handed_on = left.times[scope as usize].entry(warp).or_default();
                *handed_on = time.max(*handed_on);
            }
            self.cost += from.others.len() as u64;
        }
        let records = left.records();
        self.held = (self.held + records).saturating_sub(before);
        if records > 0 {
            self.handed_on.insert(location, left);
        }
    }

    /// A fence of a warp: acquires what strong reads saw, then releases what is known.
    pub fn fence(&mut self, warp: usize, fence: Strong) {
        let clock = &mut self.warps[warp];
        self.cost += clock.now.records();
        let Clock { known, fenced, seen } = &mut clock.now;
        let scopes = ..=fence.scope as usize;
        if fence.acquire {
            for seen in &mut seen[scopes] {
                known.join(&std::mem::take(seen));
            }
        }
        self.full |= known.others.len() > MAX_KNOWN_WARPS;
        if fence.release {
            known.own[warp] = clock.time;
            fenced[scopes].fill(known.clone());
            clock.time += 1;
        }
    }

    /// A release instruction is over: it did not hand on what its warp does from now on.
    pub fn tick(&mut self, warp: usize) {
        self.warps[warp].time += 1;
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
    pub fn barrier(&mut self, arrived: &[(usize, bool)], passing: &[Clock]) {
        let mut all = Clock::default();
        let waiting: Vec<usize> =
            arrived.iter().filter(|(_, waited)| *waited).map(|&(warp, _)| warp).collect();
        // The arrival itself was the end of a time, see `arrive`.
        for clock in waiting.iter().map(|&warp| &self.warps[warp].now).chain(passing) {
            self.cost += clock.records();
            all.join(clock);
        }
        for warp in waiting {
            self.cost += all.records();
            self.warps[warp].now.join(&all);
        }
    }

    /// A warp arrives at a barrier: its accesses so far are what the others will know. Of one that goes on without
    /// waiting, what it knows now.
    pub fn arrive(&mut self, warp: usize, waits: bool) -> Option<Clock> {
        let clock = &mut self.warps[warp];
        clock.now.known.own[warp] = clock.time;
        if waits {
            clock.lanes.fill([clock.time; WARP]);
        }
        clock.time += 1;
        (!waits).then(|| clock.now.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACE: Place = Place { function: 0, pc: 0 };
    const RELAXED: Strong = Strong { scope: Scope::Gpu, acquire: false, release: false };
    const ACQ_REL: Strong = Strong { scope: Scope::Gpu, acquire: true, release: true };

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
        assert!(race.read(who(1, 0), shared(0, 4), None).is_err());
        for warp in [0, 1] {
            race.arrive(warp, true);
        }
        race.barrier(&[(0, true), (1, true)], &[]);
        assert!(race.read(who(1, 0), shared(0, 4), None).is_ok());
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
        assert!(race.read(who(1, 0), shared(0, 4), None).is_ok());
        assert!(race.read(who(1, 0), shared(16, 4), None).is_err());
        race.arrive(1, true);
        race.barrier(&[(0, false), (1, true)], &next);
        assert!(race.read(who(1, 0), shared(16, 4), None).is_ok());
        assert!(race.read(who(0, 0), shared(8, 4), None).is_err());
    }

    #[test]
    fn lanes_need_a_warp_sync_that_names_both() {
        let mut race = race();
        assert!(race.write(who(0, 3), shared(0, 4), WriteKind::Plain, false).is_ok());
        race.sync_warp(0, 0b0011);
        assert!(race.read(who(0, 0), shared(0, 4), None).is_err());
        race.sync_warp(0, 0b1011);
        assert!(race.read(who(0, 0), shared(0, 4), None).is_ok());
        assert!(race.read(who(0, 4), shared(0, 4), None).is_err());
    }

    #[test]
    fn the_same_value_may_be_written_twice_but_not_read_unordered() {
        let mut race = race();
        assert!(race.write(who(0, 0), shared(0, 4), WriteKind::Plain, false).is_ok());
        assert!(race.write(who(1, 0), shared(0, 4), WriteKind::Plain, true).is_ok());
        assert!(race.write(who(0, 0), shared(0, 4), WriteKind::Plain, false).is_err());
        assert!(race.read(who(0, 1), shared(0, 4), None).is_err());
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
            assert!(race.read(who(0, 0), global(PAGE / 2), None).is_ok());
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
        race.fence(0, ACQ_REL);
        assert!(race.atomic(who(0, 0), shared(0, 4), ACQ_REL, true).is_ok());
        let before = race.held;
        for block in 1..100 {
            race.start_block(block, 64);
            for warp in [0, 1] {
                assert!(race.read(who(warp, 0), shared(8, 4), None).is_ok());
            }
        }
        race.start_block(100, 64);
        assert!(race.held < before, "{} after {before}", race.held);
        assert!(race.atomic(who(0, 0), shared(0, 4), ACQ_REL, true).is_ok());
        assert!(race.read(who(0, 0), global, None).is_err());
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
        for (release, acquire) in [(true, true), (true, false), (false, true)] {
            let mut race = race();
            assert!(race.write(who(0, 0), global(64), WriteKind::Plain, false).is_ok());
            if release {
                race.fence(0, ACQ_REL);
            }
            assert!(race.atomic(who(0, 0), global(0), RELAXED, true).is_ok());
            race.start_block(1, 0);
            assert!(race.atomic(who(1, 0), global(0), RELAXED, true).is_ok());
            if acquire {
                race.fence(1, ACQ_REL);
            }
            assert_eq!(race.read(who(1, 0), global(64), None).is_ok(), release && acquire);
        }
    }
}
