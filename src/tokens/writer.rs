//! Writing a token file: documents stream through, are encoded by all threads a batch at a time, and
//! written in their order. The file gets its name when it is whole.

use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::sync_channel;

use anyhow::Context;
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::file::{HEADER, Header};
use crate::corpus::Document;
use crate::error::{ErrorKind, Hint};
use crate::files::AtomicFile;
use crate::threads;
use crate::tokenizer::Tokenizer;

/// Text is handed to the threads in batches of about this many bytes.
const BATCH_BYTES: usize = 8 << 20;

/// A token file being written. Dropped before [`TokenWriter::finish`], it disappears.
pub struct TokenWriter<'t> {
    tokenizer: &'t Tokenizer,
    target: PathBuf,
    file: AtomicFile,
    body: Sha256,
    header: Header,
    /// The document table and the paths, which come after the ids.
    table: Vec<u8>,
    paths: Vec<u8>,
    decoded_bytes: u64,
}

/// A document's ids, how many of them are its header, and the bytes of the text that they stand for if
/// they come from a token file.
type Encoded = (Vec<u32>, usize, usize);

impl<'t> TokenWriter<'t> {
    /// Starts the file that will be called `target`.
    pub fn create(target: &Path, tokenizer: &'t Tokenizer) -> anyhow::Result<Self> {
        tokenizer.end_of_document()?;
        let mut file = AtomicFile::create(target)?;
        // The header is known at the end.
        file.write_all(&[0; HEADER])
            .with_context(|| cannot(target))
            .hint(ErrorKind::Data, || DISK_FULL_HINT)?;
        let header = Header {
            id_bytes: if tokenizer.vocab_size() <= 1 << 16 { 2 } else { 4 },
            tokens: 0,
            documents: 0,
            path_bytes: 0,
            vocab_size: tokenizer.vocab_size() as u32,
            tokenizer_sha256: tokenizer.sha256(),
            corpus_sha256: [0; 32],
            body_sha256: [0; 32],
        };
        let (table, paths) = (Vec::new(), Vec::new());
        let (target, body) = (target.to_path_buf(), Sha256::new());
        Ok(Self { tokenizer, target, file, body, header, table, paths, decoded_bytes: 0 })
    }

    /// Bytes of the text that the ids of token files stand for.
    pub fn decoded_bytes(&self) -> u64 {
        self.decoded_bytes
    }

    /// Encodes and writes documents, in order. `progress` gets the bytes of text taken so far.
    ///
    /// The next batch is read while the last one is encoded.
    pub fn write(
        &mut self,
        documents: impl IntoIterator<Item = anyhow::Result<Document>>,
        mut progress: impl FnMut(u64),
    ) -> anyhow::Result<()> {
        threads::start_global_pool()?;
        std::thread::scope(|scope| {
            let (sender, batches) = sync_channel::<Vec<Document>>(1);
            let encode = move || batches.into_iter().try_for_each(|batch| self.write_batch(&batch));
            let encoder = threads::spawn_scoped(scope, encode)?;
            let mut batch = Vec::new();
            let (mut held, mut taken) = (0, 0);
            let mut failed = None;
            for document in documents {
                match document {
                    Ok(document) => {
                        held +=
                            size_of::<Document>() + document.text.len() + 4 * document.ids.len();
                        taken += document.text.len() as u64;
                        batch.push(document);
                    }
                    Err(error) => {
                        failed = Some(error);
                        break;
                    }
                }
                if held >= BATCH_BYTES {
                    held = 0;
                    // Nobody takes it: the encoder has failed, and says why below.
                    if sender.send(std::mem::take(&mut batch)).is_err() {
                        break;
                    }
                    progress(taken);
                }
            }
            let _ = sender.send(batch);
            drop(sender);
            progress(taken);
            match (encoder.join(), failed) {
                (_, Some(error)) => Err(error),
                (Ok(result), None) => result,
                (Err(panic), None) => std::panic::resume_unwind(panic),
            }
        })
    }

    fn write_batch(&mut self, batch: &[Document]) -> anyhow::Result<()> {
        let encoded: anyhow::Result<Vec<Encoded>> = batch
            .par_iter()
            .map(|document| {
                let (ids, header) = self.tokenizer.encode_framed(document)?;
                let decoded = if document.ids.is_empty() {
                    0
                } else {
                    self.tokenizer.decoded(document.clone())?.text.len()
                };
                Ok((ids, header, decoded))
            })
            .collect();
        let mut bytes = Vec::new();
        for (document, (ids, header, decoded)) in batch.iter().zip(encoded?) {
            self.decoded_bytes += decoded as u64;
            let first = self.header.tokens;
            self.header.tokens += ids.len() as u64;
            self.header.documents += 1;
            self.paths.extend(document.path.as_bytes());
            for field in [first, first + header as u64, self.paths.len() as u64] {
                self.table.extend(field.to_le_bytes());
            }
            bytes.clear();
            if self.header.id_bytes == 2 {
                bytes.extend(ids.iter().flat_map(|&id| (id as u16).to_le_bytes()));
            } else {
                bytes.extend(ids.iter().flat_map(|&id| id.to_le_bytes()));
            }
            self.body.update(&bytes);
            self.file
                .write_all(&bytes)
                .with_context(|| cannot(&self.target))
                .hint(ErrorKind::Data, || DISK_FULL_HINT)?;
        }
        Ok(())
    }

    /// Writes the document table and the header, and gives the file its name. `corpus_sha256` is
    /// the hash of the manifest of what was written.
    pub fn finish(mut self, corpus_sha256: [u8; 32]) -> anyhow::Result<Header> {
        self.finish_file(corpus_sha256)
            .with_context(|| cannot(&self.target))
            .hint(ErrorKind::Data, || DISK_FULL_HINT)?;
        self.file.commit()?;
        Ok(self.header)
    }

    fn finish_file(&mut self, corpus_sha256: [u8; 32]) -> io::Result<()> {
        let ids = self.header.tokens * u64::from(self.header.id_bytes);
        let zeros = [0; 8];
        let zeros = &zeros[..(ids.next_multiple_of(8) - ids) as usize];
        for part in [zeros, &self.table, &self.paths] {
            self.body.update(part);
            self.file.write_all(part)?;
        }
        self.header.path_bytes = self.paths.len() as u64;
        self.header.corpus_sha256 = corpus_sha256;
        self.header.body_sha256 = self.body.clone().finalize().into();
        self.file.seek(SeekFrom::Start(0))?;
        self.file.write_all(&self.header.to_bytes())
    }
}

const DISK_FULL_HINT: &str = "is the disk full? What was there before is untouched";

fn cannot(target: &Path) -> String {
    format!("cannot write {}", target.display())
}
