//! Software model of the tile instructions: interprets the micro-kernel's text with the arithmetic that Intel
//! documents for `tdpbf16ps`. Whatever the processor would refuse, and reads and writes beyond the operands, panic.

use std::cell::Cell;
use std::sync::LazyLock;

use bytemuck::Zeroable;

use super::microkernel::{
    Tile, TileConfig, load_accumulators, multiply_and_store, zero_accumulators,
};

/// One thread's tiles.
pub(super) struct SoftwareTiles {
    config: TileConfig,
    tiles: [Tile; 8],
}

thread_local! {
    /// True while this thread's tiles are configured.
    static CONFIGURED: Cell<bool> = const { Cell::new(false) };
}

impl Default for SoftwareTiles {
    /// Tiles as a thread has them at first: unconfigured.
    fn default() -> Self {
        Self { config: TileConfig::zeroed(), tiles: [Tile::zeroed(); 8] }
    }
}

/// An instruction of the micro-kernel. Tiles and registers are numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Instruction {
    TileZero(usize),
    TileLoad(usize, TileAddress),
    TileStore(TileAddress, usize),
    TileDotBf16(usize, usize, usize),
    Add(usize, usize),
    Decrement(usize),
    JumpIfNotZero(usize),
}

/// `[base + 1*index + displacement]`: row `r` of a tile lies at `base + displacement + r * index`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct TileAddress {
    base: usize,
    index: usize,
    displacement: usize,
}

const REGISTERS: [&str; 7] = ["a", "b", "c", "d", "steps", "row", "stride"];

/// The operands' addresses: an address above one of these is an offset into it.
const SPACE: usize = 1 << 28;
const A: usize = SPACE;
const B: usize = 2 * SPACE;
const C: usize = 3 * SPACE;

/// Bytes of the operands.
struct OperandMemory<'a> {
    a: &'a [u8],
    b: &'a [u8],
    c: &'a mut [u8],
}

impl OperandMemory<'_> {
    fn read(&self, address: usize, len: usize) -> &[u8] {
        let operand = match address / SPACE * SPACE {
            A => self.a,
            B => self.b,
            C => &*self.c,
            _ => panic!("no operand lies at {address:#x}"),
        };
        &operand[address % SPACE..][..len]
    }

    fn write(&mut self, address: usize, bytes: &[u8]) {
        assert_eq!(address / SPACE * SPACE, C, "only outputs are written");
        self.c[address % SPACE..][..bytes.len()].copy_from_slice(bytes);
    }
}

impl SoftwareTiles {
    /// `ldtilecfg`
    pub fn configure(&mut self, config: &TileConfig) {
        assert_eq!((config.palette, config.start_row, config.reserved), (1, 0, [0; 14]));
        for (tile, (&rows, &bytes)) in config.rows.iter().zip(&config.row_bytes).enumerate() {
            let most = if tile < 8 { (16, 64) } else { (0, 0) };
            assert!(rows <= most.0 && bytes <= most.1, "invalid tile {tile}: {rows} x {bytes}");
            assert_eq!(rows == 0, bytes == 0, "invalid tile {tile}: {rows} x {bytes}");
        }
        assert!(!CONFIGURED.replace(true), "the tiles are configured already");
        *self = Self { config: *config, ..Self::default() };
    }

    /// `tilerelease`
    pub fn release(&mut self) {
        CONFIGURED.set(false);
        *self = Self::default();
    }

    /// [`super::microkernel::ConfiguredTiles::multiply`]
    pub fn multiply(
        &mut self,
        a: &[Tile],
        b: &[Tile],
        c: &mut [f32],
        stride: usize,
        accumulate: bool,
    ) {
        static ASSIGN: LazyLock<Vec<Instruction>> =
            LazyLock::new(|| parse(concat!(zero_accumulators!(), "\n", multiply_and_store!())));
        static ACCUMULATE: LazyLock<Vec<Instruction>> =
            LazyLock::new(|| parse(concat!(load_accumulators!(), "\n", multiply_and_store!())));
        let registers = [A, B, C, C + 64 * stride, a.len() / 2, 64, 4 * stride];
        let mut memory = OperandMemory {
            a: bytemuck::cast_slice(a),
            b: bytemuck::cast_slice(b),
            c: bytemuck::cast_slice_mut(c),
        };
        self.run(if accumulate { &ACCUMULATE } else { &ASSIGN }, registers, &mut memory);
    }

