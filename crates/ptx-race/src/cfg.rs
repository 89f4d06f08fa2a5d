//! Where the lanes of a diverged warp meet again: immediate post-dominators of basic blocks.

/// Stands for "after the function's end".
pub(crate) const END: u32 = u32::MAX;

/// What the control-flow graph needs to know of an instruction.
pub(crate) enum Flow<'a> {
    Next,
    /// A branch, and whether it may fall through.
    Branch(&'a [u32], bool),
    /// Return or exit, and whether a guard may skip it.
    Leave(bool),
}

/// For each branch (by instruction index) the instruction at which its lanes reconverge.
pub(crate) fn reconvergence<'a>(
    length: usize,
    flow: impl Fn(usize) -> Flow<'a>,
) -> Vec<(usize, u32)> {
    let mut leader = vec![false; length + 1];
    leader[0] = true;
    for at in 0..length {
        match flow(at) {
            Flow::Next => {}
            Flow::Branch(targets, _) => {
                leader[at + 1] = true;
                for &target in targets {
                    leader[target as usize] = true;
                }
            }
            Flow::Leave(_) => leader[at + 1] = true,
        }
    }
    let starts: Vec<usize> = (0..length).filter(|&at| leader[at]).collect();
    let mut block_of = vec![0; length + 1];
    for (block, &start) in starts.iter().enumerate() {
        let end = starts.get(block + 1).copied().unwrap_or(length);
        block_of[start..end].fill(block);
    }
    let count = starts.len();
    // The virtual exit is block `count`; running off the end leads there too.
    block_of[length] = count;
    let last = |block: usize| starts.get(block + 1).copied().unwrap_or(length) - 1;
    let successors: Vec<Vec<usize>> = (0..count)
        .map(|block| {
            let at = last(block);
            let next = block_of[at + 1];
            match flow(at) {
                Flow::Next => vec![next],
                Flow::Branch(targets, falls) => {
                    let mut list: Vec<_> =
                        targets.iter().map(|&target| block_of[target as usize]).collect();
                    if falls {
                        list.push(next);
                    }
                    list
                }
                Flow::Leave(guarded) => {
                    if guarded {
                        vec![count, next]
                    } else {
                        vec![count]
                    }
                }
            }
        })
        .collect();
    let post = post_dominators(&successors);
    (0..count)
        .filter(|&block| matches!(flow(last(block)), Flow::Branch(..)))
        .map(|block| {
            let join = starts.get(post[block]).map_or(END, |&start| start as u32);
            (last(block), join)
        })
        .collect()
}

/// Immediate post-dominators: dominators of the reversed graph from the exit, by Lengauer and
/// Tarjan's algorithm with path compression. Blocks from which the exit cannot be reached get the
/// exit itself.
fn post_dominators(successors: &[Vec<usize>]) -> Vec<usize> {
    let exit = successors.len();
    let mut predecessors = vec![Vec::new(); exit + 1];
    for (block, list) in successors.iter().enumerate() {
        for &next in list {
            predecessors[next].push(block);
        }
    }
    // Depth-first order of the reversed graph, without recursion.
    let mut parent = vec![exit; exit + 1];
    let mut order = vec![exit];
    let mut forest = Forest {
        ancestor: vec![None; exit + 1],
        label: (0..=exit).collect(),
        semi: vec![usize::MAX; exit + 1],
    };
    forest.semi[exit] = 0;
    let mut stack = vec![(exit, 0)];
    while let Some((block, next)) = stack.pop() {
        if let Some(&before) = predecessors[block].get(next) {
            stack.push((block, next + 1));
            if forest.semi[before] == usize::MAX {
                forest.semi[before] = order.len();
                parent[before] = block;
                order.push(before);
                stack.push((before, 0));
            }
        }
    }
    let mut buckets = vec![Vec::new(); exit + 1];
    let mut post = vec![exit; exit + 1];
    for &block in order[1..].iter().rev() {
        for &next in &successors[block] {
            if forest.semi[next] == usize::MAX {
                continue;
            }
            let least = forest.evaluate(next);
            forest.semi[block] = forest.semi[block].min(forest.semi[least]);
        }
        buckets[order[forest.semi[block]]].push(block);
        forest.ancestor[block] = Some(parent[block]);
        for other in std::mem::take(&mut buckets[parent[block]]) {
            let least = forest.evaluate(other);
            let below = forest.semi[least] < forest.semi[other];
            post[other] = if below { least } else { parent[block] };
        }
    }
    for &block in &order[1..] {
        if post[block] != order[forest.semi[block]] {
            post[block] = post[post[block]];
        }
    }
    post
}

