//! Ctrl-C, SIGTERM, SIGUSR1 and a lost terminal: the first one asks the work to stop where nothing is lost.

use std::ffi::c_int;
use std::fmt;
use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::Context;

use crate::error::{ErrorKind, Hint};

/// Set by the first signal. A further Ctrl-C ends the process where it stands.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);
/// The [`Work`] under way.
static WORK: AtomicUsize = AtomicUsize::new(0);

/// Work that an interrupt stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    Training = 0,
    /// Regenerating files, measuring a model: what was written so far stays.
    Measuring = 1,
}

/// Answer to a signal, by [`Work`].
const NOTICES: [&str; 2] = [
    "finishing the step, then saving; Ctrl-C again ends at once\n",
    "stopping; Ctrl-C again ends at once\n",
];

/// The error of work that was interrupted. It tells how the work goes on.
#[derive(Debug)]
pub struct Interrupted {
    pub hint: &'static str,
}

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

/// Watches for signals from now on. SIGHUP is left alone if it is ignored already, as under nohup.
pub fn watch(work: Work) -> anyhow::Result<()> {
    static INSTALLED: OnceLock<()> = OnceLock::new();
    WORK.store(work as usize, Ordering::Relaxed);
    if INSTALLED.set(()).is_err() {
        return Ok(());
    }
    // SIGUSR1 is what every MPI launcher passes on and nothing else: Slurm sends it by --signal=USR1@120.
    [libc::SIGINT, libc::SIGTERM, libc::SIGUSR1, libc::SIGHUP]
        .into_iter()
        .try_for_each(install)
        .context("cannot watch for Ctrl-C")
        .hint(ErrorKind::Internal, || crate::error::INTERNAL)
}

fn install(signal: c_int) -> io::Result<()> {
    let check = |result: c_int| if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) };
    // SAFETY: a zeroed sigaction is a valid value: the default action, no flags, an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are null or to a struct that outlives the call.
    check(unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut action) })?;
    if signal == libc::SIGHUP && action.sa_sigaction == libc::SIG_IGN {
        return Ok(());
    }
    action.sa_sigaction = on_signal as extern "C" fn(c_int) as usize;
    action.sa_flags = libc::SA_RESTART;
    // SAFETY: the handler makes async-signal-safe calls only and lives as long as the program.
    check(unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) })
}

extern "C" fn on_signal(signal: c_int) {
    if INTERRUPTED.swap(true, Ordering::Relaxed) {
        // A terminal that goes away sends SIGHUP more than once, and a service manager SIGTERM.
        if signal == libc::SIGINT {
            // SAFETY: _exit may be called in a signal handler.
            unsafe { libc::_exit(130) };
        }
        return;
    }
    if super::output::rank() > 0 {
        return;
    }
    let notice = NOTICES[WORK.load(Ordering::Relaxed)];
    // SAFETY: write may be called in a signal handler, and the text is constant. What it does to errno
    // is undone: the interrupted code may be about to read it.
    unsafe {
        #[cfg(target_os = "linux")]
        let errno = *libc::__errno_location();
        let _ = libc::write(libc::STDERR_FILENO, notice.as_ptr().cast(), notice.len());
        #[cfg(target_os = "linux")]
        {
            *libc::__errno_location() = errno;
        }
    }
}

/// True once a signal came.
pub fn is_interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// An error, [`Interrupted`], once a signal came.
pub fn check(hint: &'static str) -> anyhow::Result<()> {
    if is_interrupted() { Err(Interrupted { hint }.into()) } else { Ok(()) }
}
