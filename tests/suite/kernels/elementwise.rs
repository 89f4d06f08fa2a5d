//! SwiGLU, fills and casts.

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
fn fills_and_casts_are_exact() {
    holds("fill_cast", fills_and_casts);
}

fn fills_and_casts(module: &Module) {
    let config = Config::linear(2, 256);
    for count in [1, 7, 64, 5003] {
        for dtype in DTYPES {
            let pieces = [Piece::Out(count * dtype.size()), value(1.5f32), value(count as u64)];
            let got = run(module, &format!("fill_{}", dtype.suffix()), config, &pieces);
            assert_eq!(got[0], dtype.bytes(&vec![1.5; count]));
        }
        let mut x = Dtype::F32.random(1, count, 1e3);
        x[0] = f64::INFINITY;
        let wide = Dtype::F32.bytes(&x);
        for dtype in [Dtype::Bf16, Dtype::F16] {
            let (name, narrow) = (dtype.suffix(), dtype.bytes(&x));
            let pieces = [Piece::In(wide.clone()), Piece::Out(2 * count), value(count as u64)];
            let got = run(module, &format!("cast_f32_{name}"), config, &pieces);
            assert!(got[0] == narrow, "{count} to {name}");
            let exact = Dtype::F32.bytes(&dtype.values(&narrow));
            let pieces = [Piece::In(narrow), Piece::Out(4 * count), value(count as u64)];
            let got = run(module, &format!("cast_{name}_f32"), config, &pieces);
            assert!(got[0] == exact, "{count} from {name}");
        }
    }
}

#[test]
fn mistakes_in_swiglu_are_seen() {
    let bugs = [
        ("slope without its second term", "(1.0f + gate[i] * (1.0f - s))", "1.0f"),
        (
            "rows of half the width",
            "*gates = gate_up + static_cast<size_t>(row) * 2 * inter",
            "*gates = gate_up + static_cast<size_t>(row) * inter",
        ),
        (
            "vectors where rows do not allow them",
            "inter % FULL<T> == 0 && aligned(gate_up, out)",
            "aligned(gate_up, out)",
        ),
    ];
    planted("swiglu", &bugs, swiglu_is_right);
}

#[test]
fn mistakes_in_fills_and_casts_are_seen() {
    let bugs = [
        ("tail forgotten", "at = whole + thread; at < count", "at = whole + thread; at < whole"),
        ("rounded to zero", "__float2bfloat16_rn(x)", "__float2bfloat16_rz(x)"),
    ];
    planted("fill_cast", &bugs, fills_and_casts);
}
