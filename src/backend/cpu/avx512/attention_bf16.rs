//! Attention in bfloat16 for heads of 16 components or more.
//!
//! A task is one KV head of one sequence with the query heads that share it (GQA). Eight query rows go together:
//! their scores against all keys that they see stay in a core's first cache, so softmax is that of whole rows.
//! Gradients of keys and values are sums over query rows: p and ds of 64 rows are kept for them.
//!
//! Operands of the matmuls are rounded to bfloat16: q, k, v, dout, the unnormalized p of the forward, and p and ds of
//! the backward. Scores, softmax and sums are f32.

// Several arrays go by one index.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::{
    __m512, _mm512_add_ps, _mm512_fmsub_ps, _mm512_mask_mov_ps, _mm512_maskz_mov_ps, _mm512_max_ps,
    _mm512_mul_ps, _mm512_reduce_add_ps, _mm512_reduce_max_ps, _mm512_set1_ps, _mm512_setzero_ps,
    _mm512_sub_ps,
};
use std::f32::consts::LOG2_E;
use std::ops::Range;

use super::super::super::memory::Memory;
use super::super::attention::{
    BackwardInputs, KvHead, for_each_kv_head, for_each_kv_head_backward, score_scale,
};
use super::Avx512;
use super::vec::{
    STRIP, V512, exp2, load, microkernel, pack_lanes, pack_panels, pack_rows, padded_cols, store,
    to_bf16, to_bf16_pairs,
};
use crate::llama::ops::{Attention, AttentionBackward, AttentionShape};

/// Query rows that go together.
const TILE_ROWS: usize = 8;
/// Query rows whose p and ds are kept.
const BLOCK_ROWS: usize = 64;

/// True if a head fills at least half of a packed vector.
pub(super) fn supports(shape: &AttentionShape) -> bool {
    shape.head_dim >= 16
}

pub(super) fn forward(avx512: Avx512, o: &Attention, memory: &mut Memory<f32>) {
    let d = o.shape.head_dim;
    for_each_kv_head(o, memory, |head, out, lse| attend(avx512, head, d, out, lse));
}

pub(super) fn backward(avx512: Avx512, o: &AttentionBackward, memory: &mut Memory<f32>) {
    let d = o.shape.head_dim;
    for_each_kv_head_backward(o, memory, |head, inputs, dq, dk, dv| {
        attend_backward(avx512, head, inputs, d, dq, dk, dv);
    });
}

/// Rows `[rows, d]` as left operand: pairs of components, rows of 0 up to a whole tile.
struct Rows {
    packed: Vec<V512>,
    /// Pairs of a row.
    pitch: usize,
}

impl Rows {
    fn pack(avx512: Avx512, values: &[f32], d: usize) -> Self {
        let rows = (values.len() / d).next_multiple_of(TILE_ROWS);
        let mut packed = vec![V512::ZERO; rows * padded_cols(d) / 32];
        pack_rows(avx512, values, d, &mut packed);
        Self { packed, pitch: padded_cols(d) / 2 }
    }

    fn from(&self, row: usize) -> &[u32] {
        &bytemuck::cast_slice(&self.packed)[row * self.pitch..]
    }
}

/// Rows `[rows, d]` as right operand of a product over components: strips of 32 rows, a row per lane.
struct Lanes {
    packed: Vec<V512>,
    strip: usize,
}

impl Lanes {
    fn pack(avx512: Avx512, values: &[f32], d: usize) -> Self {
        let strip = padded_cols(d);
        let mut packed = vec![V512::ZERO; (values.len() / d).div_ceil(STRIP) * strip];
        pack_lanes(avx512, values, d, &mut packed);
        Self { packed, strip }
    }
}

/// Rows `[rows, d]` as right operand of a product over rows: panels of 32 components, pairs of rows.
struct Panels {
    packed: Vec<V512>,
    /// Pairs of rows, up to whole strips.
    pairs: usize,
}

impl Panels {
    fn pack(avx512: Avx512, values: &[f32], d: usize) -> Self {
        let pairs = (values.len() / d).next_multiple_of(STRIP) / 2;
        let mut packed = vec![V512::ZERO; padded_cols(d) / 16 * pairs];
        pack_panels(avx512, values, d, 0, pairs, &mut packed);
        Self { packed, pairs }
    }

    /// A panel's pairs from the one with this row on.
    fn from(&self, panel: usize, row: usize) -> &[V512] {
        &self.packed[2 * panel * self.pairs..][..2 * self.pairs][row / 2 * 2..]
    }
}

/// Eight positions of a query head, and the strips of keys that they see.
struct TileRows {
    first: usize,
    strips: Range<usize>,
    /// The keys that each row sees; none past the last row.
    seen: [(usize, usize); TILE_ROWS],
}

