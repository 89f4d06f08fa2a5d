//! Matmuls in bfloat16 by tiles: operands are rounded and packed to whole tiles, padded with 0; sums are f32.
//!
//! Each output is one sum in the order of the inner dimension: its bits depend neither on the number of threads
//! nor on the number of rows.

use std::cell::Cell;

use bytemuck::Zeroable;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::super::matmul::{MatmulThreads, MatrixView, is_large};
use super::TileUnit;
use super::microkernel::{BLOCK, ConfiguredTiles, Tile};
use crate::llama::Op;

/// Components of the inner dimension per tile.
const TILE_INNER: usize = 32;

thread_local! {
    /// A thread's packed rows of the left operand, and a matmul's packed right operand, kept between matmuls.
    static LEFT: Cell<Vec<Tile>> = const { Cell::new(Vec::new()) };
    static RIGHT: Cell<Vec<Tile>> = const { Cell::new(Vec::new()) };
}

/// Bytes of an operation's packed right operand.
pub(in super::super) fn workspace(op: &Op) -> usize {
    let (inner, columns) = match op {
        Op::Linear(o) => (o.w.cols, o.w.rows),
        Op::LinearBackwardInput(o) => (o.w.rows, o.w.cols),
        Op::LinearBackwardWeight(o) => (o.rows, o.w.cols),
        _ => return 0,
    };
    inner.div_ceil(TILE_INNER) * columns.div_ceil(BLOCK) * 2 * size_of::<Tile>()
}

/// `out = a b`, or `out += a b`; out is `[a.rows, b.cols]`, row-major.
pub(in super::super) fn matmul(
    unit: TileUnit,
    out: &mut [f32],
    accumulate: bool,
    a: MatrixView,
    b: MatrixView,
    threads: MatmulThreads,
) {
    assert!(a.cols == b.rows && a.cols > 0);
    assert_eq!(out.len(), a.rows * b.cols);
    let (arch, columns) = (Arch::new(), b.cols);
    // Tiles of 32 rows or columns.
    let strip = 2 * a.cols.div_ceil(TILE_INNER);
    let b = b.transposed();
    let pack = |(panel, out): (usize, &mut [Tile])| {
        arch.dispatch(PackStrip { lines: b, first: panel * BLOCK, side: Side::Right, out });
    };
    let strips = a.rows.div_ceil(BLOCK);
    // Few enough for many threads, and several if there are many, so that each task's panels serve several.
    let task_strips = (strips / 32).clamp(1, 4);
    let task_rows = task_strips * BLOCK;
    let mut right = RIGHT.take();
    right.resize(right.len().max(columns.div_ceil(BLOCK) * strip), Tile::zeroed());
    let packed = &mut right[..columns.div_ceil(BLOCK) * strip];
    if threads == MatmulThreads::All && is_large(a, columns) {
        packed.par_chunks_mut(strip).enumerate().for_each(pack);
        let packed = &*packed;
        out.par_chunks_mut(task_rows * columns).enumerate().for_each(|(task, out)| {
            multiply_rows(unit, arch, a, task * task_rows, packed, out, columns, accumulate);
        });
    } else {
        packed.chunks_mut(strip).enumerate().for_each(pack);
        for (task, out) in out.chunks_mut(task_rows * columns).enumerate() {
            multiply_rows(unit, arch, a, task * task_rows, packed, out, columns, accumulate);
        }
    }
    RIGHT.set(right);
}

/// One task: the rows of `a` from `first` on, as many as `out` has, times the packed right operand.
fn multiply_rows(
    unit: TileUnit,
    arch: Arch,
    a: MatrixView,
    first: usize,
    right: &[Tile],
    out: &mut [f32],
    columns: usize,
    accumulate: bool,
) {
    let strip = 2 * a.cols.div_ceil(TILE_INNER);
    let strips = (out.len() / columns).div_ceil(BLOCK);
    let mut left = LEFT.take();
    left.resize(left.len().max(strips * strip), Tile::zeroed());
    let packed = &mut left[..strips * strip];
    for (at, out) in packed.chunks_mut(strip).enumerate() {
        arch.dispatch(PackStrip { lines: a, first: first + at * BLOCK, side: Side::Left, out });
    }
    let mut tiles = unit.configure();
    for (panel, right) in right.chunks(strip).enumerate() {
        for (left, out) in packed.chunks(strip).zip(out.chunks_mut(BLOCK * columns)) {
            multiply_block(&mut tiles, left, right, out, columns, panel * BLOCK, accumulate);
        }
    }
    drop(tiles);
    LEFT.set(left);
}

