//! Peak matmul rates of GPUs by their data sheets.

use crate::dtype::Dtype;

/// Dense f16 and bf16 matmuls with f32 accumulation, in TFLOP/s, by the GPU's whole name as the driver
/// reports it. Data sheets with a rate "with sparsity" alone have twice the dense one.
/// The product behind a name that several share is known by its SMs.
const PEAK_TFLOPS: [(&str, f64); 37] = [
    // NVIDIA DGX B200 data sheet: 72 PFLOP/s of FP8 with sparsity for eight, a quarter of that in bf16.
    ("NVIDIA B200", 2250.0),
    // NVIDIA GH200 Grace Hopper Superchip data sheet: 1,979 with sparsity.
    ("NVIDIA GH200 480GB", 989.4),
    ("NVIDIA GH200 120GB", 989.4),
    ("NVIDIA GH200 144G HBM3e", 989.4),
    // NVIDIA H200 Tensor Core GPU data sheet: 1,979 and 1,671 with sparsity.
    ("NVIDIA H200", 989.4),
    ("NVIDIA H200 NVL", 835.5),
    // NVIDIA H100 Tensor Core GPU Architecture white paper, table 3: 989.4 and 756; data sheet: 1,671
    // with sparsity for the NVL. The H800 differs in NVLink and f64.
    ("NVIDIA H100 80GB HBM3", 989.4),
    ("NVIDIA H100 PCIe", 756.5),
    ("NVIDIA H100 NVL", 835.5),
    ("NVIDIA H800", 989.4),
    ("NVIDIA H800 PCIe", 756.5),
    // NVIDIA A100 Tensor Core GPU data sheet: 312. The A800 differs in NVLink.
    ("NVIDIA A100-SXM4-40GB", 312.0),
    ("NVIDIA A100-SXM4-80GB", 312.0),
    ("NVIDIA A100-PCIE-40GB", 312.0),
    ("NVIDIA A100 80GB PCIe", 312.0),
    ("A100-SXM4-40GB", 312.0),
    ("A100-SXM4-80GB", 312.0),
    ("A100-PCIE-40GB", 312.0),
    ("NVIDIA A800-SXM4-40GB", 312.0),
    ("NVIDIA A800-SXM4-80GB", 312.0),
    ("NVIDIA A800 80GB PCIe", 312.0),
    // Data sheets of the A30 (165), A40 (149.7), A10 (125) and A10G (70).
    ("NVIDIA A30", 165.0),
    ("NVIDIA A40", 149.7),
    ("NVIDIA A10", 125.0),
    ("NVIDIA A10G", 70.0),
    // Data sheets of the L40S (362.05), L40 (181.05) and L4 (242 with sparsity).
    ("NVIDIA L40S", 362.05),
    ("NVIDIA L40", 181.05),
    ("NVIDIA L4", 121.0),
    // NVIDIA Ampere GA102 GPU Architecture white paper 2.0, appendices A and C, "Peak FP16 Tensor TFLOPS
    // with FP32 Accumulate". The RTX 3080 with 12 GB, of which it says nothing, has 70.
    ("NVIDIA RTX A6000", 154.8),
    ("NVIDIA GeForce RTX 3080, 68 SMs", 59.5),
    ("NVIDIA GeForce RTX 3090", 71.0),
    ("RTX A6000", 154.8),
    ("GeForce RTX 3090", 71.0),
    // NVIDIA Ada GPU Architecture white paper 2.1, appendices A and B.
    ("NVIDIA RTX 6000 Ada Generation", 364.2),
    ("NVIDIA GeForce RTX 4080", 97.5),
    ("NVIDIA GeForce RTX 4090", 165.2),
    // NVIDIA RTX Blackwell GPU Architecture white paper 1.1, appendix A.
    ("NVIDIA GeForce RTX 5090", 209.5),
];

