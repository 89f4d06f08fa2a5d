//! Arenas as safetensors files: written whole, read from one file or several.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use anyhow::Context;
use safetensors::tensor::{Dtype as StoredDtype, SafeTensors, TensorView, View};

use super::{Config, Layout, Parameter};
use crate::device::check_host_memory;
use crate::dtype::Dtype;
use crate::error::{self, ErrorKind, Hint};
use crate::files::{self, MappedFile};

fn stored(dtype: Dtype) -> StoredDtype {
    match dtype {
        Dtype::F32 => StoredDtype::F32,
        Dtype::F16 => StoredDtype::F16,
        Dtype::Bf16 => StoredDtype::BF16,
    }
}

/// Dtype that a stored tensor is read as: float64 is rounded to float32.
fn supported(tensor: &TensorView<'_>) -> Option<Dtype> {
    if tensor.dtype() == StoredDtype::F64 {
        return Some(Dtype::F32);
    }
    Dtype::ALL.into_iter().find(|&dtype| stored(dtype) == tensor.dtype())
}

/// The values of a tensor that is [`supported`] as `dtype`.
fn decode(tensor: &TensorView<'_>, dtype: Dtype, out: &mut [f32]) {
    if tensor.dtype() == StoredDtype::F64 {
        for (out, bytes) in out.iter_mut().zip(tensor.data().as_chunks::<8>().0) {
            *out = f64::from_le_bytes(*bytes) as f32;
        }
    } else {
        dtype.decode_into(tensor.data(), out);
    }
}

/// A tensor on its way to a file, converted only when it is written.
struct Outgoing<'a> {
    shape: Vec<usize>,
    dtype: Dtype,
    values: &'a [f32],
}

impl View for Outgoing<'_> {
    fn dtype(&self) -> StoredDtype {
        stored(self.dtype)
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match self.dtype {
            // safetensors are little-endian, like every machine this builds for.
            Dtype::F32 => Cow::Borrowed(bytemuck::cast_slice(self.values)),
            dtype => Cow::Owned(dtype.encode(self.values)),
        }
    }

    fn data_len(&self) -> usize {
        self.values.len() * self.dtype.size()
    }
}

#[cfg(target_endian = "big")]
compile_error!("safetensors files are written as the machine's own bytes, little-endian");

/// Writes arenas of one layout to `path`, each parameter as a tensor called by the arena's prefix
/// and its own name. `metadata` is one key and its text, as the order of several is not fixed.
pub(super) fn write(
    path: &Path,
    layout: &Layout,
    arenas: &[(&str, &[f32])],
    dtype: Dtype,
    metadata: (&str, String),
) -> anyhow::Result<()> {
    let mut tensors = Vec::new();
    for &(prefix, arena) in arenas {
        if arena.len() != layout.len {
            let (len, want) = (arena.len(), layout.len);
            return Err(error::internal(format!("arena {prefix:?} has {len} values, not {want}")));
        }
        for parameter in &layout.parameters {
            let values = &arena[parameter.span.range()];
            // 65504 is the largest float16; beyond it a weight would silently become infinite.
            if dtype == Dtype::F16
                && values.iter().any(|&x| x.is_finite() && !dtype.round(x).is_finite())
            {
                return Err(error::checkpoint(
                    format!("{} has a value too large for float16", parameter.name),
                    "set `precision` to bfloat16",
                ));
            }
            let shape = parameter.shape();
            tensors
                .push((format!("{prefix}{}", parameter.name), Outgoing { shape, dtype, values }));
        }
    }
    let metadata = HashMap::from([(metadata.0.to_string(), metadata.1)]);
    safetensors::serialize_to_file(tensors, Some(metadata), path)?;
    Ok(())
}

/// Safetensors files mapped into memory.
pub(super) struct Mapped {
    files: Vec<(PathBuf, MappedFile)>,
}

/// The tensors of mapped files by name, each with the file it came from.
pub(super) type Tensors<'a> = BTreeMap<String, (TensorView<'a>, &'a Path)>;

impl Mapped {
    pub fn open(paths: &[PathBuf]) -> anyhow::Result<Self> {
        let files = paths.iter().map(|path| Ok((path.clone(), map(path)?)));
        Ok(Self { files: files.collect::<anyhow::Result<_>>()? })
    }

