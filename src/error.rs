//! Errors with a kind and a hint: what is wrong and where, and what to do about it.
//!
//! The program prints `laam: WHAT, WHERE` and then `hint: WHAT TO DO`. Any [`anyhow::Error`] with an
//! [`Advice`] in its chain has a kind ([`kind_of`]) and a hint ([`hint_of`]).
//!
//! Texts name a setting by its field, in backticks: `` `batch_size` ``. The command line prints the
//! flag instead ([`with_flags`]); a recipe or a `config.json` has the field itself as its key.

use std::fmt::{self, Display};

/// Kind of an error: what has to change for it to go away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// A flag, a setting, a recipe, or the environment.
    Config,
    /// A corpus, a tokenizer, a token file, a run directory, or a place to read from or write to.
    Data,
    /// A model directory: its weights, configuration, provenance or training state.
    Checkpoint,
    /// A GPU, its driver, the simulator, or the memory of this machine.
    Device,
    /// Processes that train together: one is late, gone, or was started in another way. Exit code 75.
    Group,
    /// The program itself.
    Internal,
}

impl ErrorKind {
    /// The kind in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Config => "config",
            Self::Data => "data",
            Self::Checkpoint => "checkpoint",
            Self::Device => "device",
            Self::Group => "group",
            Self::Internal => "internal",
        }
    }
}

/// Text of every internal error.
pub const INTERNAL: &str = "internal error in laam; please report it";

/// An error with its kind and a hint.
#[derive(Debug)]
pub struct Advice {
    kind: ErrorKind,
    what: anyhow::Error,
    hint: String,
}

impl Display for Advice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The alternate form joins the causes on one line, outermost first.
        write!(f, "{:#}", self.what)
    }
}

impl std::error::Error for Advice {}

fn new(kind: ErrorKind, what: impl Display, hint: impl Display) -> anyhow::Error {
    Advice { kind, what: anyhow::anyhow!("{what}"), hint: hint.to_string() }.into()
}

/// A new error of kind [`ErrorKind::Config`].
pub fn config(what: impl Display, hint: impl Display) -> anyhow::Error {
    new(ErrorKind::Config, what, hint)
}

/// A new error of kind [`ErrorKind::Data`].
pub fn data(what: impl Display, hint: impl Display) -> anyhow::Error {
    new(ErrorKind::Data, what, hint)
}

/// A new error of kind [`ErrorKind::Checkpoint`].
pub fn checkpoint(what: impl Display, hint: impl Display) -> anyhow::Error {
    new(ErrorKind::Checkpoint, what, hint)
}

/// A new error of kind [`ErrorKind::Device`].
pub fn device(what: impl Display, hint: impl Display) -> anyhow::Error {
    new(ErrorKind::Device, what, hint)
}

/// A new error of kind [`ErrorKind::Group`].
pub fn group(what: impl Display, hint: impl Display) -> anyhow::Error {
    new(ErrorKind::Group, what, hint)
}

/// A new error of kind [`ErrorKind::Internal`]; its hint is [`INTERNAL`].
pub fn internal(what: impl Display) -> anyhow::Error {
    new(ErrorKind::Internal, what, INTERNAL)
}

/// A setting's value out of its range, of kind [`ErrorKind::Config`]: ``invalid `FIELD` VALUE: must
/// be RANGE``.
pub fn invalid(field: &str, value: impl Display, range: impl Display) -> anyhow::Error {
    let hint = format!("set `{field}` to {range}");
    config(format!("invalid `{field}` {value}: must be {range}"), hint)
}

/// A command that needs a feature this build was made without, of kind [`ErrorKind::Config`].
pub fn missing_feature(feature: &str) -> anyhow::Error {
    config(
        format!("this laam was built without the feature {feature}"),
        format!("build with cargo build --release --features {feature}"),
    )
}

fn advice(error: &anyhow::Error) -> Option<&Advice> {
    error.downcast_ref::<Advice>()
}

/// The kind of an error; none of one that was never given a kind, such as a closed pipe.
pub fn kind_of(error: &anyhow::Error) -> Option<ErrorKind> {
    advice(error).map(|advice| advice.kind)
}

/// The hint of an error, if it has one.
pub fn hint_of(error: &anyhow::Error) -> Option<&str> {
    advice(error).map(|advice| advice.hint.as_str())
}

/// A text with each `` `field` `` that `flag` knows replaced by what it gives for the field.
pub fn with_flags(text: &str, flag: impl Fn(&str) -> Option<String>) -> String {
    let mut parts = text.split('`');
    let mut replaced = parts.next().unwrap_or_default().to_string();
    while let Some(part) = parts.next() {
        if let Some(flag) = flag(part) {
            replaced.push_str(&flag);
            replaced.push_str(parts.next().unwrap_or_default());
        } else {
            replaced.push('`');
            replaced.push_str(part);
        }
    }
    replaced
}

/// Adds a kind and a hint to the error of a result.
pub trait Hint<T> {
    /// Keeps the error's text. `hint` is called only if there is an error.
    fn hint<D: Display>(self, kind: ErrorKind, hint: impl FnOnce() -> D) -> anyhow::Result<T>;
}

impl<T, E: Into<anyhow::Error>> Hint<T> for Result<T, E> {
    fn hint<D: Display>(self, kind: ErrorKind, hint: impl FnOnce() -> D) -> anyhow::Result<T> {
        let advice =
            |error: E| Advice { kind, what: error.into(), hint: hint().to_string() }.into();
        self.map_err(advice)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn kind_and_hint_survive_context() {
        let result: anyhow::Result<()> = Err(data("no such version", "try v1.0/1.0"));
        let error = result.context("fetching").context("running").unwrap_err();
        assert_eq!(kind_of(&error), Some(ErrorKind::Data));
        assert_eq!(hint_of(&error), Some("try v1.0/1.0"));
        assert_eq!(format!("{error:#}"), "running: fetching: no such version");
    }

    #[test]
    fn a_hint_gives_any_error_a_kind() {
        let closed: std::io::Result<()> = Err(std::io::ErrorKind::BrokenPipe.into());
        let error = closed.hint(ErrorKind::Device, || "plug it in").unwrap_err();
        assert_eq!(
            (kind_of(&error), hint_of(&error)),
            (Some(ErrorKind::Device), Some("plug it in"))
        );
        assert_eq!(kind_of(&std::io::Error::other("no kind").into()), None);
    }

    #[test]
    fn fields_become_flags_and_other_backticks_stay() {
        let flag = |field: &str| (field == "batch_size").then(|| "--batch-size".to_string());
        let error = invalid("batch_size", 0, "at least 1");
        assert_eq!(
            with_flags(&error.to_string(), flag),
            "invalid --batch-size 0: must be at least 1"
        );
        assert_eq!(with_flags("`batch_size``batch_size`", flag), "--batch-size--batch-size");
        for text in ["`rope_theta` is `x`", "a ` alone", "``", "ends in `batch", ""] {
            assert_eq!(with_flags(text, flag), text);
        }
    }
}
