//! Attention, its way back, and attention over a cache.

use std::ops::Range;

use super::*;

#[derive(Clone, Copy, Debug)]
struct Shape {
    windows: usize,
    context: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

fn shape([windows, context, heads, kv_heads, head_dim]: [usize; 5]) -> Shape {
    Shape { windows, context, heads, kv_heads, head_dim }
}

impl Shape {
    fn queries(&self) -> usize {
        self.windows * self.heads * self.context
    }
    fn keys(&self) -> usize {
        self.windows * self.kv_heads * self.context
    }
    /// The arguments that end every launch.
    fn values(&self) -> Vec<Piece> {
        [self.windows, self.context, self.heads, self.kv_heads, self.head_dim]
            .map(|x| value(x as i32))
            .into()
    }
    /// Of each row of q: its key/value head, its row in `out`, the columns it sees.
    fn rows(&self, first_key: &[u32]) -> impl Iterator<Item = (usize, usize, Range<usize>)> {
        let Shape { context, heads, kv_heads, .. } = *self;
        (0..self.queries()).map(move |row| {
            let (head, column) = (row / context, row % context);
            let token = head / heads * context + column;
            let first = (first_key[token] as usize).min(column + 1);
            (head / (heads / kv_heads), token * heads + head % heads, first..column + 1)
        })
    }
    /// Of each window in turn: no mask but the causal one; two documents; padding on the left, whose
    /// rows see nothing, and one such row in the middle.
    fn first_key(&self) -> Vec<u32> {
        let context = self.context as u32;
        let first = |window: usize, column: u32| match window % 3 {
            0 => 0,
            1 => [0, context / 3][usize::from(column >= context / 3)],
            _ if column == context / 2 => u32::MAX,
            _ => context / 4 + 1,
        };
        (0..self.windows).flat_map(|w| (0..context).map(move |c| first(w, c))).collect()
    }
}

fn dot<R: Float>(a: &[R], b: &[R]) -> R {
    a.iter().zip(b).fold(R::zero(), |sum, (&a, &b)| sum + a * b)
}

fn add_scaled<R: Float>(y: &mut [R], scale: R, x: &[R]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y = *y + scale * x;
    }
}

/// What enters a second product is rounded to `dtype`, as mixed precision does: softmax's p and ds.
fn rounded<R: Float>(dtype: Option<Dtype>, x: R) -> R {
    dtype.map_or(x, |dtype| real::<R>(&[dtype.round_f64(x.to_f64().expect("a float"))])[0])
}

/// `out` of one row from its scores; returns their log-sum-exp.
fn softmax<'a, R: Float + 'a>(
    scores: &[R],
    values: impl Iterator<Item = &'a [R]>,
    out: &mut [R],
    dtype: Option<Dtype>,
) -> R {
    if scores.is_empty() {
        return R::zero();
    }
    let top = scores.iter().fold(R::neg_infinity(), |top, &s| top.max(s));
    let sum = scores.iter().fold(R::zero(), |sum, &s| sum + (s - top).exp());
    for (&score, value) in scores.iter().zip(values) {
        add_scaled(out, rounded(dtype, (score - top).exp()), value);
    }
    for out in out {
        *out = *out / sum;
    }
    top + sum.ln()
}

/// out, lse.
fn attention<R: Float>(
    shape: &Shape,
    [q, k, v]: [&[f64]; 3],
    first_key: &[u32],
    dtype: Option<Dtype>,
) -> (Vec<R>, Vec<R>) {
    let [q, k, v] = [q, k, v].map(real::<R>);
    let d = shape.head_dim;
    let scale = real::<R>(&[(d as f64).sqrt().recip()])[0];
    let (mut out, mut lse) = (vec![R::zero(); q.len()], Vec::new());
    for (q, (kv_head, to, seen)) in q.chunks(d).zip(shape.rows(first_key)) {
        let at = |column: usize| (kv_head * shape.context + column) * d;
        let scores: Vec<R> = seen.clone().map(|j| dot(q, &k[at(j)..][..d]) * scale).collect();
        let values = seen.map(|j| &v[at(j)..][..d]);
        lse.push(softmax(&scores, values, &mut out[to * d..][..d], dtype));
    }
    (out, lse)
}

