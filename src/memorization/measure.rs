//! Memorization of a text, measured by one forward pass.
//!
//! Greedy decoding reproduces a passage exactly if every teacher-forced argmax is the true token. So one
//! pass over the windows gives, for each, whether greedy decoding continues its prefix with the true
//! suffix (Carlini et al. 2022), the probability p_z of that suffix under sampling (Hayes et al. 2024;
//! over a whole text, Cooper et al. 2025), and the residual bits of the text under the model.

use std::collections::BTreeMap;
use std::f64::consts::{LN_2, LN_10};
use std::ops::Range;

use serde::Serialize;

use super::occurrences::{OccurrenceTally, count, tallies};
use super::pass::{WindowResult, pass};
use super::rate::MatchRate;
use crate::backend::Backend;
use crate::model::Config;
use crate::tokenizer::Tokenizer;
use crate::tokens::{TokenFile, WindowKind, Windows};

/// Prefix lengths that are always tested.
pub const PREFIXES: [usize; 7] = [8, 16, 32, 50, 100, 200, 400];

/// Lengths of an extraction test: given `prefix` true tokens of a window, the model has to generate the
/// next `suffix` tokens. In an addressed window both belong to the chunk, after the address. Both are of one document.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Question {
    /// True tokens given.
    pub prefix: usize,
    /// Tokens to be generated.
    pub suffix: usize,
}

impl Question {
    /// Tokens of the passage: prefix and suffix.
    pub fn tokens(self) -> usize {
        self.prefix.saturating_add(self.suffix)
    }
}

/// Result of one test over all windows that are long enough for it within one document.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Tally {
    /// Lengths of prefix and suffix.
    #[serde(flatten)]
    pub question: Question,
    /// Windows tested and reproduced.
    #[serde(flatten)]
    pub share: MatchRate,
}

impl Tally {
    fn of(prefix: usize, suffix: usize) -> Self {
        Self { question: Question { prefix, suffix }, share: MatchRate::default() }
    }
}

/// Histogram of windows by p_z, the product of the suffix's conditional token probabilities.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Histogram {
    /// Lower bounds of the bins; the last one ends at 1.
    pub from: [f64; 8],
    /// Windows in each bin.
    pub windows: [usize; 8],
}

/// (n, p)-discoverable: drawn `n` times, the suffix comes at least once with probability `p`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Discoverable {
    /// Number of samples.
    pub n: u32,
    /// Probability of at least one match.
    pub p: f64,
    /// The part of the windows.
    pub rate: Option<f64>,
    /// Its 95% confidence interval: see [`wilson`](super::rate::wilson).
    pub interval: Option<[f64; 2]>,
}

/// A run of a file's tokens, each the argmax.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct VerbatimRun {
    /// Path of the file.
    pub path: String,
    /// Bytes of the file before it.
    pub byte: u64,
    /// Bytes of the run.
    pub bytes: u64,
}

/// Measures of one file. Its path and the first token of a window, which nothing predicts, do not
/// count.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct FileMeasures {
    /// Path of the file.
    pub path: String,
    /// Bytes of the tokens that were predicted.
    pub bytes: u64,
    /// Tokens of the text, and its end.
    pub tokens: u64,
    /// Tokens that were the argmax.
    pub tokens_correct: u64,
    /// Negative log2-likelihood of the text.
    pub bits: f64,
    /// Bytes of the longest run of argmax tokens.
    pub longest_run_bytes: u64,
    /// Windows tested, and those that greedy decoding reproduces.
    pub windows: usize,
    /// Windows that greedy decoding reproduces.
    pub verbatim: usize,
}

/// Data of a file's heat strip.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct FileHeat {
    /// Path of the file.
    pub path: String,
    /// Text of the file.
    pub text: String,
    /// One cell for every [`HEAT_CELL_TOKENS`] tokens: its bytes, and log10 of p_z, the product of its tokens'
    /// probabilities. `None` if more of its tokens than a window's first were not predicted.
    pub cells: Vec<(u32, Option<f32>)>,
    /// Byte ranges of tokens that were not the argmax: from, to.
    pub wrong: Vec<(u32, u32)>,
}

/// Result of one window.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Answer {
    /// Index of the window.
    pub window: usize,
    /// Index of its file in [`Memorized::files`].
    pub file: usize,
    /// Greedy decoding reproduces the suffix.
    pub exact: bool,
    /// Natural logarithm of p_z.
    pub log_p: f64,
    /// Position of the passage, prefix and suffix, in the token file.
    pub start: usize,
    /// Occurrences of the passage in the text, counted by [`Memorized::count_occurrences`].
    pub occurrences: u64,
}

