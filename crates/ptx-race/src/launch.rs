//! Modules, kernels and launches.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use crate::code::{Code, Decoded, GlobalVariable, Param, SharedLayout};
use crate::config::{Arg, Check, Config, Options, Stats};
use crate::decode;
use crate::fault::{Fault, FaultKind};
use crate::mem::Memory;
use crate::parse::ParseError;
use crate::sched;
use crate::state::Launch;

/// Most shared memory of a block on any GPU, in bytes: 227 KiB, on compute capability 9.0.
const MAX_SHARED: u64 = 227 << 10;

struct Inner {
    id: u64,
    decoded: Decoded,
    /// By function, computed when an entry is first asked for it.
    entries: Vec<OnceLock<EntryNeeds>>,
}

/// What an entry and all it calls need.
struct EntryNeeds {
    layout: SharedLayout,
    /// It has strong accesses to memory that blocks share.
    serial: bool,
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
        let entries = decoded.functions.iter().map(|_| OnceLock::new()).collect();
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        Ok(Module { inner: Arc::new(Inner { id, decoded, entries }) })
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
    fn entry(&self, index: usize) -> &EntryNeeds {
        self.entries[index].get_or_init(|| EntryNeeds {
            layout: self.decoded.shared_layout(index),
            serial: self.decoded.has_global_strong_accesses(index),
        })
    }

    fn variables(&self, memory: &Memory) -> Arc<[u64]> {
        memory.variables(self.id, |memory| {
            let place = |variable: &GlobalVariable| {
                if variable.shared {
                    return 0;
                }
                // What is not initialized is zero, as the CUDA language has it.
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
impl Kernel {
    fn code(&self) -> &Code {
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

    /// Registers the PTX declares: virtual ones, many more than a GPU uses.
    pub fn registers(&self) -> u32 {
        self.code().registers
    }

    /// Threads per block that its launch bounds allow; `None` without launch bounds.
    pub fn max_threads(&self) -> Option<u32> {
        let code = self.code();
        let shape = code.required_block.or(code.max_block)?;
        Some(shape.iter().fold(1, |all, &n| u32::saturating_mul(all, n)))
    }

    /// Bytes of static shared memory.
    pub fn static_shared(&self) -> usize {
        self.module.entry(self.index).layout.static_bytes as usize
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
    /// another never get on. Kernels with atomic, volatile or other strong accesses to global
    /// memory run on one thread, in the order of the schedule: their result may depend on that
    /// order, but not on `threads`.
    pub fn launch(
        &self,
        memory: &Memory,
        config: &Config,
        args: &[Arg],
        options: &Options,
    ) -> Result<Stats, Box<Fault>> {
        let code = self.code();
        let EntryNeeds { layout, serial } = self.module.entry(self.index);
        self.check_shape(config, options, layout)?;
        let mut options = *options;
        if options.check == Check::Races {
            options.max_instructions = options.max_instructions.min(u32::MAX.into());
        }
        if args.len() != code.params.len() {
            let message = format!("{} given, {} wanted", args.len(), code.params.len());
            return self.refuse(FaultKind::Arguments, message);
        }
        let mut params = vec![0; code.param_bytes as usize];
        for (index, (arg, param)) in args.iter().zip(&code.params).enumerate() {
            if arg.as_bytes().len() != param.size {
                let message = format!(
                    "argument {index} has {} bytes, parameter `{}` (.{}) has {}",
                    arg.as_bytes().len(),
                    param.name,
                    param.ty,
                    param.size
                );
                return self.refuse(FaultKind::Arguments, message);
            }
            params[param.offset..param.offset + param.size].copy_from_slice(arg.as_bytes());
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
            options,
            params,
            table: &table,
            addresses,
            serial: *serial,
        };
        sched::run(&launch)
    }

    fn check_shape(
        &self,
        config: &Config,
        options: &Options,
        layout: &SharedLayout,
    ) -> Result<(), Box<Fault>> {
        let code = self.code();
        let Config { grid, block, shared } = *config;
        let volume =
            |shape: [u32; 3]| shape.iter().fold(1, |all, &n| u64::saturating_mul(all, n.into()));
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
            return refuse(format!("a grid of {grid:?} blocks: more than 2^32 are not modeled"));
        }
        // The race detector numbers the warps of a grid in 32 bits, and so their times.
        let warps = volume(grid).saturating_mul(volume(block).div_ceil(32));
        if options.check == Check::Races && warps > u64::from(u32::MAX) {
            return refuse(format!("a grid of {grid:?} blocks: too many to watch for races"));
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
