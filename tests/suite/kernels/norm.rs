//! RMSNorm and its backward.

use super::*;

/// y, rstd.
fn rms_norm<R: Float>(sum: &[f64], weight: &[f64], eps: f64) -> (Vec<R>, Vec<R>) {
    let (sum, weight, eps) = (real::<R>(sum), real::<R>(weight), real::<R>(&[eps])[0]);
    let hidden = real::<R>(&[weight.len() as f64])[0];
    let (mut y, mut rstd) = (Vec::new(), Vec::new());
    for row in sum.chunks(weight.len()) {
        let squares = row.iter().fold(R::zero(), |all, &x| all + x * x);
        let scale = R::one() / (squares / hidden + eps).sqrt();
        y.extend(row.iter().zip(&weight).map(|(&x, &w)| x * scale * w));
        rstd.push(scale);
    }
    (y, rstd)
}

/// dx, dweight.
fn rms_norm_backward<R: Float>(
    [x, rstd, weight, dy, dsum]: [&[f64]; 5],
    before: &[f64],
) -> (Vec<R>, Vec<R>) {
    let [x, rstd, weight, dy, dsum] = [x, rstd, weight, dy, dsum].map(|values| real::<R>(values));
    let (mut dx, mut dweight) = (Vec::new(), real::<R>(before));
    let hidden = weight.len();
    for (row, &scale) in rstd.iter().enumerate() {
        let at = row * hidden;
        let n = |i: usize| x[at + i] * scale;
        let g = |i: usize| dy[at + i] * weight[i];
        let mean = (0..hidden).fold(R::zero(), |all, i| all + g(i) * n(i));
        let mean = mean / real::<R>(&[hidden as f64])[0];
        for i in 0..hidden {
            dx.push(dsum[at + i] + scale * (g(i) - n(i) * mean));
            dweight[i] = dweight[i] + dy[at + i] * n(i);
        }
    }
    (dx, dweight)
}

/// Rows, hidden, threads a row, rows at once: lanes without a column, rows left over, one and
/// several warps a row, several turns of a block.
const NORMS: [(usize, usize, u32, u32); 5] =
    [(1, 8, 8, 4), (5, 17, 16, 4), (9, 64, 8, 8), (5, 328, 32, 2), (9, 520, 64, 2)];

#[test]
fn rms_norm_adds_the_residual_and_normalises() {
    holds("rms_norm", rms_norm_is_right);
}

fn rms_norm_is_right(module: &Module) {
    for dtype in DTYPES {
        for (rows, hidden, width, at_once) in NORMS {
            let x = dtype.random(1, rows * hidden, 3.0);
            let residual = dtype.random(2, rows * hidden, 3.0);
            let weight = dtype.random(3, hidden, 1.0);
            let sum: Vec<f64> = x
                .iter()
                .zip(&residual)
                .map(|(x, r)| dtype.round_f64((*x as f32 + *r as f32).into()))
                .collect();
            let config = Config { grid: [2, 1, 1], block: [width, at_once, 1], shared: 0 };
            let entry = format!("rms_norm_{}", dtype.suffix());
            let bytes = dtype.bytes(&x);
            let tail = || {
                [
                    Piece::Out(bytes.len()),
                    Piece::Out(4 * rows),
                    value(rows as i32),
                    value(hidden as i32),
                    value(1e-5f32),
                ]
            };
            let [given, added, w] = [&x, &residual, &weight].map(|values| dtype.bytes(values));

            let mut pieces = vec![
                Piece::In(given.clone()),
                Piece::In(added),
                Piece::In(w.clone()),
                Piece::Out(bytes.len()),
            ];
            pieces.extend(tail());
            let got = run(module, &entry, config, &pieces);
            assert_eq!(dtype.values(&got[0]), sum, "the sum, rounded once");
            let (y, rstd) = rms_norm::<f64>(&sum, &weight, 1e-5);
            let (plain, plain_rstd) = rms_norm::<f32>(&sum, &weight, 1e-5);
            check("y", dtype, &got[1], &y, &plain);
            check("rstd", Dtype::F32, &got[2], &rstd, &plain_rstd);

            let mut pieces = vec![Piece::In(given), value(0u64), Piece::In(w), value(0u64)];
            pieces.extend(tail());
            let got = run(module, &entry, config, &pieces);
            let (y, _) = rms_norm::<f64>(&x, &weight, 1e-5);
            check("y alone", dtype, &got[0], &y, &rms_norm::<f32>(&x, &weight, 1e-5).0);
        }
    }
}