/// delta, dq, dk, dv.
fn attention_backward<R: Float>(
    shape: &Shape,
    [q, k, v, out, lse, dout]: [&[f64]; 6],
    first_key: &[u32],
    dtype: Option<Dtype>,
) -> [Vec<R>; 4] {
    let [q, k, v, out, lse, dout] = [q, k, v, out, lse, dout].map(real::<R>);
    let d = shape.head_dim;
    let scale = real::<R>(&[(d as f64).sqrt().recip()])[0];
    let mut deltas = Vec::new();
    let [mut dq, mut dk, mut dv] = [&q, &k, &v].map(|x| vec![R::zero(); x.len()]);
    for (row, (kv_head, to, seen)) in shape.rows(first_key).enumerate() {
        let (q, dout) = (&q[row * d..][..d], &dout[to * d..][..d]);
        let delta = dot(dout, &out[to * d..][..d]);
        deltas.push(delta);
        for j in seen {
            let key = (kv_head * shape.context + j) * d;
            let key = key..key + d;
            let p = (dot(q, &k[key.clone()]) * scale - lse[row]).exp();
            let ds = rounded(dtype, p * (dot(dout, &v[key.clone()]) - delta)) * scale;
            add_scaled(&mut dv[key.clone()], rounded(dtype, p), dout);
            add_scaled(&mut dk[key.clone()], ds, q);
            add_scaled(&mut dq[row * d..][..d], ds, &k[key]);
        }
    }
    [deltas, dq, dk, dv]
}

fn indices(values: &[u32]) -> Piece {
    Piece::In(values.iter().flat_map(|x| x.to_le_bytes()).collect())
}

/// Odd widths, every width of a fast path, more than a warp's lanes; contexts of 1, just below, at
/// and past a tile; groups of 1, 2, 4 and 8.
const SHAPES: [[usize; 5]; 12] = [
    [2, 1, 2, 1, 4],
    [3, 5, 2, 2, 1],
    [3, 37, 8, 1, 2],
    [1, 32, 3, 3, 3],
    [3, 33, 4, 1, 8],
    [1, 67, 1, 1, 17],
    [1, 48, 2, 1, 16],
    [3, 40, 2, 2, 32],
    [1, 70, 2, 1, 64],
    [1, 18, 1, 1, 96],
    [1, 65, 1, 1, 128],
    [1, 35, 1, 1, 256],
];

/// One of the ways to compute an attention.
struct Path {
    /// What its entries are called, less the type: forward, back to q, back to k and v.
    entries: [String; 3],
    launch: [Config; 3],
    /// Whether its entries take head_dim, or have it in their name.
    takes_head_dim: bool,
}

impl Path {
    /// Two blocks, fewer than there are tasks: a block has to go on to its next.
    fn plain(shape: &Shape) -> Path {
        let d = shape.head_dim as u32;
        let shared = 4 * (2 * 16 * d + 2 * 32 * (d | 1));
        Path {
            entries: ["", "_backward_dq", "_backward_dkdv"]
                .map(|pass| format!("attention_generic{pass}")),
            launch: [Config { grid: [2, 1, 1], block: [128, 1, 1], shared }; 3],
            takes_head_dim: true,
        }
    }
    /// head_dim 2, 4 and 8; a lane owns one row or, where it can be more, as many as there are.
    fn narrow(shape: &Shape, one: bool) -> Path {
        let (d, group) = (shape.head_dim, (shape.heads / shape.kv_heads) as u32);
        let several = if d == 8 { 2 } else { 4 };
        let entry =
            |(pass, rows)| format!("attention_smallhead{pass}_{d}_{}", if one { 1 } else { rows });
        let warps = group.min(if one { 8 } else { 4 });
        Path {
            entries: [("", 4), ("_backward_dq", several), ("_backward_dkdv", several)].map(entry),
            launch: [Config::linear(1, 128), Config::linear(1, 128), Config::linear(2, 32 * warps)],
            takes_head_dim: false,
        }
    }
    /// head_dim 2 and 4 in types of two bytes; a warp owns one block of rows or as many as it can.
    fn narrow_mma(shape: &Shape, one: bool) -> Path {
        let (d, group) = (shape.head_dim, (shape.heads / shape.kv_heads) as u32);
        let several = if d == 2 { 8 } else { 4 };
        let entry = |(pass, blocks)| {
            format!("attention_smallhead_tf32{pass}_{d}_{}", if one { 1 } else { blocks })
        };
        Path {
            entries: [("", 4), ("_backward_dq", 4), ("_backward_dkdv", several)].map(entry),
            launch: [(1, 4), (1, 4), (2, group.min(if one { 8 } else { 4 }))]
                .map(|(grid, warps)| Config::linear(grid, 32 * warps)),
            takes_head_dim: false,
        }
    }
    /// head_dim 16, 32, 64, 96 and 128, in types of two bytes.
    fn mma(shape: &Shape) -> Path {
        let d = shape.head_dim;
        let entry = |pass| format!("flash_attention{pass}_{d}");
        // As the table in the source has it: own rows in sixteens a warp, rows of a tile.
        let tilings = [
            (2, if d == 64 { 64 } else { 32 }),
            (if d <= 64 { 2 } else { 1 }, 32),
            (if d <= 32 { 2 } else { 1 }, 32),
        ];
        let bytes = |rows: usize| (rows * (2 * d + 16)) as u32;
        let [(own, tile), (own_q, tile_q), (own_kv, tile_kv)] = tilings;
        let shared = [
            bytes(64 * own + 4 * tile),
            bytes(2 * 64 * own_q + 4 * tile_q),
            bytes(2 * 64 * own_kv + 4 * tile_kv) + 2 * 12 * tile_kv as u32,
        ];
        Path {
            entries: ["", "_backward_dq", "_backward_dkdv"].map(entry),
            launch: shared.map(|shared| Config { grid: [2, 1, 1], block: [128, 1, 1], shared }),
            takes_head_dim: false,
        }
    }

