//! A GPU session: arenas, one block for the buffers of programs, scratch memory, and the programs, each
//! captured as a graph after its first run.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::super::host::check_inputs;
use super::super::{
    Arena, BatchSource, Inputs, ProgramId, RunResult, Session, SessionSpec, StepQueue, StepRun,
};
use super::launch_context::{Arenas, Control, LaunchContext};
use super::queue::{self, PendingRun, ProgramIo, ResidentTokens};
use super::{
    Mode, Options, attention, embedding, exchange, lm_head, matmul, muon, norm, rope, swiglu,
    update,
};
use crate::collective::Group;
use crate::device::{Address, Branch, Device, Event, Graph};
use crate::dtype::Dtype;
use crate::error;
use crate::kernels::geometry::MAX_HEAD_DIM;
use crate::llama::ops::GradNorm;
use crate::llama::step::MicroBatch;
use crate::llama::{Branches, Buffer, BufferInfo, BytePlan, Op, Program};
use crate::model::Layout;
use crate::tokens::Windows;

/// A model in a device's memory, and its programs.
pub(super) struct GpuSession {
    device: Box<dyn Device>,
    options: Options,
    arenas: Arenas,
    group: Group,
    /// The range that moments are kept for.
    moments: Range<usize>,
    /// Gradients of slices.
    slots: Vec<Address>,
    cache_len: usize,
    control: Control,
    block: DeviceBuffer,
    scratch: DeviceBuffer,
    programs: Vec<CompiledProgram>,
    queue: Option<queue::DeviceQueue>,
    tables: HashMap<ConstantTable, Address>,
    /// The program whose outputs are in the block.
    current: Option<usize>,
    seconds: BTreeMap<&'static str, f64>,
    /// Events around a run without exchanges, of several ranks, since the last drain.
    timed: Option<[Event; 2]>,
    /// Seconds of all runs that were timed.
    timed_seconds: Option<f64>,
}

/// An allocation that can grow.
#[derive(Clone, Copy)]
struct DeviceBuffer {
    at: Address,
    bytes: usize,
}

/// A loaded program.
struct CompiledProgram {
    program: Program,
    /// Address of each buffer.
    place: Placement,
    /// The ops that run beside the path in a graph.
    branches: Branches,
    /// Constant tables, by op index.
    tables: HashMap<usize, Address>,
    /// Buffers that the step queue reads and writes; `None` for a program outside the queue.
    io: Option<ProgramIo>,
    /// It ran since the last change of addresses: kernels are loaded and matmuls planned, so that it
    /// can be captured.
    warm: bool,
    graphs: HashMap<RunMode, Graph>,
}

/// Placement of the buffers of a program.
enum Placement {
    /// In the block that all programs share.
    Block(BytePlan),
    /// Each in an allocation of its own, with [`Options::guard`].
    Guarded(Vec<GuardedBuffer>),
}

/// A buffer in an allocation of its own.
#[derive(Clone, Copy)]
struct GuardedBuffer {
    at: Address,
    bytes: usize,
    /// The last op that uses it; the number of ops for an output.
    last: usize,
}

/// State besides the arenas that the next step depends on.
#[derive(PartialEq, Default, Serialize, Deserialize)]
struct GpuState {
    /// Dynamic loss scale of f16, and the good steps since it last changed.
    loss_scale: Option<(f32, u32)>,
    /// The device's matmul algorithms.
    #[serde(alias = "choices")]
    matmul_plans: Value,
}

/// The way a program runs, which decides its graph.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum RunMode {
    /// One run with inputs from the host.
    Direct,
    /// `runs` runs from the step queue; `gather` if the device gathers their batches.
    Queued { gather: bool, runs: usize },
}

/// The way the ops of a run are launched.
#[derive(Clone, Copy, PartialEq, Eq)]
enum LaunchMode {
    InOrder,
    /// In order, each between two events.
    Timed,
    /// Into a graph, on branches.
    Captured,
}

/// Byte of poisoned memory: NaN in every dtype, the largest u32.
const POISON: u8 = 0xFF;

/// Runs per graph, if as many are enqueued: the host's cost per graph launch matters if a run takes
/// tenths of a millisecond.
const STEPS_PER_GRAPH: usize = 8;

/// Bytes of scratch memory of a program: those of its largest op.
pub(super) fn workspace(program: &Program, arena: usize, options: Options) -> usize {
    program.ops.iter().map(|op| scratch(op, program, arena, options)).max().unwrap_or(0)
}

