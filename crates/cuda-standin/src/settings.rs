//! Settings from the environment.
//!
//! | variable | value |
//! | --- | --- |
//! | `CUDA_STANDIN_DRIVER` | CUDA version of the driver: `13000` (the default) for 13.0 |
//! | `CUDA_STANDIN_ARCH` | `h100` (the default) or `a100` |
//! | `CUDA_STANDIN_GPUS` | number of GPUs, 1 by default |
//! | `CUDA_STANDIN_MEMORY` | bytes of device memory, 16 GiB by default |
//! | `CUDA_STANDIN_THREADS` | threads that simulate blocks; all by default |
//! | `CUDA_STANDIN_FAULT` | faults, separated by commas: see [`Fault`] |
//! | `CUDA_STANDIN_REPORT` | file that gets the calls by symbol, leaks and faults as JSON at exit |

use std::env;

use ptx_race::Arch;

use crate::codes::Code;

/// One fault on request: `cuMemAlloc_v2@3=2` lets the third call of a symbol return code 2;
/// `kernel@3=719` lets the third kernel fail while it executes, after its launch has succeeded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub symbol: String,
    pub call: u64,
    pub code: Code,
}

impl Fault {
    /// Parses a list of faults; what is not one is an error of the person who wrote it.
    pub fn parse(list: &str) -> Result<Vec<Fault>, String> {
        let parse = |text: &str| {
            let (symbol, rest) = text.split_once('@')?;
            let (call, code) = rest.split_once('=')?;
            let (call, code) = (call.parse().ok()?, Code(code.parse().ok()?));
            Some(Fault { symbol: symbol.into(), call, code })
        };
        let parts = list.split(',').map(str::trim).filter(|part| !part.is_empty());
        parts
            .map(|part| parse(part).ok_or(format!("invalid fault {part:?}: must be SYMBOL@N=CODE")))
            .collect()
    }
}

/// A simulated GPU, and the driver's behavior.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub driver: i32,
    pub arch: Arch,
    pub gpus: i32,
    pub memory: u64,
    pub threads: usize,
    pub faults: Vec<Fault>,
    pub report: Option<String>,
}

impl Settings {
    /// The settings of this process. A variable that cannot be read ends it: a test with a mistyped
    /// fault must not pass.
    pub fn from_env() -> Settings {
        let var = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
        let number = |name: &str, usual: u64| {
            var(name).map_or(usual, |value| value.parse().unwrap_or_else(|_| refuse(name, &value)))
        };
        let arch = match var("CUDA_STANDIN_ARCH").as_deref() {
            None | Some("h100") => Arch::H100,
            Some("a100") => Arch::A100,
            Some(other) => refuse("CUDA_STANDIN_ARCH", other),
        };
        let all = std::thread::available_parallelism().map_or(1, usize::from);
        let faults = Fault::parse(&var("CUDA_STANDIN_FAULT").unwrap_or_default());
        Settings {
            driver: number("CUDA_STANDIN_DRIVER", 13_000) as i32,
            arch,
            gpus: number("CUDA_STANDIN_GPUS", 1) as i32,
            memory: number("CUDA_STANDIN_MEMORY", 16 << 30),
            threads: number("CUDA_STANDIN_THREADS", all as u64) as usize,
            faults: faults.unwrap_or_else(|why| refuse("CUDA_STANDIN_FAULT", &why)),
            report: var("CUDA_STANDIN_REPORT"),
        }
    }

    /// Compute capability.
    pub fn capability(&self) -> (i32, i32) {
        match self.arch {
            Arch::H100 => (9, 0),
            Arch::A100 => (8, 0),
        }
    }

    /// Multiprocessors of the SXM boards.
    pub fn multiprocessors(&self) -> i32 {
        match self.arch {
            Arch::H100 => 132,
            Arch::A100 => 108,
        }
    }

    /// Shared memory per block with opt-in, in bytes: CUDA C++ Programming Guide, table of technical
    /// specifications per compute capability (227 KiB and 163 KiB).
    pub fn shared_optin(&self) -> u64 {
        match self.arch {
            Arch::H100 => 227 << 10,
            Arch::A100 => 163 << 10,
        }
    }

    /// Not the name of a product: no figure of a run may pass for that of a GPU.
    pub fn name(&self) -> &'static str {
        match self.arch {
            Arch::H100 => "simulated GPU of compute capability 9.0",
            Arch::A100 => "simulated GPU of compute capability 8.0",
        }
    }
}

fn refuse<T>(name: &str, value: &str) -> T {
    eprintln!("cuda-standin: invalid {name}: {value}");
    std::process::exit(97);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_parsed_and_mistakes_are_refused() {
        let faults = Fault::parse("cuMemAlloc_v2@3=2, kernel@1=719").unwrap();
        let fault =
            |symbol: &str, call, code| Fault { symbol: symbol.into(), call, code: Code(code) };
        assert_eq!(faults, [fault("cuMemAlloc_v2", 3, 2), fault("kernel", 1, 719)]);
        for wrong in ["cuInit", "cuInit@1", "cuInit=1", "cuInit@x=1", "cuInit@1=x"] {
            assert!(Fault::parse(wrong).is_err(), "{wrong}");
        }
    }
}
