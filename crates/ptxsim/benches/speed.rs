//! Warp instructions a second, on kernels compiled by nvcc: `cargo bench -p ptxsim`.

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
use ptxsim::{Check, Options, Schedule};

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
        let options = Options { threads, check, schedule: Schedule::Greedy, ..Options::default() };
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
}
