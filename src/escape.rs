//! Foreign text made fit to be shown: names in archives, provenance, headers and recipes may hold
//! sequences that move a terminal's cursor or turn text around.

use std::borrow::Cow;
use std::fmt::Write as _;

/// True of characters that a terminal or a browser acts on instead of showing: control characters,
/// bidirectional controls, line separators, and others without width.
fn is_active(character: char) -> bool {
    character.is_control()
        || matches!(character,
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}'
            | '\u{e0000}'..='\u{e007f}')
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
    fn escaped_json_is_the_same_value() {
        let value = serde_json::json!({"a\u{202e}": "\u{7f}\u{9b}\u{e0001}é\n\u{1b}"});
        let json = format!("{value:#}");
        let shown = visible_json(&json);
        assert_eq!(shown.chars().filter(|&c| is_active(c)).collect::<String>(), "\n\n");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&shown).unwrap(), value);
    }
}