/// Memorization of a text.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Memorized {
    /// Rate of the windows whose suffix greedy decoding reproduces.
    pub verbatim_rate: Option<f64>,
    /// Its 95% confidence interval: see [`wilson`](super::rate::wilson).
    pub verbatim_interval: Option<[f64; 2]>,
    /// Rates by prefix length.
    pub by_prefix: BTreeMap<usize, Option<f64>>,
    /// Counts by prefix length.
    pub prefixes: Vec<Tally>,
    /// With prefix and suffix of 32 tokens (Biderman et al. 2023).
    pub pythia: Tally,
    /// Addressed windows whose whole chunk is reproduced from the address alone.
    pub from_address: Option<MatchRate>,
    /// Rates by how often the passage, prefix and suffix together, occurs in the text.
    pub by_occurrence: Vec<OccurrenceTally>,
    /// Histogram of the windows by p_z.
    pub p_z: Histogram,
    /// Rates of (n, p)-discoverable windows.
    pub discoverable: Vec<Discoverable>,
    /// Mean negative log-likelihood of the text's tokens, in nats.
    pub loss: f64,
    /// Tokens that were predicted.
    pub tokens: u64,
    /// Tokens that were the argmax.
    pub tokens_correct: u64,
    /// Bytes of the predicted tokens.
    pub bytes: u64,
    /// Negative log2-likelihood of the text: so many more bits would encode it exactly.
    pub residual_bits: f64,
    /// `residual_bits` per byte of text.
    pub bits_per_byte: f64,
    /// Bytes of the longest run of argmax tokens.
    pub longest_run_bytes: u64,
    /// Longest run of argmax tokens.
    pub longest_run: VerbatimRun,
    /// Measures of each file.
    pub files: Vec<FileMeasures>,
    /// Results of each window.
    #[serde(skip)]
    pub answers: Vec<Answer>,
    /// Heat strips of each file.
    #[serde(skip)]
    pub heat: Vec<FileHeat>,
}

impl Memorized {
    /// The windows tested, and those that greedy decoding reproduces.
    pub fn asked(&self) -> MatchRate {
        let exact = self.answers.iter().filter(|answer| answer.exact).count();
        MatchRate::of(exact, self.answers.len())
    }

    /// Counts how often each passage of the question occurs in the text that its windows were cut from, at positions
    /// that `is_counted`.
    pub fn count_occurrences(
        &mut self,
        file: &TokenFile,
        question: Question,
        is_counted: impl Fn(&Range<usize>) -> bool,
    ) -> anyhow::Result<()> {
        let starts: Vec<usize> = self.answers.iter().map(|answer| answer.start).collect();
        let counts = count(file, &starts, question.tokens(), file, is_counted)?;
        for (answer, count) in self.answers.iter_mut().zip(counts) {
            answer.occurrences = count;
        }
        let counted = self.answers.iter().map(|answer| (answer.occurrences, answer.exact));
        self.by_occurrence = tallies(counted);
        Ok(())
    }
}

/// Tokens of a cell of [`FileHeat`].
pub const HEAT_CELL_TOKENS: usize = 50;

/// Limit on the text in heat strips: a page with more would not open.
const MAX_HEAT_BYTES: usize = 8 << 20;

/// The windows of these numbers, in ascending order, `batch` at a time. `progress` gets the last
/// finished window; its error ends the pass.
pub fn measure(
    backend: &dyn Backend,
    config: &Config,
    weights: &[f32],
    windows: &Windows,
    tokenizer: &Tokenizer,
    numbers: &[usize],
    question: Question,
    batch: usize,
    mut progress: impl FnMut(usize) -> anyhow::Result<()>,
) -> anyhow::Result<Memorized> {
    let mut walk = FileWalk::new(windows, tokenizer, question);
    pass(backend, config, weights, windows, numbers, batch, |seen| {
        progress(seen.window + 1)?;
        walk.take(&seen)
    })?;
    Ok(walk.finish())
}

/// At most `most` windows of `all`, evenly spread.
pub fn spread(all: usize, most: usize) -> Vec<usize> {
    let count = all.min(most);
    (0..count).map(|at| at * all / count).collect()
}

/// Accumulates the measures window by window, and file by file.
struct FileWalk<'a> {
    windows: &'a Windows,
    tokenizer: &'a Tokenizer,
    /// Result of the requested test; those of all prefix lengths are in `prefixes`.
    asked: Tally,
    prefixes: Vec<Tally>,
    pythia: Tally,
    from_address: Option<MatchRate>,
    answers: Vec<Answer>,
    file: Option<OpenFile>,
    files: Vec<FileMeasures>,
    longest: VerbatimRun,
    heat: Vec<FileHeat>,
    pictured: usize,
}

