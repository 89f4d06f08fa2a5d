//! Buffers of a program: identity, kind and role.

/// Index of a buffer in [`Program::buffers`](super::Program::buffers).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Buffer(pub(crate) usize);

/// The elements of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BufferKind {
    /// Activations or their gradients, in the backend's compute dtype.
    Activation,
    /// Statistics (log-sum-exp, loss), in f32.
    Float,
    /// Token ids or positions, in u32.
    Index,
}

impl BufferKind {
    /// Bytes per element, given those of an activation.
    pub fn size(self, activation: usize) -> usize {
        match self {
            BufferKind::Activation => activation,
            BufferKind::Float | BufferKind::Index => 4,
        }
    }
}

/// The lifetime of a buffer's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BufferRole {
    /// Written by the caller before the program runs.
    Input,
    /// Live from its first write to its last read.
    Temporary,
    /// Read by the caller after the program ran.
    Output,
}

/// Description of a buffer of a program.
#[derive(Clone, Debug)]
pub struct BufferInfo {
    /// Name, for messages and profiles.
    pub name: String,
    /// Type of its elements.
    pub kind: BufferKind,
    /// Number of elements.
    pub len: usize,
    /// Who writes and reads it.
    pub role: BufferRole,
}
