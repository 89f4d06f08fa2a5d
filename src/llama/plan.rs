//! Where each buffer of a program lies in one block of memory, so that buffers whose lives do not
//! overlap share it.

use super::program::{Buffer, Element, Program, Use};

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

impl Program {
    /// Lays out the buffers: the longest first, each at the lowest offset that is free during its
    /// life (greedy by size; Pisarchyk & Lee 2020).
    pub fn plan(&self) -> Plan {
        let lives = self.lives();
        let mut order: Vec<usize> = (0..self.buffers.len()).collect();
        // The sort is stable: equal lengths keep the order of the program.
        order.sort_by_key(|&buffer| std::cmp::Reverse(self.buffers[buffer].len));

        let mut offsets = vec![usize::MAX; self.buffers.len()];
        let mut totals = [0, 0];
        let block = |buffer: usize| usize::from(self.buffers[buffer].element == Element::Index);
        for (placed, &buffer) in order.iter().enumerate() {
            let len = self.buffers[buffer].len.next_multiple_of(ALIGN);
            let mut taken: Vec<(usize, usize)> = order[..placed]
                .iter()
                .filter(|&&other| block(other) == block(buffer))
                .filter(|&&other| {
                    lives[other].0 <= lives[buffer].1 && lives[buffer].0 <= lives[other].1
                })
                .map(|&other| (offsets[other], self.buffers[other].len.next_multiple_of(ALIGN)))
                .collect();
            taken.sort_unstable();
            let mut offset = 0;
            for (start, length) in taken {
                if offset + len <= start {
                    break;
                }
                offset = offset.max(start + length);
            }
            offsets[buffer] = offset;
            totals[block(buffer)] = totals[block(buffer)].max(offset + len);
        }
        Plan { offsets, floats: totals[0], indices: totals[1] }
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
