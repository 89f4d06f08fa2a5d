//! Matmuls through cuBLASLt: one plan per shape, made on first use.
//!
//! The algorithm that cuBLASLt's heuristic returns decides the bits of the result, and may change with
//! its version or the GPU. So a checkpoint stores the algorithms as [`PinnedPlans`], and a resumed run
//! uses them. [`super::tuning`] chooses among several by their times.

use std::collections::HashMap;
use std::ffi::c_void;

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use cudarc::driver::sys::CUstream;
use serde::{Deserialize, Serialize};

use super::super::{Matmul, Matrix};
use crate::dtype::Dtype;
use crate::error;

/// The process's cuBLASLt handle, a workspace per stream, and the plans made so far.
pub(super) struct CublasLt {
    handle: sys::cublasLtHandle_t,
    /// Place of twice [`CublasLt::WORKSPACE_BYTES`] that live as long as the device: matmuls of the side stream
    /// may run beside those of the stream.
    workspaces: u64,
    /// `None` for a matmul that cuBLASLt has no algorithm for.
    plans: HashMap<MatmulKey, Option<MatmulPlan>>,
}

/// The algorithm of each matmul.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct PinnedPlans {
    /// Version of cuBLASLt, which alone can read its algorithms.
    pub version: usize,
    #[serde(alias = "products")]
    pub matmuls: Vec<(MatmulKey, Algorithm)>,
}

/// An algorithm in cuBLASLt's own opaque encoding.
pub(super) type Algorithm = [u64; 8];

/// Everything a plan depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(super) struct MatmulKey {
    a: Operand,
    b: Operand,
    c: Operand,
    #[serde(alias = "add")]
    accumulate: bool,
    batch: usize,
}

impl MatmulKey {
    pub fn of(matmul: &Matmul) -> MatmulKey {
        let Matmul { a, b, c, accumulate, batch } = *matmul;
        let operand = |matrix| Operand::of(matrix, batch);
        MatmulKey { a: operand(a), b: operand(b), c: operand(c), accumulate, batch }
    }
}

/// A matrix by shape and alignment instead of address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
struct Operand {
    #[serde(alias = "ty")]
    dtype: Dtype,
    rows: usize,
    cols: usize,
    /// 0 in checkpoints of earlier versions: no gaps.
    #[serde(default)]
    stride: usize,
    transposed: bool,
    alignment: u32,
}

impl Operand {
    /// The operand of a matmul with `batch` matrices.
    fn of(matrix: Matrix, batch: usize) -> Operand {
        let Matrix { at, dtype, rows, cols, stride, transposed } = matrix;
        let next = if batch > 1 { (rows * stride * dtype.size()).trailing_zeros() } else { 8 };
        let alignment = at.alignment().min(1 << next.min(8)) as u32;
        let stride = if stride == cols { 0 } else { stride };
        Operand { dtype, rows, cols, stride, transposed, alignment }
    }

    /// Elements from one row to the next.
    fn row_stride(&self) -> usize {
        if self.stride == 0 { self.cols } else { self.stride }
    }
}

/// cuBLASLt's descriptors and the algorithm.
struct MatmulPlan {
    descriptors: Descriptors,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

/// cuBLASLt's descriptors of a matmul; null until created.
struct Descriptors {
    description: sys::cublasLtMatmulDesc_t,
    first: sys::cublasLtMatrixLayout_t,
    second: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        // SAFETY: each descriptor was created by this plan and is destroyed once.
        unsafe {
            if !self.description.is_null() {
                let _ = result::destroy_matmul_desc(self.description);
            }
            for layout in [self.first, self.second, self.out] {
                if !layout.is_null() {
                    let _ = result::destroy_matrix_layout(layout);
                }
            }
        }
    }
}

impl CublasLt {
    /// Workspace of cuBLASLt: the 32 MiB that NVIDIA recommends for Hopper. It is the same on every GPU,
    /// because the choice of an algorithm depends on it.
    pub const WORKSPACE_BYTES: usize = 32 << 20;

    pub fn new(handle: sys::cublasLtHandle_t, workspaces: u64) -> CublasLt {
        CublasLt { handle, workspaces, plans: HashMap::new() }
    }

    /// Version of the cuBLASLt that was found.
    pub fn version() -> usize {
        // SAFETY: the call takes no arguments, and the library is loaded: callers check `cublaslt()`.
        unsafe { sys::cublasLtGetVersion() }
    }