fn scratch(op: &Op, program: &Program, arena: usize, options: Options) -> usize {
    match op {
        Op::EmbeddingBackward(o) => embedding::workspace(o, program.info(o.ids).len),
        Op::AttentionBackward(o) => attention::workspace(o),
        Op::FusedLinearCrossEntropy(o) => lm_head::workspace(o, options),
        Op::GradNorm(GradNorm { runs: Some(runs), .. }) => exchange::norm_workspace(runs),
        Op::GradNorm(_) => update::norm_workspace(arena),
        Op::AdamWStep(_) => update::adamw_workspace(),
        Op::MuonStep(o) => muon::workspace(o, options.dtype),
        Op::ReduceGradients(o) => exchange::reduce_workspace(o),
        Op::GatherShards(o) => exchange::gather_workspace(o),
        _ => 0,
    }
}

/// Launches the kernels of one op.
fn launch_op(ctx: &mut LaunchContext, op: &Op) -> anyhow::Result<()> {
    match op {
        Op::Embedding(o) => embedding::forward(ctx, o),
        Op::EmbeddingBackward(o) => embedding::backward(ctx, o),
        Op::RmsNorm(o) => norm::forward(ctx, o),
        Op::RmsNormBackward(o) => norm::backward(ctx, o),
        Op::RmsNormBackwardWeight(o) => norm::backward_weight(ctx, o),
        Op::Linear(o) => matmul::linear(ctx, o),
        Op::LinearBackwardInput(o) => matmul::backward_input(ctx, o),
        Op::LinearBackwardWeight(o) => matmul::backward_weight(ctx, o),
        Op::Rope(o) => rope::forward(ctx, o),
        Op::RopeBackward(o) => rope::backward(ctx, o),
        Op::Attention(o) => attention::forward(ctx, o),
        Op::AttentionBackward(o) => attention::backward(ctx, o),
        Op::AttentionDecode(o) => attention::decode(ctx, o),
        Op::SwiGlu(o) => swiglu::forward(ctx, o),
        Op::SwiGluBackward(o) => swiglu::backward(ctx, o),
        Op::FusedLinearCrossEntropy(o) => lm_head::loss(ctx, o),
        Op::GatherRows(o) => embedding::gather_rows(ctx, o),
        Op::ZeroGrad(_) => update::zero_grad(ctx),
        Op::GradNorm(o) => match &o.runs {
            Some(runs) => exchange::norm(ctx, o, runs),
            None => update::grad_norm(ctx, o),
        },
        Op::AdamWStep(o) => update::adamw(ctx, o),
        Op::MuonStep(o) => muon::step(ctx, o),
        Op::SaveGradients(o) => exchange::save(ctx, o),
        Op::AddGradients(o) => exchange::add(ctx, o),
        Op::ReduceGradients(o) => exchange::reduce(ctx, o),
        Op::GatherShards(o) => exchange::gather(ctx, o),
    }
}

/// Launches an op of a program that is captured, beside the path or on it, and what the next op waits for. `ends`
/// are the branches so far, by op.
fn launch_branched(
    ctx: &mut LaunchContext,
    op: &Op,
    branches: &Branches,
    ends: &mut HashMap<usize, Branch>,
) -> anyhow::Result<()> {
    if branches.is_beside(ctx.op) {
        ctx.device.begin_branch()?;
        launch_op(ctx, op)?;
        ends.insert(ctx.op, ctx.device.end_branch()?);
    } else {
        launch_op(ctx, op)?;
    }
    match branches.waits_for(ctx.op + 1) {
        Some(beside) => ctx.device.wait_for(ends[&beside]),
        None => Ok(()),
    }
}

impl GpuSession {
    pub fn new(
        mut device: Box<dyn Device>,
        options: Options,
        layout: &Layout,
        spec: SessionSpec,
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
        let trained = if spec.training { len } else { 0 };
        let parameters = zeros(len, 4)?;
        let weights = if dtype == Dtype::F32 { parameters } else { zeros(len, dtype.size())? };
        let moments = spec.moment_range(len);
        let mut moment =
            || -> anyhow::Result<Address> { Ok(zeros(moments.len(), 4)?.minus(4 * moments.start)) };
        let (first_moment, second_moment) = (moment()?, moment()?);
        let arenas = Arenas {
            len,
            parameters,
            weights,
            gradients: zeros(trained, 4)?,
            first_moment,
            second_moment,
            cache: zeros(spec.cache_len, dtype.size())?,
        };
        let control = Control::new(zeros(Control::BYTES, 1)?);
        let empty = DeviceBuffer { at: Address::NULL, bytes: 0 };
        Ok(Self {
            device,
            options,
            arenas,
            group: Group::alone(),
            moments,
            slots: Vec::new(),
            cache_len: spec.cache_len,
            control,
            block: empty,
            scratch: empty,
            programs: Vec::new(),
            queue: None,
            tables: HashMap::new(),
            current: None,
            seconds: BTreeMap::new(),
            timed: None,
            timed_seconds: None,
        })
    }