    fn run(
        &self,
        module: &Module,
        pass: usize,
        dtype: Dtype,
        shape: &Shape,
        mut pieces: Vec<Piece>,
    ) -> Vec<Vec<u8>> {
        pieces.extend([shape.windows, shape.context].map(|x| value(x as i32)));
        pieces.extend([shape.heads, shape.kv_heads].map(|x| value(x as i32)));
        if self.takes_head_dim {
            pieces.push(value(shape.head_dim as i32));
        }
        let entry = format!("{}_{}", self.entries[pass], dtype.suffix());
        run(module, &entry, self.launch[pass], &pieces)
    }

    /// Holds the forward pass against f64; q is uniform below `sharpness`.
    fn is_right(&self, module: &Module, dtype: Dtype, shape: &Shape, sharpness: f64) {
        let d = shape.head_dim;
        let q = dtype.random(1, shape.queries() * d, sharpness);
        let [k, v] = [2, 3].map(|seed| dtype.random(seed, shape.keys() * d, 2.0));
        let first_key = shape.first_key();
        let (exact, exact_lse) = attention::<f64>(shape, [&q, &k, &v], &first_key, None);
        let (low, low_lse) = attention::<f32>(shape, [&q, &k, &v], &first_key, Some(dtype));
        let mut pieces: Vec<_> = [&q, &k, &v].map(|x| Piece::In(dtype.bytes(x))).into();
        pieces.push(indices(&first_key));
        pieces.extend([Piece::Out(q.len() * dtype.size()), Piece::Out(4 * shape.queries())]);
        let got = self.run(module, 0, dtype, shape, pieces);
        check(&format!("out of {shape:?}"), dtype, &got[0], &exact, &low);
        check(&format!("lse of {shape:?}"), Dtype::F32, &got[1], &exact_lse, &low_lse);
    }