impl TileRows {
    fn new(head: &KvHead, first: usize) -> Self {
        let seq_len = head.first_key.len();
        let keys = |position: usize| head.keys(position * head.group);
        let rows = first..(first + TILE_ROWS).min(seq_len);
        let start = rows.clone().map(|position| keys(position).0).min().unwrap_or(0);
        let strips = start.min(rows.end - 1) / STRIP..rows.end.div_ceil(STRIP);
        let seen =
            std::array::from_fn(|r| if first + r < rows.end { keys(first + r) } else { (0, 0) });
        Self { first, strips, seen }
    }

    /// Vectors of 16 keys of a row of scores.
    fn vectors(&self) -> usize {
        2 * self.strips.len()
    }

    /// The keys of a vector that a row sees.
    fn mask(&self, row: usize, vector: usize) -> u16 {
        let first = STRIP * self.strips.start + 16 * vector;
        let below = |n: usize| ((1u32 << n.saturating_sub(first).min(16)) - 1) as u16;
        below(self.seen[row].1) & !below(self.seen[row].0)
    }
}

avx512!(
    /// `scores[r][n] = a[first + r] b[n]` for the keys of the rows' strips; a row's scores are `2 * strips` vectors.
    #[inline]
    fn products(a: &Rows, b: &Lanes, rows: &TileRows, scores: &mut [V512]) {
        let (a, pitch, vectors) = (a.from(rows.first), a.pitch, rows.vectors());
        for (at, strip) in rows.strips.clone().enumerate() {
            let b = &b.packed[strip * b.strip..][..b.strip];
            let mut tile = [[_mm512_setzero_ps(); 2]; TILE_ROWS];
            microkernel(&mut tile, (a, pitch, 1), (b, 2), b.len() / 2);
            for (r, tile) in tile.iter().enumerate() {
                scores[r * vectors + 2 * at].store(tile[0]);
                scores[r * vectors + 2 * at + 1].store(tile[1]);
            }
        }
    }

    /// A panel of the rows' sums over keys: weights `[8, keys]` in pairs, times rows of `b`.
    #[inline]
    fn weighted_sums(
        weights: &[V512],
        b: &Panels,
        panel: usize,
        rows: &TileRows,
    ) -> [[__m512; 2]; TILE_ROWS] {
        let pairs = 8 * rows.vectors();
        let mut tile = [[_mm512_setzero_ps(); 2]; TILE_ROWS];
        let b = b.from(panel, STRIP * rows.strips.start);
        microkernel(&mut tile, (bytemuck::cast_slice(weights), pairs, 1), (b, 2), pairs);
        tile
    }

    /// Exponentials of a row's scores relative to the largest, in bfloat16, 0 for keys that it does not see. The
    /// largest scaled score, and the sum of the exponentials: 0 if it sees nothing.
    #[inline]
    fn softmax(
        rows: &TileRows,
        row: usize,
        scale: f32,
        scores: &[V512],
        p: &mut [V512],
    ) -> (f32, f32) {
        let factor = _mm512_set1_ps(scale * LOG2_E);
        let lowest = _mm512_set1_ps(f32::NEG_INFINITY);
        let mut max = lowest;
        for (vector, scores) in scores.iter().enumerate() {
            let mask = rows.mask(row, vector);
            max = _mm512_max_ps(max, _mm512_mask_mov_ps(lowest, mask, scores.load()));
        }
        let max = _mm512_reduce_max_ps(max);
        let shift = _mm512_set1_ps(max * (scale * LOG2_E));
        let mut sums = [_mm512_setzero_ps(); 2];
        for (at, (scores, p)) in scores.chunks_exact(2).zip(p).enumerate() {
            let mut powers = [_mm512_setzero_ps(); 2];
            for half in 0..2 {
                let x = _mm512_fmsub_ps(scores[half].load(), factor, shift);
                powers[half] = _mm512_maskz_mov_ps(rows.mask(row, 2 * at + half), exp2(x));
                sums[half] = _mm512_add_ps(sums[half], powers[half]);
            }
            p.store(to_bf16(powers[0], powers[1]));
        }
        (max * scale, _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1])))
    }
);