    /// Grows a buffer. Graphs that refer to its old address are dropped.
    fn grow(
        &mut self,
        which: fn(&mut Self) -> &mut DeviceBuffer,
        bytes: usize,
    ) -> anyhow::Result<()> {
        let buffer = *which(self);
        if buffer.bytes >= bytes {
            return Ok(());
        }
        if buffer.bytes > 0 {
            self.device.free(buffer.at)?;
        }
        *which(self) = DeviceBuffer { at: Address::NULL, bytes: 0 };
        let at = self.device.alloc(bytes)?;
        *which(self) = DeviceBuffer { at, bytes };
        for ready in &mut self.programs {
            ready.warm = false;
            ready.graphs.clear();
        }
        self.current = None;
        Ok(())
    }

    fn ptr(&self, ProgramId(program): ProgramId, buffer: Buffer) -> Address {
        assert_eq!(self.current, Some(program), "only the program that ran last has outputs");
        match &self.programs[program].place {
            Placement::Block(plan) => self.in_block(&self.programs[program].program, plan, buffer),
            Placement::Guarded(buffers) => buffers[buffer.0].at,
        }
    }

    /// Range of a buffer in the block.
    fn in_block(&self, program: &Program, plan: &BytePlan, buffer: Buffer) -> Address {
        let info = program.info(buffer);
        let bytes = info.len * info.kind.size(self.options.dtype.size());
        self.block.at.plus(plan.offsets[buffer.0]).first(bytes)
    }

    fn dtype_of(&self, ProgramId(program): ProgramId, buffer: Buffer) -> Dtype {
        let element = self.programs[program].program.info(buffer).kind;
        if element.size(2) == 2 { self.options.dtype } else { Dtype::F32 }
    }

    fn download(&self, from: Address, bytes: usize) -> anyhow::Result<Vec<u8>> {
        let mut into = vec![0; bytes];
        self.device.download(from, &mut into)?;
        Ok(into)
    }

    /// Launches every kernel of one run of a program.
    fn launch_run(
        &mut self,
        program: usize,
        mode: RunMode,
        launches: LaunchMode,
    ) -> anyhow::Result<()> {
        let timed = launches == LaunchMode::Timed;
        let ready = &self.programs[program];
        let queued = match (mode, &self.queue, &ready.io) {
            (RunMode::Queued { gather, .. }, Some(queue), Some(io)) => Some((queue, io, gather)),
            _ => None,
        };
        let mut items: Vec<LaunchItem> =
            ready.program.ops.iter().enumerate().map(LaunchItem::Op).collect();
        if let Some((queue, io, gather)) = queued {
            items.insert(0, LaunchItem::Begin(queue, io, gather));
            items.push(LaunchItem::End(queue, io));
        }
        let buffers: Vec<Address> = match &ready.place {
            Placement::Block(plan) => (0..plan.offsets.len())
                .map(|buffer| self.in_block(&ready.program, plan, Buffer(buffer)))
                .collect(),
            Placement::Guarded(buffers) => buffers.iter().map(|buffer| buffer.at).collect(),
        };
        // Guarded buffers are poisoned on the path, after their last op in program order.
        let branches = match (&ready.place, launches) {
            (Placement::Block(_), LaunchMode::Captured) => Some(&ready.branches),
            _ => None,
        };
        let mut ends = HashMap::new();
        let mut events = Vec::new();
        for item in &items {
            if timed {
                events.push(self.device.record_event()?);
            }
            let mut ctx = LaunchContext {
                device: &mut *self.device,
                dtype: self.options.dtype,
                options: self.options,
                arenas: self.arenas,
                slots: &self.slots,
                control: self.control,
                scaling: queued.map_or(Address::NULL, |(queue, ..)| queue.scaling),
                program: &ready.program,
                buffers: &buffers,
                tables: &ready.tables,
                op: if let LaunchItem::Op((at, _)) = item { *at } else { 0 },
                scratch: self.scratch.at,
                scratch_bytes: self.scratch.bytes,
                scratch_used: 0,
                is_branched: branches.is_some_and(|branches| !branches.is_empty()),
            };
            match item {
                LaunchItem::Begin(queue, io, gather) => queue::begin(&mut ctx, queue, io, *gather)?,
                LaunchItem::Op((_, op)) => match branches {
                    Some(branches) => launch_branched(&mut ctx, op, branches, &mut ends)?,
                    None => launch_op(&mut ctx, op)?,
                },
                LaunchItem::End(queue, io) => queue::end(&mut ctx, queue, io)?,
            }
            if let (Placement::Guarded(buffers), LaunchItem::Op((at, _))) = (&ready.place, item) {
                let ended = buffers.iter().filter(|buffer| buffer.last == *at && buffer.bytes > 0);
                for buffer in ended {
                    self.device.memset(buffer.at, POISON, buffer.bytes)?;
                }
                if self.scratch.bytes > 0 {
                    self.device.memset(self.scratch.at, POISON, self.scratch.bytes)?;
                }
            }
        }
        if timed {
            events.push(self.device.record_event()?);
            for (item, pair) in items.iter().zip(events.windows(2)) {
                let seconds = self.device.elapsed(pair[0], pair[1])?;
                *self.seconds.entry(item.name()).or_default() += seconds;
            }
            self.device.clear_events();
        }
        Ok(())
    }

