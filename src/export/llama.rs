//! A Llama as a GGUF file: llama.cpp's names, its order of rotary pairs, its metadata.

use std::path::Path;

use anyhow::Context;

use super::gguf::{self, GgmlType, MetadataValue, Q8_0_BLOCK, Tensor};
use super::vocabulary::GgufVocabulary;
use crate::dtype::Dtype;
use crate::error::{self, ErrorKind, Hint};
use crate::files::{self, AtomicFile};
use crate::model::{Config, Layout, Model, ParamKind, Parameter, RopeScaling};
use crate::tokenizer::Tokenizer;

/// Element type of the matrices in a GGUF file. Norms are float32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum GgufDtype {
    /// IEEE single precision
    #[cfg_attr(feature = "cli", value(name = "f32", aliases = ["float32", "fp32"]))]
    F32,
    /// IEEE half precision
    #[cfg_attr(feature = "cli", value(name = "f16", aliases = ["float16", "fp16"]))]
    F16,
    /// The upper half of a float32
    #[cfg_attr(feature = "cli", value(name = "bf16", alias = "bfloat16"))]
    Bf16,
    /// 8 bits and a scale per 32 values; f16 if rows are not a multiple of 32
    #[cfg_attr(feature = "cli", value(name = "q8_0"))]
    Q8_0,
}

impl From<Dtype> for GgufDtype {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self::F32,
            Dtype::F16 => Self::F16,
            Dtype::Bf16 => Self::Bf16,
        }
    }
}

impl GgufDtype {
    fn encoding(self, cols: usize) -> GgmlType {
        match self {
            Self::F32 => GgmlType::Plain(Dtype::F32),
            Self::Bf16 => GgmlType::Plain(Dtype::Bf16),
            Self::Q8_0 if cols.is_multiple_of(Q8_0_BLOCK) => GgmlType::Q8_0,
            Self::F16 | Self::Q8_0 => GgmlType::Plain(Dtype::F16),
        }
    }

    /// llama.cpp's `general.file_type`.
    fn file_type(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q8_0 => 7,
            Self::Bf16 => 32,
        }
    }
}

/// The weights as a GGUF file of this dtype gives them back: all matrices are rounded.
pub fn rounded(weights: &[f32], layout: &Layout, dtype: GgufDtype) -> Vec<f32> {
    let mut weights = weights.to_vec();
    for parameter in &layout.parameters {
        encoding(parameter, dtype).round(&mut weights[parameter.span.range()]);
    }
    weights
}

/// Element type of a parameter in a file of a dtype.
fn encoding(parameter: &Parameter, dtype: GgufDtype) -> GgmlType {
    if parameter.kind == ParamKind::Norm {
        GgmlType::Plain(Dtype::F32)
    } else {
        dtype.encoding(parameter.span.cols)
    }
}

/// A written file.
#[derive(Clone, Debug)]
pub struct Exported {
    /// Tensors written.
    pub tensors: usize,
    /// Tensors of `q8_0` that are float16, as rows are not a multiple of 32.
    pub not_quantized: usize,
    /// Warnings for a reader of the file.
    pub warnings: Vec<String>,
}

