//! Kernels that others' compiler made: Triton's PTX for sm_80 against f64, with races watched.
//!
//! `tests/triton/compile.py` holds the kernels and writes the fixtures. Results of bf16 may be off
//! by two unit roundoffs in the 2-norm, gradients through two roundings by four, and f32 by the
//! error of the approximate functions.

use half::bf16;
use ptx_race::{Arg, Check, Config, Fault, FaultKind, Memory, Module, Options, Schedule};

use crate::reference::{EXACT, Random, attention, bf16s_of, bytes_of, f32s_of, relative_error};

const BF16: f64 = 1.0 / 256.0;
const F32: f64 = 1.0 / 524_288.0;

fn text(name: &str) -> String {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/triton/");
    std::fs::read_to_string(format!("{folder}{name}.ptx")).unwrap()
}

/// A buffer of a launch: its bytes, or its length if the kernel writes it first.
#[derive(Clone)]
enum Buffer {
    Holds(Vec<u8>),
    Unwritten(usize),
}

use Buffer::{Holds, Unwritten};

/// Launches a kernel of the corpus and gives its buffers back.
fn launch(
    name: &str,
    text: &str,
    grid: [u32; 2],
    buffers: &[Buffer],
    values: &[Arg],
    options: &Options,
) -> Result<Vec<Vec<u8>>, Box<Fault>> {
    let module = Module::from_ptx(text).unwrap_or_else(|error| panic!("{name}: {error}"));
    let kernel = module.kernels().next().unwrap();
    let memory = Memory::new();
    let made: Vec<(u64, usize)> = buffers
        .iter()
        .map(|buffer| match buffer {
            Holds(bytes) => (memory.alloc(bytes), bytes.len()),
            Unwritten(len) => (memory.alloc_uninit(*len), *len),
        })
        .collect();
    let mut args: Vec<Arg> = made.iter().map(|&(address, _)| Arg::from(address)).collect();
    args.extend_from_slice(values);
    // Triton passes scratch memory that these kernels do not use.
    args.resize(kernel.params().len(), Arg::from(0u64));
    let head = text.lines().next().unwrap();
    let number = |word: &str| -> u32 {
        let at = head.find(word).unwrap();
        head[..at].trim_end().rsplit(' ').next().unwrap().parse().unwrap()
    };
    let block = [32 * number("warps"), 1, 1];
    let shared = number("bytes of shared");
    let config = Config { grid: [grid[0], grid[1], 1], block, shared };
    kernel.launch(&memory, &config, &args, options)?;
    Ok(made.iter().map(|&(at, len)| memory.read_vec(at, len).unwrap()).collect())
}

/// Runs a kernel under several settings; `compare` sees the buffers of each.
fn check(
    name: &str,
    grid: [u32; 2],
    buffers: &[Buffer],
    values: &[Arg],
    compare: impl Fn(&[Vec<u8>]),
) {
    for (schedule, check) in [
        (Schedule::InOrder, Check::Races),
        (Schedule::ReverseOrder, Check::Races),
        (Schedule::Random(1), Check::Faults),
    ] {
        let options = Options { schedule, check, ..Options::default() };
        let out = launch(name, &text(name), grid, buffers, values, &options);
        compare(&out.unwrap_or_else(|fault| panic!("{name}, {schedule:?}: {fault}")));
    }
}

fn close(what: &str, got: &[f64], exact: &[f64], bound: f64) {
    let error = relative_error(got, exact);
    assert!(error <= bound, "{what}: error {error:.3e}, allowed {bound:.3e}");
}

fn floats(random: &mut Random, count: usize) -> Vec<f32> {
    (0..count).map(|_| (4.0 * random.unit()) as f32).collect()
}

fn le(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| value.into()).collect()
}

#[test]
fn triton_add_is_exact() {
    for n in [1, 256, 1000] {
        let mut random = Random::new(1);
        let (x, y) = (floats(&mut random, n), floats(&mut random, n));
        let sums: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
        let buffers = [Holds(le(&x)), Holds(le(&y)), Unwritten(4 * n)];
        let grid = [n.div_ceil(256) as u32, 1];
        check("add", grid, &buffers, &[Arg::from(n as i32)], |out| assert_eq!(out[2], le(&sums)));
    }
}

