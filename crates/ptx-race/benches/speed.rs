//! Warp instructions per second, on kernels compiled by nvcc: `cargo bench -p ptx-race`.

// The benchmark needs only part of what the tests share.
#[allow(dead_code, unused_imports)]
#[path = "../tests/suite/kernels.rs"]
mod kernels;
#[path = "../tests/suite/nvcc.rs"]
mod nvcc;
#[allow(dead_code)]
#[path = "../tests/suite/reference.rs"]
mod reference;

use std::time::Instant;

use kernels::{Case, Flash};
use ptx_race::{Arg, Check, Config, Memory, Options, Schedule};

fn main() {
    let Some(module) = nvcc::module("flash.cu", &[]) else { return };
    let kernel = module.kernel("flash_forward").expect("the file has it");
    println!(
        "{:<44} {:>12} {:>9} {:>14}",
        "flash forward, head_dim 64", "warp instrs", "ms", "M/s a thread"
    );
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let cases = [
        (4, 256, 1, Check::Faults),
        (4, 512, 1, Check::Faults),
        (4, 512, cores, Check::Faults),
        (1, 256, 1, Check::Races),
    ];
    for (heads, tokens, threads, check) in cases {
        let case = Flash::new(heads, tokens);
        let options = Options { threads, check, schedule: Schedule::InOrder, ..Options::default() };
        let mut best = f64::INFINITY;
        let mut count = 0;
        for _ in 0..5 {
            let start = Instant::now();
            let (_, stats) = case.run(&kernel, &options).unwrap_or_else(|fault| panic!("{fault}"));
            best = best.min(start.elapsed().as_secs_f64());
            count = stats.warp_instructions;
        }
        let name = format!("{heads} heads, {tokens} tokens, {threads} threads, {check:?}");
        let rate = count as f64 / best / 1e6 / threads as f64;
        println!("{name:<44} {count:>12} {:>9.2} {rate:>14.1}", best * 1e3);
    }
    small_launches();
}

/// What a launch costs when its kernel does next to nothing.
fn small_launches() {
    let Some(module) = nvcc::module("rms_norm.cu", &[]) else { return };
    let kernel = module.kernel("rms_norm").expect("the file has it");
    let memory = Memory::new();
    let (x, y) = (memory.alloc(&[0; 128]), memory.alloc_zeroed(128));
    let mut args = [x, x, y].map(Arg::from).to_vec();
    args.extend([Arg::from(1i32), Arg::from(64i32), Arg::from(1e-5f32)]);
    let (count, start) = (1000, Instant::now());
    for _ in 0..count {
        let launched = kernel.launch(&memory, &Config::linear(1, 32), &args, &Options::default());
        launched.unwrap_or_else(|fault| panic!("{fault}"));
    }
    let each = start.elapsed().as_secs_f64() / f64::from(count);
    println!("one warp of RMSNorm: {:.1} us a launch", each * 1e6);
}
