//! The module order that `src/lib.rs` states, and unique type names.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use regex::Regex;

/// Every Rust file under `src`, with comment lines blanked.
fn sources() -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut folders = vec![root.clone()];
    let mut sources = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                let code = |line| if str::trim_start(line).starts_with("//") { "" } else { line };
                let text = text.lines().map(code).collect::<Vec<_>>().join("\n");
                sources.push((path.strip_prefix(&root).unwrap().to_path_buf(), text));
            }
        }
    }
    sources.sort();
    sources
}

/// The top-level modules that a file's `crate::` paths name.
fn dependencies(text: &str) -> Vec<String> {
    let path = Regex::new(r"\bcrate::(?:(\w+)|\{([^;]*?)\};)").unwrap();
    let nested = Regex::new(r"::\{[^{}]*\}").unwrap();
    let mut found = Vec::new();
    for names in path.captures_iter(text) {
        if let Some(name) = names.get(1) {
            found.push(name.as_str().to_string());
            continue;
        }
        let mut group = names[2].to_string();
        while nested.is_match(&group) {
            group = nested.replace_all(&group, "").into_owned();
        }
        let first = |item: &str| item.trim().split("::").next().unwrap_or_default().to_string();
        found.extend(group.split(',').map(first).filter(|name| !name.is_empty()));
    }
    found
}

/// Dependencies that violate the order, as `FILE uses MODULE`.
fn violations(order: &[String], sources: &[(PathBuf, String)]) -> Vec<String> {
    let rank = |name: &str| order.iter().position(|module| module == name);
    let mut found = Vec::new();
    for (path, text) in sources {
        let module = path.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs");
        let Some(own) = rank(module) else { continue };
        for name in dependencies(text) {
            if rank(&name).is_some_and(|other| other > own) {
                found.push(format!("{} uses {name}", path.display()));
            }
        }
    }
    found
}

/// The order that the crate's documentation states.
fn stated_order() -> Vec<String> {
    let lib = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap();
    let line = Regex::new(r"(?m)^//! - (?:\[`(?:mod@)?(\w+)`\]\[\]|`(\w+)`): ").unwrap();
    let name = |found: regex::Captures| found.get(1).or(found.get(2)).unwrap().as_str().to_string();
    let order: Vec<String> = line.captures_iter(&lib).map(name).collect();
    let module = Regex::new(r"(?m)^pub mod (\w+);").unwrap();
    let mut declared: Vec<_> =
        module.captures_iter(&lib).map(|found| found[1].to_string()).collect();
    let mut stated = order.clone();
    stated.sort();
    declared.sort();
    assert_eq!(stated, declared, "src/lib.rs lists every module once");
    order
}

#[test]
fn modules_depend_only_on_modules_above_them() {
    let order = stated_order();
    let sources = sources();
    assert!(sources.len() > 50, "{} files", sources.len());
    let found = violations(&order, &sources);
    assert!(found.is_empty(), "{found:#?}");

    let order = ["low", "high"].map(String::from);
    let source = |path: &str, text: &str| (PathBuf::from(path), text.to_string());
    for text in ["use crate::high::Type;", "use crate::{high::{A, B}, low};", "crate::high::f();"] {
        assert_eq!(violations(&order, &[source("low/mod.rs", text)]).len(), 1, "{text}");
        assert!(violations(&order, &[source("high.rs", text)]).is_empty(), "{text}");
    }
}

/// The report reads files only, and a program does not know what it is trained on.
#[test]
fn report_and_llama_depend_on_little() {
    let sources = sources();
    for (module, allowed) in [
        ("report", ["error", "escape", "files", "schema", "report"].as_slice()),
        ("llama", &["model", "llama"]),
    ] {
        for (path, text) in sources.iter().filter(|(path, _)| path.starts_with(module)) {
            for name in dependencies(text) {
                assert!(allowed.contains(&name.as_str()), "{} uses {name}", path.display());
            }
        }
    }
}

#[test]
fn type_names_are_unique() {
    let definition =
        Regex::new(r"(?m)^(?:pub(?:\([a-z: ]+\))? )?(?:struct|enum|union|trait|type) (\w+)")
            .unwrap();
    let mut files: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (path, text) in sources() {
        for found in definition.captures_iter(&text) {
            files.entry(found[1].to_string()).or_default().push(path.display().to_string());
        }
    }
    assert!(files.contains_key("Dtype") && files.contains_key("Op"));
    files.retain(|_, files| files.len() > 1);
    assert!(files.is_empty(), "{files:#?}");
}
