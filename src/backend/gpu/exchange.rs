//! Gradients of slices, and exchanges of shards between ranks: `kernels/sum_pieces.cu`,
//! `kernels/grad_norm.cu`.

use std::ops::Range;

use super::super::exchange::chunk_elements;
use super::launch_context::{LaunchContext, LaunchShape, int, scratch};
use crate::device::Address;
use crate::dtype::Dtype;
use crate::kernels::families;
use crate::kernels::geometry::{BLOCK_THREADS, SUM_PIECES_LEVELS};
use crate::llama::ops::{
    AddGradients, GatherShards, GradNorm, NormRuns, ReduceGradients, SaveGradients, ShardedArena,
};
use crate::llama::slices::Shards;

/// Grid limit of `sum_pieces`: enough blocks to fill any GPU.
const MAX_BLOCKS: usize = 2048;
/// Most pieces of a tree in `sum_pieces`.
pub(super) const MAX_TREE_PIECES: usize = 1 << SUM_PIECES_LEVELS;

pub(super) fn save(ctx: &mut LaunchContext, o: &SaveGradients) -> anyhow::Result<()> {
    let (gradients, bytes) = (ctx.arenas.gradients, 4 * ctx.arenas.len);
    ctx.device.copy(gradients, ctx.slots[o.slot], bytes)?;
    ctx.device.memset(gradients, 0, bytes)
}

pub(super) fn add(ctx: &mut LaunchContext, o: &AddGradients) -> anyhow::Result<()> {
    let gradients = ctx.arenas.gradients;
    let len = ctx.arenas.len;
    sum(ctx, ctx.slots[o.slot], gradients, gradients, len, len, [1, 2])
}

/// Launches `sum_pieces`.
fn sum(
    ctx: &mut LaunchContext,
    first: Address,
    rest: Address,
    out: Address,
    stride: usize,
    count: usize,
    [blocks, width]: [usize; 2],
) -> anyhow::Result<()> {
    let args = [
        first.into(),
        rest.into(),
        out.into(),
        (stride as u64).into(),
        (count as u64).into(),
        int(blocks),
        int(width),
    ];
    let grid = count.div_ceil(4 * BLOCK_THREADS).clamp(1, MAX_BLOCKS);
    ctx.launch(families::SUM_PIECES, LaunchShape::linear(grid, BLOCK_THREADS), &args)
}

/// Address of elements of an array.
fn elements(at: Address, range: &Range<usize>, dtype: Dtype) -> Address {
    at.plus(range.start * dtype.size())
}

fn reduce_chunk(o: &ReduceGradients) -> usize {
    chunk_elements(o.order.terms(), o.shards.longest())
}

pub(super) fn reduce_workspace(o: &ReduceGradients) -> usize {
    let bytes = 4 * o.order.terms() * reduce_chunk(o);
    scratch([bytes, bytes])
}

pub(super) fn reduce(ctx: &mut LaunchContext, o: &ReduceGradients) -> anyhow::Result<()> {
    let (shards, pieces, chunk) = (&o.shards, o.slots.len() + 1, reduce_chunk(o));
    let bytes = 4 * o.order.terms() * chunk;
    let (send, received) = (ctx.scratch_alloc(bytes), ctx.scratch_alloc(bytes));
    for from in (0..shards.longest()).step_by(chunk) {
        // What a shorter shard leaves of its chunk is sent too.
        ctx.device.memset(send, 0, bytes)?;
        for rank in 0..shards.ranks() {
            let part = shards.part(rank, from, chunk);
            for piece in 0..pieces {
                let source =
                    o.slots.get(piece).map_or(ctx.arenas.gradients, |&slot| ctx.slots[slot]);
                let to = send.plus(4 * (rank * pieces + piece) * chunk);
                if !part.is_empty() {
                    ctx.device.copy(elements(source, &part, Dtype::F32), to, 4 * part.len())?;
                }
            }
        }
        ctx.device.all_to_all(send, received, 4 * pieces * chunk)?;
        let part = shards.part(shards.rank, from, chunk);
        let out = elements(ctx.arenas.gradients, &part, Dtype::F32);
        let order = [o.order.blocks, o.order.width];
        if !part.is_empty() {
            sum(ctx, received, received.plus(4 * chunk), out, chunk, part.len(), order)?;
        }
    }
    Ok(())
}

fn gather_chunk(shards: &Shards) -> usize {
    chunk_elements(shards.ranks(), shards.longest())
}

