//! What the kernels should compute, in f64, and the random inputs they are given.

use half::bf16;

/// A small generator, so that inputs are the same everywhere.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = self.0;
        x = (x ^ x >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ x >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ x >> 31
    }

    /// Uniform in [-1, 1).
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }

    pub fn bf16s(&mut self, count: usize, scale: f64) -> Vec<bf16> {
        (0..count).map(|_| bf16::from_f64(self.unit() * scale)).collect()
    }
}

pub fn bytes_of(values: &[bf16]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

pub fn bf16s_of(bytes: &[u8]) -> Vec<f64> {
    bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f64()).collect()
}

pub fn f32s_of(bytes: &[u8]) -> Vec<f64> {
    bytes.chunks_exact(4).map(|b| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]]))).collect()
}

/// |got - exact| / |exact|, in the 2-norm.
pub fn relative_error(got: &[f64], exact: &[f64]) -> f64 {
    assert_eq!(got.len(), exact.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut got.iter().zip(exact).map(|(g, e)| g - e)) / norm(&mut exact.iter().copied())
}

/// How a plain version of an operation rounds: not at all, or like a low-precision CPU version.
#[derive(Clone, Copy)]
pub struct Rounding {
    /// Applied to every intermediate result.
    pub step: fn(f64) -> f64,
    /// Applied to what is stored as bf16, or fed to a product.
    pub store: fn(f64) -> f64,
}

pub const EXACT: Rounding = Rounding { step: |x| x, store: |x| x };
pub const PLAIN: Rounding =
    Rounding { step: |x| f64::from(x as f32), store: |x| bf16::from_f64(x).to_f64() };

pub fn rms_norm(x: &[f64], weight: &[f64], epsilon: f64, r: Rounding) -> Vec<f64> {
    let mut out = Vec::new();
    for row in x.chunks_exact(weight.len()) {
        let squares = row.iter().fold(0.0, |sum, x| (r.step)(sum + (r.step)(x * x)));
        let mean = (r.step)(squares / weight.len() as f64);
        let inverse = (r.step)(1.0 / (mean + epsilon).sqrt());
        out.extend(row.iter().zip(weight).map(|(x, w)| (r.store)((r.step)(x * inverse) * w)));
    }
    out
}

pub fn cross_entropy(logits: &[f64], target: &[i32], r: Rounding) -> Vec<f64> {
    let vocabulary = logits.len() / target.len();
    let rows = logits.chunks_exact(vocabulary).zip(target);
    rows.map(|(row, &target)| {
        let top = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum = row.iter().fold(0.0, |sum, x| (r.step)(sum + (r.step)((x - top).exp())));
        (r.step)((r.step)(top + (r.step)(sum.ln())) - row[target as usize])
    })
    .collect()
}

/// Causal attention; gives the output and the log-sum-exp of each row.
pub fn attention(
    q: &[f64],
    k: &[f64],
    v: &[f64],
    tokens: usize,
    dim: usize,
    r: Rounding,
) -> (Vec<f64>, Vec<f64>) {
    let (mut out, mut lse) = (Vec::new(), Vec::new());
    let scale = 1.0 / (dim as f64).sqrt();
    for (head, q) in q.chunks_exact(tokens * dim).enumerate() {
        let at = head * tokens * dim;
        for (row, q) in q.chunks_exact(dim).enumerate() {
            let key = |j: usize| &k[at + j * dim..at + (j + 1) * dim];
            let value = |j: usize| &v[at + j * dim..at + (j + 1) * dim];
            let dot = |a: &[f64], b: &[f64]| {
                a.iter().zip(b).fold(0.0, |sum, (a, b)| (r.step)(sum + a * b))
            };
            let scores: Vec<f64> = (0..=row).map(|j| (r.step)(dot(q, key(j)) * scale)).collect();
            let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| (r.step)((s - top).exp())).collect();
            let sum = weights.iter().fold(0.0, |sum, w| (r.step)(sum + w));
            lse.push(top + sum.ln());
            for d in 0..dim {
                let dot = weights
                    .iter()
                    .enumerate()
                    .fold(0.0, |sum, (j, w)| (r.step)(sum + (r.store)(*w) * value(j)[d]));
                out.push((r.store)(dot / sum));
            }
        }
    }
    (out, lse)
}
