//! The device-side step queue, which trains without host synchronization between steps: `kernels/step_queue.cu`, `kernels/gather_windows.cu`.
//!
//! Pending runs are records in device memory: hyperparameters, loss scale, window indices. A queued
//! program begins with the kernels that pop the next record and gather its windows from the token file,
//! and ends with one that stores its loss and advances the cursor. Everything that changes from run to
//! run is in device memory, so one graph serves every run, or several consecutive runs.

use super::launch_context::{Control, LaunchContext, LaunchShape, int};
use crate::backend::RunResult;
use crate::device::{Address, Arg, Device};
use crate::dtype::Dtype;
use crate::kernels::geometry::{BLOCK_THREADS, STEP_RESULT_BYTES};
use crate::kernels::{Kernel, families};
use crate::llama::Buffer;
use crate::llama::step::BatchInputs;
use crate::tokens::{TokenFile, WindowTable, Windows};

/// Capacity of the queue, in runs.
pub(super) const MAX_QUEUED_RUNS: usize = 256;
/// Initial loss scale of f16, that of PyTorch's GradScaler.
const INITIAL_LOSS_SCALE: f32 = 65536.0;
/// Bytes per upload of token ids.
const UPLOAD_CHUNK_BYTES: usize = 1 << 24;

/// Buffers of a training program that the queue reads and writes.
#[derive(Clone, Copy, Debug)]
pub(super) struct ProgramIo {
    /// Its batch and losses; none of a program that ends a slice.
    pub batch: Option<(BatchInputs, Buffer)>,
    pub norm: Option<Buffer>,
}

/// Device memory of pending runs and their results.
pub(super) struct DeviceQueue {
    records: Address,
    cursor: Address,
    results: Address,
    /// Loss scale and consecutive good steps; null if losses are not scaled.
    pub scaling: Address,
    /// For each run enqueued since the last drain: it ends a step.
    ends_step: Vec<bool>,
    pub resident: Option<ResidentTokens>,
}

impl DeviceQueue {
    pub fn new(device: &mut dyn Device, dtype: Dtype) -> anyhow::Result<DeviceQueue> {
        let records = device.alloc(MAX_QUEUED_RUNS * Control::BYTES)?;
        let cursor = device.alloc(4)?;
        device.memset(cursor, 0, 4)?;
        let results = device.alloc(MAX_QUEUED_RUNS * STEP_RESULT_BYTES)?;
        let mut scaling = Address::NULL;
        let mut kernels = vec![families::STEP_QUEUE_POP, families::STEP_QUEUE_REPORT];
        if dtype == Dtype::F16 {
            scaling = device.alloc(8)?;
            device.upload(scaling, &scale_bytes(INITIAL_LOSS_SCALE, 0))?;
            kernels.push(families::LOSS_SCALE_UPDATE);
        }
        // Their first launch may be during capture, which cannot load kernels.
        for kernel in kernels {
            device.load(kernel)?;
        }
        Ok(DeviceQueue { records, cursor, results, scaling, ends_step: Vec::new(), resident: None })
    }

    /// Number of runs that can be enqueued before the next drain.
    pub fn capacity(&self) -> usize {
        MAX_QUEUED_RUNS - self.ends_step.len()
    }

    /// Uploads the records of runs, and the window indices of those whose batches the device gathers.
    pub fn enqueue(&mut self, device: &mut dyn Device, runs: &[PendingRun]) -> anyhow::Result<()> {
        let first = self.ends_step.len();
        assert!(runs.len() <= self.capacity(), "the caller drains a full queue first");
        let mut records = Vec::with_capacity(runs.len() * Control::BYTES);
        let mut order: Vec<u32> = Vec::new();
        let begins = self.resident.as_ref().map_or(0, |resident| resident.enqueued);
        for run in runs {
            let begin = (begins + order.len()) as u32;
            records.extend(Control::bytes(run.hyperparams, run.loss_scale, begin));
            order.extend(run.windows.iter().map(|&window| window as u32));
            self.ends_step.push(run.ends_step);
        }
        device.upload(self.records.plus(first * Control::BYTES), &records)?;
        if let Some(resident) = self.resident.as_mut().filter(|_| !order.is_empty()) {
            assert!(
                begins + order.len() <= resident.capacity,
                "no run has more windows than its program"
            );
            device.upload(resident.order.plus(4 * begins), bytemuck::cast_slice(&order))?;
            resident.enqueued += order.len();
        }
        Ok(())
    }

