//! Ops on the gradients of slices, and exchanges of shards between ranks, in host memory.

use super::host::Real;
use super::memory::Memory;
use crate::collective::Group;
use crate::llama::Op;
use crate::llama::ops::{GatherShards, GradNorm, NormRuns, ReduceGradients, ShardedArena};

/// Bytes that a rank sends in one exchange, about.
const EXCHANGE_BYTES: usize = 1 << 24;

/// Elements of a shard per exchange, so that all pieces together are of [`EXCHANGE_BYTES`].
pub(super) fn chunk_elements(pieces: usize, longest: usize) -> usize {
    (EXCHANGE_BYTES / 4 / pieces.max(1)).clamp(1 << 10, 1 << 22).min(longest)
}

/// Elements of the buffers of an op's exchanges: what is sent, and what is received.
pub(super) fn wire_elements(op: &Op) -> usize {
    let (sent, received, longest) = match op {
        Op::ReduceGradients(o) => (o.order.terms(), o.order.terms(), o.shards.longest()),
        Op::GatherShards(o) => (1, o.shards.ranks(), o.shards.longest()),
        _ => return 0,
    };
    (sent + received) * chunk_elements(received, longest)
}

/// True if the session executes an op by [`execute`], on every backend of the host alike.
pub(super) fn is_exchange(op: &Op) -> bool {
    matches!(
        op,
        Op::SaveGradients(_)
            | Op::AddGradients(_)
            | Op::ReduceGradients(_)
            | Op::GatherShards(_)
            | Op::GradNorm(GradNorm { runs: Some(_), .. })
    )
}

/// Executes an op of which [`is_exchange`] is true.
pub(super) fn execute<R: Real>(
    op: &Op,
    memory: &mut Memory<R>,
    group: &Group,
) -> anyhow::Result<()> {
    match op {
        Op::SaveGradients(o) => {
            std::mem::swap(&mut memory.slots[o.slot], &mut memory.gradients);
            memory.gradients.fill(R::default());
        }
        Op::AddGradients(o) => {
            for (sum, &other) in memory.gradients.iter_mut().zip(&memory.slots[o.slot]) {
                *sum += other;
            }
        }
        Op::ReduceGradients(o) => reduce(o, memory, group)?,
        Op::GatherShards(o) => gather(o, memory, group)?,
        Op::GradNorm(GradNorm { norm, runs: Some(runs) }) => {
            let sum = sum_of_squares(runs, &memory.gradients, group)?;
            memory.floats.get([*norm])[0][0] = R::from_f32(sum.sqrt() as f32);
        }
        _ => unreachable!("the backend executes it"),
    }
    Ok(())
}

fn reduce<R: Real>(
    o: &ReduceGradients,
    memory: &mut Memory<R>,
    group: &Group,
) -> anyhow::Result<()> {
    let (shards, pieces) = (&o.shards, o.slots.len() + 1);
    let chunk = chunk_elements(o.order.terms(), shards.longest());
    let all = o.order.terms() * chunk;
    let (send, received) = memory.wire[..2 * all].split_at_mut(all);
    for from in (0..shards.longest()).step_by(chunk) {
        for rank in 0..shards.ranks() {
            let part = shards.part(rank, from, chunk);
            for piece in 0..pieces {
                let source =
                    o.slots.get(piece).map_or(&memory.gradients, |&slot| &memory.slots[slot]);
                send[(rank * pieces + piece) * chunk..][..part.len()]
                    .copy_from_slice(&source[part.clone()]);
            }
        }
        group.all_to_all(bytemuck::cast_slice(send), bytemuck::cast_slice_mut(received))?;
        o.order.add(received, chunk);
        let part = shards.part(shards.rank, from, chunk);
        memory.gradients[part.clone()].copy_from_slice(&received[..part.len()]);
    }
    Ok(())
}

fn gather<R: Real>(o: &GatherShards, memory: &mut Memory<R>, group: &Group) -> anyhow::Result<()> {
    let arena = match o.arena {
        ShardedArena::Gradients => &mut memory.gradients,
        ShardedArena::Parameters => &mut memory.parameters,
    };
    let shards = &o.shards;
    let chunk = chunk_elements(shards.ranks(), shards.longest());
    let (own, all) = memory.wire[..chunk * (shards.ranks() + 1)].split_at_mut(chunk);
    for from in (0..shards.longest()).step_by(chunk) {
        let part = shards.part(shards.rank, from, chunk);
        own[..part.len()].copy_from_slice(&arena[part]);
        group.all_gather(bytemuck::cast_slice(own), bytemuck::cast_slice_mut(all))?;
        for (rank, piece) in all.chunks_exact(chunk).enumerate() {
            let part = shards.part(rank, from, chunk);
            arena[part.clone()].copy_from_slice(&piece[..part.len()]);
        }
    }
    Ok(())
}

/// Sum of squares of all runs, in order; each of them in f64, in eight interleaved sums.
fn sum_of_squares<R: Real>(runs: &NormRuns, gradients: &[R], group: &Group) -> anyhow::Result<f64> {
    let shards = &runs.shards;
    let own = if runs.own { shards.runs_of(shards.rank) } else { 0..shards.runs.len() };
    let squares = shards.runs[own].iter().map(|run| {
        let mut sums = [0.0; 8];
        for values in gradients[run.clone()].chunks(8) {
            for (sum, value) in sums.iter_mut().zip(values) {
                *sum += value.to_f64() * value.to_f64();
            }
        }
        sums.iter().sum::<f64>()
    });
    let squares: Vec<f64> = squares.collect();
    if !runs.own {
        return Ok(squares.iter().sum());
    }
    let all = group.gather_each(bytemuck::cast_slice(&squares))?;
    let all = all.iter().flat_map(|bytes| bytes.as_chunks().0);
    Ok(all.map(|&bytes| f64::from_le_bytes(bytes)).sum())
}

/// The whole arena of a moment, from the shards of all ranks.
pub(super) fn gather_moments(own: &[f32], group: &Group) -> anyhow::Result<Vec<f32>> {
    let all = group.gather_each(bytemuck::cast_slice(own))?;
    let values = all.iter().flat_map(|bytes| bytes.as_chunks().0);
    Ok(values.map(|&bytes| f32::from_le_bytes(bytes)).collect())
}
