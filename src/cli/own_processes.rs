//! `--gpus N`: the processes of a group, started by this one.

use std::env;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicI32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;

use super::output::write_error;
use crate::collective::launcher::OWN_VARIABLES;
use crate::collective::{GROUP_EXIT_CODE, sockets};
use crate::error::{ErrorKind, Hint};

/// Most processes that are started.
pub const MAX_PROCESSES: usize = 64;
/// Time that the others have to end by themselves after the first one failed.
const GRACE: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_millis(10);

/// The processes that get a signal which this one gets; 0 for none.
static PROCESSES: [AtomicI32; MAX_PROCESSES] = [const { AtomicI32::new(0) }; MAX_PROCESSES];

extern "C" fn pass_on(signal: libc::c_int) {
    for process in &PROCESSES {
        let process = process.load(Ordering::Relaxed);
        if process > 0 {
            // SAFETY: kill may be called in a signal handler; the process is not waited for yet.
            unsafe { libc::kill(process, signal) };
        }
    }
}

/// Runs this program in so many processes; the exit code of the first that failed.
pub fn run(count: usize) -> anyhow::Result<i32> {
    let mut children = start(count)
        .with_context(|| format!("cannot start {count} processes"))
        .hint(ErrorKind::Group, || "see the limits of processes and open files: ulimit -a")?;
    let mut ended: Vec<Option<ExitStatus>> = vec![None; count];
    let mut failed: Option<Instant> = None;
    while ended.iter().any(Option::is_none) {
        for (rank, child) in children.iter_mut().enumerate() {
            if ended[rank].is_some() {
                continue;
            }
            if let Some(status) = child.try_wait()? {
                PROCESSES[rank].store(0, Ordering::Relaxed);
                ended[rank] = Some(status);
                if let Some(signal) = status.signal() {
                    write_error(&format!("laam: rank {rank} was ended by signal {signal}"));
                }
                if !status.success() {
                    failed.get_or_insert_with(Instant::now);
                }
            } else if failed.is_some_and(|since| since.elapsed() >= GRACE) {
                child.kill()?;
                child.wait()?;
                // That it was ended is not a result of its own.
                ended[rank] = Some(ExitStatus::default());
                PROCESSES[rank].store(0, Ordering::Relaxed);
            }
        }
        thread::sleep(LOOK);
    }
    // An error of the group follows from another one.
    let codes = ended.into_iter().flatten().map(code_of).filter(|code| *code != 0);
    let codes: Vec<i32> = codes.collect();
    let cause = codes.iter().find(|code| **code != GROUP_EXIT_CODE);
    Ok(*cause.or(codes.first()).unwrap_or(&0))
}

/// The exit code of a process, as shells have it.
fn code_of(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

fn start(count: usize) -> io::Result<Vec<Child>> {
    let streams = sockets::pairs(count)?;
    let mut children: Vec<Child> = Vec::new();
    for (rank, own) in streams.iter().enumerate() {
        let name = |stream: &Option<std::os::fd::OwnedFd>| {
            stream.as_ref().map_or("-".to_string(), |stream| stream.as_raw_fd().to_string())
        };
        let names: Vec<String> = own.iter().map(name).collect();
        let inherited: Vec<i32> = own.iter().flatten().map(AsRawFd::as_raw_fd).collect();
        let mut arguments = env::args_os();
        let mut command = Command::new("/proc/self/exe");
        command.arg0(arguments.next().unwrap_or_default()).args(arguments);
        command.envs(OWN_VARIABLES.into_iter().zip([
            rank.to_string(),
            count.to_string(),
            names.join(","),
        ]));
        // A terminal's Ctrl-C comes to this process alone, which passes it on once.
        command.process_group(0).stdin(Stdio::null());
        let keep = move || {
            for descriptor in &inherited {
                // SAFETY: the call may be made between fork and exec; the descriptor is open.
                unsafe { libc::fcntl(*descriptor, libc::F_SETFD, 0) };
            }
            Ok(())
        };
        // SAFETY: the closure makes system calls and allocates nothing.
        unsafe { command.pre_exec(keep) };
        // After an error those that run see that their streams end.
        let child = command.spawn()?;
        PROCESSES[rank].store(child.id().cast_signed(), Ordering::Relaxed);
        children.push(child);
    }
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGUSR1, libc::SIGHUP] {
        // SAFETY: the handler makes async-signal-safe calls only and lives as long as the program.
        unsafe { libc::signal(signal, pass_on as extern "C" fn(libc::c_int) as usize) };
    }
    Ok(children)
}
