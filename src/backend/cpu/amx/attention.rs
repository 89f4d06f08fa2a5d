//! Attention by tiles, for head_dim from 16 on: 128 query rows at a time, whose scores are a matmul.
//!
//! Operands of the matmuls are rounded to bfloat16: q, k, v, dout, the unnormalized p of the forward, and p and ds of
//! the backward. Scores, softmax and sums are f32. A block's scores, 128 x `seq_len`, stay in a core's cache.

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};

use super::super::super::memory::Memory;
use super::super::attention::{
    BackwardInputs, KvHead, for_each_kv_head, for_each_kv_head_backward, score_scale,
};
use super::super::matmul::{Gemm, MatmulThreads, MatrixView};
use super::super::simd::exp;
use super::TileUnit;
use crate::llama::ops::{Attention, AttentionBackward, AttentionShape};

/// Query rows of a block.
const QUERY_ROWS: usize = 128;

/// True if a head fills at least half of a tile's rows.
pub(in super::super) fn supports(shape: &AttentionShape) -> bool {
    shape.head_dim >= 16
}

/// Consecutive positions of one query head, and the keys that they see.
struct QueryBlock {
    positions: Range<usize>,
    /// From the first that one of them sees to the end of the last one's.
    keys: Range<usize>,
    /// What each sees, from `keys.start` on.
    visible: Vec<Range<usize>>,
}

impl QueryBlock {
    fn all(head: &KvHead) -> Vec<Self> {
        let seq_len = head.first_key.len();
        let block = |from: usize| {
            let positions = from..(from + QUERY_ROWS).min(seq_len);
            let seen = |position: usize| head.keys(position * head.group);
            let first = positions.clone().map(|position| seen(position).0).min().unwrap_or(0);
            // At least one key, so that rows that see nothing are written too.
            let start = first.min(positions.end - 1);
            let visible = positions.clone().map(seen).map(|(from, to)| from - start..to - start);
            QueryBlock { keys: start..positions.end, visible: visible.collect(), positions }
        };
        (0..seq_len).step_by(QUERY_ROWS).map(block).collect()
    }

    fn rows(&self) -> usize {
        self.positions.len()
    }

    fn scores(&self) -> usize {
        self.rows() * self.keys.len()
    }

    /// The block's rows of `[seq_len, d]`.
    fn rows_of<'a>(&self, values: &'a [f32], d: usize) -> MatrixView<'a> {
        MatrixView::new(&values[self.positions.start * d..self.positions.end * d], self.rows(), d)
    }

    /// The block's keys of `[seq_len, d]`.
    fn keys_of<'a>(&self, values: &'a [f32], d: usize) -> MatrixView<'a> {
        MatrixView::new(&values[self.keys.start * d..self.keys.end * d], self.keys.len(), d)
    }
}

fn matmul(unit: TileUnit, out: &mut [f32], accumulate: bool, a: MatrixView, b: MatrixView) {
    Gemm::Bf16(unit).matmul(out, accumulate, a, b, MatmulThreads::One);
}

pub(in super::super) fn forward(
    unit: TileUnit,
    arch: Arch,
    o: &Attention,
    memory: &mut Memory<f32>,
) {
    let d = o.shape.head_dim;
    for_each_kv_head(o, memory, |head, out, lse| attend(unit, arch, head, d, out, lse));
}

fn attend(unit: TileUnit, arch: Arch, head: &KvHead, d: usize, out: &mut [f32], lse: &mut [f32]) {
    let seq_len = head.first_key.len();
    let rows = QUERY_ROWS.min(seq_len);
    let (mut scores, mut sums) = (vec![0.0; rows * seq_len], vec![0.0; rows * d]);
    for block in &QueryBlock::all(head) {
        let (p, sums) = (&mut scores[..block.scores()], &mut sums[..block.rows() * d]);
        for (query_head, (q, lse)) in
            head.q.chunks(seq_len * d).zip(lse.chunks_mut(seq_len)).enumerate()
        {
            matmul(unit, p, false, block.rows_of(q, d), block.keys_of(head.k, d).transposed());
            let normalizers =
                arch.dispatch(MaskedSoftmax { block, scale: score_scale(d), scores: p });
            let p = MatrixView::new(p, block.rows(), block.keys.len());
            matmul(unit, sums, false, p, block.keys_of(head.v, d));
            for ((position, (max, sum)), sums) in
                block.positions.clone().zip(normalizers).zip(sums.chunks(d))
            {
                let sees = !block.visible[position - block.positions.start].is_empty();
                lse[position] = if sees { max + sum.ln() } else { 0.0 };
                let factor = if sees { 1.0 / sum } else { 0.0 };
                let out = &mut out[(position * head.group + query_head) * d..][..d];
                for (out, sum) in out.iter_mut().zip(sums) {
                    *out = sum * factor;
                }
            }
        }
    }
}

pub(in super::super) fn backward(
    unit: TileUnit,
    arch: Arch,
    o: &AttentionBackward,
    memory: &mut Memory<f32>,
) {
    let d = o.shape.head_dim;
    for_each_kv_head_backward(o, memory, |head, inputs, dq, dk, dv| {
        attend_backward(unit, arch, head, inputs, d, dq, dk, dv);
    });
}

