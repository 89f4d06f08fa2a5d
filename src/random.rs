//! Random numbers that depend only on (seed, stream, counter), so that every draw can be named,
//! repeated, and made anywhere: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
//! 1, 2, 3", SC 2011).

use rayon::prelude::*;

use crate::threads::start_global_pool;

/// Purpose of a stream of random numbers. Streams of one seed are independent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Stream {
    /// Initial weights.
    Init = 1,
    /// Order of the windows.
    Shuffle = 2,
    /// Sampled tokens.
    Sampling = 3,
    /// Inputs of tests and checks.
    Test = 4,
}

/// A counter-based generator: `at(counter)` is a pure function.
#[derive(Clone, Copy, Debug)]
pub struct Philox {
    key: [u32; 2],
    stream: u32,
}

impl Philox {
    /// Numbers of a seed and a purpose.
    pub fn new(seed: u64, stream: Stream) -> Self {
        Self { key: [seed as u32, (seed >> 32) as u32], stream: stream as u32 }
    }

    /// Four random words for a counter and a subsequence (a tensor's index, an epoch, ...).
    pub fn at(&self, sequence: u32, counter: u64) -> [u32; 4] {
        let mut x = [counter as u32, (counter >> 32) as u32, sequence, self.stream];
        let mut k = self.key;
        for _ in 0..10 {
            let a = u64::from(x[0]) * 0xD251_1F53;
            let b = u64::from(x[2]) * 0xCD9E_8D57;
            x = [
                (b >> 32) as u32 ^ x[1] ^ k[0],
                b as u32,
                (a >> 32) as u32 ^ x[3] ^ k[1],
                a as u32,
            ];
            k = [k[0].wrapping_add(0x9E37_79B9), k[1].wrapping_add(0xBB67_AE85)];
        }
        x
    }

    /// Uniform in [0, 1), with 53 random bits.
    pub fn uniform(&self, sequence: u32, counter: u64) -> f64 {
        unit(self.at(sequence, counter))
    }

    /// Fills `out` with draws from normal(0, `deviation`), by the Box-Muller transform in f64.
    pub fn fill_normal(&self, sequence: u32, deviation: f64, out: &mut [f32]) {
        let fill = |(task, values): (usize, &mut [f32])| {
            for (pair, values) in values.chunks_mut(2).enumerate() {
                let counter = task * PAIRS_PER_TASK + pair;
                let [a, b, c, d] = self.at(sequence, counter as u64);
                // 1 - u is in (0, 1]: its logarithm is finite.
                let radius = deviation * (-2.0 * (1.0 - unit([a, b, 0, 0])).ln()).sqrt();
                let angle = std::f64::consts::TAU * unit([c, d, 0, 0]);
                values[0] = (radius * angle.cos()) as f32;
                if let Some(second) = values.get_mut(1) {
                    *second = (radius * angle.sin()) as f32;
                }
            }
        };
        // Without threads to be had it takes longer.
        if out.len() > 2 * PAIRS_PER_TASK && start_global_pool().is_ok() {
            out.par_chunks_mut(2 * PAIRS_PER_TASK).enumerate().for_each(fill);
        } else {
            out.chunks_mut(2 * PAIRS_PER_TASK).enumerate().for_each(fill);
        }
    }
}

/// Pairs of draws that a thread makes at a time: a millisecond of work.
const PAIRS_PER_TASK: usize = 1 << 14;

fn unit(words: [u32; 4]) -> f64 {
    let bits = (u64::from(words[0]) << 32) | u64::from(words[1]);
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equals_the_published_test_vectors() {
        // Random123's known answers for philox4x32-10, laid out as its (counter, key) words.
        let zero = Philox { key: [0, 0], stream: 0 };
        assert_eq!(zero.at(0, 0), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        let ones = Philox { key: [u32::MAX; 2], stream: u32::MAX };
        assert_eq!(
            ones.at(u32::MAX, u64::MAX),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
    }

    #[test]
    fn normal_draws_have_the_asked_mean_and_deviation() {
        let mut draws = vec![f32::NAN; 100_001];
        Philox::new(7, Stream::Test).fill_normal(0, 0.02, &mut draws);
        let n = draws.len() as f64;
        let mean = draws.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
        let variance = draws.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n;
        assert!(mean.abs() < 3.0 * 0.02 / n.sqrt(), "mean {mean}");
        assert!((variance.sqrt() / 0.02 - 1.0).abs() < 0.01, "deviation {}", variance.sqrt());
    }
}
