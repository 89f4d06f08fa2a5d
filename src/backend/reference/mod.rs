//! The reference: every operation as plain loops in f64 or f32, in the order of its formula.
//!
//! It is checked by finite differences in f64 and checks the other backends. It may be slow; it may
//! not be clever. With [`Reference::mixed`] it rounds where mixed precision does, so that a whole bf16
//! step can be compared with it: weights as they are read, every activation as it is written, and
//! inside attention and the LM head what enters a second matmul (softmax's p and ds, the logits'
//! gradient). Gradients of parameters, statistics and the update stay unrounded.

mod attention;
mod dense;
mod update;

#[cfg(test)]
mod tests;

use num_traits::Float;

use super::host::{Execute, HostSession, Real};
use super::memory::Memory;
use super::{Backend, Inputs, Session, SessionSpec};
use crate::dtype::Dtype;
use crate::llama::{BufferKind, Op, Program};
use crate::model::{Layout, Span};

/// The arithmetic of the loops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arithmetic {
    /// Single precision.
    F32,
    /// Double precision.
    F64,
}

/// The backend of plain loops.
#[derive(Clone, Copy, Debug)]
pub struct Reference {
    /// Type of all values and sums.
    pub arithmetic: Arithmetic,
    /// The dtype that values are rounded to at the rounding points of mixed precision.
    pub rounding: Option<Dtype>,
}

impl Reference {
    /// Double precision throughout: what others are compared with.
    pub const F64: Reference = Reference { arithmetic: Arithmetic::F64, rounding: None };
    /// Single precision throughout.
    pub const F32: Reference = Reference { arithmetic: Arithmetic::F32, rounding: None };

    /// Loops in f32 that round to `dtype` as mixed precision does.
    pub fn mixed(dtype: Dtype) -> Reference {
        let rounding = (dtype != Dtype::F32).then_some(dtype);
        Reference { rounding, ..Reference::F32 }
    }
}

impl Backend for Reference {
    fn name(&self) -> &'static str {
        "reference"
    }

    fn device(&self) -> String {
        format!("reference, plain loops in {:?}", self.arithmetic).to_lowercase()
    }

    fn open(&self, layout: &Layout, spec: SessionSpec) -> anyhow::Result<Box<dyn Session>> {
        let plain = ReferenceExecutor { rounding: self.rounding };
        Ok(match self.arithmetic {
            Arithmetic::F32 => Box::new(HostSession::<f32, _>::new(layout, spec, plain)?),
            Arithmetic::F64 => Box::new(HostSession::<f64, _>::new(layout, spec, plain)?),
        })
    }

    fn micro_batch(&self, batch: usize, _seq_len: usize) -> usize {
        batch
    }

    /// None counted: operations allocate as they go.
    fn workspace_bytes(&self, _: &[&Program]) -> usize {
        0
    }
}

/// Runs one operation after another.
struct ReferenceExecutor {
    rounding: Option<Dtype>,
}

impl ReferenceExecutor {
    fn round<R: Real>(&self, value: R) -> R {
        match self.rounding {
            None => value,
            // Through f32: rounded twice, as a GPU does from its f32 accumulators.
            Some(dtype) => R::from_f32(dtype.round(value.to_f32())),
        }
    }

    /// A parameter as matmuls read it.
    fn weight<R: Real>(&self, parameters: &[R], span: Span) -> Vec<R> {
        parameters[span.range()].iter().map(|&value| self.round(value)).collect()
    }
}

impl<R: Real + Float> Execute<R> for ReferenceExecutor {
    fn execute(&mut self, program: &Program, ops: &[Op], memory: &mut Memory<R>, inputs: &Inputs) {
        for op in ops {
            self.one(op, program, memory, inputs);
        }
    }
}

impl ReferenceExecutor {
    fn one<R: Real + Float>(
        &self,
        op: &Op,
        program: &Program,
        memory: &mut Memory<R>,
        inputs: &Inputs,
    ) {
        match op {
            Op::Embedding(o) => self.embedding(o, memory),
            Op::EmbeddingBackward(o) => self.embedding_backward(o, memory),
            Op::RmsNorm(o) => self.rms_norm(o, memory),
            Op::RmsNormBackward(o) => self.rms_norm_backward(o, memory),
            // Its backward adds to the gradient at once.
            Op::RmsNormBackwardWeight(_) => {}
            Op::Linear(o) => self.linear(o, memory),
            Op::LinearBackwardInput(o) => self.linear_backward_input(o, memory),
            Op::LinearBackwardWeight(o) => self.linear_backward_weight(o, memory),
            Op::Rope(o) => self.rope(o, memory),
            Op::RopeBackward(o) => self.rope_backward(o, memory),
            Op::Attention(o) => self.attention(o, memory),
            Op::AttentionBackward(o) => self.attention_backward(o, memory),
            Op::AttentionDecode(o) => self.attention_decode(o, memory),
            Op::SwiGlu(o) => self.swiglu(o, memory),
            Op::SwiGluBackward(o) => self.swiglu_backward(o, memory),
            Op::FusedLinearCrossEntropy(o) => {
                self.fused_linear_cross_entropy(o, memory, inputs.loss_scale);
            }
            Op::GatherRows(o) => self.gather_rows(o, memory),
            Op::ZeroGrad(_) => memory.gradients.fill(R::zero()),
            Op::GradNorm(o) => self.grad_norm(o, memory),
            Op::AdamWStep(o) => self.adamw(o, memory, &inputs.hyperparams),
            Op::MuonStep(o) => self.muon(o, memory, &inputs.hyperparams),
            Op::SaveGradients(_)
            | Op::AddGradients(_)
            | Op::ReduceGradients(_)
            | Op::GatherShards(_) => unreachable!("the session executes it"),
        }
        if self.rounding.is_some() {
            for buffer in op.writes() {
                if program.info(buffer).kind == BufferKind::Activation {
                    let [values] = memory.floats.get([buffer]);
                    for value in values {
                        *value = self.round(*value);
                    }
                }
            }
        }
    }
}

/// A constant in the loops' precision.
fn real<R: Float>(value: f64) -> R {
    R::from(value).expect("a float holds any constant")
}

fn dot<R: Float>(a: &[R], b: &[R]) -> R {
    a.iter().zip(b).fold(R::zero(), |sum, (&a, &b)| sum + a * b)
}

/// `y += scale * x`
fn add_scaled<R: Float>(y: &mut [R], scale: R, x: &[R]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y = *y + scale * x;
    }
}
