//! Blocks and their warps: who runs next, barriers, deadlocks, and blocks on several threads.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::decode::{Decoded, SharedLayout};
use crate::fault::{Access, Exec, Fault, FaultKind, Place, Site, SourceLine, Stop, stop};
use crate::lanes::{FULL, Reg, WARP};
use crate::launch::{Config, Options, Schedule, Stats};
use crate::mem::Table;
use crate::op::{BarrierMode, NONE};
use crate::parse::Location;
use crate::race::Race;
use crate::shared::Shared;
use crate::warp::{Arrival, Warp, Yield};

/// Warp instructions after which another warp gets its turn even without a barrier: a warp that
/// spins on what another must write would spin for ever.
const SLICE: u64 = 1 << 16;

/// All that the blocks of a launch have in common.
pub(crate) struct Launch<'a> {
    pub module: &'a Decoded,
    pub entry: usize,
    pub layout: &'a SharedLayout,
    pub config: Config,
    pub options: Options,
    pub params: Vec<u8>,
    pub table: &'a Table,
    /// Address of each module variable, or its offset in shared memory.
    pub addresses: Vec<u64>,
    /// Blocks must run in order, one by one.
    pub serial: bool,
}

impl Launch<'_> {
    pub fn threads_per_block(&self) -> u32 {
        self.config.block.iter().product()
    }

    pub fn warps_per_block(&self) -> usize {
        self.threads_per_block().div_ceil(WARP as u32) as usize
    }

    fn block_index(&self, linear: u32) -> [u32; 3] {
        let [x, y, _] = self.config.grid;
        [linear % x, linear / x % y, linear / x / y]
    }

    fn thread_index(&self, linear: u32) -> [u32; 3] {
        let [x, y, _] = self.config.block;
        [linear % x, linear / x % y, linear / x / y]
    }

    /// A buffer as a person knows it: by the parameter that points to it.
    pub fn describe(&self, base: u64, len: u64) -> String {
        let variable = self.addresses.iter().position(|&address| address == base);
        if let Some(index) = variable.filter(|&index| !self.module.variables[index].shared) {
            return format!("variable `{}` ({len} bytes)", self.module.variables[index].name);
        }
        let params = &self.module.functions[self.entry].params;
        let named = params.iter().enumerate().find(|(_, param)| {
            let bytes = self.params.get(param.offset..param.offset + 8);
            param.size == 8
                && bytes.is_some_and(|bytes| {
                    let value = u64::from_le_bytes(bytes.try_into().unwrap_or_default());
                    value.wrapping_sub(base) < len.max(1)
                })
        });
        match named {
            Some((index, _)) => {
                format!("the buffer of {len} bytes that argument {index} points to")
            }
            None => format!("a buffer of {len} bytes at {base:#x}"),
        }
    }

    fn site(&self, access: Access) -> Site {
        let code = &self.module.functions[access.place.function as usize];
        let origin = code.origins[access.place.pc as usize];
        let line = |location: Location| {
            let file = self.module.files.get(&location.file);
            (file.cloned().unwrap_or_else(|| format!("file {}", location.file)), location.line)
        };
        let source = code.locations.get(origin.location as usize).filter(|(at, _)| at.line > 0);
        let source = source.map(|&(at, inlined)| {
            let (file, number) = line(at);
            SourceLine { file, line: number, inlined_into: inlined.map(line) }
        });
        Site {
            block: self.block_index(access.block),
            thread: self.thread_index(access.thread),
            ptx_line: origin.line,
            opcode: self.module.opcodes[origin.opcode as usize].clone(),
            source,
        }
    }

    fn fault(&self, block: u32, warp: &Warp, stop: Stop) -> Box<Fault> {
        let thread = (warp.index * WARP + stop.lane) as u32;
        let place = stop.at.unwrap_or(warp.place());
        Box::new(Fault {
            kind: stop.kind,
            message: stop.message,
            kernel: self.module.functions[self.entry].name.clone(),
            site: Some(self.site(Access { place, block, thread })),
            other: stop.other.map(|access| self.site(access)),
            waiting: Vec::new(),
        })
    }

    /// Runs every block.
    pub fn run(&self) -> Result<Stats, Box<Fault>> {
        let total = self.config.grid.iter().map(|&n| n as usize).product::<usize>();
        let race = self.options.check == crate::launch::Check::Races;
        let serial = race || self.serial;
        let threads = if serial { 1 } else { self.options.threads.clamp(1, total.max(1)) };
        let next = AtomicUsize::new(0);
        // Blocks are handed out in order, so all before a faulting one have been started: the
        // first fault in that order is the same for any number of threads.
        let first_fault: Mutex<Option<(usize, Box<Fault>)>> = Mutex::new(None);
        let lowest = AtomicUsize::new(usize::MAX);
        let work = || {
            let mut race = race.then(|| Race::new(self.warps_per_block()));
            let mut stats = Tally::new(self);
            loop {
                let position = next.fetch_add(1, Ordering::Relaxed);
                if position >= total || position > lowest.load(Ordering::Relaxed) {
                    return stats;
                }
                let index = self.options.schedule.block(position, total) as u32;
                if let Err(fault) = self.run_block(index, race.as_mut(), &mut stats) {
                    let mut first = first_fault.lock().unwrap_or_else(PoisonError::into_inner);
                    if first.as_ref().is_none_or(|(before, _)| position < *before) {
                        *first = Some((position, fault));
                        lowest.store(position, Ordering::Relaxed);
                    }
                }
            }
        };
        let mut tally = Tally::new(self);
        if threads == 1 {
            tally = work();
        } else {
            std::thread::scope(|scope| {
                let handles: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
                for handle in handles {
                    match handle.join() {
                        Ok(part) => tally.add(&part),
                        Err(panic) => std::panic::resume_unwind(panic),
                    }
                }
            });
        }
        match first_fault.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some((_, fault)) => Err(fault),
            None => Ok(tally.stats(self)),
        }
    }

    fn run_block(
        &self,
        linear: u32,
        mut race: Option<&mut Race>,
        tally: &mut Tally,
    ) -> Result<(), Box<Fault>> {
        let shared = Shared::new(self.layout, self.config.shared as usize);
        if let Some(race) = &mut race {
            race.start_block(linear, shared.len());
        }
        let index = self.block_index(linear);
        let mut block = Block {
            launch: self,
            linear,
            index,
            shared,
            race,
            counts: std::mem::take(&mut tally.counts),
            thread_instructions: 0,
            spent: 0,
        };
        let mut warps: Vec<Warp> =
            (0..self.warps_per_block()).map(|warp| Warp::new(self, index, warp)).collect();
        let result = block.run(&mut warps);
        tally.counts = std::mem::take(&mut block.counts);
        tally.thread_instructions += block.thread_instructions;
        result
    }
}

