//! Recipes: a whole run, from the corpus to the proof, as one TOML file.
//!
//! ```toml
//! description = "what it is for"
//! version = "v1.0/1.0"            # the corpus where none is named: a kernel (else the sample)
//! requires_source = true          # or: the command has to name one
//! rebuild = true                  # ends with every file regenerated from its name
//!
//! [tokenizer]
//! style = "exact"
//! vocab_size = 1024
//!
//! [[stage]]                       # one after another, each from the weights of the one before
//! name = "train"
//! batch_size = 8                  # the flags of laam train, with their defaults
//! ```
//!
//! A later stage has the shape, the context and the kind of windows of the one before unless it says
//! otherwise; another shape is an error.

use std::path::Path;

use anyhow::Context;
use serde::{Deserialize, Serialize};

use super::Settings;
use crate::error::{self, ErrorKind, Hint};
use crate::files;
use crate::tokenizer::{Special, Style};
use crate::tokens::Windows;

/// The recipes that come with the program.
pub const BUILT_IN: [(&str, &str); 4] = [
    ("sample", include_str!("recipes/sample.toml")),
    ("original", include_str!("recipes/original.toml")),
    ("linux-5m", include_str!("recipes/linux-5m.toml")),
    ("linux-kernel-dir", include_str!("recipes/linux-kernel-dir.toml")),
];

/// No file that a person writes is longer.
pub(super) const MAX_RECIPE: u64 = 1 << 20;

/// A whole run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Description, in a sentence.
    pub description: String,
    /// The kernel that is the corpus if the command names none; without it, the built-in sample.
    pub version: Option<String>,
    /// True if the command has to name the corpus.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub requires_source: bool,
    /// True if every file is regenerated from its name at the end, and compared.
    #[serde(default)]
    pub rebuild: bool,
    /// Tokenizer.
    pub tokenizer: TokenizerRecipe,
    /// Training stages, in order.
    #[serde(rename = "stage")]
    pub stages: Vec<RecipeStage>,
}

/// Tokenizer of a recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenizerRecipe {
    /// Kind of tokenizer.
    #[serde(default)]
    pub style: Style,
    /// Vocabulary asked for, special tokens included.
    pub vocab_size: usize,
}

/// One training run of a recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "toml::Table")]
pub struct RecipeStage {
    /// Names its folder.
    pub name: String,
    /// Settings of the stage.
    #[serde(flatten)]
    pub settings: Settings,
}

/// By hand, since serde's flattening would let misspelt keys pass.
impl TryFrom<toml::Table> for RecipeStage {
    type Error = String;

    fn try_from(mut keys: toml::Table) -> Result<Self, String> {
        let Some(toml::Value::String(name)) = keys.remove("name") else {
            return Err("a stage has no name".to_string());
        };
        let are_given = keys.contains_key("num_key_value_heads");
        let mut settings: Settings =
            keys.try_into().map_err(|why| format!("stage {name}: {why}"))?;
        if !are_given {
            settings.set_default_key_value_heads();
        }
        Ok(Self { name, settings })
    }
}

/// A recipe whose later stages have the keys of the one before that depend on its model.
fn inherited(mut recipe: toml::Table) -> toml::Table {
    const KEYS: [&str; 10] = [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "tie_word_embeddings",
        "rope_theta",
        "max_position_embeddings",
        "windows",
    ];
    let stages = recipe.get_mut("stage").and_then(toml::Value::as_array_mut);
    let mut before = toml::Table::new();
    for stage in stages.into_iter().flatten().filter_map(toml::Value::as_table_mut) {
        for key in KEYS {
            if let Some(value) = before.get(key).filter(|_| !stage.contains_key(key)) {
                stage.insert(key.to_string(), value.clone());
            }
        }
        before.clone_from(stage);
    }
    recipe
}

impl Recipe {
    /// A built-in recipe by its name, or one in a file by its path.
    pub fn find(name: &str) -> anyhow::Result<Self> {
        if let Some((_, text)) = BUILT_IN.iter().find(|(built_in, _)| *built_in == name) {
            return Self::parse(text).with_context(|| format!("recipe {name}"));
        }
        let path = Path::new(name);
        if path.extension().is_none_or(|extension| extension != "toml") {
            let names = BUILT_IN.map(|(name, _)| name).join(", ");
            return Err(error::config(
                format!("unknown recipe {name}"),
                format!("use one of {names}, or the path of a .toml file"),
            ));
        }
        let text = files::read_text(path, MAX_RECIPE)
            .with_context(|| format!("cannot read the recipe {name}"))
            .hint(ErrorKind::Config, || "give the path of a readable .toml file")?;
        Self::parse(&text).with_context(|| format!("recipe {name}"))
    }

