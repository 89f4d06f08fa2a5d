//! The cases of every operation: odd, small and usual shapes, with inputs. They drive `laam check`,
//! `laam bench kernels`, `cargo bench` and the tests and mutants of the kernels.

use std::f64::consts::LN_2;
use std::ops::Range;
use std::sync::Arc;

use super::draw::Draw;
use crate::backend::reference::Reference;
use crate::backend::{Arena, Backend, Inputs, SessionSpec};
use crate::dtype::Dtype;
use crate::llama::newton_schulz;
use crate::llama::ops::{
    AdamWStep, AddGradients, Attention, AttentionBackward, AttentionDecode, AttentionShape,
    Embedding, EmbeddingBackward, FusedLinearCrossEntropy, GatherRows, GradNorm, Linear,
    LinearBackwardInput, LinearBackwardWeight, MuonStep, NormRuns, ReduceGradients, ResidualAdd,
    RmsNorm, RmsNormBackward, RmsNormBackwardWeight, Rope, RopeBackward, SaveGradients, SwiGlu,
    SwiGluBackward, ZeroGrad, norm_partials,
};
use crate::llama::slices::{Shards, SumOrder};
use crate::llama::{
    AdamW, Buffer, BufferKind, BufferRole, Op, Optimizer, Program, StepHyperparams,
};
use crate::model::{Layout, ParamKind, Parameter, Span};
use crate::tokens::IGNORE;

/// A set of shapes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// Minutes in the simulator: enough for every tail and every branch.
    Small,
    /// Those and the shapes of models: seconds on a GPU, minutes for the reference in f64.
    Full,
    /// To be timed on a CPU: one sequence of 512 tokens of the original model.
    Sequence,
    /// To be timed on a GPU: that, the original model's batch of 32,768 tokens, and models of 124M
    /// and 1.5B parameters.
    Timed,
}

impl Size {
    fn shapes<T, const A: usize, const B: usize, const C: usize, const D: usize>(
        self,
        small: [T; A],
        full: [T; B],
        sequence: [T; C],
        timed: [T; D],
    ) -> Vec<T> {
        match self {
            Size::Small => small.into(),
            Size::Full => small.into_iter().chain(full).collect(),
            Size::Sequence => sequence.into(),
            Size::Timed => sequence.into_iter().chain(timed).collect(),
        }
    }

    /// Nothing is computed for comparison.
    fn is_timed(self) -> bool {
        matches!(self, Size::Sequence | Size::Timed)
    }
}

/// One operation, its inputs and its outputs.
#[derive(Clone)]
pub struct Case {
    /// The name of the operation.
    pub operation: &'static str,
    /// Shape, in words.
    pub shape: String,
    pub(in crate::bench) layout: Layout,
    pub(in crate::bench) spec: SessionSpec,
    pub(in crate::bench) program: Program,
    pub(in crate::bench) floats: Vec<(Buffer, Vec<f32>)>,
    pub(in crate::bench) indices: Vec<(Buffer, Vec<u32>)>,
    pub(in crate::bench) arenas: Vec<(Arena, Vec<f32>)>,
    pub(in crate::bench) outputs: Vec<Output>,
    /// No few elements make most of an output's error.
    pub(in crate::bench) errors_average: bool,
    pub(in crate::bench) hyperparams: StepHyperparams,
}

#[derive(Clone)]
pub(in crate::bench) enum Output {
    Floats(Buffer),
    /// Logarithms of what is computed.
    Logarithms(Buffer),
    Indices(Buffer),
    Arena(Arena, Range<usize>),
}

type Make = fn(&mut Vec<Case>, &mut Draw, Size, Dtype);

const MAKERS: [(&str, Make); 22] = [
    ("embedding", embedding),
    ("embedding_backward", embedding_backward),
    ("rms_norm", rms_norm),
    ("rms_norm_backward", rms_norm_backward),
    ("linear", linear),
    ("linear_backward_input", linear_backward_input),
    ("linear_backward_weight", linear_backward_weight),
    ("rope", rope),
    ("rope_backward", rope_backward),
    ("attention", attention),
    ("attention_backward", attention_backward),
    ("attention_decode", attention_decode),
    ("swiglu", swiglu),
    ("swiglu_backward", swiglu_backward),
    ("fused_linear_cross_entropy", fused_linear_cross_entropy),
    ("gather_rows", gather_rows),
    ("zero_grad", zero_grad),
    ("grad_norm", grad_norm),
    ("adamw", adamw),
    ("muon", muon),
    ("reduce_gradients", reduce_gradients),
    ("rms_norm_backward_weight", rms_norm_backward_weight),
];

/// The names of all operations.
pub fn operations() -> impl Iterator<Item = &'static str> {
    MAKERS.iter().map(|(name, _)| *name)
}

/// The cases of the chosen operations, for a backend that computes in `dtype`.
pub fn cases(size: Size, dtype: Dtype, seed: u64, chosen: impl Fn(&str) -> bool) -> Vec<Case> {
    let mut cases = Vec::new();
    for (kind, (name, make)) in MAKERS.into_iter().enumerate() {
        if chosen(name) {
            // The same inputs whichever other operations are chosen.
            let mut draw = Draw::new(seed.wrapping_add(kind as u64), dtype);
            make(&mut cases, &mut draw, size, dtype);
        }
    }
    cases
}

