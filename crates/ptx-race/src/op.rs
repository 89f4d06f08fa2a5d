//! Decoded instructions: operands are register slots, constants included.

use crate::convert::{Convert, Scalar};
use crate::mem::{LOCAL_WINDOW, SHARED_WINDOW, WINDOW_SIZE};
use crate::registers::{File, LaneFn, Slots};

/// No register: a destination nobody reads, or an operand left out.
pub(crate) const NONE: u32 = u32::MAX;

#[derive(Clone)]
pub(crate) struct Instr {
    pub op: Op,
    /// Predicate slot; slot 0 is always true.
    pub guard: u32,
    pub negated: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Space {
    Generic,
    Global,
    Shared,
    Local,
    /// Parameters of a kernel: the same bytes for all.
    KernelParam,
    /// Parameters of a device function, and of the calls it makes.
    FrameParam,
}

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

/// A base register and a constant.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Address {
    pub base: u32,
    pub wide: bool,
    pub offset: i64,
}

/// Threads that a strong operation includes. `.cluster` is `.cta`, as there are no clusters, and
/// `.sys` is `.gpu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Scope {
    Cta,
    Gpu,
}

/// Scope and memory order of a strong operation or a fence.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Strong {
    pub scope: Scope,
    pub acquire: bool,
    pub release: bool,
}

/// A load or store of `count` elements.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Transfer {
    pub space: Space,
    pub address: Address,
    /// Bytes of an element.
    pub size: u8,
    pub count: u8,
    pub signed: bool,
    /// The registers are 64 bits wide.
    pub wide: bool,
    /// None if weak.
    pub strong: Option<Strong>,
    pub registers: [u32; 4],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AtomicOp {
    Add,
    Exchange,
    CompareSwap,
    Min,
    Max,
    Inc,
    Dec,
    And,
    Or,
    Xor,
}

/// The type an atomic works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AtomicType {
    Scalar(Scalar),
    F16x2,
    Bf16x2,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Atomic {
    pub space: Space,
    pub op: AtomicOp,
    pub ty: AtomicType,
    pub address: Address,
    /// NONE for `red`.
    pub d: u32,
    pub b: u32,
    pub c: u32,
    pub size: u8,
    pub order: Strong,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ShuffleMode {
    Up,
    Down,
    Butterfly,
    Index,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum VoteMode {
    All,
    Any,
    Uniform,
    Ballot,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReduxOp {
    Add,
    Min(bool),
    Max(bool),
    And,
    Or,
    Xor,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BarrierMode {
    Sync,
    Arrive,
    /// `bar.red`, by what is done with the predicate.
    Popc,
    And,
    Or,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BoolOp {
    And,
    Or,
    Xor,
}

/// Element type of an mma's factors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MmaType {
    F16,
    Bf16,
    Tf32,
}

#[derive(Clone, Debug)]
pub(crate) struct Mma {
    pub ty: MmaType,
    pub k: usize,
    /// Accumulators are packed f16 pairs.
    pub half_c: bool,
    pub half_d: bool,
    pub d: [u32; 4],
    pub a: [u32; 4],
    pub b: [u32; 2],
    pub c: [u32; 4],
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct CopyAsync {
    pub to: Address,
    pub from: Address,
    pub size: u8,
    /// Bytes to copy, the rest zeros; NONE copies all.
    pub source_size: u32,
    /// Predicate that leaves all zeros; NONE if absent.
    pub ignore: u32,
}

/// A formal or actual parameter: where it lies in its frame, and its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ParamSlot {
    pub offset: u32,
    pub size: u32,
}

#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub callee: Callee,
    pub arguments: Vec<ParamSlot>,
    pub results: Vec<ParamSlot>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Callee {
    Function(u32),
    /// `vprintf`: does nothing.
    Print,
    /// `__assertfail`.
    AssertFail,
}

#[derive(Clone)]
pub(crate) enum Op {
    /// From registers to a register.
    Alu(LaneFn, Slots),
    Convert(Box<Convert>, Slots, [File; 2]),
    /// `setp` in full: a comparison, combined with a predicate, into two.
    SetP {
        run: LaneFn,
        slots: Slots,
        q: u32,
        combine: BoolOp,
        c: u32,
    },
    Pack {
        d: u32,
        wide: bool,
        parts: [u32; 4],
        count: u8,
    },
    Unpack {
        a: u32,
        wide: bool,
        parts: [u32; 4],
        count: u8,
    },
    InWindow {
        d: u32,
        a: u32,
        space: Space,
    },
    /// The instruction count so far, into a 32- or 64-bit register.
    Clock {
        d: u32,
        wide: bool,
    },
    Branch {
        target: u32,
        join: u32,
    },
    BranchIndex {
        index: u32,
        targets: Box<[u32]>,
        join: u32,
    },
    Call(Box<Call>),
    Return,
    Exit,
    Trap,
    Nop,
    Load(Transfer),
    Store(Transfer),
    Atomic(Box<Atomic>),
    Shuffle {
        mode: ShuffleMode,
        d: u32,
        p: u32,
        a: u32,
        b: u32,
        c: u32,
        mask: u32,
    },
    Vote {
        mode: VoteMode,
        d: u32,
        p: u32,
        mask: u32,
    },
    /// `match.any` or `match.all`.
    Match {
        all: bool,
        wide: bool,
        d: u32,
        p: u32,
        a: u32,
        mask: u32,
    },
    Redux {
        op: ReduxOp,
        d: u32,
        a: u32,
        mask: u32,
    },
    ActiveMask {
        d: u32,
    },
    Barrier {
        mode: BarrierMode,
        id: u32,
        count: u32,
        d: u32,
        p: u32,
    },
    SyncWarp {
        mask: u32,
    },
    Fence(Strong),
    LoadMatrix {
        address: Address,
        generic: bool,
        transpose: bool,
        count: u8,
        d: [u32; 4],
    },
    MoveMatrix {
        d: u32,
        a: u32,
    },
    Mma(Box<Mma>),
    CopyAsync(Box<CopyAsync>),
    CommitGroup,
    /// Leaves this many groups pending.
    WaitGroup(u32),
    WaitAll,
}
