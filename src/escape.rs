//! Foreign text made fit to be shown: names in archives, provenance, headers and recipes may hold
//! sequences that move a terminal's cursor or turn text around.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::{self, Write};
use std::ops::RangeInclusive;

/// Characters that a terminal or a browser acts on instead of showing: control characters, bidirectional
/// controls, line separators, and others without width.
const ACTIVE: [RangeInclusive<char>; 11] = [
    '\0'..='\u{1f}',
    '\u{7f}'..='\u{9f}',
    '\u{ad}'..='\u{ad}',
    '\u{61c}'..='\u{61c}',
    '\u{180e}'..='\u{180e}',
    '\u{200b}'..='\u{200f}',
    '\u{2028}'..='\u{202e}',
    '\u{2060}'..='\u{206f}',
    '\u{feff}'..='\u{feff}',
    '\u{fff9}'..='\u{fffb}',
    '\u{e0000}'..='\u{e007f}',
];

fn is_active(character: char) -> bool {
    ACTIVE.iter().any(|range| range.contains(&character))
}

/// The characters that [`visible_lines`] escapes, as a character class of a JavaScript expression with the
/// flag `u`.
pub fn javascript_class() -> String {
    let mut class = String::from("[");
    for range in &ACTIVE {
        let (first, last) = (u32::from(*range.start()), u32::from(*range.end()));
        // Line breaks and tabs stay.
        let parts = if first == 0 { vec![(0, 8), (0xb, last)] } else { vec![(first, last)] };
        for (first, last) in parts {
            let _ = write!(class, "\\u{{{first:x}}}-\\u{{{last:x}}}"); // a String takes everything
        }
    }
    class + "]"
}

fn replaced(
    text: &str,
    mut keep: impl FnMut(char) -> bool,
    escape: impl Fn(&mut String, char),
) -> Cow<'_, str> {
    let mut is_replaced = |character: char| is_active(character) && !keep(character);
    if !text.chars().any(&mut is_replaced) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for character in text.chars() {
        if is_replaced(character) {
            escape(&mut shown, character);
        } else {
            shown.push(character);
        }
    }
    Cow::Owned(shown)
}

/// A path or a name as a word of a shell's command line, quoted if it has to be.
pub fn shell_word(text: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "_./+,:@%=-".contains(c);
    let dashed = if text.starts_with('-') { "./" } else { "" };
    if !text.is_empty() && text.chars().all(is_plain) {
        return format!("{dashed}{text}");
    }
    format!("'{dashed}{}'", visible(text).replace('\'', r"'\''"))
}

/// The text on one line, each active character as `\u{1b}`.
pub fn visible(text: &str) -> Cow<'_, str> {
    replaced(text, |_| false, |shown, character| shown.extend(character.escape_unicode()))
}

/// [`visible`] for a text of several lines: line breaks and tabs stay.
pub fn visible_lines(text: &str) -> Cow<'_, str> {
    let keep = |character| matches!(character, '\n' | '\t');
    replaced(text, keep, |shown, character| shown.extend(character.escape_unicode()))
}

/// JSON with each active character within its strings as `\u001b`: the same value.
pub fn visible_json(json: &str) -> Cow<'_, str> {
    let keep = |character| matches!(character, '\n' | '\r' | '\t');
    replaced(json, keep, |shown, character| {
        for unit in character.encode_utf16(&mut [0; 2]) {
            // A String takes everything.
            let _ = write!(shown, "\\u{unit:04x}");
        }
    })
}

/// Writes text of a model, which arrives in pieces of any length: for a terminal escaped like
/// [`visible_lines`], else byte for byte.
pub struct ModelText<W> {
    out: W,
    is_terminal: bool,
    /// The beginning of a character.
    pending: Vec<u8>,
}

impl<W: Write> ModelText<W> {
    /// Text of a model on its way to `out`.
    pub fn new(out: W, is_terminal: bool) -> Self {
        Self { out, is_terminal, pending: Vec::new() }
    }

    /// Writes a piece and flushes it.
    pub fn push(&mut self, piece: &[u8]) -> io::Result<()> {
        if !self.is_terminal {
            self.out.write_all(piece)?;
            return self.out.flush();
        }
        self.pending.extend(piece);
        let bytes = std::mem::take(&mut self.pending);
        let mut rest = bytes.len();
        for chunk in bytes.utf8_chunks() {
            self.out.write_all(visible_lines(chunk.valid()).as_bytes())?;
            rest -= chunk.valid().len() + chunk.invalid().len();
            let is_cut =
                std::str::from_utf8(chunk.invalid()).is_err_and(|e| e.error_len().is_none());
            if rest == 0 && is_cut {
                self.pending = chunk.invalid().to_vec();
            } else {
                chunk.invalid().iter().try_for_each(|byte| write!(self.out, "\\x{byte:02x}"))?;
            }
        }
        self.out.flush()
    }

    /// Writes what is left of a text that ends within a character.
    pub fn finish(&mut self) -> io::Result<()> {
        let pending = std::mem::take(&mut self.pending);
        pending.iter().try_for_each(|byte| write!(self.out, "\\x{byte:02x}"))?;
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn active_characters_are_escaped_and_others_stay() {
        let plain = "drivers/net/é中🙂.c \"quoted\" \\";
        assert_eq!(visible(plain), plain);
        assert_eq!(visible("a\u{1b}[2J\u{9b}\u{7f}\n"), r"a\u{1b}[2J\u{9b}\u{7f}\u{a}");
        assert_eq!(visible("\u{202e}c.\u{2066}\u{200f}x"), r"\u{202e}c.\u{2066}\u{200f}x");
        assert_eq!(visible_lines("a\n\tb\r\u{1b}"), "a\n\tb\\u{d}\\u{1b}");
    }

    #[test]
    fn text_of_a_model_is_escaped_on_a_terminal_alone() {
        let text = "a\u{1b}[2J\t\u{202e}\u{e9}\n".as_bytes();
        let bytes = [text, b"\xff\xc3"].concat();
        for (is_terminal, expected) in
            [(true, "a\\u{1b}[2J\t\\u{202e}\u{e9}\n\\xff\\xc3".as_bytes()), (false, &bytes)]
        {
            for size in [1, 2, bytes.len()] {
                let mut shown = Vec::new();
                let mut out = ModelText::new(&mut shown, is_terminal);
                bytes.chunks(size).for_each(|piece| out.push(piece).unwrap());
                out.finish().unwrap();
                assert_eq!(shown, expected, "{size}");
            }
        }
    }

    #[test]
    fn escaped_json_is_the_same_value() {
        let value = serde_json::json!({"a\u{202e}": "\u{7f}\u{9b}\u{e0001}é\n\u{1b}"});
        let json = format!("{value:#}");
        let shown = visible_json(&json);
        assert_eq!(shown.chars().filter(|&c| is_active(c)).collect::<String>(), "\n\n");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&shown).unwrap(), value);
    }
}
