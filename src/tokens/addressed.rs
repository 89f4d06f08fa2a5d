//! Addressed windows: every stretch of a document behind its own address, so that each can be asked
//! for by itself, from the document's name and the stretch's number alone.
//!
//! A window of `context + 1` tokens is `<|start_file|><|start_header|>PATH N<|end_header|>` and the
//! N-th stretch (from 0) of the document's text, as long as there is room; the last stretch ends with
//! `<|end_file|>`. To rebuild a document, ask for chunks 0, 1, 2, ... until one ends so.

use std::sync::Arc;

use crate::error;
use crate::tokenizer::Tokenizer;

/// What writes addresses: a tokenizer and the length of a window's input.
#[derive(Clone, Debug)]
pub struct Frame {
    tokenizer: Arc<Tokenizer>,
    context: usize,
}

/// The address of a chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prefix {
    /// What the model is given.
    pub ids: Vec<u32>,
    /// The most tokens that can follow: the chunk has so many, or ends earlier with `end_file`.
    pub room: usize,
}

impl Frame {
    pub fn new(tokenizer: Arc<Tokenizer>, context: usize) -> Self {
        Self { tokenizer, context }
    }

    /// The address of a document's chunk. An error where it leaves no room in the window.
    pub fn prefix(&self, path: &str, chunk: usize) -> anyhow::Result<Prefix> {
        let ids = self.tokenizer.encode_header(path, Some(chunk))?;
        if ids.len() > self.context {
            return Err(error::data(
                format!(
                    "the address of {path:?} chunk {chunk} has {} tokens, but the window only {}",
                    ids.len(),
                    self.context
                ),
                "increase `max_position_embeddings` or `vocab_size`, or shorten the paths",
            ));
        }
        let room = self.context + 1 - ids.len();
        Ok(Prefix { ids, room })
    }

    /// Where the chunks of a document begin, whose text (`end_file` included) has `length` tokens.
    pub(super) fn starts(&self, path: &str, length: usize) -> anyhow::Result<Vec<usize>> {
        let mut starts = Vec::new();
        let mut at = 0;
        while at < length {
            at += {
                let room = self.prefix(path, starts.len())?.room;
                starts.push(at);
                room
            };
        }
        Ok(starts)
    }
}
