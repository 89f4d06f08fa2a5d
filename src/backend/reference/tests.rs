//! Every backward against central finite differences in f64, one operation at a time.

use std::sync::Arc;

use super::super::host::HostSession;
use super::super::{Inputs, ProgramId, Session, SessionSpec};
use super::ReferenceExecutor;
use crate::llama::ops::{
    Attention, AttentionBackward, AttentionShape, Embedding, EmbeddingBackward,
    FusedLinearCrossEntropy, Linear, LinearBackwardInput, LinearBackwardWeight, ResidualAdd,
    RmsNorm, RmsNormBackward, RmsNormBackwardWeight, Rope, RopeBackward, SwiGlu, SwiGluBackward,
    norm_partials,
};
use crate::llama::{Buffer, BufferKind, BufferRole, Op, Program};
use crate::model::{Layout, Span};
use crate::random::{Philox, Stream};
use crate::tokens::IGNORE;

/// A forward and its backward, and how their buffers correspond.
struct GradientCheck {
    program: Program,
    forward: Vec<Op>,
    backward: Vec<Op>,
    /// Inputs of the forward, each with the gradient that the backward writes.
    inputs: Vec<(Buffer, Buffer)>,
    /// Outputs of the forward, each with the gradient that the backward reads.
    outputs: Vec<(Buffer, Buffer)>,
    /// The parameter of both, if any.
    weight: Option<Span>,
    indices: Vec<(Buffer, Vec<u32>)>,
    /// Inputs without a gradient.
    constants: Vec<Buffer>,
    /// The gradient of every output, if it is not random.
    output_gradient: Option<f64>,
}

impl GradientCheck {
    fn new() -> Self {
        Self {
            program: Program::default(),
            forward: vec![],
            backward: vec![],
            inputs: vec![],
            outputs: vec![],
            weight: None,
            indices: vec![],
            constants: vec![],
            output_gradient: None,
        }
    }

    fn float(&mut self, name: &str, len: usize) -> Buffer {
        self.program.buffer(name, BufferKind::Activation, len, BufferRole::Output)
    }

    fn input(&mut self, name: &str, len: usize) -> (Buffer, Buffer) {
        let pair = (self.float(name, len), self.float(&format!("d {name}"), len));
        self.inputs.push(pair);
        pair
    }

    fn output(&mut self, name: &str, len: usize) -> (Buffer, Buffer) {
        let pair = (self.float(name, len), self.float(&format!("d {name}"), len));
        self.outputs.push(pair);
        pair
    }

    fn weight(&mut self, rows: usize, cols: usize) -> Span {
        *self.weight.insert(Span { offset: 64, rows, cols })
    }

    fn index(&mut self, name: &str, values: Vec<u32>) -> Buffer {
        let buffer = self.program.buffer(name, BufferKind::Index, values.len(), BufferRole::Output);
        self.indices.push((buffer, values));
        buffer
    }

    /// The largest ‖numerical − analytic‖ / ‖numerical‖ over the inputs and the weight, for
    /// `loss = sum(output * gradient of output)`.
    fn error(self) -> f64 {
        let mut machine = FiniteDifferences::new(&self);
        machine.loss();
        machine.host.run(machine.backward, &machine.inputs).unwrap();
        let by_input = self.inputs.iter().map(|&(x, dx)| {
            let places = (0..self.program.info(x).len).map(|i| Variable::Float(x, i)).collect();
            (places, machine.host.memory.floats.one(dx).to_vec())
        });
        let by_weight = self.weight.iter().map(|w| {
            let places = w.range().map(Variable::Parameter).collect();
            (places, machine.host.memory.gradients[w.range()].to_vec())
        });
        let all: Vec<(Vec<Variable>, Vec<f64>)> = by_input.chain(by_weight).collect();
        all.into_iter().map(|(places, analytic)| machine.difference(&places, &analytic)).fold(
            0.0,
            |worst, error| {
                assert!(error.is_finite(), "a gradient is not a number");
                worst.max(error)
            },
        )
    }
}

/// One value that the loss depends on.
#[derive(Clone, Copy)]
enum Variable {
    Float(Buffer, usize),
    Parameter(usize),
}

struct FiniteDifferences {
    host: HostSession<f64, ReferenceExecutor>,
    forward: ProgramId,
    backward: ProgramId,
    outputs: Vec<(Buffer, Buffer)>,
    inputs: Inputs<'static>,
}

