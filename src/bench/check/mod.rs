//! Every operation of a backend against the f64 reference, one operation per program: fresh random
//! inputs, poisoned outputs, odd shapes, run twice for the same bits.
//!
//! The bound is a rule: at most twice the error of the same operation in plain loops of the
//! backend's own precision (f32, rounding to bf16 or f16 where mixed precision does), and the
//! rounding of the output. An output of a few numbers may cancel by chance, and scores in the
//! hundreds make a few rows of a softmax as sensitive: their rounding is relative to the terms that
//! cancel, which is how far the exact result moves when its inputs move by a few roundings of f32. A
//! logarithm is off by what its argument is off relatively, however small it is itself. An index may
//! be any that inputs a few roundings away give.

mod cases;
mod draw;

use serde::Serialize;
use sha2::{Digest, Sha256};

use self::cases::Output;
use crate::backend::reference::Reference;
use crate::backend::{Arena, Backend, Inputs, ProgramId, Session};
use crate::corpus::hex;
use crate::dtype::Dtype;
use crate::error;
use crate::llama::ops::name_matches;
use crate::random::{Philox, Stream};

pub use cases::{Case, Size, cases, operations};

/// One output of one operation at one shape.
#[derive(Clone, Debug, Serialize)]
pub struct CheckRow {
    /// Name of the op.
    pub operation: &'static str,
    /// Shape, in words.
    pub shape: String,
    /// Name of the output.
    pub output: String,
    /// ‖a − b‖ / ‖b‖ against f64; the share of indices that differ. Never passes if not finite.
    pub error: f64,
    /// Largest error that passes.
    pub bound: f64,
    /// A second run gave the same bits.
    pub repeats: bool,
    /// SHA-256 of the values as little-endian f32: equal if two devices compute the same bits.
    pub sha256: String,
    /// Repeats, with an error within the bound.
    pub passed: bool,
}

/// Cases that are checked.
#[derive(Clone, Debug)]
pub struct Selection<'a> {
    /// Operations whose names contain this; all by default.
    pub only: Option<&'a str>,
    /// Shapes that are checked.
    pub size: Size,
    /// Seed of the random inputs.
    pub seed: u64,
}

/// Runs every selected case; `on_row` is called for each row at once.
pub fn check(
    backend: &dyn Backend,
    selection: &Selection,
    mut on_row: impl FnMut(&CheckRow),
) -> anyhow::Result<Vec<CheckRow>> {
    let dtype = backend.compute_dtype();
    let chosen = |name: &str| selection.only.is_none_or(|only| name_matches(name, only));
    if !operations().any(chosen) {
        return Err(error::config(
            format!("unknown operation {}", selection.only.unwrap_or_default()),
            format!("use one of {}", operations().collect::<Vec<_>>().join(", ")),
        ));
    }
    let mut rows = Vec::new();
    for case in cases(selection.size, dtype, selection.seed, chosen) {
        let runs = case.run(backend, 2)?;
        for row in case.compare(dtype, &runs)? {
            on_row(&row);
            rows.push(row);
        }
    }
    Ok(rows)
}

/// Ops that a GPU must get right before it is chosen by itself: loads, shuffles, a matmul, tensor cores.
const SELF_CHECK: [&str; 4] = ["rms_norm", "linear", "attention", "fused_linear_cross_entropy"];
/// Most multiply-adds of a case of the self-check: the reference takes milliseconds.
const SELF_CHECK_FLOPS: usize = 1 << 20;

/// Checks a few small cases of some ops.
///
/// # Errors
/// For a wrong result, or if the backend fails.
pub fn self_check(backend: &dyn Backend) -> anyhow::Result<()> {
    let dtype = backend.compute_dtype();
    for op in SELF_CHECK {
        let small = |case: &Case| {
            let costs = case.program.costs(case.layout.len);
            costs.map(|(_, cost)| cost.flops).sum::<usize>() <= SELF_CHECK_FLOPS
        };
        let cases = cases(Size::Small, dtype, 0, |name| name == op).into_iter().filter(small);
        // The largest of the small ones: the first are degenerate shapes.
        let case = cases.max_by_key(|case| case.outputs.len() * case.layout.len);
        let case = case.ok_or_else(|| error::internal(format!("no small case of {op}")))?;
        let runs = case.run(backend, 1)?;
        if let Some(row) = case.compare(dtype, &runs)?.into_iter().find(|row| !row.passed) {
            return Err(error::device(
                format!(
                    "{} computes a wrong {} of {op} {}: error {:.1e}, bound {:.1e}",
                    backend.device(),
                    row.output,
                    row.shape,
                    row.error,
                    row.bound
                ),
                "laam check --backend cuda shows which ops are wrong",
            ));
        }
    }
    Ok(())
}