    /// Waits for all pending runs, returns their results and empties the queue.
    pub fn drain(&mut self, device: &mut dyn Device) -> anyhow::Result<Vec<RunResult>> {
        let mut bytes = vec![0; self.ends_step.len() * STEP_RESULT_BYTES];
        if bytes.is_empty() {
            return Ok(Vec::new());
        }
        device.download(self.results, &mut bytes)?;
        device.memset(self.cursor, 0, 4)?;
        let ends_step = std::mem::take(&mut self.ends_step);
        if let Some(resident) = &mut self.resident {
            resident.enqueued = 0;
        }
        let results = bytes.as_chunks::<STEP_RESULT_BYTES>().0.iter().zip(ends_step).map(
            |(bytes, ends_step)| {
                let (loss, norm) = bytes.split_at(8);
                let norm = f32::from_le_bytes([norm[0], norm[1], norm[2], norm[3]]);
                let loss = f64::from_le_bytes(loss.try_into().expect("8 bytes"));
                RunResult { loss, norm: ends_step.then_some(f64::from(norm)) }
            },
        );
        Ok(results.collect())
    }

    /// Loss scale and consecutive good steps, if losses are scaled.
    pub fn scale(&self, device: &dyn Device) -> anyhow::Result<Option<(f32, u32)>> {
        if self.scaling == Address::NULL {
            return Ok(None);
        }
        let mut bytes = [0; 8];
        device.download(self.scaling, &mut bytes)?;
        let [a, b, c, d, e, f, g, h] = bytes;
        Ok(Some((f32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]))))
    }

    /// Restores the [`DeviceQueue::scale`] of a checkpoint.
    pub fn rescale(&mut self, device: &mut dyn Device, scale: (f32, u32)) -> anyhow::Result<()> {
        if self.scaling == Address::NULL {
            return Ok(());
        }
        device.upload(self.scaling, &scale_bytes(scale.0, scale.1))
    }
}

fn scale_bytes(scale: f32, good: u32) -> [u8; 8] {
    let ([a, b, c, d], [e, f, g, h]) = (scale.to_le_bytes(), good.to_le_bytes());
    [a, b, c, d, e, f, g, h]
}

/// A run to be enqueued.
pub(super) struct PendingRun<'a> {
    pub hyperparams: &'a crate::llama::StepHyperparams,
    pub loss_scale: f64,
    /// Window indices; empty if the host uploads the batch.
    pub windows: &'a [usize],
    pub ends_step: bool,
}

/// Kernels before a queued program: pop its record, gather its windows.
pub(super) fn begin(
    ctx: &mut LaunchContext,
    queue: &DeviceQueue,
    io: &ProgramIo,
    gather: bool,
) -> anyhow::Result<()> {
    let control = ctx.control.address();
    let args = [queue.records, queue.cursor, queue.scaling, control].map(Arg::from);
    ctx.launch(families::STEP_QUEUE_POP, LaunchShape::linear(1, 1), &args)?;
    match &queue.resident {
        Some(resident) if gather => match io.batch {
            Some((inputs, _)) => resident.gather(ctx, inputs),
            None => Ok(()),
        },
        _ => Ok(()),
    }
}

/// Kernels after a queued program: report its loss, advance the cursor.
pub(super) fn end(
    ctx: &mut LaunchContext,
    queue: &DeviceQueue,
    io: &ProgramIo,
) -> anyhow::Result<()> {
    let norm = io.norm.map_or(Address::NULL, |norm| ctx.ptr(norm));
    let (nll, rows) = io.batch.map_or((Address::NULL, 0), |(_, nll)| (ctx.ptr(nll), ctx.len(nll)));
    let args = [nll.into(), norm.into(), queue.results.into(), queue.cursor.into(), int(rows)];
    ctx.launch(families::STEP_QUEUE_REPORT, LaunchShape::linear(1, 1024), &args)?;
    if norm == Address::NULL || queue.scaling == Address::NULL {
        return Ok(());
    }
    ctx.launch(
        families::LOSS_SCALE_UPDATE,
        LaunchShape::linear(1, 1),
        &[norm.into(), queue.scaling.into()],
    )
}

/// A token file in device memory.
pub(super) struct ResidentTokens {
    kernel: Kernel,
    /// First arguments of the kernel, up to `order`.
    source: Vec<Arg>,
    /// Window indices of all pending runs.
    order: Address,
    /// Length of `order`.
    capacity: usize,
    /// Indices in `order` so far.
    enqueued: usize,
    context: usize,
    pad: u32,
    pub bytes: usize,
}

