//! The command line's manners: exit codes, one line of error, a hint.

use crate::support::laam;

/// Runs with bad arguments and returns what stderr said, after checking the form of an error.
pub fn error_of(arguments: &[&str]) -> String {
    let output = laam().args(arguments).output().expect("the program starts");
    let said = String::from_utf8(output.stderr).expect("errors are UTF-8");
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {said}");
    let lines: Vec<_> = said.lines().collect();
    let what = lines.iter().position(|line| line.starts_with("laam: "));
    let hint = lines.iter().position(|line| line.starts_with("hint: "));
    assert!(what.is_some() && hint == what.map(|at| at + 1), "{arguments:?}: {said}");
    said
}

#[test]
fn bad_arguments_are_one_line_and_a_hint() {
    error_of(&[]);
    error_of(&["docto"]);
    error_of(&["doctor", "--no-such-flag"]);
}