#[test]
fn triton_matmul_matches_f64() {
    let ragged = [(64, 32, 64), (50, 70, 96), (1, 1, 5), (33, 31, 257)];
    // More steps over k than stages; widths that asynchronous copies need.
    let aligned = [(64, 32, 64), (50, 48, 192), (1, 16, 16)];
    let cases = ragged.map(|shape| ("matmul", shape)).into_iter();
    for (name, (m, n, k)) in cases.chain(aligned.map(|shape| ("matmul_pipelined", shape))) {
        let mut random = Random::new(2);
        let (a, b) = (random.bf16s(m * k, 2.0), random.bf16s(k * n, 2.0));
        let (x, y) = (bf16s_of(&bytes_of(&a)), bf16s_of(&bytes_of(&b)));
        let dot = |i: usize, j: usize| (0..k).map(|l| x[i * k + l] * y[l * n + j]).sum::<f64>();
        let exact: Vec<f64> = (0..m * n).map(|at| dot(at / n, at % n)).collect();
        let buffers = [Holds(bytes_of(&a)), Holds(bytes_of(&b)), Unwritten(2 * m * n)];
        let values = [m, n, k].map(|size| Arg::from(size as i32));
        let grid = [m, n].map(|size| size.div_ceil(32) as u32);
        check(name, grid, &buffers, &values, |out| {
            close(name, &bf16s_of(&out[2]), &exact, BF16);
        });
    }
}

#[test]
fn triton_softmax_matches_f64() {
    for n in [1, 300, 512] {
        let rows = 3;
        let x = floats(&mut Random::new(3), rows * n);
        let exact: Vec<f64> = wide(&x)
            .chunks(n)
            .flat_map(|row| {
                let sum: f64 = row.iter().map(|x| x.exp()).sum();
                row.iter().map(move |x| x.exp() / sum).collect::<Vec<_>>()
            })
            .collect();
        let buffers = [Holds(le(&x)), Unwritten(4 * rows * n)];
        check("softmax", [rows as u32, 1], &buffers, &[Arg::from(n as i32)], |out| {
            close("softmax", &f32s_of(&out[1]), &exact, F32);
        });
    }
}

/// Each row less its mean over its standard deviation, and one over the latter.
fn normal(row: &[f64], epsilon: f64) -> (Vec<f64>, f64) {
    let mean = row.iter().sum::<f64>() / row.len() as f64;
    let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / row.len() as f64;
    let scale = 1.0 / (variance + epsilon).sqrt();
    (row.iter().map(|x| (x - mean) * scale).collect(), scale)
}

#[test]
fn triton_layer_norm_forward_and_backward_match_f64() {
    let (rows, epsilon) = (3, 1e-5f32);
    for n in [64, 300] {
        let mut random = Random::new(4);
        let x = floats(&mut random, rows * n);
        let [weight, bias] = [(); 2].map(|()| floats(&mut random, n));
        let dy = floats(&mut random, rows * n);
        let (w, b) = (wide(&weight), wide(&bias));
        let (mut y, mut dx) = (Vec::new(), Vec::new());
        let (mut dw, mut db) = (vec![0.0; n], vec![0.0; n]);
        for (row, dy) in wide(&x).chunks(n).zip(wide(&dy).chunks(n)) {
            let (normal, scale) = normal(row, epsilon.into());
            y.extend((0..n).map(|i| normal[i] * w[i] + b[i]));
            let mean = |f: &dyn Fn(usize) -> f64| (0..n).map(f).sum::<f64>() / n as f64;
            let first = mean(&|i| dy[i] * w[i] * normal[i]);
            let second = mean(&|i| dy[i] * w[i]);
            dx.extend((0..n).map(|i| (dy[i] * w[i] - normal[i] * first - second) * scale));
            for i in 0..n {
                dw[i] += dy[i] * normal[i];
                db[i] += dy[i];
            }
        }
        let values = [Arg::from(n as i32), Arg::from(epsilon)];
        let buffers =
            [Holds(le(&x)), Holds(le(&weight)), Holds(le(&bias)), Unwritten(4 * rows * n)];
        check("layer_norm", [rows as u32, 1], &buffers, &values, |out| {
            close("layer norm", &f32s_of(&out[3]), &y, F32);
        });
        let zeros = Holds(vec![0; 4 * n]);
        let buffers = [
            Holds(le(&x)),
            Holds(le(&weight)),
            Holds(le(&dy)),
            Unwritten(4 * rows * n),
            zeros.clone(),
            zeros,
        ];
        check("layer_norm_backward", [rows as u32, 1], &buffers, &values, |out| {
            for (what, got, exact) in [("dx", 3, &dx), ("dweight", 4, &dw), ("dbias", 5, &db)] {
                close(what, &f32s_of(&out[got]), exact, F32);
            }
        });
    }
}

