//! The public face: modules, kernels and launches.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::decode::{self, Decoded, Param, SharedLayout};
use crate::fault::{Fault, FaultKind};
use crate::mem::Memory;
use crate::parse::ParseError;
use crate::sched::Launch;

/// The most shared memory a block can have on any card (227 KiB, on compute capability 9.0).
const MAX_SHARED: u64 = 227 << 10;
const DEFAULT_BUDGET: u64 = 1 << 28;

struct Inner {
    id: u64,
    decoded: Decoded,
    /// By function; empty for those that are no entries.
    layouts: Vec<SharedLayout>,
    atomics: Vec<bool>,
}

/// A PTX module, decoded once and ready to launch from any thread.
#[derive(Clone)]
pub struct Module {
    inner: Arc<Inner>,
}

impl std::fmt::Debug for Module {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.kernels().map(|kernel| kernel.name().to_owned())).finish()
    }
}

impl Module {
    /// Parses and decodes PTX text. An instruction this crate does not model is an error here,
    /// with its line, and not a surprise at run time.
    pub fn from_ptx(text: &str) -> Result<Module, ParseError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let decoded = decode::decode(text)?;
        let entries = || decoded.functions.iter().enumerate();
        let layouts =
            entries()
                .map(|(index, code)| {
                    if code.entry { decoded.shared_layout(index) } else { SharedLayout::default() }
                })
                .collect();
        let atomics = entries()
            .map(|(index, code)| code.entry && decoded.has_global_atomics(index))
            .collect();
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        Ok(Module { inner: Arc::new(Inner { id, decoded, layouts, atomics }) })
    }

    /// The kernel of a name.
    pub fn kernel(&self, name: &str) -> Option<Kernel> {
        self.kernels().find(|kernel| kernel.name() == name)
    }

    /// All kernels, in the order of the text.
    pub fn kernels(&self) -> impl Iterator<Item = Kernel> {
        let functions = self.inner.decoded.functions.iter().enumerate();
        functions
            .filter(|(_, code)| code.entry)
            .map(|(index, _)| Kernel { module: self.inner.clone(), index })
    }

    /// The `.target` the text was compiled for, `sm_80` say.
    pub fn target(&self) -> &str {
        &self.inner.decoded.target
    }

    /// The device address of a `.global` or `.const` variable of this module, as `memory` holds
    /// it; the variable keeps its value from launch to launch.
    pub fn variable(&self, memory: &Memory, name: &str) -> Option<u64> {
        let variables = &self.inner.decoded.variables;
        let index = variables.iter().position(|v| !v.shared && v.name == name)?;
        Some(self.inner.variables(memory)[index])
    }
}

impl Inner {
    fn variables(&self, memory: &Memory) -> Arc<[u64]> {
        memory.variables(self.id, |memory| {
            let place = |variable: &decode::GlobalVariable| {
                if variable.shared {
                    return 0;
                }
                // What is not initialised is zero, as the CUDA language has it.
                let address = memory.alloc_zeroed(variable.size.unwrap_or(0) as usize);
                let written = memory.write(address, &variable.init);
                debug_assert!(written.is_ok(), "decoding checked the size");
                address
            };
            self.decoded.variables.iter().map(place).collect()
        })
    }
}

/// A kernel of a module. Cheap to clone.
#[derive(Clone)]
pub struct Kernel {
    module: Arc<Inner>,
    index: usize,
}

