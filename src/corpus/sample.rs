//! The built-in sample: a toy kernel that runs as an ordinary program. It is training text for a
//! model that must give it back, so its files are frozen: a test holds their hash.

use super::pass::{Flow, Intake};

macro_rules! files {
    ($($name:literal)*) => {
        [$((concat!("sample/", $name), include_str!(concat!("sample/", $name)))),*]
    };
}

/// The files in bytewise order of their names.
const FILES: [(&str, &str); 9] = files!(
    "console.c" "fs.c" "kernel.h" "lib.c" "main.c" "memory.c" "sched.c" "shell.c" "test.c"
);

pub fn read(intake: &mut Intake) -> anyhow::Result<()> {
    for (path, text) in FILES {
        if intake.keep(path.to_string(), text.into())? == Flow::Break(()) {
            break;
        }
    }
    Ok(())
}
