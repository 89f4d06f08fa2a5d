//! The output folder of a run: whose files lie in it, who may write into it, and what readers see.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};

use laam::model::{Provenance, load, load_provenance, read_consistently};
use serde_json::Value;

use crate::support::{bounded, error_in, laam};
use crate::training::{
    checkpoints, killed, metrics, said, token_file, tokenizer, train, trained, under_way,
};

/// Every file below a folder, with its bytes.
fn content(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder).into_iter().flatten().map(Result::unwrap) {
        if entry.path().is_dir() {
            files.extend(content(&entry.path()));
        } else {
            files.insert(entry.path(), fs::read(entry.path()).unwrap());
        }
    }
    files
}

const SHORT: &str = "--max_steps 4 --save_steps 2 --logging_steps 1";

/// Refused as errors are, with nothing changed.
fn refused(output: &Path, flags: &str) -> String {
    let before = content(output);
    let failed = train(output, flags).output().unwrap();
    let said = error_in(&failed);
    assert!(content(output) == before, "{flags}: changed although {said}");
    said
}

#[test]
fn foreign_files_are_refused_before_anything_is_written() {
    for name in [
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "provenance.json",
        "metrics.jsonl",
        "checkpoint-3/README.md",
        "checkpoint-900/config.json",
        "checkpoint-2",
    ] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, "{\"mine\": true}").unwrap();
        for flags in ["", "--overwrite", "--resume"] {
            let said = refused(folder.path(), &format!("{SHORT} {flags}"));
            assert!(said.contains(&path.display().to_string()), "{said}");
        }
    }
    // What laam does not write stays, also in the folder of a checkpoint that is removed.
    let folder = tempfile::tempdir().unwrap();
    let notes = [".git/config", "notes.txt", "checkpoint-2/notes.txt", "checkpoint-x/a"];
    for name in notes {
        fs::create_dir_all(folder.path().join(name).parent().unwrap()).unwrap();
        fs::write(folder.path().join(name), "mine").unwrap();
    }
    let said = trained(folder.path(), &format!("{SHORT} --save_total_limit 1"));
    let removed = format!("removed {} (", folder.path().join("checkpoint-2").display());
    assert!(said.contains(&removed), "{said}");
    for name in notes {
        assert_eq!(fs::read_to_string(folder.path().join(name)).unwrap(), "mine");
    }
    assert!(!folder.path().join("checkpoint-2/config.json").exists());
    assert!(!folder.path().join(".laam.lock").exists());
}

#[test]
fn a_run_in_the_folder_needs_resume_reload_or_overwrite() {
    let folder = tempfile::tempdir().unwrap();
    let (done, cut) = (folder.path().join("done"), folder.path().join("cut"));
    trained(&done, SHORT);
    // As Hugging Face's Trainer lays it out.
    assert!(done.join("model.safetensors").exists() && done.join("metrics.jsonl").exists());
    assert!(!done.join("training_state.safetensors").exists());
    assert!(done.join("checkpoint-4/training_state.safetensors").exists());
    killed(&cut, "--max_steps 400 --save_steps 2 --logging_steps 1", 9);
    for output in [&done, &cut] {
        let said = refused(output, SHORT);
        for flag in ["--resume", "--reload", "--overwrite"] {
            assert!(said.contains(flag), "{said}");
        }
    }
    let first = fs::read(done.join("model.safetensors")).unwrap();
    trained(&done, &format!("{SHORT} --resume"));
    assert_eq!((metrics(&done).len(), checkpoints(&done)), (4, vec![2, 4]));
    // A crash between the last checkpoint and the model.
    fs::remove_file(done.join("model.safetensors")).unwrap();
    trained(&done, &format!("{SHORT} --resume"));
    assert!(fs::read(done.join("model.safetensors")).unwrap() == first);

    let said = trained(&done, "--max_steps 3 --save_steps 9 --logging_steps 1 --reload");
    let steps: Vec<u64> = metrics(&done).iter().map(|line| line.step).collect();
    assert_eq!((steps, checkpoints(&done)), (vec![1, 2, 3, 4, 1, 2, 3], vec![3]));
    for step in [2, 4] {
        let path = done.join(format!("checkpoint-{step}"));
        assert!(said.contains(&format!("removed {} (", path.display())), "{said}");
    }
    trained(&done, "--max_steps 2 --logging_steps 1 --overwrite");
    assert_eq!((metrics(&done).len(), checkpoints(&done)), (2, vec![2]));
    // A model without a training state is not replaced by fresh weights.
    fs::remove_dir_all(done.join("checkpoint-2")).unwrap();
    assert!(refused(&done, "--max_steps 2 --resume").contains("no checkpoint"));
}

