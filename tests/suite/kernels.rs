//! Every kernel, as nvcc compiled it, in the simulator: against f64, on shapes that leave lanes,
//! rows and the tails of vectors over, under several orders of warps and blocks, races watched.
//!
//! The bound is a rule: at most twice the error of the same formula in plain f32, plus what one
//! rounding of the output costs and the few units an approximate function may be off.

use half::bf16;
use num_traits::Float;
use ptxsim::{Arg, Check, Config, Memory, Module, Options, Schedule};

/// The PTX of a kernel file, ready to launch, or `None` after a loud line.
fn module(name: &str) -> Option<Module> {
    if let Err(why) = laam::kernels::BUILD.cuda {
        eprintln!("SKIPPED: the kernels in the simulator, because {why}");
        return None;
    }
    let kernel = laam::kernels::kernel(name).unwrap_or_else(|| panic!("no kernel file {name}"));
    Some(Module::from_ptx(kernel.ptx).unwrap_or_else(|error| panic!("{name}: {error}")))
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Type {
    F32,
    Bf16,
}

impl Type {
    fn suffix(self) -> &'static str {
        if self == Type::F32 { "f32" } else { "bf16" }
    }
    fn size(self) -> usize {
        if self == Type::F32 { 4 } else { 2 }
    }
    /// How many values a vector access moves.
    fn full(self, width: usize) -> usize {
        let full = 16 / self.size();
        if width.is_multiple_of(full) { full } else { 1 }
    }
    fn round(self, x: f64) -> f64 {
        if self == Type::F32 { f64::from(x as f32) } else { narrow(x).to_f64() }
    }
    fn bytes(self, values: &[f64]) -> Vec<u8> {
        let bytes = |x: &f64| match self {
            Type::F32 => (*x as f32).to_le_bytes().to_vec(),
            Type::Bf16 => narrow(*x).to_le_bytes().to_vec(),
        };
        values.iter().flat_map(bytes).collect()
    }
    fn values(self, bytes: &[u8]) -> Vec<f64> {
        let value = |b: &[u8]| match self {
            Type::F32 => f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
            Type::Bf16 => bf16::from_le_bytes([b[0], b[1]]).to_f64(),
        };
        bytes.chunks_exact(self.size()).map(value).collect()
    }
    /// Uniform in [-scale, scale), as this type holds it.
    fn random(self, seed: u64, count: usize, scale: f64) -> Vec<f64> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mut x = state;
            x = (x ^ x >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            x = (x ^ x >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
            (x ^ x >> 31) >> 11
        };
        (0..count).map(|_| self.round((next() as f64 / 2f64.powi(52) - 1.0) * scale)).collect()
    }
}

/// By way of f32: `bf16::from_f64` drops the low half of the number before it rounds.
fn narrow(x: f64) -> bf16 {
    bf16::from_f32(x as f32)
}

const TYPES: [Type; 2] = [Type::F32, Type::Bf16];

/// An argument of a launch: memory to read, memory to write (poisoned), both, or a plain value.
enum Piece {
    In(Vec<u8>),
    Out(usize),
    Both(Vec<u8>),
    Value(Arg),
}

fn value(value: impl Into<Arg>) -> Piece {
    Piece::Value(value.into())
}

/// Launches under every setting, demands the same bits of each, and returns what was written, in
/// the order of the arguments.
fn run(module: &Module, entry: &str, config: Config, pieces: &[Piece]) -> Vec<Vec<u8>> {
    let kernel = module.kernel(entry).unwrap_or_else(|| panic!("no entry {entry}"));
    let mut before: Option<Vec<Vec<u8>>> = None;
    for (schedule, check) in [
        (Schedule::Greedy, Check::Races),
        (Schedule::Reverse, Check::Races),
        (Schedule::Priorities(1), Check::Faults),
        (Schedule::Priorities(2), Check::Faults),
    ] {
        let memory = Memory::new();
        let mut written = Vec::new();
        let mut arguments = Vec::new();
        for piece in pieces {
            arguments.push(match piece {
                Piece::In(bytes) => Arg::from(memory.alloc(bytes)),
                Piece::Both(bytes) => {
                    written.push((memory.alloc(bytes), bytes.len()));
                    Arg::from(written[written.len() - 1].0)
                }
                Piece::Out(len) => {
                    written.push((memory.alloc_uninit(*len), *len));
                    Arg::from(written[written.len() - 1].0)
                }
                Piece::Value(value) => value.clone(),
            });
        }
        let options = Options { schedule, check, ..Options::default() };
        let launched = kernel.launch(&memory, &config, &arguments, &options);
        launched.unwrap_or_else(|fault| panic!("{entry} under {options:?}: {fault}"));
        let read = |&(at, len): &(u64, usize)| memory.read_vec(at, len).expect("all is written");
        let after: Vec<_> = written.iter().map(read).collect();
        assert!(before.is_none_or(|before| before == after), "{entry}: {options:?} changes bits");
        before = Some(after);
    }
    before.expect("there are settings")
}