impl ResidentTokens {
    /// Uploads a token file, or returns `None` if it takes more than `max_bytes`. A run gathers at most
    /// `windows_per_run` windows.
    pub fn new(
        device: &mut dyn Device,
        windows: &Windows,
        windows_per_run: usize,
        max_bytes: u64,
    ) -> anyhow::Result<Option<ResidentTokens>> {
        let file = windows.file();
        let width = file.header().id_bytes as usize;
        let table = windows.table()?;
        let capacity = MAX_QUEUED_RUNS * windows_per_run;
        let bytes = file.tokens() * width + size(&table) + 4 * capacity;
        if bytes as u64 > max_bytes {
            return Ok(None);
        }
        let tokens = device.alloc(file.tokens() * width)?;
        upload_tokens(device, file, tokens)?;
        let mut put = |bytes: &[u8]| -> anyhow::Result<Arg> {
            let at = device.alloc(bytes.len())?;
            device.upload(at, bytes)?;
            Ok(at.into())
        };
        let mut source = vec![Arg::from(tokens)];
        let [narrow, wide] = match &table {
            WindowTable::Original { starts, lengths } => {
                source.push(put(bytemuck::cast_slice(starts))?);
                source.push(put(bytemuck::cast_slice(lengths))?);
                [families::GATHER_WINDOWS_ORIGINAL_U16, families::GATHER_WINDOWS_ORIGINAL_U32]
            }
            WindowTable::Stream { documents, stride } => {
                source.push((file.tokens() as u64).into());
                source.push(put(bytemuck::cast_slice(documents))?);
                source.extend([int(documents.len()), int(*stride)]);
                [families::GATHER_WINDOWS_STREAM_U16, families::GATHER_WINDOWS_STREAM_U32]
            }
            WindowTable::Addressed { starts, lengths, addresses, address_starts } => {
                source.push(put(bytemuck::cast_slice(starts))?);
                for list in [lengths, addresses, address_starts] {
                    source.push(put(bytemuck::cast_slice(list))?);
                }
                [families::GATHER_WINDOWS_ADDRESSED_U16, families::GATHER_WINDOWS_ADDRESSED_U32]
            }
        };
        let kernel = if width == 2 { narrow } else { wide };
        device.load(kernel)?;
        let order = device.alloc(4 * capacity)?;
        let (context, pad) = (windows.context(), windows.pad());
        Ok(Some(ResidentTokens {
            kernel,
            source,
            order,
            capacity,
            enqueued: 0,
            context,
            pad,
            bytes,
        }))
    }

    /// Gathers the windows of the current run into the inputs of its program.
    fn gather(&self, ctx: &mut LaunchContext, inputs: BatchInputs) -> anyhow::Result<()> {
        let BatchInputs { ids, targets, first_key } = inputs;
        let windows = ctx.len(ids) / self.context;
        let mut args = self.source.clone();
        args.extend([self.order, ctx.control.begin()].map(Arg::from));
        args.extend([ids, targets, first_key].map(|buffer| Arg::from(ctx.ptr(buffer))));
        args.extend([int(windows), int(self.context), self.pad.into()]);
        let grid = [self.context.div_ceil(BLOCK_THREADS), windows.min(65_535), 1];
        ctx.launch(
            self.kernel,
            LaunchShape { grid, block: [BLOCK_THREADS, 1, 1], shared: 0 },
            &args,
        )
    }
}

fn size(table: &WindowTable) -> usize {
    match table {
        WindowTable::Original { starts, lengths } => 8 * starts.len() + 4 * lengths.len(),
        WindowTable::Stream { documents, .. } => 8 * documents.len(),
        WindowTable::Addressed { starts, lengths, addresses, address_starts } => {
            8 * starts.len() + 4 * (lengths.len() + addresses.len() + address_starts.len())
        }
    }
}

/// Uploads the token ids in the file's width, each checked.
fn upload_tokens(device: &mut dyn Device, file: &TokenFile, to: Address) -> anyhow::Result<()> {
    let width = file.header().id_bytes as usize;
    let mut ids = vec![0; UPLOAD_CHUNK_BYTES / 4];
    for from in (0..file.tokens()).step_by(ids.len()) {
        let ids = &mut ids[..(UPLOAD_CHUNK_BYTES / 4).min(file.tokens() - from)];
        file.read(from, ids)?;
        let at = to.plus(from * width);
        if width == 2 {
            let narrow: Vec<u16> = ids.iter().map(|&id| id as u16).collect();
            device.upload(at, bytemuck::cast_slice(&narrow))?;
        } else {
            device.upload(at, bytemuck::cast_slice(ids))?;
        }
    }
    Ok(())
}
