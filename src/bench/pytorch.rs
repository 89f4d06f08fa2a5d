//! PyTorch's time of the same training step, measured by `benches/pytorch/step.py`.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::step::Timing;
use crate::files;

const SCRIPT: &str = include_str!("../../benches/pytorch/step.py");
/// The longest that one measurement may take.
const LIMIT: Duration = Duration::from_mins(2);
const MAX_OUTPUT_BYTES: u64 = 1 << 20;

/// A Python with torch and transformers.
pub struct PyTorch {
    python: PathBuf,
    /// Holds the script and its output.
    folder: PathBuf,
    on_gpu: bool,
}

impl PyTorch {
    /// Looks for torch, and on a GPU for one that sees it.
    ///
    /// # Errors
    /// A sentence that says what is missing.
    pub fn find(python: &Path, folder: &Path, on_gpu: bool) -> Result<Self, String> {
        let probe = if on_gpu {
            "import torch, transformers, sys; sys.exit(not torch.cuda.is_available())"
        } else {
            "import torch, transformers"
        };
        let mut command = Command::new(python);
        let done = command.args(["-c", probe]).stdout(Stdio::null()).stderr(Stdio::null()).status();
        if !done.is_ok_and(|status| status.success()) {
            return Err(format!(
                "PyTorch was not measured: {} has no torch and transformers{} (--python names another)",
                python.display(),
                if on_gpu { " that see the GPU" } else { "" }
            ));
        }
        let found = Self { python: python.to_path_buf(), folder: folder.to_path_buf(), on_gpu };
        std::fs::write(found.script(), SCRIPT).map_err(|why| why.to_string())?;
        Ok(found)
    }

    fn script(&self) -> PathBuf {
        self.folder.join("step.py")
    }

    /// Tokens per second of the same step, `how` PyTorch runs it.
    ///
    /// # Errors
    /// The last line of what it printed, or that it took too long.
    pub fn tokens_per_second(
        &self,
        timing: &Timing,
        how: &str,
        threads: usize,
    ) -> Result<f64, String> {
        let output = self.folder.join("step.json");
        let file = std::fs::File::create(&output).map_err(|why| why.to_string())?;
        let mut command = Command::new(&self.python);
        command.arg(self.script()).args(["--preset", &timing.preset, "--dtype", &timing.precision]);
        command.args(["--batch", &timing.batch.to_string(), "--how", how]);
        command.args(["--context", &timing.context.to_string()]);
        if self.on_gpu {
            command.args(["--device", "cuda", "--warmup", "5", "--steps", "20"]);
        } else {
            command.args(["--threads", &threads.to_string(), "--warmup", "1", "--steps", "2"]);
        }
        let child = command
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(file)
            .stderr(Stdio::null())
            .spawn();
        let mut child = child.map_err(|why| why.to_string())?;
        let began = Instant::now();
        while child.try_wait().map_err(|why| why.to_string())?.is_none() {
            if began.elapsed() > LIMIT {
                // SAFETY: the process group is the child's own, and holds what the script started.
                unsafe { libc::kill(-child.id().cast_signed(), libc::SIGKILL) };
                let _ = child.wait();
                return Err(format!("took more than {} s", LIMIT.as_secs()));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let text = files::read_text(&output, MAX_OUTPUT_BYTES).map_err(|why| why.to_string())?;
        let line: Value = text
            .lines()
            .next()
            .and_then(|line| serde_json::from_str(line).ok())
            .ok_or("printed no measurement")?;
        line["tokens_per_second"]
            .as_f64()
            .ok_or_else(|| line["error"].as_str().unwrap_or("no measurement").to_string())
    }
}