/// Peak FLOP/s of matmuls, the denominator of MFU; `None` for f32 and for a GPU not in the table, such
/// as a laptop's of a similar name or a MIG slice. `gpu` is the name, or the name and more after a comma.
pub(super) fn peak_flops(gpu: &str, dtype: Dtype) -> Option<f64> {
    if dtype == Dtype::F32 {
        return None;
    }
    let whole = |name: &str| name == gpu || gpu.split_once(',').is_some_and(|(gpu, _)| gpu == name);
    PEAK_TFLOPS.iter().find(|(name, _)| whole(name)).map(|(_, teraflops)| teraflops * 1e12)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peak_flops_are_found_by_the_whole_name_that_the_driver_reports() {
        for (name, teraflops) in [
            ("NVIDIA H100 80GB HBM3, 132 SMs", 989.4),
            ("NVIDIA H100 PCIe, 114 SMs", 756.5),
            ("NVIDIA H100 NVL, 132 SMs", 835.5),
            ("NVIDIA H200, 132 SMs", 989.4),
            ("NVIDIA A100-SXM4-80GB, 108 SMs", 312.0),
            ("NVIDIA A10, 72 SMs", 125.0),
            ("NVIDIA L40S, 142 SMs", 362.05),
            ("NVIDIA GeForce RTX 4090, 128 SMs", 165.2),
            ("NVIDIA GeForce RTX 3080, 68 SMs", 59.5),
        ] {
            assert_eq!(peak_flops(name, Dtype::Bf16), Some(teraflops * 1e12), "{name}");
        }
        assert_eq!(peak_flops("NVIDIA H100 80GB HBM3", Dtype::F32), None);
        for name in [
            "NVIDIA RTX A1000, 18 SMs",
            "NVIDIA RTX A1000 Laptop GPU, 16 SMs",
            "NVIDIA RTX A4000, 48 SMs",
            "NVIDIA RTX A3000 Laptop GPU, 32 SMs",
            "NVIDIA GeForce RTX 4090 Laptop GPU, 76 SMs",
            "NVIDIA GeForce RTX 3090 Ti, 84 SMs",
            "NVIDIA GeForce RTX 3080, 70 SMs",
            "NVIDIA GeForce RTX 3080",
            "NVIDIA A100-SXM4-80GB MIG 1g.10gb, 14 SMs",
            "NVIDIA L400, 1 SMs",
            "an unknown GPU",
        ] {
            assert_eq!(peak_flops(name, Dtype::Bf16), None, "{name}");
        }
    }

    /// The white papers' own arithmetic: SMs, boost clock, and the FLOP that the tensor cores
    /// of one do in a clock with f32 accumulation, which GeForce has half of.
    #[test]
    fn peak_flops_are_sms_times_clock_times_flop_per_clock() {
        for (name, sms, megahertz, flop_per_clock) in [
            ("NVIDIA GeForce RTX 3080, 68 SMs", 68.0, 1710.0, 512.0),
            ("NVIDIA GeForce RTX 3090", 82.0, 1695.0, 512.0),
            ("NVIDIA RTX A6000", 84.0, 1800.0, 1024.0),
            ("NVIDIA GeForce RTX 4080", 76.0, 2505.0, 512.0),
            ("NVIDIA GeForce RTX 4090", 128.0, 2520.0, 512.0),
            ("NVIDIA RTX 6000 Ada Generation", 142.0, 2505.0, 1024.0),
            ("NVIDIA GeForce RTX 5090", 170.0, 2407.0, 512.0),
            ("NVIDIA A100-SXM4-80GB", 108.0, 1410.0, 2048.0),
            ("NVIDIA H100 80GB HBM3", 132.0, 1830.0, 4096.0),
            ("NVIDIA H100 PCIe", 114.0, 1620.0, 4096.0),
        ] {
            let computed: f64 = sms * megahertz * 1e6 * flop_per_clock;
            let table = peak_flops(name, Dtype::Bf16).unwrap();
            assert!((computed / table - 1.0).abs() < 3e-3, "{name}: {computed:e} {table:e}");
        }
    }
}