    /// Reads and checks a recipe.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let advice = || "see docs/recipes.md, and laam train --help for a stage's keys";
        let mut recipe: Self = toml::from_str(text).hint(ErrorKind::Config, advice)?;
        if recipe.stages.len() > 1 {
            recipe = inherited(toml::from_str(text)?).try_into().hint(ErrorKind::Config, advice)?;
        }
        if recipe.stages.is_empty() {
            return Err(error::config("no [[stage]]", advice()));
        }
        for (at, stage) in recipe.stages.iter().enumerate() {
            let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
            if stage.name.is_empty() || !stage.name.chars().all(plain) {
                return Err(error::config(
                    format!("invalid stage name {:?}", stage.name),
                    "use letters, digits, - and _: the name becomes the name of a folder",
                ));
            }
            if recipe.stages[..at].iter().any(|other| other.name == stage.name) {
                return Err(error::config(
                    format!("two stages are called {}", stage.name),
                    "rename one",
                ));
            }
            let settings = &stage.settings;
            let check = || {
                settings.validate()?;
                Windows::check_shape(settings.max_position_embeddings, settings.stride)?;
                settings.config(recipe.tokenizer.vocab_size, Special::default())
            };
            let config = check().with_context(|| format!("stage {}", stage.name))?;
            let next = recipe.stages.get(at + 1);
            let conflicts = next.map(|next| (next, next.settings.shape_conflicts(&config)));
            if let Some((next, conflicts)) = conflicts
                && let Some((field, ours, theirs)) = conflicts.first()
            {
                return Err(error::config(
                    format!(
                        "stage {}: {field} is {ours}, but {theirs} in the stage before",
                        next.name
                    ),
                    "leave it out: a stage goes on with the weights of the one before",
                ));
            }
        }
        Ok(recipe)
    }

    /// Value of a key of the tokenizer or of the last stage; null if there is none.
    pub fn value(&self, key: &str) -> serde_json::Value {
        let stage = self.stages.last().map(|stage| &stage.settings);
        let key = Settings::key(key);
        match key {
            "vocab_size" => self.tokenizer.vocab_size.into(),
            "style" => serde_json::json!(self.tokenizer.style),
            _ => serde_json::to_value(stage).unwrap_or_default()[key].take(),
        }
    }

    /// The recipe with every key a stage has, as a TOML file.
    pub fn resolved(&self) -> anyhow::Result<String> {
        Ok(toml::to_string_pretty(self)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_recipes_are_whole_and_survive_being_written() {
        for (name, _) in BUILT_IN {
            let recipe = Recipe::find(name).unwrap();
            assert_eq!(Recipe::parse(&recipe.resolved().unwrap()).unwrap(), recipe, "{name}");
        }
    }

    #[test]
    fn a_stage_with_heads_alone_has_key_value_heads_that_fit() {
        for (keys, expected) in [
            ("num_attention_heads = 5", 5),
            ("num_attention_heads = 32", 4),
            ("num_attention_heads = 5\nnum_key_value_heads = 1", 1),
        ] {
            let text = format!("name = 'a'\nhidden_size = 320\n{keys}");
            let stage: RecipeStage = toml::from_str(&text).unwrap();
            assert_eq!(stage.settings.num_key_value_heads, expected, "{keys}");
        }
    }

    #[test]
    fn the_original_is_flag_for_flag() {
        let recipe = Recipe::find("original").unwrap();
        let [first, second] = recipe.stages.as_slice() else { panic!("two stages") };
        assert_eq!((first.settings.batch_size, first.settings.learning_rate), (64, 1e-3));
        assert_eq!((second.settings.batch_size, second.settings.learning_rate), (1, 1e-4));
        assert_eq!(first.settings.total_steps(4408), 6900);
        assert_eq!(second.settings.total_steps(4408), 440_800);
        assert_eq!(recipe.tokenizer.vocab_size, 32768);
        let config = first.settings.config(32768, crate::tokenizer::Special::default()).unwrap();
        assert_eq!(config.parameter_count(), 4_662_336);
    }

    #[test]
    fn linux_5m_has_no_more_parameters_than_the_first_laam() {
        let recipe = Recipe::find("linux-5m").unwrap();
        for stage in &recipe.stages {
            let special = crate::tokenizer::Special::default();
            let config = stage.settings.config(recipe.tokenizer.vocab_size, special).unwrap();
            assert_eq!(config.parameter_count(), 4_623_840);
            assert!(config.parameter_count() <= 4_662_336);
        }
    }

    #[test]
    fn mistakes_are_named() {
        let with = |text: &str| format!("{:#}", Recipe::parse(text).unwrap_err());
        let head = "description = ''\n[tokenizer]\nvocab_size = 9\n";
        assert!(with("").contains("description"));
        assert!(with(head).contains("stage"));
        let stage = |keys: &str| with(&format!("{head}[[stage]]\n{keys}"));
        assert!(stage("name = 'a'\nbatchsize = 3").contains("batchsize"));
        assert!(stage("name = 'a'\nbatch_size = 0").contains("batch_size"));
        assert!(stage("name = '../a'").contains("../a"));
        assert!(stage("name = 'a'\n[[stage]]\nname = 'a'").contains("two stages"));
        assert!(stage("name = 'a'\nhidden_size = 30\nnum_attention_heads = 7").contains("stage a"));
        let shapes = "name = 'a'\nhidden_size = 64\n[[stage]]\nname = 'b'\nhidden_size = 32";
        assert!(stage(shapes).contains("stage b: hidden_size is 32, but 64"));
    }

    #[test]
    fn later_stages_inherit_the_shape_and_the_windows() {
        let text = "description = ''\n[tokenizer]\nvocab_size = 99\n[[stage]]\nname = 'a'\n\
            hidden_size = 64\nwindows = 'addressed'\nmax_position_embeddings = 32\nbatch_size = 8\n\
            [[stage]]\nname = 'b'\nmax_position_embeddings = 16\n[[stage]]\nname = 'c'\n";
        let recipe = Recipe::parse(text).unwrap();
        let of = |stage: usize| {
            let Settings { hidden_size, windows, max_position_embeddings, batch_size, .. } =
                recipe.stages[stage].settings;
            (hidden_size, windows, max_position_embeddings, batch_size)
        };
        let kind = crate::tokens::WindowKind::Addressed;
        assert_eq!(
            [of(0), of(1), of(2)],
            [(64, kind, 32, 8), (64, kind, 16, 1), (64, kind, 16, 1)]
        );
    }
}
