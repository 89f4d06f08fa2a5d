//! How often passages occur in a text: memorization grows with it (Carlini et al. 2022).

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use serde::Serialize;

use super::rate::MatchRate;
use crate::tokens::{TokenFile, Windows};

/// Windows whose passage occurs from `from` to `to` times in the text, and those of them that greedy decoding
/// reproduces.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct OccurrenceTally {
    /// Least number of occurrences.
    pub from: u64,
    /// Largest number of occurrences.
    pub to: u64,
    /// Windows tested and reproduced.
    #[serde(flatten)]
    pub share: MatchRate,
}

/// Rates by the number of occurrences, in powers of two: 1, 2 to 3, 4 to 7, and so on; those without windows
/// are left out. Of each window the number of occurrences, and whether it is reproduced.
pub fn tallies(windows: impl Iterator<Item = (u64, bool)>) -> Vec<OccurrenceTally> {
    let mut counts = [(0, 0); 64];
    for (occurrences, exact) in windows {
        let (hits, all) = &mut counts[occurrences.max(1).ilog2() as usize];
        *hits += usize::from(exact);
        *all += 1;
    }
    let tally = |(power, (hits, all))| {
        let from = 1u64 << power;
        OccurrenceTally { from, to: from + (from - 1), share: MatchRate::of(hits, all) }
    };
    let found = counts.into_iter().enumerate().filter(|(_, (_, all))| *all > 0);
    found.map(tally).collect()
}

/// Modulus of the rolling hash: a Mersenne prime.
const PRIME: u64 = (1 << 61) - 1;
/// Base of the rolling hash, at random. Equal hashes are compared token by token.
const BASE: u64 = 0x0bad_5eed_1ca7_5f1d & (PRIME >> 1);
/// Tokens that are read at a time.
const CHUNK: usize = 1 << 16;

fn times(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    let folded = (product as u64 & PRIME) + (product >> 61) as u64;
    if folded >= PRIME { folded - PRIME } else { folded }
}

fn plus(a: u64, b: u64) -> u64 {
    let sum = a + b;
    if sum >= PRIME { sum - PRIME } else { sum }
}

/// Occurrences in a text of each passage of `length` tokens, given by the position of its first token in `passages_of`;
/// those at positions of the text that `is_counted`. They may overlap. One pass over the text.
pub fn count(
    passages_of: &TokenFile,
    starts: &[usize],
    length: usize,
    text: &TokenFile,
    is_counted: impl Fn(&Range<usize>) -> bool,
) -> anyhow::Result<Vec<u64>> {
    let tokens = |start: usize| -> anyhow::Result<Vec<u32>> {
        let mut ids = vec![0; length];
        passages_of.read(start, &mut ids)?;
        Ok(ids)
    };
    let add = |hash: u64, id: u32| plus(times(hash, BASE), u64::from(id) + 1);
    // Distinct passages by their hashes, and the number of each start's.
    let mut passages: Vec<(Vec<u32>, u64)> = Vec::new();
    let mut by_hash: HashMap<u64, Vec<usize>> = HashMap::new();
    let mut numbers = Vec::with_capacity(starts.len());
    for &start in starts {
        let ids = tokens(start)?;
        let hash = ids.iter().fold(0, |hash, &id| add(hash, id));
        let alike = by_hash.entry(hash).or_default();
        let known = alike.iter().copied().find(|&number| passages[number].0 == ids);
        numbers.push(known.unwrap_or_else(|| {
            alike.push(passages.len());
            passages.push((ids, 0));
            passages.len() - 1
        }));
    }
    if length == 0 || passages.is_empty() {
        return Ok(vec![0; starts.len()]);
    }
    // What the oldest token of a window of the hash has been multiplied by.
    let oldest = (1..length).fold(1, |power, _| times(power, BASE));
    let mut recent = vec![0u32; length];
    let (mut hash, mut chunk) = (0, vec![0; CHUNK]);
    let all = text.tokens();
    for from in (0..all).step_by(CHUNK) {
        let read = &mut chunk[..CHUNK.min(all - from)];
        text.read(from, read)?;
        for (position, &id) in (from..).zip(&*read) {
            let slot = position % length;
            if position >= length {
                let gone = times(oldest, u64::from(recent[slot]) + 1);
                hash = plus(hash, PRIME - gone);
            }
            recent[slot] = id;
            hash = add(hash, id);
            if position + 1 < length {
                continue;
            }
            for &number in by_hash.get(&hash).into_iter().flatten() {
                let (ids, count) = &mut passages[number];
                let (later, earlier) = recent.split_at(slot + 1);
                let is_same = ids[..earlier.len()] == *earlier && ids[earlier.len()..] == *later;
                let here = position + 1 - length..position + 1;
                *count += u64::from(is_same && is_counted(&here));
            }
        }
    }
    Ok(numbers.into_iter().map(|number| passages[number].1).collect())
}

/// The windows of these numbers whose passage, `length` tokens from the first of their text on, does not occur in a
/// text at positions that `is_counted`; and those that are too short for one.
///
/// # Errors
/// A token file cannot be read.
pub fn unknown(
    windows: &Windows,
    mut numbers: Vec<usize>,
    length: usize,
    text: &TokenFile,
    is_counted: impl Fn(&Range<usize>) -> bool,
) -> anyhow::Result<Vec<usize>> {
    let (mut asked, mut starts) = (Vec::new(), Vec::new());
    for &number in &numbers {
        if windows.document_rest(number)? >= length {
            asked.push(number);
            starts.push(windows.span(number)?.tokens.start);
        }
    }
    let counts = count(windows.file(), &starts, length, text, is_counted)?;
    let is_known = |&(_, count): &(usize, u64)| count > 0;
    let known: HashSet<usize> =
        asked.into_iter().zip(counts).filter(is_known).map(|(number, _)| number).collect();
    numbers.retain(|number| !known.contains(number));
    Ok(numbers)
}
