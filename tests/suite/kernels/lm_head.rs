//! LM head on inputs that the cases do not have: weights and rows where no vector may begin, gradients
//! in place, ids that are too improbable for f16 by themselves.

use laam::backend::gpu::Options;
use laam::backend::reference::Reference;
use laam::backend::{Arena, Backend, Inputs, SessionSpec};
use laam::llama::ops::FusedLinearCrossEntropy;
use laam::llama::{BufferKind, BufferRole, Op, Program};
use laam::model::{Layout, Span};

use super::*;

/// Each row gives one id most of the probability, and the rest 2^-27 or so each; half of the rows have
/// that id as their target.
struct Head {
    dtype: Dtype,
    /// Elements before the weights in the arena.
    offset: usize,
}

const ROWS: usize = 70;
const VOCAB: usize = 150;
const HIDDEN: usize = 16;

impl Head {
    /// The gradients of the rows, and of the weights of improbable ids.
    fn gradients(&self, backend: &dyn Backend) -> [Vec<f32>; 2] {
        let Head { dtype, offset } = *self;
        let w = Span { offset, rows: VOCAB, cols: HIDDEN };
        let none = Span { offset: 0, rows: 0, cols: 0 };
        let layout = Layout {
            parameters: Vec::new(),
            embedding: w,
            blocks: Vec::new(),
            final_norm: none,
            head: w,
            len: (offset + w.len()).next_multiple_of(Layout::ALIGN),
        };
        let rounded = |values: Vec<f32>| dtype.decode(&dtype.encode(&values));
        let mut x = rounded(random(1, ROWS * HIDDEN, 1.0));
        let mut parameters = rounded(random(2, layout.len, 0.1));
        for x in x.chunks_mut(HIDDEN) {
            x[0] = 4.0;
        }
        for (id, w) in parameters[w.range()].chunks_mut(HIDDEN).enumerate() {
            w[0] = if id == 0 { 4.75 } else { 0.0 };
        }
        let targets: Vec<u32> = (0..ROWS as u32).map(|row| row % 2).collect();

        let mut program = Program::default();
        let mut buffer = |kind, len, role| program.buffer("", kind, len, role);
        let x_in = buffer(BufferKind::Activation, x.len(), BufferRole::Input);
        let targets_in = buffer(BufferKind::Index, ROWS, BufferRole::Input);
        let nll = buffer(BufferKind::Float, ROWS, BufferRole::Output);
        let argmax = buffer(BufferKind::Index, ROWS, BufferRole::Output);
        let dx = buffer(BufferKind::Activation, x.len(), BufferRole::Output);
        program.ops.push(Op::FusedLinearCrossEntropy(FusedLinearCrossEntropy {
            x: x_in,
            w,
            targets: targets_in,
            rows: ROWS,
            nll,
            argmax,
            dx: Some(dx),
        }));
        let inputs = Inputs {
            indices: vec![(targets_in, &targets)],
            floats: vec![(x_in, x.as_slice().into())],
            loss_scale: 0.037,
            ..Inputs::default()
        };
        let spec = SessionSpec { training: true, ..SessionSpec::default() };
        let mut session = backend.open(&layout, spec).unwrap();
        session.write(Arena::Parameters, &parameters).unwrap();
        let program = session.load(program).unwrap();
        session.run(program, &inputs).unwrap();
        let dw = session.read(Arena::Gradients).unwrap();
        let improbable = w.offset + 2 * HIDDEN..w.offset + w.len();
        [session.floats(program, dx).unwrap(), dw[improbable].to_vec()]
    }

