//! Devices: memory, kernels launched by name with checked arguments, matrix products, graphs, time.
//!
//! - [`cuda`]: a card, by its driver and cuBLASLt
//! - [`sim`]: the kernels in the simulator, the products on the host
//!
//! Everything a device is asked to do happens in the order it was asked for. Calls may return before
//! the work is done; [`Device::download`] and [`Device::synchronize`] wait.

pub mod cuda;
pub mod driver;
mod launch;
mod product;
pub mod sim;

use serde_json::Value;

use crate::dtype::Dtype;

pub use launch::{Arg, Launch};
pub use product::{Matrix, Product};

/// A place in a device's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Address(pub u64);

impl Address {
    /// What a kernel takes for "not there".
    pub const NULL: Address = Address(0);

    /// So many bytes further on.
    #[must_use]
    pub fn plus(self, bytes: usize) -> Address {
        Address(self.0 + bytes as u64)
    }
}

/// A recorded sequence of launches, products, fills and copies of one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Graph(usize);

/// A moment in the order of a device's work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark(usize);

/// Something that runs kernels. An error in the middle of its work leaves memory undefined.
pub trait Device: Send {
    /// `cuda` or `sim`.
    fn name(&self) -> &'static str;
    /// For a person and for the provenance: the card, its memory, the driver.
    fn describe(&self) -> String;
    /// The FLOP/s of products that its maker tells, where that is known.
    fn peak(&self, _numbers: Dtype) -> Option<f64> {
        None
    }
    /// Bytes of memory that are free, and that there are in all.
    fn memory(&self) -> anyhow::Result<(u64, u64)>;

    /// `bytes` of memory at a multiple of 256, with anything in it, until it is freed or the device
    /// goes away. Not while recording.
    fn alloc(&mut self, bytes: usize) -> anyhow::Result<Address>;
    /// Gives back what `alloc` gave.
    fn free(&mut self, address: Address) -> anyhow::Result<()>;
    /// Copies from the host. Not while recording.
    fn upload(&mut self, to: Address, bytes: &[u8]) -> anyhow::Result<()>;
    /// Copies to the host, when all work asked for so far is done. Not while recording.
    fn download(&self, from: Address, into: &mut [u8]) -> anyhow::Result<()>;

    /// Sets every byte.
    fn fill(&mut self, at: Address, byte: u8, bytes: usize) -> anyhow::Result<()>;
    /// Copies from memory to memory; the two do not overlap.
    fn copy(&mut self, from: Address, to: Address, bytes: usize) -> anyhow::Result<()>;
    /// Makes a kernel ready to start, as its first launch would.
    fn load(&mut self, entry: &str) -> anyhow::Result<()>;
    /// Starts a kernel. Its arguments are checked in number and size against its parameters.
    fn launch(&mut self, launch: &Launch) -> anyhow::Result<()>;
    /// A matrix product, summed in f32.
    fn product(&mut self, product: &Product) -> anyhow::Result<()>;

    /// From here to [`Device::finish`], work is not done but recorded.
    fn record(&mut self) -> anyhow::Result<()>;
    /// Ends the recording.
    fn finish(&mut self) -> anyhow::Result<Graph>;
    /// Does what was recorded.
    fn replay(&mut self, graph: Graph) -> anyhow::Result<()>;

    /// Notes when the work asked for so far is done.
    fn mark(&mut self) -> anyhow::Result<Mark>;
    /// Seconds from one mark to another; waits for the later. Every mark is gone afterwards with
    /// [`Device::forget_marks`].
    fn seconds(&mut self, from: Mark, to: Mark) -> anyhow::Result<f64>;
    /// Lets go of all marks.
    fn forget_marks(&mut self);
    /// Waits for all work, and tells of an error in it.
    fn synchronize(&mut self) -> anyhow::Result<()>;

    /// How it carries products out, where it had a choice that the bits of results depend on: for a
    /// checkpoint. Null where it had none.
    fn choices(&self) -> Value {
        Value::Null
    }
    /// Keeps to choices of an earlier run. Returns what a person should know where they cannot be
    /// kept to here.
    fn choose(&mut self, _choices: &Value) -> Option<String> {
        None
    }
}

/// The main memory of this machine, where the system tells (Linux).
pub fn host_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib * 1024)
}