fn check(what: &str, ty: Type, got: &[u8], exact: &[f64], plain: &[f32]) {
    let norm = |values: &[f64]| values.iter().map(|x| x * x).sum::<f64>().sqrt();
    let error = |got: &[f64]| {
        let apart: Vec<f64> = got.iter().zip(exact).map(|(g, e)| g - e).collect();
        norm(&apart) / norm(exact)
    };
    let got = ty.values(got);
    assert_eq!(got.len(), exact.len(), "{what}");
    let plain: Vec<f64> = plain.iter().map(|&x| ty.round(f64::from(x))).collect();
    let rounding = if ty == Type::F32 { 8.0 / 2f64.powi(24) } else { 1.0 / 2f64.powi(8) };
    let (error, bound) = (error(&got), 2.0 * error(&plain) + rounding);
    assert!(error <= bound, "{what} in {ty:?}: error {error:.3e}, allowed {bound:.3e}");
}

fn real<R: Float>(values: &[f64]) -> Vec<R> {
    values.iter().map(|&x| R::from(x).expect("a float")).collect()
}

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
    let Some(module) = module("swiglu") else { return };
    for ty in TYPES {
        for (rows, inter) in [(1, 1), (3, 17), (5, 24), (7, 72)] {
            let gate_up = ty.random(1, rows * 2 * inter, 6.0);
            let dout = ty.random(2, rows * inter, 1.0);
            let (exact, exact_back) = swiglu::<f64>(&gate_up, &dout, inter);
            let (plain, plain_back) = swiglu::<f32>(&gate_up, &dout, inter);
            let columns = inter / ty.full(inter);
            let grid = [columns.div_ceil(8) as u32, 2, 1];
            let config = Config { grid, block: [8, 4, 1], shared: 0 };
            let shape = || [value(rows as i32), value(inter as i32)];
            let (gate_up, dout) = (ty.bytes(&gate_up), ty.bytes(&dout));

            let mut pieces = vec![Piece::In(gate_up.clone()), Piece::Out(dout.len())];
            pieces.extend(shape());
            let got = run(&module, &format!("swiglu_{}", ty.suffix()), config, &pieces);
            check("swiglu", ty, &got[0], &exact, &plain);

            let len = gate_up.len();
            let mut pieces = vec![Piece::In(gate_up), Piece::In(dout), Piece::Out(len)];
            pieces.extend(shape());
            let got = run(&module, &format!("swiglu_backward_{}", ty.suffix()), config, &pieces);
            check("swiglu backward", ty, &got[0], &exact_back, &plain_back);
        }
    }
}

/// y, rstd.
fn rms_norm<R: Float>(sum: &[f64], weight: &[f64], eps: f64) -> (Vec<R>, Vec<R>) {
    let (sum, weight, eps) = (real::<R>(sum), real::<R>(weight), real::<R>(&[eps])[0]);
    let hidden = real::<R>(&[weight.len() as f64])[0];
    let (mut y, mut rstd) = (Vec::new(), Vec::new());
    for row in sum.chunks(weight.len()) {
        let squares = row.iter().fold(R::zero(), |all, &x| all + x * x);
        let scale = R::one() / (squares / hidden + eps).sqrt();
        y.extend(row.iter().zip(&weight).map(|(&x, &w)| x * scale * w));
        rstd.push(scale);
    }
    (y, rstd)
}

/// dx, dweight.
fn rms_norm_backward<R: Float>(
    [x, rstd, weight, dy, dsum]: [&[f64]; 5],
    before: &[f64],
) -> (Vec<R>, Vec<R>) {
    let [x, rstd, weight, dy, dsum] = [x, rstd, weight, dy, dsum].map(|values| real::<R>(values));
    let (mut dx, mut dweight) = (Vec::new(), real::<R>(before));
    let hidden = weight.len();
    for (row, &scale) in rstd.iter().enumerate() {
        let at = row * hidden;
        let n = |i: usize| x[at + i] * scale;
        let g = |i: usize| dy[at + i] * weight[i];
        let mean = (0..hidden).fold(R::zero(), |all, i| all + g(i) * n(i));
        let mean = mean / real::<R>(&[hidden as f64])[0];
        for i in 0..hidden {
            dx.push(dsum[at + i] + scale * (g(i) - n(i) * mean));
            dweight[i] = dweight[i] + dy[at + i] * n(i);
        }
    }
    (dx, dweight)
}

