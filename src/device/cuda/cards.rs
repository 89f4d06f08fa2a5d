//! What cards can do by their data sheets, where nothing was measured.

use crate::dtype::Dtype;

/// Dense products of two-byte numbers summed in f32, in TFLOP/s, by a part of the card's name. The
/// first that fits counts.
const CARDS: [(&str, f64); 22] = [
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

/// FLOP/s of products, the most that shares are told of; `None` for a card not in the table, and for
/// f32, which no share is told of.
pub(super) fn peak(card: &str, dtype: Dtype) -> Option<f64> {
    if dtype == Dtype::F32 {
        return None;
    }
    CARDS.iter().find(|(name, _)| card.contains(name)).map(|(_, teraflops)| teraflops * 1e12)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cards_are_known_by_the_names_their_driver_gives() {
        for (name, teraflops) in [
            ("NVIDIA H100 80GB HBM3, 132 SMs", 989.4),
            ("NVIDIA H100 PCIe, 114 SMs", 756.5),
            ("NVIDIA A100-SXM4-80GB, 108 SMs", 312.0),
            ("NVIDIA L40S, 142 SMs", 362.1),
            ("NVIDIA GeForce RTX 4090, 128 SMs", 165.2),
        ] {
            assert_eq!(peak(name, Dtype::Bf16), Some(teraflops * 1e12), "{name}");
        }
        assert_eq!(peak("NVIDIA H100 80GB HBM3", Dtype::F32), None);
        assert_eq!(peak("a card of next year", Dtype::Bf16), None);
    }
}
