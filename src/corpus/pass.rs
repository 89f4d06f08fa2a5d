//! One pass over a corpus: a thread that reads, and an iterator that hands out what it read.

use std::collections::{HashSet, VecDeque};
use std::ops::ControlFlow;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use sha2::{Digest, Sha256};

use super::known::is_linux_file;
use super::manifest::{FileRecord, LeftOut, Manifest, OtherFiles, Reason};
use super::names::{self, NameFilter, shown};
use super::{CorpusOptions, Document, Encoding, Limits, hex};
use crate::error;
use crate::threads;

/// Files the reader may be ahead of its consumer.
const FILES_AHEAD: usize = 4;

/// The documents of one pass, in order. After an error there are no more.
pub struct Documents {
    receiver: Option<Receiver<Message>>,
    /// Documents of a shard that have arrived, and the number of the shard.
    arrived: VecDeque<Document>,
    shard: usize,
    manifest: Manifest,
    /// The hash that the manifest must have at the end.
    expected: Option<String>,
}

enum Message {
    Kept(Document, FileRecord),
    /// Documents without names, of the shard of this number.
    Records(usize, Vec<Document>),
    /// Records without text in the shard of this number, and files of Linux 1.0.
    Counts(usize, [u64; 2]),
    LeftOut(LeftOut),
    Other(OtherFiles),
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
        let expected = options.expected.clone();
        std::thread::Builder::new()
            .name("corpus".to_string())
            .spawn(move || {
                let mut intake = Intake::new(source, options, sender);
                let result = read(&mut intake);
                let _ = intake.flush();
                let _ = intake.sender.send(Message::Other(std::mem::take(&mut intake.other)));
                let _ = intake.sender.send(Message::End(result)); // nobody left to hear it: fine
            })
            .map_err(|why| threads::none_to_be_had(&why))?;
        let arrived = VecDeque::new();
        Ok(Self { receiver: Some(receiver), arrived, shard: 0, manifest: origin, expected })
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
            let kind = if self.manifest.shards.is_empty() { "source files" } else { "documents" };
            let mut what = format!("no {kind} in {}", self.manifest.source);
            let warnings = self.manifest.warnings();
            if !warnings.is_empty() {
                what.push_str(" (");
                what.push_str(&warnings.join("; "));
                what.push(')');
            }
            let is_shard = |name: &String| {
                let plain = name.trim_end_matches(".gz").trim_end_matches(".zst");
                [".jsonl", ".parquet", ".bin"].iter().any(|suffix| plain.ends_with(suffix))
            };
            let shard = self.manifest.other.names.iter().find(|name| is_shard(name));
            let hint = if !self.manifest.shards.is_empty() {
                "check the files, and `text_field`".to_string()
            } else if let Some(shard) = shard {
                let suffix = shard.split_once('.').map_or("*", |(_, suffix)| suffix);
                format!(
                    "name files of documents by a glob: `source` '{}/*.{suffix}'",
                    self.manifest.source
                )
            } else if self.manifest.include.is_empty() {
                format!("source files end in {}; `include` takes others", names::SUFFIXES.join(" "))
            } else {
                "a glob without / matches names, like '*.py', another whole paths, like 'doc/**'"
                    .to_string()
            };
            error::data(what, hint)
        };
        match result {
            Ok(()) if self.manifest.documents() == 0 => Some(Err(nothing())),
            Ok(()) => {
                let found = self.manifest.hash();
                let expected = self.expected.take().filter(|expected| *expected != found)?;
                Some(Err(error::data(
                    format!(
                        "{} is not the text that is recorded: its manifest sha256 is {found}, not \
                         {expected}",
                        self.manifest.source
                    ),
                    "name the text with `source` or `version`",
                )))
            }
            Err(error) => Some(Err(error)),
        }
    }
}

