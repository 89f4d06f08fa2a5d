//! The loss of a model on a text: mean nats per token, bits per byte.

use serde::Serialize;

use super::pass::pass;
use crate::backend::Backend;
use crate::model::Config;
use crate::tokens::Windows;

/// Loss of a model on a text.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Measured {
    /// Mean negative log-likelihood of a counted token, in nats.
    pub loss: f64,
    /// Exponential of the loss.
    pub perplexity: f64,
    /// Bits of all counted tokens, paths and markers included, for each byte of the files. What is
    /// counted depends on the windows: `original` ones leave out the first token of each.
    pub bits_per_byte: f64,
    /// Tokens that were counted.
    pub tokens: u64,
}

/// One pass over all windows, `batch` at a time. Of stream windows that overlap, a token counts in the first that has
/// it, where it is given most of the text before it. `bytes` is the size of the text they were cut from;
/// `progress` gets the number of finished windows; its error
/// ends the pass.
pub fn measure(
    backend: &dyn Backend,
    config: &Config,
    weights: &[f32],
    windows: &Windows,
    bytes: u64,
    batch: usize,
    mut progress: impl FnMut(usize) -> anyhow::Result<()>,
) -> anyhow::Result<Measured> {
    let (mut nats, mut tokens) = (0.0, 0);
    let all: Vec<usize> = (0..windows.len()).collect();
    let overlap = windows.context().saturating_sub(windows.stride());
    pass(backend, config, weights, windows, &all, batch, |seen| {
        let counted_before = if seen.window == 0 { 0 } else { overlap };
        for (nll, _) in seen.counted().skip(counted_before) {
            nats += f64::from(nll);
            tokens += 1;
        }
        progress(seen.window + 1)
    })?;
    // A text without a counted token has no loss to speak of.
    let loss = nats / (tokens as f64).max(1.0);
    let bits_per_byte = nats / std::f64::consts::LN_2 / (bytes as f64).max(1.0);
    Ok(Measured { loss, perplexity: loss.exp(), bits_per_byte, tokens })
}
