//! Matrix products by cuBLASLt: a plan for each shape, made once and kept.
//!
//! Which of its algorithms cuBLASLt advises decides the bits of a product, and may change with its
//! version or the card. So plans can be told as [`Choices`] and kept to by a later run.

use std::collections::HashMap;
use std::ffi::c_void;

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use cudarc::driver::sys::CUstream;
use serde::{Deserialize, Serialize};

use super::super::{Address, Matrix, Product};
use super::libraries::{self, Library};
use crate::dtype::Dtype;
use crate::error::error;

/// cuBLASLt, its workspace, and the plans made so far.
pub(super) struct Products {
    handle: sys::cublasLtHandle_t,
    workspace: Address,
    plans: HashMap<Key, Plan>,
    /// What an earlier run chose.
    chosen: HashMap<Key, Algorithm>,
}

/// Which algorithm each product took.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Choices {
    /// Of cuBLASLt: an algorithm means nothing to another one.
    pub version: usize,
    pub products: Vec<(Key, Algorithm)>,
}

/// An algorithm as cuBLASLt describes it to itself.
type Algorithm = [u64; 8];

/// What a plan depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(super) struct Key {
    a: Side,
    b: Side,
    c: Side,
    add: bool,
    batch: usize,
}

/// A matrix without its place; what it is aligned to instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
struct Side {
    #[serde(alias = "ty")]
    dtype: Dtype,
    rows: usize,
    cols: usize,
    transposed: bool,
    alignment: u32,
}

impl Side {
    /// Of the first of `batch` matrices.
    fn of(matrix: Matrix, batch: usize) -> Side {
        let Matrix { at, dtype, rows, cols, transposed } = matrix;
        let next = if batch > 1 { (rows * cols * dtype.size()).trailing_zeros() } else { 8 };
        let alignment = 1 << at.0.trailing_zeros().min(next).min(8);
        Side { dtype, rows, cols, transposed, alignment }
    }
}

