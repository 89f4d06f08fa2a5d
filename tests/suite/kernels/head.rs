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
    let Some(module) = module("cross_entropy") else { return };
    logits_are_right(&module);
}

fn logits_are_right(module: &Module) {
    for dtype in DTYPES {
        for (at, (rows, vocab, threads)) in CHUNKS.into_iter().enumerate() {
            // Rows apart by what vectors want, and by what they cannot use.
            let stride = if at % 2 == 0 { vocab.next_multiple_of(4) } else { vocab + 2 };
            // In steps: every large row has several largest logits, also side by side. Far from 0:
            // a sum without its shift would overflow.
            let step = if at < 3 { 0.25 } else { 16.0 };
            let logits: Vec<f64> = Dtype::F32
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
            let size = dtype.size();
            for gradients in [Gradients::InPlace, Gradients::Apart, Gradients::None] {
                let memory = Dtype::F32.bytes(&padded);
                let (logits, dlogits, dlogits_stride) = match gradients {
                    Gradients::InPlace => (Piece::Both(memory), Piece::At(0, 0), stride * 4 / size),
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
                let entry = format!("cross_entropy_{}", dtype.suffix());
                let mut got = run(module, &entry, Config::linear(3, threads), &pieces);
                let written = match gradients {
                    Gradients::InPlace => Some(got.remove(0)),
                    Gradients::Apart => got.pop(),
                    Gradients::None => None,
                };
                check("nll", Dtype::F32, &got[0], &nll, &plain);
                assert_eq!(got[1], index_bytes(&argmax), "argmax");
                if let Some(written) = written {
                    let written = rows_of(&written, size, dlogits_stride, vocab);
                    check("dlogits", dtype, &written, &gradient, &plain_gradient);
                }
            }
        }
    }
}

#[derive(Clone, Copy)]
enum Gradients {
    InPlace,
    Apart,
    None,
}

/// What the two passes are told; the loss alone without `dw`.
struct Head {
    rows: usize,
    vocab: usize,
    hidden: usize,
    /// Words a split in pass 1, rows a split in pass 2.
    splits: (usize, usize),
    /// Whether x and w begin where a vector may.
    aligned: bool,
}

/// nll, argmax, dx, dw.
type Outcome<R> = (Vec<R>, Vec<u32>, Vec<R>, Vec<R>);

impl Head {
    fn exact<R: Float>(
        &self,
        [x, w, dw]: [&[f64]; 3],
        targets: &[u32],
        round: impl Fn(R) -> R,
    ) -> Outcome<R> {
        let hidden = self.hidden;
        let (x, w, mut dw) = (real::<R>(x), real::<R>(w), real::<R>(dw));
        let scale = real::<R>(&[LOSS_SCALE.into()])[0];
        let (mut nll, mut argmax, mut dx) = (Vec::new(), Vec::new(), vec![R::zero(); x.len()]);
        for (row, &target) in targets.iter().enumerate() {
            let x = &x[row * hidden..][..hidden];
            let dot = |w: &[R]| x.iter().zip(w).fold(R::zero(), |sum, (&a, &b)| sum + a * b);
            let z: Vec<R> = w.chunks(hidden).map(dot).collect();
            let best = (0..z.len()).fold(0, |best, id| if z[id] > z[best] { id } else { best });
            argmax.push(best as u32);
            if target == IGNORE {
                nll.push(R::zero());
                continue;
            }
            let sum = z.iter().fold(R::zero(), |sum, &z_id| sum + (z_id - z[best]).exp());
            let lse = z[best] + sum.ln();
            nll.push(lse - z[target as usize]);
            for (id, &z) in z.iter().enumerate() {
                let hit = if id == target as usize { R::one() } else { R::zero() };
                let d = round(((z - lse).exp() - hit) * scale);
                for i in 0..hidden {
                    dx[row * hidden + i] = dx[row * hidden + i] + d * w[id * hidden + i];
                    dw[id * hidden + i] = dw[id * hidden + i] + d * x[i];
                }
            }
        }
        (nll, argmax, dx, dw)
    }

    /// The launches, as src/backend/gpu/lm_head.rs makes them; nll, argmax, dx, dw as bytes, the last two
    /// with `training`.
    fn run(
        &self,
        module: &Module,
        dtype: Dtype,
        [x, w, dw]: [&[f64]; 3],
        targets: &[u32],
        training: bool,
    ) -> Vec<Vec<u8>> {
        let Head { rows, vocab, hidden, splits: (split_words, split_rows), aligned } = *self;
        let width = hidden.next_power_of_two().max(32);
        let threads = if width == 256 { 256 } else { 128 };
        let splits = (vocab.div_ceil(split_words), rows.div_ceil(split_rows));
        let padded = rows.next_multiple_of(128);
        let words = 4 * padded + splits.0 * padded * if training { 3 + width } else { 3 };
        let offset = if aligned { 0 } else { 2 };
        let operand = |values: &[f64]| Piece::In([vec![0; offset], dtype.bytes(values)].concat());
        let memory = [
            operand(x),
            operand(w),
            Piece::In(index_bytes(targets)),
            Piece::In(LOSS_SCALE.to_le_bytes().to_vec()),
            Piece::Scratch(4 * words),
            Piece::Out(4 * rows),
            Piece::Out(4 * rows),
            if training { Piece::Out(2 * rows * hidden) } else { Piece::Null },
            if training { Piece::Both(Dtype::F32.bytes(dw)) } else { Piece::Null },
            if splits.1 > 1 { Piece::Scratch(4 * splits.1 * vocab * hidden) } else { Piece::Null },
        ];
        let at = |at| Piece::At(at, if at < 2 { offset as u64 } else { 0 });
        let number = |number: usize| value(number as i32);
        let [x, w, targets, scale, scratch, nll, argmax, dx, dw, partials] =
            [0, 1, 2, 3, 4, 5, 6, 7, 8, 9];
        let shape = || [rows, vocab, hidden].map(number);
        let launch = |entry: &str, grid: [usize; 2], block: [u32; 3], shared, arguments| Launch {
            entry: entry.to_string(),
            config: Config { grid: [grid[0] as u32, grid[1] as u32, 1], block, shared },
            arguments,
        };

        let shared = 128 * (2 * width as u32 + 16);
        let mut launches = Vec::new();
        let mut arguments: Vec<Piece> = [x, w, targets, scratch].map(at).into();
        arguments.extend(shape());
        arguments.extend([number(split_words), number(usize::from(training))]);
        let entry = format!("lce_fwd_dx_{width}_{}", dtype.suffix());
        let grid = [padded / 128, splits.0];
        launches.push(launch(&entry, grid, [threads, 1, 1], shared, arguments));

        let mut arguments: Vec<Piece> =
            [w, targets, scale, scratch, nll, argmax, dx].map(at).into();
        arguments.extend(shape());
        arguments.extend([number(width), number(splits.0)]);
        let entry = format!("lce_combine_{}", dtype.suffix());
        launches.push(launch(&entry, [padded / 8, 1], [32, 8, 1], 0, arguments));

        if training {
            let mut arguments: Vec<Piece> = [x, w, scale, scratch, dw, partials].map(at).into();
            arguments.extend(shape());
            arguments.push(number(split_rows));
            let entry = format!("lce_dw_{width}_{}", dtype.suffix());
            let grid = [vocab.div_ceil(128), splits.1];
            launches.push(launch(&entry, grid, [threads, 1, 1], shared + 1536, arguments));
        }
        if training && splits.1 > 1 {
            let mut arguments: Vec<Piece> = [partials, scale, dw].map(at).into();
            arguments.extend([value((vocab * hidden) as u64), number(splits.1)]);
            launches.push(launch("lce_dw_combine", [3, 1], [256, 1, 1], 0, arguments));
        }
        run_all(module, &memory, &launches)
    }
}

/// Each width, by vectors and by single values; one row, one word; hidden sizes, rows and words that
/// fill no tile; one split and several, the last of them short.
#[rustfmt::skip]
const HEADS: [Head; 11] = [
    Head { rows: 1, vocab: 1, hidden: 1, splits: (64, 64), aligned: true },
    Head { rows: 3, vocab: 7, hidden: 3, splits: (64, 64), aligned: true },
    Head { rows: 130, vocab: 200, hidden: 16, splits: (64, 64), aligned: true },
    Head { rows: 140, vocab: 333, hidden: 64, splits: (128, 64), aligned: true },
    Head { rows: 70, vocab: 300, hidden: 64, splits: (512, 128), aligned: true },
    Head { rows: 65, vocab: 129, hidden: 40, splits: (64, 128), aligned: false },
    Head { rows: 70, vocab: 100, hidden: 33, splits: (128, 64), aligned: true },
    Head { rows: 64, vocab: 192, hidden: 128, splits: (128, 64), aligned: true },
    Head { rows: 90, vocab: 100, hidden: 67, splits: (64, 64), aligned: true },
    Head { rows: 70, vocab: 150, hidden: 256, splits: (128, 128), aligned: true },
    Head { rows: 33, vocab: 90, hidden: 250, splits: (128, 64), aligned: false },
];

#[test]
fn two_passes_give_losses_and_gradients() {
    let Some(module) = module("fused_linear_cross_entropy") else { return };
    two_passes_are_right_in(&module, Dtype::Bf16, &HEADS);
    // Each width, by vectors and by single values.
    two_passes_are_right_in(&module, Dtype::F16, &HEADS[2..9]);
    two_passes_are_right_in(&module, Dtype::F16, &HEADS[10..]);
}

fn two_passes_are_right(module: &Module) {
    two_passes_are_right_in(module, Dtype::Bf16, &HEADS);
}

fn two_passes_are_right_in(module: &Module, dtype: Dtype, heads: &[Head]) {
    for (seed, head) in heads.iter().enumerate() {
        let Head { rows, vocab, hidden, .. } = *head;
        let seed = 10 * seed as u64;
        let scale = 6.0 / (hidden as f64).sqrt();
        let mut x = dtype.random(seed, rows * hidden, 1.0);
        let mut w = dtype.random(seed + 1, vocab * hidden, scale);
        let dw = Dtype::F32.random(seed + 2, vocab * hidden, 0.1);
        let mut targets = some_targets(rows, vocab);
        // Some words are there twice: the first of equals is the answer.
        for id in (0..vocab / 2).step_by(3) {
            let twice = (id + vocab / 2) * hidden;
            w.copy_within(id * hidden..(id + 1) * hidden, twice);
            if id + 8 < vocab / 2 {
                w.copy_within(id * hidden..(id + 1) * hidden, (id + 8) * hidden);
            }
        }
        // Some rows all but know a word, every other time their target.
        let sure: Vec<usize> = (0..rows).filter(|row| row % 5 == 4).collect();
        for &row in &sure {
            let id = row * 31 % (vocab / 2).max(1) / 3 * 3 + row % 2;
            for i in 0..hidden {
                x[row * hidden + i] = 2.0 * w[id * hidden + i];
            }
            targets[row] = if row % 2 == 1 { id } else { (id + 1) % vocab } as u32;
        }

        let exact = head.exact::<f64>([&x, &w, &dw], &targets, |d| d);
        let round = |d: f32| dtype.round(d);
        let plain = head.exact::<f32>([&x, &w, &dw], &targets, round);
        for training in [true, false] {
            let got = head.run(module, dtype, [&x, &w, &dw], &targets, training);
            check("nll", Dtype::F32, &got[0], &exact.0, &plain.0);
            assert_eq!(got[1], index_bytes(&exact.1), "argmax");
            if !training {
                continue;
            }
            check("dx", dtype, &got[2], &exact.2, &plain.2);
            check("dw", Dtype::F32, &got[3], &exact.3, &plain.3);
            // Their gradients are small beside the others, and must be right all the same.
            for &row in sure.iter().filter(|row| *row % 2 == 1) {
                let at = row * hidden..(row + 1) * hidden;
                let bytes = &got[2][2 * at.start..2 * at.end];
                check("dx of a known row", dtype, bytes, &exact.2[at.clone()], &plain.2[at]);
            }
        }
    }
}

/// Words as improbable as 2^-27 each, and all of them to the last 2^-10 of what they should be: an f16
/// holds none of them without help.
#[test]
fn improbable_words_keep_their_digits_in_f16() {
    let Some(module) = module("fused_linear_cross_entropy") else { return };
    improbable_words_are_right(&module);
}

fn improbable_words_are_right(module: &Module) {
    let head = Head { rows: 70, vocab: 150, hidden: 16, splits: (64, 64), aligned: true };
    let Head { rows, vocab, hidden, .. } = head;
    let dtype = Dtype::F16;
    let mut x = dtype.random(1, rows * hidden, 1.0);
    let mut w = dtype.random(2, vocab * hidden, 0.1);
    for row in 0..rows {
        x[row * hidden] = 4.0;
    }
    for (word, w) in w.chunks_mut(hidden).enumerate() {
        w[0] = if word == 0 { 4.75 } else { 0.0 };
    }
    // Half of the rows know their target.
    let targets: Vec<u32> = (0..rows).map(|row| (row % 2) as u32).collect();
    let dw = vec![0.0; w.len()];
    let exact = head.exact::<f64>([&x, &w, &dw], &targets, |d| d);
    let got = head.run(module, dtype, [&x, &w, &dw], &targets, true);
    let (known, improbable) = (Dtype::F32.values(&got[3]), 2 * hidden..vocab * hidden);
    let norm = |values: &[f64]| values.iter().map(|x| x * x).sum::<f64>().sqrt();
    let exact = &exact.3[improbable.clone()];
    let apart: Vec<_> = known[improbable].iter().zip(exact).map(|(got, e)| got - e).collect();
    let (error, bound) = (norm(&apart), norm(exact) * 2f64.powi(-10));
    assert!(error <= bound, "dw of improbable words: {error:.3e}, allowed {bound:.3e}");
}

pub const CROSS_ENTROPY: Mutants = Mutants {
    kernel: "cross_entropy",
    only: &[],
    mutants: &[
        ("last_of_equal_partials", "b.argmax < a.argmax", "b.argmax > a.argmax"),
        ("last_of_equals_in_a_vector", "int i = N - 1; i >= 0; i--", "int i = 0; i < N; i++"),
        ("sum_not_rescaled", "", ""),
        ("no_one_hot", "", ""),
        ("logits_overwritten_early", "", ""),
        ("partials_overwritten", "", ""),
        ("gradient_of_ignored_target", "counts ? *loss_scale : 0.0f", "*loss_scale"),
        ("loss_of_ignored_target", ": 0.0f", ": softmax.max"),
        ("tail_skipped", "vector_end", "vocab"),
        ("unaligned_rows_vectorized", " && stride % N == 0", ""),
        ("sum_not_inverted", "scale / softmax.sum", "softmax.sum / scale"),
    ],
    check: logits_are_right,
};

fn f16_is_right(module: &Module) {
    improbable_words_are_right(module);
    two_passes_are_right_in(module, Dtype::F16, &HEADS[2..3]);
}

pub const LCE_F16: Mutants = Mutants {
    kernel: "fused_linear_cross_entropy",
    only: &["FWD_DX(32, T)", "DW(32, T)", "ENTRIES(f16)"],
    mutants: &[
        ("operands_not_scaled", "? 15 :", "? 0 :"),
        ("target_gap_not_scaled", " * (1 << OPERAND_SCALE_LOG2<T>)", ""),
        ("sum_left_scaled", " * INVERSE_OPERAND_SCALE<T>", ""),
    ],
    check: f16_is_right,
};

pub const LCE: Mutants = Mutants {
    kernel: "fused_linear_cross_entropy",
    only: &["ENTRIES(bf16)"],
    mutants: &[
        ("current_stage_overwritten", "smem + stage *", "smem + (stage ^ 1) *"),
        ("stationary_rows_overwritten", "", ""),
        ("ids_past_the_end", "id + GROUP > end", "false"),
        ("target_counted_twice", "", ""),
        ("sum_not_rescaled", "", ""),
        ("dx_not_rescaled", "", ""),
        (
            "last_of_equals_in_a_group",
            "j = GROUP / 8 - 1; j >= 0; j--",
            "j = 0; j < GROUP / 8; j++",
        ),
        ("last_of_equals_in_four_lanes", "", ""),
        ("argmax_not_stored", "= at;", "= id;"),
        ("new_max_not_detected", "", ""),
        ("last_of_equal_groups", "row_max > max", "row_max >= max"),
        ("last_of_equal_splits", "> max", ">= max"),
        ("target_not_detected", "", ""),
        ("splits_not_rescaled", "ex2_approx((scratch.max[at] - max) * LOG2E)", "1.0f"),
        ("dx_without_target", "target_gap *", "0.0f *"),
        ("dx_of_ignored_target", "counts ? *loss_scale : 0.0f", "*loss_scale"),
        (
            "dw_of_ignored_target",
            "counts ? max * LOG2E + log2f(total) - OPERAND_SCALE_LOG2<T> : INFINITY",
            "max * LOG2E + log2f(total) - OPERAND_SCALE_LOG2<T>",
        ),
        ("dw_target_not_detected", "__any_sync(FULL_MASK, one - first < BLOCK_ROWS)", "false"),
        ("one_hot_in_next_row", "row == ", "row + 1 == "),
        ("lse_of_the_other_row", "shift[e % 2]", "shift[0]"),
        ("dw_assigned", "+=", "="),
        ("combined_dw_assigned", "+=", "="),
        ("first_partial_dropped", "split = 0", "split = 1"),
        ("vectors_past_hidden", "column < hidden ? limit - first - row : 0", "limit - first - row"),
        ("scalars_past_hidden", " && column + k < hidden", ""),
        ("unaligned_rows_vectorized", " && aligned(x, w)", ""),
        ("ldmatrix_not_transposed", ".trans", ""),
        ("operand_halves_swapped", "b[0], b[1]", "b[1], b[0]"),
        ("packed_halves_swapped", "(low, high)", "(high, low)"),
        ("copies_not_committed", "", ""),
        ("copies_not_awaited", "", ""),
    ],
    check: two_passes_are_right,
};