/// The values of each output of a case; indices by their bits.
pub type Outputs = Vec<Vec<f32>>;

/// Fewer numbers than these do not average their errors, and may all but cancel by chance.
const FEW: usize = 16;
/// Inputs near a case's own, which show how far its exact result moves.
const NEIGHBORS: u32 = 16;
/// The most an input of a neighbor is off, relative: 16 roundings of f32.
const NEAR: f64 = 1.0 / (1 << 20) as f64;

/// Relative error of the output's rounding and of approximate functions.
fn unit(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F32 => 8.0 / 2f64.powi(24),
        Dtype::F16 => 1.0 / 2f64.powi(11),
        Dtype::Bf16 => 1.0 / 2f64.powi(8),
    }
}

/// The share of `a` that is in none of `allowed`, by bits.
fn share(a: &[f32], allowed: &[&[f32]]) -> f64 {
    let is_known = |at: usize| allowed.iter().any(|b| a[at].to_bits() == b[at].to_bits());
    (0..a.len()).filter(|&at| !is_known(at)).count() as f64 / a.len() as f64
}

/// ‖a − b‖ / ‖b‖
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let square = |(&a, &b): (&f32, &f32)| (f64::from(a) - f64::from(b)).powi(2);
    a.iter().zip(b).map(square).sum::<f64>().sqrt() / size(b)
}

/// ‖b‖. Inputs are of size one, so an output that is nothing but the rounding of f64 (the gradient
/// of a weight that is always 1, say) counts as ones.
fn size(b: &[f32]) -> f64 {
    let norm = b.iter().map(|&b| f64::from(b).powi(2)).sum::<f64>().sqrt();
    if norm < 1e-9 * ones(b) { ones(b) } else { norm }
}

/// The norm of as many ones.
fn ones(b: &[f32]) -> f64 {
    (b.len() as f64).sqrt()
}

impl Case {
    /// A row for each output of the first of `runs`, all of which must have the same bits.
    pub fn compare(&self, dtype: Dtype, runs: &[Outputs]) -> anyhow::Result<Vec<CheckRow>> {
        let exact = self.run(&Reference::F64, 1)?.remove(0);
        let plain = self.run(&Reference::mixed(dtype), 1)?.remove(0);
        let got = &runs[0];
        let mut neighbors = None;
        let mut rows = Vec::new();
        for (at, output) in self.outputs.iter().enumerate() {
            let (got, exact, plain) = (&got[at], &exact[at], &plain[at]);
            let few = exact.len() < FEW;
            let averages = !few && self.errors_average;
            let is_index = matches!(output, Output::Indices(_));
            let (mut error, mut bound) = if is_index {
                (share(got, &[exact]), 2.0 * share(plain, &[exact]))
            } else {
                // The errors of a few numbers do not average.
                let rounding = unit(self.dtype_of(output, dtype)) * if few { 4.0 } else { 1.0 };
                (distance(got, exact), 2.0 * distance(plain, exact) + rounding)
            };
            if error > bound && (!averages || is_index) {
                let neighbors = match &mut neighbors {
                    Some(known) => known,
                    none => none.insert(self.neighbors()?),
                };
                let mut near: Vec<&[f32]> = neighbors.iter().map(|outputs| &*outputs[at]).collect();
                if is_index {
                    near.push(exact);
                    error = share(got, &near);
                } else {
                    let squares: f64 = near.iter().map(|near| distance(near, exact).powi(2)).sum();
                    let moved = (squares / near.len() as f64).sqrt();
                    let logarithm = match output {
                        Output::Logarithms(_) => 4.0 * unit(Dtype::F32) * ones(exact) / size(exact),
                        _ => 0.0,
                    };
                    bound = bound.max(2.0 * distance(plain, exact) + moved.max(logarithm));
                }
            }
            let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            let repeats = runs.iter().all(|run| bits(&run[at]) == bits(got));
            rows.push(CheckRow {
                operation: self.operation,
                shape: self.shape.clone(),
                output: self.name(output),
                error,
                bound,
                repeats,
                sha256: hex(&Sha256::digest(bytemuck::cast_slice::<f32, u8>(got))),
                passed: error <= bound && repeats,
            });
        }
        Ok(rows)
    }

