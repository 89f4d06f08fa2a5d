//! The version of the JSON that laam writes: `schema_version` in every document, and in every line
//! of `metrics.jsonl`. Documents without it are of version 1, whose keys are still read.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

use crate::error;

/// The version that is written.
pub const SCHEMA_VERSION: u32 = 2;

/// The field that holds it.
pub const SCHEMA_FIELD: &str = "schema_version";

/// Keys of version 1 and what they are called since.
const RENAMED: [(&str, &str); 5] = [
    ("tokens_a_second", "tokens_per_second"),
    ("bits_a_byte", "bits_per_byte"),
    ("bits_a_parameter", "bits_per_parameter"),
    ("tokens_right", "tokens_correct"),
    ("licence", "license"),
];

/// The `schema_version` field of a struct: written as [`SCHEMA_VERSION`], and accepted up to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SchemaVersion;

impl Serialize for SchemaVersion {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u32(SCHEMA_VERSION)
    }
}

impl<'de> Deserialize<'de> for SchemaVersion {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let version = u64::deserialize(deserializer)?;
        check(version).map_err(serde::de::Error::custom)?;
        Ok(Self)
    }
}

fn check(version: u64) -> anyhow::Result<()> {
    if version <= u64::from(SCHEMA_VERSION) {
        return Ok(());
    }
    Err(error::data(
        format!("{SCHEMA_FIELD} is {version}, this laam reads up to {SCHEMA_VERSION}"),
        "use the laam that wrote it, or a newer one",
    ))
}

/// A JSON object with its version as the first field.
pub fn versioned(document: Value) -> Value {
    let mut versioned = Map::new();
    versioned.insert(SCHEMA_FIELD.to_string(), SCHEMA_VERSION.into());
    if let Value::Object(fields) = document {
        versioned.extend(fields);
    }
    Value::Object(versioned)
}

/// A document that was read, with today's keys. An error if its version is a later one.
pub fn upgrade(mut document: Value) -> anyhow::Result<Value> {
    if let Some(version) = document.get(SCHEMA_FIELD) {
        check(version.as_u64().unwrap_or(u64::MAX))?;
    } else {
        rename(&mut document);
    }
    Ok(document)
}

fn rename(value: &mut Value) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(rename),
        Value::Object(fields) => {
            let renamed = std::mem::take(fields).into_iter().map(|(key, mut value)| {
                rename(&mut value);
                let now = RENAMED.iter().find(|(before, _)| *before == key);
                (now.map_or(key, |(_, now)| (*now).to_string()), value)
            });
            *fields = renamed.collect();
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn version_1_keys_are_renamed_at_every_depth() {
        let old = json!({"bits_a_byte": 1, "files": [{"tokens_right": 2, "path": "told"}]});
        let new = json!({"bits_per_byte": 1, "files": [{"tokens_correct": 2, "path": "told"}]});
        assert_eq!(upgrade(old).unwrap(), new);
    }

    #[test]
    fn versioned_documents_are_read_unchanged_and_later_versions_are_refused() {
        let document = versioned(json!({"bits_a_byte": 1}));
        assert_eq!(document.as_object().unwrap().keys().next().unwrap(), SCHEMA_FIELD);
        assert_eq!(upgrade(document.clone()).unwrap(), document);
        for version in [json!(3), json!(-1), json!("2")] {
            assert!(upgrade(json!({SCHEMA_FIELD: version})).is_err());
            assert!(serde_json::from_value::<SchemaVersion>(version).is_err());
        }
        assert!(serde_json::from_value::<SchemaVersion>(json!(SCHEMA_VERSION)).is_ok());
    }
}
