//! The session of both host backends: memory and programs. Each backend executes the ops.

use std::collections::BTreeMap;
use std::ops::{AddAssign, Range};
use std::time::Instant;

use bytemuck::Pod;

use super::exchange;
use super::memory::Memory;
use super::{Arena, Inputs, ProgramId, Session, SessionSpec};
use crate::collective::Group;
use crate::device::{check_host_memory, check_whole_host_memory};
use crate::error;
use crate::llama::{Buffer, BufferKind, BufferRole, Op, Plan, Program};
use crate::model::Layout;

/// A floating-point type that a host backend computes in.
pub trait Real: Pod + Default + AddAssign + Send + Sync + 'static {
    fn from_f32(value: f32) -> Self;
    fn to_f32(self) -> f32;
    fn to_f64(self) -> f64;
    /// The values themselves, if they are f32.
    fn as_f32s(_values: &[Self]) -> Option<&[f32]> {
        None
    }
}

impl Real for f32 {
    fn from_f32(value: f32) -> Self {
        value
    }
    fn to_f32(self) -> f32 {
        self
    }
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
    fn as_f32s(values: &[f32]) -> Option<&[f32]> {
        Some(values)
    }
}

impl Real for f64 {
    fn from_f32(value: f32) -> Self {
        f64::from(value)
    }
    fn to_f32(self) -> f32 {
        self as f32
    }
    fn to_f64(self) -> f64 {
        self
    }
}

/// Executes ops of a program after its inputs are in memory.
pub(super) trait Execute<R>: Send {
    fn execute(&mut self, program: &Program, ops: &[Op], memory: &mut Memory<R>, inputs: &Inputs);

    /// Seconds spent in each kind of op so far.
    fn profile(&self) -> Vec<(&'static str, f64)> {
        Vec::new()
    }
}

/// A session in host memory.
pub(super) struct HostSession<R, E> {
    pub memory: Memory<R>,
    pub executor: E,
    programs: Vec<(Program, Plan)>,
    group: Group,
    /// The range that moments are kept for, if it is not the whole arena.
    moments: Option<Range<usize>>,
    /// Seconds in the ops that are executed here, by name.
    seconds: BTreeMap<&'static str, f64>,
    /// The program whose outputs are in the block.
    current: Option<usize>,
}

impl<R: Real, E: Execute<R>> HostSession<R, E> {
    /// # Errors
    /// If the arenas take more memory than this process may use.
    pub fn new(layout: &Layout, spec: SessionSpec, executor: E) -> anyhow::Result<Self> {
        let arenas = if spec.training { 4 } else { 1 };
        let values = arenas * layout.len as u128 + spec.cache_len as u128;
        let bytes = values * size_of::<R>() as u128;
        if spec.training {
            // The state of a run that is resumed was read before, and goes when it is copied here.
            check_whole_host_memory(bytes, "training the model")?;
        } else {
            check_host_memory(bytes, "the model with its caches")?;
        }
        let programs = Vec::new();
        let (group, seconds) = (Group::alone(), BTreeMap::new());
        let moments = spec.moments.map(|_| spec.moment_range(layout.len));
        let memory = Memory::new(layout, spec);
        Ok(Self { memory, executor, programs, group, moments, seconds, current: None })
    }

    fn assert_current(&self, ProgramId(program): ProgramId) {
        assert_eq!(self.current, Some(program), "only the program that ran last has outputs");
    }
}

impl<R: Real, E: Execute<R>> Session for HostSession<R, E> {
    fn join(&mut self, group: Group) -> anyhow::Result<()> {
        self.group = group;
        Ok(())
    }

    fn load(&mut self, program: Program) -> anyhow::Result<ProgramId> {
        let plan = program.plan();
        check_host_memory(self.memory.missing(&program, &plan), "a step of the model")?;
        self.memory.reserve(&plan);
        self.memory.reserve_slots(&program);
        self.programs.push((program, plan));
        Ok(ProgramId(self.programs.len() - 1))
    }