impl<'a> FileWalk<'a> {
    fn new(windows: &'a Windows, tokenizer: &'a Tokenizer, question: Question) -> Self {
        let Question { prefix, suffix } = question;
        let addressed = windows.kind() == WindowKind::Addressed;
        Self {
            windows,
            tokenizer,
            asked: Tally::of(prefix, suffix),
            prefixes: PREFIXES.map(|prefix| Tally::of(prefix, suffix)).to_vec(),
            pythia: Tally::of(32, 32),
            from_address: addressed.then(MatchRate::default),
            answers: Vec::new(),
            file: None,
            files: Vec::new(),
            longest: VerbatimRun::default(),
            heat: Vec::new(),
            pictured: 0,
        }
    }

    fn take(&mut self, seen: &WindowResult) -> anyhow::Result<()> {
        let place = self.windows.span(seen.window)?;
        self.enter(place.document)?;
        let counted: Vec<(f32, bool)> = seen.counted().collect();
        // The first token of a window without an address is given, and no target.
        let given = usize::from(self.windows.kind() != WindowKind::Addressed);

        let rest = self.windows.document_rest(seen.window)?;
        let suffix_of = |question: Question| {
            let from = question.prefix.checked_sub(given)?;
            let is_within = question.tokens() <= rest;
            counted.get(from..from.checked_add(question.suffix)?).filter(|_| is_within)
        };
        let is_exact = |positions: &[(f32, bool)]| positions.iter().all(|(_, right)| *right);
        for tally in self.prefixes.iter_mut().chain([&mut self.pythia]) {
            if let Some(suffix) = suffix_of(tally.question) {
                tally.share.add(is_exact(suffix));
            }
        }
        if let Some(share) = &mut self.from_address {
            share.add(is_exact(&counted));
        }
        if let Some(suffix) = suffix_of(self.asked.question) {
            let exact = is_exact(suffix);
            let log_p = -suffix.iter().map(|(nll, _)| f64::from(*nll)).sum::<f64>();
            let (window, file) = (seen.window, self.files.len());
            self.asked.share.add(exact);
            let start = place.tokens.start;
            self.answers.push(Answer { window, file, exact, log_p, start, occurrences: 0 });
            if let Some(file) = &mut self.file {
                file.measures.windows += 1;
                file.measures.verbatim += usize::from(exact);
            }
        }

        for (at, &(nll, right)) in counted.iter().enumerate() {
            let position = place.tokens.start + given + at;
            // A stream's window may go on into the next files.
            while let Some(file) = self.file.as_ref().filter(|file| position >= file.text.end) {
                let next = file.document + 1;
                self.enter(next)?;
            }
            if let Some(file) = self.file.as_mut().filter(|file| position >= file.text.start) {
                file.take(position, nll, right);
            }
        }
        Ok(())
    }

    /// Goes on to a document, unless it is the present one.
    fn enter(&mut self, document: usize) -> anyhow::Result<()> {
        if self.file.as_ref().is_none_or(|file| file.document != document) {
            self.leave();
            self.file = Some(OpenFile::open(self.windows.file(), self.tokenizer, document)?);
        }
        Ok(())
    }

    fn leave(&mut self) {
        let Some(file) = self.file.take() else { return };
        let OpenFile { ends, measures, mut heat, predicted, longest, .. } = file;
        let cells = heat.cells.iter_mut().zip(ends.chunks(HEAT_CELL_TOKENS)).zip(predicted);
        for (((_, p_z), tokens), predicted) in cells {
            if predicted + 1 < tokens.len() {
                *p_z = None;
            }
        }
        if u64::from(longest.1) > self.longest.bytes {
            let path = measures.path.clone();
            self.longest = VerbatimRun { path, byte: longest.0.into(), bytes: longest.1.into() };
        }
        self.files.push(measures);
        self.pictured += heat.text.len();
        if self.pictured <= MAX_HEAT_BYTES {
            self.heat.push(heat);
        }
    }

    fn finish(mut self) -> Memorized {
        self.leave();
        let p_z: Vec<f64> = self.answers.iter().map(|answer| answer.log_p.exp()).collect();
        let mut discoverable = Vec::new();
        for n in [1, 10, 100] {
            for p in [0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99] {
                let found = p_z.iter().filter(|&&p_z| within(n, p_z) >= p).count();
                let MatchRate { rate, interval, .. } = MatchRate::of(found, p_z.len());
                discoverable.push(Discoverable { n, p, rate, interval });
            }
        }
        let sum = |of: fn(&FileMeasures) -> u64| self.files.iter().map(of).sum::<u64>();
        let (tokens, bytes) = (sum(|file| file.tokens), sum(|file| file.bytes));
        let residual_bits: f64 = self.files.iter().map(|file| file.bits).sum();
        let mut by_prefix: BTreeMap<usize, Option<f64>> =
            self.prefixes.iter().map(|tally| (tally.question.prefix, tally.share.rate)).collect();
        by_prefix.insert(self.asked.question.prefix, self.asked.share.rate);
        Memorized {
            verbatim_rate: self.asked.share.rate,
            verbatim_interval: self.asked.share.interval,
            by_prefix,
            pythia: self.pythia,
            from_address: self.from_address,
            by_occurrence: Vec::new(),
            p_z: Histogram::new(&p_z),
            discoverable,
            loss: residual_bits * LN_2 / (tokens as f64).max(1.0),
            tokens,
            tokens_correct: sum(|file| file.tokens_correct),
            bytes,
            residual_bits,
            bits_per_byte: residual_bits / (bytes as f64).max(1.0),
            longest_run_bytes: self.longest.bytes,
            longest_run: self.longest,
            prefixes: self.prefixes,
            files: self.files,
            answers: self.answers,
            heat: self.heat,
        }
    }
}