avx512_entry!(
    fn attend(avx512: Avx512, head: &KvHead, d: usize, out: &mut [f32], lse: &mut [f32]) {
        let seq_len = head.first_key.len();
        let (keys, values) = (Lanes::pack(avx512, head.k, d), Panels::pack(avx512, head.v, d));
        let strips = seq_len.div_ceil(STRIP);
        let mut scores = vec![V512::ZERO; 2 * TILE_ROWS * strips];
        let mut p = vec![V512::ZERO; TILE_ROWS * strips];
        let heads = head.q.chunks(seq_len * d).zip(lse.chunks_mut(seq_len));
        for (query_head, (q, lse)) in heads.enumerate() {
            let q = Rows::pack(avx512, q, d);
            for first in (0..seq_len).step_by(TILE_ROWS) {
                let rows = TileRows::new(head, first);
                products(&q, &keys, &rows, &mut scores);
                let mut factors = [0.0; TILE_ROWS];
                let (vectors, strips) = (rows.vectors(), rows.strips.len());
                for (r, lse) in lse[first..].iter_mut().take(TILE_ROWS).enumerate() {
                    let (scores, p) = (&scores[r * vectors..][..vectors], &mut p[r * strips..]);
                    let (max, sum) = softmax(&rows, r, score_scale(d), scores, &mut p[..strips]);
                    let sees = rows.seen[r].0 < rows.seen[r].1;
                    *lse = if sees { max + sum.ln() } else { 0.0 };
                    factors[r] = if sees { 1.0 / sum } else { 0.0 };
                }
                for panel in 0..d.div_ceil(STRIP) {
                    let tile = weighted_sums(&p, &values, panel, &rows);
                    for (r, position) in (first..seq_len).take(TILE_ROWS).enumerate() {
                        let out = &mut out[(position * head.group + query_head) * d..][..d];
                        let factor = _mm512_set1_ps(factors[r]);
                        store_panel(
                            &mut out[panel * STRIP..],
                            [_mm512_mul_ps(tile[r][0], factor), _mm512_mul_ps(tile[r][1], factor)],
                        );
                    }
                }
            }
        }
    }

    fn attend_backward(
        avx512: Avx512,
        head: &KvHead,
        inputs: &BackwardInputs,
        d: usize,
        dq: &mut [f32],
        dk: &mut [f32],
        dv: &mut [f32],
    ) {
        let (seq_len, group) = (head.first_key.len(), head.group);
        let strips = seq_len.div_ceil(STRIP);
        let (keys, values) = (Lanes::pack(avx512, head.k, d), Lanes::pack(avx512, head.v, d));
        let key_panels = Panels::pack(avx512, head.k, d);
        let mut scores = vec![V512::ZERO; 2 * TILE_ROWS * strips];
        let mut dp = scores.clone();
        let mut ds = vec![V512::ZERO; TILE_ROWS * strips];
        let mut kept = [(); 2].map(|()| vec![V512::ZERO; BLOCK_ROWS * strips]);
        let mut dout = vec![0.0; seq_len * d];
        dk.fill(0.0);
        dv.fill(0.0);
        for (query_head, (q, dq)) in
            head.q.chunks(seq_len * d).zip(dq.chunks_mut(seq_len * d)).enumerate()
        {
            inputs.copy_dout_of(query_head, group, d, &mut dout);
            let [q_rows, dout_rows] = [q, &dout].map(|values| Rows::pack(avx512, values, d));
            let [q_panels, dout_panels] = [q, &dout].map(|values| Panels::pack(avx512, values, d));
            for block in (0..seq_len).step_by(BLOCK_ROWS) {
                let end = (block + BLOCK_ROWS).min(seq_len);
                let tiles =
                    || (block..end).step_by(TILE_ROWS).map(|first| TileRows::new(head, first));
                let start = tiles().map(|rows| rows.strips.start).min().unwrap_or(0);
                let width = 2 * (end.div_ceil(STRIP) - start);
                for rows in tiles() {
                    products(&q_rows, &keys, &rows, &mut scores);
                    products(&dout_rows, &values, &rows, &mut dp);
                    let (vectors, strips) = (rows.vectors(), rows.strips.len());
                    for r in (0..TILE_ROWS).step_by(2) {
                        let of = [r, r + 1].map(|r| (rows.first + r).min(seq_len - 1));
                        let lse = of.map(|position| inputs.lse[query_head * seq_len + position]);
                        let delta = of.map(|position| inputs.delta[position * group + query_head]);
                        let [p, ds_pairs] = &mut kept;
                        let row = rows.first - block + r;
                        let pair = row / 2 * width;
                        softmax_backward(
                            &rows,
                            r,
                            score_scale(d),
                            (lse, delta),
                            [&scores[r * vectors..], &dp[r * vectors..]],
                            [&mut p[pair..][..width], &mut ds_pairs[pair..][..width]],
                            &mut ds[r * strips..][..2 * strips],
                            2 * (rows.strips.start - start),
                        );
                    }
                    let factor = _mm512_set1_ps(score_scale(d));
                    for panel in 0..d.div_ceil(STRIP) {
                        let tile = weighted_sums(&ds, &key_panels, panel, &rows);
                        for (dq, tile) in dq[rows.first * d..].chunks_mut(d).zip(&tile) {
                            store_panel(
                                &mut dq[panel * STRIP..],
                                [_mm512_mul_ps(tile[0], factor), _mm512_mul_ps(tile[1], factor)],
                            );
                        }
                    }
                }
                let [p, ds_pairs] = &kept;
                let rows = (block, end);
                add_transposed(p, width, &dout_panels, rows, start * STRIP, d, dv);
                add_transposed(ds_pairs, width, &q_panels, rows, start * STRIP, d, dk);
            }
        }
        let factor = score_scale(d);
        for gradient in dk {
            *gradient *= factor;
        }
    }
);

