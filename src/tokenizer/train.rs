//! Training: count the words of a corpus, then let the `tokenizers` crate choose the merges.
//!
//! The corpus streams through; what stays is a table of distinct words. Once the table is full, its
//! rarest words are dropped (they have no say in the merges), so that memory does not grow with the
//! corpus. Counts are sums, batches are cut by size alone and ties are broken by id, so neither the
//! number of threads nor the order of a hash map shows in the result.

use std::collections::HashMap;

use anyhow::Context;
use rayon::prelude::*;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use super::limits::guarded;
use super::words::Words;
use super::{MARKERS, Style, Tokenizer, byte_level, folder};
use crate::corpus::Document;
use crate::error::{self, ErrorKind, Hint};
use crate::threads;

/// Training options.
#[derive(Clone, Debug)]
pub struct Training {
    /// Kind of tokenizer.
    pub style: Style,
    /// The vocabulary asked for, special tokens included.
    pub vocab_size: usize,
}

/// Result of a training, in the first LaaM's terms.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trained {
    /// Tokens in the vocabulary, pads included.
    pub num_tokens: usize,
    /// Special tokens among them.
    pub num_special_tokens: usize,
    /// `<|extra_id_N>` tokens that fill a short vocabulary (style `original` only).
    pub num_pad_tokens: usize,
    /// Tokens before padding: fewer than requested if the corpus has no more pairs to merge.
    pub pre_vocab_size: usize,
    /// Documents and bytes read.
    pub documents: usize,
    /// Bytes of text read.
    pub bytes: u64,
    /// Distinct words, and how often a word may have occurred and yet been dropped from the table
    /// (0: none was dropped).
    pub words: usize,
    /// Largest count of a word that may have been dropped.
    pub dropped_up_to: u64,
}

/// Progress of a training.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrainingProgress {
    /// Bytes of text read.
    Read(u64),
    /// All is read; merges are chosen.
    Merge {
        /// Distinct words that they are chosen among.
        words: usize,
    },
}

/// Text is handed to the threads in batches of about this many bytes.
const BATCH_BYTES: usize = 8 << 20;
/// Distinct words kept while counting. Linux 6.1 (1.2 GB) has 0.85 million.
const MAX_COUNTED_WORDS: usize = 4 << 20;
/// Distinct words the merges are chosen from, the most frequent ones: some 500 bytes each.
const MAX_TRAINED_WORDS: usize = 1 << 20;
/// Longer words are counted in pieces: choosing merges is quadratic in a word's length.
const MAX_WORD_BYTES: usize = 4096;

type Counts = HashMap<Box<[u8]>, u64>;

impl Tokenizer {
    /// Trains a tokenizer on a corpus. `progress` gets each stage.
    pub fn train(
        documents: impl IntoIterator<Item = anyhow::Result<Document>>,
        training: &Training,
        mut progress: impl FnMut(TrainingProgress),
    ) -> anyhow::Result<(Tokenizer, Trained)> {
        let specials: Vec<_> = training.style.special_tokens().collect();
        let least = specials.len() + 256;
        // Ids are stored in files as u32, and a vocabulary beyond this is a slip of the pen.
        if training.vocab_size < least || training.vocab_size > 1 << 24 {
            return Err(error::invalid(
                "vocab_size",
                training.vocab_size,
                format!("at least {least} (all bytes and the markers) and at most 16777216"),
            ));
        }
        threads::start_global_pool()?;
        let mut counter = Counter::new(training.style);
        counter.read(documents, &mut progress)?;
        if counter.bytes == 0 {
            return Err(error::data(
                "the corpus has no text to train a tokenizer on",
                "check `source`: it must hold .c, .h, .S or .txt files",
            ));
        }
        let (documents, bytes) = (counter.documents, counter.bytes);
        let (distinct, dropped_up_to) = (counter.counts.len(), counter.dropped_up_to);

        let trainer = BpeTrainer::builder()
            .vocab_size(training.vocab_size)
            .min_frequency(1)
            .show_progress(false)
            .special_tokens(specials.clone())
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build();
        let mut model = BPE::default();
        progress(TrainingProgress::Merge { words: distinct });
        // The crate's map, and its strings, by inference.
        let words = counter
            .most_frequent()
            .into_iter()
            .map(|(word, count)| (byte_level::text(&word).into(), count))
            .collect();
        guarded(|| trainer.do_train(&words, &mut model))
            .context("cannot choose merges")
            .hint(ErrorKind::Data, || "train on other text")?;
        drop(words);

        let pre_vocab_size = model.get_vocab().len();
        let mut pads = Vec::new();
        if training.style == Style::Original {
            pads = (pre_vocab_size..training.vocab_size)
                .map(|id| tokenizers::AddedToken::from(format!("<|extra_id_{id}>"), true))
                .collect();
        }
        let trained = Trained {
            num_tokens: pre_vocab_size + pads.len(),
            num_special_tokens: specials.len(),
            num_pad_tokens: pads.len(),
            pre_vocab_size,
            documents,
            bytes,
            words: distinct,
            dropped_up_to,
        };
        let tokenizer = folder::assemble(training.style, model, pads)?;
        Ok((tokenizer, trained))
    }
}

