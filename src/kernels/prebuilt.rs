//! Shipped PTX: `kernels/prebuilt/NAME.ptx.xz`, and a manifest that names the compiler, the state of the
//! sources and the kernels. `build.rs` compiles this file too.

use std::fs;
use std::io;
use std::path::Path;

use super::signature::Signature;

/// File in the folder of the shipped PTX.
pub const MANIFEST: &str = "manifest.tsv";

/// Compiler and sources of the shipped PTX.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShippedKernels {
    /// Version of nvcc: `13.0.88`.
    pub nvcc: String,
    /// The kernel files, by name.
    pub modules: Vec<ShippedModule>,
}

/// A kernel file of the shipped PTX.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShippedModule {
    /// File stem.
    pub name: String,
    /// [`source_hash`] of the sources it was compiled from.
    pub hash: String,
    /// Its kernels, in the order of the PTX.
    pub kernels: Vec<Signature>,
}

impl ShippedKernels {
    const HEAD: &str = "# written by scripts/prebuild with nvcc ";

    /// Parses the text.
    pub fn parse(text: &str) -> Option<ShippedKernels> {
        let mut lines = text.lines();
        let nvcc = lines.next()?.strip_prefix(Self::HEAD)?.to_string();
        let mut modules: Vec<ShippedModule> = Vec::new();
        for line in lines {
            // The kernels of a file are indented.
            if let Some(kernel) = line.strip_prefix('\t') {
                modules.last_mut()?.kernels.push(Signature::parse(kernel)?);
            } else {
                let (name, hash) = line.split_once('\t')?;
                let (name, hash) = (name.to_string(), hash.to_string());
                modules.push(ShippedModule { name, hash, kernels: Vec::new() });
            }
        }
        Some(ShippedKernels { nvcc, modules })
    }

    /// The text that [`ShippedKernels::parse`] reads.
    #[allow(dead_code)] // build.rs only parses
    pub fn text(&self) -> String {
        let mut text = format!("{}{}\n", Self::HEAD, self.nvcc);
        for ShippedModule { name, hash, kernels } in &self.modules {
            text.extend([name, "\t", hash, "\n"]);
            text.extend(kernels.iter().map(|kernel| format!("\t{}\n", kernel.line())));
        }
        text
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
