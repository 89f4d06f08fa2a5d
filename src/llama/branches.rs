//! Ops beside the path: weight gradients that nothing but the update waits for. A device that captures a
//! program as a graph runs them on a side branch while the backward pass goes on.

use super::ops::Op;
use super::program::Program;

/// Most work of an op beside the path: that of a GPU in some 4 us, the time of a small launch. Larger ops fill
/// the GPU by themselves, and memory would be kept for them without gain.
const MAX_FLOPS: usize = 1 << 30;

/// Ops beside the path between two waits of the path: those of a block. A wait costs the path about as much
/// as a launch, and what has been waited for gives its memory back.
const OPS_PER_WAIT: usize = 4;

/// The order of a program's ops. Ops on the path run one after another, and so do those beside it. An op
/// beside the path starts after all ops before it, and is complete before a later op of the path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Branches {
    /// For each op beside the path, the first op that starts after it: the number of ops for the end of the
    /// program. `None` for ops on the path.
    completed_before: Vec<Option<usize>>,
}

impl Branches {
    /// True if the op runs beside the path.
    pub fn is_beside(&self, op: usize) -> bool {
        self.completed_before[op].is_some()
    }

    /// True if all ops are on the path.
    pub fn is_empty(&self) -> bool {
        self.completed_before.iter().all(Option::is_none)
    }

    /// The first op that starts after an op beside the path.
    pub fn completed_before(&self, op: usize) -> Option<usize> {
        self.completed_before[op]
    }

    /// The last of the ops beside the path that `op`, or the end of the program, waits for.
    pub fn waits_for(&self, op: usize) -> Option<usize> {
        self.completed_before[..op].iter().rposition(|&before| before == Some(op))
    }
}

impl Program {
    /// The ops that run beside the path: those that assign no buffer and accumulate parameter gradients, unless
    /// the path has nothing left to do but to wait for them. None in a program whose ops are large.
    pub fn branches(&self) -> Branches {
        let len = |buffer| self.info(buffer).len;
        let is_whole = |op: &Op| op.gradients().contains(&Op::ALL_GRADIENTS);
        let is_free = |at: usize, op: &Op| {
            let is_last = self.ops.get(at + 1).is_none_or(is_whole);
            op.writes().is_empty() && !op.gradients().is_empty() && !is_whole(op) && !is_last
        };
        let mut free = self.ops.iter().enumerate().filter(|(at, op)| is_free(*at, op));
        let is_small = free.all(|(_, op)| op.cost(len, 0).flops <= MAX_FLOPS);
        let mut completed_before = vec![None; self.ops.len()];
        let mut pending = Vec::new();
        for (at, op) in self.ops.iter().enumerate() {
            if is_small && is_free(at, op) {
                pending.push(at);
                continue;
            }
            let complete = match pending.len() {
                all if is_whole(op) => all,
                many if many >= 2 * OPS_PER_WAIT => OPS_PER_WAIT,
                _ => 0,
            };
            for beside in pending.drain(..complete) {
                completed_before[beside] = Some(at);
            }
        }
        for beside in pending {
            completed_before[beside] = Some(self.ops.len());
        }
        Branches { completed_before }
    }

