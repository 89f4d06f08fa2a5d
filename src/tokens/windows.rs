//! Windows: what of a token file a model sees at once, and what it has to predict there.

use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::addressed::Frame;
use super::{Batch, IGNORE, TokenFile};
use crate::error;
use crate::tokenizer::Tokenizer;

/// How a token file is cut into windows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The first LaaM's: each document cut apart, its last window padded on the left. A token is
    /// predicted if both it and the one before it are in the window.
    Original,
    /// All documents in a row, a window every `stride` tokens; a token sees its own document only,
    /// and predicts the next even beyond the window.
    Stream,
    /// Each chunk of a document after its address: its path and the number of the chunk.
    #[default]
    Addressed,
}

/// The windows of a token file.
#[derive(Debug)]
pub struct Windows {
    file: Arc<TokenFile>,
    kind: Kind,
    context: usize,
    stride: usize,
    pad: u32,
    frame: Frame,
    count: usize,
    /// The first window of each document, and the count of all (not for `stream`).
    firsts: Vec<usize>,
    /// Where each window's stretch begins in its document's text (`addressed` only).
    starts: Vec<usize>,
}

/// Where a window is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The document (of `stream`: that of the first token).
    pub document: usize,
    /// The window's number within the document (of `stream`: of all).
    pub chunk: usize,
    /// Its tokens, as positions in the file: its inputs, or the stretch behind the address.
    pub tokens: Range<usize>,
}

/// Where all windows of a file lie: with its tokens, all that drawing them elsewhere takes.
/// Positions are those of tokens in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Places {
    Original {
        starts: Vec<u64>,
        lengths: Vec<u32>,
    },
    Stream {
        /// Where each document begins.
        documents: Vec<u64>,
        stride: usize,
    },
    Addressed {
        /// Of the stretches.
        starts: Vec<u64>,
        lengths: Vec<u32>,
        /// The addresses of all windows in a row, and where each begins and the last one ends.
        addresses: Vec<u32>,
        address_starts: Vec<u32>,
    },
}

impl Windows {
    /// Cuts a token file into windows of `context` inputs each. `stride` is for `stream` alone:
    /// `context` by default.
    pub fn new(
        file: Arc<TokenFile>,
        tokenizer: Arc<Tokenizer>,
        kind: Kind,
        context: usize,
        stride: Option<usize>,
    ) -> anyhow::Result<Self> {
        let pad = tokenizer.markers()?.pad;
        if file.header().tokenizer_sha256 != tokenizer.sha256() {
            return Err(error::data(
                format!("{} was made with another tokenizer", file.path().display()),
                "create it again with laam tokenize, or use the tokenizer it was made with",
            ));
        }
        let stride = stride.unwrap_or(context);
        if context < 2 || u32::try_from(context).is_err() || stride == 0 || stride > context {
            return Err(error::config(
                format!("invalid windows: {context} tokens, stride {stride}"),
                "`max_position_embeddings` must be at least 2, and `stride` from 1 to that",
            ));
        }
        let frame = Frame::new(tokenizer, context);
        let (count, firsts, starts) = (0, Vec::new(), Vec::new());
        let mut windows = Self { file, kind, context, stride, pad, frame, count, firsts, starts };
        windows.cut()?;
        if windows.count == 0 {
            return Err(error::data(
                format!("{} has too few tokens for a window", windows.file.path().display()),
                "give a corpus with more text",
            ));
        }
        Ok(windows)
    }

