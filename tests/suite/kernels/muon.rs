//! Muon: its elementwise parts, and a whole step with the products between them.

use super::*;

const LEARNING_RATE: f64 = 0.02;
const MOMENTUM: f64 = 0.95;
const DECAY: f64 = 0.1;
const A: f64 = 3.4445;
const B: f64 = -4.775;
const C: f64 = 2.0315;
const LOSS_SCALE: f32 = 0.25;

fn rates(module: &Module, norm: f32) -> Vec<u8> {
    let pieces = [
        Piece::In(LEARNING_RATE.to_le_bytes().to_vec()),
        Piece::In(norm.to_le_bytes().to_vec()),
        Piece::In(LOSS_SCALE.to_le_bytes().to_vec()),
        Piece::Out(16),
        value(1.0f32),
    ];
    run(module, "muon_step_params", Config::linear(1, 1), &pieces).remove(0)
}

/// Where two matrices of `count` elements lie in an arena of three: the last, and the first.
fn places(count: usize) -> [usize; 2] {
    [2 * count, 0]
}

fn offsets(count: usize) -> Piece {
    Piece::In(places(count).iter().flat_map(|&at| (at as u64).to_le_bytes()).collect())
}

/// What stands at the places, behind one another.
fn at_places<T: Copy>(arena: &[T], count: usize) -> Vec<T> {
    places(count).iter().flat_map(|&at| arena[at..at + count].to_vec()).collect()
}

fn grid(blocks: u32) -> Config {
    Config { grid: [blocks, 2, 1], block: [256, 1, 1], shared: 0 }
}

/// The arena of m, u of both matrices, and the shares of their |u|^2.
fn momentum(module: &Module, g: &[f64], m: &[f64], rates: &[u8]) -> Vec<Vec<u8>> {
    let count = g.len() / 3;
    let [gb, mb] = [g, m].map(|values| Dtype::F32.bytes(values));
    let pieces = [
        Piece::In(gb),
        Piece::Both(mb),
        Piece::Out(2 * 4 * count),
        Piece::Out(2 * 2 * 8),
        offsets(count),
        value(count as u64),
        Piece::In(rates.to_vec()),
        value(MOMENTUM),
    ];
    run(module, "muon_momentum", grid(2), &pieces)
}

fn scale(module: &Module, u: &[u8], shares: &[u8]) -> Vec<u8> {
    let pieces = [
        Piece::In(u.to_vec()),
        Piece::In(shares.to_vec()),
        Piece::Out(u.len()),
        value(u.len() as u64 / 8),
        value(2),
    ];
    run(module, "muon_normalize", grid(3), &pieces).remove(0)
}

fn combine(module: &Module, x: &[f64], y: &[f64], of: [f64; 2]) -> Vec<u8> {
    let [xb, yb] = [x, y].map(|values| Dtype::F32.bytes(values));
    let pieces = [
        Piece::In(xb),
        Piece::In(yb),
        Piece::Out(4 * x.len()),
        value(of[0] as f32),
        value(of[1] as f32),
        value(y.len() as u64),
    ];
    run(module, "muon_axpby", Config::linear(2, 256), &pieces).remove(0)
}

/// The arenas of p and of its copy.
fn update(
    module: &Module,
    dtype: Dtype,
    x: &[u8],
    p: &[f64],
    rates: &[u8],
    f: f64,
) -> Vec<Vec<u8>> {
    let count = p.len() / 3;
    let copy = match dtype {
        Dtype::F32 => Piece::Null,
        _ => Piece::Both(dtype.bytes(p)),
    };
    let pieces = [
        Piece::In(x.to_vec()),
        Piece::Both(Dtype::F32.bytes(p)),
        copy,
        offsets(count),
        value(count as u64),
        Piece::In(rates.to_vec()),
        value(DECAY),
        value(f),
    ];
    run(module, &format!("muon_update_{}", dtype.suffix()), grid(2), &pieces)
}

fn clip(norm: f32) -> f64 {
    ((1.0 / (norm + 1e-6)).min(1.0) / LOSS_SCALE).into()
}