/// A parameter that is the whole arena.
fn alone(rows: usize, cols: usize) -> (Layout, Span) {
    let span = Span { offset: 0, rows, cols };
    let len = span.len().next_multiple_of(Layout::ALIGN);
    let none = Span { offset: 0, rows: 0, cols: 0 };
    let layout = Layout {
        parameters: Vec::new(),
        embedding: span,
        blocks: Vec::new(),
        final_norm: none,
        head: span,
        len,
    };
    (layout, span)
}

/// A case under construction.
struct CaseBuilder {
    case: Case,
}

impl CaseBuilder {
    fn new(shape: String, (layout, _): (Layout, Span), training: bool) -> CaseBuilder {
        let case = Case {
            operation: "",
            shape,
            layout,
            spec: SessionSpec { training, ..SessionSpec::default() },
            program: Program::default(),
            floats: Vec::new(),
            indices: Vec::new(),
            arenas: Vec::new(),
            outputs: Vec::new(),
            errors_average: true,
            hyperparams: StepHyperparams::default(),
        };
        CaseBuilder { case }
    }

    /// An input of activations of size one.
    fn input(&mut self, draw: &mut Draw, name: &str, len: usize) -> Buffer {
        let values = draw.activations(len, 1.0);
        self.given(name, BufferKind::Activation, values)
    }

    fn given(&mut self, name: &str, element: BufferKind, values: Vec<f32>) -> Buffer {
        let buffer = self.case.program.buffer(name, element, values.len(), BufferRole::Input);
        self.case.floats.push((buffer, values));
        buffer
    }

    fn index(&mut self, name: &str, values: Vec<u32>) -> Buffer {
        let buffer =
            self.case.program.buffer(name, BufferKind::Index, values.len(), BufferRole::Input);
        self.case.indices.push((buffer, values));
        buffer
    }

    fn output(&mut self, name: &str, element: BufferKind, len: usize) -> Buffer {
        let buffer = self.case.program.buffer(name, element, len, BufferRole::Output);
        self.case.outputs.push(match element {
            BufferKind::Index => Output::Indices(buffer),
            _ => Output::Floats(buffer),
        });
        buffer
    }

    /// A loss or a log-sum-exp for each row.
    fn logarithms(&mut self, name: &str, len: usize) -> Buffer {
        let buffer = self.case.program.buffer(name, BufferKind::Float, len, BufferRole::Output);
        self.case.outputs.push(Output::Logarithms(buffer));
        buffer
    }

    /// The parameter, drawn; padding stays zero.
    fn weights(&mut self, draw: &mut Draw, span: Span, deviation: f64) {
        let mut values = draw.activations(span.len(), deviation);
        values.resize(self.case.layout.len, 0.0);
        self.case.arenas.push((Arena::Parameters, values));
    }

    /// A gradient that is there already: what is added must not replace it.
    fn accumulates(&mut self, draw: &mut Draw, span: Span) {
        let values = draw.floats(self.case.layout.len, 1.0);
        self.case.arenas.push((Arena::Gradients, values));
        // Beyond the parameter too: nothing may be written there.
        let all = 0..self.case.layout.len;
        debug_assert!(span.len() <= all.end);
        self.case.outputs.push(Output::Arena(Arena::Gradients, all));
    }

    /// Adds the update and, unless it is timed, a read of the parameters as the next step's matmuls
    /// make it.
    fn finish_update(mut self, op: Op, table: Span, size: Size, cases: &mut Vec<Case>) {
        self.case.operation = op.name();
        self.case.program.ops.push(op);
        if !size.is_timed() {
            let ids = self.index("ids", (0..table.rows as u32).collect());
            let out = self.output("weights", BufferKind::Activation, table.len());
            self.case.program.ops.push(Op::Embedding(Embedding { ids, table, out }));
        }
        cases.push(self.case);
    }

    fn finish(mut self, op: Op, cases: &mut Vec<Case>) {
        self.case.operation = op.name();
        self.case.program.ops.push(op);
        cases.push(self.case);
    }
}

fn embedding(cases: &mut Vec<Case>, draw: &mut Draw, size: Size, _: Dtype) {
    let shapes = size.shapes(
        [(1, 1, 1), (7, 13, 5), (37, 100, 64), (65, 300, 36)],
        [(4096, 32768, 64)],
        [(512, 32768, 64)],
        [(32768, 32768, 64), (16384, 50304, 768)],
    );
    for (rows, vocab, hidden) in shapes {
        let (layout, table) = alone(vocab, hidden);
        let mut b =
            CaseBuilder::new(format!("{rows} of {vocab} x {hidden}"), (layout, table), false);
        b.weights(draw, table, 1.0);
        let ids = b.index("ids", draw.indices(rows, vocab));
        let out = b.output("out", BufferKind::Activation, rows * hidden);
        b.finish(Op::Embedding(Embedding { ids, table, out }), cases);
    }
}

fn embedding_backward(cases: &mut Vec<Case>, draw: &mut Draw, size: Size, _: Dtype) {
    let shapes = size.shapes(
        [(1, 1, 1), (7, 3, 5), (200, 40, 64), (65, 300, 36), (515, 2, 8), (1500, 700, 4)],
        [(32768, 32768, 64)],
        [(512, 32768, 64)],
        [(32768, 32768, 64), (16384, 50304, 768)],
    );
    for (rows, vocab, hidden) in shapes {
        let (layout, table) = alone(vocab, hidden);
        let mut b =
            CaseBuilder::new(format!("{rows} of {vocab} x {hidden}"), (layout, table), true);
        b.accumulates(draw, table);
        let ids = b.index("ids", draw.indices(rows, vocab));
        let dout = b.input(draw, "dout", rows * hidden);
        b.finish(Op::EmbeddingBackward(EmbeddingBackward { ids, dout, table }), cases);
    }
}

