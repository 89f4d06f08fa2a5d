//! Shipped PTX: `kernels/prebuilt/NAME.ptx.xz`, and a manifest that names the compiler and the state of
//! the sources. `build.rs` compiles this file too.

use std::fs;
use std::io;
use std::path::Path;

/// File in the folder of the shipped PTX.
pub const MANIFEST: &str = "manifest.tsv";

/// Compiler and sources of the shipped PTX.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShippedKernels {
    /// Version of nvcc: `13.0.88`.
    pub nvcc: String,
    /// Each kernel file by its stem, with [`source_hash`] of the sources it was compiled from.
    pub modules: Vec<(String, String)>,
}

impl ShippedKernels {
    const HEAD: &str = "# written by scripts/prebuild with nvcc ";

    /// Parses the text.
    pub fn parse(text: &str) -> Option<ShippedKernels> {
        let mut lines = text.lines();
        let nvcc = lines.next()?.strip_prefix(Self::HEAD)?.to_string();
        let pair = |line: &str| {
            let (name, hash) = line.split_once('\t')?;
            Some((name.to_string(), hash.to_string()))
        };
        Some(ShippedKernels { nvcc, modules: lines.map(pair).collect::<Option<_>>()? })
    }

    /// The text that [`ShippedKernels::parse`] reads.
    #[allow(dead_code)] // build.rs only parses
    pub fn text(&self) -> String {
        let lines = self.modules.iter().map(|(name, hash)| format!("{name}\t{hash}\n"));
        format!("{}{}\n{}", Self::HEAD, self.nvcc, lines.collect::<String>())
    }
}

/// FNV-1a in 64 bits of `NAME.cu` and of every header in `lib/`, in hexadecimal: it detects a change, not
/// an attack.
pub fn source_hash(kernels: &Path, name: &str) -> io::Result<String> {
    let mut headers = fs::read_dir(kernels.join("lib"))?
        .map(|entry| Ok(entry?.path()))
        .collect::<io::Result<Vec<_>>>()?;
    headers.sort();
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for file in std::iter::once(kernels.join(format!("{name}.cu"))).chain(headers) {
        let bytes = fs::read(&file)?;
        let name = file.file_name().unwrap_or_default().as_encoded_bytes();
        for &byte in name.iter().chain(&[0]).chain(&bytes).chain(&[0]) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
    Ok(format!("{hash:016x}"))
}
