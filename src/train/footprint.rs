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
use crate::llama::{Op, Optimizer, Program, Recompute, sliced_update, step, update};
use crate::model::{Config, Layout, Span, preset, preset_names};

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
        Ok(Self::with_program(backend, config, batch, seq_len, recompute)?.0)
    }

    /// [`Self::new`], and the forward and backward of a micro-batch.
    fn with_program(
        backend: &dyn Backend,
        config: &Config,
        batch: usize,
        seq_len: usize,
        recompute: Recompute,
    ) -> anyhow::Result<(Self, Program)> {
        let micro_batch = backend.micro_batch(batch, seq_len);
        check_arithmetic(config, micro_batch, seq_len)?;
        let layout = Layout::new(config);
        let program = step::training(config, &layout, micro_batch, seq_len, recompute).program;
        let arena = 4 * layout.len;
        let footprint = Self {
            micro_batch,
            parameters: arena + backend.shadow_weight_bytes(&layout),
            gradients: arena,
            optimizer: 2 * arena,
            activations: backend.activation_bytes(&program),
            workspace: backend.workspace_bytes(&[&program]),
            slices: 0,
            exchange: 0,
            measuring: 0,
            sent: 0,
        };
        Ok((footprint, program))
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
        let batch = batch.div_ceil(slices);
        let (alone, program) = Self::with_program(backend, config, batch, seq_len, recompute)?;
        let layout = Layout::new(config);
        if slices == 1 {
            let (update, _) = update(&layout, optimizer);
            return Ok(Self {
                optimizer: moment_bytes(backend, &update, layout.len),
                workspace: backend.workspace_bytes(&[&program, &update]),
                ..alone
            });
        }
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
                optimizer: moment_bytes(backend, &update, kept),
                workspace: backend.workspace_bytes(&[&program, &update]),
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

/// Bytes of both moments of `kept` parameters. In main memory, pages that an update never touches take none:
/// Muon has no second moment.
fn moment_bytes(backend: &dyn Backend, update: &Program, kept: usize) -> usize {
    let muon = update.ops.iter().filter_map(|op| match op {
        Op::MuonStep(step) => Some(step.matrices.iter().map(Span::len).sum::<usize>()),
        _ => None,
    });
    let untouched = if backend.is_host() { muon.sum() } else { 0 };
    4 * (2 * kept - untouched)
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

/// A training run whose memory is planned, all but the sizes of its batch and its windows.
#[derive(Clone, Copy)]
pub struct Workload<'a> {
    /// Where it trains.
    pub backend: &'a dyn Backend,
    /// The model.
    pub config: &'a Config,
    /// What updates it.
    pub optimizer: &'a Optimizer,
    /// Activations that backward computes again.
    pub recompute: Recompute,
    /// The process that is planned.
    pub share: Share,
}

/// Name of the memory's use, for messages.
const TRAINING: &str = "training";
/// Largest micro-batch that is chosen where none is asked for: enough rows for every matmul.
const MAX_AUTO_BATCH: usize = 256;

impl Workload<'_> {
    /// Fails if there is too little memory for a run, before an allocation ends the process: on the device,
    /// and in main memory, where measurements take `measuring` bytes more. The hint names sizes that fit on the
    /// device.
    pub fn check_memory(
        &self,
        batch: usize,
        seq_len: usize,
        measuring: usize,
    ) -> anyhow::Result<()> {
        let there = self.backend.memory().unwrap_or(u64::MAX);
        let needed = self.needed(batch, seq_len, there)?;
        if self.backend.is_host() {
            return check_whole_host_memory(needed + measuring as u128, TRAINING);
        }
        // What a checkpoint holds goes through main memory.
        check_whole_host_memory(12 * self.config.parameter_count(), "a checkpoint of the model")?;
        if needed <= there.into() {
            return Ok(());
        }
        let giga = |bytes: u128| bytes as f64 / 1e9;
        Err(error::device(
            format!(
                "{TRAINING} takes {:.1} GB of memory, the GPU has {:.1}",
                giga(needed),
                giga(there.into())
            ),
            self.advice(batch, seq_len, there),
        ))
    }

    /// Bytes of training, or a lower bound if that is more than `memory` bytes.
    fn needed(&self, batch: usize, seq_len: usize, memory: u64) -> anyhow::Result<u128> {
        // Sizes may be arbitrarily large: the bound cannot overflow.
        let config = self.config;
        let windows = batch.div_ceil(self.share.slices);
        let rows = self.backend.micro_batch(windows, seq_len) as u128 * seq_len as u128;
        let heads = config.num_attention_heads as u128 * config.head_dim as u128;
        let width = heads + config.hidden_size as u128 + 2 * config.intermediate_size as u128;
        let least = 8 * config.parameter_count() + 4 * rows.saturating_mul(width);
        if least > memory.into() {
            return Ok(least);
        }
        let Workload { backend, optimizer, recompute, share, .. } = *self;
        let footprint =
            Footprint::of_rank(backend, config, optimizer, batch, seq_len, recompute, share)?;
        Ok(footprint.peak() as u128)
    }

    fn fits(&self, batch: usize, seq_len: usize, memory: u64) -> bool {
        self.needed(batch, seq_len, memory).is_ok_and(|needed| needed <= memory.into())
    }

    /// Largest batch, in windows, with which training fits into `memory` bytes: a divisor of `windows`, or a
    /// power of two if that is `None`.
    ///
    /// # Errors
    /// If not even one window fits.
    pub fn largest_batch(
        &self,
        seq_len: usize,
        windows: Option<usize>,
        memory: u64,
    ) -> anyhow::Result<usize> {
        let sizes: Vec<usize> = match windows {
            Some(windows) => {
                (1..=windows).rev().filter(|size| windows.is_multiple_of(*size)).collect()
            }
            None => powers_of_two(MAX_AUTO_BATCH).collect(),
        };
        if let Some(batch) = sizes.into_iter().find(|&batch| self.fits(batch, seq_len, memory)) {
            return Ok(batch);
        }
        Err(error::device(
            format!(
                "{TRAINING} takes {:.1} GB of memory with one window at a time, there are {:.1}",
                self.needed(1, seq_len, memory)? as f64 / 1e9,
                memory as f64 / 1e9
            ),
            self.advice(1, seq_len, memory),
        ))
    }

    /// The largest batch and the largest context that fit, each with all else as it is.
    fn advice(&self, batch: usize, seq_len: usize, memory: u64) -> String {
        let smaller = |size: usize| powers_of_two(size.saturating_sub(1));
        let mut ways = Vec::new();
        if let Some(batch) = smaller(batch).find(|&batch| self.fits(batch, seq_len, memory)) {
            ways.push(format!("`batch_size` to {batch}"));
        }
        let recomputed = Self { recompute: Recompute::Block, ..*self };
        if self.recompute == Recompute::None && recomputed.fits(batch, seq_len, memory) {
            ways.push("`recompute` to block".to_string());
        }
        if let Some(context) = smaller(seq_len).find(|&seq_len| self.fits(batch, seq_len, memory)) {
            ways.push(format!("`max_position_embeddings` to {context}"));
        }
        if ways.is_empty() {
            return "make the model smaller; laam plan shows what takes the memory".to_string();
        }
        format!("set {}; laam plan shows what takes the memory", ways.join(", or "))
    }
}

/// Powers of two from the largest that is at most `most` down to 1.
fn powers_of_two(most: usize) -> impl Iterator<Item = usize> {
    let largest = most.checked_ilog2().map(|log| 1 << log);
    std::iter::successors(largest, |size| Some(size / 2)).take_while(|&size| size > 0)
}

/// The largest preset that trains within `memory` bytes on at least `batch` windows of its context at a
/// time.
pub fn largest_preset(
    backend: &dyn Backend,
    optimizer: &Optimizer,
    batch: usize,
    memory: u64,
) -> Option<&'static str> {
    let config = |name: &str| preset(name).expect("a name of the list");
    let fits = |name: &&str| {
        let (config, recompute, share) = (config(name), Recompute::None, Share::WHOLE);
        let workload = Workload { backend, config: &config, optimizer, recompute, share };
        workload.fits(batch, config.max_position_embeddings, memory)
    };
    preset_names().filter(fits).max_by_key(|name| config(name).parameter_count())
}

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
