//! Memory footprint of a training run, from the memory plans of its programs.

use std::path::Path;

use crate::backend::Backend;
use crate::error;
use crate::files;
use crate::llama::{Program, step};
use crate::model::{Config, Layout};

/// Bytes that a training run allocates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// Micro-batch size, in windows.
    pub micro_batch: usize,
    pub parameters: usize,
    pub gradients: usize,
    /// Both moments.
    pub optimizer: usize,
    /// The block that the buffers of a program share.
    pub activations: usize,
    /// Scratch memory of ops.
    pub workspace: usize,
}

impl Footprint {
    /// Footprint of steps on `batch` windows of `seq_len` tokens.
    pub fn new(backend: &dyn Backend, config: &Config, batch: usize, seq_len: usize) -> Self {
        let layout = Layout::new(config);
        let micro_batch = backend.micro_batch(batch, seq_len);
        let program: Program = step::training(config, &layout, micro_batch, seq_len).program;
        let arena = 4 * layout.len;
        Self {
            micro_batch,
            parameters: arena + backend.shadow_weight_bytes(&layout),
            gradients: arena,
            optimizer: 2 * arena,
            activations: backend.activation_bytes(&program),
            workspace: backend.workspace_bytes(&program),
        }
    }

    /// Sum of all parts.
    pub fn peak(&self) -> usize {
        self.parameters + self.gradients + self.optimizer + self.activations + self.workspace
    }
}

/// Fails if the machine has too little memory, before an allocation aborts the process.
pub fn check_memory(
    backend: &dyn Backend,
    config: &Config,
    batch: usize,
    seq_len: usize,
) -> anyhow::Result<()> {
    let Some(there) = backend.memory().map(u128::from) else { return Ok(()) };
    // Sizes may be arbitrarily large: a lower bound that cannot overflow, then the sum itself.
    let rows = backend.micro_batch(batch, seq_len) as u128 * seq_len as u128;
    let heads = config.num_attention_heads as u128 * config.head_dim as u128;
    let width = heads + config.hidden_size as u128 + 2 * config.intermediate_size as u128;
    let least = 16 * config.parameter_count() + 4 * rows.saturating_mul(width);
    let needed = if least > there {
        least
    } else {
        Footprint::new(backend, config, batch, seq_len).peak() as u128
    };
    if needed <= there {
        return Ok(());
    }
    let giga = |bytes: u128| bytes as f64 / 1e9;
    Err(error::device(
        format!(
            "training takes {:.1} GB of memory, this machine has {:.1}",
            giga(needed),
            giga(there)
        ),
        "make the model or `max_position_embeddings` smaller; laam plan shows what takes the memory",
    ))
}

/// Peak resident memory of this process in bytes, if the system reports it (Linux).
pub fn peak_memory_bytes() -> u64 {
    let status = files::read_text(Path::new("/proc/self/status"), 1 << 20).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}
