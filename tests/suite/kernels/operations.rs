//! The cases of every operation, and the mutants of kernels that they kill.

use laam::backend::gpu::{AttentionChoice, Options};
use laam::bench::check::operations;

use super::*;

const ATTENTION: [&str; 2] = ["attention", "attention_backward"];
const LM_HEAD: [&str; 1] = ["fused_linear_cross_entropy"];

fn generic(dtype: Dtype) -> Options {
    let attention = AttentionChoice::Generic;
    Options { attention, generic_lm_head: true, ..Options::new(dtype) }
}

#[test]
fn operations_match_f64_under_every_schedule() {
    let operations: Vec<_> =
        operations().filter(|name| !ATTENTION.contains(name) && !LM_HEAD.contains(name)).collect();
    for dtype in DTYPES {
        pass_by_turns(&operations, Options::new(dtype));
    }
}

#[test]
fn attention_matches_f64_under_every_schedule() {
    for dtype in DTYPES {
        pass_by_turns(&ATTENTION, Options::new(dtype));
    }
}

#[test]
fn attention_without_tensor_cores_matches_f64_under_every_schedule() {
    let attention = AttentionChoice::NoTensorCores;
    for dtype in [Dtype::Bf16, Dtype::F16] {
        pass_by_turns(&ATTENTION, Options { attention, ..Options::new(dtype) });
    }
}

#[test]
fn generic_attention_matches_f64_under_every_schedule() {
    for dtype in DTYPES {
        pass_by_turns(&ATTENTION, generic(dtype));
    }
}

#[test]
fn lm_head_matches_f64_under_every_schedule() {
    for dtype in DTYPES {
        pass_by_turns(&LM_HEAD, Options::new(dtype));
    }
}

#[test]
fn generic_lm_head_matches_f64_under_every_schedule() {
    for dtype in [Dtype::Bf16, Dtype::F16] {
        pass_by_turns(&LM_HEAD, generic(dtype));
    }
}

pub const GENERIC: MutationSet = MutationSet {
    kernel: "attention_generic",
    only: &["ENTRIES(f32)"],
    mutants: &[
        ("no_mask", "visible ? p[r] * scale : -INFINITY", "p[r] * scale"),
        ("sum_not_rescaled", " * rescale", ""),
        ("rows_overwritten", "", ""),
        ("no_delta", "(dp[r] - row_delta[r])", "dp[r]"),
        ("one_head_of_a_group", "member < shape.group()", "member < 1"),
        ("visible_tile_skipped", " + valid_rows", ""),
    ],
    check: |module| pass(&ATTENTION, generic(Dtype::F32), "", Some(("attention_generic", module))),
};

pub const SMALLHEAD: MutationSet = MutationSet {
    kernel: "attention_smallhead",
    only: &["FORWARD(2, 4, T)", "BACKWARD(2, 4, T)", "ENTRIES(f32)"],
    mutants: &[
        ("exponents_not_bounded", "norm[r] * max_norm - shift[r] <= MAX_EXPONENT", "true"),
        ("unseen_row_taken_as_bounded", "-INFINITY", "0.0f"),
        ("rows_after_diagonal_skipped", "i + 1 < ROWS", "i > ROWS"),
        ("next_key_visible", "key <= row(r)", "key <= row(r) + 1"),
        ("tile_read_early", "", ""),
        ("other_warps_dropped", "owner < warps", "owner < 1"),
        ("visible_tile_skipped", " + CHUNK", ""),
    ],
    check: |module| {
        pass(
            &ATTENTION,
            Options::new(Dtype::F32),
            "heads of 2",
            Some(("attention_smallhead", module)),
        );
    },
};

pub const SMALLHEAD_TF32: MutationSet = MutationSet {
    kernel: "attention_smallhead_tf32",
    only: &["FORWARD_AND_DQ(2, 4, T)", "DKDV(2, 8, T)", "ENTRIES(bf16)"],
    mutants: &[
        ("low_part_dropped", "low = cvt_rna_tf32(x - high)", "low = 0.0f"),
        ("overflow_not_detected", "!in_range", "false"),
        ("overflow_before_the_last_tile_not_detected", "&=", "="),
        ("column_of_another_block", "rows + 16", "rows + 8"),
        ("tile_read_early", "", ""),
        ("no_delta", "valid ? -delta[row + position] : 0.0f", "0.0f"),
        ("mask_skipped", "min(first_masked, end)", "end"),
        ("query_past_the_end_visible", ": INT_MAX", ": 0"),
        ("other_warps_dropped", "owner < warps", "owner < 1"),
    ],
    check: |module| {
        pass(
            &ATTENTION,
            Options::new(Dtype::Bf16),
            "heads of 2",
            Some(("attention_smallhead_tf32", module)),
        );
    },
};

