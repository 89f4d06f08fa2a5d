//! The arithmetic of `mma`, to the bit: against measurements, and at its edges.
//!
//! The measurements are not kept here. `LAAM_TEST_VECTORS` names the folder or archive that holds
//! them; without it they are looked for beside the repository, in `../shared/tensor_core`.

// PTX is put together from pieces.
#![allow(clippy::format_collect)]

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use ptx_race::{Arch, Arg, Config, Memory, Options};

use crate::nvcc::load;

/// A shape of mma with its types, and what the bits of an operand are made of.
#[derive(Clone, Copy)]
struct Form {
    shape: &'static str,
    ty: &'static str,
    k: usize,
    /// C and D are f16.
    half: bool,
}

impl Form {
    const fn of(ty: &'static str, k: usize) -> Form {
        let shape = match k {
            4 => "m16n8k4",
            8 => "m16n8k8",
            _ => "m16n8k16",
        };
        Form { shape, ty, k, half: false }
    }

    /// Computes d = a b + c for up to eight rows of a and b at once, on the diagonal of one mma:
    /// row i of A and column i of B. Operands are bits of their type; those of c and d of f32 or
    /// f16.
    fn run(self, arch: Arch, rows: &[(Vec<u32>, Vec<u32>, u32)]) -> Vec<u32> {
        let bits = if self.ty == "tf32" { 32 } else { 16 };
        let per_word = 32 / bits;
        let (a_words, b_words) = (self.k / per_word / 2, self.k / per_word / 4);
        let c_words = if self.half { 2 } else { 4 };
        let list = |name: &str, count: usize| {
            (0..count).map(|i| format!("%{name}{i}")).collect::<Vec<_>>().join(", ")
        };
        let words = a_words + b_words + c_words;
        let loads: String = [("a", a_words), ("b", b_words), ("c", c_words)]
            .iter()
            .flat_map(|&(name, count)| (0..count).map(move |i| format!("%{name}{i}")))
            .enumerate()
            .map(|(at, register)| format!("ld.global.b32 {register}, [%rd1+{}];\n", 4 * at))
            .collect();
        let stores: String =
            (0..c_words).map(|i| format!("st.global.b32 [%rd2+{}], %c{i};\n", 4 * i)).collect();
        let acc = if self.half { "f16" } else { "f32" };
        let (shape, ty) = (self.shape, self.ty);
        let text = format!(
            ".version 9.0\n.target sm_80\n.address_size 64
            .entry k(.param .u64 in, .param .u64 out) {{
            .reg .b32 %a<4>; .reg .b32 %b<2>; .reg .b32 %c<4>; .reg .b32 %r; .reg .b64 %rd<3>;
            mov.u32 %r, %tid.x;
            ld.param.u64 %rd1, [in]; mad.wide.u32 %rd1, %r, {}, %rd1;
            ld.param.u64 %rd2, [out]; mad.wide.u32 %rd2, %r, {}, %rd2;
            {loads}
            mma.sync.aligned.{shape}.row.col.{acc}.{ty}.{ty}.{acc}
            {{{c}}}, {{{a}}}, {{{b}}}, {{{c}}};
            {stores} ret; }}",
            4 * words,
            4 * c_words,
            c = list("c", c_words),
            a = list("a", a_words),
            b = list("b", b_words),
        );
        let mut input = vec![[0u32; 10]; 32];
        // Where the ISA keeps element k of row i of A, and of column i of B: lane and element.
        let place = |i: usize, k: usize| {
            let span = 4 * per_word;
            (i * 4 + k % span / per_word, k / span, k % per_word)
        };
        for (i, (a, b, c)) in rows.iter().enumerate() {
            for k in 0..self.k {
                let (lane, block, part) = place(i, k);
                input[lane][2 * block] |= a[k] << (bits * part);
                input[lane][a_words + block] |= b[k] << (bits * part);
            }
            let (lane, part) = (i * 4 + i / 2, i % 2);
            if self.half {
                input[lane][a_words + b_words] |= c << (16 * part);
            } else {
                input[lane][a_words + b_words + part] = *c;
            }
        }
        let memory = Memory::new();
        let bytes: Vec<u8> =
            input.iter().flat_map(|w| &w[..words]).flat_map(|word| word.to_le_bytes()).collect();
        let out = memory.alloc_uninit(32 * 4 * c_words);
        let args = [Arg::from(memory.alloc(&bytes)), Arg::from(out)];
        let options = Options { arch, ..Options::default() };
        let kernel = load(&text).kernel("k").unwrap();
        let launched = kernel.launch(&memory, &Config::linear(1, 32), &args, &options);
        launched.unwrap_or_else(|fault| panic!("{fault}"));
        let bytes = memory.read_vec(out, 32 * 4 * c_words).unwrap();
        let word = |lane: usize, i: usize| {
            let at = 4 * (lane * c_words + i);
            u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
        };
        (0..rows.len())
            .map(|i| {
                let (lane, part) = (i * 4 + i / 2, i % 2);
                if self.half { word(lane, 0) >> (16 * part) & 0xFFFF } else { word(lane, part) }
            })
            .collect()
    }

