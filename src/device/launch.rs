//! Kernel launches, and the argument check that every device makes.

use super::Address;
use super::address::Allocations;
use crate::error;
use crate::kernels::{CudaModule, Kernel};

/// A kernel launch.
#[derive(Clone, Debug)]
pub struct Launch {
    /// The kernel.
    pub kernel: Kernel,
    /// Blocks per grid along x, y and z.
    pub grid: [u32; 3],
    /// Threads per block along x, y and z.
    pub block: [u32; 3],
    /// Dynamic shared memory per block in bytes.
    pub shared: u32,
    /// Arguments, in the kernel's order.
    pub args: Vec<Arg>,
}

/// A kernel argument, passed by value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arg {
    /// Device memory.
    Address(Address),
    /// `int`
    I32(i32),
    /// `unsigned`
    U32(u32),
    /// `unsigned long long`
    U64(u64),
    /// `float`
    F32(f32),
    /// `double`
    F64(f64),
}

impl Arg {
    /// Size in bytes, which is also its alignment.
    pub fn size(&self) -> usize {
        match self {
            Arg::I32(_) | Arg::U32(_) | Arg::F32(_) => 4,
            Arg::Address(_) | Arg::U64(_) | Arg::F64(_) => 8,
        }
    }

    /// The value, zero-extended to 64 bits.
    pub(super) fn bits(&self, allocations: &mut Allocations) -> anyhow::Result<u64> {
        Ok(match *self {
            Arg::Address(address) => allocations.pointer(address)?,
            Arg::U64(x) => x,
            Arg::I32(x) => u64::from(x as u32),
            Arg::U32(x) => u64::from(x),
            Arg::F32(x) => u64::from(x.to_bits()),
            Arg::F64(x) => x.to_bits(),
        })
    }
}

macro_rules! arg_from {
    ($($type:ty => $variant:ident),*) => {$(
        impl From<$type> for Arg {
            fn from(value: $type) -> Arg {
                Arg::$variant(value)
            }
        }
    )*};
}
arg_from!(Address => Address, i32 => I32, u32 => U32, u64 => U64, f32 => F32, f64 => F64);

/// Limit of every compute capability on the grid along y and z, in blocks.
const MAX_GRID_YZ: u32 = 65_535;

impl Launch {
    /// The file of the kernel, if the arguments match its parameters in number and size, the block is
    /// within its bounds, and every GPU supports the grid.
    pub(super) fn check(&self) -> anyhow::Result<&'static CudaModule> {
        let module = self.kernel.module()?;
        let name = self.kernel.name();
        let fault = |what: String| error::internal(what);
        let sizes: Vec<usize> = self.args.iter().map(Arg::size).collect();
        if sizes != self.kernel.parameters() {
            return Err(fault(format!(
                "kernel {name} takes parameters of {:?} bytes, but {sizes:?} were passed",
                self.kernel.parameters()
            )));
        }
        let threads: u64 = self.block.iter().map(|&n| u64::from(n)).product();
        let [x, y, z] = self.grid;
        if x == 0 || !(1..=MAX_GRID_YZ).contains(&y) || !(1..=MAX_GRID_YZ).contains(&z) {
            return Err(fault(format!("invalid grid {x} x {y} x {z} for kernel {name}")));
        }
        if !(1..=self.kernel.max_threads() as u64).contains(&threads) || self.block[2] > 64 {
            return Err(fault(format!("invalid block {:?} for kernel {name}", self.block)));
        }
        Ok(module)
    }

    /// Values of the arguments.
    pub(super) fn values(&self, allocations: &mut Allocations) -> anyhow::Result<Vec<u64>> {
        self.args.iter().map(|arg| arg.bits(allocations)).collect()
    }
}
