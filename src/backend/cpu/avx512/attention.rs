//! Attention in f32 for heads of 2, 4, 6 or 8 components, where the exponentials are most of the work.
//!
//! A task is one KV head of one sequence with the query heads that share it (GQA). Keys and values are
//! transposed, so that a vector holds one component of 16 keys. Four query rows go together in a register
//! tile. If no score can be large, which the longest query and the longest key tell, softmax needs no maximum,
//! and scores, exponentials and both sums are one pass in registers; else a pass for the maxima comes first.

// Several arrays go by one index.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::{
    __m512, _mm512_add_ps, _mm512_castpd_ps, _mm512_castps_pd, _mm512_fmadd_ps, _mm512_fmsub_ps,
    _mm512_mask_mov_ps, _mm512_maskz_mov_ps, _mm512_max_ps, _mm512_mul_ps, _mm512_reduce_max_ps,
    _mm512_set1_ps, _mm512_setzero_ps, _mm512_shuffle_f32x4, _mm512_unpackhi_pd,
    _mm512_unpackhi_ps, _mm512_unpacklo_pd, _mm512_unpacklo_ps,
};
use std::f32::consts::{LN_2, LOG2_E};

use super::super::super::memory::Memory;
use super::super::attention::{self, BackwardInputs, KvHead, score_scale};
use super::Avx512;
use super::vec::{V512, exp2};
use crate::llama::ops::{Attention, AttentionBackward, AttentionShape};

/// Query rows of a register tile.
const TILE_ROWS: usize = 4;
/// Bound on log2 scores under which softmax needs no maximum: neither a power nor the sum over a sequence
/// overflows or underflows f32.
const SAFE_SCORE: f32 = 60.0;

/// True if these kernels support the head_dim.
pub(super) fn supports(shape: &AttentionShape) -> bool {
    matches!(shape.head_dim, 2 | 4 | 6 | 8)
}

pub(super) fn forward(avx512: Avx512, o: &Attention, memory: &mut Memory<f32>) {
    let attend = match o.shape.head_dim {
        2 => attend::<2>,
        4 => attend::<4>,
        6 => attend::<6>,
        _ => attend::<8>,
    };
    attention::for_each_kv_head(o, memory, |head, out, lse| attend(avx512, head, out, lse));
}

pub(super) fn backward(avx512: Avx512, o: &AttentionBackward, memory: &mut Memory<f32>) {
    let attend = match o.shape.head_dim {
        2 => attend_backward::<2>,
        4 => attend_backward::<4>,
        6 => attend_backward::<6>,
        _ => attend_backward::<8>,
    };
    attention::for_each_kv_head_backward(o, memory, |head, inputs, dq, dk, dv| {
        attend(avx512, head, inputs, dq, dk, dv);
    });
}

impl KvHead<'_> {
    fn query<const D: usize>(&self, row: usize) -> [f32; D] {
        let q = &self.q[self.place(row) * D..][..D];
        std::array::from_fn(|c| q[c])
    }

    /// The register tile's rows from `row` on. Rows past the last repeat it.
    fn group_of(&self, row: usize) -> RowGroup {
        let rows = std::array::from_fn(|r| (row + r).min(self.rows() - 1));
        let seen = rows.map(|row| self.keys(row));
        let start = seen.iter().map(|s| s.0).min().unwrap_or(0) / 16;
        let end = seen.iter().map(|s| s.1).max().unwrap_or(0).div_ceil(16);
        let whole_start = seen.iter().map(|s| s.0).max().unwrap_or(0).div_ceil(16);
        let whole_end = (seen.iter().map(|s| s.1).min().unwrap_or(0) / 16).max(start);
        RowGroup { rows, seen, start, end, whole: (whole_start.min(whole_end), whole_end) }
    }
}

/// The rows of a register tile, and the chunks of 16 keys that they see.
struct RowGroup {
    rows: [usize; TILE_ROWS],
    seen: [(usize, usize); TILE_ROWS],
    /// Chunks with a key that some row sees are `start..end`; all rows see those of `whole` entirely.
    start: usize,
    end: usize,
    whole: (usize, usize),
}

impl RowGroup {
    /// The keys of a chunk that each row sees.
    fn masks(&self, chunk: usize) -> [u16; TILE_ROWS] {
        let below = |n: usize| ((1u32 << n.saturating_sub(16 * chunk).min(16)) - 1) as u16;
        self.seen.map(|(start, end)| below(end) & !below(start))
    }
}

/// `[keys, D]` to `[D, keys]` in whole vectors, zero beyond the last key.
fn transposed<const D: usize>(rows: &[f32]) -> Vec<V512> {
    let vectors = (rows.len() / D).div_ceil(16);
    let mut out = vec![V512::ZERO; D * vectors];
    attention::transpose(rows, D, 16 * vectors, bytemuck::cast_slice_mut(&mut out));
    out
}

