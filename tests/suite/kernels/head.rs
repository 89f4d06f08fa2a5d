//! The head and its cross-entropy.

use laam::tokens::IGNORE;

use super::*;

/// nll, argmax, and the gradient of the logits, `[rows, vocab]`.
fn cross_entropy<R: Float>(
    logits: &[f64],
    targets: &[u32],
    loss_scale: f32,
) -> (Vec<R>, Vec<u32>, Vec<R>) {
    let (logits, scale) = (real::<R>(logits), real::<R>(&[loss_scale.into()])[0]);
    let (mut nll, mut argmax, mut gradient) = (Vec::new(), Vec::new(), Vec::new());
    for (row, &target) in logits.chunks(logits.len() / targets.len()).zip(targets) {
        let best = (0..row.len()).fold(0, |best, id| if row[id] > row[best] { id } else { best });
        let sum = row.iter().fold(R::zero(), |sum, &z| sum + (z - row[best]).exp());
        let lse = row[best] + sum.ln();
        argmax.push(best as u32);
        nll.push(if target == IGNORE { R::zero() } else { lse - row[target as usize] });
        gradient.extend(row.iter().enumerate().map(|(id, &z)| match target {
            IGNORE => R::zero(),
            _ if id == target as usize => ((z - lse).exp() - R::one()) * scale,
            _ => (z - lse).exp() * scale,
        }));
    }
    (nll, argmax, gradient)
}

/// Some ignored, some the first or the last word, the others anywhere.
fn some_targets(rows: usize, vocab: usize) -> Vec<u32> {
    let one = |row: usize| match row % 5 {
        1 => IGNORE,
        2 => 0,
        3 => vocab as u32 - 1,
        _ => (row * 7919 % vocab) as u32,
    };
    (0..rows).map(one).collect()
}

fn index_bytes(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// The first `width` elements of rows `stride` apart, `size` bytes each.
fn rows_of(bytes: &[u8], size: usize, stride: usize, width: usize) -> Vec<u8> {
    bytes.chunks(stride * size).flat_map(|row| &row[..width * size]).copied().collect()
}

/// One row, one word; tails of vectors; more than one step of the block; rows for several blocks
/// and blocks without a row.
const CHUNKS: [(usize, usize, u32); 6] =
    [(1, 1, 32), (1, 7, 32), (5, 17, 64), (3, 512, 32), (7, 1031, 96), (2, 900, 256)];
const LOSS_SCALE: f32 = 0.037;

#[test]
fn logits_become_losses_and_their_gradients() {
    let Some(module) = module("head_logits") else { return };
    logits_are_right(&module);
}

fn logits_are_right(module: &Module) {
    for ty in TYPES {
        for (at, (rows, vocab, threads)) in CHUNKS.into_iter().enumerate() {
            // Rows apart by what vectors want, and by what they cannot use.
            let stride = if at % 2 == 0 { vocab.next_multiple_of(4) } else { vocab + 2 };
            // In steps: every large row has several largest logits, also side by side. Far from 0:
            // a sum without its shift would overflow.
            let step = if at < 3 { 0.25 } else { 16.0 };
            let logits: Vec<f64> = Type::F32
                .random(at as u64, rows * vocab, 40.0)
                .iter()
                .map(|z| (z / step).round() * step + 100.0)
                .collect();
            let targets = some_targets(rows, vocab);
            let (nll, argmax, gradient) = cross_entropy::<f64>(&logits, &targets, LOSS_SCALE);
            let (plain, _, plain_gradient) = cross_entropy::<f32>(&logits, &targets, LOSS_SCALE);
            let padded: Vec<f64> = logits
                .chunks(vocab)
                .flat_map(|row| row.iter().copied().chain(vec![7.0; stride - vocab]))
                .collect();
            let size = ty.size();
            for gradients in [Gradients::InPlace, Gradients::Apart, Gradients::None] {
                let memory = Type::F32.bytes(&padded);
                let (logits, dlogits, dlogits_stride) = match gradients {
                    Gradients::InPlace => (Piece::Both(memory), Piece::Same(0), stride * 4 / size),
                    Gradients::Apart => {
                        (Piece::In(memory), Piece::Both(vec![0; rows * stride * size]), stride)
                    }
                    Gradients::None => (Piece::In(memory), value(0u64), stride),
                };
                let pieces = [
                    logits,
                    Piece::In(index_bytes(&targets)),
                    Piece::In(LOSS_SCALE.to_le_bytes().to_vec()),
                    Piece::Out(4 * rows),
                    Piece::Out(4 * rows),
                    dlogits,
                    value(rows as i32),
                    value(vocab as i32),
                    value(stride as i32),
                    value(dlogits_stride as i32),
                ];
                let entry = format!("head_logits_{}", ty.suffix());
                let mut got = run(module, &entry, Config::linear(3, threads), &pieces);
                let written = match gradients {
                    Gradients::InPlace => Some(got.remove(0)),
                    Gradients::Apart => got.pop(),
                    Gradients::None => None,
                };
                check("nll", Type::F32, &got[0], &nll, &plain);
                assert_eq!(got[1], index_bytes(&argmax), "argmax");
                if let Some(written) = written {
                    let written = rows_of(&written, size, dlogits_stride, vocab);
                    check("dlogits", ty, &written, &gradient, &plain_gradient);
                }
            }
        }
    }
}

#[test]
fn mistakes_in_the_loss_of_logits_are_seen() {
    let bugs = [
        ("the last of equals", "b.at < a.at", "b.at > a.at"),
        ("the last of equals in a thread", "int i = N - 1; i >= 0; i--", "int i = 0; i < N; i++"),
        ("a sum not rescaled", "peak.sum *= exp2_approx((peak.max - top) * LOG2_E);", ""),
        ("no one-hot", "if (column + i == target) z[i] -= scale;", ""),
        (
            "read after it was written",
            "        __syncthreads();\n        if (column >= to)",
            "if (column >= to)",
        ),
        ("parts overwritten too early", "    __syncthreads();\n    return peak;", "return peak;"),
        ("gradient where ignored", "counts ? *loss_scale : 0.0f", "*loss_scale"),
        ("loss where ignored", "(peak.max - hit) : 0.0f", "(peak.max - hit) : peak.max"),
        ("tail forgotten", "turn<1>(z, gradient, whole", "turn<1>(z, gradient, vocab"),
        ("vectors where rows do not allow them", "&& stride % N == 0", ""),
        ("the sum in the wrong place", "scale / peak.sum", "peak.sum / scale"),
    ];
    planted("head_logits", &bugs, logits_are_right);
}

#[derive(Clone, Copy)]
enum Gradients {
    InPlace,
    Apart,
    None,
}
