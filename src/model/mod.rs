//! Model: configuration, parameter layout, initialization, checkpoints, provenance.
//!
//! [`Config`] is the shape, [`Layout`] where each parameter lies in a flat arena, [`initialize`] what
//! an arena starts as, [`save`] and [`load`] the Hugging Face folder it is kept in.

mod card;
mod checkpoint;
mod config;
mod config_json;
mod flops;
mod init;
mod layout;
mod presets;
mod provenance;
mod replace;
mod weights;

pub use checkpoint::{
    Checkpoint, Model, SavedState, TrainingState, check_hashes, foreign_files,
    forget_training_state, has_training_state, has_weights, is_own, load, load_config,
    load_generation_defaults, load_provenance, load_training_state, read_consistently, remove_own,
    remove_staged, save, weight_paths, weights_sha256,
};
pub use config::{Config, RopeScaling};
pub use config_json::GenerationDefaults;
pub use init::initialize;
pub use layout::{BlockParams, Layout, ParamKind, Parameter, Span};
pub use presets::{preset, preset_names};
pub use provenance::{
    CorpusRecord, KERNEL_FILES, KERNEL_RELEASE, License, ParentRecord, Provenance, SessionRecord,
};
pub use replace::settle;