fn untranspose<const D: usize>(transposed: &[V512], rows: &mut [f32]) {
    let vectors = transposed.len() / D;
    for (key, row) in rows.chunks_exact_mut(D).enumerate() {
        for (c, value) in row.iter_mut().enumerate() {
            *value = transposed[c * vectors + key / 16].floats()[key % 16];
        }
    }
}

/// The largest Euclidean norm of the rows of `D`.
fn max_norm<const D: usize>(rows: &[f32]) -> f32 {
    let square = |row: &[f32]| row.iter().map(|x| x * x).sum::<f32>();
    rows.chunks_exact(D).map(square).fold(0.0, f32::max).sqrt()
}

/// `log2 e / sqrt(d)`, which makes `exp2(scaled score)` the softmax numerator.
fn log2_scale(d: usize) -> f32 {
    (std::f64::consts::LOG2_E / (d as f64).sqrt()) as f32
}

avx512_entry!(
    fn attend<const D: usize>(avx512: Avx512, head: &KvHead, out: &mut [f32], lse: &mut [f32]) {
        let (keys, values) = (transposed::<D>(head.k), transposed::<D>(head.v));
        let vectors = keys.len() / D;
        let keys: [&[V512]; D] = std::array::from_fn(|c| &keys[c * vectors..][..vectors]);
        let values: [&[V512]; D] = std::array::from_fn(|c| &values[c * vectors..][..vectors]);
        let scale = log2_scale(D);
        // Maxima forget NaN, which gives NaN on either path.
        let small = max_norm::<D>(head.q) * max_norm::<D>(head.k) * scale <= SAFE_SCORE;
        for row in (0..head.rows()).step_by(TILE_ROWS) {
            let group = head.group_of(row);
            let mut q = [[_mm512_setzero_ps(); D]; TILE_ROWS];
            for (q, &row) in q.iter_mut().zip(&group.rows) {
                for (q, value) in q.iter_mut().zip(head.query::<D>(row)) {
                    *q = _mm512_set1_ps(value * scale);
                }
            }
            let shifts = if small { [0.0; TILE_ROWS] } else { row_maxima(&q, &keys, &group) };
            let mut tile = ForwardTile::<D>::new(&shifts);
            for chunk in group.start..group.whole.0 {
                tile.add::<true>(&q, &keys, &values, chunk, &group);
            }
            for chunk in group.whole.0..group.whole.1 {
                tile.add::<false>(&q, &keys, &values, chunk, &group);
            }
            for chunk in group.whole.1..group.end {
                tile.add::<true>(&q, &keys, &values, chunk, &group);
            }
            let mut flat = [_mm512_setzero_ps(); 48];
            for r in 0..TILE_ROWS {
                flat[r] = tile.sum[r];
                flat[TILE_ROWS + r * D..][..D].copy_from_slice(&tile.out[r]);
            }
            let totals = lane_sums(&flat, TILE_ROWS * (1 + D));
            for r in 0..TILE_ROWS.min(head.rows() - row) {
                let sum = totals[r];
                let sees = group.seen[r].0 < group.seen[r].1;
                let scale = if sees { 1.0 / sum } else { 0.0 };
                lse[head.place(row + r)] = if sees { shifts[r] * LN_2 + sum.ln() } else { 0.0 };
                let out = &mut out[(row + r) * D..][..D];
                for (out, total) in out.iter_mut().zip(&totals[TILE_ROWS + r * D..]) {
                    *out = total * scale;
                }
            }
        }
    }
);

avx512!(
    /// `dot(q, keys) - shift` for 16 keys.
    #[inline]
    fn score<const D: usize>(q: &[__m512; D], keys: &[__m512; D], shift: __m512) -> __m512 {
        let mut score = _mm512_fmsub_ps(q[0], keys[0], shift);
        for c in 1..D {
            score = _mm512_fmadd_ps(q[c], keys[c], score);
        }
        score
    }

    /// All components of a chunk of 16 keys or values.
    #[inline]
    fn load_chunk<const D: usize>(transposed: &[&[V512]; D], chunk: usize) -> [__m512; D] {
        let mut vectors = [_mm512_setzero_ps(); D];
        for (vector, transposed) in vectors.iter_mut().zip(transposed) {
            *vector = transposed[chunk].load();
        }
        vectors
    }

    /// The largest score of each row; 0 for one that sees nothing.
    fn row_maxima<const D: usize>(
        q: &[[__m512; D]; TILE_ROWS],
        keys: &[&[V512]; D],
        group: &RowGroup,
    ) -> [f32; TILE_ROWS] {
        let hidden = _mm512_set1_ps(f32::NEG_INFINITY);
        let mut max = [hidden; TILE_ROWS];
        for chunk in group.start..group.end {
            let keys = load_chunk(keys, chunk);
            for ((max, q), mask) in max.iter_mut().zip(q).zip(group.masks(chunk)) {
                let score = score(q, &keys, _mm512_setzero_ps());
                *max = _mm512_max_ps(*max, _mm512_mask_mov_ps(hidden, mask, score));
            }
        }
        let mut maxima = [0.0; TILE_ROWS];
        for (row_max, max) in maxima.iter_mut().zip(max) {
            let max = _mm512_reduce_max_ps(max);
            *row_max = if max == f32::NEG_INFINITY { 0.0 } else { max };
        }
        maxima
    }
);