    /// The algorithms chosen so far.
    pub fn plans(&self) -> PinnedPlans {
        let chosen = |(key, plan): (&MatmulKey, &Option<MatmulPlan>)| {
            Some((*key, plan.as_ref()?.algorithm.data))
        };
        let mut matmuls: Vec<_> = self.plans.iter().filter_map(chosen).collect();
        matmuls.sort_unstable();
        PinnedPlans { version: Self::version(), matmuls }
    }

    /// Uses these algorithms from now on, and returns how many of them cuBLASLt refuses for their
    /// matmul: they come from a file, and their driver or GPU may have been another.
    pub fn pin(&mut self, plans: PinnedPlans) -> usize {
        self.plans.clear();
        let mut refused = 0;
        for (key, algorithm) in plans.matmuls {
            match plan(self.handle, &key, Some(&algorithm)) {
                Ok(plan) => {
                    self.plans.insert(key, Some(plan));
                }
                Err(_) => refused += 1,
            }
        }
        refused
    }

    /// Whether there is no plan for a matmul yet.
    pub fn is_new(&self, matmul: &Matmul) -> bool {
        !self.plans.contains_key(&MatmulKey::of(matmul))
    }

    /// The first algorithms of the heuristic for a matmul, at most `count`.
    pub fn candidates(&self, matmul: &Matmul, count: usize) -> anyhow::Result<Vec<Algorithm>> {
        let descriptors = describe(&MatmulKey::of(matmul)).map_err(planning_failed(matmul))?;
        let found = heuristics(self.handle, &MatmulKey::of(matmul), &descriptors, count);
        Ok(found.map_err(planning_failed(matmul))?.iter().map(|algorithm| algorithm.data).collect())
    }

    /// Uses an algorithm for a matmul from now on; false if cuBLASLt refuses it.
    pub fn choose(&mut self, matmul: &Matmul, algorithm: &Algorithm) -> bool {
        let key = MatmulKey::of(matmul);
        let chosen = plan(self.handle, &key, Some(algorithm));
        chosen.is_ok_and(|plan| {
            self.plans.insert(key, Some(plan));
            true
        })
    }

    /// Leaves the choice for a matmul open again.
    pub fn forget(&mut self, matmul: &Matmul) {
        self.plans.remove(&MatmulKey::of(matmul));
    }

    /// Takes the heuristic's first algorithm for a matmul without a plan, if there is one.
    pub fn plan(&mut self, matmul: &Matmul) -> anyhow::Result<()> {
        let key = MatmulKey::of(matmul);
        if !self.plans.contains_key(&key) {
            let plan = match plan(self.handle, &key, None) {
                Ok(plan) => Some(plan),
                Err(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)) => None,
                Err(e) => return Err(planning_failed(matmul)(e)),
            };
            self.plans.insert(key, plan);
        }
        Ok(())
    }

    /// Executes a matmul of matrices at these places, by [`Matmul::places`]; false if cuBLASLt has no
    /// algorithm for it. cuBLASLt is column-major, and a row-major `[rows, cols]` matrix is its column-major
    /// transpose, so it computes `cT = bT aT` without copies.
    pub fn run(
        &mut self,
        matmul: &Matmul,
        places: [u64; 3],
        stream: CUstream,
        is_side: bool,
    ) -> anyhow::Result<bool> {
        let (m, n, k) = matmul.check()?;
        self.plan(matmul)?;
        let plan = &self.plans[&MatmulKey::of(matmul)];
        let Some(MatmulPlan { descriptors, algorithm }) = plan else {
            return Ok(false);
        };
        let (alpha, beta) = (1.0f32, if matmul.accumulate { 1.0f32 } else { 0.0 });
        let [a, b, c] = places.map(|place| place as *mut c_void);
        let workspace = self.workspaces + if is_side { Self::WORKSPACE_BYTES as u64 } else { 0 };
        // SAFETY: the descriptors were created for exactly these shapes and live as long as the plan;
        // `alpha` and `beta` are read before the call returns; all elements of the matrices and the
        // workspace are in live allocations.
        unsafe {
            result::matmul(
                self.handle,
                descriptors.description,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                b,
                descriptors.first,
                a,
                descriptors.second,
                c,
                descriptors.out,
                c,
                descriptors.out,
                std::ptr::from_ref(algorithm),
                workspace as *mut c_void,
                Self::WORKSPACE_BYTES,
                stream.cast(),
            )
        }
        .map_err(|e| failed(&format!("a matmul of {m} x {k} by {k} x {n}"), e))?;
        Ok(true)
    }
}

