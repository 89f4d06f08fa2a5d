//! One page of measurements: the device's ceilings, each kernel as a share of its roofline, whole steps
//! beside PyTorch and beside what was predicted.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::kernels::KernelTiming;
use super::roofline::Ceiling;
use super::step::{Ceilings, Timing};

/// Measurements of one machine, in the order they were made.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Page {
    /// Device, in words.
    pub device: String,
    /// Version of laam.
    pub program: String,
    /// Day of the measurements, in UTC.
    pub date: String,
    /// Why some part is missing, for a person.
    pub notes: Vec<String>,
    /// Roofline ceilings of the device.
    pub ceilings: Vec<Ceiling>,
    /// Ops by themselves.
    pub kernels: Vec<KernelTiming>,
    /// Whole training steps.
    pub steps: Vec<StepRow>,
}

/// A training step of laam and of its peers.
#[derive(Clone, Debug, Serialize)]
pub struct StepRow {
    /// Timing of laam.
    pub laam: Timing,
    /// Optimizer of the matrices inside the blocks.
    pub optimizer: &'static str,
    /// PyTorch's tokens per second by the way it ran: eager, compile, graph.
    pub pytorch: Vec<(String, f64)>,
    /// Prediction for this device and shape.
    pub predicted: Option<Prediction>,
}

/// A step time that was predicted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prediction {
    /// Part of the device's name.
    pub device: String,
    /// Preset of the model's shape.
    pub preset: String,
    /// Windows per step.
    pub batch: usize,
    /// Predicted time of a step.
    pub milliseconds: f64,
    /// The least and the most that was thought likely.
    pub range: Option<[f64; 2]>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Predictions {
    step: Vec<Prediction>,
}

const PREDICTIONS: &str = include_str!("../../docs/predictions.toml");

impl Prediction {
    /// Prediction of a step, if there is one.
    pub fn of(timing: &Timing) -> Option<Self> {
        let known: Predictions =
            toml::from_str(PREDICTIONS).expect("docs/predictions.toml is valid");
        known.step.into_iter().find(|prediction| {
            timing.device.contains(&prediction.device)
                && timing.preset == prediction.preset
                && timing.batch == prediction.batch
        })
    }
}