    /// Uploads the inputs of a run.
    fn upload_inputs(&mut self, loaded: ProgramId, inputs: &Inputs) -> anyhow::Result<()> {
        let ProgramId(program) = loaded;
        check_inputs(&self.programs[program].program, inputs)?;
        self.upload_indices(loaded, &inputs.indices)?;
        for (buffer, values) in &inputs.floats {
            let bytes = self.dtype_of(loaded, *buffer).encode(values);
            self.device.upload(self.ptr(loaded, *buffer), &bytes)?;
        }
        let control = Control::bytes(&inputs.hyperparams, inputs.loss_scale, 0);
        self.device.upload(self.control.address(), &control)
    }

    fn upload_indices(
        &mut self,
        loaded: ProgramId,
        indices: &[(Buffer, &[u32])],
    ) -> anyhow::Result<()> {
        self.current = Some(loaded.0);
        for (buffer, values) in indices {
            self.device.upload(self.ptr(loaded, *buffer), bytemuck::cast_slice(values))?;
        }
        Ok(())
    }

    /// Executes a program whose inputs are in device memory.
    fn execute(&mut self, ProgramId(program): ProgramId, mode: RunMode) -> anyhow::Result<()> {
        self.current = Some(program);
        let runs = if let RunMode::Queued { runs, .. } = mode { runs } else { 1 };
        if self.options.mode == Mode::Profile {
            return (0..runs).try_for_each(|_| self.launch_run(program, mode, LaunchMode::Timed));
        }
        let ready = &self.programs[program];
        if let Some(&graph) = ready.graphs.get(&mode) {
            return self.device.launch_graph(graph);
        }
        // The first run is eager: loading a kernel or planning a matmul cannot be captured.
        let is_captured = self.options.mode == Mode::Graphs
            && (self.device.captures_exchanges() || !ready.has_exchanges());
        if !(is_captured && ready.warm) {
            (0..runs).try_for_each(|_| self.launch_run(program, mode, LaunchMode::InOrder))?;
            self.programs[program].warm = true;
            return Ok(());
        }
        self.device.begin_capture()?;
        let launched =
            (0..runs).try_for_each(|_| self.launch_run(program, mode, LaunchMode::Captured));
        // Also after an error: the stream must not stay in capture mode.
        let graph = self.device.end_capture();
        launched?;
        let graph = graph?;
        self.programs[program].graphs.insert(mode, graph);
        self.device.launch_graph(graph)
    }

    fn arena(&self, arena: Arena) -> (Address, usize, Dtype) {
        let Arenas { len, parameters, gradients, first_moment, second_moment, cache, .. } =
            self.arenas;
        let trained = if gradients == Address::NULL { 0 } else { len };
        // Of moments, the range that is kept.
        let kept = |at: Address| (at.plus(4 * self.moments.start), self.moments.len(), Dtype::F32);
        match arena {
            Arena::Parameters => (parameters, len, Dtype::F32),
            Arena::Gradients => (gradients, trained, Dtype::F32),
            Arena::FirstMoment => kept(first_moment),
            Arena::SecondMoment => kept(second_moment),
            Arena::Cache => (cache, self.cache_len, self.options.dtype),
        }
    }
}

