//! `ptx-race FILE.ptx [ENTRY]`: what is in a PTX file, and a run of one of its kernels. The alias
//! `ptxsim` (`crates/ptxsim`) is built from this file too.

mod command;

use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args_os()
        .skip(1)
        .map(|argument| argument.to_string_lossy().into_owned())
        .collect();
    let mut out = String::new();
    let result = command::run(&arguments, &mut out);
    // A reader that stops reading is no error.
    let _ = std::io::stdout().write_all(out.as_bytes());
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            let _ = writeln!(std::io::stderr(), "{}: {}", command::NAME, failure.what);
            let _ = writeln!(std::io::stderr(), "hint: {}", failure.hint);
            ExitCode::from(2)
        }
    }
}