impl FiniteDifferences {
    fn new(check: &GradientCheck) -> Self {
        let layout = Layout {
            parameters: vec![],
            embedding: Span { offset: 0, rows: 0, cols: 0 },
            blocks: vec![],
            final_norm: Span { offset: 0, rows: 0, cols: 0 },
            head: Span { offset: 0, rows: 0, cols: 0 },
            len: check.weight.map_or(0, |w| w.range().end),
        };
        let spec = SessionSpec { training: true, ..SessionSpec::default() };
        let mut host =
            HostSession::<f64, _>::new(&layout, spec, ReferenceExecutor { rounding: None })
                .unwrap();
        // All buffers are outputs, so both programs lay them out alike in one block.
        let mut load =
            |ops: &[Op]| host.load(Program { ops: ops.to_vec(), ..check.program.clone() }).unwrap();
        let (forward, backward) = (load(&check.forward), load(&check.backward));
        let inputs = Inputs { loss_scale: LOSS_SCALE, ..Inputs::default() };

        let no_op = host.load(Program { ops: vec![], ..check.program.clone() }).unwrap();
        host.run(no_op, &inputs).unwrap();
        fill(0, &mut host.memory.parameters);
        for (sequence, &(x, dx)) in check.inputs.iter().enumerate() {
            fill(1 + sequence, host.memory.floats.get([x])[0]);
            host.memory.floats.get([dx])[0].fill(f64::NAN);
        }
        for (sequence, &(y, dy)) in check.outputs.iter().enumerate() {
            host.memory.floats.get([y])[0].fill(f64::NAN);
            match check.output_gradient {
                Some(constant) => host.memory.floats.get([dy])[0].fill(constant),
                None => fill(100 + sequence, host.memory.floats.get([dy])[0]),
            }
        }
        for (sequence, &buffer) in check.constants.iter().enumerate() {
            fill(200 + sequence, host.memory.floats.get([buffer])[0]);
        }
        for (buffer, values) in &check.indices {
            host.memory.indices.get([*buffer])[0].copy_from_slice(values);
        }
        Self { host, forward, backward, outputs: check.outputs.clone(), inputs }
    }

    fn loss(&mut self) -> f64 {
        self.host.run(self.forward, &self.inputs).unwrap();
        let floats = &self.host.memory.floats;
        self.outputs.iter().map(|&(y, dy)| super::dot(floats.one(y), floats.one(dy))).sum()
    }

    fn at(&mut self, place: Variable) -> &mut f64 {
        match place {
            Variable::Float(buffer, i) => &mut self.host.memory.floats.get([buffer])[0][i],
            Variable::Parameter(i) => &mut self.host.memory.parameters[i],
        }
    }

    fn difference(&mut self, places: &[Variable], analytic: &[f64]) -> f64 {
        const STEP: f64 = 1e-5;
        let (mut difference, mut norm) = (0.0, 0.0);
        for (&place, analytic) in places.iter().zip(analytic) {
            let kept = *self.at(place);
            *self.at(place) = kept + STEP;
            let up = self.loss();
            *self.at(place) = kept - STEP;
            let down = self.loss();
            *self.at(place) = kept;
            let numeric = (up - down) / (2.0 * STEP);
            difference += (numeric - analytic).powi(2);
            norm += numeric.powi(2);
        }
        assert!(norm > 0.0, "nothing depends on it");
        (difference / norm).sqrt()
    }
}

const LOSS_SCALE: f64 = 0.3;

fn fill(sequence: usize, out: &mut [f64]) {
    let mut draws = vec![0.0f32; out.len()];
    Philox::new(11, Stream::Test).fill_normal(sequence as u32, 1.0, &mut draws);
    for (out, draw) in out.iter_mut().zip(draws) {
        *out = f64::from(draw);
    }
}

/// Central differences with a step of 1e-5 are good to about 1e-10 of values near 1; their
/// cancellation leaves 1e-11 / 1e-5.
const BOUND: f64 = 1e-6;

const SHAPE: AttentionShape =
    AttentionShape { batch: 2, seq_len: 5, heads: 6, kv_heads: 2, head_dim: 4 };

#[test]
fn embedding_backward_matches_finite_differences() {
    let mut check = GradientCheck::new();
    let table = check.weight(7, 3);
    let ids = check.index("ids", vec![1, 6, 1, 0, 1]);
    let (out, dout) = check.output("out", 15);
    check.forward = vec![Op::Embedding(Embedding { ids, table, out })];
    check.backward = vec![Op::EmbeddingBackward(EmbeddingBackward { ids, dout, table })];
    assert!(check.error() < BOUND);
}