#[test]
fn a_folder_has_one_writer() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("model");
    let mut first = under_way(&output, "--max_steps 100000 --logging_steps 1 --save_steps 5", 9);
    for flags in ["", "--resume", "--overwrite", "--reload"] {
        let second = train(&output, &format!("--max_steps 9 {flags}")).output().unwrap();
        let said = error_in(&second);
        assert!(said.contains(&format!("another laam (process {})", first.id())), "{said}");
    }
    first.kill().unwrap();
    first.wait().unwrap();
    // What it held is free, and what it left half written goes.
    for name in ["checkpoint-7777/.laam-staged/config.json", ".metrics.jsonl.99999999.tmp"] {
        fs::create_dir_all(output.join(name).parent().unwrap()).unwrap();
        fs::write(output.join(name), "half").unwrap();
    }
    let said = trained(&output, "--max_steps 3 --overwrite");
    assert!(
        said.contains("checkpoint-7777") && said.contains(".metrics.jsonl.99999999.tmp"),
        "{said}"
    );
    assert!(!output.join("checkpoint-7777").exists());
    assert!(!output.join(".metrics.jsonl.99999999.tmp").exists());
}

#[test]
fn the_tokenizer_of_a_model_is_the_one_it_was_trained_with() {
    let folder = tempfile::tempdir().unwrap();
    let (output, place) = (folder.path().join("model"), folder.path().join("tokenizer"));
    fs::create_dir(&place).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(tokenizer().join(name), place.join(name)).unwrap();
    }
    fs::write(folder.path().join("secret"), "{}").unwrap();
    std::os::unix::fs::symlink("../secret", place.join("special_tokens_map.json")).unwrap();
    std::os::unix::fs::symlink("/dev/zero", place.join("added_tokens.json")).unwrap();
    let flags = format!(
        "--max_steps 300 --save_steps 200 --logging_steps 1 --tokenizer_path {}",
        place.display()
    );
    let run = under_way(&output, &flags, 2);
    fs::remove_dir_all(&place).unwrap();
    let ended = run.wait_with_output().unwrap();
    assert!(ended.status.success(), "{}", said(&ended));
    assert!(!output.join("special_tokens_map.json").exists(), "a link is not followed");
    let read = |path: &Path| fs::read(path.join("tokenizer.json")).unwrap();
    assert!(
        read(&output) == read(tokenizer()) && read(&output.join("checkpoint-200")) == read(&output)
    );

    let opened = || {
        let done =
            laam().args(["generate", "--max_new_tokens", "1"]).arg(&output).output().unwrap();
        assert!(done.status.success(), "{}", said(&done));
        said(&done)
    };
    assert!(!opened().contains("provenance.json"));
    // A blank more: the tokenizer works, and is another file.
    let edited = [read(&output).as_slice(), b" "].concat();
    fs::write(output.join("tokenizer.json"), edited).unwrap();
    let text = opened();
    let warning = format!("warning: {} is not the file", output.join("tokenizer.json").display());
    assert!(text.contains(&warning) && !text.contains("model.safetensors"), "{text}");
    let weights = output.join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&weights, bytes).unwrap();
    assert!(opened().contains(&format!("warning: {} is not the file", weights.display())));
}

