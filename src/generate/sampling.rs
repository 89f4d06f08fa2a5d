//! The choice of the next token from its logits.

use std::cmp::Ordering;

use crate::error;
use crate::random::{Philox, Stream};

/// Sampling parameters. Applied in the order of transformers: temperature, then `top_k`,
/// then `top_p` of what is left.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sampling {
    /// Divisor of the logits. 0 is greedy: the likeliest token, of equals the lowest id.
    pub temperature: f64,
    /// Only the `k` likeliest tokens; of equals, the lower ids. 0 is all.
    pub top_k: usize,
    /// Only the likeliest tokens that together reach this probability. `None` is all.
    pub top_p: Option<f64>,
    /// Seed of the random numbers.
    pub seed: u64,
}

impl Sampling {
    /// Greedy sampling.
    pub fn greedy() -> Self {
        Self::default()
    }

    /// Refuses values that are not finite or out of range.
    pub fn validate(&self) -> anyhow::Result<()> {
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return Err(error::invalid("temperature", self.temperature, "at least 0 and finite"));
        }
        if let Some(p) = self.top_p.filter(|&p| !(p > 0.0 && p <= 1.0)) {
            return Err(error::invalid("top_p", p, "above 0 and at most 1"));
        }
        Ok(())
    }

    /// The next token of a sequence, at a position in it. The draw depends on nothing else: not
    /// on the other sequences, nor on how many tokens were drawn before.
    pub fn choose(&self, logits: &[f32], sequence: u32, position: usize) -> anyhow::Result<u32> {
        let (best, top) = likeliest(logits)?;
        if self.temperature == 0.0 {
            return Ok(best);
        }
        // Unnormalized probabilities; the likeliest has 1.
        let weight = |logit: f32| ((f64::from(logit) - f64::from(top)) / self.temperature).exp();
        let uniform = Philox::new(self.seed, Stream::Sampling).uniform(sequence, position as u64);
        let keeps_all = (self.top_k == 0 || self.top_k >= logits.len()) && self.top_p.is_none();
        if keeps_all {
            let weights: Vec<f64> = logits.iter().map(|&logit| weight(logit)).collect();
            return Ok(draw(&weights, uniform) as u32);
        }
        let kept = self.kept(logits);
        let mut weights: Vec<f64> = kept.iter().map(|&id| weight(logits[id as usize])).collect();
        if let Some(p) = self.top_p {
            let whole: f64 = weights.iter().sum();
            let mut reached = 0.0;
            let enough = weights.iter().position(|weight| {
                reached += weight;
                reached >= p * whole
            });
            weights.truncate(enough.map_or(weights.len(), |last| last + 1));
        }
        Ok(kept[draw(&weights, uniform)])
    }

    /// The ids that `top_k` leaves, the likeliest first.
    fn kept(&self, logits: &[f32]) -> Vec<u32> {
        let likelier = |&a: &u32, &b: &u32| -> Ordering {
            logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b))
        };
        let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
        if self.top_k > 0 && self.top_k < ids.len() {
            ids.select_nth_unstable_by(self.top_k - 1, likelier);
            ids.truncate(self.top_k);
        }
        ids.sort_unstable_by(likelier);
        ids
    }
}

/// The index at which the running sum passes `uniform`, in [0, 1), of the whole.
fn draw(weights: &[f64], uniform: f64) -> usize {
    let mut left = uniform * weights.iter().sum::<f64>();
    for (at, weight) in weights.iter().enumerate() {
        left -= weight;
        if left < 0.0 {
            return at;
        }
    }
    // Rounding may leave a trace of the last one.
    weights.iter().rposition(|&weight| weight > 0.0).unwrap_or(0)
}