fn planning_failed(matmul: &Matmul) -> impl Fn(CublasError) -> anyhow::Error {
    let ((m, k), (_, n)) = (matmul.a.shape(), matmul.b.shape());
    move |why| failed(&format!("planning a matmul of {m} x {k} by {k} x {n}"), why)
}

/// cuBLASLt's descriptors of a matmul.
fn describe(key: &MatmulKey) -> Result<Descriptors, CublasError> {
    use sys::cublasLtMatmulDescAttributes_t as Describe;

    let mut descriptors = Descriptors {
        description: std::ptr::null_mut(),
        first: std::ptr::null_mut(),
        second: std::ptr::null_mut(),
        out: std::ptr::null_mut(),
    };
    descriptors.description = result::create_matmul_desc(
        sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
        sys::cudaDataType_t::CUDA_R_32F,
    )?;
    for (attribute, operand) in [
        (Describe::CUBLASLT_MATMUL_DESC_TRANSA, key.b),
        (Describe::CUBLASLT_MATMUL_DESC_TRANSB, key.a),
    ] {
        // cublasOperation_t: N is 0, T is 1.
        let operation = i32::from(operand.transposed);
        // SAFETY: the attribute is an i32, which is read before the call returns.
        unsafe {
            result::set_matmul_desc_attribute(
                descriptors.description,
                attribute,
                (&raw const operation).cast(),
                size_of::<i32>(),
            )?;
        }
    }
    let layout = |layout: &mut sys::cublasLtMatrixLayout_t, operand: Operand| {
        use sys::cublasLtMatrixLayoutAttribute_t as Attribute;
        *layout = result::create_matrix_layout(
            data_type(operand.dtype),
            operand.cols as u64,
            operand.rows as u64,
            operand.row_stride() as i64,
        )?;
        if key.batch > 1 {
            let (count, stride) = (key.batch as i32, (operand.rows * operand.row_stride()) as i64);
            // SAFETY: the attributes are an i32 and an i64, which are read before the call returns.
            unsafe {
                result::set_matrix_layout_attribute(
                    *layout,
                    Attribute::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT,
                    (&raw const count).cast(),
                    size_of::<i32>(),
                )?;
                result::set_matrix_layout_attribute(
                    *layout,
                    Attribute::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                    (&raw const stride).cast(),
                    size_of::<i64>(),
                )?;
            }
        }
        Ok::<_, CublasError>(())
    };
    layout(&mut descriptors.first, key.b)?;
    layout(&mut descriptors.second, key.a)?;
    layout(&mut descriptors.out, key.c)?;
    Ok(descriptors)
}

/// A plan with a given algorithm, or with the first of the heuristic.
fn plan(
    handle: sys::cublasLtHandle_t,
    key: &MatmulKey,
    pinned: Option<&Algorithm>,
) -> Result<MatmulPlan, CublasError> {
    let descriptors = describe(key)?;
    let (description, first, second, out) =
        (descriptors.description, descriptors.first, descriptors.second, descriptors.out);
    if let Some(&data) = pinned {
        let algorithm = sys::cublasLtMatmulAlgo_t { data };
        let mut result = sys::cublasLtMatmulHeuristicResult_t {
            algo: algorithm,
            workspaceSize: 0,
            state: sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS,
            wavesCount: 0.0,
            reserved: [0; 4],
        };
        // It comes from a file, so cuBLASLt validates it for this matmul.
        // SAFETY: all descriptors were created above; `result` outlives the call.
        unsafe {
            sys::cublasLtMatmulAlgoCheck(
                handle,
                description,
                first,
                second,
                out,
                out,
                &raw const algorithm,
                &raw mut result,
            )
        }
        .result()?;
        if result.workspaceSize > CublasLt::WORKSPACE_BYTES {
            return Err(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED));
        }
        return Ok(MatmulPlan { descriptors, algorithm });
    }

    let algorithm = heuristics(handle, key, &descriptors, 1)?[0];
    Ok(MatmulPlan { descriptors, algorithm })
}

