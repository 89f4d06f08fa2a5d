//! Element types of tensors: the types that weights are stored in and activations are computed in.

use half::{bf16, f16};

/// A floating-point element type.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    serde::Serialize,
    serde::Deserialize,
)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum Dtype {
    /// IEEE single precision
    #[default]
    #[serde(rename = "float32", alias = "fp32", alias = "f32")]
    #[cfg_attr(feature = "cli", value(name = "float32", aliases = ["fp32", "f32"]))]
    F32,
    /// IEEE half precision
    #[serde(rename = "float16", alias = "fp16", alias = "f16")]
    #[cfg_attr(feature = "cli", value(name = "float16", aliases = ["fp16", "f16"]))]
    F16,
    /// 8 bits of exponent, 7 of fraction
    #[serde(rename = "bfloat16", alias = "bf16")]
    #[cfg_attr(feature = "cli", value(name = "bfloat16", alias = "bf16"))]
    Bf16,
}

impl Dtype {
    /// All element types.
    pub const ALL: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];

    /// Bytes per element.
    pub fn size(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::Bf16 => 2,
        }
    }

    /// The name that transformers and PyTorch use: `bfloat16`.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "float32",
            Dtype::F16 => "float16",
            Dtype::Bf16 => "bfloat16",
        }
    }

    /// The suffix of kernel entries: `rms_norm_bf16`.
    pub fn suffix(self) -> &'static str {
        match self {
            Dtype::F32 => "f32",
            Dtype::F16 => "f16",
            Dtype::Bf16 => "bf16",
        }
    }

    /// The nearest value of this type, ties to even.
    pub fn round(self, value: f32) -> f32 {
        match self {
            Dtype::F32 => value,
            Dtype::F16 => f16::from_f32(value).to_f32(),
            Dtype::Bf16 => bf16::from_f32(value).to_f32(),
        }
    }

    /// Little-endian elements, rounded to nearest, ties to even.
    pub fn encode(self, values: &[f32]) -> Vec<u8> {
        match self {
            Dtype::F32 => bytemuck::cast_slice(values).to_vec(),
            Dtype::F16 => values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
            Dtype::Bf16 => values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
        }
    }

    /// The elements in `bytes`, of any alignment, widened to f32 exactly.
    pub fn decode(self, bytes: &[u8]) -> Vec<f32> {
        let mut values = vec![0.0; bytes.len() / self.size()];
        self.decode_into(bytes, &mut values);
        values
    }

    /// [`Dtype::decode`] into a slice of that many elements.
    pub fn decode_into(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            Dtype::F32 => {
                for (value, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *value = f32::from_le_bytes(*bytes);
                }
            }
            Dtype::F16 => {
                for (value, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *value = f16::from_le_bytes(*bytes).to_f32();
                }
            }
            Dtype::Bf16 => {
                for (value, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *value = bf16::from_le_bytes(*bytes).to_f32();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_of_a_dtype_is_read_and_one_is_written() {
        for (dtype, spellings) in [
            (Dtype::F32, ["float32", "fp32", "f32"].as_slice()),
            (Dtype::F16, &["float16", "fp16", "f16"]),
            (Dtype::Bf16, &["bfloat16", "bf16"]),
        ] {
            assert_eq!(serde_json::to_value(dtype).unwrap(), dtype.name());
            for &spelling in spellings {
                assert_eq!(serde_json::from_value::<Dtype>(spelling.into()).unwrap(), dtype);
                #[cfg(feature = "cli")]
                assert_eq!(clap::ValueEnum::from_str(spelling, false), Ok(dtype), "{spelling}");
            }
        }
    }

    #[test]
    fn encoding_rounds_to_nearest_even_and_decoding_is_exact() {
        for (dtype, unit) in [(Dtype::F16, 2f32.powi(-10)), (Dtype::Bf16, 2f32.powi(-7))] {
            let values = [1.0, 1.0 + unit, 1.0 + 0.5 * unit, 1.0 + 1.5 * unit, -0.75];
            let rounded = [1.0, 1.0 + unit, 1.0, 1.0 + 2.0 * unit, -0.75];
            assert_eq!(dtype.decode(&dtype.encode(&values)), rounded);
            assert_eq!(values.map(|x| dtype.round(x)), rounded);
        }
        assert_eq!(Dtype::F32.decode(&Dtype::F32.encode(&[0.1, 3.5])), [0.1, 3.5]);
    }
}