    /// The exact results for inputs a few roundings of f32 away. Equal values stay equal: what is
    /// the first of equals stays so, and terms that always cancel still do.
    fn neighbors(&self) -> anyhow::Result<Vec<Outputs>> {
        let random = Philox::new(0, Stream::Test);
        let run = |draw: u32| {
            let mut near = self.clone();
            let floats = near.floats.iter_mut().map(|(_, values)| values);
            for values in floats.chain(near.arenas.iter_mut().map(|(_, values)| values)) {
                for value in values {
                    let moved = 2.0 * random.uniform(draw, value.to_bits().into()) - 1.0;
                    *value = (f64::from(*value) * (1.0 + NEAR * moved)) as f32;
                }
            }
            Ok(near.run(&Reference::F64, 1)?.remove(0))
        };
        (0..NEIGHBORS).map(run).collect()
    }

    /// The outputs of `times` runs in one session, each time from the same start.
    pub fn run(&self, backend: &dyn Backend, times: usize) -> anyhow::Result<Vec<Outputs>> {
        let mut session = backend.open(&self.layout, self.spec)?;
        let program = session.load(self.program.clone())?;
        let mut runs = Vec::new();
        for _ in 0..times {
            for (arena, values) in &self.arenas {
                session.write(*arena, values)?;
            }
            session.poison()?;
            session.run(program, &self.inputs())?;
            let mut outputs = Vec::new();
            for output in &self.outputs {
                outputs.push(match output {
                    Output::Floats(buffer) | Output::Logarithms(buffer) => {
                        session.floats(program, *buffer)?
                    }
                    Output::Indices(buffer) => {
                        session.indices(program, *buffer)?.into_iter().map(f32::from_bits).collect()
                    }
                    Output::Arena(arena, range) => session.read(*arena)?[range.clone()].to_vec(),
                });
            }
            runs.push(outputs);
        }
        Ok(runs)
    }

    /// Opens a session that holds the case's arenas and program.
    pub fn prepare(&self, backend: &dyn Backend) -> anyhow::Result<Prepared<'_>> {
        let mut session = backend.open(&self.layout, self.spec)?;
        let program = session.load(self.program.clone())?;
        for (arena, values) in &self.arenas {
            session.write(*arena, values)?;
        }
        Ok(Prepared { case: self, session, program })
    }

    fn inputs(&self) -> Inputs<'_> {
        Inputs {
            indices: self.indices.iter().map(|(b, values)| (*b, values.as_slice())).collect(),
            floats: self.floats.iter().map(|(b, v)| (*b, v.as_slice().into())).collect(),
            loss_scale: 1.0,
            hyperparams: self.hyperparams,
        }
    }

    fn name(&self, output: &Output) -> String {
        match output {
            Output::Floats(buffer) | Output::Logarithms(buffer) | Output::Indices(buffer) => {
                self.program.info(*buffer).name.clone()
            }
            Output::Arena(arena, _) => match arena {
                Arena::Parameters => "parameters",
                Arena::Gradients => "d weight",
                Arena::FirstMoment => "first moment",
                Arena::SecondMoment => "second moment",
                Arena::Cache => "cache",
            }
            .into(),
        }
    }

    fn dtype_of(&self, output: &Output, dtype: Dtype) -> Dtype {
        match output {
            Output::Floats(buffer) if self.program.info(*buffer).kind.size(2) == 2 => dtype,
            Output::Arena(Arena::Cache, _) => dtype,
            _ => Dtype::F32,
        }
    }
}

/// A case in a session of its own, to be timed.
pub struct Prepared<'a> {
    case: &'a Case,
    session: Box<dyn Session>,
    program: ProgramId,
}

impl Prepared<'_> {
    /// Seconds of one run by the device's clock.
    pub fn time(&mut self) -> anyhow::Result<f64> {
        self.session.time(self.program, &self.case.inputs())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::SessionSpec;
    use crate::llama::Program;
    use crate::model::Layout;

    /// Claims f32 and rounds to bf16.
    struct Wrong;

    impl Backend for Wrong {
        fn name(&self) -> &'static str {
            "wrong"
        }
        fn device(&self) -> String {
            "a wrong device".to_string()
        }
        fn open(&self, layout: &Layout, spec: SessionSpec) -> anyhow::Result<Box<dyn Session>> {
            Reference::mixed(Dtype::Bf16).open(layout, spec)
        }
        fn micro_batch(&self, batch: usize, _: usize) -> usize {
            batch
        }
        fn workspace_bytes(&self, _: &[&Program]) -> usize {
            0
        }
    }

    #[test]
    fn self_check_refuses_a_backend_that_is_off() {
        self_check(&Reference::F32).unwrap();
        let said = self_check(&Wrong).unwrap_err().to_string();
        assert!(said.contains("a wrong device computes a wrong"), "{said}");
    }
}
