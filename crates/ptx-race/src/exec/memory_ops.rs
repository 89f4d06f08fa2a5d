//! Loads, stores and atomics of a warp, in every state space.

use crate::convert::Scalar;
use crate::fault::{Exec, FaultKind, stop};
use crate::float::Small;
use crate::math::{canonical, flush};
use crate::mem::{Buffer, LOCAL_WINDOW, Miss, SHARED_WINDOW};
use crate::op::{Atomic, AtomicOp, AtomicType, NONE, Space, Transfer, window};
use crate::profile::AccessSpace;
use crate::race::{ByteRange, WriteKind};
use crate::registers::{FULL, Lanes, Reg, WARP, halves, lanes_of, packed};
use crate::shared::{self, Trouble};
use crate::state::{Block, Warp};

/// The elements of a transfer, as register bits.
type Elements = [Lanes<u64>; 4];

impl Block<'_, '_> {
    /// Finds the buffer of a global access and the offset in it.
    fn global(&self, hint: &mut usize, lane: usize, at: u64, size: u64) -> Exec<(&Buffer, usize)> {
        match self.launch.table.find(at, *hint) {
            Ok(index) => {
                *hint = index;
                let (base, len, buffer) = self.launch.table.get(index);
                if at + size <= base + len {
                    return Ok((buffer, (at - base) as usize));
                }
                let over = at + size - base - len;
                let message = format!(
                    "{size} bytes at {at:#x} run {over} past the end of {}",
                    self.launch.describe(base, len)
                );
                stop(FaultKind::OutOfBounds, lane, message)
            }
            Err(Miss::Freed { base, len }) => {
                let message = format!(
                    "{at:#x} is byte {} of a buffer of {len} bytes that was freed",
                    at - base
                );
                stop(FaultKind::UseAfterFree, lane, message)
            }
            Err(Miss::Outside { nearest }) => {
                let place = match nearest {
                    None => "; there are no buffers".to_owned(),
                    Some((base, len)) if at < base => {
                        format!(", {} bytes before {}", base - at, self.launch.describe(base, len))
                    }
                    Some((base, len)) => format!(
                        ", {} bytes past the end of {}",
                        at - base - len,
                        self.launch.describe(base, len)
                    ),
                };
                stop(FaultKind::OutOfBounds, lane, format!("{at:#x} lies in no buffer{place}"))
            }
        }
    }

    /// Loads aligned bytes of global memory for a lane, `size` at most 8.
    pub fn load_global(&self, hint: &mut usize, lane: usize, at: u64, size: u64) -> Exec<u64> {
        self.update_global(hint, lane, at, size, |_| None)
    }

    /// Loads as [`Block::load_global`] does, and stores what `update` makes of it.
    fn update_global(
        &self,
        hint: &mut usize,
        lane: usize,
        at: u64,
        size: u64,
        update: impl FnOnce(u64) -> Option<u64>,
    ) -> Exec<u64> {
        let (buffer, offset) = self.global(hint, lane, at, size)?;
        if !buffer.is_written(offset, size as usize) {
            return self.unwritten_global(lane, at);
        }
        let old = buffer.load(offset, size as usize);
        if let Some(new) = update(old) {
            buffer.store(offset, size as usize, new);
        }
        Ok(old)
    }

    fn unwritten_global<T>(&self, lane: usize, at: u64) -> Exec<T> {
        let place = self.launch.table.find(at, usize::MAX).map(|index| {
            let (base, len, _) = self.launch.table.get(index);
            format!("byte {} of {}", at - base, self.launch.describe(base, len))
        });
        let place = place.unwrap_or_else(|_| format!("{at:#x}"));
        stop(FaultKind::Uninitialized, lane, format!("nothing has written {place}"))
    }

    /// Checks that a global range is readable without reading it.
    pub fn check_global(&self, hint: &mut usize, lane: usize, at: u64, size: u64) -> Exec<()> {
        self.global(hint, lane, at, size).map(|_| ())
    }