/// Linked part of the depth-first tree, with the semidominators found so far.
struct Forest {
    ancestor: Vec<Option<usize>>,
    label: Vec<usize>,
    semi: Vec<usize>,
}

impl Forest {
    /// The block of least semidominator on the way from a block up to its root, which is left out.
    fn evaluate(&mut self, block: usize) -> usize {
        let mut path = Vec::new();
        let mut at = block;
        while let Some(above) = self.ancestor[at] {
            path.push((at, above));
            at = above;
        }
        // The last one lies under the root, and has nothing above it to compare with.
        let Some((_, root)) = path.pop() else { return block };
        for (at, above) in path.into_iter().rev() {
            if self.semi[self.label[above]] < self.semi[self.label[at]] {
                self.label[at] = self.label[above];
            }
            self.ancestor[at] = Some(root);
        }
        self.label[block]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn branches_join_at_the_post_dominator() {
        // 0: branch 3 | 1: jump 4 .. 3: falls | 4: branch 0 (loop) | 5: leave
        let targets = [vec![3], vec![4], vec![], vec![], vec![0], vec![]];
        let flow = |at: usize| match at {
            0 | 4 => Flow::Branch(&targets[at], true),
            1 => Flow::Branch(&targets[at], false),
            5 => Flow::Leave(false),
            _ => Flow::Next,
        };
        let joins = reconvergence(6, flow);
        assert_eq!(joins, [(0, 4), (1, 4), (4, 5)]);
    }

    /// The nearest of the blocks that lie on every path from a block to the exit is found, in
    /// random graphs.
    #[test]
    fn post_dominators_lie_on_every_path_to_the_exit() {
        let mut state = 1u64;
        let mut random = |below: usize| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize % below
        };
        for _ in 0..2000 {
            let exit = 1 + random(8);
            let graph: Vec<Vec<usize>> =
                (0..exit).map(|_| (0..=random(2)).map(|_| random(exit + 1)).collect()).collect();
            let reaches = |from: usize, without: usize| {
                let (mut seen, mut stack) = (vec![false; exit + 1], vec![from]);
                while let Some(at) = stack.pop() {
                    if at != without && !std::mem::replace(&mut seen[at], true) && at < exit {
                        stack.extend(&graph[at]);
                    }
                }
                seen[exit]
            };
            let post = post_dominators(&graph);
            for (block, &found) in post[..exit].iter().enumerate() {
                // The nearest post-dominator is the one that all others post-dominate.
                let all: Vec<usize> = (0..=exit)
                    .filter(|&other| other != block && (other == exit || !reaches(block, other)))
                    .collect();
                let nearest = all.iter().copied().find(|&near| {
                    all.iter().all(|&far| far == near || far == exit || !reaches(near, far))
                });
                let wanted = if reaches(block, usize::MAX) { nearest.unwrap() } else { exit };
                assert_eq!(found, wanted, "{block} in {graph:?}");
            }
        }
    }

    #[test]
    fn an_endless_loop_has_its_join_at_the_end() {
        let target = [0];
        assert_eq!(reconvergence(1, |_| Flow::Branch(&target, false)), [(0, END)]);
    }
}