impl CompiledProgram {
    /// True if all processes of a run have to come to an op of it.
    fn has_exchanges(&self) -> bool {
        self.program.ops.iter().any(Op::is_collective)
    }
}

/// One part of a run.
enum LaunchItem<'a> {
    Begin(&'a queue::DeviceQueue, &'a ProgramIo, bool),
    /// An op and its index in the program.
    Op((usize, &'a Op)),
    End(&'a queue::DeviceQueue, &'a ProgramIo),
}

impl LaunchItem<'_> {
    fn name(&self) -> &'static str {
        match self {
            LaunchItem::Begin(..) => "draw",
            LaunchItem::Op((_, op)) => op.name(),
            LaunchItem::End(..) => "report",
        }
    }
}

/// A table in device memory that ops read, identified by its content and shared by all ops with the
/// same content.
#[derive(PartialEq, Eq, Hash)]
enum ConstantTable {
    /// Number of positions, and the bits of each frequency.
    Rope(usize, Vec<u64>),
    /// Offsets into the arenas, in the layout that an update kernel reads.
    Offsets(Vec<u8>),
}

impl GpuSession {
    /// Allocates each buffer of a program by itself. A GPU's fresh memory may hold numbers that look
    /// right, so it is poisoned; the simulator itself finds reads of memory that nothing wrote.
    fn guarded_buffers(&mut self, program: &Program) -> anyhow::Result<Vec<GuardedBuffer>> {
        let mut buffers = Vec::with_capacity(program.buffers.len());
        for (info, (_, last)) in program.buffers.iter().zip(program.live_ranges()) {
            let bytes = info.len * info.kind.size(self.options.dtype.size());
            let at = self.device.alloc(bytes)?;
            if self.device.name() != "sim" && bytes > 0 {
                self.device.memset(at, POISON, bytes)?;
            }
            buffers.push(GuardedBuffer { at, bytes, last });
        }
        Ok(buffers)
    }

    /// [`Program::race`] in a block.
    fn race(
        &self,
        program: &Program,
        place: &Placement,
        branches: &Branches,
    ) -> Option<(usize, usize)> {
        let Placement::Block(plan) = place else { return None };
        let len = |info: &BufferInfo| info.len * info.kind.size(self.options.dtype.size());
        let lens: Vec<usize> = program.buffers.iter().map(len).collect();
        let has_scratch = |op: &Op| scratch(op, program, self.arenas.len, self.options) > 0;
        program.race(branches, (&plan.offsets, &lens), has_scratch)
    }

    /// Address of an op's constant table, if it has one.
    fn constant_table(&mut self, op: &Op) -> anyhow::Result<Option<Address>> {
        let bits = |frequencies: &[f64]| frequencies.iter().map(|f| f.to_bits()).collect();
        let key = match op {
            Op::Rope(o) => ConstantTable::Rope(o.positions, bits(&o.frequencies)),
            Op::RopeBackward(o) => ConstantTable::Rope(o.shape.seq_len, bits(&o.frequencies)),
            Op::AdamWStep(o) => ConstantTable::Offsets(update::table(o)),
            Op::MuonStep(o) => ConstantTable::Offsets(muon::table(o)),
            Op::RmsNormBackwardWeight(o) => ConstantTable::Offsets(norm::table(&o.weights)),
            Op::GradNorm(GradNorm { runs: Some(runs), .. }) => {
                ConstantTable::Offsets(exchange::run_table(runs))
            }
            _ => return Ok(None),
        };
        if let Some(address) = self.tables.get(&key) {
            return Ok(Some(*address));
        }
        let made;
        let bytes = match &key {
            ConstantTable::Rope(positions, bits) => {
                let frequencies: Vec<f64> = bits.iter().map(|&bits| f64::from_bits(bits)).collect();
                made = rope::table(*positions, &frequencies);
                &made
            }
            ConstantTable::Offsets(bytes) => bytes,
        };
        let address = self.device.alloc(bytes.len())?;
        self.device.upload(address, bytes)?;
        self.tables.insert(key, address);
        Ok(Some(address))
    }
}