    pub fn shared_trouble<T>(&self, lane: usize, at: u64, trouble: &Trouble) -> Exec<T> {
        let launch = self.launch;
        let place = shared::describe(launch.module, launch.layout, self.shared.len(), at);
        match trouble {
            Trouble::OutOfBounds => stop(FaultKind::OutOfBounds, lane, place),
            Trouble::Uninitialized => {
                stop(FaultKind::Uninitialized, lane, format!("nothing has written {place}"))
            }
            Trouble::InFlight => {
                let message = format!("the copy into {place} has not been waited for");
                stop(FaultKind::AsyncInFlight, lane, message)
            }
        }
    }

    #[inline]
    fn read_shared(&self, at: u64, size: usize) -> Result<u64, Trouble> {
        match size {
            1 => self.shared.load::<1>(at).map(|b| b[0].into()),
            2 => self.shared.load(at).map(|b| u16::from_le_bytes(b).into()),
            4 => self.shared.load(at).map(|b| u32::from_le_bytes(b).into()),
            _ => self.shared.load(at).map(u64::from_le_bytes),
        }
    }

    fn load_shared(&self, lane: usize, at: u64, size: usize) -> Exec<u64> {
        match self.read_shared(at, size) {
            Ok(value) => Ok(value),
            Err(trouble) => self.shared_trouble(lane, at, &trouble),
        }
    }

    fn store_shared(&mut self, lane: usize, at: u64, size: usize, value: u64) -> Exec<()> {
        let result = match size {
            1 => self.shared.store(at, [value as u8]),
            2 => self.shared.store(at, (value as u16).to_le_bytes()),
            4 => self.shared.store(at, (value as u32).to_le_bytes()),
            _ => self.shared.store(at, value.to_le_bytes()),
        };
        match result {
            Ok(()) => Ok(()),
            Err(trouble) => self.shared_trouble(lane, at, &trouble),
        }
    }
}

fn check_alignment(lane: usize, at: u64, size: u64) -> Exec<()> {
    if at.is_multiple_of(size) {
        return Ok(());
    }
    stop(FaultKind::Misaligned, lane, format!("{at:#x} is not a multiple of {size} bytes"))
}

impl Warp {
    /// Splits lanes with generic addresses by the space each points into.
    fn by_space(
        space: Space,
        at: &mut Lanes<u64>,
        mask: u32,
    ) -> impl Iterator<Item = (Space, u32)> + use<> {
        let mut parts = [(space, mask), (Space::Shared, 0), (Space::Local, 0)];
        if space == Space::Generic {
            parts[0] = (Space::Global, 0);
            for lane in lanes_of(mask) {
                let part = match window(at[lane]) {
                    Space::Shared => 1,
                    Space::Local => 2,
                    _ => 0,
                };
                parts[part].1 |= 1 << lane;
                at[lane] -= [0, SHARED_WINDOW, LOCAL_WINDOW][part];
            }
        }
        parts.into_iter().filter(|&(_, mask)| mask != 0)
    }

    pub fn load(&mut self, block: &mut Block, transfer: &Transfer, mask: u32) -> Exec<()> {
        let mut at = self.addresses(transfer.address);
        let mut out: Elements = [[0; WARP]; 4];
        for (space, mask) in Self::by_space(transfer.space, &mut at, mask) {
            match space {
                Space::Global | Space::Generic => {
                    self.load_global(block, transfer, &at, mask, &mut out)?;
                }
                Space::Shared => {
                    let read = |lane, at, size| block.load_shared(lane, at, size);
                    gather(transfer, &at, mask, &mut out, check_alignment, read)?;
                }
                Space::Local => {
                    let check = |lane, at, total| self.check_local_read(lane, at, total);
                    let read = |lane, at, size| Ok(read_words(&self.local, lane, at, size));
                    gather(transfer, &at, mask, &mut out, check, read)?;
                }
                Space::KernelParam => {
                    load_kernel_param(&block.launch.params, transfer, &at, mask, &mut out)?;
                }
                Space::FrameParam => {
                    let params = &self.frame.params;
                    let check = |lane, at, total| check_param(lane, at, total, params.len() * 4);
                    let read = |lane, at, size| Ok(read_words(params, lane, at, size));
                    gather(transfer, &at, mask, &mut out, check, read)?;
                }
            }
            self.count_transfer(block, transfer, space, &at, mask);
            if block.race.is_some() && is_watched(space) {
                for lane in lanes_of(mask) {
                    for range in transfer_ranges(transfer, space, at[lane]) {
                        self.race_read(block, lane, range, transfer.strong)?;
                    }
                }
            }
        }
        let shift = 64 - 8 * u32::from(transfer.size);
        for (&register, values) in
            transfer.registers.iter().zip(&mut out).take(transfer.count.into())
        {
            if transfer.signed {
                *values = values.map(|value| ((value << shift) as i64 >> shift) as u64);
            }
            if transfer.wide {
                u64::put(self.regs_mut(), register, values, mask);
            } else {
                u32::put(self.regs_mut(), register, &values.map(|value| value as u32), mask);
            }
        }
        Ok(())
    }