pub(super) fn gather_workspace(o: &GatherShards) -> usize {
    let chunk = 4 * gather_chunk(&o.shards);
    scratch([chunk, o.shards.ranks() * chunk])
}

pub(super) fn gather(ctx: &mut LaunchContext, o: &GatherShards) -> anyhow::Result<()> {
    let chunk = gather_chunk(&o.shards);
    let send = ctx.scratch_alloc(4 * chunk);
    let received = ctx.scratch_alloc(4 * o.shards.ranks() * chunk);
    let arenas = ctx.arenas;
    match o.arena {
        ShardedArena::Gradients => {
            gather_arena(ctx, &o.shards, arenas.gradients, Dtype::F32, send, received)
        }
        ShardedArena::Parameters => {
            gather_arena(ctx, &o.shards, arenas.parameters, Dtype::F32, send, received)?;
            if arenas.weights == arenas.parameters {
                return Ok(());
            }
            let dtype = ctx.dtype;
            gather_arena(ctx, &o.shards, arenas.weights, dtype, send, received)
        }
    }
}

fn gather_arena(
    ctx: &mut LaunchContext,
    shards: &Shards,
    arena: Address,
    dtype: Dtype,
    send: Address,
    received: Address,
) -> anyhow::Result<()> {
    let (chunk, size) = (gather_chunk(shards), dtype.size());
    for from in (0..shards.longest()).step_by(chunk) {
        let part = shards.part(shards.rank, from, chunk);
        ctx.device.memset(send, 0, size * chunk)?;
        if !part.is_empty() {
            ctx.device.copy(elements(arena, &part, dtype), send, size * part.len())?;
        }
        ctx.device.all_gather(send, received, size * chunk)?;
        for rank in (0..shards.ranks()).filter(|&rank| rank != shards.rank) {
            let part = shards.part(rank, from, chunk);
            if !part.is_empty() {
                let piece = received.plus(size * rank * chunk);
                ctx.device.copy(piece, elements(arena, &part, dtype), size * part.len())?;
            }
        }
    }
    Ok(())
}

/// Runs in the layout of `Run` in `kernels/grad_norm.cu`: those that this process sums.
pub(super) fn run_table(runs: &NormRuns) -> Vec<u8> {
    let runs = &runs.shards.runs[own_runs(runs)];
    runs.iter()
        .flat_map(|run| [run.start as u64, run.len() as u64])
        .flat_map(u64::to_le_bytes)
        .collect()
}

fn own_runs(runs: &NormRuns) -> Range<usize> {
    if runs.own { runs.shards.runs_of(runs.shards.rank) } else { 0..runs.shards.runs.len() }
}

pub(super) fn norm_workspace(runs: &NormRuns) -> usize {
    let shards = &runs.shards;
    scratch([
        8 * shards.runs.len(),
        8 * shards.most_runs(),
        8 * shards.ranks() * shards.most_runs(),
    ])
}

/// Gradient norm by runs: each of them by one block, then all in the order of `grad_norm`.
pub(super) fn norm(ctx: &mut LaunchContext, o: &GradNorm, runs: &NormRuns) -> anyhow::Result<()> {
    let shards = &runs.shards;
    let (own, most) = (own_runs(runs), 8 * shards.most_runs());
    let partials = ctx.scratch_alloc(8 * shards.runs.len());
    let send = ctx.scratch_alloc(most);
    let received = ctx.scratch_alloc(shards.ranks() * most);
    let into = if runs.own { send } else { partials };
    if runs.own {
        ctx.device.memset(send, 0, most)?;
    }
    if !own.is_empty() {
        let args = [ctx.arenas.gradients.into(), ctx.constant_table().into(), into.into()];
        ctx.launch(families::GRAD_NORM_RUNS, LaunchShape::linear(own.len(), BLOCK_THREADS), &args)?;
    }
    if runs.own {
        ctx.device.all_gather(send, received, most)?;
        for rank in 0..shards.ranks() {
            let own = shards.runs_of(rank);
            if !own.is_empty() {
                let (from, to) = (received.plus(rank * most), partials.plus(8 * own.start));
                ctx.device.copy(from, to, 8 * own.len())?;
            }
        }
    }
    let args =
        [partials.into(), ctx.scaling.into(), ctx.ptr(o.norm).into(), int(shards.runs.len())];
    ctx.launch(families::GRAD_NORM, LaunchShape::linear(1, BLOCK_THREADS), &args)
}