/// Rows, hidden, threads a row, rows at once: lanes without a column, rows left over, one and
/// several warps a row.
const NORMS: [(usize, usize, u32, u32); 5] =
    [(1, 8, 8, 4), (5, 17, 16, 4), (9, 64, 8, 8), (5, 328, 32, 2), (3, 520, 64, 2)];

#[test]
fn rms_norm_adds_the_residual_and_normalises() {
    let Some(module) = module("rms_norm") else { return };
    for ty in TYPES {
        for (rows, hidden, width, at_once) in NORMS {
            let x = ty.random(1, rows * hidden, 3.0);
            let residual = ty.random(2, rows * hidden, 3.0);
            let weight = ty.random(3, hidden, 1.0);
            let sum: Vec<f64> = x
                .iter()
                .zip(&residual)
                .map(|(x, r)| ty.round((*x as f32 + *r as f32).into()))
                .collect();
            let config = Config { grid: [2, 1, 1], block: [width, at_once, 1], shared: 0 };
            let entry = format!("rms_norm_{}", ty.suffix());
            let bytes = ty.bytes(&x);
            let tail = || {
                [
                    Piece::Out(bytes.len()),
                    Piece::Out(4 * rows),
                    value(rows as i32),
                    value(hidden as i32),
                    value(1e-5f32),
                ]
            };
            let [given, added, w] = [&x, &residual, &weight].map(|values| ty.bytes(values));

            let mut pieces = vec![
                Piece::In(given.clone()),
                Piece::In(added),
                Piece::In(w.clone()),
                Piece::Out(bytes.len()),
            ];
            pieces.extend(tail());
            let got = run(&module, &entry, config, &pieces);
            assert_eq!(ty.values(&got[0]), sum, "the sum, rounded once");
            let (y, rstd) = rms_norm::<f64>(&sum, &weight, 1e-5);
            let (plain, plain_rstd) = rms_norm::<f32>(&sum, &weight, 1e-5);
            check("y", ty, &got[1], &y, &plain);
            check("rstd", Type::F32, &got[2], &rstd, &plain_rstd);

            let mut pieces = vec![Piece::In(given), value(0u64), Piece::In(w), value(0u64)];
            pieces.extend(tail());
            let got = run(&module, &entry, config, &pieces);
            let (y, _) = rms_norm::<f64>(&x, &weight, 1e-5);
            check("y alone", ty, &got[0], &y, &rms_norm::<f32>(&x, &weight, 1e-5).0);
        }
    }
}

