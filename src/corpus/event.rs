//! What a fetch reports, and to whom.

use std::io;
use std::path::Path;

use crate::error;

/// Bytes of a record beside an archive or a part: a few addresses and a hash.
pub const MAX_RECORD_BYTES: u64 = 1 << 20;

/// A report of a running fetch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FetchEvent {
    /// Something a person should know.
    Note(String),
    /// A download starts or resumes.
    Start {
        /// Address of the file.
        url: String,
    },
    /// Bytes have arrived.
    Progress {
        /// Bytes received so far, with those of earlier attempts.
        done: u64,
        /// Bytes of the file, if the server says.
        total: Option<u64>,
    },
    /// The download is complete.
    End,
}

/// Receiver of events.
pub type Tell<'a> = &'a mut dyn FnMut(FetchEvent);

/// The error of a cache that cannot be written.
pub fn cannot_write(file: &Path, why: &io::Error) -> anyhow::Error {
    error::data(
        format!("{why}, {}", file.display()),
        "free some space, or set LAAM_CACHE to another folder",
    )
}
