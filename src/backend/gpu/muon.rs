//! Muon: `kernels/muon.cu`, and products of the device between.
//!
//! In f32 whatever the session's numbers are, as the other backends have it: the matrices are small
//! beside the batch, and the update is not what mixed precision is for.

use super::launcher::{Launcher, Shape, int, scratch};
use crate::device::{Address, Matrix, Type};
use crate::llama::ops::MuonStep;

/// Blocks at most. The order of the sum of squares is that of the launch, and must not depend on
/// the card.
const BLOCKS: usize = 512;
/// Bytes of `Rates` in `kernels/muon.cu`.
const RATES: usize = 16;
/// Newton-Schulz's coefficients, and how often it is done.
const FACTORS: [f32; 3] = [3.4445, -4.775, 2.0315];
const ITERATIONS: usize = 5;

fn blocks(len: usize) -> usize {
    len.div_ceil(4 * 256).min(BLOCKS)
}

/// Rates, shares of the sum of squares, the update, X, B X, A, A A.
fn pieces(o: &MuonStep) -> [usize; 7] {
    let (len, side) = (4 * o.w.len(), o.w.rows.min(o.w.cols));
    let square = 4 * side * side;
    [RATES, 8 * blocks(o.w.len()), len, len, len, square, square]
}

pub(super) fn workspace(o: &MuonStep) -> usize {
    scratch(pieces(o))
}

pub(super) fn step(l: &mut Launcher, o: &MuonStep) -> anyhow::Result<()> {
    let [rates, shares, u, x, bx, a, aa] = pieces(o).map(|bytes| l.take(bytes));
    let (rows, cols, len) = (o.w.rows, o.w.cols, o.w.len());
    let side = rows.min(cols);
    let shape = Shape::linear(blocks(len), 256);
    let count = (len as u64).into();
    let place = |arena: Address| arena.plus(4 * o.w.offset);
    let (parameters, moment) = (place(l.arenas.parameters), place(l.arenas.first_moment));

    let args = [
        l.control.muon_learning_rate().into(),
        l.at(o.norm).into(),
        l.scaling.into(),
        rates.into(),
        (o.max_grad_norm as f32).into(),
    ];
    l.launch("muon_rates", Shape::linear(1, 1), &args)?;
    let args = [
        l.gradient(o.w).into(),
        moment.into(),
        u.into(),
        shares.into(),
        count,
        rates.into(),
        o.momentum.into(),
    ];
    l.launch("muon_momentum", shape, &args)?;
    let args = [u.into(), shares.into(), x.into(), count, int(shape.grid[0])];
    l.launch("muon_scale_f32", shape, &args)?;

    let matrix = |at, rows, cols| Matrix::new(at, Type::F32, rows, cols);
    let (x_matrix, bx_matrix) = (matrix(x, rows, cols), matrix(bx, rows, cols));
    let (a_matrix, aa_matrix) = (matrix(a, side, side), matrix(aa, side, side));
    let squares = Shape::linear(blocks(side * side), 256);
    for _ in 0..ITERATIONS {
        // A tall matrix stands for its transpose; A is symmetric either way.
        let tall = rows > cols;
        if tall {
            l.product(x_matrix.t(), x_matrix, a_matrix, false)?;
        } else {
            l.product(x_matrix, x_matrix.t(), a_matrix, false)?;
        }
        l.product(a_matrix, a_matrix, aa_matrix, false)?;
        let [of_x, of_a, of_aa] = FACTORS;
        let args = [
            a.into(),
            aa.into(),
            a.into(),
            of_a.into(),
            of_aa.into(),
            ((side * side) as u64).into(),
        ];
        l.launch("muon_combine_f32", squares, &args)?;
        if tall {
            l.product(x_matrix, a_matrix, bx_matrix, false)?;
        } else {
            l.product(a_matrix, x_matrix, bx_matrix, false)?;
        }
        let args = [x.into(), bx.into(), x.into(), of_x.into(), 1.0f32.into(), count];
        l.launch("muon_combine_f32", shape, &args)?;
    }

    let factor = (rows as f64 / cols as f64).max(1.0).sqrt();
    let args = [
        x.into(),
        parameters.into(),
        Address::NULL.into(),
        count,
        rates.into(),
        o.decay.into(),
        factor.into(),
    ];
    l.launch("muon_update_f32", shape, &args)?;
    if l.numbers == Type::F32 {
        return Ok(());
    }
    let args = [parameters.into(), l.weight(o.w).into(), count];
    l.launch(&format!("cast_f32_{}", l.numbers.suffix()), shape, &args)
}
