//! State of a launch, its blocks and its warps, and what every instruction asks of it.

use std::fmt::Write;

use crate::cfg::END;
use crate::code::{Decoded, MaskOf, SharedLayout, Source, Special};
use crate::config::{Check, Config, Options};
use crate::copies::Copies;
use crate::fault::{Access, Exec, Fault, FaultKind, Place, Site, SourceLine, Stop, stop};
use crate::mem::Table;
use crate::op::{Address, BarrierMode, Strong};
use crate::parse::Location;
use crate::profile::{AccessProfile, AccessSpace, Counts, Profile};
use crate::race::{ByteRange, Conflict, Race, Who, WriteKind};
use crate::registers::{FULL, File, Lanes, Regs, UNDEFINED, WARP, lanes_of};
use crate::shared::Shared;

/// Frames of a block's warps together, in bytes.
const MAX_BLOCK_BYTES: u64 = 1 << 30;
/// Bytes of a frame that cost as much to set up as an instruction to execute.
const BYTES_PER_INSTRUCTION: u64 = 4096;
/// Local memory of a thread, in bytes.
const MAX_LOCAL: u64 = 512 << 10;

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

    /// Bytes of registers, parameters and local memory that the warps of a block start with.
    pub fn block_bytes(&self) -> u64 {
        self.module.functions[self.entry].frame_bytes() * self.warps_per_block() as u64
    }

    /// Work of setting up a block's shared memory, in warp instructions.
    pub fn shared_cost(&self) -> u64 {
        let bytes = self.layout.dynamic_at + u64::from(self.config.shared);
        // A byte has a state, and half a cell of the race detector.
        let each = if self.options.check == Check::Races { 26 } else { 2 };
        bytes * each / BYTES_PER_INSTRUCTION
    }

    pub fn block_index(&self, linear: u32) -> [u32; 3] {
        let [x, y, _] = self.config.grid;
        [linear % x, linear / x % y, linear / x / y]
    }

    pub fn thread_index(&self, linear: u32) -> [u32; 3] {
        let [x, y, _] = self.config.block;
        [linear % x, linear / x % y, linear / x / y]
    }

    /// Name of a buffer for messages: the parameter that points to it.
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

    pub fn site(&self, access: Access) -> Site {
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

    pub fn fault(&self, block: u32, warp: &Warp, stop: Stop) -> Box<Fault> {
        let thread = (warp.index * WARP + stop.lane) as u32;
        let place = stop.at.unwrap_or(warp.place());
        let site = self.site(Access { place, block, thread });
        let other = stop.other.map(|access| self.site(access));
        Box::new(Fault { site: Some(site), other, ..self.fault_of(stop.kind, stop.message) })
    }

    /// The profile with the lines of its instructions.
    pub fn access_profile(&self, profile: &Profile) -> Vec<AccessProfile> {
        let row = |(&(place, space), counts): (&(Place, AccessSpace), &Counts)| {
            let Site { ptx_line, opcode, source, .. } =
                self.site(Access { place, block: 0, thread: 0 });
            let Counts { requests, bytes, transactions, ideal } = *counts;
            AccessProfile { ptx_line, opcode, source, space, requests, bytes, transactions, ideal }
        };
        profile.by_place.iter().map(row).collect()
    }

    /// A fault that no instruction is to blame for.
    fn fault_of(&self, kind: FaultKind, message: String) -> Fault {
        let kernel = self.module.functions[self.entry].name.clone();
        Fault { kind, message, kernel, site: None, other: None, waiting: Vec::new() }
    }

    /// The fault of a block whose warps could not start.
    pub fn refuse_block(&self, block: u32, stop: &Stop) -> Box<Fault> {
        let [x, y, z] = self.block_index(block);
        let message = format!("block ({x}, {y}, {z}): {}", stop.message);
        Box::new(self.fault_of(stop.kind, message))
    }

    /// The fault of a launch that is over its limit once this block is counted.
    pub fn over_budget(&self, block: u32) -> Box<Fault> {
        let [x, y, z] = self.block_index(block);
        let limit = self.options.max_instructions;
        let message = format!(
            "the blocks up to ({x}, {y}, {z}) executed more than {limit} warp instructions"
        );
        Box::new(self.fault_of(FaultKind::Budget, message))
    }
}

/// A block at work.
pub(crate) struct Block<'l, 'r> {
    pub launch: &'l Launch<'l>,
    pub linear: u32,
    pub index: [u32; 3],
    pub shared: Shared,
    pub race: Option<&'r mut Race>,
    /// Executions of each instruction, by function.
    pub counts: Vec<Vec<u64>>,
    pub thread_instructions: u64,
    pub profile: Option<Profile>,
    /// Counted against the launch's limit.
    pub spent: u64,
    /// Bytes of the frames of its warps.
    pub resident: u64,
    /// Asynchronous copies that have not landed.
    pub in_flight: usize,
}

