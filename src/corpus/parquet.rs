//! Parquet: one column of strings, a row group after another, page by page. No other column is read.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::panic::{self, AssertUnwindSafe};
use std::path::Path;

use ::parquet::basic::{Compression, Type};
use ::parquet::column::reader::ColumnReader;
use ::parquet::data_type::ByteArray;
use ::parquet::file::reader::{FileReader, SerializedFileReader};

use super::archive::{ANY_RATIO_BYTES, MAX_RATIO};
use super::pass::{Flow, Intake};
use super::shards::{damaged, invalid_record};
use super::{SOURCE_HINT, shown};
use crate::error;
use crate::files;

/// Records that are read in one go.
const BATCH_RECORDS: usize = 64;
/// Columns that an error names.
const MAX_NAMED_COLUMNS: usize = 16;

pub fn read(path: &Path, intake: &mut Intake) -> anyhow::Result<Flow> {
    let mut done = 0;
    // The crate panics on some files that are damaged.
    let read = panic::catch_unwind(AssertUnwindSafe(|| read_column(path, intake, &mut done)));
    read.unwrap_or_else(|_| Err(invalid_record(done + 1, "its pages are damaged", path)))
}

/// Larger footers are refused: those of files with 100,000 column chunks have some 10 MB.
const MAX_FOOTER_BYTES: u64 = 64 << 20;
/// Most columns and groups of a schema, and how deep they lie within each other: the crate descends into them
/// by recursion, and lists the path of each column.
const MAX_SCHEMA_ELEMENTS: usize = 1 << 16;
const MAX_SCHEMA_DEPTH: usize = 100;

/// Refuses a schema that the crate would take too much stack or time for. What is damaged otherwise is left to
/// the crate.
fn check_schema(file: &mut File) -> io::Result<Option<String>> {
    let bytes = file.metadata()?.len();
    let mut end = [0; 8];
    if bytes < 12 {
        return Ok(None);
    }
    file.seek(SeekFrom::End(-8))?;
    file.read_exact(&mut end)?;
    let footer = u64::from(u32::from_le_bytes([end[0], end[1], end[2], end[3]]));
    if &end[4..] != b"PAR1" || footer > bytes - 8 {
        return Ok(None);
    }
    if footer > MAX_FOOTER_BYTES {
        return Ok(Some(format!("a footer of {footer} bytes: at most {MAX_FOOTER_BYTES}")));
    }
    file.seek(SeekFrom::End(-8 - footer as i64))?;
    let mut text = vec![0; footer as usize];
    file.read_exact(&mut text)?;
    file.rewind()?;
    let mut children = Vec::new();
    if (Thrift { bytes: &text, at: 0 }).schema(&mut children).is_none() {
        return Ok(None);
    }
    // How many children each open group still waits for.
    let mut open: Vec<u64> = Vec::new();
    for &count in &children {
        while open.last() == Some(&0) {
            open.pop();
        }
        if let Some(waiting) = open.last_mut() {
            *waiting -= 1;
        }
        open.push(count);
        if open.len() > MAX_SCHEMA_DEPTH || children.len() > MAX_SCHEMA_ELEMENTS {
            return Ok(Some(format!(
                "a schema of more than {MAX_SCHEMA_ELEMENTS} columns, or {MAX_SCHEMA_DEPTH} levels"
            )));
        }
    }
    Ok(None)
}

/// A reader of thrift's compact protocol that knows the schema of a Parquet footer, and skips the rest.
struct Thrift<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Thrift<'_> {
    fn byte(&mut self) -> Option<u8> {
        self.at += 1;
        self.bytes.get(self.at - 1).copied()
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }

    /// Number and type of the next field of a struct; a type of 0 ends it.
    fn field(&mut self, last: &mut i64) -> Option<u8> {
        let byte = self.byte()?;
        let kind = byte & 15;
        if kind == 0 {
            return Some(0);
        }
        *last = match byte >> 4 {
            0 => self.zigzag()?,
            delta => *last + i64::from(delta),
        };
        Some(kind)
    }

    fn zigzag(&mut self) -> Option<i64> {
        let value = self.varint()?;
        Some((value >> 1) as i64 ^ -((value & 1) as i64))
    }

    /// Length of a list, and the type of its elements.
    fn list(&mut self) -> Option<(u64, u8)> {
        let byte = self.byte()?;
        let length = if byte >> 4 == 15 { self.varint()? } else { u64::from(byte >> 4) };
        // Each element takes a byte or more.
        (length <= self.bytes.len() as u64).then_some((length, byte & 15))
    }

    fn skip(&mut self, kind: u8, depth: usize) -> Option<()> {
        match kind {
            1 | 2 => {}
            3 => self.at += 1,
            4..=6 => drop(self.varint()?),
            7 => self.at += 8,
            8 => self.at = usize::try_from(self.varint()?).ok()?.checked_add(self.at)?,
            9 | 10 => {
                let (length, kind) = self.list()?;
                for _ in 0..length {
                    // In a list a bool is a byte.
                    self.skip(if kind <= 2 { 3 } else { kind }, depth.checked_sub(1)?)?;
                }
            }
            12 => {
                let mut last = 0;
                while let kind @ 1.. = self.field(&mut last)? {
                    self.skip(kind, depth.checked_sub(1)?)?;
                }
            }
            _ => return None,
        }
        (self.at <= self.bytes.len()).then_some(())
    }

    /// The number of children of each element of the schema, in order.
    fn schema(&mut self, children: &mut Vec<u64>) -> Option<()> {
        const SCHEMA: i64 = 2;
        const NUM_CHILDREN: i64 = 5;
        let mut last = 0;
        while let kind @ 1.. = self.field(&mut last)? {
            if last != SCHEMA {
                self.skip(kind, 32)?;
                continue;
            }
            let (length, _) = self.list()?;
            for _ in 0..length {
                let (mut last, mut count) = (0, 0);
                while let kind @ 1.. = self.field(&mut last)? {
                    if last == NUM_CHILDREN && (4..=6).contains(&kind) {
                        count = self.zigzag()?.max(0) as u64;
                    } else {
                        self.skip(kind, 32)?;
                    }
                }
                children.push(count);
            }
            return Some(());
        }
        None
    }
}

