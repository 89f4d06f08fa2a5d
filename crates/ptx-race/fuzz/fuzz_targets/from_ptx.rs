//! Any text is a module or an error: `cargo +nightly fuzz run from_ptx` in `crates/ptx-race`.
//!
//! Put the PTX of some kernels into `fuzz/corpus/from_ptx` first.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let _ = ptx_race::Module::from_ptx(text);
});
