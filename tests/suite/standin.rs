//! The host code for GPUs, executed over the stand-ins for the CUDA driver and cuBLASLt
//! (`crates/cuda-standin`).

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use laam::backend::gpu::RESERVED_BYTES as GPU_RESERVED_BYTES;
use laam::device::cuda::Cuda;
use laam::device::{Address, Device, Launch, Matmul, Matrix};
use laam::dtype::Dtype;
use laam::kernels::{BUILD, families};
use serde_json::Value;
use tempfile::TempDir;

use crate::support::{bounded, error_in, free_port, laam};

const DRIVER: &str = "libcuda.so.1";
const CUBLASLT: &str = "libcublasLt.so.13";
const NCCL: &str = "libnccl.so.2";
/// Time and address space of one command.
const LIMIT: Duration = Duration::from_mins(2);
const MEMORY: u64 = 64 << 30;

/// A folder with the stand-ins under the names of the real libraries, and a small run.
struct Standin {
    folder: TempDir,
}

impl Standin {
    /// `None` after a loud line if the kernels were not built.
    fn new() -> Option<Standin> {
        if let Err(why) = BUILD.cuda {
            eprintln!("SKIPPED: host code for GPUs over the stand-in driver, because {why}");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        for (name, library) in [
            (DRIVER, "libcuda_standin.so"),
            (CUBLASLT, "libcublaslt_standin.so"),
            (NCCL, "libnccl_standin.so"),
        ] {
            symlink(built(library), folder.path().join(name)).unwrap();
        }
        Some(Standin { folder })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The program, which finds the stand-ins as it would find the real libraries.
    fn laam(&self) -> Command {
        let mut command = laam();
        command.env("LD_LIBRARY_PATH", self.folder.path());
        command.env("LAAM_CUDA_PTX", "1").env("CUDA_STANDIN_REPORT", self.path("report.json"));
        command
    }

    /// A corpus and its tokenizer.
    fn prepare(&self) {
        fs::create_dir(self.path("source")).unwrap();
        for (name, text) in [
            ("a.c", include_str!("../../src/main.rs")),
            ("b.c", include_str!("../../src/schema.rs")),
        ] {
            fs::write(self.path("source").join(name), text).unwrap();
        }
        let mut train = self.laam();
        train.arg("train-tokenizer").args(["--vocab_size", "300", "--style", "exact", "--quiet"]);
        train.arg("--source").arg(self.path("source"));
        done(train.arg("--output_path").arg(self.path("tokenizer")));
    }

    /// `laam train` of a small model, which saves every fourth step.
    fn train(&self, backend: &str, output: &str, steps: usize) -> Command {
        self.train_windows(backend, output, steps, "2", "32")
    }

    /// [`Self::train`] on `batch` windows of `context` tokens.
    fn train_windows(
        &self,
        backend: &str,
        output: &str,
        steps: usize,
        batch: &str,
        context: &str,
    ) -> Command {
        let mut train = self.laam();
        train.arg("train").arg("--source").arg(self.path("source"));
        train.arg("--tokenizer_path").arg(self.path("tokenizer"));
        train.arg("--output_path").arg(self.path(output));
        let steps = steps.to_string();
        train.args(["--backend", backend, "--max_steps", &steps, "--batch_size", batch]);
        train.args("--hidden_size 32 --intermediate_size 48 --num_hidden_layers 1".split(' '));
        train.args("--num_attention_heads 4 --num_key_value_heads 2 --seed 1".split(' '));
        train.args(["--max_position_embeddings", context]);
        train.args("--warmup_steps 2 --save_steps 4".split(' '));
        train
    }

    /// A run whose GPU is lost after some launches of kernels: a late error, after which the saved steps
    /// are there. A step takes about 30 kernels.
    fn cut(&self, train: &mut Command, kernels: usize) {
        train.env("CUDA_STANDIN_FAULT", format!("kernel@{kernels}=719"));
        let said = error_in(&output(train));
        assert!(said.contains("unspecified launch failure"), "{said}");
    }

    /// Step, loss and gradient norm of each line of metrics.
    fn losses(&self, output: &str) -> Vec<[Value; 3]> {
        let text = fs::read_to_string(self.path(output).join("metrics.jsonl")).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines.map(|line| ["step", "loss", "grad_norm"].map(|name| line[name].clone())).collect()
    }

    fn model(&self, output: &str) -> Vec<u8> {
        fs::read(self.path(output).join("model.safetensors")).unwrap()
    }

    /// What the driver counted of the last command.
    fn report(&self) -> Value {
        serde_json::from_slice(&fs::read(self.path("report.json")).unwrap()).unwrap()
    }
}

/// A shared library beside this test binary.
fn built(library: &str) -> PathBuf {
    let here = std::env::current_exe().unwrap();
    let path = here.parent().unwrap().join(library);
    assert!(path.is_file(), "{} was not built", path.display());
    path
}

fn output(command: &mut Command) -> Output {
    bounded(command, LIMIT, MEMORY)
}

/// Output of a command that succeeds.
#[track_caller]
fn done(command: &mut Command) -> (String, String) {
    let output = output(command);
    let [out, err] = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    assert!(output.status.success(), "{out}\n{err}");
    (out, err)
}

fn check(standin: &Standin, backend: &str, arguments: &[&str]) -> Vec<Value> {
    let mut check = standin.laam();
    check.args(["check", "--backend", backend, "--seed", "7", "--json"]).args(arguments);
    let checked: Value = serde_json::from_str(&done(&mut check).0).unwrap();
    assert_eq!(checked["failed"], 0);
    checked["runs"].as_array().unwrap().iter().map(|run| run["rows"].clone()).collect()
}

#[test]
fn doctor_and_check_run_on_the_stand_in_driver() {
    let Some(standin) = Standin::new() else { return };
    let doctor = doctor(&standin);
    assert_eq!(doctor["cublaslt"], true);
    assert_eq!(doctor["nccl"]["version"], "2.32.3");
    let gpu = doctor["usable_gpus"][0].as_str().unwrap();
    assert!(gpu.contains("simulated GPU") && gpu.contains("17.2 of 17.2 GB free"), "{gpu}");

    // Every op on small shapes, eager and as a graph; matmuls with the bits of the simulated device.
    check(&standin, "cuda", &["--precision", "bfloat16"]);
    assert_eq!(standin.report()["leaks"], Value::Array(Vec::new()));
    for only in ["linear", "fused_linear_cross_entropy"] {
        let rows = |backend| check(&standin, backend, &["--only", only]);
        assert_eq!(rows("cuda"), rows("sim"), "{only}");
    }
    // One context and one module each for the whole process.
    let calls = &standin.report()["calls"];
    assert_eq!(calls["cuDevicePrimaryCtxRetain"], 1, "{calls}");
    assert!(calls["cuModuleLoadData"].as_u64().unwrap() < 20, "{calls}");
}

#[test]
fn training_on_the_stand_in_driver_has_the_bits_of_the_simulator() {
    let Some(standin) = Standin::new() else { return };
    standin.prepare();
    for precision in ["float32", "bfloat16"] {
        let train = |backend, output: &str, steps| {
            let mut train = standin.train(backend, output, steps);
            train.args(["--precision", precision]);
            train
        };
        let name = |kind: &str| format!("{kind}-{precision}");
        done(&mut train("sim", &name("sim"), 20));
        let exact = standin.model(&name("sim"));

        // The first run of a program is eager, the others are graphs of one step; with more steps
        // between two lines of metrics, up to eight steps are one graph.
        done(train("cuda", &name("cuda"), 20).args(["--logging_steps", "5"]));
        let report = standin.report();
        assert!(report["calls"]["cuGraphLaunch"].as_u64() >= Some(15), "{report}");
        assert_eq!(report["leaks"], Value::Array(Vec::new()));
        assert!(standin.model(&name("cuda")) == exact, "{precision}: cuda");
        done(train("cuda", &name("long"), 20).args(["--logging_steps", "20"]));
        assert!(standin.model(&name("long")) == exact, "{precision}: graphs of eight steps");

        standin.cut(&mut train("cuda", &name("resumed"), 20), 400);
        done(train("cuda", &name("resumed"), 20).arg("--resume"));
        assert!(standin.model(&name("resumed")) == exact, "{precision}: resumed");

        // Every buffer an allocation of its own, poisoned outside its live range.
        for backend in ["sim", "cuda"] {
            let guarded = format!("guarded-{backend}-{precision}");
            done(train(backend, &guarded, 20).env("LAAM_GUARD", "1"));
            assert!(standin.model(&guarded) == exact, "{guarded}");
            assert_eq!(standin.losses(&guarded), standin.losses(&name("sim")), "{guarded}");
        }
    }
}

#[test]
fn saved_algorithms_that_cublaslt_refuses_are_replaced_with_a_warning() {
    let Some(standin) = Standin::new() else { return };
    standin.prepare();
    standin.cut(&mut standin.train("cuda", "begun", 8), 200);
    for (name, value, warning) in [
        ("CUDA_STANDIN_FAULT", "", ""),
        (
            "CUDA_STANDIN_FAULT",
            "cublasLtMatmulAlgoCheck@2=15",
            "warning: cuBLASLt refuses 1 of the checkpoint's matmul algorithms",
        ),
        ("CUDA_STANDIN_CUBLASLT", "130100", "chosen for another version of cuBLASLt"),
    ] {
        let _ = fs::remove_dir_all(standin.path("run"));
        copy(&standin.path("begun"), &standin.path("run"));
        let mut resume = standin.train("cuda", "run", 8);
        let (_, said) = done(resume.arg("--resume").env(name, value));
        assert!(said.contains(warning) && said.contains("warning") != warning.is_empty(), "{said}");
    }
}

/// A copy of a library in which one exported name is another.
fn without(standin: &Standin, library: &str, symbol: &str) {
    let path = standin.path(library);
    let mut bytes = fs::read(&path).unwrap();
    let name: Vec<u8> = [b"\0", symbol.as_bytes(), b"\0"].concat();
    let mut found = 0;
    for at in 0..bytes.len() - name.len() {
        if bytes[at..].starts_with(&name) {
            bytes[at + symbol.len()] = b'X';
            found += 1;
        }
    }
    assert!(found > 0, "{symbol} in {library}");
    fs::remove_file(&path).unwrap();
    fs::write(&path, bytes).unwrap();
}

#[test]
fn drivers_and_libraries_that_will_not_do_are_errors_with_hints() {
    let Some(standin) = Standin::new() else { return };
    let fails = |variable: (&str, &str)| {
        let mut check = standin.laam();
        check.args(["check", "--backend", "cuda", "--only", "linear", "--precision", "float32"]);
        error_in(&output(check.env(variable.0, variable.1)))
    };
    for (variable, text) in [
        (
            ("CUDA_STANDIN_DRIVER", "11080"),
            "the driver supports CUDA 11.8, but the kernels need 12.0",
        ),
        (("CUDA_STANDIN_GPUS", "0"), "initializing the driver"),
        (("CUDA_STANDIN_MEMORY", "1000000"), "out of memory"),
        (("LAAM_CUDA_PTX", "0"), "loading kernels/"),
        (("LAAM_CUBLASLT", "/no/such/library"), "LAAM_CUBLASLT=/no/such/library: not a cuBLASLt"),
    ] {
        let said = fails(variable);
        assert!(said.contains(text), "{variable:?}: {said}");
    }
    for symbol in [
        "Create",
        "Matmul",
        "MatmulAlgoGetHeuristic",
        "MatmulDescCreate",
        "MatmulDescSetAttribute",
        "MatmulPreferenceCreate",
        "MatmulPreferenceSetAttribute",
        "MatrixLayoutCreate",
    ] {
        let said = fails(("CUDA_STANDIN_FAULT", &format!("cublasLt{symbol}@1=14")));
        assert!(said.contains("CUBLAS_STATUS_INTERNAL_ERROR"), "{said}");
    }
    for (library, symbol, text) in [
        (CUBLASLT, "cublasLtMatmulAlgoCheck", "has no cublasLtMatmulAlgoCheck"),
        (DRIVER, "cuGraphUpload", "libcuda.so.1 has no cuGraphUpload"),
    ] {
        without(&standin, library, symbol);
        let said = fails(("CUDA_STANDIN_GPUS", "1"));
        assert!(said.contains(text), "{symbol}: {said}");
        // What a person asks first must not fail.
        done(standin.laam().arg("doctor"));
    }
}

#[test]
fn matmuls_without_cublaslt_or_without_an_algorithm_are_those_of_laams_own_kernel() {
    let Some(standin) = Standin::new() else { return };
    let own = check(&standin, "sim", &["--only", "linear", "--matmul-kernel", "own"]);
    let none = |standin: &Standin| {
        let mut check = standin.laam();
        check.args(["check", "--backend", "cuda", "--seed", "7", "--json", "--only", "linear"]);
        check
    };
    let rows = |command: &mut Command| {
        let (out, said) = done(command);
        let checked: Value = serde_json::from_str(&out).unwrap();
        let runs = checked["runs"].as_array().unwrap();
        (runs.iter().map(|run| run["rows"].clone()).collect::<Vec<_>>(), said)
    };
    let mut without_algorithm = none(&standin);
    let (got, said) = rows(without_algorithm.env("CUDA_STANDIN_ALGORITHMS", "none"));
    assert!(got == own && !said.contains("cuBLASLt"), "{said}");

    fs::remove_file(standin.path(CUBLASLT)).unwrap();
    if doctor(&standin)["cublaslt"] == true {
        return eprintln!("SKIPPED: matmuls without cuBLASLt, because the system has one");
    }
    let (got, said) = rows(&mut none(&standin));
    assert!(got == own, "{said}");
    assert_eq!(said.matches("note: no cuBLASLt: matmuls run on laam's own kernel").count(), 1);

    // A run that began without it says so where there is one.
    standin.prepare();
    standin.cut(&mut standin.train("cuda", "run", 8), 250);
    symlink(built("libcublaslt_standin.so"), standin.path(CUBLASLT)).unwrap();
    let (_, said) = done(standin.train("cuda", "run", 8).arg("--resume"));
    assert!(said.contains("chosen for another matmul kernel"), "{said}");
}

/// The first algorithm takes longer: timing chooses the second, and the choice is kept.
#[test]
fn tuned_matmuls_take_the_fastest_algorithm_and_keep_it() {
    let Some(standin) = Standin::new() else { return };
    standin.prepare();
    let algorithms = |run: &str, choice: &str| -> Vec<u64> {
        let mut train = standin.train("cuda", run, 4);
        train.args(["--matmul-algorithms", choice]).env("LAAM_CACHE", standin.path("cache"));
        done(train.env("CUDA_STANDIN_ALGORITHMS", "two"));
        let state = fs::read(standin.path(run).join("checkpoint-4/training_state.safetensors"));
        let (_, metadata) = safetensors::SafeTensors::read_metadata(&state.unwrap()).unwrap();
        let texts = metadata.metadata().as_ref().unwrap().values().cloned();
        let states = texts.filter_map(|text| serde_json::from_str::<Value>(&text).ok());
        let found = states.filter_map(|state| {
            let plans = state.pointer("/backend/matmul_plans/cublaslt/matmuls")?;
            Some(plans.as_array()?.iter().map(|plan| plan[1][7].as_u64().unwrap()).collect())
        });
        found.last().expect("the checkpoint has matmul plans")
    };
    let cache = || fs::read_dir(standin.path("cache/matmul")).map_or(0, Iterator::count);
    let first = algorithms("first", "first");
    assert!(!first.is_empty() && first.iter().all(|&number| number == 0) && cache() == 0);
    let tuned = algorithms("tuned", "tuned");
    assert!(tuned.len() == first.len() && tuned.iter().all(|&number| number == 1), "{tuned:?}");
    assert_eq!(cache(), 1);
    assert!(standin.model("first") == standin.model("tuned"));

    // Kept: what the file says is used without a measurement.
    let path = fs::read_dir(standin.path("cache/matmul")).unwrap().next().unwrap().unwrap().path();
    let mut kept: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for plan in kept["matmuls"].as_array_mut().unwrap() {
        plan[1][7] = 0.into();
    }
    fs::write(&path, kept.to_string()).unwrap();
    assert!(algorithms("kept", "tuned").iter().all(|&number| number == 0));

    // Without a place to keep it the choice is made in every run, and said to be.
    fs::remove_dir_all(standin.path("cache/matmul")).unwrap();
    fs::write(standin.path("cache/matmul"), "").unwrap();
    let mut train = standin.train("cuda", "unkept", 4);
    train.args(["--matmul-algorithms", "tuned"]).env("LAAM_CACHE", standin.path("cache"));
    let (_, said) = done(train.env("CUDA_STANDIN_ALGORITHMS", "two"));
    assert!(said.contains("cannot be kept in"), "{said}");
    assert!(standin.model("unkept") == standin.model("tuned"));
}

/// An older driver than nvcc is given PTX of an ISA that it knows, and compiles it.
#[test]
fn drivers_older_than_nvcc_compile_the_kernels() {
    let Some(standin) = Standin::new() else { return };
    let mut check = standin.laam();
    check.args(["check", "--backend", "cuda", "--only", "attention", "--precision", "bfloat16"]);
    check.args(["--seed", "7"]);
    check.env_remove("LAAM_CUDA_PTX").env("CUDA_STANDIN_DRIVER", "12000");
    let (_, said) = done(check.env("CUDA_CACHE_PATH", "/cache/of/the/driver"));
    let note = "tens of seconds the first time, then they are in /cache/of/the/driver";
    assert_eq!(said.matches(note).count(), 1, "{said}");
}

/// `--backend auto` takes a GPU that works, and the CPU with a line that says why if it does not.
#[test]
fn a_gpu_that_fails_its_self_check_is_not_chosen() {
    let Some(standin) = Standin::new() else { return };
    let plan = |backend: &str, fault: &str| {
        let mut plan = standin.laam();
        plan.args(["plan", "--backend", backend, "--json"]).env("CUDA_STANDIN_FAULT", fault);
        let (out, said) = done(&mut plan);
        let plan: Value = serde_json::from_str(&out).unwrap();
        (plan["backend"].as_str().unwrap().to_string(), said)
    };
    assert_eq!(plan("auto", "").0, "cuda");
    let (backend, said) = plan("auto", "kernel@2=719");
    assert_eq!(backend, "cpu");
    let warning = "warning: running on the CPU: ";
    assert!(said.contains(warning) && said.contains("unspecified launch failure"), "{said}");
    assert_eq!(said.lines().filter(|line| line.contains(warning)).count(), 1, "{said}");
    let mut explicit = standin.laam();
    explicit.args(["check", "--backend", "cuda", "--only", "rms_norm"]);
    error_in(&output(explicit.env("CUDA_STANDIN_FAULT", "kernel@2=719")));
}

#[test]
fn smoke_runs_on_the_stand_in_driver_and_shows_a_lost_gpu() {
    let Some(standin) = Standin::new() else { return };
    let smoke = |fault: &str| {
        let mut smoke = standin.laam();
        smoke.args(["bench", "smoke", "--backend", "cuda", "--small", "--json"]);
        output(smoke.env("CUDA_STANDIN_FAULT", fault))
    };
    let steps = |output: &Output| -> Vec<Value> {
        let smoke: Value = serde_json::from_slice(&output.stdout).unwrap();
        smoke["steps"].as_array().unwrap().clone()
    };
    let whole = smoke("");
    for step in steps(&whole) {
        assert_eq!(step["passed"], true, "{step}");
    }
    assert!(whole.status.success());
    let lost = smoke("kernel@3=719");
    assert_eq!(lost.status.code(), Some(1));
    assert!(steps(&lost).iter().any(|step| step["passed"] == false));
}

/// The sizes that the error names fit, and `auto` finds one by itself.
#[test]
fn out_of_memory_names_a_batch_and_a_context_that_fit() {
    let Some(standin) = Standin::new() else { return };
    standin.prepare();
    let memory = (GPU_RESERVED_BYTES + 3_000_000).to_string();
    let train = |output: &str, batch: &str, context: &str| {
        let mut train = standin.train_windows("cuda", output, 1, batch, context);
        train.env("CUDA_STANDIN_MEMORY", &memory);
        train
    };
    let said = error_in(&output(&mut train("refused", "512", "64")));
    let number = |flag: &str| {
        let (_, rest) = said.split_once(&format!("{flag} to ")).unwrap_or_else(|| panic!("{said}"));
        rest.split(|c: char| !c.is_ascii_digit()).next().unwrap().to_string()
    };
    assert!(!standin.path("refused").exists());
    let (batch, context) = (number("--batch-size"), number("--max-position-embeddings"));
    done(&mut train("batch", &batch, "64"));
    done(&mut train("context", "512", &context));

    let (_, said) = done(&mut train("auto", "auto", "64"));
    assert!(
        said.contains(&format!("batch_size auto: {batch} windows at a time, 1 times")),
        "{said}"
    );
    let mut accumulated = train("accumulated", "auto", "64");
    let (_, said) = done(accumulated.args(["--gradient_accumulation_steps", "66"]));
    let windows = standin.losses("accumulated").len();
    assert!(said.contains("batch_size auto: ") && windows == 1, "{said}");
}

fn doctor(standin: &Standin) -> Value {
    serde_json::from_str(&done(standin.laam().args(["doctor", "--json"])).0).unwrap()
}

#[test]
fn cublaslt_is_taken_from_laam_cublaslt() {
    let Some(standin) = Standin::new() else { return };
    let elsewhere = standin.path("elsewhere.so");
    fs::rename(standin.path(CUBLASLT), &elsewhere).unwrap();
    let mut check = standin.laam();
    check.args(["check", "--backend", "cuda", "--only", "linear", "--precision", "float32"]);
    done(check.args(["--seed", "7"]).env("LAAM_CUBLASLT", &elsewhere));
}

#[test]
fn device_calls_are_those_of_a_strict_driver() {
    let Some(standin) = Standin::new() else { return };
    // The loader reads LD_LIBRARY_PATH when a process begins.
    let mut inside = Command::new(std::env::current_exe().unwrap());
    inside.args(["standin::inside_the_stand_in_driver", "--exact", "--include-ignored"]);
    inside.env("LD_LIBRARY_PATH", standin.folder.path()).env("LAAM_CUDA_PTX", "1");
    let (out, _) = done(inside.env("LAAM_TEST_INSIDE", "1"));
    assert!(out.contains("1 passed"), "{out}");
}

#[test]
#[ignore = "device_calls_are_those_of_a_strict_driver runs it where the loader finds the stand-ins"]
fn inside_the_stand_in_driver() {
    if std::env::var_os("LAAM_TEST_INSIDE").is_none() {
        return;
    }
    let mut cuda = Cuda::new(0).unwrap();
    let put = |cuda: &mut Cuda, values: &[f32]| {
        let at = cuda.alloc(4 * values.len()).unwrap();
        cuda.upload(at, &Dtype::F32.encode(values)).unwrap();
        at
    };
    let get = |cuda: &Cuda, at: Address, len: usize| {
        let mut bytes = vec![0; 4 * len];
        cuda.download(at, &mut bytes).unwrap();
        Dtype::F32.decode(&bytes)
    };
    let launch = |cuda: &mut Cuda, launch: &Launch| {
        // SAFETY: `probe_shared` writes one word at its first argument.
        unsafe { cuda.launch(launch) }
    };

    // Static and dynamic shared memory together are above 48 KiB, each is not.
    let wrong = put(&mut cuda, &[1.0]);
    let shared = 48 << 10;
    let edge = Launch {
        kernel: families::PROBE_SHARED,
        grid: [1, 1, 1],
        block: [256, 1, 1],
        shared,
        args: vec![wrong.into(), (shared / 4).into()],
    };
    let start = cuda.record_event().unwrap();
    launch(&mut cuda, &edge).unwrap();
    let end = cuda.record_event().unwrap();
    assert!(cuda.elapsed(start, end).unwrap() > 0.0);
    cuda.clear_events();
    assert_eq!(get(&cuda, wrong, 1), [0.0]);
    let too_much = Launch { shared: 227 << 10, ..edge.clone() };
    let said = launch(&mut cuda, &too_much).unwrap_err().to_string();
    assert!(said.contains("bytes of shared memory, but the GPU has 232448"), "{said}");

    // Rows with gaps, in memory of which the gaps were never written.
    let a = Matrix::new(put(&mut cuda, &[1.0, 2.0, 3.0, 4.0]), Dtype::F32, 2, 2);
    let c = Matrix::new(cuda.alloc(32).unwrap(), Dtype::F32, 2, 2).with_stride(4);
    cuda.matmul(&Matmul { a, b: a.t(), c, accumulate: false, batch: 1 }).unwrap();
    assert_eq!(get(&cuda, c.at, 2), [5.0, 11.0]);
    assert_eq!(get(&cuda, c.at.plus(16), 2), [11.0, 25.0]);

    // A forbidden call ends a capture with an error, and the device goes on.
    let to = put(&mut cuda, &[0.0; 4]);
    cuda.begin_capture().unwrap();
    assert!(cuda.alloc(4).is_err());
    assert!(cuda.end_capture().is_err());
    cuda.begin_capture().unwrap();
    cuda.copy(a.at, to, 16).unwrap();
    let graph = cuda.end_capture().unwrap();
    assert_eq!(get(&cuda, to, 4), [0.0; 4]);
    cuda.launch_graph(graph).unwrap();
    assert_eq!(get(&cuda, to, 4), [1.0, 2.0, 3.0, 4.0]);

    // A range outside an allocation; memory freed twice is nobody's.
    assert!(cuda.memset(to, 0, 17).is_err());
    cuda.free(to).unwrap();
    assert!(cuda.upload(to, &[0]).is_err() && cuda.free(to).is_err());
    let said = cuda.launch_graph(graph).unwrap_err().to_string();
    assert!(said.contains("memory was freed"), "{said}");
    // Another device of this process shares context and kernels.
    let mut other = Cuda::new(0).unwrap();
    let said = launch(&mut other, &edge).unwrap_err().to_string();
    assert!(said.contains("of another device"), "{said}");
    let own = put(&mut other, &[1.0]);
    launch(&mut other, &Launch { args: vec![own.into(), (shared / 4).into()], ..edge.clone() })
        .unwrap();
    drop(other);
    launch(&mut cuda, &edge).unwrap();
    cuda.synchronize().unwrap();
    assert!(cuda.describe().contains("simulated GPU") && cuda.peak_flops(Dtype::Bf16).is_none());
}

/// Functions whose failure is not an error of the command: they give something back, describe an error,
/// or have a replacement.
const TOLERATED: [&str; 14] = [
    "cuEventDestroy_v2",
    "cuGetErrorString",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuMemFree_v2",
    "cuStreamDestroy_v2",
    "cublasLtCreate",
    "cublasLtMatmulAlgoCheck",
    "cublasLtMatmulDescCreate",
    "cublasLtMatmulDescDestroy",
    "cublasLtMatmulPreferenceDestroy",
    "cublasLtMatrixLayoutCreate",
    "cublasLtMatrixLayoutDestroy",
    "cudaStandinGemm",
];

/// A run that is resumed with a fault: it ends within ten seconds, with a sentence and a hint or well; its
/// checkpoint is as before, and the model in its folder, if there is one, is the finished one.
struct FaultTable {
    standin: Standin,
    saved: Vec<u8>,
    finished: Vec<u8>,
    calls: BTreeMap<String, u64>,
}

impl FaultTable {
    fn new() -> Option<FaultTable> {
        let standin = Standin::new()?;
        standin.prepare();
        standin.cut(&mut standin.train("cuda", "begun", 8), 200);
        copy(&standin.path("begun"), &standin.path("run"));
        done(standin.train("cuda", "run", 8).arg("--resume"));
        let (saved, finished) = (standin.model("begun/checkpoint-4"), standin.model("run"));
        let report = standin.report();
        let calls = report["calls"].as_object().unwrap();
        let mut calls: BTreeMap<_, _> =
            calls.iter().map(|(name, count)| (name.clone(), count.as_u64().unwrap())).collect();
        for symbol in [
            "cublasLtCreate",
            "cublasLtMatmul",
            "cublasLtMatmulAlgoCheck",
            "cublasLtMatmulDescCreate",
            "cublasLtMatmulDescDestroy",
            "cublasLtMatrixLayoutCreate",
            "cublasLtMatrixLayoutDestroy",
        ] {
            calls.insert(symbol.to_string(), 1);
        }
        Some(FaultTable { standin, saved, finished, calls })
    }

    /// Resumes with a fault, and returns what was said if the command failed.
    fn resume(&self, fault: &str) -> Option<String> {
        let run = self.standin.path("run");
        fs::remove_dir_all(&run).unwrap();
        copy(&self.standin.path("begun"), &run);
        let mut train = self.standin.train("cuda", "run", 8);
        train.arg("--resume").env("CUDA_STANDIN_FAULT", fault);
        let output = bounded(&mut train, Duration::from_secs(10), MEMORY);
        let saved = self.standin.model("run/checkpoint-4");
        assert!(saved == self.saved, "{fault}: the checkpoint is lost");
        let ended_well = output.status.success();
        if ended_well || run.join("model.safetensors").exists() {
            assert!(self.standin.model("run") == self.finished, "{fault}: another model");
        }
        (!ended_well).then(|| error_in(&output))
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(|entry| entry.unwrap()) {
        let to = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), to).unwrap();
        }
    }
}

