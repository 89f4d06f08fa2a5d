//! Devices: memory, kernels launched by name with checked arguments, matmuls, graphs, events.
//!
//! - [`cuda`]: a GPU, through its driver and cuBLASLt
//! - [`sim`]: the kernels in the simulator, matmuls on the host
//!
//! A device executes its work in the order of the calls, as one stream. Calls may return before the
//! work is done; [`Device::download`] and [`Device::synchronize`] wait.

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

use serde_json::Value;

use crate::dtype::Dtype;
use crate::files;

pub use launch::{Arg, Launch};
pub use matmul::{Matmul, Matrix};

/// An address in a device's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Address(pub u64);

impl Address {
    /// The null pointer, which kernels take for an absent argument.
    pub const NULL: Address = Address(0);

    /// The address `bytes` further on.
    #[must_use]
    pub fn plus(self, bytes: usize) -> Address {
        Address(self.0 + bytes as u64)
    }
}

/// A captured sequence of launches, matmuls, memsets and copies of one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Graph(usize);

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
    fn load(&mut self, entry: &str) -> anyhow::Result<()>;
    /// Launches a kernel, after checking its arguments in number and size.
    fn launch(&mut self, launch: &Launch) -> anyhow::Result<()>;
    /// Computes a matmul with f32 accumulation.
    fn matmul(&mut self, matmul: &Matmul) -> anyhow::Result<()>;

    /// Begins stream capture: until [`Device::end_capture`], work is recorded, not executed.
    fn begin_capture(&mut self) -> anyhow::Result<()>;
    /// Ends stream capture.
    fn end_capture(&mut self) -> anyhow::Result<Graph>;
    /// Executes the captured work.
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
    /// Pins the algorithms of an earlier run. Returns a warning if they do not apply here.
    fn pin_matmul_plans(&mut self, _plans: &Value) -> Option<String> {
        None
    }
}

/// Total main memory of this machine in bytes, if the system reports it (Linux).
pub fn host_memory() -> Option<u64> {
    let text = files::read_text(std::path::Path::new("/proc/meminfo"), 1 << 20).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib * 1024)
}
