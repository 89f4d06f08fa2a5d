//! Regenerates files from their names alone: the model is prompted for chunk after chunk until it
//! emits the end of the file.
//!
//! Slots of the generator go to chunks that are known to exist, because the one before ended without a
//! marker; then to files not begun; then, speculatively, to further chunks of files under way. Only the
//! address of a chunk is its prompt, so chunks can run in any order. The text of a file comes in order, and a
//! chunk that ends with a marker cancels the ones after it: the result is that of one chunk at a time.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use serde::Serialize;

use crate::backend::Backend;
use crate::generate::{FinishReason, Generator, Request, TextStream};
use crate::tokenizer::{Markers, Tokenizer};
use crate::tokens::{AddressEncoder, WindowKind};

/// Regenerates files from their names.
#[derive(Clone, Debug)]
pub struct Regenerator {
    tokenizer: Arc<Tokenizer>,
    markers: Markers,
    encoder: AddressEncoder,
    /// Windows of the model's training. Addressed ones are prompted for one by one. Of other kinds only
    /// the first has a prompt, the file's header; the next ones continue the second half of the text
    /// so far.
    windows: WindowKind,
    /// Limit on tokens per file, for a model that never ends one.
    limit: usize,
}

/// Reason for the end of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum End {
    /// The end-of-file marker.
    Whole,
    /// The token limit.
    Limit,
    /// A marker in the middle of the text.
    Marker,
    /// The address fills the window.
    NoRoom,
}

impl End {
    /// Description for messages.
    pub fn words(self) -> &'static str {
        match self {
            Self::Whole => "whole",
            Self::Limit => "cut off: it had not ended within the limit",
            Self::Marker => "broken off: a marker came in the midst of its text",
            Self::NoRoom => "broken off: its address leaves no room in the window",
        }
    }
}

/// Takes the text of files as it comes.
pub trait Sink {
    /// More text of a file.
    fn text(&mut self, file: usize, bytes: &[u8]) -> anyhow::Result<()>;
    /// A file's end, and how many tokens it had.
    fn end(&mut self, file: usize, end: End, tokens: usize) -> anyhow::Result<()>;
}

/// A file under way.
struct PendingFile<'a> {
    text: TextStream<'a>,
    /// Tokens of its text so far.
    tokens: usize,
    /// Chunks requested, in order. The text so far ends in the first one.
    chunks: VecDeque<Chunk>,
    /// Number of the next chunk.
    next: usize,
    /// Tokens before the next chunk, if all chunks before it are full.
    next_start: usize,
    /// True if the last requested chunk, or one before it, is known to be the last of the file.
    complete: bool,
    /// Tokens so far, header included (windows without an address only).
    context: Vec<u32>,
}

/// A chunk that was requested.
struct Chunk {
    ticket: Option<u64>,
    /// Tokens that wait for the chunks before it.
    ids: Vec<u32>,
    state: ChunkState,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum ChunkState {
    Running,
    /// Longest possible chunk: another one follows, if the limit allows.
    Full,
    /// The file ends with it.
    Last(End),
}

impl Regenerator {
    /// Default limit on tokens per file: some 350 kB of source.
    pub const LIMIT: usize = 1 << 17;

    /// `context` is the inputs of a window in training.
    pub fn new(
        tokenizer: Arc<Tokenizer>,
        windows: WindowKind,
        context: usize,
        limit: usize,
    ) -> anyhow::Result<Self> {
        let markers = tokenizer.markers()?;
        let encoder = AddressEncoder::new(tokenizer.clone(), context);
        Ok(Self { tokenizer, markers, encoder, windows, limit })
    }

    /// Sequences worth decoding at once for so many files.
    pub fn slots(&self, backend: &dyn Backend, files: usize) -> usize {
        let shape = backend.decode_shape();
        // Only addressed chunks can be requested ahead of their turn.
        let spare = if self.windows == WindowKind::Addressed { shape.spare_slots } else { 1 };
        files.clamp(spare, shape.slots)
    }