/// At most 32 rows of outputs, and at most 32 of their columns, from `column` on.
fn multiply_block(
    tiles: &mut ConfiguredTiles,
    left: &[Tile],
    right: &[Tile],
    out: &mut [f32],
    columns: usize,
    column: usize,
    accumulate: bool,
) {
    let width = BLOCK.min(columns - column);
    if out.len() == BLOCK * columns && width == BLOCK {
        return tiles.multiply(left, right, &mut out[column..], columns, accumulate);
    }
    // At the edges: whole tiles, of which a part is stored.
    let mut whole = [0.0; BLOCK * BLOCK];
    if accumulate {
        for (whole, out) in whole.chunks_mut(BLOCK).zip(out.chunks(columns)) {
            whole[..width].copy_from_slice(&out[column..column + width]);
        }
    }
    tiles.multiply(left, right, &mut whole, BLOCK, accumulate);
    for (whole, out) in whole.chunks(BLOCK).zip(out.chunks_mut(columns)) {
        out[column..column + width].copy_from_slice(&whole[..width]);
    }
}

/// The side of an operand, which gives the order of a packed tile.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    /// A row per line, its pairs side by side.
    Left,
    /// A column per line, its pairs below each other (VNNI).
    Right,
}

/// Packs 32 lines of `[lines, inner]` from `first` on: rows of the left operand, or columns of the right one. Per
/// 32 components of the inner dimension there are two tiles, of 16 lines each.
struct PackStrip<'a> {
    lines: MatrixView<'a>,
    first: usize,
    side: Side,
    out: &'a mut [Tile],
}

impl WithSimd for PackStrip<'_> {
    type Output = ();

    /// Plain loops, compiled for the processor's vectors.
    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { lines, first, side, out } = self;
        for (at, tiles) in out.chunks_exact_mut(2).enumerate() {
            let from = at * TILE_INNER;
            for (half, tile) in tiles.iter_mut().enumerate() {
                let first = first + 16 * half;
                let (block, order) = if lines.col_stride == 1 {
                    (pairs_of_lines(&lines, first, from), Side::Left)
                } else {
                    (lines_of_pairs(&lines, first, from), Side::Right)
                };
                tile.0 = if order == side { block } else { transposed(&block) };
            }
        }
    }
}

/// 16 lines of 16 pairs, of a matrix whose lines are contiguous.
#[inline(always)]
fn pairs_of_lines(lines: &MatrixView, first: usize, from: usize) -> [[u32; 16]; 16] {
    let mut block = [[0; 16]; 16];
    let to = (from + TILE_INNER).min(lines.cols);
    for (line, out) in (first..lines.rows).zip(&mut block) {
        let values: [f32; 32] = padded(&lines.data[line * lines.row_stride..][from..to]);
        let mut bits = [0; 32];
        for (bits, value) in bits.iter_mut().zip(values) {
            *bits = to_bf16(value) as u16;
        }
        // The first of a pair has the lower address, and the low bits on the processors that laam runs on.
        *out = bytemuck::cast(bits);
    }
    block
}

/// 16 pairs of 16 lines, of a matrix whose components are contiguous from line to line.
#[inline(always)]
fn lines_of_pairs(lines: &MatrixView, first: usize, from: usize) -> [[u32; 16]; 16] {
    assert_eq!(lines.row_stride, 1);
    let mut block = [[0; 16]; 16];
    for (pair, out) in block.iter_mut().enumerate() {
        let low = component_of_lines(lines, first, from + 2 * pair);
        let high = component_of_lines(lines, first, from + 2 * pair + 1);
        for (out, (low, high)) in out.iter_mut().zip(low.into_iter().zip(high)) {
            *out = to_bf16(low) | to_bf16(high) << 16;
        }
    }
    block
}

