//! The head and its cross-entropy: `kernels/fused_linear_cross_entropy.cu`, `kernels/cross_entropy.cu`.

use super::Options;
use super::launch_context::{LaunchContext, LaunchShape, int, scratch};
use crate::device::{Address, Arg, Matrix};
use crate::dtype::Dtype;
use crate::llama::ops::FusedLinearCrossEntropy;

pub(super) fn workspace(o: &FusedLinearCrossEntropy, options: Options) -> usize {
    match TwoPass::of(o, options.dtype, options.plain_head) {
        Some(passes) => scratch(passes.scratch(o)),
        None => scratch(plain_scratch(o, options.dtype)),
    }
}

pub(super) fn loss(ctx: &mut LaunchContext, o: &FusedLinearCrossEntropy) -> anyhow::Result<()> {
    match TwoPass::of(o, ctx.dtype, ctx.options.plain_head) {
        Some(passes) => passes.loss(ctx, o),
        None => plain_loss(ctx, o),
    }
}

/// Logits that exist at once at most: 2,048 rows of a vocabulary of 32,768.
const LOGITS: usize = 1 << 26;

/// Rows of a chunk of the plain path.
fn chunk(o: &FusedLinearCrossEntropy) -> usize {
    (LOGITS / o.w.rows).clamp(1, o.rows)
}

/// Logits and, unless it takes their memory, as in f32, their gradient.
fn plain_scratch(o: &FusedLinearCrossEntropy, dtype: Dtype) -> [usize; 2] {
    let logits = chunk(o) * o.w.rows;
    let separate = o.dx.is_some() && dtype != Dtype::F32;
    [4 * logits, if separate { dtype.size() * logits } else { 0 }]
}

/// The plain path: logits of some rows at a time in memory, by a product; their gradient in the
/// numbers of the next two products.
fn plain_loss(ctx: &mut LaunchContext, o: &FusedLinearCrossEntropy) -> anyhow::Result<()> {
    let (vocab, hidden, most) = (o.w.rows, o.w.cols, chunk(o));
    let dtype = ctx.dtype;
    let [logits, gradient] = plain_scratch(o, dtype).map(|bytes| ctx.scratch_alloc(bytes));
    let gradient = match o.dx {
        None => Address::NULL,
        Some(_) if dtype == Dtype::F32 => logits,
        Some(_) => gradient,
    };
    let threads = vocab.div_ceil(4).next_multiple_of(32).min(1024);
    for first in (0..o.rows).step_by(most) {
        let rows = most.min(o.rows - first);
        let part = |at: Address, dtype: Dtype| {
            Matrix::new(at.plus(first * hidden * dtype.size()), dtype, rows, hidden)
        };
        let x = part(ctx.ptr(o.x), dtype);
        ctx.matmul(
            x,
            ctx.weight_matrix(o.w).t(),
            Matrix::new(logits, Dtype::F32, rows, vocab),
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
            int(vocab),
            int(vocab),
        ];
        ctx.launch_for_dtype("cross_entropy", LaunchShape::linear(rows, threads), &args)?;
        if let Some(dx) = o.dx {
            let dlogits = Matrix::new(gradient, dtype, rows, vocab);
            ctx.matmul(dlogits, ctx.weight_matrix(o.w), part(ctx.ptr(dx), dtype), false)?;
            ctx.matmul(dlogits.t(), x, ctx.gradient_matrix(o.w), true)?;
        }
    }
    Ok(())
}

/// The widest hidden size the two passes take.
const MOST_HIDDEN: usize = 256;
/// Rows a block owns, of x in pass 1 and of w in pass 2.
const OWNED: usize = 128;
/// Blocks that keep a card busy: six for each of 132 multiprocessors, three of them at a time.
const BLOCKS: usize = 768;
/// Streamed rows a block takes at least: below it, the parts cost more than they save.
const LEAST: usize = 512;

/// The two passes without logits in memory, `kernels/fused_linear_cross_entropy.cu`: how they are cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct TwoPass {
    /// To which hidden is padded: the kernels' instance.
    width: usize,
    /// Rows, up to a whole number of blocks.
    padded: usize,
    /// Of the vocabulary in pass 1.
    words: Split,
    /// Of the rows in pass 2.
    rows: Split,
}

/// How many parts, each of how many streamed rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Split {
    parts: usize,
    size: usize,
}

impl Split {
    /// Cuts `streamed` rows so that `owners` blocks a part keep a card busy.
    fn new(streamed: usize, owners: usize) -> Split {
        let most = (streamed / LEAST).max(1);
        let parts = (BLOCKS / owners).clamp(1, most);
        let size = streamed.div_ceil(parts).next_multiple_of(OWNED);
        Split { parts: streamed.div_ceil(size), size }
    }
}

