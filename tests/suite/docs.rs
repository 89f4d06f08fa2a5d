//! The documentation: commands that the program accepts, links to files that exist.

use std::fs;
use std::path::{Path, PathBuf};

use crate::foreign::{chapters, foreign_model};
use crate::support::laam;

/// The pages, relative to the root of the repository.
fn pages() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut pages: Vec<_> =
        ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"].map(|name| root.join(name)).to_vec();
    for folder in ["docs", "docs/kernels"] {
        let entries = fs::read_dir(root.join(folder)).unwrap().map(|entry| entry.unwrap().path());
        pages.extend(entries.filter(|path| path.extension().is_some_and(|suffix| suffix == "md")));
    }
    pages
}

/// Commands of a page that begin with `laam`: indented lines, and code within the text.
fn commands(page: &str) -> Vec<String> {
    let joined = page.replace("\\\n", " ");
    let lines = joined.lines().filter_map(|line| line.strip_prefix("    "));
    let text =
        joined.lines().filter(|line| !line.starts_with("    ")).collect::<Vec<_>>().join(" ");
    let inline = text.split('`').skip(1).step_by(2).map(str::to_string);
    let is_command = |line: &String| line.starts_with("laam ") && !line.contains("COMMAND");
    lines.map(str::to_string).chain(inline).filter(is_command).collect()
}

/// Arguments of a shell command with single quotes and a comment at its end.
fn arguments(command: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut quoted = false;
    for c in command.chars() {
        match c {
            '\'' => quoted = !quoted,
            '#' if !quoted && words.last().is_some_and(String::is_empty) => break,
            ' ' if !quoted => words.push(String::new()),
            _ => words.last_mut().unwrap().push(c),
        }
    }
    words.into_iter().skip(1).filter(|word| !word.is_empty()).collect()
}

#[test]
fn documented_commands_are_accepted() {
    let mut count = 0;
    for page in pages() {
        for command in commands(&fs::read_to_string(&page).unwrap()) {
            // Arguments before --help are checked; the command is not run.
            let output = laam().args(arguments(&command)).arg("--help").output().unwrap();
            let error = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{}: {command}\n{error}", page.display());
            count += 1;
        }
    }
    assert!(count > 50, "{count} commands found");
    let output = laam().args(arguments("laam train --no-such 'a b' # c")).arg("--help").output();
    assert_eq!(output.unwrap().status.code(), Some(2));
}

/// The commands of README's section on other texts and models, on small ones.
#[test]
fn readme_commands_for_other_texts_and_models_run() {
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md"));
    let readme = readme.unwrap();
    let (_, section) = readme.split_once("## Other texts and models").unwrap();
    let commands = commands(section.split_once("\n## ").unwrap().0);
    let commands: Vec<_> = commands
        .into_iter()
        .filter(|command| command.contains(' ') && command.contains("--"))
        .collect();
    assert_eq!(commands.len(), 9, "{commands:?}");

    let folder = tempfile::tempdir().unwrap();
    let place = |name: &str| folder.path().join(name);
    fs::write(place("book.txt"), &chapters()[..4000]).unwrap();
    fs::create_dir(place("shards")).unwrap();
    let text = chapters();
    for shard in ["0", "1"] {
        let lines = text.lines().take(30).map(|line| format!("{{\"content\": \"{line}\"}}\n"));
        let packed = zstd::encode_all(lines.collect::<String>().as_bytes(), 1).unwrap();
        fs::write(place("shards").join(format!("{shard}.jsonl.zst")), packed).unwrap();
    }
    fs::create_dir(place("Llama-3.2-1B")).unwrap();
    for file in fs::read_dir(foreign_model()).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), place("Llama-3.2-1B").join(file.file_name())).unwrap();
    }
    // What makes them short.
    let shape = "--hidden_size 16 --intermediate_size 24 --num_hidden_layers 1 --num_attention_heads 2 \
                 --num_key_value_heads 2 --max_position_embeddings 128";
    for command in commands {
        let mut run = laam();
        run.args(arguments(&command)).current_dir(&folder);
        if command.starts_with("laam train ") {
            run.args(["--max_steps", "2"]);
            if !command.contains("--init_from") {
                run.args(shape.split_whitespace());
            }
        }
        let output = run.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command}\n{said}");
    }
}

#[test]
fn documentation_links_to_files_that_exist() {
    let mut count = 0;
    for page in pages() {
        let text = fs::read_to_string(&page).unwrap();
        for link in text.split("](").skip(1).map(|rest| rest.split(')').next().unwrap()) {
            if !link.starts_with("http") && !link.starts_with('#') {
                let file = link.split('#').next().unwrap();
                assert!(page.with_file_name(file).exists(), "{}: {link}", page.display());
                count += 1;
            }
        }
    }
    assert!(count > 50, "{count} links found");
}
