//! Muon: `kernels/muon.cu` and matmuls of the device, batched over all matrices of a shape.
//!
//! Momentum, norm and update are in f32 whatever the compute dtype. So is Newton-Schulz for small matrices; for
//! large ones its matrices are in f16 if the compute dtype has 16 bits.

use super::launch_context::{LaunchContext, LaunchShape, int, scratch};
use crate::device::{Address, Matrix};
use crate::dtype::Dtype;
use crate::kernels::families;
use crate::kernels::geometry::{BLOCK_THREADS, MUON_PARAMS_BYTES};
use crate::llama::newton_schulz::{COEFFICIENTS, NewtonSchulzStep, steps};
use crate::llama::ops::MuonStep;

/// Grid limit per matrix. The order of the sum of squares is fixed by the launch, which must not depend
/// on the GPU.
const MAX_BLOCKS: usize = 512;
/// Most elements per batch: beyond it, scratch memory costs more than the saved launches.
const MAX_BATCH_ELEMENTS: usize = 1 << 24;

fn blocks(len: usize) -> usize {
    len.div_ceil(4 * BLOCK_THREADS).min(MAX_BLOCKS)
}

/// Matrices per batch.
fn matrices_per_batch(o: &MuonStep) -> usize {
    let (rows, cols) = o.shape();
    if !o.batched {
        return 1;
    }
    (MAX_BATCH_ELEMENTS / (rows * cols)).clamp(1, o.matrices.len())
}

/// Dtype of the Newton-Schulz matrices.
fn matrix_dtype(o: &MuonStep, compute: Dtype) -> Dtype {
    if o.half && compute != Dtype::F32 { Dtype::F16 } else { Dtype::F32 }
}

/// Step parameters, partial sums of squares, u in f32, two of X (in f32, u is one of them), R, Z, Q and a
/// result of a matmul.
fn scratch_bytes(o: &MuonStep, compute: Dtype) -> [usize; 9] {
    let ((rows, cols), count) = (o.shape(), matrices_per_batch(o));
    let (len, side) = (rows * cols, rows.min(cols));
    let size = matrix_dtype(o, compute).size();
    let (x, square) = (size * count * len, size * count * side * side);
    let first = if size == 4 { 0 } else { x };
    let partials = 8 * count * blocks(len);
    [MUON_PARAMS_BYTES, partials, 4 * count * len, first, x, square, square, square, square]
}

pub(super) fn workspace(o: &MuonStep, compute: Dtype) -> usize {
    scratch(scratch_bytes(o, compute))
}

/// Start of each matrix in the arenas, as the kernels read it.
pub(super) fn table(o: &MuonStep) -> Vec<u8> {
    o.matrices.iter().flat_map(|w| (w.offset as u64).to_le_bytes()).collect()
}

pub(super) fn step(ctx: &mut LaunchContext, o: &MuonStep) -> anyhow::Result<()> {
    let buffers = scratch_bytes(o, ctx.dtype).map(|bytes| ctx.scratch_alloc(bytes));
    let params = buffers[0];
    let args = [
        ctx.control.muon_learning_rate().into(),
        ctx.ptr(o.norm).into(),
        ctx.scaling.into(),
        params.into(),
        (o.max_grad_norm as f32).into(),
    ];
    ctx.launch(families::MUON_STEP_PARAMS, LaunchShape::linear(1, 1), &args)?;
    let per_batch = matrices_per_batch(o);
    for first in (0..o.matrices.len()).step_by(per_batch) {
        let batch = per_batch.min(o.matrices.len() - first);
        step_batch(ctx, o, buffers, ctx.constant_table().plus(8 * first), batch)?;
    }
    Ok(())
}