fn norms(size: Size) -> Vec<(usize, usize)> {
    size.shapes(
        [(1, 1), (3, 17), (5, 64), (33, 100), (9, 768), (2, 4096)],
        [(32768, 64), (4096, 2048)],
        [(512, 64)],
        [(32768, 64), (16384, 768), (32768, 2048)],
    )
}

fn rms_norm(cases: &mut Vec<Case>, draw: &mut Draw, size: Size, _: Dtype) {
    for (rows, hidden) in norms(size) {
        for adds in [false, true] {
            let with = if adds { " and residual" } else { "" };
            let (layout, weight) = alone(1, hidden);
            let mut b =
                CaseBuilder::new(format!("{rows} x {hidden}{with}"), (layout, weight), false);
            b.weights(draw, weight, 1.0);
            let x = b.input(draw, "x", rows * hidden);
            let add = adds.then(|| ResidualAdd {
                residual: b.input(draw, "residual", rows * hidden),
                sum: b.output("sum", BufferKind::Activation, rows * hidden),
            });
            let y = b.output("y", BufferKind::Activation, rows * hidden);
            let rstd = b.output("rstd", BufferKind::Float, rows);
            b.finish(Op::RmsNorm(RmsNorm { x, add, weight, eps: 1e-5, y, rstd }), cases);
        }
    }
}

fn rms_norm_backward(cases: &mut Vec<Case>, draw: &mut Draw, size: Size, _: Dtype) {
    for (rows, hidden) in norms(size) {
        for past in [false, true] {
            let with = if past { " and residual" } else { "" };
            let (layout, weight) = alone(1, hidden);
            let mut b =
                CaseBuilder::new(format!("{rows} x {hidden}{with}"), (layout, weight), true);
            b.weights(draw, weight, 1.0);
            norms_backward(&mut b, draw, &[weight], rows, past);
            b.accumulates(draw, weight);
            b.case.operation = "rms_norm_backward";
            cases.push(b.case);
        }
    }
}

/// The backward of norms one after another, and the sum of their partial sums.
fn norms_backward(b: &mut CaseBuilder, draw: &mut Draw, weights: &[Span], rows: usize, past: bool) {
    let hidden = weights[0].cols;
    let len = weights.len() * norm_partials(rows, hidden) * hidden;
    let partials = b.case.program.buffer("partials", BufferKind::Float, len, BufferRole::Temporary);
    for (index, &weight) in weights.iter().enumerate() {
        let values = draw.activations(rows * hidden, 1.0);
        let rstd = |row: &[f32]| {
            let squares: f32 = row.iter().map(|x| x * x).sum();
            1.0 / (squares / hidden as f32 + 1e-5).sqrt()
        };
        let rstd = values.chunks(hidden).map(rstd).collect();
        let rstd = b.given("rstd", BufferKind::Float, rstd);
        let x = b.given("x", BufferKind::Activation, values);
        let dy = b.input(draw, "dy", rows * hidden);
        let dsum = past.then(|| b.input(draw, "dsum", rows * hidden));
        let dx = b.output("dx", BufferKind::Activation, rows * hidden);
        let op = RmsNormBackward { x, rstd, weight, dy, dsum, dx, partials, index };
        b.case.program.ops.push(Op::RmsNormBackward(op));
    }
    let op = RmsNormBackwardWeight { weights: weights.to_vec(), partials, rows };
    b.case.program.ops.push(Op::RmsNormBackwardWeight(op));
}

/// Several norms whose weights are anywhere in the arena, completed by one op.
fn rms_norm_backward_weight(cases: &mut Vec<Case>, draw: &mut Draw, size: Size, _: Dtype) {
    let shapes =
        size.shapes([(1, 1), (33, 100), (70, 64)], [(4096, 2048)], [(512, 64)], [(16384, 768)]);
    for (rows, hidden) in shapes {
        let (layout, all) = alone(4, hidden);
        let mut b = CaseBuilder::new(format!("3 of {rows} x {hidden}"), (layout, all), true);
        b.weights(draw, all, 1.0);
        let weights = [3, 0, 2].map(|at| Span { offset: at * hidden, rows: 1, cols: hidden });
        norms_backward(&mut b, draw, &weights, rows, false);
        b.accumulates(draw, all);
        b.case.operation = "rms_norm_backward_weight";
        cases.push(b.case);
    }
}

/// Rows, width of the output, width of the input.
fn products(size: Size) -> Vec<(usize, usize, usize)> {
    size.shapes(
        [(1, 1, 1), (1, 33, 64), (7, 64, 33), (37, 48, 100), (70, 256, 64)],
        [(2048, 512, 64), (512, 2048, 768)],
        [(512, 512, 64)],
        [(32768, 512, 64), (16384, 3072, 768), (8192, 11008, 2048)],
    )
}

fn linear(cases: &mut Vec<Case>, draw: &mut Draw, size: Size, _: Dtype) {
    for (rows, out, inner) in products(size) {
        let (layout, w) = alone(out, inner);
        let mut b = CaseBuilder::new(format!("{rows} x {inner} to {out}"), (layout, w), false);
        b.weights(draw, w, 1.0);
        let x = b.input(draw, "x", rows * inner);
        let y = b.output("y", BufferKind::Activation, rows * out);
        b.finish(Op::Linear(Linear { x, w, y, rows }), cases);
    }
}