    fn run(
        &mut self,
        program: &[Instruction],
        mut registers: [usize; REGISTERS.len()],
        memory: &mut OperandMemory,
    ) {
        let mut zero = false;
        let mut at = 0;
        while let Some(&instruction) = program.get(at) {
            at += 1;
            let address = |address: TileAddress, row: usize| {
                registers[address.base] + address.displacement + row * registers[address.index]
            };
            match instruction {
                Instruction::TileZero(tile) => {
                    self.shape(tile);
                    self.tiles[tile] = Tile::zeroed();
                }
                Instruction::TileLoad(tile, from) => {
                    let (rows, bytes) = self.shape(tile);
                    self.tiles[tile] = Tile::zeroed();
                    for (row, out) in self.tiles[tile].0[..rows].iter_mut().enumerate() {
                        let out: &mut [u8] = bytemuck::cast_slice_mut(out);
                        out[..bytes].copy_from_slice(memory.read(address(from, row), bytes));
                    }
                }
                Instruction::TileStore(to, tile) => {
                    let (rows, bytes) = self.shape(tile);
                    for (row, values) in self.tiles[tile].0[..rows].iter().enumerate() {
                        let values: &[u8] = bytemuck::cast_slice(values);
                        memory.write(address(to, row), &values[..bytes]);
                    }
                }
                Instruction::TileDotBf16(c, a, b) => self.dot_bf16(c, a, b),
                Instruction::Add(register, value) => registers[register] += value,
                Instruction::Decrement(register) => {
                    registers[register] -= 1;
                    zero = registers[register] == 0;
                }
                Instruction::JumpIfNotZero(target) => {
                    if !zero {
                        at = target;
                    }
                }
            }
        }
    }

    /// Rows of a tile and their bytes.
    fn shape(&self, tile: usize) -> (usize, usize) {
        assert_eq!(self.config.palette, 1, "the tiles are not configured");
        let (rows, bytes) = (self.config.rows[tile], self.config.row_bytes[tile]);
        assert!(rows > 0, "tile {tile} is not configured");
        (usize::from(rows), usize::from(bytes))
    }

    /// `tdpbf16ps c, a, b`: the first bf16 of all pairs are summed, and the second, by fused multiply-adds from 0;
    /// then both sums together, and that to `c`.
    fn dot_bf16(&mut self, c: usize, a: usize, b: usize) {
        let [(rows, columns), a_shape, b_shape] = [c, a, b].map(|tile| self.shape(tile));
        assert!(c != a && c != b && a != b, "tiles of tdpbf16ps must differ");
        assert!([columns, a_shape.1, b_shape.1].iter().all(|bytes| bytes.is_multiple_of(4)));
        assert_eq!((a_shape.0, a_shape.1 / 4, b_shape.1), (rows, b_shape.0, columns));
        let (a, b, columns) = (self.tiles[a], self.tiles[b], columns / 4);
        for (row, a) in a.0.iter().enumerate().take(rows) {
            let mut sums = [[0.0; 2]; 16];
            for (&a, b) in a[..b_shape.0].iter().zip(&b.0) {
                let a = bf16_pair(a);
                for (sums, &b) in sums.iter_mut().zip(&b[..columns]) {
                    let b = bf16_pair(b);
                    *sums = [
                        fused_multiply_add(a[0], b[0], sums[0]),
                        fused_multiply_add(a[1], b[1], sums[1]),
                    ];
                }
            }
            for (out, sums) in self.tiles[c].0[row][..columns].iter_mut().zip(sums) {
                let old = denormal_as_zero(f32::from_bits(*out));
                *out = add(old, add(sums[0], sums[1])).to_bits();
            }
        }
    }
}

/// The low and the high bf16 of a pair.
fn bf16_pair(pair: u32) -> [f32; 2] {
    [pair << 16, pair & 0xffff_0000].map(|bits| denormal_as_zero(f32::from_bits(bits)))
}

fn denormal_as_zero(x: f32) -> f32 {
    if x.is_subnormal() { 0.0f32.copysign(x) } else { x }
}

/// `x y + z`, rounded once. f64 holds the product of two bf16 exactly and has more than twice the digits of f32, so
/// that rounding the sum to f64 first changes nothing.
fn fused_multiply_add(x: f32, y: f32, z: f32) -> f32 {
    rounded(f64::from(x) * f64::from(y) + f64::from(z))
}

