//! laam (Linux as a Model) trains a Llama until it has memorized a body of source code,
//! and shows, byte for byte, what the weights give back.
//!
//! Modules, lowest first. A module may depend only on modules above it in this list:
//!
//! - [`error`][]: errors with a kind and a hint
//! - [`escape`][]: foreign text made fit to be shown
//! - [`files`][]: atomic and bounded file access
//! - [`output`][]: output folders with one writer
//! - [`threads`][]: thread counts and pools
//! - [`random`][]: counter-based random numbers
//! - [`dtype`][]: element types of tensors
//! - [`schema`][]: versions of the JSON files
//! - [`corpus`][]: text sources (kernel.org, archives, folders, files of documents, the built-in sample)
//!   and their manifest
//! - [`tokenizer`][]: byte-level BPE, and fast tokenizers of Hugging Face
//! - [`tokens`][]: the memory-mapped token file, its windows, the sampler
//! - [`kernels`][]: the compiled CUDA kernels and their signatures
//! - [`collective`][]: processes that train together, and moving bytes between them
//! - [`device`][]: memory, kernel launches, matmuls, graphs; a GPU or the simulator
//! - [`model`][]: configuration, parameter layout, initialization, checkpoints, presets
//! - [`export`][]: models in the formats of other programs: GGUF
//! - [`llama`][]: training step, evaluation and decoding as programs: lists of typed ops
//! - [`backend`][]: execution of programs: `reference`, `cpu`, `gpu`
//! - [`generate`][]: sampling with a KV cache
//! - [`memorization`][]: extraction, files regenerated from their names, bits per byte
//! - [`train`][]: the loop: schedule, metrics, checkpoints, resume; recipes and sweeps
//! - [`report`][]: a run directory as one HTML page
//! - [`mod@bench`][]: `check` of every op against f64, timings, roofline
//! - `cli`: the command line
//!
//! `tests/suite/architecture.rs` checks this order.
//!
//! # Examples
//!
//! A tiny model, trained until it knows a sequence (`examples/train_tiny.rs` at length):
//!
//! ```
//! use laam::backend::{Arena, cpu::Cpu};
//! use laam::llama::{AdamW, Optimizer, StepHyperparams};
//! use laam::model::{Config, initialize, preset};
//! use laam::tokens::Batch;
//! use laam::train::Engine;
//!
//! let config = Config {
//!     vocab_size: 64,
//!     hidden_size: 32,
//!     intermediate_size: 96,
//!     num_hidden_layers: 1,
//!     num_attention_heads: 2,
//!     num_key_value_heads: 2,
//!     head_dim: 16,
//!     ..preset("original")?
//! };
//! let optimizer = Optimizer {
//!     adamw: AdamW { beta1: 0.9, beta2: 0.95, epsilon: 1e-8 },
//!     muon: None,
//!     weight_decay: 0.0,
//!     max_grad_norm: 1.0,
//! };
//! let mut engine = Engine::new(&Cpu::f32(1), &config, &optimizer, 1, 16)?;
//! let weights = initialize(&config, engine.layout(), 42);
//! engine.write(Arena::Parameters, &weights)?;
//! let batch = Batch {
//!     windows: 1,
//!     context: 16,
//!     ids: (0..16).collect(),
//!     targets: (1..17).collect(),
//!     first_key: vec![0; 16],
//! };
//! let mut loss = f64::INFINITY;
//! for step in 1..=60 {
//!     let hyperparams = StepHyperparams { learning_rate: 1e-2, muon_learning_rate: 0.0, step };
//!     loss = engine.step(std::slice::from_ref(&batch), hyperparams)?.loss;
//! }
//! assert!(loss < 0.1, "{loss}");
//! # anyhow::Ok(())
//! ```
//!
//! The memory and the arithmetic of a step, before it runs:
//!
//! ```
//! use laam::llama::{Recompute, step};
//! use laam::model::{Layout, preset};
//!
//! let config = preset("124m")?;
//! let layout = Layout::new(&config);
//! let activation_bytes = |recompute| {
//!     let program = step::training(&config, &layout, 16, 1024, recompute).program;
//!     program.byte_plan(2).bytes
//! };
//! assert!(activation_bytes(Recompute::Block) < activation_bytes(Recompute::None) / 3);
//! let program = step::training(&config, &layout, 16, 1024, Recompute::None).program;
//! let flops: u128 = program.costs(layout.len).map(|(_, cost)| cost.flops as u128).sum();
//! assert!(flops > 5 * config.parameter_count() * 16 * 1024);
//! # anyhow::Ok(())
//! ```
//!
//! A program on two backends:
//!
//! ```
//! use laam::backend::{Arena, Backend, Inputs, SessionSpec, cpu::Cpu, reference::Reference};
//! use laam::llama::step;
//! use laam::model::{Config, Layout, initialize, preset};
//!
//! let config = Config { vocab_size: 100, num_hidden_layers: 2, ..preset("original")? };
//! let layout = Layout::new(&config);
//! let weights = initialize(&config, &layout, 42);
//! let evaluation = step::evaluation(&config, &layout, 1, 4);
//! let indices = evaluation.inputs.bind([&[7, 8, 9, 10], &[8, 9, 10, 11], &[0; 4]]);
//! let inputs = Inputs { indices, ..Inputs::default() };
//! let nll = |backend: &dyn Backend| {
//!     let mut session = backend.open(&layout, SessionSpec::default())?;
//!     session.write(Arena::Parameters, &weights)?;
//!     let program = session.load(evaluation.program.clone())?;
//!     session.run(program, &inputs)?;
//!     session.floats(program, evaluation.losses.nll)
//! };
//! for (a, b) in nll(&Cpu::f32(1))?.into_iter().zip(nll(&Reference::F64)?) {
//!     assert!((a - b).abs() < 1e-5, "{a} {b}");
//! }
//! # anyhow::Ok(())
//! ```
//!
//! A CUDA kernel, `kernels/fill.cu`, in the simulator:
//!
//! ```
//! use laam::device::{Device, Launch, sim::Sim};
//! use laam::dtype::Dtype;
//! use laam::kernels::families;
//!
//! # if laam::kernels::BUILD.cuda.is_err() {
//! #     return anyhow::Ok(());
//! # }
//! let mut device = Sim::new(ptx_race::Options::default())?;
//! let out = device.alloc(4 * 1000)?;
//! let fill = Launch {
//!     kernel: families::FILL.of(Dtype::F32)?,
//!     grid: [1, 1, 1],
//!     block: [256, 1, 1],
//!     shared: 0,
//!     args: vec![out.into(), 2.5f32.into(), 1000u64.into()],
//! };
//! // SAFETY: the kernel writes 1,000 f32 at `out`, which holds as many.
//! unsafe { device.launch(&fill)? };
//! let mut bytes = vec![0; 4 * 1000];
//! device.download(out, &mut bytes)?;
//! assert!(bytes.chunks_exact(4).all(|x| x == 2.5f32.to_le_bytes()));
//! # anyhow::Ok(())
//! ```
#![warn(missing_docs)]

/// Version of the program; of a release build, with the commit it was built from.
pub const VERSION: &str = env!("LAAM_VERSION");

pub mod backend;
pub mod bench;
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod cli;
pub mod collective;
pub mod corpus;
pub mod device;
pub mod dtype;
pub mod error;
pub mod escape;
pub mod export;
pub mod files;
pub mod generate;
pub mod kernels;
pub mod llama;
pub mod memorization;
pub mod model;
pub mod output;
pub mod random;
pub mod report;
pub mod schema;
pub mod threads;
pub mod tokenizer;
pub mod tokens;
pub mod train;
