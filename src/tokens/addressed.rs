//! Addressed windows: every chunk of a document after its own address, so that the model can be
//! prompted for any chunk with the document's path and the chunk's number alone.
//!
//! A window of `context + 1` tokens is `<|start_file|><|start_header|>PATH N<|end_header|>` and the
//! N-th chunk (from 0) of the document's text, as many tokens as fit; the last chunk ends with
//! `<|end_file|>`. A document is rebuilt by prompting for chunks 0, 1, 2, ... until one ends so.

use std::sync::Arc;

use crate::error;
use crate::tokenizer::Tokenizer;

/// Encodes addresses: a tokenizer and the number of inputs per window.
#[derive(Clone, Debug)]
pub struct AddressEncoder {
    tokenizer: Arc<Tokenizer>,
    context: usize,
}

/// The address of a chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkAddress {
    /// The prompt.
    pub ids: Vec<u32>,
    /// Tokens of the chunk if it fills the window; the last chunk may end earlier, with `end_file`.
    pub max_tokens: usize,
}

impl AddressEncoder {
    /// Windows of `context` tokens.
    pub fn new(tokenizer: Arc<Tokenizer>, context: usize) -> Self {
        Self { tokenizer, context }
    }

    pub(super) fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The address of a document's chunk. An error if it fills the window.
    pub fn address(&self, path: &str, chunk: usize) -> anyhow::Result<ChunkAddress> {
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
        let max_tokens = self.context + 1 - ids.len();
        Ok(ChunkAddress { ids, max_tokens })
    }

    /// The first token of each chunk of a document whose text (`end_file` included) has `length`
    /// tokens.
    pub(super) fn chunk_starts(&self, path: &str, length: usize) -> anyhow::Result<Vec<usize>> {
        let (mut starts, mut next) = (Vec::new(), 0);
        while next < length {
            let address = self.address(path, starts.len())?;
            starts.push(next);
            next += address.max_tokens;
        }
        Ok(starts)
    }
}