/// m, u.
fn moments<R: Float>(g: &[f64], m: &[f64], norm: f32) -> [Vec<R>; 2] {
    let [clip, keep] = [clip(norm), MOMENTUM].map(|x| R::from(x).unwrap());
    let g: Vec<R> = real::<R>(g).into_iter().map(|g| g * clip).collect();
    let m: Vec<R> = real::<R>(m).into_iter().zip(&g).map(|(m, &g)| keep * m + g).collect();
    let u = g.iter().zip(&m).map(|(&g, &m)| g + keep * m).collect();
    [m, u]
}

fn normed<R: Float>(u: &[f64]) -> Vec<R> {
    let u = real::<R>(u);
    let norm = u.iter().fold(R::zero(), |sum, &u| sum + u * u).sqrt() + R::from(1e-7).unwrap();
    u.into_iter().map(|u| u / norm).collect()
}

fn stepped<R: Float>(x: &[f64], p: &[f64], factor: f64) -> Vec<R> {
    let [shrink, step] =
        [1.0 - LEARNING_RATE * DECAY, LEARNING_RATE * factor].map(|x| R::from(x).unwrap());
    real::<R>(p).into_iter().zip(real::<R>(x)).map(|(p, x)| p * shrink - step * x).collect()
}

pub fn muon_parts_are_right(module: &Module) {
    for count in [1, 63, 1032] {
        for norm in [0.5f32, 4.0, f32::NAN, f32::INFINITY] {
            let rates = rates(module, norm);
            let [g, m, p] = [1, 2, 3].map(|seed| Dtype::F32.random(seed, 3 * count, 1.0));
            let between = 4 * count..8 * count;
            let got = momentum(module, &g, &m, &rates);
            let go = norm.is_finite();
            assert!(got[0][between.clone()] == Dtype::F32.bytes(&m)[between.clone()], "no matrix");
            let [g, m] = [g, m].map(|arena| at_places(&arena, count));
            let after = Dtype::F32.bytes(&at_places(&Dtype::F32.values(&got[0]), count));
            if go {
                let exact = moments::<f64>(&g, &m, norm);
                let plain = moments::<f32>(&g, &m, norm);
                check("m", Dtype::F32, &after, &exact[0], &plain[0]);
                check("u", Dtype::F32, &got[1], &exact[1], &plain[1]);
            } else {
                assert!(after == Dtype::F32.bytes(&m), "m, norm {norm}");
                assert!(got[1] == vec![0; 8 * count], "u, norm {norm}");
            }
            let x = scale(module, &got[1], &got[2]);
            if go {
                for (x, u) in x.chunks(4 * count).zip(Dtype::F32.values(&got[1]).chunks(count)) {
                    check("X", Dtype::F32, x, &normed::<f64>(u), &normed::<f32>(u));
                }
            }
            for dtype in DTYPES {
                let factor = 1.5;
                let got = update(module, dtype, &x, &p, &rates, factor);
                assert!(
                    got[0][between.clone()] == Dtype::F32.bytes(&p)[between.clone()],
                    "no matrix"
                );
                let after = Dtype::F32.bytes(&at_places(&Dtype::F32.values(&got[0]), count));
                let (x, p) = (Dtype::F32.values(&x), at_places(&p, count));
                if go {
                    let exact = stepped::<f64>(&x, &p, factor);
                    check("p", Dtype::F32, &after, &exact, &stepped::<f32>(&x, &p, factor));
                } else {
                    assert!(after == Dtype::F32.bytes(&p), "p, norm {norm}");
                }
                if dtype != Dtype::F32 {
                    assert!(got[1] == dtype.bytes(&Dtype::F32.values(&got[0])), "the copy");
                }
            }
        }
        let (x, y) = (Dtype::F32.random(4, count, 1.0), Dtype::F32.random(5, count, 1.0));
        let got = combine(module, &x, &y, [B, C]);
        let [b, c] = [B as f32, C as f32];
        let exact: Vec<f64> =
            x.iter().zip(&y).map(|(x, y)| f64::from(b) * x + f64::from(c) * y).collect();
        let plain: Vec<f32> =
            x.iter().zip(&y).map(|(&x, &y)| b * x as f32 + c * y as f32).collect();
        check("combined", Dtype::F32, &got, &exact, &plain);
    }
}