#[test]
fn rms_norm_backward_matches_finite_differences() {
    for with_residual in [false, true] {
        let mut check = GradientCheck::new();
        let weight = check.weight(1, 7);
        let (x, dx) = check.input("x", 28);
        let (y, dy) = check.output("y", 28);
        let rstd = check.float("rstd", 4);
        let mut norm = RmsNorm { x, add: None, weight, eps: 1e-2, y, rstd };
        let partials = check.float("partials", 7 * norm_partials(4, 7));
        let index = 0;
        let mut back = RmsNormBackward { x, rstd, weight, dy, dsum: None, dx, partials, index };
        let sum = RmsNormBackwardWeight { weights: vec![weight], partials, rows: 4 };
        if with_residual {
            let residual = check.float("residual", 28);
            check.constants.push(residual);
            let (sum, dsum) = check.output("sum", 28);
            norm.add = Some(ResidualAdd { residual, sum });
            (back.x, back.dsum) = (sum, Some(dsum));
        }
        check.forward = vec![Op::RmsNorm(norm)];
        check.backward = vec![Op::RmsNormBackward(back), Op::RmsNormBackwardWeight(sum)];
        assert!(check.error() < BOUND, "residual: {with_residual}");
    }
}

#[test]
fn linear_backward_matches_finite_differences() {
    let mut check = GradientCheck::new();
    let w = check.weight(5, 3);
    let (x, dx) = check.input("x", 12);
    let (y, dy) = check.output("y", 20);
    check.forward = vec![Op::Linear(Linear { x, w, y, rows: 4 })];
    check.backward = vec![
        Op::LinearBackwardInput(LinearBackwardInput { dy, w, dx, rows: 4 }),
        Op::LinearBackwardWeight(LinearBackwardWeight { dy, x, w, rows: 4 }),
    ];
    assert!(check.error() < BOUND);
}

#[test]
fn rope_backward_matches_finite_differences() {
    let mut check = GradientCheck::new();
    let shape = SHAPE;
    let frequencies: Arc<[f64]> = Arc::new([1.0, 0.3]);
    let rows = shape.rows();
    let (qkv, dqkv) = check.input("qkv", rows * shape.qkv_width());
    let (q, dq) = check.output("q", rows * shape.q_width());
    let (k, dk) = check.output("k", rows * shape.kv_width());
    let (v, dv) = check.output("v", rows * shape.kv_width());
    check.backward = vec![Op::RopeBackward(RopeBackward {
        dq,
        dk,
        dv,
        frequencies: frequencies.clone(),
        shape,
        dqkv,
    })];
    check.forward = vec![Op::Rope(Rope {
        qkv,
        start: None,
        positions: shape.seq_len,
        frequencies,
        shape,
        q,
        k,
        v,
    })];
    assert!(check.error() < BOUND);
}

#[test]
fn attention_backward_with_fully_masked_rows_matches_finite_differences() {
    let mut check = GradientCheck::new();
    let shape = SHAPE;
    let rows = shape.rows();
    // Causal; left-padded by two; the last position of the first sequence starts a new document.
    let first_key = check.index("first key", vec![0, 0, 0, 0, 4, 5, 5, 2, 2, 2]);
    let (q, dq) = check.input("q", rows * shape.q_width());
    let (k, dk) = check.input("k", rows * shape.kv_width());
    let (v, dv) = check.input("v", rows * shape.kv_width());
    let (out, dout) = check.output("out", rows * shape.q_width());
    let lse = check.float("lse", rows * shape.heads);
    check.forward = vec![Op::Attention(Attention { q, k, v, first_key, shape, out, lse })];
    check.backward = vec![Op::AttentionBackward(AttentionBackward {
        q,
        k,
        v,
        first_key,
        out,
        lse,
        dout,
        shape,
        dq,
        dk,
        dv,
    })];
    assert!(check.error() < BOUND);
}

#[test]
fn swiglu_backward_matches_finite_differences() {
    let mut check = GradientCheck::new();
    let (gate_up, dgate_up) = check.input("gate and up", 30);
    let (out, dout) = check.output("out", 15);
    check.forward = vec![Op::SwiGlu(SwiGlu { gate_up, inter: 5, out })];
    check.backward = vec![Op::SwiGluBackward(SwiGluBackward { gate_up, dout, inter: 5, dgate_up })];
    assert!(check.error() < BOUND);
}

#[test]
fn fused_linear_cross_entropy_gradients_match_finite_differences() {
    let mut check = GradientCheck::new();
    let w = check.weight(9, 3);
    let targets = check.index("targets", vec![4, IGNORE, 8, 0]);
    let (x, dx) = check.input("x", 12);
    let (nll, _) = check.output("nll", 4);
    let argmax = check.index("argmax", vec![0; 4]);
    check.output_gradient = Some(LOSS_SCALE);
    let head = FusedLinearCrossEntropy { x, w, targets, rows: 4, nll, argmax, dx: None };
    check.forward = vec![Op::FusedLinearCrossEntropy(head.clone())];
    check.backward =
        vec![Op::FusedLinearCrossEntropy(FusedLinearCrossEntropy { dx: Some(dx), ..head })];
    assert!(check.error() < BOUND);
}
