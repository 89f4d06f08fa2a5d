//! Devices: memory, kernels with checked arguments, matmuls, graphs, events.
//!
//! - [`cuda`]: a GPU, through its driver and cuBLASLt
//! - [`sim`]: the kernels in the simulator, matmuls on the host
//!
//! Memory is named by [`Address`]: a range of an allocation. Every access of the host, of a matmul and of an
//! exchange is checked against it. What a kernel accesses is known to its author alone: [`Device::launch`]
//! is unsafe.
//!
//! A device executes its work in the order of the calls, as one stream. Calls may return before the
//! work is done; [`Device::download`] and [`Device::synchronize`] wait.

#[cfg_attr(not(any(feature = "cuda", feature = "sim")), allow(dead_code))]
mod address;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod driver;
// Without a device there is nothing to launch on.
#[cfg_attr(not(any(feature = "cuda", feature = "sim")), allow(dead_code))]
mod launch;
#[cfg_attr(not(any(feature = "cuda", feature = "sim")), allow(dead_code))]
mod matmul;
#[cfg(feature = "sim")]
pub mod sim;

use std::path::Path;

use serde_json::Value;

use crate::collective::Group;
use crate::dtype::Dtype;
use crate::kernels::Kernel;
use crate::{error, files};

pub use address::Address;
pub use launch::{Arg, Launch};
pub use matmul::{Matmul, Matrix};

/// A captured sequence of launches, matmuls, memsets and copies of one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Graph(usize);

/// A side branch of a graph that is being captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Branch(usize);

/// A point in a device's stream of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event(usize);

/// Executes kernels. An error in the middle of its work leaves memory undefined.
pub trait Device: Send {
    /// `cuda` or `sim`.
    fn name(&self) -> &'static str;
    /// Description for people and for the provenance: the GPU, its memory, the driver.
    fn describe(&self) -> String;
    /// Peak matmul rate in FLOP/s as the manufacturer states it, if known.
    fn peak_flops(&self, _dtype: Dtype) -> Option<f64> {
        None
    }
    /// Lines for whoever starts a run: what will be slow, and what to do about it.
    fn notes(&self) -> Vec<String> {
        Vec::new()
    }
    /// Free and total memory in bytes.
    fn memory(&self) -> anyhow::Result<(u64, u64)>;

    /// Allocates `bytes` of uninitialized memory at a multiple of 256. It lives until it is freed or
    /// the device is dropped. Not allowed during capture.
    fn alloc(&mut self, bytes: usize) -> anyhow::Result<Address>;
    /// Frees what [`Device::alloc`] returned.
    fn free(&mut self, address: Address) -> anyhow::Result<()>;
    /// Copies from the host. Not allowed during capture.
    fn upload(&mut self, to: Address, bytes: &[u8]) -> anyhow::Result<()>;
    /// Copies to the host after all work queued so far. Not allowed during capture.
    fn download(&self, from: Address, into: &mut [u8]) -> anyhow::Result<()>;

    /// Sets every byte.
    fn memset(&mut self, at: Address, byte: u8, bytes: usize) -> anyhow::Result<()>;
    /// Copies between two ranges of device memory that do not overlap.
    fn copy(&mut self, from: Address, to: Address, bytes: usize) -> anyhow::Result<()>;
    /// Loads a kernel's module ahead of its first launch.
    fn load(&mut self, kernel: Kernel) -> anyhow::Result<()>;
    /// Launches a kernel, after checking its arguments in number and size, and that the allocations of its
    /// address arguments are live.
    ///
    /// # Safety
    ///
    /// With this grid, block, dynamic shared memory and these arguments, the kernel accesses device memory
    /// only within the allocations of its address arguments.
    unsafe fn launch(&mut self, launch: &Launch) -> anyhow::Result<()>;
    /// Computes a matmul with f32 accumulation, by the device's library or by [`Matmul::launches`].
    fn matmul(&mut self, matmul: &Matmul) -> anyhow::Result<()>;

    /// Joins a group: exchanges are with its other ranks.
    fn join(&mut self, group: Group) -> anyhow::Result<()>;
    /// The group that was joined; one process before.
    fn group(&self) -> &Group;
    /// What moves the bytes of exchanges.
    fn exchanges(&self) -> String {
        self.group().world().library.clone()
    }
    /// Sends piece `i` of `from`, of `piece` bytes, to rank `i`; piece `i` of `into` comes from rank `i`.
    fn all_to_all(&mut self, from: Address, into: Address, piece: usize) -> anyhow::Result<()>;
    /// Sends `piece` bytes to every rank; piece `i` of `into` comes from rank `i`.
    fn all_gather(&mut self, from: Address, into: Address, piece: usize) -> anyhow::Result<()>;
    /// True if exchanges may be captured.
    fn captures_exchanges(&self) -> bool {
        false
    }

