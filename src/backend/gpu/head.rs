//! The head and its cross-entropy: `kernels/head*.cu`.

use super::launcher::{Launcher, Shape, int, scratch};
use crate::device::{Address, Matrix, Type};
use crate::llama::ops::HeadLoss;

/// Logits that exist at once at most: 2,048 rows of a vocabulary of 32,768.
const LOGITS: usize = 1 << 26;

/// Rows of a chunk of the plain path.
fn chunk(o: &HeadLoss) -> usize {
    (LOGITS / o.w.rows).clamp(1, o.rows)
}

pub(super) fn workspace(o: &HeadLoss, numbers: Type) -> usize {
    let logits = chunk(o) * o.w.rows;
    // In f32 the gradient takes the logits' own memory.
    let separate = o.dx.is_some() && numbers != Type::F32;
    scratch([4 * logits, if separate { numbers.size() * logits } else { 0 }])
}

/// The plain path: logits of some rows at a time in memory, by a product; their gradient in the
/// numbers of the next two products.
pub(super) fn loss(l: &mut Launcher, o: &HeadLoss) -> anyhow::Result<()> {
    let (vocab, hidden, most) = (o.w.rows, o.w.cols, chunk(o));
    let numbers = l.numbers;
    let logits = l.take(4 * most * vocab);
    let gradient = match o.dx {
        None => Address::NULL,
        Some(_) if numbers == Type::F32 => logits,
        Some(_) => l.take(numbers.size() * most * vocab),
    };
    let threads = vocab.div_ceil(4).next_multiple_of(32).min(1024);
    for first in (0..o.rows).step_by(most) {
        let rows = most.min(o.rows - first);
        let part = |at: Address, ty: Type| {
            Matrix::new(at.plus(first * hidden * ty.size()), ty, rows, hidden)
        };
        let x = part(l.at(o.x), numbers);
        l.product(x, l.weight_matrix(o.w).t(), Matrix::new(logits, Type::F32, rows, vocab), false)?;
        let args = [
            logits.into(),
            l.at(o.targets).plus(4 * first).into(),
            l.control.loss_scale().into(),
            l.at(o.nll).plus(4 * first).into(),
            l.at(o.argmax).plus(4 * first).into(),
            gradient.into(),
            int(rows),
            int(vocab),
            int(vocab),
            int(vocab),
        ];
        l.typed("head_logits", Shape::linear(rows, threads), &args)?;
        if let Some(dx) = o.dx {
            let dlogits = Matrix::new(gradient, numbers, rows, vocab);
            l.product(dlogits, l.weight_matrix(o.w), part(l.at(dx), numbers), false)?;
            l.product(dlogits.t(), x, l.gradient_matrix(o.w), true)?;
        }
    }
    Ok(())
}
