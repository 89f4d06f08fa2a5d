use std::process::ExitCode;

fn main() -> ExitCode {
    laam::cli::main()
}