fn linear_backward_input(cases: &mut Vec<Case>, draw: &mut Draw, size: Size, _: Dtype) {
    for (rows, out, inner) in products(size) {
        let (layout, w) = alone(out, inner);
        let mut b = CaseBuilder::new(format!("{rows} x {inner} to {out}"), (layout, w), false);
        b.weights(draw, w, 1.0);
        let dy = b.input(draw, "dy", rows * out);
        let dx = b.output("dx", BufferKind::Activation, rows * inner);
        b.finish(Op::LinearBackwardInput(LinearBackwardInput { dy, w, dx, rows }), cases);
    }
}

fn linear_backward_weight(cases: &mut Vec<Case>, draw: &mut Draw, size: Size, _: Dtype) {
    for (rows, out, inner) in products(size) {
        let (layout, w) = alone(out, inner);
        let mut b = CaseBuilder::new(format!("{rows} x {inner} to {out}"), (layout, w), true);
        b.accumulates(draw, w);
        let dy = b.input(draw, "dy", rows * out);
        let x = b.input(draw, "x", rows * inner);
        b.finish(Op::LinearBackwardWeight(LinearBackwardWeight { dy, x, w, rows }), cases);
    }
}

fn heads(
    batch: usize,
    seq_len: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
) -> AttentionShape {
    AttentionShape { batch, seq_len, heads, kv_heads, head_dim }
}

fn describe(shape: &AttentionShape) -> String {
    let AttentionShape { batch, seq_len, heads, kv_heads, head_dim } = shape;
    format!("{batch} x {seq_len}, {heads}/{kv_heads} heads of {head_dim}")
}

/// `theta^(-2i/d)`, as models have it.
fn frequencies(head_dim: usize) -> Arc<[f64]> {
    (0..head_dim / 2).map(|i| 1e4f64.powf(-2.0 * i as f64 / head_dim as f64)).collect()
}

fn ropes(size: Size) -> Vec<AttentionShape> {
    size.shapes(
        [
            heads(1, 1, 1, 1, 2),
            heads(2, 37, 18, 3, 2),
            heads(3, 5, 6, 2, 6),
            heads(2, 33, 8, 2, 8),
            heads(1, 70, 4, 4, 64),
            heads(2, 9, 3, 1, 128),
        ],
        [heads(8, 512, 32, 4, 2), heads(2, 1024, 12, 4, 64)],
        [heads(1, 512, 32, 4, 2)],
        [heads(64, 512, 32, 4, 2), heads(16, 1024, 12, 12, 64), heads(4, 2048, 16, 16, 128)],
    )
}

fn rope(cases: &mut Vec<Case>, draw: &mut Draw, size: Size, _: Dtype) {
    for shape in ropes(size) {
        for starts in [false, true] {
            let with = if starts { ", from anywhere" } else { "" };
            let none = alone(1, 1);
            let mut b = CaseBuilder::new(format!("{}{with}", describe(&shape)), none, false);
            let qkv = b.input(draw, "qkv", shape.rows() * shape.qkv_width());
            let start =
                starts.then(|| b.index("start", draw.indices(shape.batch, 8192 - shape.seq_len)));
            let q = b.output("q", BufferKind::Activation, shape.rows() * shape.q_width());
            let k = b.output("k", BufferKind::Activation, shape.rows() * shape.kv_width());
            let v = b.output("v", BufferKind::Activation, shape.rows() * shape.kv_width());
            let frequencies = frequencies(shape.head_dim);
            let positions = if starts { 8192 } else { shape.seq_len };
            let op = Rope { qkv, start, positions, frequencies, shape, q, k, v };
            b.finish(Op::Rope(op), cases);
        }
    }
}

fn rope_backward(cases: &mut Vec<Case>, draw: &mut Draw, size: Size, _: Dtype) {
    for shape in ropes(size) {
        let mut b = CaseBuilder::new(describe(&shape), alone(1, 1), false);
        let dq = b.input(draw, "dq", shape.rows() * shape.q_width());
        let dk = b.input(draw, "dk", shape.rows() * shape.kv_width());
        let dv = b.input(draw, "dv", shape.rows() * shape.kv_width());
        let dqkv = b.output("dqkv", BufferKind::Activation, shape.rows() * shape.qkv_width());
        let frequencies = frequencies(shape.head_dim);
        let op = RopeBackward { dq, dk, dv, frequencies, shape, dqkv };
        b.finish(Op::RopeBackward(op), cases);
    }
}

fn attentions(size: Size) -> Vec<AttentionShape> {
    size.shapes(
        [
            heads(1, 1, 1, 1, 2),
            heads(3, 37, 8, 1, 2),
            heads(1, 130, 4, 1, 4),
            heads(2, 65, 8, 2, 8),
            heads(3, 19, 2, 1, 6),
            heads(3, 70, 4, 1, 16),
            heads(2, 33, 4, 4, 32),
            heads(3, 67, 2, 1, 64),
            heads(1, 40, 3, 3, 96),
            heads(2, 65, 2, 1, 128),
            heads(1, 20, 2, 1, 34),
            heads(4, 1, 2, 2, 64),
            heads(3, 170, 2, 1, 2),
            heads(1, 150, 1, 1, 8),
            heads(3, 145, 2, 1, 32),
            heads(1, 35, 1, 1, 256),
            // So many rows that small heads give a lane several, or a warp several blocks.
            heads(67, 3, 16, 4, 2),
            heads(67, 2, 16, 4, 4),
            heads(67, 2, 16, 2, 8),
        ],
        [
            heads(2, 512, 32, 4, 2),
            heads(1, 512, 8, 2, 8),
            heads(1, 1024, 4, 2, 64),
            heads(1, 1000, 2, 1, 128),
        ],
        [heads(1, 512, 32, 4, 2)],
        [
            heads(64, 512, 32, 4, 2),
            heads(64, 512, 16, 4, 4),
            heads(64, 512, 8, 2, 8),
            heads(16, 512, 12, 4, 32),
            heads(16, 1024, 12, 12, 64),
            heads(8, 2048, 16, 16, 64),
            heads(4, 4096, 16, 16, 64),
            heads(8, 2048, 16, 16, 128),
            heads(4, 4096, 16, 4, 128),
        ],
    )
}

