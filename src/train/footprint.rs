//! The memory of a training run, from its programs' plans, before anything is allocated.

use crate::backend::Backend;
use crate::error;
use crate::llama::{Program, step};
use crate::model::{Config, Layout};

/// Bytes that a run holds from its first step to its last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// Windows that go through the model together.
    pub windows_at_once: usize,
    pub parameters: usize,
    pub gradients: usize,
    /// Both moments.
    pub optimizer: usize,
    /// The block that the buffers of a program share.
    pub activations: usize,
    /// What operations of this backend need beside their buffers.
    pub workspace: usize,
}

impl Footprint {
    /// Of steps of `windows` windows of `context` tokens.
    pub fn new(backend: &dyn Backend, config: &Config, windows: usize, context: usize) -> Self {
        let layout = Layout::new(config);
        let windows_at_once = backend.micro_batch(windows, context);
        let program: Program = step::training(config, &layout, windows_at_once, context).program;
        let arena = 4 * layout.len;
        Self {
            windows_at_once,
            parameters: arena + backend.shadow_weight_bytes(&layout),
            gradients: arena,
            optimizer: 2 * arena,
            activations: backend.activation_bytes(&program),
            workspace: backend.workspace_bytes(&program),
        }
    }

    /// All of it together.
    pub fn peak(&self) -> usize {
        self.parameters + self.gradients + self.optimizer + self.activations + self.workspace
    }
}

/// Refuses what the machine has no memory for, before an allocation ends the program.
pub fn check_memory(
    backend: &dyn Backend,
    config: &Config,
    windows: usize,
    context: usize,
) -> anyhow::Result<()> {
    let Some(there) = backend.memory().map(u128::from) else { return Ok(()) };
    // Sizes may be anything: a bound from below that cannot overflow, then the sum itself.
    let rows = backend.micro_batch(windows, context) as u128 * context as u128;
    let heads = config.num_attention_heads as u128 * config.head_dim as u128;
    let width = heads + config.hidden_size as u128 + 2 * config.intermediate_size as u128;
    let least = 16 * config.parameter_count() + 4 * rows.saturating_mul(width);
    let needed = if least > there {
        least
    } else {
        Footprint::new(backend, config, windows, context).peak() as u128
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