/// What is copied into a model is a file of the tokenizer's folder, or a link within a model's folder in a
/// cache of Hugging Face.
#[test]
fn links_that_lead_out_of_a_tokenizer_folder_are_not_copied() {
    use std::os::unix::fs::symlink;
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let snapshot = at("hub/models--a--b/snapshots/0123");
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir(at("hub/models--a--b/blobs")).unwrap();
    fs::create_dir(at("hub/models--c--d")).unwrap();
    fs::write(at("map"), "{}").unwrap();
    for (number, name) in ["tokenizer.json", "tokenizer_config.json"].into_iter().enumerate() {
        fs::copy(tokenizer().join(name), at(name)).unwrap();
        fs::copy(tokenizer().join(name), at("hub/models--c--d").join(name)).unwrap();
        let blob = format!("hub/models--a--b/blobs/{number}");
        fs::copy(tokenizer().join(name), at(&blob)).unwrap();
        symlink(format!("../../blobs/{number}"), snapshot.join(name)).unwrap();
    }
    fs::copy(at("map"), at("hub/models--a--b/blobs/2")).unwrap();
    symlink("../../blobs/2", snapshot.join("special_tokens_map.json")).unwrap();
    symlink(at("hub"), at("cache")).unwrap();
    let train = |name: &str| {
        let flags = format!("--max_steps 1 --overwrite --tokenizer_path {}", at(name).display());
        train(&at("model"), &flags).output().unwrap()
    };
    // Also through a link to a folder above, or by the name of the file.
    for name in ["hub", "cache", "hub/models--a--b/../"] {
        let done = train(&format!("{name}/models--a--b/snapshots/0123"));
        assert!(done.status.success(), "{}", said(&done));
        for name in ["tokenizer.json", "special_tokens_map.json"] {
            let copied = at("model").join(name);
            let found = fs::symlink_metadata(&copied).unwrap();
            assert!(found.is_file(), "a file of its own");
            assert!(fs::read(copied).unwrap() == fs::read(snapshot.join(name)).unwrap());
        }
    }
    fs::remove_dir_all(at("model")).unwrap();
    for target in ["../../../../", "../../../models--c--d/", "../../blobs/../../models--c--d/"] {
        for name in ["tokenizer.json", "tokenizer_config.json"] {
            let link = snapshot.join(name);
            let before = fs::read_link(&link).unwrap();
            fs::remove_file(&link).unwrap();
            symlink(format!("{target}{name}"), &link).unwrap();
            for given in ["", "/tokenizer.json"] {
                let failed = train(&format!("hub/models--a--b/snapshots/0123{given}"));
                let said = error_in(&failed);
                assert!(said.contains(&format!("{name} is a link that leads out")), "{said}");
                assert!(!at("model").exists());
            }
            // What was named is read where nothing of it is copied.
            let mut tokenize = laam();
            tokenize.args(["tokenize", "--limit", "1", "--output"]).arg(at("tokens"));
            let done = tokenize.arg("--tokenizer_path").arg(&snapshot).output().unwrap();
            assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
            fs::remove_file(&link).unwrap();
            symlink(before, &link).unwrap();
        }
    }
}

#[test]
fn a_diverged_run_keeps_the_last_good_model() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("model");
    trained(&output, SHORT);
    let before = content(&output);
    let good: Vec<_> = before.keys().filter(|path| !path.ends_with("metrics.jsonl")).collect();
    // Weights overflow at once: of the long run updates stop, the short one ends before that.
    for steps in [500, 9] {
        let flags = format!("--max_steps {steps} --save_steps 2 --reload --learning_rate 1e308");
        let ended = train(&output, &flags).output().unwrap();
        let said = said(&ended);
        assert_eq!(ended.status.code(), Some(1), "{said}");
        assert!(
            said.contains("laam: the run diverged at step ") && said.contains("hint: "),
            "{said}"
        );
        assert!(said.matches("no update").count() < 8, "{said}");
        for path in &good {
            // The first checkpoint of the new run is from before the first update at that rate.
            if path.parent() == Some(&output) {
                assert!(fs::read(path).unwrap() == before[*path], "{}", path.display());
            }
        }
        assert!(load(&output).unwrap().weights.iter().all(|weight| weight.is_finite()));
        let last = metrics(&output).last().unwrap().step;
        assert!(last <= 40, "stopped after 32 skipped updates: {last}");
    }
}