/// `[rows, inner]` by `[inner, cols]`, each given by its entries.
fn product<R: Float>(
    [rows, inner, cols]: [usize; 3],
    a: impl Fn(usize, usize) -> R,
    b: impl Fn(usize, usize) -> R,
) -> Vec<R> {
    let entry = |i: usize, j: usize| (0..inner).fold(R::zero(), |sum, k| sum + a(i, k) * b(k, j));
    (0..rows * cols).map(|at| entry(at / cols, at % cols)).collect()
}

/// Five iterations on X, `[rows, cols]`, with the products as the head of the kernel file says.
fn iterations(
    [rows, cols]: [usize; 2],
    mut x: Vec<f64>,
    combine: impl Fn(&[f64], &[f64], [f64; 2]) -> Vec<f64>,
) -> Vec<f64> {
    let n = rows.min(cols);
    for _ in 0..5 {
        let at = |i: usize, j: usize| x[i * cols + j];
        let a = if rows > cols {
            product([n, rows, n], |i, k| at(k, i), at)
        } else {
            product([n, cols, n], at, |k, j| at(j, k))
        };
        let square = product([n, n, n], |i, k| a[i * n + k], |k, j| a[k * n + j]);
        let b = combine(&a, &square, [B, C]);
        let b = |i: usize, j: usize| b[i * n + j];
        let bx = if rows > cols {
            product([rows, n, cols], at, b)
        } else {
            product([rows, n, cols], b, at)
        };
        x = combine(&x, &bx, [A, 1.0]);
    }
    x
}

pub fn muon_step_is_right(module: &Module) {
    for [rows, cols] in [[3, 5], [8, 2], [6, 6]] {
        let (count, norm) = (rows * cols, 4.0);
        let [g, m, p] = [1, 2, 3].map(|seed| Dtype::F32.random(seed, 3 * count, 1.0));
        let rates = rates(module, norm);
        let got = momentum(module, &g, &m, &rates);
        let x = Dtype::F32.values(&scale(module, &got[1], &got[2]));
        let iterated = x.chunks(count).flat_map(|x| {
            iterations([rows, cols], x.to_vec(), |x, y, of| {
                Dtype::F32.values(&combine(module, x, y, of))
            })
        });
        let factor = (rows as f64 / cols as f64).max(1.0).sqrt();
        let x = Dtype::F32.bytes(&iterated.collect::<Vec<_>>());
        let got = update(module, Dtype::F32, &x, &p, &rates, factor);
        // The second matrix, which is the first in the arenas.
        let [g, m, p] = [g, m, p].map(|arena| arena[..count].to_vec());
        let got = [got[0][..4 * count].to_vec()];

        // The definition: on its side where tall, X = a X + (b A + c A A) X.
        let [_, u] = moments::<f64>(&g, &m, norm);
        let (n, wide) = (rows.min(cols), rows.max(cols));
        let side = |i: usize, j: usize| if rows > cols { j * cols + i } else { i * cols + j };
        let u = normed::<f64>(&u);
        let mut exact: Vec<f64> = (0..count).map(|at| u[side(at / wide, at % wide)]).collect();
        for _ in 0..5 {
            let x = |i: usize, j: usize| exact[i * wide + j];
            let a = product([n, wide, n], x, |k, j| x(j, k));
            let aa = product([n, n, n], |i, k| a[i * n + k], |k, j| a[k * n + j]);
            let b = |i: usize, k: usize| B * a[i * n + k] + C * aa[i * n + k];
            let bx = product([n, n, wide], b, x);
            exact = exact.iter().zip(bx).map(|(x, bx)| A * x + bx).collect();
        }
        let mut x = vec![0.0; count];
        for at in 0..count {
            x[side(at / wide, at % wide)] = exact[at];
        }
        let exact = stepped::<f64>(&x, &p, factor);
        // The iterations amplify the roundings of f32 some; what they move is small beside p.
        check("p after a step", Dtype::F32, &got[0], &exact, &stepped::<f32>(&x, &p, factor));
    }
}

#[test]
fn muon_is_right_part_by_part() {
    holds("muon", muon_parts_are_right);
}

#[test]
fn muon_is_right_with_the_products_between() {
    holds("muon", muon_step_is_right);
}

pub const MUON: Mutants = Mutants {
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
        ("shadow_not_stored", "", ""),
    ],
    check: muon_parts_are_right,
};