#[test]
fn first_calls_that_fail_are_errors_with_hints_and_lose_nothing() {
    let Some(table) = FaultTable::new() else { return };
    for symbol in table.calls.keys() {
        let code = if symbol.starts_with("cublas") { 14 } else { 999 };
        // A device that is only queried is dropped first: nothing waits for its work.
        let said = (1..=2).find_map(|call| table.resume(&format!("{symbol}@{call}={code}")));
        let tolerated = TOLERATED.contains(&symbol.as_str());
        assert!(said.is_some() || tolerated, "{symbol}: the run did not notice");
    }
    // Errors of kernels arrive after their launch, at the next synchronization.
    for (fault, text) in [
        ("kernel@9=719", "unspecified launch failure"),
        ("kernel@40=700", "an illegal memory access was encountered"),
        ("cuMemAlloc_v2@5=2", "out of memory (CUDA_ERROR_OUT_OF_MEMORY)"),
    ] {
        let said = table.resume(fault).unwrap();
        assert!(said.contains(text), "{fault}: {said}");
        done(table.standin.train("cuda", "run", 8).arg("--resume"));
        assert!(table.standin.model("run") == table.finished, "{fault}: resumed");
    }
}

#[test]
#[ignore = "a minute: cargo test --test suite standin -- --include-ignored"]
fn last_calls_that_fail_are_errors_with_hints_and_lose_nothing() {
    let Some(table) = FaultTable::new() else { return };
    for (symbol, &calls) in table.calls.iter().filter(|&(_, &calls)| calls > 1) {
        for call in [calls / 2, calls] {
            table.resume(&format!("{symbol}@{call}=999"));
        }
    }
}

