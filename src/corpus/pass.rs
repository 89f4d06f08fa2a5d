//! One pass over a corpus: a thread that reads, and an iterator that hands out what it read.

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use sha2::{Digest, Sha256};

use super::manifest::{FileRecord, LeftOut, Manifest, Reason};
use super::names::{self, shown};
use super::{CorpusOptions, Document, Encoding, Limits, hex};
use crate::error;

/// How many files the reader may be ahead of whoever takes them.
const FILES_AHEAD: usize = 4;

/// The documents of one pass, in order. After an error there are no more.
pub struct Documents {
    receiver: Option<Receiver<Message>>,
    manifest: Manifest,
}

enum Message {
    Kept(Document, FileRecord),
    LeftOut(LeftOut),
    End(anyhow::Result<()>),
}

impl Documents {
    /// Starts `read` on a thread of its own. Dropping the documents ends it at its next file.
    pub(super) fn start(
        origin: Manifest,
        options: CorpusOptions,
        read: impl FnOnce(&mut Intake) -> anyhow::Result<()> + Send + 'static,
    ) -> anyhow::Result<Self> {
        let (sender, receiver) = sync_channel(FILES_AHEAD);
        let source = origin.source.clone();
        std::thread::Builder::new()
            .name("corpus".to_string())
            .spawn(move || {
                let mut intake = Intake::new(source, options, sender);
                let result = read(&mut intake);
                let _ = intake.sender.send(Message::End(result)); // nobody left to hear it: fine
            })
            .map_err(|why| {
                error::device(format!("cannot start a reader thread: {why}"), "free some memory")
            })?;
        Ok(Self { receiver: Some(receiver), manifest: origin })
    }

    /// The record of what this pass has given; the whole corpus once there is no next document.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The record, once the pass is over.
    pub fn into_manifest(self) -> Manifest {
        self.manifest
    }

    fn end(&mut self, result: anyhow::Result<()>) -> Option<anyhow::Result<Document>> {
        self.receiver = None;
        let nothing = || {
            let mut what = format!("no source files in {}", self.manifest.source);
            if !self.manifest.left_out.is_empty() {
                what.push_str(" (");
                what.push_str(&self.manifest.warnings().join("; "));
                what.push(')');
            }
            error::data(what, format!("source files end in {}", names::SUFFIXES.join(" ")))
        };
        match result {
            Ok(()) if self.manifest.files.is_empty() => Some(Err(nothing())),
            Ok(()) => None,
            Err(error) => Some(Err(error)),
        }
    }
}

impl Iterator for Documents {
    type Item = anyhow::Result<Document>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.receiver.as_ref()?.recv() {
                Ok(Message::Kept(document, record)) => {
                    self.manifest.files.push(record);
                    return Some(Ok(document));
                }
                Ok(Message::LeftOut(left_out)) => self.manifest.left_out.push(left_out),
                Ok(Message::End(result)) => return self.end(result),
                // The thread is gone without a last word.
                Err(_) => {
                    let what = format!("the reader thread of {} panicked", self.manifest.source);
                    return self.end(Err(error::internal(what)));
                }
            }
        }
    }
}

/// What a reader hands its files to: it decides which are kept, and sends them on.
pub(super) struct Intake {
    /// For errors: where the files are from.
    source: String,
    options: CorpusOptions,
    sender: SyncSender<Message>,
    seen: HashSet<String>,
    names: u64,
}

/// Whether a reader should go on.
pub(super) type Flow = ControlFlow<()>;

impl Intake {
    fn new(source: String, options: CorpusOptions, sender: SyncSender<Message>) -> Self {
        Self { source, options, sender, seen: HashSet::new(), names: 0 }
    }

    pub fn limits(&self) -> &Limits {
        &self.options.limits
    }

    /// Takes a file in under a path that [`names::corpus_path`] gave.
    pub fn keep(&mut self, path: String, bytes: Vec<u8>) -> anyhow::Result<Flow> {
        let record =
            FileRecord { path, sha256: hex(&Sha256::digest(&bytes)), bytes: bytes.len() as u64 };
        let (text, encoding) = match (String::from_utf8(bytes), self.options.encoding) {
            (Ok(text), _) => (text, Encoding::Utf8),
            (Err(not), Encoding::Latin1) => {
                (not.as_bytes().iter().copied().map(char::from).collect(), Encoding::Latin1)
            }
            (Err(_), Encoding::Utf8) => {
                return self.leave_out(record.path.as_bytes(), Reason::NotUtf8);
            }
        };
        self.count_name(record.path.len())?;
        // Files are asked for by name: two under one name could not be told apart.
        if !self.seen.insert(record.path.clone()) {
            return Err(error::data(
                format!("two files are named {}, {}", shown(record.path.as_bytes()), self.source),
                "pack the archive again, with each file once",
            ));
        }
        let document = Document { path: record.path.clone(), text, encoding };
        let flow = self.send(Message::Kept(document, record));
        let full = self.options.limit.is_some_and(|limit| self.seen.len() >= limit);
        Ok(if full { Flow::Break(()) } else { flow })
    }

    /// Notes that a file which counts by its name is not taken.
    pub fn leave_out(&mut self, name: &[u8], reason: Reason) -> anyhow::Result<Flow> {
        if self.options.strict && reason.is_loss() {
            return Err(error::data(
                format!("{} is {}, {}", shown(name), reason.words(), self.source),
                "without `strict`, such files are left out with a warning",
            ));
        }
        let name = shown(name);
        self.count_name(name.len())?;
        Ok(self.send(Message::LeftOut(LeftOut { name, reason })))
    }

    fn count_name(&mut self, bytes: usize) -> anyhow::Result<()> {
        self.names += bytes as u64;
        let most = self.options.limits.names;
        if self.names > most {
            return Err(error::data(
                format!("file names take more than {most} bytes, {}", self.source),
                "give a smaller source",
            ));
        }
        Ok(())
    }

    fn send(&mut self, message: Message) -> Flow {
        // An error means that nobody is listening any more.
        self.sender.send(message).map_or(Flow::Break(()), |()| Flow::Continue(()))
    }
}
