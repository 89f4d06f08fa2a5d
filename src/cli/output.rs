//! Everything that is printed. Output never ends a run: if nobody reads it, or if the disk behind it is
//! full, the work goes on. Foreign text is escaped here.

use std::fmt;
use std::io::{self, IsTerminal, StdoutLock, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use serde_json::Value;

use crate::error;
use crate::escape::{ModelText, visible, visible_json, visible_lines};

/// One line on stderr, as `eprintln!` has its arguments.
macro_rules! say {
    ($($argument:tt)*) => { $crate::cli::output::write_line_to_stderr(format_args!($($argument)*)) };
}
pub(crate) use say;

/// One line on stderr, in one write.
pub fn write_line_to_stderr(line: fmt::Arguments) {
    write_to_stderr(&format!("{}\n", visible(&line.to_string())));
}

/// Number of this process among those that work together: only the first one prints.
static RANK: AtomicUsize = AtomicUsize::new(0);

pub fn set_rank(rank: usize) {
    RANK.store(rank, Ordering::Relaxed);
}

pub fn rank() -> usize {
    RANK.load(Ordering::Relaxed)
}

/// A line of an error on stderr, of any process: after the first one, with its number.
pub fn write_error(line: &str) {
    let line = visible(line);
    let line = match rank() {
        0 => format!("{line}\n"),
        rank => format!("rank {rank}: {line}\n"),
    };
    let _ = io::stderr().write_all(line.as_bytes());
}

/// Text on stderr.
pub fn write_to_stderr(text: &str) {
    if rank() > 0 {
        return;
    }
    // There is nobody left to be told of an error.
    let _ = io::stderr().write_all(visible_lines(text).as_bytes());
}

/// [`write_to_stderr`] for a writer.
pub struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        write_to_stderr(&String::from_utf8_lossy(bytes));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The first error of stdout.
static LOST: Mutex<Option<io::Error>> = Mutex::new(None);

/// Stdout for text of a command whose work is more than what it prints: writing always succeeds, and
/// [`check_stdout`] tells afterwards.
pub struct Stdout(());

/// See [`Stdout`].
pub fn stdout() -> Stdout {
    Stdout(())
}

impl Stdout {
    /// Keeps the error of what this process prints, if it prints.
    fn keep_of(write: impl FnOnce() -> io::Result<()>) {
        if rank() == 0 {
            Self::keep(write());
        }
    }

    fn keep(result: io::Result<()>) {
        if let Err(error) = result {
            LOST.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        }
    }
}

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Self::keep_of(|| match std::str::from_utf8(bytes) {
            Ok(text) => io::stdout().write_all(visible_lines(text).as_bytes()),
            Err(_) => io::stdout().write_all(bytes),
        });
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Self::keep(io::stdout().flush());
        Ok(())
    }
}

/// Stdout for the text of a model.
pub fn model_text() -> ModelText<StdoutLock<'static>> {
    let out = io::stdout();
    let is_terminal = out.is_terminal();
    ModelText::new(out.lock(), is_terminal)
}

/// A JSON value on stdout.
pub fn print_json(value: &Value) {
    let text = format!("{value:#}\n");
    Stdout::keep_of(|| io::stdout().write_all(visible_json(&text).as_bytes()));
}

/// Checks that all that was printed on stdout arrived. A reader that went away (`laam ... | head`) had what
/// it wanted.
///
/// # Errors
/// Any other error of stdout, as of a full disk.
pub fn check_stdout() -> anyhow::Result<()> {
    Stdout::keep(io::stdout().flush());
    match LOST.lock().unwrap_or_else(PoisonError::into_inner).take() {
        Some(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(unwritten(error)),
        _ => Ok(()),
    }
}

/// An error of stdout, with a hint; a closed pipe stays as it is.
pub fn unwritten(error: io::Error) -> anyhow::Error {
    if error.kind() == io::ErrorKind::BrokenPipe {
        return error.into();
    }
    let what = format!("cannot write to stdout: {error}");
    error::data(what, "free some room, or print to another place")
}