/// Writes a model and its tokenizer as one GGUF file for llama.cpp.
///
/// # Errors
/// If the tokenizer has no equivalent in GGUF, a weight is too large for float16, or `output` is a file of
/// another kind.
pub fn export_gguf(
    output: &Path,
    name: &str,
    license: Option<&str>,
    model: &Model,
    tokenizer: &Tokenizer,
    dtype: GgufDtype,
) -> anyhow::Result<Exported> {
    check_output(output)?;
    let vocabulary = GgufVocabulary::new(tokenizer, model.config.vocab_size)?;
    let rope_factors = rope_factors(&model.config);
    let mut tensors = Vec::new();
    let mut not_quantized = 0;
    for parameter in &model.layout.parameters {
        let tensor = tensor(parameter, model, dtype)?;
        not_quantized +=
            usize::from(dtype == GgufDtype::Q8_0 && tensor.encoding == GgmlType::Plain(Dtype::F16));
        tensors.push(tensor);
    }
    if let Some(factors) = &rope_factors {
        tensors.push(Tensor {
            name: "rope_freqs.weight".to_string(),
            values: factors,
            cols: factors.len(),
            is_vector: true,
            encoding: GgmlType::Plain(Dtype::F32),
            source_row: Box::new(|row| row),
        });
    }
    let GgufVocabulary { warnings, .. } = &vocabulary;
    let warnings = warnings.clone();
    let metadata = metadata(name, license, &model.config, vocabulary, dtype);

    let mut file = AtomicFile::create(output)?;
    gguf::write(&mut file, &metadata, &tensors)
        .with_context(|| format!("cannot write {}", output.display()))
        .hint(
            ErrorKind::Data,
            || "check that the disk has room; what was there before is untouched",
        )?;
    file.commit()?;
    Ok(Exported { tensors: tensors.len(), not_quantized, warnings })
}

/// Refuses to replace a file that is not GGUF.
fn check_output(output: &Path) -> anyhow::Result<()> {
    if files::holds_nothing_but(output, gguf::MAGIC) {
        return Ok(());
    }
    Err(error::data(
        format!("{} exists and is not a GGUF file", output.display()),
        "choose another `output`, or remove it",
    ))
}

fn tensor<'a>(
    parameter: &Parameter,
    model: &'a Model,
    dtype: GgufDtype,
) -> anyhow::Result<Tensor<'a>> {
    let is_vector = parameter.kind == ParamKind::Norm;
    let values = &model.weights[parameter.span.range()];
    let encoding = encoding(parameter, dtype);
    let overflows =
        |&value: &f32| value.is_finite() && !Dtype::F16.round(value / 127.0).is_finite();
    let overflows = match encoding {
        GgmlType::Plain(Dtype::F16) => {
            values.iter().any(|&value| value.is_finite() && !Dtype::F16.round(value).is_finite())
        }
        GgmlType::Q8_0 => values.iter().any(overflows),
        GgmlType::Plain(_) => false,
    };
    if overflows {
        return Err(error::checkpoint(
            format!("{} has a value too large for float16", parameter.name),
            "set `dtype` to bf16 or f32",
        ));
    }
    // transformers rotates component i with i + head_dim / 2, llama.cpp 2 i with 2 i + 1.
    let head_dim = model.config.head_dim;
    let interleaved = move |row: usize| {
        let (head, at) = (row / head_dim, row % head_dim);
        head * head_dim + at % 2 * (head_dim / 2) + at / 2
    };
    let is_rotated = [".q_proj.", ".k_proj."].iter().any(|part| parameter.name.contains(part));
    Ok(Tensor {
        name: llama_cpp_name(&parameter.name)?,
        values,
        cols: parameter.span.cols,
        is_vector,
        encoding,
        source_row: if is_rotated { Box::new(interleaved) } else { Box::new(|row| row) },
    })
}