/// cuBLASLt's descriptors and the algorithm it chose. They are few and live as long as the process.
struct Plan {
    description: sys::cublasLtMatmulDesc_t,
    first: sys::cublasLtMatrixLayout_t,
    second: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl Products {
    /// What cuBLASLt may use beside the matrices: 32 MiB, as it is advised for Hopper. It is always
    /// the same, since the choice of an algorithm depends on it.
    pub const WORKSPACE: usize = 32 << 20;

    pub fn new(workspace: Address) -> anyhow::Result<Products> {
        if libraries::cublaslt() == Library::Missing {
            return Err(error(
                "cuBLASLt was not found: libcublasLt.so.13 or .12",
                "pip install nvidia-cublas in .venv, or set CUDA_HOME or LD_LIBRARY_PATH",
            ));
        }
        let handle = result::create_handle().map_err(|e| failed("starting cuBLASLt", e))?;
        Ok(Products { handle, workspace, plans: HashMap::new(), chosen: HashMap::new() })
    }

    /// The version of the cuBLASLt that was found.
    pub fn version() -> usize {
        // SAFETY: it takes nothing and cannot fail; the library is there, or nothing here is called.
        unsafe { sys::cublasLtGetVersion() }
    }

    /// What was chosen so far.
    pub fn choices(&self) -> Choices {
        let chosen = |(key, plan): (&Key, &Plan)| (*key, plan.algorithm.data);
        let mut products: Vec<_> = self.plans.iter().map(chosen).collect();
        products.sort_unstable();
        Choices { version: Self::version(), products }
    }

    /// Takes these algorithms from now on.
    pub fn choose(&mut self, choices: Choices) {
        self.chosen = choices.products.into_iter().collect();
        self.plans.clear();
    }

    /// A row-major product is the column-major product of the turned matrices in turned order:
    /// what is `[rows, cols]` by rows is `[cols, rows]` by columns, so `cT = bT aT` needs no copies.
    pub fn run(&mut self, product: &Product, stream: CUstream) -> anyhow::Result<()> {
        let (m, n, k) = product.check()?;
        let Product { a, b, c, add, batch } = *product;
        let side = |matrix| Side::of(matrix, batch);
        let key = Key { a: side(a), b: side(b), c: side(c), add, batch };
        if !self.plans.contains_key(&key) {
            let plan = plan(self.handle, &key, self.chosen.get(&key))
                .map_err(|e| failed(&format!("planning a product of {m} x {k} by {k} x {n}"), e))?;
            self.plans.insert(key, plan);
        }
        let plan = &self.plans[&key];
        let (alpha, beta) = (1.0f32, if add { 1.0f32 } else { 0.0 });
        let pointer = |address: Address| address.0 as *mut c_void;
        // SAFETY: the descriptors were made for exactly these shapes and live as long as the plan;
        // the matrices' memory is the caller's, as for a kernel's arguments.
        unsafe {
            result::matmul(
                self.handle,
                plan.description,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                pointer(b.at),
                plan.first,
                pointer(a.at),
                plan.second,
                pointer(c.at),
                plan.out,
                pointer(c.at),
                plan.out,
                &raw const plan.algorithm,
                pointer(self.workspace),
                Self::WORKSPACE,
                stream.cast(),
            )
        }
        .map_err(|e| failed(&format!("a product of {m} x {k} by {k} x {n}"), e))
    }
}

impl Drop for Products {
    fn drop(&mut self) {
        // SAFETY: made in `new`, destroyed once.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

fn plan(
    handle: sys::cublasLtHandle_t,
    key: &Key,
    chosen: Option<&Algorithm>,
) -> Result<Plan, CublasError> {
    use sys::cublasLtMatmulDescAttributes_t as Describe;
    use sys::cublasLtMatmulPreferenceAttributes_t as Prefer;

    let description = result::create_matmul_desc(
        sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
        sys::cudaDataType_t::CUDA_R_32F,
    )?;
    for (attribute, side) in [
        (Describe::CUBLASLT_MATMUL_DESC_TRANSA, key.b),
        (Describe::CUBLASLT_MATMUL_DESC_TRANSB, key.a),
    ] {
        // cublasOperation_t: N is 0, T is 1.
        let operation = i32::from(side.transposed);
        // SAFETY: the attribute is an i32, which is read before the call returns.
        unsafe {
            result::set_matmul_desc_attribute(
                description,
                attribute,
                (&raw const operation).cast(),
                size_of::<i32>(),
            )?;
        }
    }
    let layout = |side: Side| {
        use sys::cublasLtMatrixLayoutAttribute_t as Attribute;
        let layout = result::create_matrix_layout(
            data_type(side.dtype),
            side.cols as u64,
            side.rows as u64,
            side.cols as i64,
        )?;
        if key.batch > 1 {
            let (count, stride) = (key.batch as i32, (side.rows * side.cols) as i64);
            // SAFETY: the attributes are an i32 and an i64, which are read before the call returns.
            unsafe {
                result::set_matrix_layout_attribute(
                    layout,
                    Attribute::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT,
                    (&raw const count).cast(),
                    size_of::<i32>(),
                )?;
                result::set_matrix_layout_attribute(
                    layout,
                    Attribute::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                    (&raw const stride).cast(),
                    size_of::<i64>(),
                )?;
            }
        }
        Ok::<_, CublasError>(layout)
    };
    let (first, second, out) = (layout(key.b)?, layout(key.a)?, layout(key.c)?);
    if let Some(&data) = chosen {
        let algorithm = sys::cublasLtMatmulAlgo_t { data };
        let mut result = sys::cublasLtMatmulHeuristicResult_t {
            algo: algorithm,
            workspaceSize: 0,
            state: sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS,
            wavesCount: 0.0,
            reserved: [0; 4],
        };
        // It comes from a file: cuBLASLt says whether it is one for this product.
        // SAFETY: all descriptors were made above and are whole; `result` outlives the call.
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
        return Ok(Plan { description, first, second, out, algorithm });
    }

    let preference = result::create_matmul_pref()?;
    let workspace = Products::WORKSPACE;
    // SAFETY: the attribute is a usize, which is read before the call returns.
    unsafe {
        result::set_matmul_pref_attribute(
            preference,
            Prefer::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
            (&raw const workspace).cast(),
            size_of::<usize>(),
        )?;
    }
    for (attribute, side) in [
        (Prefer::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, key.b),
        (Prefer::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, key.a),
        (Prefer::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, key.c),
        (Prefer::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, key.c),
    ] {
        // SAFETY: the attribute is a u32, which is read before the call returns.
        unsafe {
            result::set_matmul_pref_attribute(
                preference,
                attribute,
                (&raw const side.alignment).cast(),
                size_of::<u32>(),
            )?;
        }
    }
    // SAFETY: all descriptors were made above and are whole.
    let chosen = unsafe {
        let chosen = result::get_matmul_algo_heuristic(
            handle,
            description,
            first,
            second,
            out,
            out,
            preference,
        );
        result::destroy_matmul_pref(preference)?;
        chosen?
    };
    Ok(Plan { description, first, second, out, algorithm: chosen.algo })
}

fn data_type(dtype: Dtype) -> sys::cudaDataType_t {
    match dtype {
        Dtype::F32 => sys::cudaDataType_t::CUDA_R_32F,
        Dtype::F16 => sys::cudaDataType_t::CUDA_R_16F,
        Dtype::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
    }
}

fn failed(what: &str, why: CublasError) -> anyhow::Error {
    error(format!("{what}: cuBLASLt says {why}"), "laam doctor tells which libraries were found")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_survive_a_checkpoint() {
        let side =
            |rows, cols, dtype| Side { dtype, rows, cols, transposed: rows > 3, alignment: 256 };
        let key = |rows| Key {
            a: side(rows, 4, Dtype::Bf16),
            b: side(4, 5, Dtype::F16),
            c: side(rows, 5, Dtype::F32),
            add: rows == 2,
            batch: 3,
        };
        // Numbers that JSON's readers of f64 would round.
        let products = vec![(key(2), [u64::MAX; 8]), (key(7), [1 << 63 | 1; 8])];
        let choices = Choices { version: 130_000, products };
        let text = serde_json::to_value(&choices).unwrap().to_string();
        assert_eq!(serde_json::from_str::<Choices>(&text).unwrap(), choices);
    }
}
