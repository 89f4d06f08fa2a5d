//! The GGUF container, version 3: typed metadata, tensor descriptions, aligned tensor data, all little-endian.
//! Source: `docs/gguf.md` of ggml.

use std::io::{self, Write};

use half::f16;

use crate::dtype::Dtype;

/// The first four bytes of a GGUF file.
pub const MAGIC: &[u8; 4] = b"GGUF";
const VERSION: u32 = 3;
/// Tensor data begins at multiples of this many bytes: the default, which needs no key.
const ALIGN: usize = 32;

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
pub enum MetadataValue {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    I32s(Vec<i32>),
    Texts(Vec<String>),
}

impl MetadataValue {
    fn type_id(&self) -> u32 {
        match self {
            MetadataValue::U32(_) => 4,
            MetadataValue::F32(_) => 6,
            MetadataValue::Bool(_) => 7,
            MetadataValue::Text(_) => 8,
            MetadataValue::I32s(_) | MetadataValue::Texts(_) => 9,
        }
    }

    fn write(&self, out: &mut Vec<u8>) {
        match self {
            MetadataValue::U32(value) => out.extend(value.to_le_bytes()),
            MetadataValue::F32(value) => out.extend(value.to_le_bytes()),
            MetadataValue::Bool(value) => out.push(u8::from(*value)),
            MetadataValue::Text(text) => write_text(text, out),
            MetadataValue::I32s(values) => {
                out.extend(5u32.to_le_bytes());
                out.extend((values.len() as u64).to_le_bytes());
                out.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            }
            MetadataValue::Texts(texts) => {
                out.extend(8u32.to_le_bytes());
                out.extend((texts.len() as u64).to_le_bytes());
                for text in texts {
                    write_text(text, out);
                }
            }
        }
    }
}

fn write_text(text: &str, out: &mut Vec<u8>) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// Element type of a stored tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GgmlType {
    Plain(Dtype),
    /// Blocks of 32 values: a float16 scale and 32 bytes.
    Q8_0,
}

/// Values per block of [`GgmlType::Q8_0`].
pub const Q8_0_BLOCK: usize = 32;

impl GgmlType {
    fn type_id(self) -> u32 {
        match self {
            GgmlType::Plain(Dtype::F32) => 0,
            GgmlType::Plain(Dtype::F16) => 1,
            GgmlType::Q8_0 => 8,
            GgmlType::Plain(Dtype::Bf16) => 30,
        }
    }

    /// Bytes of so many values.
    fn bytes(self, values: usize) -> usize {
        match self {
            GgmlType::Plain(dtype) => values * dtype.size(),
            GgmlType::Q8_0 => values / Q8_0_BLOCK * (2 + Q8_0_BLOCK),
        }
    }

    fn encode(self, values: &[f32]) -> Vec<u8> {
        match self {
            GgmlType::Plain(dtype) => dtype.encode(values),
            GgmlType::Q8_0 => values.as_chunks().0.iter().flat_map(q8_0).collect(),
        }
    }

    /// The values as they are read back.
    pub fn round(self, values: &mut [f32]) {
        match self {
            GgmlType::Plain(dtype) => {
                for value in values {
                    *value = dtype.round(*value);
                }
            }
            GgmlType::Q8_0 => {
                for block in values.as_chunks_mut().0 {
                    let stored = q8_0(block);
                    for (value, rounded) in block.iter_mut().zip(from_q8_0(&stored)) {
                        *value = rounded;
                    }
                }
            }
        }
    }
}

/// A block as ggml's reference quantizes it: the scale is the largest magnitude over 127, and each value the
/// nearest multiple, ties away from zero.
fn q8_0(values: &[f32; Q8_0_BLOCK]) -> [u8; 2 + Q8_0_BLOCK] {
    let largest = values.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
    let scale = largest / 127.0;
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let mut block = [0; 2 + Q8_0_BLOCK];
    block[..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
    for (byte, value) in block[2..].iter_mut().zip(values) {
        *byte = (value * inverse).round() as i8 as u8;
    }
    block
}

/// Values that a reader computes from a block.
fn from_q8_0(block: &[u8; 2 + Q8_0_BLOCK]) -> impl Iterator<Item = f32> {
    let scale = f16::from_le_bytes([block[0], block[1]]).to_f32();
    block[2..].iter().map(move |&byte| f32::from(byte as i8) * scale)
}

/// A tensor to be written: a matrix, or a vector as a matrix of one row.
pub struct Tensor<'a> {
    pub name: String,
    pub values: &'a [f32],
    pub cols: usize,
    pub is_vector: bool,
    pub encoding: GgmlType,
    /// Source row of each row.
    pub source_row: Box<dyn Fn(usize) -> usize + 'a>,
}

impl Tensor<'_> {
    fn rows(&self) -> usize {
        self.values.len() / self.cols
    }
}

/// Writes a file, a row of a tensor at a time.
pub fn write(
    out: &mut impl Write,
    metadata: &[(String, MetadataValue)],
    tensors: &[Tensor],
) -> io::Result<()> {
    let mut head = MAGIC.to_vec();
    head.extend(VERSION.to_le_bytes());
    head.extend((tensors.len() as u64).to_le_bytes());
    head.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        write_text(key, &mut head);
        head.extend(value.type_id().to_le_bytes());
        value.write(&mut head);
    }
    let mut offset = 0;
    for tensor in tensors {
        write_text(&tensor.name, &mut head);
        // The fastest dimension first.
        let dims = [tensor.cols, tensor.rows()];
        let dims = &dims[..if tensor.is_vector { 1 } else { 2 }];
        head.extend((dims.len() as u32).to_le_bytes());
        head.extend(dims.iter().flat_map(|&dim| (dim as u64).to_le_bytes()));
        head.extend(tensor.encoding.type_id().to_le_bytes());
        head.extend((offset as u64).to_le_bytes());
        offset += tensor.encoding.bytes(tensor.values.len()).next_multiple_of(ALIGN);
    }
    head.resize(head.len().next_multiple_of(ALIGN), 0);
    out.write_all(&head)?;
    for tensor in tensors {
        for row in 0..tensor.rows() {
            let from = (tensor.source_row)(row) * tensor.cols;
            out.write_all(&tensor.encoding.encode(&tensor.values[from..from + tensor.cols]))?;
        }
        let bytes = tensor.encoding.bytes(tensor.values.len());
        out.write_all(&[0; ALIGN][..bytes.next_multiple_of(ALIGN) - bytes])?;
    }
    Ok(())
}