    /// Reads and checks the headers: sizes, offsets, and that each file has all of its bytes. Of
    /// a tensor that several files have, the one in its file of `places` counts.
    pub fn tensors(&self, places: &BTreeMap<String, PathBuf>) -> anyhow::Result<Tensors<'_>> {
        let mut tensors = Tensors::new();
        for (path, bytes) in &self.files {
            let file = SafeTensors::deserialize(bytes)
                .with_context(|| {
                    format!("{} is cut short or not a safetensors file", path.display())
                })
                .hint(ErrorKind::Checkpoint, || "copy or save it again")?;
            for (name, tensor) in file.tensors() {
                if places.get(&name).is_some_and(|place| place != path) {
                    continue;
                }
                if let Some((_, other)) = tensors.insert(name.clone(), (tensor, path.as_path())) {
                    return Err(error::checkpoint(
                        format!("{name} is both in {} and {}", other.display(), path.display()),
                        "keep the files of one model only in the folder",
                    ));
                }
            }
        }
        Ok(tensors)
    }

    /// Takes the pages that were read out of memory.
    pub fn release_pages(&self) {
        self.files.iter().for_each(|(_, file)| file.release_pages());
    }

    /// The text under `key` in the first file's metadata.
    pub fn metadata(&self, key: &str) -> Option<String> {
        let (_, metadata) = SafeTensors::read_metadata(&self.files.first()?.1).ok()?;
        metadata.metadata().as_ref()?.get(key).cloned()
    }
}

fn map(path: &Path) -> anyhow::Result<MappedFile> {
    let advice = || "check that the model folder is complete and readable";
    let open = || MappedFile::new(&files::open_current(path)?, path);
    open()
        .with_context(|| format!("cannot read {}", path.display()))
        .hint(ErrorKind::Checkpoint, advice)
}

/// Fills one arena from the tensors called by `prefix` and each parameter's name, and takes them
/// out of `tensors`. Nothing is allocated before every name, type and shape has been checked.
pub(super) fn take_arena(
    tensors: &mut Tensors<'_>,
    layout: &Layout,
    prefix: &str,
) -> anyhow::Result<(Vec<f32>, Dtype)> {
    let mut found = Vec::with_capacity(layout.parameters.len());
    for parameter in &layout.parameters {
        let name = format!("{prefix}{}", parameter.name);
        let Some((tensor, path)) = tensors.remove(&name) else {
            return Err(missing(&name));
        };
        found.push((parameter, checked(&name, parameter, tensor, path)?));
    }
    check_host_memory(4 * layout.len as u128, "the model")?;
    let mut arena = vec![0.0; layout.len];
    for (parameter, (tensor, dtype)) in &found {
        decode(tensor, *dtype, &mut arena[parameter.span.range()]);
    }
    // Embeddings are first: what they are stored in, the model is said to be stored in.
    let dtype = found.first().map_or(Dtype::F32, |(_, (_, dtype))| *dtype);
    Ok((arena, dtype))
}

/// Gives tensors the names they have in a `LlamaForCausalLM`: transformers also saves the model below
/// the LM head by itself, without `model.`, and finds a tied embedding under the LM head's name.
pub(super) fn name_as_a_llama(tensors: &mut Tensors<'_>, config: &Config) {
    const EMBEDDING: &str = "model.embed_tokens.weight";
    const HEAD: &str = "lm_head.weight";
    if !tensors.keys().any(|name| name.starts_with("model.")) {
        let with_prefix = |name: String| if name == HEAD { name } else { format!("model.{name}") };
        *tensors = std::mem::take(tensors)
            .into_iter()
            .map(|(name, tensor)| (with_prefix(name), tensor))
            .collect();
    }
    if config.tie_word_embeddings && !tensors.contains_key(EMBEDDING) {
        let head = tensors.remove(HEAD);
        tensors.extend(head.map(|head| (EMBEDDING.to_string(), head)));
    }
}

fn missing(name: &str) -> anyhow::Error {
    let advice = if name == "lm_head.weight" {
        "if the LM head shares the embedding, set tie_word_embeddings to true in config.json"
    } else {
        "config.json and the weights must belong to one model; save or copy the whole folder again"
    };
    error::checkpoint(format!("missing tensor {name}"), advice)
}

fn checked<'a>(
    name: &str,
    parameter: &Parameter,
    tensor: TensorView<'a>,
    path: &Path,
) -> anyhow::Result<(TensorView<'a>, Dtype)> {
    if tensor.shape() != parameter.shape() {
        return Err(error::checkpoint(
            format!(
                "{name} has the shape {:?}, but config.json says {:?}, in {}",
                tensor.shape(),
                parameter.shape(),
                path.display()
            ),
            "config.json and the weights must belong to one model; save or copy the whole folder again",
        ));
    }
    let dtype = supported(&tensor).ok_or_else(|| {
        error::checkpoint(
            format!("{name} is stored as {:?}, in {}", tensor.dtype(), path.display()),
            "laam reads float64, float32, float16 and bfloat16: save the model in one of them",
        )
    })?;
    Ok((tensor, dtype))
}

/// True if a tensor equals the embedding bit for bit.
pub(super) fn is_same(arena: &[f32], tensor: &TensorView<'_>) -> bool {
    let Some(dtype) = supported(tensor) else { return false };
    if tensor.shape().iter().product::<usize>() != arena.len() {
        return false;
    }
    let mut values = vec![0.0; arena.len()];
    decode(tensor, dtype, &mut values);
    values == arena
}
