//! Size of a text under a general compressor, as a baseline for the weights.

use std::io::{self, Write};

use anyhow::Context;
use lzma_rust2::{XzOptions, XzWriter};

use crate::corpus::Document;
use crate::error::{ErrorKind, Hint, INTERNAL};

/// Text beyond so many bytes is not compressed: at a megabyte a second or two it would take long.
const MAX_XZ_INPUT_BYTES: u64 = 64 << 20;

/// Bytes of all the files in a row as `xz -9` makes them; none for a text that is too large.
pub fn xz(
    documents: impl IntoIterator<Item = anyhow::Result<Document>>,
) -> anyhow::Result<Option<u64>> {
    let cannot = || "cannot compress the text";
    let advice = || INTERNAL;
    let options = XzOptions::with_preset(9);
    let mut xz =
        XzWriter::new(Count(0), options).with_context(cannot).hint(ErrorKind::Internal, advice)?;
    let mut bytes = 0;
    for document in documents {
        let text = document?.text;
        bytes += text.len() as u64;
        if bytes > MAX_XZ_INPUT_BYTES {
            return Ok(None);
        }
        xz.write_all(text.as_bytes()).with_context(cannot).hint(ErrorKind::Internal, advice)?;
    }
    Ok(Some(xz.finish().with_context(cannot).hint(ErrorKind::Internal, advice)?.0))
}

/// Counts what is written to it.
struct Count(u64);

impl Write for Count {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xz_size_of_repetitive_and_random_text() {
        let of =
            |text: String| xz([Ok(Document::new("a.c", text))]).unwrap().expect("a small text");
        let mut state = 1u64;
        let drawn = |_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            char::from(b' ' + (state >> 58) as u8)
        };
        let drawn: String = (0..40_000).map(drawn).collect();
        assert!(of("int x;\n".repeat(5000)) < 300);
        // Each of 64 characters has six bits.
        let size = of(drawn);
        assert!((30_000..32_000).contains(&size), "{size}");
    }
}