fn add(x: f32, y: f32) -> f32 {
    rounded(f64::from(x) + f64::from(y))
}

/// To nearest, ties to even; what is still below the normal numbers with 24 digits becomes 0.
fn rounded(exact: f64) -> f32 {
    /// Half a unit in the last place below the least normal number.
    const LEAST: f64 = f32::MIN_POSITIVE as f64 * (1.0 - 1.0 / (1u64 << 25) as f64);
    if exact.abs() < LEAST { 0.0f32.copysign(exact as f32) } else { exact as f32 }
}

/// The text's instructions, with labels resolved.
fn parse(text: &str) -> Vec<Instruction> {
    let number = |word: &str| word.parse().unwrap_or_else(|_| panic!("{word} is not a number"));
    let register = |word: &str| {
        let name = word.trim_start_matches('{').trim_end_matches('}');
        REGISTERS.iter().position(|&known| known == name).unwrap_or_else(|| panic!("{word}"))
    };
    let tile = |word: &str| number(word.strip_prefix("tmm").unwrap_or_else(|| panic!("{word}")));
    let address = |word: &str| {
        let terms: Vec<&str> = word.trim_matches(['[', ']']).split(" + ").collect();
        TileAddress {
            base: register(terms[0]),
            index: register(terms[1].strip_prefix("1*").unwrap_or_else(|| panic!("{word}"))),
            displacement: terms.get(2).map_or(0, |word| number(word)),
        }
    };
    let mut program = Vec::new();
    let mut label = None;
    for line in text.lines().map(str::trim) {
        let (name, operands) = line.split_once(' ').unwrap_or((line, ""));
        let operands: Vec<&str> = operands.split(", ").collect();
        program.push(match (name, &operands[..]) {
            ("2:", _) => {
                label = Some(program.len());
                continue;
            }
            ("tilezero", [to]) => Instruction::TileZero(tile(to)),
            ("tileloadd", [to, from]) => Instruction::TileLoad(tile(to), address(from)),
            ("tilestored", [to, from]) => Instruction::TileStore(address(to), tile(from)),
            ("tdpbf16ps", [c, a, b]) => Instruction::TileDotBf16(tile(c), tile(a), tile(b)),
            ("add", [to, value]) => Instruction::Add(register(to), number(value)),
            ("dec", [to]) => Instruction::Decrement(register(to)),
            ("jnz", ["2b"]) => Instruction::JumpIfNotZero(label.expect("2: comes first")),
            _ => panic!("unknown instruction {line}"),
        });
    }
    program
}