/// Step of `batch` matrices that start at `offsets`.
fn step_batch(
    ctx: &mut LaunchContext,
    o: &MuonStep,
    buffers: [Address; 9],
    offsets: Address,
    batch: usize,
) -> anyhow::Result<()> {
    let [params, partials, u, x_half, x_next, squares @ ..] = buffers;
    let (rows, cols) = o.shape();
    let len = rows * cols;
    let dtype = matrix_dtype(o, ctx.dtype);
    let x = if dtype == Dtype::F32 { u } else { x_half };
    let shape =
        LaunchShape { grid: [blocks(len), batch, 1], block: [BLOCK_THREADS, 1, 1], shared: 0 };
    let args = [
        ctx.arenas.gradients.into(),
        ctx.arenas.first_moment.into(),
        u.into(),
        partials.into(),
        offsets.into(),
        (len as u64).into(),
        params.into(),
        o.momentum.into(),
    ];
    ctx.launch(families::MUON_MOMENTUM, shape, &args)?;
    let args = [u.into(), partials.into(), x.into(), (len as u64).into(), int(shape.grid[0])];
    ctx.launch(families::MUON_NORMALIZE.of(dtype)?, shape, &args)?;

    let x = orthogonalize(ctx, (rows, cols), dtype, batch, [x, x_next], u, squares)?;
    let copies = if ctx.dtype == Dtype::F32 { Address::NULL } else { ctx.arenas.weights };
    let args = [
        x.into(),
        ctx.arenas.parameters.into(),
        copies.into(),
        offsets.into(),
        (len as u64).into(),
        params.into(),
        o.weight_decay.into(),
        (rows as f64 / cols as f64).max(1.0).sqrt().into(),
    ];
    ctx.launch_for_dtype(&families::MUON_UPDATE, shape, &args)
}

/// Newton-Schulz of `batch` matrices at `x`, computed in turns at both of its places. Returns the place of
/// the result in f32: one of them, or `out` if they are in f16.
fn orthogonalize(
    ctx: &mut LaunchContext,
    (rows, cols): (usize, usize),
    dtype: Dtype,
    batch: usize,
    [mut x, mut next]: [Address; 2],
    out: Address,
    [r, mut z, mut q, mut product]: [Address; 4],
) -> anyhow::Result<Address> {
    let (tall, side) = (rows > cols, rows.min(cols));
    let rectangle = |at| Matrix::new(at, dtype, rows, cols);
    let square = |at| Matrix::new(at, dtype, side, side);
    let steps = steps(rows, cols);
    for (at, step) in steps.iter().enumerate() {
        match step {
            NewtonSchulzStep::Gram => {
                let x = rectangle(x);
                let (left, right) = if tall { (x.t(), x) } else { (x, x.t()) };
                ctx.batched_matmul(batch, left, right, square(r))?;
            }
            NewtonSchulzStep::Polynomial => {
                ctx.batched_matmul(batch, square(r), square(r), square(z))?;
                let grid = [blocks(side * side), batch, 1];
                let shape = LaunchShape { grid, block: [BLOCK_THREADS, 1, 1], shared: 0 };
                let [a, b, c] = COEFFICIENTS.map(|c| c as f32);
                let args = [r.into(), z.into(), a.into(), b.into(), c.into(), int(side)];
                ctx.launch(families::MUON_POLYNOMIAL.of(dtype)?, shape, &args)?;
            }
            NewtonSchulzStep::Conjugate => {
                ctx.batched_matmul(batch, square(z), square(r), square(product))?;
                ctx.batched_matmul(batch, square(product), square(z), square(r))?;
            }
            NewtonSchulzStep::Begin => (z, q) = (q, z),
            NewtonSchulzStep::Compose => {
                ctx.batched_matmul(batch, square(z), square(q), square(product))?;
                (q, product) = (product, q);
            }
            NewtonSchulzStep::Apply => {
                let is_last = at + 1 == steps.len();
                let into = if is_last && dtype != Dtype::F32 {
                    Matrix::new(out, Dtype::F32, rows, cols)
                } else {
                    rectangle(next)
                };
                let (x_matrix, q) = (rectangle(x), square(q));
                let (left, right) = if tall { (x_matrix, q.t()) } else { (q, x_matrix) };
                ctx.batched_matmul(batch, left, right, into)?;
                (x, next) = (into.at, x);
            }
        }
    }
    Ok(x)
}
