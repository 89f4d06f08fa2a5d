//! Where each buffer of a program lies in one block of memory, so that buffers whose lives do not
//! overlap share it.

use super::program::{Buffer, BufferInfo, Element, Program, Use};

/// The offsets of a program's buffers and the memory they need in all.
///
/// Floating-point buffers and index buffers lie in two blocks of their own. Offsets and lengths
/// count elements; a block of mixed precision is planned at its widest element.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The offset of each buffer, by its place in the program.
    pub offsets: Vec<usize>,
    /// The length of the block of floating-point buffers.
    pub floats: usize,
    /// The length of the block of index buffers.
    pub indices: usize,
}

/// Buffers start at multiples of this many elements.
const ALIGN: usize = 64;

/// The same in bytes, in one block: what a card's memory holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BytePlan {
    /// The offset of each buffer, by its place in the program.
    pub offsets: Vec<usize>,
    /// The length of the block.
    pub bytes: usize,
}

/// Buffers start at multiples of this many bytes, as a card's allocations do.
const ALIGN_BYTES: usize = 256;

impl Program {
    /// Lays out the buffers in elements.
    pub fn plan(&self) -> Plan {
        let block = |info: &BufferInfo| usize::from(info.element == Element::Index);
        let len = |info: &BufferInfo| info.len.next_multiple_of(ALIGN);
        let (offsets, [floats, indices]) = self.arrange(block, len);
        Plan { offsets, floats, indices }
    }

    /// Lays out the buffers in bytes, for activations of `activation` bytes.
    pub fn byte_plan(&self, activation: usize) -> BytePlan {
        let len = |info: &BufferInfo| {
            (info.len * info.element.size(activation)).next_multiple_of(ALIGN_BYTES)
        };
        let (offsets, [bytes]) = self.arrange(|_| 0, len);
        BytePlan { offsets, bytes }
    }

    /// The longest first, each at the lowest offset of its block that is free during its life
    /// (greedy by size; Pisarchyk & Lee 2020). Returns the offsets and the lengths of the blocks.
    fn arrange<const BLOCKS: usize>(
        &self,
        block: impl Fn(&BufferInfo) -> usize,
        len: impl Fn(&BufferInfo) -> usize,
    ) -> (Vec<usize>, [usize; BLOCKS]) {
        let lives = self.lives();
        let blocks: Vec<usize> = self.buffers.iter().map(block).collect();
        let lens: Vec<usize> = self.buffers.iter().map(len).collect();
        let mut order: Vec<usize> = (0..self.buffers.len()).collect();
        // The sort is stable: equal lengths keep the order of the program.
        order.sort_by_key(|&buffer| std::cmp::Reverse(lens[buffer]));

        let mut offsets = vec![usize::MAX; self.buffers.len()];
        let mut totals = [0; BLOCKS];
        for (placed, &buffer) in order.iter().enumerate() {
            let mut taken: Vec<(usize, usize)> = order[..placed]
                .iter()
                .filter(|&&other| blocks[other] == blocks[buffer])
                .filter(|&&other| {
                    lives[other].0 <= lives[buffer].1 && lives[buffer].0 <= lives[other].1
                })
                .map(|&other| (offsets[other], lens[other]))
                .collect();
            taken.sort_unstable();
            let mut offset = 0;
            for (start, length) in taken {
                if offset + lens[buffer] <= start {
                    break;
                }
                offset = offset.max(start + length);
            }
            offsets[buffer] = offset;
            let total = &mut totals[blocks[buffer]];
            *total = (*total).max(offset + lens[buffer]);
        }
        (offsets, totals)
    }

    /// The first and last operation during which each buffer's content matters. An input matters
    /// from the start, an output to the end.
    fn lives(&self) -> Vec<(usize, usize)> {
        let end = self.ops.len();
        let mut lives: Vec<(usize, usize)> = vec![(end, 0); self.buffers.len()];
        for (at, op) in self.ops.iter().enumerate() {
            for Buffer(buffer) in op.reads().into_iter().chain(op.writes()) {
                lives[buffer] = (lives[buffer].0.min(at), lives[buffer].1.max(at));
            }
        }
        for (life, info) in lives.iter_mut().zip(&self.buffers) {
            match info.usage {
                Use::Input => life.0 = 0,
                Use::Output => life.1 = end,
                Use::Temporary => {}
            }
        }
        lives
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::llama::ops::{SwiGlu, ZeroGradients};

    /// A chain a -> b -> c -> d: b and d never live at once with the buffer two before them.
    #[test]
    fn buffers_share_memory_only_when_their_lives_do_not_overlap() {
        let mut p = Program::default();
        let names = ["a", "b", "c", "d"];
        let chain: Vec<Buffer> = names
            .iter()
            .map(|&name| {
                let usage = if name == "a" { Use::Input } else { Use::Temporary };
                p.buffer(name, Element::Activation, 100, usage)
            })
            .collect();
        for pair in chain.windows(2) {
            p.ops.push(Op::SwiGlu(SwiGlu { gate_up: pair[0], inter: 1, out: pair[1] }));
        }
        p.ops.push(Op::ZeroGradients(ZeroGradients));
        let plan = p.plan();
        assert_eq!(plan.floats, 2 * 128);
        for pair in plan.offsets.windows(2) {
            assert_ne!(pair[0], pair[1], "neighbours live at once");
        }
    }

    use crate::llama::Op;
}
