//! `laam run`: from the corpus to the proof, skipped where done, refused where it does not belong.

use std::fs;
use std::path::Path;
use std::process::Output;

use crate::cli::error_of;
use crate::support::laam;

/// Two files of a few hundred bytes, and a recipe that learns them in a second or two.
fn prepare(folder: &Path) -> (String, String) {
    let source = folder.join("source");
    fs::create_dir_all(source.join("lib")).unwrap();
    let main = "#include \"lib/add.h\"\n\nint main(void)\n{\n\treturn add(1, 2) - 3;\n}\n";
    fs::write(source.join("main.c"), main).unwrap();
    let header = "static int add(int a, int b)\n{\n\t/* no overflow: both are small */\n\treturn a + b;\n}\n\n\
        /* The same, for those who would rather see them taken away one by one. */\n\
        static int subtract(int a, int b)\n{\n\twhile (b-- > 0)\n\t\ta--;\n\treturn a;\n}\n";
    fs::write(source.join("lib/add.h"), header).unwrap();
    let recipe = folder.join("tiny.toml");
    let text = "description = 'two files'\nrebuild = true\n\
        [tokenizer]\nvocab_size = 280\n\
        [[stage]]\nname = 'first'\nwindows = 'addressed'\nmax_position_embeddings = 160\n\
        hidden_size = 32\nintermediate_size = 64\nnum_hidden_layers = 2\nnum_attention_heads = 2\n\
        num_key_value_heads = 2\ntie_word_embeddings = true\nbatch_size = 4\nepochs = 60\n\
        optimizer = 'muon'\nlearning_rate = 1e-2\nweight_decay = 0.0\nadam_beta2 = 0.95\n\
        warmup_steps = 5\nlr_scheduler_type = 'constant'\n\
        [[stage]]\nname = 'second'\nwindows = 'addressed'\nmax_position_embeddings = 160\n\
        eval_steps = 20\nhidden_size = 32\nintermediate_size = 64\nnum_hidden_layers = 2\nnum_attention_heads = 2\n\
        num_key_value_heads = 2\ntie_word_embeddings = true\nbatch_size = 4\nepochs = 40\n\
        optimizer = 'muon'\nlearning_rate = 1e-2\nweight_decay = 0.0\nadam_beta2 = 0.95\n\
        warmup_steps = 0\n";
    fs::write(&recipe, text).unwrap();
    (source.display().to_string(), recipe.display().to_string())
}

fn run(arguments: &[&str]) -> Output {
    laam().arg("run").args(arguments).output().expect("the program starts")
}

#[test]
fn a_recipe_ends_with_its_files_given_back_and_is_skipped_the_second_time() {
    let folder = tempfile::tempdir().unwrap();
    let (source, recipe) = prepare(folder.path());
    let output = folder.path().join("run").display().to_string();
    let arguments = ["--source", &source, "--recipe", &recipe, "--output", &output];
    let first = run(&arguments);
    let said = String::from_utf8_lossy(&first.stderr).into_owned();
    assert_eq!(first.status.code(), Some(0), "{said}");
    let proof = String::from_utf8(first.stdout).unwrap();
    assert!(proof.starts_with("2 of 2 files rebuilt byte for byte from their names"), "{proof}");
    for path in ["main.c", "lib/add.h"] {
        let rebuilt = fs::read(folder.path().join("run/rebuilt").join(path)).unwrap();
        assert_eq!(rebuilt, fs::read(Path::new(&source).join(path)).unwrap());
    }
    crate::report::check(&folder.path().join("run/report.html"), 2);

    let weights = folder.path().join("run/second/model.safetensors");
    let before = (fs::read(&weights).unwrap(), weights.metadata().unwrap().modified().unwrap());
    let second = run(&arguments);
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert_eq!(second.status.code(), Some(0), "{said}");
    assert_eq!(String::from_utf8(second.stdout).unwrap(), proof);
    let after = (fs::read(&weights).unwrap(), weights.metadata().unwrap().modified().unwrap());
    assert!(before == after, "a finished stage is left alone");
    assert_eq!(said.matches("nothing to do").count(), 2, "{said}");

    // The same folder cannot become another run, and says so before it changes anything.
    fs::write(Path::new(&source).join("more.c"), "int more;\n").unwrap();
    let mut refused = vec!["run"];
    refused.extend(arguments);
    assert!(error_of(&refused).contains("another corpus"));
    assert_eq!(fs::read(&weights).unwrap(), before.0);
}

#[test]
fn a_dry_run_prints_a_recipe_that_can_be_run() {
    let folder = tempfile::tempdir().unwrap();
    let (_, recipe) = prepare(folder.path());
    let printed = run(&["--recipe", &recipe, "--dry-run"]);
    assert_eq!(printed.status.code(), Some(0));
    let resolved = folder.path().join("resolved.toml");
    fs::write(&resolved, &printed.stdout).unwrap();
    let again = run(&["--recipe", &resolved.display().to_string(), "--dry-run"]);
    assert_eq!(again.stdout, printed.stdout);
    let plan = String::from_utf8(printed.stderr).unwrap();
    assert!(plan.contains("peak") && plan.contains("activations"), "{plan}");
    assert!(!folder.path().join("runs").exists());
}

#[test]
fn recipes_that_are_none_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let broken = folder.path().join("broken.toml");
    fs::write(&broken, "description = 'x'\n[tokenizer]\nvocab_size = 3\n").unwrap();
    assert!(error_of(&["run", "--recipe", "nothing"]).contains("nothing"));
    assert!(error_of(&["run", "--recipe", "no/such.toml"]).contains("no/such.toml"));
    assert!(error_of(&["run", "--recipe", broken.to_str().unwrap()]).contains("stage"));
}
