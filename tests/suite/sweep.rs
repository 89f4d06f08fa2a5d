//! `laam sweep`: every combination is run once, and told of.

use std::fs;

use serde_json::Value;

use crate::cli::error_of;
use crate::support::laam;

#[test]
fn sweep_runs_what_is_missing_and_reports_all() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir(at("source")).unwrap();
    let text = "int one(void)\n{\n\treturn 1;\n}\n\nint two(void)\n{\n\treturn one() + one();\n}\n";
    fs::write(at("source/a.c"), text).unwrap();
    let recipe = "description = 'tiny'\nrebuild = true\n[tokenizer]\nvocab_size = 270\n\
        [[stage]]\nname = 'model'\nwindows = 'addressed'\nmax_position_embeddings = 128\n\
        hidden_size = 16\nintermediate_size = 24\nnum_hidden_layers = 1\nnum_attention_heads = 2\n\
        num_key_value_heads = 2\noptimizer = 'muon'\nweight_decay = 0.0\nadam_beta2 = 0.95\n\
        warmup_steps = 5\nbatch_size = 1\n";
    fs::write(at("tiny.toml"), recipe).unwrap();
    let sweep = "description = 'more steps <help>'\nrecipe = 'tiny.toml'\n\
        [set]\nlearning_rate = 2e-2\n[grid]\nepochs = [2, 150]\n";
    fs::write(at("steps.toml"), sweep).unwrap();
    let (path, source, output) = (at("steps.toml"), at("source"), at("out"));
    let run = || {
        let mut command = laam();
        command.arg("sweep").arg(&path).arg("--source").arg(&source).arg("--output").arg(&output);
        command.arg("--tensorboard").arg(at("board"));
        command.arg("--json").output().expect("the program starts")
    };
    let first = run();
    let said = String::from_utf8_lossy(&first.stderr).into_owned();
    assert_eq!(first.status.code(), Some(0), "{said}");
    assert_eq!(said.matches("training ").count(), 2);
    let report: Value = serde_json::from_slice(&first.stdout).unwrap();
    let runs = report["runs"].as_array().unwrap();
    let of = |name: &str| -> Vec<&Value> { runs.iter().map(|run| &run[name]).collect() };
    assert_eq!(of("name"), ["epochs=2", "epochs=150"]);
    assert_eq!(of("steps"), [2, 150]);
    assert_eq!(of("tokens"), [2 * 128, 150 * 128]);
    assert_eq!(of("files_exact"), [0, 1], "{report:#}");
    assert_eq!(of("windows_exact"), [0, 1]);
    let bits: Vec<f64> = of("bits_per_byte").iter().map(|bits| bits.as_f64().unwrap()).collect();
    assert!(bits[0] > 1.0 && bits[1] < 0.5, "{bits:?}");

    for run in ["epochs=2", "epochs=150"] {
        let events = fs::read_dir(at("board").join(run).join("model")).unwrap();
        let names: Vec<_> = events.map(|file| file.unwrap().file_name()).collect();
        assert!(names[0].to_str().unwrap().starts_with("events.out.tfevents."), "{names:?}");
    }
    let table = fs::read_to_string(output.join("table.tsv")).unwrap();
    let rows: Vec<Vec<&str>> = table.lines().map(|line| line.split('\t').collect()).collect();
    assert_eq!(rows.len(), 3);
    assert!(rows.iter().all(|row| row.len() == rows[0].len()), "{table}");
    let column = rows[0].iter().position(|name| *name == "bits_per_byte").unwrap();
    assert_eq!(rows[2][column].parse::<f64>().unwrap(), bits[1]);
    let plot = fs::read_to_string(output.join("plot.svg")).unwrap();
    assert_eq!(plot.matches("<circle").count(), 2);
    assert!(plot.contains("more steps &lt;help&gt;"));
    let json: Value =
        serde_json::from_str(&fs::read_to_string(output.join("table.json")).unwrap()).unwrap();
    assert_eq!(json, report);

    // What is done is not done again; what was lost is, from what is left of it.
    fs::remove_file(output.join("epochs=2/result.json")).unwrap();
    let second = run();
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert_eq!(second.stdout, first.stdout, "{said}");
    assert_eq!((said.matches("training ").count(), said.matches("nothing to do").count()), (1, 1));

    // Other runs do not go on in these folders.
    fs::write(&path, sweep.replace("2e-2", "1e-2")).unwrap();
    let [path, source, output] = [&path, &source, &output].map(|path| path.to_str().unwrap());
    let arguments = ["sweep", path, "--source", source, "--output", output];
    assert!(error_of(&arguments).contains("another recipe"));
}

#[test]
fn sweep_rejects_invalid_files() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bad.toml");
    fs::write(&path, "recipe = 'sample'\n[grid]\nbatchsize = [1]\n").unwrap();
    assert!(error_of(&["sweep", path.to_str().unwrap()]).contains("batchsize"));
    assert!(error_of(&["sweep", "no/such.toml"]).contains("no/such.toml"));
}
