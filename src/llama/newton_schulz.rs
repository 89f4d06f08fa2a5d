//! The Newton-Schulz iterations of Muon, as a list of matmuls that all backends share.
//!
//! Five times `X = P(X XT) X` with `P(R) = a I + b R + c R R` (Jordan et al. 2024), for X of norm 1 with at most
//! as many rows as columns; a backend treats a tall matrix as its transpose. If X is wide, P is multiplied
//! up to Q on the Gram matrix `R = X XT`, which is updated instead of X: `R = P(R) R P(R)` (Gram
//! Newton-Schulz, Dao et al. 2026). R then drifts from `X XT`, above all at small singular values, which P
//! amplifies: so X and R are computed again after the first two iterations.
//!
//! Relative error against f64 on momenta of a training run (240 x 80, 512 x 80, 80 x 256): plain and Gram
//! 1.2e-6 to 1.5e-6 in f32, 1.6e-3 to 2.3e-3 in f16, 1.3e-2 to 1.8e-2 in bf16; Gram without the restart up to
//! 3.0e-3 in f16. Of condition 1e4, 192 x 576: plain 9.8e-3 and Gram 1.8e-2 in f16, 8.4e-2 and 0.14 in bf16.

/// `a`, `b` and `c` of the polynomial.
pub const COEFFICIENTS: [f64; 3] = [3.4445, -4.775, 2.0315];
/// Iterations.
const ITERATIONS: usize = 5;
/// Iterations of the Gram form before X and R are computed again.
const RESTART: usize = 2;
/// Columns per row from which the Gram form takes fewer FLOPs: `4 n + 14 m` for `10 n + 5 m`, times `2 m^2`.
const MIN_GRAM_ASPECT: usize = 2;
/// Rows from which matmuls in f16 save more than they cost in precision; smaller matrices take some
/// microseconds in f32.
const MIN_HALF_ROWS: usize = 512;

/// A step over X, `[m, n]`, and the matrices R, Z and Q, `[m, m]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewtonSchulzStep {
    /// `R = X XT`
    Gram,
    /// `Z = a I + b R + c R R`
    Polynomial,
    /// `R = Z R Z`
    Conjugate,
    /// `Q = Z`; Z is not read again.
    Begin,
    /// `Q = Z Q`
    Compose,
    /// `X = Q X`
    Apply,
}

/// The steps for a matrix of this shape, in order.
pub fn steps(rows: usize, cols: usize) -> Vec<NewtonSchulzStep> {
    use NewtonSchulzStep::{Apply, Begin, Compose, Conjugate, Gram, Polynomial};
    let is_gram = rows.max(cols) >= MIN_GRAM_ASPECT * rows.min(cols);
    let begins = |iteration: usize| !is_gram || iteration == 0 || iteration == RESTART;
    let mut steps = Vec::new();
    for iteration in 0..ITERATIONS {
        if begins(iteration) {
            steps.push(Gram);
        }
        steps.push(Polynomial);
        let ends = iteration + 1 == ITERATIONS || begins(iteration + 1);
        if !ends {
            steps.push(Conjugate);
        }
        steps.push(if begins(iteration) { Begin } else { Compose });
        if ends {
            steps.push(Apply);
        }
    }
    steps
}

/// True if a GPU that computes in 16 bits takes f16 for matrices of this shape. Their elements are at most a few
/// units in size, so the three more bits of precision that f16 has over bf16 cost nothing.
pub fn is_half(rows: usize, cols: usize) -> bool {
    rows.min(cols) >= MIN_HALF_ROWS
}

/// FLOPs of the matmuls.
pub fn flops(rows: usize, cols: usize) -> usize {
    let (m, n) = (rows.min(cols), rows.max(cols));
    let of = |step| match step {
        NewtonSchulzStep::Gram | NewtonSchulzStep::Apply => 2 * m * m * n,
        NewtonSchulzStep::Polynomial | NewtonSchulzStep::Compose => 2 * m * m * m,
        NewtonSchulzStep::Conjugate => 4 * m * m * m,
        NewtonSchulzStep::Begin => 0,
    };
    steps(rows, cols).into_iter().map(of).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wide_matrices_take_the_gram_form_with_one_restart() {
        for (rows, cols, flops_per_side) in [(8, 8, 15), (8, 16, 4 * 2 + 14), (24, 8, 4 * 3 + 14)] {
            assert_eq!(flops(rows, cols), 2 * 8 * 8 * 8 * flops_per_side);
            let restarts =
                steps(rows, cols).iter().filter(|&&s| s == NewtonSchulzStep::Gram).count();
            assert_eq!(restarts, if rows == cols { 5 } else { 2 });
        }
    }
}
