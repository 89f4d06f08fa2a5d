//! A model on disk: a Hugging Face folder that transformers loads as it is, with what laam needs to
//! resume training.
//!
//! | file | holds |
//! |---|---|
//! | `config.json`, `generation_config.json` | the shape |
//! | `model.safetensors` | the weights, under Hugging Face's names; a tied head is left out |
//! | `tokenizer.json`, `tokenizer_config.json` | the tokenizer of the run, with the context |
//! | `training_state.safetensors` | master weights, moments, and the run's position; optional |
//! | `provenance.json` | origin and settings |
//! | `README.md` | the model card |
//!
//! All are replaced as one (see [`super::replace`]). Readers never change a folder.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::replace::{STAGED, Staged, settle};
use super::weights::{self, Mapped, Tensors};
use super::{Config, GenerationDefaults, Layout, Provenance, card};
use crate::corpus::hex;
use crate::dtype::Dtype;
use crate::error::{self, ErrorKind, Hint};
use crate::files;
use crate::tokenizer::Tokenizer;

const CONFIG: &str = "config.json";
const GENERATION: &str = "generation_config.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const STATE: &str = "training_state.safetensors";
const PROVENANCE: &str = "provenance.json";
/// The key of the training state's JSON in its file's metadata.
const STATE_KEY: &str = "state";
const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const CARD: &str = "README.md";
/// The files of a model, which `--reload` replaces whoever wrote them.
const MODEL_FILES: [&str; 8] = [
    CONFIG,
    GENERATION,
    WEIGHTS,
    INDEX,
    TOKENIZER,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
];
/// Other files that saving writes or removes.
const OUR_FILES: [&str; 3] = [STATE, PROVENANCE, CARD];
/// No JSON file of a model folder is near this long; an index of shards has some 100 bytes per tensor.
const MAX_JSON_BYTES: u64 = 64 << 20;

/// Content of a model folder to be saved.
pub struct Checkpoint<'a> {
    /// Shape of the model.
    pub config: &'a Config,
    /// Layout of the weights.
    pub layout: &'a Layout,
    /// An arena. It is rounded to `precision` on its way to the file.
    pub weights: &'a [f32],
    /// Type of the saved weights.
    pub precision: Dtype,
    /// Tokenizer, saved beside the weights.
    pub tokenizer: Option<&'a Tokenizer>,
    /// Origin of the weights.
    pub provenance: &'a Provenance,
    /// State of the run, if it can be resumed.
    pub training_state: Option<TrainingState<'a>>,
}

/// State from which a run resumes bit for bit.
pub struct TrainingState<'a> {
    /// Arenas by name, stored in float32: master weights, moments.
    pub arenas: &'a [(&'a str, &'a [f32])],
    /// Everything small: the step, the sampler's position, seeds.
    pub state: &'a Value,
}

/// A model read from a folder.
#[derive(Debug)]
pub struct Model {
    /// Shape of the model.
    pub config: Config,
    /// Layout of the weights.
    pub layout: Layout,
    /// An arena of [`Layout::len`].
    pub weights: Vec<f32>,
    /// Dtype of the stored weights.
    pub precision: Dtype,
    /// Warnings for the user: ignored tensors, unsupported settings.
    pub warnings: Vec<String>,
}

/// A training state read from a folder.
#[derive(Debug)]
pub struct SavedState {
    /// Arenas by name: see [`Checkpoint::training_state`].
    pub arenas: BTreeMap<String, Vec<f32>>,
    /// The object saved with them.
    pub state: Value,
}

/// Writes a model folder, or replaces the one that is there. Whatever else lies in the folder stays.
pub fn save(folder: &Path, checkpoint: &Checkpoint) -> anyhow::Result<()> {
    checkpoint.config.validate()?;
    let staged = Staged::begin(folder)?;
    let result = write_all(folder, &staged, checkpoint).and_then(|()| staged.commit());
    if result.is_err() {
        staged.discard();
    }
    result.with_context(|| format!("saving the model in {}", folder.display()))
}

