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

/// Immediate post-dominators, by Cooper, Harvey and Kennedy's iteration over the reversed graph
/// from the exit. Blocks from which the exit cannot be reached get the exit itself.
fn post_dominators(successors: &[Vec<usize>]) -> Vec<usize> {
    let exit = successors.len();
    let mut predecessors = vec![Vec::new(); exit + 1];
    for (block, list) in successors.iter().enumerate() {
        for &next in list {
            predecessors[next].push(block);
        }
    }
    // Post-order over the reversed graph, without recursion.
    let mut number = vec![usize::MAX; exit + 1];
    let mut order = Vec::new();
    let mut seen = vec![false; exit + 1];
    let mut stack = vec![(exit, 0)];
    seen[exit] = true;
    while let Some((block, next)) = stack.pop() {
        if let Some(&before) = predecessors[block].get(next) {
            stack.push((block, next + 1));
            if !seen[before] {
                seen[before] = true;
                stack.push((before, 0));
            }
        } else {
            number[block] = order.len();
            order.push(block);
        }
    }
    let mut post = vec![usize::MAX; exit + 1];
    post[exit] = exit;
    let mut changed = true;
    while changed {
        changed = false;
        for &block in order.iter().rev().filter(|&&block| block != exit) {
            let mut best = usize::MAX;
            for &next in &successors[block] {
                if post[next] == usize::MAX {
                    continue;
                }
                if best == usize::MAX {
                    best = next;
                    continue;
                }
                let mut other = next;
                while best != other {
                    while number[best] < number[other] {
                        best = post[best];
                    }
                    while number[other] < number[best] {
                        other = post[other];
                    }
                }
            }
            if post[block] != best {
                post[block] = best;
                changed = true;
            }
        }
    }
    post.iter().map(|&block| block.min(exit)).collect()
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

    #[test]
    fn an_endless_loop_has_its_join_at_the_end() {
        let target = [0];
        assert_eq!(reconvergence(1, |_| Flow::Branch(&target, false)), [(0, END)]);
    }
}
