//! Kernels that no operation shows by itself: the stable sort of ids, the fill of `laam bench smoke`,
//! the loss scale in the kernels of an update, the rounding of shadow weights.

use laam::backend::gpu::Options;
use laam::llama::slices::SumOrder;

use super::*;

/// Ids as text has them: a few that come all the time, many that come once.
fn ids(seed: u64, rows: usize, vocab: u32) -> Vec<u32> {
    let skewed = |x: f64| (x.abs().powi(8) * f64::from(vocab)) as u32;
    random(seed, rows, 1.0).into_iter().map(|x| skewed(x.into()).min(vocab - 1)).collect()
}

/// The rows in the order of their ids, as the kernels sort them.
fn sorted(module: &Module, ids: &[u32], vocab: u32) -> Vec<u8> {
    let rows = ids.len();
    let tiles = rows.div_ceil(1024);
    let config = Config::linear(tiles as u32, 512);
    let mut order: Option<Vec<u8>> = None;
    for shift in [0, 9].into_iter().take_while(|shift| shift == &0 || vocab > 1 << shift) {
        let given = || order.clone().map_or(value(0u64), Piece::In);
        let mut counts = value(0u64);
        if tiles > 1 {
            let pieces = [
                Piece::In(words(ids)),
                given(),
                Piece::Out(tiles * 512 * 4),
                value(rows as i32),
                value(shift),
            ];
            counts = Piece::In(run(module, "embedding_sort_histogram", config, &pieces).remove(0));
        }
        let pieces = [
            Piece::In(words(ids)),
            given(),
            counts,
            Piece::Out(4 * rows),
            value(rows as i32),
            value(shift),
        ];
        order = Some(run(module, "embedding_sort_scatter", config, &pieces).remove(0));
    }
    order.expect("there is a pass")
}

fn sorts_stably(module: &Module) {
    let shapes = [(1, 9), (31, 512), (513, 300), (1024, 513), (1025, 131_072), (3000, 131_072)];
    for (rows, vocab) in shapes {
        let mut ids = ids(rows as u64, rows, vocab);
        ids[rows / 2] = vocab - 1;
        let mut exact: Vec<u32> = (0..rows as u32).collect();
        exact.sort_by_key(|&row| ids[row as usize]);
        assert!(sorted(module, &ids, vocab) == words(&exact), "the order of {rows} rows");
    }
}

#[test]
fn embedding_sort_is_stable() {
    holds("embedding", sorts_stably);
}

pub const EMBEDDING_SORT: MutationSet = MutationSet {
    kernel: "embedding",
    only: &[],
    mutants: &[
        ("unstable_ranks", "seen + before", "seen + __popc(same) - 1 - before"),
        ("earlier_tiles_forgotten", "", ""),
        ("low_digit_twice", " >> shift", ""),
        ("counts_read_early", "", ""),
        ("counts_overwritten", "", ""),
    ],
    check: sorts_stably,
};

#[test]
fn fill_writes_every_element_and_no_other() {
    holds("fill", fill_is_exact);
}

fn fill_is_exact(module: &Module) {
    for count in [1usize, 7, 64, 5003] {
        let pieces = [Piece::Both(vec![0; 4 * (count + 1)]), value(1.5f32), value(count as u64)];
        let got = run(module, "fill_f32", Config::linear(2, 256), &pieces);
        let exact: Vec<f32> = (0..=count).map(|i| if i < count { 1.5 } else { 0.0 }).collect();
        assert!(got[0] == Dtype::F32.encode(&exact), "fill of {count}");
    }
}

pub const FILL: MutationSet = MutationSet {
    kernel: "fill",
    only: &[],
    mutants: &[("vector_tail_skipped", "at < count", "at < vector_end")],
    check: fill_is_exact,
};

#[test]
fn pieces_are_added_in_one_order() {
    holds("sum_pieces", pieces_have_one_order);
}

fn pieces_have_one_order(module: &Module) {
    for pieces in [1usize, 2, 3, 4, 6, 7, 8, 12, 32] {
        for count in [1usize, 7, 64] {
            let terms = random(pieces as u64, pieces * count, 1.0);
            let order = SumOrder::new(pieces);
            let mut exact = terms.clone();
            order.add(&mut exact, count);
            let (first, rest) = terms.split_at(count);
            let rest = if rest.is_empty() { first } else { rest };
            let args = [
                Piece::In(Dtype::F32.encode(first)),
                Piece::In(Dtype::F32.encode(rest)),
                Piece::Out(4 * count),
                value(count as u64),
                value(count as u64),
                value(order.blocks as i32),
                value(order.width as i32),
            ];
            let got = run(module, "sum_pieces", Config::linear(2, 256), &args).remove(0);
            assert!(got == Dtype::F32.encode(&exact[..count]), "{pieces} pieces of {count}");
        }
    }
}