    /// One dot product, the factors given in front and padded with zeros.
    fn dot(self, arch: Arch, a: &[u32], b: &[u32], c: u32) -> u32 {
        let pad = |values: &[u32]| {
            let mut values = values.to_vec();
            values.resize(self.k, 0);
            values
        };
        self.run(arch, &[(pad(a), pad(b), c)])[0]
    }
}

/// The sets of measurements by file name, or None and a loud word.
fn vectors() -> Option<BTreeMap<String, String>> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/tensor_core");
    let given = std::env::var_os("LAAM_TEST_VECTORS").map(PathBuf::from);
    let place = given.clone().unwrap_or(beside);
    let archive = if place.is_dir() { place.join("vectors.tar.xz") } else { place.clone() };
    let Ok(file) = std::fs::File::open(&archive) else {
        assert!(given.is_none(), "LAAM_TEST_VECTORS: cannot read {}", archive.display());
        eprintln!("SKIPPED: no {}: set LAAM_TEST_VECTORS", archive.display());
        return None;
    };
    let mut sets = BTreeMap::new();
    let mut tar = tar::Archive::new(lzma_rust2::XzReader::new(std::io::BufReader::new(file), true));
    for entry in tar.entries().unwrap() {
        let mut entry = entry.unwrap();
        let name = entry.path().unwrap().file_name().unwrap().to_string_lossy().into_owned();
        let mut text = String::new();
        entry.read_to_string(&mut text).unwrap();
        sets.insert(name, text);
    }
    Some(sets)
}

fn numbers(text: &str, radix: u32) -> Vec<Vec<u32>> {
    let number = |word| u32::from_str_radix(word, radix).unwrap();
    text.lines().map(|line| line.split_whitespace().map(number).collect()).collect()
}

/// Bits of a type from those of its value as an f32.
fn encode(ty: &str, bits: u32) -> u32 {
    match ty {
        "bf16" => bits >> 16,
        "f16" => half::f16::from_f32(f32::from_bits(bits)).to_bits().into(),
        _ => bits,
    }
}