#[test]
fn rms_norm_goes_back_and_adds_to_the_weights_gradient() {
    let Some(module) = module("rms_norm") else { return };
    for ty in TYPES {
        for (rows, hidden, width, at_once) in NORMS {
            let count = rows * hidden;
            let (x, dy) = (ty.random(1, count, 3.0), ty.random(2, count, 1.0));
            let (weight, dsum) = (ty.random(3, hidden, 1.0), ty.random(4, count, 1.0));
            let rstd = Type::F32.random(5, rows, 0.5);
            let before = Type::F32.random(6, hidden, 1.0);
            let zeros = vec![0.0; count];
            let shared = at_once * hidden as u32 * 4;
            let config = Config { grid: [2, 1, 1], block: [width, at_once, 1], shared };
            for past in [Some(&dsum), None] {
                let all = [&x, &rstd, &weight, &dy, past.unwrap_or(&zeros)].map(Vec::as_slice);
                let (dx, dweight) = rms_norm_backward::<f64>(all, &before);
                let (plain_dx, plain_dweight) = rms_norm_backward::<f32>(all, &before);
                let pieces = [
                    Piece::In(ty.bytes(&x)),
                    Piece::In(Type::F32.bytes(&rstd)),
                    Piece::In(ty.bytes(&weight)),
                    Piece::In(ty.bytes(&dy)),
                    past.map_or(value(0u64), |dsum| Piece::In(ty.bytes(dsum))),
                    Piece::Out(count * ty.size()),
                    Piece::Out(2 * hidden * 4),
                    value(rows as i32),
                    value(hidden as i32),
                ];
                let entry = format!("rms_norm_backward_{}", ty.suffix());
                let got = run(&module, &entry, config, &pieces);
                check("dx", ty, &got[0], &dx, &plain_dx);

                let pieces = [
                    Piece::In(got[1].clone()),
                    Piece::Both(Type::F32.bytes(&before)),
                    value(2i32),
                    value(hidden as i32),
                ];
                let grid = [hidden.div_ceil(32) as u32, 1, 1];
                let config = Config { grid, block: [32, 8, 1], shared: 0 };
                let got = run(&module, "rms_norm_backward_weight", config, &pieces);
                check("dweight", Type::F32, &got[0], &dweight, &plain_dweight);
            }
        }
    }
}

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
    let Some(module) = module("adamw") else { return };
    for (ty, count, t) in
        [(Type::F32, 1, 1), (Type::Bf16, 7, 2), (Type::F32, 1030, 1000), (Type::Bf16, 1031, 77)]
    {
        for norm in [0.5f32, 4.0, f32::INFINITY, f32::NAN] {
            let pieces = [
                Piece::In(LEARNING_RATE.to_le_bytes().to_vec()),
                Piece::In((t as u64).to_le_bytes().to_vec()),
                Piece::In(norm.to_le_bytes().to_vec()),
                Piece::Out(24),
                value(1.0f32),
                value(BETAS.0),
                value(BETAS.1),
            ];
            let rates = run(&module, "adamw_rates", Config::linear(1, 1), &pieces).remove(0);

            let [g, p, m] = [1, 2, 3].map(|seed| Type::F32.random(seed, count, 1.0));
            let v: Vec<f64> = Type::F32.random(4, count, 1.0).iter().map(|v| v.abs()).collect();
            let [gb, pb, mb, vb] = [&g, &p, &m, &v].map(|values| Type::F32.bytes(values));
            let mut pieces = vec![
                Piece::In(gb),
                Piece::Both(pb.clone()),
                Piece::Both(mb.clone()),
                Piece::Both(vb.clone()),
            ];
            if ty == Type::Bf16 {
                pieces.push(Piece::Both(vec![0; 2 * count]));
            }
            pieces.extend([value(count as u64), Piece::In(rates)]);
            pieces.extend([DECAY, BETAS.0, BETAS.1, EPSILON].map(value));
            let entry = format!("adamw_{}", ty.suffix());
            let got = run(&module, &entry, Config::linear(2, 256), &pieces);
            if !norm.is_finite() {
                assert_eq!(got[..3], [pb, mb, vb], "norm {norm}");
                continue;
            }
            let clip = f64::from((1.0 / (norm + 1e-6)).min(1.0));
            let exact = adamw::<f64>([&g, &p, &m, &v], t, clip);
            let plain = adamw::<f32>([&g, &p, &m, &v], t, clip);
            for (i, what) in ["p", "m", "v"].into_iter().enumerate() {
                check(what, Type::F32, &got[i], &exact[i], &plain[i]);
            }
            if ty == Type::Bf16 {
                assert_eq!(got[3], Type::Bf16.bytes(&Type::F32.values(&got[0])), "the copy");
            }
        }
    }
}

#[test]
fn fills_and_casts_are_exact() {
    let Some(module) = module("fill_cast") else { return };
    let config = Config::linear(2, 256);
    for count in [1, 7, 64, 5003] {
        for ty in TYPES {
            let pieces = [Piece::Out(count * ty.size()), value(1.5f32), value(count as u64)];
            let got = run(&module, &format!("fill_{}", ty.suffix()), config, &pieces);
            assert_eq!(got[0], ty.bytes(&vec![1.5; count]));
        }
        let mut x = Type::F32.random(1, count, 1e3);
        x[0] = f64::INFINITY;
        let (wide, narrow) = (Type::F32.bytes(&x), Type::Bf16.bytes(&x));
        let pieces = [Piece::In(wide), Piece::Out(2 * count), value(count as u64)];
        assert!(run(&module, "cast_f32_bf16", config, &pieces)[0] == narrow, "{count} to bf16");
        let exact = Type::F32.bytes(&Type::Bf16.values(&narrow));
        let pieces = [Piece::In(narrow), Piece::Out(4 * count), value(count as u64)];
        assert!(run(&module, "cast_bf16_f32", config, &pieces)[0] == exact, "{count} to f32");
    }
}