/// The first visible position of each row: causal, left-padded, or a second document; causal alone if
/// it is timed.
fn masks(draw: &mut Draw, shape: &AttentionShape, size: Size) -> Vec<u32> {
    if size.is_timed() {
        return vec![0; shape.rows()];
    }
    let edges = draw.indices(shape.batch, shape.seq_len);
    let of = |at: usize| {
        let (sequence, position) = (at / shape.seq_len, (at % shape.seq_len) as u32);
        let edge = edges[sequence];
        match sequence % 3 {
            1 if position < edge => shape.seq_len as u32,
            1 => edge,
            2 if position >= edge => edge,
            _ => 0,
        }
    };
    (0..shape.rows()).map(of).collect()
}

/// Scores of attention.
#[derive(Clone, Copy, PartialEq)]
enum Scores {
    /// Normal, of size one.
    Small,
    /// In the hundreds: every tile raises a row's maximum.
    Large,
    /// From key to key the probability grows by 2^1.3: the range of f32 from the first tile to the last.
    Rising,
}

/// Attention's inputs and the mask.
fn attends(
    b: &mut CaseBuilder,
    draw: &mut Draw,
    shape: &AttentionShape,
    size: Size,
    scores: Scores,
) -> [Buffer; 4] {
    let deviation = match scores {
        Scores::Small => 1.0,
        Scores::Large => 100.0,
        Scores::Rising => 0.1,
    };
    let mut q = draw.activations(shape.rows() * shape.q_width(), deviation);
    let mut k = draw.activations(shape.rows() * shape.kv_width(), 1.0);
    if scores == Scores::Rising {
        // One component of q is the slope, that of k the position.
        let slope = (1.3 * LN_2 * (shape.head_dim as f64).sqrt()) as f32;
        q.iter_mut().step_by(shape.head_dim).for_each(|q| *q = slope);
        for (row, k) in k.iter_mut().step_by(shape.head_dim).enumerate() {
            *k = (row % shape.seq_len) as f32;
        }
    }
    let q = b.given("q", BufferKind::Activation, draw.rounded(&q));
    let k = b.given("k", BufferKind::Activation, draw.rounded(&k));
    let v = b.input(draw, "v", shape.rows() * shape.kv_width());
    let first_key = b.index("first key", masks(draw, shape, size));
    [q, k, v, first_key]
}

fn attention(cases: &mut Vec<Case>, draw: &mut Draw, size: Size, _: Dtype) {
    let mut case = |shape: AttentionShape, scores, with| {
        let mut b = CaseBuilder::new(format!("{}{with}", describe(&shape)), alone(1, 1), false);
        // Two large scores of a row that are nearly equal: their difference is all rounding.
        b.case.errors_average = scores == Scores::Small;
        let [q, k, v, first_key] = attends(&mut b, draw, &shape, size, scores);
        let out = b.output("out", BufferKind::Activation, shape.rows() * shape.q_width());
        let lse = b.logarithms("lse", shape.rows() * shape.heads);
        b.finish(Op::Attention(Attention { q, k, v, first_key, shape, out, lse }), cases);
    };
    for shape in attentions(size) {
        case(shape, Scores::Small, "");
        if !size.is_timed() {
            case(shape, Scores::Large, ", large scores");
        }
    }
    // Drawn after the others, whose bits on a GPU are known. A row sees several tiles.
    let long = |shape: &AttentionShape| !size.is_timed() && shape.seq_len > 64;
    for shape in attentions(size).into_iter().filter(long) {
        case(shape, Scores::Rising, ", rising scores");
    }
}

fn attention_backward(cases: &mut Vec<Case>, draw: &mut Draw, size: Size, dtype: Dtype) {
    for shape in attentions(size) {
        let mut b = CaseBuilder::new(describe(&shape), alone(1, 1), false);
        let [q, k, v, first_key] = attends(&mut b, draw, &shape, size, Scores::Small);
        let (out, lse) = if size.is_timed() {
            // Any numbers take as long; those of f64 would take hours.
            let rows = shape.rows();
            (draw.activations(rows * shape.q_width(), 1.0), vec![4.0; rows * shape.heads])
        } else {
            forward(&b.case, [q, k, v, first_key], &shape)
        };
        let out = dtype.decode(&dtype.encode(&out));
        let out = b.given("out", BufferKind::Activation, out);
        let lse = b.given("lse", BufferKind::Float, lse);
        let dout = b.input(draw, "dout", shape.rows() * shape.q_width());
        let dq = b.output("dq", BufferKind::Activation, shape.rows() * shape.q_width());
        let dk = b.output("dk", BufferKind::Activation, shape.rows() * shape.kv_width());
        let dv = b.output("dv", BufferKind::Activation, shape.rows() * shape.kv_width());
        let op = AttentionBackward { q, k, v, first_key, out, lse, dout, shape, dq, dk, dv };
        b.finish(Op::AttentionBackward(op), cases);
    }
}

