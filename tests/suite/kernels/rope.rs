//! Rotary embedding and its split into heads.

use super::*;

#[derive(Clone, Copy)]
struct Shape {
    windows: usize,
    context: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

impl Shape {
    fn slots(&self) -> usize {
        self.heads + 2 * self.kv_heads
    }
    /// The lengths of q, k and v.
    fn parts(&self) -> [usize; 3] {
        [self.heads, self.kv_heads, self.kv_heads]
            .map(|heads| self.windows * self.context * heads * self.head_dim)
    }
    /// Where a value of the joined rows goes: the part, its place there, and the column in its head.
    fn place(&self, at: usize) -> (usize, usize, usize) {
        let (row, slot, i) = (
            at / self.head_dim / self.slots(),
            at / self.head_dim % self.slots(),
            at % self.head_dim,
        );
        let (window, column) = (row / self.context, row % self.context);
        let (part, heads, head) = if slot < self.heads {
            (0, self.heads, slot)
        } else {
            let slot = slot - self.heads;
            (1 + slot / self.kv_heads, self.kv_heads, slot % self.kv_heads)
        };
        let place = ((window * heads + head) * self.context + column) * self.head_dim + i;
        (part, place, i)
    }
    fn arguments(&self) -> [Piece; 5] {
        [self.windows, self.context, self.heads, self.kv_heads, self.head_dim]
            .map(|number| value(number as i32))
    }
}

fn frequency(shape: Shape, i: usize) -> f64 {
    10000f64.powf(-2.0 * i as f64 / shape.head_dim as f64)
}

/// The joined rows with each head of q and k turned, by `sign` times its angle.
fn turned<R: Float>(shape: Shape, x: &[f64], start: &[u32], sign: f64) -> Vec<R> {
    let (half, x) = (shape.head_dim / 2, real::<R>(x));
    let one = |at: usize| {
        let (part, _, i) = shape.place(at);
        if part == 2 {
            return x[at];
        }
        let row = at / shape.head_dim / shape.slots();
        let position = start[row / shape.context] as usize + row % shape.context;
        let (sin, cos) = (position as f64 * frequency(shape, i % half)).sin_cos();
        let [sin, cos] = [sign * sin, cos].map(|x| R::from(x).unwrap());
        if i < half { x[at] * cos - x[at + half] * sin } else { x[at] * cos + x[at - half] * sin }
    };
    (0..x.len()).map(one).collect()
}

fn split<V: Copy + Default>(shape: Shape, joined: &[V]) -> [Vec<V>; 3] {
    let mut parts = shape.parts().map(|len| vec![V::default(); len]);
    for (at, &value) in joined.iter().enumerate() {
        let (part, place, _) = shape.place(at);
        parts[part][place] = value;
    }
    parts
}

pub fn rope_is_right(module: &Module) {
    // Whole heads in one access, in two, and neither; more columns than a block has threads.
    let shapes = [
        (2, 70, 4, 2, 2),
        (3, 5, 3, 1, 4),
        (2, 9, 2, 1, 8),
        (1, 7, 2, 2, 16),
        (2, 3, 3, 3, 32),
        (2, 5, 2, 1, 6),
        (1, 1, 1, 1, 20),
    ];
    for dtype in DTYPES {
        for (windows, context, heads, kv_heads, head_dim) in shapes {
            let shape = Shape { windows, context, heads, kv_heads, head_dim };
            let x = dtype.random(1, windows * context * shape.slots() * head_dim, 3.0);
            let config = Config { grid: [3, 1, 1], block: [32, 4, 1], shared: 0 };
            // The last window's last column stands at position 8191.
            let late: Vec<u32> = (0..windows as u32)
                .map(|w| (8192 - context as u32) * (w + 1) / windows as u32)
                .collect();
            let zeros = vec![0; windows];
            for start in [None, Some(&late)] {
                let positions = start.unwrap_or(&zeros).iter().max().unwrap() + context as u32;
                let turns: Vec<f64> = (0..positions)
                    .flat_map(|position| (0..head_dim / 2).map(move |i| (position, i)))
                    .flat_map(|(position, i)| {
                        let (sin, cos) = (f64::from(position) * frequency(shape, i)).sin_cos();
                        [cos, sin]
                    })
                    .collect();
                let turns = Dtype::F32.bytes(&turns);
                let given = start.map_or(value(0u64), |start| Piece::In(words(start)));
                let start = start.unwrap_or(&zeros);
                let mut pieces = vec![Piece::In(dtype.bytes(&x)), given, Piece::In(turns.clone())];
                pieces.extend(shape.parts().map(|len| Piece::Out(len * dtype.size())));
                pieces.extend(shape.arguments());
                let got = run(module, &format!("rope_{}", dtype.suffix()), config, &pieces);
                let exact = split(shape, &turned::<f64>(shape, &x, start, 1.0));
                let plain = split(shape, &turned::<f32>(shape, &x, start, 1.0));
                for part in 0..3 {
                    check(["q", "k", "v"][part], dtype, &got[part], &exact[part], &plain[part]);
                }
                if start != &zeros {
                    continue;
                }
                let parts = split(shape, &x).map(|part| Piece::In(dtype.bytes(&part)));
                let mut pieces: Vec<_> = parts.into_iter().collect();
                pieces.extend([Piece::In(turns), Piece::Out(x.len() * dtype.size())]);
                pieces.extend(shape.arguments());
                let entry = format!("rope_backward_{}", dtype.suffix());
                let got = run(module, &entry, config, &pieces);
                let exact = turned::<f64>(shape, &x, start, -1.0);
                let plain = turned::<f32>(shape, &x, start, -1.0);
                check("dqkv", dtype, &got[0], &exact, &plain);
            }
        }
    }
}

#[test]
fn rope_turns_splits_and_joins() {
    holds("rope", rope_is_right);
}

pub const ROPE: Mutants = Mutants {
    kernel: "rope",
    only: &[],
    mutants: &[
        ("angle_not_negated", "BACKWARD ? -pair[1] : pair[1]", "pair[1]"),
        ("start_ignored", "start != nullptr ? start[sequence] : 0u", "0u"),
        ("v_rotated", "slot < rotated", "slot < slots"),
        ("kv_heads_taken_for_heads", "* kv_heads", "* heads"),
        ("neighbors_paired", "from + half", "from + N"),
        ("one_position_too_many", "t >= shape.seq_len", "t > shape.seq_len"),
    ],
    check: rope_is_right,
};
