//! Shared memory of one block.

use crate::code::{Decoded, SharedLayout};

const WRITTEN: u8 = 1;
/// Destination of a copy that has not landed.
const IN_FLIGHT: u8 = 2;
/// Between variables: no access is right.
const GAP: u8 = 0x80;

/// Bytes and their state. The gaps the layout leaves between variables are out of bounds.
pub(crate) struct Shared {
    data: Vec<u8>,
    state: Vec<u8>,
}

pub(crate) enum Trouble {
    OutOfBounds,
    Uninitialized,
    InFlight,
}

impl Shared {
    pub fn new(layout: &SharedLayout, dynamic: usize) -> Shared {
        let len = layout.dynamic_at as usize + dynamic;
        let mut state = vec![GAP; len];
        for &(_, at, size) in &layout.variables {
            state[at as usize..(at + size) as usize].fill(0);
        }
        state[layout.dynamic_at as usize..].fill(0);
        Shared { data: vec![0xCB; len], state }
    }

    pub fn len(&self) -> usize {
        self.data.len()
    }

    fn range<const N: usize>(&self, at: u64) -> Option<usize> {
        let at = usize::try_from(at).ok()?;
        (at.checked_add(N)? <= self.data.len()).then_some(at)
    }

    #[inline]
    pub fn load<const N: usize>(&self, at: u64) -> Result<[u8; N], Trouble> {
        let Some(at) = self.range::<N>(at) else { return Err(Trouble::OutOfBounds) };
        let state: [u8; N] = std::array::from_fn(|i| self.state[at..at + N][i]);
        if state != [WRITTEN; N] {
            return Err(trouble(&state));
        }
        Ok(std::array::from_fn(|i| self.data[at..at + N][i]))
    }

    #[inline]
    pub fn store<const N: usize>(&mut self, at: u64, bytes: [u8; N]) -> Result<(), Trouble> {
        let Some(at) = self.range::<N>(at) else { return Err(Trouble::OutOfBounds) };
        let state = &mut self.state[at..at + N];
        if state.iter().any(|&state| state & GAP != 0) {
            return Err(Trouble::OutOfBounds);
        }
        state.fill(WRITTEN);
        self.data[at..at + N].copy_from_slice(&bytes);
        Ok(())
    }

    /// Poisons the destination of a copy.
    pub fn take_off(&mut self, at: u64, size: usize) -> Result<(), Trouble> {
        let at = usize::try_from(at).unwrap_or(usize::MAX);
        let range = at..at.saturating_add(size);
        match self.state.get_mut(range) {
            Some(state) if state.iter().all(|&state| state & GAP == 0) => {
                state.fill(IN_FLIGHT);
                Ok(())
            }
            _ => Err(Trouble::OutOfBounds),
        }
    }

    /// Lands a copy whose destination was poisoned before.
    pub fn land(&mut self, at: u64, bytes: &[u8]) {
        let at = at as usize;
        self.data[at..at + bytes.len()].copy_from_slice(bytes);
        self.state[at..at + bytes.len()].fill(WRITTEN);
    }
}

/// Why bytes in these states are not to be read.
fn trouble(state: &[u8]) -> Trouble {
    if state.iter().any(|&state| state & GAP != 0) {
        Trouble::OutOfBounds
    } else if state.contains(&IN_FLIGHT) {
        Trouble::InFlight
    } else {
        Trouble::Uninitialized
    }
}

/// Says where an address lies, for a fault.
pub(crate) fn describe(module: &Decoded, layout: &SharedLayout, len: usize, at: u64) -> String {
    let dynamic = layout.dynamic_at;
    let size = len as u64 - dynamic.min(len as u64);
    let inside = |start: u64, size: u64| at >= start && at < start + size;
    for &(index, start, size) in &layout.variables {
        if inside(start, size) {
            return format!("byte {} of `{}`", at - start, module.variables[index as usize].name);
        }
    }
    if inside(dynamic, size) {
        return format!("byte {} of dynamic shared memory ({size} bytes)", at - dynamic);
    }
    if at >= dynamic && size > 0 {
        let past = at - dynamic - size;
        return format!("{past} bytes past the end of dynamic shared memory ({size} bytes)");
    }
    let before = layout.variables.iter().rev().find(|&&(_, start, _)| start <= at);
    match before {
        Some(&(index, start, size)) => format!(
            "{} bytes past the end of `{}` ({size} bytes)",
            at - start - size,
            module.variables[index as usize].name
        ),
        None => format!("shared address {at:#x}, where the kernel has no shared memory"),
    }
}
