//! `kernels/matmul.cu`: every layout, dtype and edge, exact on small integers; and in the place of the
//! device's matmul in operations.

use laam::backend::gpu::Options;
use laam::device::{Address, Device, Matmul, Matrix};

use super::*;

/// Element `at` of matrix `salt`: an integer from -2 to 2.
fn integer(at: usize, salt: usize) -> f32 {
    ((at * 7 + at / 11 + salt * 3) % 5) as f32 - 2.0
}

/// A matmul, and how its matrices lie in memory.
#[derive(Clone, Copy, Debug)]
struct MatmulCase {
    shape: (usize, usize, usize),
    dtype: Dtype,
    /// Of a and b.
    transposed: [bool; 2],
    /// Rows begin at multiples of 16 bytes.
    aligned: bool,
    accumulate: bool,
    out: Dtype,
    batch: usize,
}

/// Elements between the rows of `c`, which must stay as they are.
const GAP_BYTE: u8 = 0x55;

/// Allocates a batch of matrices with gaps between their rows, which nothing writes.
fn put(sim: &mut Sim, matrix: Matrix, batch: usize, salt: usize, fill: bool) -> Matrix {
    let size = matrix.dtype.size();
    let bytes = batch * matrix.rows * matrix.stride * size;
    let at = sim.alloc(bytes).unwrap();
    if fill {
        sim.memset(at, GAP_BYTE, bytes).unwrap();
    }
    for row in 0..batch * matrix.rows {
        let values: Vec<_> =
            (0..matrix.cols).map(|col| integer(row * matrix.cols + col, salt)).collect();
        sim.upload(at.plus(row * matrix.stride * size), &matrix.dtype.encode(&values)).unwrap();
    }
    Matrix { at, ..matrix }
}

impl MatmulCase {
    /// Runs the kernel, and compares every element and every gap.
    fn holds(&self, module: &Module, (schedule, check): (Schedule, Check)) {
        let (m, n, k) = self.shape;
        let simulator = ptx_race::Options { schedule, check, ..ptx_race::Options::default() };
        let mut sim = Sim::new(simulator).unwrap();
        sim.replace("matmul", module.clone());
        let matrix = |dtype, rows: usize, cols: usize, transposed: bool| {
            let (rows, cols) = if transposed { (cols, rows) } else { (rows, cols) };
            let stride = cols.next_multiple_of(8) + if self.aligned { 8 } else { 3 };
            let stored = Matrix::new(Address::NULL, dtype, rows, cols).with_stride(stride);
            if transposed { stored.t() } else { stored }
        };
        let [a_transposed, b_transposed] = self.transposed;
        let a = put(&mut sim, matrix(self.dtype, m, k, a_transposed), self.batch, 1, false);
        let b = put(&mut sim, matrix(self.dtype, k, n, b_transposed), self.batch, 2, false);
        let c = put(&mut sim, matrix(self.out, m, n, false), self.batch, 3, true);
        let matmul = Matmul { a, b, c, accumulate: self.accumulate, batch: self.batch };
        let launches = matmul.launches().unwrap();
        assert_eq!(launches.len(), 1);
        let on_tensor_cores = self.aligned && self.dtype != Dtype::F32;
        assert_eq!(
            launches[0].kernel.name().starts_with("matmul_simt"),
            !on_tensor_cores,
            "{self:?}"
        );
        // SAFETY: the simulator checks every access.
        unsafe { sim.launch(&launches[0]) }.unwrap_or_else(|fault| panic!("{self:?}: {fault:#}"));

        let element = |stored: &Matrix, of: usize, row: usize, col: usize, salt: usize| {
            let (row, col) = if stored.transposed { (col, row) } else { (row, col) };
            integer((of * stored.rows + row) * stored.cols + col, salt)
        };
        let size = self.out.size();
        for of in 0..self.batch {
            for row in 0..m {
                let mut bytes = vec![0; c.stride * size];
                sim.download(c.at.plus((of * m + row) * c.stride * size), &mut bytes).unwrap();
                let (values, gap) = bytes.split_at(n * size);
                let exact = (0..n).map(|col| {
                    let dot: f32 = (0..k)
                        .map(|i| element(&a, of, row, i, 1) * element(&b, of, i, col, 2))
                        .sum();
                    dot + if self.accumulate { element(&c, of, row, col, 3) } else { 0.0 }
                });
                let exact = self.out.encode(&exact.collect::<Vec<_>>());
                assert!(values == exact, "{self:?}: row {row} of matrix {of}");
                assert!(gap.iter().all(|&byte| byte == GAP_BYTE), "{self:?}: gap after {row}");
            }
        }
    }
}

/// Several tiles of each dimension, more tiles of k than stages; less than one tile.
const SHAPES: [(usize, usize, usize); 2] = [(130, 66, 170), (5, 33, 9)];

fn is_exact(module: &Module, dtypes: &[Dtype], layouts: &[[bool; 2]]) {
    let orders = [(Schedule::ReverseOrder, Check::Races), (Schedule::Random(3), Check::Faults)];
    for &dtype in dtypes {
        for (at, &transposed) in layouts.iter().enumerate() {
            for (aligned, (which, shape)) in [true, false]
                .into_iter()
                .flat_map(|a| SHAPES.into_iter().enumerate().map(move |s| (a, s)))
            {
                let case = MatmulCase {
                    shape,
                    dtype,
                    transposed,
                    aligned,
                    accumulate: (at + which) % 2 == 0,
                    out: if aligned == (which == 0) { Dtype::F32 } else { dtype },
                    batch: 1 + which,
                };
                case.holds(module, orders[(at + which) % 2]);
                if at == 0 {
                    case.holds(module, orders[1 - which]);
                }
            }
        }
    }
}

const LAYOUTS: [[bool; 2]; 4] = [[false, false], [false, true], [true, false], [true, true]];

#[test]
fn matmul_is_exact_on_integers_in_every_layout() {
    if let Some(module) = module("matmul") {
        is_exact(&module, &DTYPES, &LAYOUTS);
    }
}

#[test]
fn operations_match_f64_with_laams_own_matmul() {
    let operations =
        ["linear", "linear_backward_input", "linear_backward_weight", "fused_linear_cross_entropy"];
    for dtype in DTYPES {
        let options = Options { own_matmul: true, generic_lm_head: true, ..Options::new(dtype) };
        pass_by_turns(&operations, options);
    }
    pass(&["muon"], Options { own_matmul: true, ..Options::new(Dtype::F32) }, "", None);
}

pub const MATMUL: MutationSet = MutationSet {
    kernel: "matmul",
    only: &["MMA(nn, false, false, bf16)", "SIMT(bf16)"],
    mutants: &[
        ("matmul_sum_lost", "+= before[i]", "+= 0.0f"),
        ("matmul_rows_past_the_end_written", "", ""),
        ("matmul_first_of_the_batch", " + blockIdx.y * elements", ""),
        ("matmul_zeros_missing", "row + r < rows", "true"),
        ("matmul_stage_read_early", "", ""),
        ("matmul_columns_swapped", "columns[j % 2],", "columns[j % 2 + 2],"),
        ("matmul_simt_edge_of_k", "first_k + of_k < k", "true"),
        ("matmul_simt_tile_overwritten", "", ""),
        ("wait_for_one_group_less", "(PENDING)", "(PENDING + 1)"),
        ("ldmatrix_not_transposed", ".trans", ""),
    ],
    check: |module| is_exact(module, &[Dtype::Bf16], &LAYOUTS[..1]),
};