impl std::fmt::Debug for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Kernel({})", self.name())
    }
}

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
    Greedy,
    /// The last that can; blocks from the last to the first.
    Reverse,
    /// By priorities drawn from a seed, anew after each barrier; blocks shuffled.
    Priorities(u64),
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
            Schedule::Greedy => {}
            Schedule::Reverse => order.reverse(),
            Schedule::Priorities(seed) => {
                let seed = mix(seed.wrapping_add(u64::from(salt) << 32));
                order.sort_by_key(|&warp| mix(seed ^ (warp as u64 + 1)));
            }
        }
        order
    }

    /// The block that runs at a position.
    pub(crate) fn block(self, position: usize, total: usize) -> usize {
        match self {
            Schedule::Greedy => position,
            Schedule::Reverse => total - 1 - position,
            Schedule::Priorities(seed) => {
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

/// How a launch is carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Order of warps and blocks.
    pub schedule: Schedule,
    /// What is checked.
    pub check: Check,
    /// Threads of the host that run blocks. Results do not depend on it.
    pub threads: usize,
    /// Warp instructions a block may execute before it is taken for hung.
    pub budget: u64,
}

impl Default for Options {
    fn default() -> Options {
        let (schedule, check) = (Schedule::Greedy, Check::Faults);
        Options { schedule, check, threads: 1, budget: DEFAULT_BUDGET }
    }
}

/// Counts of what a launch executed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Instructions, one for all the lanes of a warp.
    pub warp_instructions: u64,
    /// Instructions, one for each active lane.
    pub thread_instructions: u64,
    /// Warp instructions by opcode.
    pub by_opcode: BTreeMap<String, u64>,
}

impl Kernel {
    fn code(&self) -> &decode::Code {
        &self.module.decoded.functions[self.index]
    }

    /// Name in the PTX: mangled, unless `extern "C"`.
    pub fn name(&self) -> &str {
        &self.code().name
    }

    /// The parameters, for checking arguments.
    pub fn params(&self) -> &[Param] {
        &self.code().params
    }

    /// Registers the PTX declares: virtual ones, many more than a card would use.
    pub fn registers(&self) -> u32 {
        self.code().registers
    }

    /// Bytes of static shared memory.
    pub fn static_shared(&self) -> usize {
        self.module.layouts[self.index].static_bytes as usize
    }

    /// Bytes of local memory a thread has in this kernel itself.
    pub fn local_bytes(&self) -> usize {
        self.code().local_bytes as usize
    }

    /// How often each opcode occurs in the kernel's text.
    pub fn instruction_mix(&self) -> BTreeMap<&str, u64> {
        let mut mix = BTreeMap::new();
        let code = self.code();
        // The last instruction is the return that stands for the end of the text.
        for origin in &code.origins[..code.origins.len() - 1] {
            let opcode = &self.module.decoded.opcodes[origin.opcode as usize];
            *mix.entry(opcode.as_str()).or_default() += 1;
        }
        mix
    }

    fn refuse<T>(&self, kind: FaultKind, message: String) -> Result<T, Box<Fault>> {
        Err(Box::new(Fault {
            kind,
            message,
            kernel: self.name().to_owned(),
            site: None,
            other: None,
            waiting: Vec::new(),
        }))
    }

    /// Runs the kernel on the buffers of `memory`.
    ///
    /// Blocks run to their end one after another on each thread, so blocks that wait for one
    /// another never get on. Kernels with atomics on global memory run on one thread, in the
    /// order of the schedule: their result may depend on that order, but not on `threads`.
    pub fn launch(
        &self,
        memory: &Memory,
        config: &Config,
        args: &[Arg],
        options: &Options,
    ) -> Result<Stats, Box<Fault>> {
        let code = self.code();
        let layout = &self.module.layouts[self.index];
        self.check_shape(config, layout)?;
        if args.len() != code.params.len() {
            let message = format!("{} given, {} wanted", args.len(), code.params.len());
            return self.refuse(FaultKind::Arguments, message);
        }
        let mut params = vec![0; code.param_bytes as usize];
        for (index, (arg, param)) in args.iter().zip(&code.params).enumerate() {
            if arg.0.len() != param.size {
                let message = format!(
                    "argument {index} has {} bytes, parameter `{}` (.{}) has {}",
                    arg.0.len(),
                    param.name,
                    param.ty,
                    param.size
                );
                return self.refuse(FaultKind::Arguments, message);
            }
            params[param.offset..param.offset + param.size].copy_from_slice(&arg.0);
        }
        let mut addresses = self.module.variables(memory).to_vec();
        for (index, variable) in self.module.decoded.variables.iter().enumerate() {
            if variable.shared {
                addresses[index] = layout.dynamic_at;
            }
        }
        for &(index, at, _) in &layout.variables {
            addresses[index as usize] = at;
        }
        let table = memory.snapshot();
        let launch = Launch {
            module: &self.module.decoded,
            entry: self.index,
            layout,
            config: *config,
            options: *options,
            params,
            table: &table,
            addresses,
            serial: self.module.atomics[self.index],
        };
        launch.run()
    }

    fn check_shape(&self, config: &Config, layout: &SharedLayout) -> Result<(), Box<Fault>> {
        let code = self.code();
        let Config { grid, block, shared } = *config;
        let volume = |shape: [u32; 3]| shape.iter().map(|&n| u64::from(n)).product::<u64>();
        let refuse = |message: String| self.refuse(FaultKind::Launch, message);
        if volume(block) == 0 || block[0] > 1024 || block[1] > 1024 || block[2] > 64 {
            return refuse(format!("a block of {block:?} threads"));
        }
        if volume(block) > 1024 {
            return refuse(format!("a block of {} threads: at most 1024", volume(block)));
        }
        if grid.contains(&0) || grid[1] > 65535 || grid[2] > 65535 || grid[0] > i32::MAX as u32 {
            return refuse(format!("a grid of {grid:?} blocks"));
        }
        if grid.iter().try_fold(1u32, |all, &n| all.checked_mul(n)).is_none() {
            return refuse(format!("a grid of {grid:?} blocks: more than 2^32 are not modelled"));
        }
        if code.required_block.is_some_and(|required| required != block) {
            return refuse(format!(
                "a block of {block:?}: the kernel requires {:?}",
                code.required_block.unwrap_or_default()
            ));
        }
        if code.max_block.is_some_and(|max| volume(block) > volume(max)) {
            return refuse(format!("{} threads: above the kernel's launch bounds", volume(block)));
        }
        let total = layout.static_bytes + u64::from(shared);
        if total > MAX_SHARED {
            return refuse(format!("{total} bytes of shared memory: at most {MAX_SHARED}"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_schedule_visits_each_block_once() {
        for schedule in [Schedule::Greedy, Schedule::Reverse, Schedule::Priorities(7)] {
            for total in [1, 2, 6, 15, 64] {
                let mut seen: Vec<_> = (0..total).map(|at| schedule.block(at, total)).collect();
                seen.sort_unstable();
                assert_eq!(seen, (0..total).collect::<Vec<_>>(), "{schedule:?}");
            }
        }
    }
}