    /// Begins stream capture: until [`Device::end_capture`], work is recorded, not executed.
    fn begin_capture(&mut self) -> anyhow::Result<()>;
    /// Ends stream capture.
    fn end_capture(&mut self) -> anyhow::Result<Graph>;

    /// Begins a side branch of the graph that is being captured: what follows is executed after all work so
    /// far, and beside what follows [`Device::end_branch`].
    fn begin_branch(&mut self) -> anyhow::Result<()>;
    /// Ends the side branch.
    fn end_branch(&mut self) -> anyhow::Result<Branch>;
    /// What follows is executed after this branch and those before it. The last one must be waited for
    /// before [`Device::end_capture`].
    fn wait_for(&mut self, branch: Branch) -> anyhow::Result<()>;

    /// Executes the captured work, whose memory must still be allocated.
    fn launch_graph(&mut self, graph: Graph) -> anyhow::Result<()>;

    /// Records an event after the work queued so far.
    fn record_event(&mut self) -> anyhow::Result<Event>;
    /// Seconds between two events; waits for the later one.
    fn elapsed(&mut self, from: Event, to: Event) -> anyhow::Result<f64>;
    /// Destroys all events; none may be used afterwards.
    fn clear_events(&mut self);
    /// Waits for all work, and returns an error that occurred in it.
    fn synchronize(&mut self) -> anyhow::Result<()>;

    /// The algorithms chosen for matmuls so far, for a checkpoint: they decide the bits of the
    /// results. Null if the device has no choice.
    fn matmul_plans(&self) -> Value {
        Value::Null
    }
    /// True if the device chooses algorithms for matmuls.
    fn chooses_matmuls(&self) -> bool {
        false
    }
    /// Begins or ends planning: matmuls get their algorithms then, and nothing is executed.
    fn set_planning(&mut self, _on: bool) {}
    /// Pins the algorithms of an earlier run. Returns a warning if they do not apply here.
    fn pin_matmul_plans(&mut self, _plans: &Value) -> Option<String> {
        None
    }
}

/// Exchanges through memory of the host: all work before them is waited for.
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
mod staged {
    use super::{Address, Device};

    /// [`Device::all_to_all`].
    pub fn all_to_all(
        device: &mut dyn Device,
        from: Address,
        into: Address,
        piece: usize,
    ) -> anyhow::Result<()> {
        let group = device.group().clone();
        if group.size() == 1 {
            return device.copy(from, into, piece);
        }
        let mut send = vec![0; piece * group.size()];
        let mut received = send.clone();
        device.download(from, &mut send)?;
        group.all_to_all(&send, &mut received)?;
        device.upload(into, &received)
    }

    /// [`Device::all_gather`].
    pub fn all_gather(
        device: &mut dyn Device,
        from: Address,
        into: Address,
        piece: usize,
    ) -> anyhow::Result<()> {
        let group = device.group().clone();
        if group.size() == 1 {
            return device.copy(from, into, piece);
        }
        let (mut mine, mut all) = (vec![0; piece], vec![0; piece * group.size()]);
        device.download(from, &mut mine)?;
        group.all_gather(&mine, &mut all)?;
        device.upload(into, &all)
    }
}

/// Main memory that this process may use in bytes, if the system reports it (Linux): the machine's, or the
/// least that a control group above the process or a resource limit allows.
pub fn host_memory() -> Option<u64> {
    let limits = cgroups().into_iter().map(|group| group.limit);
    limits.chain([kib_of(&meminfo()?, "MemTotal:")?, address_space_limit()]).min()
}

/// Main memory in bytes that this process may still allocate, if the system reports it (Linux): what the
/// machine has available, swap included, or the least that is left of a limit.
pub fn available_host_memory() -> Option<u64> {
    let machine = meminfo()?;
    let free = kib_of(&machine, "MemAvailable:")? + kib_of(&machine, "SwapFree:").unwrap_or(0);
    let groups = cgroups().into_iter().map(|group| group.limit.saturating_sub(group.used));
    let mapped = kib_of(&own_status(), "VmSize:").unwrap_or(0);
    groups.chain([free, address_space_limit().saturating_sub(mapped)]).min()
}

fn read_proc(path: &Path) -> Option<String> {
    files::read_text(path, 1 << 20).ok()
}

fn meminfo() -> Option<String> {
    read_proc(Path::new("/proc/meminfo"))
}

fn own_status() -> String {
    read_proc(Path::new("/proc/self/status")).unwrap_or_default()
}

/// Bytes of a line `NAME N kB`.
fn kib_of(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(1024 * line.split_whitespace().next()?.parse::<u64>().ok()?)
}

/// The limit of `ulimit -v` in bytes.
fn address_space_limit() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: the struct outlives the call, which writes nothing else.
    match unsafe { libc::getrlimit(libc::RLIMIT_AS, &raw mut limit) } {
        0 => limit.rlim_cur,
        _ => libc::RLIM_INFINITY,
    }
}

