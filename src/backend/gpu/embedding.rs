//! Embedding lookup, its gradient, and row gather: `kernels/embedding.cu`, `kernels/gather_rows.cu`.

use super::launch_context::{LaunchContext, LaunchShape, int, scratch};
use crate::device::Address;
use crate::dtype::Dtype;
use crate::kernels::families;
use crate::kernels::geometry::{
    BLOCK_THREADS, EMBEDDING_CHUNK as CHUNK, EMBEDDING_DIGIT_BITS, EMBEDDING_RADIX as RADIX,
    EMBEDDING_TILE as TILE,
};
use crate::llama::ops::{Embedding, EmbeddingBackward, GatherRows};

/// Vocabulary limit: ids are radix-sorted by two digits.
pub(super) const MAX_VOCAB: usize = RADIX * RADIX;
/// Grid limit: enough blocks to fill any GPU.
const MAX_BLOCKS: usize = 4096;

/// Launch of (columns, rows) threads for `rows` rows of `hidden` columns, `vec_len` per thread if hidden
/// allows it.
fn shape(rows: usize, hidden: usize, vec_len: usize) -> LaunchShape {
    let vectors = if hidden.is_multiple_of(vec_len) { hidden / vec_len } else { hidden };
    let width = vectors.next_power_of_two().min(BLOCK_THREADS);
    let rows_per_block = BLOCK_THREADS / width;
    LaunchShape {
        grid: [rows.div_ceil(rows_per_block).min(MAX_BLOCKS), 1, 1],
        block: [width, rows_per_block, 1],
        shared: 0,
    }
}

/// Elements of a 16-byte access.
fn vec_len(dtype: Dtype) -> usize {
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
    ctx.launch_for_dtype(&families::EMBEDDING, shape(rows, hidden, vec_len(ctx.dtype)), &args)
}

/// Two orders, the digit counts of each tile, two partial sums per chunk.
fn scratch_bytes(rows: usize, hidden: usize) -> [usize; 4] {
    let counts = 4 * RADIX * rows.div_ceil(TILE);
    [4 * rows, 4 * rows, counts, 4 * 2 * hidden * rows.div_ceil(CHUNK)]
}

pub(super) fn workspace(o: &EmbeddingBackward, rows: usize) -> usize {
    scratch(scratch_bytes(rows, o.table.cols))
}

pub(super) fn backward(ctx: &mut LaunchContext, o: &EmbeddingBackward) -> anyhow::Result<()> {
    let (rows, hidden) = (ctx.len(o.ids), o.table.cols);
    let [order_a, order_b, counts, partials] =
        scratch_bytes(rows, hidden).map(|bytes| ctx.scratch_alloc(bytes));
    let ids = ctx.ptr(o.ids);
    let tiles = rows.div_ceil(TILE);
    let counts = if tiles > 1 { counts } else { Address::NULL };
    let passes: &[usize] = if o.table.rows <= RADIX { &[0] } else { &[0, EMBEDDING_DIGIT_BITS] };
    let mut order = Address::NULL;
    for &shift in passes {
        let tiled = LaunchShape::linear(tiles, RADIX);
        if tiles > 1 {
            let args = [ids.into(), order.into(), counts.into(), int(rows), int(shift)];
            ctx.launch(families::EMBEDDING_SORT_HISTOGRAM, tiled, &args)?;
        }
        let sorted = if order == order_a { order_b } else { order_a };
        let args = [ids.into(), order.into(), counts.into(), sorted.into(), int(rows), int(shift)];
        ctx.launch(families::EMBEDDING_SORT_SCATTER, tiled, &args)?;
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
    ctx.launch_for_dtype(&families::EMBEDDING_BACKWARD, shape, &args)?;
    let args = [ids.into(), order.into(), partials.into(), gradient.into(), int(rows), int(hidden)];
    ctx.launch(families::EMBEDDING_BACKWARD_COMBINE, shape, &args)
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
    ctx.launch_for_dtype(
        &families::GATHER_ROWS,
        LaunchShape::linear(o.batch.min(MAX_BLOCKS), BLOCK_THREADS),
        &args,
    )
}
