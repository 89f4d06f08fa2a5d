//! A program: operations in order, over named buffers.

use super::ops::{Cost, Op};

/// A buffer of one program, by its place in [`Program::buffers`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Buffer(pub(crate) usize);

/// What a buffer's elements are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    /// A value of the network, kept in the precision of training (bf16 where that is mixed).
    Activation,
    /// A statistic (a log-sum-exp, a loss), kept in f32.
    Float,
    /// A token, a column, a position: u32.
    Index,
}

impl Element {
    /// Bytes an element at an activation's width.
    pub fn size(self, activation: usize) -> usize {
        match self {
            Element::Activation => activation,
            Element::Float | Element::Index => 4,
        }
    }
}

/// When a buffer's content matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Written by the caller before the program runs.
    Input,
    /// Alive from its first write to its last read.
    Temporary,
    /// Read by the caller after the program ran.
    Output,
}

#[derive(Clone, Debug)]
pub struct BufferInfo {
    pub name: String,
    pub element: Element,
    pub len: usize,
    pub usage: Use,
}

/// Operations in order, over named buffers.
#[derive(Clone, Debug, Default)]
pub struct Program {
    pub buffers: Vec<BufferInfo>,
    pub ops: Vec<Op>,
}

impl Program {
    /// Declares a buffer.
    pub fn buffer(
        &mut self,
        name: impl Into<String>,
        element: Element,
        len: usize,
        usage: Use,
    ) -> Buffer {
        self.buffers.push(BufferInfo { name: name.into(), element, len, usage });
        Buffer(self.buffers.len() - 1)
    }

    pub fn info(&self, buffer: Buffer) -> &BufferInfo {
        &self.buffers[buffer.0]
    }

    /// The costs of its operations, in order, for an arena of `arena` gradients.
    pub fn costs(&self, arena: usize) -> impl Iterator<Item = (&'static str, Cost)> {
        self.ops.iter().map(move |op| (op.name(), op.cost(|buffer| self.info(buffer).len, arena)))
    }
}