/// Checks the limits of the kernels: 32-bit signed indices, head_dim, vocabulary.
fn check_sizes(program: &Program, arenas: Arenas) -> anyhow::Result<()> {
    let most = i32::MAX as usize;
    let rows = program.buffers.iter().filter(|info| info.kind.size(2) == 4);
    let rows = rows.map(|info| info.len).max().unwrap_or(0);
    if rows > most || arenas.len / Layout::ALIGN > most {
        return Err(error::config(
            format!("micro-batch too large: {rows} elements exceed the kernels' 32-bit index"),
            "decrease `batch_size`, or increase `gradient_accumulation_steps`",
        ));
    }
    for op in &program.ops {
        let (what, size, most) = match op {
            Op::Attention(o) => ("`head_dim`", o.shape.head_dim, MAX_HEAD_DIM),
            Op::AttentionDecode(o) => ("`head_dim`", o.shape.head_dim, MAX_HEAD_DIM),
            Op::EmbeddingBackward(o) => ("`vocab_size`", o.table.rows, embedding::MAX_VOCAB),
            Op::ReduceGradients(o) => ("`dp_slices`", o.order.width, exchange::MAX_TREE_PIECES),
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

impl Session for GpuSession {
    fn join(&mut self, group: Group) -> anyhow::Result<()> {
        self.group = group.clone();
        if group.size() == 1 { Ok(()) } else { self.device.join(group) }
    }

    fn exchanges(&self) -> Option<String> {
        Some(self.device.exchanges())
    }

    fn load(&mut self, program: Program) -> anyhow::Result<ProgramId> {
        check_sizes(&program, self.arenas)?;
        let place = if self.options.guard {
            Placement::Guarded(self.guarded_buffers(&program)?)
        } else {
            let plan = program.byte_plan(self.options.dtype.size());
            self.grow(|model| &mut model.block, plan.bytes)?;
            Placement::Block(plan)
        };
        let slots = program.ops.iter().map(Op::slots).max().unwrap_or(0);
        while self.slots.len() < slots {
            let slot = self.device.alloc(4 * self.arenas.len)?;
            self.device.memset(slot, 0, 4 * self.arenas.len)?;
            self.slots.push(slot);
        }
        let bytes = workspace(&program, self.arenas.len, self.options);
        self.grow(|model| &mut model.scratch, bytes)?;
        let mut tables = HashMap::new();
        for (at, op) in program.ops.iter().enumerate() {
            if let Some(table) = self.constant_table(op)? {
                tables.insert(at, table);
            }
        }
        let branches = program.branches();
        debug_assert_eq!(self.race(&program, &place, &branches), None, "ops that run at once");
        let graphs = HashMap::new();
        self.programs.push(CompiledProgram {
            program,
            place,
            branches,
            tables,
            io: None,
            warm: false,
            graphs,
        });
        Ok(ProgramId(self.programs.len() - 1))
    }

    fn run(&mut self, loaded: ProgramId, inputs: &Inputs) -> anyhow::Result<()> {
        self.upload_inputs(loaded, inputs)?;
        self.execute(loaded, RunMode::Direct)
    }

    fn time(&mut self, loaded: ProgramId, inputs: &Inputs) -> anyhow::Result<f64> {
        self.upload_inputs(loaded, inputs)?;
        let start = self.device.record_event()?;
        self.execute(loaded, RunMode::Direct)?;
        let end = self.device.record_event()?;
        let seconds = self.device.elapsed(start, end)?;
        self.device.clear_events();
        Ok(seconds)
    }

    fn floats(&self, program: ProgramId, buffer: Buffer) -> anyhow::Result<Vec<f32>> {
        let dtype = self.dtype_of(program, buffer);
        let len = self.programs[program.0].program.info(buffer).len;
        let from = self.ptr(program, buffer);
        if dtype == Dtype::F32 {
            // Logits of many sequences are megabytes per step: one copy is enough.
            let mut values = vec![0.0; len];
            self.device.download(from, bytemuck::cast_slice_mut(&mut values))?;
            return Ok(values);
        }
        Ok(dtype.decode(&self.download(from, len * dtype.size())?))
    }

    fn indices(&self, program: ProgramId, buffer: Buffer) -> anyhow::Result<Vec<u32>> {
        let len = self.programs[program.0].program.info(buffer).len;
        let bytes = self.download(self.ptr(program, buffer), 4 * len)?;
        Ok(bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
    }

    fn read(&self, arena: Arena) -> anyhow::Result<Vec<f32>> {
        let (at, len, dtype) = self.arena(arena);
        // A rank may keep no moments: there are more ranks than runs or matrices.
        let own = match len {
            0 => Vec::new(),
            _ => dtype.decode(&self.download(at, len * dtype.size())?),
        };
        if arena.is_moment() && len < self.arenas.len {
            return super::super::exchange::gather_moments(&own, &self.group);
        }
        Ok(own)
    }

    fn poison(&mut self) -> anyhow::Result<()> {
        let mut ranges =
            vec![(self.block.at, self.block.bytes), (self.scratch.at, self.scratch.bytes)];
        for ready in &self.programs {
            if let Placement::Guarded(buffers) = &ready.place {
                ranges.extend(buffers.iter().map(|buffer| (buffer.at, buffer.bytes)));
            }
        }
        for (at, bytes) in ranges.into_iter().filter(|&(_, bytes)| bytes > 0) {
            self.device.memset(at, POISON, bytes)?;
        }
        Ok(())
    }

    fn write(&mut self, arena: Arena, values: &[f32]) -> anyhow::Result<()> {
        let (at, len, dtype) = self.arena(arena);
        let is_shard = arena.is_moment() && len < self.arenas.len;
        let values = if is_shard && values.len() == self.arenas.len {
            &values[self.moments.clone()]
        } else {
            values
        };
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

    fn plan_matmuls(&mut self) -> anyhow::Result<()> {
        if !self.device.chooses_matmuls() {
            return Ok(());
        }
        // Algorithms may be timed on what is in the buffers.
        self.poison()?;
        self.device.set_planning(true);
        let planned = (0..self.programs.len())
            .try_for_each(|program| self.launch_run(program, RunMode::Direct, LaunchMode::InOrder));
        self.device.set_planning(false);
        planned
    }

    fn timed_seconds(&self) -> Option<f64> {
        self.timed_seconds
    }

    fn profile(&self) -> Vec<(&'static str, f64)> {
        self.seconds.iter().map(|(&name, &seconds)| (name, seconds)).collect()
    }

    fn bytes(&self) -> usize {
        let Arenas { len, weights, parameters, gradients, .. } = self.arenas;
        let element = self.options.dtype.size();
        let copies = if weights == parameters { 0 } else { element * len };
        let trained = if gradients == Address::NULL { 0 } else { 4 * len };
        let trained = trained + 8 * self.moments.len() + 4 * len * self.slots.len();
        let resident = self.queue.as_ref().and_then(|queue| queue.resident.as_ref());
        let tokens = resident.map_or(0, |resident| resident.bytes);
        let buffers = self.block.bytes + self.scratch.bytes;
        4 * len + copies + trained + self.cache_len * element + tokens + buffers
    }

    fn queue(&mut self) -> Option<&mut dyn StepQueue> {
        Some(self)
    }

    fn state(&self) -> anyhow::Result<Value> {
        let scale = self.queue.as_ref().map(|queue| queue.scale(&*self.device)).transpose()?;
        let state =
            GpuState { loss_scale: scale.flatten(), matmul_plans: self.device.matmul_plans() };
        Ok(if state == GpuState::default() { Value::Null } else { serde_json::to_value(state)? })
    }

    fn restore(&mut self, state: &Value) -> anyhow::Result<Option<String>> {
        if state.is_null() {
            return Ok(None);
        }
        let GpuState { loss_scale, matmul_plans } = serde_json::from_value(state.clone())?;
        if let Some(scale) = loss_scale {
            anyhow::ensure!(scale.0.is_normal() && scale.0 > 0.0, "invalid loss scale {}", scale.0);
            self.ready_queue()?;
            let queue = self.queue.as_mut().expect("created above");
            queue.rescale(&mut *self.device, scale)?;
        }
        Ok(if matmul_plans.is_null() { None } else { self.device.pin_matmul_plans(&matmul_plans) })
    }
}

impl StepQueue for GpuSession {
    fn capacity(&self) -> usize {
        self.queue.as_ref().map_or(queue::MAX_QUEUED_RUNS, queue::DeviceQueue::capacity)
    }

    fn upload_dataset(&mut self, windows: &Windows) -> anyhow::Result<bool> {
        let queued = self.programs.iter().filter_map(|ready| {
            let (inputs, _) = ready.io?.batch?;
            Some(ready.program.info(inputs.ids).len / windows.context())
        });
        let windows_per_run = queued.max().unwrap_or(1);
        let (free, _) = self.device.memory()?;
        let max_bytes = self.options.max_resident_bytes.unwrap_or(free / 2);
        self.ready_queue()?.resident = None;
        let resident = ResidentTokens::new(&mut *self.device, windows, windows_per_run, max_bytes)?;
        let fits = resident.is_some();
        self.ready_queue()?.resident = resident;
        for ready in &mut self.programs {
            ready.graphs.clear();
        }
        Ok(fits)
    }

    fn load(&mut self, micro: MicroBatch, norm: Option<Buffer>) -> anyhow::Result<ProgramId> {
        self.ready_queue()?;
        let io = ProgramIo { batch: Some((micro.inputs, micro.losses.nll)), norm };
        let loaded = Session::load(self, micro.program)?;
        self.programs[loaded.0].io = Some(io);
        Ok(loaded)
    }

    fn load_end(&mut self, program: Program, norm: Option<Buffer>) -> anyhow::Result<ProgramId> {
        self.ready_queue()?;
        let loaded = Session::load(self, program)?;
        self.programs[loaded.0].io = Some(ProgramIo { batch: None, norm });
        Ok(loaded)
    }

    fn enqueue(&mut self, runs: &[StepRun]) -> anyhow::Result<()> {
        let pending: Vec<_> = runs
            .iter()
            .map(|run| PendingRun {
                hyperparams: &run.hyperparams,
                loss_scale: run.loss_scale,
                windows: if let BatchSource::Windows(windows) = run.data { windows } else { &[] },
                ends_step: self.programs[run.program.0].io.is_some_and(|io| io.norm.is_some()),
            })
            .collect();
        let queue = self.queue.as_mut().expect("loading the programs created the queue");
        let gathers = pending.iter().any(|run| !run.windows.is_empty());
        if gathers && queue.resident.is_none() {
            return Err(error::internal(
                "a run gathers windows, but no token file is on the device",
            ));
        }
        queue.enqueue(&mut *self.device, &pending)?;
        let mut at = 0;
        while let Some(run) = runs.get(at) {
            let program = run.program;
            let count = match &run.data {
                BatchSource::Batch(batch) => {
                    let batch_io = self.programs[program.0].io.and_then(|io| io.batch);
                    let (inputs, _) = batch_io.expect("the program was loaded for the queue");
                    self.upload_indices(program, &inputs.bind(batch.arrays()))?;
                    1
                }
                BatchSource::None => 1,
                BatchSource::Windows(_) => {
                    let is_same = |run: &&StepRun| {
                        run.program == program && matches!(run.data, BatchSource::Windows(_))
                    };
                    let same = runs[at..].iter().take_while(is_same).count();
                    if same >= STEPS_PER_GRAPH { STEPS_PER_GRAPH } else { 1 }
                }
            };
            let gather = matches!(run.data, BatchSource::Windows(_));
            let mode = RunMode::Queued { gather, runs: count };
            let start = self.is_to_be_timed(program, mode).then(|| self.device.record_event());
            self.execute(program, mode)?;
            if let Some(start) = start {
                self.timed = Some([start?, self.device.record_event()?]);
            }
            at += count;
        }
        Ok(())
    }

    fn drain(&mut self) -> anyhow::Result<Vec<RunResult>> {
        let Some(queue) = &mut self.queue else { return Ok(Vec::new()) };
        let results = queue.drain(&mut *self.device)?;
        if let Some([start, end]) = self.timed.take() {
            *self.timed_seconds.get_or_insert(0.0) += self.device.elapsed(start, end)?;
            self.device.clear_events();
        }
        Ok(results)
    }
}

impl GpuSession {
    /// True for the first run since the last drain that waits for no other rank, and for nothing on the host.
    fn is_to_be_timed(&self, ProgramId(program): ProgramId, mode: RunMode) -> bool {
        let ready = &self.programs[program];
        let is_ready = match self.options.mode {
            Mode::Graphs => ready.graphs.contains_key(&mode),
            Mode::Eager => ready.warm,
            Mode::Profile => false,
        };
        self.group.size() > 1 && self.timed.is_none() && is_ready && !ready.has_exchanges()
    }

    /// The queue, created on first use.
    fn ready_queue(&mut self) -> anyhow::Result<&mut queue::DeviceQueue> {
        if self.queue.is_none() {
            self.queue = Some(queue::DeviceQueue::new(&mut *self.device, self.options.dtype)?);
        }
        Ok(self.queue.as_mut().expect("created above"))
    }
}
