//! The modules of the crate form layers: the imports of its sources contain no cycle.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

type Imports = BTreeMap<String, BTreeSet<String>>;

/// Sources by module path (`exec::memory_ops`), up to their unit tests.
fn sources(folder: &Path, prefix: &str, into: &mut BTreeMap<String, String>) {
    for entry in folder.read_dir().unwrap().map(Result::unwrap) {
        let path = entry.path();
        let name = path.file_stem().unwrap().to_str().unwrap();
        if path.is_dir() {
            sources(&path, &format!("{prefix}{name}::"), into);
            continue;
        }
        let module = match name {
            "lib" | "main" => continue,
            "mod" => prefix.trim_end_matches("::").to_owned(),
            name => format!("{prefix}{name}"),
        };
        let text = std::fs::read_to_string(&path).unwrap();
        let code = text.split("#[cfg(test)]").next().unwrap_or_default();
        let lines = code.lines().filter(|line| !line.trim_start().starts_with("//"));
        into.insert(module, lines.flat_map(|line| [line, "\n"]).collect());
    }
}

/// Modules that a source names by `crate::` or `super::`.
fn imports(module: &str, text: &str, modules: &BTreeSet<String>) -> BTreeSet<String> {
    assert!(!text.contains("crate::{"), "{module}: one `use crate::...` per module");
    let parent = module.rsplit_once("::").map_or("", |(parent, _)| parent);
    let named = |marker: &str, base: &str| {
        let places = text.match_indices(marker).map(|(at, _)| &text[at + marker.len()..]);
        let base = if base.is_empty() { String::new() } else { format!("{base}::") };
        places
            .map(|rest| {
                let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_' && c != ':');
                format!("{base}{}", &rest[..end.unwrap_or(rest.len())])
            })
            .collect::<Vec<_>>()
    };
    let paths = [named("crate::", ""), named("super::", parent)].concat();
    paths
        .iter()
        .filter_map(|path| {
            let of = |m: &&String| path == *m || path.starts_with(&format!("{m}::"));
            modules.iter().filter(of).max_by_key(|m| m.len()).cloned()
        })
        .filter(|other| other != module)
        .collect()
}

fn cycle(imports: &Imports) -> Option<Vec<String>> {
    fn visit(
        at: &str,
        imports: &Imports,
        path: &mut Vec<String>,
        done: &mut BTreeSet<String>,
    ) -> bool {
        if done.contains(at) {
            return false;
        }
        let again = path.iter().any(|module| module == at);
        path.push(at.to_owned());
        if again || imports[at].iter().any(|next| visit(next, imports, path, done)) {
            return true;
        }
        path.pop();
        done.insert(at.to_owned());
        false
    }
    let mut done = BTreeSet::new();
    imports.keys().find_map(|module| {
        let mut path = Vec::new();
        visit(module, imports, &mut path, &mut done).then_some(path)
    })
}

#[test]
fn modules_import_each_other_without_cycles() {
    let mut texts = BTreeMap::new();
    sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), "", &mut texts);
    let modules: BTreeSet<String> = texts.keys().cloned().collect();
    let mut graph: Imports =
        texts.iter().map(|(m, text)| (m.clone(), imports(m, text, &modules))).collect();
    // The reader of imports sees what is there.
    assert!(graph["exec::memory_ops"].contains("state") && graph["sched"].contains("config"));
    assert_eq!(cycle(&graph), None);
    graph.get_mut("config").unwrap().insert("sched".into());
    let found = cycle(&graph).unwrap();
    assert!(found.contains(&"config".into()) && found.contains(&"sched".into()), "{found:?}");
}
