//! The session both host backends share: it holds memory and programs; what an operation does is
//! the backend's.

use super::memory::Memory;
use super::{Arena, Feed, Loaded, Need, Session};
use crate::error;
use crate::llama::{Buffer, BufferKind, BufferRole, Plan, Program};
use crate::model::Layout;

/// Numbers a host backend computes in.
pub trait Real: Copy + Default + Send + Sync + 'static {
    fn from_f32(value: f32) -> Self;
    fn to_f32(self) -> f32;
}

impl Real for f32 {
    fn from_f32(value: f32) -> Self {
        value
    }
    fn to_f32(self) -> f32 {
        self
    }
}

impl Real for f64 {
    fn from_f32(value: f32) -> Self {
        f64::from(value)
    }
    fn to_f32(self) -> f32 {
        self as f32
    }
}

/// Carries out the operations of a program, whose inputs are in place.
pub(super) trait Execute<R>: Send {
    fn execute(&mut self, program: &Program, memory: &mut Memory<R>, feed: &Feed);

    /// Seconds spent in each kind of operation so far.
    fn profile(&self) -> Vec<(&'static str, f64)> {
        Vec::new()
    }
}

/// A session in host memory.
pub(super) struct Host<R, E> {
    pub memory: Memory<R>,
    pub executor: E,
    programs: Vec<(Program, Plan)>,
    /// The program whose buffers lie in the block.
    arranged: Option<usize>,
}

impl<R: Real, E: Execute<R>> Host<R, E> {
    pub fn new(layout: &Layout, need: Need, executor: E) -> Self {
        Self { memory: Memory::new(layout, need), executor, programs: Vec::new(), arranged: None }
    }

    fn assert_arranged(&self, Loaded(program): Loaded) {
        assert_eq!(self.arranged, Some(program), "outputs are those of the program that ran last");
    }
}

impl<R: Real, E: Execute<R>> Session for Host<R, E> {
    fn load(&mut self, program: Program) -> anyhow::Result<Loaded> {
        let plan = program.plan();
        self.memory.reserve(&plan);
        self.programs.push((program, plan));
        Ok(Loaded(self.programs.len() - 1))
    }

    fn run(&mut self, program: Loaded, feed: &Feed) -> anyhow::Result<()> {
        let Loaded(at) = program;
        let (program, plan) = &self.programs[at];
        check_feed(program, feed)?;
        self.memory.arrange(program, plan);
        self.arranged = Some(at);
        for (buffer, values) in &feed.indices {
            let [place] = self.memory.indices.get([*buffer]);
            place.copy_from_slice(values);
        }
        for (buffer, values) in &feed.floats {
            let [place] = self.memory.floats.get([*buffer]);
            for (place, value) in place.iter_mut().zip(values.iter()) {
                *place = R::from_f32(*value);
            }
        }
        self.executor.execute(program, &mut self.memory, feed);
        Ok(())
    }

    fn floats(&self, program: Loaded, buffer: Buffer) -> anyhow::Result<Vec<f32>> {
        self.assert_arranged(program);
        Ok(self.memory.floats.one(buffer).iter().map(|value| value.to_f32()).collect())
    }

    fn indices(&self, program: Loaded, buffer: Buffer) -> anyhow::Result<Vec<u32>> {
        self.assert_arranged(program);
        Ok(self.memory.indices.one(buffer).to_vec())
    }

    fn read(&self, arena: Arena) -> anyhow::Result<Vec<f32>> {
        Ok(self.memory.arena(arena).iter().map(|value| value.to_f32()).collect())
    }

    fn poison(&mut self) -> anyhow::Result<()> {
        self.memory.floats.fill(R::from_f32(f32::NAN));
        self.memory.indices.fill(u32::MAX);
        Ok(())
    }

    fn write(&mut self, arena: Arena, values: &[f32]) -> anyhow::Result<()> {
        let place = self.memory.arena_mut(arena);
        if place.len() != values.len() {
            return Err(error::checkpoint(
                format!("{} values for the {arena:?} arena of {}", values.len(), place.len()),
                "use weights or a training state of a model of the same shape",
            ));
        }
        for (place, value) in place.iter_mut().zip(values) {
            *place = R::from_f32(*value);
        }
        Ok(())
    }

    fn profile(&self) -> Vec<(&'static str, f64)> {
        self.executor.profile()
    }

    fn bytes(&self) -> usize {
        self.memory.bytes()
    }
}

/// Every input is given once, at its full length: what is missing would be read as garbage.
pub(super) fn check_feed(program: &Program, feed: &Feed) -> anyhow::Result<()> {
    let indices = feed.indices.iter().map(|(buffer, values)| (*buffer, values.len()));
    let floats = feed.floats.iter().map(|(buffer, values)| (*buffer, values.len()));
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
