//! How a launch is shaped and carried out, and what it counted.

use std::collections::BTreeMap;

use crate::profile::AccessProfile;

/// Default limit on the warp instructions of a launch.
const MAX_INSTRUCTIONS: u64 = 1 << 28;

/// The shape of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Blocks along x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block along x, y and z.
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub shared: u32,
}

impl Config {
    /// A launch along x alone, without dynamic shared memory.
    pub fn linear(grid: u32, block: u32) -> Config {
        Config { grid: [grid, 1, 1], block: [block, 1, 1], shared: 0 }
    }
}

/// One argument: its bytes, as the kernel's parameter holds them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arg(Vec<u8>);

impl Arg {
    /// An argument of any type, a struct passed by value say.
    pub fn bytes(bytes: &[u8]) -> Arg {
        Arg(bytes.to_vec())
    }

    /// The bytes the kernel will see.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

macro_rules! arg_from {
    ($($ty:ty),*) => {$(
        impl From<$ty> for Arg {
            fn from(value: $ty) -> Arg {
                Arg(value.to_le_bytes().to_vec())
            }
        }
    )*};
}
arg_from!(u8, i8, u16, i16, u32, i32, u64, i64, f32, f64);

/// Which warp runs when several could, and in which order blocks run.
///
/// A warp runs until a barrier stops it: warps that take turns hide missing barriers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Schedule {
    /// The first that can, by index.
    #[default]
    InOrder,
    /// The last that can; blocks from the last to the first.
    ReverseOrder,
    /// By random priorities from a seed, drawn again after each barrier; blocks shuffled.
    Random(u64),
}

fn mix(mut x: u64) -> u64 {
    x = (x ^ x >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ x >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ x >> 31
}

impl Schedule {
    /// Warps by priority.
    pub(crate) fn order(self, warps: usize, salt: u32) -> Vec<usize> {
        let mut order: Vec<usize> = (0..warps).collect();
        match self {
            Schedule::InOrder => {}
            Schedule::ReverseOrder => order.reverse(),
            Schedule::Random(seed) => {
                let seed = mix(seed.wrapping_add(u64::from(salt) << 32));
                order.sort_by_key(|&warp| mix(seed ^ (warp as u64 + 1)));
            }
        }
        order
    }

    /// The block that runs at a position.
    pub(crate) fn block(self, position: usize, total: usize) -> usize {
        match self {
            Schedule::InOrder => position,
            Schedule::ReverseOrder => total - 1 - position,
            Schedule::Random(seed) => {
                // A step that shares no factor with the count visits every block once.
                let mut step = mix(seed) as usize % total | 1;
                while gcd(step, total) != 1 {
                    step += 2;
                }
                let start = mix(seed ^ 0x5EED) as usize % total;
                ((start as u128 + position as u128 * step as u128) % total as u128) as usize
            }
        }
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// What is looked for beyond plain faults.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Check {
    /// Bounds, alignment, never-written memory, barriers and the like: always on.
    #[default]
    Faults,
    /// Data races as well. Slow, and on one thread: for small shapes.
    Races,
}

/// The GPU whose tensor-core arithmetic is computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Arch {
    /// Compute capability 9.0.
    #[default]
    H100,
    /// Compute capability 8.0.
    A100,
}

/// How a launch is carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Order of warps and blocks.
    pub schedule: Schedule,
    /// What is checked.
    pub check: Check,
    /// Threads of the host that run blocks. Results do not depend on it.
    pub threads: usize,
    /// Warp instructions the whole launch may execute before it is taken for hung. Setting up a
    /// block and a call counts as one per 4 KiB of registers, parameters and memory.
    pub max_instructions: u64,
    /// The GPU whose tensor cores `mma` computes as.
    pub arch: Arch,
    /// Whether bank conflicts and sectors are counted, into [`Stats::profile`].
    pub profile: bool,
}

impl Default for Options {
    fn default() -> Options {
        let (schedule, check) = (Schedule::InOrder, Check::Faults);
        Options {
            schedule,
            check,
            threads: 1,
            max_instructions: MAX_INSTRUCTIONS,
            arch: Arch::H100,
            profile: false,
        }
    }
}

/// Counts of what a launch executed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Instructions, counted once per warp.
    pub warp_instructions: u64,
    /// Instructions, counted once per active lane.
    pub thread_instructions: u64,
    /// Warp instructions by opcode.
    pub by_opcode: BTreeMap<String, u64>,
    /// Memory accesses by instruction, in the order of the code, with [`Options::profile`].
    pub profile: Vec<AccessProfile>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_schedule_visits_each_block_once() {
        for schedule in [Schedule::InOrder, Schedule::ReverseOrder, Schedule::Random(7)] {
            for total in [1, 2, 6, 15, 64] {
                let mut seen: Vec<_> = (0..total).map(|at| schedule.block(at, total)).collect();
                seen.sort_unstable();
                assert_eq!(seen, (0..total).collect::<Vec<_>>(), "{schedule:?}");
            }
        }
    }
}
