//! JSON lines: one object per line, one string of it the text. Plain, gzip or zstd, by the first bytes.

use std::borrow::Cow;
use std::fmt;
use std::io::{BufRead, Read};
use std::path::Path;

use serde::Deserializer;
use serde::de::{DeserializeSeed, Error, IgnoredAny, MapAccess, Visitor};

use super::archive::open_packed;
use super::names::shown;
use super::pass::{Flow, Intake};
use super::shards::{damaged, invalid_record};
use crate::error;

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
        let found = TextOf { field: &field, keys: Vec::new() }.deserialize(&mut json);
        let found = found.and_then(|found| json.end().map(|()| found));
        let text = match found.map_err(|why| invalid_record(number, why, path))? {
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

/// Reads one field of an object, a string or null, and skips all others.
struct TextOf<'a> {
    field: &'a str,
    keys: Vec<String>,
}

impl<'de> DeserializeSeed<'de> for TextOf<'_> {
    /// The text, or the keys of an object that lacks it.
    type Value = Result<Option<String>, Vec<String>>;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Self::Value, D::Error> {
        from.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for TextOf<'_> {
    type Value = Result<Option<String>, Vec<String>>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut text = None;
        while let Some(key) = map.next_key::<Cow<str>>()? {
            if key == self.field {
                let value = map.next_value::<Option<String>>();
                text = Some(value.map_err(|why| A::Error::custom(format!("{key}: {why}")))?);
                continue;
            }
            map.next_value::<IgnoredAny>()?;
            if text.is_none() && self.keys.len() < MAX_NAMED_KEYS {
                self.keys.push(key.into_owned());
            }
        }
        Ok(text.ok_or(self.keys))
    }
}