    /// Holds the two passes back against f64.
    fn goes_back(&self, module: &Module, dtype: Dtype, shape: &Shape) {
        let d = shape.head_dim;
        let q = dtype.random(1, shape.queries() * d, 3.0);
        let [k, v] = [2, 3].map(|seed| dtype.random(seed, shape.keys() * d, 2.0));
        let dout = dtype.random(4, q.len(), 1.0);
        let first_key = shape.first_key();
        let lse = attention::<f64>(shape, [&q, &k, &v], &first_key, None).1;
        let lse = Dtype::F32.values(&Dtype::F32.bytes(&lse));
        // The formula takes any: with the true one a row of one column would only cancel.
        let out = dtype.random(5, q.len(), 1.0);
        let all = [&q, &k, &v, &out, &lse, &dout].map(Vec::as_slice);
        let exact = attention_backward::<f64>(shape, all, &first_key, None);
        let low = attention_backward::<f32>(shape, all, &first_key, Some(dtype));
        for (pass, outputs) in [(1, 1..2), (2, 2..4)] {
            let mut pieces: Vec<_> = [&q, &k, &v].map(|x| Piece::In(dtype.bytes(x))).into();
            pieces.push(indices(&first_key));
            pieces.push(Piece::In(Dtype::F32.bytes(&lse)));
            // As the pass of delta leaves it.
            let delta: Vec<f64> = low[0].iter().map(|&x| f64::from(x)).collect();
            pieces.push(Piece::In(Dtype::F32.bytes(&delta)));
            pieces.push(Piece::In(dtype.bytes(&dout)));
            pieces.extend(outputs.clone().map(|i| Piece::Out(exact[i].len() * dtype.size())));
            let got = self.run(module, pass, dtype, shape, pieces);
            for (i, got) in outputs.zip(&got) {
                let what = format!("{} of {shape:?}", ["delta", "dq", "dk", "dv"][i]);
                check(&what, dtype, got, &exact[i], &low[i]);
            }
        }
    }
}

/// Two types a shape, in turns.
fn types(at: usize) -> [Dtype; 2] {
    [DTYPES[at % 3], DTYPES[(at + 1) % 3]]
}

#[test]
fn attention_is_right_on_its_plain_path() {
    let Some(module) = module("attention_generic") else { return };
    for (at, shape) in SHAPES.map(shape).iter().enumerate() {
        for dtype in types(at) {
            Path::plain(shape).is_right(&module, dtype, shape, 3.0);
        }
    }
}

#[test]
fn attention_goes_back_on_its_plain_path() {
    let Some(module) = module("attention_generic") else { return };
    for (at, shape) in SHAPES.map(shape).iter().enumerate() {
        for dtype in types(at) {
            Path::plain(shape).goes_back(&module, dtype, shape);
        }
    }
}

/// More than one chunk of rows, tiles before, on and behind the diagonal, a tail; the groups.
const NARROW: [[usize; 5]; 7] = [
    [3, 1, 2, 1, 2],
    [3, 37, 8, 1, 4],
    [3, 170, 2, 2, 2],
    [1, 200, 5, 1, 2],
    [3, 100, 4, 1, 4],
    [1, 150, 1, 1, 8],
    [3, 70, 4, 2, 8],
];

/// With a mild softmax whole tiles are added at once, with this one nearly all need care.
const SHARP: f64 = 300.0;

#[test]
fn attention_of_narrow_heads_is_right() {
    let Some(module) = module("attention_smallhead") else { return };
    for (at, shape) in NARROW.map(shape).iter().enumerate() {
        let [some, other] = types(at);
        for (one, dtype, sharpness) in
            [(false, some, 3.0), (false, other, SHARP), (true, other, 3.0), (true, some, SHARP)]
        {
            Path::narrow(shape, one).is_right(&module, dtype, shape, sharpness);
        }
    }
}

#[test]
fn attention_of_narrow_heads_goes_back() {
    let Some(module) = module("attention_smallhead") else { return };
    for (at, shape) in NARROW.map(shape).iter().enumerate() {
        for (one, dtype) in [false, true].into_iter().zip(types(at)) {
            Path::narrow(shape, one).goes_back(&module, dtype, shape);
        }
    }
}

/// More than one chunk of rows in each pass, tiles before, on and behind the diagonal, a tail; groups
/// that fill a block's warps and that do not.
const NARROW_MMA: [[usize; 5]; 6] = [
    [3, 1, 2, 1, 2],
    [3, 170, 2, 1, 2],
    [1, 200, 5, 1, 2],
    [3, 37, 8, 1, 4],
    [3, 150, 2, 2, 4],
    [1, 131, 3, 1, 4],
];

#[test]
fn attention_of_narrow_heads_on_tensor_cores_is_right() {
    let Some(module) = module("attention_smallhead_tf32") else { return };
    for (at, shape) in NARROW_MMA.map(shape).iter().enumerate() {
        let turn = at % 2 == 0;
        let (some, other) =
            if turn { (Dtype::Bf16, Dtype::F16) } else { (Dtype::F16, Dtype::Bf16) };
        for (one, dtype, sharpness) in
            [(false, some, 3.0), (false, other, SHARP), (true, other, 3.0), (true, some, SHARP)]
        {
            Path::narrow_mma(shape, one).is_right(&module, dtype, shape, sharpness);
        }
    }
}