fn attend_backward(
    unit: TileUnit,
    arch: Arch,
    head: &KvHead,
    inputs: &BackwardInputs,
    d: usize,
    dq: &mut [f32],
    dk: &mut [f32],
    dv: &mut [f32],
) {
    let (seq_len, group) = (head.first_key.len(), head.group);
    let scores = QUERY_ROWS.min(seq_len) * seq_len;
    let (mut p, mut ds) = (vec![0.0; scores], vec![0.0; scores]);
    let (mut dout, mut delta) = (vec![0.0; seq_len * d], vec![0.0; seq_len]);
    for gradients in [&mut *dq, &mut *dk, &mut *dv] {
        gradients.fill(0.0);
    }
    let blocks = QueryBlock::all(head);
    for (query_head, (q, dq)) in
        head.q.chunks(seq_len * d).zip(dq.chunks_mut(seq_len * d)).enumerate()
    {
        let lse = &inputs.lse[query_head * seq_len..][..seq_len];
        inputs.copy_dout_of(query_head, group, d, &mut dout);
        for (delta, group) in delta.iter_mut().zip(inputs.delta.chunks(group)) {
            *delta = group[query_head];
        }
        for block in &blocks {
            let (p, ds) = (&mut p[..block.scores()], &mut ds[..block.scores()]);
            let (q, k, v) =
                (block.rows_of(q, d), block.keys_of(head.k, d), block.keys_of(head.v, d));
            let dout = block.rows_of(&dout, d);
            matmul(unit, p, false, q, k.transposed());
            matmul(unit, ds, false, dout, v.transposed());
            let (lse, delta) = (&lse[block.positions.clone()], &delta[block.positions.clone()]);
            arch.dispatch(MaskedSoftmaxBackward {
                block,
                scale: score_scale(d),
                lse,
                delta,
                p,
                ds,
            });
            let [p, ds] = [&*p, &*ds].map(|x| MatrixView::new(x, block.rows(), block.keys.len()));
            let keys = block.keys.start * d..block.keys.end * d;
            matmul(unit, &mut dv[keys.clone()], true, p.transposed(), dout);
            matmul(unit, &mut dk[keys], true, ds.transposed(), q);
            let rows = block.positions.start * d..block.positions.end * d;
            matmul(unit, &mut dq[rows], false, ds, k);
        }
    }
    for gradient in dq.iter_mut().chain(dk) {
        *gradient *= score_scale(d);
    }
}

/// Turns a block's scores into exponentials relative to each row's largest, 0 for keys that it does not see. Returns
/// each row's largest scaled score, and the sum of its exponentials: 0 if it sees nothing.
struct MaskedSoftmax<'a> {
    block: &'a QueryBlock,
    scale: f32,
    scores: &'a mut [f32],
}

impl WithSimd for MaskedSoftmax<'_> {
    type Output = Vec<(f32, f32)>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) -> Vec<(f32, f32)> {
        let Self { block, scale, scores } = self;
        let mut normalizers = Vec::with_capacity(block.rows());
        for (row, visible) in scores.chunks_mut(block.keys.len()).zip(&block.visible) {
            let (lanes, rest) = S::as_mut_simd_f32s(visible_part(row, visible));
            let mut max = s.splat_f32s(f32::NEG_INFINITY);
            for &mut x in &mut *lanes {
                max = s.max_f32s(max, x);
            }
            let mut max = s.reduce_max_f32s(max);
            for &mut x in &mut *rest {
                max = max.max(x);
            }
            let (shift, factor) = (s.splat_f32s(max), s.splat_f32s(scale));
            let mut sum = s.splat_f32s(0.0);
            for x in lanes {
                *x = exp(s, s.mul_f32s(s.sub_f32s(*x, shift), factor));
                sum = s.add_f32s(sum, *x);
            }
            let last = exp(s, s.mul_f32s(s.sub_f32s(s.partial_load_f32s(rest), shift), factor));
            s.partial_store_f32s(rest, last);
            // Loaded again: 0 in the lanes beyond the end.
            sum = s.add_f32s(sum, s.partial_load_f32s(rest));
            normalizers.push((max * scale, s.reduce_sum_f32s(sum)));
        }
        normalizers
    }
}

/// Turns a block's scores into p, and `dout vT` into ds before its factor 1 / sqrt(d). Both are 0 for keys that a
/// row does not see.
struct MaskedSoftmaxBackward<'a> {
    block: &'a QueryBlock,
    scale: f32,
    lse: &'a [f32],
    delta: &'a [f32],
    p: &'a mut [f32],
    ds: &'a mut [f32],
}

impl WithSimd for MaskedSoftmaxBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let Self { block, scale, lse, delta, p, ds } = self;
        let (width, scale) = (block.keys.len(), s.splat_f32s(scale));
        let rows = p.chunks_mut(width).zip(ds.chunks_mut(width)).zip(&block.visible);
        for (((p, ds), visible), (&lse, &delta)) in rows.zip(lse.iter().zip(delta)) {
            let (p, p_rest) = S::as_mut_simd_f32s(visible_part(p, visible));
            let (ds, ds_rest) = S::as_mut_simd_f32s(visible_part(ds, visible));
            let (lse, delta) = (s.splat_f32s(lse), s.splat_f32s(delta));
            for (p, ds) in p.iter_mut().zip(ds) {
                *p = exp(s, s.sub_f32s(s.mul_f32s(*p, scale), lse));
                *ds = s.mul_f32s(*p, s.sub_f32s(*ds, delta));
            }
            let last = s.partial_load_f32s(p_rest);
            let last = exp(s, s.sub_f32s(s.mul_f32s(last, scale), lse));
            s.partial_store_f32s(p_rest, last);
            let last = s.mul_f32s(last, s.sub_f32s(s.partial_load_f32s(ds_rest), delta));
            s.partial_store_f32s(ds_rest, last);
        }
    }
}

/// The part of a row that is visible. The rest becomes 0.
#[inline(always)]
fn visible_part<'a>(row: &'a mut [f32], visible: &Range<usize>) -> &'a mut [f32] {
    row[..visible.start].fill(0.0);
    row[visible.end..].fill(0.0);
    &mut row[visible.clone()]
}