#[test]
fn mma_equals_what_gpus_measured() {
    let Some(sets) = vectors() else { return };
    let mut report = Vec::new();
    for (arch, gpu) in [(Arch::H100, "H100"), (Arch::A100, "A100")] {
        for (ty, name) in [("bf16", "bf16"), ("f16", "fp16"), ("tf32", "tf32")] {
            let set =
                |part: &str, radix| numbers(&sets[&format!("{gpu}_{name}_{part}.txt")], radix);
            let (a, b, c, d) = (set("a", 16), set("b", 16), set("c", 2), set("d", 2));
            let k = a[0].len();
            // Padding with zeros changes nothing, so a wider shape must agree.
            for k in if ty == "tf32" { vec![4, 8] } else { vec![k, 16] } {
                let form = Form::of(ty, k);
                let encoded = |row: &[u32]| {
                    let mut row: Vec<u32> = row.iter().map(|&bits| encode(ty, bits)).collect();
                    row.resize(k, 0);
                    row
                };
                let rows: Vec<_> = (0..a.len())
                    .map(|row| (encoded(&a[row]), encoded(&b[row]), c[row][0]))
                    .collect();
                let got: Vec<u32> = rows.chunks(8).flat_map(|rows| form.run(arch, rows)).collect();
                let exact = got.iter().zip(&d).filter(|(got, wanted)| **got == wanted[0]).count();
                report.push((format!("{gpu} {ty} k {k}"), exact, d.len()));
            }
        }
    }
    eprintln!("{report:?}");
    assert_eq!(report.len(), 12);
    for (set, exact, rows) in report {
        assert!(rows >= 1000 && exact == rows, "{set}: {exact} of {rows} rows exact");
    }
}

const F16: Form = Form::of("f16", 16);
const BF16: Form = Form::of("bf16", 16);
const TF32: Form = Form::of("tf32", 8);

fn both(form: Form, a: &[u32], b: &[u32], c: u32) -> [u32; 2] {
    [Arch::H100, Arch::A100].map(|arch| form.dot(arch, a, b, c))
}

/// bf16 bits of a power of two.
fn power(exponent: i32) -> u32 {
    ((exponent + 127) as u32) << 7
}

const ONE: u32 = 0x3F80;
const NEGATIVE: u32 = 0x8000;

#[test]
fn mma_keeps_some_bits_below_the_largest_exponent() {
    // 1 - 2^-e is exact in f32 for e up to 24; the bit that is subtracted must be kept.
    let below = |exponent: i32| both(BF16, &[ONE, power(exponent) | NEGATIVE], &[ONE, ONE], 0);
    assert_eq!(below(-24), [0x3F7F_FFFF; 2]);
    // One bit further down only the H100 still sees it; the result is truncated.
    assert_eq!(below(-25), [0x3F7F_FFFF, 0x3F80_0000]);
    assert_eq!(below(-26), [0x3F80_0000; 2]);
    // Products are aligned by the sum of their exponents, not by their own: 1.5 * 1.5 counts as 1.
    let wide = both(BF16, &[0x3FC0, power(-25) | NEGATIVE], &[0x3FC0, ONE], 0);
    assert_eq!(wide, [0x400F_FFFF, 0x4010_0000]);
    // Truncation is toward zero, of the sum and of each part.
    let up = both(BF16, &[ONE, power(-24), power(-24)], &[ONE, ONE, ONE], 0);
    assert_eq!(up, [0x3F80_0001; 2]);
    assert_eq!(
        both(BF16, &[ONE | NEGATIVE, power(-24) | NEGATIVE], &[ONE, ONE], 0),
        [0xBF80_0000; 2]
    );
}

#[test]
fn mma_sums_groups_in_order() {
    // A large product and its negative in one half, eight small ones in the other: the H100 aligns
    // all sixteen to the large ones and loses the small ones. The A100 keeps those of its second
    // group, but aligns the sum of a first one.
    let small = vec![power(-2); 8];
    let large = [vec![power(30), power(30) | NEGATIVE], vec![0; 6]].concat();
    let ones = [ONE; 16];
    assert_eq!(both(BF16, &[&large[..], &small].concat(), &ones, 0), [0, 2f32.to_bits()]);
    assert_eq!(both(BF16, &[&small[..], &large].concat(), &ones, 0), [0; 2]);
    // tf32 has groups of half the length.
    let (one, large) = (1f32.to_bits(), 2f32.powi(30).to_bits());
    let row = [large, large | 1 << 31, 0, 0, one, one, one, one];
    assert_eq!(both(TF32, &row, &[one; 8], 0), [0, 4f32.to_bits()]);
}

