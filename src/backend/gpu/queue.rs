//! Training without the host between steps: `kernels/step_queue.cu`, `kernels/gather_windows.cu`.
//!
//! Runs wait in a list in the device's memory, each with its rates and the numbers of its windows. A
//! program that is run from there begins with the kernels that take the next entry and draw its
//! windows from the token file, and ends with one that notes its loss and passes the turn on. All
//! that changes from run to run is in memory, so one graph serves every run, and several runs in a row
//! are one graph too.

use super::launcher::{Control, Launcher, Shape, int};
use crate::backend::Ran;
use crate::device::{Address, Arg, Device};
use crate::dtype::Dtype;
use crate::llama::Buffer;
use crate::llama::step::BatchInputs;
use crate::tokens::{Places, TokenFile, Windows};

/// Runs that wait at most.
pub(super) const ROOM: usize = 256;
/// Bytes of `Outcome` in `kernels/step_queue.cu`.
const OUTCOME: usize = 16;
/// The scale f16 begins with, as PyTorch's GradScaler does.
const FIRST_SCALE: f32 = 65536.0;
/// Bytes of tokens that go to the device at once.
const PIECE: usize = 1 << 24;

/// Where a training program takes its batch, and what it leaves.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ends {
    pub batch: BatchInputs,
    pub nll: Buffer,
    pub norm: Option<Buffer>,
}

/// The lists of waiting runs and of what they left.
pub(super) struct Queue {
    records: Address,
    cursor: Address,
    outcomes: Address,
    /// Scale and good steps in a row; null where losses are not scaled.
    pub scaling: Address,
    /// Of each run that was asked for since the last outcomes: whether it ends a step.
    ends: Vec<bool>,
    pub held: Option<Held>,
}

impl Queue {
    pub fn new(device: &mut dyn Device, dtype: Dtype) -> anyhow::Result<Queue> {
        let records = device.alloc(ROOM * Control::BYTES)?;
        let cursor = device.alloc(4)?;
        device.memset(cursor, 0, 4)?;
        let outcomes = device.alloc(ROOM * OUTCOME)?;
        let mut scaling = Address::NULL;
        let mut kernels = vec!["step_queue_pop", "step_queue_report"];
        if dtype == Dtype::F16 {
            scaling = device.alloc(8)?;
            device.upload(scaling, &scale_bytes(FIRST_SCALE, 0))?;
            kernels.push("loss_scale_update");
        }
        // They may first be asked for while a graph is recorded.
        for kernel in kernels {
            device.load(kernel)?;
        }
        Ok(Queue { records, cursor, outcomes, scaling, ends: Vec::new(), held: None })
    }

    /// How many more runs it takes.
    pub fn free(&self) -> usize {
        ROOM - self.ends.len()
    }

    /// Puts runs at the end: their rates, loss scales, and windows where these are to be drawn.
    pub fn push(&mut self, device: &mut dyn Device, runs: &[Waiting]) -> anyhow::Result<()> {
        let first = self.ends.len();
        assert!(runs.len() <= self.free(), "the caller asked for the outcomes before");
        let mut records = Vec::with_capacity(runs.len() * Control::BYTES);
        let mut order: Vec<u32> = Vec::new();
        let begins = self.held.as_ref().map_or(0, |held| held.pushed);
        for run in runs {
            let begin = (begins + order.len()) as u32;
            records.extend(Control::bytes(run.rates, run.loss_scale, begin));
            order.extend(run.windows.iter().map(|&window| window as u32));
            self.ends.push(run.ends);
        }
        device.upload(self.records.plus(first * Control::BYTES), &records)?;
        if let Some(held) = self.held.as_mut().filter(|_| !order.is_empty()) {
            assert!(begins + order.len() <= held.numbers, "as many windows as runs have at most");
            device.upload(held.order.plus(4 * begins), bytemuck::cast_slice(&order))?;
            held.pushed += order.len();
        }
        Ok(())
    }

    /// What all that were pushed have left, and an empty list for the next.
    pub fn outcomes(&mut self, device: &mut dyn Device) -> anyhow::Result<Vec<Ran>> {
        let mut bytes = vec![0; self.ends.len() * OUTCOME];
        if bytes.is_empty() {
            return Ok(Vec::new());
        }
        device.download(self.outcomes, &mut bytes)?;
        device.memset(self.cursor, 0, 4)?;
        let ends = std::mem::take(&mut self.ends);
        if let Some(held) = &mut self.held {
            held.pushed = 0;
        }
        let ran = bytes.as_chunks::<OUTCOME>().0.iter().zip(ends).map(|(bytes, ends)| {
            let (loss, norm) = bytes.split_at(8);
            let norm = f32::from_le_bytes([norm[0], norm[1], norm[2], norm[3]]);
            let loss = f64::from_le_bytes(loss.try_into().expect("8 bytes"));
            Ran { loss, norm: ends.then_some(f64::from(norm)) }
        });
        Ok(ran.collect())
    }

    /// Scale of the losses and good steps in a row, where losses are scaled.
    pub fn scale(&self, device: &dyn Device) -> anyhow::Result<Option<(f32, u32)>> {
        if self.scaling == Address::NULL {
            return Ok(None);
        }
        let mut bytes = [0; 8];
        device.download(self.scaling, &mut bytes)?;
        let [a, b, c, d, e, f, g, h] = bytes;
        Ok(Some((f32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]))))
    }

    /// Goes on from what [`Queue::scale`] told.
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

