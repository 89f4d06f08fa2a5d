//! The built-in sample: a toy kernel that runs as an ordinary program. It is training text for a
//! model that must give it back, so its files are frozen: see their hash in the tests.

use super::pass::{Flow, Intake};

/// The files in bytewise order of their names.
const FILES: [(&str, &str); 0] = [];

pub fn read(intake: &mut Intake) -> anyhow::Result<()> {
    for (path, text) in FILES {
        if intake.keep(path.to_string(), text.into())? == Flow::Break(()) {
            break;
        }
    }
    Ok(())
}
