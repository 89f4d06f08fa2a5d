//! Kernels in the simulator, as nvcc compiled them: the cases of `laam check`, launched by the backend's
//! own code, under several orders of warps and blocks, with races watched, and on few blocks; the
//! mutants that these cases kill; tests of what no operation shows by itself.

pub mod accesses;
mod gather;
mod lm_head;
mod matmul;
mod mutants;
mod operations;
mod queue;
mod single;

use laam::backend::gpu::{Gpu, Options};
use laam::bench::check::{Size, cases};
use laam::device::sim::Sim;
use laam::device::{Arg as DeviceArg, Launch as DeviceLaunch};
pub use laam::dtype::Dtype;
use laam::kernels::Kernel;
use laam::random::{Philox, Stream};
pub use mutants::MutationSet;
pub use ptx_race::{Arg, Check, Memory, Schedule};
pub use ptx_race::{Config, Module};

use crate::launches::{Mutation, mutating_on};

/// A kernel file and the module that takes its place.
pub type Replaced<'a> = Option<(&'static str, &'a Module)>;

/// The GPU backend in the simulator; `change` is made to every launch.
pub fn simulated(
    options: Options,
    (schedule, check): (Schedule, Check),
    change: fn(&mut DeviceLaunch),
    replaced: Replaced,
) -> Gpu {
    let replaced = replaced.map(|(file, module)| (file, module.clone()));
    let open = move || {
        let simulator = ptx_race::Options { schedule, check, ..ptx_race::Options::default() };
        let mut sim = Sim::new(simulator)?;
        if let Some((file, module)) = &replaced {
            sim.replace(file, module.clone());
        }
        Ok(sim)
    };
    mutating_on(open, Mutation::Launch("", change), options).0
}

/// Runs the cases of some operations whose shapes contain `shape`, and panics if one fails: its error
/// is beyond the bound, the order of warps and blocks changes its bits, or the simulator finds a fault
/// or a race. Each case runs on its own grid and on few blocks; races are watched on one of the two.
pub fn pass(operations: &[&str], options: Options, shape: &str, replaced: Replaced) {
    pass_on(false, operations, options, shape, replaced);
}

/// [`pass`] for dtypes that take turns, since their kernels are instances of the same code: in 16 bits a case runs on one
/// of the two grids, and in one of bf16 and f16 twice in a session.
pub fn pass_by_turns(operations: &[&str], options: Options) {
    pass_on(true, operations, options, "", None);
}

fn pass_on(by_turns: bool, operations: &[&str], options: Options, shape: &str, replaced: Replaced) {
    if let Err(why) = laam::kernels::BUILD.cuda {
        return eprintln!("SKIPPED: kernels in the simulator, because {why}");
    }
    let cases = cases(Size::Small, options.dtype, 1, |name| operations.contains(&name));
    for (at, case) in cases.iter().filter(|case| case.shape.contains(shape)).enumerate() {
        let mut grids: [fn(&mut DeviceLaunch); 2] = [on_few_blocks, |_| {}];
        grids.rotate_left((at + options.dtype as usize) % 2);
        let serial = [Schedule::InOrder, Schedule::ReverseOrder][at / 2 % 2];
        let random = Schedule::Random(at as u64);
        let grids_per_case = if by_turns && options.dtype != Dtype::F32 { 1 } else { 2 };
        // A second run in the same session finds what the first left in memory.
        let has_turn =
            options.dtype != Dtype::F32 && (at + options.dtype as usize).is_multiple_of(2);
        let times = if by_turns && !has_turn { 1 } else { 2 };
        let runs: [&[_]; 2] = [
            &[(serial, Check::Races, 1), (random, Check::Faults, times)],
            &[(random, Check::Faults, 1)],
        ];
        for (grid, runs) in grids.into_iter().zip(runs).take(grids_per_case) {
            let mut outputs = Vec::new();
            for &(schedule, check, times) in runs {
                let run = case.run(&simulated(options, (schedule, check), grid, replaced), times);
                outputs.extend(run.unwrap_or_else(|fault| {
                    panic!("{} {}, {schedule:?}: {fault:#}", case.operation, case.shape)
                }));
            }
            let rows = case.compare(options.dtype, &outputs).unwrap();
            let failed: Vec<_> = rows.iter().filter(|row| !row.passed).collect();
            assert!(failed.is_empty(), "{:?}: {failed:#?}", options.dtype);
        }
    }
}