/// Memory of a control group, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct CgroupMemory {
    limit: u64,
    /// Without files that are cached, which the system drops for other use.
    used: u64,
}

/// The control groups above this process that limit its memory.
fn cgroups() -> Vec<CgroupMemory> {
    let groups = read_proc(Path::new("/proc/self/cgroup")).unwrap_or_default();
    limiting_cgroups(&groups, Path::new("/sys/fs/cgroup"), &read_proc)
}

/// The control groups that `/proc/self/cgroup` names and those above them, of version 2 and 1, that have a
/// limit. In a container the group itself may be the root of what can be seen.
fn limiting_cgroups(
    groups: &str,
    root: &Path,
    read: &dyn Fn(&Path) -> Option<String>,
) -> Vec<CgroupMemory> {
    let mut found = Vec::new();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next())
        else {
            continue;
        };
        let (root, limit, used, cached) = match controllers {
            "" => (root.to_path_buf(), "memory.max", "memory.current", "file "),
            _ if controllers.split(',').any(|name| name == "memory") => {
                let names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache ");
                (root.join("memory"), names.0, names.1, names.2)
            }
            _ => continue,
        };
        let bytes = |path: &Path| read(path)?.trim().parse::<u64>().ok();
        let group = root.join(path.trim_start_matches('/'));
        for folder in group.ancestors().take_while(|folder| folder.starts_with(&root)) {
            // "max" is not a number: no limit.
            let Some(limit) = bytes(&folder.join(limit)) else { continue };
            let stat = read(&folder.join("memory.stat")).unwrap_or_default();
            let cached = stat.lines().find_map(|line| line.strip_prefix(cached)?.parse().ok());
            let used = bytes(&folder.join(used)).unwrap_or(0);
            found.push(CgroupMemory { limit, used: used.saturating_sub(cached.unwrap_or(0)) });
        }
    }
    found
}

/// Fails if the process cannot allocate so much memory more, before an allocation ends it.
///
/// # Errors
/// Of the kind [`error::ErrorKind::Device`].
pub fn check_host_memory(needed: u128, what: &str) -> anyhow::Result<()> {
    check_against(needed, what, available_host_memory().map(u128::from))
}

/// [`check_host_memory`] for memory that what this process has now is part of, or makes room for.
pub fn check_whole_host_memory(needed: u128, what: &str) -> anyhow::Result<()> {
    let own = kib_of(&own_status(), "RssAnon:").unwrap_or(0);
    let there = available_host_memory().map(|there| u128::from(there) + u128::from(own));
    check_against(needed, what, there)
}

fn check_against(needed: u128, what: &str, there: Option<u128>) -> anyhow::Result<()> {
    let Some(there) = there.filter(|there| needed > *there) else { return Ok(()) };
    let giga = |bytes: u128| bytes as f64 / 1e9;
    Err(error::device(
        format!(
            "{what} takes {:.1} GB of memory, this process may use {:.1}",
            giga(needed),
            giga(there)
        ),
        "use a machine or a memory limit that holds the model; `recompute` block or a smaller \
         `max_position_embeddings` takes less in training, and laam plan shows what takes the memory",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_limits_of_control_groups_are_found() {
        let read = |path: &Path| match path.to_str().unwrap() {
            "/c/a/b/memory.max" => Some("max\n".to_string()),
            "/c/a/memory.max" => Some("5000\n".to_string()),
            "/c/a/memory.current" => Some("70\n".to_string()),
            "/c/a/memory.stat" => Some("anon 30\nfile_mapped 9\nfile 40\n".to_string()),
            "/c/memory/d/memory.limit_in_bytes" => Some("7000\n".to_string()),
            "/c/memory/d/memory.usage_in_bytes" => Some("50\n".to_string()),
            "/c/memory/d/memory.stat" => Some("cache 1\ntotal_cache 30\n".to_string()),
            "/c/memory/memory.limit_in_bytes" => Some("9223372036854771712\n".to_string()),
            _ => None,
        };
        let limits = |groups| limiting_cgroups(groups, Path::new("/c"), &read);
        let group = |limit, used| CgroupMemory { limit, used };
        assert_eq!(limits("0::/a/b\n"), [group(5000, 30)]);
        let unlimited = group(9_223_372_036_854_771_712, 0);
        assert_eq!(limits("3:cpu,memory:/d\n2:pids:/a\n0::/\n"), [group(7000, 20), unlimited]);
        assert!(limits("nothing").is_empty());
        for check in [check_host_memory, check_whole_host_memory] {
            assert!(check(1, "x").is_ok() && check(1 << 70, "x").is_err());
        }
        assert!(available_host_memory() <= host_memory().map(|all| all + (1 << 40)));
    }
}