    fn load_global(
        &mut self,
        block: &mut Block,
        transfer: &Transfer,
        at: &Lanes<u64>,
        mask: u32,
        out: &mut Elements,
    ) -> Exec<()> {
        let (size, count) = (usize::from(transfer.size), usize::from(transfer.count));
        let total = (size * count) as u64;
        let mut hint = self.hint;
        let first = mask.trailing_zeros() as usize;
        // All lanes in one buffer is what nearly every access is: look it up once.
        let (buffer, offset) = block.global(&mut hint, first, at[first], 1)?;
        let base = at[first] - offset as u64;
        self.hint = hint;
        let (_, len, _) = block.launch.table.get(hint);
        for lane in lanes_of(mask) {
            check_alignment(lane, at[lane], total)?;
            let offset = at[lane].wrapping_sub(base);
            let (buffer, offset) = if offset < len && offset + total <= len {
                (buffer, offset as usize)
            } else {
                block.global(&mut hint, lane, at[lane], total)?
            };
            for (i, values) in out.iter_mut().take(count).enumerate() {
                let offset = offset + i * size;
                if !buffer.is_written(offset, size) {
                    return block.unwritten_global(lane, at[lane] + (i * size) as u64);
                }
                values[lane] = buffer.load(offset, size);
            }
        }
        Ok(())
    }

    fn count_transfer(
        &self,
        block: &mut Block,
        transfer: &Transfer,
        space: Space,
        at: &Lanes<u64>,
        mask: u32,
    ) {
        let size = u64::from(transfer.size) * u64::from(transfer.count);
        match space {
            Space::Global => self.count_access(block, AccessSpace::Global, at, mask, size),
            Space::Shared => self.count_access(block, AccessSpace::Shared, at, mask, size),
            _ => {}
        }
    }

    fn check_local_read(&self, lane: usize, at: u64, total: u64) -> Exec<()> {
        check_local(lane, at, total, self.local.len() * 4)?;
        for word in at as usize / 4..(at + total).div_ceil(4) as usize {
            if self.local_written[word] >> lane & 1 == 0 {
                let message = format!("nothing has written byte {} of local memory", word * 4);
                return stop(FaultKind::Uninitialized, lane, message);
            }
        }
        Ok(())
    }

