//! Windows: the token sequences a model is trained on, cut from a token file.

use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::addressed::AddressEncoder;
use super::{Batch, IGNORE, TokenFile};
use crate::error;
use crate::threads;
use crate::tokenizer::Tokenizer;

/// Kind of windows that a token file is cut into.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum WindowKind {
    /// The first LaaM's: each document cut apart, its last window padded on the left. A token is
    /// predicted if both it and the one before it are in the window.
    Original,
    /// All documents in a row, a window every `stride` tokens. A token attends to its own document
    /// only; the token after the window is the last target.
    Stream,
    /// Each chunk of a document after its address: its path and the number of the chunk.
    #[default]
    Addressed,
}

/// The windows of a token file.
#[derive(Clone, Debug)]
pub struct Windows {
    file: Arc<TokenFile>,
    kind: WindowKind,
    context: usize,
    stride: usize,
    pad: u32,
    encoder: AddressEncoder,
    count: usize,
    /// The first window of each document, and the count of all (not for `stream`).
    firsts: Vec<usize>,
    /// The first token of each window's chunk, within its document's text (`addressed` only).
    starts: Vec<usize>,
}

/// The tokens of one window.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WindowSpan {
    /// The document (of `stream`: that of the first token).
    pub document: usize,
    /// The window's number within the document (of `stream`: of all).
    pub chunk: usize,
    /// Positions in the file of its inputs, or of the chunk after the address.
    pub tokens: Range<usize>,
}

/// All windows of a file as arrays: with the file's tokens, what a device needs to make batches.
/// Positions are those of tokens in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WindowTable {
    /// Windows of the first LaaM: documents cut into pieces, padded on the left.
    Original {
        /// First token of each window.
        starts: Vec<u64>,
        /// Tokens of each window.
        lengths: Vec<u32>,
    },
    /// Windows of the documents, one after another.
    Stream {
        /// First token of each document.
        documents: Vec<u64>,
        /// Tokens between the first tokens of two windows.
        stride: usize,
    },
    /// Chunks of documents, each after its address.
    Addressed {
        /// First token of each chunk.
        starts: Vec<u64>,
        /// Tokens of each chunk.
        lengths: Vec<u32>,
        /// Tokens of all addresses, one after another.
        addresses: Vec<u32>,
        /// Start of each address in `addresses`, and the end of the last one.
        address_starts: Vec<u32>,
    },
}

impl Windows {
    /// Cuts a token file into windows of `context` inputs each. `stride` is for `stream` alone:
    /// `context` by default.
    pub fn new(
        file: Arc<TokenFile>,
        tokenizer: Arc<Tokenizer>,
        kind: WindowKind,
        context: usize,
        stride: Option<usize>,
    ) -> anyhow::Result<Self> {
        Self::check_shape(context, stride)?;
        Self::build(file, tokenizer, kind, context, stride.unwrap_or(context))
    }

    /// Stream windows of `length` tokens, the last one a target alone, every `stride` tokens, which may
    /// leave tokens out.
    pub fn spaced(
        file: Arc<TokenFile>,
        tokenizer: Arc<Tokenizer>,
        length: usize,
        stride: usize,
    ) -> anyhow::Result<Self> {
        let context = length.saturating_sub(1);
        Self::check_shape(context, None)?;
        if stride == 0 {
            return Err(error::invalid("stride", stride, "at least 1"));
        }
        Self::build(file, tokenizer, WindowKind::Stream, context, stride)
    }

    /// The windows that are whole and within one document.
    pub fn within_documents(&self) -> anyhow::Result<Vec<usize>> {
        let is_within = |&window: &usize| Ok(self.context < self.document_rest(window)?);
        let within = |window| is_within(&window).map(|is| is.then_some(window)).transpose();
        (0..self.count).filter_map(within).collect()
    }

