//! Mutation tests: each mutant of a kernel is killed by a setting that these tests run, and the
//! same kernel without it passes all of them.

use std::collections::BTreeSet;

use ptx_race::{Arg, Check, Config, Fault, FaultKind, Kernel, Memory, Options, Schedule, Stats};

use crate::kernels::{Case, Flash, settings};
use crate::nvcc;

/// Threads of a block in `pipeline.cu`.
const THREADS: usize = 128;

struct BlockSum;

fn floats(count: usize) -> Vec<u8> {
    (0..count).flat_map(|i| (1.0 + (i * 37 % 101) as f32 / 64.0).to_le_bytes()).collect()
}

fn read(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

impl Case for BlockSum {
    fn run(&self, kernel: &Kernel, options: &Options) -> Result<(Vec<u8>, Stats), Box<Fault>> {
        let memory = Memory::new();
        let (input, len) = (floats(3 * THREADS), 3 * THREADS * 4);
        let out = memory.alloc_uninit(len);
        let args = [Arg::from(memory.alloc(&input)), Arg::from(out)];
        let stats = kernel.launch(&memory, &Config::linear(3, THREADS as u32), &args, options)?;
        Ok((memory.read_vec(out, len).expect("all is written"), stats))
    }

    fn wrong(&self, bytes: &[u8]) -> Option<String> {
        let (input, got) = (read(&floats(3 * THREADS)), read(bytes));
        let sums: Vec<f32> = input.chunks_exact(THREADS).map(|block| block.iter().sum()).collect();
        // Multiples of 1/64 of this size add without rounding.
        let bad = (0..got.len()).find(|&i| got[i] != sums[i / THREADS])?;
        Some(format!("out[{bad}] = {}, not {}", got[bad], sums[bad / THREADS]))
    }
}

struct GridSum;

impl GridSum {
    /// Sums that round differently in every order.
    fn input() -> Vec<f32> {
        (0..8 * 32).map(|i| (i as f32 * 0.7).sin() * 10f32.powi(i / 32 % 5)).collect()
    }
}

impl Case for GridSum {
    fn run(&self, kernel: &Kernel, options: &Options) -> Result<(Vec<u8>, Stats), Box<Fault>> {
        let memory = Memory::new();
        let input: Vec<u8> = Self::input().iter().flat_map(|x| x.to_le_bytes()).collect();
        let total = memory.alloc(&[0; 4]);
        let args = [
            Arg::from(memory.alloc(&input)),
            Arg::from(memory.alloc_uninit(8 * 4)),
            Arg::from(total),
        ];
        let stats = kernel.launch(&memory, &Config::linear(8, 32), &args, options)?;
        Ok((memory.read_vec(total, 4).expect("the total is there"), stats))
    }

    fn wrong(&self, bytes: &[u8]) -> Option<String> {
        let exact: f64 = Self::input().iter().map(|&x| f64::from(x)).sum();
        let got = f64::from(read(bytes)[0]);
        ((got - exact).abs() > 1e-2).then(|| format!("{got} instead of {exact}"))
    }
}

struct Reverse;

impl Case for Reverse {
    fn run(&self, kernel: &Kernel, options: &Options) -> Result<(Vec<u8>, Stats), Box<Fault>> {
        let memory = Memory::new();
        let out = memory.alloc_uninit(128);
        let args = [Arg::from(memory.alloc(&floats(32))), Arg::from(out)];
        let stats = kernel.launch(&memory, &Config::linear(1, 32), &args, options)?;
        Ok((memory.read_vec(out, 128).expect("all is written"), stats))
    }

    fn wrong(&self, bytes: &[u8]) -> Option<String> {
        let mut wanted = read(&floats(32));
        wanted.reverse();
        (read(bytes) != wanted).then(|| "not the reverse".to_owned())
    }
}

/// How a mutant was killed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Killed {
    Fault(String),
    WrongNumbers,
    OtherBits,
}

/// Runs every setting and lists what each one noticed.
fn findings(
    file: &str,
    entry: &str,
    defines: &[&str],
    case: &dyn Case,
) -> Option<Vec<(Options, Killed)>> {
    let module = nvcc::module(file, defines)?;
    let kernel = module.kernel(entry).expect("the entry is there");
    let mut found = Vec::new();
    let mut bits: Option<Vec<u8>> = None;
    for options in settings() {
        match case.run(&kernel, &options) {
            Err(fault) => found.push((options, Killed::Fault(format!("{:?}", fault.kind)))),
            Ok((bytes, _)) => {
                if case.wrong(&bytes).is_some() {
                    found.push((options, Killed::WrongNumbers));
                } else if bits.as_ref().is_some_and(|bits| *bits != bytes) {
                    found.push((options, Killed::OtherBits));
                }
                bits.get_or_insert(bytes);
            }
        }
    }
    Some(found)
}

