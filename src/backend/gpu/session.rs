//! A model in a device's memory: arenas, one block for the buffers of programs, scratch, and the
//! programs themselves, each recorded as a graph once it has run.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::super::host::check_feed;
use super::super::{Arena, Data, Feed, Loaded, Need, Queue, Ran, Run, Session};
use super::launcher::{Arenas, Control, Launcher};
use super::queue::{self, Ends, Held, Waiting};
use super::{
    Mode, Options, attention, embedding, lm_head, matmul, muon, norm, rope, swiglu, update,
};
use crate::device::{Address, Device, Graph};
use crate::dtype::Dtype;
use crate::error;
use crate::llama::step::MicroBatch;
use crate::llama::{Buffer, BytePlan, Op, Program};
use crate::model::Layout;
use crate::tokens::Windows;

pub(super) struct Model {
    device: Box<dyn Device>,
    options: Options,
    arenas: Arenas,
    cache: usize,
    control: Control,
    block: Region,
    scratch: Region,
    programs: Vec<Ready>,
    queue: Option<queue::Queue>,
    tables: HashMap<Table, Address>,
    /// The program whose buffers lie in the block.
    arranged: Option<usize>,
    seconds: BTreeMap<&'static str, f64>,
}

/// A piece of the device's memory that may have to grow.
#[derive(Clone, Copy)]
struct Region {
    at: Address,
    bytes: usize,
}

/// A program that can run.
struct Ready {
    program: Program,
    plan: BytePlan,
    /// What operations look up, by their place in the program.
    tables: HashMap<usize, Address>,
    /// Of a program for the queue.
    ends: Option<Ends>,
    /// Whether it ran since the last change of addresses: kernels are loaded and products planned
    /// then, so that it can be recorded.
    ran: bool,
    graphs: HashMap<Way, Graph>,
}

/// What beside the arenas the next step depends on.
#[derive(PartialEq, Default, Serialize, Deserialize)]
struct State {
    /// Of f16: the scale, and the good steps since it last changed.
    loss_scale: Option<(f32, u32)>,
    /// Of the device.
    choices: Value,
}

/// How a program is run.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Way {
    /// By itself, its inputs brought by the host.
    Fed,
    /// From the queue: so many runs in a row, with or without drawing their windows.
    Queued { draw: bool, times: usize },
}

/// As many runs as one graph has where there are enough of them: what a launch costs the host
/// matters where a run takes tenths of a millisecond.
const ROW: usize = 8;

/// Bytes of scratch that the hungriest operation of a program takes.
pub(super) fn workspace(program: &Program, arena: usize, options: Options) -> usize {
    program.ops.iter().map(|op| scratch(op, program, arena, options)).max().unwrap_or(0)
}

fn scratch(op: &Op, program: &Program, arena: usize, options: Options) -> usize {
    match op {
        Op::EmbeddingBackward(o) => embedding::workspace(o, program.info(o.ids).len),
        Op::RmsNormBackward(o) => norm::workspace(o, program.info(o.rstd).len, options.dtype),
        Op::AttentionBackward(o) => attention::workspace(o),
        Op::FusedLinearCrossEntropy(o) => lm_head::workspace(o, options),
        Op::GradNorm(_) => update::norm_workspace(arena),
        Op::AdamWStep(_) => update::adamw_workspace(),
        Op::MuonStep(o) => muon::workspace(o),
        _ => 0,
    }
}

