//! The learning rate, update by update.

use serde::{Deserialize, Serialize};

/// How the learning rate falls after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum Decline {
    /// In a straight line to 0 at the end.
    #[default]
    Linear,
    /// Along half a cosine to 0 at the end.
    Cosine,
    /// It stays.
    Constant,
    /// Warm-up, stable, decay: it stays, then falls in a straight line to 0 over the last part.
    Wsd,
}

/// A factor for every update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    pub decline: Decline,
    /// Updates over which the rate rises from 0.
    pub warmup: u64,
    /// Updates in all.
    pub total: u64,
    /// Of [`Decline::Wsd`]: the part of all updates that decays, from 0 to 1.
    pub decay_part: f64,
}

impl Schedule {
    /// What update `k`, from 0, multiplies the base rate by. As in transformers, the first update
    /// of a warm-up has rate 0.
    pub fn factor(&self, k: u64) -> f64 {
        if k < self.warmup {
            return k as f64 / self.warmup as f64;
        }
        let left = self.total.saturating_sub(k) as f64;
        let declining = self.total.saturating_sub(self.warmup).max(1) as f64;
        match self.decline {
            Decline::Linear => left / declining,
            Decline::Cosine => {
                0.5 * (1.0 + (std::f64::consts::PI * (1.0 - left / declining)).cos())
            }
            Decline::Constant => 1.0,
            Decline::Wsd => (left / (self.decay_part * self.total as f64).max(1.0)).min(1.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_rises_from_zero_and_falls_to_zero() {
        let of = |decline| Schedule { decline, warmup: 4, total: 20, decay_part: 0.25 };
        for decline in [Decline::Linear, Decline::Cosine, Decline::Constant, Decline::Wsd] {
            let schedule = of(decline);
            assert_eq!(schedule.factor(0), 0.0);
            assert_eq!(schedule.factor(1), 0.25);
            assert_eq!(schedule.factor(4), 1.0);
        }
        assert_eq!(of(Decline::Linear).factor(12), 0.5);
        assert!((of(Decline::Cosine).factor(12) - 0.5).abs() < 1e-15);
        assert_eq!(of(Decline::Constant).factor(19), 1.0);
        assert_eq!(of(Decline::Wsd).factor(15), 1.0);
        assert_eq!(of(Decline::Wsd).factor(18), 0.4);
        assert_eq!(of(Decline::Linear).factor(20), 0.0);
        assert_eq!(of(Decline::Wsd).factor(20), 0.0);
    }
}
