//! The norm of the gradients, and AdamW.

use super::*;

const BETAS: (f64, f64) = (0.9, 0.999);
const EPSILON: f64 = 1e-8;
const DECAY: f64 = 0.1;
const LEARNING_RATE: f64 = 3e-3;

/// p, m, v after the step `t`.
fn adamw<R: Float>([g, p, m, v]: [&[f64]; 4], t: i32, clip: f64) -> [Vec<R>; 3] {
    let of = |x: f64| real::<R>(&[x])[0];
    let step_size = of(LEARNING_RATE / (1.0 - BETAS.0.powi(t)));
    let correction = of((1.0 - BETAS.1.powi(t)).sqrt());
    let mut after = [const { Vec::new() }; 3];
    for (((g, p), m), v) in g.iter().zip(p).zip(m).zip(v) {
        let g = of(*g) * of(clip);
        let m = of(*m) + (g - of(*m)) * of(1.0 - BETAS.0);
        let v = of(*v) * of(BETAS.1) + g * g * of(1.0 - BETAS.1);
        let p = of(*p) * of(1.0 - LEARNING_RATE * DECAY)
            - step_size * m / (v.sqrt() / correction + of(EPSILON));
        for (list, value) in after.iter_mut().zip([p, m, v]) {
            list.push(value);
        }
    }
    after
}

#[test]
fn adamw_steps_and_leaves_everything_where_the_norm_is_not_finite() {
    holds("adamw", adamw_is_right);
}

fn adamw_is_right(module: &Module) {
    for (dtype, count, t, loss_scale) in [
        (Dtype::F32, 1, 1, None),
        (Dtype::Bf16, 7, 2, None),
        (Dtype::F32, 1030, 1000, None),
        (Dtype::Bf16, 1031, 77, None),
        (Dtype::F16, 1031, 77, Some(0.25f32)),
    ] {
        for norm in [0.5f32, 4.0, f32::INFINITY, f32::NAN] {
            let pieces = [
                Piece::In(LEARNING_RATE.to_le_bytes().to_vec()),
                Piece::In((t as u64).to_le_bytes().to_vec()),
                Piece::In(norm.to_le_bytes().to_vec()),
                loss_scale.map_or(Piece::Null, |scale| Piece::In(scale.to_le_bytes().to_vec())),
                Piece::Out(24),
                value(1.0f32),
                value(BETAS.0),
                value(BETAS.1),
            ];
            let rates = run(module, "adamw_step_params", Config::linear(1, 1), &pieces).remove(0);

            let [mut g, p, mut m] = [1, 2, 3].map(|seed| Dtype::F32.random(seed, count, 1.0));
            let v = Dtype::F32.random(4, count, 1.0);
            let mut v: Vec<f64> = v.into_iter().map(f64::abs).collect();
            // Some that epsilon matters to.
            for i in 0..count / 4 {
                (g[i], m[i], v[i]) = (g[i] / 2f64.powi(27), m[i] / 2f64.powi(27), 2f64.powi(-54));
            }
            let [gb, pb, mb, vb] = [&g, &p, &m, &v].map(|values| Dtype::F32.bytes(values));
            let mut pieces = vec![
                Piece::In(gb),
                Piece::Both(pb.clone()),
                Piece::Both(mb.clone()),
                Piece::Both(vb.clone()),
            ];
            if dtype != Dtype::F32 {
                pieces.push(Piece::Both(vec![0; 2 * count]));
            }
            // Two chunks, the second of which begins anywhere.
            let first = count / 3;
            let chunk = |start: usize, count: usize| {
                [(start as u64).to_le_bytes(), (count as u64).to_le_bytes(), DECAY.to_le_bytes()]
                    .concat()
            };
            let chunks = [chunk(0, first), chunk(first, count - first)].concat();
            pieces.extend([Piece::In(chunks), Piece::In(rates)]);
            pieces.extend([BETAS.0, BETAS.1, EPSILON].map(value));
            let entry = format!("adamw_{}", dtype.suffix());
            let got = run(module, &entry, Config::linear(2, 256), &pieces);
            if !norm.is_finite() {
                assert_eq!(got[..3], [pb, mb, vb], "norm {norm}");
                continue;
            }
            let clip = (1.0 / (norm + 1e-6)).min(1.0) / loss_scale.unwrap_or(1.0);
            let clip = f64::from(clip);
            let exact = adamw::<f64>([&g, &p, &m, &v], t, clip);
            let plain = adamw::<f32>([&g, &p, &m, &v], t, clip);
            for (i, what) in ["p", "m", "v"].into_iter().enumerate() {
                check(what, Dtype::F32, &got[i], &exact[i], &plain[i]);
            }
            if dtype != Dtype::F32 {
                assert_eq!(got[3], dtype.bytes(&Dtype::F32.values(&got[0])), "the copy");
            }
        }
    }
}

pub fn grad_norm_is_right(module: &Module) {
    // Squares beyond what f32 holds, either way.
    let cases =
        [(1, None, 1.0), (7, Some(1024f32), 1e25), (4099, None, 1e-30), (5000, Some(0.5), 3.0)];
    for (count, scale, size) in cases {
        let gradients = Dtype::F32.random(count as u64, count, size);
        let pieces =
            [Piece::In(Dtype::F32.bytes(&gradients)), Piece::Out(3 * 8), value(count as u64)];
        let partials = run(module, "grad_norm_partials", Config::linear(3, 256), &pieces);
        let pieces = [
            Piece::In(partials[0].clone()),
            scale.map_or(Piece::Null, |scale| Piece::In(scale.to_le_bytes().to_vec())),
            Piece::Out(4),
            value(3),
        ];
        let got = run(module, "grad_norm", Config::linear(1, 256), &pieces);
        let exact = gradients.iter().map(|g| g * g).sum::<f64>().sqrt();
        let exact = (exact / f64::from(scale.unwrap_or(1.0))) as f32;
        let got = f32::from_le_bytes(got[0][..].try_into().unwrap());
        // Rounded once, from a sum in f64: the last bit may differ.
        assert!((got - exact).abs() <= exact * f32::EPSILON, "norm of {count}: {got}, not {exact}");
    }
}

#[test]
fn grad_norm_sums_in_f64() {
    holds("grad_norm", grad_norm_is_right);
}

pub const GRAD_NORM: Mutants = Mutants {
    kernel: "grad_norm",
    only: &[],
    mutants: &[
        ("squares_in_f32", "static_cast<double>(values[i])", "values[i]"),
        ("last_partial_dropped", "block < blocks;", "block < blocks - 1;"),
        ("scaled_twice", "/ scale", "* scale"),
        ("tail_skipped", "", ""),
    ],
    check: grad_norm_is_right,
};

pub const ADAMW: Mutants = Mutants {
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
    check: adamw_is_right,
};
