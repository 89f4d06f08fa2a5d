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
    planted("cross_entropy", &bugs, logits_are_right);
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

#[test]
fn mistakes_in_f16_are_seen() {
    let bugs = [
        ("as small as they are", "? 15 : 0;", "? 0 : 0;"),
        (
            "the target's share as it was",
            "scratch.miss[row] = miss * (1 << LIFT<T>);",
            "scratch.miss[row] = miss;",
        ),
        (
            "a part of the vocabulary left high",
            "scratch.sum[at] = all * UNLIFT<T>;",
            "scratch.sum[at] = all;",
        ),
    ];
    let widths = [64, 128, 256].iter();
    let lines =
        widths.flat_map(|width| ["ROWS", "WORDS"].map(|pass| format!("    {pass}({width}, T)")));
    let without: Vec<_> = lines.chain(["ENTRIES(bf16)".into()]).collect();
    let without: Vec<_> = without.iter().map(String::as_str).collect();
    planted_in("fused_linear_cross_entropy", &without, &bugs, |module| {
        improbable_words_are_right(module);
        two_passes_are_right_in(module, Dtype::F16, &HEADS[2..3]);
    });
}

#[test]
#[ignore = "two minutes of compiling: cargo test --test suite mistakes -- --include-ignored"]
fn mistakes_in_the_two_passes_are_seen() {
    let bugs = [
        (
            "words of the next tile over this one",
            "memory + stage * TILE_BYTES<WIDTH>, w, tile + TILE",
            "memory + (stage ^ 1) * TILE_BYTES<WIDTH>, w, tile + TILE",
        ),
        (
            "owned rows overwritten while they are read",
            "    __syncthreads();\n    copy_rows<WIDTH, TILE>(memory, w, begin",
            "    copy_rows<WIDTH, TILE>(memory, w, begin",
        ),
        ("words beyond the last", "if (word + GROUP > end) {", "if (false) {"),
        (
            "the target's column taken twice",
            "                                z[s][j][e] = -INFINITY;\n",
            "",
        ),
        ("sum not rescaled", "sum[s][h] *= shrink;", ""),
        ("dx of the upper row not rescaled", "dx[s][j][2 * h + 1] *= shrink;", ""),
        (
            "last of equals in a group",
            "j = GROUP / 8 - 1; j >= 0; j--",
            "j = 0; j < GROUP / 8; j++",
        ),
        ("last of equals in four threads", "at = min(at, __shfl_xor_sync(ALL, at, 2));", ""),
        (
            "the best word of a part not kept",
            "scratch.best[part + own.row(s, 2 * h)] = at;",
            "scratch.best[part + own.row(s, 2 * h)] = word;",
        ),
        ("new maxima not looked for", "higher |= top[s][h] > max[s][h];", ""),
        ("last of equal groups", "if (most > max[s][h]) {", "if (most >= max[s][h]) {"),
        ("last of equal splits", "if (scratch.max[at] > max) {", "if (scratch.max[at] >= max) {"),
        ("a target not looked for", "hit |= target[s][h] - word < GROUP;", ""),
        (
            "splits not brought to one maximum",
            "return exp2_approx((scratch.max[at] - max) * LOG2_E);",
            "return 1.0f;",
        ),
        ("the target's row of w left in", "sum -= miss *", "sum -= 0.0f *"),
        ("gradient where the target is ignored", "counts ? *loss_scale : 0.0f", "*loss_scale"),
        (
            "dw where the target is ignored",
            "counts ? max * LOG2_E + log2f(all) - LIFT<T> : INFINITY",
            "max * LOG2_E + log2f(all) - LIFT<T>",
        ),
        ("targets of a block not looked for", "__any_sync(ALL, one - first < OWNED)", "false"),
        (
            "the one-hot in the next row",
            "if (row == own.row(s, e)) p",
            "if (row + 1 == own.row(s, e)) p",
        ),
        ("lse of the neighbour", "-shift[e % 2]", "-shift[0]"),
        ("dw assigned", "dw[at] += scale * sums[s][j][e];", "dw[at] = scale * sums[s][j][e];"),
        ("dw's parts assigned", "dw[at] += *loss_scale * sum;", "dw[at] = *loss_scale * sum;"),
        (
            "a part of dw missing",
            "for (int split = 0; split < splits; split++) sum += partials",
            "for (int split = 1; split < splits; split++) sum += partials",
        ),
        (
            "columns beyond hidden",
            "column < hidden ? limit - first - row : 0",
            "limit - first - row",
        ),
        ("single values beyond hidden", "there && column + k < hidden ?", "there ?"),
        (
            "vectors from anywhere",
            "hidden % FULL<T> == 0 && aligned(x, w);\n\n    copy_rows<WIDTH, OWNED>(memory, x",
            "hidden % FULL<T> == 0;\n\n    copy_rows<WIDTH, OWNED>(memory, x",
        ),
        (
            "matrices not turned",
            "ldmatrix.sync.aligned.m8n8.x4.trans",
            "ldmatrix.sync.aligned.m8n8.x4",
        ),
        (
            "halves of an operand swapped",
            "multiply_add<T>(sums[s][j], a[s], b[0], b[1]);",
            "multiply_add<T>(sums[s][j], a[s], b[1], b[0]);",
        ),
        (
            "a pair the wrong way round",
            "__floats2bfloat162_rn(low, high)",
            "__floats2bfloat162_rn(high, low)",
        ),
        ("copies not committed", "asm volatile(\"cp.async.commit_group;\" ::: \"memory\");", ""),
        (
            "waits not waiting",
            "asm volatile(\"cp.async.wait_group %0;\" ::\"n\"(PENDING) : \"memory\");",
            "",
        ),
    ];
    planted_in("fused_linear_cross_entropy", &["ENTRIES(f16)"], &bugs, two_passes_are_right);
}
