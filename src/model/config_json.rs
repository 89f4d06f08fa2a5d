//! `config.json` and `generation_config.json`, as Hugging Face transformers reads and writes them.
//!
//! Versions 4 and 5 spell some facts differently; what is written has both spellings, what is read
//! may have either. A field that is absent has transformers' own default.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{Config, RopeScaling};
use crate::dtype::Dtype;
use crate::error::{self, ErrorKind, Hint};

/// The fields that decide what the model computes. Others are passed over.
#[derive(Deserialize)]
struct Fields {
    model_type: Option<String>,
    #[serde(default = "llama::vocab_size")]
    vocab_size: usize,
    #[serde(default = "llama::hidden_size")]
    hidden_size: usize,
    #[serde(default = "llama::intermediate_size")]
    intermediate_size: usize,
    #[serde(default = "llama::num_hidden_layers")]
    num_hidden_layers: usize,
    #[serde(default = "llama::num_attention_heads")]
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    hidden_act: Option<String>,
    #[serde(default = "llama::max_position_embeddings")]
    max_position_embeddings: usize,
    #[serde(default = "llama::rms_norm_eps")]
    rms_norm_eps: f64,
    #[serde(default = "llama::initializer_range")]
    initializer_range: f64,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    quantization_config: Option<Map<String, Value>>,
    partial_rotary_factor: Option<f64>,
    rope_theta: Option<f64>,
    /// Version 5's; may hold `rope_theta` too.
    rope_parameters: Option<Map<String, Value>>,
    /// Version 4's.
    rope_scaling: Option<Map<String, Value>>,
    // Absent is 1 and 2; null is none.
    #[serde(default = "llama::bos_token_id")]
    bos_token_id: Option<Ids>,
    #[serde(default = "llama::eos_token_id")]
    eos_token_id: Option<Ids>,
    pad_token_id: Option<Ids>,
    laam: Option<Laam>,
}

/// Keys that laam adds; transformers keeps keys it does not know.
#[derive(Deserialize)]
struct Laam {
    windows: Option<String>,
}

/// transformers' defaults for a Llama.
mod llama {
    use super::Ids;

    pub fn vocab_size() -> usize {
        32000
    }
    pub fn hidden_size() -> usize {
        4096
    }
    pub fn intermediate_size() -> usize {
        11008
    }
    pub fn num_hidden_layers() -> usize {
        32
    }
    pub fn num_attention_heads() -> usize {
        32
    }
    pub fn max_position_embeddings() -> usize {
        2048
    }
    pub fn rms_norm_eps() -> f64 {
        1e-6
    }
    pub fn initializer_range() -> f64 {
        0.02
    }
    pub const ROPE_THETA: f64 = 10000.0;
    pub fn bos_token_id() -> Option<Ids> {
        Some(Ids::One(1))
    }
    pub fn eos_token_id() -> Option<Ids> {
        Some(Ids::One(2))
    }
}

/// One token, or (Llama 3 ends in several ways) a list of them.
#[derive(Deserialize)]
#[serde(untagged)]
enum Ids {
    One(i64),
    Many(Vec<i64>),
}

impl Config {
    /// Reads the text of a `config.json`. The second value lists what a user should know: facts
    /// that were read but cannot be kept.
    pub fn from_json(text: &str) -> anyhow::Result<(Self, Vec<String>)> {
        let fields: Fields = serde_json::from_str(text)
            .map_err(|cause| anyhow::anyhow!("invalid config.json: {cause}"))
            .hint(
                ErrorKind::Checkpoint,
                || "check that it is a Llama's config.json; save the model again, or fix that line",
            )?;
        fields.refuse_what_is_not_llama()?;
        let mut warnings = Vec::new();
        let (rope_theta, rope_scaling) = fields.rope()?;
        let head_dim = match fields.head_dim {
            Some(head_dim) => head_dim,
            None => fields.hidden_size.checked_div(fields.num_attention_heads).unwrap_or(0),
        };
        let mut ids = |name: &str, given| -> anyhow::Result<Vec<u32>> {
            let (known, beyond) =
                ids(name, given)?.into_iter().partition(|&id| (id as usize) < fields.vocab_size);
            warnings.extend(Vec::<u32>::into_iter(beyond).map(|id| {
                let rows = fields.vocab_size;
                format!("config.json has {name} {id} in a vocabulary of {rows}: it is ignored")
            }));
            Ok(known)
        };
        let config = Self {
            vocab_size: fields.vocab_size,
            hidden_size: fields.hidden_size,
            intermediate_size: fields.intermediate_size,
            num_hidden_layers: fields.num_hidden_layers,
            num_attention_heads: fields.num_attention_heads,
            num_key_value_heads: fields.num_key_value_heads.unwrap_or(fields.num_attention_heads),
            head_dim,
            max_position_embeddings: fields.max_position_embeddings,
            rms_norm_eps: fields.rms_norm_eps,
            rope_theta,
            rope_scaling,
            tie_word_embeddings: fields.tie_word_embeddings,
            initializer_range: fields.initializer_range,
            bos_token_id: ids("bos_token_id", fields.bos_token_id)?.first().copied(),
            eos_token_ids: ids("eos_token_id", fields.eos_token_id)?,
            pad_token_id: ids("pad_token_id", fields.pad_token_id)?.first().copied(),
            window_kind: fields.laam.and_then(|laam| laam.windows),
        };
        // Here the fields are keys of a file, never flags.
        config.validate().map_err(|why| {
            let what = format!("{why:#}, in config.json").replace('`', "");
            error::checkpoint(what, "fix config.json, or save the model again")
        })?;
        Ok((config, warnings))
    }