/// Register tile of the forward: the sums over keys, a lane being every 16th key.
struct ForwardTile<const D: usize> {
    shift: [__m512; TILE_ROWS],
    sum: [__m512; TILE_ROWS],
    out: [[__m512; D]; TILE_ROWS],
}

impl<const D: usize> ForwardTile<D> {
    avx512!(
        #[inline]
        fn new(shifts: &[f32; TILE_ROWS]) -> Self {
            let zero = _mm512_setzero_ps();
            let mut shift = [zero; TILE_ROWS];
            for (shift, &value) in shift.iter_mut().zip(shifts) {
                *shift = _mm512_set1_ps(value);
            }
            Self { shift, sum: [zero; TILE_ROWS], out: [[zero; D]; TILE_ROWS] }
        }

        #[inline]
        fn add<const MASKED: bool>(
            &mut self,
            q: &[[__m512; D]; TILE_ROWS],
            keys: &[&[V512]; D],
            values: &[&[V512]; D],
            chunk: usize,
            group: &RowGroup,
        ) {
            let (keys, values) = (load_chunk(keys, chunk), load_chunk(values, chunk));
            let masks = if MASKED { group.masks(chunk) } else { [0; TILE_ROWS] };
            for r in 0..TILE_ROWS {
                let mut p = exp2(score(&q[r], &keys, self.shift[r]));
                if MASKED {
                    p = _mm512_maskz_mov_ps(masks[r], p);
                }
                self.sum[r] = _mm512_add_ps(self.sum[r], p);
                for c in 0..D {
                    self.out[r][c] = _mm512_fmadd_ps(p, values[c], self.out[r][c]);
                }
            }
        }
    );
}

avx512_entry!(
    fn attend_backward<const D: usize>(
        avx512: Avx512,
        head: &KvHead,
        inputs: &BackwardInputs,
        dq: &mut [f32],
        dk: &mut [f32],
        dv: &mut [f32],
    ) {
        let (keys, values) = (transposed::<D>(head.k), transposed::<D>(head.v));
        let vectors = keys.len() / D;
        let keys: [&[V512]; D] = std::array::from_fn(|c| &keys[c * vectors..][..vectors]);
        let values: [&[V512]; D] = std::array::from_fn(|c| &values[c * vectors..][..vectors]);
        // `[vectors, D]` of dk, and of dv.
        let mut sums = vec![[[V512::ZERO; D]; 2]; vectors];
        let scale = score_scale(D);
        for row in (0..head.rows()).step_by(TILE_ROWS) {
            let group = head.group_of(row);
            let mut tile = BackwardTile::<D>::new();
            for r in 0..TILE_ROWS {
                let from = group.rows[r];
                let exists = row + r < head.rows();
                for (c, q) in head.query::<D>(from).into_iter().enumerate() {
                    tile.q[r][c] = _mm512_set1_ps(q * log2_scale(D));
                    // A repeated row adds nothing.
                    tile.scaled_q[r][c] = _mm512_set1_ps(if exists { q * scale } else { 0.0 });
                    let dout = if exists { inputs.dout[from * D + c] } else { 0.0 };
                    tile.dout[r][c] = _mm512_set1_ps(dout);
                }
                tile.lse[r] = _mm512_set1_ps(inputs.lse[head.place(from)] * LOG2_E);
                tile.delta[r] = _mm512_set1_ps(inputs.delta[from]);
            }
            // Three loops: one with both kinds in it spills registers and takes a third longer.
            for chunk in group.start..group.whole.0 {
                tile.add::<true>(&keys, &values, chunk, &group, &mut sums[chunk]);
            }
            for chunk in group.whole.0..group.whole.1 {
                tile.add::<false>(&keys, &values, chunk, &group, &mut sums[chunk]);
            }
            for chunk in group.whole.1..group.end {
                tile.add::<true>(&keys, &values, chunk, &group, &mut sums[chunk]);
            }
            let mut flat = [_mm512_setzero_ps(); 48];
            flat[..TILE_ROWS * D].copy_from_slice(tile.dq.as_flattened());
            let totals = lane_sums(&flat, TILE_ROWS * D);
            for r in 0..TILE_ROWS.min(head.rows() - row) {
                let dq = &mut dq[head.place(row + r) * D..][..D];
                for (dq, total) in dq.iter_mut().zip(&totals[r * D..]) {
                    *dq = total * scale;
                }
            }
        }
        for (which, out) in [dk, dv].into_iter().enumerate() {
            let transposed: Vec<V512> =
                (0..D).flat_map(|c| sums.iter().map(move |sums| sums[which][c])).collect();
            untranspose::<D>(&transposed, out);
        }
    }
);

