//! Sweeps: one recipe, run again and again with a few keys changed.
//!
//! ```toml
//! description = "which decay, and how fast"
//! recipe = "linux-kernel-dir"     # built in, or a file beside this one
//!
//! [set]                           # of every run
//! epochs = 40
//!
//! [grid]                          # every combination
//! lr_scheduler_type = ["linear", "wsd"]
//! muon_learning_rate = [0.01, 0.02]
//!
//! [[run]]                         # and, or instead: these, one by one
//! name = "small batches"          # else it is called by its keys
//! batch_size = 4
//! ```
//!
//! `vocab_size` and `style` are the tokenizer's; every other key is set in all stages of the recipe.

use std::collections::HashSet;
use std::path::Path;

use anyhow::Context;
use serde::Deserialize;
use toml::{Table, Value};

use super::Settings;
use super::recipe::{MAX_RECIPE, Recipe};
use crate::error::{self, ErrorKind, Hint};
use crate::files;

/// More runs than these are a mistake.
const MAX_RUNS: usize = 10_000;

/// A sweep's runs, in order.
#[derive(Clone, Debug, PartialEq)]
pub struct Sweep {
    /// Description, in a sentence.
    pub description: String,
    /// Runs, in order.
    pub runs: Vec<SweepRun>,
}

/// One run of a sweep.
#[derive(Clone, Debug, PartialEq)]
pub struct SweepRun {
    /// Its own name, or what sets it apart, as `KEY=VALUE,KEY=VALUE`: the name of its folder too.
    pub name: String,
    /// Its own name, if the sweep gives one.
    pub given: Option<String>,
    /// Settings that set it apart, key by key.
    pub changed: Table,
    /// Recipe of the run.
    pub recipe: Recipe,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SweepFile {
    #[serde(default)]
    description: String,
    recipe: String,
    #[serde(default)]
    set: Table,
    #[serde(default)]
    grid: Table,
    #[serde(default, rename = "run")]
    runs: Vec<Table>,
}

impl Sweep {
    /// Reads a sweep from its file.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text = files::read_text(path, MAX_RECIPE)
            .with_context(|| format!("cannot read the sweep {}", path.display()))
            .hint(ErrorKind::Config, || "give the path of a .toml file that can be read")?;
        let folder = path.parent().unwrap_or(Path::new("."));
        Self::parse(&text, folder).with_context(|| format!("sweep {}", path.display()))
    }

    /// Reads and checks a sweep. Recipes in files are looked for in `folder`.
    pub fn parse(text: &str, folder: &Path) -> anyhow::Result<Self> {
        let advice = || "see laam sweep --help for the keys of a sweep";
        let file: SweepFile = toml::from_str(text).hint(ErrorKind::Config, advice)?;
        let is_file = Path::new(&file.recipe).extension().is_some_and(|suffix| suffix == "toml");
        let recipe = if is_file {
            Recipe::find(&folder.join(&file.recipe).to_string_lossy())?
        } else {
            Recipe::find(&file.recipe)?
        };
        let mut runs = Vec::new();
        let one = [Table::new()];
        let lists = if file.runs.is_empty() { &one[..] } else { &file.runs };
        let points = combinations(&file.grid)?;
        if points.len().saturating_mul(lists.len()) > MAX_RUNS {
            return Err(error::config(
                format!(
                    "the sweep has more than {MAX_RUNS} runs: the grid's combinations times [[run]]"
                ),
                "remove some values",
            ));
        }
        for listed in lists {
            let mut listed = listed.clone();
            let given = listed.remove("name");
            for point in points.iter().cloned() {
                let name = match given.as_ref().and_then(Value::as_str) {
                    Some(given) if point.is_empty() => plain(given),
                    Some(given) => plain(&format!("{given},{}", name(&point))),
                    None => name(&listed.clone().into_iter().chain(point.clone()).collect()),
                };
                let mut changed = listed.clone();
                changed.extend(point);
                let mut all = file.set.clone();
                all.extend(changed.clone());
                let recipe = with(&recipe, &all).with_context(|| format!("run {name}"))?;
                let given = given.as_ref().and_then(Value::as_str).map(String::from);
                runs.push(SweepRun { name, given, changed, recipe });
            }
        }
        let mut names = HashSet::new();
        for run in &runs {
            if run.name.is_empty() {
                return Err(error::config("a run has no name", "use letters, digits and -"));
            }
            if !names.insert(run.name.as_str()) {
                return Err(error::config(
                    format!("two runs are called {}", run.name),
                    "rename one",
                ));
            }
        }
        Ok(Self { description: file.description, runs })
    }
}