/// A part of a page.
struct PageTable {
    title: &'static str,
    text: String,
    head: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Page {
    /// The share of its roofline that a kernel reaches: its rate at the ceiling that binds it.
    fn share(&self, kernel: &KernelTiming) -> Option<f64> {
        let ceilings = Ceilings::of(&self.ceilings)?;
        let bytes = 1e9 * kernel.gigabytes_per_second / ceilings.bytes;
        let flops = 1e12 * kernel.teraflops / ceilings.flops;
        Some(bytes.max(flops).max(kernel.exponentials_per_second / ceilings.exponentials))
    }

    fn tables(&self) -> Vec<PageTable> {
        let ceilings = self.ceilings.iter().map(|ceiling| {
            vec![
                ceiling.name.to_string(),
                format!("{:.2}", ceiling.value),
                ceiling.unit.to_string(),
            ]
        });
        let steps = self.steps.iter().map(|StepRow { laam, optimizer, pytorch, predicted }| {
            let best = pytorch.iter().max_by(|a, b| a.1.total_cmp(&b.1));
            vec![
                laam.preset.clone(),
                format!("{} x {}", laam.batch, laam.context),
                (*optimizer).to_string(),
                laam.precision.clone(),
                format!("{:.2}", 1e3 * laam.step_seconds),
                format!("{:.0}", laam.tokens_per_second),
                laam.mfu.map_or_else(String::new, |mfu| format!("{:.1}%", 100.0 * mfu)),
                best.map_or_else(String::new, |(how, speed)| format!("{speed:.0} ({how})")),
                best.map_or_else(String::new, |(_, speed)| {
                    format!("{:.2}", laam.tokens_per_second / speed)
                }),
                predicted.as_ref().map_or_else(String::new, |known| {
                    let range = known.range.map(|[least, most]| format!(" ({least} to {most})"));
                    format!("{}{}", known.milliseconds, range.unwrap_or_default())
                }),
            ]
        });
        let kernels = self.kernels.iter().map(|kernel| {
            vec![
                kernel.operation.to_string(),
                kernel.shape.clone(),
                kernel.dtype.to_string(),
                format!("{:.2}", 1e6 * kernel.seconds),
                format!("{:.1}", kernel.gigabytes_per_second),
                format!("{:.2}", kernel.teraflops),
                self.share(kernel)
                    .map_or_else(String::new, |share| format!("{:.0}%", 100.0 * share)),
            ]
        });
        vec![
            PageTable {
                title: "Training steps",
                text: "Forward, backward, clipping and the optimizer, on random tokens. PyTorch is the fastest of \
                       the ways it ran; MFU counts no recomputed work."
                    .to_string(),
                head: vec![
                    "model",
                    "batch",
                    "optimizer",
                    "dtype",
                    "ms",
                    "tokens/s",
                    "MFU",
                    "PyTorch, tokens/s",
                    "times as fast",
                    "predicted, ms",
                ],
                rows: steps.collect(),
            },
            PageTable {
                title: "Ceilings",
                text: "Measured on this device in this run.".to_string(),
                head: vec!["what", "value", "unit"],
                rows: ceilings.collect(),
            },
            PageTable {
                title: "Kernels",
                text: "Median of 11 runs; the share is of the roofline that the ceilings above make. Operands \
                       below 150 MB may come from cache."
                    .to_string(),
                head: vec!["operation", "shape", "dtype", "us", "GB/s", "TFLOP/s", "of roofline"],
                rows: kernels.collect(),
            },
        ]
    }

    fn about(&self) -> String {
        format!("{}, laam {}, {}. Command: `laam bench`.", self.device, self.program, self.date)
    }

    /// The page as Markdown.
    pub fn markdown(&self) -> String {
        let mut out = format!("# {}\n\n{}\n", self.device, self.about());
        // Writing to a String cannot fail.
        for note in &self.notes {
            let _ = writeln!(out, "\n- {note}");
        }
        for table in self.tables().iter().filter(|table| !table.rows.is_empty()) {
            let _ = writeln!(out, "\n## {}\n\n{}\n", table.title, table.text);
            let line = |cells: &[String]| format!("| {} |\n", cells.join(" | ").replace('\n', " "));
            let head: Vec<String> = table.head.iter().map(|&name| name.to_string()).collect();
            out += &line(&head);
            out += &line(&vec!["---".to_string(); head.len()]);
            out.extend(table.rows.iter().map(|row| line(row)));
        }
        out
    }

    /// The page as JSON, from which the HTML is made.
    pub fn json(&self) -> Value {
        let tables = self.tables();
        let tables = tables.iter().filter(|table| !table.rows.is_empty()).map(|table| {
            serde_json::json!({
                "title": table.title, "text": table.text, "head": table.head, "rows": table.rows,
            })
        });
        serde_json::json!({
            "device": self.device,
            "program": self.program,
            "date": self.date,
            "about": self.about(),
            "notes": self.notes,
            "tables": tables.collect::<Vec<_>>(),
            "ceilings": self.ceilings,
            "kernels": self.kernels,
            "steps": self.steps,
        })
    }
}

/// A file name for a device: letters, digits and dashes.
pub fn file_name(device: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
    let name: String = device.chars().map(plain).collect();
    name.split('-').filter(|part| !part.is_empty()).collect::<Vec<_>>().join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn predictions_are_found_by_device_preset_and_batch() {
        let known: Predictions = toml::from_str(PREDICTIONS).unwrap();
        assert!(known.step.len() >= 4);
        for prediction in &known.step {
            assert!(crate::model::preset(&prediction.preset).is_ok(), "{}", prediction.preset);
            let [least, most] = prediction.range.unwrap_or([prediction.milliseconds; 2]);
            assert!(least <= prediction.milliseconds && prediction.milliseconds <= most);
        }
    }

    #[test]
    fn device_names_become_file_names() {
        assert_eq!(
            file_name("NVIDIA H100 80GB HBM3, driver 580"),
            "NVIDIA-H100-80GB-HBM3-driver-580"
        );
        assert_eq!(file_name("../cpu (AVX2)"), "cpu-AVX2");
    }
}