#[test]
fn attention_of_narrow_heads_goes_back_on_tensor_cores() {
    let Some(module) = module("attention_smallhead_tf32") else { return };
    for (at, shape) in NARROW_MMA.map(shape).iter().enumerate() {
        let [some, other] =
            if at % 2 == 0 { [Dtype::Bf16, Dtype::F16] } else { [Dtype::F16, Dtype::Bf16] };
        for (one, dtype) in [(false, some), (true, other)] {
            Path::narrow_mma(shape, one).goes_back(&module, dtype, shape);
        }
    }
}

/// More tiles than stages, more than a block of rows, tails of both; the groups.
const MMA: [[usize; 5]; 8] = [
    [3, 1, 2, 1, 16],
    [3, 37, 8, 1, 16],
    [1, 170, 4, 1, 32],
    [1, 70, 1, 1, 32],
    [3, 70, 2, 2, 64],
    [1, 200, 1, 1, 64],
    [2, 135, 1, 1, 96],
    [1, 150, 2, 1, 128],
];

#[test]
fn attention_on_tensor_cores_is_right() {
    let Some(module) = module("flash_attention") else { return };
    for (at, shape) in MMA.map(shape).iter().enumerate() {
        Path::mma(shape).is_right(&module, Dtype::Bf16, shape, 3.0);
        if at % 2 == 0 {
            Path::mma(shape).is_right(&module, Dtype::F16, shape, 3.0);
        }
    }
}

#[test]
fn attention_on_tensor_cores_goes_back() {
    let Some(module) = module("flash_attention") else { return };
    for (at, shape) in MMA.map(shape).iter().enumerate() {
        Path::mma(shape).goes_back(&module, Dtype::Bf16, shape);
        if at % 2 == 1 {
            Path::mma(shape).goes_back(&module, Dtype::F16, shape);
        }
    }
}

#[test]
fn attention_delta_matches_f64() {
    let Some(module) = module("attention_delta") else { return };
    for dtype in DTYPES {
        for (dims, width) in [([2, 3, 4, 1, 2], 1), ([1, 5, 3, 1, 17], 8), ([2, 2, 1, 1, 128], 16)]
        {
            let shape = shape(dims);
            let d = shape.head_dim;
            let [out, dout] = [1, 2].map(|seed| dtype.random(seed, shape.queries() * d, 1.0));
            let none = vec![0.0; shape.keys() * d];
            let (q, lse) = (vec![0.0; out.len()], vec![0.0; shape.queries()]);
            let all = [&q, &none, &none, &out, &lse, &dout].map(Vec::as_slice);
            let first_key = shape.first_key();
            let [exact, ..] = attention_backward::<f64>(&shape, all, &first_key, None);
            let [low, ..] = attention_backward::<f32>(&shape, all, &first_key, None);
            let mut pieces: Vec<_> = [&out, &dout].map(|x| Piece::In(dtype.bytes(x))).into();
            pieces.push(Piece::Out(4 * shape.queries()));
            pieces.extend([shape.windows, shape.context, shape.heads, d].map(|x| value(x as i32)));
            let config = Config { grid: [3, 1, 1], block: [width, 8, 1], shared: 0 };
            let entry = format!("attention_delta_{}", dtype.suffix());
            let got = run(&module, &entry, config, &pieces);
            check(&format!("delta of {shape:?}"), Dtype::F32, &got[0], &exact, &low);
        }
    }
}

