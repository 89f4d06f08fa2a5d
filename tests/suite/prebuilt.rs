//! The PTX in `kernels/prebuilt`, which a build without nvcc takes: that it was made from the sources that
//! are there, that nvcc still makes it, and what `build.rs` does with it.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use laam::kernels::prebuilt::{MANIFEST, ShippedKernels, ShippedModule, source_hash};
use laam::kernels::signature::Signature;
use laam::kernels::{BUILD, CUDA_MODULES, portable, unpack};
use lzma_rust2::{XzOptions, XzWriter};

const WRITE: &str = "scripts/prebuild";

fn kernels() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels")
}

/// Writes the folder again.
fn write(folder: &Path) {
    let nvcc = BUILD.cuda.expect("kernels");
    assert!(nvcc.path.is_some(), "{WRITE} needs nvcc");
    let mut modules = Vec::new();
    for file in fs::read_dir(folder).unwrap() {
        fs::remove_file(file.unwrap().path()).unwrap();
    }
    for module in CUDA_MODULES {
        let file = fs::File::create(folder.join(format!("{}.ptx.xz", module.name))).unwrap();
        let mut packed = XzWriter::new(file, XzOptions::with_preset(6)).unwrap();
        packed.write_all(portable(module.ptx()).as_bytes()).unwrap();
        packed.finish().unwrap();
        modules.push(ShippedModule {
            name: module.name.to_string(),
            hash: source_hash(&kernels(), module.name).unwrap(),
            kernels: Signature::of_ptx(module.ptx()),
        });
    }
    let shipped = ShippedKernels { nvcc: nvcc.version.into(), modules };
    fs::write(folder.join(MANIFEST), shipped.text()).unwrap();
}

#[test]
fn shipped_ptx_is_that_of_the_sources() {
    let folder = kernels().join("prebuilt");
    if std::env::var_os("LAAM_PREBUILT").is_some_and(|wish| wish == "write") {
        write(&folder);
    }
    let shipped =
        ShippedKernels::parse(&fs::read_to_string(folder.join(MANIFEST)).unwrap()).unwrap();
    let names: BTreeSet<_> = shipped.modules.iter().map(|module| module.name.as_str()).collect();
    let sources = fs::read_dir(kernels()).unwrap().map(|entry| entry.unwrap().path());
    let sources = sources.filter(|path| path.extension() == Some("cu".as_ref()));
    let sources: Vec<_> = sources.collect();
    let stems = sources.iter().map(|path| path.file_stem().unwrap().to_str().unwrap());
    assert_eq!(names, stems.collect(), "{WRITE}");
    let same_nvcc = BUILD.cuda.is_ok_and(|nvcc| nvcc.version == shipped.nvcc);
    if !same_nvcc {
        eprintln!(
            "SKIPPED: comparing the shipped PTX with nvcc's, because nvcc {} is not here",
            shipped.nvcc
        );
    }
    let assembler =
        BUILD.cuda.ok().and_then(|nvcc| Some(Path::new(nvcc.path?).with_file_name("ptxas")));
    let assembler = assembler.filter(|ptxas| ptxas.is_file());
    if assembler.is_none() {
        eprintln!("SKIPPED: assembling the shipped PTX, because there is no ptxas");
    }
    let mut total = 0;
    for ShippedModule { name, hash, kernels: signatures } in &shipped.modules {
        let now = source_hash(&kernels(), name).unwrap();
        assert_eq!(*hash, now, "kernels/{name}.cu or a header changed: {WRITE}");
        let packed = fs::read(folder.join(format!("{name}.ptx.xz"))).unwrap();
        total += packed.len();
        let text = unpack(&packed).unwrap();
        assert_eq!(*signatures, Signature::of_ptx(&text), "kernels of {name}.cu: {WRITE}");
        if same_nvcc {
            let module = laam::kernels::module(name).unwrap();
            assert!(
                text == portable(module.ptx()),
                "nvcc makes other PTX of kernels/{name}.cu: {WRITE}"
            );
        }
        if let Some(ptxas) = &assembler {
            assembles(ptxas, name, &text);
        }
    }
    assert!(total < 768 << 10, "{total} bytes");
}

