//! Memory of a host session: flat arenas, and one block that the buffers of a program share as its
//! plan says.

use std::ops::Range;

use super::{Arena, SessionSpec, exchange};
use crate::llama::{Buffer, BufferKind, Op, Plan, Program};
use crate::model::Layout;

/// The buffers of the current program, in one allocation.
pub(super) struct BufferBlock<T> {
    data: Vec<T>,
    /// Range of each buffer of the current program; empty for buffers of the other element type.
    ranges: Vec<Range<usize>>,
}

impl<T: Copy + Default> BufferBlock<T> {
    fn new() -> Self {
        Self { data: Vec::new(), ranges: Vec::new() }
    }

    /// Disjoint buffers for reading or writing.
    pub fn get<const N: usize>(&mut self, buffers: [Buffer; N]) -> [&mut [T]; N] {
        let ranges = buffers.map(|Buffer(buffer)| self.ranges[buffer].clone());
        self.data.get_disjoint_mut(ranges).expect("a plan keeps an op's buffers disjoint")
    }

    pub fn fill(&mut self, value: T) {
        self.data.fill(value);
    }

    pub fn one(&self, Buffer(buffer): Buffer) -> &[T] {
        &self.data[self.ranges[buffer].clone()]
    }
}

/// Everything that an op can access.
pub(super) struct Memory<R> {
    pub parameters: Vec<R>,
    pub gradients: Vec<R>,
    /// First moments of the elements from `moments_from` on.
    pub first_moment: Vec<R>,
    pub second_moment: Vec<R>,
    pub moments_from: usize,
    /// Gradients of slices, and sums of them, of the arena's length each.
    pub slots: Vec<Vec<R>>,
    /// Buffer that ranks exchange through.
    pub wire: Vec<R>,
    pub cache: Vec<R>,
    pub floats: BufferBlock<R>,
    pub indices: BufferBlock<u32>,
}

impl<R: Copy + Default> Memory<R> {
    pub fn new(layout: &Layout, spec: SessionSpec) -> Self {
        let zeros = |len| vec![R::default(); len];
        let trained = if spec.training { layout.len } else { 0 };
        let moments = spec.moment_range(layout.len);
        Self {
            parameters: zeros(layout.len),
            gradients: zeros(trained),
            first_moment: zeros(moments.len()),
            second_moment: zeros(moments.len()),
            moments_from: moments.start,
            slots: Vec::new(),
            wire: Vec::new(),
            cache: zeros(spec.cache_len),
            floats: BufferBlock::new(),
            indices: BufferBlock::new(),
        }
    }

    /// Bytes that [`Memory::reserve`] and [`Memory::reserve_slots`] will allocate for a program.
    pub fn missing(&self, program: &Program, plan: &Plan) -> u128 {
        let slots = program.ops.iter().map(Op::slots).max().unwrap_or(0);
        let wire = program.ops.iter().map(exchange::wire_elements).max().unwrap_or(0);
        let more = |needed: usize, there: usize| needed.saturating_sub(there) as u128;
        let values = more(plan.floats, self.floats.data.len())
            + more(slots, self.slots.len()) * self.gradients.len() as u128
            + more(wire, self.wire.len());
        values * size_of::<R>() as u128 + 4 * more(plan.indices, self.indices.data.len())
    }

    /// Grows the block to the length of a plan.
    pub fn reserve(&mut self, plan: &Plan) {
        if self.floats.data.len() < plan.floats {
            self.floats.data.resize(plan.floats, R::default());
        }
        if self.indices.data.len() < plan.indices {
            self.indices.data.resize(plan.indices, 0);
        }
    }

    /// Allocates the slots that a program's ops keep gradients in, and the buffer of its exchanges.
    pub fn reserve_slots(&mut self, program: &Program) {
        let slots = program.ops.iter().map(Op::slots).max().unwrap_or(0);
        while self.slots.len() < slots {
            self.slots.push(vec![R::default(); self.gradients.len()]);
        }
        let wire = program.ops.iter().map(exchange::wire_elements).max().unwrap_or(0);
        if self.wire.len() < wire {
            self.wire.resize(wire, R::default());
        }
    }

    /// Range of the moments of a range of the arena.
    pub fn moments(&self, range: &Range<usize>) -> Range<usize> {
        range.start - self.moments_from..range.end - self.moments_from
    }

    /// Assigns the ranges of the program's buffers.
    pub fn assign(&mut self, program: &Program, plan: &Plan) {
        self.floats.ranges.clear();
        self.indices.ranges.clear();
        for (info, &offset) in program.buffers.iter().zip(&plan.offsets) {
            let range = offset..offset + info.len;
            let (floats, indices) =
                if info.kind == BufferKind::Index { (0..0, range) } else { (range, 0..0) };
            self.floats.ranges.push(floats);
            self.indices.ranges.push(indices);
        }
    }

    pub fn arena(&self, arena: Arena) -> &[R] {
        match arena {
            Arena::Parameters => &self.parameters,
            Arena::Gradients => &self.gradients,
            Arena::FirstMoment => &self.first_moment,
            Arena::SecondMoment => &self.second_moment,
            Arena::Cache => &self.cache,
        }
    }

    pub fn arena_mut(&mut self, arena: Arena) -> &mut [R] {
        match arena {
            Arena::Parameters => &mut self.parameters,
            Arena::Gradients => &mut self.gradients,
            Arena::FirstMoment => &mut self.first_moment,
            Arena::SecondMoment => &mut self.second_moment,
            Arena::Cache => &mut self.cache,
        }
    }

    pub fn bytes(&self) -> usize {
        let arenas = [
            &self.parameters,
            &self.gradients,
            &self.first_moment,
            &self.second_moment,
            &self.cache,
            &self.wire,
            &self.floats.data,
        ];
        let slots = self.slots.iter();
        arenas
            .into_iter()
            .chain(slots)
            .map(|values| std::mem::size_of_val(values.as_slice()))
            .sum::<usize>()
            + 4 * self.indices.data.len()
    }
}
