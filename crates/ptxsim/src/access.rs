//! Loads, stores and atomics of a warp, in every state space.

use crate::convert::Scalar;
use crate::fault::{Exec, FaultKind, Stop, stop};
use crate::float::Small;
use crate::lanes::{FULL, Lanes, Reg, WARP, halves, lanes_of, packed};
use crate::math::canonical;
use crate::mem::{Buffer, LOCAL_WINDOW, Miss, SHARED_WINDOW, WINDOW_SIZE};
use crate::op::{Address, Atomic, AtomicOp, AtomicType, NONE, Space, Transfer};
use crate::race::{Conflict, Kind, Range, Who};
use crate::sched::Block;
use crate::shared::{self, Trouble};
use crate::warp::Warp;

/// The space a generic address lies in.
pub(crate) fn window(address: u64) -> Space {
    if address.wrapping_sub(SHARED_WINDOW) < WINDOW_SIZE {
        Space::Shared
    } else if address.wrapping_sub(LOCAL_WINDOW) < WINDOW_SIZE {
        Space::Local
    } else {
        Space::Global
    }
}

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
        let (buffer, offset) = self.global(hint, lane, at, size)?;
        if !buffer.is_written(offset, size as usize) {
            return self.unwritten_global(lane, at);
        }
        Ok(buffer.load(offset, size as usize))
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

    fn load_shared(&self, lane: usize, at: u64, size: usize) -> Exec<u64> {
        let result = match size {
            1 => self.shared.load::<1>(at).map(|b| b[0].into()),
            2 => self.shared.load(at).map(|b| u16::from_le_bytes(b).into()),
            4 => self.shared.load(at).map(|b| u32::from_le_bytes(b).into()),
            _ => self.shared.load(at).map(u64::from_le_bytes),
        };
        match result {
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

// The result is always wanted as the error of an `Exec`, which is boxed.
#[allow(clippy::unnecessary_box_returns)]
pub(crate) fn race_stop(lane: usize, conflict: &Conflict, writes: bool) -> Box<Stop> {
    let message = match (writes, conflict.was_write, conflict.in_flight) {
        (_, _, true) => "touches the destination of an asynchronous copy still in flight",
        (true, true, _) => "writes where another thread wrote, and nothing orders the two",
        (true, false, _) => "writes where another thread reads, and nothing orders the two",
        (false, ..) => "reads what another thread wrote, and nothing orders the two",
    };
    Box::new(Stop {
        kind: FaultKind::Race,
        message: message.to_owned(),
        lane,
        at: None,
        other: Some(conflict.earlier),
    })
}

impl Warp {
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

    fn who(&self, lane: usize) -> Who {
        Who { warp: self.index, lane, place: self.place() }
    }

    pub fn race_read(
        &self,
        block: &mut Block,
        lane: usize,
        range: Range,
        strong: bool,
    ) -> Exec<()> {
        let who = self.who(lane);
        match block.race.as_deref_mut().map(|race| race.read(who, range, strong)) {
            Some(Err(conflict)) => Err(race_stop(lane, &conflict, false)),
            _ => Ok(()),
        }
    }

    pub fn race_write(&self, block: &mut Block, lane: usize, range: Range, kind: Kind) -> Exec<()> {
        let who = self.who(lane);
        match block.race.as_deref_mut().map(|race| race.write(who, range, kind)) {
            Some(Err(conflict)) => Err(race_stop(lane, &conflict, true)),
            _ => Ok(()),
        }
    }

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
                Space::Shared => self.load_shared(block, transfer, &at, mask, &mut out)?,
                Space::Local => self.load_local(transfer, &at, mask, &mut out)?,
                Space::KernelParam => {
                    load_bytes(&block.launch.params, transfer, &at, mask, &mut out)?;
                }
                Space::FrameParam => self.load_params(transfer, &at, mask, &mut out)?,
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
        if block.race.is_some() {
            for lane in lanes_of(mask) {
                let range = Range { shared: false, at: at[lane], size: total };
                self.race_read(block, lane, range, transfer.strong)?;
            }
        }
        Ok(())
    }

    fn load_shared(
        &mut self,
        block: &mut Block,
        transfer: &Transfer,
        at: &Lanes<u64>,
        mask: u32,
        out: &mut Elements,
    ) -> Exec<()> {
        let (size, count) = (usize::from(transfer.size), usize::from(transfer.count));
        let total = (size * count) as u64;
        for lane in lanes_of(mask) {
            check_alignment(lane, at[lane], total)?;
            for (i, values) in out.iter_mut().take(count).enumerate() {
                values[lane] = block.load_shared(lane, at[lane] + (i * size) as u64, size)?;
            }
        }
        if block.race.is_some() {
            for lane in lanes_of(mask) {
                let range = Range { shared: true, at: at[lane], size: total };
                self.race_read(block, lane, range, transfer.strong)?;
            }
        }
        Ok(())
    }

    fn local_word(&self, lane: usize, at: u64, total: u64) -> Exec<usize> {
        check_alignment(lane, at, total)?;
        let bytes = self.local.len() as u64 * 4;
        if at.checked_add(total).is_none_or(|end| end > bytes) {
            let message = format!("local address {at:#x}: the thread has {bytes} bytes");
            return stop(FaultKind::OutOfBounds, lane, message);
        }
        Ok((at / 4) as usize)
    }

    fn load_local(
        &mut self,
        transfer: &Transfer,
        at: &Lanes<u64>,
        mask: u32,
        out: &mut Elements,
    ) -> Exec<()> {
        let (size, count) = (usize::from(transfer.size), usize::from(transfer.count));
        for lane in lanes_of(mask) {
            let word = self.local_word(lane, at[lane], (size * count) as u64)?;
            for word in word..word + (size * count).div_ceil(4) {
                if self.local_written[word] >> lane & 1 == 0 {
                    let message = format!("nothing has written byte {} of local memory", word * 4);
                    return stop(FaultKind::Uninitialized, lane, message);
                }
            }
            for (i, values) in out.iter_mut().take(count).enumerate() {
                values[lane] = read_words(&self.local, lane, at[lane] as usize + i * size, size);
            }
        }
        Ok(())
    }

    fn load_params(
        &mut self,
        transfer: &Transfer,
        at: &Lanes<u64>,
        mask: u32,
        out: &mut Elements,
    ) -> Exec<()> {
        let (size, count) = (usize::from(transfer.size), usize::from(transfer.count));
        let params = self.frame_params();
        for lane in lanes_of(mask) {
            check_param(lane, at[lane], size * count, params.len() * 4)?;
            for (i, values) in out.iter_mut().take(count).enumerate() {
                values[lane] = read_words(params, lane, at[lane] as usize + i * size, size);
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
        let values = &values[..count];
        for (space, mask) in Self::by_space(transfer.space, &mut at, mask) {
            match space {
                Space::Global | Space::Generic => {
                    let mut hint = self.hint;
                    for lane in lanes_of(mask) {
                        check_alignment(lane, at[lane], total)?;
                        let (buffer, offset) = block.global(&mut hint, lane, at[lane], total)?;
                        for (i, values) in values.iter().enumerate() {
                            buffer.store(offset + i * size, size, values[lane]);
                        }
                    }
                    self.hint = hint;
                }
                Space::Shared => {
                    for lane in lanes_of(mask) {
                        check_alignment(lane, at[lane], total)?;
                        for (i, values) in values.iter().enumerate() {
                            let at = at[lane] + (i * size) as u64;
                            block.store_shared(lane, at, size, values[lane])?;
                        }
                    }
                }
                Space::Local => {
                    for lane in lanes_of(mask) {
                        let word = self.local_word(lane, at[lane], total)?;
                        for word in word..word + (total as usize).div_ceil(4) {
                            self.local_written[word] |= 1 << lane;
                        }
                        for (i, values) in values.iter().enumerate() {
                            let at = at[lane] as usize + i * size;
                            write_words(&mut self.local, lane, at, size, values[lane]);
                        }
                    }
                }
                Space::FrameParam | Space::KernelParam => {
                    let params = self.frame_params();
                    for lane in lanes_of(mask) {
                        check_param(lane, at[lane], total as usize, params.len() * 4)?;
                        for (i, values) in values.iter().enumerate() {
                            let at = at[lane] as usize + i * size;
                            write_words(params, lane, at, size, values[lane]);
                        }
                    }
                }
            }
            if block.race.is_some() && matches!(space, Space::Global | Space::Shared) {
                let kind = if transfer.strong { Kind::Strong } else { Kind::Plain };
                let shared = space == Space::Shared;
                for lane in distinct_writes(&at, values, mask) {
                    let range = Range { shared, at: at[lane], size: total };
                    self.race_write(block, lane, range, kind)?;
                }
            }
        }
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
        if atomic.orders
            && let Some(race) = &mut block.race
        {
            race.fence(self.index);
        }
        for (space, mask) in Self::by_space(atomic.space, &mut at, mask) {
            for lane in lanes_of(mask) {
                check_alignment(lane, at[lane], size)?;
                let (at, shared) = (at[lane], space == Space::Shared);
                match space {
                    Space::Shared => {
                        old[lane] = block.load_shared(lane, at, size as usize)?;
                        let new = apply(atomic, old[lane], b[lane], c[lane]);
                        block.store_shared(lane, at, size as usize, new)?;
                    }
                    Space::Global => {
                        let mut hint = self.hint;
                        old[lane] = block.load_global(&mut hint, lane, at, size)?;
                        let new = apply(atomic, old[lane], b[lane], c[lane]);
                        let (buffer, offset) = block.global(&mut hint, lane, at, size)?;
                        buffer.store(offset, size as usize, new);
                        self.hint = hint;
                    }
                    _ => {
                        let message = "an atomic on local memory";
                        return stop(FaultKind::InvalidOperand, lane, message);
                    }
                }
                let who = self.who(lane);
                let range = Range { shared, at, size };
                if let Some(Err(conflict)) =
                    block.race.as_deref_mut().map(|race| race.atomic(who, range))
                {
                    return Err(race_stop(lane, &conflict, true));
                }
            }
        }
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

/// Lanes of a store, less those that write what another lane writes to the same place.
fn distinct_writes(
    at: &Lanes<u64>,
    values: &[Lanes<u64>],
    mask: u32,
) -> impl Iterator<Item = usize> {
    let repeated = |lane: usize| {
        lanes_of(mask & ((1 << lane) - 1)).any(|before| {
            at[before] == at[lane] && values.iter().all(|values| values[before] == values[lane])
        })
    };
    lanes_of(mask).filter(|&lane| !repeated(lane)).collect::<Vec<_>>().into_iter()
}

fn check_param(lane: usize, at: u64, size: usize, len: usize) -> Exec<()> {
    check_alignment(lane, at, size as u64)?;
    if at.checked_add(size as u64).is_none_or(|end| end > len as u64) {
        let message = format!("parameter byte {at}: there are {len}");
        return stop(FaultKind::OutOfBounds, lane, message);
    }
    Ok(())
}

fn load_bytes(
    bytes: &[u8],
    transfer: &Transfer,
    at: &Lanes<u64>,
    mask: u32,
    out: &mut Elements,
) -> Exec<()> {
    let (size, count) = (usize::from(transfer.size), usize::from(transfer.count));
    let uniform = mask == FULL && at[1..].iter().all(|&other| other == at[0]);
    for lane in lanes_of(mask) {
        check_param(lane, at[lane], size * count, bytes.len())?;
        for (i, values) in out.iter_mut().take(count).enumerate() {
            let at = at[lane] as usize + i * size;
            let mut value = [0; 8];
            value[..size].copy_from_slice(&bytes[at..at + size]);
            let value = u64::from_le_bytes(value);
            if uniform {
                values.fill(value);
            } else {
                values[lane] = value;
            }
        }
        if uniform {
            break;
        }
    }
    Ok(())
}

fn read_words(words: &[Lanes<u32>], lane: usize, at: usize, size: usize) -> u64 {
    let low = u64::from(words[at / 4][lane] >> (at % 4 * 8));
    match size {
        8 => low | u64::from(words[at / 4 + 1][lane]) << 32,
        4 => low,
        _ => low & ((1 << (8 * size)) - 1),
    }
}

fn write_words(words: &mut [Lanes<u32>], lane: usize, at: usize, size: usize, value: u64) {
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

/// What an atomic leaves in memory.
fn apply(atomic: &Atomic, old: u64, b: u64, c: u64) -> u64 {
    let ty = match atomic.ty {
        AtomicType::F16x2 => return add_pairs::<half::f16>(old, b),
        AtomicType::Bf16x2 => return add_pairs::<half::bf16>(old, b),
        AtomicType::Scalar(ty) => ty,
    };
    let signed = |x: u64| if ty.bits() == 32 { i64::from(x as i32) } else { x as i64 };
    match (atomic.op, ty) {
        (AtomicOp::Add, Scalar::F32) => {
            let sum = f32::from_bits(old as u32) + f32::from_bits(b as u32);
            canonical(sum).to_bits().into()
        }
        (AtomicOp::Add, Scalar::F64) => (f64::from_bits(old) + f64::from_bits(b)).to_bits(),
        (AtomicOp::Add, Scalar::F16) => add_small::<half::f16>(old, b),
        (AtomicOp::Add, Scalar::Bf16) => add_small::<half::bf16>(old, b),
        (AtomicOp::Add, _) => old.wrapping_add(b),
        (AtomicOp::Exchange, _) => b,
        (AtomicOp::CompareSwap, _) => {
            let kept = u64::MAX >> (64 - ty.bits());
            if old & kept == b & kept { c } else { old }
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
    fn sub_words_keep_their_neighbours() {
        let mut words = vec![[0u32; WARP]; 2];
        write_words(&mut words, 3, 0, 8, 0x1122_3344_5566_7788);
        write_words(&mut words, 3, 2, 2, 0xABCD);
        write_words(&mut words, 3, 5, 1, 0xEF);
        assert_eq!(read_words(&words, 3, 0, 8), 0x1122_EF44_ABCD_7788);
        assert_eq!(read_words(&words, 3, 2, 2), 0xABCD);
        assert_eq!(read_words(&words, 2, 0, 8), 0);
    }
}