/// Asks for the kernels of one operation.
fn enqueue(l: &mut Launcher, op: &Op) -> anyhow::Result<()> {
    match op {
        Op::Embedding(o) => embedding::forward(l, o),
        Op::EmbeddingBackward(o) => embedding::backward(l, o),
        Op::RmsNorm(o) => norm::forward(l, o),
        Op::RmsNormBackward(o) => norm::backward(l, o),
        Op::Linear(o) => matmul::linear(l, o),
        Op::LinearBackwardInput(o) => matmul::backward_input(l, o),
        Op::LinearBackwardWeight(o) => matmul::backward_weight(l, o),
        Op::Rope(o) => rope::forward(l, o),
        Op::RopeBackward(o) => rope::backward(l, o),
        Op::Attention(o) => attention::forward(l, o),
        Op::AttentionBackward(o) => attention::backward(l, o),
        Op::AttentionDecode(o) => attention::cached(l, o),
        Op::SwiGlu(o) => swiglu::forward(l, o),
        Op::SwiGluBackward(o) => swiglu::backward(l, o),
        Op::FusedLinearCrossEntropy(o) => lm_head::loss(l, o),
        Op::GatherRows(o) => embedding::gather_rows(l, o),
        Op::ZeroGrad(_) => update::zero_grad(l),
        Op::GradNorm(o) => update::grad_norm(l, o),
        Op::AdamWStep(o) => update::adamw(l, o),
        Op::MuonStep(o) => muon::step(l, o),
    }
}

impl Model {
    pub fn new(
        mut device: Box<dyn Device>,
        options: Options,
        layout: &Layout,
        need: Need,
    ) -> anyhow::Result<Self> {
        let dtype = options.dtype;
        let mut zeros = |elements: usize, size: usize| -> anyhow::Result<Address> {
            if elements == 0 {
                return Ok(Address::NULL);
            }
            let at = device.alloc(elements * size)?;
            device.memset(at, 0, elements * size)?;
            Ok(at)
        };
        let len = layout.len;
        let trained = if need.training { len } else { 0 };
        let parameters = zeros(len, 4)?;
        let weights = if dtype == Dtype::F32 { parameters } else { zeros(len, dtype.size())? };
        let arenas = Arenas {
            len,
            parameters,
            weights,
            gradients: zeros(trained, 4)?,
            first_moment: zeros(trained, 4)?,
            second_moment: zeros(trained, 4)?,
            cache: zeros(need.cache, dtype.size())?,
        };
        let control = Control::new(zeros(Control::BYTES, 1)?);
        let nothing = Region { at: Address::NULL, bytes: 0 };
        Ok(Self {
            device,
            options,
            arenas,
            cache: need.cache,
            control,
            block: nothing,
            scratch: nothing,
            programs: Vec::new(),
            queue: None,
            tables: HashMap::new(),
            arranged: None,
            seconds: BTreeMap::new(),
        })
    }

    /// Makes a region long enough. What was recorded with its old place is forgotten.
    fn grow(&mut self, which: fn(&mut Self) -> &mut Region, bytes: usize) -> anyhow::Result<()> {
        let region = *which(self);
        if region.bytes >= bytes {
            return Ok(());
        }
        if region.bytes > 0 {
            self.device.free(region.at)?;
        }
        *which(self) = Region { at: Address::NULL, bytes: 0 };
        let at = self.device.alloc(bytes)?;
        *which(self) = Region { at, bytes };
        for ready in &mut self.programs {
            ready.ran = false;
            ready.graphs.clear();
        }
        self.arranged = None;
        Ok(())
    }

    fn place(&self, Loaded(program): Loaded, buffer: Buffer) -> Address {
        assert_eq!(self.arranged, Some(program), "outputs are those of the program that ran last");
        self.block.at.plus(self.programs[program].plan.offsets[buffer.0])
    }

    fn dtype_of(&self, Loaded(program): Loaded, buffer: Buffer) -> Dtype {
        let element = self.programs[program].program.info(buffer).kind;
        if element.size(2) == 2 { self.options.dtype } else { Dtype::F32 }
    }

    fn download(&self, from: Address, bytes: usize) -> anyhow::Result<Vec<u8>> {
        let mut into = vec![0; bytes];
        self.device.download(from, &mut into)?;
        Ok(into)
    }

