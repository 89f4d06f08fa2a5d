//! One warp: its frames, its divergence, and the loop that executes it.
//!
//! The lanes of a warp share a program counter until a branch parts them; each part then runs to
//! the branch's immediate post-dominator, where the stack has the whole waiting.

mod async_copies;
mod memory_ops;
mod tensor;
mod warp_collectives;

use crate::cfg::END;
use crate::code::Code;
use crate::fault::{Exec, FaultKind, stop};
use crate::op::{BarrierMode, BoolOp, Call, Callee, NONE, Op, ParamSlot, window};
use crate::registers::{Lanes, Reg, WARP, lanes_of};
use crate::state::{Arrival, Block, Waiting, Warp, Yield};

/// Calls nested deeper than this are taken for endless recursion.
const MAX_FRAMES: usize = 128;

impl Warp {
    /// Executes until a barrier, the end, or the end of the slice.
    pub fn run(&mut self, block: &mut Block<'_, '_>, slice: u64) -> Exec<Yield> {
        let launch = block.launch;
        let mut code = &launch.module.functions[self.frame.function as usize];
        let until = self.executed + slice;
        loop {
            if self.frame.pc == self.frame.join && !self.resume(block, &mut code) {
                block.spent = block.spent.saturating_add(self.executed - (until - slice));
                return Ok(Yield::Exited);
            }
            let pc = self.frame.pc as usize;
            let instr = &code.instrs[pc];
            let guard = self.frame.regs.pred[instr.guard as usize];
            let mask = self.frame.mask & if instr.negated { !guard } else { guard };
            self.executed += 1;
            block.counts[self.frame.function as usize][pc] += 1;
            block.thread_instructions += u64::from(mask.count_ones());
            if self.executed >= until {
                // The instruction still executes; its warp's turn ends after it.
                block.spend(self.executed - (until - slice))?;
                let result = self.execute(block, &mut code, &instr.op, mask)?;
                return Ok(result.unwrap_or(Yield::Slice));
            }
            match &instr.op {
                Op::Alu(run, slots) => {
                    run(&mut self.frame.regs, slots, mask);
                    self.frame.pc += 1;
                }
                op => {
                    if let Some(result) = self.execute(block, &mut code, op, mask)? {
                        block.spend(self.executed - (until - slice))?;
                        return Ok(result);
                    }
                }
            }
        }
    }