avx512!(
    /// `p` and `ds / scale` of two rows, from scores and `dout vT`: as pairs of the two rows, from vector `from` on of
    /// all that the block sees and 0 before; and ds in pairs of keys. 0 for keys that a row does not see.
    #[inline]
    fn softmax_backward(
        rows: &TileRows,
        row: usize,
        scale: f32,
        (lse, delta): ([f32; 2], [f32; 2]),
        [scores, dp]: [&[V512]; 2],
        [p_pairs, ds_pairs]: [&mut [V512]; 2],
        ds: &mut [V512],
        from: usize,
    ) {
        let (vectors, strips) = (rows.vectors(), rows.strips.len());
        let factor = _mm512_set1_ps(scale * LOG2_E);
        let shifts = [_mm512_set1_ps(lse[0] * LOG2_E), _mm512_set1_ps(lse[1] * LOG2_E)];
        let deltas = [_mm512_set1_ps(delta[0]), _mm512_set1_ps(delta[1])];
        p_pairs[..from].fill(V512::ZERO);
        ds_pairs[..from].fill(V512::ZERO);
        for strip in 0..strips {
            let mut halves = [[_mm512_setzero_ps(); 2]; 2];
            for half in 0..2 {
                let vector = 2 * strip + half;
                let mut p = [_mm512_setzero_ps(); 2];
                for r in 0..2 {
                    let at = r * vectors + vector;
                    let x = _mm512_fmsub_ps(scores[at].load(), factor, shifts[r]);
                    let mask = rows.mask(row + r, vector);
                    p[r] = _mm512_maskz_mov_ps(mask, exp2(x));
                    let slope = _mm512_sub_ps(dp[at].load(), deltas[r]);
                    halves[r][half] = _mm512_maskz_mov_ps(mask, _mm512_mul_ps(p[r], slope));
                }
                p_pairs[from + vector].store(to_bf16_pairs(p[0], p[1]));
                ds_pairs[from + vector].store(to_bf16_pairs(halves[0][half], halves[1][half]));
            }
            for r in 0..2 {
                ds[r * strips + strip].store(to_bf16(halves[r][0], halves[r][1]));
            }
        }
    }

    /// `out[key] += sum over the block's rows of weights[row][key] b[row]`, weights in pairs of rows, from the
    /// key `first` on. A row sees no key after its own position.
    #[inline]
    fn add_transposed(
        weights: &[V512],
        width: usize,
        b: &Panels,
        (block, end): (usize, usize),
        first: usize,
        d: usize,
        out: &mut [f32],
    ) {
        let weights: &[u32] = bytemuck::cast_slice(weights);
        for (at, out) in out[first * d..].chunks_mut(TILE_ROWS * d).enumerate() {
            let key = first + at * TILE_ROWS;
            if key >= end {
                break;
            }
            // Pairs before see none of these keys.
            let row = block.max(key);
            let pairs = (end - row).div_ceil(2);
            let weights = &weights[(row - block) / 2 * 16 * width + at * TILE_ROWS..];
            for panel in 0..d.div_ceil(STRIP) {
                let mut tile = [[_mm512_setzero_ps(); 2]; TILE_ROWS];
                for (tile, out) in tile.iter_mut().zip(out.chunks(d)) {
                    let out = &out[panel * STRIP..];
                    *tile = [load(out), load(&out[16.min(out.len())..])];
                }
                microkernel(&mut tile, (weights, 1, 16 * width), (b.from(panel, row), 2), pairs);
                for (tile, out) in tile.iter().zip(out.chunks_mut(d)) {
                    store_panel(&mut out[panel * STRIP..], *tile);
                }
            }
        }
    }

    /// Stores 32 values, or as many as there are.
    #[inline]
    fn store_panel(out: &mut [f32], values: [__m512; 2]) {
        let split = 16.min(out.len());
        let (low, high) = out.split_at_mut(split);
        store(low, values[0]);
        store(high, values[1]);
    }
);