/// Instruction counts of one simulator thread.
struct Tally {
    counts: Vec<Vec<u64>>,
    thread_instructions: u64,
}

impl Tally {
    fn new(launch: &Launch) -> Tally {
        let mut counts = vec![Vec::new(); launch.module.functions.len()];
        counts[launch.entry] = vec![0; launch.module.functions[launch.entry].instrs.len()];
        Tally { counts, thread_instructions: 0 }
    }

    fn add(&mut self, other: &Tally) {
        self.thread_instructions += other.thread_instructions;
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            if mine.len() < theirs.len() {
                mine.resize(theirs.len(), 0);
            }
            for (mine, theirs) in mine.iter_mut().zip(theirs) {
                *mine += theirs;
            }
        }
    }

    fn stats(self, launch: &Launch) -> Stats {
        let mut by_opcode = vec![0; launch.module.opcodes.len()];
        for (code, counts) in launch.module.functions.iter().zip(&self.counts) {
            for (origin, count) in code.origins.iter().zip(counts) {
                by_opcode[origin.opcode as usize] += count;
            }
        }
        Stats {
            warp_instructions: by_opcode.iter().sum(),
            thread_instructions: self.thread_instructions,
            by_opcode: launch
                .module
                .opcodes
                .iter()
                .zip(by_opcode)
                .filter(|&(_, count)| count > 0)
                .map(|(name, count)| (name.clone(), count))
                .collect(),
        }
    }
}