fn write_all(folder: &Path, staged: &Staged, checkpoint: &Checkpoint) -> anyhow::Result<()> {
    let Checkpoint { config, layout, precision, .. } = *checkpoint;
    let disk = || "check that the disk has room; what was there before is untouched";
    let json = |name: &str, value: &Value| staged.write(name, format!("{value:#}\n").as_bytes());
    json(CONFIG, &config.to_json(precision))?;
    json(GENERATION, &config.to_generation_json())?;

    // Without this entry transformers 4 does not load the file.
    let format = ("format", "pt".to_string());
    let path = staged.path(WEIGHTS);
    weights::write(&path, layout, &[("", checkpoint.weights)], precision, format)
        .hint(ErrorKind::Checkpoint, disk)?;
    let mut provenance = checkpoint.provenance.clone();
    provenance.weights_sha256 = Some(hex(&files::sha256(&path).hint(ErrorKind::Checkpoint, disk)?));
    json(PROVENANCE, &serde_json::to_value(&provenance)?)?;
    staged.write(CARD, card::card(config, precision, &provenance).as_bytes())?;

    match &checkpoint.training_state {
        Some(TrainingState { arenas, state }) => {
            let named: Vec<(String, &[f32])> =
                arenas.iter().map(|&(name, arena)| (format!("{name}/"), arena)).collect();
            let arenas: Vec<_> =
                named.iter().map(|(name, arena)| (name.as_str(), *arena)).collect();
            let metadata = (STATE_KEY, state.to_string());
            weights::write(&staged.path(STATE), layout, &arenas, Dtype::F32, metadata)
                .hint(ErrorKind::Checkpoint, disk)?;
        }
        // One of an earlier save does not belong to these weights.
        None => staged.remove(STATE)?,
    }
    for (name, bytes) in checkpoint.tokenizer.iter().flat_map(|tokenizer| tokenizer.files()) {
        if name == TOKENIZER_CONFIG {
            let context = config.max_position_embeddings;
            staged.write(name, &completed_tokenizer_config(bytes, context)?)?;
        } else {
            staged.write(name, bytes)?;
        }
    }
    // Shards of an earlier model would only take room; one file takes precedence over them.
    for shard in shards_of(folder).unwrap_or_default() {
        staged.remove(&shard)?;
    }
    staged.remove(INDEX)
}

/// `tokenizer_config.json` of a model. Without `model_input_names` transformers' tokenizer returns
/// token_type_ids, which `generate` refuses for Llama; `model_max_length` is where it truncates.
fn completed_tokenizer_config(bytes: &[u8], context: usize) -> anyhow::Result<Vec<u8>> {
    let Ok(Value::Object(mut config)) = serde_json::from_slice(bytes) else {
        return Ok(bytes.to_vec());
    };
    config
        .entry("model_input_names")
        .or_insert_with(|| serde_json::json!(["input_ids", "attention_mask"]));
    config.insert("model_max_length".to_string(), context.into());
    Ok(serde_json::to_vec_pretty(&config)?)
}

/// Reads a model folder: laam's, or any Llama that transformers saved.
pub fn load(folder: &Path) -> anyhow::Result<Model> {
    let (config, mut warnings) = load_config(folder)?;
    let mut load = || {
        let layout = Layout::new(&config);
        let (files, places) = weight_files(folder)?;
        let mapped = Mapped::open(&files)?;
        let mut tensors = mapped.tensors(&places)?;
        weights::name_as_a_llama(&mut tensors, &config);
        let (weights, precision) = weights::take_arena(&mut tensors, &layout, "")?;
        pass_over(tensors, &config, &layout, &weights, &mut warnings)?;
        anyhow::Ok((layout, weights, precision))
    };
    let (layout, weights, precision) =
        load().with_context(|| format!("loading the model in {}", folder.display()))?;
    Ok(Model { config, layout, weights, precision, warnings })
}

/// Reads the configuration alone, and warnings about it.
pub fn load_config(folder: &Path) -> anyhow::Result<(Config, Vec<String>)> {
    let text = read_json(folder, CONFIG)?;
    let loading = || format!("loading the model in {}", folder.display());
    let (mut config, warnings) = Config::from_json(&text).with_context(loading)?;
    for id in load_generation_defaults(folder)?.eos_token_ids {
        if (id as usize) < config.vocab_size && !config.eos_token_ids.contains(&id) {
            config.eos_token_ids.push(id);
        }
    }
    Ok((config, warnings))
}

/// Reads how the folder says its model generates; the plain defaults if it does not.
pub fn load_generation_defaults(folder: &Path) -> anyhow::Result<GenerationDefaults> {
    if !files::exists_current(&folder.join(GENERATION)) {
        return Ok(GenerationDefaults::default());
    }
    GenerationDefaults::from_json(&read_json(folder, GENERATION)?)
        .with_context(|| format!("loading the model in {}", folder.display()))
}