/// The lowest id of the largest logit, and that logit. Logits that are no numbers are an error.
fn likeliest(logits: &[f32]) -> anyhow::Result<(u32, f32)> {
    // In lanes, which the compiler makes vectors of.
    const LANES: usize = 16;
    let mut largest = [f32::NEG_INFINITY; LANES];
    // 0 as long as all are finite.
    let mut faults = [0.0; LANES];
    for piece in logits.chunks(LANES) {
        for ((largest, fault), &logit) in largest.iter_mut().zip(&mut faults).zip(piece) {
            *largest = if logit > *largest { logit } else { *largest };
            *fault += logit * 0.0;
        }
    }
    let largest = largest.into_iter().fold(f32::NEG_INFINITY, f32::max);
    match logits.iter().position(|&logit| logit == largest) {
        Some(id) if faults.iter().all(|&fault| fault == 0.0) => Ok((id as u32, largest)),
        _ => Err(error::checkpoint(
            "the model's logits are not finite",
            "the weights are damaged, or training diverged: use an earlier checkpoint",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Four tokens of probability 1/2, 1/4, 1/8, 1/8, not in order.
    fn logits() -> Vec<f32> {
        [0.125f32, 0.5, 0.125, 0.25].map(f32::ln).to_vec()
    }

    fn frequencies(sampling: Sampling, draws: usize) -> [f64; 4] {
        let mut counts = [0.0; 4];
        for position in 0..draws {
            counts[sampling.choose(&logits(), 3, position).unwrap() as usize] += 1.0;
        }
        counts.map(|count| count / draws as f64)
    }

    #[test]
    fn greedy_breaks_ties_by_lowest_id() {
        let mut logits = vec![0.0; 1000];
        assert_eq!(Sampling::greedy().choose(&logits, 0, 0).unwrap(), 0);
        for at in [999, 500, 37] {
            logits[at] = 1.0;
            assert_eq!(Sampling::greedy().choose(&logits, 0, 0).unwrap(), at as u32);
        }
    }

    #[test]
    fn sampling_frequencies_match_softmax() {
        let n = 20_000;
        let bound = 4.0 * (0.25 / n as f64).sqrt();
        let hot = |temperature| Sampling { temperature, seed: 9, ..Sampling::default() };
        let cases: [(Sampling, [f64; 4]); 5] = [
            (hot(1.0), [0.125, 0.5, 0.125, 0.25]),
            // Squares of the probabilities, normalized.
            (hot(0.5), [1.0 / 22.0, 16.0 / 22.0, 1.0 / 22.0, 4.0 / 22.0]),
            // Of the two equals at the border the lower id stays.
            (Sampling { top_k: 3, ..hot(1.0) }, [1.0 / 7.0, 4.0 / 7.0, 0.0, 2.0 / 7.0]),
            (Sampling { top_p: Some(0.7), ..hot(1.0) }, [0.0, 2.0 / 3.0, 0.0, 1.0 / 3.0]),
            // Of the three that top_k leaves, 4/7 + 2/7 reach 0.8.
            (Sampling { top_k: 3, top_p: Some(0.8), ..hot(1.0) }, [0.0, 2.0 / 3.0, 0.0, 1.0 / 3.0]),
        ];
        for (sampling, expected) in cases {
            let seen = frequencies(sampling, n);
            for (seen, expected) in seen.iter().zip(expected) {
                assert!((seen - expected).abs() < bound, "{sampling:?}: {seen} for {expected}");
                assert!(expected > 0.0 || *seen == 0.0, "{sampling:?}");
            }
        }
    }

    #[test]
    fn sample_depends_on_seed_sequence_and_position_only() {
        let sampling = Sampling { temperature: 1.0, seed: 1, ..Sampling::default() };
        let text = |sampling: Sampling, sequence| -> Vec<u32> {
            let draw = |position| sampling.choose(&logits(), sequence, position).unwrap();
            (0..64).map(draw).collect()
        };
        assert_eq!(text(sampling, 0), text(sampling, 0));
        assert_ne!(text(sampling, 0), text(sampling, 1));
        assert_ne!(text(sampling, 0), text(Sampling { seed: 2, ..sampling }, 0));
    }

    #[test]
    fn sampling_rejects_non_finite() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut logits = vec![0.0; 40];
            logits[35] = bad;
            assert!(Sampling::greedy().choose(&logits, 0, 0).is_err(), "{bad}");
        }
        for temperature in [-1.0, f64::NAN, f64::INFINITY] {
            assert!(Sampling { temperature, ..Sampling::default() }.validate().is_err());
        }
        for p in [0.0, -0.1, 1.1, f64::NAN] {
            assert!(Sampling { top_p: Some(p), ..Sampling::default() }.validate().is_err());
        }
    }
}