/// Kernels whose grid is free get two blocks, each of which takes several tasks; attention of small
/// heads takes the instances that own several rows.
fn on_few_blocks(launch: &mut DeviceLaunch) {
    const ANY_GRID: [&str; 10] = [
        "attention_",
        "flash_attention_",
        "gather_rows_",
        "rms_norm_",
        "rope_",
        "cross_entropy_",
        "muon_polynomial",
        "muon_normalize",
        "muon_update",
        "sum_pieces",
    ];
    let entry = launch.kernel.name();
    if entry == "rms_norm_backward_weight" {
        // The partial sums of two blocks.
        if let DeviceArg::I32(blocks) = &mut launch.args[3] {
            *blocks = (*blocks).min(2);
        }
    } else if entry.starts_with("swiglu_") {
        launch.grid[1] = launch.grid[1].min(2);
    } else if (entry.starts_with("embedding_") && !entry.starts_with("embedding_sort"))
        || ANY_GRID.iter().any(|name| entry.starts_with(name))
    {
        launch.grid[0] = launch.grid[0].min(2);
    }
    if entry.starts_with("cross_entropy_") {
        launch.block[0] = 32;
    }
    if let Some((name, dtype)) = entry.rsplit_once('_')
        && entry.starts_with("attention_smallhead_")
    {
        let (name, _) = name.rsplit_once('_').expect("a head_dim and a number of rows");
        let several = [8, 4, 2].map(|rows| format!("{name}_{rows}_{dtype}"));
        let named = |name: String| Kernel::all().find(|kernel| kernel.name() == name);
        let several = several.into_iter().find_map(named);
        launch.kernel = several.expect("there are instances of several rows");
        launch.block[0] = launch.block[0].min(128);
    }
}

/// The PTX of a kernel file, ready to launch, or `None` after a loud line.
pub fn module(name: &str) -> Option<Module> {
    if let Err(why) = laam::kernels::BUILD.cuda {
        eprintln!("SKIPPED: the kernels in the simulator, because {why}");
        return None;
    }
    let kernel = laam::kernels::module(name).unwrap_or_else(|| panic!("no kernel file {name}"));
    Some(Module::from_ptx(kernel.ptx()).unwrap_or_else(|error| panic!("{name}: {error}")))
}

/// Does `check` with the kernels of a file, where there are any.
pub fn holds(name: &str, check: fn(&Module)) {
    if let Some(module) = module(name) {
        check(&module);
    }
}

/// Uniform in [-scale, scale).
pub fn random(seed: u64, count: usize, scale: f64) -> Vec<f32> {
    let random = Philox::new(seed, Stream::Test);
    (0..count as u64).map(|at| ((2.0 * random.uniform(0, at) - 1.0) * scale) as f32).collect()
}

/// Indices as the device holds them.
pub fn words(indices: &[u32]) -> Vec<u8> {
    indices.iter().flat_map(|index| index.to_le_bytes()).collect()
}

pub const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::Bf16, Dtype::F16];

/// An argument of a launch: memory that is read, memory that is written and not initialized before,
/// memory that is read and written, that of an earlier argument, a null pointer, or a value.
pub enum Piece {
    In(Vec<u8>),
    Out(usize),
    Both(Vec<u8>),
    Same(usize),
    Null,
    Value(Arg),
}

pub fn value(value: impl Into<Arg>) -> Piece {
    Piece::Value(value.into())
}

/// Launches one kernel under every schedule, demands the same bits of each, and returns what it
/// wrote, in the order of the arguments.
pub fn run(module: &Module, entry: &str, config: Config, pieces: &[Piece]) -> Vec<Vec<u8>> {
    let kernel = module.kernel(entry).unwrap_or_else(|| panic!("no entry {entry}"));
    let mut before: Option<Vec<Vec<u8>>> = None;
    for (schedule, check) in [
        (Schedule::InOrder, Check::Races),
        (Schedule::ReverseOrder, Check::Races),
        (Schedule::Random(1), Check::Faults),
        (Schedule::Random(2), Check::Faults),
    ] {
        let device = Memory::new();
        let mut written = Vec::new();
        let mut arguments = Vec::new();
        for piece in pieces {
            let (at, len) = match piece {
                Piece::In(bytes) => (device.alloc(bytes), None),
                Piece::Both(bytes) => (device.alloc(bytes), Some(bytes.len())),
                Piece::Out(len) => (device.alloc_uninit(*len), Some(*len)),
                Piece::Null => (0, None),
                Piece::Same(at) => {
                    arguments.push(Arg::clone(&arguments[*at]));
                    continue;
                }
                Piece::Value(value) => {
                    arguments.push(value.clone());
                    continue;
                }
            };
            arguments.push(Arg::from(at));
            written.extend(len.map(|len| (at, len)));
        }
        let options = ptx_race::Options { schedule, check, ..ptx_race::Options::default() };
        let launched = kernel.launch(&device, &config, &arguments, &options);
        launched.unwrap_or_else(|fault| panic!("{entry} under {options:?}: {fault}"));
        let read = |&(at, len): &(u64, usize)| device.read_vec(at, len).expect("all is written");
        let after: Vec<_> = written.iter().map(read).collect();
        assert!(before.is_none_or(|before| before == after), "{entry}: {options:?} changes bits");
        before = Some(after);
    }
    before.expect("there are schedules")
}
