//! The group of processes that this one belongs to.

use std::sync::OnceLock;
use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};

use super::output;
use super::own_processes::{self, MAX_PROCESSES};
use crate::collective::launcher::{LaunchPlace, Launcher};
use crate::collective::{DEADLINE, Group};
use crate::corpus::hex;
use crate::threads;
use crate::{error, files};

/// The group, once this process joined it.
static GROUP: OnceLock<Group> = OnceLock::new();

/// Flags of a command that several processes execute together.
#[derive(Args, Clone, Debug)]
pub struct GroupArgs {
    /// Seconds a process waits for the others in a step [default: 600]
    #[arg(long, value_name = "SECONDS", help_heading = "Several processes")]
    rank_timeout: Option<f64>,
    /// Start N processes on this host, one per GPU (or N processes of another backend)
    #[arg(long, value_name = "N", help_heading = "Several processes",
        value_parser = clap::value_parser!(u16).range(1..=MAX_PROCESSES as i64))]
    gpus: Option<u16>,
}

impl GroupArgs {
    /// True with `gpus`.
    pub fn starts_processes(&self) -> bool {
        self.gpus.is_some()
    }

    /// Joins the processes that the launcher started with this one.
    pub fn join(&self) -> anyhow::Result<Group> {
        let deadline = match self.rank_timeout {
            None => DEADLINE,
            Some(seconds) => Duration::try_from_secs_f64(seconds)
                .ok()
                .filter(|deadline| !deadline.is_zero())
                .ok_or_else(|| {
                    error::invalid("rank_timeout", seconds, "a number of seconds above 0")
                })?,
        };
        let placement = LaunchPlace::detect()?;
        let is_own = placement.as_ref().is_some_and(|it| it.launcher == Launcher::Gpus);
        if let Some(gpus) = self.gpus.filter(|_| !is_own) {
            if let Some(placement) = placement.filter(|placement| placement.size > 1) {
                return Err(error::config(
                    format!(
                        "`gpus` starts processes, but there are more: {}",
                        placement.describe()
                    ),
                    "leave out `gpus`, or the launcher",
                ));
            }
            if gpus > 1 {
                std::process::exit(own_processes::run(gpus.into())?);
            }
            return Ok(Group::alone());
        }
        let join = |placement: LaunchPlace| placement.join(deadline);
        let group = placement.map_or(Ok(Group::alone()), join)?;
        group.set_deadline(deadline);
        output::set_rank(group.rank());
        Ok(GROUP.get_or_init(|| group).clone())
    }
}

/// Takes the rank that the launcher gave this process, which decides what it prints before it joins.
pub fn note_rank() {
    if let Ok(Some(placement)) = LaunchPlace::detect() {
        output::set_rank(placement.rank);
    }
}

/// Refuses several processes for a command that one process executes.
pub fn refuse_several(command: &str) -> anyhow::Result<()> {
    let Some(placement) = LaunchPlace::detect()? else { return Ok(()) };
    if placement.size == 1 {
        return Ok(());
    }
    Err(error::config(
        format!("laam {command} is for one process, but there are more: {}", placement.describe()),
        format!(
            "start laam {command} without the launcher; laam train trains on several processes"
        ),
    ))
}

/// Leaves the group after the work is done.
pub fn finish() {
    if let Some(group) = GROUP.get() {
        group.finish();
    }
}

/// Ends the group after an error that was told.
pub fn fail(code: i32) {
    if let Some(group) = GROUP.get() {
        group.fail(code);
    }
}

/// The number of this process among those of this host.
pub fn local_rank() -> usize {
    GROUP.get().map_or(0, |group| group.world().local_rank)
}

/// True if `--gpus` started this process, which then has a GPU by itself.
pub fn has_own_gpu() -> bool {
    LaunchPlace::detect().is_ok_and(|it| it.is_some_and(|it| it.launcher == Launcher::Gpus))
}

/// Threads for this process: all of the machine's, shared among the processes of this host unless the
/// launcher did that.
pub fn threads() -> usize {
    let available = threads::available();
    let here = GROUP.get().map_or(1, |group| group.world().local_size);
    if available < threads::online() { available } else { (available / here).max(1) }
}

/// Fails on all ranks if one was started with other settings than rank 0: the first field that differs.
pub fn check_same_settings(group: &Group, settings: &Value) -> anyhow::Result<()> {
    if group.size() == 1 {
        return Ok(());
    }
    let program = std::env::current_exe().and_then(|path| files::sha256(&path));
    let build = json!([crate::VERSION, program.map_or_else(|_| String::new(), |hash| hex(&hash))]);
    let mine = json!({ "build": build, "settings": settings }).to_string();
    group.check_same(mine.as_bytes(), |rank, first, other| {
        let parse = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).unwrap_or_default();
        let (first, other) = (parse(first), parse(other));
        if first["build"] != other["build"] {
            return error::group(
                format!("rank {rank} is another build of laam than rank 0"),
                "start the same program on every host",
            );
        }
        let (first, other) = (&first["settings"], &other["settings"]);
        let keys = |value: &Value| -> Vec<String> {
            value.as_object().map_or(Vec::new(), |object| object.keys().cloned().collect())
        };
        let mut all = keys(first);
        all.extend(keys(other));
        let differing = all.iter().find(|key| first[key.as_str()] != other[key.as_str()]);
        let which = differing.map_or_else(String::new, |key| {
            format!(": `{key}` is {}, not {}", other[key.as_str()], first[key.as_str()])
        });
        error::group(
            format!("rank {rank} was started with other settings than rank 0{which}"),
            "give every process the same flags",
        )
    })
}