    /// The `config.json` of this model with its weights stored in `precision`.
    pub fn to_json(&self, precision: Dtype) -> Value {
        let mut json = json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "initializer_range": self.initializer_range,
            "attention_bias": false,
            "attention_dropout": 0.0,
            "mlp_bias": false,
            "tie_word_embeddings": self.tie_word_embeddings,
            "use_cache": true,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": ids_json(&self.eos_token_ids),
            "pad_token_id": self.pad_token_id,
            "rope_theta": self.rope_theta,
        });
        let scaling = match self.rope_scaling {
            RopeScaling::None => None,
            RopeScaling::Linear { factor } => {
                Some(json!({"rope_type": "linear", "factor": factor}))
            }
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => Some(json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low_freq_factor,
                "high_freq_factor": high_freq_factor,
                "original_max_position_embeddings": original_max_position_embeddings,
            })),
        };
        // Version 4 reads rope_theta and rope_scaling and silently passes over rope_parameters.
        let mut parameters = scaling.clone().unwrap_or_else(|| json!({"rope_type": "default"}));
        parameters["rope_theta"] = json!(self.rope_theta);
        json["rope_parameters"] = parameters;
        if let Some(scaling) = scaling {
            json["rope_scaling"] = scaling;
        }
        if let Some(windows) = &self.window_kind {
            json["laam"] = json!({"windows": windows});
        }
        json["torch_dtype"] = json!(precision.name());
        json["dtype"] = json!(precision.name());
        json
    }

    /// The `generation_config.json` of this model.
    pub fn to_generation_json(&self) -> Value {
        json!({
            "_from_model_config": true,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": ids_json(&self.eos_token_ids),
            "pad_token_id": self.pad_token_id,
        })
    }
}

/// Sampling defaults of `generation_config.json`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Each ends a text, beside those of `config.json`.
    pub eos_token_ids: Vec<u32>,
    /// Temperature, top-k and top-p, if tokens are to be drawn; else the likeliest is taken.
    pub sampling: Option<(f64, usize, Option<f64>)>,
}

impl GenerationDefaults {
    /// Reads the text of a `generation_config.json`. Without `do_sample` the numbers that shape a
    /// draw are ignored; with it, an absent one has transformers' default.
    pub fn from_json(text: &str) -> anyhow::Result<Self> {
        #[derive(Deserialize)]
        struct Fields {
            eos_token_id: Option<Ids>,
            do_sample: Option<bool>,
            temperature: Option<f64>,
            top_k: Option<usize>,
            top_p: Option<f64>,
        }
        let fields: Fields = serde_json::from_str(text)
            .map_err(|cause| anyhow::anyhow!("invalid generation_config.json: {cause}"))
            .hint(ErrorKind::Checkpoint, || "fix that line, or remove generation_config.json")?;
        let sampling = fields.do_sample.unwrap_or(false).then(|| {
            let top_p = fields.top_p.filter(|&p| p < 1.0);
            (fields.temperature.unwrap_or(1.0), fields.top_k.unwrap_or(50), top_p)
        });
        Ok(Self { eos_token_ids: ids("eos_token_id", fields.eos_token_id)?, sampling })
    }
}

impl Fields {
    fn refuse_what_is_not_llama(&self) -> anyhow::Result<()> {
        let refuse = |what: String| {
            Err(error::checkpoint(
                format!("{what}, in config.json"),
                "laam runs Llama models as transformers' LlamaForCausalLM defines them, without \
                 biases or quantization; convert the model, or choose another",
            ))
        };
        match &self.model_type {
            Some(kind) if kind == "llama" => {}
            Some(kind) => return refuse(format!("model_type is {kind:?}, not \"llama\"")),
            None => return refuse("model_type is missing".to_string()),
        }
        if let Some(act) =
            self.hidden_act.as_ref().filter(|act| !matches!(act.as_str(), "silu" | "swish"))
        {
            return refuse(format!("hidden_act is {act:?}, not \"silu\""));
        }
        if self.attention_bias || self.mlp_bias {
            let which = if self.attention_bias { "attention_bias" } else { "mlp_bias" };
            return refuse(format!("{which} is true"));
        }
        if self.quantization_config.is_some() {
            return refuse("the weights are quantized (quantization_config)".to_string());
        }
        Ok(())
    }

