//! `cp.async`: copies that land as late as is legal.
//!
//! The destination is poisoned at issue and the bytes move when a wait asks for them (or the
//! thread ends), so that a missing wait or commit is always seen. Hopper's bulk copies and
//! mbarriers belong here too, once a kernel needs them.

use crate::copies::PendingCopy;
use crate::fault::{Exec, FaultKind, Stop, stop};
use crate::mem::SHARED_WINDOW;
use crate::op::{CopyAsync, NONE};
use crate::profile::AccessSpace;
use crate::race::{ByteRange, Who, WriteKind};
use crate::registers::{WARP, lanes_of};
use crate::state::{Block, Warp};

/// Copies of a block that may be in flight: far above what fits its shared memory.
const MAX_IN_FLIGHT: usize = 1 << 20;

impl Warp {
    pub fn copy_async(&mut self, block: &mut Block, copy: &CopyAsync, mask: u32) -> Exec<()> {
        let to = self.addresses(copy.to);
        let from = self.addresses(copy.from);
        let regs = self.regs();
        let size = copy.size;
        let mut taken = [u32::from(size); WARP];
        if copy.source_size != NONE {
            taken = regs.r32[copy.source_size as usize];
        }
        if copy.ignore != NONE {
            let ignored = regs.pred[copy.ignore as usize];
            for lane in lanes_of(ignored) {
                taken[lane] = 0;
            }
        }
        let place = self.place();
        let read = (0..WARP).fold(0, |read, lane| read | u32::from(taken[lane] > 0) << lane);
        self.count_access(block, AccessSpace::Global, &from, mask & read, size.into());
        self.count_access(block, AccessSpace::Shared, &to, mask, size.into());
        for lane in lanes_of(mask) {
            let to = if to[lane] >= SHARED_WINDOW { to[lane] - SHARED_WINDOW } else { to[lane] };
            let from = from[lane];
            for at in [to, from] {
                if at % u64::from(size) != 0 {
                    let message = format!("{at:#x} is not a multiple of the copy's {size} bytes");
                    return stop(FaultKind::Misaligned, lane, message);
                }
            }
            if taken[lane] > u32::from(size) {
                let message = format!("a copy of {size} bytes cannot take {}", taken[lane]);
                return stop(FaultKind::InvalidOperand, lane, message);
            }
            if taken[lane] > 0 {
                let bytes = u64::from(taken[lane]);
                block.check_global(&mut self.hint, lane, from, bytes)?;
                let range = ByteRange { shared: false, at: from, size: bytes };
                self.race_read(block, lane, range, None)?;
            }
            let range = ByteRange { shared: true, at: to, size: size.into() };
            if let Err(trouble) = block.shared.take_off(to, size.into()) {
                return block.shared_trouble(lane, to, &trouble);
            }
            self.race_write(block, lane, range, WriteKind::InFlight, false)?;
            let taken = taken[lane] as u8;
            let copy = PendingCopy { to, from, size, taken, group: None, place };
            self.copies.pending[lane].push_back(copy);
            block.in_flight += 1;
            if block.in_flight > MAX_IN_FLIGHT {
                let message = format!("more than {MAX_IN_FLIGHT} copies of the block in flight");
                return stop(FaultKind::Capacity, lane, message);
            }
        }
        Ok(())
    }

    /// Lands what a wait asks for: all copies, or those of all but the latest groups.
    pub fn wait_copies(&mut self, block: &mut Block, keep: Option<u32>, mask: u32) -> Exec<()> {
        for lane in lanes_of(mask) {
            let due = match keep {
                None => None,
                Some(keep) => Some(self.copies.committed[lane].saturating_sub(keep.into())),
            };
            while let Some(copy) = self.copies.pending[lane].front().copied() {
                if due.is_some_and(|due| copy.group.is_none_or(|group| group >= due)) {
                    break;
                }
                self.copies.pending[lane].pop_front();
                block.in_flight -= 1;
                self.land(block, lane, copy)?;
            }
        }
        Ok(())
    }

    fn land(&mut self, block: &mut Block, lane: usize, copy: PendingCopy) -> Exec<()> {
        let blame = |mut stop: Box<Stop>| {
            stop.at = Some(copy.place);
            stop
        };
        let mut bytes = [0; 16];
        let mut at = 0;
        let taken = usize::from(copy.taken);
        while at < taken {
            // Whole words where the source allows, which is aligned to the copy's size.
            let step = if taken - at >= 8 { 8 } else { (taken - at).min(4) };
            let step = if step == 3 { 2 } else { step };
            let from = copy.from + at as u64;
            let value =
                block.load_global(&mut self.hint, lane, from, step as u64).map_err(blame)?;
            bytes[at..at + step].copy_from_slice(&value.to_le_bytes()[..step]);
            at += step;
        }
        if taken > 0 {
            let range = ByteRange { shared: false, at: copy.from, size: copy.taken.into() };
            self.race_read(block, lane, range, None).map_err(blame)?;
        }
        block.shared.land(copy.to, &bytes[..usize::from(copy.size)]);
        if let Some(race) = &mut block.race {
            let who = Who { warp: self.index, lane, place: copy.place };
            race.land(who, ByteRange { shared: true, at: copy.to, size: copy.size.into() });
        }
        Ok(())
    }
}