/// Activations that the forward leaves for the backward, in f64.
fn forward(
    case: &Case,
    [q, k, v, first_key]: [Buffer; 4],
    shape: &AttentionShape,
) -> (Vec<f32>, Vec<f32>) {
    let mut program = case.program.clone();
    let rows = shape.rows();
    let out =
        program.buffer("out", BufferKind::Activation, rows * shape.q_width(), BufferRole::Output);
    let lse = program.buffer("lse", BufferKind::Float, rows * shape.heads, BufferRole::Output);
    program.ops.push(Op::Attention(Attention { q, k, v, first_key, shape: *shape, out, lse }));
    let reference = Reference::F64;
    let inputs = Inputs {
        indices: case.indices.iter().map(|(b, values)| (*b, values.as_slice())).collect(),
        floats: case.floats.iter().map(|(b, values)| (*b, values.as_slice().into())).collect(),
        ..Inputs::default()
    };
    let forward = || -> anyhow::Result<_> {
        let mut session = reference.open(&case.layout, SessionSpec::default())?;
        let program = session.load(program)?;
        session.run(program, &inputs)?;
        Ok((session.floats(program, out)?, session.floats(program, lse)?))
    };
    forward().expect("the reference takes every case")
}

/// Two operations: one that fills the cache, whose layout is the backend's own affair, and one that
/// goes on from there, each sequence from another position.
fn attention_decode(cases: &mut Vec<Case>, draw: &mut Draw, size: Size, _: Dtype) {
    let shapes = size.shapes(
        [
            (heads(1, 1, 1, 1, 2), 1, 64),
            (heads(3, 1, 8, 1, 2), 40, 64),
            (heads(2, 5, 8, 2, 8), 59, 64),
            (heads(2, 3, 2, 1, 6), 70, 128),
            (heads(4, 1, 4, 2, 64), 127, 128),
            (heads(2, 2, 3, 1, 128), 9, 64),
        ],
        [(heads(64, 1, 32, 4, 2), 511, 512), (heads(16, 4, 12, 4, 64), 1020, 1024)],
        [(heads(1, 1, 32, 4, 2), 511, 512)],
        [(heads(64, 1, 32, 4, 2), 511, 512), (heads(16, 1, 12, 4, 64), 1023, 1024)],
    );
    for (shape, before, capacity) in shapes {
        let plane = shape.batch * shape.kv_width() * capacity;
        let what = format!("{} after {before} of {capacity}", describe(&shape));
        let mut b = CaseBuilder::new(what, alone(1, 1), false);
        // The second of two layers.
        b.case.spec.cache_len = 4 * plane;
        let (keys, values) = (2 * plane, 3 * plane);
        let first = AttentionShape { seq_len: before, ..shape };
        let zeros = vec![0; shape.batch];
        let starts = draw.indices(shape.batch, before + 1);
        let [filled, attended] =
            [("before", first, zeros), ("", shape, starts)].map(|(name, shape, starts)| {
                let name = |what: &str| format!("{what} {name}").trim_end().to_string();
                let q = b.input(draw, &name("q"), shape.rows() * shape.q_width());
                let k = b.input(draw, &name("k"), shape.rows() * shape.kv_width());
                let v = b.input(draw, &name("v"), shape.rows() * shape.kv_width());
                let start = b.index(&name("start"), starts);
                let len = shape.rows() * shape.q_width();
                let out = b.output(&name("out"), BufferKind::Activation, len);
                AttentionDecode { q, k, v, start, shape, keys, values, capacity, out }
            });
        b.case.program.ops.push(Op::AttentionDecode(filled));
        b.finish(Op::AttentionDecode(attended), cases);
    }
}

/// Rows and width.
fn gates(size: Size) -> Vec<(usize, usize)> {
    size.shapes(
        [(1, 1), (3, 17), (5, 24), (37, 256), (2, 3000)],
        [(32768, 256), (2048, 5504)],
        [(512, 256)],
        [(32768, 256), (16384, 3072), (8192, 5504)],
    )
}

fn swiglu(cases: &mut Vec<Case>, draw: &mut Draw, size: Size, _: Dtype) {
    for (rows, inter) in gates(size) {
        let mut b = CaseBuilder::new(format!("{rows} x {inter}"), alone(1, 1), false);
        let gate_up = draw.activations(2 * rows * inter, 3.0);
        let gate_up = b.given("gate_up", BufferKind::Activation, gate_up);
        let out = b.output("out", BufferKind::Activation, rows * inter);
        b.finish(Op::SwiGlu(SwiGlu { gate_up, inter, out }), cases);
    }
}

fn swiglu_backward(cases: &mut Vec<Case>, draw: &mut Draw, size: Size, _: Dtype) {
    for (rows, inter) in gates(size) {
        let mut b = CaseBuilder::new(format!("{rows} x {inter}"), alone(1, 1), false);
        let gate_up = draw.activations(2 * rows * inter, 3.0);
        let gate_up = b.given("gate_up", BufferKind::Activation, gate_up);
        let dout = b.input(draw, "dout", rows * inter);
        let dgate_up = b.output("dgate_up", BufferKind::Activation, 2 * rows * inter);
        b.finish(Op::SwiGluBackward(SwiGluBackward { gate_up, dout, inter, dgate_up }), cases);
    }
}

