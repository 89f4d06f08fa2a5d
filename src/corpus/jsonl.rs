//! JSON lines: one object per line, one string of it the text. Plain, gzip or zstd, by the first bytes.

use std::borrow::Cow;
use std::fmt;
use std::io::{BufRead, Read};
use std::path::Path;

use serde::Deserializer;
use serde::de::{DeserializeSeed, Error, IgnoredAny, MapAccess, SeqAccess, Unexpected, Visitor};

use super::archive::open_packed;
use super::names::shown;
use super::pass::{Flow, Intake};
use super::shards::{damaged, invalid_record};
use crate::error::{self, ErrorKind, Hint};

/// Hint for a file of one JSON document.
const ONE_A_LINE: &str =
    "each line is an object by itself: jq -c '.[]' writes a list so, jq -c . an object";
/// Keys of a record that an error names.
const MAX_NAMED_KEYS: usize = 8;

pub fn read(path: &Path, intake: &mut Intake) -> anyhow::Result<Flow> {
    let (field, limit) = (intake.options().text_field().to_string(), intake.limits().file);
    let mut lines = open_packed(path).map_err(|why| damaged(&why, 0, path))?;
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        let read = lines.by_ref().take(limit + 1).read_until(b'\n', &mut line);
        if read.map_err(|why| damaged(&why, number - 1, path))? == 0 {
            break;
        }
        if line.len() as u64 > limit {
            return Err(invalid_record(number, format!("more than {limit} bytes"), path));
        }
        let object = line.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(&line);
        if object.trim_ascii().is_empty() {
            continue;
        }
        let mut json = serde_json::Deserializer::from_slice(object);
        let found = TextOf { field: &field, keys: Vec::new(), before: String::new() };
        let found = found.deserialize(&mut json);
        let found = found.and_then(|found| json.end().map(|()| found));
        let starts_list = object.trim_ascii_start().starts_with(b"[");
        let is_one =
            number == 1 && (starts_list || found.as_ref().is_err_and(serde_json::Error::is_eof));
        let mut found = found.map_err(|why| invalid_record(number, why, path));
        if is_one {
            found = found.hint(ErrorKind::Data, || ONE_A_LINE);
        }
        let text = match found? {
            Ok(text) => text,
            Err(keys) => {
                let keys: Vec<_> = keys.iter().map(|key| shown(key.as_bytes())).collect();
                return Err(error::data(
                    format!(
                        "record {number} has no field {field:?}, only {}, {}",
                        keys.join(", "),
                        path.display()
                    ),
                    "name the field that holds the text with `text_field`",
                ));
            }
        };
        if intake.keep_record(text) == Flow::Break(()) {
            return Ok(Flow::Break(()));
        }
    }
    Ok(Flow::Continue(()))
}

/// Reads one field of an object, a string or null, and skips all others. A field `a.b` is that of this name, or
/// else the field `b` of the object `a`, as a column of Parquet is named.
struct TextOf<'a> {
    field: &'a str,
    keys: Vec<String>,
    /// The path of the object, with a dot at its end.
    before: String,
}

impl<'de> DeserializeSeed<'de> for TextOf<'_> {
    /// The text, or the keys of an object that lacks it.
    type Value = Result<Option<String>, Vec<String>>;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Self::Value, D::Error> {
        from.deserialize_any(self)
    }
}

impl TextOf<'_> {
    /// Error of a record that is not an object.
    fn no_object<E: Error>(
        self,
        found: Unexpected,
    ) -> Result<Result<Option<String>, Vec<String>>, E> {
        if self.before.is_empty() {
            return Err(E::invalid_type(found, &self));
        }
        Ok(Err(vec![self.before.trim_end_matches('.').to_string()]))
    }
}

impl<'de> Visitor<'de> for TextOf<'_> {
    type Value = Result<Option<String>, Vec<String>>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object")
    }

    /// Null in place of an object has no text.
    fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
        if self.before.is_empty() { self.no_object(Unexpected::Unit) } else { Ok(Ok(None)) }
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Self::Value, E> {
        self.no_object(Unexpected::Bool(value))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Self::Value, E> {
        self.no_object(Unexpected::Signed(value))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Self::Value, E> {
        self.no_object(Unexpected::Unsigned(value))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Self::Value, E> {
        self.no_object(Unexpected::Float(value))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Self::Value, E> {
        self.no_object(Unexpected::Str(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let found = self.no_object(Unexpected::Seq)?;
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(found)
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut text = None;
        while let Some(key) = map.next_key::<Cow<str>>()? {
            if key == self.field {
                let value = map.next_value::<Option<String>>();
                let named = |why| A::Error::custom(format!("{}{key}: {why}", self.before));
                text = Some(value.map_err(named)?);
                continue;
            }
            let inner = self.field.strip_prefix(&*key).and_then(|rest| rest.strip_prefix('.'));
            if let (Some(field), None) = (inner, &text) {
                let before = format!("{}{key}.", self.before);
                match map.next_value_seed(TextOf { field, keys: Vec::new(), before })? {
                    Ok(found) => text = Some(found),
                    Err(keys) => self.keys.extend(keys),
                }
                continue;
            }
            map.next_value::<IgnoredAny>()?;
            if text.is_none() && self.keys.len() < MAX_NAMED_KEYS {
                self.keys.push(format!("{}{key}", self.before));
            }
        }
        Ok(text.ok_or(self.keys))
    }
}