    /// Holds out the last `fraction` of the windows: returns the windows as they were, and which of them are
    /// held out. If there are several documents, one is held out whole or not at all (but for stream
    /// windows). No window that is left has an input of those.
    ///
    /// # Errors
    /// No window would be left.
    pub fn hold_out(&mut self, fraction: f64) -> anyhow::Result<(Windows, Vec<usize>)> {
        let all = self.clone();
        let held = ((fraction * all.count as f64).ceil() as usize).max(1);
        let mut first = all.count.saturating_sub(held);
        if let [_, .., _] = all.firsts.as_slice() {
            let document = all.firsts.partition_point(|&from| from <= first) - 1;
            let boundaries = [all.firsts[document], all.firsts[document + 1]];
            let is_inside = |at: &usize| *at > 0 && *at < all.count;
            let distance = |at: &usize| at.abs_diff(first);
            first = boundaries.into_iter().filter(is_inside).min_by_key(distance).unwrap_or(first);
        }
        self.count = first;
        while self.count > 0 && all.span(self.count - 1)?.tokens.end > all.span(first)?.tokens.start
        {
            self.count -= 1;
        }
        if self.count == 0 {
            return Err(error::config(
                format!("`validation` {fraction} of {} windows leaves none to train on", all.count),
                "hold out less, or give a corpus with more text",
            ));
        }
        let numbers = (first..all.count).collect();
        Ok((all, numbers))
    }

    /// Documents that have a token in a window.
    pub fn documents(&self) -> anyhow::Result<usize> {
        let last = self.span(self.count - 1)?.tokens.end - 1;
        Ok(self.file.document_of(last) + 1)
    }

    fn build(
        file: Arc<TokenFile>,
        tokenizer: Arc<Tokenizer>,
        kind: WindowKind,
        context: usize,
        stride: usize,
    ) -> anyhow::Result<Self> {
        threads::start_global_pool()?;
        let pad = tokenizer.pad();
        if file.header().tokenizer_sha256 != tokenizer.sha256() {
            return Err(error::data(
                format!("{} was made with another tokenizer", file.path().display()),
                "create it again with laam tokenize, or use the tokenizer it was made with",
            ));
        }
        let encoder = AddressEncoder::new(tokenizer, context);
        let (count, firsts, starts) = (0, Vec::new(), Vec::new());
        let mut windows = Self { file, kind, context, stride, pad, encoder, count, firsts, starts };
        windows.cut()?;
        if windows.count == 0 {
            return Err(error::data(
                format!("{} has too few tokens for a window", windows.file.path().display()),
                "give a corpus with more text",
            ));
        }
        Ok(windows)
    }

    /// Refuses windows that no text can be cut into.
    pub fn check_shape(context: usize, stride: Option<usize>) -> anyhow::Result<()> {
        let stride = stride.unwrap_or(context);
        if context < 2 || u32::try_from(context).is_err() || stride == 0 || stride > context {
            return Err(error::config(
                format!("invalid windows: {context} tokens, stride {stride}"),
                "`max_position_embeddings` must be at least 2, and `stride` from 1 to that",
            ));
        }
        Ok(())
    }

    /// Refuses addressed windows where documents have no names, or the tokenizer has no markers for them.
    pub fn check_names(
        kind: WindowKind,
        tokenizer: &Tokenizer,
        has_names: bool,
    ) -> anyhow::Result<()> {
        if kind != WindowKind::Addressed || (has_names && tokenizer.markers().is_ok()) {
            return Ok(());
        }
        let what = if has_names {
            "the tokenizer has no markers for names, and addressed windows begin with one"
        } else {
            "documents without names cannot be addressed"
        };
        Err(error::config(what, "set `windows` to stream or original"))
    }

