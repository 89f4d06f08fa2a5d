//! The memory of a training run, from its programs' plans, before anything is allocated.

use crate::backend::Backend;
use crate::llama::{Plan, Program, step};
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
        let windows_at_once = backend.micro_windows(windows, context);
        let program: Program = step::training(config, &layout, windows_at_once, context).program;
        let Plan { floats, indices, .. } = program.plan();
        let arena = 4 * layout.len;
        Self {
            windows_at_once,
            parameters: arena,
            gradients: arena,
            optimizer: 2 * arena,
            activations: 4 * (floats + indices),
            workspace: backend.workspace(&program),
        }
    }

    /// All of it together.
    pub fn peak(&self) -> usize {
        self.parameters + self.gradients + self.optimizer + self.activations + self.workspace
    }
}