pub const SUM_PIECES: MutationSet = MutationSet {
    kernel: "sum_pieces",
    only: &[],
    mutants: &[
        ("first_block_always", "block * width + i", "i"),
        ("left_lost", "pending[level][e] + sum[e]", "sum[e]"),
        ("too_early", "level & 1", "level"),
        ("last_block_only", "block == 0 ? sum[e] : total[e] + sum[e]", "sum[e]"),
    ],
    check: pieces_have_one_order,
};

/// What a kernel of one block writes with a loss scale and without one, a null pointer.
fn with_and_without_scale(
    module: &Module,
    entry: &str,
    pieces: impl Fn(Piece) -> Vec<Piece>,
) -> [Vec<u8>; 2] {
    [Piece::In(0.25f32.to_le_bytes().to_vec()), Piece::Null]
        .map(|scale| run(module, entry, Config::linear(1, 32), &pieces(scale)).remove(0))
}

fn f32_at(bytes: &[u8], at: usize) -> f32 {
    f32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn long(x: f64) -> Piece {
    Piece::In(x.to_le_bytes().to_vec())
}

fn norm() -> Piece {
    Piece::In(3.0f32.to_le_bytes().to_vec())
}

pub fn loss_scale_divides_the_norm(module: &Module) {
    let partials = || Piece::In([9.0f64, 16.0].map(f64::to_le_bytes).concat());
    let pieces = |scale| vec![partials(), scale, Piece::Out(4), value(2)];
    let [scaled, plain] = with_and_without_scale(module, "grad_norm", pieces);
    assert_eq!([f32_at(&scaled, 0), f32_at(&plain, 0)], [20.0, 5.0]);
}

/// The arenas of operations have no tail: their length is a multiple of `Layout::ALIGN`.
pub fn norm_includes_the_tail(module: &Module) {
    let gradients = Piece::In(Dtype::F32.encode(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]));
    let pieces = [gradients, Piece::Out(8), value(7u64)];
    let got = run(module, "grad_norm_partials", Config::linear(1, 256), &pieces).remove(0);
    assert_eq!(f64::from_le_bytes(got[..].try_into().unwrap()), 140.0);
}

pub fn loss_scale_divides_the_clip_factor_of_adamw(module: &Module) {
    let pieces = |scale| {
        let step = Piece::In(7u64.to_le_bytes().to_vec());
        let out = Piece::Both(vec![0; 24]);
        vec![long(1e-3), step, norm(), scale, out, value(1.0f32), value(0.9), value(0.999)]
    };
    let [scaled, plain] = with_and_without_scale(module, "adamw_step_params", pieces);
    assert_eq!(f32_at(&scaled, 8), 4.0 * f32_at(&plain, 8));
    assert!((f32_at(&plain, 8) - 1.0 / 3.0).abs() < 1e-6);
}

pub fn loss_scale_divides_the_clip_factor_of_muon(module: &Module) {
    let pieces = |scale| vec![long(1e-3), norm(), scale, Piece::Out(16), value(1.0f32)];
    let [scaled, plain] = with_and_without_scale(module, "muon_step_params", pieces);
    assert_eq!(f32_at(&scaled, 8), 4.0 * f32_at(&plain, 8));
    assert!((f32_at(&plain, 8) - 1.0 / 3.0).abs() < 1e-6);
}

#[test]
fn norm_includes_the_tail_and_loss_scale_divides_norm_and_clip_factors() {
    holds("grad_norm", loss_scale_divides_the_norm);
    holds("grad_norm", norm_includes_the_tail);
    holds("adamw", loss_scale_divides_the_clip_factor_of_adamw);
    holds("muon", loss_scale_divides_the_clip_factor_of_muon);
}

/// The last output of an update's case is the parameters as matmuls read them, the first is all of them.
pub fn adamw_rounds_shadow_weights_to_nearest(module: &Module) {
    let dtype = Dtype::Bf16;
    let order = (Schedule::InOrder, Check::Faults);
    let gpu = simulated(Options::new(dtype), order, |_| {}, Some(("adamw", module)));
    for case in cases(Size::Small, dtype, 1, |name| name == "adamw") {
        let outputs = case.run(&gpu, 1).unwrap().remove(0);
        let (parameters, weights) = (&outputs[0], outputs.last().unwrap());
        // Those no range covers are not rewritten.
        let rounded = dtype.decode(&dtype.encode(parameters));
        assert!(weights[..] == rounded[..weights.len()], "{}", case.shape);
    }
}

#[test]
fn shadow_weights_are_rounded_to_nearest() {
    holds("adamw", adamw_rounds_shadow_weights_to_nearest);
}
