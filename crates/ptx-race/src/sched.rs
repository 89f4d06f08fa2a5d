//! Blocks and their warps: who runs next, barriers, deadlocks, and blocks on several threads.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::config::{Check, Schedule, Stats};
use crate::fault::{Access, Exec, Fault, FaultKind, Place, Stop, stop};
use crate::op::{BarrierMode, NONE};
use crate::profile::Profile;
use crate::race::{Clock, Race};
use crate::registers::{FULL, Reg, WARP};
use crate::shared::Shared;
use crate::state::{Arrival, Block, Launch, Warp, Yield};

/// Warp instructions after which another warp gets its turn even without a barrier: a warp that
/// spins on what another must write would spin for ever.
const SLICE: u64 = 1 << 16;
/// Most host threads of a launch.
const MAX_THREADS: usize = 256;
/// Registers and local memory of the blocks that run at once, in bytes.
const MAX_RESIDENT: u64 = 1 << 30;

/// Runs every block of a launch.
///
/// Blocks are handed out in order, so all before a faulting one have been started: the first
/// fault in that order is the same for any number of threads. A block may spend all of
/// `max_instructions`, and so may the blocks up to it together.
pub(crate) fn run(launch: &Launch) -> Result<Stats, Box<Fault>> {
    let total = launch.config.grid.iter().map(|&n| n as usize).product::<usize>();
    let races = launch.options.check == Check::Races;
    let resident = (MAX_RESIDENT / launch.block_bytes().max(1)) as usize;
    let most = if races || launch.serial { 1 } else { resident.clamp(1, MAX_THREADS) };
    let threads = launch.options.threads.clamp(1, total.clamp(1, most));
    let next = AtomicUsize::new(0);
    let progress = Mutex::new(Progress::default());
    let lowest = AtomicUsize::new(usize::MAX);
    let work = || {
        let mut race = races.then(|| Race::new(launch.warps_per_block()));
        let mut tally = Tally::new(launch);
        loop {
            let position = next.fetch_add(1, Ordering::Relaxed);
            if position >= total || position > lowest.load(Ordering::Relaxed) {
                return tally;
            }
            let index = launch.options.schedule.block(position, total) as u32;
            let result = run_block(launch, index, race.as_mut(), &mut tally);
            let mut progress = progress.lock().unwrap_or_else(PoisonError::into_inner);
            match result {
                Ok(spent) => progress.finish(launch, position, index, spent),
                Err(fault) => progress.fail(position, fault),
            }
            if let Some((position, _)) = progress.fault {
                lowest.store(position, Ordering::Relaxed);
            }
        }
    };
    let mut tally = Tally::new(launch);
    if threads == 1 {
        tally = work();
    } else {
        std::thread::scope(|scope| {
            // This thread works too, so that a machine without threads to give gets on.
            let spawn = |_| std::thread::Builder::new().spawn_scoped(scope, work).ok();
            let handles: Vec<_> = (1..threads).map_while(spawn).collect();
            tally.add(&work());
            for handle in handles {
                match handle.join() {
                    Ok(part) => tally.add(&part),
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
        });
    }
    match progress.into_inner().unwrap_or_else(PoisonError::into_inner).fault {
        Some((_, fault)) => Err(fault),
        None => Ok(tally.stats(launch)),
    }
}

/// What the blocks of a launch have spent, and the first fault, by position in the schedule.
#[derive(Default)]
struct Progress {
    /// Blocks before this position are counted.
    counted: usize,
    spent: u64,
    /// Index and cost of blocks that finished before an earlier one.
    early: BTreeMap<usize, (u32, u64)>,
    fault: Option<(usize, Box<Fault>)>,
}

impl Progress {
    fn fail(&mut self, position: usize, fault: Box<Fault>) {
        if self.fault.as_ref().is_none_or(|(before, _)| position < *before) {
            self.fault = Some((position, fault));
        }
    }

    fn finish(&mut self, launch: &Launch, position: usize, index: u32, spent: u64) {
        self.early.insert(position, (index, spent));
        while let Some((index, spent)) = self.early.remove(&self.counted) {
            self.spent = self.spent.saturating_add(spent);
            if self.spent > launch.options.max_instructions {
                self.fail(self.counted, launch.over_budget(index));
                return;
            }
            self.counted += 1;
        }
    }
}

/// Runs a block and gives what it spent.
fn run_block(
    launch: &Launch,
    linear: u32,
    mut race: Option<&mut Race>,
    tally: &mut Tally,
) -> Result<u64, Box<Fault>> {
    let shared = Shared::new(launch.layout, launch.config.shared as usize);
    if let Some(race) = &mut race {
        race.start_block(linear, shared.len());
    }
    let mut block = Block {
        launch,
        linear,
        index: launch.block_index(linear),
        shared,
        race,
        counts: std::mem::take(&mut tally.counts),
        thread_instructions: 0,
        profile: tally.profile.take(),
        spent: launch.shared_cost(),
        resident: 0,
        in_flight: 0,
    };
    let result = block.run();
    tally.counts = std::mem::take(&mut block.counts);
    tally.thread_instructions += block.thread_instructions;
    tally.profile = block.profile.take();
    result.map(|()| block.spent)
}

/// Instruction counts of one simulator thread.
struct Tally {
    counts: Vec<Vec<u64>>,
    thread_instructions: u64,
    profile: Option<Profile>,
}

impl Tally {
    fn new(launch: &Launch) -> Tally {
        let mut counts = vec![Vec::new(); launch.module.functions.len()];
        counts[launch.entry] = vec![0; launch.module.functions[launch.entry].instrs.len()];
        let profile = launch.options.profile.then(Profile::default);
        Tally { counts, thread_instructions: 0, profile }
    }

    fn add(&mut self, other: &Tally) {
        self.thread_instructions += other.thread_instructions;
        if let (Some(mine), Some(theirs)) = (&mut self.profile, &other.profile) {
            mine.add(theirs);
        }
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
            profile: self.profile.map_or_else(Vec::new, |profile| launch.access_profile(&profile)),
        }
    }
}

/// The place of a barrier that a warp is at: its program counter has moved past it.
fn before(Place { function, pc }: Place) -> Place {
    Place { function, pc: pc.saturating_sub(1) }
}

#[derive(Default)]
struct Barrier {
    /// Warps that are here, and whether each waits.
    arrived: Vec<(usize, bool)>,
    /// Threads named by the instructions; None means all that have not exited.
    count: Option<u32>,
    /// What the detector knows of warps that went on.
    passing: Vec<Clock>,
    reductions: Vec<(usize, Arrival)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Ready,
    Waiting(u32),
    Exited,
}

impl Block<'_, '_> {
    fn run(&mut self) -> Result<(), Box<Fault>> {
        let mut warps = Vec::new();
        for warp in 0..self.launch.warps_per_block() {
            match Warp::new(self, warp) {
                Ok(warp) => warps.push(warp),
                Err(stop) => return Err(self.launch.refuse_block(self.linear, &stop)),
            }
        }
        let warps = &mut warps[..];
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
            let left = self.launch.options.max_instructions.saturating_sub(self.spent);
            let slice = SLICE.min(left.saturating_add(1));
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
                    let barrier = &mut barriers[id as usize];
                    if let Err(mut stop) = self.arrive(barrier, warps.len(), index, arrival) {
                        stop.at = Some(before(warps[index].place()));
                        return Err(fault(stop, &warps[index]));
                    }
                    if barriers[id as usize].arrived.last() == Some(&(index, true)) {
                        states[index] = State::Waiting(id);
                    }
                }
            }
            for barrier in &mut barriers {
                if self.complete(barrier, warps, &mut states) {
                    round = u32::wrapping_add(round, 1);
                    let seed = self.linear ^ round << 16;
                    if let Schedule::Random(_) = self.launch.options.schedule {
                        order = self.launch.options.schedule.order(warps.len(), seed);
                    }
                }
            }
        }
    }

    fn arrive(
        &mut self,
        barrier: &mut Barrier,
        warps: usize,
        warp: usize,
        arrival: Arrival,
    ) -> Exec<()> {
        let lane = arrival.mask.trailing_zeros() as usize % WARP;
        // No number, and that of all threads, are the same.
        let is_all = |count: Option<u32>| count.is_none_or(|count| count as usize == warps * WARP);
        let is_same =
            barrier.count == arrival.count || is_all(barrier.count) && is_all(arrival.count);
        if !barrier.arrived.is_empty() && !is_same {
            let threads = |count: Option<u32>| {
                count.map_or("all threads".to_owned(), |count| format!("{count} threads"))
            };
            let message = format!(
                "barrier {} is for {} here, but for {} where others wait",
                arrival.id,
                threads(arrival.count),
                threads(barrier.count)
            );
            return stop(FaultKind::InvalidOperand, lane, message);
        }
        barrier.count = if barrier.arrived.is_empty() {
            arrival.count
        } else {
            barrier.count.and(arrival.count)
        };
        if barrier.arrived.iter().any(|&(other, _)| other == warp) {
            let message = format!("warp {warp} arrives at barrier {} a second time", arrival.id);
            return stop(FaultKind::Deadlock, lane, message);
        }
        let waits = arrival.mode != BarrierMode::Arrive;
        barrier.arrived.push((warp, waits));
        if let Some(race) = &mut self.race {
            barrier.passing.extend(race.arrive(warp, waits));
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
            race.barrier(&barrier.arrived, &barrier.passing);
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
            let place = before(warp.place());
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
        let stop = Stop { at: Some(before(warp.place())), ..stop };
        let mut fault = self.launch.fault(self.linear, warp, stop);
        fault.waiting = waiting;
        fault
    }
}