impl Block<'_, '_> {
    /// Makes sure a function's instructions have counters.
    pub fn count_function(&mut self, function: u32) {
        let counts = &mut self.counts[function as usize];
        counts.resize(self.launch.module.functions[function as usize].instrs.len(), 0);
    }

    /// Counts instructions, and other work in their measure, against the launch's limit.
    pub fn spend(&mut self, instructions: u64) -> Exec<()> {
        let race = self.race.as_deref_mut().map_or(0, Race::take_cost);
        self.spent = self.spent.saturating_add(instructions).saturating_add(race);
        let limit = self.launch.options.max_instructions;
        if self.spent > limit {
            let message = format!(
                "the launch has executed more than {limit} warp instructions: an endless loop, \
                 or a wait for something that cannot happen"
            );
            return stop(FaultKind::Budget, 0, message);
        }
        Ok(())
    }

    /// Takes the memory of a frame; setting it up counts as work.
    pub fn reserve(&mut self, bytes: u64) -> Exec<()> {
        self.resident += bytes;
        if self.resident > MAX_BLOCK_BYTES {
            let message = format!(
                "the registers, parameters and local memory of the block's calls exceed \
                 {MAX_BLOCK_BYTES} bytes"
            );
            return stop(FaultKind::StackOverflow, 0, message);
        }
        self.spend(bytes / BYTES_PER_INSTRUCTION)
    }
}

/// Lanes that wait for the part of the warp that runs to come to `join`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Waiting {
    pub pc: u32,
    pub mask: u32,
    pub join: u32,
}

/// One activation of a function.
pub(crate) struct Frame {
    pub function: u32,
    pub pc: u32,
    /// Lanes that execute.
    pub mask: u32,
    pub join: u32,
    pub stack: Vec<Waiting>,
    /// Lanes that have returned.
    pub returned: u32,
    pub regs: Regs,
    /// Parameters of the function and of its calls, by word.
    pub params: Vec<Lanes<u32>>,
    pub local_base: u32,
}

/// Why a warp stopped running for now.
pub(crate) enum Yield {
    Exited,
    /// Its turn is over.
    Slice,
    Barrier(Arrival),
}

pub(crate) struct Arrival {
    pub mode: BarrierMode,
    pub id: u32,
    /// Threads named by the instruction.
    pub count: Option<u32>,
    /// Destination and predicate of `bar.red`.
    pub d: u32,
    pub votes: u32,
    pub mask: u32,
}

pub(crate) struct Warp {
    pub index: usize,
    /// Lanes that exist and have not exited.
    pub live: u32,
    pub thread: [Lanes<u32>; 3],
    pub frame: Frame,
    pub callers: Vec<Frame>,
    /// Local memory, a word of each lane side by side.
    pub local: Vec<Lanes<u32>>,
    /// Lanes that have written each word.
    pub local_written: Vec<u32>,
    pub copies: Copies,
    pub executed: u64,
    /// Index of the buffer found last.
    pub hint: usize,
}

impl Warp {
    pub fn new(block: &mut Block, index: usize) -> Exec<Warp> {
        let launch = block.launch;
        let [x, y, _] = launch.config.block;
        let linear: Lanes<u32> = std::array::from_fn(|lane| (index * WARP + lane) as u32);
        let threads = launch.threads_per_block();
        let live = linear
            .iter()
            .enumerate()
            .fold(0, |live, (lane, &thread)| live | u32::from(thread < threads) << lane);
        let thread = [
            linear.map(|thread| thread % x),
            linear.map(|thread| thread / x % y),
            linear.map(|thread| thread / x / y),
        ];
        let mut warp = Warp {
            index,
            live,
            thread,
            frame: Frame {
                function: 0,
                pc: 0,
                mask: 0,
                join: END,
                stack: Vec::new(),
                returned: 0,
                regs: Regs::default(),
                params: Vec::new(),
                local_base: 0,
            },
            callers: Vec::new(),
            local: Vec::new(),
            local_written: Vec::new(),
            copies: Copies::default(),
            executed: 0,
            hint: 0,
        };
        warp.frame = warp.enter(block, launch.entry as u32, live)?;
        Ok(warp)
    }

