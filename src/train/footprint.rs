//! Memory footprint of a training run, from the memory plans of its programs.

use std::path::Path;

use super::{Settings, ShardKind};
use crate::backend::Backend;
use crate::device::check_whole_host_memory;
use crate::dtype::Dtype;
use crate::error;
use crate::files;
use crate::llama::ops::ShardedArena;
use crate::llama::slices::{Shards, SlicePlan};
use crate::llama::{Op, Optimizer, Program, Recompute, sliced_update, step};
use crate::model::{Config, Layout};

/// Bytes that a training run allocates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// Micro-batch size, in windows.
    pub micro_batch: usize,
    /// Parameters, with their copies in the compute dtype.
    pub parameters: usize,
    /// Gradients.
    pub gradients: usize,
    /// Both moments.
    pub optimizer: usize,
    /// The block that the buffers of a program share.
    pub activations: usize,
    /// Scratch memory of ops.
    pub workspace: usize,
    /// Gradients of slices, and sums of them.
    pub slices: usize,
    /// Buffers that ranks exchange through.
    pub exchange: usize,
    /// Bytes that a run takes besides its steps to measure itself: see [`measuring_bytes`].
    pub measuring: usize,
    /// Bytes that a rank sends per step; not memory.
    pub sent: usize,
}

/// The place of a rank whose memory is planned: the first of several, with the largest part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Slices of a step.
    pub slices: usize,
    /// Processes.
    pub ranks: usize,
    /// State that each process keeps a part of.
    pub shard: ShardKind,
}

impl Share {
    /// One process and one slice.
    pub const WHOLE: Self = Self { slices: 1, ranks: 1, shard: ShardKind::None };
}

impl Footprint {
    /// Footprint of steps on `batch` windows of `seq_len` tokens.
    ///
    /// # Errors
    /// If the sizes are so large that their sum may not fit into 63 bits.
    pub fn new(
        backend: &dyn Backend,
        config: &Config,
        batch: usize,
        seq_len: usize,
        recompute: Recompute,
    ) -> anyhow::Result<Self> {
        let micro_batch = backend.micro_batch(batch, seq_len);
        check_arithmetic(config, micro_batch, seq_len)?;
        let layout = Layout::new(config);
        let program: Program =
            step::training(config, &layout, micro_batch, seq_len, recompute).program;
        let arena = 4 * layout.len;
        Ok(Self {
            micro_batch,
            parameters: arena + backend.shadow_weight_bytes(&layout),
            gradients: arena,
            optimizer: 2 * arena,
            activations: backend.activation_bytes(&program),
            workspace: backend.workspace_bytes(&program),
            slices: 0,
            exchange: 0,
            measuring: 0,
            sent: 0,
        })
    }

    /// Footprint of a rank in steps on `batch` windows of all ranks together.
    ///
    /// # Errors
    /// As [`Footprint::new`].
    pub fn of_rank(
        backend: &dyn Backend,
        config: &Config,
        optimizer: &Optimizer,
        batch: usize,
        seq_len: usize,
        recompute: Recompute,
        share: Share,
    ) -> anyhow::Result<Self> {
        let Share { slices, ranks, shard } = share;
        let alone = Self::new(backend, config, batch.div_ceil(slices), seq_len, recompute)?;
        if slices == 1 {
            return Ok(alone);
        }
        let layout = Layout::new(config);
        let plan = SlicePlan::new(slices, ranks);
        let of = |rank| {
            let shards = Shards::new(&layout, optimizer, ranks, rank);
            let own = shard == ShardKind::Optimizer && ranks > 1;
            let (update, _) = sliced_update(&layout, optimizer, plan, &shards, own);
            let kept = if own { shards.own().len() } else { layout.len };
            let copies = backend.shadow_weight_bytes(&layout) / layout.len;
            let sent = |op: &Op| match op {
                Op::GatherShards(o) if o.arena == ShardedArena::Parameters => {
                    op.wire_bytes() / 4 * (4 + copies)
                }
                _ => op.wire_bytes(),
            };
            Self {
                optimizer: 8 * kept,
                workspace: alone.workspace.max(backend.workspace_bytes(&update)),
                slices: 4 * layout.len * plan.slots(),
                exchange: backend.exchange_bytes(&update),
                sent: update.ops.iter().map(sent).sum(),
                ..alone
            }
        };
        Ok((0..ranks).map(of).max_by_key(Self::peak).unwrap_or(alone))
    }

    /// Sum of all parts.
    pub fn peak(&self) -> usize {
        let model = self.parameters + self.gradients + self.optimizer + self.slices;
        model + self.activations + self.workspace + self.exchange + self.measuring
    }
}