/// Reads all records; `done` counts them.
fn read_column(path: &Path, intake: &mut Intake, done: &mut u64) -> anyhow::Result<Flow> {
    let place = path.display();
    let unreadable = |why| error::data(format!("{why}, {}", path.display()), SOURCE_HINT);
    let mut file = files::open(path).map_err(unreadable)?;
    let file_bytes = file.metadata().map_err(unreadable)?.len();
    if let Some(what) = check_schema(&mut file).map_err(unreadable)? {
        return Err(error::data(
            format!("{what}, {place}"),
            "leave the file out, or write its text column to another file",
        ));
    }
    // A few bytes may stand for any number of records: runs of nulls, or of an entry of the dictionary.
    let allowed = MAX_RATIO.saturating_mul(file_bytes).max(ANY_RATIO_BYTES);
    let mut unpacked = 0;
    let reader = SerializedFileReader::new(file).map_err(|why| {
        error::data(
            format!("damaged or cut short ({why}), {place}"),
            "copy or download the file again; it must be a Parquet file",
        )
    })?;
    let (field, limit) = (intake.options().text_field().to_string(), intake.limits().file);
    let schema = reader.metadata().file_metadata().schema_descr();
    let columns = schema.columns().iter();
    let Some(column) = columns.clone().position(|column| column.path().string() == field) else {
        let names: Vec<_> =
            columns.map(|column| shown(column.path().string().as_bytes())).collect();
        let names = names[..names.len().min(MAX_NAMED_COLUMNS)].join(", ");
        return Err(error::data(
            format!("no column {field:?}, only {names}, {place}"),
            "name the column that holds the text with `text_field`",
        ));
    };
    let described = schema.column(column);
    if described.max_rep_level() > 0 || described.physical_type() != Type::BYTE_ARRAY {
        return Err(error::data(
            format!("column {field:?} does not hold strings, {place}"),
            "name the column that holds the text with `text_field`",
        ));
    }
    let full = described.max_def_level();
    for group in 0..reader.num_row_groups() {
        let failed = |done: u64, why: ::parquet::errors::ParquetError| {
            let what = format!("{why}, in row group {group}");
            invalid_record(done + 1, what, path)
        };
        let rows = reader.get_row_group(group).map_err(|why| failed(*done, why))?;
        let expected = rows.metadata().num_rows();
        let codec = rows.metadata().column(column).compression();
        if !matches!(codec, Compression::UNCOMPRESSED | Compression::SNAPPY | Compression::ZSTD(_))
        {
            let codec = codec.to_string();
            let codec = codec.split('(').next().unwrap_or_default();
            return Err(error::data(
                format!(
                    "row group {group} is compressed with {codec}, which laam does not read, {place}"
                ),
                "write the file again with compression zstd, snappy or none",
            ));
        }
        let column = rows.get_column_reader(column).map_err(|why| failed(*done, why))?;
        let ColumnReader::ByteArrayColumnReader(mut column) = column else {
            return Err(invalid_record(*done + 1, "it is not a string", path));
        };
        let mut records_of_group = 0;
        let (mut levels, mut values) = (Vec::new(), Vec::<ByteArray>::new());
        loop {
            levels.clear();
            values.clear();
            let read = column.read_records(BATCH_RECORDS, Some(&mut levels), None, &mut values);
            let (records, ..) = read.map_err(|why| failed(*done, why))?;
            if records == 0 {
                break;
            }
            records_of_group += records as i64;
            let mut values = values.drain(..);
            for at in 0..records {
                let number = *done + 1;
                let is_there = full == 0 || levels.get(at) == Some(&full);
                let value = if is_there { values.next() } else { None };
                let text = value.map(|value| {
                    if value.len() as u64 > limit {
                        return Err(invalid_record(
                            number,
                            format!("more than {limit} bytes"),
                            path,
                        ));
                    }
                    let text = value.as_utf8().map(str::to_string);
                    text.map_err(|_| invalid_record(number, "it is not UTF-8", path))
                });
                *done = number;
                unpacked +=
                    1 + text.as_ref().map_or(0, |text| text.as_ref().map_or(0, String::len)) as u64;
                if unpacked > allowed {
                    return Err(damaged(&io::ErrorKind::QuotaExceeded.into(), number, path));
                }
                if intake.keep_record(text.transpose()?) == Flow::Break(()) {
                    return Ok(Flow::Break(()));
                }
            }
        }
        if records_of_group != expected {
            let what =
                format!("row group {group} ends after {records_of_group} of {expected} records");
            return Err(invalid_record(*done + 1, what, path));
        }
    }
    Ok(Flow::Continue(()))
}
