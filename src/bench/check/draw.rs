//! Random inputs, each draw from a sequence of its own.

use crate::dtype::Dtype;
use crate::random::{Philox, Stream};

/// Draws, one after another.
pub(super) struct Draw {
    random: Philox,
    dtype: Dtype,
    next: u32,
}

impl Draw {
    pub fn new(seed: u64, dtype: Dtype) -> Self {
        Self { random: Philox::new(seed, Stream::Test), dtype, next: 0 }
    }

    fn sequence(&mut self) -> u32 {
        self.next += 1;
        self.next
    }

    /// Normal, in f32.
    pub fn floats(&mut self, len: usize, deviation: f64) -> Vec<f32> {
        let mut values = vec![0.0; len];
        let sequence = self.sequence();
        self.random.fill_normal(sequence, deviation, &mut values);
        values
    }

    /// Normal, as the type of activations holds it: every backend is given the same numbers.
    pub fn activations(&mut self, len: usize, deviation: f64) -> Vec<f32> {
        let values = self.floats(len, deviation);
        self.rounded(&values)
    }

    /// Values as the type of activations holds them.
    pub fn rounded(&self, values: &[f32]) -> Vec<f32> {
        self.dtype.decode(&self.dtype.encode(values))
    }

    /// Uniform in `0..n`.
    pub fn indices(&mut self, len: usize, n: usize) -> Vec<u32> {
        let sequence = self.sequence();
        (0..len).map(|at| (self.random.at(sequence, at as u64)[0] as usize % n) as u32).collect()
    }
}
