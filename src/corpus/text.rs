//! Text files longer than one document may be: cut at line ends into documents without names.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use super::Encoding;
use super::pass::{Flow, Intake};
use super::shards::{damaged, invalid_record};
use crate::files;

/// Bytes of a document: it ends with the line in which it reaches them.
const DOCUMENT_BYTES: usize = 1 << 20;

pub fn read(path: &Path, intake: &mut Intake) -> anyhow::Result<Flow> {
    let mut file = BufReader::new(files::open(path).map_err(|why| damaged(&why, 0, path))?);
    let limit = intake.limits().file;
    for number in 1.. {
        let mut bytes = Vec::with_capacity(DOCUMENT_BYTES + (1 << 12));
        let read = file.by_ref().take(DOCUMENT_BYTES as u64).read_to_end(&mut bytes);
        let read = read.and_then(|_| file.by_ref().take(limit).read_until(b'\n', &mut bytes));
        read.map_err(|why| damaged(&why, number - 1, path))?;
        if bytes.len() as u64 > limit {
            return Err(invalid_record(number, format!("a line of more than {limit} bytes"), path));
        }
        if bytes.is_empty() {
            break;
        }
        let text = match (String::from_utf8(bytes), intake.options().encoding) {
            (Ok(text), _) => text,
            (Err(not), Encoding::Latin1) => {
                not.as_bytes().iter().copied().map(char::from).collect()
            }
            (Err(_), Encoding::Utf8) => {
                return Err(invalid_record(number, "it is not UTF-8", path));
            }
        };
        if intake.keep_record(Some(text)) == Flow::Break(()) {
            return Ok(Flow::Break(()));
        }
    }
    Ok(Flow::Continue(()))
}