#[test]
fn triton_reductions_match_f64() {
    for n in [1, 77, 512] {
        let rows = 4;
        let x = floats(&mut Random::new(5), rows * n);
        let buffers =
            [Holds(le(&x)), Unwritten(4 * rows), Unwritten(4 * rows), Unwritten(4 * rows)];
        check("reduce", [rows as u32, 1], &buffers, &[Arg::from(n as i32)], |out| {
            let (sums, most) = (f32s_of(&out[1]), f32s_of(&out[2]));
            for (row, values) in wide(&x).chunks(n).enumerate() {
                let scale: f64 = values.iter().map(|x| x.abs()).sum();
                assert!((sums[row] - values.iter().sum::<f64>()).abs() <= scale * F32);
                let largest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let place = values.iter().position(|&x| x == largest).unwrap() as u32;
                assert_eq!(most[row], largest);
                assert_eq!(out[3][4 * row..4 * row + 4], place.to_le_bytes());
            }
        });
    }
}

#[test]
fn triton_atomics_count_exactly() {
    let n = 1000;
    let mut random = Random::new(6);
    let x: Vec<i32> = (0..n).map(|_| (random.bits() % 13) as i32).collect();
    let mut counts = [0i32; 16];
    for &x in &x {
        counts[x as usize] += 1;
    }
    let bytes = |values: &[i32]| values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let buffers = [Holds(bytes(&x)), Holds(vec![0; 64]), Holds(vec![0; 4])];
    check("histogram", [8, 1], &buffers, &[Arg::from(n)], |out| {
        assert_eq!(out[1], bytes(&counts));
        assert_eq!(out[2], bytes(&[12]));
    });
}

const HEADS: usize = 2;
const DIM: usize = 32;

/// Inputs of attention: q, k, v and the gradient of the output.
fn attention_inputs(tokens: usize) -> [Vec<bf16>; 4] {
    let mut random = Random::new(7);
    [2.0, 2.0, 1.0, 1.0].map(|scale| random.bf16s(HEADS * tokens * DIM, scale))
}

fn flash_buffers(tokens: usize) -> ([Buffer; 5], [Arg; 2], [u32; 2]) {
    let [q, k, v, _] = attention_inputs(tokens);
    let len = HEADS * tokens;
    let buffers = [
        Holds(bytes_of(&q)),
        Holds(bytes_of(&k)),
        Holds(bytes_of(&v)),
        Unwritten(2 * len * DIM),
        Unwritten(4 * len),
    ];
    let scale = std::f64::consts::LOG2_E / (DIM as f64).sqrt();
    let values = [Arg::from(tokens as i32), Arg::from(scale as f32)];
    (buffers, values, [tokens.div_ceil(32) as u32, HEADS as u32])
}

#[test]
fn triton_flash_attention_matches_f64() {
    for tokens in [32, 80] {
        let (buffers, values, grid) = flash_buffers(tokens);
        let [q, k, v, _] = attention_inputs(tokens).map(|values| bf16s_of(&bytes_of(&values)));
        let (exact, lse) = attention(&q, &k, &v, tokens, DIM, EXACT);
        let lse: Vec<f64> = lse.iter().map(|lse| lse * std::f64::consts::LOG2_E).collect();
        check("flash_forward", grid, &buffers, &values, |out| {
            close("output", &bf16s_of(&out[3]), &exact, BF16);
            close("log-sum-exp", &f32s_of(&out[4]), &lse, F32);
        });
    }
}

