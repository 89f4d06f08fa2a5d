//! Tokens to text, as they come.

use crate::tokenizer::Tokenizer;

/// The text of one continuation, handed out in pieces that are whole UTF-8 characters.
#[derive(Debug)]
pub struct TextStream<'t> {
    tokenizer: &'t Tokenizer,
    /// Prompt and continuation, if a token's text depends on those before it: a blank that begins a
    /// word, or one of several tokens that spell a character.
    ids: Vec<u32>,
    /// Bytes of that text that are the prompt's, or were handed out.
    given: usize,
    /// Bytes that wait for the rest of a character.
    waiting: Vec<u8>,
}

impl<'t> TextStream<'t> {
    /// A stream of what follows `prompt`.
    pub fn new(tokenizer: &'t Tokenizer, prompt: &[u32]) -> anyhow::Result<Self> {
        let mut stream = Self { tokenizer, ids: Vec::new(), given: 0, waiting: Vec::new() };
        if !tokenizer.is_spelled() {
            stream.ids.extend(prompt);
            stream.given = stable(&tokenizer.decode_bytes(prompt)?).len();
        }
        Ok(stream)
    }

    /// The text that one more token completes; it may be empty. Markers are spelled out.
    pub fn push(&mut self, id: u32) -> anyhow::Result<Vec<u8>> {
        if self.tokenizer.is_spelled() {
            self.waiting.extend(self.tokenizer.decode_bytes(&[id])?);
        } else {
            self.ids.push(id);
            let text = self.tokenizer.decode_bytes(&self.ids)?;
            let stable = stable(&text);
            self.waiting.extend(stable.get(self.given..).unwrap_or_default());
            self.given = self.given.max(stable.len());
        }
        let whole = whole_characters(&self.waiting);
        Ok(self.waiting.drain(..whole).collect())
    }

    /// The bytes left at the end, which never became a character.
    pub fn finish(self) -> anyhow::Result<Vec<u8>> {
        let mut rest = self.waiting;
        if !self.ids.is_empty() {
            let text = self.tokenizer.decode_bytes(&self.ids)?;
            rest.extend(text.get(self.given..).unwrap_or_default());
        }
        Ok(rest)
    }
}

/// The part of a decoded text that later tokens cannot change: each byte of a character that is not
/// complete yet decodes to a U+FFFD at the end.
fn stable(text: &[u8]) -> &[u8] {
    let mut text = text;
    while let Some(before) = text.strip_suffix("\u{fffd}".as_bytes()) {
        text = before;
    }
    text
}

/// Length of the part before an incomplete character at the end, which may yet be completed. Bytes
/// that can begin none are let through: they will not get better.
fn whole_characters(bytes: &[u8]) -> usize {
    let mut at = 0;
    loop {
        match std::str::from_utf8(&bytes[at..]) {
            Ok(_) => return bytes.len(),
            Err(fault) => match fault.error_len() {
                None => return at + fault.valid_up_to(),
                Some(bad) => at += fault.valid_up_to() + bad,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_stream_holds_back_incomplete_characters_only() {
        for (bytes, whole) in [
            (&b"abc"[..], 3),
            (b"ab\xc3", 2),
            (b"ab\xc3\xa4", 4),
            (b"\xe2\x82", 0),
            (b"\xff\xc3", 1),
            (b"\xc3\xc3\xa4\xf0\x9f", 3),
            (b"", 0),
        ] {
            assert_eq!(whole_characters(bytes), whole, "{bytes:?}");
        }
    }
}
