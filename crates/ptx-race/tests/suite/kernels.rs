//! Real kernels, as nvcc compiles them, against f64.
//!
//! The bound is a rule: at most twice the error of a plain version of the operation that rounds
//! to f32 at every step and to bf16 where the kernel stores, plus one rounding of the output.

use ptx_race::{Arg, Check, Config, Fault, Kernel, Memory, Module, Options, Schedule, Stats};

use crate::nvcc;
use crate::reference::{
    EXACT, PLAIN, Random, attention, bf16s_of, bytes_of, cross_entropy, f32s_of, relative_error,
    rms_norm,
};

/// Unit roundoffs.
const BF16: f64 = 1.0 / 256.0;
const F32: f64 = 1.0 / 16_777_216.0;

/// Every setting a correct kernel must pass.
pub fn settings() -> Vec<Options> {
    let with = |schedule, check| Options { schedule, check, ..Options::default() };
    let mut list = vec![
        with(Schedule::InOrder, Check::Faults),
        with(Schedule::ReverseOrder, Check::Faults),
        with(Schedule::InOrder, Check::Races),
        with(Schedule::ReverseOrder, Check::Races),
    ];
    list.extend((1..=3).map(|seed| with(Schedule::Random(seed), Check::Faults)));
    list
}

fn check_close(what: &str, got: &[f64], exact: &[f64], plain: &[f64], rounding: f64) {
    let (error, bound) = (relative_error(got, exact), relative_error(plain, exact));
    let bound = 2.0 * bound + rounding;
    assert!(error <= bound, "{what}: error {error:.3e}, allowed {bound:.3e}");
}

/// A launch and what it should leave behind.
pub trait Case {
    fn run(&self, kernel: &Kernel, options: &Options) -> Result<(Vec<u8>, Stats), Box<Fault>>;
    /// Whether the bytes it left are right, or why not.
    fn wrong(&self, bytes: &[u8]) -> Option<String>;
}

/// Attention on [heads, tokens, 64].
pub struct Flash {
    heads: usize,
    tokens: usize,
    inputs: [Vec<u8>; 3],
}

impl Flash {
    pub fn new(heads: usize, tokens: usize) -> Flash {
        let mut random = Random::new(3);
        let inputs = [2.0, 2.0, 1.0].map(|s| bytes_of(&random.bf16s(heads * tokens * 64, s)));
        Flash { heads, tokens, inputs }
    }

    fn values(&self) -> [Vec<f64>; 3] {
        [0, 1, 2].map(|i| bf16s_of(&self.inputs[i]))
    }
}

impl Case for Flash {
    fn run(&self, kernel: &Kernel, options: &Options) -> Result<(Vec<u8>, Stats), Box<Fault>> {
        let memory = Memory::new();
        let [q, k, v] = [0, 1, 2].map(|i| memory.alloc(&self.inputs[i]));
        let (o_len, lse_len) = (self.inputs[0].len(), self.heads * self.tokens * 4);
        let (o, lse) = (memory.alloc_uninit(o_len), memory.alloc_uninit(lse_len));
        let config = Config {
            grid: [self.tokens as u32 / 64, self.heads as u32, 1],
            block: [128, 1, 1],
            shared: 4 * 64 * 128,
        };
        let scale = std::f32::consts::LOG2_E / 8.0;
        let mut args = [q, k, v, o, lse].map(Arg::from).to_vec();
        args.extend([Arg::from(self.tokens as i32), Arg::from(scale)]);
        let stats = kernel.launch(&memory, &config, &args, options)?;
        let mut bytes = memory.read_vec(o, o_len).expect("all of the output is written");
        bytes.extend(memory.read_vec(lse, lse_len).expect("all of lse is written"));
        Ok((bytes, stats))
    }

    fn wrong(&self, bytes: &[u8]) -> Option<String> {
        let [q, k, v] = self.values();
        let (exact, exact_lse) = attention(&q, &k, &v, self.tokens, 64, EXACT);
        let (plain, plain_lse) = attention(&q, &k, &v, self.tokens, 64, PLAIN);
        let (o, lse) = bytes.split_at(self.inputs[0].len());
        for (what, got, exact, plain, rounding) in [
            ("output", bf16s_of(o), exact, plain, BF16),
            ("log-sum-exp", f32s_of(lse), exact_lse, plain_lse, 8.0 * F32),
        ] {
            let error = relative_error(&got, &exact);
            let bound = 2.0 * relative_error(&plain, &exact) + rounding;
            if error.is_nan() || error > bound {
                return Some(format!("{what}: error {error:.3e}, allowed {bound:.3e}"));
            }
        }
        None
    }
}