/// The file that a walk is in.
struct OpenFile {
    document: usize,
    /// Positions of its text in the token file, its end included.
    text: Range<usize>,
    /// Bytes of the text up to the end of each token.
    ends: Vec<u32>,
    measures: FileMeasures,
    heat: FileHeat,
    /// The first position that no window has predicted yet: where windows overlap, the first of them counts.
    next: usize,
    /// Predicted tokens of each cell.
    predicted: Vec<usize>,
    /// The current run: its first byte, and the position that would continue it.
    run: (u32, usize),
    /// The longest run: its first byte, and its bytes.
    longest: (u32, u32),
}

impl OpenFile {
    fn open(file: &TokenFile, tokenizer: &Tokenizer, document: usize) -> anyhow::Result<Self> {
        let entry = file.document(document)?;
        let text = entry.text..entry.tokens.end;
        let mut ids = vec![0; text.len()];
        file.read(text.start, &mut ids)?;
        let end = tokenizer.end_of_document()?;
        let (mut bytes, mut ends) = (Vec::new(), Vec::new());
        for (at, id) in ids.into_iter().enumerate() {
            // A marker ends the text, and is no part of it.
            if id != end {
                bytes.extend(tokenizer.token_bytes(id, at == 0)?);
            }
            ends.push(bytes.len() as u32);
        }
        let mut from = 0;
        let cells = ends.chunks(HEAT_CELL_TOKENS).map(|cell| {
            let to = cell[cell.len() - 1];
            (to - std::mem::replace(&mut from, to), None)
        });
        let cells: Vec<(u32, Option<f32>)> = cells.collect();
        let (next, predicted) = (text.start, vec![0; cells.len()]);
        let path = match entry.path {
            "" => format!("document {}", document + 1),
            path => path.to_string(),
        };
        let heat = FileHeat {
            path: path.clone(),
            text: String::from_utf8_lossy(&bytes).into_owned(),
            cells,
            wrong: Vec::new(),
        };
        let measures = FileMeasures { path, ..FileMeasures::default() };
        let (run, longest) = ((0, 0), (0, 0));
        Ok(Self { document, text, ends, measures, heat, next, predicted, run, longest })
    }

    /// A token of the text that was predicted.
    fn take(&mut self, position: usize, nll: f32, right: bool) {
        if position < self.next {
            return;
        }
        self.next = position + 1;
        let at = position - self.text.start;
        let from = if at == 0 { 0 } else { self.ends[at - 1] };
        let to = self.ends[at];
        let measures = &mut self.measures;
        measures.tokens += 1;
        measures.tokens_correct += u64::from(right);
        measures.bytes += u64::from(to - from);
        measures.bits += f64::from(nll) / LN_2;
        let cell = at / HEAT_CELL_TOKENS;
        self.predicted[cell] += 1;
        *self.heat.cells[cell].1.get_or_insert(0.0) -= nll / LN_10 as f32;
        if !right {
            match self.heat.wrong.last_mut() {
                Some(last) if last.1 == from => last.1 = to,
                _ => self.heat.wrong.push((from, to)),
            }
            return;
        }
        if self.run.1 != position || position == 0 {
            self.run.0 = from;
        }
        self.run.1 = position + 1;
        if to - self.run.0 > self.longest.1 {
            self.longest = (self.run.0, to - self.run.0);
            measures.longest_run_bytes = self.longest.1.into();
        }
    }
}

/// The probability that something of probability `p` happens at least once in `n` times.
fn within(n: u32, p: f64) -> f64 {
    // As 1 - (1 - p)^n, but exact for small p.
    -(f64::from(n) * (-p.min(1.0)).ln_1p()).exp_m1()
}

impl Histogram {
    fn new(p_z: &[f64]) -> Self {
        let from = [0.0, 1e-12, 1e-6, 1e-3, 0.01, 0.1, 0.5, 0.9];
        let mut windows = [0; 8];
        for p_z in p_z {
            windows[from.partition_point(|from| *from <= p_z.max(0.0)) - 1] += 1;
        }
        Self { from, windows }
    }
}
