//! Decoded modules: code with resolved registers, variables, and where each instruction came from.

use std::collections::HashMap;

use crate::op::{Instr, Op, ParamSlot, Space};
use crate::parse::Location;
use crate::registers::{File, WARP};

/// Bytes left free after each shared variable, so that running over its end is found.
const SHARED_GAP: u64 = 16;

/// What a constant register holds, once a block and a thread are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Source {
    Const(u64),
    Special(Special),
    /// A variable of the module, by index, and a constant.
    Variable(u32, i64),
    /// An offset in the frame's part of local memory.
    Local(i64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Special {
    Thread(u8),
    BlockSize(u8),
    Block(u8),
    GridSize(u8),
    Lane,
    Warp,
    Warps,
    LaneMask(MaskOf),
    DynamicShared,
    TotalShared,
    /// `%smid`, `%gridid` and the like: one SM, one grid.
    Zero,
    One,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum MaskOf {
    Equal,
    Less,
    LessEqual,
    Greater,
    GreaterEqual,
}

pub(crate) struct GlobalVariable {
    pub name: String,
    pub shared: bool,
    /// None for the dynamic part of shared memory.
    pub size: Option<u64>,
    pub align: u64,
    pub init: Vec<u8>,
}

/// A kernel parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Param {
    /// Name in the PTX.
    pub name: String,
    /// PTX type, `u64` say, or `b8` for a struct.
    pub ty: String,
    /// Bytes.
    pub size: usize,
    /// Alignment in bytes.
    pub align: usize,
    /// Offset in the parameter block.
    pub offset: usize,
}

/// Where an instruction came from.
#[derive(Clone, Copy)]
pub(crate) struct Origin {
    pub line: u32,
    pub opcode: u32,
    /// Index into `Code::locations`.
    pub location: u32,
}

pub(crate) struct Code {
    pub name: String,
    pub entry: bool,
    pub instrs: Vec<Instr>,
    pub origins: Vec<Origin>,
    /// Innermost place and the place it was inlined into.
    pub locations: Vec<(Location, Option<Location>)>,
    pub slots: [u32; 3],
    /// Registers that hold constants, by file and slot.
    pub constants: Vec<(File, u32, Source)>,
    pub params: Vec<Param>,
    pub formals: Vec<ParamSlot>,
    pub results: Vec<ParamSlot>,
    /// Bytes of the parameter area: the kernel's block, or a frame's.
    pub param_bytes: u32,
    pub local_bytes: u32,
    pub required_block: Option<[u32; 3]>,
    pub max_block: Option<[u32; 3]>,
    /// Registers the text declares (the virtual ones of PTX).
    pub registers: u32,
    pub calls: Vec<u32>,
}

impl Code {
    /// Bytes the simulator keeps for one activation by a warp.
    pub fn frame_bytes(&self) -> u64 {
        let [predicates, r32, r64] = self.slots.map(u64::from);
        let words = u64::from(self.param_bytes.div_ceil(4) + self.local_bytes.div_ceil(4));
        4 * predicates + WARP as u64 * (4 * (r32 + words) + 8 * r64)
    }
}

/// A kernel's static shared memory.
#[derive(Default)]
pub(crate) struct SharedLayout {
    /// Variable index, offset and size.
    pub variables: Vec<(u32, u64, u64)>,
    pub dynamic_at: u64,
    /// What a GPU counts: without the gaps.
    pub static_bytes: u64,
}

pub(crate) struct Decoded {
    pub functions: Vec<Code>,
    pub variables: Vec<GlobalVariable>,
    pub files: HashMap<u32, String>,
    pub opcodes: Vec<String>,
    pub target: String,
}

impl Decoded {
    /// Lays out the shared variables of an entry and of all it calls.
    pub fn shared_layout(&self, entry: usize) -> SharedLayout {
        let mut seen = vec![false; self.functions.len()];
        let mut used = vec![false; self.variables.len()];
        let mut stack = vec![entry];
        while let Some(function) = stack.pop() {
            if std::mem::replace(&mut seen[function], true) {
                continue;
            }
            let code = &self.functions[function];
            stack.extend(code.calls.iter().map(|&callee| callee as usize));
            for (_, _, source) in &code.constants {
                if let Source::Variable(index, _) = source {
                    used[*index as usize] |= self.variables[*index as usize].shared;
                }
            }
        }
        let mut layout = SharedLayout::default();
        let mut at = 0;
        let mut dynamic_align = 128;
        for (index, variable) in self.variables.iter().enumerate().filter(|&(i, _)| used[i]) {
            let Some(size) = variable.size else {
                dynamic_align = dynamic_align.max(variable.align);
                continue;
            };
            at = u64::next_multiple_of(at, variable.align);
            layout.variables.push((index as u32, at, size));
            at += size + SHARED_GAP;
            layout.static_bytes =
                layout.static_bytes.next_multiple_of(variable.align).saturating_add(size);
        }
        layout.dynamic_at = at.next_multiple_of(dynamic_align);
        layout
    }

    /// Whether an entry, or anything it calls, has strong accesses to memory that blocks share.
    pub fn has_global_strong_accesses(&self, entry: usize) -> bool {
        let mut seen = vec![false; self.functions.len()];
        let mut stack = vec![entry];
        while let Some(function) = stack.pop() {
            if std::mem::replace(&mut seen[function], true) {
                continue;
            }
            let code = &self.functions[function];
            stack.extend(code.calls.iter().map(|&callee| callee as usize));
            let global = |space| matches!(space, Space::Global | Space::Generic);
            let strong = |instr: &Instr| match &instr.op {
                Op::Atomic(atomic) => global(atomic.space),
                Op::Load(transfer) | Op::Store(transfer) => {
                    transfer.strong.is_some() && global(transfer.space)
                }
                _ => false,
            };
            if code.instrs.iter().any(strong) {
                return true;
            }
        }
        false
    }
}
