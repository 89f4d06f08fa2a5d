//! The order in which windows are trained on: one permutation per epoch, never stored.
//!
//! Index `i` of an epoch is found by itself: a Feistel network permutes the smallest even number of
//! bits that holds `0..n`, and is applied again until it lands below `n` (fewer than four times on
//! average). Its round function is Philox keyed by the seed, so that a GPU can do the same sum.

use serde::{Deserialize, Serialize};

use crate::error;
use crate::random::{Philox, Stream};

/// Order of the windows in an epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum Order {
    /// Every window once per epoch, in a new random order each epoch.
    #[default]
    Shuffled,
    /// 0, 1, 2, ...
    Sequential,
}

/// State of a sampler: all that a resumed run needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Seed of the order.
    pub seed: u64,
    /// Epochs gone through.
    pub epoch: u64,
    /// Windows taken of this epoch.
    pub cursor: u64,
}

/// Gives the indices of windows, batch by batch, epoch after epoch.
#[derive(Clone, Debug)]
pub struct Sampler {
    windows: u64,
    order: Order,
    position: Position,
}

impl Sampler {
    /// A sampler of `windows` windows, at the beginning.
    pub fn new(windows: usize, order: Order, seed: u64) -> anyhow::Result<Self> {
        Self::resume(windows, order, Position { seed, epoch: 0, cursor: 0 })
    }

    /// A sampler that continues at a saved position.
    pub fn resume(windows: usize, order: Order, position: Position) -> anyhow::Result<Self> {
        let windows = windows as u64;
        if windows == 0 {
            return Err(error::data("no window to train on", "give a corpus with more text"));
        }
        if position.cursor >= windows {
            return Err(error::data(
                format!("the run stopped at window {} of {windows}", position.cursor),
                "resume with the corpus, tokenizer and `max_position_embeddings` that the run began with",
            ));
        }
        Ok(Self { windows, order, position })
    }

    /// Position of the next batch.
    pub fn position(&self) -> Position {
        self.position
    }

    /// The next windows: `batch_size` of them, or what is left of the epoch. An epoch has
    /// ceil(windows / batch_size) batches.
    pub fn next(&mut self, batch_size: usize) -> Vec<usize> {
        let Position { seed, epoch, cursor } = self.position;
        let end = cursor.saturating_add(batch_size as u64).min(self.windows);
        let indices = (cursor..end)
            .map(|index| match self.order {
                Order::Sequential => index as usize,
                Order::Shuffled => permuted(index, self.windows, seed, epoch) as usize,
            })
            .collect();
        self.position.cursor = end;
        if end == self.windows {
            self.position = Position { seed, epoch: epoch + 1, cursor: 0 };
        }
        indices
    }

    /// As [`Self::next`], but half of a batch are windows of `hard`, one after the other: hard examples. Those of the
    /// order keep theirs, so an epoch has twice as many batches.
    pub fn next_with_hard(&mut self, batch_size: usize, hard: &[usize]) -> Vec<usize> {
        if hard.is_empty() {
            return self.next(batch_size);
        }
        let (ordered, most) = (batch_size.div_ceil(2), batch_size / 2);
        let first = self.position.cursor as usize / ordered * most;
        let mut indices = self.next(ordered);
        let count = indices.len().min(most);
        indices.extend((first..first + count).map(|at| hard[at % hard.len()]));
        indices
    }
}

/// Enough for small domains too, where each round mixes little.
const ROUNDS: u64 = 8;

