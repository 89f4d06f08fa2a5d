//! The command and the library under their other name.

use std::process::Command;

#[test]
fn the_alias_is_the_command_and_the_library() {
    let output = Command::new(env!("CARGO_BIN_EXE_ptxsim")).arg("--help").output().unwrap();
    let told = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && told.starts_with("Usage: ptxsim FILE.ptx"), "{told}");
    let output = Command::new(env!("CARGO_BIN_EXE_ptxsim")).arg("none.ptx").output().unwrap();
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(2) && told.starts_with("ptxsim: cannot read"), "{told}");
    assert!(ptxsim::Module::from_ptx("no PTX").is_err());
}
