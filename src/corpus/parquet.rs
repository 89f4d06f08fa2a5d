//! Parquet: one column of strings, a row group after another, page by page. No other column is read.

use std::panic::{self, AssertUnwindSafe};
use std::path::Path;

use ::parquet::basic::Type;
use ::parquet::column::reader::ColumnReader;
use ::parquet::data_type::ByteArray;
use ::parquet::file::reader::{FileReader, SerializedFileReader};

use super::pass::{Flow, Intake};
use super::shards::invalid_record;
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

/// Reads all records; `done` counts them.
fn read_column(path: &Path, intake: &mut Intake, done: &mut u64) -> anyhow::Result<Flow> {
    let place = path.display();
    let file = files::open(path)
        .map_err(|why| error::data(format!("{why}, {}", path.display()), SOURCE_HINT))?;
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