    fn cut(&mut self) -> anyhow::Result<()> {
        let file = &self.file;
        let counts: Vec<usize> = match self.kind {
            Kind::Stream => {
                // The last token has no next one; a window that would bring no new target is none.
                let targets = file.tokens().saturating_sub(1);
                let further = targets.saturating_sub(self.context).div_ceil(self.stride);
                self.count = usize::from(targets > 0) + further;
                return Ok(());
            }
            Kind::Original => (0..file.documents())
                .map(|document| Ok(file.document(document)?.tokens.len().div_ceil(self.context)))
                .collect::<anyhow::Result<_>>()?,
            Kind::Addressed => {
                let starts = (0..file.documents())
                    .into_par_iter()
                    .map(|document| {
                        let document = file.document(document)?;
                        self.frame.starts(document.path, document.tokens.end - document.text)
                    })
                    .collect::<anyhow::Result<Vec<_>>>()?;
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

    /// The inputs of a window.
    pub fn context(&self) -> usize {
        self.context
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    pub fn file(&self) -> &TokenFile {
        &self.file
    }

    /// Where a window is.
    ///
    /// # Panics
    /// If there is no such window, like an index into a slice.
    pub fn place(&self, window: usize) -> anyhow::Result<Place> {
        assert!(window < self.count, "window {window} of {}", self.count);
        if self.kind == Kind::Stream {
            let from = window * self.stride;
            let tokens = from..(from + self.context).min(self.file.tokens());
            return Ok(Place { document: self.file.document_of(from), chunk: window, tokens });
        }
        let document = self.firsts.partition_point(|&first| first <= window) - 1;
        let chunk = window - self.firsts[document];
        let entry = self.file.document(document)?;
        let tokens = if self.kind == Kind::Original {
            let from = entry.tokens.start + chunk * self.context;
            from..(from + self.context).min(entry.tokens.end)
        } else {
            let last = window + 1 == self.firsts[document + 1];
            let to = if last { entry.tokens.end } else { entry.text + self.starts[window + 1] };
            entry.text + self.starts[window]..to
        };
        Ok(Place { document, chunk, tokens })
    }

    /// Where all windows lie.
    pub fn places(&self) -> anyhow::Result<Places> {
        if self.kind == Kind::Stream {
            let documents = (0..self.file.documents())
                .map(|document| Ok(self.file.document(document)?.tokens.start as u64))
                .collect::<anyhow::Result<_>>()?;
            return Ok(Places::Stream { documents, stride: self.stride });
        }
        let places = (0..self.count)
            .into_par_iter()
            .map(|window| self.place(window))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let starts = places.iter().map(|place| place.tokens.start as u64).collect();
        let lengths = places.iter().map(|place| place.tokens.len() as u32).collect();
        if self.kind == Kind::Original {
            return Ok(Places::Original { starts, lengths });
        }
        let prefixes = places
            .par_iter()
            .map(|place| {
                let path = self.file.document(place.document)?.path;
                Ok(self.frame.prefix(path, place.chunk)?.ids)
            })
            .collect::<anyhow::Result<Vec<_>>>()?;
        let mut address_starts = Vec::with_capacity(prefixes.len() + 1);
        address_starts.push(0);
        let mut end = 0;
        for prefix in &prefixes {
            end += prefix.len();
            address_starts.push(u32::try_from(end).map_err(|_| {
                error::data(
                    format!("the addresses of {} windows have too many tokens", self.count),
                    "increase `max_position_embeddings`, or set `windows` to stream",
                )
            })?);
        }
        Ok(Places::Addressed { starts, lengths, addresses: prefixes.concat(), address_starts })
    }

    /// How many positions of a window count in the loss.
    pub fn counted(&self, window: usize) -> anyhow::Result<usize> {
        let Range { start, end } = self.place(window)?.tokens;
        Ok(match self.kind {
            Kind::Original => end - start - 1,
            Kind::Stream => end.min(self.file.tokens() - 1) - start,
            Kind::Addressed => end - start,
        })
    }

    /// The id of padding.
    pub fn pad(&self) -> u32 {
        self.pad
    }

    /// The windows of these numbers, as a batch.
    pub fn draw(&self, windows: &[usize]) -> anyhow::Result<Batch> {
        let mut batch = Batch::default();
        self.draw_into(windows, &mut batch)?;
        Ok(batch)
    }

    /// The same into a batch whose memory is used again.
    pub fn draw_into(&self, windows: &[usize], batch: &mut Batch) -> anyhow::Result<()> {
        let context = self.context;
        let positions = windows.len() * context;
        (batch.windows, batch.context) = (windows.len(), context);
        for (numbers, fill) in [
            (&mut batch.ids, self.pad),
            (&mut batch.targets, IGNORE),
            // Beyond every column: a padded one sees nothing.
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
        for (&window, ((ids, targets), first_key)) in windows.iter().zip(rows) {
            let place = self.place(window)?;
            match self.kind {
                Kind::Original => self.original(&place, ids, targets, first_key)?,
                Kind::Stream => self.stream(&place, ids, targets, first_key)?,
                Kind::Addressed => self.addressed(&place, ids, targets, first_key)?,
            }
        }
        Ok(())
    }

    fn original(
        &self,
        place: &Place,
        ids: &mut [u32],
        targets: &mut [u32],
        first_key: &mut [u32],
    ) -> anyhow::Result<()> {
        let pads = self.context - place.tokens.len();
        self.file.read(place.tokens.start, &mut ids[pads..])?;
        // The first real token has no real one before it, and the last column no next one.
        targets[pads..self.context - 1].copy_from_slice(&ids[pads + 1..]);
        first_key[pads..].fill(pads as u32);
        Ok(())
    }

    fn stream(
        &self,
        place: &Place,
        ids: &mut [u32],
        targets: &mut [u32],
        first_key: &mut [u32],
    ) -> anyhow::Result<()> {
        let Range { start, end } = place.tokens;
        let real = end - start;
        self.file.read(start, &mut ids[..real])?;
        let next = (end + 1).min(self.file.tokens()) - (start + 1);
        self.file.read(start + 1, &mut targets[..next])?;
        // Column by column of each document in the window.
        let mut document = place.document;
        let mut from = start;
        while from < end {
            let tokens = self.file.document(document)?.tokens;
            let to = tokens.end.clamp(from, end);
            first_key[from - start..to - start].fill(tokens.start.saturating_sub(start) as u32);
            from = to;
            document += 1;
            if document == self.file.documents() {
                break;
            }
        }
        Ok(())
    }

    fn addressed(
        &self,
        place: &Place,
        ids: &mut [u32],
        targets: &mut [u32],
        first_key: &mut [u32],
    ) -> anyhow::Result<()> {
        let path = self.file.document(place.document)?.path;
        let address = self.frame.prefix(path, place.chunk)?.ids;
        let stretch = place.tokens.len();
        let real = address.len() + stretch;
        // Every token of the stretch is a target, one column before its own; the last is only that.
        self.file.read(place.tokens.start, &mut targets[address.len() - 1..real - 1])?;
        ids[..address.len()].copy_from_slice(&address);
        let (inputs, from) = (real.min(self.context), address.len());
        ids[from..inputs].copy_from_slice(&targets[from - 1..inputs - 1]);
        first_key[..inputs].fill(0);
        Ok(())
    }
}