    /// Asks for every kernel of one run of a program, timing each operation if `timed`.
    fn enqueue(&mut self, program: usize, way: Way, timed: bool) -> anyhow::Result<()> {
        let ready = &self.programs[program];
        let queued = match (way, &self.queue, &ready.ends) {
            (Way::Queued { draw, .. }, Some(queue), Some(ends)) => Some((queue, ends, draw)),
            _ => None,
        };
        let mut pieces: Vec<Piece> = ready.program.ops.iter().enumerate().map(Piece::Op).collect();
        if let Some((queue, ends, draw)) = queued {
            pieces.insert(0, Piece::Begin(queue, ends, draw));
            pieces.push(Piece::End(queue, ends));
        }
        let mut events = Vec::new();
        for piece in &pieces {
            if timed {
                events.push(self.device.record_event()?);
            }
            let mut launcher = Launcher {
                device: &mut *self.device,
                dtype: self.options.dtype,
                options: self.options,
                arenas: self.arenas,
                control: self.control,
                scaling: queued.map_or(Address::NULL, |(queue, ..)| queue.scaling),
                program: &ready.program,
                plan: &ready.plan,
                block: self.block.at,
                tables: &ready.tables,
                op: if let Piece::Op((at, _)) = piece { *at } else { 0 },
                scratch: self.scratch.at,
                scratch_bytes: self.scratch.bytes,
                scratch_used: 0,
            };
            match piece {
                Piece::Begin(queue, ends, draw) => queue::begin(&mut launcher, queue, ends, *draw)?,
                Piece::Op((_, op)) => enqueue(&mut launcher, op)?,
                Piece::End(queue, ends) => queue::end(&mut launcher, queue, ends)?,
            }
        }
        if timed {
            events.push(self.device.record_event()?);
            for (piece, pair) in pieces.iter().zip(events.windows(2)) {
                let seconds = self.device.elapsed(pair[0], pair[1])?;
                *self.seconds.entry(piece.name()).or_default() += seconds;
            }
            self.device.clear_events();
        }
        Ok(())
    }

    /// Brings the inputs of a run to the device.
    fn feed(&mut self, loaded: Loaded, feed: &Feed) -> anyhow::Result<()> {
        let Loaded(program) = loaded;
        check_feed(&self.programs[program].program, feed)?;
        self.feed_indices(loaded, &feed.indices)?;
        for (buffer, values) in &feed.floats {
            let bytes = self.dtype_of(loaded, *buffer).encode(values);
            self.device.upload(self.place(loaded, *buffer), &bytes)?;
        }
        let control = Control::bytes(&feed.rates, feed.loss_scale, 0);
        self.device.upload(self.control.address(), &control)
    }

    fn feed_indices(&mut self, loaded: Loaded, indices: &[(Buffer, &[u32])]) -> anyhow::Result<()> {
        self.arranged = Some(loaded.0);
        for (buffer, values) in indices {
            self.device.upload(self.place(loaded, *buffer), bytemuck::cast_slice(values))?;
        }
        Ok(())
    }

    /// Carries a program out on the inputs that are there.
    fn execute(&mut self, Loaded(program): Loaded, way: Way) -> anyhow::Result<()> {
        self.arranged = Some(program);
        let times = if let Way::Queued { times, .. } = way { times } else { 1 };
        if self.options.mode == Mode::Profile {
            return (0..times).try_for_each(|_| self.enqueue(program, way, true));
        }
        let ready = &self.programs[program];
        if let Some(&graph) = ready.graphs.get(&way) {
            return self.device.launch_graph(graph);
        }
        // The first time one by one: loading a kernel or planning a product cannot be recorded.
        if !(self.options.mode == Mode::Graphs && ready.ran) {
            (0..times).try_for_each(|_| self.enqueue(program, way, false))?;
            self.programs[program].ran = true;
            return Ok(());
        }
        self.device.begin_capture()?;
        let asked = (0..times).try_for_each(|_| self.enqueue(program, way, false));
        // Also after an error: the stream must not be left recording.
        let graph = self.device.end_capture();
        asked?;
        let graph = graph?;
        self.programs[program].graphs.insert(way, graph);
        self.device.launch_graph(graph)
    }