    /// Two ops that may run at the same time and access the same memory, one of them to write: `None` in a
    /// right plan. `offsets` and `lens` place the buffers, `has_scratch` tells the ops that use the scratch
    /// memory that all share.
    pub fn race(
        &self,
        branches: &Branches,
        (offsets, lens): (&[usize], &[usize]),
        has_scratch: impl Fn(&Op) -> bool,
    ) -> Option<(usize, usize)> {
        let overlaps = |a: (usize, usize), b: (usize, usize)| a.0 < b.1 && b.0 < a.1;
        let ranges = |buffers: Vec<super::Buffer>| -> Vec<(usize, usize)> {
            let range = |super::Buffer(at)| (offsets[at], offsets[at] + lens[at]);
            buffers.into_iter().map(range).collect()
        };
        let meet = |a: &[(usize, usize)], b: &[(usize, usize)]| {
            a.iter().any(|&a| b.iter().any(|&b| overlaps(a, b)))
        };
        let conflict = |a: &Op, b: &Op| {
            let (reads_a, writes_a) = (ranges(a.reads()), ranges(a.writes()));
            let (reads_b, writes_b) = (ranges(b.reads()), ranges(b.writes()));
            let gradients = |op: &Op| -> Vec<(usize, usize)> {
                op.gradients().into_iter().map(|range| (range.start, range.end)).collect()
            };
            meet(&writes_a, &writes_b)
                || meet(&writes_a, &reads_b)
                || meet(&reads_a, &writes_b)
                || meet(&gradients(a), &gradients(b))
                || has_scratch(a) && has_scratch(b)
        };
        let mut running: Vec<usize> = Vec::new();
        for (at, op) in self.ops.iter().enumerate() {
            running.retain(|&beside| branches.completed_before[beside] != Some(at));
            if branches.is_beside(at) {
                running.push(at);
            } else if let Some(&beside) =
                running.iter().find(|&&beside| conflict(&self.ops[beside], op))
            {
                return Some((beside, at));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::llama::{AdamW, Optimizer, Recompute, append_update, step};
    use crate::model::{Layout, preset, preset_names};

    /// A step of a preset with its update.
    fn training(name: &str, batch: usize, recompute: Recompute) -> Program {
        let config = preset(name).unwrap();
        let layout = Layout::new(&config);
        let context = config.max_position_embeddings.min(512);
        let mut program = step::training(&config, &layout, batch, context, recompute).program;
        let adamw = AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 };
        let optimizer = Optimizer { adamw, muon: None, weight_decay: 0.0, max_grad_norm: 1.0 };
        append_update(&mut program, &layout, &optimizer);
        program
    }

    fn beside(program: &Program) -> Vec<&'static str> {
        let branches = program.branches();
        let ops = program.ops.iter().enumerate();
        ops.filter(|(at, _)| branches.is_beside(*at)).map(|(_, op)| op.name()).collect()
    }

    #[test]
    fn small_weight_gradients_run_beside_the_path() {
        let program = training("original", 1, Recompute::None);
        let linears = ["linear_backward_weight"; 4 * 8];
        assert_eq!(beside(&program), [&linears[..], &["rms_norm_backward_weight"]].concat());
        // All are complete before the gradients are read, and most long before.
        let branches = program.branches();
        let name = |at: usize| program.ops.get(at).map_or("end", Op::name);
        let waits: Vec<&str> = (0..=program.ops.len())
            .filter(|&at| branches.waits_for(at).is_some())
            .map(name)
            .collect();
        assert_eq!(waits, [&["linear_backward_input"; 7][..], &["grad_norm"]].concat());
        // Without an update: before the end.
        let mut micro = program.clone();
        micro.ops.truncate(program.ops.iter().position(|op| op.name() == "grad_norm").unwrap());
        let branches = micro.branches();
        assert!(branches.waits_for(micro.ops.len()).is_some());

        let large = training("124m", 16, Recompute::None);
        assert_eq!(beside(&large), [""; 0]);
        let in_order = Branches { completed_before: vec![None; large.ops.len()] };
        assert_eq!(large.byte_plan(2), large.byte_plan_for(&in_order, 2));
    }

    /// Ops that may run at once and access the same memory, if the plan keeps buffers for `live`.
    fn race(program: &Program, branches: &Branches, live: &Branches) -> Option<(usize, usize)> {
        let plan = program.byte_plan_for(live, 2);
        let lens: Vec<usize> =
            program.buffers.iter().map(|info| info.len * info.kind.size(2)).collect();
        let has_scratch =
            |op: &Op| !matches!(op, Op::LinearBackwardWeight(_) | Op::RmsNormBackwardWeight(_));
        program.race(branches, (&plan.offsets, &lens), has_scratch)
    }

    #[test]
    fn no_ops_that_may_run_at_once_share_memory() {
        for name in preset_names() {
            for batch in [1, 4] {
                for recompute in [Recompute::None, Recompute::Mlp, Recompute::Block] {
                    let program = training(name, batch, recompute);
                    let branches = program.branches();
                    let found = race(&program, &branches, &branches);
                    assert_eq!(found, None, "{name}, {batch}, {recompute:?}");
                }
            }
        }
        // A plan for ops in order, and a wait that is missing.
        let program = training("original", 1, Recompute::None);
        let branches = program.branches();
        let in_order = Branches { completed_before: vec![None; program.ops.len()] };
        assert!(race(&program, &branches, &in_order).is_some());
        let first = branches.completed_before.iter().position(Option::is_some).unwrap();
        let mut late = branches.clone();
        late.completed_before[first] = Some(program.ops.len());
        assert!(race(&program, &late, &branches).is_some());
        let mut early = branches.clone();
        early.completed_before[first] = Some(first + 1);
        assert_eq!(race(&program, &early, &branches), None);
        // Gradients that are read too early, and scratch memory that all ops use.
        let last = branches.completed_before.iter().rposition(Option::is_some).unwrap();
        let mut late = branches.clone();
        late.completed_before[last] = Some(program.ops.len());
        let (_, reader) = race(&program, &late, &late).unwrap();
        assert_eq!(program.ops[reader].name(), "grad_norm");
        let apart: Vec<usize> = (0..program.buffers.len()).collect();
        let lens = vec![1; apart.len()];
        assert_eq!(program.race(&branches, (&apart, &lens), |_| false), None);
        assert!(program.race(&branches, (&apart, &lens), |_| true).is_some());
    }
}