/// One component of 16 lines, 0 beyond the last line and the last component.
#[inline(always)]
fn component_of_lines(lines: &MatrixView, first: usize, component: usize) -> [f32; 16] {
    let to = (first + 16).min(lines.rows);
    if component < lines.cols && first < to {
        padded(&lines.data[component * lines.col_stride..][first..to])
    } else {
        [0.0; 16]
    }
}

/// The values, and 0 beyond them.
#[inline(always)]
fn padded<const N: usize>(values: &[f32]) -> [f32; N] {
    if let Some(whole) = values.first_chunk() {
        return *whole;
    }
    let mut whole = [0.0; N];
    whole[..values.len()].copy_from_slice(values);
    whole
}

/// The bits of a value in bf16, rounded to nearest, ties to even.
#[inline(always)]
fn to_bf16(x: f32) -> u32 {
    let bits = x.to_bits();
    // Rounding could carry a NaN's bits into infinity's or into the sign.
    if x.is_nan() { bits >> 16 | 0x40 } else { (bits + 0x7fff + (bits >> 16 & 1)) >> 16 }
}

#[inline(always)]
fn transposed(block: &[[u32; 16]; 16]) -> [[u32; 16]; 16] {
    let mut out = [[0; 16]; 16];
    for (r, row) in block.iter().enumerate() {
        for (c, &pair) in row.iter().enumerate() {
            out[c][r] = pair;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::super::{Amx, model};
    use super::*;
    use crate::random::{Philox, Stream};

    /// Rows, inner dimension, columns.
    const SHAPES: [(usize, usize, usize); 7] = [
        (1, 1, 1),
        (32, 32, 32),
        (33, 31, 65),
        (64, 77, 96),
        (5, 200, 34),
        (90, 33, 1),
        (1100, 9, 40),
    ];

    fn random(len: usize, sequence: usize) -> Vec<f32> {
        let mut values = vec![0.0; len];
        Philox::new(13, Stream::Test).fill_normal(sequence as u32, 1.0, &mut values);
        values
    }

    /// A view of `[rows, cols]`, either row-major or the transpose of a row-major matrix.
    fn view(values: &[f32], rows: usize, cols: usize, transposed: bool) -> MatrixView<'_> {
        if transposed {
            MatrixView::new(values, cols, rows).transposed()
        } else {
            MatrixView::new(values, rows, cols)
        }
    }

    fn at(view: &MatrixView, row: usize, column: usize) -> f32 {
        view.data[row * view.row_stride + column * view.col_stride]
    }

    /// Every case of shape, layouts, accumulation and threads: `check(case, a, b, out before, accumulate, threads)`.
    fn for_each_case(check: impl Fn(&str, MatrixView, MatrixView, &[f32], bool, MatmulThreads)) {
        for (case, (m, k, n)) in SHAPES.into_iter().enumerate() {
            for (a_transposed, b_transposed) in
                [(false, false), (false, true), (true, false), (true, true)]
            {
                let (a, b) = (random(m * k, 3 * case), random(k * n, 3 * case + 1));
                let (a, b) = (view(&a, m, k, a_transposed), view(&b, k, n, b_transposed));
                for (accumulate, threads) in
                    [(false, MatmulThreads::One), (true, MatmulThreads::All)]
                {
                    let before = if accumulate {
                        random(m * n, 3 * case + 2)
                    } else {
                        vec![f32::NAN; m * n]
                    };
                    let what = format!(
                        "{m} x {k} x {n}, transposed: {a_transposed} {b_transposed}, += {accumulate}"
                    );
                    check(&what, a, b, &before, accumulate, threads);
                }
            }
        }
    }

    /// Fills this thread's packed operands with NaN.
    fn poison() {
        for buffer in [&LEFT, &RIGHT] {
            buffer.set(vec![Tile([[0x7fc0_7fc0; 16]; 16]); 256]);
        }
    }

    /// Exactly rounded operands; the sum's error is at most that of as many additions in f32.
    #[test]
    fn tile_matmul_matches_f64() {
        for_each_case(|what, a, b, before, accumulate, threads| {
            poison();
            let mut out = before.to_vec();
            matmul(TileUnit::Model, &mut out, accumulate, a, b, threads);
            assert!(!model::is_configured(), "{what}: tiles are left configured");
            for (place, &got) in out.iter().enumerate() {
                let (row, column) = (place / b.cols, place % b.cols);
                let old = if accumulate { f64::from(before[place]) } else { 0.0 };
                let (mut exact, mut size) = (old, old.abs());
                for k in 0..a.cols {
                    let [x, y] = [at(&a, row, k), at(&b, k, column)]
                        .map(|x| f64::from(bf16::from_f32(x).to_f32()));
                    exact += x * y;
                    size += (x * y).abs();
                }
                let error = (f64::from(got) - exact).abs();
                let bound = a.cols as f64 / 2.0 * f64::from(f32::EPSILON) * size;
                assert!(error <= bound, "{what}: {row}, {column}: {got}, {exact} exactly");
            }
        });
    }

    #[test]
    fn tile_matmul_bits_do_not_depend_on_threads_or_rows() {
        let (m, k, n) = (1100, 40, 50);
        let (a, b) = (random(m * k, 90), random(k * n, 91));
        let run = |rows: usize, count| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(count).build().unwrap();
            let mut out = vec![f32::NAN; rows * n];
            let (a, b) = (MatrixView::new(&a[..rows * k], rows, k), MatrixView::new(&b, k, n));
            pool.install(|| matmul(TileUnit::Model, &mut out, false, a, b, MatmulThreads::All));
            out
        };
        let one = run(m, 1);
        assert!(one == run(m, 3), "three threads");
        assert!(one[..37 * n] == run(37, 1), "37 rows");
    }

    #[test]
    fn conversion_to_bf16_rounds_to_nearest_even() {
        let steps = (0..1 << 16).map(|at: u32| at * 65_537);
        let edges =
            [0, 0x3f80_8000, 0x3f81_8000, 0x7f7f_ffff, 0x7f80_0000, 0x7fff_ffff, 0xffff_ffff];
        for x in steps.chain(edges).map(f32::from_bits) {
            let got = bf16::from_bits(to_bf16(x) as u16);
            let expected = bf16::from_f32(x);
            assert!(
                got == expected || got.is_nan() && x.is_nan(),
                "{x:e}: {got:e}, not {expected:e}"
            );
        }
    }

    /// Also of infinities, NaN, denormals, and sums that overflow.
    #[test]
    fn model_is_bitwise_equal_to_the_hardware() {
        let Some(amx) = Amx::detect() else {
            eprintln!(
                "SKIPPED: this processor has no AMX tiles: the model was compared with nothing"
            );
            return;
        };
        let same = |what: &str,
                    a: MatrixView,
                    b: MatrixView,
                    before: &[f32],
                    accumulate: bool,
                    threads: MatmulThreads| {
            let run = |unit| {
                let mut out = before.to_vec();
                matmul(unit, &mut out, accumulate, a, b, threads);
                let bits = |x: &f32| if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() };
                out.iter().map(bits).collect::<Vec<u32>>()
            };
            let (hardware, model) = (run(TileUnit::Hardware(amx)), run(TileUnit::Model));
            let differ = hardware.iter().zip(&model).filter(|(a, b)| a != b).count();
            assert_eq!(differ, 0, "{what}: of {} outputs", model.len());
        };
        for_each_case(same);
        let scales = [1e-38, 1e-30, 1e-20, 1.0, 1e20, 1e38];
        for (case, (x, y)) in scales.into_iter().flat_map(|x| scales.map(|y| (x, y))).enumerate() {
            let [mut a, mut b] = [0, 1].map(|at| random(1 << 12, 200 + 2 * case + at));
            for (values, scale) in [(&mut a, x), (&mut b, y)] {
                for value in values {
                    *value *= scale;
                }
            }
            if case == 0 {
                (a[70], a[700], b[5]) = (f32::INFINITY, f32::NAN, f32::NEG_INFINITY);
            }
            let what = format!("values of {x:e} and {y:e}");
            let [a, b] = [&a, &b].map(|values| MatrixView::new(values, 64, 64));
            same(&what, a, b, &vec![1e-38; 1 << 12], true, MatmulThreads::One);
        }
    }
}