    pub fn store(&mut self, block: &mut Block, transfer: &Transfer, mask: u32) -> Exec<()> {
        let mut at = self.addresses(transfer.address);
        let (size, count) = (usize::from(transfer.size), usize::from(transfer.count));
        let total = (size * count) as u64;
        let regs = self.regs();
        let mut values: Elements = [[0; WARP]; 4];
        for (values, &register) in values.iter_mut().zip(&transfer.registers).take(count) {
            *values = if transfer.wide {
                regs.r64[register as usize]
            } else {
                regs.r32[register as usize].map(u64::from)
            };
        }
        let kept = u64::MAX >> (64 - 8 * size);
        let values = &values[..count];
        let races = block.race.is_some();
        for (space, mask) in Self::by_space(transfer.space, &mut at, mask) {
            // Lanes that leave memory other than it was, for the race detector.
            let mut changed = 0u32;
            match space {
                Space::Global | Space::Generic => {
                    let mut hint = self.hint;
                    for lane in lanes_of(mask) {
                        check_alignment(lane, at[lane], total)?;
                        let (buffer, offset) = block.global(&mut hint, lane, at[lane], total)?;
                        for (i, values) in values.iter().enumerate() {
                            let (offset, value) = (offset + i * size, values[lane]);
                            let same = races
                                && buffer.is_written(offset, size)
                                && buffer.load(offset, size) == value & kept;
                            changed |= u32::from(!same) << lane;
                            buffer.store(offset, size, value);
                        }
                    }
                    self.hint = hint;
                }
                Space::Shared => {
                    let write = |lane: usize, at, value| {
                        let same = races
                            && block.read_shared(at, size).is_ok_and(|old| old == value & kept);
                        changed |= u32::from(!same) << lane;
                        block.store_shared(lane, at, size, value)
                    };
                    scatter(transfer, &at, mask, values, check_alignment, write)?;
                }
                Space::Local => {
                    let bytes = self.local.len() * 4;
                    let check = |lane, at, total| check_local(lane, at, total, bytes);
                    let write = |lane: usize, at: u64, value| {
                        for word in at as usize / 4..(at as usize + size).div_ceil(4) {
                            self.local_written[word] |= 1 << lane;
                        }
                        write_words(&mut self.local, lane, at, size, value);
                        Ok(())
                    };
                    scatter(transfer, &at, mask, values, check, write)?;
                }
                Space::FrameParam | Space::KernelParam => {
                    let params = &mut self.frame.params;
                    let bytes = params.len() * 4;
                    let check = |lane, at, total| check_param(lane, at, total, bytes);
                    let write = |lane, at, value| {
                        write_words(params, lane, at, size, value);
                        Ok(())
                    };
                    scatter(transfer, &at, mask, values, check, write)?;
                }
            }
            self.count_transfer(block, transfer, space, &at, mask);
            if races && is_watched(space) {
                let kind = transfer.strong.map_or(WriteKind::Plain, WriteKind::Strong);
                for lane in lanes_of(mask) {
                    for range in transfer_ranges(transfer, space, at[lane]) {
                        self.race_write(block, lane, range, kind, changed >> lane & 1 == 0)?;
                    }
                }
            }
        }
        self.end_release(block, transfer.strong);
        Ok(())
    }

    pub fn atomic(&mut self, block: &mut Block, atomic: &Atomic, mask: u32) -> Exec<()> {
        let mut at = self.addresses(atomic.address);
        let wide = atomic.size == 8;
        let size = u64::from(atomic.size);
        let read = |slot: u32| -> Lanes<u64> {
            if slot == NONE {
                [0; WARP]
            } else if wide {
                self.regs().r64[slot as usize]
            } else {
                self.regs().r32[slot as usize].map(u64::from)
            }
        };
        let (b, c) = (read(atomic.b), read(atomic.c));
        let mut old: Lanes<u64> = [0; WARP];
        for (space, mask) in Self::by_space(atomic.space, &mut at, mask) {
            let counted =
                if space == Space::Shared { AccessSpace::Shared } else { AccessSpace::Global };
            self.count_access(block, counted, &at, mask, size);
            for lane in lanes_of(mask) {
                let at = at[lane];
                check_alignment(lane, at, size)?;
                let update = |old| apply(atomic, space, old, b[lane], c[lane]);
                old[lane] = match space {
                    Space::Shared => {
                        let old = block.load_shared(lane, at, size as usize)?;
                        block.store_shared(lane, at, size as usize, update(old))?;
                        old
                    }
                    Space::Global => {
                        let update = |old| Some(update(old));
                        block.update_global(&mut self.hint, lane, at, size, update)?
                    }
                    _ => {
                        let message = "an atomic on local memory";
                        return stop(FaultKind::InvalidOperand, lane, message);
                    }
                };
                let range = ByteRange { shared: space == Space::Shared, at, size };
                let writes = atomic.op != AtomicOp::CompareSwap
                    || is_equal(8 * u32::from(atomic.size), old[lane], b[lane]);
                if writes {
                    self.race_atomic(block, lane, range, atomic.order, atomic.d != NONE)?;
                } else {
                    self.race_read(block, lane, range, Some(atomic.order))?;
                }
            }
        }
        self.end_release(block, Some(atomic.order));
        if atomic.d != NONE {
            if wide {
                u64::put(self.regs_mut(), atomic.d, &old, mask);
            } else {
                u32::put(self.regs_mut(), atomic.d, &old.map(|old| old as u32), mask);
            }
        }
        Ok(())
    }
}

