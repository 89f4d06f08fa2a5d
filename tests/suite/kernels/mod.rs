//! Every kernel, as nvcc compiled it, in the simulator: against f64, on shapes that leave lanes,
//! rows and the tails of vectors over, under several orders of warps and blocks, races watched.
//!
//! The bound is a rule: at most twice the error of the same formula in plain f32, plus what one
//! rounding of the output costs and the few units an approximate function may be off.

mod attention;
mod elementwise;
mod gather;
mod head;
mod muon;
mod mutants;
mod norm;
mod optimizer;
mod queue;
mod rope;
mod rows;

pub use laam::dtype::Dtype;
pub use mutants::Mutants;
pub use num_traits::Float;
use ptxsim::{Arg, Check, Memory, Options, Schedule};
pub use ptxsim::{Config, Module};

/// The PTX of a kernel file, ready to launch, or `None` after a loud line.
pub fn module(name: &str) -> Option<Module> {
    if let Err(why) = laam::kernels::BUILD.cuda {
        eprintln!("SKIPPED: the kernels in the simulator, because {why}");
        return None;
    }
    let kernel = laam::kernels::module(name).unwrap_or_else(|| panic!("no kernel file {name}"));
    Some(Module::from_ptx(kernel.ptx).unwrap_or_else(|error| panic!("{name}: {error}")))
}

/// Does `check` with the kernels of a file, where there are any.
pub fn holds(name: &str, check: fn(&Module)) {
    if let Some(module) = module(name) {
        check(&module);
    }
}

/// What the tests ask of a dtype, in f64.
pub trait DtypeExt: Sized {
    /// How many elements a vector access moves.
    fn full(self, width: usize) -> usize;
    fn round_f64(self, x: f64) -> f64;
    fn bytes(self, values: &[f64]) -> Vec<u8>;
    fn values(self, bytes: &[u8]) -> Vec<f64>;
    /// The relative error of one rounding to this dtype; of f32, of several, plus what the
    /// approximate functions add.
    fn rounding(self) -> f64;
    /// Uniform in [-scale, scale), rounded to this dtype.
    fn random(self, seed: u64, count: usize, scale: f64) -> Vec<f64>;
}

impl DtypeExt for Dtype {
    fn full(self, width: usize) -> usize {
        let full = 16 / self.size();
        if width.is_multiple_of(full) { full } else { 1 }
    }
    // Through f32: `from_f64` drops the low half of the number before it rounds.
    fn round_f64(self, x: f64) -> f64 {
        self.round(x as f32).into()
    }
    fn bytes(self, values: &[f64]) -> Vec<u8> {
        self.encode(&values.iter().map(|&x| x as f32).collect::<Vec<_>>())
    }
    fn values(self, bytes: &[u8]) -> Vec<f64> {
        self.decode(bytes).into_iter().map(f64::from).collect()
    }
    fn rounding(self) -> f64 {
        match self {
            Dtype::F32 => 2f64.powi(-21),
            Dtype::Bf16 => 2f64.powi(-8),
            Dtype::F16 => 2f64.powi(-11),
        }
    }
    fn random(self, seed: u64, count: usize, scale: f64) -> Vec<f64> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mut x = state;
            x = (x ^ x >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            x = (x ^ x >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
            (x ^ x >> 31) >> 11
        };
        (0..count).map(|_| self.round_f64((next() as f64 / 2f64.powi(52) - 1.0) * scale)).collect()
    }
}