/// out; keys and values become what they are after it.
fn cached<R: Float>(
    shape: &Shape,
    [q, k, v]: [&[f64]; 3],
    start: &[u32],
    capacity: usize,
    [keys, values]: [&mut [f64]; 2],
    dtype: Option<Dtype>,
) -> Vec<R> {
    let Shape { context, heads, kv_heads, head_dim: d, .. } = *shape;
    for (fresh, kept) in [(k, &mut *keys), (v, &mut *values)] {
        for (row, fresh) in fresh.chunks(d).enumerate() {
            let (kv_head, column) = (row / context, row % context);
            let at = kv_head * capacity + start[kv_head / kv_heads] as usize + column;
            kept[at * d..][..d].copy_from_slice(fresh);
        }
    }
    let [q, keys, values] = [q, keys, values].map(|x| real::<R>(x));
    let scale = real::<R>(&[(d as f64).sqrt().recip()])[0];
    let mut out = vec![R::zero(); q.len()];
    for (row, q) in q.chunks(d).enumerate() {
        let (head, column) = (row / context, row % context);
        let (window, kv_head) = (head / heads, head / (heads / kv_heads));
        let seen = 0..start[window] as usize + column + 1;
        let at = |j: usize| (kv_head * capacity + j) * d;
        let scores: Vec<R> = seen.clone().map(|j| dot(q, &keys[at(j)..][..d]) * scale).collect();
        let to = (window * context + column) * heads + head % heads;
        softmax(&scores, seen.map(|j| &values[at(j)..][..d]), &mut out[to * d..][..d], dtype);
    }
    out
}

/// Windows, context, heads, key/value heads, head_dim; where each window starts; the cache's columns.
const CACHES: [([usize; 5], [u32; 2], usize); 8] = [
    ([2, 1, 4, 1, 2], [0, 300], 301),
    ([2, 5, 2, 2, 1], [3, 0], 9),
    ([2, 1, 8, 1, 8], [70, 5], 128),
    ([1, 3, 2, 1, 17], [40, 0], 43),
    ([2, 1, 4, 2, 64], [33, 15], 40),
    ([1, 1, 1, 1, 96], [20, 0], 21),
    ([1, 2, 1, 1, 128], [9, 0], 16),
    ([1, 1, 2, 1, 256], [12, 0], 14),
];

fn cached_is_right(module: &Module, types: &[Dtype]) {
    for &dtype in types {
        for (dims, start, capacity) in CACHES {
            let shape = shape(dims);
            let (d, start) = (shape.head_dim, &start[..shape.windows]);
            let q = dtype.random(1, shape.queries() * d, 3.0);
            let [k, v] = [2, 3].map(|seed| dtype.random(seed, shape.keys() * d, 2.0));
            let plane = shape.windows * shape.kv_heads * capacity * d;
            let before = [4, 5].map(|seed| dtype.random(seed, plane, 2.0));
            let fill = |planes: &mut [Vec<f64>; 2]| {
                let [keys, values] = planes;
                let planes = [&mut keys[..], &mut values[..]];
                let low = cached::<f32>(&shape, [&q, &k, &v], start, capacity, planes, Some(dtype));
                let planes = [&mut keys[..], &mut values[..]];
                (cached::<f64>(&shape, [&q, &k, &v], start, capacity, planes, None), low)
            };
            let mut after = before.clone();
            let (exact, low) = fill(&mut after);
            let mut pieces: Vec<_> = [&q, &k, &v].map(|x| Piece::In(dtype.bytes(x))).into();
            pieces.push(indices(start));
            pieces.extend(before.iter().map(|x| Piece::Both(dtype.bytes(x))));
            pieces.push(Piece::Out(q.len() * dtype.size()));
            pieces.extend(shape.values());
            pieces.push(value(capacity as i32));
            let config = Config::linear(3, 128);
            let entry = format!("attention_decode_{}", dtype.suffix());
            let got = run(module, &entry, config, &pieces);
            for (got, after) in got.iter().zip(&after) {
                assert!(*got == dtype.bytes(after), "the cache of {shape:?} in {dtype:?}");
            }
            check(&format!("out of {shape:?}"), dtype, &got[2], &exact, &low);
        }
    }
}

#[test]
fn attention_over_a_cache_appends_and_sees_what_came_before() {
    let Some(module) = module("attention_decode") else { return };
    cached_is_right(&module, &DTYPES);
}

fn generic_is_right(module: &Module) {
    let shape = shape([3, 37, 2, 1, 5]);
    Path::plain(&shape).is_right(module, Dtype::F32, &shape, 3.0);
    Path::plain(&shape).goes_back(module, Dtype::F32, &shape);
}

pub const GENERIC: Mutants = Mutants {
    kernel: "attention_generic",
    only: &["ENTRIES(f32)"],
    mutants: &[
        ("no_mask", "visible ? p[r] * scale : -INFINITY", "p[r] * scale"),
        ("sum_not_rescaled", " * rescale", ""),
        ("rows_overwritten", "", ""),
        ("no_delta", "(dp[r] - row_delta[r])", "dp[r]"),
        ("one_head_of_a_group", "member < shape.group()", "member < 1"),
        ("visible_tile_skipped", " + valid_rows", ""),
    ],
    check: generic_is_right,
};