/// A block at work.
pub(crate) struct Block<'l, 'r> {
    pub launch: &'l Launch<'l>,
    linear: u32,
    pub index: [u32; 3],
    pub shared: Shared,
    pub race: Option<&'r mut Race>,
    /// Executions of each instruction, by function.
    pub counts: Vec<Vec<u64>>,
    pub thread_instructions: u64,
    spent: u64,
}

#[derive(Default)]
struct Barrier {
    /// Warps that are here, and whether each waits.
    arrived: Vec<(usize, bool)>,
    /// Threads named by the instructions; None means all that have not exited.
    count: Option<u32>,
    reductions: Vec<(usize, Arrival)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Ready,
    Waiting(u32),
    Exited,
}

impl Block<'_, '_> {
    /// Makes sure a function's instructions have counters.
    pub fn count_function(&mut self, function: u32) {
        let counts = &mut self.counts[function as usize];
        counts.resize(self.launch.module.functions[function as usize].instrs.len(), 0);
    }

    /// Accounts for instructions executed.
    pub fn spend(&mut self, instructions: u64) -> Exec<()> {
        self.spent += instructions;
        let budget = self.launch.options.budget;
        if self.spent > budget {
            let message = format!(
                "the block has executed more than {budget} warp instructions: an endless loop, \
                 or a wait for something that cannot happen"
            );
            return stop(FaultKind::Budget, 0, message);
        }
        Ok(())
    }

    fn run(&mut self, warps: &mut [Warp]) -> Result<(), Box<Fault>> {
        let mut order = self.launch.options.schedule.order(warps.len(), self.linear);
        let mut states = vec![State::Ready; warps.len()];
        let mut barriers: [Barrier; 16] = Default::default();
        let mut round = 0;
        loop {
            let ready = order.iter().position(|&warp| states[warp] == State::Ready);
            let Some(turn) = ready else {
                if states.iter().all(|&state| state == State::Exited) {
                    return Ok(());
                }
                return Err(self.deadlock(warps, &states, &barriers));
            };
            let index = order[turn];
            let warp = &mut warps[index];
            let slice = SLICE
                .min(self.launch.options.budget - self.spent.min(self.launch.options.budget) + 1);
            let outcome = warp.run(self, slice).and_then(|outcome| {
                if matches!(outcome, Yield::Exited) {
                    warp.wait_copies(self, None, FULL)?;
                }
                Ok(outcome)
            });
            let (launch, linear) = (self.launch, self.linear);
            let fault = |stop: Box<Stop>, warp: &Warp| launch.fault(linear, warp, *stop);
            match outcome {
                Err(stop) => return Err(fault(stop, warp)),
                Ok(Yield::Slice) => {
                    order.remove(turn);
                    order.push(index);
                    continue;
                }
                Ok(Yield::Exited) => states[index] = State::Exited,
                Ok(Yield::Barrier(arrival)) => {
                    let id = arrival.id;
                    if let Err(stop) = self.arrive(&mut barriers[id as usize], index, arrival) {
                        return Err(fault(stop, &warps[index]));
                    }
                    if barriers[id as usize].arrived.last() == Some(&(index, true)) {
                        states[index] = State::Waiting(id);
                    }
                }
            }
            for barrier in &mut barriers {
                if self.complete(barrier, warps, &mut states) {
                    round += 1;
                    let seed = self.linear ^ round << 16;
                    if let Schedule::Priorities(_) = self.launch.options.schedule {
                        order = self.launch.options.schedule.order(warps.len(), seed);
                    }
                }
            }
        }
    }