#[test]
fn rms_norm_is_right_under_every_setting() {
    let Some(module) = nvcc::module("rms_norm.cu", &[]) else { return };
    let kernel = module.kernel("rms_norm").unwrap();
    // 10 rows leave two warps of the last block without one; 328 columns leave lanes idle.
    let (rows, hidden) = (10, 328);
    let mut random = Random::new(1);
    let (x, weight) = (random.bf16s(rows * hidden, 3.0), random.bf16s(hidden, 1.0));
    let wide = |values: &[half::bf16]| bf16s_of(&bytes_of(values));
    let exact = rms_norm(&wide(&x), &wide(&weight), 1e-5, EXACT);
    let plain = rms_norm(&wide(&x), &wide(&weight), 1e-5, PLAIN);
    for options in settings() {
        let memory = Memory::new();
        let y = memory.alloc_uninit(rows * hidden * 2);
        let args = [
            Arg::from(memory.alloc(&bytes_of(&x))),
            Arg::from(memory.alloc(&bytes_of(&weight))),
            Arg::from(y),
            Arg::from(rows as i32),
            Arg::from(hidden as i32),
            Arg::from(1e-5f32),
        ];
        let launched = kernel.launch(&memory, &Config::linear(3, 128), &args, &options);
        launched.unwrap_or_else(|fault| panic!("{options:?}: {fault}"));
        let got = bf16s_of(&memory.read_vec(y, rows * hidden * 2).unwrap());
        check_close("rms_norm", &got, &exact, &plain, BF16);
    }
}

#[test]
fn cross_entropy_is_right_under_every_setting() {
    let Some(module) = nvcc::module("cross_entropy.cu", &[]) else { return };
    let kernel = module.kernel("cross_entropy").unwrap();
    let (rows, vocabulary) = (5, 1000);
    let mut random = Random::new(2);
    let logits = random.bf16s(rows * vocabulary, 8.0);
    let target: Vec<i32> = (0..rows).map(|_| (random.bits() % 1000) as i32).collect();
    let wide = bf16s_of(&bytes_of(&logits));
    let exact = cross_entropy(&wide, &target, EXACT);
    let plain = cross_entropy(&wide, &target, PLAIN);
    for options in settings() {
        let memory = Memory::new();
        let loss = memory.alloc_uninit(rows * 4);
        let targets: Vec<u8> = target.iter().flat_map(|t| t.to_le_bytes()).collect();
        let args = [
            Arg::from(memory.alloc(&bytes_of(&logits))),
            Arg::from(memory.alloc(&targets)),
            Arg::from(loss),
            Arg::from(vocabulary as i32),
        ];
        let config = Config::linear(rows as u32, 256);
        let launched = kernel.launch(&memory, &config, &args, &options);
        launched.unwrap_or_else(|fault| panic!("{options:?}: {fault}"));
        let got = f32s_of(&memory.read_vec(loss, rows * 4).unwrap());
        // Two approximate functions of two units in the last place each.
        check_close("loss", &got, &exact, &plain, 8.0 * F32);
    }
}

#[test]
fn flash_attention_is_right_under_every_setting() {
    let Some(module) = nvcc::module("flash.cu", &[]) else { return };
    let kernel = module.kernel("flash_forward").unwrap();
    // Four tiles for two stages, so that each stage is used twice.
    let case = Flash::new(1, 256);
    let mut before: Option<Vec<u8>> = None;
    for options in settings() {
        let (bytes, _) =
            case.run(&kernel, &options).unwrap_or_else(|fault| panic!("{options:?}: {fault}"));
        assert_eq!(case.wrong(&bytes), None, "{options:?}");
        assert!(before.is_none_or(|before| before == bytes), "{options:?} changes the bits");
        before = Some(bytes);
    }
}

#[test]
fn results_and_counts_do_not_depend_on_threads() {
    let Some(module) = nvcc::module("flash.cu", &[]) else { return };
    let kernel = module.kernel("flash_forward").unwrap();
    let case = Flash::new(3, 192);
    let run = |threads| {
        let options = Options { threads, ..Options::default() };
        case.run(&kernel, &options).unwrap_or_else(|fault| panic!("{fault}"))
    };
    let one = run(1);
    for threads in [2, 3, 8] {
        assert!(run(threads) == one, "{threads} threads");
    }
}

/// Launches from several threads at once share a module and a memory.
#[test]
fn launches_may_run_side_by_side() {
    let Some(module) = nvcc::module("rms_norm.cu", &[]) else { return };
    let memory = Memory::new();
    let x = memory.alloc(&bytes_of(&Random::new(5).bf16s(64, 1.0)));
    let run = |module: &Module| {
        let y = memory.alloc_uninit(128);
        let mut args = [x, x, y].map(Arg::from).to_vec();
        args.extend([Arg::from(1i32), Arg::from(64i32), Arg::from(0f32)]);
        let kernel = module.kernel("rms_norm").unwrap();
        kernel.launch(&memory, &Config::linear(1, 32), &args, &Options::default()).unwrap();
        let bytes = memory.read_vec(y, 128).unwrap();
        memory.free(y).unwrap();
        bytes
    };
    let alone = run(&module);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..50).for_each(|_| assert_eq!(run(&module), alone)));
        }
    });
}