/// llama.cpp's name of a parameter.
fn llama_cpp_name(name: &str) -> anyhow::Result<String> {
    const NAMES: [(&str, &str); 9] = [
        ("input_layernorm", "attn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("post_attention_layernorm", "ffn_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ];
    let unknown = || error::internal(format!("{name} has no name in llama.cpp"));
    let stem = name.strip_suffix(".weight").ok_or_else(unknown)?;
    let renamed = match stem {
        "model.embed_tokens" => "token_embd".to_string(),
        "model.norm" => "output_norm".to_string(),
        "lm_head" => "output".to_string(),
        _ => {
            let (layer, part) = stem
                .strip_prefix("model.layers.")
                .and_then(|rest| rest.split_once('.'))
                .ok_or_else(unknown)?;
            let (_, part) = NAMES.iter().find(|(ours, _)| *ours == part).ok_or_else(unknown)?;
            format!("blk.{layer}.{part}")
        }
    };
    Ok(format!("{renamed}.weight"))
}

/// Divisors of the rotary frequencies in llama.cpp, `[head_dim / 2]`, for Llama 3.1's scaling.
fn rope_factors(config: &Config) -> Option<Vec<f32>> {
    matches!(config.rope_scaling, RopeScaling::Llama3 { .. }).then(|| {
        let plain = Config { rope_scaling: RopeScaling::None, ..config.clone() };
        let pairs = plain.rope_frequencies().into_iter().zip(config.rope_frequencies());
        pairs.map(|(plain, scaled)| (plain / scaled) as f32).collect()
    })
}

fn metadata(
    name: &str,
    license: Option<&str>,
    config: &Config,
    vocabulary: GgufVocabulary,
    dtype: GgufDtype,
) -> Vec<(String, MetadataValue)> {
    let mut metadata = Vec::new();
    let mut put = |key: &str, value: MetadataValue| metadata.push((key.to_string(), value));
    let text = |text: &str| MetadataValue::Text(text.to_string());
    // Validated configurations are below 2^31.
    let size = |size: usize| MetadataValue::U32(size as u32);
    put("general.architecture", text("llama"));
    put("general.name", text(name));
    if let Some(license) = license {
        put("general.license", text(license));
    }
    put("general.file_type", MetadataValue::U32(dtype.file_type()));
    if dtype == GgufDtype::Q8_0 {
        put("general.quantization_version", MetadataValue::U32(2));
    }
    put("llama.vocab_size", size(config.vocab_size));
    put("llama.context_length", size(config.max_position_embeddings));
    put("llama.embedding_length", size(config.hidden_size));
    put("llama.block_count", size(config.num_hidden_layers));
    put("llama.feed_forward_length", size(config.intermediate_size));
    put("llama.attention.head_count", size(config.num_attention_heads));
    put("llama.attention.head_count_kv", size(config.num_key_value_heads));
    put("llama.attention.key_length", size(config.head_dim));
    put("llama.attention.value_length", size(config.head_dim));
    put("llama.attention.layer_norm_rms_epsilon", MetadataValue::F32(config.rms_norm_eps as f32));
    put("llama.rope.dimension_count", size(config.head_dim));
    put("llama.rope.freq_base", MetadataValue::F32(config.rope_theta as f32));
    if let RopeScaling::Linear { factor } = config.rope_scaling {
        put("llama.rope.scaling.type", text("linear"));
        put("llama.rope.scaling.factor", MetadataValue::F32(factor as f32));
    }
    put("tokenizer.ggml.model", text("gpt2"));
    put("tokenizer.ggml.pre", text(vocabulary.pre));
    put("tokenizer.ggml.tokens", MetadataValue::Texts(vocabulary.tokens));
    put("tokenizer.ggml.token_type", MetadataValue::I32s(vocabulary.types));
    put("tokenizer.ggml.merges", MetadataValue::Texts(vocabulary.merges));
    let mut id = |key: &str, id: Option<&u32>| {
        if let Some(id) = id {
            put(key, MetadataValue::U32(*id));
        }
    };
    id("tokenizer.ggml.bos_token_id", config.bos_token_id.as_ref());
    id("tokenizer.ggml.eos_token_id", config.eos_token_ids.first());
    // A second token that ends a text: llama.cpp's end of turn.
    id("tokenizer.ggml.eot_token_id", config.eos_token_ids.get(1));
    id("tokenizer.ggml.padding_token_id", config.pad_token_id.as_ref());
    put("tokenizer.ggml.add_bos_token", MetadataValue::Bool(vocabulary.add_bos));
    put("tokenizer.ggml.add_eos_token", MetadataValue::Bool(false));
    metadata
}