    fn arena(&self, arena: Arena) -> (Address, usize, Dtype) {
        let Arenas { len, parameters, gradients, first_moment, second_moment, cache, .. } =
            self.arenas;
        let trained = if gradients == Address::NULL { 0 } else { len };
        match arena {
            Arena::Parameters => (parameters, len, Dtype::F32),
            Arena::Gradients => (gradients, trained, Dtype::F32),
            Arena::FirstMoment => (first_moment, trained, Dtype::F32),
            Arena::SecondMoment => (second_moment, trained, Dtype::F32),
            Arena::Cache => (cache, self.cache, self.options.dtype),
        }
    }
}

/// A part of what one run asks for.
enum Piece<'a> {
    Begin(&'a queue::Queue, &'a Ends, bool),
    /// And its place in the program.
    Op((usize, &'a Op)),
    End(&'a queue::Queue, &'a Ends),
}

impl Piece<'_> {
    fn name(&self) -> &'static str {
        match self {
            Piece::Begin(..) => "draw",
            Piece::Op((_, op)) => op.name(),
            Piece::End(..) => "report",
        }
    }
}

/// What an operation looks up: told apart by what it depends on, made once for all that share it.
#[derive(PartialEq, Eq, Hash)]
enum Table {
    /// Positions, and the bits of each frequency.
    Rope(usize, Vec<u64>),
    /// Places in the arenas, as the kernel of an update reads them.
    Places(Vec<u8>),
}

impl Model {
    /// The table of an operation that has one, in the device's memory.
    fn table(&mut self, op: &Op) -> anyhow::Result<Option<Address>> {
        let bits = |frequencies: &[f64]| frequencies.iter().map(|f| f.to_bits()).collect();
        let key = match op {
            Op::Rope(o) => Table::Rope(o.positions, bits(&o.frequencies)),
            Op::RopeBackward(o) => Table::Rope(o.shape.seq_len, bits(&o.frequencies)),
            Op::AdamWStep(o) => Table::Places(update::table(o)),
            Op::MuonStep(o) => Table::Places(muon::table(o)),
            _ => return Ok(None),
        };
        if let Some(address) = self.tables.get(&key) {
            return Ok(Some(*address));
        }
        let made;
        let bytes = match &key {
            Table::Rope(positions, bits) => {
                let frequencies: Vec<f64> = bits.iter().map(|&bits| f64::from_bits(bits)).collect();
                made = rope::table(*positions, &frequencies);
                &made
            }
            Table::Places(bytes) => bytes,
        };
        let address = self.device.alloc(bytes.len())?;
        self.device.upload(address, bytes)?;
        self.tables.insert(key, address);
        Ok(Some(address))
    }
}

/// The kernels count rows and columns in 32 bits, with a sign.
fn check_sizes(program: &Program, arenas: Arenas) -> anyhow::Result<()> {
    let most = i32::MAX as usize;
    let rows = program.buffers.iter().filter(|info| info.kind.size(2) == 4);
    let rows = rows.map(|info| info.len).max().unwrap_or(0);
    if rows > most || arenas.len / Layout::ALIGN > most {
        return Err(error::config(
            format!("micro-batch too large: {rows} rows exceed the kernels' 32-bit index"),
            "decrease `batch_size`, or increase `gradient_accumulation_steps`",
        ));
    }
    for op in &program.ops {
        let (what, size, most) = match op {
            Op::Attention(o) => ("`head_dim`", o.shape.head_dim, attention::MOST_HEAD_DIM),
            Op::AttentionDecode(o) => ("`head_dim`", o.shape.head_dim, attention::MOST_HEAD_DIM),
            Op::EmbeddingBackward(o) => ("`vocab_size`", o.table.rows, embedding::MOST_VOCAB),
            _ => continue,
        };
        if size > most {
            return Err(error::config(
                format!("invalid {what} {size}: the kernels support at most {most}"),
                "set `backend` to cpu for this model",
            ));
        }
    }
    Ok(())
}