/// `laam train` in slices, on as many GPUs as there are processes.
fn train_slices(standin: &Standin, output: &str, steps: usize, processes: usize) -> Command {
    let mut train = standin.train_windows("cuda", output, steps, "8", "32");
    train.args(["--dp_slices", "4"]);
    train.env("CUDA_STANDIN_GPUS", "4").env("CUDA_STANDIN_THREADS", "1");
    if processes > 1 {
        train.args(["--gpus", &processes.to_string()]);
    }
    train
}

#[test]
fn gpus_that_exchange_through_nccl_have_the_bits_of_one() {
    let Some(standin) = Standin::new() else { return };
    standin.prepare();
    let lines = ["--logging_steps", "2"];
    done(train_slices(&standin, "1", 4, 1).args(lines));
    for (processes, name, nccl, how) in [
        (2, "2", "", "2 processes (NCCL 2.32.3), 4 slices"),
        (4, "4", "", "4 processes (NCCL 2.32.3), 4 slices"),
        (
            2,
            "staged",
            "off",
            "(staged through the hosts over sockets: rank 0 has no NCCL: LAAM_NCCL is off)",
        ),
    ] {
        let mut train = train_slices(&standin, name, 4, processes);
        let (_, said) = done(train.args(lines).env("LAAM_NCCL", nccl));
        assert!(said.contains(how), "{said}");
        assert!(standin.model(name) == standin.model("1"), "{name}");
        assert_eq!(standin.losses(name), standin.losses("1"), "{name}");
        let calls = standin.report()["calls"].clone();
        // Exchanges are part of graphs, or are staged between eager launches.
        assert_eq!(calls["cudaStandinExchange"].is_null(), nccl == "off", "{calls}");
        let file = standin.path(name).join("provenance.json");
        let record: Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
        assert_eq!(record["sessions"][0]["ranks"], processes);
        let exchanges = record["sessions"][0]["exchanges"].as_str().unwrap();
        assert!(how.contains(exchanges), "{exchanges}");
    }
    let mut bench = standin.laam();
    bench.args("bench collectives --gpus 2 --backend cuda --json".split(' '));
    bench.args("--min_bytes 1000 --max_bytes 20000 --rounds 2".split(' '));
    let timed = done(bench.env("CUDA_STANDIN_GPUS", "2")).0;
    let timed: Value = serde_json::from_str(&timed).unwrap();
    assert_eq!(timed["library"], "NCCL 2.32.3");
    let names = timed["collectives"].as_array().unwrap().iter();
    let names: Vec<_> = names.map(|row| row["exchange"].as_str().unwrap()).take(6).collect();
    let kinds = ["all_to_all", "all_gather", "reduce"];
    assert_eq!(names, kinds.map(|name| [name.to_string(), format!("{name}, graph")]).concat());
}