    fn run(&mut self, program: ProgramId, inputs: &Inputs) -> anyhow::Result<()> {
        let ProgramId(at) = program;
        let (program, plan) = &self.programs[at];
        check_inputs(program, inputs)?;
        self.memory.assign(program, plan);
        self.current = Some(at);
        for (buffer, values) in &inputs.indices {
            let [target] = self.memory.indices.get([*buffer]);
            target.copy_from_slice(values);
        }
        for (buffer, values) in &inputs.floats {
            let [target] = self.memory.floats.get([*buffer]);
            for (target, value) in target.iter_mut().zip(values.iter()) {
                *target = R::from_f32(*value);
            }
        }
        // Ops between exchanges are executed together.
        for ops in
            program.ops.chunk_by(|a, b| !exchange::is_exchange(a) && !exchange::is_exchange(b))
        {
            if exchange::is_exchange(&ops[0]) {
                let start = Instant::now();
                exchange::execute(&ops[0], &mut self.memory, &self.group)?;
                *self.seconds.entry(ops[0].name()).or_default() += start.elapsed().as_secs_f64();
            } else {
                self.executor.execute(program, ops, &mut self.memory, inputs);
            }
        }
        Ok(())
    }

    fn floats(&self, program: ProgramId, buffer: Buffer) -> anyhow::Result<Vec<f32>> {
        self.assert_current(program);
        Ok(self.memory.floats.one(buffer).iter().map(|value| value.to_f32()).collect())
    }

    fn indices(&self, program: ProgramId, buffer: Buffer) -> anyhow::Result<Vec<u32>> {
        self.assert_current(program);
        Ok(self.memory.indices.one(buffer).to_vec())
    }

    fn arena(&self, arena: Arena) -> Option<&[f32]> {
        let is_whole = !(arena.is_moment() && self.moments.is_some());
        is_whole.then(|| R::as_f32s(self.memory.arena(arena))).flatten()
    }

    fn read(&self, arena: Arena) -> anyhow::Result<Vec<f32>> {
        let own: Vec<f32> = self.memory.arena(arena).iter().map(|value| value.to_f32()).collect();
        match &self.moments {
            Some(_) if arena.is_moment() => exchange::gather_moments(&own, &self.group),
            _ => Ok(own),
        }
    }

    fn poison(&mut self) -> anyhow::Result<()> {
        self.memory.floats.fill(R::from_f32(f32::NAN));
        self.memory.indices.fill(u32::MAX);
        Ok(())
    }

    fn map(&mut self, arena: Arena, value: &dyn Fn(f32) -> f32) -> anyhow::Result<()> {
        for x in self.memory.arena_mut(arena) {
            *x = R::from_f32(value(x.to_f32()));
        }
        Ok(())
    }

    fn write(&mut self, arena: Arena, values: &[f32]) -> anyhow::Result<()> {
        let values = match &self.moments {
            Some(range) if arena.is_moment() && values.len() == self.memory.parameters.len() => {
                &values[range.clone()]
            }
            _ => values,
        };
        let target = self.memory.arena_mut(arena);
        if target.len() != values.len() {
            return Err(error::checkpoint(
                format!("{} values for the {arena:?} arena of {}", values.len(), target.len()),
                "use weights or a training state of a model of the same shape",
            ));
        }
        for (target, value) in target.iter_mut().zip(values) {
            *target = R::from_f32(*value);
        }
        Ok(())
    }

    fn profile(&self) -> Vec<(&'static str, f64)> {
        let own = self.seconds.iter().map(|(&name, &seconds)| (name, seconds));
        self.executor.profile().into_iter().chain(own).collect()
    }

    fn bytes(&self) -> usize {
        self.memory.bytes()
    }
}

/// Checks that every input is given at its full length.
pub(super) fn check_inputs(program: &Program, inputs: &Inputs) -> anyhow::Result<()> {
    let indices = inputs.indices.iter().map(|(buffer, values)| (*buffer, values.len()));
    let floats = inputs.floats.iter().map(|(buffer, values)| (*buffer, values.len()));
    let mut missing: Vec<usize> = program
        .buffers
        .iter()
        .enumerate()
        .filter(|(_, info)| info.role == BufferRole::Input)
        .map(|(at, _)| at)
        .collect();
    let given = indices.map(|i| (i, true)).chain(floats.map(|f| (f, false)));
    for ((buffer, len), index) in given {
        let info = program.info(buffer);
        if info.len != len || (info.kind == BufferKind::Index) != index {
            let what = format!("input {} has {} elements, not {len}", info.name, info.len);
            return Err(error::internal(what));
        }
        missing.retain(|&at| at != buffer.0);
    }
    match missing.first() {
        Some(&at) => Err(error::internal(format!("missing input {}", program.buffers[at].name))),
        None => Ok(()),
    }
}