impl Session for Model {
    fn load(&mut self, program: Program) -> anyhow::Result<Loaded> {
        check_sizes(&program, self.arenas)?;
        let plan = program.byte_plan(self.options.dtype.size());
        self.grow(|model| &mut model.block, plan.bytes)?;
        let bytes = workspace(&program, self.arenas.len, self.options);
        self.grow(|model| &mut model.scratch, bytes)?;
        let mut tables = HashMap::new();
        for (at, op) in program.ops.iter().enumerate() {
            if let Some(table) = self.table(op)? {
                tables.insert(at, table);
            }
        }
        let graphs = HashMap::new();
        self.programs.push(Ready { program, plan, tables, ends: None, ran: false, graphs });
        Ok(Loaded(self.programs.len() - 1))
    }

    fn run(&mut self, loaded: Loaded, feed: &Feed) -> anyhow::Result<()> {
        self.feed(loaded, feed)?;
        self.execute(loaded, Way::Fed)
    }

    fn time(&mut self, loaded: Loaded, feed: &Feed) -> anyhow::Result<f64> {
        self.feed(loaded, feed)?;
        let start = self.device.record_event()?;
        self.execute(loaded, Way::Fed)?;
        let end = self.device.record_event()?;
        let seconds = self.device.elapsed(start, end)?;
        self.device.clear_events();
        Ok(seconds)
    }

    fn floats(&self, program: Loaded, buffer: Buffer) -> anyhow::Result<Vec<f32>> {
        let dtype = self.dtype_of(program, buffer);
        let len = self.programs[program.0].program.info(buffer).len;
        Ok(dtype.decode(&self.download(self.place(program, buffer), len * dtype.size())?))
    }

    fn indices(&self, program: Loaded, buffer: Buffer) -> anyhow::Result<Vec<u32>> {
        let len = self.programs[program.0].program.info(buffer).len;
        let bytes = self.download(self.place(program, buffer), 4 * len)?;
        Ok(bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
    }

    fn read(&self, arena: Arena) -> anyhow::Result<Vec<f32>> {
        let (at, len, dtype) = self.arena(arena);
        if len == 0 {
            return Ok(Vec::new());
        }
        Ok(dtype.decode(&self.download(at, len * dtype.size())?))
    }

    fn poison(&mut self) -> anyhow::Result<()> {
        for Region { at, bytes } in [self.block, self.scratch] {
            if bytes > 0 {
                self.device.memset(at, 0xFF, bytes)?;
            }
        }
        Ok(())
    }

    fn write(&mut self, arena: Arena, values: &[f32]) -> anyhow::Result<()> {
        let (at, len, dtype) = self.arena(arena);
        if values.len() != len {
            return Err(error::checkpoint(
                format!("{} values for the {arena:?} arena of {len}", values.len()),
                "use weights or a training state of a model of the same shape",
            ));
        }
        if len == 0 {
            return Ok(());
        }
        self.device.upload(at, &dtype.encode(values))?;
        if arena == Arena::Parameters && self.arenas.weights != self.arenas.parameters {
            let bytes = self.options.dtype.encode(values);
            self.device.upload(self.arenas.weights, &bytes)?;
        }
        Ok(())
    }

    fn profile(&self) -> Vec<(&'static str, f64)> {
        self.seconds.iter().map(|(&name, &seconds)| (name, seconds)).collect()
    }

    fn bytes(&self) -> usize {
        let Arenas { len, weights, parameters, gradients, .. } = self.arenas;
        let element = self.options.dtype.size();
        let copies = if weights == parameters { 0 } else { element * len };
        let trained = if gradients == Address::NULL { 0 } else { 3 * 4 * len };
        let held = self.queue.as_ref().and_then(|queue| queue.held.as_ref());
        let tokens = held.map_or(0, |held| held.bytes);
        let regions = self.block.bytes + self.scratch.bytes;
        4 * len + copies + trained + self.cache * element + tokens + regions
    }

    fn queue(&mut self) -> Option<&mut dyn Queue> {
        Some(self)
    }

    fn state(&self) -> anyhow::Result<Value> {
        let scale = self.queue.as_ref().map(|queue| queue.scale(&*self.device)).transpose()?;
        let state = State { loss_scale: scale.flatten(), choices: self.device.matmul_plans() };
        Ok(if state == State::default() { Value::Null } else { serde_json::to_value(state)? })
    }

    fn restore(&mut self, state: &Value) -> anyhow::Result<Option<String>> {
        if state.is_null() {
            return Ok(None);
        }
        let State { loss_scale, choices } = serde_json::from_value(state.clone())?;
        if let Some(scale) = loss_scale {
            anyhow::ensure!(scale.0.is_normal() && scale.0 > 0.0, "invalid loss scale {}", scale.0);
            self.ready_queue()?;
            let queue = self.queue.as_mut().expect("it is ready");
            queue.rescale(&mut *self.device, scale)?;
        }
        Ok(if choices.is_null() { None } else { self.device.pin_matmul_plans(&choices) })
    }
}

impl Queue for Model {
    fn room(&self) -> usize {
        self.queue.as_ref().map_or(queue::ROOM, queue::Queue::free)
    }