    fn cut(&mut self) -> anyhow::Result<()> {
        let file = &self.file;
        let counts: Vec<usize> = match self.kind {
            WindowKind::Stream => {
                // The last token has no target; every window has to bring a new one.
                let targets = file.tokens().saturating_sub(1);
                let further = targets.saturating_sub(self.context).div_ceil(self.stride);
                let count = usize::from(targets > 0) + further;
                // Every window has a target.
                self.count = count.min(targets.div_ceil(self.stride));
                return Ok(());
            }
            WindowKind::Original => (0..file.documents())
                .map(|document| Ok(file.document(document)?.tokens.len().div_ceil(self.context)))
                .collect::<anyhow::Result<_>>()?,
            WindowKind::Addressed => {
                let starts: Vec<_> = (0..file.documents())
                    .into_par_iter()
                    .map(|document| {
                        let document = file.document(document)?;
                        if document.path.is_empty() {
                            Self::check_names(self.kind, self.encoder.tokenizer(), false)?;
                        }
                        self.encoder
                            .chunk_starts(document.path, document.tokens.end - document.text)
                    })
                    .collect();
                // The error of the first document that has one, whatever the threads' order.
                let starts = starts.into_iter().collect::<anyhow::Result<Vec<_>>>()?;
                self.starts = starts.concat();
                starts.iter().map(Vec::len).collect()
            }
        };
        self.firsts = Vec::with_capacity(counts.len() + 1);
        self.firsts.push(0);
        for count in counts {
            self.count += count;
            self.firsts.push(self.count);
        }
        Ok(())
    }

    /// The number of windows.
    #[allow(clippy::len_without_is_empty)] // there is always one
    pub fn len(&self) -> usize {
        self.count
    }

    /// Inputs per window.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Kind of the windows.
    pub fn kind(&self) -> WindowKind {
        self.kind
    }

    /// Tokens from one stream window to the next.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// File of their tokens.
    pub fn file(&self) -> &Arc<TokenFile> {
        &self.file
    }

    /// The document and tokens of a window.
    ///
    /// # Panics
    /// If there is no such window, like an index into a slice.
    pub fn span(&self, window: usize) -> anyhow::Result<WindowSpan> {
        assert!(window < self.count, "window {window} of {}", self.count);
        if self.kind == WindowKind::Stream {
            let from = window * self.stride;
            let tokens = from..(from + self.context).min(self.file.tokens());
            return Ok(WindowSpan { document: self.file.document_of(from), chunk: window, tokens });
        }
        let document = self.firsts.partition_point(|&first| first <= window) - 1;
        let chunk = window - self.firsts[document];
        let entry = self.file.document(document)?;
        let tokens = if self.kind == WindowKind::Original {
            let from = entry.tokens.start + chunk * self.context;
            from..(from + self.context).min(entry.tokens.end)
        } else {
            let last = window + 1 == self.firsts[document + 1];
            let to = if last { entry.tokens.end } else { entry.text + self.starts[window + 1] };
            entry.text + self.starts[window]..to
        };
        Ok(WindowSpan { document, chunk, tokens })
    }

    /// All windows as arrays.
    pub fn table(&self) -> anyhow::Result<WindowTable> {
        if self.kind == WindowKind::Stream {
            let documents = (0..self.file.documents())
                .map(|document| Ok(self.file.document(document)?.tokens.start as u64))
                .collect::<anyhow::Result<_>>()?;
            return Ok(WindowTable::Stream { documents, stride: self.stride });
        }
        let spans = (0..self.count)
            .into_par_iter()
            .map(|window| self.span(window))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let starts = spans.iter().map(|span| span.tokens.start as u64).collect();
        let lengths = spans.iter().map(|span| span.tokens.len() as u32).collect();
        if self.kind == WindowKind::Original {
            return Ok(WindowTable::Original { starts, lengths });
        }
        let addresses =
            spans.par_iter().map(|span| self.address(span)).collect::<anyhow::Result<Vec<_>>>()?;
        let mut address_starts = Vec::with_capacity(addresses.len() + 1);
        address_starts.push(0);
        let mut end = 0;
        for address in &addresses {
            end += address.len();
            address_starts.push(u32::try_from(end).map_err(|_| {
                error::data(
                    format!("the addresses of {} windows have too many tokens", self.count),
                    "increase `max_position_embeddings`, or set `windows` to stream",
                )
            })?);
        }
        Ok(WindowTable::Addressed {
            starts,
            lengths,
            addresses: addresses.concat(),
            address_starts,
        })
    }