/// Spaces that races are watched in.
fn is_watched(space: Space) -> bool {
    matches!(space, Space::Global | Space::Shared)
}

/// The accesses of a transfer: a strong vector is as many scalars.
fn transfer_ranges(
    transfer: &Transfer,
    space: Space,
    at: u64,
) -> impl Iterator<Item = ByteRange> + use<> {
    let (size, count) = (u64::from(transfer.size), u64::from(transfer.count));
    let (size, count) = if transfer.strong.is_some() { (size, count) } else { (size * count, 1) };
    let shared = space == Space::Shared;
    (0..count).map(move |i| ByteRange { shared, at: at + i * size, size })
}

/// Reads the elements of a load, lane by lane: `check` sees the whole access of a lane, `read`
/// gets each element.
#[inline(always)]
fn gather(
    transfer: &Transfer,
    at: &Lanes<u64>,
    mask: u32,
    out: &mut Elements,
    check: impl Fn(usize, u64, u64) -> Exec<()>,
    read: impl Fn(usize, u64, usize) -> Exec<u64>,
) -> Exec<()> {
    let (size, count) = (usize::from(transfer.size), usize::from(transfer.count));
    for lane in lanes_of(mask) {
        check(lane, at[lane], (size * count) as u64)?;
        for (i, values) in out.iter_mut().take(count).enumerate() {
            values[lane] = read(lane, at[lane] + (i * size) as u64, size)?;
        }
    }
    Ok(())
}

/// Writes the elements of a store, lane by lane, as [`gather`] reads them.
#[inline(always)]
fn scatter(
    transfer: &Transfer,
    at: &Lanes<u64>,
    mask: u32,
    values: &[Lanes<u64>],
    check: impl Fn(usize, u64, u64) -> Exec<()>,
    mut write: impl FnMut(usize, u64, u64) -> Exec<()>,
) -> Exec<()> {
    let size = u64::from(transfer.size);
    for lane in lanes_of(mask) {
        check(lane, at[lane], size * values.len() as u64)?;
        for (i, values) in values.iter().enumerate() {
            write(lane, at[lane] + i as u64 * size, values[lane])?;
        }
    }
    Ok(())
}

fn check_local(lane: usize, at: u64, size: u64, bytes: usize) -> Exec<()> {
    check_alignment(lane, at, size)?;
    if at.checked_add(size).is_none_or(|end| end > bytes as u64) {
        let message = format!("local address {at:#x}: the thread has {bytes} bytes");
        return stop(FaultKind::OutOfBounds, lane, message);
    }
    Ok(())
}

fn check_param(lane: usize, at: u64, size: u64, bytes: usize) -> Exec<()> {
    check_alignment(lane, at, size)?;
    if at.checked_add(size).is_none_or(|end| end > bytes as u64) {
        let message = format!("parameter byte {at}: there are {bytes}");
        return stop(FaultKind::OutOfBounds, lane, message);
    }
    Ok(())
}

fn load_kernel_param(
    bytes: &[u8],
    transfer: &Transfer,
    at: &Lanes<u64>,
    mask: u32,
    out: &mut Elements,
) -> Exec<()> {
    let uniform = mask == FULL && at[1..].iter().all(|&other| other == at[0]);
    let check = |lane, at, total| check_param(lane, at, total, bytes.len());
    let read = |_, at: u64, size: usize| {
        let mut value = [0; 8];
        value[..size].copy_from_slice(&bytes[at as usize..at as usize + size]);
        Ok(u64::from_le_bytes(value))
    };
    gather(transfer, at, if uniform { 1 } else { mask }, out, check, read)?;
    if uniform {
        for values in out.iter_mut().take(transfer.count.into()) {
            *values = [values[0]; WARP];
        }
    }
    Ok(())
}