impl TwoPass {
    /// The one rule of what takes the two passes: two-byte numbers, at most 256 wide, and not told
    /// otherwise.
    fn of(o: &FusedLinearCrossEntropy, dtype: Dtype, plain: bool) -> Option<TwoPass> {
        let (vocab, hidden) = (o.w.rows, o.w.cols);
        if plain || dtype == Dtype::F32 || hidden > MOST_HIDDEN {
            return None;
        }
        Some(TwoPass {
            width: hidden.next_power_of_two().max(32),
            padded: o.rows.next_multiple_of(OWNED),
            words: Split::new(vocab, o.rows.div_ceil(OWNED)),
            rows: Split::new(o.rows, vocab.div_ceil(OWNED)),
        })
    }

    /// What the kernels hand each other (their `Scratch`), and the parts of pass 2.
    fn scratch(&self, o: &FusedLinearCrossEntropy) -> [usize; 2] {
        let gradient = if o.dx.is_some() { self.width } else { 0 };
        let between = 4 * self.padded + self.words.parts * self.padded * (3 + gradient);
        let parts = if o.dx.is_some() && self.rows.parts > 1 { self.rows.parts } else { 0 };
        [4 * between, 4 * parts * o.w.len()]
    }

    fn loss(&self, ctx: &mut LaunchContext, o: &FusedLinearCrossEntropy) -> anyhow::Result<()> {
        let TwoPass { width, padded, words, rows } = *self;
        let (vocab, hidden) = (o.w.rows, o.w.cols);
        let [between, parts] = self.scratch(o).map(|bytes| ctx.scratch_alloc(bytes));
        let [x, targets, nll, argmax] =
            [o.x, o.targets, o.nll, o.argmax].map(|buffer| ctx.ptr(buffer));
        let (w, scale) = (ctx.weight_ptr(o.w), ctx.control.loss_scale());
        let shape = [int(o.rows), int(vocab), int(hidden)];
        let block = [if width == MOST_HIDDEN { 256 } else { 128 }, 1, 1];
        let tiles = OWNED * (2 * width + 16);
        let args = |places: &[Address], rest: &[Arg]| -> Vec<Arg> {
            let places = places.iter().map(|&place| Arg::from(place));
            places.chain(shape).chain(rest.iter().copied()).collect()
        };

        let grid = [padded / OWNED, words.parts, 1];
        let gradient = i32::from(o.dx.is_some());
        ctx.launch_for_dtype(
            &format!("lce_fwd_dx_{width}"),
            LaunchShape { grid, block, shared: tiles },
            &args(&[x, w, targets, between], &[int(words.size), gradient.into()]),
        )?;
        let dx = o.dx.map_or(Address::NULL, |dx| ctx.ptr(dx));
        ctx.launch_for_dtype(
            "lce_combine",
            LaunchShape { grid: [padded / 8, 1, 1], block: [32, 8, 1], shared: 0 },
            &args(&[w, targets, scale, between, nll, argmax, dx], &[int(width), int(words.parts)]),
        )?;
        if o.dx.is_none() {
            return Ok(());
        }

        let dw = ctx.gradient_ptr(o.w);
        let parts = if rows.parts > 1 { parts } else { Address::NULL };
        let grid = [vocab.div_ceil(OWNED), rows.parts, 1];
        ctx.launch_for_dtype(
            &format!("lce_dw_{width}"),
            LaunchShape { grid, block, shared: tiles + 12 * OWNED },
            &args(&[x, w, scale, between, dw, parts], &[int(rows.size)]),
        )?;
        if rows.parts > 1 {
            let count = o.w.len();
            ctx.launch(
                "lce_dw_combine",
                LaunchShape::linear(count.div_ceil(256).min(4096), 256),
                &[parts.into(), scale.into(), dw.into(), (count as u64).into(), int(rows.parts)],
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_split_covers_everything_and_has_no_empty_part() {
        for streamed in [1, 63, 64, 511, 512, 513, 5_003, 32_768, 50_257, 128_256] {
            for owners in [1, 3, 4, 5, 64, 256, 1000] {
                let Split { parts, size } = Split::new(streamed, owners);
                assert!(size % OWNED == 0 && parts * size >= streamed);
                assert!((parts - 1) * size < streamed, "{streamed} rows, {owners} owners");
                assert!(parts == 1 || parts * owners <= BLOCKS && size >= LEAST.min(streamed));
            }
        }
    }
}
