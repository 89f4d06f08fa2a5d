//! Regenerates files from their names alone: the model is prompted for chunk after chunk until it
//! emits the end of the file. Many files run at once; the next chunk of a file follows its last.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use serde::Serialize;

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
    chunk: usize,
    /// Tokens so far, header included (windows without an address only).
    context: Vec<u32>,
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

    /// Regenerates files, as many at once as the generator has slots. Its context must be the
    /// windows' context.
    pub fn run(
        &self,
        generator: &mut Generator,
        paths: &[impl AsRef<str>],
        sink: &mut dyn Sink,
    ) -> anyhow::Result<()> {
        let mut files: HashMap<usize, PendingFile> = HashMap::new();
        // Next chunks, before new files: what is begun gets done.
        let mut further: VecDeque<usize> = VecDeque::new();
        let mut fresh = 0..paths.len();
        let mut running: HashMap<u64, usize> = HashMap::new();
        loop {
            while generator.free() > 0 {
                let Some(at) = further.pop_front().or_else(|| fresh.next()) else { break };
                let text = TextStream::new(&self.tokenizer, &[])?;
                let file = files.entry(at).or_insert_with(|| PendingFile {
                    text,
                    tokens: 0,
                    chunk: 0,
                    context: Vec::new(),
                });
                match self.request(paths[at].as_ref(), file, generator.context()) {
                    Some(request) => {
                        running.insert(generator.admit(request)?, at);
                    }
                    None => finish(&mut files, at, End::NoRoom, sink)?,
                }
            }
            if !generator.is_busy() {
                return Ok(());
            }
            for event in generator.step()? {
                let Some(&at) = running.get(&event.ticket) else { continue };
                let Some(file) = files.get_mut(&at) else { continue };
                let is_marker = event.finish == Some(FinishReason::Stop);
                if !is_marker {
                    file.tokens += 1;
                    if self.windows != WindowKind::Addressed {
                        file.context.push(event.id);
                    }
                    let text = file.text.push(event.id)?;
                    if !text.is_empty() {
                        sink.text(at, &text)?;
                    }
                }
                if event.finish.is_none() {
                    continue;
                }
                running.remove(&event.ticket);
                if is_marker {
                    let whole = event.id == self.markers.end_file;
                    finish(&mut files, at, if whole { End::Whole } else { End::Marker }, sink)?;
                } else if file.tokens >= self.limit {
                    finish(&mut files, at, End::Limit, sink)?;
                } else {
                    file.chunk += 1;
                    further.push_back(at);
                }
            }
        }
    }

    /// The next request; none if the window has no room for it.
    fn request(&self, path: &str, file: &mut PendingFile, context: usize) -> Option<Request> {
        let (prompt, room) = if self.windows == WindowKind::Addressed {
            let address = self.encoder.address(path, file.chunk).ok()?;
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
            max_new_tokens: room.min((self.limit - file.tokens).max(1)),
            stop: vec![start_file, end_file, start_header, end_header, pad],
            ..Request::default()
        })
    }
}

fn finish(
    files: &mut HashMap<usize, PendingFile>,
    at: usize,
    end: End,
    sink: &mut dyn Sink,
) -> anyhow::Result<()> {
    if let Some(PendingFile { text, tokens, .. }) = files.remove(&at) {
        let rest = text.finish()?;
        if !rest.is_empty() {
            sink.text(at, &rest)?;
        }
        sink.end(at, end, tokens)?;
    }
    Ok(())
}
