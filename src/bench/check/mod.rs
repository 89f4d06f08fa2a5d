//! Every operation of a backend against the f64 reference, one operation a program: fresh random
//! inputs, poisoned outputs, odd shapes, twice for the same bits.
//!
//! The bound is a rule: at most twice the error of the same operation in plain loops of the
//! backend's own precision (f32, rounding to bf16 or f16 where mixed precision does), and the
//! rounding of the output.

pub(super) mod cases;
mod draw;

use serde::Serialize;

use self::cases::Output;
use crate::backend::reference::Reference;
use crate::backend::{Arena, Backend, Feed};
use crate::dtype::Dtype;
use crate::error::error;
use crate::llama::ops::name_matches;

pub(super) use cases::Case;
pub use cases::{Size, operations};

/// One output of one operation at one shape.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub operation: &'static str,
    pub shape: String,
    pub output: String,
    /// ‖a − b‖ / ‖b‖ against f64; of indices, the share that differs. Not finite: never passes.
    pub error: f64,
    pub bound: f64,
    /// Whether a second run gave the same bits.
    pub repeats: bool,
    pub passed: bool,
}

/// What is checked.
#[derive(Clone, Debug)]
pub struct Selection<'a> {
    /// Operations whose names contain this; all by default.
    pub only: Option<&'a str>,
    pub size: Size,
    /// Of the random inputs.
    pub seed: u64,
}

/// Runs the grid, telling each row as it is known.
pub fn check(
    backend: &dyn Backend,
    selection: &Selection,
    mut tell: impl FnMut(&Row),
) -> anyhow::Result<Vec<Row>> {
    let dtype = backend.compute_dtype();
    let chosen = |name: &str| selection.only.is_none_or(|only| name_matches(name, only));
    if !operations().any(chosen) {
        return Err(error(
            format!("no operation is called {}, in --only", selection.only.unwrap_or_default()),
            format!("one of {}", operations().collect::<Vec<_>>().join(", ")),
        ));
    }
    let mut rows = Vec::new();
    for case in cases::grid(selection.size, dtype, selection.seed, chosen) {
        for row in one(backend, &case, dtype)? {
            tell(&row);
            rows.push(row);
        }
    }
    Ok(rows)
}

/// What an operation left, by output.
type Left = Vec<Vec<f32>>;

fn one(backend: &dyn Backend, case: &Case, dtype: Dtype) -> anyhow::Result<Vec<Row>> {
    let exact = Reference::F64;
    let plain = Reference::mixed(dtype);
    let (exact, plain) = (case.run(&exact, 1)?.remove(0), case.run(&plain, 1)?.remove(0));
    let mut both = case.run(backend, 2)?;
    let (again, got) = (both.remove(1), both.remove(0));

    let mut rows = Vec::new();
    for (at, output) in case.outputs.iter().enumerate() {
        let (error, bound) = match output {
            Output::Indices(_) => {
                (share(&got[at], &exact[at]), 2.0 * share(&plain[at], &exact[at]))
            }
            Output::Floats(_) | Output::Arena(..) => {
                let dtype = case.dtype_of(output, dtype);
                // The errors of a few numbers do not average.
                let few = if exact[at].len() < 16 { 4.0 } else { 1.0 };
                let bound = 2.0 * distance(&plain[at], &exact[at]) + few * unit(dtype);
                (distance(&got[at], &exact[at]), bound)
            }
        };
        let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        let repeats = bits(&got[at]) == bits(&again[at]);
        rows.push(Row {
            operation: case.operation,
            shape: case.shape.clone(),
            output: case.name(output),
            error,
            bound,
            repeats,
            passed: error <= bound && repeats,
        });
    }
    Ok(rows)
}

/// What rounding and approximate functions may cost an output, relative.
fn unit(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F32 => 8.0 / 2f64.powi(24),
        Dtype::F16 => 1.0 / 2f64.powi(11),
        Dtype::Bf16 => 1.0 / 2f64.powi(8),
    }
}

fn share(a: &[f32], b: &[f32]) -> f64 {
    let differ = a.iter().zip(b).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
    differ as f64 / b.len() as f64
}

/// ‖a − b‖ / ‖b‖. Inputs are of size one, so where b is nothing but the rounding of f64 (the
/// gradient of a weight that is always 1, say), a may be no more than f32's.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let square = |x: f64| x * x;
    let apart: f64 = a.iter().zip(b).map(|(&a, &b)| square(f64::from(a) - f64::from(b))).sum();
    let norm: f64 = b.iter().map(|&b| square(f64::from(b))).sum();
    let size = (b.len() as f64).sqrt();
    let norm = if norm.sqrt() < 1e-9 * size { size } else { norm.sqrt() };
    apart.sqrt() / norm
}

impl Case {
    /// Carries it out so many times on one session, each time from the same start.
    fn run(&self, backend: &dyn Backend, times: usize) -> anyhow::Result<Vec<Left>> {
        let mut session = backend.open(&self.layout, self.need)?;
        let program = session.load(self.program.clone())?;
        let mut left = Vec::new();
        for _ in 0..times {
            for (arena, values) in &self.arenas {
                session.write(*arena, values)?;
            }
            session.poison()?;
            session.run(program, &self.feed())?;
            let mut outputs = Vec::new();
            for output in &self.outputs {
                outputs.push(match output {
                    Output::Floats(buffer) => session.floats(program, *buffer)?,
                    Output::Indices(buffer) => {
                        session.indices(program, *buffer)?.into_iter().map(f32::from_bits).collect()
                    }
                    Output::Arena(arena, range) => session.read(*arena)?[range.clone()].to_vec(),
                });
            }
            left.push(outputs);
        }
        Ok(left)
    }

    /// Seconds of each of `runs` runs after `warmup` ones.
    pub(in crate::bench) fn seconds(
        &self,
        backend: &dyn Backend,
        warmup: usize,
        runs: usize,
    ) -> anyhow::Result<Vec<f64>> {
        let mut session = backend.open(&self.layout, self.need)?;
        let program = session.load(self.program.clone())?;
        for (arena, values) in &self.arenas {
            session.write(*arena, values)?;
        }
        let mut seconds = Vec::new();
        for run in 0..warmup + runs {
            let took = session.time(program, &self.feed())?;
            if run >= warmup {
                seconds.push(took);
            }
        }
        Ok(seconds)
    }

    fn feed(&self) -> Feed<'_> {
        Feed {
            indices: self.indices.iter().map(|(b, values)| (*b, values.as_slice())).collect(),
            floats: self.floats.iter().map(|(b, v)| (*b, v.as_slice().into())).collect(),
            loss_scale: 1.0,
            rates: self.rates,
        }
    }

    fn name(&self, output: &Output) -> String {
        match output {
            Output::Floats(buffer) | Output::Indices(buffer) => {
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