struct Counter {
    style: Style,
    words: Words,
    counts: Counts,
    documents: usize,
    bytes: u64,
    dropped_up_to: u64,
}

impl Counter {
    fn new(style: Style) -> Self {
        let counts = Counts::new();
        Self { style, words: Words::new(style), counts, documents: 0, bytes: 0, dropped_up_to: 0 }
    }

    fn read(
        &mut self,
        documents: impl IntoIterator<Item = anyhow::Result<Document>>,
        progress: &mut impl FnMut(TrainingProgress),
    ) -> anyhow::Result<()> {
        let mut batch = Vec::new();
        let mut held = 0;
        for document in documents {
            let document = document?;
            self.documents += 1;
            self.bytes += document.text.len() as u64;
            held += document.text.len() + document.path.len();
            batch.push(document);
            if held >= BATCH_BYTES {
                self.count(&batch);
                progress(TrainingProgress::Read(self.bytes));
                batch.clear();
                held = 0;
            }
        }
        self.count(&batch);
        progress(TrainingProgress::Read(self.bytes));
        Ok(())
    }

    fn count(&mut self, batch: &[Document]) {
        let counts: Counts = batch
            .par_iter()
            .fold(Counts::new, |mut counts, document| {
                self.words_of(document, |word| {
                    for piece in word.chunks(MAX_WORD_BYTES) {
                        match counts.get_mut(piece) {
                            Some(count) => *count += 1,
                            None => drop(counts.insert(piece.into(), 1)),
                        }
                    }
                });
                counts
            })
            .reduce(Counts::new, merge);
        self.counts = merge(std::mem::take(&mut self.counts), counts);
        while self.counts.len() > MAX_COUNTED_WORDS {
            self.dropped_up_to += 1;
            self.counts.retain(|_, count| *count > self.dropped_up_to);
        }
    }

    /// The words of a document, each as the bytes it stands for.
    fn words_of(&self, document: &Document, mut each: impl FnMut(&[u8])) {
        match self.style {
            // Paths are words of headers; markers never come from text.
            Style::Exact => {
                for text in [&document.path, &document.text] {
                    self.words.of(text).for_each(|word| each(word.as_bytes()));
                }
            }
            // The first LaaM trained on documents whole, their markers as plain text.
            Style::Original => {
                let text = format!(" {}", format_document(document));
                self.words.of(&text).for_each(|word| each(word.as_bytes()));
            }
        }
    }

    /// The words that choose the merges, with counts whose sums the crate's 32 bits can hold.
    fn most_frequent(&mut self) -> Vec<(Box<[u8]>, u64)> {
        let mut words: Vec<_> = std::mem::take(&mut self.counts).into_iter().collect();
        words.sort_unstable_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
        if self.style == Style::Exact {
            words.truncate(MAX_TRAINED_WORDS);
        }
        let pairs: u64 = words.iter().map(|(word, count)| word.len() as u64 * count).sum();
        let shift = (pairs >> 30).checked_ilog2().map_or(0, |bits| bits + 1);
        if shift > 0 {
            for (_, count) in &mut words {
                *count = (*count >> shift).max(1);
            }
        }
        words
    }
}

/// A document in the one string of which the first LaaM made its tokens; without a header if it has no
/// name.
pub(super) fn format_document(document: &Document) -> String {
    let [start_file, end_file, start_header, end_header, _] = MARKERS;
    let Document { path, text, .. } = document;
    if path.is_empty() {
        return format!("{start_file}{text}{end_file}");
    }
    format!("{start_file}{start_header}{path}{end_header}{text}{end_file}")
}

fn merge(mut a: Counts, mut b: Counts) -> Counts {
    if a.len() < b.len() {
        std::mem::swap(&mut a, &mut b);
    }
    for (word, count) in b {
        *a.entry(word).or_default() += count;
    }
    a
}