/// The first algorithms of the heuristic, at least one and at most `count`.
fn heuristics(
    handle: sys::cublasLtHandle_t,
    key: &MatmulKey,
    descriptors: &Descriptors,
    count: usize,
) -> Result<Vec<sys::cublasLtMatmulAlgo_t>, CublasError> {
    use sys::cublasLtMatmulPreferenceAttributes_t as Prefer;

    let preference = Preference(result::create_matmul_pref()?);
    let workspace = CublasLt::WORKSPACE_BYTES;
    // SAFETY: the attribute is a usize, which is read before the call returns.
    unsafe {
        result::set_matmul_pref_attribute(
            preference.0,
            Prefer::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
            (&raw const workspace).cast(),
            size_of::<usize>(),
        )?;
    }
    let mut numbers = vec![
        (Prefer::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, key.b.alignment),
        (Prefer::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, key.a.alignment),
        (Prefer::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, key.c.alignment),
        (Prefer::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, key.c.alignment),
    ];
    if key.c.dtype != Dtype::F32 {
        // A matmul is summed in f32 and rounded once: no partial sums in the output's dtype.
        let in_f32 = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        numbers.push((Prefer::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, in_f32));
    }
    for (attribute, number) in numbers {
        // SAFETY: the attribute is a u32, which is read before the call returns.
        unsafe {
            result::set_matmul_pref_attribute(
                preference.0,
                attribute,
                (&raw const number).cast(),
                size_of::<u32>(),
            )?;
        }
    }
    let none = sys::cublasLtMatmulHeuristicResult_t {
        algo: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
        workspaceSize: 0,
        state: sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS,
        wavesCount: 0.0,
        reserved: [0; 4],
    };
    let mut found = vec![none; count];
    let mut returned = 0;
    let Descriptors { description, first, second, out } = *descriptors;
    // SAFETY: all descriptors and the preference exist; `found` has room for `count` results.
    unsafe {
        sys::cublasLtMatmulAlgoGetHeuristic(
            handle,
            description,
            first,
            second,
            out,
            out,
            preference.0,
            count as i32,
            found.as_mut_ptr(),
            &raw mut returned,
        )
    }
    .result()?;
    found.truncate(usize::try_from(returned).unwrap_or(0));
    found.retain(|result| result.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS);
    if found.is_empty() {
        return Err(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED));
    }
    Ok(found.into_iter().map(|result| result.algo).collect())
}

/// cuBLASLt's preference of a heuristic.
struct Preference(sys::cublasLtMatmulPreference_t);

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: it was created once and is destroyed once.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

fn data_type(dtype: Dtype) -> sys::cudaDataType_t {
    match dtype {
        Dtype::F32 => sys::cudaDataType_t::CUDA_R_32F,
        Dtype::F16 => sys::cudaDataType_t::CUDA_R_16F,
        Dtype::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
    }
}

pub(super) fn failed(what: &str, why: CublasError) -> anyhow::Error {
    error::device(
        format!("{what}: cuBLASLt returned {:?}", why.0),
        "laam doctor shows which libraries were found",
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn plans_survive_a_checkpoint() {
        let operand = |rows, cols, dtype| Operand {
            dtype,
            rows,
            cols,
            stride: rows,
            transposed: rows > 3,
            alignment: 256,
        };
        let key = |rows| MatmulKey {
            a: operand(rows, 4, Dtype::Bf16),
            b: operand(4, 5, Dtype::F16),
            c: operand(rows, 5, Dtype::F32),
            accumulate: rows == 2,
            batch: 3,
        };
        // Integers that a JSON reader of f64 would round.
        let matmuls = vec![(key(2), [u64::MAX; 8]), (key(7), [1 << 63 | 1; 8])];
        let plans = PinnedPlans { version: 130_000, matmuls };
        let text = serde_json::to_value(&plans).unwrap().to_string();
        assert_eq!(serde_json::from_str::<PinnedPlans>(&text).unwrap(), plans);
    }

    #[test]
    fn plans_of_earlier_checkpoints_are_read() {
        let side = |ty: &str| json!({ "ty": ty, "rows": 2, "cols": 2, "transposed": false, "alignment": 256 });
        let key = json!({ "a": side("bf16"), "b": side("f16"), "c": side("f32"), "add": true, "batch": 1 });
        let old = json!({ "version": 120_000, "products": [[key, [1, 2, 3, 4, 5, 6, 7, 8]]] });
        let plans: PinnedPlans = serde_json::from_value(old).unwrap();
        let (key, algorithm) = plans.matmuls[0];
        assert_eq!((key.a.dtype, key.b.dtype, key.c.dtype), (Dtype::Bf16, Dtype::F16, Dtype::F32));
        assert!(key.accumulate && algorithm == [1, 2, 3, 4, 5, 6, 7, 8]);
    }
}