    /// The rotary base and scaling, wherever they stand.
    fn rope(&self) -> anyhow::Result<(f64, RopeScaling)> {
        let none = Map::new();
        let parameters = self.rope_parameters.as_ref().unwrap_or(&none);
        // transformers 5 lets rope_scaling, if present, take the place of rope_parameters.
        let scaling = self.rope_scaling.as_ref().filter(|map| !map.is_empty());
        let source = scaling.unwrap_or(parameters);
        let refuse = |what: String| {
            Err(error::checkpoint(
                format!("{what}, in config.json"),
                "laam supports rotary embeddings of rope_type default, linear and llama3",
            ))
        };
        for map in [parameters, source] {
            if let Some((key, _)) = map.iter().find(|(_, value)| value.is_object()) {
                return refuse(format!("rotary embeddings differ between layers ({key:?})"));
            }
        }

        let theta = |map: &Map<String, Value>| match map.get("rope_theta") {
            Some(value) => number(value, "rope_theta").map(Some),
            None => Ok(None),
        };
        let given = [theta(source)?, theta(parameters)?, self.rope_theta];
        let rope_theta = given.into_iter().flatten().next().unwrap_or(llama::ROPE_THETA);
        if given.into_iter().flatten().any(|other| other != rope_theta) {
            return Err(error::checkpoint(
                "rope_theta is given twice with different values, in config.json",
                "keep the one the model was trained with, in rope_theta and in rope_parameters",
            ));
        }

        let partial = match source.get("partial_rotary_factor") {
            Some(value) => Some(number(value, "partial_rotary_factor")?),
            None => self.partial_rotary_factor,
        };
        if let Some(part) = partial.filter(|&part| part != 1.0) {
            return refuse(format!("partial_rotary_factor is {part}, not 1"));
        }

        let need = |key: &str| match source.get(key) {
            Some(value) => number(value, key),
            None => Err(error::checkpoint(
                format!("rope_scaling has no {key:?}, in config.json"),
                format!("add {key:?} next to rope_type"),
            )),
        };
        let kind = source.get("rope_type").or_else(|| source.get("type"));
        let scaling = match kind.map(|kind| kind.as_str().unwrap_or("?")) {
            None | Some("default") => RopeScaling::None,
            Some("linear") => RopeScaling::Linear { factor: need("factor")? },
            Some("llama3") => RopeScaling::Llama3 {
                factor: need("factor")?,
                low_freq_factor: need("low_freq_factor")?,
                high_freq_factor: need("high_freq_factor")?,
                original_max_position_embeddings: match source
                    .get("original_max_position_embeddings")
                {
                    None => self.max_position_embeddings,
                    Some(value) => value.as_u64().filter(|&size| size > 0).map_or_else(
                        || {
                            Err(error::checkpoint(
                                "invalid original_max_position_embeddings: must be at least 1, in config.json",
                                "set it to the context the model was first trained with, such as 8192",
                            ))
                        },
                        |size| Ok(size as usize),
                    )?,
                },
            },
            Some(other) => return refuse(format!("rope_type is {other:?}")),
        };
        Ok((rope_theta, scaling))
    }
}

fn number(value: &Value, name: &str) -> anyhow::Result<f64> {
    value.as_f64().ok_or_else(|| {
        error::checkpoint(
            format!("invalid {name}: must be a number, in config.json"),
            format!("set {name} to a number"),
        )
    })
}

/// The ids given, each once. Below 0 stands for none, as in the first Llama's files.
fn ids(name: &str, given: Option<Ids>) -> anyhow::Result<Vec<u32>> {
    let given = match given {
        None => Vec::new(),
        Some(Ids::One(id)) => vec![id],
        Some(Ids::Many(ids)) => ids,
    };
    let mut ids = Vec::new();
    for id in given.into_iter().filter(|&id| id >= 0) {
        let id = u32::try_from(id).map_err(|_| {
            error::checkpoint(
                format!("invalid {name} {id}: must be a token id"),
                format!("set {name} to a token id"),
            )
        })?;
        if !ids.contains(&id) {
            ids.push(id);
        }
    }
    Ok(ids)
}