pub const FLASH: MutationSet = MutationSet {
    kernel: "flash_attention",
    only: &["ENTRIES(32, bf16)"],
    mutants: &[
        ("wait_for_one_group_less", "(PENDING)", "(PENDING + 1)"),
        ("ldmatrix_not_transposed", ".trans", ""),
        ("max_of_two_lanes", "", ""),
        ("stage_overwritten", "", ""),
        ("diagonal_hidden", "row < key", "row <= key"),
        ("rows_past_the_end_not_zero", "valid ? 16 : 0", "16"),
        ("stats_not_stored", "", ""),
        ("visible_tile_skipped", "> high", "> low - 32"),
    ],
    check: |module| {
        pass(
            &ATTENTION,
            Options::new(Dtype::Bf16),
            "heads of 32",
            Some(("flash_attention", module)),
        );
    },
};

pub const DECODE: MutationSet = MutationSet {
    kernel: "attention_decode",
    only: &["ENTRIES(f32)"],
    mutants: &[
        ("future_keys_visible", "if (at < end) ", ""),
        ("cached_position_taken_for_new", "at < begin", "at + 1 < begin"),
        ("last_warp_dropped", "w < WARPS;", "w < WARPS - 1;"),
        ("one_kv_head_appended", "head % shape.group() == 0", "head == 0"),
    ],
    check: |module| {
        pass(
            &["attention_decode"],
            Options::new(Dtype::F32),
            "",
            Some(("attention_decode", module)),
        );
    },
};

pub const RMS_NORM: MutationSet = MutationSet {
    kernel: "rms_norm",
    only: &[],
    mutants: &[
        ("mean_over_wrong_count", "/ hidden", "/ (hidden - 0.5f)"),
        ("residual_sum_not_stored", "column, values", "column, r"),
        ("row_sum_overwritten", "", ""),
        ("row_sum_read_early", "", ""),
    ],
    check: |module| pass(&["rms_norm"], Options::new(Dtype::F32), "", Some(("rms_norm", module))),
};

pub const RMS_NORM_BACKWARD: MutationSet = MutationSet {
    kernel: "rms_norm",
    only: &[],
    mutants: &[
        ("mean_term_dropped", "values[i] * scale * mean", "0.0f"),
        ("dsum_dropped", "dsum != nullptr", "false"),
        ("dweight_assigned", "+=", "="),
        ("rows_added_early", "", ""),
        ("last_partial_dropped", "block < blocks;", "block < blocks - 1;"),
        ("first_norm_always", "blockIdx.y", "0"),
    ],
    check: |module| {
        let operations = ["rms_norm_backward", "rms_norm_backward_weight"];
        pass(&operations, Options::new(Dtype::F32), "", Some(("rms_norm", module)));
    },
};

pub const ROPE: MutationSet = MutationSet {
    kernel: "rope",
    only: &[],
    mutants: &[
        ("angle_not_negated", "BACKWARD ? -pair[1] : pair[1]", "pair[1]"),
        ("start_ignored", "start != nullptr ? start[sequence] : 0u", "0u"),
        ("v_rotated", "slot < rotated", "slot < slots"),
        ("dv_rotated", "slot < rotated", "slot < slots"),
        ("kv_heads_taken_for_heads", "* kv_heads", "* heads"),
        ("neighbors_paired", "from + half", "from + N"),
        ("one_position_too_many", "t >= shape.seq_len", "t > shape.seq_len"),
    ],
    check: |module| {
        pass(&["rope", "rope_backward"], Options::new(Dtype::F32), "", Some(("rope", module)));
    },
};

