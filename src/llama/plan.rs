//! The memory plan: offsets of a program's buffers in one block, shared by buffers whose live ranges do
//! not overlap.

use std::collections::{BTreeMap, BTreeSet};

use super::branches::Branches;
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

/// First and last op that a buffer is live in.
pub type LiveRange = (usize, usize);

/// Most buffers that are placed by size: some 200 layers.
const MAX_GREEDY_BUFFERS: usize = 8192;

impl Program {
    /// Plans memory in elements.
    pub fn plan(&self) -> Plan {
        let block = |info: &BufferInfo| usize::from(info.kind == BufferKind::Index);
        let len = |info: &BufferInfo| info.len.next_multiple_of(ALIGN_ELEMENTS);
        let (offsets, [floats, indices]) = self.assign_offsets(&self.live_ranges(), block, len);
        Plan { offsets, floats, indices }
    }

    /// Plans memory in bytes, for activations of `activation` bytes per element. Ops may run beside the path
    /// as [`Program::branches`] says.
    pub fn byte_plan(&self, activation: usize) -> BytePlan {
        self.byte_plan_for(&self.branches(), activation)
    }

    pub(super) fn byte_plan_for(&self, branches: &Branches, activation: usize) -> BytePlan {
        let len = |info: &BufferInfo| {
            (info.len * info.kind.size(activation)).next_multiple_of(ALIGN_BYTES)
        };
        let live = self.branched_live_ranges(branches);
        let (offsets, [bytes]) = self.assign_offsets(&live, |_| 0, len);
        BytePlan { offsets, bytes }
    }

    /// Offsets and block lengths.
    fn assign_offsets<const BLOCKS: usize>(
        &self,
        live: &[LiveRange],
        block: impl Fn(&BufferInfo) -> usize,
        len: impl Fn(&BufferInfo) -> usize,
    ) -> (Vec<usize>, [usize; BLOCKS]) {
        let blocks: Vec<usize> = self.buffers.iter().map(block).collect();
        let lens: Vec<usize> = self.buffers.iter().map(len).collect();
        if self.buffers.len() <= MAX_GREEDY_BUFFERS {
            self.assign_by_size(live, &blocks, &lens)
        } else {
            self.assign_in_order(live, &blocks, &lens)
        }
    }

    /// Greedy by size (Pisarchyk & Lee 2020): the longest buffer first, each at the lowest offset of
    /// its block that is free during its live range. Takes time quadratic in the number of buffers.
    fn assign_by_size<const BLOCKS: usize>(
        &self,
        live: &[LiveRange],
        blocks: &[usize],
        lens: &[usize],
    ) -> (Vec<usize>, [usize; BLOCKS]) {
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

    /// Best fit in the order of the ops: each buffer takes the shortest free range that holds it, and gives
    /// it back after its last op. What the forward saves stacks up, and the backward takes it down.
    fn assign_in_order<const BLOCKS: usize>(
        &self,
        live: &[LiveRange],
        blocks: &[usize],
        lens: &[usize],
    ) -> (Vec<usize>, [usize; BLOCKS]) {
        let mut offsets = vec![0; self.buffers.len()];
        let mut free: [FreeRanges; BLOCKS] = std::array::from_fn(|_| FreeRanges::default());
        let [mut starts, mut ends] = [(); 2].map(|()| (0..self.buffers.len()).collect::<Vec<_>>());
        // Longer ones first; the sort is stable.
        starts.sort_by_key(|&buffer| (live[buffer].0, std::cmp::Reverse(lens[buffer])));
        ends.sort_by_key(|&buffer| live[buffer].1);
        let mut ended = ends.into_iter().peekable();
        for buffer in starts {
            // A range that ends with an op is not free during it.
            while let Some(done) = ended.next_if(|&other| live[other].1 < live[buffer].0) {
                free[blocks[done]].release(offsets[done], lens[done]);
            }
            offsets[buffer] = free[blocks[buffer]].take(lens[buffer]);
        }
        (offsets, free.map(|free| free.end))
    }

    /// First and last op of each buffer's live range. An input is live from the start, an output to
    /// the end.
    pub fn live_ranges(&self) -> Vec<LiveRange> {
        let end = self.ops.len();
        let mut ranges: Vec<LiveRange> = vec![(end, 0); self.buffers.len()];
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

    /// Live ranges if ops run beside the path: what such an op reads lives until the path waits for it.
    fn branched_live_ranges(&self, branches: &Branches) -> Vec<LiveRange> {
        let mut ranges = self.live_ranges();
        for (at, op) in self.ops.iter().enumerate() {
            let Some(before) = branches.completed_before(at) else { continue };
            for Buffer(buffer) in op.reads() {
                ranges[buffer].1 = ranges[buffer].1.max(before - 1);
            }
        }
        ranges
    }
}

/// Free ranges of a block that grows at its end.
#[derive(Default)]
struct FreeRanges {
    /// Length by offset, and the same by length.
    by_offset: BTreeMap<usize, usize>,
    by_length: BTreeSet<(usize, usize)>,
    end: usize,
}

impl FreeRanges {
    /// The offset of a range of this length.
    fn take(&mut self, length: usize) -> usize {
        if let Some(&(found, offset)) = self.by_length.range((length, 0)..).next() {
            self.remove(offset, found);
            self.insert(offset + length, found - length);
            return offset;
        }
        // The last free range grows into the new one.
        let last = self.by_offset.last_key_value().map(|(&offset, &found)| (offset, found));
        let offset = match last {
            Some((offset, found)) if offset + found == self.end => {
                self.remove(offset, found);
                offset
            }
            _ => self.end,
        };
        self.end = offset + length;
        offset
    }

    fn release(&mut self, mut offset: usize, mut length: usize) {
        if let Some((&before, &found)) = self.by_offset.range(..offset).next_back()
            && before + found == offset
        {
            self.remove(before, found);
            (offset, length) = (before, found + length);
        }
        if let Some(&found) = self.by_offset.get(&(offset + length)) {
            self.remove(offset + length, found);
            length += found;
        }
        self.insert(offset, length);
    }

    fn insert(&mut self, offset: usize, length: usize) {
        if length > 0 {
            self.by_offset.insert(offset, length);
            self.by_length.insert((length, offset));
        }
    }

    fn remove(&mut self, offset: usize, length: usize) {
        self.by_offset.remove(&offset);
        self.by_length.remove(&(length, offset));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::llama::Recompute;
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

    #[test]
    fn planning_in_order_keeps_live_buffers_apart_in_as_much_memory() {
        let config = crate::model::preset("original").unwrap();
        let layout = crate::model::Layout::new(&config);
        let program =
            crate::llama::step::training(&config, &layout, 2, 64, Recompute::None).program;
        let lens: Vec<usize> = program.buffers.iter().map(|info| info.len).collect();
        let blocks = vec![0; lens.len()];
        let live = program.live_ranges();
        let (_, [greedy]) = program.assign_by_size(&live, &blocks, &lens);
        let (offsets, [total]) = program.assign_in_order(&live, &blocks, &lens);
        assert!(total <= greedy + greedy / 20, "{total} and {greedy}");
        for a in 0..lens.len() {
            assert!(offsets[a] + lens[a] <= total);
            for b in 0..a {
                let apart =
                    offsets[a] + lens[a] <= offsets[b] || offsets[b] + lens[b] <= offsets[a];
                let together = live[a].0 <= live[b].1 && live[b].0 <= live[a].1;
                assert!(
                    apart || !together,
                    "{} and {}",
                    program.buffers[a].name,
                    program.buffers[b].name
                );
            }
        }
    }
}
