//! Slices of a step: the order in which their gradients are added, and the shards of the arena that ranks
//! own.
//!
//! A step is cut into a fixed number of slices. The gradient of a slice is summed from zero, and the
//! slices are added in one [`SumOrder`], whichever process computed them: the bits of a step depend on
//! the number of slices, never on the number of processes.

use std::ops::{AddAssign, Range};
use std::sync::Arc;

use super::ops::{AddGradients, Op, SaveGradients};
use super::update::Optimizer;
use crate::model::{Layout, ParamKind};

/// Order of a sum of `blocks * width` terms: each block is a balanced binary tree over `width`
/// consecutive terms, a power of two; blocks are added in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SumOrder {
    /// Number of trees.
    pub blocks: usize,
    /// Terms per tree, a power of two.
    pub width: usize,
}

impl SumOrder {
    /// Order of so many terms, at least one: the widest trees.
    pub fn new(terms: usize) -> Self {
        let width = 1 << terms.trailing_zeros();
        Self { blocks: terms / width, width }
    }

    /// Number of all terms.
    pub fn terms(self) -> usize {
        self.blocks * self.width
    }

    /// Adds vectors of `stride` elements that lie one after another, in place: the sum is in the first.
    pub fn add<T: Copy + AddAssign>(self, terms: &mut [T], stride: usize) {
        let mut add = |into: usize, from: usize| {
            let (left, right) = terms.split_at_mut(from * stride);
            for (sum, &term) in left[into * stride..][..stride].iter_mut().zip(right.iter()) {
                *sum += term;
            }
        };
        let mut apart = 1;
        while apart < self.width {
            for into in (0..self.terms()).step_by(2 * apart) {
                add(into, into + apart);
            }
            apart *= 2;
        }
        for block in 1..self.blocks {
            add(0, block * self.width);
        }
    }
}

/// The slices of one rank, and where their sums are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlicePlan {
    slices: usize,
    ranks: usize,
}

impl SlicePlan {
    /// `slices` must be a multiple of `ranks`.
    pub fn new(slices: usize, ranks: usize) -> Self {
        assert!(ranks > 0 && slices > 0 && slices.is_multiple_of(ranks), "{slices} and {ranks}");
        Self { slices, ranks }
    }

    /// Slices per rank.
    pub fn per_rank(self) -> usize {
        self.slices / self.ranks
    }

    /// The slices of a rank.
    pub fn of_rank(self, rank: usize) -> Range<usize> {
        rank * self.per_rank()..(rank + 1) * self.per_rank()
    }

    /// Levels of the subtrees that a rank adds by itself.
    fn levels(self) -> usize {
        self.per_rank().trailing_zeros() as usize
    }

    /// Ops after slice `at` of a rank, counted from 0: adds every sum that is complete with it, and keeps
    /// what is not the last. After the last slice, the gradients hold the last subtree's sum; with one
    /// rank, that of all slices.
    pub fn after(self, at: usize) -> Vec<Op> {
        let levels = self.levels();
        let complete = (at.trailing_ones() as usize).min(levels);
        let mut ops: Vec<Op> =
            (0..complete).map(|slot| Op::AddGradients(AddGradients { slot })).collect();
        let subtree = at >> levels;
        let slot = match complete == levels {
            false => complete,
            true if self.ranks > 1 => levels + subtree,
            true => {
                if subtree > 0 {
                    ops.push(Op::AddGradients(AddGradients { slot: levels }));
                }
                levels
            }
        };
        if at + 1 < self.per_rank() {
            ops.push(Op::SaveGradients(SaveGradients { slot }));
        }
        ops
    }

    /// Slots of all subtrees of a rank but the last one, which stays in the gradients.
    pub fn subtree_slots(self) -> Vec<usize> {
        let levels = self.levels();
        if self.ranks == 1 {
            return Vec::new();
        }
        (0..(self.per_rank() >> levels) - 1).map(|subtree| levels + subtree).collect()
    }

