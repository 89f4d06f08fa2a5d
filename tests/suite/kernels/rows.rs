//! Rows taken from a table, and added back to it: the embedding, and one row of each window.

use super::*;

/// Ids as text has them: a few that come all the time, many that come once.
fn ids(seed: u64, rows: usize, vocab: u32) -> Vec<u32> {
    let skewed = |x: f64| (x.abs().powi(8) * f64::from(vocab)) as u32;
    Dtype::F32.random(seed, rows, 1.0).into_iter().map(|x| skewed(x).min(vocab - 1)).collect()
}

pub fn embed_is_right(module: &Module) {
    for dtype in DTYPES {
        for (rows, hidden, vocab) in [(1, 1, 3), (5, 17, 40), (9, 64, 300), (40, 24, 7)] {
            let (ids, table) = (ids(1, rows, vocab), dtype.random(2, vocab as usize * hidden, 1.0));
            let exact: Vec<f64> = ids
                .iter()
                .flat_map(|&id| &table[id as usize * hidden..][..hidden])
                .copied()
                .collect();
            let pieces = [
                Piece::In(words(&ids)),
                Piece::In(dtype.bytes(&table)),
                Piece::Out(rows * hidden * dtype.size()),
                value(rows as i32),
                value(hidden as i32),
            ];
            let config = Config { grid: [2, 1, 1], block: [8, 4, 1], shared: 0 };
            let got = run(module, &format!("embedding_{}", dtype.suffix()), config, &pieces);
            assert!(got[0] == dtype.bytes(&exact), "embedding");
        }
    }
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

pub fn embed_sort_is_right(module: &Module) {
    let shapes = [(1, 9), (31, 512), (513, 300), (1024, 513), (1025, 131_072), (3000, 131_072)];
    for (rows, vocab) in shapes {
        let mut ids = ids(rows as u64, rows, vocab);
        ids[rows / 2] = vocab - 1;
        let mut exact: Vec<u32> = (0..rows as u32).collect();
        exact.sort_by_key(|&row| ids[row as usize]);
        assert!(sorted(module, &ids, vocab) == words(&exact), "the order of {rows} rows");
    }
}

pub fn embed_backward_is_right(module: &Module) {
    for dtype in DTYPES {
        // Runs inside a chunk of 64, over its border, over all of several chunks, to the very end.
        for (rows, hidden, vocab) in
            [(1, 1, 3), (64, 8, 1), (65, 17, 1), (200, 24, 2), (333, 12, 40), (700, 8, 1000)]
        {
            let ids = ids(1, rows, vocab);
            let order = {
                let mut order: Vec<u32> = (0..rows as u32).collect();
                order.sort_by_key(|&row| ids[row as usize]);
                words(&order)
            };
            let dout = dtype.random(2, rows * hidden, 1.0);
            let before = Dtype::F32.random(3, vocab as usize * hidden, 1.0);
            let chunks = rows.div_ceil(64);
            // What no run leaves a part in is never written: poisoned, were it read.
            let partials = Dtype::F32.bytes(&vec![f64::NAN; chunks * 2 * hidden]);
            let config = Config { grid: [2, 1, 1], block: [4, 8, 1], shared: 0 };
            let numbers = || [value(rows as i32), value(hidden as i32)];
            let mut pieces = vec![
                Piece::In(words(&ids)),
                Piece::In(order.clone()),
                Piece::In(dtype.bytes(&dout)),
                Piece::Both(Dtype::F32.bytes(&before)),
                Piece::Both(partials),
            ];
            pieces.extend(numbers());
            let entry = format!("embedding_backward_{}", dtype.suffix());
            let got = run(module, &entry, config, &pieces);
            let mut pieces = vec![
                Piece::In(words(&ids)),
                Piece::In(order),
                Piece::In(got[1].clone()),
                Piece::Both(got[0].clone()),
            ];
            pieces.extend(numbers());
            let got = run(module, "embedding_backward_combine", config, &pieces);
            let exact = added::<f64>(&ids, &dout, &before, hidden);
            let plain = added::<f32>(&ids, &dout, &before, hidden);
            check("dtable", Dtype::F32, &got[0], &exact, &plain);
        }
    }
}

fn added<R: Float>(ids: &[u32], dout: &[f64], before: &[f64], hidden: usize) -> Vec<R> {
    let (dout, mut dtable) = (real::<R>(dout), real::<R>(before));
    for (row, &id) in dout.chunks(hidden).zip(ids) {
        for (d, &x) in dtable[id as usize * hidden..].iter_mut().zip(row) {
            *d = *d + x;
        }
    }
    dtable
}

pub fn pick_rows_is_right(module: &Module) {
    for dtype in DTYPES {
        for (windows, context, hidden) in [(1, 1, 1), (3, 5, 17), (5, 9, 24)] {
            let x = dtype.random(1, windows * context * hidden, 1.0);
            let column: Vec<u32> = (0..windows).map(|w| ((w * 7 + 4) % context) as u32).collect();
            let rows = column.iter().enumerate().map(|(w, &column)| w * context + column as usize);
            let exact: Vec<f64> =
                rows.flat_map(|row| &x[row * hidden..][..hidden]).copied().collect();
            let pieces = [
                Piece::In(dtype.bytes(&x)),
                Piece::In(words(&column)),
                Piece::Out(windows * hidden * dtype.size()),
                value(windows as i32),
                value(context as i32),
                value(hidden as i32),
            ];
            let entry = format!("gather_rows_{}", dtype.suffix());
            let got = run(module, &entry, Config::linear(2, 32), &pieces);
            assert!(got[0] == dtype.bytes(&exact), "the rows");
        }
    }
}

#[test]
fn embed_takes_rows() {
    holds("embedding", embed_is_right);
}

#[test]
fn embed_sorts_stably() {
    holds("embedding", embed_sort_is_right);
}

#[test]
fn embed_adds_rows_back_in_a_fixed_order() {
    holds("embedding", embed_backward_is_right);
}

#[test]
fn pick_rows_takes_one_of_each_window() {
    holds("gather_rows", pick_rows_is_right);
}

pub const EMBEDDING_SORT: Mutants = Mutants {
    kernel: "embedding",
    only: &[],
    mutants: &[
        ("unstable_ranks", "seen + before", "seen + __popc(same) - 1 - before"),
        ("earlier_tiles_forgotten", "", ""),
        ("low_digit_twice", " >> shift", ""),
        ("counts_read_early", "", ""),
        ("counts_overwritten", "", ""),
    ],
    check: embed_sort_is_right,
};

pub const EMBEDDING_BACKWARD: Mutants = Mutants {
    kernel: "embedding",
    only: &[],
    mutants: &[
        ("partial_run_added", " || continues", ""),
        ("long_run_added_twice", " || began_before", ""),
        ("last_partial_dropped", "part <= last", "part < last"),
        ("partial_in_wrong_slot", "began_before ? 0 : 1", "continues ? 1 : 0"),
    ],
    check: embed_backward_is_right,
};

pub const GATHER_ROWS: Mutants = Mutants {
    kernel: "gather_rows",
    only: &[],
    mutants: &[("position_ignored", " + position[b]", "")],
    check: pick_rows_is_right,
};