#[test]
fn rms_norm_goes_back_and_adds_to_the_weights_gradient() {
    holds("rms_norm", rms_norm_backward_is_right);
}

fn rms_norm_backward_is_right(module: &Module) {
    for dtype in DTYPES {
        for (rows, hidden, width, at_once) in NORMS {
            let count = rows * hidden;
            let (x, dy) = (dtype.random(1, count, 3.0), dtype.random(2, count, 1.0));
            let (weight, dsum) = (dtype.random(3, hidden, 1.0), dtype.random(4, count, 1.0));
            let rstd = Dtype::F32.random(5, rows, 0.5);
            let before = Dtype::F32.random(6, hidden, 1.0);
            let zeros = vec![0.0; count];
            let shared = at_once * hidden as u32 * 4;
            let config = Config { grid: [2, 1, 1], block: [width, at_once, 1], shared };
            for past in [Some(&dsum), None] {
                let all = [&x, &rstd, &weight, &dy, past.unwrap_or(&zeros)].map(Vec::as_slice);
                let (dx, dweight) = rms_norm_backward::<f64>(all, &before);
                let (plain_dx, plain_dweight) = rms_norm_backward::<f32>(all, &before);
                let pieces = [
                    Piece::In(dtype.bytes(&x)),
                    Piece::In(Dtype::F32.bytes(&rstd)),
                    Piece::In(dtype.bytes(&weight)),
                    Piece::In(dtype.bytes(&dy)),
                    past.map_or(value(0u64), |dsum| Piece::In(dtype.bytes(dsum))),
                    Piece::Out(count * dtype.size()),
                    Piece::Out(2 * hidden * 4),
                    value(rows as i32),
                    value(hidden as i32),
                ];
                let entry = format!("rms_norm_backward_{}", dtype.suffix());
                let got = run(module, &entry, config, &pieces);
                check("dx", dtype, &got[0], &dx, &plain_dx);

                let pieces = [
                    Piece::In(got[1].clone()),
                    Piece::Both(Dtype::F32.bytes(&before)),
                    value(2i32),
                    value(hidden as i32),
                ];
                let grid = [hidden.div_ceil(32) as u32, 1, 1];
                let config = Config { grid, block: [32, 8, 1], shared: 0 };
                let got = run(module, "rms_norm_backward_weight", config, &pieces);
                check("dweight", Dtype::F32, &got[0], &dweight, &plain_dweight);
            }
        }
    }
}

pub const RMS_NORM: Mutants = Mutants {
    kernel: "rms_norm",
    only: &[],
    mutants: &[
        ("mean_over_wrong_count", "/ hidden", "/ (hidden - 0.5f)"),
        ("residual_sum_not_stored", "column, values", "column, r"),
        ("row_sum_overwritten", "", ""),
        ("row_sum_read_early", "", ""),
    ],
    check: rms_norm_is_right,
};

pub const RMS_NORM_BACKWARD: Mutants = Mutants {
    kernel: "rms_norm",
    only: &[],
    mutants: &[
        ("mean_term_dropped", "values[i] * scale * mean", "0.0f"),
        ("dsum_dropped", "dsum != nullptr", "false"),
        ("dweight_assigned", "+=", "="),
        ("rows_added_early", "", ""),
        ("last_partial_dropped", "block < blocks;", "block < blocks - 1;"),
    ],
    check: rms_norm_backward_is_right,
};
