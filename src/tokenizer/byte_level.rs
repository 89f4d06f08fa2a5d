//! GPT-2's spelling of bytes: each byte has one printable character, so that a token file is text.

use std::sync::LazyLock;

/// Bytes that print as themselves; the others are numbered from U+0100 on.
fn prints(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF)
}

static CHARS: LazyLock<[char; 256]> = LazyLock::new(|| {
    let mut next = 0x100;
    std::array::from_fn(|byte| {
        let byte = byte as u8;
        if prints(byte) {
            return char::from(byte);
        }
        next += 1;
        char::from_u32(next - 1).expect("below U+0200")
    })
});

/// The character that stands for a byte.
pub fn char_of(byte: u8) -> char {
    CHARS[usize::from(byte)]
}

/// The byte a character stands for.
pub fn byte_of(character: char) -> Option<u8> {
    match u32::from(character) {
        // The numbered ones are few: 68.
        0x100..0x144 => (0..=u8::MAX).find(|&byte| char_of(byte) == character),
        low @ 0..0x100 => Some(low as u8).filter(|&byte| prints(byte)),
        _ => None,
    }
}

/// Bytes in this spelling.
pub fn text(bytes: &[u8]) -> String {
    bytes.iter().map(|&byte| char_of(byte)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;

    #[test]
    fn byte_level_alphabet_matches_tokenizers_crate() {
        let alphabet = ByteLevel::alphabet();
        for byte in 0..=255 {
            assert!(alphabet.contains(&char_of(byte)));
            assert_eq!(byte_of(char_of(byte)), Some(byte));
        }
        assert_eq!(char_of(b' '), 'Ġ');
        assert_eq!(byte_of('\u{144}'), None);
        assert_eq!(byte_of(' '), None);
    }
}