/// The trainer replaces the model while others read it: both go on, and no reader sees a mixture.
#[test]
fn readers_see_whole_models_and_change_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("model");
    trained(&output, SHORT);
    let run = "--max_steps 1 --warmup_steps 0 --reload";
    let readers = std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            for seed in 0..6 {
                trained(&output, &format!("{run} --seed {seed}"));
            }
        });
        let mut models = std::collections::BTreeSet::new();
        let mut reads = 0;
        while !writer.is_finished() {
            let (model, provenance) = read_consistently(&output, || {
                Ok((load(&output)?, load_provenance(&output)?.expect("a provenance")))
            })
            .unwrap();
            assert!(laam::model::check_hashes(&output).unwrap().is_empty() || reads > 0);
            drop(model);
            models.insert(provenance.weights_sha256);
            reads += 1;
        }
        writer.join().unwrap();
        let listed = laam().arg("ls").arg(&output).output().unwrap();
        assert!(listed.status.success());
        (models.len(), reads)
    });
    assert!(readers.0 > 2 && readers.1 > 10, "{readers:?}");

    // A commit that another process has yet to complete is read, and left as it is.
    let log = output.join(".laam-commit");
    fs::create_dir(&log).unwrap();
    for name in ["model.safetensors", "provenance.json", "config.json"] {
        fs::rename(output.join(name), log.join(name)).unwrap();
    }
    fs::write(log.join("training_state.safetensors"), "").unwrap();
    let before = content(&output);
    for command in ["ls", "generate"] {
        let mut command = laam().arg(command).arg(&output).output().unwrap();
        command.stdout.clear();
        assert!(command.status.success(), "{}", said(&command));
    }
    assert!(content(&output) == before, "a reader changes nothing");
}

#[test]
fn what_happens_to_files_during_a_run_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("model");
    let flags = "--max_steps 100000 --logging_steps 1 --save_steps 1000";
    let ended = |child: std::process::Child| -> Output { child.wait_with_output().unwrap() };
    let cached = trained(&output, SHORT);
    let run = under_way(&output, &format!("{flags} --overwrite"), 60);
    let tokens = fs::OpenOptions::new().write(true).open(token_file(&cached)).unwrap();
    tokens.set_len(0).unwrap();
    let text = error_in(&ended(run));
    assert!(text.contains("was cut short while it was read"), "{text}");

    let output = folder.path().join("removed");
    let run = under_way(&output, flags, 60);
    fs::remove_dir_all(&output).unwrap();
    let text = error_in(&ended(run));
    assert!(text.contains("was removed"), "{text}");
    assert!(!output.exists(), "it is not made again");
}

#[test]
fn a_resumed_run_keeps_when_its_text_was_retrieved() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("model");
    trained(&output, SHORT);
    // As if it was retrieved long ago.
    let edit = |path: &Path| {
        let text = fs::read_to_string(path).unwrap();
        let mut provenance: Value = serde_json::from_str(&text).unwrap();
        provenance["corpus"]["retrieved"] = "2001-02-03T04:05:06Z".into();
        fs::write(path, provenance.to_string()).unwrap();
    };
    fs::remove_dir_all(output.join("checkpoint-4")).unwrap();
    edit(&output.join("checkpoint-2/provenance.json"));
    trained(&output, &format!("{SHORT} --resume"));
    let provenance: Provenance = load_provenance(&output).unwrap().unwrap();
    assert_eq!(provenance.corpus.retrieved.as_deref(), Some("2001-02-03T04:05:06Z"));
}

/// Documents of 2 windows and one token: the third has nothing to predict.
#[test]
fn windows_without_a_target_are_no_steps() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("a.c"), "int a;\n").unwrap();
    let lines = |context: usize| {
        let output = folder.path().join(context.to_string());
        let flags = format!(
            "--source {} --max_position_embeddings {context} --epochs 2 --logging_steps 1 --order \
             sequential --warmup_steps 0 --limit 1 --overwrite",
            source.display()
        );
        trained(&output, &flags);
        metrics(&output)
    };
    // Its number of tokens is the smallest context that is one window.
    let tokens = (2..100).find(|&context| lines(context).len() == 2).unwrap();
    let lines = lines(tokens - 1);
    let steps: Vec<_> =
        lines.iter().map(|line| (line.loss.is_nan(), line.grad_norm.is_nan())).collect();
    assert_eq!(steps, [(false, false), (true, true), (false, false), (true, true)]);
    assert!(lines.iter().all(|line| line.skipped == 0));
    assert!(lines[2].loss > 1.0 && lines[2].loss < lines[0].loss);
}

