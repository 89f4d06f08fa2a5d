//! Runs the PTX that nvcc emits on a CPU, and finds its races.
//!
//! ```
//! use ptx_race::{Arg, Config, Memory, Module, Options};
//!
//! let module = Module::from_ptx(
//!     ".version 9.0
//!     .target sm_80
//!     .address_size 64
//!     .entry fill(.param .u64 out, .param .u32 value) {
//!         .reg .b32 %r<3>;
//!         .reg .b64 %rd<3>;
//!         ld.param.u64 %rd1, [out];
//!         ld.param.u32 %r1, [value];
//!         mov.u32 %r2, %tid.x;
//!         mad.wide.u32 %rd2, %r2, 4, %rd1;
//!         st.global.u32 [%rd2], %r1;
//!         ret;
//!     }",
//! )?;
//! let memory = Memory::new();
//! let out = memory.alloc_uninit(4 * 32);
//! let kernel = module.kernel("fill").expect("it is there");
//! let args = [Arg::from(out), Arg::from(7u32)];
//! kernel.launch(&memory, &Config::linear(1, 32), &args, &Options::default())?;
//! assert_eq!(memory.read_vec(out, 4)?, 7u32.to_le_bytes());
//!
//! // One thread too many is a fault that names the thread and the line.
//! let fault = kernel.launch(&memory, &Config::linear(1, 33), &args, &Options::default());
//! assert_eq!(fault.unwrap_err().site.unwrap().thread, [32, 0, 0]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Pipeline: `parse` makes a syntax tree; `decode`, with `decoder` and `decode_ops`, makes `code`
//! of it, whose instructions (`op`) run forms from `int`, `float`, `convert` and `compare`; `exec`
//! executes it on the `state` of a warp, 32 lanes at a time; `sched` runs the warps of blocks, and
//! `race` watches. Imports go one way, which a test checks. `README.md` says what is modeled.
#![warn(missing_docs)]
// What a lane does must fold into the loop over the lanes to be vectorized with it.
#![allow(clippy::inline_always)]
// Bit fields read best in the ISA's own manner, shifts before masks.
#![allow(clippy::precedence)]

mod catalogue;
mod cfg;
mod code;
mod compare;
mod config;
mod convert;
mod copies;
mod decode;
mod decode_ops;
mod decoder;
mod ex2;
mod exec;
mod fault;
mod float;
mod int;
mod interpolator;
mod launch;
mod math;
mod mem;
mod op;
mod parse;
mod profile;
mod race;
mod registers;
mod round;
mod sched;
mod shared;
mod special;
mod special_tables;
mod state;
mod tensor_core;

pub use catalogue::{form_of, forms};
pub use code::Param;
pub use config::{Arch, Arg, Check, Config, Options, Schedule, Stats};
pub use fault::{Fault, FaultKind, Site, SourceLine};
pub use launch::{Kernel, Module};
pub use mem::{Memory, MemoryError};
pub use parse::ParseError;
pub use profile::{AccessProfile, AccessSpace};