/// Every combination of the grid, the last key changing fastest.
fn combinations(grid: &Table) -> anyhow::Result<Vec<Table>> {
    let mut all = vec![Table::new()];
    for (key, values) in grid {
        let Some(values) = values.as_array().filter(|values| !values.is_empty()) else {
            return Err(error::config(
                format!("invalid {key}: must be a list of values, in [grid]"),
                format!("write {key} = [1, 2]; a single value belongs in [set]"),
            ));
        };
        if all.len().saturating_mul(values.len()) > MAX_RUNS {
            return Err(error::config(
                format!("the grid has more than {MAX_RUNS} combinations"),
                "remove some values",
            ));
        }
        let with = |table: &Table, value: &Value| {
            let mut table = table.clone();
            table.insert(key.clone(), value.clone());
            table
        };
        all = all
            .iter()
            .flat_map(|table| values.iter().map(move |value| with(table, value)))
            .collect();
    }
    Ok(all)
}

/// The recipe with keys changed.
fn with(recipe: &Recipe, changed: &Table) -> anyhow::Result<Recipe> {
    let mut table: Table = toml::from_str(&recipe.resolved()?)?;
    for (key, value) in changed {
        if key == "vocab_size" || key == "style" {
            table["tokenizer"][key.as_str()] = value.clone();
            continue;
        }
        let stages = table.get_mut("stage").and_then(Value::as_array_mut);
        for stage in stages.into_iter().flatten().filter_map(Value::as_table_mut) {
            stage.insert(Settings::key(key).to_string(), value.clone());
        }
    }
    Recipe::parse(&toml::to_string(&table)?)
}

fn name(changed: &Table) -> String {
    if changed.is_empty() {
        return "as-it-is".to_string();
    }
    let parts = changed.iter().map(|(key, value)| {
        let value = value.as_str().map_or_else(|| value.to_string(), String::from);
        format!("{key}={value}")
    });
    plain(&parts.collect::<Vec<_>>().join(","))
}

/// A name that a folder can have.
fn plain(name: &str) -> String {
    let kept = |c: char| c.is_ascii_alphanumeric() || "=,._+-".contains(c);
    // No folder is called ..
    let name = name.trim_start_matches('.');
    name.chars().map(|c| if kept(c) { c } else { '-' }).take(200).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> anyhow::Result<Sweep> {
        Sweep::parse(text, Path::new("."))
    }

    #[test]
    fn a_grid_is_every_combination_and_a_list_is_itself() {
        let sweep = parse(
            "recipe = 'sample'\n[set]\nepochs = 2\n[grid]\nvocab_size = [300, 400]\nseed = [1, 2]\n\
             [[run]]\nbatch_size = 4\n[[run]]\nlr_scheduler_type = 'cosine'\n",
        )
        .unwrap();
        let names: Vec<&str> = sweep.runs.iter().map(|run| run.name.as_str()).collect();
        assert_eq!(names.len(), 8);
        assert_eq!(names[1], "batch_size=4,seed=1,vocab_size=400");
        assert_eq!(names[7], "lr_scheduler_type=cosine,seed=2,vocab_size=400");
        for run in &sweep.runs {
            let stage = &run.recipe.stages[0].settings;
            assert_eq!(stage.epochs, 2.0);
            assert_eq!(run.name.contains("batch_size=4"), stage.batch_size == 4);
            assert_eq!(run.name.contains("seed=2"), stage.seed == 2);
            assert_eq!(run.name.contains("=400"), run.recipe.tokenizer.vocab_size == 400);
        }
        let name =
            |text: &str| parse(&format!("recipe = 'sample'\n{text}")).unwrap().runs[0].name.clone();
        assert_eq!(name(""), "as-it-is");
        assert_eq!(name("[[run]]\nname = '../a b'\nseed = 3"), "-a-b");
        assert_eq!(name("[grid]\nseed = [3]\n[[run]]\nname = 'a'\nepochs = 1"), "a,seed=3");
    }

    #[test]
    fn mistakes_are_named() {
        let said = |text: &str| format!("{:#}", parse(text).unwrap_err());
        assert!(said("recipe = 'nothing'").contains("nothing"));
        assert!(said("recipe = 'sample'\n[set]\nbatchsize = 3").contains("batchsize"));
        assert!(said("recipe = 'sample'\n[grid]\nseed = 3").contains("seed"));
        assert!(said("recipe = 'sample'\n[grid]\nseed = [1, 1]").contains("two runs"));
        assert!(said("recipe = 'sample'\n[[run]]\nname = '..'").contains("no name"));
        assert!(said("recipe = 'sample'\n[grid]\nseed = [-1]").contains("seed=-1"));
        let many = (0..101).map(|seed| seed.to_string()).collect::<Vec<_>>().join(",");
        let grid = format!("recipe = 'sample'\n[grid]\nseed = [{many}]\nepochs = [{many}]");
        assert!(said(&grid).contains("more than"));
        let seeds = (0..2_000).map(|seed| seed.to_string()).collect::<Vec<_>>().join(",");
        let grid = format!("recipe = 'sample'\n[grid]\nseed = [{seeds}]\n");
        assert!(
            said(&(grid + &"[[run]]\nepochs = 1\n".repeat(6))).contains("more than 10000 runs")
        );
    }
}