fn fused_linear_cross_entropy(cases: &mut Vec<Case>, draw: &mut Draw, size: Size, _: Dtype) {
    let shapes = size.shapes(
        [
            (1, 1, 1),
            (1, 300, 64),
            (7, 13, 5),
            (37, 130, 16),
            (65, 257, 64),
            (130, 515, 36),
            // Ids, and rows, enough for two splits.
            (66, 1030, 36),
            (1030, 70, 12),
            (33, 200, 128),
            (9, 100, 250),
            (5, 70, 300),
        ],
        [(512, 32768, 64), (1000, 5003, 128), (300, 5000, 768)],
        [(512, 32768, 64)],
        [(32768, 32768, 64), (16384, 50304, 768)],
    );
    for (rows, vocab, hidden) in shapes {
        for gradient in [false, true] {
            let with = if gradient { " and gradient" } else { "" };
            let (layout, w) = alone(vocab, hidden);
            let shape = format!("{rows} x {hidden} to {vocab}{with}");
            let mut b = CaseBuilder::new(shape, (layout, w), gradient);
            // Logits of size two: some ids are likely, none is certain.
            b.weights(draw, w, 2.0 / (hidden as f64).sqrt());
            if !size.is_timed() {
                // Equal logits, side by side and apart: the first of them is the argmax.
                let (_, w) = b.case.arenas.last_mut().expect("they were drawn");
                for id in (0..vocab / 2).step_by(3) {
                    for equal in [id + 1, id + 8, id + vocab / 2].map(|id| id.min(vocab - 1)) {
                        w.copy_within(id * hidden..(id + 1) * hidden, equal * hidden);
                    }
                }
            }
            let x = b.input(draw, "x", rows * hidden);
            let ignored = draw.indices(rows, 5);
            let targets = draw.indices(rows, vocab).into_iter().zip(ignored);
            let targets =
                targets.map(|(target, ignored)| if ignored == 0 { IGNORE } else { target });
            let targets = b.index("targets", targets.collect());
            let nll = b.logarithms("nll", rows);
            let argmax = b.output("argmax", BufferKind::Index, rows);
            let dx = gradient.then(|| b.output("dx", BufferKind::Activation, rows * hidden));
            if gradient {
                b.accumulates(draw, w);
            }
            let op = FusedLinearCrossEntropy { x, w, targets, rows, nll, argmax, dx };
            b.finish(Op::FusedLinearCrossEntropy(op), cases);
        }
    }
}

fn gather_rows(cases: &mut Vec<Case>, draw: &mut Draw, size: Size, _: Dtype) {
    for (batch, seq_len, hidden) in
        size.shapes([(1, 1, 1), (3, 7, 5), (9, 4, 64)], [], [(1, 512, 64)], [(64, 4, 64)])
    {
        let shape = format!("{batch} x {seq_len} x {hidden}");
        let mut b = CaseBuilder::new(shape, alone(1, 1), false);
        let x = b.input(draw, "x", batch * seq_len * hidden);
        let position = b.index("position", draw.indices(batch, seq_len));
        let out = b.output("out", BufferKind::Activation, batch * hidden);
        b.finish(Op::GatherRows(GatherRows { x, position, batch, seq_len, out }), cases);
    }
}

/// Lengths of arenas.
fn lengths(size: Size) -> Vec<usize> {
    size.shapes([1, 63, 1000, 20_011], [4_662_336], [4_662_336], [124_000_000])
}

fn zero_grad(cases: &mut Vec<Case>, draw: &mut Draw, size: Size, _: Dtype) {
    for len in lengths(size) {
        let (layout, span) = alone(1, len);
        let mut b = CaseBuilder::new(format!("{len}"), (layout, span), true);
        b.accumulates(draw, span);
        b.finish(Op::ZeroGrad(ZeroGrad), cases);
    }
}

fn grad_norm(cases: &mut Vec<Case>, draw: &mut Draw, size: Size, _: Dtype) {
    for len in lengths(size) {
        // Squares beyond what f32 holds.
        let deviations: &[_] = if size.is_timed() { &[1.0] } else { &[1.0, 1e25] };
        for &deviation in deviations {
            let (layout, span) = alone(1, len);
            let mut b = CaseBuilder::new(format!("{len} of {deviation:e}"), (layout, span), true);
            let gradients = draw.floats(b.case.layout.len, deviation);
            b.case.arenas.push((Arena::Gradients, gradients));
            let norm = b.output("norm", BufferKind::Float, 1);
            b.finish(Op::GradNorm(GradNorm { norm, runs: None }), cases);

            // By runs, as in a step that is cut into slices.
            let (mut layout, span) = alone(1, len);
            let name = "w".to_string();
            layout.parameters.push(Parameter { name, kind: ParamKind::Embedding, span });
            let mut gradients = draw.floats(layout.len, deviation);
            gradients[len..].fill(0.0);
            let runs = NormRuns { shards: whole(&layout), own: false };
            let mut b =
                CaseBuilder::new(format!("{len} of {deviation:e}, by runs"), (layout, span), true);
            b.case.arenas.push((Arena::Gradients, gradients));
            let norm = b.output("norm", BufferKind::Float, 1);
            b.finish(Op::GradNorm(GradNorm { norm, runs: Some(runs) }), cases);
        }
    }
}

/// The shard of one process: the whole arena.
fn whole(layout: &Layout) -> Arc<Shards> {
    let adamw = AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 };
    let optimizer = Optimizer { adamw, muon: None, weight_decay: 0.0, max_grad_norm: 1.0 };
    Shards::new(layout, &optimizer, 1, 0)
}