/// None, one id, or a list, as transformers writes them.
fn ids_json(ids: &[u32]) -> Value {
    match ids {
        [] => Value::Null,
        [id] => json!(id),
        ids => json!(ids),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::hint_of;
    use crate::model::config::tests::original;

    #[test]
    fn config_round_trips() {
        let llama3 = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 256,
        };
        for rope_scaling in [RopeScaling::None, RopeScaling::Linear { factor: 2.5 }, llama3] {
            for (tie_word_embeddings, pad_token_id) in [(true, None), (false, Some(4))] {
                let config = Config {
                    rope_scaling,
                    tie_word_embeddings,
                    pad_token_id,
                    rope_theta: 500_000.0,
                    ..original()
                };
                let text = config.to_json(Dtype::Bf16).to_string();
                assert_eq!(Config::from_json(&text).unwrap(), (config, Vec::new()), "{text}");
            }
        }
    }

    #[test]
    fn config_has_keys_of_transformers_4_and_5() {
        let json = Config { rope_theta: 5e5, ..original() }.to_json(Dtype::Bf16);
        assert_eq!(json["rope_theta"], 5e5);
        assert_eq!(json["rope_parameters"], json!({"rope_type": "default", "rope_theta": 5e5}));
        assert_eq!(
            (&json["torch_dtype"], &json["dtype"]),
            (&json!("bfloat16"), &json!("bfloat16"))
        );
    }

    #[test]
    fn config_defaults_match_transformers() {
        let (config, _) = Config::from_json(r#"{"model_type": "llama"}"#).unwrap();
        let expected = Config {
            vocab_size: 32000,
            hidden_size: 4096,
            intermediate_size: 11008,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: 32,
            head_dim: 128,
            max_position_embeddings: 2048,
            bos_token_id: Some(1),
            eos_token_ids: vec![2],
            pad_token_id: None,
            window_kind: None,
            ..original()
        };
        assert_eq!(config, expected);
    }

    /// A small Llama's `config.json` with some fields set otherwise.
    fn with(fields: &Value) -> String {
        let mut json = original().to_json(Dtype::F32);
        for (key, value) in fields.as_object().unwrap() {
            json[key] = value.clone();
        }
        json.to_string()
    }

    #[test]
    fn config_reads_both_rope_theta_keys() {
        let theta = |fields: &Value| Config::from_json(&with(fields)).map(|(c, _)| c.rope_theta);
        let old = json!({"rope_theta": 7e4, "rope_parameters": null});
        let new = json!({"rope_theta": null, "rope_parameters": {"rope_theta": 7e4}});
        assert_eq!(theta(&old).unwrap(), 7e4);
        assert_eq!(theta(&new).unwrap(), 7e4);
        let twice = json!({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 7e4}});
        assert!(format!("{:#}", theta(&twice).unwrap_err()).contains("twice"));
    }

    #[test]
    fn config_reads_special_ids_as_lists_negative_or_null() {
        let read = |fields: &Value| Config::from_json(&with(fields)).unwrap();
        let (config, warnings) = read(&json!({"eos_token_id": [7, 9], "pad_token_id": -1}));
        assert_eq!((config.eos_token_ids, config.pad_token_id), (vec![7, 9], None));
        assert!(warnings.is_empty(), "{warnings:?}");
        assert_eq!(read(&json!({"bos_token_id": null})).0.bos_token_id, None);
    }

    #[test]
    fn config_rejects_unsupported_architectures() {
        for (fields, named) in [
            (json!({"model_type": "mistral"}), "mistral"),
            (json!({"model_type": null}), "model_type"),
            (json!({"hidden_act": "gelu"}), "gelu"),
            (json!({"attention_bias": true}), "attention_bias"),
            (json!({"mlp_bias": true}), "mlp_bias"),
            (json!({"quantization_config": {"bits": 4}}), "quantized"),
            (json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}}), "dynamic"),
            (json!({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}), "yarn"),
            (json!({"rope_scaling": {"rope_type": "longrope"}}), "longrope"),
            (json!({"rope_scaling": {"rope_type": "linear"}}), "factor"),
            (json!({"rope_scaling": {"rope_type": "linear", "factor": "two"}}), "factor"),
            (json!({"rope_scaling": {"rope_type": 3}}), "rope_type"),
            (json!({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}), "layers"),
            (json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor"),
            (json!({"vocab_size": -5}), "config.json"),
            (json!({"vocab_size": "many"}), "config.json"),
            (json!({"num_attention_heads": 0, "head_dim": null}), "num_attention_heads"),
            (json!({"num_hidden_layers": 4_000_000_000_u64}), "num_hidden_layers"),
            (json!({"pad_token_id": 99999999999_i64}), "pad_token_id"),
        ] {
            let error = Config::from_json(&with(&fields)).expect_err(&fields.to_string());
            assert!(hint_of(&error).is_some(), "{fields}");
            assert!(format!("{error:#}").contains(named), "{fields}: {error:#}");
        }
        for text in ["", "[]", "{", "null", &"[".repeat(100_000)] {
            assert!(Config::from_json(text).is_err());
        }
    }
}