    /// A fresh frame; its local memory starts where what is there ends.
    pub fn enter(&mut self, block: &mut Block, function: u32, mask: u32) -> Exec<Frame> {
        let launch = block.launch;
        let code = &launch.module.functions[function as usize];
        block.reserve(code.frame_bytes())?;
        // The largest alignment of an access.
        let local_base = (self.local.len() as u32 * 4).next_multiple_of(16);
        if u64::from(local_base) + u64::from(code.local_bytes) > MAX_LOCAL {
            let message =
                format!("more than {MAX_LOCAL} bytes of local memory in a thread's calls");
            return stop(FaultKind::StackOverflow, 0, message);
        }
        let words = (local_base / 4 + code.local_bytes.div_ceil(4)) as usize;
        self.local.resize(words, [UNDEFINED; WARP]);
        self.local_written.resize(words, 0);
        let undefined = u64::from(UNDEFINED) << 32 | u64::from(UNDEFINED);
        let [preds, r32, r64] = code.slots.map(|count| count as usize);
        let mut regs = Regs {
            r32: vec![[UNDEFINED; WARP]; r32],
            r64: vec![[undefined; WARP]; r64],
            pred: vec![0; preds],
        };
        regs.pred[0] = FULL;
        for &(file, slot, source) in &code.constants {
            let value = match source {
                Source::Const(value) => [value; WARP],
                Source::Variable(index, offset) => {
                    [launch.addresses[index as usize].wrapping_add_signed(offset); WARP]
                }
                Source::Local(offset) => [u64::from(local_base).wrapping_add_signed(offset); WARP],
                Source::Special(special) => {
                    self.special(launch, block.index, special).map(u64::from)
                }
            };
            match file {
                File::R32 => regs.r32[slot as usize] = value.map(|value| value as u32),
                File::R64 => regs.r64[slot as usize] = value,
                File::Pred => regs.pred[slot as usize] = if value[0] == 0 { 0 } else { FULL },
            }
        }
        let params = vec![[UNDEFINED; WARP]; code.param_bytes.div_ceil(4) as usize];
        let (pc, join, stack) = (0, END, Vec::new());
        Ok(Frame { function, pc, mask, join, stack, returned: 0, regs, params, local_base })
    }

    fn special(&self, launch: &Launch, block: [u32; 3], special: Special) -> Lanes<u32> {
        let config = launch.config;
        let one = match special {
            Special::Thread(axis) => return self.thread[usize::from(axis)],
            Special::Lane => return std::array::from_fn(|lane| lane as u32),
            Special::LaneMask(kind) => {
                return std::array::from_fn(|lane| {
                    let bit = 1u32 << lane;
                    match kind {
                        MaskOf::Equal => bit,
                        MaskOf::Less => bit - 1,
                        MaskOf::LessEqual => bit - 1 | bit,
                        MaskOf::Greater => !(bit - 1 | bit),
                        MaskOf::GreaterEqual => !(bit - 1),
                    }
                });
            }
            Special::BlockSize(axis) => config.block[usize::from(axis)],
            Special::Block(axis) => block[usize::from(axis)],
            Special::GridSize(axis) => config.grid[usize::from(axis)],
            Special::Warp => self.index as u32,
            Special::Warps => launch.warps_per_block() as u32,
            Special::DynamicShared => config.shared,
            Special::TotalShared => config.shared + launch.layout.static_bytes as u32,
            Special::Zero => 0,
            Special::One => 1,
        };
        [one; WARP]
    }

    pub fn regs(&self) -> &Regs {
        &self.frame.regs
    }

    pub fn regs_mut(&mut self) -> &mut Regs {
        &mut self.frame.regs
    }

    /// The instruction being executed.
    pub fn place(&self) -> Place {
        Place { function: self.frame.function, pc: self.frame.pc }
    }

    /// The addresses of an operand, lane by lane.
    pub fn addresses(&self, address: Address) -> Lanes<u64> {
        let regs = self.regs();
        if address.wide {
            regs.r64[address.base as usize].map(|base| base.wrapping_add_signed(address.offset))
        } else {
            let offset = address.offset as u32;
            regs.r32[address.base as usize].map(|base| u64::from(base.wrapping_add(offset)))
        }
    }

    pub fn who(&self, lane: usize) -> Who {
        Who { warp: self.index, lane, place: self.place() }
    }

    pub fn race_read(
        &self,
        block: &mut Block,
        lane: usize,
        range: ByteRange,
        strong: Option<Strong>,
    ) -> Exec<()> {
        let who = self.who(lane);
        let Some(race) = block.race.as_deref_mut() else { return Ok(()) };
        let result = race.read(who, range, strong);
        result.map_err(|conflict| race_stop(lane, &conflict, false))?;
        check_room(race, lane)
    }

    pub fn race_write(
        &self,
        block: &mut Block,
        lane: usize,
        range: ByteRange,
        kind: WriteKind,
        same: bool,
    ) -> Exec<()> {
        let who = self.who(lane);
        let Some(race) = block.race.as_deref_mut() else { return Ok(()) };
        let result = race.write(who, range, kind, same);
        result.map_err(|conflict| race_stop(lane, &conflict, true))?;
        check_room(race, lane)
    }