/// Starts a run on two GPUs that lasts, signals rank 1 once there are steps, and waits for the end.
fn signaled(standin: &Standin, flags: &[&str], signal: libc::c_int) -> Output {
    let name = format!("signal-{signal}");
    let mut train = train_slices(standin, &name, 100_000, 2);
    train.args(["--logging_steps", "2"]).args(flags);
    train.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = train.spawn().unwrap();
    let began = Instant::now();
    let lines = || fs::read_to_string(standin.path(&name).join("metrics.jsonl"));
    while lines().map_or(0, |text| text.lines().count()) < 2 {
        assert!(began.elapsed() < Duration::from_mins(1), "no lines in a minute");
        assert!(child.try_wait().unwrap().is_none(), "it ended too early");
        std::thread::sleep(Duration::from_millis(10));
    }
    let children = format!("/proc/{0}/task/{0}/children", child.id());
    let children = fs::read_to_string(children).unwrap();
    let second = children.split_whitespace().nth(1).unwrap().parse().unwrap();
    // SAFETY: the process is one of the run that this test started.
    assert_eq!(unsafe { libc::kill(second, signal) }, 0);
    let began = Instant::now();
    let output = child.wait_with_output().unwrap();
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    output
}

#[test]
fn a_rank_that_is_lost_ends_exchanges_of_gpus() {
    let Some(standin) = Standin::new() else { return };
    standin.prepare();
    let said = |output: &Output| String::from_utf8_lossy(&output.stderr).into_owned();
    let killed = signaled(&standin, &[], libc::SIGKILL);
    assert_eq!(killed.status.code(), Some(128 + libc::SIGKILL), "{}", said(&killed));
    assert!(said(&killed).contains("laam: rank 0 lost rank 1 in "), "{}", said(&killed));
    let late = signaled(&standin, &["--rank_timeout", "5"], libc::SIGSTOP);
    assert_eq!(late.status.code(), Some(75), "{}", said(&late));
    // In an exchange of the GPU or of the hosts: the signal comes at any time.
    assert!(said(&late).contains("laam: rank 0 waited 5 s in "), "{}", said(&late));

    for (fault, text) in [
        ("ncclAllGather@2=3", "all_gather: internal error - please report this"),
        ("ncclCommInitRank@1=2", "ncclCommInitRank: unhandled system error"),
    ] {
        let mut train = train_slices(&standin, "fault", 4, 2);
        let failed = output(train.arg("--overwrite").env("CUDA_STANDIN_FAULT", fault));
        assert_eq!(failed.status.code(), Some(75), "{}", said(&failed));
        assert!(said(&failed).contains(text), "{fault}: {}", said(&failed));
    }
    let few = output(train_slices(&standin, "few", 4, 4).env("CUDA_STANDIN_GPUS", "2"));
    assert_eq!(few.status.code(), Some(2), "{}", said(&few));
    assert!(said(&few).contains("no GPU 2: the driver shows 2"), "{}", said(&few));
    without(&standin, NCCL, "ncclCommAbort");
    let (_, staged) = done(train_slices(&standin, "old", 2, 2).arg("--overwrite"));
    assert!(staged.contains("has no ncclCommAbort"), "{staged}");
}

