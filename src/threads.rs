//! Threads: how many this machine has, and pools of them. A thread that cannot be had is an error.

use std::sync::OnceLock;
use std::thread::{Builder, Scope, ScopedJoinHandle};

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::error;

/// Threads that this process can run at once.
pub fn available() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Processors of this machine, whether this process may use them or not.
pub fn online() -> usize {
    // SAFETY: the call takes no pointers.
    let count = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) };
    usize::try_from(count).unwrap_or(1).max(1)
}

/// Refuses a number of threads that is 0, or far above what the machine has.
pub fn check_count(threads: usize) -> anyhow::Result<()> {
    let most = (4 * available()).max(64);
    if threads == 0 || threads > most {
        let range = format!("at least 1 and at most {most} on this machine");
        return Err(error::invalid("threads", threads, range));
    }
    Ok(())
}

/// A pool of so many threads.
pub fn pool(threads: usize) -> anyhow::Result<ThreadPool> {
    ThreadPoolBuilder::new().num_threads(threads).build().map_err(|why| none_to_be_had(&why))
}

/// Starts the pool that parallel iterators outside of any other use. Without it they panic if there are no
/// threads to be had.
pub fn start_global_pool() -> anyhow::Result<()> {
    static STARTED: OnceLock<Option<String>> = OnceLock::new();
    let failure = STARTED.get_or_init(|| {
        use std::error::Error;
        // One that is running already is as good; it is the only error without a cause.
        ThreadPoolBuilder::new()
            .build_global()
            .err()
            .filter(|why| why.source().is_some())
            .map(|why| why.to_string())
    });
    failure.as_ref().map_or(Ok(()), |why| Err(none_to_be_had(why)))
}

/// Starts a thread of a scope.
pub fn spawn_scoped<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    work: impl FnOnce() -> T + Send + 'scope,
) -> anyhow::Result<ScopedJoinHandle<'scope, T>> {
    Builder::new().spawn_scoped(scope, work).map_err(|why| none_to_be_had(&why))
}

/// The error of a thread that could not be started.
pub fn none_to_be_had(why: &dyn std::fmt::Display) -> anyhow::Error {
    error::device(
        format!("cannot start a thread: {why}"),
        "free some memory, raise the limit on processes (ulimit -u), or use fewer `threads`",
    )
}