#[test]
fn triton_flash_attention_backward_matches_f64() {
    for tokens in [32, 80] {
        let inputs = attention_inputs(tokens);
        let [q, k, v, dout] = inputs.clone().map(|values| bf16s_of(&bytes_of(&values)));
        let (out, lse) = attention(&q, &k, &v, tokens, DIM, EXACT);
        let scale = 1.0 / (DIM as f64).sqrt();
        let [mut dq, mut dk, mut dv] = [(); 3].map(|()| vec![0.0; q.len()]);
        for head in 0..HEADS {
            let row = |i: usize| (head * tokens + i) * DIM;
            let dot = |a: &[f64], i: usize, b: &[f64], j: usize| {
                (0..DIM).map(|d| a[row(i) + d] * b[row(j) + d]).sum::<f64>()
            };
            for i in 0..tokens {
                let delta = dot(&out, i, &dout, i);
                for j in 0..=i {
                    let weight = (dot(&q, i, &k, j) * scale - lse[head * tokens + i]).exp();
                    let ds = weight * (dot(&dout, i, &v, j) - delta) * scale;
                    for d in 0..DIM {
                        dq[row(i) + d] += ds * k[row(j) + d];
                        dk[row(j) + d] += ds * q[row(i) + d];
                        dv[row(j) + d] += weight * dout[row(i) + d];
                    }
                }
            }
        }
        let o: Vec<bf16> = out.iter().map(|&x| bf16::from_f64(x)).collect();
        let log2e = std::f64::consts::LOG2_E;
        let lse: Vec<f32> = lse.iter().map(|lse| (lse * log2e) as f32).collect();
        let [q, k, v, dout] = inputs.map(|values| Holds(bytes_of(&values)));
        let len = HEADS * tokens * DIM;
        let buffers = [
            q,
            k,
            v,
            Holds(bytes_of(&o)),
            dout,
            Holds(le(&lse)),
            Holds(vec![0; 4 * len]),
            Unwritten(2 * len),
            Unwritten(2 * len),
        ];
        let values =
            [Arg::from(tokens as i32), Arg::from(scale as f32), Arg::from((scale * log2e) as f32)];
        let grid = [tokens.div_ceil(32) as u32, HEADS as u32];
        check("flash_backward", grid, &buffers, &values, |out| {
            close("dq", &f32s_of(&out[6]), &dq, 2.0 * BF16);
            close("dk", &bf16s_of(&out[7]), &dk, 2.0 * BF16);
            close("dv", &bf16s_of(&out[8]), &dv, 2.0 * BF16);
        });
    }
}

/// Without its barriers, or without its waits, a kernel of Triton's is found out, and the fault
/// names a line of the Python source.
#[test]
fn mutants_of_triton_kernels_are_killed() {
    let (buffers, values, grid) = flash_buffers(80);
    let run = |dropped: &str, check: Check| {
        let text = text("flash_forward");
        assert!(text.contains(dropped), "{dropped}");
        let kept = text.lines().filter(|line| !line.trim_start().starts_with(dropped));
        let text = kept.collect::<Vec<_>>().join("\n");
        let options = Options { check, ..Options::default() };
        launch("flash_forward", &text, grid, &buffers, &values, &options).map(|_| ())
    };
    let fault = run("bar.sync", Check::Races).unwrap_err();
    assert_eq!(fault.kind, FaultKind::Race, "{fault}");
    let source = |site: Option<ptx_race::Site>| site.unwrap().source.unwrap().file;
    assert!(source(fault.site).ends_with("compile.py"));
    assert!(source(fault.other).ends_with("compile.py"));
    let fault = run("cp.async.wait_group", Check::Faults).unwrap_err();
    assert_eq!(fault.kind, FaultKind::AsyncInFlight, "{fault}");
}
