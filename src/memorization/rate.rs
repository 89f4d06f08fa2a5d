//! Rates of windows, with their confidence intervals.

use serde::Serialize;

/// 97.5th percentile of the normal distribution: of a two-sided interval of 95%.
const Z: f64 = 1.959_963_984_540_054;

/// Wilson's 95% interval of `hits` of `all` (Wilson 1927): it stays within 0 and 1, and is not empty at
/// either end. None of nothing. The windows are taken as independent draws.
pub fn wilson(hits: usize, all: usize) -> Option<[f64; 2]> {
    if all == 0 {
        return None;
    }
    let (n, p) = (all as f64, hits as f64 / all as f64);
    let center = p + Z * Z / (2.0 * n);
    let half = Z * (p * (1.0 - p) / n + Z * Z / (4.0 * n * n)).sqrt();
    let bound = |value: f64| (value / (1.0 + Z * Z / n)).clamp(0.0, 1.0);
    let low = if hits == 0 { 0.0 } else { bound(center - half) };
    let high = if hits == all { 1.0 } else { bound(center + half) };
    Some([low, high])
}

/// Windows tested, and those that greedy decoding reproduces.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct MatchRate {
    /// Windows tested.
    pub windows: usize,
    /// Windows reproduced.
    pub exact: usize,
    /// `exact / windows`; none without windows.
    pub rate: Option<f64>,
    /// Its 95% confidence interval: see [`wilson`].
    pub interval: Option<[f64; 2]>,
}

impl MatchRate {
    /// Counts one window.
    pub fn add(&mut self, exact: bool) {
        *self = Self::of(self.exact + usize::from(exact), self.windows + 1);
    }

    /// So many of all.
    pub fn of(exact: usize, windows: usize) -> Self {
        let rate = (windows > 0).then(|| exact as f64 / windows as f64);
        Self { windows, exact, rate, interval: wilson(exact, windows) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of scipy's `binomtest(hits, all).proportion_ci(method="wilson")`.
    #[test]
    fn confidence_intervals_match_scipy() {
        for (hits, all, low, high) in [
            (0, 10, 0.0, 0.277_532_799_862_889_2),
            (10, 10, 0.722_467_200_137_110_7, 1.0),
            (5, 10, 0.236_593_090_512_564, 0.763_406_909_487_436_1),
            (1, 3, 0.061_491_944_720_396_21, 0.792_340_399_197_952_3),
            (437, 512, 0.820_256_192_227_594_2, 0.881_509_813_218_336_3),
        ] {
            let found = wilson(hits, all).unwrap();
            let error = (found[0] - low).abs().max((found[1] - high).abs());
            assert!(error < 1e-12, "{hits} of {all}: {found:?}");
        }
        assert_eq!(wilson(0, 0), None);
    }
}