/// Reads the provenance; `None` if the folder has none.
pub fn load_provenance(folder: &Path) -> anyhow::Result<Option<Provenance>> {
    if !files::exists_current(&folder.join(PROVENANCE)) {
        return Ok(None);
    }
    serde_json::from_str(&read_json(folder, PROVENANCE)?)
        .with_context(|| format!("invalid {PROVENANCE}, in {}", folder.display()))
        .hint(ErrorKind::Checkpoint, || "restore it from where the model came from, or remove it")
        .map(Some)
}

/// True if the folder holds a training state.
pub fn has_training_state(folder: &Path) -> bool {
    files::exists_current(&folder.join(STATE))
}

/// True if the folder holds a model's weights.
pub fn has_weights(folder: &Path) -> bool {
    files::exists_current(&folder.join(WEIGHTS))
}

/// True if laam wrote the model in the folder: its `provenance.json` is laam's.
pub fn is_own(folder: &Path) -> bool {
    let text = files::read_current(&folder.join(PROVENANCE), MAX_JSON_BYTES).unwrap_or_default();
    serde_json::from_slice::<Value>(&text).is_ok_and(|provenance| {
        provenance["program_version"].is_string() && provenance.get("weights_sha256").is_some()
    })
}

/// The files in the folder that saving a model would overwrite or remove, though laam did not write
/// them. With `reload` the files of the model itself are not among them.
pub fn foreign_files(folder: &Path, reload: bool) -> Vec<PathBuf> {
    if is_own(folder) {
        return Vec::new();
    }
    let model = MODEL_FILES.iter().filter(|_| !reload);
    let paths = model.chain(&OUR_FILES).map(|name| folder.join(name));
    paths.filter(|path| fs::symlink_metadata(path).is_ok()).collect()
}

