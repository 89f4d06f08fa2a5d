//! Learning-rate schedules: linear warm-up, then decay.

use serde::{Deserialize, Serialize};

/// Decay of the learning rate after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum LrDecay {
    /// Linear to 0 at the end.
    #[default]
    Linear,
    /// Half a cosine to 0 at the end.
    Cosine,
    /// No decay.
    Constant,
    /// Warm-up, stable, decay: constant, then linear to 0 over the last part.
    Wsd,
}

/// A learning-rate schedule.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LrSchedule {
    /// Shape of the decay.
    pub decay: LrDecay,
    /// Updates of the linear warm-up from 0.
    pub warmup: u64,
    /// Total updates.
    pub total: u64,
    /// Fraction of all updates over which [`LrDecay::Wsd`] decays.
    pub wsd_decay: f64,
}

impl LrSchedule {
    /// Multiplier of the base rate at update `k`, from 0. As in transformers, the first update of a
    /// warm-up has rate 0.
    pub fn factor(&self, k: u64) -> f64 {
        if k < self.warmup {
            return k as f64 / self.warmup as f64;
        }
        let left = self.total.saturating_sub(k) as f64;
        let declining = self.total.saturating_sub(self.warmup).max(1) as f64;
        match self.decay {
            LrDecay::Linear => left / declining,
            LrDecay::Cosine => {
                0.5 * (1.0 + (std::f64::consts::PI * (1.0 - left / declining)).cos())
            }
            LrDecay::Constant => 1.0,
            LrDecay::Wsd => {
                // A warm-up that reaches into the decay is not followed by a jump.
                let decay = (self.wsd_decay * self.total as f64).clamp(1.0, declining);
                (left / decay).min(1.0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_rises_from_zero_and_falls_to_zero() {
        let of = |decay| LrSchedule { decay, warmup: 4, total: 20, wsd_decay: 0.25 };
        for decay in [LrDecay::Linear, LrDecay::Cosine, LrDecay::Constant, LrDecay::Wsd] {
            let schedule = of(decay);
            assert_eq!(schedule.factor(0), 0.0);
            assert_eq!(schedule.factor(1), 0.25);
            assert_eq!(schedule.factor(4), 1.0);
        }
        assert_eq!(of(LrDecay::Linear).factor(12), 0.5);
        assert!((of(LrDecay::Cosine).factor(12) - 0.5).abs() < 1e-15);
        assert_eq!(of(LrDecay::Constant).factor(19), 1.0);
        assert_eq!(of(LrDecay::Wsd).factor(15), 1.0);
        assert_eq!(of(LrDecay::Wsd).factor(18), 0.4);
        assert_eq!(of(LrDecay::Linear).factor(20), 0.0);
        assert_eq!(of(LrDecay::Wsd).factor(20), 0.0);
        let late = LrSchedule { warmup: 16, wsd_decay: 0.5, ..of(LrDecay::Wsd) };
        assert_eq!([15, 16, 18].map(|k| late.factor(k)), [0.9375, 1.0, 0.5]);
    }
}