fn read_words(words: &[Lanes<u32>], lane: usize, at: u64, size: usize) -> u64 {
    let at = at as usize;
    let low = u64::from(words[at / 4][lane] >> (at % 4 * 8));
    match size {
        8 => low | u64::from(words[at / 4 + 1][lane]) << 32,
        4 => low,
        _ => low & ((1 << (8 * size)) - 1),
    }
}

fn write_words(words: &mut [Lanes<u32>], lane: usize, at: u64, size: usize, value: u64) {
    let at = at as usize;
    let word = &mut words[at / 4][lane];
    match size {
        8 => {
            *word = value as u32;
            words[at / 4 + 1][lane] = (value >> 32) as u32;
        }
        4 => *word = value as u32,
        _ => {
            let (shift, kept) = (at % 4 * 8, (1u32 << (8 * size)) - 1);
            *word = *word & !(kept << shift) | (value as u32 & kept) << shift;
        }
    }
}

fn is_equal(bits: u32, a: u64, b: u64) -> bool {
    (a ^ b) << (64 - bits) == 0
}

/// What an atomic leaves in memory.
fn apply(atomic: &Atomic, space: Space, old: u64, b: u64, c: u64) -> u64 {
    let ty = match atomic.ty {
        AtomicType::F16x2 => return add_pairs::<half::f16>(old, b),
        AtomicType::Bf16x2 => return add_pairs::<half::bf16>(old, b),
        AtomicType::Scalar(ty) => ty,
    };
    let signed = |x: u64| if ty.bits() == 32 { i64::from(x as i32) } else { x as i64 };
    match (atomic.op, ty) {
        (AtomicOp::Add, Scalar::F32) => {
            // In global memory subnormals are flushed, in shared memory they are not.
            let flush = if space == Space::Global { flush } else { |x: f32| x };
            let [old, b] = [old, b].map(|bits| flush(f32::from_bits(bits as u32)));
            canonical(flush(old + b)).to_bits().into()
        }
        (AtomicOp::Add, Scalar::F64) => (f64::from_bits(old) + f64::from_bits(b)).to_bits(),
        (AtomicOp::Add, Scalar::F16) => add_small::<half::f16>(old, b),
        (AtomicOp::Add, Scalar::Bf16) => add_small::<half::bf16>(old, b),
        (AtomicOp::Add, _) => old.wrapping_add(b),
        (AtomicOp::Exchange, _) => b,
        (AtomicOp::CompareSwap, _) => {
            if is_equal(ty.bits(), old, b) {
                c
            } else {
                old
            }
        }
        (AtomicOp::Min, Scalar::Signed(_)) => signed(old).min(signed(b)) as u64,
        (AtomicOp::Max, Scalar::Signed(_)) => signed(old).max(signed(b)) as u64,
        (AtomicOp::Min, _) => old.min(b),
        (AtomicOp::Max, _) => old.max(b),
        (AtomicOp::Inc, _) => {
            if old >= b {
                0
            } else {
                old + 1
            }
        }
        (AtomicOp::Dec, _) => {
            if old == 0 || old > b {
                b
            } else {
                old - 1
            }
        }
        (AtomicOp::And, _) => old & b,
        (AtomicOp::Or, _) => old | b,
        (AtomicOp::Xor, _) => old ^ b,
    }
}

fn add_small<T: Small>(old: u64, b: u64) -> u64 {
    T::from_bits(old as u16).sum(T::from_bits(b as u16)).bits().into()
}

fn add_pairs<T: Small>(old: u64, b: u64) -> u64 {
    let (old, b) = (halves(old as u32), halves(b as u32));
    let sum = |half: usize| T::from_bits(old[half]).sum(T::from_bits(b[half])).bits();
    packed([sum(0), sum(1)]).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sub_words_keep_their_neighbors() {
        let mut words = vec![[0u32; WARP]; 2];
        write_words(&mut words, 3, 0, 8, 0x1122_3344_5566_7788);
        write_words(&mut words, 3, 2, 2, 0xABCD);
        write_words(&mut words, 3, 5, 1, 0xEF);
        assert_eq!(read_words(&words, 3, 0, 8), 0x1122_EF44_ABCD_7788);
        assert_eq!(read_words(&words, 3, 2, 2), 0xABCD);
        assert_eq!(read_words(&words, 2, 0, 8), 0);
    }
}
