//! Layouts of the matrix instructions, by unique integers that are exact in bf16.

// PTX is put together line by line, and its addresses bit by bit.
#![allow(clippy::format_collect, clippy::precedence)]

use half::{bf16, f16};
use ptx_race::{Arg, Config, Memory, Options};

use crate::coverage;
use crate::nvcc::load;

/// Runs a body for one warp. It finds its lane in %lane, eight input words per lane in %in0..%in7,
/// and leaves its results in %out0..%out3.
pub fn warp(body: &str, input: &[[u32; 8]; 32]) -> Vec<[u32; 4]> {
    if coverage::note(body) {
        return Vec::new();
    }
    let loads: String =
        (0..8).map(|i| format!("ld.global.b32 %in{i}, [%rd1+{}];\n", 4 * i)).collect();
    let stores: String =
        (0..4).map(|i| format!("st.global.b32 [%rd2+{}], %out{i};\n", 4 * i)).collect();
    let text = format!(
        ".version 9.0\n.target sm_80\n.address_size 64\n.entry k(.param .u64 in, .param .u64 out) {{
        .shared .align 128 .b8 tile[1024];
        .reg .b32 %in<8>, %out<4>, %lane, %r<8>; .reg .b64 %rd<4>; .reg .pred %p<4>;
        mov.u32 %lane, %tid.x;
        mov.b32 %out0, 0; mov.b32 %out1, 0; mov.b32 %out2, 0; mov.b32 %out3, 0;
        ld.param.u64 %rd1, [in]; mad.wide.u32 %rd1, %lane, 32, %rd1;
        ld.param.u64 %rd2, [out]; mad.wide.u32 %rd2, %lane, 16, %rd2;
        {loads}{body}{stores}ret; }}"
    )
    // Several registers of a declaration share its type, but only one takes a range.
    .replace(
        ".reg .b32 %in<8>, %out<4>, %lane, %r<8>;",
        ".reg .b32 %in<8>; .reg .b32 %out<4>; .reg .b32 %lane; .reg .b32 %r<8>;",
    );
    let memory = Memory::new();
    let bytes: Vec<u8> = input.iter().flatten().flat_map(|word| word.to_le_bytes()).collect();
    let out = memory.alloc_uninit(32 * 16);
    let args = [Arg::from(memory.alloc(&bytes)), Arg::from(out)];
    let kernel = load(&text).kernel("k").unwrap();
    let launched = kernel.launch(&memory, &Config::linear(1, 32), &args, &Options::default());
    launched.unwrap_or_else(|fault| panic!("{body}: {fault}"));
    let bytes = memory.read_vec(out, 512).unwrap();
    let word = |i: usize| u32::from_le_bytes(bytes[4 * i..4 * i + 4].try_into().unwrap());
    (0..32).map(|lane| std::array::from_fn(|i| word(4 * lane + i))).collect()
}

/// Four 8 x 8 matrices of 16-bit elements, element e of matrix m being 64 m + e.
fn load_matrix(form: &str, count: usize, generic: bool) -> Vec<[u32; 4]> {
    // Row r of matrix m lies at 128 m + 16 r; lane l gives the address of row l.
    let input: [[u32; 8]; 32] = std::array::from_fn(|lane| {
        std::array::from_fn(|i| {
            let first = (lane * 8 + (i % 4) * 2) as u32;
            first | (first + 1) << 16
        })
    });
    let list = ["%out0", "%out1", "%out2", "%out3"][..count].join(", ");
    let (space, base) = if generic { ("", "%rd3") } else { (".shared", "%r0") };
    let body = format!(
        "mov.u32 %r0, tile; mad.lo.u32 %r0, %lane, 16, %r0;
        cvt.u64.u32 %rd3, %r0; cvta.shared.u64 %rd3, %rd3;
        st.shared.v4.b32 [%r0], {{%in0, %in1, %in2, %in3}}; bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.{form}{space}.b16 {{{list}}}, [{base}];\n"
    );
    warp(&body, &input)
}

#[test]
pub fn ldmatrix_gives_each_lane_a_row_pair() {
    for (form, count) in [("x1", 1), ("x2", 2), ("x4", 4)] {
        for transposed in [false, true] {
            let name = if transposed { format!("{form}.trans") } else { form.to_owned() };
            let both = [false, true].map(|generic| load_matrix(&name, count, generic)).concat();
            for (lane, out) in both.iter().enumerate().map(|(i, out)| (i % 32, out)) {
                for (matrix, &got) in out[..count].iter().enumerate() {
                    let (row, column) = (lane / 4, lane % 4 * 2);
                    let element = |row: usize, column: usize| {
                        let at = if transposed { column * 8 + row } else { row * 8 + column };
                        (64 * matrix + at) as u32
                    };
                    let wanted = element(row, column) | element(row, column + 1) << 16;
                    assert_eq!(got, wanted, "{name} lane {lane} matrix {matrix}");
                }
            }
        }
    }
}

#[test]
pub fn movmatrix_transposes() {
    let input: [[u32; 8]; 32] = std::array::from_fn(|lane| {
        let first = 2 * lane as u32;
        [first | (first + 1) << 16; 8]
    });
    let out = warp("movmatrix.sync.aligned.m8n8.trans.b16 %out0, %in0;\n", &input);
    for (lane, out) in out.iter().enumerate() {
        let (row, column) = (lane / 4, lane % 4 * 2);
        assert_eq!(out[0], (column * 8 + row | (column * 8 + 8 + row) << 16) as u32, "lane {lane}");
    }
}