    /// Goes on with lanes that wait; false when there are none left in any frame.
    fn resume<'l>(&mut self, block: &mut Block<'l, '_>, code: &mut &'l Code) -> bool {
        let launch = block.launch;
        loop {
            let gone = !self.live | self.frame.returned;
            if let Some(next) = self.frame.stack.pop() {
                if next.mask & !gone != 0 {
                    let frame = &mut self.frame;
                    (frame.pc, frame.mask, frame.join) = (next.pc, next.mask & !gone, next.join);
                    // What comes back may stand where it must wait again.
                    if frame.pc != frame.join {
                        return true;
                    }
                }
                continue;
            }
            let Some(mut caller) = self.callers.pop() else { return false };
            let returned = self.frame.returned & self.live;
            block.resident -= code.frame_bytes();
            let words = self.frame.local_base as usize / 4;
            self.local.truncate(words);
            self.local_written.truncate(words);
            let caller_code = &launch.module.functions[caller.function as usize];
            if let Op::Call(call) = &caller_code.instrs[caller.pc as usize].op {
                let results = code.results.iter().zip(&call.results);
                for (from, to) in results {
                    copy_param(&self.frame.params, *from, &mut caller.params, *to, returned);
                }
            }
            // Lanes the guard left out of the call go on with those that return.
            caller.mask &= self.live;
            caller.pc += 1;
            self.frame = caller;
            *code = caller_code;
            if self.frame.mask != 0 && self.frame.pc != self.frame.join {
                return true;
            }
        }
    }

    fn diverge(&mut self, join: u32, parts: &[(u32, u32)]) {
        let frame = &mut self.frame;
        if join != frame.join && join != END {
            frame.stack.push(Waiting { pc: join, mask: frame.mask, join: frame.join });
        }
        for &(pc, mask) in parts {
            if pc != join {
                frame.stack.push(Waiting { pc, mask, join });
            }
        }
        // The loop resumes with the part pushed last.
        (frame.pc, frame.join) = (join, join);
    }

    /// Lanes leave the frame (or, on exit, all frames); those that stay go on.
    fn leave(&mut self, mask: u32, exit: bool) {
        if exit {
            self.live &= !mask;
        } else {
            self.frame.returned |= mask;
        }
        let frame = &mut self.frame;
        frame.mask &= !mask;
        if frame.mask == 0 {
            // Nothing here runs on: let the loop look for who waits.
            frame.join = frame.pc;
        } else {
            frame.pc += 1;
        }
    }

    /// The instructions that are not register to register. Some ends the turn.
    fn execute<'l>(
        &mut self,
        block: &mut Block<'l, '_>,
        code: &mut &'l Code,
        op: &Op,
        mask: u32,
    ) -> Exec<Option<Yield>> {
        match op {
            Op::Branch { target, join } => {
                let stay = self.frame.mask & !mask;
                if stay == 0 {
                    self.frame.pc = *target;
                } else if mask == 0 {
                    self.frame.pc += 1;
                } else {
                    self.diverge(*join, &[(*target, mask), (self.frame.pc + 1, stay)]);
                }
                return Ok(None);
            }
            Op::BranchIndex { index, targets, join } => {
                self.branch_index(*index, targets, *join, mask)?;
                return Ok(None);
            }
            Op::Call(call) => {
                if mask == 0 {
                    self.frame.pc += 1;
                } else {
                    self.call(block, code, call, mask)?;
                }
                return Ok(None);
            }
            Op::Return if self.callers.is_empty() => {
                self.leave(mask, true);
                return Ok(None);
            }
            Op::Return | Op::Exit => {
                self.leave(mask, matches!(op, Op::Exit));
                return Ok(None);
            }
            _ => {}
        }
        if mask == 0 {
            self.frame.pc += 1;
            return Ok(None);
        }
        let mut ends = None;
        match op {
            Op::Alu(run, slots) => run(&mut self.frame.regs, slots, mask),
            Op::Convert(convert, slots, files) => {
                convert.run(&mut self.frame.regs, slots, *files, mask);
            }
            Op::SetP { run, slots, q, combine, c } => {
                self.set_predicates(*run, *slots, *q, *combine, *c, mask);
            }
            Op::Pack { d, wide, parts, count } => self.pack(*d, *wide, parts, *count, mask),
            Op::Unpack { a, wide, parts, count } => self.unpack(*a, *wide, parts, *count, mask),
            Op::InWindow { d, a, space } => {
                let address = self.frame.regs.r64[*a as usize];
                let inside = address.map(|address| window(address) == *space);
                bool::put(&mut self.frame.regs, *d, &inside, mask);
            }
            Op::Clock { d, wide } => {
                if *wide {
                    u64::put(&mut self.frame.regs, *d, &[self.executed; WARP], mask);
                } else {
                    u32::put(&mut self.frame.regs, *d, &[self.executed as u32; WARP], mask);
                }
            }
            Op::Trap => {
                let lane = mask.trailing_zeros() as usize;
                return stop(FaultKind::Trap, lane, "the kernel executed `trap`");
            }
            Op::Load(transfer) => self.load(block, transfer, mask)?,
            Op::Store(transfer) => self.store(block, transfer, mask)?,
            Op::Atomic(atomic) => self.atomic(block, atomic, mask)?,
            Op::Shuffle { .. }
            | Op::Vote { .. }
            | Op::Match { .. }
            | Op::Redux { .. }
            | Op::ActiveMask { .. } => self.cross_lane(op, mask)?,
            Op::Barrier { mode, id, count, d, p } => {
                ends = Some(self.barrier(*mode, *id, *count, [*d, *p], mask)?);
            }
            Op::SyncWarp { mask: named } => {
                let named = self.frame.regs.r32[*named as usize];
                for group in self.member_groups(&named, mask, "bar.warp.sync")? {
                    if let Some(race) = &mut block.race {
                        race.sync_warp(self.index, group);
                    }
                }
            }
            Op::Fence(fence) => {
                if let Some(race) = &mut block.race {
                    race.fence(self.index, *fence);
                }
            }
            Op::LoadMatrix { address, generic, transpose, count, d } => {
                self.load_matrix(block, *address, *generic, *transpose, *count, d, mask)?;
            }
            Op::MoveMatrix { d, a } => self.move_matrix(*d, *a, mask)?,
            Op::Mma(mma) => self.mma(block, mma, mask)?,
            Op::CopyAsync(copy) => self.copy_async(block, copy, mask)?,
            Op::CommitGroup => self.copies.commit(mask),
            Op::WaitGroup(pending) => self.wait_copies(block, Some(*pending), mask)?,
            Op::WaitAll => self.wait_copies(block, None, mask)?,
            Op::Nop => {}
            Op::Branch { .. } | Op::BranchIndex { .. } | Op::Call(_) | Op::Return | Op::Exit => {
                unreachable!("control flow is handled above")
            }
        }
        self.frame.pc += 1;
        Ok(ends)
    }

    fn branch_index(&mut self, index: u32, targets: &[u32], join: u32, mask: u32) -> Exec<()> {
        let index = self.frame.regs.r32[index as usize];
        let mut parts: Vec<(u32, u32)> = Vec::new();
        let stay = self.frame.mask & !mask;
        if stay != 0 {
            parts.push((self.frame.pc + 1, stay));
        }
        for lane in lanes_of(mask) {
            let Some(&target) = targets.get(index[lane] as usize) else {
                let message =
                    format!("branch index {} of a table of {}", index[lane], targets.len());
                return stop(FaultKind::InvalidOperand, lane, message);
            };
            match parts.iter_mut().find(|part| part.0 == target) {
                Some(part) => part.1 |= 1 << lane,
                None => parts.push((target, 1 << lane)),
            }
        }
        match parts[..] {
            [(target, _)] => self.frame.pc = target,
            _ => self.diverge(join, &parts),
        }
        Ok(())
    }

    fn call<'l>(
        &mut self,
        block: &mut Block<'l, '_>,
        code: &mut &'l Code,
        call: &Call,
        mask: u32,
    ) -> Exec<()> {
        let lane = mask.trailing_zeros() as usize;
        let function = match call.callee {
            Callee::Function(function) => function,
            Callee::Print => {
                for result in &call.results {
                    for word in 0..result.size.div_ceil(4) {
                        self.frame.params[(result.offset / 4 + word) as usize] = [0; WARP];
                    }
                }
                self.frame.pc += 1;
                return Ok(());
            }
            Callee::AssertFail => {
                return stop(FaultKind::Trap, lane, "a device-side assertion failed");
            }
        };
        if self.callers.len() + 2 > MAX_FRAMES {
            return stop(FaultKind::StackOverflow, lane, format!("{MAX_FRAMES} calls deep"));
        }
        let launch = block.launch;
        block.count_function(function);
        let bytes = call.arguments.iter().chain(&call.results).map(|slot| u64::from(slot.size));
        block.spend(bytes.sum())?;
        let mut frame = self.enter(block, function, mask)?;
        *code = &launch.module.functions[function as usize];
        for (from, to) in call.arguments.iter().zip(&code.formals) {
            copy_param(&self.frame.params, *from, &mut frame.params, *to, mask);
        }
        self.callers.push(std::mem::replace(&mut self.frame, frame));
        Ok(())
    }

    fn set_predicates(
        &mut self,
        run: crate::registers::LaneFn,
        slots: crate::registers::Slots,
        q: u32,
        combine: BoolOp,
        c: u32,
        mask: u32,
    ) {
        let regs = &mut self.frame.regs;
        // The form writes p, which may be c as well.
        let c = regs.pred[c as usize];
        run(regs, &slots, mask);
        let compared = regs.pred[slots.d as usize];
        let apply = |bits: u32| match combine {
            BoolOp::And => bits & c,
            BoolOp::Or => bits | c,
            BoolOp::Xor => bits ^ c,
        };
        let mut put = |slot: u32, bits: u32| {
            let register = &mut regs.pred[slot as usize];
            *register = *register & !mask | bits & mask;
        };
        put(slots.d, apply(compared));
        if q != NONE {
            put(q, apply(!compared));
        }
    }

    fn pack(&mut self, d: u32, wide: bool, parts: &[u32; 4], count: u8, mask: u32) {
        let regs = &mut self.frame.regs;
        let count = usize::from(count);
        let bits = if wide { 64 } else { 32 } / count;
        let mut out = [0u64; WARP];
        for (i, &part) in parts[..count].iter().enumerate() {
            let part = &regs.r32[part as usize];
            for lane in 0..WARP {
                out[lane] |= (u64::from(part[lane]) & (!0 >> (64 - bits))) << (bits * i);
            }
        }
        if wide {
            u64::put(regs, d, &out, mask);
        } else {
            u32::put(regs, d, &out.map(|bits| bits as u32), mask);
        }
    }

    fn unpack(&mut self, a: u32, wide: bool, parts: &[u32; 4], count: u8, mask: u32) {
        let regs = &mut self.frame.regs;
        let count = usize::from(count);
        let bits = if wide { 64 } else { 32 } / count;
        let whole = if wide { regs.r64[a as usize] } else { regs.r32[a as usize].map(u64::from) };
        for (i, &part) in parts[..count].iter().enumerate().filter(|&(_, &part)| part != NONE) {
            let out = whole.map(|whole| (whole >> (bits * i) & (!0 >> (64 - bits))) as u32);
            u32::put(regs, part, &out, mask);
        }
    }

    fn barrier(
        &mut self,
        mode: BarrierMode,
        id: u32,
        count: u32,
        [d, p]: [u32; 2],
        mask: u32,
    ) -> Exec<Yield> {
        let regs = &self.frame.regs;
        let lane = mask.trailing_zeros() as usize;
        self.require_converged(mask, self.live, "barrier")?;
        let id = regs.r32[id as usize][lane];
        if id >= 16 {
            return stop(FaultKind::InvalidOperand, lane, format!("barrier {id}: there are 16"));
        }
        let count = (count != NONE).then(|| regs.r32[count as usize][lane]);
        if let Some(count) = count.filter(|count| count % 32 != 0 || *count == 0 || *count > 1024) {
            let message = format!("a barrier of {count} threads: not a multiple of 32 up to 1024");
            return stop(FaultKind::InvalidOperand, lane, message);
        }
        let votes = if p == NONE { 0 } else { regs.pred[p as usize] & mask };
        Ok(Yield::Barrier(Arrival { mode, id, count, d, votes, mask }))
    }
}

fn copy_param(
    from: &[Lanes<u32>],
    source: ParamSlot,
    to: &mut [Lanes<u32>],
    target: ParamSlot,
    mask: u32,
) {
    // Formals may share a word, call parameters never do: bytes, then.
    for byte in 0..source.size {
        let (a, b) = (source.offset + byte, target.offset + byte);
        for lane in lanes_of(mask) {
            let value = from[(a / 4) as usize][lane] >> (a % 4 * 8) & 0xFF;
            let word = &mut to[(b / 4) as usize][lane];
            *word = *word & !(0xFF << (b % 4 * 8)) | value << (b % 4 * 8);
        }
    }
}
