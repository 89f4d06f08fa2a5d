//! The embedding, its gradient, and rows picked out: `kernels/embedding.cu`, `kernels/gather_rows.cu`.

use super::launch_context::{LaunchContext, LaunchShape, int, scratch};
use crate::device::Address;
use crate::dtype::Dtype;
use crate::llama::ops::{Embedding, EmbeddingBackward, GatherRows};

/// Ids are sorted by two digits of nine bits.
pub(super) const MOST_VOCAB: usize = 1 << 18;
const DIGITS: usize = 512;
/// Rows that a block sorts.
const TILE: usize = 1024;
/// Sorted rows that are added up together.
const CHUNK: usize = 64;
/// Blocks at most: enough to fill any card.
const BLOCKS: usize = 4096;

/// Blocks of (columns, rows at once) threads, for `rows` rows of `hidden` columns taken `full` at a
/// time where they can be.
fn shape(rows: usize, hidden: usize, full: usize) -> LaunchShape {
    let pieces = if hidden.is_multiple_of(full) { hidden / full } else { hidden };
    let width = pieces.next_power_of_two().min(256);
    let at_once = 256 / width;
    LaunchShape {
        grid: [rows.div_ceil(at_once).min(BLOCKS), 1, 1],
        block: [width, at_once, 1],
        shared: 0,
    }
}

fn full(dtype: Dtype) -> usize {
    16 / dtype.size()
}

pub(super) fn forward(ctx: &mut LaunchContext, o: &Embedding) -> anyhow::Result<()> {
    let (rows, hidden) = (ctx.len(o.ids), o.table.cols);
    let args = [
        ctx.ptr(o.ids).into(),
        ctx.weight_ptr(o.table).into(),
        ctx.ptr(o.out).into(),
        int(rows),
        int(hidden),
    ];
    ctx.launch_for_dtype("embedding", shape(rows, hidden, full(ctx.dtype)), &args)
}

/// Two orders, the counts of each tile's digits, two partial sums a chunk.
fn pieces(rows: usize, hidden: usize) -> [usize; 4] {
    let counts = 4 * DIGITS * rows.div_ceil(TILE);
    [4 * rows, 4 * rows, counts, 4 * 2 * hidden * rows.div_ceil(CHUNK)]
}

pub(super) fn workspace(o: &EmbeddingBackward, rows: usize) -> usize {
    scratch(pieces(rows, o.table.cols))
}

pub(super) fn backward(ctx: &mut LaunchContext, o: &EmbeddingBackward) -> anyhow::Result<()> {
    let (rows, hidden) = (ctx.len(o.ids), o.table.cols);
    let [one, other, counts, partials] = pieces(rows, hidden).map(|bytes| ctx.scratch_alloc(bytes));
    let ids = ctx.ptr(o.ids);
    let tiles = rows.div_ceil(TILE);
    let counts = if tiles > 1 { counts } else { Address::NULL };
    let passes: &[usize] = if o.table.rows <= DIGITS { &[0] } else { &[0, 9] };
    let mut order = Address::NULL;
    for &shift in passes {
        let tiled = LaunchShape::linear(tiles, DIGITS);
        if tiles > 1 {
            let args = [ids.into(), order.into(), counts.into(), int(rows), int(shift)];
            ctx.launch("embedding_sort_histogram", tiled, &args)?;
        }
        let sorted = if order == one { other } else { one };
        let args = [ids.into(), order.into(), counts.into(), sorted.into(), int(rows), int(shift)];
        ctx.launch("embedding_sort_scatter", tiled, &args)?;
        order = sorted;
    }
    let shape = shape(rows.div_ceil(CHUNK), hidden, 4);
    let gradient = ctx.gradient_ptr(o.table);
    let args = [
        ids.into(),
        order.into(),
        ctx.ptr(o.dout).into(),
        gradient.into(),
        partials.into(),
        int(rows),
        int(hidden),
    ];
    ctx.launch_for_dtype("embedding_backward", shape, &args)?;
    let args = [ids.into(), order.into(), partials.into(), gradient.into(), int(rows), int(hidden)];
    ctx.launch("embedding_backward_combine", shape, &args)
}

pub(super) fn gather_rows(ctx: &mut LaunchContext, o: &GatherRows) -> anyhow::Result<()> {
    let hidden = ctx.len(o.out) / o.batch;
    let args = [
        ctx.ptr(o.x).into(),
        ctx.ptr(o.position).into(),
        ctx.ptr(o.out).into(),
        int(o.batch),
        int(o.seq_len),
        int(hidden),
    ];
    ctx.launch_for_dtype("gather_rows", LaunchShape::linear(o.batch.min(BLOCKS), 256), &args)
}