/// The whole text is legal at its ISA version; machine code is made of its first entry.
fn assembles(ptxas: &Path, name: &str, text: &str) {
    assert!(text.starts_with(".version 7.0\n.target sm_80\n"), "{name}: {}", &text[..40]);
    let file = tempfile::Builder::new().suffix(".ptx").tempfile().unwrap();
    fs::write(file.path(), text).unwrap();
    let (_, rest) = text.split_once(".entry ").unwrap();
    let entry = rest.split('(').next().unwrap();
    let mut command = Command::new(ptxas);
    command.args(["-O0", "-arch=sm_80", "-o", "/dev/null", "-e", entry]).arg(file.path());
    let output = command.output().unwrap();
    assert!(output.status.success(), "{name}: {output:?}");
}

/// `build.rs` as cargo runs it, in a folder with these kernels.
struct BuildScript {
    folder: tempfile::TempDir,
}

impl BuildScript {
    fn new() -> BuildScript {
        let folder = tempfile::tempdir().unwrap();
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut rustc = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
        rustc.args(["--edition=2024", "-o"]).arg(folder.path().join("build")).arg("build.rs");
        assert!(rustc.current_dir(root).status().unwrap().success());
        for part in ["", "lib", "prebuilt"] {
            let to = folder.path().join("kernels").join(part);
            fs::create_dir_all(&to).unwrap();
            for file in fs::read_dir(kernels().join(part)).unwrap().map(|file| file.unwrap()) {
                if file.path().is_file() {
                    fs::copy(file.path(), to.join(file.file_name())).unwrap();
                }
            }
        }
        BuildScript { folder }
    }

    /// What it tells cargo, and the Rust text that it writes, if it succeeds.
    fn run(&self, laam_cuda: &str) -> (String, Option<String>) {
        let mut build = Command::new(self.folder.path().join("build"));
        build.env_clear().current_dir(self.folder.path());
        for (name, value) in [
            ("CARGO_FEATURE_CUDA", "1"),
            ("CARGO_FEATURE_SIM", "1"),
            ("LAAM_CUDA", laam_cuda),
            // A machine whose toolkit lies in one of the usual places has an nvcc all the same.
            ("PATH", "/nowhere"),
            ("OUT_DIR", self.folder.path().to_str().unwrap()),
        ] {
            build.env(name, value);
        }
        let output = build.output().unwrap();
        let text = output
            .status
            .success()
            .then(|| fs::read_to_string(self.folder.path().join("kernels.rs")).unwrap());
        (String::from_utf8(output.stdout).unwrap(), text)
    }
}

#[test]
fn a_build_without_nvcc_takes_the_shipped_ptx_unless_it_is_stale() {
    if ["/usr/local/cuda/bin/nvcc", "/opt/cuda/bin/nvcc"]
        .iter()
        .any(|nvcc| Path::new(nvcc).exists())
    {
        eprintln!("SKIPPED: builds without nvcc, because there is one in a usual place");
        return;
    }
    let script = BuildScript::new();
    for choice in ["auto", "prebuilt"] {
        let (said, text) = script.run(choice);
        let text = text.unwrap();
        assert!(!said.contains("cargo::warning"), "{said}");
        assert!(text.contains("cuda: Ok(Nvcc { path: None, version: \"13.0."), "{text}");
        assert_eq!(
            text.matches("CudaModule::shipped(").count(),
            CUDA_MODULES.len().max(1),
            "{text}"
        );
    }
    let (_, text) = script.run("off");
    assert!(text.is_some_and(|text| text.contains("LAAM_CUDA=off") && !text.contains("shipped(")));
    let (said, text) = script.run("require");
    assert!(said.contains("LAAM_CUDA=require, but there is no nvcc") && text.is_none(), "{said}");

    let header = script.folder.path().join("kernels/lib/vector.cuh");
    fs::write(&header, fs::read_to_string(&header).unwrap() + "\n").unwrap();
    let (said, text) = script.run("auto");
    assert!(said.contains("cargo::warning=no CUDA kernels") && said.contains(WRITE), "{said}");
    assert!(text.is_some_and(|text| text.contains("cuda: Err(")));
    let (said, text) = script.run("prebuilt");
    assert!(said.contains("was made from other sources") && text.is_none(), "{said}");
}
