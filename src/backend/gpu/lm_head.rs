//! LM head and cross-entropy: `kernels/fused_linear_cross_entropy.cu`, `kernels/cross_entropy.cu`.

use super::Options;
use super::launch_context::{LaunchContext, LaunchShape, int, scratch};
use crate::device::{Address, Arg, Matrix};
use crate::dtype::Dtype;
use crate::kernels::families;
use crate::kernels::geometry::{
    BLOCK_THREADS, LCE_BLOCK_ROWS as BLOCK_ROWS, LCE_MAX_HIDDEN, LCE_TILES, MMA_ROWS, WARP_SIZE,
};
use crate::llama::ops::FusedLinearCrossEntropy;

pub(super) fn workspace(o: &FusedLinearCrossEntropy, options: Options) -> usize {
    match FusedPlan::of(o, options.dtype, options.generic_lm_head) {
        Some(plan) => scratch(plan.scratch(o)),
        None => scratch(generic_scratch(o, options.dtype)),
    }
}

pub(super) fn loss(ctx: &mut LaunchContext, o: &FusedLinearCrossEntropy) -> anyhow::Result<()> {
    match FusedPlan::of(o, ctx.dtype, ctx.options.generic_lm_head) {
        Some(plan) => plan.loss(ctx, o),
        None => generic_loss(ctx, o),
    }
}

/// Logits of a chunk if the vocabulary is small: 2,048 rows of a vocabulary of 32,768.
const CHUNK_LOGITS: usize = 1 << 26;
/// Fewest rows of a chunk: each reads and writes the whole gradient of the LM head.
const MIN_CHUNK_ROWS: usize = 2048;

/// Rows per chunk of the generic path.
fn chunk_rows(vocab: usize, rows: usize) -> usize {
    (CHUNK_LOGITS / vocab).max(MIN_CHUNK_ROWS).min(rows)
}

/// Elements from one row of logits to the next: rows of an odd vocabulary (50,257) are padded, so that
/// each begins at a multiple of 16 bytes, which cuBLASLt's fast kernels need.
fn logits_stride(o: &FusedLinearCrossEntropy) -> usize {
    o.w.rows.next_multiple_of(8)
}

/// Bytes of a chunk's logits and of their gradient, which in f32 overwrites the logits.
fn generic_scratch(o: &FusedLinearCrossEntropy, dtype: Dtype) -> [usize; 2] {
    let logits = chunk_rows(o.w.rows, o.rows) * logits_stride(o);
    let separate = o.dx.is_some() && dtype != Dtype::F32;
    [4 * logits, if separate { dtype.size() * logits } else { 0 }]
}

/// Generic path: a matmul for the logits of a chunk of rows, softmax cross-entropy, and two matmuls of
/// dlogits, which have the compute dtype.
fn generic_loss(ctx: &mut LaunchContext, o: &FusedLinearCrossEntropy) -> anyhow::Result<()> {
    let (vocab, hidden, max_rows) = (o.w.rows, o.w.cols, chunk_rows(o.w.rows, o.rows));
    let stride = logits_stride(o);
    let dtype = ctx.dtype;
    let [logits, gradient] = generic_scratch(o, dtype).map(|bytes| ctx.scratch_alloc(bytes));
    let gradient = match o.dx {
        None => Address::NULL,
        Some(_) if dtype == Dtype::F32 => logits,
        Some(_) => gradient,
    };
    let threads = vocab.div_ceil(4).next_multiple_of(32).min(1024);
    for first in (0..o.rows).step_by(max_rows) {
        let rows = max_rows.min(o.rows - first);
        let part = |at: Address, dtype: Dtype| {
            Matrix::new(at.plus(first * hidden * dtype.size()), dtype, rows, hidden)
        };
        let x = part(ctx.ptr(o.x), dtype);
        ctx.matmul(
            x,
            ctx.weight_matrix(o.w).t(),
            Matrix::new(logits, Dtype::F32, rows, vocab).with_stride(stride),
            false,
        )?;
        let args = [
            logits.into(),
            ctx.ptr(o.targets).plus(4 * first).into(),
            ctx.control.loss_scale().into(),
            ctx.ptr(o.nll).plus(4 * first).into(),
            ctx.ptr(o.argmax).plus(4 * first).into(),
            gradient.into(),
            int(rows),
            int(vocab),
            int(stride),
            int(stride),
        ];
        ctx.launch_for_dtype(&families::CROSS_ENTROPY, LaunchShape::linear(rows, threads), &args)?;
        if let Some(dx) = o.dx {
            let dlogits = Matrix::new(gradient, dtype, rows, vocab).with_stride(stride);
            ctx.matmul(dlogits, ctx.weight_matrix(o.w), part(ctx.ptr(dx), dtype), false)?;
            ctx.matmul(dlogits.t(), x, ctx.gradient_matrix(o.w), true)?;
        }
    }
    Ok(())
}