/// Image of `index` under a permutation of `0..n`; each seed and epoch has its own.
pub fn permuted(index: u64, n: u64, seed: u64, epoch: u64) -> u64 {
    debug_assert!(index < n);
    let philox = Philox::new(seed, Stream::Shuffle);
    let bits = u64::BITS - (n - 1).leading_zeros();
    let half = bits.div_ceil(2).max(1);
    let mask = (1 << half) - 1;
    let mut value = index;
    loop {
        let (mut left, mut right) = (value >> half, value & mask);
        for round in 0..ROUNDS {
            let mixed = u64::from(philox.at(epoch as u32, round << 32 | right)[0]);
            (left, right) = (right, left ^ (mixed & mask));
        }
        value = left << half | right;
        if value < n {
            return value;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn epoch_is_a_permutation_in_ceil_batches(
            n in 1usize..3000, seed: u64, batch in 1usize..700, sequential: bool
        ) {
            let order = if sequential { Order::Sequential } else { Order::Shuffled };
            let mut sampler = Sampler::new(n, order, seed).unwrap();
            for epoch in 0..2 {
                let mut seen = vec![false; n];
                for step in 0..n.div_ceil(batch) {
                    prop_assert_eq!(sampler.position().epoch, epoch);
                    let indices = sampler.next(batch);
                    prop_assert_eq!(indices.len(), batch.min(n - step * batch));
                    for index in indices {
                        prop_assert!(!std::mem::replace(&mut seen[index], true));
                    }
                }
                prop_assert!(seen.iter().all(|&seen| seen));
                prop_assert_eq!(sampler.position().cursor, 0);
            }
        }

        #[test]
        fn resumed_sampler_equals_uninterrupted(
            n in 1usize..500, seed: u64, batch in 1usize..60, before in 0usize..40
        ) {
            let mut unbroken = Sampler::new(n, Order::Shuffled, seed).unwrap();
            for _ in 0..before {
                unbroken.next(batch);
            }
            let saved = serde_json::to_string(&unbroken.position()).unwrap();
            let position = serde_json::from_str(&saved).unwrap();
            let mut resumed = Sampler::resume(n, Order::Shuffled, position).unwrap();
            for _ in 0..20 {
                prop_assert_eq!(resumed.next(batch), unbroken.next(batch));
            }
        }
    }

    #[test]
    fn hard_examples_are_half_of_a_batch_in_turn_and_the_others_keep_their_order() {
        for (n, batch) in [(10, 8), (11, 5), (7, 1), (9, 2usize)] {
            let mut plain = Sampler::new(n, Order::Shuffled, 3).unwrap();
            let mut mined = plain.clone();
            let (hard, ordered) = ([4, 1, 6], batch.div_ceil(2));
            let mut drawn = [0; 3];
            for _ in 0..3 * n {
                let expected = plain.next(ordered);
                let indices = mined.next_with_hard(batch, &hard);
                let (of_order, of_hard) = indices.split_at(expected.len());
                assert_eq!(of_order, expected);
                assert_eq!(of_hard.len(), expected.len().min(batch / 2));
                for index in of_hard {
                    drawn[hard.iter().position(|hard| hard == index).unwrap()] += 1;
                }
            }
            assert_eq!(mined.position(), plain.position());
            assert!(batch == 1 || drawn.iter().all(|&count| count > n / 2), "{n}: {drawn:?}");
            assert_eq!(mined.next_with_hard(batch, &[]), plain.next(batch));
        }
    }

    #[test]
    fn permutations_differ_by_epoch_and_seed() {
        let order =
            |seed, epoch| (0..100).map(|i| permuted(i, 100, seed, epoch)).collect::<Vec<_>>();
        assert_ne!(order(1, 0), order(1, 1));
        assert_ne!(order(1, 0), order(2, 0));
        assert_ne!(order(1, 0), (0..100).collect::<Vec<_>>());
        assert_eq!(order(1, 0), order(1, 0));
    }

    /// Pearson's statistic for `draws` of equally likely outcomes, over its degrees of freedom: 1
    /// for a fair draw, with a standard deviation of sqrt(2 / degrees).
    fn unfairness(counts: &[u32], draws: u32) -> f64 {
        let expected = f64::from(draws) / counts.len() as f64;
        let squares = counts.iter().map(|&n| (f64::from(n) - expected).powi(2) / expected);
        squares.sum::<f64>() / (counts.len() - 1) as f64
    }

    #[test]
    fn permutation_is_uniform() {
        for n in [2u64, 3, 5, 8, 13, 40] {
            for place in [0, n / 2, n - 1] {
                let draws = 400 * n as u32;
                let mut counts = vec![0; n as usize];
                for epoch in 0..draws {
                    counts[permuted(place, n, 42, u64::from(epoch)) as usize] += 1;
                }
                let bound = 1.0 + 5.0 * (2.0 / (n - 1) as f64).sqrt();
                let unfairness = unfairness(&counts, draws);
                assert!(unfairness < bound, "{n} windows, place {place}: {unfairness} > {bound}");
            }
        }
        // All orders of four windows, not only the places of one.
        let mut counts = std::collections::HashMap::<Vec<u64>, u32>::new();
        for epoch in 0..24 * 400 {
            *counts.entry((0..4).map(|i| permuted(i, 4, 7, epoch)).collect()).or_default() += 1;
        }
        let counts: Vec<_> = counts.into_values().collect();
        assert_eq!(counts.len(), 24);
        assert!(unfairness(&counts, 24 * 400) < 1.0 + 5.0 * (2.0 / 23.0_f64).sqrt(), "{counts:?}");
    }

    #[test]
    fn sampler_rejects_invalid_positions() {
        assert!(Sampler::new(0, Order::Shuffled, 1).is_err());
        let position = Position { seed: 1, epoch: 0, cursor: 10 };
        assert!(Sampler::resume(10, Order::Sequential, position).is_err());
    }
}