    fn matches_f64(&self, module: &Module) {
        let order = (Schedule::InOrder, Check::Races);
        let replaced = Some(("fused_linear_cross_entropy", module));
        let gpu = simulated(Options::new(self.dtype), order, |_| {}, replaced);
        let [exact, plain, got] =
            [&Reference::F64 as &dyn Backend, &Reference::mixed(self.dtype), &gpu]
                .map(|backend| self.gradients(backend));
        let error = |a: &[f32], b: &[f32]| crate::backend::error(a, b);
        let (off, bound) = (error(&got[0], &exact[0]), 2.0 * error(&plain[0], &exact[0]) + 4e-3);
        assert!(off <= bound, "dx: {off:.3e} > {bound:.3e}");
        // One rounding of each logit's gradient, relative to itself: less than f16 by itself can do.
        let bound = if self.dtype == Dtype::F16 { 2f64.powi(-10) } else { 2f64.powi(-8) };
        let off = error(&got[1], &exact[1]);
        assert!(off <= bound, "dw of improbable ids: {off:.3e} > {bound:.3e}");
    }
}

pub fn improbable_ids_match_f64(module: &Module) {
    Head { dtype: Dtype::F16, offset: 0 }.matches_f64(module);
}

pub fn unaligned_weights_match_f64(module: &Module) {
    Head { dtype: Dtype::Bf16, offset: 2 }.matches_f64(module);
}

#[test]
fn lm_head_gradients_of_improbable_ids_match_f64() {
    holds("fused_linear_cross_entropy", improbable_ids_match_f64);
}

#[test]
fn lm_head_with_unaligned_weights_matches_f64() {
    holds("fused_linear_cross_entropy", unaligned_weights_match_f64);
}

/// The gradient in bf16 in the place of the logits or apart, and from rows that no vector may read, as no
/// operation has it.
pub fn cross_entropy_at_any_stride(module: &Module) {
    let (rows, vocab) = (3, 1030);
    let targets = [7, u32::MAX, 1029];
    let gradient = |stride: usize, dlogits_stride: usize, in_place: bool| {
        let logits = Dtype::F32.encode(&random(1, rows * stride, 8.0));
        let dlogits = Piece::Both(vec![0; 2 * rows * dlogits_stride]);
        let pieces = [
            if in_place { Piece::Both(logits) } else { Piece::In(logits) },
            Piece::In(words(&targets)),
            Piece::In(0.5f32.to_le_bytes().to_vec()),
            Piece::Out(4 * rows),
            Piece::Out(4 * rows),
            if in_place { Piece::Same(0) } else { dlogits },
            value(rows as i32),
            value(vocab),
            value(stride as i32),
            value(dlogits_stride as i32),
        ];
        let got = run(module, "cross_entropy_bf16", Config::linear(2, 96), &pieces);
        let bytes = &got[if in_place { 0 } else { 2 }];
        bytes
            .chunks(2 * dlogits_stride)
            .flat_map(|row| row[..2 * vocab as usize].to_vec())
            .collect()
    };
    let apart: Vec<u8> = gradient(1032, 1032, false);
    assert!(apart == gradient(1032, 2064, true), "in place");
    let scalar: Vec<u8> = gradient(1033, 1033, false);
    assert!(scalar == gradient(1033, 1036, false), "logits that no vector may read");
}

#[test]
fn cross_entropy_gradient_is_the_same_in_place_and_at_any_stride() {
    holds("cross_entropy", cross_entropy_at_any_stride);
}

pub const LCE_F16: MutationSet = MutationSet {
    kernel: "fused_linear_cross_entropy",
    only: &["FWD_DX(32, T)", "FWD_DX(64, T)", "DW(32, T)", "DW(64, T)", "ENTRIES(f16)"],
    mutants: &[
        ("operands_not_scaled", "? 15 :", "? 0 :"),
        ("target_gap_not_scaled", " * (1 << OPERAND_SCALE_LOG2<T>)", ""),
        ("sum_left_scaled", " * INVERSE_OPERAND_SCALE<T>", ""),
    ],
    check: |module| {
        improbable_ids_match_f64(module);
        let replaced = Some(("fused_linear_cross_entropy", module));
        pass(&["fused_linear_cross_entropy"], Options::new(Dtype::F16), "", replaced);
    },
};

pub const LCE: MutationSet = MutationSet {
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
    check: |module| {
        let replaced = Some(("fused_linear_cross_entropy", module));
        pass(&["fused_linear_cross_entropy"], Options::new(Dtype::Bf16), "", replaced);
        unaligned_weights_match_f64(module);
    },
};