pub const SWIGLU: MutationSet = MutationSet {
    kernel: "swiglu",
    only: &[],
    mutants: &[
        ("slope_without_second_term", "(1.0f + gate[i] * (1.0f - s))", "1.0f"),
        ("row_stride_halved", "* 2 * inter", "* inter"),
        ("unaligned_rows_vectorized", "inter % VEC<T> == 0 && ", ""),
    ],
    check: |module| {
        pass(
            &["swiglu", "swiglu_backward"],
            Options::new(Dtype::Bf16),
            "",
            Some(("swiglu", module)),
        );
    },
};

pub const EMBEDDING_BACKWARD: MutationSet = MutationSet {
    kernel: "embedding",
    only: &[],
    mutants: &[
        ("partial_run_added", " || continues", ""),
        ("long_run_added_twice", " || began_before", ""),
        ("last_partial_dropped", "part <= last", "part < last"),
        ("partial_in_wrong_slot", "began_before ? 0 : 1", "continues ? 1 : 0"),
    ],
    check: |module| {
        pass(&["embedding_backward"], Options::new(Dtype::F32), "", Some(("embedding", module)));
    },
};

pub const GATHER_ROWS: MutationSet = MutationSet {
    kernel: "gather_rows",
    only: &[],
    mutants: &[("position_ignored", " + position[b]", "")],
    check: |module| {
        pass(&["gather_rows"], Options::new(Dtype::F32), "", Some(("gather_rows", module)));
    },
};

pub const CROSS_ENTROPY: MutationSet = MutationSet {
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
    check: |module| {
        for dtype in [Dtype::F32, Dtype::Bf16] {
            pass(&LM_HEAD, generic(dtype), "", Some(("cross_entropy", module)));
        }
        lm_head::cross_entropy_at_any_stride(module);
    },
};

pub const GRAD_NORM: MutationSet = MutationSet {
    kernel: "grad_norm",
    only: &[],
    mutants: &[
        ("squares_in_f32", "static_cast<double>(values[i])", "values[i]"),
        ("last_partial_dropped", "block < blocks;", "block < blocks - 1;"),
        ("scaled_twice", "/ scale", "* scale"),
        ("tail_skipped", "", ""),
        ("run_tail_skipped", "at < run.count", "at < run.count / 256 * 256"),
        ("first_run_always", "run.start + at", "at"),
    ],
    check: |module| {
        pass(&["grad_norm"], Options::new(Dtype::F32), "", Some(("grad_norm", module)));
        single::loss_scale_divides_the_norm(module);
        single::norm_includes_the_tail(module);
    },
};

pub const ADAMW: MutationSet = MutationSet {
    kernel: "adamw",
    only: &[],
    mutants: &[
        ("not_clipped", " * params.clip", ""),
        ("loss_scale_kept", " / scale", ""),
        (
            "epsilon_inside_the_root",
            "(sqrtf(vs[i]) / params.correction + epsilon)",
            "(sqrtf(vs[i] + epsilon) / params.correction)",
        ),
        ("no_weight_decay", " * shrink", ""),
        ("step_with_infinite_norm", "", ""),
        ("shadow_not_stored", "", ""),
        ("unaligned_chunk_vectorized", "aligned(gradient, p, m, v, shadow)", "true"),
        ("bf16_truncated", "_rn(", "_rz("),
    ],
    check: |module| {
        pass(&["adamw"], Options::new(Dtype::Bf16), "", Some(("adamw", module)));
        single::loss_scale_divides_the_clip_factor_of_adamw(module);
        single::adamw_rounds_shadow_weights_to_nearest(module);
    },
};

pub const MUON: MutationSet = MutationSet {
    kernel: "muon",
    only: &[],
    mutants: &[
        ("no_nesterov", "g + beta * ms[i]", "ms[i]"),
        ("first_gradient_always", " + offset", ""),
        ("first_norm_always", " + blockIdx.y * blocks", ""),
        ("not_clipped", " * clip", ""),
        ("loss_scale_kept", " / scale", ""),
        ("step_with_infinite_norm", "", ""),
        ("no_weight_decay", " * shrink", ""),
        ("other_partials_dropped", "block < blocks;", "block < 1;"),
        ("first_square_always", " + blockIdx.y * count", ""),
        ("no_identity", "? a : 0.0f", "? 0.0f : 0.0f"),
        ("shadow_not_stored", "", ""),
    ],
    check: |module| {
        pass(&["muon"], Options::new(Dtype::Bf16), "", Some(("muon", module)));
        single::loss_scale_divides_the_clip_factor_of_muon(module);
    },
};
