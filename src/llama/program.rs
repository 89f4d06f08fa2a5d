//! A program: a flat list of ops over named buffers.

use super::buffer::{Buffer, BufferInfo, BufferKind, BufferRole};
use super::ops::{Cost, Op};

/// A flat list of ops over named buffers.
#[derive(Clone, Debug, Default)]
pub struct Program {
    /// Buffers that the ops name.
    pub buffers: Vec<BufferInfo>,
    /// Ops in the order of their execution.
    pub ops: Vec<Op>,
}

impl Program {
    /// Declares a buffer.
    pub fn buffer(
        &mut self,
        name: impl Into<String>,
        kind: BufferKind,
        len: usize,
        role: BufferRole,
    ) -> Buffer {
        self.buffers.push(BufferInfo { name: name.into(), kind, len, role });
        Buffer(self.buffers.len() - 1)
    }

    /// Description of a buffer.
    pub fn info(&self, buffer: Buffer) -> &BufferInfo {
        &self.buffers[buffer.0]
    }

    /// Name and cost of each op, in order, for a gradient arena of `arena` elements.
    pub fn costs(&self, arena: usize) -> impl Iterator<Item = (&'static str, Cost)> {
        self.ops.iter().map(move |op| (op.name(), op.cost(|buffer| self.info(buffer).len, arena)))
    }
}
