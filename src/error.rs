//! Errors with advice: what went wrong and where, and what to do about it.
//!
//! The program prints `laam: WHAT, WHERE` and then `hint: WHAT TO DO`. Any [`anyhow::Error`] that
//! holds an [`Advice`] somewhere in its chain has a hint.

use std::fmt::{self, Display};

/// An error that knows what its reader can do about it.
#[derive(Debug)]
pub struct Advice {
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

/// A new error `what` with the advice `hint`.
pub fn error(what: impl Display, hint: impl Display) -> anyhow::Error {
    Advice { what: anyhow::anyhow!("{what}"), hint: hint.to_string() }.into()
}

/// The advice an error carries, if any.
pub fn hint_of(error: &anyhow::Error) -> Option<&str> {
    error.downcast_ref::<Advice>().map(|advice| advice.hint.as_str())
}

/// Adds advice to the error of a result.
pub trait Hint<T> {
    /// Keeps the error as it is and attaches `hint`, made only when there is an error.
    fn hint<D: Display>(self, hint: impl FnOnce() -> D) -> anyhow::Result<T>;
}

impl<T, E: Into<anyhow::Error>> Hint<T> for Result<T, E> {
    fn hint<D: Display>(self, hint: impl FnOnce() -> D) -> anyhow::Result<T> {
        self.map_err(|error| Advice { what: error.into(), hint: hint().to_string() }.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn a_hint_survives_context() {
        let result: anyhow::Result<()> = Err(error("no such version", "try v1.0/1.0"));
        let error = result.context("fetching").context("running").unwrap_err();
        assert_eq!(hint_of(&error), Some("try v1.0/1.0"));
        assert_eq!(format!("{error:#}"), "running: fetching: no such version");
    }
}
