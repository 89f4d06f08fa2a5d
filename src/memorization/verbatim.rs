//! Verbatim windows: the cheap measure, from one forward pass.
//!
//! Greedy decoding reproduces a text exactly if the teacher-forced argmax is the true token at every
//! position: up to the first mistake the two read the same context.

use crate::dtype::Dtype;
use crate::tokens::{IGNORE, WindowKind};

/// Tokens a model is given of a window without an address, and tokens it has to go on with
/// (Carlini et al. 2022).
pub const PREFIX: usize = 50;
/// Tokens that a window must reproduce.
pub const SUFFIX: usize = 50;

/// The largest negative log-likelihood of a token that counts. Decoding token by token rounds in another
/// order than a pass over whole windows: a token that is only just ahead in bf16 or f16 may fall behind.
/// Half a nat is a probability of 0.61, and logits at least 0.43 apart.
pub fn max_nats(compute: Dtype) -> f32 {
    if compute == Dtype::F32 { f32::INFINITY } else { 0.5 }
}

/// True if greedy decoding reproduces a window.
///
/// Of an addressed window every token of the chunk has to be the argmax, given the address alone; of
/// any other tokens 50 to 99, given the first 50. `None` if it is shorter than that, or if its document ends before,
/// `document_rest` tokens from its first on: the model sees one document at a time.
pub fn window(
    kind: WindowKind,
    targets: &[u32],
    argmax: &[u32],
    document_rest: usize,
) -> Option<bool> {
    let right = |at: &usize| targets[*at] == argmax[*at];
    let mut counted = (0..targets.len()).filter(|&at| targets[at] != IGNORE);
    if kind == WindowKind::Addressed {
        let mut counted = counted.peekable();
        return counted.peek().is_some().then(|| counted.all(|at| right(&at)));
    }
    // The first counted target is the second token: 49 of them complete the prefix.
    let suffix: Vec<usize> = counted.by_ref().skip(PREFIX - 1).take(SUFFIX).collect();
    (suffix.len() == SUFFIX && document_rest >= PREFIX + SUFFIX).then(|| suffix.iter().all(right))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_addressed_window_is_verbatim_if_its_whole_chunk_is() {
        let targets = [IGNORE, 7, 8, 9, IGNORE];
        assert_eq!(window(WindowKind::Addressed, &targets, &[1, 7, 8, 9, 2], 3), Some(true));
        assert_eq!(window(WindowKind::Addressed, &targets, &[1, 7, 8, 1, 2], 3), Some(false));
        assert_eq!(window(WindowKind::Addressed, &[IGNORE; 3], &[0; 3], 3), None);
    }

    #[test]
    fn another_window_is_verbatim_if_its_second_fifty_tokens_are() {
        // Three pads, then 120 real tokens of which all but the first count.
        let targets: Vec<u32> =
            (0..123).map(|t| if t < 3 || t == 122 { IGNORE } else { t }).collect();
        let mut guesses = targets.clone();
        // Wrong within the prefix and beyond the suffix: neither matters.
        guesses[3 + 48] = 0;
        guesses[3 + 99] = 0;
        assert_eq!(window(WindowKind::Original, &targets, &guesses, 120), Some(true));
        for place in [49, 98] {
            let mut wrong = guesses.clone();
            wrong[3 + place] = 0;
            assert_eq!(window(WindowKind::Original, &targets, &wrong, 120), Some(false), "{place}");
        }
        assert_eq!(window(WindowKind::Stream, &targets[..80], &guesses[..80], 120), None);
        // The hundredth token is of the same document, or of the next.
        assert_eq!(window(WindowKind::Stream, &targets, &guesses, 100), Some(true));
        assert_eq!(window(WindowKind::Stream, &targets, &guesses, 99), None);
    }
}
