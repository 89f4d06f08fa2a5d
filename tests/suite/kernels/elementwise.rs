//! SwiGLU and fill.

use super::*;

/// Forward, dgate_up.
fn swiglu<R: Float>(gate_up: &[f64], dout: &[f64], inter: usize) -> (Vec<R>, Vec<R>) {
    let (gate_up, dout) = (real::<R>(gate_up), real::<R>(dout));
    let (mut out, mut back) = (Vec::new(), vec![R::zero(); gate_up.len()]);
    for (i, &d) in dout.iter().enumerate() {
        let at = i / inter * 2 * inter + i % inter;
        let (gate, up) = (gate_up[at], gate_up[at + inter]);
        let s = R::one() / (R::one() + (-gate).exp());
        out.push(gate * s * up);
        back[at] = d * up * s * (R::one() + gate * (R::one() - s));
        back[at + inter] = d * gate * s;
    }
    (out, back)
}

#[test]
fn swiglu_is_right_there_and_back() {
    holds("swiglu", swiglu_is_right);
}

fn swiglu_is_right(module: &Module) {
    for dtype in DTYPES {
        for (rows, inter) in [(1, 1), (3, 17), (5, 24), (7, 72)] {
            let gate_up = dtype.random(1, rows * 2 * inter, 6.0);
            let dout = dtype.random(2, rows * inter, 1.0);
            let (exact, exact_back) = swiglu::<f64>(&gate_up, &dout, inter);
            let (plain, plain_back) = swiglu::<f32>(&gate_up, &dout, inter);
            let columns = inter / dtype.full(inter);
            let grid = [columns.div_ceil(8) as u32, 2, 1];
            let config = Config { grid, block: [8, 4, 1], shared: 0 };
            let shape = || [value(rows as i32), value(inter as i32)];
            let (gate_up, dout) = (dtype.bytes(&gate_up), dtype.bytes(&dout));

            let mut pieces = vec![Piece::In(gate_up.clone()), Piece::Out(dout.len())];
            pieces.extend(shape());
            let got = run(module, &format!("swiglu_{}", dtype.suffix()), config, &pieces);
            check("swiglu", dtype, &got[0], &exact, &plain);

            let len = gate_up.len();
            let mut pieces = vec![Piece::In(gate_up), Piece::In(dout), Piece::Out(len)];
            pieces.extend(shape());
            let got = run(module, &format!("swiglu_backward_{}", dtype.suffix()), config, &pieces);
            check("swiglu backward", dtype, &got[0], &exact_back, &plain_back);
        }
    }
}

#[test]
fn fill_writes_every_element_and_no_other() {
    holds("fill", fill_is_exact);
}

fn fill_is_exact(module: &Module) {
    for count in [1usize, 7, 64, 5003] {
        let pieces = [Piece::Both(vec![0; 4 * (count + 1)]), value(1.5f32), value(count as u64)];
        let got = run(module, "fill_f32", Config::linear(2, 256), &pieces);
        let exact: Vec<f64> = (0..=count).map(|i| if i < count { 1.5 } else { 0.0 }).collect();
        assert!(got[0] == Dtype::F32.bytes(&exact), "fill of {count}");
    }
}

pub const SWIGLU: Mutants = Mutants {
    kernel: "swiglu",
    only: &[],
    mutants: &[
        ("slope_without_second_term", "(1.0f + gate[i] * (1.0f - s))", "1.0f"),
        ("row_stride_halved", "* 2 * inter", "* inter"),
        ("unaligned_rows_vectorized", "inter % VEC<T> == 0 && ", ""),
    ],
    check: swiglu_is_right,
};

pub const FILL: Mutants = Mutants {
    kernel: "fill",
    only: &[],
    mutants: &[("vector_tail_skipped", "at < count", "at < vector_end")],
    check: fill_is_exact,
};