/// True while this thread's tiles are configured.
#[cfg(test)]
pub(super) fn is_configured() -> bool {
    CONFIGURED.get()
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::super::microkernel::WHOLE_TILES;
    use super::*;

    /// `c + a b` for one output, with a tile of one row of these pairs and one column.
    fn dot(c: f32, pairs: &[([f32; 2], [f32; 2])]) -> f32 {
        let mut config = WHOLE_TILES;
        (config.rows[0], config.row_bytes[0]) = (1, 4);
        (config.rows[4], config.row_bytes[4]) = (1, 4 * pairs.len() as u16);
        (config.rows[6], config.row_bytes[6]) = (pairs.len() as u8, 4);
        let mut tiles = SoftwareTiles::default();
        tiles.configure(&config);
        tiles.tiles[0].0[0][0] = c.to_bits();
        let bits = |[low, high]: [f32; 2]| low.to_bits() >> 16 | high.to_bits() & 0xffff_0000;
        for (k, &(a, b)) in pairs.iter().enumerate() {
            (tiles.tiles[4].0[0][k], tiles.tiles[6].0[k][0]) = (bits(a), bits(b));
        }
        tiles.dot_bf16(0, 4, 6);
        let sum = f32::from_bits(tiles.tiles[0].0[0][0]);
        tiles.release();
        sum
    }

    #[test]
    fn products_are_summed_as_intel_documents() {
        let one = [1.0, 1.0];
        // The first of the pairs cancel exactly, because the second of them have a sum of their own.
        let big = 2f32.powi(24);
        assert_eq!(dot(0.0, &[([big, 1.0], one), ([-big, 1.0], one)]), 2.0);
        // Both sums are added before the accumulator.
        assert_eq!(dot(-big, &[([big, 1.0], one)]), 0.0);
        assert_eq!(dot(big, &[([1.0, 1.0], one)]), big + 2.0);
        // A product is not rounded before it is added: (1 + 2^-7)^2 - (1 + 2^-6) = 2^-14.
        let x = 1.0 + 2f32.powi(-7);
        let cancelled = [([1.0 + 2f32.powi(-6), 0.0], [-1.0, 0.0]), ([x, 0.0], [x, 0.0])];
        assert_eq!(dot(0.0, &cancelled), 2f32.powi(-14));
        // Ties go to even.
        assert_eq!(dot(big, &[([1.0, 0.0], one)]), big);
        assert_eq!(dot(big + 2.0, &[([1.0, 0.0], one)]), big + 4.0);
        // Denormals are 0: operands, the accumulator, sums, and what is one only before it is rounded.
        let least = f32::MIN_POSITIVE;
        assert_eq!(dot(0.0, &[([f32::from_bits(0x70_0000), 0.0], [big, 0.0])]), 0.0);
        assert_eq!(dot(f32::from_bits(1), &[([least, 0.0], one)]), least);
        assert_eq!(dot(0.0, &[([least, 0.0], [0.5, 0.0])]), 0.0);
        assert_eq!(rounded(f64::from(least) * (1.0 - 2f64.powi(-24))), 0.0);
        assert_eq!(rounded(f64::from(least) * (1.0 - 2f64.powi(-25))), least);
        assert_eq!(dot(f32::MAX, &[([2f32.powi(120), 0.0], one)]), f32::INFINITY);
        assert!(dot(0.0, &[([f32::INFINITY, f32::NEG_INFINITY], one)]).is_nan());
    }

    /// Each of these is an exception, or undefined, on the processor.
    #[test]
    fn invalid_use_of_tiles_panics() {
        let panics = |what: &str, body: &dyn Fn(&mut SoftwareTiles)| {
            let outcome = catch_unwind(AssertUnwindSafe(|| body(&mut SoftwareTiles::default())));
            SoftwareTiles::default().release();
            assert!(outcome.is_err(), "{what}");
        };
        let with = |change: &dyn Fn(&mut TileConfig)| {
            let mut config = WHOLE_TILES;
            change(&mut config);
            config
        };
        panics("palette 0", &|tiles| tiles.configure(&with(&|config| config.palette = 0)));
        panics("a start row", &|tiles| tiles.configure(&with(&|config| config.start_row = 1)));
        panics("17 rows", &|tiles| tiles.configure(&with(&|config| config.rows[2] = 17)));
        panics("65 bytes", &|tiles| tiles.configure(&with(&|config| config.row_bytes[2] = 65)));
        panics("a ninth tile", &|tiles| {
            tiles.configure(&with(&|config| (config.rows[8], config.row_bytes[8]) = (1, 4)));
        });
        panics("configured twice", &|tiles| {
            tiles.configure(&WHOLE_TILES);
            SoftwareTiles::default().configure(&WHOLE_TILES);
        });
        panics("not configured", &|tiles| {
            tiles.multiply(&[Tile::zeroed(); 2], &[Tile::zeroed(); 2], &mut [0.0; 1024], 32, false);
        });
        panics("released", &|tiles| {
            tiles.configure(&WHOLE_TILES);
            tiles.release();
            tiles.dot_bf16(0, 1, 2);
        });
        panics("shapes that do not match", &|tiles| {
            tiles.configure(&with(&|config| config.rows[0] = 8));
            tiles.dot_bf16(0, 1, 2);
        });
        panics("one tile twice", &|tiles| {
            tiles.configure(&WHOLE_TILES);
            tiles.dot_bf16(0, 1, 1);
        });
        panics("an operand that is too short", &|tiles| {
            tiles.configure(&WHOLE_TILES);
            tiles.multiply(&[Tile::zeroed(); 4], &[Tile::zeroed(); 2], &mut [0.0; 1024], 32, false);
        });
        panics("outputs that are too short", &|tiles| {
            tiles.configure(&WHOLE_TILES);
            tiles.multiply(&[Tile::zeroed(); 2], &[Tile::zeroed(); 2], &mut [0.0; 1023], 32, false);
        });
    }
}