    fn arrive(&mut self, barrier: &mut Barrier, warp: usize, arrival: Arrival) -> Exec<()> {
        if !barrier.arrived.is_empty() && barrier.count != arrival.count {
            let threads = |count: Option<u32>| {
                count.map_or("all threads".to_owned(), |count| format!("{count} threads"))
            };
            let message = format!(
                "barrier {} is for {} here, but for {} where others wait",
                arrival.id,
                threads(arrival.count),
                threads(barrier.count)
            );
            return stop(FaultKind::InvalidOperand, 0, message);
        }
        barrier.count = arrival.count;
        if barrier.arrived.iter().any(|&(other, _)| other == warp) {
            let message = format!("warp {warp} arrives at barrier {} a second time", arrival.id);
            return stop(FaultKind::Deadlock, 0, message);
        }
        barrier.arrived.push((warp, arrival.mode != BarrierMode::Arrive));
        if let Some(race) = &mut self.race {
            race.arrive(warp);
        }
        if arrival.d != NONE {
            barrier.reductions.push((warp, arrival));
        }
        Ok(())
    }

    /// Lets the warps of a full barrier go.
    fn complete(
        &mut self,
        barrier: &mut Barrier,
        warps: &mut [Warp],
        states: &mut [State],
    ) -> bool {
        if barrier.arrived.is_empty() {
            return false;
        }
        let here = barrier.arrived.len() * WARP;
        let wanted = match barrier.count {
            Some(count) => count as usize,
            None => states.iter().filter(|&&state| state != State::Exited).count() * WARP,
        };
        if here < wanted {
            return false;
        }
        if let Some(race) = &mut self.race {
            race.barrier(&barrier.arrived);
        }
        let votes = barrier.reductions.iter();
        let yes: u32 = votes.clone().map(|(_, arrival)| arrival.votes.count_ones()).sum();
        let all = votes.clone().all(|(_, arrival)| arrival.votes == arrival.mask);
        for (warp, arrival) in &barrier.reductions {
            let regs = warps[*warp].regs_mut();
            match arrival.mode {
                BarrierMode::Popc => u32::put(regs, arrival.d, &[yes; WARP], arrival.mask),
                BarrierMode::And => bool::put(regs, arrival.d, &[all; WARP], arrival.mask),
                _ => bool::put(regs, arrival.d, &[yes > 0; WARP], arrival.mask),
            }
        }
        for &(warp, waits) in &barrier.arrived {
            if waits {
                states[warp] = State::Ready;
            }
        }
        *barrier = Barrier::default();
        true
    }

    fn deadlock(&self, warps: &[Warp], states: &[State], barriers: &[Barrier; 16]) -> Box<Fault> {
        let mut waiting = Vec::new();
        let mut first = None;
        for (warp, &state) in warps.iter().zip(states) {
            let State::Waiting(id) = state else { continue };
            first.get_or_insert(warp);
            let barrier = &barriers[id as usize];
            let wanted = barrier.count.map_or("all".to_owned(), |count| count.to_string());
            // The warp's own program counter has moved past the barrier.
            let Place { function, pc } = warp.place();
            let place = Place { function, pc: pc - 1 };
            let thread = (warp.index * WARP) as u32;
            let site = self.launch.site(Access { place, block: self.linear, thread });
            let source = site.source.map_or(String::new(), |source| format!(", {source}"));
            waiting.push(format!(
                "warp {} waits at barrier {id} ({} of {wanted} threads are there): `{}`, PTX line {}{source}",
                warp.index,
                barrier.arrived.len() * WARP,
                site.opcode,
                site.ptx_line,
            ));
        }
        let exited = states.iter().filter(|&&state| state == State::Exited).count();
        let message = format!("no warp can go on: {} wait, {exited} have exited", waiting.len());
        let stop = Stop { kind: FaultKind::Deadlock, message, lane: 0, at: None, other: None };
        let warp = first.unwrap_or(&warps[0]);
        let Place { function, pc } = warp.place();
        let stop = Stop { at: Some(Place { function, pc: pc.saturating_sub(1) }), ..stop };
        let mut fault = self.launch.fault(self.linear, warp, stop);
        fault.waiting = waiting;
        fault
    }
}
