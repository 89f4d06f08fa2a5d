//! The queue of runs, the list of what they left, and the scale of the losses.

use super::*;

fn record(learning_rate: f64, step: u64, loss_scale: f32, begin: u32) -> Vec<u8> {
    let mut bytes = learning_rate.to_le_bytes().to_vec();
    bytes.extend((2.0 * learning_rate).to_le_bytes());
    bytes.extend(step.to_le_bytes());
    bytes.extend(loss_scale.to_le_bytes());
    bytes.extend(begin.to_le_bytes());
    bytes
}

fn scaling(scale: f32, good: u32) -> Vec<u8> {
    [scale.to_le_bytes(), good.to_le_bytes()].concat()
}

fn next_is_right(module: &Module) {
    let records = [record(1e-3, 1, 0.5, 0), record(2e-3, 2, 0.25, 7), record(3e-3, 3, 0.125, 14)];
    for cursor in 0..3u32 {
        for scale in [None, Some(1024.0)] {
            let pieces = [
                Piece::In(records.concat()),
                Piece::In(words(&[cursor])),
                scale.map_or(Piece::Null, |scale| Piece::In(scaling(scale, 5))),
                Piece::Out(32),
            ];
            let got = run(module, "step_queue_pop", Config::linear(1, 1), &pieces).remove(0);
            let at = cursor as usize;
            let loss_scale = 0.5f32.powi(at as i32 + 1) * scale.unwrap_or(1.0);
            let exact = record(1e-3 * (1.0 + at as f64), at as u64 + 1, loss_scale, 7 * cursor);
            assert!(got == exact, "record {cursor}, scale {scale:?}");
        }
    }
}

fn report_is_right(module: &Module) {
    for (rows, norm) in [(1usize, None), (33, Some(2.5f32)), (5000, Some(f32::INFINITY))] {
        let nll = random(rows as u64, rows, 4.0);
        let pieces = [
            Piece::In(Dtype::F32.encode(&nll)),
            norm.map_or(Piece::Null, |norm| Piece::In(norm.to_le_bytes().to_vec())),
            Piece::Both(vec![0xEE; 3 * 16]),
            Piece::Both(words(&[1])),
            value(rows as i32),
        ];
        let got = run(module, "step_queue_report", Config::linear(1, 1024), &pieces);
        let exact: f64 = nll.iter().map(|&nll| f64::from(nll)).sum();
        let loss = f64::from_le_bytes(got[0][16..24].try_into().unwrap());
        let size = (rows as f64).sqrt() * 4.0;
        assert!((loss - exact).abs() <= 1e-14 * size, "{rows} rows: {loss}, not {exact}");
        assert_eq!(got[0][24..28], norm.unwrap_or(0.0).to_le_bytes());
        // Neither the entry before nor the one behind is touched.
        assert_eq!((&got[0][..16], &got[0][32..]), (&[0xEE; 16][..], &[0xEE; 16][..]));
        assert_eq!(got[1], words(&[2]), "the next run's turn");
    }
}

fn scaling_is_right(module: &Module) {
    for (before, norm, after) in [
        ((1024.0, 0), 1.0f32, (1024.0, 1)),
        ((1024.0, 1998), 1.0, (1024.0, 1999)),
        ((1024.0, 1999), 1.0, (2048.0, 0)),
        ((1024.0, 1999), f32::INFINITY, (512.0, 0)),
        ((1024.0, 7), f32::NAN, (512.0, 0)),
    ] {
        let pieces =
            [Piece::In(norm.to_le_bytes().to_vec()), Piece::Both(scaling(before.0, before.1))];
        let got = run(module, "loss_scale_update", Config::linear(1, 1), &pieces).remove(0);
        assert_eq!(got, scaling(after.0, after.1), "{before:?} and a norm of {norm}");
    }
}

fn queue_is_right(module: &Module) {
    next_is_right(module);
    report_is_right(module);
    scaling_is_right(module);
}

#[test]
fn queued_runs_find_their_records_and_leave_what_they_found() {
    holds("step_queue", queue_is_right);
}

pub const STEP_QUEUE: MutationSet = MutationSet {
    kernel: "step_queue",
    only: &[],
    mutants: &[
        ("first_record_always", "records[*cursor]", "records[0]"),
        ("loss_not_scaled", "", ""),
        ("loss_summed_in_f32", "double sum = 0.0;", "float sum = 0.0f;"),
        ("cursor_not_advanced", "", ""),
        ("scale_never_doubled", "* 2.0f", ""),
        ("count_kept_after_overflow", "0.5f, 0", "0.5f, next.finite_steps"),
    ],
    check: queue_is_right,
};
