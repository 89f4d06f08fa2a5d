//! Input of one forward pass.

/// The target of a position that is not counted in the loss.
pub const IGNORE: u32 = u32::MAX;

/// `windows` windows of `context` tokens each; every vector is `[windows, context]`, row-major.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Number of windows.
    pub windows: usize,
    /// Positions per window.
    pub context: usize,
    /// The token at each position.
    pub ids: Vec<u32>,
    /// The next token, or [`IGNORE`].
    pub targets: Vec<u32>,
    /// The attention mask: each position attends to the positions `first_key..=position` of its window,
    /// and to none if its `first_key` is beyond it (its attention output is 0). Serves causal attention
    /// (0), left padding, several documents in a window, and addressed windows.
    pub first_key: Vec<u32>,
}

impl Batch {
    /// Positions that count in the loss.
    pub fn counted(&self) -> usize {
        self.targets.iter().filter(|&&target| target != IGNORE).count()
    }

    /// Ids, targets and first keys, for the inputs of a program.
    pub fn arrays(&self) -> [&[u32]; 3] {
        [&self.ids, &self.targets, &self.first_key]
    }

    /// The windows `from..to` as a batch of their own.
    #[must_use]
    pub fn slice(&self, from: usize, to: usize) -> Batch {
        let positions = from * self.context..to * self.context;
        Batch {
            windows: to - from,
            context: self.context,
            ids: self.ids[positions.clone()].to_vec(),
            targets: self.targets[positions.clone()].to_vec(),
            first_key: self.first_key[positions].to_vec(),
        }
    }
}