    /// Order in which the subtrees of all ranks are added.
    pub fn across_ranks(self) -> SumOrder {
        SumOrder::new(self.slices >> self.levels())
    }

    /// Slots that [`Self::after`] uses: arenas of the length of the gradients.
    pub fn slots(self) -> usize {
        let last = |op: &Op| if let Op::SaveGradients(o) = op { o.slot + 1 } else { 0 };
        (0..self.per_rank()).flat_map(|at| self.after(at)).map(|op| last(&op)).max().unwrap_or(0)
    }
}

/// Contiguous ranges of the arena, one per rank, and the runs that the gradient norm sums by. Runs
/// depend on the layout alone, and no shard cuts a run, or a matrix that Muon steps as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shards {
    /// The rank of this process.
    pub rank: usize,
    /// Range of each rank; together the whole arena.
    pub ranges: Vec<Range<usize>>,
    /// Runs of the whole arena, in order.
    pub runs: Vec<Range<usize>>,
    /// Index of each rank's first run, and the number of all runs.
    first_runs: Vec<usize>,
}

/// Elements per run of the gradient norm.
const RUN_ELEMENTS: usize = 1 << 14;

impl Shards {
    /// Shards of the arenas for `ranks` processes, seen from process `rank`.
    pub fn new(layout: &Layout, optimizer: &Optimizer, ranks: usize, rank: usize) -> Arc<Self> {
        let mut runs = Vec::new();
        // Where a shard may begin: index of a run, and the elements before it.
        let mut cuts = Vec::new();
        let mut before = 0;
        for parameter in &layout.parameters {
            let range = parameter.span.range();
            let is_whole = optimizer.muon.is_some() && parameter.kind == ParamKind::Matrix;
            for from in range.clone().step_by(RUN_ELEMENTS) {
                if !is_whole || from == range.start {
                    cuts.push((runs.len(), before));
                }
                let run = from..(from + RUN_ELEMENTS).min(range.end);
                before += run.len();
                runs.push(run);
            }
        }
        let mut first_runs = vec![0];
        for rank in 1..ranks {
            let fair = before * rank / ranks;
            let nearest = cuts.iter().min_by_key(|(_, before)| before.abs_diff(fair));
            first_runs.push(nearest.map_or(0, |(run, _)| *run));
        }
        first_runs.push(runs.len());
        let start = |run: usize| runs.get(run).map_or(layout.len, |run| run.start);
        let ranges = (0..ranks)
            .map(|rank| {
                let from = if rank == 0 { 0 } else { start(first_runs[rank]) };
                from..start(first_runs[rank + 1])
            })
            .collect();
        Arc::new(Self { rank, ranges, runs, first_runs })
    }

    /// Number of processes.
    pub fn ranks(&self) -> usize {
        self.ranges.len()
    }

    /// The shard of this process.
    pub fn own(&self) -> Range<usize> {
        self.ranges[self.rank].clone()
    }

    /// Indices of the runs in a rank's shard.
    pub fn runs_of(&self, rank: usize) -> Range<usize> {
        self.first_runs[rank]..self.first_runs[rank + 1]
    }

    /// Elements of the longest shard.
    pub fn longest(&self) -> usize {
        self.ranges.iter().map(ExactSizeIterator::len).max().unwrap_or(0)
    }

    /// Runs of the shard with the most of them.
    pub fn most_runs(&self) -> usize {
        (0..self.ranks()).map(|rank| self.runs_of(rank).len()).max().unwrap_or(0)
    }