/// Numbers as the device holds them.
pub fn words(numbers: &[u32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

pub const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::Bf16, Dtype::F16];

/// An argument of a launch: memory to read, memory to write (poisoned), both, poisoned memory that
/// nobody looks at afterwards, no memory (a null pointer), the memory of an earlier argument from some
/// byte on, or a plain value.
pub enum Piece {
    In(Vec<u8>),
    Out(usize),
    Both(Vec<u8>),
    Scratch(usize),
    Null,
    At(usize, u64),
    Value(Arg),
}

pub fn value(value: impl Into<Arg>) -> Piece {
    Piece::Value(value.into())
}

/// One of several launches; `At` names the memory they share.
pub struct Launch {
    pub entry: String,
    pub config: Config,
    pub arguments: Vec<Piece>,
}

/// Launches under every setting, demands the same bits of each, and returns what was written, in
/// the order of the arguments.
pub fn run(module: &Module, entry: &str, config: Config, pieces: &[Piece]) -> Vec<Vec<u8>> {
    let argument = |(at, piece): (usize, &Piece)| match piece {
        Piece::Value(value) => Piece::Value(value.clone()),
        Piece::At(at, offset) => Piece::At(*at, *offset),
        _ => Piece::At(at, 0),
    };
    let arguments = pieces.iter().enumerate().map(argument).collect();
    run_all(module, pieces, &[Launch { entry: entry.to_string(), config, arguments }])
}

/// The same for launches that follow each other on the same memory.
pub fn run_all(module: &Module, memory: &[Piece], launches: &[Launch]) -> Vec<Vec<u8>> {
    let mut before: Option<Vec<Vec<u8>>> = None;
    for (schedule, check) in [
        (Schedule::InOrder, Check::Races),
        (Schedule::ReverseOrder, Check::Races),
        (Schedule::Random(1), Check::Faults),
        (Schedule::Random(2), Check::Faults),
    ] {
        let device = Memory::new();
        let mut written = Vec::new();
        let mut places = Vec::new();
        for piece in memory {
            let (at, len) = match piece {
                Piece::In(bytes) => (device.alloc(bytes), None),
                Piece::Both(bytes) => (device.alloc(bytes), Some(bytes.len())),
                Piece::Out(len) => (device.alloc_uninit(*len), Some(*len)),
                Piece::Scratch(len) => (device.alloc_uninit(*len), None),
                Piece::Null | Piece::At(..) | Piece::Value(_) => (0, None),
            };
            places.push(at);
            written.extend(len.map(|len| (at, len)));
        }
        let options = Options { schedule, check, ..Options::default() };
        for Launch { entry, config, arguments } in launches {
            let kernel = module.kernel(entry).unwrap_or_else(|| panic!("no entry {entry}"));
            let argument = |piece: &Piece| match piece {
                Piece::Value(value) => value.clone(),
                Piece::At(at, offset) => Arg::from(places[*at] + offset),
                _ => panic!("{entry}: memory lies outside the launches"),
            };
            let arguments: Vec<Arg> = arguments.iter().map(argument).collect();
            let launched = kernel.launch(&device, config, &arguments, &options);
            launched.unwrap_or_else(|fault| panic!("{entry} under {options:?}: {fault}"));
        }
        let read = |&(at, len): &(u64, usize)| device.read_vec(at, len).expect("all is written");
        let after: Vec<_> = written.iter().map(read).collect();
        let same = before.is_none_or(|before| before == after);
        assert!(same, "{}: {options:?} changes bits", launches[0].entry);
        before = Some(after);
    }
    before.expect("there are settings")
}

pub fn check(what: &str, dtype: Dtype, got: &[u8], exact: &[f64], plain: &[f32]) {
    let norm = |values: &[f64]| values.iter().map(|x| x * x).sum::<f64>().sqrt();
    let error = |got: &[f64]| {
        let apart: Vec<f64> = got.iter().zip(exact).map(|(g, e)| g - e).collect();
        norm(&apart)
    };
    let got = dtype.values(got);
    assert_eq!(got.len(), exact.len(), "{what}");
    let plain: Vec<f64> = plain.iter().map(|&x| dtype.round_f64(f64::from(x))).collect();
    let (error, bound) = (error(&got), 2.0 * error(&plain) + dtype.rounding() * norm(exact));
    assert!(error <= bound, "{what} in {dtype:?}: error {error:.3e}, allowed {bound:.3e}");
}

pub fn real<R: Float>(values: &[f64]) -> Vec<R> {
    values.iter().map(|&x| R::from(x).expect("a float")).collect()
}