/// The original passes; each mutant is killed, and by these means.
fn check(file: &str, entry: &str, case: &dyn Case, mutants: &[(&str, &[Killed])]) {
    let Some(clean) = findings(file, entry, &[], case) else { return };
    assert!(clean.is_empty(), "{entry} without a mutation: {clean:?}");
    for (mutant, wanted) in mutants {
        let Some(found) = findings(file, entry, &[mutant], case) else { return };
        let means: BTreeSet<Killed> = found.iter().map(|(_, killed)| killed.clone()).collect();
        let wanted: BTreeSet<Killed> = wanted.iter().cloned().collect();
        assert!(!found.is_empty(), "{mutant} survived");
        assert_eq!(means, wanted, "{mutant}: {found:#?}");
    }
}

fn by(kind: FaultKind) -> Killed {
    Killed::Fault(format!("{kind:?}"))
}

#[test]
fn pipeline_mutants_are_killed() {
    // Five tiles of keys for two stages in the last block.
    let case = Flash::new(1, 320);
    check(
        "flash.cu",
        "flash_forward",
        &case,
        &[
            ("MUTANT_MISSING_WAIT", &[by(FaultKind::AsyncInFlight)]),
            ("MUTANT_MISSING_COMMIT", &[by(FaultKind::AsyncInFlight)]),
            (
                "MUTANT_MISSING_BARRIER_BEFORE_USE",
                &[by(FaultKind::AsyncInFlight), by(FaultKind::Race)],
            ),
            (
                "MUTANT_MISSING_BARRIER_AFTER_USE",
                &[by(FaultKind::AsyncInFlight), by(FaultKind::Race)],
            ),
            ("MUTANT_EARLY_RELEASE", &[by(FaultKind::AsyncInFlight), by(FaultKind::Race)]),
            ("MUTANT_DROPPED_TRANS", &[Killed::WrongNumbers]),
            ("MUTANT_SWAPPED_OPERANDS", &[Killed::WrongNumbers]),
        ],
    );
}

#[test]
fn block_reduction_mutants_are_killed() {
    check(
        "pipeline.cu",
        "block_sum",
        &BlockSum,
        &[
            ("MUTANT_SHUFFLE_DIVERGED", &[by(FaultKind::MissingLanes)]),
            ("MUTANT_SHARED_BY_ONE", &[by(FaultKind::OutOfBounds)]),
            ("MUTANT_GLOBAL_BY_ONE", &[by(FaultKind::OutOfBounds)]),
            ("MUTANT_DEADLOCK", &[by(FaultKind::Deadlock)]),
            ("MUTANT_UNORDERED_SHARED", &[by(FaultKind::Uninitialized), by(FaultKind::Race)]),
        ],
    );
}

#[test]
fn grid_reduction_mutants_are_killed() {
    check(
        "pipeline.cu",
        "grid_sum",
        &GridSum,
        &[
            ("MUTANT_UNORDERED_REDUCTION", &[by(FaultKind::Race), Killed::OtherBits]),
            // No race, but its result depends on the order of the blocks.
            ("MUTANT_ATOMIC_REDUCTION", &[Killed::OtherBits]),
            ("MUTANT_MISSING_FENCE", &[by(FaultKind::Race)]),
            ("MUTANT_BLOCK_FENCE", &[by(FaultKind::Race)]),
            ("MUTANT_MISSING_ACQUIRE", &[by(FaultKind::Race)]),
        ],
    );
}

#[test]
fn warp_mutants_are_killed() {
    check(
        "pipeline.cu",
        "warp_reverse",
        &Reverse,
        &[
            ("MUTANT_MISSING_SYNCWARP", &[by(FaultKind::Race)]),
            ("MUTANT_UNINITIALISED", &[by(FaultKind::Uninitialized)]),
        ],
    );
}

/// A fault in a kernel names the line of the CUDA source, and a race both lines.
#[test]
fn faults_name_the_source_line() {
    let Some(module) = nvcc::module("pipeline.cu", &["MUTANT_MISSING_SYNCWARP"]) else { return };
    let kernel = module.kernel("warp_reverse").unwrap();
    let options =
        Options { check: Check::Races, schedule: Schedule::InOrder, ..Options::default() };
    let fault = Reverse.run(&kernel, &options).unwrap_err();
    let text = include_str!("../kernels/pipeline.cu");
    let line_of =
        |needle: &str| text.lines().position(|line| line.contains(needle)).unwrap() as u32 + 1;
    let source = |site: &Option<ptx_race::Site>| site.clone().unwrap().source.unwrap();
    assert!(source(&fault.site).file.ends_with("pipeline.cu"), "{fault}");
    assert_eq!(source(&fault.site).line, line_of("line[31 - threadIdx.x]"), "{fault}");
    assert_eq!(source(&fault.other).line, line_of("line[threadIdx.x] = in"), "{fault}");
    assert_eq!(fault.site.as_ref().unwrap().thread, [0, 0, 0]);
    assert_eq!(fault.other.as_ref().unwrap().thread, [31, 0, 0]);
}