    /// The part of a rank's shard from element `from` of it on, of at most `len` elements.
    pub fn part(&self, rank: usize, from: usize, len: usize) -> Range<usize> {
        let Range { start, end } = self.ranges[rank].clone();
        let from = (start + from).min(end);
        from..(from + len).min(end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::llama::{AdamW, Muon};

    /// The sum of slices as text: `((0+1)+2)`.
    fn added(slices: usize, ranks: usize) -> String {
        let plan = SlicePlan::new(slices, ranks);
        let mut sent = Vec::new();
        for rank in 0..ranks {
            let mut slots = vec![String::new(); plan.slots()];
            let mut gradients = String::new();
            for (at, slice) in plan.of_rank(rank).enumerate() {
                gradients = slice.to_string();
                for op in plan.after(at) {
                    match op {
                        Op::SaveGradients(o) => slots[o.slot] = std::mem::take(&mut gradients),
                        Op::AddGradients(o) => {
                            gradients = format!("({}+{gradients})", slots[o.slot]);
                        }
                        _ => panic!("{}", op.name()),
                    }
                }
            }
            sent.extend(plan.subtree_slots().into_iter().map(|slot| slots[slot].clone()));
            sent.push(gradients);
        }
        let order = plan.across_ranks();
        let mut terms: Vec<Text> =
            sent.into_iter().map(|text| Text(Box::leak(text.into_boxed_str()))).collect();
        if ranks > 1 {
            order.add(&mut terms, 1);
        }
        terms[0].0.to_string()
    }

    #[derive(Clone, Copy)]
    struct Text(&'static str);

    impl AddAssign for Text {
        fn add_assign(&mut self, other: Self) {
            self.0 = Box::leak(format!("({}+{})", self.0, other.0).into_boxed_str());
        }
    }

    #[test]
    fn slices_are_added_in_one_order_by_any_number_of_ranks() {
        assert_eq!(added(4, 1), "((0+1)+(2+3))");
        assert_eq!(added(6, 1), "(((0+1)+(2+3))+(4+5))");
        assert_eq!(added(3, 1), "((0+1)+2)");
        for slices in 1..=24 {
            let alone = added(slices, 1);
            for ranks in (2..=slices).filter(|ranks| slices % ranks == 0) {
                assert_eq!(added(slices, ranks), alone, "{slices} slices, {ranks} ranks");
            }
        }
        // Few slots: the levels of a tree.
        assert_eq!([8, 64, 6, 7].map(|slices| SlicePlan::new(slices, 1).slots()), [3, 6, 2, 1]);
        assert_eq!(SlicePlan::new(8, 8).slots(), 0);
    }

    #[test]
    fn shards_cover_the_arena_and_cut_no_run_and_no_matrix_of_muon() {
        let config = crate::model::preset("original").unwrap();
        let layout = Layout::new(&config);
        let adamw = AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 };
        for muon in [None, Some(Muon { momentum: 0.95 })] {
            let optimizer = Optimizer { adamw, muon, weight_decay: 0.0, max_grad_norm: 1.0 };
            let alone = Shards::new(&layout, &optimizer, 1, 0);
            assert_eq!(alone.own(), 0..layout.len);
            for ranks in 1..=64 {
                let shards = Shards::new(&layout, &optimizer, ranks, 0);
                assert_eq!(shards.runs, alone.runs);
                assert_eq!((shards.ranges[0].start, shards.ranges[ranks - 1].end), (0, layout.len));
                for rank in 0..ranks {
                    let range = &shards.ranges[rank];
                    assert!(rank == 0 || shards.ranges[rank - 1].end == range.start);
                    let runs = &shards.runs[shards.runs_of(rank)];
                    assert!(
                        runs.iter().all(|run| range.start <= run.start && run.end <= range.end)
                    );
                    let is_cut = |at: usize| {
                        let mut matrices = layout.parameters.iter().filter(|parameter| {
                            muon.is_some() && parameter.kind == ParamKind::Matrix
                        });
                        matrices.any(|matrix| {
                            let range = matrix.span.range();
                            range.start < at && at < range.end
                        })
                    };
                    assert!(!is_cut(range.start), "{range:?}");
                }
                if muon.is_none() && ranks <= 8 {
                    let (longest, fair) = (shards.longest(), layout.len / ranks);
                    assert!(longest <= fair + RUN_ELEMENTS + Layout::ALIGN, "{longest} and {fair}");
                }
            }
        }
    }
}