/// Bytes in main memory that a run takes beside its steps: the exact parameters while their rounded values
/// are measured, or a second model, which writes samples.
pub fn measuring_bytes(backend: &dyn Backend, config: &Config, settings: &Settings) -> usize {
    if !backend.is_host() {
        return 0;
    }
    let arena = 4 * Layout::new(config).len;
    let precision = settings.precision.unwrap_or_else(|| backend.compute_dtype());
    let is_measured = settings.eval_steps.is_some() || settings.eval_epochs.is_some();
    let rounded = if is_measured && precision != Dtype::F32 { arena } else { 0 };
    let keys = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim;
    let cache = 4 * keys * config.max_position_embeddings.min(MAX_SAMPLE_CONTEXT);
    rounded.max(if settings.sample_steps.is_some() { arena + cache } else { 0 })
}

/// Tokens of a sample and its prompt, about.
const MAX_SAMPLE_CONTEXT: usize = 192;

/// Fails if the sizes of a program for these windows may overflow: an upper bound in 128 bits, so
/// generous that what it refuses fits into no machine.
fn check_arithmetic(config: &Config, micro_batch: usize, seq_len: usize) -> anyhow::Result<()> {
    let wide = |size: usize| size as u128;
    let rows = wide(micro_batch) * wide(seq_len);
    let heads = wide(config.num_attention_heads) + 2 * wide(config.num_key_value_heads);
    let width = heads * wide(config.head_dim)
        + 2 * wide(config.hidden_size)
        + 2 * wide(config.intermediate_size)
        + wide(config.vocab_size);
    // Up to 16 buffers of each width in the forward and the backward of a layer, 8 bytes per element, and
    // for the workspace a row of scores for each row, eight times.
    let layers = wide(config.num_hidden_layers) + 1;
    let buffers = rows.saturating_mul(width).saturating_mul(32 * 8 * layers);
    let scores = rows.saturating_mul(8 * 8 * wide(seq_len));
    let all = buffers.saturating_add(scores).saturating_add(64 * config.parameter_count());
    if all > 1 << 62 {
        return Err(error::config(
            format!(
                "the model and windows of {seq_len} tokens are too large to plan: up to {all} bytes"
            ),
            "make `max_position_embeddings` or the model smaller",
        ));
    }
    Ok(())
}

/// Fails if there is too little memory for a run, before an allocation ends the process: on the device, and
/// in main memory.
pub fn check_memory(
    backend: &dyn Backend,
    config: &Config,
    settings: &Settings,
    seq_len: usize,
    share: Share,
) -> anyhow::Result<()> {
    let (batch, recompute) = (settings.batch_size, settings.recompute);
    let optimizer = &settings.optimizer();
    // Sizes may be arbitrarily large: a lower bound that cannot overflow, then the sum itself.
    let windows = batch.div_ceil(share.slices);
    let rows = backend.micro_batch(windows, seq_len) as u128 * seq_len as u128;
    let heads = config.num_attention_heads as u128 * config.head_dim as u128;
    let width = heads + config.hidden_size as u128 + 2 * config.intermediate_size as u128;
    let model = config.parameter_count();
    let least = 8 * model + 4 * rows.saturating_mul(width);
    if backend.is_host() {
        check_whole_host_memory(least, TRAINING)?;
        let footprint =
            Footprint::of_rank(backend, config, optimizer, batch, seq_len, recompute, share)?;
        let measuring = measuring_bytes(backend, config, settings);
        return check_whole_host_memory((footprint.peak() + measuring) as u128, TRAINING);
    }
    // What a checkpoint holds goes through main memory.
    check_whole_host_memory(12 * model, "a checkpoint of the model")?;
    let Some(there) = backend.memory().map(u128::from) else { return Ok(()) };
    let needed = if least > there {
        least
    } else {
        Footprint::of_rank(backend, config, optimizer, batch, seq_len, recompute, share)?.peak()
            as u128
    };
    if needed <= there {
        return Ok(());
    }
    let giga = |bytes: u128| bytes as f64 / 1e9;
    Err(error::device(
        format!(
            "{TRAINING} takes {:.1} GB of memory, the GPU has {:.1}",
            giga(needed),
            giga(there)
        ),
        "set `recompute` to block, or make the model or `max_position_embeddings` smaller; laam plan \
         shows what takes the memory",
    ))
}

/// Name of the memory's use, for messages.
const TRAINING: &str = "training";

/// Peak resident memory of this process in bytes, if the system reports it (Linux).
pub fn peak_memory_bytes() -> u64 {
    status_bytes("VmHWM:").unwrap_or(0)
}

/// Resident memory of this process in bytes, if the system reports it (Linux).
pub fn memory_bytes() -> Option<u64> {
    status_bytes("VmRSS:")
}

fn status_bytes(name: &str) -> Option<u64> {
    let status = files::read_text(Path::new("/proc/self/status"), 1 << 20).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    Some(1024 * kib?)
}