fn smallhead_is_right(module: &Module) {
    let shape = shape([3, 170, 2, 1, 2]);
    for sharpness in [3.0, SHARP] {
        Path::narrow(&shape, false).is_right(module, Dtype::F32, &shape, sharpness);
    }
    Path::narrow(&shape, false).goes_back(module, Dtype::F32, &shape);
}

pub const SMALLHEAD: Mutants = Mutants {
    kernel: "attention_smallhead",
    only: &["FORWARD(2, 4, T)", "BACKWARD(2, 4, T)", "ENTRIES(f32)"],
    mutants: &[
        ("exponents_not_bounded", "norm[r] * max_norm - shift[r] <= MAX_EXPONENT", "true"),
        ("unseen_row_taken_as_bounded", "-INFINITY", "0.0f"),
        ("rows_after_diagonal_skipped", "i + 1 < ROWS", "i > ROWS"),
        ("next_key_visible", "key <= row(r)", "key <= row(r) + 1"),
        ("tile_read_early", "", ""),
        ("other_warps_dropped", "owner < warps", "owner < 1"),
        ("visible_tile_skipped", " + CHUNK", ""),
    ],
    check: smallhead_is_right,
};

fn smallhead_tf32_is_right(module: &Module) {
    let shape = shape([3, 170, 2, 1, 2]);
    for sharpness in [3.0, SHARP] {
        Path::narrow_mma(&shape, false).is_right(module, Dtype::Bf16, &shape, sharpness);
    }
    Path::narrow_mma(&shape, false).goes_back(module, Dtype::Bf16, &shape);
}

pub const SMALLHEAD_TF32: Mutants = Mutants {
    kernel: "attention_smallhead_tf32",
    only: &["FORWARD_AND_DQ(2, 4, T)", "DKDV(2, 8, T)", "ENTRIES(bf16)"],
    mutants: &[
        ("low_part_dropped", "low = cvt_rna_tf32(x - high)", "low = 0.0f"),
        ("overflow_not_detected", "!rows.in_range()", "false"),
        ("column_of_another_block", "rows + 16", "rows + 8"),
        ("tile_read_early", "", ""),
        ("no_delta", "valid ? -delta[row + position] : 0.0f", "0.0f"),
        ("mask_skipped", "min(first_masked, end)", "end"),
        ("query_past_the_end_visible", ": INT_MAX", ": 0"),
        ("other_warps_dropped", "owner < warps", "owner < 1"),
    ],
    check: smallhead_tf32_is_right,
};

fn flash_is_right(module: &Module) {
    let shape = shape([3, 145, 2, 1, 32]);
    Path::mma(&shape).is_right(module, Dtype::Bf16, &shape, 3.0);
    Path::mma(&shape).goes_back(module, Dtype::Bf16, &shape);
}

pub const FLASH: Mutants = Mutants {
    kernel: "flash_attention",
    only: &["ENTRIES(32, bf16)"],
    mutants: &[
        ("wait_for_one_group_less", "(PENDING)", "(PENDING + 1)"),
        ("ldmatrix_not_transposed", ".trans", ""),
        ("max_of_two_lanes", "", ""),
        ("stage_overwritten", "", ""),
        ("diagonal_hidden", "row < key", "row <= key"),
        ("rows_past_the_end_not_zero", "valid ? 16 : 0", "16"),
        ("stats_not_stored", "", ""),
        ("visible_tile_skipped", "> high", "> low - 32"),
    ],
    check: flash_is_right,
};

fn decode_is_right(module: &Module) {
    cached_is_right(module, &[Dtype::F32]);
}

pub const DECODE: Mutants = Mutants {
    kernel: "attention_decode",
    only: &["ENTRIES(f32)"],
    mutants: &[
        ("future_keys_visible", "if (at < end) ", ""),
        ("cached_position_taken_for_new", "at < begin", "at + 1 < begin"),
        ("last_warp_dropped", "w < WARPS;", "w < WARPS - 1;"),
        ("one_kv_head_appended", "head % shape.group() == 0", "head == 0"),
    ],
    check: decode_is_right,
};
