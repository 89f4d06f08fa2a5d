//! The memory plan: offsets of a program's buffers in one block, shared by buffers whose live ranges do
//! not overlap.

use super::buffer::{Buffer, BufferInfo, BufferKind, BufferRole};
use super::program::Program;

/// The memory plan of a host backend: floating-point buffers and index buffers in a block each.
/// Offsets and lengths count elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Offset of each buffer, in the order of the program.
    pub offsets: Vec<usize>,
    /// Length of the block of floating-point buffers.
    pub floats: usize,
    /// Length of the block of index buffers.
    pub indices: usize,
}

/// Alignment of buffers in a [`Plan`], in elements.
const ALIGN_ELEMENTS: usize = 64;

/// The memory plan of a device: all buffers in one block, offsets in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BytePlan {
    /// Offset of each buffer, in the order of the program.
    pub offsets: Vec<usize>,
    /// Length of the block.
    pub bytes: usize,
}

/// Alignment of buffers in a [`BytePlan`], in bytes.
const ALIGN_BYTES: usize = 256;

impl Program {
    /// Plans memory in elements.
    pub fn plan(&self) -> Plan {
        let block = |info: &BufferInfo| usize::from(info.kind == BufferKind::Index);
        let len = |info: &BufferInfo| info.len.next_multiple_of(ALIGN_ELEMENTS);
        let (offsets, [floats, indices]) = self.assign_offsets(block, len);
        Plan { offsets, floats, indices }
    }

    /// Plans memory in bytes, for activations of `activation` bytes per element.
    pub fn byte_plan(&self, activation: usize) -> BytePlan {
        let len = |info: &BufferInfo| {
            (info.len * info.kind.size(activation)).next_multiple_of(ALIGN_BYTES)
        };
        let (offsets, [bytes]) = self.assign_offsets(|_| 0, len);
        BytePlan { offsets, bytes }
    }

    /// Greedy by size (Pisarchyk & Lee 2020): the longest buffer first, each at the lowest offset of
    /// its block that is free during its live range. Returns offsets and block lengths.
    fn assign_offsets<const BLOCKS: usize>(
        &self,
        block: impl Fn(&BufferInfo) -> usize,
        len: impl Fn(&BufferInfo) -> usize,
    ) -> (Vec<usize>, [usize; BLOCKS]) {
        let live = self.live_ranges();
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
                    live[other].0 <= live[buffer].1 && live[buffer].0 <= live[other].1
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

    /// First and last op of each buffer's live range. An input is live from the start, an output to
    /// the end.
    pub fn live_ranges(&self) -> Vec<(usize, usize)> {
        let end = self.ops.len();
        let mut ranges: Vec<(usize, usize)> = vec![(end, 0); self.buffers.len()];
        for (at, op) in self.ops.iter().enumerate() {
            for Buffer(buffer) in op.reads().into_iter().chain(op.writes()) {
                ranges[buffer] = (ranges[buffer].0.min(at), ranges[buffer].1.max(at));
            }
        }
        for (range, info) in ranges.iter_mut().zip(&self.buffers) {
            match info.role {
                BufferRole::Input => range.0 = 0,
                BufferRole::Output => range.1 = end,
                BufferRole::Temporary => {}
            }
        }
        ranges
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::llama::ops::{SwiGlu, ZeroGrad};

    /// In the chain a -> b -> c -> d, no buffer is live at once with the one two before it.
    #[test]
    fn buffers_share_memory_only_if_their_live_ranges_are_disjoint() {
        let mut p = Program::default();
        let names = ["a", "b", "c", "d"];
        let chain: Vec<Buffer> = names
            .iter()
            .map(|&name| {
                let role = if name == "a" { BufferRole::Input } else { BufferRole::Temporary };
                p.buffer(name, BufferKind::Activation, 100, role)
            })
            .collect();
        for pair in chain.windows(2) {
            p.ops.push(Op::SwiGlu(SwiGlu { gate_up: pair[0], inter: 1, out: pair[1] }));
        }
        p.ops.push(Op::ZeroGrad(ZeroGrad));
        let plan = p.plan();
        assert_eq!(plan.floats, 2 * 128);
        for pair in plan.offsets.windows(2) {
            assert_ne!(pair[0], pair[1], "neighbors are live at once");
        }
    }

    use crate::llama::Op;
}