    /// Tokens from a window's first on to the end of its document.
    ///
    /// # Errors
    /// The token file cannot be read.
    pub fn document_rest(&self, window: usize) -> anyhow::Result<usize> {
        let span = self.span(window)?;
        Ok(self.file.document(span.document)?.tokens.end - span.tokens.start)
    }

    /// Targets of a window.
    pub fn counted(&self, window: usize) -> anyhow::Result<usize> {
        let Range { start, end } = self.span(window)?.tokens;
        Ok(match self.kind {
            WindowKind::Original => end - start - 1,
            WindowKind::Stream => end.min(self.file.tokens() - 1) - start,
            WindowKind::Addressed => end - start,
        })
    }

    /// The padding token.
    pub fn pad(&self) -> u32 {
        self.pad
    }

    /// A batch of the windows with these numbers.
    pub fn draw(&self, windows: &[usize]) -> anyhow::Result<Batch> {
        let mut batch = Batch::default();
        self.draw_into(windows, &mut batch)?;
        Ok(batch)
    }

    /// Draws into a batch whose memory is used again.
    pub fn draw_into(&self, windows: &[usize], batch: &mut Batch) -> anyhow::Result<()> {
        let context = self.context;
        let positions = windows.len() * context;
        (batch.windows, batch.context) = (windows.len(), context);
        for (numbers, fill) in [
            (&mut batch.ids, self.pad),
            (&mut batch.targets, IGNORE),
            // Beyond every position: padding attends to nothing.
            (&mut batch.first_key, context as u32),
        ] {
            numbers.clear();
            numbers.resize(positions, fill);
        }
        let rows = batch
            .ids
            .chunks_exact_mut(context)
            .zip(batch.targets.chunks_exact_mut(context))
            .zip(batch.first_key.chunks_exact_mut(context));
        let mut sequence = Vec::with_capacity(context + 1);
        for (&window, ((ids, targets), first_key)) in windows.iter().zip(rows) {
            let span = self.span(window)?;
            // An address, if the windows have one, and the span's tokens: inputs from position
            // `from` on. One token more than there are inputs is a target alone.
            let (mut from, mut tokens) = (0, span.tokens.clone());
            sequence.clear();
            match self.kind {
                WindowKind::Original => from = context - tokens.len(),
                WindowKind::Stream => tokens.end = (tokens.end + 1).min(self.file.tokens()),
                WindowKind::Addressed => sequence.extend(self.address(&span)?),
            }
            // The token at the previous position predicts a target: the first of all has none.
            let first_target = sequence.len().max(1);
            let address = sequence.len();
            sequence.resize(address + tokens.len(), 0);
            self.file.read(tokens.start, &mut sequence[address..])?;
            let inputs = sequence.len().min(context);
            ids[from..from + inputs].copy_from_slice(&sequence[..inputs]);
            targets[from + first_target - 1..from + sequence.len() - 1]
                .copy_from_slice(&sequence[first_target..]);
            first_key[from..from + inputs].fill(from as u32);
            if self.kind == WindowKind::Stream {
                self.mask_documents(&span, first_key)?;
            }
        }
        Ok(())
    }

    /// The tokens of an addressed window's address.
    fn address(&self, span: &WindowSpan) -> anyhow::Result<Vec<u32>> {
        let path = self.file.document(span.document)?.path;
        Ok(self.encoder.address(path, span.chunk)?.ids)
    }

    /// Lets every position of a stream window attend to its own document only.
    fn mask_documents(&self, span: &WindowSpan, first_key: &mut [u32]) -> anyhow::Result<()> {
        let Range { start, end } = span.tokens;
        let (mut document, mut from) = (span.document, start);
        while from < end && document < self.file.documents() {
            let tokens = self.file.document(document)?.tokens;
            let to = tokens.end.clamp(from, end);
            first_key[from - start..to - start].fill(tokens.start.saturating_sub(start) as u32);
            from = to;
            document += 1;
        }
        Ok(())
    }
}