/// Processes that are started one by one, with the variables of torchrun: on one GPU, with another cuBLASLt, with
/// another choice of algorithms, which they agree on, and with a slow GPU.
#[test]
fn ranks_on_other_gpus_or_with_another_cublaslt_agree_or_are_told_of() {
    let Some(standin) = Standin::new() else { return };
    standin.prepare();
    done(&mut train_slices(&standin, "1", 2, 1));
    let version = "CUDA_STANDIN_CUBLASLT";
    let algorithms = "CUDA_STANDIN_ALGORITHMS";
    for (name, gpus, (variable, value), text) in [
        ("shared", "1", (version, "130000"), "ranks 0 and 1 share a GPU"),
        (
            "mixed",
            "2",
            (version, "130100"),
            "warning: rank 1 has another version of cuBLASLt than rank 0",
        ),
        ("agreed", "2", (algorithms, "second"), "2 processes"),
        ("slow", "2", (algorithms, "two"), "warning: rank 1 is slowest, "),
    ] {
        let steps = if name == "slow" { 40 } else { 2 };
        let port = free_port();
        let start = |rank: usize| {
            let mut train = train_slices(&standin, name, steps, 1);
            train.args(["--logging_steps", &steps.to_string()]);
            train.env("RANK", rank.to_string()).env("WORLD_SIZE", "2").env("LOCAL_WORLD_SIZE", "2");
            train.env("MASTER_ADDR", "localhost").env("MASTER_PORT", (port - 1).to_string());
            train.env("CUDA_STANDIN_GPUS", gpus);
            if rank == 1 {
                train.env(variable, value);
            }
            train.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        };
        let ranks = [start(0), start(1)].map(|child| child.wait_with_output().unwrap());
        let said = String::from_utf8_lossy(&ranks[0].stderr);
        assert!(ranks.iter().all(|output| output.status.success()), "{ranks:?}");
        assert!(said.contains(text), "{name}: {said}");
        assert!(!said.contains("other matmul algorithms"), "{name}: {said}");
        assert!(steps > 2 || standin.model(name) == standin.model("1"), "{name}");
    }
}