/// Blocks that fill a GPU: two waves of three resident blocks on 132 SMs.
const FULL_GPU_BLOCKS: usize = 768;
/// Fewest streamed rows per split: below it, combining costs more than splitting saves.
const MIN_SPLIT_ROWS: usize = 512;

/// Launch plan of `kernels/fused_linear_cross_entropy.cu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FusedPlan {
    /// Padded hidden size: selects the kernel instance.
    width: usize,
    /// Rows rounded up to whole blocks.
    padded: usize,
    /// Split of the vocabulary in the lse pass.
    vocab_split: Split,
    /// Split of the rows in the grad pass.
    row_split: Split,
}

/// Split of the streamed rows: number of parts, rows per part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Split {
    parts: usize,
    size: usize,
}

impl Split {
    /// Splits `streamed` rows so that `blocks` blocks per part fill a GPU.
    fn new(streamed: usize, blocks: usize) -> Split {
        let max_parts = (streamed / MIN_SPLIT_ROWS).max(1);
        let parts = (FULL_GPU_BLOCKS / blocks).clamp(1, max_parts);
        let size = streamed.div_ceil(parts).next_multiple_of(BLOCK_ROWS);
        Split { parts: streamed.div_ceil(size), size }
    }
}

impl FusedPlan {
    /// Plan if the fused kernels apply: a 16-bit dtype, hidden at most 256, and not `generic`.
    fn of(o: &FusedLinearCrossEntropy, dtype: Dtype, generic: bool) -> Option<FusedPlan> {
        let (vocab, hidden) = (o.w.rows, o.w.cols);
        if generic || dtype == Dtype::F32 || hidden > LCE_MAX_HIDDEN {
            return None;
        }
        Some(FusedPlan {
            width: hidden.next_power_of_two().max(32),
            padded: o.rows.next_multiple_of(BLOCK_ROWS),
            vocab_split: Split::new(vocab, o.rows.div_ceil(BLOCK_ROWS)),
            row_split: Split::new(o.rows, vocab.div_ceil(BLOCK_ROWS)),
        })
    }

    /// Bytes of the intermediate results (`Scratch` in the kernel file) and of the partial sums of dw.
    fn scratch(&self, o: &FusedLinearCrossEntropy) -> [usize; 2] {
        let gradient = if o.dx.is_some() { self.width } else { 0 };
        let intermediates = 4 * self.padded + self.vocab_split.parts * self.padded * (3 + gradient);
        let parts =
            if o.dx.is_some() && self.row_split.parts > 1 { self.row_split.parts } else { 0 };
        [4 * intermediates, 4 * parts * o.w.len()]
    }

