//! Mutations of inputs: bytes, numbers in text, and pieces of other inputs.

/// Random numbers of one run, by a seed.
pub struct Random {
    state: u64,
}

impl Random {
    pub fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// splitmix64 (Steele et al. 2014).
    pub fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `bound`, which is at least 1.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }
}

/// Numbers that programs get wrong.
const NUMBERS: [&str; 24] = [
    "0",
    "-1",
    "1",
    "2",
    "127",
    "255",
    "256",
    "65535",
    "65536",
    "2147483647",
    "2147483648",
    "4294967295",
    "4294967296",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "1e308",
    "1e999",
    "-1e308",
    "0.1",
    "-0",
    "NaN",
    "99999999999999999999999999999999999999999",
];

/// Text that means something in some format.
const WORDS: [&str; 40] = [
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "\"",
    "\\",
    "null",
    "true",
    "false",
    "\\u0000",
    "\\ud800",
    "\n",
    "\r\n",
    "\u{1b}[2J",
    "\u{202e}",
    "..",
    "/",
    "//",
    "=",
    "[[",
    "]]",
    "'''",
    "\"\"\"",
    "#",
    ";",
    "%r0",
    ".reg",
    ".b64",
    "ld.global",
    "bra",
    "@%p1",
    "<s>",
    "Sequence",
    "Regex",
    "(a*)*b",
    "  ",
    "e",
    "-",
];

const MAX_INPUT_BYTES: usize = 1 << 16;

/// Changes an input one to eight times; `others` lend their pieces.
pub fn mutate(input: &mut Vec<u8>, others: &[Vec<u8>], random: &mut Random) {
    for _ in 0..=random.below(8) {
        change(input, others, random);
    }
    input.truncate(MAX_INPUT_BYTES);
}

fn change(input: &mut Vec<u8>, others: &[Vec<u8>], random: &mut Random) {
    let at = random.below(input.len() + 1);
    let range = |random: &mut Random, len: usize| {
        let from = random.below(len + 1);
        let most = if random.below(4) == 0 { len } else { 16 };
        from..(from + random.below(most + 1)).min(len)
    };
    match random.below(12) {
        0 if at < input.len() => input[at] ^= 1 << random.below(8),
        1 if at < input.len() => input[at] = random.next() as u8,
        2 if at < input.len() => input[at] = *random.pick(&[0, 1, 0x7f, 0x80, 0xff, b'0', b'9']),
        3 => drop(input.drain(range(random, input.len()))),
        4 => {
            let piece = input[range(random, input.len())].to_vec();
            let times = 1 + random.below(if piece.len() < 64 { 40 } else { 2 });
            drop(input.splice(at..at, piece.repeat(times)));
        }
        5 => {
            let word = random.pick(&WORDS).as_bytes().to_vec();
            drop(input.splice(at..at, word));
        }
        6 | 7 => replace_number(input, random),
        8 => {
            let other = random.pick(others);
            let piece = other[range(random, other.len())].to_vec();
            let end = (at + random.below(piece.len() + 1)).min(input.len());
            drop(input.splice(at..end, piece));
        }
        9 if at + 8 <= input.len() => {
            let number = 1u64 << random.below(64);
            let number = number.wrapping_sub(random.below(3) as u64);
            let width = *random.pick(&[2, 4, 8]);
            input[at..at + width].copy_from_slice(&number.to_le_bytes()[..width]);
        }
        10 => input.truncate(at),
        _ => {
            let (a, b) = (range(random, input.len()), random.below(input.len() + 1));
            let piece: Vec<u8> = input.drain(a).collect();
            let b = b.min(input.len());
            drop(input.splice(b..b, piece));
        }
    }
}

/// Replaces a run of digits.
fn replace_number(input: &mut Vec<u8>, random: &mut Random) {
    let from = random.below(input.len() + 1);
    let Some(start) = input[from..].iter().position(u8::is_ascii_digit).map(|at| from + at) else {
        return;
    };
    let length = input[start..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    drop(input.splice(start..start + length, random.pick(&NUMBERS).bytes()));
}