/// Register tile of the backward.
struct BackwardTile<const D: usize> {
    /// Times log2 e / sqrt(D).
    q: [[__m512; D]; TILE_ROWS],
    /// Times 1 / sqrt(D).
    scaled_q: [[__m512; D]; TILE_ROWS],
    dout: [[__m512; D]; TILE_ROWS],
    /// Times log2 e.
    lse: [__m512; TILE_ROWS],
    delta: [__m512; TILE_ROWS],
    dq: [[__m512; D]; TILE_ROWS],
}

impl<const D: usize> BackwardTile<D> {
    avx512!(
        #[inline]
        fn new() -> Self {
            let (zero, zeros) =
                ([_mm512_setzero_ps(); TILE_ROWS], [[_mm512_setzero_ps(); D]; TILE_ROWS]);
            Self { q: zeros, scaled_q: zeros, dout: zeros, lse: zero, delta: zero, dq: zeros }
        }

        #[inline]
        fn add<const MASKED: bool>(
            &mut self,
            keys: &[&[V512]; D],
            values: &[&[V512]; D],
            chunk: usize,
            group: &RowGroup,
            [dk_sums, dv_sums]: &mut [[V512; D]; 2],
        ) {
            let (keys, values) = (load_chunk(keys, chunk), load_chunk(values, chunk));
            let masks = if MASKED { group.masks(chunk) } else { [0; TILE_ROWS] };
            let (mut dk, mut dv) = ([_mm512_setzero_ps(); D], [_mm512_setzero_ps(); D]);
            for c in 0..D {
                dk[c] = dk_sums[c].load();
                dv[c] = dv_sums[c].load();
            }
            for r in 0..TILE_ROWS {
                let mut p = exp2(score(&self.q[r], &keys, self.lse[r]));
                if MASKED {
                    p = _mm512_maskz_mov_ps(masks[r], p);
                }
                let ds = _mm512_mul_ps(p, score(&self.dout[r], &values, self.delta[r]));
                for c in 0..D {
                    dv[c] = _mm512_fmadd_ps(p, self.dout[r][c], dv[c]);
                    dk[c] = _mm512_fmadd_ps(ds, self.scaled_q[r][c], dk[c]);
                    self.dq[r][c] = _mm512_fmadd_ps(ds, keys[c], self.dq[r][c]);
                }
            }
            for c in 0..D {
                dk_sums[c].store(dk[c]);
                dv_sums[c].store(dv[c]);
            }
        }
    );
}

avx512!(
    /// The sum of the lanes of each of the first `count` vectors.
    #[inline]
    fn lane_sums(vectors: &[__m512; 48], count: usize) -> [f32; 48] {
        let mut sums = [0.0; 48];
        for (vectors, sums) in vectors
            .as_chunks::<16>()
            .0
            .iter()
            .zip(sums.as_chunks_mut::<16>().0)
            .take(count.div_ceil(16))
        {
            let mut vector = V512::ZERO;
            vector.store(lane_sums_16(vectors));
            *sums = *vector.floats();
        }
        sums
    }

    /// The sums of the lanes of 16 vectors: lane `i` is that of vector `i`.
    #[inline]
    fn lane_sums_16(v: &[__m512; 16]) -> __m512 {
        let mut fours = [_mm512_setzero_ps(); 4];
        for (i, four) in fours.iter_mut().enumerate() {
            // Each quarter of a vector to one sum: of v[4 i], v[4 i + 1], ... in its four lanes.
            let [a, b, c, d] = [v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]];
            let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
            let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
            let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
            let low = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
            let high = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
            *four = _mm512_add_ps(low, high);
        }
        let [a, b, c, d] = fours;
        add_quarters(add_quarters(a, b), add_quarters(c, d))
    }

    /// Even quarters plus odd ones: the two sums of `a`, then those of `b`.
    #[inline]
    fn add_quarters(a: __m512, b: __m512) -> __m512 {
        _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b))
    }
);