    pub fn race_atomic(
        &self,
        block: &mut Block,
        lane: usize,
        range: ByteRange,
        order: Strong,
        reads: bool,
    ) -> Exec<()> {
        let who = self.who(lane);
        let Some(race) = block.race.as_deref_mut() else { return Ok(()) };
        let result = race.atomic(who, range, order, reads);
        result.map_err(|conflict| race_stop(lane, &conflict, true))?;
        check_room(race, lane)
    }

    /// Ends the time of what an instruction released, once for all its lanes.
    pub fn end_release(&self, block: &mut Block, strong: Option<Strong>) {
        if let Some(race) = &mut block.race
            && strong.is_some_and(|strong| strong.release)
        {
            race.tick(self.index);
        }
    }

    /// Counts an access for the profile, if there is one.
    pub fn count_access(
        &self,
        block: &mut Block,
        space: AccessSpace,
        at: &Lanes<u64>,
        mask: u32,
        size: u64,
    ) {
        if let Some(profile) = &mut block.profile
            && mask != 0
        {
            profile.count(self.place(), space, at, mask, size);
        }
    }

    /// Splits the executing lanes by the member mask each names, and checks that all the lanes a
    /// mask names are there with it. Lanes that have exited are not waited for.
    pub fn member_groups(&self, named: &Lanes<u32>, mask: u32, what: &str) -> Exec<Vec<u32>> {
        let mut groups = Vec::with_capacity(1);
        let mut left = mask;
        while left != 0 {
            let lane = left.trailing_zeros() as usize;
            let members = named[lane];
            let together =
                lanes_of(left).filter(|&other| named[other] == members).fold(0, |m, l| m | 1 << l);
            if members >> lane & 1 == 0 {
                let message = format!("the {what}'s mask {members:#010x} lacks the lane itself");
                return stop(FaultKind::MissingLanes, lane, message);
            }
            let wanted = members & self.live;
            if wanted & !together != 0 {
                let message = format!(
                    "the {what} names lanes {}, which are not executing it with that mask",
                    lane_list(wanted & !together)
                );
                return stop(FaultKind::MissingLanes, lane, message);
            }
            groups.push(together);
            left &= !together;
        }
        Ok(groups)
    }

    /// Refuses a warp-wide instruction that lanes are missing from.
    pub fn require_converged(&self, mask: u32, wanted: u32, what: &str) -> Exec<()> {
        let missing = wanted & !mask;
        if missing == 0 {
            return Ok(());
        }
        let exited = missing & !self.live;
        let mut message = format!(
            "the {what} needs lanes {} of warp {}, which are not executing it",
            lane_list(missing),
            self.index
        );
        if exited != 0 {
            let lanes = lane_list(exited);
            let _ = write!(message, " (lanes {lanes} have exited or never existed)");
        }
        stop(FaultKind::MissingLanes, mask.trailing_zeros() as usize, message)
    }
}

/// Lanes as ranges: `0-3, 7`.
pub(crate) fn lane_list(mask: u32) -> String {
    let lanes: Vec<usize> = lanes_of(mask).collect();
    let mut parts = Vec::new();
    for run in lanes.chunk_by(|a, b| a + 1 == *b) {
        match run {
            [one] => parts.push(one.to_string()),
            [first, .., last] => parts.push(format!("{first}-{last}")),
            [] => {}
        }
    }
    parts.join(", ")
}

fn check_room(race: &Race, lane: usize) -> Exec<()> {
    if !race.is_full() {
        return Ok(());
    }
    let message =
        "the accesses to watch for races exceed the detector's memory: run a smaller shape";
    stop(FaultKind::Capacity, lane, message)
}

// The result is always wanted as the error of an `Exec`, which is boxed.
#[allow(clippy::unnecessary_box_returns)]
fn race_stop(lane: usize, conflict: &Conflict, writes: bool) -> Box<Stop> {
    let what = match (writes, conflict.was_write) {
        (true, true) => "writes where another thread wrote",
        (true, false) => "writes where another thread reads",
        (false, _) => "reads what another thread wrote",
    };
    let message = if conflict.in_flight {
        "touches the destination of an asynchronous copy still in flight".to_owned()
    } else if conflict.both_strong {
        format!("{what}: both strong, but a scope leaves the other thread out or the sizes differ")
    } else {
        format!("{what}, and nothing orders the two")
    };
    Box::new(Stop { kind: FaultKind::Race, message, lane, at: None, other: Some(conflict.earlier) })
}
