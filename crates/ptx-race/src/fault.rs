//! Faults: what stopped a kernel, and where.

use std::fmt;

/// The kind of a [`Fault`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FaultKind {
    /// An access outside every live buffer or variable.
    OutOfBounds,
    /// An access to a buffer that was freed.
    UseAfterFree,
    /// A read of memory nothing has written.
    Uninitialized,
    /// A read of the destination of an asynchronous copy that nothing has waited for.
    AsyncInFlight,
    /// An address that is not a multiple of the access size.
    Misaligned,
    /// Two accesses that nothing orders, at least one of them a write.
    Race,
    /// Every thread that is left waits for another.
    Deadlock,
    /// A warp-wide instruction executed without all the lanes it names.
    MissingLanes,
    /// Arguments that do not fit the kernel's parameters.
    Arguments,
    /// A launch no GPU would accept.
    Launch,
    /// `trap`, or a failed device-side `assert`.
    Trap,
    /// More instructions than the launch allowed: most likely an endless loop.
    Budget,
    /// More than the simulator keeps track of: copies in flight, accesses to watch for races.
    Capacity,
    /// Calls nested too deeply.
    StackOverflow,
    /// An operand outside what the instruction defines.
    InvalidOperand,
}

impl fmt::Display for FaultKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            FaultKind::OutOfBounds => "out of bounds",
            FaultKind::UseAfterFree => "use after free",
            FaultKind::Uninitialized => "read of never-written memory",
            FaultKind::AsyncInFlight => "read of an asynchronous copy still in flight",
            FaultKind::Misaligned => "misaligned access",
            FaultKind::Race => "data race",
            FaultKind::Deadlock => "deadlock",
            FaultKind::MissingLanes => "missing lanes",
            FaultKind::Arguments => "wrong arguments",
            FaultKind::Launch => "impossible launch",
            FaultKind::Trap => "trap",
            FaultKind::Budget => "instruction budget exceeded",
            FaultKind::Capacity => "simulator capacity exceeded",
            FaultKind::StackOverflow => "stack overflow",
            FaultKind::InvalidOperand => "invalid operand",
        })
    }
}

/// A place in the CUDA source, from `-lineinfo`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceLine {
    /// The file as the compiler was given it.
    pub file: String,
    /// 1-based line.
    pub line: u32,
    /// Where the code was inlined into the kernel, if it was.
    pub inlined_into: Option<(String, u32)>,
}

impl fmt::Display for SourceLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file, self.line)?;
        if let Some((file, line)) = &self.inlined_into {
            write!(f, ", inlined at {file}:{line}")?;
        }
        Ok(())
    }
}

/// Which thread did what, where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Site {
    /// Block index.
    pub block: [u32; 3],
    /// Thread index in its block.
    pub thread: [u32; 3],
    /// 1-based line of the PTX text.
    pub ptx_line: u32,
    /// The opcode there.
    pub opcode: String,
    /// The CUDA source line, if the PTX names it.
    pub source: Option<SourceLine>,
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [bx, by, bz] = self.block;
        let [tx, ty, tz] = self.thread;
        write!(f, "block ({bx}, {by}, {bz}) thread ({tx}, {ty}, {tz}): `{}`", self.opcode)?;
        write!(f, ", PTX line {}", self.ptx_line)?;
        if let Some(source) = &self.source {
            write!(f, "\n       {source}")?;
        }
        Ok(())
    }
}

/// Why a launch ended early.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What went wrong.
    pub kind: FaultKind,
    /// What went wrong, in a sentence.
    pub message: String,
    /// Name of the kernel.
    pub kernel: String,
    /// Where; absent when the launch itself was refused.
    pub site: Option<Site>,
    /// The other access of a race.
    pub other: Option<Site>,
    /// In a deadlock, who waits where.
    pub waiting: Vec<String>,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} in kernel `{}`: {}", self.kind, self.kernel, self.message)?;
        if let Some(site) = &self.site {
            write!(f, "\n  at   {site}")?;
        }
        if let Some(other) = &self.other {
            write!(f, "\n  with {other}")?;
        }
        for line in &self.waiting {
            write!(f, "\n  {line}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Fault {}

/// A fault as the instruction that finds it knows it; kernel, block and lines are added later.
#[derive(Debug)]
pub(crate) struct Stop {
    pub kind: FaultKind,
    pub message: String,
    pub lane: usize,
    /// The instruction at fault, if it is not the one being executed.
    pub at: Option<Place>,
    pub other: Option<Access>,
}

/// An instruction of a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    pub function: u32,
    pub pc: u32,
}

/// An access some thread made earlier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Access {
    pub place: Place,
    /// Linear index of the block in the grid, and of the thread in its block.
    pub block: u32,
    pub thread: u32,
}

pub(crate) type Exec<T> = Result<T, Box<Stop>>;

pub(crate) fn stop<T>(kind: FaultKind, lane: usize, message: impl Into<String>) -> Exec<T> {
    Err(Box::new(Stop { kind, message: message.into(), lane, at: None, other: None }))
}