/// The places of a thread's elements in A (16 x k), B (k x 8) and C (16 x 8), as the ISA's
/// formulas for each shape give them.
struct Shape {
    name: &'static str,
    k: usize,
    /// Elements of A and B a thread holds.
    a: usize,
    b: usize,
    /// Bits of an element.
    bits: usize,
    a_at: fn(usize, usize) -> (usize, usize),
    b_at: fn(usize, usize) -> (usize, usize),
}

const SHAPES: [Shape; 4] = [
    Shape {
        name: "m16n8k8",
        k: 8,
        a: 4,
        b: 2,
        bits: 16,
        a_at: |lane, i| (lane / 4 + if i < 2 { 0 } else { 8 }, lane % 4 * 2 + i % 2),
        b_at: |lane, i| (lane % 4 * 2 + i, lane / 4),
    },
    Shape {
        name: "m16n8k16",
        k: 16,
        a: 8,
        b: 4,
        bits: 16,
        a_at: |lane, i| {
            let row = lane / 4 + if i % 4 < 2 { 0 } else { 8 };
            (row, lane % 4 * 2 + i % 2 + if i < 4 { 0 } else { 8 })
        },
        b_at: |lane, i| (lane % 4 * 2 + i % 2 + if i < 2 { 0 } else { 8 }, lane / 4),
    },
    Shape {
        name: "m16n8k4",
        k: 4,
        a: 2,
        b: 1,
        bits: 32,
        a_at: |lane, i| (lane / 4 + 8 * i, lane % 4),
        b_at: |lane, _| (lane % 4, lane / 4),
    },
    Shape {
        name: "m16n8k8",
        k: 8,
        a: 4,
        b: 2,
        bits: 32,
        a_at: |lane, i| {
            (lane / 4 + if i % 2 == 0 { 0 } else { 8 }, lane % 4 + if i < 2 { 0 } else { 4 })
        },
        b_at: |lane, i| (lane % 4 + 4 * i, lane / 4),
    },
];

fn c_at(lane: usize, i: usize) -> (usize, usize) {
    (lane / 4 + if i < 2 { 0 } else { 8 }, lane % 4 * 2 + i % 2)
}

fn mma(
    shape: &Shape,
    ty: &str,
    half_accumulate: bool,
    a: &dyn Fn(usize, usize) -> f32,
    b: &dyn Fn(usize, usize) -> f32,
) {
    let encode = |x: f32| match ty {
        "bf16" => u32::from(bf16::from_f32(x).to_bits()),
        "f16" => u32::from(f16::from_f32(x).to_bits()),
        _ => x.to_bits(),
    };
    let per_word = 32 / shape.bits;
    let (a_words, b_words) = (shape.a / per_word, shape.b / per_word);
    let input: [[u32; 8]; 32] = std::array::from_fn(|lane| {
        let mut words = [0; 8];
        for i in 0..shape.a {
            let (row, column) = (shape.a_at)(lane, i);
            words[i / per_word] |= encode(a(row, column)) << (shape.bits * (i % per_word));
        }
        for i in 0..shape.b {
            let (row, column) = (shape.b_at)(lane, i);
            words[a_words + i / per_word] |=
                encode(b(row, column)) << (shape.bits * (i % per_word));
        }
        words
    });
    let list = |range: std::ops::Range<usize>| {
        range.map(|i| format!("%in{i}")).collect::<Vec<_>>().join(", ")
    };
    let (out, acc, init) = if half_accumulate {
        ("%out0, %out1", "f16", "mov.b32 %out0, 0x3C003C00; mov.b32 %out1, 0x3C003C00;")
    } else {
        (
            "%out0, %out1, %out2, %out3",
            "f32",
            "mov.b32 %out0, 0f3F800000; mov.b32 %out1, %out0; mov.b32 %out2, %out0; mov.b32 %out3, %out0;",
        )
    };
    let body = format!(
        "{init} mma.sync.aligned.{}.row.col.{acc}.{ty}.{ty}.{acc} {{{out}}}, {{{}}}, {{{}}}, {{{out}}};\n",
        shape.name,
        list(0..a_words),
        list(a_words..a_words + b_words),
    );
    for (lane, out) in warp(&body, &input).iter().enumerate() {
        for i in 0..4 {
            let (row, column) = c_at(lane, i);
            let wanted = 1.0 + (0..shape.k).map(|k| a(row, k) * b(k, column)).sum::<f32>();
            let got = if half_accumulate {
                f16::from_bits((out[i / 2] >> (16 * (i % 2))) as u16).to_f32()
            } else {
                f32::from_bits(out[i])
            };
            assert_eq!(got, wanted, "{body} row {row} column {column}");
        }
    }
}

#[test]
pub fn mma_multiplies_what_the_layouts_say() {
    for shape in &SHAPES {
        let types: &[&str] = if shape.bits == 16 { &["bf16", "f16"] } else { &["tf32"] };
        for ty in types {
            // A times a unit matrix gives A back, and the other way round: each element shows
            // where it came from. All are integers below 256, exact in bf16.
            let k = shape.k;
            let unique_a = move |row: usize, column: usize| (row * k + column) as f32;
            let unique_b = |row: usize, column: usize| (row * 8 + column) as f32;
            for shift in [0, k - k.min(8)] {
                let unit =
                    move |row: usize, column: usize| f32::from(u8::from(row == column + shift));
                mma(shape, ty, false, &unique_a, &unit);
            }
            for shift in [0, 16 - k] {
                let unit =
                    move |row: usize, column: usize| f32::from(u8::from(row == column + shift));
                mma(shape, ty, false, &unit, &unique_b);
            }
            // And a full product of small integers.
            let small = |row: usize, column: usize| ((row * 5 + column * 3) % 7) as f32 - 3.0;
            mma(shape, ty, false, &small, &small);
            if *ty == "f16" {
                mma(shape, ty, true, &small, &small);
            }
        }
    }
}