    /// Regenerates files, as many chunks at once as the generator has slots. Its context must be the
    /// windows' context. Files, texts and ends do not depend on the slots.
    pub fn run(
        &self,
        generator: &mut Generator,
        paths: &[impl AsRef<str>],
        sink: &mut dyn Sink,
    ) -> anyhow::Result<()> {
        let mut files: BTreeMap<usize, PendingFile> = BTreeMap::new();
        // Files whose next chunk is known to exist.
        let mut further: VecDeque<usize> = VecDeque::new();
        let mut fresh = 0..paths.len();
        // The file of each sequence.
        let mut running: HashMap<u64, usize> = HashMap::new();
        loop {
            while generator.free() > 0 {
                let known = further.pop_front().or_else(|| fresh.next());
                let Some(at) = known.or_else(|| self.speculative(&files)) else { break };
                let file = match files.entry(at) {
                    Entry::Occupied(entry) => entry.into_mut(),
                    Entry::Vacant(entry) => entry.insert(PendingFile::new(&self.tokenizer)?),
                };
                let request = self.request(paths[at].as_ref(), file, generator.context());
                let mut chunk = Chunk { ticket: None, ids: Vec::new(), state: ChunkState::Running };
                if let Some(request) = request {
                    file.next += 1;
                    file.next_start += request.max_new_tokens;
                    file.complete = file.next_start >= self.limit;
                    let ticket = generator.admit(request)?;
                    running.insert(ticket, at);
                    chunk.ticket = Some(ticket);
                } else {
                    file.complete = true;
                    chunk.state = ChunkState::Last(End::NoRoom);
                }
                file.chunks.push_back(chunk);
                self.advance(&mut files, at, sink)?;
            }
            if !generator.is_busy() {
                return Ok(());
            }
            for event in generator.step()? {
                // None if it was cancelled meanwhile.
                let Some(&at) = running.get(&event.ticket) else { continue };
                let Some(file) = files.get_mut(&at) else { continue };
                let is_it = |chunk: &Chunk| chunk.ticket == Some(event.ticket);
                let Some(number) = file.chunks.iter().position(is_it) else { continue };
                let chunk = &mut file.chunks[number];
                if event.finish.is_some() {
                    running.remove(&event.ticket);
                }
                if event.finish == Some(FinishReason::Stop) {
                    let is_whole = event.id == self.markers.end_file;
                    chunk.state = ChunkState::Last(if is_whole { End::Whole } else { End::Marker });
                    file.complete = true;
                    for ticket in file.chunks.drain(number + 1..).filter_map(|chunk| chunk.ticket) {
                        generator.cancel(ticket);
                        running.remove(&ticket);
                    }
                } else {
                    chunk.ids.push(event.id);
                    if event.finish.is_some() {
                        chunk.state = ChunkState::Full;
                    }
                }
                if number == 0 && self.advance(&mut files, at, sink)? {
                    further.push_back(at);
                }
            }
        }
    }

    /// The file whose next chunk is the best guess: of those that may go on, one with the fewest chunks
    /// running.
    fn speculative(&self, files: &BTreeMap<usize, PendingFile>) -> Option<usize> {
        if self.windows != WindowKind::Addressed {
            return None;
        }
        let open = files.iter().filter(|(_, file)| !file.complete);
        open.min_by_key(|(_, file)| file.running()).map(|(&at, _)| at)
    }

    /// Hands out a file's text as far as it has come, and its end. True if its next chunk is to be requested.
    fn advance(
        &self,
        files: &mut BTreeMap<usize, PendingFile>,
        at: usize,
        sink: &mut dyn Sink,
    ) -> anyhow::Result<bool> {
        let Some(file) = files.get_mut(&at) else { return Ok(false) };
        let mut text = Vec::new();
        let mut end = None;
        while let Some(chunk) = file.chunks.front_mut() {
            file.tokens += chunk.ids.len();
            for id in chunk.ids.drain(..) {
                text.extend(file.text.push(id)?);
                if self.windows != WindowKind::Addressed {
                    file.context.push(id);
                }
            }
            end = match chunk.state {
                ChunkState::Running => break,
                ChunkState::Full if file.tokens < self.limit => None,
                ChunkState::Full => Some(End::Limit),
                ChunkState::Last(end) => Some(end),
            };
            file.chunks.pop_front();
        }
        let is_next_due = file.chunks.is_empty() && end.is_none();
        let ended = if end.is_some() { files.remove(&at) } else { None };
        let tokens = ended.as_ref().map_or(0, |file| file.tokens);
        if let Some(file) = ended {
            text.extend(file.text.finish()?);
        }
        if !text.is_empty() {
            sink.text(at, &text)?;
        }
        if let Some(end) = end {
            sink.end(at, end, tokens)?;
        }
        Ok(is_next_due)
    }

    /// The request for a file's next chunk; `None` if its address fills the window.
    fn request(&self, path: &str, file: &mut PendingFile, context: usize) -> Option<Request> {
        let (prompt, room) = if self.windows == WindowKind::Addressed {
            let address = self.encoder.address(path, file.next).ok()?;
            (address.ids, address.max_tokens)
        } else {
            if file.context.is_empty() {
                file.context = self.tokenizer.encode_header(path, None).ok()?;
            } else {
                file.context.drain(..file.context.len() - file.context.len().div_ceil(2));
            }
            (file.context.clone(), usize::MAX)
        };
        // A token can follow a full window.
        let room = room.min((context + 1).checked_sub(prompt.len()).filter(|&room| room > 0)?);
        let Markers { start_file, end_file, start_header, end_header, pad } = self.markers;
        Some(Request {
            prompt,
            // A chunk that no marker ends has exactly so many tokens.
            max_new_tokens: room.min((self.limit - file.next_start).max(1)),
            stop: vec![start_file, end_file, start_header, end_header, pad],
            ..Request::default()
        })
    }
}

impl<'a> PendingFile<'a> {
    fn new(tokenizer: &'a Tokenizer) -> anyhow::Result<Self> {
        Ok(Self {
            text: TextStream::new(tokenizer, &[])?,
            tokens: 0,
            chunks: VecDeque::new(),
            next: 0,
            next_start: 0,
            complete: false,
            context: Vec::new(),
        })
    }

    fn running(&self) -> usize {
        self.chunks.iter().filter(|chunk| chunk.state == ChunkState::Running).count()
    }
}