/// A run on its way into the list.
pub(super) struct Waiting<'a> {
    pub rates: &'a crate::llama::StepHyperparams,
    pub loss_scale: f64,
    /// Empty where the host has brought the batch.
    pub windows: &'a [usize],
    pub ends: bool,
}

/// What a program run from the list begins with: its entry, and the windows of it.
pub(super) fn begin(
    l: &mut Launcher,
    queue: &Queue,
    ends: &Ends,
    draw: bool,
) -> anyhow::Result<()> {
    let control = l.control.address();
    let args = [queue.records, queue.cursor, queue.scaling, control].map(Arg::from);
    l.launch("step_queue_pop", Shape::linear(1, 1), &args)?;
    match &queue.held {
        Some(held) if draw => held.draw(l, ends),
        _ => Ok(()),
    }
}

/// What it ends with: its loss, and the next one's turn.
pub(super) fn end(l: &mut Launcher, queue: &Queue, ends: &Ends) -> anyhow::Result<()> {
    let norm = ends.norm.map_or(Address::NULL, |norm| l.at(norm));
    let args = [
        l.at(ends.nll).into(),
        l.at(ends.batch.targets).into(),
        norm.into(),
        queue.outcomes.into(),
        queue.cursor.into(),
        int(l.len(ends.nll)),
    ];
    l.launch("step_queue_report", Shape::linear(1, 1024), &args)?;
    if norm == Address::NULL || queue.scaling == Address::NULL {
        return Ok(());
    }
    l.launch("loss_scale_update", Shape::linear(1, 1), &[norm.into(), queue.scaling.into()])
}

/// The windows of a token file in the device's memory.
pub(super) struct Held {
    kernel: String,
    /// The first arguments of the kernel, up to the order.
    source: Vec<Arg>,
    /// The numbers of the windows of all waiting runs, room for so many, and how many there are.
    order: Address,
    numbers: usize,
    pushed: usize,
    context: usize,
    pad: u32,
    pub bytes: usize,
}

impl Held {
    /// Brings them there, if they take at most `most` bytes. `windows_a_run` is the most a run draws.
    pub fn new(
        device: &mut dyn Device,
        windows: &Windows,
        windows_a_run: usize,
        most: u64,
    ) -> anyhow::Result<Option<Held>> {
        let file = windows.file();
        let width = file.header().id_bytes as usize;
        let places = windows.places()?;
        let numbers = ROOM * windows_a_run;
        let bytes = file.tokens() * width + size(&places) + 4 * numbers;
        if bytes as u64 > most {
            return Ok(None);
        }
        let tokens = device.alloc(file.tokens() * width)?;
        send(device, file, tokens)?;
        let mut put = |bytes: &[u8]| -> anyhow::Result<Arg> {
            let at = device.alloc(bytes.len())?;
            device.upload(at, bytes)?;
            Ok(at.into())
        };
        let mut source = vec![Arg::from(tokens)];
        let kind = match &places {
            Places::Original { starts, lengths } => {
                source.push(put(bytemuck::cast_slice(starts))?);
                source.push(put(bytemuck::cast_slice(lengths))?);
                "original"
            }
            Places::Stream { documents, stride } => {
                source.push((file.tokens() as u64).into());
                source.push(put(bytemuck::cast_slice(documents))?);
                source.extend([int(documents.len()), int(*stride)]);
                "stream"
            }
            Places::Addressed { starts, lengths, addresses, address_starts } => {
                source.push(put(bytemuck::cast_slice(starts))?);
                for list in [lengths, addresses, address_starts] {
                    source.push(put(bytemuck::cast_slice(list))?);
                }
                "addressed"
            }
        };
        let kernel = format!("gather_windows_{kind}_u{}", 8 * width);
        device.load(&kernel)?;
        let order = device.alloc(4 * numbers)?;
        let (context, pad) = (windows.context(), windows.pad());
        Ok(Some(Held { kernel, source, order, numbers, pushed: 0, context, pad, bytes }))
    }

    /// The windows of the run whose turn it is, into the inputs of its program.
    fn draw(&self, l: &mut Launcher, ends: &Ends) -> anyhow::Result<()> {
        let BatchInputs { ids, targets, first_key } = ends.batch;
        let windows = l.len(ids) / self.context;
        let mut args = self.source.clone();
        args.extend([self.order, l.control.begin()].map(Arg::from));
        args.extend([ids, targets, first_key].map(|buffer| Arg::from(l.at(buffer))));
        args.extend([int(windows), int(self.context), self.pad.into()]);
        let grid = [self.context.div_ceil(256), windows.min(65_535), 1];
        l.launch(&self.kernel, Shape { grid, block: [256, 1, 1], shared: 0 }, &args)
    }
}

fn size(places: &Places) -> usize {
    match places {
        Places::Original { starts, lengths } => 8 * starts.len() + 4 * lengths.len(),
        Places::Stream { documents, .. } => 8 * documents.len(),
        Places::Addressed { starts, lengths, addresses, address_starts } => {
            8 * starts.len() + 4 * (lengths.len() + addresses.len() + address_starts.len())
        }
    }
}

/// The ids as they are in the file, each checked on its way.
fn send(device: &mut dyn Device, file: &TokenFile, to: Address) -> anyhow::Result<()> {
    let width = file.header().id_bytes as usize;
    let mut ids = vec![0; PIECE / 4];
    for from in (0..file.tokens()).step_by(ids.len()) {
        let ids = &mut ids[..(PIECE / 4).min(file.tokens() - from)];
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