#[test]
fn mma_reads_the_upper_bits_of_tf32() {
    let one = 1f32.to_bits();
    assert_eq!(both(TF32, &[one | 0x1FFF], &[one], 0), [one; 2]);
    assert_eq!(both(TF32, &[one | 0x2000], &[one], 0), [one | 0x2000; 2]);
}

#[test]
fn mma_counts_subnormals() {
    // The least bf16, and of f16, times one and times themselves.
    assert_eq!(both(BF16, &[1], &[ONE], 0), [1 << 16; 2]);
    assert_eq!(both(BF16, &[1], &[1], 0), [0; 2]);
    assert_eq!(both(F16, &[1], &[0x3C00], 0), [2f32.powi(-24).to_bits(); 2]);
    assert_eq!(both(F16, &[1], &[1], 0), [2f32.powi(-48).to_bits(); 2]);
    // A subnormal accumulator passes through, and results may be subnormal.
    assert_eq!(both(BF16, &[], &[], 0x0000_0003), [3; 2]);
    assert_eq!(both(BF16, &[power(-100)], &[power(-40)], 0), [1 << 9; 2]);
    // 1.125 * 2^-149 is truncated to the least subnormal.
    assert_eq!(both(BF16, &[0x40 | power(-100)], &[power(-50) | 0x40], 0), [1; 2]);
    // A zero takes no part in the alignment, however large its partner.
    assert_eq!(both(F16, &[0, 1], &[0x7BFF, 1], 0), [2f32.powi(-48).to_bits(); 2]);
}

#[test]
fn mma_follows_ieee_for_infinity_and_nan() {
    const NAN: u32 = 0x7FFF_FFFF;
    let infinity = f32::INFINITY.to_bits();
    let inf = 0x7F80;
    assert_eq!(both(BF16, &[inf], &[ONE], 0), [infinity; 2]);
    assert_eq!(both(BF16, &[inf], &[ONE | NEGATIVE], 0), [infinity | 1 << 31; 2]);
    assert_eq!(both(BF16, &[inf], &[0], 0), [NAN; 2]);
    assert_eq!(both(BF16, &[inf, inf | NEGATIVE], &[ONE, ONE], 0), [NAN; 2]);
    assert_eq!(both(BF16, &[inf], &[ONE | NEGATIVE], infinity), [NAN; 2]);
    assert_eq!(both(BF16, &[0x7FC1], &[ONE], 0), [NAN; 2]);
    assert_eq!(both(BF16, &[], &[], 0x7F80_0001), [NAN; 2]);
    assert_eq!(both(BF16, &[], &[], infinity), [infinity; 2]);
    // Sums beyond f32 are infinite; products beyond it that cancel are not.
    assert_eq!(both(BF16, &[power(127), power(127)], &[ONE, ONE], 0), [infinity; 2]);
    let cancel = both(BF16, &[power(100), power(100) | NEGATIVE], &[power(100), power(100)], 0);
    assert_eq!(cancel, [0; 2]);
}

#[test]
fn mma_into_f16_rounds_to_nearest_even() {
    let form = Form { half: true, ..F16 };
    let (one, least) = (0x3C00, 1u32);
    // 1 + 2^-11 is a tie, 1 + 3 * 2^-11 rounds up, and a bit more than a tie goes up as well.
    assert_eq!(both(form, &[0x1000], &[one], one), [one; 2]);
    assert_eq!(both(form, &[0x1000], &[one], one + 1), [one + 2; 2]);
    assert_eq!(both(form, &[0x1000, least], &[one, one], one), [one + 1, one + 1]);
    assert_eq!(both(form, &[0x7BFF], &[0x7BFF], 0), [0x7C00; 2]);
    assert_eq!(both(form, &[0x7C00], &[0], 0), [0x7FFF; 2]);
    assert_eq!(both(form, &[least], &[one], least), [2; 2]);
    // The A100 rounds to f16 between its groups, the H100 once.
    let (mut a, b) = ([0u32; 16], [one; 16]);
    a[0] = 0x1000;
    a[8] = 0x1000;
    assert_eq!(both(form, &a, &b, one), [one + 1, one]);
}