impl Iterator for Documents {
    type Item = anyhow::Result<Document>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(document) = self.arrived.pop_front() {
                if let Some(shard) = self.manifest.shards.get_mut(self.shard) {
                    shard.documents += 1;
                    shard.text_bytes += document.text.len() as u64;
                }
                return Some(Ok(document));
            }
            match self.receiver.as_ref()?.recv() {
                Ok(Message::Records(shard, documents)) => {
                    (self.shard, self.arrived) = (shard, documents.into());
                }
                Ok(Message::Counts(shard, [empty, linux_files])) => {
                    if let Some(shard) = self.manifest.shards.get_mut(shard) {
                        shard.empty += empty;
                        shard.linux_files += linux_files;
                    }
                }
                Ok(Message::Kept(document, record)) => {
                    self.manifest.files.push(record);
                    return Some(Ok(document));
                }
                Ok(Message::LeftOut(left_out)) => self.manifest.left_out.push(left_out),
                Ok(Message::Other(other)) => self.manifest.other = other,
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

/// Filter between a reader and the consumer: decides which files are kept, and sends them on.
pub(super) struct Intake {
    /// Source name, for errors.
    source: String,
    options: CorpusOptions,
    sender: SyncSender<Message>,
    /// Paths of the files given, and of all folders that they are in.
    seen: HashSet<String>,
    folders: HashSet<String>,
    names: u64,
    other: OtherFiles,
    /// Documents taken.
    kept: usize,
    /// Documents of the shard of this number that were not sent yet, and their bytes.
    records: Vec<Document>,
    record_bytes: usize,
    shard: usize,
    /// Records of it without text, and files of Linux 1.0 among the others.
    counts: [u64; 2],
}

/// Bytes of records that are sent together.
const RECORDS_BYTES: usize = 1 << 20;

/// Continue, or stop reading.
pub(super) type Flow = ControlFlow<()>;

impl Intake {
    fn new(source: String, options: CorpusOptions, sender: SyncSender<Message>) -> Self {
        let (seen, folders) = (HashSet::new(), HashSet::new());
        Self {
            source,
            options,
            sender,
            seen,
            folders,
            names: 0,
            other: OtherFiles::default(),
            kept: 0,
            records: Vec::new(),
            record_bytes: 0,
            shard: 0,
            counts: [0; 2],
        }
    }

    pub fn filter(&self) -> &NameFilter {
        &self.options.filter
    }

    /// Counts a file that is not taken because of the suffix of its name.
    pub fn pass_by(&mut self, name: &[u8]) {
        self.other.add(name);
    }

    /// Sets the files that were not taken because of the suffix of their names.
    pub fn passed_by(&mut self, other: OtherFiles) {
        self.other = other;
    }

    pub fn options(&self) -> &CorpusOptions {
        &self.options
    }

    /// Begins the shard of this number.
    pub fn begin_shard(&mut self, shard: usize) {
        let _ = self.flush();
        self.shard = shard;
    }

    /// Takes in a record's text, a document without a name; none and an empty one are counted only.
    pub fn keep_record(&mut self, text: Option<String>) -> Flow {
        let Some(text) = text.filter(|text| !text.is_empty()) else {
            self.counts[0] += 1;
            return Flow::Continue(());
        };
        self.counts[1] += u64::from(is_linux_file(&Sha256::digest(&text)));
        self.keep_unnamed(Document::new("", text))
    }

    /// Takes in a document without a name.
    pub fn keep_unnamed(&mut self, document: Document) -> Flow {
        // Of a short text, most of its memory is the document itself.
        self.record_bytes += size_of::<Document>() + document.text.len() + 4 * document.ids.len();
        self.records.push(document);
        self.kept += 1;
        if self.is_full() {
            let _ = self.flush();
            return Flow::Break(());
        }
        if self.record_bytes < RECORDS_BYTES { Flow::Continue(()) } else { self.flush() }
    }

    /// Sends the records that wait.
    fn flush(&mut self) -> Flow {
        self.record_bytes = 0;
        let (shard, records) = (self.shard, std::mem::take(&mut self.records));
        let counts = std::mem::take(&mut self.counts);
        if counts != [0; 2] {
            self.send(Message::Counts(shard, counts))?;
        }
        if records.is_empty() {
            return Flow::Continue(());
        }
        self.send(Message::Records(shard, records))
    }

    fn is_full(&self) -> bool {
        self.options.limit.is_some_and(|limit| self.kept >= limit)
    }

    pub fn limits(&self) -> &Limits {
        &self.options.limits
    }

    /// Takes a file in under a path that [`names::corpus_path`] gave.
    pub fn keep(&mut self, path: String, bytes: Vec<u8>) -> anyhow::Result<Flow> {
        if self.flush() == Flow::Break(()) {
            return Ok(Flow::Break(()));
        }
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
        // Files are regenerated by name: two of one name would be ambiguous.
        if !self.seen.insert(record.path.clone()) {
            return Err(error::data(
                format!("two files are named {}, {}", shown(record.path.as_bytes()), self.source),
                "pack the archive again, with each file once",
            ));
        }
        self.check_folders(&record.path)?;
        let document = Document { encoding, ..Document::new(record.path.clone(), text) };
        let flow = self.send(Message::Kept(document, record));
        self.kept += 1;
        Ok(if self.is_full() { Flow::Break(()) } else { flow })
    }

    /// Refuses a file that another needs as a folder: the two could not be written back.
    fn check_folders(&mut self, path: &str) -> anyhow::Result<()> {
        let mut both = self.folders.contains(path).then_some(path);
        for (end, _) in path.match_indices('/') {
            let folder = &path[..end];
            if self.seen.contains(folder) {
                both = Some(folder);
            }
            if !self.folders.contains(folder) {
                self.folders.insert(folder.to_string());
            }
        }
        let Some(both) = both else { return Ok(()) };
        Err(error::data(
            format!("{} is both a file and a folder, {}", shown(both.as_bytes()), self.source),
            "leave one of them out with `exclude`, or pack the archive again",
        ))
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
