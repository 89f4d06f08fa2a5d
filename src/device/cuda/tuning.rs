//! Choice among cuBLASLt's algorithms by their times, kept in a file per GPU and version of cuBLASLt: later
//! runs on the same GPU compute the same bits.

use std::path::{Path, PathBuf};

use super::cublaslt::{Algorithm, CublasLt, MatmulKey, PinnedPlans};
use super::{Cuda, failed, seconds_between};
use crate::device::{Device, Matmul, Matrix};
use crate::files::{self, AtomicFile, write_atomically};

/// Algorithms that are timed per matmul.
const CANDIDATES: usize = 8;
/// Timed calls of each, after one that is not timed.
const CALLS: usize = 3;
/// Limit on the bytes of the file.
const MAX_FILE_BYTES: u64 = 16 << 20;

/// The file with the choices for a GPU.
pub(super) fn file(folder: &Path, gpu: &str) -> PathBuf {
    let name = gpu.replace(|c: char| !c.is_ascii_alphanumeric(), "-");
    folder.join(format!("{name}-cublaslt-{}.json", CublasLt::version()))
}

/// The choices of earlier runs; none if there is no file that can be read.
pub(super) fn earlier(path: &Path) -> Option<PinnedPlans> {
    let plans: PinnedPlans =
        serde_json::from_str(&files::read_text(path, MAX_FILE_BYTES).ok()?).ok()?;
    (plans.version == CublasLt::version()).then_some(plans)
}

/// Adds a choice to those of the file, which other runs write too.
fn keep(path: &Path, matmul: MatmulKey, algorithm: Algorithm) -> anyhow::Result<()> {
    let mut plans = earlier(path).unwrap_or_default();
    plans.version = CublasLt::version();
    plans.matmuls.retain(|(other, _)| *other != matmul);
    plans.matmuls.push((matmul, algorithm));
    plans.matmuls.sort_unstable();
    write_atomically(path, &serde_json::to_vec(&plans)?)
}

/// A line on a folder that no choice can be kept in.
pub(super) fn note(folder: &Path) -> Option<String> {
    let probe = AtomicFile::create(&folder.join("probe"));
    probe.is_err().then(|| {
        format!(
            "warning: the choice of matmul algorithms cannot be kept in {}: each run times them again, and its bits \
             depend on that; set LAAM_CACHE to a writable folder",
            folder.display()
        )
    })
}

impl Cuda {
    /// Times the algorithms for a matmul without a plan, uses the fastest from now on, and writes it down.
    pub(super) fn tune(&mut self, matmul: &Matmul, path: &Path) -> anyhow::Result<()> {
        let Some(cublaslt) = self.cublaslt()? else { return Ok(()) };
        let candidates = match cublaslt.candidates(matmul, CANDIDATES) {
            Ok(candidates) if candidates.len() > 1 => candidates,
            // The heuristic's only one, or none: as without tuning.
            _ => return Ok(()),
        };
        let Matrix { rows, stride, dtype, at, .. } = matmul.c;
        // An output of its own with the same alignment: candidates may not accumulate into the real one.
        let alignment = at.alignment();
        let bytes = matmul.batch * rows * stride * dtype.size();
        // Without the memory the heuristic's choice stays.
        let Ok(scratch) = self.alloc(bytes + alignment) else { return Ok(()) };
        self.memset(scratch, 0, bytes + alignment)?;
        let offset = if alignment == 256 { 0 } else { alignment };
        let c = Matrix { at: scratch.plus(offset), ..matmul.c };
        let trial = Matmul { c, ..*matmul };
        // One that fails when it runs is not chosen.
        let timed = candidates.into_iter().filter_map(|algorithm| {
            let seconds = self.time_algorithm(&trial, &algorithm).ok()?;
            seconds.is_finite().then_some((seconds, algorithm))
        });
        let fastest = timed.min_by(|a, b| a.0.total_cmp(&b.0));
        self.free(scratch)?;
        let Some(cublaslt) = self.cublaslt()? else { return Ok(()) };
        let Some((_, algorithm)) = fastest else {
            cublaslt.forget(matmul);
            return Ok(());
        };
        cublaslt.choose(matmul, &algorithm);
        // Where it cannot be kept, `Device::notes` has said so, and the next run times it again.
        let _ = keep(path, MatmulKey::of(matmul), algorithm);
        Ok(())
    }

    /// Seconds of [`CALLS`] calls; infinite for an algorithm that cuBLASLt refuses.
    fn time_algorithm(&mut self, matmul: &Matmul, algorithm: &Algorithm) -> anyhow::Result<f64> {
        let (stream, places) = (self.stream.cu_stream(), matmul.places(&mut self.allocations)?);
        let Some(cublaslt) = self.cublaslt()? else { return Ok(f64::INFINITY) };
        if !cublaslt.choose(matmul, algorithm) {
            return Ok(f64::INFINITY);
        }
        cublaslt.run(matmul, places, stream, false)?;
        let start = self.mark()?;
        for _ in 0..CALLS {
            if let Some(cublaslt) = self.cublaslt()? {
                cublaslt.run(matmul, places, stream, false)?;
            }
        }
        let end = self.mark()?;
        seconds_between(&start, &end).map_err(|e| failed("timing events", e))
    }
}