#[test]
fn metrics_go_where_they_are_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let flags = "--max_steps 3 --logging_steps 1";
    let done = train(&folder.path().join("a"), &format!("{flags} --metrics -")).output().unwrap();
    assert!(done.status.success(), "{}", said(&done));
    assert_eq!(String::from_utf8(done.stdout).unwrap().matches("\"loss\"").count(), 3);
    let output = folder.path().join("b");
    trained(&output, &format!("{flags} --metrics /dev/null"));
    // A FIFO that somebody put there is not waited for.
    let fifo = std::ffi::CString::new(output.join("metrics.jsonl").to_str().unwrap()).unwrap();
    // SAFETY: the path is a string that ends in a zero byte.
    assert_eq!(unsafe { libc::mkfifo(fifo.as_ptr(), 0o600) }, 0);
    let mut longer = train(&output, "--max_steps 4 --logging_steps 1 --resume");
    let refused = bounded(&mut longer, std::time::Duration::from_secs(8), 8 << 30);
    assert!(error_in(&refused).contains("metrics.jsonl"));
    let notes = folder.path().join("notes");
    fs::write(&notes, "mine").unwrap();
    let output = folder.path().join("c");
    let failed =
        train(&output, &format!("{flags} --metrics {}", notes.display())).output().unwrap();
    error_in(&failed);
    assert_eq!(fs::read_to_string(&notes).unwrap(), "mine");
}

#[test]
fn other_commands_replace_only_what_laam_wrote() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let source = at("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("a.c"), "int a;\n").unwrap();
    let run = |arguments: &[&str], output: &Path, code: i32| {
        let done = laam().args(arguments).arg(output).stdout(Stdio::null()).output().unwrap();
        assert_eq!(done.status.code(), Some(code), "{arguments:?}: {}", said(&done));
        said(&done)
    };
    let source = source.to_str().unwrap();
    let tokenizer = ["train-tokenizer", "--source", source, "--vocab_size", "270", "--output_path"];
    run(&tokenizer, &at("tokenizer"), 0);
    // Its own is replaced.
    run(&tokenizer, &at("tokenizer"), 0);
    for name in ["run.json/x", "tokenizer/x", "report.html", "rebuilt/a.c", "model/config.json"] {
        let output = at(&name.replace('/', "-"));
        fs::create_dir_all(output.join(name).parent().unwrap()).unwrap();
        fs::write(output.join(name), "mine").unwrap();
        let before = content(&output);
        run(&["run", "--source", source, "--recipe", "linux-kernel-dir", "--output"], &output, 2);
        assert!(content(&output) == before);
    }
    for name in ["tokenizer.json", "tokenizer_config.json", "config.json"] {
        let output = at(&format!("{name}-folder"));
        fs::create_dir(&output).unwrap();
        fs::write(output.join(name), "{}").unwrap();
        run(&tokenizer, &output, 2);
        assert_eq!(content(&output)[&output.join(name)], b"{}");
    }
    let place = at("tokenizer");
    let place = place.to_str().unwrap();
    let tokenize = ["tokenize", "--source", source, "--tokenizer_path", place, "--output"];
    for _ in 0..2 {
        run(&tokenize, &at("tokens"), 0);
    }
    for name in ["source/a.c", "tokenizer/tokenizer.json"] {
        let before = fs::read(at(name)).unwrap();
        assert!(run(&tokenize, &at(name), 2).contains("is not a token file"));
        assert!(fs::read(at(name)).unwrap() == before);
    }
    // A FIFO gets the same bytes, and the command prints the same numbers.
    let fifo = at("fifo");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let reader = fifo.clone();
    let reader = std::thread::spawn(move || fs::read(reader).unwrap());
    run(&tokenize, &fifo, 0);
    assert!(reader.join().unwrap() == fs::read(at("tokens")).unwrap());
    assert!(!fs::metadata(&fifo).unwrap().is_file());
    // A glob of the originals does not hide them from `run`.
    fs::create_dir(at("own")).unwrap();
    fs::create_dir(at("own/rebuilt")).unwrap();
    fs::write(at("own/rebuilt/a.c"), "int a;\n").unwrap();
    let glob = at("own/rebuilt/*.c");
    let recipe = ["run", "--recipe", "sample", "--source", glob.to_str().unwrap(), "--output"];
    assert!(run(&recipe, &at("own"), 2).contains("overlap"));
    let sweep = at("sweep.toml");
    fs::write(&sweep, "recipe = 'sample'\n").unwrap();
    fs::create_dir(at("sweep")).unwrap();
    fs::write(at("sweep/table.tsv"), "mine").unwrap();
    run(&["sweep", sweep.to_str().unwrap(), "--output"], &at("sweep"), 2);
    assert_eq!(content(&at("sweep")).len(), 1);
}
