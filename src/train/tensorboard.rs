//! TensorBoard's event files, written by hand: TFRecords of `Event` messages.
//!
//! A record is its length (u64), the masked CRC-32C of those eight bytes, the message, and the
//! masked CRC-32C of the message, all little-endian. The messages are protocol buffers of a few
//! fields: `Event { 1: wall_time, 2: step, 3: file_version, 5: Summary { 1: Value { 1: tag,
//! 2: simple_value } }, 7: SessionLog { 1: status } }`.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;

use crate::error::{ErrorKind, Hint};

/// `SessionLog { status: START }`.
const START: [u8; 2] = [1 << 3, 1];

/// An event file, open for more scalars.
pub struct EventFile {
    file: File,
}

impl EventFile {
    /// Starts a file of its own in `folder`; TensorBoard reads all that lie there as one run. `next` is
    /// the first step that is to come: the file begins with a `SessionLog` START at it, by which
    /// TensorBoard forgets that step and later ones in older files.
    pub fn create(folder: &Path, next: u64) -> anyhow::Result<Self> {
        let now = wall_time();
        let name = format!("events.out.tfevents.{}.laam.{}", now as u64, std::process::id());
        let path = folder.join(name);
        let create = || fs::create_dir_all(folder).and_then(|()| File::create(&path));
        let file = create()
            .with_context(|| format!("cannot write {}", path.display()))
            .hint(ErrorKind::Data, || "choose a writable folder with `tensorboard`")?;
        let mut events = Self { file };
        let mut event = Vec::new();
        double(&mut event, 1, now);
        bytes(&mut event, 3, b"brain.Event:2");
        events.record(&event)?;
        let mut event = Vec::new();
        double(&mut event, 1, now);
        key(&mut event, 2, 0);
        varint(&mut event, next);
        bytes(&mut event, 7, &START);
        events.record(&event)?;
        Ok(events)
    }

    /// Adds one event that holds all of these scalars.
    pub fn write(&mut self, step: u64, scalars: &[(&str, f64)]) -> anyhow::Result<()> {
        let mut summary = Vec::new();
        for (tag, value) in scalars {
            let mut message = Vec::new();
            bytes(&mut message, 1, tag.as_bytes());
            key(&mut message, 2, 5);
            message.extend_from_slice(&(*value as f32).to_le_bytes());
            bytes(&mut summary, 1, &message);
        }
        let mut event = Vec::new();
        double(&mut event, 1, wall_time());
        key(&mut event, 2, 0);
        varint(&mut event, step);
        bytes(&mut event, 5, &summary);
        self.record(&event)
    }

    fn record(&mut self, message: &[u8]) -> anyhow::Result<()> {
        let length = (message.len() as u64).to_le_bytes();
        let mut record = length.to_vec();
        record.extend_from_slice(&masked_crc(&length).to_le_bytes());
        record.extend_from_slice(message);
        record.extend_from_slice(&masked_crc(message).to_le_bytes());
        self.file.write_all(&record).context("cannot write the TensorBoard events")
    }
}

fn wall_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

/// A CRC of data that itself holds CRCs is weak: TFRecord rotates and shifts it.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

fn key(out: &mut Vec<u8>, field: u8, wire: u8) {
    out.push(field << 3 | wire);
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn double(out: &mut Vec<u8>, field: u8, value: f64) {
    key(out, field, 1);
    out.extend_from_slice(&value.to_le_bytes());
}

fn bytes(out: &mut Vec<u8>, field: u8, value: &[u8]) {
    key(out, field, 2);
    varint(out, value.len() as u64);
    out.extend_from_slice(value);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first record as TensorBoard's own writer makes it for wall time 1.0: taken from its bytes.
    #[test]
    fn records_carry_masked_checksums() {
        // CRC-32C's published check value, masked as TFRecord says.
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(
            masked_crc(b"123456789"),
            0xe306_9283u32.rotate_right(15).wrapping_add(0xa282_ead8)
        );
        let mut event = Vec::new();
        double(&mut event, 1, 1.0);
        bytes(&mut event, 3, b"brain.Event:2");
        let expected = b"\x09\x00\x00\x00\x00\x00\x00\xf0\x3f\x1a\x0dbrain.Event:2";
        assert_eq!(event, expected);
    }
}
