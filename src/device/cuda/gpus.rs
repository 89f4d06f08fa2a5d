//! Peak matmul rates of GPUs by their data sheets.

use crate::dtype::Dtype;

/// Dense f16 and bf16 matmuls with f32 accumulation, in TFLOP/s, by a substring of the GPU's name;
/// the first match counts.
const PEAK_TFLOPS: [(&str, f64); 22] = [
    ("B200", 2250.0),
    ("GH200", 989.4),
    ("H200 NVL", 835.5),
    ("H200", 989.4),
    ("H100 NVL", 835.5),
    ("H100 PCIe", 756.5),
    ("H100", 989.4),
    ("H800", 989.4),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A30", 165.0),
    ("A40", 149.7),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("L40S", 362.1),
    ("L40", 181.1),
    ("L4", 121.0),
    ("RTX 6000 Ada", 364.2),
    ("RTX 5090", 209.5),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
    ("RTX A6000", 154.8),
];

/// Peak FLOP/s of matmuls, the denominator of MFU; `None` for f32 and for a GPU not in the table.
pub(super) fn peak_flops(gpu: &str, dtype: Dtype) -> Option<f64> {
    if dtype == Dtype::F32 {
        return None;
    }
    PEAK_TFLOPS.iter().find(|(name, _)| gpu.contains(name)).map(|(_, teraflops)| teraflops * 1e12)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peak_flops_are_found_by_the_names_the_driver_reports() {
        for (name, teraflops) in [
            ("NVIDIA H100 80GB HBM3, 132 SMs", 989.4),
            ("NVIDIA H100 PCIe, 114 SMs", 756.5),
            ("NVIDIA A100-SXM4-80GB, 108 SMs", 312.0),
            ("NVIDIA L40S, 142 SMs", 362.1),
            ("NVIDIA GeForce RTX 4090, 128 SMs", 165.2),
        ] {
            assert_eq!(peak_flops(name, Dtype::Bf16), Some(teraflops * 1e12), "{name}");
        }
        assert_eq!(peak_flops("NVIDIA H100 80GB HBM3", Dtype::F32), None);
        assert_eq!(peak_flops("an unknown GPU", Dtype::Bf16), None);
    }
}