    fn loss(&self, ctx: &mut LaunchContext, o: &FusedLinearCrossEntropy) -> anyhow::Result<()> {
        let FusedPlan { width, padded, vocab_split, row_split } = *self;
        let (vocab, hidden) = (o.w.rows, o.w.cols);
        let [intermediates, parts] = self.scratch(o).map(|bytes| ctx.scratch_alloc(bytes));
        let [x, targets, nll, argmax] =
            [o.x, o.targets, o.nll, o.argmax].map(|buffer| ctx.ptr(buffer));
        let (w, scale) = (ctx.weight_ptr(o.w), ctx.control.loss_scale());
        let shape = [int(o.rows), int(vocab), int(hidden)];
        let [row_blocks, ..] = LCE_TILES[(width / 32).ilog2() as usize];
        let block = [WARP_SIZE * BLOCK_ROWS / (MMA_ROWS * row_blocks), 1, 1];
        let tiles = BLOCK_ROWS * (2 * width + 16);
        let args = |addresses: &[Address], rest: &[Arg]| -> Vec<Arg> {
            let addresses = addresses.iter().map(|&address| Arg::from(address));
            addresses.chain(shape).chain(rest.iter().copied()).collect()
        };

        let grid = [padded / BLOCK_ROWS, vocab_split.parts, 1];
        let gradient = i32::from(o.dx.is_some());
        ctx.launch(
            families::LCE_FWD_DX.sized(&[width], ctx.dtype)?,
            LaunchShape { grid, block, shared: tiles },
            &args(&[x, w, targets, intermediates], &[int(vocab_split.size), gradient.into()]),
        )?;
        let dx = o.dx.map_or(Address::NULL, |dx| ctx.ptr(dx));
        let rows = BLOCK_THREADS / WARP_SIZE;
        ctx.launch_for_dtype(
            &families::LCE_COMBINE,
            LaunchShape { grid: [padded / rows, 1, 1], block: [WARP_SIZE, rows, 1], shared: 0 },
            &args(
                &[w, targets, scale, intermediates, nll, argmax, dx],
                &[int(width), int(vocab_split.parts)],
            ),
        )?;
        if o.dx.is_none() {
            return Ok(());
        }

        let dw = ctx.gradient_ptr(o.w);
        let parts = if row_split.parts > 1 { parts } else { Address::NULL };
        let grid = [vocab.div_ceil(BLOCK_ROWS), row_split.parts, 1];
        ctx.launch(
            families::LCE_DW.sized(&[width], ctx.dtype)?,
            LaunchShape { grid, block, shared: tiles + 12 * BLOCK_ROWS },
            &args(&[x, w, scale, intermediates, dw, parts], &[int(row_split.size)]),
        )?;
        if row_split.parts > 1 {
            let count = o.w.len();
            ctx.launch(
                families::LCE_DW_COMBINE,
                LaunchShape::linear(count.div_ceil(BLOCK_THREADS).min(4096), BLOCK_THREADS),
                &[
                    parts.into(),
                    scale.into(),
                    dw.into(),
                    (count as u64).into(),
                    int(row_split.parts),
                ],
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_of_a_large_vocabulary_have_enough_rows() {
        for (vocab, rows, expected) in [
            (151_936, 16_384, 2048),
            (32_768, 16_384, 2048),
            (4096, 65_536, 16_384),
            (151_936, 7, 7),
        ] {
            assert_eq!(chunk_rows(vocab, rows), expected, "{vocab}");
        }
    }

    #[test]
    fn splits_cover_all_rows_without_empty_parts() {
        for streamed in [1, 63, 64, 511, 512, 513, 5_003, 32_768, 50_257, 128_256] {
            for blocks in [1, 3, 4, 5, 64, 256, 1000] {
                let Split { parts, size } = Split::new(streamed, blocks);
                assert!(size % BLOCK_ROWS == 0 && parts * size >= streamed);
                assert!((parts - 1) * size < streamed, "{streamed} rows, {blocks} blocks");
                assert!(
                    parts == 1
                        || parts * blocks <= FULL_GPU_BLOCKS
                            && size >= MIN_SPLIT_ROWS.min(streamed)
                );
            }
        }
    }
}