    fn hold(&mut self, windows: &Windows) -> anyhow::Result<bool> {
        let queued = self.programs.iter().filter_map(|ready| {
            ready.ends.map(|ends| ready.program.info(ends.batch.ids).len / windows.context())
        });
        let windows_a_run = queued.max().unwrap_or(1);
        let (free, _) = self.device.memory()?;
        let most = self.options.most_tokens.unwrap_or(free / 2);
        self.ready_queue()?.held = None;
        let held = Held::new(&mut *self.device, windows, windows_a_run, most)?;
        let fits = held.is_some();
        self.ready_queue()?.held = held;
        for ready in &mut self.programs {
            ready.graphs.clear();
        }
        Ok(fits)
    }

    fn load(&mut self, micro: MicroBatch, norm: Option<Buffer>) -> anyhow::Result<Loaded> {
        self.ready_queue()?;
        let ends = Ends { batch: micro.inputs, nll: micro.losses.nll, norm };
        let loaded = Session::load(self, micro.program)?;
        self.programs[loaded.0].ends = Some(ends);
        Ok(loaded)
    }

    fn push(&mut self, runs: &[Run]) -> anyhow::Result<()> {
        let waiting: Vec<_> = runs
            .iter()
            .map(|run| Waiting {
                rates: &run.rates,
                loss_scale: run.loss_scale,
                windows: if let Data::Windows(windows) = run.data { windows } else { &[] },
                ends: self.programs[run.program.0].ends.is_some_and(|ends| ends.norm.is_some()),
            })
            .collect();
        let queue = self.queue.as_mut().expect("the programs were loaded for it");
        let drawn = waiting.iter().any(|run| !run.windows.is_empty());
        if drawn && queue.held.is_none() {
            return Err(error::internal("a step draws windows, but none are on the device"));
        }
        queue.push(&mut *self.device, &waiting)?;
        let mut at = 0;
        while let Some(run) = runs.get(at) {
            let program = run.program;
            let times = match &run.data {
                Data::Batch(batch) => {
                    let ends = self.programs[program.0].ends.expect("it was loaded for the queue");
                    self.feed_indices(program, &ends.batch.bind(batch.arrays()))?;
                    1
                }
                Data::Windows(_) => {
                    let same =
                        |run: &&Run| run.program == program && matches!(run.data, Data::Windows(_));
                    let row = runs[at..].iter().take_while(same).count();
                    if row >= ROW { ROW } else { 1 }
                }
            };
            let draw = matches!(run.data, Data::Windows(_));
            self.execute(program, Way::Queued { draw, times })?;
            at += times;
        }
        Ok(())
    }

    fn outcomes(&mut self) -> anyhow::Result<Vec<Ran>> {
        match &mut self.queue {
            Some(queue) => queue.outcomes(&mut *self.device),
            None => Ok(Vec::new()),
        }
    }
}

impl Model {
    /// The queue, made when it is first needed.
    fn ready_queue(&mut self) -> anyhow::Result<&mut queue::Queue> {
        if self.queue.is_none() {
            self.queue = Some(queue::Queue::new(&mut *self.device, self.options.dtype)?);
        }
        Ok(self.queue.as_mut().expect("it was made above"))
    }
}
