//! The one integration binary: a module for each module of the library, and `support` for what they
//! share.
//!
//! Tests on the real corpus look for `linux-1.0.tar.xz` in `LAAM_TEST_CORPUS` (a file or its
//! folder) and in `../shared/corpus`, and say so loudly when they skip.

mod architecture;
mod backend;
mod bench;
mod cli;
mod collective;
mod corpus;
mod docs;
mod doctor;
mod documents;
mod export;
mod faults;
mod fetch;
mod foreign;
mod generate;
mod gpu;
mod gpu_day;
mod hardware;
mod hostile_archives;
mod hostile_files;
mod kernels;
mod launches;
mod limits;
mod memorization;
mod model;
mod output_folder;
mod package;
mod prebuilt;
mod process;
mod provenance;
mod ranks;
mod rebuild;
mod report;
mod run;
mod sample;
mod sass;
mod schema;
mod standin;
mod support;
mod sweep;
mod tokenizer;
mod tokens;
mod trainer;
mod training;
mod validation;