/// Removes the files of a model that laam wrote, and the folder if nothing else is in it. Returns the
/// names of the files.
pub fn remove_own(folder: &Path) -> anyhow::Result<Vec<&'static str>> {
    settle(folder)?;
    let mut removed = Vec::new();
    let mut remove = || -> std::io::Result<()> {
        match fs::remove_dir_all(folder.join(STAGED)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        // The training state first and the provenance last: what a crash leaves is not resumed, and known
        // as laam's own.
        let names = MODEL_FILES.iter().chain(&OUR_FILES).filter(|name| **name != PROVENANCE);
        for name in [STATE].iter().chain(names).chain(&[PROVENANCE]) {
            match fs::remove_file(folder.join(name)) {
                Ok(()) => removed.push(*name),
                Err(none) if none.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        match fs::remove_dir(folder) {
            Err(error) if error.kind() != std::io::ErrorKind::DirectoryNotEmpty => Err(error),
            _ => Ok(()),
        }
    };
    remove()
        .with_context(|| format!("cannot remove {}", folder.display()))
        .hint(ErrorKind::Checkpoint, || "remove it by hand")?;
    Ok(removed)
}

/// Removes what a save that was cut off left in a folder; returns true if there was something.
pub fn remove_staged(folder: &Path) -> anyhow::Result<bool> {
    let staged = folder.join(STAGED);
    if !fs::symlink_metadata(&staged).is_ok_and(|found| found.is_dir()) {
        return Ok(false);
    }
    fs::remove_dir_all(&staged)
        .with_context(|| format!("cannot remove {}", staged.display()))
        .hint(ErrorKind::Checkpoint, || "remove it by hand")?;
    // A folder that was made for that save alone.
    let _ = fs::remove_dir(folder);
    Ok(true)
}

/// Reads several files of a folder as they were at one moment: again, if a writer replaced them
/// meanwhile.
pub fn read_consistently<T>(
    folder: &Path,
    mut read: impl FnMut() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    const MAX_ATTEMPTS: usize = 100;
    let stamp = || {
        [CONFIG, WEIGHTS, PROVENANCE, TOKENIZER].map(|name| {
            let found = files::open_current(&folder.join(name)).and_then(|file| file.metadata());
            found.ok().map(|found| (found.ino(), found.len(), found.mtime(), found.mtime_nsec()))
        })
    };
    let mut before = stamp();
    for _ in 1..MAX_ATTEMPTS {
        let result = read();
        let after = stamp();
        if before == after {
            return result;
        }
        before = after;
    }
    read()
}

/// Differences between a folder's files and the hashes in its provenance, as warnings.
pub fn check_hashes(folder: &Path) -> anyhow::Result<Vec<String>> {
    let Some(provenance) = load_provenance(folder)? else { return Ok(Vec::new()) };
    let mut warnings = Vec::new();
    for (name, recorded, what) in [
        (WEIGHTS, &provenance.weights_sha256, "what it says of the origin may not hold for them"),
        (TOKENIZER, &provenance.tokenizer_sha256, "the model was trained with another tokenizer"),
    ] {
        let Some(recorded) = recorded else { continue };
        let path = folder.join(name);
        let found = match files::open_current(&path).and_then(files::sha256_of) {
            Ok(found) => hex(&found),
            Err(none) if none.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => {
                return Err(error)
                    .with_context(|| format!("cannot read {}", path.display()))
                    .hint(ErrorKind::Checkpoint, || "make it readable");
            }
        };
        if found != *recorded {
            warnings.push(format!(
                "{} is not the file that {PROVENANCE} describes: {what} (sha256 {found}, recorded \
                 {recorded})",
                path.display()
            ));
        }
    }
    Ok(warnings)
}

/// Removes the training state; the model stays. Returns the path if there was one.
pub fn forget_training_state(folder: &Path) -> anyhow::Result<Option<PathBuf>> {
    settle(folder)?;
    let path = folder.join(STATE);
    match fs::remove_file(&path) {
        Err(none) if none.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        removed => removed
            .with_context(|| format!("cannot remove {}", path.display()))
            .hint(ErrorKind::Checkpoint, || "remove it by hand")?,
    }
    Ok(Some(path))
}

/// Reads the training state; `None` if the folder holds a model alone.
pub fn load_training_state(folder: &Path, layout: &Layout) -> anyhow::Result<Option<SavedState>> {
    if !has_training_state(folder) {
        return Ok(None);
    }
    let path = folder.join(STATE);
    let load = || {
        let mapped = Mapped::open(&[path])?;
        let state = mapped.metadata(STATE_KEY).unwrap_or_default();
        let state = serde_json::from_str(&state)
            .with_context(|| format!("{STATE} does not say at which step the run was"))
            .hint(
                ErrorKind::Checkpoint,
                || "laam did not write it; start a fresh run with `init_from`",
            )?;
        let mut tensors = mapped.tensors(&BTreeMap::new())?;
        let mut arenas = BTreeMap::new();
        while let Some(name) = tensors.keys().next() {
            let prefix = name.split_once('/').map_or("", |(prefix, _)| prefix).to_string();
            let (arena, _) = weights::take_arena(&mut tensors, layout, &format!("{prefix}/"))?;
            if let Some(rest) = tensors.keys().find(|name| name.starts_with(&format!("{prefix}/")))
            {
                return Err(error::checkpoint(
                    format!("{STATE} has the unexpected tensor {rest}"),
                    "it belongs to another model; start a fresh run with `init_from`",
                ));
            }
            arenas.insert(prefix, arena);
            mapped.release_pages();
        }
        anyhow::Ok(SavedState { arenas, state })
    };
    load().with_context(|| format!("loading the training state in {}", folder.display())).map(Some)
}

/// The safetensors files of a model, one or several, in the order of their names.
pub fn weight_paths(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    Ok(weight_files(folder)?.0)
}

/// The sha256 of a model's weights: see [`super::ParentRecord`].
pub fn weights_sha256(folder: &Path) -> anyhow::Result<String> {
    let paths = weight_paths(folder)?;
    let hash_of = |path: &PathBuf| {
        let hash = files::sha256(path).map(|hash| hex(&hash));
        hash.with_context(|| format!("cannot read {}", path.display()))
            .hint(ErrorKind::Checkpoint, || "make it readable")
    };
    if let [single] = paths.as_slice() {
        return hash_of(single);
    }
    let mut lines = String::new();
    for path in &paths {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let _ = writeln!(lines, "{}  {name}", hash_of(path)?); // writing to a String cannot fail
    }
    Ok(hex(&Sha256::digest(lines)))
}

/// The safetensors files of a model and, for several, which of them has each tensor.
fn weight_files(folder: &Path) -> anyhow::Result<(Vec<PathBuf>, BTreeMap<String, PathBuf>)> {
    let single = folder.join(WEIGHTS);
    if files::exists_current(&single) {
        return Ok((vec![single], BTreeMap::new()));
    }
    if files::exists_current(&folder.join(INDEX)) {
        let map = index_of(folder)?;
        let places: BTreeMap<String, PathBuf> =
            map.into_iter().map(|(name, shard)| (name, folder.join(shard))).collect();
        let files: BTreeSet<PathBuf> = places.values().cloned().collect();
        return Ok((files.into_iter().collect(), places));
    }
    let advice = if folder.join("pytorch_model.bin").exists() {
        "the weights are a pickle, which can hold a program: load the model in transformers and \
         save_pretrained it as safetensors"
    } else {
        "give a folder that laam or transformers' save_pretrained wrote"
    };
    Err(error::checkpoint(format!("there is no {WEIGHTS} in {}", folder.display()), advice))
}

/// The names of the shards that the index lists, each once.
fn shards_of(folder: &Path) -> anyhow::Result<BTreeSet<String>> {
    Ok(index_of(folder)?.into_values().collect())
}

/// The shard of each tensor, as the index has it.
fn index_of(folder: &Path) -> anyhow::Result<BTreeMap<String, String>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let index: Index = serde_json::from_str(&read_json(folder, INDEX)?)
        .with_context(|| format!("invalid {INDEX}, in {}", folder.display()))
        .hint(ErrorKind::Checkpoint, || "copy or save the model again")?;
    for shard in index.weight_map.values() {
        // A shard lies beside its index: no way up, no absolute path, no other drive.
        let is_plain = !shard.contains(['/', '\\', ':', '\0']) && !shard.starts_with('.');
        if !is_plain || !shard.ends_with(".safetensors") {
            return Err(error::checkpoint(
                format!("{INDEX} names the file {shard:?}, in {}", folder.display()),
                "a shard must be a .safetensors file in the same folder; do not trust this one",
            ));
        }
    }
    Ok(index.weight_map)
}

/// Judges the tensors that no parameter asked for.
fn pass_over(
    tensors: Tensors<'_>,
    config: &Config,
    layout: &Layout,
    weights: &[f32],
    warnings: &mut Vec<String>,
) -> anyhow::Result<()> {
    let mut unknown = Vec::new();
    for (name, (tensor, _)) in tensors {
        // Old folders keep the rotary frequencies, which the configuration gives.
        if name.ends_with(".rotary_emb.inv_freq") {
            continue;
        }
        if name == "lm_head.weight" && config.tie_word_embeddings {
            // transformers 4 would take the embedding, transformers 5 the head.
            if !weights::is_same(&weights[layout.embedding.range()], &tensor) {
                return Err(error::checkpoint(
                    "lm_head.weight differs from the embedding, though tie_word_embeddings is true",
                    "if the model has an LM head of its own, set tie_word_embeddings to false in \
                     config.json",
                ));
            }
            continue;
        }
        unknown.push(name);
    }
    if let Some(first) = unknown.first() {
        let count = unknown.len();
        warnings.push(format!(
            "{count} tensors are not part of a Llama and were ignored: {first}{}",
            if count > 1 { ", ..." } else { "" }
        ));
    }
    Ok(())
}

fn read_json(folder: &Path, name: &str) -> anyhow::Result<String> {
    let path = folder.join(name);
    let advice = || "give a folder that laam or transformers' save_pretrained wrote";
    let read = || -> anyhow::Result<String> {
        let bytes = files::read_current(&path, MAX_JSON_BYTES)?;
        String::from_utf8(bytes).context("it is not UTF-8 text")
    };
    read()
        .with_context(|| format!("cannot read {}", path.display()))
        .hint(ErrorKind::Checkpoint, advice)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::config::tests::original;
    use crate::model::initialize;
    use crate::model::replace::tests::with_fuse;

    fn small() -> Config {
        Config {
            vocab_size: 31,
            hidden_size: 6,
            intermediate_size: 5,
            num_hidden_layers: 2,
            ..original()
        }
    }

    /// Saves weights that depend on `seed` and a training state that says the same seed.
    fn save_seed(folder: &Path, config: &Config, seed: u64, state: bool) -> anyhow::Result<()> {
        let layout = Layout::new(config);
        let weights = initialize(config, &layout, seed);
        let state_json = serde_json::json!({"step": seed});
        save(
            folder,
            &Checkpoint {
                config,
                layout: &layout,
                weights: &weights,
                precision: Dtype::F32,
                tokenizer: None,
                provenance: &Provenance { seed, ..Provenance::default() },
                training_state: state.then_some(TrainingState {
                    arenas: &[("master", &weights), ("moment", &weights)],
                    state: &state_json,
                }),
            },
        )
    }

    /// The seed that all parts of a folder agree on.
    fn seed_of(folder: &Path) -> u64 {
        let model = load(folder).unwrap();
        let seed = load_provenance(folder).unwrap().unwrap().seed;
        assert_eq!(model.weights, initialize(&model.config, &model.layout, seed));
        if let Some(saved) = load_training_state(folder, &model.layout).unwrap() {
            assert_eq!(saved.state, serde_json::json!({"step": seed}));
            assert_eq!(saved.arenas["master"], model.weights);
            assert_eq!(saved.arenas["moment"], model.weights);
            assert_eq!(saved.arenas.len(), 2);
        }
        seed
    }

    #[test]
    fn save_is_atomic_under_crash() {
        // The second model has another shape and no training state: any mixture would show.
        let wider = Config { hidden_size: 10, ..small() };
        let (mut old, mut new) = (0, 0);
        for changes in 0.. {
            let folder = tempfile::tempdir().unwrap();
            save_seed(folder.path(), &small(), 1, true).unwrap();
            let done = with_fuse(changes, || save_seed(folder.path(), &wider, 2, false)).is_ok();
            let seed = seed_of(folder.path());
            if seed == 1 {
                assert!(new == 0 && has_training_state(folder.path()));
                old += 1;
            } else {
                assert!(!has_training_state(folder.path()), "a state of other weights");
                new += 1;
            }
            if done {
                break;
            }
        }
        assert!(old > 10 && new > 5, "{old} old, {new} new");
    }

    #[test]
    fn weights_round_trip_in_every_dtype() {
        for precision in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
            for tie_word_embeddings in [true, false] {
                let config = Config { tie_word_embeddings, ..small() };
                let layout = Layout::new(&config);
                let weights = initialize(&config, &layout, 5);
                let folder = tempfile::tempdir().unwrap();
                save(
                    folder.path(),
                    &Checkpoint {
                        config: &config,
                        layout: &layout,
                        weights: &weights,
                        precision,
                        tokenizer: None,
                        provenance: &Provenance::default(),
                        training_state: None,
                    },
                )
                .unwrap();
                let model = load(folder.path()).unwrap();
                let rounded: Vec<_> = weights.iter().map(|&x| precision.round(x)).collect();
                assert_eq!(model.weights, rounded);
                assert_eq!((model.precision, &model.config), (precision, &config));
                assert!(model.warnings.is_empty());
                let file = Mapped::open(&[folder.path().join(WEIGHTS)]).unwrap();
                let has_head =
                    file.tensors(&BTreeMap::new()).unwrap().contains_key("lm_head.weight");
                assert_eq!(has_head, !tie_word_embeddings);
                assert_eq!(file.metadata("format").as_deref(), Some("pt"));
            }
        }
    }

    #[test]
    fn save_rejects_float16_overflow() {
        let config = small();
        let layout = Layout::new(&config);
        let mut weights = initialize(&config, &layout, 5);
        weights[layout.blocks[1].down.offset] = 65520.0;
        let folder = tempfile::tempdir().unwrap();
        let mut checkpoint = Checkpoint {
            config: &config,
            layout: &layout,
            weights: &weights,
            precision: Dtype::F16,
            tokenizer: None,
            provenance: &Provenance::default(),
            training_state: None,
        };
        let error = save(folder.path(), &checkpoint).unwrap_err();
        assert!(format!("{error:#}").contains("model.layers.1.mlp.down_proj.weight"), "{error:#}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "nothing is left behind");
        checkpoint.precision = Dtype::Bf16;
        save(folder.path(), &checkpoint).unwrap();
    }

    #[test]
    fn saved_files_have_default_permissions() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("usual"), "").unwrap();
        save_seed(folder.path(), &small(), 1, true).unwrap();
        let mode = |name: &str| fs::metadata(folder.path().join(name)).unwrap().permissions();
        for name in [CONFIG, WEIGHTS, STATE] {
            assert_eq!(mode(name), mode("usual"), "{name}");
        }
    }
}