/// Multiples of one gradient in slots: 1, 2, ... times it, and their sum.
fn reduce_gradients(cases: &mut Vec<Case>, draw: &mut Draw, size: Size, _: Dtype) {
    for len in lengths(size) {
        let pieces: &[usize] = if size.is_timed() { &[8] } else { &[1, 2, 3, 4, 6] };
        for &pieces in pieces {
            let (layout, span) = alone(1, len);
            let shards = whole(&layout);
            let mut b = CaseBuilder::new(format!("{pieces} of {len}"), (layout, span), true);
            b.accumulates(draw, span);
            for slot in 0..pieces - 1 {
                b.case.program.ops.push(Op::SaveGradients(SaveGradients { slot }));
                let add = |slot| Op::AddGradients(AddGradients { slot });
                b.case.program.ops.extend([add(slot), add(0)]);
            }
            let (slots, order) = ((0..pieces - 1).collect(), SumOrder::new(pieces));
            b.finish(Op::ReduceGradients(ReduceGradients { shards, slots, order }), cases);
        }
    }
}

/// A gradient, moments and parameters in the middle of a training run; the norm of all gradients.
fn update(b: &mut CaseBuilder, draw: &mut Draw, second: bool, norm: f32) -> Buffer {
    let len = b.case.layout.len;
    let mut gradients = draw.floats(len, 1.0);
    let mut first = draw.floats(len, 0.5);
    let mut squares: Vec<f32> = draw.floats(len, 0.5).iter().map(|x| x * x).collect();
    if second {
        // Some so small that AdamW's epsilon matters.
        gradients[..len / 4].iter_mut().for_each(|g| *g *= 1e-8);
        first[..len / 4].iter_mut().for_each(|m| *m *= 1e-8);
        squares[..len / 4].fill(1e-16);
    }
    b.case.outputs.push(Output::Arena(Arena::Parameters, 0..len));
    b.case.outputs.push(Output::Arena(Arena::FirstMoment, 0..len));
    if second {
        b.case.outputs.push(Output::Arena(Arena::SecondMoment, 0..len));
    }
    b.case.arenas.extend([
        (Arena::Parameters, draw.floats(len, 1.0)),
        (Arena::Gradients, gradients),
        (Arena::FirstMoment, first),
        (Arena::SecondMoment, squares),
    ]);
    b.case.hyperparams = StepHyperparams { learning_rate: 0.03, muon_learning_rate: 0.2, step: 7 };
    b.given("norm", BufferKind::Float, vec![norm])
}

/// Norms below and above the bound of clipping; one that is not finite: nothing may change.
fn gradient_norms(size: Size) -> &'static [f32] {
    if size.is_timed() { &[1.7] } else { &[0.5, 1.7, f32::INFINITY] }
}

fn adamw(cases: &mut Vec<Case>, draw: &mut Draw, size: Size, _: Dtype) {
    for len in lengths(size) {
        for &norm in gradient_norms(size) {
            let (layout, span) = alone(1, len);
            let mut b = CaseBuilder::new(format!("{len}, norm {norm}"), (layout, span), true);
            let norm = update(&mut b, draw, true, norm);
            // Three ranges that begin anywhere, a hole between the first two, two decays.
            let (a, z) = (len / 3, 2 * len / 3);
            let ranges = [(0..a, 0.1), (a + usize::from(len > 9)..z, 0.0), (z..len, 0.1)];
            let ranges = ranges.into_iter().filter(|(range, _)| !range.is_empty()).collect();
            let (beta1, beta2, epsilon, max_grad_norm) = (0.9, 0.99, 1e-8, 1.0);
            let op = AdamWStep { norm, max_grad_norm, beta1, beta2, epsilon, ranges };
            b.finish_update(Op::AdamWStep(op), span, size, cases);
        }
    }
}

fn muon(cases: &mut Vec<Case>, draw: &mut Draw, size: Size, dtype: Dtype) {
    let shapes = size.shapes(
        [(5, 5), (17, 40), (64, 16), (33, 130)],
        [(512, 64), (768, 2048)],
        [(512, 64)],
        [(768, 3072)],
    );
    let mut shapes: Vec<_> = shapes
        .into_iter()
        .map(|(rows, cols)| (rows, cols, newton_schulz::is_half(rows, cols)))
        .collect();
    if dtype != Dtype::F32 && !size.is_timed() {
        shapes.extend([(24, 24, true), (33, 130, true), (64, 16, true)]);
    }
    for (rows, cols, half) in shapes {
        for &norm in gradient_norms(size) {
            // The last of three is stepped first, the first one last, and the second not at all.
            let place = |at: usize| Span { offset: at * rows * cols, rows, cols };
            let matrices = vec![place(2), place(0)];
            let (layout, span) = alone(3 * rows, cols);
            let with = if half && dtype != Dtype::F32 { " in f16" } else { "" };
            let shape = format!("2 of {rows} x {cols}{with}, norm {norm}");
            let mut b = CaseBuilder::new(shape, (layout, span), true);
            let norm = update(&mut b, draw, false, norm);
            let (max_grad_norm, momentum, weight_decay, batched) = (1.0, 0.9, 0.1, true);
            let op =
                MuonStep { norm, max_grad_norm, momentum, weight_decay, matrices, batched, half };
            b.finish_update(Op::MuonStep(op), span, size, cases);
        }
    }
}
